//! Removal of what compaction has put out of reach.
//!
//! Compacting is logical and at once (`State::apply`); this frees the memory afterwards, in slices, so that no slice holds
//! the lock for long. Each event up to the compacted revision is visited once: it puts the version before it out of reach,
//! and itself too if it is a tombstone.
//!
//! Invariant: no read, hash or snapshot depends on how far it has got.

use super::State;
use super::tree::Place;
use crate::env::planted;
use crate::pb::KeyValue;

impl State {
    /// True while compacted versions are still held.
    pub fn sweep_pending(&self) -> bool {
        self.swept < self.compacted
    }

    /// Visits at most `steps` events; true once nothing is left to remove. A step takes a few microseconds.
    pub fn sweep(&mut self, steps: usize) -> bool {
        let mut steps = steps;
        self.drop_history();
        while self.swept < self.compacted {
            let revision = self.swept + 1;
            let events = self.history.get(revision).expect("an unswept revision is in the history").clone();
            while let Some(event) = events.as_slice().get(self.swept_events) {
                if steps == 0 {
                    return false;
                }
                steps -= 1;
                self.swept_events += 1;
                self.forget_before(event);
            }
            (self.swept, self.swept_events) = (revision, 0);
            self.drop_history();
        }
        true
    }

    fn forget_before(&mut self, event: &KeyValue) {
        let at = event.fields();
        let before = self.old.last_before(Place::of_version(at.key, at.mod_revision));
        if let Some(mod_revision) = before.filter(|x| x.key() == at.key).map(KeyValue::mod_revision) {
            self.remove_old(at.key, mod_revision);
        }
        let own = self.old.get(Place::of_version(at.key, at.mod_revision));
        if own.is_some_and(|own| own.is_tombstone() || planted!("compaction-drops-live-version")) {
            self.remove_old(at.key, at.mod_revision);
        }
    }

    /// The events of the compacted revision itself stay until the next compaction: watchers may start there.
    fn drop_history(&mut self) {
        while self.history.first() <= self.swept && self.history.first() < self.compacted {
            self.history.pop_first();
        }
    }
}
