//! A member's part in the cluster's backups: it asks the leader every second whether it is its turn, and if so makes them.
//!
//! The leader appoints one member, a follower if there is one (`plan::appoint`), and another when that one is silent for 10 s or has failed
//! for 20; its answers carry its time of day, which becomes the marks in the records. A member that no leader answers stops by itself. For
//! a moment two may be at it: then both make the same chain (`archive`).
//! Invariants: nothing of this is replicated or stored but in the backups; apply, the log and requests wait for nothing here. What is held
//! is a record and some thousand marks. The log is kept until it is archived, up to twice its bound.
//! Absent: what a person is told of it (`told` says how it stands).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::archive::Archive;
use super::chain::{Chain, Cut};
use super::plan::shown as shown_time;
use super::plan::{Candidate, FAILING_MAX, Retention, SILENCE_MAX, appoint};
use super::store::{Access, Store};
use super::{Error, Result, full, millis, prune};
use crate::env::{Env, Instant, sleep, wall_clock};
use crate::identity::shown;
use crate::metrics::metrics;
use crate::node::{Node, Trust};
use crate::pb::backup::{Generation, Mark, Origin};
use crate::pb::peer::{BackupRequest, BackupResponse, Envelope};
use crate::raft::{Peers, log_id_to_pb};
use crate::storage::log::Log;
use crate::storage::snapshot;

/// Between questions to the leader, and so between marks of time.
const ASK: Duration = Duration::from_secs(1);
/// A new leader listens for so long before it appoints somebody: whoever is at it goes on.
const LISTEN: Duration = Duration::from_secs(3);
/// After a failure the store is left alone, longer each time.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Marks that wait to be archived: an hour of them.
const MARKS_MAX: usize = 3600;
/// What is kept of another member's word on why its backups fail.
const FAILURE_CHARS_MAX: usize = 1024;
/// Longest wait for a snapshot file, and for a leader that has applied what is in it.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(200);
/// Backups that are older, and six intervals old, are late.
const LATE: Duration = Duration::from_secs(60);

/// See `[backup]` in `config/quorate.toml`.
#[derive(Clone, Debug)]
pub struct Settings {
    pub url: String,
    pub access: Access,
    pub interval: Duration,
    pub full_every: Duration,
    pub keep: Retention,
    /// Bytes a second of a full backup.
    pub bandwidth: u64,
    /// Where this cluster comes from, if it was restored.
    pub origin: Option<Origin>,
}

/// What backups are made of.
#[derive(Clone)]
pub struct Parts {
    pub node: Node,
    pub log: Log,
    pub snapshots: snapshot::Dir,
    pub peers: Arc<Peers>,
}

/// How backups stand, as this member has heard.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Whose turn it is.
    pub appointed: Option<u64>,
    /// The leader's time up to which everything is archived, in milliseconds since 1970; 0: nothing yet.
    pub archived_at_millis: u64,
    pub full_at_millis: u64,
    /// The leader's time, when it was heard last.
    pub at_millis: u64,
    /// Why it fails at the member whose turn it is.
    pub failure: Option<String>,
}

/// What the leader has heard of the members.
#[derive(Default)]
struct Table {
    current: Option<u64>,
    turns: u64,
    heard: BTreeMap<u64, Heard>,
    since: Option<Instant>,
}

struct Heard {
    at: Instant,
    failing: Duration,
    turn: u64,
}

/// How this member's own turn goes.
#[derive(Default)]
struct Own {
    marks: VecDeque<Mark>,
    failing_since: Option<Instant>,
    archived_index: u64,
    full_failed: Option<String>,
}

impl Own {
    /// Lets go of the marks of what is archived, but for the newest.
    fn drop_marks(&mut self) {
        while self.marks.get(1).is_some_and(|next| next.index <= self.archived_index) {
            self.marks.pop_front();
        }
    }
}

/// See the module's head.
pub struct Duty {
    env: Env,
    parts: Parts,
    settings: Settings,
    told: Mutex<Told>,
    table: Mutex<Table>,
    own: Mutex<Own>,
    /// Whether it is this member's turn.
    turn: watch::Sender<bool>,
    started: Instant,
}

impl Duty {
    pub fn start(env: &Env, parts: Parts, settings: Settings) -> Arc<Self> {
        let duty = Arc::new(Self {
            env: env.clone(),
            parts,
            settings,
            told: Mutex::default(),
            table: Mutex::default(),
            own: Mutex::default(),
            turn: watch::Sender::new(false),
            started: Instant::now(),
        });
        env.spawn(duty.clone().ask());
        env.spawn(duty.clone().work());
        duty
    }

