//! A member's disk: purged logs, damage, and no space left.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quorate::pb::etcd::{CompactionRequest, DeleteRangeRequest, PutRequest};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use crate::support::cluster::{Cluster, wait_for};
use crate::support::tools;

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

async fn put_bytes(cluster: &Cluster, slot: u64, key: &str, bytes: usize) -> Result<(), String> {
    let put = PutRequest { key: key.to_owned().into(), value: vec![b'x'; bytes].into(), ..Default::default() };
    cluster.kv(slot).put(put).await.map(drop).map_err(|status| status.message().to_owned())
}

/// Waits until puts are refused because there is no space.
async fn wait_refused(cluster: &Cluster, slot: u64) {
    wait_for("puts to be refused", async || match put_bytes(cluster, slot, "probe", 10).await {
        Err(text) if text == NO_SPACE => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

async fn delete_all(cluster: &Cluster, slot: u64) -> i64 {
    let all = DeleteRangeRequest { key: vec![0].into(), range_end: vec![0].into(), ..Default::default() };
    cluster.kv(slot).delete_range(all).await.unwrap().into_inner().header.unwrap().revision
}

/// The number of the oldest segment of the pod's log.
pub fn oldest_segment(cluster: &Cluster, slot: u64) -> u32 {
    let names = std::fs::read_dir(cluster.member_dir(slot).join("log")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(".log")?.parse().ok()).min().unwrap()
}

/// A cluster of three whose members have purged their logs behind a snapshot file.
async fn purged_cluster() -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.set("log.segment_bytes", "3MiB").set("log.bytes_max", "6MiB");
    cluster.set("log.entries_max", "50").set("log.entries_kept", "5");
    cluster.start_all().await;
    for i in 0..100 {
        let key = format!("k{:02}", i % 40);
        wait_for("a put", async || put_bytes(&cluster, i % 3, &key, 100 << 10).await).await;
    }
    for slot in 0..3 {
        cluster.wait_logged(slot, &["snapshot written"]).await;
        wait_for(&format!("kv-{slot} to unlink its first segment"), async || {
            let oldest = oldest_segment(&cluster, slot);
            if oldest > 1 { Ok(()) } else { Err(oldest) }
        })
        .await;
    }
    cluster
}

/// The database file of the pod's state store.
fn state_file(cluster: &Cluster, slot: u64) -> PathBuf {
    let state = cluster.member_dir(slot).join("state");
    let current = std::fs::read_to_string(state.join("current")).unwrap();
    state.join(current.split(' ').next().unwrap()).join("db")
}

/// Inverts a byte in every 997 of the file, but for its first ones.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[2000..].iter_mut().step_by(997).for_each(|byte| *byte = !*byte);
    std::fs::write(file, bytes).unwrap();
}

/// A member whose log no longer begins at the start is brought up by snapshot: a wiped pod holds the same as the others then.
#[tokio::test(flavor = "multi_thread")]
async fn wiped_pod_gets_a_purged_log_s_state_by_snapshot() {
    let mut cluster = purged_cluster().await;
    let hash = cluster.wait_same_hash(0..3).await;
    cluster.kill(2);
    cluster.wipe(2);
    cluster.start_all().await;
    cluster.wait_logged(2, &["snapshot installed"]).await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
    // What it was sent is on its disk: it starts from that again.
    let id = cluster.member_id(2).await;
    cluster.kill(2);
    cluster.start_all().await;
    assert_eq!((cluster.member_id(2).await, cluster.wait_same_hash(0..3).await), (id, hash));
}

/// A damaged state store is set aside and rebuilt from the snapshot file and the log; nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_state_store_is_rebuilt_from_snapshot_and_log() {
    let mut cluster = purged_cluster().await;
    let (id, hash) = (cluster.member_id(1).await, cluster.wait_same_hash(0..3).await);
    // A store that was opened anew has an index, without which sled takes damage for the end of what was written.
    cluster.kill(1);
    cluster.start_all().await;
    cluster.kill(1);
    damage(&state_file(&cluster, 1));
    cluster.start_all().await;
    cluster.wait_logged(1, &["ERROR", "damaged and set aside"]).await;
    cluster.wait_logged(1, &["state taken from the snapshot file"]).await;
    cluster.wait_logged(1, &["state store written afresh"]).await;
    assert_eq!((cluster.member_id(1).await, cluster.wait_same_hash(0..3).await), (id, hash));
    // The rebuilt store serves the next start.
    cluster.kill(1);
    std::fs::remove_dir_all(cluster.member_dir(1).join("snapshot")).unwrap();
    cluster.start_all().await;
    assert_eq!((cluster.member_id(1).await, cluster.wait_same_hash(0..3).await), (id, hash));
}

