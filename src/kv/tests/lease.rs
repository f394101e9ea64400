//! The facts of leases, one a test.

use super::*;
use crate::kv::{LEASES_SINCE, LoadError, TTL_MAX_SECONDS, only_in_term};
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::log::{LeaseCheckpoint as Checkpoints, LeaseRevoke, change};

fn grant(state: &mut State, id: i64, ttl: i64) -> Result<Response, Error> {
    apply(state, Request::LeaseGrant(LeaseGrantRequest { ttl, id }))
}

fn revoke(state: &mut State, id: i64) -> Result<Response, Error> {
    apply(state, Request::LeaseRevoke(LeaseRevoke { id, term: 0 }))
}

fn checkpoint(state: &mut State, id: i64, remaining_ttl: i64) {
    let checkpoints = vec![LeaseCheckpoint { id, remaining_ttl }];
    apply(state, Request::LeaseCheckpoint(Checkpoints { checkpoints, term: 0 })).unwrap();
}

fn attach(state: &mut State, key: &'static str, lease: i64) -> Result<Response, Error> {
    apply(state, Request::Put(PutRequest { lease, ..put(key, "v") }))
}

fn keys(state: &State, id: i64) -> String {
    state.lease_keys(id).map(|kv| String::from_utf8_lossy(kv.key()).into_owned()).collect::<Vec<_>>().join(" ")
}

fn with_lease() -> State {
    let mut state = State::new();
    grant(&mut state, 7, 60).unwrap();
    state
}

#[test]
fn grants_are_refused_as_etcd_does() {
    let mut state = with_lease();
    assert_eq!(grant(&mut state, 7, 60).unwrap_err(), Error::LeaseExists);
    assert_eq!(grant(&mut state, 8, TTL_MAX_SECONDS + 1).unwrap_err(), Error::LeaseTtlTooLarge);
    assert_eq!(grant(&mut state, 0, 60).unwrap_err(), Error::LeaseNotFound);
    grant(&mut state, 8, TTL_MAX_SECONDS).unwrap();
    grant(&mut state, -1, 0).unwrap();
    assert_eq!(state.leases().get(-1).map(|x| (x.ttl_seconds, x.left_seconds)), Some((1, None)));
    assert_eq!(state.revision(), 1, "a grant makes no revision");
    assert_eq!(revoke(&mut state, 9).unwrap_err(), Error::LeaseNotFound);
}

#[test]
fn a_key_belongs_to_the_lease_of_its_last_put() {
    let mut state = with_lease();
    grant(&mut state, 8, 60).unwrap();
    assert_eq!(attach(&mut state, "a", 9).unwrap_err(), Error::LeaseNotFound);
    assert_eq!(state.revision(), 1, "a put that is refused changes nothing");
    for key in ["c", "a", "b"] {
        attach(&mut state, key, 7).unwrap();
    }
    assert_eq!(keys(&state, 7), "a b c");
    attach(&mut state, "b", 8).unwrap();
    do_put(&mut state, "c", "1");
    assert_eq!((keys(&state, 7), keys(&state, 8)), ("a".into(), "b".into()), "to another lease, and to none");
    apply(&mut state, Request::Put(PutRequest { ignore_lease: true, ..put("a", "2") })).unwrap();
    assert_eq!(keys(&state, 7), "a");
    do_delete(&mut state, "a", "");
    assert_eq!(keys(&state, 7), "");
    revoke(&mut state, 7).unwrap();
    assert_eq!(read(&state, "\0", "\0"), "b=v c=1");
}

#[test]
fn a_lease_takes_its_keys_along_in_one_revision_in_key_order() {
    let mut state = with_lease();
    for key in ["c", "a", "b"] {
        attach(&mut state, key, 7).unwrap();
    }
    let revision = do_put(&mut state, "other", "1");
    revoke(&mut state, 7).unwrap();
    assert_eq!(state.revision(), revision + 1);
    let events: Vec<_> = state.events_from(revision + 1).unwrap().collect();
    assert_eq!(events.len(), 1);
    let deleted: Vec<&[u8]> = events[0].1.iter().map(KeyValue::key).collect();
    assert_eq!(deleted, [b"a", b"b", b"c"]);
    assert!(events[0].1.iter().all(KeyValue::is_tombstone));
    assert_eq!(read(&state, "\0", "\0"), "other=1");
    grant(&mut state, 7, 60).unwrap();
    revoke(&mut state, 7).unwrap();
    assert_eq!(state.revision(), revision + 1, "without keys there is no revision");
}

