//! The state on disk: what applying the log made, as an unbroken chain of records, so that a restart is short.
//!
//! Owns the chain: spans of log indexes, each with the changes that they made (`record` has the format), filed under the
//! index that they lead to. So the applied index *is* the key, and cannot part from the data. `clean` drops what
//! compaction made unreachable. Where the records lie is behind [`Records`]: `sled.rs` is the one file that names sled, and
//! `memory.rs` is its twin for tests, with faults.
//!
//! Invariants: a record's `from` is the previous record's `to`; the last record of the chain ends a span. Loading the chain
//! and sweeping it at the compacted revision gives the same state before and after any cleaning. After an I/O error nothing
//! more is written until the store is opened anew.
//! Absent: durability of writes (the log's), threads, timers, and any knowledge of what the changes mean beyond tombstones.

pub(crate) mod change;
mod clean;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod record;
mod sled;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;

pub use clean::{CleanStats, View};
#[cfg(any(test, feature = "testing"))]
pub use record::check_record;
pub use record::{Key, Position};

use self::record::{Filed, Packer, Record};
use super::Progress;
use crate::env::{Env, fail};
use crate::pb::log::{Change, LogId, StateMeta};

/// Why the state store failed. `Io` and `Damaged` are sticky: every later call that writes gives the same answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("state store: {0}")]
    Io(Arc<io::Error>),
    /// What was read is not what was written. After [`Store::load`] the store is set aside and an empty one stands in its
    /// place; anywhere else it must be opened anew.
    #[error("state store is damaged: {0}")]
    Damaged(String),
    /// The changes given to [`Store::rewrite`] could not be read; the store is as it was.
    #[error("state store: source of a rewrite: {0}")]
    Source(String),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

/// How the store uses memory and disk.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory that sled may use for pages, in bytes. Records are read once, at start, and again only by cleaning.
    pub cache_bytes: u64,
    /// Size that records are packed to, in bytes; at most 64 KiB. Larger costs memory (sled keeps 256 leaves of 8 to 16
    /// records), smaller costs CPU.
    pub record_bytes: usize,
    pub engine: Engine,
    /// How far [`Store::load`] is.
    pub progress: Progress,
}

/// Where records lie.
#[derive(Clone, Debug, Default)]
pub enum Engine {
    #[default]
    Sled,
    /// In a simulation.
    #[cfg(any(test, feature = "testing"))]
    Memory(memory::Memories),
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bytes: 16 << 20, record_bytes: 8 << 10, engine: Engine::Sled, progress: Progress::default() }
    }
}

/// Bytes of records that are put at once: more cost memory, fewer cost sled more (`sled::OpenStore::append`).
const GROUP_BYTES: usize = 2 << 20;

/// Takes a record; `false` ends the scan.
pub type Each<'a> = &'a mut dyn FnMut(Key, &[u8]) -> Result<bool, Error>;

/// What a record store must give: ordered records with atomic small writes. Another engine takes sled's place by
/// implementing this.
pub trait Records: Send {
    /// Calls `each` with every record from `from` on, in key order, while it answers `true`.
    fn scan(&self, from: Key, each: Each<'_>) -> Result<(), Error>;
    /// The last record before `end`.
    fn before(&self, end: Key) -> Result<Option<(Key, Vec<u8>)>, Error>;
    /// Puts new records behind all others, in their order. After a crash the first ones may be there, and any of those after them with
    /// no bytes.
    fn append(&mut self, records: Vec<(Key, Vec<u8>)>) -> Result<(), Error>;
    /// Puts one record and removes others: after a crash all of it is there, or nothing.
    fn write(&mut self, put: Option<(Key, Vec<u8>)>, remove: &[Key]) -> Result<(), Error>;
    /// Makes everything written so far durable.
    fn checkpoint(&mut self) -> Result<(), Error>;
    /// Durably replaces all records by `records`: after a crash, or an error from `records`, either all are new or none.
    fn replace(&mut self, records: &mut dyn Iterator<Item = Result<(Key, Vec<u8>), Error>>) -> Result<(), Error>;
    /// Keeps the damaged records for people to look at, and goes on with none.
    fn set_aside(&mut self) -> Result<(), Error>;
    /// Lets go of the files, so that they can be opened anew. No other call may follow.
    fn close(&mut self);
    /// Bytes of disk in use; 0 if that cannot be said.
    fn disk_bytes(&self) -> u64;
}

/// A store that was opened.
pub struct Opened {
    pub store: Store,
    /// Why the store that was there was set aside, if it was: the state must be rebuilt from the snapshot file and the log.
    pub damaged: Option<String>,
}

/// The chain of records.
pub struct Store {
    records: Box<dyn Records>,
    record_bytes: usize,
    /// Where the chain ends; `None` before [`Store::load`].
    end: Option<End>,
    /// The end of the chain at the last checkpoint.
    durable: Option<LogId>,
    bytes: u64,
    pass: clean::Pass,
    failed: Option<Error>,
    progress: Progress,
}

#[derive(Clone)]
struct End {
    at: Position,
    meta: Option<StateMeta>,
}

impl End {
    const EMPTY: Self = Self { at: Position::START, meta: None };

