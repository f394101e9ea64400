//! Forming a cluster: who waits for whom, and what a crash at any step may lead to.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;

use futures_util::StreamExt as _;
use futures_util::stream;
use quorate::env::fail::{FAIL_POINTS, VARIABLE};

use crate::support::cluster::{Cluster, wait_for};

/// Case 1: fresh 1, 3 and 5 pods, in any order of start, form one cluster.
#[tokio::test(flavor = "multi_thread")]
async fn fresh_pods_form_one_cluster_in_any_order() {
    for (size, order) in [(1, vec![0]), (3, vec![2, 0, 1]), (5, vec![4, 1, 3, 0, 2])] {
        let mut cluster = Cluster::new(size);
        for slot in order {
            cluster.start_pod(slot);
        }
        cluster.wait_formed().await;
        cluster.put(size - 1, "k", "v").await;
        assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
    }
}

/// Case 2: one pod is pending at formation: the others wait, and say for whom in the log, in `/readyz` and in `status`.
#[tokio::test(flavor = "multi_thread")]
async fn formation_waits_for_a_pending_pod_and_names_it() {
    let mut cluster = Cluster::new(3);
    cluster.start_pod(0);
    cluster.start_pod(1);
    let missing = format!("waits for slot 2 ({})", cluster.peer_address(2));
    for slot in [0, 1] {
        cluster.wait_unready(slot, &[&missing]).await;
        cluster.wait_logged(slot, &[&missing]).await;
    }
    let text = wait_for("status to show both pods", async || {
        let text = cluster.client(&["status"]).await;
        if text.matches(&missing).count() >= 2 { Ok(text) } else { Err(text) }
    });
    assert!(text.await.contains("no leader is known"));
    assert_eq!(cluster.leader([0, 1]).await, None);
    cluster.start_all().await;
    cluster.wait_http(0, "/readyz", 200, &["ok"]).await;
}

/// All cluster ids that members have started Raft in: read from what every pod has logged in all its lives.
fn clusters_started(cluster: &Cluster) -> BTreeSet<String> {
    let logs: Vec<String> = (0..3).map(|slot| cluster.log_text(slot)).collect();
    let starts = logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains("member starts"));
    starts.map(|line| line.split(" cluster=").nth(1).unwrap().split(' ').next().unwrap().to_owned()).collect()
}

/// Each of `victims` dies at `point` of its first start, and is started again.
async fn form_with_crashes(point: &str, victims: &[u64]) {
    let mut cluster = Cluster::new(3);
    for slot in 0..3 {
        let env = [(VARIABLE, point)];
        cluster.start_pod_with(slot, if victims.contains(&slot) { &env } else { &[] });
    }
    let mut left = victims.to_vec();
    while !left.is_empty() {
        let (slot, status) = cluster.wait_any_exit(&left).await;
        assert_eq!(status.signal(), Some(6), "kv-{slot} dies at {point}, not with {status}");
        cluster.start_pod(slot);
        left.retain(|victim| *victim != slot);
    }
    cluster.wait_formed().await;
    cluster.put(1, "k", point).await;
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some(point));
    let started = clusters_started(&cluster);
    assert_eq!(started.len(), 1, "{point} in {victims:?}: Raft was started in clusters {started:?}");
}

/// Case 3: a pod-0, and then another pod too, killed at each step of the formation: one cluster, and all three are in it.
#[tokio::test(flavor = "multi_thread")]
async fn crash_at_any_step_of_the_formation_leads_to_one_cluster() {
    let elsewhere = ["formation.before_abandon", "formation.abandoned"];
    let points = FAIL_POINTS.iter().filter(|p| !p.starts_with("join.") && !elsewhere.contains(p));
    // A formation that begins with a backup: `backup::first`.
    let points = points.filter(|p| !p.starts_with("restore."));
    let mut runs: Vec<(&str, &[u64])> = Vec::new();
    for point in points {
        runs.push((point, &[0]));
        // Only the lowest slot proposes.
        if *point != "formation.after_propose" {
            runs.push((point, &[0, 1]));
        }
    }
    assert_eq!(runs.len(), 21);
    let forming = runs.into_iter().map(|(point, victims)| form_with_crashes(point, victims));
    stream::iter(forming).buffer_unordered(2).collect::<Vec<()>>().await;
}

