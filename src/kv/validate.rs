//! Checks that need no state, done before a request is proposed or read.
//!
//! Owns what makes a request refused whatever the store holds. Absent: what depends on the state; that is a result of
//! applying.

use std::collections::BTreeSet;

use prost::Message as _;

use super::lease::TTL_MAX_SECONDS;
use super::range::Interval;
use crate::error::Error;
use crate::pb::etcd::compare::{CompareResult, CompareTarget};
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};
use crate::pb::log::{Command, command};

/// Bounds on one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of an encoded request.
    pub request_bytes_max: usize,
    /// Most comparisons, and most operations of a branch, of a transaction; a nested one has what is left of it.
    pub txn_ops_max: usize,
}

impl Default for Limits {
    /// As etcd's: 1.5 MiB and 128.
    fn default() -> Self {
        Self { request_bytes_max: 1536 * 1024, txn_ops_max: 128 }
    }
}

/// Checks a command that is about to be proposed.
pub fn command(command: &Command, limits: &Limits) -> Result<(), Error> {
    match &command.request {
        Some(command::Request::Put(r)) => put(r)?,
        Some(command::Request::DeleteRange(r)) => delete_range(r)?,
        Some(command::Request::Txn(r)) => txn(r, limits)?,
        Some(command::Request::LeaseGrant(r)) if r.ttl > TTL_MAX_SECONDS => return Err(Error::LeaseTtlTooLarge),
        Some(
            command::Request::Compact(_)
            | command::Request::SetClusterVersion(_)
            | command::Request::WantedSize(_)
            | command::Request::LeaseGrant(_)
            | command::Request::LeaseRevoke(_)
            | command::Request::LeaseCheckpoint(_)
            | command::Request::Alarm(_)
            | command::Request::StartDigest(_),
        )
        | None => {}
    }
    if command.encoded_len() > limits.request_bytes_max {
        return Err(Error::RequestTooLarge);
    }
    Ok(())
}

/// Checks a range request.
pub fn range(r: &RangeRequest) -> Result<(), Error> {
    key(&r.key)?;
    if SortOrder::try_from(r.sort_order).is_err() || SortTarget::try_from(r.sort_target).is_err() {
        return Err(Error::InvalidSortOption);
    }
    Ok(())
}

/// Checks a put request, but for its size.
pub fn put(r: &PutRequest) -> Result<(), Error> {
    key(&r.key)?;
    if r.ignore_value && !r.value.is_empty() {
        return Err(Error::ValueProvided);
    }
    if r.ignore_lease && r.lease != 0 {
        return Err(Error::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete request.
pub fn delete_range(r: &DeleteRangeRequest) -> Result<(), Error> {
    key(&r.key)
}

/// Checks a transaction, read-only or not, but for its size.
pub fn txn(r: &TxnRequest, limits: &Limits) -> Result<(), Error> {
    txn_shape(r, limits.txn_ops_max)?;
    Writes::of(&r.success)?;
    Writes::of(&r.failure)?;
    Ok(())
}

fn key(key: &[u8]) -> Result<(), Error> {
    if key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

fn txn_shape(r: &TxnRequest, ops_max: usize) -> Result<(), Error> {
    let ops = r.compare.len().max(r.success.len()).max(r.failure.len());
    let left = ops_max.checked_sub(ops).ok_or(Error::TooManyOps)?;
    r.compare.iter().try_for_each(compare)?;
    r.success.iter().chain(&r.failure).try_for_each(|op| match &op.request {
        Some(Request::RequestRange(r)) => range(r),
        Some(Request::RequestPut(r)) => put(r),
        Some(Request::RequestDeleteRange(r)) => delete_range(r),
        Some(Request::RequestTxn(r)) => txn_shape(r, left),
        // etcd's answer to an operation that is none.
        None => Err(Error::KeyNotFound),
    })
}

fn compare(c: &Compare) -> Result<(), Error> {
    key(&c.key)?;
    if CompareResult::try_from(c.result).is_err() || CompareTarget::try_from(c.target).is_err() {
        return Err(Error::Unsupported(format!("a comparison of target {}, result {}", c.target, c.result)));
    }
    Ok(())
}

/// The keys that a list of operations may write, in whichever branches.
///
/// One transaction makes one revision, so no key may be put twice in it, nor put and deleted. Two deletes may meet: the
/// second finds nothing. The two branches of a nested transaction exclude each other and may meet too. etcd lets a nested
/// put and a later sibling's nested delete meet; here the order of siblings makes no difference.
#[derive(Default)]
struct Writes<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Vec<Interval<'a>>,
}

impl<'a> Writes<'a> {
    fn of(ops: &'a [RequestOp]) -> Result<Self, Error> {
        let mut all = Self::default();
        for op in ops {
            let mut one = Self::default();
            match &op.request {
                Some(Request::RequestPut(r)) => one.puts.extend([&r.key[..]]),
                Some(Request::RequestDeleteRange(r)) => one.deletes.push(Interval::new(&r.key, &r.range_end)),
                Some(Request::RequestTxn(r)) => {
                    one = Self::of(&r.success)?;
                    one.join(Self::of(&r.failure)?);
                }
                Some(Request::RequestRange(_)) | None => {}
            }
            if all.meets(&one) {
                return Err(Error::DuplicateKey);
            }
            all.join(one);
        }
        Ok(all)
    }

    fn meets(&self, other: &Self) -> bool {
        let (few, many) = if self.puts.len() < other.puts.len() { (self, other) } else { (other, self) };
        few.puts.iter().any(|key| many.puts.contains(key)) || self.deletes_put_of(other) || other.deletes_put_of(self)
    }

    fn deletes_put_of(&self, other: &Self) -> bool {
        let hits =
            |delete: &Interval<'_>| other.puts.range(delete.start()..).next().is_some_and(|key| delete.contains(key));
        !other.puts.is_empty() && self.deletes.iter().any(hits)
    }

    fn join(&mut self, mut other: Self) {
        // The larger set stays as it is, so that deep nesting costs no more than wide.
        if self.puts.len() < other.puts.len() {
            std::mem::swap(&mut self.puts, &mut other.puts);
        }
        self.puts.extend(other.puts);
        self.deletes.append(&mut other.deletes);
    }
}
