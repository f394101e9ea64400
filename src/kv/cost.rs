//! What a request will visit and answer, counted before it is proposed or read.
//!
//! From the sums in the trees: O(log n) an operation, whatever lies in its interval. A request may do what visits every key once,
//! however many there are; what all its operations visit beyond that has a bound. So a small request cannot ask for the work of a
//! thousand, while nothing that etcd's clients ask for is refused because there is much data.
//! Invariant: asked only before a command is proposed and before a read; applying knows no bound.
//! Absent: how long that takes, which depends on the machine.

use std::ops::AddAssign;

use super::State;
use super::interval::Interval;
use super::range::{is_in_key_order, limit};
use super::role::sources_commands;
use super::tree::{Place, Sums};
use crate::error::Error;
use crate::pb::etcd::range_request::SortOrder;
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{Compare, DeleteRangeRequest, RangeRequest, RequestOp, TxnRequest};
use crate::pb::key_value::HEADS_BYTES_MAX;
use crate::pb::log::{Command, Follow, command};

/// A key that was found is compared so many times in the time of another look-up.
const COMPARES_A_KEY: u64 = 32;
/// Units that are read in about a millisecond.
const READ_AT_ONCE: u64 = 4096;
/// An answer of so many bytes counts as a key.
const BYTES_A_KEY: u64 = 512;
/// What a key without its value is taken for.
const KEY_ONLY_BYTES: u64 = 256;
/// A transaction that names so few keys is no matter, however large their values.
const PLAIN_KEYS_MAX: u64 = 64;
/// Keys of one lease that are counted. More make no difference to who asks, and each is visited for it.
const LEASE_KEYS_MAX: usize = 1 << 16;

/// What a request costs at most, as the data is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Versions that are looked at or written; at least 1 an operation.
    pub keys: u64,
    /// Of the answer's keys and values. Exact for a range of the present in key order without filters, an estimate else.
    pub bytes: u64,
}

impl Cost {
    /// Keys and bytes as one number.
    pub fn units(self) -> u64 {
        self.keys.saturating_add(self.bytes / BYTES_A_KEY)
    }

    /// Whether reading it takes longer than a request may hold up others on its thread: more than a millisecond or so.
    pub fn is_long_to_read(self) -> bool {
        self.units() > READ_AT_ONCE
    }

    /// Of whichever of the two is done.
    fn either(self, other: Self) -> Self {
        Self { keys: self.keys.max(other.keys), bytes: self.bytes.max(other.bytes) }
    }
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
    }
}

/// The keys that a command visits, if it names each of them: what it costs then needs no look at the data. `None` if it speaks of
/// intervals, of the keys of a lease, of users, or of so many keys that their values matter.
pub fn plain_keys(request: &command::Request) -> Option<u64> {
    match request {
        command::Request::Put(_)
        | command::Request::Compact(_)
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
        Some(Request::RequestRange(r)) => r.range_end.is_empty().then_some(1),
        Some(Request::RequestDeleteRange(r)) => r.range_end.is_empty().then_some(1),
        Some(Request::RequestPut(_)) | None => Some(1),
        // Those are rare.
        Some(Request::RequestTxn(_)) => None,
    });
    compares.chain(ops).sum()
}

impl State {
    /// Of a range.
    pub fn range_cost(&self, r: &RangeRequest) -> Cost {
        self.range_cost_without(r, 0)
    }

    /// Of a range in a transaction that has deleted so many keys by then: in the place of each, its limit takes one behind it.
    fn range_cost_without(&self, r: &RangeRequest, deleted: u64) -> Cost {
        let interval = Interval::new(&r.key, &r.range_end);
        if let Interval::Key(key) = interval {
            return Cost { keys: 1, bytes: if r.count_only { 0 } else { self.bytes_of(key) } };
        }
        let ranks = interval.ranks(&self.live);
        let taken = limit(r).map_or(ranks.len(), |limit| limit.saturating_add(deleted as usize)).min(ranks.len());
        let is_past = self.is_past(r);
        let (keys, bytes) = if is_past || !is_in_key_order(r) {
            let mut visited = Sums { items: ranks.len(), bytes: self.live.bytes_between(ranks) };
            if is_past {
                visited += interval.sums(&self.old);
            }
            // Which of them are answered is not known, unless it is all.
            let part = u128::from(visited.bytes) * taken as u128 / visited.items.max(1) as u128;
            (visited.items, u64::try_from(part).unwrap_or(u64::MAX))
        } else {
            let is_last = r.sort_order == SortOrder::Descend as i32;
            let answered = if is_last { ranks.end - taken..ranks.end } else { ranks.start..ranks.start + taken };
            (if r.count_only { 0 } else { taken }, self.live.bytes_between(answered))
        };
        let bytes = match (r.count_only, r.keys_only) {
            (true, _) => 0,
            (false, true) => bytes.min(taken as u64 * KEY_ONLY_BYTES),
            (false, false) => bytes,
        };
        Cost { keys: keys.max(1) as u64, bytes }
    }

