//! Space that runs out: what may still be asked, and that nobody ends for it. Full disks heal in `storage`.

use std::time::{Duration, Instant};

use quorate::pb::etcd::alarm_request::AlarmAction;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::{
    AlarmRequest, AlarmType, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest,
    RequestOp, TxnRequest, request_op,
};
use tonic::Status;

use crate::storage::fill;
use crate::support::cluster::{Cluster, wait_for};
use crate::support::tools;

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

fn seeded() -> fastrand::Rng {
    let seed = std::env::var("QUORATE_TEST_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("seed {seed}");
    fastrand::Rng::with_seed(seed)
}

async fn put(cluster: &Cluster, slot: u64, key: &str, bytes: usize) -> Result<(), Status> {
    let put = PutRequest { key: key.to_owned().into(), value: vec![b'x'; bytes].into(), ..Default::default() };
    cluster.kv(slot).put(put).await.map(drop)
}

fn delete(key: Vec<u8>, range_end: Vec<u8>) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }
}

/// Something that frees nothing, or as good as nothing for its size: keys of up to 100 KiB.
async fn ask_in_vain(cluster: &Cluster, random: &mut fastrand::Rng) -> Result<(), Status> {
    let slot = random.u64(..3);
    let mut kv = cluster.kv(slot);
    let mut long = |first: u8| [vec![first], vec![b'l'; random.usize(..100 << 10)]].concat();
    let (missing, past_end) = (long(b'!'), long(b'~'));
    match random.u8(..9) {
        0..=2 => kv.delete_range(delete(missing, Vec::new())).await.map(drop),
        3 | 4 => {
            let nothing =
                RequestOp { request: Some(request_op::Request::RequestDeleteRange(delete(missing, Vec::new()))) };
            let txn = TxnRequest { success: vec![nothing.clone(), nothing], ..Default::default() };
            let outer = RequestOp { request: Some(request_op::Request::RequestTxn(txn)) };
            kv.txn(TxnRequest { success: vec![outer], ..Default::default() }).await.map(drop)
        }
        // One key goes, for a request of up to 100 KiB.
        5 => {
            let key = format!("k{:03}", random.u32(..200)).into_bytes();
            let end = [&key[..], &[0], &past_end].concat();
            kv.delete_range(delete(key, end)).await.map(drop)
        }
        6 => kv.compact(CompactionRequest { revision: random.i64(1..3), physical: false }).await.map(drop),
        7 => {
            let mut leases = LeaseClient::new(cluster.channel(slot));
            match random.bool() {
                true => leases.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.map(drop),
                false => leases.lease_revoke(LeaseRevokeRequest { id: random.i64(1..) }).await.map(drop),
            }
        }
        _ => {
            let mut alarm = AlarmRequest::default();
            alarm.set_action(if random.bool() { AlarmAction::Activate } else { AlarmAction::Deactivate });
            alarm.set_alarm(AlarmType::Nospace);
            alarm.member_id = random.u64(1..4);
            cluster.maintenance(slot).alarm(alarm).await.map(drop)
        }
    }
}

