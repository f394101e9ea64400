//! A cluster with far more clients than it can serve: 10,000 that are connected and idle, and ten times more writers than there are
//! places in a member's queue, all at one member.
//!
//! `cargo build --release && cargo run --release --example overload`. Prints, for the time before, with the idle ones, and under load:
//! the members' memory, the rate of acknowledged writes, how many requests were refused with which words, and how long one good
//! client's put and read took. Ends with exit code 1 if a request failed in a way that is not documented, an idle client was cut off,
//! or the members' data differ at the end. `tests/it/overload.rs` has those who mean it ill.

#[path = "../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use quorate::config::units;
use quorate::env::process::raise_open_files_max;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use support::cluster::Cluster;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

#[derive(clap::Parser)]
struct Args {
    /// Clients that have asked once, and stay connected
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Requests that a member lets wait to be proposed
    #[arg(long, default_value_t = 500)]
    places: usize,
    /// Clients that write without a pause; ten times the places if it is not set
    #[arg(long)]
    writers: Option<usize>,
    #[arg(long, default_value_t = 100)]
    writers_per_connection: usize,
    #[arg(long, default_value_t = 512)]
    value_bytes: usize,
    /// How long each part is measured
    #[arg(long, default_value = "60s", value_parser = units::duration::parse)]
    duration: Duration,
}

/// A refused writer waits so long before it asks again, as client libraries do.
const BACKOFF: Duration = Duration::from_millis(50);
/// What may be said to a client of a server that has too many.
const DOCUMENTED: [&str; 2] = ["etcdserver: too many requests", "etcdserver: request timed out"];
/// Connections that are made at once.
const DIALS: usize = 64;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let writers = args.writers.unwrap_or(10 * args.places);
    if let Some(files) = raise_open_files_max() {
        ensure!(files as usize > args.idle + 1000, "at most {files} open files: raise the limit, or give --idle less");
    }
    let mut cluster = Cluster::new(3);
    cluster.set("raft.queue_requests_max", &args.places.to_string());
    let leader = cluster.start_all().await;
    println!("idle clients: {}, places: {}, writers: {writers}, all at the leader", args.idle, args.places);

    measure(&cluster, leader, "nobody else", args.duration / 4).await?;
    let idle = connect(&cluster, leader, args.idle).await?;
    measure(&cluster, leader, "idle clients", args.duration / 4).await?;
    let load = Load::start(&cluster, leader, writers, &args);
    measure(&cluster, leader, "idle clients and load", args.duration).await?;
    let tally = load.stop().await;
    measure(&cluster, leader, "load is over", args.duration / 4).await?;

    let seconds = args.duration.as_secs_f64();
    println!("writes: {} acknowledged, {:.0} a second", tally.acknowledged, tally.acknowledged as f64 / seconds);
    for (text, count) in &tally.errors {
        println!("{count:>10}  {text}");
    }
    let unknown: Vec<_> = tally.errors.keys().filter(|text| !DOCUMENTED.contains(&text.as_str())).collect();
    ensure!(unknown.is_empty(), "not documented: {unknown:?}");
    ask_all(&idle).await.context("an idle client was cut off")?;
    println!("each of the {} idle clients is served", idle.len());
    println!("equal hashes: {:08x}", cluster.wait_same_hash(0..3).await);
    Ok(())
}

/// Clients with a connection each, that have asked once.
async fn connect(cluster: &Cluster, slot: u64, count: usize) -> anyhow::Result<Vec<KvClient<Channel>>> {
    let (before, begun) = (cluster.resident_bytes(slot), Instant::now());
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.endpoint(slot)))?;
    let dials = (0..count).map(|_| {
        let endpoint = endpoint.clone();
        async move { Ok::<_, anyhow::Error>(KvClient::new(endpoint.connect().await?)) }
    });
    let clients: Vec<_> = stream::iter(dials).buffer_unordered(DIALS).try_collect().await?;
    ask_all(&clients).await?;
    let grown = cluster.resident_bytes(slot).saturating_sub(before);
    println!(
        "{count} clients connected and asked in {:.1?}: {:.1} KiB each at the server",
        begun.elapsed(),
        grown as f64 / 1024.0 / count.max(1) as f64
    );
    Ok(clients)
}

