//! Quorate beside etcd: the same works, by the same client, on both in turn, on this machine.
//!
//! `cargo build --release && cargo run --release --example compare` starts three members of ours and measures; then, where an `etcd` is on
//! PATH, three of etcd; and so on for `--rounds`. Never are both up at once, and every round has fresh data. `--only ours` leaves etcd
//! out, `--against PATH` takes another build of ours in its place. `--write docs/performance` keeps the figures there. What each work
//! does, and how it is measured, is said in `docs/performance/README.md`.

mod client;
mod figures;
mod long;
mod machine;
mod many;
mod memory;
mod plot;
mod scale;
mod servers;
mod short;
mod streams;
#[path = "../../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;
mod works;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use clap::builder::PossibleValuesParser;
use client::Seen;
use figures::{Figures, Sample, TABLES};
use servers::{Kind, Program, Servers};
use support::cluster::binary;

/// The name of ours in tables.
const OURS: &str = "quorate";
const VALUE_BYTES: usize = 256;
const MIB: f64 = (1 << 20) as f64;

#[derive(Clone, clap::Parser)]
struct Args {
    /// What to measure
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(all_works()), default_value = "put,get,mixed")]
    works: Vec<String>,
    /// Clients of the works on keys
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256])]
    clients: Vec<usize>,
    /// Measured seconds of each such work, after a second of warm-up
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Leave the other one out
    #[arg(long, conflicts_with = "against")]
    only: Option<Only>,
    /// Compare with this build of quorate, instead of etcd
    #[arg(long)]
    against: Option<PathBuf>,
    /// The quorate to measure; without it, the one beside this program
    #[arg(long)]
    program: Option<PathBuf>,
    /// Keys that the works use
    #[arg(long, default_value_t = 10_000)]
    keys: u64,
    /// Keys of load, restart and pause, and the most of put-by-keys; memory asks for a part of that
    #[arg(long, default_value_t = 1_000_000)]
    many_keys: u64,
    /// Connections that the clients share, to the members in turn
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Where members have their data; a directory on the disk that is meant
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Keep figures, tables and plots here, beside what is there of other works
    #[arg(long)]
    write: Option<PathBuf>,
}

impl Args {
    fn wants(&self, work: &str) -> bool {
        self.works.iter().any(|wanted| wanted == work)
    }

    fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(std::env::temp_dir)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Only {
    Ours,
    Etcd,
}

/// One round with one program, and where its figures go.
pub struct Round<'a> {
    args: &'a Args,
    program: &'a Program,
    number: u32,
    figures: &'a mut Figures,
}

impl Round<'_> {
    async fn servers(&self, size: u64) -> anyhow::Result<Servers> {
        Servers::start(self.program, size, &self.args.data_dir()).await
    }

    /// Records and prints one figure.
    fn note(&mut self, work: &str, case: &str, metric: &'static str, value: f64) {
        println!(
            "round {} {:>8} {work:>16}, {case:<20} {metric} {}",
            self.number,
            self.program.name,
            figures::number(value)
        );
        self.record(work, case, metric, value);
    }

    fn record(&mut self, work: &str, case: &str, metric: &'static str, value: f64) {
        let (server, round) = (self.program.name.clone(), self.number);
        self.figures.push(Sample { work: work.into(), case: case.into(), server, round, metric, value });
    }

    /// Records and prints what a load showed.
    fn record_seen(&mut self, work: &str, case: &str, seen: &Seen) {
        let count = seen.micros.len() as f64;
        let (cpu, rate) = (seen.server_cpu_micros / count, count / seen.seconds);
        let millis = |quantile| seen.micros.value_at_quantile(quantile) as f64 / 1000.0;
        let client_cpu = seen.client_cpu_micros / count;
        println!(
            "round {} {:>8} {work:>16}, {case:<12} {rate:>8.0} a second | server CPU {cpu:>6.1} µs each, client {client_cpu:>5.1} | p50 \
             {:>7.2} p99 {:>7.2} p99.9 {:>7.2} max {:>7.2} ms",
            self.number,
            self.program.name,
            millis(0.5),
            millis(0.99),
            millis(0.999),
            millis(1.0),
        );
        self.record(work, case, "cpu_us", cpu);
        self.record(work, case, "client_cpu_us", client_cpu);
        self.record(work, case, "per_s", rate);
        for (metric, quantile) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999), ("max_ms", 1.0)] {
            self.record(work, case, metric, millis(quantile));
        }
    }
}

/// In the order in which they are done.
fn all_works() -> Vec<&'static str> {
    [short::WORKS, scale::WORKS, &["memory"], long::WORKS, many::WORKS].concat()
}

