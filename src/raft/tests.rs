//! The traps of openraft that this module guards, one fact a test. The cluster's part of them is in `node` and `server`.

pub(crate) mod played;
mod suite;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver as _;
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use openraft::{RaftNetworkFactory as _, RaftNetworkV2 as _};
use prost::Message as _;

use super::*;
use crate::env::Env;
use crate::env::sim::{NoNet, SimDisk, SimNet};
use crate::kv;
use crate::pb::log::{Command, command};
use crate::storage::log::{Log, Owner, Record};
use crate::storage::snapshot;

pub(crate) const THIS: Member = Member { cluster_id: 7, member_id: 0x10000 };

pub(crate) fn sim() -> Env {
    Env::sim(1, Arc::new(SimDisk::new(1)), Arc::new(NoNet))
}

pub(crate) fn put(key: &str, value: &[u8]) -> Command {
    let request = pb::etcd::PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value),
        ..Default::default()
    };
    Command::new(1, command::Request::Put(request))
}

pub(crate) fn entry(term: u64, index: u64, commands: Vec<Command>) -> Entry {
    let commands = commands.iter().map(|command| command.encode_to_vec().into()).collect::<Vec<Bytes>>();
    let mut batch = Vec::new();
    for command in commands {
        prost::encoding::bytes::encode(1, &command, &mut batch);
    }
    Entry { log_id: LogId::new_term_index(term, index), payload: EntryPayload::Normal(Batch(batch.into())) }
}

fn log(env: &Env) -> Log {
    let owner = Owner { cluster_id: THIS.cluster_id, member_id: THIS.member_id };
    Log::create(env, Path::new("/log"), owner, Default::default()).unwrap()
}

async fn append(log: &Log, records: Vec<Record>) {
    let (done, durable) = tokio::sync::oneshot::channel();
    log.append(records, move |result| drop(done.send(result))).unwrap();
    durable.await.unwrap().unwrap();
}

fn record(index: u64, bytes: usize) -> Record {
    Record { log_id: pb::log::LogId { term: 1, index }, kind: 1, payload: vec![7; bytes].into() }
}

/// 300 big batches would never be done within a heartbeat.
#[tokio::test(start_paused = true)]
async fn append_to_a_follower_is_bounded_by_bytes_and_never_empty() {
    let log = log(&sim());
    append(&log, (0..10).map(|index| record(index, 300)).chain([record(10, 5000), record(11, 1)]).collect()).await;
    let mut reader = LogStore::new(log.clone(), 1000);
    let indexes = async |reader: &mut LogStore, start, end| -> Vec<u64> {
        reader.limited_get_log_entries(start, end).await.unwrap().iter().map(|entry| entry.log_id.index()).collect()
    };
    assert_eq!(indexes(&mut reader, 0, 12).await, [0, 1, 2], "three of 300 bytes are within 1000");
    assert_eq!(indexes(&mut reader, 9, 12).await, [9], "the next is too large to come along");
    assert_eq!(indexes(&mut reader, 10, 12).await, [10], "one entry at least, however large");
    assert_eq!(indexes(&mut reader, 10, 10).await, [0; 0]);
    // Applying is not bound by it.
    assert_eq!(reader.try_get_log_entries(0..12).await.unwrap().len(), 12);
}

#[tokio::test(start_paused = true)]
async fn entries_to_apply_come_in_pieces_without_a_gap() {
    let log = log(&sim());
    append(&log, (0..40).map(|index| record(index, 300_000)).collect()).await;
    log.purge(pb::log::LogId { term: 1, index: 4 }).await.unwrap();
    let mut reader = LogStore::new(log, 1000).get_log_reader().await;
    let entries: Vec<_> = futures_util::StreamExt::collect(reader.entries_stream(5..38).await).await;
    let indexes: Vec<u64> = entries.into_iter().map(|entry| entry.unwrap().log_id.index()).collect();
    assert_eq!(indexes, (5..38).collect::<Vec<_>>(), "12 MB were read 4 MiB at a time");
}

