//! Relations between settings, and bounds of each.
//!
//! Every violation is collected, so that one start shows all of them; each says what was got, what was expected and what
//! to do. Absent: what only the machine can tell (measured fsync times, memory), which the server checks later.

use std::fmt::Display;
use std::time::Duration;

use super::{Bytes, CompactionMode, Config, Error, MemberKind};
use crate::env::net::Place;
use crate::identity::{self, PeerList, PeerPattern, SLOT_MAX};
use crate::pb;

/// The largest append and request; gRPC's message limits are set above it ([`Config::peer_message_bytes_max`]).
pub const MESSAGE_BYTES_MAX: Bytes = Bytes::mib(16);
/// Above any count that means something, and below what counters, channels and semaphores can hold several times over.
const COUNT_MAX: u64 = 1_000_000_000_000;
/// The log's segments are mapped to offsets of 32 bits.
const SEGMENT_BYTES_MAX: Bytes = Bytes::gib(1);
/// Less, and sled does not open.
const STATE_CACHE_BYTES_MIN: Bytes = Bytes::mib(1);
/// Leaders are asked for the time of records once a second.
const BACKUP_INTERVAL_MIN: Duration = Duration::from_secs(1);
const WORKER_THREADS_MAX: usize = 1024;
/// bcrypt's least, and what takes seconds (`secure::password`).
const BCRYPT_COSTS: std::ops::RangeInclusive<usize> = 4..=16;

/// The greatest `limits.txn_depth_max`: half of what every decoder takes.
const TXN_DEPTH_MAX: usize = pb::TXN_DEPTH_MAX / 2;

pub(super) struct Faults(Vec<String>);

impl Faults {
    pub(super) fn check(&mut self, holds: bool, key: &str, got: impl Display, expected: impl Display, action: &str) {
        if !holds {
            self.0.push(format!("{key}: got {got}, expected {expected}; {action}"));
        }
    }

    /// `got >= least`, where `least` comes from another setting.
    fn at_least(&mut self, key: &str, got: Bytes, least: Bytes, why: &str) {
        let expected = format!("at least {least} ({why})");
        self.check(got >= least, key, got, expected, "raise it, or lower the other");
    }

    fn positive(&mut self, key: &str, got: u64) {
        self.check(got > 0, key, got, "at least 1", "raise it");
    }

    fn within(&mut self, key: &str, got: usize, bounds: std::ops::RangeInclusive<usize>) {
        let expected = format!("{} to {}", bounds.start(), bounds.end());
        self.check(bounds.contains(&got), key, got, expected, "set it within these");
    }
}

impl Config {
    /// Checks what no single field can: bounds, and relations between fields.
    pub fn validate(&self) -> Result<(), Error> {
        let mut faults = Faults(Vec::new());
        self.check_counts(&mut faults);
        self.check_server(&mut faults);
        self.check_tls(&mut faults);
        self.check_oidc(&mut faults);
        self.check_audit(&mut faults);
        self.check_cluster(&mut faults);
        self.check_kubernetes(&mut faults);
        self.check_timing(&mut faults);
        self.check_sizes(&mut faults);
        self.check_storage(&mut faults);
        self.check_backup(&mut faults);
        if faults.0.is_empty() { Ok(()) } else { Err(Error::Invalid(faults.0)) }
    }

    /// Every count there is, also one that is added tomorrow. Durations and sizes are bounded where they are read (`units`).
    fn check_counts(&self, faults: &mut Faults) {
        let all = serde_json::to_value(self).expect("every setting has a form in JSON");
        for (section, keys) in all.as_object().into_iter().flatten() {
            for (key, value) in keys.as_object().into_iter().flatten() {
                if let Some(count) = value.as_u64() {
                    let expected = format!("at most {COUNT_MAX}");
                    faults.check(count <= COUNT_MAX, &format!("{section}.{key}"), count, expected, "lower it");
                }
            }
        }
    }

