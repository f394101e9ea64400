//! Leases as clients use them: granted and revoked through Raft, kept alive and timed by the leader's clock.
//!
//! Owns the deadlines (`clock`), the decision that a lease has ended (`keeper`), and the way of a keep-alive from any member to
//! the leader (`ask`). The facts (which leases there are, which keys go with them) are the state's (`kv`).
//!
//! Invariants:
//! - Nothing here deletes a key; it only proposes that a lease be revoked.
//! - A lease is revoked only after a quorum has confirmed the leader, asked after the deadline had come; and the proposal is bound
//!   to the leader's term, so that what a leader decided before it was deposed is void.
//! - A keep-alive is answered only after a quorum has confirmed the leader, asked after the keep-alive had arrived; a leader elected
//!   later gives the lease its whole time again. Where a checkpoint says less, it is taken back first.
//! - A new leader starts each lease from its last checkpoint, and adds the longest election.
//!
//! Absent: followers keep no deadlines; the rules of who may do what with a lease (`kv::auth`).

mod ask;
mod clock;
mod keeper;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use self::ask::{Ask, Asker};
use self::clock::Clock;
use self::keeper::Keeper;
use crate::caller::Caller;
use crate::env::Instant;
use crate::error::Error;
use crate::kv::{LEASES_SINCE, LeaseTable, Wants};
use crate::node::Node;
use crate::pb::etcd::{LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeResponse};
use crate::pb::log::{Command, LeaseRevoke, answer, command};

pub use ask::Remaining;

/// Tries to find an id that is free, when the server has to choose one.
const ID_TRIES: usize = 8;

/// See `[lease]` in `config/quorate.toml`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The shortest lease: less is raised to it.
    pub ttl_min_seconds: i64,
    /// Longer leases have their remaining time put into the log this often while they are not renewed.
    pub checkpoint_interval: Duration,
    /// Revocations of expired leases that are under way at once.
    pub revokes_in_flight_max: usize,
    /// What a new leader adds: the longest election.
    pub extension: Duration,
}

/// The leases of a running member. Cloning shares it.
#[derive(Clone)]
pub struct Leases {
    inner: Arc<Inner>,
}

struct Inner {
    node: Node,
    settings: Settings,
    asks: mpsc::Sender<Ask>,
    /// On the leader.
    ticking: Mutex<Option<Ticking>>,
    /// Held while checkpoints, or their taking back, are under way: they reach the log in the order in which they were decided.
    checkpointing: Arc<tokio::sync::Mutex<()>>,
    revoking: AtomicUsize,
}

/// The clock of one term.
struct Ticking {
    term: u64,
    /// The leases that the clock has taken over.
    known: LeaseTable,
    clock: Clock,
}

impl Ticking {
    /// Takes over what was granted and revoked since the last call.
    fn follow(&mut self, node: &Node) {
        let now = Instant::now();
        let table = node.store().read(|s| s.kv.leases().clone());
        for (id, lease) in table.changed_since(&self.known) {
            self.clock.follow(now, id, lease, Duration::ZERO);
        }
        self.known = table;
    }
}

impl Leases {
    pub fn start(node: Node, settings: Settings) -> Self {
        let (asks, asks_rx) = mpsc::channel(node.options().queue_requests_max);
        let inner = Inner {
            node: node.clone(),
            settings,
            asks,
            ticking: Mutex::default(),
            checkpointing: Arc::default(),
            revoking: AtomicUsize::default(),
        };
        let leases = Self { inner: Arc::new(inner) };
        node.env().spawn(Asker::new(leases.clone(), asks_rx).run());
        node.env().spawn(Keeper::new(leases.clone()).run());
        leases
    }

    /// Grants a lease through `asker`'s handle; with id 0 under a free one that is chosen here, for applying must do the same on
    /// every member.
    pub async fn grant(
        &self,
        asker: &Node,
        caller: &Caller,
        id: i64,
        ttl_seconds: i64,
    ) -> Result<LeaseGrantResponse, Error> {
        asker.permit(caller, Wants::AnyUser)?;
        self.inner.node.wait_version(LEASES_SINCE, "leases need").await?;
        let ttl = ttl_seconds.max(self.inner.settings.ttl_min_seconds);
        let mut tries = if id == 0 { ID_TRIES } else { 1 };
        loop {
            tries -= 1;
            let id = if id == 0 { self.random_id() } else { id };
            match propose(asker, caller, command::Request::LeaseGrant(LeaseGrantRequest { ttl, id })).await {
                Ok(answer::Response::LeaseGrant(answer)) => return Ok(answer),
                Ok(_) => return Err(misfit()),
                Err(Error::LeaseExists) if tries > 0 => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends a lease and deletes its keys, through `asker`'s handle.
    pub async fn revoke(&self, asker: &Node, caller: &Caller, id: i64) -> Result<LeaseRevokeResponse, Error> {
        asker.permit(caller, Wants::AnyUser)?;
        self.inner.node.wait_version(LEASES_SINCE, "leases need").await?;
        match propose(asker, caller, command::Request::LeaseRevoke(LeaseRevoke { id, term: 0 })).await? {
            answer::Response::LeaseRevoke(answer) => Ok(answer),
            _ => Err(misfit()),
        }
    }

    fn random_id(&self) -> i64 {
        // Positive, as etcd's are, and not 0.
        ((self.inner.node.env().random_u64() >> 1) as i64).max(1)
    }
}

async fn propose(asker: &Node, caller: &Caller, request: command::Request) -> Result<answer::Response, Error> {
    let answer = asker.propose(caller, Command::new(LEASES_SINCE, request)).await?;
    answer.response.ok_or_else(misfit)
}

/// An answer of a kind that the command cannot have.
fn misfit() -> Error {
    Error::Unsupported("the answer does not fit the request; this is a bug".into())
}
