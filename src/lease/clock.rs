//! The deadlines of all leases, as one leader has them in one term.
//!
//! Owns when a lease ends and when its remaining time is worth a checkpoint. Every lease has one place in a queue ordered by
//! time; keeping it alive only moves its deadline, and its place is corrected when its turn comes. So a keep-alive is a look-up,
//! and a moment in which nothing is due costs nothing, however many leases there are.
//!
//! Invariants: a lease whose deadline has not come is never named as expired; one that is being revoked is not kept alive.
//! Absent: reading a clock, tasks, Raft: `now` is always given.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use crate::env::Instant;
use crate::kv::Lease;

/// Microseconds since the clock began.
type Micros = u64;

const SECOND: Micros = 1_000_000;
/// Places in the queue whose lease is gone, beyond as many as there are leases, before they are swept.
const STALE_MAX: usize = 1024;

/// What [`Clock::renew`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    pub ttl_seconds: i64,
    /// A checkpoint says that less is left, or will: it must be taken back before anybody is told of the renewal. Which one it is,
    /// for [`Clock::taken_back`].
    pub checkpoint: Option<u32>,
}

pub struct Clock {
    base: Instant,
    checkpoint_interval: Micros,
    leases: HashMap<i64, Entry>,
    queue: BinaryHeap<Reverse<(Micros, i64)>>,
    /// Their time is over, and nobody has decided yet; renewing one still saves it.
    lapsed: Vec<i64>,
}

struct Entry {
    deadline: Micros,
    /// Where its one valid place in the queue is.
    queued: Micros,
    checkpoint_at: Micros,
    ttl_seconds: i64,
    /// Which grant of this id.
    grant: u64,
    /// A checkpoint is in the log, or on its way there, and none since has taken it back.
    checkpointed: bool,
    /// Checkpoints so far.
    checkpoints: u32,
    expiring: bool,
}

