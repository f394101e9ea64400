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
fn no_key_is_written_twice_in_a_branch() {
    let fine = [
        vec![w("a"), w("b"), d("c", ""), d("x", "\0")],
        vec![d("a", "c"), d("b", "d"), d("a", "\0")],
        vec![d("a", "b"), w("b")],
        vec![d("b", "a"), w("a"), w("b")],
        vec![nest(vec![w("a")], vec![w("a")]), w("b")],
        vec![nest(vec![w("a")], vec![d("a", "")])],
        vec![nest(vec![d("a", "c")], vec![]), nest(vec![d("b", "")], vec![])],
        vec![op(Op::RequestRange(get("a", ""))), w("a")],
    ];
    let twice = [
        vec![w("a"), w("a")],
        vec![w("a"), d("a", "")],
        vec![d("a", ""), w("a")],
        vec![w("b"), d("a", "c")],
        vec![d("a", "\0"), w("zz")],
        vec![w("a"), nest(vec![w("a")], vec![])],
        vec![nest(vec![], vec![w("a")]), w("a")],
        vec![nest(vec![w("a")], vec![]), nest(vec![], vec![w("a")])],
        vec![d("a", "b"), nest(vec![w("aa")], vec![])],
        vec![nest(vec![nest(vec![], vec![d("a", "b")])], vec![]), w("aa")],
        vec![nest(vec![w("a")], vec![]), nest(vec![d("a", "")], vec![])],
        vec![nest(vec![d("a", "")], vec![]), nest(vec![w("a")], vec![])],
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
