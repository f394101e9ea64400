//! The state store: the chain, its damage, its cleaning; sled and its twin by the same tests.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use super::memory::Memory;
use super::*;
use crate::env::OpenMode;
use crate::pb::log::change::Change as Kind;
use crate::pb::log::{Lease, Membership, StoredMembership};
use crate::pb::{Fields, KeyValue};

fn change(kind: Kind) -> Change {
    Change { change: Some(kind) }
}

fn version(key: &str, revision: i64, value: &[u8]) -> Change {
    let fields = Fields { key: key.as_bytes(), value, version: 1, mod_revision: revision, ..Fields::default() };
    change(Kind::Version(KeyValue::new(fields)))
}

fn id(index: u64) -> LogId {
    LogId { term: 1 + index / 10, index }
}

fn meta(index: u64) -> StateMeta {
    let log_id = Some(LogId { term: 1, index: 0 });
    let membership = Some(StoredMembership { log_id, membership: Some(Membership::default()) });
    StateMeta { applied: Some(id(index)), membership, revision: index as i64, digest: None }
}

fn load(store: &mut Store) -> (Option<StateMeta>, Vec<Change>) {
    let mut all = Vec::new();
    let meta = store.load(&mut |change| {
        all.push(change);
        Ok(())
    });
    (meta.unwrap(), all)
}

/// A place that stores can be opened in, again and again.
trait Place {
    fn open(&self) -> Store;
}

impl Place for Memory {
    fn open(&self) -> Store {
        Memory::open(self, &Options { record_bytes: 4096, ..Options::default() })
    }
}

struct OnSled {
    temporary: tempfile::TempDir,
}

impl OnSled {
    fn new() -> Self {
        Self { temporary: tempfile::tempdir().unwrap() }
    }

    fn dir(&self) -> PathBuf {
        self.temporary.path().join("state")
    }

    fn opened(&self) -> Opened {
        let options = Options { record_bytes: 4096, ..Options::default() };
        Store::open(&Env::real(), &self.dir(), &options).unwrap()
    }

    fn names(&self) -> Vec<String> {
        Env::real().disk.list(&self.dir()).unwrap()
    }

    /// A store with some checkpointed records, closed.
    fn filled() -> Self {
        let place = Self::new();
        let mut store = place.open();
        load(&mut store);
        fill(&mut store, 1..=20);
        store.checkpoint().unwrap();
        place
    }
}

impl Place for OnSled {
    fn open(&self) -> Store {
        let opened = self.opened();
        assert_eq!(opened.damaged, None);
        opened.store
    }
}

fn fill(store: &mut Store, indexes: std::ops::RangeInclusive<u64>) -> Vec<Change> {
    let mut all = Vec::new();
    for index in indexes {
        let changes: Vec<_> = (0..30).map(|n| version(&format!("k{n}"), index as i64, &[7; 300])).collect();
        store.append(store.applied(), &meta(index), &changes).unwrap();
        all.extend(changes);
    }
    all
}

