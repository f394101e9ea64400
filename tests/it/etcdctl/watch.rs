//! Debian's etcdctl as a watcher and a mirror.

use super::*;
use crate::support::cluster::wait_for;
use crate::support::process::Running;

impl Ctl {
    fn start_command(&self, args: &[&str]) -> Running {
        let mut command = Command::new(&self.program);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoints]).args(args);
        Running::start(&mut command)
    }
}

/// Puts until the watcher prints it: only then does it watch.
async fn wait_watching(cluster: &Cluster, watcher: &Running, key: &str) {
    let mut seen = None;
    wait_for("etcdctl to watch", async || {
        cluster.put(0, key, "probe").await;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        seen = watcher.try_line();
        seen.clone().ok_or("it prints nothing")
    })
    .await;
    assert_eq!(seen.as_deref(), Some("PUT"));
    // Its own, and those that came too early for one print and in time for the next.
    cluster.put(0, key, "end-of-probes").await;
    while watcher.line().as_deref() != Some("end-of-probes") {}
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_watches_keys_prefixes_revisions_and_runs_commands() {
    let Some((cluster, ctl)) = Ctl::start().await else { return };
    let mut past = Vec::new();
    for (key, value) in [("k", "1"), ("k2", "2"), ("k", "3")] {
        past.push(cluster.put(0, key, value).await);
    }
    ctl.run(&["del", "k"]);
    let from_start = ctl.start_command(&["watch", "--prefix", "k", "--rev", "2"]);
    from_start.expect(&["PUT", "k", "1", "PUT", "k2", "2", "PUT", "k", "3", "DELETE", "k", ""]);
    let previous = ctl.start_command(&["watch", "k", "--rev", "3", "--prev-kv"]);
    previous.expect(&["PUT", "k", "1", "k", "3", "DELETE", "k", "3", "k", ""]);
    let range = ctl.start_command(&["watch", "k1", "k3", "--rev", "1"]);
    range.expect(&["PUT", "k2", "2"]);
    let json = ctl.start_command(&["watch", "k", "--rev", "2", "-w", "json"]);
    let line: Value = serde_json::from_str(&json.line().unwrap()).unwrap();
    assert_eq!((&line["Events"][0]["kv"]["key"], &line["Canceled"]), (&"aw==".into(), &false.into()), "{line}");
    let script = "echo \"ran $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY $ETCD_WATCH_VALUE\"";
    let command = ctl.start_command(&["watch", "k", "--rev", "4", "--", "sh", "-c", script]);
    // The history is one response, as with etcd: it prints all of it first.
    command.expect(&["PUT", "k", "3", "DELETE", "k", "", "ran \"PUT\" \"k\" \"3\"", "ran \"DELETE\" \"k\" \"\""]);

    let now = ctl.start_command(&["watch", "now"]);
    wait_watching(&cluster, &now, "now").await;
    let mut interactive = ctl.start_command(&["watch", "-i"]);
    interactive.write("watch first\nwatch --prefix second/ -- echo a command\n");
    wait_watching(&cluster, &interactive, "first").await;
    cluster.put(1, "second/key", "value").await;
    interactive.expect(&["PUT", "second/key", "value", "a command"]);
    cluster.put(2, "now", "live").await;
    now.expect(&["PUT", "now", "live"]);

    ctl.run(&["compaction", "5"]);
    let mut lost = ctl.start_command(&["watch", "k", "--rev", "2"]);
    let _ = lost.line();
    assert!(!lost.wait().success(), "it ends, and says that the revision is compacted");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_watches_on_while_members_die() {
    let Some((mut cluster, ctl)) = Ctl::start().await else { return };
    let watcher = ctl.start_command(&["watch", "--prefix", "k", "--rev", "2"]);
    for i in 0..6 {
        cluster.put(i % 3, "k", &i.to_string()).await;
        watcher.expect(&["PUT", "k", &i.to_string()]);
        cluster.kill(i % 3);
        cluster.put((i + 1) % 3, "k", "meanwhile").await;
        watcher.expect(&["PUT", "k", "meanwhile"]);
        cluster.start_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_mirrors_one_cluster_into_another() {
    let Some((cluster, ctl)) = Ctl::start().await else { return };
    let other = Cluster::start(1).await;
    cluster.put(0, "m/before", "1").await;
    let _mirror = ctl.start_command(&["make-mirror", "--prefix", "m/", &other.endpoint(0)]);
    let arrives = async |key: &str, value: Option<&str>| {
        wait_for(&format!("{key} to be mirrored"), async || match other.get(0, key).await {
            seen if seen.as_deref() == value => Ok(()),
            seen => Err(format!("{seen:?}")),
        })
        .await;
    };
    arrives("m/before", Some("1")).await;
    cluster.put(1, "m/after", "2").await;
    arrives("m/after", Some("2")).await;
    ctl.run(&["del", "m/before"]);
    arrives("m/before", None).await;
    for i in 0..100 {
        cluster.put(2, "m/last", &i.to_string()).await;
    }
    arrives("m/last", Some("99")).await;
}

/// A minute long, whatever its load; so only with `QUORATE_LONG_TESTS=1`.
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_check_perf_runs_to_its_end_and_leaves_nothing() {
    if !tools::is_set("QUORATE_LONG_TESTS") {
        return tools::skip("`etcdctl check perf` takes a minute; QUORATE_LONG_TESTS=1 runs it", false);
    }
    let Some((_cluster, ctl)) = Ctl::start().await else { return };
    let output = ctl.output(&["check", "perf", "--load", "s"], "");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Throughput is") && text.contains("Slowest request took"), "{text}");
    println!("{}", text.lines().skip_while(|l| !l.contains("Throughput")).collect::<Vec<_>>().join("\n"));
    assert_eq!(ctl.run(&["get", "--prefix", "/etcdctl-check-perf/", "--keys-only"]), "");
}
