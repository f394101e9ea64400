//! One member's life: from its disk to a running Raft, and down again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;

use super::{Ended, Server};
use crate::api::Running;
use crate::backup;
use crate::cluster::decide::Wait;
use crate::cluster::{
    Audit, DeadLeader, Declared, Fence, Manager, Outcome, RaftFacts, Reconciler, Wanted, formation, leaderless, recall,
    reconcile,
};
use crate::conditions;
use crate::config::MemberKind;
use crate::env::{Env, Instant, Pool, fail_point, interval, timeout};
use crate::lease::{self, Leases};
use crate::node::housekeeping::{Housekeeping, Settings};
use crate::node::{self, Node};
use crate::pb::backup::Origin;
use crate::pb::log::{Formation, Moment};
use crate::pb::peer::WhoResponse;
use crate::raft::{self, Checkpointer, Guard, LogStore, Member, Network, Past, Reach, Rpc, StateMachine, recover};
use crate::storage::log::{self, Log, Owner};
use crate::storage::{snapshot, state};
use crate::watch::{self, Hub};

/// Time that a handover at shutdown may take.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(2);
/// What requests under way get when this member's identity ends: most of them wait for a leader that will not answer.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// The parts of a running member.
pub(super) struct Life {
    pub(super) env: Env,
    pub(super) node: Node,
    pub(super) manager: Arc<Manager>,
    pub(super) reconciler: Arc<Reconciler>,
    /// This member was removed from the cluster.
    removed: CancellationToken,
    /// This life ends: clients are not served any more.
    over: CancellationToken,
    /// Its disk went back, and a quorum of others goes on without it.
    went_back: CancellationToken,
    log: Log,
}

/// Paths of the self in use.
struct Paths {
    log: PathBuf,
    snapshot: PathBuf,
    state: PathBuf,
}

/// The disk holds a self that can only go on under a new id.
#[derive(Debug)]
struct LostDisk(String);

impl Server {
    /// Lives as the member that `outcome` says, until shutdown, failure, or the end of this identity.
    pub(super) async fn member(self: &Arc<Self>, outcome: Outcome) -> anyhow::Result<Ended> {
        let (fresh, formation) = match &outcome {
            Outcome::Resume { formation, .. } => (false, formation.clone()),
            Outcome::Initialize(formation) => (true, Some(formation.clone())),
            Outcome::Joined { .. } => (true, None),
            Outcome::Shutdown => return Ok(Ended::Shutdown),
        };
        if fresh
            && let Some(formation) = &formation
            && let Some(moment) = &formation.moment
            && !self.begin_with(formation, moment).await?
        {
            return Ok(Ended::Shutdown);
        }
        let env = self.env.child();
        let life = match self.begin(&env, fresh, formation.as_ref()).await? {
            Ok(life) => life,
            Err(LostDisk(reason)) => {
                tracing::error!(reason, "this member's disk is lost; it goes on as a new member");
                self.bootstrap.mint_anew().await?;
                return Ok(Ended::Again);
            }
        };
        let ended = self.watch(&life, formation.as_ref()).await;
        let ends_process = life.manager.stays_out() && self.config.cluster.kind == MemberKind::Manual;
        self.end(life, matches!(ended, Ok(Ended::Shutdown))).await;
        let ended = ended?;
        match ended {
            Ended::Shutdown => {}
            Ended::Again => {
                self.bootstrap.leave_dead_formation().await?;
            }
            Ended::Removed if ends_process => {
                tracing::warn!(
                    "this member was removed by hand, so its process ends; started again, it archives its former self and waits to be \
                     added anew"
                );
                return Ok(Ended::Shutdown);
            }
            Ended::Removed => {
                let member = self.bootstrap.mint_anew().await?;
                tracing::warn!(
                    member = format!("{member:016x}"),
                    "was removed; the former self is archived, and joins as a new member"
                );
            }
            Ended::WentBack => {
                self.bootstrap.mint_anew().await?;
            }
        }
        Ok(ended)
    }

    fn paths(&self) -> Paths {
        self.bootstrap.with_dir(|dir| Paths {
            log: dir.log_path(),
            snapshot: dir.snapshot_path(),
            state: dir.state_path(),
        })
    }

