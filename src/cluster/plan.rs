//! The next change of the membership, as a pure function of what the leader observes (membership rules 10-14, 16, 18-23).
//!
//! How the leader uses it: at every tick gather an [`Observed`], call [`plan`], show [`Plan::Blocked`] in `status`, and carry out a
//! [`Plan::Change`] with `Observed::membership.log_id` as its precondition. [`Change::voters_after`] gives the voters to ask Raft
//! for; a change that has none is about learners or addresses. Then observe again: the plan is computed anew each time,
//! so that a new leader needs nothing from the old one.
//!
//! | change | Raft |
//! |---|---|
//! | `AddLearner` | add the node as learner, without waiting for it |
//! | `RemoveLearners` | remove the nodes |
//! | `UpdateNode`, `Claim` | set the node |
//! | the others | change to `voters_after`; old voters stay learners if `retain` |
//! | `TransferLeader` | hand over leadership; no membership entry |
//!
//! Invariants: one change at a time; healthy caught-up voters are a quorum before and after it (rule 21); a dead member of the
//! StatefulSet inside its range is never removed for being dead (rule 19).
//! What a person asks for passes the same gate (`manual`).
//! Absent: time (durations are observed), I/O, and memory of former plans.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use super::{slot_of, voter_target};
use crate::env::planted;
use crate::pb::log::node::Kind;
use crate::pb::log::{LogId, Node, Reservation, StoredMembership};

#[cfg(test)]
mod tests;

/// Members by id.
pub type Ids = BTreeSet<u64>;

/// The committed or applied membership, in the form that planning wants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members {
    /// Of the entry that holds it: what a change expects to find.
    pub log_id: Option<LogId>,
    /// Voters; two sets while a joint change is under way, the old one first.
    pub configs: Vec<Ids>,
    /// Voters and learners.
    pub nodes: BTreeMap<u64, Node>,
}

impl From<&StoredMembership> for Members {
    fn from(stored: &StoredMembership) -> Self {
        let membership = stored.membership.clone().unwrap_or_default();
        let nodes = membership.members.into_iter().map(|member| (member.id, member.node.unwrap_or_default()));
        Self {
            log_id: stored.log_id,
            configs: membership.configs.into_iter().map(|config| config.voters.into_iter().collect()).collect(),
            nodes: nodes.collect(),
        }
    }
}

impl Members {
    /// Members that vote in any configuration.
    pub fn voters(&self) -> Ids {
        self.configs.iter().flatten().copied().collect()
    }

    pub fn learners(&self) -> Ids {
        let voters = self.voters();
        self.nodes.keys().copied().filter(|id| !voters.contains(id)).collect()
    }

    /// The reserved id that was given to the disk of `member`.
    pub(super) fn claimed_by(&self, member: u64) -> Option<u64> {
        let is_its = |node: &Node| node.reservation.is_some_and(|reservation| reservation.claimed_by == member);
        self.nodes.iter().find(|(_, node)| is_its(node)).map(|(id, _)| *id)
    }

    pub(super) fn kind(&self, id: u64) -> Kind {
        self.nodes.get(&id).map_or(Kind::Slot, Node::kind)
    }

    /// Members of the StatefulSet at `slot`.
    fn at_slot(&self, slot: u64) -> impl Iterator<Item = u64> + '_ {
        self.nodes.keys().copied().filter(move |id| slot_of(*id) == slot && self.kind(*id) == Kind::Slot)
    }
}

/// What the leader sees of one member of the membership. The leader itself needs none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Health {
    /// Has acknowledged a Raft call within the last election timeout, and answers now as who it is.
    pub reachable: bool,
    /// Since its last sign of life.
    pub silent_for: Duration,
    /// How long its log has kept up with the leader's; `None` while it does not.
    pub caught_up_for: Option<Duration>,
    /// Entries that its log lacks.
    pub lag_entries: u64,
    /// The member id that answered `Who` at this member's own address last.
    pub address_answers: Option<u64>,
    /// How it describes itself now, from its own answer to `Who`; `None` if it has not answered.
    pub announces: Option<Node>,
    /// Of the program that it runs, from the same answer; empty if it has not answered.
    pub version: String,
}