    fn check_backup(&self, faults: &mut Faults) {
        let backup = &self.backup;
        for (key, url) in [
            ("backup.url", &backup.url),
            ("restore.from", &self.restore.from),
            ("restore.follow", &self.restore.follow),
        ] {
            let scheme = url.split_once("://").map(|(scheme, _)| scheme);
            let known =
                url.is_empty() || url.starts_with('/') || ["file", "s3", "gs", "az"].map(Some).contains(&scheme);
            let expected = "an absolute directory, s3://bucket/path, gs://bucket/path or az://container/path";
            faults.check(known, key, format!("{url:?}"), expected, "correct it");
        }
        let follow = &self.restore.follow;
        let is_alone = follow.is_empty() || self.restore.from.is_empty();
        let expected = "nothing beside restore.from";
        faults.check(
            is_alone,
            "restore.follow",
            format!("{follow:?}"),
            expected,
            "leave one of them out: a standby begins with the newest moment",
        );
        let has_users = follow.is_empty() || self.auth.bootstrap.as_os_str().is_empty();
        let expected = "nothing beside auth.bootstrap";
        faults.check(
            has_users,
            "restore.follow",
            format!("{follow:?}"),
            expected,
            "leave one of them out: a standby has its source's users",
        );
        let shown = humantime::format_duration;
        let interval = backup.interval;
        faults.check(interval >= BACKUP_INTERVAL_MIN, "backup.interval", shown(interval), "at least 1s", "raise it");
        let every = backup.full_every;
        let expected = format!("at least backup.interval ({})", shown(interval));
        faults.check(every >= interval, "backup.full_every", shown(every), expected, "raise it, or lower the other");
        faults.positive("backup.keep_fulls", backup.keep_fulls as u64);
        let (got, least) = (backup.bandwidth, Bytes::kib(64));
        faults.check(got >= least, "backup.bandwidth", got, format!("at least {least} a second"), "raise it");
    }

    fn check_server(&self, faults: &mut Faults) {
        let server = &self.server;
        self.check_listeners(faults);
        for url in &server.advertise_client {
            let address = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
            let valid = address.and_then(|address| identity::host_port(address.trim_end_matches('/'))).is_some()
                || url.strip_prefix("unix://").is_some_and(|path| !path.is_empty());
            faults.check(valid, "server.advertise_client", format!("{url:?}"), "http://host:port", "correct it");
        }
        for peer in &server.advertise_peer {
            let valid = identity::host_port(peer).is_some();
            faults.check(valid, "server.advertise_peer", format!("{peer:?}"), "host:port", "correct it");
        }
        for (key, told) in
            [("server.advertise_client", &server.advertise_client), ("server.advertise_peer", &server.advertise_peer)]
        {
            let (most, expected) = (identity::URLS_MAX, format!("at most {} of them", identity::URLS_MAX));
            faults.check(told.len() <= most, key, told.len(), expected, "leave some out");
        }
        let data_dir = server.data_dir.as_os_str();
        faults.check(!data_dir.is_empty(), "server.data_dir", "nothing", "a directory", "name one");
        for origin in self.http.cors.iter().filter(|origin| *origin != "*") {
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            let valid = authority.is_some_and(|authority| !authority.is_empty() && !authority.contains('/'));
            let expected = "scheme://host[:port], or *";
            faults.check(valid, "http.cors", format!("{origin:?}"), expected, "correct it");
        }
        for host in &self.http.hosts {
            let valid = !host.is_empty() && !host.contains(['/', ':']);
            faults.check(
                valid,
                "http.hosts",
                format!("{host:?}"),
                "a name without scheme and port, or *",
                "correct it",
            );
        }
        let (threads, expected) = (server.worker_threads, format!("at most {WORKER_THREADS_MAX}, or 0"));
        faults.check(threads <= WORKER_THREADS_MAX, "server.worker_threads", threads, expected, "lower it");
        let level = &self.telemetry.level;
        // A word alone that is no level would be the name of a module, and everything else be silent.
        let is_level = |word: &str| word.contains('=') || word.parse::<tracing::metadata::LevelFilter>().is_ok();
        let valid =
            level.split(',').all(|word| is_level(word.trim())) && tracing_subscriber::EnvFilter::try_new(level).is_ok();
        let expected = "a level (off, error, warn, info, debug, trace) or module=level, with commas";
        faults.check(valid, "telemetry.level", format!("{level:?}"), expected, "correct it");
        faults.within("auth.bcrypt_cost", self.auth.bcrypt_cost as usize, BCRYPT_COSTS);
        faults.positive("lease.revokes_in_flight_max", self.lease.revokes_in_flight_max as u64);
        faults.positive("limits.txn_ops_max", self.limits.txn_ops_max as u64);
        faults.positive("limits.txn_ops_total_max", self.limits.txn_ops_total_max as u64);
        faults.positive("limits.request_cost_max", self.limits.request_cost_max);
        faults.within("limits.txn_depth_max", self.limits.txn_depth_max, 1..=TXN_DEPTH_MAX);
        faults.positive("limits.concurrent_streams_max", u64::from(self.limits.concurrent_streams_max));
        faults.positive("limits.connections_max", self.limits.connections_max as u64);
        faults.positive("limits.backups_max", self.limits.backups_max as u64);
        faults.positive("limits.range_streams_max", self.limits.range_streams_max as u64);
        faults.positive("watch.stream_watchers_max", self.watch.stream_watchers_max as u64);
        let (most, stream) = (self.watch.watchers_max, self.watch.stream_watchers_max);
        let expected = format!("at least watch.stream_watchers_max ({stream})");
        faults.check(most >= stream, "watch.watchers_max", most, expected, "raise it, or lower the other");
        let bytes = self.watch.stream_bytes_max;
        faults.at_least("watch.stream_bytes_max", bytes, Bytes::kib(4), "each event would be read twice");
        self.check_patience(faults);
    }

