//! How often users may write: decided by the leader, before it proposes, so that it is one rate however many members a user asks.
//!
//! A bucket a user: it holds what may be asked in a second, and fills by the rate. Invariants: apply knows nothing of this; users without a rate
//! cost a look at one flag; what is remembered is bounded, and forgetting gives a user one full bucket.
//! Absent: which rate a user has (`kv::auth`).

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message as _;

use crate::caller::Who;
use crate::env::Instant;
use crate::error::Error;
use crate::kv::Auth;
use crate::pb::log::Command;

/// Users with a bucket.
const BUCKETS_MAX: usize = 16_384;

struct Bucket {
    left: f64,
    at: Instant,
}

#[derive(Default)]
pub(super) struct Rates(HashMap<String, Bucket>);

impl Rates {
    /// Refuses an encoded command whose asker has asked too often.
    pub(super) fn check(&mut self, auth: &Auth, command: &Bytes, now: Instant) -> Result<(), Error> {
        let Ok(command) = Command::decode(command.clone()) else { return Ok(()) };
        let who = Who::of(command.asker.as_ref());
        let (Who::User { name, .. } | Who::Mapped { name, .. }, Some(rate)) = (who, auth.rate(who)) else {
            return Ok(());
        };
        self.take(name, rate, now)
    }

    fn take(&mut self, name: &str, rate: u64, now: Instant) -> Result<(), Error> {
        let full = rate as f64;
        if !self.0.contains_key(name) {
            if self.0.len() >= BUCKETS_MAX {
                self.0.clear();
            }
            self.0.insert(name.to_owned(), Bucket { left: full, at: now });
        }
        let Some(bucket) = self.0.get_mut(name) else { return Ok(()) };
        bucket.left = full.min(bucket.left + full * now.saturating_duration_since(bucket.at).as_secs_f64());
        bucket.at = now;
        if bucket.left < 1.0 {
            return Err(Error::TooManyRequests);
        }
        bucket.left -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_user_may_ask_so_often_in_a_second_and_others_do_not_count() {
        let (mut rates, begin) = (Rates::default(), Instant::now());
        let taken = |rates: &mut Rates, name: &str, at: u64| {
            let now = begin + Duration::from_millis(at);
            (0..100).take_while(|_| rates.take(name, 10, now).is_ok()).count()
        };
        assert_eq!(taken(&mut rates, "a", 0), 10);
        assert_eq!(taken(&mut rates, "a", 0), 0);
        assert_eq!(taken(&mut rates, "b", 0), 10);
        assert_eq!(taken(&mut rates, "a", 500), 5);
        assert_eq!(taken(&mut rates, "a", 60_000), 10, "what is not used is not saved");
        for user in 0..2 * BUCKETS_MAX {
            let _ = rates.take(&user.to_string(), 1, begin);
            assert!(rates.0.len() <= BUCKETS_MAX);
        }
    }
}
