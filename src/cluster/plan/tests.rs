//! One situation a test; members are named by slot, `id(slot, life)` is the slot's member of its `life`th disk.

use super::*;

fn id(slot: u64, life: u64) -> u64 {
    (life << 16) | slot
}

fn first(slot: u64) -> u64 {
    id(slot, 1)
}

fn firsts(slots: impl IntoIterator<Item = u64>) -> Ids {
    slots.into_iter().map(first).collect()
}

fn node(slot: u64) -> Node {
    Node { name: format!("kv-{slot}"), peer_address: format!("kv-{slot}.kv:2380"), ..Node::default() }
}

const MINUTE: Duration = Duration::from_secs(60);

fn healthy() -> Health {
    Health { reachable: true, caught_up_for: Some(MINUTE), ..Health::default() }
}

fn dead() -> Health {
    Health { silent_for: MINUTE, ..Health::default() }
}

/// Voters and learners of first disks, all healthy; slot 0 leads.
fn cluster(voters: Range<u64>, learners: Range<u64>) -> Observed {
    let all: Vec<u64> = voters.clone().chain(learners).collect();
    Observed {
        leader: first(0),
        committed_in_term: true,
        in_flight: false,
        membership: Members {
            log_id: Some(LogId { term: 1, index: 1 }),
            configs: vec![firsts(voters)],
            nodes: all.iter().map(|slot| (first(*slot), node(*slot))).collect(),
        },
        health: all.iter().map(|slot| (first(*slot), healthy())).collect(),
        slots: all.iter().map(|slot| (*slot, first(*slot))).collect(),
        joiners: Vec::new(),
        wanted: None,
        limits: Limits {
            max_voters: 5,
            failure_timeout: Duration::from_secs(10),
            stable_for: Duration::from_secs(2),
            reader_ttl: Some(MINUTE),
            max_readers: 2,
        },
    }
}

impl Observed {
    fn kill(mut self, member: u64) -> Self {
        self.health.insert(member, dead());
        self
    }

    fn want(mut self, slots: Range<u64>) -> Self {
        self.wanted = Some(WantedSlots { slots, observations: 1 });
        self
    }

    fn join(mut self, member: u64, dialled: Dialled) -> Self {
        self.joiners.push(Joiner { member_id: member, node: node(slot_of(member)), dialled, adopts: false });
        self
    }

    /// A new disk of `slot` that is a learner already and has caught up.
    fn newcomer(mut self, slot: u64) -> Self {
        let new = id(slot, 2);
        self.membership.nodes.insert(new, node(slot));
        self.health.insert(new, healthy());
        self.slots.insert(slot, new);
        self
    }
}

fn add_learner(member: u64) -> Plan {
    Plan::Change(Change::AddLearner { id: member, node: node(slot_of(member)) })
}

fn reason(observed: &Observed) -> Reason {
    match plan(observed) {
        Plan::Blocked(reason) => reason,
        other => panic!("not blocked: {other:?}"),
    }
}

#[test]
fn healthy_cluster_needs_no_change() {
    for voters in [1, 2, 3, 5] {
        assert_eq!(plan(&cluster(0..voters, 0..0)), Plan::Nothing, "{voters} voters");
    }
}

#[test]
fn new_leader_waits_for_its_first_commit() {
    let observed = Observed { committed_in_term: false, ..cluster(0..3, 3..5) };
    assert_eq!(reason(&observed), Reason::NotCommittedInTerm);
}

#[test]
fn one_change_is_in_flight() {
    let observed = Observed { in_flight: true, ..cluster(0..3, 3..5) };
    assert_eq!(reason(&observed), Reason::InFlight);
}

/// Case 9: 1 -> 3 -> 5 with no restart of old pods, at the plan level.
#[test]
fn joiner_that_is_dialled_back_becomes_a_learner() {
    assert_eq!(plan(&cluster(0..1, 0..0).join(first(1), Dialled::Joiner)), add_learner(first(1)));
}

