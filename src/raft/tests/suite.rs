//! openraft's own storage suite, on our log store and state machine.
//!
//! Some of our invariants are stricter than what the suite feeds a store. Raft keeps them; the suite's short cuts do not, so
//! [`Filled`] stands between, and every test of the suite runs:
//! - A log has no hole (it begins at index 0 or behind what was purged), and entries are applied without a gap. The suite appends
//!   from index 1, applies index 3 and then 5: gaps are filled with blank entries.
//! - There is no snapshot of nothing. `get_initial_state_log_ids` purges what was never applied, which `recover` calls a lost disk,
//!   and has a snapshot built: one blank entry is applied before.
//! - A snapshot file lies in its owner's directory. `transfer_snapshot` installs another member's: it is transferred first, in the
//!   way of the transport.

use std::io;
use std::path::Path;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, stream};
use openraft::EntryPayload;
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, IOFlushed, LogState, RaftLogStorage, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};

use super::THIS;
use crate::env::Env;
use crate::env::sim::{NoNet, SimDisk};
use crate::raft::state_machine::SnapshotBuilder;
use crate::raft::{
    Applied, Entry, LogId, LogStore, SnapshotMeta, StateMachine, Store, StoredMembership, TypeConfig, Vote,
};
use crate::storage::log::{self, Log, Owner};
use crate::storage::snapshot::{self, SnapshotFile};

/// A store whose gaps are filled with blank entries.
struct Filled<T> {
    inner: T,
    snapshots: snapshot::Dir,
}

fn blanks(from: u64, to: &LogId) -> Vec<Entry> {
    let term = **to.committed_leader_id();
    let blank = |index| Entry { log_id: LogId::new_term_index(term, index), payload: EntryPayload::Blank };
    (from..to.index()).map(blank).collect()
}

impl RaftLogStorage<TypeConfig> for Filled<LogStore> {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.inner.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.inner.get_log_reader().await
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.inner.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.inner.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.inner.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let next = self.inner.get_log_state().await?.last_log_id.map_or(0, |last| last.index() + 1);
        let missing = blanks(next, &entries[0].log_id);
        self.inner.append(missing.into_iter().chain(entries), callback).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.inner.truncate_after(last_log_id).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.inner.purge(log_id).await
    }
}

impl RaftStateMachine<TypeConfig> for Filled<StateMachine> {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.inner.applied_state().await
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let next = self.inner.applied_state().await?.0.map_or(0, |last| last.index() + 1);
            let missing = blanks(next, &entry.log_id).into_iter().map(|blank| Ok((blank, None)));
            self.inner.apply(stream::iter(missing.chain([Ok((entry, responder))]))).await?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        if self.inner.applied_state().await.is_ok_and(|(applied, _)| applied.is_none()) {
            let blank = blanks(0, &LogId::new_term_index(0, 1)).remove(0);
            self.inner.apply(stream::iter([Ok((blank, None))])).await.expect("a blank entry can be applied");
        }
        self.inner.get_snapshot_builder().await
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, sent: SnapshotFile) -> Result<(), io::Error> {
        let mut incoming = self.snapshots.receive(&sent.id, sent.bytes).map_err(io::Error::other)?;
        let bytes = sent.read_raw(0, usize::MAX)?;
        incoming.write(0, &bytes, crc32c::crc32c(&bytes)).map_err(io::Error::other)?;
        let received = incoming.finish().map_err(io::Error::other)?;
        self.inner.install_snapshot(meta, received).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>>, io::Error> {
        self.inner.get_current_snapshot().await
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, Filled<LogStore>, Filled<StateMachine>> for Builder {
    async fn build(&self) -> Result<((), Filled<LogStore>, Filled<StateMachine>), openraft::StorageError<TypeConfig>> {
        let env = Env::sim(1, Arc::new(SimDisk::new(1)), Arc::new(NoNet));
        let owner = Owner { cluster_id: THIS.cluster_id, member_id: THIS.member_id };
        let options = log::Options { segment_bytes: 64 << 10, ..log::Options::default() };
        let log = Log::create(&env, Path::new("/log"), owner, options).unwrap();
        let snapshots = snapshot::Dir::open(&env, Path::new("/snapshot"), THIS.cluster_id).unwrap();
        let store = Store::new(Applied::default(), false, 1 << 20);
        let state_machine = StateMachine::new(env, store, snapshots.clone(), THIS);
        Ok((
            (),
            Filled { inner: LogStore::new(log, 1 << 20), snapshots: snapshots.clone() },
            Filled { inner: state_machine, snapshots },
        ))
    }
}

#[tokio::test(start_paused = true)]
async fn openrafts_storage_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}
