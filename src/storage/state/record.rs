//! The records that the state store keeps: a chain of links, each with the changes that lead from one position to the next.
//!
//! ```text
//! version u8 | flags u8 | crc u32 | from: term u64, index u64, part u32 | to: the same | meta_len u32 | StateMeta | changes
//! ```
//! Little-endian; the CRC-32C covers everything but itself. Changes are length-delimited; a change too large for one record
//! is alone in several (`CUT` on all but the last), as its bare encoding.
//!
//! Invariants: a record's `from` is the `to` of the record before it, so that whatever is lost, left over or torn shows.
//! The record that ends a span of the log carries the `StateMeta`; parts of a span before it carry none.

use prost::Message as _;

use super::change;
use crate::pb::log::{Change, StateMeta};

const FORMAT: u8 = 1;
const HEADER_BYTES: usize = 50;
const CRC_AT: usize = 2;
const CRC_END: usize = 6;

/// The span ends here: a `StateMeta` is present.
const ENDS_SPAN: u8 = 1;
/// The change in this record goes on in the next.
const CUT: u8 = 2;

/// No record is larger than this and its metadata. A sled leaf takes about 20 records, and a page over 2 MiB would leave
/// sled's log for a file of its own that is never fsynced.
pub(super) const RECORD_BYTES_MAX: usize = 64 << 10;

/// Where a record leads: the log index that it is applied up to, and which part of the changes up to that index it is.
/// Ordered by index and part; the term says that both ends mean the same log entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub index: u64,
    /// From 1.
    pub part: u32,
    pub term: u64,
}

impl Position {
    /// Before everything: the empty state.
    pub const START: Self = Self { index: 0, part: 0, term: 0 };

    /// The key of the record that leads here.
    pub fn key(&self) -> Key {
        Key { index: self.index, part: self.part }
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.term.to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.part.to_le_bytes());
    }

    fn take(bytes: &mut &[u8]) -> Self {
        use bytes::Buf as _;
        let term = bytes.get_u64_le();
        let index = bytes.get_u64_le();
        Self { index, part: bytes.get_u32_le(), term }
    }
}

/// What a record is filed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub index: u64,
    pub part: u32,
}

impl Key {
    pub const MIN: Self = Self { index: 0, part: 0 };
    pub const MAX: Self = Self { index: u64::MAX, part: u32::MAX };

    /// Big-endian, so that the order of the bytes is the order of the keys.
    pub fn to_bytes(self) -> [u8; 12] {
        let mut out = [0; 12];
        out[..8].copy_from_slice(&self.index.to_be_bytes());
        out[8..].copy_from_slice(&self.part.to_be_bytes());
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (index, part) = bytes.split_at_checked(8)?;
        Some(Self {
            index: u64::from_be_bytes(index.try_into().ok()?),
            part: u32::from_be_bytes(part.try_into().ok()?),
        })
    }
}

/// A record, taken apart and verified.
#[derive(Debug)]
pub(super) struct Record<'a> {
    pub from: Position,
    pub to: Position,
    /// Present where a span of the log ends.
    pub meta: Option<StateMeta>,
    /// True if the change in here goes on in the next record.
    pub cut: bool,
    pub changes: &'a [u8],
}

impl<'a> Record<'a> {
    /// Verifies what was filed under `key`.
    pub fn decode(key: Key, bytes: &'a [u8]) -> Result<Self, String> {
        let at = |e: &str| format!("record {}.{}: {e}", key.index, key.part);
        if bytes.len() < HEADER_BYTES {
            return Err(at("too short"));
        }
        let crc = u32::from_le_bytes(bytes[CRC_AT..CRC_END].try_into().expect("four bytes"));
        if crc != checksum(bytes) {
            return Err(at("checksum mismatch"));
        }
        if bytes[0] != FORMAT {
            return Err(at(&format!("format {} is unknown", bytes[0])));
        }
        let flags = bytes[1];
        let mut rest = &bytes[CRC_END..];
        let from = Position::take(&mut rest);
        let to = Position::take(&mut rest);
        let (meta_len, rest) = rest.split_at(4);
        let meta_len = u32::from_le_bytes(meta_len.try_into().expect("four bytes")) as usize;
        let (meta, changes) = rest.split_at_checked(meta_len).ok_or_else(|| at("metadata is cut"))?;
        if to.key() != key {
            return Err(at("filed under another record's key"));
        }
        let meta = match flags & ENDS_SPAN {
            0 => None,
            _ => Some(StateMeta::decode(meta).map_err(|e| at(&format!("metadata: {e}")))?),
        };
        Ok(Self { from, to, meta, cut: flags & CUT != 0, changes })
    }

    pub fn encode(&self) -> Vec<u8> {
        let meta = self.meta.as_ref().map(|meta| meta.encode_to_vec()).unwrap_or_default();
        let mut out = Vec::with_capacity(HEADER_BYTES + meta.len() + self.changes.len());
        let flags = if self.meta.is_some() { ENDS_SPAN } else { 0 } | if self.cut { CUT } else { 0 };
        out.extend_from_slice(&[FORMAT, flags, 0, 0, 0, 0]);
        self.from.put(&mut out);
        self.to.put(&mut out);
        out.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&meta);
        out.extend_from_slice(self.changes);
        let crc = checksum(&out);
        out[CRC_AT..CRC_END].copy_from_slice(&crc.to_le_bytes());
        out
    }
}

