//! The leader's hand on the membership: observes, plans, carries out one change, and observes again.
//!
//! Every member runs one; it works while its member leads. Who asks to join is answered at its desk (`join`). Nothing is remembered that a new
//! leader would need: durations start anew, and the plan is computed from what is seen (`plan`).
//! What a person asks for (`manual`) goes before the plan's own wish, through the same gate and one change at a time.
//! Invariants: a change names the membership it was planned on, so that two leaders cannot both apply theirs.
//! Absent: who knows the wanted size (`wanted`, `kv`), and the way of an operation to the leader (`manage`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::formation::Expand;
use super::join::{Desk, Standing};
use super::manual::{self, Operation, Verdict};
use super::peers::{self, Unreachable};
use super::plan::{Change, Health, Ids, Limits, Members, Observed, Plan, label, plan};
use super::view::{self, Wish};
use super::wanted::{Notice, Watch};
use super::{manual::timed_out, slot_of};
use crate::caller::Caller;
use crate::env::{Instant, interval, timeout, timeout_at};
use crate::error::Error;
use crate::kv;
use crate::node::{MembershipChange, Node, Status};
use crate::pb::admin::{Condition, MembershipView, Remark};
use crate::pb::log::{Command, SetClusterVersion, StoredMembership, command};
use crate::pb::peer::{Envelope, JoinRequest, JoinResponse, ManageRequest, WhoResponse, manage_request};
use crate::raft::{Peers, log_id_from_pb, log_id_to_pb, membership_to_pb};

const TICK: Duration = Duration::from_millis(250);
const WHO_PATIENCE: Duration = Duration::from_millis(500);
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// A follower keeps up if its log lacks no more than what is normally in flight.
const CAUGHT_UP_ENTRIES: u64 = 64;
/// Operations by hand that wait; a further one is told so.
const OPERATIONS_MAX: usize = 16;
/// Reasons that pass by themselves within moments, at every change: no news to anybody.
pub const PASSES: [&str; 3] = ["change-in-flight", "leader-is-new", "second-observation"];
/// What a member has to hear that it is being removed by hand.
const STAY_OUT_PATIENCE: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub struct Settings {
    /// The address of a slot; `None` without a peer pattern.
    pub expand: Option<Expand>,
    pub max_voters: usize,
    pub failure_timeout: Duration,
    pub promote_after: Duration,
    /// Who has not acknowledged anything for so long does not count for a change: the longest election timeout.
    pub silence_max: Duration,
    pub takes_readers: bool,
    pub reader_ttl: Duration,
    pub max_readers: usize,
    /// Who says how many members there should be; `None` outside of Kubernetes.
    pub wanted: Option<Watch>,
}

/// See the module's head.
pub struct Reconciler {
    node: Node,
    peers: Arc<Peers>,
    settings: Settings,
    desk: Desk,
    operations: mpsc::Sender<Pending>,
    incoming: Mutex<Option<mpsc::Receiver<Pending>>>,
    shown: Mutex<Shown>,
    /// On the leader: voters whose log takes nothing of clients any more.
    log_full: Mutex<Ids>,
}

/// Conditions that one member may tell of itself, and characters of the words of each.
const CONDITIONS_MAX: usize = 32;
const CONDITION_CHARS_MAX: usize = 1024;

/// What a member has told the leader when it was asked last.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Why it did not answer as who it is; `None` if it did.
    pub silent_why: Option<String>,
    /// What it has found of itself.
    pub conditions: Vec<Condition>,
    pub disk_free_bytes: u64,
    pub data_bytes: u64,
}

impl Told {
    fn new(member: u64, answer: Option<&Result<WhoResponse, Unreachable>>) -> Self {
        let silent = |why: String| Self { silent_why: Some(why), ..Self::default() };
        match answer {
            Some(Ok(who)) if who.member_id == member => Self {
                silent_why: None,
                conditions: who.conditions.iter().take(CONDITIONS_MAX).map(bounded).collect(),
                disk_free_bytes: who.disk_free_bytes,
                data_bytes: who.db_bytes.max(0) as u64,
            },
            Some(Ok(who)) => silent(format!("at its address member {:016x} answers", who.member_id)),
            Some(Err(Unreachable(why))) => silent(why.clone()),
            None => silent("it was not asked".into()),
        }
    }
}

