//! The simulated machines: what stands where, switching on and off, and waiting until the cluster is whole.
//!
//! Invariant: a member that ends without being told to, and without a fault that excuses it, is a violation at the next look.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Run, Violation};
use crate::config::{Bytes, Config};
use crate::env::sim::{NoNet, SimDisk, SimNet, trace};
use crate::env::{Env, Instant, Net as _, sleep, timeout};
use crate::pb::etcd::StatusResponse;
use crate::server;
use crate::storage::state::Engine;
use crate::storage::state::memory::Memories;
use crate::testing::history::{Recorder, Request, Span, Stamp};
use crate::testing::lease::Outage;
use crate::testing::users::{self, Client, Clients, Forwarder, Lessee, Seen, Stories, Watcher};

/// Members at the beginning, and at most.
const MEMBERS: usize = 3;
pub(super) const MEMBERS_MAX: usize = 5;
const CLIENTS: u64 = 4;
const LESSEES: u64 = 2;
/// Simulated time in which a cluster whose members are all up must be whole.
const HEAL_TIME: Duration = Duration::from_secs(90);
const NET_LATENCY: Duration = Duration::from_millis(4);

pub(super) struct Machine {
    pub disk: SimDisk,
    pub stores: Memories,
    pub running: Option<Running>,
    /// A fault may have ended it: then it is started again with what its disk holds, or with an empty one if it refuses that.
    pub excused: bool,
    /// Its disk was lost or damaged, so that it may come back under a new id.
    pub replaced: bool,
    /// It may have come back under a new id, at least once.
    pub was_renewed: bool,
    /// Of its clock against the others', in thousandths.
    drift: u64,
}

pub(super) struct Running {
    pub env: Env,
    pub serving: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// A cluster, its clients, and what was counted.
pub struct World {
    pub(super) seed: u64,
    pub(super) env: Env,
    pub(super) net: SimNet,
    pub(super) machines: Vec<Machine>,
    pub(super) clients: Clients,
    pub(super) recorder: Recorder,
    /// When which member was started.
    pub(super) starts: Vec<(usize, Stamp)>,
    pub(super) seen: Seen,
    pub(super) stories: Stories,
    /// When no quorum could reach one another; without the one that goes on.
    pub(super) outages: Vec<Outage>,
    outage_since: Option<Duration>,
    /// What is left of members that were scaled away; a pod of the same slot may get its volume back.
    retired: Vec<Machine>,
    /// The cluster was told how many members to have.
    is_sized: bool,
    begun: Instant,
    counts: BTreeMap<String, u64>,
    users: Vec<tokio::task::JoinHandle<()>>,
    using: CancellationToken,
    watchers: Vec<tokio::task::JoinHandle<()>>,
    watching: CancellationToken,
    members: watch::Sender<usize>,
    /// The highest term that each member id was seen in: it goes back with its disk alone.
    pub(super) terms: BTreeMap<u64, u64>,
}

pub(super) fn ip(member: usize) -> IpAddr {
    IpAddr::from([10, 0, 0, member as u8])
}

fn config(member: usize, drift: u64) -> Config {
    let mut config = Config::default();
    config.identity.name = format!("sim-{member}");
    config.identity.slot = Some(member as u16);
    config.cluster.peers = "10.0.0.%d:2380".into();
    config.cluster.size = MEMBERS as u16;
    config.cluster.failure_timeout = Duration::from_secs(5);
    config.cluster.promote_after = Duration::from_secs(1);
    config.server.data_dir = "/data".into();
    config.server.listen_peer = SocketAddr::new(ip(member), 2380).into();
    config.server.listen_client = SocketAddr::new(ip(member), 2379).into();
    // Small enough that segments rotate, and that the log is purged behind snapshots which laggards then need.
    config.log.segment_bytes = Bytes::kib(64);
    config.log.cache_bytes = Bytes::kib(16);
    config.log.bytes_max = Bytes::kib(64);
    config.log.entries_max = 100;
    config.log.entries_kept = 10;
    config.raft.snapshot_chunk_bytes = Bytes::kib(4);
    config.state.checkpoint_interval = Duration::from_millis(300);
    config.server.request_timeout = Duration::from_secs(3);
    config.storage.disk_reserve = Bytes::kib(64);
    // Limits decide before a command is proposed; whoever applies it may have others.
    config.limits.txn_ops_max = 8 + 40 * member;
    config.limits.txn_depth_max = 4 + 40 * member;
    config.limits.request_cost_max = 50 + 1000 * member as u64;
    config.limits.txn_ops_total_max = 16 + 100 * member;
    // All of a member's clocks that matter are timers: one that runs fast has them end early.
    for timer in [
        &mut config.raft.heartbeat_interval,
        &mut config.raft.election_timeout_min,
        &mut config.raft.election_timeout_max,
        &mut config.state.checkpoint_interval,
    ] {
        *timer = *timer * drift as u32 / 1000;
    }
    config
}

impl World {
    pub fn new(seed: u64) -> Self {
        let env = Env::sim(seed, Arc::new(SimDisk::new(seed)), Arc::new(NoNet));
        let net = SimNet::new(env.random_u64(), NET_LATENCY);
        let machines = (0..MEMBERS).map(|_| Machine::new(&env)).collect();
        let outside = net.host(IpAddr::from([10, 0, 1, 1]));
        let clients =
            Clients::new(MEMBERS_MAX, move |member| outside.connect(SocketAddr::new(ip(member), 2379).to_string()));
        Self {
            seed,
            env,
            net,
            machines,
            clients,
            recorder: Recorder::default(),
            starts: Vec::new(),
            seen: Seen::default(),
            stories: Stories::default(),
            outages: Vec::new(),
            outage_since: None,
            retired: Vec::new(),
            is_sized: false,
            begun: Instant::now(),
            counts: BTreeMap::new(),
            users: Vec::new(),
            using: CancellationToken::new(),
            watchers: Vec::new(),
            watching: CancellationToken::new(),
            members: watch::Sender::new(MEMBERS),
            terms: BTreeMap::new(),
        }
    }

