//! The one writer of the log: drains the queue, writes a frame, syncs it, then answers.
//!
//! Invariants: frames are written one at a time and in order; after an error nothing more is written.
//! Absent: preparing and unlinking files (`supply`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::mark::Mark;
use super::record::{HEAD_BYTES, Head, What};
use super::segment::{self, HEADER_BYTES, Header};
use super::{Change, Op, Place, Shared};
use crate::env::{File, Instant, fail, planted, sleep};
use crate::metrics::metrics;
use crate::pb::log::LogId;

/// A frame takes no further step once it has this many bytes: it bounds the write buffer, and how long a callback waits.
const FRAME_BYTES_MAX: u64 = 4 << 20;
/// Zeros that are written behind a frame when it reaches what was never written. A file system notes for each block of a
/// preallocated file whether it was written; a frame over written blocks is synced without that, in two thirds of the time and of the CPU.
const ZEROS_BYTES: u64 = 256 << 10;
/// A frame of more bytes is written without: its data outweighs the note.
const SMALL_FRAME_BYTES: usize = 64 << 10;

pub(super) struct Flusher {
    shared: Arc<Shared>,
    segment: u32,
    file: Arc<dyn File>,
    /// Where the frame begins in the file.
    offset: u64,
    /// Where blocks begin that may never have been written.
    unwritten: u64,
    frame: u64,
    /// The frame so far; reused.
    buffer: Vec<u8>,
    /// The steps in the frame.
    ops: Vec<Op>,
    /// Where the frame's entries are.
    places: Vec<Place>,
}

impl Flusher {
    pub fn new(shared: Arc<Shared>, segment: u32, file: Arc<dyn File>, offset: u64, frame: u64) -> Self {
        let (buffer, ops, places) = Default::default();
        Self { shared, segment, file, offset, unwritten: offset, frame, buffer, ops, places }
    }

    pub async fn run(mut self) {
        let mut queue = VecDeque::new();
        loop {
            self.shared.wake.notified().await;
            let closed = {
                let mut inner = self.shared.inner.lock();
                std::mem::swap(&mut inner.queue, &mut queue);
                inner.closed
            };
            let mut written = self.write(&mut queue).await;
            if closed && written.is_ok() {
                written = self.flush_committed().await;
            }
            if let Err(error) = written {
                self.fail(error, queue);
                return;
            }
            if closed {
                return;
            }
        }
    }

    async fn write(&mut self, queue: &mut VecDeque<Op>) -> io::Result<()> {
        while let Some(op) = queue.pop_front() {
            // A step is in one frame, and a frame in one segment.
            if !self.ops.is_empty() && self.buffer.len() as u64 + op.disk_bytes > FRAME_BYTES_MAX {
                self.flush().await?;
            }
            if self.is_full(op.disk_bytes) {
                self.flush().await?;
                // The step is held by the frame that it waits for: a failure answers it there.
                self.ops.push(op);
                self.rotate().await?;
            } else {
                self.ops.push(op);
            }
            self.encode_newest();
        }
        self.flush().await
    }

    /// A segment that holds a frame has no room for `bytes` more and the frame's end.
    fn is_full(&self, bytes: u64) -> bool {
        let used = self.offset + self.buffer.len() as u64;
        used > HEADER_BYTES as u64 && used + bytes + HEAD_BYTES as u64 > self.shared.options.segment_bytes
    }

    /// Goes on in the next segment; its header is written with its first frame.
    async fn rotate(&mut self) -> io::Result<()> {
        assert!(self.buffer.is_empty(), "a frame is in one segment");
        let previous_end = self.offset;
        (self.segment, self.file) = self.shared.supply.take().await?;
        (self.offset, self.unwritten) = (0, 0);
        let mut inner = self.shared.inner.lock();
        inner.segments.insert(self.segment, self.file.clone());
        let (owner, state) = (self.shared.owner, inner.durable.state);
        let (first_frame, file_bytes) = (self.frame, self.shared.options.segment_bytes);
        Header { owner, first_frame, previous_end, file_bytes, state }.encode(self.segment, &mut self.buffer);
        Ok(())
    }