#[test]
fn learners_are_promoted_two_at_a_time_to_stay_odd() {
    assert_eq!(plan(&cluster(0..3, 3..5)), Plan::Change(Change::Promote { ids: firsts(3..5) }));
    assert_eq!(plan(&cluster(0..1, 1..3)), Plan::Change(Change::Promote { ids: firsts(1..3) }));
}

#[test]
fn second_member_becomes_a_voter() {
    assert_eq!(plan(&cluster(0..1, 1..2)), Plan::Change(Change::Promote { ids: firsts(1..2) }));
}

#[test]
fn fourth_member_stays_in_standby() {
    assert_eq!(plan(&cluster(0..3, 3..4)), Plan::Nothing);
}

#[test]
fn sixth_and_seventh_member_stay_in_standby() {
    assert_eq!(plan(&cluster(0..5, 5..7)), Plan::Nothing);
}

#[test]
fn unstable_learner_is_not_promoted() {
    let mut observed = cluster(0..1, 1..2);
    observed.health.insert(first(1), Health { caught_up_for: Some(Duration::from_secs(1)), ..healthy() });
    assert_eq!(plan(&observed), Plan::Nothing);
}

/// Case 37: a learner that never catches up.
#[test]
fn learner_that_never_catches_up_blocks_nothing() {
    let mut observed = cluster(0..3, 3..4).join(first(4), Dialled::Joiner);
    observed.health.insert(first(3), Health { caught_up_for: None, ..healthy() });
    assert_eq!(plan(&observed), add_learner(first(4)));
    let observed = observed.want(0..2);
    let observed = Observed { joiners: Vec::new(), ..observed };
    let observed = Observed { wanted: Some(WantedSlots { slots: 0..2, observations: 2 }), ..observed };
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveVoters { ids: firsts(2..3) }));
}

/// Case 10: scale up with a peer down: the newcomers are added, the quorum of three stands.
#[test]
fn joiners_are_added_while_a_minority_is_down() {
    let observed = cluster(0..3, 0..0).kill(first(2)).join(first(3), Dialled::Joiner);
    assert_eq!(plan(&observed), add_learner(first(3)));
}

#[test]
fn promotion_waits_for_a_quorum_of_the_new_configuration() {
    // 1 of 2 voters is no quorum: neither of the old nor of the new configuration.
    let observed = cluster(0..2, 2..3).kill(first(1));
    let Reason::Quorum { which, needs, have, missing, .. } = reason(&observed) else { panic!() };
    assert_eq!((which, needs, have, missing), (Which::Old, 2, 1, firsts(1..2)));
}

#[test]
fn claimed_slot_that_another_answers_for_changes_nothing() {
    let observed = cluster(0..3, 0..0).join(id(1, 2), Dialled::Other(first(1)));
    assert_eq!(reason(&observed), Reason::TwoHolders { slot: 1, holder: first(1), claimer: id(1, 2) });
}

#[test]
fn joiner_whose_address_is_silent_waits() {
    let observed = cluster(0..3, 0..0).join(first(3), Dialled::Unreachable("connection refused".into()));
    assert!(matches!(reason(&observed), Reason::NotDialled { slot: 3, .. }));
}

/// Case 40: two holders of one slot: both reported, nothing changes.
#[test]
fn slot_of_a_live_member_is_not_taken_over() {
    let mut observed = cluster(0..3, 0..0).join(id(2, 2), Dialled::Joiner);
    observed.slots.insert(2, id(2, 2));
    let expected = Reason::TwoHolders { slot: 2, holder: first(2), claimer: id(2, 2) };
    assert_eq!(reason(&observed), expected);
    // Nor if both are in the membership.
    assert_eq!(reason(&cluster(0..3, 0..0).newcomer(2)), expected);
}

