//! `etcdserverpb.Auth`: users, roles, and whether they count, as etcd 3.7 has them.
//!
//! Owns what comes before and after the state: passwords become hashes here, and a good one a token. What is read is as new as the
//! moment of the question. Absent: the rules (`kv::auth`), which hold where a change is applied.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::audited::{self, Audited};
use super::caller::token_key;
use super::{Api, header, header_now, mismatched};
use crate::caller::{Caller, Named};
use crate::env::wall_clock;
use crate::error::Error;
use crate::kv::auth::ROOT;
use crate::kv::{AUTH_SINCE, Auth as Users};
use crate::node::Node;
use crate::pb::authpb::{Permission, permission};
use crate::pb::etcd::auth_server::Auth;
use crate::pb::etcd::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse, AuthRoleAddRequest,
    AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse, AuthRoleGetRequest, AuthRoleGetResponse,
    AuthRoleGrantPermissionRequest, AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest, AuthStatusResponse,
    AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest, AuthUserChangePasswordResponse,
    AuthUserDeleteRequest, AuthUserDeleteResponse, AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest,
    AuthUserGrantRoleResponse, AuthUserListRequest, AuthUserListResponse, AuthUserRevokeRoleRequest,
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse, ResponseHeader,
};
use crate::pb::log::auth_change::Change;
use crate::pb::log::{AuthChange, AuthEnable, Command, UserPassword, answer, command};
use crate::secure::password::{Checked, Passwords};

type Header = Option<ResponseHeader>;

impl Api {
    /// Carries a change through Raft, for root alone once users count.
    pub(super) async fn change<T: Audited>(
        &self,
        request: Request<T>,
        change: impl FnOnce(T) -> Change,
    ) -> Result<Header, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        Ok(change_as(&node, &caller, change(request.into_inner())).await?)
    }

    /// Users and roles as they are now, and who asks for them.
    async fn users<T: Audited>(&self, request: &Request<T>) -> Result<(Node, Caller, std::sync::Arc<Users>), Error> {
        let node = self.node(request)?;
        let caller = self.caller(&node, request).await?;
        node.read_index().await?;
        let users = node.auth();
        Ok((node, caller, users))
    }

    /// What is kept of a new password: its hash, which is made here, or was made by who asks.
    async fn hash(&self, node: &Node, password: String, hashed: &str) -> Result<Bytes, Error> {
        if hashed.is_empty() || !password.is_empty() {
            return self.shared.passwords.hash(node.client().asker(), password).await;
        }
        let hash = STANDARD.decode(hashed).ok().filter(|hash| Passwords::is_hash(hash)).map(Bytes::from);
        hash.ok_or_else(|| {
            Error::InvalidRequest("hashedPassword is none, expected the text of a bcrypt hash in base64".into())
        })
    }
}

async fn change_as(node: &Node, caller: &Caller, change: Change) -> Result<Header, Error> {
    node.wait_version(AUTH_SINCE, "users and roles need").await?;
    let request = command::Request::Auth(AuthChange { change: Some(change) });
    match node.propose(caller, Command::new(AUTH_SINCE, request)).await?.response {
        Some(answer::Response::Auth(changed)) => Ok(header(node, changed.revision)),
        _ => Err(Error::Unsupported(mismatched().message().to_owned())),
    }
}

#[tonic::async_trait]
impl Auth for Api {
    async fn auth_enable(&self, request: Request<AuthEnableRequest>) -> Result<Response<AuthEnableResponse>, Status> {
        let node = self.node(&request)?;
        let token_key = Bytes::copy_from_slice(&node.env().secret());
        let header = self.change(request, |_| Change::Enable(AuthEnable { token_key })).await?;
        Ok(Response::new(AuthEnableResponse { header }))
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        if self.shared.is_auth_declared {
            return Err(Error::InvalidRequest(
                "users are declared (auth.bootstrap), so authentication stays on; take the setting away from all members first".into(),
            )
            .into());
        }
        let header = self.change(request, Change::Disable).await?;
        Ok(Response::new(AuthDisableResponse { header }))
    }

    /// For everybody: by it a client learns whether it needs a token.
    async fn auth_status(&self, request: Request<AuthStatusRequest>) -> Result<Response<AuthStatusResponse>, Status> {
        let (node, _, users) = self.users(&request).await?;
        let (enabled, auth_revision) = (users.is_enabled(), users.revision());
        Ok(Response::new(AuthStatusResponse { header: header_now(&node), enabled, auth_revision }))
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let node = self.node(&request)?;
        if let Some(entry) = audited::entry(&request) {
            entry.note_user(&request.get_ref().name);
        }
        let AuthenticateRequest { name, password } = request.into_inner();
        node.read_index().await?;
        let users = node.auth();
        if !users.is_enabled() {
            return Err(Error::AuthNotEnabled.into());
        }
        let (asker, passwords) = (node.client().asker(), &self.shared.passwords);
        let Some((user, since)) = users.user(&name).zip(users.since(&name)) else {
            passwords.guessed(asker, &name)?;
            return Err(Error::AuthFailed.into());
        };
        if user.no_password {
            return Err(Error::NoPasswordUser.into());
        }
        let checked = Checked { name, since, hash: user.password_hash.clone() };
        passwords.verify(asker, &checked, password).await?;
        let user = Named::user(checked.name, since);
        let (key, number) = (token_key(&node, users.token_key().clone()), node.env().random_u64());
        let token = self.shared.tokens.issue(&key, &user, wall_clock(), number);
        Ok(Response::new(AuthenticateResponse { header: header_now(&node), token }))
    }

