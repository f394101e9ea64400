//! What is proposed while space is short: decided by the leader, before proposing.
//!
//! | short is | refused is |
//! |---|---|
//! | the quota | what stores data, if it is over or this very request would bring it over |
//! | the disks of a quorum | what stores data, and what frees nothing: the reserve is for what gives space back |
//! | the log, which takes hardly more than its spare segments | everything: the rest is for Raft's own entries |
//!
//! So what uses up the reserve is bounded by what it frees, and a member whose disk is full refuses instead of ending.
//! Invariant: apply knows nothing of this; it must do the same everywhere. Absent: who watches disk and log (`housekeeping`), and
//! what followers do when their log is full (`raft/rpc`).

use std::sync::atomic::Ordering;

use bytes::Bytes;
use prost::Message as _;

use super::Node;
use crate::error::Error;
use crate::kv;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::{DeleteRangeRequest, RangeRequest, request_op};
use crate::pb::log::{Command, command};

/// Judges the commands of one round of batches.
pub(super) struct Judge<'a> {
    node: &'a Node,
    /// Data is over the quota, or an alarm that apply does not know of says that puts are refused.
    exceeded: bool,
    disks_short: bool,
    log_full: bool,
    /// Bytes that may still be stored, commands in flight included.
    left: u64,
}

impl<'a> Judge<'a> {
    /// As of now, beside commands of `in_flight` bytes that are not applied yet.
    pub(super) fn new(node: &'a Node, in_flight: u64) -> Self {
        let space = node.space();
        let quota = space.quota_bytes.get().copied().unwrap_or(u64::MAX);
        let stored = if quota == u64::MAX { 0 } else { node.store().read(|state| state.kv.bytes()) };
        Self {
            node,
            exceeded: space.exceeded.load(Ordering::Relaxed),
            disks_short: space.quorum_low_disk.load(Ordering::Relaxed),
            log_full: space.is_log_full() || space.quorum_log_full.load(Ordering::Relaxed),
            left: quota.saturating_sub(stored.saturating_add(in_flight)),
        }
    }

    /// Refuses a command that there is no space for. What it takes is then no longer left for the next.
    pub(super) fn check(&mut self, command: &Bytes) -> Result<(), Error> {
        let bytes = command.len() as u64;
        let fits = bytes <= self.left;
        if fits && !self.exceeded && !self.disks_short && !self.log_full {
            self.left -= bytes;
            return Ok(());
        }
        if self.log_full {
            return Err(Error::NoSpace);
        }
        let Ok(decoded) = Command::decode(command.clone()) else { return Ok(()) };
        let allowed = match stores(&decoded) {
            true => fits && !self.exceeded,
            false => !self.disks_short || self.node.store().read(|state| frees(&state.kv, &decoded)),
        };
        if !allowed {
            return Err(Error::NoSpace);
        }
        self.left = self.left.saturating_sub(bytes);
        Ok(())
    }
}

/// Notes that a client of this member was refused for want of space, so that the alarm is shown until there is room for what it asked.
pub(super) fn note_refused(node: &Node, command: &Bytes) {
    if Command::decode(command.clone()).is_ok_and(|command| stores(&command)) {
        let bytes = command.len() as u64;
        let smallest = |known: u64| Some(if known == 0 { bytes } else { known.min(bytes) });
        let _ = node.space().refused_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, smallest);
    }
}

fn stores(command: &Command) -> bool {
    command.request.as_ref().is_some_and(kv::takes_space)
}

/// Whether a command that stores nothing gives space back, or is one of the few that a cluster needs in any case. Judged by this
/// member's state, which may be a moment old: two that delete the same key may both be taken.
fn frees(state: &kv::State, command: &Command) -> bool {
    use command::Request;
    match &command.request {
        Some(Request::DeleteRange(delete)) => matches_any(state, delete),
        Some(Request::Txn(txn)) => kv::any_op(txn, &|op| match op {
            request_op::Request::RequestDeleteRange(delete) => matches_any(state, delete),
            _ => false,
        }),
        Some(Request::Compact(compact)) => compact.revision > state.compacted(),
        Some(Request::LeaseRevoke(revoke)) => state.leases().get(revoke.id).is_some(),
        // What an alarm is already, it need not become.
        Some(Request::Alarm(alarm)) => {
            (alarm.action() == AlarmAction::Activate) != state.has_alarm_of(alarm.member_id, alarm.alarm())
        }
        Some(Request::WantedSize(size)) => state.wanted_size().as_ref() != Some(size),
        // Each happens once.
        Some(Request::SetClusterVersion(_) | Request::StartDigest(_) | Request::Promote(_) | Request::Supersede(_)) => {
            true
        }
        Some(
            Request::LeaseCheckpoint(_)
            | Request::Put(_)
            | Request::LeaseGrant(_)
            | Request::Auth(_)
            | Request::Follow(_),
        )
        | None => false,
    }
}

fn matches_any(state: &kv::State, delete: &DeleteRangeRequest) -> bool {
    let (key, range_end) = (delete.key.clone(), delete.range_end.clone());
    let count = RangeRequest { key, range_end, count_only: true, ..RangeRequest::default() };
    state.range(&count).is_ok_and(|answer| answer.count > 0)
}
