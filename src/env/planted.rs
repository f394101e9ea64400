//! Deliberate faults, each compiled in for tests only: the proof that the tests would find it.
//!
//! One is switched on for a thread with [`plant`], and so for all of a simulation, which has one thread. Without the feature
//! `testing`, [`planted`] is `false` at compile time, and nothing of a fault is in the program.

/// Every planted fault and what it breaks.
pub const PLANTED: &[(&str, &str)] = &[
    ("ack-before-fsync", "the log answers before its frame is flushed"),
    ("vote-not-persisted", "a vote is given and never written"),
    ("torn-tail-accepted", "recovery takes records of a frame that is not whole or does not validate"),
    ("crc-not-checked", "log records are believed whatever their checksum says"),
    ("log-truncation-skipped", "a conflicting tail is dropped in memory and stays on disk"),
    ("applied-apart-from-data", "the state store's applied index is one behind its data"),
    ("snapshot-without-membership", "a snapshot file forgets who the members are"),
    ("compaction-drops-live-version", "compaction removes the version that is still current at its revision"),
    ("read-without-read-index", "a linearizable read answers from local memory"),
    ("stale-lease-read", "a leader answers reads without asking whether it still leads"),
    ("read-before-applied", "a read does not wait until the read index is applied"),
    ("forwarded-proposal-retried", "a forwarded proposal whose answer was lost is proposed again in silence"),
    ("watch-skips-hand-over", "a watcher that has caught up is handed over one revision too late"),
    ("two-ids-for-one-slot", "the old member of a slot stays in the membership beside its successor"),
];

#[cfg(any(test, feature = "testing"))]
mod switched {
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// True if the fault `name` is switched on in this thread.
    pub fn planted(name: &'static str) -> bool {
        debug_assert!(super::PLANTED.iter().any(|(known, _)| *known == name), "{name} is not in PLANTED");
        PLANTED.get() == Some(name)
    }

    /// Switches one fault on for this thread, or all off; false if there is none of that name.
    pub fn plant(name: Option<&str>) -> bool {
        let known = name.and_then(|name| super::PLANTED.iter().find(|(known, _)| *known == name));
        PLANTED.set(known.map(|(known, _)| *known));
        known.is_some() == name.is_some()
    }
}

#[cfg(any(test, feature = "testing"))]
pub use switched::{plant, planted};

/// No fault is in what is shipped.
#[cfg(not(any(test, feature = "testing")))]
#[inline(always)]
pub const fn planted(_name: &'static str) -> bool {
    false
}