    /// Every place is listened at once; members dial over the network only.
    fn check_listeners(&self, faults: &mut Faults) {
        let server = &self.server;
        let mut taken: Vec<Place> = Vec::new();
        let status = server.status_places();
        let all = [
            ("server.listen_client", server.listen_client.places()),
            ("server.listen_peer", server.listen_peer.places()),
            ("server.listen_status", &status),
        ];
        for (key, places) in all {
            for place in places {
                let shared = !matches!(place, Place::Tcp(address) if address.port() == 0) && taken.contains(place);
                let action = "give it a port of its own; listen_status, left out, is two above the clients' port";
                faults.check(!shared, key, place, "another place than those of server.listen_*", action);
                taken.push(place.clone());
                let path = key != "server.listen_client" && matches!(place, Place::Unix(_));
                faults.check(
                    !path,
                    key,
                    place,
                    "address:port (only clients may come by a socket's path)",
                    "correct it",
                );
            }
        }
    }

    /// What clients may take before they are cut off.
    fn check_patience(&self, faults: &mut Faults) {
        let limits = &self.limits;
        for (key, got) in [
            ("limits.receive_timeout", limits.receive_timeout),
            ("limits.keepalive_interval", limits.keepalive_interval),
            ("limits.keepalive_timeout", limits.keepalive_timeout),
        ] {
            let least = Duration::from_secs(1);
            faults.check(got >= least, key, humantime::format_duration(got), "at least 1s", "raise it");
        }
        for (key, got) in [
            ("limits.receive_bytes_max", limits.receive_bytes_max),
            ("limits.answer_bytes_max", limits.answer_bytes_max),
        ] {
            faults.at_least(key, got, limits.request_bytes_max, "limits.request_bytes_max");
        }
    }

