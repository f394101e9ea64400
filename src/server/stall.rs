//! How late the event loop is: the longest that anything on it was kept from running.
//!
//! A task that wants to run every [`PERIOD`] notes how late it is each time. As late as it is, so late may a heartbeat be; so this
//! is what says that something long runs where it should not (`env::threads`). What a timer is late by itself, a millisecond, shows too.

use std::time::Duration;

use crate::env::{Env, Instant, sleep_until};
use crate::metrics::metrics;

/// A stall shorter than this is seen only now and then; it takes a thousandth of a core.
const PERIOD: Duration = Duration::from_millis(10);
/// A stall of this is as long as a heartbeat may take by default, and is worth a line in the log.
const LONG: Duration = Duration::from_millis(500);

/// Notes it until shutdown.
pub(super) async fn watch(env: Env) {
    loop {
        let due = Instant::now() + PERIOD;
        tokio::select! {
            () = sleep_until(due) => {}
            () = env.shutdown.cancelled() => return,
        }
        let late = due.elapsed();
        metrics().event_loop_stall.observe(late.as_secs_f64());
        if late >= LONG {
            tracing::warn!(
                ?late,
                "the event loop stood still: the machine is overloaded, was stopped, or something took too long"
            );
        }
    }
}
