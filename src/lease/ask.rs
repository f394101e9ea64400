//! The way of keep-alives and questions to the leader's clock.
//!
//! What arrives while a call is under way goes with the next one, so a member has one call to the leader at a time, and the leader
//! one round to its quorum for each. Asking again is harmless, so whatever fails is tried again until its time is over. What waits is
//! bounded, each question has a place of its client's, and who finds none is told `too many requests`.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::Leases;
use super::clock::Renewed;
use crate::caller::Caller;
use crate::env::{Instant, sleep};
use crate::error::Error;
use crate::kv::{LEASES_SINCE, Wants};
use crate::node::Node;
use crate::node::account::Taken;
use crate::pb::etcd::LeaseCheckpoint;
use crate::pb::log::{self, Command, command};
use crate::pb::peer::{Envelope, LeasesRequest, LeasesResponse};

/// Questions that go with one call.
const CALL_MAX: usize = 4096;
/// After a call that failed: an election takes longer.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// In a list of renewals: no such lease.
const GONE: i64 = 0;
/// In a list of renewals: the checkpoint could not be taken back.
const NOT_NOW: i64 = -1;
/// In a list of remaining times: no such lease.
const UNKNOWN: i64 = -1;

/// What the leader says of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// Whole seconds that are left; `None`: there is no such lease.
    pub seconds: Option<i64>,
    /// The log index of the state that this is of.
    pub index: u64,
}

pub(super) enum Question {
    Renew(oneshot::Sender<Result<i64, Error>>),
    Look(oneshot::Sender<Result<Remaining, Error>>),
}

pub(super) struct Ask {
    id: i64,
    question: Question,
    deadline: Instant,
    /// Its client's, until it is answered.
    place: Taken,
}

impl Ask {
    fn fail(self, error: Error) {
        drop(self.place);
        match self.question {
            Question::Renew(tx) => drop(tx.send(Err(error))),
            Question::Look(tx) => drop(tx.send(Err(error))),
        }
    }

    fn is_closed(&self) -> bool {
        match &self.question {
            Question::Renew(tx) => tx.is_closed(),
            Question::Look(tx) => tx.is_closed(),
        }
    }
}

impl Leases {
    /// Keeps a lease alive, through `asker`'s handle. Returns the seconds that it lives from now on; 0 if there is no such lease.
    pub async fn renew(&self, asker: &Node, caller: &Caller, id: i64) -> Result<i64, Error> {
        let node = &self.inner.node;
        node.permit(caller, Wants::LeaseLife(id))?;
        if !node.store().is_writable()
            && let Some(refusal) = node.store().read(|s| s.kv.refusal())
        {
            return Err(refusal);
        }
        self.ask(asker, id, Question::Renew).await
    }

    /// How long a lease has to live, as the leader has it.
    pub async fn remaining(&self, asker: &Node, caller: &Caller, id: i64) -> Result<Remaining, Error> {
        self.inner.node.permit(caller, Wants::AnyUser)?;
        self.ask(asker, id, Question::Look).await
    }

    /// How many milliseconds each of these has to live, as the leader has it; -1 for those that it does not know.
    pub async fn remaining_millis(&self, caller: &Caller, ids: &[i64]) -> Result<Vec<i64>, Error> {
        self.inner.node.permit(caller, Wants::AnyUser)?;
        let mut all = Vec::with_capacity(ids.len());
        for look in ids.chunks(CALL_MAX) {
            let request = LeasesRequest { look: look.to_vec(), in_millis: true, ..LeasesRequest::default() };
            let answer = self.call(request).await?;
            match answer.remaining_millis.len() {
                // Of an older leader.
                0 => all.extend(answer.remaining.iter().map(|seconds| seconds.saturating_mul(1000))),
                _ => all.extend(answer.remaining_millis),
            }
        }
        Ok(all)
    }

    /// One call to the leader, wherever it is.
    async fn call(&self, request: LeasesRequest) -> Result<LeasesResponse, Error> {
        let node = &self.inner.node;
        let Some((leader, address)) = node.other_leader() else {
            return self.answer(&request).await;
        };
        let this = node.member();
        let envelope = Some(Envelope { cluster_id: this.cluster_id, from: this.member_id, to: leader });
        let counts = (request.renew.len(), request.look.len());
        let answer = node.peers().leases(&address, LeasesRequest { envelope, ..request }).await;
        match answer {
            Ok(answer) if answer.error != 0 => Err(Error::from_number(answer.error, answer.detail)),
            Ok(answer) if (answer.renewed.len(), answer.remaining.len()) == counts => Ok(answer),
            Ok(_) | Err(_) => Err(Error::TimeoutConnectionLost),
        }
    }

