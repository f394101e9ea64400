//! `quorate watch` as a user and as a script sees it.

use rustix::process::Signal;

use super::*;
use crate::support::cluster::wait_for;
use crate::support::process::Running;

impl Cli {
    fn start(&self, args: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.env("QUORATE_ENDPOINTS", &self.endpoints).arg("watch").args(args);
        Running::start(&mut command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_printed_and_given_to_a_command() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    for (key, value) in [("a", "1"), ("a", "2"), ("ab", "3")] {
        cluster.put(0, key, value).await;
    }
    cli.run(&["del", "a"]);
    let mut prefix = cli.start(&["a", "--prefix", "--rev", "2"]);
    prefix.expect(&["PUT", "a", "1", "PUT", "a", "2", "PUT", "ab", "3", "DELETE", "a", ""]);
    let mut previous = cli.start(&["a", "--rev", "3", "--prev-kv"]);
    previous.expect(&["PUT", "a", "1", "a", "2", "DELETE", "a", "2", "a", ""]);
    let json = cli.start(&["--from-key", "a", "--rev", "5", "-o", "json"]);
    let line: Value = serde_json::from_str(&json.line().unwrap()).unwrap();
    assert_eq!((&line["events"][0]["type"], &line["header"]["revision"]), (&"DELETE".into(), &5.into()), "{line}");
    let script =
        "echo \"$QUORATE_WATCH_EVENT_TYPE $QUORATE_WATCH_KEY $QUORATE_WATCH_VALUE $QUORATE_WATCH_REVISION\"; cat";
    let command = cli.start(&["a", "--rev", "3", "--", "sh", "-c", script]);
    command.expect(&["PUT", "a", "2", "PUT a 2 3"]);
    let event: Value = serde_json::from_str(&command.line().unwrap()).unwrap();
    assert_eq!((&event["kv"]["value"], &event["kv"]["mod_revision"]), (&"Mg==".into(), &3.into()), "{event}");

    // Ctrl-C, and SIGTERM, are how a watch ends.
    for (watch, signal) in [(&mut prefix, Signal::INT), (&mut previous, Signal::TERM)] {
        watch.signal(signal);
        assert_eq!(watch.wait().code(), Some(0));
        assert_eq!(watch.line(), None, "no half lines");
    }
    let mut failing = cli.start(&["a", "--rev", "2", "--", "false"]);
    failing.expect(&["PUT", "a", "1"]);
    assert_eq!(failing.wait().code(), Some(1));

    cli.run(&["compact", "5"]);
    let error = cli.fails(&["watch", "a", "--rev", "2"]);
    assert!(error.contains("required revision has been compacted") && error.contains("--rev 5"), "{error}");
    let error = cli.fails(&["watch", "b", "a"]);
    assert!(error.contains("watcher range is empty"), "{error}");
    let error = Cli { endpoints: "127.0.0.1:1".into() }.fails(&["watch", "a"]);
    assert!(error.contains("127.0.0.1:1") && error.contains("--endpoints"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_at_another_endpoint_without_a_gap_or_a_repetition() {
    let mut cluster = Cluster::start(3).await;
    let cli = Cli { endpoints: cluster.endpoints() };
    let mut watch = cli.start(&["k", "--progress-notify"]);
    wait_for("the watch to begin", async || {
        cluster.put(1, "k", "begin").await;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        watch.try_line().ok_or("it prints nothing")
    })
    .await;
    cluster.put(1, "k", "begun").await;
    while watch.line().as_deref() != Some("begun") {}
    for i in 0..6_u64 {
        let victim = i % 3;
        cluster.put(victim, "k", &format!("before {i}")).await;
        cluster.kill(victim);
        cluster.put((victim + 1) % 3, "k", &format!("while {i}")).await;
        cluster.start_all().await;
        watch.expect(&["PUT", "k", &format!("before {i}"), "PUT", "k", &format!("while {i}")]);
    }
    watch.signal(Signal::INT);
    assert_eq!(watch.wait().code(), Some(0));
}
