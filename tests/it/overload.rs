//! More than a server can take, and clients that mean it ill: memory stays bounded, good clients go on, and what is refused is
//! refused with the documented errors. `examples/overload.rs` measures a cluster with 10,000 idle clients and too many writers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use prost::Message as _;
use quorate::pb::etcd::{PutRequest, RangeRequest, TxnRequest};
use tonic::Code;

use crate::support::attack::{Raw, closed_within, dribble};
use crate::support::cluster::{Cluster, PATIENCE, wait_for};

/// What a server of these tests may take more than before, whatever is done to it: the two budgets, and as much again for
/// buffers, the allocator and a debug build.
const MEMORY_BYTES_MAX: u64 = 96 << 20;

async fn small_limits(size: u64) -> Cluster {
    let mut cluster = Cluster::new(size);
    cluster
        .set("limits.receive_timeout", "2s")
        .set("limits.receive_bytes_max", "16MiB")
        .set("limits.answer_bytes_max", "16MiB")
        .set("server.request_timeout", "2s");
    cluster.start_all().await;
    cluster
}

const ROUNDS_MIN: usize = 10;

/// A client that does what it should, all the time: a put and a read in turn.
struct Good {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<Vec<Duration>>,
}

impl Good {
    fn start(cluster: &Cluster) -> Self {
        Self::start_at(cluster, 0)
    }

    fn start_at(cluster: &Cluster, slot: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicUsize::new(0));
        let (mut kv, stopped, done) = (cluster.kv(slot), stop.clone(), rounds.clone());
        let task = tokio::spawn(async move {
            let mut times = Vec::new();
            for i in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let begin = Instant::now();
                let value = format!("{i}");
                let put = PutRequest { key: "good".into(), value: value.clone().into(), ..Default::default() };
                kv.put(put).await.expect("a good client's put succeeds");
                let read = RangeRequest { key: "good".into(), ..Default::default() };
                let answer = kv.range(read).await.expect("a good client's read succeeds").into_inner();
                assert_eq!(answer.kvs[0].value(), value.as_bytes());
                times.push(begin.elapsed());
                done.store(times.len(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            times
        });
        Self { stop, rounds, task }
    }

    /// Whether it has had rounds enough to tell how it is served; how many it has in a given time depends on the machine.
    fn has_had_enough(&self) -> bool {
        self.rounds.load(Ordering::Relaxed) > ROUNDS_MIN
    }

    /// Fails if the client failed, or was held up.
    async fn stop(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = self.task.await.expect("the good client goes on");
        times.sort();
        assert!(times.len() > ROUNDS_MIN, "{what}: only {} rounds", times.len());
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!("{what}: {} rounds of a good client, median {:?}, p99 {:?}", times.len(), at(50), at(99));
        // Below the time after which a request fails, however busy the machine is.
        assert!(at(50) < Duration::from_secs(3), "{what}: the good client was held up");
    }
}

/// How much more the pod takes than `before`.
fn growth(cluster: &Cluster, before: u64) -> u64 {
    cluster.resident_bytes(0).saturating_sub(before)
}

fn assert_bounded(cluster: &Cluster, before: u64, what: &str) {
    let grown = growth(cluster, before);
    println!("{what}: {} MiB more", grown >> 20);
    assert!(grown < MEMORY_BYTES_MAX, "{what}: {grown} bytes more than before");
}

/// Requests that are begun and never ended, and connections that do not say what they want, end in time; what they sent is given
/// back, and others are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn those_who_dribble_are_cut_off_and_hold_nothing() {
    let cluster = small_limits(1).await;
    let endpoint = cluster.endpoint(0);
    let before = cluster.resident_bytes(0);
    let good = Good::start(&cluster);
    let slow: [&[u8]; 3] = [b"GET /health HTTP/1.1\r\nX-A: y", b"PRI * HTTP/2.0\r\n\r\nSM", b"\x16\x03\x01\x00"];
    let dribbling = join_all((0..60).map(|i| {
        let endpoint = endpoint.clone();
        async move { dribble(&endpoint, slow[i % 3], Duration::from_millis(300), PATIENCE).await }
    }));
    // 64 MiB in all: four times the budget.
    let mut half = Vec::new();
    for _ in 0..16 {
        let mut raw = Raw::connect(&endpoint).await.unwrap();
        for _ in 0..64 {
            if tokio::time::timeout(Duration::from_secs(1), raw.begin_put(64 << 10)).await.is_err() {
                break;
            }
        }
        half.push(raw);
    }
    assert_bounded(&cluster, before, "half requests");
    for closed in dribbling.await {
        assert!(closed.is_some(), "a connection that does not say what it wants stays open");
    }
    good.stop("half requests and dribblers").await;
    drop(half);
    let mut kv = cluster.kv(0);
    let put = PutRequest { key: "large".into(), value: vec![1; 1 << 20].into(), ..Default::default() };
    wait_for("the budget to be free again", async || kv.put(put.clone()).await.map_err(|e| e.message().to_owned()))
        .await;
}

