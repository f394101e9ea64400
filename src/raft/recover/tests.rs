//! Which of the three things on disk a member starts from, and when it must not start at all.

use std::path::Path;

use super::*;
use crate::env::Instant;
use crate::pb::log::{Change, StateMeta};
use crate::raft::checkpoint::{Checkpointer, due};
use crate::raft::state_machine::Unsaved;
use crate::raft::tests::{THIS, entry, put, sim};
use crate::storage::log::{Owner, Record};
use crate::storage::state::memory::Memories;

const STATE: &str = "/state";
const JOURNAL_BYTES_MAX: usize = 1 << 20;

/// One member's disk.
struct Disk {
    env: Env,
    log: Log,
    snapshots: snapshot::Dir,
    memories: Memories,
}

impl Disk {
    fn new() -> Self {
        let env = sim();
        let owner = Owner { cluster_id: THIS.cluster_id, member_id: THIS.member_id };
        let log = Log::create(&env, Path::new("/log"), owner, Default::default()).unwrap();
        let snapshots = snapshot::Dir::open(&env, Path::new("/snapshot"), THIS.cluster_id).unwrap();
        Self { env, log, snapshots, memories: Memories::default() }
    }

    /// Entries up to `last`, of which those up to `purged` are gone.
    async fn log(self, last: u64, purged: Option<u64>) -> Self {
        let records = (0..=last).map(|index| Record { log_id: LogId { term: 1, index }, kind: 0, payload: "".into() });
        let (done, durable) = tokio::sync::oneshot::channel();
        self.log.append(records.collect(), move |result| drop(done.send(result))).unwrap();
        durable.await.unwrap().unwrap();
        if let Some(index) = purged {
            self.log.purge(LogId { term: 1, index }).await.unwrap();
        }
        self
    }

    fn snapshot(self, index: u64) -> Self {
        write_snapshot(&self.snapshots, THIS, &state_at(index).0).unwrap();
        self
    }

    fn store(self, index: u64) -> Self {
        let (_, changes, meta) = state_at(index);
        self.store_of(&changes, &meta)
    }

    fn store_of(self, changes: &[Change], meta: &StateMeta) -> Self {
        let mut store = self.memories.at(Path::new(STATE)).open(&self.options());
        store.load(&mut |_| Ok(())).unwrap();
        store.append(None, meta, changes).unwrap();
        store.checkpoint().unwrap();
        self
    }

    fn options(&self) -> state::Options {
        state::Options { engine: state::Engine::Memory(self.memories.clone()), ..Default::default() }
    }

    fn recover(&self) -> Result<Recovered, Error> {
        let options = self.options();
        recover(&self.env, THIS, &self.log, &self.snapshots, Path::new(STATE), &options, JOURNAL_BYTES_MAX)
    }

    fn newest_snapshot(&self) -> Option<u64> {
        self.snapshots.latest().and_then(|file| file.meta().applied).map(|id| id.index)
    }

    /// Where the member starts, and whether the state store is written afresh.
    fn starts_at(&self) -> (Option<u64>, bool) {
        let recovered = self.recover().unwrap();
        let state = recovered.store.view();
        let index = state.log_id.map(|id| id.index());
        if let Some(index) = index {
            let expected = state_at(index).0;
            assert_eq!(state.kv.hash_kv(0).unwrap().hash, expected.kv.hash_kv(0).unwrap().hash, "the state at {index}");
        }
        let afresh = matches!(recovered.store.take_unsaved(), Unsaved::Everything);
        assert_eq!(recovered.from.map(|id| id.index), if afresh { None } else { index }, "where the chain ends");
        (index, afresh)
    }
}

/// The writer that goes on from what was recovered.
fn writer(env: &Env, dir: &Path, options: state::Options, recovered: Recovered) -> Checkpointer {
    Checkpointer::new(env.clone(), dir.to_owned(), options, std::time::Duration::from_secs(1), recovered)
}

fn apply(store: &Store, index: u64) {
    store.apply(entry(1, index, vec![put(&format!("k{}", index % 5), &index.to_be_bytes())]), false).unwrap();
}

/// The state after the entries up to `index`, and the changes that make it.
fn state_at(index: u64) -> (Applied, Vec<Change>, StateMeta) {
    let store = Store::new(Applied::default(), false, JOURNAL_BYTES_MAX);
    for index in 0..=index {
        apply(&store, index);
    }
    let Unsaved::Changes(changes, meta) = store.take_unsaved() else { panic!("nothing was replaced") };
    (store.view(), changes, meta)
}

#[tokio::test(start_paused = true)]
async fn empty_disk_starts_empty() {
    assert_eq!(Disk::new().starts_at(), (None, false));
    assert_eq!(Disk::new().log(10, None).await.starts_at(), (None, false), "all of it is in the log");
}

#[tokio::test(start_paused = true)]
async fn whichever_leads_further_is_taken() {
    assert_eq!(Disk::new().log(10, None).await.snapshot(5).store(8).starts_at(), (Some(8), false));
    assert_eq!(Disk::new().log(10, None).await.snapshot(8).store(5).starts_at(), (Some(8), true));
    assert_eq!(Disk::new().log(10, Some(6)).await.snapshot(8).starts_at(), (Some(8), true));
}

#[tokio::test(start_paused = true)]
async fn damaged_store_is_rebuilt_from_the_snapshot_file() {
    let disk = Disk::new().log(10, Some(4)).await.snapshot(5).store(8);
    disk.memories.at(Path::new(STATE)).flip(0, 40);
    assert_eq!(disk.starts_at(), (Some(5), true));
    assert_eq!(disk.memories.at(Path::new(STATE)).times_set_aside(), 1);
}

