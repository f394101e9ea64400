//! A persistent ordered set of versions: a B+ tree whose nodes are shared between clones.
//!
//! Cloning is a reference count; a writer copies only the nodes on its path that a clone still shares. Subtree sizes give
//! the rank of a position in O(log n), so that counting an interval visits none of its items.
//!
//! A node searches in its heads: of each entry's key the four bytes behind those that all of the node's keys share. They lie side
//! by side, while every key is an allocation of its own, and a look at one most often a cache miss. Only entries whose heads are that
//! of the key sought are compared in full.
//!
//! Invariants: all leaves are at one depth; no node but the root is empty; a child's `first` is the first item below it; every key
//! of a node begins with the same `shared` bytes, `begin` are the first of them, and `heads` are those of its entries, in their order.
//! That about `first` is why this is not a map from a library: those keep copies of old keys as separators, and here a key is part
//! of its version's allocation, so a separator would keep the value of an overwritten version in memory.

use std::cmp::Ordering;
use std::sync::Arc;

use crate::pb::KeyValue;

/// Most items of a leaf and children of a branch.
const WIDTH_MAX: usize = 32;
/// A node narrower than this is merged into a neighbour if both fit in `WIDTH_MERGED_MAX`.
const WIDTH_MIN: usize = WIDTH_MAX / 4;
/// Leaves room, so that a merged node does not split at the next insert.
const WIDTH_MERGED_MAX: usize = WIDTH_MAX * 3 / 4;

/// Shared bytes that a node has itself.
const BEGIN_BYTES: usize = 24;

/// A position in the order of a tree: by key, then by mod revision.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    key: &'a [u8],
    of_key: OfKey,
}

/// Which of a key's versions.
#[derive(Clone, Copy)]
enum OfKey {
    Before,
    /// In a tree that holds one version a key.
    Only,
    Version(i64),
    After,
}

impl<'a> Place<'a> {
    /// Of the version of `key`, in a tree that holds one of each.
    pub(super) fn of(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::Only }
    }

    pub(super) fn of_version(key: &'a [u8], mod_revision: i64) -> Self {
        Self { key, of_key: OfKey::Version(mod_revision) }
    }

    /// Before all versions of `key`.
    pub(super) fn before(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::Before }
    }

    /// After all versions of `key`.
    pub(super) fn after(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::After }
    }

    /// An item against this place.
    fn order(&self, item: &KeyValue) -> Ordering {
        item.key().cmp(self.key).then_with(|| match self.of_key {
            OfKey::Before => Ordering::Greater,
            OfKey::Only => Ordering::Equal,
            OfKey::Version(revision) => item.mod_revision().cmp(&revision),
            OfKey::After => Ordering::Less,
        })
    }
}

#[derive(Clone)]
pub(super) struct Tree {
    root: Arc<Node>,
    len: usize,
}

#[derive(Clone)]
struct Node {
    shared: usize,
    /// The first of the shared bytes, so that few nodes need a look at a key for them.
    begin: [u8; BEGIN_BYTES],
    heads: Vec<u32>,
    entries: Entries,
}

#[derive(Clone)]
enum Entries {
    Items(Vec<KeyValue>),
    Children(Vec<Child>),
}

#[derive(Clone)]
struct Child {
    first: KeyValue,
    len: usize,
    node: Arc<Node>,
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { root: Arc::new(Node::new(Entries::Items(Vec::new()))), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The item at this place.
    pub(super) fn get(&self, place: Place<'_>) -> Option<&KeyValue> {
        let mut node = &*self.root;
        loop {
            match &node.entries {
                Entries::Items(items) => return node.find(place).ok().map(|i| &items[i]),
                Entries::Children(children) => node = &children[node.slot(place)].node,
            }
        }
    }

    /// The last item before this place.
    pub(super) fn last_before(&self, place: Place<'_>) -> Option<&KeyValue> {
        let mut node = &*self.root;
        loop {
            match &node.entries {
                Entries::Items(items) => return node.rank(place).checked_sub(1).map(|i| &items[i]),
                Entries::Children(children) => node = &children[node.rank(place).saturating_sub(1)].node,
            }
        }
    }

    /// How many items are before this place.
    pub(super) fn rank(&self, place: Place<'_>) -> usize {
        let mut node = &*self.root;
        let mut rank = 0;
        loop {
            match &node.entries {
                Entries::Items(_) => return rank + node.rank(place),
                Entries::Children(children) => {
                    let i = node.rank(place).saturating_sub(1);
                    rank += children[..i].iter().map(|c| c.len).sum::<usize>();
                    node = &children[i].node;
                }
            }
        }
    }

    /// The items from the one with this rank on.
    pub(super) fn iter_at(&self, rank: usize) -> Iter<'_> {
        let mut iter = Iter { above: Vec::new(), leaf: [].iter() };
        let mut skip = rank.min(self.len);
        let mut node = &*self.root;
        loop {
            match &node.entries {
                Entries::Items(items) => {
                    iter.leaf = items[skip..].iter();
                    return iter;
                }
                Entries::Children(children) => {
                    let mut i = 0;
                    while i + 1 < children.len() && skip >= children[i].len {
                        skip -= children[i].len;
                        i += 1;
                    }
                    iter.above.push(children[i + 1..].iter());
                    node = &children[i].node;
                }
            }
        }
    }

