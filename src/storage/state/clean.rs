//! Cleaning: drops the changes that compaction made unreachable, and joins small records.
//!
//! Owns the pass: it goes along the chain a few records a call, from its start to the view's applied index, then begins
//! again. A record that is over half dead is replaced; small neighbours become one record, their links joined.
//!
//! Invariants, for a state that is loaded and then swept at its compacted revision:
//! - A superseded put may always go: whatever superseded it is further along the chain.
//! - A tombstone may go only when no put of its key is left before it, or that put would rise from the dead. The pass
//!   keeps a *floor*: every put that it left behind although dead has a greater mod revision than the floor, and everything
//!   superseded at or below the floor is gone from the records behind. So a tombstone at or below the floor may go.
//! - A lease's last word is what the view has, or its end. An end may go only when no earlier word of that lease is left
//!   before it. The pass keeps the leases of which it left dead words behind; of an end that the pass's first view does not
//!   know, there may be more.
//! - The last word on a user or a role, the cluster's own among them, stays, an end too; those before it may go.
//! - A view is never ahead of what is durable, so that a crash cannot lose the change that superseded while keeping the
//!   removal of what it superseded.
//!
//! Floor and leases live in memory: after a restart, a new pass begins at the start of the chain.

use std::collections::BTreeSet;

use super::record::{Key, Position, RECORD_BYTES_MAX, Record};
use super::{Error, Store, change, each_change};
use crate::pb::KeyValue;
use crate::pb::log::change::Change as Kind;
use crate::pb::log::{AuthRole, AuthUser, Lease, LogId, StateMeta};

/// Leases with dead words behind that a pass remembers.
const LEASES_MAX: usize = 1 << 16;

/// A consistent view of the state, that cleaning decides by. Later calls bring later views, or the same.
pub struct View<'a> {
    /// What the view has applied; at most [`Store::durable`].
    pub applied: LogId,
    /// The view's compacted revision; a `Change` in the chain says it.
    pub compacted: i64,
    /// Whether a sweep at `compacted` keeps this version.
    pub is_live: &'a dyn Fn(&KeyValue) -> bool,
    /// Whether the view has this very lease.
    pub is_live_lease: &'a dyn Fn(&Lease) -> bool,
    /// Of a change of users and their roles that is no end, and of the cluster's role.
    pub is_live_fact: &'a dyn Fn(&Kind) -> bool,
}

/// What one call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanStats {
    pub records_read: usize,
    pub records_written: usize,
    pub records_removed: usize,
    pub changes_dropped: usize,
    pub bytes_freed: u64,
    /// The pass has reached the end of the view; the next call begins a new one.
    pub finished: bool,
}

/// How far a pass has come.
#[derive(Debug)]
pub(super) struct Pass {
    at: Key,
    floor: i64,
    /// Leases with dead words behind; `None` if there are too many to remember, and then no lease's end is dropped.
    leases: Option<BTreeSet<i64>>,
    /// The applied index of the pass's first view.
    since: Option<u64>,
    /// Bytes of dead changes that were left.
    left: u64,
    /// Replaces every record with anything dead in it. Taken when what the last pass left is over a quarter of the store.
    thorough: bool,
}

impl Default for Pass {
    fn default() -> Self {
        Self { at: Key::MIN, floor: i64::MAX, leases: Some(BTreeSet::new()), since: None, left: 0, thorough: false }
    }
}

impl Pass {
    /// Whether a dead word of this lease may be behind.
    fn may_hold(&self, lease: i64) -> bool {
        self.leases.as_ref().is_none_or(|left| left.contains(&lease))
    }

    fn leave_behind(&mut self, mut leases: BTreeSet<i64>) {
        if let Some(left) = &mut self.leases {
            left.append(&mut leases);
            if left.len() > LEASES_MAX {
                self.leases = None;
            }
        }
    }
}

/// The keys and the bytes of a unit, as they are stored.
type Stored = (Vec<Key>, Vec<Vec<u8>>);

/// A record, or all the records of one large change.
struct Unit {
    keys: Vec<Key>,
    from: Position,
    to: Position,
    meta: Option<StateMeta>,
    /// Encoded changes that stay.
    kept: Vec<u8>,
    /// Something is dropped, so the record is written anew.
    replace: bool,
    stored: u64,
}

impl Store {
    /// Goes on with the pass over about `budget` records. Its writes are durable with the next checkpoint.
    pub fn clean(&mut self, view: &View<'_>, budget: usize) -> Result<CleanStats, Error> {
        self.check()?;
        let durable = self.durable.map(|durable| durable.index);
        assert!(durable >= Some(view.applied.index), "cleaning looks at what is durable");
        let mut stats = CleanStats::default();
        let read = self.read_units(view, budget);
        let (units, finished) = self.sticky(read)?;
        self.pass.floor = self.pass.floor.min(view.compacted);
        let since = *self.pass.since.get_or_insert(view.applied.index);

        let mut run: Option<Unit> = None;
        for (keys, records) in units {
            stats.records_read += keys.len();
            self.pass.at = Key { part: keys.last().expect("a unit has a record").part + 1, ..keys[keys.len() - 1] };
            let sifted = self.sift(view, since, keys, &records, &mut stats);
            let unit = self.sticky(sifted.map_err(Error::Damaged))?;
            run = match run.take() {
                Some(run) if self.joins(&run, &unit) => Some(join(run, unit)),
                done => {
                    self.settle(done, &mut stats)?;
                    Some(unit)
                }
            };
        }
        self.settle(run, &mut stats)?;

        if finished {
            let thorough = self.pass.left.saturating_mul(4) > self.bytes;
            self.pass = Pass { thorough, ..Pass::default() };
        }
        stats.finished = finished;
        Ok(stats)
    }

