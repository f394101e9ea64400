//! Reads a log back after a stop or a crash.
//!
//! The frames are replayed in order. Where they end without a valid next one, the rest is *tail*: at most one frame, whose
//! fdatasync never returned, so nobody was told of it, and it is dropped whole. If however it lacks no sector (see
//! `record::was_written_whole`), a valid record of a frame after that one exists, entries up to the saved committed index are missing,
//! the log's mark names a frame that is not there, or a file is shorter than it was made, then durable data is damaged and the log is
//! refused.
//!
//! Invariants: a dropped tail is overwritten with zeros before anything is appended, so it cannot come back. The newest frame
//! is written again before it counts as durable: the process that wrote it may have died before its sync, or after a failed one.
//! Absent: repair. A refused member is replaced.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::{HEAD_BYTES, Head, What, find_later, used_bytes, was_written_whole};
use super::segment::{self, HEADER_BYTES, Header};
use super::supply::Spare;
use super::{Durable, Error, Options, Owner, Place, index_after, mark};
use crate::env::{Disk, File, OpenMode, planted};
use crate::pb::log::Vote;

/// An opened log.
pub(super) struct Recovered {
    pub durable: Durable,
    /// Segments with frames.
    pub segments: BTreeMap<u32, Arc<dyn File>>,
    pub active: u32,
    /// Where the next frame goes in the active segment.
    pub end: u64,
    pub next_frame: u64,
    /// Empty preallocated segments that follow.
    pub spares: VecDeque<Spare>,
    /// Segments without a live entry, to be unlinked.
    pub doomed: VecDeque<u32>,
}

/// A segment file, all of it in memory: recovery holds one or two at a time.
pub(super) struct Loaded {
    pub number: u32,
    pub path: PathBuf,
    file: Arc<dyn File>,
    pub file_bytes: u64,
    /// Without the zeros at the file's end.
    pub bytes: Vec<u8>,
}

/// The file without the zeros at its end (to within a piece): most of a preallocated segment is unused, and is not worth
/// memory.
fn read_used(file: &dyn File) -> io::Result<Vec<u8>> {
    const PIECE_BYTES: u64 = 256 << 10;
    let len = file.len()?;
    let mut bytes = Vec::new();
    let mut piece = vec![0; PIECE_BYTES.min(len) as usize];
    for start in (0..len).step_by(PIECE_BYTES as usize) {
        let piece = &mut piece[..PIECE_BYTES.min(len - start) as usize];
        file.read_exact_at(piece, start)?;
        if start == 0 || piece.iter().any(|byte| *byte != 0) {
            bytes.resize(start as usize, 0);
            bytes.extend_from_slice(piece);
        }
    }
    Ok(bytes)
}

impl Loaded {
    pub fn new(disk: &dyn Disk, dir: &Path, number: u32, mode: OpenMode) -> io::Result<Self> {
        let path = segment::path(dir, number);
        let file = disk.open(&path, mode)?;
        let (file_bytes, mut bytes) = (file.len()?, read_used(&*file)?);
        if planted!("torn-tail-accepted") {
            // A lost sector reads as zeros.
            bytes.resize(file_bytes as usize, 0);
        }
        Ok(Self { number, path, file: Arc::from(file), file_bytes, bytes })
    }

    /// The header, if it has one; then the file is as long as the header says.
    pub fn header(&self) -> Result<Option<Header>, Error> {
        let header = Header::decode(&self.bytes, self.number, &self.path)?;
        if let Some(made) = header.as_ref().map(|header| header.file_bytes)
            && self.file_bytes < made
        {
            return Err(self.corrupt(self.file_bytes as usize, format!("the file was cut; it had {made} bytes")));
        }
        Ok(header)
    }

    pub fn corrupt(&self, offset: usize, reason: impl Into<String>) -> Error {
        Error::Corrupt { file: self.path.clone(), offset: offset as u64, reason: reason.into() }
    }

    /// The records of frame `number` if it stands whole at `start`, with where they are; else where it goes wrong.
    fn frame(&self, start: usize, number: u64, into: &mut Vec<(Head, u32)>) -> Result<usize, usize> {
        into.clear();
        let mut at = start;
        loop {
            let offset = u32::try_from(at).map_err(|_| at)?;
            let rest = self.bytes.get(at..).unwrap_or_default();
            let mut head = Head::decode(rest, self.number, offset);
            if [planted!("crc-not-checked"), planted!("torn-tail-accepted")].contains(&true) {
                head = head.or_else(|| Head::believe(rest));
                if planted!("torn-tail-accepted") && head.is_none() && !into.is_empty() {
                    return Ok(at);
                }
            }
            let head = head.filter(|head| head.frame == number).ok_or(at)?;
            at += HEAD_BYTES + head.payload_bytes as usize;
            into.push((head, offset));
            if head.what == What::End {
                return Ok(at);
            }
        }
    }
}

pub(super) struct Replay {
    pub durable: Durable,
    pub next_frame: u64,
    /// The newest frame in the segment; the header goes with the first.
    frame_start: usize,
    /// Where the frames of the segment end.
    pub end: usize,
    /// Where the next frame would be but goes wrong.
    bad: usize,
    records: Vec<(Head, u32)>,
}

