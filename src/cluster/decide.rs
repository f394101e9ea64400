//! What a node without Raft does next, from what the others answered: form a cluster, join one, or wait (membership rules 5-9).
//!
//! Pure: no clock, randomness or I/O, so that the rules can be read and tested as a table.
//!
//! Invariants:
//! - Joining beats forming: whatever is not pristine blocks forming.
//! - A formation starts only when *all* of its members have accepted it. So if one of them is gone for good before that, no
//!   member can have started, which is what makes giving it up possible.
//! - A formation is dead once `n - quorum + 1` of its members, that have granted no vote in it, have durably abandoned it: every
//!   quorum contains one of them.
//!
//! Absent: sending anything (`formation`), and making promises durable (`bootstrap`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::peers::Unreachable;
use super::{slot_of, voter_target};
use crate::identity::READER_SLOT;
use crate::pb::log::{Formation, membership};
use crate::pb::peer::WhoResponse;
use crate::pb::peer::who_response::State as PeerState;

#[cfg(test)]
mod tests;

/// This node.
#[derive(Clone, Debug, PartialEq)]
pub struct Me {
    pub member_id: u64,
    pub slot: u64,
    /// Of the running process: tells an answer of this process from one of another with the same disk.
    pub process_nonce: u64,
    /// Stands for the list of first members that this node was given; 0: none.
    pub founding: u64,
    pub state: State,
}

/// What this node belongs to, as fsynced.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    Pristine,
    Accepted(Formation),
    /// Will never vote in this formation, but too few of its members are known to say the same.
    Abandoned(Formation),
    /// Was told that it was added to this cluster, and has no log yet.
    Joining(u64),
}

/// Which slots a new cluster would consist of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub slots: Range<u64>,
    /// Slots that are asked too: pods that exist now, wanted or not.
    pub also: Range<u64>,
    /// The next slot's pod is made only when this one is ready.
    pub one_by_one: bool,
    /// Why the range may be too small, for example because the Kubernetes API does not answer. Joining needs no range; forming
    /// waits.
    pub unknown: Option<String>,
}

/// One address that was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The slot that the address belongs to by the peer pattern; `None` for other addresses.
    pub slot: Option<u64>,
    pub address: String,
    pub answer: Result<WhoResponse, Unreachable>,
}

/// All that a decision rests on.
#[derive(Clone, Debug)]
pub struct View {
    pub me: Me,
    pub expected: Expected,
    /// Every expected slot, the slots of an accepted formation, and further addresses; self among them.
    pub asked: Vec<Asked>,
    /// `None`: all vote.
    pub max_voters: Option<usize>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Accept a formation of these members under a fresh cluster id. Ascending by id.
    Propose(Vec<membership::Member>),
    /// Accept this formation, which another has proposed.
    Accept(Formation),
    /// Ask these addresses to accept the formation that this node has accepted.
    Drive {
        formation: Formation,
        ask: Vec<String>,
        then: Wait,
    },
    /// All have accepted: start Raft with these members.
    Initialize(Formation),
    /// Ask the leader at this address to be added.
    Join {
        cluster_id: u64,
        address: String,
    },
    /// Ask these addresses to abandon the formation; when all of them have, abandon it here.
    Abandon {
        cluster_id: u64,
        ask: Vec<String>,
    },
    /// Become a new, pristine self: the abandoned formation is dead.
    MintAnew,
    /// A cluster with a quorum exists: abandon the accepted formation here, and become a new self.
    Yield {
        cluster_id: u64,
    },
    Wait(Wait),
}

