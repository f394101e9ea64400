//! What watching costs: many watchers on one prefix, some on single keys, and writes elsewhere; against any etcd v3 server.
//!
//! `cargo build --release && cargo run --release --example watch-bench -- --start quorate` starts three members on this machine, and
//! stops them; `--start etcd` does so with the `etcd` on PATH; `--endpoints a:1,b:2` takes servers that run (with `--pids` for their
//! CPU and memory). `--raise` raises the load on the prefix step by step until the p99 bends. Delays are from before a put is sent to
//! when its event is decoded, in one process, so on one clock. Ends with exit code 1 if an event was lost.

#[path = "compare/servers.rs"]
#[allow(dead_code, reason = "what the comparison shares; more than is needed here")]
mod servers;
#[path = "../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use quorate::config::units;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{PutRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use servers::{Kind, Program, Servers, channel, cpu_micros, resident_bytes};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

#[derive(Clone, clap::Parser)]
struct Args {
    /// Start three members of this server: quorate or etcd
    #[arg(long, conflicts_with = "endpoints", required_unless_present = "endpoints")]
    start: Option<String>,
    /// Servers that run already
    #[arg(long, value_delimiter = ',')]
    endpoints: Vec<String>,
    /// Their processes, for CPU and memory
    #[arg(long, value_delimiter = ',')]
    pids: Vec<u32>,
    #[arg(long, default_value_t = 10_000)]
    prefix_watchers: u64,
    #[arg(long, default_value_t = 1_000)]
    key_watchers: u64,
    /// Puts a second under the watched prefix
    #[arg(long, default_value_t = 2.0)]
    prefix_rate: f64,
    /// Puts a second on the single keys, all together
    #[arg(long, default_value_t = 20.0)]
    key_rate: f64,
    /// Puts a second that no watcher sees
    #[arg(long, default_value_t = 2_000.0)]
    other_rate: f64,
    #[arg(long, default_value = "60s", value_parser = units::duration::parse)]
    duration: Duration,
    #[arg(long, default_value_t = 128)]
    value_bytes: usize,
    #[arg(long, default_value_t = 100)]
    watchers_per_stream: u64,
    #[arg(long, default_value_t = 10)]
    streams_per_connection: u64,
    /// Decides which keys are written
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Raise the prefix's rate by half each `duration`, until the p99 is four times the first one and above 50 ms, or the rate is missed by a tenth
    #[arg(long)]
    raise: bool,
}

/// Connections that write to other keys.
const OTHER_WRITERS: u64 = 16;
/// Keys that they write to.
const OTHER_KEYS: u64 = 100_000;
/// Time in which the last events must arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of the time in a value.
const STAMP_BYTES: usize = 8;

/// Counts by powers of 2^(1/16) of a microsecond: within 5 %.
struct Histogram(Vec<AtomicU64>);

impl Histogram {
    fn new() -> Self {
        Self((0..512).map(|_| AtomicU64::new(0)).collect())
    }

    fn record(&self, took: Duration) {
        let micros = took.as_secs_f64() * 1e6;
        let bucket = (micros.max(1.0).log2() * 16.0) as usize;
        self.0[bucket.min(self.0.len() - 1)].fetch_add(1, Ordering::Relaxed);
    }

    fn quantile(&self, part: f64) -> Duration {
        let counts: Vec<u64> = self.0.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let wanted = (counts.iter().sum::<u64>() as f64 * part).ceil() as u64;
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Duration::from_secs_f64(2_f64.powf((bucket.unwrap_or(0) + 1) as f64 / 16.0) / 1e6)
    }
}

/// What the tasks count.
struct Counts {
    begin: Instant,
    delays: Histogram,
    puts: Histogram,
    /// Events that must arrive: of each put, one for each of its watchers.
    expected: AtomicU64,
    arrived: AtomicU64,
    other_puts: AtomicU64,
    failed_puts: AtomicU64,
    ended_streams: AtomicU64,
    /// Events that came twice or out of order.
    disordered: AtomicU64,
    stop: AtomicBool,
}

impl Counts {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            begin: Instant::now(),
            delays: Histogram::new(),
            puts: Histogram::new(),
            expected: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            other_puts: AtomicU64::new(0),
            failed_puts: AtomicU64::new(0),
            ended_streams: AtomicU64::new(0),
            disordered: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }
}

impl Counts {
    /// Forgets the last step; all its events have arrived.
    fn reset(&self) {
        let histograms = self.delays.0.iter().chain(&self.puts.0);
        let counts = [&self.expected, &self.arrived, &self.other_puts, &self.failed_puts, &self.ended_streams];
        histograms.chain(counts).for_each(|count| count.store(0, Ordering::Relaxed));
        self.stop.store(false, Ordering::Relaxed);
    }
}

