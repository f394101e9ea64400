//! Every kind of abuse that a client, or whoever reaches a port, can do, each at random over its kind.
//!
//! Owns what is sent. Invariant: nothing here touches the keys below `good/`, which the good clients own, so what they see is the
//! server's doing. Absent: judgement (`main`), small requests that ask for much (`little`), and how the peer port is spoken to (`peers`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::range_request::{SortOrder, SortTarget};
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    AlarmRequest, AlarmType, CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest,
    MoveLeaderRequest, PutRequest, RangeRequest, RequestOp, SnapshotRequest, StatusRequest, TxnRequest,
    WatchCreateRequest, WatchRequest, alarm_request::AlarmAction, request_op, watch_request,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::support::attack::{HOST, Raw, connect};
use crate::{little, peers};

/// Longest that a hostile client waits for one answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// The keys that `main` has filled in for the kinds that read much.
pub const FILLED: &str = "hostile/fill/";

/// A kind: its name, and what it does.
pub const KINDS: &[(&str, &str)] = &[
    ("nest", "transactions nested 30 to 2,000 deep, through every member, in gRPC and in JSON"),
    ("nest-wide", "a nest of transactions with tens of thousands of puts"),
    ("poison", "commands of an unknown version, cut, or of random bytes on a forward stream"),
    (
        "alarms",
        "alarms for members that do not exist, by the thousand, and CORRUPT for every member, then a move of the leader",
    ),
    ("past", "a large delete, and then reads, hashes and watches of the revision before it"),
    ("sort", "ranges over all keys, sorted by value, of which one key is wanted"),
    ("compare", "transactions of 60 comparisons, each over all keys"),
    ("json", "ranges over all keys in JSON"),
    ("everything", "unary ranges over all keys, sixteen at a time"),
    ("many-ranges", "a transaction of 127 ranges over all keys"),
    ("windows", "large answers that nobody reads, on many connections"),
    ("streams", "range streams that are hardly read"),
    ("halves", "requests that never end"),
    ("heads", "headers that never end, in HTTP/1.1 and HTTP/2"),
    ("watch-keys", "watchers of keys of a megabyte"),
    ("watchers", "as many watchers as a member takes"),
    ("connections", "as many silent connections as a client may make"),
    ("backups", "600 snapshot streams over three connections that nobody reads"),
    ("churn", "values of a megabyte, overwritten and compacted"),
    ("leases", "leases by the thousand, and many keys that end at once"),
    ("nothing", "deletes and transactions that change nothing"),
    ("kept-values", "puts that keep values of a megabyte, many of one key at once"),
    ("large-keys", "reads of keys alone, where keys have a megabyte"),
    ("equal-values", "ranges sorted by large values that are told apart by their last byte"),
    ("rewritten", "reads of the past of keys that were written many times since"),
    ("scans", "elections whose line is the whole store"),
    ("heavy", "transactions that look at every key, a thousand in flight on one connection"),
    ("long-reads", "one long read on each of a thousand connections"),
    ("watch-ends", "streams of 20,000 watchers that end at once"),
    ("many-leases", "leases by the ten thousand that nobody renews"),
    (
        "browser",
        "what a page of a foreign origin, or of a name that was made to point here, may send without being asked",
    ),
    ("peer-silence", "a thousand silent connections to the peer port, and streams without a first message"),
    ("peer-halves", "requests to the peer port that never end"),
    ("peer-calls", "every call of the peer service, with random members, terms and contents"),
    (
        "joiners",
        "nodes that do not exist and want to join, as members and as readers, with names that hold escape sequences",
    ),
];

/// What a hostile client was told.
#[derive(Default)]
pub struct Tally {
    pub served: u64,
    /// Refusals and failures by text.
    pub refused: BTreeMap<String, u64>,
    /// Moves of the leader to another member that were asked for and done: each is a new term, and no election that the attack caused.
    pub moves: u64,
}

