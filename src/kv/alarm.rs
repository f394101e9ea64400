//! Alarms that are on: facts that a person or a self-check has put into the log, until somebody takes them off.
//!
//! Absent: alarms that follow from a member's own state (its quota, its disk); those come and go without the log (`node`).

use super::State;
use super::state::header;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::{AlarmMember, AlarmRequest, AlarmResponse, AlarmType};
use crate::pb::log::{Alarms, change};

/// Alarms kept: two kinds a member, for members past and present. More are not taken.
const ALARMS_MAX: usize = 4096;

impl State {
    /// Every alarm that is on, ascending by member and kind.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.alarms.iter().map(|&(member_id, alarm)| AlarmMember { member_id, alarm }).collect()
    }

    /// Whether an alarm of this kind is on, for whichever member.
    pub fn has_alarm(&self, kind: AlarmType) -> bool {
        self.alarms.iter().any(|(_, alarm)| *alarm == i32::from(kind))
    }

    /// Whether an alarm of this kind is on for this member.
    pub fn has_alarm_of(&self, member_id: u64, kind: AlarmType) -> bool {
        self.alarms.contains(&(member_id, kind.into()))
    }

    /// Puts an alarm on, or takes it off, and answers those that this changed. `NONE` is no alarm: it changes nothing.
    pub(super) fn alarm(&mut self, r: &AlarmRequest) -> AlarmResponse {
        let one = (r.member_id, r.alarm);
        let kind = AlarmType::try_from(r.alarm).unwrap_or(AlarmType::None);
        let changed = match AlarmAction::try_from(r.action) {
            Ok(AlarmAction::Activate) if kind != AlarmType::None => {
                self.alarms.len() < ALARMS_MAX && self.alarms.insert(one)
            }
            Ok(AlarmAction::Deactivate) => self.alarms.remove(&one),
            _ => false,
        };
        if changed {
            let alarms = Alarms { alarms: self.alarms() };
            let bytes = alarms.alarms.len() * size_of::<AlarmMember>();
            self.journal.record(change::Change::Alarms(alarms), bytes);
        }
        // As etcd: who puts on an alarm that is on already is told of it, too.
        let told = changed || self.alarms.contains(&one);
        let alarms = told.then_some(AlarmMember { member_id: one.0, alarm: one.1 }).into_iter().collect();
        AlarmResponse { header: header(self.revision), alarms }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ALARMS_SINCE, Fault, Loader};
    use super::*;
    use crate::pb::log::{Command, command};

    fn change(state: &mut State, action: AlarmAction, member_id: u64, kind: AlarmType) {
        let request = AlarmRequest { action: action.into(), member_id, alarm: kind.into() };
        let command = Command::new(ALARMS_SINCE, command::Request::Alarm(request));
        let outcome: Result<_, Fault> = state.apply(&command, true);
        outcome.expect("this build knows alarms").expect("an alarm is never refused");
    }

    #[test]
    fn alarms_are_part_of_the_state_that_is_stored() {
        let mut state = State::new();
        state.keep_journal(1 << 20);
        change(&mut state, AlarmAction::Activate, 7, AlarmType::Corrupt);
        change(&mut state, AlarmAction::Activate, 5, AlarmType::Nospace);
        change(&mut state, AlarmAction::Activate, 9, AlarmType::None);
        change(&mut state, AlarmAction::Get, 9, AlarmType::Nospace);
        change(&mut state, AlarmAction::Deactivate, 7, AlarmType::Nospace);
        let on = [(5, AlarmType::Nospace), (7, AlarmType::Corrupt)];
        let found: Vec<(u64, AlarmType)> = state.alarms().iter().map(|on| (on.member_id, on.alarm())).collect();
        assert_eq!(found, on);
        assert!(state.has_alarm(AlarmType::Corrupt));
        for changes in [state.changes().collect(), state.take_journal().changes] {
            let mut loader = Loader::new();
            changes.into_iter().for_each(|change| loader.load(change).unwrap());
            assert_eq!(loader.finish(1).unwrap().alarms(), state.alarms());
        }
        change(&mut state, AlarmAction::Deactivate, 7, AlarmType::Corrupt);
        assert!(!state.has_alarm(AlarmType::Corrupt) && state.has_alarm(AlarmType::Nospace));
    }

    #[test]
    fn without_alarms_an_older_member_can_load_the_state() {
        let state = State::new();
        let is_alarm = |change: &crate::pb::log::Change| matches!(change.change, Some(change::Change::Alarms(_)));
        assert!(!state.changes().any(|change| is_alarm(&change)));
    }
}
