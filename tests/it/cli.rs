//! Quorate's own commands against a cluster, as a user and as a script sees them.

mod faults;
mod keys;
mod members;
mod page;
mod terminal;
mod watch;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::cluster::{Cluster, wait_for};

struct Cli {
    endpoints: String,
}

impl Cli {
    fn output(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_quorate"))
            .env("QUORATE_ENDPOINTS", &self.endpoints)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that reads no input may have ended already.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// Standard output of a command that must succeed and print nothing else.
    #[track_caller]
    fn bytes(&self, args: &[&str], input: &[u8]) -> Vec<u8> {
        let output = self.output(args, input);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && error.is_empty(), "quorate {args:?}: {}: {error}", output.status);
        output.stdout
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        String::from_utf8(self.bytes(args, b"")).unwrap()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let text = self.run(&[args, &["-o", "json"]].concat());
        assert_eq!(text.lines().count(), 1, "one line: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The one line on standard error of a command that must end with code 1.
    #[track_caller]
    fn fails(&self, args: &[&str]) -> String {
        let output = self.output(args, b"");
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "quorate {args:?}: {error}");
        assert_eq!(error.lines().count(), 1, "one line: {error}");
        error
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_member_list_show_every_member() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    cluster.put(0, "k", "v").await;
    // One endpoint is enough: the others are found through the member list.
    let cli = Cli { endpoints: cluster.endpoint(1) };
    let text = cli.run(&["status"]);
    let lines: Vec<&str> = text.lines().collect();
    let head: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(
        head,
        "ID NAME SLOT ROLE TERM APPLIED LAG REVISION DB SIZE DISK FREE VERSION".split(' ').collect::<Vec<_>>()
    );
    for (slot, line) in (0..3).zip(&lines[1..]) {
        let cells: Vec<&str> = line.split_whitespace().collect();
        let role = if slot == leader { "leader" } else { "voter" };
        assert_eq!(cells[1..4], [&format!("kv-{slot}")[..], &slot.to_string(), role], "{text}");
        assert_eq!(cells.last(), Some(&env!("CARGO_PKG_VERSION")), "no note: {text}");
    }
    let json = cli.json(&["status"]);
    assert_eq!(json["members"].as_array().unwrap().len(), 3, "{json}");
    assert_eq!(json["members"][leader as usize]["id"], json["leader"], "{json}");
    assert!(json["members"][0]["db_size_bytes"].as_u64().unwrap() > 0, "{json}");

    let list = cli.run(&["member", "list"]);
    assert_eq!(list.lines().count(), 4, "{list}");
    let json = cli.json(&["member", "list"]);
    assert_eq!(json["members"][0]["clientURLs"].as_array().unwrap().len(), 1, "{json}");

    let mut cluster = cluster;
    let victim = (leader + 1) % 3;
    cluster.kill(victim);
    let survivor = Cli { endpoints: cluster.endpoint(leader) };
    wait_for("the exit code to say that somebody should look", async || {
        let output = survivor.output(&["status"], b"");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!("\nkv-{victim}: does not answer: ")), "{text}");
        if output.status.code() == Some(2) && text.contains("\n[member-dead] ") { Ok(()) } else { Err(text) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_read_written_deleted_and_compacted() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    assert_eq!(cli.run(&["put", "a", "1"]), "OK\n");
    assert_eq!(cli.run(&["put", "a", "2", "--prev-kv"]), "OK\na\n1\n");
    assert_eq!(cli.run(&["put", "ab", "3"]), "OK\n");
    assert_eq!(cli.run(&["put", "b", "--", "-4"]), "OK\n");
    assert_eq!(cli.run(&["get", "a"]), "a\n2\n");
    assert_eq!(cli.run(&["get", "--prefix", "a"]), "a\n2\nab\n3\n");
    assert_eq!(cli.run(&["get", "a", "b"]), "a\n2\nab\n3\n");
    assert_eq!(cli.run(&["get", "--from-key", "ab", "--print-value-only"]), "3\n-4\n");
    assert_eq!(cli.run(&["get", "--prefix", "", "--keys-only"]), "a\nab\nb\n");
    assert_eq!(cli.run(&["get", "--prefix", "", "--limit", "1"]), "a\n2\n");
    assert_eq!(cli.run(&["get", "--prefix", "", "--count-only"]), "3\n");
    assert_eq!(cli.run(&["get", "a", "--rev", "2"]), "a\n1\n");
    assert_eq!(cli.run(&["get", "a", "--serializable"]), "a\n2\n");
    assert_eq!(cli.run(&["get", "none"]), "");
    let json = cli.json(&["get", "a"]);
    assert_eq!(
        (&json["kvs"][0]["value"], &json["kvs"][0]["version"], &json["count"]),
        (&"Mg==".into(), &2.into(), &1.into())
    );
    assert_eq!(cli.json(&["put", "a", "2"])["header"]["revision"], 6);

    // Any bytes, through standard input and back.
    let value: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    assert_eq!(cli.bytes(&["put", "binary"], &value), b"OK\n");
    let read = cli.bytes(&["get", "binary", "--print-value-only"], b"");
    assert_eq!((read.len(), &read[..value.len()]), (value.len() + 1, &value[..]));

    assert_eq!(cli.run(&["del", "a", "--prev-kv"]), "1\na\n2\n");
    assert_eq!(cli.run(&["del", "--prefix", "a"]), "1\n");
    assert_eq!(cli.json(&["del", "none"])["deleted"], 0);
    let compacted = cli.run(&["compact", "5", "--physical"]);
    assert!(compacted.contains('5'), "{compacted}");
    let error = cli.fails(&["get", "a", "--rev", "3"]);
    assert!(
        error.contains("etcdserver: mvcc: required revision has been compacted") && error.contains("choose"),
        "{error}"
    );
    let error = cli.fails(&["compact", "99"]);
    assert!(error.contains("future revision"), "{error}");
}

#[test]
fn errors_are_one_line_with_what_to_do() {
    // Port 1 of the loopback address is served by nobody.
    let cli = Cli { endpoints: "127.0.0.1:1".into() };
    for args in
        [&["get", "k"][..], &["put", "k", "v"], &["del", "k"], &["compact", "1"], &["status"], &["member", "list"]]
    {
        let error = cli.fails(args);
        assert!(error.contains("127.0.0.1:1") && error.contains("--endpoints"), "{args:?}: {error}");
    }
    let error = cli.fails(&["get", "k", "--endpoints", "ftp://kv:2379"]);
    assert!(error.contains("https://host:port"), "{error}");
    let error = cli.fails(&["config", "--set", "raft.heartbeat_intervall=1s"]);
    assert!(error.contains("raft.heartbeat_intervall") && error.contains("raft.heartbeat_interval"), "{error}");
    let error = cli.fails(&["serve", "--set", "raft.heartbeat_interval=100"]);
    assert!(error.contains("raft.heartbeat_interval") && error.contains("unit"), "{error}");
}

#[test]
fn config_and_completion_print_what_a_user_needs() {
    let cli = Cli { endpoints: String::new() };
    let text = cli.run(&["config", "--set", "raft.heartbeat_interval=50ms"]);
    let line = text.lines().find(|line| line.contains("heartbeat_interval")).unwrap();
    assert!(line.contains("50ms") && line.contains("--set"), "the value and where it comes from: {line}");
    let manual = cli.run(&["config", "--manual"]);
    assert_eq!(manual, std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/quorate.toml")).unwrap());
    for shell in ["bash", "zsh", "fish"] {
        let script = cli.run(&["completion", shell]);
        assert!(script.contains("quorate") && script.contains("compact"), "{shell}");
    }
    for command in ["serve", "dev", "status", "member", "get", "put", "del", "compact", "watch", "config", "completion"]
    {
        assert!(cli.run(&["--help"]).contains(command), "{command} is not in the help");
        assert!(cli.run(&[command, "--help"]).contains("Usage: quorate"), "{command}");
    }
}
