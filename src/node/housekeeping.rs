//! What a member does beside serving: frees compacted versions, keeps the log bounded, watches space, compacts by itself.
//!
//! Invariants: the log is purged only behind a snapshot file that was read back; apply never waits for any of this longer
//! than a slice; whether puts are refused is decided before proposing and never in apply.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;

use super::Node;
use crate::caller::Caller;
use crate::config::Compaction;
use crate::env::{Instant, interval, sleep};
use crate::kv;
use crate::pb::etcd::CompactionRequest;
use crate::pb::log::{Command, command};
use crate::storage::log::Log;

const TICK: Duration = Duration::from_millis(500);
/// Versions freed under one lock: a fraction of a millisecond.
const SWEEP_STEPS: usize = 256;
/// Between two such slices there are twice as long as one took, and this at least. A request goes through a dozen tasks, and would meet
/// a slice before each of them: without a rest, all requests took 10 ms more while a million versions were freed.
const SWEEP_REST: Duration = Duration::from_millis(1);
/// A snapshot that is under way is not asked for again; one that failed is, after this.
const SNAPSHOT_RETRY: Duration = Duration::from_secs(10);
/// A disk that has no more than so many times its reserve left beside it is nearly full.
const DISK_NEAR_RESERVES: u64 = 2;
/// Compacted history is kept at most this long for watchers to read; they are a few milliseconds behind.
const HISTORY_HOLD_MAX: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct Settings {
    pub data_dir: PathBuf,
    /// A snapshot is written, and the log purged behind it, beyond max(this, state bytes) ...
    pub log_bytes_max: u64,
    /// ... or this many entries.
    pub log_entries_max: u64,
    /// Entries kept behind a snapshot, so that a member that was away for a moment needs no snapshot; a quarter of
    /// `log_bytes_max` at most.
    pub log_entries_kept: u64,
    pub quota_bytes: Option<u64>,
    pub quota_warn_percent: u64,
    pub disk_reserve_bytes: u64,
    pub compaction: Compaction,
    pub heartbeat_interval: Duration,
}

pub struct Housekeeping {
    node: Node,
    log: Log,
    settings: Settings,
    auto: AutoCompaction,
    /// The snapshot that the log was last purged behind.
    purged_behind: Option<u64>,
    /// Bytes that may be left behind that snapshot.
    kept_bytes: u64,
    asked_at: Option<Instant>,
    /// Since when the sweep waits for watchers.
    held_since: Option<Instant>,
}

impl Housekeeping {
    pub fn new(node: Node, log: Log, settings: Settings) -> Self {
        let auto = AutoCompaction::new(settings.compaction);
        // A node has one housekeeping.
        let _ = node.space().log_room.set(log.room());
        let _ = node.space().quota_bytes.set(settings.quota_bytes.unwrap_or(u64::MAX));
        Self { node, log, settings, auto, purged_behind: None, kept_bytes: 0, asked_at: None, held_since: None }
    }

