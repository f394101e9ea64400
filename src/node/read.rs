//! The leader's read index: one confirmation round for all reads that wait.
//!
//! Reads that arrive while a round is under way share the next one: a round confirms only what was asked before it began.

use openraft::ReadPolicy;
use tokio::sync::{mpsc, oneshot};

use super::propose::Forwarded;
use super::{Node, more_of_a_burst};
use crate::env::planted;
use crate::error::Error;

/// Waiters taken into one round.
const ROUND_MAX: usize = 4096;

/// Who waits for a read index.
pub(super) enum Waiter {
    Local(oneshot::Sender<Result<u64, Error>>),
    /// A member that asked for all of its waiting reads.
    Remote {
        id: u64,
        to: mpsc::Sender<Forwarded>,
    },
}

impl Waiter {
    pub(super) fn send(self, outcome: Result<u64, Error>) {
        match self {
            Waiter::Local(tx) => drop(tx.send(outcome)),
            Waiter::Remote { id, to } => drop(to.try_send(Forwarded::ReadIndex(id, outcome))),
        }
    }
}

pub(super) struct Reader {
    node: Node,
    queue: mpsc::Receiver<Waiter>,
}

impl Reader {
    pub(super) fn new(node: Node, queue: mpsc::Receiver<Waiter>) -> Self {
        Self { node, queue }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.node.inner.env.shutdown.clone();
        let mut waiters = Vec::new();
        loop {
            tokio::select! {
                taken = self.queue.recv_many(&mut waiters, ROUND_MAX) => if taken == 0 { return },
                () = shutdown.cancelled() => return,
            }
            more_of_a_burst(&mut self.queue, &mut waiters, ROUND_MAX).await;
            let outcome = self.round().await;
            for waiter in waiters.drain(..) {
                waiter.send(outcome.clone());
            }
        }
    }

    /// The index that a state must have applied to be as new as this moment.
    async fn round(&self) -> Result<u64, Error> {
        if planted!("stale-lease-read") {
            let status = self.node.status();
            return if status.is_leader { Ok(status.committed_index) } else { Err(Error::NotLeader) };
        }
        let policy = if self.node.inner.options.lease_reads { ReadPolicy::LeaseRead } else { ReadPolicy::ReadIndex };
        match self.node.inner.raft.get_read_linearizer(policy).await {
            Ok(linearizer) => Ok(linearizer.read_log_id().index()),
            Err(_) => Err(Error::NotLeader),
        }
    }
}
