//! What is counted of a proposal: how many wait, how long they took, and how many failed.

use crate::env::Instant;
use crate::error::Error;
use crate::metrics::{RequestKind, metrics};
use crate::pb::log::{Command, command};
use crate::raft::Outcome;

/// A proposal between its begin and its end, for the counters. One that is given up before has failed, as in etcd.
pub(super) struct Pending {
    kind: Option<RequestKind>,
    begun: Instant,
    failed: bool,
}

impl Pending {
    pub(super) fn begin(command: &Command) -> Self {
        metrics().proposals_pending.inc();
        Self { kind: command.request.as_ref().and_then(kind_of), begun: Instant::now(), failed: true }
    }

    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    pub(super) fn end(mut self, outcome: &Outcome) {
        self.failed = outcome.as_ref().is_err_and(Error::is_unavailable);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let metrics = metrics();
        metrics.proposals_pending.dec();
        if self.failed {
            metrics.proposals_failed.inc();
        }
        if let Some(kind) = self.kind {
            metrics.request(kind, !self.failed, self.begun.elapsed());
        }
    }
}

/// What etcd calls such a request; `None` for those that it does not have.
fn kind_of(request: &command::Request) -> Option<RequestKind> {
    use command::Request;
    Some(match request {
        Request::Put(_) => RequestKind::Put,
        Request::DeleteRange(_) => RequestKind::DeleteRange,
        Request::Txn(_) => RequestKind::Txn,
        Request::Compact(_) => RequestKind::Compaction,
        Request::LeaseGrant(_) => RequestKind::LeaseGrant,
        Request::LeaseRevoke(_) => RequestKind::LeaseRevoke,
        Request::LeaseCheckpoint(_) => RequestKind::LeaseCheckpoint,
        Request::Alarm(_) => RequestKind::Alarm,
        Request::SetClusterVersion(_) => RequestKind::ClusterVersionSet,
        Request::WantedSize(_)
        | Request::StartDigest(_)
        | Request::Auth(_)
        | Request::Follow(_)
        | Request::Promote(_)
        | Request::Supersede(_) => return None,
    })
}
