//! Whose bytes are read next, where more than one host sends much.
//!
//! The event loop does what is ready in the order in which it became ready. So whoever sends a thousand requests at once, over however
//! many connections, would have a thousand turns before the next one of another host. What is not read makes no work, and waits with whom
//! it comes from: so of a host so much is read in a *round* as takes a millisecond or two, and then its connections wait, in their order,
//! until everything has had a turn that was ready when that began to matter. A host that has been alone for a while does not wait.
//! Invariants: in each round every host for which a connection waits is read of; of a host the connections are read in the order in which
//! they began to wait, and those that have gone hold nobody up; while others are about a host passes [`UNITS_MAX`] in no round by more than one
//! read. Absent: what a host may have of memory and places
//! (`node::account`), and turns of longer work (`api::turns`, `env::threads`, `node::lanes`).

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::env::{Env, Instant};

/// What is read of a host in a round: so many requests, or frames of other kinds.
const UNITS_MAX: usize = 32;
/// What is read costs as one request for each of so many bytes.
const UNIT_BYTES: usize = 1024;
/// A look at a connection that has not said yet what it is, since that may be a handshake of TLS: a millisecond.
pub(super) const GREETING_UNITS: usize = 8;
/// A host is alone when no other has been read of for so long.
const ALONE_AFTER: Duration = Duration::from_secs(1);
/// So many hosts are kept in mind.
const HOSTS_MAX: usize = 1024;

/// The rounds of a port. Cloning shares them.
#[derive(Clone)]
pub(super) struct Rounds(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// Somebody waits for the next round, or nobody ever will.
    due: Arc<Notify>,
}

#[derive(Default)]
struct State {
    hosts: HashMap<u64, OfHost>,
    /// How many connections wait.
    waiting: usize,
    /// Which host was read of last, and when it was another one before.
    last: Option<u64>,
    mixed_at: Option<Instant>,
}

#[derive(Default)]
struct OfHost {
    /// What was read in this round.
    units: usize,
    waiting: VecDeque<Arc<Turn>>,
}

/// The turn of a connection that waits.
#[derive(Default)]
struct Turn {
    has_come: AtomicBool,
    task: AtomicWaker,
}