/// Case 4: pod-0 loses its disk, peers up: a new member.
#[test]
fn lost_disk_is_added_before_it_replaces() {
    let mut observed = cluster(0..3, 0..0).kill(first(2)).join(id(2, 2), Dialled::Joiner);
    assert_eq!(plan(&observed), add_learner(id(2, 2)));
    observed = cluster(0..3, 0..0).kill(first(2)).newcomer(2);
    let change = Change::ReplaceVoter { old: first(2), new: id(2, 2), keep_old: false };
    assert_eq!(change.voters_after(&observed.membership), Some((Ids::from([first(0), first(1), id(2, 2)]), false)));
    assert_eq!(plan(&observed), Plan::Change(change));
}

#[test]
fn address_that_answers_anew_needs_no_failure_timeout() {
    let mut observed = cluster(0..3, 0..0).join(id(2, 2), Dialled::Joiner);
    let silent_for = Duration::from_secs(1);
    observed.health.insert(first(2), Health { silent_for, ..Health::default() });
    assert!(matches!(reason(&observed), Reason::HolderSilent { .. }));
    observed.health.insert(first(2), Health { silent_for, address_answers: Some(id(2, 2)), ..Health::default() });
    assert_eq!(plan(&observed), add_learner(id(2, 2)));
}

#[test]
fn newcomer_waits_until_it_has_caught_up() {
    let mut observed = cluster(0..3, 0..0).kill(first(2)).newcomer(2);
    observed.health.insert(id(2, 2), Health { caught_up_for: None, ..healthy() });
    assert_eq!(plan(&observed), Plan::Nothing);
}

#[test]
fn newcomer_whose_disk_is_lost_too_is_removed() {
    let mut observed = cluster(0..3, 0..0).kill(first(2)).newcomer(2).kill(id(2, 2));
    let newest = id(2, 3);
    observed = observed.join(newest, Dialled::Joiner);
    assert_eq!(plan(&observed), add_learner(newest));
    observed.membership.nodes.insert(newest, node(2));
    observed.health.insert(newest, Health { reachable: true, ..Health::default() });
    observed.slots.insert(2, newest);
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveLearners { ids: Ids::from([id(2, 2)]) }));
}

/// Case 24: a deleted pod changes no membership.
#[test]
fn dead_member_inside_the_range_is_never_removed() {
    for observed in [cluster(0..3, 0..0), cluster(0..5, 0..0).want(0..5)] {
        assert_eq!(plan(&observed.kill(first(1))), Plan::Nothing);
    }
    let learner = cluster(0..3, 3..4).want(0..4).kill(first(3));
    assert_eq!(plan(&learner), Plan::Nothing);
}

#[test]
fn standby_votes_for_a_dead_voter_which_stays_a_member() {
    let observed = cluster(0..3, 3..4).kill(first(1));
    let change = Change::ReplaceVoter { old: first(1), new: first(3), keep_old: true };
    assert_eq!(plan(&observed), Plan::Change(change));
}

#[test]
fn half_done_joint_change_is_finished_first() {
    let mut observed = cluster(0..5, 0..0).join(first(5), Dialled::Joiner);
    observed.membership.configs = vec![firsts(0..5), firsts(0..3)];
    assert_eq!(plan(&observed), Plan::Change(Change::FinishJoint { voters: firsts(0..3) }));
}

/// Case 11: scale up while the leader dies: its joint change goes back if the new configuration lacks a quorum.
#[test]
fn joint_change_without_a_new_quorum_is_rolled_back() {
    let mut observed = cluster(0..5, 0..0).kill(first(3)).kill(first(4));
    observed.membership.configs = vec![firsts(0..3), Ids::from([first(0), first(3), first(4)])];
    assert_eq!(plan(&observed), Plan::Change(Change::RollbackJoint { voters: firsts(0..3) }));
    let observed = observed.kill(first(1)).kill(first(2));
    assert_eq!(reason(&observed), Reason::JointStuck);
}

