//! How far long work is, for whoever asks meanwhile: a member that loads its state says so.
//!
//! Written by the one thread that works, read by any. Absent: what the work is, and logging it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

/// Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// `None`: nothing is under way.
    work: RwLock<Option<&'static str>>,
    done_bytes: AtomicU64,
    /// About as many, for what is on disk is counted before it is read; 0: not known.
    total_bytes: AtomicU64,
}

impl Progress {
    /// Something begins; `work` says what, as in "loads its state".
    pub fn begin(&self, work: &'static str, total_bytes: u64) {
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
        *self.0.work.write() = Some(work);
    }

    pub fn add(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn end(&self) {
        *self.0.work.write() = None;
    }

    /// What is under way and how far it is, as in "loads its state: 312 of 500 MiB"; `None` if nothing is.
    pub fn describe(&self) -> Option<String> {
        let work = (*self.0.work.read())?;
        let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed).div_ceil(1 << 20);
        Some(match (mib(&self.0.done_bytes), mib(&self.0.total_bytes)) {
            (_, 0) => work.to_owned(),
            (done, total) => format!("{work}: {} of {total} MiB", done.min(total)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_while_work_is_under_way() {
        let (progress, mib) = (Progress::default(), 1 << 20);
        assert_eq!(progress.describe(), None);
        progress.begin("reads its log", 0);
        assert_eq!(progress.describe().as_deref(), Some("reads its log"));
        progress.begin("loads its state", 500 * mib);
        let other = progress.clone();
        other.add(312 * mib);
        assert_eq!(progress.describe().as_deref(), Some("loads its state: 312 of 500 MiB"));
        other.add(400 * mib);
        assert_eq!(progress.describe().as_deref(), Some("loads its state: 500 of 500 MiB"), "the total is an estimate");
        progress.end();
        assert_eq!(progress.describe(), None);
    }
}
