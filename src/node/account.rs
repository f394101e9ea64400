//! The account of what clients hold of a member: who has how much of each thing that there is only so much of.
//!
//! A [`Pool`] is one such thing, bytes or places. What is taken of it is a [`Taken`], which gives it back when it is dropped, so a type
//! that owns one cannot hold anything uncounted. Shares are fair by two names, the connection and the host that it comes from: the
//! last quarter of a pool is for those who have nothing else of it, and of the rest a connection may have as much as it leaves free, a
//! host twice that (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998). So those who take
//! too much soon have equal shares, a client of many connections gets no more than one that has few, and who takes little finds room.
//!
//! Who waits for what does not fit gets it by turns of hosts, as soon as it fits, from whoever gives back: nobody else is woken.
//! Invariants: what is taken of a pool is at most its size; nobody who holds nothing is refused while a quarter is free; what is given
//! back looks at a bounded number of those who wait. Absent: what a thing is worth in bytes; who takes it knows.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::env::rota::{Asker, Rota};
use crate::env::timeout;
use crate::error::Error;
use crate::secure::{Certificate, Presented};

/// What there is a pool of. Shares are counted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Requests that wait for Raft, and their bytes.
    Requests,
    RequestBytes,
    Connections,
    /// Requests on their way in, what a connection and a stream take, keys of watchers.
    Received,
    /// Answers on their way out, and what is kept for them.
    Answers,
    Watchers,
}

const KINDS: usize = Kind::Watchers as usize + 1;

/// A host may have so many times what it leaves free: often many clients stand behind one address.
const HOST_FACTOR: u64 = 2;

/// So many of those who wait are looked at in vain for what is given back; the next look goes on behind them.
const LOOKS_MAX: usize = 16;

/// What somebody has of each pool.
#[derive(Debug, Default)]
struct Counts([AtomicU64; KINDS]);

/// A host: all of its connections together. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Host(Arc<OfHost>);

#[derive(Debug, Default)]
struct OfHost {
    counts: Counts,
    /// `None`: it is not known.
    address: Option<IpAddr>,
}

impl Host {
    /// The host at an address.
    pub fn at(address: IpAddr) -> Self {
        Self(Arc::new(OfHost { counts: Counts::default(), address: Some(address.to_canonical()) }))
    }

    /// True while something else knows it: a connection, or what one of them has taken.
    pub fn is_known(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Itself as one who asks, for what is given out before there is a connection.
    pub fn as_client(&self) -> Client {
        let (connection, host, presented) = (None, Some(self.0.clone()), Presented::default());
        Client(Some(Arc::new(Names { connection, host, presented })))
    }
}

/// Who asks; cloning shares what it has. The default is nobody in particular: a member's own requests, which may take all that is free.
#[derive(Clone, Debug, Default)]
pub struct Client(Option<Arc<Names>>);

#[derive(Debug)]
struct Names {
    connection: Option<Counts>,
    host: Option<Arc<OfHost>>,
    presented: Presented,
}

impl Client {
    /// A connection that has asked nothing yet; `host` is where it comes from, if that is known.
    pub fn new(host: Option<&Host>) -> Self {
        Self::presenting(host, Presented::default())
    }

    /// As [`Self::new`], of a connection of TLS, whose certificate will be `presented`.
    pub fn presenting(host: Option<&Host>, presented: Presented) -> Self {
        let (connection, host) = (Some(Counts::default()), host.map(|host| host.0.clone()));
        Self(Some(Arc::new(Names { connection, host, presented })))
    }

    /// The certificate that the client has shown, which was verified; `None` if it has shown none.
    pub fn certificate(&self) -> Option<&Certificate> {
        self.0.as_ref()?.presented.get()
    }

    /// Tells those apart who live at the same time; 0: nobody in particular.
    fn number(&self) -> u64 {
        self.0.as_ref().map_or(0, |names| Arc::as_ptr(names).addr() as u64)
    }

    /// Where it comes from, if that is known.
    pub fn address(&self) -> Option<IpAddr> {
        self.0.as_ref()?.host.as_ref()?.address
    }

