//! Backups of random histories beside a model, and what becomes of damaged ones.

mod damage;
mod moments;
mod standby;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use prost::Message as _;

use super::archive::{Archive, NamedFull};
use super::chain::{Chain, Cut};
use super::plan::Target;
use super::seal::Key;
use super::store::Store;
use super::{full, restore};
use crate::env::Env;
use crate::kv::tests::model::{self, Model};
use crate::pb::backup::{Generation, Mark};
use crate::pb::log::command::Request;
use crate::pb::log::{Batch, Command, Entry, LogId, entry};
use crate::raft::convert::{entry_from_pb, entry_to_record};
use crate::raft::{self, Applied, Member, Replay};
use crate::storage::log::{self, Log, Owner};
use crate::storage::snapshot;

const THIS: Member = Member { cluster_id: 0xc, member_id: 7 };

/// A member without a Raft: a state that goes on by entries which it logs, and the backups that are made of it.
struct World {
    env: Env,
    log: Log,
    store: Arc<raft::Store>,
    snapshots: snapshot::Dir,
    replay: Replay,
    model: Model,
    /// The model after each command, with the entry's index.
    past: Vec<(u64, Model)>,
    marks: VecDeque<Mark>,
    objects: Arc<InMemory>,
    archive: Archive,
    generation: Generation,
    runner: TestRunner,
    _directory: tempfile::TempDir,
}

fn any_key() -> Key {
    Key::read("5a".repeat(32).as_bytes()).unwrap()
}

impl World {
    async fn new(seed: u64, key: Option<Key>) -> Self {
        let (env, directory) = (Env::real(), tempfile::tempdir().unwrap());
        let owner = Owner { cluster_id: THIS.cluster_id, member_id: THIS.member_id };
        let options = log::Options { segment_bytes: 1 << 20, ..log::Options::default() };
        let log = Log::create(&env, &directory.path().join("log"), owner, options).unwrap();
        let snapshots = snapshot::Dir::open(&env, &directory.path().join("snapshot"), THIS.cluster_id).unwrap();
        let objects = Arc::new(InMemory::new());
        let archive = Archive::new(Store::of(&env, objects.clone(), key));
        let generation = archive.claim(THIS.cluster_id, None).await.unwrap();
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut world = Self {
            store: raft::Store::new(Applied::default(), false, 0),
            replay: Replay::new(Applied::default()),
            model: Model::new(),
            past: Vec::new(),
            marks: VecDeque::new(),
            runner: TestRunner::new_with_rng(Config::default(), rng),
            _directory: directory,
            env,
            log,
            snapshots,
            objects,
            archive,
            generation,
        };
        world.add(None).await;
        world
    }

    fn pick<T>(&mut self, strategy: impl Strategy<Value = T>) -> T {
        strategy.new_tree(&mut self.runner).unwrap().current()
    }

    fn request(&mut self) -> Request {
        match self.pick(0..10_u8) {
            0..=3 => Request::Put(self.pick(model::put_request())),
            4 => Request::DeleteRange(self.pick(model::delete_request())),
            5..=6 => Request::Txn(self.pick(model::txn_request())),
            7..=8 => self.pick(model::lease_request()),
            _ => {
                let revision = self.pick(0..1 + self.model.revision);
                Request::Compact(crate::pb::etcd::CompactionRequest { revision, physical: false })
            }
        }
    }

    fn next_index(&self) -> u64 {
        self.replay.index().map_or(0, |index| index + 1)
    }

    /// An entry of some random commands; `None` is one without.
    async fn add(&mut self, commands: Option<usize>) {
        let log_id = LogId { term: 1 + self.next_index() / 10, index: self.next_index() };
        let mut batch = Batch::default();
        for _ in 0..commands.unwrap_or(0) {
            let request = self.request();
            // Whether it is refused is the model's to know.
            let _ = self.model.apply(&request);
            self.past.push((log_id.index, self.model.clone()));
            batch.commands.push(Command::new(2, request));
        }
        if commands.is_none() {
            self.past.push((log_id.index, self.model.clone()));
        }
        let payload = commands.map(|_| entry::Payload::Batch(batch.encode_to_vec().into()));
        let entry = Entry { log_id: Some(log_id), payload };
        assert_eq!(self.replay.apply(entry.clone(), None), Ok(true));
        model::check(&self.replay.state().kv, &self.model);
        let record = entry_to_record(entry_from_pb(entry).unwrap());
        let (done, written) = tokio::sync::oneshot::channel();
        self.log.append(vec![record], move |result| drop(done.send(result))).unwrap();
        written.await.unwrap().unwrap();
    }

    /// The leader's clock says so.
    fn mark(&mut self, at_millis: u64) {
        self.marks.push_back(Mark { index: self.next_index() - 1, at_millis });
    }

    fn cut(&self) -> Cut {
        let state = self.replay.state();
        Cut {
            applied: raft::log_id_to_pb(state.log_id.as_ref().unwrap()),
            revision: state.kv.revision(),
            digest: state.kv.digest_to_pb(),
        }
    }

    async fn chain(&self) -> Chain {
        Chain::open(&self.archive, &self.generation).await.unwrap()
    }

    async fn archive(&mut self, chain: &mut Chain) {
        let cut = self.cut();
        chain.extend(&self.log, &self.store, cut, &mut self.marks).await.unwrap();
    }

    async fn full(&mut self, record: u64, at_millis: u64) -> NamedFull {
        let file = raft::write_snapshot(&self.snapshots, THIS, self.replay.state()).unwrap();
        let source = full::Source { file: file.file(), name: file.id.clone(), bytes: file.bytes };
        let beside = full::Beside { generation: self.generation.number, record, at_millis, bandwidth: u64::MAX };
        full::write(&self.archive, source, beside).await.unwrap()
    }

    /// A history with records and full backups in it; a second of the leader's clock for each entry.
    async fn fill(&mut self, entries: u64) {
        let mut chain = self.chain().await;
        self.archive(&mut chain).await;
        for _ in 0..entries {
            let commands = self.pick(0..4_usize);
            self.add(Some(commands)).await;
            let second = self.next_index() - 1;
            self.mark(1000 * second);
            if self.pick(0..4_u8) == 0 {
                self.archive(&mut chain).await;
            }
            if second == 1 || self.pick(0..12_u8) == 0 {
                self.full(chain.number(), 1000 * second).await;
            }
        }
        self.archive(&mut chain).await;
    }

    async fn restored(&self, target: Target) -> super::Result<restore::Restored> {
        restore::restore(&self.archive, target, None).await
    }

    /// Every object, by its name below the path.
    async fn all_objects(&self) -> Vec<(Path, Bytes)> {
        use futures_util::TryStreamExt as _;
        let metas: Vec<_> = self.objects.list(None).try_collect().await.unwrap();
        let mut all = Vec::new();
        for meta in metas {
            let bytes = self.objects.get(&meta.location).await.unwrap().bytes().await.unwrap();
            all.push((meta.location, bytes));
        }
        all.sort();
        all
    }

    async fn overwrite(&self, path: &Path, bytes: Bytes) {
        self.objects.put(path, bytes.into()).await.unwrap();
    }

    async fn end(self) {
        self.log.close().await;
        self.env.stop(std::time::Duration::from_secs(10)).await;
    }
}
