//! Disks that go back: a log that lost its newest frames, an earlier image that was put back, and an identity that cannot be read.

use std::path::{Path, PathBuf};
use std::process::Command;

use quorate::env::disk::RealDisk;
use quorate::pb::etcd::MoveLeaderRequest;
use quorate::storage::log::damage::{self, Way};

use crate::support::cluster::{Cluster, wait_for};
use crate::support::tools;

const PUTS: u64 = 20;

/// A cluster of three that was killed: puts that only the leader and one other pod have acknowledged, which are returned first and second.
/// The third was away.
async fn acknowledged_by_two() -> (Cluster, u64, u64, u64) {
    let mut cluster = Cluster::start(3).await;
    cluster.put(0, "before", "v").await;
    let leader = cluster.leader(0..3).await.unwrap();
    let (holder, away) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.wait_same_hash(0..3).await;
    cluster.kill(away);
    for i in 0..PUTS {
        cluster.put(leader, &format!("k{i}"), "v").await;
    }
    cluster.kill_all();
    (cluster, leader, holder, away)
}

fn log_dir(cluster: &Cluster, slot: u64) -> PathBuf {
    cluster.member_dir(slot).join("log")
}

/// Takes the newest frames away, one for each put.
fn lose_tail(cluster: &Cluster, slot: u64, way: Way) {
    let dir = log_dir(cluster, slot);
    let ends = damage::frames(&RealDisk, &dir).unwrap();
    damage::lose_behind(&RealDisk, &dir, ends[ends.len() - 1 - PUTS as usize], way).unwrap();
}

/// The member id that the disk of a stopped pod belongs to.
fn identity(cluster: &Cluster, slot: u64) -> u64 {
    let dir = cluster.member_dir(slot);
    let name = dir.file_name().unwrap().to_str().unwrap();
    u64::from_str_radix(name.strip_prefix("member-").unwrap(), 16).unwrap()
}

/// Waits until member `id` has gone from the membership that `slot` shows.
async fn wait_replaced(cluster: &Cluster, slot: u64, id: u64) {
    wait_for(&format!("member {id:x} to be replaced"), async || {
        let ids: Vec<u64> = cluster.membership(slot).await.iter().map(|member| member.0).collect();
        if ids.contains(&id) { Err(format!("{ids:x?}")) } else { Ok(()) }
    })
    .await;
    cluster.wait_formed().await;
}

/// The last line that the pod has logged.
fn last_line(cluster: &Cluster, slot: u64) -> String {
    cluster.log_text(slot).trim_end().lines().last().unwrap().to_owned()
}

