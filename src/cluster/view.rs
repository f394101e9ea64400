//! What a member shows of the membership: for `status`, `member why`, `/cluster`, metrics and Events.
//!
//! Absent: any decision. The leader's view comes from what its reconciler has observed; another member's from Raft alone, and says
//! nothing of lag and health.

use super::plan::{Members, Observed, WantedSlots};
use super::slot_of;
use super::wanted::{Reading, Wanted};
use crate::identity;
use crate::node::Status;
use crate::pb::admin::{self, MembershipView, Remark};
use crate::pb::log::node::Kind;
use crate::pb::log::{Node, WantedSize};

pub fn remark(name: &str, sentence: impl Into<String>) -> Remark {
    Remark { name: name.into(), sentence: sentence.into() }
}

/// How many members are wanted, for the plan and for people. The StatefulSet's word goes before the one set by hand.
pub struct Wish {
    /// `None`: nothing is condemned.
    pub slots: Option<WantedSlots>,
    pub shown: admin::Wanted,
    pub remark: Option<Remark>,
}

pub fn wish(source: Option<(String, Reading)>, by_hand: Option<WantedSize>) -> Wish {
    let Some((name, reading)) = source else {
        let shown = |origin: &str, size: WantedSize| admin::Wanted {
            origin: origin.into(),
            start: size.start,
            replicas: size.replicas,
            unknown: String::new(),
        };
        return match by_hand {
            // Replicated, so there is nothing to misread.
            Some(size) => Wish {
                slots: Some(WantedSlots { slots: size.start..size.start + size.replicas, observations: u32::MAX }),
                shown: shown("command", size),
                remark: None,
            },
            None => Wish { slots: None, shown: shown("none", WantedSize::default()), remark: None },
        };
    };
    let mut shown = admin::Wanted { origin: "statefulset".into(), ..Default::default() };
    let both = by_hand.map(|size| {
        let sentence = format!(
            "`member scale` has said {} members, and is not followed: {name} says how many there should be; \
             `quorate member scale --unset` ends this remark",
            size.replicas
        );
        remark("two-sizes", sentence)
    });
    match reading.wanted {
        Wanted::Slots { slots, .. } => {
            (shown.start, shown.replicas) = (slots.start, slots.end - slots.start);
            let slots = Some(WantedSlots { slots, observations: reading.observations });
            Wish { slots, shown, remark: both }
        }
        Wanted::Shutdown => {
            let sentence = format!("{name} wants no pods, or is being deleted: no member is removed for that");
            Wish { slots: None, shown, remark: Some(remark("shutdown", sentence)) }
        }
        Wanted::Unknown(why) => {
            shown.unknown = why.clone();
            let sentence = format!("{name} does not say how many members are wanted, so none is removed: {why}");
            Wish { slots: None, shown, remark: Some(remark("wanted-unknown", sentence)) }
        }
    }
}

fn member(id: u64, node: &Node, role: &str) -> admin::Member {
    admin::Member {
        id,
        name: node.name.clone(),
        slot: u32::from(identity::slot_of(id)),
        role: role.into(),
        kind: kind(node.kind()).into(),
        peer_address: node.peer_address.clone(),
        client_urls: node.client_urls.clone(),
        held: node.held,
        ..Default::default()
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Slot => "slot",
        Kind::Manual => "manual",
        Kind::Reader => "reader",
    }
}

fn members(of: &Members, leader: Option<u64>) -> Vec<admin::Member> {
    let voters = of.voters();
    let mut members: Vec<admin::Member> = of
        .nodes
        .iter()
        .map(|(id, node)| {
            let role = match node.kind() {
                _ if leader == Some(*id) => "leader",
                _ if voters.contains(id) => "voter",
                Kind::Reader => "reader",
                _ if node.is_awaited() => "awaited",
                _ => "learner",
            };
            member(*id, node, role)
        })
        .collect();
    members.sort_by_key(|member| (slot_of(member.id), member.id));
    members
}

/// What any member can say.
pub fn of_member(cluster_id: u64, member_id: u64, status: &Status, membership: &Members) -> MembershipView {
    MembershipView {
        cluster_id,
        member_id,
        leader_id: status.leader.unwrap_or(0),
        term: status.term,
        members: members(membership, status.leader),
        ..Default::default()
    }
}

/// Adds what the leader alone knows.
pub fn add_observed(view: &mut MembershipView, observed: &Observed) {
    for member in &mut view.members {
        let health = observed.health_of(member.id);
        let leads = member.id == observed.leader;
        member.reachable = leads || health.reachable;
        member.lag_entries = if leads { 0 } else { health.lag_entries };
        member.caught_up = observed.is_fit(member.id);
        member.condemned = observed.is_condemned(member.id);
        member.version = if leads { env!("CARGO_PKG_VERSION").into() } else { health.version };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statefulset_goes_before_the_command_and_both_are_named() {
        let by_hand = Some(WantedSize { start: 0, replicas: 5 });
        let reading = |wanted| Some(("StatefulSet a/kv".to_owned(), Reading { wanted, observations: 2 }));
        let slots = |end| Wanted::Slots { slots: 1..end, present: 1..end, one_by_one: false };
        let both = wish(reading(slots(4)), by_hand);
        assert_eq!(both.slots, Some(WantedSlots { slots: 1..4, observations: 2 }));
        assert_eq!((both.shown.origin.as_str(), both.shown.start, both.shown.replicas), ("statefulset", 1, 3));
        assert_eq!(both.remark.unwrap().name, "two-sizes");
        let alone = wish(None, by_hand);
        assert_eq!(alone.slots.unwrap().slots, 0..5);
        assert_eq!(wish(None, None).slots, None);
        for (wanted, name) in [(Wanted::Shutdown, "shutdown"), (Wanted::Unknown("403".into()), "wanted-unknown")] {
            let silent = wish(reading(wanted), by_hand);
            assert_eq!((silent.slots, silent.remark.unwrap().name.as_str()), (None, name), "nobody is condemned");
        }
    }
}
