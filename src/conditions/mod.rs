//! Every state that a person must know, in one list: what is the matter, since when, and what to do.
//!
//! ```text
//! kinds    the table of all conditions: name, urgency, what to do
//! find     which of them hold now: pure functions of what the modules below know
//! ledger   since when; what is to be said when one begins, changes and ends
//! history  what has happened to the membership, the newest of it
//! keeper   looks twice a second, logs what begins and ends, makes Events of it
//! ```
//!
//! Each member finds its own conditions and tells them in its answer to `Who`; the leader finds those of the cluster and knows the others'
//! from there; a follower asks the leader for the list, once a second. So every member shows the same, and without a leader its own. The
//! page, `/cluster`, `/readyz?verbose`, `status`, `member why`, `Status.errors`, the metric `quorate_condition`, log and Events all show
//! [`Conditions::list`], and nothing else words a state.
//!
//! To add a condition: a line in `kinds`, a section in `docs/runbook.md` (a test asks for it), and a function that finds it. A module that
//! stands below is asked in `keeper`; one that only the server knows gives a closure to [`Conditions::add_source`]:
//!
//! ```text
//! conditions.add_source(move || backups.late().map(|words| Found::new(&kinds::BACKUP_LATE, name, words)).into_iter().collect());
//! ```
//!
//! Invariant: nothing is decided by a condition; who decides knows the facts. Absent: measurements, and health of its own.

pub mod find;
pub mod history;
pub mod keeper;
pub mod kinds;
pub mod ledger;

use std::time::{Duration, UNIX_EPOCH};

use crate::env::WallTime;
use crate::pb::admin::Condition;

pub use keeper::{Conditions, Life, Parts};
pub use kinds::{KINDS, Kind, Severity};
pub use ledger::Found;

/// Where the runbook is.
const RUNBOOK: &str = "docs/runbook.md";

/// Seconds since 1970.
pub fn seconds(at: WallTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// The same, for people.
pub fn time_text(seconds: i64) -> String {
    let at = UNIX_EPOCH + Duration::from_secs(seconds.clamp(0, 253_402_300_799) as u64);
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Where more is said of a condition.
pub fn runbook(name: &str) -> String {
    format!("{RUNBOOK}#{name}")
}

/// All of it in one line.
pub fn line(condition: &Condition) -> String {
    let Condition { name, sentence, remedy, since, .. } = condition;
    format!("[{name}] {sentence} (since {}). What to do: {remedy} ({})", time_text(*since), runbook(name))
}

/// Whether somebody should look.
pub fn is_wrong(condition: &Condition) -> bool {
    Severity::of(&condition.severity) > Severity::Note
}

/// Whether clients are refused, or data is at risk.
pub fn is_error(condition: &Condition) -> bool {
    Severity::of(&condition.severity) == Severity::Error
}

/// One list of several: the same said of several members is one condition of all of them, and who says it of a member first is believed.
/// The most urgent come first.
pub fn merge(conditions: impl IntoIterator<Item = Condition>) -> Vec<Condition> {
    let mut merged: Vec<Condition> = Vec::new();
    for condition in conditions {
        let is_known = |known: &Condition| {
            let same_subjects = condition.subjects.iter().all(|subject| known.subjects.contains(subject));
            let same_scope = known.subjects.is_empty() == condition.subjects.is_empty();
            known.name == condition.name && (known.sentence == condition.sentence || same_subjects && same_scope)
        };
        match merged.iter().position(is_known) {
            Some(at) => {
                let known = &mut merged[at];
                known.since = known.since.min(condition.since);
                for subject in condition.subjects {
                    if !known.subjects.contains(&subject) {
                        known.subjects.push(subject);
                    }
                }
                known.subjects.sort();
            }
            None if merged.len() < ledger::FOUND_MAX => merged.push(condition),
            None => {}
        }
    }
    merged.sort_by(|a, b| (kinds::rank(&a.name), &a.subjects).cmp(&(kinds::rank(&b.name), &b.subjects)));
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(name: &str, subjects: &[&str], sentence: &str, since: i64) -> Condition {
        Condition {
            name: name.into(),
            subjects: subjects.iter().map(|subject| (*subject).to_owned()).collect(),
            sentence: sentence.into(),
            since,
            ..Condition::default()
        }
    }

    #[test]
    fn what_several_say_is_one_condition() {
        let merged = merge([
            condition("one-voter", &[], "alone", 9),
            condition("quota-nearly-full", &["kv-1"], "85 %", 5),
            condition("quota-nearly-full", &["kv-0"], "85 %", 4),
            condition("quota-nearly-full", &["kv-1"], "86 %", 6),
            condition("quota-nearly-full", &["kv-2"], "86 %", 6),
            condition("member-dead", &["kv-2"], "gone", 1),
            condition("nospace", &[], "full, says one", 3),
            condition("nospace", &[], "full, says another", 2),
        ]);
        let expected = [
            condition("nospace", &[], "full, says one", 2),
            condition("member-dead", &["kv-2"], "gone", 1),
            condition("quota-nearly-full", &["kv-0", "kv-1"], "85 %", 4),
            condition("quota-nearly-full", &["kv-2"], "86 %", 6),
            condition("one-voter", &[], "alone", 9),
        ];
        assert_eq!(merged, expected);
    }

    #[test]
    fn a_line_says_what_since_when_and_what_to_do() {
        let condition =
            Condition { remedy: "start it".into(), ..condition("member-dead", &["kv-2"], "kv-2 is gone", 0) };
        assert_eq!(
            line(&condition),
            "[member-dead] kv-2 is gone (since 1970-01-01T00:00:00Z). What to do: start it (docs/runbook.md#member-dead)"
        );
    }
}
