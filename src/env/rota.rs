//! What waits, served by turns of those who ask: one who asks for much waits for itself.
//!
//! Who asks is a connection of a host ([`Asker`]): hosts have turns, and within a host its connections, so a host that opens a thousand
//! connections waits for itself as one that opens one. How much of a thing that has places an asker may have says [`Share`].
//! Invariants: each asker's own come in the order in which they were asked for; between two turns of a host every other one for which
//! something waits has one turn, and so with the connections of a host; it keeps nothing of whom nothing waits for; however many
//! connections a host has, it leaves a quarter of the places to other hosts. Absent: which things have places.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asker {
    /// All connections of one host have the same.
    pub host: u64,
    /// Tells connections apart that live at the same time.
    pub connection: u64,
}

impl Asker {
    /// The member itself, which is no client's number.
    pub const MEMBER: Self = Self { host: 0, connection: 0 };

    /// All connections of a host as one.
    pub fn of_host(host: u64) -> Self {
        Self { host, connection: 0 }
    }

    pub fn is_member(self) -> bool {
        self == Self::MEMBER
    }
}

/// What is taken of a thing that has places: by all, by the host of who asks, and by its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub all: usize,
    pub host: usize,
    pub connection: usize,
}

impl Share {
    /// Whether one place more is due, where there are `max`. The last quarter is for hosts that have none. Of the others a connection may
    /// have as many as it leaves free, and a host twice that, for many clients may stand behind one address; and twice that again, if
    /// only connections that have none take it.
    pub fn has_room(self, max: usize) -> bool {
        let left = (max - max.div_ceil(4)).saturating_sub(self.all);
        let of_host = if self.connection == 0 { 4 } else { 2 } * left;
        self.all < max && (self.host == 0 || self.connection < left && self.host < of_host)
    }
}

#[derive(Debug)]
pub struct Rota<T> {
    /// By host; none is empty.
    hosts: BTreeMap<u64, OfHost<T>>,
    len: usize,
    /// The host that was served last.
    last: u64,
}

#[derive(Debug)]
struct OfHost<T> {
    /// By connection; none is empty.
    waiting: BTreeMap<u64, VecDeque<T>>,
    len: usize,
    /// The connection that was served last.
    last: u64,
}

impl<T> Default for Rota<T> {
    fn default() -> Self {
        Self { hosts: BTreeMap::new(), len: 0, last: 0 }
    }
}

impl<T> Default for OfHost<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), len: 0, last: 0 }
    }
}

impl<T> Rota<T> {
    /// What waits.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What waits, as this asker's part of it.
    pub fn share(&self, asker: Asker) -> Share {
        let host = self.hosts.get(&asker.host);
        let connection = host.and_then(|host| host.waiting.get(&asker.connection)).map_or(0, VecDeque::len);
        Share { all: self.len, host: host.map_or(0, |host| host.len), connection }
    }

    pub fn push(&mut self, asker: Asker, item: T) {
        self.own(asker).push_back(item);
    }

    /// Where one more of this asker's goes.
    fn own(&mut self, asker: Asker) -> &mut VecDeque<T> {
        self.len += 1;
        let host = self.hosts.entry(asker.host).or_default();
        host.len += 1;
        host.waiting.entry(asker.connection).or_default()
    }

    /// Takes back what was not to be had, as the first of its asker's own. Its turn is over.
    pub fn push_front(&mut self, asker: Asker, item: T) {
        self.own(asker).push_front(item);
    }

    /// Keeps only what is `wanted`.
    pub fn retain(&mut self, wanted: impl Fn(&T) -> bool) {
        for host in self.hosts.values_mut() {
            host.waiting.values_mut().for_each(|own| own.retain(&wanted));
            host.waiting.retain(|_, own| !own.is_empty());
            host.len = host.waiting.values().map(VecDeque::len).sum();
        }
        self.hosts.retain(|_, host| host.len > 0);
        self.len = self.hosts.values().map(|host| host.len).sum();
    }

    /// The next in turn.
    pub fn pop(&mut self) -> Option<T> {
        let number = after(&self.hosts, self.last)?;
        let host = self.hosts.get_mut(&number)?;
        let item = host.pop()?;
        if host.len == 0 {
            self.hosts.remove(&number);
        }
        self.last = number;
        self.len -= 1;
        Some(item)
    }
}

impl<T> OfHost<T> {
    fn pop(&mut self) -> Option<T> {
        let connection = after(&self.waiting, self.last)?;
        let own = self.waiting.get_mut(&connection)?;
        let item = own.pop_front()?;
        if own.is_empty() {
            self.waiting.remove(&connection);
        }
        self.last = connection;
        self.len -= 1;
        Some(item)
    }
}