/// What every record store has to do: the twin and sled are held to the same.
fn behaves(place: &dyn Place) {
    let mut store = place.open();
    assert_eq!(load(&mut store), (None, vec![]));

    // Spans of several records, of none, and a change that takes several records.
    let mut all = fill(&mut store, 3..=5);
    store.append(Some(id(5)), &meta(6), &[]).unwrap();
    let large = [version("small", 7, b"v"), version("large", 7, &vec![9; 300_000]), change(Kind::Compacted(2))];
    store.append(Some(id(6)), &meta(7), &large).unwrap();
    all.extend(large);
    assert_eq!(store.durable(), None);
    store.checkpoint().unwrap();
    assert_eq!((store.applied(), store.durable()), (Some(id(7)), Some(id(7))));
    let bytes = store.bytes();
    drop(store);

    let mut store = place.open();
    assert_eq!(load(&mut store), (Some(meta(7)), all.clone()));
    assert_eq!(store.bytes(), bytes);
    assert_eq!(load(&mut store), (Some(meta(7)), all.clone()), "loading twice is no harm");

    // Cleaning with everything live keeps every change.
    let view =
        View { applied: id(7), compacted: 0, is_live: &|_| true, is_live_lease: &|_| true, is_live_fact: &|_| true };
    while !store.clean(&view, 3).unwrap().finished {}
    assert_eq!(load(&mut store).1, all);
    // With only the large one live, it is what remains.
    let is_live = |kv: &KeyValue| kv.key() == b"large";
    let view =
        View { applied: id(7), compacted: 7, is_live: &is_live, is_live_lease: &|_| true, is_live_fact: &|_| true };
    let mut dropped = 0;
    loop {
        let stats = store.clean(&view, 3).unwrap();
        dropped += stats.changes_dropped;
        if stats.finished {
            break;
        }
    }
    assert_eq!(dropped, all.len() - 1);
    all = vec![all[all.len() - 2].clone()];
    assert!(store.bytes() < 310_000, "{} bytes", store.bytes());
    all.extend(fill(&mut store, 8..=8));
    store.checkpoint().unwrap();
    drop(store);
    let mut store = place.open();
    assert_eq!(load(&mut store), (Some(meta(8)), all.clone()));

    // A rewrite that fails changes nothing; one that succeeds changes all.
    let mut broken = [Ok(version("new", 9, b"v")), Err("no more".to_owned())].into_iter();
    assert!(matches!(store.rewrite(&meta(9), &mut broken), Err(Error::Source(_))));
    assert_eq!(load(&mut store), (Some(meta(8)), all));
    let fresh: Vec<_> = (0..100).map(|n| version(&format!("new{n}"), n, &[1; 500])).collect();
    store.rewrite(&meta(90), &mut fresh.iter().cloned().map(Ok)).unwrap();
    assert_eq!(store.durable(), Some(id(90)));
    drop(store);
    let mut store = place.open();
    assert_eq!(load(&mut store), (Some(meta(90)), fresh));
    store.rewrite(&meta(91), &mut std::iter::empty()).unwrap();
    store.append(Some(id(91)), &meta(92), &[version("k", 92, b"v")]).unwrap();
    assert_eq!(load(&mut store), (Some(meta(92)), vec![version("k", 92, b"v")]));

    // What the state refuses is damage: an empty store takes its place.
    assert!(matches!(store.load(&mut |_| Err("nonsense".to_owned())), Err(Error::Damaged(_))));
    assert_eq!(load(&mut store), (None, vec![]));
    fill(&mut store, 0..=1);
    store.checkpoint().unwrap();
    drop(store);
    assert_eq!(load(&mut place.open()).0, Some(meta(1)));
}

#[test]
fn memory_behaves_as_a_state_store() {
    behaves(&Memory::default());
}

#[test]
fn sled_behaves_as_a_state_store() {
    behaves(&OnSled::new());
}

#[test]
fn a_crash_keeps_what_was_checkpointed_and_whole_spans_after_it() {
    for kept in 0..100 {
        let memory = Memory::default();
        let mut store = Place::open(&memory);
        load(&mut store);
        fill(&mut store, 1..=2);
        store.checkpoint().unwrap();
        fill(&mut store, 3..=5);
        let writes = memory.volatile_writes();
        memory.crash(kept);
        assert!(matches!(store.append(Some(id(5)), &meta(6), &[]), Err(Error::Io(_))), "the process is gone");

        let mut store = Place::open(&memory);
        let (meta, all) = load(&mut store);
        let applied = meta.unwrap().applied.unwrap().index;
        let per_span = writes / 3;
        assert_eq!(applied, 2 + (kept.min(writes) / per_span) as u64, "{kept} of {writes} writes kept");
        assert_eq!(all.len() as u64, applied * 30);
        // A record is written twice, first with nothing.
        assert_eq!(memory.records() as u64, applied * per_span as u64 / 2, "the unfinished span is gone");
        fill(&mut store, applied + 1..=9);
        assert_eq!(load(&mut store).1.len(), 9 * 30);
        if kept > writes {
            return;
        }
    }
}

/// Left to itself, sled would take twice their bytes here, and write more than that.
#[test]
fn sled_writes_a_chain_of_records_little_more_than_once() {
    let place = OnSled::new();
    let mut store = place.open();
    load(&mut store);
    for index in 1..=60 {
        let changes: Vec<_> = (0..100).map(|n| version(&format!("k{n}"), index as i64, &[7; 10_000])).collect();
        store.append(store.applied(), &meta(index), &changes).unwrap();
        store.checkpoint().unwrap();
    }
    let times = store.disk_bytes() as f64 / store.bytes() as f64;
    assert!(times < 1.7, "it takes {times} times its bytes on disk");
}

