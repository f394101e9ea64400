//! The Watch service over gRPC on real processes: what is told, in which order, and what survives.
//!
//! Absent: the hub beside a model (`src/watch/tests`), other people's clients (`etcdctl`, `etcd_client`), figures (`watch-bench`).

mod outage;
mod parity;
mod slow;

use std::collections::VecDeque;
use std::time::Duration;

use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_create_request::FilterType;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, WatchCancelRequest, WatchCreateRequest,
    WatchProgressRequest, WatchRequest, WatchResponse, request_op,
};
use quorate::pb::{Event, EventType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::support::cluster::{Cluster, PATIENCE, wait_for};

/// One watch stream.
struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
    /// The greatest revision that a header or an event told: no header goes below it.
    told: i64,
    /// Of a response of many revisions: what was not taken yet, a revision each.
    rest: VecDeque<WatchResponse>,
}

impl Stream {
    async fn try_open(channel: Channel, needs_leader: bool) -> Result<Self, Status> {
        Self::try_open_with(channel, needs_leader, None).await
    }

    async fn try_open_with(
        channel: Channel,
        needs_leader: bool,
        first: Option<WatchCreateRequest>,
    ) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(16);
        if let Some(first) = first {
            let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(first)) };
            requests.send(request).await.unwrap();
        }
        let mut request = Request::new(ReceiverStream::new(outgoing));
        if needs_leader {
            request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        }
        let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
        Ok(Self { requests, responses: client.watch(request).await?.into_inner(), told: 0, rest: VecDeque::new() })
    }

    async fn open(cluster: &Cluster, slot: u64) -> Self {
        Self::try_open(cluster.channel(slot), false).await.unwrap()
    }

    async fn send(&self, request: RequestUnion) {
        self.requests.send(WatchRequest { request_union: Some(request) }).await.unwrap();
    }

    /// Creates a watcher that must be made; returns what was answered.
    async fn create(&mut self, create: WatchCreateRequest) -> WatchResponse {
        self.send(RequestUnion::CreateRequest(create)).await;
        let created = self.next().await;
        assert!(created.created && !created.canceled && created.events.is_empty(), "{created:?}");
        created
    }

    async fn next(&mut self) -> WatchResponse {
        self.try_next().await.unwrap()
    }

    /// The next revision; a history comes in responses of many.
    async fn try_next(&mut self) -> Result<WatchResponse, Status> {
        if self.rest.is_empty() {
            let response = self.try_next_response().await?;
            let revision = |event: &Event| event.kv.as_ref().unwrap().mod_revision();
            let revisions = response.events.chunk_by(|one, next| revision(one) == revision(next));
            self.rest = revisions.map(|events| WatchResponse { events: events.to_vec(), ..response.clone() }).collect();
            if self.rest.is_empty() {
                return Ok(response);
            }
        }
        Ok(self.rest.pop_front().expect("there is one"))
    }

    async fn try_next_response(&mut self) -> Result<WatchResponse, Status> {
        let next = tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("an answer in time");
        let next = next?.expect("the server goes on");
        let revision = next.header.unwrap().revision;
        assert!(revision >= self.told, "a header goes back from {}: {next:?}", self.told);
        self.told =
            next.events.iter().filter_map(|e| e.kv.as_ref()).map(|kv| kv.mod_revision()).fold(revision, i64::max);
        assert_eq!(self.told, revision, "a header is below its events");
        Ok(next)
    }

    /// The next response, in short: its watcher, its events' revision (without events: the header's), and its events.
    async fn shown(&mut self) -> String {
        let response = self.next().await;
        assert!(!response.created && !response.canceled, "{response:?}");
        let first = response.events.first().and_then(|event| event.kv.as_ref());
        let revision = first.map_or(response.header.unwrap().revision, |kv| kv.mod_revision());
        format!("{} @{revision}{}", response.watch_id, response.events.iter().map(show).collect::<String>())
    }

    /// Fails if anything comes before what a put causes.
    async fn assert_silent(&mut self, cluster: &Cluster) {
        let probe = self.create(create("probe-of-silence", "")).await.watch_id;
        cluster.put(0, "probe-of-silence", "").await;
        assert_eq!(self.next().await.watch_id, probe);
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: probe })).await;
        assert!(self.next().await.canceled);
    }
}

