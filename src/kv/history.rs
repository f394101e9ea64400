//! The events of every uncompacted revision, in order.
//!
//! Invariant: revisions are consecutive, and each has at least one event. Cloning is cheap; the versions are shared with
//! the index. A version that was overwritten in its own revision is held here alone, and is counted here.
//!
//! One request may make a revision of any number of events, and who reads the past asks that revision for each of its keys. So
//! whoever asks for a key finds its events in O(log n), however many there are.

use std::ops::Range;
use std::sync::Arc;

use imbl::Vector;

use crate::pb::KeyValue;

/// What a version takes beside its encoding: the reference counts and the allocator's rounding. Measured with the slots of the index: a
/// million keys of 256 bytes take 1.40 times their payload, history included.
pub(super) const VERSION_OVERHEAD_BYTES: usize = 16 + 16;
/// What the lists of several events take beside what each event has in them.
const MANY_BYTES: usize = 16 + size_of::<Many>();
/// What an event has in them at most.
const LISTED_BYTES: usize = size_of::<KeyValue>() + size_of::<i64>() + size_of::<u32>();
/// What an event takes beside its version, at most: a revision of two has the fewest to share what it takes.
pub(super) const EVENT_BYTES_MAX: usize = (size_of::<Events>() + MANY_BYTES).div_ceil(2) + LISTED_BYTES;

/// What a version takes.
pub(super) fn cost(kv: &KeyValue) -> u64 {
    (kv.as_encoded().len() + VERSION_OVERHEAD_BYTES) as u64
}

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

/// Several events, in their order and in the order of their keys.
pub(super) struct Many {
    /// The fields of the events, each for itself.
    kvs: Box<[KeyValue]>,
    before: Box<[i64]>,
    /// The positions of the events by key; those of one key in their order. Empty if that is the order in which they are:
    /// so it is for what one request deletes.
    by_key: Box<[u32]>,
    /// What versions take that a later event of this revision has overwritten: nothing else holds them.
    overwritten_bytes: u64,
}

impl Many {
    fn new(written: Vec<Event>) -> Self {
        let (kvs, before): (Vec<_>, Vec<_>) = written.into_iter().map(|event| (event.kv, event.before)).unzip();
        let (mut by_key, mut overwritten_bytes) = (Vec::new(), 0);
        // Nearly always each key has one event, and they are in order.
        if !kvs.is_sorted_by(|one, next| one.key() < next.key()) {
            let events = u32::try_from(kvs.len()).expect("the events of a revision fit in memory many times");
            by_key.extend(0..events);
            by_key.sort_by_key(|&position| kvs[position as usize].key());
            let pairs = by_key.windows(2).map(|pair| (&kvs[pair[0] as usize], &kvs[pair[1] as usize]));
            overwritten_bytes = pairs.filter(|(one, next)| one.key() == next.key()).map(|(one, _)| cost(one)).sum();
            if by_key.is_sorted() {
                by_key = Vec::new();
            }
        }
        Self { kvs: kvs.into(), before: before.into(), by_key: by_key.into(), overwritten_bytes }
    }

    /// The positions of the first and the last event of `key`.
    fn of(&self, key: &[u8]) -> Option<(usize, usize)> {
        let position = |rank: usize| self.by_key.get(rank).map_or(rank, |&position| position as usize);
        let key_at = |rank: usize| self.kvs[position(rank)].key();
        let first = partition_point(0..self.kvs.len(), |rank| key_at(rank) < key);
        if first == self.kvs.len() || key_at(first) != key {
            return None;
        }
        // Nearly always there is one.
        let is_last = first + 1 == self.kvs.len() || key_at(first + 1) != key;
        let behind =
            if is_last { first + 1 } else { partition_point(first..self.kvs.len(), |rank| key_at(rank) == key) };
        Some((position(first), position(behind - 1)))
    }
}