#[test]
fn every_damaged_or_lost_record_is_noticed() {
    let new = || {
        let memory = Memory::default();
        let mut store = Place::open(&memory);
        load(&mut store);
        fill(&mut store, 1..=2);
        store.checkpoint().unwrap();
        (memory, store)
    };
    let records = new().0.records();
    for nth in 0..records {
        for byte in [0, 1, 2, 6, 30, 49, 60, 200] {
            let (memory, mut store) = new();
            memory.flip(nth, byte);
            assert!(matches!(store.load(&mut |_| Ok(())), Err(Error::Damaged(_))), "record {nth} byte {byte}");
            assert_eq!((memory.times_set_aside(), load(&mut store)), (1, (None, vec![])));
        }
        let (memory, mut store) = new();
        memory.lose(nth);
        // Losing the record that ends the last span looks like a span that was not finished: the chain is shorter.
        if nth == records - 1 {
            assert_eq!(load(&mut store).0, Some(meta(1)));
        } else {
            assert!(matches!(store.load(&mut |_| Ok(())), Err(Error::Damaged(_))), "record {nth} lost");
        }
    }
}

#[test]
fn an_io_error_is_sticky() {
    let memory = Memory::default();
    let mut store = Place::open(&memory);
    load(&mut store);
    fill(&mut store, 1..=2);
    store.checkpoint().unwrap();
    memory.fail(io::ErrorKind::StorageFull);
    assert!(store.append(Some(id(2)), &meta(3), &[]).is_err());
    memory.crash(0);
    for failed in
        [store.append(Some(id(2)), &meta(3), &[]), store.checkpoint(), store.rewrite(&meta(9), &mut [].into_iter())]
    {
        let Err(Error::Io(e)) = failed else { panic!("{failed:?}") };
        assert_eq!(e.kind(), io::ErrorKind::StorageFull, "the first error is what stopped it");
    }
    assert!(store.failure().is_some());
    assert_eq!(load(&mut Place::open(&memory)).0, Some(meta(2)));
}

#[test]
#[should_panic(expected = "a span begins where the chain ends")]
fn a_gap_is_refused() {
    let mut store = Place::open(&Memory::default());
    load(&mut store);
    fill(&mut store, 1..=2);
    let _ = store.append(Some(id(3)), &meta(4), &[]);
}

#[test]
#[should_panic(expected = "cleaning looks at what is durable")]
fn cleaning_ahead_of_the_checkpoint_is_refused() {
    let mut store = Place::open(&Memory::default());
    load(&mut store);
    fill(&mut store, 1..=2);
    let _ = store.clean(
        &View { applied: id(2), compacted: 0, is_live: &|_| true, is_live_lease: &|_| true, is_live_fact: &|_| true },
        1,
    );
}

#[test]
fn damage_in_sleds_file_is_set_aside_or_shortens_the_chain() {
    let mut set_aside = 0;
    for (at, reopened) in [0, 21, 2000, 40_000, 90_000].into_iter().flat_map(|at| [(at, false), (at, true)]) {
        let place = OnSled::filled();
        if reopened {
            // Opening writes sled's own index, after which it no longer takes damage for the end of its log.
            load(&mut place.open());
        }
        let file = Env::real().disk.open(&place.dir().join("store-1/db"), OpenMode::ReadWrite).unwrap();
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes.iter_mut().for_each(|byte| *byte ^= 0xff);
        file.write_at(&bytes, at).unwrap();

        let mut opened = place.opened();
        let mut seen = 0;
        let loaded = opened.store.load(&mut |_| {
            seen += 1;
            Ok(())
        });
        match &loaded {
            Ok(Some(meta)) => assert_eq!(seen, 30 * meta.applied.unwrap().index, "at {at}: a chain is whole"),
            Ok(None) | Err(Error::Damaged(_)) => {}
            Err(error) => panic!("at {at}: {error}"),
        }
        if opened.damaged.is_some() || loaded.is_err() {
            set_aside += 1;
            assert_eq!(place.names(), ["current", "damaged-1", "store-2"], "at {at}");
            assert_eq!(load(&mut opened.store), (None, vec![]));
        }
        let end = opened.store.applied().map_or(0, |end| end.index);
        println!("at {at}, reopened {reopened}: up to {end}, {:?}, {loaded:?}", opened.damaged);
        fill(&mut opened.store, end + 1..=30);
        opened.store.checkpoint().unwrap();
        drop(opened);
        assert_eq!(load(&mut place.open()).0, Some(meta(30)), "at {at}: it goes on");
    }
    assert!(set_aside >= 3, "only {set_aside} damaged stores were set aside");
}