/// What a node waits for; its text is for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wait {
    #[error("waits for slot {slot} ({address}): {why}")]
    Slot { slot: u64, address: String, why: String },
    #[error(
        "waits for slot {slot} ({address}), whose pod is made only when the one before it is ready, and none is ready before there \
         is a cluster (podManagementPolicy: OrderedReady); install again with Parallel, or with 1 replica, and scale up once that one is ready"
    )]
    OneByOne { slot: u64, address: String },
    #[error("waits for {address}, which the headless name resolves to: {why}")]
    Address { address: String, why: String },
    #[error("waits until its own address {address} leads to itself: {why}")]
    OwnAddress { address: String, why: String },
    #[error("waits: slot {slot} is held by two members, {ids}", ids = hex(.ids))]
    TwoHolders { slot: u64, ids: Vec<u64> },
    #[error("waits: the peers belong to several clusters, {ids}; remove the disks of all but one", ids = hex(.ids))]
    TwoClusters { ids: Vec<u64> },
    #[error("waits: cluster {cluster_id:016x} has no quorum (asked {addresses}); start its other members, or `recover` it",
        addresses = .addresses.join(", "))]
    NoQuorum { cluster_id: u64, addresses: Vec<String> },
    #[error("waits for a leader of cluster {cluster_id:016x}: {have} of {needs} needed voters are there (needs {needs} of {all}{scale}); \
        not: {}; start them, or `recover` this member if they are gone for good", .missing.join(", "),
        scale = .scale_to.map(|size| format!(", scale to {size}")).unwrap_or_default())]
    NoLeader { cluster_id: u64, have: usize, needs: usize, all: usize, scale_to: Option<u64>, missing: Vec<String> },
    #[error(
        "waits: member {member:016x} was removed from cluster {cluster_id:016x} by hand; restart this process to have it join again"
    )]
    Removed { cluster_id: u64, member: u64 },
    #[error("waits: this disk belongs to cluster {own:016x}, but cluster {found:016x} answers")]
    ForeignCluster { own: u64, found: u64 },
    #[error("waits for cluster {cluster_id:016x}, which slot {slot} ({address}) is forming without this member")]
    Forming { cluster_id: u64, slot: u64, address: String },
    #[error(
        "waits: formation {cluster_id:016x} has lost the disk of slot {slot} ({address}) and cannot be given up: {have} of \
        its members are known to hold nothing, {needs} are needed; bring its members back, or `recover`"
    )]
    LostDisk { cluster_id: u64, slot: u64, address: String, have: usize, needs: usize },
    #[error("waits until {needs} members have given up formation {cluster_id:016x}; {have} have")]
    Abandoning { cluster_id: u64, have: usize, needs: usize },
    #[error("waits for the others to accept formation {cluster_id:016x}")]
    Accepting { cluster_id: u64 },
    #[error("waits for slot {slot} to propose a formation")]
    Proposal { slot: u64 },
    #[error("waits for a cluster to join: {}", outside(*.slot, .slots))]
    OutsideRange { slot: u64, slots: Range<u64> },
    #[error("waits to know how many members there should be: {0}")]
    Unknown(String),
    #[error("waits to be added to cluster {cluster_id:016x} by {address}: {why}")]
    Join { cluster_id: u64, address: String, why: String },
    #[error("waits for {address}, which refuses: {why}")]
    Refused { address: String, why: String },
    #[error("waits for the backup that the cluster is to begin with: {why}")]
    Restore { why: String },
}

fn outside(slot: u64, slots: &Range<u64>) -> String {
    if slot == u64::from(READER_SLOT) {
        return "a member without a slot forms none".into();
    }
    format!("slot {slot} is outside of the expected slots {} to {}", slots.start, slots.end.saturating_sub(1))
}

fn hex(ids: &[u64]) -> String {
    ids.iter().map(|id| format!("{id:016x}")).collect::<Vec<_>>().join(" and ")
}

/// The next step of a node on which Raft has not started.
pub fn decide(view: &View) -> Step {
    match &view.me.state {
        State::Pristine => pristine(view),
        State::Joining(cluster_id) => joining(view, *cluster_id),
        State::Accepted(formation) => accepted(view, formation),
        State::Abandoned(formation) => abandoned(view, formation),
    }
}

/// Whether the formation can never have a leader any more, or has lost against a cluster with a quorum. For members that have
/// started Raft in it and see no leader.
pub fn is_dead(view: &View, formation: &Formation) -> bool {
    let yields = other_quorum(view, formation.cluster_id).is_some() && !led(view, formation.cluster_id);
    yields || abandoners(view, formation).len() >= abandon_needs(formation)
}

fn pristine(view: &View) -> Step {
    if let Some(step) = join_a_cluster(view) {
        return step;
    }
    if let Some(step) = foreign_formation(view) {
        return step;
    }
    form(view)
}

