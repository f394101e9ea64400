//! Clients that mean harm, beside good ones: nothing that a client or whoever reaches a port does may end a member, cost an election or
//! lose a write, and the good clients must hardly notice.
//!
//!     cargo build --release
//!     cargo run --release --example hostile -- --seed 7 --duration 20m    # every kind at once, in random order, and a control run
//!     cargo run --release --example hostile -- --each --duration 10s      # every kind alone
//!
//! Hostile clients are processes of their own, each with an address of its own, as is a host from which somebody attacks; the good clients
//! have another one. The control run has as many, each of which burns the processor time that the hostile
//! one has used and sends nothing: what the good clients suffer then is the machine's doing. `--program` names the server to try, such
//! as one of another version. Ends with exit code 1 if a member ended, leadership changed, something acknowledged is missing, a good
//! client was told something wrong, memory went over what settings and data allow, or the good clients' p99 rose by more than `--rise-max`.

#[path = "../compare/servers.rs"]
#[allow(dead_code, reason = "what the example `compare` needs beside")]
mod servers;
#[path = "../../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

mod good;
mod kinds;
mod little;
mod peers;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use good::{Good, Seen};
use kinds::{Attack, FILLED, KINDS, Tally};
use quorate::config::{Bytes, Config, units};
use quorate::env::process::raise_open_files_max;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::{HashKvRequest, PutRequest, RequestOp, TxnRequest, request_op};
use servers::{Kind, Program, Servers, channel, cpu_micros, resident_bytes};
use support::attack::HOST;
use support::cluster::binary;

const MEMBERS: u64 = 3;
const MIB: f64 = (1 << 20) as f64;
/// A hostile process does so many kinds at once.
const AT_ONCE: usize = 3;
/// And goes on to other kinds after so long, or earlier, so that all have had a turn in the time that there is.
const TURN: Duration = Duration::from_secs(8);
/// After the attack, what was acknowledged must be readable from each member in this time.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(40);

#[derive(clap::Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Decides kinds, order and contents; random if it is not given
    #[arg(long)]
    seed: Option<u64>,
    /// How long each run takes
    #[arg(long, default_value = "60s", value_parser = units::duration::parse)]
    duration: Duration,
    /// Kinds, separated by commas; all if none is named
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<String>,
    /// Each kind alone, on a cluster of its own
    #[arg(long)]
    each: bool,
    /// The server to try; without it, the one beside this program
    #[arg(long)]
    program: Option<PathBuf>,
    /// Hostile processes
    #[arg(long, default_value_t = 3)]
    hostile: u64,
    /// Keys of 200 bytes that are there from the beginning
    #[arg(long, default_value_t = 100_000)]
    keys: usize,
    /// Most memory of a member, in MiB; without it, what the settings come to together with the data that was there
    #[arg(long)]
    memory_max: Option<f64>,
    /// Most by which the good clients' p99 may be above the control run's, in milliseconds
    #[arg(long, default_value_t = 20.0)]
    rise_max: f64,
    /// Keep the members' logs in this directory
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Most changes of the leader while the attack goes on
    #[arg(long, default_value_t = 0)]
    elections_max: u64,
    /// Hostile and good clients share an address, as behind a NAT: places and turns then go by connections only
    #[arg(long)]
    one_host: bool,
    /// Only print what it did: no control run, and the exit code says nothing
    #[arg(long)]
    no_judgement: bool,
}

#[derive(clap::Subcommand)]
enum Part {
    /// A hostile process
    #[command(hide = true)]
    Attack {
        #[arg(long)]
        clients: String,
        #[arg(long)]
        peers: String,
        #[arg(long)]
        kinds: String,
        #[arg(long)]
        attack_seed: u64,
        /// Which of `processes` it is: the kinds are dealt out among them
        #[arg(long)]
        process: u64,
        #[arg(long)]
        processes: u64,
        #[arg(long)]
        millis: u64,
        #[arg(long)]
        one_host: bool,
    },
    /// A process of the control run
    #[command(hide = true)]
    Burn {
        #[arg(long)]
        cpu_micros: u64,
        #[arg(long)]
        millis: u64,
    },
}