/// Members that this program has started, if any, and the endpoints and processes of those that are loaded.
async fn servers(args: &Args) -> anyhow::Result<(Option<Servers>, Vec<String>, Vec<u32>)> {
    let (path, kind) = match args.start.as_deref() {
        None => return Ok((None, args.endpoints.clone(), args.pids.clone())),
        Some("quorate") => (support::cluster::binary(), Kind::Quorate),
        Some("etcd") => ("etcd".into(), Kind::Etcd),
        Some(other) => bail!("--start {other}: expected quorate or etcd"),
    };
    let program = Program { name: args.start.clone().unwrap_or_default(), path, kind };
    let servers = Servers::start(&program, 3, &std::env::temp_dir()).await?;
    let (endpoints, pids) = (servers.endpoints(), servers.pids());
    Ok((Some(servers), endpoints, pids))
}

/// The key that watcher `number` watches, and the end of its interval.
fn watched(args: &Args, number: u64) -> (String, String) {
    if number < args.prefix_watchers {
        ("watched/".into(), "watched0".into())
    } else {
        (format!("single/{}", number - args.prefix_watchers), String::new())
    }
}

/// Opens a stream with watchers `numbers`, and returns when all were created.
async fn watch(channel: Channel, args: Args, numbers: std::ops::Range<u64>, counts: Arc<Counts>) -> anyhow::Result<()> {
    let (requests, outgoing) = tokio::sync::mpsc::channel(16);
    let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
    let create = |number| {
        let (key, range_end) = watched(&args, number);
        let create = WatchCreateRequest { key: key.into(), range_end: range_end.into(), ..Default::default() };
        WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
    };
    requests.send(create(numbers.start)).await?;
    let mut responses = client.watch(ReceiverStream::new(outgoing)).await?.into_inner();
    let mut created = 0;
    for number in numbers.clone() {
        if number > numbers.start {
            requests.send(create(number)).await?;
        }
        let answer = responses.message().await?.context("the stream ended")?;
        ensure!(answer.created && !answer.canceled, "not created: {}", answer.cancel_reason);
        created += 1;
    }
    let mut last = vec![0; created];
    tokio::spawn(async move {
        // Held, or the server would see the end of the requests.
        let _requests = requests;
        while let Ok(Some(response)) = responses.message().await {
            take(&response, &mut last, &counts);
        }
        counts.ended_streams.fetch_add(u64::from(!counts.stop.load(Ordering::Relaxed)), Ordering::Relaxed);
    });
    Ok(())
}

fn take(response: &WatchResponse, last: &mut [i64], counts: &Counts) {
    let now = counts.begin.elapsed();
    for event in &response.events {
        let Some(kv) = &event.kv else { continue };
        let last = &mut last[response.watch_id as usize];
        if kv.mod_revision() <= *last {
            counts.disordered.fetch_add(1, Ordering::Relaxed);
        }
        *last = kv.mod_revision();
        if let Some(stamp) = kv.value().first_chunk::<STAMP_BYTES>() {
            counts.delays.record(now.saturating_sub(Duration::from_nanos(u64::from_le_bytes(*stamp))));
        }
        counts.arrived.fetch_add(1, Ordering::Relaxed);
    }
}

/// Puts at a rate until told to stop; each put concerns `watchers` watchers.
async fn write(
    mut kv: KvClient<Channel>,
    mut key: impl FnMut() -> String + Send,
    rate: f64,
    value_bytes: usize,
    watchers: u64,
    counts: Arc<Counts>,
) {
    if rate <= 0.0 {
        return;
    }
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    while !counts.stop.load(Ordering::Relaxed) {
        tick.tick().await;
        let began = counts.begin.elapsed();
        let mut value = (began.as_nanos() as u64).to_le_bytes().to_vec();
        value.resize(value_bytes.max(STAMP_BYTES), b'x');
        match kv.put(PutRequest { key: key().into(), value: value.into(), ..Default::default() }).await {
            Ok(_) => {
                counts.puts.record(counts.begin.elapsed() - began);
                counts.expected.fetch_add(watchers, Ordering::Relaxed);
                counts.other_puts.fetch_add(u64::from(watchers == 0), Ordering::Relaxed);
            }
            Err(_) => drop(counts.failed_puts.fetch_add(1, Ordering::Relaxed)),
        }
    }
}

/// What one step of the load showed.
struct Step {
    p99: Duration,
    lost: i64,
    /// Events a second that arrived.
    rate: f64,
}

