//! What `/metrics` reads off a member when somebody looks.

use std::sync::atomic::Ordering;

use super::{Api, maintenance};
use crate::pb::admin::RoleUsage;
use crate::pb::etcd::AlarmType;

/// A member's state in numbers. All 0 while it belongs to no cluster.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub member_id: u64,
    pub has_leader: bool,
    pub is_leader: bool,
    pub is_learner: bool,
    /// -1 without one.
    pub quota_bytes: i64,
    pub data_bytes: u64,
    pub data_in_use_bytes: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub term: u64,
    pub revision: i64,
    pub compacted: i64,
    pub keys: u64,
    pub leases: u64,
    pub voters: u64,
    pub learners: u64,
    pub cluster_version: u32,
    pub disk_free_bytes: u64,
    /// Member and kind of each alarm that is on.
    pub alarms: Vec<(u64, &'static str)>,
    pub alarms_nospace: u64,
    pub alarms_corrupt: u64,
    /// Quotas of roles, and what of them is used.
    pub roles: Vec<RoleUsage>,
    /// Ready as `/readyz` says it.
    pub ready: bool,
}

impl Api {
    /// Takes the state's lock once, for a few reads.
    pub fn sample(&self) -> Sample {
        let facts = self.facts();
        let base = Sample {
            member_id: facts.member_id,
            quota_bytes: maintenance::shown_quota(self.shared.quota_bytes),
            disk_free_bytes: facts.disk_free_bytes,
            ..Sample::default()
        };
        let Ok(node) = self.any_node() else { return base };
        let raft = node.status();
        let alarms = node.alarms_told();
        let alarms_of = |kind: AlarmType| alarms.iter().filter(|alarm| alarm.alarm() == kind).count() as u64;
        let voters = raft.membership.voter_ids().collect::<std::collections::BTreeSet<_>>().len() as u64;
        let members = raft.membership.nodes().count() as u64;
        let figures = node.figures();
        Sample {
            has_leader: raft.leader.is_some(),
            is_leader: raft.is_leader,
            is_learner: raft.is_learner,
            data_bytes: figures.bytes,
            data_in_use_bytes: figures.bytes,
            committed_index: raft.committed_index,
            applied_index: raft.applied_index,
            term: raft.term,
            revision: figures.revision,
            compacted: figures.compacted,
            keys: figures.keys as u64,
            leases: figures.leases as u64,
            voters,
            learners: members.saturating_sub(voters),
            cluster_version: figures.cluster_version,
            alarms: alarms.iter().map(|on| (on.member_id, on.alarm().as_str_name())).collect(),
            alarms_nospace: alarms_of(AlarmType::Nospace),
            alarms_corrupt: alarms_of(AlarmType::Corrupt),
            roles: node.role_usage(),
            ready: raft.leader.is_some() && self.shared.ready.load(Ordering::Acquire),
            ..base
        }
    }
}