/// A refusal's text without what differs from one to the next: numbers, ids and names that were quoted.
fn kind_of(text: &str) -> String {
    let words = text.split_whitespace().map(|word| {
        let bare = word.trim_matches(|c: char| c.is_ascii_punctuation());
        let is_id = bare.chars().any(|c| c.is_ascii_digit()) && bare.chars().all(|c| c.is_ascii_hexdigit());
        let is_strange = word.contains('"') || word.chars().any(|c| c.is_control() || !c.is_ascii());
        if is_id || is_strange { "#".to_owned() } else { word.replace(|c: char| c.is_ascii_digit(), "#") }
    });
    words.collect::<Vec<_>>().join(" ").chars().take(90).collect()
}

impl Tally {
    pub fn note<T>(&mut self, outcome: Result<T, String>) -> Option<T> {
        match outcome {
            Ok(answer) => {
                self.served += 1;
                Some(answer)
            }
            Err(text) => {
                *self.refused.entry(kind_of(&text)).or_default() += 1;
                None
            }
        }
    }

    pub fn add(&mut self, other: Self) {
        self.served += other.served;
        self.moves += other.moves;
        for (text, count) in other.refused {
            *self.refused.entry(text).or_default() += count;
        }
    }
}

/// Whom a hostile client attacks, until when, and its choices.
pub struct Attack {
    pub clients: Vec<String>,
    pub peers: Vec<String>,
    pub until: Instant,
    pub random: fastrand::Rng,
}

/// A connection to an address, of this process's host, once it is needed.
pub fn lazy(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("it is an address");
    endpoint.connect_timeout(Duration::from_secs(2)).local_address(HOST.get().copied()).connect_lazy()
}

impl Attack {
    pub fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    pub fn endpoint(&mut self) -> String {
        self.clients[self.random.usize(..self.clients.len())].clone()
    }

    /// A connection of its own to a random member.
    pub fn channel(&mut self) -> Channel {
        let endpoint = self.endpoint();
        lazy(&endpoint)
    }

    pub fn kv(&mut self) -> KvClient<Channel> {
        KvClient::new(self.channel()).max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX)
    }

    pub fn key(&mut self) -> Bytes {
        format!("hostile/{:06}", self.random.u32(..1_000_000)).into()
    }

    /// Holds what it has opened for a while, and lets it go.
    pub async fn hold<T>(&mut self, held: T) {
        let rest = Duration::from_millis(self.random.u64(500..3000));
        tokio::time::sleep(rest.min(self.until.saturating_duration_since(Instant::now()))).await;
        drop(held);
    }
}

/// Waits for an answer, but not for ever.
pub async fn answer<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(format!("{:?}: {}", status.code(), status.message())),
        Err(_) => Err(format!("no answer in {PATIENCE:?}")),
    }
}

pub fn all() -> RangeRequest {
    RangeRequest { key: FILLED.into(), range_end: "hostile/fill0".into(), ..Default::default() }
}

