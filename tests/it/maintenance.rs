//! What an operator asks of members: alarms, hashes, defragmentation; and large reads, which are bounded in memory.

use quorate::pb::etcd::alarm_request::AlarmAction;
use quorate::pb::etcd::downgrade_request::DowngradeAction;
use quorate::pb::etcd::request_op::Request;
use quorate::pb::etcd::{
    AlarmMember, AlarmRequest, AlarmType, CompactionRequest, DefragmentRequest, DeleteRangeRequest, DowngradeRequest,
    HashRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use tonic::{Code, Status};

use crate::support::cluster::{Cluster, wait_for};

/// A member that an alarm of this kind is put on for: any will do, but CORRUPT concerns only the one it names, or with 0 all.
async fn member_of(cluster: &Cluster, kind: AlarmType) -> u64 {
    if kind == AlarmType::Nospace { cluster.member_id(0).await } else { 0 }
}

async fn alarm(cluster: &Cluster, slot: u64, action: AlarmAction, kind: AlarmType) -> Result<Vec<AlarmMember>, Status> {
    let request = AlarmRequest { action: action.into(), member_id: member_of(cluster, kind).await, alarm: kind.into() };
    Ok(cluster.maintenance(slot).alarm(request).await?.into_inner().alarms)
}

/// The cluster version must have risen, which the leader does by itself.
async fn activate(cluster: &Cluster, slot: u64, kind: AlarmType) {
    let told = wait_for("an alarm to be taken", async || {
        alarm(cluster, slot, AlarmAction::Activate, kind).await.map_err(|status| status.message().to_owned())
    })
    .await;
    assert_eq!(told, [AlarmMember { member_id: member_of(cluster, kind).await, alarm: kind.into() }]);
}

async fn try_put(cluster: &Cluster, slot: u64) -> Result<(), (Code, String)> {
    let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
    cluster.kv(slot).put(put).await.map(drop).map_err(|status| (status.code(), status.message().to_owned()))
}

async fn wait_put(cluster: &Cluster, slot: u64, expected: Result<(), (Code, String)>) {
    wait_for(&format!("a put to be answered {expected:?}"), async || {
        let seen = try_put(cluster, slot).await;
        if seen == expected { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_are_known_to_all_and_survive_restarts() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    activate(&cluster, 1, AlarmType::Nospace).await;
    let no_space = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned());
    wait_put(&cluster, 2, Err(no_space.clone())).await;
    // Deletions free space.
    cluster.kv(0).delete_range(DeleteRangeRequest { key: "k".into(), ..Default::default() }).await.unwrap();
    cluster.kill_all();
    cluster.start_all().await;
    for slot in 0..3 {
        wait_for("every member to know the alarm", async || {
            match alarm(&cluster, slot, AlarmAction::Get, AlarmType::None).await {
                Ok(on) if on.len() == 1 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        assert!(alarm(&cluster, slot, AlarmAction::Get, AlarmType::Corrupt).await.unwrap().is_empty());
    }
    wait_put(&cluster, 0, Err(no_space)).await;
    let listed = format!("{:016x} NOSPACE", cluster.member_id(0).await);
    assert!(cluster.client(&["alarm", "list"]).await.contains(&listed));
    assert_eq!(cluster.client(&["alarm", "disarm"]).await, "");
    wait_put(&cluster, 0, Ok(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_is_taken_as_soon_as_there_is_a_leader_and_known_to_whatever_is_asked_later_at_any_member() {
    let cluster = Cluster::start(3).await;
    let no_space = Err((Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned()));
    for round in 0..20 {
        let [one, two, three] = [round, round + 1, round + 2].map(|n| n % 3);
        let on = alarm(&cluster, one, AlarmAction::Activate, AlarmType::Nospace).await.unwrap();
        assert_eq!(on.len(), 1, "round {round}");
        // Only the first alarm may be of a cluster whose version has not risen that far.
        if round > 0 {
            assert_eq!(try_put(&cluster, two).await, no_space, "round {round}");
        } else {
            wait_put(&cluster, two, no_space.clone()).await;
        }
        let delete = DeleteRangeRequest { key: "k".into(), ..Default::default() };
        cluster.kv(three).delete_range(delete).await.expect("what frees is taken");
        alarm(&cluster, three, AlarmAction::Deactivate, AlarmType::Nospace).await.unwrap();
        assert_eq!(try_put(&cluster, two).await, Ok(()), "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_alarms_and_sizes_as_etcd_does() {
    let cluster = Cluster::start(1).await;
    let empty = cluster.status(0).await.unwrap();
    assert!(empty.db_size > 0 && empty.db_size_in_use > 0, "{empty:?}: tools divide by it");
    assert_eq!((empty.errors.len(), empty.is_learner, empty.downgrade_info), (0, false, Some(Default::default())));
    assert!(empty.header.unwrap().revision > 0 && empty.db_size_quota > 0 && !empty.storage_version.is_empty());
    let mut kv = cluster.kv(0);
    let value = bytes::Bytes::from(vec![b'v'; 100 << 10]);
    let mut revision = 0;
    for _ in 0..20 {
        let put = PutRequest { key: "k".into(), value: value.clone(), ..Default::default() };
        revision = kv.put(put).await.unwrap().into_inner().header.unwrap().revision;
    }
    let full = cluster.status(0).await.unwrap();
    assert!(full.db_size_in_use > 20 * (100 << 10), "versions that are not compacted are in use: {full:?}");
    assert!(full.db_size_in_use <= full.db_size);
    kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    let compacted = cluster.status(0).await.unwrap();
    assert!(compacted.db_size_in_use < 2 * (100 << 10), "{compacted:?}");
    let member = cluster.member_id(0).await;
    activate(&cluster, 0, AlarmType::Nospace).await;
    activate(&cluster, 0, AlarmType::Corrupt).await;
    let errors = cluster.status(0).await.unwrap().errors;
    let expected = [format!("memberID:{member} alarm:NOSPACE"), "alarm:CORRUPT".to_owned()];
    assert_eq!(errors[..2], expected, "in the order in which they were put on");
    let listed = alarm(&cluster, 0, AlarmAction::Get, AlarmType::None).await.unwrap();
    assert_eq!(listed.iter().map(|on| on.alarm()).collect::<Vec<_>>(), [AlarmType::Nospace, AlarmType::Corrupt]);
}

/// Both waited for the next turn of who does it: half a second, and an interval of the state store.
#[tokio::test(flavor = "multi_thread")]
async fn defragmentation_and_physical_compaction_begin_at_once() {
    let mut cluster = Cluster::new(1);
    cluster.set("state.checkpoint_interval", "1h").set("storage.quota_bytes", "0");
    cluster.start_all().await;
    let mut kv = cluster.kv(0);
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        let revision = cluster.put(0, "k", "v").await;
        kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    }
    let took = begin.elapsed();
    assert!(took < std::time::Duration::from_secs(9), "20 compactions of nothing took {took:?}");
    cluster.maintenance(0).defragment(DefragmentRequest {}).await.unwrap();
    assert_eq!(cluster.status(0).await.unwrap().db_size_quota, -1, "no quota, as etcd shows it");
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_data_is_not_served() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    activate(&cluster, 0, AlarmType::Corrupt).await;
    let corrupt = (Code::DataLoss, "etcdserver: corrupt cluster".to_owned());
    for slot in 0..3 {
        wait_put(&cluster, slot, Err(corrupt.clone())).await;
        let range = RangeRequest { key: "k".into(), serializable: true, ..Default::default() };
        assert_eq!(cluster.kv(slot).range(range).await.unwrap_err().code(), Code::DataLoss);
        cluster.wait_http(slot, "/health", 503, &["ALARM CORRUPT"]).await;
        cluster.wait_http(slot, "/readyz?verbose", 503, &["[-]data_corruption failed"]).await;
    }
    alarm(&cluster, 2, AlarmAction::Deactivate, AlarmType::Corrupt).await.unwrap();
    wait_put(&cluster, 1, Ok(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_answer_the_same_hash() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    for n in 0..10 {
        cluster.put(n % 3, &format!("k{n}"), "v").await;
    }
    cluster.wait_same_hash(0..3).await;
    let mut hashes = Vec::new();
    for slot in 0..3 {
        let answer = cluster.maintenance(slot).hash(HashRequest {}).await.unwrap().into_inner();
        hashes.push((answer.hash, answer.header.unwrap().revision));
    }
    hashes.dedup();
    assert_eq!(hashes.len(), 1, "{hashes:?}");
    assert_eq!(cluster.hash_kv(0, 0).await.unwrap().compact_revision, -1, "as etcd before the first compaction");
    let table = cluster.client(&["hash"]).await;
    assert_eq!(table.matches(&format!("{:08x}", hashes[0].0)).count(), 3, "{table}");
}

fn size_of(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(dir).unwrap().filter_map(Result::ok);
    // What it takes on the disk: a file may vanish while we look.
    entries
        .map(|entry| {
            if entry.path().is_dir() {
                size_of(&entry.path())
            } else {
                entry.metadata().map_or(0, |m| m.blocks() * 512)
            }
        })
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn defragmentation_gives_disk_back_and_stops_nobody() {
    let cluster = Cluster::start(1).await;
    let mut kv = cluster.kv(0);
    let value = "v".repeat(60 << 10);
    for n in 0..600 {
        let put = PutRequest { key: format!("k{n}").into(), value: value.clone().into(), ..Default::default() };
        kv.put(put).await.unwrap();
    }
    let all = DeleteRangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
    kv.delete_range(all).await.unwrap();
    let revision = cluster.put(0, "last", "v").await;
    kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    let state = cluster.member_dir(0).join("state");
    // The checkpoint of it all must have been written before there is anything to give back.
    let before = wait_for("the state to be on disk", async || match size_of(&state) {
        bytes if bytes > 20 << 20 => Ok(bytes),
        bytes => Err(format!("{bytes} bytes")),
    })
    .await;
    let defragment = tokio::spawn({
        let mut maintenance = cluster.maintenance(0);
        async move { maintenance.defragment(DefragmentRequest {}).await.map(drop) }
    });
    let mut writes = 0;
    while !defragment.is_finished() || writes < 10 {
        cluster.put(0, "other", "v").await;
        writes += 1;
    }
    defragment.await.unwrap().unwrap();
    wait_for("the disk to be given back", async || match size_of(&state) {
        bytes if bytes < before / 2 => Ok(()),
        bytes => Err(format!("{bytes} bytes of {before}")),
    })
    .await;
    let mut cluster = cluster;
    cluster.kill(0);
    cluster.start_all().await;
    assert_eq!(cluster.get(0, "last").await.as_deref(), Some("v"));
    assert_eq!(cluster.get(0, "k1").await, None);
    assert!(cluster.client(&["defrag"]).await.contains(": done"));
}

#[tokio::test(flavor = "multi_thread")]
async fn downgrades_are_answered_as_by_etcd() {
    let cluster = Cluster::start(1).await;
    let ask = async |action: DowngradeAction, version: &str| {
        let request = DowngradeRequest { action: action.into(), version: version.into() };
        let answer = cluster.maintenance(0).downgrade(request).await;
        answer.map(|answer| answer.into_inner().version).map_err(|status| (status.code(), status.message().to_owned()))
    };
    for taken in ["3.6.0", "3.6", "3.6.5-rc.1", "3.6.0+b"] {
        assert_eq!(ask(DowngradeAction::Validate, taken).await, Ok("3.7".into()), "{taken}");
    }
    for malformed in ["v3.6.0", "v3.6", "3", "3.6.x", "3.6.0.0", "3.6.-1"] {
        let refused = ask(DowngradeAction::Validate, malformed).await.unwrap_err();
        assert_eq!(refused.1, "etcdserver: wrong downgrade target version format", "{malformed}");
    }
    let cases = [
        (DowngradeAction::Validate, "3.5.0", Code::InvalidArgument, "etcdserver: invalid downgrade target version"),
        (DowngradeAction::Validate, "x", Code::InvalidArgument, "etcdserver: wrong downgrade target version format"),
        (DowngradeAction::Cancel, "", Code::FailedPrecondition, "etcdserver: no inflight downgrade job"),
    ];
    for (action, version, code, text) in cases {
        assert_eq!(ask(action, version).await, Err((code, text.to_owned())), "{version}");
    }
    assert_eq!(ask(DowngradeAction::Enable, "3.6.0").await.unwrap_err().0, Code::Unimplemented);
}

const LARGE_BYTES: u64 = 100 << 20;

/// 100 MiB in values of 1 MiB.
async fn fill(cluster: &Cluster) {
    let mut kv = cluster.kv(0);
    let value = bytes::Bytes::from(vec![b'v'; 1 << 20]);
    for n in 0..LARGE_BYTES >> 20 {
        let put = PutRequest { key: format!("large{n:03}").into(), value: value.clone(), ..Default::default() };
        kv.put(put).await.unwrap();
    }
}

/// Growth of the most that the server took at a time, over what it took before.
async fn growth(cluster: &Cluster, work: impl Future<Output = ()>) -> u64 {
    // Checkpoints of what was put before take memory of their own for a while.
    let before = wait_for("memory to settle", async || {
        let first = cluster.resident_bytes(0);
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        let second = cluster.resident_bytes(0);
        if first.abs_diff(second) < 1 << 20 { Ok(second) } else { Err(format!("{first}, then {second}")) }
    })
    .await;
    cluster.forget_peak(0);
    work.await;
    cluster.peak_resident_bytes(0).saturating_sub(before)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_100_mib_takes_its_answer_and_little_more() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    let all = RangeRequest { key: "large".into(), range_end: "largf".into(), ..Default::default() };
    let unary = growth(&cluster, async {
        let answer = cluster.kv(0).range(all.clone()).await.unwrap().into_inner();
        assert_eq!((answer.kvs.len() as u64, answer.more), (LARGE_BYTES >> 20, false));
    })
    .await;
    assert!(unary < LARGE_BYTES + (48 << 20), "a unary range took {} MiB", unary >> 20);
    let streamed = growth(&cluster, async {
        let mut pieces = cluster.kv(0).range_stream(all.clone()).await.unwrap().into_inner();
        let (mut keys, mut last) = (0, None);
        while let Some(piece) = pieces.message().await.unwrap() {
            assert_eq!(last, None, "header, more and count come with the last piece alone");
            let piece = piece.range_response.unwrap();
            keys += piece.kvs.len() as u64;
            last = piece.header.map(|header| (header.revision > 0, piece.count, piece.more));
        }
        assert_eq!((keys, last), (LARGE_BYTES >> 20, Some((true, keys as i64, false))));
    })
    .await;
    assert!(streamed < 48 << 20, "a streamed range took {} MiB", streamed >> 20);
    println!("growth of resident memory: unary {} MiB, streamed {} MiB", unary >> 20, streamed >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_range_is_of_one_revision() {
    let cluster = Cluster::start(1).await;
    let mut kv = cluster.kv(0);
    for n in 0..2000 {
        let value = vec![b'a'; 2000].into();
        kv.put(PutRequest { key: format!("k{n:05}").into(), value, ..Default::default() }).await.unwrap();
    }
    let all = RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
    let mut pieces = cluster.kv(0).range_stream(all).await.unwrap().into_inner();
    let first = pieces.message().await.unwrap().unwrap().range_response.unwrap();
    assert!(!first.kvs.is_empty() && first.kvs.len() < 2000 && first.header.is_none(), "{} keys", first.kvs.len());
    // The rest is not sent yet, or not read: what is written now must not show in it.
    kv.delete_range(DeleteRangeRequest { key: "k01999".into(), ..Default::default() }).await.unwrap();
    kv.put(PutRequest { key: "k01500".into(), value: "changed".into(), ..Default::default() }).await.unwrap();
    let mut found = first.kvs.len();
    while let Some(piece) = pieces.message().await.unwrap() {
        let piece = piece.range_response.unwrap();
        assert!(piece.kvs.iter().all(|kv| kv.value().len() == 2000));
        found += piece.kvs.len();
    }
    assert_eq!(found, 2000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_physical_compaction_may_take_longer_than_other_requests() {
    let mut cluster = Cluster::new(1);
    cluster.set("server.request_timeout", "700ms");
    cluster.start_all().await;
    let put = |n: u32| PutRequest { key: format!("k{n}").into(), value: "v".into(), ..Default::default() };
    let puts = (0..128).map(|n| RequestOp { request: Some(Request::RequestPut(put(n))) });
    let txn = TxnRequest { success: puts.collect(), ..Default::default() };
    let mut kv = cluster.kv(0);
    let mut revision = 0;
    for _ in 0..1000 {
        revision = kv.txn(txn.clone()).await.unwrap().into_inner().header.unwrap().revision;
    }
    let before = cluster.status(0).await.unwrap().db_size;
    kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    let after = cluster.status(0).await.unwrap().db_size;
    assert!(after < before / 100, "{before} bytes before, {after} when it was answered");
}
