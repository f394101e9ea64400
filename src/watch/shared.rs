//! What the hub and the sessions share: how far the hub is, who is told of what, and slices of the history.
//!
//! Invariants: the position only grows; what lies before it was given to every watcher that was synced at that time, or is being given
//! to them; a watcher becomes synced only under the lock and only at or after the position. The hub finds the synced watchers alone, and
//! of these only those that begin soon: what it does for a revision is paid for by those who read what it gives.
//! Locks, in this order: this one, the store's or a queue's. Nothing is done for many watchers under this one: it is in slices.
//! Absent: the task that moves the position (`hub`), and the consumers (`session`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::index::{Index, MemberId, Shape};
use super::outbox::Outbox;
use crate::env::Env;
use crate::kv;
use crate::node::account::Account;
use crate::raft::Store;

/// Settings of the hub; see `config/quorate.toml` for each.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub stream_bytes_max: usize,
    pub stream_watchers_max: usize,
}

/// Events that are put together where others wait. More are a large deletion's.
pub(super) const SHORT_EVENTS: usize = 4096;
/// Revisions given out at once; apply waits for as long as it takes to read them, some tens of microseconds.
pub(super) const SLICE_REVISIONS_MAX: usize = 256;
/// Watchers that are added, or removed, while others wait for the lock: some tenths of a millisecond.
pub(super) const WATCHERS_AT_ONCE: usize = 256;

pub(super) struct Inner {
    pub(super) env: Env,
    pub(super) store: Arc<Store>,
    pub(super) options: Options,
    pub(super) account: Account,
    pub(super) state: Mutex<State>,
    /// Every event up to this revision is in the queue of each synced watcher that it concerns.
    pub(super) delivered: watch::Sender<i64>,
    /// True when the leader has been gone for too long.
    pub(super) leader_lost: watch::Sender<bool>,
    pub(super) sessions: AtomicU64,
    /// As of the users and roles by which sessions were asked to look last; see [`kv::Auth::stamp`].
    pub(super) auth: AtomicU64,
    pub(super) closed: CancellationToken,
}

/// Watchers by number, which began later than others.
pub(super) type Later = Vec<(i64, Arc<Outbox>)>;

pub(super) struct State {
    /// The next revision to give out.
    pub(super) position: i64,
    /// The state that the position is of.
    pub(super) generation: u64,
    /// Synced watchers: all but those that begin later.
    pub(super) index: Index<Arc<Outbox>>,
    /// Synced watchers that begin so far behind the position that no slice reaches them yet, by where they begin.
    later: BTreeMap<(i64, MemberId), (Arc<Shape>, Arc<Outbox>)>,
    /// All sessions that there are.
    pub(super) sessions: HashMap<u64, Arc<Outbox>>,
}

impl State {
    pub(super) fn new(position: i64, generation: u64) -> Self {
        Self { position, generation, index: Index::default(), later: BTreeMap::new(), sessions: HashMap::new() }
    }

    /// Whether there is nobody to tell.
    pub(super) fn is_idle(&self) -> bool {
        self.index.is_empty() && self.later.is_empty()
    }

    /// Adds a synced watcher that wants revisions from `next` on. The shape that is returned may be shared with others.
    pub(super) fn insert(&mut self, shape: &Arc<Shape>, next: i64, id: MemberId, outbox: Arc<Outbox>) -> Arc<Shape> {
        if next < self.soon() {
            return self.index.insert(shape, id, outbox);
        }
        self.later.insert((next, id), (shape.clone(), outbox));
        shape.clone()
    }

    /// Removes a watcher, if it is there, that was added with this `next`.
    pub(super) fn remove(&mut self, shape: &Shape, next: i64, id: MemberId) {
        if self.later.remove(&(next, id)).is_none() {
            self.index.remove(shape, id);
        }
    }

    /// Moves watchers that begin soon to the others; true if some are left.
    pub(super) fn admit(&mut self) -> bool {
        let soon = self.soon();
        for _ in 0..WATCHERS_AT_ONCE {
            let Some(first) = self.later.first_entry().filter(|first| first.key().0 < soon) else { return false };
            let ((_, id), (shape, outbox)) = first.remove_entry();
            self.index.insert(&shape, id, outbox);
        }
        true
    }

    /// Takes out everybody who begins at `last` or before, to be told that the hub has no more for them.
    pub(super) fn take_until(&mut self, last: i64) -> (Index<Arc<Outbox>>, Later) {
        let rest = self.later.split_off(&(last + 1, (u64::MIN, i64::MIN)));
        let later = std::mem::replace(&mut self.later, rest);
        let later = later.into_iter().map(|((_, id), (_, outbox))| (id.1, outbox)).collect();
        (std::mem::take(&mut self.index), later)
    }

    /// No slice that begins at the position reaches so far.
    fn soon(&self) -> i64 {
        self.position.saturating_add(SLICE_REVISIONS_MAX as i64)
    }
}

/// Revisions read from the state, and what the state was then.
pub(super) struct Slice {
    pub(super) revisions: Vec<kv::Revision>,
    /// The state's revision.
    pub(super) head: i64,
    pub(super) compacted: i64,
    /// Whether the history reached back to where the slice was to begin.
    pub(super) whole: bool,
    pub(super) generation: u64,
    /// What the users and roles were.
    pub(super) auth: u64,
    /// For previous versions, if they were asked for.
    pub(super) view: Option<kv::State>,
}

impl Slice {
    /// Whether it takes long to give its events out.
    pub(super) fn is_long(&self) -> bool {
        self.revisions.iter().map(|revision| revision.events().len()).sum::<usize>() > SHORT_EVENTS
    }
}

impl Inner {
    /// Reads from revision `from` on, at most so many revisions and about `bytes_max` of payload.
    pub(super) fn slice(&self, from: i64, revisions_max: usize, bytes_max: usize, wants_view: bool) -> Slice {
        self.store.read(|s| {
            let mut bytes = 0;
            let within = |revision: &kv::Revision| {
                let before = bytes;
                for event in revision.events() {
                    bytes += event.as_encoded().len();
                    if bytes > bytes_max {
                        break;
                    }
                }
                before <= bytes_max
            };
            Slice {
                revisions: s.kv.revisions_from(from).take(revisions_max).take_while(within).collect(),
                head: s.kv.revision(),
                compacted: s.kv.compacted(),
                whole: s.kv.holds_from(from),
                generation: self.store.generation(),
                auth: s.kv.auth().stamp(),
                view: wants_view.then(|| s.kv.clone()),
            }
        })
    }

    /// Tells whoever waits that every event up to `revision` was given out.
    pub(super) fn publish(&self, revision: i64) {
        self.delivered.send_if_modified(|at| std::mem::replace(at, revision) != revision);
    }
}
