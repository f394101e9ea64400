//! The one task that follows the state and gives each revision out, and the handle to it.
//!
//! Invariants: a slice is given out whole before the next is read, so revisions come to each queue in their order; whom a revision
//! concerns is gone through on a view of the index, and others have their turn every few hundred deliveries, however many it concerns.
//! Absent: what it shares with the sessions (`shared`), and the queues that it fills (`outbox`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::index::{Found, Sorted};
use super::outbox::Outbox;
use super::session::{Ended, Output, Session};
use super::shared::{Inner, Options, SHORT_EVENTS, SLICE_REVISIONS_MAX, Slice, State, WATCHERS_AT_ONCE};
use super::{Batches, Shape, bytes_of};
use crate::caller::Caller;
use crate::env::{Env, interval};
use crate::error::Error;
use crate::kv;
use crate::node::account::Account;
use crate::node::{Client, Node};
use crate::raft::Store;

/// Deliveries between two breaths of the hub: other tasks run on its thread too.
const DELIVERIES_MAX: usize = 512;
/// So many events of a revision take as long as a delivery.
const EVENTS_OF_DELIVERY: usize = 16;
/// Events of one revision that are looked up under the lock at once.
const LOOKED_UP_MAX: usize = 1024;

/// A handle to the hub; cloning shares it.
#[derive(Clone)]
pub struct Hub {
    pub(super) inner: Arc<Inner>,
}

impl Hub {
    /// Starts the hub on a state; it ends with `env`. What its consumers hold is charged to `account`.
    pub fn start(env: &Env, store: Arc<Store>, options: Options, account: Account) -> Self {
        let (position, generation) = store.read(|s| (s.kv.revision() + 1, store.generation()));
        let auth = store.read(|s| s.kv.auth().stamp());
        store.keep_history(position);
        let inner = Arc::new(Inner {
            env: env.clone(),
            store,
            options,
            state: Mutex::new(State::new(position, generation)),
            delivered: watch::Sender::new(position - 1),
            leader_lost: watch::Sender::new(false),
            account,
            sessions: AtomicU64::new(0),
            auth: AtomicU64::new(auth),
            closed: env.shutdown.child_token(),
        });
        env.spawn(run(inner.clone()));
        Self { inner }
    }

    /// Ends every session, now and from now on.
    pub fn close(&self) {
        self.inner.closed.cancel();
    }

    /// A consumer without watchers yet: `client` is charged for it, and it sees what `caller` may read.
    pub fn session(&self, client: &Client, caller: Caller) -> Session {
        Session::new(self.inner.clone(), self.inner.sessions.fetch_add(1, Ordering::Relaxed), client, caller)
    }

    /// Watchers of all sessions.
    pub fn watchers(&self) -> usize {
        self.inner.account.watchers.taken() as usize
    }

    /// Waits until `key` is deleted at revision `from` or later, and returns the revision that did it. Whoever wants to know of a
    /// deletion reads the key first, and asks from the revision after that of the read. Cheap for many at once.
    ///
    /// Errors: `Compacted` if the history does not reach back to `from` (read the key again), `Stopped` at the end of this
    /// member, `TooManyRequests` beyond the bound of watchers, and what refuses `caller`.
    pub async fn wait_deleted(&self, caller: Caller, key: Bytes, from: i64) -> Result<i64, Error> {
        let mut session = self.session(&Client::default(), caller);
        let shape = Shape { puts: false, ..Shape::of_key(key) };
        session.watch(0, &shape, from)?;
        loop {
            match session.next().await {
                Ok(Output::Events { batch, .. }) => return Ok(batch.revision),
                Ok(Output::Compacted { .. }) => return Err(Error::Compacted),
                Ok(Output::Denied { error, .. }) => return Err(error),
                Ok(Output::CaughtUp) => {}
                Err(Ended) => return Err(Error::Stopped),
            }
        }
    }

