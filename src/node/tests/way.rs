//! The whole way of random proposals: every one is refused or applied, and no member stops. Apply is total.

use super::*;
use crate::fuzzing::way::Way;
use crate::kv::Limits;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{PutRequest, RangeRequest, RequestOp, TxnRequest};
use crate::pb::log::command::Request;
use crate::testing::proposals::Proposals;

/// `QUORATE_WAY_SEED` repeats a run, `QUORATE_WAY_CASES` sets its length.
fn seed() -> u64 {
    let seed = std::env::var("QUORATE_WAY_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("QUORATE_WAY_SEED={seed}");
    seed
}

fn cases() -> u64 {
    std::env::var("QUORATE_WAY_CASES").map_or(3000, |text| text.parse().unwrap())
}

/// In a thread with the stack of the event loop's, in a build without optimization.
fn on_a_small_stack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(2 << 20).spawn(work).unwrap().join().unwrap()
}

fn txn(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { success, ..TxnRequest::default() }
}

fn op(request: Op) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// So many transactions within one another, the innermost with a put and a read.
fn nest(depth: usize) -> TxnRequest {
    let put = PutRequest { key: "k".into(), value: "v".into(), prev_kv: true, ..PutRequest::default() };
    let read = RangeRequest { key: "k".into(), ..RangeRequest::default() };
    let innermost = txn(vec![op(Op::RequestPut(put)), op(Op::RequestRange(read))]);
    (1..depth).fold(innermost, |inner, _| txn(vec![op(Op::RequestTxn(inner))]))
}

fn command_of(txn: TxnRequest) -> Command {
    Command::new(1, Request::Txn(txn))
}

fn unlimited() -> Limits {
    let all = usize::MAX;
    Limits {
        request_bytes_max: 16 << 20,
        txn_ops_max: all,
        txn_ops_total_max: all,
        txn_depth_max: all,
        request_cost_max: u64::MAX,
    }
}

#[test]
fn whatever_is_proposed_is_refused_or_applied_by_every_member() {
    let (seed, cases) = (seed(), cases());
    let (refused, applied, answered) = on_a_small_stack(move || {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut refused, mut applied, mut answered) = (0, 0, 0);
        let mut way = Way::new();
        for case in 0..cases {
            // Apply knows no limits: whichever the leader has.
            way.limits = if random.u8(..4) == 0 { unlimited() } else { Limits::default() };
            way.cluster_version = if random.u8(..4) == 0 { 1 + random.u32(..3) } else { crate::kv::APPLY_VERSION };
            let own = random.u8(..3) == 0;
            let mut source = || random.u64(..);
            let mut proposals = Proposals(&mut source);
            let outcome = if own { way.own(proposals.command()) } else { way.forwarded(&proposals.bytes()) };
            match outcome {
                Err(_) => refused += 1,
                Ok(outcome) => {
                    applied += 1;
                    answered += u64::from(outcome.is_ok());
                }
            }
            if case % 500 == 499 {
                way = Way::new();
            }
        }
        (refused, applied, answered)
    });
    println!("{refused} refused, {applied} applied, {answered} of them with an answer");
    assert!(refused > cases / 10 && applied > cases / 5 && answered > cases / 10, "the proposals are of one kind");
}

/// What all members would do, and again at each restart, is counted before it is proposed, whoever's it is.
#[test]
fn what_costs_too_much_is_not_proposed() {
    let mut way = Way::new();
    way.limits = Limits { request_cost_max: 100, ..unlimited() };
    let put = |n: usize| PutRequest { key: format!("k{n}").into(), value: "v".into(), ..PutRequest::default() };
    way.own(command_of(txn((0..50).map(|n| op(Op::RequestPut(put(n)))).collect()))).unwrap().unwrap();
    let all = || RangeRequest { key: "\0".into(), range_end: "\0".into(), ..RangeRequest::default() };
    let visits = |count| {
        let mut ops = vec![op(Op::RequestPut(put(0)))];
        ops.extend((0..count).map(|_| op(Op::RequestRange(all()))));
        command_of(txn(ops))
    };
    way.own(visits(2)).expect("it is proposed").unwrap();
    way.forwarded(&visits(2).encode_to_vec().into()).expect("it is proposed").unwrap();
    assert!(matches!(way.own(visits(4)), Err(Error::TooCostly(_))));
    assert!(matches!(way.forwarded(&visits(4).encode_to_vec().into()), Err(Error::TooCostly(_))));
}

