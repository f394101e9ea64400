//! Five minutes of live figures of this member, for the console's charts.
//!
//! Owns a ring of samples. Invariant: its size is fixed, and a sample costs a few dozen microseconds every two seconds, whether anybody looks
//! or not. Absent: drawing (`http/console`), and the past beyond five minutes, which is Prometheus's.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;

use super::Api;
use crate::env::{Env, interval, process};
use crate::metrics::{Counted, RequestKind, metrics};

/// Between two samples.
const EVERY: Duration = Duration::from_secs(2);
const SAMPLES_MAX: usize = 150;

/// In which form a figure is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    PerSecond,
    Millis,
    Count,
    Mib,
}

/// One figure: what it is called, and its unit.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub name: &'static str,
    pub unit: Unit,
}

const fn figure(name: &'static str, unit: Unit) -> Figure {
    Figure { name, unit }
}

/// What is sampled, in the order of [`Sampled::values`].
pub const FIGURES: [Figure; 10] = [
    figure("writes", Unit::PerSecond),
    figure("reads", Unit::PerSecond),
    figure("write p50", Unit::Millis),
    figure("write p99", Unit::Millis),
    figure("log sync p99", Unit::Millis),
    figure("watchers", Unit::Count),
    figure("leases", Unit::Count),
    figure("memory", Unit::Mib),
    figure("data", Unit::Mib),
    figure("disk free", Unit::Mib),
];

/// What was so at one moment; a figure that nothing happened for is `None`.
#[derive(Clone, Debug)]
pub struct Sampled {
    pub values: [Option<f64>; FIGURES.len()],
}

/// The ring.
#[derive(Default)]
pub struct Figures(Mutex<VecDeque<Sampled>>);

impl Figures {
    /// Oldest first.
    pub fn list(&self) -> Vec<Sampled> {
        self.0.lock().iter().cloned().collect()
    }

    fn add(&self, sampled: Sampled) {
        let mut ring = self.0.lock();
        if ring.len() == SAMPLES_MAX {
            ring.pop_front();
        }
        ring.push_back(sampled);
    }
}

/// Counters at one moment.
struct Counters {
    writes: Vec<Counted>,
    reads: Vec<Counted>,
    syncs: Counted,
}

impl Counters {
    fn now() -> Self {
        use RequestKind::{DeleteRange, Put, Range, ReadonlyTxn, Txn};
        let all = metrics();
        Self {
            writes: [Put, DeleteRange, Txn].map(|kind| all.counted(kind)).into(),
            reads: [Range, ReadonlyTxn].map(|kind| all.counted(kind)).into(),
            syncs: Counted::of(&all.log_fsync),
        }
    }
}

fn sum(counted: &[Counted]) -> Counted {
    counted.iter().cloned().reduce(|a, b| a.plus(&b)).unwrap_or_default()
}

impl Api {
    /// Samples until shutdown.
    pub async fn sample_figures(self, env: Env) {
        let mut tick = interval(EVERY);
        // It comes at once, when nothing has happened yet and the data directory may not be there.
        tick.tick().await;
        let mut before = Counters::now();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = env.shutdown.cancelled() => return,
            }
            let now = Counters::now();
            self.shared.figures.add(self.sampled(&before, &now));
            before = now;
        }
    }

    fn sampled(&self, before: &Counters, now: &Counters) -> Sampled {
        let writes = sum(&now.writes).since(&sum(&before.writes));
        let reads = sum(&now.reads).since(&sum(&before.reads));
        let syncs = now.syncs.since(&before.syncs);
        let sample = self.sample();
        let per_second = |counted: &Counted| Some(counted.count as f64 / EVERY.as_secs_f64());
        let millis = |counted: &Counted, share: f64| counted.quantile(share).map(|seconds| seconds * 1000.0);
        let mib = |bytes: u64| Some(bytes as f64 / 1048576.0);
        let watchers = self.hub().map_or(0, |hub| hub.watchers());
        Sampled {
            values: [
                per_second(&writes),
                per_second(&reads),
                millis(&writes, 0.5),
                millis(&writes, 0.99),
                millis(&syncs, 0.99),
                Some(watchers as f64),
                Some(sample.leases as f64),
                mib(process::this_process().resident_bytes),
                mib(sample.data_bytes),
                mib(sample.disk_free_bytes),
            ],
        }
    }

    pub fn figures(&self) -> &Figures {
        &self.shared.figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_five_minutes() {
        let ring = Figures::default();
        for n in 0..2 * SAMPLES_MAX {
            ring.add(Sampled { values: [Some(n as f64); FIGURES.len()] });
        }
        let kept = ring.list();
        assert_eq!((kept.len(), kept[0].values[0]), (SAMPLES_MAX, Some(SAMPLES_MAX as f64)));
        assert_eq!(EVERY * SAMPLES_MAX as u32, Duration::from_secs(300));
    }
}
