//! The Raft log: what makes a write durable.
//!
//! Owns one directory of segment files that nothing else touches:
//! ```text
//! log/0000000001.log    header (owner, format, carried state), then frames; preallocated
//! log/0000000002.log    ... the active segment, where frames are appended
//! log/0000000003.log    preallocated and empty, so that rotation waits for nothing and space is taken first
//! log/0000000004.log    the same
//! log/mark              the newest durable frame, so that a log that lost its tail is not taken for a shorter one (`mark`)
//! ```
//! A *frame* is what one flush wrote: records, and an end record. Frames are numbered without a hole, and frame n+1 is written
//! only after n's fdatasync returned. So at most the newest frame can be torn, and recovery drops it whole; damage anywhere
//! else is refused (`recovery`).
//!
//! Invariants:
//! - Indexes are contiguous from the one after `purged` (0 if nothing was purged) to `last`.
//! - What [`Log::append`] took is visible at once and durable when its callback says so; callbacks come in order.
//! - An I/O error is final: it is never retried, and everything later fails with it.
//! - Written bytes are never overwritten, except the torn frame by recovery; so reads need no lock.
//! - The committed log id of a frame lies at or below what was durable before that frame.
//! - What was committed is never truncated: who asks for it has lost what this log holds.
//!
//! Absent: what entries mean (`raft`), when to purge (`node`), snapshots.

#[cfg(any(test, feature = "testing"))]
pub mod damage;
mod flusher;
mod inspect;
mod mark;
mod record;
mod recovery;
mod segment;
mod supply;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

pub use flusher::FsyncStats;
pub use inspect::{Inspected, Segment, inspect};

use crate::env::{Disk, Env, File, OpenMode, Pool, planted};
use crate::pb::log::{LogId, Vote};
use flusher::{Flusher, FsyncTimes};
use mark::{Keeper, Mark};
use recovery::Recovered;
use segment::{Header, Run};
use supply::Supply;

/// Bytes of a segment before its first record; for the fuzzer.
#[cfg(any(test, feature = "testing"))]
pub const SEGMENT_HEADER_BYTES: usize = segment::HEADER_BYTES;

/// `bytes` as records of the first segment, with their checksums put right; for the fuzzer.
#[cfg(any(test, feature = "testing"))]
pub fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    record::with_checksums(bytes, 1, SEGMENT_HEADER_BYTES)
}

/// Why a log cannot be created or opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} already holds a log")]
    Exists(PathBuf),
    #[error("{0} holds no log")]
    Missing(PathBuf),
    #[error("{file} is the log of {found}, not of {expected}")]
    Foreign { file: PathBuf, found: Owner, expected: Owner },
    #[error("{file} has log format {found}, which this version does not know")]
    Version { file: PathBuf, found: u32 },
    /// Durable records are damaged or missing; cutting them could lose what a quorum relies on.
    #[error("{file} is damaged at offset {offset}: {reason}; replace this member or restore its disk")]
    Corrupt { file: PathBuf, offset: u64, reason: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Whose log it is. One with another owner is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub cluster_id: u64,
    pub member_id: u64,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "member {:x} of cluster {:x}", self.member_id, self.cluster_id)
    }
}

/// Whose log is in `dir`, as far as its first segment tells.
pub fn owner(disk: &dyn Disk, dir: &Path) -> Option<Owner> {
    let number = *segment::list(disk, dir).ok()?.first()?;
    let path = segment::path(dir, number);
    let mut bytes = vec![0; segment::HEADER_BYTES];
    disk.open(&path, OpenMode::Read).ok()?.read_exact_at(&mut bytes, 0).ok()?;
    Some(segment::Header::decode(&bytes, number, &path).ok()??.owner)
}

/// An entry of the log; what `kind` and `payload` say is the caller's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub log_id: LogId,
    pub kind: u8,
    /// Shared, not copied; the newest ones stay in the cache, so it should not hold on to a far larger buffer.
    pub payload: Bytes,
}