fn show(event: &Event) -> String {
    let kv = event.kv.as_ref().unwrap();
    let (key, value) = (String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(kv.value()));
    let prev = event.prev_kv.as_ref().map(|prev| format!("({})", String::from_utf8_lossy(prev.value())));
    let prev = prev.unwrap_or_default();
    match event.r#type() {
        EventType::Put => format!(" {key}={value}{prev}"),
        EventType::Delete => format!(" -{key}{prev}"),
    }
}

fn create(key: &str, range_end: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.to_owned().into(), range_end: range_end.to_owned().into(), ..Default::default() }
}

fn from(start_revision: i64, create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..create }
}

async fn delete(cluster: &Cluster, key: &str) {
    let delete = DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() };
    cluster.kv(0).delete_range(delete).await.unwrap();
}

fn put_of(key: &str, value: impl Into<bytes::Bytes>) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.into(), ..Default::default() }
}

async fn put_all(cluster: &Cluster, puts: Vec<PutRequest>) {
    let op = |put| RequestOp { request: Some(request_op::Request::RequestPut(put)) };
    let txn = TxnRequest { success: puts.into_iter().map(op).collect(), ..Default::default() };
    cluster.kv(0).txn(txn).await.unwrap();
}

async fn compact(cluster: &Cluster, revision: i64) {
    cluster.kv(0).compact(CompactionRequest { revision, physical: true }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_of_one_stream_get_what_each_asked_for() {
    let cluster = Cluster::start(1).await;
    cluster.put(0, "a", "1").await;
    cluster.put(0, "b", "2").await;
    let mut stream = Stream::open(&cluster, 0).await;
    let first = stream.create(create("a", "")).await;
    assert_eq!((first.watch_id, first.header.unwrap().revision), (0, 3), "numbers are given from 0 on");
    assert_eq!(stream.create(WatchCreateRequest { watch_id: 1, ..create("none", "") }).await.watch_id, 1);
    assert_eq!(stream.create(create("none", "")).await.watch_id, 2, "a number that the client chose is passed over");
    let past = stream.create(from(2, WatchCreateRequest { watch_id: 70, ..create("", "\0") })).await;
    assert_eq!((past.watch_id, past.header.unwrap().revision), (70, 3));
    assert_eq!((stream.shown().await, stream.shown().await), ("70 @2 a=1".into(), "70 @3 b=2".into()));

    put_all(&cluster, vec![put_of("a", "3"), put_of("b", "4"), put_of("c", "5")]).await;
    let mut seen = [stream.shown().await, stream.shown().await];
    seen.sort();
    assert_eq!(seen, ["0 @4 a=3", "70 @4 a=3 b=4 c=5"], "a transaction is one response");

    // Refusals end nothing.
    for (request, why) in [
        (
            WatchCreateRequest { watch_id: 70, ..create("a", "") },
            "mvcc: duplicate watch ID provided on the WatchStream",
        ),
        (create("b", "a"), "mvcc: watcher range is empty"),
        (from(-1, create("a", "")), "etcdserver: mvcc: required revision has been compacted"),
    ] {
        stream.send(RequestUnion::CreateRequest(request)).await;
        let refused = stream.next().await;
        assert!(refused.created && refused.canceled, "{refused:?}");
        assert_eq!((refused.watch_id, &refused.cancel_reason[..]), (-1, why));
    }
    stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 999 })).await;
    stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 70 })).await;
    let canceled = stream.next().await;
    assert_eq!((canceled.watch_id, canceled.canceled, canceled.compact_revision), (70, true, 0), "{canceled:?}");
    delete(&cluster, "a").await;
    assert_eq!(stream.shown().await, "0 @5 -a");
    let again = stream.create(from(8, WatchCreateRequest { watch_id: 70, ..create("a", "b") })).await;
    assert_eq!(again.watch_id, 70, "a number is free again");
    // Any number may be chosen, once at a time.
    for number in [-1, -5] {
        let chosen = || WatchCreateRequest { watch_id: number, ..create("none", "") };
        let given = stream.create(chosen()).await;
        assert_eq!((given.watch_id, given.canceled), (number, false), "{given:?}");
        stream.send(RequestUnion::CreateRequest(chosen())).await;
        let refused = stream.next().await;
        assert!(refused.canceled && refused.cancel_reason.contains("duplicate watch ID"), "{refused:?}");
        stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: number })).await;
        assert_eq!(stream.next().await.watch_id, number);
    }
    cluster.put(0, "a", "6").await;
    assert_eq!(stream.shown().await, "0 @6 a=6");
    stream.assert_silent(&cluster).await;
    cluster.put(0, "a", "8").await;
    let mut seen = [stream.shown().await, stream.shown().await];
    seen.sort();
    assert_eq!(seen, ["0 @8 a=8", "70 @8 a=8"], "a future revision was waited for");
}

