//! The queue of a session: the hub fills it, the session empties it, and both note here how far each watcher is.
//!
//! Invariants: each watcher has a lower bound `next`, and takes no event below it, so what comes twice is dropped; a queue holds at most its
//! bytes, or one revision if that is larger. A watcher for which there is no room falls behind, and nobody waits for it.
//! Absent: reading what a watcher lacks (`session`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Batch;
use crate::node::account::Taken;

/// A batch of so many bytes waits without being charged, if it is the only one.
const FREE_BYTES: usize = 1 << 10;

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
    /// Watchers that fell behind and of which the session does not know yet.
    pub(super) behind: Vec<i64>,
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

    /// Gives a batch to those of `watchers` that are synced and want it. Who finds the queue full falls behind.
    pub(super) fn push(&self, watchers: impl Iterator<Item = i64>, batch: &Arc<Batch>, generation: u64) {
        let mut waiting = self.waiting.lock();
        let Waiting { queue, bytes, flows, behind, .. } = &mut *waiting;
        for watcher in watchers {
            let flow = flows.get_mut(&watcher).filter(|f| f.synced && f.next <= batch.revision);
            let Some(flow) = flow else { continue };
            let charged = if queue.is_empty() && batch.bytes <= FREE_BYTES { 0 } else { batch.bytes as u64 };
            let is_full = !queue.is_empty() && *bytes + batch.bytes > self.bytes_max;
            if is_full || charged > 0 && self.charged.grow(charged).is_err() {
                flow.fall_behind(batch.revision, generation);
                behind.push(watcher);
                continue;
            }
            flow.next = batch.revision + 1;
            flow.queued += 1;
            *bytes += batch.bytes;
            queue.push_back(Queued { watcher, batch: batch.clone(), charged });
        }
        drop(waiting);
        self.changed.notify_one();
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
            waiting.behind.push(watcher);
            drop(waiting);
            self.changed.notify_one();
        }
    }
}
