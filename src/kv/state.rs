//! The state machine: the index of versions, and the commands that change it.
//!
//! Owns the commands; where versions are held is `versions`'.

use std::sync::Arc;

use super::alarm::Members;
use super::digest::Digest;
use super::header::header;
use super::history::{Event, Events, History};
use super::interval::Interval;
use super::journal::{Journal, Recorder};
use super::leases::Leases;
use super::role::sources_commands;
use super::tree::{Place, Tree};
use super::versions::live_cost;
use super::{
    ALARMS_SINCE, AUTH_SINCE, Auth, CLUSTER_VERSION_MIN, DIGESTS_SINCE, Fault, ROLES_SINCE, WANTED_SIZE_SINCE,
    apply_version, takes_space,
};
use crate::error::Error;
use crate::pb::etcd::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
};
use crate::pb::log::role::Role;
use crate::pb::log::{Answer, Command, SetClusterVersion, WantedSize, answer, change, command};
use crate::pb::{Fields, KeyValue};

/// What a state without a key takes.
const EMPTY_BYTES: u64 = 4096;

/// The whole replicated state. A clone is O(1) and a consistent view that later commands do not change; it keeps no
/// journal.
pub struct State {
    pub(super) revision: i64,
    pub(super) compacted: i64,
    /// Every event up to this revision was swept, and `swept_events` of the next one.
    pub(super) swept: i64,
    pub(super) swept_events: usize,
    pub(super) cluster_version: u32,
    /// Member and kind of every alarm that is on, in the order in which they were put on; below [`super::FENCES_SINCE`] ascending, as 0.1 has
    /// them.
    pub(super) alarms: Vec<(u64, i32)>,
    pub(super) members: Arc<Members>,
    pub(super) wanted_size: WantedSize,
    /// The newest version of each key that exists: a read of the present never meets a deleted one.
    pub(super) live: Tree,
    /// See `versions`.
    pub(super) old: Tree,
    pub(super) history: History,
    /// What the command under way has written: the events of the next revision.
    pub(super) writing: Vec<Event>,
    pub(super) leases: Leases,
    pub(super) auth: Arc<Auth>,
    /// Of what is held beside the newest versions.
    pub(super) old_bytes: u64,
    /// Of the keys that exist, without their values. See `growth`.
    pub(super) live_key_bytes: u64,
    /// What sweeping has taken out of this process's state, in the measure of `bytes`. Neither replicated nor stored.
    pub(super) freed_bytes: u64,
    /// See `role`; `None` while clients may write.
    pub(super) role: Option<Arc<Role>>,
    /// The command under way is the source's.
    pub(super) follows: bool,
    /// See [`State::take_jumped`].
    pub(super) jumped: bool,
    pub(super) journal: Recorder,
}

impl Clone for State {
    fn clone(&self) -> Self {
        Self {
            revision: self.revision,
            compacted: self.compacted,
            swept: self.swept,
            swept_events: self.swept_events,
            cluster_version: self.cluster_version,
            alarms: self.alarms.clone(),
            members: self.members.clone(),
            wanted_size: self.wanted_size,
            live: self.live.clone(),
            old: self.old.clone(),
            history: self.history.clone(),
            writing: self.writing.clone(),
            leases: self.leases.clone(),
            auth: self.auth.clone(),
            old_bytes: self.old_bytes,
            live_key_bytes: self.live_key_bytes,
            freed_bytes: self.freed_bytes,
            role: self.role.clone(),
            follows: self.follows,
            jumped: self.jumped,
            journal: Recorder::new(self.journal.digest),
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// An empty store: revision 1, as in etcd; the first write makes 2. It keeps no journal.
    pub fn new() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            swept: 1,
            swept_events: 0,
            cluster_version: CLUSTER_VERSION_MIN,
            alarms: Vec::new(),
            members: Arc::default(),
            wanted_size: WantedSize::default(),
            live: Tree::new(),
            old: Tree::new(),
            history: History::new(2),
            writing: Vec::new(),
            leases: Leases::new(),
            auth: Arc::default(),
            old_bytes: 0,
            live_key_bytes: 0,
            freed_bytes: 0,
            role: None,
            follows: false,
            jumped: false,
            journal: Recorder::new(Some(Digest::START)),
        }
    }