impl Replay {
    pub fn new(header: &Header) -> Self {
        let mut durable = Durable { state: header.state, ..Durable::default() };
        durable.base = durable.state.next_index();
        let next_frame = header.first_frame;
        Self { durable, next_frame, frame_start: 0, end: HEADER_BYTES, bad: HEADER_BYTES, records: Vec::new() }
    }

    /// Replays a segment whose header is valid; `each` sees every record of a whole frame, and its payload.
    pub fn segment(&mut self, segment: &Loaded, each: &mut dyn FnMut(&Head, &[u8])) -> Result<(), Error> {
        (self.frame_start, self.end) = (0, HEADER_BYTES);
        loop {
            match segment.frame(self.end, self.next_frame, &mut self.records) {
                Ok(end) => {
                    for (head, offset) in &self.records {
                        apply(&mut self.durable, *head, segment, *offset)?;
                        let payload = *offset as usize + HEAD_BYTES;
                        each(head, &segment.bytes[payload..payload + head.payload_bytes as usize]);
                    }
                    // The first frame of a segment was written with its header.
                    self.frame_start = if self.end == HEADER_BYTES { 0 } else { self.end };
                    self.end = end;
                    self.next_frame += 1;
                }
                Err(bad) => {
                    self.bad = bad;
                    return Ok(());
                }
            }
        }
    }

    /// Checks that `header` goes on where the segment `before` ended.
    pub fn check_follows(&self, header: &Header, before: &Loaded, next: &Loaded) -> Result<(), Error> {
        if header.previous_end != self.end as u64 || header.first_frame != self.next_frame {
            return Err(before.corrupt(self.bad, "a later segment is intact"));
        }
        if header.state != self.durable.state {
            return Err(next.corrupt(0, "its header contradicts the segment before"));
        }
        Ok(())
    }
}

/// Applies one record of a whole frame. A valid record that makes no sense is damage too.
fn apply(durable: &mut Durable, head: Head, segment: &Loaded, offset: u32) -> Result<(), Error> {
    let state = &mut durable.state;
    let senseless = |what: &str| Err(segment.corrupt(offset as usize, what));
    match head.what {
        What::Entry if head.log_id.index != state.next_index() => return senseless("an entry is out of order"),
        What::Entry => {
            let place = Place { segment: segment.number, offset, payload_bytes: head.payload_bytes };
            durable.append(head.log_id, place);
        }
        What::Vote => {
            let (term, member) = (head.log_id.term, head.log_id.index);
            state.vote = Some(Vote { term, member, committed: head.kind != 0 });
        }
        What::Truncate => {
            let next = index_after(head.optional_id());
            if next < state.first_index() || next > state.next_index() {
                return senseless("a truncation is out of order");
            }
            durable.truncate(head.optional_id());
        }
        What::Purge if head.log_id.index < state.first_index() => return senseless("a purge is out of order"),
        What::Purge => durable.purge(head.log_id),
        What::End => state.committed = head.optional_id(),
    }
    Ok(())
}

/// Reads the log in `dir` and makes it ready to be appended to.
pub(super) fn recover(disk: &dyn Disk, dir: &Path, owner: Owner, options: &Options) -> Result<Recovered, Error> {
    let numbers = if disk.exists(dir) { segment::list(disk, dir)? } else { Vec::new() };
    let Some(&first) = numbers.first() else { return Err(Error::Missing(dir.to_owned())) };
    if let Some(hole) = numbers.iter().zip(first..).find_map(|(&number, want)| (number != want).then_some(want)) {
        let file = segment::path(dir, hole);
        return Err(Error::Corrupt { file, offset: 0, reason: "the segment is missing".to_owned() });
    }

    let mut segments = BTreeMap::new();
    let mut active = Loaded::new(disk, dir, first, OpenMode::ReadWrite)?;
    let header = active.header()?.ok_or_else(|| active.corrupt(0, "it has no valid header"))?;
    check_owner(&header, owner, &active)?;
    let mut replay = Replay::new(&header);
    replay.segment(&active, &mut |_, _| {})?;
    for &number in &numbers[1..] {
        let next = Loaded::new(disk, dir, number, OpenMode::ReadWrite)?;
        let Some(header) = next.header()? else { break };
        check_owner(&header, owner, &next)?;
        replay.check_follows(&header, &active, &next)?;
        replay.segment(&next, &mut |_, _| {})?;
        segments.insert(active.number, active.file);
        active = next;
    }
    let rest = numbers.iter().copied().filter(|&number| number > active.number);
    check_complete(&replay, &active, first)?;
    let (spares, dirty) = look_behind(disk, dir, rest, options, &replay, &active)?;
    let torn = used_bytes(&active.bytes) > replay.end || !dirty.is_empty();
    let state = replay.durable.state;
    if torn && state.committed.is_some_and(|committed| committed.index >= state.next_index()) {
        return Err(active.corrupt(replay.bad, "committed entries are missing"));
    }

    check_mark(disk, dir, owner, &replay, &active)?;

    cut_tail(&active, &replay)?;
    for number in dirty.into_iter().rev() {
        // The highest first, each durably: never a hole.
        disk.remove_file(&segment::path(dir, number))?;
        disk.sync_dir(dir)?;
    }
    disk.sync_dir(dir)?;

    let Replay { durable, next_frame, end, .. } = replay;
    segments.insert(active.number, active.file);
    let needed = durable.places.front().map_or(active.number, |place| place.segment);
    let kept = segments.split_off(&needed);
    let doomed = segments.into_keys().collect();
    Ok(Recovered { durable, segments: kept, active: active.number, end: end as u64, next_frame, spares, doomed })
}

