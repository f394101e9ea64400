//! Standbys: they become what their source is, by its entries; promotion and succession.

use prost::Message as _;

use super::*;
use crate::kv::{APPLY_VERSION, Limits, Members, ROLES_SINCE, validate};
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::log::{
    Batch, Entry, Follow, LogId, Membership, Promote, SourceEntry, Standby, Supersede, WantedSize, change, command,
    membership, source_entry,
};
use crate::testing::proposals::Proposals;

/// A cluster with a log: what is proposed there, and the entries that say so.
struct Source {
    state: State,
    entries: Vec<SourceEntry>,
    at: LogId,
}

impl Source {
    fn new() -> Self {
        let mut source = Self { state: State::new(), entries: Vec::new(), at: LogId { term: 1, index: 0 } };
        source.join(&[1, 2, 3]);
        source
    }

    fn log(&mut self, payload: Option<source_entry::Payload>) {
        self.at.index += 1;
        self.entries.push(SourceEntry { log_id: Some(self.at), payload });
    }

    fn join(&mut self, members: &[u64]) {
        let member = |id: &u64| membership::Member { id: *id, node: None };
        let configs = vec![membership::Config { voters: members.to_vec() }];
        let membership = Membership { configs, members: members.iter().map(member).collect() };
        let voters: std::collections::BTreeSet<u64> = members.iter().copied().collect();
        self.state.set_members(Members { configs: vec![voters.clone()], all: voters });
        self.log(Some(source_entry::Payload::Membership(membership)));
    }

    fn apply(&mut self, commands: Vec<Command>) {
        for command in &commands {
            let is_late = crate::kv::only_in_term(command).is_some_and(|only| only != self.at.term);
            if !is_late {
                drop(self.state.apply(command, true).expect("a command that this build knows"));
            }
        }
        self.log(Some(source_entry::Payload::Batch(Batch { commands })));
    }

    /// A standby of this moment.
    fn standby(&self) -> State {
        let mut state = load(self.state.changes(), self.state.revision());
        state.set_digest(None);
        state.begin_standby(1, 1, self.at, &self.membership());
        state.clear_alarms();
        state
    }

    fn membership(&self) -> Membership {
        let last = self.entries.iter().rev().find_map(|entry| match &entry.payload {
            Some(source_entry::Payload::Membership(membership)) => Some(membership.clone()),
            _ => None,
        });
        last.unwrap()
    }

    /// The entries after `from`, `count` of them at most.
    fn follow(&self, from: LogId, count: usize) -> Follow {
        let entries = self.entries.iter().filter(|entry| entry.log_id.unwrap().index > from.index).take(count);
        let entries: Vec<_> = entries.cloned().collect();
        let at_millis = 1000 + from.index;
        Follow { generation: 1, from: Some(from), next_record: from.index + 2, at_millis, entries }
    }
}

fn carry(state: &mut State, request: Request) -> Result<Response, Error> {
    let answer = state.apply(&Command::new(ROLES_SINCE, request), true).expect("a known command");
    answer.map(|answer| answer.response.expect("an answer was asked for"))
}

fn position(state: &State) -> LogId {
    state.standby().unwrap().applied.unwrap()
}

/// Everything that a standby has of its source: versions, compaction, leases and users.
fn data(state: &State) -> Vec<Vec<u8>> {
    let is_data = |change: &Change| {
        !matches!(
            change.change,
            Some(
                change::Change::Alarms(_)
                    | change::Change::ClusterVersion(_)
                    | change::Change::WantedSize(_)
                    | change::Change::Role(_)
            )
        )
    };
    state.changes().filter(is_data).map(|change| change.encode_to_vec()).collect()
}

fn alarm(action: AlarmAction, member_id: u64, kind: AlarmType) -> Request {
    Request::Alarm(AlarmRequest { action: action.into(), member_id, alarm: kind.into() })
}

