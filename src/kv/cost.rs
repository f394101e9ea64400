//! What a request will visit and answer, counted before it is proposed or read.
//!
//! From the sums in the trees: O(log n) an operation, whatever lies in its interval. A request may do what visits every key once,
//! however many there are, in any order and at any revision; what all its operations visit beyond that has a bound. So a small request
//! cannot ask for the work of a thousand, while nothing that etcd's clients ask for is refused because there is much data.
//! Counted is what there is of a kind: keys that are looked at, steps back to past versions of them, and bytes, since a key or a
//! value may have as many as a request. Where a bound is not known of an interval, it is that of the whole state.
//! Invariant: asked only before a command is proposed and before a read; applying knows no bound.
//! Absent: how long that takes, which depends on the machine.

use std::ops::{AddAssign, Range};

use super::State;
use super::interval::Interval;
use super::range::{is_in_key_order, limit};
use super::role::sources_commands;
use super::tree::{Place, SHORT_KEY_BYTES, Sums};
use super::versions::INDEXED_EVERY;
use crate::error::Error;
use crate::pb::etcd::compare::CompareTarget;
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};
use crate::pb::key_value::HEADS_BYTES_MAX;
use crate::pb::log::{Command, Follow, command};

/// A key that was found is compared so many times in the time of another look-up.
const COMPARES_A_KEY: u64 = 32;
/// Units that are read in about a millisecond.
const READ_AT_ONCE: u64 = 4096;
/// An answer of so many bytes counts as a key.
const BYTES_A_KEY: u64 = 512;
/// So many bytes are compared or copied in the time of a key, none of which are at hand.
const TOUCHED_A_KEY: u64 = 1024;
/// A step back takes as long as so many keys: each is a look into another revision.
const KEYS_A_STEP: u64 = 4;
/// What a version without its value has at most, besides what its key has beyond a short one.
const KEY_ONLY_BYTES: u64 = (SHORT_KEY_BYTES + HEADS_BYTES_MAX) as u64;
/// Ranges of the past are read apart if they have more keys: that which each key takes is a bound of many.
const PAST_AT_ONCE: u64 = 64;
/// A transaction that names so few keys is no matter, however large their values.
const PLAIN_KEYS_MAX: u64 = 64;
/// Keys of one lease that are counted, since each is visited for it. Of one that has more, all keys are taken that some lease has.
const LEASE_KEYS_MAX: usize = 1024;

/// What a request costs at most, as the data is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Versions that are looked at or written; at least 1 an operation.
    pub keys: u64,
    /// Of the answer's keys and values. Exact for a range of the present in key order without filters, an estimate else; of keys
    /// alone, which are copied, never too few.
    pub bytes: u64,
    /// Steps from the newest version of a key back to a past one.
    pub steps: u64,
    /// Bytes of values that are compared, how often that may be included, and of what is copied beside the answer.
    pub touched: u64,
}

impl Cost {
    /// All of it as one number.
    pub fn units(self) -> u64 {
        self.work().saturating_add(self.bytes / BYTES_A_KEY)
    }

    /// The same without the answer, which shares what the state has.
    pub fn work(self) -> u64 {
        let steps = self.steps.saturating_mul(KEYS_A_STEP);
        self.keys.saturating_add(steps).saturating_add(self.touched / TOUCHED_A_KEY)
    }

    /// Whether reading it takes longer than a request may hold up others on its thread: more than a millisecond or so.
    pub fn is_long_to_read(self) -> bool {
        self.units() > READ_AT_ONCE
    }

    /// Of whichever of the two is done.
    fn either(self, other: Self) -> Self {
        Self {
            keys: self.keys.max(other.keys),
            bytes: self.bytes.max(other.bytes),
            steps: self.steps.max(other.steps),
            touched: self.touched.max(other.touched),
        }
    }
}

/// What copying so many bytes costs.
pub fn copy_units(bytes: u64) -> u64 {
    bytes / TOUCHED_A_KEY
}