    fn check_cluster(&self, faults: &mut Faults) {
        let cluster = &self.cluster;
        faults.positive("cluster.size", u64::from(cluster.size));
        let odd = cluster.max_voters % 2 == 1;
        let action = "take the next smaller or greater one: an even number of voters survives no more failures";
        faults.check(odd, "cluster.max_voters", cluster.max_voters, "an odd number", action);
        let last_slot = u32::from(cluster.first_slot) + u32::from(cluster.size.max(1)) - 1;
        let expected = format!("the last slot (first_slot + size - 1) to be at most {SLOT_MAX}");
        faults.check(last_slot <= u32::from(SLOT_MAX), "cluster.size", cluster.size, expected, "lower it");
        let slot = self.identity.slot.unwrap_or_default();
        faults.check(slot <= SLOT_MAX, "identity.slot", slot, format!("at most {SLOT_MAX}"), "lower it");
        for address in &cluster.join {
            let valid = identity::host_port(address).is_some();
            faults.check(
                valid,
                "cluster.join",
                format!("{address:?}"),
                "host:port of a member's peer port",
                "correct it",
            );
        }
        if cluster.kind != MemberKind::Slot {
            let kind = cluster.kind;
            let found = !cluster.peers.is_empty() || !cluster.join.is_empty() || !cluster.members.is_empty();
            let action =
                "set cluster.peers (--peers) or cluster.join (--join), or list the first members (cluster.members)";
            faults.check(
                found,
                "cluster.kind",
                kind,
                "a place to find the cluster, for such a node forms none alone",
                action,
            );
            let listed = self.identity.slot.is_none_or(|slot| usize::from(slot) < cluster.members.len());
            let expected = format!("none, for a {kind} node owns no slot but its place in cluster.members, by name");
            faults.check(listed, "identity.slot", slot, expected, "leave it out");
        }
        if !cluster.members.is_empty() {
            let (kind, action) =
                (cluster.kind, "list them for nodes that are added by hand (--by-hand), or set cluster.peers alone");
            let alone = kind == MemberKind::Manual && cluster.peers.is_empty();
            faults.check(alone, "cluster.members", format!("{kind} with it"), "manual, and no cluster.peers", action);
            faults.0.extend(PeerList::new(&cluster.members).err().map(|fault| fault.to_string()));
        }
        if cluster.peers.is_empty() {
            let action = "set cluster.peers (--peers) to the address of every slot, such as kv-%d.kv-headless:2380";
            faults.check(cluster.size <= 1, "cluster.size", cluster.size, "1, for cluster.peers is empty", action);
            return;
        }
        let last_slot = last_slot.min(u32::from(SLOT_MAX)) as u16;
        let pattern = cluster.peers.parse::<PeerPattern>();
        let both = pattern.and_then(|pattern| pattern.check(cluster.first_slot).and(pattern.check(last_slot)));
        if let Err(fault) = both {
            faults.0.push(fault.to_string());
        }
    }

    fn check_kubernetes(&self, faults: &mut Faults) {
        let kubernetes = &self.kubernetes;
        for (key, name) in [("stateful_set", &kubernetes.stateful_set), ("namespace", &kubernetes.namespace)] {
            let is_label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
            let valid = name.len() <= 253 && name.chars().all(is_label);
            let key = format!("kubernetes.{key}");
            faults.check(
                valid,
                &key,
                format!("{name:?}"),
                "a name of lower-case letters, digits, - and .",
                "correct it",
            );
        }
        let on = !kubernetes.stateful_set.is_empty();
        let action = "set cluster.peers (--peers) to the address of every slot, such as kv-%d.kv-headless:2380";
        let got = format!("{:?} without cluster.peers", kubernetes.stateful_set);
        faults.check(!on || !self.cluster.peers.is_empty(), "kubernetes.stateful_set", got, "both or neither", action);
        let url = &kubernetes.api_server;
        let valid = url.is_empty() || url.starts_with("https://") && url.len() > "https://".len();
        faults.check(valid, "kubernetes.api_server", format!("{url:?}"), "https://host:port", "correct it");
        for (key, duration) in [("poll_interval", kubernetes.poll_interval), ("timeout", kubernetes.timeout)] {
            let least = Duration::from_millis(100);
            let (key, got) = (format!("kubernetes.{key}"), humantime::format_duration(duration));
            faults.check(
                duration >= least,
                &key,
                got,
                "at least 100ms (each question costs the API server)",
                "raise it",
            );
        }
    }

