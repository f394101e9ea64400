//! What a fenced member still does (alarm CORRUPT): its log is sound, its state is not.
//!
//! It takes entries and votes like any other. It leads only if no voter can that is sound and has as much of the log, for the alarm
//! may be wrong, or on for all of them, and without a leader nobody could take it off. As soon as there is a sound voter that keeps up,
//! it hands over to that one. Every member runs this, the loop that follows the alarms of this member alone.
//! Invariants: while a sound voter is reached that could lead, this member asks for no votes, for `LEFT_TO_OTHERS` at least.
//! Absent: what it refuses meanwhile: data, backups and snapshots (`api`, `raft/network`); who is fenced (`audit`, `kv/alarm`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use crate::caller::Caller;
use crate::env::{Instant, interval};
use crate::error::Error;
use crate::kv;
use crate::node::{Node, Status, Trust};
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::{AlarmRequest, AlarmType};
use crate::pb::log::{Command, command};
use crate::raft::Peers;

const TICK: Duration = Duration::from_millis(250);
/// Of the longest election timeout: so long the others may take to elect somebody, before this member asks who is there.
const PATIENCE: u32 = 3;
/// As `PATIENCE`, though sound voters are reached: they have had their chance, and something else keeps them from leading.
const LEFT_TO_OTHERS: u32 = 12;

/// See the module's head.
pub struct Fence {
    node: Node,
    peers: Arc<Peers>,
    /// The longest that an election takes.
    election: Duration,
}

impl Fence {
    pub fn new(node: Node, peers: Arc<Peers>, election: Duration) -> Self {
        Self { node, peers, election }
    }

    /// Works until shutdown.
    pub async fn run(self) {
        let shutdown = self.node.env().shutdown.clone();
        let mut tick = interval(TICK);
        let mut lost_at = None;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let step = async {
                let status = self.node.status();
                if status.is_leader {
                    self.drop_stale_alarms(&status).await;
                }
                if self.node.trust() == Trust::Fenced {
                    self.step(&status, &mut lost_at).await;
                } else {
                    lost_at = None;
                }
            };
            tokio::select! {
                () = step => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn step(&self, status: &Status, lost_at: &mut Option<Instant>) {
        if status.is_leader {
            *lost_at = None;
            return self.hand_over(status).await;
        }
        let elections = self.node.raft().runtime_config();
        if status.leader.is_some() {
            *lost_at = None;
            elections.elect(false);
            return;
        }
        let silence = lost_at.get_or_insert_with(Instant::now).elapsed();
        if silence >= LEFT_TO_OTHERS * self.election
            || silence >= PATIENCE * self.election && !self.is_heir_reached(status).await
        {
            elections.elect(true);
        }
    }

    /// The voters but this one that are not fenced.
    fn sound_voters(&self, status: &Status) -> BTreeSet<u64> {
        let this = self.node.member().member_id;
        status.membership.voter_ids().filter(|id| *id != this && !self.node.is_fenced(*id)).collect()
    }

    /// Whether a sound voter answers that has as much of the log as this member.
    async fn is_heir_reached(&self, status: &Status) -> bool {
        let cluster_id = self.node.member().cluster_id;
        let sound = self.sound_voters(status);
        let asks =
            sound.iter().filter_map(|id| Some((*id, status.membership.get_node(id)?))).map(|(id, node)| async move {
                let nonce = self.node.env().random_u64();
                let Ok(who) = self.peers.who(&node.peer_address, nonce).await else { return false };
                let is_itself = who.nonce == nonce && who.member_id == id && who.cluster_id == cluster_id;
                is_itself && who.last_log_index >= status.last_log_index
            });
        join_all(asks).await.into_iter().any(|is_heir| is_heir)
    }

    /// A leader that is fenced lets another one lead.
    async fn hand_over(&self, status: &Status) {
        let heard = |id: &u64| status.acked.get(id).copied().flatten().is_some_and(|age| age < Duration::from_secs(1));
        let matched = |id: &u64| status.matched.iter().find(|(member, _)| member == id).and_then(|(_, index)| *index);
        let Some(heir) = self.sound_voters(status).into_iter().filter(heard).max_by_key(matched) else { return };
        let handed = self.node.transfer_leader(heir).await;
        tracing::warn!(peer = format!("{heir:x}"), ok = handed.is_ok(), "a fenced leader hands over");
    }

    /// Alarms of members that have left go by themselves from [`kv::FENCES_SINCE`] on.
    async fn drop_stale_alarms(&self, status: &Status) {
        let (version, alarms) = self.node.store().read(|s| (s.kv.cluster_version(), s.kv.alarms()));
        if !status.membership_committed || version >= kv::FENCES_SINCE {
            return;
        }
        for alarm in alarms.iter().filter(|alarm| alarm.alarm() == AlarmType::Corrupt && alarm.member_id != 0) {
            if status.membership.get_node(&alarm.member_id).is_none()
                && set_corrupt(&self.node, alarm.member_id, AlarmAction::Deactivate).await.is_ok()
            {
                tracing::info!(
                    member = format!("{:x}", alarm.member_id),
                    "alarm CORRUPT of a member that has left is off"
                );
            }
        }
    }
}

/// Puts alarm CORRUPT on for a member, or takes it off.
pub(super) async fn set_corrupt(node: &Node, member_id: u64, action: AlarmAction) -> Result<(), Error> {
    if node.store().read(|s| s.kv.cluster_version()) < kv::ALARMS_SINCE {
        return Err(Error::Unsupported(format!("an alarm needs cluster version {}", kv::ALARMS_SINCE)));
    }
    let alarm = AlarmRequest { action: action.into(), member_id, alarm: AlarmType::Corrupt.into() };
    let command = Command::new(kv::ALARMS_SINCE, command::Request::Alarm(alarm));
    node.propose(&Caller::Internal, command).await.map(drop)
}