/// Random commands of every kind, alarms and memberships that decide about them, at the source; its entries in pieces of any size, some
/// twice, here: the data is the same, and what is this cluster's own is not touched.
#[test]
fn a_standby_becomes_what_its_source_is_and_keeps_its_own() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..60 {
        let mut source = Source::new();
        let mut numbers = random.fork();
        let mut next = || numbers.u64(..);
        let mut proposals = Proposals(&mut next);
        let mut standby: Option<State> = None;
        for step in 0..60 {
            match random.u8(..12) {
                0 => {
                    let members: Vec<u64> = (1..6).filter(|_| random.bool()).collect();
                    source.join(&members);
                }
                1 => source.log(None),
                2 => source.at.term += 1,
                3 => {
                    let action = if random.bool() { AlarmAction::Activate } else { AlarmAction::Deactivate };
                    let kind = if random.bool() { AlarmType::Nospace } else { AlarmType::Corrupt };
                    source.apply(vec![Command::new(2, alarm(action, random.u64(..6), kind))]);
                }
                4 => {
                    let raise = crate::pb::log::SetClusterVersion { version: random.u32(1..=APPLY_VERSION) };
                    source.apply(vec![Command::new(1, Request::SetClusterVersion(raise))]);
                }
                _ => {
                    let commands = (0..random.usize(1..5)).map(|_| proposals.command());
                    let is_taken = |command: &Command| {
                        State::check(command).is_ok() && validate::command(command, &Limits::default()).is_ok()
                    };
                    let mut known: Vec<_> = commands.filter(is_taken).collect();
                    known.iter_mut().for_each(|command| command.origin = None);
                    known.push(Command::new(1, Request::Put(put("hostile/1", "x"))));
                    source.apply(known);
                }
            }
            if step == 10 {
                let mut state = source.standby();
                state.keep_journal(usize::MAX);
                standby = Some(state);
            }
            let Some(state) = &mut standby else { continue };
            let own = (state.alarms(), state.cluster_version(), state.wanted_size());
            let follow = source.follow(position(state), random.usize(..4));
            let applied = follow.entries.last().map_or(follow.from, |last| last.log_id);
            carry(state, Request::Follow(follow.clone())).unwrap();
            assert_eq!(state.standby().unwrap().applied, applied);
            let (before, revision) = (data(state), state.revision());
            if !follow.entries.is_empty() {
                carry(state, Request::Follow(follow)).unwrap();
            }
            assert_eq!((state.revision(), data(state) == before), (revision, true), "entries are applied once");
            assert_eq!((state.alarms(), state.cluster_version(), state.wanted_size()), own);
            if random.u8(..8) == 0 {
                // A restart: from a snapshot, or from what was stored of the changes.
                let mut again = load(state.changes(), state.revision());
                again.set_members(Members::default());
                assert_eq!(again.standby(), state.standby());
                again.keep_journal(usize::MAX);
                *state = again;
            }
        }
        let mut state = standby.unwrap();
        let rest = source.follow(position(&state), usize::MAX);
        carry(&mut state, Request::Follow(rest)).unwrap();
        sweep_all(&mut state);
        sweep_all(&mut source.state);
        assert_eq!(state.revision(), source.state.revision());
        assert_eq!(data(&state), data(&source.state));
        let hash = |state: &State| state.hash_kv(0).map(|hash| (hash.hash, hash.compact_revision)).unwrap();
        assert_eq!(hash(&state), hash(&source.state));
    }
}

#[test]
fn a_standby_takes_no_writes_and_its_own_affairs_only() {
    let mut source = Source::new();
    source.apply(vec![Command::new(1, Request::Put(put("a", "1")))]);
    let mut state = source.standby();
    let refused = [
        Request::Put(put("a", "2")),
        Request::DeleteRange(delete("a", "")),
        Request::Txn(TxnRequest::default()),
        Request::Compact(CompactionRequest { revision: 2, physical: false }),
        Request::LeaseGrant(LeaseGrantRequest { id: 1, ttl: 9 }),
        Request::LeaseRevoke(crate::pb::log::LeaseRevoke { id: 1, term: 0 }),
        Request::LeaseCheckpoint(crate::pb::log::LeaseCheckpoint::default()),
        Request::Auth(crate::pb::log::AuthChange::default()),
    ];
    for request in &refused {
        assert_eq!(carry(&mut state, request.clone()), Err(Error::Standby), "{request:?}");
    }
    let size = WantedSize { start: 0, replicas: 5 };
    carry(&mut state, Request::WantedSize(size)).unwrap();
    carry(&mut state, Request::StartDigest(crate::pb::log::StartDigest {})).unwrap();
    carry(&mut state, Request::Supersede(Supersede { generation: 2, cluster_id: 7 })).unwrap();
    assert!(state.standby().is_some(), "it has no place that somebody could take");
    assert_eq!((state.wanted_size(), read(&state, "a", "")), (Some(size), "a=1".into()));
    // Of another generation, or not the next.
    let follow = |generation, index| Follow { generation, from: Some(LogId { term: 1, index }), ..Follow::default() };
    let at = position(&state);
    for not_next in [follow(2, at.index), follow(1, at.index + 1), follow(1, at.index - 1)] {
        carry(&mut state, Request::Follow(Follow { next_record: 99, ..not_next })).unwrap();
        assert_eq!(state.standby().unwrap().next_record, 1);
    }
}