/// What a transaction has written by then, at most: its reads see that, too.
#[derive(Clone, Copy, Default)]
struct Written {
    put: Cost,
    /// Keys.
    deleted: u64,
}

impl Written {
    fn either(self, other: Self) -> Self {
        Self { put: self.put.either(other.put), deleted: self.deleted.max(other.deleted) }
    }

    /// What an operation meets of it. A key that stands alone is looked at anyhow.
    fn found_in(&self, range_end: &[u8]) -> Cost {
        if range_end.is_empty() { Cost { keys: 0, ..self.put } } else { self.put }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.keys = self.keys.saturating_add(other.keys);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.steps = self.steps.saturating_add(other.steps);
        self.touched = self.touched.saturating_add(other.touched);
    }
}

/// How often each byte of so many values may be compared until they are in order, or until each key's is found among so many.
fn rounds(values: usize) -> u64 {
    u64::from(values.max(1).ilog2()) + 4
}

/// The keys that a command visits, if it names each of them: what it costs then needs no look at the data. `None` if it speaks of
/// intervals, of the past, of the keys of a lease, of users, of values that are there already, or of so many keys that their values matter.
pub fn plain_keys(request: &command::Request) -> Option<u64> {
    match request {
        command::Request::Put(r) => is_plain_put(r).then_some(1),
        command::Request::Compact(_)
        | command::Request::SetClusterVersion(_)
        | command::Request::WantedSize(_)
        | command::Request::LeaseGrant(_)
        | command::Request::Alarm(_)
        | command::Request::Supersede(_)
        | command::Request::StartDigest(_) => Some(1),
        command::Request::Txn(r) => plain_txn_keys(r).filter(|keys| *keys <= PLAIN_KEYS_MAX),
        command::Request::DeleteRange(r) => r.range_end.is_empty().then_some(1),
        command::Request::LeaseRevoke(_) | command::Request::Auth(_) => None,
        command::Request::Follow(_) | command::Request::Promote(_) => None,
        command::Request::LeaseCheckpoint(r) => Some(r.checkpoints.len() as u64),
    }
}

fn plain_txn_keys(r: &TxnRequest) -> Option<u64> {
    let compares = r.compare.iter().map(|c| c.range_end.is_empty().then_some(1));
    let ops = r.success.iter().chain(&r.failure).map(|op| match &op.request {
        Some(Request::RequestRange(r)) => (r.range_end.is_empty() && r.revision <= 0).then_some(1),
        Some(Request::RequestDeleteRange(r)) => r.range_end.is_empty().then_some(1),
        Some(Request::RequestPut(r)) => is_plain_put(r).then_some(1),
        None => Some(1),
        // Those are rare.
        Some(Request::RequestTxn(_)) => None,
    });
    compares.chain(ops).sum()
}

/// Whether it copies nothing but what it brings.
fn is_plain_put(r: &PutRequest) -> bool {
    !r.ignore_value
}

impl State {
    /// Of a range.
    pub fn range_cost(&self, r: &RangeRequest) -> Cost {
        self.range_cost_after(r, &Written::default())
    }

