//! The image: built from the Dockerfile on a base that debootstrap makes, and started.
//!
//! Needs a Docker engine (`DOCKER_HOST` or the usual socket) and root, so it is skipped where there is none unless
//! `QUORATE_REQUIRE_DOCKER=1`. `DOCKER` names the client to use where PATH's cannot build with BuildKit.
//! The binary is the one under test, through the Dockerfile's `BINARY=prebuilt`. Absent: the stage that compiles.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::tools::{DEBOOTSTRAP, is_set, require, run, skip};

const BASE: &str = "quorate-test-base";
const IMAGE: &str = "quorate-test";
/// Debian's release on this machine: the base must not have an older glibc than the binary was linked with.
const OS_RELEASE: &str = "/etc/os-release";

fn docker() -> Command {
    let mut command = Command::new(std::env::var_os("DOCKER").unwrap_or_else(|| "docker".into()));
    command.env("DOCKER_BUILDKIT", "1");
    command
}

/// Whether there is all that this needs; says what is missing.
fn has_engine() -> bool {
    let answered = docker().args(["info", "--format", "{{.ServerVersion}}"]).output();
    if answered.is_ok_and(|output| output.status.success()) {
        return true;
    }
    skip(
        "no Docker engine answers; install one with `apt-get install docker.io` and start `dockerd`",
        is_set("QUORATE_REQUIRE_DOCKER"),
    );
    false
}

/// Makes the base image; its tree is kept below the target directory for the next run.
fn make_base(debootstrap: &Path) {
    let tree = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("debian-base");
    let done = tree.join(".complete");
    if !done.exists() {
        let _ = std::fs::remove_dir_all(&tree);
        let release = std::fs::read_to_string(OS_RELEASE).expect("the machine names its release");
        let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        run(Command::new(debootstrap).arg("--variant=minbase").arg(codename.expect("Debian has one")).arg(&tree));
        std::fs::write(&done, "").expect("the tree can be marked");
    }
    let mut pack = Command::new("tar");
    let mut pack = pack.arg("-C").arg(&tree).args(["-c", "."]).stdout(Stdio::piped()).spawn().expect("tar runs");
    let packed = pack.stdout.take().expect("it is piped");
    run(docker().args(["import", "-", BASE]).stdin(packed));
    assert!(pack.wait().expect("tar ends").success(), "tar failed");
}

fn build_image(binary: &Path) {
    let context = tempfile::tempdir().expect("a directory can be made");
    std::fs::copy(binary, context.path().join("quorate")).expect("the binary can be copied");
    run(docker()
        .args(["build", "--network", "none", "--build-arg", "BINARY=prebuilt", "--tag", IMAGE])
        .args(["--build-arg", &format!("RUNTIME_IMAGE={BASE}"), "--file"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile"))
        .arg(context.path()));
}

/// A container that is removed when the test is done with it, passed or not.
struct Container {
    name: String,
    client: Child,
}

impl Container {
    fn start(arguments: &[&str], command: &[&str]) -> Self {
        let name = format!("quorate-test-{}", std::process::id());
        let mut docker = docker();
        docker.args(["run", "--rm", "--name", &name]).args(arguments).arg(IMAGE).args(command);
        let client = docker.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("docker runs");
        Self { name, client }
    }

    /// All that it printed, after ending it.
    fn output(&mut self) -> String {
        let _ = docker().args(["rm", "--force", &self.name]).output();
        let mut text = String::new();
        for pipe in [
            self.client.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read>),
            self.client.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn std::io::Read>),
        ] {
            pipe.map(|mut pipe| pipe.read_to_string(&mut text));
        }
        text
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = docker().args(["rm", "--force", &self.name]).output();
        let _ = self.client.wait();
    }
}

/// Whether somebody connects before `patience` is over.
fn is_reached(listener: &TcpListener, patience: Duration) -> bool {
    listener.set_nonblocking(true).expect("a listener can be polled");
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if listener.accept().is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

#[test]
fn image_runs_unprivileged_and_resolves_its_peers() {
    if !has_engine() {
        return;
    }
    let Some(debootstrap) = require(&DEBOOTSTRAP) else { return };
    make_base(&debootstrap);
    build_image(Path::new(env!("CARGO_BIN_EXE_quorate")));

    let restricted = ["--read-only", "--cap-drop", "ALL", "--network", "none", "--entrypoint"];
    let inspect = |program: &str, arguments: &[&str]| {
        run(docker().args(["run", "--rm"]).args(restricted).args([program, IMAGE]).args(arguments))
    };
    assert_eq!(inspect("id", &["-u"]).trim(), "65532");
    let libraries = inspect("ldd", &["/usr/local/bin/quorate"]);
    assert!(libraries.contains("libc.so.6") && !libraries.contains("not found"), "{libraries}");

    // Slot 1 is a listener of this test; only the name service of the image knows that its name means this machine.
    let peer = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let port = peer.local_addr().expect("it is bound").port();
    let mut container = Container::start(
        &[
            "--read-only",
            "--cap-drop=ALL",
            "--network=host",
            "--tmpfs=/var/lib/quorate:uid=65532,gid=65532,mode=0700",
            "--add-host=kv-0.kv-headless:127.0.0.2",
            "--add-host=kv-1.kv-headless:127.0.0.1",
            "--env=POD_NAME=kv-0",
            &format!("--env=QUORATE_CLUSTER__PEERS=kv-%d.kv-headless:{port}"),
            "--env=QUORATE_CLUSTER__SIZE=2",
            &format!("--env=QUORATE_SERVER__LISTEN_PEER=127.0.0.2:{port}"),
            "--env=QUORATE_SERVER__LISTEN_CLIENT=127.0.0.2:0",
            "--env=QUORATE_SERVER__DATA_DIR=/var/lib/quorate/data",
        ],
        &["serve"],
    );
    let reached = is_reached(&peer, Duration::from_secs(30));
    assert!(reached, "the member did not connect to its peer by name:\n{}", container.output());
}
