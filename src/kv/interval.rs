//! The keys that a request speaks of: one, a range, or all from one on.
//!
//! Owns the meaning of `range_end`, and the items of an interval in a tree: their ranks and sums are known without a visit to any.
//! Absent: sets of intervals (`auth`), and reading at a revision (`range`).

use std::iter::Take;
use std::ops::Range;

use super::tree::{Iter, Place, Sums, Tree};

/// The keys that a request speaks of.
#[derive(Clone, Copy)]
pub(super) enum Interval<'a> {
    Key(&'a [u8]),
    From(&'a [u8]),
    Between(&'a [u8], &'a [u8]),
}

impl<'a> Interval<'a> {
    /// Without `range_end` the one key; up to `"\0"` everything from `key` on.
    pub(super) fn new(key: &'a [u8], range_end: &'a [u8]) -> Self {
        match range_end {
            [] => Self::Key(key),
            [0] => Self::From(key),
            end => Self::Between(key, end.max(key)),
        }
    }

    pub(super) fn all() -> Self {
        Self::From(&[])
    }

    pub(super) fn start(&self) -> &'a [u8] {
        match *self {
            Self::Key(key) | Self::From(key) | Self::Between(key, _) => key,
        }
    }

    /// The ranks of its items.
    pub(super) fn ranks(&self, tree: &Tree) -> Range<usize> {
        let end = match *self {
            Self::Key(key) => tree.rank(Place::after(key)),
            Self::From(_) => tree.len(),
            Self::Between(_, end) => tree.rank(Place::before(end)),
        };
        tree.rank(Place::before(self.start()))..end
    }

    /// What its items are together; visits none.
    pub(super) fn sums(&self, tree: &Tree) -> Sums {
        let ranks = self.ranks(tree);
        Sums { items: ranks.len(), bytes: tree.bytes_between(ranks) }
    }

    pub(super) fn items<'t>(&self, tree: &'t Tree) -> Take<Iter<'t>> {
        let ranks = self.ranks(tree);
        tree.iter_at(ranks.start).take(ranks.len())
    }
}
