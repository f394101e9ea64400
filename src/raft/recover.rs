//! What a member finds on its disk when it starts: the log, and the state that the log continues.
//!
//! Recovery order: the state store, else the snapshot file (whichever leads further), then the log's tail. If neither reaches
//! back to where the log was purged, the member is a lost disk, and Raft is not started on it: openraft would refuse to start,
//! or start empty and might win an election.
//!
//! The state may be ahead of the log: apply goes by what a quorum has on disk, and this disk may have lost its own tail. openraft
//! then purges the log up to the state, so a snapshot file is written first: the log is purged behind one and behind nothing else,
//! and a follower that lacks those entries can be given it.

use std::sync::Arc;

use super::Member;
use super::convert::log_id_to_pb;
use super::state_machine::{Applied, Store, load_snapshot, write_snapshot};
use crate::env::Env;
use crate::kv;
use crate::pb::log::LogId;
use crate::storage::log::Log;
use crate::storage::{snapshot, state};

#[cfg(test)]
mod tests;

/// A member's disk, read.
pub struct Recovered {
    pub store: Arc<Store>,
    pub disk: state::Store,
    /// Where the state store's chain ends; it is written afresh if the state came from the snapshot file.
    pub from: Option<LogId>,
}

/// Why a member's disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("state store: {0}")]
    State(#[from] state::Error),
    #[error("snapshot: {0}")]
    Snapshot(#[from] snapshot::Error),
    /// The disk has lost what the log says was there; this member can only go on under a new id.
    #[error("the log begins after index {purged}, but the newest state that is left ends at {applied:?}")]
    LostState { purged: u64, applied: Option<u64> },
}

/// Reads the state that `log` continues.
pub fn recover(
    env: &Env,
    this: Member,
    log: &Log,
    snapshots: &snapshot::Dir,
    state_dir: &std::path::Path,
    options: &state::Options,
    journal_bytes_max: usize,
) -> Result<Recovered, Error> {
    let opened = state::Store::open(env, state_dir, options)?;
    if let Some(reason) = &opened.damaged {
        tracing::error!(reason, "the state store was damaged and is set aside; it is rebuilt");
    }
    let mut disk = opened.store;
    let loaded = load_store(&mut disk)?;
    // Whatever became of a store that could not be used: the next checkpoint writes it afresh.
    let mut replaced = opened.damaged.is_some() || matches!(loaded, Loaded::Unusable);
    let mut state = if let Loaded::State(state) = loaded { Some(*state) } else { None };
    let mut from = state.as_ref().and_then(|s| s.log_id.as_ref()).map(log_id_to_pb);
    let applied = |state: &Option<Applied>| state.as_ref().and_then(|s| s.log_id).map(|l| l.index());
    if let Some(file) = snapshots.latest()
        && file.meta().applied.map(|l| l.index) > applied(&state)
    {
        match load_snapshot(&file, &options.progress) {
            Ok(loaded) => {
                tracing::info!(snapshot = %file.id, "state taken from the snapshot file");
                (state, from, replaced) = (Some(loaded), None, true);
            }
            Err(error) => {
                tracing::error!(snapshot = %file.id, %error, "the snapshot file is damaged; set aside");
                snapshots.set_aside(&file, &error.to_string())?;
            }
        }
    }
    if let Some(purged) = log.state().purged
        && applied(&state) < Some(purged.index)
    {
        return Err(Error::LostState { purged: purged.index, applied: applied(&state) });
    }
    let state = state.unwrap_or_default();
    // What was applied was committed, whether or not the log has noted it: it is never to be truncated.
    if let Some(applied) = state.log_id.filter(|applied| applied.index() < log.state().next_index()) {
        log.save_committed(log_id_to_pb(&applied));
    }
    save_snapshot(this, log, snapshots, &state)?;
    Ok(Recovered { store: Store::new(state, replaced, journal_bytes_max), disk, from })
}

/// Writes a snapshot file if the log is purged, or is about to be, beyond the newest one.
fn save_snapshot(this: Member, log: &Log, snapshots: &snapshot::Dir, state: &Applied) -> Result<(), snapshot::Error> {
    let (log, applied) = (log.state(), state.log_id.map(|id| id.index()));
    let ahead = applied.filter(|applied| *applied >= log.next_index());
    let purged = ahead.max(log.purged.map(|id| id.index));
    if purged > snapshots.latest().and_then(|file| file.meta().applied).map(|id| id.index) {
        let file = write_snapshot(snapshots, this, state)?;
        tracing::info!(snapshot = %file.id, last = log.last.map(|id| id.index), "snapshot written of a state ahead of the log");
    }
    Ok(())
}

/// What the state store held.
enum Loaded {
    Nothing,
    State(Box<Applied>),
    /// It must be written afresh.
    Unusable,
}

/// The state that the store holds; a damaged one is reported and set aside.
fn load_store(disk: &mut state::Store) -> Result<Loaded, state::Error> {
    let mut loader = kv::Loader::new();
    let loaded = disk.load(&mut |change| loader.load(change).map_err(|e| e.to_string()));
    match loaded {
        Ok(None) => Ok(Loaded::Nothing),
        Ok(Some(meta)) => match Applied::loaded(loader, &meta) {
            Ok(state) => Ok(Loaded::State(Box::new(state))),
            Err(error) => {
                tracing::error!(%error, "the state store does not add up; it is rebuilt");
                Ok(Loaded::Unusable)
            }
        },
        Err(state::Error::Damaged(reason)) => {
            tracing::error!(reason, "the state store was damaged and is set aside; it is rebuilt");
            Ok(Loaded::Unusable)
        }
        Err(error) => Err(error),
    }
}