    pub async fn run(mut self) {
        let shutdown = self.node.env().shutdown.clone();
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.node.store().sweep_asked() => {
                    self.sweep().await;
                    continue;
                }
                () = shutdown.cancelled() => return,
            }
            self.sweep().await;
            self.watch_space();
            self.watch_log();
            self.bound_log().await;
            if let Some(revision) = self.auto.due(&self.node) {
                self.compact(revision).await;
            }
        }
    }

    /// Frees what was compacted, for so long as the other duties can wait. Watchers that are nearly up to date get what was compacted
    /// before they read it, unless that takes too long.
    async fn sweep(&mut self) {
        let begin = Instant::now();
        if self.node.store().is_history_wanted() {
            let since = *self.held_since.get_or_insert(begin);
            if since.elapsed() < HISTORY_HOLD_MAX {
                return;
            }
        }
        while self.node.store().read(|s| s.kv.sweep_pending()) {
            if begin.elapsed() >= TICK {
                return;
            }
            let slice = Instant::now();
            let mut large = Vec::new();
            self.node.store().try_write(|s| s.kv.sweep_but(SWEEP_STEPS, &mut large));
            if !large.is_empty() {
                self.node.env().drop_large(large);
            }
            sleep(SWEEP_REST.max(2 * slice.elapsed())).await;
        }
        self.held_since = None;
    }

    fn watch_space(&mut self) {
        let space = self.node.space();
        let free = self.node.env().disk.free_bytes(&self.settings.data_dir).unwrap_or(u64::MAX);
        let reserve = self.settings.disk_reserve_bytes;
        space.low_disk.store(free < reserve, Ordering::Relaxed);
        space.disk_free_bytes.store(free, Ordering::Relaxed);
        let bytes = self.node.store().read(|s| s.kv.bytes());
        // A snapshot takes as much as the data, and so does a state store that is written afresh.
        let needs = reserve.saturating_add(bytes.saturating_mul(2).max(DISK_NEAR_RESERVES * reserve));
        space.disk_near.store(free < needs, Ordering::Relaxed);
        let quota = self.settings.quota_bytes.unwrap_or(u64::MAX);
        let counted = self.node.store().read(|s| s.kv.counted(quota));
        let near = counted / 100 >= quota / 10_000 * self.settings.quota_warn_percent;
        space.quota_near.store(near, Ordering::Relaxed);
        let short = counted > quota || space.quorum_low_disk.load(Ordering::Relaxed);
        space.short.store(short, Ordering::Relaxed);
        let lacks_room = counted.saturating_add(space.refused_bytes.load(Ordering::Relaxed)) > quota;
        if !lacks_room {
            space.refused_bytes.store(0, Ordering::Relaxed);
        }
        space.lacks_room.store(lacks_room, Ordering::Relaxed);
        self.node.refresh_alarms();
    }

    /// Notes a disk that is too slow for the heartbeat, and a log that does not get shorter.
    fn watch_log(&mut self) {
        let (fsync, space) = (self.log.fsync_stats(), self.node.space());
        // The append deadline is the heartbeat: a disk that takes a tenth of it leaves no room for anything else.
        let slow = fsync.count >= 100 && fsync.recent_p99 * 10 > self.settings.heartbeat_interval;
        let micros = if slow { fsync.recent_p99.as_micros() as u64 } else { 0 };
        space.slow_fsync_micros.store(micros, Ordering::Relaxed);
        let bytes = self.log.bytes();
        let state_bytes = self.node.store().read(|s| s.kv.bytes());
        let long = bytes > 3 * self.settings.log_bytes_max.max(state_bytes);
        space.long_log_bytes.store(if long { bytes } else { 0 }, Ordering::Relaxed);
    }

    /// Whether what could be purged is still to be archived, and the log is not twice as long as it should be.
    fn is_log_held(&self, snapshot: Option<u64>, state_bytes: u64) -> bool {
        self.purged_behind != snapshot
            && snapshot >= Some(self.node.store().log_wanted_from())
            && self.log.bytes() < 2 * self.settings.log_bytes_max.max(state_bytes)
    }

    /// Asks for a snapshot when the log is long, and purges behind the newest one.
    async fn bound_log(&mut self) {
        let (snapshot, applied) = {
            let metrics = self.node.raft().metrics();
            let m = metrics.borrow_watched();
            (m.snapshot.as_ref().map(|l| l.index()), m.last_applied.as_ref().map(|l| l.index()))
        };
        let state_bytes = self.node.store().read(|s| s.kv.bytes());
        if self.is_log_held(snapshot, state_bytes) {
            return;
        }
        if let Some(snapshot) = snapshot
            && self.purged_behind != Some(snapshot)
        {
            let kept = snapshot.saturating_sub(self.settings.log_entries_kept);
            let upto = kept.max(self.log.index_before(self.settings.log_bytes_max / 4)).min(snapshot);
            if self.node.raft().trigger().purge_log(upto).await.is_ok() {
                self.purged_behind = Some(snapshot);
                self.kept_bytes = self.settings.log_bytes_max / 4;
            }
        }
        let behind = self.log.bytes().saturating_sub(self.kept_bytes);
        let long = behind > self.settings.log_bytes_max.max(state_bytes)
            || applied.unwrap_or(0).saturating_sub(snapshot.unwrap_or(0)) > self.settings.log_entries_max;
        if long && self.asked_at.is_none_or(|at| at.elapsed() >= SNAPSHOT_RETRY) {
            tracing::info!(log_bytes = behind, state_bytes, "the log is long: writing a snapshot");
            self.asked_at = Some(Instant::now());
            let _ = self.node.raft().trigger().snapshot().await;
        }
    }

    async fn compact(&self, revision: i64) {
        let request = CompactionRequest { revision, physical: false };
        let command = Command::new(kv::CLUSTER_VERSION_MIN, command::Request::Compact(request));
        match self.node.propose(&Caller::Internal, command).await {
            Ok(_) => tracing::info!(revision, "compacted by itself"),
            Err(error) => tracing::warn!(revision, %error, "auto-compaction failed; it is tried again"),
        }
    }
}

