//! What this process remembers of other members' disks, and what a member that has started may do before others have told it.
//!
//! A disk can go back: an earlier image of it was put back, or it lost the newest that was synced. Its member has then forgotten votes that
//! it gave and entries that it acknowledged, and cannot know. Those who got the votes and acknowledgements do ([`Memory`]), for as
//! long as their processes live, and tell who asks (`Who`). So a member that starts on a log of its own asks, and until enough have
//! answered (`cluster::recall`) its [`Ballot`] is closed: it neither grants votes nor asks for any.
//!
//! Invariants:
//! - Only what was durable there is remembered: the answer to an append comes after its flush, the answer to a vote after it was saved.
//! - A log is a sequence, so a disk that went back holds less of it: a lower vote, or with the same vote a lower end. With a higher
//!   vote than the remembered one the member has followed a later leader, which may have truncated its log.
//!
//! Absent: memory that outlives the process. What nobody remembers any more is found by the log's mark or not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{LogId, Peers, Store};
use crate::pb::peer::Recollection;
use crate::storage::log::Log;

/// Members remembered; a cluster has a few, but they come and go over the years.
const MEMBERS_MAX: usize = 1024;

/// How far a member's disk reaches: the term of its vote, and its log's last entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    pub term: u64,
    /// Term and index.
    pub last: Option<(u64, u64)>,
}

impl Reach {
    pub fn new(term: u64, last: Option<&LogId>) -> Self {
        Self { term, last: last.map(|id| (**id.committed_leader_id(), id.index())) }
    }

    /// Of this member's own disk. The state may reach further than the log: then the log goes on behind it.
    pub fn own(log: &Log, store: &Store) -> Self {
        let log = log.state();
        let term = log.vote.map_or(0, |vote| vote.term);
        let applied = Self::new(term, store.read(|s| s.log_id).as_ref());
        applied.max(Self { term, last: log.last.map(|id| (id.term, id.index)) })
    }
}

impl From<Recollection> for Reach {
    fn from(told: Recollection) -> Self {
        Self { term: told.term, last: told.last.map(|id| (id.term, id.index)) }
    }
}

impl From<Reach> for Recollection {
    fn from(reach: Reach) -> Self {
        let last = reach.last.map(|(term, index)| crate::pb::log::LogId { term, index });
        Self { term: reach.term, last }
    }
}

/// How far other members' disks reached, as they have told this process.
#[derive(Default)]
pub struct Memory(Mutex<BTreeMap<u64, Reach>>);

impl Memory {
    /// Notes that `member` has told what it could only tell with this on its disk.
    pub fn note(&self, member: u64, reach: Reach) {
        let mut known = self.0.lock();
        if known.len() >= MEMBERS_MAX && !known.contains_key(&member) {
            known.clear();
        }
        let newest = known.entry(member).or_default();
        *newest = (*newest).max(reach);
    }

    pub fn of(&self, member: u64) -> Option<Reach> {
        self.0.lock().get(&member).copied()
    }
}

/// Whether this member may take part in elections.
#[derive(Default)]
pub struct Ballot {
    standing: Mutex<Standing>,
    /// Nobody has a quorum, while this disk is short.
    stands_still: AtomicBool,
}

/// What the others have told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Too few have answered.
    #[default]
    Unknown,
    /// This disk reached further once.
    Short(Reach),
    /// Nobody of a quorum remembers more than this disk holds.
    Whole,
}

impl Ballot {
    /// True if that is news.
    pub fn set(&self, standing: Standing) -> bool {
        std::mem::replace(&mut *self.standing.lock(), standing) != standing
    }

    /// To be said when a short disk's member has waited in vain for a leader with a quorum of others.
    pub fn set_stands_still(&self, still: bool) {
        self.stands_still.store(still, Ordering::Relaxed);
    }

    /// A leader that remembers more than this disk holds cannot bring it up in the term in which it remembers. If it has no quorum without
    /// this member it is told of a higher vote: elected anew, with this member's vote, it can.
    pub fn asks_for_election(&self, term: u64) -> bool {
        let short = matches!(*self.standing.lock(), Standing::Short(reach) if term <= reach.term);
        short && self.stands_still.load(Ordering::Relaxed)
    }