/// Cases 12 and 13: 5 -> 3 and 5 -> 1.
#[test]
fn condemned_voters_leave_in_one_change() {
    assert_eq!(plan(&cluster(0..5, 0..0).want(0..3)), Plan::Change(Change::RemoveVoters { ids: firsts(3..5) }));
    assert_eq!(plan(&cluster(0..5, 0..0).want(0..1)), Plan::Change(Change::RemoveVoters { ids: firsts(1..5) }));
}

/// Case 15: the leader is the victim.
#[test]
fn condemned_leader_hands_over_first() {
    let mut observed = cluster(0..5, 0..0).want(0..3);
    observed.leader = first(4);
    observed.health.insert(first(0), Health { lag_entries: 7, ..healthy() });
    assert_eq!(plan(&observed), Plan::Change(Change::TransferLeader { to: first(1) }));
}

/// Case 16: the victim is SIGKILLed.
#[test]
fn dead_condemned_member_leaves_after_a_second_observation() {
    let mut observed = cluster(0..3, 0..0).want(0..2).kill(first(2));
    assert_eq!(reason(&observed), Reason::SecondObservation { ids: firsts(2..3) });
    observed.wanted = Some(WantedSlots { slots: 0..2, observations: 2 });
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveVoters { ids: firsts(2..3) }));
}

/// Case 17: scale down while another voter is down: waits, says why.
#[test]
fn scale_down_to_a_configuration_without_quorum_waits() {
    let observed = cluster(0..3, 0..0).want(0..2).kill(first(1));
    let Reason::Quorum { which, needs, have, missing, .. } = reason(&observed) else { panic!() };
    assert_eq!((which, needs, have, missing), (Which::New, 2, 1, firsts(1..2)));
    assert_eq!(
        reason(&observed).to_string(),
        "removing voters needs 2 healthy, caught-up voters of the new configuration, 1 are; not: 0000000000010001; start \
         them, or scale back to 3"
    );
}

/// Rule 17: what to scale back to is the least size whose own slots have a quorum.
#[test]
fn scale_back_names_the_least_size_with_a_quorum() {
    for (dead, size) in [(vec![0], Some(3)), (vec![0, 1], Some(5)), (vec![0, 1, 2], None)] {
        let mut observed = cluster(0..5, 0..0);
        observed.wanted = Some(WantedSlots { slots: 0..1, observations: 2 });
        observed.leader = first(4);
        for slot in &dead {
            observed = observed.kill(first(*slot));
        }
        let Reason::Quorum { scale_back, .. } = reason(&observed) else { panic!("{dead:?}") };
        assert_eq!(scale_back, size, "{dead:?} are dead");
    }
}

/// Rule 27: leadership goes to the newest program, and then to the longest log; never to who leaves as well.
#[test]
fn successor_runs_the_newest_program_and_is_caught_up() {
    let mut observed = cluster(0..5, 0..0).kill(first(4));
    let lag = |lag_entries, version: &str| Health { lag_entries, version: version.into(), ..healthy() };
    observed.health.insert(first(1), lag(9, "0.10.0"));
    observed.health.insert(first(2), lag(3, "0.10.0"));
    observed.health.insert(first(3), lag(0, "0.9.1"));
    assert_eq!(observed.successor(&Ids::new()), Some(first(2)));
    assert_eq!(observed.successor(&firsts(2..3)), Some(first(1)));
    assert_eq!(observed.successor(&firsts(1..3)), Some(first(3)));
    assert_eq!(observed.successor(&firsts(1..4)), None);
}

#[test]
fn others_hold_a_quorum_without_one_that_restarts() {
    let observed = cluster(0..3, 0..0);
    assert!(observed.holds_without(first(0)) && observed.holds_without(first(1)));
    let observed = observed.kill(first(2));
    assert!(!observed.holds_without(first(0)) && observed.holds_without(first(2)));
}

