//! `top`: what every member does now, drawn anew every two seconds.
//!
//! Each member is asked for its status and its metrics, over the connection that it serves clients with; rates are differences of two
//! samples of its own counters. Elsewhere than on a terminal each table is printed below the last one.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::ensure;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{ClientArgs, page};
use super::members::{self, Asked, WhomArgs};
use super::output::{Format, human_bytes, id, json_line, table};
use super::print;
use crate::config::units::duration;
use crate::env::{Instant, interval, timeout};
use crate::identity::{READER_SLOT, slot_of};

#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// Between two tables
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration::parse)]
    interval: Duration,
    /// End after so many tables; 0: go on until Ctrl-C
    #[arg(long, default_value_t = 0)]
    count: u64,
    #[command(flatten)]
    whom: WhomArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// A member at one moment.
struct Sample {
    asked: Asked,
    /// `None` if it gave none.
    metrics: Option<Metrics>,
    at: Instant,
}

/// What is read off the page of metrics.
#[derive(Debug, Default, PartialEq)]
struct Metrics {
    reads: f64,
    writes: f64,
    watchers: Option<f64>,
    keys: f64,
    resident_bytes: f64,
    /// Of the log's syncs: how many took at most so long, in seconds.
    fsync: BTreeMap<u64, f64>,
}

/// From one sample to the next.
struct Rates {
    reads: f64,
    writes: f64,
    fsync_p99: Option<f64>,
}

const READS: [&str; 1] = ["Range"];
const WRITES: [&str; 3] = ["Put", "DeleteRange", "Txn"];

pub async fn top(args: TopArgs) -> anyhow::Result<()> {
    ensure!(args.interval >= Duration::from_millis(100), "--interval: expected at least 100ms");
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let screen = Screen::new(args.output == Format::Simple && std::io::stdout().is_terminal())?;
    let mut tick = interval(args.interval);
    let mut before: Vec<Sample> = Vec::new();
    for number in 1.. {
        let sampled = tokio::select! {
            sampled = sample(&args) => sampled?,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        };
        let frame = match args.output {
            Format::Simple => text(&sampled, &before),
            Format::Json => json_line(&frame_json(&sampled, &before)),
        };
        screen.draw(&frame)?;
        before = sampled;
        if number == args.count {
            break;
        }
        // The first tick comes at once.
        if number == 1 {
            tick.tick().await;
        }
        tokio::select! {
            _ = tick.tick() => {}
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    Ok(())
}

async fn sample(args: &TopArgs) -> anyhow::Result<Vec<Sample>> {
    let members = members::all(&args.client, &args.whom).await?;
    Ok(join_all(members.into_iter().map(async |asked| {
        let metrics = match &asked.reached {
            Ok(reached) => timeout(args.client.timeout, page(reached.channel.clone(), "/metrics")).await.ok(),
            Err(_) => None,
        };
        let metrics = metrics.and_then(Result::ok).map(|text| Metrics::read(&text));
        Sample { asked, metrics, at: Instant::now() }
    }))
    .await)
}

impl Metrics {
    fn read(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let label = |name: &str| labels.split(',').find_map(|pair| pair.split_once('=').filter(|p| p.0 == name));
            let label = |name: &str| label(name).map(|pair| pair.1.trim_matches(['"', '}']));
            match name {
                "grpc_server_handled_total" => match label("grpc_method") {
                    Some(method) if READS.contains(&method) => metrics.reads += value,
                    Some(method) if WRITES.contains(&method) => metrics.writes += value,
                    _ => {}
                },
                "etcd_debugging_mvcc_watcher_total" => metrics.watchers = Some(value),
                "etcd_debugging_mvcc_keys_total" => metrics.keys = value,
                "process_resident_memory_bytes" => metrics.resident_bytes = value,
                "etcd_disk_wal_fsync_duration_seconds_bucket" => {
                    if let Some(bound) = label("le").and_then(|bound| bound.parse::<f64>().ok()) {
                        // Positive numbers are in the order of their bits.
                        metrics.fsync.insert(bound.to_bits(), value);
                    }
                }
                _ => {}
            }
        }
        metrics
    }
}

/// Of a member since the last table; `None` if it was not there then, or began anew.
fn rates(now: &Sample, before: &[Sample]) -> Option<Rates> {
    let before = before.iter().find(|sample| sample.asked.id == now.asked.id)?;
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(f64::EPSILON);
    let (now, before) = (now.metrics.as_ref()?, before.metrics.as_ref()?);
    let rate = |now: f64, before: f64| (now >= before).then_some((now - before) / seconds);
    Some(Rates {
        reads: rate(now.reads, before.reads)?,
        writes: rate(now.writes, before.writes)?,
        fsync_p99: p99(&now.fsync, &before.fsync),
    })
}

/// The bound below which 99 of 100 of what came meanwhile lie.
fn p99(now: &BTreeMap<u64, f64>, before: &BTreeMap<u64, f64>) -> Option<f64> {
    let since = |bound: &u64| now.get(bound).copied().unwrap_or(0.0) - before.get(bound).copied().unwrap_or(0.0);
    let all = since(now.keys().next_back()?);
    let bound = now.keys().find(|bound| all > 0.0 && since(bound) >= 0.99 * all)?;
    Some(f64::from_bits(*bound))
}

fn role(asked: &Asked, leader: u64) -> &'static str {
    match &asked.reached {
        Err(_) => "away",
        Ok(_) if asked.id == leader && leader != 0 => "leader",
        Ok(reached) if reached.status.is_learner && slot_of(asked.id) == READER_SLOT => "reader",
        Ok(reached) if reached.status.is_learner => "learner",
        Ok(_) => "voter",
    }
}

