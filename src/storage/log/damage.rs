//! Damage that tests do to a log: frames behind its end are taken away, as if they had never been written.
//!
//! Absent: knowledge of what was durable; that is the caller's to choose, and the mark tells it.

use std::io;
use std::path::Path;

use super::mark;
use super::record::{HEAD_BYTES, Head, What};
use super::segment::{self, HEADER_BYTES};
use crate::env::{Disk, OpenMode};

/// Where a frame ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameEnd {
    pub frame: u64,
    segment: u32,
    offset: u64,
}

/// How frames get lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Zeros in their place.
    Zeroed,
    /// The file ends before them, and later ones are empty.
    Cut,
    /// Zeros in their place, and later files are gone.
    Removed,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::Zeroed, Self::Cut, Self::Removed];
}

/// All frames of the log in `dir`, in order.
pub fn frames(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<FrameEnd>> {
    let mut ends = Vec::new();
    for number in segment::list(disk, dir)? {
        let bytes = disk.read(&segment::path(dir, number))?;
        let mut at = HEADER_BYTES;
        while let Some(head) = Head::decode(bytes.get(at..).unwrap_or_default(), number, at as u32) {
            at += HEAD_BYTES + head.payload_bytes as usize;
            if head.what == What::End {
                ends.push(FrameEnd { frame: head.frame, segment: number, offset: at as u64 });
            }
        }
    }
    Ok(ends)
}

/// The frame that the mark of the log in `dir` names.
pub fn marked_frame(disk: &dyn Disk, dir: &Path) -> io::Result<Option<u64>> {
    let Some(owner) = super::owner(disk, dir) else { return Ok(None) };
    Ok(mark::read(disk, dir, owner)?.map(|mark| mark.frame))
}

/// Takes the mark away: as if it had never reached the disk.
pub fn forget_mark(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    disk.remove_file(&mark::path(dir))?;
    disk.sync_dir(dir)
}

/// Takes everything behind `last` away.
pub fn lose_behind(disk: &dyn Disk, dir: &Path, last: FrameEnd, way: Way) -> io::Result<()> {
    let numbers = segment::list(disk, dir)?;
    for number in numbers.into_iter().rev().take_while(|number| *number >= last.segment) {
        let path = segment::path(dir, number);
        let from = if number == last.segment { last.offset } else { 0 };
        if way == Way::Removed && from == 0 {
            disk.remove_file(&path)?;
            disk.sync_dir(dir)?;
            continue;
        }
        let file = disk.open(&path, OpenMode::ReadWrite)?;
        match way {
            Way::Cut => file.set_len(from)?,
            Way::Zeroed | Way::Removed => segment::zero(&*file, from, file.len()?)?,
        }
        file.sync_all()?;
    }
    Ok(())
}
