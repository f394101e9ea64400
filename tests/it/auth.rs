//! The auth service while authentication is off: what etcd 3.7 answers then, so that clients that are configured with a user go on.

use quorate::pb::authpb::Permission;
use quorate::pb::etcd::auth_client::AuthClient;
use quorate::pb::etcd::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest,
    AuthRoleGrantPermissionRequest, AuthRoleListRequest, AuthRoleRevokePermissionRequest, AuthStatusRequest,
    AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthUserRevokeRoleRequest, AuthenticateRequest,
};
use tonic::{Code, Response, Status};

use crate::support::cluster::{Cluster, http_post};

fn refused<T: std::fmt::Debug>(answer: Result<Response<T>, Status>) -> (Code, String) {
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_authentication_is_off_every_call_is_answered_as_by_etcd() {
    let cluster = Cluster::start(1).await;
    let revision = cluster.put(0, "k", "v").await;
    let mut auth = AuthClient::new(cluster.channel(0));
    let status = auth.auth_status(AuthStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.enabled, status.auth_revision, status.header.unwrap().revision), (false, 1, revision));
    assert!(auth.auth_disable(AuthDisableRequest {}).await.unwrap().into_inner().header.is_some());
    assert!(auth.user_list(AuthUserListRequest {}).await.unwrap().into_inner().users.is_empty());
    assert!(auth.role_list(AuthRoleListRequest {}).await.unwrap().into_inner().roles.is_empty());

    let (off, unmet, invalid) = (Code::FailedPrecondition, Code::FailedPrecondition, Code::InvalidArgument);
    let user = || "u".to_owned();
    let grant = |perm| AuthRoleGrantPermissionRequest { name: "r".into(), perm };
    let of = |key: &'static str, range_end: &'static str| {
        Some(Permission { key: key.into(), range_end: range_end.into(), ..Default::default() })
    };
    let (no_user, no_role) = ("etcdserver: user name not found", "etcdserver: role name not found");
    let named = AuthenticateRequest { name: user(), password: "secret".into() };
    let cases = [
        (refused(auth.authenticate(named).await), off, "etcdserver: authentication is not enabled"),
        (refused(auth.auth_enable(AuthEnableRequest {}).await), unmet, "etcdserver: root user does not exist"),
        (refused(auth.user_get(AuthUserGetRequest { name: user() }).await), unmet, no_user),
        (refused(auth.user_delete(AuthUserDeleteRequest { name: user() }).await), unmet, no_user),
        (refused(auth.user_change_password(AuthUserChangePasswordRequest::default()).await), unmet, no_user),
        (refused(auth.user_grant_role(AuthUserGrantRoleRequest::default()).await), unmet, no_user),
        (refused(auth.user_revoke_role(AuthUserRevokeRoleRequest::default()).await), unmet, no_user),
        (refused(auth.role_get(AuthRoleGetRequest::default()).await), unmet, no_role),
        (refused(auth.role_delete(AuthRoleDeleteRequest::default()).await), unmet, no_role),
        (refused(auth.role_revoke_permission(AuthRoleRevokePermissionRequest::default()).await), unmet, no_role),
        (refused(auth.user_add(AuthUserAddRequest::default()).await), invalid, "etcdserver: user name is empty"),
        (refused(auth.role_add(AuthRoleAddRequest::default()).await), invalid, "etcdserver: role name is empty"),
        (refused(auth.role_grant_permission(grant(None)).await), invalid, "etcdserver: permission not given"),
        (refused(auth.role_grant_permission(grant(of("", ""))).await), invalid, "etcdserver: invalid auth management"),
        (
            refused(auth.role_grant_permission(grant(of("b", "a"))).await),
            invalid,
            "etcdserver: invalid auth management",
        ),
        (refused(auth.role_grant_permission(grant(of("b", "\0"))).await), unmet, no_role),
        (refused(auth.role_grant_permission(grant(of("a", "b"))).await), unmet, no_role),
    ];
    for (told, code, text) in cases {
        assert_eq!(told, (code, text.to_owned()));
    }
    assert!(auth.user_list(AuthUserListRequest {}).await.unwrap().into_inner().users.is_empty());

    let (code, text) = http_post(&cluster.endpoint(0), "/v3/auth/status", "{}").await.unwrap();
    assert!(code == 200 && text.contains(r#""authRevision":"1""#) && !text.contains("enabled"), "{code} {text}");
}
