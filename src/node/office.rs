//! Who leads: handing leadership over, and what is needed to follow a leader that has died.
//!
//! Absent: when to do so (`cluster`), and whose stream of appends it was (`api/peer`).

use openraft::async_runtime::WatchReceiver as _;
use openraft::raft::TransferLeaderRequest;
use tokio::sync::watch;

use super::Node;
use crate::env::timeout_at;
use crate::error::Error;

impl Node {
    /// Hands leadership to `target`; returns when it leads, or fails at the request's deadline.
    pub async fn transfer_leader(&self, target: u64) -> Result<(), Error> {
        let status = self.status();
        if !status.is_leader {
            return Err(Error::NotLeader);
        }
        if !status.membership.voter_ids().any(|id| id == target) {
            return Err(Error::BadLeaderTransferee);
        }
        if target == self.inner.this.member_id {
            return Ok(());
        }
        let deadline = self.deadline();
        self.inner.raft.trigger().transfer_leader(target).await.map_err(|_| Error::Stopped)?;
        let mut metrics = self.inner.raft.server_metrics();
        loop {
            if metrics.borrow_watched().current_leader == Some(target) {
                return Ok(());
            }
            match timeout_at(deadline, metrics.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Error::Stopped),
                Err(_) => return Err(Error::TimeoutLeaderFailure),
            }
        }
    }

    /// Gives up the lease of a leader that is known to be dead, if it is the leader still: from now on this member votes for another one,
    /// and may stand.
    pub async fn forget_leader(&self, leader: u64) -> Result<(), Error> {
        let vote = self.inner.raft.metrics().borrow_watched().vote;
        if vote.leader_id.voted_for != leader || !vote.committed {
            return Ok(());
        }
        // As when a leader hands over to somebody else; here to nobody.
        let request = TransferLeaderRequest::new(vote, leader, None);
        let _ = self.inner.raft.handle_transfer_leader(request).await.map_err(|_| Error::Stopped)?;
        Ok(())
    }

    /// Stands for election if a quorum would vote for this member, and does nothing while a leader's lease is on.
    pub async fn stand(&self) -> Result<(), Error> {
        self.inner.raft.trigger().elect(true).await.map_err(|_| Error::Stopped)
    }

    /// To be called when a stream ends on which this leader's appends came.
    pub fn end_appends(&self, leader: u64) {
        self.inner.appends_ended.send_replace(Some(leader));
    }

    /// Changes whenever a stream of a leader's appends has ended, to that leader.
    pub fn appends_ended(&self) -> watch::Receiver<Option<u64>> {
        self.inner.appends_ended.subscribe()
    }
}
