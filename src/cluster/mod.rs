//! How members find one another: forming a cluster, joining one, and what the leader changes in the membership.
//!
//! ```text
//! peers      asking another node who it is (the trait that the transport implements)
//! bootstrap  what this node answers, durably, until and while Raft runs
//! decide     what to do next while there is no Raft: a pure function of what was answered
//! formation  the driver that asks, decides and acts, until Raft can start
//! join       what the leader answers to those who ask to join
//! recall     whether a member that has started finds its disk as the others remember it
//! leaderless what a member says that runs Raft and knows no leader
//! reconcile  the leader's loop: observe, plan, carry out
//! declared   users and roles that a file declares
//! audit      the leader's comparison of the members' states
//! dead_leader what a voter does when the leader's process has died
//! fence      what a member does whose state that comparison, or a person, has found to be wrong
//! plan       the next change of the membership: a pure function of what the leader observes
//! manual     what a person asks of the membership, through the same gate
//! manage     the way of that to the leader, and of the leader's view back
//! view       what is shown of all this
//! kubernetes the StatefulSet as the API server shows it: how many pods should exist
//! wanted     how many pods should exist, as whoever runs them says
//! ```
//!
//! How server code uses it: open the `storage::member_dir`, make a [`Bootstrap`] from it, serve the peer service from that, and
//! await [`formation::run`]. Its [`Outcome`] says how to start Raft. On the leader, gather [`plan::Observed`] at every tick,
//! call [`plan::plan`], and carry out the one change that it names.
//!
//! Invariant: Raft's membership is the only membership; nothing here stores a second one.
//! Absent: openraft and tonic; the rules for pods that end (`kubernetes`, `node`).

pub mod audit;
pub mod bootstrap;
pub mod dead_leader;
pub mod decide;
pub mod declared;
pub mod fence;
pub mod formation;
pub mod join;
pub mod kubernetes;
pub mod leaderless;
pub mod manage;
pub mod manual;
pub mod peers;
pub mod plan;
pub mod recall;
pub mod reconcile;
pub mod view;
pub mod wanted;

pub use audit::Audit;
pub use bootstrap::{Bootstrap, RaftFacts};
pub use dead_leader::DeadLeader;
pub use declared::Declared;
pub use fence::Fence;
pub use formation::{Outcome, Places};
pub use manage::Manager;
pub use peers::{Peers, Unreachable};
pub use reconcile::Reconciler;
pub use wanted::{Notice, Wanted, WantedSource};

/// The slot that a member id carries, in the width that membership counts in.
pub fn slot_of(member_id: u64) -> u64 {
    u64::from(crate::identity::slot_of(member_id))
}

/// How many of `eligible` members vote: at most `max_voters`, and no even number above two, because the even one adds a
/// vote that is needed but none that may be lost (membership rule 11).
pub fn voter_target(eligible: usize, max_voters: usize) -> usize {
    let most = eligible.min(max_voters);
    if most > 2 && most.is_multiple_of(2) { most - 1 } else { most }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn voters_are_odd_above_two_and_bounded() {
        let targets: Vec<usize> = (0..=8).map(|eligible| voter_target(eligible, 5)).collect();
        assert_eq!(targets, [0, 1, 2, 3, 3, 5, 5, 5, 5]);
    }
}
