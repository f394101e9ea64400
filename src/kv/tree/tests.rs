//! The tree against an ordinary map, under random keys and changes.

use std::collections::BTreeMap;

use super::*;
use crate::kv::compare::Asked;
use crate::kv::compare::tests::some_compare;
use crate::pb::Fields;
use crate::pb::etcd::Compare;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::key_value::looks;

type Versions = BTreeMap<(Vec<u8>, i64), KeyValue>;

fn item(key: &[u8], mod_revision: i64) -> KeyValue {
    KeyValue::new(Fields { key, mod_revision, version: 1, ..Fields::default() })
}

/// As [`item`], of a random size.
fn sized(random: &mut fastrand::Rng, key: &[u8], mod_revision: i64) -> KeyValue {
    let value = vec![7; random.usize(..300)];
    KeyValue::new(Fields { key, mod_revision, version: 1, value: &value, ..Fields::default() })
}

fn bytes<'a>(items: impl Iterator<Item = &'a KeyValue>) -> u64 {
    items.map(|kv| kv.as_encoded().len() as u64).sum()
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

fn check_row<E: Entry + Clone>(row: &Row<E>, root: bool) {
    let width = row.entries.len();
    assert!(root || width > 0, "an empty node stayed");
    assert!(width <= WIDTH_MAX);
    assert_eq!(row.heads.len(), width);
    if width > 0 {
        let begin = row.shared.min(BEGIN_BYTES);
        assert_eq!(row.begin[..begin], row.key(0)[..begin], "stale bytes");
    }
    for i in 0..width {
        assert_eq!(row.key(i)[..row.shared], row.key(0)[..row.shared], "a key shares less");
        assert_eq!(row.heads[i], head(&row.key(i)[row.shared..]), "a stale head");
    }
}

/// Depth below `node`; asserts the invariants on the way.
fn check(node: &Node, root: bool) -> usize {
    let branch = match node {
        Node::Leaf(leaf) => {
            check_row(leaf, root);
            return 0;
        }
        Node::Branch(branch) => branch,
    };
    check_row(branch, root);
    let mut depths = branch.entries.iter().map(|c| {
        assert_eq!(c.sums, c.node.sums(), "stale sums");
        assert!(std::ptr::eq(c.first.as_encoded(), c.node.first().as_encoded()), "a stale separator");
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
            let new = sized(&mut random, &key, revision);
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
            assert_eq!(tree.sums(), Sums { items: map.len(), bytes: bytes(map.values()) });
        }
        assert_eq!(tree.len(), map.len());
        assert_eq!(tree.get(place), map.get(&entry));
        if step % 16 == 0 {
            let first = (key.clone(), i64::MIN);
            let rank = map.range(..&entry).count();
            assert_eq!(tree.rank(place), rank);
            assert_eq!(tree.bytes_before(rank), bytes(map.range(..&entry).map(|(_, v)| v)));
            assert_eq!(tree.last_before(place), map.range(..&entry).next_back().map(|(_, v)| v));
            assert!(tree.iter_at(rank).take(40).eq(map.range(&entry..).take(40).map(|(_, v)| v)));
            let some = rank..tree.len().min(rank + random.usize(..400));
            assert!(tree.cloned(some.clone()).iter().eq(tree.iter_at(some.start).take(some.len())));
            assert_eq!(tree.rank(Place::before(&key)), map.range(..&first).count());
            assert_eq!(tree.rank(Place::after(&key)), map.range(..=(key.clone(), i64::MAX)).count());
            let of_key = map.range(first..=(key.clone(), i64::MAX)).map(|(_, v)| v);
            assert_eq!(tree.get(Place::of(&key)).map(KeyValue::key), of_key.map(KeyValue::key).next());
        }
    }
    for (key, revision) in map.into_keys() {
        tree.remove(Place::of_version(&key, revision)).unwrap();
    }
    assert_eq!((tree.sums(), tree.root.width()), (Sums::default(), 0));
}

#[test]
fn it_holds_what_an_ordinary_map_holds() {
    compare(2);
}

#[test]
fn many_versions_of_a_key_are_in_order() {
    compare(100);
}

/// A version whose fields are the usual ones, but for a few.
fn usual(random: &mut fastrand::Rng, key: &[u8]) -> KeyValue {
    let mut number = || if random.u8(..250) == 0 { random.i64(-2..=3) } else { 1 };
    let (create_revision, mod_revision, version, lease) = (number(), number(), number(), number());
    let value: &[u8] = if random.u8(..250) == 0 { b"ac" } else { b"b" };
    KeyValue::new(Fields { key, create_revision, mod_revision, version, value, lease })
}

#[test]
fn comparisons_of_many_keys_say_what_they_say_of_each() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tree = Tree::new();
    let (mut met, mut not) = (0, 0);
    for step in 0..3000 {
        // Grows first, then shrinks.
        for _ in 0..random.usize(..10) {
            let key = random.u32(..4000).to_be_bytes();
            if random.u8(..8) < if step < 2000 { 7 } else { 1 } {
                let item = usual(&mut random, &key);
                tree.insert(Place::of(&key), |_| item);
            } else {
                tree.remove(Place::of(&key));
            }
        }
        let compares: Vec<_> = (0..random.usize(1..4)).map(|_| some_compare(&mut random)).collect();
        let Some(wanted) = Wanted::of(Asked::all(compares.iter()).into_iter()) else { continue };
        let begin = random.usize(..=tree.len());
        let end = random.usize(begin..=tree.len());
        let expected = tree.iter_at(begin).take(end - begin).all(|item| wanted.is_met(&item.fields()));
        assert_eq!(tree.all(begin..end, &wanted), expected, "{compares:?} of {begin} to {end} of {}", tree.len());
        if expected { met += 1 } else { not += 1 }
    }
    assert!(met > 300 && not > 300, "{met} {not}");
}