    fn log_options(&self) -> log::Options {
        let settings = &self.config.log;
        log::Options {
            segment_bytes: settings.segment_bytes.0,
            cache_bytes: settings.cache_bytes.as_usize(),
            ..log::Options::default()
        }
    }

    /// Opens or makes the log. A log of another member is a lost disk; a damaged one is refused, with what to do.
    async fn open_log(
        &self,
        env: &Env,
        fresh: bool,
        paths: &Paths,
        this: Member,
    ) -> anyhow::Result<Result<Log, LostDisk>> {
        let owner = Owner { cluster_id: this.cluster_id, member_id: this.member_id };
        if fresh {
            // A crash between making the log and noting that it was made leaves one in which nothing was promised.
            if env.disk.exists(&paths.log) {
                env.disk.remove_dir_all(&paths.log)?;
            }
            let log = Log::create(env, &paths.log, owner, self.log_options())?;
            self.bootstrap.mark_log_started().await?;
            return Ok(Ok(log));
        }
        self.progress.begin("reads its log", 0);
        let opened = Log::load(env, &paths.log, owner, self.log_options()).await;
        self.progress.end();
        match opened {
            Ok(log) => Ok(Ok(log)),
            Err(error @ log::Error::Foreign { .. }) => Ok(Err(LostDisk(error.to_string()))),
            // Membership case 36. Without such a quorum a person must decide: this disk may hold what no other does.
            Err(error @ log::Error::Corrupt { .. }) if self.is_led_by_others(this.cluster_id).await => {
                Ok(Err(LostDisk(error.to_string())))
            }
            Err(error) => Err(anyhow!(error).context(
                "the log cannot be used; if a quorum of the other members lives, delete this member's data directory and \
                 it comes back as a new member",
            )),
        }
    }

    async fn is_led_by_others(&self, cluster_id: u64) -> bool {
        let asker: Arc<dyn crate::cluster::Peers> = Arc::new(self.peers.clone());
        formation::is_led_by_others(&self.bootstrap, &asker, &self.places, cluster_id).await
    }

    async fn begin(
        self: &Arc<Self>,
        env: &Env,
        fresh: bool,
        formation: Option<&Formation>,
    ) -> anyhow::Result<Result<Life, LostDisk>> {
        let identity = self.bootstrap.identity();
        let this = Member { cluster_id: identity.cluster_id, member_id: identity.member_id };
        let paths = self.paths();
        let log = match self.open_log(env, fresh, &paths, this).await? {
            Ok(log) => log,
            Err(lost) => return Ok(Err(lost)),
        };
        let snapshots = snapshot::Dir::open(env, &paths.snapshot, this.cluster_id).context("snapshot files")?;
        let options = state::Options {
            cache_bytes: self.config.state.cache_bytes.0,
            record_bytes: self.config.state.chunk_bytes.as_usize(),
            engine: self.state_engine.clone(),
            progress: self.progress.clone(),
        };
        let started = Instant::now();
        let recovered = {
            let (env, log, snapshots, dir, options) =
                (env.clone(), log.clone(), snapshots.clone(), paths.state.clone(), options.clone());
            let journal = self.config.state.journal_bytes_max.as_usize();
            let work = move || recover::recover(&env, this, &log, &snapshots, &dir, &options, journal);
            self.env.long(Pool::Snapshots, work).await
        };
        self.progress.end();
        let recovered = match recovered {
            Ok(recovered) => recovered,
            Err(error @ recover::Error::LostState { .. }) => return Ok(Err(LostDisk(error.to_string()))),
            Err(error) => return Err(error.into()),
        };
        tracing::info!(
            member = format!("{:x}", this.member_id),
            cluster = format!("{:x}", this.cluster_id),
            slot = self.this.slot,
            address = %self.this.advertise_peer,
            formation = if formation.is_some() { "formed" } else { "joined" },
            applied = recovered.store.applied_index(),
            last = log.state().last.map(|l| l.index),
            took = ?started.elapsed(),
            "member starts"
        );
        let guard = Guard::new(env.clone(), this, self.peers.clone(), self.places.expand.clone());
        let past = Past::new(log.clone(), self.peers.clone(), fresh);
        let raft = self.start_raft(env, this, &past, &recovered.store, snapshots.clone(), &guard).await?;
        guard.start(raft.clone());
        let rpc = Rpc::new(env.clone(), raft.clone(), guard, recovered.store.clone(), snapshots.clone())
            .with_past(past.clone());
        let node = Node::start(
            env.clone(),
            self.node_options(),
            this,
            raft.clone(),
            recovered.store.clone(),
            self.peers.clone(),
        );
        // Before anybody can ask: a fenced member stays so over a restart.
        node.refresh_alarms();
        let interval = self.config.state.checkpoint_interval;
        let checkpointer = Checkpointer::new(env.clone(), paths.state, options, interval, recovered);
        env.spawn_nicer_thread("checkpoint", checkpointer.run());
        let housekeeping = Housekeeping::new(node.clone(), log.clone(), self.housekeeping()?);
        env.spawn(housekeeping.run());
        let backups = (self.start_backup(env, &node, &log, snapshots), self.start_follower(env, &node));
        let (manager, reconciler, removed) = self.connect(env, &node, rpc.within(log.room()), backups);
        let over = env.stopping.child_token();
        env.spawn(self.clone().open_in_time(env.clone(), node.clone(), over.clone()));
        let went_back = CancellationToken::new();
        if !fresh {
            self.recall(env, node.clone(), past, went_back.clone());
        }
        // One that begins with a backup has its membership in that.
        if let Some(formation) = formation.filter(|formation| formation.moment.is_none()) {
            self.initialize(&node, formation).await?;
        }
        Ok(Ok(Life { env: env.clone(), node, manager, reconciler, removed, over, went_back, log }))
    }

