//! The same history and the same watchers at Debian's etcd and at Quorate: each watcher must be told the same.
//!
//! How events are divided into responses may differ: etcd joins revisions when it catches up. `QUORATE_PARITY_SEED` repeats a run.

use std::collections::BTreeMap;

use quorate::pb::etcd::kv_client::KvClient;

use super::*;
use crate::support::etcd::Etcd;
use crate::support::tools::{self, ETCD};

const STEPS: usize = 120;
const KEYS: [&str; 5] = ["a", "b", "c", "d", "e"];

/// By watcher, what it was told: its creation, its events, its end.
type Told = BTreeMap<i64, Vec<String>>;

fn note(told: &mut Told, response: &WatchResponse) {
    let lines = told.entry(response.watch_id).or_default();
    if response.created {
        // etcd 3.4 leaves the reason out where 3.6 has one.
        lines.push(format!("created, canceled {}", response.canceled));
    } else if response.canceled {
        lines.push(format!("canceled at {}", response.compact_revision));
    }
    for event in &response.events {
        let kv = event.kv.as_ref().unwrap();
        let (created, version) = (kv.create_revision(), kv.version());
        lines.push(format!("{}{} created {created} version {version}", kv.mod_revision(), show(event)));
    }
}

struct Sides {
    kvs: [KvClient<Channel>; 2],
    streams: [Stream; 2],
    told: [Told; 2],
}

impl Sides {
    async fn create(&mut self, create: &WatchCreateRequest) {
        for (stream, told) in self.streams.iter_mut().zip(&mut self.told) {
            stream.send(RequestUnion::CreateRequest(create.clone())).await;
            loop {
                let response = stream.next().await;
                note(told, &response);
                if response.created {
                    break;
                }
            }
        }
    }

    async fn txn(&mut self, ops: Vec<request_op::Request>) {
        let success: Vec<_> = ops.into_iter().map(|op| RequestOp { request: Some(op) }).collect();
        for kv in &mut self.kvs {
            kv.txn(TxnRequest { success: success.clone(), ..Default::default() }).await.unwrap();
        }
    }

    async fn compact(&mut self, revision: i64) {
        for kv in &mut self.kvs {
            // Refused alike where it goes back.
            let _ = kv.compact(CompactionRequest { revision, physical: true }).await;
        }
    }

    fn len(&self, side: usize) -> usize {
        self.told[side].values().map(Vec::len).sum()
    }
}

fn random_watch(random: &mut fastrand::Rng, revision: i64) -> WatchCreateRequest {
    let key = random.choice(KEYS).unwrap();
    let end = *random.choice(["", "\0", "c", "e", "f"].iter()).unwrap();
    let mut create = create(key, if end > key || end == "\0" { end } else { "" });
    let past = random.i64(1..=revision);
    create.start_revision = *random.choice([0, 1, past, revision + 1].iter()).unwrap();
    create.prev_kv = random.bool();
    create.filters = match random.u8(..6) {
        0 => vec![FilterType::Noput.into()],
        1 => vec![FilterType::Nodelete.into()],
        _ => Vec::new(),
    };
    create
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_are_told_what_etcd_tells() {
    let Some(program) = tools::require(&ETCD) else { return };
    let cluster = Cluster::start(1).await;
    let etcd = Etcd::start(&program, &cluster).await;
    let seed = std::env::var("QUORATE_PARITY_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_PARITY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    // etcd answers a stream only when its first watcher is made.
    let first = WatchCreateRequest { watch_id: 1000, ..create("a", "") };
    let open = async |channel| Stream::try_open_with(channel, false, Some(first.clone())).await.unwrap();
    let streams = [open(etcd.channel()).await, open(cluster.channel(0)).await];
    let mut sides = Sides { kvs: [etcd.kv(), cluster.kv(0)], streams, told: Default::default() };
    // Refusals: the same number for what has none, and the same reason.
    for (stream, told) in sides.streams.iter_mut().zip(&mut sides.told) {
        note(told, &stream.next().await);
    }
    for refused in [WatchCreateRequest { watch_id: 1000, ..create("a", "") }, create("b", "a")] {
        let mut answers = Vec::new();
        for stream in &mut sides.streams {
            stream.send(RequestUnion::CreateRequest(refused.clone())).await;
            let answer = stream.next().await;
            answers.push((answer.watch_id, answer.created, answer.canceled, answer.cancel_reason));
        }
        assert_eq!(answers[0], answers[1]);
    }
    let mut revision = 1;
    for _ in 0..STEPS {
        let key = *random.choice(KEYS.iter()).unwrap();
        let value = random.u8(..).to_string();
        match random.u8(..12) {
            0..6 => sides.txn(vec![request_op::Request::RequestPut(put_of(key, value))]).await,
            6 => {
                let both = ["a", "d"].map(|key| request_op::Request::RequestPut(put_of(key, value.clone())));
                sides.txn(both.to_vec()).await;
            }
            7..9 => {
                let delete = DeleteRangeRequest { key: key.into(), range_end: "d".into(), ..Default::default() };
                sides.txn(vec![request_op::Request::RequestDeleteRange(delete)]).await;
            }
            9 if random.u8(..4) == 0 => sides.compact(revision - random.i64(..3)).await,
            _ => sides.create(&random_watch(&mut random, revision)).await,
        }
        revision = cluster.status(0).await.unwrap().header.unwrap().revision;
    }
    // Every watcher sees one of these, so that nothing is left over.
    sides.txn(KEYS.map(|key| request_op::Request::RequestPut(put_of(key, "last"))).to_vec()).await;
    let all = DeleteRangeRequest { key: "a".into(), range_end: "\0".into(), ..Default::default() };
    sides.txn(vec![request_op::Request::RequestDeleteRange(all)]).await;
    sides.streams[1].send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    loop {
        let response = sides.streams[1].next().await;
        if response.watch_id == -1 {
            break;
        }
        note(&mut sides.told[1], &response);
    }
    while sides.len(0) < sides.len(1) {
        // What does not come shows below.
        let next = tokio::time::timeout(Duration::from_secs(20), sides.streams[0].next()).await;
        let Ok(response) = next else { break };
        note(&mut sides.told[0], &response);
    }
    for (watcher, told) in &sides.told[0] {
        assert_eq!(Some(told), sides.told[1].get(watcher), "watcher {watcher}: etcd told the first, we the second");
    }
}
