//! Checks that need no state, done before a request is proposed or read.
//!
//! Owns what makes a request refused whatever the store holds: what etcd refuses, what a setting does not allow, and what no member
//! may meet in the log. Invariant: limits decide here, before a command is proposed, and nowhere in apply, so members may have different
//! ones. Absent: what depends on the state; that is a result of applying.

use super::auth::TOKEN_KEY_BYTES;
use super::lease::TTL_MAX_SECONDS;
use super::role::sources_commands;
use super::writes::Writes;
use super::{AUTH_SINCE, CLUSTER_VERSION_MIN, DEEP_TXNS_SINCE, ROLES_SINCE, apply_version};
use crate::error::Error;
use crate::identity::SLOT_MAX;
use crate::pb::etcd::compare::{CompareResult, CompareTarget};
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest};
use crate::pb::log::auth_change::Change;
use crate::pb::log::{AuthChange, Command, WantedSize, command};

/// Transactions within one another that builds before [`DEEP_TXNS_SINCE`] can decode in a batch, and in an answer to another member.
const TXN_DEPTH_OLD: usize = 40;
/// Checkpoints in one command; the leader's own have far fewer.
const CHECKPOINTS_MAX: usize = 1 << 16;
/// Furthest that revisions jump: beyond what any clients may remember, and far from the last one that there is.
const JUMP_MAX: i64 = 1 << 40;
/// Most roles of a user that is known to an issuer.
pub const MAPPED_ROLES_MAX: usize = 64;
/// Most bytes of a password's hash; bcrypt's has 60.
pub const PASSWORD_HASH_BYTES_MAX: usize = 256;

/// Bounds on one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of an encoded request.
    pub request_bytes_max: usize,
    /// Most comparisons, and most operations of a branch, of a transaction; a nested one has what is left of it.
    pub txn_ops_max: usize,
    /// Most comparisons and operations of a transaction and all that are nested in it, in all branches; each counts once for every
    /// transaction that it is in, as often as its length is counted to encode it.
    pub txn_ops_total_max: usize,
    /// Most transactions within one another; less than [`TXN_DEPTH_MAX`](crate::pb::TXN_DEPTH_MAX), which every decoder takes.
    pub txn_depth_max: usize,
    /// Most keys that a request may visit beyond one visit to each that there is (`cost`).
    pub request_cost_max: u64,
}

impl Default for Limits {
    /// As etcd's, 1.5 MiB and 128; and with them no more depth than 128 either.
    fn default() -> Self {
        Self {
            request_bytes_max: 1536 * 1024,
            txn_ops_max: 128,
            txn_ops_total_max: 16_384,
            txn_depth_max: 128,
            request_cost_max: 500_000,
        }
    }
}

/// Checks a command that is about to be proposed, or that a member has forwarded for that.
pub fn command(command: &Command, limits: &Limits) -> Result<(), Error> {
    use command::Request;
    let Some(request) = &command.request else {
        return Err(Error::InvalidRequest("a command without a request that this build knows".into()));
    };
    if command.asker.as_ref().is_some_and(|asker| asker.roles.len() > MAPPED_ROLES_MAX) {
        return Err(Error::InvalidRequest(format!("an asker with more than {MAPPED_ROLES_MAX} roles")));
    }
    match request {
        Request::Put(r) => put(r)?,
        Request::DeleteRange(r) => delete_range(r)?,
        Request::Txn(r) => txn(r, limits)?,
        Request::LeaseGrant(r) if r.ttl > TTL_MAX_SECONDS => return Err(Error::LeaseTtlTooLarge),
        Request::SetClusterVersion(r) if r.version > apply_version() => return Err(unknown_version(r.version)),
        Request::WantedSize(r) => wanted_size(r)?,
        Request::Auth(r) => auth(r)?,
        Request::Promote(r) if !(0..=JUMP_MAX).contains(&r.jump) => {
            return Err(Error::InvalidRequest(format!("a jump of {} revisions: expected 0 to {JUMP_MAX}", r.jump)));
        }
        Request::LeaseCheckpoint(r) if r.checkpoints.len() > CHECKPOINTS_MAX => return Err(Error::RequestTooLarge),
        Request::Compact(_)
        | Request::SetClusterVersion(_)
        | Request::Promote(_)
        | Request::LeaseGrant(_)
        | Request::LeaseRevoke(_)
        | Request::LeaseCheckpoint(_)
        | Request::Alarm(_)
        | Request::Follow(_)
        | Request::Supersede(_)
        | Request::StartDigest(_) => {}
    }
    let is_own = matches!(request, Request::LeaseCheckpoint(_) | Request::Follow(_));
    if !is_own && request.encoded_len() > limits.request_bytes_max {
        return Err(Error::RequestTooLarge);
    }
    Ok(())
}

