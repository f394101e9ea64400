//! The deadlines of all leases, as one leader has them in one term.
//!
//! Owns when a lease ends and when its remaining time is worth a checkpoint. Every lease has one place in a queue of ends, and a long one
//! has one in a queue of checkpoints, both ordered by time; keeping it alive only moves its deadline, and its places are corrected when
//! their turn comes. So a keep-alive is a look-up, and a moment in which nothing is due costs nothing, however many leases there are.
//! Keep-alives wait while it is looked at what is due, so that is done in short pieces, and no more is taken out of the queues than can
//! be served: the rest keeps its place, and is first the next time. Ends come before checkpoints.
//!
//! Invariants: a lease whose deadline has not come is never named as expired; leases are named in the order in which their time was over;
//! one that is being revoked is not kept alive; a call looks at [`LOOKS_MAX`] places at most; there is no place of a lease that is gone.
//! Absent: reading a clock, tasks, Raft: `now` is always given.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use crate::env::Instant;
use crate::kv::Lease;

/// Microseconds since the clock began.
type Micros = u64;

const SECOND: Micros = 1_000_000;
/// Places that one call looks at: about half a millisecond. And as many leases wait for a decision.
const LOOKS_MAX: usize = if cfg!(test) { 64 } else { 1024 };

/// What [`Clock::renew`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    pub ttl_seconds: i64,
    /// A checkpoint says that less is left, or will: it must be taken back before anybody is told of the renewal. Which one it is,
    /// for [`Clock::taken_back`].
    pub checkpoint: Option<u32>,
}

/// What [`Clock::settle`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Checkpoints that are due: id, and seconds that are left.
    pub checkpoints: Vec<(i64, i64)>,
    /// It has looked at all that it may in one go, and there may be more.
    pub has_more: bool,
}

pub struct Clock {
    base: Instant,
    checkpoint_interval: Micros,
    leases: HashMap<i64, Entry>,
    ends: Queue,
    checkpoints: Queue,
    /// Their time is over, and nobody has decided yet; renewing one still saves it.
    lapsed: VecDeque<i64>,
}

/// Leases by time, each once at most.
#[derive(Default)]
struct Queue {
    places: BTreeSet<(Micros, i64)>,
    #[cfg(test)]
    looks: usize,
}

impl Queue {
    /// Takes out the first one that is due, and says where its place was.
    fn pop(&mut self, now: Micros) -> Option<(Micros, i64)> {
        self.places.first().filter(|(at, _)| *at <= now)?;
        #[cfg(test)]
        {
            self.looks += 1;
        }
        self.places.pop_first()
    }

    /// Gives a lease that has no place one.
    fn put(&mut self, id: i64, place: &mut Micros, at: Micros) {
        *place = at;
        self.places.insert((at, id));
    }

    fn remove(&mut self, id: i64, place: Micros) {
        self.places.remove(&(place, id));
    }
}

