//! Leases as the cluster agrees on them: what was granted, and which keys go when a lease ends.
//!
//! Owns the facts: id, granted time, the time that was left at the last checkpoint, and the index of attached keys. That
//! index is derived, never stored: a key is attached to the lease that its newest version names.
//! Invariants: a live key's lease exists; ending a lease deletes its keys in one revision, in key order.
//! Absent: time. When a lease ends is the leader's to say (`lease`), and it says so by a command like any other.

use std::cmp::Ordering;

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};

use super::State;
use super::state::header;
use crate::error::Error;
use crate::pb::etcd::{LeaseCheckpointResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeResponse};
use crate::pb::log::{self, Command, LeaseCheckpoint, LeaseRevoke, change, command};
use crate::pb::{Fields, KeyValue};

/// The cluster version from which on leases may be proposed.
pub const LEASES_SINCE: u32 = 2;

/// The longest lease, in seconds: etcd's bound.
pub const TTL_MAX_SECONDS: i64 = 9_000_000_000;

/// What a lease takes: in the map, and on a leader in the clock, whose tables double. A member takes 250 bytes on average, 400 at the most.
const LEASE_BYTES: usize = 400;
/// What an attached key takes in the index, which shares its version's allocation.
const ATTACHED_BYTES: usize = 24;

/// What is agreed of one lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Granted; at least 1.
    pub ttl_seconds: i64,
    /// What was left of it at the last checkpoint; less than granted. None: as much as was granted.
    pub left_seconds: Option<i64>,
    /// Tells two grants of one id apart. Counted by this process; neither replicated nor stored.
    pub grant: u64,
}

impl Lease {
    /// What a new leader starts from.
    pub fn start_seconds(&self) -> i64 {
        self.left_seconds.unwrap_or(self.ttl_seconds)
    }

    fn to_pb(self, id: i64) -> log::Lease {
        log::Lease { id, ttl: self.ttl_seconds, remaining_ttl: self.left_seconds.unwrap_or(0) }
    }
}

/// The leases at one moment. A clone is O(1), and later commands do not change it.
#[derive(Clone, Default)]
pub struct LeaseTable(OrdMap<i64, Lease>);

impl LeaseTable {
    pub fn get(&self, id: i64) -> Option<Lease> {
        self.0.get(&id).copied()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ascending by id.
    pub fn iter(&self) -> impl Iterator<Item = (i64, Lease)> {
        self.0.iter().map(|(id, lease)| (*id, *lease))
    }

    /// What is otherwise here than in `before`; `None` is a lease that is gone. Costs what has changed, not what there is.
    pub fn changed_since(&self, before: &Self) -> impl Iterator<Item = (i64, Option<Lease>)> {
        before.0.diff(&self.0).map(|item| match item {
            DiffItem::Add(id, lease) | DiffItem::Update { new: (id, lease), .. } => (*id, Some(*lease)),
            DiffItem::Remove(id, _) => (*id, None),
        })
    }
}

/// The state's part that is leases.
#[derive(Clone)]
pub(super) struct Leases {
    table: LeaseTable,
    grants: u64,
    /// The live versions that name a lease.
    attached: OrdSet<Attached>,
}

impl Leases {
    pub(super) fn new() -> Self {
        Self { table: LeaseTable::default(), grants: 0, attached: OrdSet::new() }
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.table.len() * LEASE_BYTES + self.attached.len() * ATTACHED_BYTES) as u64
    }

    /// Takes over that `now` is a key's newest version where `before` was; `None` for none.
    pub(super) fn follow(&mut self, before: Option<&KeyValue>, now: Option<&KeyValue>) {
        let lease_of = |kv: Option<&KeyValue>| kv.map_or(0, KeyValue::lease);
        let (was, is) = (lease_of(before), lease_of(now));
        if let Some(kv) = before.filter(|_| was != 0) {
            let removed = self.attached.remove(&Attached(kv.clone()));
            assert!(removed.is_some(), "a live key with a lease is attached to it");
        }
        if let Some(kv) = now.filter(|_| is != 0) {
            self.attached.insert(Attached(kv.clone()));
        }
    }

    fn keys(&self, id: i64) -> impl Iterator<Item = &KeyValue> {
        let first = Attached(KeyValue::new(Fields { lease: id, ..Fields::default() }));
        self.attached.range(first..).map(|attached| &attached.0).take_while(move |kv| kv.lease() == id)
    }

    /// A lease that keys are attached to and that does not exist, if there is one.
    pub(super) fn missing(&self) -> Option<i64> {
        self.attached.iter().map(|attached| attached.0.lease()).find(|id| self.table.get(*id).is_none())
    }

    /// All of them, ascending.
    pub(super) fn missing_all(&self) -> Vec<i64> {
        let mut named: Vec<i64> = self.attached.iter().map(|attached| attached.0.lease()).collect();
        named.dedup();
        named.retain(|id| self.table.get(*id).is_none());
        named
    }

