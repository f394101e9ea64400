//! The same random requests to three members of ours and to etcd 3.7: every answer must be the same, field by field.
//!
//!     cargo build --release
//!     cargo run --release --example differ -- --requests 1000000
//!     cargo run --release --example differ -- --auth                # as three users and root, whose permissions change meanwhile
//!     cargo run --release --example differ -- --seed 7              # the same requests again
//!     cargo run --release --example differ -- --replay FILE         # a sequence that a run has written
//!
//! Every RPC and every path of the gateway, members chosen at random, restarts between, and in each epoch a lease that ends by itself. Servers are new after each
//! `--epoch` requests, so that a difference depends on few requests; it is then shrunk to fewer still, printed with both answers, and
//! written to a file. Differences that are wanted are a list (`wanted`); each run counts what it needed of it. It also counts
//! what succeeded and which errors occurred, and would have found ten deliberate faults (`planted`). Exit code 1: a
//! difference; with `--planted` a planted fault that was not found; with `--strict` also an RPC of which too little succeeded, an error
//! that never occurred or an entry of the list that was never needed.

#[path = "../../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

mod ask;
mod call;
mod compare;
mod errors;
mod generate;
mod history;
mod planted;
mod report;
mod shrink;
mod wanted;
mod watch;
mod world;

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use call::Call;
use clap::Parser as _;
use compare::{Difference, differences};
use generate::Generator;
use report::Report;
use support::tools::{ETCD_37, find};
use wanted::Uses;
use world::{Answers, MEMBERS, World};

/// As often the same requests are played if the leader is lost meanwhile.
const ATTEMPTS: u32 = 5;

#[derive(clap::Parser)]
struct Args {
    /// Random if it is not given
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, default_value_t = 10_000)]
    requests: u64,
    /// Servers are new after so many requests
    #[arg(long, default_value_t = 5_000)]
    epoch: u64,
    /// Plays the requests of a file, one a line
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Users ask, whose permissions change meanwhile
    #[arg(long)]
    auth: bool,
    /// Goes on after a difference, if need be on new servers, and counts them by RPC and field
    #[arg(long)]
    all: bool,
    /// Does not look for a shorter sequence with the same difference
    #[arg(long)]
    no_shrink: bool,
    /// Prints the table of wanted differences, and does nothing else
    #[arg(long)]
    wanted: bool,
    /// Also fails if a planted fault would not have been noticed
    #[arg(long)]
    planted: bool,
    /// Also fails for what was too seldom, and for planted faults
    #[arg(long)]
    strict: bool,
    /// etcd 3.7; without it, `etcd-3.7` on PATH
    #[arg(long)]
    etcd: Option<PathBuf>,
}

/// Why a sequence is interesting: the last of its requests was answered differently.
#[derive(Clone, Debug)]
pub struct Found {
    pub call: Call,
    pub answers: Option<Answers>,
    pub differences: Vec<Difference>,
}

