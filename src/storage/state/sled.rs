//! Records in sled: the one file that names it.
//!
//! ```text
//! <dir>/current     names the store in use (checksummed, renamed: the one switch)
//! <dir>/store-<n>   sled's files
//! <dir>/damaged-<n> stores that were set aside, the newest two
//! ```
//! What sled 0.34 does not do, and what is done here for it: its `flush` writes without a barrier, so a checkpoint also
//! fsyncs its `db` file; it does not fsync `conf` or its directory, so both are when a store is made; it panics on damage
//! and on some I/O errors, so every call is guarded; pages over a quarter segment go to files in `blobs/` that it never
//! fsyncs, so segments are 8 MiB, records small, and `blobs/` is looked at in every checkpoint.
//! Between checkpoints sled reuses segments of checkpointed data without a barrier, so power loss can damage what was
//! durable. Such damage shows, in sled's checksums or in the chain of records; the snapshot file and the log then rebuild
//! the state, which is why the log is purged behind the snapshot file and never behind this store.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Each, Error, GROUP_BYTES, Key, Options, Records};
use crate::env::threads::giving_way;
use crate::env::{Env, File, OpenMode};

const SEGMENT_BYTES: usize = 8 << 20;
const DAMAGED_KEPT: usize = 2;
/// sled lets go of its file lock in a background thread, after its handle is dropped.
const LOCK_TRIES: u32 = 100;
const LOCK_WAIT: Duration = Duration::from_millis(20);
/// sled looks at a shard of its cache only when 64 accesses have come to it, and there are 256 shards: pages of our size,
/// each seen a few times, would all stay in memory. So each record read or written is looked up this often besides, which
/// makes sled evict after about one page a shard (loading 400 MB: 15 MB resident instead of 375, and no slower).
const TOUCHES: usize = 8;

/// The records of one store.
pub(super) struct Sled {
    env: Env,
    dir: PathBuf,
    cache_bytes: u64,
    /// The `n` of the store in use.
    number: u64,
    /// `None` only when it is closed, or a replacement of it failed.
    open: Option<OpenStore>,
}

struct OpenStore {
    db: ::sled::Db,
    /// Open from the start, so that fsync reports every write-back error since.
    file: Box<dyn File>,
    blobs: PathBuf,
}

/// Opens what `current` names, or makes an empty store; says why one was set aside.
pub(super) fn open(env: &Env, dir: &Path, options: &Options) -> Result<(Sled, Option<String>), Error> {
    env.disk.create_dir_all(dir)?;
    let mut sled =
        Sled { env: env.clone(), dir: dir.to_owned(), cache_bytes: options.cache_bytes, number: 0, open: None };
    let current = sled.read_current()?;
    let mut damaged = current.as_ref().err().cloned();
    // With no readable pointer, the newest store is what people would want to look at.
    sled.number = match current {
        Ok(number) => number.unwrap_or(0),
        Err(_) => sled.numbers("store-")?.last().copied().unwrap_or(0),
    };
    sled.remove_leftovers()?;
    if damaged.is_none() && sled.number > 0 {
        match sled.open_store(sled.number, false) {
            Ok(open) => sled.open = Some(open),
            Err(Error::Damaged(reason)) => damaged = Some(reason),
            Err(error) => return Err(error),
        }
    }
    if let Some(reason) = &damaged {
        tracing::error!(reason, dir = %dir.display(), "state store is damaged and set aside");
    }
    if sled.open.is_none() {
        sled.set_aside()?;
    }
    Ok((sled, damaged))
}

impl Sled {
    fn store(&self, number: u64) -> PathBuf {
        self.dir.join(format!("store-{number}"))
    }

