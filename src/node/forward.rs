//! The stream from a member to the leader, both ends.
//!
//! One bidirectional stream a leader carries every proposal and read-index request of a member's clients, many to a message.
//! Messages are bounded by bytes, so that none is refused by its size and takes the stream with it; what is under way at the leader
//! is bounded by count and bytes for each stream, whatever the member has given up meanwhile.
//! What comes back of a proposal is a refusal or nothing: its answer is the member's own apply (`raft::Waiters`). So a proposal that
//! was never put on the wire fails with `NotLeader` (safe to try again), and one that was is waited for, also if the stream ends.
//! At most one read-index round of a stream is under way; later reads share the next. Reads that wait for a leader which is not the
//! leader any more go on with the next one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use super::account::Client;
use super::admit::Weight;
use super::places::Places;
use super::propose::{self, Forwarded, Proposal, Reply, Ticket};
use super::read::Waiter;
use super::{Node, more_of_a_burst};
use crate::env::{Instant, planted, sleep_until};
use crate::error::Error;
use crate::pb::log::{Command, command};
use crate::pb::peer;
use crate::raft::{MESSAGE_BYTES_MAX, Outcome, next_forwarded};

/// Requests put into one message.
const MESSAGE_REQUESTS_MAX: usize = 1024;
/// Answers put into one message, in bytes; one answer at least.
const ANSWERS_BYTES_MAX: usize = 1 << 20;
/// Largest answer that is sent to a member of an older version.
const ANSWER_BYTES_MAX: usize = MESSAGE_BYTES_MAX - ANSWERS_BYTES_MAX;
/// A stream that broke is not opened again sooner.
const REOPEN_AFTER: Duration = Duration::from_millis(100);

/// A request on its way to the leader.
pub(super) enum Outgoing {
    /// An encoded command.
    Proposal(Bytes, Ticket),
    Read(oneshot::Sender<Result<u64, Error>>),
}

