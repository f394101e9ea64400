//! A state, and entries of a log that are applied to it away from any Raft: what a backup holds, made a state again.
//!
//! The entries come from a file or a store, so what does not fit is an error and nothing panics.
//! Absent: where they come from (`backup`), and whether they were committed, which who archived them knew.

use std::panic::AssertUnwindSafe;

use super::convert::{entry_from_pb, entry_from_record, entry_to_pb};
use super::state_machine::{Applied, commands_of};
use crate::pb::log;
use crate::storage::log::Record;

/// A state that goes on by entries.
pub struct Replay {
    state: Applied,
}

impl Replay {
    pub fn new(state: Applied) -> Self {
        Self { state }
    }

    pub fn state(&self) -> &Applied {
        &self.state
    }

    pub fn into_state(self) -> Applied {
        self.state
    }

    /// The index of the entry that was applied last.
    pub fn index(&self) -> Option<u64> {
        self.state.log_id.as_ref().map(|log_id| log_id.index())
    }

    /// Frees what was compacted, which a member does beside applying.
    pub fn sweep(&mut self) {
        self.state.kv.sweep(usize::MAX);
    }

    /// Applies the next entry; one that is behind it already is passed over. With `revision_max` it ends before the command that would make a
    /// later revision; false if it has.
    pub fn apply(&mut self, entry: log::Entry, revision_max: Option<i64>) -> Result<bool, String> {
        let id = entry.log_id.unwrap_or_default();
        let (expected, term) = match &self.state.log_id {
            Some(log_id) => (log_id.index() + 1, **log_id.committed_leader_id()),
            None => (0, 0),
        };
        if id.index < expected {
            return Ok(true);
        }
        if id.index > expected || id.term < term {
            return Err(format!(
                "entry {} of term {}, where entry {expected} of term {term} or a later one belongs",
                id.index, id.term
            ));
        }
        let entry = entry_from_pb(entry)?;
        let commands = commands_of(&entry).map_err(|error| error.to_string())?;
        let applying = AssertUnwindSafe(|| self.state.replay(entry, &commands, revision_max));
        match std::panic::catch_unwind(applying) {
            Ok(applied) => applied.map_err(|error| error.to_string()),
            Err(_) => Err(format!("this program panics at entry {}", id.index)),
        }
    }
}

/// What is archived of a record of the log.
pub fn entry_of(record: Record) -> Result<log::Entry, String> {
    entry_from_record(record).map(entry_to_pb)
}
