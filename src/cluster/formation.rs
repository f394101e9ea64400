//! The driver of a node that has no Raft yet: ask everyone, [`decide`], act, until Raft can start.
//!
//! ```text
//! run -> Resume { .. }        Raft has run under this identity: start it (initialize it if it is still empty)
//!     -> Initialize(f)        make the log, mark_log_started, start Raft, initialize it with exactly f.members as voters
//!     -> Joined { .. }        make the log, mark_log_started, start Raft empty; the leader sends the rest
//!     -> Shutdown
//! ```
//! After `Initialize` and after `Resume` with a formation the server runs [`watch`] beside Raft, until the cluster has formed.
//!
//! Invariant: every step is durable before the next one starts, and can be repeated after a crash (`env::fail` lists them).
//! Absent: a limit of time. A node waits for as long as it takes, and says for what.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;

use super::bootstrap::Bootstrap;
use super::decide::{Asked, Expected, State, Step, View, Wait, decide, has_quorum, is_dead, led};
use super::peers::{self, Peers, Unreachable};
use super::slot_of;
use crate::env::net::BoxFuture;
use crate::env::{self, Env, fail_point};
use crate::identity::SLOT_MAX;
use crate::kv;
use crate::pb::log::{Formation, Moment, membership};
use crate::pb::peer::join_response::Outcome as JoinOutcome;
use crate::pb::peer::{JoinResponse, WhoResponse};
use crate::storage::member_dir::Error;

#[cfg(test)]
pub(super) mod tests;

/// The address of a slot; `None` for one that has none.
pub type Expand = Arc<dyn Fn(u64) -> Option<String> + Send + Sync>;

/// Finds the moment of a backup that a new cluster is to begin with; an error is a sentence.
pub type Resolve = Arc<dyn Fn() -> BoxFuture<Result<Moment, String>> + Send + Sync>;

/// Where the others are.
#[derive(Clone)]
pub struct Places {
    /// The peer pattern, or the list of the first members. Without it and without `resolve` the node is a cluster of one, that asks nobody.
    pub expand: Option<Expand>,
    /// The slots of a new cluster, asked anew each time: it may widen.
    pub expected: Arc<dyn Fn() -> Expected + Send + Sync>,
    /// Addresses that the headless name resolves to now, if there is such a name, and those of `cluster.join`.
    pub resolve: Option<Arc<dyn Fn() -> BoxFuture<Vec<String>> + Send + Sync>>,
    /// At most so many members of a new cluster vote; `None`: all, as who has listed them wants it.
    pub max_voters: Option<usize>,
    /// A cluster that is formed begins with a backup; whoever proposes it says with which moment.
    pub restore: Option<Resolve>,
    /// How long a peer may take to answer.
    pub patience: Duration,
}

/// How Raft is to be started.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Raft has run under this identity. With a formation: call `initialize` with it if Raft is still empty.
    Resume {
        cluster_id: u64,
        formation: Option<Formation>,
    },
    /// Initialize Raft with these members, all voters.
    Initialize(Formation),
    /// A leader has added this member; Raft starts empty.
    Joined {
        cluster_id: u64,
    },
    Shutdown,
}

/// How a formation that has started Raft ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    Formed,
    /// It can never have a leader, or a cluster with a quorum exists beside it. Stop Raft; if its log still holds nothing beyond
    /// index 0, call [`Bootstrap::leave_dead_formation`] and [`run`] again (or exit to be restarted).
    Dead,
    Shutdown,
}

/// First tries follow one another quickly: all members usually start at once.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Between a step that changed something and the next, so that no loop of steps can be a busy one.
const PAUSE: Duration = Duration::from_millis(5);
/// Between looks at a formation that waits.
const FORMING_DELAY_MAX: Duration = Duration::from_secs(1);
/// Looks for a leader: longer than an election takes.
const LEADER_TRIES: u32 = 5;
/// Between requests to join (membership rule 10).
const JOIN_DELAY_MAX: Duration = Duration::from_secs(15);
/// Addresses beyond the pattern's that are asked; more is not a cluster but a mistake.
const EXTRA_ADDRESSES_MAX: usize = 64;

/// Delays that grow by half, with jitter.
struct Backoff(Duration);