    /// Puts what `make` makes of the item at this place, if there is one, in its place. Returns the item that it replaces.
    pub(super) fn insert(
        &mut self,
        place: Place<'_>,
        make: impl FnOnce(Option<&KeyValue>) -> KeyValue,
    ) -> Option<KeyValue> {
        let (replaced, split) = Arc::make_mut(&mut self.root).insert(place, make);
        if let Some(right) = split {
            let left = std::mem::replace(&mut self.root, Arc::new(Node::new(Entries::Items(Vec::new()))));
            let children = vec![Child::new(left), Child::new(Arc::new(right))];
            self.root = Arc::new(Node::new(Entries::Children(children)));
        }
        self.len += usize::from(replaced.is_none());
        replaced
    }

    /// Takes out the item at this place.
    pub(super) fn remove(&mut self, place: Place<'_>) -> Option<KeyValue> {
        // Looked up first, because a miss must not copy shared nodes.
        self.get(place)?;
        let removed = Arc::make_mut(&mut self.root).remove(place);
        self.len -= 1;
        while let Entries::Children(children) = &self.root.entries {
            match &children[..] {
                [] => *self = Self::new(),
                [only] => self.root = only.node.clone(),
                _ => break,
            }
        }
        Some(removed)
    }
}

/// Where to cut a node that has grown too wide. Keys that arrive in ascending order leave full nodes behind.
fn cut(len: usize, inserted_at: usize) -> usize {
    if inserted_at + 1 == len { WIDTH_MAX } else { len / 2 }
}

/// The bytes at the beginning of a key's rest, as a number that orders as they do. Missing ones are zero, so equal heads prove
/// nothing.
fn head(rest: &[u8]) -> u32 {
    match rest.first_chunk() {
        Some(bytes) => u32::from_be_bytes(*bytes),
        None => rest.iter().enumerate().fold(0, |head, (i, byte)| head | u32::from(*byte) << (24 - 8 * i)),
    }
}

/// How many bytes two keys share.
fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Child {
    fn new(node: Arc<Node>) -> Self {
        Self { first: node.key_value(0).clone(), len: node.len(), node }
    }
}

impl Node {
    fn new(entries: Entries) -> Self {
        let mut node = Self { shared: 0, begin: [0; BEGIN_BYTES], heads: Vec::new(), entries };
        node.index();
        node
    }

    /// Makes the heads anew, if keys share more or fewer bytes than before, or some have no head.
    fn index(&mut self) {
        let width = self.width();
        if width > 0 {
            let first = self.key_value(0).key();
            let shared = common(first, self.key_value(width - 1).key());
            if shared == self.shared && width == self.heads.len() {
                return;
            }
            let mut begin = [0; BEGIN_BYTES];
            let known = shared.min(BEGIN_BYTES);
            begin[..known].copy_from_slice(&first[..known]);
            (self.shared, self.begin) = (shared, begin);
            let heads = (0..width).map(|i| head(&self.key_value(i).key()[self.shared..]));
            self.heads = heads.collect();
        }
    }

