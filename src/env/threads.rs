//! Which thread does what: the one table of it, and the one place that starts threads.
//!
//! | thread | how many | what it does | if there is more to do |
//! |---|---|---|---|
//! | `quorate`, the event loop | `server.worker_threads`; 0: one for every two cores | Raft, peers' calls, connections, short requests, watchers: everything that takes less than some milliseconds | tasks take turns |
//! | `apply` | 1, when needed | entries that are known to take long to apply | entries wait for one another anyway |
//! | `sled-io` | seven and more, of the state store's library | copy what is written to the state store; they give way to all others: seven at a time, each with megabytes, would leave the event loop little | the checkpoint waits |
//! | `log-flush`, `log-segments`, `checkpoint` | one each | writes and syncs of the log, its segments, the state store | their owners' bounded queues |
//! | `give-back` | one for a removed file | frees it in pieces | |
//! | `disk` | [`Pool::Disk`] | old entries of the log, all of it at the start, the identity | waits |
//! | `snapshots` | [`Pool::Snapshots`] | snapshot files: written, sent, received, loaded | waits |
//! | `reads` | [`Pool::Reads`] | clients' reads that visit much, and JSON | waits in the queue, then is refused |
//! | `backups` | [`Pool::Backups`] | backups, a piece at a time, and hashes | waits in the queue, then is refused |
//! | `passwords` | [`Pool::Passwords`] | hashes of passwords: tens of milliseconds each | waits in the queue, then is refused |
//! | `names` | [`Pool::Names`] | the system's resolver, which may take as long as it likes | waits |
//! | `drops` | [`Pool::Drops`] | lets go of states that nobody reads any more | waits |
//! | `stderr`, `audit` | one each in a server, the second if it is asked for | log lines, and the audit log's (`stderr`) | they are lost, and counted |
//! | tokio's own | few | names that the client of Kubernetes' API server looks up; the event loop, while a task does something long where it is ([`super::Env::in_place`]: the watch hub and the lease clock; [`super::Env::in_place_for`]: clients' watchers of revisions of thousands of events; messages of megabytes) | clients wait, by turns |
//!
//! Each pool has its own threads, so none of these waits for another. A pool starts threads when there is work, and they end when there has
//! been none for a while. What waits is served by turns of those who ask, so that one who asks for much waits for itself, and has places as
//! they say how much one may have of them (`rota`).
//! Invariants: no work holds a thread of a pool while a client is slow: it makes a piece when the client takes it. A client's work is
//! refused when too much waits; the member's own is not, since a few tasks ask for it, and each waits for its own.
//! Absent: what is long (`kv` knows what a request visits), and the simulation, in which all of it is done at once by who asks.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

use super::process;
use super::rota::{Asker, Rota};

/// Where long work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    Apply,
    Disk,
    Snapshots,
    Reads,
    Backups,
    Passwords,
    Names,
    Drops,
}

/// What a pool is like.
struct Kind {
    name: &'static str,
    threads_max: usize,
    /// By how much its threads are nicer than the process: nobody waits for what they do as one waits for a short request.
    nicer: i32,
}

/// A third of what others get where there is not enough for all: followers, backups and logins wait for it.
pub(super) const NICER: i32 = 5;
/// A thirtieth: whoever asks for much waits, and the more ask for it the longer. With a third, a dozen answers of 100,000 keys took most
/// of two cores from three event loops (p99 of puts 90 ms; so 40).
const NICEST: i32 = 15;

/// Work of clients that may wait in one pool.
const WAITING_MAX: usize = 1024;
/// A thread without work ends after this.
const IDLE_MAX: Duration = Duration::from_secs(10);

impl Pool {
    const ALL: [Self; 8] = [
        Self::Apply,
        Self::Disk,
        Self::Snapshots,
        Self::Reads,
        Self::Backups,
        Self::Passwords,
        Self::Names,
        Self::Drops,
    ];

