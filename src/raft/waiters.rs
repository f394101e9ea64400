//! Who waits for what this member has proposed, until this member has applied it.
//!
//! A command carries its origin through the log, so the member that took it from a client answers it from its own apply, whoever led
//! meanwhile. Invariants: what was answered is in this member's state, so its reads, revisions and watches know it from then on; a
//! command that may have been accepted ends with its answer or with a timeout, never with a refusal; each ends at its deadline at the
//! latest, and holds its place until then, also if its client has given up.
//! Absent: how a command gets to the leader, and what is tried again (`node`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::env::Instant;
use crate::error::Error;
use crate::pb::log::{Answer, Origin};

/// The lowest bits of a number.
const MARK_BITS: u32 = u8::BITS;

/// What a command came to.
pub type Outcome = Result<Answer, Error>;

/// What a command holds of its member while it is under way; more than its waiter may have it.
pub trait Held: Send + Sync {
    /// Gives it back, for all who have it.
    fn give_back(&self);
}

/// The commands of this process that are under way.
#[derive(Default)]
pub struct Waiters {
    /// The nonce of this process; 0, which is nobody's, until it begins to propose.
    process: AtomicU64,
    next: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// By number, which is the order of their deadlines.
    waiting: BTreeMap<u64, Waiter>,
    /// Of the newest entry that was applied.
    term: u64,
}

struct Waiter {
    tx: oneshot::Sender<Outcome>,
    /// Of the leader that it was sent to, as far as this member knew.
    term: u64,
    deadline: Instant,
    /// What it holds: its place.
    held: Arc<dyn Held>,
}

impl Waiter {
    /// It was applied.
    fn answer(self, outcome: Outcome) {
        // Who proposed it learns this later, and its client may ask again at once.
        self.held.give_back();
        self.end(outcome);
    }

    fn end(self, outcome: Outcome) {
        // Before its client may ask again.
        drop(self.held);
        // A client that has given up does not listen any more.
        drop(self.tx.send(outcome));
    }
}

impl Waiters {
    /// To be called once, before the first command; `nonce` is this process's alone.
    pub fn begin(&self, nonce: u64) {
        self.process.store(nonce.max(1), Ordering::Relaxed);
    }

    /// For the next command, of whoever is meant by `mark`: the leader sees it in the number and serves those apart who have different
    /// ones.
    pub fn origin(&self, mark: u8) -> Origin {
        let number = self.next.fetch_add(1, Ordering::Relaxed) << MARK_BITS | u64::from(mark);
        Origin { process: self.process.load(Ordering::Relaxed), number }
    }

    /// The mark in a number, of whichever member.
    pub fn mark(number: u64) -> u8 {
        number as u8
    }

    /// The number that this process gave the command, if it did.
    pub(super) fn own(&self, origin: Origin) -> Option<u64> {
        (origin.process == self.process.load(Ordering::Relaxed)).then_some(origin.number)
    }

    /// Waits for what becomes of the command `number`, which goes to the leader of `term`; `None` if an entry of a later one is applied:
    /// that leader's time is over.
    pub fn wait(
        &self,
        number: u64,
        term: u64,
        deadline: Instant,
        held: Arc<dyn Held>,
    ) -> Option<oneshot::Receiver<Outcome>> {
        let (tx, rx) = oneshot::channel();
        let mut table = self.table.lock();
        if term < table.term {
            return None;
        }
        table.waiting.insert(number, Waiter { tx, term, deadline, held });
        Some(rx)
    }

    /// Whether somebody still wants the command to be proposed; who has given up before it was holds nothing any more.
    pub fn is_wanted(&self, number: u64) -> bool {
        let mut table = self.table.lock();
        match table.waiting.get(&number) {
            Some(waiter) if waiter.tx.is_closed() => {
                table.waiting.remove(&number);
                false
            }
            found => found.is_some(),
        }
    }

    pub fn end(&self, number: u64, outcome: Outcome) {
        let waiter = self.table.lock().waiting.remove(&number);
        if let Some(waiter) = waiter {
            waiter.end(outcome);
        }
    }

    /// Hands out what applying an entry of `term` answered.
    pub(super) fn applied(&self, term: u64, outcomes: Vec<(u64, Outcome)>) {
        let (answered, lost) = {
            let mut table = self.table.lock();
            let mut answered = Vec::with_capacity(outcomes.len());
            for (number, outcome) in outcomes {
                answered.extend(table.waiting.remove(&number).map(|waiter| (waiter, outcome)));
            }
            (answered, table.enter(term))
        };
        answered.into_iter().for_each(|(waiter, outcome)| waiter.answer(outcome));
        // Who leads in this term did not have it in the log, so what an earlier leader put there can not be applied any more. Still a
        // timeout: it may have reached a leader of this term late.
        lost.into_iter().for_each(|waiter| waiter.end(Err(Error::TimeoutLeaderFailure)));
    }

    /// As if an entry with the command was applied.
    #[cfg(test)]
    pub fn end_applied(&self, number: u64) {
        self.applied(1, vec![(number, Ok(Answer::default()))]);
    }

    /// Greater than each number that was given so far.
    pub(super) fn next_number(&self) -> u64 {
        self.next.load(Ordering::Relaxed) << MARK_BITS
    }

