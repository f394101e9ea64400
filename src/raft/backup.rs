//! A backup of a view, as a client takes it, and the state in one.

use std::sync::Arc;

use bytes::Bytes;

use super::Member;
use super::state_machine::Applied;
use crate::env::File;
use crate::kv;
use crate::pb::log::StateMeta;
use crate::storage::snapshot::{self, Head, backup};

/// A backup that is about to be written.
pub struct Backup {
    view: Applied,
    head: Head,
}

impl Backup {
    /// Of this very view, by this member.
    pub fn new(view: Applied, this: Member) -> Self {
        let mut meta = view.meta();
        // A view of a member that has applied nothing yet is as good as that of an empty log.
        meta.applied.get_or_insert_default();
        Self { head: Head { cluster_id: this.cluster_id, member_id: this.member_id, meta }, view }
    }

    /// Its size. Visits every version, as [`Self::write`] does.
    pub fn bytes(&self) -> u64 {
        backup::size(&self.head, self.view.kv.changes())
    }

    /// Hands it to `sink` in pieces of `piece_bytes` (the last is smaller) while that answers `true`.
    pub fn write(&self, piece_bytes: usize, sink: &mut dyn FnMut(Bytes) -> bool) {
        backup::write(&self.head, self.view.kv.changes(), piece_bytes, sink);
    }
}

/// The state in a backup, and what the backup says of itself. Its checksum must have been verified.
pub fn load_backup(file: Arc<dyn File>, name: &str) -> Result<(kv::State, Head), snapshot::Error> {
    let damaged = |reason: String| snapshot::Error::Damaged { name: name.to_owned(), reason };
    let reader = backup::open(file, name)?;
    let head = reader.head().clone();
    let mut loader = kv::Loader::new();
    for change in reader {
        loader.load(change?).map_err(|error| damaged(error.to_string()))?;
    }
    let StateMeta { revision, .. } = head.meta;
    let state = loader.finish(revision).map_err(|error| damaged(error.to_string()))?;
    Ok((state, head))
}
