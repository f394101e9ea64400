//! Pieces of large answers are made one at a time, and between two of them the event loop goes once around all that is ready.
//!
//! So each step of a small request waits for one piece at most, however many clients take large answers. Where a round without a piece
//! takes long, because there is much else to do or other threads and processes have the cores, a multiple of the time of both passes before
//! the next turn: what there is of the cores goes to small requests first. Who takes a large answer while nothing else happens does not
//! notice.
//! Invariants: hosts have turns one after the other, and so have the connections of a host, each connection's answers in the order in which
//! they asked, so that who takes hundreds of large answers waits for itself (`env::rota`); a turn that is not taken (the client stopped
//! reading, or left) costs the others one round, and nothing waits for it. Absent: work that does not run on the event loop
//! (`env::threads`).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::env::rota::Rota;
use crate::env::{Asker, Env, Instant, sleep};

/// A round without a piece takes less than this while little happens: some hundredths of a millisecond.
const SHORT_ROUND: Duration = Duration::from_micros(500);
/// After a longer one, so many times what it and the piece took passes before the next turn, ...
const REST: u32 = 3;
/// ... but no more than this: a member that was stopped for a while has not been busy.
const REST_MAX: Duration = Duration::from_millis(50);

/// Those who wait for a turn. Cloning shares them.
#[derive(Clone)]
pub struct Turns(Arc<Queue>);

struct Queue {
    env: Env,
    /// `None`: nobody waits, and no task gives turns.
    waiting: Mutex<Option<Rota<oneshot::Sender<()>>>>,
}

impl Turns {
    pub fn new(env: &Env) -> Self {
        Self(Arc::new(Queue { env: env.clone(), waiting: Mutex::default() }))
    }

    /// Resolves when it is the turn of this client: to be used at once, for what takes as long as writing a piece does.
    pub(super) async fn next(&self, asker: Asker) {
        let (give, given) = oneshot::channel();
        let is_first = {
            let mut waiting = self.0.waiting.lock();
            let is_first = waiting.is_none();
            waiting.get_or_insert_default().push(asker, give);
            is_first
        };
        if is_first {
            self.0.env.spawn(self.clone().give());
        }
        // The one who gives has ended with the member: nothing needs to be spared any more.
        let _ = given.await;
    }

    async fn give(self) {
        loop {
            let next = {
                let mut waiting = self.0.waiting.lock();
                let next = waiting.as_mut().and_then(Rota::pop);
                if next.is_none() {
                    *waiting = None;
                }
                next
            };
            let Some(next) = next else { return };
            if !next.is_closed() {
                // Who has left since then needs none.
                let _ = next.send(());
                let begin = Instant::now();
                // Comes back when all that was ready has run, and what that made ready: the piece is made and on its way.
                tokio::task::yield_now().await;
                let others = Instant::now();
                // This round is the others'.
                tokio::task::yield_now().await;
                if others.elapsed() >= SHORT_ROUND {
                    sleep((begin.elapsed() * REST).min(REST_MAX)).await;
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
