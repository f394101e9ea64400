//! The versions of each key: where they are held, and how the one that a read sees is found.
//!
//! `live` holds the newest version of each key that exists. A superseded one is in the history, whose events say which version of
//! their key was before: that is the way back through a key's life, and a put has one tree to search. (With every superseded version
//! in a second tree, that tree took a fifth of the CPU of puts.)
//! `old` holds what that way begins with, skips to or ends at, and no version that nobody needs there: every tombstone, for a key that
//! does not exist has no newest version; every [`INDEXED_EVERY`]th version of a life, so that the way to a past revision is short; and
//! the superseded versions that were swept, which reads at the compacted revision still see when the history has let go of them.
//!
//! Invariants: a version after the compacted revision is in the history. A version superseded in its own revision was never visible:
//! it is in the history alone, and only the first of a key's events in a revision says what was before.
//! Absent: when versions go (`compact`).

use super::State;
use super::history::{Event, VERSION_OVERHEAD_BYTES, cost};
use super::interval::Interval;
use super::tree::{Place, Sums, Tree};
use crate::pb::KeyValue;

/// Which versions of a life are in `old`: a read of a past revision takes at most so many steps back.
pub(super) const INDEXED_EVERY: i64 = if cfg!(test) { 3 } else { 64 };

/// A slot and its head in a tree two thirds full.
pub(super) const SLOT_BYTES: usize = 30;

impl State {
    /// Makes `kv` its key's newest version.
    pub(super) fn insert_live(&mut self, kv: KeyValue) -> Event {
        let made = kv.clone();
        self.insert_made(kv.key(), |_| made).0
    }

    /// Makes what `make` makes of a key's newest version, if there is one, its newest version. Returns both.
    pub(super) fn insert_made(
        &mut self,
        key: &[u8],
        make: impl FnOnce(Option<&KeyValue>) -> KeyValue,
    ) -> (Event, Option<KeyValue>) {
        let mut made = None;
        let prev = self.live.insert(Place::of(key), |prev| made.insert(make(prev)).clone());
        let kv = made.expect("a tree makes what it inserts");
        self.leases.follow(prev.as_ref(), Some(&kv));
        let before = match &prev {
            Some(prev) => self.supersede(prev, kv.mod_revision()),
            None => {
                self.note_key(kv.key());
                0
            }
        };
        (Event { kv, before }, prev)
    }

    /// Ends the life of a key.
    pub(super) fn insert_tombstone(&mut self, tombstone: KeyValue) -> Event {
        let (key, revision) = (tombstone.key(), tombstone.mod_revision());
        let prev = self.live.remove(Place::of(key));
        self.leases.follow(prev.as_ref(), None);
        let before = prev.map_or(0, |prev| {
            self.live_key_bytes -= key.len() as u64;
            self.supersede(&prev, revision)
        });
        self.old_bytes += cost(&tombstone);
        let replaced = self.old.insert(Place::of_tombstone(key, revision), |_| tombstone.clone());
        self.old_bytes -= replaced.as_ref().map_or(0, cost);
        Event { kv: tombstone, before }
    }

    /// `prev` is not its key's newest version any more, from `revision` on. Returns its own revision, if it was ever visible.
    fn supersede(&mut self, prev: &KeyValue, revision: i64) -> i64 {
        let was = prev.fields();
        if was.mod_revision == revision {
            return 0;
        }
        self.old_bytes += cost(prev);
        if was.version % INDEXED_EVERY == 0 || self.is_swept(was.mod_revision) {
            self.insert_old(prev);
        }
        was.mod_revision
    }

    /// Whether a sweep has looked at events of this revision, all or some.
    fn is_swept(&self, revision: i64) -> bool {
        revision <= self.swept || revision == self.swept + 1 && self.swept_events > 0
    }

    /// Holds a superseded version by itself.
    pub(super) fn insert_old(&mut self, kv: &KeyValue) {
        let place = Place::of_version(kv.key(), kv.mod_revision());
        self.old.insert(place, |_| kv.clone());
    }

    /// Forgets a superseded version or a tombstone that is in `old`.
    pub(super) fn remove_old(&mut self, place: Place<'_>) {
        let removed = self.old.remove(place);
        self.old_bytes -= removed.as_ref().map_or(0, cost);
    }

