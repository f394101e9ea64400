//! Between which values the fields of some versions lie.
//!
//! The tree keeps them for what is below each child of a branch, made when they are first asked for, so that comparisons over an interval
//! (`compare`) need no look at its keys. Invariant: the ends are fields of versions that are there, so what an end does not meet,
//! a version does not meet. Absent: keys, which the tree is ordered by.

use std::sync::{Arc, OnceLock};

use crate::pb::key_value::compare_values;
use crate::pb::{Fields, KeyValue};

/// A field that is a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Field {
    Version,
    Create,
    Mod,
    Lease,
}

impl Field {
    pub(super) const ALL: [Self; 4] = [Self::Version, Self::Create, Self::Mod, Self::Lease];

    pub(super) fn of(self, kv: &Fields<'_>) -> i64 {
        match self {
            Self::Version => kv.version,
            Self::Create => kv.create_revision,
            Self::Mod => kv.mod_revision,
            Self::Lease => kv.lease,
        }
    }
}

/// The least and the greatest of each number of some versions, of which there is one at least.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bounds([(i64, i64); Field::ALL.len()]);

impl Bounds {
    /// Of one version.
    pub(super) fn of(kv: &KeyValue) -> Self {
        let kv = kv.fields();
        Self(Field::ALL.map(|field| (field.of(&kv), field.of(&kv))))
    }

    /// Of these and others.
    pub(super) fn and(mut self, others: &Self) -> Self {
        for (mine, theirs) in self.0.iter_mut().zip(&others.0) {
            *mine = (mine.0.min(theirs.0), mine.1.max(theirs.1));
        }
        self
    }

    pub(super) fn number(&self, field: Field) -> (i64, i64) {
        self.0[field as usize]
    }
}

/// The versions with the least and the greatest value.
#[derive(Clone)]
pub(super) struct ValueBounds {
    least: KeyValue,
    most: KeyValue,
}

impl ValueBounds {
    pub(super) fn of(kv: &KeyValue) -> Self {
        Self { least: kv.clone(), most: kv.clone() }
    }

    pub(super) fn and(mut self, others: &Self) -> Self {
        if compare_values(others.least.fields().value, self.least.fields().value).is_lt() {
            self.least = others.least.clone();
        }
        if compare_values(others.most.fields().value, self.most.fields().value).is_gt() {
            self.most = others.most.clone();
        }
        self
    }

    pub(super) fn values(&self) -> (&[u8], &[u8]) {
        (self.least.fields().value, self.most.fields().value)
    }
}

/// Both, each made when it is asked for. Whoever changes a version begins anew. Two who ask at once may make the same, and neither waits: one
/// may be a thread that gives way, the other the event loop.
#[derive(Clone, Default)]
pub(super) struct Known {
    numbers: OnceLock<Arc<Bounds>>,
    values: OnceLock<Arc<ValueBounds>>,
}

impl Known {
    pub(super) fn numbers(&self, make: impl FnOnce() -> Bounds) -> &Bounds {
        known(&self.numbers, make)
    }

    pub(super) fn values(&self, make: impl FnOnce() -> ValueBounds) -> &ValueBounds {
        known(&self.values, make)
    }
}

fn known<T>(place: &OnceLock<Arc<T>>, make: impl FnOnce() -> T) -> &T {
    if place.get().is_none() {
        // Made before it is put there; of two that are made, one stays.
        let _ = place.set(Arc::new(make()));
    }
    place.get().expect("it was put there")
}
