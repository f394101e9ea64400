//! Reads: the present, and any uncompacted revision.
//!
//! A read of the present costs O(log n) and the keys that it returns: the interval is counted by rank. A read of an older
//! revision visits every key of the interval, and goes back through its versions (`versions`).

use std::cmp::Ordering;

use super::State;
use super::header::header;
use super::interval::Interval;
use super::tree::Place;
use crate::error::Error;
use crate::pb::KeyValue;
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::{RangeRequest, RangeResponse};
use crate::pb::key_value::compare_values;

/// Items that a sort with a small limit holds before it drops those that are beyond it.
const SORTED_AT_ONCE: usize = if cfg!(test) { 4 } else { 1024 };

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
                *kv = kv.without_value();
            }
        }
        response.header = header(present);
        response
    }

    fn range_present(&self, r: &RangeRequest, interval: Interval<'_>) -> RangeResponse {
        let ranks = interval.ranks(&self.live);
        let count = ranks.len();
        if r.count_only || !is_in_key_order(r) {
            return select(r, self.live.iter_at(ranks.start).take(count), Some(count));
        }
        let taken = limit(r).map_or(count, |limit| limit.min(count));
        let is_last = r.sort_order == SortOrder::Descend as i32;
        let first = if is_last { ranks.end - taken } else { ranks.start };
        let mut kvs = self.live.cloned(first..first + taken);
        if is_last {
            kvs.reverse();
        }
        RangeResponse { kvs, more: taken < count, count: count as i64, ..RangeResponse::default() }
    }

    /// The newest versions in `interval`.
    pub(super) fn live_in<'s>(&'s self, interval: Interval<'_>) -> impl Iterator<Item = &'s KeyValue> + use<'s> {
        interval.items(&self.live)
    }
}

pub(super) fn limit(r: &RangeRequest) -> Option<usize> {
    usize::try_from(r.limit).ok().filter(|&limit| limit > 0)
}

/// True if the answer is the first or the last keys of the interval, whatever their versions.
pub(super) fn is_in_key_order(r: &RangeRequest) -> bool {
    r.sort_target == SortTarget::Key as i32 && !is_filtered(r)
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
    let (mut visited, filtered) = (0, is_filtered(r));
    let mut items = items.inspect(|_| visited += 1).filter(|kv| !filtered || passes(r, kv));
    let limit = limit(r).unwrap_or(usize::MAX);
    let descend = r.sort_order == SortOrder::Descend as i32;
    // A target other than the key without an order sorts ascending. Equal ones stay in key order.
    let (kvs, more) = match SortTarget::try_from(r.sort_target) {
        Ok(SortTarget::Version) => sort(items, KeyValue::version, descend, limit),
        Ok(SortTarget::Create) => sort(items, KeyValue::create_revision, descend, limit),
        Ok(SortTarget::Mod) => sort(items, KeyValue::mod_revision, descend, limit),
        Ok(SortTarget::Value) => sort(items, Value::of, descend, limit),
        // An unknown target is refused before it gets here; in a log it must still mean the same everywhere.
        Ok(SortTarget::Key) | Err(_) if descend => {
            let all: Vec<&KeyValue> = items.collect();
            (all.iter().rev().take(limit).copied().cloned().collect(), all.len() > limit)
        }
        Ok(SortTarget::Key) | Err(_) => {
            let mut kvs = Vec::with_capacity(count.unwrap_or(0).min(limit).min(1024));
            kvs.extend(items.by_ref().take(limit).cloned());
            let more = items.next().is_some();
            if count.is_none() {
                items.for_each(drop);
            }
            (kvs, more)
        }
    };
    RangeResponse { kvs, more, count: count.unwrap_or(visited) as i64, ..RangeResponse::default() }
}

/// The first `limit` of the items in the order of what `by` says of each, and whether there are more. Asks once an item: a version
/// is parsed for the answer, and most likely fetched from memory. Holds no more than it must: what lies beyond the limit is cut off as
/// soon as what is new weighs as much as what the last cut has left. So all cuts together compare no more than a few times what there
/// is, also where the few that are left are long.
fn sort<'a, K: Sorted>(
    items: impl Iterator<Item = &'a KeyValue>,
    by: impl Fn(&'a KeyValue) -> K,
    descend: bool,
    limit: usize,
) -> (Vec<KeyValue>, bool) {
    let order = |a: &(K, usize, &KeyValue), b: &(K, usize, &KeyValue)| {
        let by = a.0.cmp(&b.0);
        (if descend { by.reverse() } else { by }).then(a.1.cmp(&b.1))
    };
    let held_max = limit.saturating_mul(2).max(SORTED_AT_ONCE);
    let (mut first, mut more) = (Vec::new(), false);
    let mut cut = |first: &mut Vec<(K, usize, &'a KeyValue)>| {
        if first.len() > limit {
            first.select_nth_unstable_by(limit, order);
            first.truncate(limit);
            more = true;
        }
    };
    let (mut left, mut new) = (0, 0);
    for (position, kv) in items.enumerate() {
        if first.len() >= held_max && new >= left {
            cut(&mut first);
            (left, new) = (first.iter().map(|(key, ..)| key.weight()).sum(), 0);
        }
        let key = by(kv);
        new += key.weight();
        first.push((key, position, kv));
    }
    cut(&mut first);
    first.sort_unstable_by(order);
    (first.into_iter().map(|(_, _, kv)| kv.clone()).collect(), more)
}

/// What items are sorted by.
trait Sorted: Ord {
    /// What comparing it takes at most, in bytes and not nothing.
    fn weight(&self) -> usize;
}

/// What a comparison takes beside the bytes that it looks at.
const COMPARISON_BYTES: usize = 256;

impl Sorted for i64 {
    fn weight(&self) -> usize {
        COMPARISON_BYTES
    }
}

impl Sorted for Value<'_> {
    fn weight(&self) -> usize {
        COMPARISON_BYTES + self.bytes.len()
    }
}

/// A value in the order of its bytes; most are told apart by the first of them, which need no look at the value.
struct Value<'a> {
    head: u64,
    bytes: &'a [u8],
}

impl<'a> Value<'a> {
    fn of(kv: &'a KeyValue) -> Self {
        let bytes = kv.value();
        let mut head = [0; 8];
        let known = bytes.len().min(head.len());
        head[..known].copy_from_slice(&bytes[..known]);
        Self { head: u64::from_be_bytes(head), bytes }
    }
}

impl Ord for Value<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.head.cmp(&other.head).then_with(|| compare_values(self.bytes, other.bytes))
    }
}

impl PartialOrd for Value<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Value<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Value<'_> {}
