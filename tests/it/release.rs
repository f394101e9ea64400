//! What a release consists of: made twice from the binary under test, it is the same; packages hold what they must, and their parts work.
//!
//! Absent: building for another machine, and installing under a real systemd.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::cluster::binary;
use crate::support::tools::{HELM, Tool, is_set, require, run, skip};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TOOLS: [Tool; 5] = [
    Tool { name: "dpkg-deb", install: "`apt-get install dpkg`" },
    Tool { name: "strip", install: "`apt-get install binutils`" },
    Tool { name: "objdump", install: "`apt-get install binutils`" },
    Tool { name: "tar", install: "`apt-get install tar`" },
    Tool { name: "python3", install: "`apt-get install python3`" },
];

fn has_tools() -> bool {
    TOOLS.iter().all(|tool| require(tool).is_some())
}

/// Everything but the debug information, which is large here.
fn build(out: &Path) -> BTreeMap<String, String> {
    let script = format!("{ROOT}/release/build");
    run(Command::new(script).arg("--out").arg(out).arg("--binary").arg(binary()).args(["--without", "debug"]));
    let sums = std::fs::read_to_string(out.join("SHA256SUMS")).unwrap();
    sums.lines()
        .map(|line| line.split_once("  ").map(|(sum, name)| (name.to_owned(), sum.to_owned())).unwrap())
        .collect()
}

fn find(out: &Path, end: &str) -> std::path::PathBuf {
    let names = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    names
        .into_iter()
        .find(|path| path.to_str().unwrap().ends_with(end))
        .unwrap_or_else(|| panic!("no {end} in {out:?}"))
}

#[test]
fn a_release_is_the_same_when_it_is_made_again_and_holds_what_it_must() {
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let sums = build(&one);
    assert_eq!(sums, build(&two), "the same input gives the same bytes");
    assert_eq!(sums.len(), 5, "tarball, .deb, image, chart, SBOM: {sums:?}");
    run(Command::new("sha256sum").args(["--check", "--quiet", "SHA256SUMS"]).current_dir(&one));
    check_tarball(&one, dir.path());
    check_deb(&one, dir.path());
    check_image(&one, dir.path());
    let bom: Value = serde_json::from_str(&std::fs::read_to_string(find(&one, ".cdx.json")).unwrap()).unwrap();
    let crates = bom["components"].as_array().unwrap();
    let has = |name: &str| crates.iter().any(|one| one["name"] == name && one["hashes"][0]["content"].is_string());
    assert!(has("openraft") && has("tokio") && !has("proptest"), "{} crates", crates.len());
    if let Some(helm) = require(&HELM) {
        run(Command::new(helm).args(["template", "kv", "--kube-version", "1.30.0"]).arg(find(&one, ".tgz")));
    }
}

fn check_tarball(out: &Path, scratch: &Path) {
    let tree = scratch.join("tarball");
    std::fs::create_dir(&tree).unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("--strip-components=1").arg("-xzf").arg(find(out, ".tar.gz")));
    let said = run(Command::new(tree.join("quorate")).arg("--version"));
    assert!(said.starts_with("quorate "), "{said}");
    for file in [
        "LICENSE",
        "README.md",
        "quorate.service",
        "quorate.toml",
        "man/quorate.1",
        "man/quorate-serve.1",
        "completions/quorate.bash",
    ] {
        assert!(tree.join(file).exists(), "{file}");
    }
    let page = std::fs::read_to_string(tree.join("man/quorate-snapshot-save.1")).unwrap();
    assert!(page.contains(".TH") && page.contains("snapshot"), "{page}");
}