    fn check_timing(&self, faults: &mut Faults) {
        let raft = &self.raft;
        let (min, max) = (raft.election_timeout_min, raft.election_timeout_max);
        let mut at_least = |key: &str, got: Duration, least: Duration, why: &str| {
            let (got_text, least_text) = (humantime::format_duration(got), humantime::format_duration(least));
            let expected = format!("at least {least_text} ({why})");
            faults.check(got >= least, key, got_text, expected, "raise it, or lower the other");
        };
        let millis = Duration::from_millis;
        at_least("raft.heartbeat_interval", raft.heartbeat_interval, millis(10), "an append must finish within it");
        at_least("raft.election_timeout_min", min, raft.heartbeat_interval * 3, "3 x raft.heartbeat_interval");
        at_least("raft.election_timeout_max", max, min + millis(1), "more than raft.election_timeout_min");
        at_least("cluster.failure_timeout", self.cluster.failure_timeout, max * 2, "2 x raft.election_timeout_max");
        at_least("cluster.reader_ttl", self.cluster.reader_ttl, max * 2, "2 x raft.election_timeout_max");
        at_least("server.request_timeout", self.server.request_timeout, max, "raft.election_timeout_max");
        at_least("server.grace_period", self.server.grace_period, max, "raft.election_timeout_max");
        let interval = self.lease.checkpoint_interval;
        at_least("auth.token_ttl", self.auth.token_ttl, Duration::from_secs(1), "tokens count whole seconds");
        at_least("lease.checkpoint_interval", interval, Duration::from_secs(1), "lease times are whole seconds");
        at_least("watch.progress_interval", self.watch.progress_interval, millis(100), "each notice is a message");
        at_least(
            "state.checkpoint_interval",
            self.state.checkpoint_interval,
            millis(10),
            "each one waits for the disk",
        );
    }

    fn check_sizes(&self, faults: &mut Faults) {
        let (raft, request) = (&self.raft, self.limits.request_bytes_max);
        let most = [("raft.append_bytes_max", raft.append_bytes_max), ("limits.request_bytes_max", request)];
        for (key, got) in most {
            let expected = format!("at most {MESSAGE_BYTES_MAX} (what one message between members can hold)");
            faults.check(got <= MESSAGE_BYTES_MAX, key, got, expected, "lower it");
            faults.at_least(key, got, Bytes(1), "nothing would fit");
        }
        faults.at_least("raft.append_bytes_max", raft.append_bytes_max, raft.batch_bytes_max, "raft.batch_bytes_max");
        faults.at_least("raft.batch_bytes_max", raft.batch_bytes_max, Bytes(1), "nothing would fit");
        let largest = request.max(raft.batch_bytes_max);
        let why = "the larger of limits.request_bytes_max and raft.batch_bytes_max";
        faults.at_least("raft.queue_bytes_max", raft.queue_bytes_max, largest, why);
        let why =
            "2 x the largest of limits.request_bytes_max and raft.append_bytes_max: a record never spans segments";
        let segment_least = Bytes(2 * request.max(raft.append_bytes_max).0.min(u64::MAX / 2));
        faults.at_least("log.segment_bytes", self.log.segment_bytes, segment_least, why);
        let (segment, expected) = (self.log.segment_bytes, format!("at most {SEGMENT_BYTES_MAX}"));
        faults.check(segment <= SEGMENT_BYTES_MAX, "log.segment_bytes", segment, expected, "lower it");
        let two_segments = Bytes(self.log.segment_bytes.0.saturating_mul(2));
        faults.at_least("log.bytes_max", self.log.bytes_max, two_segments, "2 x log.segment_bytes");
        let kept = self.log.entries_kept;
        let expected = format!("less than log.entries_max ({})", self.log.entries_max);
        faults.check(kept < self.log.entries_max, "log.entries_kept", kept, expected, "lower it, or raise the other");
        faults.positive("raft.proposals_in_flight_max", raft.proposals_in_flight_max as u64);
        faults.positive("raft.queue_requests_max", raft.queue_requests_max as u64);
        let chunk = raft.snapshot_chunk_bytes;
        faults.at_least("raft.snapshot_chunk_bytes", chunk, Bytes::kib(4), "each chunk costs a message");
        let expected = format!("at most {MESSAGE_BYTES_MAX} (what one message between members can hold)");
        faults.check(chunk <= MESSAGE_BYTES_MAX, "raft.snapshot_chunk_bytes", chunk, expected, "lower it");
        faults.at_least("raft.snapshot_rate", raft.snapshot_rate, chunk, "raft.snapshot_chunk_bytes");
    }

