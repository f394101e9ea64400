//! Large answers, written in pieces.
//!
//! The versions of an answer are shared with the store; what takes memory is its encoding. So a large one is never encoded whole: it is
//! a list of parts, from which as much is written as goes out at a time. Its length, which gRPC says first, is known without that.
//! Invariant: the pieces together are, byte for byte, what the message would be encoded as.
//! Absent: JSON, which brings its own parts (`http`).

use std::collections::VecDeque;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::etcd::response_op::Response as OpResponse;
use super::etcd::{DeleteRangeResponse, LeaseTimeToLiveResponse, PutResponse, RangeResponse, TxnResponse};
use super::{KeyValue, delimited_len};

/// Bytes of a piece, unless one version alone is larger.
pub const PIECE_BYTES: usize = 64 << 10;
/// Of a message: whether it is compressed, and its length.
const GRPC_HEAD_BYTES: usize = 5;
/// What is written around a version, at most.
const VERSION_FRAME_BYTES: usize = 200;
/// Field numbers of `rpc.proto`.
const RANGE_KVS: u32 = 2;
const PUT_PREV_KV: u32 = 2;
const DELETE_PREV_KVS: u32 = 3;
const TXN_RESPONSES: u32 = 3;
const LEASE_KEYS: u32 = 5;
const OP_RANGE: u32 = 1;
const OP_PUT: u32 = 2;
const OP_DELETE_RANGE: u32 = 3;
const OP_TXN: u32 = 4;

/// An answer that may be large.
#[derive(Clone, Debug)]
pub enum LargeAnswer {
    Range(RangeResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    /// Without the keys, which come behind it; only the keys of these versions count.
    TimeToLive(LeaseTimeToLiveResponse, Vec<KeyValue>),
}

/// Writes a version behind others of the same list; `true` for the first of it.
type Write = Box<dyn FnMut(&KeyValue, bool, &mut Vec<u8>) + Send>;

enum Part {
    Text(Vec<u8>),
    Versions { rest: std::vec::IntoIter<KeyValue>, first: bool, write: Write },
}

/// What is left of an answer; an iterator over its pieces.
#[derive(Default)]
pub struct Pieces {
    parts: VecDeque<Part>,
}

impl Pieces {
    /// Appends these bytes.
    pub fn text(&mut self, bytes: impl Into<Vec<u8>>) {
        let mut bytes = bytes.into();
        match self.parts.back_mut() {
            Some(Part::Text(last)) => last.append(&mut bytes),
            _ => self.parts.push_back(Part::Text(bytes)),
        }
    }

    /// Appends versions, each as `write` has it.
    pub fn versions(
        &mut self,
        versions: Vec<KeyValue>,
        write: impl FnMut(&KeyValue, bool, &mut Vec<u8>) + Send + 'static,
    ) {
        if !versions.is_empty() {
            let (rest, write) = (versions.into_iter(), Box::new(write));
            self.parts.push_back(Part::Versions { rest, first: true, write });
        }
    }

    fn append(&mut self, mut other: Self) {
        self.parts.append(&mut other.parts);
    }

    /// Versions that are in no piece yet.
    pub fn versions_left(&self) -> usize {
        let left = |part: &Part| if let Part::Versions { rest, .. } = part { rest.len() } else { 0 };
        self.parts.iter().map(left).sum()
    }
}

impl std::fmt::Debug for Pieces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pieces").field("parts", &self.parts.len()).finish()
    }
}

impl Iterator for Pieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut piece = Vec::new();
        while let Some(part) = self.parts.front_mut() {
            match part {
                Part::Text(text) => {
                    let room = PIECE_BYTES.saturating_sub(piece.len());
                    match text.len() {
                        bytes if piece.is_empty() && bytes <= PIECE_BYTES + GRPC_HEAD_BYTES => {
                            piece = std::mem::take(text)
                        }
                        bytes if bytes > room => {
                            piece.extend(text.drain(..room));
                            return Some(piece.into());
                        }
                        _ => piece.append(text),
                    }
                }
                Part::Versions { rest, first, write } => {
                    while let Some(kv) = rest.as_slice().first() {
                        // Base64 and names, if it is JSON.
                        let bytes = kv.as_encoded().len() / 3 * 4 + VERSION_FRAME_BYTES;
                        if !piece.is_empty() && piece.len() + bytes > PIECE_BYTES {
                            return Some(piece.into());
                        }
                        piece.reserve(if rest.len() > 1 { bytes.max(PIECE_BYTES - piece.len()) } else { bytes });
                        write(kv, std::mem::take(first), &mut piece);
                        rest.next();
                    }
                }
            }
            self.parts.pop_front();
        }
        (!piece.is_empty()).then(|| piece.into())
    }
}

