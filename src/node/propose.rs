//! The leader's proposer: packs the commands that wait into one log entry.
//!
//! A batch is what arrived while the one before it was in flight, and shortly after it ([`Pace`]). Only where much waits, it goes while
//! others are in flight. Bounded by bytes a batch and batches in flight.
//!
//! So much goes at once as others may wait for, a *round*. Where more waits, clients have turns, by their hosts ([`Lanes`]). What another
//! member forwards has the turns of that member's client, whose mark is in its number; a member's own commands have turns of their
//! own.
//!
//! A new leader proposes nothing before it has applied an entry of its own term, and so all that earlier leaders have left in the log:
//! what that adds it does not know before, nor what a command would copy of it.
//!
//! A command that takes milliseconds to apply is heavy: it goes behind all others that wait, alone, and one at a time, since what is
//! behind it in the log waits for it. These, too, go by turns, and few of a client may wait. So whoever sends many of them waits for
//! himself, and the others for one of them at most.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use tokio::sync::mpsc;

use super::admit::Weight;
use super::lanes::{Lanes, TURN};
use super::places::Place;
use super::rates::Rates;
use super::space::Judge;
use super::{Node, Route, admit, more_of_a_burst};
use crate::env::rota::{Asker, Rota};
use crate::env::{Instant, sleep_until};
use crate::error::Error;
use crate::kv::Auth;
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
/// Heavy commands of one client that may wait: more than it can have the time for.
const HEAVY_WAITING_MAX: usize = 32;
/// What goes at once, unless one command alone is more: who comes then waits for no more, some ten milliseconds.
const ROUND_BYTES_MAX: usize = 2 << 20;
const ROUND_UNITS_MAX: u64 = 8192;
/// What a command comes to at least, however little applying it costs: a member's clients are answered all together, and who comes then
/// waits for that.
const COMMAND_UNITS: u64 = 32;
/// Where more waits than a round takes, rounds are a so-manieth of that for a while if somebody among those who wait asks for a small part of
/// what another one asks for: who asks for little then waits for some milliseconds, where all others wait for long in any case. Alone, or
/// among their like, clients get more done in large rounds.
const NARROW_PART: u64 = 4;
const UNEVEN_PART: usize = 8;
const NARROW_FOR: Duration = Duration::from_secs(1);
/// What is as much of a turn as a unit of cost.
const UNIT_BYTES: usize = 64;
/// Who asks if it is the member itself: as the `host_number` of nobody in particular.
const OWN: u64 = 0;
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
    /// In whose turns it goes.
    pub asker: u64,
    /// What applying it comes to; of another member's, that is counted here.
    pub weight: Weight,
    pub reply: Reply,
}

impl Proposal {
    /// What it is of a turn at least.
    fn amount(&self) -> usize {
        UNIT_BYTES * COMMAND_UNITS as usize + self.command.len()
    }
}

/// In whose turns goes what another member has forwarded under this number. Of a member of an older version, whose numbers have no
/// marks, any two commands may go in different ones.
pub(super) fn forwarded_asker(from: u64, number: u64) -> u64 {
    // A member's id is random but for its lowest bits, and no client's host has such a number.
    from.rotate_left(u8::BITS) ^ u64::from(Waiters::mark(number))
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
    whole: Vec<Packed<R>>,
    batch: BytesMut,
    replies: Vec<R>,
    units: u64,
    adds: u64,
}

/// A batch that goes to Raft.
struct Packed<R> {
    batch: Bytes,
    replies: Vec<R>,
    /// What applying it adds.
    adds: u64,
    is_heavy: bool,
}

impl<R> Batches<R> {
    fn new(bytes_max: usize) -> Self {
        Self { bytes_max, whole: Vec::new(), batch: BytesMut::new(), replies: Vec::new(), units: 0, adds: 0 }
    }

    fn add(&mut self, command: &[u8], weight: Weight, reply: R) {
        let bytes = pb::delimited_len(command.len());
        if self.batch.len() + bytes > self.bytes_max || self.units.saturating_add(weight.units) > BATCH_UNITS_MAX {
            self.close();
        }
        self.batch.reserve(bytes);
        self.batch.put_slice(&admit::batch_head(command.len()));
        self.batch.put_slice(command);
        self.replies.push(reply);
        self.units = self.units.saturating_add(weight.units);
        self.adds = self.adds.saturating_add(weight.adds);
    }