impl Outgoing {
    fn fail(self, error: Error) {
        match self {
            Outgoing::Proposal(_, ticket) => ticket.end(Err(error)),
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

/// The reads that are not answered yet.
#[derive(Default)]
struct Pending {
    next_id: u64,
    /// Reads of the round under way.
    round: Vec<oneshot::Sender<Result<u64, Error>>>,
    /// Reads that wait for the next round.
    reads: Vec<oneshot::Sender<Result<u64, Error>>>,
}

impl LinkTask {
    async fn run(mut self) {
        let shutdown = self.node.inner.env.shutdown.clone();
        let mut pending = Pending::default();
        tokio::select! {
            () = self.carry(&mut pending) => {}
            () = shutdown.cancelled() => {}
        }
        self.closed.store(true, Ordering::Release);
        self.outgoing.close();
        while let Ok(request) = self.outgoing.try_recv() {
            request.fail(Error::NotLeader);
        }
        pending.fail_reads();
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
        // Set once the route has left this link: refusals of what was sent still come, for as long as somebody may wait for them.
        let mut left: Option<Instant> = None;
        loop {
            let room = pending.room(under_way_max).min(MESSAGE_REQUESTS_MAX);
            tokio::select! {
                answer = next_forwarded(&mut answers) => match answer {
                    Some(mut answer) => {
                        self.refuse(std::mem::take(&mut answer.outcomes));
                        if let Some(next) = pending.resolve(&answer)
                            && wire.send(next).await.is_err()
                        {
                            return;
                        }
                    }
                    None => return,
                },
                taken = self.outgoing.recv_many(&mut batch, room), if left.is_none() && room > 0 => {
                    if taken == 0 {
                        left = Some(Instant::now() + self.node.inner.options.request_timeout);
                        pending.fail_reads();
                        continue;
                    }
                    more_of_a_burst(&mut self.outgoing, &mut batch, room).await;
                    for message in pending.register(batch.drain(..), bytes_max) {
                        if wire.send(message).await.is_err() {
                            return;
                        }
                    }
                }
                () = sleep_until(left.unwrap_or_else(Instant::now)), if left.is_some() => return,
            }
        }
    }

    /// Takes what the leader says of proposals.
    fn refuse(&self, outcomes: Vec<peer::forward_response::Outcome>) {
        use peer::forward_response::outcome::Result as Wire;
        let waiters = self.node.inner.store.waiters();
        for outcome in outcomes {
            match outcome.result {
                Some(Wire::Error(number)) => match Error::from_number(number, outcome.detail) {
                    // The leader does not know its fate; the log does.
                    Error::Timeout | Error::TimeoutLeaderFailure | Error::TimeoutConnectionLost => {}
                    refused => waiters.end(outcome.id, Err(refused)),
                },
                Some(Wire::Answer(answer)) if planted!("answer-before-own-apply") => {
                    waiters.end(outcome.id, Ok(answer));
                }
                // Of a leader of an older version, which has applied it; this member has perhaps not.
                Some(Wire::Answer(_)) | None => {}
            }
        }
    }
}

impl Pending {
    /// How many more requests may be taken while at most `max` reads wait. Proposals that wait are bounded by their places.
    fn room(&mut self, max: usize) -> usize {
        if self.round.len() + self.reads.len() >= max {
            // Clients that have given up need no answer.
            self.reads.retain(|read| !read.is_closed());
        }
        max.saturating_sub(self.round.len() + self.reads.len())
    }

    /// They change nothing, so they may be asked again.
    fn fail_reads(&mut self) {
        for read in self.round.drain(..).chain(self.reads.drain(..)) {
            drop(read.send(Err(Error::NotLeader)));
        }
    }

    /// The messages that carry `requests`: each of at most `bytes_max` bytes of commands, one command at least.
    fn register(&mut self, requests: impl Iterator<Item = Outgoing>, bytes_max: usize) -> Vec<peer::ForwardRequest> {
        let mut messages = Vec::new();
        let mut message = peer::ForwardRequest::default();
        let mut bytes = 0;
        for request in requests {
            match request {
                Outgoing::Proposal(command, Ticket { number, .. }) => {
                    if bytes > 0 && bytes + command.len() > bytes_max {
                        messages.push(std::mem::take(&mut message));
                        bytes = 0;
                    }
                    bytes += command.len();
                    message.proposals.push(peer::forward_request::Proposal { id: number, command });
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

    /// Hands out the read index; returns the next round's request if reads wait.
    fn resolve(&mut self, answer: &peer::ForwardResponse) -> Option<peer::ForwardRequest> {
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
    /// Serves a forward stream of the member `from`, whose first message was checked.
    pub fn serve_forward<S, E>(&self, from: u64, mut requests: S) -> Serving
    where
        S: Stream<Item = Result<peer::ForwardRequest, E>> + Send + Unpin + 'static,
        E: Send,
    {
        // A place for each request that is under way, and for what is told of the last ones.
        let (to, outcomes) = mpsc::channel(2 * self.inner.options.queue_requests_max);
        let node = self.clone();
        // More than a member's own places, since these come back earlier.
        let (requests_max, bytes_max) = (self.inner.options.queue_requests_max, self.inner.options.queue_bytes_max);
        let places = Places::new(2 * requests_max, 2 * bytes_max);
        self.inner.env.spawn(async move {
            let shutdown = node.inner.env.shutdown.clone();
            loop {
                let request = tokio::select! {
                    request = requests.next() => request,
                    () = shutdown.cancelled() => return,
                };
                let Some(Ok(request)) = request else { return };
                let request = if node.is_fenced(from) { refuse_fenced(request, &to) } else { request };
                node.take_forwarded(from, request, &places, &to);
            }
        });
        Serving::of(outcomes)
    }

    fn take_forwarded(&self, from: u64, request: peer::ForwardRequest, places: &Places, to: &mpsc::Sender<Forwarded>) {
        for peer::forward_request::Proposal { id, command } in request.proposals {
            // A member gives places back when their clients are told of a timeout, whether the proposals still wait here or not.
            let Ok(place) = places.take(&Client::default(), command.len() as u64) else {
                drop(to.try_send(Forwarded::Outcome(id, Err(Error::TooManyRequests))));
                continue;
            };
            let asker = propose::forwarded_asker(from, id);
            let reply = Reply::Remote { id, to: to.clone(), _place: place };
            let proposal = Proposal { command, asker, weight: Weight::default(), reply };
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

/// What a fenced member asks: it may not have applied yet that it is one, so the leader refuses it. Alarms pass, or its clients could
/// not take them off.
fn refuse_fenced(mut request: peer::ForwardRequest, to: &mpsc::Sender<Forwarded>) -> peer::ForwardRequest {
    let is_alarm = |encoded: &Bytes| {
        Command::decode(encoded.clone()).is_ok_and(|x| matches!(x.request, Some(command::Request::Alarm(_))))
    };
    let (alarms, others) = request.proposals.into_iter().partition(|proposal| is_alarm(&proposal.command));
    request.proposals = alarms;
    for peer::forward_request::Proposal { id, .. } in others {
        drop(to.try_send(Forwarded::Outcome(id, Err(Error::Corrupt))));
    }
    let id = std::mem::take(&mut request.read_index_id);
    if id != 0 {
        Waiter::Remote { id, to: to.clone() }.send(Err(Error::Corrupt));
    }
    request
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

fn wire_outcome(id: u64, outcome: Outcome) -> peer::forward_response::Outcome {
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
            peer::forward_response::Outcome { id, result: Some(Wire::Error(error.number())), detail: error.detail() }
        }
    }
}
