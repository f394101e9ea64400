//! The settings, their defaults, and why those.
//!
//! `config/quorate.toml` says the same to operators; a test holds the two together.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::units::{self, Bytes};
use crate::env::net::Place;

/// From the client port to the status port, where none is named.
pub const STATUS_PORT_OFFSET: u16 = 2;

/// `[server]`: addresses, the data directory, and patience.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Server {
    /// Where all state lives. The mount point of the chart's volume.
    pub data_dir: PathBuf,
    /// Where clients connect: all interfaces, for a pod's address is not known beforehand.
    pub listen_client: Listen,
    /// Where members connect.
    pub listen_peer: Listen,
    /// Where probes, metrics and `status` ask, from the first moment of the process.
    #[serde(with = "units::text")]
    pub listen_status: StatusListen,
    /// URLs that clients are told; empty: the host of the own peer address and the port of `listen_client`.
    #[serde(with = "units::list")]
    pub advertise_client: Vec<String>,
    /// Each `host:port`, that members are told; where there are several, they dial the first, and the next when one fails. Empty: the peer
    /// pattern's address of the own slot.
    #[serde(with = "units::list")]
    pub advertise_peer: Vec<String>,
    /// Longest stay after SIGTERM: the chart's 120 s less 5, so that the kubelet never cuts it short.
    #[serde(with = "units::duration")]
    pub grace_period: Duration,
    /// Longest that a restart waits for the others to hold a quorum without this member; within `grace_period`.
    #[serde(with = "units::duration")]
    pub quorum_wait: Duration,
    /// Longest wait of one request, an election included.
    #[serde(with = "units::duration")]
    pub request_timeout: Duration,
    /// The client port opens without a leader after so long without one, for what needs none: far above an election, so that no client
    /// meets a member that only starts; below the patience of a person who looks for what is left.
    #[serde(with = "units::duration")]
    pub open_without_leader: Duration,
    /// Threads of the event loop; 0: one for every two cores. The log and the state store have threads of their own.
    pub worker_threads: usize,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/quorate".into(),
            listen_client: SocketAddr::from(([0, 0, 0, 0], 2379)).into(),
            listen_peer: SocketAddr::from(([0, 0, 0, 0], 2380)).into(),
            listen_status: StatusListen::Beside,
            advertise_client: Vec::new(),
            advertise_peer: Vec::new(),
            grace_period: Duration::from_secs(115),
            quorum_wait: Duration::from_secs(30),
            request_timeout: Duration::from_secs(5),
            open_without_leader: Duration::from_secs(10),
            worker_threads: 0,
        }
    }
}

impl Server {
    /// Where the status listeners are.
    pub fn status_places(&self) -> Vec<Place> {
        let beside = |client: SocketAddr| match client.port() {
            // Any port that is free.
            0 => client,
            port => SocketAddr::new(client.ip(), port.saturating_add(STATUS_PORT_OFFSET)),
        };
        match &self.listen_status {
            StatusListen::Beside => {
                self.listen_client.first_address().map(|client| Place::Tcp(beside(client))).into_iter().collect()
            }
            StatusListen::Off => Vec::new(),
            StatusListen::At(listen) => listen.places().to_vec(),
        }
    }
}

/// Where connections are taken: one place or more, written with commas or as a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen(Vec<Place>);

impl Listen {
    pub fn places(&self) -> &[Place] {
        &self.0
    }

    /// The first that others can reach over the network.
    pub fn first_address(&self) -> Option<SocketAddr> {
        self.0.iter().find_map(|place| if let Place::Tcp(address) = place { Some(*address) } else { None })
    }
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self(vec![Place::Tcp(address)])
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let places: Vec<String> = self.0.iter().map(Place::to_string).collect();
        f.write_str(&places.join(","))
    }
}

impl Serialize for Listen {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        units::list::deserialize(deserializer)?.join(",").parse().map_err(serde::de::Error::custom)
    }
}

/// Where the status listeners are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusListen {
    /// At the first address of `listen_client`, with the port two above: so several servers on one machine need not each be told.
    Beside,
    /// Nowhere; the clients' port answers the same once it is open.
    Off,
    At(Listen),
}

impl FromStr for StatusListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Ok(Self::Beside),
            "off" => Ok(Self::Off),
            text => text.parse().map(Self::At),
        }
    }
}

