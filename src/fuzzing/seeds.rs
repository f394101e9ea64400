//! What a fuzzer starts from: a few valid inputs for each target, as the program itself encodes them.
//!
//! `cargo run --example fuzz-seeds` writes them below `fuzz/corpus`, with bytes that a real client sent.

use prost::Message as _;

use super::disk::written_snapshot;
use super::requests::{log_id, small_commands, small_state};
use crate::config::MANUAL;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op};
use crate::pb::log::{Batch, Command, Entry, Formation, Membership, Node, Vote, command, entry, membership};
use crate::pb::peer::{self, Envelope};
use crate::storage::state::change;

/// One seed: target, name, bytes.
pub type Seed = (&'static str, &'static str, Vec<u8>);

fn ops(requests: impl IntoIterator<Item = request_op::Request>) -> Vec<RequestOp> {
    requests.into_iter().map(|request| RequestOp { request: Some(request) }).collect()
}

fn txn() -> TxnRequest {
    use request_op::Request;
    let compare = Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Value.into(),
        key: "a".into(),
        target_union: Some(TargetUnion::Value("6".into())),
        ..Compare::default()
    };
    let put =
        |key: &'static str| PutRequest { key: key.into(), value: "v".into(), prev_kv: true, ..Default::default() };
    let nested = TxnRequest { success: ops([Request::RequestPut(put("n"))]), ..TxnRequest::default() };
    let delete = DeleteRangeRequest { key: "b".into(), range_end: "d".into(), prev_kv: true };
    TxnRequest {
        compare: vec![compare],
        success: ops([Request::RequestPut(put("a")), Request::RequestDeleteRange(delete), Request::RequestTxn(nested)]),
        failure: ops([Request::RequestRange(RangeRequest { key: "a".into(), ..Default::default() })]),
    }
}

fn batch(commands: Vec<Command>) -> Vec<u8> {
    Batch { commands }.encode_to_vec()
}

/// Commands as the target `way` reads them.
fn lengths(commands: Vec<Command>) -> Vec<u8> {
    let one = |command: &Command| {
        let bytes = command.encode_to_vec();
        [&(bytes.len() as u16).to_le_bytes()[..], &bytes].concat()
    };
    commands.iter().flat_map(one).collect()
}

/// So many transactions within one another.
fn nest(depth: usize) -> TxnRequest {
    let around =
        |inner, _| TxnRequest { success: ops([request_op::Request::RequestTxn(inner)]), ..TxnRequest::default() };
    (1..depth).fold(txn(), around)
}

fn requests() -> Vec<Seed> {
    let command = |request| Command::new(1, request);
    let put = |put: PutRequest| batch(vec![command(command::Request::Put(put))]);
    let keep = PutRequest { key: "a".into(), ignore_value: true, ..PutRequest::default() };
    let lease = PutRequest { key: "a".into(), lease: 7, ..PutRequest::default() };
    let read = TxnRequest { success: txn().failure, ..TxnRequest::default() };
    let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), limit: 2, ..RangeRequest::default() };
    let old = RangeRequest { key: "a".into(), revision: 5, keys_only: true, ..RangeRequest::default() };
    let sorted = RangeRequest { sort_order: 2, sort_target: 4, min_mod_revision: 3, ..all.clone() };
    vec![
        ("requests", "history", batch(small_commands())),
        ("requests", "txn", batch(vec![command(command::Request::Txn(txn()))])),
        ("way", "history", lengths(small_commands())),
        ("way", "txn", lengths(vec![command(command::Request::Txn(txn()))])),
        ("way", "nest", lengths(vec![command(command::Request::Txn(nest(60)))])),
        ("requests", "keep-value", put(keep)),
        ("requests", "no-lease", put(lease)),
        ("range", "all", all.encode_to_vec()),
        ("range", "old", old.encode_to_vec()),
        ("range", "sorted", sorted.encode_to_vec()),
        ("range", "txn", read.encode_to_vec()),
    ]
}

fn members() -> Membership {
    let node = Node { name: "kv-0".into(), peer_address: "kv-0.kv:2380".into(), ..Node::default() };
    Membership {
        configs: vec![membership::Config { voters: vec![0x10000] }],
        members: vec![membership::Member { id: 0x10000, node: Some(node) }],
    }
}

