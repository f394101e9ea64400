//! Real input under fire: puts every stanza of the machine's Debian package lists into a three-pod cluster while random pods
//! are killed, then reads all of it back from every pod, and once more after all pods were killed at once.
//!
//! `cargo build --release && cargo run --release --example import-debian` (on Debian, after `apt-get update`). `--input FILE`
//! takes stanzas from a file in the form of `apt-cache dumpavail`; `--limit N` takes the first N. Ends with exit code 1, and
//! says what, if anything acknowledged is missing or differs. A stanza larger than a request may be is counted and left out;
//! Debian has none.

#[path = "../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::Parser as _;
use quorate::config::units;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use support::cluster::Cluster;
use tonic::transport::Channel;
use tonic::{Code, Status};

#[derive(clap::Parser)]
struct Args {
    /// Stanzas to import, instead of `apt-cache dumpavail`
    #[arg(long)]
    input: Option<PathBuf>,
    /// Import only the first N stanzas
    #[arg(long, default_value_t = usize::MAX)]
    limit: usize,
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Kill a random pod with SIGKILL this often, as long as something is acknowledged between two kills
    #[arg(long, default_value = "2s", value_parser = units::duration::parse)]
    kill_every: Duration,
    /// Decides which pod is killed when
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Key and value of each stanza.
type Stanzas = Arc<Vec<(Bytes, Bytes)>>;

/// Counts of the import under way.
#[derive(Default)]
struct Progress {
    next: AtomicUsize,
    /// Attempts that failed, and those of them that may have been carried out all the same.
    retries: AtomicUsize,
    ambiguous: AtomicUsize,
    too_large: AtomicUsize,
    /// Milliseconds since the start: the last acknowledgement, and the longest time between two.
    last_ms: AtomicU64,
    gap_ms: AtomicU64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let stanzas: Stanzas = Arc::new(read(&args)?);
    let bytes: usize = stanzas.iter().map(|(key, value)| key.len() + value.len()).sum();
    println!("stanzas: {}, bytes: {bytes}, seed: {}", stanzas.len(), args.seed);
    let mut cluster = Cluster::start(3).await;
    let stanzas: Stanzas = Arc::new(import(&args, &mut cluster, &stanzas).await?);
    cluster.wait_formed().await;
    let resident: Vec<String> = (0..3).map(|slot| format!("{} MiB", cluster.resident_bytes(slot) >> 20)).collect();
    println!("resident: {}", resident.join(", "));
    verify(&cluster, &stanzas, args.clients).await.context("after the import")?;
    cluster.kill_all();
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    println!("killed all three at once and started them again");
    verify(&cluster, &stanzas, args.clients).await.context("after the death of all")?;
    println!("nothing acknowledged was lost");
    Ok(())
}

fn read(args: &Args) -> anyhow::Result<Vec<(Bytes, Bytes)>> {
    let text = match &args.input {
        Some(path) => std::fs::read(path).with_context(|| format!("{}", path.display()))?,
        None => {
            let output = std::process::Command::new("apt-cache").arg("dumpavail").output();
            output.context("`apt-cache dumpavail`: is this Debian? Else give --input FILE")?.stdout
        }
    };
    let text = String::from_utf8_lossy(&text);
    let mut stanzas = std::collections::BTreeMap::new();
    for stanza in text.split("\n\n").filter(|stanza| !stanza.trim().is_empty()).take(args.limit) {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (Some(package), Some(version)) = (field("Package:"), field("Version:")) else {
            bail!("a stanza without Package and Version: {:?}", stanza.chars().take(80).collect::<String>());
        };
        let key = Bytes::from(format!("debian/{package}/{version}"));
        stanzas.insert(key, Bytes::from(stanza.trim().to_owned()));
    }
    ensure!(!stanzas.is_empty(), "no stanzas; run `apt-get update` first, or give --input FILE");
    Ok(stanzas.into_iter().collect())
}

/// Puts everything through all three pods while a random one dies again and again. Returns what was acknowledged.
async fn import(args: &Args, cluster: &mut Cluster, stanzas: &Stanzas) -> anyhow::Result<Vec<(Bytes, Bytes)>> {
    let progress = Arc::new(Progress::default());
    let start = Instant::now();
    let writers: Vec<_> = (0..args.clients)
        .map(|i| {
            let clients: Vec<KvClient<Channel>> = (0..3).map(|slot| cluster.kv((slot + i as u64) % 3)).collect();
            tokio::spawn(write(clients, stanzas.clone(), progress.clone(), start))
        })
        .collect();
    let mut state = args.seed | 1;
    let (mut kills, mut killed_ms) = (0, 0);
    let mut next_kill = tokio::time::Instant::now() + args.kill_every;
    while writers.iter().any(|writer| !writer.is_finished()) {
        let done = async {
            while writers.iter().any(|writer| !writer.is_finished()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout_at(next_kill, done).await.is_ok() {
            break;
        }
        next_kill = tokio::time::Instant::now() + args.kill_every;
        // On a machine where a start takes longer than that, nothing would ever be acknowledged.
        if kills > 0 && progress.last_ms.load(Ordering::Relaxed) <= killed_ms {
            continue;
        }
        // xorshift64: enough to choose one of three.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let victim = state % 3;
        cluster.kill(victim);
        cluster.start_pod(victim);
        kills += 1;
        killed_ms = start.elapsed().as_millis() as u64;
    }
    let mut acknowledged = Vec::with_capacity(stanzas.len());
    for writer in writers {
        acknowledged.extend(writer.await?);
    }
    let seconds = start.elapsed().as_secs_f64();
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    println!(
        "acknowledged: {}, too large: {}, kills: {kills}, retries: {} ({} of unknown fate), seconds: {seconds:.1}, \
         puts/s: {:.0}, longest gap: {} ms",
        acknowledged.len(),
        count(&progress.too_large),
        count(&progress.retries),
        count(&progress.ambiguous),
        acknowledged.len() as f64 / seconds,
        progress.gap_ms.load(Ordering::Relaxed),
    );
    Ok(acknowledged)
}

/// One client: takes the next stanza and puts it, at the next pod after an error, until it is acknowledged. The put is the same
/// each time, so one whose fate is unknown may be repeated.
async fn write(
    mut clients: Vec<KvClient<Channel>>,
    stanzas: Stanzas,
    progress: Arc<Progress>,
    start: Instant,
) -> Vec<(Bytes, Bytes)> {
    let mut acknowledged = Vec::new();
    while let Some((key, value)) = stanzas.get(progress.next.fetch_add(1, Ordering::Relaxed)) {
        let is_taken = loop {
            let put = PutRequest { key: key.clone(), value: value.clone(), ..PutRequest::default() };
            let Err(status) = clients[0].put(put).await else { break true };
            // The limit of requests, or that of messages.
            if status.code() == Code::InvalidArgument || status.message().contains("received message larger than max") {
                break false;
            }
            progress.retries.fetch_add(1, Ordering::Relaxed);
            if !is_certainly_not_done(&status) {
                progress.ambiguous.fetch_add(1, Ordering::Relaxed);
            }
            clients.rotate_left(1);
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        if !is_taken {
            progress.too_large.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        acknowledged.push((key.clone(), value.clone()));
        let now = start.elapsed().as_millis() as u64;
        let before = progress.last_ms.fetch_max(now, Ordering::Relaxed);
        progress.gap_ms.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
    }
    acknowledged
}

/// The request did not reach a member, or one that could not propose it.
fn is_certainly_not_done(status: &Status) -> bool {
    let text = status.message();
    text == "etcdserver: no leader" || text == "etcdserver: too many requests" || text.contains("tcp connect error")
}

/// Every stanza, read linearizably from each pod, is what was put; and the pods hash to the same.
async fn verify(cluster: &Cluster, stanzas: &Stanzas, clients: usize) -> anyhow::Result<()> {
    for slot in 0..3 {
        let next = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> =
            (0..clients).map(|_| tokio::spawn(read_back(cluster.kv(slot), stanzas.clone(), next.clone()))).collect();
        for reader in readers {
            reader.await?.with_context(|| format!("kv-{slot}"))?;
        }
    }
    let revision = cluster.status(0).await?.header.context("a header")?.revision;
    let mut hashes = Vec::new();
    for slot in 0..3 {
        hashes.push(cluster.hash_kv(slot, revision).await?.hash);
    }
    ensure!(hashes.iter().all(|hash| *hash == hashes[0]), "HashKV at revision {revision} differs: {hashes:x?}");
    println!("verified: {} keys from each of 3 pods, HashKV {:08x} at revision {revision}", stanzas.len(), hashes[0]);
    Ok(())
}

async fn read_back(mut kv: KvClient<Channel>, stanzas: Stanzas, next: Arc<AtomicUsize>) -> anyhow::Result<()> {
    while let Some((key, value)) = stanzas.get(next.fetch_add(1, Ordering::Relaxed)) {
        let answer = kv.range(RangeRequest { key: key.clone(), ..RangeRequest::default() }).await?.into_inner();
        let found = answer.kvs.first().map(|kv| kv.value());
        ensure!(
            found == Some(&value[..]),
            "{} was acknowledged, but is {}",
            String::from_utf8_lossy(key),
            match found {
                Some(_) => "another value",
                None => "not there",
            }
        );
    }
    Ok(())
}
