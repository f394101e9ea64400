//! Tokens: who has shown a password once shows one of these with each request.
//!
//! A token names the user, what it was issued for ([`Named::since`]) and when, signed with a key that all members know; so any member takes it, and
//! none remembers it. One that is used when half of its life or more is over lives on, on the member at which it is used, for as long as it is
//! used there: a program that asks once and works for hours goes on. Elsewhere it ends at its time, and clients ask for another.
//!
//! Invariants: what is remembered is bounded, and forgetting costs a client no more than a question for another token; a key that is replaced ends
//! every token.
//! Absent: whether the user is still whom it was (`kv::auth`), which is looked at with every request.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use parking_lot::Mutex;
use ring::hmac;

use crate::caller::Named;
use crate::env::{Instant, WallTime};

/// Members' clocks are apart by this much at most; it is added to a token's life.
const SKEW_MAX: Duration = Duration::from_secs(60);
/// Tokens remembered.
const SEEN_MAX: usize = 16_384;
/// Bytes of a token that is looked at: a user's name may be long, but not so long.
const TOKEN_BYTES_MAX: usize = 8 << 10;
const MAC_BYTES: usize = 32;
/// Version, since, the time of issue, and a number that makes two tokens differ.
const HEAD_BYTES: usize = 1 + 8 + 8 + 8;
const VERSION: u8 = 1;

/// What a cluster signs its tokens with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub cluster_id: u64,
    pub secret: Bytes,
}

/// The tokens that this member has seen.
pub struct Tokens {
    ttl: Duration,
    seen: Mutex<HashMap<String, Seen>>,
}

struct Seen {
    key: Key,
    user: Arc<Named>,
    until: Instant,
}

impl Key {
    fn mac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.secret)
    }

    /// What is signed: of another cluster with the same key, such as one that was restored from the same backup, something else.
    fn signed(&self, payload: &[u8]) -> Vec<u8> {
        [b"quorate token", &self.cluster_id.to_be_bytes()[..], payload].concat()
    }
}

