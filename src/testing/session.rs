//! A checker of what a member owes to those who talk to it alone: what it has acknowledged, it knows.
//!
//! A header's revision is the member's own, so it never goes back from one answer to a call that came after it, as long as the member
//! runs. That what is read belongs to the header's revision is the model's to check (`model`), so a read of the member's own state that
//! comes after an acknowledged write, and whose revision is not below, shows it. Absent: other members, which may be behind.

use std::collections::BTreeMap;

use super::history::{Op, Stamp};

/// An answer that is older than one before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("member {member} answered \"{earlier}\" at revision {told}, and later \"{later}\" at revision {revision}")]
pub struct Broken {
    pub member: usize,
    pub earlier: String,
    pub told: i64,
    pub later: String,
    pub revision: i64,
}

/// Checks `ops` of members that were started at `starts`, each with the member's number.
pub fn check(ops: &[Op], starts: &[(usize, Stamp)]) -> Result<(), Broken> {
    let mut members: BTreeMap<usize, Vec<(Stamp, Step<'_>)>> = BTreeMap::new();
    for (member, at) in starts {
        members.entry(*member).or_default().push((*at, Step::Start));
    }
    for op in ops {
        if let Some(answer) = op.answer() {
            let steps = members.entry(op.member).or_default();
            steps.push((op.called, Step::Call(op)));
            steps.push((op.returned, Step::Return(op, answer.revision)));
        }
    }
    members.into_values().try_for_each(check_member)
}

enum Step<'a> {
    Start,
    Call(&'a Op),
    Return(&'a Op, i64),
}

fn check_member(mut steps: Vec<(Stamp, Step<'_>)>) -> Result<(), Broken> {
    // At one stamp a call comes first: what is at the same time is concurrent.
    steps.sort_by_key(|(at, step)| (*at, matches!(step, Step::Return(..))));
    let mut newest: Option<(&Op, i64)> = None;
    // What an operation that is under way must not be older than, by its call.
    let mut owed = BTreeMap::new();
    for (_, step) in steps {
        match step {
            Step::Start => {
                newest = None;
                owed.clear();
            }
            Step::Call(op) => {
                owed.insert((op.called, op.client), newest);
            }
            Step::Return(op, revision) => {
                // One that was called before a start was answered by whoever ran then, or runs now.
                let Some(before) = owed.remove(&(op.called, op.client)) else { continue };
                if let Some((earlier, told)) = before.filter(|(_, told)| *told > revision) {
                    let (earlier, later) = (earlier.request.to_string(), op.request.to_string());
                    return Err(Broken { member: op.member, earlier, told, later, revision });
                }
                if newest.is_none_or(|(_, told)| told < revision) {
                    newest = Some((op, revision));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::history::{Action, Answer, Outcome, Request, Span};
    use super::*;

    fn op(member: usize, called: Stamp, returned: Stamp, revision: i64) -> Op {
        let outcome = Outcome::Answered(Answer { revision, succeeded: false, effects: Vec::new() });
        let request = Request::Do(Action::Get(Span::one("a")));
        Op { client: called, member, called, returned, request, outcome }
    }

    #[test]
    fn revision_of_a_member_never_goes_back() {
        let ops = [op(0, 1, 2, 7), op(0, 3, 4, 7), op(1, 3, 4, 5), op(0, 5, 6, 8)];
        assert_eq!(check(&ops, &[(0, 0), (1, 0)]), Ok(()), "another member may be behind");
        let broken = check(&[op(0, 1, 2, 7), op(0, 3, 4, 6)], &[(0, 0)]).unwrap_err();
        assert_eq!((broken.told, broken.revision), (7, 6));
    }

    #[test]
    fn who_called_before_the_answer_came_may_see_less() {
        assert_eq!(check(&[op(0, 1, 9, 7), op(0, 2, 10, 6)], &[]), Ok(()));
        assert_eq!(check(&[op(0, 1, 5, 7), op(0, 5, 6, 6)], &[]), Ok(()), "at the same moment");
    }

    #[test]
    fn a_member_that_was_started_anew_owes_nothing() {
        let ops = [op(0, 1, 2, 7), op(0, 4, 5, 6)];
        assert_eq!(check(&ops, &[(0, 0), (0, 3)]), Ok(()));
        assert!(check(&ops, &[(0, 0), (1, 3)]).is_err());
    }
}