    /// The number in `current`; `Ok(Err(why))` if it is damaged.
    fn read_current(&self) -> io::Result<Result<Option<u64>, String>> {
        let bytes = match self.env.disk.read(&self.dir.join("current")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Ok(None)),
            read => read?,
        };
        let number = String::from_utf8(bytes).ok().and_then(|text| {
            let number = text.strip_prefix("store-")?.split(' ').next()?.parse().ok()?;
            (text == current_text(number)).then_some(number)
        });
        Ok(number.map(Some).ok_or_else(|| "the file that names the store in use is damaged".to_owned()))
    }

    fn write_current(&mut self, number: u64) -> io::Result<()> {
        self.env.disk.write_atomic(&self.dir.join("current"), current_text(number).as_bytes())?;
        self.number = number;
        Ok(())
    }

    /// The numbers of the directories with this prefix, ascending.
    fn numbers(&self, prefix: &str) -> io::Result<Vec<u64>> {
        let names = self.env.disk.list(&self.dir)?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Stores that were never switched to, or were switched away from.
    fn remove_leftovers(&self) -> io::Result<()> {
        for number in self.numbers("store-")?.into_iter().filter(|number| *number != self.number) {
            let (disk, path) = (&self.env.disk, self.store(number));
            let db = path.join("db");
            let large = disk.open(&db, OpenMode::ReadWrite).ok();
            disk.remove_dir_all(&path)?;
            if let Some(file) = large {
                self.env.give_back(file);
            }
        }
        Ok(())
    }

    fn open_store(&self, number: u64, create: bool) -> Result<OpenStore, Error> {
        let disk = &self.env.disk;
        let path = self.store(number);
        if create && disk.exists(&path) {
            disk.remove_dir_all(&path)?;
        }
        if !create && !disk.exists(&path.join("db")) {
            return Err(Error::Damaged(format!("store-{number} is in use, but its files are gone")));
        }
        let config = ::sled::Config::new()
            .path(&path)
            .segment_size(SEGMENT_BYTES)
            .cache_capacity(self.cache_bytes)
            .flush_every_ms(None)
            .create_new(create);
        let mut tries = 0;
        let db = loop {
            // Its threads copy megabytes, seven at a time, and the priority of who opens it is theirs.
            match guarded("open", || giving_way(|| config.open())) {
                Err(Error::Io(e)) if tries < LOCK_TRIES && e.to_string().contains("could not acquire lock") => {
                    tries += 1;
                    self.env.block_for(LOCK_WAIT);
                }
                opened => break opened?,
            }
        };
        disk.open(&path.join("conf"), OpenMode::ReadWrite)?.sync_all()?;
        disk.sync_dir(&path)?;
        disk.sync_dir(&self.dir)?;
        let file = disk.open(&path.join("db"), OpenMode::ReadWrite)?;
        Ok(OpenStore { db, file, blobs: path.join("blobs") })
    }

    fn open_one(&self) -> Result<&OpenStore, Error> {
        self.open.as_ref().ok_or_else(|| io::Error::other("the state store is closed").into())
    }
}

impl Drop for Sled {
    fn drop(&mut self) {
        self.close();
    }
}

fn current_text(number: u64) -> String {
    let name = format!("store-{number}");
    let crc = crc32c::crc32c(name.as_bytes());
    format!("{name} {crc:08x}\n")
}

impl OpenStore {
    fn checkpoint(&self, env: &Env) -> Result<(), Error> {
        guarded("flush", || self.db.flush())?;
        self.file.sync_all()?;
        if !env.disk.list(&self.blobs)?.is_empty() {
            return Err(Error::Damaged("a page went to blobs/, which is not durable".to_owned()));
        }
        Ok(())
    }

    /// sled splits a leaf of 17 records in two and writes both halves anew, so that each record of an ascending chain would be written
    /// three times. So the keys come first, with nothing: leaves split while they weigh nothing, and have their final number of records
    /// when these come. (By then a leaf's chain is short enough not to be written as a whole.)
    fn append(&self, records: Vec<(Key, Vec<u8>)>) -> Result<(), Error> {
        guarded("insert", || records.iter().try_for_each(|(key, _)| self.db.insert(key.to_bytes(), &[]).map(drop)))?;
        records.into_iter().try_for_each(|(key, record)| self.put(key, record))
    }

    fn put(&self, key: Key, record: Vec<u8>) -> Result<(), Error> {
        guarded("insert", || self.db.insert(key.to_bytes(), record))?;
        self.touch(key)
    }

    /// Makes sled keep to its cache's bound; see [`TOUCHES`].
    fn touch(&self, key: Key) -> Result<(), Error> {
        guarded("touch", || (0..TOUCHES).try_for_each(|_| self.db.contains_key(key.to_bytes()).map(drop)))
    }
}

impl Records for Sled {
    fn scan(&self, from: Key, each: Each<'_>) -> Result<(), Error> {
        let store = self.open_one()?;
        let mut iter = guarded("scan", || Ok(store.db.range(from.to_bytes()..)))?;
        // Only sled's own work is guarded: a panic in `each` is not its damage.
        while let Some((key, record)) = guarded("scan", || iter.next().transpose())? {
            let key = key_of(&key)?;
            if !each(key, &record)? {
                break;
            }
            store.touch(key)?;
        }
        Ok(())
    }

