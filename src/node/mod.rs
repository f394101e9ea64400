//! One running member: takes commands and reads from the layers above and carries them through Raft.
//!
//! Owns the way of a request: on the leader to the proposer, on any other member over one stream to the leader. Invariants:
//! a command is answered only after a quorum has it on disk and this member has applied it, so that this member's reads know of it; a
//! command whose fate is unknown is never proposed again in silence (only its client knows whether that is safe), one that
//! certainly was not proposed is tried until the request's time is over; what waits is bounded, and shared fairly among clients
//! (`places`).
//! Absent: what a request means (`kv`, `api`), and who should be a member (`cluster`).

pub mod account;
pub(crate) mod admit;
mod forward;
mod gate;
pub mod housekeeping;
mod lanes;
mod office;
mod pending;
mod places;
mod propose;
mod rates;
mod read;
mod space;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver as _;
use openraft::{ChangeMembers, ServerState};
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};

use self::admit::Weight;
use crate::caller::Caller;
use crate::env::{Env, Instant, Pool, Refused, interval, planted, sleep, timeout_at};
use crate::error::Error;
use crate::kv::Limits;
use crate::pb;
use crate::pb::etcd::AlarmType;
use crate::raft::{self, Member, Outcome, Peers, Raft, Store};
use crate::storage::log;

pub use account::Client;
pub use forward::Serving;
use forward::{Link, Outgoing};
pub use gate::Figures;
use pending::Pending;
use places::{Place, Places};
use propose::{Proposal, Proposer, Reply, Ticket};
use read::{Reader, Waiter};

/// Settings of the request path; see `config/quorate.toml` for each.
#[derive(Clone, Debug)]
pub struct Options {
    /// Longest that a client's request waits.
    pub request_timeout: Duration,
    pub batch_bytes_max: usize,
    /// Batches between proposal and answer at once.
    pub batches_in_flight_max: usize,
    pub queue_requests_max: usize,
    pub queue_bytes_max: u64,
    /// Answer linearizable reads from the leader's lease, without a round: needs clocks that run at the same rate.
    pub lease_reads: bool,
    /// A leader that no quorum answers, or that has not been heard, for this long is not known any more.
    pub leader_silence_max: Duration,
    /// A new leader is waited for this long before a request is tried again.
    pub retry_interval: Duration,
    /// Bounds on one request, whoever has sent it.
    pub limits: Limits,
}

/// Of a member for which the alarm is on, while the others are a majority.
const FENCED: &str = "this member's data differs from the majority's (alarm CORRUPT), so it serves none and does not lead; \
                      stop it, delete its data directory and start it: it comes back as a new member with the majority's data";
/// Of a member for which the alarm is on, as it is for so many others that nobody's data is known to be right.
const FENCED_WITH_MOST: &str = "alarm CORRUPT is on for this member, and for half of the voters or more, which no comparison of the \
                                members decides: delete no data directory for it, or data may be lost. Compare the members with \
                                `etcdctl endpoint hashkv`, and take the alarms off with `etcdctl alarm disarm`";
/// Of every member, while the alarm is on for member 0.
const DOUBTED: &str = "alarm CORRUPT is on for the whole cluster, so no member serves data; somebody has put it on: compare the \
                       members with `etcdctl endpoint hashkv`, and take it off with `etcdctl alarm disarm`. No data directory \
                       need be deleted for it";

/// Spare segments that clients' commands do not use.
const SEGMENTS_FOR_RAFT: usize = 1;

const LOOK_FOR_FAILURE: Duration = Duration::from_millis(100);
/// A new cluster's version rises within moments.
const LOOK_FOR_VERSION: Duration = Duration::from_millis(20);
/// Requests that wait for too long are told so within this.
const LOOK_FOR_EXPIRED: Duration = Duration::from_millis(100);

/// Members whose clients may fill all of their places at a time, before the leader tells them so, too.
const PROPOSING_MEMBERS: usize = 8;

/// Where requests go at the moment.
#[derive(Clone)]
enum Route {
    Leader,
    Follower(Arc<Link>),
    Unknown,
}

/// A handle to the running member; cloning shares it. What is asked through it counts as one client's.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
    client: Client,
}

/// A command as it goes to the leader, and what is known of it.
struct Prepared {
    command: Bytes,
    weight: Weight,
    number: u64,
    deadline: Instant,
}

