//! The etcd v3 gRPC API and the peer API, as adapters of a few lines.
//!
//! Owns what a request needs before and after the store: the stateless checks, the read index, headers, the mapping of
//! errors. Absent: semantics (`kv`), transport security, the HTTP gateway.

mod admin;
mod answers;
mod audited;
mod auth;
mod caller;
mod cluster;
mod diagnose;
mod election;
mod exposition;
mod figures;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod overview;
mod peer;
mod pull;
mod queue;
mod range_stream;
mod sample;
mod slow;
mod snapshot;
mod turns;
mod wait;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::http::HeaderName;
use parking_lot::RwLock;
use tonic::{Request, Status};

use self::audited::Audited;
use self::pull::Slots;
use crate::backup::Follower;
use crate::cluster::Manager;
use crate::conditions::Conditions;
use crate::config::CertUser;
use crate::env::Env;
use crate::error::Error;
use crate::kv::validate::Limits;
use crate::lease::Leases;
use crate::node::account::Account;
use crate::node::{Client, Node, Trust};
use crate::pb::etcd;
use crate::secure::oidc::Issuer;
use crate::secure::password::Passwords;
use crate::secure::token::Tokens;
use crate::storage::Progress;
use crate::watch::Hub;

#[cfg(test)]
pub use answers::Aside;
pub use answers::{Large, Making, Written};
pub use figures::{FIGURES, Figure, Figures, Sampled, Unit};
pub use kv::OnKeys;
pub use overview::Overview;
pub use peer::{PeerApi, Proof, Running};
pub use sample::Sample;
pub use turns::Turns;
pub use watch::{Responses as WatchResponses, WatchOptions};

/// The level of the etcd API that is spoken: clients switch features by it (Kubernetes: progress requests, streamed ranges).
pub const ETCD_VERSION: &str = "3.7.3";
/// As etcd tells it of a cluster, all of whose members speak that level, and of its storage.
pub const ETCD_CLUSTER_VERSION: &str = "3.7.0";
/// The same where etcd tells it without a patch.
pub const ETCD_CLUSTER_MINOR: &str = "3.7";
/// Our own version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the client services share. The node is absent until this member belongs to a cluster.
#[derive(Clone)]
pub struct Api {
    shared: Arc<Shared>,
}

struct Shared {
    env: Env,
    diagnosis: DiagnosisOptions,
    node: RwLock<Option<Node>>,
    leases: RwLock<Option<Leases>>,
    watch: RwLock<Option<Hub>>,
    watch_options: WatchOptions,
    certificate_user: CertUser,
    is_auth_declared: bool,
    issuer: OnceLock<Arc<Issuer>>,
    tokens: Tokens,
    passwords: Passwords,
    manager: RwLock<Option<Arc<Manager>>>,
    follower: RwLock<Option<Arc<Follower>>>,
    /// The lowest slot, where a request to scale names none.
    first_slot: u64,
    slow_request: Duration,
    limits: Limits,
    quota_bytes: u64,
    account: Account,
    turns: Turns,
    /// Bytes a second of one backup.
    snapshot_rate: u64,
    backups: Slots,
    range_streams: Slots,
    /// Clients are served.
    ready: AtomicBool,
    /// The hub was taken away.
    stopping: AtomicBool,
    facts: RwLock<Facts>,
    conditions: Conditions,
    figures: Figures,
}

/// Streams that hold a view of the data: how many of each kind are open at a time.
#[derive(Clone, Copy, Debug)]
pub struct StreamOptions {
    pub backups_max: usize,
    pub range_streams_max: usize,
}

/// How users show who they are; see `[auth]` in `config/quorate.toml`.
#[derive(Clone, Copy, Debug)]
pub struct AuthOptions {
    /// Whom the certificate of a connection names.
    pub certificate_user: CertUser,
    /// Users are declared (`auth.bootstrap`): nobody is served while authentication is off.
    pub is_declared: bool,
    pub token_ttl: Duration,
    pub bcrypt_cost: u32,
}

/// Settings of the services.
#[derive(Clone, Debug)]
pub struct Options {
    pub limits: Limits,
    pub watch: WatchOptions,
    pub auth: AuthOptions,
    pub quota_bytes: u64,
    /// Most bytes a second of one backup.
    pub snapshot_rate: u64,
    pub streams: StreamOptions,
    /// Where a request to scale names none.
    pub first_slot: u64,
    /// Requests that take longer are logged; zero: none.
    pub slow_request: Duration,
    /// For whoever helps.
    pub diagnosis: DiagnosisOptions,
}

/// What a diagnosis has beside what can be asked of a member at any time.
#[derive(Clone, Debug, Default)]
pub struct DiagnosisOptions {
    /// The settings in force, without secrets.
    pub config: String,
    pub data_dir: PathBuf,
}

/// What `status` shows beside Raft's state.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub name: String,
    pub slot: Option<u64>,
    /// Told also while Raft does not run, so that members without a cluster are told apart.
    pub member_id: u64,
    /// 0 while this member belongs to none.
    pub cluster_id: u64,
    pub disk_free_bytes: u64,
    /// How far it has read its disk.
    pub progress: Progress,
    /// What this member waits for.
    pub waits: Option<String>,
}