    /// For all connections of its host together. It follows from the address, so a host that comes back after it was forgotten has the same; who
    /// has an address of IPv6 has the 2^64 beside it, too. Where it comes from is not known: a number of the connection.
    pub fn host_number(&self) -> u64 {
        let number = match self.address() {
            Some(IpAddr::V4(address)) => u64::from(address.to_bits()),
            Some(IpAddr::V6(address)) => (address.to_bits() >> 64) as u64,
            None => return self.number(),
        };
        // 0 is the member itself; that much of ::1 is 0, too.
        number.max(1)
    }

    /// As one of those who have turns and places.
    pub fn asker(&self) -> Asker {
        Asker { host: self.host_number(), connection: self.number() }
    }

    /// A small number for [`Self::host_number`], which others may share. 0 is nobody's in particular.
    pub fn mark(&self) -> u8 {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        match self.host_number() {
            0 => 0,
            number => 1 + ((number.wrapping_mul(ODD) >> 32) % 255) as u8,
        }
    }

    /// What the connection has, and what the host has; `None` for who has no such name.
    fn counts(&self, kind: Kind) -> [Option<&AtomicU64>; 2] {
        let Some(names) = &self.0 else { return [None; 2] };
        [names.connection.as_ref(), names.host.as_ref().map(|host| &host.counts)]
            .map(|name| name.map(|counts| &counts.0[kind as usize]))
    }
}

/// So much of one thing, for all clients of a member.
#[derive(Debug)]
pub struct Pool {
    kind: Kind,
    max: u64,
    taken: AtomicU64,
    /// Those who wait until something is given back: how many, and in whose turns.
    waits: AtomicUsize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    rota: Rota<Waiter>,
    /// None of them waits for less.
    least: u64,
}

/// Somebody who waits until `more` fits.
#[derive(Debug)]
struct Waiter {
    client: Client,
    /// What it had when it began to wait.
    own: u64,
    more: u64,
    granted: oneshot::Sender<Taken>,
}

impl Waiter {
    /// What it waits for, if it fits now.
    fn taken_of(&self, pool: &Arc<Pool>) -> Option<Taken> {
        let (client, amount) = (self.client.clone(), AtomicU64::new(self.more));
        if pool.count(&client, self.own, self.more) {
            return Some(Taken { pool: pool.clone(), client, amount });
        }
        pool.uncount(&client, self.more);
        None
    }
}

impl Pool {
    pub fn new(kind: Kind, max: u64) -> Arc<Self> {
        let (taken, waits, waiting) = (AtomicU64::new(0), AtomicUsize::new(0), Mutex::default());
        Arc::new(Self { kind, max, taken, waits, waiting })
    }

    /// What all have of it.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    /// So much of it for `client`, or `too many requests`.
    pub fn take(self: &Arc<Self>, client: &Client, amount: u64) -> Result<Taken, Error> {
        let taken = self.nothing(client);
        // What does not fit is given back with it.
        taken.grow(amount).map(|()| taken)
    }

    /// What has room to grow, but takes nothing yet.
    pub fn nothing(self: &Arc<Self>, client: &Client) -> Taken {
        Taken { pool: self.clone(), client: client.clone(), amount: AtomicU64::new(0) }
    }

    /// As [`Self::take`], but waits for `patience` at most until it fits. Who asks for more than there is hears so at once.
    pub async fn take_in_time(
        self: &Arc<Self>,
        client: &Client,
        amount: u64,
        patience: Duration,
    ) -> Result<Taken, Error> {
        let taken = self.nothing(client);
        taken.grow_in_time(amount, patience).await.map(|()| taken)
    }

