//! A persistent ordered set of versions: a B+ tree whose nodes are shared between clones.
//!
//! Cloning is a reference count; a writer copies only the nodes on its path that a clone still shares. A branch knows how many
//! items are below each child, and how many bytes they are: so the sums over an interval take O(log n), and visit none of its items.
//!
//! A node searches in its heads: of each entry's key the four bytes behind those that all of the node's keys share. They lie side
//! by side, while every key is an allocation of its own, and a look at one most often a cache miss. Only entries whose heads are that
//! of the key sought are compared in full.
//!
//! A branch also keeps, of what is below each child, between which values fields lie (`bounds`), once it was asked; who changes something below lets go of it.
//!
//! Invariants: all leaves are at one depth; no node but the root is empty; a child's `first` is the first item below it; every key
//! of a node begins with the same `shared` bytes, `begin` are the first of them, and `heads` are those of its entries, in their order.
//! That about `first` is why this is not a map from a library: those keep copies of old keys as separators, and here a key is part
//! of its version's allocation, so a separator would keep the value of an overwritten version in memory.

use std::cmp::Ordering;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::bounds::{Bounds, Known, ValueBounds};
use super::compare::Wanted;
use crate::pb::KeyValue;

/// Most items of a leaf and children of a branch. A leaf takes 760 bytes, of the 768 that the allocator gives.
const WIDTH_MAX: usize = 34;
/// A node is split after it has grown too wide.
const CAPACITY: usize = WIDTH_MAX + 1;
/// A node narrower than this is merged into a neighbour if both fit in `WIDTH_MERGED_MAX`.
const WIDTH_MIN: usize = WIDTH_MAX / 4;
/// Leaves room, so that a merged node does not split at the next insert.
const WIDTH_MERGED_MAX: usize = WIDTH_MAX * 3 / 4;

/// Of a key that is no longer it is enough to know that there is one; of others the bytes beyond it are summed up.
pub(super) const SHORT_KEY_BYTES: usize = 200;

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
    /// In one revision, a tombstone comes first.
    Revision {
        revision: i64,
        is_tombstone: bool,
    },
    After,
}

impl<'a> Place<'a> {
    /// Of the version of `key`, in a tree that holds one of each.
    pub(super) fn of(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::Only }
    }

    pub(super) fn of_version(key: &'a [u8], mod_revision: i64) -> Self {
        Self { key, of_key: OfKey::Revision { revision: mod_revision, is_tombstone: false } }
    }

    /// Of a deletion of `key`; before a version of the same revision.
    pub(super) fn of_tombstone(key: &'a [u8], mod_revision: i64) -> Self {
        Self { key, of_key: OfKey::Revision { revision: mod_revision, is_tombstone: true } }
    }

    /// Before all versions of `key`.
    pub(super) fn before(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::Before }
    }

    /// After all versions of `key`.
    pub(super) fn after(key: &'a [u8]) -> Self {
        Self { key, of_key: OfKey::After }
    }

    fn long_key_bytes(&self) -> u64 {
        self.key.len().saturating_sub(SHORT_KEY_BYTES) as u64
    }

    /// An item against this place.
    fn order(&self, item: &KeyValue) -> Ordering {
        item.key().cmp(self.key).then_with(|| match self.of_key {
            OfKey::Before => Ordering::Greater,
            OfKey::Only => Ordering::Equal,
            OfKey::Revision { revision, is_tombstone } => {
                let item = item.fields();
                (item.mod_revision, item.version != 0).cmp(&(revision, !is_tombstone))
            }
            OfKey::After => Ordering::Less,
        })
    }
}

#[derive(Clone)]
pub(super) struct Tree {
    root: Node,
    sums: Sums,
    long_key_bytes: u64,
}

/// What some items are together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub items: usize,
    /// Of their encodings.
    pub bytes: u64,
}

impl Sums {
    fn of(item: &KeyValue) -> Self {
        Self { items: 1, bytes: item.as_encoded().len() as u64 }
    }
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.items += other.items;
        self.bytes += other.bytes;
    }
}

impl std::ops::SubAssign for Sums {
    fn sub_assign(&mut self, other: Self) {
        self.items -= other.items;
        self.bytes -= other.bytes;
    }
}

