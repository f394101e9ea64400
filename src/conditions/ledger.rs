//! When conditions begin and end: what was found at one look after the other becomes states that have a beginning.
//!
//! Invariants: one condition for a kind and a subject; a state counts after it has held for its kind's time, and is said to begin, to
//! change and to end, each once; at most [`FOUND_MAX`] are kept. Absent: looking (`find`), and telling (`keeper`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::kinds::Kind;
use crate::env::{Instant, WallTime};
use crate::pb::admin::Condition;

/// Conditions at a time, far more than a cluster has members.
pub const FOUND_MAX: usize = 256;
/// Characters of a sentence: peers and settings are in some.
const SENTENCE_CHARS_MAX: usize = 1024;
/// A change of words is told no more often.
const CHANGE_TOLD: Duration = Duration::from_secs(60);

/// Something that holds now.
#[derive(Clone, Debug)]
pub struct Found {
    pub kind: &'static Kind,
    /// The member that it is about, by name, or the rule; empty: the cluster.
    pub subject: String,
    pub sentence: String,
}

impl Found {
    pub fn new(kind: &'static Kind, subject: impl Into<String>, sentence: impl Into<String>) -> Self {
        Self { kind, subject: subject.into(), sentence: sentence.into() }
    }
}

/// What is to be said.
#[derive(Debug)]
pub struct Turn {
    pub kind: &'static Kind,
    pub subject: String,
    pub sentence: String,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Begins,
    /// Other words for what holds still.
    Changes,
    Ends {
        lasted: Duration,
    },
}

struct Entry {
    kind: &'static Kind,
    sentence: String,
    found_at: Instant,
    since: WallTime,
    has_begun: bool,
    told: String,
    told_at: Instant,
}

/// The conditions that one member has found in one scope.
#[derive(Default)]
pub struct Ledger {
    /// By place in the order of kinds, and subject.
    entries: BTreeMap<(usize, String), Entry>,
}

impl Ledger {
    /// Takes over what holds `now`. `earlier` says since when somebody else has known it.
    pub fn update(
        &mut self,
        found: Vec<Found>,
        now: Instant,
        wall: WallTime,
        earlier: impl Fn(&Found) -> Option<WallTime>,
    ) -> Vec<Turn> {
        let mut turns = Vec::new();
        let mut left = std::mem::take(&mut self.entries);
        for mut found in found.into_iter().take(FOUND_MAX) {
            found.sentence = found.sentence.chars().take(SENTENCE_CHARS_MAX).collect();
            let key = (super::kinds::rank(found.kind.name), found.subject.clone());
            let mut entry = left.remove(&key).unwrap_or_else(|| Entry {
                kind: found.kind,
                sentence: String::new(),
                found_at: now,
                since: earlier(&found).unwrap_or(wall),
                has_begun: false,
                told: String::new(),
                told_at: now,
            });
            entry.sentence = found.sentence;
            let begins = !entry.has_begun && now - entry.found_at >= entry.kind.after;
            let changes = entry.has_begun && entry.kind.follows && entry.sentence != entry.told;
            if begins || changes && now - entry.told_at >= CHANGE_TOLD {
                let what = if begins { What::Begins } else { What::Changes };
                (entry.has_begun, entry.told, entry.told_at) = (true, entry.sentence.clone(), now);
                turns.push(turn(&key.1, &entry, what));
            }
            self.entries.insert(key, entry);
        }
        for ((_, subject), entry) in left.iter().filter(|(_, entry)| entry.has_begun) {
            turns.push(turn(subject, entry, What::Ends { lasted: now - entry.found_at }));
        }
        turns
    }

    /// Those that have begun.
    pub fn list(&self) -> Vec<Condition> {
        let begun = self.entries.iter().filter(|(_, entry)| entry.has_begun);
        begun.map(|((_, subject), entry)| condition(entry.kind, subject, &entry.sentence, entry.since)).collect()
    }