impl std::fmt::Display for StatusListen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Beside => Ok(()),
            Self::Off => f.write_str("off"),
            Self::At(listen) => listen.fmt(f),
        }
    }
}

/// `[identity]`: which node this is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Empty: `POD_NAME`, else the host name.
    pub name: String,
    /// None: the digits after the name's last `-`. With `cluster.members` the place in that list, which is by name; none: that of the own name.
    pub slot: Option<u16>,
}

/// `[cluster]`: who the others are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// The address of every slot, `%d` standing for it; empty: a cluster of one.
    pub peers: String,
    /// Members that the first formation waits for; later the cluster itself knows.
    pub size: u16,
    /// Whether this node owns a slot, was added by hand, or only reads.
    #[serde(with = "units::text")]
    pub kind: MemberKind,
    /// The first members of a new cluster, `name=host:port`, with any names; for nodes of the kind `manual`, and in place of `peers`.
    #[serde(with = "units::list")]
    pub members: Vec<String>,
    /// A word that all who are given the same list of members share: lists of two clusters on the same addresses differ by it.
    pub token: String,
    /// `host:port` of members that are asked for a cluster to join, beside the peer pattern's.
    #[serde(with = "units::list")]
    pub join: Vec<String>,
    /// The lowest slot (`ordinals.start` of a StatefulSet).
    pub first_slot: u16,
    /// Most members that vote: 5 survive two failures, and each more slows every write.
    pub max_voters: u16,
    /// Silence after which the holder of a slot counts as lost. Far above an election; below a human's reaction.
    #[serde(with = "units::duration")]
    pub failure_timeout: Duration,
    /// How long a learner must have been caught up before it votes.
    #[serde(with = "units::duration")]
    pub promote_after: Duration,
    /// Whether readers may join. Off: a reader gets all data, and nothing but the network says who may be one.
    pub readers: bool,
    /// Silence after which a reader is removed: readers come and go, and nobody waits for one.
    #[serde(with = "units::duration")]
    pub reader_ttl: Duration,
    /// Most readers: the leader sends the log to each.
    pub max_readers: u32,
    /// Directories of former selves that are kept: one, for whoever wants to look at what was replaced.
    pub kept_former_selves: u32,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            peers: String::new(),
            size: 1,
            kind: MemberKind::Slot,
            members: Vec::new(),
            token: String::new(),
            join: Vec::new(),
            first_slot: 0,
            max_voters: 5,
            failure_timeout: Duration::from_secs(10),
            promote_after: Duration::from_secs(1),
            readers: false,
            reader_ttl: Duration::from_secs(60),
            max_readers: 16,
            kept_former_selves: 1,
        }
    }
}

/// `[kubernetes]`: the StatefulSet that says how many members are wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kubernetes {
    /// Name of the own StatefulSet; empty: not on Kubernetes.
    pub stateful_set: String,
    /// Its namespace; empty: `POD_NAMESPACE`, else the service account's.
    pub namespace: String,
    /// URL of the API server; empty: from `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`.
    pub api_server: String,
    /// Holds `token`, `ca.crt` and `namespace`, as the kubelet mounts them.
    pub service_account_dir: PathBuf,
    /// Between two questions, with jitter: a change of the size is seen about so late.
    #[serde(with = "units::duration")]
    pub poll_interval: Duration,
    /// Longest wait for one answer; then the wanted size is unknown, and nothing changes.
    #[serde(with = "units::duration")]
    pub timeout: Duration,
    /// Tell what blocks a change, and what was changed, as Events of the StatefulSet.
    pub events: bool,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            stateful_set: String::new(),
            namespace: String::new(),
            api_server: String::new(),
            service_account_dir: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
            poll_interval: Duration::from_secs(3),
            timeout: Duration::from_secs(3),
            events: true,
        }
    }
}