/// Ours, then what it is compared with.
fn programs(args: &Args) -> anyhow::Result<Vec<Program>> {
    let mut programs = Vec::new();
    if args.only != Some(Only::Etcd) {
        let path = args.program.clone().unwrap_or_else(binary);
        ensure!(path.exists(), "{} is not built; run `cargo build --release` first", path.display());
        programs.push(Program { name: OURS.into(), path, kind: Kind::Quorate });
    }
    if let Some(path) = &args.against {
        programs.push(Program { name: "against".into(), path: path.clone(), kind: Kind::Quorate });
    } else if args.only != Some(Only::Ours) {
        match Command::new("etcd").arg("--version").output() {
            Ok(_) => programs.push(Program { name: "etcd".into(), path: "etcd".into(), kind: Kind::Etcd }),
            Err(error) => println!("etcd: {error} (Debian: etcd-server); ours alone"),
        }
    }
    ensure!(!programs.is_empty(), "there is nothing to measure");
    Ok(programs)
}

/// Every round of one kind of work is made with each program before the next.
async fn measure(args: &Args, programs: &[Program], figures: &mut Figures) -> anyhow::Result<()> {
    let wanted = |works: &[&str]| works.iter().any(|work| args.wants(work));
    let kinds: [(bool, &str); 4] = [
        (wanted(short::WORKS), "short"),
        (wanted(&["memory"]), "memory"),
        (wanted(long::WORKS), "long"),
        (wanted(many::WORKS), "many"),
    ];
    let scales = scale::WORKS.iter().filter(|work| wanted(&[work])).copied();
    for kind in kinds.into_iter().filter(|(wanted, _)| *wanted).map(|(_, kind)| kind).chain(scales) {
        for number in 1..=args.rounds {
            for program in programs {
                let mut round = Round { args, program, number, figures: &mut *figures };
                let done = match kind {
                    "short" => short::measure(&mut round).await,
                    "memory" => memory::measure(&mut round).await,
                    "long" => long::measure(&mut round).await,
                    "many" => many::measure(&mut round).await,
                    work => scale::measure(&mut round, work).await,
                };
                done.with_context(|| format!("round {number} of {}", program.name))?;
            }
        }
    }
    Ok(())
}

/// Each plot's file name, and the plot.
fn plots(figures: &Figures) -> Vec<(String, String)> {
    let label = |case: &str| case.replace(' ', "\n");
    let mut plots = Vec::new();
    for case in figures.cases("put") {
        let places: Vec<_> = short::ON_KEYS.iter().map(|work| (work.replacen('-', "\n", 1), *work, case)).collect();
        let title = format!("Processor time of the three servers for one request, µs; {case}");
        let plot = plot::Plot::new(figures, &title, false, "cpu_us", &places).svg();
        plots.push((format!("cost-{}", case.replace(' ', "-")), plot));
    }
    for (work, lines, metric, title) in [
        ("put-by-keys", true, "cpu_us", "Processor time of all servers for a put, µs, by keys that there are"),
        (
            "put-by-watchers",
            true,
            "cpu_us",
            "Processor time of all servers for a put, µs, by watchers that it does not concern",
        ),
        ("put-by-members", true, "cpu_us", "Processor time of all servers for a put, µs, by members"),
        ("put-by-value", true, "cpu_us", "Processor time of all servers for a put, µs, by bytes of the value"),
        ("pause", false, "max_ms", "Longest that a request took, ms, while this happened"),
    ] {
        let cases = figures.cases(work);
        let places: Vec<_> = cases.iter().map(|case| (label(case), work, *case)).collect();
        plots.push((work.to_owned(), plot::Plot::new(figures, title, lines, metric, &places).svg()));
    }
    plots.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let programs = programs(&args)?;
    let paths: Vec<&Path> = programs.iter().map(|program| program.path.as_path()).collect();
    let machine = machine::describe(&paths, &args.data_dir())?;
    println!("{machine}");
    let mut figures = Figures::default();
    measure(&args, &programs, &mut figures).await?;
    if let Some(dir) = &args.write {
        std::fs::create_dir_all(dir)?;
        let mut all = Figures::load(dir)?;
        all.replace(figures);
        all.save(dir)?;
        figures = all;
        figures::fill_in(dir, "machine", &machine)?;
        for (name, svg) in plots(&figures) {
            std::fs::write(dir.join(&name).with_extension("svg"), svg)?;
            figures::fill_in(dir, &name, &format!("![{name}]({name}.svg)\n"))?;
        }
    }
    for table in TABLES {
        let text = figures.table(table);
        if text.is_empty() {
            continue;
        }
        println!("\n{text}");
        if let Some(dir) = &args.write {
            figures::fill_in(dir, table.name, &text)?;
        }
    }
    Ok(())
}
