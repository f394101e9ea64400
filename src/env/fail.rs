//! Named places at which a crash test kills the process: between two steps that must each be safe to stop at.
//!
//! Compiled in with the feature `testing` only; else [`fail_point`] is nothing. A test sets `QUORATE_FAIL_POINT` to one of
//! [`FAIL_POINTS`] in the environment of the process that it starts, and restarts it without.

/// The environment variable that names the place to die at.
pub const VARIABLE: &str = "QUORATE_FAIL_POINT";

/// Every place, so that a test can go through all of them.
pub const FAIL_POINTS: &[&str] = &[
    // A new self: nothing of it, its directory, its directory but `current` names the old one, `current` names it.
    "identity.before_mint",
    "identity.minted",
    "identity.before_switch",
    "identity.switched",
    // A formation in this member: proposed but not accepted, accepted (fsynced), sent to the others, about to be handed to
    // Raft, the log exists, Raft has been initialized.
    "formation.before_accept",
    "formation.accepted",
    "formation.after_propose",
    "formation.before_initialize",
    "log.before_started",
    "log.started",
    "formation.initialized",
    // A formation that begins with a backup: the moment is known, its state is on this member's disk.
    "restore.resolved",
    "restore.written",
    // A formation that is given up.
    "formation.before_abandon",
    "formation.abandoned",
    // A joiner: told that it was added, and its cluster id fsynced.
    "join.before_adopt",
    "join.adopted",
    "join.added",
    "join.before_cluster",
    "join.cluster_set",
];

/// Dies here, without cleaning up, if the environment says so.
#[cfg(feature = "testing")]
pub fn fail_point(name: &str) {
    debug_assert!(FAIL_POINTS.contains(&name), "{name} is not in FAIL_POINTS");
    if std::env::var(VARIABLE).is_ok_and(|wanted| wanted == name) {
        eprintln!("fail point {name}: aborting");
        std::process::abort();
    }
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn fail_point(_name: &str) {}

/// The environment variable that names a key whose value this process gets wrong when it applies a put.
pub const CORRUPT_VARIABLE: &str = "QUORATE_CORRUPT_KEY";

/// The key whose value is to be got wrong: a fault of memory or of apply.
#[cfg(feature = "testing")]
pub fn corrupt_key() -> Option<&'static str> {
    static KEY: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var(CORRUPT_VARIABLE).ok());
    KEY.as_deref()
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn corrupt_key() -> Option<&'static str> {
    None
}

/// The environment variable that names a key whose put this process proposes as bytes that nobody can decode.
pub const POISON_VARIABLE: &str = "QUORATE_POISON_KEY";

/// The key whose put is to become an entry that no member can apply.
#[cfg(feature = "testing")]
pub fn poison_key() -> Option<&'static str> {
    static KEY: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var(POISON_VARIABLE).ok());
    KEY.as_deref()
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn poison_key() -> Option<&'static str> {
    None
}

/// The apply version of the older build that a test has this process play, from `QUORATE_TEST_APPLY_VERSION`.
#[cfg(feature = "testing")]
pub fn played_apply_version() -> Option<u32> {
    static PLAYED: std::sync::OnceLock<Option<u32>> = std::sync::OnceLock::new();
    *PLAYED.get_or_init(|| std::env::var("QUORATE_TEST_APPLY_VERSION").ok()?.parse().ok())
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn played_apply_version() -> Option<u32> {
    None
}

/// The environment variable that names how many milliseconds each record of the state takes to load.
pub const SLOW_LOAD_VARIABLE: &str = "QUORATE_SLOW_LOAD";

/// Waits as long as a test wants the loading of a record to take.
#[cfg(feature = "testing")]
pub fn slow_load() {
    static MILLIS: std::sync::LazyLock<Option<u64>> =
        std::sync::LazyLock::new(|| std::env::var(SLOW_LOAD_VARIABLE).ok()?.parse().ok());
    if let Some(millis) = *MILLIS {
        std::thread::sleep(std::time::Duration::from_millis(millis));
    }
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn slow_load() {}

/// The environment variable that names how many milliseconds each sync of the log takes longer.
pub const SLOW_SYNC_VARIABLE: &str = "QUORATE_SLOW_SYNC";

/// Waits as long as a test wants a sync of the log to take longer.
#[cfg(feature = "testing")]
pub fn slow_sync() {
    static MILLIS: std::sync::LazyLock<Option<u64>> =
        std::sync::LazyLock::new(|| std::env::var(SLOW_SYNC_VARIABLE).ok()?.parse().ok());
    if let Some(millis) = *MILLIS {
        std::thread::sleep(std::time::Duration::from_millis(millis));
    }
}

#[cfg(not(feature = "testing"))]
#[inline(always)]
pub fn slow_sync() {}