#[test]
fn only_the_newest_two_damaged_stores_are_kept() {
    let place = OnSled::new();
    for _ in 0..4 {
        let mut opened = place.opened();
        load(&mut opened.store);
        fill(&mut opened.store, 1..=1);
        opened.store.checkpoint().unwrap();
        assert!(opened.store.load(&mut |_| Err("a test says so".to_owned())).is_err());
    }
    assert_eq!(place.names(), ["current", "damaged-3", "damaged-4", "store-5"]);
}

#[test]
fn a_store_whose_files_or_name_are_gone_is_reported() {
    let place = OnSled::filled();
    std::fs::remove_dir_all(place.dir().join("store-1")).unwrap();
    assert!(place.opened().damaged.unwrap().contains("gone"));

    let place = OnSled::filled();
    std::fs::write(place.dir().join("current"), "store-1 00000000\n").unwrap();
    let mut opened = place.opened();
    assert!(opened.damaged.is_some());
    assert_eq!(load(&mut opened.store), (None, vec![]));
    assert_eq!(place.names(), ["current", "damaged-1", "store-2"]);

    let place = OnSled::filled();
    std::fs::write(place.dir().join("store-1/conf"), "nonsense\n and more of it").unwrap();
    assert!(place.opened().damaged.is_some());
}

/// A disk that crashes: after so many changes of its names, every further one fails.
struct Crashing {
    real: crate::env::disk::RealDisk,
    left: std::sync::atomic::AtomicUsize,
}

impl Crashing {
    fn step(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering::SeqCst;
        match self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("crashed")),
        }
    }
}

impl crate::env::Disk for Crashing {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.real.create_dir_all(path)
    }
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn crate::env::File>> {
        if mode != OpenMode::Read {
            self.step()?;
        }
        self.real.open(path, mode)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.real.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.real.remove_file(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.real.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.real.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.real.list(path)
    }
    fn exists(&self, path: &Path) -> bool {
        self.real.exists(path)
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.real.free_bytes(path)
    }
}

#[test]
fn a_rewrite_that_crashes_anywhere_leaves_the_old_or_the_new() {
    let fresh = || (0..50).map(|n| Ok(version(&format!("new{n}"), n, &[1; 300])));
    let mut outcomes = BTreeMap::new();
    for steps in 0..100 {
        let place = OnSled::filled();
        let mut env = Env::real();
        let crashing = Arc::new(Crashing { real: crate::env::disk::RealDisk, left: usize::MAX.into() });
        env.disk = crashing.clone();
        let mut store = Store::open(&env, &place.dir(), &Options::default()).unwrap().store;
        load(&mut store);
        crashing.left.store(steps, std::sync::atomic::Ordering::SeqCst);
        let done = store.rewrite(&meta(40), &mut fresh());
        if done.is_err() {
            assert!(store.append(store.applied(), &meta(41), &[]).is_err(), "step {steps}: the error is sticky");
        }
        drop(store);

        let mut store = place.open();
        let applied = load(&mut store).0.unwrap().applied.unwrap().index;
        assert!(applied == 40 || (applied == 20 && done.is_err()), "step {steps}: {applied}, {done:?}");
        let stores = place.names().into_iter().filter(|name| name.starts_with("store-")).count();
        assert_eq!(stores, 1, "step {steps}: leftovers are removed");
        fill(&mut store, applied + 1..=applied + 1);
        *outcomes.entry((applied, done.is_ok())).or_insert(0) += 1;
        if done.is_ok() {
            break;
        }
    }
    assert!(outcomes.keys().any(|(_, ok)| *ok), "{outcomes:?}");
    assert!(outcomes.get(&(20, false)).is_some_and(|n| *n > 4), "{outcomes:?}");
}

// Cleaning: the live set after loading and sweeping is the model's, whatever was cleaned, and when.

/// The state as `kv` would have it: versions by key, swept at the compacted revision.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    versions: BTreeMap<Vec<u8>, Vec<KeyValue>>,
    compacted: i64,
    leases: BTreeMap<i64, Lease>,
}

impl Model {
    fn apply(&mut self, change: &Change) {
        match change.change.as_ref().unwrap() {
            Kind::Version(kv) => self.versions.entry(kv.key().to_vec()).or_default().push(kv.clone()),
            Kind::Compacted(revision) => self.compacted = self.compacted.max(*revision),
            Kind::ClusterVersion(_) | Kind::Alarms(_) | Kind::WantedSize(_) => {}
            Kind::AuthUser(_) | Kind::AuthRole(_) | Kind::Auth(_) | Kind::Role(_) => {}
            Kind::Lease(lease) if lease.ttl > 0 => drop(self.leases.insert(lease.id, *lease)),
            Kind::Lease(end) => drop(self.leases.remove(&end.id)),
        }
    }