    /// Of a range in a transaction that has written this by then: in the place of each key that it has deleted, the limit takes one
    /// behind it.
    fn range_cost_after(&self, r: &RangeRequest, written: &Written) -> Cost {
        let interval = Interval::new(&r.key, &r.range_end);
        let is_past = self.is_past(r);
        let steps = |keys: usize| if is_past { self.steps_back(keys, r.revision) } else { 0 };
        if let Interval::Key(key) = interval {
            let bytes = if r.count_only { 0 } else { self.bytes_of(key) };
            return Cost { keys: 1, bytes, steps: steps(1), touched: 0 };
        }
        let ranks = interval.ranks(&self.live);
        let most = limit(r).map_or(usize::MAX, |limit| limit.saturating_add(written.deleted as usize));
        let taken = most.min(ranks.len());
        let is_by_value = r.sort_target == SortTarget::Value as i32 && !r.count_only;
        let touched = if is_by_value { self.sort_touches(interval, is_past, written) } else { 0 };
        let (keys, bytes) = if is_past || !is_in_key_order(r) {
            let mut visited = Sums { items: ranks.len(), bytes: self.live.bytes_between(ranks) };
            if is_past {
                visited += interval.sums(&self.old);
            }
            // Which of them are answered is not known, unless it is all.
            let part = u128::from(visited.bytes) * taken as u128 / visited.items.max(1) as u128;
            let part = u64::try_from(part).unwrap_or(u64::MAX);
            (visited.items, if r.keys_only { visited.bytes } else { part })
        } else {
            let is_last = r.sort_order == SortOrder::Descend as i32;
            let answered = if is_last { ranks.end - taken..ranks.end } else { ranks.start..ranks.start + taken };
            (if r.count_only { 0 } else { taken }, self.live.bytes_between(answered))
        };
        let bytes = match (r.count_only, r.keys_only) {
            (true, _) => 0,
            (false, true) => {
                let answered = if is_past { most.min(keys) } else { taken };
                let long = self.live.long_key_bytes() + if is_past { self.old.long_key_bytes() } else { 0 };
                bytes.min(answered as u64 * KEY_ONLY_BYTES + long)
            }
            (false, false) => bytes,
        };
        Cost { keys: keys.max(1) as u64, bytes, steps: steps(keys), touched }
    }

    /// Bytes that are compared until the values of an interval are in order.
    fn sort_touches(&self, interval: Interval<'_>, is_past: bool, written: &Written) -> u64 {
        let sums = interval.sums(&self.live);
        let mut bytes = sums.bytes.saturating_add(written.put.bytes);
        let mut values = sums.items.saturating_add(written.put.keys as usize);
        if is_past {
            // Which of the values that were superseded it meets is not known.
            bytes = bytes.saturating_add(self.old_bytes);
            values = values.saturating_add(interval.sums(&self.old).items);
        }
        bytes.saturating_mul(rounds(values))
    }

    /// How many steps lead from so many keys to what they were at this revision, at most: each key has its own, and no two of them take the
    /// same.
    fn steps_back(&self, keys: usize, revision: i64) -> u64 {
        (keys as u64).saturating_mul(INDEXED_EVERY as u64).min(self.history.events_after(revision))
    }

    /// Whether reading a range takes longer than a request may hold up others on its thread. Of the present and in key order only
    /// references are taken, so that bytes do not matter, unless it is keys alone, which are copied.
    pub fn is_long_range(&self, r: &RangeRequest) -> bool {
        if self.is_past(r) || !is_in_key_order(r) || r.keys_only {
            let cost = self.range_cost(r);
            return cost.is_long_to_read() || self.is_past(r) && cost.keys > PAST_AT_ONCE;
        }
        let is_long = |keys: usize| keys as u64 > READ_AT_ONCE;
        !r.count_only
            && limit(r).is_none_or(is_long)
            && is_long(Interval::new(&r.key, &r.range_end).ranks(&self.live).len())
    }

    fn is_past(&self, r: &RangeRequest) -> bool {
        r.revision > 0 && r.revision != self.revision
    }

    /// Of a transaction: of the branches that cost most, since one of each two is done.
    pub fn txn_cost(&self, r: &TxnRequest) -> Cost {
        self.txn_cost_after(r, &mut Written::default())
    }

    /// Of a command.
    pub fn command_cost(&self, request: &command::Request) -> Cost {
        match request {
            command::Request::DeleteRange(r) => self.delete_cost(r),
            command::Request::Txn(r) => self.txn_cost(r),
            command::Request::Put(r) => self.put_cost(r),
            command::Request::LeaseRevoke(r) => self.revoke_cost(r.id),
            // Each user may have the role that changes.
            command::Request::Auth(_) => Cost { keys: 1 + self.auth().user_count() as u64, ..Cost::default() },
            command::Request::Follow(r) => self.sources_cost(r),
            // All versions that were superseded are let go of.
            command::Request::Promote(_) => {
                Cost { keys: (self.live.sums().items + self.old.sums().items).max(1) as u64, ..Cost::default() }
            }
            plain => Cost { keys: plain_keys(plain).unwrap_or(1), ..Cost::default() },
        }
    }

