//! What waits, served by turns of those who ask, where what is asked for is of any size.
//!
//! A turn ends when what it served has come to [`TURN`]: so who asks for little at a time gets as much as who asks for much (deficit round
//! robin). Whose turn it is decides a [`Rota`].
//! Invariants: each asker's own come in the order in which they were asked for; one turn passes [`TURN`] by one item at most; it keeps
//! nothing of an asker for whom nothing waits. Absent: how much may wait (`places`), and what a thing comes to.

use std::collections::{HashMap, VecDeque};

use crate::env::rota::{Asker, Rota};

/// What a turn comes to, in bytes: a few small puts, or one large one.
pub(super) const TURN: usize = 16 << 10;

pub(super) struct Lanes<T> {
    /// By asker, for each that has a turn to come or has one now.
    lanes: HashMap<u64, Lane<T>>,
    turns: Rota<u64>,
    /// Whose turn it is, and what it has come to.
    serving: Option<(u64, usize)>,
    len: usize,
}

struct Lane<T> {
    /// Each with what it comes to, as far as that is known.
    waiting: VecDeque<(usize, T)>,
    amount: usize,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), amount: 0 }
    }
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self { lanes: HashMap::new(), turns: Rota::default(), serving: None, len: 0 }
    }
}

impl<T> Lanes<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What all that waits of each asker comes to.
    pub(super) fn amounts(&self) -> impl Iterator<Item = (u64, usize)> {
        let waiting = self.lanes.iter().filter(|(_, lane)| !lane.waiting.is_empty());
        waiting.map(|(asker, lane)| (*asker, lane.amount))
    }

    pub(super) fn push(&mut self, asker: u64, amount: usize, item: T) {
        let turns = &mut self.turns;
        let lane = self.lanes.entry(asker).or_insert_with(|| {
            turns.push(Asker::of_host(asker), asker);
            Lane::default()
        });
        lane.waiting.push_back((amount, item));
        lane.amount += amount;
        self.len += 1;
    }

    /// The next in turn; what it comes to is to be told with [`Self::spend`].
    pub(super) fn pop(&mut self) -> Option<T> {
        loop {
            let (asker, spent) = match self.serving {
                Some(serving) => serving,
                None => *self.serving.insert((self.turns.pop()?, 0)),
            };
            if let Some(lane) = self.lanes.get_mut(&asker).filter(|_| spent < TURN)
                && let Some((amount, item)) = lane.waiting.pop_front()
            {
                lane.amount -= amount;
                self.len -= 1;
                return Some(item);
            }
            self.serving = None;
            if self.lanes.get(&asker).is_some_and(|lane| !lane.waiting.is_empty()) {
                self.turns.push(Asker::of_host(asker), asker);
            } else {
                self.lanes.remove(&asker);
            }
        }
    }

    /// What was served last comes to so much.
    pub(super) fn spend(&mut self, amount: usize) {
        if let Some((_, spent)) = &mut self.serving {
            *spent = spent.saturating_add(amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random askers with items of random sizes: between two turns of an asker every other one that waits has one.
    #[test]
    fn who_asks_for_much_waits_for_himself() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..100 {
            let askers = random.u64(1..6);
            let sizes: Vec<usize> = (0..askers).map(|_| 1 << random.u32(4..21)).collect();
            let mut lanes = Lanes::default();
            let (mut asked, mut given) = (vec![0; askers as usize], vec![0; askers as usize]);
            // What others were served since an asker was, while it waited.
            let mut passed = vec![vec![0; askers as usize]; askers as usize];
            for _ in 0..random.usize(1..3000) {
                let asker = random.usize(..askers as usize);
                if random.bool() {
                    lanes.push(asker as u64, sizes[asker], (asker, asked[asker]));
                    asked[asker] += 1;
                } else if let Some((asker, item)) = lanes.pop() {
                    assert_eq!(item, given[asker], "in the order in which it was asked for");
                    given[asker] += 1;
                    lanes.spend(sizes[asker]);
                    passed[asker].fill(0);
                    for other in (0..askers as usize).filter(|&other| other != asker && asked[other] > given[other]) {
                        passed[other][asker] += sizes[asker];
                        // A turn that had begun may be gone on with, and one follows.
                        let most = 2 * (TURN + sizes[asker]);
                        assert!(passed[other][asker] <= most, "{asker} goes on while {other} waits");
                    }
                }
                for asker in (0..askers as usize).filter(|&asker| asked[asker] == given[asker]) {
                    passed[asker].fill(0);
                }
                let amounts: HashMap<u64, usize> = lanes.amounts().collect();
                let wanted = (0..askers as usize).filter(|&asker| asked[asker] > given[asker]);
                let wanted = wanted.map(|asker| (asker as u64, (asked[asker] - given[asker]) * sizes[asker]));
                assert_eq!(amounts, wanted.collect());
                assert_eq!(lanes.len(), asked.iter().sum::<usize>() - given.iter().sum::<usize>());
            }
            while lanes.pop().is_some() {}
            assert!(lanes.is_empty() && lanes.lanes.is_empty() && lanes.turns.is_empty());
        }
    }
}
