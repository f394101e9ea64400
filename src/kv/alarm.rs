//! Alarms that are on: facts that a person or a self-check has put into the log, until somebody takes them off.
//!
//! Alarm CORRUPT of a member fences it: its state is not to be trusted, its log is. So fences are for a minority: from cluster
//! version [`FENCES_SINCE`] on, one that would leave no majority of sound voters is refused, here, where every member decides the
//! same from the replicated membership. From that version on, too, an alarm NOSPACE that is on refuses what stores data in apply, as
//! in etcd: so what is asked after an alarm was answered knows of it, at whichever member. Alarms are of members (or of 0, which stands for all); those of others are not taken, and
//! go with the member, so the list is never full. Below that version the rules are those of 0.1, as members of that build apply
//! them.
//! Absent: alarms that follow from a member's own state (its quota, its disk); those come and go without the log (`node`).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::header::header;
use super::{FENCES_SINCE, State};
use crate::error::Error;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::{AlarmMember, AlarmRequest, AlarmResponse, AlarmType, RequestOp, TxnRequest, request_op};
use crate::pb::log::{Alarms, change, command};

/// Alarms kept below [`FENCES_SINCE`]: two kinds a member, for members past and present. More are not taken.
const ALARMS_MAX: usize = 4096;

/// The membership as of the newest applied entry that changed it, as far as alarms go by it. Part of no snapshot: whoever loads a
/// state knows its membership beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// The voters; two sets while a joint change is under way.
    pub configs: Vec<BTreeSet<u64>>,
    /// Voters and learners.
    pub all: BTreeSet<u64>,
}

impl Members {
    /// Whether a majority of the voters is left without `fenced`.
    fn is_minority(&self, fenced: &BTreeSet<u64>) -> bool {
        self.configs.iter().all(|voters| 2 * voters.intersection(fenced).count() < voters.len())
    }
}

impl State {
    /// Every alarm that is on, in the order in which they were put on.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        listed(&self.alarms)
    }

    /// Whether an alarm of this kind is on, for whichever member.
    pub fn has_alarm(&self, kind: AlarmType) -> bool {
        self.alarms.iter().any(|(_, alarm)| *alarm == i32::from(kind))
    }

    /// Whether an alarm of this kind is on for this member.
    pub fn has_alarm_of(&self, member_id: u64, kind: AlarmType) -> bool {
        self.alarms.contains(&(member_id, kind.into()))
    }

    /// Whether what stores data is refused here, because somebody has put alarm NOSPACE on.
    pub fn is_capped(&self) -> bool {
        !self.alarms.is_empty() && self.cluster_version >= FENCES_SINCE && self.has_alarm(AlarmType::Nospace)
    }

    /// Whether alarm CORRUPT leaves a majority of the voters. It does, unless the alarms are of a cluster version below
    /// [`FENCES_SINCE`], or the membership has shrunk since.
    pub fn has_sound_majority(&self) -> bool {
        self.members.is_minority(&self.fenced())
    }

    fn fenced(&self) -> BTreeSet<u64> {
        let corrupt = i32::from(AlarmType::Corrupt);
        self.alarms.iter().filter(|(_, alarm)| *alarm == corrupt).map(|(member, _)| *member).collect()
    }

    /// To be called with every membership that is applied, and with that of a state that was loaded.
    pub fn set_members(&mut self, members: Members) {
        self.members = Arc::new(members);
        self.drop_alarms_of_strangers();
    }

    /// An alarm of who has left says nothing about who is there now.
    pub(super) fn drop_alarms_of_strangers(&mut self) {
        if self.cluster_version < FENCES_SINCE {
            return;
        }
        let before = self.alarms.len();
        let members = self.members.clone();
        self.alarms.retain(|(member, _)| *member == 0 || members.all.contains(member));
        if self.alarms.len() != before {
            self.record_alarms();
        }
    }

    fn record_alarms(&mut self) {
        let alarms = Alarms { alarms: self.alarms() };
        let bytes = alarms.alarms.len() * size_of::<AlarmMember>();
        self.record(change::Change::Alarms(alarms), bytes);
    }

    /// Puts an alarm on, or takes it off, and answers those that this changed. `NONE` is no alarm: it changes nothing. To take one
    /// off is never refused.
    pub(super) fn alarm(&mut self, r: &AlarmRequest) -> Result<AlarmResponse, Error> {
        let one = (r.member_id, r.alarm);
        let kind = AlarmType::try_from(r.alarm).unwrap_or(AlarmType::None);
        let changed = match AlarmAction::try_from(r.action) {
            Ok(AlarmAction::Activate) if kind != AlarmType::None => {
                self.is_room_for(r.member_id, kind)? && self.put_on(one)
            }
            Ok(AlarmAction::Deactivate) => {
                let before = self.alarms.len();
                self.alarms.retain(|on| *on != one);
                self.alarms.len() != before
            }
            _ => false,
        };
        if changed {
            self.record_alarms();
        }
        // As etcd: who puts on an alarm that is on already is told of it, too.
        let told = changed || self.alarms.contains(&one);
        let alarms = told.then_some(AlarmMember { member_id: one.0, alarm: one.1 }).into_iter().collect();
        Ok(AlarmResponse { header: header(self.revision), alarms })
    }

    /// False if it is on already.
    fn put_on(&mut self, one: (u64, i32)) -> bool {
        let is_new = !self.alarms.contains(&one);
        if is_new {
            self.alarms.push(one);
            if self.cluster_version < FENCES_SINCE {
                self.alarms.sort_unstable();
            }
        }
        is_new
    }

    /// Whether this alarm may be put on.
    fn is_room_for(&self, member_id: u64, kind: AlarmType) -> Result<bool, Error> {
        if self.cluster_version < FENCES_SINCE {
            return Ok(self.alarms.len() < ALARMS_MAX);
        }
        if member_id == 0 || self.has_alarm_of(member_id, kind) {
            return Ok(true);
        }
        if !self.members.all.contains(&member_id) {
            return Err(Error::MemberNotFound);
        }
        let mut fenced = self.fenced();
        fenced.insert(member_id);
        // Of a learner it changes no vote.
        let votes = self.members.configs.iter().any(|voters| voters.contains(&member_id));
        if kind == AlarmType::Corrupt && votes && !self.members.is_minority(&fenced) {
            return Err(Error::FenceOfMajority);
        }
        Ok(true)
    }
}