/// As etcd gives numbers: one that was given is never given again, so a cancellation that comes late, or a compaction's, meets nobody
/// else. One that the client chose is its own business.
#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_never_given_twice_on_a_stream() {
    let cluster = Cluster::start(1).await;
    let mut stream = Stream::open(&cluster, 0).await;
    let cancel = async |stream: &mut Stream, watch_id: i64| {
        stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await;
        let canceled = stream.next().await;
        assert_eq!((canceled.watch_id, canceled.canceled), (watch_id, true));
    };
    for given in 0..3 {
        assert_eq!(stream.create(create("k", "")).await.watch_id, given);
        cancel(&mut stream, given).await;
    }
    assert_eq!(stream.create(WatchCreateRequest { watch_id: 4, ..create("k", "") }).await.watch_id, 4);
    assert_eq!(stream.create(create("k", "")).await.watch_id, 3);
    assert_eq!(stream.create(create("k", "")).await.watch_id, 5, "4 is somebody's");
    cancel(&mut stream, 4).await;
    assert_eq!(stream.create(WatchCreateRequest { watch_id: 4, ..create("k", "") }).await.watch_id, 4);
    assert_eq!(stream.create(create("k", "")).await.watch_id, 6);
    // Its watcher is gone by a compaction, and the cancellation of it comes late.
    for i in 0..3 {
        cluster.put(0, "k", &i.to_string()).await;
    }
    let mut late = Stream::open(&cluster, 0).await;
    compact(&cluster, 4).await;
    assert_eq!(late.create(from(2, create("k", ""))).await.watch_id, 0);
    assert_eq!(late.next().await.compact_revision, 4);
    assert_eq!(late.create(create("k", "")).await.watch_id, 1);
    late.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 0 })).await;
    let revision = cluster.put(0, "k", "last").await;
    assert_eq!(late.shown().await, format!("1 @{revision} k=last"));
}

