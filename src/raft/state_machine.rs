//! The replicated state machine: the key-value state, the applied log id and the membership, changed together.
//!
//! Owns the one lock that apply takes: once an entry, however many commands it holds. Readers share the lock for point
//! reads and clone the state (O(1)) for anything long. An entry that takes long is applied to a clone beside, which then takes the
//! state's place: so nobody waits for it, and nobody sees half of it. Invariants: entries are applied in order, exactly once; the applied
//! log id changes under the same lock as the data; a command that this version does not know stops the member.
//! Absent: the disk. Snapshots and the state store are written from clones and journals (`checkpoint`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use tokio::sync::{Notify, watch};

use super::convert::{log_id_from_pb, log_id_to_pb, stored_membership_from_pb, stored_membership_to_pb};
use super::waiters::{Outcome, Waiters};
use super::{Answers, Entry, LogId, Member, Membership, SnapshotMeta, StoredMembership, TypeConfig};
use crate::env::{Env, Instant, Pool, planted};
use crate::error::Error;
use crate::kv;
use crate::pb;
use crate::pb::etcd::AlarmType;
use crate::pb::log::Command;
use crate::storage::Progress;
use crate::storage::snapshot::{self, Head, SnapshotFile};

/// An entry whose commands visit more keys than this, or have as much other work, is applied beside what readers see: some
/// milliseconds. For others the copies of what they change, which a clone shares, would cost more than the wait.
const ASIDE_KEYS: u64 = if cfg!(test) { 512 } else { 1024 };
/// Who can do without a change waits no longer than this for another one.
const WRITE_PATIENCE: Duration = Duration::from_millis(1);

/// The state after some log entry. A clone is a consistent view.
#[derive(Clone, Default)]
pub struct Applied {
    pub kv: kv::State,
    pub log_id: Option<LogId>,
    pub membership: StoredMembership,
}

impl Applied {
    /// What snapshots and chunks say of themselves.
    pub fn meta(&self) -> pb::log::StateMeta {
        pb::log::StateMeta {
            applied: self.log_id.as_ref().map(log_id_to_pb),
            membership: Some(stored_membership_to_pb(&self.membership)),
            revision: self.kv.revision(),
            digest: self.kv.digest_to_pb(),
        }
    }

    /// The state whose changes `loader` has taken, as `meta` describes it.
    pub fn loaded(loader: kv::Loader, meta: &pb::log::StateMeta) -> io::Result<Self> {
        let mut kv = loader.finish(meta.revision).map_err(invalid)?;
        let membership = stored_membership_from_pb(meta.membership.as_ref()).map_err(invalid)?;
        kv.set_members(members_of(membership.membership()));
        kv.set_digest(meta.digest.as_ref());
        Ok(Self { kv, log_id: meta.applied.map(log_id_from_pb), membership })
    }

    /// `commands` are those of the entry, decoded.
    fn apply(&mut self, entry: Entry, commands: &[Command], wanted: Wanted<'_>) -> io::Result<Outcomes> {
        let expected = self.log_id.as_ref().map_or(0, |l| l.index() + 1);
        assert_eq!(entry.log_id.index(), expected, "entries are applied in order");
        let outcomes = match entry.payload {
            EntryPayload::Blank => Outcomes::default(),
            EntryPayload::Normal(_) => {
                let applied = self.apply_commands(commands, **entry.log_id.committed_leader_id(), wanted);
                applied.map_err(|error| poison(expected, error))?
            }
            EntryPayload::Membership(membership) => {
                self.kv.set_members(members_of(&membership));
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Outcomes::default()
            }
        };
        self.log_id = Some(entry.log_id);
        Ok(outcomes)
    }

    fn apply_commands(&mut self, commands: &[Command], term: u64, wanted: Wanted<'_>) -> io::Result<Outcomes> {
        // Before the first change: a batch that stops the member must not leave half of itself in the state store.
        commands.iter().try_for_each(kv::State::check).map_err(invalid)?;
        let mut outcomes = Outcomes::default();
        for (place, command) in commands.iter().enumerate() {
            let own = command.origin.and_then(|origin| wanted.waiters.own(origin));
            let for_sender = command.origin.is_none() && wanted.by_senders;
            let outcome = match kv::only_in_term(command) {
                // Decided by a leader that no longer was one.
                Some(only) if only != term => Err(Error::LeaderChanged),
                _ => self.kv.apply(command, own.is_some() || for_sender).map_err(invalid)?,
            };
            if let Some(number) = own {
                outcomes.own.push((number, outcome));
            } else if for_sender {
                outcomes.for_senders.push((place, outcome));
            }
        }
        Ok(outcomes)
    }

