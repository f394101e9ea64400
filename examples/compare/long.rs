//! Single requests that touch very many keys, and how long others wait meanwhile.
//!
//! Others ask at a fixed rate, far below what the servers can do, so that a latency shows a pause and not a queue. Absent: requests that
//! a server refuses (the example `hostile` has those of ours).

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::range_request::{SortOrder, SortTarget};
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    Compare, DeleteRangeRequest, HashKvRequest, PutRequest, RangeRequest, RequestOp, SnapshotRequest, TxnRequest,
    WatchCreateRequest, WatchRequest, request_op, watch_request,
};
use tokio_stream::StreamExt as _;

use crate::client::{Pace, connect};
use crate::servers::Servers;
use crate::support::cluster::http_post;
use crate::works::{self, Data, Op};
use crate::{Round, VALUE_BYTES};

pub const WORKS: &[&str] = &["long"];

/// Of the paced requests; 80 % of them linearizable gets, the others puts.
const PER_SECOND: f64 = 500.0;
const CLIENTS: usize = 16;
const COMPARISONS: usize = 60;
/// Others are looked at for this long at least, however short the event is.
const LOOK: Duration = Duration::from_secs(1);

pub async fn measure(round: &mut Round<'_>) -> anyhow::Result<()> {
    let args = round.args;
    let keys = args.many_keys.min(100_000);
    let servers = round.servers(3).await?;
    let data = Data { keys, value_bytes: VALUE_BYTES };
    works::fill(&servers, args, 0..keys, VALUE_BYTES).await?;
    let channels = connect(&servers.endpoints(), CLIENTS)?;
    let pace = Pace::start(works::users(&channels, CLIENTS, Op::Mixed, data), PER_SECOND);
    note(round, &pace, "nothing", async { Ok(()) }).await?;
    note(round, &pace, "range by value", ask(&servers, by_value())).await?;
    note(round, &pace, "60 range comparisons", compare(&servers)).await?;
    let (doomed, revision) = load_doomed(&servers, keys).await?;
    note(round, &pace, "delete of many keys", delete(&servers, &doomed)).await?;
    let before = RangeRequest { revision, ..doomed.clone() };
    note(round, &pace, "range one revision before", ask(&servers, before)).await?;
    note(round, &pace, "watch of it with prev_kv", watch(&servers, &doomed, revision + 1, keys)).await?;
    note(round, &pace, "HashKV before it", hash(&servers, revision)).await?;
    note(round, &pace, "backup", backup(&servers)).await?;
    works::fill(&servers, args, keys..3 * keys, VALUE_BYTES).await?;
    note(round, &pace, "range of all in JSON", json(&servers)).await?;
    pace.stop().await
}

async fn note(
    round: &mut Round<'_>,
    pace: &Pace,
    event: &str,
    doing: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    let (seconds, seen) = pace
        .during(async {
            doing.await.with_context(|| event.to_owned())?;
            let seconds = begin.elapsed().as_secs_f64();
            tokio::time::sleep(LOOK.saturating_sub(begin.elapsed())).await;
            Ok(seconds)
        })
        .await?;
    round.note("long", event, "seconds", seconds);
    for (metric, quantile) in [("p99_ms", 0.99), ("max_ms", 1.0)] {
        round.note("long", event, metric, seen.value_at_quantile(quantile) as f64 / 1000.0);
    }
    Ok(())
}

fn kv(servers: &Servers) -> anyhow::Result<KvClient<tonic::transport::Channel>> {
    Ok(KvClient::new(servers.channel(0)?).max_decoding_message_size(usize::MAX))
}

async fn ask(servers: &Servers, range: RangeRequest) -> anyhow::Result<()> {
    let answer = kv(servers)?.range(range).await?.into_inner();
    ensure!(!answer.kvs.is_empty(), "it finds nothing");
    Ok(())
}

fn by_value() -> RangeRequest {
    RangeRequest {
        key: vec![0].into(),
        range_end: vec![0].into(),
        sort_target: SortTarget::Value.into(),
        sort_order: SortOrder::Descend.into(),
        limit: 10,
        ..Default::default()
    }
}

