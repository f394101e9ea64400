//! The example `quorate-nemesis`, in short: real members under faults, judged. `cargo test` builds examples beside the binary.

use std::path::Path;
use std::process::Command;

use crate::support::tools;

fn quorate_nemesis(args: &[&str]) -> String {
    let example = Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("quorate-nemesis");
    let output = tools::run(Command::new(example).args(args));
    // Its seed is among it.
    println!("{output}");
    output
}

#[test]
fn members_that_are_killed_at_random_lose_nothing_that_was_acknowledged() {
    let output = quorate_nemesis(&["kills", "--cycles", "5"]);
    assert!(output.contains("acknowledged, lost 0, read from each member"), "{output}");
    assert!(
        output.contains("\nlinearizable, and the watches are of it") && output.contains("\nevery promise was kept")
    );
}

#[test]
fn members_under_every_fault_in_turn_keep_every_promise() {
    let output = quorate_nemesis(&["faults", "--duration", "12s"]);
    if let Some(why) = output.lines().find(|line| line.starts_with("without partitions and full disks")) {
        tools::skip(why, tools::is_set("QUORATE_REQUIRE_TOOLS"));
    }
    assert!(
        output.contains("\nlinearizable, and the watches are of it") && output.contains("\nevery promise was kept")
    );
}
