//! Conditional puts, transactions, the forms of `get`; mirrors and loads.

use rustix::process::Signal;

use super::*;
use crate::support::cluster::{binary, wait_for};
use crate::support::process::Running;

#[tokio::test(flavor = "multi_thread")]
async fn a_put_can_depend_on_what_is_there() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    assert_eq!(cli.run(&["put", "k", "1", "--if-absent"]), "OK\n");
    let error = cli.fails(&["put", "k", "2", "--if-absent"]);
    assert!(error.contains("\"k\" is not written") && error.contains("at revision 2"), "{error}");
    let error = cli.fails(&["put", "k", "2", "--if-rev", "7"]);
    assert!(error.contains("--if-rev 7") && error.contains("at revision 2"), "{error}");
    let error = cli.fails(&["put", "none", "2", "--if-rev", "7"]);
    assert!(error.contains("it does not exist"), "{error}");
    assert_eq!(cli.run(&["put", "k", "2", "--if-rev", "2", "--prev-kv"]), "OK\nk\n1\n");
    assert_eq!(cli.run(&["get", "--prefix", ""]), "k\n2\n", "nothing else was written");

    let lease = cli.run(&["lease", "grant", "60"]);
    let lease = lease.trim();
    assert_eq!(lease.len(), 16, "{lease}");
    assert_eq!(cli.run(&["put", "k", "--ignore-value", "--lease", lease]), "OK\n");
    assert_eq!(cli.json(&["get", "k"])["kvs"][0]["lease"], lease);
    assert_eq!(cli.run(&["put", "k", "3", "--ignore-lease"]), "OK\n");
    let kept = cli.json(&["get", "k"]);
    assert_eq!((&kept["kvs"][0]["lease"], &kept["kvs"][0]["value"]), (&lease.into(), &"Mw==".into()), "{kept}");
    assert_eq!(cli.json(&["lease", "ttl", lease, "--keys"])["keys"][0], "aw==");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_sorted_and_printed_as_asked() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    for (key, value) in [("b", "1"), ("a", "3"), ("c", "2"), ("b", "4")] {
        cluster.put(0, key, value).await;
    }
    let keys = |args: &[&str]| cli.run(&[&["get", "--prefix", "", "--keys-only"], args].concat()).replace('\n', "");
    assert_eq!(keys(&["--order", "descend"]), "cba");
    assert_eq!(keys(&["--sort-by", "value"]), "cab");
    assert_eq!(keys(&["--sort-by", "create"]), "bac");
    assert_eq!(keys(&["--sort-by", "modify", "--order", "descend", "--limit", "2"]), "bc");
    assert_eq!(cli.run(&["get", "b", "--hex"]), "\\x62\n\\x34\n");
    let table = cli.run(&["get", "b", "-w", "table"]);
    let cells: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(cells, ["b", "2", "5", "2", "-", "4"], "{table}");
    let fields = cli.run(&["get", "b", "--write-out", "fields"]);
    assert!(fields.contains("\"Key\" : \"b\"\n\"CreateRevision\" : 2\n\"ModRevision\" : 5\n"), "{fields}");
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_come_from_files_and_pipes() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    cluster.put(0, "k", "1").await;
    let text = "value(\"k\") = \"1\"\nversion(\"none\") = 0\n\nput k \"two words\"\nget k --print-value-only\ndel none\n\nget k\n";
    let said = cli.bytes(&["txn"], text.as_bytes());
    assert_eq!(String::from_utf8(said).unwrap(), "SUCCESS\n\nOK\n\ntwo words\n\n0\n");
    let said = cli.bytes(&["txn", "-"], text.as_bytes());
    assert_eq!(String::from_utf8(said).unwrap(), "FAILURE\n\nk\ntwo words\n", "the value is another now");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "mod(\"k\") > \"1\"\n\nput k 3\n\n").unwrap();
    let json = cli.json(&["txn", file.path().to_str().unwrap()]);
    assert_eq!(
        (&json["succeeded"], &json["responses"][0]["response_put"]["header"]["revision"]),
        (&true.into(), &4.into())
    );
    std::fs::write(file.path(), "mod(\"k\") >\n").unwrap();
    let error = cli.fails(&["txn", file.path().to_str().unwrap()]);
    assert!(error.contains("line 1") && error.contains("expected TARGET"), "{error}");
    // etcdctl's own tokens of an operation that is refused as a whole.
    std::fs::write(file.path(), "\nput k 4\nput k 5\n").unwrap();
    let error = cli.fails(&["txn", file.path().to_str().unwrap()]);
    assert!(error.contains("duplicate key"), "{error}");
    assert_eq!(cli.run(&["get", "k", "--print-value-only"]), "3\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_makes_another_prefix_the_same_and_keeps_it_so() {
    let mut source = Cluster::start(1).await;
    let target = Cluster::start(3).await;
    for n in 0..250 {
        source.put(0, &format!("a/{n:03}"), "v").await;
    }
    source.put(0, "b", "outside").await;
    target.put(0, "copy/a/stale", "x").await;
    target.put(0, "copy/a/000", "other").await;
    target.put(0, "copy/b", "outside").await;
    let (from, to) = (source.endpoint(0), target.endpoints());
    let args = ["mirror", "--from", &from, "--to", &to, "--prefix", "a/", "--to-prefix", "copy/a/"];
    let cli = Cli { endpoints: target.endpoints() };
    let error = cli.fails(&args);
    assert!(error.contains("holds 2 keys") && error.contains("--overwrite"), "{error}");
    let same = ["mirror", "--from", &from, "--to", &from, "--prefix", "a/", "--to-prefix", "a/b/"];
    assert!(cli.fails(&same).contains("overlap"), "it would follow itself");

    let mut mirror = Running::start(Command::new(binary()).args(args).arg("--overwrite"));
    let there = async |key: &str, value: Option<&str>| {
        wait_for(&format!("{key} to be {value:?}"), async || match target.get(0, key).await {
            found if found.as_deref() == value => Ok(()),
            found => Err(format!("{found:?}")),
        })
        .await;
    };
    there("copy/a/249", Some("v")).await;
    there("copy/a/000", Some("v")).await;
    there("copy/a/stale", None).await;
    source.put(0, "a/later", "1").await;
    there("copy/a/later", Some("1")).await;
    Cli { endpoints: source.endpoint(0) }.run(&["del", "a/later"]);
    there("copy/a/later", None).await;
    // A source that comes back, and has forgotten what was not seen.
    source.kill(0);
    source.start_all().await;
    let revision = source.put(0, "a/after", "2").await;
    Cli { endpoints: source.endpoint(0) }.run(&["compact", &revision.to_string(), "--physical"]);
    there("copy/a/after", Some("2")).await;
    assert_eq!(target.get(0, "copy/b").await.as_deref(), Some("outside"), "it is not under the prefix");
    assert_eq!(cli.run(&["get", "--prefix", "copy/a/", "--count-only"]), "251\n");
    mirror.signal(Signal::INT);
    let said = mirror.line().unwrap();
    assert!(said.contains("the target holds the source's revision"), "{said}");
    assert_eq!(mirror.wait().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_is_measured_and_leaves_nothing_behind() {
    let cluster = Cluster::start(1).await;
    let cli = Cli { endpoints: cluster.endpoint(0) };
    let small = ["--clients", "8", "--connections", "2", "--keys", "50"];
    let put = cli.json(&[&["bench", "put", "--total", "400"], &small[..]].concat());
    assert_eq!((&put["answered"], &put["failed"]), (&400.into(), &0.into()), "{put}");
    let slowest = put["latency_seconds"]["slowest"].as_f64().unwrap();
    let median = put["latency_seconds"]["quantiles"]["p50"].as_f64().unwrap();
    assert!(0.0 < median && median <= slowest && put["per_second"].as_f64().unwrap() > 1.0, "{put}");
    let get = cli.run(&[&["bench", "get", "--duration", "300ms", "--serializable"], &small[..]].concat());
    assert!(get.starts_with("ANSWERED"), "{get}");
    // At a rate no more is asked than that.
    let slow = cli.json(&[&["bench", "put", "--duration", "1s", "--rate", "20"], &small[..]].concat());
    assert!((10..=21).contains(&slow["answered"].as_u64().unwrap()), "{slow}");
    assert_eq!(cli.run(&["get", "--prefix", "", "--count-only"]), "0\n", "all of it is gone");
    cluster.put(0, "quorate-bench/mine", "v").await;
    let error = cli.fails(&[&["bench", "put", "--total", "1"], &small[..]].concat());
    assert!(error.contains("1 keys that begin with") && error.contains("--keep"), "{error}");
    assert_eq!(cluster.get(0, "quorate-bench/mine").await.as_deref(), Some("v"));

    let output = cli.output(&["check", "perf", "--duration", "1s", "-o", "json"], b"");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let passed = found["result"] == "PASS";
    assert_eq!((output.status.success(), found["faults"].as_array().unwrap().is_empty()), (passed, passed), "{found}");
}
