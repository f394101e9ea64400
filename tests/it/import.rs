//! The import example, in short: `cargo test` builds examples beside the binary.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::support::tools;

#[test]
fn stanzas_imported_while_pods_die_are_all_there() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("stanzas");
    let mut text = String::new();
    for i in 0..4000 {
        let padding = "x".repeat(i % 1500);
        writeln!(text, "Package: package-{i}\nVersion: 1.{i}-1\nDescription: {padding}\n").unwrap();
    }
    // Larger than a message may be, and larger than a request may be: left out.
    for (i, bytes) in [3 << 20, 1536 << 10].into_iter().enumerate() {
        writeln!(text, "Package: huge-{i}\nVersion: 1\nDescription: {}\n", "x".repeat(bytes)).unwrap();
    }
    std::fs::write(&input, text).unwrap();
    let example = Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("import-debian");
    let output = tools::run(Command::new(example).arg("--input").arg(&input).args(["--kill-every", "500ms"]));
    assert!(output.contains("acknowledged: 4000, too large: 2,"), "{output}");
    assert!(output.contains("nothing acknowledged was lost"), "{output}");
}
