//! The state as a sequence of changes, and back.
//!
//! A snapshot is [`State::changes`]; the state store keeps what [`State::take_journal`] gave it, and may drop versions for
//! which [`State::is_live`] no longer holds, and what it says of leases when [`State::is_live_lease`] does not. [`Loader`] takes either.

use std::sync::Arc;

use bytes::Bytes;

use super::history::{Event, Events, History};
use super::interval::Interval;
use super::tree::Tree;
use super::{Auth, State};
use crate::pb::KeyValue;
use crate::pb::log::{Alarms, Change, Lease, change};

/// The greatest revision that is loaded, and the greatest count of a key's versions: a million writes a second take 140,000 years to it,
/// and there is room for what is added to it afterwards.
const REVISION_MAX: i64 = 1 << 62;

/// Changes that do not make a state: they are damaged or incomplete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error("a change without a content that this build knows")]
    UnknownChange,
    #[error("a version of no key, or of revision {0}")]
    BadVersion(i64),
    #[error("revision {0} is none that a store reaches: expected 1 to {REVISION_MAX}")]
    BadRevision(i64),
    #[error("versions of one key out of order: {later} before {earlier}")]
    OutOfOrder { later: i64, earlier: i64 },
    #[error("versions are missing at or below revision {missing}, but only {compacted} is compacted")]
    Gap { missing: i64, compacted: i64 },
    #[error("versions up to revision {loaded}, of a state that ends at {revision}")]
    BeyondEnd { loaded: i64, revision: i64 },
    #[error("a key is attached to lease {0:x}, which is missing")]
    LeaseMissing(i64),
}

impl State {
    /// Changes that make this state from nothing: what was visible at the compacted revision in key order, then every
    /// later event in revision order, then the rest, leases last. The same on every member, whatever the sweep's progress.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        let base = self.visible_at(Interval::all(), self.compacted);
        let events = self.history.iter_from(self.compacted + 1).flat_map(|x| x.1);
        base.chain(events).map(version).chain(self.other_changes())
    }

    /// The changes from `from` on: at least one if there are any, and no more once they hold `bytes_min`. Moves `from` on.
    ///
    /// Parts put together are [`Self::changes`] of the same view; between them nothing is held but the view.
    pub fn changes_part(&self, from: &mut ChangesFrom, bytes_min: usize) -> Vec<Change> {
        let mut part = Part { changes: Vec::new(), bytes: 0, bytes_min };
        if let ChangesFrom::Key(key) = from {
            let is_full = |kv: &KeyValue| part.push(kv).then(|| Bytes::from([kv.key(), &[0]].concat()));
            match self.visible_at(Interval::From(key), self.compacted).find_map(is_full) {
                Some(next) => *key = next,
                None => *from = ChangesFrom::Event(self.compacted + 1, 0),
            }
        }
        if let ChangesFrom::Event(revision, position) = *from
            && part.changes.is_empty()
        {
            let after = |(number, events): (i64, &[KeyValue])| {
                let skipped = if number == revision { position } else { 0 };
                let full = events.iter().skip(skipped).position(|kv| part.push(kv))?;
                Some(ChangesFrom::Event(number, skipped + full + 1))
            };
            *from = self.history.iter_from(revision).find_map(after).unwrap_or(ChangesFrom::Others);
        }
        if matches!(from, ChangesFrom::Others) && part.changes.is_empty() {
            *from = ChangesFrom::End;
            part.changes.extend(self.other_changes());
        }
        part.changes
    }

    /// The changes that are no versions.
    fn other_changes(&self) -> impl Iterator<Item = Change> {
        let rest = [change::Change::Compacted(self.compacted), change::Change::ClusterVersion(self.cluster_version)];
        // None on says nothing: a member of an older version can then load it.
        let alarms = (!self.alarms.is_empty()).then(|| change::Change::Alarms(Alarms { alarms: self.alarms() }));
        // Left out while nobody has said so: an older build could not load it.
        let wanted = self.wanted_size().map(change::Change::WantedSize);
        let others =
            rest.into_iter().chain(self.lease_changes()).chain(alarms).chain(wanted).chain(self.auth.changes());
        let others = others.chain(self.role_change());
        others.map(|change| Change { change: Some(change) })
    }

    /// True if a swept store would still hold this version.
    ///
    /// Who drops the others from storage must first have stored the compaction itself, and must drop a tombstone only
    /// when no earlier version of its key is stored any more: else that one would come back to life.
    pub fn is_live(&self, kv: &KeyValue) -> bool {
        let x = kv.fields();
        x.mod_revision > self.compacted
            // A transaction that was never checked may delete and put a key in one revision.
            || x.version > 0
                && self.version_at(x.key, self.compacted).is_some_and(|held| held.mod_revision() == x.mod_revision)
    }
}