    /// Of the entries of another cluster.
    fn sources_cost(&self, r: &Follow) -> Cost {
        let requests = sources_commands(r).filter_map(|command| command.request.as_ref());
        Cost { keys: requests.map(|request| self.work_of_one(request)).fold(1, u64::saturating_add), ..Cost::default() }
    }

    /// What applying these commands takes, about, in keys that are visited: for who decides how to do it.
    pub fn work_of(&self, commands: &[Command]) -> u64 {
        let requests = commands.iter().filter_map(|command| command.request.as_ref());
        requests.map(|request| self.work_of_one(request)).fold(0, u64::saturating_add)
    }

    fn work_of_one(&self, request: &command::Request) -> u64 {
        plain_keys(request).unwrap_or_else(|| self.command_cost(request).work())
    }

    /// Refuses what costs more than `units_max` beyond a visit to every key.
    pub fn check_cost(&self, cost: Cost, units_max: u64) -> Result<(), Error> {
        let mut all = self.live.sums();
        all += self.old.sums();
        let compared = self.live.sums().bytes.saturating_add(self.old_bytes).saturating_mul(rounds(all.items));
        let once = Cost {
            keys: all.items as u64,
            bytes: all.bytes,
            // Who takes no step and compares nothing has nothing else for it.
            steps: cost.steps.min(self.history.events_after(self.compacted)),
            touched: cost.touched.min(compared),
        };
        let once = once.units();
        if cost.units() <= once.saturating_add(units_max) {
            return Ok(());
        }
        Err(Error::TooCostly(format!(
            "it would look at {} keys, take {} steps to past versions, compare or copy {} bytes and answer {}, more than \
             limits.request_cost_max ({units_max}) allows beyond one visit to each of the {} keys that there are: ask for less with \
             each operation, or in several requests",
            cost.keys,
            cost.steps,
            cost.touched,
            cost.bytes,
            self.key_count()
        )))
    }

    fn txn_cost_after(&self, r: &TxnRequest, written: &mut Written) -> Cost {
        let mut cost = self.compare_cost(&r.compare);
        let (mut by_success, mut by_failure) = (*written, *written);
        let success = self.branch_cost(&r.success, &mut by_success);
        cost += success.either(self.branch_cost(&r.failure, &mut by_failure));
        *written = by_success.either(by_failure);
        cost
    }

    fn branch_cost(&self, ops: &[RequestOp], written: &mut Written) -> Cost {
        let mut cost = Cost::default();
        for op in ops {
            cost += match &op.request {
                Some(Request::RequestRange(r)) => {
                    let mut cost = self.range_cost_after(r, written);
                    if !r.count_only {
                        cost += written.found_in(&r.range_end);
                    }
                    cost
                }
                Some(Request::RequestPut(r)) => {
                    // No transaction that passed the checks puts a key twice.
                    let cost = self.put_cost(r);
                    let bytes = (r.key.len() + r.value.len() + HEADS_BYTES_MAX) as u64 + cost.touched;
                    written.put += Cost { keys: 1, bytes, ..Cost::default() };
                    cost
                }
                Some(Request::RequestDeleteRange(r)) => {
                    let mut cost = self.delete_cost(r);
                    written.deleted = written.deleted.saturating_add(cost.keys);
                    let put = written.found_in(&r.range_end);
                    cost += if r.prev_kv { put } else { Cost { bytes: 0, ..put } };
                    cost
                }
                Some(Request::RequestTxn(r)) => self.txn_cost_after(r, written),
                None => Cost::default(),
            };
        }
        cost
    }

