//! The hash that members compare to find out that they have diverged.
//!
//! Over what a swept store holds, as encoded: the state at the compacted revision in key order, then every event after it.
//! So it is the same whatever the sweep's progress, and after a restart from a snapshot. A version's lease is part of its
//! encoding; the leases themselves have no revision, and are not in it.

use super::State;
use super::interval::Interval;
use crate::error::Error;
use crate::pb::KeyValue;
use crate::pb::log::{Change, change};

/// What [`State::hash_kv`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKv {
    /// CRC32C. Comparable between members if the two revisions are equal.
    pub hash: u32,
    pub compact_revision: i64,
    pub hash_revision: i64,
}

/// Makes [`State::hash_kv`] of the present from [`State::changes`], as they pass.
#[derive(Default)]
pub struct ChangesHash {
    hash: u32,
    versions: u64,
}

impl ChangesHash {
    pub fn add(&mut self, change: &Change) {
        if let Some(change::Change::Version(version)) = &change.change {
            self.hash = append(self.hash, version);
            self.versions += 1;
        }
    }

    pub fn hash(&self) -> u32 {
        self.hash
    }

    /// Versions that were added.
    pub fn versions(&self) -> u64 {
        self.versions
    }
}

impl State {
    /// Hashes everything up to `revision`; 0 or less is the present. Visits every version: call it on a clone.
    pub fn hash_kv(&self, revision: i64) -> Result<HashKv, Error> {
        self.check_readable(revision)?;
        let revision = if revision > 0 { revision } else { self.revision };
        let base = self.visible_at(Interval::all(), self.compacted);
        let events = self.history.iter_from(self.compacted + 1).take_while(|x| x.0 <= revision);
        let hash = base.chain(events.flat_map(|x| x.1)).fold(0, append);
        Ok(HashKv { hash, compact_revision: self.compacted, hash_revision: revision })
    }
}

fn append(hash: u32, kv: &KeyValue) -> u32 {
    let bytes = kv.as_encoded();
    // The length keeps two versions from hashing as a different pair of the same bytes.
    let hash = crc32c::crc32c_append(hash, &(bytes.len() as u64).to_le_bytes());
    crc32c::crc32c_append(hash, bytes)
}