#[test]
fn a_promoted_standby_takes_writes_with_a_jump_and_leases_have_all_their_time() {
    let mut source = Source::new();
    let grant = Request::LeaseGrant(LeaseGrantRequest { id: 5, ttl: 600 });
    let checkpoint = LeaseCheckpoint { id: 5, remaining_ttl: 9 };
    let checkpoint = crate::pb::log::LeaseCheckpoint { checkpoints: vec![checkpoint], term: 1 };
    let attached = PutRequest { lease: 5, ..put("a", "1") };
    for request in [grant, Request::Put(attached), Request::LeaseCheckpoint(checkpoint)] {
        source.apply(vec![Command::new(2, request)]);
    }
    for jump in [0, 1000] {
        let mut state = source.standby();
        state.keep_journal(1 << 20);
        assert_eq!(state.leases().get(5).unwrap().left_seconds, Some(9));
        carry(&mut state, Request::Promote(Promote { jump })).unwrap();
        assert_eq!((state.is_writable(), state.revision()), (true, 2 + jump));
        assert_eq!((state.take_jumped(), state.take_jumped()), (jump > 0, false));
        assert_eq!(state.leases().get(5).unwrap().left_seconds, None);
        assert_eq!(state.compacted() == state.revision(), jump > 0, "who remembers later ones is told so");
        assert_eq!(do_put(&mut state, "b", "2"), 3 + jump);
        let again = load(state.changes(), state.revision());
        assert_eq!((again.is_writable(), read(&again, "a", "c")), (true, "a=1 b=2".into()));
        assert_eq!(carry(&mut state, Request::Promote(Promote { jump })), Err(Error::NotStandby));
        let follow = source.follow(LogId::default(), 9);
        carry(&mut state, Request::Follow(follow)).unwrap();
        assert_eq!(state.revision(), 3 + jump, "it follows nobody any more");
    }
}

#[test]
fn a_superseded_cluster_takes_no_writes_over_a_restart_until_it_is_promoted() {
    let mut state = State::new();
    do_put(&mut state, "a", "1");
    state.keep_journal(1 << 20);
    for generation in [2, 3] {
        carry(&mut state, Request::Supersede(Supersede { generation, cluster_id: 7 })).unwrap();
        assert_eq!(state.superseded().map(|by| by.generation), Some(generation));
        assert_eq!(carry(&mut state, Request::Put(put("a", "2"))), Err(Error::Superseded));
    }
    let journal = state.take_journal().changes;
    let [first, last] = &journal[..] else { panic!("{journal:?}") };
    let is_live = |change: &Change| state.is_live_fact(change.change.as_ref().unwrap());
    assert_eq!((is_live(first), is_live(last)), (false, true), "storage may drop what is no more");
    let again = load(state.changes(), state.revision());
    assert_eq!(again.superseded(), state.superseded());
    carry(&mut state, Request::Promote(Promote { jump: 0 })).unwrap();
    do_put(&mut state, "a", "2");
    assert_eq!(read(&state, "a", ""), "a=2");
}

#[test]
fn a_source_that_is_newer_is_not_applied_and_stops_nobody() {
    let raise = crate::pb::log::SetClusterVersion { version: APPLY_VERSION + 1 };
    for unknown in [
        Command::new(1, Request::SetClusterVersion(raise)),
        Command { needs: APPLY_VERSION + 1, ..Command::new(1, Request::Put(put("a", "1"))) },
        Command { request: None, ..Command::new(1, Request::Put(put("a", "1"))) },
    ] {
        let batch = Batch { commands: vec![unknown] };
        let payload = Some(source_entry::Payload::Batch(batch));
        let entries = vec![SourceEntry { log_id: Some(LogId { term: 1, index: 1 }), payload }];
        let follow = Follow { entries, ..Follow::default() };
        let command = Command::new(ROLES_SINCE, command::Request::Follow(follow));
        assert!(State::check(&command).is_err(), "it is not proposed: {command:?}");
    }
}

/// What is archived of an entry is read as what it was.
#[test]
fn entries_of_a_log_are_the_same_bytes_as_a_standby_takes_them() {
    let batch = Batch { commands: vec![Command::new(1, Request::Put(put("a", "1")))] };
    let payload = Some(crate::pb::log::entry::Payload::Batch(batch.encode_to_vec().into()));
    let entry = Entry { log_id: Some(LogId { term: 3, index: 4 }), payload };
    let taken = SourceEntry::decode(&entry.encode_to_vec()[..]).unwrap();
    assert_eq!(taken.payload, Some(source_entry::Payload::Batch(batch)));
    assert_eq!(Standby::default().applied, None);
}
