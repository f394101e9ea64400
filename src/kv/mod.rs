//! The replicated key-value state: multi-version, synchronous, deterministic.
//!
//! Owns the rules of the etcd v3 KV API: puts, deletes, ranges, transactions, compaction, the facts of leases, users and what they
//! may do, whether clients may write, what a request will cost, the hash that members compare, and how the state is written as [`log::Change`](crate::pb::log::Change)s and loaded again.
//!
//! Invariants: the same commands in the same order give the same answers and the same state on every member; a command
//! that fails changes nothing; what a read returns does not depend on how far a sweep has got.
//! Absent: clocks, randomness, I/O, tasks. Whoever applies commands holds the lock and calls [`State::sweep`].

mod alarm;
pub mod auth;
mod bounds;
mod compact;
mod compare;
mod cost;
mod digest;
mod events;
mod growth;
mod hash;
mod header;
mod history;
mod interval;
mod journal;
mod lease;
mod leases;
mod range;
mod role;
mod snapshot;
mod state;
#[cfg(test)]
pub(crate) mod tests;
mod tree;
mod txn;
pub mod validate;
mod versions;
mod writes;

pub use alarm::{Members, any_op, takes_space};
pub use auth::{Auth, Wants};
pub use cost::{Cost, copy_units, plain_keys};
pub use digest::DIGEST_VERSION;
pub use growth::{Growth, UnderWay, growth, most_with_ends};
pub use hash::{ChangesHash, HashKv};
pub use history::Revision;
pub use journal::Journal;
pub use lease::{LEASES_SINCE, TTL_MAX_SECONDS, only_in_term};
pub use leases::{Lease, LeaseTable};
pub use snapshot::{ChangesFrom, LoadError, Loader};
pub use state::State;
pub use txn::is_read_only;
pub use validate::Limits;

/// The greatest `Command.needs` that this build can apply.
pub const APPLY_VERSION: u32 = 3;

/// The cluster version from which on alarms are put on and taken off.
pub const ALARMS_SINCE: u32 = 2;
/// The cluster version from which on alarms are of members only, fence no majority, and refuse in apply what stores data.
pub const FENCES_SINCE: u32 = 3;
/// Commands that set the wanted size need this version.
pub const WANTED_SIZE_SINCE: u32 = 2;
/// The cluster version from which on ids are reserved for members whose nodes are not there yet: older builds keep no reservation.
pub const RESERVATIONS_SINCE: u32 = 3;

/// Transactions that builds before this could not decode in a batch need this version.
pub const DEEP_TXNS_SINCE: u32 = 3;

/// Members that know this apply version can form a cluster that begins with a backup.
pub const RESTORE_SINCE: u32 = 3;

/// The cluster version from which on there are users and roles.
pub const AUTH_SINCE: u32 = 3;

/// The cluster version from which on a cluster can be a standby, be promoted, and be superseded.
pub const ROLES_SINCE: u32 = 3;

/// As [`APPLY_VERSION`], but a test can have this build behave as an older one: nothing above `QUORATE_TEST_APPLY_VERSION` is
/// announced or applied.
pub fn apply_version() -> u32 {
    crate::env::fail::played_apply_version().map_or(APPLY_VERSION, |older| older.min(APPLY_VERSION))
}

/// The cluster version from which on the digest is begun anew.
pub const DIGESTS_SINCE: u32 = 2;

/// The cluster version of a new cluster: every build can apply what it allows.
pub const CLUSTER_VERSION_MIN: u32 = 1;

/// A command that this member cannot apply. Going on would let it diverge from the others, so it has to stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("the log holds a command of apply version {needs}; this build knows {}: run a newer one", apply_version())]
    Unsupported { needs: u32 },
    #[error("the log holds a command without a request that this build knows")]
    UnknownCommand,
}