/// With the disks of two of three full, what frees nothing is refused before it reaches the log, what frees little ends when the log can
/// hardly grow: no member ends, and all goes on when there is space.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_frees_nothing_ends_a_member_whose_disk_is_full() {
    if !tools::can_have_small_disks() {
        return;
    }
    let mut random = seeded();
    let mut cluster = Cluster::new(3);
    cluster.set("storage.disk_reserve", "16MiB").set("log.segment_bytes", "3MiB").set("log.bytes_max", "6MiB");
    // What is asked in vain through a full log is not waited for.
    cluster.set("server.request_timeout", "2s").set_small_disks(0..3, 128 << 20);
    let leader = cluster.start_all().await;
    for key in 0..200 {
        put(&cluster, key % 3, &format!("k{key:03}"), 100).await.unwrap();
    }
    let full = [leader, (leader + 1 + random.u64(..2)) % 3];
    full.iter().for_each(|slot| fill(&cluster, *slot, 0));
    for slot in 0..3 {
        wait_for("puts to be refused", async || match put(&cluster, slot, "probe", 10).await {
            Err(status) if status.message() == NO_SPACE => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }
    let before = cluster.status(leader).await.unwrap().raft_index;
    let begin = Instant::now();
    let (mut asked, mut refused) = (0, 0);
    while begin.elapsed() < Duration::from_secs(20) || asked < 1000 {
        let answers = futures_util::future::join_all((0..8).map(|_| {
            let mut random = random.fork();
            let cluster = &cluster;
            async move { ask_in_vain(cluster, &mut random).await }
        }));
        for answer in answers.await {
            asked += 1;
            refused += u64::from(answer.is_err_and(|status| status.message() == NO_SPACE));
        }
        for slot in 0..3 {
            assert!(cluster.is_running(slot), "kv-{slot} has ended after {asked} requests");
        }
    }
    let after = wait_for("a status", async || cluster.status(leader).await.map_err(|status| status.to_string())).await;
    println!("{asked} asked, {refused} refused; log index {before} to {}", after.raft_index);
    assert!(refused * 2 > asked, "most of it frees nothing: {refused} of {asked} were refused");
    for slot in full {
        std::fs::remove_file(cluster.disk_of(slot).join("filler")).unwrap();
    }
    for kind in [AlarmAction::Deactivate; 3].into_iter().zip(1..4) {
        let mut alarm = AlarmRequest { member_id: kind.1, ..Default::default() };
        alarm.set_action(kind.0);
        alarm.set_alarm(AlarmType::Nospace);
        wait_for("the alarm to be off", async || {
            cluster.maintenance(0).alarm(alarm).await.map(drop).map_err(|status| status.to_string())
        })
        .await;
    }
    for slot in 0..3 {
        wait_for("puts to be taken", async || {
            put(&cluster, slot, "after", 10).await.map_err(|status| status.to_string())
        })
        .await;
    }
    cluster.wait_same_hash(0..3).await;
}

/// One of three whose disk is full takes no more entries, and lives; the others go on, whoever led.
#[tokio::test(flavor = "multi_thread")]
async fn one_full_disk_stops_neither_its_member_nor_the_others() {
    if !tools::can_have_small_disks() {
        return;
    }
    let mut cluster = Cluster::new(3);
    cluster.set("storage.disk_reserve", "16MiB").set("log.segment_bytes", "3MiB").set("log.bytes_max", "6MiB");
    cluster.set_small_disks(0..3, 128 << 20);
    let full = cluster.start_all().await;
    fill(&cluster, full, 0);
    let other = (full + 1) % 3;
    let mut written = 0;
    // Its spare segments and what it had left are used up several times over.
    while written < 200 {
        wait_for("a put beside the full one", async || {
            put(&cluster, other, &format!("k{}", written % 10), 100 << 10).await.map_err(|status| status.to_string())
        })
        .await;
        written += 1;
        assert!(cluster.is_running(full), "kv-{full} has ended after {written} puts");
    }
    let leader = cluster.leader([other]).await;
    assert_ne!(leader, Some(full), "who can write nothing leads nobody");
    std::fs::remove_file(cluster.disk_of(full).join("filler")).unwrap();
    cluster.wait_same_hash(0..3).await;
}

/// A put that would bring the data over its quota is refused, and smaller ones that fit are not; the alarm is shown until there is room
/// for what was refused.
#[tokio::test(flavor = "multi_thread")]
async fn quota_counts_the_request_itself() {
    const QUOTA: u64 = 1 << 20;
    let mut random = seeded();
    let mut cluster = Cluster::new(3);
    cluster.set("storage.quota_bytes", "1MiB").set("server.request_timeout", "20s");
    cluster.start_all().await;
    let (mut refused, mut number) = (0, 0);
    while refused < 20 {
        let slot = random.u64(..3);
        // Side by side, so that what is not applied yet counts too.
        let sizes: Vec<usize> = (0..4).map(|_| random.usize(..200 << 10)).collect();
        let puts = sizes.iter().map(|bytes| {
            number += 1;
            let (key, cluster) = (format!("k{number}"), &cluster);
            async move { put(cluster, slot, &key, *bytes).await }
        });
        for (answer, bytes) in futures_util::future::join_all(puts).await.into_iter().zip(&sizes) {
            let Err(status) = answer else { continue };
            assert_eq!(status.message(), NO_SPACE);
            refused += 1;
            // One that fits when the others are through is no reason for an alarm.
            if cluster.status(slot).await.unwrap().db_size as u64 + *bytes as u64 > QUOTA {
                cluster.wait_http(slot, "/health", 503, &["NOSPACE"]).await;
            }
            println!("refused {bytes} bytes");
        }
        for slot in 0..3 {
            let stored = cluster.status(slot).await.unwrap().db_size as u64;
            // What the state keeps beside keys and values is counted when it is there.
            assert!(stored <= QUOTA + QUOTA / 50, "{stored} bytes are stored");
        }
    }
    let stored = cluster.status(0).await.unwrap().db_size as u64;
    assert!(stored > QUOTA - (200 << 10), "much was refused that would have fitted: {stored} bytes are stored");
    let revision =
        cluster.kv(0).delete_range(delete(vec![0], vec![0])).await.unwrap().into_inner().header.unwrap().revision;
    cluster.kv(0).compact(CompactionRequest { revision, physical: true }).await.unwrap();
    // The leader refuses until it has swept, too.
    for slot in 0..3 {
        cluster.wait_http(slot, "/health", 200, &["true"]).await;
    }
    for slot in 0..3 {
        put(&cluster, slot, "fits", 100 << 10).await.unwrap();
    }
}