struct Inner {
    env: Env,
    options: Options,
    this: Member,
    raft: Raft,
    store: Arc<Store>,
    peers: Arc<Peers>,
    proposals: mpsc::Sender<Proposal>,
    reads: mpsc::Sender<Waiter>,
    route: RwLock<Route>,
    route_changed: watch::Sender<u64>,
    places: Places,
    space: Space,
    term: AtomicU64,
    /// When a leader of this term was last heard.
    heard_leader: Mutex<Option<Instant>>,
    appends_ended: watch::Sender<Option<u64>>,
}

/// What the alarms CORRUPT say of this member's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    #[default]
    Sound,
    /// It differs from the majority's: this member serves none, and leads only if nobody else can (`cluster/fence`).
    Fenced,
    /// No member's is to be trusted: somebody has put the alarm on for all.
    Doubted,
}

/// Whether puts are taken; kept by the space watch, read by the proposer.
#[derive(Default)]
pub struct Space {
    /// Puts are refused: space is short, or an alarm that says so is on.
    pub exceeded: AtomicBool,
    /// The data is over its quota, or a quorum has no disk left.
    pub short: AtomicBool,
    /// As of the last look at the alarms.
    trust: watch::Sender<Trust>,
    /// This member's disk is below its reserve.
    pub low_disk: AtomicBool,
    /// On the leader: the voters with disk left are no quorum.
    pub quorum_low_disk: AtomicBool,
    /// On the leader: the voters whose log takes more are no quorum.
    pub quorum_log_full: AtomicBool,
    /// Most bytes of data; set once, from the settings.
    pub quota_bytes: OnceLock<u64>,
    /// What this member's log can still take; set once.
    pub log_room: OnceLock<log::Room>,
    /// Bytes of the smallest request that was refused to a client of this member; 0: none since there was room for it.
    pub refused_bytes: AtomicU64,
    /// There is no room under the quota for what was refused.
    pub lacks_room: AtomicBool,
    pub disk_free_bytes: AtomicU64,
    /// The data comes near its quota.
    pub quota_near: AtomicBool,
    /// The disk comes near its reserve.
    pub disk_near: AtomicBool,
    /// The p99 of log syncs where that is too slow for the heartbeat; else 0.
    pub slow_fsync_micros: AtomicU64,
    /// Bytes of the log where they are far too many; else 0.
    pub long_log_bytes: AtomicU64,
}

/// What the layers above show of Raft's state.
#[derive(Clone, Debug)]
pub struct Status {
    pub term: u64,
    /// The leader, if it is alive as far as this member can tell: with pre-vote, the vote of a leader long gone stays.
    pub leader: Option<u64>,
    pub is_leader: bool,
    pub is_learner: bool,
    pub last_log_index: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    /// On the leader: how long ago a quorum last answered.
    pub quorum_ack_age: Option<Duration>,
    /// The newest that this member knows; perhaps not committed yet.
    pub membership: raft::StoredMembership,
    pub committed_membership: raft::StoredMembership,
    /// The term of the newest committed entry.
    pub committed_term: u64,
    /// On the leader: how long ago each member acknowledged a heartbeat or an append.
    pub acked: std::collections::BTreeMap<u64, Option<Duration>>,
    /// True when the newest membership is committed.
    pub membership_committed: bool,
    /// On the leader: matched log index of each member.
    pub matched: Vec<(u64, Option<u64>)>,
}

impl Space {
    /// Whether this member's log must be left to Raft's own entries: the disk gives no more, and one spare segment is left at most.
    pub fn is_log_full(&self) -> bool {
        self.log_room.get().and_then(log::Room::segments_left).is_some_and(|left| left <= SEGMENTS_FOR_RAFT)
    }
}

