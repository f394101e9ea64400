//! Users and roles that a file of the operator's declares (`auth.bootstrap`), and authentication that is on from the first moment.
//!
//! Each member reads the file at its start and when it changes, and says in the answer to `Who` what it holds. The leader carries it out, as
//! one command, when all voters hold the same, once a file: its mark is kept in the state. What the file names is made so, what it does not
//! name is left alone. A password that fits the hash that is there is left, else its hash is made here, before proposing.
//! Invariants: a member with such a file serves no client while authentication is off in what it has applied (`server/clients`, `api`); so there
//! is no moment at which it is open. A file that cannot be used keeps the one before it in force, at the start it keeps the member from
//! starting. What others are told of the file, they can make no guess of its passwords with that is cheaper than one of their hashes.
//! Absent: what carrying it out comes to (`kv::auth`).

mod file;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::{Mutex, RwLock};

use self::file::{Declaration, Password};
use crate::caller::Caller;
use crate::env::{Env, Pool, interval};
use crate::kv::{AUTH_SINCE, Auth};
use crate::node::Node;
use crate::pb::log::auth_change::Change;
use crate::pb::log::{AuthChange, AuthDeclare, Command, auth_declare, command};
use crate::raft::Peers;
use crate::secure::password::Passwords;

/// Between two looks at the file, and at whether it is carried out.
const LOOK: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(500);

/// The file, as this member follows it.
pub struct Declared {
    path: PathBuf,
    passwords: Passwords,
    now: RwLock<Arc<Declaration>>,
    /// Why a newer file is not in force.
    fault: Mutex<Option<String>>,
    /// Why what is in force is not carried out.
    blocked: Mutex<Option<String>>,
    waits_for_others: AtomicBool,
}