impl State {
    /// True if `change`, which is of users, their roles or the cluster's role, is what the state says now: storage may drop what it says
    /// otherwise, unless that is an end.
    pub fn is_live_fact(&self, change: &change::Change) -> bool {
        match change {
            change::Change::Role(role) => self.is_live_role(role),
            _ => self.auth.holds(change),
        }
    }
}

fn version(kv: &KeyValue) -> Change {
    Change { change: Some(change::Change::Version(kv.clone())) }
}

/// Some of the changes, in order.
struct Part {
    changes: Vec<Change>,
    bytes: usize,
    bytes_min: usize,
}

impl Part {
    /// Whether it is full then.
    fn push(&mut self, kv: &KeyValue) -> bool {
        self.bytes += kv.as_encoded().len();
        self.changes.push(version(kv));
        self.bytes >= self.bytes_min
    }
}

/// A place among [`State::changes`].
#[derive(Clone, Debug)]
pub enum ChangesFrom {
    /// What was visible at the compacted revision, from this key on.
    Key(Bytes),
    /// The event of this revision at this position.
    Event(i64, usize),
    Others,
    End,
}

impl Default for ChangesFrom {
    fn default() -> Self {
        Self::Key(Bytes::new())
    }
}

/// Builds a [`State`] from changes.
///
/// Versions of one key come in revision order; above the compacted revision, all versions do, and none is missing. At or
/// below it there may be gaps, and dead versions.
pub struct Loader {
    state: State,
    /// The events of the greatest revision so far; not yet in the history.
    newest: Vec<Event>,
    newest_revision: i64,
    /// Versions at or below this revision are missing or in another order: it must turn out to be compacted.
    incomplete: i64,
}

impl Default for Loader {
    fn default() -> Self {
        Self::new()
    }
}

impl Loader {
    pub fn new() -> Self {
        // What is compacted is known at the end. Until then every superseded version is held by itself, as after a sweep.
        let state = State { swept: i64::MAX, ..State::new() };
        Self { state, newest: Vec::new(), newest_revision: 1, incomplete: 0 }
    }

    pub fn load(&mut self, change: Change) -> Result<(), LoadError> {
        match change.change.ok_or(LoadError::UnknownChange)? {
            change::Change::Version(kv) => self.version(kv)?,
            change::Change::Compacted(revision) if !(0..=REVISION_MAX).contains(&revision) => {
                return Err(LoadError::BadRevision(revision));
            }
            change::Change::Compacted(revision) => self.state.compacted = self.state.compacted.max(revision),
            change::Change::ClusterVersion(version) => {
                self.state.cluster_version = self.state.cluster_version.max(version);
            }
            change::Change::Alarms(on) => {
                self.state.alarms = on.alarms.iter().map(|one| (one.member_id, one.alarm)).collect();
            }
            change::Change::Lease(lease) => self.state.leases.load(&lease),
            change::Change::WantedSize(size) => self.state.wanted_size = size,
            change::Change::Role(role) => self.state.load_role(role),
            change @ (change::Change::AuthUser(_) | change::Change::AuthRole(_) | change::Change::Auth(_)) => {
                Arc::make_mut(&mut self.state.auth).load(&change);
            }
        }
        Ok(())
    }

