//! A snapshot that a peer sends: bounded by the size that it announced, resumable after a broken connection.
//!
//! Bytes are taken in order, each piece with its CRC. Nothing of it counts before [`Incoming::finish`] has read the whole
//! file. It stays on disk when dropped, so that [`Dir::receive`] can go on; opening the directory anew removes it.

use std::io;
use std::path::PathBuf;

use super::format::SYNC_BYTES;
use super::{Dir, Error, SnapshotFile, parse_id};
use crate::env::{File, OpenMode};

/// A snapshot file that is being received.
pub struct Incoming {
    dir: Dir,
    id: String,
    path: PathBuf,
    file: Box<dyn File>,
    offset: u64,
    synced: u64,
    file_bytes: u64,
}

impl Incoming {
    pub(super) fn begin(dir: Dir, id: &str, file_bytes: u64) -> Result<Self, Error> {
        if parse_id(id).is_none() {
            return Err(Error::Transfer("the id is not a snapshot's".to_owned()));
        }
        let own = format!("{id}.incoming");
        let path = dir.path.join(&own);
        let disk = &dir.env.disk;
        let mut resumes = false;
        for name in disk.list(&dir.path)?.into_iter().filter(|name| name.ends_with(".incoming")) {
            if name == own {
                resumes = true;
            } else {
                disk.remove_file(&dir.path.join(name))?;
            }
        }
        let file = disk.open(&path, if resumes { OpenMode::ReadWrite } else { OpenMode::CreateNew })?;
        let mut offset = file.len()?;
        if offset > file_bytes {
            file.set_len(0)?;
            offset = 0;
        }
        if disk.free_bytes(&dir.path)? < file_bytes - offset {
            return Err(io::Error::from(io::ErrorKind::StorageFull).into());
        }
        Ok(Self { dir, id: id.to_owned(), path, file, offset, synced: offset, file_bytes })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the next piece begins; all before it is there.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn is_complete(&self) -> bool {
        self.offset == self.file_bytes
    }

    /// Takes the piece at `offset`, whose CRC-32C is `crc`. A piece that is there already is answered `Ok`.
    pub fn write(&mut self, offset: u64, data: &[u8], crc: u32) -> Result<(), Error> {
        if crc32c::crc32c(data) != crc {
            return Err(Error::Transfer(format!("checksum mismatch in the piece at {offset}")));
        }
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.file_bytes);
        let end = end.ok_or_else(|| Error::Transfer(format!("the piece at {offset} goes beyond the file's end")))?;
        if end <= self.offset {
            return Ok(());
        }
        if offset != self.offset {
            return Err(Error::Transfer(format!("a piece at {offset} where {} is next", self.offset)));
        }
        self.file.write_at(data, offset)?;
        self.offset = end;
        if self.offset - self.synced >= SYNC_BYTES {
            self.file.sync_data()?;
            self.synced = self.offset;
        }
        Ok(())
    }

    /// Makes the file durable, verifies all of it, and puts it in the place of older ones. If it is not what it should be
    /// it is removed, so that the next attempt begins afresh.
    pub fn finish(self) -> Result<SnapshotFile, Error> {
        if !self.is_complete() {
            return Err(Error::Transfer(format!("{} of {} bytes are there", self.offset, self.file_bytes)));
        }
        self.file.sync_all()?;
        let finished = self.dir.finish(&self.id, &self.path);
        if matches!(finished, Err(Error::Damaged { .. } | Error::ForeignCluster { .. })) {
            self.dir.env.disk.remove_file(&self.path)?;
        }
        finished
    }
}
