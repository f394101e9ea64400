//! What applying has changed since somebody last asked, for the state store to write.
//!
//! Every change passes here, so the digest is kept here too, whether there is a journal or not.
//! Bounded by bytes: a journal that would grow past its bound is dropped and marked overflowed, and its reader writes the
//! whole state instead.

use super::digest::Digest;
use crate::pb::KeyValue;
use crate::pb::log::{Change, change};

/// The changes since the last [`State::take_journal`](super::State::take_journal), in order.
#[derive(Debug, Default, PartialEq)]
pub struct Journal {
    pub changes: Vec<Change>,
    /// True if changes were lost to the bound: `changes` is then empty, and only the whole state is complete.
    pub overflowed: bool,
}

/// Fills a [`Journal`]; off until it has a bound.
#[derive(Default)]
pub(super) struct Recorder {
    bytes_max: usize,
    bytes: usize,
    journal: Journal,
    pub(super) digest: Option<Digest>,
}

impl Recorder {
    /// Keeps no journal.
    pub(super) fn new(digest: Option<Digest>) -> Self {
        Self { digest, ..Self::default() }
    }

    /// Starts an empty journal.
    pub(super) fn keep(&mut self, bytes_max: usize) {
        *self = Self { bytes_max, ..Self::new(self.digest) };
    }

    /// This recorder; leaves one that keeps nothing.
    pub(super) fn take_over(&mut self) -> Self {
        let off = Self::new(self.digest);
        std::mem::replace(self, off)
    }

    pub(super) fn versions(&mut self, versions: &[KeyValue]) {
        for version in versions {
            if let Some(digest) = &mut self.digest {
                digest.version(version);
            }
            self.keep_change(|| change::Change::Version(version.clone()), version.as_encoded().len());
        }
    }

    pub(super) fn record(&mut self, change: change::Change, payload_bytes: usize) {
        let change = Change { change: Some(change) };
        if let Some(digest) = &mut self.digest {
            digest.change(&change);
        }
        self.keep_change(|| change.change.expect("it was just put there"), payload_bytes);
    }

    fn keep_change(&mut self, change: impl FnOnce() -> change::Change, payload_bytes: usize) {
        if self.bytes_max == 0 || self.journal.overflowed {
            return;
        }
        self.bytes += payload_bytes + size_of::<Change>();
        if self.bytes > self.bytes_max {
            self.journal = Journal { changes: Vec::new(), overflowed: true };
        } else {
            self.journal.changes.push(Change { change: Some(change()) });
        }
    }

    /// What the journal takes of its bound.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn take(&mut self) -> Journal {
        self.bytes = 0;
        std::mem::take(&mut self.journal)
    }
}
