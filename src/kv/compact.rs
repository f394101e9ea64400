//! Removal of what compaction has put out of reach.
//!
//! Compacting is logical and at once (`State::apply`); this frees the memory afterwards, in slices, so that no slice holds
//! the lock for long. Each event up to the compacted revision is visited once: it puts the version before it out of reach,
//! and itself too if it is a tombstone. A version that was superseded is held by itself from then on, until the event that did so is
//! visited: the history lets go of it.
//!
//! Invariant: no read, hash or snapshot depends on how far it has got.

use super::State;
use super::history::{Events, Revision};
use super::tree::Place;
use crate::env::planted;

/// Events of a revision that is dropped elsewhere.
const LARGE_EVENTS: usize = 256;

impl State {
    /// True while compacted versions are still held.
    pub fn sweep_pending(&self) -> bool {
        self.swept < self.compacted
    }

    /// Visits at most `steps` events; true once nothing is left to remove. A step takes a few microseconds.
    pub fn sweep(&mut self, steps: usize) -> bool {
        self.sweep_but(steps, &mut Vec::new())
    }

    /// As [`Self::sweep`], but revisions of many events that the history lets go of are left in `large`: to drop one takes as long as
    /// thousands of steps, and needs no lock.
    pub fn sweep_but(&mut self, steps: usize, large: &mut Vec<Revision>) -> bool {
        let before = self.bytes();
        let done = self.sweep_some(steps, large);
        self.freed_bytes += before.saturating_sub(self.bytes());
        done
    }

    fn sweep_some(&mut self, steps: usize, large: &mut Vec<Revision>) -> bool {
        let mut steps = steps;
        self.drop_history(large);
        while self.swept < self.compacted {
            let revision = self.swept + 1;
            let events = self.history.get(revision).expect("an unswept revision is in the history").clone();
            while self.swept_events < events.as_slice().len() {
                if steps == 0 {
                    return false;
                }
                steps -= 1;
                self.sweep_event(&events, self.swept_events);
                self.swept_events += 1;
            }
            (self.swept, self.swept_events) = (revision, 0);
            self.drop_history(large);
        }
        true
    }

    fn sweep_event(&mut self, events: &Events, position: usize) {
        let (event, before) = (&events.as_slice()[position], events.before_at(position));
        let at = event.fields();
        if before > 0 {
            self.remove_old(Place::of_version(at.key, before));
        }
        if event.is_tombstone() {
            self.remove_old(Place::of_tombstone(at.key, at.mod_revision));
            return;
        }
        // What supersedes it later finds it swept, and holds it then.
        let is_live = self.live.get(Place::of(at.key)).is_some_and(|live| live.mod_revision() == at.mod_revision);
        if !is_live && !events.is_overwritten(position) && !planted!("compaction-drops-live-version") {
            self.insert_old(event);
        }
    }

    /// The events of the compacted revision itself stay until the next compaction: watchers may start there.
    fn drop_history(&mut self, large: &mut Vec<Revision>) {
        while self.history.first() <= self.swept && self.history.first() < self.compacted {
            large.extend(self.history.pop_first().filter(|revision| revision.events().len() > LARGE_EVENTS));
        }
    }
}