/// A deleted state store is recovered from the snapshot file and the log.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_state_store_is_recovered_from_snapshot_and_log() {
    let mut cluster = purged_cluster().await;
    let (id, hash) = (cluster.member_id(1).await, cluster.wait_same_hash(0..3).await);
    cluster.kill(1);
    std::fs::remove_dir_all(cluster.member_dir(1).join("state")).unwrap();
    cluster.start_all().await;
    cluster.wait_logged(1, &["state taken from the snapshot file"]).await;
    assert_eq!((cluster.member_id(1).await, cluster.wait_same_hash(0..3).await), (id, hash));
}

/// Without state store and snapshot file a purged log continues nothing: the disk is lost, and the pod is a new member.
#[tokio::test(flavor = "multi_thread")]
async fn purged_log_without_any_state_is_a_lost_disk() {
    let mut cluster = purged_cluster().await;
    let (id, hash) = (cluster.member_id(1).await, cluster.wait_same_hash(0..3).await);
    cluster.kill(1);
    for part in ["state", "snapshot"] {
        std::fs::remove_dir_all(cluster.member_dir(1).join(part)).unwrap();
    }
    cluster.start_pod(1);
    cluster.wait_logged(1, &["ERROR", "disk is lost", "the log begins after index"]).await;
    wait_for("a new member in slot 1", async || {
        let ids: Vec<u64> = cluster.membership(0).await.iter().map(|m| m.0).collect();
        if ids.contains(&id) { Err(format!("{ids:x?}")) } else { Ok(()) }
    })
    .await;
    cluster.wait_formed().await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
}

/// Inverts a byte in the middle of what the pod's log has written, and returns the file.
fn damage_log(cluster: &Cluster, slot: u64) -> PathBuf {
    let log = cluster.member_dir(slot).join("log").join("0000000001.log");
    let mut bytes = std::fs::read(&log).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[used / 2] ^= 0xff;
    std::fs::write(&log, bytes).unwrap();
    log
}

/// Case 36: a corrupt log is refused by file and offset, and while a quorum of others lives the pod comes back as a new member.
#[tokio::test(flavor = "multi_thread")]
async fn corrupt_log_is_refused_and_the_pod_rejoins() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..50 {
        cluster.put(i % 3, &format!("k{i}"), "v").await;
    }
    let (id, hash) = (cluster.member_id(2).await, cluster.wait_same_hash(0..3).await);
    cluster.kill(2);
    let log = damage_log(&cluster, 2);
    cluster.start_pod(2);
    cluster.wait_logged(2, &["ERROR", log.to_str().unwrap(), "is damaged at offset"]).await;
    wait_for("a new member in slot 2", async || {
        let ids: Vec<u64> = cluster.membership(0).await.iter().map(|m| m.0).collect();
        if ids.contains(&id) { Err(format!("{ids:x?}")) } else { Ok(()) }
    })
    .await;
    cluster.wait_formed().await;
    assert_eq!(cluster.wait_same_hash(0..3).await, hash);
    assert!(log.exists(), "the damaged disk is kept for inspection");
}

/// Case 36: without a quorum of others the corrupt log may be the best that is left: the pod stops and says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn corrupt_log_without_a_quorum_stops_the_pod() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..50 {
        cluster.put(i % 3, &format!("k{i}"), "v").await;
    }
    cluster.kill_all();
    let log = damage_log(&cluster, 2);
    cluster.start_pod(2);
    let status = cluster.wait_exit(2).await;
    assert_eq!(status.code(), Some(1));
    let text = cluster.log_text(2);
    let last = text.trim_end().lines().last().unwrap();
    for part in [log.to_str().unwrap(), "is damaged at offset", "delete this member's data directory"] {
        assert!(last.contains(part), "{part:?} is not in {last:?}");
    }
}

