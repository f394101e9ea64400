//! The rules of the KV API, one a test.

use super::*;
use crate::kv::{APPLY_VERSION, Fault, LoadError, WANTED_SIZE_SINCE, is_read_only};
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::response_op::Response as OpResponse;
use crate::pb::log::{SetClusterVersion, WantedSize, change};

fn filled() -> State {
    let mut state = State::new();
    for (key, value) in [("a", "3"), ("b", "1"), ("c", "2"), ("d", "0")] {
        do_put(&mut state, key, value);
    }
    state
}

fn compare(key: &'static str, target: CompareTarget, result: CompareResult, operand: TargetUnion) -> Compare {
    Compare {
        key: b(key),
        target: target as i32,
        result: result as i32,
        target_union: Some(operand),
        ..Compare::default()
    }
}

#[test]
fn an_empty_store_has_revision_1_and_the_first_put_makes_2() {
    let mut state = State::new();
    assert_eq!((state.revision(), state.compacted(), state.key_count()), (1, 0, 0));
    assert_eq!(do_put(&mut state, "a", "1"), 2);
    assert_eq!(read_at(&state, 1).unwrap(), "");
    assert_eq!(read_at(&state, 2).unwrap(), "a=1");
}

#[test]
fn versions_count_a_keys_life() {
    let mut state = State::new();
    do_put(&mut state, "a", "1");
    do_put(&mut state, "a", "1");
    let kv = state.range(&get("a", "")).unwrap().kvs.remove(0);
    assert_eq!((kv.create_revision(), kv.mod_revision(), kv.version()), (2, 3, 2));
    do_delete(&mut state, "a", "");
    do_put(&mut state, "a", "2");
    let kv = state.range(&get("a", "")).unwrap().kvs.remove(0);
    assert_eq!((kv.create_revision(), kv.mod_revision(), kv.version()), (5, 5, 1));
}

#[test]
fn range_end_says_which_keys() {
    let state = filled();
    let cases = [
        ("a", "", "a=3"),
        ("aa", "", ""),
        ("b", "d", "b=1 c=2"),
        ("b", "\0", "b=1 c=2 d=0"),
        ("\0", "\0", "a=3 b=1 c=2 d=0"),
        ("c", "c", ""),
        ("c", "a", ""),
    ];
    for (key, range_end, expected) in cases {
        assert_eq!(read(&state, key, range_end), expected, "[{key:?}, {range_end:?})");
    }
}

#[test]
fn a_limit_cuts_after_filter_and_sort_and_count_ignores_all_three() {
    let state = filled();
    let all = get("\0", "\0");
    let (asc, desc) = (SortOrder::Ascend as i32, SortOrder::Descend as i32);
    let (by_value, by_mod) = (SortTarget::Value as i32, SortTarget::Mod as i32);
    let cases = [
        (RangeRequest { limit: 2, ..all.clone() }, "a=3 b=1", true),
        (RangeRequest { limit: 4, ..all.clone() }, "a=3 b=1 c=2 d=0", false),
        (RangeRequest { limit: 2, sort_order: desc, ..all.clone() }, "d=0 c=2", true),
        (RangeRequest { limit: 9, sort_order: desc, ..all.clone() }, "d=0 c=2 b=1 a=3", false),
        (RangeRequest { limit: 3, sort_order: asc, sort_target: by_value, ..all.clone() }, "d=0 b=1 c=2", true),
        (RangeRequest { sort_target: by_value, ..all.clone() }, "d=0 b=1 c=2 a=3", false),
        (RangeRequest { limit: 1, sort_order: desc, sort_target: by_mod, ..all.clone() }, "d=0", true),
        (RangeRequest { min_mod_revision: 3, max_mod_revision: 4, ..all.clone() }, "b=1 c=2", false),
        (RangeRequest { limit: 1, min_create_revision: 3, ..all.clone() }, "b=1", true),
        (RangeRequest { limit: 1, max_create_revision: 2, ..all.clone() }, "a=3", false),
        (RangeRequest { keys_only: true, limit: 1, ..all.clone() }, "a=", true),
        (RangeRequest { count_only: true, limit: 1, ..all.clone() }, "", false),
    ];
    for (request, expected, more) in cases {
        for revision in [0, 5] {
            let answer = state.range(&RangeRequest { revision, ..request.clone() }).unwrap();
            assert_eq!((show(&answer.kvs).as_str(), answer.more, answer.count), (expected, more, 4), "{request:?}");
        }
    }
}

