//! One consumer of many watchers: what it takes from its queue, and what it reads from the history for those that are behind.
//!
//! Invariants: the session reads the history only when its queue is empty (or it would never be), and only as much as fits a quarter of
//! the bound of its stream, or one group's part of one revision if that is larger; that is charged before it is kept. So many watchers at
//! most catch up at once, in the order in which they fell behind, and the others of the stream wait for them: whatever is done for those
//! who catch up takes as long as for these, and one slice of the history is read for all of them.
//! Absent: the queue itself (`outbox`), and who fills it (`hub`).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::index::{Found, Index, Sorted};
use super::outbox::{Flow, Outbox, Queued, Waiting};
use super::shared::{Inner, Slice, WATCHERS_AT_ONCE};
use super::{Batch, Batches, Refused, Shape, bytes_of};
use crate::caller::Caller;
use crate::env::{planted, sleep};
use crate::error::Error;
use crate::kv::{self, Wants};
use crate::node::Client;
use crate::node::account::Taken;

/// Revisions read from the history at once: as many as etcd puts into a response.
const CATCH_UP_REVISIONS_MAX: usize = 1000;
/// Watchers of a session that catch up at once.
const CATCH_UP_WATCHERS_MAX: usize = 1024;
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
    /// As of when it became synced.
    next: i64,
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
    /// Charged for it, and for what was taken last.
    reserved: u64,
    /// Charged for what was taken from the queue last: its consumer makes a response of it.
    taken: u64,
    in_a_row: usize,
}

impl Session {
    pub(super) fn new(hub: Arc<Inner>, number: u64, client: &Client, caller: Caller) -> Self {
        // The rest of the bound is for what is read from the history.
        let bytes_max = hub.options.stream_bytes_max / 4 * 3;
        let charged = hub.account.answers.nothing(client);
        let outbox = Arc::new(Outbox::new(bytes_max, charged));
        hub.state.lock().sessions.insert(number, outbox.clone());
        // After that: who is not told of a change of users and roles sees it here.
        let auth = hub.store.read(|s| s.kv.auth().stamp());
        Self {
            hub,
            number,
            outbox,
            client: client.clone(),
            caller,
            auth,
            watchers: HashMap::new(),
            behind: BTreeMap::new(),
            behind_index: Index::default(),
            read: VecDeque::new(),
            reserved: 0,
            taken: 0,
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
        let synced = next >= state.position;
        // The present state's: who begins at the compacted revision gets what is left of it.
        let generation = self.hub.store.generation();
        {
            let mut waiting = self.outbox.waiting.lock();
            waiting.flows.insert(watcher, Flow { next, synced, generation, queued: 0 });
            waiting.behind.extend((!synced).then_some(watcher));
        }
        let mut shape = Arc::new(shape.clone());
        if synced {
            shape = state.insert(&shape, next, (self.number, watcher), self.outbox.clone());
        }
        drop(state);
        self.watchers.insert(watcher, Watcher { shape, next, _place: place, _bytes: bytes });
        Ok(Created { revision })
    }

    /// Ends a watcher; false if there is none of that number. What waits for it is dropped.
    pub fn cancel(&mut self, watcher: i64) -> bool {
        self.watchers.contains_key(&watcher) && {
            self.end(&[watcher]);
            true
        }
    }

    /// Ends watchers that there are, all of them in one pass.
    fn end(&mut self, watchers: &[i64]) {
        if watchers.is_empty() {
            return;
        }
        for part in watchers.chunks(WATCHERS_AT_ONCE) {
            let mut state = self.hub.state.lock();
            for watcher in part {
                let Some(Watcher { shape, next, .. }) = self.watchers.remove(watcher) else { continue };
                state.remove(&shape, next, (self.number, *watcher));
                if self.behind.remove(watcher).is_some() {
                    self.behind_index.remove(&shape, (0, *watcher));
                }
            }
        }
        let ended: HashSet<i64> = watchers.iter().copied().collect();
        let mut waiting = self.outbox.waiting.lock();
        let flows: Vec<Flow> = watchers.iter().filter_map(|watcher| waiting.flows.remove(watcher)).collect();
        if flows.iter().any(|flow| !flow.synced) {
            waiting.behind.retain(|watcher| !ended.contains(watcher));
        }
        if flows.iter().any(|flow| flow.queued > 0) {
            let (mut freed, mut charged) = (0, 0);
            waiting.queue.retain(|queued| {
                let keep = !ended.contains(&queued.watcher);
                if !keep {
                    freed += queued.batch.bytes;
                    charged += queued.charged;
                }
                keep
            });
            waiting.bytes -= freed;
            self.outbox.charged.shrink(charged);
        }
        drop(waiting);
        self.read.retain(|output| !matches!(output, Output::Events { watcher, .. } if ended.contains(watcher)));
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
                if !self.catch_up().await {
                    self.release();
                    sleep(ROOM_RETRY).await;
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
        self.release();
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
                self.taken = charged;
                if let Some(flow) = waiting.flows.get_mut(&watcher) {
                    flow.queued -= 1;
                }
                return Some(Output::Events { watcher, batch });
            }
        }
        self.in_a_row = 0;
        if !waiting.behind.is_empty() {
            drop(waiting);
            let outbox = self.outbox.clone();
            self.begin_catching_up(&mut outbox.waiting.lock());
        }
        None
    }