/// 49 deep stopped every member for ever; an answer 48 deep ended the stream of a follower's clients.
#[test]
fn what_decodes_as_a_request_decodes_in_the_batch_and_in_the_answer() {
    on_a_small_stack(|| {
        let mut way = Way::new();
        way.limits = unlimited();
        let mut refused = 0;
        for depth in (1..130).chain([256, 400, crate::pb::TXN_DEPTH_MAX, crate::pb::TXN_DEPTH_MAX + 1, 600]) {
            let request = nest(depth).encode_to_vec();
            let Ok(txn) = TxnRequest::decode(&request[..]) else {
                refused += 1;
                assert!(depth > crate::pb::TXN_DEPTH_MAX, "{depth} deep is not decoded");
                continue;
            };
            way.own(command_of(txn)).expect("it is proposed").expect("it is applied");
            way.forwarded(&command_of(nest(depth)).encode_to_vec().into()).expect("it is proposed").unwrap();
        }
        assert_eq!(refused, 2, "beyond the bound nothing is decoded");
    });
}

#[test]
fn bytes_that_are_deeper_than_any_stack_are_refused() {
    // Each level is only its tags and lengths; by hand, for to make such a struct would take the stack itself.
    let mut bytes: Vec<u8> = Vec::new();
    for _ in 0..100_000 {
        // A transaction in an operation, and that in a transaction; backwards, for it is made from the inside.
        for tag in [0x22, 0x12] {
            let mut around = vec![tag];
            prost::encoding::encode_varint(bytes.len() as u64, &mut around);
            bytes.extend(around.iter().rev());
        }
    }
    bytes.reverse();
    let mut command = Vec::new();
    prost::encoding::bytes::encode(4, &bytes, &mut command);
    on_a_small_stack(move || {
        TxnRequest::decode(&bytes[..]).expect_err("a request that no stack could hold");
        Way::new().forwarded(&command.into()).expect_err("nor a proposal");
    });
}

#[test]
fn depth_waits_for_the_cluster_version_and_is_bounded_by_the_setting() {
    let mut way = Way::new();
    (way.limits.txn_depth_max, way.cluster_version) = (50, 2);
    way.own(command_of(nest(40))).unwrap().unwrap();
    for error in [
        way.own(command_of(nest(41))).unwrap_err(),
        way.forwarded(&command_of(nest(41)).encode_to_vec().into()).unwrap_err(),
    ] {
        assert!(error.to_string().contains("needs cluster version 3, this cluster has 2"), "{error}");
    }
    way.cluster_version = 3;
    way.own(command_of(nest(50))).unwrap().unwrap();
    let error = way.own(command_of(nest(51))).unwrap_err().to_string();
    assert!(error.contains("deeper than 50 (limits.txn_depth_max)"), "{error}");
}

#[test]
fn what_only_a_leader_decides_and_what_no_member_knows_is_not_taken_from_another() {
    use crate::pb::log::{Follow, LeaseRevoke, SetClusterVersion, StartDigest, Supersede};
    let mut way = Way::new();
    let mut told = |command: Command| way.forwarded(&command.encode_to_vec().into()).expect_err("it is refused");
    let own = |request| Command::new(1, request);
    assert_eq!(told(own(Request::SetClusterVersion(SetClusterVersion { version: 2 }))), Error::LeaderChanged);
    assert_eq!(told(own(Request::StartDigest(StartDigest {}))), Error::LeaderChanged);
    assert_eq!(told(own(Request::LeaseRevoke(LeaseRevoke { id: 1, term: 7 }))), Error::LeaderChanged);
    assert_eq!(told(own(Request::Follow(Follow::default()))), Error::LeaderChanged);
    assert_eq!(told(own(Request::Supersede(Supersede::default()))), Error::LeaderChanged);
    for unknown in [
        Command { needs: 99, ..command(1) },
        own(Request::SetClusterVersion(SetClusterVersion { version: 99 })),
        Command { request: None, ..command(1) },
    ] {
        assert!(matches!(told(unknown), Error::InvalidRequest(_)));
    }
    assert!(matches!(way.forwarded(&Bytes::from_static(b"garbage")), Err(Error::InvalidRequest(_))));
    let too_large = command(2 << 20);
    assert_eq!(way.forwarded(&too_large.encode_to_vec().into()).unwrap_err(), Error::RequestTooLarge);
}

/// The limit of operations holds for each branch alone.
#[test]
fn a_wide_nest_is_bounded_as_a_whole() {
    let put = |n: usize| PutRequest { key: format!("k{n}").into(), ..PutRequest::default() };
    let mut next = 0;
    let mut wide = |width: usize| {
        let mut ops = Vec::new();
        for _ in 0..width {
            let mut middle = Vec::new();
            for _ in 0..width {
                let puts = (0..width).map(|_| {
                    next += 1;
                    op(Op::RequestPut(put(next)))
                });
                middle.push(op(Op::RequestTxn(txn(puts.collect()))));
            }
            ops.push(op(Op::RequestTxn(txn(middle))));
        }
        txn(ops)
    };
    let mut way = Way::new();
    way.own(command_of(wide(16))).expect("4,096 puts and what is around them are taken").unwrap();
    let error = way.own(command_of(wide(40))).unwrap_err().to_string();
    assert!(error.contains("more than 16384 operations") && error.contains("limits.txn_ops_total_max"), "{error}");
}
