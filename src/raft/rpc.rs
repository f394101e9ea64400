//! The receiving side of Raft's calls: checks whom they are meant for, then hands them to openraft.
//!
//! A call that names another cluster, another target, or a sender that is no member is refused before anything of it is looked at
//! (`guard`; membership rule: a wiped or removed member must not be heard under an old id). What then reaches openraft holds together:
//! it trusts a leader to send entries in their order.
//! Invariant: nothing is held for who has said nothing: a stream of a snapshot has the one place only after its first message was
//! checked, and one that falls silent gives it up to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use openraft::storage::Snapshot;
use tokio::sync::OwnedMutexGuard;
use tonic::{Status, Streaming};

use super::convert::{entry_from_pb, log_id_from_pb, log_id_to_pb, vote_from_pb, vote_to_pb};
use super::guard::Guard;
use super::memory::{Past, Reach};
use super::network::{BALLOT_CLOSED, SNAPSHOT_CHUNK_TIMEOUT};
use super::state_machine::{Store, snapshot_meta};
use super::{Entry, LogId, Raft, TypeConfig, Vote};
use crate::env::{Env, Instant, Pool, timeout};
use crate::pb;
use crate::pb::peer;
use crate::storage::log;
use crate::storage::snapshot::{self, Incoming};

/// For the first message of a stream.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// A sender that is silent for longer gives its place up, if another wants it.
const SNAPSHOT_SILENCE_MAX: Duration = Duration::from_secs(2);

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
    guard: Arc<Guard>,
    store: Arc<Store>,
    snapshots: snapshot::Dir,
    /// What the log can still take; `None`: anything.
    room: Option<log::Room>,
    /// `None`: nothing was promised before.
    past: Option<Past>,
    /// One snapshot is received at a time.
    receiving: Arc<tokio::sync::Mutex<()>>,
    /// Checked senders that wait for the place.
    waiting: Arc<AtomicUsize>,
}

const DISK_FULL: &str = "this member's disk is full: its log takes no more entries until there is space";

type Answer<T> = Result<T, Status>;

fn fatal(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("raft: {error}"))
}

fn missing(what: &str) -> Status {
    Status::invalid_argument(format!("peer call without {what}"))
}

/// A stream's first message; who has opened it and says nothing is given up.
pub async fn first_message<T>(messages: &mut Streaming<T>) -> Answer<T> {
    match timeout(FIRST_MESSAGE_TIMEOUT, messages.next()).await {
        Ok(first) => {
            first.transpose()?.ok_or_else(|| Status::invalid_argument("a stream that ends before its first message"))
        }
        Err(_) => Err(Status::deadline_exceeded(format!("no message came within {FIRST_MESSAGE_TIMEOUT:?}"))),
    }
}

/// Checks that these entries are what a leader of `term` sends after `prev`.
fn check_entries(entries: &[Entry], prev: Option<&LogId>, term: u64) -> Answer<()> {
    let mut last = prev.map(|prev| (prev.index(), **prev.committed_leader_id()));
    for entry in entries {
        let (index, of_term) = (entry.log_id.index(), **entry.log_id.committed_leader_id());
        let (expected, least) = last.map_or((Some(0), 0), |(index, term)| (index.checked_add(1), term));
        if Some(index) != expected || of_term < least || of_term > term {
            return Err(Status::invalid_argument(format!(
                "entry {index} of term {of_term} does not follow what is before it in an append of term {term}"
            )));
        }
        last = Some((index, of_term));
    }
    Ok(())
}

impl Rpc {
    pub fn new(env: Env, raft: Raft, guard: Arc<Guard>, store: Arc<Store>, snapshots: snapshot::Dir) -> Self {
        let (room, past, receiving, waiting) = Default::default();
        Self { env, raft, guard, store, snapshots, room, past, receiving, waiting }
    }

    /// Refuses what this member's past forbids.
    #[must_use]
    pub fn with_past(self, past: Past) -> Self {
        Self { past: Some(past), ..self }
    }

    /// Refuses entries that the log cannot take.
    #[must_use]
    pub fn within(self, room: log::Room) -> Self {
        Self { room: Some(room), ..self }
    }

    /// As [`Guard::check`].
    pub fn check(&self, envelope: Option<&peer::Envelope>) -> Answer<peer::Envelope> {
        self.guard.check(envelope)
    }

    fn check_vote(&self, envelope: Option<&peer::Envelope>, vote: Option<pb::log::Vote>) -> Answer<Vote> {
        // A call for another is refused as that, whatever else is missing.
        self.check(envelope)?;
        let vote = vote.ok_or_else(|| missing("vote"))?;
        self.guard.check_vote(envelope, vote.term, vote.member)?;
        Ok(vote_from_pb(vote))
    }

