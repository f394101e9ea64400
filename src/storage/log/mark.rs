//! The log's high-water mark: the newest frame that is durable, kept in a second place.
//!
//! A log whose newest frames are gone, zeroed or cut off, reads like a shorter log: nothing behind its end says that there was more.
//! So the file `mark` beside the segments names the newest frame, and recovery refuses a log that ends before it.
//!
//! Invariants:
//! - The mark is written after the sync of the frame that it names has returned, and before anybody is told of that frame. It may
//!   lag behind the log and never leads it, whatever of it survives.
//! - Frames are numbered for the life of a log, and only upwards: a truncation or a purge is a frame of its own. So the mark is never
//!   lowered, and it stays true if a version that knows no mark has written, truncated or purged in the meantime.
//! - It is one sector, which a disk writes whole or not at all.
//!
//! It is written with each frame, and synced once a second by a thread of its own: a process that is killed leaves it exact, a
//! machine that loses its power up to a second old.
//!
//! Absent: a mark that must be there. One that is missing, damaged, or of a later format counts as none: then the log is taken as it is.
//!
//! ```text
//! 0  magic "QuorMark"
//! 8  u32 format version
//! 12 u32 CRC-32C of all else
//! 16 u64 cluster id
//! 24 u64 member id
//! 32 u64 frame
//! 40 u32 segment that holds it
//! 44 u32 where it ends there
//! ```
//! All numbers are little endian.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::Owner;
use crate::env::{Disk, File, OpenMode, timeout};

const MAGIC: [u8; 8] = *b"QuorMark";
const VERSION: u32 = 1;
const MARK_BYTES: usize = 48;
/// Where the checksum stands; it covers all else.
const CRC_AT: usize = 12;
/// How far the mark may lag behind the log after a power loss.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// The newest durable frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub frame: u64,
    pub segment: u32,
    /// Where the frame ends in its segment.
    pub end: u32,
}

impl Mark {
    fn encode(&self, owner: Owner) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MARK_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(0);
        bytes.put_u64_le(owner.cluster_id);
        bytes.put_u64_le(owner.member_id);
        bytes.put_u64_le(self.frame);
        bytes.put_u32_le(self.segment);
        bytes.put_u32_le(self.end);
        let crc = checksum(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], owner: Owner) -> Option<Self> {
        let mut bytes = bytes.get(..MARK_BYTES)?;
        let crc = checksum(bytes);
        if bytes[..MAGIC.len()] != MAGIC {
            return None;
        }
        bytes.advance(MAGIC.len());
        if bytes.get_u32_le() != VERSION || bytes.get_u32_le() != crc {
            return None;
        }
        let found = Owner { cluster_id: bytes.get_u64_le(), member_id: bytes.get_u64_le() };
        let mark = Self { frame: bytes.get_u64_le(), segment: bytes.get_u32_le(), end: bytes.get_u32_le() };
        (found == owner).then_some(mark)
    }
}

fn checksum(mark: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&mark[..CRC_AT]), &mark[CRC_AT + 4..])
}

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("mark")
}

/// The mark of the log in `dir`; `None` if there is none that can be believed.
pub(super) fn read(disk: &dyn Disk, dir: &Path, owner: Owner) -> io::Result<Option<Mark>> {
    let path = path(dir);
    if !disk.exists(&path) {
        return Ok(None);
    }
    let mark = Mark::decode(&disk.read(&path)?, owner);
    if mark.is_none() {
        tracing::warn!(file = %path.display(), "the log's mark cannot be read; the log is taken as it is");
    }
    Ok(mark)
}

/// Writes and syncs the mark of an open log.
pub(super) struct Keeper {
    owner: Owner,
    /// `None` on a disk that was too full to make it.
    file: Option<Box<dyn File>>,
    unsynced: AtomicBool,
    /// Why a sync failed: the next write says so.
    failed: Mutex<Option<io::Error>>,
    closed: CancellationToken,
    /// Cancelled when the thread that syncs has ended.
    pub ended: CancellationToken,
}

impl Keeper {
    /// Makes the mark durable of a log that was just opened.
    pub fn open(disk: &dyn Disk, dir: &Path, owner: Owner, mark: Mark) -> io::Result<Arc<Self>> {
        let path = path(dir);
        let made = !disk.exists(&path);
        let mode = if made { OpenMode::CreateNew } else { OpenMode::ReadWrite };
        let opened = disk.open(&path, mode).and_then(|file| {
            file.write_at(&mark.encode(owner), 0)?;
            file.sync_all()?;
            if made {
                disk.sync_dir(dir)?;
            }
            Ok(Some(file))
        });
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => None,
            other => other?,
        };
        let (unsynced, failed, closed, ended) = Default::default();
        Ok(Arc::new(Self { owner, file, unsynced, failed, closed, ended }))
    }

    /// To be called when the frame's sync has returned, before its waiters are called.
    pub fn write(&self, mark: Mark) -> io::Result<()> {
        if let Some(error) = self.failed.lock().take() {
            return Err(error);
        }
        let Some(file) = &self.file else { return Ok(()) };
        tolerate_full(file.write_at(&mark.encode(self.owner), 0))?;
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Syncs what was written, once a second and when the log is closed.
    pub async fn run(self: Arc<Self>) {
        let _ended = self.ended.clone().drop_guard();
        let Some(file) = &self.file else { return };
        loop {
            let closed = timeout(SYNC_INTERVAL, self.closed.cancelled()).await.is_ok();
            if self.unsynced.swap(false, Ordering::Acquire)
                && let Err(error) = tolerate_full(file.sync_data())
            {
                *self.failed.lock() = Some(error);
                return;
            }
            if closed {
                return;
            }
        }
    }
}

/// A file system that copies on write may have no room for a sector: then the mark lags, and the log goes on for as long as it can.
fn tolerate_full(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::StorageFull { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_believed_whole_and_by_its_owner_only() {
        let owner = Owner { cluster_id: 7, member_id: 1 };
        let mark = Mark { frame: 9, segment: 3, end: 512 };
        let bytes = mark.encode(owner);
        assert_eq!((bytes.len(), Mark::decode(&bytes, owner)), (MARK_BYTES, Some(mark)));
        assert_eq!(Mark::decode(&bytes, Owner { member_id: 2, ..owner }), None);
        assert_eq!(Mark::decode(&bytes[..MARK_BYTES - 1], owner), None);
        assert_eq!(Mark::decode(&[0; 512], owner), None);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Mark::decode(&flipped, owner), None, "bit {bit}");
        }
    }
}
