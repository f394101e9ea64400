//! `quorate dev`, as a user runs it.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::support::cluster::{binary, free_host, wait_for};

/// A running `quorate dev` and what it has printed.
struct Dev {
    child: Child,
    printed: Arc<Mutex<String>>,
    root: tempfile::TempDir,
    endpoints: String,
}

impl Dev {
    fn start(flags: &[&str]) -> Self {
        let (a, b) = free_host();
        let root = tempfile::tempdir().unwrap();
        let mut child = Command::new(binary())
            .args(["dev", "--host", &format!("127.{a}.%d.{b}")])
            .args(flags)
            .arg("--data-dir")
            .arg(root.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let printed = Arc::<Mutex<String>>::default();
        let (mut lines, sink) = (BufReader::new(child.stdout.take().unwrap()).lines(), printed.clone());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                sink.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let endpoints = format!("127.{a}.0.{b}:2379,127.{a}.1.{b}:22379,127.{a}.2.{b}:32379");
        Self { child, printed, root, endpoints }
    }

    async fn wait_printed(&self, part: &str) {
        wait_for(&format!("dev to print {part:?}"), async || {
            let text = self.printed.lock().unwrap().clone();
            if text.contains(part) { Ok(()) } else { Err(text) }
        })
        .await;
    }

    /// Runs a client command until it succeeds.
    async fn client(&self, args: &[&str], endpoints: &str) -> String {
        wait_for(&format!("{args:?} to succeed"), async || {
            let output = Command::new(binary()).args(args).args(["--endpoints", endpoints]).output().await.unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
        })
        .await
    }
}

/// Processes whose command line names something in `dir`.
fn processes_with(dir: &Path) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        // A process may be gone by now.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(dir.to_str().unwrap()) {
            found.push((pid, line));
        }
    }
    found
}

/// Three pods start and serve, a killed one is started again on its disk, and Ctrl-C leaves no process behind.
#[tokio::test(flavor = "multi_thread")]
async fn dev_serves_revives_and_stops_cleanly() {
    let mut dev = Dev::start(&[]);
    dev.wait_printed(&dev.endpoints).await;
    dev.wait_printed(" leads (term ").await;
    let all = dev.endpoints.clone();
    dev.client(&["put", "greeting", "hello"], &all).await;
    for endpoint in all.split(',') {
        assert_eq!(dev.client(&["get", "greeting", "--print-value-only"], endpoint).await.trim(), "hello");
    }
    let pods = processes_with(dev.root.path());
    let victim = pods.iter().find(|(_, line)| line.contains("serve") && line.contains("quorate-1")).unwrap();
    assert_eq!(pods.len(), 4, "dev and three pods: {pods:#?}");
    kill_process(victim.0, Signal::KILL).unwrap();
    dev.wait_printed("quorate-1 has died").await;
    let revived = all.split(',').nth(1).unwrap();
    assert_eq!(dev.client(&["get", "greeting", "--print-value-only"], revived).await.trim(), "hello");
    let this = Pid::from_raw(dev.child.id().unwrap() as i32).unwrap();
    kill_process(this, Signal::INT).unwrap();
    let status = wait_for("dev to end", async || dev.child.try_wait().unwrap().ok_or("it runs")).await;
    assert!(status.success(), "{status}: {}", dev.printed.lock().unwrap());
    assert_eq!(processes_with(dev.root.path()), []);
    dev.wait_printed("the data stays in").await;
    assert!(dev.root.path().join("quorate-1").join("current").exists());
}

/// What it prints is all that a client needs, and without it nobody is served.
#[tokio::test(flavor = "multi_thread")]
async fn dev_with_tls_prints_what_clients_need() {
    let dev = Dev::start(&["--tls"]);
    dev.wait_printed(" leads (term ").await;
    let printed = dev.printed.lock().unwrap().clone();
    let variables: Vec<(String, String)> = printed
        .lines()
        .filter_map(|line| line.split_once("export ")?.1.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(variables.len(), 3, "{printed}");
    let endpoint = dev.endpoints.split(',').next().unwrap().to_owned();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(binary());
        command.args(args).args(["--endpoints", &format!("https://{endpoint}")]);
        command
    };
    let put = ["put", "greeting", "hello"];
    wait_for("a put with what was printed", async || {
        let output = run(&put).envs(variables.clone()).output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    })
    .await;
    assert!(!run(&put).output().unwrap().status.success(), "without the CA the server is trusted");
    assert!(!run(&put).envs(variables[..1].to_vec()).output().unwrap().status.success(), "without a certificate");
}
