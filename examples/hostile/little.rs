//! Abuse by requests of a few bytes that ask for much: each is small on the wire and counts as little where only bytes or keys are counted.
//!
//! Owns what is sent. Invariant: as in `kinds`. Absent: requests that are large by themselves (`kinds`).

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use prost::Message as _;
use quorate::pb::election::election_client::ElectionClient;
use quorate::pb::election::{LeaderKey, LeaderRequest, ResignRequest};
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::range_request::{SortOrder, SortTarget};
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseTimeToLiveRequest, PutRequest,
    RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, request_op, watch_request,
};
use tokio::task::JoinSet;

use crate::kinds::{Attack, FILLED, Tally, all, answer, op};
use crate::support::attack::Raw;

pub async fn step(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    match kind {
        "kept-values" => kept_values(attack, tally).await,
        "large-keys" => large_keys(attack, tally).await,
        "equal-values" => equal_values(attack, tally).await,
        "rewritten" => rewritten(attack, tally).await,
        "scans" => scans(attack, tally).await,
        "heavy" => heavy(attack, tally).await,
        "long-reads" => long_reads(attack).await,
        "watch-ends" => watch_ends(attack, tally).await,
        _ => many_leases(attack, tally).await,
    }
}

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

fn in_txn(puts: impl IntoIterator<Item = PutRequest>) -> TxnRequest {
    let success: Vec<RequestOp> = puts.into_iter().map(|put| op(request_op::Request::RequestPut(put))).collect();
    TxnRequest { success, ..Default::default() }
}

/// Everything below a prefix.
fn below(prefix: &str) -> RangeRequest {
    RangeRequest { key: prefix.to_owned().into(), range_end: format!("{prefix}~").into(), ..Default::default() }
}

/// Deletes what was put, and lets go of its history, but for what good clients may be reading.
async fn clean(attack: &mut Attack, tally: &mut Tally, prefix: &str) {
    let RangeRequest { key, range_end, .. } = below(prefix);
    let doomed = DeleteRangeRequest { key, range_end, prev_kv: false };
    if let Some(done) = tally.note(answer(attack.kv().delete_range(doomed)).await) {
        let revision = done.into_inner().header.map_or(0, |header| header.revision);
        tally.note(answer(attack.kv().compact(CompactionRequest { revision: revision - 2000, physical: false })).await);
    }
}

/// Puts that keep a large value: each makes another version of it.
async fn kept_values(attack: &mut Attack, tally: &mut Tally) {
    let prefix = format!("hostile/kept/{}/", attack.random.u32(..));
    let bytes = attack.random.usize(100_000..1_000_000);
    let keys = attack.random.usize(1..8);
    for key in 0..keys {
        tally.note(answer(attack.kv().put(put(format!("{prefix}{key}"), vec![b'v'; bytes]))).await);
    }
    let kept = |key: usize| PutRequest { ignore_value: true, ..put(format!("{prefix}{}", key % keys), "") };
    let kv = attack.kv();
    let large = put(format!("{prefix}0"), vec![b'w'; bytes]);
    let puts = (0..30).map(|i| (kv.clone(), if i == 0 { large.clone() } else { kept(i) }));
    for done in join_all(puts.map(|(mut kv, put)| async move { answer(kv.put(put)).await })).await {
        tally.note(done);
    }
    tally.note(answer(attack.kv().txn(in_txn((0..keys).map(kept)))).await);
    clean(attack, tally, &prefix).await;
}

/// Reads that want keys only, where the keys are large.
async fn large_keys(attack: &mut Attack, tally: &mut Tally) {
    let prefix = format!("hostile/large/{}/", attack.random.u32(..));
    let lease = attack.random.i64(1..i64::MAX);
    let mut leases = LeaseClient::new(attack.channel()).max_decoding_message_size(usize::MAX);
    tally.note(answer(leases.lease_grant(LeaseGrantRequest { ttl: 60, id: lease })).await);
    for i in 0..20 {
        let key = format!("{prefix}{i:02}{}", "k".repeat(attack.random.usize(100_000..1_000_000)));
        tally.note(answer(attack.kv().put(PutRequest { lease, ..put(key, "") })).await);
        if !attack.goes_on() {
            break;
        }
    }
    let keys_only = RangeRequest { keys_only: true, ..below(&prefix) };
    let by_revision = RangeRequest { sort_target: SortTarget::Mod.into(), ..keys_only.clone() };
    let many = vec![op(request_op::Request::RequestRange(keys_only.clone())); 127];
    let mut kv = attack.kv();
    tally.note(answer(kv.txn(TxnRequest { success: many, ..Default::default() })).await);
    tally.note(answer(kv.range(keys_only)).await);
    tally.note(answer(kv.range_stream(by_revision)).await);
    tally.note(answer(leases.lease_time_to_live(LeaseTimeToLiveRequest { id: lease, keys: true })).await);
    clean(attack, tally, &prefix).await;
}

/// Values that are told apart by their last byte only, sorted.
async fn equal_values(attack: &mut Attack, tally: &mut Tally) {
    let prefix = format!("hostile/equal/{}/", attack.random.u32(..));
    let bytes = attack.random.usize(100_000..1_000_000);
    for i in 0..attack.random.u8(10..30) {
        let value = [&vec![b'v'; bytes][..], &[i]].concat();
        tally.note(answer(attack.kv().put(put(format!("{prefix}{i:03}"), value))).await);
    }
    let sorted = RangeRequest {
        sort_target: SortTarget::Value.into(),
        sort_order: SortOrder::Descend.into(),
        limit: 1,
        keys_only: true,
        ..below(&prefix)
    };
    let many = vec![op(request_op::Request::RequestRange(sorted.clone())); 127];
    tally.note(answer(attack.kv().txn(TxnRequest { success: many, ..Default::default() })).await);
    tally.note(answer(attack.kv().range(sorted)).await);
    clean(attack, tally, &prefix).await;
}

