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
pub mod rolling;
pub mod rota;
pub mod seats;
#[cfg(any(test, feature = "testing"))]
pub mod sim;
pub mod srv;
pub mod stderr;
pub mod threads;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use ring::rand::SecureRandom as _;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use disk::{Disk, File, OpenMode};
pub use fail::fail_point;
pub use net::Net;
pub(crate) use planted::planted;
pub use rota::Asker;
pub use threads::Pool;
/// tokio's clock: real, or a simulation's.
pub use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at};

/// A time of day.
pub use std::time::SystemTime as WallTime;

/// The time of day, for people and for Kubernetes: it may jump, so nothing is decided by it but when a token ends, and that generously.
pub fn wall_clock() -> WallTime {
    WallTime::now()
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
    pools: Arc<threads::Pools>,
    in_place: Arc<seats::Seats>,
    /// Ends every task of the node.
    pub shutdown: CancellationToken,
    /// The node is asked to stop: it finishes what is under way, and then shuts down. Cancelled by `shutdown` too.
    pub stopping: CancellationToken,
    /// A part of the node has failed for good, such as a task that panicked: the node stops.
    pub failed: CancellationToken,
    /// The node is asked to read its files of certificates now.
    pub reread: watch::Sender<()>,
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
        let pools = Arc::new(threads::Pools::new());
        let net = Arc::new(net::Tcp::new(pools.clone()));
        Self::new(disk, net, fastrand::Rng::new(), pools, false)
    }

    fn new(
        disk: Arc<dyn Disk>,
        net: Arc<dyn Net>,
        rng: fastrand::Rng,
        pools: Arc<threads::Pools>,
        simulated: bool,
    ) -> Self {
        let shutdown = CancellationToken::new();
        Self {
            disk,
            net,
            rng: Arc::new(Mutex::new(rng)),
            tracker: TaskTracker::new(),
            pools,
            in_place: seats::Seats::new(threads::IN_PLACE_MAX),
            stopping: shutdown.child_token(),
            shutdown,
            failed: CancellationToken::new(),
            reread: watch::Sender::new(()),
            simulated,
            #[cfg(any(test, feature = "testing"))]
            gate: sim::Gate::default(),
        }
    }

    /// An environment whose tasks can be ended without ending this one's; ending this one's ends them too.
    pub fn child(&self) -> Self {
        Self { tracker: TaskTracker::new(), shutdown: self.shutdown.child_token(), ..self.clone() }
    }

    /// Whether time and threads are a simulation's, so that to measure them means nothing.
    pub fn is_simulated(&self) -> bool {
        self.simulated
    }

    /// A uniformly random number.
    pub fn random_u64(&self) -> u64 {
        self.rng.lock().u64(..)
    }

    /// Random bytes that nobody can foresee: for keys and salts. A simulation has them from its seed, whose other numbers stay as they
    /// are.
    pub fn secret(&self) -> [u8; 32] {
        let mut secret = [0; 32];
        if self.simulated {
            self.rng.lock().clone().fill(&mut secret);
        } else {
            ring::rand::SystemRandom::new().fill(&mut secret).expect("the system gives random bytes");
        }
        secret
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
        self.spawn_thread_with(name, 0, task);
    }

    /// As [`Self::spawn_thread`], for what nobody waits for: it gets a third of what others get where there is not enough for all.
    pub fn spawn_nicer_thread<F>(&self, name: &str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_thread_with(name, threads::NICER, task);
    }

    fn spawn_thread_with<F>(&self, name: &str, nicer: i32, task: F)
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
        let work = move || {
            if nicer > 0 {
                process::give_way(nicer);
            }
            handle.block_on(task);
            drop(token);
        };
        threads::start(name, work).expect("a thread can be started");
    }

    /// Runs work of the member itself that blocks or takes long away from the event loop, and waits for it.
    pub async fn long<T, F>(&self, pool: Pool, work: F) -> T
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if self.simulated {
            return work();
        }
        let (tell, told) = oneshot::channel();
        let job = self.job(move || drop(tell.send(std::panic::catch_unwind(AssertUnwindSafe(work)))));
        assert_eq!(self.pools.submit(pool, Asker::MEMBER, job), Ok(()), "the member's own work is not refused");
        finished(told).await
    }

    /// As [`Self::long`], for a client: `asker` has turns with other ones, and does not wait for its turn beyond `deadline`. Work whose
    /// client has gone meanwhile is not begun.
    pub async fn long_for<T, F>(&self, pool: Pool, asker: Asker, deadline: Instant, work: F) -> Result<T, Refused>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if self.simulated {
            return Ok(work());
        }
        let ((begin, begun), (tell, told)) = (oneshot::channel(), oneshot::channel());
        let job = self.job(move || {
            if begin.send(()).is_ok() {
                drop(tell.send(std::panic::catch_unwind(AssertUnwindSafe(work))));
            }
        });
        self.pools.submit(pool, asker, job).map_err(|threads::Full| Refused::Full)?;
        if timeout_at(deadline, begun).await.is_err() {
            return Err(Refused::Late);
        }
        Ok(finished(told).await)
    }

    /// Does work of the member itself that takes long and cannot leave its task: the tasks that share the thread go on elsewhere
    /// meanwhile. At once: few of the member's tasks have such work, and each of them one at a time.
    pub fn in_place<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.simulated { work() } else { threads::in_place(work) }
    }

    /// As [`Self::in_place`], for a client: a few do so at a time, the others wait until `asker` has its turn. Dropped before, nothing is
    /// done.
    pub async fn in_place_for<T>(&self, asker: Asker, work: impl FnOnce() -> T) -> T {
        if self.simulated {
            return work();
        }
        let _seat = self.in_place.sit(asker).await;
        threads::in_place(work)
    }

    /// Clients that wait for their turn.
    #[cfg(test)]
    pub fn in_place_waiting(&self) -> usize {
        self.in_place.waiting()
    }

    /// Lets go of something large, where nobody waits for it.
    pub fn drop_large<T: Send + 'static>(&self, large: T) {
        if self.simulated {
            return;
        }
        let job = self.job(move || drop(large));
        assert_eq!(self.pools.submit(Pool::Drops, Asker::MEMBER, job), Ok(()), "the member's own work is not refused");
    }

    /// One that [`Env::stop`] waits for.
    fn job(&self, work: impl FnOnce() + Send + 'static) -> Box<dyn FnOnce() + Send> {
        let token = self.tracker.token();
        Box::new(move || {
            work();
            drop(token);
        })
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

/// Why a client's long work was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too much waits already, of this client or of all.
    Full,
    /// Its turn did not come in time.
    Late,
}