    pub fn told(&self) -> Told {
        self.told.lock().clone()
    }

    /// What is the matter, in a sentence, if much less is archived than should be.
    pub fn late(&self) -> Option<String> {
        if !self.parts.node.store().is_writable() {
            return None;
        }
        let (told, most) = (self.told(), LATE.max(6 * self.settings.interval));
        let age = Duration::from_millis(told.at_millis.saturating_sub(told.archived_at_millis));
        if told.at_millis == 0 || self.started.elapsed() < most || told.archived_at_millis > 0 && age < most {
            return None;
        }
        let since = match told.archived_at_millis {
            0 => "no backup was made yet".to_owned(),
            at => format!("what was written since {} is in no backup", shown_time(at)),
        };
        let nobody = "no member has said that it can make them";
        Some(format!(
            "{since}: {}",
            told.failure.as_deref().unwrap_or(if told.appointed.is_some() { "none has arrived" } else { nobody })
        ))
    }

    fn this(&self) -> u64 {
        self.parts.node.member().member_id
    }

    /// As the leader: whose turn it is.
    pub fn answer(&self, request: &BackupRequest) -> BackupResponse {
        let status = self.parts.node.status();
        if !status.is_leader {
            return BackupResponse::default();
        }
        let from = request.envelope.unwrap_or_default().from;
        let mut table = self.table.lock();
        let now = Instant::now();
        let since = *table.since.get_or_insert(now);
        let is_member = |id: &u64| status.membership.get_node(id).is_some();
        table.heard.retain(|id, _| is_member(id));
        if is_member(&from) {
            let turn = table.heard.get(&from).map_or(0, |heard| heard.turn);
            let failing = Duration::from_millis(request.failing_millis);
            table.heard.insert(from, Heard { at: now, failing, turn });
        }
        if table.current.is_none() && self.told.lock().appointed == Some(from) {
            // It was at it before this one led.
            table.current = Some(from);
        }
        if now.duration_since(since) >= LISTEN {
            self.appoint(&mut table, now);
        }
        self.hear(request, table.current == Some(from));
        let archived_index = self.own.lock().archived_index;
        let told = self.told.lock();
        BackupResponse {
            leads: true,
            appointed: table.current.unwrap_or(0),
            at_millis: millis(wall_clock()),
            applied_index: status.applied_index,
            archived_index,
            archived_at_millis: told.archived_at_millis,
            full_at_millis: told.full_at_millis,
        }
    }

    fn appoint(&self, table: &mut Table, now: Instant) {
        let this = self.this();
        let candidates: Vec<Candidate> = table
            .heard
            .iter()
            .map(|(member, heard)| Candidate {
                member: *member,
                is_leader: *member == this,
                silent: now.duration_since(heard.at),
                failing: heard.failing,
                turn: heard.turn,
            })
            .collect();
        let next = appoint(table.current, &candidates);
        if next == table.current {
            return;
        }
        table.turns += 1;
        let turn = table.turns;
        if let Some(heard) = next.and_then(|next| table.heard.get_mut(&next)) {
            heard.turn = turn;
            // What it says of an earlier turn.
            heard.failing = Duration::ZERO;
        }
        tracing::info!(
            member = next.map(|id| format!("{id:x}")),
            before = table.current.map(|id| format!("{id:x}")),
            "makes the backups"
        );
        table.current = next;
    }

    /// Takes over what another member knows of what is archived.
    fn hear(&self, request: &BackupRequest, is_appointed: bool) {
        {
            let mut own = self.own.lock();
            own.archived_index = own.archived_index.max(request.archived_index);
        }
        let mut told = self.told.lock();
        told.archived_at_millis = told.archived_at_millis.max(request.archived_at_millis);
        told.full_at_millis = told.full_at_millis.max(request.full_at_millis);
        if is_appointed {
            let failure: String = shown(&request.failure).chars().take(FAILURE_CHARS_MAX).collect();
            told.failure = Some(failure).filter(|failure| !failure.is_empty());
        }
    }