    pub async fn append(&self, request: peer::AppendRequest) -> Answer<peer::AppendResponse> {
        let vote = self.check_vote(request.envelope.as_ref(), request.vote)?;
        let term = vote.leader_id.term;
        // A log that fails to append stops its member. What is left of the newest segment is for votes; heartbeats go on.
        let left = self.room.as_ref().and_then(log::Room::segments_left);
        if !request.entries.is_empty() && left == Some(0) {
            return Err(Status::unavailable(DISK_FULL));
        }
        let (envelope, durable) = (request.envelope.unwrap_or_default(), request.leader_durable.map(log_id_from_pb));
        let entries = request.entries.into_iter().map(entry_from_pb).collect::<Result<Vec<_>, _>>();
        let rpc = AppendEntriesRequest::<TypeConfig> {
            prev_log_id: request.prev.map(log_id_from_pb),
            entries: entries.map_err(Status::invalid_argument)?,
            leader_commit: request.leader_commit.map(log_id_from_pb),
            vote,
        };
        check_entries(&rpc.entries, rpc.prev_log_id.as_ref(), term)?;
        let answer = self.append_to_log(rpc, term, envelope, durable).await?;
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

    /// Hands an append to Raft, unless this member's past forbids it; and remembers how far the leader's own disk reaches.
    async fn append_to_log(
        &self,
        rpc: AppendEntriesRequest<TypeConfig>,
        term: u64,
        envelope: peer::Envelope,
        durable: Option<LogId>,
    ) -> Answer<AppendEntriesResponse<TypeConfig>> {
        let Some(past) = &self.past else { return self.raft.append_entries(rpc).await.map_err(fatal) };
        if past.ballot.asks_for_election(term) {
            return Ok(AppendEntriesResponse::HigherVote(Vote::new(term.saturating_add(1), envelope.to)));
        }
        let ids = rpc.prev_log_id.iter().chain(rpc.entries.iter().map(|entry| &entry.log_id));
        if let Some(reason) = past.contradiction(term, ids) {
            tracing::error!(peer = format!("{:x}", envelope.from), reason, "this member stops");
            self.env.failed.cancel();
            return Err(Status::unavailable(reason));
        }
        let answer = self.raft.append_entries(rpc).await.map_err(fatal)?;
        if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
            past.peers.memory().note(envelope.from, Reach::new(term, durable.as_ref()));
        }
        Ok(answer)
    }

    pub async fn vote(&self, request: peer::VoteRequest, pre: bool) -> Answer<peer::VoteResponse> {
        let vote = self.check_vote(request.envelope.as_ref(), request.vote)?;
        let mut rpc = VoteRequest::<TypeConfig>::new(vote, request.last_log.map(log_id_from_pb));
        rpc.leadership_transfer = request.leadership_transfer;
        let may_grant = |past: &Past| past.ballot.may_grant(rpc.vote.leader_id.term, rpc.last_log_id.as_ref());
        if !self.past.as_ref().is_none_or(may_grant) {
            return Err(Status::unavailable(BALLOT_CLOSED));
        }
        let answer = if pre { self.raft.pre_vote(rpc).await } else { self.raft.vote(rpc).await }.map_err(fatal)?;
        Ok(peer::VoteResponse {
            vote: Some(vote_to_pb(&answer.vote)),
            granted: answer.vote_granted,
            last_log: answer.last_log_id.as_ref().map(log_id_to_pb),
        })
    }

    pub async fn transfer_leader(&self, request: peer::TransferLeaderRequest) -> Answer<peer::TransferLeaderResponse> {
        let from = self.check_vote(request.envelope.as_ref(), request.from)?;
        if self.past.as_ref().is_some_and(|past| !past.ballot.may_stand()) {
            return Ok(peer::TransferLeaderResponse { accepted: false, last_log: None });
        }
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
        let _one = self.place().await?;
        Ok(self.incoming(&head)?.offset())
    }

    /// The one place to receive a snapshot.
    async fn place(&self) -> Answer<OwnedMutexGuard<()>> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let place = timeout(SNAPSHOT_CHUNK_TIMEOUT, self.receiving.clone().lock_owned()).await;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        place.map_err(|_| Status::unavailable("another snapshot is being received"))
    }

    /// The next piece. A sender that fell silent must not hold the place of one that lives.
    async fn next_chunk(&self, chunks: &mut Streaming<peer::SnapshotChunk>) -> Answer<Option<peer::SnapshotChunk>> {
        let begin = Instant::now();
        loop {
            match timeout(SNAPSHOT_SILENCE_MAX, chunks.next()).await {
                Ok(next) => return next.transpose(),
                Err(_) if self.waiting.load(Ordering::Relaxed) > 0 => {
                    return Err(Status::aborted("no snapshot chunk came, and another sender waits"));
                }
                Err(_) if begin.elapsed() >= SNAPSHOT_CHUNK_TIMEOUT => {
                    return Err(Status::deadline_exceeded("no snapshot chunk came for 30 s"));
                }
                Err(_) => {}
            }
        }
    }

    /// Receives a snapshot file, verifies it, and installs it. `chunk` is the first, which has come already.
    pub async fn snapshot(
        &self,
        mut chunk: peer::SnapshotChunk,
        mut chunks: Streaming<peer::SnapshotChunk>,
    ) -> Answer<peer::SnapshotResponse> {
        let head = chunk.head.take().ok_or_else(|| missing("snapshot head"))?;
        let vote = self.check_vote(head.envelope.as_ref(), head.vote)?;
        if self.store.is_fenced(vote.leader_id.voted_for) {
            return Err(Status::failed_precondition("the sender is fenced (alarm CORRUPT): its state is not taken"));
        }
        let _one = self.place().await?;
        let mut incoming = self.incoming(&head)?;
        let counters = crate::metrics::metrics().peer(head.envelope.map_or(0, |envelope| envelope.from));
        loop {
            let (offset, crc, data) = (chunk.offset, chunk.crc, chunk.data);
            counters.count_received(data.len());
            let written = self
                .env
                .long(Pool::Snapshots, move || incoming.write(offset, &data, crc).map(|()| incoming))
                .await
                .map_err(|e| Status::data_loss(format!("snapshot chunk at {offset}: {e}")))?;
            incoming = written;
            match self.next_chunk(&mut chunks).await? {
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
