//! Looks at what the modules below know, twice a second, and keeps the list.
//!
//! Owns the only place where conditions are logged (one line when one begins, one when it ends) and made Events of: a member tells of its
//! own ones, the leader of the cluster's. Who loses the leadership says nothing of those any more: the next leader does.
//! Invariants: looking costs a few locks; what is heard of others is bounded. Absent: what is shown of it (`api`, `http`, `cli`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};

use super::find::{self, Cluster, Own, Running, Space};
use super::history::{History, Known, Members};
use super::kinds::{self, Severity};
use super::ledger::{Found, Ledger, Turn, What};
use super::{is_wrong, merge, runbook};
use crate::backup::{Duty, Follower};
use crate::cluster::wanted::Watch;
use crate::cluster::{Audit, Bootstrap, Manager, Notice, Reconciler, Wanted};
use crate::env::{Env, Instant, WallTime, interval, wall_clock};
use crate::node::Node;
use crate::pb::admin::{Condition, Event, MembershipView, Remark};
use crate::pb::log::node::Kind;
use crate::secure;
use crate::storage::Progress;

const LOOK: Duration = Duration::from_millis(500);
/// Looks between two questions to the leader.
const LOOKS_PER_QUESTION: u32 = 2;
/// Without a leader for so many of the longest elections, there is none.
const ELECTIONS: u32 = 3;

/// What a process has, whichever member it is.
pub struct Parts {
    pub env: Env,
    pub name: String,
    pub bootstrap: Arc<Bootstrap>,
    pub progress: Progress,
    pub wanted: Option<Watch>,
    pub tls: secure::Ports,
    pub election_timeout_max: Duration,
    pub heartbeat_interval: Duration,
    pub disk_reserve_bytes: u64,
}

/// What it has while it is a member that runs Raft.
#[derive(Clone)]
pub struct Life {
    pub node: Node,
    pub manager: Arc<Manager>,
    pub reconciler: Arc<Reconciler>,
    pub audit: Arc<Audit>,
    pub backup: Option<Arc<Duty>>,
    pub follower: Arc<Follower>,
}

type Source = Box<dyn Fn() -> Vec<Found> + Send + Sync>;

/// The list; cloning shares it.
#[derive(Clone)]
pub struct Conditions(Arc<Inner>);

struct Inner {
    parts: Parts,
    sources: RwLock<Vec<Source>>,
    life: RwLock<Option<Life>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    own: Ledger,
    cluster: Ledger,
    history: History,
    /// The leader's view, where another leads.
    heard: Option<MembershipView>,
    leads: bool,
    /// Since when no leader is known.
    lost_at: Option<Instant>,
    /// The change that was told of last.
    change: String,
}

impl Conditions {
    pub fn new(parts: Parts) -> Self {
        let (sources, life, state) = Default::default();
        Self(Arc::new(Inner { parts, sources, life, state }))
    }

    /// Asks `source` too at each look; it must be quick. See the module's head.
    pub fn add_source(&self, source: impl Fn() -> Vec<Found> + Send + Sync + 'static) {
        self.0.sources.write().push(Box::new(source));
    }

    /// From now on `life` is looked at; `None` while this member runs no Raft.
    pub fn set_life(&self, life: Option<Life>) {
        *self.0.life.write() = life;
        let mut state = self.0.state.lock();
        state.history.forget_members();
        state.cluster.clear();
        (state.heard, state.leads, state.lost_at) = (None, false, None);
    }