#[test]
fn a_header_carries_the_present_revision_also_of_an_old_read() {
    let state = filled();
    let answer = state.range(&RangeRequest { revision: 3, ..get("\0", "\0") }).unwrap();
    assert_eq!((show(&answer.kvs).as_str(), answer.header.unwrap().revision), ("a=3 b=1", 5));
}

#[test]
fn put_returns_what_it_replaced_if_asked() {
    let mut state = filled();
    let Response::Put(answer) = apply(&mut state, Request::Put(PutRequest { prev_kv: true, ..put("a", "4") })).unwrap()
    else {
        panic!("a put answers a put");
    };
    assert_eq!(answer.prev_kv.unwrap().value(), b"3");
    assert_eq!(answer.header.unwrap().revision, 6);
}

#[test]
fn ignoring_the_value_needs_a_key_and_keeps_its_value() {
    let mut state = filled();
    let ignore = |key| Request::Put(PutRequest { ignore_value: true, ..put(key, "") });
    assert_eq!(apply(&mut state, ignore("x")), Err(Error::KeyNotFound));
    assert_eq!(state.revision(), 5);
    apply(&mut state, ignore("a")).unwrap();
    assert_eq!((read(&state, "a", "").as_str(), state.revision()), ("a=3", 6));
    let lease = Request::Put(PutRequest { ignore_lease: true, ..put("x", "") });
    assert_eq!(apply(&mut state, lease), Err(Error::KeyNotFound));
}

#[test]
fn a_lease_that_nobody_granted_is_not_found() {
    let mut state = State::new();
    let request = Request::Put(PutRequest { lease: 7, ..put("a", "") });
    assert_eq!(apply(&mut state, request), Err(Error::LeaseNotFound));
    assert_eq!(state.revision(), 1);
}

#[test]
fn a_delete_of_nothing_makes_no_revision() {
    let mut state = filled();
    let answer = do_delete(&mut state, "x", "z");
    assert_eq!((answer.deleted, answer.header.unwrap().revision, state.revision()), (0, 5, 5));
    let answer = do_delete(&mut state, "b", "d");
    assert_eq!((answer.deleted, show(&answer.prev_kvs).as_str()), (2, "b=1 c=2"));
    assert_eq!((answer.header.unwrap().revision, state.revision(), state.key_count()), (6, 6, 2));
    assert_eq!(read_at(&state, 5).unwrap(), "a=3 b=1 c=2 d=0");
}