/// `[raft]`: timing, batches, and bounds of what waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Raft {
    /// Also the deadline of an append: at least ten times fsync plus a round trip.
    #[serde(with = "units::duration")]
    pub heartbeat_interval: Duration,
    /// Shortest wait for a leader before an election: four lost heartbeats.
    #[serde(with = "units::duration")]
    pub election_timeout_min: Duration,
    /// Longest wait; the spread keeps members from standing at once.
    #[serde(with = "units::duration")]
    pub election_timeout_max: Duration,
    /// Most bytes of one append: it must arrive and be on disk within a heartbeat.
    pub append_bytes_max: Bytes,
    /// Most bytes of requests in one log entry, unless one request alone is larger.
    pub batch_bytes_max: Bytes,
    /// Batches proposed and not yet applied; another goes beside the first only if much waits.
    pub proposals_in_flight_max: usize,
    /// Most bytes of clients' writes that wait to be applied; beyond it, or beyond its share, a client is told `too many requests`.
    pub queue_bytes_max: Bytes,
    /// Most of clients' writes and linearizable reads that wait, shared likewise.
    pub queue_requests_max: usize,
    /// Answer linearizable reads without a round to the quorum. Relies on bounded clock drift, so it is off.
    pub lease_reads: bool,
    /// How often the leader compares the members' states; 0: never. Two small calls a member.
    #[serde(with = "units::duration")]
    pub self_check_interval: Duration,
    /// Bytes of one message of a snapshot transfer.
    pub snapshot_chunk_bytes: Bytes,
    /// Most bytes a second that a snapshot transfer sends: heartbeats share the wire.
    pub snapshot_rate: Bytes,
}

impl Default for Raft {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(100),
            election_timeout_min: Duration::from_millis(400),
            election_timeout_max: Duration::from_millis(700),
            append_bytes_max: Bytes::mib(1),
            batch_bytes_max: Bytes::kib(256),
            proposals_in_flight_max: 2,
            queue_bytes_max: Bytes::mib(64),
            queue_requests_max: 10_000,
            lease_reads: false,
            self_check_interval: Duration::from_secs(5),
            snapshot_chunk_bytes: Bytes::kib(256),
            snapshot_rate: Bytes::mib(64),
        }
    }
}

/// `[lease]`: what the leader does for leases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// Between checkpoints of the remaining time of a lease that is not renewed: what a change of leader may add to its life.
    #[serde(with = "units::duration")]
    pub checkpoint_interval: Duration,
    /// Revocations of expired leases under way at once: many end together, and clients' writes share the log with them.
    pub revokes_in_flight_max: usize,
}

impl Default for Lease {
    fn default() -> Self {
        Self { checkpoint_interval: Duration::from_secs(60), revokes_in_flight_max: 1000 }
    }
}

/// `[auth]`: how users show who they are, once authentication is on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Auth {
    /// How long a token lives that is not used: etcd's 300 s.
    #[serde(with = "units::duration")]
    pub token_ttl: Duration,
    /// What a password's hash costs: each step doubles it. etcd's 10 takes some 60 ms of a core.
    pub bcrypt_cost: u32,
    /// A file that declares users and roles; empty: none.
    pub bootstrap: PathBuf,
}

impl Default for Auth {
    fn default() -> Self {
        Self { token_ttl: Duration::from_secs(300), bcrypt_cost: 10, bootstrap: PathBuf::new() }
    }
}

/// `[backup]`: backups that the cluster makes of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Backup {
    /// A directory that all members have, or `s3://bucket/path`, `gs://bucket/path`, `az://container/path`; empty: none are made.
    pub url: String,
    /// URL of an S3 server that is not Amazon's; empty: what the environment says (`AWS_ENDPOINT_URL`).
    pub endpoint: String,
    /// CAs, in PEM, that the store's certificate must come from; empty: those that the system trusts.
    pub ca_file: PathBuf,
    /// Between records of changes: what a loss of all disks may cost.
    #[serde(with = "units::duration")]
    pub interval: Duration,
    /// Between full backups: a restore applies at most the changes of so long.
    #[serde(with = "units::duration")]
    pub full_every: Duration,
    /// Full backups that stay, however old they are.
    pub keep_fulls: usize,
    /// Full backups stay for so long, however many they are.
    #[serde(with = "units::duration")]
    pub keep_age: Duration,
    /// File with 32 bytes in hexadecimal that all of it is encrypted with; empty: it is not.
    pub key_file: PathBuf,
    /// Most bytes a second of a full backup, so that the network and the disk are left to requests.
    pub bandwidth: Bytes,
}

impl Backup {
    pub fn is_on(&self) -> bool {
        !self.url.is_empty()
    }
}

impl Default for Backup {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Self {
            url: String::new(),
            endpoint: String::new(),
            ca_file: PathBuf::new(),
            interval: Duration::from_secs(10),
            full_every: DAY,
            keep_fulls: 7,
            keep_age: 7 * DAY,
            key_file: PathBuf::new(),
            bandwidth: Bytes::mib(32),
        }
    }
}

