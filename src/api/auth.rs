//! `etcdserverpb.Auth`, while authentication is off, as it always is: there are no users and no roles.
//!
//! Owns the answers that etcd gives in that state, by which clients that are configured with a user go on without a token. What
//! would make a user or a role is refused, as it could not be kept.
//! Absent: users, roles, tokens, and every permission.

use tonic::{Request, Response, Status};

use super::{Api, header_now};
use crate::error::Error;
use crate::pb::etcd::auth_server::Auth;
use crate::pb::etcd::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse, AuthRoleAddRequest,
    AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse, AuthRoleGetRequest, AuthRoleGetResponse,
    AuthRoleGrantPermissionRequest, AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest, AuthStatusResponse,
    AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest, AuthUserChangePasswordResponse,
    AuthUserDeleteRequest, AuthUserDeleteResponse, AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest,
    AuthUserGrantRoleResponse, AuthUserListRequest, AuthUserListResponse, AuthUserRevokeRoleRequest,
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse,
};

/// Of a store that nobody has changed.
const AUTH_REVISION: u64 = 1;

/// What would have to be kept.
fn not_kept() -> Status {
    let text = "this version keeps no users and no roles: authentication is off, and everybody who reaches the clients' port may do \
                everything; keep out by the network who must not";
    Error::Unsupported(text.into()).into()
}

/// As etcd: one key, a range that is not empty, or everything from a key on.
fn is_range(key: &[u8], range_end: &[u8]) -> bool {
    !key.is_empty() && (range_end.is_empty() || key < range_end || range_end == b"\0")
}

#[tonic::async_trait]
impl Auth for Api {
    async fn auth_enable(&self, _: Request<AuthEnableRequest>) -> Result<Response<AuthEnableResponse>, Status> {
        Err(Error::RootUserNotExist.into())
    }

    /// It is off already.
    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let node = self.node(&request)?;
        Ok(Response::new(AuthDisableResponse { header: header_now(&node) }))
    }

    async fn auth_status(&self, request: Request<AuthStatusRequest>) -> Result<Response<AuthStatusResponse>, Status> {
        let node = self.node(&request)?;
        let status = AuthStatusResponse { header: header_now(&node), enabled: false, auth_revision: AUTH_REVISION };
        Ok(Response::new(status))
    }

    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Result<Response<AuthenticateResponse>, Status> {
        Err(Error::AuthNotEnabled.into())
    }

    async fn user_add(&self, request: Request<AuthUserAddRequest>) -> Result<Response<AuthUserAddResponse>, Status> {
        Err(if request.get_ref().name.is_empty() { Error::UserEmpty.into() } else { not_kept() })
    }

    async fn user_list(&self, request: Request<AuthUserListRequest>) -> Result<Response<AuthUserListResponse>, Status> {
        let node = self.node(&request)?;
        Ok(Response::new(AuthUserListResponse { header: header_now(&node), users: Vec::new() }))
    }

    async fn user_get(&self, _: Request<AuthUserGetRequest>) -> Result<Response<AuthUserGetResponse>, Status> {
        Err(Error::UserNotFound.into())
    }

    async fn user_delete(&self, _: Request<AuthUserDeleteRequest>) -> Result<Response<AuthUserDeleteResponse>, Status> {
        Err(Error::UserNotFound.into())
    }

    async fn user_change_password(
        &self,
        _: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        Err(Error::UserNotFound.into())
    }

    async fn user_grant_role(
        &self,
        _: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        Err(Error::UserNotFound.into())
    }

    async fn user_revoke_role(
        &self,
        _: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        Err(Error::UserNotFound.into())
    }

    async fn role_add(&self, request: Request<AuthRoleAddRequest>) -> Result<Response<AuthRoleAddResponse>, Status> {
        Err(if request.get_ref().name.is_empty() { Error::RoleEmpty.into() } else { not_kept() })
    }

    async fn role_list(&self, request: Request<AuthRoleListRequest>) -> Result<Response<AuthRoleListResponse>, Status> {
        let node = self.node(&request)?;
        Ok(Response::new(AuthRoleListResponse { header: header_now(&node), roles: Vec::new() }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let permission = request.into_inner().perm.ok_or(Error::PermissionNotGiven)?;
        let is_sound = is_range(&permission.key, &permission.range_end);
        Err(if is_sound { Error::RoleNotFound } else { Error::InvalidAuthManagement }.into())
    }

    async fn role_get(&self, _: Request<AuthRoleGetRequest>) -> Result<Response<AuthRoleGetResponse>, Status> {
        Err(Error::RoleNotFound.into())
    }

    async fn role_delete(&self, _: Request<AuthRoleDeleteRequest>) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        Err(Error::RoleNotFound.into())
    }

    async fn role_revoke_permission(
        &self,
        _: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        Err(Error::RoleNotFound.into())
    }
}