    fn close(&mut self) {
        if !self.replies.is_empty() {
            let (batch, replies) = (self.batch.split().freeze(), std::mem::take(&mut self.replies));
            self.whole.push(Packed { batch, replies, adds: self.adds, is_heavy: false });
        }
        (self.units, self.adds) = (0, 0);
    }

    fn finish(mut self) -> Vec<Packed<R>> {
        self.close();
        self.whole
    }

    /// The batches so far.
    fn encoded(&self) -> impl Iterator<Item = Bytes> {
        let open = Bytes::copy_from_slice(&self.batch);
        self.whole.iter().map(|packed| packed.batch.clone()).chain([open])
    }
}

/// What of a round is left.
struct Left {
    bytes: usize,
    units: u64,
}

impl Left {
    fn of_round(is_narrow: bool) -> Self {
        let part = if is_narrow { NARROW_PART } else { 1 };
        Self { bytes: ROUND_BYTES_MAX / part as usize, units: ROUND_UNITS_MAX / part }
    }

    fn is_none(&self) -> bool {
        self.bytes == 0 || self.units == 0
    }

    fn spend(&mut self, bytes: usize, units: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.units = self.units.saturating_sub(units.max(COMMAND_UNITS));
    }
}

/// A round that is being packed.
struct Round<'a> {
    node: &'a Node,
    cluster_version: u32,
    /// If there are users with a rate.
    auth: Option<Arc<Auth>>,
    rates: &'a mut Rates,
    judge: Judge<'a>,
    in_flight: &'a [InFlight],
    batches: Batches<Reply>,
    left: Left,
}

impl<'a> Round<'a> {
    fn new(node: &'a Node, rates: &'a mut Rates, in_flight: &'a [InFlight], left: Left) -> Self {
        Self {
            node,
            cluster_version: node.inner.store.read(|s| s.kv.cluster_version()),
            auth: node.is_auth_on().then(|| node.auth()).filter(|auth| auth.has_rates()),
            rates,
            judge: Judge::new(node, in_flight.iter().map(|batch| batch.adds).fold(0, u64::saturating_add)),
            in_flight,
            batches: Batches::new(node.inner.options.batch_bytes_max),
            left,
        }
    }

    /// Takes a command into the round, or tells that it is refused, or has it wait among the heavy ones. Returns what it comes to of its
    /// asker's turn.
    fn take(&mut self, mut proposal: Proposal, heavy: &mut Rota<Proposal>) -> usize {
        if proposal.reply.is_closed() {
            return 0;
        }
        let checked = self.weigh(&mut proposal);
        let Weight { units, .. } = proposal.weight;
        let bytes = proposal.command.len();
        if checked.is_ok() && units > HEAVY_UNITS {
            let asker = Asker::of_host(proposal.asker);
            if proposal.asker != OWN && heavy.share(asker).host >= HEAVY_WAITING_MAX {
                proposal.reply.send(Err(Error::TooManyRequests));
            } else {
                heavy.push(asker, proposal);
            }
            return bytes;
        }
        match checked.and_then(|()| self.let_go(&proposal)) {
            Ok(()) => {
                self.left.spend(bytes, units);
                self.batches.add(&proposal.command, proposal.weight, proposal.reply);
            }
            Err(error) => proposal.reply.send(Err(error)),
        }
        bytes.saturating_add(UNIT_BYTES.saturating_mul(usize::try_from(units.max(COMMAND_UNITS)).unwrap_or(TURN)))
    }

    /// The next heavy command whose asker still wants it and that is not refused.
    fn take_heavy(&mut self, heavy: &mut Rota<Proposal>) -> Option<Packed<Reply>> {
        while let Some(mut proposal) = heavy.pop() {
            if proposal.reply.is_closed() {
                continue;
            }
            // Again, for it has waited.
            match self.weigh(&mut proposal).and_then(|()| self.let_go(&proposal)) {
                Ok(()) => {
                    let mut alone = Batches::new(self.node.inner.options.batch_bytes_max);
                    alone.add(&proposal.command, proposal.weight, proposal.reply);
                    return alone.finish().pop().map(|packed| Packed { is_heavy: true, ..packed });
                }
                Err(error) => proposal.reply.send(Err(error)),
            }
        }
        None
    }