/// A cluster exists: join it, or wait. `None` if nobody belongs to one.
fn join_a_cluster(view: &View) -> Option<Step> {
    let clusters: BTreeSet<u64> = members_of_clusters(view).map(|(_, who)| who.cluster_id).collect();
    let ids: Vec<u64> = clusters.into_iter().collect();
    let cluster_id = *ids.first()?;
    if ids.len() > 1 {
        return Some(Step::Wait(Wait::TwoClusters { ids }));
    }
    Some(join_with_quorum(view, cluster_id))
}

fn join_with_quorum(view: &View, cluster_id: u64) -> Step {
    let members = || members_of_clusters(view).filter(|(_, who)| who.cluster_id == cluster_id);
    match members().find(|(_, who)| has_quorum(who)) {
        Some((asked, _)) => Step::Join { cluster_id, address: asked.address.clone() },
        None => {
            let addresses = members().map(|(asked, _)| asked.address.clone()).collect();
            Step::Wait(Wait::NoQuorum { cluster_id, addresses })
        }
    }
}

/// Others have accepted a formation: take part if it names this member, and let it finish if not.
fn foreign_formation(view: &View) -> Option<Step> {
    let mut of_others = None;
    let mut of_mine: Vec<&Formation> = Vec::new();
    for (asked, who) in answers(view) {
        let Some(formation) = who.formation.as_ref().filter(|_| who.state() == PeerState::Accepted) else { continue };
        let given_up = who.abandoned_cluster_ids.contains(&formation.cluster_id);
        if !given_up && names(formation, view.me.member_id) {
            if !of_mine.contains(&formation) {
                of_mine.push(formation);
            }
        } else {
            let (slot, address) = (who.slot, asked.address.clone());
            of_others = Some(Wait::Forming { cluster_id: formation.cluster_id, slot, address });
        }
    }
    match of_mine[..] {
        [] => of_others.map(Step::Wait),
        [one] => Some(Step::Accept(one.clone())),
        _ => {
            let ids = of_mine.iter().map(|formation| formation.cluster_id).collect();
            Some(Step::Wait(Wait::TwoClusters { ids }))
        }
    }
}

/// Nobody belongs to anything: the lowest slot proposes, once all have answered.
fn form(view: &View) -> Step {
    let Expected { slots, unknown, .. } = &view.expected;
    if let Some(why) = unknown {
        return Step::Wait(Wait::Unknown(why.clone()));
    }
    if !slots.contains(&view.me.slot) {
        return Step::Wait(Wait::OutsideRange { slot: view.me.slot, slots: slots.clone() });
    }
    let members = match all_pristine(view) {
        Ok(members) => members,
        Err(Wait::Slot { slot, address, .. }) if view.expected.one_by_one => {
            return Step::Wait(Wait::OneByOne { slot, address });
        }
        Err(wait) => return Step::Wait(wait),
    };
    if view.me.slot != slots.start {
        return Step::Wait(Wait::Proposal { slot: slots.start });
    }
    // Who exceeds the number of voters joins the cluster when it exists.
    let all = members.len();
    let target = view.max_voters.map_or(all, |max_voters| voter_target(all, max_voters));
    let mut voters: Vec<_> = members.into_values().take(target).collect();
    voters.sort_by_key(|member| member.id);
    Step::Propose(voters)
}

/// The expected members by slot, if every asked address has answered and is what it should be.
fn all_pristine(view: &View) -> Result<BTreeMap<u64, membership::Member>, Wait> {
    let mut members = BTreeMap::new();
    for asked in &view.asked {
        let who = answer_of(view, asked)?;
        let Some(node) = who.node.clone() else {
            return Err(not_reached(view, asked, "answers without its addresses"));
        };
        if !view.expected.slots.contains(&who.slot) {
            continue;
        }
        if who.founding != view.me.founding {
            return Err(not_reached(view, asked, "was given another list of first members, or another token"));
        }
        let member = membership::Member { id: who.member_id, node: Some(node) };
        if let Some(other) = members.insert(who.slot, member).filter(|other| other.id != who.member_id) {
            return Err(Wait::TwoHolders { slot: who.slot, ids: vec![other.id, who.member_id] });
        }
    }
    match view.expected.slots.clone().find(|slot| !members.contains_key(slot)) {
        Some(slot) => Err(Wait::Slot { slot, address: String::new(), why: "not asked yet".into() }),
        None => Ok(members),
    }
}