#[tokio::test(flavor = "multi_thread")]
async fn history_of_who_lags_comes_in_few_responses_and_each_is_bounded() {
    const REVISIONS: i64 = 2500;
    let mut cluster = Cluster::new(1);
    cluster.set("limits.request_bytes_max", "64KiB").set("watch.stream_bytes_max", "2MiB");
    cluster.start_all().await;
    let kv = cluster.kv(0);
    for first in (0..REVISIONS).step_by(50) {
        let puts = (first..first + 50).map(|i| {
            let mut kv = kv.clone();
            async move { kv.put(put_of(&format!("k{}", i % 2), "v")).await.unwrap() }
        });
        futures_util::future::join_all(puts).await;
    }
    let last = REVISIONS + 1;
    for i in 0..20 {
        cluster.kv(0).put(put_of(&format!("large{i}"), vec![b'x'; 20 << 10])).await.unwrap();
    }
    // Two that want half of it each go side by side, neither waits for the other.
    let mut stream = Stream::open(&cluster, 0).await;
    for key in ["k0", "k1"] {
        stream.send(RequestUnion::CreateRequest(from(2, create(key, "")))).await;
    }
    let (mut next, mut responses, mut events) = ([2, 2], [0, 0], 0);
    while events < REVISIONS as usize {
        let response = stream.try_next_response().await.unwrap();
        let watcher = response.watch_id as usize;
        responses[watcher] += usize::from(!response.events.is_empty());
        for event in &response.events {
            let kv = event.kv.as_ref().unwrap();
            assert_eq!(kv.key(), format!("k{watcher}").as_bytes());
            assert!(kv.mod_revision() >= next[watcher], "in order, and none twice");
            next[watcher] = kv.mod_revision() + 1;
        }
        events += response.events.len();
        assert!(responses.iter().all(|count| *count >= responses[watcher].saturating_sub(1)), "{responses:?}");
    }
    assert!(next.iter().max() == Some(&(last + 1)) && responses.iter().max() <= Some(&4), "{responses:?}");

    let mut whole = Stream::open(&cluster, 0).await;
    whole.create(WatchCreateRequest { fragment: true, ..from(last + 1, create("large", "largf")) }).await;
    let mut seen = Vec::new();
    while seen.len() < 20 {
        let response = whole.try_next_response().await.unwrap();
        assert!(prost::Message::encoded_len(&response) <= 65 << 10 && !response.fragment);
        seen.extend(response.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision()));
    }
    assert!(seen.into_iter().eq(last + 1..=last + 20));
    let revision = cluster.put(0, "large", "now").await;
    assert_eq!(whole.shown().await, format!("0 @{revision} large=now"), "and it goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_and_previous_versions_are_as_asked_for_in_past_and_present() {
    let cluster = Cluster::start(1).await;
    let filter = |filter: FilterType| WatchCreateRequest { filters: vec![filter.into()], ..create("k", "l") };
    let prev = || WatchCreateRequest { prev_kv: true, ..create("k", "") };
    let mut live = Stream::open(&cluster, 0).await;
    let requests = [filter(FilterType::Noput), filter(FilterType::Nodelete), prev()];
    for request in &requests {
        live.create(request.clone()).await;
    }
    cluster.put(0, "k", "1").await;
    cluster.put(0, "k", "2").await;
    delete(&cluster, "k").await;
    cluster.put(0, "k", "3").await;
    let expected = [
        (0, vec!["@4 -k"]),
        (1, vec!["@2 k=1", "@3 k=2", "@5 k=3"]),
        (2, vec!["@2 k=1", "@3 k=2(1)", "@4 -k(2)", "@5 k=3"]),
    ];
    let mut past = Stream::open(&cluster, 0).await;
    for request in requests {
        past.send(RequestUnion::CreateRequest(from(1, request))).await;
    }
    for (what, stream) in [("live", &mut live), ("past", &mut past)] {
        let mut seen: [Vec<String>; 3] = Default::default();
        while seen.iter().map(Vec::len).sum::<usize>() < 8 {
            let response = stream.next().await;
            if !response.created {
                let revision = response.events[0].kv.as_ref().unwrap().mod_revision();
                let events: String = response.events.iter().map(show).collect();
                seen[response.watch_id as usize].push(format!("@{revision}{events}"));
            }
        }
        for (watcher, events) in &expected {
            assert_eq!(&seen[*watcher], events, "{what}, watcher {watcher}");
        }
    }
    compact(&cluster, 4).await;
    let mut after = Stream::open(&cluster, 0).await;
    after.create(from(4, prev())).await;
    let first = after.shown().await;
    assert!(first == "0 @4 -k" || first == "0 @5 k=3", "what is compacted is not shown: {first}");
}

