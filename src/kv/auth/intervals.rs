//! Sets of keys as intervals: what permissions give together.
//!
//! Invariant: ascending, and no two touch; so what lies in several permissions that meet lies in one interval.

use std::cmp::Ordering;

use bytes::Bytes;

/// Where an interval ends: before a key, or nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Before(Bytes),
    Open,
}

/// A set of keys.
#[derive(Debug, Default)]
pub(super) struct Intervals(Vec<(Bytes, End)>);

impl End {
    fn of(key: &[u8], range_end: &[u8]) -> Self {
        match range_end {
            // The next key after this one.
            [] => Self::Before([key, &[0]].concat().into()),
            [0] => Self::Open,
            end => Self::Before(Bytes::copy_from_slice(end)),
        }
    }

    fn is_beyond(&self, key: &[u8]) -> bool {
        match self {
            Self::Before(end) => &end[..] > key,
            Self::Open => true,
        }
    }

    pub(super) fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Open, Self::Open) => Ordering::Equal,
            (Self::Open, _) => Ordering::Greater,
            (_, Self::Open) => Ordering::Less,
            (Self::Before(a), Self::Before(b)) => a.cmp(b),
        }
    }
}

impl Intervals {
    /// All keys of these ranges.
    pub(super) fn of<'a>(ranges: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut all: Vec<(Bytes, End)> =
            ranges.map(|(key, range_end)| (Bytes::copy_from_slice(key), End::of(key, range_end))).collect();
        all.retain(|(start, end)| end.is_beyond(start));
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let mut merged: Vec<(Bytes, End)> = Vec::with_capacity(all.len());
        for (start, end) in all {
            match merged.last_mut() {
                Some((_, last)) if last.is_beyond(&start) || *last == End::Before(start.clone()) => {
                    if end.cmp(last) == Ordering::Greater {
                        *last = end;
                    }
                }
                _ => merged.push((start, end)),
            }
        }
        Self(merged)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Each with its start and its end, `None` for none, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Bytes, Option<&Bytes>)> {
        self.0.iter().map(|(start, end)| match end {
            End::Before(end) => (start, Some(end)),
            End::Open => (start, None),
        })
    }

    /// The end of the interval that this key lies in; `None`: it lies in none.
    pub(super) fn end_of(&self, key: &[u8]) -> Option<&End> {
        let after = self.0.partition_point(|(start, _)| &start[..] <= key);
        after.checked_sub(1).map(|at| &self.0[at].1).filter(|end| end.is_beyond(key))
    }

    /// Whether all keys of a range are in it. A range that has none, since it ends before it begins, is asked for like `key` alone, as in
    /// etcd: it reads and writes nothing, so nothing can be had by it.
    pub(super) fn cover(&self, key: &[u8], range_end: &[u8]) -> bool {
        self.end_of(key).is_some_and(|end| match (range_end, end) {
            ([], _) | (_, End::Open) => true,
            ([0], End::Before(_)) => false,
            (wanted, End::Before(end)) => &end[..] >= wanted,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn intervals(ranges: &[(&str, &str)]) -> Intervals {
        Intervals::of(ranges.iter().map(|(key, end)| (key.as_bytes(), end.as_bytes())))
    }

    #[test]
    fn ranges_that_meet_are_one() {
        let all = intervals(&[("c", "e"), ("a", "c"), ("k", ""), ("x", "\0"), ("y", "z"), ("a", "b")]);
        assert_eq!(all.0.len(), 3);
        for (key, end, covered) in [
            ("a", "e", true),
            ("a", "", true),
            ("d", "", true),
            ("e", "", false),
            ("a", "f", false),
            ("k", "", true),
            // One key opens nothing that follows it.
            ("k", "l", false),
            ("k", "k\0", true),
            ("k", "\0", false),
            ("k\0", "", false),
            ("x", "\0", true),
            ("y", "zz", true),
            ("w", "\0", false),
            ("", "", false),
            // No keys: as the first one alone.
            ("c", "a", true),
            ("a", "a", true),
            ("d", "\0\0", true),
            ("e", "c", false),
            ("z", "a", true),
            ("w", "a", false),
        ] {
            assert_eq!(all.cover(key.as_bytes(), end.as_bytes()), covered, "{key:?} to {end:?}");
        }
    }

    #[test]
    fn a_point_and_the_key_after_it_meet() {
        let all = intervals(&[("a", ""), ("a\0", "b")]);
        assert!(all.cover(b"a", b"b"));
    }

    proptest! {
        /// Keys of one letter, and ranges between them, against a set of letters.
        #[test]
        fn what_is_covered_is_what_was_given(
            given in proptest::collection::vec((0_u8..12, proptest::option::of(0_u8..14)), 0..8),
            asked in (0_u8..12, proptest::option::of(0_u8..13)),
        ) {
            let letter = |n: u8| vec![b'a' + n];
            // 13 is the end of all.
            let end = |end: Option<u8>| match end { None => vec![], Some(13) => vec![0], Some(n) => letter(n) };
            let ranges: Vec<_> = given.iter().map(|(key, to)| (letter(*key), end(*to))).collect();
            let all = Intervals::of(ranges.iter().map(|(key, end)| (&key[..], &end[..])));
            // In halves: a key alone, and what lies between it and the next letter.
            let halves = |key: u8, to: Option<u8>| match to {
                None => (2 * u16::from(key))..(2 * u16::from(key) + 1),
                Some(13) => (2 * u16::from(key))..100,
                Some(to) => (2 * u16::from(key))..(2 * u16::from(to)),
            };
            let set: std::collections::BTreeSet<u16> = given.iter().flat_map(|(key, to)| halves(*key, *to)).collect();
            let mut wanted = halves(asked.0, asked.1).peekable();
            prop_assume!(wanted.peek().is_some());
            let covered = all.cover(&letter(asked.0), &end(asked.1));
            prop_assert_eq!(covered, wanted.all(|half| set.contains(&half)));
        }
    }
}
