//! Between openraft's types and `proto/log.proto`'s. Total where the bytes are ours, an error where they come from a peer.

use std::collections::{BTreeMap, BTreeSet};

use openraft::EntryPayload;
use prost::Message as _;

use super::{Batch, Entry, LogId, Membership, StoredMembership, Vote};
use crate::pb;
use crate::storage::log::Record;

/// Kinds of [`Record`]; stored, so never renumbered.
const BLANK: u8 = 0;
const BATCH: u8 = 1;
const MEMBERSHIP: u8 = 2;

pub fn log_id_to_pb(log_id: &LogId) -> pb::log::LogId {
    pb::log::LogId { term: **log_id.committed_leader_id(), index: log_id.index() }
}

pub fn log_id_from_pb(log_id: pb::log::LogId) -> LogId {
    LogId::new_term_index(log_id.term, log_id.index)
}

pub(super) fn vote_to_pb(vote: &Vote) -> pb::log::Vote {
    pb::log::Vote { term: vote.leader_id.term, member: vote.leader_id.voted_for, committed: vote.committed }
}

pub(super) fn vote_from_pb(vote: pb::log::Vote) -> Vote {
    if vote.committed { Vote::new_committed(vote.term, vote.member) } else { Vote::new(vote.term, vote.member) }
}

pub fn membership_to_pb(membership: &Membership) -> pb::log::Membership {
    pb::log::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| pb::log::membership::Config { voters: voters.iter().copied().collect() })
            .collect(),
        members: membership
            .nodes()
            .map(|(id, node)| pb::log::membership::Member { id: *id, node: Some(node.clone()) })
            .collect(),
    }
}

/// Fails on a configuration that names a voter without a node.
pub fn membership_from_pb(membership: &pb::log::Membership) -> Result<Membership, String> {
    let nodes: BTreeMap<u64, pb::log::Node> =
        membership.members.iter().map(|m| (m.id, m.node.clone().unwrap_or_default())).collect();
    let configs: Vec<BTreeSet<u64>> = membership.configs.iter().map(|c| c.voters.iter().copied().collect()).collect();
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|e| format!("membership: {e}"))
}

pub fn stored_membership_to_pb(stored: &StoredMembership) -> pb::log::StoredMembership {
    pb::log::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(stored.membership())),
    }
}

/// The membership of a state's meta; none at all is the empty one.
pub fn stored_membership_from_pb(stored: Option<&pb::log::StoredMembership>) -> Result<StoredMembership, String> {
    let Some(stored) = stored else {
        return Ok(StoredMembership::default());
    };
    let membership = membership_from_pb(&stored.membership.clone().unwrap_or_default())?;
    Ok(StoredMembership::new(stored.log_id.map(log_id_from_pb), membership))
}

pub(crate) fn entry_to_record(entry: Entry) -> Record {
    let (kind, payload) = match entry.payload {
        EntryPayload::Blank => (BLANK, bytes::Bytes::new()),
        EntryPayload::Normal(batch) => (BATCH, batch.0),
        EntryPayload::Membership(m) => (MEMBERSHIP, membership_to_pb(&m).encode_to_vec().into()),
    };
    Record { log_id: log_id_to_pb(&entry.log_id), kind, payload }
}

pub(crate) fn entry_from_record(record: Record) -> Result<Entry, String> {
    let log_id = log_id_from_pb(record.log_id);
    let payload = match record.kind {
        BLANK => EntryPayload::Blank,
        BATCH => EntryPayload::Normal(Batch(record.payload)),
        MEMBERSHIP => {
            let membership = pb::log::Membership::decode(record.payload).map_err(|e| e.to_string())?;
            EntryPayload::Membership(membership_from_pb(&membership)?)
        }
        other => return Err(format!("log record {log_id}: unknown kind {other}, written by a newer version")),
    };
    Ok(Entry { log_id, payload })
}

/// What a record of the log holds, for people to look at.
pub enum Look {
    /// The first entry of a leader.
    Blank,
    Batch(pb::log::Batch),
    Membership(pb::log::Membership),
    /// Why nobody can tell.
    Unknown(String),
}

/// Of a record's kind and payload.
pub fn look(kind: u8, payload: &[u8]) -> Look {
    let decoded = match kind {
        BLANK => return Look::Blank,
        BATCH => pb::log::Batch::decode(payload).map(Look::Batch),
        MEMBERSHIP => pb::log::Membership::decode(payload).map(Look::Membership),
        other => return Look::Unknown(format!("kind {other}, which a newer version has written")),
    };
    decoded.unwrap_or_else(|error| Look::Unknown(error.to_string()))
}

pub(crate) fn entry_to_pb(entry: Entry) -> pb::log::Entry {
    use pb::log::entry::Payload;
    let payload = match entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(batch) => Some(Payload::Batch(batch.0)),
        EntryPayload::Membership(m) => Some(Payload::Membership(membership_to_pb(&m))),
    };
    pb::log::Entry { log_id: Some(log_id_to_pb(&entry.log_id)), payload }
}

pub(crate) fn entry_from_pb(entry: pb::log::Entry) -> Result<Entry, String> {
    use pb::log::entry::Payload;
    let log_id = log_id_from_pb(entry.log_id.ok_or("log entry without a log id")?);
    let payload = match entry.payload {
        None => EntryPayload::Blank,
        Some(Payload::Batch(bytes)) => EntryPayload::Normal(Batch(bytes)),
        Some(Payload::Membership(m)) => EntryPayload::Membership(membership_from_pb(&m)?),
    };
    Ok(Entry { log_id, payload })
}
