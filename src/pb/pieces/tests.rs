//! Random answers, and their pieces beside the library's encoding.

use super::*;
use crate::pb::Fields;
use crate::pb::etcd::{ResponseHeader, ResponseOp};

fn some_versions(random: &mut fastrand::Rng) -> Vec<KeyValue> {
    let count = [0, 1, 3, 300][random.usize(..4)];
    let version = |random: &mut fastrand::Rng| {
        let value = vec![random.u8(..); [0, 10, 1000, 100_000][random.usize(..4)] * usize::from(random.u8(..8) == 0)];
        let (key, revision) = (vec![random.u8(..); random.usize(1..200)], random.i64(1..));
        KeyValue::new(Fields {
            key: &key,
            create_revision: revision,
            mod_revision: revision,
            version: random.i64(0..300),
            value: &value,
            lease: random.i64(..) * random.i64(0..2),
        })
    };
    (0..count).map(|_| version(random)).collect()
}

fn some_header(random: &mut fastrand::Rng) -> Option<ResponseHeader> {
    let header = ResponseHeader {
        cluster_id: random.u64(..),
        member_id: random.u64(..),
        revision: random.i64(0..),
        raft_term: random.u64(0..3),
    };
    random.bool().then_some(header)
}

fn some_range(random: &mut fastrand::Rng) -> RangeResponse {
    let (header, kvs) = (some_header(random), some_versions(random));
    RangeResponse { header, kvs, more: random.bool(), count: random.i64(0..3) }
}

fn some_delete_range(random: &mut fastrand::Rng) -> DeleteRangeResponse {
    let (header, prev_kvs) = (some_header(random), some_versions(random));
    DeleteRangeResponse { header, deleted: random.i64(0..9), prev_kvs }
}

fn some_txn(random: &mut fastrand::Rng, depth: usize) -> TxnResponse {
    let op = |random: &mut fastrand::Rng| match random.u8(..if depth == 0 { 4 } else { 6 }) {
        0 => None,
        1 => Some(OpResponse::ResponseRange(some_range(random))),
        2 => Some(OpResponse::ResponsePut(PutResponse {
            header: some_header(random),
            prev_kv: some_versions(random).pop(),
        })),
        3 => Some(OpResponse::ResponseDeleteRange(some_delete_range(random))),
        _ => Some(OpResponse::ResponseTxn(some_txn(random, depth - 1))),
    };
    let count = random.usize(..5);
    let responses = (0..count).map(|_| ResponseOp { response: op(random) }).collect();
    TxnResponse { header: some_header(random), succeeded: random.bool(), responses }
}

/// Random answers, nested up to four deep.
pub(crate) fn some_answer(random: &mut fastrand::Rng) -> LargeAnswer {
    match random.u8(..4) {
        0 => LargeAnswer::Range(some_range(random)),
        1 => LargeAnswer::DeleteRange(some_delete_range(random)),
        2 => {
            let (id, ttl, granted_ttl) = (random.i64(..), random.i64(-1..2), random.i64(0..2));
            let header = some_header(random);
            let answer = LeaseTimeToLiveResponse { header, id, ttl, granted_ttl, keys: Vec::new() };
            LargeAnswer::TimeToLive(answer, some_versions(random))
        }
        _ => LargeAnswer::Txn(some_txn(random, 4)),
    }
}

/// As the library has it.
pub(crate) fn with_keys(answer: &LeaseTimeToLiveResponse, keys: &[KeyValue]) -> LeaseTimeToLiveResponse {
    let keys = keys.iter().map(|kv| Bytes::copy_from_slice(kv.key())).collect();
    LeaseTimeToLiveResponse { keys, ..answer.clone() }
}

#[test]
fn pieces_are_what_the_message_is_encoded_as() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..200 {
        let answer = some_answer(&mut random);
        let whole = match &answer {
            LargeAnswer::Range(answer) => answer.encode_to_vec(),
            LargeAnswer::DeleteRange(answer) => answer.encode_to_vec(),
            LargeAnswer::Txn(answer) => answer.encode_to_vec(),
            LargeAnswer::TimeToLive(answer, keys) => with_keys(answer, keys).encode_to_vec(),
        };
        assert_eq!(answer.encoded_len(), whole.len());
        let pieces: Vec<Bytes> = answer.in_grpc(whole.len()).collect();
        let all = pieces.concat();
        assert_eq!(all[1..5], (whole.len() as u32).to_be_bytes());
        assert!(all[5..] == whole);
        // The largest version has 100,000 bytes.
        assert!(pieces.iter().all(|piece| piece.len() < PIECE_BYTES.max(101_000)));
        assert!(pieces.len() <= 2 + 2 * whole.len() / PIECE_BYTES, "{} pieces", pieces.len());
    }
}
