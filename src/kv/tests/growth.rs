//! What commands add: no more than was counted, whatever they are and whatever goes before them.

use std::collections::VecDeque;

use super::*;
use crate::kv::{AUTH_SINCE, Limits, UnderWay, growth, validate};
use crate::pb::log::auth_change::Change as Asked;
use crate::pb::log::{AuthChange, LeaseRevoke, UserPassword};

fn key(random: &mut fastrand::Rng) -> Bytes {
    // Some are large beside their values.
    let bytes = if random.u8(..4) == 0 { 3000 } else { 1 };
    let mut key = vec![b'k'; bytes];
    key.push(random.u8(b'a'..b'h'));
    key.into()
}

fn put_of(random: &mut fastrand::Rng) -> PutRequest {
    let ignore_value = random.u8(..3) == 0;
    let bytes = match random.u8(..4) {
        _ if ignore_value => 0,
        0 => random.usize(..100_000),
        _ => random.usize(..10),
    };
    let ignore_lease = random.u8(..6) == 0;
    let lease = if ignore_lease { 0 } else { random.i64(0..3) };
    PutRequest {
        key: key(random),
        value: vec![7; bytes].into(),
        ignore_value,
        ignore_lease,
        lease,
        prev_kv: random.bool(),
    }
}

fn delete_of(random: &mut fastrand::Rng) -> DeleteRangeRequest {
    let range_end = if random.bool() { Bytes::new() } else { key(random) };
    DeleteRangeRequest { key: key(random), range_end, prev_kv: random.bool() }
}

fn ops(random: &mut fastrand::Rng, depth: u8) -> Vec<RequestOp> {
    let one = |random: &mut fastrand::Rng| match random.u8(..5) {
        0 => Op::RequestDeleteRange(delete_of(random)),
        1 if depth < 4 => Op::RequestTxn(txn_of(random, depth + 1)),
        2 => Op::RequestRange(get("\0", "\0")),
        _ => Op::RequestPut(put_of(random)),
    };
    (0..random.usize(..4)).map(|_| op(one(random))).collect()
}

fn txn_of(random: &mut fastrand::Rng, depth: u8) -> TxnRequest {
    let compare = Compare { key: key(random), ..Compare::default() };
    let compare = if random.bool() { vec![compare] } else { Vec::new() };
    TxnRequest { compare, success: ops(random, depth), failure: ops(random, depth) }
}

fn user(random: &mut fastrand::Rng) -> Asked {
    let name = format!("{}", random.u8(..5));
    match random.u8(..5) {
        0 => Asked::UserAdd(UserPassword { user: name, no_password: true, ..UserPassword::default() }),
        1 => Asked::RoleAdd(AuthRoleAddRequest { name }),
        2 => Asked::UserGrantRole(AuthUserGrantRoleRequest { user: name, role: format!("{}", random.u8(..5)) }),
        3 => Asked::RoleDelete(AuthRoleDeleteRequest { role: name }),
        _ => Asked::UserDelete(AuthUserDeleteRequest { name }),
    }
}

/// A command that the checks before proposing pass.
pub(crate) fn any_command(random: &mut fastrand::Rng) -> Command {
    loop {
        let request = match random.u8(..16) {
            0..4 => Request::Put(put_of(random)),
            4..6 => Request::DeleteRange(delete_of(random)),
            6..11 => Request::Txn(txn_of(random, 1)),
            11 => Request::LeaseGrant(LeaseGrantRequest { ttl: 9, id: random.i64(1..40) }),
            12 => Request::LeaseRevoke(LeaseRevoke { id: random.i64(1..4), term: 0 }),
            13 => Request::Auth(AuthChange { change: Some(user(random)) }),
            _ => Request::Compact(CompactionRequest { revision: random.i64(..300), physical: false }),
        };
        let command = Command::new(AUTH_SINCE, request);
        if validate::command(&command, &Limits::default()).is_ok() {
            return command;
        }
    }
}

