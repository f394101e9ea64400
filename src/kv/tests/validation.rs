//! What is refused before it is proposed.

use super::*;
use crate::kv::{Limits, validate};
use crate::pb::etcd::range_request::SortTarget;

fn txn(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { success, failure, ..TxnRequest::default() }
}

fn nest(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
    op(Op::RequestTxn(txn(success, failure)))
}

fn w(key: &'static str) -> RequestOp {
    op(Op::RequestPut(put(key, "1")))
}

fn d(key: &'static str, range_end: &'static str) -> RequestOp {
    op(Op::RequestDeleteRange(delete(key, range_end)))
}

#[test]
fn single_requests() {
    use Error::*;
    let limits = Limits { request_bytes_max: 100, ..Limits::default() };
    let long: &'static str = "a value that is far too long for the hundred bytes that a request may have in this test, \
        and goes on";
    let cases = [
        (Request::Put(put("a", "1")), Ok(())),
        (Request::Put(put("", "1")), Err(EmptyKey)),
        (Request::Put(put("a", long)), Err(RequestTooLarge)),
        (Request::Put(PutRequest { ignore_value: true, ..put("a", "1") }), Err(ValueProvided)),
        (Request::Put(PutRequest { ignore_value: true, ..put("a", "") }), Ok(())),
        (Request::Put(PutRequest { ignore_lease: true, lease: 1, ..put("a", "") }), Err(LeaseProvided)),
        (Request::DeleteRange(delete("", "b")), Err(EmptyKey)),
        (Request::DeleteRange(delete("a", "b")), Ok(())),
        (Request::Txn(txn(vec![w("")], vec![])), Err(EmptyKey)),
        (Request::Txn(txn(vec![], vec![op(Op::RequestRange(get("", "")))])), Err(EmptyKey)),
        (Request::Txn(txn(vec![], vec![RequestOp { request: None }])), Err(KeyNotFound)),
        (Request::Compact(CompactionRequest::default()), Ok(())),
    ];
    for (request, expected) in cases {
        let command = Command::new(1, request);
        assert_eq!(validate::command(&command, &limits), expected, "{command:?}");
    }
}

#[test]
fn ranges() {
    assert_eq!(validate::range(&get("a", "")), Ok(()));
    assert_eq!(validate::range(&get("", "\0")), Err(Error::EmptyKey));
    let odd = RangeRequest { sort_order: 3, ..get("a", "") };
    assert_eq!(validate::range(&odd), Err(Error::InvalidSortOption));
    let odd = RangeRequest { sort_target: SortTarget::Value as i32 + 1, ..get("a", "") };
    assert_eq!(validate::range(&odd), Err(Error::InvalidSortOption));
}

#[test]
fn comparisons() {
    let check =
        |c: Compare| validate::txn(&TxnRequest { compare: vec![c], ..TxnRequest::default() }, &Limits::default());
    assert_eq!(check(Compare { key: b("a"), ..Compare::default() }), Ok(()));
    assert_eq!(check(Compare::default()), Err(Error::EmptyKey));
    assert!(matches!(check(Compare { key: b("a"), target: 5, ..Compare::default() }), Err(Error::Unsupported(_))));
    assert!(matches!(check(Compare { key: b("a"), result: 4, ..Compare::default() }), Err(Error::Unsupported(_))));
}

#[test]
fn a_nest_of_txns_shares_its_operations() {
    let limits = Limits { txn_ops_max: 4, ..Limits::default() };
    let read = || op(Op::RequestRange(get("a", "")));
    let reads = |n: usize| vec![read(); n];
    let check = |r: &TxnRequest| validate::txn(r, &limits);
    assert_eq!(check(&txn(reads(4), reads(4))), Ok(()));
    assert_eq!(check(&txn(reads(4), reads(5))), Err(Error::TooManyOps));
    let compares =
        |n| TxnRequest { compare: vec![Compare { key: b("a"), ..Compare::default() }; n], ..txn(vec![], vec![]) };
    assert_eq!(check(&compares(4)), Ok(()));
    assert_eq!(check(&compares(5)), Err(Error::TooManyOps));
    assert_eq!(check(&txn(vec![nest(reads(3), vec![])], vec![])), Ok(()));
    assert_eq!(check(&txn(vec![nest(reads(4), vec![])], vec![])), Err(Error::TooManyOps));
    assert_eq!(check(&txn(vec![nest(vec![nest(vec![], reads(3))], vec![])], vec![])), Err(Error::TooManyOps));
}

