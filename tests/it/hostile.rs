//! The example `hostile`, in short: every kind of abuse beside good clients. `cargo test` builds examples beside the binary.

use std::path::Path;
use std::process::Command;

use crate::support::tools;

/// Latencies and elections are for an optimized build on a quiet machine (`.ci/long hostile`): here the members, the hostile processes and
/// other tests share two cores.
#[test]
fn hostile_clients_of_every_kind_end_no_member_and_lose_nothing() {
    let example = Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("hostile");
    let few = ["--duration", "20s", "--keys", "5000", "--hostile", "2"];
    let generous = ["--rise-max", "60000", "--elections-max", "20", "--memory-max", "2048"];
    let output = tools::run(Command::new(example).args(few).args(generous));
    // Its seed is among it.
    println!("{output}");
    assert!(output.contains("nothing lost, nothing wrong"), "{output}");
}
