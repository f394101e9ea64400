//! The watch hub: tells watchers what was applied.
//!
//! The state's history is the queue: the [`Hub`] wakes when something was applied, reads the new revisions from it and gives
//! each to the sessions whose watchers it concerns, once, put together once a shape. Neither apply nor a writer ever waits for it.
//! A [`Session`] is one consumer of many watchers: a client's stream, or a waiter inside this process.
//!
//! A watcher is *synced* (the hub gives it events) or *catching up* (its session reads them from the history, in slices, when its
//! consumer asks for more). It is handed over when the history that it has read reaches to where the hub is; a consumer whose
//! queue is full goes back to catching up. Invariants, of each watcher: its events come in order, all of a revision at once,
//! none twice and none left out; what waits for a consumer is bounded; nobody waits for a slow one.
//! A watcher is made for who may read what it watches, and ends when that one may not any more: users and roles are looked at again
//! before the first revision after they have changed is given out.
//! Absent: the wire (`api::watch`), and the rules of permissions (`kv::auth`).

mod hub;
mod index;
mod outbox;
mod session;
mod shared;
#[cfg(test)]
mod tests;
mod tree;

use std::sync::Arc;

use crate::env::Env;
use crate::error::Error;
use crate::kv;
use crate::pb::{Event, EventType, KeyValue};

pub use hub::Hub;
pub use index::Shape;
pub use session::{Created, Ended, Output, Session};
pub use shared::Options;

/// Events of one revision, in their order. Watchers share it; the versions in it are shared with the state.
#[derive(Debug, PartialEq)]
pub struct Batch {
    pub revision: i64,
    pub events: Vec<Event>,
    bytes: usize,
}

impl Batch {
    /// What it counts for where bytes are bounded.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes those of `revision` at `places`. `view` is what previous versions are looked up in, where they are wanted.
    fn new(revision: &kv::Revision, places: &[u32], view: Option<&kv::State>) -> Arc<Self> {
        let mut bytes = 0;
        let events = places.iter().map(|place| {
            let kv = &revision.events()[*place as usize];
            let event = event(kv, view);
            bytes += EVENT_OVERHEAD_BYTES + kv.as_encoded().len();
            bytes += event.prev_kv.as_ref().map_or(0, |prev| prev.as_encoded().len());
            event
        });
        let events = events.collect();
        Arc::new(Self { revision: revision.number(), events, bytes })
    }
}

/// At least what a batch of these will count for: previous versions are not looked up.
fn bytes_of(revision: &kv::Revision, places: &[u32]) -> usize {
    places.iter().map(|place| EVENT_OVERHEAD_BYTES + revision.events()[*place as usize].as_encoded().len()).sum()
}

/// What an event takes in a queue beside its versions.
const EVENT_OVERHEAD_BYTES: usize = 64;

fn event(kv: &KeyValue, view: Option<&kv::State>) -> Event {
    let kind = if kv.is_tombstone() { EventType::Delete } else { EventType::Put };
    Event { r#type: kind.into(), kv: Some(kv.clone()), prev_kv: view.and_then(|view| view.version_before(kv)) }
}

/// To look up what was before an event takes about so many times as long as the event itself.
const PREV_FACTOR: usize = 4;

/// Makes each batch of a revision once, however many groups get the same.
struct Batches<'r> {
    revision: &'r kv::Revision,
    view: Option<&'r kv::State>,
    /// All events of the revision, without and with previous versions.
    whole: [Option<Arc<Batch>>; 2],
}

impl<'r> Batches<'r> {
    fn new(revision: &'r kv::Revision, view: Option<&'r kv::State>) -> Self {
        Self { revision, view, whole: [None, None] }
    }

    /// As [`Self::get`], by the hub, which gives way if it takes long.
    fn get_in_place(&mut self, env: &Env, places: &[u32], prev_kv: bool) -> Arc<Batch> {
        let events = if prev_kv { PREV_FACTOR * places.len() } else { places.len() };
        match self.made(places, prev_kv) {
            Some(made) => made,
            None if events > shared::SHORT_EVENTS => env.in_place(|| self.get(places, prev_kv)),
            None => self.get(places, prev_kv),
        }
    }

    /// One that was made already.
    fn made(&self, places: &[u32], prev_kv: bool) -> Option<Arc<Batch>> {
        let is_whole = places.len() == self.revision.events().len();
        self.whole[usize::from(prev_kv)].clone().filter(|_| is_whole)
    }

    fn get(&mut self, places: &[u32], prev_kv: bool) -> Arc<Batch> {
        let view = self.view.filter(|_| prev_kv);
        if places.len() < self.revision.events().len() {
            return Batch::new(self.revision, places, view);
        }
        self.whole[usize::from(prev_kv)].get_or_insert_with(|| Batch::new(self.revision, places, view)).clone()
    }
}

/// Why a watcher was not made; the texts are etcd's where it has one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("mvcc: watcher range is empty")]
    EmptyRange,
    #[error("mvcc: duplicate watch ID provided on the WatchStream")]
    DuplicateId,
    #[error("etcdserver: too many requests")]
    TooMany,
    #[error("{0}")]
    Denied(Error),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Denied(error) => error,
            Refused::TooMany => Self::TooManyRequests,
            Refused::EmptyRange | Refused::DuplicateId => Self::InvalidRequest(refused.to_string()),
        }
    }
}