    /// Applies an entry that nobody waits for, whose commands were decoded. With `revision_max`, no command that would make a later revision,
    /// and none after it; false if there was one.
    pub(super) fn replay(&mut self, entry: Entry, commands: &[Command], revision_max: Option<i64>) -> io::Result<bool> {
        let waiters = Waiters::default();
        let wanted = Wanted { waiters: &waiters, by_senders: false };
        let reached = self.kv.revision() + commands.len() as i64;
        let Some(max) = revision_max.filter(|max| *max < reached) else {
            self.apply(entry, commands, wanted)?;
            return Ok(true);
        };
        // A command makes one revision or none: a few before the one that is too much are tried by themselves.
        let term = **entry.log_id.committed_leader_id();
        for command in commands {
            let before = self.kv.clone();
            self.apply_commands(std::slice::from_ref(command), term, wanted)?;
            if self.kv.revision() > max {
                self.kv = before;
                return Ok(false);
            }
        }
        self.log_id = Some(entry.log_id);
        Ok(true)
    }

    /// This state, to be changed beside the one that readers see and then put in its place: the journal goes along.
    fn take_over(&mut self) -> Self {
        Self { kv: self.kv.take_over(), log_id: self.log_id, membership: self.membership.clone() }
    }
}

/// The commands of an entry.
pub(super) fn commands_of(entry: &Entry) -> io::Result<Vec<Command>> {
    let EntryPayload::Normal(batch) = &entry.payload else { return Ok(Vec::new()) };
    let mut batch = pb::log::Batch::decode(batch.0.clone()).map_err(|error| poison(entry.log_id.index(), error))?;
    if let Some(key) = crate::env::fail::corrupt_key() {
        corrupt(&mut batch, key);
    }
    Ok(batch.commands)
}

/// Whose answers are made; the other commands are only applied, which is cheaper.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    waiters: &'a Waiters,
    /// Also of commands without an origin: this member leads, and sends them to the members that forwarded these.
    by_senders: bool,
}

/// What applying an entry answered.
#[derive(Default)]
struct Outcomes {
    /// To this process's own commands, by number.
    own: Vec<(u64, Outcome)>,
    for_senders: Answers,
}

/// An entry that is to be applied next.
struct Decoded {
    entry: Entry,
    commands: Vec<Command>,
    /// It is applied beside what readers see, and not on the event loop.
    is_long: bool,
}

/// What an entry made beside the state.
struct Aside {
    state: Applied,
    outcomes: Outcomes,
    /// What [`Locked::replaced`] was before.
    was_replaced: bool,
}

/// Flips a bit of what is put at `key`; only tests ask for it.
fn corrupt(batch: &mut pb::log::Batch, key: &str) {
    for command in &mut batch.commands {
        if let Some(pb::log::command::Request::Put(put)) = &mut command.request
            && put.key == key.as_bytes()
        {
            let flipped = put.value.iter().enumerate().map(|(i, byte)| if i == 0 { byte ^ 1 } else { *byte });
            put.value = flipped.collect::<Vec<_>>().into();
        }
    }
}

/// Who belongs to the cluster, as the alarms go by it.
fn members_of(membership: &Membership) -> kv::Members {
    let all = membership.nodes().map(|(id, _)| *id).collect();
    kv::Members { configs: membership.get_joint_config().clone(), all }
}