#[test]
fn options_guard_every_trap_that_has_a_setting() {
    let (raft, log) = (config::Raft::default(), config::Log::default());
    let options = options(&raft, &log).unwrap();
    assert_eq!(options.enable_pre_vote, Some(true));
    assert_eq!(options.enable_leader_restore, Some(false), "a restarted leader must be elected again");
    let probe = options.quorum_loss_probe_interval.expect("a leader without a quorum goes quiet");
    assert!(probe >= 2 * options.election_timeout_max, "{probe}");
    assert!(matches!(options.snapshot_policy, openraft::SnapshotPolicy::Never), "housekeeping asks for snapshots");
    assert_eq!(options.max_in_snapshot_log_to_keep, u64::MAX, "housekeeping purges");
    assert!(options.install_snapshot_timeout >= 60_000, "a short one loops");
    assert_eq!(options.heartbeat_interval, 100);
    assert!(raft.batch_bytes_max <= raft.append_bytes_max, "a batch fits into an append");
    assert!((config::Config::default().peer_message_bytes_max() as u64) > raft.append_bytes_max.0);
    assert!(MESSAGE_BYTES_MAX > config::Config::default().peer_message_bytes_max());
}

/// openraft's default grants everything, which would make pre-vote on worth nothing.
#[tokio::test(start_paused = true)]
async fn pre_vote_goes_over_the_network() {
    let env = sim();
    let mut network = network(&env, log(&env));
    let node = pb::log::Node { peer_address: "10.0.0.9:2380".into(), ..Default::default() };
    let mut connection = network.new_client(2, &node).await;
    let request = openraft::raft::VoteRequest::new(Vote::new(5, 1), None);
    let option = openraft::network::RPCOption::new(Duration::from_millis(100));
    connection.pre_vote(request, option).await.expect_err("a peer that is not there grants nothing");
}

/// Else the answer to an append that nobody waits for any more would be taken for the answer to the next one.
#[tokio::test(start_paused = true)]
async fn appends_share_a_stream_until_one_fails() {
    const ADDRESS: &str = "10.0.0.2:2380";
    let net = SimNet::new(1, Duration::from_millis(1));
    let env = Env::sim(1, Arc::new(SimDisk::new(1)), net.host("10.0.0.1".parse().unwrap()));
    let mut peer = played::play(&net, ADDRESS).await;
    let mut network = network(&env, log(&env));
    let node = pb::log::Node { peer_address: ADDRESS.into(), ..Default::default() };
    let mut connection = network.new_client(2, &node).await;
    let mut append = async || {
        let request = openraft::raft::AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        connection.append_entries(request, openraft::network::RPCOption::new(Duration::from_secs(1))).await
    };
    let success = Ok(pb::peer::AppendResponse::default());
    let conflict = Ok(pb::peer::AppendResponse {
        outcome: pb::peer::append_response::Outcome::Conflict.into(),
        ..Default::default()
    });

    let mut streams = Vec::new();
    for _ in 0..2 {
        let (answer, ()) = tokio::join!(append(), async {
            let (_, answers) = peer.appends.recv().await.unwrap();
            answers.send(success.clone()).await.unwrap();
            streams.push(answers);
        });
        assert_eq!(answer.unwrap(), openraft::raft::AppendEntriesResponse::Success);
    }
    assert!(streams[0].same_channel(&streams[1]), "both came on one stream");

    // Not answered in time, and then too late.
    append().await.expect_err("the peer is silent");
    let (_, late) = peer.appends.recv().await.unwrap();
    let _ = late.send(success.clone()).await;
    let (answer, ()) = tokio::join!(append(), async {
        let (_, answers) = peer.appends.recv().await.unwrap();
        assert!(!answers.same_channel(&late), "a new stream");
        answers.send(conflict.clone()).await.unwrap();
    });
    assert_eq!(answer.unwrap(), openraft::raft::AppendEntriesResponse::Conflict);

    // The peer is gone and back before the next one.
    net.power_off("10.0.0.2".parse().unwrap());
    let mut peer = played::play(&net, ADDRESS).await;
    crate::env::sleep(Duration::from_millis(100)).await;
    let (answer, ()) = tokio::join!(append(), async {
        let (_, answers) = peer.appends.recv().await.unwrap();
        answers.send(success.clone()).await.unwrap();
    });
    answer.expect("a stream that was closed meanwhile is opened anew");
}

fn network(env: &Env, log: Log) -> Network {
    let past = Past::new(log, Peers::new(env.clone()), true);
    Network {
        env: env.clone(),
        peers: past.peers.clone(),
        store: Store::new(Applied::default(), false, 1 << 20),
        guard: Guard::new(env.clone(), THIS, Peers::new(env.clone()), None),
        cluster_id: THIS.cluster_id,
        member_id: THIS.member_id,
        snapshot_chunk_bytes: 1 << 10,
        snapshot_rate: 1 << 20,
        past,
    }
}