fn messages() -> Vec<Seed> {
    let envelope = Some(Envelope { cluster_id: 7, from: 0x10000, to: 0x20001 });
    let vote = Some(Vote { term: 3, member: 0x10000, committed: true });
    let entry = |index, payload| Entry { log_id: Some(log_id(index)), payload: Some(payload) };
    let append = peer::AppendRequest {
        leader_durable: None,
        envelope,
        vote,
        prev: Some(log_id(4)),
        entries: vec![
            entry(5, entry::Payload::Batch(batch(small_commands()).into())),
            entry(6, entry::Payload::Membership(members())),
            Entry { log_id: Some(log_id(7)), payload: None },
        ],
        leader_commit: Some(log_id(4)),
    };
    let proposal = peer::forward_request::Proposal { id: 2, command: small_commands()[0].encode_to_vec().into() };
    let forward = peer::ForwardRequest { proposals: vec![proposal], read_index_id: 3, ..Default::default() };
    let formation = Formation { cluster_id: 7, members: members().members, moment: None };
    let kinds: [(&'static str, u8, Vec<u8>); 6] = [
        ("append", 0, append.encode_to_vec()),
        (
            "vote",
            1,
            peer::VoteRequest { envelope, vote, last_log: Some(log_id(7)), ..Default::default() }.encode_to_vec(),
        ),
        ("forward", 4, forward.encode_to_vec()),
        ("membership", 6, members().encode_to_vec()),
        ("who", 7, peer::WhoResponse { nonce: 1, name: "kv-0".into(), ..Default::default() }.encode_to_vec()),
        ("formation", 9, formation.encode_to_vec()),
    ];
    kinds.into_iter().map(|(name, kind, bytes)| ("peer_messages", name, [&[kind], &bytes[..]].concat())).collect()
}

fn stored() -> Vec<Seed> {
    let state = small_state();
    let mut changes = vec![state.revision() as u8];
    state.changes().for_each(|c| change::encode(&c, &mut changes));
    let version = state.changes().find_map(|c| match c.change {
        Some(crate::pb::log::change::Change::Version(kv)) => Some(kv.encode_to_vec()),
        _ => None,
    });
    let piece = |name: &'static str, kind: u8| {
        let count = written_snapshot().0.values().next().map_or(0, |bytes| bytes.len().div_ceil(256));
        ("snapshot_chunks", name, [kind, 0, 0, 0, 255, 0].repeat(count))
    };
    // One record of the log: an entry, then the end of the frame.
    let mut segment = vec![0; 72];
    (segment[8], segment[16], segment[32]) = (1, 1, 1);
    (segment[44], segment[68]) = (1, 5);
    vec![
        ("key_value", "version", version.expect("the state has a version")),
        ("changes", "state", changes),
        ("log_files", "untouched", Vec::new()),
        ("log_files", "flipped", vec![0, 0, 0, 3, 1, 0x40]),
        ("log_files", "cut", vec![2, 1, 0, 8, 0, 0]),
        ("log_segment", "frame", segment),
        ("snapshot_file", "flipped", vec![0, 0, 60, 0, 1, 1]),
        ("snapshot_file", "cut", vec![2, 0, 60, 0, 0, 0]),
        ("etcd_file", "child", vec![0, 4, 24, 0, 3, 0]),
        ("etcd_file", "offset", vec![0, 6, 20, 0, 255, 255]),
        ("etcd_file", "cut", vec![2, 9, 0, 0, 0, 0]),
        ("etcd_file", "page", vec![3, 5, 0, 0, 6, 0]),
        piece("whole", 0),
        piece("damaged", 1),
        ("state_records", "lost", vec![1, 3, 0]),
        ("state_records", "flipped", vec![0, 2, 9]),
        ("state_records", "record", [&[0; 12][..], &[1; 120]].concat()),
        ("member_dir", "current", b"\x00quorate-current 1\nmember-0000000000010000\n".to_vec()),
        (
            "member_dir",
            "identity",
            [&[2][..], &crate::pb::log::Identity { member_id: 0x10000, ..Default::default() }.encode_to_vec()].concat(),
        ),
    ]
}

fn text() -> Vec<Seed> {
    let name = |name: &'static str, text: &str| ("names", name, text.as_bytes().to_vec());
    vec![
        ("config", "manual", MANUAL.as_bytes().to_vec()),
        (
            "config",
            "small",
            b"[raft]\nheartbeat_interval = \"200ms\"\nelection_timeout_min = \"1s\"\nelection_timeout_max = \"2s\"\n"
                .to_vec(),
        ),
        name("headless", "kv-%d.kv-headless.ns:2380"),
        name("port", "127.0.0.1:2380%d"),
        name("ipv6", "[fd00::%d]:2380"),
        name("name", "kv-0"),
        name("size", "1.5MiB"),
        name("duration", "1m30s"),
    ]
}

/// All of them.
pub fn all() -> Vec<Seed> {
    [requests(), messages(), stored(), text()].concat()
}
