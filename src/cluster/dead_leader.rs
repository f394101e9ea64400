//! What a voter does when the leader's *process* has died: it does not wait for the election timeout.
//!
//! The kernel ends the connections of a process that dies, and refuses who dials its port. A voter that has seen both itself, of the very
//! leader whose appends it took, gives up that leader's lease, and stands for election by pre-vote: it leads only if a quorum of
//! voters has given up the lease, too, and has no more of the log. Voters stand one after the other, so that they do not split the vote.
//! Invariants: a port proves something by its refusal only if this process was taken there before, while this leader led; what is dialled is
//! that very address, so a name that has moved proves nothing. A timeout, an address that is unreachable, and a connection that was merely
//! ended are no proof: a leader that lives keeps its office. No safety hangs on any of this, as long as no read trusts a lease
//! (`raft.lease_reads`): then nobody runs it.
//! Absent: a leader that is cut off, or hangs: that is what Raft's timeouts are for.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::env::{Instant, interval, sleep, timeout};
use crate::node::{Node, Trust};

/// The kernel takes a process down piece by piece, on a busy machine slowly: its port is dialled so often, after pauses that double, before
/// its leader counts as alive.
const DIALS: u32 = 7;
const DIAL_PAUSE: Duration = Duration::from_millis(10);
/// Who is on this side of the world refuses sooner.
const DIAL_PATIENCE: Duration = Duration::from_millis(250);
/// Between two looks at who leads.
const LOOK: Duration = Duration::from_millis(250);
/// Of those that a name resolves to.
const ADDRESSES_MAX: usize = 4;
/// Between two voters that stand.
const TURN: Duration = Duration::from_millis(25);

/// Where a leader has taken a connection of this process.
#[derive(Clone, Copy)]
struct Listens {
    leader: u64,
    address: SocketAddr,
}

/// See the module's head.
pub struct DeadLeader {
    node: Node,
    /// The longest that an election takes; after that Raft's own timers have acted.
    election: Duration,
}

impl DeadLeader {
    pub fn new(node: Node, election: Duration) -> Self {
        Self { node, election }
    }

    /// Works until shutdown.
    pub async fn run(self) {
        let shutdown = self.node.env().shutdown.clone();
        let mut ended = self.node.appends_ended();
        let mut tick = interval(LOOK);
        let watch = async {
            let mut listens = None;
            loop {
                tokio::select! {
                    _ = tick.tick() => listens = self.find(listens).await,
                    changed = ended.changed() => {
                        let leader = *ended.borrow_and_update();
                        if changed.is_err() {
                            return;
                        }
                        if let (Some(leader), Some(listens)) = (leader, listens)
                            && leader == listens.leader
                            && self.is_dead(listens).await
                        {
                            self.succeed(leader).await;
                        }
                    }
                }
            }
        };
        tokio::select! {
            () = watch => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Where the leader of now listens, once it has taken a connection there.
    async fn find(&self, known: Option<Listens>) -> Option<Listens> {
        let (status, net) = (self.node.status(), &self.node.env().net);
        let leader = status.leader.filter(|_| !status.is_leader && !status.is_learner)?;
        if known.is_some_and(|known| known.leader == leader) {
            return known;
        }
        let address = status.membership.get_node(&leader)?.peer_address.clone();
        let addresses = timeout(DIAL_PATIENCE, net.resolve(address)).await.ok()?.ok()?;
        for address in addresses.into_iter().take(ADDRESSES_MAX) {
            if let Ok(Ok(_)) = timeout(DIAL_PATIENCE, net.connect(address.to_string())).await {
                return Some(Listens { leader, address });
            }
        }
        None
    }

    /// Whether nobody listens any more where the leader did.
    async fn is_dead(&self, Listens { leader, address }: Listens) -> bool {
        let status = self.node.status();
        if status.leader != Some(leader) || status.is_leader || self.node.trust() == Trust::Fenced {
            return false;
        }
        for dial in 0..DIALS {
            match timeout(DIAL_PATIENCE, self.node.env().net.connect(address.to_string())).await {
                Ok(Err(error)) => return error.kind() == io::ErrorKind::ConnectionRefused,
                Ok(Ok(_)) => sleep(DIAL_PAUSE * 2_u32.pow(dial)).await,
                Err(_) => return false,
            }
        }
        false
    }

    /// Stands for election, in turn with the other voters, until there is a newer term.
    async fn succeed(&self, leader: u64) {
        let (this, begun, status) = (self.node.member().member_id, Instant::now(), self.node.status());
        let voters: Vec<u64> = status.membership.voter_ids().filter(|id| *id != leader).collect();
        let Some(turn) = voters.iter().position(|id| *id == this) else { return };
        tracing::info!(leader = format!("{leader:x}"), "the leader's process has died; electing another one");
        if self.node.forget_leader(leader).await.is_err() {
            return;
        }
        sleep(TURN * turn as u32).await;
        while self.node.status().term == status.term && begun.elapsed() < self.election {
            if self.node.stand().await.is_err() {
                return;
            }
            sleep(TURN * voters.len() as u32).await;
        }
    }
}