#[test]
fn comparisons_read_a_missing_key_as_zeros_but_its_value_as_none() {
    use {CompareResult::*, CompareTarget::*, TargetUnion as T};
    let mut state = filled();
    let cases = [
        (compare("a", Version, Equal, T::Version(1)), true),
        (compare("a", Create, Less, T::CreateRevision(3)), true),
        (compare("b", Mod, Greater, T::ModRevision(3)), false),
        (compare("a", Value, Equal, T::Value(b("3"))), true),
        (compare("a", Value, NotEqual, T::Value(b("3"))), false),
        (compare("a", Lease, Equal, T::Lease(0)), true),
        (compare("x", Version, Equal, T::Version(0)), true),
        (compare("x", Create, NotEqual, T::CreateRevision(0)), false),
        (compare("x", Mod, Less, T::ModRevision(1)), true),
        (compare("x", Lease, Equal, T::Lease(0)), true),
        (compare("x", Value, Equal, T::Value(b(""))), false),
        (compare("x", Value, NotEqual, T::Value(b("3"))), false),
        (Compare { range_end: b("\0"), ..compare("a", Mod, Greater, T::ModRevision(1)) }, true),
        (Compare { range_end: b("\0"), ..compare("a", Mod, Greater, T::ModRevision(2)) }, false),
        (Compare { range_end: b("z"), ..compare("x", Version, Equal, T::Version(0)) }, true),
        (Compare { range_end: b("z"), ..compare("x", Value, Less, T::Value(b("9"))) }, false),
        // The operand of another target counts as none.
        (compare("a", Version, Greater, T::Value(b("3"))), true),
        // What this build does not know never holds.
        (Compare { target: 77, ..compare("a", Version, Equal, T::Version(1)) }, false),
        (Compare { result: 77, ..compare("a", Version, Equal, T::Version(1)) }, false),
    ];
    for (c, expected) in cases {
        let r = TxnRequest { compare: vec![c.clone()], ..TxnRequest::default() };
        assert_eq!(state.read_txn(&r).unwrap().succeeded, expected, "{c:?}");
        assert_eq!(do_txn(&mut state, r).unwrap().succeeded, expected, "{c:?}");
    }
    assert_eq!(state.revision(), 5);
}

#[test]
fn a_txn_makes_one_revision_and_reads_its_own_writes() {
    let mut state = filled();
    let r = TxnRequest {
        success: vec![
            op(Op::RequestRange(get("a", "\0"))),
            op(Op::RequestPut(put("a", "9"))),
            op(Op::RequestDeleteRange(delete("c", "\0"))),
            op(Op::RequestRange(get("a", "\0"))),
            op(Op::RequestRange(RangeRequest { revision: 5, ..get("a", "\0") })),
        ],
        ..TxnRequest::default()
    };
    let answer = do_txn(&mut state, r).unwrap();
    let ranges: Vec<(String, i64)> = answer
        .responses
        .iter()
        .filter_map(|r| match r.response.as_ref().unwrap() {
            OpResponse::ResponseRange(r) => Some((show(&r.kvs), r.header.unwrap().revision)),
            _ => None,
        })
        .collect();
    let before = "a=3 b=1 c=2 d=0".to_owned();
    assert_eq!(ranges, [(before.clone(), 5), ("a=9 b=1".into(), 6), (before, 6)]);
    assert_eq!((answer.header.unwrap().revision, state.revision()), (6, 6));
    let events: Vec<(i64, String)> = state.events_from(6).unwrap().map(|(r, events)| (r, show(events))).collect();
    assert_eq!(events, [(6, "a=9 c= d=".to_owned())]);
}

#[test]
fn nested_comparisons_see_the_state_before_the_txn() {
    use {CompareResult::*, CompareTarget::*};
    let mut state = filled();
    let nested = TxnRequest {
        compare: vec![compare("x", Version, Equal, TargetUnion::Version(0))],
        success: vec![op(Op::RequestPut(put("then", "1")))],
        failure: vec![op(Op::RequestPut(put("else", "1")))],
    };
    let r = TxnRequest {
        success: vec![op(Op::RequestPut(put("x", "1"))), op(Op::RequestTxn(nested))],
        ..TxnRequest::default()
    };
    do_txn(&mut state, r).unwrap();
    assert_eq!(read(&state, "e", "\0"), "then=1 x=1");
}

