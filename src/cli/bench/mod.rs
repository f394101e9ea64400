//! `bench` and `check perf`: a load of puts or reads, what it took, and whether that is enough.
//!
//! Invariants: keys are written below one prefix, which must be empty before, and are deleted at the end, also after Ctrl-C; both unless
//! `--keep` says otherwise. Absent: any claim about a load that is not this one.

mod load;

use std::time::Duration;

use anyhow::{bail, ensure};
use bytes::Bytes;
use serde_json::{Value, json};

use self::load::{End, Outcome, Shape};
use super::client::{ANSWER_BYTES_MAX, ClientArgs};
use super::kv::{connect, prefix_end};
use super::output::{Format, json_line, table};
use super::progress::{Progress, Unit};
use super::{print, verdict};
use crate::cli::credentials::Channel;
use crate::config::units::duration;
use crate::env::Env;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::{DeleteRangeRequest, PutRequest, RangeRequest};

#[derive(Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Puts, each of its own key of --keys ones in turn
    Put(BenchArgs),
    /// Reads of single keys, which are written before
    Get(GetArgs),
}

#[derive(Debug, clap::Subcommand)]
pub enum CheckCommand {
    /// Puts at a fixed rate for a minute: PASS if the cluster keeps up; the exit code is the verdict
    Perf(PerfArgs),
}

#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Requests under way at once
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    clients: u32,
    /// Connections that they share, in turn to each endpoint
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    connections: u32,
    /// End after so many requests
    #[arg(long, conflicts_with = "duration")]
    total: Option<u64>,
    /// End after so long [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    duration: Option<Duration>,
    /// Requests a second at most [default: as many as the cluster answers]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Different keys
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    keys: u64,
    /// Bytes of each value
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// What the keys begin with; there must be none so far
    #[arg(long, default_value = "quorate-bench/")]
    prefix: String,
    /// Leave the keys there, and do not mind such that are there already
    #[arg(long)]
    keep: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct GetArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Take the answer of the member that is asked; it may be behind
    #[arg(long)]
    serializable: bool,
}

#[derive(Debug, clap::Args)]
pub struct PerfArgs {
    /// s: 150 puts a second of 50 clients; m: 1000 of 200; l: 8000 of 500; xl: 15000 of 1000
    #[arg(long, value_enum, default_value_t = Size::S)]
    load: Size,
    /// How long
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration::parse)]
    duration: Duration,
    /// What the keys begin with; there must be none so far
    #[arg(long, default_value = "quorate-check-perf/")]
    prefix: String,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// As etcd's own client has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Size {
    S,
    M,
    L,
    Xl,
}

impl Size {
    /// Puts a second, and clients.
    fn load(self) -> (u32, u32) {
        match self {
            Self::S => (150, 50),
            Self::M => (1000, 200),
            Self::L => (8000, 500),
            Self::Xl => (15_000, 1000),
        }
    }
}

/// Of etcd's own client, too: below this part of the rate, above this time of a single put or of their deviation it is a FAIL.
const LEAST_OF_RATE: f64 = 0.9;
const SLOWEST: Duration = Duration::from_millis(500);
const DEVIATION: Duration = Duration::from_millis(100);

pub async fn bench(command: BenchCommand) -> anyhow::Result<()> {
    let (args, reads) = match command {
        BenchCommand::Put(args) => (args, None),
        BenchCommand::Get(args) => (args.bench, Some(args.serializable)),
    };
    let outcome = args.measure(reads).await?;
    print(&match args.output {
        Format::Simple => outcome_text(&outcome),
        Format::Json => json_line(&outcome_json(&outcome)),
    })?;
    ensure!(!outcome.latencies.is_empty(), "no request was answered; see `quorate status`");
    Ok(())
}

pub async fn check(command: CheckCommand) -> anyhow::Result<()> {
    let CheckCommand::Perf(args) = command;
    let (rate, clients) = args.load.load();
    let bench = BenchArgs {
        clients,
        connections: clients.min(10),
        total: None,
        duration: Some(args.duration),
        rate: Some(rate),
        keys: 10_000,
        value_bytes: 1024,
        prefix: args.prefix,
        keep: false,
        output: args.output,
        client: args.client,
    };
    let outcome = bench.measure(None).await?;
    let faults = judge(&outcome, rate, args.duration);
    let result = if faults.is_empty() { "PASS" } else { "FAIL" };
    let out = match args.output {
        Format::Simple => [outcome_text(&outcome), format!("{result}\n").into_bytes()].concat(),
        Format::Json => {
            let mut object = outcome_json(&outcome);
            object["result"] = result.into();
            object["faults"] = faults.clone().into();
            json_line(&object)
        }
    };
    verdict(&out, (!faults.is_empty()).then(|| faults.join("; ")))
}

