//! Files and directories, as much of them as storage needs.
//!
//! What is made here is for its owner alone: files 0600, directories 0700. Crates that make files of their own are held to it by the
//! process's umask ([`super::process::keep_files_private`]).
//! Absent: buffering and retries. An error is the caller's to act on; on the log it stops the member.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

const PRIVATE_FILE: u32 = 0o600;
const PRIVATE_DIRECTORY: u32 = 0o700;
/// What a mode says of others than the owner.
const OTHERS: u32 = 0o077;

/// How [`Disk::open`] opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    Read,
    ReadWrite,
    /// Makes the file; fails if it exists.
    CreateNew,
    /// Makes the file, or empties it.
    CreateTruncate,
}

/// A directory tree.
pub trait Disk: Send + Sync + 'static {
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in `path` durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Names in the directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    fn exists(&self, path: &Path) -> bool;
    /// Bytes that the file system has left for us.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;

    /// What the next flush of the log takes beside the call itself: nothing on a real disk, whose calls block.
    fn flush_latency(&self) -> Duration {
        Duration::ZERO
    }

    /// Takes away what others may do with a directory, if it is this user's; else nothing is changed. A simulated disk has one user.
    fn make_private(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Makes `path` and holds it, and its directory, for this process alone until the guard is dropped; `WouldBlock` if another
    /// process does. A simulated disk has one user, so that the file alone will do.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send>> {
        self.open(path, OpenMode::CreateTruncate)?;
        Ok(Box::new(()))
    }

    /// Replaces `path` with `bytes`, durably and atomically: a reader sees the old or the new content.
    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        let file = self.open(&temporary, OpenMode::CreateTruncate)?;
        file.write_at(bytes, 0)?;
        file.sync_all()?;
        drop(file);
        self.rename(&temporary, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }

    /// The whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, OpenMode::Read)?;
        let mut bytes = vec![0; file.len()? as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// An open file; every call names its offset in bytes.
pub trait File: Send + Sync {
    /// Bytes read; 0 at the end of the file.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// fdatasync: data, and the size if it changed.
    fn sync_data(&self) -> io::Result<()>;
    fn sync_all(&self) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Names that the file has; 0 once it is removed. One that is not on a disk has none.
    fn links(&self) -> io::Result<u64> {
        Ok(0)
    }
    /// Takes `len` bytes of disk now; fails with `StorageFull` if they are not there.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Fills `into`, or fails with `UnexpectedEof`.
    fn read_exact_at(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            let read = self.read_at(into, offset)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into = &mut into[read..];
            offset += read as u64;
        }
        Ok(())
    }
}

/// The machine's file system.
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(PRIVATE_DIRECTORY).create(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).mode(PRIVATE_FILE);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::ReadWrite => options.write(true),
            OpenMode::CreateNew => options.write(true).create_new(true),
            OpenMode::CreateTruncate => options.write(true).create(true).truncate(true),
        };
        Ok(Box::new(options.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::File::open(path)?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = std::fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    fn make_private(&self, path: &Path) -> io::Result<()> {
        let metadata = std::fs::metadata(path)?;
        let is_own = metadata.uid() == rustix::process::geteuid().as_raw();
        if is_own && metadata.is_dir() && metadata.mode() & OTHERS != 0 {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(PRIVATE_DIRECTORY))?;
        }
        Ok(())
    }

    /// The directory is held as well as the file: the file can be removed, and another process then makes a new one.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send>> {
        let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        let directory = std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?;
        match rustix::fs::flock(&directory, exclusive) {
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => return Err(error.into()),
            // Some file systems lock no directory; then the file alone has to do.
            Ok(()) | Err(_) => {}
        }
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(PRIVATE_FILE).open(path)?;
        rustix::fs::flock(&file, exclusive)?;
        Ok(Box::new((directory, file)))
    }
}

impl File for std::fs::File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        std::fs::File::sync_data(self)
    }

    fn sync_all(&self) -> io::Result<()> {
        std::fs::File::sync_all(self)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        std::fs::File::set_len(self, len)
    }

    fn links(&self) -> io::Result<u64> {
        Ok(self.metadata()?.nlink())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self, rustix::fs::FallocateFlags::empty(), 0, len)?)
    }
}