    /// Looks until shutdown.
    pub async fn run(self) {
        let shutdown = self.0.parts.env.shutdown.clone();
        let mut tick = interval(LOOK);
        let mut looks = 0_u32;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS_PER_QUESTION) {
                tokio::select! {
                    () = self.ask_leader() => {}
                    () = shutdown.cancelled() => return,
                }
            }
            self.look();
        }
    }

    /// What the leader sees, where another member leads.
    async fn ask_leader(&self) {
        let Some(life) = self.life() else { return };
        let status = life.node.status();
        let heard = match status.leader {
            Some(leader) if leader != life.node.member().member_id => {
                Some(life.manager.view().await).filter(|view| view.member_id == leader)
            }
            _ => None,
        };
        self.0.state.lock().heard = heard;
    }

    fn life(&self) -> Option<Life> {
        self.0.life.read().clone()
    }

    fn look(&self) {
        let parts = &self.0.parts;
        // What members tell one another must not differ from one run of a simulation to the next.
        let wall = if parts.env.is_simulated() { UNIX_EPOCH } else { wall_clock() };
        let (now, life) = (Instant::now(), self.life());
        let leads =
            life.as_ref().is_some_and(|life| life.node.status().is_leader && life.reconciler.observed().is_some());
        let mut state = self.0.state.lock();
        let state = &mut *state;
        let running = life.as_ref().map(|life| {
            note_history(life, &mut state.history, &mut state.change, leads, wall);
            running(parts, life, &mut state.lost_at, now)
        });
        let mut found = find::own(&own(parts, running));
        found.extend(self.0.sources.read().iter().flat_map(|source| source()));
        let mut turns = state.own.update(found, now, wall, |_| None);
        if !leads && std::mem::take(&mut state.leads) {
            state.cluster.clear();
        }
        state.leads = leads;
        if let Some(life) = life.filter(|_| leads) {
            let heard = state.heard.take();
            let known = |found: &Found| {
                let mut conditions = heard.iter().flat_map(|view| &view.conditions);
                let is_it = |known: &&Condition| {
                    known.name == found.kind.name
                        && (found.subject.is_empty() || known.subjects.contains(&found.subject))
                };
                let seconds = conditions.find(is_it)?.since;
                Some(UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64))
            };
            turns.extend(state.cluster.update(find::of_cluster(&cluster(&life)), now, wall, known));
        }
        for turn in &turns {
            log(turn);
            self.make_event(turn, leads);
        }
    }

    fn make_event(&self, turn: &Turn, leads: bool) {
        let Some(watch) = &self.0.parts.wanted else { return };
        // What is as it was asked for is no news.
        if turn.kind.severity == Severity::Note || turn.kind.shared && !leads || turn.what == What::Changes {
            return;
        }
        let (sentence, warning) = match turn.what {
            What::Begins | What::Changes => {
                (format!("{}. What to do: {} ({})", turn.sentence, turn.kind.remedy, runbook(turn.kind.name)), true)
            }
            What::Ends { lasted } => (format!("over after {}: {}", shown(lasted), turn.sentence), false),
        };
        let notice = Notice { name: turn.kind.name.to_owned(), sentence, warning };
        self.0.parts.env.spawn(watch.source().tell(notice));
    }

    /// This member's own, as it tells them to others.
    pub fn own(&self) -> Vec<Condition> {
        self.0.state.lock().own.list()
    }

    /// All of the cluster's as far as this member knows.
    pub fn list(&self) -> Vec<Condition> {
        let told = self.life().map(|life| life.reconciler.told());
        let state = self.0.state.lock();
        if state.leads {
            let told = told.into_iter().flatten().flat_map(|(_, told)| told.conditions);
            return merge(state.own.list().into_iter().chain(state.cluster.list()).chain(told));
        }
        let heard = state.heard.iter().flat_map(|view| view.conditions.clone());
        merge(heard.chain(state.own.list()))
    }

    /// What has happened, oldest first.
    pub fn events(&self) -> Vec<Event> {
        self.0.state.lock().history.list()
    }

    /// The membership as the leader sees it, or this member, if it knows that; a second old.
    pub fn view(&self) -> Option<MembershipView> {
        let heard = self.0.state.lock().heard.clone();
        let mut view = heard.or_else(|| Some(self.life()?.reconciler.view()))?;
        self.complete(&mut view);
        Some(view)
    }

    /// Adds to a view of the leader's, or of this member's, what is to be known.
    pub fn complete(&self, view: &mut MembershipView) {
        let this = self.life().map(|life| life.node.member().member_id);
        view.conditions = match Some(view.member_id) == this {
            true => self.list(),
            false => merge(std::mem::take(&mut view.conditions).into_iter().chain(self.own())),
        };
        view.events = self.events();
        // For programs that know no conditions.
        for condition in &view.conditions {
            if !view.remarks.iter().any(|remark| remark.name == condition.name)
                && condition.name != kinds::CHANGE_BLOCKED.name
            {
                view.remarks.push(Remark { name: condition.name.clone(), sentence: condition.sentence.clone() });
            }
        }
    }

    /// Whether somebody should look.
    pub fn is_any_wrong(&self) -> bool {
        self.list().iter().any(is_wrong)
    }
}

fn own(parts: &Parts, running: Option<Running>) -> Own {
    let reading = parts.wanted.as_ref().map(Watch::reading).filter(|reading| reading.observations > 0);
    Own {
        name: parts.name.clone(),
        loading: parts.progress.describe(),
        waits: parts.bootstrap.waits(),
        running,
        tls: parts.tls.notes(),
        wanted_unknown: reading.and_then(|reading| match reading.wanted {
            Wanted::Unknown(why) => Some(why),
            _ => None,
        }),
    }
}

