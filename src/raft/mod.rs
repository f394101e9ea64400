//! The consensus core: openraft, fitted to our log, state machine and transport.
//!
//! Owns the type configuration and how a member's Raft is started. Terms, votes, log ids and configurations are the Raft
//! paper's; members are named by minted 64-bit ids, never by ordinals. openraft is used here and in `node` only, because
//! its API moves between alphas.
//! Absent: what is proposed and when (`node`), and who should be a member (`cluster`).

mod backup;
mod checkpoint;
pub(crate) mod convert;
mod guard;
mod log_store;
mod memory;
mod network;
pub mod recover;
mod replay;
pub mod revive;
mod rpc;
mod state_machine;
#[cfg(test)]
pub(crate) mod tests;
mod waiters;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::config;
use crate::pb;

pub use backup::{Backup, load_backup};
pub use checkpoint::Checkpointer;
pub use convert::{
    Look, log_id_from_pb, log_id_to_pb, look, membership_from_pb, membership_to_pb, stored_membership_from_pb,
    stored_membership_to_pb,
};
pub use guard::{Expand, Guard, TERM_LEAP_MAX};
pub use log_store::LogStore;
pub use memory::{Ballot, Memory, Past, Reach, Standing};
pub use network::{ForwardStream, MESSAGE_BYTES_MAX, Network, Peers, next_forwarded};
pub use replay::{Replay, entry_of};
pub use rpc::{Member, Rpc, first_message};
pub use state_machine::{Applied, StateMachine, Store, Unsaved, write_snapshot};
pub use waiters::{Held, Outcome, Waiters};

/// The commands of one log entry: an encoded [`pb::log::Batch`].
#[derive(Clone, PartialEq, Eq)]
pub struct Batch(pub Bytes);

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({} bytes)", self.0.len())
    }
}

impl std::fmt::Display for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// For the commands of a batch that have no origin, by their place in it: what the leader answers the members that forwarded them.
pub type Answers = Vec<(usize, Outcome)>;

/// What openraft is instantiated with.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq, Ord, PartialOrd)]
pub struct TypeConfig {}

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Batch;
    type R = Answers;
    type NodeId = u64;
    type Node = pb::log::Node;
    type Term = u64;
    // The paper's: at most one leader a term.
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Batch, u64, pb::log::Node>;
    type Entry = openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = openraft::impls::OneshotResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub type Membership = openraft::Membership<u64, pb::log::Node>;
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub type Metrics = openraft::RaftMetrics<TypeConfig>;

/// openraft's settings for ours; every trap that has a setting is guarded here.
pub fn options(raft: &config::Raft, log: &config::Log) -> Result<openraft::Config, openraft::ConfigError> {
    let millis = |d: std::time::Duration| d.as_millis() as u64;
    let election_max = millis(raft.election_timeout_max);
    openraft::Config {
        cluster_name: "quorate".into(),
        heartbeat_interval: millis(raft.heartbeat_interval),
        election_timeout_min: millis(raft.election_timeout_min),
        election_timeout_max: election_max,
        // Snapshots are asked for by log bytes (`node::housekeeping`), which openraft does not know.
        snapshot_policy: openraft::SnapshotPolicy::Never,
        // The log is purged by bytes too, so openraft leaves it to `node::housekeeping`.
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: log.entries_max,
        // The whole transfer has this time; it is resumed where it broke off.
        install_snapshot_timeout: 600_000,
        enable_pre_vote: Some(true),
        // A restarted leader must be elected again (openraft #1467).
        enable_leader_restore: Some(false),
        // A leader without a quorum goes quiet, so that the others can elect (openraft #1898).
        quorum_loss_probe_interval: Some(2 * election_max),
        backoff: "100ms 200ms ...1s".into(),
        ..openraft::Config::default()
    }
    .validate()
}

/// Starts this member's Raft on a recovered log and state.
pub async fn start(
    id: u64,
    options: openraft::Config,
    network: Network,
    log: LogStore,
    state_machine: StateMachine,
) -> Result<Raft, openraft::errors::Fatal<TypeConfig>> {
    Raft::new(id, Arc::new(options), network, log, state_machine).await
}

/// The voters of a formation, as openraft's `initialize` takes them.
pub fn initial_members(formation: &pb::log::Formation) -> BTreeMap<u64, pb::log::Node> {
    formation.members.iter().map(|m| (m.id, m.node.clone().unwrap_or_default())).collect()
}
