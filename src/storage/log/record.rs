//! The bytes of one record in a segment.
//!
//! Invariant: the checksum covers segment number and offset, so that bytes of another life or place of a file never validate.
//! Absent: what records mean together (frames, order); that is `recovery`'s.
//!
//! ```text
//! 0  u32 CRC-32C of (segment u32, offset u32, everything below, payload)
//! 4  u32 payload bytes
//! 8  u64 frame
//! 16 u64 term
//! 24 u64 index
//! 32 u8  what
//! 33 u8  kind
//! 34 u16 zero
//! 36     payload
//! ```
//! All numbers are little endian.

use bytes::{Buf as _, BufMut as _};

use crate::pb::log::LogId;

/// Bytes of a record before its payload.
pub(super) const HEAD_BYTES: usize = 36;

/// Compared with, so that looking through unused space is cheap.
static ZEROS: [u8; 4096] = [0; 4096];

/// What a record says. The numbers are on disk and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum What {
    /// A log entry; `kind` and payload are the caller's.
    Entry = 1,
    /// A vote: term, member in place of the index, `kind` 1 if committed.
    Vote = 2,
    /// Entries after the log id are gone; all of them if `kind` is 0.
    Truncate = 3,
    /// Entries up to the log id are gone.
    Purge = 4,
    /// Ends a frame; carries the committed log id unless `kind` is 0.
    End = 5,
}

impl What {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Entry,
            2 => Self::Vote,
            3 => Self::Truncate,
            4 => Self::Purge,
            5 => Self::End,
            _ => return None,
        })
    }
}

/// A record but for its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub what: What,
    pub kind: u8,
    pub frame: u64,
    pub log_id: LogId,
    pub payload_bytes: u32,
}

impl Head {
    /// The log id, for the kinds of record that may have none.
    pub fn optional_id(&self) -> Option<LogId> {
        (self.kind != 0).then_some(self.log_id)
    }

    /// Reads what stands at the start of `bytes`, before its checksum is looked at.
    fn peek(mut bytes: &[u8]) -> Option<(u32, Self)> {
        if bytes.len() < HEAD_BYTES {
            return None;
        }
        let crc = bytes.get_u32_le();
        let payload_bytes = bytes.get_u32_le();
        let frame = bytes.get_u64_le();
        let log_id = LogId { term: bytes.get_u64_le(), index: bytes.get_u64_le() };
        let what = What::from_number(bytes.get_u8())?;
        let kind = bytes.get_u8();
        (bytes.get_u16_le() == 0).then_some((crc, Self { what, kind, frame, log_id, payload_bytes }))
    }

    /// The record at the start of `bytes` if it validates as the one at `offset` of `segment`.
    pub fn decode(bytes: &[u8], segment: u32, offset: u32) -> Option<Self> {
        let (crc, head) = Self::peek(bytes)?;
        let end = HEAD_BYTES.checked_add(head.payload_bytes as usize)?;
        let covered = bytes.get(4..end)?;
        (crc32c::crc32c_append(seed(segment, offset), covered) == crc).then_some(head)
    }

    /// Planted faults take a record without looking at its checksum.
    pub fn believe(bytes: &[u8]) -> Option<Self> {
        let (_, head) = Self::peek(bytes)?;
        (bytes.len() - HEAD_BYTES >= head.payload_bytes as usize).then_some(head)
    }