    /// Keeps the heads true after entry `i` was put in (`is_new`), or begins with another key.
    fn index_entry(&mut self, i: usize, is_new: bool) {
        let key = self.key_value(i).key();
        // Of another entry, if not at hand: it had them before.
        let neighbour = || self.key_value(usize::from(i == 0 && self.width() > 1)).key().get(..self.shared);
        let shared = self.begin.get(..self.shared).or_else(neighbour);
        let Some(rest) = shared.and_then(|shared| key.strip_prefix(shared)) else { return self.index() };
        let head = head(rest);
        if is_new {
            self.heads.insert(i, head);
        } else {
            self.heads[i] = head;
        }
    }

    /// An item, or the first item below a child.
    fn key_value(&self, i: usize) -> &KeyValue {
        match &self.entries {
            Entries::Items(items) => &items[i],
            Entries::Children(children) => &children[i].first,
        }
    }

    fn len(&self) -> usize {
        match &self.entries {
            Entries::Items(items) => items.len(),
            Entries::Children(children) => children.iter().map(|c| c.len).sum(),
        }
    }

    fn width(&self) -> usize {
        match &self.entries {
            Entries::Items(items) => items.len(),
            Entries::Children(children) => children.len(),
        }
    }

    /// The entries before which nothing is left to compare, and those whose heads are that of the place.
    fn ties(&self, place: Place<'_>) -> std::ops::Range<usize> {
        if self.heads.is_empty() {
            return 0..0;
        }
        let shared = self.begin.get(..self.shared).unwrap_or_else(|| &self.key_value(0).key()[..self.shared]);
        match place.key.strip_prefix(shared) {
            Some(rest) => {
                let head = head(rest);
                let first = self.heads.partition_point(|x| *x < head);
                first..first + self.heads[first..].iter().take_while(|x| **x == head).count()
            }
            None if place.key < shared => 0..0,
            None => self.heads.len()..self.heads.len(),
        }
    }

    /// How many entries are before the place.
    fn rank(&self, place: Place<'_>) -> usize {
        let ties = self.ties(place);
        partition_point(ties, |i| place.order(self.key_value(i)).is_lt())
    }

    /// The entry at the place, or where one would be put.
    fn find(&self, place: Place<'_>) -> Result<usize, usize> {
        let ties = self.ties(place);
        let i = partition_point(ties.clone(), |i| place.order(self.key_value(i)).is_lt());
        if i < ties.end && place.order(self.key_value(i)).is_eq() { Ok(i) } else { Err(i) }
    }

    /// The child to descend into: the last that does not begin after the place, or else the first.
    fn slot(&self, place: Place<'_>) -> usize {
        partition_point(self.ties(place), |i| place.order(self.key_value(i)).is_le()).saturating_sub(1)
    }

    /// The right half of a node that is too wide, if it is.
    fn split(&mut self, inserted_at: usize) -> Option<Node> {
        let width = self.width();
        if width <= WIDTH_MAX {
            return None;
        }
        let at = cut(width, inserted_at);
        let right = match &mut self.entries {
            Entries::Items(items) => Entries::Items(items.split_off(at)),
            Entries::Children(children) => Entries::Children(children.split_off(at)),
        };
        let mut right =
            Self { shared: self.shared, begin: self.begin, heads: self.heads.split_off(at), entries: right };
        self.index();
        right.index();
        Some(right)
    }

    /// The item replaced, and the right part of this node if it had to be split.
    fn insert(
        &mut self,
        place: Place<'_>,
        make: impl FnOnce(Option<&KeyValue>) -> KeyValue,
    ) -> (Option<KeyValue>, Option<Node>) {
        let found = match self.entries {
            Entries::Items(_) => self.find(place),
            Entries::Children(_) => Ok(self.slot(place)),
        };
        match (&mut self.entries, found) {
            (Entries::Items(items), Ok(i)) => {
                let item = make(Some(&items[i]));
                (Some(std::mem::replace(&mut items[i], item)), None)
            }
            (Entries::Items(items), Err(i)) => {
                items.insert(i, make(None));
                self.index_entry(i, true);
                (None, self.split(i))
            }
            (Entries::Children(children), Ok(i) | Err(i)) => {
                let child = &mut children[i];
                let (replaced, split) = Arc::make_mut(&mut child.node).insert(place, make);
                child.len += usize::from(replaced.is_none());
                let right = split.map(|right| Child::new(Arc::new(right)));
                child.len -= right.as_ref().map_or(0, |right| right.len);
                self.refresh(i);
                let Some(right) = right else { return (replaced, None) };
                if let Entries::Children(children) = &mut self.entries {
                    children.insert(i + 1, right);
                }
                self.index_entry(i + 1, true);
                (replaced, self.split(i + 1))
            }
        }
    }