/// What one run showed.
struct Outcome {
    seen: Seen,
    /// Changes of the term while the attack went on, but those that were asked for.
    elections: u64,
    /// When each was seen, and what was going on then.
    when: Vec<String>,
    ended: Vec<u64>,
    peak_mib: f64,
    /// What the settings allow a member with as much data as there was at most.
    allowed_mib: f64,
    /// What is missing, or differs, or is not served, after the attack.
    lost: Option<String>,
    hostile_cpu_micros: Vec<u64>,
    tally: Tally,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    raise_open_files_max();
    match &args.part {
        Some(Part::Burn { cpu_micros, millis }) => {
            burn(*cpu_micros, Duration::from_millis(*millis));
            Ok(())
        }
        Some(Part::Attack { clients, peers, kinds, attack_seed, process, processes, millis, one_host }) => {
            if !one_host {
                let _ = HOST.set(IpAddr::from([127, 66, 0, 1 + *process as u8]));
            }
            let split = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
            let duration = Duration::from_millis(*millis);
            let deck = Deck::new(split(kinds), *attack_seed, (*process as usize, *processes as usize));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(attack(split(clients), split(peers), deck, duration));
            Ok(())
        }
        None => tokio::runtime::Runtime::new()?.block_on(judge(&args)),
    }
}

/// Uses so much processor time, evenly.
fn burn(micros: u64, duration: Duration) {
    let (begun, own) = (Instant::now(), std::process::id());
    while begun.elapsed() < duration {
        let due = micros as f64 * begun.elapsed().as_secs_f64() / duration.as_secs_f64();
        if cpu_micros(own) > due {
            std::thread::sleep(Duration::from_millis(5));
        } else {
            let piece = Instant::now();
            while piece.elapsed() < Duration::from_millis(2) {
                std::hint::spin_loop();
            }
        }
    }
}

/// Kinds in random order, dealt out among the processes, again and again: each has its turn as often as any other.
struct Deck {
    kinds: Vec<String>,
    seed: u64,
    /// Which process, of how many.
    process: (usize, usize),
    hand: Vec<String>,
}

impl Deck {
    fn new(kinds: Vec<String>, seed: u64, process: (usize, usize)) -> Self {
        Self { kinds, seed, process, hand: Vec::new() }
    }

    /// For so long each kind is done at a time, if all are to be done once.
    fn turn(&self, duration: Duration) -> Duration {
        let turns = self.kinds.len().div_ceil(AT_ONCE * self.process.1) as u32;
        TURN.min(duration / turns.max(1))
    }

    fn deal(&mut self) -> Vec<String> {
        while self.hand.len() < AT_ONCE {
            let mut all = self.kinds.clone();
            fastrand::Rng::with_seed(self.seed).shuffle(&mut all);
            self.seed += 1;
            let (process, processes) = self.process;
            let own: Vec<String> = all.into_iter().skip(process).step_by(processes).collect();
            // Fewer kinds than processes: all do the same.
            self.hand.extend(if own.is_empty() { self.kinds.clone() } else { own });
        }
        self.hand.drain(..AT_ONCE).collect()
    }
}

/// A hostile process: several kinds at once, others after a while. Prints what it was told.
async fn attack(clients: Vec<String>, peers: Vec<String>, mut deck: Deck, duration: Duration) {
    let mut random = fastrand::Rng::with_seed(deck.seed.wrapping_mul(1000).wrapping_add(deck.process.0 as u64));
    let mut tally = Tally::default();
    let begun = Instant::now();
    let (until, turn) = (begun + duration, deck.turn(duration));
    while Instant::now() < until {
        let turn_ends = (Instant::now() + turn).min(until);
        let chosen = deck.deal();
        println!("turn {} {}", begun.elapsed().as_millis(), chosen.join(", "));
        let turns = chosen.into_iter().map(|kind| {
            let mut attack = Attack {
                clients: clients.clone(),
                peers: peers.clone(),
                until: turn_ends,
                random: fastrand::Rng::with_seed(random.u64(..)),
            };
            async move { kinds::run(&kind, &mut attack).await }
        });
        for told in futures_util::future::join_all(turns).await {
            tally.add(told);
        }
    }
    println!("cpu {}", cpu_micros(std::process::id()) as u64);
    println!("served {}", tally.served);
    println!("moves {}", tally.moves);
    for (text, count) in tally.refused {
        println!("refused {count} {}", text.replace('\n', " "));
    }
}

