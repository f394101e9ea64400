//! The one task that follows the state and gives each revision out, and the handle to it.
//!
//! Invariant: a slice is given out whole before the next is read, so revisions come to each queue in their order.
//! Absent: what it shares with the sessions (`shared`), and the queues that it fills (`outbox`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::index::Index;
use super::outbox::Outbox;
use super::session::{Ended, Output, Session};
use super::shared::{Inner, Options, Slice, State};
use super::{Batch, Batches, Shape};
use crate::caller::Caller;
use crate::env::{Env, interval};
use crate::error::Error;
use crate::node::account::Account;
use crate::node::{Client, Node};
use crate::raft::Store;

/// Revisions given out at once; apply waits for as long as it takes to read them, some tens of microseconds.
const SLICE_REVISIONS_MAX: usize = 256;
/// Deliveries between two breaths of the hub: other tasks run on its thread too.
const DELIVERIES_MAX: usize = 512;

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
            state: Mutex::new(State { position, generation, index: Index::default() }),
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

/// What one group gets of one revision.
struct Delivery {
    /// Which of the slice's revisions.
    revision: usize,
    places: Vec<u32>,
    prev_kv: bool,
    members: Vec<(i64, Arc<Outbox>)>,
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
    let (from, wants_prev) = {
        let mut state = inner.state.lock();
        if state.index.is_empty() {
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
    if inner.auth.swap(slice.auth, Ordering::Relaxed) != slice.auth {
        // Before anything of this slice is given out.
        inner.state.lock().index.members().for_each(|(_, outbox)| outbox.look_again());
    }
    if slice.head < from {
        return false;
    }
    if !is_continued(inner, from, &slice) {
        return true;
    }
    let mut at = 0;
    while at < slice.revisions.len() {
        let from = at;
        let work = || {
            let (deliveries, next) = collect(inner, &slice, from);
            (make(&slice, deliveries), next)
        };
        let (made, next) = if slice.is_long() { inner.env.in_place(work).await } else { work() };
        at = next;
        give(made, slice.generation).await;
        inner.publish(slice.revisions[at - 1].number());
        tokio::task::yield_now().await;
    }
    true
}

/// False if the history does not lead on from the position: then every synced watcher catches up from there by itself, and
/// those that cannot are told so.
fn is_continued(inner: &Inner, from: i64, slice: &Slice) -> bool {
    let mut state = inner.state.lock();
    // After a snapshot was installed, the compacted revision itself may lack its deletions.
    let replaced = slice.generation != state.generation;
    if slice.whole && !(replaced && from <= slice.compacted) {
        state.generation = slice.generation;
        return true;
    }
    for (watcher, outbox) in state.index.members() {
        outbox.fall_behind(watcher, from, state.generation);
    }
    state.position = slice.head + 1;
    state.generation = slice.generation;
    inner.store.keep_history(state.position);
    drop(state);
    inner.publish(slice.head);
    false
}

/// Who gets what of the slice's revisions from place `at` on; stops after so many deliveries, and says where. From then on they
/// lie before the position.
fn collect(inner: &Inner, slice: &Slice, at: usize) -> (Vec<Delivery>, usize) {
    let mut deliveries = Vec::new();
    let mut count = 0;
    let mut next = at;
    let mut state = inner.state.lock();
    for (revision, events) in slice.revisions.iter().enumerate().skip(at) {
        for found in state.index.matches(events.events()) {
            let members: Vec<_> = found.group.members().map(|(watcher, outbox)| (watcher, outbox.clone())).collect();
            count += members.len();
            let prev_kv = found.group.shape.prev_kv;
            deliveries.push(Delivery { revision, places: found.events, prev_kv, members });
        }
        next = revision + 1;
        if count >= DELIVERIES_MAX {
            break;
        }
    }
    state.position = slice.revisions[next - 1].number() + 1;
    inner.store.keep_history(state.position);
    (deliveries, next)
}

/// A batch, and who gets it: members stand by session.
type Made = (Arc<Batch>, Vec<(i64, Arc<Outbox>)>);

fn make(slice: &Slice, deliveries: Vec<Delivery>) -> Vec<Made> {
    let mut made = Vec::with_capacity(deliveries.len());
    let mut rest = deliveries.into_iter().peekable();
    while let Some(first) = rest.peek() {
        let revision = first.revision;
        let mut batches = Batches::new(&slice.revisions[revision], slice.view.as_ref());
        while let Some(delivery) = rest.next_if(|d| d.revision == revision) {
            made.push((batches.get(&delivery.places, delivery.prev_kv), delivery.members));
        }
    }
    made
}

async fn give(made: Vec<Made>, generation: u64) {
    let mut count = 0;
    for (batch, members) in made {
        // A session is locked and woken once for all of its watchers.
        for members in members.chunk_by(|a, b| Arc::ptr_eq(&a.1, &b.1)) {
            let outbox = &members[0].1;
            outbox.push(members.iter().map(|(watcher, _)| *watcher), &batch, generation);
            count += members.len();
            if count >= DELIVERIES_MAX {
                count = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}
