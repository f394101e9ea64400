//! The leader's proposer: packs the commands that wait into one log entry.
//!
//! A batch is what arrived while the one before it was in flight, and shortly after it ([`Pace`]). Only where much waits, it goes while
//! others are in flight. Bounded by bytes a batch and batches in flight.
//!
//! A command that takes milliseconds to apply is heavy: it goes behind all others that wait, alone, and one at a time, since what is
//! behind it in the log waits for it. So whoever sends many of them waits for himself, and the others for one of them at most.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::places::Place;
use super::rates::Rates;
use super::space::Judge;
use super::{Node, admit, more_of_a_burst};
use crate::env::{Instant, sleep_until};
use crate::error::Error;
use crate::pb;
use crate::raft::{Batch, Outcome, TypeConfig, Waiters};

/// Commands taken from the queue at a time.
const TAKE_MAX: usize = 4096;
/// Commands of so many bytes do not wait for the batch in flight. Fewer gain nothing by that: a member takes one append after the
/// other, and the same commands in more batches cost more.
const MUCH_BYTES: usize = 64 << 10;
/// What the commands of a batch cost together, unless one alone costs more: an entry is applied in one go, and meanwhile no other.
const BATCH_UNITS_MAX: u64 = 32_768;
/// A command that costs more goes alone: some milliseconds.
const HEAVY_UNITS: u64 = 4096;
/// So many commands do not wait for more: what a batch costs beside them, three flushes above all, is little then.
const MANY: usize = 64;
/// Where so few are about, nobody waits for others.
const FEW: usize = 8;
/// Nobody waits longer than this for others, nor longer than two batches take. With half of both, half of what waiting saves was lost.
const HOLD_MAX: Duration = Duration::from_millis(4);
/// After a batch that was as quick as this there is no wait: the timer is not much finer.
const QUICK: Duration = Duration::from_micros(500);

/// Who is told if a command is refused. What it was answered is told only to members of older versions: the others learn it from
/// their own apply, as this one does for its own clients.
pub(super) enum Reply {
    /// A client of this member.
    Local(Ticket),
    /// A member that forwarded it.
    Remote { id: u64, to: mpsc::Sender<Forwarded>, _place: Place },
}

/// What goes back on a forward stream.
pub(super) enum Forwarded {
    Outcome(u64, Outcome),
    ReadIndex(u64, Result<u64, Error>),
}

/// A command of this member's client, on its way through this member.
pub(super) struct Ticket {
    pub number: u64,
    pub waiters: Arc<Waiters>,
    pub place: Arc<Place>,
}

impl Ticket {
    pub(super) fn end(self, outcome: Outcome) {
        // Before its client may ask again.
        drop(self.place);
        self.waiters.end(self.number, outcome);
    }
}

impl Reply {
    pub(super) fn send(self, outcome: Outcome) {
        match self {
            Reply::Local(ticket) => ticket.end(outcome),
            // The channel has a place for every request that may be under way; full means that the stream is gone.
            Reply::Remote { id, to, .. } => drop(to.try_send(Forwarded::Outcome(id, outcome))),
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Reply::Local(ticket) => !ticket.waiters.is_wanted(ticket.number),
            Reply::Remote { to, .. } => to.is_closed(),
        }
    }
}

/// An encoded [`pb::log::Command`] on its way.
pub(super) struct Proposal {
    pub command: Bytes,
    /// What applying it costs; of another member's, that is counted here.
    pub units: u64,
    pub reply: Reply,
}

/// When the next batch goes, once none is in flight.
///
/// Who is answered mostly asks again at once, when others have waited for a while. Were these to go alone, the answered would wait for
/// them, and so on in turns: twice the batches, each of half the commands. So what waits is held until most of those are back whom the
/// last batch answered. (PostgreSQL's `commit_delay` is of the same kind.)
struct Pace {
    /// Commands to wait for.
    expected: usize,
    /// Until when.
    until: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { expected: 0, until: now }
    }

    /// A batch that `took` so long has answered this many, while others were `waiting`.
    fn answered(&mut self, answered: usize, waiting: usize, took: Duration, now: Instant) {
        let about = answered + waiting;
        self.expected = about * 9 / 10;
        self.until = if took > QUICK && about > FEW { now + HOLD_MAX.min(2 * took) } else { now };
    }

    fn is_due(&self, waiting: usize, now: Instant) -> bool {
        waiting >= self.expected.min(MANY) || now >= self.until
    }
}

