//! A persistent ordered set of versions: a B+ tree whose nodes are shared between clones.
//!
//! Cloning is a reference count; a writer copies only the nodes on its path that a clone still shares. Subtree sizes give
//! the rank of a position in O(log n), so that counting an interval visits none of its items.
//!
//! Invariants: all leaves are at one depth; no node but the root is empty; a child's `first` is the first item below it.
//! The last is why this is not a map from a library: those keep copies of old keys as separators, and here a key is part
//! of its version's allocation, so a separator would keep the value of an overwritten version in memory.
//!
//! The order is the caller's: every call takes a comparison, and one tree must always be given the same.

use std::cmp::Ordering;
use std::sync::Arc;

use crate::pb::KeyValue;

/// Most items of a leaf and children of a branch.
const WIDTH_MAX: usize = 32;
/// A node narrower than this is merged into a neighbour if both fit in `WIDTH_MERGED_MAX`.
const WIDTH_MIN: usize = WIDTH_MAX / 4;
/// Leaves room, so that a merged node does not split at the next insert.
const WIDTH_MERGED_MAX: usize = WIDTH_MAX * 3 / 4;

#[derive(Clone)]
pub(super) struct Tree {
    root: Arc<Node>,
    len: usize,
}

#[derive(Clone)]
enum Node {
    Leaf(Vec<KeyValue>),
    Branch(Vec<Child>),
}