    /// Those who fell behind first catch up first. Of whom something is in the queue still, that comes before.
    fn begin_catching_up(&mut self, waiting: &mut Waiting) {
        for _ in 0..waiting.behind.len().min(CATCH_UP_WATCHERS_MAX) {
            if self.behind.len() >= CATCH_UP_WATCHERS_MAX {
                return;
            }
            let Some(watcher) = waiting.behind.pop_front() else { return };
            let flow = &waiting.flows[&watcher];
            if flow.queued > 0 {
                waiting.behind.push_back(watcher);
                continue;
            }
            self.behind.insert(watcher, Behind { next: flow.next, generation: flow.generation });
            self.behind_index.insert(&self.watchers[&watcher].shape, (0, watcher), ());
        }
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

    /// Reads a slice of the history; false if there is no room for what is in it.
    async fn catch_up(&mut self) -> bool {
        if self.behind.is_empty() {
            // All of them have something in the queue, which comes before.
            return true;
        }
        if !self.reserve(self.slice_bytes() as u64) {
            return false;
        }
        let Some((from, slice)) = self.read_history() else { return true };
        if !slice.is_long() {
            return self.take(from, &slice);
        }
        // While it waits for its turn it holds nothing: no room, and no view.
        drop(slice);
        self.release();
        let (env, asker) = (self.hub.env.clone(), self.client.asker());
        env.in_place_for(asker, || self.read_history().is_none_or(|(from, slice)| self.take(from, &slice))).await
    }

    /// Room for so much in all, until all of it was taken.
    fn reserve(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.reserved);
        let fits = more == 0 || self.outbox.charged.grow(more).is_ok();
        self.reserved += if fits { more } else { 0 };
        fits
    }

