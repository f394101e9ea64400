//! Where work runs: whatever one client asks for, Raft's heartbeats, votes and appends go on, and so do other clients.
//!
//! Judged by what does not depend on the machine: the term stays, and requests of others succeed. The longest stall of each event loop
//! is printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::range_request::SortTarget;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, SnapshotRequest, SnapshotResponse, TxnRequest,
    WatchCreateRequest, WatchRequest, request_op, watch_request,
};
use tokio_stream::StreamExt as _;
use tonic::Streaming;
use tonic::transport::Endpoint;

use crate::support::cluster::{Cluster, http_get, http_post, wait_for};

/// As many as a transaction may have.
const TXN_OPS: usize = 128;

/// More than the blocking threads that tokio has.
const STALLED: usize = 600;
const CONNECTIONS: usize = 3;

/// One whose elections take seconds of silence, which a busy machine alone does not bring.
async fn patient_cluster(settings: &[(&str, &str)]) -> (Cluster, u64) {
    let mut cluster = Cluster::new(3);
    cluster.set("raft.election_timeout_min", "4s").set("raft.election_timeout_max", "5s");
    for (key, value) in settings {
        cluster.set(key, value);
    }
    let leader = cluster.start_all().await;
    (cluster, leader)
}

/// The largest of the bounds below which all noted stalls lie, in seconds: they are a histogram.
async fn longest_stall(cluster: &Cluster, slot: u64) -> String {
    let (_, text) = http_get(&cluster.endpoint(slot), "/metrics").await.unwrap();
    let buckets = text.lines().filter_map(|line| {
        let line = line.strip_prefix("quorate_event_loop_stall_seconds_bucket{le=\"")?;
        let (bound, count) = line.split_once("\"} ")?;
        Some((bound.to_owned(), count.parse::<u64>().ok()?))
    });
    let buckets: Vec<_> = buckets.collect();
    let all = buckets.last().expect("stalls are noted").1;
    buckets.into_iter().find(|(_, count)| *count == all).expect("the last has all").0
}

async fn fill(cluster: &Cluster, slot: u64, keys: usize, bytes: usize) {
    let mut kv = cluster.kv(slot);
    for key in 0..keys {
        let put =
            PutRequest { key: format!("full/{key:06}").into(), value: vec![7; bytes].into(), ..Default::default() };
        kv.put(put).await.expect("a put");
    }
}

/// Opens backups over some connections, takes the first piece of each, and no more.
async fn stall_backups(cluster: &Cluster, slot: u64, count: usize) -> Vec<Streaming<SnapshotResponse>> {
    // A stream that is not read must not keep the others of its connection from their first piece.
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.endpoint(slot))).unwrap();
    let connection = endpoint.initial_connection_window_size(1 << 30).connect_timeout(Duration::from_secs(5));
    let connections: Vec<_> = (0..CONNECTIONS).map(|_| MaintenanceClient::new(connection.connect_lazy())).collect();
    let opened = (0..count).map(|n| {
        let mut maintenance = connections[n % CONNECTIONS].clone();
        async move {
            let mut pieces = maintenance.snapshot(SnapshotRequest {}).await?.into_inner();
            pieces.message().await?.ok_or_else(|| tonic::Status::internal("a backup without a piece"))?;
            Ok::<_, tonic::Status>(pieces)
        }
    });
    join_all(opened).await.into_iter().filter_map(Result::ok).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_backups_hold_no_thread_that_anybody_waits_for() {
    let (cluster, leader) = patient_cluster(&[("limits.backups_max", "2000")]).await;
    // More than a connection's window.
    fill(&cluster, leader, 200, 8 << 10).await;
    let term = cluster.status(leader).await.unwrap().raft_term;
    let mut stalled = Vec::new();
    for slot in 0..3 {
        let opened = stall_backups(&cluster, slot, STALLED).await;
        assert!(opened.len() >= 512, "only {} backups are open at kv-{slot}", opened.len());
        stalled.push(opened);
    }
    for round in 0..20 {
        for slot in 0..3 {
            cluster.put(slot, &format!("meanwhile/{slot}"), &round.to_string()).await;
            let hash = cluster.hash_kv(slot, 0);
            tokio::time::timeout(Duration::from_secs(30), hash).await.expect("a hash needs a thread").expect("a hash");
        }
    }
    judge(&cluster, term).await;
    // What was stalled goes on when it is taken again, but for those whose pieces have waited for room for longer than a request may.
    let of_one = stalled.swap_remove(1);
    drop(stalled);
    let mut last = None;
    for mut backup in of_one {
        let end = loop {
            match backup.message().await {
                Ok(Some(piece)) => last = Some(piece.remaining_bytes),
                end => break end,
            }
        };
        match end {
            Ok(_) => break,
            Err(status) => assert_eq!(status.message(), "etcdserver: too many requests"),
        }
        last = None;
    }
    assert_eq!(last, Some(0), "none of them goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_at_a_time_are_few_and_shared_by_connections() {
    let cluster = Cluster::start(1).await;
    fill(&cluster, 0, 200, 8 << 10).await;
    let stalled = stall_backups(&cluster, 0, 60).await;
    assert!((1..=4).contains(&stalled.len()), "{} backups are open", stalled.len());
    let refused = cluster.maintenance(0).snapshot(SnapshotRequest {}).await;
    if let Err(status) = refused {
        assert_eq!(status.message(), "etcdserver: too many requests");
    }
    drop(stalled);
    wait_for("a place to be free", async || match cluster.maintenance(0).snapshot(SnapshotRequest {}).await {
        Ok(answer) => {
            let mut pieces = answer.into_inner();
            while pieces.message().await.map_err(|e| e.message().to_owned())?.is_some() {}
            Ok(())
        }
        Err(status) => Err(status.message().to_owned()),
    })
    .await;
    let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), count_only: true, ..Default::default() };
    assert_eq!(cluster.kv(0).range(all).await.unwrap().into_inner().count, 200);
}