/// A Raft that was not initialized, on an empty disk.
pub(crate) async fn running_raft(env: &Env) -> (Raft, Arc<Store>, snapshot::Dir) {
    let snapshots = snapshot::Dir::open(env, Path::new("/snapshot"), THIS.cluster_id).unwrap();
    let store = Store::new(Applied::default(), false, 1 << 20);
    let log = log(env);
    let network = network(env, log.clone());
    let options = options(&config::Raft::default(), &config::Log::default()).unwrap();
    let state_machine = StateMachine::new(env.clone(), store.clone(), snapshots.clone(), THIS);
    let raft = start(THIS.member_id, options, network, LogStore::new(log, 1 << 20), state_machine).await.unwrap();
    (raft, store, snapshots)
}

/// Its receiving side.
async fn running_rpc(env: &Env) -> (Raft, Arc<Guard>, Rpc) {
    let (raft, store, snapshots) = running_raft(env).await;
    let guard = Guard::new(env.clone(), THIS, Peers::new(env.clone()), None);
    guard.start(raft.clone());
    (raft.clone(), guard.clone(), Rpc::new(env.clone(), raft, guard, store, snapshots))
}

fn vote_request(to: u64, cluster_id: u64, term: u64) -> pb::peer::VoteRequest {
    pb::peer::VoteRequest {
        envelope: Some(pb::peer::Envelope { cluster_id, from: 0x20001, to }),
        vote: Some(pb::log::Vote { term, member: 0x20001, committed: false }),
        last_log: None,
        leadership_transfer: false,
    }
}

#[tokio::test(start_paused = true)]
async fn pre_vote_of_any_answer_changes_no_vote() {
    let env = sim();
    let (raft, _, rpc) = running_rpc(&env).await;
    // This member has a log that the candidate lacks, and a term of its own.
    let formation = BTreeMap::from([(THIS.member_id, Default::default()), (0x20001, Default::default())]);
    raft.initialize(formation).await.unwrap();
    let before = raft.metrics().borrow_watched().vote;

    let answer = rpc.vote(vote_request(THIS.member_id, THIS.cluster_id, 50), true).await.unwrap();
    assert!(!answer.granted, "the candidate's log is behind");
    assert_eq!(raft.metrics().borrow_watched().vote, before, "a pre-vote raises no term");
    assert!(before.leader_id.term < 50);
    let answer = rpc.vote(vote_request(THIS.member_id, THIS.cluster_id, 50), false).await.unwrap();
    assert!(!answer.granted);
}

/// Membership rule 5: a wiped, moved or foreign member is not heard, and said so once.
#[tokio::test(start_paused = true)]
async fn call_for_another_cluster_or_member_is_refused_before_it_is_looked_at() {
    let env = sim();
    let (raft, guard, rpc) = running_rpc(&env).await;
    let before = raft.metrics().borrow_watched().vote;
    for (request, reason) in [
        (vote_request(THIS.member_id, 8, 50), "cluster id mismatch"),
        (vote_request(0x990000, THIS.cluster_id, 50), "member id mismatch"),
        (pb::peer::VoteRequest { envelope: None, ..vote_request(0, 0, 50) }, "must carry an envelope"),
    ] {
        for _ in 0..3 {
            let status = rpc.vote(request, false).await.unwrap_err();
            assert!(status.message().contains(reason), "{status}");
        }
        let envelope = request.envelope;
        rpc.append(pb::peer::AppendRequest { envelope, ..Default::default() }).await.unwrap_err();
        rpc.snapshot_offset(pb::peer::SnapshotHead { envelope, ..Default::default() }).await.unwrap_err();
        rpc.transfer_leader(pb::peer::TransferLeaderRequest { envelope, ..Default::default() }).await.unwrap_err();
    }
    assert_eq!(raft.metrics().borrow_watched().vote, before);
    assert_eq!(guard.logged(), 3, "each stranger is logged once");
    rpc.vote(vote_request(THIS.member_id, THIS.cluster_id, 50), false).await.expect("a call for this member is heard");
}

#[test]
fn batch_with_a_command_that_is_not_known_changes_nothing() {
    let store = Store::new(Applied::default(), false, 1 << 20);
    store.apply(entry(1, 0, vec![put("a", b"1")]), true).unwrap();
    let before = store.view();
    let unknown = Command { needs: kv::APPLY_VERSION + 1, ..put("c", b"3") };
    for bad in [unknown, Command::new(1, None)] {
        store.apply(entry(1, 1, vec![put("b", b"2"), bad]), true).expect_err("this build must stop");
        let now = store.view();
        assert_eq!((now.kv.revision(), now.log_id), (before.kv.revision(), before.log_id));
        assert_eq!(now.kv.hash_kv(0).unwrap().hash, before.kv.hash_kv(0).unwrap().hash);
    }
    let Unsaved::Changes(changes, meta) = store.take_unsaved() else { panic!("nothing was replaced") };
    assert_eq!((changes.len(), meta.applied.unwrap().index), (1, 0), "the state store gets no half batch");
}

