//! The simulation as a command: it repeats itself bit by bit, keeps its promises for a few seeds, and finds planted faults.
//!
//! `cargo test` builds examples beside the binary.

use std::path::Path;
use std::process::Command;

use quorate::testing::sim::Report;

use crate::support::tools;

fn quorate_sim() -> Command {
    Command::new(Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("quorate-sim"))
}

fn play(seed: u64) -> Report {
    let output = tools::run(quorate_sim().args(["--play", &seed.to_string()]));
    serde_json::from_str(&output).expect("a report")
}

/// Messages, calls to disks, what is logged, and what clients are told: all of it at the same simulated time.
#[test]
fn the_same_seed_gives_the_same_trace() {
    let pairs = [1, 2].map(|seed| {
        let (first, second) = (play(seed), play(seed));
        assert!(first.trace_events > 1000, "seed {seed}: {} events", first.trace_events);
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!((first.trace_events, &first.counts), (second.trace_events, &second.counts), "seed {seed}");
        first.trace_hash
    });
    assert_ne!(pairs[0], pairs[1], "another seed is another run");
}

/// What the example's documentation promises of its summary, and of its exit status.
#[test]
fn the_command_sums_up_and_catches_a_planted_fault() {
    let dir = tempfile::tempdir().unwrap();
    let out = ["--out", dir.path().to_str().unwrap()];
    let output = tools::run(quorate_sim().args(["--seeds", "0..2"]).args(out));
    assert!(output.contains("2 seeds, ") && output.contains("; 0 violations"), "{output}");
    let output = tools::run(quorate_sim().args(["--planted", "read-without-read-index", "--seeds", "0..20"]).args(out));
    assert!(output.contains("| linearizable |"), "{output}");
}
