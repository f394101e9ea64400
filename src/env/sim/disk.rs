//! A disk in memory that loses what was not synced.
//!
//! After [`SimDisk::crash`], of each file's unsynced writes any set of 512-byte sectors survives, and of the unsynced creations,
//! renames and removals any set: by the seed all, none, the first few, or each by chance. A write or sync may be made to
//! fail; what a failed sync covered is never written later, as on Linux.
//! A slow disk takes its time for each flush of the log. Absent: directories are durable once made; latency of anything else.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::trace;
use crate::env::disk::{Disk, File, OpenMode};

const SECTOR: usize = 512;

/// A simulated disk; cloning shares it.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<World>>);

struct World {
    rng: fastrand::Rng,
    /// Files by number: one may have lost its name and be open still.
    files: BTreeMap<u64, Node>,
    names: BTreeMap<PathBuf, u64>,
    dirs: BTreeSet<PathBuf>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Since the last `sync_dir` of the parent.
    unsynced: Vec<Rename>,
    next_file: u64,
    capacity_bytes: u64,
    /// Changes until the power fails.
    power: Option<u64>,
    on_power_loss: Option<Box<dyn FnOnce() + Send>>,
    writes_until_failure: Option<u64>,
    syncs_until_failure: Option<u64>,
    latency_max: Duration,
}

/// What a directory does: `from` loses its name, `to` gets the file.
#[derive(Clone)]
struct Rename {
    from: Option<PathBuf>,
    to: Option<PathBuf>,
    /// `None`: a directory moves, with all that is in it.
    file: Option<u64>,
}

#[derive(Clone, Default)]
struct Node {
    /// What a reader sees.
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// Writes that were not synced, in order.
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
}

/// Which of the unsynced changes a crash leaves.
#[derive(Clone, Copy)]
enum Loss {
    All,
    Nothing,
    /// Everything after so many.
    After(usize),
    /// Each with even odds.
    Some,
}

impl Loss {
    fn choose(rng: &mut fastrand::Rng, changes: usize) -> Self {
        match rng.u8(..4) {
            0 => Self::All,
            1 => Self::Nothing,
            2 => Self::After(rng.usize(..=changes)),
            _ => Self::Some,
        }
    }

    fn survives(self, rng: &mut fastrand::Rng, at: usize) -> bool {
        match self {
            Self::All => false,
            Self::Nothing => true,
            Self::After(kept) => at < kept,
            Self::Some => rng.bool(),
        }
    }
}

