//! The composition root: owns every long-lived object of a process and the order in which they start and stop.
//!
//! Start: identity and data directory, the listeners for status and peers, formation or join, log and state, Raft, the request path,
//! the clients' port. Stop: unready, leave as
//! the wanted size demands (`leave`), hand over leadership, drain clients, stop Raft, flush. A part that fails for good stops the process: half a member is worse than
//! a restart.

pub(crate) mod authority;
mod budget;
mod clients;
mod connection;
mod first;
mod health;
mod inflate;
mod leave;
mod listen;
mod member;
mod meter;
mod peer_connection;
pub mod restore;
mod rounds;
mod shortcut;
mod stall;
mod status;
#[cfg(test)]
mod tests;
mod unary;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tonic_health::ServingStatus;

use crate::api::{Api, AuthOptions, DiagnosisOptions, Facts, Options, PeerApi, StreamOptions, VERSION, WatchOptions};
use crate::cluster::decide::Expected;
use crate::cluster::kubernetes::{self, Kubernetes};
use crate::cluster::wanted::{Reading, Watch};
use crate::cluster::{Bootstrap, Declared, Outcome, Places, Wanted, WantedSource, formation};
use crate::conditions::{self, Conditions, Found, kinds};
use crate::config::{self, Config, MemberKind, PlainPeers, TlsMode};
use crate::env::Env;
use crate::identity::{self, PeerAddresses};
use crate::kv;
use crate::kv::validate::Limits;
use crate::node::account::Account;
use crate::pb::log::{Node, node};
use crate::raft::Peers;
use crate::secure;
use crate::secure::oidc::Issuer;
use crate::storage::member_dir::{MemberDir, Opened};
use crate::storage::{Progress, state};
use crate::telemetry::audit::Audit;

use self::listen::Addresses;

/// Time that a peer has to say who it is.
const WHO_PATIENCE: Duration = Duration::from_secs(1);

/// So long the end of a process waits for its audit log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// One process, whatever member it is at the moment.
struct Server {
    env: Env,
    config: Config,
    this: config::Node,
    state_engine: state::Engine,
    account: Account,
    quota_bytes: Option<u64>,
    bootstrap: Arc<Bootstrap>,
    peers: Arc<Peers>,
    tls: secure::Ports,
    places: Places,
    /// Users and roles that a file declares, if one does.
    declared: Option<Arc<Declared>>,
    /// Whose tokens are taken beside this cluster's own.
    issuer: Option<Arc<Issuer>>,
    /// Who says how many members there should be; `None` outside of Kubernetes.
    wanted: Option<Watch>,
    /// Who asks for what is written down, if the settings say so.
    audit: Option<Audit>,
    api: Api,
    peer_api: PeerApi,
    health: tonic_health::server::HealthReporter,
    clients: clients::Port,
    /// How far this member has read its disk.
    progress: Progress,
    conditions: Conditions,
}

/// How a member's life ended.
enum Ended {
    Shutdown,
    /// The formation is dead, or the disk lost: this process goes on under another identity.
    Again,
    /// This member was removed: it archives itself and joins as a new one.
    Removed,
    /// Its disk went back, as a leader with a quorum remembers: the same.
    WentBack,
}

/// Runs a server until SIGTERM or SIGINT.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let env = Env::real();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = env.stopping.clone();
    env.spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stopping.cancelled() => {}
        }
        tracing::info!("shutting down");
        stopping.cancel();
    });
    env.spawn(outlive_signals(env.clone())?);
    let this = config.node_here(&*env.disk)?;
    let source = kubernetes::Options::here(&config.kubernetes, &this.name, &*env.disk)?
        .map(|options| Arc::new(Kubernetes::start(env.clone(), options)) as Arc<dyn WantedSource>);
    serve(env, config, state::Engine::Sled, source).await
}

/// Signals that would end the process at once, without a hand-over, and that people send for other reasons: a terminal that is closed,
/// or to have files read anew, which is done for certificates; settings are not.
fn outlive_signals(env: Env) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut hangup, mut user1, mut user2) =
        (signal(SignalKind::hangup())?, signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?);
    Ok(async move {
        loop {
            let name = tokio::select! {
                _ = hangup.recv() => "SIGHUP",
                _ = user1.recv() => "SIGUSR1",
                _ = user2.recv() => "SIGUSR2",
                () = env.stopping.cancelled() => return,
            };
            if name == "SIGHUP" {
                env.reread.send_replace(());
                tracing::info!(
                    signal = name,
                    "certificates are read anew; settings are read at start; SIGTERM stops this member"
                );
                continue;
            }
            tracing::info!(
                signal = name,
                "nothing is done on this signal: settings are read at start; SIGTERM stops this member"
            );
        }
    })
}

