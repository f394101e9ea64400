//! What this node is and promises, as it answers the peer service: `Who`, `Accept`, `Abandon`.
//!
//! Owns the data directory. The peer service calls the handlers, the formation driver the other methods; both see one state,
//! so that a promise made to a peer and a step taken here never contradict each other.
//!
//! Invariants: a promise is durable before it is answered. After [`Bootstrap::begin`] nothing is abandoned any more: a vote may
//! be granted at any time. A failed write leaves the disk unknown: every later call fails, and the node must stop.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::decide::{Me, State};
use super::slot_of;
use crate::env::{Env, Pool};
use crate::pb::log::node::Kind;
use crate::pb::log::{Formation, Identity, Node};
use crate::pb::peer::{AbandonResponse, AcceptResponse, JoinRequest, WhoResponse, who_response};
use crate::storage::member_dir::{Error, MemberDir};

/// Gives a new member id for a slot; `identity::mint` with a random number.
pub type Mint = Arc<dyn Fn(u64) -> u64 + Send + Sync>;

/// What a running Raft adds to the answer to `Who`: leader, quorum, indexes, term, membership, sizes. Must not block.
pub trait RaftFacts: Send + Sync + 'static {
    fn fill(&self, answer: &mut WhoResponse);
}

/// A peer's reason is part of the sentence, and peers may be anyone.
const SENTENCE_CHARS_MAX: usize = 1024;

/// What can be told without touching the disk; it follows the disk.
#[derive(Clone)]
struct Known {
    identity: Identity,
    abandoned: Vec<u64>,
}

struct Held {
    dir: MemberDir,
    /// The formation is being handed to Raft. Not durable: a restart has granted nothing, so it may still abandon.
    beginning: bool,
    /// A write has failed: what is on the disk is unknown.
    failed: bool,
}

impl Held {
    fn check(&self) -> Result<(), Error> {
        if self.failed {
            let source = io::Error::other("an earlier write failed; the node must restart");
            return Err(Error::Io { path: self.dir.path(), source });
        }
        Ok(())
    }
}

