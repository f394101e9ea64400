//! A real disk that fails when a test says so: what a running process can be made to suffer beside its death.
//!
//! `QUORATE_TEST_DISK_FAULT` names a file that is not there. Once a test puts it there (by renaming), its text happens once, and
//! the file goes: `sync` fails the log's next sync (the member must stop for that, and for no other file's), `torn SEED` has the
//! process die in the middle of its next write, of which only some sectors arrive. Absent: the loss of what was not synced, which
//! only the simulated disk has; the state store's files.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Disk, File, OpenMode, RealDisk};

/// The environment variable that names the file.
pub const VARIABLE: &str = "QUORATE_TEST_DISK_FAULT";

const SECTOR: usize = 512;

/// The machine's file system, with faults if the environment says where they come from.
pub(super) fn disk() -> Arc<dyn Disk> {
    match std::env::var_os(VARIABLE) {
        Some(path) => Arc::new(Faulty { faults: Arc::new(Faults { path: path.into(), taking: Mutex::default() }) }),
        None => Arc::new(RealDisk),
    }
}

struct Faults {
    path: PathBuf,
    /// Held while the file is looked at: a fault happens once.
    taking: Mutex<()>,
}

impl Faults {
    /// What follows `kind` in the file's text, if there is a fault of this kind; it is taken.
    fn take(&self, kind: &str) -> Option<String> {
        let _taking = self.taking.lock();
        let text = std::fs::read_to_string(&self.path).ok()?;
        let rest = text.strip_prefix(kind)?.trim().to_owned();
        std::fs::remove_file(&self.path).ok()?;
        Some(rest)
    }
}

struct Faulty {
    faults: Arc<Faults>,
}

struct FaultyFile {
    file: Box<dyn File>,
    faults: Arc<Faults>,
    is_log: bool,
}

impl Disk for Faulty {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir_all(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        Ok(Box::new(FaultyFile { file: RealDisk.open(path, mode)?, faults: self.faults.clone(), is_log }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(path)
    }

    fn exists(&self, path: &Path) -> bool {
        RealDisk.exists(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }

    fn make_private(&self, path: &Path) -> io::Result<()> {
        RealDisk.make_private(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send>> {
        RealDisk.lock(path)
    }
}

impl File for FaultyFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some(seed) = self.faults.take("torn") {
            self.tear(bytes, offset, seed.parse().unwrap_or(0));
        }
        self.file.write_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.fail_sync()?;
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.fail_sync()?;
        self.file.sync_all()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn links(&self) -> io::Result<u64> {
        self.file.links()
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.file.allocate(len)
    }
}

impl FaultyFile {
    fn fail_sync(&self) -> io::Result<()> {
        match self.is_log.then(|| self.faults.take("sync")).flatten() {
            Some(_) => Err(io::Error::other("a test has this sync fail")),
            None => Ok(()),
        }
    }

    /// Writes any of the sectors that `bytes` touch, and dies.
    fn tear(&self, bytes: &[u8], offset: u64, seed: u64) -> ! {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut at = 0;
        while at < bytes.len() {
            let left = SECTOR - (offset as usize + at) % SECTOR;
            let end = bytes.len().min(at + left);
            if rng.bool() {
                let _ = self.file.write_at(&bytes[at..end], offset + at as u64);
            }
            at = end;
        }
        eprintln!("a test has this write torn: aborting");
        std::process::abort()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happens_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fault");
        let disk = Faulty { faults: Arc::new(Faults { path: path.clone(), taking: Mutex::default() }) };
        std::fs::create_dir(dir.path().join("log")).unwrap();
        let other = disk.open(&dir.path().join("file"), OpenMode::CreateNew).unwrap();
        let file = disk.open(&dir.path().join("log/0000000001.log"), OpenMode::CreateNew).unwrap();
        file.sync_data().unwrap();
        std::fs::write(&path, "sync").unwrap();
        file.write_at(b"fine", 0).unwrap();
        other.sync_all().expect("no file but the log's fails");
        assert!(file.sync_all().is_err());
        file.sync_data().unwrap();
        assert!(!path.exists());
    }
}