fn check_owner(header: &Header, expected: Owner, segment: &Loaded) -> Result<(), Error> {
    if header.owner == expected {
        return Ok(());
    }
    Err(Error::Foreign { file: segment.path.clone(), found: header.owner, expected })
}

/// Checks that what was replayed is all there.
pub(super) fn check_complete(replay: &Replay, active: &Loaded, first: u32) -> Result<(), Error> {
    let state = replay.durable.state;
    if replay.durable.base != state.first_index() {
        let (base, want) = (replay.durable.base, state.first_index());
        return Err(active.corrupt(0, format!("segments before {first} are missing: entries {want} to {base}")));
    }
    if used_bytes(&active.bytes) > replay.end
        && was_written_whole(&active.bytes, active.number, replay.end, replay.bad, replay.next_frame)
    {
        return Err(active.corrupt(replay.bad, "the newest frame was written whole and does not validate"));
    }
    if let Some(later) = find_later(&active.bytes, active.number, replay.bad, replay.next_frame) {
        return Err(active.corrupt(replay.bad, format!("a later frame is intact at offset {later}")));
    }
    Ok(())
}

/// Checks that the log reaches as far as its mark says.
pub(super) fn check_mark(
    disk: &dyn Disk,
    dir: &Path,
    owner: Owner,
    replay: &Replay,
    active: &Loaded,
) -> Result<(), Error> {
    let Some(mark) = mark::read(disk, dir, owner)?.filter(|mark| mark.frame >= replay.next_frame) else {
        return Ok(());
    };
    if planted!("mark-not-checked") {
        return Ok(());
    }
    let (end, segment) = (mark.end, segment::path(dir, mark.segment));
    let reason = format!(
        "the log ends at frame {}, but up to frame {} it was durable, to offset {end} of {}: its tail is lost",
        replay.next_frame - 1,
        mark.frame,
        segment.display(),
    );
    Err(active.corrupt(replay.bad, reason))
}

/// Looks at the files behind the active segment: spares that are clean, and the numbers of those to be made anew.
fn look_behind(
    disk: &dyn Disk,
    dir: &Path,
    numbers: impl Iterator<Item = u32>,
    options: &Options,
    replay: &Replay,
    active: &Loaded,
) -> Result<(VecDeque<Spare>, Vec<u32>), Error> {
    let (mut spares, mut dirty) = (VecDeque::new(), Vec::new());
    let mut before: Option<Loaded> = None;
    for number in numbers {
        let spare = Loaded::new(disk, dir, number, OpenMode::ReadWrite)?;
        if let Some(before) = before.filter(|before| before.file_bytes < spare.file_bytes) {
            // One is made only when the one before it is whole.
            return Err(before.corrupt(before.file_bytes as usize, "the file was cut; the next one is longer"));
        }
        let later = find_later(&spare.bytes, number, 0, replay.next_frame);
        let whole = number == active.number + 1 && was_written_whole(&spare.bytes, number, 0, 0, replay.next_frame);
        if spare.header()?.is_some() || later.is_some() || whole {
            // The header that should tell about this is the damaged one.
            let (broken, offset) = if number == active.number + 1 { (&spare, 0) } else { (active, replay.bad) };
            return Err(broken.corrupt(offset, format!("later records are intact in segment {number}")));
        }
        let clean = spare.file_bytes >= options.segment_bytes && used_bytes(&spare.bytes) == 0;
        if clean && dirty.is_empty() {
            spare.file.sync_all()?;
            spares.push_back((number, spare.file.clone()));
        } else {
            dirty.push(number);
        }
        before = Some(Loaded { bytes: Vec::new(), ..spare });
    }
    Ok((spares, dirty))
}

/// Overwrites the torn frame, writes the newest whole one again, and syncs.
fn cut_tail(active: &Loaded, replay: &Replay) -> io::Result<()> {
    let used = used_bytes(&active.bytes);
    if used > replay.end {
        let (file, bytes) = (active.path.display(), used - replay.end);
        tracing::warn!(%file, offset = replay.end, bytes, "dropped a torn frame from the log's end");
        segment::zero(&*active.file, replay.end as u64, used as u64)?;
    }
    active.file.write_at(&active.bytes[replay.frame_start..replay.end], replay.frame_start as u64)?;
    active.file.sync_all()
}
