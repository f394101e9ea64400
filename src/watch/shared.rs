//! What the hub and the sessions share: how far the hub is, who is told of what, and slices of the history.
//!
//! Invariants: the position only grows; what lies before it was given to every watcher that was synced at that time, or is in
//! one of the queues; a watcher becomes synced only under the lock and only at or after the position.
//! Locks, in this order: this one, the store's or a queue's.
//! Absent: the task that moves the position (`hub`), and the consumers (`session`).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::index::Index;
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

/// Events of a slice that are given out at once. More are a large deletion's.
const SHORT_EVENTS: usize = 4096;

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

pub(super) struct State {
    /// The next revision to give out.
    pub(super) position: i64,
    /// The state that the position is of.
    pub(super) generation: u64,
    /// Every watcher, synced or not: who is not ignores what it is given.
    pub(super) index: Index<Arc<Outbox>>,
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