    /// Asks the leader, every second, until shutdown.
    async fn ask(self: Arc<Self>) {
        let mut answered = Instant::now();
        loop {
            tokio::select! {
                () = sleep(ASK) => {}
                () = self.env.shutdown.cancelled() => return,
            }
            match self.ask_once().await {
                Some(response) => {
                    answered = Instant::now();
                    self.follow(&response);
                }
                // Another one has been appointed by now, for all that is known here.
                None if answered.elapsed() >= SILENCE_MAX => self.set_turn(false),
                None => {}
            }
        }
    }

    async fn ask_once(&self) -> Option<BackupResponse> {
        let status = self.parts.node.status();
        if !status.is_leader {
            *self.table.lock() = Table::default();
        }
        let (leader, this) = (status.leader?, self.parts.node.member());
        let request = {
            let (own, told) = (self.own.lock(), self.told.lock());
            let failing = own.failing_since.map_or(Duration::ZERO, |since| since.elapsed());
            BackupRequest {
                envelope: Some(Envelope { cluster_id: this.cluster_id, from: this.member_id, to: leader }),
                failing_millis: failing.as_millis() as u64,
                failure: told.failure.clone().filter(|_| *self.turn.borrow()).unwrap_or_default(),
                archived_index: own.archived_index,
                archived_at_millis: told.archived_at_millis,
                full_at_millis: told.full_at_millis,
            }
        };
        let answer = if leader == this.member_id {
            self.answer(&request)
        } else {
            let address = status.membership.get_node(&leader)?.peer_address.clone();
            self.parts.peers.backup(&address, request).await.ok()?
        };
        answer.leads.then_some(answer)
    }

    fn follow(&self, response: &BackupResponse) {
        let is_own = response.appointed == self.this();
        {
            let mut told = self.told.lock();
            told.at_millis = response.at_millis;
            told.appointed = Some(response.appointed).filter(|id| *id != 0);
            told.archived_at_millis = told.archived_at_millis.max(response.archived_at_millis);
            told.full_at_millis = told.full_at_millis.max(response.full_at_millis);
            let counted = &metrics().backup;
            counted.archived.set((told.archived_at_millis / 1000) as i64);
            counted.full.set((told.full_at_millis / 1000) as i64);
            if told.archived_at_millis > 0 {
                counted.age.set((response.at_millis.saturating_sub(told.archived_at_millis) / 1000) as i64);
            }
        }
        let mut own = self.own.lock();
        own.archived_index = own.archived_index.max(response.archived_index);
        note_mark(&mut own.marks, Mark { index: response.applied_index, at_millis: response.at_millis });
        own.drop_marks();
        let is_kept = own.archived_index > 0 && self.parts.node.store().is_writable();
        let wanted = if is_kept { own.archived_index + 1 } else { u64::MAX };
        drop(own);
        self.parts.node.store().keep_log(wanted);
        self.set_turn(is_own);
    }

    fn set_turn(&self, is_own: bool) {
        metrics().backup.active.set(is_own.into());
        self.turn.send_if_modified(|turn| std::mem::replace(turn, is_own) != is_own);
    }

    /// Makes the backups while it is this member's turn, until shutdown.
    async fn work(self: Arc<Self>) {
        let mut turn = self.turn.subscribe();
        loop {
            tokio::select! {
                began = turn.wait_for(|is_own| *is_own) => if began.is_err() { return },
                () = self.env.shutdown.cancelled() => return,
            }
            tokio::select! {
                () = self.turn() => {}
                _ = turn.wait_for(|is_own| !is_own) => {}
                () = self.env.shutdown.cancelled() => return,
            }
            let mut own = self.own.lock();
            (own.failing_since, own.full_failed) = (None, None);
            drop(own);
            self.told.lock().failure = None;
        }
    }