/// When to compact without being asked, as etcd's `--auto-compaction-mode`: the leader only.
struct AutoCompaction {
    policy: Compaction,
    /// Periodic: revisions at past moments, oldest first; bounded by one sample a tenth of the period.
    samples: std::collections::VecDeque<(Instant, i64)>,
    checked: Option<Instant>,
}

const REVISION_CHECK: Duration = Duration::from_secs(5 * 60);

impl AutoCompaction {
    fn new(policy: Compaction) -> Self {
        Self { policy, samples: Default::default(), checked: None }
    }

    /// The revision to compact at now, if any.
    fn due(&mut self, node: &Node) -> Option<i64> {
        let (revision, compacted) = node.store().read(|s| (s.kv.revision(), s.kv.compacted()));
        // A standby forgets what its source does.
        let leads = node.status().is_leader && node.store().is_writable();
        self.decide(Instant::now(), revision, compacted, leads)
    }

    fn decide(&mut self, now: Instant, revision: i64, compacted: i64, leads: bool) -> Option<i64> {
        let target = match self.policy {
            Compaction::Off => None,
            Compaction::Revision(keep) => {
                if self.checked.is_some_and(|at| now - at < REVISION_CHECK) {
                    return None;
                }
                self.checked = Some(now);
                Some(revision - keep as i64)
            }
            Compaction::Periodic(period) => {
                // Every member keeps samples, so that a new leader goes on where the old one was.
                let step = (period / 10).max(Duration::from_secs(1));
                if self.samples.back().is_none_or(|(at, _)| now - *at >= step) {
                    self.samples.push_back((now, revision));
                }
                let mut due = None;
                while self.samples.front().is_some_and(|(at, _)| now - *at >= period) {
                    due = self.samples.pop_front().map(|(_, revision)| revision);
                }
                due
            }
        };
        target.filter(|target| leads && *target > compacted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn periodic_compaction_keeps_the_period() {
        let mut auto = AutoCompaction::new(Compaction::Periodic(Duration::from_secs(100)));
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(auto.decide(at(0), 10, 0, true), None);
        assert_eq!(auto.decide(at(50), 20, 0, true), None);
        assert_eq!(auto.decide(at(100), 30, 0, true), Some(10));
        assert_eq!(auto.decide(at(149), 40, 10, true), None);
        assert_eq!(auto.decide(at(150), 50, 10, false), None, "only the leader compacts");
    }

    #[tokio::test]
    async fn revision_compaction_keeps_the_newest_revisions() {
        let mut auto = AutoCompaction::new(Compaction::Revision(1000));
        let start = Instant::now();
        assert_eq!(auto.decide(start, 5000, 0, true), Some(4000));
        assert_eq!(auto.decide(start + Duration::from_secs(1), 6000, 0, true), None, "looked at every five minutes");
        assert_eq!(auto.decide(start + REVISION_CHECK, 900, 0, true), None);
    }
}