/// Runs a server until `env` is asked to stop.
pub async fn serve(
    env: Env,
    config: Config,
    state_engine: state::Engine,
    source: Option<Arc<dyn WantedSource>>,
) -> anyhow::Result<()> {
    let this = this_node(&env, &config)?;
    let memory_limit = config::cgroup_memory_limit(&*env.disk);
    let config = config.within_memory(memory_limit)?;
    let quota_bytes = Some(config.storage.quota_bytes.0).filter(|quota| *quota > 0);
    let (mint_env, slot) = (env.clone(), this.slot);
    let mint = Arc::new(move |slot| identity::mint(mint_env.random_u64(), slot as u16));
    let tls = secure::Ports::open(&*env.disk, &config, &this)?;
    tls.watch(&env);
    let declared = declared(&env, &config)?;
    let issuer = Issuer::open(&*env.disk, &config).map_err(anyhow::Error::msg)?;
    let peers = Peers::with_tls(env.clone(), tls.peer.clone());
    let wanted = source.map(|source| Watch::start(&env, source));
    let places = places(&env, &config, &this, wanted.as_ref());
    let opened = open_dir(&env, &config, &this, &peers, &places, &*mint).await?;
    let addresses = Addresses::bind(&env, &config.server)?;
    let bootstrap = Bootstrap::new(env.clone(), opened.dir, node_record(&this, &config), this.founding, mint);
    if opened.lost_log {
        tracing::error!("this member's log is gone: a lost disk; it goes on as a new member");
        bootstrap.mint_anew().await?;
    }
    let account =
        Account::new(config.limits.receive_bytes_max.0, config.limits.answer_bytes_max.0, config.watch.watchers_max);
    let Addresses { client, peer, status } = addresses;
    let audit = Audit::open(&config.audit, &this.name)?;
    let progress = Progress::default();
    let conditions = conditions((&env, &config, &*this.name), &bootstrap, &progress, wanted.as_ref(), &tls);
    add_sources(&conditions, &this.name, declared.as_ref(), issuer.as_ref());
    let server = Arc::new(Server {
        audit,
        places,
        declared,
        issuer,
        wanted,
        api: Api::new(&env, account.clone(), conditions.clone(), api_options(&config, quota_bytes)),
        peer_api: PeerApi::new(bootstrap.clone(), peers.clone(), conditions.clone(), config.peer_tls.check_address),
        conditions: conditions.clone(),
        account,
        quota_bytes,
        bootstrap,
        peers,
        tls,
        health: tonic_health::server::HealthReporter::new(),
        clients: clients::Port::new(client),
        progress,
        this,
        state_engine,
        config,
        env: env.clone(),
    });
    if let Some(issuer) = &server.issuer {
        server.api.set_issuer(issuer.clone());
        env.spawn(issuer.clone().follow(env.clone()));
    }
    tracing::info!(version = VERSION, name = server.this.name, slot, "quorate");
    server.tell_memory(memory_limit);
    if !env.is_simulated() {
        env.spawn(stall::watch(env.clone()));
    }
    server.show_facts();
    env.spawn(conditions.run());
    env.spawn(server.api.clone().sample_figures(env.clone()));
    server.set_health(false).await;
    server.health.set_service_status("liveness", ServingStatus::Serving).await;
    server.listen(status, peer)?;
    let ended = tokio::select! {
        ended = server.live() => ended,
        () = env.failed.cancelled() => Err(anyhow!("a part of this process has failed, see above; it must be restarted")),
    };
    env.stop(Duration::from_secs(5)).await;
    if let Some(audit) = &server.audit {
        audit.flush(LAST_LINES);
    }
    ended
}

/// Reads the file that declares users, and follows it.
fn conditions(
    (env, config, name): (&Env, &Config, &str),
    bootstrap: &Arc<Bootstrap>,
    progress: &Progress,
    wanted: Option<&Watch>,
    tls: &secure::Ports,
) -> Conditions {
    Conditions::new(conditions::Parts {
        env: env.clone(),
        name: name.to_owned(),
        bootstrap: bootstrap.clone(),
        progress: progress.clone(),
        wanted: wanted.cloned(),
        tls: tls.clone(),
        election_timeout_max: config.raft.election_timeout_max,
        heartbeat_interval: config.raft.heartbeat_interval,
        disk_reserve_bytes: config.storage.disk_reserve.0,
    })
}

