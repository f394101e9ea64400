//! How much memory the process may use, according to its control groups, and what each part of it may take of that.
//!
//! Reads cgroup v2 and v1 through the disk seam. Where there is a limit, every setting that is an amount of memory is lowered until all
//! of them fit into it together, at their most: what the process takes by itself, the data at its quota, what is held for clients, what
//! waits, and the caches. Invariant (a test goes through all limits): that sum is at most the limit. A limit in which nothing useful
//! fits is refused. Absent: the machine's own memory, which is shared with others.

use std::path::{Path, PathBuf};

use super::{Bytes, Config, Error};
use crate::env::Disk;
use crate::identity::read_small;

const MIB: u64 = 1 << 20;
/// The least limit that a member can serve in.
const LIMIT_LEAST: u64 = 128 * MIB;
/// The program, its threads, connections to members, the state store's own, and buffers of the log.
const FIXED_BYTES: u64 = 64 * MIB;
/// Backups: a record of changes while it is sealed, sent and read back, and parts of a full one. A larger limit is needed for them.
const BACKUP_BYTES: u64 = 32 * MIB;
const LIMIT_LEAST_WITH_BACKUP: u64 = 192 * MIB;
/// Data may take this share of a large limit, and this of what is left of a small one.
const QUOTA_PERCENT_OF_LIMIT: u64 = 40;
const QUOTA_PERCENT_OF_REST: u64 = 45;
/// What data takes, in percent of what is counted: the allocator's rounding, tombstones that may pass the quota by a quarter (`kv/growth`),
/// and versions that a snapshot, a backup or a slow reader keeps although they are compacted.
const DATA_PERCENT: u64 = 150;
/// What is in use of each amount at its most, in percent of the setting: a queued write is there as a request and as an entry of the log,
/// and the state store's cache counts pages without their overhead.
const QUEUE_PERCENT: u64 = 200;
const STATE_CACHE_PERCENT: u64 = 150;
/// What the state store needs; the least limit has room for it beside all else.
const STATE_CACHE_LEAST: Bytes = Bytes::mib(1);

/// cgroup v1 writes "no limit" as the greatest multiple of the page size.
const V1_UNLIMITED: u64 = 1 << 62;

/// The least memory limit, in bytes, of the process's control group and those above it; None: there is none.
pub fn cgroup_memory_limit(disk: &dyn Disk) -> Option<u64> {
    let text = |path: &Path| String::from_utf8(read_small(disk, path).ok()?).ok();
    let membership = text(Path::new("/proc/self/cgroup"))?;
    let limits = membership.lines().flat_map(limit_files).filter_map(|path| {
        let limit: u64 = text(&path)?.trim().parse().ok()?;
        (limit < V1_UNLIMITED).then_some(limit)
    });
    limits.min()
}

/// The limit files of one line of `/proc/self/cgroup`, `id:controllers:path`: its own and its ancestors'. The root is
/// among them, for in a container without a cgroup namespace the path is the host's and only the root is there.
fn limit_files(line: &str) -> Vec<PathBuf> {
    let mut parts = line.splitn(3, ':');
    let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        return Vec::new();
    };
    let (root, file) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        list if list.split(',').any(|name| name == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return Vec::new(),
    };
    let own = Path::new(root).join(path.trim_start_matches('/'));
    own.ancestors().take_while(|at| at.starts_with(root)).map(|at| at.join(file)).collect()
}

/// The largest quota within a limit.
fn quota_max(limit: u64, fixed: u64) -> u64 {
    let rest = limit.saturating_sub(fixed);
    (limit / 100 * QUOTA_PERCENT_OF_LIMIT).min(rest / 100 * QUOTA_PERCENT_OF_REST)
}

impl Config {
    /// Whether backups are made, or followed.
    fn has_store(&self) -> bool {
        self.backup.is_on() || !self.restore.follow.is_empty()
    }

    /// What does not depend on amounts that are set.
    fn fixed_bytes(&self) -> u64 {
        FIXED_BYTES + if self.has_store() { BACKUP_BYTES } else { 0 }
    }

    /// These settings with every amount of memory lowered to what fits into the limit. A quota of 0 stays what it is: no quota.
    ///
    /// Errors: the limit is too small for a member that serves.
    pub fn within_memory(mut self, limit: Option<u64>) -> Result<Self, Error> {
        let Some(limit) = limit else { return Ok(self) };
        let least = if self.has_store() { LIMIT_LEAST_WITH_BACKUP } else { LIMIT_LEAST };
        if limit < least {
            return Err(Error::Memory { limit: Bytes(limit), least: Bytes(least) });
        }
        let fixed = self.fixed_bytes();
        let quota = &mut self.storage.quota_bytes;
        quota.0 = quota.0.min(quota_max(limit, fixed));
        // Without a quota the data's part is kept free all the same.
        let data = if quota.0 > 0 { quota.0 } else { quota_max(limit, fixed) };
        let rest = limit - fixed - data / 100 * DATA_PERCENT;
        // Their sum, at their most, is less than 31 of 32 parts.
        let parts = |count: u64| Bytes(rest / 32 * count);
        for (setting, most) in [
            (&mut self.limits.receive_bytes_max, parts(8)),
            (&mut self.limits.answer_bytes_max, parts(8)),
            (&mut self.raft.queue_bytes_max, parts(4)),
            (&mut self.state.journal_bytes_max, parts(4)),
            (&mut self.log.cache_bytes, parts(1)),
            (&mut self.state.cache_bytes, parts(1).max(STATE_CACHE_LEAST)),
        ] {
            *setting = (*setting).min(most);
        }
        self.raft.batch_bytes_max = self.raft.batch_bytes_max.min(self.raft.queue_bytes_max);
        self.validate()?;
        Ok(self)
    }