impl Node {
    /// Starts the request path on a running Raft.
    pub fn start(env: Env, options: Options, this: Member, raft: Raft, store: Arc<Store>, peers: Arc<Peers>) -> Self {
        let (proposals, proposals_rx) = mpsc::channel(PROPOSING_MEMBERS * options.queue_requests_max);
        let (reads, reads_rx) = mpsc::channel(PROPOSING_MEMBERS * options.queue_requests_max);
        let places = Places::new(options.queue_requests_max, options.queue_bytes_max);
        let inner = Arc::new(Inner {
            env: env.clone(),
            options,
            this,
            raft,
            store,
            peers,
            proposals,
            reads,
            route: RwLock::new(Route::Unknown),
            route_changed: watch::Sender::new(0),
            places,
            space: Space::default(),
            term: AtomicU64::new(0),
            heard_leader: Mutex::default(),
            appends_ended: watch::Sender::default(),
        });
        let node = Self { inner, client: Client::default() };
        node.inner.store.waiters().begin(env.random_u64());
        env.spawn(Proposer::new(node.clone(), proposals_rx).run());
        env.spawn(Reader::new(node.clone(), reads_rx).run());
        env.spawn(node.clone().follow_leader());
        env.spawn(node.clone().end_waiters());
        node
    }

    /// The handle that `client`'s requests go through.
    #[must_use]
    pub fn on_behalf_of(self, client: Client) -> Self {
        Self { client, ..self }
    }

    /// Whose requests go through this handle.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A place among the requests that wait, for one of its client's that does not go through Raft; or `too many requests`.
    pub fn take_place(&self) -> Result<account::Taken, Error> {
        self.inner.places.take_one(&self.client)
    }