impl Found {
    /// Two sequences show the same fault if the same fields of the same RPC differ.
    pub fn kind(&self) -> (String, Option<String>) {
        (self.call.method.clone(), self.differences.first().map(|difference| difference.path.clone()))
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.wanted {
        print!("{}", wanted::table());
        return Ok(());
    }
    let etcd = match &args.etcd {
        Some(path) => path.clone(),
        None => find(&ETCD_37)
            .with_context(|| format!("no {} on PATH; install it with {}", ETCD_37.name, ETCD_37.install))?,
    };
    let mut report = Report::new(args.all, args.auth);
    let found = match &args.replay {
        Some(file) => {
            let text = std::fs::read_to_string(file)?;
            let calls = text.lines().map(serde_json::from_str).collect::<Result<Vec<Call>, _>>()?;
            play(&etcd, &calls, &mut report).await?.map(|found| (calls, found))
        }
        None => run(&args, &etcd, &mut report).await?,
    };
    if let Some((calls, found)) = found {
        let calls =
            if args.no_shrink || args.replay.is_some() { calls } else { shrink::shrink(&etcd, calls, &found).await? };
        report::print_found(&calls, &found, &mut report)?;
        std::process::exit(1);
    }
    println!("{report}");
    let broken = report.broken(args.planted || args.strict, args.strict);
    if args.replay.is_none() && !broken.is_empty() {
        println!("{}", broken.join("\n"));
        std::process::exit(1);
    }
    Ok(())
}

/// Plays `--requests` in epochs. A difference comes with the requests of its epoch.
async fn run(args: &Args, etcd: &std::path::Path, report: &mut Report) -> anyhow::Result<Option<(Vec<Call>, Found)>> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let mut left = args.requests;
    for epoch in 0.. {
        if left == 0 {
            break;
        }
        let here = left.min(args.epoch);
        left -= here;
        println!("seed {} requests {here}", seed + epoch);
        let with = if args.auth { Generator::with_users } else { Generator::new };
        let mut generator = with(seed + epoch, MEMBERS);
        let mut calls = Vec::new();
        while (calls.len() as u64) < here {
            let call = generator.call();
            if !report.uses.is_unsent(&call) {
                calls.push(call);
            }
        }
        if let Some(found) = play(etcd, &calls, report).await? {
            let last = report.last_index;
            if args.all {
                println!("seed {}, request {last}: {} differs; new servers", seed + epoch, found.call.method);
                left += here - (last as u64 + 1);
                continue;
            }
            calls.truncate(last + 1);
            println!("seed {}, request {last}", seed + epoch);
            found.differences.iter().for_each(|difference| println!("{difference}"));
            return Ok(Some((calls, found)));
        }
    }
    Ok(None)
}

/// Plays `calls` on new servers until a request is answered differently; anew if the leader was lost, which an overloaded machine does.
async fn play(etcd: &std::path::Path, calls: &[Call], report: &mut Report) -> anyhow::Result<Option<Found>> {
    for _ in 0..ATTEMPTS {
        match play_once(etcd, calls, report).await? {
            Played::ToTheEnd => return Ok(None),
            Played::Found(found) => return Ok(Some(found)),
            Played::LeaderLost => println!("the leader was lost at request {}; the same again", report.last_index),
        }
    }
    bail!("the leader was lost {ATTEMPTS} times: the machine has too much to do for a comparison")
}

enum Played {
    ToTheEnd,
    Found(Found),
    /// What was under way may have been done or not, so that nothing can be compared from there on.
    LeaderLost,
}

async fn play_once(etcd: &std::path::Path, calls: &[Call], report: &mut Report) -> anyhow::Result<Played> {
    let mut world = World::start(etcd).await;
    for (index, call) in calls.iter().enumerate() {
        report.last_index = index;
        let answers = match world.play(call).await {
            Ok(Some(answers)) => answers,
            Ok(None) => continue,
            Err(error) => {
                let broken =
                    Difference { path: format!("{error:#}"), ours: Default::default(), theirs: Default::default() };
                report.note_broken(call, &broken);
                return Ok(Played::Found(Found { call: call.clone(), answers: None, differences: vec![broken] }));
            }
        };
        if has_lost_its_leader(&answers.ours) {
            return Ok(Played::LeaderLost);
        }
        let found = unexplained(call, &answers, &mut report.uses);
        report.note(call, &answers, &found);
        let goes_on = found.is_empty() || (report.goes_on && changes_nothing(call));
        if !goes_on {
            return Ok(Played::Found(Found { call: call.clone(), answers: Some(answers), differences: found }));
        }
    }
    Ok(Played::ToTheEnd)
}

/// An answer that a member gives only while leadership changes.
fn has_lost_its_leader(answer: &serde_json::Value) -> bool {
    answer.pointer("/error/code").is_some_and(|code| code == "Unavailable") || answer["http"] == 503
}

/// After a difference in one of these the servers still hold the same.
fn changes_nothing(call: &Call) -> bool {
    let method = call.method.as_str();
    ["Maintenance/", "Cluster/", "KV/Range", "Lease/LeaseL", "Lease/LeaseT", "Lease/LeaseK"]
        .iter()
        .any(|p| method.starts_with(p))
}

/// What differs and should not.
pub fn unexplained(call: &Call, answers: &Answers, uses: &mut Uses) -> Vec<Difference> {
    let mut all = differences(&answers.ours, &answers.theirs);
    all.retain(|difference| !uses.explains(call, difference));
    all
}