/// The data is over its quota: puts are refused, deletes and a compaction free it, and puts are taken again.
#[tokio::test(flavor = "multi_thread")]
async fn quota_refuses_puts_until_space_is_freed() {
    let mut cluster = Cluster::new(3);
    cluster.set("storage.quota_bytes", "1MiB");
    cluster.start_all().await;
    wait_for("the quota to be reached", async || match put_bytes(&cluster, 0, "k", 100 << 10).await {
        Err(text) if text == NO_SPACE => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    for slot in 0..3 {
        wait_refused(&cluster, slot).await;
        cluster.wait_http(slot, "/health", 503, &["NOSPACE"]).await;
    }
    assert!(cluster.get(1, "k").await.is_some());
    let revision = delete_all(&cluster, 1).await;
    let compaction = CompactionRequest { revision, physical: true };
    cluster.kv(2).compact(compaction).await.unwrap();
    wait_for("puts to be taken", async || put_bytes(&cluster, 2, "k", 10).await).await;
    for slot in 0..3 {
        cluster.wait_http(slot, "/health", 200, &["true"]).await;
    }
    cluster.wait_same_hash(0..3).await;
}

/// Fills the pod's disk until `free` bytes are left.
pub fn fill(cluster: &Cluster, slot: u64, free: u64) {
    let disk = cluster.disk_of(slot);
    // The pod takes space meanwhile, perhaps.
    for _ in 0..20 {
        let file = std::fs::File::create(disk.join("filler")).unwrap();
        let stat = statvfs(&disk).unwrap();
        let bytes = (stat.f_bavail * stat.f_frsize).checked_sub(free).expect("there is more than that");
        match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::NOSPC) => {}
            filled => return filled.unwrap(),
        }
    }
    panic!("the disk of kv-{slot} cannot be filled but for {free} bytes");
}

/// Case 35: a full disk on a quorum refuses puts before they are proposed; deletes are still taken; once there is space puts
/// are taken again by themselves.
#[tokio::test(flavor = "multi_thread")]
async fn full_disk_refuses_puts_before_proposing_and_recovers() {
    const RESERVE: u64 = 32 << 20;
    if !tools::can_have_small_disks() {
        return;
    }
    let mut cluster = Cluster::new(3);
    cluster.set("storage.disk_reserve", "32MiB").set("log.segment_bytes", "3MiB").set("log.bytes_max", "6MiB");
    cluster.set_small_disks(0..3, 128 << 20);
    let leader = cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    let [one, two] = [(leader + 1) % 3, (leader + 2) % 3];
    // One of three may be full: the others are a quorum.
    fill(&cluster, one, RESERVE / 2);
    cluster.wait_logged(one, &["condition begins", "disk-nearly-full", "full but for its reserve"]).await;
    let low_since = Instant::now();
    while low_since.elapsed() < Duration::from_secs(2) {
        put_bytes(&cluster, two, "one is full", 10).await.unwrap();
    }
    fill(&cluster, two, RESERVE / 2);
    for slot in 0..3 {
        wait_refused(&cluster, slot).await;
    }
    let before = cluster.status(leader).await.unwrap();
    for i in 0..20 {
        assert_eq!(put_bytes(&cluster, i % 3, "refused", 1000).await, Err(NO_SPACE.to_owned()));
    }
    let after = cluster.status(leader).await.unwrap();
    assert_eq!((after.raft_index, after.raft_term), (before.raft_index, before.raft_term), "nothing was proposed");
    delete_all(&cluster, one).await;
    assert_eq!(cluster.get(two, "k").await, None);
    for slot in [one, two] {
        std::fs::remove_file(cluster.disk_of(slot).join("filler")).unwrap();
    }
    for slot in 0..3 {
        wait_for("puts to be taken", async || put_bytes(&cluster, slot, "after", 10).await).await;
    }
    cluster.wait_same_hash(0..3).await;
}
