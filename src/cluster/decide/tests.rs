//! One situation a test, seen by the pristine member of slot 1 unless it says otherwise.

use super::*;
use crate::pb::log::{Node, membership::Member};

fn id(slot: u64) -> u64 {
    (1 << 16) | slot
}

fn address(slot: u64) -> String {
    format!("kv-{slot}:2380")
}

fn node(slot: u64) -> Node {
    Node { name: format!("kv-{slot}"), peer_address: address(slot), ..Node::default() }
}

fn who(member_id: u64, state: PeerState, cluster_id: u64) -> WhoResponse {
    let slot = slot_of(member_id);
    let state = state.into();
    WhoResponse { member_id, slot, state, cluster_id, node: Some(node(slot)), ..WhoResponse::default() }
}

fn formation(cluster_id: u64, slots: Range<u64>) -> Formation {
    let members = slots.map(|slot| Member { id: id(slot), node: Some(node(slot)) }).collect();
    Formation { cluster_id, members, moment: None }
}

fn with_formation(mut answer: WhoResponse, formation: &Formation) -> WhoResponse {
    answer.formation = Some(formation.clone());
    answer
}

/// The view of `slot` on pristine slots 0 to `size`.
fn view(slot: u64, size: u64) -> View {
    let asked = (0..size).map(|slot| Asked {
        slot: Some(slot),
        address: address(slot),
        answer: Ok(who(id(slot), PeerState::Pristine, 0)),
    });
    View {
        me: Me { member_id: id(slot), slot, process_nonce: 0, founding: 0, state: State::Pristine },
        expected: Expected { slots: 0..size, also: 0..0, one_by_one: false, unknown: None },
        asked: asked.collect(),
        max_voters: Some(5),
    }
}

impl View {
    fn set(mut self, slot: u64, answer: WhoResponse) -> Self {
        self.asked[slot as usize].answer = Ok(answer);
        self
    }

    fn lose(mut self, slot: u64) -> Self {
        self.asked[slot as usize].answer = Err(Unreachable("connection refused".into()));
        self
    }

    /// These slots have accepted the formation; `me` too if it is among them.
    fn accepted(mut self, formation: &Formation, slots: &[u64]) -> Self {
        for slot in slots {
            let answer = who(id(*slot), PeerState::Accepted, formation.cluster_id);
            self = self.set(*slot, with_formation(answer, formation));
            if self.me.slot == *slot {
                self.me.state = State::Accepted(formation.clone());
            }
        }
        self
    }

    /// These slots have abandoned it and are new members.
    fn abandoned(mut self, cluster_id: u64, slots: &[u64]) -> Self {
        for slot in slots {
            let mut answer = who((9 << 16) | slot, PeerState::Pristine, 0);
            answer.abandoned_cluster_ids.push(cluster_id);
            self = self.set(*slot, answer);
        }
        self
    }

    fn leader(self, slot: u64, cluster_id: u64) -> Self {
        let mut answer = who(id(slot), PeerState::Formed, cluster_id);
        answer.quorum = true;
        self.set(slot, answer)
    }
}

fn waits(view: &View) -> Wait {
    match decide(view) {
        Step::Wait(wait) => wait,
        other => panic!("does not wait: {other:?}"),
    }
}

#[test]
fn lowest_slot_proposes_all_and_the_others_wait() {
    assert_eq!(decide(&view(0, 3)), Step::Propose(formation(0, 0..3).members));
    assert_eq!(waits(&view(1, 3)), Wait::Proposal { slot: 0 });
}

#[test]
fn single_slot_forms_alone() {
    assert_eq!(decide(&view(0, 1)), Step::Propose(formation(0, 0..1).members));
}

#[test]
fn who_exceeds_the_voters_is_not_proposed() {
    assert_eq!(decide(&view(0, 7)), Step::Propose(formation(0, 0..5).members));
    assert_eq!(decide(&view(0, 4)), Step::Propose(formation(0, 0..3).members));
}

/// Case 2: one pod pending at formation: waits, says for whom.
#[test]
fn unreachable_slot_is_waited_for_by_name() {
    let wait = waits(&view(0, 3).lose(2));
    assert_eq!(wait.to_string(), "waits for slot 2 (kv-2:2380): connection refused");
}

/// Rule 9: more than one pod under `OrderedReady` can never form a cluster.
#[test]
fn pod_that_is_never_made_is_waited_for_with_what_to_do() {
    let mut view = view(0, 3).lose(1).lose(2);
    view.expected.one_by_one = true;
    let wait = waits(&view);
    assert_eq!(wait, Wait::OneByOne { slot: 1, address: address(1) });
    assert!(wait.to_string().contains("OrderedReady"), "{wait}");
}

