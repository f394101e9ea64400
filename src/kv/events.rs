//! What watchers read: the events of past revisions, and the versions before them.
//!
//! Invariant: what is compacted is not told, however far a sweep has got; only who read it before the compaction may go on
//! ([`State::holds_from`]).

use super::State;
use super::history::Revision;
use crate::pb::KeyValue;

impl State {
    /// Whether every revision from `revision` on is still held, compacted or not.
    pub fn holds_from(&self, revision: i64) -> bool {
        self.history.first() <= revision
    }

    /// The revisions from `revision` on that are still held, compacted or not, in order.
    pub fn revisions_from(&self, revision: i64) -> impl Iterator<Item = Revision> {
        self.history.revisions_from(revision)
    }

    /// The version that `event` replaced or deleted; none if it began the key's life, or if that version is compacted.
    pub fn version_before(&self, event: &KeyValue) -> Option<KeyValue> {
        let at = event.fields();
        // A key that was made has nothing before it, whatever lived under its name.
        if at.version == 1 || at.mod_revision <= self.compacted {
            return None;
        }
        self.version_of(at.key, self.before(at.key, at.mod_revision)?).cloned()
    }
}