/// The first number of `range` that does not pass; those that pass come first.
fn partition_point(range: Range<usize>, passes: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low + (high - low) / 2;
        if passes(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

impl Events {
    /// Of what was written in one revision; leaves nothing of it.
    pub(super) fn take(written: &mut Vec<Event>) -> Self {
        if written.len() > 1 {
            return Events::Many(Arc::new(Many::new(std::mem::take(written))));
        }
        Events::One(written.pop().expect("a revision has at least one event"))
    }

    pub(super) fn as_slice(&self) -> &[KeyValue] {
        match self {
            Events::One(event) => std::slice::from_ref(&event.kv),
            Events::Many(many) => &many.kvs,
        }
    }

    /// The last version of `key` that the revision made, a tombstone included.
    pub(super) fn last_of(&self, key: &[u8]) -> Option<&KeyValue> {
        match self {
            Events::One(event) => Some(&event.kv).filter(|kv| kv.key() == key),
            Events::Many(many) => many.of(key).map(|(_, last)| &many.kvs[last]),
        }
    }

    /// The revision of the version of `key` before this revision; 0 if there was none.
    pub(super) fn before(&self, key: &[u8]) -> i64 {
        match self {
            Events::One(event) => event.before,
            // Only the first event of a key has one.
            Events::Many(many) => many.of(key).map_or(0, |(first, _)| many.before[first]),
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
        match self {
            Events::One(_) => false,
            Events::Many(many) => many.of(many.kvs[position].key()).is_some_and(|(_, last)| last > position),
        }
    }

    fn overhead_bytes(&self) -> u64 {
        let many = match self {
            Events::One(_) => 0,
            Events::Many(many) => {
                let lists = size_of_val(&many.kvs[..]) + size_of_val(&many.before[..]) + size_of_val(&many.by_key[..]);
                (MANY_BYTES + lists) as u64 + many.overwritten_bytes
            }
        };
        size_of::<Self>() as u64 + many
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
    events: usize,
    /// What the lists take beside the versions that the index counts.
    overhead_bytes: u64,
}

impl History {
    /// Expects `first` as the next revision.
    pub(super) fn new(first: i64) -> Self {
        Self { first, revisions: Vector::new(), events: 0, overhead_bytes: 0 }
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

    /// How many events are in the revisions after this one at most: exact if each of those before has one.
    pub(super) fn events_after(&self, revision: i64) -> u64 {
        let revisions = self.revisions.len();
        let after = usize::try_from(self.next() - 1 - revision).unwrap_or(0).min(revisions);
        (after + self.events - revisions) as u64
    }

    /// Adds the events of revision [`Self::next`].
    pub(super) fn push(&mut self, events: Events) {
        self.events += events.as_slice().len();
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

    pub(super) fn pop_first(&mut self) -> Option<Revision> {
        let events = self.revisions.pop_front()?;
        self.overhead_bytes -= events.overhead_bytes();
        self.events -= events.as_slice().len();
        self.first += 1;
        Some(Revision { number: self.first - 1, events })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::pb::Fields;

    #[test]
    fn a_revision_of_one_event_takes_no_memory_of_its_own() {
        assert_eq!(size_of::<Events>(), size_of::<Event>());
    }

    /// Revisions of every size and order, with keys that are written once or more often, beside a look at all events.
    #[test]
    fn the_events_of_a_key_are_found_in_any_revision() {
        let seed = std::env::var("QUORATE_SEED").map_or(11, |s| s.parse().unwrap());
        println!("QUORATE_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..400 {
            let (len, keys) = (random.usize(1..200), random.usize(1..400));
            let mut named: Vec<usize> = (0..len).map(|_| random.usize(..keys)).collect();
            match random.u8(..3) {
                0 => named.sort_unstable(),
                1 => named.sort_unstable_by(|a, b| b.cmp(a)),
                _ => {}
            }
            let key = |name: usize| format!("{name}").into_bytes();
            named.sort_by_key(|name| if len % 2 == 0 { key(*name) } else { Vec::new() });
            let written: Vec<Event> = named
                .iter()
                .enumerate()
                .map(|(i, name)| {
                    let again = named[..i].contains(name);
                    let kv = KeyValue::new(Fields { key: &key(*name), version: i as i64, ..Fields::default() });
                    Event { kv, before: if again { 0 } else { random.i64(..9) } }
                })
                .collect();
            let events = Events::take(&mut written.clone());
            for name in (0..keys.min(2 * len)).map(key) {
                let mut of_key = written.iter().filter(|event| event.kv.key() == name);
                if len > 1 {
                    assert_eq!(events.before(&name), of_key.clone().next().map_or(0, |event| event.before));
                }
                assert_eq!(events.last_of(&name), of_key.next_back().map(|event| &event.kv));
            }
            for (i, event) in written.iter().enumerate() {
                assert_eq!(events.before_at(i), event.before);
                let later = written[i + 1..].iter().any(|later| later.kv.key() == event.kv.key());
                assert_eq!(events.is_overwritten(i), later);
            }
        }
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
