//! The leader's hand on the membership: observes, plans, carries out one change, and observes again.
//!
//! Every member runs one; it works while its member leads. Who asks to join is answered at its desk (`join`). Nothing is remembered that a new
//! leader would need: durations start anew, and the plan is computed from what is seen (`plan`).
//! Invariants: a change names the membership it was planned on, so that two leaders cannot both apply theirs.
//! Absent: the wanted size (nothing is condemned yet).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;

use super::formation::Expand;
use super::join::{Desk, Standing};
use super::peers::{self, Unreachable};
use super::plan::{Change, Health, Ids, Limits, Members, Observed, Plan, plan};
use super::slot_of;
use crate::env::{Instant, interval};
use crate::kv;
use crate::node::{MembershipChange, Node, Status};
use crate::pb::log::{Command, SetClusterVersion, StoredMembership, command};
use crate::pb::peer::{JoinRequest, JoinResponse, WhoResponse};
use crate::raft::{Peers, log_id_from_pb, log_id_to_pb, membership_to_pb};

const TICK: Duration = Duration::from_millis(250);
const WHO_PATIENCE: Duration = Duration::from_millis(500);
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// A follower keeps up if its log lacks no more than what is normally in flight.
const CAUGHT_UP_ENTRIES: u64 = 64;

#[derive(Clone)]
pub struct Settings {
    /// The address of a slot; `None` without a peer pattern.
    pub expand: Option<Expand>,
    pub max_voters: usize,
    pub failure_timeout: Duration,
    pub promote_after: Duration,
}

/// See the module's head.
pub struct Reconciler {
    node: Node,
    peers: Arc<Peers>,
    settings: Settings,
    desk: Desk,
    blocked: Mutex<Option<String>>,
}

/// What the leader has seen of one member since it leads.
struct Seen {
    last_sign: Instant,
    caught_up_since: Option<Instant>,
}

impl Reconciler {
    pub fn new(node: Node, peers: Arc<Peers>, settings: Settings) -> Arc<Self> {
        Arc::new(Self { node, peers, settings, desk: Desk::default(), blocked: Mutex::default() })
    }

    /// Why a wanted change is not made; `None` if none is wanted or it is under way.
    pub fn blocked(&self) -> Option<String> {
        self.blocked.lock().clone()
    }

    /// Handler of `Join`.
    pub fn join(&self, request: JoinRequest) -> JoinResponse {
        let status = self.node.status();
        let leader = status.leader.and_then(|id| status.membership.get_node(&id));
        let members = if status.membership_committed { members(&status) } else { Members::default() };
        self.desk.answer(
            request,
            &Standing {
                cluster_id: self.node.member().cluster_id,
                leads: status.is_leader,
                leader_address: leader.map(|node| node.peer_address.clone()).unwrap_or_default(),
                members: &members,
                blocked: self.blocked(),
            },
        )
    }