    fn sweep(&mut self) {
        let compacted = self.compacted;
        for versions in self.versions.values_mut() {
            let last = versions.iter().rposition(|kv| kv.mod_revision() <= compacted);
            if let Some(last) = last {
                let gone = if versions[last].is_tombstone() { last + 1 } else { last };
                versions.drain(..gone);
            }
        }
        self.versions.retain(|_, versions| !versions.is_empty());
    }

    fn is_live(&self, kv: &KeyValue) -> bool {
        self.versions.get(kv.key()).is_some_and(|versions| versions.contains(kv))
    }

    /// Cleans by this model, which is of `index`.
    fn clean(&self, store: &mut Store, index: u64, budget: usize) -> CleanStats {
        let is_live = |kv: &KeyValue| self.is_live(kv);
        let is_live_lease = |lease: &Lease| self.leases.get(&lease.id) == Some(lease);
        let view = View {
            applied: id(index),
            compacted: self.compacted,
            is_live: &is_live,
            is_live_lease: &is_live_lease,
            is_live_fact: &|_| true,
        };
        store.clean(&view, budget).unwrap()
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Puts of these keys, or deletions, one revision each; then one span ends.
    Span(Vec<(u8, bool)>),
    /// Compacts so many revisions behind the current one.
    Compact(i64),
    /// Grants, checkpoints and ends of leases: id and seconds, 0 for its end.
    Leases(Vec<(i64, i64)>),
    Checkpoint,
    Clean(usize),
    /// Loses what was not checkpointed, but some.
    Crash(usize),
    Rewrite,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec((0..12u8, prop::bool::weighted(0.6)), 0..12).prop_map(Step::Span),
        2 => (0..8i64).prop_map(Step::Compact),
        3 => prop::collection::vec((0..5i64, 0..3i64), 0..12).prop_map(Step::Leases),
        3 => Just(Step::Checkpoint),
        6 => (1..6usize).prop_map(Step::Clean),
        1 => (0..20usize).prop_map(Step::Crash),
        1 => Just(Step::Rewrite),
    ]
}

struct World {
    memory: Memory,
    store: Store,
    model: Model,
    index: u64,
    revision: i64,
    /// The model at every index, as a log would rebuild it.
    history: BTreeMap<u64, (Model, i64)>,
    durable: Option<(u64, Model)>,
}

impl World {
    fn new() -> Self {
        let memory = Memory::default();
        let mut store = Self::open(&memory);
        load(&mut store);
        Self { memory, store, model: Model::default(), index: 0, revision: 0, history: BTreeMap::new(), durable: None }
    }

    /// Records of a few changes each, so that there are many.
    fn open(memory: &Memory) -> Store {
        Memory::open(memory, &Options { record_bytes: 300, ..Options::default() })
    }

