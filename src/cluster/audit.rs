//! The comparison of the members' states: finds the one that has applied something else than the others, and fences it.
//!
//! Every member runs one; it works while its member leads. Every interval it asks all members how far they have applied, takes
//! the least of that, and asks again for the digest (`kv`) after that very entry. Who differs from a majority of the voters,
//! twice in a row, gets alarm CORRUPT by the log: its member then serves no data and does not lead (`fence`). The leader judges
//! itself alike.
//! Invariant: where no digest has a majority of all voters (two members, or one of three is away) nobody is fenced, and what
//! differs is reported. A member that makes no digest, or another version of it, is not judged.
//! Absent: repair. A fenced member is replaced by itself once its disk was deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;

use super::fence;
use super::plan::Members;
use super::reconcile::members;
use crate::caller::Caller;
use crate::env::{Instant, sleep};
use crate::kv;
use crate::metrics::metrics;
use crate::node::Node;
use crate::pb::etcd::AlarmType;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::log::{Command, StartDigest, command};
use crate::pb::peer::WhoResponse;
use crate::raft::Peers;

/// A difference is looked at again after this, before anybody is fenced.
const CONFIRM_AFTER: Duration = Duration::from_millis(250);
/// Digests that are not known are begun anew no more often.
const START_AGAIN: Duration = Duration::from_secs(30);

/// What one comparison says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// All that were compared hold the same.
    Same,
    /// These differ from what a majority of the voters holds.
    Differ(BTreeSet<u64>),
    /// Nothing has a majority. The groups of members that hold the same.
    Undecided(Vec<Vec<u64>>),
}

/// Judges the digests at one log index. `configs`: the voters; two sets while a joint change is under way.
fn judge(configs: &[BTreeSet<u64>], digests: &BTreeMap<u64, u64>) -> Verdict {
    let mut groups: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (member, digest) in digests {
        groups.entry(*digest).or_default().push(*member);
    }
    if groups.len() < 2 {
        return Verdict::Same;
    }
    let is_majority = |group: &Vec<u64>| {
        let of = |voters: &BTreeSet<u64>| group.iter().filter(|id| voters.contains(id)).count() > voters.len() / 2;
        !configs.is_empty() && configs.iter().all(of)
    };
    match groups.values().find(|group| is_majority(group)) {
        Some(most) => Verdict::Differ(digests.keys().filter(|id| !most.contains(id)).copied().collect()),
        None => Verdict::Undecided(groups.into_values().collect()),
    }
}

/// See the module's head.
pub struct Audit {
    node: Node,
    peers: Arc<Peers>,
    interval: Duration,
    note: Mutex<Option<String>>,
}

/// What one round saw.
struct Round {
    verdict: Verdict,
    index: u64,
    /// Somebody's digest is not known, though its build makes one.
    unknown: bool,
}

impl Audit {
    /// `interval`: between comparisons; zero for none.
    pub fn new(node: Node, peers: Arc<Peers>, interval: Duration) -> Arc<Self> {
        Arc::new(Self { node, peers, interval, note: Mutex::default() })
    }

    /// Which members differ, in a sentence; `None` if none are known to.
    pub fn note(&self) -> Option<String> {
        self.note.lock().clone()
    }