impl SimDisk {
    /// An empty disk without end.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(World {
            rng: fastrand::Rng::with_seed(seed),
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            dirs: BTreeSet::new(),
            durable_names: BTreeMap::new(),
            unsynced: Vec::new(),
            next_file: 0,
            capacity_bytes: u64::MAX,
            power: None,
            on_power_loss: None,
            writes_until_failure: None,
            syncs_until_failure: None,
            latency_max: Duration::ZERO,
        })))
    }

    /// Bytes that all files together may take.
    pub fn set_capacity(&self, bytes: u64) {
        self.0.lock().capacity_bytes = bytes;
    }

    /// Bytes that files take now.
    pub fn used_bytes(&self) -> u64 {
        self.0.lock().used_bytes()
    }

    /// From now on a flush of the log takes up to `most`.
    pub fn set_latency(&self, most: Duration) {
        self.0.lock().latency_max = most;
    }

    /// Every file with its content.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let world = self.0.lock();
        world.names.iter().map(|(path, file)| (path.clone(), world.files[file].seen.clone())).collect()
    }

    /// Makes the `nth` write from now fail, counted from 1.
    pub fn fail_write(&self, nth: u64) {
        self.0.lock().writes_until_failure = Some(nth);
    }

    /// Makes the `nth` sync of a file from now fail, counted from 1.
    pub fn fail_sync(&self, nth: u64) {
        self.0.lock().syncs_until_failure = Some(nth);
    }

    /// Lets `changes` more writes, syncs and directory changes happen; then everything fails until [`SimDisk::crash`].
    pub fn lose_power_after(&self, changes: u64) {
        self.0.lock().power = Some(changes);
    }

    /// As [`SimDisk::lose_power_after`]; `told` is called the moment the last change has happened. It must not use the disk.
    pub fn lose_power_after_and(&self, changes: u64, told: impl FnOnce() + Send + 'static) {
        assert!(changes > 0, "nobody is told of a power loss before the first change");
        let mut world = self.0.lock();
        world.power = Some(changes);
        world.on_power_loss = Some(Box::new(told));
    }

    /// Changes a byte of a file, on the disk and as seen.
    pub fn flip(&self, path: &Path, offset: usize, mask: u8) {
        let mut world = self.0.lock();
        let file = world.names[path];
        let node = world.files.get_mut(&file).expect("a name has a file");
        node.seen[offset] ^= mask;
        if let Some(byte) = node.durable.get_mut(offset) {
            *byte ^= mask;
        }
    }

    /// The disk after a power loss. This one fails from now on.
    pub fn crash(&self) -> Self {
        self.0.lock().power = Some(0);
        self.image()
    }

    /// The disk as a volume snapshot taken now would have it: as after a power loss. This one goes on.
    pub fn image(&self) -> Self {
        let mut world = self.0.lock();
        let mut rng = world.rng.fork();
        let mut names = world.durable_names.clone();
        let loss = Loss::choose(&mut rng, world.unsynced.len());
        for (at, rename) in world.unsynced.iter().enumerate() {
            if loss.survives(&mut rng, at) {
                rename.apply(&mut names);
            }
        }
        let kept: BTreeSet<u64> = names.values().copied().collect();
        let mut dirs = world.dirs.clone();
        dirs.extend(names.keys().flat_map(|name| name.ancestors().skip(1)).map(Path::to_owned));
        let files = world.files.iter().filter(|(file, _)| kept.contains(file));
        let files = files.map(|(&file, node)| (file, node.after_crash(&mut rng))).collect();
        Self(Arc::new(Mutex::new(World {
            files,
            durable_names: names.clone(),
            names,
            dirs,
            unsynced: Vec::new(),
            next_file: world.next_file,
            capacity_bytes: world.capacity_bytes,
            power: None,
            on_power_loss: None,
            writes_until_failure: None,
            syncs_until_failure: None,
            latency_max: Duration::ZERO,
            rng,
        })))
    }

    fn node(&self, path: &Path, mode: OpenMode) -> io::Result<u64> {
        let mut world = self.0.lock();
        match (mode, world.names.get(path).copied()) {
            (OpenMode::CreateNew, Some(_)) => Err(io::ErrorKind::AlreadyExists.into()),
            (OpenMode::CreateTruncate, Some(file)) => {
                world.set_len(file, 0)?;
                Ok(file)
            }
            (_, Some(file)) => world.powered().map(|()| file),
            (OpenMode::Read | OpenMode::ReadWrite, None) => Err(io::ErrorKind::NotFound.into()),
            (OpenMode::CreateNew | OpenMode::CreateTruncate, None) => {
                if !path.parent().is_some_and(|dir| world.dirs.contains(dir)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let file = world.next_file;
                world.next_file += 1;
                world.files.insert(file, Node::default());
                world.rename(Rename { from: None, to: Some(path.to_owned()), file: Some(file) })?;
                Ok(file)
            }
        }
    }
}

impl Rename {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        let Some(file) = self.file else {
            let (Some(from), Some(to)) = (&self.from, &self.to) else { unreachable!("a directory moves") };
            let all = std::mem::take(names).into_iter();
            names.extend(all.map(|(name, file)| (moved(&name, from, to).unwrap_or(name), file)));
            return;
        };
        if let Some(from) = &self.from
            && names.get(from) == Some(&file)
        {
            names.remove(from);
        }
        if let Some(to) = &self.to {
            names.insert(to.clone(), file);
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        self.from.iter().chain(&self.to).any(|path| path.parent() == Some(dir))
    }
}

