//! Flags beside the settings that they become, and the table beside etcd's own help.

use super::*;
use crate::cli::etcd::flags::{self, Line};
use crate::config::{Config, File, Sources, load};

fn translated(line: &str) -> anyhow::Result<Translation> {
    let words: Vec<String> = line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let Line::Flags(given) = flags::read(&words)? else { bail!("no flags") };
    translate(&Given::new(given), &Members::Listed)
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

const CLIENT_TLS: &str = "--listen-client-urls https://10.0.0.1:1,unixs:///run/q --cert-file c --key-file k";
const CLIENT_MTLS: &str = "--listen-client-urls https://10.0.0.1:1 --cert-file c --key-file k --trusted-ca-file ca --client-crl-file l \
     --client-cert-auth --client-cert-allowed-hostname a,b --tls-max-version TLS1.3 \
     --cipher-suites TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305,TLS_AES_128_GCM_SHA256";
const PEER_TLS: &str = "--listen-peer-urls https://10.0.0.1:1 --initial-cluster default=https://10.0.0.1:1 --peer-cert-file c \
     --peer-key-file k --peer-trusted-ca-file ca --peer-crl-file l --peer-cert-allowed-cn a,b --peer-cert-allowed-hostname a,b \
     --peer-client-cert-auth --peer-skip-client-san-verification --tls-min-version TLS1.3";

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
    ("--name a --initial-cluster a=http://h:1,a=http://i:1,b=http://h:2", "server.advertise_peer", "h:1,i:1"),
    (
        "--name b --initial-cluster a=http://h:1,http://i:1,b=http://h:2 --initial-cluster-state existing",
        "cluster.join",
        "h:1,i:1",
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
    (CLIENT_TLS, "client_tls.mode", "files"),
    (CLIENT_TLS, "client_tls.cert_file", "c"),
    (CLIENT_TLS, "client_tls.key_file", "k"),
    (CLIENT_TLS, "client_tls.ca_file", ""),
    (CLIENT_TLS, "client_tls.client_cert", "off"),
    (CLIENT_TLS, "server.listen_client", "10.0.0.1:1,unix:/run/q"),
    (CLIENT_TLS, "peer_tls.mode", "off"),
    (CLIENT_MTLS, "client_tls.client_cert", "required"),
    (CLIENT_MTLS, "client_tls.ca_file", "ca"),
    (CLIENT_MTLS, "client_tls.crl_file", "l"),
    (CLIENT_MTLS, "client_tls.allowed_names", "a,b"),
    (CLIENT_MTLS, "client_tls.min_version", "1.2"),
    (CLIENT_MTLS, "client_tls.cipher_suites", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"),
    (PEER_TLS, "peer_tls.mode", "files"),
    (PEER_TLS, "peer_tls.cert_file", "c"),
    (PEER_TLS, "peer_tls.key_file", "k"),
    (PEER_TLS, "peer_tls.ca_file", "ca"),
    (PEER_TLS, "peer_tls.crl_file", "l"),
    (PEER_TLS, "peer_tls.allowed_names", "a,b"),
    (PEER_TLS, "peer_tls.check_address", "false"),
    (PEER_TLS, "peer_tls.min_version", "1.3"),
    (PEER_TLS, "cluster.members", "default=10.0.0.1:1"),
    (PEER_TLS, "client_tls.mode", "off"),
    ("--cert-file c --key-file k --client-cert-auth", "client_tls.mode", "off"),
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
    let elsewhere =
        ["log-outputs", "feature-gates", "config-file", "initial-cluster-state", "discovery-srv", "discovery-srv-name"];
    for flag in FLAGS.iter().filter(|flag| flag.fate == Fate::Taken && !elsewhere.contains(&flag.name)) {
        let is_tested = CASES.iter().any(|(line, _, _)| line.contains(flag.name));
        assert!(is_tested, "no case above has --{}", flag.name);
    }
}

/// What DNS lists stands for `--initial-cluster`, under other names than the members' own.
#[test]
fn members_of_dns_become_a_list_with_this_member_by_its_place() {
    let found = Members::Found(Found { list: "h:1=http://h:1,i:1=http://i:1".into(), own: "i:1".into() });
    let translated = |line: &str, members: &Members| {
        let Line::Flags(given) = flags::read(&[line.to_owned(), "--name=a".to_owned()]).unwrap() else {
            panic!("no flags")
        };
        let settings = translate(&Given::new(given), members)?.settings;
        let sources = Sources { file: File::None, flags: settings, ..Sources::default() };
        let config = load(&crate::config::tests::Files::default(), &sources)?.config;
        let node = config.node(None, "host")?;
        anyhow::Ok((config.cluster.join, node.name, node.slot, node.advertise_peer))
    };
    let own = "--initial-advertise-peer-urls=http://10.0.0.2:1";
    let (join, name, slot, address) = translated(own, &found).unwrap();
    assert_eq!((join, &name[..], slot, &address[..]), (vec![], "a", 1, "10.0.0.2:1"));
    let (join, _, slot, _) = translated("--initial-cluster-state=existing", &found).unwrap();
    assert_eq!((join, slot), (vec!["h:1".to_owned()], crate::identity::READER_SLOT));
    let (join, _, slot, address) = translated(own, &Members::Known).unwrap();
    assert_eq!((join, slot, &address[..]), (vec!["10.0.0.2:1".to_owned()], crate::identity::READER_SLOT, "10.0.0.2:1"));
    let https = Members::Found(Found { list: "h:1=https://h:1".into(), own: "h:1".into() });
    let message = translated(own, &https).unwrap_err().to_string();
    assert!(message.contains("--discovery-srv: \"https://h:1\" and --listen-peer-urls"), "{message}");
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    for (line, why) in [
        ("--listen-client-urls https://0.0.0.0:2379 --key-file k", "client_tls.cert_file: got nothing"),
        ("--listen-client-urls https://0.0.0.0:1 --cert-file c --key-file k --client-cert-auth", "client_tls.ca_file"),
        ("--listen-client-urls https://0.0.0.0:1,http://0.0.0.0:2", "some of both"),
        ("--listen-client-urls unixs://s", "client_tls.cert_file"),
        ("--listen-metrics-urls https://0.0.0.0:1", "without TLS"),
        ("--peer-auto-tls=true", "--peer-auto-tls \"true\" is refused: nobody can check"),
        ("--auto-tls", "quorate cert"),
        ("--peer-client-cert-file c", "the same certificate"),
        ("--listen-client-urls https://0.0.0.0:1 --tls-min-version TLS1.1", "expected TLS1.2 or TLS1.3"),
        ("--listen-client-urls https://0.0.0.0:1 --tls-max-version TLS1.2", "--tls-max-version"),
        ("--initial-cluster default=https://a:1", "\"https://a:1\" and --listen-peer-urls"),
        ("--listen-peer-urls https://10.0.0.1:1 --initial-cluster default=http://10.0.0.1:1", "--listen-peer-urls"),
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
    // As with etcd, files alone turn nothing on.
    let said = notes("--cert-file c --client-cert-auth --peer-cert-file p --tls-min-version TLS1.3");
    for name in ["--cert-file", "--client-cert-auth", "--peer-cert-file", "--tls-min-version"] {
        assert_eq!(said.iter().filter(|note| note.starts_with(name)).count(), 1, "{name}: {said:?}");
    }
    let said = notes(CLIENT_MTLS);
    assert!(said.len() == 1 && said[0].contains("TLS_AES_128_GCM_SHA256"), "{said:?}");
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
