//! A member that has started asks the others what they remember of its disk, and finds out whether it went back.
//!
//! Invariants: the word of a leader that has a quorum without this member is needed before its disk is given up; as long as there is none,
//! the disk stays, for it may be the last good copy of something.
//! Absent: what is remembered and what the answer forbids (`raft::memory`), and asking about a log that was made just now.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use super::decide::has_quorum;
use super::plan::Members;
use super::reconcile;
use crate::env::{planted, sleep, timeout};
use crate::node::Node;
use crate::pb::peer::WhoResponse;
use crate::raft::{Ballot, Peers, Reach, Standing};

/// Between questions, at first and later: nobody can be elected before the first ones are answered.
const DELAYS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// Questions that follow one another quickly.
const QUICK_ROUNDS: u32 = 20;
/// A leader must say so often in a row that the disk went back.
const ROUNDS_LOST: u32 = 2;

/// How asking ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A quorum and a leader remember nothing that is not there; or the member ends.
    Whole,
    /// The disk is lost: a quorum goes on without it.
    WentBack,
}

/// Asks until it is known what to think of this member's disk, and opens the ballot when it may take part in elections.
pub async fn run(
    node: &Node,
    peers: &Arc<Peers>,
    ballot: &Ballot,
    own: impl Fn() -> Reach,
    patience: Duration,
) -> Found {
    let (env, this) = (node.env(), (node.member().cluster_id, node.member().member_id));
    if planted!("memory-not-asked") {
        ballot.set(Standing::Whole);
        return Found::Whole;
    }
    let (mut rounds, mut lost, mut unled) = (0, 0, 0);
    loop {
        let members = reconcile::members(&node.status());
        let mut answers = BTreeMap::new();
        let mut heard = judge(this, own(), &members, &answers);
        let mut asks = ask(node, peers, &members, patience);
        // One that does not answer must not hold up the election that the others have.
        while let Some(answer) = asks.next().await {
            answers.extend(answer);
            // Looked at after the answer: what was acknowledged meanwhile is on this disk by now.
            heard = judge(this, own(), &members, &answers);
            if heard == Heard::Standing(Standing::Whole) && ballot.set(Standing::Whole) {
                say(Standing::Whole, own());
            }
        }
        let (own, is_lost) = (own(), matches!(heard, Heard::Lost(_)));
        lost = if is_lost { lost + 1 } else { 0 };
        let (Heard::Standing(standing) | Heard::Lost(standing)) = heard;
        let is_led = answers.values().any(|who| who.cluster_id == this.0 && has_quorum(who));
        let is_led_by_others = answers.values().any(|who| who.cluster_id == this.0 && who.quorum_of_others);
        unled = if is_led_by_others { 0 } else { unled + 1 };
        ballot.set_stands_still(unled > QUICK_ROUNDS);
        if ballot.set(standing) {
            say(standing, own);
        }
        if lost >= ROUNDS_LOST {
            tracing::error!(
                ?own,
                "a leader with a quorum remembers more; the disk is lost, it goes on as a new member"
            );
            return Found::WentBack;
        }
        // The leader remembers best, and may not have been among those who answered first.
        if standing == Standing::Whole && is_led {
            return Found::Whole;
        }
        rounds += 1;
        let delay = env.jitter(DELAYS[usize::from(rounds > QUICK_ROUNDS)]);
        tokio::select! {
            () = env.shutdown.cancelled() => return Found::Whole,
            () = sleep(delay) => {}
        }
    }
}

fn say(standing: Standing, own: Reach) {
    match standing {
        Standing::Unknown => {}
        Standing::Whole => {
            tracing::info!("nobody of a quorum remembers more than this disk holds: it takes part in elections")
        }
        Standing::Short(remembered) => tracing::error!(
            ?own,
            ?remembered,
            "this disk holds less than it once acknowledged: an earlier image was put back, or its newest data is lost. It votes only for \
             who holds that; once a quorum of others has a leader it goes on as a new member"
        ),
    }
}

/// What each of the other members says, by its id, as the answers come.
fn ask<'a>(
    node: &'a Node,
    peers: &'a Arc<Peers>,
    members: &'a Members,
    patience: Duration,
) -> FuturesUnordered<impl Future<Output = Option<(u64, WhoResponse)>> + 'a> {
    let (env, this) = (node.env(), node.member().member_id);
    let others = members.nodes.iter().filter(move |(id, _)| **id != this);
    let asks = others.map(move |(id, other)| async move {
        let nonce = env.random_u64();
        let answer = timeout(patience, peers.recall(&other.peer_address, nonce, this)).await;
        Some((*id, answer.ok()?.ok().filter(|who| who.nonce == nonce)?))
    });
    asks.collect()
}

/// What the answers say.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    Standing(Standing),
    /// A leader remembers more than this disk holds, and a quorum confirms it without this member: the disk is short, and lost.
    Lost(Standing),
}

