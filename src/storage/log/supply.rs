//! The supply of preallocated segments, and the removal of purged ones: both off the append path.
//!
//! Invariants: a segment is handed out only when its file and its name are durable; files appear and vanish in order of their
//! numbers, so that a crash leaves no hole.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::segment;
use crate::env::{Disk, File, OpenMode, timeout};

/// Segments that are kept ready: space is taken before it is needed.
pub(super) const SPARES: usize = 2;
/// A failed preparation or removal is tried again after this, if nothing else wakes the worker.
const RETRY: Duration = Duration::from_secs(5);
/// Between two removals, if nothing else wakes the worker: what the file system frees holds up the log's flushes.
const UNLINK_REST: Duration = Duration::from_millis(50);

/// A preallocated segment.
pub(super) type Spare = (u32, Arc<dyn File>);

pub(super) struct Supply {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    state: Mutex<Work>,
    /// Wakes the worker.
    work: Notify,
    /// Wakes the flusher when it waits for a segment.
    ready: Notify,
    /// Cancelled when the worker has ended.
    pub ended: CancellationToken,
}

struct Work {
    spares: VecDeque<Spare>,
    next: u32,
    /// Segments to unlink, ascending.
    doomed: VecDeque<u32>,
    /// Why the last preparation failed.
    error: Option<io::Error>,
    /// The last preparation failed, and no removal is left that may make space.
    disk_is_full: bool,
    closed: bool,
}

impl Supply {
    pub fn new(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        segment_bytes: u64,
        spares: VecDeque<Spare>,
        next: u32,
        doomed: VecDeque<u32>,
    ) -> Self {
        let state = Mutex::new(Work { spares, next, doomed, error: None, disk_is_full: false, closed: false });
        let (work, ready, ended) = (Notify::new(), Notify::new(), CancellationToken::new());
        Self { disk, dir, segment_bytes, state, work, ready, ended }
    }

    /// Segments that stand ready.
    pub fn spares(&self) -> usize {
        self.state.lock().spares.len()
    }

    /// As many, while the last attempt to prepare one has failed.
    pub fn segments_left(&self) -> Option<usize> {
        let state = self.state.lock();
        state.disk_is_full.then(|| state.spares.len())
    }

    /// The next segment; waits for it if it is still being prepared, and fails if that fails.
    pub async fn take(&self) -> io::Result<Spare> {
        // An old failure may be over by now.
        self.state.lock().error = None;
        loop {
            self.work.notify_one();
            {
                let mut state = self.state.lock();
                if let Some(spare) = state.spares.pop_front() {
                    return Ok(spare);
                }
                if let Some(error) = state.error.take() {
                    return Err(error);
                }
            }
            tokio::select! {
                () = self.ready.notified() => (),
                () = self.ended.cancelled() => return Err(io::Error::other("no worker prepares segments")),
            }
        }
    }

    /// Unlinks `segments` (ascending) some time later.
    pub fn unlink(&self, segments: impl Iterator<Item = u32>) {
        self.state.lock().doomed.extend(segments);
        self.work.notify_one();
    }

    pub fn close(&self) {
        self.state.lock().closed = true;
        self.work.notify_one();
    }

    /// The worker.
    pub async fn run(self: Arc<Self>) {
        let _ended = self.ended.clone().drop_guard();
        loop {
            let unlinked = self.unlink_doomed();
            let prepared = self.prepare(unlinked);
            // The mutex is not held while this waits.
            let (closed, more) = {
                let state = self.state.lock();
                (state.closed, unlinked && !state.doomed.is_empty())
            };
            match (prepared, more) {
                (_, false) if closed => return,
                (true, false) if unlinked => self.work.notified().await,
                (_, false) => drop(timeout(RETRY, self.work.notified()).await),
                (true, true) if !closed => drop(timeout(UNLINK_REST, self.work.notified()).await),
                // Its space may be what is missing.
                (_, true) => {}
            }
        }
    }

    /// One at a time; and each removal is durable before the next: a hole among the segments would look like a lost one.
    fn unlink_doomed(&self) -> bool {
        let Some(number) = self.state.lock().doomed.front().copied() else { return true };
        let path = segment::path(&self.dir, number);
        let removed = match self.disk.remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        if let Err(error) = removed.and_then(|()| self.disk.sync_dir(&self.dir)) {
            tracing::warn!(file = %path.display(), %error, "cannot unlink a purged log segment");
            return false;
        }
        self.state.lock().doomed.pop_front();
        true
    }

    /// What fails while segments can be unlinked (`unlinked` says that the last one was) is tried again when they are.
    fn prepare(&self, unlinked: bool) -> bool {
        loop {
            let number = {
                let state = self.state.lock();
                if state.closed || state.spares.len() >= SPARES {
                    return true;
                }
                state.next
            };
            let path = segment::path(&self.dir, number);
            let prepared = self.disk.open(&path, OpenMode::CreateTruncate).and_then(|file| {
                segment::preallocate(&*file, self.segment_bytes)?;
                self.disk.sync_dir(&self.dir)?;
                Ok(file)
            });
            match prepared {
                Ok(file) => {
                    let mut state = self.state.lock();
                    state.spares.push_back((number, Arc::from(file)));
                    state.next = number + 1;
                    state.error = None;
                    state.disk_is_full = false;
                    self.ready.notify_one();
                }
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "cannot prepare a log segment");
                    self.disk.remove_file(&path).ok();
                    let mut state = self.state.lock();
                    if !unlinked || state.doomed.is_empty() {
                        state.error = Some(error);
                        state.disk_is_full = true;
                        self.ready.notify_one();
                    }
                    return false;
                }
            }
        }
    }
}