async fn judge(args: &Args) -> anyhow::Result<()> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("seed {seed}");
    let all: Vec<String> = KINDS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let kinds = if args.kinds.is_empty() { all.clone() } else { args.kinds.clone() };
    if let Some(unknown) = kinds.iter().find(|kind| !all.contains(kind)) {
        bail!("there is no kind {unknown}; there are {}", all.join(", "));
    }
    let mut faults = Vec::new();
    if args.each {
        for kind in &kinds {
            println!("\n{kind}: {}", KINDS.iter().find(|(name, _)| name == kind).map_or("", |(_, text)| text));
            let (outcome, control) = with_control(args, std::slice::from_ref(kind), seed).await?;
            faults.extend(report(args, &outcome, control.as_ref()).into_iter().map(|fault| format!("{kind}: {fault}")));
        }
    } else {
        println!("kinds: {}", kinds.join(", "));
        let (outcome, control) = with_control(args, &kinds, seed).await?;
        faults = report(args, &outcome, control.as_ref());
    }
    println!();
    for fault in &faults {
        println!("FAULT {fault}");
    }
    if faults.is_empty() {
        println!("no member ended, at most {} elections, nothing lost, nothing wrong", args.elections_max);
    }
    ensure!(faults.is_empty() || args.no_judgement, "{} faults; repeat with --seed {seed}", faults.len());
    Ok(())
}

/// A run, and, if it was survived, one in which the same processor time is burnt.
async fn with_control(args: &Args, kinds: &[String], seed: u64) -> anyhow::Result<(Outcome, Option<Outcome>)> {
    let outcome = run(args, Load::Attack { kinds, seed }).await?;
    let control = match outcome.ended.is_empty() && outcome.lost.is_none() && !args.no_judgement {
        true => Some(run(args, Load::Burn(&outcome.hostile_cpu_micros)).await?),
        false => None,
    };
    Ok((outcome, control))
}

enum Load<'a> {
    Attack {
        kinds: &'a [String],
        seed: u64,
    },
    /// By each of the processes, in microseconds.
    Burn(&'a [u64]),
}

impl Load<'_> {
    fn name(&self) -> &'static str {
        match self {
            Load::Attack { .. } => "attack",
            Load::Burn(_) => "control",
        }
    }

    fn start(&self, args: &Args, servers: &Servers) -> anyhow::Result<Vec<Child>> {
        let millis = args.duration.as_millis().to_string();
        let peers: Vec<String> = (0..MEMBERS).map(|slot| servers.peer_address(slot)).collect();
        let process = |part: &[&str]| {
            let mut command = Command::new(std::env::current_exe()?);
            anyhow::Ok(command.args(part).args(["--millis", &millis]).stdout(Stdio::piped()).spawn()?)
        };
        match self {
            Load::Attack { kinds, seed } => (0..args.hostile)
                .map(|i| {
                    let (clients, peers, kinds) = (servers.endpoints().join(","), peers.join(","), kinds.join(","));
                    let (seed, i, processes) = (seed.to_string(), i.to_string(), args.hostile.to_string());
                    let one_host: &[&str] = if args.one_host { &["--one-host"] } else { &[] };
                    let part = [
                        "attack",
                        "--clients",
                        &clients,
                        "--peers",
                        &peers,
                        "--kinds",
                        &kinds,
                        "--attack-seed",
                        &seed,
                        "--process",
                        &i,
                        "--processes",
                        &processes,
                    ];
                    process(&[&part, one_host].concat())
                })
                .collect(),
            Load::Burn(micros) => {
                micros.iter().map(|micros| process(&["burn", "--cpu-micros", &micros.to_string()])).collect()
            }
        }
    }
}