/// Commands as batches, each with what is to be told to whom when it is applied.
struct Batches<R> {
    bytes_max: usize,
    whole: Vec<(Bytes, Vec<R>)>,
    batch: BytesMut,
    replies: Vec<R>,
    units: u64,
}

impl<R> Batches<R> {
    fn new(bytes_max: usize) -> Self {
        Self { bytes_max, whole: Vec::new(), batch: BytesMut::new(), replies: Vec::new(), units: 0 }
    }

    fn add(&mut self, command: &[u8], units: u64, reply: R) {
        let bytes = pb::delimited_len(command.len());
        if self.batch.len() + bytes > self.bytes_max || self.units.saturating_add(units) > BATCH_UNITS_MAX {
            self.close();
        }
        self.batch.reserve(bytes);
        self.batch.put_slice(&admit::batch_head(command.len()));
        self.batch.put_slice(command);
        self.replies.push(reply);
        self.units = self.units.saturating_add(units);
    }

    fn close(&mut self) {
        if !self.replies.is_empty() {
            self.whole.push((self.batch.split().freeze(), std::mem::take(&mut self.replies)));
        }
        self.units = 0;
    }

    fn finish(mut self) -> Vec<(Bytes, Vec<R>)> {
        self.close();
        self.whole
    }
}

impl Batches<Reply> {
    fn packed(self, is_heavy: bool) -> impl Iterator<Item = Packed> {
        self.finish().into_iter().map(move |(batch, replies)| Packed { batch, replies, is_heavy })
    }
}

pub(super) struct Proposer {
    node: Node,
    queue: mpsc::Receiver<Proposal>,
    /// Of batches that are in flight.
    in_flight_bytes: u64,
    rates: Mutex<Rates>,
    /// Heavy commands that wait, each in its place among all that may; and whether one is in flight.
    heavy: VecDeque<(Proposal, u64)>,
    heavy_in_flight: bool,
}

/// A batch that goes to Raft.
struct Packed {
    batch: Bytes,
    replies: Vec<Reply>,
    is_heavy: bool,
}

/// A batch that is no longer in flight.
struct Done {
    is_heavy: bool,
    replies: Vec<Reply>,
    result: Result_,
    took: Duration,
    bytes: u64,
}

type Result_ = Result<ClientWriteResult<TypeConfig>, ()>;

impl Proposer {
    pub(super) fn new(node: Node, queue: mpsc::Receiver<Proposal>) -> Self {
        let rates = Mutex::default();
        Self { node, queue, in_flight_bytes: 0, rates, heavy: VecDeque::new(), heavy_in_flight: false }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.node.inner.env.shutdown.clone();
        let in_flight_max = self.node.inner.options.batches_in_flight_max;
        let mut in_flight = FuturesUnordered::new();
        let mut waiting = Vec::new();
        let mut pace = Pace::new(Instant::now());
        loop {
            let room = TAKE_MAX - waiting.len();
            tokio::select! {
                biased;
                Some(Done { is_heavy, replies, result, took, bytes }) = in_flight.next() => {
                    self.in_flight_bytes -= bytes;
                    if is_heavy {
                        self.heavy_in_flight = false;
                    } else {
                        pace.answered(replies.len(), waiting.len() + self.queue.len(), took, Instant::now());
                    }
                    distribute(replies, result);
                }
                taken = self.queue.recv_many(&mut waiting, room), if room > 0 && in_flight.len() < in_flight_max => {
                    if taken == 0 {
                        return;
                    }
                }
                () = sleep_until(pace.until), if self.others_in_flight(in_flight.len()) == 0 && !waiting.is_empty() => {}
                () = shutdown.cancelled() => return,
            }
            let is_due = self.others_in_flight(in_flight.len()) == 0 && pace.is_due(waiting.len(), Instant::now());
            let is_heavy_due = !self.heavy_in_flight && !self.heavy.is_empty();
            let has_work = is_heavy_due || !waiting.is_empty() && (is_due || is_much(&waiting));
            if in_flight.len() >= in_flight_max || !has_work {
                continue;
            }
            more_of_a_burst(&mut self.queue, &mut waiting, TAKE_MAX).await;
            for packed in self.pack(&mut waiting) {
                let (bytes, is_heavy) = (packed.batch.len() as u64, packed.is_heavy);
                if let Some(waiting) = self.submit(packed).await {
                    self.in_flight_bytes += bytes;
                    self.heavy_in_flight |= is_heavy;
                    in_flight.push(waiting);
                }
            }
        }
    }

