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
