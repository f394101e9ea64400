//! A checker of leases: none ends before its time, and none ends while no quorum could know that it is over.
//!
//! A lease that was granted or kept alive at a moment between the call and its answer lives for its TTL from that moment on: so
//! it must not be seen ended before the *call* of its last renewal plus the TTL, less the error of the clocks. A leader that
//! lost its quorum cannot have it expired (etcd #15247): an end needs a time at which a quorum could be reached.
//! Absent: that leases end in time; how late is too late depends on the load, and is measured.

use std::collections::BTreeMap;
use std::time::Duration;

/// What happened to a lease; times are since the beginning, of the observer's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Granted or kept alive, acknowledged: asked at `called`, with the TTL that was answered.
    Renewed { called: Duration, ttl: Duration },
    /// A client revoked it, or asked to and does not know.
    Revoked { called: Duration },
    /// It was seen to be gone (a key of it deleted, TTL -1) at this time.
    Gone { seen: Duration },
}

/// One lease's story, in the order of `called` and `seen`.
#[derive(Clone, Debug, Default)]
pub struct Story {
    pub steps: Vec<Step>,
}

impl Story {
    /// When it may end at the soonest.
    pub fn due(&self) -> Duration {
        let due = self.steps.iter().map(|step| match step {
            Step::Renewed { called, ttl } => *called + *ttl,
            Step::Revoked { .. } | Step::Gone { .. } => Duration::ZERO,
        });
        due.max().unwrap_or_default()
    }
}

/// From when to when no quorum of members could reach one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    pub from: Duration,
    pub to: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("lease {lease}: gone at {seen:?}, {early:?} before its time")]
    Early { lease: i64, seen: Duration, early: Duration },
    #[error("lease {lease}: expired at {seen:?}, in an outage since {since:?} that began before it was due at {due:?}")]
    NoQuorum { lease: i64, seen: Duration, since: Duration, due: Duration },
    #[error("lease {lease}: renewed at {called:?} though it was gone at {seen:?}")]
    Revived { lease: i64, called: Duration, seen: Duration },
}

/// Checks all leases. `error` is what clocks may be off over the longest TTL.
pub fn check(stories: &BTreeMap<i64, Story>, outages: &[Outage], error: Duration) -> Result<(), Broken> {
    for (lease, story) in stories {
        check_one(*lease, story, outages, error)?;
    }
    Ok(())
}

fn check_one(lease: i64, story: &Story, outages: &[Outage], error: Duration) -> Result<(), Broken> {
    let mut due = Duration::ZERO;
    let mut revoked = false;
    let mut gone = None;
    for step in &story.steps {
        match *step {
            Step::Renewed { called, ttl } => {
                if let Some(seen) = gone {
                    return Err(Broken::Revived { lease, called, seen });
                }
                due = due.max(called + ttl);
            }
            Step::Revoked { .. } => revoked = true,
            Step::Gone { seen } => {
                gone.get_or_insert(seen);
                if revoked {
                    continue;
                }
                if seen + error < due {
                    return Err(Broken::Early { lease, seen, early: due - seen });
                }
                let lost =
                    outages.iter().find(|outage| outage.from + error < due && (outage.from..outage.to).contains(&seen));
                if let Some(outage) = lost {
                    return Err(Broken::NoQuorum { lease, seen, since: outage.from, due });
                }
            }
        }
    }
    Ok(())
}
