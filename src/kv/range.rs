//! Reads: the present, and any uncompacted revision.
//!
//! A read of the present costs O(log n) and the keys that it returns: the interval is counted by rank. A read of an older
//! revision visits every key of the interval, and goes back through its versions (`versions`).

use std::iter::Take;
use std::ops::Range;

use super::State;
use super::state::header;
use super::tree::{Iter, Place, Tree};
use crate::error::Error;
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::{RangeRequest, RangeResponse};
use crate::pb::{Fields, KeyValue};

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

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        match *self {
            Self::Key(only) => key == only,
            Self::From(first) => key >= first,
            Self::Between(first, end) => key >= first && key < end,
        }
    }

    /// The ranks of its items.
    fn ranks(&self, tree: &Tree) -> Range<usize> {
        let end = match *self {
            Self::Key(key) => tree.rank(Place::after(key)),
            Self::From(_) => tree.len(),
            Self::Between(_, end) => tree.rank(Place::before(end)),
        };
        tree.rank(Place::before(self.start()))..end
    }

    pub(super) fn items<'t>(&self, tree: &'t Tree) -> Take<Iter<'t>> {
        let ranks = self.ranks(tree);
        tree.iter_at(ranks.start).take(ranks.len())
    }
}

impl State {
    /// Answers a range as of the present or of an uncompacted revision. The header carries the present revision.
    pub fn range(&self, r: &RangeRequest) -> Result<RangeResponse, Error> {
        self.check_readable(r.revision)?;
        Ok(self.read_range(r, self.revision))
    }

    /// Refuses a revision that cannot be read; 0 or less is the present.
    pub(super) fn check_readable(&self, revision: i64) -> Result<(), Error> {
        if revision > self.revision {
            return Err(Error::FutureRevision);
        }
        if revision > 0 && revision < self.compacted {
            return Err(Error::Compacted);
        }
        Ok(())
    }

    /// A range whose revision was checked. `present` is the revision of what `live` holds: inside a transaction that has
    /// written, the one that it makes.
    pub(super) fn read_range(&self, r: &RangeRequest, present: i64) -> RangeResponse {
        let past = Some(r.revision).filter(|&revision| revision > 0 && revision != present);
        let interval = Interval::new(&r.key, &r.range_end);
        let mut response = match (interval, past) {
            (Interval::Key(key), None) => select(r, self.live.get(Place::of(key)).into_iter(), None),
            (Interval::Key(key), Some(revision)) => select(r, self.version_at(key, revision).into_iter(), None),
            (_, Some(revision)) => select(r, self.visible_at(interval, revision), None),
            (_, None) => self.range_present(r, interval),
        };
        if r.keys_only {
            for kv in &mut response.kvs {
                *kv = KeyValue::new(Fields { value: &[], ..kv.fields() });
            }
        }
        response.header = header(present);
        response
    }

    fn range_present(&self, r: &RangeRequest, interval: Interval<'_>) -> RangeResponse {
        let ranks = interval.ranks(&self.live);
        let count = ranks.len();
        let last_keys_only = is_key_order(r) && r.sort_order == SortOrder::Descend as i32 && !is_filtered(r);
        if !last_keys_only || r.count_only {
            return select(r, self.live.iter_at(ranks.start).take(count), Some(count));
        }
        let taken = limit(r).map_or(count, |limit| limit.min(count));
        let mut kvs: Vec<KeyValue> = self.live.iter_at(ranks.end - taken).take(taken).cloned().collect();
        kvs.reverse();
        RangeResponse { kvs, more: taken < count, count: count as i64, ..RangeResponse::default() }
    }

    /// The newest versions in `interval`.
    pub(super) fn live_in<'s>(&'s self, interval: Interval<'_>) -> impl Iterator<Item = &'s KeyValue> + use<'s> {
        interval.items(&self.live)
    }
}

fn limit(r: &RangeRequest) -> Option<usize> {
    usize::try_from(r.limit).ok().filter(|&limit| limit > 0)
}

fn is_key_order(r: &RangeRequest) -> bool {
    r.sort_target == SortTarget::Key as i32
}

fn is_filtered(r: &RangeRequest) -> bool {
    [r.min_mod_revision, r.max_mod_revision, r.min_create_revision, r.max_create_revision] != [0; 4]
}

fn passes(r: &RangeRequest, kv: &KeyValue) -> bool {
    let within = |x: i64, min: i64, max: i64| (min == 0 || x >= min) && (max == 0 || x <= max);
    let x = kv.fields();
    within(x.mod_revision, r.min_mod_revision, r.max_mod_revision)
        && within(x.create_revision, r.min_create_revision, r.max_create_revision)
}

/// Filters, sorts and cuts `items`, which come in key order; `count` is how many they are, if that is known.
fn select<'a>(r: &RangeRequest, items: impl Iterator<Item = &'a KeyValue>, count: Option<usize>) -> RangeResponse {
    if r.count_only {
        let count = count.unwrap_or_else(|| items.count());
        return RangeResponse { count: count as i64, ..RangeResponse::default() };
    }
    let limit = limit(r).unwrap_or(usize::MAX);
    let sorted_already = is_key_order(r) && r.sort_order != SortOrder::Descend as i32;
    // One more than the limit shows that there is more.
    let wanted = if sorted_already { limit.saturating_add(1) } else { usize::MAX };
    let filtered = is_filtered(r);
    let mut kvs = Vec::with_capacity(count.unwrap_or(0).min(wanted).min(1024));
    let mut visited = 0;
    for kv in items {
        visited += 1;
        if kvs.len() < wanted && (!filtered || passes(r, kv)) {
            kvs.push(kv.clone());
        }
        if count.is_some() && kvs.len() == wanted {
            break;
        }
    }
    if !sorted_already {
        sort(r, &mut kvs);
    }
    let more = kvs.len() > limit;
    kvs.truncate(limit);
    RangeResponse { kvs, more, count: count.unwrap_or(visited) as i64, ..RangeResponse::default() }
}

/// Equal ones stay in key order. A target other than the key without an order sorts ascending.
fn sort(r: &RangeRequest, kvs: &mut [KeyValue]) {
    let descend = r.sort_order == SortOrder::Descend as i32;
    let by = |order: std::cmp::Ordering| if descend { order.reverse() } else { order };
    match SortTarget::try_from(r.sort_target) {
        Ok(SortTarget::Version) => kvs.sort_by(|a, b| by(a.version().cmp(&b.version()))),
        Ok(SortTarget::Create) => kvs.sort_by(|a, b| by(a.create_revision().cmp(&b.create_revision()))),
        Ok(SortTarget::Mod) => kvs.sort_by(|a, b| by(a.mod_revision().cmp(&b.mod_revision()))),
        Ok(SortTarget::Value) => kvs.sort_by(|a, b| by(a.value().cmp(b.value()))),
        // An unknown target is refused before it gets here; in a log it must still mean the same everywhere.
        Ok(SortTarget::Key) | Err(_) => kvs.sort_by(|a, b| by(a.key().cmp(b.key()))),
    }
}