/// What was found when the leader dialled the pattern's address of a joiner's slot (rule 10).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dialled {
    /// The joiner itself: same member id, same process.
    Joiner,
    /// Another member, with this id (or another process with the same disk).
    Other(u64),
    Unreachable(String),
}

/// A node that asks to be added.
#[derive(Clone, Debug, PartialEq)]
pub struct Joiner {
    pub member_id: u64,
    pub node: Node,
    pub dialled: Dialled,
    /// It takes an id that was reserved for it.
    pub adopts: bool,
}

/// The slots that should exist: `[start, start + replicas)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedSlots {
    pub slots: Range<u64>,
    /// How often in a row the same range was read, itself included.
    pub observations: u32,
}

/// Times and bounds, from the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub max_voters: usize,
    /// Silence after which a member counts as dead.
    pub failure_timeout: Duration,
    /// How long a learner must have kept up before it votes.
    pub stable_for: Duration,
    /// Silence after which a reader is removed; `None` for never.
    pub reader_ttl: Option<Duration>,
    pub max_readers: usize,
}

/// All that a plan rests on.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// The leader, which is who plans.
    pub leader: u64,
    /// It has committed an entry in its term: it knows the newest membership.
    pub committed_in_term: bool,
    /// A change is being carried out (both steps of a joint one), or the last membership entry is not committed yet.
    pub in_flight: bool,
    pub membership: Members,
    pub health: BTreeMap<u64, Health>,
    /// Which member id answered last at the pattern's address of each slot.
    pub slots: BTreeMap<u64, u64>,
    pub joiners: Vec<Joiner>,
    /// `None` if nobody says so, or nobody could be asked, or the StatefulSet is being shut down: then nothing is condemned.
    pub wanted: Option<WantedSlots>,
    pub limits: Limits,
}

/// One change of the membership.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    FinishJoint {
        voters: Ids,
    },
    RollbackJoint {
        voters: Ids,
    },
    AddLearner {
        id: u64,
        node: Node,
    },
    UpdateNode {
        id: u64,
        node: Node,
    },
    /// A reserved id is given to the disk that has come, for good.
    Claim {
        id: u64,
        node: Node,
    },
    /// Learners that become voters.
    Promote {
        ids: Ids,
    },
    /// One voter for another, in one joint change. With `keep_old` the old one stays as a learner.
    ReplaceVoter {
        old: u64,
        new: u64,
        keep_old: bool,
    },
    /// Voters that leave for good, all in one joint change.
    RemoveVoters {
        ids: Ids,
    },
    RemoveLearners {
        ids: Ids,
    },
    /// Voters that become learners in standby.
    Demote {
        ids: Ids,
    },
    TransferLeader {
        to: u64,
    },
}

impl Change {
    /// The voters after this change, and whether those who cease to vote stay as learners; `None` if it changes no voters.
    pub fn voters_after(&self, membership: &Members) -> Option<(Ids, bool)> {
        let now = membership.voters();
        Some(match self {
            // Whoever only voted in the other set stays a learner: the next plan knows whether it is wanted.
            Self::FinishJoint { voters } | Self::RollbackJoint { voters } => (voters.clone(), true),
            Self::Promote { ids } => (&now | ids, true),
            Self::ReplaceVoter { old, new, keep_old } => (&(&now - &Ids::from([*old])) | &Ids::from([*new]), *keep_old),
            Self::RemoveVoters { ids } => (&now - ids, false),
            Self::Demote { ids } => (&now - ids, true),
            Self::AddLearner { .. }
            | Self::UpdateNode { .. }
            | Self::Claim { .. }
            | Self::RemoveLearners { .. }
            | Self::TransferLeader { .. } => {
                return None;
            }
        })
    }
}

/// Which configuration lacks a quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Old,
    New,
}