    async fn user_add(&self, request: Request<AuthUserAddRequest>) -> Result<Response<AuthUserAddResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        let AuthUserAddRequest { name, password, options, hashed_password } = request.into_inner();
        let no_password = options.is_some_and(|options| options.no_password);
        let hash = if no_password { Bytes::new() } else { self.hash(&node, password, &hashed_password).await? };
        let header = change_as(&node, &caller, Change::UserAdd(UserPassword { user: name, hash, no_password })).await?;
        Ok(Response::new(AuthUserAddResponse { header }))
    }

    async fn user_list(&self, request: Request<AuthUserListRequest>) -> Result<Response<AuthUserListResponse>, Status> {
        let (node, caller, users) = self.users(&request).await?;
        users.check_root(caller.who())?;
        let users = users.users().map(|user| user.name.clone()).collect();
        Ok(Response::new(AuthUserListResponse { header: header_now(&node), users }))
    }

    /// Everybody may look at himself.
    async fn user_get(&self, request: Request<AuthUserGetRequest>) -> Result<Response<AuthUserGetResponse>, Status> {
        let (node, caller, users) = self.users(&request).await?;
        let name = request.into_inner().name;
        users.check_own(&caller, |own| own.name == name)?;
        let roles = users.user(&name).ok_or(Error::UserNotFound)?.roles.clone();
        Ok(Response::new(AuthUserGetResponse { header: header_now(&node), roles }))
    }

    async fn user_delete(
        &self,
        request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        let header = self.change(request, Change::UserDelete).await?;
        Ok(Response::new(AuthUserDeleteResponse { header }))
    }

    /// Without a password none fits any more.
    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        let AuthUserChangePasswordRequest { name, password, hashed_password } = request.into_inner();
        let is_none = password.is_empty() && hashed_password.is_empty();
        let hash = if is_none { Bytes::new() } else { self.hash(&node, password, &hashed_password).await? };
        let change = Change::UserChangePassword(UserPassword { user: name, hash, no_password: false });
        let header = change_as(&node, &caller, change).await?;
        Ok(Response::new(AuthUserChangePasswordResponse { header }))
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        let header = self.change(request, Change::UserGrantRole).await?;
        Ok(Response::new(AuthUserGrantRoleResponse { header }))
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        let header = self.change(request, Change::UserRevokeRole).await?;
        Ok(Response::new(AuthUserRevokeRoleResponse { header }))
    }

    async fn role_add(&self, request: Request<AuthRoleAddRequest>) -> Result<Response<AuthRoleAddResponse>, Status> {
        let header = self.change(request, Change::RoleAdd).await?;
        Ok(Response::new(AuthRoleAddResponse { header }))
    }

    async fn role_list(&self, request: Request<AuthRoleListRequest>) -> Result<Response<AuthRoleListResponse>, Status> {
        let (node, caller, users) = self.users(&request).await?;
        users.check_root(caller.who())?;
        let roles = users.roles().map(|role| role.name.clone()).collect();
        Ok(Response::new(AuthRoleListResponse { header: header_now(&node), roles }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let header = self.change(request, Change::RoleGrantPermission).await?;
        Ok(Response::new(AuthRoleGrantPermissionResponse { header }))
    }

    /// Everybody may look at the roles that he has.
    async fn role_get(&self, request: Request<AuthRoleGetRequest>) -> Result<Response<AuthRoleGetResponse>, Status> {
        let (node, caller, users) = self.users(&request).await?;
        let name = request.into_inner().role;
        users.check_own(&caller, |own| own.has(&name))?;
        let role = users.role(&name).ok_or(Error::RoleNotFound)?;
        let perm = if name == ROOT { vec![everything()] } else { role.permissions.clone() };
        Ok(Response::new(AuthRoleGetResponse { header: header_now(&node), perm }))
    }

    async fn role_delete(
        &self,
        request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        let header = self.change(request, Change::RoleDelete).await?;
        Ok(Response::new(AuthRoleDeleteResponse { header }))
    }

    async fn role_revoke_permission(
        &self,
        request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        let header = self.change(request, Change::RoleRevokePermission).await?;
        Ok(Response::new(AuthRoleRevokePermissionResponse { header }))
    }
}

/// What the role root has without being given it.
fn everything() -> Permission {
    let range_end = Bytes::from_static(b"\0");
    Permission { perm_type: permission::Type::Readwrite.into(), key: Bytes::new(), range_end }
}
