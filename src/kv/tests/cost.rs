//! What requests cost: no more than was counted before, and nothing more than O(n log n).

use proptest::prelude::*;

use super::model::{delete_request, put_request, range_request, txn_request};
use super::*;
use crate::kv::{Cost, Limits, validate};
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::response_op::Response as OpResponse;
use crate::pb::key_value::looks;
use crate::pb::log::LeaseRevoke;

/// Events of one revision.
const MANY: usize = 10_000;
/// Looks into versions an event, for all that the test does after it: some hundreds are needed. With a scan of the revision for each
/// it was tens of thousands.
const LOOKS_AN_EVENT_MAX: u64 = 3000;

fn name(n: usize) -> Bytes {
    format!("k{n:06}").into()
}

fn everything() -> RangeRequest {
    get("\0", "\0")
}

fn in_txn(ops: Vec<Op>) -> Request {
    Request::Txn(TxnRequest { success: ops.into_iter().map(op).collect(), ..TxnRequest::default() })
}

fn put_of(key: Bytes, lease: i64) -> Op {
    Op::RequestPut(PutRequest { key, value: b("v"), lease, ..PutRequest::default() })
}

/// A command that makes one revision of most keys there are, in whatever order.
fn large_write(random: &mut fastrand::Rng) -> Request {
    let mut names: Vec<usize> = (0..MANY).collect();
    let all = || DeleteRangeRequest { key: b("\0"), range_end: b("\0"), prev_kv: true };
    match random.u8(..5) {
        0 => Request::DeleteRange(all()),
        1 => Request::LeaseRevoke(LeaseRevoke { id: 1, term: 0 }),
        2 => {
            let mut ops: Vec<Op> = (0..100).map(|n| put_of(format!("z{n}").into(), 0)).collect();
            ops.insert(random.usize(..100), Op::RequestDeleteRange(DeleteRangeRequest { range_end: b("y"), ..all() }));
            // Reads of the past within what has written so much.
            ops.push(Op::RequestRange(RangeRequest { revision: 2, ..everything() }));
            in_txn(ops)
        }
        _ => {
            random.shuffle(&mut names);
            in_txn(names.into_iter().map(|n| put_of(name(n), 1)).collect())
        }
    }
}

#[test]
fn a_revision_of_many_events_costs_no_more_than_as_many_revisions() {
    let seed = std::env::var("QUORATE_SEED").map_or(5, |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut state = State::new();
    apply(&mut state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 1 })).unwrap();
    apply(&mut state, in_txn((0..MANY).map(|n| put_of(name(n), 1)).collect())).unwrap();
    for _ in 0..5 {
        let (before, begin) = (state.clone(), looks::so_far());
        if apply(&mut state, large_write(&mut random)).is_err() {
            apply(&mut state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 1 })).unwrap();
        }
        // As a read of the revision before, as its watchers with previous versions, as a member that loads it.
        let past = RangeRequest { revision: before.revision(), ..everything() };
        assert_eq!(state.range(&past).unwrap().kvs, before.range(&everything()).unwrap().kvs);
        for (_, events) in state.events_from(before.revision() + 1).unwrap() {
            for kv in events {
                let one = RangeRequest { key: Bytes::copy_from_slice(kv.key()), ..RangeRequest::default() };
                let was = before.range(&one).unwrap().kvs.pop().filter(|_| kv.version() != 1);
                assert_eq!(state.version_before(kv), was);
            }
        }
        let loaded = load(state.changes(), state.revision());
        assert_eq!(loaded.hash_kv(0), state.hash_kv(0));
        let looks = (looks::so_far() - begin) / MANY as u64;
        assert!(looks < LOOKS_AN_EVENT_MAX, "{looks} looks into versions an event");
    }
    let begin = looks::so_far();
    let (revision, kvs) = (state.revision(), state.range(&everything()).unwrap().kvs);
    do_compact(&mut state, revision).unwrap();
    let mut large = Vec::new();
    while !state.sweep_but(50, &mut large) {}
    assert!(!large.is_empty() && large.iter().all(|revision| revision.events().len() >= MANY), "{}", large.len());
    assert_eq!(state.range(&everything()).unwrap().kvs, kvs);
    let looks = (looks::so_far() - begin) / MANY as u64;
    assert!(looks < LOOKS_AN_EVENT_MAX, "{looks} looks into versions an event of a sweep");
}