    /// A clone that the journal goes along with: from here on it is the one that is changed.
    pub fn take_over(&mut self) -> Self {
        let journal = self.journal.take_over();
        Self { journal, ..self.clone() }
    }

    /// The revision of the last write.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Reads below this revision are refused; 0 before the first compaction.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The greatest `Command.needs` that the leader may propose.
    pub fn cluster_version(&self) -> u32 {
        self.cluster_version
    }

    /// How many members people want; `None` if nobody has said so.
    pub fn wanted_size(&self) -> Option<WantedSize> {
        // Slots beyond all numbers are nobody's wish; an older build proposed what it was sent.
        Some(self.wanted_size).filter(|size| size.replicas > 0 && size.start.checked_add(size.replicas).is_some())
    }

    /// Keys that exist.
    pub fn key_count(&self) -> usize {
        self.live.len()
    }

    /// Bytes that the state takes in memory: payload, and an estimate of the index, superseded versions that are not compacted
    /// included. Never 0, as tools divide by it. Depends on how far sweeping has got.
    pub fn bytes(&self) -> u64 {
        EMPTY_BYTES + self.live_bytes() + self.old_bytes + self.history.overhead_bytes()
    }

    /// Bytes that were taken out of the state since this process has it: what has grown since a view was made, the view may still hold.
    pub fn freed_bytes(&self) -> u64 {
        self.freed_bytes
    }

    /// Bytes that leases, users and the newest versions of the keys that exist take: what is left of [`Self::bytes`] after compacting all.
    pub(super) fn live_bytes(&self) -> u64 {
        live_cost(self.live.sums()) + self.leases.bytes() + self.auth.bytes()
    }

    /// Starts an empty journal that is dropped when it holds more than `bytes_max`; 0 keeps none.
    pub fn keep_journal(&mut self, bytes_max: usize) {
        self.journal.keep(bytes_max);
    }

    /// Bytes of what commands changed since the last [`Self::take_journal`].
    pub fn journal_bytes(&self) -> usize {
        self.journal.bytes()
    }

    /// What commands changed since the last call.
    pub fn take_journal(&mut self) -> Journal {
        self.journal.take()
    }

    /// The events of every revision from `revision` on, tombstones included, each revision's in their order.
    ///
    /// From the compacted revision itself is allowed, as in etcd: a watcher that was told of a compaction starts there. It
    /// gets those events of that revision that are still held.
    pub fn events_from(&self, revision: i64) -> Result<impl Iterator<Item = (i64, &[KeyValue])>, Error> {
        if revision < self.compacted {
            return Err(Error::Compacted);
        }
        Ok(self.history.iter_from(revision))
    }

    /// Applies one command of the log. The outer error stops the member; the inner one is the command's answer, the same
    /// on every member, and then nothing has changed. Without `answer` (nobody here waits for it) the response is not made.
    ///
    /// Headers carry the revision only.
    pub fn apply(&mut self, command: &Command, answer: bool) -> Result<Result<Answer, Error>, Fault> {
        Self::check(command)?;
        let request = command.request.as_ref().ok_or(Fault::UnknownCommand)?;
        if let Some(refused) = self.refused_by_role(request) {
            return Ok(Err(refused));
        }
        let response = self.carry_out(command, request, answer);
        Ok(response.map(|r| Answer { response: answer.then_some(r) }))
    }

