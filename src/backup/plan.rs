//! What is decided about backups, as pure functions: which one a moment is restored from, which are not kept, and who makes them.
//!
//! Absent: clocks and stores. Times come from the objects, or from who asks.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use super::archive::NamedFull;
use super::millis;
use crate::env::WallTime;
use crate::pb::backup::{Full, Mark};

/// How far a restored cluster's revisions jump: more than a cluster makes while a backup is young, as etcd's documentation has it.
pub const JUMP: i64 = 1_000_000_000;

/// The moment that is to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The newest that there is.
    Latest,
    /// Before the write that made a later revision.
    Revision(i64),
    /// What was applied at this time of the leader's, in milliseconds since 1970.
    Time(u64),
}

impl FromStr for Target {
    type Err = String;

    /// `latest`, a time as in `2026-11-29T10:15:00Z`, or a revision.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Ok(revision) = text.parse() {
            return Ok(Self::Revision(revision));
        }
        let time = humantime::parse_rfc3339_weak(text);
        let time = time.map_err(|error| {
            format!("got {text:?}: {error}; expected latest, a time (UTC) as in 2026-11-29T10:15:00Z, or a revision")
        })?;
        Ok(Self::Time(millis(time)))
    }
}

/// A path, and the moment that is named after its last `@`; the latest if there is none.
pub fn path_and_target(text: &str) -> Result<(String, Target), String> {
    match text.rsplit_once('@') {
        Some((path, target)) => Ok((path.to_owned(), target.parse()?)),
        None => Ok((text.to_owned(), Target::Latest)),
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Latest => f.write_str("the newest moment"),
            Self::Revision(revision) => write!(f, "revision {revision}"),
            Self::Time(at) => f.write_str(&shown(*at)),
        }
    }
}

/// A time of an object, for people.
pub fn shown(at_millis: u64) -> String {
    // Beyond the year 9999 there is no form.
    let at = WallTime::UNIX_EPOCH + Duration::from_millis(at_millis.min(253_402_300_799_000));
    humantime::format_rfc3339_millis(at).to_string()
}

/// Whether the state of `full` is not after the moment.
fn is_before(full: &Full, target: Target) -> bool {
    match target {
        Target::Latest => true,
        Target::Revision(revision) => full.revision <= revision,
        Target::Time(at) => full.at_millis <= at,
    }
}

/// The full backups that a moment can be restored from, the best first: the newest of them, and of the newest generation that has one.
pub fn choose(fulls: &[NamedFull], target: Target) -> Vec<&NamedFull> {
    let fits = |named: &&NamedFull| is_before(&named.full, target);
    let generation = fulls.iter().filter(fits).map(|named| named.generation).max();
    let mut fit: Vec<&NamedFull> =
        fulls.iter().filter(fits).filter(|named| Some(named.generation) == generation).collect();
    fit.sort_by_key(|named| std::cmp::Reverse(named.applied().index));
    fit
}

/// The last entry that had been applied at a time, as marks in their order say: the last mark before the first later one. `known`: what is
/// known from the marks before. The flag says that there is a later one, and so no more to come.
pub fn applied_at(marks: &[Mark], at_millis: u64, known: Option<u64>) -> (Option<u64>, bool) {
    let before = marks.iter().take_while(|mark| mark.at_millis <= at_millis);
    let count = before.clone().count();
    (before.last().map(|mark| mark.index).or(known), count < marks.len())
}

/// How long backups are kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// So many of the newest full backups stay, however old.
    pub fulls: usize,
    /// Younger ones stay, however many.
    pub age: Duration,
}

/// A full backup, and when its object was made by the store's clock.
#[derive(Clone, Debug)]
pub struct Aged {
    pub named: NamedFull,
    pub modified: WallTime,
}

/// What is not kept.
#[derive(Debug, Default, PartialEq)]
pub struct Expired {
    pub fulls: Vec<String>,
    /// By generation: records before this number. That one stays, for the next is numbered after it.
    pub records_before: BTreeMap<u32, u64>,
}

