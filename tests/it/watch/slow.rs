//! A client that stops reading: what it costs the member, and what it gets later.
//!
//! `QUORATE_SLOW_READER_SECONDS` says how long it does not read (the suite: a few seconds).

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