    /// Applies a command that this build knows, whoever may write.
    pub(super) fn carry_out(
        &mut self,
        command: &Command,
        request: &command::Request,
        answer: bool,
    ) -> Result<answer::Response, Error> {
        use {answer::Response, command::Request};
        if self.is_capped() && takes_space(request) {
            return Err(Error::NoSpace);
        }
        if self.auth.is_enabled() {
            self.permit_command(command)?;
        }
        match request {
            Request::Put(r) => self.put(r, answer).map(Response::Put),
            Request::DeleteRange(r) => Ok(Response::DeleteRange(self.delete_range(r, answer))),
            Request::Txn(r) => self.txn(r, answer).map(Response::Txn),
            Request::Compact(r) => self.compact(r).map(Response::Compact),
            Request::SetClusterVersion(r) => Ok(Response::SetClusterVersion(self.set_cluster_version(r))),
            Request::Alarm(r) => self.alarm(r).map(Response::Alarm),
            Request::StartDigest(_) => Ok(Response::StartDigest(self.start_digest())),
            Request::LeaseGrant(r) => self.grant_lease(r).map(Response::LeaseGrant),
            Request::LeaseRevoke(r) => self.revoke_lease(r).map(Response::LeaseRevoke),
            Request::LeaseCheckpoint(r) => Ok(Response::LeaseCheckpoint(self.checkpoint_leases(r))),
            Request::WantedSize(r) => Ok(Response::WantedSize(self.set_wanted_size(r))),
            Request::Auth(r) => self.change_auth(r).map(Response::Auth),
            Request::Follow(r) => Ok(Response::Role(self.follow(r))),
            Request::Promote(r) => self.promote(r).map(Response::Role),
            Request::Supersede(r) => Ok(Response::Role(self.be_superseded(r))),
        }
    }

    /// Whether this build can apply `command`, whatever the state: so that a batch is applied whole or not begun.
    pub fn check(command: &Command) -> Result<(), Fault> {
        let needs = needs(command)?;
        if needs > apply_version() { Err(Fault::Unsupported { needs }) } else { Ok(()) }
    }

    fn put(&mut self, r: &PutRequest, answer: bool) -> Result<PutResponse, Error> {
        self.check_lease(r.lease)?;
        self.check_put_key(r)?;
        self.check_quotas(std::iter::once(r))?;
        let response = self.write_put(r, answer);
        self.commit();
        Ok(response)
    }

    fn delete_range(&mut self, r: &DeleteRangeRequest, answer: bool) -> DeleteRangeResponse {
        let response = self.write_delete_range(r, answer);
        self.commit();
        response
    }

    fn compact(&mut self, r: &CompactionRequest) -> Result<CompactionResponse, Error> {
        if r.revision <= self.compacted {
            return Err(Error::Compacted);
        }
        if r.revision > self.revision {
            return Err(Error::FutureRevision);
        }
        self.compacted = r.revision;
        self.record(change::Change::Compacted(r.revision), size_of::<i64>());
        Ok(CompactionResponse { header: header(self.revision) })
    }

    /// Never goes down.
    fn set_cluster_version(&mut self, r: &SetClusterVersion) -> SetClusterVersion {
        if r.version > self.cluster_version {
            self.cluster_version = r.version;
            self.record(change::Change::ClusterVersion(r.version), size_of::<u32>());
            self.drop_alarms_of_strangers();
        }
        SetClusterVersion { version: self.cluster_version }
    }

    fn set_wanted_size(&mut self, r: &WantedSize) -> WantedSize {
        if *r != self.wanted_size {
            self.wanted_size = *r;
            self.record(change::Change::WantedSize(*r), size_of::<WantedSize>());
        }
        *r
    }

    /// Refuses a put that keeps something of a key that does not exist.
    pub(super) fn check_put_key(&self, r: &PutRequest) -> Result<(), Error> {
        let needs_key = r.ignore_value || r.ignore_lease;
        if needs_key && self.live.get(Place::of(&r.key)).is_none() { Err(Error::KeyNotFound) } else { Ok(()) }
    }