async fn compare(servers: &Servers) -> anyhow::Result<()> {
    let comparison = Compare {
        key: vec![0].into(),
        range_end: vec![0].into(),
        target: CompareTarget::Mod.into(),
        result: CompareResult::Greater.into(),
        target_union: Some(TargetUnion::ModRevision(0)),
    };
    let put = PutRequest { key: "compared".into(), ..Default::default() };
    let success = vec![RequestOp { request: Some(request_op::Request::RequestPut(put)) }];
    let txn = TxnRequest { compare: vec![comparison; COMPARISONS], success, ..Default::default() };
    ensure!(kv(servers)?.txn(txn).await?.into_inner().succeeded, "the comparisons failed");
    Ok(())
}

/// Writes keys that are to be deleted at once; returns what names them, and the last revision that has them.
async fn load_doomed(servers: &Servers, keys: u64) -> anyhow::Result<(RangeRequest, i64)> {
    let (mut kv, mut revision) = (kv(servers)?, 0);
    for start in (0..keys).step_by(100) {
        let puts = (start..start + 100).map(|i| {
            let put = PutRequest { key: format!("doomed/{i:08}").into(), value: "x".into(), ..Default::default() };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        });
        kv.txn(TxnRequest { success: puts.collect(), ..Default::default() }).await?;
    }
    let doomed = RangeRequest { key: "doomed/".into(), range_end: "doomed0".into(), ..Default::default() };
    let count = RangeRequest { count_only: true, ..doomed.clone() };
    let answer = kv.range(count).await?.into_inner();
    revision = answer.header.map_or(revision, |header| header.revision);
    Ok((doomed, revision))
}

async fn delete(servers: &Servers, doomed: &RangeRequest) -> anyhow::Result<()> {
    let delete =
        DeleteRangeRequest { key: doomed.key.clone(), range_end: doomed.range_end.clone(), ..Default::default() };
    ensure!(kv(servers)?.delete_range(delete).await?.into_inner().deleted > 0, "nothing was deleted");
    Ok(())
}

/// Until the watcher has seen every deletion, each with what was before.
async fn watch(servers: &Servers, doomed: &RangeRequest, revision: i64, keys: u64) -> anyhow::Result<()> {
    let create = WatchCreateRequest {
        key: doomed.key.clone(),
        range_end: doomed.range_end.clone(),
        start_revision: revision,
        prev_kv: true,
        fragment: true,
        ..Default::default()
    };
    let request = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
    let requests = tokio_stream::once(request).chain(tokio_stream::pending());
    let mut client = WatchClient::new(servers.channel(0)?).max_decoding_message_size(usize::MAX);
    let mut stream = client.watch(requests).await?.into_inner();
    let mut seen = 0;
    while seen < keys {
        let told = stream.message().await?.context("the watch ended")?;
        ensure!(told.events.iter().all(|event| event.prev_kv.is_some()), "an event without what was before");
        seen += told.events.len() as u64;
    }
    Ok(())
}

async fn hash(servers: &Servers, revision: i64) -> anyhow::Result<()> {
    MaintenanceClient::new(servers.channel(0)?).hash_kv(HashKvRequest { revision }).await?;
    Ok(())
}

async fn backup(servers: &Servers) -> anyhow::Result<()> {
    let mut client = MaintenanceClient::new(servers.channel(0)?).max_decoding_message_size(usize::MAX);
    let mut stream = client.snapshot(SnapshotRequest {}).await?.into_inner();
    while stream.message().await?.is_some() {}
    Ok(())
}

/// "AA==" is the byte 0: all keys.
async fn json(servers: &Servers) -> anyhow::Result<()> {
    let (code, body) = http_post(&servers.endpoint(0), "/v3/kv/range", r#"{"key":"AA==","range_end":"AA=="}"#).await?;
    ensure!(code == 200, "{code}: {}", body.chars().take(200).collect::<String>());
    Ok(())
}