    /// Asks the others what they remember of this member's disk.
    fn recall(&self, env: &Env, node: Node, past: Past, went_back: CancellationToken) {
        let patience = self.places.patience;
        env.spawn(async move {
            let own = || Reach::own(&past.log, node.store());
            if recall::run(&node, &past.peers, &past.ballot, own, patience).await == recall::Found::WentBack {
                went_back.cancel();
            }
        });
    }

    async fn start_raft(
        &self,
        env: &Env,
        this: Member,
        past: &Past,
        store: &Arc<raft::Store>,
        snapshots: snapshot::Dir,
        guard: &Arc<Guard>,
    ) -> anyhow::Result<raft::Raft> {
        let network = Network {
            env: env.clone(),
            peers: self.peers.clone(),
            store: store.clone(),
            guard: guard.clone(),
            cluster_id: this.cluster_id,
            member_id: this.member_id,
            snapshot_chunk_bytes: self.config.raft.snapshot_chunk_bytes.0,
            snapshot_rate: self.config.raft.snapshot_rate.0,
            past: past.clone(),
        };
        let options = raft::options(&self.config.raft, &self.config.log)?;
        let log_store = LogStore::new(past.log.clone(), self.config.raft.append_bytes_max.0);
        let state_machine = StateMachine::new(env.clone(), store.clone(), snapshots, this);
        Ok(raft::start(this.member_id, options, network, log_store, state_machine).await?)
    }

