//! Records in memory, with a durable and a volatile part: the state store's twin for tests and simulation.
//!
//! A [`Memory`] is the disk; it outlives the stores on it. [`Memory::crash`] loses writes that were not checkpointed, from
//! the last one on, and makes the store that stood on it useless, as a killed process is.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Each, Error, Key, Options, Records, Store};

/// The life of a store that was closed.
const CLOSED: u64 = u64::MAX;

/// A disk for one state store.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// What survives a crash.
    durable: BTreeMap<Key, Vec<u8>>,
    /// What a read sees.
    visible: BTreeMap<Key, Vec<u8>>,
    /// Writes since the last checkpoint.
    volatile: VecDeque<Write>,
    /// Counts crashes; a store of another life can do nothing.
    life: u64,
    fail: Option<io::ErrorKind>,
    set_aside: u64,
}

struct Write {
    put: Option<(Key, Vec<u8>)>,
    remove: Vec<Key>,
}

impl Write {
    fn apply(&self, records: &mut BTreeMap<Key, Vec<u8>>) {
        for key in &self.remove {
            records.remove(key);
        }
        if let Some((key, record)) = &self.put {
            records.insert(*key, record.clone());
        }
    }
}

impl Memory {
    /// Opens the store on this disk; at most one at a time is of use.
    pub fn open(&self, options: &Options) -> Store {
        let life = self.0.lock().life;
        Store::on(Box::new(Handle { memory: self.clone(), life }), options)
    }

    /// Writes that a crash could lose.
    pub fn volatile_writes(&self) -> usize {
        self.0.lock().volatile.len()
    }

    /// Loses everything since the last checkpoint but the first `kept` writes.
    pub fn crash(&self, kept: usize) {
        let mut inner = self.0.lock();
        let inner = &mut *inner;
        for write in inner.volatile.drain(..).take(kept) {
            write.apply(&mut inner.durable);
        }
        inner.visible = inner.durable.clone();
        inner.fail = None;
        inner.life += 1;
    }

    /// Makes every call fail until the next crash, as a bad disk does.
    pub fn fail(&self, kind: io::ErrorKind) {
        self.0.lock().fail = Some(kind);
    }

    /// How many records there are.
    pub fn records(&self) -> usize {
        self.0.lock().visible.len()
    }

    /// Flips bits of one byte of the `nth` record, on disk and as read.
    pub fn flip(&self, nth: usize, byte: usize) {
        let mut inner = self.0.lock();
        let inner = &mut *inner;
        let key = *inner.visible.keys().nth(nth).expect("there is such a record");
        for records in [&mut inner.durable, &mut inner.visible] {
            if let Some(record) = records.get_mut(&key) {
                let at = byte % record.len();
                record[at] ^= 0x55;
            }
        }
    }

    /// Loses the `nth` record.
    pub fn lose(&self, nth: usize) {
        let mut inner = self.0.lock();
        let key = *inner.visible.keys().nth(nth).expect("there is such a record");
        inner.durable.remove(&key);
        inner.visible.remove(&key);
    }

    /// How often damage was set aside.
    pub fn times_set_aside(&self) -> u64 {
        self.0.lock().set_aside
    }
}

/// The disks of one machine's state stores, by directory. Cloning shares them.
#[derive(Clone, Default)]
pub struct Memories(Arc<Mutex<BTreeMap<PathBuf, Memory>>>);

impl Memories {
    /// The disk of the store in `dir`.
    pub fn at(&self, dir: &Path) -> Memory {
        self.0.lock().entry(dir.to_owned()).or_default().clone()
    }

    /// [`Memory::crash`] for all of them; `kept` says how many of so many unsaved writes survive.
    pub fn crash(&self, mut kept: impl FnMut(usize) -> usize) {
        for memory in self.0.lock().values() {
            memory.crash(kept(memory.volatile_writes()));
        }
    }
}

impl std::fmt::Debug for Memories {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memories").finish_non_exhaustive()
    }
}

struct Handle {
    memory: Memory,
    life: u64,
}

impl Handle {
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> Result<T, Error> {
        let mut inner = self.memory.0.lock();
        if inner.life != self.life {
            return Err(io::Error::other("this store is closed, or its process has crashed").into());
        }
        match inner.fail {
            Some(kind) => Err(io::Error::from(kind).into()),
            None => Ok(work(&mut inner)),
        }
    }
}

impl Records for Handle {
    fn scan(&self, from: Key, each: Each<'_>) -> Result<(), Error> {
        let records: Vec<_> = self.with(|inner| inner.visible.range(from..).map(|(k, v)| (*k, v.clone())).collect())?;
        for (key, record) in records {
            if !each(key, &record)? {
                break;
            }
        }
        Ok(())
    }

    fn before(&self, end: Key) -> Result<Option<(Key, Vec<u8>)>, Error> {
        self.with(|inner| inner.visible.range(..end).next_back().map(|(k, v)| (*k, v.clone())))
    }

    fn append(&mut self, records: Vec<(Key, Vec<u8>)>) -> Result<(), Error> {
        records.iter().try_for_each(|(key, _)| self.write(Some((*key, Vec::new())), &[]))?;
        records.into_iter().try_for_each(|record| self.write(Some(record), &[]))
    }

    fn write(&mut self, put: Option<(Key, Vec<u8>)>, remove: &[Key]) -> Result<(), Error> {
        let write = Write { put, remove: remove.to_vec() };
        self.with(|inner| {
            write.apply(&mut inner.visible);
            inner.volatile.push_back(write);
        })
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        self.with(|inner| {
            inner.volatile.clear();
            inner.durable = inner.visible.clone();
        })
    }

    fn replace(&mut self, records: &mut dyn Iterator<Item = Result<(Key, Vec<u8>), Error>>) -> Result<(), Error> {
        let fresh = records.collect::<Result<BTreeMap<_, _>, _>>()?;
        self.with(|inner| {
            inner.volatile.clear();
            inner.visible = fresh;
            inner.durable = inner.visible.clone();
        })
    }

    fn set_aside(&mut self) -> Result<(), Error> {
        self.with(|inner| {
            inner.volatile.clear();
            inner.visible.clear();
            inner.durable.clear();
            inner.set_aside += 1;
        })
    }

    fn close(&mut self) {
        self.life = CLOSED;
    }

    fn disk_bytes(&self) -> u64 {
        self.with(|inner| inner.visible.values().map(|record| record.len() as u64).sum()).unwrap_or(0)
    }
}
