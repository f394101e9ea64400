//! Which watchers an event concerns: O(log n) and those that it does concern.
//!
//! Watchers of the same shape (interval, filters, previous versions) are one group: they get the same events, so these are put
//! together once for all. A group of one key is found by hash; groups of ranges are in an interval tree, ordered by start, each node
//! knowing the greatest end below it. A watcher that comes or goes takes O(log n) steps, whatever shapes there are.
//! What events concern is gone through on a view ([`Index::ranges`], [`Group::members`]), so nobody waits meanwhile for the index.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::tree::{self, Item, Node, Tree, steps};
use crate::pb::KeyValue;

/// What a watcher wants to see.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    pub key: Bytes,
    /// As in a range request: empty for the one key, `"\0"` for all from `key` on.
    pub range_end: Bytes,
    pub puts: bool,
    pub deletes: bool,
    /// With each event comes the version before it.
    pub prev_kv: bool,
}

impl Shape {
    /// All events of an interval.
    pub fn new(key: impl Into<Bytes>, range_end: impl Into<Bytes>) -> Self {
        Self { key: key.into(), range_end: range_end.into(), puts: true, deletes: true, prev_kv: false }
    }

    /// All events of one key.
    pub fn of_key(key: impl Into<Bytes>) -> Self {
        Self::new(key, Bytes::new())
    }

    /// Bytes of its interval.
    pub fn bytes(&self) -> usize {
        self.key.len() + self.range_end.len()
    }

    /// True if no key can be in the interval.
    pub fn is_empty(&self) -> bool {
        !self.is_one_key() && self.range_end != b"\0"[..] && self.range_end <= self.key
    }

    fn wants(&self, event: &KeyValue) -> bool {
        // Most watchers want both, and telling which it is costs a parse.
        self.puts && self.deletes || if event.is_tombstone() { self.deletes } else { self.puts }
    }

    fn is_one_key(&self) -> bool {
        self.range_end.is_empty()
    }
}

fn is_before_end(key: &[u8], end: &[u8]) -> bool {
    end == b"\0" || key < end
}

/// A session, and the watcher's number in it.
pub(super) type MemberId = (u64, i64);

/// A watcher, and what is kept of it.
#[derive(Clone)]
pub(super) struct Member<M> {
    pub(super) id: MemberId,
    pub(super) kept: M,
}

impl<M: Clone> Item for Member<M> {
    type Key = MemberId;
    type Summary = ();

    fn key(&self) -> &MemberId {
        &self.id
    }

    fn summary(&self, _: [Option<&()>; 2]) {}
}

/// The members of one shape, ascending by id. Cloning costs nothing.
#[derive(Clone)]
pub(super) struct Group<M: Clone> {
    pub(super) shape: Arc<Shape>,
    members: Tree<Member<M>>,
}

impl<M: Clone> Group<M> {
    fn of(shape: Arc<Shape>, member: Member<M>) -> Self {
        let mut members = Tree::default();
        members.insert(member);
        Self { shape, members }
    }

    pub(super) fn members(&self) -> tree::Iter<'_, Member<M>> {
        self.members.iter()
    }
}

/// The end of a range: the greatest is none at all.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct End(Bytes);

impl End {
    fn is_after(&self, key: &[u8]) -> bool {
        is_before_end(key, &self.0)
    }

    fn later<'e>(&'e self, other: &'e Self) -> &'e Self {
        let (a, b) = (&self.0[..], &other.0[..]);
        if a == b"\0" || b != b"\0" && a >= b { self } else { other }
    }
}

impl<M: Clone> Item for Group<M> {
    /// Ordered by start, since that comes first in it.
    type Key = Shape;
    /// The greatest end.
    type Summary = End;

    fn key(&self) -> &Shape {
        &self.shape
    }

    fn summary(&self, below: [Option<&End>; 2]) -> End {
        let own = End(self.shape.range_end.clone());
        below.into_iter().flatten().fold(&own, |last, end| last.later(end)).clone()
    }
}

/// All groups; `M` is what is kept of a member.
pub(super) struct Index<M: Clone> {
    keys: HashMap<Bytes, Vec<Group<M>>>,
    ranges: Tree<Group<M>>,
    len: usize,
    with_prev: usize,
}