/// What is not good enough.
fn judge(outcome: &Outcome, rate: u32, duration: Duration) -> Vec<String> {
    let mut faults = Vec::new();
    let reached = outcome.latencies.len() as f64 / duration.as_secs_f64().max(outcome.took.as_secs_f64());
    if reached < LEAST_OF_RATE * f64::from(rate) {
        faults.push(format!("{reached:.0} puts a second were answered, and {rate} were wanted"));
    }
    let slowest = Duration::from_micros(outcome.latencies.max());
    if slowest > SLOWEST {
        faults.push(format!("the slowest put took {}, and {} is the most", shown(slowest), shown(SLOWEST)));
    }
    let deviation = Duration::from_micros(outcome.latencies.stdev() as u64);
    if deviation > DEVIATION {
        faults.push(format!("puts deviate by {}, and {} is the most", shown(deviation), shown(DEVIATION)));
    }
    if outcome.errors > 0 {
        faults.push(format!("{} puts failed", outcome.errors));
    }
    faults
}

fn shown(time: Duration) -> String {
    format!("{:.1}ms", time.as_secs_f64() * 1000.0)
}

impl BenchArgs {
    fn shape(&self) -> Shape {
        let end = match (self.total, self.duration) {
            (Some(total), _) => End::Requests(total),
            (None, duration) => End::After(duration.unwrap_or(Duration::from_secs(10))),
        };
        let (clients, connections) = (self.clients as usize, self.connections.min(self.clients) as usize);
        Shape { clients, connections, rate: self.rate.map(f64::from), end }
    }

    fn key(&self, number: u64) -> Bytes {
        format!("{}{:016}", self.prefix, number % self.keys).into()
    }

    /// Puts, or with `reads` reads, serializable ones or not.
    async fn measure(&self, reads: Option<bool>) -> anyhow::Result<Outcome> {
        ensure!(!self.prefix.is_empty(), "--prefix is empty, and all keys would be deleted at the end; name one");
        if !self.keep {
            self.expect_nothing().await?;
        }
        let channels = load::connect(&self.client, self.shape().connections).await?;
        let measured = self.load(&channels, reads).await;
        // Whatever came of it.
        let cleaned = if self.keep { Ok(()) } else { self.clean().await };
        let outcome = measured?;
        cleaned?;
        Ok(outcome)
    }

    async fn load(&self, channels: &[Channel], reads: Option<bool>) -> anyhow::Result<Outcome> {
        // Different bytes: nobody stores zeros.
        let random = Env::real().random_u64();
        let value: Bytes = (0..self.value_bytes).map(|at| (random.rotate_left(at as u32 % 64) >> 8) as u8).collect();
        let put = async |channel: Channel, number: u64| {
            let put = PutRequest { key: self.key(number), value: value.clone(), ..PutRequest::default() };
            KvClient::new(channel).put(put).await.map(drop)
        };
        let Some(serializable) = reads else { return Ok(self.run(self.shape(), channels, "puts", put).await) };
        let fill = Shape { rate: None, end: End::Requests(self.keys), ..self.shape() };
        let filled = self.run(fill, channels, "keys written", put).await;
        if let Some((text, count)) = filled.kinds.first_key_value() {
            bail!("the keys that are to be read could not be written: {text} ({count} times)");
        }
        let get = async |channel: Channel, number: u64| {
            // In an order that is not the tree's.
            let key = self.key(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20);
            let range = RangeRequest { key, serializable, ..RangeRequest::default() };
            KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX).range(range).await.map(drop)
        };
        Ok(self.run(self.shape(), channels, "reads", get).await)
    }

    async fn run(
        &self,
        shape: Shape,
        channels: &[Channel],
        what: &str,
        ask: impl AsyncFn(Channel, u64) -> Result<(), tonic::Status>,
    ) -> Outcome {
        let (what, total) = match shape.end {
            End::Requests(total) => (what.to_owned(), total),
            End::After(duration) => (format!("seconds of {what}"), duration.as_secs()),
        };
        let progress = Progress::new(&what, Unit::Things, Some(total));
        let stop = async {
            // Where there is no such signal nobody sends it.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        load::run(shape, channels, self.client.timeout, progress, ask, stop).await
    }

    fn all(&self) -> (Bytes, Bytes) {
        (self.prefix.clone().into(), prefix_end(self.prefix.as_bytes()).into())
    }

    async fn expect_nothing(&self) -> anyhow::Result<()> {
        let (key, range_end) = self.all();
        let range = RangeRequest { key, range_end, count_only: true, ..RangeRequest::default() };
        let mut kv = connect(&self.client).await?;
        let count = self.client.answer(kv.range(range)).await?.into_inner().count;
        ensure!(
            count == 0,
            "there are {count} keys that begin with {:?}, and all of them would be deleted at the end; name another --prefix, or say --keep",
            self.prefix
        );
        Ok(())
    }

    async fn clean(&self) -> anyhow::Result<()> {
        let (key, range_end) = self.all();
        let mut kv = connect(&self.client).await?;
        let delete = DeleteRangeRequest { key, range_end, ..DeleteRangeRequest::default() };
        let deleted = self.client.answer(kv.delete_range(delete)).await;
        deleted.map(drop).map_err(|error| error.context(format!("the keys below {:?} are still there", self.prefix)))
    }
}