/// Why a change was not made.
enum Stop {
    Refused(String),
    Disk(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// The node's state towards its peers. See the module's head.
pub struct Bootstrap {
    env: Env,
    node: Node,
    founding: u64,
    process_nonce: u64,
    mint: Mint,
    /// Held during writes: taken away from the event loop only, except for a look at paths.
    held: Mutex<Held>,
    known: Mutex<Known>,
    raft: Mutex<Option<Arc<dyn RaftFacts>>>,
    waits: Mutex<Option<String>>,
}

impl Bootstrap {
    /// `node` is what this node announces: name, addresses, apply version; `founding` stands for its list of first members, if it has one.
    pub fn new(env: Env, dir: MemberDir, node: Node, founding: u64, mint: Mint) -> Arc<Self> {
        let known = Known { identity: dir.identity().clone(), abandoned: dir.abandoned() };
        Arc::new(Self {
            process_nonce: env.random_u64(),
            env,
            node,
            founding,
            mint,
            held: Mutex::new(Held { dir, beginning: false, failed: false }),
            known: Mutex::new(known),
            raft: Mutex::new(None),
            waits: Mutex::new(None),
        })
    }

    pub fn env(&self) -> &Env {
        &self.env
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn process_nonce(&self) -> u64 {
        self.process_nonce
    }

    pub fn identity(&self) -> Identity {
        self.known.lock().identity.clone()
    }

    /// What the node waits for before Raft can start; `None` when it waits for nothing. For the log, `/readyz` and `status`.
    pub fn waits(&self) -> Option<String> {
        self.waits.lock().clone()
    }

    /// Says what the node waits for.
    pub fn set_waits(&self, sentence: Option<String>) {
        let sentence = sentence.map(|text| text.chars().take(SENTENCE_CHARS_MAX).collect::<String>());
        *self.waits.lock() = sentence;
    }

    /// From now on `Who` is answered with what Raft knows.
    pub fn set_raft(&self, facts: Option<Arc<dyn RaftFacts>>) {
        *self.raft.lock() = facts;
    }

    /// Handler of `Who`.
    pub fn who(&self, nonce: u64) -> WhoResponse {
        let known = self.known.lock().clone();
        let mut answer = WhoResponse {
            nonce,
            member_id: known.identity.member_id,
            slot: known.identity.slot,
            name: self.node.name.clone(),
            cluster_id: known.identity.cluster_id,
            formation: known.identity.formation.clone(),
            node: Some(self.node.clone()),
            version: env!("CARGO_PKG_VERSION").into(),
            process_nonce: self.process_nonce,
            abandoned_cluster_ids: known.abandoned,
            founding: self.founding,
            ..WhoResponse::default()
        };
        let facts = self.raft.lock().clone();
        if let Some(facts) = facts {
            facts.fill(&mut answer);
        }
        let identity = known.identity;
        answer.set_state(if identity.cluster_id == 0 {
            who_response::State::Pristine
        } else if identity.log_started && (identity.formation.is_some() || answer.last_log_index > 0) {
            who_response::State::Formed
        } else if identity.formation.is_some() {
            who_response::State::Accepted
        } else {
            who_response::State::Joining
        });
        answer
    }

    /// Handler of `Accept`: fsyncs the acceptance, or says why not.
    pub async fn accept(self: &Arc<Self>, formation: Formation) -> Result<AcceptResponse, Error> {
        let result = self
            .change(move |held| {
                may_accept(held.dir.identity(), &formation).map_err(Stop::Refused)?;
                Ok(held.dir.accept_formation(&formation)?)
            })
            .await?;
        Ok(AcceptResponse { accepted: result.is_ok(), reason: result.err().unwrap_or_default() })
    }

    /// Handler of `Abandon`: fsyncs that this node never votes in that formation, or says why not.
    pub async fn abandon(self: &Arc<Self>, cluster_id: u64) -> Result<AbandonResponse, Error> {
        let result = self
            .change(move |held| {
                if held.dir.abandoned().contains(&cluster_id) {
                    return Ok(());
                }
                may_abandon(held, cluster_id).map_err(Stop::Refused)?;
                Ok(held.dir.abandon()?)
            })
            .await?;
        Ok(AbandonResponse { abandoned: result.is_ok(), reason: result.err().unwrap_or_default() })
    }

    /// Binds this pristine self to the cluster that it joins; refused if it has accepted a formation meanwhile.
    pub async fn set_cluster(self: &Arc<Self>, cluster_id: u64) -> Result<Result<(), String>, Error> {
        self.change(move |held| {
            let identity = held.dir.identity();
            if identity.formation.is_some() || ![0, cluster_id].contains(&identity.cluster_id) {
                return Err(Stop::Refused(belongs(identity)));
            }
            Ok(held.dir.set_cluster(cluster_id)?)
        })
        .await
    }

    /// Takes an id that a leader has reserved for this disk, if nothing was promised under the present one; says whether it was so.
    pub async fn take_reserved(self: &Arc<Self>, member_id: u64) -> Result<Result<(), String>, Error> {
        self.change(move |held| {
            let identity = held.dir.identity();
            if identity.cluster_id != 0 || identity.member_id == member_id {
                return Err(Stop::Refused(belongs(identity)));
            }
            Ok(held.dir.take_reserved(member_id)?)
        })
        .await
    }

    /// Decides to start Raft with the accepted formation; refused if it was abandoned meanwhile. Nothing can be abandoned
    /// from here on.
    pub async fn begin(self: &Arc<Self>) -> Result<Result<(), String>, Error> {
        self.change(|held| {
            let identity = held.dir.identity();
            if identity.formation.is_none() || identity.abandoned {
                return Err(Stop::Refused("the formation was abandoned".into()));
            }
            held.beginning = true;
            Ok(())
        })
        .await
    }

    /// To be called once the log's first file is durable and before Raft starts.
    pub async fn mark_log_started(self: &Arc<Self>) -> Result<(), Error> {
        self.change_always(|held| held.dir.mark_log_started()).await
    }

    /// Becomes a new, pristine self and says its member id. Nothing of the old self may be running.
    pub async fn mint_anew(self: &Arc<Self>) -> Result<u64, Error> {
        let member_id = (self.mint)(self.identity().slot);
        self.change_always(move |held| {
            held.beginning = false;
            held.dir.mint_anew(member_id)
        })
        .await?;
        Ok(member_id)
    }

    /// Gives up the accepted formation although Raft has run in it, and becomes a new self: only when
    /// [`formation::watch`](super::formation::watch) has proven the formation dead, and after Raft was stopped.
    pub async fn leave_dead_formation(self: &Arc<Self>) -> Result<u64, Error> {
        self.change_always(|held| held.dir.abandon()).await?;
        self.mint_anew().await
    }

    /// Deletes all but the `keep` newest former selves; once this one is a caught-up voter.
    pub async fn remove_former(self: &Arc<Self>, keep: usize) -> Result<(), Error> {
        self.change_always(move |held| held.dir.remove_former(keep)).await
    }

    /// Looks at the data directory, for its paths and former selves.
    pub fn with_dir<T>(&self, look: impl FnOnce(&MemberDir) -> T) -> T {
        look(&self.held.lock().dir)
    }

    /// Fails if a write has failed, for example one that a peer had asked for: then the node must stop.
    pub async fn check(self: &Arc<Self>) -> Result<(), Error> {
        self.change_always(|held| held.check()).await
    }

    /// Runs `act` away from the event loop, and then tells what the disk holds now. The inner error is a refusal.
    async fn change<F>(self: &Arc<Self>, act: F) -> Result<Result<(), String>, Error>
    where
        F: FnOnce(&mut Held) -> Result<(), Stop> + Send + 'static,
    {
        let this = self.clone();
        let work = move || {
            let mut held = this.held.lock();
            held.check()?;
            let result = act(&mut held);
            *this.known.lock() = Known { identity: held.dir.identity().clone(), abandoned: held.dir.abandoned() };
            match result {
                Ok(()) => Ok(Ok(())),
                Err(Stop::Refused(reason)) => Ok(Err(reason)),
                Err(Stop::Disk(error)) => {
                    held.failed = true;
                    Err(error)
                }
            }
        };
        self.env.long(Pool::Disk, work).await
    }

    async fn change_always<F>(self: &Arc<Self>, act: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Held) -> Result<(), Error> + Send + 'static,
    {
        let refusal = self.change(move |held| Ok(act(held)?)).await?;
        assert_eq!(refusal, Ok(()), "this change is never refused");
        Ok(())
    }

    /// The request with which this self joins.
    pub fn join_request(&self) -> JoinRequest {
        let identity = self.identity();
        JoinRequest {
            member_id: identity.member_id,
            slot: identity.slot,
            node: Some(self.node.clone()),
            process_nonce: self.process_nonce,
            adopts: identity.cluster_id == 0 && self.node.kind() == Kind::Manual,
        }
    }

    /// This node as the decision sees it.
    pub fn me(&self) -> Me {
        let identity = self.identity();
        let state = match (identity.formation, identity.cluster_id) {
            (Some(formation), _) if identity.abandoned => State::Abandoned(formation),
            (Some(formation), _) => State::Accepted(formation),
            (None, 0) => State::Pristine,
            (None, cluster_id) => State::Joining(cluster_id),
        };
        let (process_nonce, founding) = (self.process_nonce, self.founding);
        Me { member_id: identity.member_id, slot: identity.slot, process_nonce, founding, state }
    }
}

fn may_accept(identity: &Identity, formation: &Formation) -> Result<(), String> {
    if identity.formation.as_ref() == Some(formation) && !identity.abandoned {
        return Ok(());
    }
    if identity.cluster_id != 0 {
        return Err(belongs(identity));
    }
    let mut slots: Vec<u64> = formation.members.iter().map(|member| slot_of(member.id)).collect();
    slots.sort_unstable();
    slots.dedup();
    if formation.cluster_id == 0 || slots.len() != formation.members.len() {
        return Err("not a formation: no cluster id, or two members of one slot".into());
    }
    if !formation.members.iter().any(|member| member.id == identity.member_id) {
        return Err(format!("the formation does not name member {:016x}", identity.member_id));
    }
    Ok(())
}

fn may_abandon(held: &Held, cluster_id: u64) -> Result<(), String> {
    let identity = held.dir.identity();
    if identity.formation.as_ref().is_none_or(|formation| formation.cluster_id != cluster_id) {
        return Err(format!("member {:016x} has not accepted this formation", identity.member_id));
    }
    if held.beginning || identity.log_started {
        return Err(format!("member {:016x} has started Raft in it", identity.member_id));
    }
    Ok(())
}

fn belongs(identity: &Identity) -> String {
    let what = match (&identity.formation, identity.abandoned) {
        (Some(_), true) => "is giving up the formation of",
        (Some(_), false) => "has accepted the formation of",
        (None, _) => "has joined",
    };
    format!("member {:016x} {what} cluster {:016x}", identity.member_id, identity.cluster_id)
}
