//! Backups that a cluster makes of itself: full ones now and then, and between them every committed entry of the log.
//!
//! ```text
//! <path>/marker                                what this is, and its format
//! <path>/generations/<generation>              whose turn: the newest generation's cluster is the only one that writes
//! <path>/<generation>/log/<number>             a record: the entries that were committed after the record before
//! <path>/<generation>/full/<index>-<random>.data     a snapshot, as a member's snapshot file is
//! <path>/<generation>/full/<index>-<random>    what is known of it; made when it was read back
//! ```
//! A moment is restored by loading the full backup before it and applying the entries after that, as a member does that starts. *Why
//! entries of the log, and not events of the history or what the state's journal notes:* they are all there is to a state (leases, users,
//! compactions and alarms in their order among the keys), every member has the same ones under the same numbers, so that any of them
//! goes on where another one stopped, and they lie on the members' disks until they are purged, so that nothing is kept in memory for it.
//! Apply knows nothing of backups.
//!
//! Invariants: objects are made once and never changed; of two writers of one name one succeeds, which is all that keeps them apart (no
//! clock does). A record names the SHA-256 of the one before it, and both it and a full backup tell the digest of the state that they
//! lead to: what is restored has that digest, or is refused with the name of the object. A full backup counts only once its data was
//! read back. No time of day decides anything but which moment a person meant.
//! Another cluster can follow a path (`standby`), and take the place of the one that writes there (`succession`).
//! etcd's own snapshot file is none of this, and is read by `etcd_file`. Absent: the format of a snapshot (`storage::snapshot`), and data directories (`server::restore`).

pub mod archive;
mod chain;
mod duty;
pub mod etcd_file;
pub mod full;
mod http;
pub mod plan;
pub mod prune;
pub mod restore;
mod seal;
pub mod standby;
pub mod store;
pub mod succession;
#[cfg(test)]
mod tests;
pub mod verify;

use std::time::Duration;

pub use archive::Archive;
pub use duty::{Duty, Parts, Settings, Told};
pub use seal::Key;
pub use standby::Follower;
pub use store::{Access, Store};

/// Why something of a backup was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Store { what: String, source: Box<object_store::Error> },
    #[error("{what}: no answer within {patience:?}")]
    Late { what: String, patience: Duration },
    #[error("{name} is damaged: {reason}")]
    Damaged { name: String, reason: String },
    /// What was asked cannot be, as a sentence says.
    #[error("{0}")]
    Refused(String),
    #[error("{what}: {source}")]
    Disk { what: String, source: std::io::Error },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn disk(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Disk { what, source }
    }
}

/// A time of day, as objects hold it.
pub fn millis(time: crate::env::WallTime) -> u64 {
    time.duration_since(crate::env::WallTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