/// `[restore]`: what a new cluster begins with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Restore {
    /// The path of a backup, as `backup.url`, with `@latest`, `@<time>` or `@<revision>` after it, or with nothing for the latest moment;
    /// empty: a new cluster is empty. A cluster that there is already is never touched.
    pub from: String,
    /// Its revisions go on; else they jump, for clients may remember later ones.
    pub same_revisions: bool,
    /// The path of another cluster's backups: a new cluster is its standby, which takes no writes and has what that one archives, until it
    /// is promoted; empty: it is none.
    pub follow: String,
}

/// `[log]`: the Raft log on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// Size of a preallocated segment file.
    pub segment_bytes: Bytes,
    /// Newest entries kept in memory, for followers that are nearly up to date.
    pub cache_bytes: Bytes,
    /// A log beyond max(this, state size) is purged behind a snapshot.
    pub bytes_max: Bytes,
    /// So is one with more entries: replaying them takes time, however small they are.
    pub entries_max: u64,
    /// Entries kept behind a snapshot, so that a member that was away for a moment needs none.
    pub entries_kept: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            segment_bytes: Bytes::mib(64),
            cache_bytes: Bytes::mib(8),
            bytes_max: Bytes::mib(256),
            entries_max: 500_000,
            entries_kept: 5_000,
        }
    }
}

/// `[state]`: the state store on disk, which makes a restart short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// sled's page cache. Little is read back, so little is enough.
    pub cache_bytes: Bytes,
    /// Most between checkpoints, of which there are more under load; what came after the last one is replayed from the log.
    #[serde(with = "units::duration")]
    pub checkpoint_interval: Duration,
    /// Bytes of changes packed into one record: larger is cheaper to write and holds more memory.
    pub chunk_bytes: Bytes,
    /// Changes in memory that wait for the store; beyond it the next checkpoint writes all state anew.
    pub journal_bytes_max: Bytes,
}

impl Default for State {
    fn default() -> Self {
        Self {
            cache_bytes: Bytes::mib(16),
            checkpoint_interval: Duration::from_secs(1),
            chunk_bytes: Bytes::kib(8),
            journal_bytes_max: Bytes::mib(64),
        }
    }
}

/// `[storage]`: how much data, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Storage {
    /// Most bytes of data; 0: no quota. The memory limit bounds it, see [`super::Config::within_memory`].
    pub quota_bytes: Bytes,
    /// Percent of the quota from which on it is warned of.
    pub quota_warn_percent: u8,
    /// Disk space that only deletes, compaction and membership changes may use.
    pub disk_reserve: Bytes,
    /// What automatic compaction goes by.
    #[serde(with = "units::text")]
    pub compaction_mode: CompactionMode,
    /// How much history it keeps: a duration (`periodic`) or a count of revisions (`revision`).
    pub compaction_retention: String,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            quota_bytes: Bytes::gib(2),
            quota_warn_percent: 80,
            disk_reserve: Bytes::mib(64),
            compaction_mode: CompactionMode::Off,
            compaction_retention: String::new(),
        }
    }
}

/// Revisions are numbers of 63 bits.
const REVISIONS_KEPT_MAX: u64 = 1 << 62;

/// What automatic compaction goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompactionMode {
    Off,
    Periodic,
    Revision,
}

/// Automatic compaction: mode and retention, read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compaction {
    Off,
    /// Revisions older than this may go.
    Periodic(Duration),
    /// All but this many of the newest revisions may go.
    Revision(u64),
}

impl Storage {
    /// Mode and retention as one value; the text says what is wrong with them.
    pub fn compaction(&self) -> Result<Compaction, String> {
        let retention = self.compaction_retention.trim();
        match self.compaction_mode {
            CompactionMode::Off => Ok(Compaction::Off),
            CompactionMode::Periodic => match units::duration::parse(retention)? {
                Duration::ZERO => Err(format!("got {retention:?}, expected more than nothing; or set the mode to off")),
                age => Ok(Compaction::Periodic(age)),
            },
            CompactionMode::Revision => match retention.parse() {
                Ok(count) if (1..=REVISIONS_KEPT_MAX).contains(&count) => Ok(Compaction::Revision(count)),
                _ => Err(format!(
                    "got {retention:?}, expected a count of revisions, such as \"10000\", and at most {REVISIONS_KEPT_MAX}"
                )),
            },
        }
    }
}

