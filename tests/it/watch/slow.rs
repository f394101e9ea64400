//! A client that stops reading: what it costs the member, and what it gets later; and one that asks for much beside a watch.
//!
//! `QUORATE_SLOW_READER_SECONDS` says how long it does not read (the suite: a few seconds).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use quorate::pb::etcd::RangeRequest;
use quorate::pb::etcd::kv_client::KvClient;
use tokio_util::sync::CancellationToken;

use super::*;

const READERS: usize = 10;
const VALUE_BYTES: usize = 4 << 10;
/// `watch.stream_bytes_max`, what the transport holds of a stream (half a MiB), and the requests' own buffers.
const STREAM_BYTES_MAX: u64 = (1 << 20) + (1 << 20);
/// Two members' memory differs by so much without any watcher.
const NOISE_BYTES: u64 = 24 << 20;

fn seconds() -> u64 {
    std::env::var("QUORATE_SLOW_READER_SECONDS").map_or(6, |n| n.parse().expect("a number of seconds"))
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stop_reading_cost_their_bound_and_get_everything_later() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    // Two followers with the same data: one has the readers.
    let (with, without) = ((leader + 1) % 3, (leader + 2) % 3);
    let mut readers = Vec::new();
    for _ in 0..READERS {
        // A connection each: a shared one would stop all for one.
        let mut stream = Stream::open(&cluster, with).await;
        stream.create(create("k", "l")).await;
        readers.push(stream);
    }
    let mut quick = Stream::open(&cluster, with).await;
    quick.create(create("k", "l")).await;
    let until = std::time::Instant::now() + Duration::from_secs(seconds());
    let mut worst = std::time::Duration::ZERO;
    let mut kv = cluster.kv(leader);
    let mut count = 0;
    while std::time::Instant::now() < until || count < 3000 {
        let began = std::time::Instant::now();
        kv.put(put_of(&format!("k{count}"), vec![b'x'; VALUE_BYTES])).await.unwrap();
        worst = worst.max(began.elapsed());
        count += 1;
        let response = quick.next().await;
        assert_eq!(response.events.len(), 1, "who reads is not held up");
    }
    let (cost, base) = (cluster.resident_bytes(with), cluster.resident_bytes(without));
    let sent = count as u64 * VALUE_BYTES as u64;
    println!("{count} puts of {VALUE_BYTES} bytes, slowest {worst:?}; resident {cost} with, {base} without readers");
    let bound = READERS as u64 * STREAM_BYTES_MAX + NOISE_BYTES;
    assert!(READERS as u64 * sent > 2 * bound, "too little was written to tell");
    assert!(cost < base + bound, "{READERS} slow readers cost {} bytes, at most {bound}", cost - base);
    for (number, reader) in readers.iter_mut().enumerate() {
        for i in 0..count {
            let response = reader.next().await;
            let kv = response.events[0].kv.as_ref().unwrap();
            assert_eq!((kv.key(), response.events.len()), (format!("k{i}").as_bytes(), 1), "reader {number}");
        }
    }
}

/// etcd #15402: large answers on a client's one connection kept a watch on it silent for minutes.
#[tokio::test(flavor = "multi_thread")]
async fn large_answers_and_large_events_on_a_connection_do_not_starve_a_watch() {
    const LARGE_BYTES: usize = 512 << 10;
    const LATE: Duration = Duration::from_secs(5);
    let cluster = Cluster::start(1).await;
    let mut writer = cluster.kv(0);
    for i in 0..24 {
        writer.put(put_of(&format!("large{i}"), vec![b'x'; LARGE_BYTES])).await.unwrap();
    }
    let shared = cluster.channel(0);
    let stop = CancellationToken::new();
    let answers = Arc::new(AtomicUsize::new(0));
    let mut asking = Vec::new();
    for _ in 0..6 {
        let mut kv = KvClient::new(shared.clone()).max_decoding_message_size(usize::MAX);
        let (stop, answers) = (stop.clone(), answers.clone());
        asking.push(tokio::spawn(async move {
            while !stop.is_cancelled() {
                let all = RangeRequest { key: "large".into(), range_end: "largf".into(), ..Default::default() };
                kv.range(all).await.expect("a large answer");
                answers.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    let mut stream = Stream::try_open(shared, false).await.unwrap();
    stream.create(create("large", "largf")).await;
    let small = stream.create(create("small", "")).await.watch_id;
    let mut worst = Duration::ZERO;
    let (begin, mut events) = (std::time::Instant::now(), 0);
    // Large answers give way to all else, but go on.
    while events < 30 || answers.load(Ordering::Relaxed) < 12 {
        let passed = begin.elapsed();
        assert!(passed < PATIENCE, "{answers:?} large answers beside {events} events after {passed:?}");
        writer.put(put_of(&format!("large{}", events % 24), vec![b'x'; LARGE_BYTES])).await.unwrap();
        writer.put(put_of("small", events.to_string())).await.unwrap();
        let began = std::time::Instant::now();
        while stream.next().await.watch_id != small {}
        worst = worst.max(began.elapsed());
        events += 1;
    }
    let passed = begin.elapsed();
    stop.cancel();
    join_all(asking).await.into_iter().for_each(|ended| ended.unwrap());
    println!(
        "{answers:?} answers of {} MiB and {events} events in {passed:?}; the latest came after {worst:?}",
        (24 * LARGE_BYTES) >> 20
    );
    assert!(worst < LATE, "an event came after {worst:?}");
}
