//! What requests cost: no more than was counted before, and nothing more than O(n log n).
//!
//! Held against it is what carrying them out looks at, compares and copies (`looks`), not what it answers: most of what a range in another
//! order or a comparison takes is in no answer.

use proptest::prelude::*;
use prost::Message as _;

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
        ..Cost::default()
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
        prop_assert_eq!((found.keys.max(1), found.bytes, 0), (cost.keys, cost.bytes, cost.touched));
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
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut plain = with_keys(2000);
    apply(&mut plain, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 1 })).unwrap();
    for n in 0..20 {
        let state = if n > 0 { some_state(&mut random).0 } else { plain.clone() };
        let checked = |request| state.check_cost(state.command_cost(&request), 0);
        let delete = DeleteRangeRequest { key: b("\0"), range_end: b("\0"), prev_kv: random.bool() };
        checked(Request::DeleteRange(delete.clone())).unwrap();
        checked(Request::LeaseRevoke(LeaseRevoke { id: 1, term: 0 })).unwrap();
        for (sort_target, revision) in
            (0..5).flat_map(|target| [(target, 0), (target, 2), (target, state.revision() / 2)])
        {
            for (keys_only, limit) in [(false, 0), (true, 0), (false, 1), (true, 1)] {
                let range = RangeRequest { sort_target, sort_order: 2, revision, keys_only, limit, ..everything() };
                state.check_cost(state.range_cost(&range), 0).unwrap();
                checked(in_txn(vec![Op::RequestRange(range)])).unwrap();
            }
        }
        for target in [CompareTarget::Mod, CompareTarget::Value] {
            let compare = comparisons(1).into_iter().map(|c| Compare { target: target.into(), ..c }).collect();
            checked(Request::Txn(TxnRequest { compare, ..TxnRequest::default() })).unwrap();
        }
    }
    let state = with_keys(2000);
    let sorted = RangeRequest { sort_target: 4, sort_order: 2, ..everything() };
    assert_eq!(state.range_cost(&sorted).keys, 2000);
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
    for count in [1, 60, 1000] {
        let state = with_keys(2000);
        let begin = looks::so_far();
        state.read_txn(&TxnRequest { compare: comparisons(count), ..TxnRequest::default() }).unwrap();
        let looks = looks::so_far() - begin;
        assert!(looks < 4 * 2000 + 50 * count as u64, "{looks} looks for {count} comparisons");
    }
}

#[test]
fn operands_of_nested_comparisons_are_put_in_order_once() {
    const OPERAND_BYTES: usize = 11 << 10;
    let state = with_keys(300);
    let nested = |n: usize| Compare {
        key: name(n),
        range_end: name(299 - n),
        target: CompareTarget::Value.into(),
        result: CompareResult::NotEqual.into(),
        target_union: Some(TargetUnion::Value([vec![9; OPERAND_BYTES], vec![n as u8]].concat().into())),
    };
    let txn = TxnRequest { compare: (0..128).map(nested).collect(), ..TxnRequest::default() };
    let begin = looks::touched_so_far();
    assert!(state.read_txn(&txn).unwrap().succeeded);
    let touched = looks::touched_so_far() - begin;
    assert!(touched < 10 * 128 * OPERAND_BYTES as u64, "{touched} bytes compared");
}