fn checksum(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[..CRC_AT]), &record[CRC_END..])
}

/// Takes `bytes` for a record, with its checksum put right: it is refused, or it is what encoding it again gives.
#[cfg(any(test, feature = "testing"))]
pub fn check_record(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if bytes.len() < HEADER_BYTES {
        return;
    }
    let crc = checksum(&bytes);
    bytes[CRC_AT..CRC_END].copy_from_slice(&crc.to_le_bytes());
    let mut to = &bytes[CRC_END + 20..];
    let key = Position::take(&mut to).key();
    let Ok(record) = Record::decode(key, &bytes) else { return };
    let again = record.encode();
    let again = Record::decode(key, &again).expect("what was encoded decodes");
    assert_eq!((again.from, again.to, &again.meta, again.cut), (record.from, record.to, &record.meta, record.cut));
    assert_eq!(again.changes, record.changes);
}

/// Packs the changes of one span into records of about `target` bytes, linked from `from` to `(term, index)`.
pub(super) struct Packer {
    at: Position,
    term: u64,
    index: u64,
    part: u32,
    target: usize,
    pending: Vec<u8>,
}

/// A record and what it is filed under.
pub(super) type Filed = (Position, Vec<u8>);

impl Packer {
    pub fn new(from: Position, term: u64, index: u64, target: usize) -> Self {
        assert!((1..=RECORD_BYTES_MAX).contains(&target), "records fit a sled page");
        Self { at: from, term, index, part: 0, target, pending: Vec::new() }
    }

    /// Adds one change; records that are full go to `out`.
    pub fn push(&mut self, change: &Change, out: &mut Vec<Filed>) {
        let len = change::encoded_len(change);
        if !self.pending.is_empty() && self.pending.len() + len > self.target {
            self.flush(None, out);
        }
        if len <= RECORD_BYTES_MAX {
            change::encode(change, &mut self.pending);
            return;
        }
        let whole = change.encode_to_vec();
        let mut pieces = whole.chunks(RECORD_BYTES_MAX).peekable();
        while let Some(piece) = pieces.next() {
            let cut = pieces.peek().is_some();
            self.emit(piece, cut, None, out);
        }
    }

    /// Ends the span.
    pub fn finish(mut self, meta: &StateMeta, out: &mut Vec<Filed>) {
        self.flush(Some(meta.clone()), out);
    }

    fn flush(&mut self, meta: Option<StateMeta>, out: &mut Vec<Filed>) {
        let changes = std::mem::take(&mut self.pending);
        self.emit(&changes, false, meta, out);
        self.pending = changes;
        self.pending.clear();
    }

    fn emit(&mut self, changes: &[u8], cut: bool, meta: Option<StateMeta>, out: &mut Vec<Filed>) {
        self.part = self.part.checked_add(1).expect("a span has fewer parts than 2^32");
        let to = Position { index: self.index, part: self.part, term: self.term };
        out.push((to, Record { from: self.at, to, meta, cut, changes }.encode()));
        self.at = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::KeyValue;
    use crate::pb::log::{LogId, change::Change as Kind};

    #[test]
    fn every_flipped_byte_and_every_cut_of_a_record_is_detected() {
        let mut out = Vec::new();
        let mut packer = Packer::new(Position::START, 3, 9, 4096);
        packer.push(&Change { change: Some(Kind::Version(KeyValue::tombstone(b"k", 4))) }, &mut out);
        let applied = Some(LogId { term: 3, index: 9 });
        packer.finish(&StateMeta { applied, revision: 4, ..Default::default() }, &mut out);
        let (to, record) = out.pop().unwrap();
        let good = Record::decode(to.key(), &record).unwrap();
        assert_eq!((good.from, good.to, good.meta.unwrap().revision), (Position::START, to, 4));
        for at in 0..record.len() {
            let mut bad = record.clone();
            bad[at] ^= 0x10;
            assert!(Record::decode(to.key(), &bad).is_err(), "flipped at {at}");
            assert!(Record::decode(to.key(), &record[..at]).is_err(), "cut at {at}");
        }
        assert!(Record::decode(Key { index: 9, part: 2 }, &record).is_err(), "filed under another key");
    }

    #[test]
    fn keys_sort_as_positions_do() {
        let keys = [(0, 1), (0, 2), (1, 1), (255, 7), (256, 1), (u64::MAX, 3)].map(|(index, part)| Key { index, part });
        assert!(keys.windows(2).all(|w| w[0].to_bytes() < w[1].to_bytes() && w[0] < w[1]));
        assert!(keys.iter().all(|k| Key::from_bytes(&k.to_bytes()) == Some(*k)));
        assert_eq!(Key::from_bytes(b"short"), None);
    }
}