impl Backoff {
    async fn wait(&mut self, env: &Env, max: Duration) {
        let delay = self.0.min(max);
        self.0 = delay.mul_f64(1.5).min(JOIN_DELAY_MAX);
        env::sleep(env.jitter(delay).min(max)).await;
    }

    fn reset(&mut self) {
        self.0 = FIRST_DELAY;
    }
}

/// Runs until Raft can be started, or the node shuts down.
///
/// # Errors
/// A failed write to the data directory, after which the node must stop.
pub async fn run(bootstrap: &Arc<Bootstrap>, peers: &Arc<dyn Peers>, places: &Places) -> Result<Outcome, Error> {
    let mut identity = bootstrap.identity();
    if identity.log_started && identity.abandoned {
        // A crash in the middle of `leave_dead_formation`.
        bootstrap.mint_anew().await?;
        identity = bootstrap.identity();
    }
    if identity.log_started {
        return Ok(Outcome::Resume { cluster_id: identity.cluster_id, formation: identity.formation });
    }
    let stopping = bootstrap.env().stopping.clone();
    let driver = Driver { bootstrap, peers, places, has_looked: AtomicBool::new(false) };
    let outcome = tokio::select! {
        biased;
        () = stopping.cancelled() => Ok(Outcome::Shutdown),
        outcome = driver.drive() => outcome,
    };
    bootstrap.set_waits(None);
    outcome
}

/// Runs beside a Raft that was initialized with `formation`, until `formed` (a leader is known, or the log holds anything beyond
/// index 0), or until the formation is proven dead.
pub async fn watch(
    bootstrap: &Arc<Bootstrap>,
    peers: &Arc<dyn Peers>,
    places: &Places,
    formation: &Formation,
    formed: impl Fn() -> bool,
) -> Watched {
    let env = bootstrap.env();
    let driver = Driver { bootstrap, peers, places, has_looked: AtomicBool::new(false) };
    let mut backoff = Backoff(FIRST_DELAY);
    loop {
        if formed() {
            return Watched::Formed;
        }
        tokio::select! {
            biased;
            () = env.stopping.cancelled() => return Watched::Shutdown,
            () = backoff.wait(env, FORMING_DELAY_MAX) => {}
        }
        let view = driver.look().await;
        if is_dead(&view, formation) && !formed() {
            tracing::error!(cluster = format!("{:016x}", formation.cluster_id), "formation is dead, leaving it");
            return Watched::Dead;
        }
    }
}

/// Whether a leader of `cluster_id` says that it has a quorum. To be asked while Raft does not run here: then that quorum does
/// not need this member. An election may be under way, so the question is repeated for a while.
pub async fn is_led_by_others(
    bootstrap: &Arc<Bootstrap>,
    peers: &Arc<dyn Peers>,
    places: &Places,
    cluster_id: u64,
) -> bool {
    let env = bootstrap.env();
    let driver = Driver { bootstrap, peers, places, has_looked: AtomicBool::new(false) };
    for _ in 0..LEADER_TRIES {
        if led(&driver.look().await, cluster_id) {
            return true;
        }
        tokio::select! {
            () = env.shutdown.cancelled() => return false,
            () = env::sleep(env.jitter(FORMING_DELAY_MAX)) => {}
        }
    }
    false
}

/// The cluster that has a member at `slot`, as a leader with a quorum says. For a node that cannot read who it was: that quorum does
/// not need it. `known`: clusters that its disk tells of; if there are any it must be one of them.
pub async fn led_with_slot(
    env: &Env,
    peers: &Arc<dyn Peers>,
    places: &Places,
    slot: u64,
    known: &[u64],
) -> Option<u64> {
    for _ in 0..LEADER_TRIES {
        let slots = (places.expected)().slots;
        let expand = places.expand.as_ref();
        let mut addresses: Vec<String> =
            slots.filter(|other| *other != slot).filter_map(|other| expand?(other)).collect();
        if let Some(resolve) = &places.resolve {
            addresses.extend(resolve().await.into_iter().take(EXTRA_ADDRESSES_MAX));
        }
        let asks = addresses.iter().map(|address| peers::who(env, &**peers, address, places.patience));
        let answers: Vec<WhoResponse> = join_all(asks).await.into_iter().flatten().collect();
        let names_slot = |who: &&WhoResponse| {
            who.membership.iter().flat_map(|membership| &membership.members).any(|member| slot_of(member.id) == slot)
        };
        let led: BTreeSet<u64> =
            answers.iter().filter(|who| has_quorum(who)).filter(names_slot).map(|who| who.cluster_id).collect();
        match led.first() {
            Some(cluster) if led.len() == 1 && (known.is_empty() || known.contains(cluster)) => return Some(*cluster),
            // Not the cluster of this disk, or two at one place: a person must look.
            Some(_) => return None,
            None => {}
        }
        tokio::select! {
            () = env.stopping.cancelled() => return None,
            () = env::sleep(env.jitter(FORMING_DELAY_MAX)) => {}
        }
    }
    None
}