impl<M: Clone> Default for Index<M> {
    fn default() -> Self {
        Self { keys: HashMap::new(), ranges: Tree::default(), len: 0, with_prev: 0 }
    }
}

impl<M: Clone> Index<M> {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether any watcher wants previous versions.
    pub(super) fn wants_prev(&self) -> bool {
        self.with_prev > 0
    }

    /// Adds a member, or replaces it. The shape that is returned is shared by the whole group.
    pub(super) fn insert(&mut self, shape: &Arc<Shape>, id: MemberId, kept: M) -> Arc<Shape> {
        let member = Member { id, kept };
        let group = if shape.is_one_key() {
            self.keys.get_mut(&shape.key).and_then(|groups| groups.iter_mut().find(|group| group.shape == *shape))
        } else {
            self.ranges.get_mut(shape)
        };
        let (shape, is_new) = match group {
            Some(group) => (group.shape.clone(), group.members.insert(member).is_none()),
            None => {
                let group = Group::of(shape.clone(), member);
                if shape.is_one_key() {
                    self.keys.entry(shape.key.clone()).or_insert_with(|| Vec::with_capacity(1)).push(group);
                } else {
                    self.ranges.insert(group);
                }
                (shape.clone(), true)
            }
        };
        self.len += usize::from(is_new);
        self.with_prev += usize::from(is_new && shape.prev_kv);
        shape
    }

    /// Removes a member if it is there.
    pub(super) fn remove(&mut self, shape: &Shape, id: MemberId) {
        let removed = if shape.is_one_key() {
            let Some(groups) = self.keys.get_mut(&shape.key) else { return };
            let Some(at) = groups.iter().position(|group| *group.shape == *shape) else { return };
            let removed = groups[at].members.remove(&id);
            if groups[at].members.is_empty() {
                groups.swap_remove(at);
            }
            if groups.is_empty() {
                self.keys.remove(&shape.key);
            }
            removed
        } else {
            let Some(group) = self.ranges.get_mut(shape) else { return };
            let removed = group.members.remove(&id);
            if group.members.is_empty() {
                self.ranges.remove(shape);
            }
            removed
        };
        if removed.is_some() {
            self.len -= 1;
            self.with_prev -= usize::from(shape.prev_kv);
        }
    }

    /// A view of all groups of ranges.
    pub(super) fn ranges(&self) -> Ranges<M> {
        Ranges(self.ranges.clone())
    }

    /// The groups of one key that some of `events` concern, those whose places by key are `keys`.
    pub(super) fn singles(&self, events: &Sorted<'_>, keys: Range<usize>) -> Vec<Found<M>> {
        let mut found = Vec::new();
        if self.keys.is_empty() {
            return found;
        }
        let mut at = keys.start;
        for same in events.keys[keys].chunk_by(|a, b| a.0 == b.0) {
            let groups = self.keys.get(same[0].0).into_iter().flatten();
            found.extend(groups.map(|group| Found { group: group.clone(), keys: at..at + same.len() }));
            at += same.len();
        }
        found
    }

    /// Every member with its watcher's number.
    pub(super) fn members(&self) -> impl Iterator<Item = (i64, &M)> {
        let groups = self.keys.values().flatten().chain(self.ranges.iter());
        groups.flat_map(|group| group.members().map(|member| (member.id.1, &member.kept)))
    }
}

/// Events of one revision, by key.
pub(super) struct Sorted<'e> {
    events: &'e [KeyValue],
    /// With their places in the revision, ascending.
    keys: Vec<(&'e [u8], u32)>,
}