/// One damaged disk and any number of crashes lose nothing: the holder of the puts does not take its log for a shorter one, and so does
/// not lead, with the pod that was away, to a history without them.
async fn lost_tail_is_no_shorter_log(way: Way) {
    let (mut cluster, leader, holder, away) = acknowledged_by_two().await;
    let id = identity(&cluster, holder);
    lose_tail(&cluster, holder, way);
    cluster.start_pod(holder);
    cluster.start_pod(away);
    assert_eq!(cluster.wait_exit(holder).await.code(), Some(1));
    let last = last_line(&cluster, holder);
    for part in [log_dir(&cluster, holder).to_str().unwrap(), "is damaged at offset"] {
        assert!(last.contains(part), "{part:?} is not in {last:?}");
    }
    assert!(last.contains("its tail is lost") || last.contains("the file was cut"), "{last:?}");

    // With the third pod back, a quorum of others lives, and the damaged one goes on as a new member.
    cluster.start_pod(leader);
    cluster.start_pod(holder);
    wait_replaced(&cluster, leader, id).await;
    cluster.wait_same_hash(0..3).await;
    for i in 0..PUTS {
        assert_eq!(cluster.get(holder, &format!("k{i}")).await.as_deref(), Some("v"), "k{i}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zeroed_tail_is_no_shorter_log() {
    lost_tail_is_no_shorter_log(Way::Zeroed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_tail_is_no_shorter_log() {
    lost_tail_is_no_shorter_log(Way::Cut).await;
}

/// Should a loss go unnoticed all the same (here the mark is gone, too): the last disk that holds what was committed gives nothing up.
#[tokio::test(flavor = "multi_thread")]
async fn committed_entries_are_never_cut_from_a_log() {
    let (mut cluster, leader, holder, away) = acknowledged_by_two().await;
    lose_tail(&cluster, holder, Way::Zeroed);
    damage::forget_mark(&RealDisk, &log_dir(&cluster, holder)).unwrap();
    // It may reach further than the log is left.
    std::fs::remove_dir_all(cluster.member_dir(holder).join("state")).unwrap();
    cluster.start_pod(holder);
    cluster.start_pod(away);
    cluster.put(holder, "after", "v").await;
    let before = damage::frames(&RealDisk, &log_dir(&cluster, leader)).unwrap();
    cluster.start_pod(leader);
    assert_eq!(cluster.wait_exit(leader).await.code(), Some(1));
    cluster.wait_logged(leader, &["were committed here", "keep a copy of it"]).await;
    let after = damage::frames(&RealDisk, &log_dir(&cluster, leader)).unwrap();
    assert_eq!(after[..before.len()], before, "its log is as it was");
}

fn copy(from: &Path, to: &Path) {
    tools::run(Command::new("cp").arg("-a").arg(from).arg(to));
}

/// Takes an image of the pod's disk, has the cluster acknowledge more, and puts the image back. Returns the state's hash before that.
async fn put_back(cluster: &mut Cluster, slot: u64, leads: bool, size: u64) -> u32 {
    let id = cluster.member_id(slot).await;
    cluster.kill(slot);
    copy(&cluster.data_dir(slot), &cluster.root().join("image"));
    cluster.start_pod(slot);
    cluster.wait_formed().await;
    wait_for("the wanted leader", async || match cluster.leader(0..size).await {
        Some(leader) if (leader == slot) == leads => Ok(()),
        Some(leader) => {
            let target_id = if leads { id } else { cluster.member_id((slot + 1) % size).await };
            let _ = cluster.maintenance(leader).move_leader(MoveLeaderRequest { target_id }).await;
            Err(format!("kv-{leader} leads"))
        }
        None => Err("there is none".to_owned()),
    })
    .await;
    for i in 0..50 {
        cluster.put(i % size, &format!("new{i}"), "v").await;
    }
    let hash = cluster.wait_same_hash(0..size).await;
    cluster.kill(slot);
    cluster.wipe(slot);
    cluster.put_disk("image", slot);
    cluster.start_pod(slot);
    hash
}

/// A volume snapshot is restored under a cluster that lives: the member has forgotten what it acknowledged. It is noticed, counts for
/// nothing until then, and is a lost disk.
#[tokio::test(flavor = "multi_thread")]
async fn disk_that_was_put_back_is_a_lost_one() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..20 {
        cluster.put(i % 3, &format!("old{i}"), "v").await;
    }
    let id = cluster.member_id(1).await;
    let hash = put_back(&mut cluster, 1, false, 3).await;
    cluster.wait_logged(1, &["ERROR", "a leader with a quorum remembers more", "goes on as a new member"]).await;
    wait_replaced(&cluster, 0, id).await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
}

/// What a leader wrote to its own disk is remembered by those who followed it. The others elect another meanwhile, who brings this disk up
/// like any that lags; until then it must not vote.
#[tokio::test(flavor = "multi_thread")]
async fn disk_of_a_leader_that_was_put_back_leads_nobody_astray() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..20 {
        cluster.put(i % 3, &format!("old{i}"), "v").await;
    }
    let hash = put_back(&mut cluster, 1, true, 3).await;
    cluster.wait_logged(1, &["ERROR", "holds less than it once acknowledged"]).await;
    cluster.wait_formed().await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
}

/// Without a quorum of others no disk is given up: it votes for the one that holds what it forgot, and gets that back.
#[tokio::test(flavor = "multi_thread")]
async fn disk_that_was_put_back_beside_one_other_follows_it() {
    let mut cluster = Cluster::start(2).await;
    cluster.put(0, "old", "v").await;
    let id = cluster.member_id(1).await;
    let hash = put_back(&mut cluster, 1, false, 2).await;
    cluster.wait_logged(1, &["ERROR", "holds less than it once acknowledged"]).await;
    cluster.wait_formed().await;
    assert_eq!((cluster.member_id(1).await, cluster.wait_same_hash(0..2).await), (id, hash));
}

/// A file that says who a node is was damaged: with a quorum of others it goes on as a new member, beside what is left.
async fn damaged_file_heals(file: impl Fn(&Cluster) -> PathBuf) {
    let mut cluster = Cluster::start(3).await;
    for i in 0..10 {
        cluster.put(i % 3, &format!("k{i}"), "v").await;
    }
    let hash = cluster.wait_same_hash(0..3).await;
    cluster.kill_all();
    let (id, old, path) = (identity(&cluster, 2), cluster.member_dir(2), file(&cluster));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    std::fs::write(&path, &bytes).unwrap();

    // Nobody is there: a person must decide, and nothing is touched.
    cluster.start_pod(2);
    assert_eq!(cluster.wait_exit(2).await.code(), Some(1));
    let last = last_line(&cluster, 2);
    assert!(last.contains("cannot read who it is") && last.contains(path.to_str().unwrap()), "{last}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);

    cluster.start_all().await;
    cluster.wait_logged(2, &["ERROR", "identity is lost", path.to_str().unwrap()]).await;
    wait_replaced(&cluster, 0, id).await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
    assert!(old.join("log").exists(), "the former self is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_identity_heals_with_a_quorum_of_others() {
    damaged_file_heals(|cluster| cluster.member_dir(2).join("identity")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_current_heals_with_a_quorum_of_others() {
    damaged_file_heals(|cluster| cluster.data_dir(2).join("current")).await;
}