    fn kind(self) -> Kind {
        let kind = |name, threads_max, nicer| Kind { name, threads_max, nicer };
        match self {
            // One: entries are applied in order. All members' clients wait for it.
            Self::Apply => kind("apply", 1, 0),
            Self::Disk => kind("disk", 2, NICER),
            // One writes, one loads; the others send or receive a chunk at a time.
            Self::Snapshots => kind("snapshots", 4, NICER),
            // More than one, for one read may take seconds; few, for they share the cores with everything else.
            Self::Reads => kind("reads", cores().max(2), NICEST),
            Self::Backups => kind("backups", 2, NICER),
            // A storm of clients that authenticate must leave cores to the others.
            Self::Passwords => kind("passwords", cores().div_ceil(2), NICER),
            // A server of names that does not answer holds a thread for its time, 5 s and more.
            Self::Names => kind("names", 8, 0),
            Self::Drops => kind("drops", 1, NICEST),
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// An event loop of so many threads; 0: one for every two cores.
pub fn event_loop(worker_threads: usize) -> io::Result<tokio::runtime::Runtime> {
    let threads = if worker_threads == 0 { cores().div_ceil(2) } else { worker_threads };
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().thread_name("quorate").build()
}

/// Clients' work that is done where it is, at a time ([`super::Env::in_place_for`]).
pub(super) const IN_PLACE_MAX: usize = 2;

/// Does `work` here; the other tasks of an event loop's thread go on on another one, which tokio keeps for that.
pub(super) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// As `in_place`, for who cannot wait for a turn: if too many are at it, it is done as anything else.
pub fn in_place_now<T>(work: impl FnOnce() -> T) -> T {
    static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
    struct Turn;
    impl Drop for Turn {
        fn drop(&mut self) {
            UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let others = UNDER_WAY.fetch_add(1, Ordering::Relaxed);
    let _turn = Turn;
    if others < IN_PLACE_MAX { in_place(work) } else { work() }
}

/// Starts a thread.
pub(super) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Does `work` on a thread that gives way to all others of the member, and waits for it. The threads that it starts do so, too.
pub fn giving_way<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let done = scope.spawn(|| {
            process::give_way(NICEST);
            work()
        });
        done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

type Job = Box<dyn FnOnce() + Send>;

/// A pool has no place left for more work of this client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Every pool.
pub(super) struct Pools([Arc<Workers>; Pool::ALL.len()]);

impl Pools {
    pub(super) fn new() -> Self {
        Self(
            Pool::ALL
                .map(|pool| Arc::new(Workers { kind: pool.kind(), queue: Mutex::default(), wake: Condvar::new() })),
        )
    }

    /// Has `job` run; it must not panic. `asker`: whose turn it is in; the member itself is never refused.
    pub(super) fn submit(&self, pool: Pool, asker: Asker, job: Job) -> Result<(), Full> {
        self.0[pool as usize].submit(asker, job)
    }
}

/// The locks are the standard library's: those of parking_lot hand a lock over to who waits longest, and where that is a thread that gives way
/// to others on a busy machine, the event loop waits until it has its turn (pieces of answers in JSON: 100 ms).
struct Workers {
    kind: Kind,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: Rota<Job>,
    threads: usize,
    idle: usize,
}

impl Queue {
    fn push(&mut self, asker: Asker, job: Job) -> Result<(), Full> {
        if !asker.is_member() && !self.waiting.share(asker).has_room(WAITING_MAX) {
            return Err(Full);
        }
        self.waiting.push(asker, job);
        Ok(())
    }
}

impl Workers {
    /// No job runs under it, so no panic leaves it half changed.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(self: &Arc<Self>, asker: Asker, job: Job) -> Result<(), Full> {
        let mut queue = self.queue();
        queue.push(asker, job)?;
        if queue.waiting.len() <= queue.idle {
            // Who is woken wants the lock.
            drop(queue);
            self.wake.notify_one();
        } else if queue.threads < self.kind.threads_max {
            let workers = self.clone();
            match start(self.kind.name, move || workers.run()) {
                Ok(()) => queue.threads += 1,
                // Those that there are do it, later.
                Err(error) => assert!(queue.threads > 0, "a thread cannot be started: {error}"),
            }
        }
        Ok(())
    }

    fn run(&self) {
        if self.kind.nicer > 0 {
            process::give_way(self.kind.nicer);
        }
        let mut queue = self.queue();
        loop {
            if let Some(job) = queue.waiting.pop() {
                drop(queue);
                job();
                queue = self.queue();
                continue;
            }
            queue.idle += 1;
            let waited = self.wake.wait_timeout(queue, IDLE_MAX).unwrap_or_else(PoisonError::into_inner);
            queue = waited.0;
            queue.idle -= 1;
            if waited.1.timed_out() && queue.waiting.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, sync_channel};

    use super::*;

    /// Holds a thread of `pool` until the sender is dropped.
    fn hold(pools: &Pools, pool: Pool) -> std::sync::mpsc::SyncSender<()> {
        let ((release, released), (begin, begun)) = (sync_channel::<()>(0), sync_channel(1));
        let job = move || {
            begin.send(()).unwrap();
            let _ = released.recv();
        };
        pools.submit(pool, Asker::MEMBER, Box::new(job)).unwrap();
        begun.recv().unwrap();
        release
    }

    #[test]
    fn a_pool_has_so_many_threads_and_holds_up_no_other() {
        let pools = Pools::new();
        let held: Vec<_> = (0..Pool::Backups.kind().threads_max).map(|_| hold(&pools, Pool::Backups)).collect();
        let (done, is_done) = sync_channel(2);
        let other = done.clone();
        pools.submit(Pool::Backups, Asker::MEMBER, Box::new(move || done.send("backups").unwrap())).unwrap();
        pools.submit(Pool::Reads, Asker::MEMBER, Box::new(move || other.send("reads").unwrap())).unwrap();
        assert_eq!(is_done.recv(), Ok("reads"), "the other waits for a thread");
        assert_eq!(pools.0[Pool::Backups as usize].queue().waiting.len(), 1);
        drop(held);
        assert_eq!(is_done.recv(), Ok("backups"));
    }

    #[test]
    fn hosts_take_turns_and_who_asks_for_much_is_refused_first() {
        let pools = Pools::new();
        let held = hold(&pools, Pool::Apply);
        let (done, order) = sync_channel(2 * WAITING_MAX);
        let ask = |host: u64, connection: u64| {
            let done = done.clone();
            let asker = Asker { host, connection };
            pools.submit(Pool::Apply, asker, Box::new(move || done.send(host).unwrap()))
        };
        // One read for each connection, and each time that one is refused another connection tries.
        let greedy = (0..2 * WAITING_MAX as u64).filter(|connection| ask(7, *connection).is_ok()).count();
        assert!(greedy <= WAITING_MAX - WAITING_MAX / 4, "{greedy} places");
        let others = WAITING_MAX - greedy;
        for host in 8..8 + others as u64 {
            assert_eq!(ask(host, 1), Ok(()), "who has none gets any");
        }
        assert_eq!(ask(5, 1), Err(Full));
        let own = pools.submit(Pool::Apply, Asker::MEMBER, Box::new(|| ()));
        assert_eq!(own, Ok(()), "the member itself is not refused");
        drop(held);
        let first: Vec<u64> = order.iter().take(others + 1).filter(|host| *host != 7).collect();
        assert_eq!(first, (8..8 + others as u64).collect::<Vec<_>>(), "each in the first round");
    }

    #[test]
    fn all_work_is_done_however_it_comes() {
        let pools = Pools::new();
        let count = Arc::new(AtomicUsize::new(0));
        let (done, all): (Sender<()>, Receiver<()>) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            for asker in 1..5 {
                let (pools, count, done) = (&pools, &count, done.clone());
                scope.spawn(move || {
                    // No more than their shares, though none is done before all have come.
                    for _ in 0..100 {
                        let (count, done) = (count.clone(), done.clone());
                        let job = move || {
                            count.fetch_add(1, Ordering::Relaxed);
                            drop(done);
                        };
                        pools.submit(Pool::Reads, Asker { host: asker, connection: 1 }, Box::new(job)).unwrap();
                    }
                });
            }
        });
        drop(done);
        assert!(all.recv().is_err(), "every job lets go of its sender");
        assert_eq!(count.load(Ordering::Relaxed), 400);
    }
}