    /// Makes the member reachable: for peers, for clients, and in the answer to `Who`.
    fn connect(
        self: &Arc<Self>,
        env: &Env,
        node: &Node,
        rpc: Rpc,
        (backup, follower): (Option<Arc<backup::Duty>>, Arc<backup::Follower>),
    ) -> (Arc<Manager>, Arc<Reconciler>, CancellationToken) {
        let reconciler = Reconciler::new(
            node.clone(),
            self.peers.clone(),
            reconcile::Settings {
                expand: self.places.expand.clone(),
                max_voters: usize::from(self.config.cluster.max_voters),
                failure_timeout: self.config.cluster.failure_timeout,
                promote_after: self.config.cluster.promote_after,
                silence_max: self.config.raft.election_timeout_max,
                takes_readers: self.config.cluster.readers,
                reader_ttl: self.config.cluster.reader_ttl,
                max_readers: self.config.cluster.max_readers as usize,
                wanted: self.wanted.clone(),
            },
        );
        env.spawn(reconciler.clone().run());
        self.bootstrap.set_raft(Some(Arc::new(Facts {
            node: node.clone(),
            lease: self.config.raft.election_timeout_max,
            declared: self.declared.clone(),
        })));
        let audit = Audit::new(node.clone(), self.peers.clone(), self.config.raft.self_check_interval);
        env.spawn(audit.clone().run());
        env.spawn(Fence::new(node.clone(), self.peers.clone(), self.config.raft.election_timeout_max).run());
        // A leader that only looks dead to a quorum would answer with what is old by then.
        if !self.config.raft.lease_reads {
            env.spawn(DeadLeader::new(node.clone(), self.config.raft.election_timeout_max).run());
        }
        if let Some(declared) = &self.declared {
            env.spawn(declared.clone().carry_out(node.clone(), self.peers.clone()));
        }
        let leases = Leases::start(node.clone(), self.lease_settings());
        let manager = Manager::new(node.clone(), self.peers.clone(), reconciler.clone());
        self.conditions.set_life(Some(conditions::Life {
            node: node.clone(),
            manager: manager.clone(),
            reconciler: reconciler.clone(),
            audit,
            backup: backup.clone(),
            follower: follower.clone(),
        }));
        self.peer_api.set_running(Some(Running {
            rpc,
            node: node.clone(),
            reconciler: reconciler.clone(),
            leases: leases.clone(),
            manager: manager.clone(),
            backup,
        }));
        self.api.set_leases(Some(leases));
        self.api.set_node(Some(node.clone()));
        self.api.set_watch(Some(self.start_hub(env, node)));
        self.api.set_manager(Some(manager.clone()));
        self.api.set_follower(Some(follower));
        let removed = CancellationToken::new();
        env.spawn(self.clone().watch_readiness(env.clone(), node.clone()));
        env.spawn(self.clone().watch_leader(env.clone(), node.clone(), manager.clone(), removed.clone()));
        env.spawn(self.clone().announce(env.clone(), node.clone()));
        env.spawn(self.clone().follow_tls(env.clone(), node.clone()));
        (manager, reconciler, removed)
    }

    /// This member's part in the cluster's backups, if there are to be any.
    fn start_backup(&self, env: &Env, node: &Node, log: &Log, snapshots: snapshot::Dir) -> Option<Arc<backup::Duty>> {
        let settings = &self.config.backup;
        if !settings.is_on() {
            return None;
        }
        let parts = backup::Parts { node: node.clone(), log: log.clone(), snapshots, peers: self.peers.clone() };
        let settings = backup::Settings {
            url: settings.url.clone(),
            access: backup::Access::of(settings),
            interval: settings.interval,
            full_every: settings.full_every,
            keep: backup::plan::Retention { fulls: settings.keep_fulls, age: settings.keep_age },
            bandwidth: settings.bandwidth.0,
            origin: self.origin(&settings.url),
        };
        Some(backup::Duty::start(env, parts, settings))
    }

    /// This member's part in a standby, and in a cluster that may have one.
    fn start_follower(&self, env: &Env, node: &Node) -> Arc<backup::Follower> {
        let (own, followed) = (&self.config.backup, &self.config.restore.follow);
        let path = |url: &String| backup::standby::Settings { url: url.clone(), access: backup::Access::of(own) };
        let at = path(if own.is_on() { &own.url } else { followed });
        if !at.url.is_empty() {
            env.spawn(backup::succession::watch(env.clone(), node.clone(), at.clone(), own.interval));
        }
        backup::Follower::start(env, node, path(followed), at)
    }

    /// Where this cluster comes from, if it was formed from a backup at this path. A standby has no right to the path until it is promoted.
    fn origin(&self, url: &str) -> Option<Origin> {
        let is_own = |moment: &Moment| moment.url == url && moment.follow_record == 0;
        let moment = self.bootstrap.identity().formation?.moment.filter(is_own)?;
        Some(Origin { generation: moment.generation, revision: moment.revision })
    }

    fn start_hub(&self, env: &Env, node: &Node) -> Hub {
        let settings = &self.config.watch;
        let options = watch::Options {
            stream_bytes_max: settings.stream_bytes_max.as_usize(),
            stream_watchers_max: settings.stream_watchers_max,
        };
        let hub = Hub::start(env, node.store().clone(), options, self.account.clone());
        // A leader is no longer known after two election timeouts of silence; watchers that need one end after three.
        hub.follow_leader(node, self.config.raft.election_timeout_max);
        hub
    }