impl Clock {
    /// Leases longer than `checkpoint_interval` are due for a checkpoint whenever they were not renewed for that long.
    pub fn new(now: Instant, checkpoint_interval: Duration) -> Self {
        Self {
            base: now,
            checkpoint_interval: micros(checkpoint_interval),
            leases: HashMap::new(),
            queue: BinaryHeap::new(),
            lapsed: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Takes over what the state says of a lease: one that is new here starts with what it has left and `extra`.
    pub fn follow(&mut self, now: Instant, id: i64, lease: Option<Lease>, extra: Duration) {
        let Some(lease) = lease else {
            self.leases.remove(&id);
            return;
        };
        if let Some(entry) = self.leases.get_mut(&id).filter(|entry| entry.grant == lease.grant) {
            entry.checkpointed |= lease.left_seconds.is_some();
            return;
        }
        let now = self.at(now);
        let deadline = now + lease.start_seconds() as Micros * SECOND + micros(extra);
        let checkpoint_at = self.next_checkpoint(now, lease.ttl_seconds);
        let queued = deadline.min(checkpoint_at);
        let entry = Entry {
            deadline,
            queued,
            checkpoint_at,
            ttl_seconds: lease.ttl_seconds,
            grant: lease.grant,
            checkpointed: lease.left_seconds.is_some(),
            checkpoints: 0,
            expiring: false,
        };
        self.leases.insert(id, entry);
        self.queue.push(Reverse((queued, id)));
        if self.queue.len() > 2 * self.leases.len() + STALE_MAX {
            self.queue = self.leases.iter().map(|(id, entry)| Reverse((entry.queued, *id))).collect();
        }
    }

    /// Gives a lease all its time again; `None` if there is none, or it is being revoked.
    pub fn renew(&mut self, now: Instant, id: i64) -> Option<Renewed> {
        let now = self.at(now);
        let interval = self.checkpoint_interval;
        let entry = self.leases.get_mut(&id).filter(|entry| !entry.expiring)?;
        entry.deadline = entry.deadline.max(now + entry.ttl_seconds as Micros * SECOND);
        entry.checkpoint_at = next_checkpoint(now, entry.ttl_seconds, interval);
        let checkpoint = entry.checkpointed.then_some(entry.checkpoints);
        Some(Renewed { ttl_seconds: entry.ttl_seconds, checkpoint })
    }

    /// A checkpoint was taken back; one that was handed out since stands.
    pub fn taken_back(&mut self, id: i64, checkpoint: u32) {
        if let Some(entry) = self.leases.get_mut(&id).filter(|entry| entry.checkpoints == checkpoint) {
            entry.checkpointed = false;
        }
    }

    /// Whole seconds that are left; 0 for a lease whose time is over and that is not revoked yet.
    pub fn remaining_seconds(&self, now: Instant, id: i64) -> Option<i64> {
        let left = self.leases.get(&id)?.deadline.saturating_sub(self.at(now));
        Some((left / SECOND) as i64)
    }

    /// As [`Self::remaining_seconds`], in milliseconds: for the order in which leases end.
    pub fn remaining_millis(&self, now: Instant, id: i64) -> Option<i64> {
        let left = self.leases.get(&id)?.deadline.saturating_sub(self.at(now));
        Some((left / 1000) as i64)
    }

    /// Looks at all whose turn has come. Returns checkpoints that are due, at most `max`: id, and seconds that are left. The others are due again a second later.
    pub fn settle(&mut self, now: Instant, max: usize) -> Vec<(i64, i64)> {
        let now = self.at(now);
        let mut checkpoints = Vec::new();
        while let Some(Reverse((at, id))) = self.queue.peek().copied().filter(|first| first.0.0 <= now) {
            self.queue.pop();
            let interval = self.checkpoint_interval;
            let Some(entry) = self.leases.get_mut(&id).filter(|entry| entry.queued == at && !entry.expiring) else {
                continue;
            };
            if entry.deadline <= now {
                self.lapsed.push(id);
                continue;
            }
            if entry.checkpoint_at <= now && checkpoints.len() >= max {
                // Those whose time is over must not wait behind it.
                entry.checkpoint_at = now + SECOND;
            } else if entry.checkpoint_at <= now {
                entry.checkpointed = true;
                entry.checkpoints = entry.checkpoints.wrapping_add(1);
                // Rounded up: a new leader must not be early.
                checkpoints.push((id, (entry.deadline - now).div_ceil(SECOND) as i64));
                entry.checkpoint_at = next_checkpoint(now, entry.ttl_seconds, interval);
            }
            entry.queued = entry.deadline.min(entry.checkpoint_at);
            self.queue.push(Reverse((entry.queued, id)));
        }
        checkpoints
    }

    pub fn has_lapsed(&self) -> bool {
        !self.lapsed.is_empty()
    }

    /// Decides over those that have lapsed, at most `max`: who was not renewed by `now` is from here on being revoked, until
    /// it is gone or [`Clock::spare`]d.
    pub fn expire(&mut self, now: Instant, max: usize) -> Vec<i64> {
        let now = self.at(now);
        let mut expired = Vec::new();
        while expired.len() < max
            && let Some(id) = self.lapsed.pop()
        {
            let Some(entry) = self.leases.get_mut(&id).filter(|entry| !entry.expiring) else { continue };
            if entry.deadline <= now {
                entry.expiring = true;
                expired.push(id);
            } else {
                entry.queued = entry.deadline.min(entry.checkpoint_at);
                self.queue.push(Reverse((entry.queued, id)));
            }
        }
        expired
    }

    /// Its revocation has failed: it may be kept alive again, and is looked at again after `retry`.
    pub fn spare(&mut self, now: Instant, id: i64, retry: Duration) {
        let at = self.at(now) + micros(retry);
        if let Some(entry) = self.leases.get_mut(&id).filter(|entry| entry.expiring) {
            (entry.expiring, entry.queued) = (false, at);
            self.queue.push(Reverse((at, id)));
        }
    }

    fn next_checkpoint(&self, now: Micros, ttl_seconds: i64) -> Micros {
        next_checkpoint(now, ttl_seconds, self.checkpoint_interval)
    }

    fn at(&self, now: Instant) -> Micros {
        micros(now.saturating_duration_since(self.base))
    }
}

/// A lease that is not longer than the interval is not worth one: it starts anew with the next leader.
fn next_checkpoint(now: Micros, ttl_seconds: i64, interval: Micros) -> Micros {
    if ttl_seconds as Micros * SECOND > interval { now + interval } else { Micros::MAX }
}

/// Longer than anybody waits counts as much as the longest wait.
fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::TTL_MAX_SECONDS;

    const INTERVAL: Duration = Duration::from_secs(100);
    const NONE: [i64; 0] = [];

    fn lease(ttl_seconds: i64, left_seconds: Option<i64>, grant: u64) -> Option<Lease> {
        Some(Lease { ttl_seconds, left_seconds, grant })
    }

    struct World {
        start: Instant,
        clock: Clock,
    }

    impl World {
        fn new() -> Self {
            let start = Instant::now();
            Self { start, clock: Clock::new(start, INTERVAL) }
        }

        fn at(&self, seconds: f64) -> Instant {
            self.start + Duration::from_secs_f64(seconds)
        }

        fn grant(&mut self, seconds: f64, id: i64, ttl: i64) {
            let now = self.at(seconds);
            self.clock.follow(now, id, lease(ttl, None, id as u64), Duration::ZERO);
        }

        fn expired(&mut self, seconds: f64) -> Vec<i64> {
            let now = self.at(seconds);
            self.clock.settle(now, 1000);
            let mut expired = self.clock.expire(now, 1000);
            expired.sort_unstable();
            expired
        }
    }

    #[tokio::test]
    async fn a_lease_ends_at_its_deadline_and_not_before() {
        let mut world = World::new();
        world.grant(0.0, 1, 10);
        world.grant(0.5, 2, 10);
        assert_eq!(world.expired(9.999), NONE);
        assert_eq!(world.clock.remaining_seconds(world.at(9.5), 1), Some(0));
        assert_eq!(world.clock.remaining_seconds(world.at(0.1), 1), Some(9), "whole seconds");
        assert_eq!(world.clock.remaining_seconds(world.at(0.1), 3), None);
        assert_eq!(world.expired(10.0), [1]);
        assert_eq!(world.expired(20.0), [2]);
        assert_eq!(world.expired(30.0), NONE, "named once");
    }

    #[tokio::test]
    async fn keeping_alive_moves_the_deadline_until_it_is_being_revoked() {
        let mut world = World::new();
        world.grant(0.0, 1, 10);
        let renewed = Some(Renewed { ttl_seconds: 10, checkpoint: None });
        assert_eq!(world.clock.renew(world.at(9.0), 1), renewed);
        assert_eq!(world.expired(18.9), NONE);
        // Lapsed, and saved at the last moment.
        let (lapsed, saved) = (world.at(19.5), world.at(19.6));
        world.clock.settle(lapsed, 10);
        assert!(world.clock.has_lapsed());
        assert_eq!(world.clock.renew(saved, 1), renewed);
        assert_eq!(world.clock.expire(saved, 10), NONE);
        assert_eq!(world.expired(29.7), [1]);
        assert_eq!(world.clock.renew(world.at(29.8), 1), None, "too late");
        let now = world.at(30.0);
        world.clock.spare(now, 1, Duration::from_secs(1));
        assert_eq!(world.expired(30.9), NONE);
        assert_eq!(world.expired(31.0), [1], "tried again");
        world.clock.spare(now, 1, Duration::from_secs(1));
        assert_eq!(world.clock.renew(world.at(31.5), 1), renewed, "and saved by the failure");
        assert_eq!(world.expired(41.0), NONE);
        world.clock.follow(now, 1, None, Duration::ZERO);
        assert_eq!((world.clock.renew(now, 1), world.clock.len()), (None, 0));
        assert_eq!(world.expired(99.0), NONE);
    }

    #[tokio::test]
    async fn a_new_leader_starts_from_the_checkpoint_and_adds_the_time_of_an_election() {
        let mut world = World::new();
        let now = world.at(0.0);
        world.clock.follow(now, 1, lease(1000, Some(30), 1), Duration::from_secs(1));
        assert_eq!(world.expired(30.9), NONE);
        let renewed = world.clock.renew(world.at(30.95), 1);
        assert_eq!(renewed, Some(Renewed { ttl_seconds: 1000, checkpoint: Some(0) }));
        world.clock.follow(now, 1, lease(1000, None, 1), Duration::ZERO);
        world.clock.taken_back(1, 0);
        assert_eq!(world.clock.renew(world.at(31.0), 1).unwrap().checkpoint, None, "it was taken back");
    }

    /// However the two pass each other on their way to the log, nobody is promised more than a new leader would give.
    #[tokio::test]
    async fn a_checkpoint_under_way_is_taken_back_too() {
        let mut world = World::new();
        world.grant(0.0, 1, 1000);
        let at = |seconds| world.start + Duration::from_secs(seconds);
        let (first, second) = (at(100), at(250));
        assert_eq!(world.clock.settle(first, 10), [(1, 900)]);
        assert_eq!(world.clock.renew(first, 1).unwrap().checkpoint, Some(1), "though it is not applied yet");
        // While it is being taken back, another goes out.
        assert_eq!(world.clock.settle(second, 10), [(1, 850)]);
        world.clock.taken_back(1, 1);
        assert_eq!(world.clock.renew(second, 1).unwrap().checkpoint, Some(2));
        world.clock.follow(second, 1, lease(1000, None, 1), Duration::ZERO);
        assert_eq!(world.clock.renew(second, 1).unwrap().checkpoint, Some(2), "an older word does not clear it");
        world.clock.taken_back(1, 2);
        assert_eq!(world.clock.renew(second, 1).unwrap().checkpoint, None);
    }

    #[tokio::test]
    async fn another_grant_of_an_id_is_another_lease() {
        let mut world = World::new();
        world.grant(0.0, 1, 10);
        let now = world.at(9.0);
        world.clock.follow(now, 1, lease(10, None, 77), Duration::ZERO);
        assert_eq!(world.expired(18.9), NONE);
        assert_eq!(world.expired(19.0), [1]);
    }

    #[tokio::test]
    async fn only_long_leases_that_are_not_renewed_are_checkpointed() {
        let mut world = World::new();
        world.grant(0.0, 1, 100);
        world.grant(0.0, 2, 1000);
        world.grant(0.0, 3, 1000);
        let renew_at = world.at(50.0);
        world.clock.renew(renew_at, 3);
        let mut seen = Vec::new();
        for second in 0..=350 {
            let now = world.at(f64::from(second));
            seen.extend(world.clock.settle(now, 100).into_iter().map(|(id, left)| (second, id, left)));
        }
        let expected = [(100, 2, 900), (150, 3, 900), (200, 2, 800), (250, 3, 800), (300, 2, 700), (350, 3, 700)];
        assert_eq!(seen, expected);
        // No more at a time than asked for; the others stay due.
        let mut world = World::new();
        (1..=10).for_each(|id| world.grant(0.0, id, 1000));
        let now = world.at(100.0);
        world.grant(0.0, 11, 100);
        assert_eq!(world.clock.settle(now, 4).len(), 4);
        assert_eq!(world.clock.expire(now, 10), [11], "the end of a lease does not wait for them");
        let later = world.at(101.0);
        assert_eq!((world.clock.settle(now, 100).len(), world.clock.settle(later, 100).len()), (0, 6));
    }

    #[tokio::test]
    async fn the_longest_lease_does_not_overflow() {
        let mut world = World::new();
        let now = world.at(1.0);
        world.clock.follow(now, 1, lease(TTL_MAX_SECONDS, None, 1), Duration::from_secs(2));
        assert!(world.clock.renew(now, 1).is_some());
        assert_eq!(world.clock.remaining_seconds(now, 1), Some(TTL_MAX_SECONDS + 2));
    }

    #[tokio::test]
    async fn leases_that_are_gone_leave_no_memory_behind() {
        let mut world = World::new();
        for id in 0..100_000 {
            world.grant(0.0, id, 1_000_000);
            let now = world.at(0.0);
            world.clock.follow(now, id, None, Duration::ZERO);
        }
        assert!(world.clock.queue.len() <= STALE_MAX + 2, "{} places", world.clock.queue.len());
    }

    /// Against a plain table of deadlines.
    #[tokio::test]
    async fn it_expires_what_a_plain_table_would() {
        let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("QUORATE_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut world = World::new();
        let mut table: std::collections::BTreeMap<i64, (i64, i64)> = Default::default();
        for (grant, step) in (0..20_000_i64).enumerate() {
            let (now, at) = (step * 10, world.at(step as f64 / 100.0));
            let id = random.i64(0..50);
            match random.u8(0..8) {
                0 => {
                    let ttl = random.i64(1..150);
                    world.clock.follow(at, id, lease(ttl, None, grant as u64), Duration::ZERO);
                    table.insert(id, (now + ttl * 1000, ttl));
                }
                1..4 => {
                    let renewed = world.clock.renew(at, id);
                    assert_eq!(renewed.map(|r| r.ttl_seconds), table.get(&id).map(|x| x.1));
                    table.entry(id).and_modify(|x| x.0 = x.0.max(now + x.1 * 1000));
                }
                4 if random.u8(0..4) == 0 => {
                    world.clock.follow(at, id, None, Duration::ZERO);
                    table.remove(&id);
                }
                _ => {
                    world.clock.settle(at, 1000);
                    let mut expired = world.clock.expire(at, 1000);
                    expired.sort_unstable();
                    let due: Vec<i64> = table.iter().filter(|x| x.1.0 <= now).map(|x| *x.0).collect();
                    assert_eq!(expired, due, "step {step}");
                    for id in due {
                        table.remove(&id);
                        world.clock.follow(at, id, None, Duration::ZERO);
                    }
                }
            }
        }
    }
}