    fn check_storage(&self, faults: &mut Faults) {
        let (state, storage) = (&self.state, &self.storage);
        let chunk = state.chunk_bytes;
        let fits = (Bytes::kib(1)..=Bytes::mib(1)).contains(&chunk);
        faults.check(fits, "state.chunk_bytes", chunk, "1KiB to 1MiB", "4KiB to 16KiB serve best");
        faults.at_least("state.cache_bytes", state.cache_bytes, STATE_CACHE_BYTES_MIN, "the state store needs some");
        faults.at_least("state.journal_bytes_max", state.journal_bytes_max, chunk, "state.chunk_bytes");
        let percent = storage.quota_warn_percent;
        faults.check((1..=100).contains(&percent), "storage.quota_warn_percent", percent, "1 to 100", "correct it");
        if let Err(fault) = storage.compaction() {
            let mode = storage.compaction_mode;
            faults.0.push(format!("storage.compaction_retention: {fault} (storage.compaction_mode is {mode})"));
        }
        let idle = storage.compaction_mode == CompactionMode::Off && !storage.compaction_retention.is_empty();
        let action = "set storage.compaction_mode to periodic or revision, or leave the retention out";
        let retention = format!("{:?}", storage.compaction_retention);
        faults.check(!idle, "storage.compaction_retention", retention, "none, for compaction_mode is off", action);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Listen, StatusListen};
    use super::*;

