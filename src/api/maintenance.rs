//! `etcdserverpb.Maintenance`, as far as it is served.

use std::sync::atomic::Ordering;

use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use super::{Api, ETCD_VERSION, VERSION, header, header_now};
use crate::error::Error;
use crate::node::Node;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::maintenance_server::Maintenance;
use crate::pb::etcd::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DowngradeInfo, HashKvRequest, HashKvResponse,
    MoveLeaderRequest, MoveLeaderResponse, ResponseHeader, StatusRequest, StatusResponse,
};

fn alarms(node: &Node) -> Vec<AlarmMember> {
    if !node.space().exceeded.load(Ordering::Relaxed) {
        return Vec::new();
    }
    vec![AlarmMember { member_id: node.member().member_id, alarm: AlarmType::Nospace.into() }]
}

#[tonic::async_trait]
impl Maintenance for Api {
    /// Alarms clear by themselves when their cause is gone: disarming changes nothing and answers those still on.
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let node = self.any_node()?;
        let alarm = request.into_inner();
        if alarm.action() == AlarmAction::Activate {
            return Err(Error::Unsupported("alarms follow from the state; they cannot be set by hand".into()).into());
        }
        let alarms = alarms(&node)
            .into_iter()
            .filter(|on| alarm.alarm() == AlarmType::None || alarm.alarm == on.alarm)
            .collect();
        Ok(Response::new(AlarmResponse { header: header_now(&node), alarms }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let facts = self.facts();
        let answer = match self.any_node() {
            Ok(node) => node_status(&node, self.shared.quota_bytes, facts.notes.clone()),
            Err(_) => StatusResponse {
                header: Some(ResponseHeader {
                    cluster_id: facts.cluster_id,
                    member_id: facts.member_id,
                    ..ResponseHeader::default()
                }),
                version: ETCD_VERSION.into(),
                errors: facts.notes.clone(),
                ..StatusResponse::default()
            },
        };
        let mut response = Response::new(answer);
        let metadata = response.metadata_mut();
        metadata.insert("quorate-version", MetadataValue::from_static(VERSION));
        metadata.insert("quorate-disk-free-bytes", facts.disk_free_bytes.into());
        if let Some(slot) = facts.slot {
            metadata.insert("quorate-slot", slot.into());
        }
        if let Ok(notes) = MetadataValue::try_from(facts.notes.join("; ")) {
            metadata.insert("quorate-waits", notes);
        }
        Ok(response)
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let node = self.any_node()?;
        let revision = request.into_inner().revision;
        let view = node.store().view();
        let env = node.env().clone();
        let (hash, now) = env.blocking(move || (view.kv.hash_kv(revision), view.kv.revision())).await;
        let hash = hash?;
        Ok(Response::new(HashKvResponse {
            header: header(&node, now),
            hash: hash.hash,
            compact_revision: hash.compact_revision,
            hash_revision: hash.hash_revision,
        }))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        let node = self.node(&request)?;
        node.transfer_leader(request.into_inner().target_id).await?;
        Ok(Response::new(MoveLeaderResponse { header: header_now(&node) }))
    }
}

fn node_status(node: &Node, quota_bytes: u64, mut errors: Vec<String>) -> StatusResponse {
    let raft = node.status();
    let (bytes, in_use) = node.store().read(|s| (s.kv.bytes(), s.kv.bytes_in_use()));
    if raft.leader.is_none() {
        // First, where etcd's own tools look for it.
        errors.insert(0, Error::NoLeader.to_string());
    }
    StatusResponse {
        header: header_now(node),
        version: ETCD_VERSION.into(),
        db_size: bytes as i64,
        leader: raft.leader.unwrap_or(0),
        raft_index: raft.committed_index,
        raft_term: raft.term,
        raft_applied_index: raft.applied_index,
        errors,
        db_size_in_use: in_use as i64,
        is_learner: raft.is_learner,
        storage_version: "3.6.0".into(),
        db_size_quota: quota_bytes as i64,
        downgrade_info: Some(DowngradeInfo::default()),
    }
}
