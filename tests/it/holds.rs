//! Everything that a client can make a member hold, at once and at random: what it takes stays within the account, and good clients go on.
//!
//! Each hostile connection opens holds of random kinds and then reads nothing: half requests, requests that nobody polls, answers of any
//! size, JSON, heads, keys of watchers, queues of watchers, streams of ranges. The seed is printed.

use std::time::Duration;

use prost::Message as _;
use quorate::pb::etcd::range_request::SortTarget;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    CompactionRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, request_op,
};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::attack::Raw;
use crate::support::cluster::{Cluster, http_post, wait_for};

const MIB: u64 = 1 << 20;
const RECEIVE_BYTES: u64 = 24 * MIB;
const ANSWER_BYTES: u64 = 24 * MIB;
/// Beside the account: buffers of sockets' libraries, the allocator's rounding, a debug build, and the log's and state store's caches.
const OTHER_BYTES: u64 = 72 * MIB;
/// Bytes of the data that is asked for.
const DATA_BYTES: u64 = 12 * MIB;

fn everything() -> RangeRequest {
    RangeRequest { key: "d/".into(), range_end: "d0".into(), ..RangeRequest::default() }
}

async fn filled() -> Cluster {
    let mut cluster = Cluster::new(1);
    cluster
        .set("limits.receive_bytes_max", "24MiB")
        .set("limits.answer_bytes_max", "24MiB")
        .set("limits.receive_timeout", "5s");
    cluster.start_all().await;
    let mut kv = cluster.kv(0);
    // Many small values, and a few large ones.
    for part in 0..40 {
        let put = |i: u64| PutRequest {
            key: format!("d/{part:03}/{i:04}").into(),
            value: vec![7; if i == 0 { 200 << 10 } else { 100 }].into(),
            ..PutRequest::default()
        };
        let ops = (0..100).map(|i| RequestOp { request: Some(request_op::Request::RequestPut(put(i))) });
        kv.txn(TxnRequest { success: ops.collect(), ..TxnRequest::default() }).await.unwrap();
    }
    cluster
}

/// A connection that holds what it can, and reads nothing.
async fn hold(endpoint: &str, random: &mut fastrand::Rng) -> std::io::Result<Raw> {
    let mut raw = Raw::connect(endpoint).await?;
    let small = RangeRequest { limit: random.i64(1..150), ..everything() }.encode_to_vec();
    for _ in 0..random.usize(1..60) {
        match random.u8(..8) {
            0 => raw.begin_put(random.usize(..60_000)).await?,
            1 => raw.ask("/etcdserverpb.KV/Range", &everything().encode_to_vec()).await?,
            // Below what is written in pieces.
            2 => raw.ask("/etcdserverpb.KV/Range", &small).await?,
            3 => raw.ask("/etcdserverpb.KV/RangeStream", &everything().encode_to_vec()).await?,
            4 => {
                let range = RequestOp { request: Some(request_op::Request::RequestRange(everything())) };
                let many = TxnRequest { success: vec![range; random.usize(1..100)], ..TxnRequest::default() };
                raw.ask("/etcdserverpb.KV/Txn", &many.encode_to_vec()).await?;
            }
            5 => {
                let create = WatchCreateRequest {
                    key: vec![b'd'; random.usize(2..50_000)].into(),
                    range_end: "e".into(),
                    start_revision: random.i64(0..3),
                    prev_kv: true,
                    ..WatchCreateRequest::default()
                };
                let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
                raw.open("/etcdserverpb.Watch/Watch", &[request.encode_to_vec()]).await?;
            }
            6 => {
                // Watchers of everything that is written from now on, and requests behind them that nobody looks at.
                let create = WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
                let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }.encode_to_vec();
                raw.open("/etcdserverpb.Watch/Watch", &vec![request; random.usize(1..200)]).await?;
            }
            _ => raw.open("/etcdserverpb.Lease/LeaseKeepAlive", &vec![vec![8, 1]; random.usize(1..1000)]).await?,
        }
    }
    Ok(raw)
}

