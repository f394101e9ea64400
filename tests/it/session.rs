//! What a member has acknowledged, it knows: who talks to one member alone, a follower or a reader, on real processes.
//!
//! `QUORATE_SESSION_ROUNDS` asks for more rounds. Absent: faults (the simulation's check `session`).

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    DeleteRangeRequest, PutRequest, RangeRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest,
    WatchRequest, WatchResponse,
};
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::support::cluster::{Cluster, PATIENCE};

const ROUNDS: u64 = 300;

fn rounds() -> u64 {
    std::env::var("QUORATE_SESSION_ROUNDS").map_or(ROUNDS, |text| text.parse().unwrap())
}

/// What was seen that must not be, by kind, and how often.
#[derive(Default)]
struct Violations(BTreeMap<&'static str, u64>);

impl Violations {
    fn check(&mut self, kind: &'static str, holds: bool) {
        if !holds {
            *self.0.entry(kind).or_default() += 1;
        }
    }
}

struct Watch {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Watch {
    async fn open(cluster: &Cluster, slot: u64) -> Self {
        let (requests, outgoing) = mpsc::channel(16);
        let mut client = WatchClient::new(cluster.channel(slot));
        let responses = client.watch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn ask(&mut self, request: RequestUnion) -> WatchResponse {
        self.requests.send(WatchRequest { request_union: Some(request) }).await.unwrap();
        self.next().await
    }

    async fn next(&mut self) -> WatchResponse {
        let next = tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("a response in time");
        next.unwrap().expect("the stream goes on")
    }
}

/// Each round: a put, and then everything that must know of it.
async fn talk_to(cluster: &Cluster, who: &str, slot: u64) -> Violations {
    let mut kv = cluster.kv(slot);
    let mut watch = Watch::open(cluster, slot).await;
    let mut violations = Violations::default();
    let (mut newest, mut took) = (0, Vec::new());
    for round in 0..rounds() {
        let (key, value): (Bytes, Bytes) = (format!("k{}", round % 7).into(), format!("{round}").into());
        let put = |key: Bytes| PutRequest { key, value: value.clone(), ..Default::default() };
        let begun = Instant::now();
        let acknowledged = kv.put(put(key.clone())).await.unwrap().into_inner().header.unwrap().revision;
        took.push(begun.elapsed());
        violations.check("a put's revision is not above what was known", acknowledged > newest);

        let get = RangeRequest { key: key.clone(), serializable: true, ..Default::default() };
        let got = kv.range(get.clone()).await.unwrap().into_inner();
        violations.check("a serializable get shows an older value", got.kvs[0].value() == value);
        violations.check("its header went back", got.header.unwrap().revision >= acknowledged);
        let at = kv.range(RangeRequest { revision: acknowledged, ..get }).await;
        violations.check("the returned revision is one of the future", at.is_ok());
        let hash = cluster.hash_kv(slot, acknowledged).await;
        violations.check("nor can it be hashed", hash.is_ok());

        let create = WatchCreateRequest { key: key.clone(), ..Default::default() };
        let created = watch.ask(RequestUnion::CreateRequest(create)).await;
        violations.check("a watch's header went back", created.header.unwrap().revision >= acknowledged);
        let told = watch.ask(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        violations.check("a watch from now tells what was acknowledged", told.events.is_empty());
        violations.check("progress is behind", told.header.unwrap().revision >= acknowledged);
        newest = kv.put(put(key)).await.unwrap().into_inner().header.unwrap().revision;
        let event = watch.next().await;
        let first = event.events.first().and_then(|event| event.kv.as_ref()).map(|kv| kv.mod_revision());
        violations.check("the next event is not the next put", first == Some(newest));
        let watch_id = created.watch_id;
        let ended = watch.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await;
        assert!(ended.canceled, "{ended:?}");
    }
    took.sort_unstable();
    println!("{} rounds with {who}: half of the puts took {:.2?}", rounds(), took[took.len() / 2]);
    violations
}

#[tokio::test(flavor = "multi_thread")]
async fn member_knows_what_it_has_acknowledged() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.readers", "true");
    let leader = cluster.start_all().await;
    cluster.start_slotless(20, "--reader");
    cluster.wait_http(20, "/readyz", 200, &[]).await;
    for (who, slot) in [("the leader", leader), ("a follower", (leader + 1) % 3), ("a reader", 20)] {
        let violations = talk_to(&cluster, who, slot).await;
        assert!(violations.0.is_empty(), "{who}, in {} rounds: {:?}", rounds(), violations.0);
    }
}

/// Two such answers at a time could be more than a message between members takes (64 MiB).
#[tokio::test(flavor = "multi_thread")]
async fn answer_of_any_size_comes_through_a_follower() {
    const VALUES: usize = 70;
    let cluster = Cluster::start(3).await;
    let follower = (cluster.wait_formed().await + 1) % 3;
    let mut kv = cluster.kv(follower);
    for n in 0..VALUES {
        let value = Bytes::from(vec![n as u8; 1 << 20]);
        kv.put(PutRequest { key: format!("large/{n:03}").into(), value, ..Default::default() }).await.unwrap();
    }
    let delete = DeleteRangeRequest { key: "large/".into(), range_end: "large0".into(), prev_kv: true };
    let deleted = kv.delete_range(delete).await.unwrap().into_inner();
    assert_eq!((deleted.deleted, deleted.prev_kvs.len()), (VALUES as i64, VALUES));
    for (n, kv) in deleted.prev_kvs.iter().enumerate() {
        assert!(kv.value().len() == 1 << 20 && kv.value().iter().all(|byte| *byte == n as u8), "value {n}");
    }
}

/// What is under way at a leader that is cut off in silence: a read goes on with the next leader, and a write, which may be in the log,
/// is told of the failure as soon as the next leader's entries are applied. Nobody waits for the end of the request's time.
#[tokio::test(flavor = "multi_thread")]
async fn requests_under_way_do_not_wait_for_a_leader_that_is_gone() {
    let mut cluster = Cluster::new(3);
    cluster.set("server.request_timeout", "5m");
    let leader = cluster.start_all().await;
    let follower = (leader + 1) % 3;
    cluster.put(follower, "k", "v").await;
    let (mut reader, mut writer) = (cluster.kv(follower), cluster.kv(follower));
    let get = || RangeRequest { key: "k".into(), ..Default::default() };
    // Their connections are made, so that both are on their way before anybody misses the leader.
    tokio::try_join!(reader.range(get()), writer.range(get())).unwrap();
    cluster.signal(leader, Signal::STOP);
    let reading = reader.range(get());
    let writing = writer.put(PutRequest { key: "k".into(), value: "new".into(), ..Default::default() });
    let both = async { tokio::join!(reading, writing) };
    let (read, written) = tokio::time::timeout(PATIENCE, both).await.expect("both end with the election");
    assert_eq!(read.unwrap().into_inner().kvs.len(), 1);
    let value = match written {
        Err(status) => {
            assert_eq!(status.message(), "etcdserver: request timed out, possibly due to previous leader failure");
            "v"
        }
        // A slow machine: it came after the election.
        Ok(_) => "new",
    };
    // It was forwarded to a leader that is none any more.
    cluster.signal(leader, Signal::CONT);
    cluster.wait_formed().await;
    assert_eq!(cluster.get(leader, "k").await.as_deref(), Some(value));
}
