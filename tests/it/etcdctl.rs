//! Debian's etcdctl, unmodified, against a cluster of three: its commands, its table and its JSON.

mod watch;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::cluster::{Cluster, PATIENCE};
use crate::support::tools::{self, ETCDCTL};

struct Ctl {
    program: PathBuf,
    endpoints: String,
}

impl Ctl {
    /// A cluster that has a leader, and a client of all its members.
    async fn start() -> Option<(Cluster, Self)> {
        let program = tools::require(&ETCDCTL)?;
        let cluster = Cluster::start(3).await;
        let endpoints = cluster.endpoints();
        Some((cluster, Self { program, endpoints }))
    }

    /// The same client, of other endpoints.
    fn at(&self, endpoints: &str) -> Self {
        Self { program: self.program.clone(), endpoints: endpoints.to_owned() }
    }

    fn output(&self, args: &[&str], input: &str) -> Output {
        let mut child = Command::new(&self.program)
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints, "--command-timeout", "30s", "--dial-timeout", "10s"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Standard output of a command that must succeed.
    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        self.run_with(args, "")
    }

    #[track_caller]
    fn run_with(&self, args: &[&str], input: &str) -> String {
        let output = self.output(args, input);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "etcdctl {args:?}: {}\n{out}\n{err}", output.status);
        out.into_owned()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let text = self.run(&[args, &["-w", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("etcdctl {args:?}: {e}: {text}"))
    }

    /// Standard error of a command that must fail.
    #[track_caller]
    fn fails(&self, args: &[&str]) -> String {
        let output = self.output(args, "");
        assert!(!output.status.success(), "etcdctl {args:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// The cells of a table's rows, without the head.
fn cells(table: &str) -> Vec<Vec<&str>> {
    let rows = table.lines().filter(|line| line.starts_with('|')).skip(1);
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_puts_gets_and_deletes() {
    let Some((_cluster, ctl)) = Ctl::start().await else { return };
    for (key, value) in [("a", "3"), ("b", "2"), ("c", "1"), ("d", "0")] {
        assert_eq!(ctl.run(&["put", key, value]), "OK\n");
    }
    assert_eq!(ctl.run_with(&["put", "in"], "from stdin"), "OK\n");
    assert_eq!(ctl.run(&["put", "a", "4", "--prev-kv"]), "OK\na\n3\n");
    assert_eq!(ctl.run(&["get", "a"]), "a\n4\n");
    assert_eq!(ctl.run(&["get", "in", "--print-value-only"]), "from stdin\n");
    assert_eq!(ctl.run(&["get", "b", "d"]), "b\n2\nc\n1\n");
    assert_eq!(ctl.run(&["get", "--prefix", "i"]), "in\nfrom stdin\n");
    assert_eq!(ctl.run(&["get", "--from-key", "d"]), "d\n0\nin\nfrom stdin\n");
    assert_eq!(ctl.run(&["get", "", "--prefix", "--limit", "2"]), "a\n4\nb\n2\n");
    assert_eq!(ctl.run(&["get", "a", "e", "--keys-only", "--order", "DESCEND"]), "d\n\nc\n\nb\n\na\n\n");
    let by_value = ctl.run(&["get", "a", "e", "--keys-only", "--sort-by", "VALUE", "--order", "ASCEND"]);
    assert_eq!(by_value, "d\n\nc\n\nb\n\na\n\n");
    let by_revision = ctl.run(&["get", "a", "e", "--sort-by", "MODIFY", "--order", "DESCEND", "--limit", "1"]);
    assert_eq!(by_revision, "a\n4\n");
    assert_eq!(ctl.run(&["get", "a", "--rev", "2"]), "a\n3\n");
    assert_eq!(ctl.run(&["get", "a", "--consistency", "s"]), "a\n4\n");
    assert_eq!(ctl.run(&["get", "none"]), "");

    let fields = ctl.run(&["get", "a", "-w", "fields"]);
    for line in [r#""Key" : "a""#, r#""Value" : "4""#, r#""Version" : 2"#, r#""Count" : 1"#, r#""More" : false"#] {
        assert!(fields.lines().any(|l| l == line), "{line} is not in\n{fields}");
    }
    let counted = ctl.run(&["get", "a", "e", "--limit", "1", "-w", "fields"]);
    assert!(counted.contains("\"More\" : true\n\"Count\" : 4"), "{counted}");
    let json = ctl.json(&["get", "a"]);
    assert_eq!(
        (&json["count"], &json["kvs"][0]["key"], &json["kvs"][0]["value"]),
        (&1.into(), &"YQ==".into(), &"NA==".into())
    );
    assert_eq!((&json["kvs"][0]["create_revision"], &json["header"]["revision"]), (&2.into(), &7.into()));
    let encoded = ctl.output(&["get", "a", "-w", "protobuf"], "").stdout;
    let decoded = <quorate::pb::etcd::RangeResponse as prost::Message>::decode(&encoded[..]).unwrap();
    assert_eq!(decoded.kvs[0].value(), b"4");

    assert_eq!(ctl.run(&["del", "a", "c", "--prev-kv"]), "2\na\n4\nb\n2\n");
    assert_eq!(ctl.run(&["del", "none"]), "0\n");
    assert_eq!(ctl.json(&["del", "", "--from-key"])["deleted"], 3);
    assert!(ctl.fails(&["put", "", "x"]).contains("etcdserver: key is not provided"));
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_transacts_and_compacts() {
    let Some((_cluster, ctl)) = Ctl::start().await else { return };
    ctl.run(&["put", "k", "1"]);
    let swap = "value(\"k\") = \"1\"\nmod(\"k\") > \"0\"\n\nput k 2\nget k\n\nget none\n\n";
    assert_eq!(ctl.run_with(&["txn"], swap), "SUCCESS\n\nOK\n\nk\n2\n");
    assert_eq!(ctl.run_with(&["txn"], swap), "FAILURE\n\n");
    let prompted = ctl.run_with(&["txn", "--interactive"], "version(\"k\") = \"2\"\n\ndel k\n\n\n");
    assert!(prompted.contains("success requests") && prompted.ends_with("SUCCESS\n\n1\n"), "{prompted}");
    let text = ctl.run_with(&["txn", "-w", "json"], "create(\"k\") = \"0\"\n\nput k 3\n\n\n");
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&json["succeeded"], &json["header"]["revision"]), (&true.into(), &5.into()), "{text}");
    let output = ctl.output(&["txn"], "\nput k 1\nput k 2\n\n\n");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("etcdserver: duplicate key given in txn request"), "{error}");

    assert_eq!(ctl.run(&["compaction", "3"]), "compacted revision 3\n");
    assert_eq!(ctl.run(&["compaction", "4", "--physical"]), "compacted revision 4\n");
    for (args, error) in [
        (&["compaction", "4"][..], "etcdserver: mvcc: required revision has been compacted"),
        (&["compaction", "99"], "etcdserver: mvcc: required revision is a future revision"),
        (&["get", "k", "--rev", "2"], "etcdserver: mvcc: required revision has been compacted"),
        (&["get", "k", "--rev", "99"], "etcdserver: mvcc: required revision is a future revision"),
    ] {
        let text = ctl.fails(args);
        assert!(text.lines().last().unwrap().ends_with(error), "{args:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_shows_endpoints_and_members_and_moves_the_leader() {
    let Some((cluster, ctl)) = Ctl::start().await else { return };
    let leader = cluster.wait_formed().await;
    cluster.put(leader, "k", "v").await;
    for slot in 0..3 {
        assert_eq!(cluster.get(slot, "k").await.as_deref(), Some("v"));
    }
    // As a user writes them, and as --cluster takes them from the member list: with a scheme.
    let urls: Vec<String> = (0..3).map(|slot| format!("http://{}", cluster.endpoint(slot))).collect();
    let by_url = ctl.at(&urls.join(","));
    for (ctl, cluster_wide) in [(&ctl, &[][..]), (&by_url, &[][..]), (&ctl, &["--cluster"][..])] {
        let with = |args: &[&'static str]| [args, cluster_wide].concat();
        let text = ctl.run(&[&with(&["endpoint", "status"])[..], &["-w", "table"]].concat());
        let rows = cells(&text);
        assert_eq!(rows.len(), 3, "{text}");
        assert_eq!(rows.iter().filter(|row| row[4] == "true").count(), 1, "one leader: {text}");
        assert!(rows.iter().all(|row| row[2].starts_with("3.7.") && row[5] == "false" && row[9].is_empty()), "{text}");
        let status = ctl.json(&with(&["endpoint", "status"]));
        for entry in status.as_array().unwrap() {
            assert_eq!(entry["Status"]["leader"].as_u64().unwrap() & 0xffff, leader, "{status}");
            assert_eq!(entry["Status"]["header"]["revision"], 2, "{status}");
        }
        let hashes = ctl.json(&with(&["endpoint", "hashkv"]));
        let hashes: Vec<&Value> = hashes.as_array().unwrap().iter().map(|entry| &entry["HashKV"]["hash"]).collect();
        assert!(hashes.len() == 3 && hashes[0].is_u64() && hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
        let health = ctl.json(&with(&["endpoint", "health"]));
        assert_eq!(health.as_array().unwrap().iter().filter(|entry| entry["health"] == true).count(), 3, "{health}");
    }
    // This one goes to standard error.
    let health = String::from_utf8(ctl.output(&["endpoint", "health"], "").stderr).unwrap();
    assert_eq!(health.matches("is healthy: successfully committed").count(), 3, "{health}");

    let members = ctl.json(&["member", "list"]);
    let members = members["members"].as_array().unwrap();
    let table = ctl.run(&["member", "list", "-w", "table"]);
    let simple = ctl.run(&["member", "list"]);
    assert_eq!((members.len(), cells(&table).len(), simple.lines().count()), (3, 3, 3), "{table}");
    for member in members {
        let id = member["ID"].as_u64().unwrap();
        let slot = id & 0xffff;
        assert_eq!(member["name"], format!("kv-{slot}"));
        assert_eq!(member["clientURLs"][0], urls[slot as usize]);
        let line = format!(
            "{id:x}, started, kv-{slot}, http://{}, {}, false",
            cluster.peer_address(slot),
            urls[slot as usize]
        );
        assert!(simple.lines().any(|l| l == line), "{line} is not in\n{simple}");
    }
    assert_eq!(ctl.run(&["alarm", "list"]), "");

    let other = members.iter().find(|m| m["ID"].as_u64().unwrap() & 0xffff == (leader + 1) % 3).unwrap();
    let (other, other_slot) = (format!("{:x}", other["ID"].as_u64().unwrap()), (leader + 1) % 3);
    let moved = by_url.run(&["move-leader", &other]);
    assert!(moved.starts_with("Leadership transferred from ") && moved.trim_end().ends_with(&other), "{moved}");
    assert_eq!(cluster.wait_formed().await, other_slot);
    let error = ctl.at(&cluster.endpoint(leader)).fails(&["move-leader", &other]);
    assert!(error.contains("no leader endpoint given"), "{error}");
    let error = ctl.fails(&["auth", "enable"]);
    assert!(error.contains("root user does not exist"), "{error}");
    // Who is configured with a user goes on without a token.
    assert_eq!(ctl.run(&["--user", "root:secret", "put", "by-root", "1"]).trim(), "OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_grants_keeps_and_revokes_leases() {
    let Some((_cluster, ctl)) = Ctl::start().await else { return };
    let granted = ctl.run(&["lease", "grant", "60"]);
    let id = granted.strip_prefix("lease ").and_then(|rest| rest.strip_suffix(" granted with TTL(60s)\n")).unwrap();
    assert_eq!(ctl.run(&["put", "a", "1", "--lease", id]), "OK\n");
    assert_eq!(ctl.run(&["put", "b", "2", "--lease", id]), "OK\n");
    let shown = ctl.run(&["lease", "timetolive", "--keys", id]);
    let (left, keys) = shown.rsplit_once("remaining(").unwrap();
    assert_eq!(left, format!("lease {id} granted with TTL(60s), "));
    assert!(keys.ends_with("s), attached keys([a b])\n"), "{shown}");
    assert_eq!(ctl.run(&["lease", "list"]), format!("found 1 leases\n{id}\n"));
    assert_eq!(ctl.run(&["lease", "keep-alive", "--once", id]), format!("lease {id} keepalived with TTL(60)\n"));
    let json = ctl.json(&["lease", "timetolive", id]);
    assert_eq!(json["granted-ttl"], 60, "{json}");
    assert_eq!(ctl.run(&["lease", "revoke", id]), format!("lease {id} revoked\n"));
    assert_eq!(ctl.run(&["get", "", "--prefix"]), "");
    assert_eq!(ctl.run(&["lease", "timetolive", id]), format!("lease {id} already expired\n"));
    assert_eq!(ctl.run(&["lease", "list"]), "found 0 leases\n");
    let error = ctl.fails(&["lease", "revoke", id]);
    assert!(error.contains("requested lease not found"), "{error}");
    let error = ctl.fails(&["put", "a", "1", "--lease", id]);
    assert!(error.contains("requested lease not found"), "{error}");
}

/// Its locks and elections are made of leases, transactions and watches by the client.
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_locks_and_elects() {
    let Some((cluster, ctl)) = Ctl::start().await else { return };
    let run = |args: &[&str]| {
        let mut command = tokio::process::Command::new(&ctl.program);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &ctl.endpoints]).args(args);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        let lines = tokio::io::BufReader::new(child.stdout.take().unwrap());
        (child, tokio::io::AsyncBufReadExt::lines(lines))
    };
    macro_rules! line {
        ($from:expr) => {
            tokio::time::timeout(PATIENCE, $from.1.next_line()).await.expect("a line in time").unwrap().expect("a line")
        };
    }
    let mut held = run(&["lock", "job", "--ttl", "5"]);
    let key = line!(held);
    assert!(key.starts_with("job/"), "{key}");
    let mut next = run(&["lock", "job", "echo", "mine"]);
    // One line for both kinds of client: ours waits behind etcdctl's.
    let behind = tokio::spawn({
        let endpoints = cluster.endpoints();
        async move {
            let mut command = tokio::process::Command::new(crate::support::cluster::binary());
            command.args(["lock", "job", "--endpoints", &endpoints, "--", "echo", "ours"]);
            command.kill_on_drop(true).output().await.unwrap()
        }
    });
    crate::support::cluster::wait_for("three in line", async || {
        match ctl.run(&["get", "--prefix", "job/", "--keys-only"]) {
            text if text.matches("job/").count() == 3 => Ok(()),
            text => Err(text),
        }
    })
    .await;
    let pid = rustix::process::Pid::from_raw(held.0.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(line!(next), "mine");
    let ours = tokio::time::timeout(PATIENCE, behind).await.expect("it is handed on").unwrap();
    assert_eq!(String::from_utf8_lossy(&ours.stdout), "ours\n");

    let mut listener = run(&["elect", "--listen", "e"]);
    let mut leader = run(&["elect", "e", "one"]);
    let key = line!(leader);
    assert!(key.starts_with("e/") && line!(leader) == "one", "{key}");
    assert_eq!((line!(listener), line!(listener)), (key, "one".to_owned()));
}

/// Rule 24, through etcd's own tool: a member is added, promoted, moved and removed; what is wrong is refused in etcd's words.
#[tokio::test(flavor = "multi_thread")]
async fn members_are_added_promoted_updated_and_removed() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(1);
    cluster.set("cluster.promote_after", "100ms");
    cluster.start_all().await;
    let ctl = Ctl { program, endpoints: cluster.endpoints() };
    let [new, other, taken] = [20, 21, 0].map(|place| format!("--peer-urls=http://{}", cluster.peer_address(place)));
    let failure = |args: &[&str]| String::from_utf8_lossy(&ctl.output(args, "").stderr).into_owned();
    let text = failure(&["member", "add", "extra-20", &new]);
    assert!(text.contains("does not answer"), "{text}");
    cluster.start_slotless(20, "--by-hand");
    cluster.wait_unready(20, &["added by hand"]).await;
    ctl.run(&["member", "add", "extra-20", &new, "--learner"]);
    let id = cluster.member_id(20).await;
    let hex = format!("{id:x}");
    let text = failure(&["member", "add", "extra-20", &new]);
    assert!(text.contains("etcdserver: Peer URLs already exists"), "{text}");
    crate::support::cluster::wait_for("the learner to be promoted", async || {
        let output = ctl.output(&["member", "promote", &hex], "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Ok(());
        }
        assert!(
            error.contains("etcdserver: can only promote a learner member which is in sync with leader"),
            "{error}"
        );
        Err(error)
    })
    .await;
    assert!(cluster.membership(0).await.contains(&(id, true)));
    let text = failure(&["member", "promote", &hex]);
    assert!(text.contains("etcdserver: can only promote a learner member"), "{text}");
    let text = failure(&["member", "update", &hex, &taken]);
    assert!(text.contains("etcdserver: Peer URLs already exists"), "another member lives there: {text}");
    // What would be taken back at once is refused.
    let slot = format!("{:x}", cluster.member_id(0).await);
    let text = failure(&["member", "update", &slot, &other]);
    assert!(text.contains("tells its address itself"), "{text}");
    let text = failure(&["member", "update", "77", &new]);
    assert!(text.contains("etcdserver: member not found"), "{text}");
    ctl.run(&["member", "update", &hex, &new]);
    // Health is observed: right after a change the member may not have answered yet.
    crate::support::cluster::wait_for("the moved member to be removed", async || {
        let output = ctl.output(&["member", "remove", &hex], "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || error.contains("etcdserver: unhealthy cluster"), "{error}");
        if output.status.success() { Ok(()) } else { Err(error) }
    })
    .await;
    assert_eq!(cluster.membership(0).await.len(), 1);
    let text = failure(&["member", "remove", &hex]);
    assert!(text.contains("etcdserver: member not found"), "{text}");
}
