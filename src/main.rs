//! The `quorate` binary.

use std::process::ExitCode;

use clap::Parser;
use quorate::cli::{self, Cli};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quorate: {error:#}");
            ExitCode::FAILURE
        }
    }
}