/// Why a change that is wanted is not made, and what it needs. The text is for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("waits until this leader has committed an entry in its term")]
    NotCommittedInTerm,
    #[error("waits until the last membership change is committed")]
    InFlight,
    #[error("{change} needs {needs} healthy, caught-up voters of the {which} configuration, {have} are; not: {missing}{back}",
        which = if *.which == Which::Old { "present" } else { "new" }, missing = list(.missing),
        back = .scale_back.map(|size| format!("; start them, or scale back to {size}")).unwrap_or_default())]
    Quorum { change: &'static str, which: Which, needs: usize, have: usize, missing: Ids, scale_back: Option<u64> },
    #[error("a joint change is half done, and neither of its configurations has a quorum of healthy, caught-up voters")]
    JointStuck,
    #[error("slot {slot} is held by two members, {holder:016x} and {claimer:016x}; stop one of them")]
    TwoHolders { slot: u64, holder: u64, claimer: u64 },
    #[error("slot {slot} belongs to member {holder:016x}, silent for {} s; member {claimer:016x} may take it over after {} s",
        .silent_for.as_secs(), .needs.as_secs())]
    HolderSilent { slot: u64, holder: u64, claimer: u64, silent_for: Duration, needs: Duration },
    #[error("member {member:016x} asks to join as slot {slot}, whose address does not answer: {why}")]
    NotDialled { slot: u64, member: u64, why: String },
    #[error("member {member:016x} asks to join as slot {slot}, outside of the wanted slots {} to {}",
        .slots.start, .slots.end.saturating_sub(1))]
    OutsideRange { member: u64, slot: u64, slots: Range<u64> },
    #[error("this leader is to be removed, and no healthy, caught-up voter inside the wanted slots can take over")]
    NoSuccessor,
    #[error(
        "member {member:016x} asks to join as a reader, and there are {have} already (cluster.max_readers is {most})"
    )]
    TooManyReaders { member: u64, have: usize, most: usize },
    #[error("member {member:016x} is one that is added by hand: `quorate member add {address}`")]
    NotAddedByHand { member: u64, address: String },
    #[error(
        "member {member:016x} asks to join at {address}, the address of member {holder:016x}, which another disk has been: an id is given once, \
         or it could vote twice; if that disk is gone, `member remove {holder:x}`, and then `member add` lets this one in"
    )]
    AddressTaken { member: u64, address: String, holder: u64 },
    #[error(
        "member {member:016x} asks to join at {address}, for which an id is reserved, with a build that takes none: start a newer one"
    )]
    CannotAdopt { member: u64, address: String },
    #[error("waits to read once more that the dead members {} are no longer wanted", list(.ids))]
    SecondObservation { ids: Ids },
}

impl Reason {
    /// Stable, for metrics, Events and scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotCommittedInTerm => "leader-is-new",
            Self::InFlight => "change-in-flight",
            Self::Quorum { .. } => "quorum",
            Self::JointStuck => "joint-stuck",
            Self::TwoHolders { .. } => "two-holders",
            Self::HolderSilent { .. } => "holder-silent",
            Self::NotDialled { .. } => "joiner-not-reached",
            Self::OutsideRange { .. } => "outside-range",
            Self::NoSuccessor => "no-successor",
            Self::TooManyReaders { .. } => "too-many-readers",
            Self::NotAddedByHand { .. } => "added-by-hand",
            Self::AddressTaken { .. } => "address-taken",
            Self::CannotAdopt { .. } => "cannot-adopt",
            Self::SecondObservation { .. } => "second-observation",
        }
    }
}

fn list(ids: &Ids) -> String {
    ids.iter().map(|id| format!("{id:016x}")).collect::<Vec<_>>().join(", ")
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    Change(Change),
    Blocked(Reason),
    Nothing,
}

/// What a rule wishes: a change, or why it must wait; `None` for nothing.
type Wish = Option<Result<Change, Reason>>;

/// The next change: the first wish, in the order of the rules, that passes the gate; else the first reason.
pub fn plan(observed: &Observed) -> Plan {
    if !observed.committed_in_term {
        return Plan::Blocked(Reason::NotCommittedInTerm);
    }
    if observed.in_flight {
        return Plan::Blocked(Reason::InFlight);
    }
    if let [old, new] = &observed.membership.configs[..] {
        return joint(observed, old, new);
    }
    let mut blocked = None;
    for wish in wishes(observed) {
        match wish.and_then(|change| gate(observed, change)) {
            Ok(change) => return Plan::Change(change),
            Err(reason) => {
                blocked.get_or_insert(reason);
            }
        }
    }
    blocked.map_or(Plan::Nothing, Plan::Blocked)
}