    /// Puts the newest step into the frame.
    fn encode_newest(&mut self) {
        let Some(op) = self.ops.pop() else { return };
        match &op.change {
            Change::Append(records) => {
                for record in records {
                    let offset = self.put(What::Entry, record.kind, record.log_id, &record.payload);
                    let payload_bytes = record.payload.len() as u32;
                    self.places.push(Place { segment: self.segment, offset, payload_bytes });
                }
            }
            Change::Vote(vote) => {
                let id = LogId { term: vote.term, index: vote.member };
                self.put(What::Vote, vote.committed.into(), id, &[]);
            }
            Change::Truncate(_) if planted!("log-truncation-skipped") => {}
            Change::Truncate(after) => {
                self.put(What::Truncate, after.is_some().into(), after.unwrap_or_default(), &[]);
            }
            Change::Purge(log_id) => {
                self.put(What::Purge, 1, *log_id, &[]);
            }
        }
        self.ops.push(op);
    }

    fn put(&mut self, what: What, kind: u8, log_id: LogId, payload: &[u8]) -> u32 {
        let offset = self.offset + self.buffer.len() as u64;
        let offset = u32::try_from(offset).expect("segment and queue sizes keep offsets below 4 GiB");
        let head = Head { what, kind, frame: self.frame, log_id, payload_bytes: payload.len() as u32 };
        head.encode(payload, self.segment, offset, &mut self.buffer);
        offset
    }

    async fn flush(&mut self) -> io::Result<()> {
        if self.ops.is_empty() { Ok(()) } else { self.flush_frame().await }
    }

    /// A frame for the committed log id alone, if none of the others took it along.
    async fn flush_committed(&mut self) -> io::Result<()> {
        let written = self.shared.inner.lock().durable.state.committed;
        if self.committed() != written { self.flush_frame().await } else { Ok(()) }
    }

    /// What to save as committed: it may be ahead of our disk when the other members are a quorum. Then it waits, so that
    /// a saved one always says that entries up to it were durable.
    fn committed(&self) -> Option<LogId> {
        let inner = self.shared.inner.lock();
        let durable = &inner.durable.state;
        inner.state.committed.filter(|id| id.index < durable.next_index()).or(durable.committed)
    }

    async fn flush_frame(&mut self) -> io::Result<()> {
        let latency = self.shared.env.disk.flush_latency();
        if !latency.is_zero() {
            sleep(latency).await;
        }
        let committed = self.committed();
        self.put(What::End, committed.is_some().into(), committed.unwrap_or_default(), &[]);
        self.write_frame()?;
        if planted!("mark-before-sync") {
            self.write_mark()?;
        }
        let start = Instant::now();
        fail::slow_sync();
        // Planted: one flush in four waits for the next one.
        if !planted!("ack-before-fsync") || self.frame.is_multiple_of(4) {
            self.file.sync_data()?;
        }
        let took = start.elapsed();
        self.shared.fsyncs.add(took);
        metrics().log_fsync.observe(took.as_secs_f64());
        self.write_mark()?;

        self.offset += self.buffer.len() as u64;
        self.frame += 1;
        self.buffer.clear();
        self.buffer.shrink_to(FRAME_BYTES_MAX as usize);
        self.publish(committed);
        for op in self.ops.drain(..) {
            (op.done)(Ok(()));
        }
        Ok(())
    }

    /// Writes the frame, and zeros behind it where that saves the next ones time.
    fn write_frame(&mut self) -> io::Result<()> {
        let frame_bytes = self.buffer.len();
        let end = self.offset + frame_bytes as u64;
        if end > self.unwritten {
            self.unwritten = end + zeros_behind(end, frame_bytes, self.shared.options.segment_bytes);
            self.buffer.resize((self.unwritten - self.offset) as usize, 0);
        }
        self.file.write_at(&self.buffer, self.offset)?;
        self.buffer.truncate(frame_bytes);
        Ok(())
    }

    fn write_mark(&self) -> io::Result<()> {
        let end = self.offset + self.buffer.len() as u64;
        self.shared.mark.write(Mark { frame: self.frame, segment: self.segment, end: end as u32 })
    }

    /// Makes the frame part of what is durable.
    fn publish(&mut self, committed: Option<LogId>) {
        let mut inner = self.shared.inner.lock();
        let mut places = self.places.drain(..);
        let mut purged = false;
        for op in &self.ops {
            match &op.change {
                Change::Append(records) => {
                    for (record, place) in records.iter().zip(places.by_ref()) {
                        inner.durable.append(record.log_id, place);
                    }
                }
                Change::Vote(vote) => inner.durable.state.vote = Some(*vote),
                Change::Truncate(after) => inner.durable.truncate(*after),
                Change::Purge(log_id) => {
                    inner.durable.purge(*log_id);
                    purged = true;
                }
            }
            inner.flushed = op.sequence;
            inner.queue_bytes -= op.disk_bytes;
        }
        inner.durable.state.committed = committed;
        inner.evict(self.shared.options.cache_bytes);
        if purged {
            let needed = inner.durable.places.front().map_or(self.segment, |place| place.segment);
            let kept = inner.segments.split_off(&needed);
            let gone = std::mem::replace(&mut inner.segments, kept);
            self.shared.supply.unlink(gone.into_keys());
        }
    }