    fn fault(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        config.validate().map(|()| "valid".to_owned()).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn default_is_valid() {
        assert_eq!(fault(|_| ()), "valid");
    }

    fn listen(text: &str) -> Listen {
        text.parse().unwrap()
    }

    type Change = fn(&mut Config);

    fn assert_named(cases: &[(&str, Change)]) {
        for (key, change) in cases {
            let message = fault(change);
            assert!(message.contains(key), "{key}: {message}");
            assert!(message.contains("got") || message.contains("peer pattern"), "{key}: {message}");
            assert!(message.contains("expected"), "{key}: {message}");
        }
    }

    #[test]
    fn every_bound_is_checked_and_named() {
        assert_named(&[
            ("log.segment_bytes", |c| (c.log.segment_bytes, c.log.bytes_max) = (Bytes::gib(2), Bytes::gib(8))),
            ("state.cache_bytes", |c| c.state.cache_bytes = Bytes(0)),
            ("http.cors", |c| c.http.cors = vec!["ui.example.org".into()]),
            ("http.hosts", |c| c.http.hosts = vec!["http://kv".into()]),
            ("server.worker_threads", |c| c.server.worker_threads = 1025),
            ("raft.queue_requests_max", |c| c.raft.queue_requests_max = usize::MAX),
            ("log.entries_max", |c| c.log.entries_max = u64::MAX),
            ("backup.url", |c| c.backup.url = "backups".into()),
            ("backup.url", |c| c.backup.url = "ftp://host/backups".into()),
            ("restore.from", |c| c.restore.from = "backups@latest".into()),
            ("restore.follow", |c| c.restore.follow = "backups".into()),
            ("restore.follow", |c| {
                (c.restore.follow, c.restore.from) = ("/backups".into(), "/backups@latest".into());
            }),
            ("backup.interval", |c| c.backup.interval = Duration::from_millis(999)),
            ("backup.full_every", |c| c.backup.full_every = Duration::from_secs(9)),
            ("backup.keep_fulls", |c| c.backup.keep_fulls = 0),
            ("backup.bandwidth", |c| c.backup.bandwidth = Bytes::kib(63)),
        ]);
    }

    #[test]
    fn every_relation_is_checked_and_named() {
        let cases: &[(&str, Change)] = &[
            ("server.listen_peer", |c| c.server.listen_peer = c.server.listen_client.clone()),
            ("server.listen_peer", |c| c.server.listen_peer = listen("0.0.0.0:1,0.0.0.0:1")),
            ("server.listen_peer", |c| c.server.listen_peer = listen("0.0.0.0:1,unix:/run/q")),
            ("server.listen_status", |c| c.server.listen_status = StatusListen::At(c.server.listen_client.clone())),
            ("server.listen_status", |c| c.server.listen_client = listen("0.0.0.0:65535")),
            ("server.listen_status", |c| c.server.listen_client = listen("0.0.0.0:2378")),
            ("cluster.members", |c| c.cluster.members = vec!["a=h:1".into()]),
            ("cluster.members", |c| (c.cluster.kind, c.cluster.members) = (MemberKind::Manual, vec!["a".into()])),
            ("server.advertise_client", |c| c.server.advertise_client = vec!["kv-0:2379".into()]),
            ("server.advertise_peer", |c| c.server.advertise_peer = vec!["http://kv-0:2380".into()]),
            ("server.advertise_peer", |c| c.server.advertise_peer = vec!["kv-0:2380".into(); 17]),
            ("server.data_dir", |c| c.server.data_dir = "".into()),
            ("server.request_timeout", |c| c.server.request_timeout = Duration::from_millis(699)),
            ("server.grace_period", |c| c.server.grace_period = Duration::ZERO),
            ("identity.slot", |c| c.identity.slot = Some(u16::MAX)),
            ("cluster.peers", |c| c.cluster.peers = "kv:2380".into()),
            ("cluster.peers", |c| (c.cluster.peers, c.cluster.size) = ("127.0.0.1:2380%d".into(), 11)),
            ("cluster.size: got 0", |c| c.cluster.size = 0),
            ("cluster.size: got 3, expected 1", |c| c.cluster.size = 3),
            ("cluster.size: got 2", |c| (c.cluster.size, c.cluster.first_slot) = (2, SLOT_MAX)),
            ("cluster.kind", |c| c.cluster.kind = MemberKind::Reader),
            ("cluster.join", |c| c.cluster.join = vec!["kv-0".into()]),
            ("identity.slot", |c| {
                (c.cluster.kind, c.identity.slot) = (MemberKind::Manual, Some(1));
                c.cluster.join = vec!["kv-0:2380".into()];
            }),
            ("cluster.reader_ttl", |c| c.cluster.reader_ttl = Duration::from_secs(1)),
            ("cluster.max_voters", |c| c.cluster.max_voters = 4),
            ("cluster.failure_timeout", |c| c.cluster.failure_timeout = Duration::from_secs(1)),
            ("kubernetes.stateful_set", |c| {
                (c.cluster.peers, c.kubernetes.stateful_set) = ("kv-%d:1".into(), "K v".into());
            }),
            ("kubernetes.stateful_set", |c| c.kubernetes.stateful_set = "kv".into()),
            ("kubernetes.namespace", |c| c.kubernetes.namespace = "a/b".into()),
            ("kubernetes.api_server", |c| c.kubernetes.api_server = "http://api".into()),
            ("kubernetes.poll_interval", |c| c.kubernetes.poll_interval = Duration::ZERO),
            ("kubernetes.timeout", |c| c.kubernetes.timeout = Duration::ZERO),
            ("raft.heartbeat_interval", |c| c.raft.heartbeat_interval = Duration::ZERO),
            ("raft.election_timeout_min", |c| c.raft.heartbeat_interval = Duration::from_millis(134)),
            ("raft.election_timeout_max", |c| c.raft.election_timeout_max = c.raft.election_timeout_min),
            ("raft.append_bytes_max", |c| c.raft.append_bytes_max = Bytes::mib(17)),
            ("raft.append_bytes_max", |c| c.raft.batch_bytes_max = Bytes::mib(2)),
            ("raft.batch_bytes_max", |c| c.raft.batch_bytes_max = Bytes(0)),
            ("raft.proposals_in_flight_max", |c| c.raft.proposals_in_flight_max = 0),
            ("raft.queue_bytes_max", |c| c.raft.queue_bytes_max = Bytes::mib(1)),
            ("raft.queue_requests_max", |c| c.raft.queue_requests_max = 0),
            ("raft.snapshot_chunk_bytes", |c| c.raft.snapshot_chunk_bytes = Bytes(1)),
            ("raft.snapshot_chunk_bytes", |c| c.raft.snapshot_chunk_bytes = Bytes::mib(17)),
            ("raft.snapshot_rate", |c| c.raft.snapshot_rate = Bytes::kib(1)),
            ("log.segment_bytes", |c| c.log.segment_bytes = Bytes::mib(2)),
            ("log.bytes_max", |c| c.log.bytes_max = Bytes::mib(127)),
            ("log.entries_kept", |c| c.log.entries_kept = c.log.entries_max),
            ("state.checkpoint_interval", |c| c.state.checkpoint_interval = Duration::ZERO),
            ("state.chunk_bytes", |c| c.state.chunk_bytes = Bytes::mib(2)),
            ("state.journal_bytes_max", |c| c.state.journal_bytes_max = Bytes(0)),
            ("storage.quota_warn_percent", |c| c.storage.quota_warn_percent = 101),
            ("storage.compaction_retention", |c| c.storage.compaction_mode = CompactionMode::Periodic),
            ("storage.compaction_retention", |c| c.storage.compaction_retention = "1h".into()),
            ("limits.request_bytes_max", |c| c.limits.request_bytes_max = Bytes::mib(17)),
            ("limits.txn_ops_max", |c| c.limits.txn_ops_max = 0),
            ("limits.txn_ops_total_max", |c| c.limits.txn_ops_total_max = 0),
            ("limits.txn_depth_max", |c| c.limits.txn_depth_max = 0),
            ("limits.request_cost_max", |c| c.limits.request_cost_max = 0),
            ("limits.txn_depth_max", |c| c.limits.txn_depth_max = 257),
            ("limits.concurrent_streams_max", |c| c.limits.concurrent_streams_max = 0),
            ("limits.connections_max", |c| c.limits.connections_max = 0),
            ("limits.backups_max", |c| c.limits.backups_max = 0),
            ("limits.range_streams_max", |c| c.limits.range_streams_max = 0),
            ("watch.stream_watchers_max", |c| c.watch.stream_watchers_max = 0),
            ("watch.watchers_max", |c| c.watch.watchers_max = 49_999),
            ("watch.stream_bytes_max", |c| c.watch.stream_bytes_max = Bytes(1)),
            ("watch.progress_interval", |c| c.watch.progress_interval = Duration::from_millis(99)),
            ("telemetry.level", |c| c.telemetry.level = "quorate=loud".into()),
            ("telemetry.level", |c| c.telemetry.level = "inof".into()),
        ];
        assert_named(cases);
    }

    #[test]
    fn all_faults_are_shown_at_once() {
        let message = fault(|c| (c.limits.txn_ops_max, c.limits.connections_max) = (0, 0));
        assert!(message.contains("limits.txn_ops_max") && message.contains("limits.connections_max"), "{message}");
        assert!(!message.contains('\n'), "one line: {message}");
    }

    #[test]
    fn compaction_reads_mode_and_retention_together() {
        use super::super::{Compaction, Storage};
        let read = |mode, retention: &str| {
            let storage =
                Storage { compaction_mode: mode, compaction_retention: retention.into(), ..Storage::default() };
            storage.compaction()
        };
        assert_eq!(read(CompactionMode::Off, ""), Ok(Compaction::Off));
        assert_eq!(read(CompactionMode::Periodic, "1h"), Ok(Compaction::Periodic(Duration::from_secs(3600))));
        assert_eq!(read(CompactionMode::Revision, "1000"), Ok(Compaction::Revision(1000)));
        for (mode, retention) in [
            (CompactionMode::Periodic, "1"),
            (CompactionMode::Periodic, "0s"),
            (CompactionMode::Revision, "1h"),
            (CompactionMode::Revision, "0"),
        ] {
            assert!(read(mode, retention).unwrap_err().contains("expected"), "{mode} {retention}");
        }
    }
}