/// What a peer has said, cut to what is kept of it.
fn bounded(condition: &Condition) -> Condition {
    let cut = |text: &String| crate::identity::shown(text).chars().take(CONDITION_CHARS_MAX).collect::<String>();
    Condition {
        name: cut(&condition.name),
        severity: cut(&condition.severity),
        subjects: condition.subjects.iter().take(CONDITIONS_MAX).map(cut).collect(),
        sentence: cut(&condition.sentence),
        remedy: cut(&condition.remedy),
        since: condition.since,
    }
}

/// What the leader shows beside Raft's state; empty on others.
#[derive(Default)]
struct Shown {
    observed: Option<Arc<Observed>>,
    told: BTreeMap<u64, Told>,
    /// The change that is made, or was made last.
    change: String,
    blocked: Option<Remark>,
}

/// An operation by hand that is not done yet.
struct Pending {
    operation: Operation,
    begun: bool,
    deadline: Instant,
    reply: oneshot::Sender<Result<(), Error>>,
}

/// What the leader has seen of one member since it leads.
struct Seen {
    last_sign: Instant,
    caught_up_since: Option<Instant>,
}

impl Reconciler {
    pub fn new(node: Node, peers: Arc<Peers>, settings: Settings) -> Arc<Self> {
        let (operations, incoming) = mpsc::channel(OPERATIONS_MAX);
        let incoming = Mutex::new(Some(incoming));
        Arc::new(Self {
            node,
            peers,
            settings,
            desk: Desk::default(),
            operations,
            incoming,
            shown: Mutex::default(),
            log_full: Mutex::default(),
        })
    }

    /// Why a wanted change is not made; `None` if none is wanted or it is under way.
    pub fn blocked(&self) -> Option<Remark> {
        self.shown.lock().blocked.clone()
    }

    /// What the leader observed last; `None` on others.
    pub fn observed(&self) -> Option<Arc<Observed>> {
        self.shown.lock().observed.clone()
    }

    /// What each member but the leader has told; empty on others.
    pub fn told(&self) -> BTreeMap<u64, Told> {
        self.shown.lock().told.clone()
    }

    /// The wanted size is read anew at once.
    pub fn hurry(&self) {
        if let Some(watch) = &self.settings.wanted {
            watch.hurry();
        }
    }

    /// What this member knows of the membership; the leader knows most.
    pub fn view(&self) -> MembershipView {
        let status = self.node.status();
        let this = self.node.member();
        let mut view = view::of_member(this.cluster_id, this.member_id, &status, &members(&status));
        view.cluster_version = self.node.store().read(|s| s.kv.cluster_version());
        let wish = self.wish();
        view.wanted = Some(wish.shown);
        view.remarks.extend(wish.remark);
        let shown = self.shown.lock();
        if let Some(observed) = &shown.observed {
            view::add_observed(&mut view, observed);
            view.change = shown.change.clone();
            view.blocked = shown.blocked.clone();
        }
        view
    }

    fn wish(&self) -> Wish {
        let source = self.settings.wanted.as_ref().map(|watch| (watch.source().name(), watch.reading()));
        view::wish(source, self.node.store().read(|s| s.kv.wanted_size()))
    }

