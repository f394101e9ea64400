//! A balanced search tree of which a view costs nothing: nodes are shared between clones, and copied when one of the clones changes.
//!
//! So who goes through many items does that on a view, in its own time, while the tree changes under a lock that nobody holds for long.
//! Each node keeps a summary of all items below it, for searches that leave whole branches out ([`super::index`]).
//! Invariants (AVL trees: Adelson-Velsky and Landis, 1962): keys ascend, the depths of two branches of a node differ by one at most, a
//! summary is that of its branch. So insertion, removal and lookup take O(log n) steps, whatever the keys and their order are.

use std::cmp::Ordering;
use std::sync::Arc;

/// What a tree is of.
pub(super) trait Item: Clone {
    type Key: Ord + ?Sized;
    /// Of the item and of everything below its node.
    type Summary: Clone;

    fn key(&self) -> &Self::Key;

    fn summary(&self, below: [Option<&Self::Summary>; 2]) -> Self::Summary;
}

#[derive(Clone)]
pub(super) struct Tree<T: Item> {
    root: Link<T>,
}

type Link<T> = Option<Arc<Node<T>>>;

#[derive(Clone)]
pub(super) struct Node<T: Item> {
    pub(super) item: T,
    pub(super) summary: T::Summary,
    left: Link<T>,
    right: Link<T>,
    depth: u8,
}

impl<T: Item> Default for Tree<T> {
    fn default() -> Self {
        Self { root: None }
    }
}

impl<T: Item> Tree<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    pub(super) fn root(&self) -> Option<&Node<T>> {
        self.root.as_deref()
    }

    /// The one of this key, to be changed in what is neither key nor summary.
    pub(super) fn get_mut(&mut self, key: &T::Key) -> Option<&mut T> {
        let mut node = Arc::make_mut(self.root.as_mut()?);
        loop {
            steps::count(1);
            node = match key.cmp(node.item.key()) {
                Ordering::Less => Arc::make_mut(node.left.as_mut()?),
                Ordering::Greater => Arc::make_mut(node.right.as_mut()?),
                Ordering::Equal => return Some(&mut node.item),
            }
        }
    }

    /// Adds an item, or replaces the one of its key, which is returned then.
    pub(super) fn insert(&mut self, item: T) -> Option<T> {
        insert(&mut self.root, item)
    }

    pub(super) fn remove(&mut self, key: &T::Key) -> Option<T> {
        remove(&mut self.root, key)
    }

    /// All of them, ascending.
    pub(super) fn iter(&self) -> Iter<'_, T> {
        let mut iter = Iter { path: Vec::new() };
        iter.descend(self.root());
        iter
    }
}

impl<T: Item> Node<T> {
    fn new(item: T) -> Self {
        Self { summary: item.summary([None, None]), item, left: None, right: None, depth: 1 }
    }

    pub(super) fn left(&self) -> Option<&Self> {
        self.left.as_deref()
    }

    pub(super) fn right(&self) -> Option<&Self> {
        self.right.as_deref()
    }

    /// After a change of its item or branches.
    fn update(&mut self) {
        steps::count(1);
        self.depth = 1 + depth(&self.left).max(depth(&self.right));
        let below = [&self.left, &self.right].map(|link| link.as_ref().map(|node| &node.summary));
        self.summary = self.item.summary(below);
    }
}

fn depth<T: Item>(link: &Link<T>) -> u8 {
    link.as_ref().map_or(0, |node| node.depth)
}

fn insert<T: Item>(link: &mut Link<T>, item: T) -> Option<T> {
    let Some(node) = link else {
        *link = Some(Arc::new(Node::new(item)));
        return None;
    };
    let node = Arc::make_mut(node);
    let replaced = match item.key().cmp(node.item.key()) {
        Ordering::Less => insert(&mut node.left, item),
        Ordering::Greater => insert(&mut node.right, item),
        Ordering::Equal => Some(std::mem::replace(&mut node.item, item)),
    };
    rebalance(link);
    replaced
}

fn remove<T: Item>(link: &mut Link<T>, key: &T::Key) -> Option<T> {
    let node = Arc::make_mut(link.as_mut()?);
    let removed = match key.cmp(node.item.key()) {
        Ordering::Less => remove(&mut node.left, key)?,
        Ordering::Greater => remove(&mut node.right, key)?,
        Ordering::Equal => {
            let (left, right) = (node.left.take(), node.right.take());
            let removed = node.item.clone();
            *link = match (left, right) {
                (one, None) | (None, one) => one,
                (left, mut right) => {
                    let mut next = take_first(&mut right);
                    if let Some(node) = next.as_mut().map(Arc::make_mut) {
                        (node.left, node.right) = (left, right);
                    }
                    next
                }
            };
            removed
        }
    };
    rebalance(link);
    Some(removed)
}

/// Takes the node of the least key out of a branch.
fn take_first<T: Item>(link: &mut Link<T>) -> Link<T> {
    let node = Arc::make_mut(link.as_mut()?);
    if node.left.is_some() {
        let first = take_first(&mut node.left);
        rebalance(link);
        return first;
    }
    let rest = node.right.take();
    std::mem::replace(link, rest)
}