fn check_deb(out: &Path, scratch: &Path) {
    let (package, tree) = (find(out, ".deb"), scratch.join("deb"));
    let field = |name: &str| run(Command::new("dpkg-deb").arg("--field").arg(&package).arg(name)).trim().to_owned();
    assert_eq!(field("Package"), "quorate");
    let depends = field("Depends");
    assert!(depends.contains("libc6 (>= 2."), "{depends}");
    let list = run(Command::new("dpkg-deb").arg("--contents").arg(&package));
    assert!(list.lines().all(|line| line.contains(" root/root ")), "{list}");
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(&package).arg(&tree));
    run(Command::new(tree.join("usr/bin/quorate")).arg("--version"));
    for file in [
        "usr/share/man/man1/quorate.1.gz",
        "usr/share/bash-completion/completions/quorate",
        "usr/share/doc/quorate/copyright",
        "usr/share/doc/quorate/changelog.gz",
    ] {
        assert!(tree.join(file).exists(), "{file}");
    }
    for script in ["postinst", "prerm", "postrm"] {
        run(Command::new("sh").arg("-n").arg(tree.join("DEBIAN").join(script)));
    }
    run(Command::new("md5sum").args(["--check", "--quiet", "DEBIAN/md5sums"]).current_dir(&tree));
    // The server takes the file that the package installs, and it is reached from this machine alone.
    let config = tree.join("etc/quorate/quorate.toml");
    let shown = run(Command::new(binary()).args(["config", "--config"]).arg(config));
    assert!(shown.contains("listen_client = \"127.0.0.1:2379\"") && shown.contains("/var/lib/quorate/data"), "{shown}");
    assert_eq!(std::fs::read_to_string(tree.join("DEBIAN/conffiles")).unwrap(), "/etc/quorate/quorate.toml\n");
    check_unit(&std::fs::read_to_string(tree.join("lib/systemd/system/quorate.service")).unwrap());
}

/// The unit says what the server does: its command line, how it reports, and how long it may take to stop.
fn check_unit(unit: &str) {
    let value = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
        line.unwrap_or_else(|| panic!("no {key} in {unit}"))
    };
    assert_eq!((value("Type"), value("User")), ("notify", "quorate"));
    let words: Vec<&str> = value("ExecStart").split(' ').collect();
    assert_eq!(words[0], "/usr/bin/quorate");
    <quorate::cli::Cli as clap::Parser>::try_parse_from(words).unwrap();
    let stop: u64 = value("TimeoutStopSec").parse().unwrap();
    assert!(Duration::from_secs(stop) > quorate::config::Config::default().server.grace_period);
}

/// An archive as OCI's image layout has it; its one layer starts without anything of this machine.
fn check_image(out: &Path, scratch: &Path) {
    let layout = scratch.join("layout");
    std::fs::create_dir(&layout).unwrap();
    run(Command::new("tar").arg("-C").arg(&layout).arg("-xf").arg(find(out, ".oci.tar")));
    let json = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let blob = |entry: &Value| {
        layout.join("blobs/sha256").join(entry["digest"].as_str().unwrap().trim_start_matches("sha256:"))
    };
    assert_eq!(json(&layout.join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let manifest = json(&blob(&json(&layout.join("index.json"))["manifests"][0]));
    let config = json(&blob(&manifest["config"]));
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"][0], "/usr/local/bin/quorate");
    let layer = &manifest["layers"][0];
    assert_eq!(std::fs::metadata(blob(layer)).unwrap().len(), layer["size"].as_u64().unwrap());
    let tree = scratch.join("rootfs");
    std::fs::create_dir(&tree).unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("-xzf").arg(blob(layer)));
    let inside = Command::new("unshare")
        .args(["--map-root-user", "chroot"])
        .arg(&tree)
        .args(["/usr/local/bin/quorate", "--version"])
        .output();
    match inside {
        Ok(output) if output.status.success() => {}
        // Where no namespace can be made nothing can be started in it.
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("unshare") => {
            skip("no namespace can be made here", is_set("QUORATE_REQUIRE_TOOLS"));
        }
        other => panic!("{other:?}"),
    }
}

/// `Type=notify`: systemd hears that the service is ready when clients can connect, and not before.
#[test]
fn the_service_says_that_it_is_ready_when_clients_can_connect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(crate::support::cluster::PATIENCE)).unwrap();
    let mut server = Command::new(binary())
        .args([
            "serve",
            "--name",
            "kv-0",
            "--listen-client",
            "127.0.0.1:0",
            "--listen-peer",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(dir.path().join("data"))
        .env("NOTIFY_SOCKET", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut message = [0; 64];
    let length = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1");
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("listening"), "{log}");
    server.kill().unwrap();
    server.wait().unwrap();
}
