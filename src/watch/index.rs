//! Which watchers an event concerns: O(log n) and those that it does concern.
//!
//! Watchers of the same shape (interval, filters, previous versions) are one group: they get the same events, so these are put
//! together once for all. A group of one key is found by hash; groups of ranges are in a static interval tree, sorted by start,
//! each midpoint knowing the greatest end below it. It is rebuilt when enough new ranges have come; until then those are looked
//! at one by one.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::pb::KeyValue;

/// What a watcher wants to see.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

/// The members of one shape, ascending by id.
pub(super) struct Group<M> {
    pub(super) shape: Arc<Shape>,
    members: Vec<(MemberId, M)>,
}

/// A session, and the watcher's number in it.
pub(super) type MemberId = (u64, i64);

impl<M> Group<M> {
    pub(super) fn members(&self) -> impl Iterator<Item = (i64, &M)> {
        self.members.iter().map(|((_, watcher), member)| (*watcher, member))
    }
}

/// Events of one revision that concern one group: their places in the revision.
pub(super) struct Match<'i, M> {
    pub(super) group: &'i Group<M>,
    pub(super) events: Vec<u32>,
}

/// All groups; `M` is what is kept of a member.
pub(super) struct Index<M> {
    ids: HashMap<Arc<Shape>, u32>,
    groups: Vec<Option<Group<M>>>,
    free: Vec<u32>,
    keys: HashMap<Bytes, Vec<u32>>,
    ranges: Ranges,
    len: usize,
    with_prev: usize,
}

impl<M> Default for Index<M> {
    fn default() -> Self {
        Self {
            ids: HashMap::new(),
            groups: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            ranges: Ranges::default(),
            len: 0,
            with_prev: 0,
        }
    }
}

impl<M> Index<M> {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether any watcher wants previous versions.
    pub(super) fn wants_prev(&self) -> bool {
        self.with_prev > 0
    }

    /// Adds a member, or replaces it. The shape that is returned is shared by the whole group.
    pub(super) fn insert(&mut self, shape: &Shape, id: MemberId, member: M) -> Arc<Shape> {
        let group = match self.ids.get(shape) {
            Some(group) => *group,
            None => self.add_group(shape),
        };
        let group = self.groups[group as usize].as_mut().expect("a known shape has a group");
        match group.members.binary_search_by_key(&id, |m| m.0) {
            Ok(at) => group.members[at].1 = member,
            Err(at) => {
                group.members.insert(at, (id, member));
                self.len += 1;
                self.with_prev += usize::from(shape.prev_kv);
            }
        }
        group.shape.clone()
    }

    pub(super) fn remove(&mut self, shape: &Shape, id: MemberId) {
        let Some(&at) = self.ids.get(shape) else { return };
        let group = self.groups[at as usize].as_mut().expect("a known shape has a group");
        let Ok(place) = group.members.binary_search_by_key(&id, |m| m.0) else { return };
        group.members.remove(place);
        self.len -= 1;
        self.with_prev -= usize::from(shape.prev_kv);
        if group.members.is_empty() {
            self.remove_group(at);
        } else if group.members.len() < group.members.capacity() / 4 {
            group.members.shrink_to(group.members.len() * 2);
        }
    }

    fn add_group(&mut self, shape: &Shape) -> u32 {
        let shape = Arc::new(shape.clone());
        let group = Some(Group { shape: shape.clone(), members: Vec::with_capacity(1) });
        let at = match self.free.pop() {
            Some(at) => {
                self.groups[at as usize] = group;
                at
            }
            None => {
                self.groups.push(group);
                u32::try_from(self.groups.len() - 1).expect("watchers are bounded")
            }
        };
        if shape.is_one_key() {
            self.keys.entry(shape.key.clone()).or_insert_with(|| Vec::with_capacity(1)).push(at);
        } else {
            self.ranges.insert(&shape, at);
        }
        self.ids.insert(shape, at);
        at
    }

    fn remove_group(&mut self, at: u32) {
        let group = self.groups[at as usize].take().expect("a group is removed once");
        self.ids.remove(&group.shape);
        self.free.push(at);
        if !group.shape.is_one_key() {
            self.ranges.remove(&group.shape, at);
        } else if let Some(groups) = self.keys.get_mut(&group.shape.key) {
            groups.retain(|g| *g != at);
            if groups.is_empty() {
                self.keys.remove(&group.shape.key);
            }
        }
    }

    /// Every group that some of `events`, one revision's, concern.
    pub(super) fn matches(&self, events: &[KeyValue]) -> Vec<Match<'_, M>> {
        let mut matches: Vec<Match<'_, M>> = Vec::new();
        let mut places: HashMap<u32, usize> = HashMap::new();
        for (place, event) in (0..).zip(events) {
            self.groups_of(event.key(), |at| {
                let group = self.groups[at as usize].as_ref().expect("the index names groups that exist");
                if !group.shape.wants(event) {
                    return;
                }
                if events.len() == 1 {
                    matches.push(Match { group, events: vec![place] });
                    return;
                }
                let found = *places.entry(at).or_insert_with(|| {
                    matches.push(Match { group, events: Vec::new() });
                    matches.len() - 1
                });
                matches[found].events.push(place);
            });
        }
        matches
    }

    fn groups_of(&self, key: &[u8], mut found: impl FnMut(u32)) {
        if let Some(groups) = self.keys.get(key) {
            groups.iter().for_each(|at| found(*at));
        }
        self.ranges.stab(key, &mut found);
    }

    /// Every member with its watcher's number.
    pub(super) fn members(&self) -> impl Iterator<Item = (i64, &M)> {
        self.groups.iter().flatten().flat_map(Group::members)
    }
}