/// Keys and bytes in an answer.
fn answered(answer: &OpResponse) -> Cost {
    let of = |kvs: &[KeyValue]| Cost {
        keys: kvs.len() as u64,
        bytes: kvs.iter().map(|kv| kv.as_encoded().len() as u64).sum(),
    };
    match answer {
        OpResponse::ResponseRange(r) => of(&r.kvs),
        OpResponse::ResponsePut(r) => Cost { keys: 1, ..of(r.prev_kv.as_slice()) },
        OpResponse::ResponseDeleteRange(r) => Cost { keys: r.deleted as u64, ..of(&r.prev_kvs) },
        OpResponse::ResponseTxn(r) => all_answered(r),
    }
}

fn all_answered(answer: &TxnResponse) -> Cost {
    answer.responses.iter().fold(Cost::default(), |mut all, one| {
        all += answered(one.response.as_ref().unwrap());
        all
    })
}

/// Whether the bytes of its ranges are an estimate.
fn is_estimated(r: &TxnRequest) -> bool {
    r.success.iter().chain(&r.failure).any(|op| match op.request.as_ref().unwrap() {
        Op::RequestRange(r) => r.revision > 0 || r.sort_target != 0 && r.limit > 0 || r.keys_only || has_filter(r),
        Op::RequestTxn(r) => is_estimated(r),
        _ => false,
    })
}

fn has_filter(r: &RangeRequest) -> bool {
    [r.min_mod_revision, r.max_mod_revision, r.min_create_revision, r.max_create_revision] != [0; 4]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn no_request_does_more_than_was_counted(
        puts in prop::collection::vec(put_request(), 0..20),
        gone in delete_request(),
        range in range_request(),
        txn in txn_request(),
    ) {
        let mut state = State::new();
        for put in puts {
            let _ = apply(&mut state, Request::Put(PutRequest { lease: 0, ..put }));
        }
        apply(&mut state, Request::DeleteRange(gone.clone())).unwrap();
        if let Ok(answer) = state.range(&range) {
            let (cost, found) = (state.range_cost(&range), answered(&OpResponse::ResponseRange(answer)));
            prop_assert!(found.keys <= cost.keys, "{found:?} of {cost:?}");
            if range.revision <= 0 && range.sort_target == 0 && !has_filter(&range) && !range.keys_only {
                prop_assert_eq!(found.bytes, cost.bytes);
            }
        }
        let request = Request::DeleteRange(gone);
        let cost = state.command_cost(&request);
        let Response::DeleteRange(answer) = apply(&mut state.clone(), request).unwrap() else { unreachable!() };
        let found = answered(&OpResponse::ResponseDeleteRange(answer));
        prop_assert_eq!((found.keys.max(1), found.bytes), (cost.keys, cost.bytes));
        // A transaction that slips through the checks may put a key and delete it; then more is gone than there is now.
        if validate::txn(&txn, &Limits::default()).is_ok() {
            let cost = state.txn_cost(&txn);
            if let Ok(answer) = do_txn(&mut state.clone(), txn.clone()) {
                let found = all_answered(&answer);
                prop_assert!(found.keys <= cost.keys, "{found:?} of {cost:?}");
                prop_assert!(found.bytes <= cost.bytes || is_estimated(&txn), "{found:?} of {cost:?}");
            }
        }
    }
}

/// A state of so many keys of 100 bytes.
fn with_keys(keys: usize) -> State {
    let mut state = State::new();
    let value = Bytes::from(vec![7; 100]);
    let ops = (0..keys).map(|n| Op::RequestPut(PutRequest { key: name(n), value: value.clone(), ..put("", "") }));
    apply(&mut state, in_txn(ops.collect())).unwrap();
    state
}

fn comparisons(count: usize) -> Vec<Compare> {
    let one = |n: usize| Compare {
        key: name(n),
        range_end: b("\0"),
        target: CompareTarget::Mod as i32,
        result: CompareResult::Greater as i32,
        target_union: Some(TargetUnion::ModRevision(0)),
    };
    (0..count).map(one).collect()
}

