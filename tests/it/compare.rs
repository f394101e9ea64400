//! The example that compares us with etcd, in short: `cargo test` builds examples beside the binary.

use std::path::Path;
use std::process::Command;

use crate::support::tools;

/// Twice into one directory, with few of everything.
#[test]
fn a_short_comparison_has_a_figure_of_every_work() {
    let dir = tempfile::tempdir().unwrap();
    let example = Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("compare");
    let run = |args: &[&str]| {
        let small = ["--rounds", "1", "--seconds", "0.2", "--clients", "4", "--keys", "200", "--many-keys", "2000"];
        let mut command = Command::new(&example);
        tools::run(command.args(small).args(args).arg("--write").arg(dir.path()))
    };
    run(&["--works", "put,get,get-serializable,mixed,range,txn,large-put,watch,keep-alive,one-client"]);
    // With etcd the rest takes long; that its members start and answer was seen above.
    run(&["--only", "ours", "--works", "put-by-keys,put-by-value,memory,long,load,restart,pause"]);
    let figures = std::fs::read_to_string(dir.path().join("figures.csv")).unwrap();
    let readme = std::fs::read_to_string(dir.path().join("README.md")).unwrap();
    for work in [
        "put",
        "get",
        "get-serializable",
        "mixed",
        "range",
        "txn",
        "large-put",
        "watch",
        "keep-alive",
        "one-client",
        "put-by-keys",
        "put-by-value",
        "memory",
        "long",
        "load",
        "restart",
        "pause",
    ] {
        assert!(figures.contains(&format!("\n{work},")), "no figure of {work}:\n{figures}");
        assert!(readme.contains(&format!("\n| {work} |")), "no row of {work}:\n{readme}");
    }
    for plot in ["cost-4-clients", "put-by-keys", "put-by-value", "pause"] {
        let svg = std::fs::read_to_string(dir.path().join(plot).with_extension("svg")).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("<path "), "{plot}: {svg}");
    }
}
