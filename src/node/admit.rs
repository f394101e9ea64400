//! What may be proposed: the last look at a command before it is part of a log entry.
//!
//! A committed entry that a member cannot apply stops every member, for good. So the leader proposes only what apply can carry out: it
//! decodes the very bytes, in the envelope that apply will find them in, and checks what it found, with its own limits. A command of its
//! own clients was checked before it was encoded ([`own`]), and what this build encodes decodes to the same (`node/tests/way.rs`); bytes of another
//! member are believed in nothing ([`forwarded`]). A refusal is that proposal's answer and changes nothing.
//! What it comes to is counted, too, work and space: a committed entry is applied by all members, and again at each restart.
//! Absent: what else depends on the state but for the cluster version; that is a result of applying.

use arrayvec::ArrayVec;
use bytes::{Buf as _, Bytes};
use prost::Message as _;

use crate::env::planted;
use crate::error::Error;
use crate::kv::{self, Growth, Limits, validate};
use crate::pb::log::{Batch, Command, command::Request};
use crate::raft::Store;

/// Checks a command of this member's, and notes which apply version it needs.
pub(crate) fn own(command: &mut Command, limits: &Limits) -> Result<(), Error> {
    validate::command(command, limits)?;
    kv::State::check(command).map_err(|fault| Error::InvalidRequest(fault.to_string()))?;
    command.needs = command.request.as_ref().map_or(0, validate::needs).max(command.needs);
    Ok(())
}

/// What applying a command comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    /// The work, as [`Cost::units`](kv::Cost::units).
    pub units: u64,
    /// What it adds to what the quota counts, and whether it adds the values of keys that it copies, too: these are counted when it is
    /// proposed (`space`).
    pub adds: u64,
    pub copies: bool,
}

/// What a command comes to as this member's data is now; refused if that is too much work.
pub(crate) fn weigh(command: &Command, limits: &Limits, store: &Store) -> Result<Weight, Error> {
    let Some(request) = &command.request else { return Ok(Weight::default()) };
    let Growth { bytes, copies } = kv::growth(request);
    if let Some(units) = kv::plain_keys(request) {
        return Ok(Weight { units, adds: bytes, copies });
    }
    // A view, because the look-ups are as many as the operations.
    let state = store.view().kv;
    let cost = state.command_cost(request);
    // It was done elsewhere, and must be here.
    if !matches!(request, Request::Follow(_)) {
        state.check_cost(cost, limits.request_cost_max)?;
    }
    Ok(Weight { units: cost.units(), adds: bytes, copies })
}

/// Checks an encoded command that another member has forwarded. Returns what it comes to.
pub(crate) fn forwarded(
    command: &Bytes,
    limits: &Limits,
    store: &Store,
    cluster_version: u32,
) -> Result<Weight, Error> {
    if planted!("proposal-not-checked") {
        return Ok(Weight::default());
    }
    let head = batch_head(command.len());
    let batch = Batch::decode(head.as_slice().chain(command.clone()));
    let batch = batch.map_err(|error| Error::InvalidRequest(format!("a command that cannot be decoded: {error}")))?;
    let [command] = &batch.commands[..] else {
        return Err(Error::InvalidRequest("a command that is not one".into()));
    };
    kv::State::check(command).map_err(|fault| Error::InvalidRequest(fault.to_string()))?;
    needed(command.request.as_ref().map_or(0, validate::needs).max(command.needs), cluster_version)?;
    if is_leaders_own(command) {
        // Who forwards it led when it decided so.
        return Err(Error::LeaderChanged);
    }
    validate::command(command, limits)?;
    weigh(command, limits, store)
}

/// Checks the version that an encoded command of this member's needs.
pub(crate) fn version(command: &[u8], cluster_version: u32) -> Result<(), Error> {
    needed(needs(command), cluster_version)
}

fn needed(needs: u32, cluster_version: u32) -> Result<(), Error> {
    if needs <= cluster_version {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "this request needs cluster version {needs}, this cluster has {cluster_version}; it rises by itself when all members run a \
         build that knows it"
    )))
}

/// What [`Command::needs`] is in its encoding by this build, which has it first.
fn needs(command: &[u8]) -> u32 {
    match command {
        [0x08, rest @ ..] => {
            let mut rest = rest;
            prost::encoding::decode_varint(&mut rest).map_or(u32::MAX, |needs| u32::try_from(needs).unwrap_or(u32::MAX))
        }
        _ => 0,
    }
}

/// What only a leader may decide, by its clock or by what it sees of all members.
fn is_leaders_own(command: &Command) -> bool {
    match &command.request {
        Some(
            Request::SetClusterVersion(_)
            | Request::StartDigest(_)
            | Request::LeaseCheckpoint(_)
            | Request::Follow(_)
            | Request::Supersede(_),
        ) => true,
        Some(Request::LeaseRevoke(_)) => kv::only_in_term(command).is_some(),
        Some(
            Request::Put(_)
            | Request::DeleteRange(_)
            | Request::Txn(_)
            | Request::Compact(_)
            | Request::LeaseGrant(_)
            | Request::Alarm(_)
            | Request::Auth(_)
            | Request::Promote(_)
            | Request::WantedSize(_),
        )
        | None => false,
    }
}

/// What stands before a command of so many bytes in a [`Batch`]: field 1, length-delimited.
pub(super) fn batch_head(command_bytes: usize) -> ArrayVec<u8, 11> {
    let mut head = ArrayVec::new();
    head.push(0x0a);
    let mut left = command_bytes as u64;
    while left >= 0x80 {
        head.push(left as u8 | 0x80);
        left >>= 7;
    }
    head.push(left as u8);
    head
}