/// Floods of streams that are reset, of control frames, of headers, and of nonsense.
#[tokio::test(flavor = "multi_thread")]
async fn floods_close_their_own_connection_only() {
    let cluster = small_limits(1).await;
    let endpoint = cluster.endpoint(0);
    let before = cluster.resident_bytes(0);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let good = Good::start(&cluster);
    let floods = join_all((0..8_u64).map(|i| {
        let endpoint = endpoint.clone();
        async move {
            let mut raw = Raw::connect(&endpoint).await.unwrap();
            // What fails to be sent was refused, which is what is wanted.
            let _ = match i % 4 {
                0 => raw.flood_resets(20_000).await,
                1 => raw.flood_control(200_000).await,
                2 => raw.flood_headers(2_000).await,
                _ => raw.flood_nonsense(seed + i, 10_000).await,
            };
            (i % 4, raw.closed_within(Duration::from_secs(10)).await)
        }
    }))
    .await;
    good.stop("floods").await;
    assert_bounded(&cluster, before, "floods");
    for (kind, closed) in floods {
        // Who floods with pings is throttled by TCP, as nobody reads the answers.
        assert!(kind == 1 || closed.is_some(), "flood {kind} was not cut off");
    }
    cluster.wait_http(0, "/readyz", 200, &[]).await;
}

/// Clients that ask for 200 MB and read nothing.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_read_do_not_fill_the_memory() {
    let cluster = small_limits(1).await;
    let endpoint = cluster.endpoint(0);
    let mut kv = cluster.kv(0);
    for i in 0..8 {
        let put = PutRequest { key: format!("big/{i}").into(), value: vec![i; 1 << 20].into(), ..Default::default() };
        kv.put(put).await.unwrap();
    }
    let before = cluster.resident_bytes(0);
    let good = Good::start(&cluster);
    let range = RangeRequest { key: "big/".into(), range_end: "big0".into(), ..Default::default() }.encode_to_vec();
    let mut deaf = Vec::new();
    for _ in 0..5 {
        let mut raw = Raw::connect(&endpoint).await.unwrap();
        for _ in 0..5 {
            raw.ask("/etcdserverpb.KV/Range", &range).await.unwrap();
        }
        deaf.push(raw);
    }
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_bounded(&cluster, before, "25 answers of 8 MiB that nobody reads");
    }
    good.stop("deaf clients").await;
    // Who reads is answered beside them.
    let large = RangeRequest { key: "big/".into(), range_end: "big0".into(), ..Default::default() };
    assert_eq!(kv.range(large).await.unwrap().into_inner().kvs.len(), 8);
    drop(deaf);
}

/// Requests that are too large, or are none, are told so.
#[tokio::test(flavor = "multi_thread")]
async fn huge_and_malformed_requests_get_the_documented_errors() {
    let cluster = small_limits(1).await;
    let mut kv = cluster.kv(0);
    let put = |bytes: usize| PutRequest { key: "k".into(), value: vec![1; bytes].into(), ..Default::default() };
    let refused = kv.put(put(1700 << 10)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "etcdserver: request is too large"));
    // Beyond what a message may be at all, the library refuses it before it is read.
    let refused = kv.put(put(8 << 20)).await.unwrap_err();
    assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused}");
    let op = quorate::pb::etcd::RequestOp { request: None };
    let refused = kv.txn(TxnRequest { success: vec![op; 200], ..Default::default() }).await.unwrap_err();
    assert_eq!(refused.message(), "etcdserver: too many operations in txn request");
    let mut grpc = tonic::client::Grpc::new(cluster.channel(0));
    grpc.ready().await.unwrap();
    // Field 1 says that it is 100 bytes long; there are 2.
    let codec = Nonsense(&[0x0a, 100, 1, 2]);
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/etcdserverpb.KV/Put");
    let refused = grpc.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal, "{refused}");
    cluster.put(0, "k", "v").await;
}