/// After a branch has become one deeper or less deep.
fn rebalance<T: Item>(link: &mut Link<T>) {
    let Some(node) = link.as_mut().map(Arc::make_mut) else { return };
    let (left, right) = (depth(&node.left), depth(&node.right));
    if left > right + 1 {
        if node.left().is_some_and(|left| depth(&left.left) < depth(&left.right)) {
            rotate(&mut node.left, |node| &mut node.right, |node| &mut node.left);
        }
        rotate(link, |node| &mut node.left, |node| &mut node.right);
    } else if right > left + 1 {
        if node.right().is_some_and(|right| depth(&right.right) < depth(&right.left)) {
            rotate(&mut node.right, |node| &mut node.left, |node| &mut node.right);
        }
        rotate(link, |node| &mut node.right, |node| &mut node.left);
    } else {
        node.update();
    }
}

type Side<T> = fn(&mut Node<T>) -> &mut Link<T>;

/// The node on side `up` takes the place of its parent, which comes to side `down` of it.
fn rotate<T: Item>(link: &mut Link<T>, up: Side<T>, down: Side<T>) {
    let Some(mut parent) = link.take() else { return };
    let below = Arc::make_mut(&mut parent);
    let mut child = up(below).take();
    if let Some(above) = child.as_mut().map(Arc::make_mut) {
        *up(below) = down(above).take();
        below.update();
        *down(above) = Some(parent);
        above.update();
        *link = child;
    } else {
        *link = Some(parent);
    }
}

pub(super) struct Iter<'t, T: Item> {
    /// Nodes whose left branch was gone through.
    path: Vec<&'t Node<T>>,
}

impl<'t, T: Item> Iter<'t, T> {
    fn descend(&mut self, mut node: Option<&'t Node<T>>) {
        while let Some(at) = node {
            self.path.push(at);
            node = at.left();
        }
    }
}

impl<'t, T: Item> Iterator for Iter<'t, T> {
    type Item = &'t T;

    fn next(&mut self) -> Option<&'t T> {
        let node = self.path.pop()?;
        steps::count(1);
        self.descend(node.right());
        Some(&node.item)
    }
}

/// Counts what is done, for tests.
pub(super) mod steps {
    #[cfg(test)]
    thread_local! {
        static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    #[inline]
    pub(in crate::watch) fn count(_steps: u64) {
        #[cfg(test)]
        STEPS.with(|steps| steps.set(steps.get() + _steps));
    }

    /// Those of this thread since the last call.
    #[cfg(test)]
    pub(in crate::watch) fn take() -> u64 {
        STEPS.with(std::cell::Cell::take)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A key, and what belongs to it; the summary is the greatest of these.
    impl Item for (u32, u32) {
        type Key = u32;
        type Summary = u32;

        fn key(&self) -> &u32 {
            &self.0
        }

        fn summary(&self, below: [Option<&u32>; 2]) -> u32 {
            below.into_iter().flatten().copied().fold(self.1, u32::max)
        }
    }

    /// Every branch is as the invariants say; returns its depth.
    fn check(node: Option<&Node<(u32, u32)>>) -> u8 {
        let Some(node) = node else { return 0 };
        let (left, right) = (check(node.left()), check(node.right()));
        assert!(left.abs_diff(right) <= 1, "depths {left} and {right}");
        assert_eq!(node.depth, 1 + left.max(right));
        assert_eq!(node.summary, node.item.summary([node.left(), node.right()].map(|n| n.map(|n| &n.summary))));
        node.depth
    }

    /// Insertions, removals and changes in any order beside a map, with views in between that stay as they were.
    #[test]
    fn a_tree_is_a_map_in_balance_and_its_views_stay() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..50 {
            let (mut tree, mut map) = (Tree::default(), BTreeMap::new());
            let mut views = Vec::new();
            let keys = random.u32(1..400);
            let sorted = random.bool();
            for step in 0..600 {
                let (key, value) = (if sorted { step % keys } else { random.u32(..keys) }, random.u32(..));
                steps::take();
                match random.u8(..5) {
                    0..3 => assert_eq!(tree.insert((key, value)), map.insert(key, value).map(|old| (key, old))),
                    3 => assert_eq!(tree.remove(&key), map.remove(&key).map(|old| (key, old))),
                    _ => assert_eq!(tree.get_mut(&key).map(|item| item.1), map.get(&key).copied()),
                }
                let (steps, log) = (steps::take(), u64::from((map.len() + 2).ilog2()) + 1);
                assert!(steps <= 8 * log, "{steps} steps among {}", map.len());
                check(tree.root());
                if random.u8(..20) == 0 {
                    views.push((tree.clone(), map.clone()));
                }
            }
            views.push((tree, map));
            for (tree, map) in views {
                assert!(tree.iter().copied().eq(map));
            }
        }
    }
}