/// Puts so many keys, many to a transaction.
async fn fill_many(cluster: &Cluster, slot: u64, keys: usize) -> i64 {
    let mut kv = cluster.kv(slot);
    let mut revision = 0;
    for first in (0..keys).step_by(TXN_OPS) {
        let put = |key: usize| {
            let value = format!("{:08x}", key.wrapping_mul(2_654_435_761) as u32).into();
            let put = PutRequest { key: format!("many/{key:06}").into(), value, ..Default::default() };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        };
        let success = (first..keys.min(first + TXN_OPS)).map(put).collect();
        let answer = kv.txn(TxnRequest { success, ..Default::default() }).await.expect("puts").into_inner();
        revision = answer.header.unwrap().revision;
    }
    revision
}

fn many() -> RangeRequest {
    RangeRequest { key: "many/".into(), range_end: "many0".into(), ..Default::default() }
}

/// A client that puts through one member, one put after the other, until it is told to stop; none may fail.
struct Good {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<Duration>>,
}

impl Good {
    fn start(cluster: &Cluster, slot: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut kv, stopped) = (cluster.kv(slot), stop.clone());
        let task = tokio::spawn(async move {
            let mut times = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let put = PutRequest { key: format!("good/{slot}").into(), ..Default::default() };
                kv.put(put).await.unwrap_or_else(|status| panic!("a good client's put through kv-{slot}: {status}"));
                times.push(begin.elapsed());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            times
        });
        Self { stop, task }
    }

    async fn stop(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = self.task.await.expect("the good client goes on");
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!("{what}: {} puts, median {:?}, p99 {:?}, longest {:?}", times.len(), at(50), at(99), at(100));
    }
}