#[test]
fn one_visit_to_every_key_is_never_refused() {
    let state = with_keys(2000);
    let checked = |request| state.check_cost(state.command_cost(&request), 0);
    let delete = DeleteRangeRequest { key: b("\0"), range_end: b("\0"), prev_kv: true };
    checked(Request::DeleteRange(delete.clone())).unwrap();
    checked(in_txn(vec![Op::RequestRange(everything())])).unwrap();
    for sort_target in 0..5 {
        let cost = state.range_cost(&RangeRequest { sort_target, sort_order: 2, ..everything() });
        assert_eq!(cost.keys, 2000);
        state.check_cost(cost, 0).unwrap();
    }
    checked(Request::Txn(TxnRequest { compare: comparisons(1), ..TxnRequest::default() })).unwrap();
}

#[test]
fn many_visits_to_every_key_are_refused_and_say_which_setting_did_it() {
    let state = with_keys(2000);
    let ranges = |count| in_txn(vec![Op::RequestRange(everything()); count]);
    state.check_cost(state.command_cost(&ranges(10)), 25_000).unwrap();
    let refused = state.check_cost(state.command_cost(&ranges(127)), 25_000).unwrap_err().to_string();
    assert!(refused.starts_with("etcdserver: request is too large: "), "{refused}");
    assert!(refused.contains("254000 keys") && refused.contains("limits.request_cost_max (25000)"), "{refused}");
    // A value that is put once and read a thousand times.
    let put = Op::RequestPut(PutRequest { key: b("large"), value: vec![7; 1 << 20].into(), ..put("", "") });
    let reads = vec![Op::RequestRange(get("large", "")); 1000];
    let cost = State::new().command_cost(&in_txn([vec![put], reads].concat()));
    assert!(cost.bytes >= 1000 << 20, "{cost:?}");
    // Both branches are counted as the greater of them, at each level.
    let nested = |success, failure| Op::RequestTxn(TxnRequest { success, failure, ..TxnRequest::default() });
    let (one, two) = (vec![op(Op::RequestRange(everything()))], vec![op(Op::RequestRange(everything())); 2]);
    assert_eq!(state.command_cost(&in_txn(vec![nested(one.clone(), two.clone()), nested(two, one)])).keys, 8000);
}

#[test]
fn comparisons_look_at_a_key_once_however_many_they_are() {
    let state = with_keys(2000);
    let cost = |compare| state.txn_cost(&TxnRequest { compare, ..TxnRequest::default() }).keys;
    assert_eq!(cost(comparisons(1)), 2000 + 2000 / 32);
    assert!(cost(comparisons(60)) < 6000, "{}", cost(comparisons(60)));
    let apart = |n: usize| Compare { key: name(n * 100), range_end: name(n * 100 + 10), ..comparisons(1).remove(0) };
    assert_eq!(cost((0..20).map(apart).collect()), 200 + 200 / 32);
}

#[test]
fn a_limit_bounds_what_is_visited_in_key_order_only() {
    let state = with_keys(2000);
    let limited = RangeRequest { limit: 10, ..everything() };
    assert_eq!(state.range_cost(&limited).keys, 10);
    assert_eq!(state.range_cost(&RangeRequest { sort_order: 2, ..limited.clone() }).keys, 10);
    assert_eq!(state.range_cost(&RangeRequest { sort_target: 4, ..limited.clone() }).keys, 2000);
    assert_eq!(state.range_cost(&RangeRequest { min_mod_revision: 2, ..limited.clone() }).keys, 2000);
    assert_eq!(state.range_cost(&RangeRequest { count_only: true, ..everything() }), Cost { keys: 1, bytes: 0 });
}

#[test]
fn a_range_is_long_if_it_takes_many_keys_or_must_look_at_many() {
    let state = with_keys(5000);
    let is_long = |r: RangeRequest| state.is_long_range(&r);
    let limited = RangeRequest { limit: 10, ..everything() };
    assert!(is_long(everything()));
    assert!(is_long(RangeRequest { limit: 4999, ..everything() }));
    assert!(is_long(RangeRequest { sort_target: 4, ..limited.clone() }));
    assert!(is_long(RangeRequest { min_mod_revision: 2, ..limited.clone() }));
    assert!(is_long(RangeRequest { revision: 2, ..everything() }));
    assert!(!is_long(limited.clone()));
    assert!(!is_long(RangeRequest { sort_order: 2, ..limited }));
    assert!(!is_long(RangeRequest { count_only: true, ..everything() }));
    assert!(!is_long(RangeRequest { range_end: name(4000), ..everything() }));
}