#[tokio::test(start_paused = true)]
async fn store_whose_records_make_no_state_is_written_afresh() {
    let (_, changes, meta) = state_at(8);
    // Every record is whole, but the state ends before its newest version.
    let disk = Disk::new().log(10, None).await.snapshot(5).store_of(&changes, &StateMeta { revision: 3, ..meta });
    assert_eq!(disk.starts_at(), (Some(5), true));

    // The writer must be able to go on from there, also when nothing at all could be loaded.
    let (_, changes, meta) = state_at(8);
    let disk = Disk::new().log(10, None).await.store_of(&changes, &StateMeta { revision: 3, ..meta });
    let recovered = disk.recover().unwrap();
    assert_eq!(recovered.store.applied_index(), None);
    let mut checkpointer = writer(&disk.env, Path::new(STATE), disk.options(), recovered);
    checkpointer.step().unwrap();
    for index in 0..=9 {
        apply(&checkpointer.store, index);
        checkpointer.step().unwrap();
    }
    drop(checkpointer);
    assert_eq!(disk.starts_at(), (Some(9), false));
}

/// sled locks its files, so the failed store must let go of them.
#[tokio::test]
async fn store_that_failed_is_opened_again_and_written_afresh() {
    let (dir, env) = (tempfile::tempdir().unwrap(), crate::env::Env::real());
    let state = dir.path().join("state");
    let recovered = |disk: &Disk| {
        recover(&env, THIS, &disk.log, &disk.snapshots, &state, &Default::default(), JOURNAL_BYTES_MAX).unwrap()
    };
    let disk = Disk::new();
    let mut checkpointer = writer(&env, &state, Default::default(), recovered(&disk));
    apply(&checkpointer.store, 0);
    checkpointer.step().unwrap();
    std::fs::write(state.join("store-1/blobs/page"), "which no checkpoint makes durable").unwrap();
    apply(&checkpointer.store, 1);
    checkpointer.step().unwrap_err();
    apply(&checkpointer.store, 2);
    checkpointer.step().unwrap_err();

    checkpointer.reopen();
    checkpointer.step().unwrap();
    apply(&checkpointer.store, 3);
    checkpointer.step().unwrap();
    let expected = checkpointer.store.view().kv.hash_kv(0).unwrap().hash;
    drop(checkpointer);
    let state = recovered(&disk).store.view();
    assert_eq!((state.log_id.map(|id| id.index()), state.kv.hash_kv(0).unwrap().hash), (Some(3), expected));
}

#[tokio::test(start_paused = true)]
async fn much_that_changed_does_not_wait_for_the_end_of_the_interval() {
    let interval = std::time::Duration::from_secs(10);
    let store = Disk::new().log(10, None).await.recover().unwrap().store;
    let waited = async || {
        let begin = Instant::now();
        due(store.clone(), interval).await;
        begin.elapsed()
    };
    store.apply(entry(1, 0, vec![put("k", b"small")]), false).unwrap();
    assert!(waited().await >= interval);
    store.apply(entry(1, 1, vec![put("k", &[0; 300 << 10])]), false).unwrap();
    assert!(waited().await < interval / 10);
}

#[tokio::test(start_paused = true)]
async fn damaged_snapshot_file_is_no_loss_while_the_store_reaches_back() {
    let disk = Disk::new().log(10, Some(4)).await.snapshot(8).store(5);
    let file = disk.snapshots.latest().unwrap();
    let bytes = disk.env.disk.open(&file.path, crate::env::OpenMode::ReadWrite).unwrap();
    bytes.write_at(&[0xff; 8], file.bytes / 2).unwrap();
    assert_eq!(disk.starts_at(), (Some(5), false));
    assert_eq!(disk.newest_snapshot(), Some(5), "the log is purged behind a snapshot file, so there is one");
}

#[tokio::test(start_paused = true)]
async fn member_whose_state_does_not_reach_back_to_the_log_is_a_lost_disk() {
    let lost = async |disk: Disk| match disk.recover() {
        Err(Error::LostState { purged, applied }) => (purged, applied),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it would start with a hole"),
    };
    assert_eq!(lost(Disk::new().log(10, Some(6)).await.snapshot(5).store(3)).await, (6, Some(5)));
    assert_eq!(lost(Disk::new().log(10, Some(0)).await).await, (0, None));
    let disk = Disk::new().log(10, Some(6)).await.store(8);
    disk.memories.at(Path::new(STATE)).flip(0, 40);
    assert_eq!(lost(disk).await, (6, None));
    // Exactly as far is enough.
    assert_eq!(Disk::new().log(10, Some(6)).await.store(6).starts_at(), (Some(6), false));
}

/// Found by the simulation: openraft purges the log up to such a state, and then has no snapshot for those who lack it.
#[tokio::test(start_paused = true)]
async fn state_ahead_of_the_log_gets_a_snapshot_file_first() {
    let disk = Disk::new().log(4, None).await.snapshot(2).store(8);
    assert_eq!((disk.starts_at(), disk.newest_snapshot()), ((Some(8), false), Some(8)));
    let disk = Disk::new().log(10, Some(6)).await.snapshot(5).store(8);
    assert_eq!((disk.starts_at(), disk.newest_snapshot()), ((Some(8), false), Some(8)));
    // Nothing is written when the log goes on from the state, or the snapshot reaches far enough.
    let disk = Disk::new().log(8, None).await.snapshot(2).store(8);
    assert_eq!((disk.starts_at(), disk.newest_snapshot()), ((Some(8), false), Some(2)));
    let disk = Disk::new().log(4, None).await.snapshot(8).store(3);
    assert_eq!((disk.starts_at(), disk.newest_snapshot()), ((Some(8), true), Some(8)));
}