impl Facts {
    /// How far this member is on its way to Raft.
    fn begins(&self) -> String {
        let waits = self.progress.describe().or_else(|| self.waits.clone());
        waits.unwrap_or_else(|| if self.cluster_id == 0 { "belongs to no cluster yet" } else { "starts" }.into())
    }
}

impl Api {
    pub fn new(env: &Env, account: Account, conditions: Conditions, options: Options) -> Self {
        let Options { limits, watch, auth, quota_bytes, snapshot_rate, streams, first_slot, slow_request, diagnosis } =
            options;
        let shared = Shared {
            node: RwLock::new(None),
            leases: RwLock::new(None),
            watch: RwLock::new(None),
            watch_options: watch,
            certificate_user: auth.certificate_user,
            is_auth_declared: auth.is_declared,
            issuer: OnceLock::new(),
            tokens: Tokens::new(auth.token_ttl),
            passwords: Passwords::new(env.clone(), auth.bcrypt_cost),
            manager: RwLock::new(None),
            follower: RwLock::new(None),
            env: env.clone(),
            diagnosis,
            first_slot,
            slow_request,
            limits,
            quota_bytes,
            account,
            turns: Turns::new(env),
            snapshot_rate,
            backups: Slots::new(streams.backups_max),
            range_streams: Slots::new(streams.range_streams_max),
            ready: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            facts: RwLock::default(),
            conditions,
            figures: Figures::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Whose tokens are taken beside this cluster's own; to be called once, before anybody is served.
    pub fn set_issuer(&self, issuer: Arc<Issuer>) {
        let _ = self.shared.issuer.set(issuer);
    }

    /// From now on requests go to `node`; `None` while this member belongs to no cluster.
    pub fn set_node(&self, node: Option<Node>) {
        *self.shared.node.write() = node;
    }

    /// The leases of the node.
    pub fn set_leases(&self, leases: Option<Leases>) {
        *self.shared.leases.write() = leases;
    }

    /// From now on watchers are served by `hub`; `None` while there is none. The one before is closed: its streams end.
    pub fn set_watch(&self, hub: Option<Hub>) {
        let mut current = self.shared.watch.write();
        // Whoever's watch ends asks again at once, and is told why there is none.
        self.shared.stopping.store(hub.is_none(), Ordering::Release);
        let old = std::mem::replace(&mut *current, hub);
        drop(current);
        if let Some(old) = old {
            old.close();
        }
    }

    /// As [`Api::set_node`], for what concerns the membership.
    pub fn set_manager(&self, manager: Option<Arc<Manager>>) {
        *self.shared.manager.write() = manager;
    }

    pub fn set_follower(&self, follower: Option<Arc<Follower>>) {
        *self.shared.follower.write() = follower;
    }

    /// Why what is asked for is not there. While this member stops its clients go on elsewhere, where `no leader` would end the watches of
    /// Go's and Java's.
    fn absent(&self) -> Error {
        if self.shared.stopping.load(Ordering::Acquire) { Error::Stopped } else { Error::NoLeader }
    }

    fn manager(&self) -> Result<Arc<Manager>, Error> {
        self.shared.manager.read().clone().ok_or_else(|| self.absent())
    }

    fn follower(&self) -> Result<Arc<Follower>, Error> {
        self.shared.follower.read().clone().ok_or_else(|| self.absent())
    }

    /// Whether clients are served, as probes are told.
    pub fn set_ready(&self, ready: bool) {
        self.shared.ready.store(ready, Ordering::Release);
    }

    pub fn set_facts(&self, facts: Facts) {
        *self.shared.facts.write() = facts;
    }

    fn hub(&self) -> Result<Hub, Error> {
        self.shared.watch.read().clone().ok_or_else(|| self.absent())
    }

    fn leases(&self) -> Result<Leases, Error> {
        self.shared.leases.read().clone().ok_or_else(|| self.absent())
    }

    fn facts(&self) -> Facts {
        self.shared.facts.read().clone()
    }

    /// What a person should know.
    pub fn conditions(&self) -> &Conditions {
        &self.shared.conditions
    }

    /// The running node, whatever its state.
    fn any_node(&self) -> Result<Node, Error> {
        self.shared.node.read().clone().ok_or_else(|| self.absent())
    }

    /// The node, if it may serve this request.
    fn node<T: Audited>(&self, request: &Request<T>) -> Result<Node, Error> {
        audited::note(request);
        let node = self.any_node()?.on_behalf_of(client(request));
        if self.shared.is_auth_declared && !node.is_auth_on() {
            return Err(Error::UsersNotYet);
        }
        if needs_leader(request) && node.status().leader.is_none() {
            return Err(Error::NoLeader);
        }
        Ok(node)
    }

    /// As [`Self::node`], for requests for data: not while it is known to be corrupt.
    fn data_node<T: Audited>(&self, request: &Request<T>) -> Result<Node, Error> {
        let node = self.node(request)?;
        sound(&node).map(|()| node)
    }
}

/// Fails if this member's data is known to be corrupt.
fn sound(node: &Node) -> Result<(), Error> {
    if node.trust() == Trust::Sound { Ok(()) } else { Err(Error::Corrupt) }
}

/// What a request is refused for if nobody takes its token: as in etcd, what is wrong with the request itself is looked at before.
fn wrong_first(checked: Result<(), Error>, refused: Error) -> Error {
    checked.err().unwrap_or(refused)
}

/// Resolves when this member's data is known to be corrupt.
async fn unsound(node: &Node) -> Error {
    node.wait_trust(|trust| *trust != Trust::Sound).await;
    Error::Corrupt
}

/// Waits until this member's data is as new as this moment. What it has applied meanwhile may be that it is fenced.
async fn confirm(node: &Node) -> Result<(), Error> {
    node.read_index().await?;
    sound(node)
}

/// What `/health` is asked for.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Of this member alone.
    pub serializable: bool,
    /// Names of alarms that do not count.
    pub exclude: Vec<String>,
}

/// Whose connection this request came on.
fn client<T>(request: &Request<T>) -> Client {
    request.extensions().get::<Client>().cloned().unwrap_or_default()
}

/// A client's header: it wants to be refused without a leader.
const HAS_LEADER: HeaderName = HeaderName::from_static("hasleader");

/// Whether the client wants to be refused without a leader.
fn needs_leader<T>(request: &Request<T>) -> bool {
    request.metadata().as_ref().get(HAS_LEADER).is_some_and(|wants| wants.as_bytes() == b"true")
}

impl Api {
    /// Why this member is not ready (membership rule 28); `None` if it is.
    pub fn not_ready(&self) -> Option<String> {
        let facts = self.facts();
        let Ok(node) = self.any_node() else {
            return Some(facts.begins());
        };
        let raft = node.status();
        if raft.leader.is_none() {
            let joined = node.membership().log_id().is_some();
            let lacks = if joined { "knows no leader" } else { "is formed, waits for a leader" };
            return Some(std::iter::once(lacks.into()).chain(facts.waits).collect::<Vec<_>>().join("; "));
        }
        if let Some(reason) = node.corrupt() {
            return Some(reason.to_owned());
        }
        if self.shared.ready.load(Ordering::Acquire) {
            return None;
        }
        let (applied, committed) = (raft.applied_index, raft.committed_index);
        Some(match node.env().stopping.is_cancelled() {
            true => "is stopping".into(),
            false => format!("applies what was committed when it started: {applied} of {committed} log entries"),
        })
    }