/// Promotions before removals, removals before demotions of healthy voters (rule 23).
fn wishes(observed: &Observed) -> Vec<Result<Change, Reason>> {
    let mut wishes: Vec<Result<Change, Reason>> = Vec::new();
    wishes.extend(replace_lost_voter(observed));
    wishes.extend(promote(observed));
    wishes.extend(observed.joiners.iter().filter_map(|joiner| add(observed, joiner)));
    wishes.extend(update_address(observed));
    wishes.extend(remove_condemned(observed));
    wishes.extend(remove_learners(observed));
    wishes.extend(stand_in_for_dead_voter(observed));
    wishes.extend(demote(observed));
    wishes
}

/// Rule 22: what an earlier leader has left half done comes first.
fn joint(observed: &Observed, old: &Ids, new: &Ids) -> Plan {
    if lacks_quorum(observed, new).is_none() {
        Plan::Change(Change::FinishJoint { voters: new.clone() })
    } else if lacks_quorum(observed, old).is_none() {
        Plan::Change(Change::RollbackJoint { voters: old.clone() })
    } else {
        Plan::Blocked(Reason::JointStuck)
    }
}

/// Rule 21.
pub(super) fn gate(observed: &Observed, change: Change) -> Result<Change, Reason> {
    let old = observed.membership.voters();
    let new = change.voters_after(&observed.membership).map(|(voters, _)| voters);
    for (which, voters) in [(Which::Old, Some(old)), (Which::New, new)] {
        let Some((needs, have, missing)) = voters.and_then(|voters| lacks_quorum(observed, &voters)) else { continue };
        let scale_back = observed.scale_back();
        return Err(Reason::Quorum { change: label(&change), which, needs, have, missing, scale_back });
    }
    Ok(change)
}

/// What a change does, in words.
pub fn label(change: &Change) -> &'static str {
    match change {
        Change::FinishJoint { .. } => "finishing a joint change",
        Change::RollbackJoint { .. } => "rolling a joint change back",
        Change::AddLearner { .. } => "adding a learner",
        Change::UpdateNode { .. } => "updating a member's address",
        Change::Claim { .. } => "giving a reserved id to the node that has come",
        Change::Promote { .. } => "promoting learners",
        Change::ReplaceVoter { .. } => "replacing a voter",
        Change::RemoveVoters { .. } => "removing voters",
        Change::RemoveLearners { .. } => "removing learners",
        Change::Demote { .. } => "turning voters into learners",
        Change::TransferLeader { .. } => "handing over leadership",
    }
}

/// Needed, there, and not there, if the healthy caught-up ones are no quorum of `voters`.
fn lacks_quorum(observed: &Observed, voters: &Ids) -> Option<(usize, usize, Ids)> {
    let missing: Ids = voters.iter().copied().filter(|id| !observed.is_fit(*id)).collect();
    let needs = voters.len() / 2 + 1;
    let have = voters.len() - missing.len();
    (have < needs).then_some((needs, have, missing))
}

/// Rule 13: the newcomer of a lost disk takes over the vote once it has caught up.
fn replace_lost_voter(observed: &Observed) -> Wish {
    let voters = observed.membership.voters();
    let newcomers = observed.membership.learners().into_iter().filter(|id| observed.is_slot_member(*id));
    newcomers
        .filter(|new| observed.slots.get(&slot_of(*new)) == Some(new) && observed.is_stable(*new))
        .filter_map(|new| {
            let old = observed.membership.at_slot(slot_of(new)).find(|id| voters.contains(id))?;
            let keep_old = planted!("two-ids-for-one-slot");
            Some(may_take_over(observed, old, new).map(|()| Change::ReplaceVoter { old, new, keep_old }))
        })
        .next()
}

/// Rule 14.
fn may_take_over(observed: &Observed, holder: u64, claimer: u64) -> Result<(), Reason> {
    let slot = slot_of(holder);
    let health = observed.health_of(holder);
    if holder == observed.leader || health.reachable {
        return Err(Reason::TwoHolders { slot, holder, claimer });
    }
    let needs = observed.limits.failure_timeout;
    if health.address_answers == Some(claimer) || health.silent_for >= needs {
        return Ok(());
    }
    Err(Reason::HolderSilent { slot, holder, claimer, silent_for: health.silent_for, needs })
}

