//! How much memory the process may use, according to its control groups.
//!
//! Reads cgroup v2 and v1 through the disk seam. Absent: the machine's own memory, which is shared with others.

use std::path::{Path, PathBuf};

use super::Bytes;
use crate::env::Disk;
use crate::identity::read_small;

/// Data may take this share of the memory limit: twice it while a snapshot is built, and the rest of the process.
const QUOTA_PERCENT_OF_MEMORY: u64 = 40;

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

/// The lesser of `quota` and 40 % of the memory limit; None if `quota` is 0, which turns it off.
pub fn effective_quota(quota: Bytes, cgroup_limit: Option<u64>) -> Option<u64> {
    let bound = cgroup_limit.map_or(u64::MAX, |limit| limit / 100 * QUOTA_PERCENT_OF_MEMORY);
    (quota.0 > 0).then_some(quota.0.min(bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quota_is_bounded_by_memory() {
        let cases = [
            (Bytes::gib(2), None, Some(2 << 30)),
            (Bytes::gib(2), Some(1_000_000_000), Some(400_000_000)),
            (Bytes::mib(64), Some(1_000_000_000), Some(64 << 20)),
            (Bytes(0), Some(1_000_000_000), None),
            (Bytes(0), None, None),
        ];
        for (quota, limit, effective) in cases {
            assert_eq!(effective_quota(quota, limit), effective, "{quota} {limit:?}");
        }
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