#[test]
fn unknown_size_blocks_forming_but_not_joining() {
    let mut view = view(0, 3);
    view.expected.unknown = Some("the API does not answer".into());
    assert_eq!(waits(&view), Wait::Unknown("the API does not answer".into()));
    assert!(matches!(decide(&view.leader(1, 7)), Step::Join { cluster_id: 7, .. }));
}

#[test]
fn own_address_must_lead_to_this_process() {
    assert!(matches!(waits(&view(0, 3).lose(0)), Wait::OwnAddress { .. }));
    let mut other_process = who(id(0), PeerState::Pristine, 0);
    other_process.process_nonce = 1;
    assert!(matches!(waits(&view(0, 3).set(0, other_process)), Wait::OwnAddress { .. }));
}

#[test]
fn address_that_answers_as_another_slot_is_not_that_slot() {
    let wait = waits(&view(0, 3).set(2, who(id(1), PeerState::Pristine, 0)));
    assert_eq!(wait.to_string(), "waits for slot 2 (kv-2:2380): answers as slot 1");
}

#[test]
fn second_holder_of_a_slot_blocks_forming() {
    let mut view = view(0, 3);
    let answer = Ok(who((5 << 16) | 2, PeerState::Pristine, 0));
    view.asked.push(Asked { slot: None, address: "10.0.0.9:2380".into(), answer });
    assert_eq!(waits(&view), Wait::TwoHolders { slot: 2, ids: vec![id(2), (5 << 16) | 2] });
}

#[test]
fn further_address_that_does_not_answer_blocks_forming() {
    let mut view = view(0, 3);
    view.asked.push(Asked { slot: None, address: "10.0.0.9:2380".into(), answer: Err(Unreachable("no route".into())) });
    assert!(matches!(waits(&view), Wait::Address { .. }));
}

#[test]
fn slot_outside_of_the_range_never_forms() {
    let mut view = view(3, 4);
    view.expected.slots = 0..3;
    assert_eq!(waits(&view), Wait::OutsideRange { slot: 3, slots: 0..3 });
}

/// Case 6: install 1, scale to 3, pod-0 loses its disk: joins.
#[test]
fn joining_beats_forming() {
    let step = decide(&view(0, 3).lose(2).leader(1, 7));
    assert_eq!(step, Step::Join { cluster_id: 7, address: address(1) });
}

/// Case 8: majority lost, one survivor: it waits, and so does whoever finds it.
#[test]
fn cluster_without_quorum_is_waited_for_by_name() {
    let view = view(0, 3).set(1, who(id(1), PeerState::Formed, 7));
    assert_eq!(waits(&view), Wait::NoQuorum { cluster_id: 7, addresses: vec![address(1)] });
}

#[test]
fn joining_peer_blocks_forming() {
    let view = view(0, 3).set(1, who(id(1), PeerState::Joining, 7));
    assert!(matches!(waits(&view), Wait::NoQuorum { cluster_id: 7, .. }));
}

#[test]
fn two_clusters_are_named_and_neither_is_joined() {
    let view = view(0, 3).leader(1, 7).leader(2, 8);
    assert_eq!(waits(&view), Wait::TwoClusters { ids: vec![7, 8] });
}

#[test]
fn formation_that_names_this_member_is_accepted() {
    let formation = formation(7, 0..3);
    assert_eq!(decide(&view(1, 3).accepted(&formation, &[0])), Step::Accept(formation));
}

#[test]
fn formation_of_others_is_let_finish() {
    let formation = formation(7, 0..3);
    assert!(matches!(waits(&view(3, 4).accepted(&formation, &[0])), Wait::Forming { cluster_id: 7, slot: 0, .. }));
}

#[test]
fn two_formations_are_named_and_neither_is_accepted() {
    let view = view(1, 3).accepted(&formation(7, 0..3), &[0]).accepted(&formation(8, 0..3), &[2]);
    assert_eq!(waits(&view), Wait::TwoClusters { ids: vec![7, 8] });
}

#[test]
fn acceptor_drives_on_whoever_proposed() {
    let formation = formation(7, 0..3);
    let step = decide(&view(1, 3).accepted(&formation, &[1, 0]));
    let then = Wait::Accepting { cluster_id: 7 };
    assert_eq!(step, Step::Drive { formation, ask: vec![address(2)], then });
}

#[test]
fn raft_starts_when_all_have_accepted_or_one_has_started() {
    let formation = formation(7, 0..3);
    assert_eq!(decide(&view(1, 3).accepted(&formation, &[0, 1, 2])), Step::Initialize(formation.clone()));
    let started = with_formation(who(id(0), PeerState::Formed, 7), &formation);
    assert_eq!(decide(&view(1, 3).accepted(&formation, &[1]).set(0, started).lose(2)), Step::Initialize(formation));
}