/// The apply version that members must know to apply `request`, as far as its content decides it.
pub fn needs(request: &command::Request) -> u32 {
    match request {
        command::Request::Auth(_) => AUTH_SINCE,
        command::Request::Promote(_) | command::Request::Supersede(_) => ROLES_SINCE,
        command::Request::Follow(r) => sources_commands(r).map(sources_needs).max().unwrap_or(0).max(ROLES_SINCE),
        command::Request::Txn(r) if is_deeper(r, TXN_DEPTH_OLD) => DEEP_TXNS_SINCE,
        _ => CLUSTER_VERSION_MIN,
    }
}

/// What a command of the source's needs here.
fn sources_needs(command: &Command) -> u32 {
    let raised = match &command.request {
        Some(command::Request::SetClusterVersion(r)) => r.version,
        Some(request) => needs(request),
        None => 0,
    };
    command.needs.max(raised)
}

/// Whether more than `depth` transactions are within one another.
fn is_deeper(r: &TxnRequest, depth: usize) -> bool {
    let Some(left) = depth.checked_sub(1) else { return true };
    r.success.iter().chain(&r.failure).any(|op| match &op.request {
        Some(Request::RequestTxn(nested)) => is_deeper(nested, left),
        _ => false,
    })
}

/// Of a command that this build cannot apply: who proposed it is newer.
pub fn unknown_version(needs: u32) -> Error {
    let known = apply_version();
    Error::InvalidRequest(format!("apply version {needs} is needed for this, and the leader knows {known}"))
}

/// What no member proposes.
fn auth(r: &AuthChange) -> Result<(), Error> {
    let is_sound = match &r.change {
        Some(Change::Enable(r)) => r.token_key.len() == TOKEN_KEY_BYTES,
        Some(Change::UserAdd(r) | Change::UserChangePassword(r)) => r.hash.len() <= PASSWORD_HASH_BYTES_MAX,
        Some(Change::Declare(r)) => {
            let hashes = r.users.iter().all(|user| user.hash.len() <= PASSWORD_HASH_BYTES_MAX);
            hashes && r.token_key.len() == TOKEN_KEY_BYTES && r.mark != 0
        }
        Some(_) => true,
        None => false,
    };
    if is_sound { Ok(()) } else { Err(Error::InvalidRequest("a change of users or roles that none is".into())) }
}

fn wanted_size(r: &WantedSize) -> Result<(), Error> {
    let slots = u64::from(SLOT_MAX) + 1;
    match r.start.checked_add(r.replicas) {
        Some(end) if end <= slots => Ok(()),
        _ => Err(Error::InvalidRequest(format!(
            "{} members from slot {} on do not exist: the last slot is {SLOT_MAX}",
            r.replicas, r.start
        ))),
    }
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
    let mut total = limits.txn_ops_total_max;
    txn_shape(r, limits, limits.txn_ops_max, 1, &mut total)?;
    Writes::of(&r.success)?;
    Writes::of(&r.failure)?;
    Ok(())
}

fn key(key: &[u8]) -> Result<(), Error> {
    if key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

/// A transaction in `depth - 1` others, which may have `ops`; `total` is what is left of the whole nest's bound.
fn txn_shape(r: &TxnRequest, limits: &Limits, ops: usize, depth: usize, total: &mut usize) -> Result<(), Error> {
    let most = r.compare.len().max(r.success.len()).max(r.failure.len());
    let left = ops.checked_sub(most).ok_or(Error::TooManyOps)?;
    if depth > limits.txn_depth_max {
        return Err(Error::InvalidRequest(format!(
            "transactions nest deeper than {} (limits.txn_depth_max): send fewer levels",
            limits.txn_depth_max
        )));
    }
    let all = r.compare.len() + r.success.len() + r.failure.len();
    let Some(rest) = total.checked_sub(all * depth) else {
        return Err(Error::InvalidRequest(format!(
            "a transaction and those nested in it have more than {} operations and comparisons, each counted for every \
             transaction that it is in (limits.txn_ops_total_max): send several",
            limits.txn_ops_total_max
        )));
    };
    *total = rest;
    r.compare.iter().try_for_each(compare)?;
    r.success.iter().chain(&r.failure).try_for_each(|op| match &op.request {
        Some(Request::RequestRange(r)) => range(r),
        Some(Request::RequestPut(r)) => put(r),
        Some(Request::RequestDeleteRange(r)) => delete_range(r),
        Some(Request::RequestTxn(r)) => txn_shape(r, limits, left, depth + 1, total),
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
