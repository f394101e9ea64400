//! Snapshot files: all state at one applied index, in one checksummed file that is also what another member gets.
//!
//! ```text
//! <dir>/<term>-<index>-<crc>.snap      finished; decimal with leading zeros, so that names sort by log id
//! <dir>/<term>-<index>.partial         being written
//! <dir>/<snapshot id>.incoming         being received
//! <dir>/<name>.damaged                 kept for people to look at; the newest one
//! ```
//! Owns the directory: [`Dir`] makes ([`Writer`]), receives ([`Incoming`]), verifies and removes the files, and [`Reader`]
//! streams one. `format` has the bytes.
//!
//! Invariants: a file has its final name only after it was fsynced, read back and verified; older ones go only after that.
//! The id ends in a checksum of the whole file, so equal ids mean equal bytes and a transfer can resume.
//! Absent: what the changes mean, when to write one, and the transport.

pub mod backup;
pub mod format;
mod incoming;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

pub use format::{Head, Reader, Writer};
pub use incoming::Incoming;

use crate::env::{Env, File, OpenMode};
use crate::pb::log::{LogId, StateMeta};

/// Why a snapshot file could not be written, read or received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("snapshot: {0}")]
    Io(#[from] io::Error),
    #[error("snapshot {name} is damaged: {reason}")]
    Damaged { name: String, reason: String },
    /// A whole file, but not one for us.
    #[error("snapshot {name} is of cluster {found:x}, not {expected:x}")]
    ForeignCluster { name: String, found: u64, expected: u64 },
    /// What a peer sends makes no sense; it should begin again.
    #[error("snapshot transfer: {0}")]
    Transfer(String),
}

/// A finished snapshot. It holds its file open, so it stays readable after a newer one took its place.
#[derive(Clone)]
pub struct SnapshotFile {
    /// Names these very bytes.
    pub id: String,
    pub path: PathBuf,
    pub head: Head,
    /// Size of the file.
    pub bytes: u64,
    file: Arc<dyn File>,
}

impl SnapshotFile {
    /// What the snapshot leads to.
    pub fn meta(&self) -> &StateMeta {
        &self.head.meta
    }

    /// For whoever keeps a copy; it stays readable whatever becomes of its name.
    pub fn file(&self) -> Arc<dyn File> {
        self.file.clone()
    }

    /// All changes, in order, holding one block in memory. Ends with an error if the file is not whole.
    pub fn read(&self) -> Result<Reader, Error> {
        Reader::open(self.file.clone(), &self.id)
    }

    /// The file's bytes at `offset`, for a peer; fewer than `bytes_max` only at the end.
    pub fn read_raw(&self, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (self.bytes.saturating_sub(offset)).min(bytes_max as u64) as usize];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

impl std::fmt::Debug for SnapshotFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotFile").field("id", &self.id).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// The directory of snapshot files. Cloning shares it.
#[derive(Clone)]
pub struct Dir {
    env: Env,
    path: PathBuf,
    cluster_id: u64,
    latest: Arc<Mutex<Option<SnapshotFile>>>,
}

impl Dir {
    /// Opens the directory: removes what was never finished, and verifies the newest file; a damaged one is set aside, and
    /// the next older taken.
    pub fn open(env: &Env, path: &Path, cluster_id: u64) -> Result<Self, Error> {
        env.disk.create_dir_all(path)?;
        let dir = Self { env: env.clone(), path: path.to_owned(), cluster_id, latest: Arc::default() };
        for name in dir.env.disk.list(path)? {
            if name.ends_with(".partial") || name.ends_with(".incoming") {
                dir.env.disk.remove_file(&path.join(name))?;
            }
        }
        *dir.latest.lock() = dir.find_latest()?;
        Ok(dir)
    }

    /// The newest whole snapshot.
    pub fn latest(&self) -> Option<SnapshotFile> {
        self.latest.lock().clone()
    }

    /// Begins a snapshot of our own. One at a time.
    pub fn create(&self, head: Head) -> Result<Writer, Error> {
        assert_eq!(head.cluster_id, self.cluster_id, "a member writes snapshots of its own cluster");
        Writer::create(self.clone(), head)
    }

    /// Begins, or goes on, receiving the snapshot `id` of `file_bytes` bytes. One at a time: what was received of another
    /// is dropped.
    pub fn receive(&self, id: &str, file_bytes: u64) -> Result<Incoming, Error> {
        Incoming::begin(self.clone(), id, file_bytes)
    }

