//! Real members under faults, used by clients who write down what they are told, and judged by the checkers of the simulation.
//!
//! Build the program too (`cargo build --release`), then
//!
//!     cargo run --release --example quorate-nemesis -- kills --cycles 200    # SIGKILL of any of three, again and again
//!     cargo run --release --example quorate-nemesis -- faults --duration 10m # every fault in turn, over a played StatefulSet
//!
//! prints the seed, what happened and what was counted. Ends with 1 if a promise was not kept, with a picture of a history that is
//! not linearizable. A seed repeats the faults and what is asked, not the schedule of the machine.
//! Partitions and full disks need namespaces (`unshare`, `ip`, `iptables`); where they cannot be made, the run says why and goes
//! on with the other faults. Absent: wrong clocks, since no member asks for the time of day (`docs/reliability.md`).

#[path = "../../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

mod crowd;
mod faults;
mod kills;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use quorate::config::units;
use quorate::testing::verdict::Violation;

#[derive(clap::Parser)]
#[command(about = "Real members under faults, judged")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
    /// Decides what happens and what is asked; a random one if it is not set
    #[arg(long, global = true)]
    seed: Option<u64>,
    /// Where the picture of a violation goes
    #[arg(long, global = true, value_name = "DIR", default_value = "target/nemesis")]
    out: PathBuf,
}

#[derive(clap::Subcommand)]
enum Mode {
    /// Kill a random part of three members and start it again, so many times
    Kills {
        #[arg(long, default_value_t = 200)]
        cycles: u64,
    },
    /// One fault after another for so long
    Faults {
        #[arg(long, default_value = "10m", value_parser = units::duration::parse)]
        duration: Duration,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    // Before there is a thread: the program begins anew in there.
    let lacking = match arguments.mode {
        Mode::Faults { .. } => support::namespace::enter().err(),
        Mode::Kills { .. } => None,
    };
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("seed: {seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let judged = runtime.block_on(async {
        match arguments.mode {
            Mode::Kills { cycles } => kills::run(cycles, seed).await,
            Mode::Faults { duration } => faults::run(duration, seed, lacking).await,
        }
    });
    let Err(Violation { check, what, picture }) = judged else {
        println!("every promise was kept");
        return Ok(ExitCode::SUCCESS);
    };
    println!("{check}: {what}");
    if let Some(picture) = picture {
        std::fs::create_dir_all(&arguments.out)?;
        let file = arguments.out.join(format!("seed-{seed}.svg"));
        std::fs::write(&file, picture)?;
        println!("picture: {}", file.display());
    }
    Ok(ExitCode::FAILURE)
}
