//! What has happened to the cluster since this process began, as this member has seen it: who led, joined, votes, was removed, and why.
//!
//! Invariant: the newest `EVENTS_MAX` are kept, in memory. Absent: what changes of the membership are (Raft's), and what a condition is.

use std::collections::{BTreeMap, VecDeque};

use crate::env::WallTime;
use crate::identity::{READER_SLOT, slot_of};
use crate::pb::admin::Event;

const EVENTS_MAX: usize = 128;
const SENTENCE_CHARS_MAX: usize = 512;

/// A member as the membership has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub name: String,
    pub votes: bool,
    pub is_reader: bool,
}

pub type Members = BTreeMap<u64, Known>;

/// See the module's head.
#[derive(Default)]
pub struct History {
    events: VecDeque<Event>,
    /// `None` before the first look, which tells nothing.
    members: Option<Members>,
    leader: Option<(u64, u64)>,
}

impl History {
    pub fn add(&mut self, at: WallTime, name: &str, sentence: &str) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        let sentence = sentence.chars().take(SENTENCE_CHARS_MAX).collect();
        self.events.push_back(Event { at: super::seconds(at), name: name.into(), sentence });
    }

    pub fn list(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }

    /// Another life of this process: what it knew of the membership was of another member.
    pub fn forget_members(&mut self) {
        (self.members, self.leader) = (None, None);
    }

    /// Notes who leads, and in which term.
    pub fn note_leader(&mut self, at: WallTime, leader: Option<u64>, term: u64) {
        let now = leader.map(|id| (id, term));
        if now == self.leader {
            return;
        }
        let (name, text) = match (now, self.leader) {
            (Some((id, term)), _) => ("leader", format!("{} leads, in term {term}", self.name(id))),
            (None, Some((id, _))) => {
                ("leader-lost", format!("{} does not lead any more, and nobody does", self.name(id)))
            }
            (None, None) => return,
        };
        self.add(at, name, &text);
        self.leader = now;
    }

    fn name(&self, id: u64) -> String {
        let known = self.members.as_ref().and_then(|members| members.get(&id));
        known
            .filter(|known| !known.name.is_empty())
            .map_or_else(|| format!("{id:016x}"), |known| format!("{} ({id:016x})", known.name))
    }

    /// Notes the committed membership; `wanted`: the slots that should exist, if that is known.
    pub fn note_members(&mut self, at: WallTime, now: Members, wanted: Option<std::ops::Range<u64>>) {
        let Some(before) = self.members.replace(now.clone()) else { return };
        for (id, known) in &now {
            let who = self.name(*id);
            match before.get(id) {
                None => {
                    let role = if known.votes {
                        "voter"
                    } else if known.is_reader {
                        "reader"
                    } else {
                        "learner"
                    };
                    self.add(at, "joined", &format!("{who} has joined as a {role}"));
                }
                Some(old) if old.votes != known.votes => {
                    let what = if known.votes { "votes" } else { "does not vote any more, and stays as a learner" };
                    self.add(at, "vote", &format!("{who} {what}"));
                }
                Some(_) => {}
            }
        }
        for (id, known) in before.iter().filter(|(id, _)| !now.contains_key(id)) {
            let slot = slot_of(*id);
            let successor = now.keys().find(|other| slot != READER_SLOT && slot_of(**other) == slot);
            let why = match (successor, &wanted) {
                (Some(other), _) => format!("{} has taken its slot with a new disk", self.name(*other)),
                (None, Some(wanted)) if slot != READER_SLOT && !wanted.contains(&u64::from(slot)) => {
                    format!("its slot is not wanted: slots {} to {} are", wanted.start, wanted.end.saturating_sub(1))
                }
                _ if known.is_reader => "a reader that has stopped, or was silent for long".into(),
                _ => "by hand".into(),
            };
            self.add(at, "removed", &format!("{} ({id:016x}) was removed: {why}", known.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::wall_clock;

    fn members(of: &[(u64, bool)]) -> Members {
        let known = |slot: u64, votes| Known { name: format!("kv-{slot}"), votes, is_reader: false };
        of.iter().map(|(id, votes)| (*id, known(id & 0xffff, *votes))).collect()
    }

    fn told(history: &History) -> Vec<String> {
        history.list().into_iter().map(|event| event.sentence).collect()
    }

    #[test]
    fn who_joins_votes_leads_and_goes_is_told_with_why() {
        let (mut history, now) = (History::default(), wall_clock());
        history.note_members(now, members(&[(0x10000, true), (0x10001, true)]), None);
        assert_eq!(told(&history), Vec::<String>::new(), "the first look tells nothing");
        history.note_leader(now, Some(0x10000), 3);
        history.note_leader(now, Some(0x10000), 3);
        history.note_members(now, members(&[(0x10000, true), (0x10001, true), (0x20001, false)]), None);
        history.note_members(now, members(&[(0x10000, true), (0x20001, true)]), Some(0..2));
        history.note_members(now, members(&[(0x10000, true)]), Some(0..1));
        history.note_leader(now, None, 3);
        assert_eq!(
            told(&history),
            [
                "kv-0 (0000000000010000) leads, in term 3",
                "kv-1 (0000000000020001) has joined as a learner",
                "kv-1 (0000000000020001) votes",
                "kv-1 (0000000000010001) was removed: kv-1 (0000000000020001) has taken its slot with a new disk",
                "kv-1 (0000000000020001) was removed: its slot is not wanted: slots 0 to 0 are",
                "kv-0 (0000000000010000) does not lead any more, and nobody does",
            ]
        );
        for n in 0..2 * EVENTS_MAX {
            history.add(now, "x", &n.to_string());
        }
        assert_eq!((history.list().len(), &history.list()[0].sentence[..]), (EVENTS_MAX, "128"));
    }
}