/// The greatest index that anyone names: lag is counted from it.
fn last_index(samples: &[Sample]) -> u64 {
    let statuses =
        samples.iter().filter_map(|sample| sample.asked.reached.as_ref().ok()).map(|reached| &reached.status);
    statuses.map(|status| status.raft_index.max(status.raft_applied_index)).max().unwrap_or_default()
}

fn revision(samples: &[Sample]) -> i64 {
    let reached = samples.iter().filter_map(|sample| sample.asked.reached.as_ref().ok());
    reached.filter_map(|reached| reached.status.header.as_ref()).map(|header| header.revision).max().unwrap_or_default()
}

fn members_of(samples: &[Sample]) -> (usize, u64) {
    let reached = samples.iter().filter_map(|sample| sample.asked.reached.as_ref().ok()).map(|reached| &reached.status);
    let newest = reached.clone().filter(|status| status.leader != 0).max_by_key(|status| status.raft_term);
    (reached.count(), newest.map_or(0, |status| status.leader))
}

fn text(samples: &[Sample], before: &[Sample]) -> Vec<u8> {
    let (answer, leader) = members_of(samples);
    let name = samples.iter().find(|sample| sample.asked.id == leader && leader != 0);
    let name = name.map_or("none is known".to_owned(), |sample| sample.asked.label());
    let keys =
        samples.iter().filter_map(|sample| sample.metrics.as_ref()).map(|metrics| metrics.keys).fold(0.0, f64::max);
    let mut out = format!(
        "leader: {name}   members: {answer} of {} answer   revision: {}   keys: {keys}\n\n",
        samples.len(),
        revision(samples)
    );
    let last = last_index(samples);
    let dash = || "-".to_owned();
    let row = |sample: &Sample| {
        let asked = &sample.asked;
        let status = asked.reached.as_ref().ok().map(|reached| &reached.status);
        let (metrics, rates) = (sample.metrics.as_ref(), rates(sample, before));
        let number = |value: Option<f64>| value.map_or_else(dash, |value| format!("{value:.0}"));
        let note = match &asked.reached {
            Ok(reached) => reached.status.errors.join("; "),
            Err(why) => why.clone(),
        };
        vec![
            asked.label(),
            role(asked, leader).to_owned(),
            status.map_or_else(dash, |status| status.raft_term.to_string()),
            status.map_or_else(dash, |status| status.raft_applied_index.to_string()),
            status.map_or_else(dash, |status| last.saturating_sub(status.raft_applied_index).to_string()),
            number(rates.as_ref().map(|rates| rates.writes)),
            number(rates.as_ref().map(|rates| rates.reads)),
            rates.and_then(|rates| rates.fsync_p99).map_or_else(dash, |p99| format!("{:.1}ms", p99 * 1000.0)),
            number(metrics.and_then(|metrics| metrics.watchers)),
            status.map_or_else(dash, |status| human_bytes(status.db_size.max(0) as u64)),
            metrics.map_or_else(dash, |metrics| human_bytes(metrics.resident_bytes as u64)),
            note,
        ]
    };
    let head = [
        "NAME",
        "ROLE",
        "TERM",
        "APPLIED",
        "LAG",
        "WRITES/S",
        "READS/S",
        "FSYNC p99",
        "WATCHERS",
        "DB SIZE",
        "MEMORY",
        "NOTE",
    ];
    let rows: Vec<Vec<String>> = samples.iter().map(row).collect();
    out += &String::from_utf8_lossy(&table(&head, &rows));
    out.into_bytes()
}

