//! So many at a time, and the others by turns of those who ask: one who asks often waits for itself.
//!
//! Invariants: no more sit than there are seats; while somebody waits none is free. Who leaves, whether it waits or sits, costs the others
//! nothing.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::rota::{Asker, Rota};

pub struct Seats(Mutex<Inner>);

struct Inner {
    free: usize,
    waiting: Rota<oneshot::Sender<Seat>>,
}

/// Dropping it gives it to the next in turn.
pub struct Seat(Option<Arc<Seats>>);

impl Seats {
    pub fn new(seats: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner { free: seats, waiting: Rota::default() })))
    }

    pub async fn sit(self: &Arc<Self>, asker: Asker) -> Seat {
        let given = {
            let mut inner = self.0.lock();
            if inner.free > 0 {
                inner.free -= 1;
                return Seat(Some(self.clone()));
            }
            let (give, given) = oneshot::channel();
            inner.waiting.push(asker, give);
            given
        };
        given.await.expect("who gets up gives its seat to those who wait")
    }

    /// Those who wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(seats) = self.0.take() else { return };
        loop {
            let next = {
                let mut inner = seats.0.lock();
                let next = inner.waiting.pop();
                inner.free += usize::from(next.is_none());
                next
            };
            let Some(next) = next else { return };
            match next.send(Self(Some(seats.clone()))) {
                Ok(()) => return,
                // It has left. What came back is no seat any more: this one still is.
                Err(mut refused) => refused.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::{FutureExt as _, StreamExt as _, poll};

    use super::*;

    #[tokio::test]
    async fn who_asks_often_waits_for_itself() {
        let seats = Seats::new(1);
        let first = seats.sit(Asker::of_host(1)).await;
        let sit = |asker| {
            let seats = seats.clone();
            async move {
                let _seat = seats.sit(Asker::of_host(asker)).await;
                asker
            }
        };
        let mut sitting = futures_util::stream::FuturesUnordered::new();
        for asker in [[1; 100].as_slice(), &[2]].concat() {
            sitting.push(sit(asker));
            assert!(poll!(sitting.next()).is_pending());
        }
        drop(first);
        let order: Vec<u64> = sitting.collect().await;
        assert!(order[..2].contains(&2), "{order:?}");
    }

    /// Askers come, sit, leave and give up in random order: no seat is lost, and none is there twice.
    #[tokio::test]
    async fn no_seat_is_lost_and_none_is_there_twice() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let max = random.usize(1..4);
            let seats = Seats::new(max);
            let (mut waiting, mut sitting) = (Vec::new(), Vec::new());
            for _ in 0..random.usize(1..200) {
                match random.u8(..6) {
                    0..3 => {
                        let (seats, asker) = (seats.clone(), random.u64(..5));
                        // Polled by hand, so tokio's budget is not for it.
                        let sit =
                            tokio::task::unconstrained(async move { (asker, seats.sit(Asker::of_host(asker)).await) });
                        let mut sit = sit.boxed();
                        match poll!(&mut sit) {
                            Poll::Ready((_, seat)) => sitting.push(seat),
                            Poll::Pending => waiting.push((asker, sit)),
                        }
                    }
                    // Perhaps it was given a seat that it does not know of.
                    3 if !waiting.is_empty() => drop(waiting.swap_remove(random.usize(..waiting.len()))),
                    4 if !sitting.is_empty() => drop(sitting.swap_remove(random.usize(..sitting.len()))),
                    _ => {
                        let mut still = Vec::new();
                        for (asker, mut sit) in waiting {
                            match poll!(&mut sit) {
                                Poll::Ready((_, seat)) => sitting.push(seat),
                                Poll::Pending => still.push((asker, sit)),
                            }
                        }
                        waiting = still;
                        assert!(sitting.len() == max || waiting.is_empty(), "a seat is free while somebody waits");
                    }
                }
                assert!(sitting.len() <= max);
            }
            drop(sitting);
            while !waiting.is_empty() {
                let mut still = Vec::new();
                let before = waiting.len();
                for (asker, mut sit) in waiting {
                    if poll!(&mut sit).is_pending() {
                        still.push((asker, sit));
                    }
                }
                assert!(still.len() < before, "nobody sits, and {before} wait");
                waiting = still;
            }
            let free = seats.0.lock().free;
            assert_eq!((free, seats.waiting()), (max, 0));
        }
    }
}