/// Case 3: a formation that has lost a disk is given up, also through crashes while it is, and the next one succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn formation_that_lost_a_disk_is_given_up() {
    for point in ["formation.before_abandon", "formation.abandoned"] {
        let mut cluster = Cluster::new(3);
        cluster.start_pod_with(0, &[(VARIABLE, point)]);
        cluster.start_pod_with(1, &[(VARIABLE, "formation.accepted")]);
        cluster.start_pod(2);
        cluster.wait_exit(1).await;
        cluster.wipe(1);
        cluster.start_pod(1);
        let status = cluster.wait_exit(0).await;
        assert_eq!(status.signal(), Some(6), "kv-0 dies at {point}");
        cluster.start_pod(0);
        cluster.wait_formed().await;
        assert_eq!(clusters_started(&cluster).len(), 1);
    }
}

/// Case 5: pod-0 has lost its disk and both others are down: it does not form a cluster, and says for whom it waits. When they
/// are back it joins them.
#[tokio::test(flavor = "multi_thread")]
async fn pod_0_without_disk_and_peers_never_forms() {
    let mut cluster = Cluster::start(3).await;
    cluster.put(0, "k", "v").await;
    let (former, id) = (cluster.member_id(0).await, cluster.cluster_id(0).await);
    cluster.kill_all();
    cluster.wipe(0);
    cluster.start_pod(0);
    cluster.wait_unready(0, &[&format!("waits for slot 1 ({})", cluster.peer_address(1))]).await;
    cluster.wait_logged(0, &["condition begins", "no-cluster", "waits for slot 1"]).await;
    // With one more it is still no quorum of the old cluster.
    cluster.start_pod(1);
    cluster.wait_unready(0, &[&format!("cluster {id:016x} has no quorum")]).await;
    assert_eq!(cluster.leader([0, 1]).await, None);
    cluster.start_all().await;
    assert_ne!(cluster.member_id(0).await, former);
    assert_eq!(cluster.cluster_id(0).await, id);
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
}

/// Cases 6 and 9: installed with size 1, then 3: the new pods join and vote by themselves, the old one is not restarted; and when
/// then pod-0 loses its disk it joins too.
#[tokio::test(flavor = "multi_thread")]
async fn cluster_of_one_grows_to_three() {
    let mut cluster = Cluster::start(1).await;
    let (first, id) = (cluster.member_id(0).await, cluster.cluster_id(0).await);
    cluster.put(0, "k", "v").await;
    cluster.set_size(3);
    cluster.start_all().await;
    assert_eq!(cluster.member_id(0).await, first);
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some("v"));
    cluster.kill(0);
    cluster.wipe(0);
    cluster.start_all().await;
    assert_ne!(cluster.member_id(0).await, first);
    assert_eq!(cluster.cluster_id(0).await, id);
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
}

/// Case 7: all disks are lost: a new, empty cluster under a new id.
#[tokio::test(flavor = "multi_thread")]
async fn loss_of_all_disks_leads_to_a_new_empty_cluster() {
    let mut cluster = Cluster::start(3).await;
    cluster.put(0, "k", "v").await;
    let id = cluster.cluster_id(0).await;
    cluster.kill_all();
    // Of kv-0 only the log is gone: it knows that it was a member, so its loss is logged as an error.
    std::fs::remove_dir_all(cluster.member_dir(0).join("log")).unwrap();
    cluster.wipe(1);
    cluster.wipe(2);
    cluster.start_all().await;
    assert_ne!(cluster.cluster_id(0).await, id);
    assert_eq!(cluster.get(1, "k").await, None);
    cluster.wait_logged(0, &["ERROR", "a new empty cluster"]).await;
}