/// What a step leads to.
enum Next {
    Done(Outcome),
    /// Something changed: look again.
    Again,
    /// Nothing to do but to ask again, with growing delays up to this.
    After(Duration, Wait),
}

struct Driver<'a> {
    bootstrap: &'a Arc<Bootstrap>,
    peers: &'a Arc<dyn Peers>,
    places: &'a Places,
    /// For the moment of a backup.
    has_looked: AtomicBool,
}

impl Driver<'_> {
    async fn drive(&self) -> Result<Outcome, Error> {
        let mut backoff = Backoff(FIRST_DELAY);
        let mut last_kind = None;
        loop {
            let view = self.look().await;
            self.bootstrap.check().await?;
            match self.act(decide(&view)).await? {
                Next::Done(outcome) => return Ok(outcome),
                Next::Again => {
                    backoff.reset();
                    env::sleep(PAUSE).await;
                }
                Next::After(max, wait) => {
                    // Another kind of waiting is news: the next change is likely near.
                    let kind = std::mem::discriminant(&wait);
                    if last_kind.replace(kind) != Some(kind) {
                        backoff.reset();
                    }
                    self.bootstrap.set_waits(Some(wait.to_string()));
                    backoff.wait(self.bootstrap.env(), max).await;
                }
            }
        }
    }

    /// Asks everyone at once, and then the leaders that were named and are none of them.
    async fn look(&self) -> View {
        let me = self.bootstrap.me();
        let max_voters = self.places.max_voters;
        if self.places.expand.is_none() && self.places.resolve.is_none() {
            let answer = Ok(self.bootstrap.who(0));
            let asked = vec![Asked { slot: Some(me.slot), address: "itself".into(), answer }];
            let expected = Expected { slots: me.slot..me.slot + 1, also: 0..0, one_by_one: false, unknown: None };
            return View { expected, asked, max_voters, me };
        }
        let expected = (self.places.expected)();
        let own = Some(me.slot).filter(|slot| *slot <= u64::from(SLOT_MAX));
        let mut slots: Vec<u64> = expected.slots.clone().chain(expected.also.clone()).chain(own).collect();
        if let State::Accepted(formation) | State::Abandoned(formation) = &me.state {
            slots.extend(formation.members.iter().map(|member| slot_of(member.id)));
        }
        slots.sort_unstable();
        slots.dedup();
        let expand = self.places.expand.as_ref();
        let of_slots = slots.into_iter().filter_map(|slot| Some((Some(slot), expand?(slot)?)));
        let mut to_ask: Vec<_> = of_slots.collect();
        if let Some(resolve) = &self.places.resolve {
            let mut addresses = resolve().await;
            addresses.truncate(EXTRA_ADDRESSES_MAX);
            to_ask.extend(addresses.into_iter().map(|address| (None, address)));
        }
        let mut asked = self.ask(to_ask).await;
        let answers = asked.iter().filter_map(|asked| asked.answer.as_ref().ok());
        let mut leaders: Vec<String> =
            answers.map(|who| who.leader_address.clone()).filter(|a| !a.is_empty()).collect();
        leaders.sort_unstable();
        leaders.dedup();
        leaders.retain(|leader| !asked.iter().any(|asked| asked.address == *leader));
        // A leader that does not answer blocks nothing: that it is missing shows as a cluster without a quorum.
        let further = self.ask(leaders.into_iter().map(|address| (None, address)).collect()).await;
        asked.extend(further.into_iter().filter(|asked| asked.answer.is_ok()));
        View { me, expected, asked, max_voters }
    }

    async fn ask(&self, addresses: Vec<(Option<u64>, String)>) -> Vec<Asked> {
        let asks = addresses.into_iter().map(|(slot, address)| async move {
            let answer = peers::who(self.bootstrap.env(), &**self.peers, &address, self.places.patience).await;
            Asked { slot, address, answer }
        });
        join_all(asks).await
    }

    async fn act(&self, step: Step) -> Result<Next, Error> {
        match step {
            Step::Wait(wait @ (Wait::NoQuorum { .. } | Wait::ForeignCluster { .. } | Wait::TwoClusters { .. })) => {
                Ok(Next::After(JOIN_DELAY_MAX, wait))
            }
            Step::Wait(wait) => Ok(Next::After(FORMING_DELAY_MAX, wait)),
            Step::Propose(members) => self.propose(members).await,
            Step::Accept(formation) => {
                self.bootstrap.accept(formation).await?;
                Ok(Next::Again)
            }
            Step::Drive { formation, ask, then } => Ok(self.ask_to_accept(&formation, ask, then).await),
            Step::Initialize(formation) => self.initialize(formation).await,
            Step::Join { cluster_id, address } => self.join(cluster_id, address).await,
            Step::Abandon { cluster_id, ask } => self.abandon(cluster_id, ask).await,
            Step::MintAnew => self.mint_anew().await,
            Step::Yield { cluster_id } => {
                tracing::info!(cluster = format!("{cluster_id:016x}"), "formation yields to a cluster with a quorum");
                let own = self.bootstrap.identity().cluster_id;
                match self.bootstrap.abandon(own).await? {
                    answer if answer.abandoned => self.mint_anew().await,
                    _ => Ok(Next::Again),
                }
            }
        }
    }

    async fn propose(&self, members: Vec<membership::Member>) -> Result<Next, Error> {
        let moment = match self.moment(&members).await {
            Ok(moment) => moment,
            Err(why) => return Ok(Next::After(JOIN_DELAY_MAX, Wait::Restore { why })),
        };
        fail_point("restore.resolved");
        let cluster_id = self.bootstrap.env().random_u64().max(1);
        let others: Vec<String> = members
            .iter()
            .filter(|member| member.id != self.bootstrap.identity().member_id)
            .filter_map(|member| self.places.expand.as_ref().and_then(|expand| expand(slot_of(member.id))))
            .collect();
        let formation = Formation { cluster_id, members, moment };
        if !self.bootstrap.accept(formation.clone()).await?.accepted {
            return Ok(Next::Again);
        }
        let cluster = format!("{cluster_id:016x}");
        if self.bootstrap.with_dir(|dir| dir.former().is_empty()) {
            tracing::info!(cluster, members = formation.members.len(), "formation proposed");
        } else {
            // Membership case 7: nobody knows the cluster that the former self belonged to.
            tracing::error!(cluster, members = formation.members.len(), "a new empty cluster: the former one is gone");
        }
        self.ask_to_accept(&formation, others, Wait::Accepting { cluster_id }).await;
        fail_point("formation.after_propose");
        Ok(Next::Again)
    }

    /// What the new cluster begins with. Members of versions that know no such thing would begin with nothing.
    async fn moment(&self, members: &[membership::Member]) -> Result<Option<Moment>, String> {
        let Some(resolve) = &self.places.restore else { return Ok(None) };
        let version = |member: &membership::Member| member.node.as_ref().map_or(0, |node| node.apply_version);
        if let Some(old) = members.iter().find(|member| version(member) < kv::RESTORE_SINCE) {
            return Err(format!("slot {} runs a version that cannot begin with a backup", slot_of(old.id)));
        }
        // Once: after that the last failure is what is waited for.
        if !self.has_looked.swap(true, Ordering::Relaxed) {
            self.bootstrap.set_waits(Some("looks for the moment of the backup that the cluster begins with".into()));
        }
        let moment = resolve().await?;
        tracing::info!(path = moment.url, revision = moment.revision, "the cluster begins with a moment of a backup");
        Ok(Some(moment))
    }

    async fn ask_to_accept(&self, formation: &Formation, ask: Vec<String>, then: Wait) -> Next {
        let patience = self.places.patience;
        let asks = ask.into_iter().map(|address| async move {
            match peers::within(patience, self.peers.accept(address.clone(), formation.clone())).await {
                Ok(answer) if answer.accepted => Ok(()),
                Ok(answer) => Err(Wait::Refused { address, why: answer.reason }),
                Err(Unreachable(why)) => Err(Wait::Refused { address, why }),
            }
        });
        let mut progress = false;
        let mut refused = None;
        for result in join_all(asks).await {
            match result {
                Ok(()) => progress = true,
                Err(wait) => refused = Some(wait),
            }
        }
        if progress { Next::Again } else { Next::After(FORMING_DELAY_MAX, refused.unwrap_or(then)) }
    }

    async fn initialize(&self, formation: Formation) -> Result<Next, Error> {
        if self.bootstrap.begin().await?.is_err() {
            return Ok(Next::Again);
        }
        fail_point("formation.before_initialize");
        Ok(Next::Done(Outcome::Initialize(formation)))
    }

    /// Others first, self last: who refuses may be alive in the formation, and then needs this member.
    async fn abandon(&self, cluster_id: u64, ask: Vec<String>) -> Result<Next, Error> {
        for address in ask {
            let why = match peers::within(self.places.patience, self.peers.abandon(address.clone(), cluster_id)).await {
                Ok(answer) if answer.abandoned => continue,
                Ok(answer) => answer.reason,
                Err(Unreachable(why)) => why,
            };
            return Ok(Next::After(FORMING_DELAY_MAX, Wait::Refused { address, why }));
        }
        let answer = self.bootstrap.abandon(cluster_id).await?;
        if answer.abandoned {
            tracing::warn!(cluster = format!("{cluster_id:016x}"), "formation abandoned");
        }
        Ok(Next::Again)
    }

    async fn mint_anew(&self) -> Result<Next, Error> {
        let member = self.bootstrap.mint_anew().await?;
        tracing::info!(member = format!("{member:016x}"), "became a new member");
        Ok(Next::Again)
    }

    /// Asks to be added, following one hint to the leader.
    async fn join(&self, cluster_id: u64, mut address: String) -> Result<Next, Error> {
        let mut response = self.ask_to_join(&address).await;
        if let Ok(hint) = &response
            && hint.outcome() == JoinOutcome::NotLeader
            && !hint.leader_address.is_empty()
        {
            address = hint.leader_address.clone();
            response = self.ask_to_join(&address).await;
        }
        let adopt = response.as_ref().map_or(0, |answer| answer.adopt);
        let (outcome, why) = match response {
            Ok(answer) if answer.cluster_id == cluster_id => (answer.outcome(), answer.reason),
            Ok(answer) => {
                (JoinOutcome::Wait, format!("it answers for cluster {:016x}: {}", answer.cluster_id, answer.reason))
            }
            Err(Unreachable(why)) => (JoinOutcome::Wait, why),
        };
        match outcome {
            JoinOutcome::Added if adopt != 0 => {
                fail_point("join.before_adopt");
                if self.bootstrap.take_reserved(adopt).await?.is_ok() {
                    tracing::info!(member = format!("{adopt:016x}"), "became the member that was added for this node");
                }
                fail_point("join.adopted");
                Ok(Next::Again)
            }
            JoinOutcome::Added => {
                fail_point("join.added");
                match self.bootstrap.set_cluster(cluster_id).await? {
                    Ok(()) => Ok(Next::Done(Outcome::Joined { cluster_id })),
                    Err(_) => Ok(Next::Again),
                }
            }
            JoinOutcome::Refused => {
                tracing::warn!(reason = why.as_str(), "refused under this member id, taking a new one");
                self.bootstrap.mint_anew().await?;
                Ok(Next::After(JOIN_DELAY_MAX, Wait::Join { cluster_id, address, why }))
            }
            JoinOutcome::NotLeader => {
                let why = "it is not the leader".into();
                Ok(Next::After(JOIN_DELAY_MAX, Wait::Join { cluster_id, address, why }))
            }
            JoinOutcome::Wait => Ok(Next::After(JOIN_DELAY_MAX, Wait::Join { cluster_id, address, why })),
        }
    }

    async fn ask_to_join(&self, address: &str) -> Result<JoinResponse, Unreachable> {
        peers::within(self.places.patience, self.peers.join(address.to_owned(), self.bootstrap.join_request())).await
    }
}
