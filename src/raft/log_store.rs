//! openraft's log storage on `storage::log`.
//!
//! Appends are submitted, and their completion arrives through openraft's `IOFlushed`: several appends share one fsync.
//! `save_committed` does not fsync (it rides along), and purging only records the fact: files go away in the background.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use futures_util::{Stream, StreamExt as _, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, OptionalSync};

use super::convert::{entry_from_record, entry_to_record, log_id_from_pb, log_id_to_pb, vote_from_pb, vote_to_pb};
use super::{Entry, LogId, TypeConfig, Vote};
use crate::storage::log::{Log, Record};

/// Bytes of entries that applying reads at a time.
const APPLY_READ_BYTES_MAX: u64 = 4 << 20;

/// A handle to the log; readers are clones.
#[derive(Clone)]
pub struct LogStore {
    log: Log,
    append_bytes_max: u64,
}

impl LogStore {
    /// `append_bytes_max`: bytes of entries that one append to a follower carries at most (one entry at least), so that it
    /// is done within a heartbeat.
    pub fn new(log: Log, append_bytes_max: u64) -> Self {
        Self { log, append_bytes_max }
    }

    async fn entries(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        self.log.read(start..end, bytes_max).await?.into_iter().map(decode).collect()
    }
}

fn decode(record: Record) -> io::Result<Entry> {
    entry_from_record(record).map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&i) => i,
        Bound::Excluded(&i) => i + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&i) => i + 1,
        Bound::Excluded(&i) => i,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = bounds(&range);
        self.entries(start, end, u64::MAX).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.entries(start, end, self.append_bytes_max).await
    }

    /// Entries to apply, a bounded piece in memory at a time: after a restart the range may be the whole log.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let reader = self.clone();
        let pieces = stream::unfold(Some(start), move |next| {
            let reader = reader.clone();
            async move {
                let start = next.filter(|start| *start < end)?;
                match reader.entries(start, end, APPLY_READ_BYTES_MAX).await {
                    Ok(entries) if entries.is_empty() => None,
                    Ok(entries) => {
                        let next = entries.last().map_or(end, |last| last.log_id.index() + 1);
                        Some((stream::iter(entries.into_iter().map(Ok).collect::<Vec<_>>()), Some(next)))
                    }
                    Err(error) => Some((stream::iter(vec![Err(error)]), None)),
                }
            }
        });
        Box::pin(pieces.flatten())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log.state().vote.map(vote_from_pb))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore
where
    Self: OptionalSync,
{
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.log.state();
        Ok(LogState {
            last_purged_log_id: state.purged.map(log_id_from_pb),
            last_log_id: state.last.map(log_id_from_pb),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.log.save_vote(vote_to_pb(vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        if let Some(committed) = committed {
            self.log.save_committed(log_id_to_pb(&committed));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log.state().committed.map(log_id_from_pb))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records = entries.into_iter().map(entry_to_record).collect();
        self.log.append(records, move |result| callback.io_completed(result))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.log.truncate_after(last_log_id.as_ref().map(log_id_to_pb)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.log.purge(log_id_to_pb(&log_id)).await
    }
}