/// Ages are counted from the newest object, so that no clock but the store's has a say. The newest full backup always stays, and every
/// record that one of those that stay goes on with.
pub fn expired(fulls: &[Aged], keep: &Retention) -> Expired {
    let mut all: Vec<&Aged> = fulls.iter().collect();
    all.sort_by_key(|aged| (aged.named.generation, aged.named.applied().index));
    let Some(now) = all.iter().map(|aged| aged.modified).max() else { return Expired::default() };
    let first_by_count = all.len().saturating_sub(keep.fulls.max(1));
    let is_kept = |(place, aged): &(usize, &&Aged)| {
        *place >= first_by_count || now.duration_since(aged.modified).unwrap_or_default() < keep.age
    };
    let mut expired = Expired::default();
    let kept: Vec<&Aged> = all.iter().enumerate().filter(is_kept).map(|(_, aged)| *aged).collect();
    expired.fulls.extend(
        all.iter()
            .filter(|aged| !kept.iter().any(|kept| kept.named.name == aged.named.name))
            .map(|aged| aged.named.name.clone()),
    );
    for aged in &all {
        let generation = aged.named.generation;
        let first_kept = kept.iter().find(|kept| kept.named.generation == generation);
        // Of a generation without any that stays nothing is of use.
        let upto = first_kept.map_or(u64::MAX, |kept| kept.named.full.record);
        expired.records_before.insert(generation, upto);
    }
    expired.records_before.retain(|_, upto| *upto > 0);
    expired
}

/// A member that could make the backups, as the leader sees it.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub member: u64,
    pub is_leader: bool,
    /// Since it asked last whether it is to.
    pub silent: Duration,
    /// For how long it has failed to, while it was its turn.
    pub failing: Duration,
    /// When it last had its turn, counted; 0 for never.
    pub turn: u64,
}

/// One that says nothing for so long is dead. What it was told is void for itself, too, then.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// One that fails for so long gives its turn to another.
pub const FAILING_MAX: Duration = Duration::from_secs(20);

