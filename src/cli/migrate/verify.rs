//! The comparison at a migration's end: every key, value and lease of both sides, side by side in key order.

use std::cmp::Ordering;
use std::collections::VecDeque;

use bytes::Bytes;

use super::Side;
use crate::cli::client::failure;
use crate::pb::KeyValue;

const EXAMPLES_MAX: usize = 5;

/// What was found.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Compared {
    pub keys: u64,
    pub differences: u64,
    /// A few of the keys that differ.
    pub examples: Vec<String>,
}

/// Compares the source as of `revision` with the target as it is; if revisions are to be the same, all that is known of a key.
pub(super) async fn compare(source: &Side, revision: i64, target: &Side, is_same: bool) -> anyhow::Result<Compared> {
    let at_target = target.count().await?.1;
    anyhow::ensure!(
        !is_same || at_target == revision,
        "the target is at revision {at_target}, and not at the source's {revision}: somebody else has written to it"
    );
    let (mut ours, mut theirs) = (Walk::new(source, revision), Walk::new(target, at_target));
    let mut compared = Compared::default();
    loop {
        ours.fill().await?;
        theirs.fill().await?;
        if !step(&mut ours.found, &mut theirs.found, &mut compared, is_same) {
            return Ok(compared);
        }
    }
}

/// Takes the first key of both and compares; false when there is none.
fn step(
    source: &mut VecDeque<KeyValue>,
    target: &mut VecDeque<KeyValue>,
    compared: &mut Compared,
    is_same: bool,
) -> bool {
    let order = match (source.front(), target.front()) {
        (None, None) => return false,
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (Some(source), Some(target)) => source.key().cmp(target.key()),
    };
    let (source, target) =
        (if order.is_le() { source.pop_front() } else { None }, if order.is_ge() { target.pop_front() } else { None });
    compared.keys += u64::from(source.is_some());
    let same =
        |a: &KeyValue, b: &KeyValue| if is_same { a == b } else { a.value() == b.value() && a.lease() == b.lease() };
    let equal = source.as_ref().zip(target.as_ref()).is_some_and(|(source, target)| same(source, target));
    if !equal {
        compared.differences += 1;
        if compared.examples.len() < EXAMPLES_MAX {
            let key = source.as_ref().or(target.as_ref()).map(KeyValue::key).unwrap_or_default();
            compared.examples.push(String::from_utf8_lossy(key).into_owned());
        }
    }
    true
}

/// All keys of a side in their order, a page of them in memory.
pub(super) struct Walk<'a> {
    side: &'a Side,
    revision: i64,
    next: Option<Bytes>,
    pub(super) found: VecDeque<KeyValue>,
}

impl<'a> Walk<'a> {
    /// As of `revision`; 0: each page as it is when it comes.
    pub(super) fn new(side: &'a Side, revision: i64) -> Self {
        Self { side, revision, next: Some(side.key.clone()), found: VecDeque::new() }
    }

    /// Has keys in `found` again, if there are more.
    pub(super) async fn fill(&mut self) -> anyhow::Result<()> {
        while self.found.is_empty()
            && let Some(from) = self.next.take()
        {
            let page = self.side.page(&from, self.revision).await;
            let (page, next) = page.map_err(|status| failure(&status).context("the comparison could not be ended"))?;
            self.found.extend(page.kvs);
            self.next = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::Fields;

    fn side(text: &str) -> VecDeque<KeyValue> {
        let kv = |word: &str| {
            let (key, value) = word.split_once('=').unwrap();
            let lease = i64::from(value == "leased");
            KeyValue::new(Fields {
                key: key.as_bytes(),
                value: value.as_bytes(),
                version: 1,
                lease,
                ..Fields::default()
            })
        };
        text.split_whitespace().map(kv).collect()
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        for (source, target, keys, examples) in [
            ("a=1 b=2", "a=1 b=2", 2, vec![]),
            ("a=1 b=2", "a=1 b=3", 2, vec!["b"]),
            ("a=1 b=2 c=3", "b=2", 3, vec!["a", "c"]),
            ("b=2", "a=1 b=2 c=3", 1, vec!["a", "c"]),
            ("", "x=1", 0, vec!["x"]),
            ("", "", 0, vec![]),
        ] {
            let (mut source, mut target, mut compared) = (side(source), side(target), Compared::default());
            while step(&mut source, &mut target, &mut compared, false) {}
            assert_eq!(
                (compared.keys, &compared.examples),
                (keys, &examples.iter().map(|e| (*e).to_owned()).collect())
            );
            assert_eq!(compared.differences, examples.len() as u64);
        }
    }

    #[test]
    fn a_revision_is_a_difference_only_where_they_are_to_be_the_same() {
        let at = |mod_revision| {
            let fields = Fields { key: b"a", value: b"1", version: 1, mod_revision, ..Fields::default() };
            VecDeque::from([KeyValue::new(fields)])
        };
        for (is_same, differences) in [(false, 0), (true, 1)] {
            let mut compared = Compared::default();
            step(&mut at(5), &mut at(6), &mut compared, is_same);
            assert_eq!(compared.differences, differences);
        }
    }

    #[test]
    fn a_lost_lease_is_a_difference() {
        let mut compared = Compared::default();
        let bare = KeyValue::new(Fields { key: b"a", value: b"leased", version: 1, ..Fields::default() });
        step(&mut side("a=leased"), &mut VecDeque::from([bare]), &mut compared, false);
        assert_eq!(compared.differences, 1);
    }
}
