//! A control group with a memory limit, for the pods of a test: what a container has.
//!
//! Absent: limits of anything else. Where control groups cannot be made, a test says so and is skipped.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::tools::skip;

/// Removed at the end of the test, when no process is in it any more.
pub struct MemoryGroup {
    dir: PathBuf,
}

impl MemoryGroup {
    /// A group below the one of this process; `None` where that is not allowed.
    #[track_caller]
    pub fn new(limit_bytes: u64) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("quorate-it-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let (root, file) = match controllers {
                "" => ("/sys/fs/cgroup", "memory.max"),
                list if list.split(',').any(|one| one == "memory") => {
                    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
                }
                _ => continue,
            };
            let dir = Path::new(root).join(path.trim_start_matches('/')).join(&name);
            if std::fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = Self { dir };
            if std::fs::write(group.dir.join(file), limit_bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        skip(
            "no control group with a memory limit can be made here; it takes root and cgroup v1, or v2 with memory delegated",
            false,
        );
        None
    }

    /// The file that a process writes its id to, to be in it.
    pub fn entry(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.dir);
    }
}