    /// Counts `amount` more for `client`, whose `own` this enlarges; false if it does not fit. Counted it is in any case.
    fn count(&self, client: &Client, own: u64, amount: u64) -> bool {
        let one = own + amount;
        // In one order with what `uncount` gives back, so that who begins to wait sees that, or is seen there.
        let all = self.taken.fetch_add(amount, Ordering::AcqRel) + amount;
        let [of_connection, of_host] =
            client.counts(self.kind).map(|count| count.map(|count| count.fetch_add(amount, Ordering::AcqRel) + amount));
        let free = (self.max - self.max / 4).saturating_add(one).saturating_sub(all);
        let host_fits = of_host.is_none_or(|has| has == one || has <= free.saturating_mul(HOST_FACTOR));
        let has_nothing_else = of_connection.or(of_host).is_none_or(|has| has == one);
        if has_nothing_else {
            all <= if host_fits { self.max } else { self.max - self.max / 8 }
        } else {
            // It may have had more when it began to wait than it has now.
            all <= self.max && host_fits && of_connection.is_none_or(|has| has <= free)
        }
    }

    /// Takes a count back that was not given, which is nothing new to those who wait.
    fn uncount(&self, client: &Client, amount: u64) {
        self.taken.fetch_sub(amount, Ordering::AcqRel);
        for count in client.counts(self.kind).into_iter().flatten() {
            count.fetch_sub(amount, Ordering::AcqRel);
        }
    }

    fn give_back(self: &Arc<Self>, client: &Client, amount: u64) {
        if amount == 0 {
            return;
        }
        self.uncount(client, amount);
        if self.waits.load(Ordering::Acquire) > 0 {
            self.grant();
        }
    }

    /// Gives those who wait what fits, by turns.
    fn grant(self: &Arc<Self>) {
        let (mut in_vain, mut not_wanted) = (Vec::new(), Vec::new());
        let mut waiting = self.waiting.lock();
        while in_vain.len() < LOOKS_MAX
            && self.taken() + waiting.least <= self.max
            && let Some(waiter) = waiting.rota.pop()
        {
            if waiter.granted.is_closed() {
                continue;
            }
            match waiter.taken_of(self) {
                Some(taken) => not_wanted.extend(waiter.granted.send(taken).err()),
                None => in_vain.push(waiter),
            }
        }
        for waiter in in_vain.into_iter().rev() {
            waiting.rota.push_front(waiter.client.asker(), waiter);
        }
        drop(waiting);
        // Which is given back, and looks for others again.
        drop(not_wanted);
    }

    /// Has one wait who gets what it waits for by `granted`; at once, if it fits meanwhile.
    fn wait(self: &Arc<Self>, waiter: Waiter) {
        let mut waiting = self.waiting.lock();
        if let Some(taken) = waiter.taken_of(self) {
            drop(waiting);
            let _ = waiter.granted.send(taken);
            return;
        }
        // Those who have gone are kept no longer than as many wait.
        if waiting.rota.len() > 2 * self.waits.load(Ordering::Relaxed) {
            waiting.rota.retain(|waiter| !waiter.granted.is_closed());
        }
        if waiting.rota.is_empty() {
            waiting.least = u64::MAX;
        }
        waiting.least = waiting.least.min(waiter.more);
        waiting.rota.push(waiter.client.asker(), waiter);
    }
}

/// The pools that all services share. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Account {
    pub received: Arc<Pool>,
    pub answers: Arc<Pool>,
    pub watchers: Arc<Pool>,
}

impl Account {
    pub fn new(received_bytes_max: u64, answer_bytes_max: u64, watchers_max: usize) -> Self {
        Self {
            received: Pool::new(Kind::Received, received_bytes_max),
            answers: Pool::new(Kind::Answers, answer_bytes_max),
            watchers: Pool::new(Kind::Watchers, watchers_max as u64),
        }
    }
}

/// Somebody waits, as long as this lives.
struct Waits<'a>(&'a Pool);

