//! Simulated clusters under faults, a seed each: `cargo run --release --example quorate-sim -- --seeds 0..1000`.
//!
//! Each seed is played in a process of its own whose entropy comes from the seed, so that it repeats bit by bit: a seed that
//! fails is played again alone with `--seed N`, which prints its whole trace. `--planted` switches on each of the deliberate
//! faults in turn and says which check caught it after how many seeds; `--planted NAME` takes one.
//! Ends with 1 if a promise was broken, or a planted fault was not caught.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use quorate::env::planted::PLANTED;
use quorate::testing::sim::{self, Report, Settings};
use rand::SeedableRng as _;

#[derive(Parser)]
#[command(about = "Simulated clusters under faults, a seed each")]
struct Arguments {
    /// Seeds to play, the last one excluded.
    #[arg(long, value_parser = range, default_value = "0..100", value_name = "FROM..TO")]
    seeds: Range<u64>,
    /// Play this seed alone and print its trace.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Play with each planted fault in turn, or with this one, until it is caught.
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "all")]
    planted: Option<String>,
    /// Processes at a time; the number of processors if it is not set.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Where pictures of violations go.
    #[arg(long, value_name = "DIR", default_value = "target/sim")]
    out: PathBuf,
    /// Play one seed in this process, and print its report as JSON: what the others are.
    #[arg(long, hide = true, value_name = "N")]
    play: Option<u64>,
    /// Where the trace of `--play` goes.
    #[arg(long, hide = true, value_name = "FILE")]
    trace: Option<PathBuf>,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parse = |part: &str| part.parse::<u64>().map_err(|error| format!("{part:?}: {error}"));
    let (from, to) = text.split_once("..").ok_or("expected FROM..TO, such as 0..1000")?;
    Ok(parse(from)?..parse(to)?)
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.play {
        return play(seed, &arguments);
    }
    std::fs::create_dir_all(&arguments.out)?;
    if let Some(seed) = arguments.seed {
        return replay(seed, &arguments);
    }
    let jobs =
        arguments.jobs.map_or_else(|| std::thread::available_parallelism().map_or(2, usize::from), |jobs| jobs.max(1));
    match arguments.planted.as_deref() {
        None => search(&arguments, jobs),
        Some(name) => catch_planted(&arguments, name, jobs),
    }
}

/// One seed, in this process.
fn play(seed: u64, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    mad_turmoil::rand::set_rng(rand::rngs::StdRng::seed_from_u64(seed));
    let settings = Settings { seed, planted: arguments.planted.clone(), keep_trace: arguments.trace.is_some() };
    // A thread of its own, so that nothing has drawn from its entropy before.
    let (report, text) = std::thread::spawn(move || sim::run_traced(&settings)).join().expect("a run reports panics");
    if let Some(file) = &arguments.trace {
        std::fs::write(file, text)?;
    }
    println!("{}", serde_json::to_string(&report)?);
    Ok(ExitCode::SUCCESS)
}

/// Plays one seed in a process of its own.
fn report(seed: u64, planted: Option<&str>, trace: Option<&Path>) -> anyhow::Result<Report> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--play", &seed.to_string()]).stderr(Stdio::null());
    if let Some(name) = planted {
        command.args(["--planted", name]);
    }
    if let Some(file) = trace {
        command.arg("--trace").arg(file);
    }
    let output = command.output()?;
    if !output.status.success() {
        bail!("seed {seed}: the process ended with {}", output.status);
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("the report of seed {seed}"))
}

/// Plays `seeds` with `jobs` processes; `each` gets the reports as they come, and says whether to go on.
fn play_all(
    seeds: Range<u64>,
    planted: Option<&str>,
    jobs: usize,
    each: impl Fn(Report) -> bool + Sync,
) -> anyhow::Result<()> {
    let (next, done) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let error = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    match report(seed, planted, None) {
                        Ok(report) => done.fetch_or(!each(report), Ordering::Relaxed),
                        Err(failed) => {
                            error.lock().expect("no thread panics").get_or_insert(failed);
                            done.swap(true, Ordering::Relaxed)
                        }
                    };
                }
            });
        }
    });
    error.into_inner().expect("no thread panics").map_or(Ok(()), Err)
}

