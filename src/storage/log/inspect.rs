//! Looks at a log without changing a byte of it, for people; also while a member writes to it.
//!
//! What recovery would refuse is told and not refused: everything before the damage is still shown. Absent: judgement of what to do.

use std::path::{Path, PathBuf};

use super::record::{What, used_bytes};
use super::recovery::{Loaded, Replay, check_complete, check_mark};
use super::{Error, Owner, State, segment};
use crate::env::{Disk, OpenMode};
use crate::pb::log::LogId;

/// What a log holds.
#[derive(Debug)]
pub struct Inspected {
    pub owner: Owner,
    pub state: State,
    /// Whole frames since the log was made, those of purged segments too.
    pub frames: u64,
    pub segments: Vec<Segment>,
    /// Bytes behind the newest whole frame: a frame that is being written, or was torn by a crash.
    pub torn_bytes: u64,
    /// Why recovery would refuse this log.
    pub damage: Option<String>,
}

/// One file.
#[derive(Debug)]
pub struct Segment {
    pub path: PathBuf,
    pub file_bytes: u64,
    /// Without the unused space at its end.
    pub used_bytes: u64,
    /// The first and the last index of its entries, purged ones too.
    pub entries: Option<(u64, u64)>,
}

/// Reads the log in `dir`; `each` sees every entry in the order of the disk, with its kind and its payload: an index that comes again
/// takes the place of all from there on. While a member is `running` the log may grow meanwhile.
pub fn inspect(
    disk: &dyn Disk,
    dir: &Path,
    running: bool,
    each: &mut dyn FnMut(LogId, u8, &[u8]),
) -> Result<Inspected, Error> {
    let numbers = if disk.exists(dir) { segment::list(disk, dir)? } else { Vec::new() };
    let Some(&first) = numbers.first() else { return Err(Error::Missing(dir.to_owned())) };
    let mut active = Loaded::new(disk, dir, first, OpenMode::Read)?;
    let header = active.header()?.ok_or_else(|| active.corrupt(0, "it has no valid header"))?;
    let (owner, mut replay) = (header.owner, Replay::new(&header));
    let mut segments = Vec::new();
    let mut damage = read(&mut replay, &active, &mut segments, each).err();
    let mut rest = numbers[1..].iter();
    for &number in rest.by_ref() {
        let next = Loaded::new(disk, dir, number, OpenMode::Read)?;
        let follows = match next.header() {
            Ok(None) => {
                segments.push(file(&next, None));
                break;
            }
            Ok(Some(_)) if damage.is_some() => Err(next.corrupt(0, "not read: it stands behind damage")),
            Ok(Some(header)) => replay.check_follows(&header, &active, &next),
            Err(error) => Err(error),
        };
        match follows {
            Ok(()) => damage = read(&mut replay, &next, &mut segments, each).err(),
            Err(error) => {
                damage.get_or_insert(error);
                segments.push(file(&next, None));
            }
        }
        if damage.is_none() {
            active = next;
        }
    }
    // Preallocated ones.
    for &number in rest {
        segments.push(file(&Loaded::new(disk, dir, number, OpenMode::Read)?, None));
    }
    let torn_bytes = (used_bytes(&active.bytes)).saturating_sub(replay.end) as u64;
    if !running && damage.is_none() {
        let checked =
            check_complete(&replay, &active, first).and_then(|()| check_mark(disk, dir, owner, &replay, &active));
        damage = checked.err();
    }
    Ok(Inspected {
        owner,
        state: replay.durable.state,
        frames: replay.next_frame.saturating_sub(1),
        segments,
        torn_bytes,
        damage: damage.map(|error| error.to_string()),
    })
}

fn read(
    replay: &mut Replay,
    loaded: &Loaded,
    segments: &mut Vec<Segment>,
    each: &mut dyn FnMut(LogId, u8, &[u8]),
) -> Result<(), Error> {
    let mut entries: Option<(u64, u64)> = None;
    let outcome = replay.segment(loaded, &mut |head, payload| {
        if head.what == What::Entry {
            let index = head.log_id.index;
            let (first, last) = entries.unwrap_or((index, index));
            entries = Some((first.min(index), last.max(index)));
            each(head.log_id, head.kind, payload);
        }
    });
    segments.push(file(loaded, entries));
    outcome
}

fn file(loaded: &Loaded, entries: Option<(u64, u64)>) -> Segment {
    Segment {
        path: loaded.path.clone(),
        file_bytes: loaded.file_bytes,
        used_bytes: used_bytes(&loaded.bytes) as u64,
        entries,
    }
}