    /// Batches in flight besides a heavy command.
    fn others_in_flight(&self, in_flight: usize) -> usize {
        in_flight - usize::from(self.heavy_in_flight)
    }

    /// Splits what waits into batches of bounded bytes and cost; a batch holds one command at least. The last one may be a heavy one.
    fn pack(&mut self, waiting: &mut Vec<Proposal>) -> Vec<Packed> {
        let bytes_max = self.node.inner.options.batch_bytes_max;
        let cluster_version = self.node.inner.store.read(|s| s.kv.cluster_version());
        let auth = self.node.is_auth_on().then(|| self.node.auth()).filter(|auth| auth.has_rates());
        let mut judge = Judge::new(&self.node, self.in_flight_bytes);
        let mut may_go = |proposal: &Proposal| {
            let in_rate = match &auth {
                Some(auth) => self.rates.lock().check(auth, &proposal.command, Instant::now()),
                None => Ok(()),
            };
            in_rate.and_then(|()| judge.check(&proposal.command))
        };
        let mut batches = Batches::new(bytes_max);
        for proposal in waiting.drain(..).filter(|proposal| !proposal.reply.is_closed()) {
            match check(&self.node, &proposal, cluster_version) {
                Ok(units) if units > HEAVY_UNITS => self.heavy.push_back((proposal, units)),
                checked => match checked.and_then(|units| may_go(&proposal).map(|()| units)) {
                    Ok(units) => batches.add(&proposal.command, units, proposal.reply),
                    Err(error) => proposal.reply.send(Err(error)),
                },
            }
        }
        let mut packed: Vec<_> = batches.packed(false).collect();
        while !self.heavy_in_flight
            && let Some((proposal, units)) = self.heavy.pop_front()
        {
            if proposal.reply.is_closed() {
                continue;
            }
            match may_go(&proposal) {
                Ok(()) => {
                    let mut alone = Batches::new(bytes_max);
                    alone.add(&proposal.command, units, proposal.reply);
                    packed.extend(alone.packed(true));
                    break;
                }
                Err(error) => proposal.reply.send(Err(error)),
            }
        }
        packed
    }

    async fn submit(&self, packed: Packed) -> Option<impl Future<Output = Done> + use<>> {
        let Packed { batch, replies, is_heavy } = packed;
        let (begin, bytes) = (Instant::now(), batch.len() as u64);
        let (responder, rx) = openraft::impls::OneshotResponder::new_pair();
        if self.node.inner.raft.client_write_ff(Batch(batch), Some(responder)).await.is_err() {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::Stopped)));
            return None;
        }
        Some(async move {
            let result = rx.await.map_err(|_| ());
            Done { is_heavy, replies, result, took: begin.elapsed(), bytes }
        })
    }
}

/// Returns what applying it will cost.
fn check(node: &Node, proposal: &Proposal, cluster_version: u32) -> Result<u64, Error> {
    match proposal.reply {
        Reply::Local(_) => admit::version(&proposal.command, cluster_version).map(|()| proposal.units),
        Reply::Remote { .. } => {
            let inner = &node.inner;
            admit::forwarded(&proposal.command, &inner.options.limits, &inner.store, cluster_version)
        }
    }
}

fn is_much(waiting: &[Proposal]) -> bool {
    waiting.iter().map(|proposal| proposal.command.len()).sum::<usize>() >= MUCH_BYTES
}