    /// Finds out what applying it comes to, as the data is now and behind what goes before it.
    fn weigh(&mut self, proposal: &mut Proposal) -> Result<(), Error> {
        let inner = &self.node.inner;
        let mut weight = match proposal.reply {
            Reply::Local(_) => admit::version(&proposal.command, self.cluster_version).map(|()| proposal.weight)?,
            Reply::Remote { .. } => {
                admit::forwarded(&proposal.command, &inner.options.limits, &inner.store, self.cluster_version)?
            }
        };
        if weight.copies {
            let sent = self.in_flight.iter().map(|batch| batch.batch.clone());
            let (command, batches) = (&proposal.command, &self.batches);
            self.judge.weigh_copies(command, &mut weight, || sent.chain(batches.encoded()).collect());
        }
        proposal.weight = weight;
        Ok(())
    }

    /// Refuses what its asker may not write now, or what there is no space for.
    fn let_go(&mut self, proposal: &Proposal) -> Result<(), Error> {
        if let Some(auth) = &self.auth {
            self.rates.check(auth, &proposal.command, Instant::now())?;
        }
        self.judge.check(&proposal.command, proposal.weight)
    }
}

pub(super) struct Proposer {
    node: Node,
    queue: mpsc::Receiver<Proposal>,
    in_flight: Vec<InFlight>,
    batches_sent: u64,
    /// The last term of this member's of which it has applied an entry.
    settled: Option<u64>,
    rates: Rates,
    /// What a round had no room for.
    lanes: Lanes<Proposal>,
    /// Heavy commands that wait, each in its asker's turns; and whether one is in flight.
    heavy: Rota<Proposal>,
    heavy_in_flight: bool,
    /// Until when rounds are narrow.
    narrow_until: Option<Instant>,
}

/// A batch that was given to Raft and is not applied yet.
struct InFlight {
    number: u64,
    batch: Bytes,
    adds: u64,
}

/// A batch that is no longer in flight.
struct Done {
    number: u64,
    is_heavy: bool,
    replies: Vec<Reply>,
    result: Result_,
    took: Duration,
}

type Result_ = Result<ClientWriteResult<TypeConfig>, ()>;

impl Proposer {
    pub(super) fn new(node: Node, queue: mpsc::Receiver<Proposal>) -> Self {
        Self {
            node,
            queue,
            in_flight: Vec::new(),
            batches_sent: 0,
            settled: None,
            rates: Rates::default(),
            lanes: Lanes::default(),
            heavy: Rota::default(),
            heavy_in_flight: false,
            narrow_until: None,
        }
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
                Some(Done { number, is_heavy, replies, result, took }) = in_flight.next() => {
                    self.in_flight.retain(|batch| batch.number != number);
                    if is_heavy {
                        self.heavy_in_flight = false;
                    } else {
                        let wait = waiting.len() + self.lanes.len() + self.queue.len();
                        pace.answered(replies.len(), wait, took, Instant::now());
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
            let is_crowded = !self.lanes.is_empty();
            let has_work = is_heavy_due || is_crowded || !waiting.is_empty() && (is_due || is_much(&waiting));
            if in_flight.len() >= in_flight_max || !has_work {
                continue;
            }
            if is_crowded && self.others_in_flight(in_flight.len()) > 0 && self.is_narrow() {
                continue;
            }
            if self.settled != Some(self.node.term()) {
                tokio::select! {
                    () = self.settle() => {}
                    () = shutdown.cancelled() => return,
                }
            }
            more_of_a_burst(&mut self.queue, &mut waiting, TAKE_MAX).await;
            for packed in self.pack(&mut waiting) {
                in_flight.extend(self.submit(packed).await);
            }
        }
    }

    /// Returns when this member has applied an entry of the term that it leads in, or leads no longer: then Raft refuses what is proposed.
    async fn settle(&mut self) {
        let inner = &self.node.inner;
        let (mut applied, mut route) = (inner.store.applied(), inner.route_changed.subscribe());
        loop {
            applied.borrow_and_update();
            route.borrow_and_update();
            let term = self.node.term();
            if !matches!(*inner.route.read(), Route::Leader) {
                return;
            }
            // Of a later one, if this member was elected again and has not been told yet: nobody would tell of that here.
            let newest = inner.store.applied_term();
            if newest >= Some(term) {
                self.settled = newest;
                return;
            }
            tokio::select! {
                _ = applied.changed() => {}
                _ = route.changed() => {}
            }
        }
    }

    fn is_narrow(&self) -> bool {
        self.narrow_until.is_some_and(|until| Instant::now() < until)
    }

    /// Batches in flight besides a heavy command.
    fn others_in_flight(&self, in_flight: usize) -> usize {
        in_flight - usize::from(self.heavy_in_flight)
    }

    /// The next round: of what waits, so much as may go at once, in batches of bounded bytes and cost; a batch holds one command at least.
    /// The last one may be a heavy one.
    fn pack(&mut self, waiting: &mut Vec<Proposal>) -> Vec<Packed<Reply>> {
        if !self.lanes.is_empty() && is_uneven(waiting, &self.lanes) {
            self.narrow_until = Some(Instant::now() + NARROW_FOR);
        }
        let is_narrow = self.is_narrow();
        let left = Left::of_round(is_narrow);
        let mut round = Round::new(&self.node, &mut self.rates, &self.in_flight, left);
        let (lanes, heavy) = (&mut self.lanes, &mut self.heavy);
        let by_turns = is_narrow || !lanes.is_empty();
        for proposal in waiting.drain(..) {
            // Nearly always all of it may go, and then nobody need know whose it is.
            if by_turns || round.left.is_none() {
                lanes.push(proposal.asker, proposal.amount(), proposal);
            } else {
                round.take(proposal, heavy);
            }
        }
        if !lanes.is_empty() {
            // Whoever comes behind many others has its turn with them.
            while let Ok(proposal) = self.queue.try_recv() {
                lanes.push(proposal.asker, proposal.amount(), proposal);
            }
        }
        while !round.left.is_none()
            && let Some(proposal) = lanes.pop()
        {
            let spent = round.take(proposal, heavy);
            lanes.spend(spent);
        }
        let alone = if self.heavy_in_flight { None } else { round.take_heavy(heavy) };
        let mut packed = round.batches.finish();
        packed.extend(alone);
        packed
    }

    /// Gives a batch to Raft. Returns what resolves when it is applied; `None`: Raft has stopped.
    async fn submit(&mut self, packed: Packed<Reply>) -> Option<impl Future<Output = Done> + use<>> {
        let Packed { batch, replies, adds, is_heavy } = packed;
        let begin = Instant::now();
        let (responder, rx) = openraft::impls::OneshotResponder::new_pair();
        if self.node.inner.raft.client_write_ff(Batch(batch.clone()), Some(responder)).await.is_err() {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::Stopped)));
            return None;
        }
        let number = self.batches_sent;
        self.batches_sent += 1;
        self.in_flight.push(InFlight { number, batch, adds });
        self.heavy_in_flight |= is_heavy;
        Some(async move {
            let result = rx.await.map_err(|_| ());
            Done { number, is_heavy, replies, result, took: begin.elapsed() }
        })
    }
}