    /// Whether reading a range takes longer than a request may hold up others on its thread. Of the present and in key order only
    /// references are taken, so that bytes do not matter.
    pub fn is_long_range(&self, r: &RangeRequest) -> bool {
        if self.is_past(r) || !is_in_key_order(r) {
            return self.range_cost(r).is_long_to_read();
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
            command::Request::LeaseRevoke(r) => {
                Cost { keys: self.lease_keys(r.id).take(LEASE_KEYS_MAX).count().max(1) as u64, bytes: 0 }
            }
            // Each user may have the role that changes.
            command::Request::Auth(_) => Cost { keys: 1 + self.auth().user_count() as u64, bytes: 0 },
            command::Request::Follow(r) => self.sources_cost(r),
            // All versions that were superseded are let go of.
            command::Request::Promote(_) => {
                Cost { keys: (self.live.sums().items + self.old.sums().items).max(1) as u64, bytes: 0 }
            }
            plain => Cost { keys: plain_keys(plain).unwrap_or(1), bytes: 0 },
        }
    }

    /// Of the entries of another cluster.
    fn sources_cost(&self, r: &Follow) -> Cost {
        let requests = sources_commands(r).filter_map(|command| command.request.as_ref());
        Cost { keys: 1 + requests.map(|request| self.keys_of_one(request)).sum::<u64>(), bytes: 0 }
    }

    /// What applying these commands visits, about: for who decides how to do it.
    pub fn keys_of(&self, commands: &[Command]) -> u64 {
        let requests = commands.iter().filter_map(|command| command.request.as_ref());
        requests.map(|request| self.keys_of_one(request)).sum()
    }

    fn keys_of_one(&self, request: &command::Request) -> u64 {
        plain_keys(request).unwrap_or_else(|| self.command_cost(request).keys)
    }

    /// Refuses what costs more than `units_max` beyond a visit to every key.
    pub fn check_cost(&self, cost: Cost, units_max: u64) -> Result<(), Error> {
        let mut all = self.live.sums();
        all += self.old.sums();
        let once = Cost { keys: all.items as u64, bytes: all.bytes }.units();
        if cost.units() <= once.saturating_add(units_max) {
            return Ok(());
        }
        Err(Error::TooCostly(format!(
            "it would look at {} keys and answer {} bytes, more than limits.request_cost_max ({units_max}) allows beyond \
             one visit to each of the {} keys that there are: ask for less with each operation, or in several requests",
            cost.keys,
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
                    let mut cost = self.range_cost_without(r, written.deleted);
                    if !r.count_only {
                        cost += written.found_in(&r.range_end);
                    }
                    cost
                }
                Some(Request::RequestPut(r)) => {
                    // No transaction that passed the checks puts a key twice.
                    let bytes = if r.prev_kv { self.bytes_of(&r.key) } else { 0 };
                    written.put += Cost { keys: 1, bytes: (r.key.len() + r.value.len() + HEADS_BYTES_MAX) as u64 };
                    Cost { keys: 1, bytes }
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
        Cost { keys: gone.items.max(1) as u64, bytes: if r.prev_kv { gone.bytes } else { 0 } }
    }

    /// All comparisons of a transaction visit each key of their intervals once together (`txn`).
    fn compare_cost(&self, compares: &[Compare]) -> Cost {
        let interval = |c: &Compare| Interval::new(&c.key, &c.range_end).ranks(&self.live);
        let mut intervals: Vec<_> = compares.iter().map(interval).collect();
        intervals.sort_unstable_by_key(|ranks| ranks.start);
        let (mut keys, mut compared, mut end) = (0, 0, 0);
        for ranks in intervals {
            compared += ranks.len() as u64;
            keys += ranks.end.saturating_sub(ranks.start.max(end)) as u64;
            end = end.max(ranks.end);
        }
        Cost { keys: (keys + compared / COMPARES_A_KEY).max(compares.len() as u64), bytes: 0 }
    }

    /// What the newest version of a key takes.
    fn bytes_of(&self, key: &[u8]) -> u64 {
        self.live.get(Place::of(key)).map_or(0, |kv| kv.as_encoded().len() as u64)
    }
}