    /// Has the leader carry out an operation by hand; answers when it is done, refused, or `deadline` has come.
    pub async fn operate(&self, operation: Operation, deadline: Instant) -> Result<(), Error> {
        let (reply, done) = oneshot::channel();
        let pending = Pending { operation, begun: false, deadline, reply };
        self.operations.try_send(pending).map_err(|_| Error::TooManyRequests)?;
        match timeout_at(deadline + CHANGE_PATIENCE, done).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::Timeout),
        }
    }

    /// Handler of `Join`.
    pub fn join(&self, request: JoinRequest) -> JoinResponse {
        let status = self.node.status();
        let leader = status.leader.and_then(|id| status.membership.get_node(&id));
        let members = if status.membership_committed { members(&status) } else { Members::default() };
        self.desk.answer(
            request,
            &Standing {
                cluster_id: self.node.member().cluster_id,
                leads: status.is_leader,
                takes_readers: self.settings.takes_readers,
                leader_address: leader.map(|node| node.peer_address.clone()).unwrap_or_default(),
                members: &members,
                blocked: self.blocked().map(|remark| remark.sentence),
            },
        )
    }

    /// Works while this member leads, until shutdown.
    pub async fn run(self: Arc<Self>) {
        let shutdown = self.node.env().shutdown.clone();
        let mut tick = interval(TICK);
        let mut seen = BTreeMap::new();
        let mut term = None;
        let mut incoming = self.incoming.lock().take().expect("a reconciler runs once");
        let mut pending = Vec::new();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.desk.asked().notified() => {}
                Some(operation) = incoming.recv(), if pending.len() < OPERATIONS_MAX => pending.push(operation),
                () = shutdown.cancelled() => return,
            }
            let status = self.node.status();
            if !status.is_leader {
                term = None;
                *self.shown.lock() = Shown::default();
                pending.drain(..).for_each(|p: Pending| drop(p.reply.send(Err(Error::NotLeader))));
                self.node.space().quorum_low_disk.store(false, Ordering::Relaxed);
                self.node.space().quorum_log_full.store(false, Ordering::Relaxed);
                continue;
            }
            if term.replace(status.term) != Some(status.term) {
                seen.clear();
            }
            tokio::select! {
                () = self.step(&status, &mut seen, &mut pending) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn step(&self, status: &Status, seen: &mut BTreeMap<u64, Seen>, pending: &mut Vec<Pending>) {
        let observed = Arc::new(self.observe(status, seen).await);
        self.shown.lock().observed = Some(observed.clone());
        if let Some((at, change, hands_over)) = next_operation(&observed, pending) {
            if let Operation::Remove { id } = pending[at].operation {
                self.tell_to_stay_out(&observed, id).await;
            }
            if self.make(&observed, change).await {
                pending[at].begun = true;
                if hands_over {
                    // Whoever leads now is asked by the caller.
                    drop(pending.remove(at).reply.send(Err(Error::NotLeader)));
                }
            }
            self.desk.asked().notify_one();
            return;
        }
        if let Some(to) = self.leads_better(&observed) {
            self.make(&observed, Change::TransferLeader { to }).await;
            return;
        }
        match plan(&observed) {
            Plan::Nothing => self.set_blocked(None),
            Plan::Blocked(reason) => self.set_blocked(Some(view::remark(reason.name(), reason.to_string()))),
            Plan::Change(change) => {
                self.make(&observed, change).await;
            }
        }
        self.raise_cluster_version(status).await;
    }

    /// Carries out a change, and says so; false if it failed.
    async fn make(&self, observed: &Observed, change: Change) -> bool {
        let text = describe(&change, &observed.membership);
        tracing::info!(?change, what = text, "membership change");
        self.shown.lock().change = text.clone();
        let result = self.execute(observed, change).await;
        match &result {
            Ok(()) => self.tell("membership-change", text),
            Err(error) => tracing::warn!(error, "membership change failed; it is planned anew"),
        }
        let failed =
            |error: String| view::remark("change-failed", format!("the change failed and is planned anew: {error}"));
        self.set_blocked(result.clone().err().map(failed));
        result.is_ok()
    }

    fn set_blocked(&self, reason: Option<Remark>) {
        self.shown.lock().blocked = reason;
    }

    fn tell(&self, name: &str, sentence: String) {
        if let Some(watch) = &self.settings.wanted {
            self.node.env().spawn(watch.source().tell(Notice { name: name.to_owned(), sentence, warning: false }));
        }
    }

    /// A member that is removed by hand must not come back by itself; it is told before, for later it may not hear.
    async fn tell_to_stay_out(&self, observed: &Observed, id: u64) {
        let Some(node) = observed.membership.nodes.get(&id).filter(|_| id != observed.leader) else { return };
        let this = self.node.member();
        let request = ManageRequest {
            envelope: Some(Envelope { cluster_id: this.cluster_id, from: this.member_id, to: id }),
            operation: Some(manage_request::Operation::StayOut(id)),
        };
        let told = timeout(STAY_OUT_PATIENCE, self.peers.manage(&node.peer_address, request, STAY_OUT_PATIENCE)).await;
        if !matches!(told, Ok(Ok(_))) {
            tracing::info!(member = format!("{id:016x}"), "did not hear that it is removed by hand");
        }
    }

    async fn observe(&self, status: &Status, seen: &mut BTreeMap<u64, Seen>) -> Observed {
        let membership = members(status);
        let env = self.node.env();
        self.desk.dial(env, &self.peers, self.settings.expand.as_ref(), WHO_PATIENCE).await;
        let joiners = self.desk.joiners();
        let mut addresses: BTreeMap<String, ()> =
            membership.nodes.values().map(|node| (node.peer_address.clone(), ())).collect();
        let slots: BTreeSet<u64> =
            membership.nodes.keys().chain(joiners.iter().map(|j| &j.member_id)).map(|id| slot_of(*id)).collect();
        if let Some(expand) = &self.settings.expand {
            addresses.extend(slots.iter().filter_map(|slot| Some((expand(*slot)?, ()))));
        }
        let asks = addresses.into_keys().map(|address| async move {
            let answer = peers::who(env, &self.peers, &address, WHO_PATIENCE).await;
            (address, answer)
        });
        let answers: BTreeMap<String, Result<WhoResponse, Unreachable>> = join_all(asks).await.into_iter().collect();
        self.note_space(&membership, &answers);
        let this = self.node.member().member_id;
        let others = membership.nodes.iter().filter(|(id, _)| **id != this);
        self.shown.lock().told =
            others.map(|(id, node)| (*id, Told::new(*id, answers.get(&node.peer_address)))).collect();
        let health = self.health(status, &membership, &answers, seen);
        let at =
            |slot: u64| -> Option<&WhoResponse> { answers.get(&self.settings.expand.as_ref()?(slot)?)?.as_ref().ok() };
        Observed {
            leader: self.node.member().member_id,
            committed_in_term: status.committed_term == status.term,
            in_flight: !status.membership_committed,
            health,
            slots: slots.iter().filter_map(|slot| Some((*slot, at(*slot)?.member_id))).collect(),
            joiners,
            membership,
            wanted: self.wish().slots,
            limits: Limits {
                max_voters: self.settings.max_voters,
                failure_timeout: self.settings.failure_timeout,
                stable_for: self.settings.promote_after,
                reader_ttl: Some(self.settings.reader_ttl),
                max_readers: self.settings.max_readers,
            },
        }
    }

    fn health(
        &self,
        status: &Status,
        membership: &Members,
        answers: &BTreeMap<String, Result<WhoResponse, Unreachable>>,
        seen: &mut BTreeMap<u64, Seen>,
    ) -> BTreeMap<u64, Health> {
        let now = Instant::now();
        let mut health = BTreeMap::new();
        for (id, node) in &membership.nodes {
            let answer = answers.get(&node.peer_address).and_then(|a| a.as_ref().ok());
            let own = answer.filter(|who| who.member_id == *id);
            let acked = status.acked.get(id).copied().flatten();
            let matched = status.matched.iter().find(|(member, _)| member == id).and_then(|(_, index)| *index);
            let lag_entries = status.last_log_index.saturating_sub(matched.unwrap_or(0));
            let entry = seen.entry(*id).or_insert(Seen { last_sign: now, caught_up_since: None });
            // Both: what was acknowledged just before a crash looks healthy, and a change that counts on it is stuck.
            let reachable = own.is_some() && acked.is_some_and(|age| age <= self.settings.silence_max);
            if let Some(age) = acked {
                entry.last_sign = entry.last_sign.max(now - age);
            }
            let keeps_up = reachable && matched.is_some() && lag_entries <= CAUGHT_UP_ENTRIES;
            entry.caught_up_since = match entry.caught_up_since {
                // Under load a follower is always a little behind: it has kept up until it falls far behind.
                Some(since) if reachable && lag_entries <= 16 * CAUGHT_UP_ENTRIES => Some(since),
                _ if keeps_up => Some(now),
                _ => None,
            };
            health.insert(
                *id,
                Health {
                    reachable,
                    silent_for: now - entry.last_sign,
                    caught_up_for: entry.caught_up_since.map(|since| now - since),
                    lag_entries,
                    address_answers: answer.map(|who| who.member_id),
                    announces: own.and_then(|who| who.node.clone()),
                    version: own.map(|who| who.version.clone()).unwrap_or_default(),
                },
            );
        }
        seen.retain(|id, _| membership.nodes.contains_key(id));
        health
    }

    /// Puts are refused before proposing when the voters that have disk left are no quorum; everything of clients, when those whose log
    /// takes more are none.
    fn note_space(&self, membership: &Members, answers: &BTreeMap<String, Result<WhoResponse, Unreachable>>) {
        let (this, space) = (self.node.member().member_id, self.node.space());
        let short = |own: bool, of_other: fn(&WhoResponse) -> bool| -> Ids {
            let is_short = |id: &u64| {
                if *id == this {
                    return own;
                }
                let answer = membership.nodes.get(id).and_then(|node| answers.get(&node.peer_address));
                answer.and_then(|a| a.as_ref().ok()).is_some_and(|who| who.member_id == *id && of_other(who))
            };
            membership.voters().into_iter().filter(is_short).collect()
        };
        let is_no_quorum_left = |short: &Ids| {
            let left = |voters: &Ids| voters.difference(short).count();
            membership.configs.iter().any(|voters| left(voters) < voters.len() / 2 + 1)
        };
        let low_disk = short(space.low_disk.load(Ordering::Relaxed), |who| who.low_space);
        let log_full = short(space.is_log_full(), |who| who.log_full);
        space.quorum_low_disk.store(is_no_quorum_left(&low_disk), Ordering::Relaxed);
        space.quorum_log_full.store(is_no_quorum_left(&log_full), Ordering::Relaxed);
        *self.log_full.lock() = log_full;
    }

    /// A leader whose own log is full, where a quorum's is not, can propose nothing: another one leads.
    fn leads_better(&self, observed: &Observed) -> Option<u64> {
        let space = self.node.space();
        let alone = space.is_log_full() && !space.quorum_log_full.load(Ordering::Relaxed);
        let full = self.log_full.lock().clone();
        alone.then(|| observed.successor(&full)).flatten()
    }

    async fn execute(&self, observed: &Observed, change: Change) -> Result<(), String> {
        let mut request = MembershipChange {
            expected: observed.membership.log_id.map(log_id_from_pb),
            patience: CHANGE_PATIENCE,
            ..MembershipChange::default()
        };
        match &change {
            Change::TransferLeader { to } => return self.node.transfer_leader(*to).await.map_err(|e| e.to_string()),
            Change::AddLearner { id, node } => request.add_learners.push((*id, node.clone())),
            Change::UpdateNode { id, node } | Change::Claim { id, node } => request.set_nodes.push((*id, node.clone())),
            Change::RemoveLearners { ids } => request.remove_learners = ids.clone(),
            _ => {
                let (voters, retain) =
                    change.voters_after(&observed.membership).expect("every other change is about voters");
                (request.voters, request.retain) = (Some(voters), retain);
            }
        }
        self.node.change_membership(request).await
    }

    /// Rule 29: the cluster version is the least that all members know, raised by the leader.
    async fn raise_cluster_version(&self, status: &Status) {
        let there = status.membership.nodes().filter(|(_, node)| !node.is_awaited());
        let known = there.map(|(_, node)| node.apply_version).min().unwrap_or(0);
        let version = known.min(kv::apply_version());
        if version <= self.node.store().read(|s| s.kv.cluster_version()) {
            return;
        }
        let request = command::Request::SetClusterVersion(SetClusterVersion { version });
        match self.node.propose(&Caller::Internal, Command::new(kv::CLUSTER_VERSION_MIN, request)).await {
            Ok(_) => tracing::info!(version, "cluster version raised"),
            Err(error) => tracing::warn!(%error, "cluster version not raised; tried again"),
        }
    }
}