impl<'e> Sorted<'e> {
    pub(super) fn new(events: &'e [KeyValue]) -> Self {
        let mut keys: Vec<_> = events.iter().map(KeyValue::key).zip(0..).collect();
        // Those of a deletion are in order already.
        if !keys.is_sorted() {
            keys.sort_unstable();
        }
        Self { events, keys }
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Where a part that begins at `from` ends: about so many further on, and behind all events of one key.
    pub(super) fn part(&self, from: usize, max: usize) -> Range<usize> {
        let mut to = (from + max).min(self.len());
        while (1..self.len()).contains(&to) && self.keys[to - 1].0 == self.keys[to].0 {
            to += 1;
        }
        from..to
    }
}

/// A group, and the events in its interval, as their places by key.
pub(super) struct Found<M: Clone> {
    pub(super) group: Group<M>,
    keys: Range<usize>,
}

impl<M: Clone> Found<M> {
    /// The places in the revision of what the group wants.
    pub(super) fn places(&self, events: &Sorted<'_>) -> Vec<u32> {
        let shape = &self.group.shape;
        let wanted = events.keys[self.keys.clone()].iter().map(|(_, place)| *place);
        let mut places: Vec<u32> = wanted.filter(|place| shape.wants(&events.events[*place as usize])).collect();
        places.sort_unstable();
        places
    }
}

/// A view of groups of ranges.
pub(super) struct Ranges<M: Clone>(Tree<Group<M>>);

impl<M: Clone> Ranges<M> {
    /// Every group in whose range some of `events` are.
    pub(super) fn stab<'i>(&'i self, events: &'i Sorted<'i>) -> Stab<'i, M> {
        let mut stab = Stab { keys: &events.keys, path: Vec::new() };
        stab.visit(self.0.root(), 0..events.len());
        stab
    }
}

/// Goes through an interval tree: into branches that hold what is looked for, and past the others.
pub(super) struct Stab<'i, M: Clone> {
    keys: &'i [(&'i [u8], u32)],
    /// Nodes whose left branch was gone through, and the keys that may be in them and to their right.
    path: Vec<(&'i Node<Group<M>>, Range<usize>)>,
}

impl<'i, M: Clone> Stab<'i, M> {
    fn visit(&mut self, mut node: Option<&'i Node<Group<M>>>, mut keys: Range<usize>) {
        while let Some(at) = node {
            steps::count(1);
            keys.end = keys.start + self.keys[keys.clone()].partition_point(|(key, _)| at.summary.is_after(key));
            if keys.is_empty() {
                return;
            }
            self.path.push((at, keys.clone()));
            node = at.left();
        }
    }
}