/// Rules 10 and 11: as many stable learners as may vote, in one change. Whom a person has added votes, however many do then: odd numbers
/// and a maximum are for those who come by themselves.
fn promote(observed: &Observed) -> Wish {
    let (mut slots, mut ids): (Vec<u64>, Vec<u64>) =
        observed.standby().into_iter().partition(|id| observed.is_slot_member(*id));
    let staying = observed.staying_slots().len();
    slots.truncate(voter_target(staying + slots.len(), observed.limits.max_voters).saturating_sub(staying));
    ids.extend(slots);
    (!ids.is_empty()).then(|| Ok(Change::Promote { ids: ids.into_iter().collect() }))
}

/// Rules 10, 13, 14: who asks to join becomes a learner, if it is who it says.
fn add(observed: &Observed, joiner: &Joiner) -> Wish {
    let member = joiner.member_id;
    if observed.membership.nodes.contains_key(&member) {
        return None;
    }
    let slot = slot_of(member);
    let node = joiner.node.clone();
    match &joiner.dialled {
        Dialled::Joiner => {}
        Dialled::Other(other) => return Some(Err(Reason::TwoHolders { slot, holder: *other, claimer: member })),
        Dialled::Unreachable(why) => return Some(Err(Reason::NotDialled { slot, member, why: why.clone() })),
    }
    match node.kind() {
        Kind::Slot => {}
        Kind::Manual => return claim(observed, joiner),
        Kind::Reader => return Some(add_reader(observed, member, node)),
    }
    if let Some(wanted) = observed.wanted.as_ref().filter(|wanted| !wanted.slots.contains(&slot)) {
        return Some(Err(Reason::OutsideRange { member, slot, slots: wanted.slots.clone() }));
    }
    let allowed = observed.membership.at_slot(slot).try_for_each(|holder| may_take_over(observed, holder, member));
    Some(allowed.map(|()| Change::AddLearner { id: member, node }))
}

/// Rule 24: who is added by hand takes the id that was reserved for where it is, unless another disk has had it.
fn claim(observed: &Observed, joiner: &Joiner) -> Wish {
    let (member, address) = (joiner.member_id, joiner.node.peer_address.clone());
    let is_there = |id: u64| observed.health_of(id).address_answers == Some(member);
    let nodes = &observed.membership.nodes;
    let Some((id, node)) = nodes.iter().find(|(id, node)| node.peer_address == address || is_there(**id)) else {
        return Some(Err(Reason::NotAddedByHand { member, address }));
    };
    match node.reservation.map(|reservation| reservation.claimed_by) {
        Some(0) if joiner.adopts => {
            let reservation = Some(Reservation { claimed_by: member });
            let node = Node { kind: node.kind, held: node.held, reservation, ..joiner.node.clone() };
            Some(Ok(Change::Claim { id: *id, node }))
        }
        Some(0) => Some(Err(Reason::CannotAdopt { member, address })),
        // It is told at the desk, when it asks again.
        Some(claimant) if claimant == member => None,
        _ => Some(Err(Reason::AddressTaken { member, address, holder: *id })),
    }
}

/// A reader holds no slot, so nothing but its own address is to be checked.
fn add_reader(observed: &Observed, member: u64, node: Node) -> Result<Change, Reason> {
    let readers = observed.membership.nodes.values().filter(|node| node.kind() == Kind::Reader).count();
    let most = observed.limits.max_readers;
    if readers >= most {
        return Err(Reason::TooManyReaders { member, have: readers, most });
    }
    Ok(Change::AddLearner { id: member, node })
}