    /// Takes over what child `i` begins with now.
    fn refresh(&mut self, i: usize) {
        let Entries::Children(children) = &mut self.entries else { return };
        let child = &mut children[i];
        let first = child.node.key_value(0);
        if !std::ptr::eq(first.as_encoded(), child.first.as_encoded()) {
            child.first = first.clone();
            self.index_entry(i, false);
        }
    }

    fn remove(&mut self, place: Place<'_>) -> KeyValue {
        let found = match self.entries {
            Entries::Items(_) => self.find(place).expect("the item to remove was found before"),
            Entries::Children(_) => self.slot(place),
        };
        match &mut self.entries {
            Entries::Items(items) => {
                self.heads.remove(found);
                items.remove(found)
            }
            Entries::Children(children) => {
                let child = &mut children[found];
                let removed = Arc::make_mut(&mut child.node).remove(place);
                child.len -= 1;
                if child.len == 0 {
                    children.remove(found);
                    self.heads.remove(found);
                } else {
                    let is_narrow = child.node.width() < WIDTH_MIN;
                    self.refresh(found);
                    if is_narrow {
                        self.merge(found);
                    }
                }
                removed
            }
        }
    }

    /// Joins child `i` with a neighbour, if the two are narrow enough.
    fn merge(&mut self, i: usize) {
        let Entries::Children(children) = &mut self.entries else { return };
        let fits = |j: usize| {
            children.get(j + 1).is_some_and(|right| children[j].node.width() + right.node.width() <= WIDTH_MERGED_MAX)
        };
        let Some(left) = i.checked_sub(1).filter(|&j| fits(j)).or(fits(i).then_some(i)) else { return };
        let right = children.remove(left + 1);
        self.heads.remove(left + 1);
        let child = &mut children[left];
        Arc::make_mut(&mut child.node).append(Arc::unwrap_or_clone(right.node));
        child.len += right.len;
    }

    fn append(&mut self, right: Node) {
        match (&mut self.entries, right.entries) {
            (Entries::Items(items), Entries::Items(mut more)) => items.append(&mut more),
            (Entries::Children(children), Entries::Children(mut more)) => children.append(&mut more),
            _ => unreachable!("siblings are of one depth"),
        }
        self.index();
    }
}