#[test]
fn a_txn_that_fails_writes_nothing() {
    let future = RangeRequest { revision: 99, ..get("a", "") };
    let late_failures = [
        (op(Op::RequestPut(PutRequest { ignore_value: true, ..put("x", "") })), Error::KeyNotFound),
        (op(Op::RequestPut(PutRequest { lease: 3, ..put("x", "") })), Error::LeaseNotFound),
        (op(Op::RequestRange(future)), Error::FutureRevision),
        (RequestOp { request: None }, Error::KeyNotFound),
    ];
    for (failing, error) in late_failures {
        for nested in [false, true] {
            let mut state = filled();
            let before = state.hash_kv(0).unwrap();
            let failing = match nested {
                true => op(Op::RequestTxn(TxnRequest { success: vec![failing.clone()], ..TxnRequest::default() })),
                false => failing.clone(),
            };
            let success = vec![op(Op::RequestPut(put("a", "9"))), op(Op::RequestDeleteRange(delete("b", ""))), failing];
            assert_eq!(do_txn(&mut state, TxnRequest { success, ..TxnRequest::default() }), Err(error.clone()));
            assert_eq!((state.hash_kv(0).unwrap(), read(&state, "\0", "\0")), (before, "a=3 b=1 c=2 d=0".into()));
        }
    }
}

#[test]
fn only_a_txn_without_any_write_is_read_only() {
    let read = op(Op::RequestRange(get("a", "")));
    let write = op(Op::RequestPut(put("a", "")));
    let txn = |success: &[&RequestOp], failure: &[&RequestOp]| TxnRequest {
        success: success.iter().copied().cloned().collect(),
        failure: failure.iter().copied().cloned().collect(),
        ..TxnRequest::default()
    };
    let nested = op(Op::RequestTxn(txn(&[&read], &[&write])));
    assert!(is_read_only(&txn(&[&read], &[&read])));
    assert!(!is_read_only(&txn(&[&read], &[&write])));
    assert!(!is_read_only(&txn(&[&nested], &[])));
}

#[test]
fn compaction_is_refused_outside_the_uncompacted_revisions() {
    let mut state = filled();
    assert_eq!(do_compact(&mut state, 6), Err(Error::FutureRevision));
    assert_eq!(do_compact(&mut state, 0), Err(Error::Compacted));
    do_compact(&mut state, 4).unwrap();
    assert_eq!(do_compact(&mut state, 4), Err(Error::Compacted));
    assert_eq!(do_compact(&mut state, 3), Err(Error::Compacted));
    assert_eq!(read_at(&state, 3), Err(Error::Compacted));
    assert_eq!(read_at(&state, 4).unwrap(), "a=3 b=1 c=2");
    assert_eq!(read_at(&state, 6), Err(Error::FutureRevision));
    assert_eq!(state.hash_kv(3), Err(Error::Compacted));
    assert_eq!(state.hash_kv(6), Err(Error::FutureRevision));
}

#[test]
fn compaction_keeps_the_newest_version_of_what_exists() {
    let mut state = State::new();
    do_put(&mut state, "a", "1"); // 2
    do_put(&mut state, "a", "2"); // 3
    do_put(&mut state, "b", "1"); // 4
    do_delete(&mut state, "b", ""); // 5
    do_put(&mut state, "a", "3"); // 6
    do_compact(&mut state, 5).unwrap();
    let before = state.bytes();
    sweep_all(&mut state);
    assert!(state.bytes() < before);
    let held: Vec<i64> = state.old.iter_at(0).map(KeyValue::mod_revision).collect();
    assert_eq!(held, [3], "a's version of revision 3 is what a read at 5 sees");
    assert_eq!(read_at(&state, 5).unwrap(), "a=2");
    do_compact(&mut state, 6).unwrap();
    sweep_all(&mut state);
    assert_eq!((state.old.len(), state.old_bytes), (0, 0));
}

#[test]
fn sweeping_everything_gives_the_memory_back() {
    let mut state = State::new();
    for _ in 0..100 {
        do_put(&mut state, "a", "1");
        do_put(&mut state, "b", "1");
        do_delete(&mut state, "b", "");
    }
    do_put(&mut state, "c", "1");
    let revision = state.revision();
    do_compact(&mut state, revision).unwrap();
    let mut slices = 1;
    while !state.sweep(7) {
        slices += 1;
    }
    assert_eq!(slices, (301_i32 + 6) / 7);
    assert_eq!(state.events_from(revision).unwrap().count(), 1, "a watcher may start at the compacted revision");
    let history_bytes = state.bytes() - State::new().bytes() - state.live_bytes();
    assert!(history_bytes <= 32, "{history_bytes} bytes beside the two keys");
}