impl Record {
    fn disk_bytes(&self) -> u64 {
        (record::HEAD_BYTES + self.payload.len()) as u64
    }

    fn cache_bytes(&self) -> usize {
        size_of::<Cached>() + self.payload.len()
    }
}

/// Says what a log can still take; it keeps no log alive.
#[derive(Clone)]
pub struct Room(Arc<Supply>);

impl Room {
    /// Segments that stand ready and are all that is left, for the disk gives no more; `None` while it does.
    pub fn segments_left(&self) -> Option<usize> {
        self.0.segments_left()
    }
}

/// The settings of a log.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of a segment; three exist at least. A single append that is larger gets a larger segment. From 4 KiB to 1 GiB.
    pub segment_bytes: u64,
    /// The newest records are kept in memory up to this; those not yet durable are kept regardless.
    pub cache_bytes: usize,
    /// What may wait for its fsync. Beyond it `append` fails; Raft bounds what is in flight far below. At most 1 GiB.
    pub queue_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, cache_bytes: 8 << 20, queue_bytes: 256 << 20 }
    }
}

/// What the log says beside its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The last entry that was purged.
    pub purged: Option<LogId>,
    /// The last entry; `purged` if there is none behind it.
    pub last: Option<LogId>,
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
}

impl State {
    /// The index of the oldest entry, if there is one.
    pub fn first_index(&self) -> u64 {
        index_after(self.purged)
    }

    /// The index that the next entry has.
    pub fn next_index(&self) -> u64 {
        index_after(self.last)
    }

    fn purge(&mut self, log_id: LogId) {
        self.purged = Some(log_id);
        if self.next_index() <= log_id.index {
            self.last = Some(log_id);
        }
    }
}

fn index_after(log_id: Option<LogId>) -> u64 {
    log_id.map_or(0, |id| id.index + 1)
}

/// Where an entry is. Twelve bytes, as there are many.
#[derive(Clone, Copy, Debug)]
struct Place {
    segment: u32,
    offset: u32,
    payload_bytes: u32,
}

impl Place {
    fn disk_bytes(&self) -> u64 {
        record::HEAD_BYTES as u64 + self.payload_bytes as u64
    }

    fn end(&self) -> u64 {
        self.offset as u64 + self.disk_bytes()
    }
}

/// What the durable frames say: changed in the order of the disk.
#[derive(Debug, Default)]
struct Durable {
    state: State,
    /// The index of the first of `places`. Behind a purge it is `state.first_index()`.
    base: u64,
    places: VecDeque<Place>,
}

impl Durable {
    fn append(&mut self, log_id: LogId, place: Place) {
        assert_eq!(log_id.index, self.state.next_index(), "log entries are contiguous");
        if self.places.is_empty() {
            self.base = log_id.index;
        }
        self.places.push_back(place);
        self.state.last = Some(log_id);
    }

    fn truncate(&mut self, after: Option<LogId>) {
        let next = index_after(after);
        self.places.truncate(next.saturating_sub(self.base) as usize);
        self.base = self.base.min(next);
        self.state.last = after;
    }

    fn purge(&mut self, log_id: LogId) {
        let gone = (log_id.index + 1).saturating_sub(self.base).min(self.places.len() as u64);
        self.places.drain(..gone as usize);
        self.base += gone;
        self.state.purge(log_id);
        if self.places.is_empty() {
            self.base = self.state.next_index();
        }
    }
}

/// One step of the log, on its way to the disk.
enum Change {
    Append(Vec<Record>),
    Vote(Vote),
    Truncate(Option<LogId>),
    Purge(LogId),
}

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Op {
    sequence: u64,
    change: Change,
    disk_bytes: u64,
    done: Done,
}

struct Cached {
    /// The step that appended it: it may leave the cache once that is durable.
    sequence: u64,
    record: Record,
}