#[test]
fn readers_are_bounded_and_manual_joiners_wait_for_a_hand() {
    let mut observed = cluster(0..1, 1..3);
    for slot in 1..3 {
        observed.membership.nodes.get_mut(&first(slot)).unwrap().set_kind(Kind::Reader);
    }
    let joiner = |kind: Kind| Joiner {
        member_id: first(9),
        node: Node { kind: kind.into(), ..node(9) },
        dialled: Dialled::Joiner,
        adopts: kind == Kind::Manual,
    };
    observed.joiners = vec![joiner(Kind::Reader)];
    assert_eq!(reason(&observed), Reason::TooManyReaders { member: first(9), have: 2, most: 2 });
    observed.joiners = vec![joiner(Kind::Manual)];
    assert_eq!(reason(&observed).name(), "added-by-hand");
    observed.limits.max_readers = 3;
    observed.joiners = vec![joiner(Kind::Reader)];
    assert!(matches!(plan(&observed), Plan::Change(Change::AddLearner { id, .. }) if id == first(9)));
}

/// One voter, and an id that was reserved for the address of slot 9.
fn reserved(id: u64) -> Observed {
    let mut observed = cluster(0..1, 0..0);
    let reservation = Some(Reservation::default());
    let awaited = Node { reservation, kind: Kind::Manual.into(), name: String::new(), held: true, ..node(9) };
    observed.membership.nodes.insert(id, awaited);
    observed
}

fn by_hand(member: u64, peer_address: &str) -> Joiner {
    let node = Node { kind: Kind::Manual.into(), peer_address: peer_address.into(), ..node(9) };
    Joiner { member_id: member, node, dialled: Dialled::Joiner, adopts: true }
}

#[test]
fn reserved_id_is_given_to_the_first_disk_that_comes_and_to_no_other() {
    const ID: u64 = 0x77_ffff;
    let mut observed = reserved(ID);
    observed.joiners = vec![by_hand(first(9), &node(9).peer_address)];
    let Plan::Change(Change::Claim { id, node: claimed }) = plan(&observed) else { panic!("{:?}", plan(&observed)) };
    assert_eq!((id, claimed.reservation), (ID, Some(Reservation { claimed_by: first(9) })));
    assert!(claimed.held && claimed.kind() == Kind::Manual && claimed.name == "kv-9", "{claimed:?}");
    // The same disk is told at the desk; another one, and the same place after the node has come, is refused.
    for (reservation, joiner, expected) in [
        (claimed.reservation, first(9), None),
        (claimed.reservation, id_of_second_disk(), Some("address-taken")),
        (None, first(9), Some("address-taken")),
    ] {
        observed.membership.nodes.insert(ID, Node { reservation, ..claimed.clone() });
        observed.joiners = vec![by_hand(joiner, &node(9).peer_address)];
        match expected {
            None => assert_eq!(plan(&observed), Plan::Nothing),
            Some(name) => assert_eq!(reason(&observed).name(), name),
        }
    }
}

fn id_of_second_disk() -> u64 {
    id(9, 2)
}

#[test]
fn reserved_id_is_given_only_where_it_was_reserved_and_to_who_takes_one() {
    let observed = |joiner: Joiner| Observed { joiners: vec![joiner], ..reserved(0x77_ffff) };
    let elsewhere = || by_hand(first(9), "10.0.0.9:2380");
    assert_eq!(reason(&observed(elsewhere())).name(), "added-by-hand");
    // Another name of the same place: the leader has found this very node there.
    let mut found = observed(elsewhere());
    found.health.insert(0x77_ffff, Health { address_answers: Some(first(9)), ..dead() });
    assert!(matches!(plan(&found), Plan::Change(Change::Claim { .. })));
    let older = Joiner { adopts: false, ..by_hand(first(9), &node(9).peer_address) };
    assert_eq!(reason(&observed(older)).name(), "cannot-adopt");
    let false_claim = Joiner { dialled: Dialled::Other(first(8)), ..by_hand(first(9), &node(9).peer_address) };
    assert_eq!(reason(&observed(false_claim)).name(), "two-holders");
}

