//! The seams to the world: disk, clock, randomness, tasks and threads, connections.
//!
//! Real in production; with the feature `testing` a seeded simulation stands in (`sim`). Nothing outside this module calls
//! `std::fs`, `Instant::now`, a random source or `tokio::spawn`; `tests/it/tidy.rs` checks it. Time is tokio's clock, which
//! a simulation pauses and advances.

pub mod disk;
pub mod fail;
#[cfg(any(test, feature = "testing"))]
pub mod faulty;
pub mod net;
pub mod planted;
pub mod process;
#[cfg(any(test, feature = "testing"))]
pub mod sim;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use disk::{Disk, File, OpenMode};
pub use fail::fail_point;
pub use net::Net;
pub(crate) use planted::planted;
/// tokio's clock: real, or a simulation's.
pub use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at};

/// The time of day, for people and for Kubernetes: it may jump, so nothing is decided by it.
pub fn wall_clock() -> std::time::SystemTime {
    std::time::SystemTime::now()
}

/// Ticks at once and then every `period`; a tick that comes late delays those after it instead of bunching them.
pub fn interval(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

/// Pieces in which a large file is given back, and the rest after each.
const GIVEN_BACK_BYTES: u64 = 16 << 20;
const GIVEN_BACK_REST: Duration = Duration::from_millis(10);

async fn give_back(file: &dyn File) -> std::io::Result<()> {
    if file.links()? > 0 {
        return Ok(());
    }
    let mut len = file.len()?;
    while len > GIVEN_BACK_BYTES {
        len = (len - 1) / GIVEN_BACK_BYTES * GIVEN_BACK_BYTES;
        file.set_len(len)?;
        sleep(GIVEN_BACK_REST).await;
    }
    Ok(())
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
    /// The node is asked to stop: it finishes what is under way, and then shuts down. Cancelled by `shutdown` too.
    pub stopping: CancellationToken,
    /// A part of the node has failed for good, such as a task that panicked: the node stops.
    pub failed: CancellationToken,
    simulated: bool,
    /// Stops the node's tasks for a while.
    #[cfg(any(test, feature = "testing"))]
    pub gate: sim::Gate,
}

impl Env {
    /// The machine that the process runs on.
    pub fn real() -> Self {
        #[cfg(any(test, feature = "testing"))]
        let disk = faulty::disk();
        #[cfg(not(any(test, feature = "testing")))]
        let disk = Arc::new(disk::RealDisk);
        Self::new(disk, Arc::new(net::Tcp), fastrand::Rng::new(), false)
    }

    fn new(disk: Arc<dyn Disk>, net: Arc<dyn Net>, rng: fastrand::Rng, simulated: bool) -> Self {
        let shutdown = CancellationToken::new();
        Self {
            disk,
            net,
            rng: Arc::new(Mutex::new(rng)),
            tracker: TaskTracker::new(),
            stopping: shutdown.child_token(),
            shutdown,
            failed: CancellationToken::new(),
            simulated,
            #[cfg(any(test, feature = "testing"))]
            gate: sim::Gate::default(),
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

    /// Runs a task that ends by itself or on [`Env::shutdown`]; [`Env::stop`] waits for it. If it panics the node stops: a
    /// half-alive node is worse than a restart.
    pub fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        #[cfg(any(test, feature = "testing"))]
        let task = self.gate.clone().hold(task);
        self.tracker.spawn(guarded(task, self.failed.clone()))
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
        let task = guarded(task, self.failed.clone());
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                handle.block_on(task);
                drop(token);
            })
            .expect("a thread can be started");
    }

    /// Runs blocking work away from the event loop and waits for it. All of it is bulk (snapshots, hashes, old entries of the log), so its
    /// threads give way to those that serve requests.
    pub async fn blocking<T, F>(&self, work: F) -> T
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if self.simulated {
            return work();
        }
        let work = move || {
            process::give_way();
            work()
        };
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

    /// Frees the space of a removed file that nobody else has open, on a thread of its own, in pieces with rests: what is freed at once a
    /// file system frees in one transaction, and every sync waits for that (ext4, 512 MiB: 50 ms; in pieces: 5 to 13). A file that has
    /// another name keeps its bytes. At shutdown the rest goes at once.
    pub fn give_back(&self, file: Box<dyn File>) {
        if file.len().is_ok_and(|len| len <= GIVEN_BACK_BYTES) {
            return;
        }
        let shutdown = self.shutdown.clone();
        self.spawn_thread("give-back", async move {
            tokio::select! {
                given = give_back(&*file) => if let Err(error) = given {
                    tracing::debug!(%error, "a removed file is freed at once");
                },
                () = shutdown.cancelled() => {}
            }
        });
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

/// Runs `task`; if it panics, says so through `failed`.
async fn guarded<F: Future>(task: F, failed: CancellationToken) -> F::Output {
    struct Guard(CancellationToken);
    impl Drop for Guard {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.cancel();
            }
        }
    }
    let _guard = Guard(failed);
    task.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn task_that_panics_fails_the_node() {
        let env = Env::real();
        env.spawn(async {});
        env.child().spawn_thread("fine", async {});
        env.stop(Duration::from_secs(5)).await;
        assert!(!env.failed.is_cancelled(), "tasks that end are no failure");

        env.child().spawn(async { panic!("a task that fails, on purpose") });
        timeout(Duration::from_secs(5), env.failed.cancelled()).await.expect("the node knows");
        let env = Env::real();
        env.spawn_thread("fails", async { panic!("a thread that fails, on purpose") });
        timeout(Duration::from_secs(5), env.failed.cancelled()).await.expect("the node knows");
    }

    #[tokio::test]
    async fn shutdown_is_a_stop_too() {
        let env = Env::real();
        let child = env.child();
        child.shutdown.cancel();
        assert!(!env.stopping.is_cancelled() && !child.stopping.is_cancelled(), "a member's end is not the node's");
        env.shutdown.cancel();
        assert!(child.stopping.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn removed_file_is_given_back_in_pieces_unless_it_has_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("file"), dir.path().join("other"));
        let file = std::fs::File::create_new(&path).unwrap();
        let bytes = 2 * GIVEN_BACK_BYTES + 1;
        file.set_len(bytes).unwrap();
        std::fs::hard_link(&path, &other).unwrap();
        std::fs::remove_file(&path).unwrap();
        give_back(&file).await.unwrap();
        assert_eq!(File::len(&file).unwrap(), bytes);
        std::fs::remove_file(&other).unwrap();
        let begin = Instant::now();
        give_back(&file).await.unwrap();
        assert_eq!((File::len(&file).unwrap(), begin.elapsed()), (GIVEN_BACK_BYTES, 2 * GIVEN_BACK_REST));
    }
}
