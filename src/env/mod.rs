//! The seams to the world: disk, clock, randomness, tasks and threads, connections.
//!
//! Real in production; with the feature `testing` a seeded simulation stands in (`sim`). Nothing outside this module calls
//! `std::fs`, `Instant::now`, a random source or `tokio::spawn`; `tests/it/tidy.rs` checks it. Time is tokio's clock, which
//! a simulation pauses and advances.

pub mod disk;
pub mod fail;
pub mod net;
#[cfg(any(test, feature = "testing"))]
pub mod sim;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use disk::{Disk, File, OpenMode};
pub use fail::fail_point;
pub use net::Net;
/// tokio's clock: real, or a simulation's.
pub use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

/// Ticks at once and then every `period`; a tick that comes late delays those after it instead of bunching them.
pub fn interval(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

/// Everything that a node takes from the world around it. Cloning shares it.
#[derive(Clone)]
pub struct Env {
    pub disk: Arc<dyn Disk>,
    pub net: Arc<dyn Net>,
    rng: Arc<Mutex<fastrand::Rng>>,
    tracker: TaskTracker,
    /// Ends every task of the node.
    pub shutdown: CancellationToken,
    simulated: bool,
}

impl Env {
    /// The machine that the process runs on.
    pub fn real() -> Self {
        Self::new(Arc::new(disk::RealDisk), Arc::new(net::Tcp), fastrand::Rng::new(), false)
    }

    fn new(disk: Arc<dyn Disk>, net: Arc<dyn Net>, rng: fastrand::Rng, simulated: bool) -> Self {
        Self {
            disk,
            net,
            rng: Arc::new(Mutex::new(rng)),
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            simulated,
        }
    }

    /// An environment whose tasks can be ended without ending this one's; ending this one's ends them too.
    pub fn child(&self) -> Self {
        Self { tracker: TaskTracker::new(), shutdown: self.shutdown.child_token(), ..self.clone() }
    }

    /// A uniformly random number.
    pub fn random_u64(&self) -> u64 {
        self.rng.lock().u64(..)
    }

    /// `base` changed by up to half of itself in either direction, so that peers do not act in step.
    pub fn jitter(&self, base: Duration) -> Duration {
        base.mul_f64(0.5 + self.rng.lock().f64())
    }

    /// Time since the Unix epoch, for what people read and for compaction by age; never for ordering.
    pub fn wall_clock(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    /// Runs a task that ends by itself or on [`Env::shutdown`]; [`Env::stop`] waits for it.
    pub fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker.spawn(task)
    }

    /// Runs a task that blocks on I/O: on a thread of its own, or, simulated, beside the others.
    pub fn spawn_thread<F>(&self, name: &str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.simulated {
            self.spawn(task);
            return;
        }
        let handle = tokio::runtime::Handle::current();
        let token = self.tracker.token();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                handle.block_on(task);
                drop(token);
            })
            .expect("a thread can be started");
    }

    /// Runs blocking work away from the event loop and waits for it.
    pub async fn blocking<T, F>(&self, work: F) -> T
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if self.simulated {
            return work();
        }
        match self.tracker.spawn_blocking(work).await {
            Ok(done) => done,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }

    /// Blocks this thread, which must not be one that runs tasks; simulated, no time passes.
    pub fn block_for(&self, duration: Duration) {
        if !self.simulated {
            std::thread::sleep(duration);
        }
    }

    /// Ends all tasks and waits for them, at most for `patience`.
    pub async fn stop(&self, patience: Duration) {
        self.shutdown.cancel();
        self.tracker.close();
        if timeout(patience, self.tracker.wait()).await.is_err() {
            tracing::warn!(tasks = self.tracker.len(), "tasks did not end in time");
        }
    }
}