#[test]
fn no_command_adds_more_than_was_counted_however_many_go_before_it() {
    let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..60 {
        let mut state = State::new();
        // Counted, and not applied yet.
        let mut in_flight: VecDeque<(Command, u64)> = VecDeque::new();
        for _ in 0..300 {
            if random.u8(..3) > 0 {
                let command = any_command(&mut random);
                let request = command.request.as_ref().unwrap();
                let mut under_way = UnderWay::default();
                in_flight.iter().for_each(|(before, _)| under_way.note(before.request.as_ref().unwrap()));
                let counted = growth(request);
                let copied = state.copied(request, &mut under_way);
                assert!(counted.copies || copied == 0);
                in_flight.push_back((command, counted.bytes + copied));
            }
            for _ in 0..random.usize(..3) {
                let Some((command, adds)) = in_flight.pop_front() else { continue };
                let before = state.bytes_with_ends();
                let _ = state.apply(&command, random.bool()).unwrap();
                let after = state.bytes_with_ends();
                assert!(after <= before + adds, "{} added, {adds} counted: {command:?}", after - before);
            }
            let before = state.bytes_with_ends();
            state.sweep(random.usize(..6));
            assert!(state.bytes_with_ends() <= before, "a sweep adds nothing");
        }
        // What is counted for the ends of keys is what they take.
        let before = state.bytes_with_ends();
        apply(&mut state, Request::DeleteRange(delete("\0", "\0"))).unwrap();
        assert!(state.bytes() <= before && state.bytes_with_ends() == state.bytes());
        let loaded = load(state.changes(), state.revision());
        assert!(loaded.bytes_with_ends() <= before, "so it is after a restart");
        let revision = state.revision();
        let _ = do_compact(&mut state, revision);
        sweep_all(&mut state);
        assert!(state.bytes() < 100_000, "{} bytes are left of nothing", state.bytes());
    }
}

/// A value that is put and deleted in one revision stays in the history, as large as it is.
#[test]
fn what_is_overwritten_in_its_own_revision_is_counted_until_it_is_compacted() {
    let mut state = State::new();
    let nested = |op_: Op| op(Op::RequestTxn(TxnRequest { success: vec![op(op_)], ..TxnRequest::default() }));
    let large = PutRequest { value: vec![7; 1 << 20].into(), ..put("k", "") };
    let success = vec![nested(Op::RequestPut(large)), nested(Op::RequestDeleteRange(delete("k", "")))];
    let txn = TxnRequest { success, ..TxnRequest::default() };
    validate::txn(&txn, &Limits::default()).unwrap();
    let before = state.bytes();
    for done in 1..=4 {
        do_txn(&mut state, txn.clone()).unwrap();
        assert!(state.bytes() >= before + (done << 20), "{}", state.bytes());
        let loaded = load(state.changes(), state.revision());
        assert!(loaded.bytes() >= before + (done << 20), "{} after a restart", loaded.bytes());
    }
    let revision = state.revision();
    do_compact(&mut state, revision).unwrap();
    sweep_all(&mut state);
    do_put(&mut state, "k", "v");
    do_compact(&mut state, revision + 1).unwrap();
    sweep_all(&mut state);
    assert!(state.bytes() < before + 4096, "{}", state.bytes());
}

#[test]
fn quota_counts_the_ends_of_keys_where_they_are_much() {
    const QUOTA: u64 = 1 << 20;
    let fill = |key_bytes: usize, value_bytes: usize| {
        let mut state = State::new();
        while state.counted(QUOTA) < QUOTA {
            let key = format!("{:0>key_bytes$}", state.revision()).into();
            apply(&mut state, Request::Put(PutRequest { key, value: vec![7; value_bytes].into(), ..put("", "") }))
                .unwrap();
        }
        let full = state.bytes();
        apply(&mut state, Request::DeleteRange(delete("\0", "\0"))).unwrap();
        (full * 100 / QUOTA, state.bytes() * 100 / QUOTA)
    };
    let (full, deleted) = fill(40, 400);
    assert!(full >= 100 && deleted <= 126, "{full} % {deleted} %: usual data fills its quota");
    let (full, deleted) = fill(2000, 10);
    assert!(
        (50..80).contains(&full) && deleted <= 126,
        "{full} % {deleted} %: keys without values keep a part for their ends"
    );
}