impl Tokens {
    /// Tokens that live for `ttl` unless they are used.
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, seen: Mutex::default() }
    }

    /// A new token of `user`; `number` was never used before.
    pub fn issue(&self, key: &Key, user: &Named, now: WallTime, number: u64) -> String {
        let mut token = vec![VERSION];
        for part in [user.since, seconds(now), number] {
            token.extend(part.to_be_bytes());
        }
        token.extend(user.name.as_bytes());
        let mac = hmac::sign(&key.mac(), &key.signed(&token));
        token.extend(mac.as_ref());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Whose token it is; `None` if it is none, or its time is over.
    pub fn read(&self, key: &Key, token: &str, now: WallTime) -> Option<Arc<Named>> {
        let at = Instant::now();
        let mut seen = self.seen.lock();
        if let Some(known) = seen.get_mut(token).filter(|known| known.key == *key && at < known.until) {
            if known.until - at < self.ttl / 2 {
                known.until = at + self.ttl;
            }
            return Some(known.user.clone());
        }
        drop(seen);
        let (user, left) = self.verify(key, token, now)?;
        let user = Arc::new(user);
        let until = at + if left < self.ttl / 2 { self.ttl } else { left };
        let mut seen = self.seen.lock();
        make_room(&mut seen, at);
        seen.insert(token.to_owned(), Seen { key: key.clone(), user: user.clone(), until });
        Some(user)
    }

    /// The user, and how long the token has still to live.
    fn verify(&self, key: &Key, token: &str, now: WallTime) -> Option<(Named, Duration)> {
        if token.len() > TOKEN_BYTES_MAX || key.secret.is_empty() {
            return None;
        }
        let token = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (payload, mac) = token.split_at_checked(token.len().checked_sub(MAC_BYTES)?)?;
        hmac::verify(&key.mac(), &key.signed(payload), mac).ok()?;
        let (head, name) = payload.split_at_checked(HEAD_BYTES)?;
        let number = |at: usize| Some(u64::from_be_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let (since, issued) = (number(1)?, number(9)?);
        let skew = SKEW_MAX.min(self.ttl);
        let age = Duration::from_secs(seconds(now).saturating_sub(issued));
        let early = Duration::from_secs(issued.saturating_sub(seconds(now)));
        let life = self.ttl + skew;
        if head[0] != VERSION || age >= life || early > skew {
            return None;
        }
        let name = String::from_utf8(name.to_vec()).ok()?;
        Some((Named::user(name, since), (life - age).min(self.ttl)))
    }
}

fn seconds(time: WallTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Forgets those whose time is over, and if that is not enough, the half that would go first.
fn make_room(seen: &mut HashMap<String, Seen>, now: Instant) {
    if seen.len() < SEEN_MAX {
        return;
    }
    seen.retain(|_, known| now < known.until);
    if seen.len() >= SEEN_MAX {
        let mut ends: Vec<Instant> = seen.values().map(|known| known.until).collect();
        let (_, middle, _) = ends.select_nth_unstable(SEEN_MAX / 2);
        let middle = *middle;
        seen.retain(|_, known| known.until > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(300);

    fn key(secret: u8) -> Key {
        Key { cluster_id: 1, secret: vec![secret; 32].into() }
    }

    fn named(since: u64) -> Named {
        Named::user("röot", since)
    }

    fn time(seconds: u64) -> WallTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn any_member_takes_a_token_and_nobody_makes_one_without_the_key() {
        let (one, other) = (Tokens::new(TTL), Tokens::new(TTL));
        let token = one.issue(&key(1), &named(7), time(0), 5);
        for tokens in [&one, &other, &other] {
            assert_eq!(tokens.read(&key(1), &token, time(1)).as_deref(), Some(&named(7)));
        }
        assert_ne!(token, one.issue(&key(1), &named(7), time(0), 6), "two are never the same");
        assert_eq!(other.read(&key(2), &token, time(1)), None, "the key was replaced");
        assert_eq!(other.read(&Key { cluster_id: 2, ..key(1) }, &token, time(1)), None, "another cluster's");
        assert_eq!(other.read(&Key { secret: Bytes::new(), ..key(1) }, &token, time(1)), None, "there is no key");
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        for at in 0..bytes.len() {
            let mut forged = bytes.clone();
            forged[at] ^= 1;
            assert_eq!(other.read(&key(1), &URL_SAFE_NO_PAD.encode(&forged), time(1)), None, "byte {at}");
            assert_eq!(other.read(&key(1), &URL_SAFE_NO_PAD.encode(&bytes[..at]), time(1)), None, "cut at {at}");
        }
        for none in ["", "x", "abc.12", &"A".repeat(20_000)] {
            assert_eq!(other.read(&key(1), none, time(1)), None, "{none:.10}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_lives_on_where_it_is_used_and_ends_elsewhere() {
        let (here, there) = (Tokens::new(TTL), Tokens::new(TTL));
        let token = here.issue(&key(1), &named(7), time(0), 5);
        let mut now = 0;
        // Three lives.
        while now < 900 {
            assert!(here.read(&key(1), &token, time(now)).is_some(), "after {now} s");
            tokio::time::advance(Duration::from_secs(100)).await;
            now += 100;
        }
        assert!(there.read(&key(1), &token, time(now)).is_none());
        tokio::time::advance(TTL).await;
        assert!(here.read(&key(1), &token, time(now + 300)).is_none(), "nobody has used it");
    }

    #[test]
    fn clocks_may_be_a_minute_apart() {
        let tokens = Tokens::new(TTL);
        let token = tokens.issue(&key(1), &named(7), time(100), 5);
        for (now, taken) in [(39, false), (40, true), (400, true), (459, true), (460, false), (5000, false)] {
            assert_eq!(tokens.verify(&key(1), &token, time(now)).is_some(), taken, "{now}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_bounded() {
        let tokens = Tokens::new(TTL);
        for number in 0..SEEN_MAX as u64 + 10 {
            let token = tokens.issue(&key(1), &named(7), time(0), number);
            assert!(tokens.read(&key(1), &token, time(0)).is_some());
            assert!(tokens.seen.lock().len() <= SEEN_MAX);
        }
    }
}
