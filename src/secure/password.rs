//! Passwords: their hashes, made and checked where that holds up nobody.
//!
//! A check takes tens of milliseconds of a core, on purpose. So it is done in a pool of its own, by turns of the hosts that ask; one password
//! of one user is checked once however many ask at a time, and one that has fitted fits again without a check, until the user changes.
//! Who guesses waits for itself: of each host so many guesses at a user fail in a minute, and so many in all; beyond that it is
//! refused without a check.
//!
//! Invariants: a password is kept nowhere, only a mark that nobody makes without this process's secret; what is kept is bounded.
//! Absent: who the users are, and their hashes (`kv::auth`).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use ring::{hmac, pbkdf2};

use crate::env::{Asker, Env, Instant, Pool, Refused, timeout_at};
use crate::error::Error;

/// A longer one is refused when it is set, as by etcd: bcrypt looks at no more.
pub const PASSWORD_BYTES_MAX: usize = 72;
/// A check at this cost takes seconds.
pub const COST_MAX: u32 = 16;
/// Users whose last good password is remembered.
const VERIFIED_MAX: usize = 16_384;
/// Checks of different users that are under way; two users may share a turn.
const TURNS: usize = 64;
/// Guesses that fail, in so much time.
const WINDOW: Duration = Duration::from_secs(60);
const FAILURES_OF_USER_MAX: u32 = 30;
const FAILURES_OF_HOST_MAX: u32 = 300;
/// Hosts, and users of hosts, of which failures are counted. Beyond it those with fewest are forgotten: who has guessed most is remembered.
const COUNTED_MAX: usize = 65_536;
/// Steps by which the mark of a text with passwords in it is made: who has the mark makes a guess in the time of a bcrypt hash.
const MARK_STEPS: NonZeroU32 = NonZeroU32::new(200_000).expect("it is not 0");
/// Longest wait for a check.
const PATIENCE: Duration = Duration::from_secs(5);

/// A user as its password is checked.
#[derive(Clone, Debug)]
pub struct Checked {
    pub name: String,
    /// Another number whenever it has another password.
    pub since: u64,
    pub hash: Bytes,
}

/// Makes and checks hashes.
pub struct Passwords {
    env: Env,
    cost: u32,
    secret: hmac::Key,
    verified: Mutex<HashMap<String, hmac::Tag>>,
    turns: Vec<tokio::sync::Mutex<()>>,
    failures: Mutex<Failures>,
    /// Checks that were done.
    #[cfg(test)]
    checks: std::sync::atomic::AtomicUsize,
}

#[derive(Default)]
struct Failures {
    begun: Option<Instant>,
    of_hosts: HashMap<u64, u32>,
    /// By host and the number of a user: a name that is guessed may be as long as a request.
    of_users: HashMap<(u64, u64), u32>,
}

impl Failures {
    /// Forgets those of a window that is over.
    fn begin(&mut self, now: Instant) {
        if self.begun.is_none_or(|begun| now - begun >= WINDOW) {
            *self = Self { begun: Some(now), ..Self::default() };
        }
    }

    fn check(&mut self, host: u64, user: &str, now: Instant) -> Result<(), Error> {
        self.begin(now);
        let of_host = self.of_hosts.get(&host).copied().unwrap_or(0);
        let of_user = self.of_users.get(&(host, number_of(user))).copied().unwrap_or(0);
        if of_host >= FAILURES_OF_HOST_MAX || of_user >= FAILURES_OF_USER_MAX {
            return Err(Error::TooManyRequests);
        }
        Ok(())
    }

    fn note(&mut self, host: u64, user: &str, now: Instant) {
        self.begin(now);
        count(&mut self.of_hosts, host);
        count(&mut self.of_users, (host, number_of(user)));
    }
}

/// One more; if there is no room, the half goes that has fewest.
fn count<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: K) {
    if counts.len() >= COUNTED_MAX && !counts.contains_key(&key) {
        let mut all: Vec<u32> = counts.values().copied().collect();
        let (_, middle, _) = all.select_nth_unstable(COUNTED_MAX / 2);
        let middle = *middle;
        counts.retain(|_, count| *count > middle);
    }
    *counts.entry(key).or_default() += 1;
}