#[test]
fn member_that_never_came_blocks_nothing_and_never_votes() {
    let mut observed = cluster(0..1, 1..3);
    observed
        .membership
        .nodes
        .extend(reserved(0x77_ffff).membership.nodes.into_iter().filter(|(id, _)| *id == 0x77_ffff));
    assert_eq!(plan(&observed), Plan::Change(Change::Promote { ids: firsts(1..3) }));
}

#[test]
fn held_learner_waits_for_a_hand() {
    let mut observed = cluster(0..3, 3..5);
    observed.membership.nodes.get_mut(&first(3)).unwrap().held = true;
    assert_eq!(plan(&observed), Plan::Nothing, "four voters are no more than three");
    observed.membership.nodes.get_mut(&first(3)).unwrap().held = false;
    assert_eq!(plan(&observed), Plan::Change(Change::Promote { ids: firsts(3..5) }));
}

/// Case 31, where the old address leads nowhere: the member asks to join again from its new one.
#[test]
fn moved_member_is_believed_where_it_was_dialled() {
    let moved = Node { peer_address: "10.0.0.9:2380".into(), ..node(1) };
    let mut observed = cluster(0..3, 0..0).kill(first(1));
    let joiner = |dialled| Joiner { member_id: first(1), node: moved.clone(), dialled, adopts: false };
    observed.joiners = vec![joiner(Dialled::Other(first(9)))];
    assert_eq!(plan(&observed), Plan::Nothing);
    observed.joiners = vec![joiner(Dialled::Joiner)];
    assert_eq!(plan(&observed), Plan::Change(Change::UpdateNode { id: first(1), node: moved }));
}

#[test]
fn condemned_learner_is_removed_and_condemned_joiner_refused() {
    assert_eq!(plan(&cluster(0..3, 3..4).want(0..3)), Plan::Change(Change::RemoveLearners { ids: firsts(3..4) }));
    let observed = cluster(0..3, 0..0).want(0..3).join(first(3), Dialled::Joiner);
    assert!(matches!(reason(&observed), Reason::OutsideRange { slot: 3, .. }));
}

#[test]
fn zero_replicas_condemn_nobody() {
    assert_eq!(plan(&cluster(0..3, 0..0).want(0..0)), Plan::Nothing);
}

/// Case 39: `ordinals.start` other than 0: the new range votes before the old one leaves.
#[test]
fn promotions_come_before_removals() {
    let mut observed = cluster(0..3, 3..6).want(3..6);
    assert_eq!(plan(&observed), Plan::Change(Change::Promote { ids: firsts(3..6) }));
    observed.membership.configs = vec![firsts(0..6)];
    assert_eq!(plan(&observed), Plan::Change(Change::TransferLeader { to: first(3) }));
    observed.leader = first(3);
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveVoters { ids: firsts(0..3) }));
}

#[test]
fn removal_comes_before_demotion_of_the_odd_one_out() {
    let observed = cluster(0..5, 0..0).want(0..4);
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveVoters { ids: firsts(4..5) }));
    let observed = cluster(0..4, 0..0).want(0..4);
    assert_eq!(plan(&observed), Plan::Change(Change::Demote { ids: firsts(3..4) }));
}

#[test]
fn dead_voter_is_the_first_to_be_demoted() {
    let observed = cluster(0..4, 0..0).kill(first(1));
    assert_eq!(plan(&observed), Plan::Change(Change::Demote { ids: firsts(1..2) }));
}

#[test]
fn manual_member_is_never_removed_and_reader_never_votes() {
    let mut observed = cluster(0..1, 1..3).want(0..1).kill(first(1)).kill(first(2));
    for (slot, kind) in [(1, Kind::Manual), (2, Kind::Reader)] {
        observed.membership.nodes.get_mut(&first(slot)).unwrap().set_kind(kind);
    }
    assert_eq!(plan(&observed), Plan::Change(Change::RemoveLearners { ids: firsts(2..3) }));
    observed.health.insert(first(2), healthy());
    assert_eq!(plan(&observed), Plan::Nothing);
}

