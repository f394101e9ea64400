//! The example `differ`, in short, and the table of its wanted differences. `cargo test` builds examples beside the binary.

#[path = "../../examples/differ/call.rs"]
#[allow(dead_code, reason = "only the lists are read here")]
pub mod call;
#[path = "../../examples/differ/compare.rs"]
#[allow(dead_code, reason = "only the list is read here")]
mod compare;
#[path = "../../examples/differ/wanted.rs"]
#[allow(dead_code, reason = "only the list is read here")]
mod wanted;

use std::path::Path;
use std::process::Command;

use crate::support::tools::{self, ETCD_37};

/// Of each of two runs, which together take less than a minute in a debug build on two cores. More: `.ci/long differ`.
const REQUESTS: &str = "1250";

#[test]
fn random_requests_are_answered_as_by_etcd() {
    let Some(etcd) = tools::require(&ETCD_37) else { return };
    let example = Path::new(env!("CARGO_BIN_EXE_quorate")).with_file_name("examples").join("differ");
    let requests = std::env::var("QUORATE_DIFFER_REQUESTS").unwrap_or_else(|_| REQUESTS.to_owned());
    let run = |args: &[&str]| {
        let mut command = Command::new(&example);
        // Its seed is in what it prints.
        println!("{}", tools::run(command.args(["--requests", &requests]).arg("--etcd").arg(&etcd).args(args)));
    };
    // The same always: it meets what each planted fault needs. Other seeds: `.ci/long differ`.
    run(&["--seed", "1", "--planted"]);
    run(&["--seed", "2"]);
}

/// `QUORATE_WRITE_DOCS=1` writes it.
#[test]
fn documentation_has_the_table_of_wanted_differences() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/from-etcd.md");
    let text = std::fs::read_to_string(&file).expect("the document is there");
    let (begin, end) = ("<!-- differences -->\n", "<!-- end of differences -->");
    let (before, rest) = text.split_once(begin).expect("the table's begin is marked");
    let (found, after) = rest.split_once(end).expect("the table's end is marked");
    let table = wanted::table();
    if tools::is_set("QUORATE_WRITE_DOCS") {
        std::fs::write(&file, format!("{before}{begin}{table}{end}{after}")).expect("the document can be written");
    } else {
        assert!(found == table, "write it anew: QUORATE_WRITE_DOCS=1 cargo test --test it wanted_differences\n{table}");
    }
}
