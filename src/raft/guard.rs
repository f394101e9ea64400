//! Whom and what this member believes of its peers: the checks that a call, and an answer, passes before Raft sees anything of it.
//!
//! A call is for this member of this cluster; its sender is in the newest membership that this member knows; a vote is its sender's
//! own; and a term is at most `TERM_LEAP_MAX` above this member's, for a greater one would stay, and use up the terms there are.
//! This member may have been away while the others were replaced, or held that many elections. So whom it refuses for that it asks about,
//! in the background: not the caller, but whoever answers at the addresses that this member knows by itself, those of its membership
//! and that of the sender's slot. If they vouch for the sender, or the term, the caller's next try is heard.
//! Invariants: what is refused changes nothing, and is logged once; at most one question is under way, and one a second is begun.
//! Absent: proof of who calls. Without TLS a member's id can be used by anybody who reaches the port.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tonic::Status;

use super::{Member, Peers, Raft};
use crate::env::{Env, sleep};
use crate::identity::slot_of;
use crate::pb::peer::{self, WhoResponse};

/// How far a term may be above this member's own.
pub const TERM_LEAP_MAX: u64 = 1 << 20;
/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Members that others have vouched for, and that are not in the membership here yet.
const VOUCHED_MAX: usize = 64;
/// Refusals that are logged: each once, and no more of them.
const LOGGED_MAX: usize = 1000;

/// The address of a slot, where a pattern or a list says it.
pub type Expand = Arc<dyn Fn(u64) -> Option<String> + Send + Sync>;

/// A call whose sender, or term, this member does not know.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    from: u64,
    term: u64,
}

/// See the module's head.
pub struct Guard {
    env: Env,
    this: Member,
    peers: Arc<Peers>,
    expand: Option<Expand>,
    raft: OnceLock<Raft>,
    /// A term that the others have said they are near.
    vouched_term: AtomicU64,
    vouched: Mutex<BTreeSet<u64>>,
    doubt: Mutex<Option<Doubt>>,
    doubted: Notify,
    /// Cluster and sender of what was refused, and for what.
    logged: Mutex<BTreeSet<(u64, u64, &'static str)>>,
}

impl Guard {
    pub fn new(env: Env, this: Member, peers: Arc<Peers>, expand: Option<Expand>) -> Arc<Self> {
        let (raft, vouched_term, vouched) = (OnceLock::new(), AtomicU64::new(0), Mutex::default());
        let (doubt, doubted, logged) = (Mutex::default(), Notify::new(), Mutex::default());
        Arc::new(Self { env, this, peers, expand, raft, vouched_term, vouched, doubt, doubted, logged })
    }

    /// Goes by what `raft` knows from now on, and asks about who is not known, until shutdown.
    pub fn start(self: &Arc<Self>, raft: Raft) {
        // A guard is one Raft's.
        let _ = self.raft.set(raft);
        self.env.spawn(self.clone().run());
    }

    /// Refuses a call that is not meant for this member of this cluster, or not a member's.
    pub fn check(&self, envelope: Option<&peer::Envelope>) -> Result<peer::Envelope, Status> {
        let sender = envelope.map_or((0, 0), |e| (e.cluster_id, e.from));
        let envelope =
            self.this.check(envelope).inspect_err(|status| self.tell(sender, "address", status.message()))?;
        if self.knows(envelope.from) {
            return Ok(envelope);
        }
        self.doubt(Doubt { from: envelope.from, term: 0 });
        let text = format!("{:x} is not a member, as far as is known here; the others are asked", envelope.from);
        self.tell(sender, "member", &text);
        Err(Status::failed_precondition(text))
    }

    /// As [`Self::check`], of a call that carries its sender's vote.
    pub fn check_vote(&self, envelope: Option<&peer::Envelope>, term: u64, voter: u64) -> Result<(), Status> {
        let envelope = self.check(envelope)?;
        let sender = (envelope.cluster_id, envelope.from);
        if voter != envelope.from {
            let text = format!("{:x} sends the vote of {voter:x}; a vote is its sender's own", envelope.from);
            self.tell(sender, "vote", &text);
            return Err(Status::invalid_argument(text));
        }
        if self.believes(term) {
            return Ok(());
        }
        self.doubt(Doubt { from: envelope.from, term });
        let text = format!(
            "term {term} is more than {TERM_LEAP_MAX} above this member's, {}; the others are asked whether they know it",
            self.term()
        );
        self.tell(sender, "term", &text);
        Err(Status::failed_precondition(text))
    }

