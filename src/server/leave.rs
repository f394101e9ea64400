//! What SIGTERM means for a member: it is to be removed, or it comes back, or all stop (membership rules 15-17, 20, 27).
//!
//! | this member | it |
//! |---|---|
//! | is condemned: its slot is not wanted any more | keeps voting until its removal is committed |
//! | restarts, or nobody can say | waits until the others hold a quorum without it |
//! | was refused by the Kubernetes API, which knew it before: an uninstall | waits for the same, but for moments |
//! | is a reader | has the leader remove it |
//! | is the only voter, or no pod is wanted, or all are uninstalled | goes at once |
//!
//! Invariants: a stop alone removes no voter; every wait is bounded by `server.grace_period`.
//! Absent: handing over leadership and draining clients, which follow (`member`).

use std::time::Duration;

use futures_util::future::join_all;

use super::Server;
use super::member::Life;
use crate::cluster::{Wanted, leaderless, peers, reconcile};
use crate::env::{Instant, sleep, timeout};
use crate::pb::admin::MembershipView;
use crate::pb::log::node::Kind;
use crate::pb::peer::manage_request::Operation;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// What the Kubernetes API has to say whether this pod is wanted.
const API_PATIENCE: Duration = Duration::from_secs(2);
/// How long who is uninstalled waits for the others, which may be gone: enough to see that they are not, should it be none.
const UNINSTALL_WAIT: Duration = Duration::from_secs(3);
/// What the leader has to remove a reader; later it is removed for its silence.
const READER_PATIENCE: Duration = Duration::from_secs(3);
/// For stopping Raft and the tasks, after the clients' requests have ended.
const STOP_TIME: Duration = Duration::from_secs(3);

/// Why this member was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Condemned,
    Restart,
    /// What this pod asks with was taken away; the others stop too, it seems.
    Uninstalled,
    /// All stop.
    Shutdown,
}

impl Server {
    /// Waits for as long as this member is still needed.
    pub(super) async fn leave(&self, life: &Life) {
        let begun = Instant::now();
        let deadline =
            begun + self.config.server.grace_period.saturating_sub(self.config.server.request_timeout + STOP_TIME);
        let status = life.node.status();
        let this = life.node.member().member_id;
        let kind = status.membership.get_node(&this).map(|node| node.kind());
        if kind == Some(Kind::Reader) {
            let removed = timeout(READER_PATIENCE, life.manager.manage(Operation::Leaving(this))).await;
            tracing::info!(removed = matches!(removed, Ok(Ok(_))), "a reader leaves");
            return;
        }
        if status.is_learner || status.membership.voter_ids().all(|id| id == this) {
            return;
        }
        let fate = self.fate(life).await;
        tracing::info!(?fate, "stopping");
        tokio::select! {
            () = async {
                match fate {
                    Fate::Condemned => self.wait_removed(life, deadline).await,
                    Fate::Restart => self.wait_others(life, deadline.min(begun + self.config.server.quorum_wait)).await,
                    Fate::Uninstalled => {
                        let wait = self.config.server.quorum_wait.min(UNINSTALL_WAIT);
                        self.wait_others(life, deadline.min(begun + wait)).await;
                    }
                    Fate::Shutdown => {}
                }
            } => {}
            reason = life.node.failed() => tracing::error!(reason, "raft has failed"),
        }
        tracing::info!(?fate, waited = ?begun.elapsed(), "leaves");
    }

