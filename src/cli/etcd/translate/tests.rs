//! Flags beside the settings that they become, and the table beside etcd's own help.

use super::*;
use crate::cli::etcd::flags::{self, Line};
use crate::config::{Config, File, Sources, load};

fn translated(line: &str) -> anyhow::Result<Translation> {
    let words: Vec<String> = line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let Line::Flags(given) = flags::read(&words)? else { bail!("no flags") };
    translate(&Given::new(given))
}

fn config(line: &str) -> anyhow::Result<Config> {
    let sources = Sources { file: File::None, flags: translated(line)?.settings, ..Sources::default() };
    Ok(load(&crate::config::tests::Files::default(), &sources)?.config)
}

/// A setting of what a line comes to, as `quorate config` shows it.
fn setting(line: &str, key: &str) -> String {
    let all = serde_json::to_value(config(line).unwrap_or_else(|error| panic!("{line}: {error:#}"))).unwrap();
    let (section, key) = key.split_once('.').unwrap();
    match &all[section][key] {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(list) => list.iter().map(|text| text.as_str().unwrap()).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Command line, setting, and what it is then.
const CASES: &[(&str, &str, &str)] = &[
    ("", "identity.name", "default"),
    ("", "server.data_dir", "default.etcd"),
    ("", "server.listen_client", "127.0.0.1:2379"),
    ("", "server.listen_peer", "127.0.0.1:2380"),
    ("", "server.listen_status", "off"),
    ("", "server.advertise_client", "http://localhost:2379"),
    ("", "cluster.members", "default=localhost:2380"),
    ("", "cluster.token", "etcd-cluster"),
    ("", "cluster.kind", "manual"),
    ("", "raft.heartbeat_interval", "100ms"),
    ("", "raft.election_timeout_min", "1s"),
    ("", "server.request_timeout", "7s"),
    ("", "storage.quota_bytes", "2GiB"),
    ("", "storage.compaction_mode", "off"),
    ("", "http.cors", "*"),
    ("", "http.hosts", "*"),
    ("", "telemetry.format", "json"),
    ("--name a", "server.data_dir", "a.etcd"),
    ("--name a", "cluster.members", "a=localhost:2380"),
    ("--data-dir /d", "server.data_dir", "/d"),
    ("--heartbeat-interval 20 --election-timeout 150", "raft.heartbeat_interval", "20ms"),
    ("--heartbeat-interval 20 --election-timeout 150", "raft.election_timeout_max", "200ms"),
    ("--election-timeout 50000", "server.request_timeout", "1m 45s"),
    ("--election-timeout 50000", "cluster.failure_timeout", "2m 13s 333ms 333us 332ns"),
    ("--listen-peer-urls http://10.0.0.1:1,http://[::1]:2", "server.listen_peer", "10.0.0.1:1,[::1]:2"),
    ("--listen-client-urls http://10.0.0.1:1,unix:///run/q", "server.listen_client", "10.0.0.1:1,unix:/run/q"),
    ("--listen-client-urls http://10.0.0.1:1", "server.advertise_client", ""),
    ("--listen-client-http-urls http://10.0.0.1:1", "server.listen_client", "127.0.0.1:2379,10.0.0.1:1"),
    (
        "--listen-metrics-urls http://127.0.0.1:2381,http://10.0.0.1:1",
        "server.listen_status",
        "127.0.0.1:2381,10.0.0.1:1",
    ),
    ("--advertise-client-urls http://a:1,http://b:2/", "server.advertise_client", "http://a:1,http://b:2"),
    ("--advertise-client-urls unix:///run/q", "server.advertise_client", "unix:///run/q"),
    ("--initial-advertise-peer-urls http://a:1", "cluster.members", "default=a:1"),
    ("--name b --initial-cluster a=http://h:1,b=http://h:2", "cluster.members", "a=h:1,b=h:2"),
    ("--name b --initial-cluster a=http://h:1,a=http://i:1,b=http://h:2", "cluster.members", "a=h:1,b=h:2"),
    ("--name b --initial-cluster a=http://h:1,http://i:1,b=http://h:2", "cluster.members", "a=h:1,b=h:2"),
    ("--name b --initial-cluster a=http://h:1,b=http://h:2 --initial-cluster-state existing", "cluster.join", "h:1"),
    ("--name b --initial-cluster a=http://h:1,b=http://h:2 --initial-cluster-state existing", "cluster.members", ""),
    (
        "--name b --initial-cluster a=http://h:1,b=http://h:2 --initial-cluster-state existing",
        "server.advertise_peer",
        "h:2",
    ),
    ("--initial-cluster-token t", "cluster.token", "t"),
    ("--quota-backend-bytes 8589934592", "storage.quota_bytes", "8GiB"),
    ("--quota-backend-bytes=-1", "storage.quota_bytes", "0B"),
    ("--max-txn-ops 1024", "limits.txn_ops_max", "1024"),
    ("--max-request-bytes 10485760", "limits.request_bytes_max", "10MiB"),
    ("--max-concurrent-streams 100", "limits.concurrent_streams_max", "100"),
    ("--grpc-keepalive-interval 10s", "limits.keepalive_interval", "10s"),
    ("--grpc-keepalive-timeout 1m30s", "limits.keepalive_timeout", "1m 30s"),
    ("--snapshot-catchup-entries 10", "log.entries_kept", "10"),
    ("--auto-compaction-retention 1", "storage.compaction_retention", "1h"),
    ("--auto-compaction-retention 5m", "storage.compaction_mode", "periodic"),
    ("--auto-compaction-retention 5m", "storage.compaction_retention", "5m"),
    ("--auto-compaction-mode revision --auto-compaction-retention 1000", "storage.compaction_retention", "1000"),
    ("--auto-compaction-mode revision --auto-compaction-retention 1000", "storage.compaction_mode", "revision"),
    ("--cors https://ui.example.org", "http.cors", "https://ui.example.org"),
    ("--host-whitelist a,b", "http.hosts", "a,b"),
    ("--bcrypt-cost 12", "auth.bcrypt_cost", "12"),
    ("--auth-token-ttl 600", "auth.token_ttl", "10m"),
    ("--log-level panic", "telemetry.level", "error"),
    ("--log-format console", "telemetry.format", "text"),
    ("--corrupt-check-time 1m", "raft.self_check_interval", "1m"),
    ("--watch-progress-notify-interval 5s", "watch.progress_interval", "5s"),
    ("--experimental-watch-progress-notify-interval=5s", "watch.progress_interval", "5s"),
];

#[test]
fn every_flag_that_is_taken_becomes_its_setting() {
    for (line, key, expected) in CASES {
        assert_eq!(setting(line, key), *expected, "{line:?}: {key}");
    }
    let elsewhere = ["log-outputs", "feature-gates", "config-file", "initial-cluster-state"];
    for flag in FLAGS.iter().filter(|flag| flag.fate == Fate::Taken && !elsewhere.contains(&flag.name)) {
        let is_tested = CASES.iter().any(|(line, _, _)| line.contains(flag.name));
        assert!(is_tested, "no case above has --{}", flag.name);
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    for (line, why) in [
        ("--cert-file c", "--cert-file \"c\" is refused: TLS is not there yet"),
        ("--client-cert-auth", "--client-cert-auth \"true\" is refused: TLS"),
        ("--peer-auto-tls=true", "--peer-auto-tls \"true\" is refused: TLS"),
        ("--tls-min-version TLS1.3", "is refused: TLS"),
        ("--listen-client-urls https://0.0.0.0:2379", "asks for TLS"),
        ("--listen-client-urls unixs://s", "asks for TLS"),
        ("--initial-cluster default=https://a:1", "--initial-cluster: \"https://a:1\" asks for TLS"),
        ("--listen-peer-urls unix://s", "server.listen_peer"),
        ("--listen-client-urls http://host:1", "expected an IP address"),
        ("--listen-client-urls 0.0.0.0:1", "expected http://host:port"),
        ("--initial-cluster a=http://h:1", "not in the list of members (a)"),
        ("--initial-cluster default=http://h:1,b=http://h:1", "another member has its address"),
        ("--initial-cluster http://h:1", "expected name=http://host:port"),
        ("--initial-cluster-state old", "expected new or existing"),
        ("--initial-cluster-state existing", "a place to find the cluster"),
        ("--discovery-token t", "--discovery-token \"t\" is refused"),
        ("--auth-token jwt,pub-key=k", "--auth-token"),
        ("--force-new-cluster", "quorate recover"),
        ("--heartbeat-interval x", "expected milliseconds"),
        ("--heartbeat-interval 500", "raft.election_timeout_min"),
        ("--election-timeout 50001", "expected at most 50000"),
        ("--quota-backend-bytes 2GB", "expected a whole number"),
        ("--max-txn-ops 0", "limits.txn_ops_max"),
        ("--max-txn-ops=-1", "limits.txn_ops_max"),
        ("--grpc-keepalive-interval 5", "expected a duration"),
        ("--auto-compaction-mode never --auto-compaction-retention 1h", "storage.compaction_mode"),
        ("--auto-compaction-mode revision --auto-compaction-retention 1h", "storage.compaction_retention"),
        ("--log-level loud", "--log-level"),
        ("--log-outputs stderr,stdout", "--log-outputs"),
        ("--feature-gates NoSuchGate=true", "NoSuchGate"),
        ("--cors ui", "http.cors"),
    ] {
        let refusal = config(line).and_then(|config| Ok(config.node(None, "host")?)).map(|_| ());
        let message = format!("{:#}", refusal.expect_err(line));
        assert!(message.contains(why), "{line}: {message}");
    }
}

#[test]
fn what_changes_nothing_is_said_in_a_line_and_defaults_are_not() {
    let notes = |line: &str| translated(line).unwrap().notes;
    let said = notes("--snapshot-count=20000 --max-wals 7 --feature-gates InitialCorruptCheck=true --enable-pprof");
    for name in ["snapshot-count", "max-wals", "InitialCorruptCheck", "enable-pprof"] {
        assert_eq!(said.iter().filter(|note| note.contains(name)).count(), 1, "{name}: {said:?}");
    }
    let quiet =
        "--snapshot-count=10000 --pre-vote --client-cert-auth=false --cert-file= --auth-token simple --logger zap";
    assert_eq!(notes(quiet), Vec::<String>::new());
    assert_eq!(translated("--log-outputs stdout").unwrap().output, Output::Standard);
    assert_eq!(translated("--log-outputs /var/log/e").unwrap().output, Output::File("/var/log/e".into()));
}

#[test]
fn durations_are_read_as_go_writes_them() {
    for (text, expected) in [
        ("0", Some(0)),
        ("0s", Some(0)),
        ("300ms", Some(300_000_000)),
        ("1h2m3.5s", Some(3_723_500_000_000)),
        ("1.5h", Some(5_400_000_000_000)),
        ("600000000000ns", Some(600_000_000_000)),
        ("5µs", Some(5_000)),
        ("", None),
        ("5", None),
        ("5x", None),
        ("s", None),
        ("-5s", None),
        ("1..5s", None),
    ] {
        assert_eq!(go_duration(text).map(|d| d.as_nanos()), expected, "{text:?}");
    }
}

/// A shortest lease is one and a half elections with etcd, and so it is here with etcd's flags.
#[test]
fn the_spread_of_elections_leaves_the_shortest_lease_as_etcds() {
    let config = config("").unwrap();
    assert_eq!((config.raft.election_timeout_max * 3 / 2).as_millis().div_ceil(1000), 2);
}
