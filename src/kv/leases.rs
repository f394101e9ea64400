//! The leases of a state: what was granted, and which keys go when a lease ends.
//!
//! Owns the facts: id, granted time, the time that was left at the last checkpoint, and the index of attached keys. That
//! index is derived, never stored: a key is attached to the lease that its newest version names.
//! Absent: what commands do to them (`lease`), and time.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::ops::Bound;

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};

use crate::pb::{KeyValue, log};

/// What a lease takes: in the map, and on a leader in the clock, whose tables double. A member takes 250 bytes on average, 400 at the most.
pub(super) const LEASE_BYTES: usize = 400;
/// What an attached key takes in the index, which shares its version's allocation.
pub(super) const ATTACHED_BYTES: usize = 24;

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

    pub(super) fn to_pb(self, id: i64) -> log::Lease {
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
    pub(super) table: LeaseTable,
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

    /// The live versions that are attached to a lease, in key order.
    pub(super) fn keys(&self, id: i64) -> impl Iterator<Item = &KeyValue> {
        self.from(id, &[]).take_while(move |kv| kv.lease() == id)
    }

    /// The live versions that are attached to this lease under `key` or a later one, and then those of later leases.
    pub(super) fn from(&self, id: i64, key: &[u8]) -> impl Iterator<Item = &KeyValue> + use<'_> {
        let first: &dyn Place = &(id, key);
        self.attached.range::<_, dyn Place + '_>((Bound::Included(first), Bound::Unbounded)).map(|attached| &attached.0)
    }

    /// How many are attached to any.
    pub(super) fn attached_count(&self) -> usize {
        self.attached.len()
    }

    /// The live versions that are attached to any.
    pub(super) fn attached(&self) -> impl Iterator<Item = &KeyValue> {
        self.attached.iter().map(|attached| &attached.0)
    }

    /// A lease that keys are attached to and that does not exist, if there is one.
    pub(super) fn missing(&self) -> Option<i64> {
        self.attached().map(KeyValue::lease).find(|id| self.table.get(*id).is_none())
    }

    /// All of them, ascending.
    pub(super) fn missing_all(&self) -> Vec<i64> {
        let mut named: Vec<i64> = self.attached().map(KeyValue::lease).collect();
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

/// What has a place in that order: a version that is attached, or one that is sought, which need not be made for it.
trait Place {
    fn place(&self) -> (i64, &[u8]);
}

impl Place for Attached {
    fn place(&self) -> (i64, &[u8]) {
        let kv = self.0.fields();
        (kv.lease, kv.key)
    }
}

impl Place for (i64, &[u8]) {
    fn place(&self) -> (i64, &[u8]) {
        *self
    }
}

impl<'a> Borrow<dyn Place + 'a> for Attached {
    fn borrow(&self) -> &(dyn Place + 'a) {
        self
    }
}

impl Ord for dyn Place + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place().cmp(&other.place())
    }
}

impl PartialOrd for dyn Place + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn Place + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for dyn Place + '_ {}

impl Ord for Attached {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place().cmp(&other.place())
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