/// Parts of a message, and how long they are.
#[derive(Default)]
struct Encoded {
    pieces: Pieces,
    bytes: usize,
}

impl Encoded {
    fn of<M: Message>(message: M, write: fn(M) -> Pieces) -> Self {
        Self { bytes: message.encoded_len(), pieces: write(message) }
    }

    fn message(&mut self, field: u32, inner: Self) {
        let mut head = Vec::new();
        encode_key(field, WireType::LengthDelimited, &mut head);
        encode_varint(inner.bytes as u64, &mut head);
        self.bytes += head.len() + inner.bytes;
        self.pieces.text(head);
        self.pieces.append(inner.pieces);
    }
}

impl Default for LargeAnswer {
    fn default() -> Self {
        Self::Range(RangeResponse::default())
    }
}

impl LargeAnswer {
    /// Bytes of its encoding.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Range(answer) => answer.encoded_len(),
            Self::DeleteRange(answer) => answer.encoded_len(),
            Self::Txn(answer) => answer.encoded_len(),
            Self::TimeToLive(answer, keys) => {
                answer.encoded_len() + keys.iter().map(|kv| delimited_len(kv.key().len())).sum::<usize>()
            }
        }
    }

    /// Versions and operations in it.
    pub fn versions(&self) -> usize {
        fn of_txn(answer: &TxnResponse) -> usize {
            answer.responses.iter().filter_map(|op| op.response.as_ref()).map(of_op).sum()
        }
        fn of_op(response: &OpResponse) -> usize {
            1 + match response {
                OpResponse::ResponseRange(answer) => answer.kvs.len(),
                OpResponse::ResponsePut(answer) => usize::from(answer.prev_kv.is_some()),
                OpResponse::ResponseDeleteRange(answer) => answer.prev_kvs.len(),
                OpResponse::ResponseTxn(answer) => of_txn(answer),
            }
        }
        match self {
            Self::Range(answer) => answer.kvs.len(),
            Self::DeleteRange(answer) => answer.prev_kvs.len(),
            Self::Txn(answer) => of_txn(answer),
            Self::TimeToLive(_, keys) => keys.len(),
        }
    }

    /// As one gRPC message: its length first, which must be less than 4 GiB. `bytes` is that length ([`Self::encoded_len`]): to look
    /// at a hundred thousand versions for it takes longer than to write the first piece.
    pub fn in_grpc(self, bytes: usize) -> Pieces {
        let mut pieces = Pieces::default();
        // What is one piece anyway is written at once.
        if bytes <= PIECE_BYTES {
            let mut message = grpc_head(bytes, bytes);
            match self {
                Self::Range(answer) => write_range(answer, &mut message),
                Self::DeleteRange(answer) => answer.encode_raw(&mut message),
                Self::Txn(answer) => answer.encode_raw(&mut message),
                Self::TimeToLive(answer, keys) => {
                    answer.encode_raw(&mut message);
                    keys.iter().for_each(|kv| write_key(kv, &mut message));
                }
            }
            pieces.text(message);
            return pieces;
        }
        pieces.text(grpc_head(bytes, 0));
        pieces.append(match self {
            Self::Range(answer) => range(answer),
            Self::DeleteRange(answer) => delete_range(answer),
            Self::Txn(answer) => txn(answer).pieces,
            Self::TimeToLive(answer, keys) => time_to_live(answer, keys),
        });
        pieces
    }
}

/// What gRPC writes before a message of so many bytes, in a buffer with `room` for more.
fn grpc_head(bytes: usize, room: usize) -> Vec<u8> {
    let bytes = u32::try_from(bytes).expect("whoever makes an answer checks its length");
    let mut head = Vec::with_capacity(GRPC_HEAD_BYTES + room);
    // Not compressed.
    head.push(0);
    head.extend_from_slice(&bytes.to_be_bytes());
    head
}

