//! What applying a command adds at most to what the quota counts.
//!
//! The quota counts what the state takes, and for each key that exists its *end*, the tombstone that it will leave. Whoever puts a key
//! pays for its end, so a deletion adds nothing: it is possible however much is stored, and all deletions together take what was kept for
//! them. The ends may pass the quota by a quarter: usual keys leave less, so the quota is what their data takes ([`State::counted`]).
//!
//! Most commands add what they carry. One that keeps a key's value (`ignore_value`) copies it, however large it is by then: so it is
//! counted with the greatest value that the key may have when the command is applied ([`UnderWay`]).
//! Invariant: applying a command adds no more than that to [`State::bytes_with_ends`] (`tests/growth`). Apply knows
//! nothing of this.
//! Absent: what is refused for it (`node/space`), and what a role may store (`auth/quota`).

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message as _;

use super::State;
use super::auth::ENTRY_BYTES;
use super::history::{EVENT_BYTES_MAX, VERSION_OVERHEAD_BYTES};
use super::leases::{ATTACHED_BYTES, LEASE_BYTES};
use super::role::sources_commands;
use super::versions::SLOT_BYTES;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{PutRequest, TxnRequest};
use crate::pb::key_value::{HEADS_BYTES_MAX, TOMBSTONE_HEADS_BYTES_MAX};
use crate::pb::log::auth_change::Change as Auth;
use crate::pb::log::{AuthChange, command};

/// The part of the quota that the ends of keys may take beyond it.
const ENDS_PART: u64 = 4;
/// What a put adds beside key and value: a version, its place and event, its lease's note of it.
const PUT_BYTES: usize = HEADS_BYTES_MAX + VERSION_OVERHEAD_BYTES + SLOT_BYTES + EVENT_BYTES_MAX + ATTACHED_BYTES;
/// What the end of a key adds beside the key, whose version gives up its place.
const TOMBSTONE_BYTES: usize = TOMBSTONE_HEADS_BYTES_MAX + VERSION_OVERHEAD_BYTES + EVENT_BYTES_MAX - SLOT_BYTES;
/// What a user or a role takes beside what a command says of it.
const AUTH_ENTRY_BYTES: u64 = ENTRY_BYTES + 64;

/// What data of this quota takes at most when all keys are deleted, until they are compacted. The memory limit knows it (`config/memory`).
pub fn most_with_ends(quota: u64) -> u64 {
    quota.saturating_add(quota / ENDS_PART)
}

/// What a command adds, as far as it says so itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    pub bytes: u64,
    /// Beside that it copies values of keys: [`State::copied`].
    pub copies: bool,
}

/// Looks at no data. Of a transaction, both branches of each count.
pub fn growth(request: &command::Request) -> Growth {
    let mut growth = Growth::default();
    match request {
        command::Request::LeaseGrant(_) => growth.bytes = LEASE_BYTES as u64,
        command::Request::Auth(r) => growth.bytes = auth_bytes(r),
        command::Request::Follow(r) => {
            for request in sources_commands(r).filter_map(|command| command.request.as_ref()) {
                let one = self::growth(request);
                growth.bytes = growth.bytes.saturating_add(one.bytes);
                growth.copies |= one.copies;
            }
        }
        puts => each_put(puts, &mut |put| {
            growth.bytes = growth.bytes.saturating_add(put_bytes(put));
            growth.copies |= put.ignore_value;
        }),
    }
    growth
}

/// The version and, in case the key is new, its end.
fn put_bytes(r: &PutRequest) -> u64 {
    (r.key.len() + r.value.len() + PUT_BYTES + r.key.len() + TOMBSTONE_BYTES) as u64
}

/// What it adds is bounded by itself, too (`auth/change`). To take something away is always possible.
fn auth_bytes(r: &AuthChange) -> u64 {
    let entries = match &r.change {
        Some(Auth::Declare(r)) => r.users.len() + r.roles.len(),
        Some(
            Auth::UserAdd(_)
            | Auth::UserGrantRole(_)
            | Auth::RoleAdd(_)
            | Auth::RoleGrantPermission(_)
            | Auth::RoleQuota(_)
            | Auth::UserChangePassword(_),
        ) => 1,
        _ => return 0,
    };
    r.encoded_len() as u64 + entries as u64 * AUTH_ENTRY_BYTES
}

/// The puts of a put or a transaction, in whichever branches.
fn each_put<'a>(request: &'a command::Request, visit: &mut dyn FnMut(&'a PutRequest)) {
    match request {
        command::Request::Put(r) => visit(r),
        command::Request::Txn(r) => each_put_of(r, visit),
        _ => {}
    }
}

fn each_put_of<'a>(r: &'a TxnRequest, visit: &mut dyn FnMut(&'a PutRequest)) {
    for op in r.success.iter().chain(&r.failure) {
        match &op.request {
            Some(Op::RequestPut(r)) => visit(r),
            Some(Op::RequestTxn(r)) => each_put_of(r, visit),
            _ => {}
        }
    }
}

/// What commands put that will be applied before the next one: the greatest version of each key.
#[derive(Default)]
pub struct UnderWay(BTreeMap<Bytes, u64>);

impl UnderWay {
    /// Another one goes before the next.
    pub fn note(&mut self, request: &command::Request) {
        each_put(request, &mut |put| {
            // What keeps its value is as large as what was before.
            if !put.ignore_value {
                let greatest = self.0.entry(put.key.clone()).or_default();
                *greatest = put_bytes(put).max(*greatest);
            }
        });
        if let command::Request::Follow(r) = request {
            sources_commands(r).filter_map(|command| command.request.as_ref()).for_each(|request| self.note(request));
        }
    }
}

impl State {
    /// What a command copies of the values of keys at most, when it is applied behind what is under way. Notes it as under way.
    pub fn copied(&self, request: &command::Request, under_way: &mut UnderWay) -> u64 {
        if let command::Request::Follow(r) = request {
            let requests = sources_commands(r).filter_map(|command| command.request.as_ref());
            return requests.fold(0, |sum, request| sum.saturating_add(self.copied(request, under_way)));
        }
        let mut copied: u64 = 0;
        each_put(request, &mut |put| {
            if put.ignore_value {
                let greatest = under_way.0.get(&put.key).copied().unwrap_or(0);
                copied = copied.saturating_add(greatest.max(self.bytes_of(&put.key)));
            }
        });
        under_way.note(request);
        copied
    }

    /// [`Self::bytes`], and what it would be more if all keys were deleted. Deletions leave it as it is.
    pub fn bytes_with_ends(&self) -> u64 {
        self.bytes() + self.live_key_bytes + (self.live.len() * TOMBSTONE_BYTES) as u64
    }

    /// What of the quota is taken: [`Self::bytes`], or more where keys are so large, beside their values, that their ends would pass
    /// [`most_with_ends`].
    pub fn counted(&self, quota: u64) -> u64 {
        self.bytes().max(self.bytes_with_ends().saturating_sub(quota / ENDS_PART))
    }

    /// A key exists that did not.
    pub(super) fn note_key(&mut self, key: &[u8]) {
        self.live_key_bytes += key.len() as u64;
    }
}