fn running(parts: &Parts, life: &Life, lost_at: &mut Option<Instant>, now: Instant) -> Running {
    let (node, status) = (&life.node, life.node.status());
    let space = node.space();
    let is = |flag: &std::sync::atomic::AtomicBool| flag.load(Ordering::Relaxed);
    let leaderless = match status.leader {
        Some(_) => {
            *lost_at = None;
            false
        }
        None => now - *lost_at.get_or_insert(now) >= ELECTIONS * parts.election_timeout_max,
    };
    let quota = space.quota_bytes.get().copied().filter(|quota| *quota != u64::MAX);
    let slow_micros = space.slow_fsync_micros.load(Ordering::Relaxed);
    let long_log = space.long_log_bytes.load(Ordering::Relaxed);
    Running {
        leaderless,
        corrupt: node.corrupt().map(str::to_owned),
        alarms: node.alarms_told(),
        member_id: node.member().member_id,
        names: status.membership.nodes().map(|(id, member)| (*id, member.name.clone())).collect(),
        space: Space {
            data_bytes: node.store().read(|s| s.kv.counted(quota.unwrap_or(u64::MAX))),
            quota_bytes: quota,
            is_quota_near: is(&space.quota_near),
            disk_free_bytes: space.disk_free_bytes.load(Ordering::Relaxed),
            disk_reserve_bytes: if is(&space.low_disk) || is(&space.disk_near) { parts.disk_reserve_bytes } else { 0 },
            is_disk_near: is(&space.disk_near),
            is_log_full: space.is_log_full(),
            is_short: is(&space.short) || is(&space.lacks_room),
            is_quorum_low: is(&space.quorum_low_disk),
        },
        slow_fsync: (slow_micros > 0).then(|| (Duration::from_micros(slow_micros), parts.heartbeat_interval)),
        long_log: (long_log > 0).then_some(long_log),
    }
}

fn cluster(life: &Life) -> Cluster {
    let membership = life.node.status().membership;
    Cluster {
        view: life.reconciler.view(),
        told: life.reconciler.told(),
        nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        audit: life.audit.note(),
        backup_late: life.backup.as_ref().and_then(|backup| backup.late()),
        standby: life.follower.describe(),
        standby_behind: life.follower.behind(),
        superseded: life.node.store().read(|s| s.kv.superseded()),
    }
}

fn note_history(life: &Life, history: &mut History, told: &mut String, leads: bool, at: WallTime) {
    let status = life.node.status();
    let voters: Vec<u64> = status.committed_membership.voter_ids().collect();
    let members: Members = status
        .committed_membership
        .nodes()
        .map(|(id, node)| {
            let is_reader = node.kind() == Kind::Reader;
            (*id, Known { name: node.name.clone(), votes: voters.contains(id), is_reader })
        })
        .collect();
    let view = life.reconciler.view();
    let wanted = view.wanted.filter(|wanted| wanted.unknown.is_empty() && wanted.replicas > 0);
    // A member that has just begun has no membership yet, and takes over the one that there is.
    if !members.is_empty() {
        let wanted = wanted.map(|wanted| wanted.start..wanted.start + wanted.replicas);
        history.note_members(at, members, wanted);
    }
    history.note_leader(at, status.leader, status.term);
    if leads && !view.change.is_empty() && view.change != *told {
        history.add(at, "change", &format!("this member, as leader, began: {}", view.change));
        *told = view.change;
    }
}

/// In whole seconds, for people.
fn shown(lasted: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(lasted.as_secs()))
}

fn log(turn: &Turn) {
    let Turn { kind, subject, sentence, what } = turn;
    let (name, remedy, runbook) = (kind.name, kind.remedy, runbook(kind.name));
    let verb = if *what == What::Begins { "begins" } else { "goes on" };
    match (what, kind.severity) {
        (What::Ends { lasted }, _) => {
            tracing::info!(name, subject, lasted = %shown(*lasted), "condition ends");
        }
        (_, Severity::Error) => tracing::error!(name, subject, sentence, remedy, runbook, "condition {verb}"),
        (_, Severity::Warning) => tracing::warn!(name, subject, sentence, remedy, runbook, "condition {verb}"),
        (_, Severity::Note) => tracing::info!(name, subject, sentence, remedy, runbook, "condition {verb}"),
    }
}