    /// Runs its client's long work where it holds up nobody else's; see [`Env::long_for`].
    pub async fn long<T, F>(&self, pool: Pool, work: F) -> Result<T, Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.long_within(pool, self.inner.options.request_timeout, work).await
    }

    /// As [`Self::long`], where the client may wait for its turn for as long as `patience`.
    pub async fn long_within<T, F>(&self, pool: Pool, patience: Duration, work: F) -> Result<T, Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let deadline = Instant::now() + patience;
        self.env().long_for(pool, self.client.asker(), deadline, work).await.map_err(|refused| match refused {
            Refused::Full => Error::TooManyRequests,
            Refused::Late => Error::Timeout,
        })
    }

    pub fn member(&self) -> Member {
        self.inner.this
    }

    pub fn env(&self) -> &Env {
        &self.inner.env
    }

    pub fn raft(&self) -> &Raft {
        &self.inner.raft
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// The newest term that this member has seen.
    pub fn term(&self) -> u64 {
        self.inner.term.load(Ordering::Relaxed)
    }

    pub fn space(&self) -> &Space {
        &self.inner.space
    }

    /// What the state says now. CORRUPT is about one member; put on for member 0, it is about all of them.
    pub fn trust(&self) -> Trust {
        match (self.is_fenced(self.inner.this.member_id), self.is_fenced(0)) {
            (true, _) => Trust::Fenced,
            (false, true) => Trust::Doubted,
            (false, false) => Trust::Sound,
        }
    }

    /// Whether alarm CORRUPT is on for this very member, as the state here says now.
    pub fn is_fenced(&self, member: u64) -> bool {
        self.inner.store.is_fenced(member)
    }

    /// Takes over what the replicated alarms say.
    pub fn refresh_alarms(&self) {
        let space = self.space();
        // Where apply itself refuses, in the order of the log, nobody need know better.
        let no_space = self.inner.store.read(|s| s.kv.has_alarm(AlarmType::Nospace) && !s.kv.is_capped());
        space.exceeded.store(no_space || space.short.load(Ordering::Relaxed), Ordering::Relaxed);
        let now = self.trust();
        if !space.trust.send_if_modified(|trust| std::mem::replace(trust, now) != now) {
            return;
        }
        self.inner.raft.runtime_config().elect(now != Trust::Fenced);
    }

    /// Waits while the cluster is about to allow what needs cluster version `version`; refuses if a member does not know it. `what`
    /// begins that sentence.
    pub async fn wait_version(&self, version: u32, what: &str) -> Result<(), Error> {
        let deadline = Instant::now() + self.inner.options.request_timeout;
        loop {
            let now = self.inner.store.read(|s| s.kv.cluster_version());
            if now >= version {
                return Ok(());
            }
            let status = self.status();
            let mut nodes = status.membership.nodes();
            let lags = nodes.find(|(_, member)| member.apply_version < version && !member.is_awaited());
            if lags.is_some() || Instant::now() >= deadline {
                let who = lags.map_or("a member", |(_, member)| &member.name);
                return Err(Error::Unsupported(format!(
                    "{what} cluster version {version}, this cluster has {now}; it rises by itself when all members run this \
                     build, and {who} does not yet"
                )));
            }
            sleep(LOOK_FOR_VERSION).await;
        }
    }

    /// Resolves when the alarms say what `is` asks for.
    pub async fn wait_trust(&self, is: impl FnMut(&Trust) -> bool) {
        // The sender is this node's own.
        let _ = self.space().trust.subscribe().wait_for(is).await;
    }

    /// What is the matter with this member's data, and what to do; `None` if it is to be trusted.
    pub fn corrupt(&self) -> Option<&'static str> {
        match self.trust() {
            Trust::Sound => None,
            Trust::Fenced if self.inner.store.read(|s| s.kv.has_sound_majority()) => Some(FENCED),
            Trust::Fenced => Some(FENCED_WITH_MOST),
            Trust::Doubted => Some(DOUBTED),
        }
    }

    pub fn options(&self) -> &Options {
        &self.inner.options
    }

    /// Keeps the route in step with Raft's view of the leader.
    async fn follow_leader(self) {
        let mut metrics = self.inner.raft.server_metrics();
        let mut known = None;
        let shutdown = self.inner.env.shutdown.clone();
        loop {
            let (leader, address) = {
                let m = metrics.borrow_watched();
                self.inner.term.store(m.vote.leader_id.term, Ordering::Relaxed);
                self.inner.peers.set_addresses(m.membership_config.nodes());
                let leading = m.state == ServerState::Leader;
                let leader = m.current_leader.filter(|id| *id != self.inner.this.member_id || leading);
                let address =
                    leader.and_then(|id| m.membership_config.get_node(&id).map(|node| node.peer_address.clone()));
                (leader, address)
            };
            if known != Some((leader, address.clone())) {
                if known.as_ref().map(|(leader, _)| *leader) != Some(leader) {
                    tracing::info!(leader = leader.map(|id| format!("{id:x}")), term = self.term(), "the leader");
                    crate::metrics::metrics().leader_changes.inc_by(u64::from(leader.is_some()));
                }
                let route = match (leader, &address) {
                    (Some(id), _) if id == self.inner.this.member_id => Route::Leader,
                    (Some(id), Some(address)) => Route::Follower(Link::open(&self, id, address.clone())),
                    _ => Route::Unknown,
                };
                *self.inner.route.write() = route;
                self.inner.route_changed.send_modify(|n| *n += 1);
                known = Some((leader, address));
            }
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn route(&self) -> Route {
        let route = self.inner.route.read().clone();
        match route {
            Route::Follower(link) if link.is_closed() => self.reopen(&link),
            other => other,
        }
    }

    /// A broken stream to a leader that is still the leader is opened again.
    fn reopen(&self, closed: &Arc<Link>) -> Route {
        let mut route = self.inner.route.write();
        if let Route::Follower(current) = &*route
            && Arc::ptr_eq(current, closed)
            && closed.may_reopen()
        {
            *route = Route::Follower(Link::open(self, closed.leader, closed.address.clone()));
        }
        route.clone()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.inner.options.request_timeout
    }

    /// Waits for another route, at most `retry_interval` and not past `deadline`; false when the time is over.
    async fn wait_route(&self, seen: u64, deadline: Instant) -> bool {
        let until = (Instant::now() + self.inner.options.retry_interval).min(deadline);
        let mut changed = self.inner.route_changed.subscribe();
        let _ = timeout_at(until, changed.wait_for(|n| *n != seen)).await;
        Instant::now() < deadline
    }

    /// Carries one command through Raft for `caller`, and returns what applying it here answered. What `caller` may do is decided
    /// where it is applied. What waits holds the encoded command alone: a command and the steps on its way would be copied with each
    /// of the futures around it.
    pub fn propose(
        &self,
        caller: &Caller,
        command: pb::log::Command,
    ) -> impl Future<Output = Outcome> + Send + use<'_> {
        let prepared = self.prepare(caller, command);
        async move {
            let (prepared, pending) = prepared?;
            let outcome = self.carry(prepared).await;
            pending.end(&outcome);
            outcome
        }
    }

    fn prepare(&self, caller: &Caller, mut command: pb::log::Command) -> Result<(Prepared, Pending), Error> {
        gate::in_time(caller)?;
        self.check_role(&command)?;
        command.asker = caller.to_pb();
        admit::own(&mut command, &self.inner.options.limits)?;
        // By this member's data, which is nearly the leader's; the leader counts again what others forward.
        let weight = admit::weigh(&command, &self.inner.options.limits, &self.inner.store)?;
        let pending = Pending::begin(&command);
        let origin = self.inner.store.waiters().origin(self.client.mark());
        command.origin = (!planted!("answer-before-own-apply")).then_some(origin);
        let prepared = Prepared {
            command: encoded(&command),
            weight,
            number: origin.number,
            deadline: pending.begun() + self.inner.options.request_timeout,
        };
        Ok((prepared, pending))
    }

    /// Refuses at once what apply would, as this member's state is now.
    fn check_role(&self, command: &pb::log::Command) -> Result<(), Error> {
        let Some(request) = command.request.as_ref().filter(|_| !self.inner.store.is_writable()) else { return Ok(()) };
        self.inner.store.read(|s| s.kv.refused_by_role(request)).map_or(Ok(()), Err)
    }

    async fn carry(&self, prepared: Prepared) -> Outcome {
        loop {
            let place = Arc::new(self.inner.places.take(&self.client, prepared.command.len() as u64)?);
            let seen = *self.inner.route_changed.borrow();
            match self.offer(&prepared, place).await {
                // Certainly not proposed: safe to try again.
                Err(Error::NotLeader) => {
                    if !Box::pin(self.wait_route(seen, prepared.deadline)).await {
                        return Err(Error::Timeout);
                    }
                }
                Err(Error::NoSpace) => {
                    space::note_refused(self, &prepared.command);
                    return Err(Error::NoSpace);
                }
                decided => return decided,
            }
        }
    }

    /// Sends a command to the leader that is known now, and waits for what becomes of it.
    async fn offer(&self, asked: &Prepared, place: Arc<Place>) -> Outcome {
        let Prepared { command, weight, number, deadline } = asked;
        let (weight, number, deadline) = (*weight, *number, *deadline);
        let waiters = self.inner.store.waiters();
        let Some(rx) = waiters.wait(number, self.term(), deadline, place.clone()) else {
            return Err(Error::NotLeader);
        };
        let ticket = Ticket { number, waiters: waiters.clone(), place };
        let sent = match self.route() {
            Route::Leader => {
                let (command, asker) = (command.clone(), self.client.host_number());
                let proposal = Proposal { command, asker, weight, reply: Reply::Local(ticket) };
                self.inner.proposals.try_send(proposal).map_err(|e| refused(&e))
            }
            Route::Follower(link) => link.send(Outgoing::Proposal(command.clone(), ticket)),
            Route::Unknown => Err(Error::NotLeader),
        };
        if let Err(error) = sent {
            waiters.end(number, Err(error));
        }
        if planted!("forwarded-proposal-retried") {
            let soon = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 4;
            return Box::pin(timeout_at(soon, rx))
                .await
                .map_or(Err(Error::NotLeader), |told| told.unwrap_or(Err(Error::TimeoutLeaderFailure)));
        }
        // At the deadline, too.
        rx.await.unwrap_or(Err(Error::TimeoutLeaderFailure))
    }

    /// Ends what waits for longer than a request's time.
    async fn end_waiters(self) {
        let shutdown = self.inner.env.shutdown.clone();
        let waiters = self.inner.store.waiters();
        let mut tick = interval(LOOK_FOR_EXPIRED);
        loop {
            tokio::select! {
                _ = tick.tick() => waiters.expire(Instant::now()),
                () = shutdown.cancelled() => return waiters.stop(),
            }
        }
    }

    /// Returns once the local state holds everything that was acknowledged before this call (Raft dissertation, 6.4).
    pub async fn read_index(&self) -> Result<(), Error> {
        let deadline = self.deadline();
        let _place = self.inner.places.take_one(&self.client)?;
        loop {
            let seen = *self.inner.route_changed.borrow();
            let (tx, rx) = oneshot::channel();
            let taken = match self.route() {
                Route::Leader => self.inner.reads.try_send(Waiter::Local(tx)).map_err(|e| refused(&e)),
                Route::Follower(link) => link.send(Outgoing::Read(tx)),
                Route::Unknown => Err(Error::NotLeader),
            };
            let outcome = match taken {
                Ok(()) => match timeout_at(deadline, rx).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_)) => Err(Error::NotLeader),
                    Err(_) => return Err(Error::Timeout),
                },
                Err(error) => Err(error),
            };
            match outcome {
                Ok(_) if planted!("read-before-applied") => return Ok(()),
                Ok(index) if self.inner.store.wait_applied(index, deadline).await => return Ok(()),
                Ok(_) => return Err(Error::Timeout),
                Err(error @ (Error::TooManyRequests | Error::Stopped | Error::Corrupt)) => return Err(error),
                // Reads change nothing: any failure may be tried again.
                Err(_) if Box::pin(self.wait_route(seen, deadline)).await => {}
                Err(_) => return Err(Error::Timeout),
            }
        }
    }

    /// The log index that a state must have applied to be as new as this moment; `None` if nobody can say now.
    pub async fn confirmed_index(&self) -> Option<u64> {
        let (tx, rx) = oneshot::channel();
        match self.route() {
            Route::Leader => self.inner.reads.try_send(Waiter::Local(tx)).ok()?,
            Route::Follower(link) => link.send(Outgoing::Read(tx)).ok()?,
            Route::Unknown => return None,
        }
        timeout_at(self.deadline(), rx).await.ok()?.ok()?.ok()
    }

    /// Asks a quorum whether this member leads, clocks aside. What it answers held at some moment after this call began.
    pub async fn confirm_leadership(&self) -> Result<Confirmed, Error> {
        let asking = self.inner.raft.get_read_linearizer(openraft::ReadPolicy::ReadIndex);
        match timeout_at(self.deadline(), asking).await {
            Ok(Ok(linearizer)) => {
                // Not older than the first entry of the leader's own term, so it names that term.
                let id = linearizer.read_log_id();
                Ok(Confirmed { term: **id.committed_leader_id(), index: id.index() })
            }
            Ok(Err(_)) => Err(Error::NotLeader),
            Err(_) => Err(Error::Timeout),
        }
    }

    /// Another member that leads, and its address, as far as this one knows.
    pub fn other_leader(&self) -> Option<(u64, String)> {
        match &*self.inner.route.read() {
            Route::Follower(link) => Some((link.leader, link.address.clone())),
            Route::Leader | Route::Unknown => None,
        }
    }

    /// The connections to the other members.
    pub fn peers(&self) -> &Arc<Peers> {
        &self.inner.peers
    }

    /// To be called when a leader's append was taken or answered as its own.
    pub fn hear_leader(&self) {
        *self.inner.heard_leader.lock() = Some(Instant::now());
    }

    /// Raft's state, as this member sees it.
    pub fn status(&self) -> Status {
        let metrics = self.inner.raft.metrics();
        let m = metrics.borrow_watched();
        let this = self.inner.this.member_id;
        let index = |id: &Option<raft::LogId>| id.as_ref().map_or(0, |l| l.index());
        let is_leader = m.state == ServerState::Leader;
        let alone = is_leader && m.membership_config.voter_ids().all(|id| id == this);
        // Raft notes no acknowledgement of a leader by itself.
        let acked = m.last_quorum_acked.as_ref().map(|at| at.elapsed());
        let quorum_ack_age = if alone { Some(Duration::ZERO) } else { acked };
        let heard = *self.inner.heard_leader.lock();
        let silence = if is_leader { quorum_ack_age } else { heard.map(|at| at.elapsed()) };
        let alive = silence.is_some_and(|silence| silence <= self.inner.options.leader_silence_max);
        Status {
            term: m.current_term,
            leader: m.current_leader.filter(|id| alive && (*id == this) == is_leader),
            is_leader,
            is_learner: !m.membership_config.voter_ids().any(|id| id == this),
            last_log_index: m.last_log_index.unwrap_or(0),
            committed_index: index(&m.local_committed),
            applied_index: self.inner.store.applied_index().unwrap_or(0),
            quorum_ack_age,
            committed_term: m.local_committed.as_ref().map_or(0, |l| **l.committed_leader_id()),
            acked: m.heartbeat.iter().flatten().map(|(id, at)| (*id, at.as_ref().map(|at| at.elapsed()))).collect(),
            membership: (*m.membership_config).clone(),
            committed_membership: (*m.committed_membership_config).clone(),
            membership_committed: m.membership_config.log_id() == m.committed_membership_config.log_id(),
            matched: m
                .replication
                .iter()
                .flatten()
                .map(|(id, log_id)| (*id, log_id.as_ref().map(|l| l.index())))
                .collect(),
        }
    }

    /// Whether this member leads, and would have a quorum if `member` had not answered it lately.
    pub fn has_quorum_without(&self, member: u64) -> bool {
        let (status, this) = (self.status(), self.inner.this.member_id);
        let answers = |id: u64| {
            let age = status.acked.get(&id).copied().flatten();
            id == this || age.is_some_and(|age| age <= self.inner.options.leader_silence_max)
        };
        let mut configs = status.membership.membership().get_joint_config().iter();
        status.is_leader
            && configs
                .all(|voters| voters.iter().filter(|id| **id != member && answers(**id)).count() > voters.len() / 2)
    }

    /// Resolves soon after Raft has failed for good; the process must stop then (openraft #2116). Raft itself does nothing more from
    /// that moment. Looked up, not waited for: its metrics change several times with each batch, and would wake a thread each time.
    pub async fn failed(&self) -> String {
        let metrics = self.inner.raft.metrics();
        let mut tick = interval(LOOK_FOR_FAILURE);
        loop {
            tick.tick().await;
            if let Err(fatal) = &metrics.borrow_watched().running_state {
                return fatal.to_string();
            }
        }
    }

    /// One membership change, if the membership is still the one that `expected` names. The voters become `voters`; `add`
    /// brings in nodes first; who is left out of `voters` stays a learner if it is in `keep`. Returns when committed.
    pub async fn change_membership(&self, change: MembershipChange) -> Result<(), String> {
        let precondition =
            openraft::raft::Precondition::LastMembershipLogId { last_membership_log_id: change.expected };
        let mut steps = Vec::new();
        if !change.set_nodes.is_empty() {
            steps.push(ChangeMembers::SetNodes(change.set_nodes.into_iter().collect()));
        }
        if !change.add_learners.is_empty() {
            steps.push(ChangeMembers::AddNodes(change.add_learners.into_iter().collect()));
        }
        if let Some(voters) = change.voters {
            steps.push(ChangeMembers::ReplaceAllVoters(voters));
        }
        if !change.remove_learners.is_empty() {
            steps.push(ChangeMembers::RemoveNodes(change.remove_learners));
        }
        let changes = if steps.len() == 1 { steps.remove(0) } else { ChangeMembers::Batch(steps) };
        let changing = self.inner.raft.change_membership_if(changes, change.retain, [precondition]);
        match timeout_at(Instant::now() + change.patience, changing).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not committed within {:?}", change.patience)),
        }
    }
}