/// Puts for `args.duration`, waits for the last event, and prints what was seen.
async fn step(
    args: &Args,
    endpoints: &[String],
    pids: &[u32],
    prefix_rate: f64,
    counts: &Arc<Counts>,
) -> anyhow::Result<Step> {
    let cpu_seconds = || pids.iter().map(|pid| cpu_micros(*pid)).sum::<f64>() / 1e6;
    let cpu = cpu_seconds();
    let began = Instant::now();
    let mut random = fastrand::Rng::with_seed(args.seed);
    let mut writers = Vec::new();
    let kv = |n: u64| anyhow::Ok(KvClient::new(channel(&endpoints[n as usize % endpoints.len()])?));
    let bytes = args.value_bytes;
    let mut number = 0;
    let prefix = move || {
        number += 1;
        format!("watched/{}", number % 1000)
    };
    writers.push(tokio::spawn(write(kv(0)?, prefix, prefix_rate, bytes, args.prefix_watchers, counts.clone())));
    let (mut keys, singles) = (random.fork(), args.key_watchers.max(1));
    let single = move || format!("single/{}", keys.u64(..singles));
    let key_rate = if args.key_watchers > 0 { args.key_rate } else { 0.0 };
    writers.push(tokio::spawn(write(kv(1)?, single, key_rate, bytes, 1, counts.clone())));
    for n in 0..OTHER_WRITERS {
        let mut keys = random.fork();
        let other = move || format!("other/{}", keys.u64(..OTHER_KEYS));
        let rate = args.other_rate / OTHER_WRITERS as f64;
        writers.push(tokio::spawn(write(kv(n)?, other, rate, bytes, 0, counts.clone())));
    }
    tokio::time::sleep(args.duration).await;
    counts.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await?;
    }
    let took = began.elapsed();
    let (expected, deadline) = (counts.expected.load(Ordering::Relaxed), Instant::now() + PATIENCE);
    while counts.arrived.load(Ordering::Relaxed) < expected && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let arrived = counts.arrived.load(Ordering::Relaxed);
    let lost = expected as i64 - arrived as i64;
    let p99 = counts.delays.quantile(0.99);
    println!(
        "prefix {prefix_rate:>7.1} puts/s | {:>9.0} deliveries/s, lost {lost}, disordered {} | delay p50 {:>9.2?} p99 {p99:>9.2?} \
         max {:>9.2?} | {:>6.0} other puts/s, put p99 {:>8.2?}, failed {} | server CPU {:>5.1} %, streams ended {}",
        arrived as f64 / took.as_secs_f64(),
        counts.disordered.load(Ordering::Relaxed),
        counts.delays.quantile(0.5),
        counts.delays.quantile(1.0),
        counts.other_puts.load(Ordering::Relaxed) as f64 / took.as_secs_f64(),
        counts.puts.quantile(0.99),
        counts.failed_puts.load(Ordering::Relaxed),
        (cpu_seconds() - cpu) / took.as_secs_f64() * 100.0,
        counts.ended_streams.load(Ordering::Relaxed),
    );
    Ok(Step { p99, lost, rate: arrived as f64 / took.as_secs_f64() })
}

/// Opens all watchers; returns how many.
async fn open_watchers(args: &Args, endpoints: &[String], counts: &Arc<Counts>) -> anyhow::Result<u64> {
    let all = args.prefix_watchers + args.key_watchers;
    let per_stream = args.watchers_per_stream.max(1);
    let mut shared = None;
    for (stream, first) in (0..).zip((0..all).step_by(per_stream as usize)) {
        if stream % args.streams_per_connection.max(1) == 0 {
            let connection = stream / args.streams_per_connection.max(1);
            shared = Some(channel(&endpoints[connection as usize % endpoints.len()])?);
        }
        let connection = shared.clone().context("a connection")?;
        watch(connection, args.clone(), first..all.min(first + per_stream), counts.clone()).await?;
    }
    Ok(all)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (servers, endpoints, pids) = servers(&args).await?;
    let name = args.start.clone().unwrap_or_else(|| endpoints.join(","));
    println!("{name}, seed {}, {} bytes a value", args.seed, args.value_bytes);
    let counts = Counts::new();
    let resident = || pids.iter().map(|pid| resident_bytes(*pid)).sum::<f64>();
    let before = resident();
    let watchers = open_watchers(&args, &endpoints, &counts).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let streams = watchers.div_ceil(args.watchers_per_stream.max(1));
    let each = (resident() - before) / watchers as f64;
    println!("{watchers} watchers on {streams} streams, {each:.0} bytes resident each, transport included");
    let (mut rate, mut first) = (args.prefix_rate, None);
    loop {
        let step = step(&args, &endpoints, &pids, rate, &counts).await?;
        ensure!(step.lost == 0, "{} events were lost", step.lost);
        ensure!(counts.disordered.load(Ordering::Relaxed) == 0, "events came twice or out of order");
        let base = *first.get_or_insert(step.p99);
        if !args.raise {
            break;
        }
        // The writer waits for its answers, so beyond what the servers can do the rate bends before the delay does.
        let behind = step.rate < 0.9 * rate * args.prefix_watchers as f64;
        if behind || (step.p99 > 4 * base && step.p99 > Duration::from_millis(50)) {
            let what = if behind { "rate" } else { "p99" };
            println!("the {what} bends at {rate:.1} puts/s on {} watchers", args.prefix_watchers);
            break;
        }
        rate *= 1.5;
        counts.reset();
    }
    drop(servers);
    Ok(())
}