    fn before(&self, end: Key) -> Result<Option<(Key, Vec<u8>)>, Error> {
        let store = self.open_one()?;
        let found = guarded("read back", || store.db.range(..end.to_bytes()).next_back().transpose())?;
        found.map(|(key, record)| Ok((key_of(&key)?, record.to_vec()))).transpose()
    }

    fn append(&mut self, records: Vec<(Key, Vec<u8>)>) -> Result<(), Error> {
        self.open_one()?.append(records)
    }

    fn write(&mut self, put: Option<(Key, Vec<u8>)>, remove: &[Key]) -> Result<(), Error> {
        let store = self.open_one()?;
        if let (Some(_), []) = (&put, remove) {
            return put.map_or(Ok(()), |(key, record)| store.put(key, record));
        }
        let mut batch = ::sled::Batch::default();
        for key in remove {
            batch.remove(&key.to_bytes());
        }
        if let Some((key, record)) = put {
            batch.insert(&key.to_bytes(), record);
        }
        guarded("batch", || store.db.apply_batch(batch))
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        self.open_one()?.checkpoint(&self.env)
    }

    fn replace(&mut self, records: &mut dyn Iterator<Item = Result<(Key, Vec<u8>), Error>>) -> Result<(), Error> {
        let number = self.number + 1;
        let written = self.open_store(number, true).and_then(|fresh| {
            let (mut group, mut group_bytes) = (Vec::new(), 0);
            for record in records {
                let record = record?;
                group_bytes += record.1.len();
                group.push(record);
                if group_bytes >= GROUP_BYTES {
                    fresh.append(std::mem::take(&mut group))?;
                    // The log's flushes wait behind what is flushed here, so that is never much at a time.
                    fresh.checkpoint(&self.env)?;
                    group_bytes = 0;
                }
            }
            fresh.append(group)?;
            fresh.checkpoint(&self.env)?;
            Ok(fresh)
        });
        let fresh = match written {
            Ok(fresh) => fresh,
            Err(error) => {
                // What cannot be removed now is removed when the store is opened.
                let _ = self.env.disk.remove_dir_all(&self.store(number));
                return Err(error);
            }
        };
        // Were this to fail, either store may be the current one: neither is written to until the next opening.
        self.close();
        self.write_current(number)?;
        self.open = Some(fresh);
        self.remove_leftovers()?;
        Ok(())
    }

    fn set_aside(&mut self) -> Result<(), Error> {
        self.close();
        let disk = self.env.disk.clone();
        let old = self.store(self.number);
        if disk.exists(&old) {
            disk.rename(&old, &self.dir.join(format!("damaged-{}", self.number)))?;
            let damaged = self.numbers("damaged-")?;
            for number in damaged.iter().rev().skip(DAMAGED_KEPT) {
                disk.remove_dir_all(&self.dir.join(format!("damaged-{number}")))?;
            }
        }
        // Past every number in use, so that nothing is ever renamed onto an older one.
        let last = self.numbers("damaged-")?.last().copied().unwrap_or(0).max(self.number);
        let fresh = self.open_store(last + 1, true)?;
        fresh.checkpoint(&self.env)?;
        self.write_current(last + 1)?;
        self.open = Some(fresh);
        Ok(())
    }

    /// sled flushes when it is dropped, and panics if it cannot.
    fn close(&mut self) {
        let open = self.open.take();
        if catch_unwind(AssertUnwindSafe(|| drop(open))).is_err() {
            tracing::warn!("sled panicked while it closed");
        }
    }

    fn disk_bytes(&self) -> u64 {
        self.open_one().and_then(|store| guarded("size", || store.db.size_on_disk())).unwrap_or(0)
    }
}

fn key_of(bytes: &[u8]) -> Result<Key, Error> {
    Key::from_bytes(bytes).ok_or_else(|| Error::Damaged("a record has no key of ours".to_owned()))
}

/// Runs a call into sled; a panic in there is damage, and so is every error that is not the disk's.
fn guarded<T>(what: &str, call: impl FnOnce() -> ::sled::Result<T>) -> Result<T, Error> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(::sled::Error::Io(e)))
            if !matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
        {
            Err(e.into())
        }
        Ok(Err(e)) => Err(Error::Damaged(format!("sled, {what}: {e}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(Error::Damaged(format!("sled, {what}: panicked: {}", text.unwrap_or("no message"))))
        }
    }
}
