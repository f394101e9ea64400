//! The records of a generation, made longer: what was committed since the last one is read from this member's log.
//!
//! Invariant: a record begins with the entry after the last one of the record before, or after a *gap*, which is where this member's log
//! had been purged before it was archived; then a full backup must follow before anything can be restored again, and who archives is told.
//! What is in memory is one record, 2 MiB and an entry at most.

use std::collections::VecDeque;

use super::archive::{Archive, Stored, end_of, record_name};
use super::{Error, Result};
use crate::kv::DIGEST_VERSION;
use crate::metrics::metrics;
use crate::pb::backup::{Generation, Mark, Record};
use crate::pb::log::{self, LogId};
use crate::raft::{Store, entry_of};
use crate::storage::log::Log;

/// Entries of one record.
const RECORD_BYTES: u64 = 2 << 20;

/// A state that was reached: records end there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub applied: LogId,
    pub revision: i64,
    pub digest: Option<log::Digest>,
}

/// The end of a generation's records, as this member knows it.
pub(super) struct Chain {
    archive: Archive,
    generation: Generation,
    number: u64,
    before: Vec<u8>,
    /// The last entry that is archived; `None` before the first record.
    end: Option<LogId>,
    /// Everything after this entry is there, up to `end`.
    unbroken_since: u64,
    mark_millis: u64,
}

impl Chain {
    /// Reads where it ends.
    pub(super) async fn open(archive: &Archive, generation: &Generation) -> Result<Self> {
        let mut chain = Self {
            archive: archive.clone(),
            generation: *generation,
            number: 0,
            before: Vec::new(),
            end: None,
            unbroken_since: 0,
            mark_millis: 0,
        };
        if let Some(tip) = archive.tip(generation.number).await? {
            chain.take(&tip);
        }
        Ok(chain)
    }

    fn take(&mut self, stored: &Stored) {
        let record = &stored.record;
        self.number = record.number;
        self.before = stored.sha256.to_vec();
        self.end = end_of(record);
        self.unbroken_since = record.unbroken_since;
        self.mark_millis = record.marks.last().map_or(self.mark_millis, |mark| mark.at_millis);
    }

    pub(super) fn archive(&self) -> &Archive {
        &self.archive
    }

    /// The newest record; 0 for none.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn end_index(&self) -> u64 {
        self.end.map_or(0, |end| end.index)
    }

    pub(super) fn unbroken_since(&self) -> u64 {
        self.unbroken_since
    }

    /// Archives everything up to `cut`. The marks of what is archived are taken off `marks`, but for the newest.
    pub(super) async fn extend(
        &mut self,
        log: &Log,
        store: &Store,
        cut: Cut,
        marks: &mut VecDeque<Mark>,
    ) -> Result<()> {
        while self.end.is_none_or(|end| end.index < cut.applied.index) {
            let Some(end) = self.end.filter(|end| log.state().first_index() <= end.index + 1) else {
                if let Some(end) = self.end {
                    tracing::warn!(
                        archived = end.index,
                        log_begins = log.state().first_index(),
                        "backups have a gap: this member's log was purged before it was archived; a full backup closes it"
                    );
                }
                self.end = Some(cut.applied);
                self.unbroken_since = cut.applied.index;
                return Ok(());
            };
            self.add(end, log, store, cut, marks).await?;
        }
        Ok(())
    }

    /// Adds one record, or takes over the one that another member has added.
    async fn add(&mut self, end: LogId, log: &Log, store: &Store, cut: Cut, marks: &mut VecDeque<Mark>) -> Result<()> {
        let records = log
            .read(end.index + 1..cut.applied.index + 1, RECORD_BYTES)
            .await
            .map_err(Error::disk("reading the log"))?;
        let entries =
            records.into_iter().map(entry_of).collect::<std::result::Result<Vec<_>, _>>().map_err(Error::Refused)?;
        let last = entries.last().and_then(|entry| entry.log_id);
        let first = entries.first().and_then(|entry| entry.log_id).map_or(0, |id| id.index);
        let Some(last) = last.filter(|_| first == end.index + 1) else {
            // Purged in this very moment: looked at anew.
            return Ok(());
        };
        let is_whole = last.index == cut.applied.index;
        let known = store.digest_at(last.index).map(|value| log::Digest { version: DIGEST_VERSION, value });
        let mut record = Record {
            number: self.number + 1,
            cluster_id: self.generation.cluster_id,
            before: self.before.clone().into(),
            from: Some(end),
            entries,
            revision: if is_whole { cut.revision } else { 0 },
            digest: if is_whole { cut.digest } else { known },
            marks: Vec::new(),
            unbroken_since: self.unbroken_since,
        };
        let is_news = |mark: &&Mark| mark.index > end.index || mark.at_millis > self.mark_millis;
        let news: Vec<Mark> = marks.iter().filter(|mark| mark.index <= last.index).filter(is_news).copied().collect();
        for mark in news {
            // Clocks of leaders differ; their order does not.
            let at_millis = mark.at_millis.max(self.mark_millis);
            record.marks.push(Mark { at_millis, ..mark });
            self.mark_millis = at_millis;
        }
        match self.archive.add_record(self.generation.number, &record).await? {
            Some(sha256) => {
                metrics().backup.records.inc();
                let bytes: usize = record.entries.iter().map(prost::Message::encoded_len).sum();
                metrics().backup.sent_bytes.inc_by(bytes as u64);
                while marks.len() > 1 && marks.front().is_some_and(|mark| mark.index <= last.index) {
                    marks.pop_front();
                }
                self.take(&Stored { record, sha256 });
            }
            None => self.follow().await?,
        }
        Ok(())
    }

    /// Another member was faster: its records are as good as this one's.
    async fn follow(&mut self) -> Result<()> {
        let name = record_name(self.generation.number, self.number + 1);
        let missing = || self.archive.store().damaged(&name, "another member has made it, and it is missing");
        let stored = self.archive.record(self.generation.number, self.number + 1).await?.ok_or_else(missing)?;
        if stored.record.cluster_id != self.generation.cluster_id {
            return Err(self.archive.store().damaged(&name, "it is of another cluster"));
        }
        self.take(&stored);
        Ok(())
    }
}
