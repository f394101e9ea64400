//! The simulation: whole members in one process, on simulated time, network and disks, under faults that a seed decides.
//!
//! Everything above `env` is real: formation, openraft, tonic, the log, snapshot files, the API. `world` is the machines, `nemesis`
//! what happens to them, `users` beside this module who uses them; [`run`] plays one seed and judges it.
//!
//! The same seed gives the same trace, bit by bit, if the process gets its entropy from the seed too: tokio's order of ready
//! branches and of waiters, openraft's timeouts and hash maps draw from `getrandom`. The example `quorate-sim` gives each seed
//! a process in which `getrandom` is seeded; in the library's own tests, which share a process, it is not, and a seed repeats its
//! faults but not its schedule.

mod judge;
mod nemesis;
mod subscriber;
mod world;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::env::planted::plant;
use crate::env::sim::trace;

pub use super::verdict::Violation;
pub use nemesis::Fault;
pub use world::World;

/// One run.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub seed: u64,
    /// The planted fault that is on.
    pub planted: Option<String>,
    /// Keep the whole trace.
    pub keep_trace: bool,
}

/// What came of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub seed: u64,
    /// Named counts: faults, operations by outcome, steps of the checker.
    pub counts: BTreeMap<String, u64>,
    pub trace_hash: u64,
    pub trace_events: u64,
    pub simulated_ms: u64,
    pub violation: Option<Violation>,
}

/// A run's end: what was counted, or what was wrong.
type Run = Result<(), Violation>;

/// Plays one seed with the usual scenario.
pub fn run(settings: &Settings) -> Report {
    run_traced(settings).0
}

/// As [`run`]; with the trace's text, if it is kept.
pub fn run_traced(settings: &Settings) -> (Report, String) {
    play(settings, async |world| nemesis::run(world).await)
}

/// Plays `scenario` on a world of this seed, then judges it. Also returns the trace's text, if it is kept.
pub fn play(settings: &Settings, scenario: impl AsyncFnOnce(&mut World) -> Run) -> (Report, String) {
    assert!(plant(settings.planted.as_deref()), "no planted fault is called {:?}", settings.planted);
    trace::begin(settings.keep_trace);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("a runtime can be built");
    let mut report = Report { seed: settings.seed, ..Report::default() };
    let played = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let _listening = tracing::subscriber::set_default(subscriber::Tracer);
        runtime.block_on(async {
            let begun = crate::env::Instant::now();
            let mut world = World::new(settings.seed);
            let mut outcome = scenario(&mut world).await;
            if outcome.is_ok() {
                outcome = judge::judge(&mut world).await;
            } else {
                world.stop_clients().await;
            }
            (outcome.err(), world.counts(), begun.elapsed())
        })
    }));
    let summary = trace::summary();
    (report.trace_hash, report.trace_events) = (summary.hash, summary.events);
    match played {
        Ok((violation, counts, took)) => {
            (report.violation, report.counts) = (violation, counts);
            report.simulated_ms = took.as_millis() as u64;
        }
        Err(panic) => report.violation = Some(Violation::new("panic", panic_text(&*panic))),
    }
    // What the members left behind is dropped with the runtime, and must not be judged.
    runtime.shutdown_timeout(Duration::from_secs(1));
    plant(None);
    (report, trace::text())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "a panic".into())
}