#[test]
fn events_below_the_compacted_revision_are_gone() {
    let mut state = filled();
    do_compact(&mut state, 4).unwrap();
    assert!(matches!(state.events_from(3), Err(Error::Compacted)));
    for _ in 0..2 {
        let seen: Vec<i64> = state.events_from(4).unwrap().map(|x| x.0).collect();
        assert_eq!(seen, [4, 5]);
        sweep_all(&mut state);
    }
    assert_eq!(state.events_from(6).unwrap().count(), 0);
    assert_eq!(state.events_from(99).unwrap().count(), 0);
}

#[test]
fn a_clone_is_a_view_that_later_commands_do_not_change() {
    let mut state = filled();
    let view = state.clone();
    do_put(&mut state, "a", "9");
    do_delete(&mut state, "b", "\0");
    do_compact(&mut state, 7).unwrap();
    sweep_all(&mut state);
    assert_eq!(read(&view, "\0", "\0"), "a=3 b=1 c=2 d=0");
    assert_eq!((view.revision(), view.compacted(), read_at(&view, 3).unwrap().as_str()), (5, 0, "a=3 b=1"));
    assert_eq!(read(&state, "\0", "\0"), "a=9");
}

#[test]
fn a_newer_command_stops_the_member_and_changes_nothing() {
    let mut state = filled();
    let newer = Command::new(APPLY_VERSION + 1, Request::Put(put("a", "9")));
    assert_eq!(state.apply(&newer, true), Err(Fault::Unsupported { needs: APPLY_VERSION + 1 }));
    assert_eq!(state.apply(&Command::default(), true), Err(Fault::UnknownCommand));
    let raise = SetClusterVersion { version: APPLY_VERSION + 1 };
    let raise = Command::new(1, Request::SetClusterVersion(raise));
    assert_eq!(state.apply(&raise, true), Err(Fault::Unsupported { needs: APPLY_VERSION + 1 }));
    assert_eq!((state.revision(), state.cluster_version()), (5, 1));
}

#[test]
fn the_wanted_size_is_journaled_and_survives_a_snapshot() {
    let mut state = filled();
    state.keep_journal(1000);
    let want = |replicas| {
        let size = WantedSize { start: 1, replicas };
        (size, Command::new(WANTED_SIZE_SINCE, Request::WantedSize(size)))
    };
    let (five, command) = want(5);
    for _ in 0..2 {
        assert_eq!(state.apply(&command, true).unwrap().unwrap().response, Some(Response::WantedSize(five)));
    }
    assert_eq!((state.wanted_size(), state.revision()), (Some(five), 5), "it makes no revision");
    let journal = state.take_journal().changes;
    assert_eq!(journal, [Change { change: Some(change::Change::WantedSize(five)) }], "only what changed");
    let mut loader = Loader::new();
    state.changes().chain(journal).for_each(|change| loader.load(change).unwrap());
    assert_eq!(loader.finish(5).unwrap().wanted_size(), Some(five));
    state.apply(&want(0).1, false).unwrap().unwrap();
    assert_eq!(state.wanted_size(), None, "0 is nobody's wish");
    let marked_low = Command { needs: 1, ..command };
    assert_eq!(State::check(&marked_low), Ok(()), "its kind says what it needs");
}

#[test]
fn without_a_waiter_no_answer_is_made() {
    let mut state = State::new();
    let command = Command::new(1, Request::Put(put("a", "1")));
    assert_eq!(state.apply(&command, false), Ok(Ok(Answer::default())));
    assert_eq!(read(&state, "a", ""), "a=1");
}