    /// Ends the log: everything that waits, and everything later, fails with this.
    fn fail(&mut self, error: io::Error, queue: VecDeque<Op>) {
        let why = format!("{}: {error}", segment::path(&self.shared.dir, self.segment).display());
        tracing::error!(error = why, "the log failed; this member must stop");
        let waiting = {
            let mut inner = self.shared.inner.lock();
            inner.failed = Some(why.clone());
            std::mem::take(&mut inner.queue)
        };
        for op in self.ops.drain(..).chain(queue).chain(waiting) {
            (op.done)(Err(io::Error::new(error.kind(), why.clone())));
        }
    }
}

impl Drop for Flusher {
    /// However the flusher ends, nobody waits for it forever.
    fn drop(&mut self) {
        let queue = {
            let mut inner = self.shared.inner.lock();
            if !inner.closed && inner.failed.is_none() {
                inner.failed = Some("the log's flusher has ended".to_owned());
            }
            std::mem::take(&mut inner.queue)
        };
        for op in self.ops.drain(..).chain(queue) {
            (op.done)(Err(io::Error::other("the log has ended")));
        }
        self.shared.supply.close();
        self.shared.mark.close();
        self.shared.ended.cancel();
    }
}

/// How many zeros follow a frame that ends at `end`, and reaches what was never written.
fn zeros_behind(end: u64, frame_bytes: usize, segment_bytes: u64) -> u64 {
    if frame_bytes > SMALL_FRAME_BYTES { 0 } else { ZEROS_BYTES.min(segment_bytes.saturating_sub(end)) }
}

/// Durations that `recent_p99` looks back on.
const RECENT: usize = 512;

/// How long fdatasync took. Written by one thread, read by any, without a lock.
pub(super) struct FsyncTimes {
    count: AtomicU64,
    sum_nanos: AtomicU64,
    max_nanos: AtomicU64,
    recent_micros: [AtomicU32; RECENT],
}

impl Default for FsyncTimes {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        let recent_micros = [const { AtomicU32::new(0) }; RECENT];
        Self { count: zero(), sum_nanos: zero(), max_nanos: zero(), recent_micros }
    }
}

impl FsyncTimes {
    fn add(&self, took: Duration) {
        let nanos = took.as_nanos() as u64;
        let micros = took.as_micros().min(u32::MAX as u128) as u32;
        let count = self.count.load(Ordering::Relaxed);
        self.recent_micros[count as usize % RECENT].store(micros, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.max_nanos.fetch_max(nanos, Ordering::Relaxed);
        self.count.store(count + 1, Ordering::Release);
    }

    pub fn snapshot(&self) -> FsyncStats {
        let count = self.count.load(Ordering::Acquire);
        let mut recent: Vec<u32> = self
            .recent_micros
            .iter()
            .take(count.min(RECENT as u64) as usize)
            .map(|micros| micros.load(Ordering::Relaxed))
            .collect();
        recent.sort_unstable();
        let p99 = recent.get((recent.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default();
        FsyncStats {
            count,
            sum: Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)),
            max: Duration::from_nanos(self.max_nanos.load(Ordering::Relaxed)),
            recent_p99: Duration::from_micros(p99.into()),
        }
    }
}

/// Durations of the log's fdatasync calls since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsyncStats {
    pub count: u64,
    pub sum: Duration,
    pub max: Duration,
    /// 99th percentile of the last 512.
    pub recent_p99: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_follow_small_frames_and_end_with_the_segment() {
        const SEGMENT: u64 = 64 << 20;
        assert_eq!(zeros_behind(4000, 4000, SEGMENT), ZEROS_BYTES);
        assert_eq!(zeros_behind(SEGMENT - 100, 4000, SEGMENT), 100);
        assert_eq!(zeros_behind(SEGMENT + 100, 4000, SEGMENT), 0, "one step may be larger than a segment");
        assert_eq!(zeros_behind(1 << 20, SMALL_FRAME_BYTES + 1, SEGMENT), 0);
    }
}
