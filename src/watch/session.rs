//! One consumer of many watchers: what it takes from its queue, and what it reads from the history for those that are behind.
//!
//! Invariant: the session reads the history only when its queue is empty (or it would never be), and only as much as fits a quarter of
//! the bound of its stream. Absent: the queue itself (`outbox`), and who fills it (`hub`).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::index::Index;
use super::outbox::{Flow, Outbox, Queued};
use super::shared::{Inner, Slice};
use super::{Batch, Batches, Refused, Shape};
use crate::caller::Caller;
use crate::env::{planted, sleep};
use crate::error::Error;
use crate::kv::Wants;
use crate::node::Client;
use crate::node::account::Taken;

/// Revisions read from the history at once: as many as etcd puts into a response.
const CATCH_UP_REVISIONS_MAX: usize = 1000;
/// Items taken from the queue in a row while some watcher catches up: neither starves the other.
const QUEUED_IN_A_ROW_MAX: usize = 64;

/// What a session's consumer gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// All of one revision that concerns the watcher.
    Events { watcher: i64, batch: Arc<Batch> },
    /// The watcher lacks events that are compacted, and is gone.
    Compacted { watcher: i64, compacted: i64 },
    /// The watcher's caller may not see what it watches any more, and it is gone.
    Denied { watcher: i64, error: Error },
    /// Every watcher that was behind is up to date.
    CaughtUp,
}

/// The hub has ended, with this member's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the watch hub has ended")]
pub struct Ended;

/// A watcher that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// The state's revision at that moment: what comes after it is watched.
    pub revision: i64,
}

/// What a watcher takes beside its key and the end of its range, in the index and in its session.
const WATCHER_BYTES: u64 = 600;

/// Between two tries to read the history where there is no room for what is read.
const ROOM_RETRY: Duration = Duration::from_millis(50);

/// A watcher that catches up.
struct Behind {
    next: i64,
    generation: u64,
}

/// A watcher, with its place and bytes.
struct Watcher {
    shape: Arc<Shape>,
    _place: Taken,
    _bytes: Taken,
}

/// A consumer; dropping it ends its watchers.
pub struct Session {
    hub: Arc<Inner>,
    number: u64,
    outbox: Arc<Outbox>,
    client: Client,
    /// Who reads.
    caller: Caller,
    /// The users and roles by which that is allowed, as of the last look.
    auth: u64,
    watchers: HashMap<i64, Watcher>,
    /// Those that catch up, and what they want.
    behind: BTreeMap<i64, Behind>,
    behind_index: Index<()>,
    /// Read from the history, and not taken yet.
    read: VecDeque<Output>,
    /// Charged for it.
    reserved: u64,
    in_a_row: usize,
}

impl Session {
    pub(super) fn new(hub: Arc<Inner>, number: u64, client: &Client, caller: Caller) -> Self {
        // The rest of the bound is for what is read from the history.
        let bytes_max = hub.options.stream_bytes_max / 4 * 3;
        let charged = hub.account.answers.nothing(client);
        let auth = hub.store.read(|s| s.kv.auth().stamp());
        Self {
            hub,
            number,
            outbox: Arc::new(Outbox::new(bytes_max, charged)),
            client: client.clone(),
            caller,
            auth,
            watchers: HashMap::new(),
            behind: BTreeMap::new(),
            behind_index: Index::default(),
            read: VecDeque::new(),
            reserved: 0,
            in_a_row: 0,
        }
    }

    /// Refuses what the session's caller may not see.
    pub fn permit(&self, shape: &Shape) -> Result<(), Error> {
        self.hub.store.read(|s| s.kv.permit(&self.caller, wants(shape)))
    }

