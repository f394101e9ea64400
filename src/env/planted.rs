//! Deliberate faults, compiled in for tests only: the proof that the tests would find it.
//!
//! `planted!("name")` stands where the fault would be made, and is true in a thread that switched it on with `plant`: so for all of a
//! simulation, which has one thread. Without the feature `testing` it is the word `false`, and nothing of a fault, not even
//! its name, is in the program.

#[cfg(any(test, feature = "testing"))]
mod switched {
    use std::cell::Cell;

    /// Every planted fault and what it breaks.
    pub const PLANTED: &[(&str, &str)] = &[
        ("ack-before-fsync", "the log answers before its frame is flushed"),
        ("vote-not-persisted", "a vote is given and never written"),
        ("torn-tail-accepted", "recovery takes records of a frame that is not whole or does not validate"),
        ("crc-not-checked", "log records are believed whatever their checksum says"),
        ("mark-not-checked", "a log that ends before its mark is taken for a shorter one"),
        ("mark-before-sync", "the log's mark names a frame before its sync has returned"),
        ("memory-not-asked", "a member that has started votes without asking what the others remember of its disk"),
        ("log-truncation-skipped", "a conflicting tail is dropped in memory and stays on disk"),
        ("applied-apart-from-data", "the state store's applied index is one behind its data"),
        ("snapshot-without-membership", "a snapshot file forgets who the members are"),
        ("compaction-drops-live-version", "compaction removes the version that is still current at its revision"),
        ("read-without-read-index", "a linearizable read answers from local memory"),
        ("stale-lease-read", "a leader answers reads without asking whether it still leads"),
        ("read-before-applied", "a read does not wait until the read index is applied"),
        ("forwarded-proposal-retried", "a forwarded proposal whose answer was lost is proposed again in silence"),
        (
            "answer-before-own-apply",
            "a member answers a write with what the leader says, before it has applied it itself",
        ),
        (
            "lease-revoked-by-stalled-leader",
            "a leader ends leases without asking a quorum, and whatever term it is by then",
        ),
        ("two-ids-for-one-slot", "the old member of a slot stays in the membership beside its successor"),
        ("proposal-not-checked", "a leader proposes whatever another member forwards"),
        ("watch-skips-hand-over", "a watcher that has caught up is handed over one revision too late"),
    ];

    thread_local! {
        static ON: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// True if the fault `name` is switched on in this thread.
    pub fn is_planted(name: &'static str) -> bool {
        debug_assert!(PLANTED.iter().any(|(known, _)| *known == name), "{name} is not in PLANTED");
        ON.get() == Some(name)
    }

    /// Switches one fault on for this thread, or all off; false if there is none of that name.
    pub fn plant(name: Option<&str>) -> bool {
        let known = name.and_then(|name| PLANTED.iter().find(|(known, _)| *known == name));
        ON.set(known.map(|(known, _)| *known));
        known.is_some() == name.is_some()
    }
}

#[cfg(any(test, feature = "testing"))]
pub use switched::{PLANTED, is_planted, plant};

/// Whether a planted fault is switched on.
#[cfg(any(test, feature = "testing"))]
macro_rules! planted {
    ($name:literal) => {
        $crate::env::planted::is_planted($name)
    };
}

/// No fault is in what is shipped.
#[cfg(not(any(test, feature = "testing")))]
macro_rules! planted {
    ($name:literal) => {
        false
    };
}

pub(crate) use planted;