    pub fn may_stand(&self) -> bool {
        *self.standing.lock() == Standing::Whole
    }

    /// Who has forgotten may still vote for a candidate that holds all that was forgotten, in a later term than any in which it may
    /// have voted: so two members, of which one disk went back, need not stand still.
    pub fn may_grant(&self, term: u64, last: Option<&LogId>) -> bool {
        match *self.standing.lock() {
            Standing::Unknown => false,
            Standing::Short(reach) => term > reach.term && Reach::new(0, last).last >= reach.last,
            Standing::Whole => true,
        }
    }
}

/// What a member's own disk, and what others remember of it, forbid.
#[derive(Clone)]
pub struct Past {
    pub ballot: Arc<Ballot>,
    /// With this process's memory of others.
    pub peers: Arc<Peers>,
    pub log: Log,
}

impl Past {
    /// On a log that was made just now nothing was ever promised.
    pub fn new(log: Log, peers: Arc<Peers>, is_new: bool) -> Self {
        let ballot = Ballot::default();
        if is_new {
            ballot.set(Standing::Whole);
        }
        Self { ballot: Arc::new(ballot), peers, log }
    }

    /// Why an entry of these, which a leader's log holds, contradicts what was committed here; `None` if none does. openraft takes it for
    /// impossible: its leader must lack what a quorum has acknowledged. A leader of a `term` before that has been replaced, and may.
    pub fn contradiction<'a>(&self, term: u64, mut entries: impl Iterator<Item = &'a LogId>) -> Option<String> {
        let committed = self.log.state().committed.filter(|committed| committed.term <= term)?;
        let contradicts = |id: &&LogId| {
            let (term, index) = (**id.committed_leader_id(), id.index());
            index <= committed.index && (term > committed.term || index == committed.index && term != committed.term)
        };
        entries.find(contradicts).map(|id| {
            format!(
                "a leader has another entry at index {} (term {}), but entries up to {} (term {}) were committed here: other members have \
                 lost acknowledged writes, and this disk may be the last that holds them; keep a copy of it",
                id.index(),
                **id.committed_leader_id(),
                committed.index,
                committed.term
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;
    use crate::raft::log_id_from_pb;

    fn reach(term: u64, last: (u64, u64)) -> Reach {
        Reach { term, last: Some(last) }
    }

    #[test]
    fn the_furthest_is_remembered() {
        let memory = Memory::default();
        assert_eq!(memory.of(1), None);
        memory.note(1, reach(3, (3, 10)));
        memory.note(1, reach(3, (3, 8)));
        assert_eq!(memory.of(1), Some(reach(3, (3, 10))));
        // A later leader may have truncated: its word alone counts.
        memory.note(1, reach(4, (2, 7)));
        assert_eq!(memory.of(1), Some(reach(4, (2, 7))));
        memory.note(1, Reach { term: 5, last: None });
        memory.note(1, reach(4, (4, 9)));
        assert_eq!(memory.of(1), Some(Reach { term: 5, last: None }));
    }

    #[test]
    fn what_is_short_votes_only_for_those_who_hold_what_it_forgot() {
        let ballot = Ballot::default();
        let id = |term, index| log_id_from_pb(pb::log::LogId { term, index });
        assert!(!ballot.may_stand() && !ballot.may_grant(9, Some(&id(8, 8))));
        assert!(ballot.set(Standing::Short(reach(5, (5, 100)))));
        assert!(!ballot.may_stand());
        assert!(!ballot.may_grant(5, Some(&id(5, 100))), "it may have voted in that term");
        assert!(!ballot.may_grant(6, Some(&id(5, 99))));
        assert!(!ballot.may_grant(6, None));
        assert!(ballot.may_grant(6, Some(&id(5, 100))));
        assert!(!ballot.asks_for_election(5), "a leader with a quorum of others is left alone");
        ballot.set_stands_still(true);
        assert!(ballot.asks_for_election(5) && !ballot.asks_for_election(6));
        assert!(ballot.set(Standing::Whole) && !ballot.set(Standing::Whole));
        assert!(ballot.may_stand() && ballot.may_grant(1, None) && !ballot.asks_for_election(5));
    }
}