/// Where a path is when the directory `from` has become `to`; `None` if it was not in it.
fn moved(path: &Path, from: &Path, to: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(from).ok()?;
    // `join` with nothing adds a slash.
    Some(if inside.as_os_str().is_empty() { to.to_owned() } else { to.join(inside) })
}

impl World {
    fn used_bytes(&self) -> u64 {
        self.names.values().map(|file| self.files[file].seen.len() as u64).sum()
    }

    fn powered(&self) -> io::Result<()> {
        if self.power == Some(0) { Err(io::Error::other("the power has failed")) } else { Ok(()) }
    }

    /// Counts a change against the power that is left.
    fn change(&mut self) -> io::Result<()> {
        self.powered()?;
        self.power = self.power.map(|left| left - 1);
        if self.power == Some(0)
            && let Some(told) = self.on_power_loss.take()
        {
            told();
        }
        Ok(())
    }

    fn rename(&mut self, rename: Rename) -> io::Result<()> {
        self.change()?;
        trace::event(format_args!("rename {:?} {:?} {:?}", rename.from, rename.to, rename.file));
        rename.apply(&mut self.names);
        self.unsynced.push(rename);
        Ok(())
    }

    /// Makes the changes of names durable that `chosen` are.
    fn sync_names(&mut self, chosen: impl Fn(&Rename) -> bool) {
        let (synced, rest): (Vec<Rename>, _) = std::mem::take(&mut self.unsynced).into_iter().partition(chosen);
        self.unsynced = rest;
        for rename in synced {
            rename.apply(&mut self.durable_names);
        }
    }

    /// Simpler than disks are: the names inside are durable before the directory moves.
    fn rename_dir(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.powered()?;
        self.sync_names(|rename| rename.from.iter().chain(&rename.to).any(|path| path.starts_with(from)));
        self.rename(Rename { from: Some(from.to_owned()), to: Some(to.to_owned()), file: None })?;
        let all = std::mem::take(&mut self.dirs).into_iter();
        self.dirs = all.map(|dir| moved(&dir, from, to).unwrap_or(dir)).collect();
        Ok(())
    }

    fn file(&mut self, file: u64) -> &mut Node {
        self.files.get_mut(&file).expect("an open file exists")
    }

    /// Checks that a file may grow to `len`.
    fn take_space(&mut self, file: u64, len: u64) -> io::Result<()> {
        let growth = len.saturating_sub(self.file(file).seen.len() as u64);
        if growth > 0 && self.used_bytes() + growth > self.capacity_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn set_len(&mut self, file: u64, len: u64) -> io::Result<()> {
        self.change()?;
        self.take_space(file, len)?;
        let node = self.file(file);
        node.seen.resize(len as usize, 0);
        node.unsynced.push(Change::Len(len as usize));
        Ok(())
    }

    fn write(&mut self, file: u64, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change()?;
        trace::event(format_args!("write {file} {offset} {}", bytes.len()));
        if fails(&mut self.writes_until_failure) {
            return Err(io::Error::other("injected write error"));
        }
        self.take_space(file, offset + bytes.len() as u64)?;
        let node = self.file(file);
        let change = Change::Write(offset as usize, bytes.to_vec());
        change.apply(&mut node.seen, |_| true);
        node.unsynced.push(change);
        Ok(())
    }

    fn sync(&mut self, file: u64) -> io::Result<()> {
        self.change()?;
        trace::event(format_args!("sync {file}"));
        let failed = fails(&mut self.syncs_until_failure);
        let node = self.file(file);
        let unsynced = std::mem::take(&mut node.unsynced);
        if failed {
            return Err(io::Error::other("injected sync error"));
        }
        for change in unsynced {
            change.apply(&mut node.durable, |_| true);
        }
        Ok(())
    }
}

/// Counts down to an injected failure.
fn fails(until: &mut Option<u64>) -> bool {
    *until = until.map(|left| left.saturating_sub(1));
    if *until == Some(0) {
        *until = None;
        return true;
    }
    false
}

impl Change {
    /// Applies the sectors of the change that `survives` takes.
    fn apply(&self, bytes: &mut Vec<u8>, mut survives: impl FnMut(usize) -> bool) {
        match self {
            Self::Len(len) => {
                if survives(0) {
                    bytes.resize(*len, 0);
                }
            }
            Self::Write(offset, written) => {
                let end = offset + written.len();
                let mut at = *offset;
                let mut sector = 0;
                while at < end {
                    let next = ((at / SECTOR + 1) * SECTOR).min(end);
                    if survives(sector) {
                        bytes.resize(bytes.len().max(next), 0);
                        bytes[at..next].copy_from_slice(&written[at - offset..next - offset]);
                    }
                    (at, sector) = (next, sector + 1);
                }
            }
        }
    }

