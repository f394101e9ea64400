//! Segment files: their names, their header, and reading entries back.
//!
//! Invariant: a header carries everything that earlier segments say beside their entries, so they can be unlinked.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf as _, BufMut as _, Bytes};

use super::record::{HEAD_BYTES, Head, What};
use super::{Error, Owner, Place, Record, State};
use crate::env::{Disk, File, planted};
use crate::pb::log::{LogId, Vote};

/// Bytes of a segment before its first record.
pub(super) const HEADER_BYTES: usize = 256;
const MAGIC: [u8; 8] = *b"QuorLog\0";
const VERSION: u32 = 1;
/// Where the checksum stands; it covers all else.
const CRC_AT: usize = 12;
/// Entries further apart than this are read with two reads.
const GAP_BYTES_MAX: u64 = 64 * 1024;

/// The first bytes of a segment, written together with its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub owner: Owner,
    /// The frame that follows the header. The first index is the one after `state.last`.
    pub first_frame: u64,
    /// Where the records of the segment before end; 0 in the very first one.
    pub previous_end: u64,
    /// How long the file was when it was allocated, at least; 0 from version 0.1. One that is shorter now was cut.
    pub file_bytes: u64,
    /// What the log said when the segment was begun.
    pub state: State,
}

impl Header {
    pub fn encode(&self, segment: u32, into: &mut Vec<u8>) {
        let start = into.len();
        into.extend_from_slice(&MAGIC);
        into.put_u32_le(VERSION);
        into.put_u32_le(0);
        into.put_u32_le(segment);
        into.put_u64_le(self.owner.cluster_id);
        into.put_u64_le(self.owner.member_id);
        into.put_u64_le(self.first_frame);
        into.put_u64_le(self.previous_end);
        for id in [self.state.last, self.state.purged, self.state.committed] {
            put_optional(into, id.map(|id| (id.term, id.index)));
        }
        put_optional(into, self.state.vote.map(|vote| (vote.term, vote.member)));
        into.put_u8(self.state.vote.is_some_and(|vote| vote.committed).into());
        into.put_u64_le(self.file_bytes);
        assert!(into.len() <= start + HEADER_BYTES, "a header has its fixed size");
        into.resize(start + HEADER_BYTES, 0);
        let crc = checksum(&into[start..]);
        into[start + CRC_AT..start + CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// The header of `segment`; `None` if these bytes are none. A format that this version does not know is an error.
    pub fn decode(bytes: &[u8], segment: u32, file: &Path) -> Result<Option<Self>, Error> {
        let Some(mut bytes) = bytes.get(..HEADER_BYTES) else { return Ok(None) };
        let crc = checksum(bytes);
        if bytes[..MAGIC.len()] != MAGIC {
            return Ok(None);
        }
        bytes.advance(MAGIC.len());
        let version = bytes.get_u32_le();
        if bytes.get_u32_le() != crc {
            return Ok(None);
        }
        if version != VERSION {
            return Err(Error::Version { file: file.to_owned(), found: version });
        }
        if bytes.get_u32_le() != segment {
            return Ok(None);
        }
        let owner = Owner { cluster_id: bytes.get_u64_le(), member_id: bytes.get_u64_le() };
        let first_frame = bytes.get_u64_le();
        let previous_end = bytes.get_u64_le();
        let mut id = || get_optional(&mut bytes).map(|(term, index)| LogId { term, index });
        let (last, purged, committed) = (id(), id(), id());
        let vote = get_optional(&mut bytes);
        let is_committed = bytes.get_u8() != 0;
        let vote = vote.map(|(term, member)| Vote { term, member, committed: is_committed });
        let file_bytes = bytes.get_u64_le();
        let state = State { purged, last, vote, committed };
        Ok(Some(Self { owner, first_frame, previous_end, file_bytes, state }))
    }
}

fn checksum(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..CRC_AT]), &header[CRC_AT + 4..])
}

fn put_optional(into: &mut Vec<u8>, pair: Option<(u64, u64)>) {
    into.put_u8(pair.is_some().into());
    let (a, b) = pair.unwrap_or_default();
    into.put_u64_le(a);
    into.put_u64_le(b);
}

fn get_optional(bytes: &mut &[u8]) -> Option<(u64, u64)> {
    let some = bytes.get_u8() != 0;
    let pair = (bytes.get_u64_le(), bytes.get_u64_le());
    some.then_some(pair)
}

pub(super) fn path(dir: &Path, segment: u32) -> PathBuf {
    dir.join(format!("{segment:010}.log"))
}

/// Numbers of the segment files in `dir`, ascending.
pub(super) fn list(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<u32>> {
    let mut numbers: Vec<u32> =
        disk.list(dir)?.iter().filter_map(|name| name.strip_suffix(".log")?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Takes `bytes` of disk for an empty file, durably.
pub(super) fn preallocate(file: &dyn File, bytes: u64) -> io::Result<()> {
    match file.allocate(bytes) {
        // Not every file system can; writing takes the space everywhere.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => zero(file, 0, bytes)?,
        other => other?,
    }
    file.sync_all()
}

/// Overwrites `from..to` with zeros.
pub(super) fn zero(file: &dyn File, from: u64, to: u64) -> io::Result<()> {
    let zeros = vec![0; (to - from).min(1 << 20) as usize];
    let mut at = from;
    while at < to {
        let chunk = (to - at).min(zeros.len() as u64);
        file.write_at(&zeros[..chunk as usize], at)?;
        at += chunk;
    }
    Ok(())
}

/// Entries that stand near each other in one file: one read.
pub(super) struct Run {
    pub file: Arc<dyn File>,
    pub name: PathBuf,
    pub segment: u32,
    /// Ascending by offset; the first has `first_index`.
    pub places: Vec<Place>,
    pub first_index: u64,
}

impl Run {
    /// Takes `place`, the entry after the last one, if it is near enough.
    pub fn extend(&mut self, place: Place) -> bool {
        let near = self.places.last().is_some_and(|last| {
            last.segment == place.segment
                && place.offset as u64 >= last.end()
                && place.offset as u64 - last.end() <= GAP_BYTES_MAX
        });
        if near {
            self.places.push(place);
        }
        near
    }

    /// Reads the entries and checks them.
    pub fn read(self, into: &mut Vec<Record>) -> io::Result<()> {
        let (Some(first), Some(last)) = (self.places.first(), self.places.last()) else { return Ok(()) };
        let start = first.offset as usize;
        let mut bytes = vec![0; last.end() as usize - start];
        self.file.read_exact_at(&mut bytes, start as u64)?;
        let bytes = Bytes::from(bytes);
        for (place, index) in self.places.iter().zip(self.first_index..) {
            let at = place.offset as usize - start;
            let decoded = Head::decode(&bytes[at..], self.segment, place.offset);
            let head = decoded
                .or_else(|| if planted!("crc-not-checked") { Head::believe(&bytes[at..]) } else { None })
                .filter(|head| head.what == What::Entry && head.log_id.index == index)
                .ok_or_else(|| {
                    let name = self.name.display();
                    let text = format!("{name}: the record of index {index} at offset {} is damaged", place.offset);
                    io::Error::new(io::ErrorKind::InvalidData, text)
                })?;
            let payload = bytes.slice(at + HEAD_BYTES..at + HEAD_BYTES + head.payload_bytes as usize);
            into.push(Record { log_id: head.log_id, kind: head.kind, payload });
        }
        Ok(())
    }
}