#[test]
fn long_keys_and_values_count_wherever_they_are_copied_or_compared() {
    const LONG: usize = 100_000;
    let long = |n: usize| Bytes::from([vec![b'l'; LONG], n.to_string().into_bytes()].concat());
    let many = |ops: Vec<Op>| Cost { bytes: 0, ..State::new().command_cost(&in_txn(ops)) };
    assert_eq!(many(vec![Op::RequestPut(put("a", "v")); 2]).units(), 2);
    let mut state = State::new();
    apply(&mut state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 1 })).unwrap();
    apply(&mut state, in_txn((0..64).map(|n| put_of(long(n), 1)).collect())).unwrap();
    let keys_only = RangeRequest { keys_only: true, ..everything() };
    assert!(state.range_cost(&keys_only).bytes > 64 * LONG as u64 && state.is_long_range(&keys_only));
    let refused = |state: &State, op: Op| {
        let cost = state.command_cost(&in_txn(vec![op; 127]));
        state.check_cost(cost, 500_000).is_err()
    };
    assert!(refused(&state, Op::RequestRange(keys_only.clone())));
    let delete = DeleteRangeRequest { key: b("\0"), range_end: b("\0"), prev_kv: false };
    let revoke = Request::LeaseRevoke(LeaseRevoke { id: 1, term: 0 });
    for request in [Request::DeleteRange(delete), revoke] {
        assert!(state.command_cost(&request).work() > 6000, "{:?}", state.command_cost(&request));
    }
    // Values that are the same to their ends; a later revision has others.
    let mut state = State::new();
    let value = Bytes::from(vec![7; LONG]);
    let puts = |value: Bytes| {
        (0..31).map(move |n| Op::RequestPut(PutRequest { key: name(n), value: value.clone(), ..put("", "") }))
    };
    apply(&mut state, in_txn(puts(value).collect())).unwrap();
    let kept = PutRequest { key: name(1), ignore_value: true, ..put("", "") };
    assert!(state.command_cost(&Request::Put(kept)).work() > 90);
    let sorted = RangeRequest { sort_target: 4, limit: 1, keys_only: true, ..everything() };
    assert!(state.is_long_range(&sorted) && refused(&state, Op::RequestRange(sorted.clone())));
    let revision = state.revision();
    apply(&mut state, in_txn(puts(b("v")).collect())).unwrap();
    assert!(!state.is_long_range(&sorted));
    assert!(state.is_long_range(&RangeRequest { revision, ..sorted.clone() }));
    assert!(refused(&state, Op::RequestRange(RangeRequest { revision, ..sorted })));
}

#[test]
fn a_sort_with_a_limit_compares_long_values_a_few_times_only() {
    let mut state = State::new();
    // The greatest are long and the same, and stay until the end; what comes behind them is short.
    let value = |n: usize| if n < 8 { Bytes::from(vec![b'z'; 20_000]) } else { b("v") };
    let ops = (0..4000).map(|n| Op::RequestPut(PutRequest { key: name(n), value: value(n), ..put("", "") }));
    apply(&mut state, in_txn(ops.collect())).unwrap();
    let range = RangeRequest { sort_target: 4, sort_order: 2, limit: 7, ..everything() };
    let begin = looks::touched_so_far();
    assert_eq!(state.range(&range).unwrap().kvs.last().unwrap().key(), name(6));
    let touched = looks::touched_so_far() - begin;
    assert!(touched <= state.range_cost(&range).touched, "{touched} bytes compared");
}

#[test]
fn a_past_read_counts_its_steps_back() {
    let mut state = with_keys(1000);
    for _ in 0..3 {
        apply(&mut state, in_txn((0..1000).map(|n| put_of(name(n), 0)).collect())).unwrap();
    }
    let past = |revision| RangeRequest { revision, limit: 1, ..everything() };
    assert_eq!(state.range_cost(&past(0)).steps, 0);
    assert_eq!(state.range_cost(&past(state.revision())).steps, 0);
    let steps = state.range_cost(&past(2)).steps;
    assert!((3000..4000).contains(&steps), "{steps}");
    assert!(state.is_long_range(&past(2)));
    // Of revisions with one event each it is known how many there were.
    let mut state = with_keys(1);
    (1..1000).for_each(|n| drop(apply(&mut state, in_txn(vec![put_of(name(n), 0)])).unwrap()));
    assert_eq!(state.range_cost(&past(state.revision() - 7)).steps, 7);
}