    /// Asks who knows, as of now. No answer is a restart: to remove itself at every stop has shrunk clusters.
    async fn fate(&self, life: &Life) -> Fate {
        let slot = u64::from(self.this.slot);
        let kind = life.node.status().membership.get_node(&life.node.member().member_id).map(|node| node.kind());
        if kind != Some(Kind::Slot) {
            return Fate::Restart;
        }
        if let Some(watch) = &self.wanted {
            match watch.fresh(API_PATIENCE).await {
                Wanted::Slots { slots, .. } if slots.contains(&slot) => return Fate::Restart,
                Wanted::Slots { .. } => return Fate::Condemned,
                Wanted::Shutdown => return Fate::Shutdown,
                Wanted::Unknown(_) if watch.source().is_withdrawn() => return Fate::Uninstalled,
                Wanted::Unknown(_) => {}
            }
        }
        let view = life.manager.view().await;
        // What is wanted now, not what the leader's last plan saw.
        let wanted = view.wanted.unwrap_or_default();
        match (&wanted.origin[..], wanted.replicas) {
            ("none" | "", _) => Fate::Restart,
            _ if !wanted.unknown.is_empty() => Fate::Restart,
            (_, 0) => Fate::Shutdown,
            (_, replicas) if (wanted.start..wanted.start.saturating_add(replicas)).contains(&slot) => Fate::Restart,
            _ => Fate::Condemned,
        }
    }

    async fn wait_removed(&self, life: &Life, deadline: Instant) {
        let this = life.node.member();
        // The leader may have read an older size.
        let _ = timeout(API_PATIENCE, life.manager.manage(Operation::Leaving(this.member_id))).await;
        loop {
            let members = reconcile::members(&life.node.status());
            let ids = (this.cluster_id, this.member_id);
            let committed = life.node.status().committed_membership.get_node(&this.member_id).is_none();
            if committed || leaderless::is_removed(&life.env, &self.peers, ids, &members, self.places.patience).await {
                tracing::info!("removed from the cluster");
                return;
            }
            if Instant::now() >= deadline {
                let all = members.voters().len();
                tracing::error!(
                    voters = all,
                    "this member is not wanted, and its removal could not be committed: the others lack a quorum; scale back to {all} and then \
                     down again"
                );
                return;
            }
            sleep(LOOK).await;
        }
    }

    async fn wait_others(&self, life: &Life, deadline: Instant) {
        let this = life.node.member().member_id;
        loop {
            if hold_without(&life.manager.view().await, this) && self.others_answer(life).await {
                return;
            }
            if Instant::now() >= deadline {
                tracing::warn!("the others hold no quorum without this member; it stops nevertheless");
                return;
            }
            sleep(LOOK).await;
        }
    }

    /// Whether other voters that are there at this moment are a quorum: who has just died, the leader may not miss yet.
    async fn others_answer(&self, life: &Life) -> bool {
        let (this, status) = (life.node.member().member_id, life.node.status());
        let voters: Vec<u64> = status.membership.voter_ids().collect();
        let asks = voters.iter().filter(|id| **id != this).map(async |id| {
            let Some(node) = status.membership.get_node(id) else { return false };
            let answer = peers::who(&life.env, &self.peers, &node.peer_address, self.places.patience).await;
            answer.is_ok_and(|who| who.member_id == *id)
        });
        let there = join_all(asks).await.into_iter().filter(|there| *there).count();
        there > voters.len() / 2
    }
}

/// Whether the voters other than `id` are a quorum that keeps up, as the leader sees them.
fn hold_without(view: &MembershipView, id: u64) -> bool {
    let voters = || view.members.iter().filter(|member| matches!(&member.role[..], "leader" | "voter"));
    let others = voters().filter(|member| member.id != id && member.caught_up).count();
    view.leader_id != 0 && others > voters().count() / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::admin::Member;

    #[test]
    fn others_hold_a_quorum_only_if_a_leader_sees_them_keep_up() {
        let member = |id: u64, role: &str, caught_up| Member { id, role: role.into(), caught_up, ..Member::default() };
        let view = |third, leader_id| MembershipView {
            leader_id,
            members: vec![
                member(1, "leader", true),
                member(2, "voter", true),
                member(3, "voter", third),
                member(4, "learner", true),
            ],
            ..MembershipView::default()
        };
        assert!(hold_without(&view(true, 1), 1) && hold_without(&view(true, 1), 2));
        assert!(!hold_without(&view(false, 1), 1) && !hold_without(&view(false, 1), 2));
        assert!(hold_without(&view(false, 1), 3), "who does not keep up is not missed");
        assert!(!hold_without(&view(true, 0), 1), "without a leader nobody knows");
    }
}