pub fn op(request: request_op::Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// Does one kind again and again until its time is over.
pub async fn run(kind: &str, attack: &mut Attack) -> Tally {
    let mut tally = Tally::default();
    while attack.goes_on() {
        let step = Box::pin(step(kind, attack, &mut tally));
        step.await;
    }
    tally
}

async fn step(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    match kind {
        "nest" => nest(attack, tally).await,
        "nest-wide" => nest_wide(attack, tally).await,
        "alarms" => alarms(attack, tally).await,
        "past" => past(attack, tally).await,
        "sort" | "everything" => ranges(kind, attack, tally).await,
        "compare" | "many-ranges" => txns(kind, attack, tally).await,
        "json" => json(attack, tally).await,
        "windows" => windows(attack).await,
        "streams" => streams(attack, tally).await,
        "halves" => halves(attack).await,
        "heads" => heads(attack, tally).await,
        "watch-keys" | "watchers" => watchers(kind, attack, tally).await,
        "connections" => connections(attack).await,
        "backups" => backups(attack).await,
        "churn" => churn(attack, tally).await,
        "leases" => leases(attack, tally).await,
        "nothing" => nothing(attack, tally).await,
        "browser" => browser(attack, tally).await,
        "poison" | "peer-silence" | "peer-halves" | "peer-calls" | "joiners" => peers::step(kind, attack, tally).await,
        "kept-values" | "large-keys" | "equal-values" | "rewritten" | "scans" | "heavy" | "long-reads"
        | "watch-ends" | "many-leases" => little::step(kind, attack, tally).await,
        _ => unreachable!("`main` checks the names"),
    }
}

/// A transaction in a transaction, and so on, as bytes: no encoder of a library goes so deep.
pub fn nested(depth: usize, leaf: &[u8]) -> Vec<u8> {
    let field = |number: u8, content: &[u8]| {
        let mut bytes = vec![number << 3 | 2];
        prost::encoding::encode_varint(content.len() as u64, &mut bytes);
        bytes.extend_from_slice(content);
        bytes
    };
    // RequestOp.request_put, RequestOp.request_txn and TxnRequest.success.
    let mut txn = field(2, &field(2, leaf));
    for _ in 0..depth {
        txn = field(2, &field(4, &txn));
    }
    txn
}

async fn nest(attack: &mut Attack, tally: &mut Tally) {
    use prost::Message as _;
    let depth = attack.random.choice([30, 48, 49, 50, 60, 90, 98, 101, 120, 200, 2000]).unwrap_or(49);
    let put = PutRequest { key: attack.key(), value: "x".into(), ..Default::default() };
    let content = nested(depth, &put.encode_to_vec());
    let endpoint = attack.endpoint();
    if attack.random.bool() {
        // By hand: what is asked for is a message that no library would send.
        let asked = async {
            let mut raw = Raw::connect(&endpoint).await?;
            raw.ask("/etcdserverpb.KV/Txn", &content).await?;
            let mut seen = [0; 256];
            tokio::time::timeout(Duration::from_millis(300), raw.stream.read(&mut seen)).await.unwrap_or(Ok(0))
        };
        tally.note(asked.await.map_err(|error| error.to_string()));
    } else {
        let open = r#"{"success":[{"request_txn":"#.repeat(depth);
        let body = format!("{open}{{}}{}", "}]}".repeat(depth));
        tally.note(post(&endpoint, "/v3/kv/txn", "application/json", &[], &body).await);
    }
}

async fn nest_wide(attack: &mut Attack, tally: &mut Tally) {
    let (outer, inner) = (attack.random.usize(10..=40), attack.random.usize(10..=40));
    let txn = |ops: Vec<RequestOp>| TxnRequest { success: ops, ..Default::default() };
    let prefix = attack.random.u32(..);
    let puts = |from: usize| {
        let put = |i: usize| {
            let key = format!("hostile/wide/{prefix}/{i}").into();
            op(request_op::Request::RequestPut(PutRequest { key, ..Default::default() }))
        };
        (from..from + inner).map(put).collect::<Vec<_>>()
    };
    let nests = |from: usize| {
        let nest = |i: usize| op(request_op::Request::RequestTxn(txn(puts((from + i) * inner))));
        op(request_op::Request::RequestTxn(txn((0..inner).map(nest).collect())))
    };
    let request = txn((0..outer).map(|i| nests(i * inner)).collect());
    tally.note(answer(attack.kv().txn(request)).await);
    let doomed =
        DeleteRangeRequest { key: "hostile/wide/".into(), range_end: "hostile/wide0".into(), ..Default::default() };
    tally.note(answer(attack.kv().delete_range(doomed)).await);
}

async fn alarms(attack: &mut Attack, tally: &mut Tally) {
    let mut maintenance = MaintenanceClient::new(attack.channel());
    let put_on = |member_id: u64, kind: AlarmType| AlarmRequest {
        action: AlarmAction::Activate.into(),
        member_id,
        alarm: kind.into(),
    };
    for _ in 0..100 {
        let stranger = put_on(attack.random.u64(..), AlarmType::Corrupt);
        tally.note(answer(maintenance.alarm(stranger)).await);
    }
    let (mut members, mut leader) = (Vec::new(), 0);
    for slot in 0..attack.clients.len() {
        let channel = lazy(&attack.clients[slot]);
        if let Ok(status) = answer(MaintenanceClient::new(channel).status(StatusRequest {})).await {
            let status = status.into_inner();
            leader = status.leader;
            members.push(status.header.map_or(0, |header| header.member_id));
        }
    }
    for member in &members {
        tally.note(answer(maintenance.alarm(put_on(*member, AlarmType::Corrupt))).await);
    }
    let target_id = members.get(attack.random.usize(..3)).copied().unwrap_or(0);
    let moved = tally.note(answer(maintenance.move_leader(MoveLeaderRequest { target_id })).await);
    tally.moves += u64::from(moved.is_some() && target_id != leader);
    // As a person would who was called for it.
    for member in &members {
        let disarm = AlarmRequest { action: AlarmAction::Deactivate.into(), ..put_on(*member, AlarmType::Corrupt) };
        tally.note(answer(maintenance.alarm(disarm)).await);
    }
}

async fn past(attack: &mut Attack, tally: &mut Tally) {
    let mut kv = attack.kv();
    let (mine, end) = (format!("hostile/past/{}/", attack.random.u32(..)), "hostile/past0");
    let keys = attack.random.usize(5_000..=20_000);
    for start in (0..keys).step_by(100) {
        let puts = (start..start + 100).map(|i| {
            let key = format!("{mine}{i:06}").into();
            op(request_op::Request::RequestPut(PutRequest { key, value: "x".into(), ..Default::default() }))
        });
        let request = TxnRequest { success: puts.collect(), ..Default::default() };
        if tally.note(answer(kv.txn(request)).await).is_none() || !attack.goes_on() {
            break;
        }
    }
    let doomed = DeleteRangeRequest { key: mine.clone().into(), range_end: end.into(), ..Default::default() };
    let Some(deleted) = tally.note(answer(kv.delete_range(doomed)).await) else { return };
    let revision = deleted.into_inner().header.map_or(0, |header| header.revision);
    let before = RangeRequest {
        key: mine.into(),
        range_end: end.into(),
        revision: revision - 1,
        serializable: attack.random.bool(),
        ..Default::default()
    };
    tally.note(answer(attack.kv().range(before.clone())).await);
    let hash = HashKvRequest { revision: revision - 1 };
    tally.note(answer(MaintenanceClient::new(attack.channel()).hash_kv(hash)).await);
    let create = WatchCreateRequest {
        key: before.key,
        range_end: before.range_end,
        start_revision: revision,
        prev_kv: true,
        ..Default::default()
    };
    let mut watch = WatchClient::new(attack.channel()).max_decoding_message_size(usize::MAX);
    let request = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
    let requests = futures_util::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
    if let Some(stream) = tally.note(answer(watch.watch(requests)).await) {
        let mut stream = stream.into_inner();
        for _ in 0..2 {
            tally.note(answer(stream.message()).await);
        }
    }
}

async fn ranges(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    let at_once = if kind == "everything" { 16 } else { 4 };
    let mut kv: Vec<_> = (0..at_once).map(|_| attack.kv()).collect();
    let request = match kind {
        "everything" => all(),
        _ => RangeRequest {
            sort_target: SortTarget::Value.into(),
            sort_order: SortOrder::Descend.into(),
            limit: 1,
            ..all()
        },
    };
    for outcome in join_all(kv.iter_mut().map(|kv| answer(kv.range(request.clone())))).await {
        tally.note(outcome);
    }
}

async fn txns(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    let request = if kind == "compare" {
        // All of them hold, so that all keys are looked at.
        let mut comparison = |_| {
            let (target, result, operand) = match attack.random.u8(..6) {
                0 => (CompareTarget::Mod, CompareResult::Greater, TargetUnion::ModRevision(attack.random.i64(..2))),
                1 => (CompareTarget::Mod, CompareResult::NotEqual, TargetUnion::ModRevision(i64::MAX)),
                2 => (CompareTarget::Create, CompareResult::Greater, TargetUnion::CreateRevision(0)),
                3 => (CompareTarget::Version, CompareResult::NotEqual, TargetUnion::Version(0)),
                4 => (CompareTarget::Lease, CompareResult::Equal, TargetUnion::Lease(0)),
                _ => (CompareTarget::Value, CompareResult::NotEqual, TargetUnion::Value("no value".into())),
            };
            Compare {
                key: FILLED.into(),
                range_end: "hostile/fill0".into(),
                target: target.into(),
                result: result.into(),
                target_union: Some(operand),
            }
        };
        let compare = (0..60).map(&mut comparison).collect();
        let put = PutRequest { key: attack.key(), ..Default::default() };
        let success = vec![op(request_op::Request::RequestPut(put))];
        TxnRequest { compare, success, ..Default::default() }
    } else {
        let success = (0..127).map(|_| op(request_op::Request::RequestRange(all())));
        TxnRequest { success: success.collect(), ..Default::default() }
    };
    tally.note(answer(attack.kv().txn(request)).await);
}

/// A request with HTTP/1.1; returns its code and how many bytes came.
pub async fn post(
    endpoint: &str,
    path: &str,
    content_type: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<(u16, usize), String> {
    let exchange = async {
        let mut stream = connect(endpoint).await?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\nContent-Type: {content_type}\r\n{headers}\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        let (mut first, mut piece, mut bytes) = (Vec::new(), vec![0; 64 << 10], 0);
        loop {
            let read = stream.read(&mut piece).await?;
            if read == 0 {
                break;
            }
            if first.len() < 64 {
                first.extend_from_slice(&piece[..read.min(64)]);
            }
            bytes += read;
        }
        let code = String::from_utf8_lossy(&first).split(' ').nth(1).and_then(|code| code.parse().ok());
        code.map(|code: u16| (code, bytes)).ok_or_else(|| std::io::Error::other("not HTTP"))
    };
    match tokio::time::timeout(PATIENCE, exchange).await {
        Ok(Ok((code, bytes))) if code < 400 => Ok((code, bytes)),
        Ok(Ok((code, _))) => Err(format!("HTTP {code}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {PATIENCE:?}")),
    }
}

async fn json(attack: &mut Attack, tally: &mut Tally) {
    use base64::Engine as _;
    let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let body = format!(r#"{{"key":"{}","range_end":"{}"}}"#, base64(FILLED), base64("hostile/fill0"));
    let endpoints: Vec<String> = (0..8).map(|_| attack.endpoint()).collect();
    let asked = endpoints.iter().map(|endpoint| post(endpoint, "/v3/kv/range", "application/json", &[], &body));
    for outcome in join_all(asked).await {
        tally.note(outcome);
    }
}

async fn windows(attack: &mut Attack) {
    use prost::Message as _;
    let content = all().encode_to_vec();
    let mut held = Vec::new();
    for _ in 0..attack.random.usize(10..100) {
        let endpoint = attack.endpoint();
        let Ok(mut raw) = Raw::connect(&endpoint).await else { break };
        for _ in 0..attack.random.usize(1..50) {
            if raw.ask("/etcdserverpb.KV/Range", &content).await.is_err() {
                break;
            }
        }
        held.push(raw);
    }
    attack.hold(held).await;
}

async fn streams(attack: &mut Attack, tally: &mut Tally) {
    let mut held = Vec::new();
    for _ in 0..50 {
        if let Some(stream) = tally.note(answer(attack.kv().range_stream(all())).await) {
            let mut stream = stream.into_inner();
            tally.note(answer(stream.message()).await);
            held.push(stream);
        }
    }
    attack.hold(held).await;
}

async fn halves(attack: &mut Attack) {
    let mut held = Vec::new();
    for _ in 0..attack.random.usize(10..100) {
        let endpoint = attack.endpoint();
        let Ok(mut raw) = Raw::connect(&endpoint).await else { break };
        for _ in 0..attack.random.usize(1..8) {
            let bytes = attack.random.usize(..1 << 20);
            let begun = tokio::time::timeout(Duration::from_millis(200), raw.begin_put(bytes));
            if !matches!(begun.await, Ok(Ok(()))) {
                break;
            }
        }
        held.push(raw);
    }
    attack.hold(held).await;
}

async fn heads(attack: &mut Attack, tally: &mut Tally) {
    let mut held = Vec::new();
    for _ in 0..100 {
        let endpoint = attack.endpoint();
        if attack.random.bool() {
            let Ok(mut stream) = connect(&endpoint).await else { continue };
            let _ = stream.write_all(b"POST /v3/kv/put HTTP/1.1\r\nHost: x\r\n").await;
            for i in 0..attack.random.usize(1..2000) {
                let line = format!("X-{i}: {}\r\n", "y".repeat(100));
                let sent = tokio::time::timeout(Duration::from_millis(50), stream.write_all(line.as_bytes()));
                if !matches!(sent.await, Ok(Ok(()))) {
                    break;
                }
            }
            held.push(stream);
        } else if let Ok(mut raw) = Raw::connect(&endpoint).await {
            tally.note(raw.flood_headers(20).await.map_err(|error| error.to_string()));
            held.push(raw.stream);
        }
    }
    attack.hold(held).await;
}

async fn watchers(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    let (count, key_bytes) = if kind == "watchers" { (20_000, 20) } else { (40, 1_400_000) };
    let prefix = attack.random.u32(..);
    let creates = (0..count).map(move |i| {
        let key = format!("hostile/watch/{prefix}/{i}/{}", "k".repeat(key_bytes)).into();
        let create = WatchCreateRequest { key, ..Default::default() };
        WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) }
    });
    let requests = futures_util::StreamExt::chain(tokio_stream::iter(creates), tokio_stream::pending());
    let mut client = WatchClient::new(attack.channel()).max_encoding_message_size(usize::MAX);
    let Some(stream) = tally.note(answer(client.watch(requests)).await) else { return };
    let mut stream = stream.into_inner();
    for _ in 0..count {
        match tokio::time::timeout(Duration::from_secs(1), stream.message()).await {
            Ok(Ok(Some(told))) if told.canceled => {
                tally.note::<()>(Err(told.cancel_reason));
            }
            Ok(Ok(Some(_))) => tally.served += 1,
            _ => break,
        }
        if !attack.goes_on() {
            return;
        }
    }
    attack.hold(stream).await;
}

async fn connections(attack: &mut Attack) {
    let mut held = Vec::new();
    for _ in 0..5000 {
        let endpoint = attack.endpoint();
        match tokio::time::timeout(Duration::from_millis(200), connect(&endpoint)).await {
            Ok(Ok(stream)) => held.push(stream),
            _ => break,
        }
    }
    attack.hold(held).await;
}

async fn backups(attack: &mut Attack) {
    let mut held = Vec::new();
    for _ in 0..3 {
        let endpoint = attack.endpoint();
        let Ok(mut raw) = Raw::connect(&endpoint).await else { continue };
        for _ in 0..200 {
            use prost::Message as _;
            if raw.ask("/etcdserverpb.Maintenance/Snapshot", &SnapshotRequest {}.encode_to_vec()).await.is_err() {
                break;
            }
        }
        held.push(raw);
    }
    attack.hold(held).await;
}

async fn churn(attack: &mut Attack, tally: &mut Tally) {
    let mut kv = attack.kv();
    let value = Bytes::from(vec![b'v'; 1 << 20]);
    for i in 0..30 {
        let key = format!("hostile/churn/{}", i % 4).into();
        let put = PutRequest { key, value: value.clone(), ..Default::default() };
        if let Some(done) = tally.note(answer(kv.put(put)).await) {
            let revision = done.into_inner().header.map_or(0, |header| header.revision);
            if i % 10 == 9 {
                // Far enough behind that nobody who reads what was just written is disturbed.
                let compact = CompactionRequest { revision: revision - 2000, physical: false };
                tally.note(answer(kv.compact(compact)).await);
            }
        }
        if !attack.goes_on() {
            return;
        }
    }
}

async fn leases(attack: &mut Attack, tally: &mut Tally) {
    let mut client = LeaseClient::new(attack.channel());
    for _ in 0..200 {
        let ttl = attack.random.i64(2..100);
        tally.note(answer(client.lease_grant(LeaseGrantRequest { ttl, id: 0 })).await);
        if !attack.goes_on() {
            return;
        }
    }
    let Some(lease) = tally.note(answer(client.lease_grant(LeaseGrantRequest { ttl: 5, id: 0 })).await) else { return };
    let lease = lease.into_inner().id;
    let mut kv = attack.kv();
    let prefix = attack.random.u32(..);
    for start in (0..5000).step_by(100) {
        let puts = (start..start + 100).map(|i| {
            let key = format!("hostile/lease/{prefix}/{i}").into();
            op(request_op::Request::RequestPut(PutRequest { key, lease, ..Default::default() }))
        });
        let request = TxnRequest { success: puts.collect(), ..Default::default() };
        if tally.note(answer(kv.txn(request)).await).is_none() || !attack.goes_on() {
            return;
        }
    }
}

async fn nothing(attack: &mut Attack, tally: &mut Tally) {
    let mut kv: Vec<_> = (0..32).map(|_| attack.kv()).collect();
    let key = format!("hostile/none/{}", attack.random.u32(..));
    let doomed = DeleteRangeRequest { key: key.into(), ..Default::default() };
    let success = vec![op(request_op::Request::RequestDeleteRange(doomed.clone())); attack.random.usize(0..100)];
    let txn = TxnRequest { success, ..Default::default() };
    for _ in 0..20 {
        for outcome in join_all(kv.iter_mut().map(|kv| answer(kv.delete_range(doomed.clone())))).await {
            tally.note(outcome);
        }
        for outcome in join_all(kv.iter_mut().map(|kv| answer(kv.txn(txn.clone())))).await {
            tally.note(outcome);
        }
        if !attack.goes_on() {
            return;
        }
    }
}

/// What a browser sends without asking anybody: simple requests from a page of another origin, and any from one of a name that was made to
/// point here, gRPC's own form included. None may change anything.
async fn browser(attack: &mut Attack, tally: &mut Tally) {
    // "hostile/none/" and what follows it.
    let body = r#"{"key":"aG9zdGlsZS9ub25lLw==","range_end":"aG9zdGlsZS9ub25lMA=="}"#;
    let doomed =
        DeleteRangeRequest { key: "hostile/none/".into(), range_end: "hostile/none0".into(), ..Default::default() };
    let call =
        [&[0, 0, 0, 0][..], &[prost::Message::encoded_len(&doomed) as u8], &prost::Message::encode_to_vec(&doomed)];
    let call = String::from_utf8(call.concat()).expect("it is text");
    for _ in 0..10 {
        let foreign = attack.random.bool();
        let kinds = match foreign {
            true => &["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"][..],
            false => &["application/json", "application/grpc", "application/grpc+proto", "text/plain"],
        };
        let kind = attack.random.choice(kinds).expect("there are some");
        let headers = match foreign {
            true => [("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site")],
            false => [("Origin", "http://rebound.example"), ("Sec-Fetch-Site", "same-origin")],
        };
        let (path, body) = match attack.random.bool() {
            true => ("/v3/kv/deleterange", body),
            false => ("/etcdserverpb.KV/DeleteRange", &call[..]),
        };
        let endpoint = attack.endpoint();
        tally.note(post(&endpoint, path, kind, &headers, body).await);
    }
}
