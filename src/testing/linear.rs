//! A checker of linearizability: Wing and Gong's search, with Lowe's linked list and memory of what was tried.
//!
//! A history is linearizable if its operations can be put in one order that a sequential [`Model`] allows, and in which whatever
//! returned before another was called comes before it. An operation whose outcome is unknown may be anywhere after its call, or
//! nowhere. The search goes depth first over the operations that may come next; a pair of operations taken and state reached
//! that failed once is not entered again.
//!
//! Of a long history most is known beforehand: where an operation can only be in some places of the order, its [`Model`] says so, and
//! then only those of the place that was reached are looked at, not all that were called and never returned.
//!
//! Invariants: [`Verdict::Linearizable`] comes with the order found; [`Verdict::Violation`] means that there is none;
//! [`Verdict::Undecided`] says that the limit was reached first, never a guess. Steps are the limit and not time, so that the
//! verdict on a history is always the same; a step takes a microsecond or so.
//! Absent: what operations mean (`model`), and how to show one (`picture`).

use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};

use imbl::Vector;

use super::history::{NEVER, Stamp};

/// Pairs remembered, for they take memory: about a kilobyte each.
const TRIED_MAX: usize = 4_000_000;

/// A sequential object.
pub trait Model {
    type Op;
    type State: Clone + Eq + Hash;
    type Request: Eq + Hash;

    fn initial(&self) -> Self::State;

    /// The state after `op`, if in `state` it could have had the outcome that it had.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;

    /// When `op` was called and when it returned: [`NEVER`] if its outcome is unknown.
    fn interval(&self, op: &Self::Op) -> (Stamp, Stamp);

    fn kind(&self, op: &Self::Op) -> Kind;

    /// What an operation of unknown outcome asks for; two of the same are the same but for the times of their calls.
    fn lost<'a>(&self, op: &'a Self::Op) -> Option<&'a Self::Request>;

    /// Where an operation may be. In any other place [`Model::step`] must refuse it.
    fn places(&self, op: &Self::Op) -> Places;

    /// The place of what comes next in `state`.
    fn place(&self, state: &Self::State) -> i64;

    /// True if nothing is known of who is at a place.
    fn is_unheard(&self, place: i64) -> bool;

    /// The last place of which something is known: an order should go on until then, even if only operations of unknown outcome do.
    fn heard_to(&self) -> i64 {
        i64::MIN
    }
}

/// Places of the order in which an operation may be, by what is known before the search.
pub enum Places {
    All,
    These(Vec<i64>),
    /// These, and those of which nothing is known.
    TheseOrUnheard(Vec<i64>),
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

/// What may be at which place.
struct Index {
    spots: HashMap<i64, Spot>,
    /// What may be at a place of which nothing is known.
    unheard: Vec<usize>,
    /// Operations that may be anywhere.
    is_loose: Vec<bool>,
    /// Of an operation of unknown outcome, the one before it that asks for the same: that one comes first, as it may be wherever
    /// this one may.
    twins: Vec<Option<usize>>,
}

#[derive(Default)]
struct Spot {
    /// What changes nothing, by call.
    still: Vec<usize>,
    /// What has the fewest places first: the others can do without this one.
    others: Vec<usize>,
}

impl Index {
    fn new<M: Model>(model: &M, ops: &[M::Op], intervals: &[(Stamp, Stamp)]) -> Self {
        let mut index = Self {
            spots: HashMap::new(),
            unheard: Vec::new(),
            is_loose: vec![false; ops.len()],
            twins: vec![None; ops.len()],
        };
        let mut order: Vec<usize> = (0..ops.len()).collect();
        order.sort_by_key(|op| intervals[*op].0);
        let mut lost: HashMap<&M::Request, usize> = HashMap::new();
        let mut choices = vec![0; ops.len()];
        for op in order {
            index.twins[op] = model.lost(&ops[op]).and_then(|request| lost.insert(request, op));
            let places = match model.places(&ops[op]) {
                Places::All => {
                    index.is_loose[op] = true;
                    continue;
                }
                Places::These(places) => places,
                Places::TheseOrUnheard(places) => {
                    index.unheard.push(op);
                    places
                }
            };
            choices[op] = places.len();
            let is_still = model.kind(&ops[op]) == Kind::Still;
            for place in places {
                let spot = index.spots.entry(place).or_default();
                if is_still { spot.still.push(op) } else { spot.others.push(op) }
            }
        }
        index.spots.values_mut().for_each(|spot| spot.others.sort_by_key(|op| choices[*op]));
        index.unheard.sort_by_key(|op| choices[*op]);
        index
    }
}

/// Calls and returns in order of time, as a list from which operations are taken and put back. The call of an operation that is
/// not loose has its number, and is not in the list.
struct Events {
    /// Operation, and whether it is its return.
    at: Vec<(usize, bool)>,
    /// Place 0 is before the first event.
    next: Vec<usize>,
    before: Vec<usize>,
    /// Places of each operation's call and return; no return if it is unknown.
    places: Vec<(usize, Option<usize>)>,
    is_loose: Vec<bool>,
}

impl Events {
    fn new(intervals: &[(Stamp, Stamp)], is_loose: &[bool]) -> Self {
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
        let mut events = Self { at, next, before, places, is_loose: is_loose.to_vec() };
        for op in (0..intervals.len()).filter(|op| !is_loose[*op]) {
            events.unlink(events.places[op].0);
        }
        events
    }