    /// Adds a watcher under a number that is free. `start`: the first revision of interest, past or future; 0 or less: the next.
    pub fn watch(&mut self, watcher: i64, shape: &Shape, start: i64) -> Result<Created, Refused> {
        if shape.is_empty() {
            return Err(Refused::EmptyRange);
        }
        if self.watchers.contains_key(&watcher) {
            return Err(Refused::DuplicateId);
        }
        if self.watchers.len() >= self.hub.options.stream_watchers_max {
            return Err(Refused::TooMany);
        }
        let account = &self.hub.account;
        let place = account.watchers.take(&self.client, 1).map_err(|_| Refused::TooMany)?;
        let bytes = account.received.take(&self.client, WATCHER_BYTES + shape.bytes() as u64);
        let bytes = bytes.map_err(|_| Refused::TooMany)?;
        let mut state = self.hub.state.lock();
        let allowed = self.hub.store.read(|s| s.kv.permit(&self.caller, wants(shape)).map(|()| s.kv.revision()));
        let revision = allowed.map_err(Refused::Denied)?;
        let next = if start > 0 { start } else { revision + 1 };
        let (synced, generation) = (next >= state.position, state.generation);
        self.outbox.waiting.lock().flows.insert(watcher, Flow { next, synced, generation, queued: 0 });
        let shape = state.index.insert(shape, (self.number, watcher), self.outbox.clone());
        drop(state);
        if !synced {
            self.behind_index.insert(&shape, (0, watcher), ());
            // The present state's: who begins at the compacted revision gets what is left of it.
            self.behind.insert(watcher, Behind { next, generation: self.hub.store.generation() });
        }
        self.watchers.insert(watcher, Watcher { shape, _place: place, _bytes: bytes });
        Ok(Created { revision })
    }

    /// Ends a watcher; false if there is none of that number. What waits for it is dropped.
    pub fn cancel(&mut self, watcher: i64) -> bool {
        let Some(Watcher { shape, .. }) = self.watchers.remove(&watcher) else { return false };
        self.hub.state.lock().index.remove(&shape, (self.number, watcher));
        let mut waiting = self.outbox.waiting.lock();
        waiting.flows.remove(&watcher);
        waiting.behind.retain(|w| *w != watcher);
        let (mut freed, mut charged) = (0, 0);
        waiting.queue.retain(|queued| {
            let keep = queued.watcher != watcher;
            if !keep {
                freed += queued.batch.bytes;
                charged += queued.charged;
            }
            keep
        });
        waiting.bytes -= freed;
        self.outbox.charged.shrink(charged);
        drop(waiting);
        self.behind.remove(&watcher);
        self.behind_index.remove(&shape, (0, watcher));
        self.read.retain(|output| !matches!(output, Output::Events { watcher: w, .. } if *w == watcher));
        true
    }

    pub fn contains(&self, watcher: i64) -> bool {
        self.watchers.contains_key(&watcher)
    }

    pub fn watchers(&self) -> usize {
        self.watchers.len()
    }