    /// Forgets all, without a word: somebody else knows now.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

fn turn(subject: &str, entry: &Entry, what: What) -> Turn {
    Turn { kind: entry.kind, subject: subject.to_owned(), sentence: entry.sentence.clone(), what }
}

fn condition(kind: &Kind, subject: &str, sentence: &str, since: WallTime) -> Condition {
    Condition {
        name: kind.name.into(),
        severity: kind.severity.name().into(),
        subjects: (!subject.is_empty()).then(|| subject.to_owned()).into_iter().collect(),
        sentence: sentence.into(),
        remedy: kind.remedy.into(),
        since: super::seconds(since),
    }
}

#[cfg(test)]
mod tests {
    use super::super::kinds::{LAG, MEMBER_DEAD, NOSPACE, ONE_VOTER};
    use super::*;
    use crate::env::wall_clock;

    fn said(turns: &[Turn]) -> Vec<(&str, &str, What)> {
        turns.iter().map(|turn| (turn.kind.name, &turn.sentence[..], turn.what)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_begins_after_its_time_and_ends_once() {
        let mut ledger = Ledger::default();
        let (begin, wall) = (Instant::now(), wall_clock());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let dead = |text: &str| vec![Found::new(&MEMBER_DEAD, "kv-1", text)];
        assert_eq!(said(&ledger.update(dead("a"), at(0), wall, |_| None)), []);
        assert!(ledger.list().is_empty(), "a restart is none");
        assert_eq!(said(&ledger.update(Vec::new(), at(4), wall, |_| None)), [], "what has not begun does not end");
        ledger.update(dead("a"), at(10), wall, |_| None);
        assert_eq!(
            said(&ledger.update(dead("b"), at(15), wall, |_| None)),
            [("member-dead", "b", What::Begins)],
            "in the words of now"
        );
        let shown = ledger.list();
        assert_eq!((shown.len(), &shown[0].subjects[..]), (1, &["kv-1".to_owned()][..]));
        assert_eq!(said(&ledger.update(dead("c"), at(600), wall, |_| None)), [], "numbers change all the time");
        assert_eq!(ledger.list()[0].sentence, "c");
        let ends = What::Ends { lasted: Duration::from_secs(600) };
        assert_eq!(said(&ledger.update(Vec::new(), at(610), wall, |_| None)), [("member-dead", "c", ends)]);
        assert!(ledger.list().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn other_words_are_told_once_a_minute_where_they_say_something() {
        let mut ledger = Ledger::default();
        let (begin, wall) = (Instant::now(), wall_clock());
        let mut told = 0;
        for second in 0..600_u64 {
            let found = vec![Found::new(&NOSPACE, "kv-0", format!("cause {}", second / 10))];
            told += ledger.update(found, begin + Duration::from_secs(second), wall, |_| None).len();
        }
        assert_eq!(told, 10, "one when it begins, and nine more");
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_over_keeps_the_time_and_the_number_is_bounded() {
        let mut ledger = Ledger::default();
        let (now, wall) = (Instant::now(), wall_clock());
        let before = wall - Duration::from_secs(300);
        ledger.update(vec![Found::new(&NOSPACE, "", "full")], now, wall, |_| Some(before));
        assert_eq!(ledger.list()[0].since, super::super::seconds(before));
        let many = (0..2 * FOUND_MAX).map(|n| Found::new(&ONE_VOTER, n.to_string(), "x".repeat(5000))).collect();
        let later = now + Duration::from_secs(60);
        ledger.update(many, now, wall, |_| None);
        let many = (0..2 * FOUND_MAX).map(|n| Found::new(&ONE_VOTER, n.to_string(), "x".repeat(5000))).collect();
        ledger.update(many, later, wall, |_| None);
        let list = ledger.list();
        assert_eq!((list.len(), list[0].sentence.len()), (FOUND_MAX, SENTENCE_CHARS_MAX));
        ledger.update(vec![Found::new(&LAG, "kv-1", "x"), Found::new(&NOSPACE, "", "y")], later, wall, |_| None);
        assert_eq!(ledger.list()[0].name, "nospace", "the most urgent first");
        ledger.clear();
        assert_eq!(ledger.update(Vec::new(), later, wall, |_| None).len(), 0);
    }
}