impl std::iter::Sum for Sums {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

#[derive(Clone)]
enum Node {
    Leaf(Arc<Row<KeyValue>>),
    Branch(Arc<Row<Child>>),
}

/// The entries of a node, in one piece of memory with what they are searched by.
#[derive(Clone)]
struct Row<E> {
    shared: usize,
    /// The first of the shared bytes, so that few nodes need a look at a key for them.
    begin: [u8; BEGIN_BYTES],
    heads: ArrayVec<u32, CAPACITY>,
    entries: ArrayVec<E, CAPACITY>,
}

#[derive(Clone)]
struct Child {
    first: KeyValue,
    /// Of the items below.
    sums: Sums,
    known: Known,
    node: Node,
}

/// What an insertion did to a node.
struct Inserted {
    item: Sums,
    replaced: Option<KeyValue>,
    /// The right part of the node, if it had to be split.
    split: Option<Node>,
}

impl Inserted {
    /// Takes over into the sums of a node what was inserted below it.
    fn add_to(&self, sums: &mut Sums) {
        *sums += self.item;
        if let Some(replaced) = &self.replaced {
            *sums -= Sums::of(replaced);
        }
    }
}

/// What a node is made of.
trait Entry {
    /// The item, or the first one below.
    fn first(&self) -> &KeyValue;

    /// Of the item, or of those below.
    fn sums(&self) -> Sums;
}

impl Entry for KeyValue {
    fn first(&self) -> &KeyValue {
        self
    }

    fn sums(&self) -> Sums {
        Sums::of(self)
    }
}

impl Entry for Child {
    fn first(&self) -> &KeyValue {
        &self.first
    }

    fn sums(&self) -> Sums {
        self.sums
    }
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { root: Node::leaf(Row::new()), sums: Sums::default(), long_key_bytes: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.sums.items
    }

    /// Of all items.
    pub(super) fn sums(&self) -> Sums {
        self.sums
    }

    /// What the keys of all items have beyond [`SHORT_KEY_BYTES`] each.
    pub(super) fn long_key_bytes(&self) -> u64 {
        self.long_key_bytes
    }

