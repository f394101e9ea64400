//! Settings: what they are, where they come from, and which of them fit together.
//!
//! Sources, each over the one before: defaults, the file, `QUORATE_<SECTION>__<KEY>` in the environment, flags.
//! Invariants: no key is ignored in silence, a [`Config`] that [`load`] returns is valid, and every message says what was
//! got, from where, what was expected and what to do. Absent: globals; a section is passed down to the module it is for.

mod audit;
mod load;
mod memory;
mod node;
mod oidc;
mod sections;
mod tls;
pub mod units;
mod validate;

use serde::{Deserialize, Serialize};

pub use audit::{Audit, AuditMode};
pub use load::{DEFAULT_FILE, File, Flag, Loaded, Sources, load};
pub use memory::cgroup_memory_limit;
pub use node::Node;
pub use oidc::{KUBERNETES, Oidc, RoleRule};
pub use sections::{
    Auth, Backup, Cluster, Compaction, CompactionMode, Http, Identity, Kubernetes, Lease, Limits, Listen, Log,
    LogFormat, MemberKind, Raft, Restore, STATUS_PORT_OFFSET, Server, State, StatusListen, Storage, Telemetry, Watch,
};
pub use tls::{CertUser, ClientCert, ClientTls, PeerTls, PlainPeers, TlsMode, TlsVersion};
pub use units::Bytes;
pub use validate::MESSAGE_BYTES_MAX;

/// Every setting with its default and its reason: the file that operators start from, and the manual.
pub const MANUAL: &str = include_str!("../../config/quorate.toml");

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub server: Server,
    pub client_tls: ClientTls,
    pub peer_tls: PeerTls,
    pub identity: Identity,
    pub cluster: Cluster,
    pub kubernetes: Kubernetes,
    pub raft: Raft,
    pub lease: Lease,
    pub auth: Auth,
    pub oidc: Oidc,
    pub backup: Backup,
    pub restore: Restore,
    pub log: Log,
    pub state: State,
    pub storage: Storage,
    pub limits: Limits,
    pub watch: Watch,
    pub http: Http,
    pub audit: Audit,
    pub telemetry: Telemetry,
}

impl Config {
    /// gRPC's message limit between members: above the largest append, with room for its framing and one entry that is
    /// larger than `append_bytes_max` allows.
    pub fn peer_message_bytes_max(&self) -> usize {
        let most = self.raft.append_bytes_max.max(self.limits.request_bytes_max).max(self.raft.snapshot_chunk_bytes);
        most.as_usize() + self.raft.batch_bytes_max.as_usize() + MESSAGE_OVERHEAD_BYTES
    }

    /// gRPC's message limit for clients' requests: above `limits.request_bytes_max`, so that a request that is too large
    /// is refused by our own check with etcd's text.
    pub fn client_message_bytes_max(&self) -> usize {
        self.limits.request_bytes_max.as_usize() + MESSAGE_OVERHEAD_BYTES
    }
}

/// What a message holds beside its payload.
const MESSAGE_OVERHEAD_BYTES: usize = 512 << 10;

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {fault}; expected a readable file; correct --config, or leave it out")]
    File { path: String, fault: std::io::Error },
    #[error("{origin} is not valid TOML: {detail}; correct it (`quorate config --manual` prints a complete file)")]
    Syntax { origin: String, detail: String },
    #[error("unknown key {key} (from {origin}){}; correct or remove it", nearest.as_ref().map(|key| format!(", expected perhaps {key}")).unwrap_or_default())]
    UnknownKey { key: String, origin: String, nearest: Option<String> },
    #[error("{key} (from {origin}): {detail}")]
    Value { key: String, origin: String, detail: String },
    #[error("{flag} {text}: expected section.key=value, such as raft.heartbeat_interval=200ms")]
    Flag { flag: String, text: String },
    #[error("{}", .0.join(" | "))]
    Invalid(Vec<String>),
    #[error(
        "the memory limit of this process is {limit}, expected at least {least}: less holds no data beside the process itself; \
         raise the limit (resources.limits.memory of the chart)"
    )]
    Memory { limit: Bytes, least: Bytes },
    #[error(transparent)]
    Identity(#[from] crate::identity::Error),
}

#[cfg(test)]
pub(crate) mod tests;