/// The answer of an address if it comes from who should live there.
fn answer_of<'a>(view: &View, asked: &'a Asked) -> Result<&'a WhoResponse, Wait> {
    let who = asked.answer.as_ref().map_err(|error| not_reached(view, asked, &error.0))?;
    if asked.slot.is_some_and(|slot| slot != who.slot) {
        return Err(not_reached(view, asked, &format!("answers as slot {}", who.slot)));
    }
    let mine = who.member_id == view.me.member_id && who.process_nonce == view.me.process_nonce;
    if asked.slot == Some(view.me.slot) && !mine {
        return Err(not_reached(view, asked, &format!("member {:016x} answers", who.member_id)));
    }
    Ok(who)
}

fn not_reached(view: &View, asked: &Asked, why: &str) -> Wait {
    let (address, why) = (asked.address.clone(), why.to_owned());
    match asked.slot {
        Some(slot) if slot == view.me.slot => Wait::OwnAddress { address, why },
        Some(slot) => Wait::Slot { slot, address, why },
        None => Wait::Address { address, why },
    }
}

/// Was added before a restart: ask again, so that the leader still knows this member.
fn joining(view: &View, own: u64) -> Step {
    let other = members_of_clusters(view).map(|(_, who)| who.cluster_id).find(|found| *found != own);
    let present = members_of_clusters(view).any(|(_, who)| who.cluster_id == own && who.member_id != view.me.member_id);
    match other {
        Some(found) if !present => Step::Wait(Wait::ForeignCluster { own, found }),
        Some(found) => Step::Wait(Wait::TwoClusters { ids: vec![own, found] }),
        None => join_with_quorum(view, own),
    }
}

/// What one member of a formation is, seen from another one.
enum Part<'a> {
    Accepted(&'a str),
    /// Has answered, but not accepted yet.
    Open(&'a str),
    Abandoned,
    /// Its slot answers under another id: what it had accepted is lost.
    Lost(u64, &'a str),
    Away(Wait),
}

fn accepted(view: &View, formation: &Formation) -> Step {
    let cluster_id = formation.cluster_id;
    if started(view, cluster_id) {
        return Step::Initialize(formation.clone());
    }
    if let Some(cluster_id) = other_quorum(view, cluster_id) {
        return Step::Yield { cluster_id };
    }
    if abandoners(view, formation).len() >= abandon_needs(formation) {
        return Step::Abandon { cluster_id, ask: Vec::new() };
    }
    let parts: Vec<Part> = formation.members.iter().map(|member| part(view, formation, member.id)).collect();
    if parts.iter().all(|part| matches!(part, Part::Accepted(_))) {
        return Step::Initialize(formation.clone());
    }
    let lost =
        parts.iter().find_map(|part| if let Part::Lost(slot, address) = part { Some((*slot, *address)) } else { None });
    if lost.is_some() || parts.iter().any(|part| matches!(part, Part::Abandoned)) {
        return give_up(view, formation, &parts, lost);
    }
    let away = parts.iter().find_map(|part| if let Part::Away(wait) = part { Some(wait.clone()) } else { None });
    let open = parts.iter().filter_map(|part| if let Part::Open(address) = part { Some(*address) } else { None });
    let ask: Vec<String> = open.map(str::to_owned).collect();
    match away {
        Some(wait) if ask.is_empty() => Step::Wait(wait),
        away => Step::Drive { formation: formation.clone(), ask, then: away.unwrap_or(Wait::Accepting { cluster_id }) },
    }
}

/// The formation cannot complete. Nobody abandons it before enough members can be seen to: one who has abandoned is of no use
/// to a formation that turns out to be alive.
fn give_up(view: &View, formation: &Formation, parts: &[Part], lost: Option<(u64, &str)>) -> Step {
    let cluster_id = formation.cluster_id;
    let needs = abandon_needs(formation);
    let can = parts.iter().filter(|part| matches!(part, Part::Accepted(_) | Part::Abandoned)).count();
    if can >= needs {
        return Step::Abandon { cluster_id, ask: others_that_accepted(view, formation) };
    }
    let away = parts.iter().find_map(|part| if let Part::Away(wait) = part { Some(wait.clone()) } else { None });
    Step::Wait(match (away, lost) {
        (Some(wait), _) => wait,
        (None, Some((slot, address))) => {
            Wait::LostDisk { cluster_id, slot, address: address.to_owned(), have: can, needs }
        }
        (None, None) => Wait::Abandoning { cluster_id, have: abandoners(view, formation).len(), needs },
    })
}

fn abandoned(view: &View, formation: &Formation) -> Step {
    let cluster_id = formation.cluster_id;
    let have = abandoners(view, formation).len();
    let needs = abandon_needs(formation);
    let superseded = led(view, cluster_id) || other_quorum(view, cluster_id).is_some();
    if have >= needs || superseded {
        return Step::MintAnew;
    }
    let ask = others_that_accepted(view, formation);
    if ask.is_empty() {
        Step::Wait(Wait::Abandoning { cluster_id, have, needs })
    } else {
        Step::Abandon { cluster_id, ask }
    }
}

fn part<'a>(view: &'a View, formation: &Formation, member_id: u64) -> Part<'a> {
    let slot = slot_of(member_id);
    let Some(asked) = view.asked.iter().find(|asked| asked.slot == Some(slot)) else {
        return Part::Away(Wait::Slot { slot, address: String::new(), why: "not asked yet".into() });
    };
    // What this node itself has promised is on its own disk, whatever its address leads to.
    if member_id == view.me.member_id {
        return Part::Accepted(&asked.address);
    }
    let who = match answer_of(view, asked) {
        Ok(who) => who,
        Err(wait) => return Part::Away(wait),
    };
    if who.abandoned_cluster_ids.contains(&formation.cluster_id) {
        Part::Abandoned
    } else if who.member_id != member_id {
        Part::Lost(slot, &asked.address)
    } else if who.formation.as_ref() == Some(formation) {
        Part::Accepted(&asked.address)
    } else {
        Part::Open(&asked.address)
    }
}