    /// Works while this member leads, until shutdown.
    pub async fn run(self: Arc<Self>) {
        let shutdown = self.node.env().shutdown.clone();
        let mut tick = interval(TICK);
        let mut seen = BTreeMap::new();
        let mut term = None;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.desk.asked().notified() => {}
                () = shutdown.cancelled() => return,
            }
            let status = self.node.status();
            if !status.is_leader {
                term = None;
                *self.blocked.lock() = None;
                self.node.space().quorum_low_disk.store(false, Ordering::Relaxed);
                continue;
            }
            if term.replace(status.term) != Some(status.term) {
                seen.clear();
            }
            tokio::select! {
                () = self.step(&status, &mut seen) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn step(&self, status: &Status, seen: &mut BTreeMap<u64, Seen>) {
        let observed = self.observe(status, seen).await;
        match plan(&observed) {
            Plan::Nothing => self.set_blocked(None),
            Plan::Blocked(reason) => self.set_blocked(Some(reason.to_string())),
            Plan::Change(change) => {
                tracing::info!(?change, term = status.term, "membership change");
                let result = self.execute(&observed, change).await;
                if let Err(error) = &result {
                    tracing::warn!(error, "membership change failed; it is planned anew");
                }
                self.set_blocked(result.err());
            }
        }
        self.raise_cluster_version(status).await;
    }

    fn set_blocked(&self, reason: Option<String>) {
        let mut blocked = self.blocked.lock();
        if *blocked != reason {
            if let Some(reason) = &reason {
                tracing::info!(reason, "no membership change now");
            }
            *blocked = reason;
        }
    }

    async fn observe(&self, status: &Status, seen: &mut BTreeMap<u64, Seen>) -> Observed {
        let membership = members(status);
        let env = self.node.env();
        if let Some(expand) = &self.settings.expand {
            self.desk.dial(env, &self.peers, expand, WHO_PATIENCE).await;
        }
        let joiners = self.desk.joiners();
        let mut addresses: BTreeMap<String, ()> =
            membership.nodes.values().map(|node| (node.peer_address.clone(), ())).collect();
        let slots: BTreeSet<u64> =
            membership.nodes.keys().chain(joiners.iter().map(|j| &j.member_id)).map(|id| slot_of(*id)).collect();
        if let Some(expand) = &self.settings.expand {
            addresses.extend(slots.iter().map(|slot| (expand(*slot), ())));
        }
        let asks = addresses.into_keys().map(|address| async move {
            let answer = peers::who(env, &self.peers, &address, WHO_PATIENCE).await;
            (address, answer)
        });
        let answers: BTreeMap<String, Result<WhoResponse, Unreachable>> = join_all(asks).await.into_iter().collect();
        self.note_space(&membership, &answers);
        let health = self.health(status, &membership, &answers, seen);
        let at =
            |slot: u64| -> Option<&WhoResponse> { answers.get(&self.settings.expand.as_ref()?(slot))?.as_ref().ok() };
        Observed {
            leader: self.node.member().member_id,
            committed_in_term: status.committed_term == status.term,
            in_flight: !status.membership_committed,
            health,
            slots: slots.iter().filter_map(|slot| Some((*slot, at(*slot)?.member_id))).collect(),
            joiners,
            membership,
            wanted: None,
            limits: Limits {
                max_voters: self.settings.max_voters,
                failure_timeout: self.settings.failure_timeout,
                stable_for: self.settings.promote_after,
                reader_ttl: None,
            },
        }
    }

    fn health(
        &self,
        status: &Status,
        membership: &Members,
        answers: &BTreeMap<String, Result<WhoResponse, Unreachable>>,
        seen: &mut BTreeMap<u64, Seen>,
    ) -> BTreeMap<u64, Health> {
        let now = Instant::now();
        let mut health = BTreeMap::new();
        for (id, node) in &membership.nodes {
            let answer = answers.get(&node.peer_address).and_then(|a| a.as_ref().ok());
            let own = answer.filter(|who| who.member_id == *id);
            let acked = status.acked.get(id).copied().flatten();
            let matched = status.matched.iter().find(|(member, _)| member == id).and_then(|(_, index)| *index);
            let lag_entries = status.last_log_index.saturating_sub(matched.unwrap_or(0));
            let entry = seen.entry(*id).or_insert(Seen { last_sign: now, caught_up_since: None });
            let reachable = acked.is_some_and(|age| age < self.settings.failure_timeout.min(Duration::from_secs(2)));
            if let Some(age) = acked {
                entry.last_sign = entry.last_sign.max(now - age);
            }
            let keeps_up = reachable && matched.is_some() && lag_entries <= CAUGHT_UP_ENTRIES;
            entry.caught_up_since = match entry.caught_up_since {
                // Under load a follower is always a little behind: it has kept up until it falls far behind.
                Some(since) if reachable && lag_entries <= 16 * CAUGHT_UP_ENTRIES => Some(since),
                _ if keeps_up => Some(now),
                _ => None,
            };
            health.insert(
                *id,
                Health {
                    reachable,
                    silent_for: now - entry.last_sign,
                    caught_up_for: entry.caught_up_since.map(|since| now - since),
                    lag_entries,
                    address_answers: answer.map(|who| who.member_id),
                    announces: own.and_then(|who| who.node.clone()),
                },
            );
        }
        seen.retain(|id, _| membership.nodes.contains_key(id));
        health
    }

    /// Puts are refused before proposing when the voters that have disk left are no quorum.
    fn note_space(&self, membership: &Members, answers: &BTreeMap<String, Result<WhoResponse, Unreachable>>) {
        let this = self.node.member().member_id;
        let own_low = self.node.space().low_disk.load(Ordering::Relaxed);
        let is_low = |id: &u64| {
            if *id == this {
                return own_low;
            }
            let answer = membership.nodes.get(id).and_then(|node| answers.get(&node.peer_address));
            answer.and_then(|a| a.as_ref().ok()).is_some_and(|who| who.member_id == *id && who.low_space)
        };
        let lacking = membership.configs.iter().any(|voters: &Ids| {
            let low = voters.iter().filter(|id| is_low(id)).count();
            voters.len() - low < voters.len() / 2 + 1
        });
        self.node.space().quorum_low_disk.store(lacking, Ordering::Relaxed);
    }

    async fn execute(&self, observed: &Observed, change: Change) -> Result<(), String> {
        let mut request = MembershipChange {
            expected: observed.membership.log_id.map(log_id_from_pb),
            patience: CHANGE_PATIENCE,
            ..MembershipChange::default()
        };
        match &change {
            Change::TransferLeader { to } => return self.node.transfer_leader(*to).await.map_err(|e| e.to_string()),
            Change::AddLearner { id, node } => request.add_learners.push((*id, node.clone())),
            Change::UpdateNode { id, node } => request.set_nodes.push((*id, node.clone())),
            Change::RemoveLearners { ids } => request.remove_learners = ids.clone(),
            _ => {
                let (voters, retain) =
                    change.voters_after(&observed.membership).expect("every other change is about voters");
                (request.voters, request.retain) = (Some(voters), retain);
            }
        }
        self.node.change_membership(request).await
    }

    /// Rule 29: the cluster version is the least that all members know, raised by the leader.
    async fn raise_cluster_version(&self, status: &Status) {
        let known = status.membership.nodes().map(|(_, node)| node.apply_version).min().unwrap_or(0);
        let version = known.min(kv::APPLY_VERSION);
        if version <= self.node.store().read(|s| s.kv.cluster_version()) {
            return;
        }
        let request = command::Request::SetClusterVersion(SetClusterVersion { version });
        match self.node.propose(Command { needs: kv::CLUSTER_VERSION_MIN, request: Some(request) }).await {
            Ok(_) => tracing::info!(version, "cluster version raised"),
            Err(error) => tracing::warn!(%error, "cluster version not raised; tried again"),
        }
    }
}

/// The newest membership that this member knows, in the form that planning wants.
pub fn members(status: &Status) -> Members {
    Members::from(&StoredMembership {
        log_id: status.membership.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(status.membership.membership())),
    })
}