    /// Appends the record to `into`; it will stand at `offset` of `segment`.
    pub fn encode(&self, payload: &[u8], segment: u32, offset: u32, into: &mut Vec<u8>) {
        assert_eq!(payload.len(), self.payload_bytes as usize, "a record says how long its payload is");
        let start = into.len();
        into.put_u32_le(0);
        into.put_u32_le(self.payload_bytes);
        into.put_u64_le(self.frame);
        into.put_u64_le(self.log_id.term);
        into.put_u64_le(self.log_id.index);
        into.put_u8(self.what as u8);
        into.put_u8(self.kind);
        into.put_u16_le(0);
        into.extend_from_slice(payload);
        let crc = crc32c::crc32c_append(seed(segment, offset), &into[start + 4..]);
        into[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The offset of the first valid record of a frame later than `frame`, at any byte from `from` on.
pub(super) fn find_later(bytes: &[u8], segment: u32, from: usize, frame: u64) -> Option<usize> {
    let mut at = from;
    while at + HEAD_BYTES <= bytes.len() {
        // Unused space is zeros, and there is a lot of it.
        if bytes[at..at + HEAD_BYTES] == ZEROS[..HEAD_BYTES] {
            at += HEAD_BYTES;
            for step in [ZEROS.len(), 8] {
                while bytes.get(at..at + step) == Some(&ZEROS[..step]) {
                    at += step;
                }
            }
            // A record may have begun with the last of them; its `what` is not zero.
            at -= 32;
            continue;
        }
        let later = matches!(Head::peek(&bytes[at..]), Some((_, head)) if head.frame > frame);
        if later && Head::decode(&bytes[at..], segment, at as u32).is_some() {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// True if the frame `frame` that begins at `start`, and whose record at `bad` does not validate, was written whole: then it is
/// damaged, and not torn.
///
/// What was torn lacks a sector, and reads as zeros there: segments are zeros before they are written, and nothing is written twice.
/// A payload that holds a whole sector of zeros hides the difference; then the frame counts as torn.
pub(super) fn was_written_whole(bytes: &[u8], segment: u32, start: usize, bad: usize, frame: u64) -> bool {
    let lacks_sector = |end: usize| {
        let sectors = (start / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES)).map(|sector| {
            let from = (sector * SECTOR_BYTES).max(start);
            from..((sector + 1) * SECTOR_BYTES).min(end)
        });
        sectors.into_iter().any(|part| bytes.get(part).is_none_or(|part| part.iter().all(|byte| *byte == 0)))
    };
    let ends = (bad..bytes.len().saturating_sub(HEAD_BYTES - 1)).find(|at| {
        let head = Head::peek(&bytes[*at..]).filter(|(_, head)| head.frame == frame && head.what == What::End);
        head.is_some() && Head::decode(&bytes[*at..], segment, *at as u32).is_some()
    });
    if let Some(at) = ends {
        return !lacks_sector(at + HEAD_BYTES);
    }
    // No end: it was not written, or is itself what is damaged. All of it is there if its last byte that is not zero is.
    let Some(head) = bytes.get(bad..bad + HEAD_BYTES) else { return false };
    !lacks_sector(bad + HEAD_BYTES) && head[32] == What::End as u8 && head[33] != 0
}

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// How many bytes remain of `bytes` without the zeros at its end.
pub(super) fn used_bytes(bytes: &[u8]) -> usize {
    let mut used = bytes.len();
    for chunk in bytes.rchunks(ZEROS.len()) {
        if *chunk != ZEROS[..chunk.len()] {
            let zeros = chunk.iter().rev().take_while(|&&byte| byte == 0).count();
            return used - zeros;
        }
        used -= chunk.len();
    }
    used
}

/// `bytes` as records that validate from `at` of `segment` on: lengths are cut to what is there, checksums put right, and
/// numbers made small, so that a fuzzer gets past them.
#[cfg(any(test, feature = "testing"))]
pub(super) fn with_checksums(bytes: &[u8], segment: u32, at: usize) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let mut start = 0;
    while out.len() - start >= HEAD_BYTES {
        let record = &mut out[start..];
        let payload_bytes = usize::from(record[4]) % (record.len() - HEAD_BYTES + 1);
        record[4..8].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
        for number in [8, 16, 24] {
            record[number + 1..number + 8].fill(0);
        }
        record[34..36].fill(0);
        let end = HEAD_BYTES + payload_bytes;
        let crc = crc32c::crc32c_append(seed(segment, (at + start) as u32), &record[4..end]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
        start += end;
    }
    out
}

fn seed(segment: u32, offset: u32) -> u32 {
    let mut place = [0; 8];
    place[..4].copy_from_slice(&segment.to_le_bytes());
    place[4..].copy_from_slice(&offset.to_le_bytes());
    crc32c::crc32c(&place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(frame: u64, payload: &[u8]) -> Head {
        Head {
            what: What::Entry,
            kind: 3,
            frame,
            log_id: LogId { term: 2, index: 9 },
            payload_bytes: payload.len() as u32,
        }
    }

    #[test]
    fn a_record_validates_only_where_it_was_written() {
        let mut bytes = Vec::new();
        head(7, b"payload").encode(b"payload", 3, 512, &mut bytes);
        assert_eq!(Head::decode(&bytes, 3, 512), Some(head(7, b"payload")));
        assert_eq!(Head::decode(&bytes, 4, 512), None);
        assert_eq!(Head::decode(&bytes, 3, 513), None);
        assert_eq!(Head::decode(&bytes[..bytes.len() - 1], 3, 512), None);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::decode(&flipped, 3, 512), None, "bit {bit}");
        }
        assert_eq!(Head::decode(&[0; 64], 3, 512), None);
    }

    #[test]
    fn a_later_record_is_found_at_any_offset() {
        for at in (0..300).chain(4000..4200) {
            let mut bytes = vec![0; at];
            head(7, b"").encode(b"", 3, at as u32, &mut bytes);
            bytes.extend_from_slice(&[0; 50]);
            assert_eq!(find_later(&bytes, 3, 0, 6), Some(at));
            assert_eq!(find_later(&bytes, 3, 0, 7), None);
            assert_eq!(find_later(&bytes, 3, at + 1, 6), None);
        }
    }
}
