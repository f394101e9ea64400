//! What an fsynced entry of the Raft log costs: entries a second and CPU an entry, a flush a batch.
//!
//! `cargo run --release --example log-bench [DIRECTORY]`; the directory decides which disk is measured (default: here).

use bytes::Bytes;
use quorate::env::{Env, Instant};
use quorate::pb::log::LogId;
use quorate::storage::log::{Log, Options, Owner, Record};
use rustix::time::{ClockId, clock_gettime};

const ENTRY_BYTES: usize = 256;

fn cpu_micros() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

async fn append(log: &Log, records: Vec<Record>) -> anyhow::Result<()> {
    let (done, flushed) = tokio::sync::oneshot::channel();
    log.append(records, move |result| drop(done.send(result)))?;
    Ok(flushed.await??)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let home = tempfile::tempdir_in(directory)?;
    let owner = Owner { cluster_id: 1, member_id: 1 };
    let log = Log::create(&Env::real(), &home.path().join("log"), owner, Options::default())?;
    let payload = Bytes::from(vec![7; ENTRY_BYTES]);
    let mut index = 0;
    for (batch, rounds) in [(1, 10_000), (16, 10_000), (128, 4_000)] {
        let (start, cpu) = (Instant::now(), cpu_micros());
        for _ in 0..rounds {
            let entry = |index| Record { log_id: LogId { term: 1, index }, kind: 0, payload: payload.clone() };
            append(&log, (index..index + batch).map(entry).collect()).await?;
            index += batch;
        }
        let entries = (rounds * batch) as f64;
        let (cpu, rate) = ((cpu_micros() - cpu) / entries, entries / start.elapsed().as_secs_f64());
        let fsync = log.fsync_stats();
        println!(
            "batch {batch:>3}: {rate:>9.0} entries/s, {cpu:>5.2} us CPU an entry, fsync p99 {:?}",
            fsync.recent_p99
        );
    }
    log.close().await;
    Ok(())
}