    fn version(&mut self, kv: KeyValue) -> Result<(), LoadError> {
        let x = kv.fields();
        let revision = x.mod_revision;
        let counts = (0..=REVISION_MAX).contains(&x.version) && (0..=revision).contains(&x.create_revision);
        if x.key.is_empty() || !(2..=REVISION_MAX).contains(&revision) || !counts {
            return Err(LoadError::BadVersion(revision));
        }
        let later = self.state.newest_revision_of(x.key).filter(|&later| later > revision);
        if let Some(later) = later {
            return Err(LoadError::OutOfOrder { later, earlier: revision });
        }
        let event = if kv.is_tombstone() { self.state.insert_tombstone(kv) } else { self.state.insert_live(kv) };
        if revision < self.newest_revision {
            self.incomplete = self.incomplete.max(revision);
            return Ok(());
        }
        if revision > self.newest_revision {
            self.end_revision(revision);
        }
        self.newest.push(event);
        Ok(())
    }

    /// Puts the newest revision into the history and goes on to `next`; over a gap, the history starts anew.
    fn end_revision(&mut self, next: i64) {
        let history = &mut self.state.history;
        if !self.newest.is_empty() {
            history.push(Events::take(&mut self.newest));
        }
        if history.next() != next {
            *history = History::new(next);
            self.incomplete = self.incomplete.max(next - 1);
        }
        self.newest_revision = next;
    }

    /// The leases that keys are attached to so far and that were not loaded, ascending.
    pub fn missing_leases(&self) -> Vec<i64> {
        self.state.leases.missing_all()
    }

    /// The state as of `revision`, which is stored beside the changes: the last events may be dead, and dropped.
    pub fn finish(mut self, revision: i64) -> Result<State, LoadError> {
        if !(1..=REVISION_MAX).contains(&revision) {
            return Err(LoadError::BadRevision(revision));
        }
        let (loaded, compacted) = (self.newest_revision, self.state.compacted);
        if loaded.max(compacted) > revision {
            return Err(LoadError::BeyondEnd { loaded: loaded.max(compacted), revision });
        }
        self.end_revision(revision + 1);
        if self.incomplete > compacted {
            return Err(LoadError::Gap { missing: self.incomplete, compacted });
        }
        if let Some(id) = self.state.leases.missing() {
            return Err(LoadError::LeaseMissing(id));
        }
        let mut state = self.state;
        state.revision = revision;
        state.settle_old();
        while state.history.first() < compacted && state.history.first() < state.history.next() {
            state.history.pop_first();
        }
        state.swept = compacted.max(1);
        // What came before these changes is not known here; their source says it.
        state.set_digest(None);
        Ok(state)
    }
}

impl State {
    /// Goes on `by` revisions later, as if everything until then were compacted: who remembers a revision of another life of
    /// this data, watches from it or compares with it, is told so instead of being misled. For a restored backup.
    pub fn bump_revision(&mut self, by: i64) -> Result<(), LoadError> {
        let bumped = self.revision.checked_add(by).filter(|bumped| (self.revision..=REVISION_MAX).contains(bumped));
        self.revision = bumped.ok_or(LoadError::BadRevision(self.revision.saturating_add(by)))?;
        self.compacted = self.revision;
        self.history = History::new(self.revision + 1);
        (self.swept, self.swept_events) = (self.compacted, 0);
        (self.old, self.old_bytes) = (Tree::new(), 0);
        Ok(())
    }

    /// Takes all alarms off: those of a former cluster's members mean nothing in a restored one.
    pub fn clear_alarms(&mut self) {
        self.alarms.clear();
    }

    /// Gives every lease at least so much time, until another leader counts for it: for a restored state whose leases are kept alive elsewhere.
    pub fn hold_leases(&mut self, seconds: i64) {
        let short: Vec<_> = self.leases().iter().filter(|(_, lease)| lease.start_seconds() < seconds).collect();
        for (id, lease) in short {
            self.leases.load(&Lease { id, ttl: lease.ttl_seconds, remaining_ttl: seconds });
        }
    }

    /// Gives tokens a key to be signed with, if authentication is on and there is none: another server's file has no key of ours.
    pub fn ensure_token_key(&mut self, key: impl FnOnce(&Auth) -> Bytes) {
        if self.auth.is_enabled() && self.auth.token_key().is_empty() {
            let key = key(&self.auth);
            Arc::make_mut(&mut self.auth).set_token_key(key);
        }
    }
}