    /// Keeps watch over the leader: one that is gone for `patience` longer than it takes to notice is lost.
    pub fn follow_leader(&self, node: &Node, patience: Duration) {
        let (inner, node) = (self.inner.clone(), node.clone());
        node.env().clone().spawn(async move {
            let mut tick = interval(patience / 4);
            let mut missed = 0;
            loop {
                tokio::select! {
                    _ = tick.tick() => {}
                    () = inner.closed.cancelled() => return,
                }
                missed = if node.status().leader.is_some() { 0 } else { missed + 1 };
                inner.leader_lost.send_if_modified(|lost| std::mem::replace(lost, missed > 4) != (missed > 4));
            }
        });
    }

    /// Resolves while the leader is lost, as `node` sees it, or when the hub ends.
    pub async fn leader_lost(&self, node: &Node) {
        let mut lost = self.inner.leader_lost.subscribe();
        // One that has come back, or the first, may not have been noticed here yet: its clients are already let in.
        while lost.wait_for(|lost| *lost).await.is_ok() && node.status().leader.is_some() {
            let _ = lost.wait_for(|lost| !*lost).await;
        }
    }
}

async fn run(inner: Arc<Inner>) {
    let mut applied = inner.store.applied();
    loop {
        applied.borrow_and_update();
        if !advance(&inner).await {
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { break },
                () = inner.closed.cancelled() => break,
            }
        } else if inner.closed.is_cancelled() {
            break;
        }
    }
    inner.closed.cancel();
    inner.store.keep_history(i64::MAX);
}

/// Gives out one slice; false when there was nothing.
async fn advance(inner: &Inner) -> bool {
    while inner.state.lock().admit() {
        tokio::task::yield_now().await;
    }
    let (from, wants_prev) = {
        let mut state = inner.state.lock();
        if state.is_idle() {
            // Nobody to tell: go to where the next watcher begins.
            let (next, generation) = inner.store.read(|s| (s.kv.revision() + 1, inner.store.generation()));
            (state.position, state.generation) = (next, generation);
            inner.store.keep_history(next);
            drop(state);
            inner.publish(next - 1);
            return false;
        }
        (state.position, state.index.wants_prev())
    };
    let slice = inner.slice(from, SLICE_REVISIONS_MAX, inner.options.stream_bytes_max, wants_prev);
    let mut breath = Breath::default();
    if inner.auth.swap(slice.auth, Ordering::Relaxed) != slice.auth {
        // Before anything of this slice is given out.
        let sessions: Vec<Arc<Outbox>> = inner.state.lock().sessions.values().cloned().collect();
        for outbox in sessions {
            outbox.look_again();
            breath.spend(1).await;
        }
    }
    if slice.head < from {
        return false;
    }
    if !is_continued(inner, from, &slice, &mut breath).await {
        return true;
    }
    for revision in &slice.revisions {
        give(inner, &slice, revision, &mut breath).await;
        if breath.is_short() {
            inner.publish(revision.number());
            breath.take().await;
        }
    }
    if let Some(last) = slice.revisions.last() {
        inner.publish(last.number());
    }
    tokio::task::yield_now().await;
    true
}

/// When others are to have their turn.
#[derive(Default)]
struct Breath {
    deliveries: usize,
}

impl Breath {
    async fn spend(&mut self, deliveries: usize) {
        self.deliveries += deliveries;
        if self.deliveries >= DELIVERIES_MAX {
            self.take().await;
        }
    }

    /// Whether the turn is nearly over.
    fn is_short(&self) -> bool {
        self.deliveries >= DELIVERIES_MAX / 2
    }

    async fn take(&mut self) {
        self.deliveries = 0;
        tokio::task::yield_now().await;
    }
}

/// False if the history does not lead on from the position: then every synced watcher catches up from there by itself, and
/// those that cannot are told so.
async fn is_continued(inner: &Inner, from: i64, slice: &Slice, breath: &mut Breath) -> bool {
    let (generation, (index, later)) = {
        let mut state = inner.state.lock();
        // After a snapshot was installed, the compacted revision itself may lack its deletions.
        let replaced = slice.generation != state.generation;
        if slice.whole && !(replaced && from <= slice.compacted) {
            state.generation = slice.generation;
            return true;
        }
        let before = std::mem::replace(&mut state.generation, slice.generation);
        state.position = slice.head + 1;
        inner.store.keep_history(state.position);
        (before, state.take_until(slice.head))
    };
    for (watcher, outbox) in index.members().chain(later.iter().map(|(watcher, outbox)| (*watcher, outbox))) {
        outbox.fall_behind(watcher, from, generation);
        breath.spend(1).await;
    }
    inner.env.drop_large(index);
    inner.publish(slice.head);
    false
}