struct Inner {
    /// What callers see: all steps, durable or not.
    state: State,
    /// Live entries in bytes, as the disk holds them.
    bytes: u64,
    /// The newest entries, up to `state.last`.
    cache: VecDeque<Cached>,
    cache_bytes: usize,
    /// All steps up to this one are in `durable`.
    flushed: u64,
    durable: Durable,
    segments: BTreeMap<u32, Arc<dyn File>>,
    queue: VecDeque<Op>,
    /// Steps that are not durable yet, those in the flusher's hands included.
    queue_bytes: u64,
    sequence: u64,
    failed: Option<String>,
    closed: bool,
}

impl Inner {
    fn usable(&self) -> io::Result<()> {
        match &self.failed {
            Some(why) => Err(io::Error::other(why.clone())),
            None if self.closed => Err(io::Error::other("the log is closed")),
            None => Ok(()),
        }
    }

    fn enqueue(&mut self, change: Change, disk_bytes: u64, done: Done) {
        self.sequence += 1;
        self.queue_bytes += disk_bytes;
        self.queue.push_back(Op { sequence: self.sequence, change, disk_bytes, done });
    }

    /// Index of the first entry in the cache.
    fn cache_start(&self) -> u64 {
        self.state.next_index() - self.cache.len() as u64
    }

    fn disk_bytes_of(&self, index: u64) -> u64 {
        match index.checked_sub(self.cache_start()) {
            Some(at) => self.cache[at as usize].record.disk_bytes(),
            None => self.place(index).disk_bytes(),
        }
    }

    /// Where an entry is that has left the cache, and hence is durable.
    fn place(&self, index: u64) -> Place {
        self.durable.places[(index - self.durable.base) as usize]
    }

    fn evict(&mut self, cache_bytes_max: usize) {
        while self.cache_bytes > cache_bytes_max
            && let Some(oldest) = self.cache.front()
            && oldest.sequence <= self.flushed
        {
            self.cache_bytes -= oldest.record.cache_bytes();
            self.cache.pop_front();
        }
    }

    /// Takes a changed state; entries outside of it leave the cache.
    fn shrink(&mut self, state: State) {
        let live = self.state.first_index()..self.state.next_index();
        let kept = state.first_index()..state.next_index().min(live.end);
        for index in (live.start..kept.start.min(live.end)).chain(kept.end.max(live.start)..live.end) {
            self.bytes -= self.disk_bytes_of(index);
        }
        let start = self.cache_start();
        let keep = kept.end.saturating_sub(start).min(self.cache.len() as u64);
        for cached in self.cache.drain(keep as usize..) {
            self.cache_bytes -= cached.record.cache_bytes();
        }
        let drop = kept.start.saturating_sub(start).min(self.cache.len() as u64);
        for cached in self.cache.drain(..drop as usize) {
            self.cache_bytes -= cached.record.cache_bytes();
        }
        self.state = state;
    }

    /// What a read takes from the disk, and then from the cache.
    fn plan(&self, range: Range<u64>, bytes_max: u64, dir: &Path) -> (Vec<Run>, Vec<Record>) {
        let start = range.start.max(self.state.first_index());
        let end = range.end.min(self.state.next_index());
        let (mut runs, mut cached) = (Vec::<Run>::new(), Vec::new());
        let mut bytes = 0;
        let cache_start = self.cache_start();
        for index in start..end {
            let entry = index.checked_sub(cache_start).map(|at| &self.cache[at as usize].record);
            bytes += match entry {
                Some(record) => record.payload.len() as u64,
                None => self.place(index).payload_bytes as u64,
            };
            if bytes > bytes_max && index > start {
                break;
            }
            if let Some(record) = entry {
                cached.push(record.clone());
                continue;
            }
            let place = self.place(index);
            if !runs.last_mut().is_some_and(|run| run.extend(place)) {
                let file = self.segments[&place.segment].clone();
                let name = segment::path(dir, place.segment);
                runs.push(Run { file, name, segment: place.segment, places: vec![place], first_index: index });
            }
        }
        (runs, cached)
    }
}