/// What one client asks of one member, again and again.
async fn ask_for_much(cluster: &Cluster, slot: u64, rounds: usize) {
    let mut kv = cluster.kv(slot);
    let json = r#"{"key":"bWFueS8=","range_end":"bWFueTA="}"#;
    for _ in 0..rounds {
        let by_value = RangeRequest { sort_target: SortTarget::Value.into(), sort_order: 2, ..many() };
        kv.range(by_value).await.expect("a range by value");
        let (code, _) = http_post(&cluster.endpoint(slot), "/v3/kv/range", json).await.expect("an answer in JSON");
        assert_eq!(code, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_of_many_keys_elect_nobody_and_others_are_served() {
    let (cluster, leader) = patient_cluster(&[]).await;
    fill_many(&cluster, leader, 20_000).await;
    let term = cluster.status(leader).await.unwrap().raft_term;
    let good: Vec<_> = (0..3).map(|slot| Good::start(&cluster, slot)).collect();
    let follower = (leader + 1) % 3;
    tokio::join!(ask_for_much(&cluster, leader, 5), ask_for_much(&cluster, follower, 5));
    for (slot, good) in good.into_iter().enumerate() {
        good.stop(&format!("reads of many keys, kv-{slot}")).await;
    }
    judge(&cluster, term).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_deletions_and_reads_of_what_they_deleted_elect_nobody() {
    const KEYS: usize = 20_000;
    let (cluster, leader) = patient_cluster(&[]).await;
    let before = fill_many(&cluster, leader, KEYS).await;
    let term = cluster.status(leader).await.unwrap().raft_term;
    let good: Vec<_> = (0..3).map(|slot| Good::start(&cluster, slot)).collect();
    let mut kv = cluster.kv(leader);
    let delete = DeleteRangeRequest { key: "many/".into(), range_end: "many0".into(), prev_kv: true };
    let deleted = kv.delete_range(delete).await.expect("a deletion").into_inner();
    assert_eq!((deleted.deleted, deleted.prev_kvs.len()), (KEYS as i64, KEYS));
    let revision = deleted.header.unwrap().revision;
    for slot in 0..3 {
        wait_for("the deletion to be applied", async || match cluster.status(slot).await {
            Ok(status) if status.header.unwrap().revision >= revision => Ok(()),
            seen => Err(format!("{seen:?}")),
        })
        .await;
        let seen =
            cluster.kv(slot).range(RangeRequest { revision: before, ..many() }).await.expect("a read of the past");
        assert_eq!(seen.into_inner().kvs.len(), KEYS);
        cluster.hash_kv(slot, 0).await.expect("a hash");
        let mut backup = cluster.maintenance(slot).snapshot(SnapshotRequest {}).await.expect("a backup").into_inner();
        while backup.message().await.expect("a piece").is_some() {}
        assert_eq!(watched_deletions(&cluster, slot, revision).await, KEYS);
    }
    for (slot, good) in good.into_iter().enumerate() {
        good.stop(&format!("large deletions, kv-{slot}")).await;
    }
    judge(&cluster, term).await;
    cluster.wait_same_hash(0..3).await;
}

/// What many clients ask for, each without end, by the key that it writes: the revisions in their order.
async fn written_by_many(
    cluster: &Cluster,
    slot: u64,
    clients: usize,
    request: impl Fn(usize) -> TxnRequest,
) -> Vec<(i64, bool)> {
    const ROUNDS: usize = 6;
    let all = (0..clients).map(|client| {
        let (mut kv, request) = (cluster.kv(slot), request(client));
        async move {
            let mut revisions = Vec::new();
            for _ in 0..ROUNDS {
                let answer = kv.txn(request.clone()).await.expect("a transaction").into_inner();
                assert!(answer.succeeded);
                revisions.push((answer.header.expect("a header").revision, !request.compare.is_empty()));
            }
            revisions
        }
    });
    join_all(all).await.concat()
}

/// Of transactions that take long, a few clients send more and more, others short ones. In the order of the log there is never more than
/// one of the long ones between short ones that wait; as they came, it would be as many as there are clients.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_to_apply_goes_one_at_a_time_behind_what_waits() {
    const LONG: usize = 6;
    let (cluster, leader) = patient_cluster(&[]).await;
    fill_many(&cluster, leader, 20_000).await;
    let put = |key: String| {
        let put = PutRequest { key: key.into(), ..Default::default() };
        RequestOp { request: Some(request_op::Request::RequestPut(put)) }
    };
    // Of each key something else, so that nothing of it is known beforehand.
    let compare = |n: usize| Compare {
        key: "many/".into(),
        range_end: "many0".into(),
        target: CompareTarget::Value.into(),
        result: CompareResult::NotEqual.into(),
        target_union: Some(TargetUnion::Value(format!("none/{n}").into())),
    };
    let long = written_by_many(&cluster, leader, LONG, |client| TxnRequest {
        compare: (0..60).map(compare).collect(),
        success: vec![put(format!("long/{client}"))],
        ..Default::default()
    });
    let is_over = AtomicBool::new(false);
    let short = async {
        let all = (0..4).map(|client| {
            let (mut kv, is_over) = (cluster.kv(leader), &is_over);
            let request = TxnRequest { success: vec![put(format!("short/{client}"))], ..Default::default() };
            async move {
                let mut revisions = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let answer = kv.txn(request.clone()).await.expect("a put").into_inner();
                    revisions.push((answer.header.expect("a header").revision, false));
                }
                revisions
            }
        });
        join_all(all).await.concat()
    };
    let long = async {
        let long = long.await;
        is_over.store(true, Ordering::Relaxed);
        long
    };
    let (long, short) = tokio::join!(long, short);
    let mut all = [long, short].concat();
    all.sort_unstable();
    let runs: Vec<usize> = all.chunk_by(|a, b| a.1 == b.1).filter(|run| run[0].1).map(<[_]>::len).collect();
    println!("{} in the log; long ones in a row: {runs:?}", all.len());
    assert!(runs.iter().filter(|run| **run > 2).count() * 10 <= runs.len(), "{runs:?}");
}

/// Events of `revision` that a watcher is told, which asks for what was before them.
async fn watched_deletions(cluster: &Cluster, slot: u64, revision: i64) -> usize {
    let create = WatchCreateRequest {
        key: "many/".into(),
        range_end: "many0".into(),
        start_revision: revision,
        prev_kv: true,
        fragment: true,
        ..Default::default()
    };
    let request = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
    let requests = tokio_stream::once(request).chain(tokio_stream::pending());
    let mut watch = WatchClient::new(cluster.channel(slot)).max_decoding_message_size(usize::MAX);
    let mut answers = watch.watch(requests).await.expect("a watch").into_inner();
    let mut events = 0;
    loop {
        let answer = answers.message().await.expect("the watch goes on").expect("the watch goes on");
        assert!(answer.events.iter().all(|event| event.prev_kv.is_some()), "each had a version before");
        events += answer.events.len();
        if events > 0 && !answer.fragment {
            return events;
        }
    }
}

async fn judge(cluster: &Cluster, term: u64) {
    for slot in 0..3 {
        println!("kv-{slot}: longest stall {} s", longest_stall(cluster, slot).await);
        assert_eq!(cluster.status(slot).await.unwrap().raft_term, term, "a leader was elected");
    }
}