#[test]
fn the_journal_holds_what_changed_or_says_that_it_could_not() {
    let mut state = State::new();
    do_put(&mut state, "a", "1");
    assert_eq!(state.take_journal().changes, [], "no journal unless asked for");
    state.keep_journal(1000);
    do_put(&mut state, "a", "2");
    do_delete(&mut state, "a", "");
    do_compact(&mut state, 3).unwrap();
    let journal = state.take_journal();
    let kinds: Vec<i64> = journal
        .changes
        .iter()
        .map(|c| match c.change.as_ref().unwrap() {
            change::Change::Version(kv) => kv.mod_revision(),
            change::Change::Compacted(revision) => -revision,
            change::Change::ClusterVersion(_)
            | change::Change::Lease(_)
            | change::Change::Alarms(_)
            | change::Change::AuthUser(_)
            | change::Change::AuthRole(_)
            | change::Change::Auth(_)
            | change::Change::Role(_)
            | change::Change::WantedSize(_) => 0,
        })
        .collect();
    assert_eq!((kinds, journal.overflowed), (vec![3, 4, -3], false));
    assert!(state.clone().take_journal().changes.is_empty());
    for _ in 0..100 {
        do_put(&mut state, "a", "2");
    }
    let journal = state.take_journal();
    assert_eq!((journal.changes.len(), journal.overflowed), (0, true));
    do_put(&mut state, "a", "2");
    assert_eq!((state.take_journal().changes.len(), state.take_journal().overflowed), (1, false));
}