    async fn ask<T>(
        &self,
        asker: &Node,
        id: i64,
        of: fn(oneshot::Sender<Result<T, Error>>) -> Question,
    ) -> Result<T, Error> {
        let place = asker.take_place()?;
        let (tx, rx) = oneshot::channel();
        let deadline = Instant::now() + self.inner.node.options().request_timeout;
        self.inner.asks.try_send(Ask { id, question: of(tx), deadline, place }).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => Error::TooManyRequests,
            mpsc::error::TrySendError::Closed(_) => Error::Stopped,
        })?;
        rx.await.map_err(|_| Error::Stopped)?
    }

    /// Answers as the leader; fails if this member is not, or could not make sure.
    pub async fn answer(&self, request: &LeasesRequest) -> Result<LeasesResponse, Error> {
        let LeasesRequest { renew, look, in_millis, .. } = request;
        let node = &self.inner.node;
        let asked = Instant::now();
        let confirmed = node.confirm_leadership().await?;
        if !node.store().wait_applied(confirmed.index, Instant::now() + node.options().request_timeout).await {
            return Err(Error::Timeout);
        }
        if !node.store().is_writable() {
            return self.standing(request, confirmed.index);
        }
        let mut take_back = Vec::new();
        let (mut renewed, remaining, remaining_millis) = {
            let mut ticking = self.inner.ticking.lock();
            // Without a clock of that term the keeper has not come to it yet.
            let ticking = ticking.as_mut().filter(|t| t.term == confirmed.term).ok_or(Error::NotLeader)?;
            ticking.follow(node);
            let now = Instant::now();
            let mut renewals = Vec::with_capacity(renew.len());
            for (place, id) in renew.iter().enumerate() {
                let renewed = ticking.clock.renew(now, *id);
                if let Some(checkpoint) = renewed.and_then(|renewed| renewed.checkpoint) {
                    take_back.push((place, *id, checkpoint));
                }
                renewals.push(renewed.map_or(GONE, |Renewed { ttl_seconds, .. }| ttl_seconds));
            }
            let looks = look.iter().map(|id| ticking.clock.remaining_seconds(now, *id).unwrap_or(UNKNOWN));
            let of = look.iter().filter(|_| *in_millis);
            let millis = of.map(|id| ticking.clock.remaining_millis(now, *id).unwrap_or(UNKNOWN));
            (renewals, looks.collect(), millis.collect())
        };
        if !take_back.is_empty() {
            let checkpoints = take_back.iter().map(|(_, id, checkpoint)| (*id, *checkpoint)).collect();
            if let Err(error) = self.take_back(checkpoints, confirmed.term).await {
                tracing::debug!(%error, leases = take_back.len(), "checkpoints were not taken back");
                take_back.iter().for_each(|(place, ..)| renewed[*place] = NOT_NOW);
            }
        }
        // A leader that was elected meanwhile counts from its election, and adds so much: nobody is promised more than it gives.
        if asked.elapsed() > self.inner.settings.extension {
            return Err(Error::Timeout);
        }
        Ok(LeasesResponse { renewed, remaining, remaining_millis, index: confirmed.index, ..LeasesResponse::default() })
    }

    /// While clients may not write no clock runs: leases have what they would begin with, and none is kept alive.
    fn standing(&self, request: &LeasesRequest, index: u64) -> Result<LeasesResponse, Error> {
        let (refusal, known) = self.inner.node.store().read(|s| (s.kv.refusal(), s.kv.leases().clone()));
        if let Some(refusal) = refusal.filter(|_| !request.renew.is_empty()) {
            return Err(refusal);
        }
        let left = |id: &i64| known.get(*id).map_or(UNKNOWN, |lease| lease.start_seconds());
        let remaining: Vec<i64> = request.look.iter().map(left).collect();
        let millis = remaining.iter().filter(|_| request.in_millis);
        let millis = millis.map(|left| if *left == UNKNOWN { UNKNOWN } else { left.saturating_mul(1000) });
        Ok(LeasesResponse { remaining_millis: millis.collect(), remaining, index, ..LeasesResponse::default() })
    }

    /// Has these leases start with all their time if another leader takes over.
    async fn take_back(&self, taken: Vec<(i64, u32)>, term: u64) -> Result<(), Error> {
        let _order = self.inner.checkpointing.lock().await;
        let checkpoints = taken.iter().map(|(id, _)| LeaseCheckpoint { id: *id, remaining_ttl: 0 }).collect();
        let request = command::Request::LeaseCheckpoint(log::LeaseCheckpoint { checkpoints, term });
        self.inner.node.propose(&Caller::Internal, Command::new(LEASES_SINCE, request)).await?;
        if let Some(ticking) = self.inner.ticking.lock().as_mut().filter(|ticking| ticking.term == term) {
            taken.iter().for_each(|(id, checkpoint)| ticking.clock.taken_back(*id, *checkpoint));
        }
        Ok(())
    }

    /// For another member. Failures are part of the answer.
    pub async fn answer_peer(&self, request: &LeasesRequest) -> LeasesResponse {
        match self.answer(request).await {
            Ok(answer) => answer,
            Err(error) => {
                LeasesResponse { error: error.number(), detail: error.to_string(), ..LeasesResponse::default() }
            }
        }
    }
}