    /// Takes away a snapshot that turned out damaged while it was read; the next older becomes the latest.
    pub fn set_aside(&self, file: &SnapshotFile, reason: &str) -> Result<(), Error> {
        let mut latest = self.latest.lock();
        self.move_damaged(&file.id, reason)?;
        *latest = self.find_latest()?;
        Ok(())
    }

    fn find_latest(&self) -> Result<Option<SnapshotFile>, Error> {
        let mut names = self.env.disk.list(&self.path)?;
        names.reverse();
        for id in names.iter().filter_map(|name| name.strip_suffix(".snap")) {
            match self.verify(id, &self.file_path(id)) {
                Ok(file) => return Ok(Some(file)),
                Err(Error::Damaged { reason, .. }) => self.move_damaged(id, &reason)?,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn move_damaged(&self, id: &str, reason: &str) -> Result<(), Error> {
        tracing::error!(snapshot = id, reason, "snapshot file is damaged and set aside");
        let disk = &self.env.disk;
        for name in disk.list(&self.path)?.iter().filter(|name| name.ends_with(".damaged")) {
            disk.remove_file(&self.path.join(name))?;
        }
        let path = self.file_path(id);
        if disk.exists(&path) {
            disk.rename(&path, &path.with_extension("damaged"))?;
        }
        Ok(disk.sync_dir(&self.path)?)
    }

    /// Reads the whole file at `path` and answers it as snapshot `id`, if it is that.
    fn verify(&self, id: &str, path: &Path) -> Result<SnapshotFile, Error> {
        let damaged = |reason: String| Error::Damaged { name: id.to_owned(), reason };
        let file: Arc<dyn File> = self.env.disk.open(path, OpenMode::Read)?.into();
        let bytes = file.len()?;
        let mut reader = Reader::open(file.clone(), id)?;
        let head = reader.head().clone();
        while reader.next_block()?.is_some() {}
        let log_id = head.meta.applied.ok_or_else(|| damaged("it has no applied index".to_owned()))?;
        if id != make_id(log_id, reader.file_crc()) {
            return Err(damaged("its name is another snapshot's".to_owned()));
        }
        if head.cluster_id != self.cluster_id {
            return Err(Error::ForeignCluster {
                name: id.to_owned(),
                found: head.cluster_id,
                expected: self.cluster_id,
            });
        }
        Ok(SnapshotFile { id: id.to_owned(), path: path.to_owned(), head, bytes, file })
    }

    /// Gives the verified file at `path` its final name, and removes the older ones.
    fn finish(&self, id: &str, path: &Path) -> Result<SnapshotFile, Error> {
        let mut verified = self.verify(id, path)?;
        let disk = &self.env.disk;
        verified.path = self.file_path(id);
        let mut latest = self.latest.lock();
        disk.rename(path, &verified.path)?;
        disk.sync_dir(&self.path)?;
        // While a snapshot was written a newer one may have been installed: keep the newest.
        let replaced = match &*latest {
            Some(newer) if newer.id > verified.id => None,
            _ => latest.replace(verified.clone()),
        };
        let newest = latest.as_ref().map(|file| file.id.clone()).unwrap_or_default();
        let mut freed = None;
        for name in disk.list(&self.path)? {
            if name.strip_suffix(".snap").is_some_and(|other| other < newest.as_str()) {
                let path = self.path.join(&name);
                // A peer may still read the one before; then its space is free when that has ended.
                if replaced.as_ref().is_some_and(|file| file.path == path && Arc::strong_count(&file.file) == 1) {
                    freed = disk.open(&path, OpenMode::ReadWrite).ok();
                }
                disk.remove_file(&path)?;
            }
        }
        drop(latest);
        if let Some(file) = freed {
            self.env.give_back(file);
        }
        Ok(verified)
    }

    fn file_path(&self, id: &str) -> PathBuf {
        self.path.join(format!("{id}.snap"))
    }
}

fn make_id(applied: LogId, crc: u32) -> String {
    format!("{:020}-{:020}-{crc:08x}", applied.term, applied.index)
}

/// The applied log id in a snapshot id; `None` if it is none of ours (an id from a peer becomes a file name).
fn parse_id(id: &str) -> Option<LogId> {
    let mut parts = id.split('-');
    let applied = LogId { term: parts.next()?.parse().ok()?, index: parts.next()?.parse().ok()? };
    let crc = u32::from_str_radix(parts.next()?, 16).ok()?;
    (id == make_id(applied, crc)).then_some(applied)
}
