//! A checker of linearizability: Wing and Gong's search, with Lowe's linked list and memory of what was tried.
//!
//! A history is linearizable if its operations can be put in one order that a sequential [`Model`] allows, and in which whatever
//! returned before another was called comes before it. An operation whose outcome is unknown may be anywhere after its call, or
//! nowhere. The search goes depth first over the operations that may come next; a pair of operations taken and state reached
//! that failed once is not entered again.
//!
//! Invariants: [`Verdict::Linearizable`] comes with the order found; [`Verdict::Violation`] means that there is none;
//! [`Verdict::Undecided`] says that the limit was reached first, never a guess. Steps are the limit and not time, so that the
//! verdict on a history is always the same; a step takes a microsecond or so.
//! Absent: what operations mean (`model`), and how to show one (`picture`).

use std::collections::HashSet;
use std::hash::Hash;

use super::history::{NEVER, Stamp};

/// A sequential object.
pub trait Model {
    type Op;
    type State: Clone + Eq + Hash;

    fn initial(&self) -> Self::State;

    /// The state after `op`, if in `state` it could have had the outcome that it had.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;

    /// When `op` was called and when it returned: [`NEVER`] if its outcome is unknown.
    fn interval(&self, op: &Self::Op) -> (Stamp, Stamp);

    fn kind(&self, op: &Self::Op) -> Kind;
}

/// What the search need not try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It changes nothing, so it is right to come next as soon as it may.
    Still,
    /// It changes the state, and where it may come no other that does may: right once nothing still is left to come before.
    Sure,
    Open,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The operations in an order that the model allows; ones of unknown outcome are there only if they took effect.
    Linearizable {
        order: Vec<usize>,
        steps: u64,
    },
    Violation {
        /// The longest order found.
        order: Vec<usize>,
        /// The operation that had to come next and could not.
        stuck: usize,
    },
    Undecided,
}

impl Verdict {
    pub fn is_linearizable(&self) -> bool {
        matches!(self, Self::Linearizable { .. })
    }
}

/// Calls and returns in order of time, as a list from which operations are taken and put back.
struct Events {
    /// Operation, and whether it is its return.
    at: Vec<(usize, bool)>,
    /// Place 0 is before the first event.
    next: Vec<usize>,
    before: Vec<usize>,
    /// Places of each operation's call and return; no return if it is unknown.
    places: Vec<(usize, Option<usize>)>,
}

impl Events {
    fn new(intervals: &[(Stamp, Stamp)]) -> Self {
        let mut events: Vec<(Stamp, bool, usize)> = Vec::with_capacity(2 * intervals.len());
        for (op, &(called, returned)) in intervals.iter().enumerate() {
            assert!(called <= returned, "an operation is called before it returns");
            events.push((called, false, op));
            if returned != NEVER {
                events.push((returned, true, op));
            }
        }
        // At one stamp, calls come first: such operations are concurrent.
        events.sort_unstable();
        let mut places = vec![(0, None); intervals.len()];
        let mut at = vec![(usize::MAX, false)];
        for (_, is_return, op) in events {
            let place = at.len();
            at.push((op, is_return));
            if is_return { places[op].1 = Some(place) } else { places[op].0 = place }
        }
        let len = at.len();
        let next = (1..=len).collect();
        let before = (0..=len).map(|place: usize| place.saturating_sub(1)).collect();
        Self { at, next, before, places }
    }

    fn first(&self) -> Option<usize> {
        self.after(0)
    }

    fn after(&self, place: usize) -> Option<usize> {
        Some(self.next[place]).filter(|next| *next < self.at.len())
    }

    fn take(&mut self, op: usize) {
        let (call, returned) = self.places[op];
        for place in std::iter::once(call).chain(returned) {
            let (before, next) = (self.before[place], self.next[place]);
            self.next[before] = next;
            self.before[next] = before;
        }
    }

    /// Undoes the last `take` that was not undone.
    fn put_back(&mut self, op: usize) {
        let (call, returned) = self.places[op];
        for place in returned.into_iter().chain(std::iter::once(call)) {
            let (before, next) = (self.before[place], self.next[place]);
            self.next[before] = place;
            self.before[next] = place;
        }
    }
}

/// The operations taken so far, as bits.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Taken(Vec<u64>);