    /// Waits for what comes next. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Output, Ended> {
        loop {
            if let Some(output) = self.try_next() {
                return Ok(output);
            }
            if self.is_catching_up() {
                if self.reserve().is_err() {
                    sleep(ROOM_RETRY).await;
                    continue;
                }
                if let Some((from, slice)) = self.read_history() {
                    if slice.is_long() {
                        let env = self.hub.env.clone();
                        env.in_place(|| self.take(from, &slice)).await;
                    } else {
                        self.take(from, &slice);
                    }
                }
                // One slice at a time: other tasks run on this thread too.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = self.outbox.changed.notified() => {}
                () = self.hub.closed.cancelled() => return Err(Ended),
            }
        }
    }

    /// What waits already. `None` does not say that there is nothing: somebody may have to catch up.
    pub fn try_next(&mut self) -> Option<Output> {
        if let Some(output) = self.read.pop_front() {
            return Some(output);
        }
        self.outbox.charged.shrink(std::mem::take(&mut self.reserved));
        let mut waiting = self.outbox.waiting.lock();
        if std::mem::take(&mut waiting.look_again) {
            drop(waiting);
            self.end_denied();
            if let Some(output) = self.read.pop_front() {
                return Some(output);
            }
            waiting = self.outbox.waiting.lock();
        }
        if self.in_a_row < QUEUED_IN_A_ROW_MAX || (self.behind.is_empty() && waiting.behind.is_empty()) {
            self.in_a_row += 1;
            if let Some(Queued { watcher, batch, charged }) = waiting.queue.pop_front() {
                waiting.bytes -= batch.bytes;
                self.outbox.charged.shrink(charged);
                if let Some(flow) = waiting.flows.get_mut(&watcher) {
                    flow.queued -= 1;
                }
                return Some(Output::Events { watcher, batch });
            }
        }
        self.in_a_row = 0;
        let behind = std::mem::take(&mut waiting.behind);
        let (later, now): (Vec<i64>, Vec<i64>) = behind.into_iter().partition(|w| waiting.flows[w].queued > 0);
        for watcher in now {
            let flow = &waiting.flows[&watcher];
            self.behind.insert(watcher, Behind { next: flow.next, generation: flow.generation });
            self.behind_index.insert(&self.watchers[&watcher].shape, (0, watcher), ());
        }
        waiting.behind = later;
        None
    }

    /// What was read from the history for this watcher and follows what was taken, as much of it as fits into `bytes`. Of what came by
    /// the hub there is none: that leaves revision by revision.
    pub fn rest_of(&mut self, watcher: i64, bytes: usize) -> Vec<Arc<Batch>> {
        let mut rest = Vec::new();
        let mut room = bytes;
        while let Some(Output::Events { watcher: of, batch }) = self.read.front()
            && *of == watcher
            && batch.bytes <= room
        {
            room -= batch.bytes;
            rest.push(batch.clone());
            self.read.pop_front();
        }
        rest
    }

    fn is_catching_up(&self) -> bool {
        !self.behind.is_empty() || !self.outbox.waiting.lock().behind.is_empty()
    }

    /// Room for a slice of the history, until all of it was taken.
    fn reserve(&mut self) -> Result<(), Error> {
        if self.reserved == 0 {
            let bytes = self.slice_bytes() as u64;
            self.outbox.charged.grow(bytes)?;
            self.reserved = bytes;
        }
        Ok(())
    }

    /// One slice of the history for those behind, and the revision that it was to begin at.
    fn read_history(&self) -> Option<(i64, Slice)> {
        let from = self.behind.values().map(|b| b.next).min()?;
        let wants_prev = self.behind_index.wants_prev();
        Some((from, self.hub.slice(from, CATCH_UP_REVISIONS_MAX, self.slice_bytes(), wants_prev)))
    }

    fn slice_bytes(&self) -> usize {
        self.hub.options.stream_bytes_max / 4
    }

    /// Gives what was read to those behind, and hands over who has all of it.
    fn take(&mut self, from: i64, slice: &Slice) {
        let budget = self.slice_bytes();
        if slice.auth != self.auth {
            self.end_denied();
        }
        self.drop_compacted(slice);
        let mut bytes = 0;
        // A watcher's revisions stand together, so that they can leave together.
        let mut found_by_watcher: BTreeMap<i64, Vec<Arc<Batch>>> = BTreeMap::new();
        let mut next = slice.revisions.first().map_or(slice.head + 1, |r| r.number().max(from));
        for revision in &slice.revisions {
            if planted!("watch-skips-hand-over") && revision.number() == slice.head && slice.revisions.len() > 1 {
                next = slice.head + 1;
                break;
            }
            let mut batches = Batches::new(revision, slice.view.as_ref());
            for found in self.behind_index.matches(revision.events()) {
                let interested = found.group.members().filter(|(w, ())| self.behind[w].next <= revision.number());
                let mut interested = interested.peekable();
                if interested.peek().is_none() {
                    continue;
                }
                let batch = batches.get(&found.events, found.group.shape.prev_kv);
                for (watcher, ()) in interested {
                    bytes += batch.bytes;
                    found_by_watcher.entry(watcher).or_default().push(batch.clone());
                }
            }
            next = revision.number() + 1;
            if bytes >= budget {
                break;
            }
        }
        for (watcher, batches) in found_by_watcher {
            self.read.extend(batches.into_iter().map(|batch| Output::Events { watcher, batch }));
        }
        for behind in self.behind.values_mut() {
            behind.next = behind.next.max(next);
        }
        if next > slice.head {
            self.hand_over(next);
        }
    }

    /// Ends the watchers of what the caller may not see as users and roles are now.
    fn end_denied(&mut self) {
        // A view: a stream may have many watchers.
        let state = self.hub.store.read(|s| s.kv.clone());
        self.auth = state.auth().stamp();
        let refused = |(number, at): (&i64, &Watcher)| {
            state.permit(&self.caller, wants(&at.shape)).err().map(|error| (*number, error))
        };
        let denied: Vec<(i64, Error)> = self.watchers.iter().filter_map(refused).collect();
        for (watcher, error) in denied {
            self.cancel(watcher);
            self.read.push_back(Output::Denied { watcher, error });
        }
    }

    fn drop_compacted(&mut self, slice: &Slice) {
        let is_lost = |b: &Behind| {
            // See `hub::is_continued`.
            b.next < slice.compacted || (b.generation != slice.generation && b.next <= slice.compacted)
        };
        let lost: Vec<i64> = self.behind.iter().filter(|(_, b)| is_lost(b)).map(|(w, _)| *w).collect();
        for watcher in lost {
            self.cancel(watcher);
            self.read.push_back(Output::Compacted { watcher, compacted: slice.compacted });
        }
        for behind in self.behind.values_mut() {
            behind.generation = slice.generation;
        }
    }

    /// Those who have read all that the hub has given out so far go on with the hub.
    fn hand_over(&mut self, read_to: i64) {
        let state = self.hub.state.lock();
        if read_to < state.position {
            // The hub is ahead; the next slice is short.
            return;
        }
        let mut waiting = self.outbox.waiting.lock();
        for (watcher, behind) in std::mem::take(&mut self.behind) {
            let flow = waiting.flows.get_mut(&watcher).expect("a watcher that catches up has a flow");
            (flow.next, flow.synced) = (behind.next, true);
            self.behind_index.remove(&self.watchers[&watcher].shape, (0, watcher));
        }
        drop(waiting);
        self.read.push_back(Output::CaughtUp);
    }

    /// The revision up to which the hub has given out every event.
    pub fn delivered(&self) -> i64 {
        *self.hub.delivered.borrow()
    }

    /// The revision up to which every event was taken from this session, if no watcher lacks any and all have begun; else
    /// `None`: an output or [`Self::delivered_after`] tells when it is worth asking again.
    pub fn progress(&self) -> Option<i64> {
        // Before the queue is looked at: what is delivered later is not in it.
        let delivered = self.delivered();
        let waiting = self.outbox.waiting.lock();
        let idle = self.read.is_empty() && self.behind.is_empty() && waiting.queue.is_empty();
        (idle && waiting.flows.values().all(|f| f.synced && f.next <= delivered + 1)).then_some(delivered)
    }

    /// As [`Self::progress`], of one watcher.
    pub fn progress_of(&self, watcher: i64) -> Option<i64> {
        let delivered = self.delivered();
        let waiting = self.outbox.waiting.lock();
        let flow = waiting.flows.get(&watcher)?;
        let idle = self.read.is_empty() && flow.queued == 0;
        (idle && flow.synced && flow.next <= delivered + 1).then_some(delivered)
    }

    /// Waits until the hub has given out more than up to `revision`.
    pub fn delivered_after(&self, revision: i64) -> impl Future<Output = ()> + use<> {
        let mut delivered = self.hub.delivered.subscribe();
        async move {
            if delivered.wait_for(|at| *at > revision).await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// The state's revision now.
    pub fn revision(&self) -> i64 {
        self.hub.store.read(|s| s.kv.revision())
    }

    /// Bytes in the queue.
    #[cfg(test)]
    pub(super) fn queued_bytes(&self) -> usize {
        self.outbox.waiting.lock().bytes
    }
}

/// What a watcher sees.
fn wants(shape: &Shape) -> Wants<'_> {
    Wants::Keys { key: &shape.key, range_end: &shape.range_end }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.watchers.is_empty() {
            return;
        }
        let mut state = self.hub.state.lock();
        for (watcher, at) in &self.watchers {
            state.index.remove(&at.shape, (self.number, *watcher));
        }
    }
}
