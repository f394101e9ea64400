//! What a request says that goes into the audit log: keys, names and sizes; never a value, a password or a token.
//!
//! Invariant: every request has a form here, so a new method's must be chosen. Absent: which calls are written down (`server/meter`).

use bytes::Bytes;
use prost::Message as _;
use tonic::{Request, Streaming};

use crate::pb::admin::{
    DiagnoseRequest, MembershipRequest, PromoteRequest, RoleQuotasRequest, ScaleRequest, SetRoleQuotaRequest,
};
use crate::pb::election::{CampaignRequest, LeaderKey, LeaderRequest, ProclaimRequest, ResignRequest};
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{
    AlarmRequest, AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest,
    AuthRoleGrantPermissionRequest, AuthRoleListRequest, AuthRoleRevokePermissionRequest, AuthStatusRequest,
    AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthUserRevokeRoleRequest, AuthenticateRequest, CompactionRequest,
    DefragmentRequest, DeleteRangeRequest, DowngradeRequest, HashKvRequest, HashRequest, LeaseGrantRequest,
    LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberAddRequest,
    MemberListRequest, MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest, MoveLeaderRequest, PutRequest,
    RangeRequest, RequestOp, SnapshotRequest, StatusRequest, TxnRequest, WatchRequest,
};
use crate::pb::lock::{LockRequest, UnlockRequest};
use crate::telemetry::audit::{Entry, What};

/// A request, as it is written down.
pub(super) trait Audited {
    fn what(&self) -> What;
}

/// Notes what `request` asks for, if its call is written down.
pub(super) fn note<T: Audited>(request: &Request<T>) {
    if let Some(entry) = entry(request) {
        entry.note(request.get_ref().what());
    }
}

/// The entry of a call, if it is written down.
pub(super) fn entry<T>(request: &Request<T>) -> Option<&Entry> {
    request.extensions().get::<Entry>()
}

fn key(key: &Bytes) -> What {
    What { key: Some(key.clone()), ..What::default() }
}

fn range(start: &Bytes, range_end: &Bytes) -> What {
    What { range_end: Some(range_end.clone()).filter(|end| !end.is_empty()), ..key(start) }
}

fn target(text: impl Into<String>) -> What {
    What { target: Some(text.into()), ..What::default() }
}

fn id(id: u64) -> What {
    target(format!("{id:x}"))
}

macro_rules! audited {
    ($($request:ty: |$r:ident| $what:expr;)+) => {
        $(impl Audited for $request {
            fn what(&self) -> What {
                let $r = self;
                $what
            }
        })+
    };
}

