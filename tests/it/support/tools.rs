//! Programs that some tests need beside cargo.
//!
//! Owns the rule for a program that is missing: the test says `SKIPPED` and why, and passes; with
//! `QUORATE_REQUIRE_TOOLS=1`, which `.ci/run` sets, it fails. Absent: installing anything.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A program, and how a person gets it.
pub struct Tool {
    pub name: &'static str,
    pub install: &'static str,
}

pub const ETCD: Tool = Tool { name: "etcd", install: "`apt-get install etcd-server`" };
pub const ETCDCTL: Tool = Tool { name: "etcdctl", install: "`apt-get install etcd-client`" };
/// No registry has it as a program: `.ci/run` builds it.
pub const ETCD_37: Tool =
    Tool { name: "etcd-3.7", install: "`cd .ci/etcd && go build -o DIR/etcd-3.7 go.etcd.io/etcd/server/v3`" };
pub const ETCDCTL_37: Tool =
    Tool { name: "etcdctl-3.7", install: "`cd .ci/etcd && go build -o DIR/etcdctl-3.7 go.etcd.io/etcd/etcdctl/v3`" };
pub const CURL: Tool = Tool { name: "curl", install: "`apt-get install curl`" };
/// `QUORATE_PYTHON` names another.
pub const PYTHON: Tool = Tool { name: "python3", install: "`pip install -r examples/clients/requirements.txt`" };
pub const HELM: Tool = Tool { name: "helm", install: "`go install helm.sh/helm/v3/cmd/helm@v3.21.4`" };
pub const DEBOOTSTRAP: Tool = Tool { name: "debootstrap", install: "`apt-get install debootstrap`" };

/// The program on PATH; where it is missing, `None` with a line that says so, or a failed test (see the head of this file).
#[track_caller]
pub fn require(tool: &Tool) -> Option<PathBuf> {
    let found = find(tool);
    if found.is_none() {
        skip(
            &format!("{} is not on PATH; install it with {}", tool.name, tool.install),
            is_set("QUORATE_REQUIRE_TOOLS"),
        );
    }
    found
}

/// A Python that has `module`: the one that `QUORATE_PYTHON` names, else the one on PATH.
#[track_caller]
pub fn require_python(tool: &Tool, module: &str) -> Option<PathBuf> {
    let python = std::env::var_os("QUORATE_PYTHON").map(PathBuf::from).or_else(|| find(tool));
    let has = |python: &PathBuf| {
        let probe = Command::new(python).args(["-c", &format!("import {module}")]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    let found = python.filter(has);
    if found.is_none() {
        let reason = format!("no {} with the module {module}; install it with {}", tool.name, tool.install);
        skip(&reason, is_set("QUORATE_REQUIRE_TOOLS"));
    }
    found
}

/// Says that this test is skipped and why; fails it instead when what is missing was required.
#[track_caller]
pub fn skip(reason: &str, required: bool) {
    let here = std::panic::Location::caller();
    let thread = std::thread::current();
    // With one test thread the harness runs tests on `main`: the place in the source says which test it is.
    let test = match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => here.to_string(),
    };
    assert!(!required, "{test}: {reason}");
    // Not `eprintln!`: the harness keeps that to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// Whether a process can be given a small disk here; says that the test is skipped if not.
#[track_caller]
pub fn can_have_small_disks() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let probe = on_small_disk_running(Path::new("true"), dir.path(), 1 << 20).output();
    let why = match probe {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    skip(&format!("a tmpfs cannot be mounted in a namespace of its own: {why}"), is_set("QUORATE_REQUIRE_TOOLS"));
    false
}

/// The program under test, in a mount namespace in which `dir` is a file system of `bytes`. It is gone with the process.
pub fn on_small_disk(dir: &Path, bytes: u64) -> Command {
    on_small_disk_running(&super::cluster::binary(), dir, bytes)
}

fn on_small_disk_running(program: &Path, dir: &Path, bytes: u64) -> Command {
    std::fs::create_dir_all(dir).unwrap();
    let script = format!("mount -t tmpfs -o size={bytes} tmpfs \"$0\" && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script]).arg(dir).arg(program);
    command
}

/// Whether an environment variable is on.
pub fn is_set(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Runs a command to its end and returns its standard output; fails the test with all that it printed if it failed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    // Where CI asks for backtraces, those of a program would push its message out of what is shown.
    command.env("RUST_BACKTRACE", "0");
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?} failed ({status})\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// The program on PATH.
pub fn find(tool: &Tool) -> Option<PathBuf> {
    on_path(tool.name)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[test]
fn missing_tool_fails_where_it_is_required() {
    assert!(on_path("sh").is_some());
    assert_eq!(on_path("no-such-program-anywhere"), None);
    assert!(std::panic::catch_unwind(|| skip("not there", true)).is_err());
}
