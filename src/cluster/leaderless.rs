//! What a member that runs Raft and knows no leader waits for, in words for people (membership cases 8, 30, 33).
//!
//! Also whether it was removed, which only a leader with a quorum and a newer membership can say (rule 25).
//! Absent: any action. Such a member keeps its disk as it is and goes on asking for votes; what it says here is for `/readyz`,
//! `status` and the log.

use std::ops::Range;
use std::time::Duration;

use futures_util::future::join_all;

use super::decide::{Wait, has_quorum};
use super::peers::{self, Peers, Unreachable};
use super::plan::{Ids, Members};
use super::slot_of;
use crate::env::Env;
use crate::pb::peer::WhoResponse;
use crate::pb::peer::who_response::State;

/// One other member of the membership, asked.
struct Other {
    id: u64,
    /// Name and address.
    text: String,
    answer: Result<WhoResponse, Unreachable>,
}

/// Asks the other members; `None` if enough of them are there to elect a leader, so that one is to be expected.
pub async fn explain(
    env: &Env,
    peers: &dyn Peers,
    (cluster_id, member): (u64, u64),
    members: &Members,
    wanted: Option<Range<u64>>,
    patience: Duration,
) -> Option<Wait> {
    judge(cluster_id, member, members, wanted, &ask(env, peers, member, members, patience).await)
}

/// Whether a leader with a quorum says that the committed membership, newer than the one known here, lacks this member.
pub async fn is_removed(
    env: &Env,
    peers: &dyn Peers,
    (cluster_id, member): (u64, u64),
    members: &Members,
    patience: Duration,
) -> bool {
    let others = ask(env, peers, member, members, patience).await;
    others.iter().filter_map(|other| other.answer.as_ref().ok()).any(|who| lacks(who, cluster_id, member, members))
}

async fn ask(env: &Env, peers: &dyn Peers, member: u64, members: &Members, patience: Duration) -> Vec<Other> {
    let asks = members.nodes.iter().filter(|(id, _)| **id != member).map(|(id, node)| async move {
        let answer = peers::who(env, peers, &node.peer_address, patience).await;
        Other { id: *id, text: format!("{} ({})", node.name, node.peer_address), answer }
    });
    join_all(asks).await
}

fn lacks(who: &WhoResponse, cluster_id: u64, member: u64, members: &Members) -> bool {
    let own_index = members.log_id.map_or(0, |log_id| log_id.index);
    let named = who.membership.iter().flat_map(|m| &m.members).any(|m| m.id == member);
    who.cluster_id == cluster_id && has_quorum(who) && who.membership_index > own_index && !named
}

fn judge(
    cluster_id: u64,
    member: u64,
    members: &Members,
    wanted: Option<Range<u64>>,
    others: &[Other],
) -> Option<Wait> {
    let answers = || others.iter().filter_map(|other| other.answer.as_ref().ok());
    if answers().any(|who| lacks(who, cluster_id, member, members)) {
        return Some(Wait::Removed { cluster_id, member });
    }
    let present = |other: &Other| {
        let who = other.answer.as_ref().ok();
        who.is_some_and(|who| who.member_id == other.id && who.cluster_id == cluster_id)
    };
    let lacking = members.configs.iter().find_map(|voters| {
        let have =
            voters.iter().filter(|id| **id == member || others.iter().any(|o| o.id == **id && present(o))).count();
        let needs = voters.len() / 2 + 1;
        (have < needs).then_some((have, needs, voters))
    });
    let (have, needs, voters) = lacking?;
    let formed_elsewhere = |who: &&WhoResponse| who.state() == State::Formed && who.cluster_id != cluster_id;
    if let Some(who) = answers().find(formed_elsewhere) {
        return Some(Wait::ForeignCluster { own: cluster_id, found: who.cluster_id });
    }
    let missing = others.iter().filter(|other| !present(other)).map(|other| match &other.answer {
        Ok(who) => format!("{}: answers as member {:016x}", other.text, who.member_id),
        Err(why) => format!("{}: {why}", other.text),
    });
    let scale_to = wanted.and_then(|slots| size_with_quorum(voters, &slots));
    Some(Wait::NoLeader { cluster_id, have, needs, all: voters.len(), scale_to, missing: missing.collect() })
}