audited! {
    RangeRequest: |r| range(&r.key, &r.range_end);
    PutRequest: |r| What { bytes: Some(r.encoded_len()), ..key(&r.key) };
    DeleteRangeRequest: |r| range(&r.key, &r.range_end);
    TxnRequest: |r| txn(r);
    CompactionRequest: |r| target(r.revision.to_string());
    LeaseGrantRequest: |r| id(r.id as u64);
    LeaseRevokeRequest: |r| id(r.id as u64);
    LeaseTimeToLiveRequest: |r| id(r.id as u64);
    LockRequest: |r| key(&r.name);
    UnlockRequest: |r| key(&r.key);
    CampaignRequest: |r| key(&r.name);
    LeaderRequest: |r| key(&r.name);
    ProclaimRequest: |r| leader(r.leader.as_ref());
    ResignRequest: |r| leader(r.leader.as_ref());
    AuthUserAddRequest: |r| target(&*r.name);
    AuthUserGetRequest: |r| target(&*r.name);
    AuthUserDeleteRequest: |r| target(&*r.name);
    AuthUserChangePasswordRequest: |r| target(&*r.name);
    AuthUserGrantRoleRequest: |r| target(format!("{} {}", r.user, r.role));
    AuthUserRevokeRoleRequest: |r| target(format!("{} {}", r.name, r.role));
    AuthRoleAddRequest: |r| target(&*r.name);
    AuthRoleGetRequest: |r| target(&*r.role);
    AuthRoleDeleteRequest: |r| target(&*r.role);
    AuthRoleGrantPermissionRequest: |r| {
        let what = r.perm.as_ref().map(|perm| range(&perm.key, &perm.range_end)).unwrap_or_default();
        What { target: Some(r.name.clone()), ..what }
    };
    AuthRoleRevokePermissionRequest: |r| What { target: Some(r.role.clone()), ..range(&r.key, &r.range_end) };
    AuthenticateRequest: |r| target(&*r.name);
    AlarmRequest: |r| target(format!("{} {:x}", r.alarm().as_str_name(), r.member_id));
    MemberAddRequest: |r| target(r.peer_ur_ls.join(","));
    MemberRemoveRequest: |r| id(r.id);
    MemberUpdateRequest: |r| target(format!("{:x} {}", r.id, r.peer_ur_ls.join(",")));
    MemberPromoteRequest: |r| id(r.id);
    MoveLeaderRequest: |r| id(r.target_id);
    DowngradeRequest: |r| target(&*r.version);
    ScaleRequest: |r| target(r.replicas.to_string());
    SetRoleQuotaRequest: |r| target(&*r.role);
    PromoteRequest: |r| target(format!("{r:?}"));
    // Whole, or by what comes later.
    DiagnoseRequest: |_r| What::default();
    RoleQuotasRequest: |_r| What::default();
    AuthEnableRequest: |_r| What::default();
    AuthDisableRequest: |_r| What::default();
    AuthStatusRequest: |_r| What::default();
    AuthUserListRequest: |_r| What::default();
    AuthRoleListRequest: |_r| What::default();
    LeaseLeasesRequest: |_r| What::default();
    MemberListRequest: |_r| What::default();
    MembershipRequest: |_r| What::default();
    StatusRequest: |_r| What::default();
    DefragmentRequest: |_r| What::default();
    HashRequest: |_r| What::default();
    HashKvRequest: |_r| What::default();
    SnapshotRequest: |_r| What::default();
    Streaming<WatchRequest>: |_r| What::default();
    Streaming<LeaseKeepAliveRequest>: |_r| What::default();
}

fn leader(leader: Option<&LeaderKey>) -> What {
    leader.map(|leader| key(&leader.key)).unwrap_or_default()
}

/// The first key that it writes, else the first that it reads, and of how many operations it consists.
fn txn(r: &TxnRequest) -> What {
    let ops = || r.success.iter().chain(&r.failure);
    let written = |RequestOp { request }: &RequestOp| match request {
        Some(Op::RequestPut(put)) => Some(key(&put.key)),
        Some(Op::RequestDeleteRange(delete)) => Some(range(&delete.key, &delete.range_end)),
        _ => None,
    };
    let read = |RequestOp { request }: &RequestOp| match request {
        Some(Op::RequestRange(asked)) => Some(range(&asked.key, &asked.range_end)),
        _ => None,
    };
    let compared = || r.compare.first().map(|compare| range(&compare.key, &compare.range_end));
    let first = ops().find_map(written).or_else(|| ops().find_map(read)).or_else(compared).unwrap_or_default();
    What { operations: Some(ops().count()), bytes: Some(r.encoded_len()), ..first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_password_or_token_is_written_down() {
        let put = PutRequest { key: "k".into(), value: "secret".into(), ..Default::default() };
        let op = |put: &PutRequest| RequestOp { request: Some(Op::RequestPut(put.clone())) };
        let txn = TxnRequest { success: vec![op(&put), op(&put)], ..Default::default() };
        let (name, password) = ("u".to_owned(), "secret".to_owned());
        let user = AuthUserAddRequest { name: name.clone(), password: password.clone(), ..Default::default() };
        let login = AuthenticateRequest { name, password };
        for what in [put.what(), txn.what(), user.what(), login.what()] {
            assert!(!format!("{what:?}").contains("secret"), "{what:?}");
        }
        assert_eq!((put.what().key, txn.what().key), (Some("k".into()), Some("k".into())));
        assert_eq!((txn.what().operations, user.what().target.as_deref()), (Some(2), Some("u")));
    }
}
