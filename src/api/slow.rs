//! Requests on keys that take long are one line in the log: which method, which keys, and what they waited for.
//!
//! Invariants: a value is never logged, and of a key [`KEY_CHARS_MAX`] characters; how many lines there are is bounded by `telemetry::limit`;
//! a request that is quick costs two looks at the clock. What it waited for is told in the order in which it did: who asks (its token or
//! password), the read index (a majority confirms the leader), Raft (the queue, the log on a majority of disks, and apply), the read itself.
//! Absent: sending, which begins when the answer is made; the histograms have all requests.

use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;

use super::Api;
use crate::env::Instant;
use crate::identity::shown;

const KEY_CHARS_MAX: usize = 64;

/// One request under way. It is told of when it is dropped, whether it was answered or given up.
pub(super) struct Slow {
    method: &'static str,
    key: Bytes,
    range_end: Bytes,
    /// Zero: nothing is told.
    threshold: Duration,
    begun: Instant,
    /// For what it waited, and until when.
    waits: [(&'static str, Instant); 3],
    told: u8,
    has_ended: bool,
    read_keys: Option<i64>,
}

impl Api {
    pub(super) fn slow(&self, method: &'static str, key: &Bytes, range_end: &Bytes) -> Slow {
        self.slow_since(Instant::now(), method, key, range_end)
    }

    pub(super) fn slow_since(&self, begun: Instant, method: &'static str, key: &Bytes, range_end: &Bytes) -> Slow {
        Slow {
            method,
            key: key.clone(),
            range_end: range_end.clone(),
            threshold: self.shared.slow_request,
            begun,
            waits: [("", begun); 3],
            told: 0,
            has_ended: false,
            read_keys: None,
        }
    }
}

impl Slow {
    /// Until now it waited for `what`.
    pub(super) fn waited(&mut self, what: &'static str) {
        if let Some(wait) = self.waits.get_mut(usize::from(self.told)) {
            *wait = (what, Instant::now());
            self.told += 1;
        }
    }

    /// As [`Self::waited`], for the last time; returns how long all of it took.
    pub(super) fn ended(&mut self, what: &'static str) -> Duration {
        self.waited(what);
        self.has_ended = true;
        self.last() - self.begun
    }

    /// Until when is known what it waited for.
    fn last(&self) -> Instant {
        usize::from(self.told).checked_sub(1).map_or(self.begun, |newest| self.waits[newest].1)
    }

    pub(super) fn read_keys(&mut self, keys: i64) {
        self.read_keys = Some(keys);
    }

    fn tell(&self, took: Duration) {
        let mut waited = String::new();
        let mut since = self.begun;
        for (what, until) in &self.waits[..usize::from(self.told)] {
            let _ = write!(waited, "{what} {} ms, ", (*until - since).as_millis());
            since = *until;
        }
        let rest = took - (since - self.begun);
        if rest >= Duration::from_millis(1) {
            let _ = write!(waited, "and {} ms more", rest.as_millis());
        } else {
            waited.truncate(waited.len().saturating_sub(2));
        }
        let (key, range_end) = (text(&self.key), text(&self.range_end));
        let (method, took, keys) = (self.method, format!("{} ms", took.as_millis()), self.read_keys);
        tracing::warn!(method, key, range_end, took, waited, keys, "slow request");
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let took = if self.has_ended { self.last() - self.begun } else { self.begun.elapsed() };
        if !self.threshold.is_zero() && took >= self.threshold {
            self.tell(took);
        }
    }
}

fn text(key: &[u8]) -> String {
    let text = String::from_utf8_lossy(&key[..key.len().min(4 * KEY_CHARS_MAX)]);
    let mut cut: String = shown(&text).chars().take(KEY_CHARS_MAX).collect();
    if cut.len() < key.len() && text.chars().count() > KEY_CHARS_MAX {
        cut.push_str("...");
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_key_little_is_shown_and_nothing_that_a_terminal_obeys() {
        assert_eq!(text(b"a/b"), "a/b");
        assert_eq!(text(b"\x1b[2J\xff"), "\u{fffd}[2J\u{fffd}");
        let long = text("ä".repeat(500).as_bytes());
        assert_eq!(long.chars().count(), KEY_CHARS_MAX + 3);
    }
}
