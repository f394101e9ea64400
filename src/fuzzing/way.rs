//! The whole way of a proposal: what the leader takes of any bytes, every member applies, and the answer reaches who has asked.

use bytes::{Bytes, BytesMut};
use prost::Message as _;

use crate::error::Error;
use crate::kv::{Limits, ROLES_SINCE, State};
use crate::node::admit;
use crate::pb::log::{Batch, Command, Entry, Follow, LogId, Membership, SourceEntry, command, entry, source_entry};
use crate::pb::peer::{ForwardResponse, forward_response};
use crate::raft::{self, Store, convert};

/// A leader whose clients are answered, and a follower whose are not.
pub(crate) struct Way {
    leader: std::sync::Arc<Store>,
    follower: std::sync::Arc<Store>,
    next: u64,
    pub limits: Limits,
    pub cluster_version: u32,
}

impl Way {
    pub(crate) fn new() -> Self {
        let store = || Store::new(raft::Applied::default(), false, 0);
        let cluster_version = crate::kv::APPLY_VERSION;
        Self { leader: store(), follower: store(), next: 0, limits: Limits::default(), cluster_version }
    }

    /// Bytes that another member forwards.
    pub(crate) fn forwarded(&mut self, command: &Bytes) -> Result<Result<(), Error>, Error> {
        let before = self.leader.read(|s| s.kv.revision());
        match admit::forwarded(command, &self.limits, &self.leader, self.cluster_version) {
            Ok(_) => Ok(self.carry(command)),
            Err(error) => {
                assert_eq!(self.leader.read(|s| s.kv.revision()), before, "a refusal changes nothing");
                Err(error)
            }
        }
    }

    /// A command of the leader's own clients, which is not looked at again once it is encoded.
    pub(crate) fn own(&mut self, mut command: Command) -> Result<Result<(), Error>, Error> {
        admit::own(&mut command, &self.limits)?;
        admit::weigh(&command, &self.limits, &self.leader)?;
        let bytes = Bytes::from(command.encode_to_vec());
        assert_eq!(Command::decode(bytes.clone()).as_ref(), Ok(&command), "a command is what it is encoded to");
        admit::version(&bytes, self.cluster_version)?;
        Ok(self.carry(&bytes))
    }

    /// Batch, log entry, append to the others, log record, apply, answer, forward stream. The error is the command's answer.
    fn carry(&mut self, command: &Bytes) -> Result<(), Error> {
        let mut batch = BytesMut::new();
        // Not alone: a batch is as many as wait.
        for command in [command, &Bytes::from(nothing().encode_to_vec())] {
            prost::encoding::bytes::encode(1, command, &mut batch);
        }
        let log_id = Some(LogId { term: 1, index: self.next });
        let sent = Entry { log_id, payload: Some(entry::Payload::Batch(batch.freeze())) };
        let received = Entry::decode(&sent.encode_to_vec()[..]).expect("an append decodes");
        let [entry, again] = [sent, received].map(|e| convert::entry_from_pb(e).expect("an entry of a batch"));
        let record = convert::entry_to_record(again);
        let read = convert::entry_from_record(record).expect("what was appended can be read");
        let answers = self.leader.apply(entry, true).expect("what was proposed can be applied");
        self.follower.apply(read, false).expect("what was proposed can be applied by all");
        let digest = |store: &Store| store.digest_at(self.next).expect("it was just applied");
        assert_eq!(digest(&self.leader), digest(&self.follower), "members differ by who has the client");
        self.next += 1;
        // A command with an origin is answered by that process alone.
        let Some((0, outcome)) = answers.into_iter().next() else { return Ok(()) };
        let answer = outcome?;
        let result = Some(forward_response::outcome::Result::Answer(answer));
        let outcomes = vec![forward_response::Outcome { id: 1, result, detail: String::new() }];
        let response = ForwardResponse { outcomes, ..ForwardResponse::default() };
        let received = ForwardResponse::decode(&response.encode_to_vec()[..]);
        assert_eq!(received.as_ref(), Ok(&response), "an answer reaches a follower's client");
        Ok(())
    }
}

fn nothing() -> Command {
    use crate::pb::log::command::Request;
    Command::new(1, Request::Compact(crate::pb::etcd::CompactionRequest::default()))
}

/// Has a standby apply a command of its source's.
fn follow(standby: &mut State, command: Command) {
    let from = standby.standby().expect("no command of the source's ends that").applied;
    let log_id = from.map(|from| LogId { index: from.index + 1, ..from });
    let payload = Some(source_entry::Payload::Batch(Batch { commands: vec![command] }));
    let follow = Follow { generation: 1, from, entries: vec![SourceEntry { log_id, payload }], ..Follow::default() };
    let own = (standby.alarms(), standby.cluster_version(), standby.wanted_size());
    let outcome = standby.apply(&Command::new(ROLES_SINCE, command::Request::Follow(follow)), true);
    outcome.expect("a command that this build knows").expect("a standby takes what its source has applied");
    assert_eq!(standby.standby().and_then(|standby| standby.applied), log_id);
    assert_eq!((standby.alarms(), standby.cluster_version(), standby.wanted_size()), own);
}

/// Bytes as commands, each after its length in two bytes: what is taken is applied, and what is not is refused; and apply is total even
/// without the checks before it, for a log may hold what another build took.
pub(super) fn way(data: &[u8]) {
    let (mut way, mut unchecked, mut standby) = (Way::new(), State::new(), State::new());
    standby.begin_standby(1, 1, LogId::default(), &Membership::default());
    let mut rest = data;
    while let Some((head, tail)) = rest.split_at_checked(2) {
        let len = usize::from(u16::from_le_bytes([head[0], head[1]])).min(tail.len());
        let (command, tail) = tail.split_at(len);
        rest = tail;
        drop(way.forwarded(&Bytes::copy_from_slice(command)));
        let mut batch = Vec::new();
        prost::encoding::bytes::encode(1, &command.to_vec(), &mut batch);
        let Ok(batch) = Batch::decode(&batch[..]) else { continue };
        for command in batch.commands.iter().filter(|command| State::check(command).is_ok()) {
            drop(unchecked.apply(command, true).expect("a command that this build knows"));
            follow(&mut standby, command.clone());
            drop(way.own(command.clone()));
        }
    }
}