/// What the handles, the flusher and reads share.
struct Shared {
    env: Env,
    dir: PathBuf,
    owner: Owner,
    options: Options,
    /// Held for moments, never across I/O.
    inner: Mutex<Inner>,
    /// Wakes the flusher.
    wake: Notify,
    /// Cancelled when the flusher has ended.
    ended: CancellationToken,
    fsyncs: FsyncTimes,
    supply: Arc<Supply>,
    mark: Arc<Keeper>,
}

impl Shared {
    fn close(&self) {
        self.inner.lock().closed = true;
        self.wake.notify_one();
    }
}

/// The last handle closes the log when it is dropped.
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A log; cloning shares it.
#[derive(Clone)]
pub struct Log(Arc<Handle>);

impl Log {
    /// Makes a log in `dir`, which must not hold one. Whole or not there after a crash. Needs a tokio runtime; blocks.
    pub fn create(env: &Env, dir: &Path, owner: Owner, options: Options) -> Result<Self, Error> {
        let disk = &*env.disk;
        disk.create_dir_all(dir)?;
        if !segment::list(disk, dir)?.is_empty() {
            return Err(Error::Exists(dir.to_owned()));
        }
        let path = segment::path(dir, 1);
        let temporary = path.with_extension("new");
        let file = disk.open(&temporary, OpenMode::CreateTruncate)?;
        segment::preallocate(&*file, options.segment_bytes)?;
        let mut header = Vec::new();
        let file_bytes = options.segment_bytes;
        Header { owner, first_frame: 1, previous_end: 0, file_bytes, state: State::default() }.encode(1, &mut header);
        file.write_at(&header, 0)?;
        file.sync_all()?;
        disk.rename(&temporary, &path)?;
        disk.sync_dir(dir)?;
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent)?;
        }
        Self::open(env, dir, owner, options)
    }

    /// Opens the log in `dir`: drops a torn newest frame, refuses any other damage. Needs a tokio runtime; blocks.
    pub fn open(env: &Env, dir: &Path, owner: Owner, options: Options) -> Result<Self, Error> {
        let recovered = recovery::recover(&*env.disk, dir, owner, &options)?;
        Self::start(env, dir, owner, options, recovered)
    }

    /// As [`Self::open`], while other tasks go on: to read a long log takes seconds.
    pub async fn load(env: &Env, dir: &Path, owner: Owner, options: Options) -> Result<Self, Error> {
        let (disk, path, how) = (env.disk.clone(), dir.to_owned(), options.clone());
        let recovered = env.long(Pool::Disk, move || recovery::recover(&*disk, &path, owner, &how)).await?;
        // Not on the thread that has read: those that it starts would give way to others, as it does.
        Self::start(env, dir, owner, options, recovered)
    }

    fn start(env: &Env, dir: &Path, owner: Owner, options: Options, recovered: Recovered) -> Result<Self, Error> {
        assert!((4 << 10..=1 << 30).contains(&options.segment_bytes), "a segment has from 4 KiB to 1 GiB");
        assert!(options.queue_bytes <= 1 << 30, "a segment's offsets have 32 bits");
        let mark = Mark { frame: recovered.next_frame - 1, segment: recovered.active, end: recovered.end as u32 };
        let mark = Keeper::open(&*env.disk, dir, owner, mark)?;
        let Recovered { durable, segments, active, end, next_frame, spares, doomed } = recovered;
        let next = spares.back().map_or(active, |(number, _)| *number) + 1;
        let supply = Supply::new(env.disk.clone(), dir.to_owned(), options.segment_bytes, spares, next, doomed);
        let file = segments[&active].clone();
        let shared = Arc::new(Shared {
            env: env.clone(),
            dir: dir.to_owned(),
            owner,
            options,
            inner: Mutex::new(Inner {
                state: durable.state,
                bytes: durable.places.iter().map(Place::disk_bytes).sum(),
                cache: VecDeque::new(),
                cache_bytes: 0,
                flushed: 0,
                durable,
                segments,
                queue: VecDeque::new(),
                queue_bytes: 0,
                sequence: 0,
                failed: None,
                closed: false,
            }),
            wake: Notify::new(),
            ended: CancellationToken::new(),
            fsyncs: FsyncTimes::default(),
            supply: Arc::new(supply),
            mark,
        });
        env.spawn_thread("log-mark", shared.mark.clone().run());
        env.spawn_thread("log-segments", shared.supply.clone().run());
        env.spawn_thread("log-flush", Flusher::new(shared.clone(), active, file, end, next_frame).run());
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// What the log says now, durable or not.
    pub fn state(&self) -> State {
        self.shared().inner.lock().state
    }

    /// What is on the disk of that.
    pub fn durable(&self) -> State {
        self.shared().inner.lock().durable.state
    }

    /// Appends entries, contiguous to the last one. They are readable when this returns; `done` is called on the flusher's
    /// thread once they are durable, or have failed. On an error nothing was taken and `done` is not called.
    pub fn append(&self, records: Vec<Record>, done: impl FnOnce(io::Result<()>) + Send + 'static) -> io::Result<()> {
        let shared = self.shared();
        let done = Box::new(done);
        let disk_bytes = records.iter().map(Record::disk_bytes).sum::<u64>();
        {
            let mut inner = shared.inner.lock();
            inner.usable()?;
            let next = inner.state.next_index();
            if !records.iter().map(|record| record.log_id.index).eq(next..next + records.len() as u64) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("entries must go on at index {next}")));
            }
            if inner.queue_bytes + disk_bytes > shared.options.queue_bytes {
                let text = format!("{} bytes already wait to be flushed", inner.queue_bytes);
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
            }
            let sequence = inner.sequence + 1;
            for record in &records {
                inner.state.last = Some(record.log_id);
                inner.cache_bytes += record.cache_bytes();
                inner.cache.push_back(Cached { sequence, record: record.clone() });
            }
            inner.bytes += disk_bytes;
            inner.enqueue(Change::Append(records), disk_bytes, done);
        }
        shared.wake.notify_one();
        Ok(())
    }

    /// Saves the vote; it is durable when this returns.
    pub async fn save_vote(&self, vote: Vote) -> io::Result<()> {
        self.apply(|inner, done| {
            inner.state.vote = Some(vote);
            if planted!("vote-not-persisted") {
                done(Ok(()));
                return Ok(());
            }
            inner.enqueue(Change::Vote(vote), record::HEAD_BYTES as u64, done);
            Ok(())
        })
        .await
    }

    /// Notes that entries up to `log_id` are committed. Rides along with the next flush; never moves backwards.
    pub fn save_committed(&self, log_id: LogId) {
        let mut inner = self.shared().inner.lock();
        if inner.state.committed.is_none_or(|committed| committed.index < log_id.index) {
            inner.state.committed = Some(log_id);
        }
    }

    /// Drops the entries after `after`, all of them if it is `None`. Durable when this returns. Refused if one of them was committed.
    pub async fn truncate_after(&self, after: Option<LogId>) -> io::Result<()> {
        self.apply(|inner, done| {
            let state = inner.state;
            if index_after(after) < state.first_index() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "cannot truncate purged entries"));
            }
            if let Some(committed) = state.committed.filter(|committed| index_after(after) <= committed.index) {
                let text = format!(
                    "asked to drop the log's entries from index {} on, but entries up to {} were committed here: other members \
                     have lost acknowledged writes, and this disk may be the last that holds them; keep a copy of it",
                    index_after(after),
                    committed.index
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            if index_after(after) < state.next_index() {
                inner.shrink(State { last: after, ..state });
                inner.enqueue(Change::Truncate(after), record::HEAD_BYTES as u64, done);
            } else {
                done(Ok(()));
            }
            Ok(())
        })
        .await
    }

    /// Drops the entries up to `log_id`; beyond the last one, the log is empty and goes on behind `log_id`. Visible at once,
    /// durable with the next flush: a crash before it only brings purged entries back. Files are unlinked later.
    pub async fn purge(&self, log_id: LogId) -> io::Result<()> {
        let shared = self.shared();
        {
            let mut inner = shared.inner.lock();
            inner.usable()?;
            let mut state = inner.state;
            if log_id.index < state.first_index() {
                return Ok(());
            }
            state.purge(log_id);
            inner.shrink(state);
            inner.enqueue(Change::Purge(log_id), record::HEAD_BYTES as u64, Box::new(|_| ()));
        }
        shared.wake.notify_one();
        Ok(())
    }

    /// The entries of `range` that exist, until their payloads exceed `bytes_max`; at least one if there is any.
    pub async fn read(&self, range: Range<u64>, bytes_max: u64) -> io::Result<Vec<Record>> {
        let shared = self.shared();
        let (runs, cached) = shared.inner.lock().plan(range, bytes_max, &shared.dir);
        if runs.is_empty() {
            return Ok(cached);
        }
        shared
            .env
            .long(Pool::Disk, move || {
                let mut records = Vec::with_capacity(runs.iter().map(|run| run.places.len()).sum::<usize>());
                for run in runs {
                    run.read(&mut records)?;
                }
                records.extend(cached);
                Ok(records)
            })
            .await
    }

    /// Bytes that the live entries take on disk.
    pub fn bytes(&self) -> u64 {
        self.shared().inner.lock().bytes
    }

    /// The smallest index behind which the live entries take at most `bytes` on disk. Looks at those entries one by one.
    pub fn index_before(&self, bytes: u64) -> u64 {
        let inner = self.shared().inner.lock();
        let live = inner.state.first_index()..inner.state.next_index();
        let mut left = bytes;
        for index in live.clone().rev() {
            match left.checked_sub(inner.disk_bytes_of(index)) {
                Some(rest) => left = rest,
                None => return index,
            }
        }
        live.start.saturating_sub(1)
    }

    /// Live entries.
    pub fn entries(&self) -> u64 {
        let state = self.state();
        state.next_index() - state.first_index()
    }

    /// Preallocated segments that stand ready; fewer than two for long means that the disk is full.
    pub fn spares(&self) -> usize {
        self.shared().supply.spares()
    }

    /// What the log can still take, for whoever asks beside it.
    pub fn room(&self) -> Room {
        Room(self.shared().supply.clone())
    }

    /// How long fdatasync took.
    pub fn fsync_stats(&self) -> FsyncStats {
        self.shared().fsyncs.snapshot()
    }

    /// The I/O error that ended the log, if one did.
    pub fn failed(&self) -> Option<String> {
        self.shared().inner.lock().failed.clone()
    }

    /// Flushes what was appended, and ends. The directory may be opened again after this.
    pub async fn close(&self) {
        let shared = self.shared();
        shared.close();
        shared.ended.cancelled().await;
        shared.supply.ended.cancelled().await;
        shared.mark.ended.cancelled().await;
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }

    /// Makes a change and waits until it is durable.
    async fn apply(&self, change: impl FnOnce(&mut Inner, Done) -> io::Result<()>) -> io::Result<()> {
        let shared = self.shared();
        let (done, answer) = oneshot::channel();
        {
            let mut inner = shared.inner.lock();
            inner.usable()?;
            change(&mut inner, Box::new(|result| drop(done.send(result))))?;
        }
        shared.wake.notify_one();
        answer.await.unwrap_or_else(|_| Err(io::Error::other("the log has ended")))
    }
}