/// Parts of all requests, with what they are called.
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

fn outcome_text(outcome: &Outcome) -> Vec<u8> {
    let latencies = &outcome.latencies;
    let time = |micros: u64| shown(Duration::from_micros(micros));
    let mut head = vec!["ANSWERED", "FAILED", "SECONDS", "PER SECOND", "MEAN"];
    let mut row = vec![
        latencies.len().to_string(),
        outcome.errors.to_string(),
        format!("{:.1}", outcome.took.as_secs_f64()),
        format!("{:.0}", outcome.per_second()),
        time(latencies.mean() as u64),
    ];
    for (name, quantile) in QUANTILES {
        head.push(name);
        row.push(time(latencies.value_at_quantile(quantile)));
    }
    head.push("SLOWEST");
    row.push(time(latencies.max()));
    let mut out = table(&head, &[row]);
    for (text, count) in &outcome.kinds {
        out.extend_from_slice(format!("failed {count} times: {text}\n").as_bytes());
    }
    out
}

fn outcome_json(outcome: &Outcome) -> Value {
    let latencies = &outcome.latencies;
    let seconds = |micros: f64| micros / 1e6;
    let quantiles = QUANTILES.map(|(name, q)| (name.to_owned(), seconds(latencies.value_at_quantile(q) as f64).into()));
    json!({
        "answered": latencies.len(),
        "failed": outcome.errors,
        "errors": outcome.kinds,
        "seconds": outcome.took.as_secs_f64(),
        "per_second": outcome.per_second(),
        "latency_seconds": {
            "mean": seconds(latencies.mean()),
            "deviation": seconds(latencies.stdev()),
            "slowest": seconds(latencies.max() as f64),
            "quantiles": Value::Object(quantiles.into_iter().collect()),
        },
    })
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;

    fn outcome(millis: &[u64], seconds: u64) -> Outcome {
        let mut latencies = Histogram::new(3).unwrap();
        millis.iter().for_each(|millis| latencies.record(millis * 1000).unwrap());
        Outcome { took: Duration::from_secs(seconds), latencies, errors: 0, kinds: Default::default() }
    }

    #[test]
    fn every_shortcoming_is_a_fault() {
        let second = Duration::from_secs(1);
        assert_eq!(judge(&outcome(&[5; 100], 1), 100, second), Vec::<String>::new());
        assert_eq!(judge(&outcome(&[5; 91], 1), 100, second), Vec::<String>::new(), "a tenth may be missing");
        assert!(judge(&outcome(&[5; 100], 2), 100, second)[0].contains("50 puts a second"));
        let mut slow = vec![5; 99];
        slow.push(600);
        assert!(judge(&outcome(&slow, 1), 100, second)[0].contains("slowest"), "a single one is enough");
        let uneven: Vec<u64> = (0..100).map(|n| if n % 2 == 0 { 5 } else { 400 }).collect();
        assert!(judge(&outcome(&uneven, 1), 100, second)[0].contains("deviate"));
        assert!(judge(&Outcome { errors: 1, ..outcome(&[5; 100], 1) }, 100, second)[0].contains("failed"));
    }

    #[test]
    fn what_is_printed_has_every_figure() {
        let text = String::from_utf8(outcome_text(&outcome(&[1, 2, 3], 1))).unwrap();
        let head: Vec<&str> = text.lines().next().unwrap().split("  ").filter(|cell| !cell.is_empty()).collect();
        assert_eq!(head.len(), 10, "{text}");
        let json = outcome_json(&outcome(&[1, 2, 3], 1));
        assert_eq!((&json["answered"], &json["per_second"]), (&json!(3), &json!(3.0)));
        assert!(json["latency_seconds"]["quantiles"]["p50"].as_f64().unwrap() >= 0.002, "{json}");
    }
}