    fn applied(&self) -> Option<LogId> {
        self.meta.as_ref().and_then(|meta| meta.applied)
    }
}

impl Store {
    /// Opens the store in `dir`, or makes an empty one. A damaged one is set aside and reported.
    pub fn open(env: &Env, dir: &Path, options: &Options) -> Result<Opened, Error> {
        match &options.engine {
            Engine::Sled => {
                let (records, damaged) = sled::open(env, dir, options)?;
                Ok(Opened { store: Self::on(Box::new(records), options), damaged })
            }
            #[cfg(any(test, feature = "testing"))]
            Engine::Memory(memories) => Ok(Opened { store: memories.at(dir).open(options), damaged: None }),
        }
    }

    /// A store on these records.
    pub fn on(records: Box<dyn Records>, options: &Options) -> Self {
        Self {
            records,
            record_bytes: options.record_bytes,
            end: None,
            durable: None,
            bytes: 0,
            pass: clean::Pass::default(),
            failed: None,
            progress: options.progress.clone(),
        }
    }

    /// Hands every change to `each`, in order, and returns what the chain leads to; `None` if the store is empty. Must be
    /// called before anything else. Replaying the changes gives the state after a sweep at the last compacted revision:
    /// superseded versions at or below it may be missing, or may be there.
    ///
    /// On [`Error::Damaged`], also when `each` refuses a change, the store has been set aside and is now empty; whatever
    /// `each` built must be thrown away.
    pub fn load(&mut self, each: &mut dyn FnMut(Change) -> Result<(), String>) -> Result<Option<StateMeta>, Error> {
        self.check()?;
        self.reset(End::EMPTY);
        self.progress.begin("loads its state", self.records.disk_bytes());
        let loaded = self.find_end().and_then(|end| self.walk(end, each));
        match loaded {
            Ok((end, bytes)) => {
                let meta = end.meta.clone();
                self.reset(end);
                self.bytes = bytes;
                Ok(meta)
            }
            Err(Error::Damaged(reason)) => {
                let done = self.records.set_aside();
                self.sticky(done)?;
                Err(Error::Damaged(reason))
            }
            other => self.sticky(other.map(|_| None)),
        }
    }

    /// The last record that ends a span. Records after it belong to a span that was not written to its end; they go.
    fn find_end(&mut self) -> Result<End, Error> {
        let mut unfinished = Vec::new();
        let mut end = End::EMPTY;
        let mut before = Key::MAX;
        while let Some((key, bytes)) = self.records.before(before)? {
            if !bytes.is_empty() {
                let record = Record::decode(key, &bytes).map_err(Error::Damaged)?;
                if record.meta.is_some() {
                    end = End { at: record.to, meta: record.meta };
                    break;
                }
            }
            unfinished.push(key);
            before = key;
        }
        if !unfinished.is_empty() {
            tracing::info!(records = unfinished.len(), "state store: an unfinished span was dropped");
            self.records.write(None, &unfinished)?;
        }
        Ok(end)
    }

    /// Follows the chain from the start to `end`; also counts its bytes.
    fn walk(&self, end: End, each: &mut dyn FnMut(Change) -> Result<(), String>) -> Result<(End, u64), Error> {
        let (mut at, mut bytes, mut carry) = (Position::START, 0, Vec::new());
        self.records.scan(Key::MIN, &mut |key, stored| {
            let record = Record::decode(key, stored).map_err(Error::Damaged)?;
            if record.from != at {
                return Err(Error::Damaged(format!(
                    "chain broken: {:?} leads from {:?}, not {at:?}",
                    key, record.from
                )));
            }
            at = record.to;
            bytes += stored.len() as u64;
            self.progress.add(stored.len() as u64);
            fail::slow_load();
            each_change(&record, &mut carry, each).map_err(Error::Damaged)?;
            Ok(true)
        })?;
        if at != end.at || !carry.is_empty() {
            return Err(Error::Damaged(format!("chain broken: it ends at {at:?}, not {:?}", end.at)));
        }
        Ok((end, bytes))
    }