/// etcd #18089: a deletion at the compacted revision was lost to who had yet to catch up, or after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_at_the_compacted_revision_is_told_or_refused_after_a_restart() {
    let mut cluster = Cluster::start(1).await;
    cluster.put(0, "k", "1").await;
    let deleted = cluster.put(0, "other", "1").await + 1;
    delete(&cluster, "k").await;
    compact(&cluster, deleted).await;
    let last = cluster.put(0, "k", "2").await;
    for round in 0..3 {
        let mut stream = Stream::open(&cluster, 0).await;
        stream.send(RequestUnion::CreateRequest(from(deleted, create("k", "")))).await;
        assert!(stream.next().await.created);
        let first = stream.next().await;
        if first.canceled {
            assert_eq!(first.compact_revision, deleted, "round {round}");
        } else {
            let shown: String = first.events.iter().map(show).collect();
            assert_eq!(shown, " -k", "round {round}");
            assert_eq!(stream.shown().await, format!("0 @{last} k=2"), "round {round}");
        }
        if round == 0 {
            cluster.terminate(0).await;
        } else {
            cluster.kill(0);
        }
        cluster.start_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_ends_who_asks_for_what_is_gone_and_nobody_else() {
    let cluster = Cluster::start(1).await;
    let mut synced = Stream::open(&cluster, 0).await;
    synced.create(create("k", "")).await;
    for i in 2..=20 {
        let revision = cluster.put(0, "k", &i.to_string()).await;
        if i % 5 == 0 {
            compact(&cluster, revision).await;
        }
    }
    for i in 2..=20 {
        assert_eq!(synced.shown().await, format!("0 @{i} k={i}"));
    }
    let mut late = Stream::open(&cluster, 0).await;
    late.create(from(20, create("k", ""))).await;
    assert_eq!(late.shown().await, "0 @20 k=20", "the compacted revision itself");
    late.create(from(19, create("k", ""))).await;
    let canceled = late.next().await;
    let reason = "etcdserver: mvcc: required revision has been compacted";
    assert_eq!(
        (canceled.watch_id, canceled.canceled, canceled.compact_revision, &canceled.cancel_reason[..]),
        (1, true, 20, reason)
    );
    cluster.put(0, "k", "21").await;
    assert_eq!((late.shown().await, synced.shown().await), ("0 @21 k=21".into(), "0 @21 k=21".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_a_promise_that_all_before_it_was_sent() {
    let mut cluster = Cluster::new(1);
    cluster.set("watch.progress_interval", "200ms");
    cluster.start_all().await;
    for i in 0..500 {
        cluster.put(0, &format!("k{}", i % 7), "v").await;
    }
    let mut stream = Stream::open(&cluster, 0).await;
    stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    stream.create(from(2, create("k", "l"))).await;
    // Asked for while it still catches up: the answer waits.
    stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    for revision in 2..=501 {
        let response = stream.next().await;
        assert_eq!((response.watch_id, response.events[0].kv.as_ref().unwrap().mod_revision()), (0, revision));
    }
    assert_eq!(stream.shown().await, "-1 @501");

    let other = cluster.put(0, "other", "v").await;
    stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    assert_eq!(stream.shown().await, format!("-1 @{other}"), "also of revisions that concern nobody here");
    let notified = stream.create(WatchCreateRequest { progress_notify: true, ..create("x", "") }).await.watch_id;
    assert_eq!(stream.shown().await, format!("{notified} @{other}"));
    let revision = cluster.put(0, "y", "v").await;
    wait_for("a notification of the new revision", async || match &stream.shown().await[..] {
        seen if *seen == format!("{notified} @{revision}") => Ok(()),
        seen => Err(seen.to_owned()),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_a_message_comes_in_fragments_to_who_takes_them() {
    let mut cluster = Cluster::new(1);
    cluster.set("limits.request_bytes_max", "64KiB");
    cluster.start_all().await;
    for i in 0..40 {
        cluster.kv(0).put(put_of(&format!("k{i:02}"), vec![b'x'; 10 << 10])).await.unwrap();
    }
    let mut stream = Stream::open(&cluster, 0).await;
    stream.create(WatchCreateRequest { prev_kv: true, fragment: true, ..create("k", "l") }).await;
    stream.create(WatchCreateRequest { prev_kv: true, ..create("k", "l") }).await;
    let all = DeleteRangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
    cluster.kv(0).delete_range(all).await.unwrap();
    let mut parts: [Vec<WatchResponse>; 2] = Default::default();
    while parts.iter().any(|p| p.last().is_none_or(|last| last.fragment)) {
        let response = stream.next().await;
        parts[response.watch_id as usize].push(response);
    }
    for (watcher, parts) in parts.iter().enumerate() {
        let keys: Vec<&[u8]> = parts.iter().flat_map(|p| &p.events).map(|e| e.kv.as_ref().unwrap().key()).collect();
        let expected: Vec<String> = (0..40).map(|i| format!("k{i:02}")).collect();
        assert_eq!(keys, expected.iter().map(|k| k.as_bytes()).collect::<Vec<_>>(), "watcher {watcher}");
        assert!(parts.iter().all(|p| p.header.unwrap().revision == 42), "one revision");
    }
    assert_eq!(parts[1].len(), 1, "whole for who did not ask");
    assert!(parts[0].len() >= 7 && parts[0].iter().rev().skip(1).all(|p| p.fragment), "{}", parts[0].len());
    let sizes = parts[0].iter().map(prost::Message::encoded_len);
    assert!(sizes.max().unwrap() <= 65 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_of_watchers_are_kept_and_freed() {
    let mut cluster = Cluster::new(1);
    cluster.set("watch.stream_watchers_max", "10").set("watch.watchers_max", "28");
    cluster.start_all().await;
    let refused = async |stream: &mut Stream| {
        stream.send(RequestUnion::CreateRequest(create("k", ""))).await;
        let refused = stream.next().await;
        assert!(refused.created && refused.canceled && refused.watch_id == -1, "{refused:?}");
        assert_eq!(refused.cancel_reason, "etcdserver: too many requests");
    };
    let (mut one, mut other) = (Stream::open(&cluster, 0).await, Stream::open(&cluster, 0).await);
    for _ in 0..10 {
        one.create(create("k", "")).await;
    }
    refused(&mut one).await;
    // What is left is shared: the second connection of this host gets some, and not all.
    let mut created = 0;
    loop {
        other.send(RequestUnion::CreateRequest(create("k", ""))).await;
        let answer = other.next().await;
        if answer.canceled {
            assert_eq!(answer.cancel_reason, "etcdserver: too many requests");
            break;
        }
        created += 1;
    }
    assert!((1..10).contains(&created), "{created} watchers");
    drop(one);
    wait_for("the first stream's watchers to be gone", async || {
        other.send(RequestUnion::CreateRequest(create("k", ""))).await;
        let created = other.next().await;
        if created.canceled { Err(created.cancel_reason) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_needs_a_leader_ends_without_one_and_another_goes_on() {
    let mut cluster = Cluster::start(3).await;
    cluster.put(0, "k", "1").await;
    let mut needing = Stream::try_open(cluster.channel(0), true).await.unwrap();
    let mut patient = Stream::open(&cluster, 0).await;
    needing.create(create("k", "")).await;
    patient.create(create("k", "")).await;
    cluster.kill(1);
    cluster.kill(2);
    let ended = needing.try_next().await.unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "etcdserver: no leader"));
    let refused = Stream::try_open(cluster.channel(0), true).await.err().expect("no new ones either");
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "etcdserver: no leader"));
    cluster.start_pod(1);
    let channel = cluster.channel(0);
    let mut again = wait_for("a leader", async || Stream::try_open(channel.clone(), true).await).await;
    again.create(create("k", "")).await;
    let revision = cluster.put(0, "k", "2").await;
    for stream in [&mut patient, &mut again] {
        assert_eq!(stream.shown().await, format!("0 @{revision} k=2"), "who is let in goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_stops_ends_its_streams_at_once_with_unavailable() {
    let mut cluster = Cluster::start(3).await;
    let mut stream = Stream::open(&cluster, 0).await;
    stream.create(create("k", "")).await;
    let began = std::time::Instant::now();
    cluster.terminate(0).await;
    let ended = stream.try_next().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable, "{ended}");
    // Clients are given the request timeout, 5 s, to end what they do; a watch must not use it up.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}
