//! The queue of a session: the hub fills it, the session empties it, and both note here how far each watcher is.
//!
//! Invariants: each watcher has a lower bound `next`, and takes no event below it, so what comes twice is dropped; a queue holds at most
//! its bytes, or one revision if that is larger. A watcher for which there is no room falls behind, and nobody waits for it.
//! Absent: reading what a watcher lacks (`session`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Batch;
use crate::node::account::Taken;

/// A batch of so many bytes waits without being charged, if it is the only one.
const FREE_BYTES: usize = 1 << 10;
/// A larger batch counts for what its response takes, too.
const LARGE_BYTES: usize = 256 << 10;
const LARGE_FACTOR: u64 = 2;
/// No batch counts for more than this part of what all clients may have.
const LARGE_PART: u64 = 4;

/// The queue of a session, which the hub fills.
pub(super) struct Outbox {
    bytes_max: usize,
    /// What waits: all but one small batch, which every consumer may have.
    pub(super) charged: Taken,
    pub(super) waiting: Mutex<Waiting>,
    pub(super) changed: Notify,
}

#[derive(Default)]
pub(super) struct Waiting {
    pub(super) queue: VecDeque<Queued>,
    pub(super) bytes: usize,
    pub(super) flows: HashMap<i64, Flow>,
    /// Watchers that are not synced, and that have not begun to catch up.
    pub(super) behind: VecDeque<i64>,
    /// Users or roles have changed since the session looked at them.
    pub(super) look_again: bool,
}

pub(super) struct Queued {
    pub(super) watcher: i64,
    pub(super) batch: Arc<Batch>,
    pub(super) charged: u64,
}

/// How far a watcher is.
pub(super) struct Flow {
    /// Events below this revision are of no interest (any more).
    pub(super) next: i64,
    /// The hub gives it events; else the session reads them.
    pub(super) synced: bool,
    /// Not synced: the state whose history leads on from `next`.
    pub(super) generation: u64,
    /// Its items in the queue; they come before what it reads from the history.
    pub(super) queued: usize,
}

impl Flow {
    fn fall_behind(&mut self, next: i64, generation: u64) {
        (self.next, self.synced, self.generation) = (next, false, generation);
    }
}

impl Outbox {
    /// Of at most so many bytes, charged to `charged`.
    pub(super) fn new(bytes_max: usize, charged: Taken) -> Self {
        Self { bytes_max, charged, waiting: Mutex::default(), changed: Notify::new() }
    }

    /// Gives a batch to those of `watchers` that are synced and want it. Who finds the queue full falls behind, and is noted in `fallen`.
    pub(super) fn push(&self, watchers: &[i64], batch: &Arc<Batch>, generation: u64, fallen: &mut Vec<i64>) {
        let mut waiting = self.waiting.lock();
        let Waiting { queue, bytes, flows, behind, .. } = &mut *waiting;
        for watcher in watchers {
            let flow = flows.get_mut(watcher).filter(|f| f.synced && f.next <= batch.revision);
            let Some(flow) = flow else { continue };
            let charged = if queue.is_empty() && batch.bytes <= FREE_BYTES { 0 } else { self.cost(batch.bytes) };
            let is_full = !queue.is_empty() && *bytes + batch.bytes > self.bytes_max;
            if is_full || charged > 0 && self.charged.grow(charged).is_err() {
                flow.fall_behind(batch.revision, generation);
                behind.push_back(*watcher);
                fallen.push(*watcher);
                continue;
            }
            flow.next = batch.revision + 1;
            flow.queued += 1;
            *bytes += batch.bytes;
            queue.push_back(Queued { watcher: *watcher, batch: batch.clone(), charged });
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// As [`Self::push`] of a batch that is not worth making, since there is no room for it.
    pub(super) fn pass_over(&self, watchers: &[i64], revision: i64, generation: u64, fallen: &mut Vec<i64>) {
        let mut waiting = self.waiting.lock();
        let Waiting { flows, behind, .. } = &mut *waiting;
        for watcher in watchers {
            if let Some(flow) = flows.get_mut(watcher).filter(|f| f.synced && f.next <= revision) {
                flow.fall_behind(revision, generation);
                behind.push_back(*watcher);
                fallen.push(*watcher);
            }
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Whether there is room for a batch of at least so many bytes.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let is_full = {
            let waiting = self.waiting.lock();
            !waiting.queue.is_empty() && waiting.bytes + bytes > self.bytes_max
        };
        let cost = self.cost(bytes);
        let fits = !is_full && self.charged.grow(cost).is_ok();
        if fits {
            self.charged.shrink(cost);
        }
        fits
    }

    /// What a batch of so many bytes takes until its client has it. A large one is copied into a response, and that is encoded. One that
    /// could never have so much counts as a part of all that there is, so that it comes sooner or later.
    pub(super) fn cost(&self, bytes: usize) -> u64 {
        if bytes <= LARGE_BYTES {
            return bytes as u64;
        }
        (bytes as u64).saturating_mul(LARGE_FACTOR).min(self.charged.pool().max() / LARGE_PART)
    }

    /// Whether the hub gives a watcher its events.
    pub(super) fn is_synced(&self, watcher: i64) -> bool {
        self.waiting.lock().flows.get(&watcher).is_some_and(|flow| flow.synced)
    }

    /// Users or roles have changed.
    pub(super) fn look_again(&self) {
        self.waiting.lock().look_again = true;
        self.changed.notify_one();
    }

    /// A synced watcher has to catch up from `from` on, or from where it wants to begin.
    pub(super) fn fall_behind(&self, watcher: i64, from: i64, generation: u64) {
        let mut waiting = self.waiting.lock();
        if let Some(flow) = waiting.flows.get_mut(&watcher).filter(|f| f.synced) {
            flow.fall_behind(flow.next.max(from), generation);
            waiting.behind.push_back(watcher);
            drop(waiting);
            self.changed.notify_one();
        }
    }
}