/// Ranges that may overlap.
#[derive(Default)]
struct Ranges {
    /// Ascending by start. Removed ones stay, as dead, until the next rebuild.
    sorted: Vec<Range>,
    dead: usize,
    recent: Vec<Range>,
}

struct Range {
    start: Bytes,
    end: Bytes,
    group: u32,
    dead: bool,
    /// The place of the greatest end among those that this one is the midpoint of.
    last: u32,
}

/// So many new or dead ranges are put up with, and so many more the more there are: a rebuild costs n log n.
const RECENT_MAX: usize = 32;

impl Ranges {
    fn insert(&mut self, shape: &Shape, group: u32) {
        let (start, end) = (shape.key.clone(), shape.range_end.clone());
        self.recent.push(Range { start, end, group, dead: false, last: 0 });
        self.rebuild_if_due();
    }

    fn remove(&mut self, shape: &Shape, group: u32) {
        if let Some(at) = self.recent.iter().position(|r| r.group == group) {
            self.recent.swap_remove(at);
            return;
        }
        let from = self.sorted.partition_point(|r| r.start < shape.key);
        let found = self.sorted[from..].iter_mut().find(|r| r.group == group && !r.dead);
        let range = found.expect("a range that is removed was inserted");
        range.dead = true;
        self.dead += 1;
        self.rebuild_if_due();
    }

    fn rebuild_if_due(&mut self) {
        let allowed = RECENT_MAX + self.sorted.len().isqrt();
        if self.recent.len() <= allowed && self.dead <= allowed {
            return;
        }
        self.sorted.retain(|r| !r.dead);
        self.dead = 0;
        self.sorted.append(&mut self.recent);
        // Nearly sorted: the standard sort finds the runs.
        self.sorted.sort_by(|a, b| a.start.cmp(&b.start));
        self.set_last(0, self.sorted.len());
    }

    /// Fills `last` of the midpoints of `from..to`; returns the place of the greatest end there.
    fn set_last(&mut self, from: usize, to: usize) -> Option<usize> {
        if from == to {
            return None;
        }
        let mid = from + (to - from) / 2;
        let below = [self.set_last(from, mid), self.set_last(mid + 1, to)];
        let mut last = mid;
        for other in below.into_iter().flatten() {
            let (a, b) = (&self.sorted[last].end[..], &self.sorted[other].end[..]);
            if a != b"\0" && (b == b"\0" || b > a) {
                last = other;
            }
        }
        self.sorted[mid].last = u32::try_from(last).expect("watchers are bounded");
        Some(last)
    }

    fn stab(&self, key: &[u8], found: &mut impl FnMut(u32)) {
        self.recent.iter().filter(|r| key >= &r.start[..] && is_before_end(key, &r.end)).for_each(|r| found(r.group));
        self.stab_sorted(0, self.sorted.len(), key, found);
    }

    fn stab_sorted(&self, from: usize, to: usize, key: &[u8], found: &mut impl FnMut(u32)) {
        if from == to {
            return;
        }
        let mid = from + (to - from) / 2;
        let range = &self.sorted[mid];
        if !is_before_end(key, &self.sorted[range.last as usize].end) {
            return;
        }
        self.stab_sorted(from, mid, key, found);
        if key >= &range.start[..] {
            if !range.dead && is_before_end(key, &range.end) {
                found(range.group);
            }
            self.stab_sorted(mid + 1, to, key, found);
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

    #[test]
    fn matches_are_those_of_a_search_of_all() {
        let mut random = fastrand::Rng::with_seed(11);
        for round in 0..20 {
            let mut index: Index<()> = Index::default();
            let mut all: Vec<(Shape, MemberId)> = Vec::new();
            for step in 0..400_u64 {
                if random.u8(..3) > 0 || all.is_empty() {
                    let shape = shape(&mut random);
                    if shape.is_empty() {
                        continue;
                    }
                    index.insert(&shape, (step, 1), ());
                    all.push((shape, (step, 1)));
                } else {
                    let (shape, id) = all.swap_remove(random.usize(..all.len()));
                    index.remove(&shape, id);
                }
                let events: Vec<KeyValue> = (0..random.usize(1..4)).map(|_| event(&mut random)).collect();
                let mut seen: Vec<(MemberId, Vec<u32>)> = Vec::new();
                for found in index.matches(&events) {
                    seen.extend(found.group.members.iter().map(|m| (m.0, found.events.clone())));
                }
                let covers = |shape: &Shape, kv: &KeyValue| {
                    let within = kv.key() >= &shape.key[..] && is_before_end(kv.key(), &shape.range_end);
                    shape.wants(kv) && if shape.is_one_key() { shape.key == kv.key() } else { within }
                };
                let mut expected: Vec<(MemberId, Vec<u32>)> = Vec::new();
                for (shape, id) in &all {
                    let places: Vec<u32> =
                        (0..).zip(&events).filter(|(_, kv)| covers(shape, kv)).map(|(place, _)| place).collect();
                    expected.extend((!places.is_empty()).then_some((*id, places)));
                }
                seen.sort();
                expected.sort();
                assert_eq!(seen, expected, "round {round}, step {step}");
                assert_eq!(index.len, all.len());
                assert_eq!(index.wants_prev(), all.iter().any(|(shape, _)| shape.prev_kv));
            }
            for (shape, id) in all {
                index.remove(&shape, id);
            }
            assert!(index.is_empty() && index.ids.is_empty() && index.keys.is_empty());
        }
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