impl Passwords {
    /// `cost`: each step doubles what a hash takes.
    pub fn new(env: Env, cost: u32) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &env.secret());
        let turns = (0..TURNS).map(|_| tokio::sync::Mutex::new(())).collect();
        Self {
            env,
            cost,
            secret,
            verified: Mutex::default(),
            turns,
            failures: Mutex::default(),
            #[cfg(test)]
            checks: Default::default(),
        }
    }

    /// The hash of a new password, for a client.
    pub async fn hash(&self, asker: Asker, password: String) -> Result<Bytes, Error> {
        if password.len() > PASSWORD_BYTES_MAX {
            return Err(Error::PasswordTooLong);
        }
        let (cost, secret) = (self.cost, self.env.secret());
        let salt: [u8; 16] = std::array::from_fn(|at| secret[at]);
        let work = move || bcrypt::hash_with_salt(password, cost, salt).map(|hash| hash.to_string());
        let hash = self.env.long_for(Pool::Passwords, asker, Instant::now() + PATIENCE, work).await.map_err(refused)?;
        hash.map(Bytes::from).map_err(|error| Error::InvalidRequest(format!("auth.bcrypt_cost: {error}")))
    }

    /// The hash of a password of this member's own files; `None` if it fits the hash that is known.
    pub async fn hash_unless_fits(&self, known: &[u8], password: String) -> Result<Option<Bytes>, Error> {
        let (known, tried) = (String::from_utf8_lossy(known).into_owned(), password.clone());
        let fits = move || bcrypt::verify(tried, &known).unwrap_or(false);
        if self.env.long(Pool::Passwords, fits).await {
            return Ok(None);
        }
        self.hash(Asker::MEMBER, password).await.map(Some)
    }

    /// Whether `hash` is one that passwords can be checked against.
    pub fn is_hash(hash: &[u8]) -> bool {
        let parts = std::str::from_utf8(hash).ok().and_then(|hash| hash.parse::<bcrypt::HashParts>().ok());
        parts.is_some_and(|parts| parts.get_cost() <= COST_MAX)
    }

    /// Counts a guess at a user that there is not.
    pub fn guessed(&self, asker: Asker, name: &str) -> Result<(), Error> {
        let (now, mut failures) = (Instant::now(), self.failures.lock());
        failures.check(asker.host, name, now)?;
        failures.note(asker.host, name, now);
        Ok(())
    }

    /// Refuses a password that does not fit.
    pub async fn verify(&self, asker: Asker, user: &Checked, password: String) -> Result<(), Error> {
        let mark = self.mark(user, &password);
        if self.is_verified(user, &mark) {
            return Ok(());
        }
        self.failures.lock().check(asker.host, &user.name, Instant::now())?;
        let deadline = Instant::now() + PATIENCE;
        let turn = self.turns[turn_of(&user.name)].lock();
        let _turn = timeout_at(deadline, turn).await.map_err(|_| Error::TooManyRequests)?;
        // Who was before may have had the same password, or have guessed too often.
        if self.is_verified(user, &mark) {
            return Ok(());
        }
        self.failures.lock().check(asker.host, &user.name, Instant::now())?;
        #[cfg(test)]
        self.checks.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let hash = user.hash.clone();
        let fits = move || std::str::from_utf8(&hash).is_ok_and(|hash| bcrypt::verify(password, hash).unwrap_or(false));
        if !self.env.long_for(Pool::Passwords, asker, deadline, fits).await.map_err(refused)? {
            self.failures.lock().note(asker.host, &user.name, Instant::now());
            return Err(Error::AuthFailed);
        }
        let mut verified = self.verified.lock();
        if verified.len() >= VERIFIED_MAX {
            verified.clear();
        }
        verified.insert(user.name.clone(), mark);
        Ok(())
    }

    /// Stands for a password of a user as it is now.
    fn mark(&self, user: &Checked, password: &str) -> hmac::Tag {
        let mut mark = hmac::Context::with_key(&self.secret);
        mark.update(&user.since.to_be_bytes());
        mark.update(&(user.hash.len() as u64).to_be_bytes());
        mark.update(&user.hash);
        mark.update(password.as_bytes());
        mark.sign()
    }

    fn is_verified(&self, user: &Checked, mark: &hmac::Tag) -> bool {
        // Equal or not, it takes as long: the marks are keyed.
        self.verified.lock().get(&user.name).is_some_and(|known| known.as_ref() == mark.as_ref())
    }
}

/// Stands for a text that holds passwords, the same wherever it is made; never 0.
pub fn mark_of(text: &[u8]) -> u64 {
    let mut mark = [0; 8];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, MARK_STEPS, b"quorate: declared users", text, &mut mark);
    u64::from_be_bytes(mark).max(1)
}

