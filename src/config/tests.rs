//! Sources and their precedence, messages, the manual, and the node that follows from settings.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;
use crate::env::{Disk, File, OpenMode};

/// Read-only files in memory. Their length says 0, as that of the files that the kernel makes up does.
#[derive(Default)]
pub(crate) struct Files(BTreeMap<PathBuf, String>);

impl Files {
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        Self(files.iter().map(|(path, text)| (path.into(), (*text).to_owned())).collect())
    }
}

struct Text(Vec<u8>);

impl File for Text {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = &self.0[self.0.len().min(offset as usize)..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn allocate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

impl Disk for Files {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        assert_eq!(mode, OpenMode::Read, "settings are only read");
        let text = self.0.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Text(text.clone().into_bytes())))
    }
    fn exists(&self, path: &Path) -> bool {
        self.0.contains_key(path)
    }
    fn create_dir_all(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn remove_file(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn remove_dir_all(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn list(&self, _: &Path) -> io::Result<Vec<String>> {
        Ok(self.0.keys().map(|path| path.display().to_string()).collect())
    }
    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(0)
    }
}

/// Loads `file` as the default one, `env` and `flags`.
fn read(file: Option<&str>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, Error> {
    let disk = Files::new(file.map(|text| (DEFAULT_FILE, text)).as_slice());
    let own = |text: &str| text.to_owned();
    let sources = Sources {
        file: super::File::Default,
        env: env.iter().map(|(name, text)| (own(name), own(text))).collect(),
        flags: flags.iter().map(|(key, value)| Flag { key: own(key), value: own(value), flag: own("--set") }).collect(),
    };
    load(&disk, &sources)
}

fn refusal(file: Option<&str>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> String {
    let message = read(file, env, flags).expect_err("settings that are refused").to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

#[test]
fn no_source_gives_defaults() {
    let loaded = read(None, &[], &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    assert!(loaded.origins.is_empty(), "{:?}", loaded.origins);
}

#[test]
fn each_source_overrides_the_one_before() {
    let file = "[limits]\ntxn_ops_max = 1\nconnections_max = 1\nconcurrent_streams_max = 1\n";
    let env = [("QUORATE_LIMITS__CONNECTIONS_MAX", "2"), ("QUORATE_LIMITS__CONCURRENT_STREAMS_MAX", "2")];
    let flags = [("limits.concurrent_streams_max", "3")];
    let loaded = read(Some(file), &env, &flags).unwrap();
    let limits = &loaded.config.limits;
    assert_eq!((limits.txn_ops_max, limits.connections_max, limits.concurrent_streams_max), (1, 2, 3));
    assert_eq!(limits.request_bytes_max, Limits::default().request_bytes_max);
    let origins = loaded.origins.iter().map(|(key, origin)| (key.as_str(), origin.as_str())).collect::<Vec<_>>();
    assert_eq!(
        origins,
        [
            ("limits.concurrent_streams_max", "--set"),
            ("limits.connections_max", "QUORATE_LIMITS__CONNECTIONS_MAX"),
            ("limits.txn_ops_max", DEFAULT_FILE),
        ]
    );
}

#[test]
fn later_flag_wins() {
    let loaded = read(None, &[], &[("limits.txn_ops_max", "1"), ("limits.txn_ops_max", "2")]).unwrap();
    assert_eq!(loaded.config.limits.txn_ops_max, 2);
}

#[test]
fn text_is_read_as_the_type_of_its_key() {
    let env = [
        ("QUORATE_RAFT__HEARTBEAT_INTERVAL", "50ms"),
        ("QUORATE_RAFT__LEASE_READS", "true"),
        ("QUORATE_STORAGE__QUOTA_BYTES", "1.5GiB"),
        ("QUORATE_IDENTITY__SLOT", "7"),
        ("QUORATE_SERVER__LISTEN_CLIENT", "[::1]:1"),
        ("QUORATE_SERVER__ADVERTISE_CLIENT", "http://a:1, http://b:2"),
        ("QUORATE_TELEMETRY__FORMAT", "json"),
    ];
    let config = read(None, &env, &[]).unwrap().config;
    assert_eq!(config.raft.heartbeat_interval, Duration::from_millis(50));
    assert!(config.raft.lease_reads);
    assert_eq!(config.storage.quota_bytes, Bytes(3 << 29));
    assert_eq!(config.identity.slot, Some(7));
    assert_eq!(config.server.listen_client, "[::1]:1".parse().unwrap());
    assert_eq!(config.server.advertise_client, ["http://a:1", "http://b:2"]);
    assert_eq!(config.telemetry.format, LogFormat::Json);
}

#[test]
fn variables_of_kubernetes_and_empty_ones_are_ignored() {
    let env = [
        ("QUORATE_PORT", "tcp://10.0.0.1:2379"),
        ("QUORATE_SERVICE_HOST", "10.0.0.1"),
        ("QUORATE_PORT_2379_TCP_ADDR", "10.0.0.1"),
        ("QUORATE_ENDPOINTS", "127.0.0.1:2379"),
        ("OTHER__KEY", "1"),
        ("QUORATE_IDENTITY__SLOT", ""),
    ];
    assert_eq!(read(None, &env, &[]).unwrap().config, Config::default());
}

#[test]
fn a_setting_with_one_underscore_is_named_as_a_likely_mistake() {
    let env = [("QUORATE_RAFT_HEARTBEAT_INTERVAL", "50ms"), ("QUORATE_RAFT_LEASE_READS", ""), ("QUORATE_PORT", "1")];
    let loaded = read(None, &env, &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    let [mistake] = &loaded.mistakes[..] else { panic!("{:?}", loaded.mistakes) };
    assert!(mistake.starts_with("QUORATE_RAFT_HEARTBEAT_INTERVAL"), "{mistake}");
    assert!(mistake.contains("QUORATE_RAFT__HEARTBEAT_INTERVAL is, with two underscores"), "{mistake}");
}

#[test]
fn unknown_key_is_named_with_source_and_nearest_key() {
    let cases = [
        (
            refusal(Some("[raft]\nheartbeat = \"1s\""), &[], &[]),
            "raft.heartbeat",
            DEFAULT_FILE,
            "raft.heartbeat_interval",
        ),
        (
            refusal(None, &[("QUORATE_CLUSTER__SISE", "3")], &[]),
            "cluster.sise",
            "QUORATE_CLUSTER__SISE",
            "cluster.size",
        ),
        (refusal(None, &[], &[("server.peers", "x")]), "server.peers", "--set", "cluster.peers"),
        (refusal(None, &[], &[("cluster.size.x", "1")]), "cluster.size.x", "--set", "cluster.size"),
        (refusal(Some("server = 1"), &[], &[]), "server", DEFAULT_FILE, "the section [server]"),
        (refusal(Some("[servr]"), &[], &[]), "servr", DEFAULT_FILE, "the section [server]"),
    ];
    for (message, key, origin, nearest) in cases {
        let head = format!("unknown key {key} (from {origin}), expected perhaps {nearest}");
        assert!(message.starts_with(&head), "{message}\n{head}");
    }
    let message = refusal(None, &[], &[("zzz.qqq", "1")]);
    assert_eq!(message, "unknown key zzz.qqq (from --set); correct or remove it");
}

#[test]
fn empty_section_changes_nothing() {
    assert_eq!(read(Some("[raft]\n[log]\n"), &[], &[]).unwrap().config, Config::default());
}

#[test]
fn bad_value_is_named_with_key_source_and_form() {
    let cases = [
        (refusal(Some("[raft]\nheartbeat_interval = 100"), &[], &[]), "raft.heartbeat_interval", "with its unit"),
        (refusal(Some("[log]\nsegment_bytes = 64"), &[], &[]), "log.segment_bytes", "with its unit"),
        (refusal(Some("[cluster]\nsize = \"many\""), &[], &[]), "cluster.size", "expected"),
        (refusal(Some("[cluster]\nsize = -1"), &[], &[]), "cluster.size", "expected"),
        (refusal(Some("[cluster]\nsize = 70000"), &[], &[]), "cluster.size", "expected"),
        (refusal(Some("[server]\nlisten_peer = \"here\""), &[], &[]), "server.listen_peer", "address:port"),
        (refusal(Some("[telemetry]\nformat = \"xml\""), &[], &[]), "telemetry.format", "text, json"),
        (refusal(Some("[storage]\ncompaction_mode = \"x\""), &[], &[]), "storage.compaction_mode", "off, periodic"),
    ];
    for (message, key, form) in cases {
        assert!(message.starts_with(&format!("{key} (from {DEFAULT_FILE}): ")), "{message}");
        assert!(message.contains(form), "{message}");
    }
    let message = refusal(None, &[("QUORATE_STORAGE__QUOTA_BYTES", "2000")], &[]);
    assert!(message.starts_with("storage.quota_bytes (from QUORATE_STORAGE__QUOTA_BYTES): got \"2000\""), "{message}");
}

#[test]
fn bad_file_is_named_with_its_line() {
    let message = refusal(Some("[raft]\n\nlease_reads = = 1\n"), &[], &[]);
    assert!(message.starts_with(&format!("{DEFAULT_FILE} is not valid TOML: line 3: ")), "{message}");
    let sources = Sources { file: super::File::Named("/nowhere.toml".into()), ..Sources::default() };
    let message = load(&Files::default(), &sources).unwrap_err().to_string();
    assert!(message.starts_with("cannot read /nowhere.toml: "), "{message}");
    let large = format!("#{}", "x".repeat(64 << 10));
    assert!(refusal(Some(&large), &[], &[]).contains("64 KiB or more"));
}

#[test]
fn named_file_replaces_the_default_one() {
    let disk = Files::new(&[(DEFAULT_FILE, "[limits]\ntxn_ops_max = 1"), ("/own.toml", "[cluster]\nmax_voters = 3")]);
    let sources = Sources { file: super::File::Named("/own.toml".into()), ..Sources::default() };
    let config = load(&disk, &sources).unwrap().config;
    assert_eq!((config.limits.txn_ops_max, config.cluster.max_voters), (128, 3));
}

#[test]
fn relations_are_checked_on_load() {
    let message = refusal(None, &[], &[("raft.heartbeat_interval", "200ms")]);
    assert!(message.contains("raft.election_timeout_min: got 400ms, expected at least 600ms"), "{message}");
}

#[test]
fn manual_is_the_default_and_mentions_every_key() {
    let disk = Files::new(&[("/manual.toml", MANUAL)]);
    let loaded =
        load(&disk, &Sources { file: super::File::Named("/manual.toml".into()), ..Sources::default() }).unwrap();
    assert_eq!(loaded.config, Config::default());
    let commented: toml::Table = toml::from_str(&MANUAL.replace("# slot = ", "slot = ")).unwrap();
    let keys = |table: &toml::Table| -> BTreeSet<String> {
        let of = |(section, keys): (&String, &toml::Value)| {
            let section = section.clone();
            keys.as_table().unwrap().keys().map(move |key| format!("{section}.{key}")).collect::<Vec<_>>()
        };
        table.iter().flat_map(of).collect()
    };
    let all = Config { identity: Identity { slot: Some(0), ..Identity::default() }, ..Config::default() };
    assert_eq!(keys(&commented), keys(&toml::Table::try_from(&all).unwrap()));
}

#[test]
fn description_parses_to_the_same_config_and_names_sources() {
    let loaded = read(None, &[("QUORATE_IDENTITY__SLOT", "2")], &[("raft.heartbeat_interval", "50ms")]).unwrap();
    let text = loaded.describe();
    assert!(text.contains("slot = 2  # QUORATE_IDENTITY__SLOT\n"), "{text}");
    assert!(text.contains("heartbeat_interval = \"50ms\"  # --set\n"), "{text}");
    assert!(text.contains("election_timeout_min = \"400ms\"  # default\n"), "{text}");
    assert_eq!(toml::from_str::<Config>(&text).unwrap(), loaded.config);
    let keys = |text: &str| -> Vec<String> {
        let line = |line: &str| line.split_once(" = ").map_or(line, |(key, _)| key).trim_start_matches("# ").to_owned();
        text.lines().filter(|line| line.starts_with('[') || line.contains(" = ")).map(line).collect()
    };
    assert_eq!(keys(&text), keys(MANUAL), "in the manual's order");
}

#[test]
fn message_limits_exceed_what_they_carry() {
    let config = Config::default();
    assert!(config.peer_message_bytes_max() > config.raft.append_bytes_max.as_usize());
    assert!(config.peer_message_bytes_max() > config.limits.request_bytes_max.as_usize());
    assert!(config.client_message_bytes_max() > config.limits.request_bytes_max.as_usize());
}

fn node(flags: &[(&str, &str)], pod: Option<&str>, host: &str) -> Result<Node, Error> {
    read(None, &[], flags).unwrap().config.node(pod, host)
}

#[test]
fn addresses_follow_from_the_pattern() {
    let peers = ("cluster.peers", "kv-%d.kv-headless:2380");
    let node = node(&[peers], Some("kv-2"), "anything").unwrap();
    assert_eq!((node.name.as_str(), node.slot), ("kv-2", 2));
    assert_eq!(node.advertise_peer, "kv-2.kv-headless:2380");
    assert_eq!(node.advertise_client, ["http://kv-2.kv-headless:2379"]);
}

#[test]
fn advertised_addresses_can_be_set() {
    let flags = [
        ("cluster.peers", "kv-%d.kv-headless:2380"),
        ("server.advertise_peer", "10.0.0.1:1234"),
        ("server.listen_client", "127.0.0.1:99"),
    ];
    let derived = node(&flags, Some("kv-0"), "").unwrap();
    assert_eq!(
        (derived.advertise_peer.as_str(), derived.advertise_client[0].as_str()),
        ("10.0.0.1:1234", "http://10.0.0.1:99")
    );
    let more = [("server.advertise_client", "http://x:1,http://y:2"), ("server.advertise_peer", "x:1,y:1,z:1")];
    let own = node(&[flags.as_slice(), &more].concat(), Some("kv-0"), "").unwrap();
    assert_eq!(own.advertise_client, ["http://x:1", "http://y:2"]);
    assert_eq!((own.advertise_peer, own.more_peer_addresses), ("x:1".into(), vec!["y:1".into(), "z:1".into()]));
}

#[test]
fn cluster_of_one_needs_no_slot() {
    let node = node(&[("cluster.first_slot", "3")], None, "laptop").unwrap();
    assert_eq!((node.name.as_str(), node.slot, node.peers, node.founding), ("laptop", 3, None, 0));
    assert_eq!(node.advertise_peer, "127.0.0.1:2380");
    assert_eq!(node.advertise_client, ["http://127.0.0.1:2379"]);
}

#[test]
fn pattern_needs_a_slot_that_fits_the_name() {
    let peers = ("cluster.peers", "kv-%d.kv-headless:2380");
    assert!(node(&[peers], None, "laptop").unwrap_err().to_string().contains("ends in no slot"));
    assert!(node(&[peers], Some("db-0"), "").unwrap_err().to_string().contains("this node's name is \"db-0\""));
    let explicit = node(&[peers, ("identity.slot", "1")], None, "c0ffee").unwrap();
    assert_eq!((explicit.slot, explicit.advertise_peer.as_str()), (1, "kv-1.kv-headless:2380"));
}

/// Every setting with values from its ends and beyond, several at a time: it is refused in a sentence, or can be shown and used.
#[test]
fn extreme_values_are_refused_in_a_sentence_or_taken() {
    const VALUES: [&str; 24] = [
        "0",
        "1",
        "-1",
        "2147483648",
        "4294967295",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "1e400",
        "0B",
        "1B",
        "2GiB",
        "1024TiB",
        "16777215TiB",
        "99999999TiB",
        "0s",
        "1ns",
        "87600h",
        "584542046090years",
        "18446744073709551615s",
        "periodic",
        "\u{0}",
        "%d%d",
        "",
    ];
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let keys = super::load::known_keys();
    let mut taken = 0;
    let singles = keys.iter().flat_map(|key| VALUES.map(|value| vec![(&key[..], value)]));
    let mixed: Vec<Vec<(&str, &str)>> = std::iter::repeat_with(|| {
        (0..random.usize(2..5))
            .map(|_| (&keys[random.usize(..keys.len())][..], VALUES[random.usize(..VALUES.len())]))
            .collect()
    })
    .take(3000)
    .collect();
    for flags in singles.chain(mixed) {
        match read(None, &[], &flags) {
            Ok(loaded) => {
                taken += 1;
                loaded.describe();
                loaded.config.peer_message_bytes_max();
                loaded.config.storage.compaction().unwrap();
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains('\n'), "one line: {text}");
                assert!(text.contains("expected") || text.contains("peer pattern"), "{flags:?}: {text}");
            }
        }
    }
    assert!(taken > 100, "some of them are fine: {taken}");
}