#[test]
fn comparisons_of_all_keys_look_at_few_once_they_were_asked() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut tree = Tree::new();
    let put = |tree: &mut Tree, random: &mut fastrand::Rng, key: u32| {
        let (key, mod_revision) = (key.to_be_bytes(), random.i64(1..100));
        let value = [random.u8(b'b'..b'y')];
        let item = KeyValue::new(Fields { key: &key, mod_revision, version: 1, value: &value, ..Fields::default() });
        tree.insert(Place::of(&key), |_| item);
    };
    (0..20_000).for_each(|key| put(&mut tree, &mut random, key));
    let compare = |target: TargetUnion, result: CompareResult| Compare {
        target: match target {
            TargetUnion::Value(_) => CompareTarget::Value.into(),
            _ => CompareTarget::Mod.into(),
        },
        target_union: Some(target),
        result: result.into(),
        ..Default::default()
    };
    let asked = [
        compare(TargetUnion::ModRevision(0), CompareResult::Greater),
        compare(TargetUnion::ModRevision(100), CompareResult::Less),
        compare(TargetUnion::ModRevision(200), CompareResult::NotEqual),
        compare(TargetUnion::Value("a".into()), CompareResult::Greater),
        compare(TargetUnion::Value("z".into()), CompareResult::NotEqual),
    ];
    let wanted = Wanted::of(Asked::all(asked.iter()).into_iter()).unwrap();
    assert!(tree.all(0..tree.len(), &wanted));
    for _ in 0..100 {
        let key = random.u32(..20_000);
        put(&mut tree, &mut random, key);
        let begin = looks::so_far();
        assert!(tree.all(random.usize(..100)..tree.len() - random.usize(..100), &wanted));
        let looked = looks::so_far() - begin;
        assert!(looked < 2000, "{looked} looks");
    }
}

#[test]
fn ascending_keys_fill_their_nodes() {
    let mut tree = Tree::new();
    for key in 0..100_000_u32 {
        let key = key.to_be_bytes();
        tree.insert(Place::of(&key), |_| item(&key, 1));
    }
    fn leaves(node: &Node) -> usize {
        match node {
            Node::Leaf(_) => 1,
            Node::Branch(branch) => branch.entries.iter().map(|c| leaves(&c.node)).sum(),
        }
    }
    assert!(leaves(&tree.root) <= 100_000 / WIDTH_MAX + 1);
}
