//! The stream from a member to the leader, both ends.
//!
//! One bidirectional stream a leader carries every proposal and read-index request of a member's clients, many to a message.
//! Messages are bounded by bytes, so that none is refused by its size and takes the stream with it; what is under way is bounded
//! by count, so that the leader always has a place for an answer.
//! A request that was never put on the wire fails with `NotLeader` (safe to try again); one whose answer was lost fails with
//! `possibly due to connection lost`. At most one read-index round of a stream is under way; later reads share the next.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use super::propose::{Forwarded, Proposal, Reply};
use super::read::Waiter;
use super::{Node, more_of_a_burst};
use crate::env::Instant;
use crate::error::Error;
use crate::pb;
use crate::pb::peer;
use crate::raft::{MESSAGE_BYTES_MAX, next_forwarded};

/// Requests put into one message.
const MESSAGE_REQUESTS_MAX: usize = 1024;
/// Answers put into one message, in bytes; one answer at least.
const ANSWERS_BYTES_MAX: usize = 1 << 20;
/// Largest answer that is forwarded at all.
const ANSWER_BYTES_MAX: usize = MESSAGE_BYTES_MAX - ANSWERS_BYTES_MAX;
/// A stream that broke is not opened again sooner.
const REOPEN_AFTER: Duration = Duration::from_millis(100);

/// A request on its way to the leader.
pub(super) enum Outgoing {
    Proposal(Proposal),
    Read(oneshot::Sender<Result<u64, Error>>),
}

impl Outgoing {
    fn fail(self, error: Error) {
        match self {
            Outgoing::Proposal(proposal) => proposal.reply.send(Err(error)),
            Outgoing::Read(tx) => drop(tx.send(Err(error))),
        }
    }
}

/// This member's stream to one leader.
pub(super) struct Link {
    pub leader: u64,
    pub address: String,
    queue: mpsc::Sender<Outgoing>,
    closed: Arc<AtomicBool>,
    opened: Instant,
}

impl Link {
    /// Opens the stream in the background; requests may be sent at once.
    pub(super) fn open(node: &Node, leader: u64, address: String) -> Arc<Self> {
        let (queue, outgoing) = mpsc::channel(node.inner.options.queue_requests_max);
        let closed = Arc::new(AtomicBool::new(false));
        let link =
            Arc::new(Self { leader, address: address.clone(), queue, closed: closed.clone(), opened: Instant::now() });
        let task = LinkTask { node: node.clone(), leader, address, outgoing, closed };
        node.inner.env.spawn(task.run());
        link
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn may_reopen(&self) -> bool {
        self.opened.elapsed() > REOPEN_AFTER
    }

    pub(super) fn send(&self, request: Outgoing) -> Result<(), Error> {
        self.queue.try_send(request).map_err(|failed| match failed {
            mpsc::error::TrySendError::Full(_) => Error::TooManyRequests,
            mpsc::error::TrySendError::Closed(_) => Error::NotLeader,
        })
    }
}

struct LinkTask {
    node: Node,
    leader: u64,
    address: String,
    outgoing: mpsc::Receiver<Outgoing>,
    closed: Arc<AtomicBool>,
}

/// What was sent and is not answered yet.
#[derive(Default)]
struct Pending {
    next_id: u64,
    proposals: HashMap<u64, Reply>,
    /// Reads of the round under way.
    round: Vec<oneshot::Sender<Result<u64, Error>>>,
    /// Reads that wait for the next round.
    reads: Vec<oneshot::Sender<Result<u64, Error>>>,
}

impl LinkTask {
    async fn run(mut self) {
        let shutdown = self.node.inner.env.shutdown.clone();
        let mut pending = Pending { next_id: 1, ..Pending::default() };
        tokio::select! {
            () = self.carry(&mut pending) => {}
            () = shutdown.cancelled() => {}
        }
        self.closed.store(true, Ordering::Release);
        self.outgoing.close();
        while let Ok(request) = self.outgoing.try_recv() {
            request.fail(Error::NotLeader);
        }
        for (_, reply) in pending.proposals.drain() {
            reply.send(Err(Error::TimeoutConnectionLost));
        }
        for read in pending.round.drain(..).chain(pending.reads.drain(..)) {
            drop(read.send(Err(Error::NotLeader)));
        }
    }