    /// The item at this place.
    pub(super) fn get(&self, place: Place<'_>) -> Option<&KeyValue> {
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => return leaf.find(place).ok().map(|i| &leaf.entries[i]),
                Node::Branch(branch) => node = &branch.entries[branch.slot(place)].node,
            }
        }
    }

    /// The last item before this place.
    pub(super) fn last_before(&self, place: Place<'_>) -> Option<&KeyValue> {
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => return leaf.rank(place).checked_sub(1).map(|i| &leaf.entries[i]),
                Node::Branch(branch) => node = &branch.entries[branch.rank(place).saturating_sub(1)].node,
            }
        }
    }

    /// How many items are before this place.
    pub(super) fn rank(&self, place: Place<'_>) -> usize {
        let mut node = &self.root;
        let mut rank = 0;
        loop {
            match node {
                Node::Leaf(leaf) => return rank + leaf.rank(place),
                Node::Branch(branch) => {
                    let i = branch.rank(place).saturating_sub(1);
                    rank += branch.entries[..i].iter().map(|c| c.sums.items).sum::<usize>();
                    node = &branch.entries[i].node;
                }
            }
        }
    }

    /// The bytes of the items with these ranks.
    pub(super) fn bytes_between(&self, ranks: std::ops::Range<usize>) -> u64 {
        self.bytes_before(ranks.end) - self.bytes_before(ranks.start)
    }

    /// The bytes of the items before the one with this rank.
    fn bytes_before(&self, rank: usize) -> u64 {
        let mut node = &self.root;
        let mut skip = rank.min(self.len());
        let mut bytes = 0;
        loop {
            match node {
                Node::Leaf(leaf) => return bytes + sums(&leaf.entries[..skip]).bytes,
                Node::Branch(branch) => {
                    let i = branch.skip(&mut skip);
                    bytes += sums(&branch.entries[..i]).bytes;
                    node = &branch.entries[i].node;
                }
            }
        }
    }

    /// The items from the one with this rank on.
    pub(super) fn iter_at(&self, rank: usize) -> Iter<'_> {
        let mut iter = Iter { above: Vec::new(), leaf: [].iter() };
        let mut skip = rank.min(self.len());
        let mut node = &self.root;
        loop {
            match node {
                Node::Leaf(leaf) => {
                    iter.leaf = leaf.entries[skip..].iter();
                    return iter;
                }
                Node::Branch(branch) => {
                    let i = branch.skip(&mut skip);
                    iter.above.push(branch.entries[i + 1..].iter());
                    node = &branch.entries[i].node;
                }
            }
        }
    }

    /// The items of these ranks, which exist; taken leaf by leaf.
    pub(super) fn cloned(&self, ranks: std::ops::Range<usize>) -> Vec<KeyValue> {
        let mut items = Vec::with_capacity(ranks.len());
        let mut from = self.iter_at(ranks.start);
        loop {
            let run = from.run();
            let taken = run.len().min(ranks.len() - items.len());
            if taken == 0 {
                return items;
            }
            items.extend_from_slice(&run[..taken]);
        }
    }

    /// Whether all items of these ranks, which exist, meet `wanted`. Looks at those alone that the bounds of a node's fields say nothing of.
    pub(super) fn all(&self, ranks: std::ops::Range<usize>, wanted: &Wanted<'_>) -> bool {
        self.root.all(ranks, wanted)
    }

    /// Puts what `make` makes of the item at this place, if there is one, in its place. Returns the item that it replaces.
    pub(super) fn insert(
        &mut self,
        place: Place<'_>,
        make: impl FnOnce(Option<&KeyValue>) -> KeyValue,
    ) -> Option<KeyValue> {
        let mut inserted = self.root.insert(place, make);
        inserted.add_to(&mut self.sums);
        if inserted.replaced.is_none() {
            self.long_key_bytes += place.long_key_bytes();
        }
        if let Some(right) = inserted.split.take() {
            let left = std::mem::replace(&mut self.root, Node::leaf(Row::new()));
            let mut root = Row::new();
            root.insert(0, Child::new(left));
            root.insert(1, Child::new(right));
            self.root = Node::Branch(Arc::new(root));
        }
        inserted.replaced
    }

    /// Takes out the item at this place.
    pub(super) fn remove(&mut self, place: Place<'_>) -> Option<KeyValue> {
        // Looked up first, because a miss must not copy shared nodes.
        self.get(place)?;
        let removed = self.root.remove(place);
        self.sums -= Sums::of(&removed);
        self.long_key_bytes -= place.long_key_bytes();
        while let Node::Branch(root) = &self.root {
            match &root.entries[..] {
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
    fn new(node: Node) -> Self {
        Self { first: node.first().clone(), sums: node.sums(), known: Known::default(), node }
    }

    /// The node, to be changed.
    fn node_mut(&mut self) -> &mut Node {
        self.known = Known::default();
        &mut self.node
    }

    fn bounds(&self) -> &Bounds {
        self.known.numbers(|| match &self.node {
            Node::Leaf(leaf) => all_of(leaf.entries.iter().map(Bounds::of), |all, one| all.and(&one)),
            Node::Branch(branch) => {
                all_of(branch.entries.iter().map(|child| child.bounds().clone()), |all, one| all.and(&one))
            }
        })
    }

    fn value_bounds(&self) -> &ValueBounds {
        self.known.values(|| match &self.node {
            Node::Leaf(leaf) => all_of(leaf.entries.iter().map(ValueBounds::of), |all, one| all.and(&one)),
            Node::Branch(branch) => {
                all_of(branch.entries.iter().map(|child| child.value_bounds().clone()), |all, one| all.and(&one))
            }
        })
    }
}

/// Of the entries of a node that is not the root.
fn all_of<T>(entries: impl Iterator<Item = T>, and: impl FnMut(T, T) -> T) -> T {
    entries.reduce(and).expect("no node but the root is empty")
}

fn sums<E: Entry>(entries: &[E]) -> Sums {
    entries.iter().map(E::sums).sum()
}

impl<E: Entry + Clone> Row<E> {
    fn new() -> Self {
        Self { shared: 0, begin: [0; BEGIN_BYTES], heads: ArrayVec::new(), entries: ArrayVec::new() }
    }

    fn key(&self, i: usize) -> &[u8] {
        self.entries[i].first().key()
    }

    /// Makes the heads anew, if keys share more or fewer bytes than before, or some have no head.
    fn index(&mut self) {
        let width = self.entries.len();
        if width > 0 {
            let first = self.key(0);
            let shared = common(first, self.key(width - 1));
            if shared == self.shared && width == self.heads.len() {
                return;
            }
            let mut begin = [0; BEGIN_BYTES];
            let known = shared.min(BEGIN_BYTES);
            begin[..known].copy_from_slice(&first[..known]);
            (self.shared, self.begin) = (shared, begin);
            self.heads = (0..width).map(|i| head(&self.key(i)[shared..])).collect();
        }
    }

    /// Keeps the heads true after entry `i` was put in (`is_new`), or begins with another key.
    fn index_entry(&mut self, i: usize, is_new: bool) {
        let key = self.key(i);
        // Of another entry, if not at hand: it had them before.
        let neighbour = || self.key(usize::from(i == 0 && self.entries.len() > 1)).get(..self.shared);
        let shared = self.begin.get(..self.shared).or_else(neighbour);
        let Some(rest) = shared.and_then(|shared| key.strip_prefix(shared)) else { return self.index() };
        let head = head(rest);
        if is_new {
            self.heads.insert(i, head);
        } else {
            self.heads[i] = head;
        }
    }

    fn insert(&mut self, i: usize, entry: E) {
        self.entries.insert(i, entry);
        self.index_entry(i, true);
    }

    fn remove(&mut self, i: usize) -> E {
        self.heads.remove(i);
        self.entries.remove(i)
    }

    /// The entries before which nothing is left to compare, and those whose heads are that of the place.
    fn ties(&self, place: Place<'_>) -> std::ops::Range<usize> {
        if self.heads.is_empty() {
            return 0..0;
        }
        let shared = self.begin.get(..self.shared).unwrap_or_else(|| &self.key(0)[..self.shared]);
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
        partition_point(ties, |i| place.order(self.entries[i].first()).is_lt())
    }

    /// The entry at the place, or where one would be put.
    fn find(&self, place: Place<'_>) -> Result<usize, usize> {
        let ties = self.ties(place);
        let i = partition_point(ties.clone(), |i| place.order(self.entries[i].first()).is_lt());
        if i < ties.end && place.order(self.entries[i].first()).is_eq() { Ok(i) } else { Err(i) }
    }

    /// The entry to descend into: the last that does not begin after the place, or else the first.
    fn slot(&self, place: Place<'_>) -> usize {
        partition_point(self.ties(place), |i| place.order(self.entries[i].first()).is_le()).saturating_sub(1)
    }

    /// The right half of a node that is too wide, if it is.
    fn split(&mut self, inserted_at: usize) -> Option<Self> {
        let width = self.entries.len();
        if width <= WIDTH_MAX {
            return None;
        }
        let at = cut(width, inserted_at);
        let (heads, entries) = (self.heads.drain(at..).collect(), self.entries.drain(at..).collect());
        let mut right = Self { shared: self.shared, begin: self.begin, heads, entries };
        self.index();
        right.index();
        Some(right)
    }

    fn append(&mut self, right: Self) {
        self.entries.extend(right.entries);
        self.index();
    }
}

impl Row<Child> {
    /// The child to descend into so that so many items below come before, and how many of them are below that child.
    fn skip(&self, items: &mut usize) -> usize {
        let mut i = 0;
        while i + 1 < self.entries.len() && *items >= self.entries[i].sums.items {
            *items -= self.entries[i].sums.items;
            i += 1;
        }
        i
    }

    /// Takes over what child `i` begins with now.
    fn refresh(&mut self, i: usize) {
        let child = &mut self.entries[i];
        let first = child.node.first();
        if !std::ptr::eq(first.as_encoded(), child.first.as_encoded()) {
            child.first = first.clone();
            self.index_entry(i, false);
        }
    }

    /// Joins child `i` with a neighbour, if the two are narrow enough.
    fn merge(&mut self, i: usize) {
        let children = &self.entries;
        let fits = |j: usize| {
            children.get(j + 1).is_some_and(|right| children[j].node.width() + right.node.width() <= WIDTH_MERGED_MAX)
        };
        let Some(left) = i.checked_sub(1).filter(|&j| fits(j)).or(fits(i).then_some(i)) else { return };
        let right = self.remove(left + 1);
        let child = &mut self.entries[left];
        child.node_mut().append(right.node);
        child.sums += right.sums;
    }
}

impl Node {
    fn leaf(row: Row<KeyValue>) -> Self {
        Self::Leaf(Arc::new(row))
    }

    /// The first item; a node that has none is the root.
    fn first(&self) -> &KeyValue {
        match self {
            Node::Leaf(leaf) => &leaf.entries[0],
            Node::Branch(branch) => &branch.entries[0].first,
        }
    }

    fn sums(&self) -> Sums {
        match self {
            Node::Leaf(leaf) => sums(&leaf.entries),
            Node::Branch(branch) => sums(&branch.entries),
        }
    }

    fn all(&self, ranks: std::ops::Range<usize>, wanted: &Wanted<'_>) -> bool {
        let branch = match self {
            Node::Leaf(leaf) => return leaf.entries[ranks].iter().all(|item| wanted.is_met(&item.fields())),
            Node::Branch(branch) => branch,
        };
        let mut before = 0;
        branch.entries.iter().all(|child| {
            let items = child.sums.items;
            let part =
                ranks.start.clamp(before, before + items) - before..ranks.end.clamp(before, before + items) - before;
            before += items;
            let told = (part.len() == items).then(|| wanted.is_met_by_all(|| child.bounds(), || child.value_bounds()));
            part.is_empty() || told.flatten().unwrap_or_else(|| child.node.all(part, wanted))
        })
    }

    fn width(&self) -> usize {
        match self {
            Node::Leaf(leaf) => leaf.entries.len(),
            Node::Branch(branch) => branch.entries.len(),
        }
    }

    fn insert(&mut self, place: Place<'_>, make: impl FnOnce(Option<&KeyValue>) -> KeyValue) -> Inserted {
        match self {
            Node::Leaf(leaf) => {
                let leaf = Arc::make_mut(leaf);
                let found = leaf.find(place);
                let item = make(found.ok().map(|i| &leaf.entries[i]));
                let sums = Sums::of(&item);
                match found {
                    Ok(i) => {
                        let replaced = std::mem::replace(&mut leaf.entries[i], item);
                        Inserted { item: sums, replaced: Some(replaced), split: None }
                    }
                    Err(i) => {
                        leaf.insert(i, item);
                        Inserted { item: sums, replaced: None, split: leaf.split(i).map(Node::leaf) }
                    }
                }
            }
            Node::Branch(branch) => {
                let branch = Arc::make_mut(branch);
                let i = branch.slot(place);
                let child = &mut branch.entries[i];
                let mut inserted = child.node_mut().insert(place, make);
                inserted.add_to(&mut child.sums);
                let right = inserted.split.take().map(Child::new);
                if let Some(right) = &right {
                    child.sums -= right.sums;
                }
                branch.refresh(i);
                if let Some(right) = right {
                    branch.insert(i + 1, right);
                    inserted.split = branch.split(i + 1).map(|right| Node::Branch(Arc::new(right)));
                }
                inserted
            }
        }
    }

    fn remove(&mut self, place: Place<'_>) -> KeyValue {
        match self {
            Node::Leaf(leaf) => {
                let leaf = Arc::make_mut(leaf);
                let i = leaf.find(place).expect("the item to remove was found before");
                leaf.remove(i)
            }
            Node::Branch(branch) => {
                let branch = Arc::make_mut(branch);
                let i = branch.slot(place);
                let child = &mut branch.entries[i];
                let removed = child.node_mut().remove(place);
                child.sums -= Sums::of(&removed);
                if child.sums.items == 0 {
                    branch.remove(i);
                } else {
                    let is_narrow = child.node.width() < WIDTH_MIN;
                    branch.refresh(i);
                    if is_narrow {
                        branch.merge(i);
                    }
                }
                removed
            }
        }
    }

    /// Takes over the entries of the node behind this one.
    fn append(&mut self, right: Node) {
        match (self, right) {
            (Node::Leaf(left), Node::Leaf(right)) => Arc::make_mut(left).append(Arc::unwrap_or_clone(right)),
            (Node::Branch(left), Node::Branch(right)) => Arc::make_mut(left).append(Arc::unwrap_or_clone(right)),
            _ => unreachable!("siblings are of one depth"),
        }
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

impl<'a> Iter<'a> {
    /// Goes on to the next leaf; `None` behind the last.
    fn turn(&mut self) -> Option<()> {
        loop {
            match self.above.last_mut()?.next() {
                None => {
                    self.above.pop();
                }
                Some(child) => match &child.node {
                    Node::Leaf(leaf) => {
                        self.leaf = leaf.entries.iter();
                        return Some(());
                    }
                    Node::Branch(branch) => self.above.push(branch.entries.iter()),
                },
            }
        }
    }

    /// What is left of a leaf; empty behind the last item only.
    fn run(&mut self) -> &'a [KeyValue] {
        while self.leaf.as_slice().is_empty() && self.turn().is_some() {}
        std::mem::take(&mut self.leaf).as_slice()
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a KeyValue;

    fn next(&mut self) -> Option<&'a KeyValue> {
        loop {
            if let Some(item) = self.leaf.next() {
                return Some(item);
            }
            self.turn()?;
        }
    }
}

#[cfg(test)]
mod tests;