/// Sends these bytes as a message.
struct Nonsense(&'static [u8]);

impl tonic::codec::Codec for Nonsense {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self(self.0)
    }

    fn decoder(&mut self) -> Self {
        Self(self.0)
    }
}

impl tonic::codec::Encoder for Nonsense {
    type Item = ();
    type Error = tonic::Status;

    fn encode(&mut self, (): (), buf: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(buf, self.0);
        Ok(())
    }
}

impl tonic::codec::Decoder for Nonsense {
    type Item = ();
    type Error = tonic::Status;

    fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        Ok(Some(()))
    }
}

/// Twenty times more requests than there are places: who finds none is told so at once, the rest are served, and nothing is left. A
/// client that asks little never hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn more_requests_than_places_are_refused_to_those_who_ask_too_much() {
    let mut cluster = Cluster::new(3);
    cluster.set("raft.queue_requests_max", "100");
    let leader = cluster.start_all().await;
    let before = cluster.resident_bytes(leader);
    let begin = Instant::now();
    let good = Good::start_at(&cluster, leader);
    let clients = (0..20).map(|client| {
        let (kv, good) = (cluster.kv(leader), &good);
        async move {
            let mut outcomes = BTreeMap::<String, usize>::new();
            for round in 0.. {
                if begin.elapsed() > Duration::from_secs(3) && good.has_had_enough() || begin.elapsed() > PATIENCE {
                    break;
                }
                let puts = (0..100).map(|i| {
                    let (mut kv, key) = (kv.clone(), format!("{client}/{round}/{i}"));
                    async move {
                        kv.put(PutRequest { key: key.into(), value: vec![1; 512].into(), ..Default::default() }).await
                    }
                });
                for outcome in join_all(puts).await {
                    let text = outcome.map_or_else(|status| status.message().to_owned(), |_| "ok".into());
                    *outcomes.entry(text).or_default() += 1;
                }
            }
            outcomes
        }
    });
    let mut all = BTreeMap::<String, usize>::new();
    for outcomes in join_all(clients).await {
        outcomes.into_iter().for_each(|(text, count)| *all.entry(text).or_default() += count);
    }
    println!("puts by 2000 at once in {:?}: {all:?}", begin.elapsed());
    good.stop("twenty times too many").await;
    let documented = ["ok", "etcdserver: too many requests", "etcdserver: request timed out"];
    assert!(all.keys().all(|text| documented.contains(&text.as_str())), "{all:?}");
    assert!(all["ok"] >= 300, "{all:?}");
    assert!(all.contains_key("etcdserver: too many requests"), "{all:?}");
    assert!(cluster.resident_bytes(leader).saturating_sub(before) < MEMORY_BYTES_MAX);
    cluster.put(leader, "after", "it").await;
    cluster.wait_same_hash(0..3).await;
}

/// Connections that do nothing cost little, and those beyond a host's share are closed at once.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_cheap_and_bounded() {
    const IDLE: usize = 400;
    let mut cluster = Cluster::new(1);
    // One host may have half of them.
    cluster.set("limits.connections_max", &format!("{}", 2 * (IDLE + 10)));
    cluster.start_all().await;
    let endpoint = cluster.endpoint(0);
    let before = cluster.resident_bytes(0);
    let good = Good::start(&cluster);
    let mut idle = Vec::new();
    for _ in 0..IDLE {
        idle.push(Raw::connect(&endpoint).await.unwrap());
    }
    let grown = growth(&cluster, before);
    println!("{IDLE} idle connections: {} KiB each", grown / IDLE as u64 / 1024);
    assert!(grown < IDLE as u64 * (64 << 10) + (16 << 20), "{grown} bytes");
    let mut beyond = 0;
    for _ in 0..30 {
        if let Ok(mut raw) = Raw::connect(&endpoint).await
            && closed_within(&mut raw.stream, Duration::from_millis(500)).await.is_none()
        {
            beyond += 1;
            idle.push(raw);
        }
    }
    assert!(beyond <= 10, "{beyond} connections beyond the share");
    good.stop("idle connections").await;
}