    /// Tries again and again; never ends by itself.
    async fn turn(&self) {
        let mut pause = RETRY;
        loop {
            while !self.parts.node.store().is_writable() {
                // A standby has its source's, and who was superseded has no right to the path.
                sleep(LOOK).await;
            }
            let begin = Instant::now();
            let Err(error) = self.session().await;
            self.fail(&error);
            // It had worked for a while.
            if begin.elapsed() > FAILING_MAX {
                pause = RETRY;
            }
            sleep(self.env.jitter(pause)).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    fn fail(&self, error: &Error) {
        metrics().backup.failures.inc();
        self.own.lock().failing_since.get_or_insert_with(Instant::now);
        let sentence = error.to_string();
        let mut told = self.told.lock();
        if told.failure.as_ref() != Some(&sentence) {
            tracing::warn!(error = sentence, "no backup could be made; it is tried again");
            told.failure = Some(sentence);
        }
    }

    fn succeed(&self, archived: u64, marks: &VecDeque<Mark>) {
        let mut own = self.own.lock();
        own.archived_index = own.archived_index.max(archived);
        let reached = marks.iter().take_while(|mark| mark.index <= archived).last().copied();
        let full_failed = own.full_failed.clone();
        let failed = if full_failed.is_some() { own.failing_since } else { own.failing_since.take() };
        drop(own);
        let mut told = self.told.lock();
        told.archived_at_millis = told.archived_at_millis.max(reached.map_or(0, |mark| mark.at_millis));
        if let Some(since) = failed.filter(|_| full_failed.is_none()) {
            tracing::info!(took = ?since.elapsed(), "backups are made again");
        }
        told.failure = full_failed;
    }

    /// Archives once an interval, and beside that makes full backups; ends by an error.
    async fn session(&self) -> Result<std::convert::Infallible> {
        let archive = Archive::new(Store::open(&self.env, &self.settings.url, &self.settings.access)?);
        archive.store().check().await?;
        let cluster_id = self.parts.node.member().cluster_id;
        let generation = archive.claim(cluster_id, self.settings.origin.as_ref()).await?;
        let mut chain = Chain::open(&archive, &generation).await?;
        let mut newest =
            archive.fulls(generation.number).await?.into_iter().flatten().max_by_key(|full| full.applied().index);
        if let Some(full) = &newest {
            let mut told = self.told.lock();
            told.full_at_millis = told.full_at_millis.max(full.full.at_millis);
        }
        loop {
            let begin = Instant::now();
            self.archive(&mut chain).await?;
            let is_due = newest.as_ref().is_none_or(|full| {
                let age = millis(wall_clock()).abs_diff(full.full.at_millis);
                full.applied().index < chain.unbroken_since() || age >= self.settings.full_every.as_millis() as u64
            });
            if is_due {
                newest = Some(self.beside_full(&mut chain, &generation).await?);
                continue;
            }
            sleep(self.settings.interval.saturating_sub(begin.elapsed())).await;
        }
    }

    /// Archives what was committed since the last time.
    async fn archive(&self, chain: &mut Chain) -> Result<()> {
        let node = &self.parts.node;
        if !node.store().is_writable() {
            return Err(Error::Refused(
                "another cluster was promoted in the place of this one, which archives nothing any more".into(),
            ));
        }
        if node.trust() == Trust::Fenced {
            return Err(Error::Refused(
                "this member's data differs from the majority's (alarm CORRUPT), so it archives none".into(),
            ));
        }
        let (applied, revision, digest) = node.store().read(|s| (s.log_id, s.kv.revision(), s.kv.digest_to_pb()));
        let Some(applied) = applied.as_ref().map(log_id_to_pb) else { return Ok(()) };
        self.compare(applied.index).await?;
        let mut marks = self.own.lock().marks.clone();
        chain.extend(&self.parts.log, node.store(), Cut { applied, revision, digest }, &mut marks).await?;
        self.succeed(chain.end_index(), &marks);
        self.own.lock().drop_marks();
        Ok(())
    }

    /// Refuses to archive what the leader has otherwise. A leader compares itself with the others all the time (`cluster::audit`).
    async fn compare(&self, index: u64) -> Result<()> {
        let (node, status) = (&self.parts.node, self.parts.node.status());
        let leader = status.leader.filter(|leader| *leader != self.this());
        let Some(address) = leader.and_then(|id| status.membership.get_node(&id)).map(|node| node.peer_address.clone())
        else {
            return Ok(());
        };
        let Ok(who) = self.parts.peers.digest(&address, self.env.random_u64(), index).await else { return Ok(()) };
        match (who.digest.filter(|_| Some(who.member_id) == leader), node.store().digest_at(index)) {
            (Some(theirs), Some(own)) if theirs != own => Err(Error::Refused(format!(
                "after log entry {index} this member's data differs from the leader's, so it archives none"
            ))),
            _ => Ok(()),
        }
    }

    /// Makes a full backup, and goes on archiving meanwhile.
    async fn beside_full(&self, chain: &mut Chain, generation: &Generation) -> Result<super::archive::NamedFull> {
        let (archive, record, since) = (chain.archive().clone(), chain.number(), chain.unbroken_since());
        let making = self.full(&archive, generation, record, since);
        tokio::pin!(making);
        loop {
            let made = tokio::select! {
                made = &mut making => made,
                () = sleep(self.settings.interval) => {
                    self.archive(chain).await?;
                    continue;
                }
            };
            if let Err(error) = &made {
                self.own.lock().full_failed = Some(format!("full backup: {error}"));
            }
            let full = made?;
            self.own.lock().full_failed = None;
            metrics().backup.fulls.inc();
            {
                let mut told = self.told.lock();
                told.full_at_millis = told.full_at_millis.max(full.full.at_millis);
            }
            tracing::info!(
                object = full.name,
                revision = full.full.revision,
                bytes = full.full.bytes,
                "full backup made"
            );
            let pruned = prune::prune(&archive, &self.settings.keep, false).await?;
            if pruned != prune::Pruned::default() {
                tracing::info!(fulls = pruned.fulls.len(), records = pruned.records, "older backups removed");
            }
            return Ok(full);
        }
    }

    async fn full(
        &self,
        archive: &Archive,
        generation: &Generation,
        record: u64,
        since: u64,
    ) -> Result<super::archive::NamedFull> {
        let file = self.snapshot(since).await?;
        let applied = file.meta().applied.unwrap_or_default();
        self.compare(applied.index).await?;
        let at_millis = self.time_of(applied.index).await?;
        let source = full::Source { file: file.file(), name: file.id.clone(), bytes: file.bytes };
        let beside =
            full::Beside { generation: generation.number, record, at_millis, bandwidth: self.settings.bandwidth };
        full::write(archive, source, beside).await
    }

    /// A new snapshot file of this member's, of all that it has applied by now.
    async fn snapshot(&self, since: u64) -> Result<snapshot::SnapshotFile> {
        let node = &self.parts.node;
        let wanted = node.store().applied_index().unwrap_or(0).max(since);
        let begin = Instant::now();
        let mut asked: Option<Instant> = None;
        loop {
            if let Some(file) = self.parts.snapshots.latest()
                && file.meta().applied.is_some_and(|applied| applied.index >= wanted)
            {
                return Ok(file);
            }
            if begin.elapsed() > SNAPSHOT_PATIENCE {
                return Err(Error::Refused(
                    "this member has written no snapshot file in time; its log says why".into(),
                ));
            }
            if asked.is_none_or(|at| at.elapsed() >= RETRY_MAX) {
                asked = Some(Instant::now());
                // It may stop in this moment.
                let _ = node.raft().trigger().snapshot().await;
            }
            sleep(LOOK).await;
        }
    }

    /// A time of the leader's at which it had applied the entry at `index`.
    async fn time_of(&self, index: u64) -> Result<u64> {
        let begin = Instant::now();
        while begin.elapsed() < SNAPSHOT_PATIENCE {
            let mark = self.own.lock().marks.back().copied();
            if let Some(mark) = mark.filter(|mark| mark.index >= index) {
                return Ok(mark.at_millis);
            }
            sleep(LOOK).await;
        }
        Err(Error::Refused("no leader has said that it applied what is in the snapshot".into()))
    }
}

/// Adds a mark. While nothing is applied the first and the last one say all; too many are thinned out.
fn note_mark(marks: &mut VecDeque<Mark>, mark: Mark) {
    if marks.back().is_some_and(|last| last.index > mark.index) {
        // A leader that was deposed, or is behind: later ones know more.
        return;
    }
    if marks.len() >= 2 && marks.iter().rev().take(2).all(|last| last.index == mark.index) {
        marks.pop_back();
    }
    marks.push_back(mark);
    if marks.len() > MARKS_MAX {
        let mut place = 0;
        marks.retain(|_| {
            place += 1;
            place % 2 == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_few_while_nothing_happens_and_bounded_when_nobody_takes_them() {
        let mark = |index, at_millis| Mark { index, at_millis };
        let mut marks = VecDeque::new();
        for (index, at) in [(1, 10), (1, 20), (1, 30), (1, 40), (2, 50), (1, 60), (3, 70)] {
            note_mark(&mut marks, mark(index, at));
        }
        assert_eq!(marks, [mark(1, 10), mark(1, 40), mark(2, 50), mark(3, 70)]);
        for index in 4..20_000 {
            note_mark(&mut marks, mark(index, index * 10));
        }
        assert!(marks.len() <= MARKS_MAX && marks.back() == Some(&mark(19_999, 199_990)), "{}", marks.len());
    }
}