    fn delete_cost(&self, r: &DeleteRangeRequest) -> Cost {
        let gone = Interval::new(&r.key, &r.range_end).sums(&self.live);
        let bytes = if r.prev_kv { gone.bytes } else { 0 };
        Cost { keys: gone.items.max(1) as u64, bytes, touched: self.keys_copied(gone.bytes), ..Cost::default() }
    }

    /// Bytes of long keys that are copied into tombstones, when what is deleted has so many.
    fn keys_copied(&self, bytes: u64) -> u64 {
        bytes.min(self.live.long_key_bytes())
    }

    fn revoke_cost(&self, lease: i64) -> Cost {
        let mut gone = Sums::default();
        for kv in self.lease_keys(lease).take(LEASE_KEYS_MAX + 1) {
            gone += Sums { items: 1, bytes: kv.as_encoded().len() as u64 };
        }
        if gone.items > LEASE_KEYS_MAX {
            gone = Sums { items: self.attached_count(), bytes: u64::MAX };
        }
        Cost { keys: gone.items.max(1) as u64, touched: self.keys_copied(gone.bytes), ..Cost::default() }
    }

    fn put_cost(&self, r: &PutRequest) -> Cost {
        let bytes_of = |is_wanted: bool| if is_wanted { self.bytes_of(&r.key) } else { 0 };
        Cost { keys: 1, bytes: bytes_of(r.prev_kv), touched: bytes_of(r.ignore_value), ..Cost::default() }
    }

    /// All comparisons of a transaction visit each key of their intervals once together (`txn`), and those of values compare its value
    /// with some of their operands, and with those of its neighbours. What concerns the keys is put together anew wherever one of
    /// the intervals begins or ends.
    fn compare_cost(&self, compares: &[Compare]) -> Cost {
        let ranks = |c: &Compare| Interval::new(&c.key, &c.range_end).ranks(&self.live);
        let is_of_value = |c: &Compare| c.target == CompareTarget::Value as i32;
        let mut intervals: Vec<_> = compares.iter().map(|c| (ranks(c), is_of_value(c))).collect();
        intervals.sort_unstable_by_key(|(ranks, _)| ranks.start);
        let mut edges: Vec<usize> = intervals.iter().flat_map(|(ranks, _)| [ranks.start, ranks.end]).collect();
        edges.sort_unstable();
        edges.dedup();
        let before = |rank: usize| edges.partition_point(|edge| *edge < rank) as u64;
        let (mut all, mut of_values, mut compared) = (Union::default(), Union::default(), 0);
        for (ranks, is_of_value) in intervals {
            compared += ranks.len() as u64 + before(ranks.end) - before(ranks.start);
            if is_of_value {
                of_values.add(&ranks, |new| self.live.bytes_between(new));
            }
            all.add(&ranks, |new| new.len() as u64);
        }
        let operands = compares.iter().filter(|c| is_of_value(c)).count();
        Cost {
            keys: (all.sum + compared / COMPARES_A_KEY).max(compares.len() as u64),
            touched: of_values.sum.saturating_mul(rounds(operands)),
            ..Cost::default()
        }
    }

    /// What the newest version of a key takes.
    pub(super) fn bytes_of(&self, key: &[u8]) -> u64 {
        self.live.get(Place::of(key)).map_or(0, |kv| kv.as_encoded().len() as u64)
    }
}

/// What intervals have together that come in the order of their starts.
#[derive(Default)]
struct Union {
    sum: u64,
    end: usize,
}

impl Union {
    /// `sum`: of the ranks that none before had.
    fn add(&mut self, ranks: &Range<usize>, sum: impl FnOnce(Range<usize>) -> u64) {
        let new = ranks.start.max(self.end)..ranks.end.max(self.end);
        if !new.is_empty() {
            self.sum += sum(new.clone());
            self.end = new.end;
        }
    }
}