    /// Refuses an answer of the member `from` with a term that no election can have led to.
    pub fn check_answer(&self, from: u64, term: u64) -> Result<(), Status> {
        if self.believes(term) {
            return Ok(());
        }
        self.doubt(Doubt { from, term });
        let text = format!("answered with term {term}, more than {TERM_LEAP_MAX} above this member's, {}", self.term());
        self.tell((self.this.cluster_id, from), "answer", &text);
        Err(Status::failed_precondition(text))
    }

    fn believes(&self, term: u64) -> bool {
        term <= self.term().max(self.vouched_term.load(Ordering::Relaxed)).saturating_add(TERM_LEAP_MAX)
    }

    fn term(&self) -> u64 {
        self.raft.get().map_or(0, |raft| raft.metrics().borrow_watched().vote.leader_id.term)
    }

    /// Whoever has no membership yet joins, or is about to form a cluster: then every sender is one of its cluster.
    fn knows(&self, member: u64) -> bool {
        let Some(raft) = self.raft.get() else { return true };
        let metrics = raft.metrics();
        let m = metrics.borrow_watched();
        let newest = &m.membership_config;
        newest.nodes().next().is_none()
            || newest.get_node(&member).is_some()
            || m.committed_membership_config.get_node(&member).is_some()
            || self.vouched.lock().contains(&member)
    }

    fn tell(&self, sender: (u64, u64), kind: &'static str, reason: &str) {
        let mut logged = self.logged.lock();
        if logged.len() < LOGGED_MAX && logged.insert((sender.0, sender.1, kind)) {
            tracing::warn!(peer = format!("{:x}", sender.1), reason, "refused a peer's call");
        }
    }

    /// How many refusals were logged.
    #[cfg(test)]
    pub(super) fn logged(&self) -> usize {
        self.logged.lock().len()
    }

    fn doubt(&self, doubt: Doubt) {
        *self.doubt.lock() = Some(doubt);
        self.doubted.notify_one();
    }

    async fn run(self: Arc<Self>) {
        let shutdown = self.env.shutdown.clone();
        loop {
            let step = async {
                self.doubted.notified().await;
                let doubt = self.doubt.lock().take();
                if let Some(doubt) = doubt {
                    self.ask(doubt).await;
                    sleep(ASK_AGAIN).await;
                }
            };
            tokio::select! {
                () = step => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Asks the members that this one knows, where it knows them.
    async fn ask(&self, doubt: Doubt) {
        let (mut addresses, others) = {
            let Some(raft) = self.raft.get() else { return };
            let metrics = raft.metrics();
            let m = metrics.borrow_watched();
            let others = m.membership_config.voter_ids().filter(|id| *id != self.this.member_id).count();
            let nodes = m.membership_config.nodes().filter(|(id, _)| **id != self.this.member_id);
            (nodes.map(|(_, node)| node.peer_address.clone()).collect::<BTreeSet<String>>(), others)
        };
        addresses.extend(self.expand.as_ref().and_then(|expand| expand(u64::from(slot_of(doubt.from)))));
        let answers: Vec<WhoResponse> =
            join_all(addresses.iter().map(|address| self.who(address))).await.into_iter().flatten().collect();
        let names_it = |who: &WhoResponse| {
            let members = who.membership.iter().flat_map(|membership| &membership.members);
            who.member_id == doubt.from || members.into_iter().any(|member| member.id == doubt.from)
        };
        if answers.iter().any(names_it) {
            let mut vouched = self.vouched.lock();
            if vouched.len() >= VOUCHED_MAX {
                vouched.clear();
            }
            vouched.insert(doubt.from);
        }
        let near = answers.iter().filter(|who| who.term.saturating_add(TERM_LEAP_MAX) >= doubt.term).count();
        if near > 0 && 2 * near >= others && doubt.term > self.vouched_term.load(Ordering::Relaxed) {
            tracing::info!(term = doubt.term, "the others hold a term that is far above this member's; it is taken");
            self.vouched_term.store(doubt.term, Ordering::Relaxed);
        }
    }

    /// A fresh answer of a node that belongs to this cluster.
    async fn who(&self, address: &str) -> Option<WhoResponse> {
        let nonce = self.env.random_u64();
        let who = self.peers.who(address, nonce).await.ok()?;
        (who.nonce == nonce && who.cluster_id == self.this.cluster_id && who.member_id != self.this.member_id)
            .then_some(who)
    }
}