    /// What was taken has left, and what was read was taken.
    fn release(&mut self) {
        let charged = std::mem::take(&mut self.reserved) + std::mem::take(&mut self.taken);
        if charged > 0 {
            self.outbox.charged.shrink(charged);
        }
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

    /// Gives what was read to those behind, and hands over who has all of it. False if there was no room for any of it.
    fn take(&mut self, from: i64, slice: &Slice) -> bool {
        if slice.auth != self.auth {
            self.end_denied();
        }
        self.drop_compacted(slice);
        let mut reading = Reading::default();
        let mut next = slice.revisions.first().map_or(slice.head + 1, |r| r.number().max(from));
        for revision in &slice.revisions {
            if planted!("watch-skips-hand-over") && revision.number() == slice.head && slice.revisions.len() > 1 {
                next = slice.head + 1;
                break;
            }
            if !self.take_revision(revision, slice.view.as_ref(), &mut reading) {
                break;
            }
            next = revision.number() + 1;
            if reading.bytes >= self.slice_bytes() {
                break;
            }
        }
        let is_stuck = reading.had_no_room && reading.found.is_empty();
        // A watcher's revisions stand together, so that they can leave together.
        for (watcher, batches) in reading.found {
            self.read.extend(batches.into_iter().map(|batch| Output::Events { watcher, batch }));
        }
        for behind in self.behind.values_mut() {
            behind.next = behind.next.max(next);
        }
        if next > slice.head {
            self.hand_over(next);
        }
        !is_stuck
    }

    /// Gives a revision to those behind who lack it; false if for some of them there is no more room.
    fn take_revision(&mut self, revision: &kv::Revision, view: Option<&kv::State>, reading: &mut Reading) -> bool {
        let events = Sorted::new(revision.events());
        let ranges = self.behind_index.ranges();
        let singles = self.behind_index.singles(&events, 0..events.len());
        let mut batches = Batches::new(revision, view);
        singles
            .into_iter()
            .chain(ranges.stab(&events))
            .all(|found| self.take_group(&found, &events, revision, &mut batches, reading))
    }

    /// As [`Self::take_revision`], of one group.
    fn take_group(
        &mut self,
        found: &Found<()>,
        events: &Sorted<'_>,
        revision: &kv::Revision,
        batches: &mut Batches<'_>,
        reading: &mut Reading,
    ) -> bool {
        let lacks = |behind: &Behind| behind.next <= revision.number();
        let lacking = found.group.members().map(|member| member.id.1).filter(|w| lacks(&self.behind[w]));
        let lacking: Vec<i64> = lacking.collect();
        let places = if lacking.is_empty() { Vec::new() } else { found.places(events) };
        if places.is_empty() {
            return true;
        }
        let prev_kv = found.group.shape.prev_kv;
        let batch = if let Some(shared) = batches.made(&places, prev_kv) {
            shared
        } else if reading.cost >= self.slice_bytes() as u64 {
            return false;
        } else {
            // Room before it is made, and again when it is: only then previous versions are known.
            let has_room = self.reserve(reading.cost + self.outbox.cost(bytes_of(revision, &places)));
            let batch = has_room.then(|| batches.get(&places, prev_kv));
            let Some(batch) = batch.filter(|b| self.reserve(reading.cost + self.outbox.cost(b.bytes))) else {
                reading.had_no_room = true;
                return false;
            };
            reading.cost += self.outbox.cost(batch.bytes);
            batch
        };
        for watcher in lacking {
            reading.bytes += batch.bytes;
            reading.found.entry(watcher).or_default().push(batch.clone());
            if let Some(behind) = self.behind.get_mut(&watcher) {
                behind.next = revision.number() + 1;
            }
        }
        true
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
        self.end(&denied.iter().map(|(watcher, _)| *watcher).collect::<Vec<_>>());
        self.read.extend(denied.into_iter().map(|(watcher, error)| Output::Denied { watcher, error }));
    }

    fn drop_compacted(&mut self, slice: &Slice) {
        let is_lost = |b: &Behind| {
            // See `hub::is_continued`.
            b.next < slice.compacted || (b.generation != slice.generation && b.next <= slice.compacted)
        };
        let lost: Vec<i64> = self.behind.iter().filter(|(_, b)| is_lost(b)).map(|(w, _)| *w).collect();
        self.end(&lost);
        let compacted = slice.compacted;
        self.read.extend(lost.into_iter().map(|watcher| Output::Compacted { watcher, compacted }));
        for behind in self.behind.values_mut() {
            behind.generation = slice.generation;
        }
    }

    /// Those who have read all that the hub has given out so far go on with the hub.
    fn hand_over(&mut self, read_to: i64) {
        while !self.behind.is_empty() {
            let mut state = self.hub.state.lock();
            if read_to < state.position {
                // The hub is ahead; the next slice is short.
                return;
            }
            let mut waiting = self.outbox.waiting.lock();
            for _ in 0..WATCHERS_AT_ONCE {
                let Some((watcher, Behind { next, .. })) = self.behind.pop_first() else { break };
                let flow = waiting.flows.get_mut(&watcher).expect("a watcher that catches up has a flow");
                (flow.next, flow.synced) = (next, true);
                let of = self.watchers.get_mut(&watcher).expect("a watcher that catches up is there");
                self.behind_index.remove(&of.shape, (0, watcher));
                of.next = next;
                of.shape = state.insert(&of.shape, next, (self.number, watcher), self.outbox.clone());
            }
            drop(waiting);
            MutexGuard::unlock_fair(state);
        }
        if self.outbox.waiting.lock().behind.is_empty() {
            self.read.push_back(Output::CaughtUp);
        }
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

    /// Whether something waits that was read from the history.
    pub fn has_read(&self) -> bool {
        !self.read.is_empty()
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

    /// Whether anything waits in the queue.
    #[cfg(test)]
    pub(super) fn outbox_is_filled(&self) -> bool {
        !self.outbox.waiting.lock().queue.is_empty()
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

/// What was found in a slice of the history.
#[derive(Default)]
struct Reading {
    found: BTreeMap<i64, Vec<Arc<Batch>>>,
    /// As often as it is to be sent.
    bytes: usize,
    /// Of what is kept.
    cost: u64,
    had_no_room: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.state.lock().sessions.remove(&self.number);
        let (hub, number) = (self.hub.clone(), self.number);
        let mut watchers = std::mem::take(&mut self.watchers);
        remove_some(&hub, number, &mut watchers);
        if watchers.is_empty() {
            return;
        }
        // What is left, where others have their turns in between.
        let rest = async move {
            while !watchers.is_empty() {
                remove_some(&hub, number, &mut watchers);
                tokio::task::yield_now().await;
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(_) => drop(self.hub.env.spawn(rest)),
            Err(_) => tracing::debug!("the last watchers end with the member"),
        }
    }
}

/// Removes some watchers of a session that has ended.
fn remove_some(hub: &Inner, session: u64, watchers: &mut HashMap<i64, Watcher>) {
    // Not `drain`, which would drop the others too.
    let some: Vec<(i64, Watcher)> = watchers.extract_if(|_, _| true).take(WATCHERS_AT_ONCE).collect();
    let mut state = hub.state.lock();
    for (number, watcher) in &some {
        state.remove(&watcher.shape, watcher.next, (session, *number));
    }
}