/// Rule 3: a member that has started with other addresses. Its new one is known from its request to join again, and counts if it
/// leads there.
fn update_address(observed: &Observed) -> Wish {
    let moved = |id: u64| {
        let joiner = observed.joiners.iter().find(|joiner| joiner.member_id == id)?;
        (joiner.dialled == Dialled::Joiner).then_some(&joiner.node)
    };
    observed.membership.nodes.iter().find_map(|(id, node)| {
        let announced = observed.health.get(id).and_then(|health| health.announces.as_ref()).or_else(|| moved(*id))?;
        // Kind and hold are the membership's to say.
        let node_now = Node { kind: node.kind, held: node.held, ..announced.clone() };
        (node_now != *node).then_some(Ok(Change::UpdateNode { id: *id, node: node_now }))
    })
}

/// Rules 16 and 18: all voters outside of the wanted range leave in one joint change; a leader among them hands over first.
fn remove_condemned(observed: &Observed) -> Wish {
    let condemned = match observed.condemned(&observed.membership.voters()) {
        Ok(condemned) if condemned.is_empty() => return None,
        Ok(condemned) => condemned,
        Err(reason) => return Some(Err(reason)),
    };
    let change = Change::RemoveVoters { ids: condemned.clone() };
    if !condemned.contains(&observed.leader) {
        return Some(Ok(change));
    }
    // The gate first: a leadership that is handed over for nothing costs an election.
    let handover = observed.successor(&condemned).map(|to| Change::TransferLeader { to }).ok_or(Reason::NoSuccessor);
    Some(gate(observed, change).and(handover))
}

/// Learners that nobody needs: condemned ones, those whose slot has another member now, and readers gone for long.
fn remove_learners(observed: &Observed) -> Wish {
    let learners = observed.membership.learners();
    let replaced = learners.iter().copied().filter(|old| {
        let Some(new) = observed.slots.get(&slot_of(*old)).filter(|new| *new != old) else { return false };
        let succeeded = observed.is_slot_member(*old) && observed.membership.nodes.contains_key(new);
        succeeded && !planted!("two-ids-for-one-slot") && may_take_over(observed, *old, *new).is_ok()
    });
    let gone = |id: &u64| {
        let reader = observed.membership.kind(*id) == Kind::Reader;
        reader && observed.limits.reader_ttl.is_some_and(|ttl| observed.health_of(*id).silent_for >= ttl)
    };
    let mut removed: Ids = replaced.chain(learners.iter().copied().filter(gone)).collect();
    let waits = match observed.condemned(&learners) {
        Ok(condemned) => {
            removed.extend(condemned);
            None
        }
        Err(reason) => Some(Err(reason)),
    };
    if removed.is_empty() { waits } else { Some(Ok(Change::RemoveLearners { ids: removed })) }
}

/// Rule 11: a learner in standby takes over the vote of a dead voter, which stays a learner until it is back.
fn stand_in_for_dead_voter(observed: &Observed) -> Wish {
    let new = observed.standby().into_iter().next()?;
    let old = observed.staying_voters().into_iter().find(|id| observed.is_dead(*id) && observed.is_slot_member(*id))?;
    Some(Ok(Change::ReplaceVoter { old, new, keep_old: true }))
}

/// Rule 11: voters beyond the maximum, and the odd one out; the dead first, then the highest slot, never the leader.
fn demote(observed: &Observed) -> Wish {
    let staying = observed.staying_slots();
    let surplus = staying.len() - voter_target(staying.len(), observed.limits.max_voters);
    let mut candidates: Vec<u64> = staying.into_iter().filter(|id| *id != observed.leader).collect();
    candidates.sort_by_key(|id| (observed.is_fit(*id), std::cmp::Reverse(slot_of(*id))));
    let ids: Ids = candidates.into_iter().take(surplus).collect();
    (!ids.is_empty()).then_some(Ok(Change::Demote { ids }))
}

impl Observed {
    pub(super) fn health_of(&self, id: u64) -> Health {
        self.health.get(&id).cloned().unwrap_or_default()
    }

    /// Healthy and caught up.
    pub(super) fn is_fit(&self, id: u64) -> bool {
        let health = || self.health_of(id);
        id == self.leader || (health().reachable && health().caught_up_for.is_some())
    }

    pub(super) fn is_stable(&self, id: u64) -> bool {
        self.is_fit(id) && self.health_of(id).caught_up_for.is_some_and(|since| since >= self.limits.stable_for)
    }