fn invalid(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// Of an entry that stops every member.
pub(super) fn poison(index: u64, reason: impl std::fmt::Display) -> io::Error {
    invalid(format!(
        "the entry at log index {index} cannot be applied: {reason}; if a newer program cannot either, \
         `quorate recover --skip-entry {index} --dry-run` says what it holds"
    ))
}

/// The state machine's state, shared by apply, readers and the background writers.
pub struct Store {
    locked: RwLock<Locked>,
    /// Held by whoever changes the state, from before `locked` until after: the state is the same meanwhile.
    changing: Mutex<()>,
    journal_bytes_max: usize,
    applied_index: watch::Sender<Option<u64>>,
    /// How often the state store was written afresh.
    rewrites: watch::Sender<u64>,
    /// Somebody waits for that.
    rewrite_asked: Notify,
    /// Somebody waits until what was compacted is freed.
    sweep_asked: Notify,
    /// Counts the states that were replaced as a whole; changes under the lock.
    generation: AtomicU64,
    /// The first revision that watchers have not read yet.
    unread: AtomicI64,
    /// The first entry of the log that is not archived yet.
    unarchived: AtomicU64,
    /// Whether alarm CORRUPT is on for whomever; changes under the lock, and before the applied index says so.
    corrupt: AtomicBool,
    /// Whether users and roles count; changes as `corrupt` does.
    auth: AtomicBool,
    /// Whether clients may write; changes as `corrupt` does.
    writable: AtomicBool,
    waiters: Arc<Waiters>,
}

/// What changes together: else a new state's log id could be taken with the old one's changes.
struct Locked {
    state: Applied,
    digests: Digests,
    /// The state was replaced as a whole: the state store must be rewritten from it.
    replaced: bool,
}

/// The digest after each of the newest entries, for comparison with a member that is a little behind.
struct Digests {
    /// The index of the first.
    first: u64,
    values: VecDeque<Option<u64>>,
}

impl Digests {
    /// Entries remembered: under full load, more than a second's.
    const KEPT: usize = 16_384;

    fn of(state: &Applied) -> Self {
        match &state.log_id {
            Some(log_id) => Self { first: log_id.index(), values: [state.kv.digest()].into() },
            None => Self { first: 0, values: VecDeque::new() },
        }
    }

    fn push(&mut self, digest: Option<u64>) {
        if self.values.len() == Self::KEPT {
            self.values.pop_front();
            self.first += 1;
        }
        self.values.push_back(digest);
    }

    fn at(&self, index: u64) -> Option<u64> {
        *self.values.get(usize::try_from(index.checked_sub(self.first)?).ok()?)?
    }
}

/// What the state store must write to be where the state is.
pub enum Unsaved {
    /// These changes, which lead to this state.
    Changes(Vec<pb::log::Change>, pb::log::StateMeta),
    /// All of it: what was saved does not lead here.
    Everything,
}

impl Store {
    /// `journal_bytes_max`: changes that may wait for the state store before it is written afresh. `replaced`: the state does
    /// not come from the state store.
    pub fn new(mut state: Applied, replaced: bool, journal_bytes_max: usize) -> Arc<Self> {
        state.kv.keep_journal(journal_bytes_max);
        let index = state.log_id.as_ref().map(|l| l.index());
        Arc::new(Self {
            corrupt: AtomicBool::new(state.kv.has_alarm(AlarmType::Corrupt)),
            auth: AtomicBool::new(state.kv.auth().is_enabled()),
            writable: AtomicBool::new(state.kv.is_writable()),
            changing: Mutex::default(),
            locked: RwLock::new(Locked { digests: Digests::of(&state), state, replaced }),
            journal_bytes_max,
            applied_index: watch::Sender::new(index),
            rewrites: watch::Sender::new(0),
            rewrite_asked: Notify::new(),
            sweep_asked: Notify::new(),
            generation: AtomicU64::new(0),
            unread: AtomicI64::new(i64::MAX),
            unarchived: AtomicU64::new(u64::MAX),
            waiters: Arc::default(),
        })
    }

    /// Looks at the state as it is; apply waits as long as `look` takes, so it must be short.
    pub fn read<T>(&self, look: impl FnOnce(&Applied) -> T) -> T {
        look(&self.locked.read().state)
    }

    /// Changes what is not replicated (sweeps, journal hand-over).
    pub fn write<T>(&self, change: impl FnOnce(&mut Applied) -> T) -> T {
        let _changing = self.changing.lock();
        change(&mut self.locked.write().state)
    }

    /// As [`Self::write`], if nothing else is changing the state for long.
    pub fn try_write<T>(&self, change: impl FnOnce(&mut Applied) -> T) -> Option<T> {
        let _changing = self.changing.try_lock_for(WRITE_PATIENCE)?;
        Some(change(&mut self.locked.write().state))
    }

    /// A consistent view that later writes do not touch.
    pub fn view(&self) -> Applied {
        self.locked.read().state.clone()
    }

    /// The index of the newest applied entry.
    pub fn applied_index(&self) -> Option<u64> {
        *self.applied_index.borrow()
    }

    /// Who waits for what this member has proposed.
    pub fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// Whether alarm CORRUPT is on for some member, or for all.
    pub fn is_corrupt_somewhere(&self) -> bool {
        self.corrupt.load(Ordering::Acquire)
    }

    /// Whether users and roles count.
    pub fn is_auth_on(&self) -> bool {
        self.auth.load(Ordering::Acquire)
    }

    /// Whether clients may write: this is no standby, and none was promoted in this cluster's place.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// Whether alarm CORRUPT is on for this very member.
    pub fn is_fenced(&self, member: u64) -> bool {
        // Asked with every request, and an alarm is rare.
        self.is_corrupt_somewhere() && self.read(|s| s.kv.has_alarm_of(member, AlarmType::Corrupt))
    }

    /// The digest of the state as it was after the entry at `index`, if that is known and not long ago.
    pub fn digest_at(&self, index: u64) -> Option<u64> {
        self.locked.read().digests.at(index)
    }

    /// The term of the newest applied entry.
    pub fn applied_term(&self) -> Option<u64> {
        self.read(|s| s.log_id.as_ref().map(|id| **id.committed_leader_id()))
    }

    /// Changes whenever something was applied or the state was replaced.
    pub fn applied(&self) -> watch::Receiver<Option<u64>> {
        self.applied_index.subscribe()
    }

    /// Which state this is: it changes when a snapshot replaces the whole. Consistent with what [`Store::read`] sees if called
    /// inside of it.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Asks that compacted history from `revision` on be kept until this is called again; `i64::MAX` keeps none.
    pub fn keep_history(&self, revision: i64) {
        self.unread.store(revision, Ordering::Release);
    }

    /// Asks that the log be kept from the entry at `index` on, as far as there is room for it; `u64::MAX` keeps none.
    pub fn keep_log(&self, index: u64) {
        self.unarchived.store(index, Ordering::Release);
    }

    /// The first entry of the log that somebody still wants.
    pub fn log_wanted_from(&self) -> u64 {
        self.unarchived.load(Ordering::Acquire)
    }

    /// Whether somebody still wants history that is compacted.
    pub fn is_history_wanted(&self) -> bool {
        self.unread.load(Ordering::Acquire) < self.read(|s| s.kv.compacted())
    }

    /// Waits until the entry at `index` is applied; false if that did not happen before `deadline`.
    pub async fn wait_applied(&self, index: u64, deadline: Instant) -> bool {
        if self.applied_index() >= Some(index) {
            return true;
        }
        let mut applied = self.applied_index.subscribe();
        let reached = applied.wait_for(|at| *at >= Some(index));
        matches!(crate::env::timeout_at(deadline, reached).await, Ok(Ok(_)))
    }

    /// Takes what changed since the last call; whoever takes it must save it, or call [`Store::set_replaced`].
    pub fn take_unsaved(&self) -> Unsaved {
        let _changing = self.changing.lock();
        let mut locked = self.locked.write();
        let journal = locked.state.kv.take_journal();
        if std::mem::take(&mut locked.replaced) || journal.overflowed {
            Unsaved::Everything
        } else {
            let mut meta = locked.state.meta();
            if planted!("applied-apart-from-data")
                && let Some(applied) = &mut meta.applied
            {
                applied.index = applied.index.saturating_sub(1);
            }
            Unsaved::Changes(journal.changes, meta)
        }
    }

    /// Has the state store written afresh.
    pub fn set_replaced(&self) {
        let _changing = self.changing.lock();
        self.locked.write().replaced = true;
    }

    /// Has the state store written afresh, and waits for it; the error is a sentence. It may be done already by then for another
    /// reason, and is then done once more.
    pub async fn rewrite(&self, deadline: Instant) -> Result<(), String> {
        let mut rewrites = self.rewrites.subscribe();
        let seen = *rewrites.borrow_and_update();
        if self.read(|s| s.log_id.is_none()) {
            return Ok(());
        }
        while self.try_write(|_| ()).is_none() {
            // A long entry is being applied: who waits for it here must not hold up the event loop.
            if Instant::now() >= deadline {
                return Err("a long entry is being applied; try again".into());
            }
            crate::env::sleep(WRITE_PATIENCE * 10).await;
        }
        self.set_replaced();
        self.rewrite_asked.notify_one();
        match crate::env::timeout_at(deadline, rewrites.wait_for(|n| *n > seen)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err("the member stops".into()),
            Err(_) => Err("the state store was not written afresh in time; see the server's log".into()),
        }
    }

    /// Resolves when somebody waits for [`Self::rewrite`].
    pub(super) async fn rewrite_asked(&self) {
        self.rewrite_asked.notified().await;
    }

    /// Has what was compacted freed now, rather than at its time.
    pub fn ask_sweep(&self) {
        self.sweep_asked.notify_one();
    }

    /// Resolves when somebody has asked with [`Self::ask_sweep`].
    pub async fn sweep_asked(&self) {
        self.sweep_asked.notified().await;
    }

    pub(super) fn note_rewrite(&self) {
        self.rewrites.send_modify(|n| *n += 1);
    }

    /// Applies an entry and answers this member's own commands of it. Returns what the members are to be told that forwarded others,
    /// if these want it.
    pub(crate) fn apply(&self, entry: Entry, wanted_by_senders: bool) -> io::Result<Answers> {
        self.apply_decoded(self.decode(entry)?, wanted_by_senders)
    }

    /// Reads what is in the entry that is to be applied next.
    fn decode(&self, entry: Entry) -> io::Result<Decoded> {
        let commands = commands_of(&entry)?;
        let is_long = self.read(|s| s.kv.work_of(&commands)) > ASIDE_KEYS;
        Ok(Decoded { entry, commands, is_long })
    }

    fn apply_decoded(&self, decoded: Decoded, wanted_by_senders: bool) -> io::Result<Answers> {
        let Decoded { entry, commands, is_long } = decoded;
        let (index, term) = (entry.log_id.index(), **entry.log_id.committed_leader_id());
        let wanted = Wanted { waiters: &self.waiters, by_senders: wanted_by_senders };
        let _changing = self.changing.lock();
        let aside = if is_long { Some(self.apply_aside(entry.clone(), &commands, wanted)?) } else { None };
        let (Outcomes { own, for_senders }, before) = {
            let mut locked = self.locked.write();
            let (outcomes, before) = match aside {
                Some(Aside { state, outcomes, was_replaced }) => {
                    locked.replaced = was_replaced;
                    (outcomes, Some(std::mem::replace(&mut locked.state, state)))
                }
                None => (locked.state.apply(entry, &commands, wanted)?, None),
            };
            let digest = locked.state.kv.digest();
            locked.digests.push(digest);
            self.corrupt.store(locked.state.kv.has_alarm(AlarmType::Corrupt), Ordering::Release);
            self.auth.store(locked.state.kv.auth().is_enabled(), Ordering::Release);
            self.writable.store(locked.state.kv.is_writable(), Ordering::Release);
            if locked.state.kv.take_jumped() {
                // As after a snapshot: its journal does not lead here, and the history does not lead on.
                locked.replaced = true;
                self.generation.fetch_add(1, Ordering::AcqRel);
            }
            (outcomes, before)
        };
        drop(before);
        self.applied_index.send_replace(Some(index));
        // Last: who is answered finds all of it.
        self.waiters.applied(term, own);
        Ok(for_senders)
    }

    /// Applies an entry to a clone. The caller holds `changing`, and puts it in the state's place.
    fn apply_aside(&self, entry: Entry, commands: &[Command], wanted: Wanted<'_>) -> io::Result<Aside> {
        let (mut state, was_replaced) = {
            let mut locked = self.locked.write();
            // Should this come to no end, then not with a state whose journal is gone.
            (locked.state.take_over(), std::mem::replace(&mut locked.replaced, true))
        };
        let outcomes = state.apply(entry, commands, wanted)?;
        Ok(Aside { state, outcomes, was_replaced })
    }

    /// Counts an entry as applied that is not; for a new cluster alone (`revive`).
    pub(super) fn pass_over(&self, entry: &Entry) {
        self.locked.write().state.log_id = Some(entry.log_id);
        self.applied_index.send_replace(Some(entry.log_id.index()));
    }

    /// `asked_before`: what was asked of this member below this number may be in the new state.
    /// Returns the old one: to let go of it takes long.
    pub(crate) fn replace(&self, mut state: Applied, asked_before: u64) -> Applied {
        state.kv.keep_journal(self.journal_bytes_max);
        let index = state.log_id.as_ref().map(|l| l.index());
        let term = state.log_id.as_ref().map_or(0, |l| **l.committed_leader_id());
        let _changing = self.changing.lock();
        let old = {
            let mut locked = self.locked.write();
            self.generation.fetch_add(1, Ordering::AcqRel);
            self.corrupt.store(state.kv.has_alarm(AlarmType::Corrupt), Ordering::Release);
            self.auth.store(state.kv.auth().is_enabled(), Ordering::Release);
            self.writable.store(state.kv.is_writable(), Ordering::Release);
            let new = Locked { digests: Digests::of(&state), state, replaced: true };
            std::mem::replace(&mut *locked, new)
        };
        self.applied_index.send_replace(index);
        let ended = self.waiters.replaced(term, asked_before);
        if ended > 0 {
            tracing::info!(
                requests = ended,
                "a snapshot came in place of what was asked here, so its answers are not known"
            );
        }
        old.state
    }
}

/// openraft's handle to the [`Store`].
pub struct StateMachine {
    env: Env,
    store: Arc<Store>,
    snapshots: snapshot::Dir,
    this: Member,
}

impl StateMachine {
    pub fn new(env: Env, store: Arc<Store>, snapshots: snapshot::Dir, this: Member) -> Self {
        Self { env, store, snapshots, this }
    }
}

pub(super) fn snapshot_meta(meta: &pb::log::StateMeta) -> io::Result<SnapshotMeta> {
    Ok(SnapshotMeta {
        last_log_id: meta.applied.map(log_id_from_pb),
        last_membership: stored_membership_from_pb(meta.membership.as_ref()).map_err(invalid)?,
    })
}

type SnapshotOf = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>;

fn snapshot_of(file: SnapshotFile) -> io::Result<SnapshotOf> {
    Ok(Snapshot { meta: snapshot_meta(file.meta())?, snapshot: file })
}

/// Writes one snapshot file of the state as it was when the builder was made.
pub struct SnapshotBuilder {
    env: Env,
    snapshots: snapshot::Dir,
    this: Member,
    view: Applied,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf, io::Error> {
        let (snapshots, this, view) = (self.snapshots.clone(), self.this, std::mem::take(&mut self.view));
        let work = move || write_snapshot(&snapshots, this, &view);
        let file = self.env.long(Pool::Snapshots, work).await.map_err(io::Error::other)?;
        tracing::info!(snapshot = %file.id, bytes = file.bytes, "snapshot written");
        snapshot_of(file)
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok(self.store.read(|s| (s.log_id, s.membership.clone())))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let (decoded, wanted) = (self.store.decode(entry)?, responder.is_some());
            let answers = if decoded.is_long {
                let store = self.store.clone();
                self.env.long(Pool::Apply, move || store.apply_decoded(decoded, wanted)).await?
            } else {
                self.store.apply_decoded(decoded, wanted)?
            };
            if let Some(responder) = responder {
                responder.send(answers);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            env: self.env.clone(),
            snapshots: self.snapshots.clone(),
            this: self.this,
            view: self.store.view(),
        }
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, file: SnapshotFile) -> Result<(), io::Error> {
        let id = file.id.clone();
        // What is asked from here on comes after the snapshot in the log.
        let asked_before = self.store.waiters.next_number();
        let state = self.env.long(Pool::Snapshots, move || load_snapshot(&file, &Progress::default())).await?;
        let revision = state.kv.revision();
        self.env.drop_large(self.store.replace(state, asked_before));
        tracing::info!(snapshot = %id, revision, "snapshot installed");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf>, io::Error> {
        self.snapshots.latest().map(snapshot_of).transpose()
    }
}

/// Writes the snapshot file of `view`.
pub fn write_snapshot(
    snapshots: &snapshot::Dir,
    this: Member,
    view: &Applied,
) -> Result<SnapshotFile, snapshot::Error> {
    let mut head = Head { cluster_id: this.cluster_id, member_id: this.member_id, meta: view.meta() };
    if planted!("snapshot-without-membership") {
        head.meta.membership = None;
    }
    let mut writer = snapshots.create(head)?;
    for change in view.kv.changes() {
        writer.push(&change)?;
    }
    writer.finish()
}

/// The state that a snapshot file holds.
pub fn load_snapshot(file: &SnapshotFile, progress: &Progress) -> io::Result<Applied> {
    progress.begin("loads its state from a snapshot file", file.bytes);
    let mut loader = kv::Loader::new();
    for change in file.read().map_err(io::Error::other)? {
        let change = change.map_err(io::Error::other)?;
        progress.add(change.encoded_len() as u64);
        loader.load(change).map_err(invalid)?;
    }
    Applied::loaded(loader, file.meta())
}