    /// All acceptors initialize with the same bytes; who is already initialized goes on.
    async fn initialize(&self, node: &Node, formation: &Formation) -> anyhow::Result<()> {
        if !node.raft().is_initialized().await?
            && let Err(error) = node.raft().initialize(raft::initial_members(formation)).await
        {
            // A peer's vote request may have come first: then there is a vote, and the leader sends the rest.
            tracing::info!(%error, "not initialized here; waiting for the leader");
        }
        fail_point("formation.initialized");
        Ok(())
    }

    fn node_options(&self) -> node::Options {
        let raft = &self.config.raft;
        node::Options {
            request_timeout: self.config.server.request_timeout,
            batch_bytes_max: raft.batch_bytes_max.as_usize(),
            batches_in_flight_max: raft.proposals_in_flight_max,
            queue_requests_max: raft.queue_requests_max,
            queue_bytes_max: raft.queue_bytes_max.0,
            lease_reads: raft.lease_reads,
            leader_silence_max: 2 * raft.election_timeout_max,
            retry_interval: Duration::from_millis(50),
            limits: super::limits(&self.config.limits),
        }
    }

    fn lease_settings(&self) -> lease::Settings {
        let longest_election = self.config.raft.election_timeout_max;
        lease::Settings {
            // As etcd's: one and a half elections, in whole seconds.
            ttl_min_seconds: (longest_election * 3 / 2).as_millis().div_ceil(1000) as i64,
            checkpoint_interval: self.config.lease.checkpoint_interval,
            revokes_in_flight_max: self.config.lease.revokes_in_flight_max,
            extension: longest_election,
        }
    }

    fn housekeeping(&self) -> anyhow::Result<Settings> {
        Ok(Settings {
            data_dir: self.config.server.data_dir.clone(),
            log_bytes_max: self.config.log.bytes_max.0,
            log_entries_max: self.config.log.entries_max,
            log_entries_kept: self.config.log.entries_kept,
            heartbeat_interval: self.config.raft.heartbeat_interval,
            quota_bytes: self.quota_bytes,
            quota_warn_percent: u64::from(self.config.storage.quota_warn_percent),
            disk_reserve_bytes: self.config.storage.disk_reserve.0,
            compaction: self.config.storage.compaction().map_err(anyhow::Error::msg)?,
        })
    }