#[test]
fn a_transaction_compares_and_sets_leases() {
    let mut state = with_lease();
    attach(&mut state, "a", 7).unwrap();
    let held = |lease| Compare {
        key: b("a"),
        target: CompareTarget::Lease as i32,
        result: CompareResult::Equal as i32,
        target_union: Some(TargetUnion::Lease(lease)),
        ..Compare::default()
    };
    let put_with = |lease| vec![op(Op::RequestPut(PutRequest { lease, ..put("b", "1") }))];
    let txn = |lease, with| TxnRequest { compare: vec![held(lease)], success: put_with(with), failure: vec![] };
    assert!(!do_txn(&mut state, txn(8, 7)).unwrap().succeeded);
    assert_eq!(do_txn(&mut state, txn(7, 8)).unwrap_err(), Error::LeaseNotFound);
    assert!(do_txn(&mut state, txn(7, 7)).unwrap().succeeded);
    assert_eq!(keys(&state, 7), "a b");
}

#[test]
fn two_grants_of_one_id_are_told_apart() {
    let mut state = with_lease();
    let before = state.leases().clone();
    checkpoint(&mut state, 7, 20);
    assert_eq!(state.leases().get(7).unwrap().grant, before.get(7).unwrap().grant);
    revoke(&mut state, 7).unwrap();
    grant(&mut state, 7, 60).unwrap();
    assert_eq!(state.leases().changed_since(&before).count(), 1);
}

#[test]
fn a_checkpoint_says_what_a_new_leader_starts_from() {
    let mut state = with_lease();
    let left = |state: &State| state.leases().get(7).unwrap().start_seconds();
    assert_eq!(left(&state), 60);
    for (remaining, expected) in [(20, 20), (59, 59), (60, 60), (0, 60), (1, 1), (-5, 60), (100, 60)] {
        checkpoint(&mut state, 7, remaining);
        checkpoint(&mut state, 8, remaining);
        assert_eq!(left(&state), expected, "checkpoint of {remaining}");
    }
    assert_eq!(state.leases().len(), 1, "of an unknown lease it makes none");
}

#[test]
fn memory_of_leases_is_counted_and_given_back() {
    let mut state = State::new();
    let empty = state.bytes();
    for id in 1..=1000 {
        grant(&mut state, id, 60).unwrap();
    }
    // What each takes of the allocator: `kv::lease` says of what it consists.
    assert!(state.bytes() >= empty + 1000 * 300, "{} bytes", state.bytes() - empty);
    for id in 1..=1000 {
        revoke(&mut state, id).unwrap();
    }
    assert_eq!(state.bytes(), empty);
}

#[test]
fn a_view_keeps_the_leases_that_it_saw() {
    let mut state = with_lease();
    attach(&mut state, "a", 7).unwrap();
    let view = state.clone();
    revoke(&mut state, 7).unwrap();
    assert_eq!((view.leases().len(), keys(&view, 7)), (1, "a".into()));
    assert_eq!((state.leases().len(), keys(&state, 7)), (0, String::new()));
}

#[test]
fn leases_are_saved_and_loaded() {
    let mut state = with_lease();
    grant(&mut state, -3, 100).unwrap();
    attach(&mut state, "a", 7).unwrap();
    attach(&mut state, "b", -3).unwrap();
    checkpoint(&mut state, -3, 30);
    let mut loaded = load(state.changes(), state.revision());
    assert!(loaded.lease_changes().eq(state.lease_changes()));
    assert_eq!(loaded.bytes(), state.bytes());
    revoke(&mut loaded, -3).unwrap();
    assert_eq!(read(&loaded, "\0", "\0"), "a=v");

    let mut loader = Loader::new();
    let no_leases = |change: &Change| !matches!(change.change, Some(change::Change::Lease(_)));
    state.changes().filter(no_leases).for_each(|change| loader.load(change).unwrap());
    assert_eq!(loader.finish(state.revision()).err(), Some(LoadError::LeaseMissing(-3)));
}

#[test]
fn only_what_a_leader_decided_by_its_clock_is_bound_to_its_term() {
    let command = |request| Command::new(LEASES_SINCE, request);
    let of = |term| LeaseRevoke { id: 1, term };
    assert_eq!(only_in_term(&command(Request::LeaseRevoke(of(3)))), Some(3));
    assert_eq!(only_in_term(&command(Request::LeaseRevoke(of(0)))), None);
    let checkpoints = Checkpoints { checkpoints: Vec::new(), term: 4 };
    assert_eq!(only_in_term(&command(Request::LeaseCheckpoint(checkpoints))), Some(4));
    assert_eq!(only_in_term(&command(Request::Put(put("a", "b")))), None);
}