/// Answers what is done or refused, and finds the next change that an operation by hand needs: its place, the change, and whether
/// leadership goes with it.
fn next_operation(observed: &Observed, pending: &mut Vec<Pending>) -> Option<(usize, Change, bool)> {
    let mut at = 0;
    while at < pending.len() {
        let answer = match manual::judge(observed, &pending[at].operation, pending[at].begun) {
            Verdict::Do(change) => return Some((at, change, false)),
            Verdict::HandOver(change) => return Some((at, change, true)),
            Verdict::Wait(reason) if Instant::now() >= pending[at].deadline => Err(timed_out(&reason)),
            Verdict::Wait(_) => {
                at += 1;
                continue;
            }
            Verdict::Done => Ok(()),
            Verdict::Refuse(error) => Err(error),
        };
        drop(pending.remove(at).reply.send(answer));
    }
    None
}

/// A change in words: what is done, and to whom.
fn describe(change: &Change, members: &Members) -> String {
    let name = |id: &u64| match members.nodes.get(id) {
        Some(node) => format!("{} ({id:016x})", node.name),
        None => format!("{id:016x}"),
    };
    let names = |ids: &Ids| ids.iter().map(name).collect::<Vec<_>>().join(", ");
    let whom = match change {
        Change::FinishJoint { voters } | Change::RollbackJoint { voters } => names(voters),
        Change::AddLearner { id, node } => format!("{} ({id:016x})", node.name),
        Change::UpdateNode { id, .. } => name(id),
        Change::Claim { id, node } => format!("{id:016x} to {}", node.name),
        Change::Promote { ids }
        | Change::RemoveVoters { ids }
        | Change::RemoveLearners { ids }
        | Change::Demote { ids } => names(ids),
        Change::ReplaceVoter { old, new, .. } => format!("{} by {}", name(old), name(new)),
        Change::TransferLeader { to } => format!("to {}", name(to)),
    };
    format!("{}: {whom}", label(change))
}

/// The newest membership that this member knows, in the form that planning wants.
pub fn members(status: &Status) -> Members {
    Members::from(&StoredMembership {
        log_id: status.membership.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(status.membership.membership())),
    })
}