    /// Why this member's own data cannot be read; `None` if it can.
    pub fn no_data(&self) -> Option<String> {
        match self.any_node() {
            Ok(node) => sound(&node).err().map(|error| error.to_string()),
            Err(_) => Some(self.facts().begins()),
        }
    }

    /// Why this member does not vote; `None` if it does.
    pub fn learner(&self) -> Option<String> {
        let is_voter = self.any_node().is_ok_and(|node| !node.status().is_learner);
        (!is_voter).then(|| "not supported for learner".into())
    }

    /// As etcd's `/health`: unhealthy with an alarm on, without a leader, or if a read fails.
    pub async fn not_healthy(&self, ask: &Health) -> Option<String> {
        let Ok(node) = self.any_node() else {
            return Some("RAFT NO LEADER".into());
        };
        for alarm in node.alarms_told() {
            let kind = alarm.alarm().as_str_name();
            if !ask.exclude.iter().any(|excluded| excluded == kind) {
                return Some(format!("ALARM {kind}"));
            }
        }
        if ask.serializable {
            return None;
        }
        if node.status().leader.is_none() {
            return Some("RAFT NO LEADER".into());
        }
        node.read_index().await.err().map(|error| format!("RANGE ERROR:{error}"))
    }

    /// Why this member's data is not to be trusted; `None` if it is.
    pub fn corrupt(&self) -> Option<String> {
        let node = self.any_node().ok()?;
        node.corrupt().map(str::to_owned)
    }
}

/// The header of an answer that was made at `revision`.
fn header(node: &Node, revision: i64) -> Option<etcd::ResponseHeader> {
    let member = node.member();
    Some(etcd::ResponseHeader {
        cluster_id: member.cluster_id,
        member_id: member.member_id,
        revision,
        raft_term: node.term(),
    })
}

/// As [`header`], at the newest revision.
fn header_now(node: &Node) -> Option<etcd::ResponseHeader> {
    header(node, node.revision())
}

/// Completes a header of which apply knew only the revision.
fn complete(node: &Node, made: &Option<etcd::ResponseHeader>) -> Option<etcd::ResponseHeader> {
    header(node, made.as_ref().map_or(0, |h| h.revision))
}

/// An answer of a kind that the command cannot have.
fn mismatched() -> Status {
    Status::internal("quorate: the answer does not fit the request; this is a bug")
}