/// Alarms as they are told.
pub(super) fn listed(alarms: &[(u64, i32)]) -> Vec<AlarmMember> {
    alarms.iter().map(|&(member_id, alarm)| AlarmMember { member_id, alarm }).collect()
}

/// True for a command that stores new data, in whichever branch; deletions and compactions free it.
pub fn takes_space(request: &command::Request) -> bool {
    use command::Request;
    match request {
        Request::Put(_) | Request::LeaseGrant(_) | Request::Follow(_) => true,
        Request::Txn(txn) => any_op(txn, &|op| matches!(op, request_op::Request::RequestPut(_))),
        Request::DeleteRange(_)
        | Request::Compact(_)
        | Request::SetClusterVersion(_)
        | Request::WantedSize(_)
        | Request::LeaseRevoke(_)
        | Request::LeaseCheckpoint(_)
        | Request::Alarm(_)
        | Request::Auth(_)
        | Request::Promote(_)
        | Request::Supersede(_)
        | Request::StartDigest(_) => false,
    }
}

/// Whether `is` holds for an operation of either branch, however deep.
pub fn any_op(txn: &TxnRequest, is: &dyn Fn(&request_op::Request) -> bool) -> bool {
    let mut branches: Vec<&[RequestOp]> = vec![&txn.success, &txn.failure];
    while let Some(branch) = branches.pop() {
        for request in branch.iter().filter_map(|op| op.request.as_ref()) {
            match request {
                request_op::Request::RequestTxn(inner) => branches.extend([&inner.success[..], &inner.failure]),
                op if is(op) => return true,
                _ => {}
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::{ALARMS_SINCE, Fault, Loader};
    use super::*;
    use crate::pb::log::{Answer, Command, SetClusterVersion, command};

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

    fn raise(state: &mut State) {
        let raise = command::Request::SetClusterVersion(SetClusterVersion { version: FENCES_SINCE });
        state.apply(&Command::new(1, raise), false).unwrap().unwrap();
    }

    fn ask(state: &mut State, action: AlarmAction, member_id: u64, kind: AlarmType) -> Result<Answer, Error> {
        let request = AlarmRequest { action: action.into(), member_id, alarm: kind.into() };
        state.apply(&Command::new(ALARMS_SINCE, command::Request::Alarm(request)), true).unwrap()
    }

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn alarms_are_listed_in_the_order_in_which_they_were_put_on_and_nospace_refuses_what_stores() {
        use crate::pb::etcd::{DeleteRangeRequest, LeaseGrantRequest, PutRequest};
        let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
        let delete = DeleteRangeRequest { key: "k".into(), ..DeleteRangeRequest::default() };
        let of = |op: &request_op::Request| vec![RequestOp { request: Some(op.clone()) }];
        let deletes = of(&request_op::Request::RequestDeleteRange(delete.clone()));
        let nested = TxnRequest { failure: of(&request_op::Request::RequestPut(put.clone())), ..TxnRequest::default() };
        let nested = of(&request_op::Request::RequestTxn(nested));
        let lease = |id| command::Request::LeaseGrant(LeaseGrantRequest { ttl: 9, id });
        let txn = |success| command::Request::Txn(TxnRequest { success, ..TxnRequest::default() });
        let mut state = State::new();
        state.set_members(Members { configs: vec![set(&[1, 2, 3])], all: set(&[1, 2, 3]) });
        let refused = |state: &mut State, request| state.apply(&Command::new(1, request), true).unwrap().is_err();
        ask(&mut state, AlarmAction::Activate, 3, AlarmType::Nospace).unwrap();
        ask(&mut state, AlarmAction::Activate, 1, AlarmType::Nospace).unwrap();
        let members = |state: &State| state.alarms().iter().map(|on| on.member_id).collect::<Vec<_>>();
        assert_eq!(members(&state), [1, 3], "as 0.1 has them");
        assert!(!refused(&mut state, command::Request::Put(put.clone())), "0.1 takes it");
        raise(&mut state);
        ask(&mut state, AlarmAction::Activate, 2, AlarmType::Nospace).unwrap();
        assert_eq!(members(&state), [1, 3, 2]);
        for request in [command::Request::Put(put.clone()), lease(7), txn(nested)] {
            assert!(refused(&mut state, request.clone()), "{request:?}");
        }
        for request in [txn(deletes), command::Request::DeleteRange(delete)] {
            assert!(!refused(&mut state, request.clone()), "{request:?}");
        }
        for member in [1, 2, 3] {
            assert!(state.is_capped());
            ask(&mut state, AlarmAction::Deactivate, member, AlarmType::Nospace).unwrap();
        }
        assert!(!refused(&mut state, command::Request::Put(put)) && !refused(&mut state, lease(7)));
    }

    /// Random alarms and memberships: the list stays as short as the membership, and what is put on never fences a majority.
    #[test]
    fn no_sequence_of_alarms_fences_a_majority_or_fills_the_list() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..300 {
            let mut state = State::new();
            raise(&mut state);
            for _ in 0..60 {
                if random.u8(..8) == 0 {
                    let all: BTreeSet<u64> = (1..=7).filter(|_| random.bool()).collect();
                    let mut voters =
                        || -> BTreeSet<u64> { all.iter().copied().filter(|_| random.u8(..4) > 0).collect() };
                    let configs = vec![voters(), voters()];
                    state.set_members(Members { configs, all });
                }
                let before = state.alarms();
                let was_sound = state.has_sound_majority();
                let action = [AlarmAction::Activate, AlarmAction::Activate, AlarmAction::Deactivate][random.usize(..3)];
                let (member, kind) = (random.u64(..10), random.i32(0..3));
                let kind = AlarmType::try_from(kind).unwrap();
                let answer = ask(&mut state, action, member, kind);
                if action == AlarmAction::Deactivate {
                    assert!(answer.is_ok() && !state.has_alarm_of(member, kind), "it is taken off: {member} {kind:?}");
                }
                if answer.is_err() {
                    assert_eq!(state.alarms(), before, "what is refused changes nothing");
                }
                assert!(!was_sound || state.has_sound_majority(), "{kind:?} of {member} fences a majority");
                let members = state.members.all.clone();
                assert!(state.alarms().iter().all(|on| on.member_id == 0 || members.contains(&on.member_id)));
                assert!(state.alarms().len() <= 2 * (members.len() + 1));
            }
        }
    }

    #[test]
    fn who_is_refused_is_told_why_and_corrupt_finds_room_in_a_list_that_0_1_has_filled() {
        let mut state = State::new();
        for stranger in 0..ALARMS_MAX as u64 {
            ask(&mut state, AlarmAction::Activate, stranger + 10, AlarmType::Nospace).unwrap();
        }
        ask(&mut state, AlarmAction::Activate, 1, AlarmType::Corrupt).unwrap();
        assert_eq!(state.alarms().len(), ALARMS_MAX, "as 0.1 has it");
        state.set_members(Members { configs: vec![set(&[1, 2, 3])], all: set(&[1, 2, 3, 4]) });
        assert_eq!(state.alarms().len(), ALARMS_MAX, "as 0.1 has it");
        state.keep_journal(1 << 20);
        raise(&mut state);
        assert!(state.alarms().is_empty());
        assert!(!state.take_journal().changes.is_empty(), "a restart knows it, too");
        let mut corrupt = |member| ask(&mut state, AlarmAction::Activate, member, AlarmType::Corrupt).map(drop);
        assert_eq!(corrupt(9), Err(Error::MemberNotFound));
        assert_eq!(corrupt(1), Ok(()));
        assert_eq!(corrupt(1), Ok(()), "it is on already");
        assert_eq!(corrupt(2), Err(Error::FenceOfMajority));
        assert_eq!(corrupt(4), Ok(()), "a learner");
        assert_eq!(corrupt(0), Ok(()), "all are doubted");
        assert!(state.has_sound_majority());
        state.set_members(Members { configs: vec![set(&[1, 2])], all: set(&[1, 2]) });
        assert!(!state.has_sound_majority(), "half of the voters");
        assert_eq!(state.alarms().len(), 2, "the learner has left");
    }
}