/// An entry that visits many keys is applied beside what readers see: they neither wait for it nor see half of it.
#[test]
fn readers_go_on_while_a_long_entry_is_applied_and_see_all_of_it_or_nothing() {
    const KEYS: usize = 20_000;
    let put_all = |value: &'static [u8]| {
        let puts = (0..KEYS).map(|n| pb::etcd::RequestOp {
            request: Some(pb::etcd::request_op::Request::RequestPut(pb::etcd::PutRequest {
                key: format!("k{n:05}").into(),
                value: value.into(),
                ..Default::default()
            })),
        });
        let txn = pb::etcd::TxnRequest { success: puts.collect(), ..Default::default() };
        Command::new(1, command::Request::Txn(txn))
    };
    let store = Store::new(Applied::default(), false, 64 << 20);
    store.apply(entry(1, 0, vec![put_all(b"1"), put("first", b"1"), put("last", b"1")]), true).unwrap();
    let of = |kv: &kv::State, key: &'static str| {
        let one = pb::etcd::RangeRequest { key: key.into(), ..Default::default() };
        kv.range(&one).unwrap().kvs[0].value().to_vec()
    };
    let ended = std::sync::atomic::AtomicBool::new(false);
    let (before, after) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut before, mut after) = (0, 0);
            while !ended.load(std::sync::atomic::Ordering::Acquire) || after == 0 {
                let seen = store.read(|s| [of(&s.kv, "first"), of(&s.kv, "k00000"), of(&s.kv, "last")]);
                match seen {
                    [a, b, c] if [&a[..], &b, &c] == [b"1"; 3] => before += 1,
                    [a, b, c] if [&a[..], &b, &c] == [b"2"; 3] => after += 1,
                    other => panic!("half of an entry: {other:?}"),
                }
            }
            (before, after)
        });
        // The reader is there before the entry is, and so is the state store.
        while store.applied_index() != Some(0) {}
        store.apply(entry(1, 1, vec![put("first", b"2"), put_all(b"2"), put("last", b"2")]), true).unwrap();
        ended.store(true, std::sync::atomic::Ordering::Release);
        reader.join().unwrap()
    });
    assert!(before > 100 && after > 0, "{before} reads before the entry was applied, {after} after");
    let Unsaved::Changes(changes, meta) = store.take_unsaved() else { panic!("nothing was replaced") };
    assert_eq!((changes.len(), meta.applied.unwrap().index), (2 * KEYS + 4, 1), "the state store gets both entries");
    store.apply(entry(1, 2, vec![put("first", b"3")]), true).unwrap();
    let Unsaved::Changes(changes, _) = store.take_unsaved() else { panic!("nothing was replaced") };
    assert_eq!(changes.len(), 1, "the journal goes on");
}

#[test]
fn each_command_is_answered_once_by_whoever_has_to() {
    let store = Store::new(Applied::default(), false, 1 << 20);
    store.waiters().begin(7);
    let own = store.waiters().origin(0);
    let foreign = pb::log::Origin { process: 8, ..own };
    let commands = || {
        let of = |origin| Command { origin, ..put("a", b"1") };
        vec![of(Some(foreign)), of(None), of(Some(own)), of(None)]
    };
    let deadline = crate::env::Instant::now() + Duration::from_secs(5);
    let mut told = store.waiters().wait(own.number, 1, deadline, Arc::new(())).unwrap();
    // The leader answers for members of older versions, whose commands have no origin.
    let for_senders = store.apply(entry(1, 0, commands()), true).unwrap();
    assert!(for_senders.iter().map(|(place, answer)| (*place, answer.is_ok())).eq([(1, true), (3, true)]));
    let answer = told.try_recv().unwrap().unwrap();
    let Some(pb::log::answer::Response::Put(answer)) = answer.response else { panic!("{answer:?}") };
    assert_eq!(answer.header.unwrap().revision, 4, "of its own place in the entry");
    // On the others there is nobody to tell.
    assert_eq!(store.apply(entry(1, 1, commands()), false).unwrap(), []);
}
