//! What a person asks of the membership, as changes that pass the leader's gate (membership rule 24).
//!
//! Pure, as the plan is: [`judge`] is asked again after every change until it says that the operation is done, so that a person's
//! change and the plan's own never run at once.
//! Invariant: an operation is refused for what no waiting mends, with etcd's texts where etcd has one; it waits for the rest.
//! Absent: deadlines, and the calls between members (`manage`).

use super::plan::{Change, Ids, Observed, Reason, Which, gate};
use super::voter_target;
use crate::error::Error;
use crate::identity::peer_addresses;
use crate::pb::log::Node;
use crate::pb::log::node::Kind;

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Operation {
    /// A node that was dialled, as it describes itself.
    Add {
        id: u64,
        node: Node,
    },
    Remove {
        id: u64,
    },
    Update {
        id: u64,
        peer_address: String,
        more_peer_addresses: Vec<String>,
        /// The member was found at that address.
        is_there: bool,
    },
    Promote {
        id: u64,
    },
}

/// What to do about an operation now.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Done,
    Do(Change),
    /// As `Do`; whoever leads then is asked anew.
    HandOver(Change),
    Wait(Reason),
    Refuse(Error),
}

/// `begun`: a change of this operation was made already.
pub fn judge(observed: &Observed, operation: &Operation, begun: bool) -> Verdict {
    let change = match operation {
        Operation::Add { id, node } => add(observed, *id, node, begun),
        Operation::Remove { id } => remove(observed, *id, begun),
        Operation::Update { id, peer_address, more_peer_addresses, is_there } => {
            update(observed, *id, (peer_address, more_peer_addresses), *is_there)
        }
        Operation::Promote { id } => promote(observed, *id, begun),
    };
    match change {
        Err(verdict) => verdict,
        Ok(_) if !observed.committed_in_term => Verdict::Wait(Reason::NotCommittedInTerm),
        Ok(_) if observed.in_flight || observed.membership.configs.len() > 1 => Verdict::Wait(Reason::InFlight),
        Ok(change) => match (gate(observed, change.clone()), operation) {
            (Ok(_), Operation::Remove { id }) if *id == observed.leader => hand_over(observed, *id),
            (Ok(change), _) => Verdict::Do(change),
            (Err(reason), _) => Verdict::Wait(reason),
        },
    }
}

/// What to answer when an operation has waited for too long.
pub fn timed_out(reason: &Reason) -> Error {
    match reason {
        Reason::Quorum { which: Which::New, .. } => Error::NotEnoughStarted,
        _ => Error::Unhealthy,
    }
}

fn add(observed: &Observed, id: u64, node: &Node, begun: bool) -> Result<Change, Verdict> {
    let members = &observed.membership.nodes;
    if members.contains_key(&id) {
        return Err(if begun { Verdict::Done } else { Verdict::Refuse(Error::MemberExists) });
    }
    if members.values().flat_map(peer_addresses).any(|address| *address == node.peer_address) {
        return Err(Verdict::Refuse(Error::PeerUrlExists));
    }
    Ok(Change::AddLearner { id, node: node.clone() })
}

fn remove(observed: &Observed, id: u64, begun: bool) -> Result<Change, Verdict> {
    let voters = observed.membership.voters();
    if !observed.membership.nodes.contains_key(&id) {
        return Err(if begun { Verdict::Done } else { Verdict::Refuse(Error::MemberNotFound) });
    }
    let ids = Ids::from([id]);
    if !voters.contains(&id) {
        return Ok(Change::RemoveLearners { ids });
    }
    if voters.len() == 1 {
        return Err(Verdict::Refuse(Error::NotEnoughStarted));
    }
    Ok(Change::RemoveVoters { ids })
}

/// A leader that is removed hands over first: its own removal would leave nobody to finish it.
fn hand_over(observed: &Observed, id: u64) -> Verdict {
    match observed.successor(&Ids::from([id])) {
        Some(to) => Verdict::HandOver(Change::TransferLeader { to }),
        None => Verdict::Wait(Reason::NoSuccessor),
    }
}

/// A voter may be sent to where nobody is yet only if the others are a quorum without it: they would not reach it any more.
fn update(
    observed: &Observed,
    id: u64,
    (peer_address, more): (&str, &[String]),
    is_there: bool,
) -> Result<Change, Verdict> {
    let Some(node) = observed.membership.nodes.get(&id) else {
        return Err(Verdict::Refuse(Error::MemberNotFound));
    };
    let is_told = |node: &Node| node.peer_address == peer_address && node.more_peer_addresses == more;
    if is_told(node) {
        return Err(Verdict::Done);
    }
    let others = observed.membership.nodes.iter().filter(|(other, _)| **other != id);
    if others.flat_map(|(_, member)| peer_addresses(member)).any(|address| address == peer_address) {
        return Err(Verdict::Refuse(Error::PeerUrlExists));
    }
    // What a member says of itself holds: another address would be taken back as soon as it is heard.
    let announced = observed.health.get(&id).and_then(|health| health.announces.as_ref());
    if node.kind() == Kind::Slot || announced.is_some_and(|own| !is_told(own)) {
        let own = peer_addresses(announced.unwrap_or(node)).cloned().collect::<Vec<_>>().join(",");
        let why = format!(
            "{} ({id:016x}) tells its address itself, and it is {own}: start it with --advertise-peer {peer_address}, and the \
             membership follows; nothing was changed",
            node.name
        );
        return Err(Verdict::Refuse(Error::Membership(why)));
    }
    let voters = observed.membership.voters();
    let others = voters.iter().filter(|voter| **voter != id && observed.is_fit(**voter)).count();
    let needs = voters.len() / 2 + 1;
    if !is_there && voters.contains(&id) && others < needs {
        let why = format!(
            "nobody answers at {peer_address}, and without this voter the cluster has {others} of {needs} needed voters; \
             start the member at that address first: it then makes its new address known by itself"
        );
        return Err(Verdict::Refuse(Error::Membership(why)));
    }
    let (peer_address, more_peer_addresses) = (peer_address.to_owned(), more.to_vec());
    Ok(Change::UpdateNode { id, node: Node { peer_address, more_peer_addresses, ..node.clone() } })
}

fn promote(observed: &Observed, id: u64, begun: bool) -> Result<Change, Verdict> {
    let voters = observed.membership.voters();
    let Some(node) = observed.membership.nodes.get(&id) else {
        return Err(Verdict::Refuse(Error::MemberNotFound));
    };
    if voters.contains(&id) {
        return Err(if begun { Verdict::Done } else { Verdict::Refuse(Error::NotLearner) });
    }
    if node.kind() == Kind::Reader {
        let why = "a reader never votes; add a member of another kind";
        return Err(Verdict::Refuse(Error::Membership(why.into())));
    }
    if !observed.is_fit(id) {
        return Err(Verdict::Refuse(Error::LearnerNotReady));
    }
    if node.held {
        return Ok(Change::UpdateNode { id, node: Node { held: false, ..node.clone() } });
    }
    let after = voters.len() + 1;
    // Whom a person has added votes when a person says so.
    if node.kind() == Kind::Slot && voter_target(after, observed.limits.max_voters) < after {
        let why = format!(
            "{after} voters would survive no more failures than {}, or are more than cluster.max_voters ({}); the learner stands by, \
             and is promoted when a voter is lost or another learner joins it",
            voters.len(),
            observed.limits.max_voters
        );
        return Err(Verdict::Refuse(Error::Membership(why)));
    }
    Ok(Change::Promote { ids: Ids::from([id]) })
}
