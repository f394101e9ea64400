//! A backup of a view, as a client takes it, and the state in one.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::Member;
use super::state_machine::Applied;
use crate::env::File;
use crate::kv;
use crate::pb::log::StateMeta;
use crate::storage::snapshot::{self, Head, backup};

/// Bytes of changes that are given to the writer at a time.
const PART_BYTES: usize = 64 << 10;

/// A backup that is made a piece at a time.
pub struct Backup {
    view: Applied,
    head: Head,
    from: kv::ChangesFrom,
    writer: Option<backup::Writer>,
    /// Made, and not taken yet.
    pieces: VecDeque<Bytes>,
}

impl Backup {
    /// Of this very view, by this member.
    pub fn new(view: Applied, this: Member) -> Self {
        let mut meta = view.meta();
        // A view of a member that has applied nothing yet is as good as that of an empty log.
        meta.applied.get_or_insert_default();
        let head = Head { cluster_id: this.cluster_id, member_id: this.member_id, meta };
        Self { view, head, from: kv::ChangesFrom::default(), writer: None, pieces: VecDeque::new() }
    }

    /// Of the state in it.
    pub fn revision(&self) -> i64 {
        self.view.kv.revision()
    }

    /// Its size. Visits every version.
    pub fn bytes(&self) -> u64 {
        backup::size(&self.head, self.view.kv.changes())
    }

    /// The next piece, of `piece_bytes`, but that the last is smaller; `None` after that. Visits about as much.
    pub fn piece(&mut self, piece_bytes: usize) -> Result<Option<Bytes>, snapshot::Error> {
        while self.pieces.is_empty() && !matches!(self.from, kv::ChangesFrom::End) {
            let mut writer = match self.writer.take() {
                Some(writer) => writer,
                None => backup::Writer::begin(&self.head, piece_bytes)?,
            };
            for change in self.view.kv.changes_part(&mut self.from, PART_BYTES) {
                writer.push(&change)?;
            }
            self.pieces.extend(std::iter::from_fn(|| writer.piece()));
            if matches!(self.from, kv::ChangesFrom::End) {
                self.pieces.extend(writer.end()?);
            } else {
                self.writer = Some(writer);
            }
        }
        Ok(self.pieces.pop_front())
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