    /// The revision that a write is about to make.
    pub(super) fn next_revision(&self) -> i64 {
        self.revision + 1
    }

    /// The revision of what `live` holds: a command that has written is already one ahead.
    pub(super) fn present(&self) -> i64 {
        self.revision + i64::from(!self.writing.is_empty())
    }

    /// Writes a put that was checked, as part of the next revision.
    pub(super) fn write_put(&mut self, r: &PutRequest, answer: bool) -> PutResponse {
        let revision = self.next_revision();
        let (event, prev) = self.insert_made(&r.key, |prev| made_by(r, prev, revision));
        self.writing.push(event);
        PutResponse { header: header(revision), prev_kv: prev.filter(|_| answer && r.prev_kv) }
    }

    /// Writes a delete as part of the next revision; of no key, it writes nothing.
    pub(super) fn write_delete_range(&mut self, r: &DeleteRangeRequest, answer: bool) -> DeleteRangeResponse {
        let doomed: Vec<KeyValue> = self.live_in(Interval::new(&r.key, &r.range_end)).cloned().collect();
        self.write_tombstones(&doomed);
        DeleteRangeResponse {
            header: header(self.present()),
            deleted: doomed.len() as i64,
            prev_kvs: if answer && r.prev_kv { doomed } else { Vec::new() },
        }
    }

    /// Deletes these keys as part of the next revision.
    pub(super) fn write_tombstones(&mut self, doomed: &[KeyValue]) {
        let revision = self.next_revision();
        for kv in doomed {
            let event = self.insert_tombstone(KeyValue::tombstone(kv.key(), revision));
            self.writing.push(event);
        }
    }

    /// Makes the next revision of what was written; nothing written makes none.
    pub(super) fn commit(&mut self) {
        if self.writing.is_empty() {
            return;
        }
        self.revision += 1;
        assert_eq!(self.history.next(), self.revision, "the history has a gap");
        let events = Events::take(&mut self.writing);
        self.journal.versions(events.as_slice());
        self.history.push(events);
    }
}

/// The apply version that a command needs, whatever the state.
fn needs(command: &Command) -> Result<u32, Fault> {
    use command::Request;
    Ok(match command.request.as_ref().ok_or(Fault::UnknownCommand)? {
        // A version that this build does not know stops it before it meets commands that need it.
        Request::SetClusterVersion(r) => command.needs.max(r.version),
        Request::Put(_) | Request::DeleteRange(_) | Request::Txn(_) | Request::Compact(_) => command.needs,
        Request::Alarm(_) => command.needs.max(ALARMS_SINCE),
        Request::StartDigest(_) => command.needs.max(DIGESTS_SINCE),
        Request::LeaseGrant(_) | Request::LeaseRevoke(_) | Request::LeaseCheckpoint(_) => command.needs,
        Request::WantedSize(_) => command.needs.max(WANTED_SIZE_SINCE),
        Request::Auth(_) => command.needs.max(AUTH_SINCE),
        Request::Promote(_) | Request::Supersede(_) => command.needs.max(ROLES_SINCE),
        Request::Follow(r) => sources_commands(r)
            .try_fold(command.needs.max(ROLES_SINCE), |most, command| Ok(most.max(needs(command)?)))?,
    })
}

/// What a put makes at `revision` of the newest version of its key.
pub(super) fn made_by(r: &PutRequest, prev: Option<&KeyValue>, revision: i64) -> KeyValue {
    let was = prev.map(KeyValue::fields).unwrap_or_default();
    #[cfg(test)]
    crate::pb::key_value::looks::touch(if r.ignore_value { was.value.len() } else { 0 });
    KeyValue::new(Fields {
        key: &r.key,
        create_revision: if prev.is_some() { was.create_revision } else { revision },
        mod_revision: revision,
        version: was.version + 1,
        value: if r.ignore_value { was.value } else { &r.value },
        lease: if r.ignore_lease { was.lease } else { r.lease },
    })
}