    pub(super) fn below(&self, bound: u64) -> u64 {
        self.env.random_u64() % bound
    }

    pub(super) fn any_member(&self) -> usize {
        self.below(self.machines.len() as u64) as usize
    }

    pub async fn sleep_up_to(&self, most: Duration) {
        sleep(Duration::from_micros(self.below(most.as_micros() as u64))).await;
    }

    pub fn count(&mut self, what: &str, by: u64) {
        *self.counts.entry(what.to_owned()).or_default() += by;
    }

    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.counts.clone()
    }

    /// How many machines there are.
    pub fn size(&self) -> usize {
        self.machines.len()
    }

    /// Starts every machine, one after another, and waits until they are a cluster.
    pub async fn start_all(&mut self) -> Run {
        for member in 0..self.machines.len() {
            self.sleep_up_to(Duration::from_millis(500)).await;
            self.start(member);
        }
        self.wait_healed().await
    }

    /// Two more machines that join the cluster, on new disks or on those of members that were scaled away.
    pub async fn grow(&mut self) -> Run {
        if self.is_sized {
            self.scale(MEMBERS_MAX).await?;
        }
        while self.machines.len() < MEMBERS_MAX {
            let old = self.retired.pop().filter(|_| self.below(2) == 0);
            if old.is_some() {
                self.count("removed member came back", 1);
            }
            let machine = old.unwrap_or_else(|| Machine::new(&self.env));
            self.machines.push(machine);
            self.start(self.machines.len() - 1);
        }
        self.wait_healed().await?;
        self.members.send_replace(self.machines.len());
        Ok(())
    }

    /// Two members leave, as pods do whose StatefulSet is scaled down: the size is told, then they are, at once or one by one.
    pub async fn shrink(&mut self) -> Run {
        self.members.send_replace(MEMBERS);
        self.scale(MEMBERS).await?;
        let at_once = self.below(2) == 0;
        for leaving in self.machines[MEMBERS..].iter().flat_map(|machine| &machine.running).filter(|_| at_once) {
            leaving.env.stopping.cancel();
        }
        while self.machines.len() > MEMBERS {
            self.stop(self.machines.len() - 1).await?;
            let mut machine = self.machines.pop().expect("there are more than the first ones");
            // It knows that it was removed, so that it joins as somebody else.
            machine.was_renewed = true;
            self.retired.push(machine);
        }
        self.wait_healed().await
    }

