//! The receiving side of Raft's calls: checks whom they are meant for, then hands them to openraft.
//!
//! A call that names another cluster, another target, or a sender in a cluster that this node does not belong to is refused
//! before anything of it is looked at (membership rule: a wiped or removed member must not be heard under an old id).

use std::sync::Arc;

use futures_util::StreamExt as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use openraft::storage::Snapshot;
use parking_lot::Mutex;
use tonic::{Status, Streaming};

use super::convert::{entry_from_pb, log_id_from_pb, log_id_to_pb, vote_from_pb, vote_to_pb};
use super::network::SNAPSHOT_CHUNK_TIMEOUT;
use super::state_machine::snapshot_meta;
use super::{Raft, TypeConfig};
use crate::env::{Env, Pool, timeout};
use crate::pb::peer;
use crate::storage::snapshot::{self, Incoming};

/// Who this member is in Raft's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub cluster_id: u64,
    pub member_id: u64,
}

impl Member {
    /// Refuses a call that is not meant for this member of this cluster.
    pub fn check(&self, envelope: Option<&peer::Envelope>) -> Result<peer::Envelope, Status> {
        let envelope = envelope.ok_or_else(|| Status::invalid_argument("a peer call must carry an envelope"))?;
        if envelope.cluster_id != self.cluster_id {
            return Err(Status::failed_precondition(format!(
                "cluster id mismatch: member {:x} belongs to cluster {:x}, the call is for cluster {:x}",
                self.member_id, self.cluster_id, envelope.cluster_id
            )));
        }
        if envelope.to != self.member_id {
            return Err(Status::failed_precondition(format!(
                "member id mismatch: this is member {:x}, the call is for member {:x}; that disk is gone or moved",
                self.member_id, envelope.to
            )));
        }
        Ok(*envelope)
    }
}

/// Raft's calls for one member.
#[derive(Clone)]
pub struct Rpc {
    env: Env,
    raft: Raft,
    this: Member,
    snapshots: snapshot::Dir,
    /// One snapshot is received at a time.
    receiving: Arc<tokio::sync::Mutex<()>>,
    /// Mismatches that were logged: each once.
    logged: Arc<Mutex<std::collections::BTreeSet<(u64, u64)>>>,
}

const LOGGED_MAX: usize = 1000;

type Answer<T> = Result<T, Status>;

fn fatal(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("raft: {error}"))
}

fn missing(what: &str) -> Status {
    Status::invalid_argument(format!("peer call without {what}"))
}

/// A sender that fell silent must not hold the place of one that lives.
async fn next_chunk(chunks: &mut Streaming<peer::SnapshotChunk>) -> Answer<Option<peer::SnapshotChunk>> {
    match timeout(SNAPSHOT_CHUNK_TIMEOUT, chunks.next()).await {
        Ok(next) => next.transpose(),
        Err(_) => Err(Status::deadline_exceeded("no snapshot chunk came for 30 s")),
    }
}

impl Rpc {
    pub fn new(env: Env, raft: Raft, this: Member, snapshots: snapshot::Dir) -> Self {
        Self { env, raft, this, snapshots, receiving: Arc::default(), logged: Arc::default() }
    }

    /// As [`Member::check`]; logs each stranger once.
    pub fn check(&self, envelope: Option<&peer::Envelope>) -> Answer<peer::Envelope> {
        self.this.check(envelope).inspect_err(|status| {
            let from = envelope.map_or((0, 0), |e| (e.cluster_id, e.from));
            let mut logged = self.logged.lock();
            if logged.len() < LOGGED_MAX && logged.insert(from) {
                tracing::warn!(peer = format!("{:x}", from.1), reason = status.message(), "refused a peer's call");
            }
        })
    }

    /// How many strangers were logged.
    #[cfg(test)]
    pub(super) fn logged(&self) -> usize {
        self.logged.lock().len()
    }