#[test]
fn loading_refuses_what_is_incomplete_or_damaged() {
    let version = |key: &str, revision| Change {
        change: Some(change::Change::Version(KeyValue::new(crate::pb::Fields {
            key: key.as_bytes(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            ..crate::pb::Fields::default()
        }))),
    };
    let compacted = |revision| Change { change: Some(change::Change::Compacted(revision)) };
    let load = |changes: &[Change], revision| {
        let mut loader = Loader::new();
        changes.iter().cloned().try_for_each(|c| loader.load(c))?;
        loader.finish(revision).map(|state| state.revision())
    };
    let counted = |versions| Change {
        change: Some(change::Change::Version(KeyValue::new(crate::pb::Fields {
            key: b"a",
            create_revision: 2,
            mod_revision: 2,
            version: versions,
            ..crate::pb::Fields::default()
        }))),
    };
    let (a3, b4, b7) = (version("a", 3), version("b", 4), version("b", 7));
    let cases = [
        (vec![], 1, Ok(1)),
        (vec![], 5, Err(LoadError::Gap { missing: 5, compacted: 0 })),
        (vec![compacted(5)], 5, Ok(5)),
        (vec![compacted(6)], 5, Err(LoadError::BeyondEnd { loaded: 6, revision: 5 })),
        (vec![a3.clone(), b4.clone()], 4, Err(LoadError::Gap { missing: 2, compacted: 0 })),
        (vec![a3.clone(), b4.clone(), compacted(2)], 4, Ok(4)),
        (vec![b4.clone(), a3.clone(), compacted(3)], 4, Ok(4)),
        (vec![b4.clone(), a3.clone(), compacted(2)], 4, Err(LoadError::Gap { missing: 3, compacted: 2 })),
        (vec![a3.clone(), b7.clone(), compacted(5)], 7, Err(LoadError::Gap { missing: 6, compacted: 5 })),
        (vec![a3.clone(), b7.clone(), compacted(6)], 7, Ok(7)),
        (vec![a3.clone(), b7.clone(), compacted(8)], 9, Err(LoadError::Gap { missing: 9, compacted: 8 })),
        (vec![a3.clone(), b7.clone(), compacted(6)], 6, Err(LoadError::BeyondEnd { loaded: 7, revision: 6 })),
        (vec![b7.clone(), b4.clone()], 7, Err(LoadError::OutOfOrder { later: 7, earlier: 4 })),
        (vec![version("", 3)], 3, Err(LoadError::BadVersion(3))),
        (vec![version("a", 1)], 3, Err(LoadError::BadVersion(1))),
        (vec![Change { change: None }], 3, Err(LoadError::UnknownChange)),
        // A number that the next write could not follow.
        (vec![], i64::MAX, Err(LoadError::BadRevision(i64::MAX))),
        (vec![], -1, Err(LoadError::BadRevision(-1))),
        (vec![compacted(i64::MAX)], i64::MAX, Err(LoadError::BadRevision(i64::MAX))),
        (vec![compacted(i64::MIN)], 3, Err(LoadError::BadRevision(i64::MIN))),
        (vec![version("a", i64::MAX)], i64::MAX, Err(LoadError::BadVersion(i64::MAX))),
        (vec![counted(i64::MAX)], 2, Err(LoadError::BadVersion(2))),
        (vec![counted(-1)], 2, Err(LoadError::BadVersion(2))),
    ];
    for (changes, revision, expected) in cases {
        assert_eq!(load(&changes, revision), expected, "{changes:?} up to {revision}");
    }
}

#[test]
fn a_divergence_changes_the_hash() {
    let (mut one, mut other) = (filled(), filled());
    assert_eq!(one.hash_kv(0), other.hash_kv(5));
    do_put(&mut one, "e", "1");
    do_put(&mut other, "e", "2");
    assert_ne!(one.hash_kv(0).unwrap().hash, other.hash_kv(0).unwrap().hash);
    assert_eq!(one.hash_kv(5), other.hash_kv(5));
}

#[test]
fn digest_is_the_same_for_the_same_changes_and_never_again_after_a_different_one() {
    let make = |value: &'static str| {
        let mut state = State::new();
        state.keep_journal(1);
        do_put(&mut state, "a", "1");
        do_put(&mut state, "b", value);
        state
    };
    let (mut one, mut same, mut other) = (make("2"), make("2"), make("3"));
    assert!(one.digest().is_some());
    assert_eq!(one.digest(), same.digest());
    for state in [&mut one, &mut same, &mut other] {
        let before = state.digest();
        apply(state, Request::Put(PutRequest { lease: 9, ..put("c", "x") })).unwrap_err();
        assert_eq!(state.digest(), before, "a refusal changes nothing");
        do_put(state, "b", "4");
        do_delete(state, "a", "z");
        apply(state, Request::Compact(CompactionRequest { revision: state.revision(), physical: false })).unwrap();
        while !state.sweep(1) {}
        assert_ne!(state.digest(), before, "every change counts, a compaction too");
    }
    assert_eq!(one.digest(), same.digest());
    assert_eq!(one.hash_kv(0), other.hash_kv(0), "what differed is compacted away");
    assert_ne!(one.digest(), other.digest(), "but it was applied");
    assert_eq!(one.clone().digest(), one.digest());
}

#[test]
fn digest_goes_on_behind_a_snapshot_and_is_unknown_without_one() {
    let mut state = State::new();
    do_put(&mut state, "a", "1");
    let mut loader = Loader::new();
    state.changes().for_each(|change| loader.load(change).unwrap());
    let mut loaded = loader.finish(state.revision()).unwrap();
    assert_eq!(loaded.digest(), None, "changes alone do not say what came before");
    loaded.set_digest(state.digest_to_pb().as_ref());
    do_put(&mut state, "a", "2");
    do_put(&mut loaded, "a", "2");
    assert_eq!(state.digest(), loaded.digest());
    // Of another version it means nothing here.
    loaded.set_digest(Some(&crate::pb::log::Digest { version: 99, value: 7 }));
    assert_eq!(loaded.digest(), None);
    do_put(&mut state, "a", "3");
    do_put(&mut loaded, "a", "3");
    assert_eq!(loaded.digest(), None);
    for state in [&mut state, &mut loaded] {
        apply(state, Request::StartDigest(crate::pb::log::StartDigest {})).unwrap();
        do_put(state, "a", "4");
    }
    assert!(state.digest().is_some());
    assert_eq!(state.digest(), loaded.digest(), "begun anew, it is known everywhere");
}
