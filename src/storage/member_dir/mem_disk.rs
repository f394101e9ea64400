//! A disk in memory that forgets what was not synced, and dies at a chosen write.
//!
//! Invariant: after [`MemDisk::crash`] a file has the bytes of its last sync, and a directory the entries of its last
//! `sync_dir`; both are what POSIX promises and no more.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::env::{Disk, File, OpenMode};

#[derive(Default)]
struct Content {
    live: Vec<u8>,
    synced: Vec<u8>,
}

#[derive(Clone)]
enum Node {
    Dir,
    File(Arc<Mutex<Content>>),
}

type Tree = BTreeMap<PathBuf, Node>;

#[derive(Default)]
struct State {
    live: Tree,
    durable: Tree,
    changes: u64,
    dies_at: Option<u64>,
}

/// Cloning shares it.
#[derive(Clone, Default)]
pub(crate) struct MemDisk(Arc<Mutex<State>>);

impl MemDisk {
    /// Every change from the `change`th on fails, which is how a dead process looks to its disk.
    pub fn die_at(&self, change: u64) {
        let mut state = self.0.lock();
        state.changes = 0;
        state.dies_at = Some(change);
    }

    pub fn died(&self) -> bool {
        let state = self.0.lock();
        state.dies_at.is_some_and(|at| state.changes > at)
    }

    /// What a restart finds.
    pub fn crash(&self) {
        let mut state = self.0.lock();
        state.dies_at = None;
        let mut found = Tree::new();
        for (path, node) in &state.durable {
            let parent = path.parent().map(Path::to_owned).unwrap_or_default();
            if !is_root(&parent) && !found.contains_key(&parent) {
                continue;
            }
            if let Node::File(content) = node {
                let mut content = content.lock();
                content.live = content.synced.clone();
            }
            found.insert(path.clone(), node.clone());
        }
        state.durable = found.clone();
        state.live = found;
    }

    /// Changes the bytes of a file behind everyone's back.
    pub fn spoil(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let state = self.0.lock();
        let Some(Node::File(content)) = state.live.get(path) else { panic!("{path:?} is no file") };
        let mut content = content.lock();
        change(&mut content.live);
        content.synced = content.live.clone();
    }

    fn change(&self) -> io::Result<parking_lot::MutexGuard<'_, State>> {
        let mut state = self.0.lock();
        state.changes += 1;
        match state.dies_at {
            Some(at) if state.changes > at => Err(io::Error::other("the process is dead")),
            _ => Ok(state),
        }
    }
}

fn is_root(path: &Path) -> bool {
    path.as_os_str().is_empty() || path == Path::new("/")
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        for ancestor in path.ancestors().filter(|ancestor| !is_root(ancestor)) {
            state.live.entry(ancestor.to_owned()).or_insert(Node::Dir);
        }
        Ok(())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        let makes = matches!(mode, OpenMode::CreateNew | OpenMode::CreateTruncate);
        let mut state = if makes { self.change()? } else { self.0.lock() };
        if makes && !state.live.contains_key(path.parent().expect("a file has a parent")) {
            return Err(missing());
        }
        let content = match state.live.get(path) {
            Some(Node::Dir) => return Err(io::ErrorKind::IsADirectory.into()),
            Some(Node::File(_)) if mode == OpenMode::CreateNew => return Err(io::ErrorKind::AlreadyExists.into()),
            Some(Node::File(content)) => content.clone(),
            None if makes => Arc::default(),
            None => return Err(missing()),
        };
        if mode == OpenMode::CreateTruncate {
            content.lock().live.clear();
        }
        state.live.insert(path.to_owned(), Node::File(content.clone()));
        Ok(Box::new(MemFile { disk: self.clone(), content }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        let moved: Vec<_> = state.live.keys().filter(|path| path.starts_with(from)).cloned().collect();
        if moved.is_empty() {
            return Err(missing());
        }
        for path in moved {
            let node = state.live.remove(&path).expect("it was listed");
            let rest = path.strip_prefix(from).expect("it starts with it");
            // A directory's entries move with it, synced or not.
            let durable = state.durable.get(&path).cloned().filter(|_| path != from);
            let new = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            if let Some(durable) = durable {
                state.durable.insert(new.clone(), durable);
            }
            state.live.insert(new, node);
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change()?.live.remove(path).map(|_| ()).ok_or_else(missing)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.change()?.live.retain(|other, _| !other.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        let child = |other: &PathBuf| other.parent() == Some(path);
        let entries: Vec<_> =
            state.live.iter().filter(|(other, _)| child(other)).map(|(p, n)| (p.clone(), n.clone())).collect();
        let live = state.live.clone();
        state.durable.retain(|other, _| !child(other) || live.contains_key(other));
        state.durable.extend(entries);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.0.lock();
        let children = state.live.keys().filter(|other| other.parent() == Some(path));
        Ok(children.map(|child| child.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect())
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.lock().live.contains_key(path)
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(1 << 30)
    }
}

struct MemFile {
    disk: MemDisk,
    content: Arc<Mutex<Content>>,
}

impl File for MemFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.content.lock();
        let rest = content.live.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(into.len());
        into[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let _state = self.disk.change()?;
        let mut content = self.content.lock();
        let end = offset as usize + bytes.len();
        if content.live.len() < end {
            content.live.resize(end, 0);
        }
        content.live[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let _state = self.disk.change()?;
        let mut content = self.content.lock();
        content.synced = content.live.clone();
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().live.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _state = self.disk.change()?;
        self.content.lock().live.resize(len as usize, 0);
        Ok(())
    }

    fn allocate(&self, _len: u64) -> io::Result<()> {
        Ok(())
    }
}