/// What a pool's work came to; a panic goes on in who asked for it.
async fn finished<T>(told: oneshot::Receiver<std::thread::Result<T>>) -> T {
    match told.await.expect("a pool does what it took") {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
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

    const CLIENT: Asker = Asker { host: 1, connection: 1 };

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
    async fn long_work_of_a_client_waits_until_its_deadline_and_is_not_begun_for_nobody() {
        let env = Env::real();
        assert_eq!(env.long(Pool::Reads, || 1).await, 1);
        let soon = || Instant::now() + Duration::from_millis(20);
        let (release, released) = std::sync::mpsc::sync_channel::<()>(0);
        let (tell, holding) = oneshot::channel();
        let holds = env.clone();
        let hold = move || {
            tell.send(()).expect("the test waits for it");
            released.recv()
        };
        let held = env.spawn(async move { holds.long(Pool::Apply, hold).await });
        holding.await.expect("a thread is held");
        let begun = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let begin = begun.clone();
        let late = env
            .long_for(Pool::Apply, CLIENT, soon(), move || begin.store(true, std::sync::atomic::Ordering::Relaxed))
            .await;
        assert_eq!(late, Err(Refused::Late));
        drop(release);
        assert!(held.await.expect("it was let go").is_err());
        // In order: what was given up came before.
        assert_eq!(env.long_for(Pool::Apply, CLIENT, Instant::now() + Duration::from_secs(60), || 2).await, Ok(2));
        assert!(!begun.load(std::sync::atomic::Ordering::Relaxed), "nobody waits for it");
        env.stop(Duration::from_secs(60)).await;
    }

    #[tokio::test]
    #[should_panic(expected = "on purpose")]
    async fn panic_of_long_work_goes_on_in_who_waits_for_it() {
        Env::real().long(Pool::Disk, || panic!("it fails, on purpose")).await
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