    /// The place of the first return in the list: only what is called before it may come next.
    fn first_return(&self) -> Option<usize> {
        let mut place = self.after(0)?;
        while !self.at[place].1 {
            place = self.after(place)?;
        }
        Some(place)
    }

    fn unlink(&mut self, place: usize) {
        let (before, next) = (self.before[place], self.next[place]);
        self.next[before] = next;
        self.before[next] = before;
    }

    fn after(&self, place: usize) -> Option<usize> {
        Some(self.next[place]).filter(|next| *next < self.at.len())
    }

    fn take(&mut self, op: usize) {
        let (call, returned) = self.places[op];
        if self.is_loose[op] {
            self.unlink(call);
        }
        if let Some(returned) = returned {
            self.unlink(returned);
        }
    }

    /// Undoes the last `take` that was not undone.
    fn put_back(&mut self, op: usize) {
        let (call, returned) = self.places[op];
        for place in returned.into_iter().chain(self.is_loose[op].then_some(call)) {
            let (before, next) = (self.before[place], self.next[place]);
            self.next[before] = place;
            self.before[next] = place;
        }
    }
}

/// The operations taken so far, as bits, with a sum of a number for each. A clone shares its memory.
#[derive(Clone)]
struct Taken {
    bits: Vector<u64>,
    sum: u64,
}

impl Taken {
    fn flip(&mut self, op: usize) {
        self.bits[op / 64] ^= 1 << (op % 64);
        // Any odd multiplier spreads the numbers; what is equal by its sum is compared.
        self.sum ^=
            (op as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }

    fn holds(&self, op: usize) -> bool {
        self.bits[op / 64] >> (op % 64) & 1 == 1
    }
}

impl PartialEq for Taken {
    fn eq(&self, other: &Self) -> bool {
        self.sum == other.sum && self.bits == other.bits
    }
}

impl Eq for Taken {}

impl Hash for Taken {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.sum.hash(state);
    }
}

/// How far the candidates of a state were looked at.
#[derive(Clone, Copy, Default)]
struct Cursor {
    /// The place in the list.
    loose: usize,
    /// Of those that the index has for the place that was reached.
    bound: usize,
}

struct Search<'a, M: Model> {
    model: &'a M,
    ops: &'a [M::Op],
    index: &'a Index,
    events: Events,
    taken: Taken,
    tried: HashSet<(Taken, M::State)>,
    /// Operations taken, each with the state before it and the candidates that were looked at there.
    stack: Vec<(usize, M::State, Cursor)>,
    state: M::State,
    /// Operations with an outcome that are not taken yet.
    left: usize,
    longest: (Vec<usize>, usize),
}