/// Judges the answers of the other members, by their ids. Who does not know the question (an older version) remembers nothing.
pub fn judge(
    (cluster_id, member): (u64, u64),
    own: Reach,
    members: &Members,
    answers: &BTreeMap<u64, WhoResponse>,
) -> Heard {
    let told = || {
        let own_cluster = answers.iter().filter(|(id, who)| who.member_id == **id && who.cluster_id == cluster_id);
        own_cluster.map(|(id, who)| (*id, who, who.recollection.map(Reach::from)))
    };
    // A quorum that this member itself was of a moment ago, with the disk that it no longer has, is none.
    let lost =
        told().filter(|(_, who, _)| who.quorum_of_others).filter_map(|(_, _, reach)| reach).find(|reach| *reach > own);
    if let Some(reach) = lost {
        return Heard::Lost(Standing::Short(reach));
    }
    let is_quorum = members.configs.iter().all(|voters| {
        let have = voters.iter().filter(|id| **id == member || told().any(|(other, ..)| other == **id)).count();
        have > voters.len() / 2
    });
    let most = told().filter_map(|(_, _, reach)| reach).max();
    Heard::Standing(match most.filter(|most| *most > own) {
        _ if !is_quorum => Standing::Unknown,
        Some(reach) => Standing::Short(reach),
        None => Standing::Whole,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::peer::who_response::State;

    const IDS: [u64; 3] = [0x10000, 0x10001, 0x10002];
    const OWN: Reach = Reach { term: 4, last: Some((4, 50)) };

    fn members() -> Members {
        Members { configs: vec![IDS.into_iter().collect()], ..Members::default() }
    }

    fn who(id: u64, reach: Option<Reach>) -> (u64, WhoResponse) {
        let recollection = reach.map(Into::into);
        let mut who = WhoResponse { cluster_id: 7, member_id: id, recollection, ..WhoResponse::default() };
        who.set_state(State::Formed);
        (id, who)
    }

    fn heard(own: Reach, answers: impl IntoIterator<Item = (u64, WhoResponse)>) -> Heard {
        judge((7, IDS[0]), own, &members(), &answers.into_iter().collect())
    }

    fn reach(term: u64, index: u64) -> Reach {
        Reach { term, last: Some((term, index)) }
    }

    #[test]
    fn a_quorum_that_remembers_no_more_opens_the_ballot() {
        assert_eq!(heard(OWN, []), Heard::Standing(Standing::Unknown));
        for least in [None, Some(OWN), Some(reach(3, 900)), Some(Reach { term: 4, last: None })] {
            assert_eq!(heard(OWN, [who(IDS[1], least)]), Heard::Standing(Standing::Whole), "{least:?}");
        }
        // Another disk at its address, or one of another cluster, is not the member.
        let (_, stranger) = who(IDS[2], None);
        assert_eq!(heard(OWN, [(IDS[1], stranger)]), Heard::Standing(Standing::Unknown));
        let (id, foreign) = who(IDS[1], None);
        let foreign = WhoResponse { cluster_id: 8, ..foreign };
        assert_eq!(heard(OWN, [(id, foreign)]), Heard::Standing(Standing::Unknown));
        let alone = Members { configs: vec![[IDS[0]].into()], ..Members::default() };
        assert_eq!(judge((7, IDS[0]), OWN, &alone, &BTreeMap::new()), Heard::Standing(Standing::Whole));
    }

    #[test]
    fn a_forgotten_vote_or_entry_is_noticed_and_one_voice_is_enough_to_be_silent() {
        for more in [reach(4, 51), reach(5, 10), Reach { term: 5, last: None }] {
            let short = Heard::Standing(Standing::Short(more));
            assert_eq!(heard(OWN, [who(IDS[1], Some(more)), who(IDS[2], None)]), short);
            assert_eq!(heard(more, [who(IDS[1], Some(more))]), Heard::Standing(Standing::Whole));
        }
    }

    #[test]
    fn only_a_leader_with_a_quorum_ends_a_disk() {
        let more = reach(4, 51);
        let (id, mut leader) = who(IDS[1], Some(more));
        leader.leader_id = id;
        assert_eq!(heard(OWN, [(id, leader.clone())]), Heard::Standing(Standing::Short(more)));
        leader.quorum = true;
        assert_eq!(
            heard(OWN, [(id, leader.clone())]),
            Heard::Standing(Standing::Short(more)),
            "it may be of the quorum"
        );
        leader.quorum_of_others = true;
        assert_eq!(heard(OWN, [(id, leader.clone())]), Heard::Lost(Standing::Short(more)));
        leader.recollection = Some(OWN.into());
        assert_eq!(heard(OWN, [(id, leader)]), Heard::Standing(Standing::Whole));
    }
}