    /// Works while this member leads, until shutdown.
    pub async fn run(self: Arc<Self>) {
        let shutdown = self.node.env().shutdown.clone();
        if self.interval.is_zero() {
            return;
        }
        let mut suspects = None;
        let mut started = None;
        loop {
            let pause = if suspects.is_some() { CONFIRM_AFTER.min(self.interval) } else { self.interval };
            tokio::select! {
                () = sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
            if !self.node.status().is_leader {
                suspects = None;
                self.set_note(None);
                continue;
            }
            tokio::select! {
                () = self.step(&mut suspects, &mut started) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// `suspects`: who differed in the round before.
    async fn step(&self, suspects: &mut Option<BTreeSet<u64>>, started: &mut Option<Instant>) {
        let before = suspects.take();
        let Some(round) = self.round().await else { return };
        metrics().self_checks.inc();
        let known = self.node.store().read(|s| s.kv.alarms());
        let is_fenced = |id: &u64| known.iter().any(|a| a.member_id == *id && a.alarm() == AlarmType::Corrupt);
        match round.verdict {
            Verdict::Same => {
                self.set_note(None);
                if round.unknown && started.is_none_or(|at| at.elapsed() >= START_AGAIN) {
                    *started = Some(Instant::now());
                    self.start_digest().await;
                }
            }
            Verdict::Differ(ids) => {
                metrics().self_checks_differing.inc();
                let names = names(&ids);
                self.set_note(Some(format!(
                    "corrupt cluster: after log entry {} the data of {names} differs from the majority's",
                    round.index
                )));
                let fresh: BTreeSet<u64> = ids.iter().filter(|id| !is_fenced(id)).copied().collect();
                let confirmed = before.is_some_and(|before| fresh.is_subset(&before));
                if confirmed {
                    for id in &fresh {
                        self.fence(*id, round.index).await;
                    }
                } else if !fresh.is_empty() {
                    *suspects = Some(fresh);
                }
            }
            Verdict::Undecided(groups) => {
                metrics().self_checks_differing.inc();
                let groups: Vec<String> = groups.iter().map(|ids| names(&ids.iter().copied().collect())).collect();
                self.set_note(Some(format!(
                    "corrupt cluster: after log entry {} the members' data differs, and none of it has a majority: {}; nobody is \
                     fenced. Compare the members with `etcdctl endpoint hashkv`, and delete the data directory of the wrong one",
                    round.index,
                    groups.join(" against ")
                )));
            }
        }
    }

    /// Asks everybody; `None` if there was nothing to compare.
    async fn round(&self) -> Option<Round> {
        let status = self.node.status();
        let Members { configs, nodes, .. } = members(&status);
        let this = self.node.member().member_id;
        let others: Vec<(u64, String)> =
            nodes.iter().filter(|(id, _)| **id != this).map(|(id, node)| (*id, node.peer_address.clone())).collect();
        let first = self.ask(&others, 0).await;
        let comparable: Vec<(u64, String)> =
            others.into_iter().filter(|(id, _)| first.get(id).is_some_and(|who| self.is_comparable(who))).collect();
        let unknown = self.node.store().read(|s| s.kv.digest().is_none())
            || comparable.iter().any(|(id, _)| first[id].digest_unknown);
        let comparable: Vec<_> = comparable.into_iter().filter(|(id, _)| !first[id].digest_unknown).collect();
        let applied = comparable.iter().map(|(id, _)| first[id].applied_index);
        let index = applied.chain(self.node.store().applied_index()).min().filter(|index| *index > 0)?;
        let answers = self.ask(&comparable, index).await;
        let mut digests: BTreeMap<u64, u64> = answers.iter().filter_map(|(id, who)| Some((*id, who.digest?))).collect();
        digests.extend(self.node.store().digest_at(index).map(|digest| (this, digest)));
        Some(Round { verdict: judge(&configs, &digests), index, unknown })
    }

    /// Whether a member makes our digests, and is not so far behind that this one has forgotten its own of then.
    fn is_comparable(&self, who: &WhoResponse) -> bool {
        let store = self.node.store();
        let is_near = who.digest_unknown
            || store.applied_index() < Some(who.applied_index)
            || store.digest_at(who.applied_index).is_some();
        who.digest_version == kv::DIGEST_VERSION && is_near
    }

    /// The answers of those members that are who the membership says.
    async fn ask(&self, members: &[(u64, String)], digest_index: u64) -> BTreeMap<u64, WhoResponse> {
        let cluster_id = self.node.member().cluster_id;
        let asks = members.iter().map(|(id, address)| async move {
            let nonce = self.node.env().random_u64();
            let who = self.peers.digest(address, nonce, digest_index).await.ok()?;
            (who.nonce == nonce && who.member_id == *id && who.cluster_id == cluster_id).then_some((*id, who))
        });
        join_all(asks).await.into_iter().flatten().collect()
    }

    fn set_note(&self, note: Option<String>) {
        *self.note.lock() = note;
    }

    fn cluster_version(&self) -> u32 {
        self.node.store().read(|s| s.kv.cluster_version())
    }

    async fn fence(&self, member_id: u64, index: u64) {
        let member = format!("{member_id:x}");
        match fence::set_corrupt(&self.node, member_id, AlarmAction::Activate).await {
            Ok(()) => tracing::error!(
                member,
                index,
                "corrupt cluster: fenced a member whose data differs from the majority's"
            ),
            Err(error) => {
                tracing::error!(member, index, %error, "corrupt cluster: a member could not be fenced; tried again")
            }
        }
        self.node.refresh_alarms();
    }

    async fn start_digest(&self) {
        if self.cluster_version() < kv::DIGESTS_SINCE {
            return;
        }
        let request = command::Request::StartDigest(StartDigest {});
        match self.node.propose(&Caller::Internal, Command::new(kv::DIGESTS_SINCE, request)).await {
            Ok(_) => tracing::info!("members' digests are begun anew, for one was not known"),
            Err(error) => tracing::debug!(%error, "digests were not begun anew; tried again"),
        }
    }
}

fn names(ids: &BTreeSet<u64>) -> String {
    let ids: Vec<String> = ids.iter().map(|id| format!("member {id:x} (slot {})", super::slot_of(*id))).collect();
    ids.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn only_who_differs_from_a_majority_of_all_voters_is_named() {
        let three = [set(&[1, 2, 3])];
        type Case<'a> = (&'a [BTreeSet<u64>], &'a [(u64, u64)], Verdict);
        let undecided = |groups: &[&[u64]]| Verdict::Undecided(groups.iter().map(|g| g.to_vec()).collect());
        let joint = [set(&[1, 2, 3]), set(&[1, 4, 5])];
        let cases: [Case<'_>; 11] = [
            (&three, &[(1, 7), (2, 7), (3, 7)], Verdict::Same),
            (&three, &[], Verdict::Same),
            (&three, &[(3, 9)], Verdict::Same),
            (&three, &[(1, 7), (2, 7), (3, 9)], Verdict::Differ(set(&[3]))),
            // The leader may be the odd one.
            (&three, &[(1, 9), (2, 7), (3, 7)], Verdict::Differ(set(&[1]))),
            (&three, &[(1, 7), (2, 8), (3, 9)], undecided(&[&[1], &[2], &[3]])),
            // One of three is away, or makes no digest.
            (&three, &[(1, 7), (2, 9)], undecided(&[&[1], &[2]])),
            (&[set(&[1, 2])], &[(1, 7), (2, 9)], undecided(&[&[1], &[2]])),
            // A learner has no say, and can be wrong.
            (&[set(&[1])], &[(1, 7), (2, 9), (3, 9)], Verdict::Differ(set(&[2, 3]))),
            (&joint, &[(1, 7), (2, 7), (3, 9), (4, 7), (5, 7)], Verdict::Differ(set(&[3]))),
            // A majority of the one configuration is not enough.
            (&joint, &[(1, 7), (2, 7), (3, 7), (4, 9), (5, 9)], undecided(&[&[1, 2, 3], &[4, 5]])),
        ];
        for (configs, digests, expected) in cases {
            assert_eq!(judge(configs, &digests.iter().copied().collect()), expected, "{configs:?} {digests:?}");
        }
    }
}