#[test]
fn a_limit_bounds_what_is_visited_in_key_order_only() {
    let state = with_keys(2000);
    let limited = RangeRequest { limit: 10, ..everything() };
    assert_eq!(state.range_cost(&limited).keys, 10);
    assert_eq!(state.range_cost(&RangeRequest { sort_order: 2, ..limited.clone() }).keys, 10);
    assert_eq!(state.range_cost(&RangeRequest { sort_target: 4, ..limited.clone() }).keys, 2000);
    assert_eq!(state.range_cost(&RangeRequest { min_mod_revision: 2, ..limited.clone() }).keys, 2000);
    assert_eq!(
        state.range_cost(&RangeRequest { count_only: true, ..everything() }),
        Cost { keys: 1, ..Cost::default() }
    );
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

/// How often a key that is counted is looked at, at most, by a read and by what writes.
const READ_LOOKS_A_KEY: u64 = 24;
const WRITE_LOOKS_A_KEY: u64 = 150;
/// Beside its keys, an operation or a comparison looks for where they begin and end.
const LOOKS_AN_OPERATION: u64 = 100;

/// A state of many keys, some of them and of their values long and alike, with as many past versions; and its names.
fn some_state(random: &mut fastrand::Rng) -> (State, Vec<Bytes>) {
    let mut state = State::new();
    apply(&mut state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 1 })).unwrap();
    let count = [20, 300, 1500][random.usize(..3)];
    let mut names: Vec<Bytes> = (0..count).map(name).collect();
    let long = random.usize(0..6);
    names.extend((0..long).map(|n| Bytes::from([vec![b'k'; 20_000], n.to_string().into_bytes()].concat())));
    let lengths = [0, 9, 9, 300, 5000];
    for _ in 0..random.usize(1..6) {
        let is_all = random.bool();
        let put = |name: &Bytes, random: &mut fastrand::Rng| {
            let mut value = vec![7; lengths[random.usize(..if count < 1000 { 5 } else { 4 })]];
            value.extend((0..random.usize(..2)).map(|_| random.u8(..)));
            let lease = i64::from(random.u8(..4) == 0);
            Op::RequestPut(PutRequest { key: name.clone(), value: value.into(), lease, ..put("", "") })
        };
        let some: Vec<_> = names.iter().filter(|_| is_all || random.u8(..4) == 0).cloned().collect();
        apply(&mut state, in_txn(some.iter().map(|name| put(name, random)).collect())).unwrap();
        if random.bool() {
            let gone = random.usize(..count);
            let delete =
                DeleteRangeRequest { key: name(gone), range_end: name(gone + random.usize(..50)), prev_kv: false };
            apply(&mut state, Request::DeleteRange(delete)).unwrap();
        }
    }
    (state, names)
}

fn some_interval(names: &[Bytes], random: &mut fastrand::Rng) -> (Bytes, Bytes) {
    let one = |random: &mut fastrand::Rng| names[random.usize(..names.len())].clone();
    match random.u8(..4) {
        0 => (b("\0"), b("\0")),
        1 => (one(random), b("")),
        2 => (one(random), b("\0")),
        _ => (one(random), one(random)),
    }
}

fn any_range(state: &State, names: &[Bytes], random: &mut fastrand::Rng) -> RangeRequest {
    let (key, range_end) = some_interval(names, random);
    let mut some = |most: i64| if random.u8(..3) == 0 { random.i64(1..=most) } else { 0 };
    let (limit, revision, min_mod_revision, max_create_revision) =
        (some(50), some(state.revision()), some(9), some(state.revision()));
    let (sort_order, sort_target) = (random.i32(0..3), random.i32(0..5));
    let (keys_only, count_only) = (random.bool(), random.u8(..8) == 0);
    let filters = RangeRequest { min_mod_revision, max_create_revision, ..RangeRequest::default() };
    RangeRequest { key, range_end, limit, revision, sort_order, sort_target, keys_only, count_only, ..filters }
}

/// One that most keys meet, so that all of them have to be looked at.
fn any_compare(names: &[Bytes], random: &mut fastrand::Rng) -> Compare {
    let (key, range_end) = some_interval(names, random);
    let mut operand = vec![7; [0, 9, 300, 5000][random.usize(..4)]];
    operand.extend([random.u8(..), 1, 2, 3]);
    let (target, result, operand) = match random.u8(..4) {
        0 => (CompareTarget::Mod, CompareResult::Greater, TargetUnion::ModRevision(0)),
        1 => (CompareTarget::Version, CompareResult::NotEqual, TargetUnion::Version(random.i64(7..99))),
        _ => (CompareTarget::Value, CompareResult::NotEqual, TargetUnion::Value(operand.into())),
    };
    Compare { key, range_end, target: target.into(), result: result.into(), target_union: Some(operand) }
}