    /// Takes a stored change over.
    pub(super) fn load(&mut self, lease: &log::Lease) {
        if lease.ttl <= 0 {
            self.table.0.remove(&lease.id);
            return;
        }
        let held = self.table.get(lease.id);
        self.grants += u64::from(held.is_none());
        let facts = Lease {
            ttl_seconds: lease.ttl,
            left_seconds: Some(lease.remaining_ttl).filter(|left| *left > 0),
            grant: held.map_or(self.grants, |held| held.grant),
        };
        self.table.0.insert(lease.id, facts);
    }
}

/// A version, in the order of its lease and then its key.
#[derive(Clone)]
struct Attached(KeyValue);

impl Ord for Attached {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.lease().cmp(&other.0.lease()).then_with(|| self.0.key().cmp(other.0.key()))
    }
}

impl PartialOrd for Attached {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Attached {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Attached {}

/// The only term in whose entries this command means anything, if there is one: what a leader has decided by its clock is
/// void once another leads.
pub fn only_in_term(command: &Command) -> Option<u64> {
    let term = match &command.request {
        Some(command::Request::LeaseRevoke(r)) => r.term,
        Some(command::Request::LeaseCheckpoint(r)) => r.term,
        _ => 0,
    };
    (term != 0).then_some(term)
}

impl State {
    /// All leases, as a view that later commands do not change.
    pub fn leases(&self) -> &LeaseTable {
        &self.leases.table
    }

    /// The newest versions of the keys that are attached to a lease, in key order.
    pub fn lease_keys(&self, id: i64) -> impl Iterator<Item = &KeyValue> {
        self.leases.keys(id)
    }

    /// The newest versions of all keys that are attached to some lease.
    pub(super) fn attached_keys(&self) -> impl Iterator<Item = &KeyValue> {
        self.leases.attached.iter().map(|attached| &attached.0)
    }

    /// True if `lease` is what is stored of its id now, so that storage may drop what it says otherwise.
    ///
    /// Who drops a lease that is gone must do as for tombstones: only when no earlier change of its id is stored any more.
    pub fn is_live_lease(&self, lease: &log::Lease) -> bool {
        self.leases.table.get(lease.id).is_some_and(|held| held.to_pb(lease.id) == *lease)
    }

    pub(super) fn lease_changes(&self) -> impl Iterator<Item = change::Change> {
        self.leases.table.iter().map(|(id, lease)| change::Change::Lease(lease.to_pb(id)))
    }

    /// Refuses a put to a lease that does not exist.
    pub(super) fn check_lease(&self, id: i64) -> Result<(), Error> {
        if id == 0 || self.leases.table.get(id).is_some() { Ok(()) } else { Err(Error::LeaseNotFound) }
    }

    pub(super) fn grant_lease(&mut self, r: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        // Whoever proposes chooses the id, for applying must do the same everywhere.
        if r.id == 0 {
            return Err(Error::LeaseNotFound);
        }
        if r.ttl > TTL_MAX_SECONDS {
            return Err(Error::LeaseTtlTooLarge);
        }
        if self.leases.table.get(r.id).is_some() {
            return Err(Error::LeaseExists);
        }
        let ttl = r.ttl.max(1);
        self.set_lease(log::Lease { id: r.id, ttl, remaining_ttl: 0 });
        Ok(LeaseGrantResponse { header: header(self.revision), id: r.id, ttl, error: String::new() })
    }

    /// Deletes the lease's keys in one revision, in key order; without keys there is no revision.
    pub(super) fn revoke_lease(&mut self, r: &LeaseRevoke) -> Result<LeaseRevokeResponse, Error> {
        if self.leases.table.get(r.id).is_none() {
            return Err(Error::LeaseNotFound);
        }
        let doomed: Vec<KeyValue> = self.leases.keys(r.id).cloned().collect();
        self.write_tombstones(&doomed);
        self.commit();
        self.set_lease(log::Lease { id: r.id, ..log::Lease::default() });
        Ok(LeaseRevokeResponse { header: header(self.revision) })
    }

    /// A lease that is gone meanwhile is passed over.
    pub(super) fn checkpoint_leases(&mut self, r: &LeaseCheckpoint) -> LeaseCheckpointResponse {
        for checkpoint in &r.checkpoints {
            let Some(lease) = self.leases.table.get(checkpoint.id) else { continue };
            let left = Some(checkpoint.remaining_ttl).filter(|left| (1..lease.ttl_seconds).contains(left));
            if left != lease.left_seconds {
                self.set_lease(Lease { left_seconds: left, ..lease }.to_pb(checkpoint.id));
            }
        }
        LeaseCheckpointResponse { header: header(self.revision) }
    }

    /// Gives every lease all its time, wherever it is counted from here on.
    pub(super) fn forget_checkpoints(&mut self) {
        let all = self.leases.table.clone();
        for (id, lease) in all.iter().filter(|(_, lease)| lease.left_seconds.is_some()) {
            self.set_lease(Lease { left_seconds: None, ..lease }.to_pb(id));
        }
    }

    fn set_lease(&mut self, lease: log::Lease) {
        self.leases.load(&lease);
        self.record(change::Change::Lease(lease), size_of::<log::Lease>());
    }
}