/// Who makes the backups: whoever does, while it lives and can; then whoever has not had its turn for longest, and the leader only if there
/// is nobody else.
pub fn appoint(current: Option<u64>, candidates: &[Candidate]) -> Option<u64> {
    let lives = |candidate: &&Candidate| candidate.silent < SILENCE_MAX;
    let others = candidates.iter().filter(lives).filter(|candidate| !candidate.is_leader).count();
    let stays = candidates.iter().filter(lives).find(|candidate| {
        let is_alone = candidates.iter().filter(lives).count() == 1;
        Some(candidate.member) == current
            && (candidate.failing < FAILING_MAX || is_alone)
            && (!candidate.is_leader || others == 0)
    });
    let next = || {
        let able = candidates.iter().filter(lives).filter(|candidate| candidate.failing < FAILING_MAX);
        able.min_by_key(|candidate| (candidate.is_leader, candidate.turn, candidate.member))
    };
    stays
        .or_else(next)
        .or_else(|| candidates.iter().filter(lives).min_by_key(|candidate| candidate.turn))
        .map(|candidate| candidate.member)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::log::LogId;

    fn full(generation: u32, index: u64, revision: i64, at_millis: u64, record: u64) -> NamedFull {
        let applied = Some(LogId { term: 1, index });
        NamedFull {
            generation,
            name: format!("{generation}/{index}"),
            full: Full { applied, revision, at_millis, record, ..Full::default() },
        }
    }

    #[test]
    fn a_moment_is_restored_from_the_newest_full_backup_before_it() {
        let all = [full(1, 10, 10, 1000, 1), full(1, 20, 18, 2000, 5), full(2, 5, 1_000_018, 3000, 1)];
        let chosen = |target| choose(&all, target).into_iter().map(|named| named.name.as_str()).collect::<Vec<_>>();
        assert_eq!(chosen(Target::Latest), ["2/5"]);
        assert_eq!(chosen(Target::Revision(18)), ["1/20", "1/10"]);
        assert_eq!(chosen(Target::Revision(17)), ["1/10"]);
        assert_eq!(chosen(Target::Revision(9)), [""; 0]);
        assert_eq!(chosen(Target::Time(2999)), ["1/20", "1/10"]);
        assert_eq!(chosen(Target::Time(999)), [""; 0]);
    }

    #[test]
    fn targets_are_read() {
        assert_eq!("latest".parse(), Ok(Target::Latest));
        assert_eq!("1970-01-01T00:00:01.5Z".parse(), Ok(Target::Time(1500)));
        assert_eq!("1970-01-01 00:00:01".parse(), Ok(Target::Time(1000)));
        assert_eq!("12".parse(), Ok(Target::Revision(12)));
        assert!("yesterday".parse::<Target>().is_err());
        assert_eq!(path_and_target("s3://b/p@12"), Ok(("s3://b/p".into(), Target::Revision(12))));
        assert_eq!(path_and_target("/d"), Ok(("/d".into(), Target::Latest)));
        assert!(path_and_target("/d@x").is_err());
        assert_eq!(shown(1500), "1970-01-01T00:00:01.500Z");
    }

    #[test]
    fn a_time_is_the_last_mark_before_it() {
        let marks: Vec<Mark> =
            [(5, 100), (7, 200), (7, 300)].map(|(index, at_millis)| Mark { index, at_millis }).into();
        assert_eq!(applied_at(&marks, 99, Some(3)), (Some(3), true));
        assert_eq!(applied_at(&marks, 100, None), (Some(5), true));
        assert_eq!(applied_at(&marks, 299, None), (Some(7), true));
        assert_eq!(applied_at(&marks, 300, None), (Some(7), false));
        assert_eq!(applied_at(&[], 300, Some(1)), (Some(1), false));
    }

    #[test]
    fn what_is_kept_is_whole() {
        let day = Duration::from_secs(86_400);
        let aged = |named: NamedFull, days: u32| Aged { named, modified: WallTime::UNIX_EPOCH + day * (100 - days) };
        let all = [
            aged(full(1, 10, 0, 0, 0), 9),
            aged(full(1, 20, 0, 0, 4), 8),
            aged(full(1, 30, 0, 0, 9), 2),
            aged(full(2, 5, 0, 0, 0), 1),
            aged(full(2, 9, 0, 0, 3), 0),
        ];
        let keep = |fulls, days: u32| expired(&all, &Retention { fulls, age: day * days });
        assert_eq!(
            keep(1, 0),
            Expired {
                fulls: ["1/10", "1/20", "1/30", "2/5"].map(str::to_owned).into(),
                records_before: [(1, u64::MAX), (2, 3)].into()
            }
        );
        assert_eq!(keep(0, 0), keep(1, 0), "one always stays");
        assert_eq!(
            keep(1, 3),
            Expired { fulls: ["1/10", "1/20"].map(str::to_owned).into(), records_before: [(1, 9)].into() }
        );
        assert_eq!(keep(4, 0), Expired { fulls: ["1/10"].map(str::to_owned).into(), records_before: [(1, 4)].into() });
        assert_eq!(keep(5, 0), Expired::default());
        assert_eq!(expired(&[], &Retention { fulls: 1, age: day }), Expired::default());
    }

    #[test]
    fn a_follower_makes_the_backups_until_it_is_dead_or_cannot() {
        let seconds = Duration::from_secs;
        let one = |member, is_leader, silent, failing, turn| Candidate {
            member,
            is_leader,
            silent: seconds(silent),
            failing: seconds(failing),
            turn,
        };
        assert_eq!(appoint(None, &[]), None);
        assert_eq!(appoint(None, &[one(1, true, 0, 0, 0)]), Some(1), "a leader that is alone");
        let three = [one(1, true, 0, 0, 0), one(2, false, 0, 0, 0), one(3, false, 1, 0, 0)];
        assert_eq!(appoint(None, &three), Some(2));
        assert_eq!(appoint(Some(3), &three), Some(3));
        assert_eq!(appoint(Some(1), &three), Some(2), "others are there now");
        let dead = [one(1, true, 0, 0, 0), one(2, false, 1, 0, 0), one(3, false, 10, 0, 1)];
        assert_eq!(appoint(Some(3), &dead), Some(2));
        let failing = [one(1, true, 0, 0, 0), one(2, false, 0, 0, 0), one(3, false, 0, 20, 1)];
        assert_eq!(appoint(Some(3), &failing), Some(2));
        let all_failing = [one(1, true, 0, 30, 3), one(2, false, 0, 30, 2), one(3, false, 0, 20, 4)];
        assert_eq!(appoint(Some(3), &all_failing), Some(2), "in turn");
    }
}
