//! What is proposed while space is short: decided by the leader, before proposing.
//!
//! | short is | refused is |
//! |---|---|
//! | the quota | what stores data, if it is over or this very request, with all that is in flight, might bring it over |
//! | the disks of a quorum | what stores data, and what frees nothing: the reserve is for what gives space back |
//! | the log, which takes hardly more than its spare segments | everything: the rest is for Raft's own entries |
//!
//! What a request brings is what applying it adds, which may be more than it carries (`kv/growth`). Deletions add nothing, since the
//! quota counts the end of each key with the key. So the data passes its quota by deletions alone, and by no more than a part that is known.
//!
//! So what uses up the disks' reserve is bounded by what it frees, and a member whose disk is full refuses instead of ending.
//! Invariant: apply knows nothing of this; it must do the same everywhere. Absent: who watches disk and log (`housekeeping`), and
//! what followers do when their log is full (`raft/rpc`).

use std::sync::atomic::Ordering;

use bytes::Bytes;
use prost::Message as _;

use super::Node;
use super::admit::Weight;
use crate::error::Error;
use crate::kv::{self, UnderWay};
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::{DeleteRangeRequest, RangeRequest, request_op};
use crate::pb::log::{Batch, Command, command};

/// Judges the commands of one round of batches.
pub(super) struct Judge<'a> {
    node: &'a Node,
    /// Data is over the quota, or an alarm that apply does not know of says that puts are refused.
    exceeded: bool,
    disks_short: bool,
    log_full: bool,
    /// What may still be added under the quota, commands in flight included; and with what deletions may take beyond it.
    left: u64,
    left_beyond: u64,
    /// What will be applied before the next command, once a command asks for that.
    under_way: Option<(kv::State, UnderWay)>,
}

impl<'a> Judge<'a> {
    /// As of now, beside commands in flight that add so much.
    pub(super) fn new(node: &'a Node, in_flight_adds: u64) -> Self {
        let space = node.space();
        let quota = space.quota_bytes.get().copied().unwrap_or(u64::MAX);
        let (counted, with_ends) = match quota {
            u64::MAX => (0, 0),
            _ => node.store().read(|state| (state.kv.counted(quota), state.kv.bytes_with_ends())),
        };
        Self {
            node,
            exceeded: space.exceeded.load(Ordering::Relaxed),
            disks_short: space.quorum_low_disk.load(Ordering::Relaxed),
            log_full: space.is_log_full() || space.quorum_log_full.load(Ordering::Relaxed),
            left: quota.saturating_sub(counted.saturating_add(in_flight_adds)),
            left_beyond: kv::most_with_ends(quota).saturating_sub(with_ends.saturating_add(in_flight_adds)),
            under_way: None,
        }
    }

    /// Adds to the weight of a command what it copies. `pending` are the batches that go before it and are not applied yet.
    pub(super) fn weigh_copies(&mut self, command: &Bytes, weight: &mut Weight, pending: impl FnOnce() -> Vec<Bytes>) {
        let node = self.node;
        let (state, under_way) = self.under_way.get_or_insert_with(|| {
            let mut under_way = UnderWay::default();
            for batch in pending() {
                let commands = Batch::decode(batch).map(|batch| batch.commands).unwrap_or_default();
                commands.iter().filter_map(|command| command.request.as_ref()).for_each(|x| under_way.note(x));
            }
            (node.store().view().kv, under_way)
        });
        let Ok(Command { request: Some(request), .. }) = Command::decode(command.clone()) else { return };
        let copied = state.copied(&request, under_way);
        weight.adds = weight.adds.saturating_add(copied);
        weight.units = weight.units.max(kv::copy_units(copied));
    }

    /// Refuses a command that there is no space for. What it adds is then no longer left for the next.
    pub(super) fn check(&mut self, command: &Bytes, weight: Weight) -> Result<(), Error> {
        let fits = weight.adds <= self.left;
        if !(fits && !self.exceeded && !self.disks_short && !self.log_full) {
            self.check_short(command, weight, fits)?;
        }
        self.left = self.left.saturating_sub(weight.adds);
        self.left_beyond = self.left_beyond.saturating_sub(weight.adds);
        if let Some((_, under_way)) = self.under_way.as_mut().filter(|_| !weight.copies)
            && let Ok(Command { request: Some(request), .. }) = Command::decode(command.clone())
        {
            under_way.note(&request);
        }
        Ok(())
    }

    fn check_short(&self, command: &Bytes, weight: Weight, fits: bool) -> Result<(), Error> {
        if self.log_full {
            return Err(Error::NoSpace);
        }
        let Ok(decoded) = Command::decode(command.clone()) else { return Ok(()) };
        let allowed = match stores(&decoded) {
            true => fits && !self.exceeded,
            // Users and roles may take what is kept for the ends of keys, too: who may do what is to be changed also when space is short.
            false if weight.adds > self.left_beyond => false,
            false => !self.disks_short || self.node.store().read(|state| frees(&state.kv, &decoded)),
        };
        if allowed { Ok(()) } else { Err(Error::NoSpace) }
    }
}

/// Notes that a client of this member was refused for want of space, so that the alarm is shown until there is room for what it asked.
pub(super) fn note_refused(node: &Node, command: &Bytes) {
    if let Ok(Command { request: Some(request), .. }) = Command::decode(command.clone())
        && kv::takes_space(&request)
    {
        let copied = node.store().read(|state| state.kv.copied(&request, &mut UnderWay::default()));
        let bytes = kv::growth(&request).bytes.saturating_add(copied);
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