struct Entry {
    deadline: Micros,
    /// Where its place among the ends is, unless it has lapsed or is being revoked.
    queued: Micros,
    /// `Micros::MAX`: never.
    checkpoint_at: Micros,
    /// Where its place among the checkpoints is, if it ever needs one.
    checkpoint_queued: Micros,
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
            ends: Queue::default(),
            checkpoints: Queue::default(),
            lapsed: VecDeque::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Takes over what the state says of a lease: one that is new here starts with what it has left and `extra`.
    pub fn follow(&mut self, now: Instant, id: i64, lease: Option<Lease>, extra: Duration) {
        let known = lease.as_ref().zip(self.leases.get_mut(&id));
        if let Some((lease, entry)) = known.filter(|(lease, entry)| entry.grant == lease.grant) {
            entry.checkpointed |= lease.left_seconds.is_some();
            return;
        }
        if let Some(gone) = self.leases.remove(&id) {
            self.ends.remove(id, gone.queued);
            self.checkpoints.remove(id, gone.checkpoint_queued);
        }
        let Some(lease) = lease else { return };
        let now = self.at(now);
        let deadline = now + lease.start_seconds() as Micros * SECOND + micros(extra);
        let checkpoint_at = next_checkpoint(now, lease.ttl_seconds, self.checkpoint_interval);
        let mut entry = Entry {
            deadline,
            queued: deadline,
            checkpoint_at,
            checkpoint_queued: checkpoint_at,
            ttl_seconds: lease.ttl_seconds,
            grant: lease.grant,
            checkpointed: lease.left_seconds.is_some(),
            checkpoints: 0,
            expiring: false,
        };
        self.ends.put(id, &mut entry.queued, deadline);
        if checkpoint_at < Micros::MAX {
            self.checkpoints.put(id, &mut entry.checkpoint_queued, checkpoint_at);
        }
        self.leases.insert(id, entry);
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

    /// Looks at those whose turn has come: at ends, as long as few wait for a decision, and then at checkpoints, of which `max` are made at
    /// most. To be called again while there is more.
    pub fn settle(&mut self, now: Instant, max: usize) -> Settled {
        let now = self.at(now);
        let mut looks = 0;
        while looks < LOOKS_MAX
            && self.lapsed.len() < LOOKS_MAX
            && let Some((at, id)) = self.ends.pop(now)
        {
            looks += 1;
            let Some(entry) = self.leases.get_mut(&id) else { continue };
            if entry.deadline <= at {
                self.lapsed.push_back(id);
            } else {
                // It was kept alive. If that is over too, by now, it is behind those whose time was over before.
                self.ends.put(id, &mut entry.queued, entry.deadline);
            }
        }
        let mut checkpoints = Vec::new();
        while looks < LOOKS_MAX
            && checkpoints.len() < max
            && let Some((_, id)) = self.checkpoints.pop(now)
        {
            looks += 1;
            let Some(entry) = self.leases.get_mut(&id) else { continue };
            if entry.checkpoint_at <= now {
                // Of one whose time is over there is nothing to say, unless it is saved: then later.
                if entry.deadline > now && !entry.expiring {
                    entry.checkpointed = true;
                    entry.checkpoints = entry.checkpoints.wrapping_add(1);
                    // Rounded up: a new leader must not be early.
                    checkpoints.push((id, (entry.deadline - now).div_ceil(SECOND) as i64));
                }
                entry.checkpoint_at = next_checkpoint(now, entry.ttl_seconds, self.checkpoint_interval);
            }
            self.checkpoints.put(id, &mut entry.checkpoint_queued, entry.checkpoint_at);
        }
        Settled { checkpoints, has_more: looks == LOOKS_MAX }
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
            && let Some(id) = self.lapsed.pop_front()
        {
            let Some(entry) = self.leases.get_mut(&id).filter(|entry| !entry.expiring) else { continue };
            // What lapsed may have been another grant of its id.
            self.ends.remove(id, entry.queued);
            if entry.deadline <= now {
                entry.expiring = true;
                expired.push(id);
            } else {
                self.ends.put(id, &mut entry.queued, entry.deadline);
            }
        }
        expired
    }

    /// Its revocation has failed: it may be kept alive again, and is looked at again after `retry`.
    pub fn spare(&mut self, now: Instant, id: i64, retry: Duration) {
        let at = self.at(now) + micros(retry);
        if let Some(entry) = self.leases.get_mut(&id).filter(|entry| entry.expiring) {
            entry.expiring = false;
            self.ends.put(id, &mut entry.queued, at);
        }
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
            self.expired_at(now)
        }

        fn expired_at(&mut self, now: Instant) -> Vec<i64> {
            while self.clock.settle(now, 1000).has_more {}
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
        assert_eq!(world.clock.settle(first, 10).checkpoints, [(1, 900)]);
        assert_eq!(world.clock.renew(first, 1).unwrap().checkpoint, Some(1), "though it is not applied yet");
        // While it is being taken back, another goes out.
        assert_eq!(world.clock.settle(second, 10).checkpoints, [(1, 850)]);
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
            seen.extend(world.clock.settle(now, 100).checkpoints.into_iter().map(|(id, left)| (second, id, left)));
        }
        let expected = [(100, 2, 900), (150, 3, 900), (200, 2, 800), (250, 3, 800), (300, 2, 700), (350, 3, 700)];
        assert_eq!(seen, expected);
        // No more at a time than asked for; the others stay due.
        let mut world = World::new();
        (1..=10).for_each(|id| world.grant(0.0, id, 1000));
        let now = world.at(100.0);
        world.grant(0.0, 11, 100);
        assert_eq!(world.clock.settle(now, 0), Settled::default());
        assert_eq!(world.clock.expire(now, 10), [11], "the end of a lease does not wait for them");
        let due = [4, 100, 100].map(|max| world.clock.settle(now, max).checkpoints.len());
        assert_eq!(due, [4, 6, 0]);
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
        let places = (world.clock.ends.places.len(), world.clock.checkpoints.places.len());
        assert_eq!((places, world.clock.len()), ((0, 0), 0));
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
                    let expired = world.expired_at(at);
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

    /// What a plain table has of a lease, in milliseconds.
    #[derive(Clone, Copy)]
    struct Plain {
        deadline: i64,
        ttl: i64,
        /// It was kept alive, or granted anew, or its revocation has failed.
        touched: bool,
    }

    /// Keeps alive, revokes, or grants anew, in the clock and in the table.
    fn touch(world: &mut World, table: &mut HashMap<i64, Plain>, random: &mut fastrand::Rng, now: i64, id: i64) {
        let at = world.start + Duration::from_millis(now as u64);
        match random.u8(..4) {
            0 => {
                world.clock.follow(at, id, None, Duration::ZERO);
                table.remove(&id);
            }
            1 => {
                let ttl = random.i64(1..500);
                world.clock.follow(at, id, lease(ttl, None, random.u64(..)), Duration::ZERO);
                table.insert(id, Plain { deadline: now + ttl * 1000, ttl, touched: true });
            }
            _ => {
                let renewed = world.clock.renew(at, id);
                assert_eq!(renewed.map(|one| one.ttl_seconds), table.get(&id).map(|one| one.ttl));
                if let Some(one) = table.get_mut(&id) {
                    (one.deadline, one.touched) = (one.deadline.max(now + one.ttl * 1000), true);
                }
            }
        }
    }

    /// As a tick does it. Returns who has expired.
    fn tick(
        world: &mut World,
        table: &HashMap<i64, Plain>,
        now: i64,
        (room, checkpoints_max): (usize, usize),
    ) -> Vec<i64> {
        let at = world.start + Duration::from_millis(now as u64);
        let mut made = 0;
        loop {
            let looks = |clock: &Clock| clock.ends.looks + clock.checkpoints.looks;
            let before = looks(&world.clock);
            let settled = world.clock.settle(at, checkpoints_max - made);
            assert!(looks(&world.clock) - before <= LOOKS_MAX && world.clock.lapsed.len() <= LOOKS_MAX);
            made += settled.checkpoints.len();
            assert!(made <= checkpoints_max);
            for (id, left) in settled.checkpoints {
                assert_eq!(left, (table[&id].deadline - now + 999) / 1000);
            }
            if !settled.has_more {
                break;
            }
        }
        let due = table.values().filter(|one| one.deadline <= now).count();
        let is_due = |id: &&i64| table.get(*id).is_some_and(|one| one.deadline <= now);
        let waiting = world.clock.lapsed.iter().filter(is_due).collect::<std::collections::HashSet<_>>().len();
        assert!(waiting == due || world.clock.lapsed.len() == LOOKS_MAX, "{waiting} of {due} wait for a decision");
        let expired = world.clock.expire(at, room);
        assert!(expired.iter().all(|id| table[id].deadline <= now), "none is early");
        assert_eq!(expired.len(), waiting.min(room), "as many as there is room for");
        expired
    }

    /// Any number of leases, whose ends and checkpoints come together or apart, of which some are kept alive, revoked, granted anew, and
    /// whose revocation may fail: each look is short, none expires early, and each does in its turn at the rate that there is.
    #[tokio::test]
    async fn a_look_is_short_however_many_are_due_and_each_expires_in_its_turn() {
        let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
        println!("QUORATE_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..8 {
            let (mut world, mut table) = (World::new(), HashMap::new());
            let leases = random.i64(1..3000);
            // As after an election, or spread.
            let (shortest, spread) = (random.i64(1..400), random.choice([1, 10, 400]).unwrap());
            for id in 0..leases {
                let ttl = random.i64(shortest..shortest + spread);
                world.grant(0.0, id, ttl);
                table.insert(id, Plain { deadline: ttl * 1000, ttl, touched: false });
            }
            let rates = (random.usize(leases as usize / 50 + 1..leases as usize + 50), random.usize(..100));
            let (mut now, mut has_due) = (0, false);
            while !table.is_empty() {
                now += if has_due { 100 } else { random.i64(100..5000) };
                for _ in 0..if now < 300_000 { random.usize(..20) } else { 0 } {
                    let id = random.i64(0..leases);
                    touch(&mut world, &mut table, &mut random, now, id);
                }
                let expired = tick(&mut world, &table, now, rates);
                let last = expired.iter().map(|id| table[id]).filter(|one| !one.touched).map(|one| one.deadline).max();
                for id in expired {
                    let at = world.start + Duration::from_millis(now as u64);
                    if random.u8(..20) == 0 {
                        world.clock.spare(at, id, Duration::from_millis(50));
                        table.entry(id).and_modify(|one| one.touched = true);
                    } else {
                        world.clock.follow(at, id, None, Duration::ZERO);
                        table.remove(&id);
                    }
                }
                let next = table.values().filter(|one| !one.touched).map(|one| one.deadline).min();
                assert!(
                    last.zip(next).is_none_or(|(last, next)| last <= next),
                    "in the order in which their time was over"
                );
                has_due = table.values().any(|one| one.deadline <= now);
            }
            assert!(world.clock.ends.places.is_empty() && world.clock.checkpoints.places.is_empty());
        }
    }
}
