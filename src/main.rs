//! The `quorate` binary.

use std::process::ExitCode;

use quorate::cli::{self, Cli};

#[cfg(not(feature = "count-allocations"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(feature = "count-allocations")]
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let done = match args.next() {
        program if cli::etcd::is_called(program.as_ref()) => {
            cli::run(Cli { command: cli::Command::Etcd { args: args.collect() } })
        }
        _ => cli::run(cli::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quorate: {}", cli::said(&error));
            ExitCode::FAILURE
        }
    }
}