    /// Tells the cluster how many members to have.
    async fn scale(&mut self, members: usize) -> Run {
        self.is_sized = true;
        let deadline = Instant::now() + HEAL_TIME;
        loop {
            match self.clients.scale(self.any_member(), members).await {
                Ok(()) => return Ok(()),
                Err(status) if Instant::now() > deadline => {
                    return Err(Violation::new("available", format!("scaling to {members}: {status}")));
                }
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Notes whether a quorum is left, `connected` of the machines that run reaching one another.
    pub(super) fn note_quorum(&mut self, connected: usize) {
        let now = self.begun.elapsed();
        if connected > self.machines.len() / 2 {
            self.outages.extend(self.outage_since.take().map(|from| Outage { from, to: now }));
        } else {
            self.outage_since.get_or_insert(now);
        }
    }

    pub(super) fn running(&self) -> usize {
        self.machines.iter().filter(|machine| machine.running.is_some()).count()
    }

    pub fn start(&mut self, member: usize) {
        self.starts.push((member, self.recorder.stamp()));
        let machine = &mut self.machines[member];
        assert!(machine.running.is_none(), "member {member} runs already");
        let env = Env::sim(self.env.random_u64(), Arc::new(machine.disk.clone()), self.net.host(ip(member)));
        let engine = Engine::Memory(machine.stores.clone());
        let serving = tokio::spawn(server::serve(env.clone(), config(member, machine.drift), engine, None));
        trace::event(format_args!("start {member}"));
        machine.running = Some(Running { env, serving });
        self.note_quorum(self.running());
    }

    /// The machine's power is gone: its life reaches nobody, and its disk holds what a crash leaves.
    pub fn crash(&mut self, member: usize) {
        trace::event(format_args!("crash {member}"));
        self.net.power_off(ip(member));
        let machine = &mut self.machines[member];
        machine.disk = machine.disk.crash();
        let env = &self.env;
        machine.stores.crash(|unsaved| (env.random_u64() % (unsaved as u64 + 1)) as usize);
        if let Some(running) = machine.running.take() {
            // It is cut off from the world already; its tasks are only to be gone.
            running.env.gate.open();
            running.env.shutdown.cancel();
            running.serving.abort();
        }
        self.note_quorum(self.running());
    }

    /// An empty disk in place of this one.
    pub fn wipe(&mut self, member: usize) {
        trace::event(format_args!("wipe {member}"));
        let machine = &mut self.machines[member];
        assert!(machine.running.is_none(), "a disk is taken out of a machine that is off");
        machine.disk = SimDisk::new(self.env.random_u64());
        machine.stores = Memories::default();
        (machine.replaced, machine.was_renewed) = (true, true);
    }

    /// SIGTERM; how long the member took to end.
    pub async fn stop(&mut self, member: usize) -> Result<Duration, Violation> {
        let began = Instant::now();
        let Some(running) = self.machines[member].running.take() else { return Ok(Duration::ZERO) };
        running.env.stopping.cancel();
        let ended = timeout(Duration::from_secs(20), running.serving).await;
        self.net.power_off(ip(member));
        self.note_quorum(self.running());
        match ended {
            Ok(Ok(Ok(()))) => Ok(began.elapsed()),
            Ok(other) => {
                Err(Violation::new("shutdown", format!("member {member}: a shutdown is no failure: {other:?}")))
            }
            Err(_) => Err(Violation::new("shutdown", format!("member {member} did not end in 20 s after SIGTERM"))),
        }
    }

    /// Looks whether members have ended that nothing was done to. Those that a fault excuses are started again.
    pub async fn look_after(&mut self) -> Run {
        for member in 0..self.machines.len() {
            let machine = &mut self.machines[member];
            let Some(running) = machine.running.as_mut().filter(|running| running.serving.is_finished()) else {
                continue;
            };
            let ended = (&mut running.serving).await;
            if !machine.excused {
                let what = format!("member {member} ended by itself: {}", end_of(&ended));
                return Err(Violation::new("member alive", what));
            }
            trace::event(format_args!("member {member} ended: {}", end_of(&ended)));
            let was_started = machine.replaced;
            self.crash(member);
            if was_started {
                // It has seen its damage and refuses the disk: what a person does then.
                self.count("refused disk", 1);
                self.wipe(member);
            }
            self.start(member);
        }
        Ok(())
    }

    pub fn start_clients(&mut self) {
        for name in 0..CLIENTS {
            let client = Client {
                name,
                env: users::env(self.env.random_u64()),
                clients: self.clients.clone(),
                recorder: self.recorder.clone(),
                members: self.members.subscribe(),
                pause: Duration::from_millis(40),
            };
            self.users.push(tokio::spawn(client.run(self.using.clone())));
        }
        for name in 0..LESSEES {
            let lessee = Lessee {
                name: 50 + name,
                env: users::env(self.env.random_u64()),
                clients: self.clients.clone(),
                recorder: self.recorder.clone(),
                members: self.members.subscribe(),
                stories: self.stories.clone(),
                begun: self.begun,
            };
            self.users.push(tokio::spawn(lessee.run(self.using.clone())));
        }
        let stranger = self.net.host(IpAddr::from([10, 0, 1, 2]));
        let forwarder = Forwarder {
            env: Env::sim(self.env.random_u64(), Arc::new(SimDisk::new(0)), stranger),
            clients: self.clients.clone(),
            members: self.members.subscribe(),
            address: |member| SocketAddr::new(ip(member), 2380).to_string(),
        };
        self.users.push(tokio::spawn(forwarder.run(self.using.clone())));
        let everything = || Span::range("\0", "z");
        for (span, puts, is_ahead) in [
            (everything(), true, false),
            (Span::one("a"), true, false),
            (Span::range("b", "e"), false, false),
            (everything(), true, true),
        ] {
            let watcher = Watcher {
                name: self.seen.add_watcher(),
                env: users::env(self.env.random_u64()),
                clients: self.clients.clone(),
                members: self.members.subscribe(),
                seen: self.seen.clone(),
                span,
                puts,
                is_ahead,
            };
            self.watchers.push(tokio::spawn(watcher.run(self.watching.clone())));
        }
    }

    /// Waits until every watcher has come to `revision`, then ends them.
    pub(super) async fn stop_watchers(&mut self, revision: i64) -> Run {
        let deadline = Instant::now() + HEAL_TIME;
        while self.seen.reached().iter().any(|reached| *reached < revision) {
            if Instant::now() > deadline {
                let what = format!("watchers came to {:?}, and the newest is {revision}", self.seen.reached());
                return Err(Violation::new("watch complete", what));
            }
            sleep(Duration::from_millis(100)).await;
        }
        self.watching.cancel();
        for watcher in self.watchers.drain(..) {
            watcher.await.expect("a watcher only writes down what it is told");
        }
        self.seen.complete_to(revision);
        Ok(())
    }

    pub async fn stop_clients(&mut self) {
        self.using.cancel();
        for user in self.users.drain(..) {
            user.await.expect("a client only writes down what it is told");
        }
    }

    /// One request through a member, recorded.
    pub async fn ask(&self, member: usize, request: Request) -> crate::testing::history::Outcome {
        self.clients.recorded(&self.recorder, 100 + member as u64, member, request).await
    }

    pub(super) async fn statuses(&mut self) -> Result<Vec<Option<StatusResponse>>, Violation> {
        let mut statuses = Vec::new();
        for member in 0..self.machines.len() {
            let status = self.clients.status(member).await.ok();
            if let Some(status) = &status {
                let id = status.header.as_ref().map_or(0, |header| header.member_id);
                let newest = self.terms.entry(id).or_default();
                // 0: it has just started and has not read its vote yet.
                if status.raft_term != 0 && status.raft_term < *newest {
                    let what = format!("member {member} ({id:x}) was in term {newest} and is in {}", status.raft_term);
                    return Err(Violation::new("term", what));
                }
                *newest = status.raft_term.max(*newest);
            }
            statuses.push(status);
        }
        Ok(statuses)
    }

    /// The member that leads, and each member's id, as far as they answer.
    pub async fn leader(&mut self) -> Result<Option<(usize, Vec<u64>)>, Violation> {
        let statuses = self.statuses().await?;
        let id = |status: &Option<StatusResponse>| {
            status.as_ref().and_then(|status| status.header.as_ref()).map_or(0, |header| header.member_id)
        };
        let ids: Vec<u64> = statuses.iter().map(id).collect();
        let leads =
            |at: &usize| statuses[*at].as_ref().is_some_and(|status| status.leader != 0 && status.leader == ids[*at]);
        Ok((0..statuses.len()).find(leads).map(|at| (at, ids)))
    }

    /// Waits until all members follow one leader in one term, have applied the same, and vote.
    pub async fn wait_healed(&mut self) -> Run {
        let deadline = Instant::now() + HEAL_TIME;
        loop {
            self.look_after().await?;
            let statuses = self.statuses().await?;
            let all: Vec<&StatusResponse> = statuses.iter().flatten().collect();
            let same = |of: fn(&StatusResponse) -> u64| all.windows(2).all(|pair| of(pair[0]) == of(pair[1]));
            let healed = all.len() == self.machines.len()
                && all[0].leader != 0
                && same(|status| status.leader)
                && same(|status| status.raft_term)
                && same(|status| status.raft_applied_index)
                && all.iter().all(|status| !status.is_learner);
            if healed {
                for machine in &mut self.machines {
                    (machine.excused, machine.replaced) = (false, false);
                }
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Violation::new("heals", format!("not whole after {HEAL_TIME:?}: {statuses:?}")));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Without a backtrace.
fn end_of(ended: &Result<anyhow::Result<()>, tokio::task::JoinError>) -> String {
    match ended {
        Ok(Ok(())) => "without an error".into(),
        Ok(Err(error)) => format!("{error:#}"),
        Err(error) => error.to_string(),
    }
}

impl Machine {
    fn new(env: &Env) -> Self {
        Self {
            disk: SimDisk::new(env.random_u64()),
            stores: Memories::default(),
            running: None,
            excused: false,
            replaced: false,
            was_renewed: false,
            drift: 950 + env.random_u64() % 101,
        }
    }
}