    /// Until shutdown, a failure of Raft, or the proof that the formation is dead.
    async fn watch(self: &Arc<Self>, life: &Life, formation: Option<&Formation>) -> anyhow::Result<Ended> {
        let asker: Arc<dyn crate::cluster::Peers> = Arc::new(self.peers.clone());
        let dead = async {
            let Some(formation) = formation else {
                return std::future::pending().await;
            };
            let node = &life.node;
            let formed = || {
                let status = node.status();
                status.leader.is_some() || status.last_log_index > 0
            };
            match formation::watch(&self.bootstrap, &asker, &self.places, formation, formed).await {
                formation::Watched::Dead => {}
                formation::Watched::Formed | formation::Watched::Shutdown => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.env.stopping.cancelled() => Ok(Ended::Shutdown),
            reason = life.node.failed() => Err(anyhow!("raft has failed: {reason}")),
            () = dead => Ok(Ended::Again),
            () = life.removed.cancelled() => Ok(Ended::Removed),
            () = life.went_back.cancelled() => Ok(Ended::WentBack),
        }
    }

    /// Ready while clients are served, a leader is known, and what was committed at the start is applied (membership rule 28).
    async fn watch_readiness(self: Arc<Self>, env: Env, node: Node) {
        let mut tick = interval(Duration::from_millis(50));
        let mut target = None;
        let mut was = false;
        let mut cleaned = false;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = env.stopping.cancelled() => break,
                () = env.shutdown.cancelled() => break,
            }
            let status = node.status();
            if target.is_none() && status.leader.is_some() {
                target = node.confirmed_index().await;
            }
            // Who waits for the others to be given the file that it has must let them be restarted.
            let waits = self.declared.as_ref().is_some_and(|declared| declared.waits_for_others());
            let ready = (self.clients.is_open() || waits)
                && status.leader.is_some()
                && target.is_some_and(|index| status.applied_index >= index)
                && node.corrupt().is_none();
            if ready != was {
                was = ready;
                tracing::info!(
                    ready,
                    leader = status.leader.map(|id| format!("{id:x}")),
                    term = status.term,
                    "readiness"
                );
                self.set_health(ready).await;
            }
            if ready && !status.is_learner && !std::mem::replace(&mut cleaned, true) {
                self.remove_former().await;
            }
        }
        self.set_health(false).await;
    }

    /// Former selves are no longer needed once this one is a caught-up voter (membership rule 25); a few are kept.
    async fn remove_former(&self) {
        let keep = self.config.cluster.kept_former_selves as usize;
        if let Err(error) = self.bootstrap.remove_former(keep).await {
            tracing::error!(%error, "former selves cannot be removed");
            self.env.shutdown.cancel();
        }
    }

    /// Without a leader for longer than an election takes: says what this member waits for. One that was removed, as a leader has
    /// said twice, ends this life (membership rule 25). Removed by hand it waits for its process to be restarted; if it was added by hand,
    /// too, its process ends, as etcd's does.
    async fn watch_leader(self: Arc<Self>, env: Env, node: Node, manager: Arc<Manager>, removed: CancellationToken) {
        let patience = 3 * self.config.raft.election_timeout_max;
        let mut tick = interval(Duration::from_millis(500));
        let mut lost_at = None;
        let mut told_removed = 0;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = env.shutdown.cancelled() => break,
            }
            let status = node.status();
            if status.leader.is_some() {
                (lost_at, told_removed) = (None, 0);
                self.bootstrap.set_waits(None);
            } else if lost_at.get_or_insert_with(Instant::now).elapsed() >= patience {
                let this = (node.member().cluster_id, node.member().member_id);
                let members = reconcile::members(&status);
                let wanted = self.wanted_slots(&node);
                let wait = leaderless::explain(&env, &self.peers, this, &members, wanted, self.places.patience).await;
                told_removed = if matches!(wait, Some(Wait::Removed { .. })) { told_removed + 1 } else { 0 };
                let waits = manager.stays_out() && self.config.cluster.kind != MemberKind::Manual;
                if told_removed > 0 && !waits {
                    if told_removed >= 2 {
                        removed.cancel();
                        break;
                    }
                    continue;
                }
                self.bootstrap.set_waits(wait.map(|wait| wait.to_string()));
            }
        }
        self.bootstrap.set_waits(None);
    }

    /// The slots that are wanted, as far as this member knows.
    fn wanted_slots(&self, node: &Node) -> Option<std::ops::Range<u64>> {
        match self.wanted.as_ref().map(|watch| watch.reading().wanted) {
            Some(Wanted::Slots { slots, .. }) => Some(slots),
            Some(_) => None,
            None => node.store().read(|s| s.kv.wanted_size()).map(|size| size.start..size.start + size.replicas),
        }
    }

    /// Members without TLS are heard as long as the committed membership has some, where the settings allow it at all.
    async fn follow_tls(self: Arc<Self>, env: Env, node: Node) {
        let Some(port) = &self.tls.peer else { return };
        let mut tick = interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = env.shutdown.cancelled() => break,
            }
            let members = node.status().committed_membership;
            let without = members.nodes().filter(|(_, member)| !member.tls).map(|(_, member)| member.name.clone());
            port.note_members((members.nodes().next().is_some()).then(|| without.collect()));
        }
        port.note_members(None);
    }

    /// Rule 3: a member that has started with other addresses than the membership says, asks the leader to look there.
    async fn announce(self: Arc<Self>, env: Env, node: Node) {
        let mut tick = interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = env.shutdown.cancelled() => return,
            }
            let status = node.status();
            let Some(known) = status.membership.get_node(&node.member().member_id) else { continue };
            let own_address = &self.bootstrap.node().peer_address;
            if known.peer_address == *own_address {
                continue;
            }
            // A leader that looks for it at the old address is not known here: then all are asked, and it is among them. It may
            // also be this member itself.
            let asked = status.membership.nodes().filter(|(id, _)| status.leader.is_none_or(|leader| leader == **id));
            for (id, member) in asked {
                let address = if *id == node.member().member_id { own_address } else { &member.peer_address };
                // The leader's answer is the change itself; without it, this is asked again.
                let _ = self.peers.join(address, self.bootstrap.join_request()).await;
            }
        }
    }

    pub(super) async fn set_health(&self, ready: bool) {
        self.api.set_ready(ready);
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.health.set_service_status("", status).await;
        self.health.set_service_status("readiness", status).await;
    }

    /// Hands leadership over if there is someone to take it, and stops everything in order; with `drain`, requests under
    /// way are finished first.
    async fn end(&self, life: Life, drain: bool) {
        life.over.cancel();
        self.set_health(false).await;
        if drain {
            self.leave(&life).await;
        }
        if let Some(successor) = successor(&life) {
            let handover = timeout(HANDOVER_PATIENCE, life.node.transfer_leader(successor)).await;
            tracing::info!(
                peer = format!("{successor:x}"),
                ok = matches!(handover, Ok(Ok(()))),
                "handed leadership over"
            );
        }
        // Streams do not end by themselves; their clients go on elsewhere.
        self.api.set_watch(None);
        self.close_clients(if drain { self.config.server.request_timeout } else { CLOSE_PATIENCE }).await;
        self.api.set_node(None);
        self.api.set_leases(None);
        self.api.set_manager(None);
        self.api.set_follower(None);
        self.conditions.set_life(None);
        self.peer_api.set_running(None);
        self.bootstrap.set_raft(None);
        if let Err(error) = life.node.raft().shutdown().await {
            tracing::error!(%error, "raft did not stop cleanly");
        }
        // The last handle to the log ends its threads, which `stop` waits for.
        life.log.close().await;
        life.env.stop(Duration::from_secs(10)).await;
    }
}

