//! Joining, lost disks and old ones: what changes the membership, and what must not.

use std::os::unix::process::ExitStatusExt as _;

use quorate::env::fail::VARIABLE;
use quorate::pb::etcd::RangeRequest;

use crate::support::cluster::{Cluster, wait_for};

/// A follower, as kv-0's cluster of three knows it.
async fn follower(cluster: &Cluster) -> u64 {
    let leader = cluster.wait_formed().await;
    (0..3).find(|slot| *slot != leader).unwrap()
}

fn others(slot: u64) -> [u64; 2] {
    [(slot + 1) % 3, (slot + 2) % 3]
}

/// Waits until the cluster has three voters of slots 0 to 2 and no other member.
async fn wait_exactly_three(cluster: &Cluster) {
    cluster.wait_formed().await;
    wait_for("no member but the three voters", async || {
        let members = cluster.membership(0).await;
        if members.len() == 3 { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
}

/// Case 4: pod-0 loses its disk while its peers run: it comes back as a new member by itself, with all data.
#[tokio::test(flavor = "multi_thread")]
async fn wiped_pod_comes_back_as_a_new_member() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..20 {
        cluster.put(i % 3, &format!("k{i}"), "v").await;
    }
    let old = cluster.member_id(0).await;
    cluster.kill(0);
    cluster.wipe(0);
    cluster.start_pod(0);
    wait_exactly_three(&cluster).await;
    let new = cluster.member_id(0).await;
    assert_ne!(new, old);
    let ids: Vec<u64> = cluster.membership(1).await.iter().map(|m| m.0).collect();
    assert!(ids.contains(&new) && !ids.contains(&old), "{ids:x?}");
    for i in 0..20 {
        assert_eq!(cluster.get(0, &format!("k{i}")).await.as_deref(), Some("v"));
    }
    cluster.wait_same_hash(0..3).await;
}

/// Cases 14 and 20, as far as joining goes: a pod that was away while writes went on comes back on a fresh disk.
#[tokio::test(flavor = "multi_thread")]
async fn pod_that_was_away_joins_on_a_fresh_disk() {
    let mut cluster = Cluster::start(3).await;
    cluster.kill(2);
    cluster.wipe(2);
    for i in 0..20 {
        cluster.put(i % 2, &format!("k{i}"), "v").await;
    }
    cluster.start_pod(2);
    wait_exactly_three(&cluster).await;
    assert_eq!(cluster.get(2, "k19").await.as_deref(), Some("v"));
    cluster.wait_same_hash(0..3).await;
}

/// Case 19: a pod that comes back with its old disk is the same member.
#[tokio::test(flavor = "multi_thread")]
async fn restarted_pod_keeps_its_member_id() {
    let mut cluster = Cluster::start(3).await;
    let before = cluster.membership(0).await;
    for slot in 0..3 {
        cluster.kill(slot);
        cluster.put((slot + 1) % 3, &format!("k{slot}"), "v").await;
        cluster.start_pod(slot);
        assert_eq!(cluster.get(slot, &format!("k{slot}")).await.as_deref(), Some("v"));
    }
    cluster.wait_formed().await;
    for slot in 0..3 {
        assert_eq!(cluster.membership(slot).await, before);
        assert!(before.contains(&(cluster.member_id(slot).await, true)));
    }
}

/// Case 24: a pod that is killed and stays away changes no membership, also when it has long counted as dead.
#[tokio::test(flavor = "multi_thread")]
async fn dead_pod_stays_a_member() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.failure_timeout", "1500ms");
    cluster.start_all().await;
    let before = cluster.membership(0).await;
    let victim = follower(&cluster).await;
    cluster.kill(victim);
    let dead_since = std::time::Instant::now();
    let [one, two] = others(victim);
    let mut writes = 0;
    while dead_since.elapsed().as_secs() < 4 {
        cluster.put(one, "k", &writes.to_string()).await;
        writes += 1;
        assert_eq!(cluster.membership(two).await, before, "after {writes} writes");
    }
    cluster.start_pod(victim);
    cluster.wait_formed().await;
    assert_eq!(cluster.membership(victim).await, before);
}

/// Case 8: one survivor of three waits, says for whom and names `recover`; it serves serializable reads and no others.
#[tokio::test(flavor = "multi_thread")]
async fn survivor_of_a_lost_majority_serves_serializable_reads_only() {
    let mut cluster = Cluster::new(3);
    cluster.set("server.request_timeout", "1s");
    let survivor = cluster.start_all().await;
    cluster.put(survivor, "k", "v").await;
    let [one, two] = others(survivor);
    cluster.kill(one);
    cluster.kill(two);
    let (one, two) = (cluster.peer_address(one), cluster.peer_address(two));
    cluster.wait_unready(survivor, &["1 of 2 needed voters", "`recover`", &one, &two]).await;
    cluster.wait_logged(survivor, &["condition begins", "no-leader", "`quorate recover`"]).await;
    let mut kv = cluster.kv(survivor);
    let read = |serializable| RangeRequest { key: "k".into(), serializable, ..Default::default() };
    assert_eq!(kv.range(read(true)).await.unwrap().into_inner().kvs[0].value()[..], *b"v");
    let refused = kv.range(read(false)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (tonic::Code::Unavailable, "etcdserver: request timed out"));
    let mut needs_leader = tonic::Request::new(read(true));
    needs_leader.metadata_mut().insert("hasleader", "true".parse().unwrap());
    assert_eq!(kv.range(needs_leader).await.unwrap_err().message(), "etcdserver: no leader");
    cluster.start_all().await;
    cluster.wait_http(survivor, "/readyz", 200, &["ok"]).await;
}

/// Case 10: two pods join while one of the present three is down.
#[tokio::test(flavor = "multi_thread")]
async fn pods_join_while_a_peer_is_down() {
    let mut cluster = Cluster::start(3).await;
    cluster.put(0, "k", "v").await;
    cluster.kill(1);
    cluster.set_size(5);
    cluster.start_pod(3);
    cluster.start_pod(4);
    cluster.wait_voters_seen_by(&[0, 2, 3, 4], &[0, 1, 2, 3, 4]).await;
    assert_eq!(cluster.get(4, "k").await.as_deref(), Some("v"));
    cluster.start_all().await;
}

/// Case 11: the leader dies while pods join: the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn join_survives_the_death_of_the_leader() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let [one, two] = others(leader);
    cluster.set_size(5);
    cluster.start_pod(3);
    cluster.start_pod(4);
    wait_for("a learner", async || {
        let members = cluster.membership(one).await;
        if members.len() > 3 { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
    cluster.kill(leader);
    cluster.wait_voters_seen_by(&[one, two, 3, 4], &[0, 1, 2, 3, 4]).await;
    cluster.put(3, "k", "v").await;
    cluster.start_all().await;
    assert_eq!(cluster.get(leader, "k").await.as_deref(), Some("v"));
}

/// Case 3, for joiners: a joiner that dies at any step of joining becomes one member, and leaves no other behind.
#[tokio::test(flavor = "multi_thread")]
async fn crash_at_any_step_of_joining_leaves_one_member() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.promote_after", "100ms");
    cluster.start_all().await;
    let points = ["join.added", "join.before_cluster", "join.cluster_set", "log.before_started", "log.started"];
    for point in points {
        cluster.kill(2);
        cluster.wipe(2);
        cluster.start_pod_with(2, &[(VARIABLE, point)]);
        let status = cluster.wait_exit(2).await;
        assert_eq!(status.signal(), Some(6), "kv-2 dies at {point}, not with {status}");
        cluster.start_pod(2);
        wait_exactly_three(&cluster).await;
        cluster.put(2, "k", point).await;
        assert_eq!(cluster.get(0, "k").await.as_deref(), Some(point));
    }
}

/// Case 30: a disk of another cluster is refused by the members of this one, says so, and is left as it is.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_disk_is_refused_and_untouched() {
    let mut cluster = Cluster::start(3).await;
    let foreign = cluster.cluster_id(0).await;
    cluster.kill_all();
    cluster.take_disk(1, "foreign");
    cluster.wipe(0);
    cluster.wipe(2);
    cluster.start_all().await;
    let (own, before) = (cluster.cluster_id(0).await, cluster.membership(0).await);
    assert_ne!(own, foreign);
    cluster.kill(1);
    cluster.take_disk(1, "own");
    cluster.put_disk("foreign", 1);
    let identity = std::fs::read(cluster.member_dir(1).join("identity")).unwrap();
    cluster.start_pod(1);
    cluster.wait_unready(1, &[&format!("{foreign:016x}"), &format!("{own:016x}")]).await;
    cluster.put(0, "k", "v").await;
    assert_eq!(cluster.membership(0).await, before);
    assert_eq!(cluster.cluster_id(1).await, foreign);
    cluster.kill(1);
    assert_eq!(std::fs::read(cluster.member_dir(1).join("identity")).unwrap(), identity);
    cluster.wipe(1);
    cluster.put_disk("own", 1);
    cluster.start_all().await;
    assert_eq!(cluster.membership(1).await, before);
}

/// Cases 33 and 34: the disk of a former self, started again after it was replaced, does not disturb: it gets no vote, the leader
/// and the term stay. A leader with a quorum tells it that it was removed; it archives itself and joins as a new member, which
/// takes the place of the one that is away. That one's disk fares the same when it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn former_self_does_not_disturb_and_joins_as_a_new_member() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.failure_timeout", "1500ms").set("cluster.promote_after", "100ms");
    cluster.start_all().await;
    let victim = follower(&cluster).await;
    let [one, two] = others(victim);
    let former = cluster.member_id(victim).await;
    cluster.kill(victim);
    cluster.take_disk(victim, "former");
    cluster.start_pod(victim);
    wait_exactly_three(&cluster).await;
    let newer = cluster.member_id(victim).await;
    cluster.kill(victim);
    cluster.take_disk(victim, "newer");
    cluster.put_disk("former", victim);
    let status = cluster.status(one).await.unwrap();
    cluster.start_pod(victim);
    cluster.wait_logged(victim, &["was removed", "archived"]).await;
    cluster.put(one, "k", "v").await;
    wait_for("a third member that is neither", async || {
        let ids: Vec<u64> = cluster.membership(one).await.iter().filter(|m| m.1).map(|m| m.0).collect();
        if ids.len() == 3 && !ids.contains(&former) && !ids.contains(&newer) {
            Ok(())
        } else {
            Err(format!("{ids:x?}"))
        }
    })
    .await;
    wait_exactly_three(&cluster).await;
    for slot in [one, two] {
        let now = cluster.status(slot).await.unwrap();
        assert_eq!((now.raft_term, now.leader), (status.raft_term, status.leader));
    }
    assert_eq!(cluster.get(victim, "k").await.as_deref(), Some("v"));
    // One former self is kept, and the data directory says which.
    let current = std::fs::read_to_string(cluster.data_dir(victim).join("current")).unwrap();
    assert!(current.contains(&format!("member-{former:016x}")), "{current}");
}

/// Case 40: two processes claim one slot: the leader and the newcomer say so, and nothing changes.
#[tokio::test(flavor = "multi_thread")]
async fn two_holders_of_a_slot_are_reported_and_change_nothing() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let before = cluster.membership(leader).await;
    let holder = format!("{:016x}", cluster.member_id(1).await);
    cluster.start_twin(31, 1);
    let claimer = format!("{:016x}", cluster.member_id(31).await);
    let text = ["slot 1 is held by two members", holder.as_str(), claimer.as_str()];
    cluster.wait_unready(31, &text).await;
    cluster.wait_logged(leader, &text).await;
    wait_for("status of the leader to name both", async || {
        let errors = cluster.status(leader).await.unwrap().errors.join("; ");
        if text.iter().all(|part| errors.contains(part)) { Ok(()) } else { Err(errors) }
    })
    .await;
    cluster.put(1, "k", "v").await;
    assert_eq!(cluster.membership(leader).await, before);
}