fn distribute(replies: Vec<Reply>, result: Result_) {
    match result {
        Ok(Ok(written)) => {
            let mut answers = written.data.into_iter().peekable();
            for (place, reply) in replies.into_iter().enumerate() {
                if let Some((_, answer)) = answers.next_if(|(of, _)| *of == place) {
                    reply.send(answer);
                }
            }
            assert!(answers.next().is_none(), "every answer is to a command of the batch");
        }
        // openraft answers with `ForwardToLeader` only before the entry is appended.
        Ok(Err(ClientWriteError::ForwardToLeader(_))) => {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::NotLeader)));
        }
        // The entry may yet be committed by another leader.
        Ok(Err(_)) | Err(()) => {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::TimeoutLeaderFailure)));
        }
    }
}

#[cfg(test)]
mod tests {
    use openraft::errors::ForwardToLeader;

    use super::super::account::Client;
    use super::super::places::Places;
    use super::*;

    fn told(result: Result_) -> Error {
        let place = Arc::new(Places::new(1, 1).take(&Client::default(), 1).expect("it is free"));
        let waiters = Arc::new(Waiters::default());
        let number = waiters.origin().number;
        let mut rx = waiters.wait(number, 1, Instant::now(), place.clone()).expect("no later term is known");
        distribute(vec![Reply::Local(Ticket { number, waiters, place })], result);
        rx.try_recv().expect("everyone is told").expect_err("it was not applied")
    }

    #[test]
    fn a_batch_waits_for_those_who_were_answered_but_not_long() {
        let begin = Instant::now();
        let after = |millis| begin + Duration::from_millis(millis);
        let mut pace = Pace::new(begin);
        assert!(pace.is_due(1, begin), "nobody was answered yet");
        pace.answered(30, 20, Duration::from_micros(1500), begin);
        assert!(!pace.is_due(20, begin));
        assert!(pace.is_due(45, begin), "most are back");
        assert!(!pace.is_due(44, after(2)));
        assert!(pace.is_due(20, after(3)), "as long as two batches take is enough");
        pace.answered(30, 20, Duration::from_secs(1), begin);
        assert!(!pace.is_due(20, after(3)));
        assert!(pace.is_due(20, after(4)), "4 ms are enough");
        pace.answered(200, 200, Duration::from_secs(1), begin);
        assert!(pace.is_due(64, begin), "many do not wait for more");
        pace.answered(5, 3, Duration::from_secs(1), begin);
        assert!(pace.is_due(1, begin), "few wait for nobody");
        pace.answered(30, 20, Duration::from_micros(500), begin);
        assert!(pace.is_due(1, begin), "a quick batch is not worth a wait");
    }

    #[test]
    fn a_batch_is_bounded_by_bytes_and_by_what_it_costs_but_takes_one_command_at_least() {
        let sizes = |commands: &[(usize, u64)]| {
            let mut batches = Batches::new(100);
            for (bytes, units) in commands {
                batches.add(&vec![0; *bytes], *units, *units);
            }
            batches.finish().into_iter().map(|(_, replies)| replies.len()).collect::<Vec<_>>()
        };
        assert!(sizes(&[]).is_empty());
        assert_eq!(sizes(&[(10, 1); 8]), [8]);
        assert_eq!(sizes(&[(10, 1), (200, 1), (10, 1)]), [1, 1, 1]);
        assert_eq!(sizes(&[(1, 1), (1, u64::MAX), (1, 1), (1, 1)]), [1, 1, 2]);
        // The ends of a thousand leases of a hundred keys.
        let leases = sizes(&[(0, 100); 1000]);
        assert_eq!(leases.iter().sum::<usize>(), 1000);
        assert!(leases.len() > 1 && leases.iter().all(|leases| *leases as u64 * 100 <= BATCH_UNITS_MAX), "{leases:?}");
    }

    /// Only `NotLeader` is tried again.
    #[test]
    fn proposal_counts_as_unproposed_only_before_it_was_appended() {
        let elsewhere = ForwardToLeader::empty();
        assert_eq!(told(Ok(Err(ClientWriteError::ForwardToLeader(elsewhere.clone())))), Error::NotLeader);
        // Truncated here, it may still be committed by a member that has it.
        assert_eq!(told(Ok(Err(ClientWriteError::LogEntryDiscarded(elsewhere)))), Error::TimeoutLeaderFailure);
        assert_eq!(told(Err(())), Error::TimeoutLeaderFailure, "Raft ended without an answer");
    }
}