async fn ask_all(clients: &[KvClient<Channel>]) -> anyhow::Result<()> {
    let asks = clients.iter().cloned().map(|mut kv| async move {
        let read = RangeRequest { key: "good".into(), serializable: true, ..RangeRequest::default() };
        kv.range(read).await.map(drop)
    });
    stream::iter(asks).buffer_unordered(DIALS).try_collect::<()>().await?;
    Ok(())
}

/// How long a good client's puts and reads take at a member, refusals and waits included, and the most memory that each member
/// takes, for so long.
async fn measure(cluster: &Cluster, slot: u64, what: &str, duration: Duration) -> anyhow::Result<()> {
    (0..3).for_each(|slot| cluster.forget_peak(slot));
    let (mut kv, mut reader, begun) = (cluster.kv(slot), cluster.kv(slot), Instant::now());
    let (mut puts, mut reads, mut refused) = (Vec::new(), Vec::new(), BTreeMap::new());
    for i in 0_u64.. {
        if begun.elapsed() >= duration {
            break;
        }
        let value = bytes::Bytes::from(i.to_string());
        let put = PutRequest { key: "good".into(), value: value.clone(), ..PutRequest::default() };
        served(&mut puts, &mut refused, async || kv.put(put.clone()).await).await;
        let read = RangeRequest { key: "good".into(), ..RangeRequest::default() };
        let found = served(&mut reads, &mut refused, async || reader.range(read.clone()).await).await.into_inner();
        ensure!(found.kvs[0].value() == &value[..], "a stale read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let peaks: Vec<String> = (0..3).map(|slot| format!("{}", cluster.peak_resident_bytes(slot) >> 20)).collect();
    println!(
        "{what}: good client {} rounds, puts {}, reads {}, refused {refused:?}; memory {} MiB",
        puts.len(),
        times(&mut puts),
        times(&mut reads),
        peaks.join(", ")
    );
    Ok(())
}

/// Asks until it is served; notes how long that took, and how it was refused.
async fn served<T>(
    times: &mut Vec<Duration>,
    refused: &mut BTreeMap<String, u64>,
    mut ask: impl AsyncFnMut() -> Result<T, Status>,
) -> T {
    let asked = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => {
                times.push(asked.elapsed());
                return answer;
            }
            Err(status) => {
                *refused.entry(status.message().to_owned()).or_default() += 1;
                tokio::time::sleep(BACKOFF).await;
            }
        }
    }
}

fn times(of: &mut [Duration]) -> String {
    of.sort();
    let at = |percent: usize| of[(of.len() - 1) * percent / 100];
    format!("median {:.1?}, p99 {:.1?}, most {:.1?}", at(50), at(99), at(100))
}

#[derive(Default)]
struct Tally {
    acknowledged: u64,
    errors: BTreeMap<String, u64>,
}

struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    errors: Arc<Mutex<BTreeMap<String, u64>>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(cluster: &Cluster, slot: u64, writers: usize, args: &Args) -> Self {
        let (stop, acknowledged) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let errors = Arc::<Mutex<BTreeMap<String, u64>>>::default();
        let channels: Vec<_> = (0..writers.div_ceil(args.writers_per_connection)).map(|_| cluster.kv(slot)).collect();
        let value = bytes::Bytes::from(vec![b'x'; args.value_bytes]);
        let tasks = (0..writers).map(|writer| {
            let mut kv = channels[writer % channels.len()].clone();
            let (stop, acknowledged, errors) = (stop.clone(), acknowledged.clone(), errors.clone());
            let (key, value) = (format!("load/{writer}"), value.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let put = PutRequest { key: key.clone().into(), value: value.clone(), ..PutRequest::default() };
                    match kv.put(put).await {
                        Ok(_) => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
                        Err(status) => {
                            *errors.lock().entry(status.message().to_owned()).or_default() += 1;
                            tokio::time::sleep(BACKOFF).await;
                        }
                    }
                }
            })
        });
        let tasks = tasks.collect();
        Self { stop, acknowledged, errors, tasks }
    }

    async fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a writer only counts");
        }
        Tally {
            acknowledged: self.acknowledged.load(Ordering::Relaxed),
            errors: std::mem::take(&mut self.errors.lock()),
        }
    }
}
