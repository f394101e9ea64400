//! Puts the machine's Debian package lists into a cluster of three that is being killed all the while, and proves that
//! nothing which was acknowledged is lost.
//!
//!     cargo build --release && cargo run --release --example import-debian
//!
//! It starts the cluster itself, with the program that lies beside it in the target directory. Every stanza of
//! `apt-cache dumpavail` goes under `debian/<package>/<version>`, through all members, from 64 clients; every 2 s one random
//! member gets SIGKILL and is started again. Then every acknowledged key is read back from each member, the members' hashes
//! are compared, all are killed at once, and all of it is checked again. Exit code 1: something was lost.
//!
//! Absent: the run itself, which the tests share (`run.rs`).

mod run;
#[allow(dead_code)]
#[path = "../../tests/it/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;

/// Imports Debian's package lists into a cluster whose members are killed, and checks that nothing is lost.
#[derive(clap::Parser)]
struct Args {
    /// Take only so many stanzas
    #[arg(long)]
    limit: Option<usize>,
    /// Read this file instead of the output of `apt-cache dumpavail`
    #[arg(long)]
    input: Option<PathBuf>,
    /// Clients at a time
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Seconds between two kills
    #[arg(long, default_value_t = 2.0)]
    kill_every: f64,
    /// Chooses the members that are killed; printed, to repeat a run
    #[arg(long)]
    seed: Option<u64>,
}

fn read(args: &Args) -> anyhow::Result<Vec<u8>> {
    if let Some(file) = &args.input {
        return std::fs::read(file).with_context(|| file.display().to_string());
    }
    let output = Command::new("apt-cache").arg("dumpavail").output().context("apt-cache: give a file with --input")?;
    ensure!(output.status.success(), "apt-cache dumpavail: {}", output.status);
    ensure!(
        !output.stdout.is_empty(),
        "this machine has no package lists: run `apt-get update`, or give a file with --input"
    );
    Ok(output.stdout)
}

#[tokio::main]
async fn main() -> ExitCode {
    match import(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("import-debian: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn import(args: &Args) -> anyhow::Result<()> {
    let program = support::cluster::binary();
    if !program.exists() {
        let profile = if cfg!(debug_assertions) { "" } else { " --release" };
        bail!("{} is missing: run `cargo build{profile}` first", program.display());
    }
    let mut stanzas = run::stanzas(&read(args)?);
    stanzas.truncate(args.limit.unwrap_or(usize::MAX));
    ensure!(!stanzas.is_empty(), "there is no stanza with a Package and a Version in the input");
    let options = run::Options {
        clients: args.clients,
        kill_every: Duration::from_secs_f64(args.kill_every),
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
    };
    println!("{} keys, {} clients, seed {}", stanzas.len(), options.clients, options.seed);
    let mut cluster = support::cluster::Cluster::new(3);
    cluster.set("log.segment_bytes", "64MiB");
    let report = run::run(&mut cluster, stanzas, &options).await;
    println!("{report}");
    ensure!(
        report.lost.is_empty(),
        "{} acknowledged keys are lost or changed, such as {}",
        report.lost.len(),
        report.lost[0]
    );
    println!("nothing that was acknowledged is lost");
    Ok(())
}