impl<M: Clone> Iterator for Stab<'_, M> {
    type Item = Found<M>;

    fn next(&mut self) -> Option<Found<M>> {
        loop {
            let (node, mut keys) = self.path.pop()?;
            steps::count(1);
            let shape = &node.item.shape;
            keys.start += self.keys[keys.clone()].partition_point(|(key, _)| **key < shape.key[..]);
            if keys.is_empty() {
                continue;
            }
            self.visit(node.right(), keys.clone());
            keys.end =
                keys.start + self.keys[keys.clone()].partition_point(|(key, _)| is_before_end(key, &shape.range_end));
            if !keys.is_empty() {
                return Some(Found { group: node.item.clone(), keys });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::Fields;

    fn word(random: &mut fastrand::Rng) -> Bytes {
        (0..random.usize(1..4)).map(|_| random.u8(b'a'..=b'd')).collect::<Vec<u8>>().into()
    }

    fn shape(random: &mut fastrand::Rng) -> Shape {
        let key = word(random);
        let range_end = match random.u8(..4) {
            0 => Bytes::new(),
            1 => Bytes::from_static(b"\0"),
            _ => loop {
                let end = word(random);
                if end > key || key == "ddd" {
                    break end;
                }
            },
        };
        let (puts, deletes) = (random.u8(..4) > 0, random.u8(..4) > 0);
        Shape { puts, deletes, prev_kv: random.u8(..8) == 0, ..Shape::new(key, range_end) }
    }

    fn event(random: &mut fastrand::Rng) -> KeyValue {
        let key = word(random);
        match random.bool() {
            true => KeyValue::new(Fields { key: &key, mod_revision: 2, version: 1, ..Fields::default() }),
            false => KeyValue::tombstone(&key, 2),
        }
    }

    /// Watchers of random shapes come and go in random order. After each step random revisions concern those that a search of all finds,
    /// also on views from before, and no step takes longer than its logarithm and what it finds allow.
    #[test]
    fn matches_are_those_of_a_search_of_all_and_no_shapes_make_them_slow() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for round in 0..40 {
            let shapes = Shapes::random(&mut random);
            let mut index: Index<()> = Index::default();
            let mut all: Vec<(Arc<Shape>, MemberId)> = Vec::new();
            let grows = random.u8(1..4);
            for step in 0..400_u64 {
                steps::take();
                if random.u8(..4) < grows || all.is_empty() {
                    let shape = shapes.next(&mut random, step);
                    if shape.is_empty() {
                        continue;
                    }
                    let id = (random.u64(..3), step as i64);
                    all.push((index.insert(&Arc::new(shape), id, ()), id));
                } else {
                    let (shape, id) = all.swap_remove(random.usize(..all.len()));
                    index.remove(&shape, id);
                    // Who is not there is not removed.
                    index.remove(&shape, id);
                }
                let (took, log) = (steps::take(), u64::from((all.len() + 2).ilog2()) + 1);
                assert!(took <= 40 * log, "round {round}: {took} steps among {}", all.len());
                assert_eq!(index.len, all.len());
                assert_eq!(index.wants_prev(), all.iter().any(|(shape, _)| shape.prev_kv));
                if step % 4 == 0 {
                    let count = if random.bool() { 1 } else { random.usize(1..20) };
                    let events: Vec<KeyValue> = (0..count).map(|_| event(&mut random)).collect();
                    check(&index, &all, &events);
                }
            }
            for (shape, id) in all {
                index.remove(&shape, id);
            }
            assert!(index.is_empty() && index.ranges.is_empty() && index.keys.is_empty());
        }
    }

    /// A kind of set of shapes.
    enum Shapes {
        Any,
        OneStart,
        OneShape,
        Nested,
        Apart,
        ToTheEnd,
    }

    impl Shapes {
        fn random(random: &mut fastrand::Rng) -> Self {
            let all = [Self::Any, Self::OneStart, Self::OneShape, Self::Nested, Self::Apart, Self::ToTheEnd];
            let at = random.usize(..all.len());
            all.into_iter().nth(at).unwrap()
        }

        fn next(&self, random: &mut fastrand::Rng, step: u64) -> Shape {
            match self {
                Self::Any => shape(random),
                Self::OneStart => Shape::new("a", format!("b{step:03}")),
                Self::OneShape => Shape::new("a", "c"),
                Self::Nested => Shape::new(format!("b{step:03}"), format!("c{:03}", 999 - step)),
                Self::Apart => Shape::new(format!("b{step:03}"), format!("b{step:03}a")),
                Self::ToTheEnd => Shape::new(format!("b{step:03}"), "\0"),
            }
        }
    }

    fn check(index: &Index<()>, all: &[(Arc<Shape>, MemberId)], events: &[KeyValue]) {
        let sorted = Sorted::new(events);
        let mut seen: Vec<(MemberId, Vec<u32>)> = Vec::new();
        let mut take = |found: Found<()>| {
            let places = found.places(&sorted);
            let members = found.group.members().map(|member| (member.id, places.clone()));
            seen.extend(members.filter(|_| !places.is_empty()));
        };
        let mut part = 0..0;
        while part.end < sorted.len() {
            part = sorted.part(part.end, 3);
            index.singles(&sorted, part.clone()).into_iter().for_each(&mut take);
        }
        let ranges = index.ranges();
        steps::take();
        let found: Vec<Found<()>> = ranges.stab(&sorted).collect();
        let (took, log) = (steps::take(), u64::from((all.len() + 2).ilog2()) + 1);
        let allowed = 4 * log * (found.len() + events.len()) as u64;
        assert!(took <= allowed, "{took} steps for {} groups among {}", found.len(), all.len());
        found.into_iter().for_each(take);
        let covers = |shape: &Shape, kv: &KeyValue| {
            let within = kv.key() >= &shape.key[..] && is_before_end(kv.key(), &shape.range_end);
            shape.wants(kv) && if shape.is_one_key() { shape.key == kv.key() } else { within }
        };
        let mut expected: Vec<(MemberId, Vec<u32>)> = Vec::new();
        for (shape, id) in all {
            let places: Vec<u32> =
                (0..).zip(events).filter(|(_, kv)| covers(shape, kv)).map(|(place, _)| place).collect();
            expected.extend((!places.is_empty()).then_some((*id, places)));
        }
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
    }

    #[test]
    fn intervals_without_keys_are_empty() {
        for (key, end, empty) in [
            ("a", "", false),
            ("a", "\0", false),
            ("a", "b", false),
            ("b", "b", true),
            ("b", "a", true),
            ("\0", "\0", false),
            ("a", "\0\0", true),
        ] {
            assert_eq!(Shape::new(key, end).is_empty(), empty, "{key:?} {end:?}");
        }
    }
}