/// Checks `ops` in at most `steps_max` steps.
pub fn check<M: Model>(model: &M, ops: &[M::Op], steps_max: u64) -> Verdict {
    let intervals: Vec<(Stamp, Stamp)> = ops.iter().map(|op| model.interval(op)).collect();
    let left = intervals.iter().filter(|(_, returned)| *returned != NEVER).count();
    let index = Index::new(model, ops, &intervals);
    let search = Search {
        model,
        ops,
        index: &index,
        events: Events::new(&intervals, &index.is_loose),
        taken: Taken { bits: (0..ops.len().div_ceil(64)).map(|_| 0).collect(), sum: 0 },
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
        self.settle();
        let mut cursor = Cursor::default();
        let heard_to = self.model.heard_to();
        // An order of all that have an outcome, once there is one: what comes after it is of those that watchers alone have seen.
        let mut whole: Option<Vec<usize>> = None;
        while self.left > 0 || self.model.place(&self.state) <= heard_to {
            if self.left == 0 && whole.is_none() {
                whole = Some(self.order());
            }
            steps += 1;
            if steps > steps_max || self.tried.len() > TRIED_MAX {
                return Verdict::Undecided;
            }
            if let Some(op) = self.candidate(&mut cursor) {
                if self.take(op, cursor) {
                    self.settle();
                    cursor = Cursor::default();
                }
                continue;
            }
            // Whatever may come before the first return was tried: its operation has no place here.
            if let Some(first) = self.events.first_return() {
                self.note_stuck(self.events.at[first].0);
            }
            let before = self.back();
            if let Some(order) = whole.take_if(|order| before.is_none() || self.stack.len() < order.len()) {
                // What was seen after it was done by nobody; that is for who has seen it to say.
                return Verdict::Linearizable { order, steps };
            }
            match before {
                Some(before) => cursor = before,
                None => {
                    let (order, stuck) = self.longest;
                    return Verdict::Violation { order, stuck };
                }
            }
        }
        Verdict::Linearizable { order: self.order(), steps }
    }

    fn order(&self) -> Vec<usize> {
        self.stack.iter().map(|(op, ..)| *op).collect()
    }

    /// Takes everything that may come next and changes nothing.
    fn settle(&mut self) {
        let index = self.index;
        let spot = index.spots.get(&self.model.place(&self.state));
        let still = spot.map_or(&[][..], |spot| &spot.still);
        // Taking one lets more be called before the first return; what was refused once is refused again, for the state stays.
        let (mut loose, mut bound) = (0, 0);
        loop {
            let before = self.stack.len();
            while let Some(here) = self.events.after(loose) {
                let (op, is_return) = self.events.at[here];
                if is_return {
                    break;
                }
                if self.model.kind(&self.ops[op]) != Kind::Still || !self.take(op, Cursor::default()) {
                    loose = here;
                }
            }
            while let Some(&op) = still.get(bound)
                && self.is_called(op)
            {
                if !self.taken.holds(op) {
                    self.take(op, Cursor::default());
                }
                bound += 1;
            }
            if self.stack.len() == before {
                return;
            }
        }
    }

    /// True if nothing that is left returned before `op` was called.
    fn is_called(&self, op: usize) -> bool {
        self.events.first_return().is_none_or(|first| self.events.places[op].0 < first)
    }

    /// The next operation that may change the state and may come next.
    fn candidate(&self, cursor: &mut Cursor) -> Option<usize> {
        while let Some(here) = self.events.after(cursor.loose) {
            let (op, is_return) = self.events.at[here];
            if is_return {
                break;
            }
            cursor.loose = here;
            if self.model.kind(&self.ops[op]) != Kind::Still {
                return Some(op);
            }
        }
        let place = self.model.place(&self.state);
        let others = self.index.spots.get(&place).map_or(&[][..], |spot| &spot.others);
        let unheard = if self.model.is_unheard(place) { &self.index.unheard[..] } else { &[] };
        let first = self.events.first_return().unwrap_or(usize::MAX);
        let mut bound = others.iter().chain(unheard).skip(cursor.bound);
        bound
            .find(|op| {
                cursor.bound += 1;
                !self.taken.holds(**op) && self.events.places[**op].0 < first
            })
            .copied()
    }

    /// Takes `op` as the next one, if it can be and this was not tried. `cursor`: the candidates that were looked at, itself the last.
    fn take(&mut self, op: usize, cursor: Cursor) -> bool {
        if self.index.twins[op].is_some_and(|twin| !self.taken.holds(twin)) {
            return false;
        }
        let Some(state) = self.model.step(&self.state, &self.ops[op]) else { return false };
        self.taken.flip(op);
        // Only what may be wrong to take is worth remembering: two ways to one place part, and so meet, at such operations.
        let is_open = self.model.kind(&self.ops[op]) == Kind::Open;
        if is_open && !self.tried.insert((self.taken.clone(), state.clone())) {
            self.taken.flip(op);
            return false;
        }
        self.stack.push((op, std::mem::replace(&mut self.state, state), cursor));
        self.events.take(op);
        self.left -= usize::from(self.events.places[op].1.is_some());
        true
    }

    /// Undoes the last choice that has an alternative; returns the candidates that were looked at there.
    fn back(&mut self) -> Option<Cursor> {
        loop {
            let (op, state, cursor) = self.stack.pop()?;
            self.state = state;
            self.taken.flip(op);
            self.events.put_back(op);
            self.left += usize::from(self.events.places[op].1.is_some());
            if self.model.kind(&self.ops[op]) == Kind::Open {
                return Some(cursor);
            }
        }
    }

    fn note_stuck(&mut self, op: usize) {
        if self.longest.0.is_empty() || self.stack.len() > self.longest.0.len() {
            self.longest = (self.order(), op);
        }
    }
}