/// Reads of the past of keys that were written many times since.
async fn rewritten(attack: &mut Attack, tally: &mut Tally) {
    let prefix = format!("hostile/again/{}/", attack.random.u32(..));
    let keys = attack.random.usize(100..4000);
    let mut first = 0;
    for round in 0..20 {
        for start in (0..keys).step_by(100) {
            let puts = (start..keys.min(start + 100)).map(|i| put(format!("{prefix}{i:05}"), vec![round]));
            let Some(done) = tally.note(answer(attack.kv().txn(in_txn(puts))).await) else { return };
            first = if round == 0 { done.into_inner().header.map_or(0, |header| header.revision) } else { first };
        }
        if !attack.goes_on() {
            return;
        }
    }
    for _ in 0..20 {
        let past = RangeRequest { revision: first, ..below(&prefix) };
        tally.note(answer(attack.kv().range(past)).await);
    }
    clean(attack, tally, &prefix).await;
}

/// Elections whose line is as good as the whole store.
async fn scans(attack: &mut Attack, tally: &mut Tally) {
    let clients: Vec<_> = (0..16).map(|_| ElectionClient::new(attack.channel())).collect();
    for _ in 0..10 {
        let name = attack.random.choice(["", "hostile", FILLED.trim_end_matches('/')]).unwrap_or_default();
        let asked = clients.iter().cloned().map(|mut client| async move {
            let name = Bytes::copy_from_slice(name.as_bytes());
            let led = answer(client.leader(LeaderRequest { name: name.clone() })).await;
            // Nobody holds it: an answer all the same.
            let key = LeaderKey { name, key: "hostile/none".into(), rev: 1, lease: 1 };
            let resigned = answer(client.resign(ResignRequest { leader: Some(key) })).await;
            (led, resigned)
        });
        for (led, resigned) in join_all(asked).await {
            tally.note(led);
            tally.note(resigned);
        }
        if !attack.goes_on() {
            return;
        }
    }
}

/// Transactions that fail at once, and count as a look at every key: a thousand in flight on one connection.
async fn heavy(attack: &mut Attack, tally: &mut Tally) {
    let compare = Compare {
        key: FILLED.into(),
        range_end: "hostile/fill0".into(),
        target: CompareTarget::Mod.into(),
        result: CompareResult::Greater.into(),
        target_union: Some(TargetUnion::ModRevision(i64::MAX)),
    };
    let request = TxnRequest { compare: vec![compare], ..in_txn([put(attack.key(), "x")]) };
    let kv = attack.kv();
    let mut asked = JoinSet::new();
    for _ in 0..1000 {
        let (mut kv, request) = (kv.clone(), request.clone());
        asked.spawn(async move { answer(kv.txn(request)).await });
    }
    let until = attack.until;
    while let Ok(Some(Ok(done))) = tokio::time::timeout_at(until.into(), asked.join_next()).await {
        tally.note(done);
    }
}

/// One long read on each of a thousand connections of one host.
async fn long_reads(attack: &mut Attack) {
    let request = RangeRequest { sort_target: SortTarget::Value.into(), limit: 1, ..all() }.encode_to_vec();
    let mut held = Vec::new();
    for _ in 0..1000 {
        let endpoint = attack.endpoint();
        let Ok(mut raw) = Raw::connect(&endpoint).await else { break };
        if raw.ask("/etcdserverpb.KV/Range", &request).await.is_err() {
            break;
        }
        held.push(raw);
    }
    attack.hold(held).await;
}

/// Streams of many watchers that all end at once.
async fn watch_ends(attack: &mut Attack, tally: &mut Tally) {
    let shape = attack.random.u8(..4);
    let creates = (0..20_000).map(move |i| {
        let range_end = match shape {
            // One shape, one beginning, nests, and neighbours.
            0 => "hostile/watch~".into(),
            1 => format!("hostile/watch/{i:05}").into(),
            2 => format!("hostile/watch~{:05}", 20_000 - i).into(),
            _ => Bytes::new(),
        };
        let key = match shape {
            0 | 1 => "hostile/watch".into(),
            _ => format!("hostile/watch/{i:05}").into(),
        };
        let create = WatchCreateRequest { key, range_end, ..Default::default() };
        WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) }
    });
    let requests = tokio_stream::iter(creates).chain(tokio_stream::pending());
    let mut client = WatchClient::new(attack.channel());
    let Some(stream) = tally.note(answer(client.watch(requests)).await) else { return };
    let mut stream = stream.into_inner();
    for _ in 0..20_000 {
        match tokio::time::timeout(std::time::Duration::from_secs(1), stream.message()).await {
            Ok(Ok(Some(told))) if told.canceled => {
                tally.note::<()>(Err(told.cancel_reason));
            }
            Ok(Ok(Some(_))) => tally.served += 1,
            _ => break,
        }
    }
    // One event for all of them, which nobody reads.
    tally.note(answer(attack.kv().put(put("hostile/watch/5", "x"))).await);
    attack.hold(stream).await;
}

/// Leases by the ten thousand that nobody renews, and whose remaining time is to be written down.
async fn many_leases(attack: &mut Attack, tally: &mut Tally) {
    let client = LeaseClient::new(attack.channel());
    let ttl = attack.random.i64(61..80);
    for _ in 0..20 {
        let granted = (0..500).map(|_| {
            let mut client = client.clone();
            async move { answer(client.lease_grant(LeaseGrantRequest { ttl, id: 0 })).await }
        });
        for done in join_all(granted).await {
            tally.note(done);
        }
        if !attack.goes_on() {
            return;
        }
    }
}