/// The machine's clock: in a program with a simulated one, the standard library's stands still.
fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn search(arguments: &Arguments, jobs: usize) -> anyhow::Result<ExitCode> {
    let begun = uptime();
    let sums = Mutex::new((0, 0, Duration::ZERO, BTreeMap::<String, u64>::new(), Vec::new()));
    play_all(arguments.seeds.clone(), None, jobs, |report| {
        let mut sums = sums.lock().expect("no thread panics");
        sums.0 += 1;
        sums.1 += report.trace_events;
        sums.2 += Duration::from_millis(report.simulated_ms);
        for (what, count) in report.counts {
            *sums.3.entry(what).or_default() += count;
        }
        if let Some(violation) = report.violation {
            println!("seed {}: {}: {}", report.seed, violation.check, violation.what);
            sums.4.push(report.seed);
        }
        true
    })?;
    let (played, events, simulated, counts, failed) = sums.into_inner().expect("no thread panics");
    for (what, count) in &counts {
        println!("{count:>12}  {what}");
    }
    println!(
        "{played} seeds, {events} events, {:.0} simulated minutes in {:.0} s; {} violations",
        simulated.as_secs_f64() / 60.0,
        (uptime() - begun).as_secs_f64(),
        failed.len()
    );
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("failed seeds: {failed:?}; one alone, with its trace: --seed {}", failed[0]);
    Ok(ExitCode::FAILURE)
}

fn replay(seed: u64, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let trace = arguments.out.join(format!("seed-{seed}.trace"));
    let report = report(seed, arguments.planted.as_deref(), Some(&trace))?;
    for (what, count) in &report.counts {
        println!("{count:>12}  {what}");
    }
    println!(
        "seed {seed}: {} events, hash {:016x}, {} simulated ms; the trace is in {}",
        report.trace_events,
        report.trace_hash,
        report.simulated_ms,
        trace.display()
    );
    let Some(violation) = report.violation else { return Ok(ExitCode::SUCCESS) };
    println!("{}: {}", violation.check, violation.what);
    if let Some(picture) = violation.picture {
        let file = arguments.out.join(format!("seed-{seed}.svg"));
        std::fs::write(&file, picture)?;
        println!("picture: {}", file.display());
    }
    Ok(ExitCode::FAILURE)
}

fn catch_planted(arguments: &Arguments, name: &str, jobs: usize) -> anyhow::Result<ExitCode> {
    let mut missed = 0;
    println!("| planted fault | what it does | caught by | seeds until then |\n|---|---|---|---|");
    for (planted, what) in PLANTED.iter().filter(|(planted, _)| name == "all" || name == *planted) {
        let first = Mutex::new(None::<(u64, String)>);
        let played = AtomicU64::new(0);
        play_all(arguments.seeds.clone(), Some(planted), jobs, |report| {
            played.fetch_add(1, Ordering::Relaxed);
            let Some(violation) = report.violation else { return true };
            let mut first = first.lock().expect("no thread panics");
            // Seeds come in about the order of their numbers; the lowest counts.
            if first.as_ref().is_none_or(|(seed, _)| report.seed < *seed) {
                *first = Some((report.seed, violation.check));
            }
            false
        })?;
        match first.into_inner().expect("no thread panics") {
            Some((seed, check)) => {
                println!("| `{planted}` | {what} | {check} | {} |", seed + 1 - arguments.seeds.start);
            }
            None => {
                missed += 1;
                println!("| `{planted}` | {what} | **not caught** | {} |", played.into_inner());
            }
        }
    }
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