#[test]
fn acceptor_waits_for_a_member_that_is_away() {
    let formation = formation(7, 0..3);
    assert!(matches!(waits(&view(1, 3).accepted(&formation, &[0, 1]).lose(2)), Wait::Slot { slot: 2, .. }));
}

#[test]
fn lost_disk_leads_to_giving_up_if_enough_hold_nothing() {
    let formation = formation(7, 0..3);
    let lost = who((5 << 16) | 2, PeerState::Pristine, 0);
    let view = view(1, 3).accepted(&formation, &[0, 1]).set(2, lost);
    assert_eq!(decide(&view), Step::Abandon { cluster_id: 7, ask: vec![address(0)] });
    // With slot 0 away it may have started: nobody gives up.
    assert!(matches!(waits(&view.lose(0)), Wait::Slot { slot: 0, .. }));
}

#[test]
fn two_lost_disks_of_three_are_for_a_person() {
    let formation = formation(7, 0..3);
    let lost = |slot: u64| who((5 << 16) | slot, PeerState::Pristine, 0);
    let view = view(1, 3).accepted(&formation, &[1]).set(0, lost(0)).set(2, lost(2));
    assert!(matches!(waits(&view), Wait::LostDisk { have: 1, needs: 2, .. }));
}

#[test]
fn formation_that_others_have_abandoned_is_abandoned() {
    let formation = formation(7, 0..3);
    let view = view(1, 3).accepted(&formation, &[1]).abandoned(7, &[0, 2]);
    assert_eq!(decide(&view), Step::Abandon { cluster_id: 7, ask: Vec::new() });
}

#[test]
fn new_self_needs_enough_that_have_abandoned() {
    let formation = formation(7, 0..3);
    let mut view = view(1, 3).accepted(&formation, &[0, 1, 2]);
    view.me.state = State::Abandoned(formation.clone());
    assert!(matches!(decide(&view), Step::Abandon { .. }));
    assert!(matches!(waits(&view.clone().lose(0).lose(2)), Wait::Abandoning { have: 1, needs: 2, .. }));
    assert_eq!(decide(&view.clone().abandoned(7, &[0])), Step::MintAnew);
    assert_eq!(decide(&view.leader(2, 7)), Step::MintAnew);
}

#[test]
fn formation_yields_to_a_cluster_with_a_quorum() {
    let formation = formation(7, 0..3);
    let view = view(1, 3).accepted(&formation, &[0, 1]);
    assert_eq!(decide(&view.clone().leader(2, 8)), Step::Yield { cluster_id: 8 });
    let without_quorum = view.set(2, who(id(2), PeerState::Formed, 8));
    assert!(!matches!(decide(&without_quorum), Step::Yield { .. }));
}

#[test]
fn joiner_asks_only_the_cluster_that_has_added_it() {
    let mut view = view(1, 3).leader(0, 7);
    view.me.state = State::Joining(7);
    assert_eq!(decide(&view), Step::Join { cluster_id: 7, address: address(0) });
    view.me.state = State::Joining(8);
    assert_eq!(waits(&view), Wait::ForeignCluster { own: 8, found: 7 });
}

#[test]
fn started_formation_is_dead_once_every_quorum_has_an_abandoner() {
    let formation = formation(7, 0..5);
    let view = view(1, 5).accepted(&formation, &[1]);
    assert!(!is_dead(&view.clone().abandoned(7, &[0, 2]), &formation));
    assert!(is_dead(&view.clone().abandoned(7, &[0, 2, 3]), &formation));
    assert!(is_dead(&view.clone().leader(0, 8), &formation));
    assert!(!is_dead(&view.leader(0, 8).leader(2, 7), &formation));
}

/// Lists of first members that differ, or their tokens, form no cluster together: one of them is not what its person meant.
#[test]
fn who_was_given_another_list_of_first_members_forms_no_cluster() {
    let mut view = view(0, 3);
    view.me.founding = 7;
    for asked in &mut view.asked {
        asked.answer.as_mut().unwrap().founding = 7;
    }
    assert!(matches!(decide(&view), Step::Propose(members) if members.len() == 3));
    view.asked[2].answer.as_mut().unwrap().founding = 8;
    match decide(&view) {
        Step::Wait(Wait::Slot { slot: 2, why, .. }) => assert!(why.contains("another list of first members"), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// A person who lists four members, or seven, wants all to vote.
#[test]
fn all_members_of_a_list_vote() {
    for size in [2, 4, 7] {
        let view = View { max_voters: None, ..view(0, size) };
        assert!(matches!(decide(&view), Step::Propose(members) if members.len() == size as usize), "{size}");
    }
}