/// The first of `range` that does not pass; those that pass come first.
fn partition_point(range: std::ops::Range<usize>, passes: impl Fn(usize) -> bool) -> usize {
    // A key's newest version comes behind all others, so that is looked at first.
    if range.is_empty() || passes(range.end - 1) {
        return range.end;
    }
    let (mut low, mut high) = (range.start, range.end - 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if passes(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// Items in ascending order.
pub(super) struct Iter<'a> {
    above: Vec<std::slice::Iter<'a, Child>>,
    leaf: std::slice::Iter<'a, KeyValue>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a KeyValue;

    fn next(&mut self) -> Option<&'a KeyValue> {
        loop {
            if let Some(item) = self.leaf.next() {
                return Some(item);
            }
            match self.above.last_mut()?.next() {
                None => {
                    self.above.pop();
                }
                Some(child) => match &child.node.entries {
                    Entries::Items(items) => self.leaf = items.iter(),
                    Entries::Children(children) => self.above.push(children.iter()),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::pb::Fields;

    type Versions = BTreeMap<(Vec<u8>, i64), KeyValue>;

    fn item(key: &[u8], mod_revision: i64) -> KeyValue {
        KeyValue::new(Fields { key, mod_revision, version: 1, ..Fields::default() })
    }

    /// Keys that share much, little and nothing, and end where others go on.
    fn key(random: &mut fastrand::Rng) -> Vec<u8> {
        let number = random.u32(..600);
        match random.u8(..8) {
            0 => vec![0; number as usize % 12],
            1 => number.to_be_bytes().to_vec(),
            2 => format!("bench/{number}").into_bytes(),
            3 => format!("/registry/pods/default/{number:012}").into_bytes(),
            _ => format!("bench/{number:012}").into_bytes(),
        }
    }

    /// Depth below `node`; asserts the invariants on the way.
    fn check(node: &Node, root: bool) -> usize {
        let width = node.width();
        assert!(root || width > 0, "an empty node stayed");
        assert!(width <= WIDTH_MAX);
        assert_eq!(node.heads.len(), width);
        if width > 0 {
            let begin = node.shared.min(BEGIN_BYTES);
            assert_eq!(node.begin[..begin], node.key_value(0).key()[..begin], "stale bytes");
        }
        for i in 0..width {
            let key = node.key_value(i).key();
            assert_eq!(key[..node.shared], node.key_value(0).key()[..node.shared], "a key shares less");
            assert_eq!(node.heads[i], head(&key[node.shared..]), "a stale head");
        }
        let Entries::Children(children) = &node.entries else { return 0 };
        let mut depths = children.iter().map(|c| {
            assert_eq!(c.len, c.node.len());
            assert!(std::ptr::eq(c.first.as_encoded(), c.node.key_value(0).as_encoded()), "a stale separator");
            check(&c.node, false)
        });
        let depth = depths.next().unwrap();
        assert!(depths.all(|d| d == depth), "leaves at two depths");
        depth + 1
    }

    /// A tree of versions beside an ordinary map, with random keys of few or many versions.
    fn compare(revisions: i64) {
        let seed = std::env::var("QUORATE_SEED").map_or(7, |s| s.parse().unwrap());
        println!("QUORATE_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut tree, mut map) = (Tree::new(), Versions::new());
        let mut kept = (tree.clone(), map.clone());
        for step in 0..60_000 {
            // Grows first, then shrinks to nothing.
            let grow = step < 30_000;
            let (key, revision) = (key(&mut random), random.i64(0..revisions));
            let place = Place::of_version(&key, revision);
            let entry = (key.clone(), revision);
            if random.u8(..4) != 0 && grow || random.u8(..16) == 0 {
                let new = item(&key, revision);
                let replaced = tree.insert(place, |was| {
                    assert_eq!(was, map.get(&entry));
                    new.clone()
                });
                assert_eq!(replaced, map.insert(entry.clone(), new));
            } else {
                assert_eq!(tree.remove(place), map.remove(&entry));
            }
            if step % 1000 == 0 {
                check(&tree.root, true);
                check(&kept.0.root, true);
                assert!(kept.0.iter_at(0).eq(kept.1.values()), "a clone changed");
                kept = (tree.clone(), map.clone());
            }
            assert_eq!(tree.len(), map.len());
            assert_eq!(tree.get(place), map.get(&entry));
            if step % 16 == 0 {
                let first = (key.clone(), i64::MIN);
                let rank = map.range(..&entry).count();
                assert_eq!(tree.rank(place), rank);
                assert_eq!(tree.last_before(place), map.range(..&entry).next_back().map(|(_, v)| v));
                assert!(tree.iter_at(rank).take(40).eq(map.range(&entry..).take(40).map(|(_, v)| v)));
                assert_eq!(tree.rank(Place::before(&key)), map.range(..&first).count());
                assert_eq!(tree.rank(Place::after(&key)), map.range(..=(key.clone(), i64::MAX)).count());
                let of_key = map.range(first..=(key.clone(), i64::MAX)).map(|(_, v)| v);
                assert_eq!(tree.get(Place::of(&key)).map(KeyValue::key), of_key.map(KeyValue::key).next());
            }
        }
        for (key, revision) in map.into_keys() {
            tree.remove(Place::of_version(&key, revision)).unwrap();
        }
        assert_eq!((tree.len(), tree.root.width()), (0, 0));
    }

    #[test]
    fn it_holds_what_an_ordinary_map_holds() {
        compare(2);
    }

    #[test]
    fn many_versions_of_a_key_are_in_order() {
        compare(100);
    }

    #[test]
    fn ascending_keys_fill_their_nodes() {
        let mut tree = Tree::new();
        for key in 0..100_000_u32 {
            let key = key.to_be_bytes();
            tree.insert(Place::of(&key), |_| item(&key, 1));
        }
        fn leaves(node: &Node) -> usize {
            match &node.entries {
                Entries::Items(_) => 1,
                Entries::Children(children) => children.iter().map(|c| leaves(&c.node)).sum(),
            }
        }
        assert!(leaves(&tree.root) <= 100_000 / WIDTH_MAX + 1);
    }
}