/// `[limits]`: what one client may ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Largest request. As etcd's.
    pub request_bytes_max: Bytes,
    /// Most operations in one branch of a transaction. As etcd's.
    pub txn_ops_max: usize,
    /// Most operations and comparisons of a transaction and all that are nested in it, each counted for every transaction it is in.
    pub txn_ops_total_max: usize,
    /// Most transactions within one another.
    pub txn_depth_max: usize,
    /// Most keys that a request may visit beyond one visit to each that there is.
    pub request_cost_max: u64,
    /// Most concurrent streams of one connection.
    pub concurrent_streams_max: u32,
    /// Most connections of clients.
    pub connections_max: usize,
    /// Most bytes of what all clients send: connections, streams, headers, requests until they are answered, keys of watchers.
    pub receive_bytes_max: Bytes,
    /// Most bytes of what all clients are sent: pieces of answers on their way, and what is kept for answers and watchers.
    pub answer_bytes_max: Bytes,
    /// Longest that a connection may take to say what it speaks, and a request to arrive once it has begun to.
    #[serde(with = "units::duration")]
    pub receive_timeout: Duration,
    /// Most backups that clients take at a time.
    pub backups_max: usize,
    /// Most ranges that clients take as a stream at a time.
    pub range_streams_max: usize,
    /// A client that says nothing for this long is asked whether it is there ...
    #[serde(with = "units::duration")]
    pub keepalive_interval: Duration,
    /// ... and must answer within this, or its connection is closed.
    #[serde(with = "units::duration")]
    pub keepalive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_bytes_max: Bytes(3 << 19),
            txn_ops_max: 128,
            txn_ops_total_max: 16_384,
            txn_depth_max: 128,
            request_cost_max: 500_000,
            concurrent_streams_max: 10_000,
            connections_max: 20_000,
            receive_bytes_max: Bytes::mib(256),
            answer_bytes_max: Bytes::mib(256),
            receive_timeout: Duration::from_secs(10),
            backups_max: 4,
            range_streams_max: 256,
            keepalive_interval: Duration::from_secs(60),
            keepalive_timeout: Duration::from_secs(75),
        }
    }
}

/// `[watch]`: what watchers may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// Most bytes of events that wait for one stream's client; what comes on top is read again later, from the history.
    pub stream_bytes_max: Bytes,
    /// Silence of a watcher with `progress_notify` after which it is told how far it is. As etcd's.
    #[serde(with = "units::duration")]
    pub progress_interval: Duration,
    /// Most watchers of one stream.
    pub stream_watchers_max: usize,
    /// Most watchers of this member: each takes a few hundred bytes.
    pub watchers_max: usize,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            stream_bytes_max: Bytes::mib(1),
            progress_interval: Duration::from_secs(600),
            stream_watchers_max: 50_000,
            watchers_max: 200_000,
        }
    }
}

/// `[http]`: what pages in browsers may ask.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Http {
    /// Names of this member, beside those that it advertises and those that nobody can register; `*`: any.
    #[serde(with = "units::list")]
    pub hosts: Vec<String>,
    /// Origins whose pages may call this member, such as `https://ui.example.org`; `*`: any. None, unlike etcd's.
    #[serde(with = "units::list")]
    pub cors: Vec<String>,
}

/// `[telemetry]`: log lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Telemetry {
    /// A level, or levels by module: `info,quorate::raft=debug`.
    pub level: String,
    #[serde(with = "units::text")]
    pub format: LogFormat,
    /// A request on keys that takes longer is one line; zero: none is.
    #[serde(with = "units::duration")]
    pub slow_request: Duration,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text, slow_request: Duration::from_millis(300) }
    }
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// An enum whose values are words: both directions and the message from one list.
macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ }) => {
        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("got {text:?}, expected one of: {}", [$($word),+].join(", "))),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

/// What a node is in the membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberKind {
    Slot,
    Manual,
    Reader,
}

pub(super) use words;

words!(MemberKind { Slot = "slot", Manual = "manual", Reader = "reader" });
words!(CompactionMode { Off = "off", Periodic = "periodic", Revision = "revision" });
words!(LogFormat { Text = "text", Json = "json" });