async fn run(args: &Args, load: Load<'_>) -> anyhow::Result<Outcome> {
    let path = args.program.clone().unwrap_or_else(binary);
    let program = Program { name: "quorate".into(), path, kind: Kind::Quorate };
    let servers = Servers::start(&program, MEMBERS, &std::env::temp_dir()).await?;
    fill(&servers, args.keys).await?;
    let good = Good::start(&servers)?;
    // So that the first elections and the fill are not counted.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let hostile = load.start(args, &servers)?;
    let mut told = Told::of(&servers).await;
    let term = told.term;
    let begun = Instant::now();
    let until = begun + args.duration;
    let (mut peak, mut rises) = (0.0_f64, Vec::new());
    while Instant::now() < until {
        peak = peak.max(servers.pids().into_iter().map(resident_bytes).fold(0.0, f64::max));
        let before = told.term;
        told.look(&servers).await;
        if told.term > before {
            rises.push((begun.elapsed(), before, told.term));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (mut hostile_cpu_micros, mut tally, mut turns) = (Vec::new(), Tally::default(), Vec::new());
    for child in hostile {
        let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (cpu, calls) = printed(&text);
        hostile_cpu_micros.push(cpu);
        tally.add(calls);
        turns.push(text);
    }
    let when = rises.iter().map(|(at, from, to)| {
        let kinds: Vec<&str> = turns.iter().filter_map(|text| turn_at(text, at.as_millis())).collect();
        format!("after {:.1} s: term {from} to {to}; {}", at.as_secs_f64(), kinds.join("; "))
    });
    let when = when.collect();
    if let Some(logs) = &args.logs {
        for slot in 0..MEMBERS {
            std::fs::create_dir_all(logs)?;
            std::fs::write(logs.join(format!("{}-{slot}.log", load.name())), servers.log_text(slot))?;
        }
    }
    told.look(&servers).await;
    let ended: Vec<u64> = (0..MEMBERS).filter(|slot| has_ended(&servers, *slot)).collect();
    let (mut lost, mut seen) = (None, Seen::default());
    if ended.is_empty() {
        let verified = async {
            let seen = good.stop(&servers).await?;
            equal_hashes(&servers).await?;
            anyhow::Ok(seen)
        };
        match tokio::time::timeout(RECOVERY_PATIENCE, verified).await {
            Ok(Ok(all)) => seen = all,
            Ok(Err(error)) => lost = Some(format!("{error:#}").lines().next().unwrap_or_default().to_owned()),
            Err(_) => lost = Some(format!("the cluster does not serve again {RECOVERY_PATIENCE:?} after the attack")),
        }
    }
    Ok(Outcome {
        seen,
        elections: (told.term - term).saturating_sub(tally.moves),
        when,
        ended,
        peak_mib: peak / MIB,
        allowed_mib: memory_allowed(told.data_bytes) / MIB,
        lost,
        hostile_cpu_micros,
        tally,
    })
}

/// The processes are children: one that has ended has no memory any more.
fn has_ended(servers: &Servers, slot: u64) -> bool {
    servers.pids().get(slot as usize).is_none_or(|pid| resident_bytes(*pid).is_nan())
}

async fn equal_hashes(servers: &Servers) -> anyhow::Result<()> {
    let look = async || {
        let mut hashes = Vec::new();
        for slot in 0..MEMBERS {
            let mut maintenance = MaintenanceClient::new(servers.channel(slot)?);
            let hash = maintenance.hash_kv(HashKvRequest { revision: 0 }).await?.into_inner();
            hashes.push((hash.hash, hash.compact_revision, hash.header.map(|header| header.revision)));
        }
        hashes.dedup();
        ensure!(hashes.len() == 1, "members differ: {hashes:?}");
        Ok(())
    };
    servers.wait("equal hashes", look).await
}

/// The most that members have told.
#[derive(Default)]
struct Told {
    term: u64,
    data_bytes: u64,
}

impl Told {
    async fn of(servers: &Servers) -> Self {
        let mut told = Self::default();
        told.look(servers).await;
        told
    }

    async fn look(&mut self, servers: &Servers) {
        for slot in 0..MEMBERS {
            let status = tokio::time::timeout(Duration::from_secs(2), servers.status(slot)).await;
            if let Ok(Ok(status)) = status {
                self.term = self.term.max(status.raft_term);
                self.data_bytes = self.data_bytes.max(status.db_size.try_into().unwrap_or(0));
            }
        }
    }
}

/// What a member of the default settings may take beside so much data: base, data and account.
fn memory_allowed(data_bytes: u64) -> f64 {
    let mut config = Config::default();
    config.storage.quota_bytes = Bytes(data_bytes);
    config.memory_bytes_max() as f64
}

/// The kinds that a hostile process tried at this moment, by what it has printed.
fn turn_at(text: &str, millis: u128) -> Option<&str> {
    let turns = text.lines().filter_map(|line| line.strip_prefix("turn ")?.split_once(' '));
    let begun = |at: &str| at.parse().is_ok_and(|at: u128| at <= millis);
    turns.take_while(|(at, _)| begun(at)).last().map(|(_, kinds)| kinds)
}

/// What a hostile process has printed.
fn printed(text: &str) -> (u64, Tally) {
    let (mut cpu, mut tally) = (0, Tally::default());
    for line in text.lines() {
        match line.split_once(' ') {
            Some(("cpu", micros)) => cpu = micros.parse().unwrap_or(0),
            Some(("moves", count)) => tally.moves += count.parse().unwrap_or(0),
            Some(("served", count)) => tally.served += count.parse().unwrap_or(0),
            Some(("refused", rest)) => {
                if let Some((count, text)) = rest.split_once(' ') {
                    *tally.refused.entry(text.to_owned()).or_default() += count.parse().unwrap_or(0);
                }
            }
            _ => {}
        }
    }
    (cpu, tally)
}

async fn fill(servers: &Servers, keys: usize) -> anyhow::Result<()> {
    let mut kv = KvClient::new(channel(&servers.endpoint(servers.leader().await?))?);
    for start in (0..keys).step_by(100) {
        let puts = (start..(start + 100).min(keys)).map(|i| {
            let put = PutRequest {
                key: format!("{FILLED}{i:08}").into(),
                value: format!("{i:0200}").into(),
                ..Default::default()
            };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        });
        kv.txn(TxnRequest { success: puts.collect(), ..Default::default() }).await.context("cannot fill")?;
    }
    Ok(())
}

/// Prints what a run showed, and returns what must not be.
fn report(args: &Args, outcome: &Outcome, control: Option<&Outcome>) -> Vec<String> {
    println!(
        "  members ended {:?}, elections {}, good calls {}, failed {}, peak memory {:.0} MiB, hostile CPU {:.1} s",
        outcome.ended,
        outcome.elections,
        outcome.seen.count(),
        outcome.seen.failures(),
        outcome.peak_mib,
        outcome.hostile_cpu_micros.iter().sum::<u64>() as f64 / 1e6
    );
    for when in &outcome.when {
        println!("    {when}");
    }
    println!("  hostile clients: served {}", outcome.tally.served);
    for (text, count) in &outcome.tally.refused {
        println!("    {count:>7}  {text}");
    }
    for (text, count) in &outcome.seen.failed {
        println!("  good clients failed {count:>5}  {text}");
    }
    let mut faults = Vec::new();
    for what in ["put", "get", "range", "lease"] {
        let at = |outcome: &Outcome| [0.5, 0.99, 1.0].map(|quantile| outcome.seen.millis(what, quantile));
        let ([p50, p99, most], beside) = (at(outcome), control.map(at));
        let calm =
            beside.map_or(String::new(), |[p50, p99, most]| format!("; control {p50:.1} / {p99:.1} / {most:.1}"));
        println!("  {what:>6}: p50 / p99 / most {p50:.1} / {p99:.1} / {most:.1} ms{calm}");
        if let Some([_, calm, _]) = beside
            && (p99.is_nan() || p99 > calm + args.rise_max)
        {
            faults.push(format!("p99 of {what} is {p99:.1} ms, {calm:.1} ms in the control run"));
        }
    }
    if !outcome.ended.is_empty() {
        faults.push(format!("members {:?} ended", outcome.ended));
    }
    if outcome.elections > args.elections_max {
        faults.push(format!("{} elections", outcome.elections));
    }
    let allowed = args.memory_max.unwrap_or(outcome.allowed_mib);
    if outcome.peak_mib > allowed {
        faults.push(format!("a member took {:.0} MiB, of {allowed:.0}", outcome.peak_mib));
    }
    faults.extend(outcome.lost.clone());
    faults.extend(outcome.seen.wrong.iter().take(5).cloned());
    faults
}