    fn is_dead(&self, id: u64) -> bool {
        let health = self.health_of(id);
        id != self.leader && !health.reachable && health.silent_for >= self.limits.failure_timeout
    }

    fn is_slot_member(&self, id: u64) -> bool {
        self.membership.kind(id) == Kind::Slot
    }

    /// Its slot is not wanted.
    pub fn is_condemned(&self, id: u64) -> bool {
        let outside = |wanted: &WantedSlots| !wanted.slots.is_empty() && !wanted.slots.contains(&slot_of(id));
        self.is_slot_member(id) && self.wanted.as_ref().is_some_and(outside)
    }

    /// The condemned among `ids`. Dead ones only after a second observation: one misread must not cost a member that cannot
    /// object.
    fn condemned(&self, ids: &Ids) -> Result<Ids, Reason> {
        let condemned: Ids = ids.iter().copied().filter(|id| self.is_condemned(*id)).collect();
        let dead: Ids = condemned.iter().copied().filter(|id| !self.is_fit(*id)).collect();
        let observed_twice = self.wanted.as_ref().is_some_and(|wanted| wanted.observations >= 2);
        if dead.is_empty() || observed_twice { Ok(condemned) } else { Err(Reason::SecondObservation { ids: dead }) }
    }

    /// Who takes over leadership: a fit voter that is not in `leaving`, with the newest program, and then with most of the log
    /// (rules 16 and 27).
    pub fn successor(&self, leaving: &Ids) -> Option<u64> {
        let voters = self.membership.voters().into_iter();
        let candidates = voters.filter(|id| *id != self.leader && !leaving.contains(id) && self.is_fit(*id));
        candidates.max_by_key(|id| {
            let health = self.health_of(*id);
            (version_key(&health.version), std::cmp::Reverse((health.lag_entries, *id)))
        })
    }

    /// Whether the voters other than `id` hold a quorum of every configuration, healthy and caught up.
    pub fn holds_without(&self, id: u64) -> bool {
        self.membership.configs.iter().all(|voters| {
            let fit = voters.iter().filter(|voter| **voter != id && self.is_fit(**voter)).count();
            fit > voters.len() / 2
        })
    }

    /// Rule 17: the least size above the wanted one whose slots have a quorum of their own, healthy and caught up.
    fn scale_back(&self) -> Option<u64> {
        let slots = &self.wanted.as_ref()?.slots;
        let voters: Ids = self.membership.voters().into_iter().filter(|id| self.is_slot_member(*id)).collect();
        let last = voters.iter().map(|id| slot_of(*id)).max()?;
        (slots.end + 1..=last + 1).map(|end| end - slots.start).find(|size| {
            let within = voters.iter().filter(|id| (slots.start..slots.start + size).contains(&slot_of(**id)));
            let (all, fit) = within.fold((0, 0), |(all, fit), id| (all + 1, fit + usize::from(self.is_fit(*id))));
            fit > all / 2
        })
    }

    fn staying_voters(&self) -> Ids {
        self.membership.voters().into_iter().filter(|id| !self.is_condemned(*id)).collect()
    }

    /// Those of them that came by themselves.
    fn staying_slots(&self) -> Ids {
        self.staying_voters().into_iter().filter(|id| self.is_slot_member(*id)).collect()
    }

    /// Learners that may vote at once, by slot: stable, wanted, no readers, and of a slot that has no vote yet.
    fn standby(&self) -> Vec<u64> {
        let voters = self.membership.voters();
        let has_vote = |slot: u64| self.membership.at_slot(slot).any(|id| voters.contains(&id));
        let mut standby: Vec<u64> = self
            .membership
            .learners()
            .into_iter()
            .filter(|id| self.is_stable(*id) && !self.is_condemned(*id) && self.membership.kind(*id) != Kind::Reader)
            .filter(|id| !self.membership.nodes[id].held)
            .filter(|id| !self.is_slot_member(*id) || !has_vote(slot_of(*id)))
            .collect();
        standby.sort_by_key(|id| (slot_of(*id), *id));
        standby
    }
}

/// Numbers of a version, so that 0.10 is newer than 0.9.
fn version_key(version: &str) -> Vec<u64> {
    version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect()
}