/// Case 31: a new pod address.
#[test]
fn changed_address_is_written_into_the_membership() {
    let mut observed = cluster(0..3, 0..0);
    let moved = Node { peer_address: "10.0.0.9:2380".into(), ..node(1) };
    let more = Node { more_peer_addresses: vec!["10.0.0.9:2380".into()], ..node(1) };
    for told in [moved, more] {
        observed.health.insert(first(1), Health { announces: Some(told.clone()), ..healthy() });
        assert_eq!(plan(&observed), Plan::Change(Change::UpdateNode { id: first(1), node: told }));
    }
}

/// Rule 24, one situation a line: what is asked for, and what comes of it.
#[test]
fn manual_operations_pass_the_same_gate() {
    use crate::cluster::manual::{Operation, Verdict, judge};
    use crate::error::Error;
    let add = |slot| Operation::Add { id: first(slot), node: node(slot) };
    let remove = |slot| Operation::Remove { id: first(slot) };
    let promote = |slot| Operation::Promote { id: first(slot) };
    let update = |peer_address: &str, is_there| Operation::Update {
        id: first(1),
        peer_address: peer_address.to_owned(),
        more_peer_addresses: Vec::new(),
        is_there,
    };
    let by_hand = |mut observed: Observed| {
        observed.membership.nodes.values_mut().for_each(|node| node.set_kind(Kind::Manual));
        observed
    };
    let moved = Node { peer_address: "far:1".into(), kind: Kind::Manual.into(), ..node(1) };
    let moved = Change::UpdateNode { id: first(1), node: moved };
    let refuse = |error| Verdict::Refuse(error);
    let three = || cluster(0..3, 0..0);
    let held = |held| {
        let mut observed = cluster(0..2, 2..3);
        observed.membership.nodes.get_mut(&first(2)).unwrap().held = held;
        observed
    };
    let released = Change::UpdateNode { id: first(2), node: node(2) };
    for (observed, operation, begun, expected) in [
        (three(), add(3), false, Verdict::Do(Change::AddLearner { id: first(3), node: node(3) })),
        (three(), add(2), false, refuse(Error::MemberExists)),
        (three(), add(2), true, Verdict::Done),
        (three(), Operation::Add { id: id(2, 2), node: node(2) }, false, refuse(Error::PeerUrlExists)),
        (three(), remove(1), false, Verdict::Do(Change::RemoveVoters { ids: firsts(1..2) })),
        (three(), remove(0), false, Verdict::HandOver(Change::TransferLeader { to: first(1) })),
        (three(), remove(7), false, refuse(Error::MemberNotFound)),
        (three(), remove(7), true, Verdict::Done),
        (cluster(0..1, 0..0), remove(0), false, refuse(Error::NotEnoughStarted)),
        (cluster(0..1, 1..2), remove(1), false, Verdict::Do(Change::RemoveLearners { ids: firsts(1..2) })),
        (Observed { in_flight: true, ..three() }, remove(1), false, Verdict::Wait(Reason::InFlight)),
        (held(false), promote(2), false, Verdict::Do(Change::Promote { ids: firsts(2..3) })),
        (held(true), promote(2), false, Verdict::Do(released)),
        (held(false).kill(first(2)), promote(2), false, refuse(Error::LearnerNotReady)),
        (three(), promote(1), false, refuse(Error::NotLearner)),
        (three(), promote(1), true, Verdict::Done),
        (three(), promote(8), false, refuse(Error::MemberNotFound)),
        (three(), update(&node(1).peer_address, true), false, Verdict::Done),
        (three(), update(&node(2).peer_address, false), false, refuse(Error::PeerUrlExists)),
        (by_hand(three()), update("far:1", false), false, Verdict::Do(moved.clone())),
        (by_hand(cluster(0..2, 0..0)), update("far:1", true), false, Verdict::Do(moved)),
    ] {
        assert_eq!(judge(&observed, &operation, begun), expected, "{operation:?}, begun: {begun}");
    }
    let fourth = judge(&cluster(0..3, 3..4), &promote(3), false);
    assert!(matches!(fourth, Verdict::Refuse(Error::Membership(_))), "four voters survive no more: {fourth:?}");
    let mut says_otherwise = by_hand(three());
    says_otherwise.health.get_mut(&first(1)).unwrap().announces = Some(node(1));
    for voters in [three(), says_otherwise] {
        let undone = judge(&voters, &update("far:1", true), false);
        let why = "tells its address itself, and it is kv-1.kv:2380";
        assert!(matches!(&undone, Verdict::Refuse(Error::Membership(text)) if text.contains(why)), "{undone:?}");
    }
    for voters in [cluster(0..2, 0..0), three().kill(first(2))].map(by_hand) {
        let sent_away = judge(&voters, &update("far:1", false), false);
        assert!(matches!(sent_away, Verdict::Refuse(Error::Membership(_))), "the quorum would end: {sent_away:?}");
    }
    let lost = judge(&three().kill(first(2)), &remove(1), false);
    assert!(matches!(lost, Verdict::Wait(Reason::Quorum { which: Which::New, .. })), "{lost:?}");
}

