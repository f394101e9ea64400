//! The events of every uncompacted revision, in order.
//!
//! Invariant: revisions are consecutive, and each has at least one event. Cloning is cheap; the versions are shared with
//! the index.

use std::sync::Arc;

use imbl::Vector;

use crate::pb::KeyValue;

/// A version that was written, and which one it superseded.
#[derive(Clone)]
pub(super) struct Event {
    pub kv: KeyValue,
    /// The revision of the key's version before; 0 if there was none, or if it was of this very revision.
    pub before: i64,
}

/// What one revision changed. Most revisions are one put.
#[derive(Clone)]
pub(super) enum Events {
    One(Event),
    Many(Arc<Many>),
}

/// The fields of several events, in their order.
pub(super) struct Many {
    kvs: Box<[KeyValue]>,
    before: Box<[i64]>,
}

impl Events {
    /// Of what was written in one revision; leaves nothing of it.
    pub(super) fn take(written: &mut Vec<Event>) -> Self {
        if written.len() > 1 {
            let (kvs, before): (Vec<_>, Vec<_>) =
                std::mem::take(written).into_iter().map(|event| (event.kv, event.before)).unzip();
            return Events::Many(Arc::new(Many { kvs: kvs.into(), before: before.into() }));
        }
        Events::One(written.pop().expect("a revision has at least one event"))
    }

    pub(super) fn as_slice(&self) -> &[KeyValue] {
        match self {
            Events::One(event) => std::slice::from_ref(&event.kv),
            Events::Many(many) => &many.kvs,
        }
    }

    /// The last version of `key` that the revision made, a tombstone included. Visits its events.
    pub(super) fn last_of(&self, key: &[u8]) -> Option<&KeyValue> {
        self.as_slice().iter().rfind(|kv| kv.key() == key)
    }

    /// The revision of the version of `key` before this revision; 0 if there was none. Visits its events.
    pub(super) fn before(&self, key: &[u8]) -> i64 {
        match self {
            Events::One(event) => event.before,
            // Only the first event of a key has one.
            Events::Many(many) => many.kvs.iter().position(|kv| kv.key() == key).map_or(0, |i| many.before[i]),
        }
    }

    /// [`Event::before`] of the event at this position.
    pub(super) fn before_at(&self, position: usize) -> i64 {
        match self {
            Events::One(event) => event.before,
            Events::Many(many) => many.before[position],
        }
    }

    /// Whether a later event of the same revision is about the same key.
    pub(super) fn is_overwritten(&self, position: usize) -> bool {
        let kvs = self.as_slice();
        kvs[position + 1..].iter().any(|later| later.key() == kvs[position].key())
    }

    fn overhead_bytes(&self) -> u64 {
        let many = match self {
            Events::One(_) => 0,
            Events::Many(many) => 16 + size_of::<Many>() + size_of_val(&many.kvs[..]) + size_of_val(&many.before[..]),
        };
        (size_of::<Self>() + many) as u64
    }
}

/// One revision with its events, in their order; a deletion is a tombstone. Cloning is a reference count.
#[derive(Clone)]
pub struct Revision {
    number: i64,
    events: Events,
}

impl Revision {
    pub fn number(&self) -> i64 {
        self.number
    }

    pub fn events(&self) -> &[KeyValue] {
        self.events.as_slice()
    }
}

#[derive(Clone)]
pub(super) struct History {
    first: i64,
    revisions: Vector<Events>,
    /// What the lists take beside the versions, which are counted where the index holds them.
    overhead_bytes: u64,
}

impl History {
    /// Expects `first` as the next revision.
    pub(super) fn new(first: i64) -> Self {
        Self { first, revisions: Vector::new(), overhead_bytes: 0 }
    }

    /// The oldest revision held, or if there is none, the next one.
    pub(super) fn first(&self) -> i64 {
        self.first
    }

    pub(super) fn next(&self) -> i64 {
        self.first + self.revisions.len() as i64
    }

    pub(super) fn overhead_bytes(&self) -> u64 {
        self.overhead_bytes
    }

    /// Adds the events of revision [`Self::next`].
    pub(super) fn push(&mut self, events: Events) {
        self.overhead_bytes += events.overhead_bytes();
        self.revisions.push_back(events);
    }

    pub(super) fn get(&self, revision: i64) -> Option<&Events> {
        self.revisions.get(usize::try_from(revision - self.first).ok()?)
    }

    /// Every revision from `revision` on that is held, with its events.
    pub(super) fn iter_from(&self, revision: i64) -> impl Iterator<Item = (i64, &[KeyValue])> {
        self.held_from(revision).map(|(revision, events)| (revision, events.as_slice()))
    }

    /// As [`Self::iter_from`], for who keeps them.
    pub(super) fn revisions_from(&self, revision: i64) -> impl Iterator<Item = Revision> {
        self.held_from(revision).map(|(number, events)| Revision { number, events: events.clone() })
    }

    fn held_from(&self, revision: i64) -> impl Iterator<Item = (i64, &Events)> {
        let first = revision.clamp(self.first, self.next());
        let held = self.revisions.focus().narrow((first - self.first) as usize..);
        (first..).zip(held)
    }

    pub(super) fn pop_first(&mut self) {
        if let Some(events) = self.revisions.pop_front() {
            self.overhead_bytes -= events.overhead_bytes();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn a_revision_of_one_event_takes_no_memory_of_its_own() {
        assert_eq!(size_of::<Events>(), size_of::<Event>());
    }

    #[test]
    fn it_is_a_queue_that_can_be_read_anywhere() {
        let mut random = fastrand::Rng::with_seed(3);
        let (mut history, mut queue) = (History::new(2), VecDeque::new());
        let mut view = (history.clone(), queue.clone());
        for step in 0..100_000 {
            // Grows, then shrinks, three times.
            if random.u8(..3) != 0 || step / 16_384 % 2 == 0 {
                let revision = history.next();
                let event = Event { kv: KeyValue::tombstone(b"k", revision), before: 0 };
                history.push(Events::take(&mut vec![event; if revision % 7 == 0 { 2 } else { 1 }]));
                queue.push_back(revision);
            } else if queue.pop_front().is_some() {
                history.pop_first();
                if random.bool() && queue.pop_front().is_some() {
                    history.pop_first();
                }
            }
            if step % 64 == 0 {
                let from = random.usize(..=queue.len());
                let seen = history.iter_from(history.first() + from as i64).take(100).map(|(revision, events)| {
                    assert_eq!(events.len(), if revision % 7 == 0 { 2 } else { 1 });
                    assert_eq!(events[0].mod_revision(), revision);
                    revision
                });
                assert!(seen.eq(queue.range(from..).copied().take(100)));
            }
            if step % 4096 == 0 {
                assert!(view.0.iter_from(0).map(|x| x.0).eq(view.1.iter().copied()), "a clone changed");
                view = (history.clone(), queue.clone());
            }
        }
        while queue.pop_front().is_some() {
            history.pop_first();
        }
        assert_eq!((history.overhead_bytes(), history.first()), (0, history.next()));
    }
}