/// The same over HTTP/1: JSON answers that nobody reads, bodies of many values, heads that never end.
async fn hold_http1(endpoint: &str, random: &mut fastrand::Rng) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(endpoint).await?;
    let post = |path: &str, body: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let text = match random.u8(..3) {
        0 => post("/v3/kv/range", r#"{"key":"ZC8=","range_end":"ZDA="}"#),
        1 => post("/v3/kv/txn", &format!("{{\"success\":[{}{{}}]}}", "{},".repeat(random.usize(..500_000)))),
        _ => format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}", "X-Y: zzzzzzzzzzzzzzzzzzzzzz\r\n".repeat(20_000)),
    };
    stream.write_all(text.as_bytes()).await?;
    Ok(stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_clients_hold_takes_no_more_than_the_account() {
    let seed = std::env::var("QUORATE_HOLDS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(fastrand::u64(..));
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let cluster = filled().await;
    let endpoint = cluster.endpoint(0);
    let before = cluster.resident_bytes(0);
    cluster.forget_peak(0);
    let (mut held, mut held_http1) = (Vec::new(), Vec::new());
    let mut kv = cluster.kv(0);
    for round in 0..60 {
        let patience = Duration::from_secs(2);
        // Who is not read any more, or cut off, has got as far as it could.
        if let Ok(Ok(raw)) = tokio::time::timeout(patience, hold(&endpoint, &mut random)).await {
            held.push(raw);
        }
        if let Ok(Ok(stream)) = tokio::time::timeout(patience, hold_http1(&endpoint, &mut random)).await {
            held_http1.push(stream);
        }
        // Something to tell the watchers.
        let put = PutRequest { key: "d/x".into(), value: vec![round; 100 << 10].into(), ..PutRequest::default() };
        wait_for("a put", async || kv.put(put.clone()).await.map_err(|e| e.message().to_owned())).await;
    }
    let grown = cluster.peak_resident_bytes(0).saturating_sub(before);
    println!("{} + {} connections hold; {} MiB more at the most", held.len(), held_http1.len(), grown / MIB);
    // What was written here is kept, too.
    let most = RECEIVE_BYTES + ANSWER_BYTES + OTHER_BYTES + 60 * (100 << 10);
    assert!(grown < most, "{} MiB for an account of {}", grown / MIB, (RECEIVE_BYTES + ANSWER_BYTES) / MIB);
    // A client that comes later reads everything, beside all of them.
    let answer = cluster.kv(0).range(everything()).await.unwrap().into_inner();
    assert_eq!(answer.kvs.len(), 4001);
    drop((held, held_http1));
}

/// 16 clients that each read everything, in one message or as JSON, again and again: the member takes a few pieces for each.
#[tokio::test(flavor = "multi_thread")]
async fn many_answers_of_everything_take_little() {
    let cluster = filled().await;
    let before = cluster.resident_bytes(0);
    cluster.forget_peak(0);
    let clients = (0..16).map(|i| {
        let (mut kv, endpoint) = (cluster.kv(0), cluster.endpoint(0));
        async move {
            for _ in 0..3 {
                if i % 2 == 0 {
                    let answer = kv.range(everything()).await.unwrap().into_inner();
                    assert_eq!(answer.kvs.len(), 4000);
                } else {
                    let body = r#"{"key":"ZC8=","range_end":"ZDA="}"#;
                    let (status, text) = http_post(&endpoint, "/v3/kv/range", body).await.unwrap();
                    assert_eq!(status, 200);
                    let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
                    assert_eq!(answer["kvs"].as_array().unwrap().len(), 4000);
                    assert_eq!(answer["count"], "4000");
                }
            }
        }
    });
    futures_util::future::join_all(clients).await;
    let grown = cluster.peak_resident_bytes(0).saturating_sub(before);
    println!("{} MiB more at the most, for 16 answers of {} MiB at a time", grown / MIB, DATA_BYTES / MIB);
    assert!(grown < 48 * MIB, "{} MiB", grown / MIB);
}

/// Large answers of every kind whose clients take no more than a piece: what they would have to be told is overwritten and compacted, and
/// they keep it from being given back. The member gives them up and says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_is_given_up_when_it_keeps_too_much() {
    let cluster = filled().await;
    let endpoint = cluster.endpoint(0);
    let stream = async |range: RangeRequest| {
        let mut kv = cluster.kv(0).max_decoding_message_size(usize::MAX);
        let mut stream = kv.range_stream(range).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("a first piece");
        stream
    };
    let mut streams = vec![
        stream(everything()).await,
        stream(RangeRequest { sort_target: SortTarget::Mod.into(), ..everything() }).await,
    ];
    let mut raw = Raw::connect(&endpoint).await.unwrap();
    raw.ask("/etcdserverpb.KV/Range", &everything().encode_to_vec()).await.unwrap();
    let mut kv = cluster.kv(0);
    let mut overwritten = 0;
    wait_for("the streams to be given up", async || {
        for part in 0..40 {
            let key = format!("d/{part:03}/0000").into();
            let put = PutRequest { key, value: vec![8; 200 << 10].into(), ..PutRequest::default() };
            let revision = kv.put(put).await.unwrap().into_inner().header.unwrap().revision;
            kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
            overwritten += 200 << 10;
        }
        let text = cluster.log_text(0);
        let given_up = text.lines().filter(|line| line.contains("given up")).count();
        if given_up >= 3 { Ok(()) } else { Err(format!("{given_up} after {} MiB", overwritten >> 20)) }
    })
    .await;
    for stream in &mut streams {
        let end = loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a stream went on to its end"),
                Err(status) => break status,
            }
        };
        assert!(end.message().contains("given up"), "{end:?}");
    }
    drop(raw);
}