#[test]
fn every_plan_keeps_a_fit_quorum_before_and_after() {
    let seed = 7;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut changes = 0;
    for round in 0..20_000 {
        let voters = rng.u64(1..6);
        let mut observed = cluster(0..voters, voters..voters + rng.u64(0..3));
        for slot in 1..8 {
            if rng.u8(..) < 80 {
                observed = observed.kill(first(slot));
            }
            if rng.u8(..) < 40 {
                observed = observed.newcomer(slot);
            }
            if rng.u8(..) < 40 {
                observed = observed.join(id(slot, 3), Dialled::Joiner);
            }
        }
        if rng.bool() {
            observed.wanted = Some(WantedSlots { slots: 0..rng.u64(0..6), observations: rng.u32(1..3) });
        }
        let Plan::Change(change) = plan(&observed) else { continue };
        changes += 1;
        let context = || format!("seed {seed}, round {round}: {change:?} of {observed:?}");
        let after = change.voters_after(&observed.membership).map(|(voters, _)| voters);
        for voters in [Some(observed.membership.voters()), after].into_iter().flatten() {
            assert!(lacks_quorum(&observed, &voters).is_none(), "{}", context());
        }
        if let Change::RemoveVoters { ids } | Change::RemoveLearners { ids } = &change {
            let justified =
                |member: &u64| observed.is_condemned(*member) || observed.slots.get(&slot_of(*member)) != Some(member);
            assert!(ids.iter().all(justified) && !ids.contains(&observed.leader), "{}", context());
        }
    }
    assert!(changes > 1000, "{changes}");
}

/// Whom a person has added votes, and keeps its vote: odd numbers are for slots, which come by themselves.
#[test]
fn fourth_member_votes_if_a_person_has_added_it() {
    let by_hand = |mut observed: Observed, slot: u64| {
        observed.membership.nodes.get_mut(&first(slot)).unwrap().set_kind(Kind::Manual);
        observed
    };
    assert_eq!(plan(&by_hand(cluster(0..3, 3..4), 3)), Plan::Change(Change::Promote { ids: firsts(3..4) }));
    assert_eq!(plan(&by_hand(cluster(0..4, 0..0), 3)), Plan::Nothing);
    let all_by_hand = (0..4).fold(cluster(0..4, 0..0), by_hand);
    assert_eq!(plan(&all_by_hand.kill(first(3))), Plan::Nothing, "nobody is replaced by itself");
}