/// What only the server knows: files of declared users, and an issuer's keys.
fn add_sources(conditions: &Conditions, name: &str, declared: Option<&Arc<Declared>>, issuer: Option<&Arc<Issuer>>) {
    if let Some(declared) = declared.cloned() {
        let name = name.to_owned();
        conditions.add_source(move || {
            let stale = declared.stale().map(|words| Found::new(&kinds::AUTH_FILE, &name, words));
            let blocked = declared.blocked().map(|words| Found::new(&kinds::AUTH_BOOTSTRAP, &name, words));
            stale.into_iter().chain(blocked).collect()
        });
    }
    if let Some(issuer) = issuer.cloned() {
        let name = name.to_owned();
        let keys = move || issuer.note().map(|words| Found::new(&kinds::OIDC_KEYS, &name, words));
        conditions.add_source(move || keys().into_iter().collect());
    }
}

fn declared(env: &Env, config: &Config) -> anyhow::Result<Option<Arc<Declared>>> {
    let auth = &config.auth;
    if auth.bootstrap.as_os_str().is_empty() {
        return Ok(None);
    }
    let declared = Declared::open(env, &auth.bootstrap, auth.bcrypt_cost).map_err(anyhow::Error::msg)?;
    env.spawn(declared.clone().follow(env.clone()));
    Ok(Some(declared))
}

fn api_options(config: &Config, quota_bytes: Option<u64>) -> Options {
    Options {
        limits: limits(&config.limits),
        watch: WatchOptions { progress_interval: config.watch.progress_interval },
        auth: AuthOptions {
            certificate_user: config.client_tls.user,
            is_declared: !config.auth.bootstrap.as_os_str().is_empty(),
            token_ttl: config.auth.token_ttl,
            bcrypt_cost: config.auth.bcrypt_cost,
        },
        quota_bytes: quota_bytes.unwrap_or(0),
        snapshot_rate: config.raft.snapshot_rate.0,
        streams: StreamOptions {
            backups_max: config.limits.backups_max,
            range_streams_max: config.limits.range_streams_max,
        },
        first_slot: u64::from(config.cluster.first_slot),
        slow_request: config.telemetry.slow_request,
        diagnosis: DiagnosisOptions { config: config.text_without_secrets(), data_dir: config.server.data_dir.clone() },
    }
}

/// Who this node is. A list of first members says so only while there is no cluster: later it may be another one, and the disk says it.
fn this_node(env: &Env, config: &Config) -> anyhow::Result<config::Node> {
    let mut this = config.node_here(&*env.disk)?;
    if config.cluster.kind == MemberKind::Manual
        && let Ok(Some(known)) = MemberDir::peek(env.disk.clone(), &config.server.data_dir)
        && let Ok(slot) = u16::try_from(known.slot)
    {
        this.slot = slot;
    }
    Ok(this)
}

/// Opens the data directory. If who this node was cannot be read any more, and a quorum of others goes on without it, it becomes a new
/// member beside what is left; with nobody there a person must decide.
async fn open_dir(
    env: &Env,
    config: &Config,
    this: &config::Node,
    peers: &Arc<Peers>,
    places: &Places,
    mint: &(dyn Fn(u64) -> u64 + Send + Sync),
) -> anyhow::Result<Opened> {
    let (root, slot) = (&config.server.data_dir, u64::from(this.slot));
    let error = match MemberDir::open(env.disk.clone(), root, slot, &this.name, || mint(slot)) {
        Err(error) if error.is_damage() => error,
        opened => return Ok(opened?),
    };
    let asker: Arc<dyn crate::cluster::Peers> = Arc::new(peers.clone());
    let known = MemberDir::clusters(&*env.disk, root);
    let Some(cluster) = formation::led_with_slot(env, &asker, places, slot, &known).await else {
        return Err(anyhow!(error).context(
            "this node cannot read who it is, and no leader of its cluster with a quorum of others answers; once there is one, it becomes a \
             new member by itself; else put the file back from a copy of the disk; nothing was changed",
        ));
    };
    tracing::error!(%error, cluster = format!("{cluster:016x}"), "this member's identity is lost; it goes on as a new member");
    Ok(MemberDir::open_anew(env.disk.clone(), root, slot, &this.name, mint(slot))?)
}

fn limits(settings: &config::Limits) -> Limits {
    Limits {
        request_bytes_max: settings.request_bytes_max.as_usize(),
        txn_ops_max: settings.txn_ops_max,
        txn_ops_total_max: settings.txn_ops_total_max,
        txn_depth_max: settings.txn_depth_max,
        request_cost_max: settings.request_cost_max,
    }
}

/// What the membership says of this node.
fn node_record(this: &config::Node, config: &Config) -> Node {
    let (kind, peer_tls) = (config.cluster.kind, &config.peer_tls);
    let tls = peer_tls.mode != TlsMode::Off && peer_tls.plain != PlainPeers::Accept;
    Node {
        name: this.name.clone(),
        peer_address: this.advertise_peer.clone(),
        client_urls: this.advertise_client.clone(),
        kind: match kind {
            MemberKind::Slot => node::Kind::Slot,
            MemberKind::Manual => node::Kind::Manual,
            MemberKind::Reader => node::Kind::Reader,
        }
        .into(),
        apply_version: kv::apply_version(),
        held: false,
        reservation: None,
        more_peer_addresses: this.more_peer_addresses.clone(),
        tls,
    }
}

