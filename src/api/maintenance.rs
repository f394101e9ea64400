//! `etcdserverpb.Maintenance`.

use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use super::{
    Api, ETCD_CLUSTER_MINOR, ETCD_CLUSTER_VERSION, ETCD_VERSION, VERSION, client, header, header_now, snapshot,
};
use crate::caller::Caller;
use crate::conditions;
use crate::env::Pool;
use crate::error::Error;
use crate::kv::{self, Wants};
use crate::node::Node;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::downgrade_request::DowngradeAction;
use crate::pb::etcd::maintenance_server::Maintenance;
use crate::pb::etcd::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo,
    DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest,
    MoveLeaderResponse, ResponseHeader, SnapshotRequest, StatusRequest, StatusResponse,
};
use crate::pb::log::{Command, answer, command};

/// A rewrite writes all state and syncs it; a disk that needs longer needs attention.
const DEFRAGMENT_PATIENCE: Duration = Duration::from_secs(600);

#[tonic::async_trait]
impl Maintenance for Api {
    /// An alarm that follows from a member's own space clears by itself when the cause is gone: to disarm it changes nothing,
    /// and the answer still has it.
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let node = self.node(&request)?;
        let caller = match request.get_ref().action() {
            AlarmAction::Get => self.any_user(&request).await?,
            AlarmAction::Activate | AlarmAction::Deactivate => self.root(&node, &request).await?,
        };
        let alarm = request.into_inner();
        let mut changed = Vec::new();
        if alarm.action() != AlarmAction::Get && alarm.alarm() != AlarmType::None {
            changed = change_alarm(&node, &caller, alarm).await?;
        }
        // Linearizable, as in etcd: what was changed through the leader may not have been applied here yet. A fenced member is no
        // longer served by the leader; it shows what it has, or nobody could see the alarm through it.
        match node.read_index().await {
            Ok(()) | Err(Error::Corrupt) => {}
            Err(error) => return Err(error.into()),
        }
        let on = node.alarms_told();
        let alarms = match alarm.action() {
            AlarmAction::Activate => changed,
            AlarmAction::Deactivate => {
                let still = on.into_iter().filter(|on| (on.member_id, on.alarm) == (alarm.member_id, alarm.alarm));
                changed.into_iter().chain(still).collect()
            }
            AlarmAction::Get => {
                on.into_iter().filter(|on| alarm.alarm() == AlarmType::None || alarm.alarm == on.alarm).collect()
            }
        };
        Ok(Response::new(AlarmResponse { header: header_now(&node), alarms }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.any_user(&request).await?;
        let facts = self.facts();
        // What should be known and is no error (one voter, as it was asked for) is not among the errors.
        let conditions = self.conditions().list().into_iter().filter(conditions::is_wrong);
        let mut errors: Vec<String> = conditions.map(|condition| conditions::line(&condition)).collect();
        let waits = self.not_ready();
        let answer = match self.any_node() {
            Ok(node) => node_status(&node, self.shared.quota_bytes, errors),
            Err(_) => StatusResponse {
                header: Some(ResponseHeader {
                    cluster_id: facts.cluster_id,
                    member_id: facts.member_id,
                    ..ResponseHeader::default()
                }),
                version: ETCD_VERSION.into(),
                errors: {
                    errors.splice(0..0, waits.clone());
                    errors
                },
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
        if let Ok(waits) = MetadataValue::try_from(waits.unwrap_or_default()) {
            metadata.insert("quorate-waits", waits);
        }
        Ok(response)
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let node = self.any_node()?.on_behalf_of(client(&request));
        let caller = self.root(&node, &request).await?;
        let revision = request.into_inner().revision;
        let view = node.view(&caller, Wants::Root)?;
        let work = move || (view.hash_kv(revision), view.revision());
        let (hash, now) = node.long(Pool::Backups, work).await?;
        let hash = hash?;
        Ok(Response::new(HashKvResponse {
            header: header(&node, now),
            hash: hash.hash,
            // As etcd has it before the first compaction.
            compact_revision: if hash.compact_revision == 0 { -1 } else { hash.compact_revision },
            hash_revision: hash.hash_revision,
        }))
    }

    /// Of the whole state at the newest revision; with us that is [`Self::hash_kv`]'s.
    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let answer = self.hash_kv(request.map(|_| HashKvRequest::default())).await?.into_inner();
        Ok(Response::new(HashResponse { header: answer.header, hash: answer.hash }))
    }

    /// Answers when the state store was written afresh and the old one is gone. Requests go on meanwhile.
    async fn defragment(&self, request: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        let node = self.any_node()?;
        let caller = self.root(&node, &request).await?;
        let needs = node.figures().bytes;
        let free = self.facts().disk_free_bytes;
        if free < needs {
            let text = format!("defragmenting needs {needs} bytes of disk for a while, and {free} are free");
            return Err(Error::Unsupported(text).into());
        }
        node.defragment(&caller, DEFRAGMENT_PATIENCE).await?;
        // Without a header, as etcd.
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    type SnapshotStream = snapshot::Pieces;

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        self.backup(request).await
    }

    /// Only what can be answered without doing anything: which build may follow which is the cluster version's affair.
    async fn downgrade(&self, request: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        let node = self.node(&request)?;
        self.root(&node, &request).await?;
        let downgrade = request.into_inner();
        match downgrade.action() {
            DowngradeAction::Validate => validate_downgrade(&downgrade.version)?,
            DowngradeAction::Cancel => return Err(Error::NoDowngrade.into()),
            DowngradeAction::Enable => {
                let text = "a downgrade needs no preparation: while the cluster version has not risen, the former build can \
                            take over a member's disk";
                return Err(Error::Unsupported(text.into()).into());
            }
        }
        let (header, version) = (header_now(&node), ETCD_CLUSTER_MINOR.into());
        Ok(Response::new(DowngradeResponse { header, version }))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        let node = self.node(&request)?;
        self.root(&node, &request).await?;
        node.transfer_leader(request.into_inner().target_id).await?;
        Ok(Response::new(MoveLeaderResponse { header: header_now(&node) }))
    }
}

/// Carries an alarm through the log; answers what it changed.
async fn change_alarm(node: &Node, caller: &Caller, alarm: AlarmRequest) -> Result<Vec<AlarmMember>, Error> {
    node.wait_version(kv::ALARMS_SINCE, "alarms need").await?;
    let command = Command::new(kv::ALARMS_SINCE, command::Request::Alarm(alarm));
    let answer = node.propose(caller, command).await?;
    node.refresh_alarms();
    match answer.response {
        Some(answer::Response::Alarm(answer)) => Ok(answer.alarms),
        _ => Err(Error::Unsupported("the answer does not fit the request; this is a bug".into())),
    }
}

/// As etcd: the target is `major.minor` or a semantic version, and one minor below.
fn validate_downgrade(target: &str) -> Result<(), Error> {
    let target = minor_of(target).or_else(|| minor_of(&format!("{target}.0"))).ok_or(Error::DowngradeVersionFormat)?;
    let (major, minor) = minor_of(ETCD_VERSION).expect("our own version is one");
    if target == (major, minor - 1) { Ok(()) } else { Err(Error::InvalidDowngradeTarget) }
}

/// Major and minor of a semantic version; what is said of a pre-release and of the build is nothing to them.
fn minor_of(version: &str) -> Option<(u64, u64)> {
    let cut = |text: &'_ str, at: char| text.split_once(at).map(|(before, said)| (before.to_owned(), said.to_owned()));
    let (version, build) = cut(version, '+').unwrap_or((version.to_owned(), String::new()));
    let (numbers, pre_release) = cut(&version, '-').unwrap_or((version, String::new()));
    let is_said = |text: &str| {
        text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
    };
    let is_well_formed = [&pre_release, &build].into_iter().all(|text| text.is_empty() || is_said(text));
    let mut numbers = numbers.split('.').map(|number| number.parse::<u64>().ok());
    let version = (numbers.next()??, numbers.next()??);
    let _patch: u64 = numbers.next()??;
    (is_well_formed && numbers.next().is_none()).then_some(version)
}

/// An alarm as etcd writes it.
fn alarm_text(alarm: &AlarmMember) -> String {
    let kind = format!("alarm:{}", alarm.alarm().as_str_name());
    if alarm.member_id == 0 { kind } else { format!("memberID:{} {kind}", alarm.member_id) }
}

/// Without a quota -1, as etcd shows one that is off: tools and alerts divide by it.
pub(super) fn shown_quota(quota_bytes: u64) -> i64 {
    if quota_bytes == 0 { -1 } else { quota_bytes as i64 }
}

fn node_status(node: &Node, quota_bytes: u64, mut errors: Vec<String>) -> StatusResponse {
    let raft = node.status();
    let bytes = node.figures().bytes as i64;
    let no_leader = raft.leader.is_none().then(|| Error::NoLeader.to_string());
    // As etcd has them, and before what it has no word for.
    errors.splice(0..0, no_leader.into_iter().chain(node.alarms_told().iter().map(alarm_text)));
    StatusResponse {
        header: header_now(node),
        version: ETCD_VERSION.into(),
        db_size: bytes,
        leader: raft.leader.unwrap_or(0),
        raft_index: raft.committed_index,
        raft_term: raft.term,
        raft_applied_index: raft.applied_index,
        errors,
        // What is not in use is given back at once; the state store on disk is no part of either.
        db_size_in_use: bytes,
        is_learner: raft.is_learner,
        storage_version: ETCD_CLUSTER_VERSION.into(),
        db_size_quota: shown_quota(quota_bytes),
        downgrade_info: Some(DowngradeInfo::default()),
    }
}