fn others_that_accepted(view: &View, formation: &Formation) -> Vec<String> {
    let others = formation.members.iter().filter(|member| member.id != view.me.member_id);
    let parts = others.map(|member| part(view, formation, member.id));
    parts.filter_map(|part| if let Part::Accepted(address) = part { Some(address.to_owned()) } else { None }).collect()
}

/// Slots of the formation whose node has durably abandoned it, under that or a former id.
fn abandoners(view: &View, formation: &Formation) -> BTreeSet<u64> {
    let slots: BTreeSet<u64> = formation.members.iter().map(|member| slot_of(member.id)).collect();
    let told = answers(view).filter(|(_, who)| who.abandoned_cluster_ids.contains(&formation.cluster_id));
    let mut found: BTreeSet<u64> = told.map(|(_, who)| who.slot).filter(|slot| slots.contains(slot)).collect();
    if matches!(&view.me.state, State::Abandoned(_)) {
        found.insert(view.me.slot);
    }
    found
}

/// How many must abandon a formation so that no quorum is left without one of them.
fn abandon_needs(formation: &Formation) -> usize {
    let members = formation.members.len();
    let quorum = members / 2 + 1;
    members - quorum + 1
}

fn answers(view: &View) -> impl Iterator<Item = (&Asked, &WhoResponse)> {
    view.asked.iter().filter_map(|asked| asked.answer.as_ref().ok().map(|who| (asked, who)))
}

/// Answers of nodes that belong to a cluster: more than a promise.
fn members_of_clusters(view: &View) -> impl Iterator<Item = (&Asked, &WhoResponse)> {
    answers(view).filter(|(_, who)| matches!(who.state(), PeerState::Formed | PeerState::Joining))
}

pub(super) fn has_quorum(who: &WhoResponse) -> bool {
    who.state() == PeerState::Formed && who.quorum
}

fn started(view: &View, cluster_id: u64) -> bool {
    members_of_clusters(view).any(|(_, who)| who.cluster_id == cluster_id)
}

pub(super) fn led(view: &View, cluster_id: u64) -> bool {
    answers(view).any(|(_, who)| who.cluster_id == cluster_id && has_quorum(who))
}

fn other_quorum(view: &View, cluster_id: u64) -> Option<u64> {
    let other = answers(view).find(|(_, who)| who.cluster_id != cluster_id && has_quorum(who));
    other.map(|(_, who)| who.cluster_id)
}

fn names(formation: &Formation, member_id: u64) -> bool {
    formation.members.iter().any(|member| member.id == member_id)
}