#[derive(Clone)]
struct Child {
    first: KeyValue,
    len: usize,
    node: Arc<Node>,
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { root: Arc::new(Node::Leaf(Vec::new())), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The item for which `order` (of the item against the one sought) is equal.
    pub(super) fn get(&self, order: impl Fn(&KeyValue) -> Ordering) -> Option<&KeyValue> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf(items) => return items.binary_search_by(&order).ok().map(|i| &items[i]),
                Node::Branch(children) => node = &children[slot(children, |x| order(x).is_le())].node,
            }
        }
    }

    /// The last item that is `before` the position sought.
    pub(super) fn last_before(&self, before: impl Fn(&KeyValue) -> bool) -> Option<&KeyValue> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf(items) => return items.partition_point(&before).checked_sub(1).map(|i| &items[i]),
                Node::Branch(children) => node = &children[slot(children, &before)].node,
            }
        }
    }

    /// How many items are `before` the position sought.
    pub(super) fn rank(&self, before: impl Fn(&KeyValue) -> bool) -> usize {
        let mut node = &*self.root;
        let mut rank = 0;
        loop {
            match node {
                Node::Leaf(items) => return rank + items.partition_point(&before),
                Node::Branch(children) => {
                    let i = slot(children, &before);
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
            match node {
                Node::Leaf(items) => {
                    iter.leaf = items[skip..].iter();
                    return iter;
                }
                Node::Branch(children) => {
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

    /// Puts `item` where `order` says, and returns the equal one that it replaces.
    pub(super) fn insert(&mut self, item: KeyValue, order: impl Fn(&KeyValue) -> Ordering) -> Option<KeyValue> {
        let (replaced, split) = Arc::make_mut(&mut self.root).insert(item, &order);
        if let Some(right) = split {
            let left = std::mem::replace(&mut self.root, Arc::new(Node::Leaf(Vec::new())));
            self.root = Arc::new(Node::Branch(vec![Child::new(left), Child::new(Arc::new(right))]));
        }
        self.len += usize::from(replaced.is_none());
        replaced
    }

    /// Takes out the item for which `order` is equal.
    pub(super) fn remove(&mut self, order: impl Fn(&KeyValue) -> Ordering) -> Option<KeyValue> {
        // Looked up first, because a miss must not copy shared nodes.
        self.get(&order)?;
        let removed = Arc::make_mut(&mut self.root).remove(&order);
        self.len -= 1;
        while let Node::Branch(children) = &*self.root {
            match &children[..] {
                [] => self.root = Arc::new(Node::Leaf(Vec::new())),
                [only] => self.root = only.node.clone(),
                _ => break,
            }
        }
        Some(removed)
    }
}

/// The child to descend into: the last whose first item is `before` the position, or else the first child.
fn slot(children: &[Child], before: impl Fn(&KeyValue) -> bool) -> usize {
    children.partition_point(|c| before(&c.first)).saturating_sub(1)
}

/// Where to cut a node that has grown too wide. Keys that arrive in ascending order leave full nodes behind.
fn cut(len: usize, inserted_at: usize) -> usize {
    if inserted_at + 1 == len { WIDTH_MAX } else { len / 2 }
}

impl Child {
    fn new(node: Arc<Node>) -> Self {
        Self { first: node.first().clone(), len: node.len(), node }
    }

    /// Takes over what a change below has changed.
    fn refresh(&mut self, len: usize) {
        self.len = len;
        let first = self.node.first();
        if !std::ptr::eq(first.as_encoded(), self.first.as_encoded()) {
            self.first = first.clone();
        }
    }
}

impl Node {
    fn first(&self) -> &KeyValue {
        match self {
            Node::Leaf(items) => &items[0],
            Node::Branch(children) => &children[0].first,
        }
    }

    fn len(&self) -> usize {
        match self {
            Node::Leaf(items) => items.len(),
            Node::Branch(children) => children.iter().map(|c| c.len).sum(),
        }
    }

    fn width(&self) -> usize {
        match self {
            Node::Leaf(items) => items.len(),
            Node::Branch(children) => children.len(),
        }
    }

    /// The item replaced, and the right part of this node if it had to be split.
    fn insert(&mut self, item: KeyValue, order: &impl Fn(&KeyValue) -> Ordering) -> (Option<KeyValue>, Option<Node>) {
        match self {
            Node::Leaf(items) => match items.binary_search_by(order) {
                Ok(i) => (Some(std::mem::replace(&mut items[i], item)), None),
                Err(i) => {
                    items.insert(i, item);
                    let split = (items.len() > WIDTH_MAX).then(|| Node::Leaf(items.split_off(cut(items.len(), i))));
                    (None, split)
                }
            },
            Node::Branch(children) => {
                let i = slot(children, |x| order(x).is_le());
                let child = &mut children[i];
                let (replaced, split) = Arc::make_mut(&mut child.node).insert(item, order);
                let grown = child.len + usize::from(replaced.is_none());
                let Some(right) = split else {
                    child.refresh(grown);
                    return (replaced, None);
                };
                let right = Child::new(Arc::new(right));
                child.refresh(grown - right.len);
                children.insert(i + 1, right);
                let split =
                    (children.len() > WIDTH_MAX).then(|| Node::Branch(children.split_off(cut(children.len(), i + 1))));
                (replaced, split)
            }
        }
    }

    fn remove(&mut self, order: &impl Fn(&KeyValue) -> Ordering) -> KeyValue {
        match self {
            Node::Leaf(items) => {
                let i = items.binary_search_by(order).expect("the item to remove was found before");
                items.remove(i)
            }
            Node::Branch(children) => {
                let i = slot(children, |x| order(x).is_le());
                let child = &mut children[i];
                let removed = Arc::make_mut(&mut child.node).remove(order);
                if child.len == 1 {
                    children.remove(i);
                } else {
                    child.refresh(child.len - 1);
                    if child.node.width() < WIDTH_MIN {
                        merge(children, i);
                    }
                }
                removed
            }
        }
    }

    fn append(&mut self, right: Node) {
        match (self, right) {
            (Node::Leaf(items), Node::Leaf(mut more)) => items.append(&mut more),
            (Node::Branch(children), Node::Branch(mut more)) => children.append(&mut more),
            _ => unreachable!("siblings are of one depth"),
        }
    }
}

/// Joins child `i` with a neighbour, if the two are narrow enough.
fn merge(children: &mut Vec<Child>, i: usize) {
    let fits = |j: usize| {
        children.get(j + 1).is_some_and(|right| children[j].node.width() + right.node.width() <= WIDTH_MERGED_MAX)
    };
    let Some(left) = i.checked_sub(1).filter(|&j| fits(j)).or(fits(i).then_some(i)) else { return };
    let right = children.remove(left + 1);
    let child = &mut children[left];
    Arc::make_mut(&mut child.node).append(Arc::unwrap_or_clone(right.node));
    child.len += right.len;
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
                Some(child) => match &*child.node {
                    Node::Leaf(items) => self.leaf = items.iter(),
                    Node::Branch(children) => self.above.push(children.iter()),
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

    fn item(key: u32, version: i64) -> KeyValue {
        KeyValue::new(Fields { key: &key.to_be_bytes(), version, ..Fields::default() })
    }

    fn order(key: u32) -> impl Fn(&KeyValue) -> Ordering {
        move |x| x.key().cmp(&key.to_be_bytes()[..])
    }

    /// Depth below `node`; asserts the invariants on the way.
    fn check(node: &Node, root: bool) -> usize {
        assert!(root || node.width() > 0, "an empty node stayed");
        assert!(node.width() <= WIDTH_MAX);
        let Node::Branch(children) = node else { return 0 };
        let mut depths = children.iter().map(|c| {
            assert_eq!(c.len, c.node.len());
            assert!(std::ptr::eq(c.first.as_encoded(), c.node.first().as_encoded()), "a stale separator");
            check(&c.node, false)
        });
        let depth = depths.next().unwrap();
        assert!(depths.all(|d| d == depth), "leaves at two depths");
        depth + 1
    }

    #[test]
    fn it_holds_what_an_ordinary_map_holds() {
        let seed = std::env::var("QUORATE_SEED").map_or(7, |s| s.parse().unwrap());
        println!("QUORATE_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut tree, mut map) = (Tree::new(), BTreeMap::new());
        let mut kept = (tree.clone(), map.clone());
        for step in 0..60_000_i64 {
            // Grows first, then shrinks to nothing.
            let grow = step < 30_000;
            let key = random.u32(..4000);
            if random.u8(..4) != 0 && grow || random.u8(..16) == 0 {
                assert_eq!(tree.insert(item(key, step), order(key)), map.insert(key, item(key, step)));
            } else {
                assert_eq!(tree.remove(order(key)), map.remove(&key));
            }
            if step % 1000 == 0 {
                check(&tree.root, true);
                check(&kept.0.root, true);
                assert!(kept.0.iter_at(0).eq(kept.1.values()), "a clone changed");
                kept = (tree.clone(), map.clone());
            }
            assert_eq!(tree.len(), map.len());
            assert_eq!(tree.get(order(key)), map.get(&key));
            let before = |x: &KeyValue| order(key)(x).is_lt();
            let rank = map.range(..key).count();
            if step % 16 == 0 {
                assert_eq!(tree.rank(before), rank);
                assert_eq!(tree.last_before(before), map.range(..key).next_back().map(|(_, v)| v));
                assert!(tree.iter_at(rank).take(40).eq(map.range(key..).take(40).map(|(_, v)| v)));
            }
        }
        for key in map.into_keys() {
            tree.remove(order(key)).unwrap();
        }
        assert_eq!((tree.len(), tree.root.width()), (0, 0));
    }

    #[test]
    fn ascending_keys_fill_their_nodes() {
        let mut tree = Tree::new();
        for key in 0..100_000 {
            tree.insert(item(key, 1), order(key));
        }
        fn leaves(node: &Node) -> usize {
            match node {
                Node::Leaf(_) => 1,
                Node::Branch(children) => children.iter().map(|c| leaves(&c.node)).sum(),
            }
        }
        assert!(leaves(&tree.root) <= 100_000 / WIDTH_MAX + 1);
    }
}