    fn append(&mut self, changes: &[Change]) {
        changes.iter().for_each(|change| self.model.apply(change));
        self.model.sweep();
        self.index += 1;
        let mut meta = meta(self.index);
        meta.revision = self.revision;
        self.store.append(self.store.applied(), &meta, changes).unwrap();
        self.history.insert(self.index, (self.model.clone(), self.revision));
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Span(ops) => {
                let mut changes = Vec::new();
                for (key, put) in ops {
                    let key = format!("key{key}");
                    let current = self.model.versions.get(key.as_bytes()).and_then(|all| all.last());
                    let exists = current.is_some_and(|kv| !kv.is_tombstone())
                        || changes.iter().any(|change: &Change| matches!(&change.change, Some(Kind::Version(kv)) if kv.key() == key.as_bytes()));
                    if *put {
                        self.revision += 1;
                        changes.push(version(&key, self.revision, &[3; 20]));
                    } else if exists {
                        self.revision += 1;
                        changes.push(change(Kind::Version(KeyValue::tombstone(key.as_bytes(), self.revision))));
                    }
                }
                self.append(&changes);
            }
            Step::Compact(behind) => {
                let to = self.revision - behind;
                if to > self.model.compacted {
                    self.append(&[change(Kind::Compacted(to))]);
                }
            }
            Step::Leases(words) => {
                let word = |(id, ttl): &(i64, i64)| change(Kind::Lease(Lease { id: *id, ttl: *ttl, remaining_ttl: 0 }));
                self.append(&words.iter().map(word).collect::<Vec<_>>());
            }
            Step::Checkpoint => {
                self.store.checkpoint().unwrap();
                self.durable = Some((self.index, self.model.clone())).filter(|(index, _)| *index > 0);
            }
            Step::Clean(budget) => {
                if let Some((index, model)) = &self.durable {
                    model.clean(&mut self.store, *index, *budget);
                }
            }
            Step::Crash(kept) => {
                self.memory.crash(*kept);
                self.store = Self::open(&self.memory);
                let meta = load(&mut self.store).0;
                self.index = meta.and_then(|meta| meta.applied).map_or(0, |applied| applied.index);
                (self.model, self.revision) = self.history.get(&self.index).cloned().unwrap_or_default();
                self.durable = Some((self.index, self.model.clone())).filter(|(index, _)| *index > 0);
            }
            Step::Rewrite => {
                if self.index > 0 {
                    let mut all: Vec<KeyValue> = self.model.versions.values().flatten().cloned().collect();
                    all.sort_by_key(KeyValue::mod_revision);
                    let compacted = (self.model.compacted > 0).then_some(Kind::Compacted(self.model.compacted));
                    let leases = self.model.leases.values().copied().map(Kind::Lease);
                    let changes = all.into_iter().map(Kind::Version).chain(compacted).chain(leases);
                    self.store.rewrite(&meta(self.index), &mut changes.map(|kind| Ok(change(kind)))).unwrap();
                    self.durable = Some((self.index, self.model.clone()));
                }
            }
        }
    }

    fn check(&mut self) {
        let pass = std::mem::take(&mut self.store.pass);
        let durable = self.store.durable;
        let mut loaded = Model::default();
        self.store
            .load(&mut |change| {
                loaded.apply(&change);
                Ok(())
            })
            .unwrap();
        // Looking must not help: the store goes on as it was.
        (self.store.pass, self.store.durable) = (pass, durable);
        loaded.sweep();
        assert_eq!(loaded, self.model);
        assert_eq!(self.store.bytes(), self.store.disk_bytes(), "bytes are counted right");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cleaning_never_changes_the_live_set(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
            world.check();
        }
    }
}

#[test]
fn a_deleted_and_compacted_history_shrinks_to_almost_nothing() {
    let mut world = World::new();
    // Puts far apart from their deletions, with survivors between them: no record is over half dead at first.
    for n in 0..400u32 {
        let kept = format!("kept{n}");
        world.revision += 2;
        let gone = version(&format!("gone{n}"), world.revision - 1, &[3; 10]);
        world.append(&[gone, version(&kept, world.revision, &[3; 20])]);
    }
    let clean = |world: &mut World| {
        world.run(&Step::Checkpoint);
        for _ in 0..4 {
            let (index, model) = world.durable.clone().unwrap();
            while !model.clean(&mut world.store, index, 16).finished {}
        }
        world.check();
    };
    for n in 0..400 {
        world.revision += 1;
        let gone = change(Kind::Version(KeyValue::tombstone(format!("gone{n}").as_bytes(), world.revision)));
        world.append(&[gone]);
    }
    world.run(&Step::Compact(0));
    clean(&mut world);
    let changes = load(&mut world.store).1;
    let tombstones = |kind: &Change| matches!(&kind.change, Some(Kind::Version(kv)) if kv.is_tombstone());
    assert_eq!(changes.iter().filter(|change| tombstones(change)).count(), 0, "no tombstone is left");
    let live: u64 = world.model.versions.values().flatten().map(|kv| kv.as_encoded().len() as u64).sum();
    assert!(world.store.bytes() < live * 3, "{} bytes for {live}", world.store.bytes());
    let records = world.memory.records();
    assert!(records < 200, "{records} records: small ones were joined");
}

#[test]
fn leases_that_came_and_went_leave_almost_nothing() {
    let mut world = World::new();
    world.append(&[change(Kind::Lease(Lease { id: -1, ttl: 9, remaining_ttl: 0 }))]);
    for round in 0..300 {
        let word = |id: i64, ttl| change(Kind::Lease(Lease { id, ttl, remaining_ttl: 0 }));
        world.append(&[word(round, 60), word(round + 1_000, 60)]);
        world.append(&[word(round, 0), word(round + 1_000, 30), word(round + 1_000, 0)]);
    }
    world.run(&Step::Checkpoint);
    for _ in 0..4 {
        let (index, model) = world.durable.clone().unwrap();
        while !model.clean(&mut world.store, index, 16).finished {}
    }
    world.check();
    let left = load(&mut world.store).1.len();
    assert!(left < 20, "{left} changes are left of one lease");
}