impl Taken {
    fn flip(&mut self, op: usize) {
        self.0[op / 64] ^= 1 << (op % 64);
    }
}

struct Search<'a, M: Model> {
    model: &'a M,
    ops: &'a [M::Op],
    events: Events,
    taken: Taken,
    tried: HashSet<(Taken, M::State)>,
    /// Operations taken, each with the state before it.
    stack: Vec<(usize, M::State)>,
    state: M::State,
    /// Operations with an outcome that are not taken yet.
    left: usize,
    longest: (Vec<usize>, usize),
}

/// Checks `ops` in at most `steps_max` steps.
pub fn check<M: Model>(model: &M, ops: &[M::Op], steps_max: u64) -> Verdict {
    let intervals: Vec<(Stamp, Stamp)> = ops.iter().map(|op| model.interval(op)).collect();
    let left = intervals.iter().filter(|(_, returned)| *returned != NEVER).count();
    let search = Search {
        model,
        ops,
        events: Events::new(&intervals),
        taken: Taken(vec![0; ops.len().div_ceil(64)]),
        tried: HashSet::new(),
        stack: Vec::new(),
        state: model.initial(),
        left,
        longest: (Vec::new(), 0),
    };
    search.run(steps_max)
}

impl<M: Model> Search<'_, M> {
    fn run(mut self, steps_max: u64) -> Verdict {
        let mut steps = 0;
        let mut place = self.settle();
        while self.left > 0 {
            steps += 1;
            if steps > steps_max {
                return Verdict::Undecided;
            }
            let here = place.expect("the return of an operation that is left is in the list");
            let (op, is_return) = self.events.at[here];
            if !is_return {
                let taken = self.model.kind(&self.ops[op]) != Kind::Still && self.take(op);
                place = if taken { self.settle() } else { self.after(here) };
                continue;
            }
            // Whatever may come before this return was tried: `op` has no place here.
            self.note_stuck(op);
            match self.back() {
                Some(call) => place = self.after(call),
                None => {
                    let (order, stuck) = self.longest;
                    return Verdict::Violation { order, stuck };
                }
            }
        }
        Verdict::Linearizable { order: self.stack.iter().map(|(op, _)| *op).collect(), steps }
    }

    /// Takes everything that may come next and changes nothing; returns the first event that is left.
    fn settle(&mut self) -> Option<usize> {
        let mut place = self.events.first();
        while let Some(here) = place {
            let (op, is_return) = self.events.at[here];
            if is_return {
                break;
            }
            let still = self.model.kind(&self.ops[op]) == Kind::Still;
            place = if still && self.take(op) { self.events.first() } else { self.after(here) };
        }
        self.events.first()
    }

    /// The event after `place`; there is one as long as an operation is left, since its return is behind every candidate.
    fn after(&self, place: usize) -> Option<usize> {
        self.events.after(place)
    }

    /// Takes `op` as the next one, if it can be and this was not tried.
    fn take(&mut self, op: usize) -> bool {
        let Some(state) = self.model.step(&self.state, &self.ops[op]) else { return false };
        self.taken.flip(op);
        // Only what may be wrong to take is worth remembering: two ways to one place part, and so meet, at such operations.
        let is_open = self.model.kind(&self.ops[op]) == Kind::Open;
        if is_open && !self.tried.insert((self.taken.clone(), state.clone())) {
            self.taken.flip(op);
            return false;
        }
        self.stack.push((op, std::mem::replace(&mut self.state, state)));
        self.events.take(op);
        self.left -= usize::from(self.events.places[op].1.is_some());
        true
    }

    /// Undoes the last choice that has an alternative; returns the place of its call.
    fn back(&mut self) -> Option<usize> {
        loop {
            let (op, state) = self.stack.pop()?;
            self.state = state;
            self.taken.flip(op);
            self.events.put_back(op);
            self.left += usize::from(self.events.places[op].1.is_some());
            if self.model.kind(&self.ops[op]) == Kind::Open {
                return Some(self.events.places[op].0);
            }
        }
    }

    fn note_stuck(&mut self, op: usize) {
        if self.longest.0.is_empty() || self.stack.len() > self.longest.0.len() {
            self.longest = (self.stack.iter().map(|(op, _)| *op).collect(), op);
        }
    }
}