#[test]
fn no_key_is_put_twice_nor_put_after_it_was_deleted() {
    let fine = [
        vec![w("a"), w("b"), d("c", ""), d("x", "\0"), d("d", "d")],
        vec![d("a", "c"), d("b", "d"), d("a", "\0")],
        vec![d("a", "b"), w("b")],
        vec![d("b", "a"), w("a"), w("b")],
        vec![nest(vec![w("a")], vec![w("a")]), w("b")],
        vec![nest(vec![w("a")], vec![d("a", "")])],
        vec![nest(vec![d("a", "c")], vec![]), nest(vec![d("b", "")], vec![])],
        vec![op(Op::RequestRange(get("a", ""))), w("a")],
        // As etcd: a later sibling may delete what a nested transaction has put, and an end of one zero byte meets nothing.
        vec![nest(vec![w("a")], vec![]), nest(vec![d("a", "")], vec![])],
        vec![nest(vec![w("a")], vec![]), nest(vec![], vec![d("a", "c")]), w("c")],
        vec![d("a", "\0"), w("zz"), w("a")],
        vec![nest(vec![d("a", "\0")], vec![]), nest(vec![w("a")], vec![])],
    ];
    let twice = [
        vec![w("a"), w("a")],
        vec![w("a"), d("a", "")],
        vec![d("a", ""), w("a")],
        vec![w("b"), d("a", "c")],
        vec![w("a"), nest(vec![w("a")], vec![])],
        vec![nest(vec![], vec![w("a")]), w("a")],
        vec![nest(vec![w("a")], vec![]), nest(vec![], vec![w("a")])],
        vec![d("a", "b"), nest(vec![w("aa")], vec![])],
        vec![nest(vec![nest(vec![], vec![d("a", "b")])], vec![]), w("aa")],
        vec![nest(vec![d("a", "")], vec![]), nest(vec![w("a")], vec![])],
        vec![nest(vec![w("a")], vec![]), d("a", "")],
        vec![nest(vec![w("b")], vec![]), nest(vec![d("a", "c")], vec![]), w("b")],
        vec![nest(vec![d("a", "c")], vec![]), nest(vec![d("c", "e")], vec![]), w("d")],
        vec![nest(vec![d("c", "e"), d("a", "d"), d("x", "")], vec![]), nest(vec![], vec![w("c")])],
    ];
    for ops in fine {
        assert_eq!(validate::txn(&txn(ops.clone(), ops.clone()), &Limits::default()), Ok(()), "{ops:?}");
    }
    for ops in twice {
        for r in [txn(ops.clone(), vec![]), txn(vec![], ops.clone())] {
            assert_eq!(validate::txn(&r, &Limits::default()), Err(Error::DuplicateKey), "{ops:?}");
        }
    }
}

/// The rule by its letter, in time that grows with the square.
mod letter {
    use std::collections::BTreeSet;

    use super::*;

    type Found<'a> = (BTreeSet<&'a [u8]>, Vec<&'a DeleteRangeRequest>);

    fn deletes(all: &[&DeleteRangeRequest], key: &[u8]) -> bool {
        let one = |r: &&DeleteRangeRequest| match &r.range_end[..] {
            [] => key == &r.key[..],
            end => key >= &r.key[..] && key < end,
        };
        all.iter().any(one)
    }

    fn put<'a>(found: &mut Found<'a>, key: &'a [u8], beside: &BTreeSet<&[u8]>) -> Result<(), Error> {
        if deletes(&found.1, key) || !found.0.insert(key) && !beside.contains(key) {
            return Err(Error::DuplicateKey);
        }
        Ok(())
    }

    pub(super) fn check(ops: &[RequestOp]) -> Result<Found<'_>, Error> {
        let mut found = Found::default();
        for op in ops {
            if let Some(Op::RequestDeleteRange(r)) = &op.request {
                found.1.push(r);
            }
        }
        for op in ops {
            if let Some(Op::RequestTxn(r)) = &op.request {
                let (success, failure) = (check(&r.success)?, check(&r.failure)?);
                success.0.iter().try_for_each(|key| put(&mut found, key, &BTreeSet::new()))?;
                failure.0.iter().try_for_each(|key| put(&mut found, key, &success.0))?;
                found.1.extend(success.1.into_iter().chain(failure.1));
            }
        }
        for op in ops {
            if let Some(Op::RequestPut(r)) = &op.request {
                put(&mut found, &r.key, &BTreeSet::new())?;
            }
        }
        Ok(found)
    }
}

proptest::proptest! {
    #[test]
    fn writes_are_judged_as_the_letter_of_the_rule_has_it(r in model::txn_request()) {
        let limits = Limits { txn_ops_max: usize::MAX, txn_ops_total_max: usize::MAX, ..Limits::default() };
        let judged = validate::txn(&r, &limits);
        let expected = letter::check(&r.success).and_then(|_| letter::check(&r.failure)).map(drop);
        match judged {
            Ok(()) | Err(Error::DuplicateKey) => assert_eq!(judged, expected),
            // A request that is refused for itself, before.
            Err(_) => {}
        }
    }
}

/// A branch of 128 deletes beside 128 puts, over and over, was compared each with each.
#[test]
fn judging_the_writes_of_the_largest_nest_takes_no_time() {
    let limits = Limits { txn_ops_total_max: usize::MAX, ..Limits::default() };
    let mut next = 0;
    let mut leaf = |deletes: bool| {
        let ops = (0..120).map(|_| {
            next += 1;
            let key = Bytes::from(format!("{next:08}"));
            match deletes {
                true => op(Op::RequestDeleteRange(DeleteRangeRequest { key, ..DeleteRangeRequest::default() })),
                false => op(Op::RequestPut(PutRequest { key, ..PutRequest::default() })),
            }
        });
        nest(ops.collect(), vec![])
    };
    // In one another on the left, so that what was found is carried up a hundred levels; with 24,000 operations.
    let mut all = txn(vec![leaf(true)], vec![]);
    for _ in 0..100 {
        all = txn(vec![op(Op::RequestTxn(all)), leaf(true), leaf(false)], vec![]);
    }
    let limits = Limits { txn_ops_max: usize::MAX, ..limits };
    let begun = std::time::Instant::now();
    assert_eq!(validate::txn(&all, &limits), Ok(()));
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(2), "{took:?}");
}