fn any_txn(state: &State, names: &[Bytes], is_read: bool, depth: u8, random: &mut fastrand::Rng) -> TxnRequest {
    let compare = (0..[0, 1, 40][random.usize(..3)]).map(|_| any_compare(names, random)).collect();
    let mut ops = || {
        let one = |random: &mut fastrand::Rng| match random.u8(..if is_read { 3 } else { 6 }) {
            0 if depth > 0 => Op::RequestTxn(any_txn(state, names, is_read, depth - 1, random)),
            0..3 => Op::RequestRange(any_range(state, names, random)),
            3..5 => {
                let (key, value) = (names[random.usize(..names.len())].clone(), Bytes::new());
                Op::RequestPut(PutRequest { key, value, ignore_value: random.bool(), ..put("", "") })
            }
            _ => {
                let (key, range_end) = some_interval(names, random);
                Op::RequestDeleteRange(DeleteRangeRequest { key, range_end, prev_kv: random.bool() })
            }
        };
        (0..random.usize(..4)).map(|_| op(one(random))).collect::<Vec<_>>()
    };
    let (success, failure) = (ops(), ops());
    TxnRequest { compare, success, failure }
}

/// Operations and comparisons.
fn operations(r: &TxnRequest) -> u64 {
    let nested = r.success.iter().chain(&r.failure).map(|op| match &op.request {
        Some(Op::RequestTxn(r)) => 1 + operations(r),
        _ => 1,
    });
    r.compare.len() as u64 + nested.sum::<u64>()
}

/// Any request on any state: what carrying it out looks at, compares and copies, beside what was counted.
#[test]
fn no_request_looks_at_more_than_a_few_times_what_was_counted() {
    let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut worst = [0.0_f64; 4];
    for _ in 0..150 {
        let (state, names) = some_state(&mut random);
        for _ in 0..8 {
            let (is_range, is_read) = (random.bool(), random.bool());
            let range = any_range(&state, &names, &mut random);
            let txn = any_txn(&state, &names, is_read, 2, &mut random);
            let cost = if is_range { state.range_cost(&range) } else { state.txn_cost(&txn) };
            let own = if is_range { range.encoded_len() } else { txn.encoded_len() } as u64;
            let operations = if is_range { 1 } else { 1 + operations(&txn) };
            let begin = (looks::so_far(), looks::touched_so_far());
            let is_done = match (is_range, is_read) {
                (true, _) => state.range(&range).is_ok(),
                (false, true) => state.read_txn(&txn).is_ok(),
                (false, false) => do_txn(&mut state.clone(), txn.clone()).is_ok(),
            };
            let (looks, touched) = (looks::so_far() - begin.0, looks::touched_so_far() - begin.1);
            let what = || {
                let request = if is_range { format!("{range:?}") } else { format!("{txn:?}") };
                let request: String = request.chars().take(2000).collect();
                format!(
                    "{looks} looks, {touched} bytes of {cost:?}, {operations} operations, done: {is_done}: {request}"
                )
            };
            let a_key = if is_range || is_read { READ_LOOKS_A_KEY } else { WRITE_LOOKS_A_KEY };
            let looks_max = a_key * (cost.keys + cost.steps) + LOOKS_AN_OPERATION * operations;
            assert!(looks <= looks_max, "{}", what());
            // A key that is short goes with its look; the operands of a request are compared among themselves, too.
            let touched_max = 4 * (cost.touched + cost.bytes) + 20 * cost.keys + 20 * own;
            assert!(touched <= touched_max, "{}", what());
            let at = usize::from(!(is_range || is_read));
            worst[at] = worst[at].max(looks as f64 / looks_max as f64);
            worst[2 + at] = worst[2 + at].max(touched as f64 / touched_max as f64);
        }
    }
    println!("the most of what was allowed: {worst:?}");
}