impl Declared {
    /// Reads the file, or says what is wrong with it. `cost`: of the hashes that are made.
    pub fn open(env: &Env, path: &Path, cost: u32) -> Result<Arc<Self>, String> {
        let now = Declaration::read(&*env.disk, path).map_err(|error| format!("auth.bootstrap: {error}"))?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            passwords: Passwords::new(env.clone(), cost),
            now: RwLock::new(Arc::new(now)),
            fault: Mutex::default(),
            blocked: Mutex::default(),
            waits_for_others: AtomicBool::new(false),
        }))
    }

    /// What others are told of the file.
    pub fn mark(&self) -> u64 {
        self.now.read().mark
    }

    /// Whether some voter has another file, or none: then the others must be given it before this member can serve.
    pub fn waits_for_others(&self) -> bool {
        self.waits_for_others.load(Ordering::Relaxed)
    }

    /// Why a newer file is not in force, for people.
    pub fn stale(&self) -> Option<String> {
        let fault = self.fault.lock().clone()?;
        Some(format!("a new file of declared users is not taken, the old one stays in force: {fault}"))
    }

    /// Why what is in force is not carried out, for people.
    pub fn blocked(&self) -> Option<String> {
        let why = self.blocked.lock().clone()?;
        Some(format!("declared users and roles are not carried out: {why}"))
    }

    /// Follows the file, until shutdown.
    pub async fn follow(self: Arc<Self>, env: Env) {
        let (mut tick, mut asked) = (interval(LOOK), env.reread.subscribe());
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                Ok(()) = asked.changed() => {}
                () = env.shutdown.cancelled() => return,
            }
            let (declared, disk) = (self.clone(), env.disk.clone());
            env.long(Pool::Disk, move || declared.look(Declaration::read(&*disk, &declared.path))).await;
        }
    }

    fn look(&self, read: Result<Declaration, String>) {
        let mut fault = self.fault.lock();
        match read {
            Ok(read) => {
                *fault = None;
                if read.mark != self.mark() {
                    *self.now.write() = Arc::new(read);
                    tracing::info!(file = %self.path.display(), "a new file of declared users is in force");
                }
            }
            Err(error) => {
                if fault.as_ref() != Some(&error) {
                    tracing::error!(error, "a new file of declared users is not taken; the old one stays in force");
                }
                *fault = Some(error);
            }
        }
    }

    /// Carries the file out while this member leads, until the end of its life.
    pub async fn carry_out(self: Arc<Self>, node: Node, peers: Arc<Peers>) {
        let shutdown = node.env().shutdown.clone();
        let (mut tick, mut before) = (interval(TICK), None);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let outcome = tokio::select! {
                outcome = self.step(&node, &peers) => outcome,
                () = shutdown.cancelled() => return,
            };
            // What lasts for a moment, as at every start, is not worth a word.
            let why = outcome.err();
            let lasting = why.clone().filter(|_| why == before);
            before = why;
            let mut blocked = self.blocked.lock();
            if let Some(why) = &lasting
                && blocked.as_ref() != Some(why)
            {
                tracing::warn!(why, "declared users and roles are not carried out; tried again");
            }
            *blocked = lasting;
        }
    }

    async fn step(&self, node: &Node, peers: &Peers) -> Result<(), String> {
        let wanted = self.now.read().clone();
        let (auth, version) = node.store().read(|s| (s.kv.auth_view(), s.kv.cluster_version()));
        if auth.declared() == wanted.mark && auth.is_enabled() {
            self.waits_for_others.store(false, Ordering::Relaxed);
            return Ok(());
        }
        let others = self.others(node, peers, wanted.mark).await;
        let differ = others.iter().any(|(_, mark)| mark.is_some());
        self.waits_for_others.store(differ, Ordering::Relaxed);
        if !others.is_empty() {
            let names = |differs: bool| {
                let names = others.iter().filter(|(_, mark)| mark.is_some() == differs).map(|(name, _)| &name[..]);
                names.collect::<Vec<_>>().join(", ")
            };
            return Err(match differ {
                true => format!("{} declare others, or none; give all members the same file", names(true)),
                false => format!("{} do not answer, and all voters must have the same file", names(false)),
            });
        }
        // A standby has its source's users until it is promoted.
        if !node.status().is_leader || !node.store().is_writable() {
            return Ok(());
        }
        if version < AUTH_SINCE {
            return Err(format!(
                "users need cluster version {AUTH_SINCE}, this cluster has {version}; it rises by itself"
            ));
        }
        let declare = self.command(node.env(), &wanted, &auth).await?;
        let request = command::Request::Auth(AuthChange { change: Some(Change::Declare(declare)) });
        let proposed = node.propose(&Caller::Internal, Command::new(AUTH_SINCE, request)).await;
        proposed.map_err(|error| error.to_string())?;
        tracing::info!(file = %self.path.display(), "declared users and roles are carried out");
        Ok(())
    }

    /// The other voters that do not hold this file, and what they hold; `None` for who does not answer.
    async fn others(&self, node: &Node, peers: &Peers, mark: u64) -> Vec<(String, Option<u64>)> {
        let (status, this) = (node.status(), node.member());
        let voters: Vec<u64> = status.membership.voter_ids().filter(|id| *id != this.member_id).collect();
        let asks = voters.into_iter().filter_map(|id| Some((id, status.membership.get_node(&id)?.clone())));
        let asks = asks.map(|(id, member)| async move {
            let nonce = node.env().random_u64();
            let who = peers.who(&member.peer_address, nonce).await.ok();
            let who = who.filter(|who| (who.nonce, who.member_id, who.cluster_id) == (nonce, id, this.cluster_id));
            (member.name, who.map(|who| who.auth_declared))
        });
        join_all(asks).await.into_iter().filter(|(_, held)| *held != Some(mark)).collect()
    }

    async fn command(&self, env: &Env, wanted: &Declaration, auth: &Auth) -> Result<AuthDeclare, String> {
        let mut users = Vec::new();
        for user in &wanted.users {
            let known = auth.user(&user.name).map(|known| known.password_hash.clone()).unwrap_or_default();
            let hash = match &user.password {
                Password::None => Bytes::new(),
                Password::Hashed(hash) if known == hash.as_bytes() => Bytes::new(),
                Password::Hashed(hash) => Bytes::copy_from_slice(hash.as_bytes()),
                Password::Plain(password) => {
                    let hash = self.passwords.hash_unless_fits(&known, password.clone()).await;
                    hash.map_err(|error| format!("user {:?}: {error}", user.name))?.unwrap_or_default()
                }
            };
            let (name, no_password) = (user.name.clone(), user.password == Password::None);
            users.push(auth_declare::User { name, hash, no_password, roles: user.roles.clone() });
        }
        let token_key = Bytes::copy_from_slice(&env.secret());
        Ok(AuthDeclare { roles: wanted.roles.clone(), users, mark: wanted.mark, token_key })
    }
}