    /// The next units of the pass, encoded; true if they reach the end of the view.
    fn read_units(&self, view: &View<'_>, budget: usize) -> Result<(Vec<Stored>, bool), Error> {
        let mut units = Vec::new();
        let (mut keys, mut records, mut read) = (Vec::new(), Vec::new(), 0);
        let mut finished = true;
        self.records.scan(self.pass.at, &mut |key, stored| {
            if key.index > view.applied.index {
                return Ok(false);
            }
            if read >= budget.max(1) && keys.is_empty() {
                finished = false;
                return Ok(false);
            }
            read += 1;
            keys.push(key);
            records.push(stored.to_vec());
            if !Record::decode(key, stored).map_err(Error::Damaged)?.cut {
                units.push((std::mem::take(&mut keys), std::mem::take(&mut records)));
            }
            Ok(true)
        })?;
        Ok((units, finished))
    }

    /// Decides what stays of a unit, and lowers the floor for what stays although dead.
    fn sift(
        &mut self,
        view: &View<'_>,
        since: u64,
        keys: Vec<Key>,
        stored: &[Vec<u8>],
        stats: &mut CleanStats,
    ) -> Result<Unit, String> {
        let decoded =
            keys.iter().zip(stored).map(|(key, bytes)| Record::decode(*key, bytes)).collect::<Result<Vec<_>, _>>()?;
        let (mut kept, mut dead, mut dead_bytes, mut floor) = (Vec::new(), 0, 0, self.pass.floor);
        let (mut carry, mut dead_leases) = (Vec::new(), BTreeSet::new());
        let ends_are_known = keys.iter().all(|key| key.index <= since);
        for record in &decoded {
            each_change(record, &mut carry, &mut |change| {
                let gone = match change.change.as_ref().expect("a decoded change is of a known kind") {
                    // Ends with the greatest one, which is not below the view's.
                    Kind::Compacted(revision) => *revision < view.compacted,
                    Kind::ClusterVersion(_) | Kind::Alarms(_) | Kind::WantedSize(_) => false,
                    // The last word of each stays, ends too.
                    Kind::AuthUser(AuthUser { gone: true, .. }) | Kind::AuthRole(AuthRole { gone: true, .. }) => false,
                    fact @ (Kind::AuthUser(_) | Kind::AuthRole(_) | Kind::Auth(_) | Kind::Role(_)) => {
                        !(view.is_live_fact)(fact)
                    }
                    Kind::Lease(lease) if lease.ttl > 0 => {
                        let dead = !(view.is_live_lease)(lease);
                        if dead {
                            dead_leases.insert(lease.id);
                        }
                        dead
                    }
                    // A dead word in this very record goes with its end, or stays with it.
                    Kind::Lease(end) => ends_are_known && !self.pass.may_hold(end.id),
                    Kind::Version(version) if (view.is_live)(version) => false,
                    Kind::Version(version) => {
                        let revision = version.mod_revision();
                        let blocked = version.is_tombstone() && revision > self.pass.floor;
                        if blocked {
                            self.pass.left += change::encoded_len(&change) as u64;
                        } else if !version.is_tombstone() {
                            floor = floor.min(revision - 1);
                        }
                        !blocked
                    }
                };
                if gone {
                    dead += 1;
                    dead_bytes += change::encoded_len(&change) as u64;
                } else {
                    change::encode(&change, &mut kept);
                }
                Ok(())
            })?;
        }
        let total = decoded.iter().map(|record| record.changes.len() as u64).sum::<u64>();
        let replace = dead > 0 && (dead_bytes * 2 > total || self.pass.thorough) && kept.len() <= RECORD_BYTES_MAX;
        if replace {
            stats.changes_dropped += dead;
        } else if dead > 0 {
            self.pass.left += dead_bytes;
            self.pass.floor = floor;
            self.pass.leave_behind(dead_leases);
        }
        if !replace && let [only] = &decoded[..] {
            kept = only.changes.to_vec();
        }
        let (first, last) = (&decoded[0], &decoded[decoded.len() - 1]);
        Ok(Unit {
            from: first.from,
            to: last.to,
            meta: last.meta.clone(),
            kept,
            replace,
            stored: stored.iter().map(|bytes| bytes.len() as u64).sum(),
            keys,
        })
    }

    /// Joining costs writing both, so it is for small records, and for one that is written anyway.
    fn joins(&self, run: &Unit, next: &Unit) -> bool {
        let small = |unit: &Unit| unit.replace || unit.kept.len() * 2 <= self.record_bytes;
        small(run) && small(next) && run.kept.len() + next.kept.len() <= self.record_bytes
    }

    /// Writes a run, if it is not as it was.
    fn settle(&mut self, run: Option<Unit>, stats: &mut CleanStats) -> Result<(), Error> {
        let Some(run) = run.filter(|run| run.replace) else { return Ok(()) };
        let record = Record { from: run.from, to: run.to, meta: run.meta, cut: false, changes: &run.kept }.encode();
        let (last, others) = run.keys.split_last().expect("a run has a record");
        let freed = run.stored as i64 - record.len() as i64;
        let written = self.records.write(Some((*last, record)), others);
        self.sticky(written)?;
        self.bytes = self.bytes.saturating_add_signed(-freed);
        stats.records_written += 1;
        stats.records_removed += others.len();
        stats.bytes_freed += freed.max(0) as u64;
        Ok(())
    }
}

/// Two neighbours as one; both spans' changes, in order.
fn join(mut run: Unit, next: Unit) -> Unit {
    assert_eq!(run.to, next.from, "neighbours are linked");
    run.keys.extend(next.keys);
    run.kept.extend(next.kept);
    Unit { to: next.to, meta: next.meta, replace: true, stored: run.stored + next.stored, ..run }
}