fn places(env: &Env, config: &Config, this: &config::Node, wanted: Option<&Watch>) -> Places {
    let expand = this.peers.clone().map(|peers| {
        Arc::new(move |slot: u64| peers.expand(u16::try_from(slot).ok()?)) as crate::cluster::formation::Expand
    });
    let (slots, max_voters) = match &this.peers {
        Some(PeerAddresses::List(list)) => (0..u64::from(list.size()), None),
        _ => {
            let (first, size) = (u64::from(config.cluster.first_slot), u64::from(config.cluster.size));
            (first..first + size, Some(usize::from(config.cluster.max_voters)))
        }
    };
    // Who owns no slot forms nothing, so the size is nothing to it.
    let wanted = wanted.filter(|_| config.cluster.kind == MemberKind::Slot).cloned();
    let join = config.cluster.join.clone();
    let headless = this.peers.as_ref().and_then(|p| p.headless()).map(str::to_owned);
    Places {
        expand,
        expected: Arc::new(move || expected(slots.clone(), wanted.as_ref().map(Watch::reading))),
        resolve: (headless.is_some() || !join.is_empty()).then(|| {
            let env = env.clone();
            Arc::new(move || {
                let resolving = headless.clone().map(|name| env.net.resolve(name));
                let mut addresses = join.clone();
                Box::pin(async move {
                    if let Some(resolving) = resolving {
                        // A headless name without pods does not resolve; then nobody is there.
                        addresses.extend(resolving.await.unwrap_or_default().into_iter().map(|a| a.to_string()));
                    }
                    addresses
                }) as crate::env::net::BoxFuture<Vec<String>>
            }) as Arc<dyn Fn() -> crate::env::net::BoxFuture<Vec<String>> + Send + Sync>
        }),
        max_voters,
        restore: first::resolver(env, config),
        patience: WHO_PATIENCE,
    }
}

/// Rule 6: the greater of the configured and the wanted size, and also the pods that exist. Who should know and does not say makes
/// a node wait.
fn expected(configured: std::ops::Range<u64>, reading: Option<Reading>) -> Expected {
    let only = |unknown| Expected { slots: configured.clone(), also: 0..0, one_by_one: false, unknown };
    match reading.map(|reading| reading.wanted) {
        None => only(None),
        Some(Wanted::Slots { slots, present, one_by_one }) => {
            let size = (configured.end - configured.start).max(slots.end - slots.start);
            Expected { slots: slots.start..slots.start + size, also: present, one_by_one, unknown: None }
        }
        Some(Wanted::Shutdown) => only(Some("the StatefulSet wants none, or is being deleted".into())),
        Some(Wanted::Unknown(why)) => only(Some(why)),
    }
}

impl Server {
    fn tell_memory(&self, limit: Option<u64>) {
        let Some(limit) = limit else { return };
        let (quota, most) = (self.config.storage.quota_bytes, config::Bytes(self.config.memory_bytes_max()));
        tracing::info!(limit = %config::Bytes(limit), %quota, %most, "memory is divided up to fit its limit");
    }

    /// One member's life after another, until shutdown.
    async fn live(self: &Arc<Self>) -> anyhow::Result<()> {
        let asker: Arc<dyn crate::cluster::Peers> = Arc::new(self.peers.clone());
        loop {
            let outcome = formation::run(&self.bootstrap, &asker, &self.places).await?;
            if outcome == Outcome::Shutdown {
                return Ok(());
            }
            match self.member(outcome).await.context("this member cannot go on")? {
                Ended::Shutdown => return Ok(()),
                Ended::Again | Ended::Removed | Ended::WentBack => {}
            }
        }
    }

    /// Keeps what `status` and the status page show up to date, also before there is a cluster.
    fn show_facts(self: &Arc<Self>) {
        let server = self.clone();
        self.env.spawn(async move {
            let mut tick = crate::env::interval(Duration::from_millis(500));
            loop {
                tokio::select! {
                    _ = tick.tick() => {}
                    () = server.env.shutdown.cancelled() => return,
                }
                let dir = &server.config.server.data_dir;
                let identity = server.bootstrap.identity();
                server.api.set_facts(Facts {
                    name: server.this.name.clone(),
                    slot: Some(u64::from(server.this.slot)),
                    member_id: identity.member_id,
                    cluster_id: identity.cluster_id,
                    disk_free_bytes: server.env.disk.free_bytes(dir).unwrap_or(0),
                    progress: server.progress.clone(),
                    waits: server.bootstrap.waits(),
                });
            }
        });
    }
}