    /// The state was replaced by a snapshot's whose last entry is of `term`. It may hold what was asked below the number `before`, and
    /// nobody can say what that was answered. Returns how many were waiting for it.
    pub(super) fn replaced(&self, term: u64, before: u64) -> usize {
        let (covered, lost) = {
            let mut table = self.table.lock();
            let rest = table.waiting.split_off(&before);
            (std::mem::replace(&mut table.waiting, rest), table.enter(term))
        };
        let ended = covered.len() + lost.len();
        covered.into_values().chain(lost).for_each(|waiter| waiter.end(Err(Error::Timeout)));
        ended
    }

    /// Ends those whose time is over.
    pub fn expire(&self, now: Instant) {
        let mut expired = Vec::new();
        {
            let mut table = self.table.lock();
            while let Some(oldest) = table.waiting.first_entry()
                && oldest.get().deadline <= now
            {
                expired.push(oldest.remove());
            }
        }
        expired.into_iter().for_each(|waiter| waiter.end(Err(Error::Timeout)));
    }

    /// Nothing more will be applied, whoever leads.
    pub fn stop(&self) {
        let waiting = {
            let mut table = self.table.lock();
            table.term = u64::MAX;
            std::mem::take(&mut table.waiting)
        };
        waiting.into_values().for_each(|waiter| waiter.end(Err(Error::TimeoutLeaderFailure)));
    }
}

impl Table {
    /// Entries of `term` are applied from now on; returns what went to a leader before it.
    fn enter(&mut self, term: u64) -> Vec<Waiter> {
        if term <= self.term {
            return Vec::new();
        }
        self.term = term;
        let (lost, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, waiter)| waiter.term < term);
        self.waiting = waiting;
        BTreeMap::into_values(lost).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(5);

    impl Held for () {
        fn give_back(&self) {}
    }

    struct Asked {
        waiters: Waiters,
        place: Arc<()>,
    }

    impl Asked {
        fn new() -> Self {
            let waiters = Waiters::default();
            waiters.begin(7);
            Self { waiters, place: Arc::new(()) }
        }

        fn ask(&self, term: u64) -> (u64, oneshot::Receiver<Outcome>) {
            let number = self.waiters.origin(0).number;
            let deadline = Instant::now() + LONG;
            (number, self.waiters.wait(number, term, deadline, self.place.clone()).expect("the term is current"))
        }

        fn places_held(&self) -> usize {
            Arc::strong_count(&self.place) - 1
        }
    }

    #[test]
    fn only_this_process_answers_its_commands() {
        let waiters = Waiters::default();
        assert_eq!(waiters.own(Origin { process: 7, number: 1 }), None, "it has asked nothing");
        waiters.begin(7);
        assert_eq!(waiters.own(waiters.origin(0)), Some(0));
        assert_eq!(waiters.own(Origin { process: 8, number: 0 }), None);
        assert_ne!(waiters.origin(0), waiters.origin(0));
    }

    #[test]
    fn who_asked_a_leader_that_was_followed_by_another_is_told_at_once() {
        let asked = Asked::new();
        let (lost, mut told_lost) = asked.ask(3);
        let (_, mut waits) = asked.ask(4);
        asked.waiters.applied(3, Vec::new());
        assert!(told_lost.try_recv().is_err(), "its leader's entries are still being applied");
        asked.waiters.applied(4, Vec::new());
        assert_eq!(told_lost.try_recv(), Ok(Err(Error::TimeoutLeaderFailure)));
        assert!(waits.try_recv().is_err());
        assert_eq!(asked.places_held(), 1);
        assert!(
            asked.waiters.wait(lost, 3, Instant::now() + LONG, Arc::new(())).is_none(),
            "nobody leads in it any more"
        );
        asked.waiters.applied(4, vec![(lost, Ok(Answer::default()))]);
    }

    #[test]
    fn snapshot_ends_what_it_may_hold() {
        let asked = Asked::new();
        let (_, mut covered) = asked.ask(1);
        let before = asked.waiters.next_number();
        let (later, mut told_later) = asked.ask(1);
        assert_eq!(asked.waiters.replaced(1, before), 1);
        assert_eq!(covered.try_recv(), Ok(Err(Error::Timeout)));
        assert!(told_later.try_recv().is_err());
        asked.waiters.applied(1, vec![(later, Ok(Answer::default()))]);
        assert_eq!(told_later.try_recv(), Ok(Ok(Answer::default())));
        assert_eq!(asked.places_held(), 0);
    }

    #[test]
    fn place_is_held_until_the_answer_or_the_deadline_whoever_listens() {
        let asked = Asked::new();
        let ((first, gone), (_, told)) = (asked.ask(1), asked.ask(1));
        drop((gone, told));
        asked.waiters.expire(Instant::now());
        assert_eq!(asked.places_held(), 2);
        assert!(!asked.waiters.is_wanted(first), "it was not proposed yet, and nobody wants it");
        assert_eq!(asked.places_held(), 1);
        asked.waiters.expire(Instant::now() + LONG);
        assert_eq!(asked.places_held(), 0);
    }

    #[test]
    fn nobody_waits_once_nothing_is_applied_any_more() {
        let asked = Asked::new();
        let (_, mut told) = asked.ask(1);
        asked.waiters.stop();
        assert_eq!(told.try_recv(), Ok(Err(Error::TimeoutLeaderFailure)));
        assert!(asked.waiters.wait(9, 1, Instant::now() + LONG, Arc::new(())).is_none());
    }
}