    pub async fn append(&self, request: peer::AppendRequest) -> Answer<peer::AppendResponse> {
        self.check(request.envelope.as_ref())?;
        let entries = request.entries.into_iter().map(entry_from_pb).collect::<Result<Vec<_>, _>>();
        let rpc = AppendEntriesRequest {
            vote: vote_from_pb(request.vote.ok_or_else(|| missing("vote"))?),
            prev_log_id: request.prev.map(log_id_from_pb),
            entries: entries.map_err(Status::invalid_argument)?,
            leader_commit: request.leader_commit.map(log_id_from_pb),
        };
        let answer = self.raft.append_entries(rpc).await.map_err(fatal)?;
        use peer::append_response::Outcome;
        let mut response = peer::AppendResponse::default();
        match answer {
            AppendEntriesResponse::Success => response.set_outcome(Outcome::Success),
            AppendEntriesResponse::PartialSuccess(matched) => {
                response.set_outcome(Outcome::Partial);
                response.matched = matched.as_ref().map(log_id_to_pb);
            }
            AppendEntriesResponse::Conflict => response.set_outcome(Outcome::Conflict),
            AppendEntriesResponse::HigherVote(vote) => {
                response.set_outcome(Outcome::HigherVote);
                response.vote = Some(vote_to_pb(&vote));
            }
        }
        Ok(response)
    }

    pub async fn vote(&self, request: peer::VoteRequest, pre: bool) -> Answer<peer::VoteResponse> {
        self.check(request.envelope.as_ref())?;
        let vote = vote_from_pb(request.vote.ok_or_else(|| missing("vote"))?);
        let mut rpc = VoteRequest::<TypeConfig>::new(vote, request.last_log.map(log_id_from_pb));
        rpc.leadership_transfer = request.leadership_transfer;
        let answer = if pre { self.raft.pre_vote(rpc).await } else { self.raft.vote(rpc).await }.map_err(fatal)?;
        Ok(peer::VoteResponse {
            vote: Some(vote_to_pb(&answer.vote)),
            granted: answer.vote_granted,
            last_log: answer.last_log_id.as_ref().map(log_id_to_pb),
        })
    }

    pub async fn transfer_leader(&self, request: peer::TransferLeaderRequest) -> Answer<peer::TransferLeaderResponse> {
        self.check(request.envelope.as_ref())?;
        let from = vote_from_pb(request.from.ok_or_else(|| missing("vote"))?);
        let rpc = TransferLeaderRequest::new(from, request.to, request.last_log.map(log_id_from_pb));
        Ok(match self.raft.handle_transfer_leader(rpc).await.map_err(fatal)? {
            Ok(()) => peer::TransferLeaderResponse { accepted: true, last_log: None },
            Err(openraft::raft::TransferLeaderError::LogNotFlushed { actual, .. }) => {
                peer::TransferLeaderResponse { accepted: false, last_log: actual.as_ref().map(log_id_to_pb) }
            }
            Err(_) => peer::TransferLeaderResponse { accepted: false, last_log: None },
        })
    }

    fn incoming(&self, head: &peer::SnapshotHead) -> Answer<Incoming> {
        self.snapshots
            .receive(&head.snapshot_id, head.file_bytes)
            .map_err(|e| Status::internal(format!("snapshot: {e}")))
    }

    pub async fn snapshot_offset(&self, head: peer::SnapshotHead) -> Answer<u64> {
        self.check(head.envelope.as_ref())?;
        let _one = self.receiving.lock().await;
        Ok(self.incoming(&head)?.offset())
    }

    /// Receives a snapshot file, verifies it, and installs it.
    pub async fn snapshot(&self, mut chunks: Streaming<peer::SnapshotChunk>) -> Answer<peer::SnapshotResponse> {
        let _one = self.receiving.lock().await;
        let mut chunk = next_chunk(&mut chunks).await?.ok_or_else(|| missing("snapshot chunks"))?;
        let head = chunk.head.take().ok_or_else(|| missing("snapshot head"))?;
        self.check(head.envelope.as_ref())?;
        let vote = vote_from_pb(head.vote.ok_or_else(|| missing("vote"))?);
        let mut incoming = self.incoming(&head)?;
        loop {
            let (offset, crc, data) = (chunk.offset, chunk.crc, chunk.data);
            let written = self
                .env
                .long(Pool::Snapshots, move || incoming.write(offset, &data, crc).map(|()| incoming))
                .await
                .map_err(|e| Status::data_loss(format!("snapshot chunk at {offset}: {e}")))?;
            incoming = written;
            match next_chunk(&mut chunks).await? {
                Some(next) => chunk = next,
                None => break,
            }
        }
        let file = self
            .env
            .long(Pool::Snapshots, move || incoming.finish())
            .await
            .map_err(|e| Status::data_loss(format!("snapshot {}: {e}", head.snapshot_id)))?;
        let snapshot = Snapshot { meta: snapshot_meta(file.meta()).map_err(fatal)?, snapshot: file };
        let answer = self.raft.install_full_snapshot(vote, snapshot).await.map_err(fatal)?;
        Ok(peer::SnapshotResponse { vote: Some(vote_to_pb(&answer.vote)) })
    }
}