/// Whose turn it is after `last`.
fn after<V>(all: &BTreeMap<u64, V>, last: u64) -> Option<u64> {
    let behind = all.range((Bound::Excluded(last), Bound::Unbounded)).next();
    behind.or_else(|| all.first_key_value()).map(|(number, _)| *number)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Seeded anew each time, and it says by what.
    fn random() -> fastrand::Rng {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        fastrand::Rng::with_seed(seed)
    }

    /// The first host asks for the most, over many connections.
    fn some_asker(random: &mut fastrand::Rng, hosts: u64) -> Asker {
        match random.bool() {
            true => Asker { host: 0, connection: random.u64(0..40) },
            false => Asker { host: random.u64(0..hosts), connection: random.u64(0..3) },
        }
    }

    #[test]
    fn between_two_turns_of_a_host_every_other_has_one_and_so_with_its_connections() {
        let mut random = random();
        for _ in 0..200 {
            let mut rota = Rota::default();
            let hosts = random.u64(1..6);
            let mut waiting: HashMap<Asker, VecDeque<usize>> = HashMap::new();
            // Who has had a turn since this one, which waits, had its last one.
            let mut passed: HashMap<Asker, Vec<Asker>> = HashMap::new();
            for item in 0..random.usize(1..400) {
                if random.bool() {
                    let asker = some_asker(&mut random, hosts);
                    rota.push(asker, (asker, item));
                    waiting.entry(asker).or_default().push_back(item);
                } else if let Some((asker, item)) = rota.pop() {
                    let own = waiting.get_mut(&asker).unwrap();
                    assert_eq!(own.pop_front(), Some(item), "in the order in which it was asked for");
                    if own.is_empty() {
                        waiting.remove(&asker);
                    }
                    for other in waiting.keys().filter(|other| **other != asker) {
                        let passed = passed.entry(*other).or_default();
                        let again = passed.contains(&asker);
                        assert!(!again || other.host != asker.host, "{asker:?} again while {other:?} waits");
                        passed.push(asker);
                    }
                    let turns_of_host = |of: &[Asker], host| of.iter().filter(|one| one.host == host).count();
                    for (other, passed) in passed.iter().filter(|(other, _)| other.host != asker.host) {
                        // Since the last turn of the other's host.
                        let since = passed.iter().rposition(|one| one.host == other.host).map_or(0, |at| at + 1);
                        let turns = turns_of_host(&passed[since..], asker.host);
                        assert!(turns <= 1, "{turns} turns of {asker:?} while {other:?} waits");
                    }
                    passed.remove(&asker);
                } else {
                    assert!(waiting.is_empty(), "all that was asked for was given");
                }
                passed.retain(|asker, _| waiting.contains_key(asker));
                let asker = some_asker(&mut random, hosts);
                let of = |is: &dyn Fn(&Asker) -> bool| {
                    waiting.iter().filter(|(one, _)| is(one)).map(|(_, own)| own.len()).sum::<usize>()
                };
                let share = Share {
                    all: of(&|_| true),
                    host: of(&|one| one.host == asker.host),
                    connection: of(&|one| *one == asker),
                };
                assert_eq!((rota.share(asker), rota.len()), (share, share.all));
            }
        }
    }

    #[test]
    fn what_is_put_back_comes_first_of_its_askers_own_and_what_is_not_wanted_does_not_come() {
        let mut random = random();
        for _ in 0..200 {
            let mut rota = Rota::default();
            for item in 0..random.usize(1..200) {
                let asker = some_asker(&mut random, 5);
                rota.push(asker, (asker, item));
                if random.bool()
                    && let Some((asker, item)) = rota.pop()
                {
                    rota.push_front(asker, (asker, item));
                }
            }
            let before = rota.len();
            rota.retain(|(_, item)| item % 3 > 0);
            let left = rota.len();
            let mut last: HashMap<Asker, usize> = HashMap::new();
            let mut came = 0;
            while let Some((asker, item)) = rota.pop() {
                assert!(item % 3 > 0 && last.insert(asker, item).is_none_or(|last| last < item), "{item} of {asker:?}");
                came += 1;
            }
            assert!(came == left && left <= before, "{came} of {left} of {before}");
            assert!(rota.is_empty() && rota.hosts.is_empty());
        }
    }

    #[test]
    fn a_host_of_any_number_of_connections_leaves_a_quarter_and_every_second_turn_to_another() {
        let mut random = random();
        for _ in 0..200 {
            let (mut rota, max) = (Rota::default(), random.usize(2..300));
            let connections = random.u64(1..2000);
            let ask = |rota: &mut Rota<u64>, asker: Asker| {
                let has_room = rota.share(asker).has_room(max);
                if has_room {
                    rota.push(asker, asker.host);
                }
                has_room
            };
            for _ in 0..2000 {
                ask(&mut rota, Asker { host: 7, connection: random.u64(0..connections) });
            }
            let left = max - rota.len();
            assert!(left > 0 && left >= max / 4, "{left} of {max} are left by {connections} connections");
            let other = (0..max).filter(|_| ask(&mut rota, Asker { host: 8, connection: random.u64(0..9) })).count();
            assert!(other > 0 && other >= max / 16, "{other} of {max} for one other host");
            // Whoever has none gets one, as long as there are any.
            let more = (9..).take_while(|host| ask(&mut rota, Asker { host: *host, connection: 1 })).count();
            assert_eq!((rota.len(), other + more >= max / 4), (max, true), "{more} more hosts");
            let turns: Vec<u64> = std::iter::from_fn(|| rota.pop()).filter(|host| *host <= 8).collect();
            let of_other = turns.iter().take(2 * other).filter(|host| **host == 8).count();
            assert_eq!(of_other, other, "every second turn");
        }
    }
}