impl<'a> Waits<'a> {
    fn begin(pool: &'a Pool) -> Self {
        pool.waits.fetch_add(1, Ordering::AcqRel);
        Self(pool)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waits.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a client has taken of a pool; dropping gives it back.
#[derive(Debug)]
pub struct Taken {
    pool: Arc<Pool>,
    client: Client,
    amount: AtomicU64,
}

impl Taken {
    /// So much more, or `too many requests`, and then it is as large as before.
    pub fn grow(&self, more: u64) -> Result<(), Error> {
        let own = self.amount.load(Ordering::Relaxed);
        if self.pool.count(&self.client, own, more) {
            self.amount.fetch_add(more, Ordering::Relaxed);
            return Ok(());
        }
        self.pool.uncount(&self.client, more);
        Err(Error::TooManyRequests)
    }

    /// As [`Self::grow`], but waits for `patience` at most until it fits. Who asks for more than there is hears so at once.
    pub async fn grow_in_time(&self, more: u64, patience: Duration) -> Result<(), Error> {
        if self.grow(more).is_ok() {
            return Ok(());
        }
        if more > self.pool.max {
            return Err(Error::TooManyRequests);
        }
        let waits = Waits::begin(&self.pool);
        let (granted, rx) = oneshot::channel();
        self.pool.wait(Waiter { client: self.client.clone(), own: self.amount(), more, granted });
        let granted = timeout(patience, rx).await;
        drop(waits);
        match granted {
            Ok(Ok(granted)) => {
                self.amount.fetch_add(granted.amount.swap(0, Ordering::Relaxed), Ordering::Relaxed);
                Ok(())
            }
            // Nobody may have looked at it for a while.
            _ => self.grow(more),
        }
    }

    /// Gives so much of it back.
    pub fn shrink(&self, less: u64) {
        self.amount.fetch_sub(less, Ordering::Relaxed);
        self.pool.give_back(&self.client, less);
    }

    /// So much in all, or `too many requests`, and then it is as large as before.
    pub fn resize(&self, amount: u64) -> Result<(), Error> {
        match amount.checked_sub(self.amount()) {
            Some(more) => self.grow(more),
            None => {
                self.shrink(self.amount() - amount);
                Ok(())
            }
        }
    }

    /// Gives all of it back.
    pub fn give_all(&self) {
        self.pool.give_back(&self.client, self.amount.swap(0, Ordering::Relaxed));
    }

    pub fn amount(&self) -> u64 {
        self.amount.load(Ordering::Relaxed)
    }

    /// What it is taken of.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whose it is.
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.pool.give_back(&self.client, *self.amount.get_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(pool: &Arc<Pool>, client: &Client, amount: u64) -> Vec<Taken> {
        std::iter::from_fn(|| pool.take(client, amount).ok()).collect()
    }

    #[test]
    fn clients_that_take_too_much_leave_places_to_others() {
        let pool = Pool::new(Kind::Requests, 100);
        let greedy: Vec<_> = (0..9).map(|_| Client::new(None)).collect();
        let mut held = take_all(&pool, &greedy[0], 1);
        assert_eq!(held.len(), 38, "alone, half of three quarters");
        for client in &greedy[1..] {
            held.extend(take_all(&pool, client, 1));
        }
        assert!(held.len() <= 75 + greedy.len(), "{}", held.len());
        let modest: Vec<_> = (0..10).map(|_| pool.take(&Client::new(None), 1)).collect();
        assert!(modest.iter().all(Result::is_ok), "{} places are held by the others", held.len());
        assert!(pool.take(&Client::default(), 1).is_ok(), "nor are the member's own requests refused");
        assert!(pool.take(&greedy[0], 1).is_err());
    }

    #[test]
    fn a_host_has_the_number_of_its_address_whenever_it_comes() {
        let number = |address: &str| Client::new(Some(&Host::at(address.parse().unwrap()))).asker().host;
        assert_eq!(number("10.0.0.1"), number("10.0.0.1"));
        assert_eq!(number("10.0.0.1"), number("::ffff:10.0.0.1"));
        assert_eq!(number("2001:db8::1"), number("2001:db8::2"), "both are one subscriber's");
        let others = ["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8:0:1::1", "::1"].map(number);
        assert!(others.iter().all(|number| *number != Asker::MEMBER.host), "{others:?}");
        assert!(others.iter().all(|number| others.iter().filter(|other| *other == number).count() == 1), "{others:?}");
        let (one, other) = (Client::new(None), Client::new(None));
        assert_ne!(one.asker().host, other.asker().host, "where they come from is not known");
        let host = Host::at([10, 0, 0, 1].into());
        let (one, other) = (Client::new(Some(&host)), Client::new(Some(&host)));
        assert_ne!(one.asker(), other.asker());
        assert!(Client::default().asker().is_member() && !one.asker().is_member());
    }

    #[test]
    fn a_host_of_many_connections_leaves_places_to_others() {
        let pool = Pool::new(Kind::Connections, 1000);
        let (greedy, modest) = (Host::default(), Host::default());
        let held = take_all(&pool, &greedy.as_client(), 1);
        assert_eq!(held.len(), 500, "alone, two thirds of three quarters");
        let others: Vec<_> = (0..100).map_while(|_| pool.take(&modest.as_client(), 1).ok()).collect();
        assert_eq!(others.len(), 100);
        let beside = take_all(&pool, &Client::new(Some(&greedy)), 1);
        assert_eq!(beside.len(), 1, "a connection of its that has nothing gets something");
        drop(beside);
        assert!(greedy.is_known());
        drop(held);
        assert!(!greedy.is_known());
    }

    #[test]
    fn what_stands_alone_may_grow_into_the_last_quarter() {
        let pool = Pool::new(Kind::Received, 1000);
        let greedy = Client::new(None);
        let held = take_all(&pool, &greedy, 100);
        assert_eq!(held.len(), 4);
        let other = pool.take(&Client::new(None), 100).unwrap();
        other.grow(500).unwrap();
        assert!(other.grow(1).is_err(), "there is no more");
        assert_eq!((other.amount(), pool.taken()), (600, 1000));
        other.shrink(500);
        assert_eq!((other.amount(), pool.taken()), (100, 500));
        assert!(other.grow(1).is_ok());
    }

    /// Random takings of random clients: never more than there is, nothing is left over, and a client that holds nothing gets its due.
    #[test]
    fn the_account_is_exact_whatever_is_taken_and_given_back() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let pool = Pool::new(Kind::Answers, 10_000);
        let hosts: Vec<_> = (0..3).map(|_| Host::default()).collect();
        let clients: Vec<_> = (0..9).map(|n| Client::new(hosts.get(n % 4))).collect();
        let mut held: Vec<Taken> = Vec::new();
        for _ in 0..20_000 {
            let client = random.choice(&clients).unwrap();
            match random.u8(..4) {
                0 if !held.is_empty() => drop(held.swap_remove(random.usize(..held.len()))),
                1 if !held.is_empty() => {
                    let _ = random.choice(&held).unwrap().grow(random.u64(..500));
                }
                2 if !held.is_empty() => {
                    let one = random.choice(&held).unwrap();
                    one.shrink(random.u64(..=one.amount()));
                }
                _ => held.extend(pool.take(client, random.u64(..2000))),
            }
            let sum: u64 = held.iter().map(Taken::amount).sum();
            assert_eq!(pool.taken(), sum);
            assert!(sum <= pool.max());
            let free = pool.max() - sum;
            assert!(pool.take(&Client::new(None), free).is_ok(), "{free} are free");
        }
        drop(held);
        assert_eq!(pool.taken(), 0);
        for client in &clients {
            assert!(client.counts(Kind::Answers).iter().flatten().all(|count| count.load(Ordering::Relaxed) == 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_gets_what_is_given_back_or_hears_in_time() {
        let pool = Pool::new(Kind::Answers, 1000);
        let (first, second) = (Client::new(None), Client::new(None));
        let held = pool.take(&first, 900).unwrap();
        let patience = Duration::from_secs(1);
        assert_eq!(pool.take_in_time(&second, 300, patience).await.err(), Some(Error::TooManyRequests));
        let begin = crate::env::Instant::now();
        assert!(pool.take_in_time(&second, 1001, patience).await.is_err());
        assert_eq!(begin.elapsed(), Duration::ZERO, "more than there is never fits");
        let waiting = {
            let (pool, second) = (pool.clone(), second.clone());
            tokio::spawn(async move { pool.take_in_time(&second, 300, Duration::from_secs(60)).await })
        };
        crate::env::sleep(Duration::from_secs(30)).await;
        drop(held);
        assert_eq!(waiting.await.unwrap().unwrap().amount(), 300);
    }

    /// Random clients that wait, and leave, while random amounts are given back.
    #[tokio::test(start_paused = true)]
    async fn who_waits_has_turns_by_hosts_and_what_is_given_back_is_given_to_whom_it_fits() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..50 {
            let pool = Pool::new(Kind::Answers, 100_000);
            let own = pool.take(&Client::default(), 100_000).unwrap();
            let hosts: Vec<Host> = (1..5).map(|n| Host::at([10, 0, 0, n].into())).collect();
            let (told, mut given) = tokio::sync::mpsc::unbounded_channel();
            let mut tasks = Vec::new();
            for _ in 0..random.usize(50..400) {
                // The first host asks for the most, over many connections.
                let host = if random.u8(..4) > 0 { 0 } else { random.usize(1..hosts.len()) };
                let (client, more) = (Client::new(Some(&hosts[host])), random.u64(1..200));
                let (pool, told) = (pool.clone(), told.clone());
                tasks.push(tokio::spawn(async move {
                    let taken = pool.take_in_time(&client, more, Duration::from_secs(60)).await.unwrap();
                    let _ = told.send((host, taken));
                }));
            }
            crate::env::sleep(Duration::from_millis(1)).await;
            let mut waiting = tasks.len();
            for task in &tasks {
                if random.u8(..10) == 0 {
                    task.abort();
                    waiting -= 1;
                }
            }
            crate::env::sleep(Duration::from_millis(1)).await;
            assert_eq!(pool.waits.load(Ordering::Relaxed), waiting, "who has left does not wait");
            let mut held = Vec::new();
            while own.amount() > 0 {
                own.shrink(random.u64(1..1000).min(own.amount()));
                crate::env::sleep(Duration::from_millis(1)).await;
                let before = held.len();
                while let Ok((_, taken)) = given.try_recv() {
                    held.push(taken);
                }
                waiting -= held.len() - before;
                assert!(pool.taken() <= pool.max());
                // The last eighth is not for hosts that have something.
                let is_full = pool.max() - pool.taken() < pool.max() / 8 + 200;
                assert!(waiting == 0 || is_full || held.len() > before, "what fits is given");
            }
            assert_eq!(waiting, 0, "all who waited");
            drop(held);
            assert_eq!((pool.taken(), pool.waits.load(Ordering::Relaxed)), (0, 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_waits_with_a_thousand_answers_does_not_delay_another_that_waits_with_one() {
        let pool = Pool::new(Kind::Answers, 10_000);
        let own = pool.take(&Client::default(), 10_000).unwrap();
        let (greedy, modest) = (Host::at([10, 0, 0, 1].into()), Host::at([10, 0, 0, 2].into()));
        let (told, mut given) = tokio::sync::mpsc::unbounded_channel();
        for n in 0..=1000 {
            let client = Client::new(Some(if n < 1000 { &greedy } else { &modest }));
            let (pool, told) = (pool.clone(), told.clone());
            tokio::spawn(async move {
                let taken = pool.take_in_time(&client, 100, Duration::from_secs(60)).await;
                let _ = told.send((n, taken));
            });
            crate::env::sleep(Duration::from_millis(1)).await;
        }
        own.shrink(200);
        crate::env::sleep(Duration::from_millis(1)).await;
        let given: Vec<_> = std::iter::from_fn(|| given.try_recv().ok()).collect();
        let of_modest = given.iter().filter(|(n, _)| *n == 1000).count();
        assert_eq!((given.len(), of_modest), (2, 1), "one of each, and nobody else is woken");
        assert!(given.iter().all(|(_, taken)| taken.is_ok()));
    }
}