/// Whether somebody asks for little while another asks for much.
fn is_uneven(waiting: &[Proposal], lanes: &Lanes<Proposal>) -> bool {
    let mut askers: HashMap<u64, usize> = lanes.amounts().collect();
    for proposal in waiting {
        *askers.entry(proposal.asker).or_default() += proposal.amount();
    }
    askers.remove(&OWN);
    let (least, most) = (askers.values().min(), askers.values().max());
    least.zip(most).is_some_and(|(least, most)| least.saturating_mul(UNEVEN_PART) < *most)
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

/// For tests that play Raft.
#[cfg(test)]
impl Proposer {
    pub(super) fn round_of_test(&mut self) -> Vec<(Bytes, u64, Vec<Reply>)> {
        let mut waiting = Vec::new();
        while waiting.len() < TAKE_MAX
            && let Ok(proposal) = self.queue.try_recv()
        {
            waiting.push(proposal);
        }
        self.pack(&mut waiting).into_iter().map(|packed| (packed.batch, packed.adds, packed.replies)).collect()
    }

    pub(super) async fn settle_of_test(&mut self) {
        self.settle().await;
    }

    pub(super) fn note_of_test(&mut self, number: u64, batch: Bytes, adds: u64) {
        self.in_flight.push(InFlight { number, batch, adds });
    }

    pub(super) fn forget_of_test(&mut self, number: u64) {
        self.in_flight.retain(|batch| batch.number != number);
    }

    pub(super) fn waits_of_test(&self) -> bool {
        !(self.queue.is_empty() && self.lanes.is_empty() && self.heavy.is_empty())
    }
}

#[cfg(test)]
impl Reply {
    pub(super) fn id_of_test(&self) -> u64 {
        match self {
            Reply::Local(ticket) => ticket.number,
            Reply::Remote { id, .. } => *id,
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
        let number = waiters.origin(0).number;
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
                batches.add(&vec![0; *bytes], Weight { units: *units, ..Weight::default() }, *units);
            }
            batches.finish().into_iter().map(|packed| packed.replies.len()).collect::<Vec<_>>()
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