impl Turn {
    fn come(&self) {
        self.has_come.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl State {
    /// Lets the connection that has waited longest of a host have its turn.
    fn call_next(&mut self, host: u64) {
        let Some(of_host) = self.hosts.get_mut(&host) else { return };
        while let Some(turn) = of_host.waiting.pop_front() {
            self.waiting -= 1;
            // Else its connection has gone.
            if Arc::strong_count(&turn) > 1 {
                return turn.come();
            }
        }
    }

    /// Returns whether somebody waits for the round after this.
    fn next_round(&mut self) -> bool {
        self.hosts.retain(|_, host| !host.waiting.is_empty());
        let hosts: Vec<u64> = self.hosts.keys().copied().collect();
        for host in hosts {
            self.hosts.entry(host).or_default().units = 0;
            self.call_next(host);
        }
        self.waiting > 0
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.due.notify_one();
    }
}

impl Rounds {
    pub(super) fn new(env: &Env) -> Self {
        let due = Arc::new(Notify::new());
        let inner = Arc::new(Inner { state: Mutex::default(), due: due.clone() });
        env.spawn(take_turns(Arc::downgrade(&inner), due));
        Self(inner)
    }

    /// One connection of this host, which is a number that nobody else has.
    pub(super) fn reader(&self, host: u64) -> Reader {
        Reader { rounds: self.clone(), host, turn: None, is_called: false }
    }
}

/// Begins round after round while somebody waits for one.
async fn take_turns(inner: Weak<Inner>, due: Arc<Notify>) {
    loop {
        due.notified().await;
        loop {
            others_first().await;
            let Some(inner) = inner.upgrade() else { return };
            if !inner.state.lock().next_round() {
                break;
            }
        }
    }
}

/// Lets everything go first that is ready.
pub(super) async fn others_first() {
    let mut went = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut went, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A connection, as one that waits for its turns.
pub(super) struct Reader {
    rounds: Rounds,
    host: u64,
    turn: Option<Arc<Turn>>,
    /// Its turn has come, and others of its host wait for it to be over.
    is_called: bool,
}

impl Reader {
    /// Ready when it may read; then [`Self::spend`] is to be told what that came to, or [`Self::pass`] that nothing was there.
    pub(super) fn poll_turn(&mut self, cx: &Context<'_>) -> Poll<()> {
        if let Some(turn) = &self.turn {
            turn.task.register(cx.waker());
            if !turn.has_come.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            (self.turn, self.is_called) = (None, true);
            return Poll::Ready(());
        }
        let mut state = self.rounds.0.state.lock();
        let State { hosts, waiting, last, mixed_at } = &mut *state;
        if *last != Some(self.host) {
            let is_first = last.replace(self.host).is_none();
            *mixed_at = (!is_first).then(Instant::now).or(*mixed_at);
        }
        let Some(of_host) = hosts.get_mut(&self.host).filter(|host| host.units >= UNITS_MAX) else {
            return Poll::Ready(());
        };
        if mixed_at.is_none_or(|at| at.elapsed() > ALONE_AFTER) {
            *mixed_at = None;
            return Poll::Ready(());
        }
        let turn = Arc::new(Turn::default());
        turn.task.register(cx.waker());
        of_host.waiting.push_back(turn.clone());
        *waiting += 1;
        let is_first = *waiting == 1;
        drop(state);
        if is_first {
            self.rounds.0.due.notify_one();
        }
        self.turn = Some(turn);
        Poll::Pending
    }

    /// So many frames were read, in so many bytes.
    pub(super) fn spend(&mut self, frames: usize, bytes: usize) {
        self.is_called = false;
        let mut state = self.rounds.0.state.lock();
        if state.hosts.len() >= HOSTS_MAX && state.waiting == 0 {
            state.next_round();
        }
        let of_host = state.hosts.entry(self.host).or_default();
        of_host.units = of_host.units.saturating_add(frames + bytes / UNIT_BYTES);
        if of_host.units < UNITS_MAX && !of_host.waiting.is_empty() {
            state.call_next(self.host);
        }
    }

    /// Nothing was there to be read, and finding that out came to so many units.
    pub(super) fn pass(&mut self, units: usize) {
        if self.is_called || units > 0 {
            self.spend(units, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::{sleep, timeout};
    use crate::raft::tests::sim;

    /// Reads as much as there is, one unit at a time; notes whose it was.
    async fn read(mut reader: Reader, times: usize, seen: Arc<Mutex<Vec<u64>>>) {
        for n in 0..times {
            poll_fn(|cx| reader.poll_turn(cx)).await;
            reader.spend(1, 0);
            seen.lock().push(reader.host);
            if n % 3 == 0 {
                poll_fn(|cx| reader.poll_turn(cx)).await;
                reader.pass(0);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_sends_much_over_many_connections_is_read_as_one_that_sends_little() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20 {
            let (rounds, seen) = (Rounds::new(&sim()), Arc::new(Mutex::new(Vec::new())));
            // Both have been there.
            for host in [1, 2] {
                let _ = poll_fn(|cx| Poll::Ready(rounds.reader(host).poll_turn(cx))).await;
            }
            let greedy = random.usize(1..100);
            let (few, each) = (random.usize(1..50), random.usize(1..100));
            let mut tasks = Vec::new();
            for _ in 0..greedy {
                tasks.push(tokio::spawn(read(rounds.reader(1), each, seen.clone())));
            }
            tasks.push(tokio::spawn(read(rounds.reader(2), few, seen.clone())));
            for task in tasks {
                timeout(Duration::from_secs(60), task).await.expect("all that is sent is read").unwrap();
            }
            let seen = seen.lock();
            let done = seen.iter().rposition(|host| *host == 2).unwrap();
            let before = seen[..done].iter().filter(|host| **host == 1).count();
            let rounds_needed = few.div_ceil(UNITS_MAX) + 1;
            assert!(before <= rounds_needed * UNITS_MAX, "{before} before {few} of another");
            assert_eq!(seen.len(), greedy * each + few);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_alone_does_not_wait() {
        let rounds = Rounds::new(&sim());
        let mut one = rounds.reader(1);
        let now = async |reader: &mut Reader| poll_fn(|cx| Poll::Ready(reader.poll_turn(cx).is_ready())).await;
        for _ in 0..10 * UNITS_MAX {
            assert!(now(&mut one).await);
            one.spend(1, 0);
        }
        assert!(now(&mut rounds.reader(2)).await, "another has its turn at once");
        assert!(!now(&mut one).await, "and now the first waits");
        poll_fn(|cx| one.poll_turn(cx)).await;
        one.spend(UNITS_MAX, 0);
        sleep(2 * ALONE_AFTER).await;
        assert!(now(&mut one).await, "alone again");
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_go_while_they_wait_hold_nobody_up() {
        let rounds = Rounds::new(&sim());
        let now = async |reader: &mut Reader| poll_fn(|cx| Poll::Ready(reader.poll_turn(cx).is_ready())).await;
        let mut one = rounds.reader(1);
        assert!(now(&mut one).await && now(&mut rounds.reader(2)).await);
        one.spend(UNITS_MAX, 0);
        let mut gone: Vec<Reader> = (0..50).map(|_| rounds.reader(1)).collect();
        for reader in &mut gone {
            assert!(!now(reader).await);
        }
        let mut last = rounds.reader(1);
        assert!(!now(&mut last).await);
        drop(gone);
        rounds.0.state.lock().next_round();
        assert!(now(&mut last).await, "its turn comes in the next round");
        assert_eq!(rounds.0.state.lock().waiting, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_take_turns_though_nothing_comes_of_them_yet() {
        let rounds = Rounds::new(&sim());
        let now = async |reader: &mut Reader| poll_fn(|cx| Poll::Ready(reader.poll_turn(cx).is_ready())).await;
        assert!(now(&mut rounds.reader(1)).await && now(&mut rounds.reader(2)).await);
        let mut shaking: Vec<Reader> = (0..100).map(|_| rounds.reader(1)).collect();
        let mut had_turns = 0;
        for reader in &mut shaking {
            if now(reader).await {
                reader.pass(GREETING_UNITS);
                had_turns += 1;
            }
        }
        assert_eq!(had_turns, UNITS_MAX / GREETING_UNITS);
        assert!(now(&mut rounds.reader(2)).await, "another host does not wait");
    }
}
