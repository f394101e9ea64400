//! Who holds leases: grants one with a key, keeps it alive for a while through any member, and then revokes
//! it or looks until it is gone.
//!
//! Each lease has a key of its own, so that its end is a deletion of that key and of nothing else: to the history it is a
//! delete of unknown outcome, called when the lease was granted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::clients::{Clients, is_refusal};
use crate::env::sim::trace;
use crate::env::{Env, Instant, sleep};
use crate::testing::history::{Action, Outcome, Recorder, Request, Span};
use crate::testing::lease::{Step, Story};

/// Looked at so often when its end is near.
const LOOK: Duration = Duration::from_millis(100);

/// What became of each lease. Cloning shares it.
#[derive(Clone, Default)]
pub struct Stories(Arc<Mutex<BTreeMap<i64, Story>>>);

impl Stories {
    pub fn all(&self) -> BTreeMap<i64, Story> {
        self.0.lock().clone()
    }

    fn add(&self, lease: i64, step: Step) {
        trace::event(format_args!("lease {lease} {step:?}"));
        self.0.lock().entry(lease).or_default().steps.push(step);
    }
}

pub struct Lessee {
    pub name: u64,
    pub env: Env,
    pub clients: Clients,
    pub recorder: Recorder,
    pub members: watch::Receiver<usize>,
    pub stories: Stories,
    pub begun: Instant,
}

impl Lessee {
    pub async fn run(self, stop: CancellationToken) {
        for n in 0.. {
            sleep(self.env.jitter(Duration::from_millis(200))).await;
            if stop.is_cancelled() {
                return;
            }
            self.hold(self.name as i64 * 100_000 + n, n, &stop).await;
        }
    }

    fn member(&self) -> usize {
        (self.env.random_u64() % *self.members.borrow() as u64) as usize
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// One lease, from its grant to its end.
    async fn hold(&self, id: i64, n: i64, stop: &CancellationToken) {
        let key = format!("l{}.{n}", self.name);
        let called = self.now();
        let Ok(ttl) = self.clients.grant(self.member(), id, 2 + (self.env.random_u64() % 3) as i64).await else {
            return;
        };
        let ttl = Duration::from_secs(ttl as u64);
        self.stories.add(id, Step::Renewed { called, ttl });
        // Its end, whenever that is.
        self.recorder.call(self.name, 0, Request::Do(Action::Delete(Span::one(&key))));
        self.put(id, &key).await;
        for _ in 0..self.env.random_u64() % 6 {
            sleep(self.env.jitter(ttl / 3)).await;
            let called = self.now();
            match self.clients.keep_alive(self.member(), id).await {
                Ok(0) => return self.stories.add(id, Step::Gone { seen: self.now() }),
                Ok(ttl) => self.stories.add(id, Step::Renewed { called, ttl: Duration::from_secs(ttl as u64) }),
                Err(_) => {}
            }
        }
        if self.env.random_u64().is_multiple_of(4) {
            self.stories.add(id, Step::Revoked { called: self.now() });
            let _ = self.clients.revoke(self.member(), id).await;
        }
        while !stop.is_cancelled() {
            sleep(self.env.jitter(LOOK)).await;
            if let Ok(-1) = self.clients.time_to_live(self.member(), id).await {
                return self.stories.add(id, Step::Gone { seen: self.now() });
            }
        }
    }

    async fn put(&self, id: i64, key: &str) {
        let member = self.member();
        let put = Action::Put { key: key.into(), value: format!("of {id}") };
        let ticket = self.recorder.call(self.name, member, Request::Do(put));
        let outcome = match self.clients.put_leased(member, key, &format!("of {id}"), id).await {
            Ok(answer) => Outcome::Answered(answer),
            Err(status) if is_refusal(&status) => Outcome::Refused(status.message().to_owned()),
            Err(_) => Outcome::Unknown,
        };
        self.recorder.end(ticket, outcome);
    }
}