    /// The version of `key` that a read at `revision` sees, which is not below the compacted one. Not while a command is under way
    /// that has written: the history says nothing of that yet (`txn`).
    pub(super) fn version_at(&self, key: &[u8], revision: i64) -> Option<&KeyValue> {
        let live = self.live.get(Place::of(key));
        if live.is_some_and(|kv| kv.mod_revision() <= revision) {
            return live;
        }
        let rank = self.old.rank(Place::of_tombstone(key, revision + 1));
        let later = self.old.iter_at(rank).next().filter(|kv| kv.key() == key);
        self.back_to(revision, later.or(live)?)
    }

    /// The version of `kv`'s key that a read at `revision` sees, given `kv` after that.
    fn back_to(&self, revision: i64, kv: &KeyValue) -> Option<&KeyValue> {
        let x = kv.fields();
        // A life that began later; had an earlier one lasted so long, the way would begin with its tombstone.
        if x.create_revision > revision {
            return None;
        }
        let (key, mut at) = (x.key, x.mod_revision);
        while at > revision {
            at = self.before(key, at)?;
        }
        self.version_of(key, at)
    }

    /// The revision of the version of `key` that its event of `revision` superseded.
    pub(super) fn before(&self, key: &[u8], revision: i64) -> Option<i64> {
        Some(self.history.get(revision)?.before(key)).filter(|&before| before > 0)
    }

    /// The version of `key` that `revision` made.
    pub(super) fn version_of(&self, key: &[u8], revision: i64) -> Option<&KeyValue> {
        let event = self.history.get(revision).and_then(|events| events.last_of(key));
        event.or_else(|| self.old.get(Place::of_version(key, revision)))
    }

    /// What a read of `interval` at `revision`, which is not below the compacted one, sees, in key order. As [`Self::version_at`], not
    /// while a command is under way that has written.
    pub(super) fn visible_at<'s>(
        &'s self,
        interval: Interval<'_>,
        revision: i64,
    ) -> impl Iterator<Item = &'s KeyValue> + use<'s> {
        let mut live = interval.items(&self.live).peekable();
        let mut old = interval.items(&self.old).peekable();
        std::iter::from_fn(move || {
            loop {
                let key = match (live.peek().copied(), old.peek().copied()) {
                    (None, None) => return None,
                    (Some(x), None) | (None, Some(x)) => x.key(),
                    (Some(x), Some(y)) => x.key().min(y.key()),
                };
                let mut later = None;
                while let Some(kv) = old.next_if(|kv| kv.key() == key) {
                    later = later.or_else(|| Some(kv).filter(|kv| kv.mod_revision() > revision));
                }
                let live = live.next_if(|kv| kv.key() == key);
                let seen = live.filter(|kv| kv.mod_revision() <= revision);
                if let Some(kv) = seen.or_else(|| self.back_to(revision, later.or(live)?)) {
                    return Some(kv);
                }
            }
        })
    }

    /// The revision of the last change of `key` that is held, a deletion included. While a state is loaded: then `old` has all.
    pub(super) fn newest_revision_of(&self, key: &[u8]) -> Option<i64> {
        let live = self.live.get(Place::of(key));
        let newest = live.or_else(|| self.old.last_before(Place::after(key)).filter(|x| x.key() == key));
        newest.map(KeyValue::mod_revision)
    }

    /// Leaves in `old` what is there after a complete sweep; until now it has had every version that was ever superseded.
    pub(super) fn settle_old(&mut self) {
        let all = std::mem::replace(&mut self.old, Tree::new());
        self.old_bytes = 0;
        let mut items = all.iter_at(0).peekable();
        while let Some(kv) = items.next() {
            let x = kv.fields();
            let next = items.peek().copied().filter(|next| next.key() == x.key);
            let next = next.or_else(|| self.live.get(Place::of(x.key))).map(KeyValue::mod_revision);
            let is_recent = x.mod_revision > self.compacted;
            let (is_held, place) = if kv.is_tombstone() {
                (is_recent, Place::of_tombstone(x.key, x.mod_revision))
            } else {
                (next.is_some_and(|next| next > self.compacted), Place::of_version(x.key, x.mod_revision))
            };
            if is_held {
                self.old_bytes += cost(kv);
                if !is_recent || kv.is_tombstone() || x.version % INDEXED_EVERY == 0 {
                    self.old.insert(place, |_| kv.clone());
                }
            }
        }
    }
}

/// What newest versions take that are together so many bytes.
pub(super) fn live_cost(versions: Sums) -> u64 {
    versions.bytes + (versions.items * (VERSION_OVERHEAD_BYTES + SLOT_BYTES)) as u64
}
