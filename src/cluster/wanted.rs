//! How many pods should exist, as the StatefulSet says (membership rules 6, 15, 20).
//!
//! ```text
//! WantedSource   asks whoever knows: `kubernetes` implements it, with the StatefulSet's API object
//! watch          polls it, with jitter, and counts how often in a row the answer was the same
//! Reading        the newest answer; the plan, the formation and the shutdown read it
//! ```
//! Invariant: what cannot be known is [`Wanted::Unknown`] and never a number that was known once: nothing is removed because
//! an API was silent.
//! Absent: the size that people set by hand (`member scale`), which is replicated in `kv`; a source goes before it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::env::net::BoxFuture;
use crate::env::{self, Env};

/// What a source says of the pods that should exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    Slots {
        /// `[ordinals.start, ordinals.start + spec.replicas)`; never empty.
        slots: Range<u64>,
        /// The slots of pods that exist now (`status.replicas`): an empty node asks these too before it forms a cluster.
        present: Range<u64>,
        /// A pod is made only when the one before it is ready (`OrderedReady`).
        one_by_one: bool,
    },
    /// `spec.replicas` is 0, or the object has a deletion timestamp: a shutdown or an uninstall, which changes no membership.
    Shutdown,
    /// Why nobody can say, as one sentence without its full stop: `the Kubernetes API answers 403: ...`.
    Unknown(String),
}

/// Something that people should see where they look for it, such as a Kubernetes Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Stable and in kebab-case, as in `status`: `quorum`, `two-holders`, `member-added`.
    pub name: String,
    pub sentence: String,
    /// Something waits or is wrong; else it is news.
    pub warning: bool,
}

/// Who knows the wanted size.
pub trait WantedSource: Send + Sync + 'static {
    /// Where the answer comes from, for people: `StatefulSet quorate/kv`.
    fn name(&self) -> String;

    /// Asks now. Bounded in time by the source itself; a failure is [`Wanted::Unknown`].
    fn get(&self) -> BoxFuture<Wanted>;

    /// Between two questions; jittered by half.
    fn interval(&self) -> Duration {
        Duration::from_secs(3)
    }

    /// Whether this was answered once, and is refused now: the account, its rights or the object itself are gone, as when all is uninstalled.
    fn is_withdrawn(&self) -> bool {
        false
    }

    /// Makes a notice visible. The leader calls it, once a state; failures are the source's own to log.
    fn tell(&self, notice: Notice) -> BoxFuture<()> {
        drop(notice);
        Box::pin(async {})
    }
}

/// The newest answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    pub wanted: Wanted,
    /// How often in a row the same was answered, this time included; 0 before the first answer.
    pub observations: u32,
}

impl Default for Reading {
    fn default() -> Self {
        Self { wanted: Wanted::Unknown("it was not asked yet".into()), observations: 0 }
    }
}

impl Reading {
    fn next(&self, wanted: Wanted) -> Self {
        let observations = if self.wanted == wanted { self.observations.saturating_add(1) } else { 1 };
        Self { wanted, observations }
    }
}

/// A source that is polled; cloning shares it.
#[derive(Clone)]
pub struct Watch {
    source: Arc<dyn WantedSource>,
    readings: watch::Sender<Reading>,
    ask_now: Arc<tokio::sync::Notify>,
}

impl Watch {
    /// Polls `source` until shutdown.
    pub fn start(env: &Env, source: Arc<dyn WantedSource>) -> Self {
        let this = Self { source, readings: watch::Sender::new(Reading::default()), ask_now: Arc::default() };
        let (task, poll_env) = (this.clone(), env.clone());
        env.spawn(async move { task.run(&poll_env).await });
        this
    }

    async fn run(&self, env: &Env) {
        loop {
            let wanted = tokio::select! {
                wanted = self.source.get() => wanted,
                () = env.shutdown.cancelled() => return,
            };
            self.note(wanted);
            tokio::select! {
                () = env::sleep(env.jitter(self.source.interval())) => {}
                () = self.ask_now.notified() => {}
                () = env.shutdown.cancelled() => return,
            }
        }
    }

    fn note(&self, wanted: Wanted) {
        let next = self.readings.borrow().next(wanted);
        // That it is not known is a condition.
        if next.observations == 1 && !matches!(next.wanted, Wanted::Unknown(_)) {
            tracing::info!(wanted = ?next.wanted, source = self.source.name(), "wanted size");
        }
        self.readings.send_replace(next);
    }

    pub fn source(&self) -> &Arc<dyn WantedSource> {
        &self.source
    }

    pub fn reading(&self) -> Reading {
        self.readings.borrow().clone()
    }

    /// Has the source asked at once: somebody knows that the answer has changed.
    pub fn hurry(&self) {
        self.ask_now.notify_one();
    }

    /// Asks now, waits for the answer, and notes it.
    pub async fn fresh(&self, patience: Duration) -> Wanted {
        match env::timeout(patience, self.source.get()).await {
            Ok(wanted) => {
                self.note(wanted.clone());
                wanted
            }
            Err(_) => Wanted::Unknown(format!("no answer within {patience:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    struct Told(Mutex<Vec<Wanted>>);

    impl WantedSource for Told {
        fn name(&self) -> String {
            "a list".into()
        }

        fn get(&self) -> BoxFuture<Wanted> {
            let mut list = self.0.lock();
            let next = if list.len() > 1 { list.remove(0) } else { list[0].clone() };
            Box::pin(async move { next })
        }
    }

    fn slots(end: u64) -> Wanted {
        Wanted::Slots { slots: 0..end, present: 0..end, one_by_one: false }
    }

    #[tokio::test(start_paused = true)]
    async fn equal_answers_in_a_row_are_counted() {
        let env = Env::real();
        let answers = vec![slots(3), slots(3), Wanted::Unknown("403".into()), slots(3), slots(1)];
        let watch = Watch::start(&env, Arc::new(Told(Mutex::new(answers))));
        let mut readings = watch.readings.subscribe();
        let mut counts = Vec::new();
        for _ in 0..6 {
            readings.changed().await.unwrap();
            let reading = readings.borrow_and_update().clone();
            counts.push((matches!(reading.wanted, Wanted::Unknown(_)), reading.observations));
        }
        assert_eq!(counts, [(false, 1), (false, 2), (true, 1), (false, 1), (false, 1), (false, 2)]);
        env.stop(Duration::from_secs(1)).await;
    }
}