/// A name as a number; two may share one.
fn number_of(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

fn turn_of(name: &str) -> usize {
    (number_of(name) % TURNS as u64) as usize
}

fn refused(refused: Refused) -> Error {
    match refused {
        Refused::Full | Refused::Late => Error::TooManyRequests,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// The least that bcrypt takes.
    const COST: u32 = 4;

    fn at(host: u64) -> Asker {
        Asker { host, connection: 1 }
    }

    async fn user(passwords: &Passwords, password: &str) -> Checked {
        let hash = passwords.hash(at(1), password.into()).await.unwrap();
        Checked { name: "u".into(), since: 2, hash }
    }

    #[tokio::test]
    async fn a_password_fits_its_hash_and_no_other_does() {
        let passwords = Passwords::new(Env::real(), COST);
        let user = user(&passwords, "secret").await;
        assert!(Passwords::is_hash(&user.hash) && !Passwords::is_hash(b"secret") && !Passwords::is_hash(b""));
        for _ in 0..2 {
            assert_eq!(passwords.verify(at(1), &user, "secret".into()).await, Ok(()));
            assert_eq!(passwords.verify(at(1), &user, "Secret".into()).await, Err(Error::AuthFailed));
        }
        // A user without one: nothing fits.
        let none = Checked { hash: Bytes::new(), ..user.clone() };
        assert_eq!(passwords.verify(at(1), &none, String::new()).await, Err(Error::AuthFailed));
        assert_eq!(passwords.hash(at(1), "x".repeat(73)).await, Err(Error::PasswordTooLong));
        assert_ne!(passwords.hash(at(1), "secret".into()).await.unwrap(), user.hash, "each has a salt of its own");
    }

    /// Go's, of `golang.org/x/crypto/bcrypt`.
    #[tokio::test]
    async fn hashes_of_etcd_fit() {
        let passwords = Passwords::new(Env::real(), COST);
        let hash = Bytes::from_static(b"$2a$10$XajjQvNhvvRt5GSeFk1xFeyqRrsxkhBkUiQeg0dt.wU1qD4aFDcga");
        let user = Checked { name: "u".into(), since: 2, hash };
        assert_eq!(passwords.verify(at(1), &user, "allmine".into()).await, Ok(()));
    }

    #[tokio::test]
    async fn one_password_is_checked_once_however_many_ask() {
        let passwords = Arc::new(Passwords::new(Env::real(), COST));
        let user = user(&passwords, "secret").await;
        let asking = (0..200).map(|host| {
            let (passwords, user) = (passwords.clone(), user.clone());
            tokio::spawn(async move { passwords.verify(at(host), &user, "secret".into()).await })
        });
        for asked in asking.collect::<Vec<_>>() {
            assert_eq!(asked.await.unwrap(), Ok(()));
        }
        let checks = || passwords.checks.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(checks(), 1);
        // Another user with the same password, and the same one when it has changed.
        for other in [Checked { name: "other".into(), ..user.clone() }, Checked { since: 3, ..user }] {
            passwords.verify(at(1), &other, "secret".into()).await.unwrap();
        }
        assert_eq!(checks(), 3);
    }

    #[test]
    fn who_has_guessed_most_is_remembered_when_there_is_no_more_room() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        for guess in 0..FAILURES_OF_HOST_MAX {
            failures.note(0, &format!("user {guess}"), now);
        }
        for host in 1..=COUNTED_MAX as u64 {
            failures.note(host, "user", now);
            assert!(failures.of_hosts.len() <= COUNTED_MAX && failures.of_users.len() <= COUNTED_MAX);
        }
        assert_eq!(failures.check(0, "another", now), Err(Error::TooManyRequests));
        assert_eq!(failures.check(1, "another", now), Ok(()));
        assert_eq!(failures.check(0, "another", now + WINDOW), Ok(()));
    }

    #[tokio::test]
    async fn who_guesses_is_refused_and_nobody_else() {
        let passwords = Passwords::new(Env::real(), COST);
        let user = user(&passwords, "secret").await;
        for _ in 0..FAILURES_OF_USER_MAX {
            assert_eq!(passwords.verify(at(1), &user, "guess".into()).await, Err(Error::AuthFailed));
        }
        assert_eq!(passwords.verify(at(1), &user, "secret".into()).await, Err(Error::TooManyRequests));
        assert_eq!(passwords.verify(at(2), &user, "secret".into()).await, Ok(()));
        // It is remembered now, so not even that host is kept out.
        assert_eq!(passwords.verify(at(1), &user, "secret".into()).await, Ok(()));
        for guess in 0..FAILURES_OF_HOST_MAX {
            assert_eq!(passwords.guessed(at(3), &format!("user {guess}")), Ok(()));
        }
        assert_eq!(passwords.guessed(at(3), "another"), Err(Error::TooManyRequests));
    }
}