    async fn carry(&mut self, pending: &mut Pending) {
        let (wire, requests) = mpsc::channel(16);
        let hello = peer::ForwardRequest {
            envelope: Some(peer::Envelope {
                cluster_id: self.node.inner.this.cluster_id,
                from: self.node.inner.this.member_id,
                to: self.leader,
            }),
            ..peer::ForwardRequest::default()
        };
        if wire.send(hello).await.is_err() {
            return;
        }
        let mut answers = match self.node.inner.peers.forward(&self.address, requests).await {
            Ok(answers) => answers,
            Err(status) => {
                tracing::debug!(
                    peer = format!("{:x}", self.leader),
                    reason = status.message(),
                    "no stream to the leader"
                );
                return;
            }
        };
        let (under_way_max, bytes_max) =
            (self.node.inner.options.queue_requests_max, self.node.inner.options.batch_bytes_max);
        let mut batch = Vec::new();
        // False once the route has left this link: then what was sent is still waited for.
        let mut open = true;
        while open || !pending.is_empty() {
            let room = pending.room(under_way_max).min(MESSAGE_REQUESTS_MAX);
            tokio::select! {
                answer = next_forwarded(&mut answers) => match answer {
                    Some(answer) => {
                        if let Some(next) = pending.resolve(answer)
                            && wire.send(next).await.is_err()
                        {
                            return;
                        }
                    }
                    None => return,
                },
                taken = self.outgoing.recv_many(&mut batch, room), if open && room > 0 => {
                    open = taken != 0;
                    more_of_a_burst(&mut self.outgoing, &mut batch, room).await;
                    for message in pending.register(batch.drain(..), bytes_max) {
                        if wire.send(message).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.proposals.is_empty() && self.round.is_empty()
    }

    /// How many more requests may be under way, of `max`.
    fn room(&mut self, max: usize) -> usize {
        if self.proposals.len() + self.round.len() + self.reads.len() >= max {
            // Clients that have given up need no answer.
            self.reads.retain(|read| !read.is_closed());
        }
        max.saturating_sub(self.proposals.len() + self.round.len() + self.reads.len())
    }

    /// The messages that carry `requests`: each of at most `bytes_max` bytes of commands, one command at least.
    fn register(&mut self, requests: impl Iterator<Item = Outgoing>, bytes_max: usize) -> Vec<peer::ForwardRequest> {
        let mut messages = Vec::new();
        let mut message = peer::ForwardRequest::default();
        let mut bytes = 0;
        for request in requests {
            match request {
                Outgoing::Proposal(Proposal { command, reply }) => {
                    if bytes > 0 && bytes + command.len() > bytes_max {
                        messages.push(std::mem::take(&mut message));
                        bytes = 0;
                    }
                    bytes += command.len();
                    self.next_id += 1;
                    self.proposals.insert(self.next_id, reply);
                    message.proposals.push(peer::forward_request::Proposal { id: self.next_id, command });
                }
                Outgoing::Read(tx) => self.reads.push(tx),
            }
        }
        message.read_index_id = self.begin_round();
        if !message.proposals.is_empty() || message.read_index_id != 0 {
            messages.push(message);
        }
        messages
    }

    /// The id of a new round for all waiting reads; 0 if none waits or a round is under way.
    fn begin_round(&mut self) -> u64 {
        if self.reads.is_empty() || !self.round.is_empty() {
            return 0;
        }
        std::mem::swap(&mut self.round, &mut self.reads);
        self.next_id += 1;
        self.next_id
    }

    /// Hands answers out; returns the next round's request if reads wait.
    fn resolve(&mut self, answer: peer::ForwardResponse) -> Option<peer::ForwardRequest> {
        for outcome in answer.outcomes {
            let Some(reply) = self.proposals.remove(&outcome.id) else { continue };
            use peer::forward_response::outcome::Result as Wire;
            reply.send(match outcome.result {
                Some(Wire::Answer(answer)) => Ok(answer),
                Some(Wire::Error(number)) => Err(Error::from_number(number, outcome.detail)),
                None => Err(Error::TimeoutLeaderFailure),
            });
        }
        if answer.read_index_id == 0 {
            return None;
        }
        let outcome = match answer.read_error {
            0 => Ok(answer.read_index),
            number => Err(Error::from_number(number, String::new())),
        };
        for read in self.round.drain(..) {
            drop(read.send(outcome.clone()));
        }
        let read_index_id = self.begin_round();
        (read_index_id != 0).then(|| peer::ForwardRequest { read_index_id, ..peer::ForwardRequest::default() })
    }
}

/// The leader's end: takes a member's requests and streams the answers back.
pub struct Serving {
    outcomes: mpsc::Receiver<Forwarded>,
    /// Taken from `outcomes`, and too much for the last message.
    ready: VecDeque<Forwarded>,
}

impl Node {
    /// Serves a forward stream whose first message was checked.
    pub fn serve_forward<S, E>(&self, mut requests: S) -> Serving
    where
        S: Stream<Item = Result<peer::ForwardRequest, E>> + Send + Unpin + 'static,
        E: Send,
    {
        // A place for each request that a member may have under way, and its read round.
        let (to, outcomes) = mpsc::channel(2 * self.inner.options.queue_requests_max);
        let node = self.clone();
        self.inner.env.spawn(async move {
            let shutdown = node.inner.env.shutdown.clone();
            loop {
                let request = tokio::select! {
                    request = requests.next() => request,
                    () = shutdown.cancelled() => return,
                };
                let Some(Ok(request)) = request else { return };
                node.take_forwarded(request, &to);
            }
        });
        Serving::of(outcomes)
    }

    fn take_forwarded(&self, request: peer::ForwardRequest, to: &mpsc::Sender<Forwarded>) {
        for peer::forward_request::Proposal { id, command } in request.proposals {
            let proposal = Proposal { command, reply: Reply::Remote { id, to: to.clone() } };
            if let Err(full) = self.inner.proposals.try_send(proposal) {
                full.into_inner().reply.send(Err(Error::TooManyRequests));
            }
        }
        if request.read_index_id != 0 {
            let waiter = Waiter::Remote { id: request.read_index_id, to: to.clone() };
            if let Err(full) = self.inner.reads.try_send(waiter) {
                full.into_inner().send(Err(Error::TooManyRequests));
            }
        }
    }
}

impl Serving {
    pub(super) fn of(outcomes: mpsc::Receiver<Forwarded>) -> Self {
        Self { outcomes, ready: VecDeque::new() }
    }

    /// The next message for the member: all outcomes that are at hand. `None` when the stream is over.
    pub async fn next(&mut self) -> Option<peer::ForwardResponse> {
        if self.ready.is_empty() {
            let mut taken = Vec::new();
            if self.outcomes.recv_many(&mut taken, MESSAGE_REQUESTS_MAX).await == 0 {
                return None;
            }
            self.ready.extend(taken);
        }
        let mut message = peer::ForwardResponse::default();
        let mut bytes = 0;
        while bytes < ANSWERS_BYTES_MAX
            && let Some(forwarded) = self.ready.pop_front()
        {
            match forwarded {
                Forwarded::Outcome(id, outcome) => {
                    let outcome = wire_outcome(id, outcome);
                    bytes += outcome.encoded_len();
                    message.outcomes.push(outcome);
                }
                // One round a stream is under way, so one answer a message is all there can be.
                Forwarded::ReadIndex(id, outcome) => {
                    message.read_index_id = id;
                    match outcome {
                        Ok(index) => message.read_index = index,
                        Err(error) => message.read_error = error.number(),
                    }
                }
            }
        }
        Some(message)
    }
}

fn wire_outcome(id: u64, outcome: Result<pb::log::Answer, Error>) -> peer::forward_response::Outcome {
    use peer::forward_response::outcome::Result as Wire;
    let outcome = outcome.and_then(|answer| match answer.encoded_len() {
        bytes if bytes > ANSWER_BYTES_MAX => {
            Err(Error::Unsupported(format!("applied, but its answer of {bytes} bytes is too large to be forwarded")))
        }
        _ => Ok(answer),
    });
    match outcome {
        Ok(answer) => peer::forward_response::Outcome { id, result: Some(Wire::Answer(answer)), detail: String::new() },
        Err(error) => {
            peer::forward_response::Outcome { id, result: Some(Wire::Error(error.number())), detail: error.to_string() }
        }
    }
}