/// Gives one revision to all whom it concerns.
async fn give(inner: &Inner, slice: &Slice, revision: &kv::Revision, breath: &mut Breath) {
    let sort = || Sorted::new(revision.events());
    let events = if revision.events().len() > SHORT_EVENTS { inner.env.in_place(sort) } else { sort() };
    let mut part = events.part(0, LOOKED_UP_MAX);
    let (mut singles, ranges, wants_prev) = {
        let mut state = inner.state.lock();
        // It lies before the position from now on: who becomes synced meanwhile has it already.
        state.position = revision.number() + 1;
        inner.store.keep_history(state.position);
        (state.index.singles(&events, part.clone()), state.index.ranges(), state.index.wants_prev())
    };
    // The first who wants previous versions may have come after the slice was read.
    let late = (wants_prev && slice.view.is_none()).then(|| inner.store.read(|s| s.kv.clone()));
    let batches = Batches::new(revision, slice.view.as_ref().or(late.as_ref()));
    let mut giving =
        Giving { inner, generation: slice.generation, revision, events: &events, batches, fallen: Vec::new() };
    loop {
        for found in singles {
            giving.give(found, breath).await;
        }
        if part.end == events.len() {
            break;
        }
        breath.spend(part.len() / EVENTS_OF_DELIVERY).await;
        part = events.part(part.end, LOOKED_UP_MAX);
        singles = inner.state.lock().index.singles(&events, part.clone());
    }
    for found in ranges.stab(&events) {
        giving.give(found, breath).await;
    }
}

/// A revision that is given out.
struct Giving<'g> {
    inner: &'g Inner,
    /// The state's that the revision is of.
    generation: u64,
    revision: &'g kv::Revision,
    events: &'g Sorted<'g>,
    batches: Batches<'g>,
    /// Watchers that were found to have no room.
    fallen: Vec<i64>,
}

impl Giving<'_> {
    /// Gives a group its part of the revision, which is made when the first of it has room for it.
    async fn give(&mut self, found: Found<Arc<Outbox>>, breath: &mut Breath) {
        let places = found.places(self.events);
        breath.spend(places.len() / EVENTS_OF_DELIVERY).await;
        if places.is_empty() {
            return;
        }
        let shape = &*found.group.shape;
        let least = if places.len() > SHORT_EVENTS { bytes_of(self.revision, &places) } else { 0 };
        let mut made = None;
        let mut watchers = Vec::with_capacity(1);
        let mut members = found.group.members().peekable();
        // A session is locked and woken once for many of its watchers.
        while let Some(first) = members.next() {
            let (session, outbox) = (first.id.0, &first.kept);
            watchers.clear();
            watchers.push(first.id.1);
            while watchers.len() < WATCHERS_AT_ONCE
                && let Some(next) = members.next_if(|member| member.id.0 == session)
            {
                watchers.push(next.id.1);
            }
            if least > 0 && made.is_none() && !outbox.has_room(least) {
                outbox.pass_over(&watchers, self.revision.number(), self.generation, &mut self.fallen);
            } else {
                let make = || self.batches.get_in_place(&self.inner.env, &places, shape.prev_kv);
                let batch = made.get_or_insert_with(make);
                outbox.push(&watchers, batch, self.generation, &mut self.fallen);
            }
            self.forget_fallen(shape, session, outbox);
            breath.spend(watchers.len()).await;
        }
    }

    /// Who has fallen behind is not looked for any more, until it has caught up, as it may have by now.
    fn forget_fallen(&mut self, shape: &Shape, session: u64, outbox: &Outbox) {
        if self.fallen.is_empty() {
            return;
        }
        let mut state = self.inner.state.lock();
        for watcher in self.fallen.drain(..).filter(|watcher| !outbox.is_synced(*watcher)) {
            state.index.remove(shape, (session, watcher));
        }
    }
}
