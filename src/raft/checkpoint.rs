//! The state store's writer: what apply changed goes to disk in spans of the log, behind apply's back.
//!
//! Owns the store on disk. Once an interval, or sooner when much has changed, it takes the journal and the log id that it leads to
//! under one lock, and appends them as one span; so the applied index cannot part from the data. After the state was replaced (a
//! snapshot was installed) or the journal overflowed, it writes everything afresh. An error pauses it; the store is opened anew later
//! and written afresh: the log and the snapshot file keep the data safe meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::convert::log_id_to_pb;
use super::recover::Recovered;
use super::state_machine::{Applied, Store, Unsaved};
use crate::env::{Env, Instant, sleep};
use crate::metrics::metrics;
use crate::pb::log::{Change, LogId, change};
use crate::storage::state;

/// After an error the store is left alone this long.
const REOPEN_AFTER: Duration = Duration::from_secs(30);
/// Changes of so many bytes do not wait for the end of the interval: the log's flushes wait behind what is flushed here, so much at a
/// time would be noticed (with a whole second's writes at a time, the p99 of puts was twice what it is).
const MUCH_BYTES: usize = 256 << 10;
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Records looked at in one go by cleaning; the rest waits for the next interval.
const CLEAN_BUDGET: usize = 64;
/// Changes of leases and of a standby's position, beyond two for each lease that lives, after which cleaning is worth its while.
const FACT_CHANGES_MAX: usize = 50_000;

/// Waits until it is time to write: an interval is over, much has changed, or somebody waits for it.
pub(super) async fn due(store: Arc<Store>, interval: Duration) {
    let begin = Instant::now();
    loop {
        tokio::select! {
            () = sleep(LOOK.min(interval)) => {}
            () = store.rewrite_asked() => return,
        }
        if begin.elapsed() >= interval || store.read(|s| s.kv.journal_bytes()) > MUCH_BYTES {
            return;
        }
    }
}

pub struct Checkpointer {
    env: Env,
    dir: PathBuf,
    options: state::Options,
    interval: Duration,
    pub(super) store: Arc<Store>,
    disk: state::Store,
    /// Where the chain on disk ends.
    from: Option<LogId>,
    /// The view that the cleaning pass under way goes by.
    cleaning: Option<Applied>,
    /// The compacted revision that the last whole pass went by.
    cleaned: i64,
    /// What was written of leases, and of a standby's position, since the last pass began; most of it is dead soon, compaction or not.
    fact_changes: usize,
}

impl Checkpointer {
    /// Goes on from what was recovered of the store in `dir`; writes once an `interval` at least.
    pub fn new(env: Env, dir: PathBuf, options: state::Options, interval: Duration, recovered: Recovered) -> Self {
        let Recovered { store, disk, from } = recovered;
        Self { env, dir, options, interval, store, disk, from, cleaning: None, cleaned: 0, fact_changes: 0 }
    }

    /// Runs until shutdown; the last span is written then, so that a restart is short. Blocks: give it a thread.
    pub async fn run(mut self) {
        let shutdown = self.env.shutdown.clone();
        while !shutdown.is_cancelled() {
            tokio::select! {
                () = due(self.store.clone(), self.interval) => {}
                () = shutdown.cancelled() => {}
            }
            if let Err(error) = self.step() {
                tracing::error!(%error, "state store failed; it is written afresh later, the log keeps the data safe");
                tokio::select! {
                    () = sleep(REOPEN_AFTER) => self.reopen(),
                    () = shutdown.cancelled() => return,
                }
            }
        }
    }

    pub(super) fn reopen(&mut self) {
        self.store.set_replaced();
        self.disk.close();
        match state::Store::open(&self.env, &self.dir, &self.options) {
            Ok(opened) => self.disk = opened.store,
            Err(error) => tracing::error!(%error, "state store cannot be opened"),
        }
    }

    /// Writes what changed since the last step.
    pub(super) fn step(&mut self) -> Result<(), state::Error> {
        match self.store.take_unsaved() {
            Unsaved::Everything => return self.rewrite(),
            Unsaved::Changes(changes, meta) if meta.applied != self.from => {
                let is_fact =
                    |c: &&Change| matches!(c.change, Some(change::Change::Lease(_) | change::Change::Role(_)));
                self.fact_changes += changes.iter().filter(is_fact).count();
                let start = Instant::now();
                self.disk.append(self.from, &meta, &changes)?;
                self.disk.checkpoint()?;
                metrics().checkpoint.observe(start.elapsed().as_secs_f64());
                self.from = meta.applied;
            }
            Unsaved::Changes(..) => {}
        }
        self.clean()
    }

    /// Frees what compaction has put out of reach, a bounded piece at a time.
    fn clean(&mut self) -> Result<(), state::Error> {
        let view = match self.cleaning.take() {
            Some(view) => view,
            None => {
                let now = self.store.view();
                // A view ahead of the chain would drop what only a later span makes dead.
                let stale = self.fact_changes > FACT_CHANGES_MAX + 2 * now.kv.leases().len();
                let worth = now.kv.compacted() > self.cleaned || stale;
                if !worth || now.log_id.as_ref().map(log_id_to_pb) != self.disk.durable() {
                    return Ok(());
                }
                self.fact_changes = 0;
                now
            }
        };
        let applied = view.log_id.as_ref().map(log_id_to_pb).expect("a compacted state has applied something");
        let is_live = |version: &crate::pb::KeyValue| view.kv.is_live(version);
        let is_live_lease = |lease: &crate::pb::log::Lease| view.kv.is_live_lease(lease);
        let is_live_fact = |change: &crate::pb::log::change::Change| view.kv.is_live_fact(change);
        let by = state::View {
            applied,
            compacted: view.kv.compacted(),
            is_live: &is_live,
            is_live_lease: &is_live_lease,
            is_live_fact: &is_live_fact,
        };
        let stats = self.disk.clean(&by, CLEAN_BUDGET)?;
        if stats.records_removed > 0 || stats.records_written > 0 {
            self.disk.checkpoint()?;
        }
        if stats.finished {
            self.cleaned = view.kv.compacted();
        } else {
            self.cleaning = Some(view);
        }
        Ok(())
    }

    fn rewrite(&mut self) -> Result<(), state::Error> {
        // The journal restarts at the very state that is written.
        let view = self.store.write(|s| {
            s.kv.take_journal();
            s.clone()
        });
        if view.log_id.is_none() {
            // Later, when there is something to write.
            self.store.set_replaced();
            return Ok(());
        }
        self.disk.rewrite(&view.meta(), &mut view.kv.changes().map(Ok))?;
        (self.cleaning, self.cleaned, self.fact_changes) = (None, view.kv.compacted(), 0);
        self.from = view.log_id.as_ref().map(log_id_to_pb);
        self.store.note_rewrite();
        tracing::info!(applied = self.from.map(|l| l.index), "state store written afresh");
        Ok(())
    }
}