/// Who takes over, if this member leads and is not alone: as the reconciler sees the others, or, where it has not looked yet, the
/// voter that has most of the leader's log.
fn successor(life: &Life) -> Option<u64> {
    let node = &life.node;
    let status = node.status();
    if let Some(observed) = life.reconciler.observed().filter(|_| status.is_leader) {
        let condemned = observed.membership.voters().into_iter().filter(|id| observed.is_condemned(*id)).collect();
        return observed.successor(&condemned).or_else(|| observed.successor(&Default::default()));
    }
    let voters: std::collections::BTreeSet<u64> = status.membership.voter_ids().collect();
    let matched: BTreeMap<u64, Option<u64>> = status.matched.iter().copied().collect();
    status
        .is_leader
        .then(|| {
            let others = voters.iter().filter(|id| **id != node.member().member_id);
            others.copied().max_by_key(|id| matched.get(id).copied().flatten())
        })
        .flatten()
}

/// What Raft adds to the answer to `Who`.
struct Facts {
    node: Node,
    /// A quorum that answered within this still counts.
    lease: Duration,
    declared: Option<Arc<Declared>>,
}

impl RaftFacts for Facts {
    fn fill(&self, answer: &mut WhoResponse) {
        let status = self.node.status();
        answer.leader_id = status.leader.unwrap_or(0);
        answer.leader_address = status
            .leader
            .and_then(|id| status.membership.get_node(&id).map(|n| n.peer_address.clone()))
            .unwrap_or_default();
        answer.quorum = status.is_leader && status.quorum_ack_age.is_some_and(|age| age <= self.lease);
        answer.last_log_index = status.last_log_index;
        answer.applied_index = status.applied_index;
        answer.term = status.term;
        // The committed one: who is told that it was removed may leave at once.
        answer.membership_index = status.committed_membership.log_id().map_or(0, |l| l.index());
        answer.membership = Some(raft::membership_to_pb(status.committed_membership.membership()));
        answer.low_space = self.node.space().low_disk.load(Ordering::Relaxed);
        answer.log_full = self.node.space().is_log_full();
        answer.disk_free_bytes = self.node.space().disk_free_bytes.load(Ordering::Relaxed);
        answer.auth_declared = self.declared.as_ref().map_or(0, |declared| declared.mark());
        answer.db_bytes = self.node.store().read(|s| s.kv.bytes()) as i64;
    }
}