    fn sectors(&self) -> usize {
        match self {
            Self::Len(_) => 1,
            Self::Write(_, written) => written.len() / SECTOR + 2,
        }
    }
}

impl Node {
    fn after_crash(&self, rng: &mut fastrand::Rng) -> Self {
        let mut durable = self.durable.clone();
        let loss = Loss::choose(rng, self.unsynced.iter().map(Change::sectors).sum());
        let mut before = 0;
        for change in &self.unsynced {
            change.apply(&mut durable, |sector| loss.survives(rng, before + sector));
            before += change.sectors();
        }
        Self { seen: durable.clone(), durable, unsynced: Vec::new() }
    }
}

impl Disk for SimDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut world = self.0.lock();
        world.change()?;
        world.dirs.extend(path.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        let file = self.node(path, mode)?;
        Ok(Box::new(SimFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.0.lock();
        if world.dirs.contains(from) {
            return world.rename_dir(from, to);
        }
        let file = *world.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        world.rename(Rename { from: Some(from.to_owned()), to: Some(to.to_owned()), file: Some(file) })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut world = self.0.lock();
        let file = *world.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        world.rename(Rename { from: Some(path.to_owned()), to: None, file: Some(file) })
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut world = self.0.lock();
        let inside: Vec<_> = world.names.iter().filter(|(name, _)| name.starts_with(path)).collect();
        let removals: Vec<_> = inside
            .into_iter()
            .map(|(name, &file)| Rename { from: Some(name.clone()), to: None, file: Some(file) })
            .collect();
        for removal in removals {
            world.rename(removal)?;
        }
        world.dirs.retain(|dir| !dir.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut world = self.0.lock();
        world.change()?;
        world.sync_names(|rename| rename.is_in(path));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let world = self.0.lock();
        world.powered()?;
        if !world.dirs.contains(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = world.names.keys().chain(&world.dirs).filter(|name| name.parent() == Some(path));
        let mut names: Vec<_> =
            inside.filter_map(|name| Some(name.file_name()?.to_string_lossy().into_owned())).collect();
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        let world = self.0.lock();
        world.names.contains_key(path) || world.dirs.contains(path)
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        let world = self.0.lock();
        Ok(world.capacity_bytes.saturating_sub(world.used_bytes()))
    }

    fn flush_latency(&self) -> Duration {
        let mut world = self.0.lock();
        if world.latency_max.is_zero() { Duration::ZERO } else { world.latency_max.mul_f64(world.rng.f64()) }
    }
}

struct SimFile {
    disk: SimDisk,
    file: u64,
}

impl File for SimFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut world = self.disk.0.lock();
        world.powered()?;
        let seen = &world.file(self.file).seen;
        let rest = seen.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(into.len());
        into[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.0.lock().write(self.file, bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.0.lock().sync(self.file)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.disk.0.lock().sync(self.file)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().file(self.file).seen.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.0.lock().set_len(self.file, len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let mut world = self.disk.0.lock();
        let len = len.max(world.file(self.file).seen.len() as u64);
        world.set_len(self.file, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/d/f";

    fn disk(seed: u64) -> (SimDisk, Box<dyn File>) {
        let disk = SimDisk::new(seed);
        disk.create_dir_all(Path::new("/d")).unwrap();
        let file = disk.open(Path::new(PATH), OpenMode::CreateNew).unwrap();
        (disk, file)
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_may_lose_each_sector_of_the_rest() {
        let mut outcomes = BTreeSet::new();
        for seed in 0..200 {
            let (disk, file) = disk(seed);
            file.write_at(&[1; SECTOR], 0).unwrap();
            file.sync_data().unwrap();
            disk.sync_dir(Path::new("/d")).unwrap();
            file.write_at(&[2; 2 * SECTOR], SECTOR as u64).unwrap();
            let bytes = disk.crash().read(Path::new(PATH)).unwrap();
            assert_eq!(bytes[..SECTOR], [1; SECTOR]);
            outcomes.insert((bytes.get(SECTOR).copied(), bytes.get(2 * SECTOR).copied()));
            assert!(file.sync_data().is_err(), "the crashed disk is dead");
        }
        let (lost, kept) = (Some(0), Some(2));
        let all = [(None, None), (kept, None), (lost, kept), (kept, kept)];
        assert_eq!(outcomes, BTreeSet::from(all), "nothing, torn, reordered, all");
    }

    #[test]
    fn a_crash_may_lose_names_that_were_not_synced() {
        let mut outcomes = BTreeSet::new();
        for seed in 0..50 {
            let (disk, file) = disk(seed);
            file.sync_all().unwrap();
            outcomes.insert(disk.crash().exists(Path::new(PATH)));
        }
        assert_eq!(outcomes.len(), 2);
    }

    #[test]
    fn a_directory_moves_whole_or_not_at_all() {
        let (old, new) = (Path::new("/d"), Path::new("/e"));
        let mut moved = BTreeSet::new();
        for seed in 0..50 {
            let (disk, file) = disk(seed);
            file.sync_all().unwrap();
            disk.open(&old.join("other"), OpenMode::CreateNew).unwrap();
            disk.rename(old, new).unwrap();
            if seed % 2 == 0 {
                disk.sync_dir(Path::new("/")).unwrap();
            }
            assert_eq!((disk.list(new).unwrap().len(), disk.exists(old)), (2, false));
            let after = disk.crash();
            let names = |dir| after.list(dir).map_or(0, |names| names.len());
            assert_eq!(names(old) + names(new), 2, "seed {seed}");
            assert!(names(old) == 0 || names(new) == 0, "seed {seed}: half of it has moved");
            moved.insert((seed % 2, names(new) == 2));
        }
        assert_eq!(moved, [(0, true), (1, false), (1, true)].into(), "only a move that is not synced may be lost");
    }

    #[test]
    fn a_full_disk_and_injected_errors_are_told() {
        let (disk, file) = disk(1);
        disk.set_capacity(1000);
        assert_eq!(file.allocate(1001).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.allocate(900).unwrap();
        assert_eq!(disk.free_bytes(Path::new("/d")).unwrap(), 100);
        disk.fail_write(2);
        file.write_at(b"x", 0).unwrap();
        file.write_at(b"y", 0).unwrap_err();
        file.write_at(b"z", 0).unwrap();
        disk.fail_sync(1);
        disk.sync_dir(Path::new("/d")).unwrap();
        file.sync_data().unwrap_err();
        file.sync_data().unwrap();
        assert_eq!(disk.read(Path::new(PATH)).unwrap()[0], b'z');
        assert!(disk.crash().read(Path::new(PATH)).unwrap().is_empty(), "a failed sync is never made good");
    }
}