    /// What all amounts of memory come to at their most.
    pub fn memory_bytes_max(&self) -> u64 {
        let of = |bytes: Bytes, percent: u64| (bytes.0 / 100).saturating_mul(percent);
        [
            self.fixed_bytes(),
            of(self.storage.quota_bytes, DATA_PERCENT),
            self.limits.receive_bytes_max.0,
            self.limits.answer_bytes_max.0,
            of(self.raft.queue_bytes_max, QUEUE_PERCENT),
            self.state.journal_bytes_max.0,
            self.log.cache_bytes.0,
            of(self.state.cache_bytes, STATE_CACHE_PERCENT),
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within(limit: u64, change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config.within_memory(Some(limit)).unwrap_or_else(|error| panic!("{limit}: {error}"))
    }

    #[test]
    fn quota_is_bounded_by_memory() {
        for (quota, limit, effective) in [
            (2048, 128, 28),
            (2048, 256, 86),
            (2048, 512, 201),
            (2048, 1024, 409),
            (2048, 4096, 1638),
            (2048, 16384, 2048),
            (64, 1024, 64),
            (0, 1024, 0),
        ] {
            let config = within(limit * MIB, |c| c.storage.quota_bytes = Bytes::mib(quota));
            assert_eq!(config.storage.quota_bytes.0 / MIB, effective, "{quota} {limit}");
        }
        let unlimited = Config::default();
        assert_eq!(unlimited.clone().within_memory(None).unwrap(), unlimited);
    }

    /// At every limit, whatever is set, all parts together fit, and each is enough to serve with.
    #[test]
    fn all_parts_fit_into_the_limit_together() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for mib in (128..2048).chain((2048..100_000).step_by(777)) {
            let limit = mib * MIB + random.u64(..MIB);
            let config = within(limit, |c| {
                if random.bool() {
                    c.storage.quota_bytes = Bytes(random.u64(1..limit * 2));
                    c.limits.receive_bytes_max = Bytes(random.u64(2 * MIB..limit * 2));
                    c.limits.answer_bytes_max = Bytes(random.u64(2 * MIB..limit * 2));
                    c.state.cache_bytes = Bytes(random.u64(MIB..limit));
                }
            });
            let most = config.memory_bytes_max();
            assert!(most <= limit, "{mib} MiB: {most}");
            let request = config.limits.request_bytes_max;
            assert!(config.limits.receive_bytes_max >= request && config.limits.answer_bytes_max >= request);
            assert!(config.raft.queue_bytes_max >= request);
            assert!(config.state.cache_bytes.0 >= 256 << 10, "{mib} MiB: {}", config.state.cache_bytes);
        }
    }

    #[test]
    fn a_limit_too_small_to_serve_is_refused_with_the_least_one() {
        for limit in [0, MIB, 127 * MIB] {
            let text = Config::default().within_memory(Some(limit)).unwrap_err().to_string();
            assert!(text.contains(&Bytes(limit).to_string()) && text.contains("at least 128MiB"), "{text}");
        }
        let mut large = Config::default();
        large.limits.request_bytes_max = Bytes::mib(10);
        let text = large.within_memory(Some(128 * MIB)).unwrap_err().to_string();
        assert!(text.contains("limits.request_bytes_max"), "{text}");
    }

    #[test]
    fn limit_files_of_both_versions() {
        let names = |line| limit_files(line).iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(names("0::/"), ["/sys/fs/cgroup/memory.max"]);
        assert_eq!(
            names("0::/kubepods/pod1"),
            [
                "/sys/fs/cgroup/kubepods/pod1/memory.max",
                "/sys/fs/cgroup/kubepods/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            names("9:memory:/a"),
            ["/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(names("3:cpu,cpuacct:/a").is_empty() && names("junk").is_empty());
    }

    #[test]
    fn least_limit_counts_and_max_is_none() {
        let files = crate::config::tests::Files::new(&[
            ("/proc/self/cgroup", "0::/a/b\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/memory.max", "536870912\n"),
            ("/sys/fs/cgroup/memory.max", "1073741824\n"),
        ]);
        assert_eq!(cgroup_memory_limit(&files), Some(512 << 20));
        let unlimited = crate::config::tests::Files::new(&[
            ("/proc/self/cgroup", "4:memory:/x\n0::/x\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(cgroup_memory_limit(&unlimited), None);
        assert_eq!(cgroup_memory_limit(&crate::config::tests::Files::new(&[])), None);
    }
}