    /// Adds the span `(from, meta.applied]` and what it changed; `from` is the end of the chain. Not durable until
    /// [`Store::checkpoint`].
    pub fn append(&mut self, from: Option<LogId>, meta: &StateMeta, changes: &[Change]) -> Result<(), Error> {
        self.check()?;
        let end = self.end.as_ref().expect("a store is loaded before it is appended to");
        assert_eq!(from, end.applied(), "a span begins where the chain ends");
        let applied = meta.applied.expect("a span has an end");
        assert!(from.is_none_or(|from| from.index < applied.index), "a span is not empty");

        let mut out = Vec::new();
        let mut packer = Packer::new(end.at, applied.term, applied.index, self.record_bytes);
        for change in changes {
            packer.push(change, &mut out);
            if out.len() * self.record_bytes >= GROUP_BYTES {
                self.put_all(&mut out)?;
            }
        }
        packer.finish(meta, &mut out);
        let at = out.last().expect("a span has at least one record").0;
        self.put_all(&mut out)?;
        self.end = Some(End { at, meta: Some(meta.clone()) });
        Ok(())
    }

    /// A span that is written in part is found by [`Self::find_end`].
    fn put_all(&mut self, records: &mut Vec<Filed>) -> Result<(), Error> {
        let records: Vec<_> = records.drain(..).map(|(to, record)| (to.key(), record)).collect();
        self.bytes += records.iter().map(|(_, record)| record.len() as u64).sum::<u64>();
        let done = self.records.append(records);
        self.sticky(done)
    }

    /// Makes everything appended and cleaned so far durable.
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        self.check()?;
        let done = self.records.checkpoint();
        self.sticky(done)?;
        self.durable = self.applied();
        Ok(())
    }

    /// Writes everything afresh, as `changes` that lead to `meta`, and durably swaps that in: after a snapshot was
    /// installed, or to give disk space back.
    pub fn rewrite(
        &mut self,
        meta: &StateMeta,
        changes: &mut dyn Iterator<Item = Result<Change, String>>,
    ) -> Result<(), Error> {
        self.check()?;
        let applied = meta.applied.expect("a state has an applied index");
        let mut packer = Some(Packer::new(Position::START, applied.term, applied.index, self.record_bytes));
        let (mut end, mut bytes) = (Position::START, 0);
        let mut queue = Vec::<Filed>::new().into_iter();
        let done = self.records.replace(&mut std::iter::from_fn(|| {
            loop {
                if let Some((to, record)) = queue.next() {
                    (end, bytes) = (to, bytes + record.len() as u64);
                    return Some(Ok((to.key(), record)));
                }
                let mut out = Vec::new();
                match changes.next() {
                    Some(Ok(change)) => packer.as_mut()?.push(&change, &mut out),
                    Some(Err(e)) => return Some(Err(Error::Source(e))),
                    None => packer.take()?.finish(meta, &mut out),
                }
                queue = out.into_iter();
            }
        }));
        self.sticky(done)?;
        self.reset(End { at: end, meta: Some(meta.clone()) });
        self.bytes = bytes;
        Ok(())
    }

    /// Lets go of the files, so that the store can be opened anew: two at a time cannot.
    pub fn close(&mut self) {
        self.records.close();
        self.failed.get_or_insert_with(|| io::Error::other("it is closed").into());
    }

    /// The log id that the chain leads to.
    pub fn applied(&self) -> Option<LogId> {
        self.end.as_ref().and_then(End::applied)
    }

    /// The log id that the chain led to at the last checkpoint.
    pub fn durable(&self) -> Option<LogId> {
        self.durable
    }

    /// Bytes of all records, dead changes included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of disk that the records take; [`Self::rewrite`] brings it near [`Self::bytes`]. 0 if that cannot be said.
    pub fn disk_bytes(&self) -> u64 {
        self.records.disk_bytes()
    }

    /// The error that stopped this store, if one did.
    pub fn failure(&self) -> Option<&Error> {
        self.failed.as_ref()
    }

    /// What is in the store now is taken as durable: it was loaded from disk, or swapped in.
    fn reset(&mut self, end: End) {
        self.durable = end.applied();
        self.end = Some(end);
        self.bytes = 0;
        self.pass = clean::Pass::default();
    }

    fn check(&self) -> Result<(), Error> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Remembers an error that ends this store's work.
    fn sticky<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error @ (Error::Io(_) | Error::Damaged(_))) = &result {
            self.failed = Some(error.clone());
        }
        result
    }
}

/// Takes the changes out of a record; `carry` holds the pieces of one that goes on.
fn each_change(
    record: &Record<'_>,
    carry: &mut Vec<u8>,
    each: &mut dyn FnMut(Change) -> Result<(), String>,
) -> Result<(), String> {
    if record.cut {
        carry.extend_from_slice(record.changes);
        return Ok(());
    }
    if !carry.is_empty() {
        carry.extend_from_slice(record.changes);
        return each(change::decode(&std::mem::take(carry))?);
    }
    let mut at = record.changes;
    while !at.is_empty() {
        each(change::decode_next(&mut at)?)?;
    }
    Ok(())
}