/// As the library encodes it, but for the versions, which are most of it.
fn write_range(answer: RangeResponse, out: &mut Vec<u8>) {
    let RangeResponse { header, kvs, more, count } = answer;
    RangeResponse { header, ..RangeResponse::default() }.encode_raw(out);
    for kv in &kvs {
        write_version(RANGE_KVS, kv, out);
    }
    RangeResponse { more, count, ..RangeResponse::default() }.encode_raw(out);
}

/// A version as one of a list; `field` is below 16. The library writes a head byte by byte, which costs as much as the copy of a small version.
#[inline]
fn write_version(field: u32, kv: &KeyValue, out: &mut Vec<u8>) {
    let content = kv.as_encoded();
    match content.len() {
        len @ 0x80..0x4000 => {
            let tag = (field << 3) as u8 | WireType::LengthDelimited as u8;
            out.extend_from_slice(&[tag, len as u8 | 0x80, (len >> 7) as u8]);
        }
        len => {
            encode_key(field, WireType::LengthDelimited, out);
            encode_varint(len as u64, out);
        }
    }
    out.extend_from_slice(content);
}

fn range(answer: RangeResponse) -> Pieces {
    let RangeResponse { header, kvs, more, count } = answer;
    let mut pieces = Pieces::default();
    pieces.text(RangeResponse { header, ..RangeResponse::default() }.encode_to_vec());
    pieces.versions(kvs, |kv, _, out| write_version(RANGE_KVS, kv, out));
    pieces.text(RangeResponse { more, count, ..RangeResponse::default() }.encode_to_vec());
    pieces
}

fn put(answer: PutResponse) -> Pieces {
    let PutResponse { header, prev_kv } = answer;
    let mut pieces = Pieces::default();
    pieces.text(PutResponse { header, prev_kv: None }.encode_to_vec());
    pieces.versions(prev_kv.into_iter().collect(), |kv, _, out| write_version(PUT_PREV_KV, kv, out));
    pieces
}

fn delete_range(answer: DeleteRangeResponse) -> Pieces {
    let DeleteRangeResponse { header, deleted, prev_kvs } = answer;
    let mut pieces = Pieces::default();
    pieces.text(DeleteRangeResponse { header, deleted, ..DeleteRangeResponse::default() }.encode_to_vec());
    pieces.versions(prev_kvs, |kv, _, out| write_version(DELETE_PREV_KVS, kv, out));
    pieces
}

fn time_to_live(answer: LeaseTimeToLiveResponse, keys: Vec<KeyValue>) -> Pieces {
    let mut pieces = Pieces::default();
    pieces.text(answer.encode_to_vec());
    pieces.versions(keys, |kv, _, out| write_key(kv, out));
    pieces
}

fn write_key(kv: &KeyValue, out: &mut Vec<u8>) {
    encode_key(LEASE_KEYS, WireType::LengthDelimited, out);
    encode_varint(kv.key().len() as u64, out);
    out.extend_from_slice(kv.key());
}

fn txn(answer: TxnResponse) -> Encoded {
    let TxnResponse { header, succeeded, responses } = answer;
    let head = TxnResponse { header, succeeded, responses: Vec::new() }.encode_to_vec();
    let mut encoded = Encoded { bytes: head.len(), pieces: Pieces::default() };
    encoded.pieces.text(head);
    for op in responses {
        let mut inner = Encoded::default();
        match op.response {
            Some(OpResponse::ResponseRange(answer)) => inner.message(OP_RANGE, Encoded::of(answer, range)),
            Some(OpResponse::ResponseDeleteRange(answer)) => {
                inner.message(OP_DELETE_RANGE, Encoded::of(answer, delete_range))
            }
            Some(OpResponse::ResponseTxn(answer)) => inner.message(OP_TXN, txn(answer)),
            Some(OpResponse::ResponsePut(answer)) => inner.message(OP_PUT, Encoded::of(answer, put)),
            None => {}
        }
        encoded.message(TXN_RESPONSES, inner);
    }
    encoded
}

#[cfg(test)]
pub(crate) mod tests;