pub(super) struct Asker {
    leases: Leases,
    queue: mpsc::Receiver<Ask>,
}

impl Asker {
    pub(super) fn new(leases: Leases, queue: mpsc::Receiver<Ask>) -> Self {
        Self { leases, queue }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.leases.inner.node.env().shutdown.clone();
        tokio::select! {
            () = self.carry() => {}
            () = shutdown.cancelled() => {}
        }
        self.queue.close();
        while let Ok(ask) = self.queue.try_recv() {
            ask.fail(Error::Stopped);
        }
    }

    async fn carry(&mut self) {
        let mut waiting: Vec<Ask> = Vec::new();
        loop {
            if waiting.is_empty() {
                if self.queue.recv_many(&mut waiting, CALL_MAX).await == 0 {
                    return;
                }
            } else {
                while waiting.len() < CALL_MAX
                    && let Ok(ask) = self.queue.try_recv()
                {
                    waiting.push(ask);
                }
            }
            let now = Instant::now();
            let (open, late): (Vec<Ask>, Vec<Ask>) = waiting.drain(..).partition(|ask| now < ask.deadline);
            if !late.is_empty() {
                // As etcd: who has waited for a leader in vain is told so.
                let leader = self.leases.inner.node.status().leader;
                let error = if leader.is_some() { Error::Timeout } else { Error::NoLeader };
                late.into_iter().for_each(|ask| ask.fail(error.clone()));
            }
            // Clients that have given up need no answer.
            waiting.extend(open.into_iter().filter(|ask| !ask.is_closed()));
            if waiting.is_empty() {
                continue;
            }
            match self.call(&waiting).await {
                Ok(answer) => waiting = hand_out(waiting, &answer),
                Err(error) => {
                    tracing::debug!(%error, waiting = waiting.len(), "the leader's lease clock did not answer")
                }
            }
            if !waiting.is_empty() {
                sleep(RETRY_AFTER).await;
            }
        }
    }

    async fn call(&self, asks: &[Ask]) -> Result<LeasesResponse, Error> {
        let mut request = LeasesRequest::default();
        for ask in asks {
            match ask.question {
                Question::Renew(_) => request.renew.push(ask.id),
                Question::Look(_) => request.look.push(ask.id),
            }
        }
        self.leases.call(request).await
    }
}

/// Answers all that can be; returns those that must be asked again.
fn hand_out(asks: Vec<Ask>, answer: &LeasesResponse) -> Vec<Ask> {
    let (mut renewed, mut remaining) = (answer.renewed.iter(), answer.remaining.iter());
    let mut again = Vec::new();
    for ask in asks {
        let next = match ask.question {
            Question::Renew(_) => renewed.next(),
            Question::Look(_) => remaining.next(),
        };
        let seconds = *next.expect("there is an answer to every question");
        if seconds == NOT_NOW && matches!(ask.question, Question::Renew(_)) {
            again.push(ask);
            continue;
        }
        // Before its client may ask again.
        drop(ask.place);
        match ask.question {
            Question::Renew(tx) => drop(tx.send(Ok(seconds))),
            Question::Look(tx) => {
                let seconds = Some(seconds).filter(|seconds| *seconds != UNKNOWN);
                drop(tx.send(Ok(Remaining { seconds, index: answer.index })));
            }
        }
    }
    again
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Client;
    use crate::node::account::{Kind, Pool};

    #[tokio::test]
    async fn answers_find_their_questions() {
        let deadline = Instant::now();
        let (renew, renewed) = oneshot::channel();
        let (look, looked) = oneshot::channel();
        let (later, mut not_yet) = oneshot::channel();
        let places = Pool::new(Kind::Requests, 3);
        let ask = |id, question| {
            let place = places.take(&Client::default(), 1).unwrap();
            Ask { id, question, deadline, place }
        };
        let asks = vec![ask(1, Question::Renew(renew)), ask(2, Question::Look(look)), ask(3, Question::Renew(later))];
        let answer =
            LeasesResponse { renewed: vec![60, NOT_NOW], remaining: vec![UNKNOWN], index: 7, ..Default::default() };
        let again = hand_out(asks, &answer);
        assert_eq!(places.taken(), 1, "who is answered holds no place");
        assert_eq!(again.iter().map(|ask| ask.id).collect::<Vec<_>>(), [3]);
        assert_eq!(renewed.await.unwrap(), Ok(60));
        assert_eq!(looked.await.unwrap(), Ok(Remaining { seconds: None, index: 7 }));
        assert!(not_yet.try_recv().is_err());
    }
}
