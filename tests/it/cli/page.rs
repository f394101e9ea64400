//! `docs/cli.md`: it names every command, and what it says runs. Its blocks are of `bash`, as they need a cluster of three; those of `sh`, in
//! other pages, are run by `docs`.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::*;
use crate::support::cluster::{PATIENCE, binary, free_host, wait_for};

/// What the page's names stand for here.
fn substituted(text: &str, names: &[(String, String)]) -> String {
    names.iter().fold(text.to_owned(), |text, (name, here)| text.replace(name, here))
}

/// The page's blocks: how each is run, and its lines.
fn blocks(page: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(kind) = line.strip_prefix("```bash") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push((kind.trim().to_owned(), block.join("\n")));
        }
    }
    blocks
}

fn bash(block: &str, dir: &Path, endpoints: &str) -> Command {
    let mut command = Command::new("bash");
    let path = std::env::var("PATH").unwrap();
    command
        .args(["-euo", "pipefail", "-c", block])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", binary().parent().unwrap().display()))
        .env("QUORATE_ENDPOINTS", endpoints)
        // Ctrl-C goes to all of a terminal's group.
        .process_group(0)
        .stdin(Stdio::null());
    command
}

/// Runs a block to its end.
fn run(block: &str, dir: &Path, endpoints: &str) {
    let output = bash(block, dir, endpoints).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(3000).collect::<String>();
    assert!(output.status.success(), "{block}\n{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
}

/// Runs a block until it has printed `part`, and then sends it Ctrl-C, or SIGTERM as a supervisor does; it must end well.
fn interrupt(block: &str, dir: &Path, endpoints: &str, (signal, part): (Signal, &str)) {
    let said = dir.join("said");
    let file = || std::fs::OpenOptions::new().create(true).append(true).open(&said).unwrap();
    std::fs::write(&said, "").unwrap();
    let block = format!("exec {block}");
    let mut child = bash(&block, dir, endpoints).stdout(file()).stderr(file()).spawn().unwrap();
    let group = Pid::from_raw(child.id() as i32).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let (mut signalled, mut ended) = (false, false);
    while !ended && Instant::now() < deadline {
        if !signalled && std::fs::read_to_string(&said).unwrap().contains(part) {
            kill_process_group(group, signal).unwrap();
            signalled = true;
        }
        std::thread::sleep(Duration::from_millis(20));
        ended = child.try_wait().unwrap().is_some();
    }
    if !ended {
        kill_process_group(group, Signal::KILL).unwrap();
    }
    let status = child.wait().unwrap();
    let said = std::fs::read_to_string(&said).unwrap();
    assert!(signalled && status.success(), "{block}: {status}: {said}");
}

fn leaves(command: &clap::Command, path: &str, into: &mut Vec<String>) {
    let inner: Vec<_> = command.get_subcommands().filter(|inner| !inner.is_hide_set()).collect();
    if inner.is_empty() {
        into.push(path.to_owned());
    }
    inner.iter().for_each(|one| leaves(one, &format!("{path} {}", one.get_name()), into));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_names_every_command_and_each_of_its_blocks_runs() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/cli.md")).unwrap();
    let blocks = blocks(&page);
    let lines: Vec<&str> = blocks.iter().flat_map(|(_, block)| block.lines()).collect();
    let mut commands = Vec::new();
    leaves(&quorate::cli::command(), "quorate", &mut commands);
    // Backups and standby clusters have pages of their own, and so has what is asked of a member that does not serve.
    let elsewhere = ["backup.md", "monitor.md", "standby.md"]
        .map(|name| std::fs::read_to_string(format!("{}/docs/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap());
    let is_named = |words: &str| {
        lines.iter().any(|line| line.contains(words)) || elsewhere.iter().any(|page| page.contains(words))
    };
    let missing: Vec<&String> = commands.iter().filter(|words| !is_named(words)).collect();
    assert!(missing.is_empty(), "in no block of docs/cli.md: {missing:?}");

    let mut cluster = Cluster::start(3).await;
    cluster.start_slotless(20, "--by-hand");
    cluster.wait_unready(20, &["added by hand"]).await;
    let old = Cluster::start(1).await;
    old.put(0, "moved/a", "1").await;
    let mut stopped = Cluster::start(1).await;
    stopped.put(0, "k", "v").await;
    stopped.kill(0);
    let (dir, (a, b)) = (tempfile::tempdir().unwrap(), free_host());
    let mut names = vec![
        ("old-0.example.org:2379".to_owned(), old.endpoint(0)),
        ("kv-0.example.org:2379".to_owned(), cluster.endpoint(0)),
        ("kv-3.example.org:2380".to_owned(), cluster.peer_address(20)),
        ("promote kv-3".to_owned(), "promote extra-20".to_owned()),
        ("update kv-3".to_owned(), "update extra-20".to_owned()),
        ("remove kv-3".to_owned(), "remove extra-20".to_owned()),
        ("/var/lib/quorate".to_owned(), stopped.data_dir(0).display().to_string()),
    ];
    names.extend((2..5).map(|n| (format!("127.0.0.{n}"), format!("127.{a}.{n}.{b}"))));
    let endpoints = cluster.endpoints();
    for (kind, block) in blocks {
        let block = substituted(&block, &names);
        match &kind[..] {
            "" => run(&block, dir.path(), &endpoints),
            "interrupted" => interrupt(&block, dir.path(), &endpoints, (Signal::INT, "\n")),
            "stopped" => interrupt(&block, dir.path(), &endpoints, (Signal::TERM, "ready to serve client requests")),
            other => panic!("a block of docs/cli.md is marked {other:?}"),
        }
    }
    // What it deleted is gone, and what it copied is there.
    wait_for("the mirrored key", async || {
        cluster.get(0, "copy/a").await.filter(|value| value == "1").ok_or("not there")
    })
    .await;
    assert_eq!(cluster.get(0, "greeting").await.as_deref(), Some("goodbye"));
}