fn frame_json(samples: &[Sample], before: &[Sample]) -> Value {
    let (_, leader) = members_of(samples);
    let last = last_index(samples);
    let object = |sample: &Sample| {
        let mut object = sample.asked.json();
        object["role"] = role(&sample.asked, leader).into();
        match &sample.asked.reached {
            Ok(reached) => {
                object["term"] = reached.status.raft_term.into();
                object["applied"] = reached.status.raft_applied_index.into();
                object["lag"] = last.saturating_sub(reached.status.raft_applied_index).into();
                object["db_size_bytes"] = reached.status.db_size.into();
                object["errors"] = reached.status.errors.clone().into();
            }
            Err(why) => object["failure"] = why.clone().into(),
        }
        if let Some(metrics) = &sample.metrics {
            object["resident_bytes"] = metrics.resident_bytes.into();
            object["keys"] = metrics.keys.into();
        }
        if let Some(rates) = rates(sample, before) {
            object["reads_per_second"] = rates.reads.into();
            object["writes_per_second"] = rates.writes.into();
            object["fsync_p99_seconds"] = rates.fsync_p99.into();
        }
        object
    };
    let members: Vec<Value> = samples.iter().map(object).collect();
    json!({ "leader": (leader != 0).then(|| id(leader)), "revision": revision(samples), "members": members })
}

/// Where the tables go. On a terminal a screen of its own, which is left again however this ends.
struct Screen {
    terminal: bool,
}

impl Screen {
    fn new(terminal: bool) -> anyhow::Result<Self> {
        if terminal {
            print(b"\x1b[?1049h\x1b[?25l")?;
        }
        Ok(Self { terminal })
    }

    fn draw(&self, frame: &[u8]) -> anyhow::Result<()> {
        if !self.terminal {
            return print(frame);
        }
        // Each line to its end, and what is below: so nothing flickers.
        let frame = String::from_utf8_lossy(frame).replace('\n', "\x1b[K\r\n");
        print(format!("\x1b[H{frame}\x1b[J").as_bytes())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.terminal {
            // Nothing else can be done about a terminal that is gone.
            let _ = print(b"\x1b[?25h\x1b[?1049l");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_off_the_page() {
        let page = "# HELP x y\n\
            grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Range\",grpc_code=\"OK\"} 7\n\
            grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Put\",grpc_code=\"OK\"} 5\n\
            grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Txn\",grpc_code=\"OK\"} 2\n\
            process_resident_memory_bytes 1024\n\
            etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.001\"} 90\n\
            etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.002\"} 99\n\
            etcd_disk_wal_fsync_duration_seconds_bucket{le=\"+Inf\"} 100\n";
        let metrics = Metrics::read(page);
        assert_eq!((metrics.reads, metrics.writes, metrics.resident_bytes), (7.0, 7.0, 1024.0));
        assert_eq!(p99(&metrics.fsync, &BTreeMap::new()), Some(0.002));
        assert_eq!(p99(&metrics.fsync, &metrics.fsync), None, "nothing came meanwhile");
    }
}