/// A leader that a quorum has confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmed {
    pub term: u64,
    /// The log index that a state must have applied to be as new as the confirmation.
    pub index: u64,
}

fn encoded(command: &pb::log::Command) -> Bytes {
    // Only tests ask for it.
    if let Some(key) = crate::env::fail::poison_key()
        && matches!(&command.request, Some(pb::log::command::Request::Put(put)) if put.key == key.as_bytes())
    {
        return Bytes::from_static(b"poison");
    }
    Bytes::from(command.encode_to_vec())
}

/// Why a bounded queue of this member did not take a request.
fn refused<T>(failed: &mpsc::error::TrySendError<T>) -> Error {
    match failed {
        mpsc::error::TrySendError::Full(_) => Error::TooManyRequests,
        mpsc::error::TrySendError::Closed(_) => Error::Stopped,
    }
}

/// What [`Node::change_membership`] does.
#[derive(Clone, Debug, Default)]
pub struct MembershipChange {
    /// Log id of the membership that this change was planned on.
    pub expected: Option<raft::LogId>,
    pub add_learners: Vec<(u64, pb::log::Node)>,
    pub set_nodes: Vec<(u64, pb::log::Node)>,
    pub voters: Option<BTreeSet<u64>>,
    pub remove_learners: BTreeSet<u64>,
    /// Voters that are left out stay as learners.
    pub retain: bool,
    pub patience: Duration,
}

/// Takes from `queue` what comes at the same moment as what was `taken`: requests that were woken together share a batch if all of
/// them go first.
async fn more_of_a_burst<T>(queue: &mut mpsc::Receiver<T>, taken: &mut Vec<T>, max: usize) {
    tokio::task::yield_now().await;
    while taken.len() < max
        && let Ok(next) = queue.try_recv()
    {
        taken.push(next);
    }
}