/// The least size above the wanted one that brings a quorum of `voters` back.
fn size_with_quorum(voters: &Ids, wanted: &Range<u64>) -> Option<u64> {
    let last = voters.iter().map(|id| slot_of(*id)).max()?;
    let within = |end: u64| voters.iter().filter(|id| (wanted.start..end).contains(&slot_of(**id))).count();
    if within(wanted.end) > voters.len() / 2 {
        return None;
    }
    (wanted.end + 1..=last + 1).find(|end| within(*end) > voters.len() / 2).map(|end| end - wanted.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::log::{LogId, Membership, Node, membership};

    const IDS: [u64; 3] = [0x10000, 0x10001, 0x10002];

    fn members() -> Members {
        Members {
            log_id: Some(LogId { term: 1, index: 5 }),
            configs: vec![IDS.into_iter().collect()],
            nodes: IDS.into_iter().map(|id| (id, Node::default())).collect(),
        }
    }

    fn other(id: u64, answer: Option<WhoResponse>) -> Other {
        Other { id, text: format!("{id:x}"), answer: answer.ok_or(Unreachable("connection refused".into())) }
    }

    fn formed(cluster_id: u64, member_id: u64) -> WhoResponse {
        let mut who = WhoResponse { cluster_id, member_id, ..WhoResponse::default() };
        who.set_state(State::Formed);
        who
    }

    #[test]
    fn survivor_names_who_is_missing_and_what_to_do() {
        let others = [other(IDS[1], None), other(IDS[2], None)];
        let text = judge(7, IDS[0], &members(), None, &others).unwrap().to_string();
        assert!(text.contains("10001: connection refused, 10002: connection refused"), "{text}");
        assert!(text.contains("1 of 2") && text.contains("`recover`"), "{text}");
        assert!(!text.contains("scale to"), "nobody has scaled: {text}");
    }

    /// Case 23: 5 -> 0 -> 2.
    #[test]
    fn scaled_below_a_quorum_says_what_to_scale_to() {
        let ids: Ids = (0..5).map(|slot| 0x10000 | slot).collect();
        let members = Members { configs: vec![ids.clone()], ..members() };
        let mut others: Vec<Other> = ids.iter().skip(1).map(|id| other(*id, None)).collect();
        others[0] = other(0x10001, Some(formed(7, 0x10001)));
        let text = judge(7, 0x10000, &members, Some(0..2), &others).unwrap().to_string();
        assert!(text.contains("needs 3 of 5, scale to 3"), "{text}");
        let text = judge(7, 0x10000, &members, Some(0..3), &others).unwrap().to_string();
        assert!(!text.contains("scale to"), "the third is on its way: {text}");
    }

    #[test]
    fn quorum_that_is_there_needs_no_words() {
        let others = [other(IDS[1], Some(formed(7, IDS[1]))), other(IDS[2], None)];
        assert_eq!(judge(7, IDS[0], &members(), None, &others), None);
    }

    #[test]
    fn foreign_disk_says_so() {
        let others = [other(IDS[1], Some(formed(8, 0x20001))), other(IDS[2], None)];
        let expected = Some(Wait::ForeignCluster { own: 7, found: 8 });
        assert_eq!(judge(7, IDS[0], &members(), None, &others), expected);
    }

    #[test]
    fn removed_member_hears_it_from_a_leader_with_quorum_only() {
        let mut leader = formed(7, IDS[1]);
        let rest = [IDS[1], IDS[2]].map(|id| membership::Member { id, node: None });
        leader.membership = Some(Membership { members: rest.to_vec(), ..Membership::default() });
        leader.membership_index = 9;
        let judged = |who: &WhoResponse| judge(7, IDS[0], &members(), None, &[other(IDS[1], Some(who.clone()))]);
        assert!(!matches!(judged(&leader), Some(Wait::Removed { .. })));
        leader.quorum = true;
        assert_eq!(judged(&leader), Some(Wait::Removed { cluster_id: 7, member: IDS[0] }));
        leader.membership_index = 5;
        assert!(!matches!(judged(&leader), Some(Wait::Removed { .. })));
    }
}
