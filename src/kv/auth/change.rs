//! Changes of users and roles, with etcd 3.7's rules and refusals.
//!
//! Invariants: what is refused changes nothing; what is done is recorded, the facts last. One user or role, and all of them together, have
//! bounds: each is one record of a snapshot, and a change of a role may write every user anew.

use std::sync::Arc;

use bytes::Bytes;

use super::{Auth, ROOT, entry_bytes};
use crate::error::Error;
use crate::kv::State;
use crate::pb::authpb::Permission;
use crate::pb::etcd::{
    AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGrantPermissionRequest, AuthRoleRevokePermissionRequest,
    AuthUserDeleteRequest, AuthUserGrantRoleRequest, AuthUserRevokeRoleRequest,
};
use crate::pb::log::auth_change::Change as Asked;
use crate::pb::log::change::Change;
use crate::pb::log::{AuthChange, AuthChanged, AuthEnable, AuthRole, AuthUser, UserPassword};

/// Most bytes of one user with its roles, or of one role with its permissions: thousands of them.
const ENTRY_BYTES_MAX: u64 = 256 << 10;
/// Most bytes of all users and roles: a hundred thousand users.
pub(super) const ALL_BYTES_MAX: u64 = 64 << 20;

/// What a change came to: what is different then, in order.
pub(super) type Changes = Result<Vec<Change>, Error>;

impl State {
    /// Changes users and roles. Whether who asks may do so was decided.
    pub(in crate::kv) fn change_auth(&mut self, r: &AuthChange) -> Result<AuthChanged, Error> {
        let asked = r.change.as_ref().ok_or(Error::InvalidAuthManagement)?;
        let auth = Arc::make_mut(&mut self.auth);
        for change in auth.decide(asked)? {
            auth.load(&change);
            let bytes = prost::Message::encoded_len(&crate::pb::log::Change { change: Some(change.clone()) });
            self.journal.record(change, bytes);
        }
        Ok(AuthChanged { revision: self.revision })
    }
}

impl Auth {
    fn decide(&self, asked: &Asked) -> Changes {
        match asked {
            Asked::Enable(r) => self.enable(r),
            Asked::Disable(_) => Ok(self.disable()),
            Asked::UserAdd(r) => self.user_add(r),
            Asked::UserDelete(r) => self.user_delete(r),
            Asked::UserChangePassword(r) => self.user_change_password(r),
            Asked::UserGrantRole(r) => self.user_grant_role(r),
            Asked::UserRevokeRole(r) => self.user_revoke_role(r),
            Asked::RoleAdd(r) => self.role_add(r),
            Asked::RoleDelete(r) => self.role_delete(r),
            Asked::RoleGrantPermission(r) => self.role_grant_permission(r),
            Asked::RoleRevokePermission(r) => self.role_revoke_permission(r),
            Asked::Declare(r) => self.declare(r),
            Asked::RoleQuota(r) => self.role_quota(r),
        }
    }

    /// As etcd, it makes no auth revision.
    fn enable(&self, r: &AuthEnable) -> Changes {
        if self.enabled {
            return Ok(Vec::new());
        }
        let root = self.user(ROOT).ok_or(Error::RootUserNotExist)?;
        if !root.has(ROOT) {
            return Err(Error::RootRoleNotExist);
        }
        let facts = super::AuthFacts { enabled: true, token_key: r.token_key.clone(), ..self.facts() };
        Ok(vec![Change::Auth(facts)])
    }

    fn disable(&self) -> Vec<Change> {
        if !self.enabled {
            return Vec::new();
        }
        let revision = self.revision + 1;
        let facts = super::AuthFacts { enabled: false, revision, disabled_at: revision, ..self.facts() };
        vec![Change::Auth(facts)]
    }

    /// These changes, and the revision that they make. Refuses what makes more than the bounds allow; what makes less is always done.
    pub(super) fn made(&self, mut changes: Vec<Change>) -> Changes {
        self.check_quotas_of(&changes)?;
        let mut more = 0;
        for change in &changes {
            let (now, before) = match change {
                Change::AuthUser(user) if !user.gone => {
                    (entry_bytes(user), self.user(&user.name).map_or(0, entry_bytes))
                }
                Change::AuthRole(role) if !role.gone => {
                    (entry_bytes(role), self.role(&role.name).map_or(0, entry_bytes))
                }
                _ => continue,
            };
            if now > ENTRY_BYTES_MAX.max(before) {
                return Err(Error::RequestTooLarge);
            }
            more += now.saturating_sub(before);
        }
        if more > 0 && self.bytes + more > ALL_BYTES_MAX {
            return Err(Error::NoSpace);
        }
        changes.push(Change::Auth(super::AuthFacts { revision: self.revision + 1, ..self.facts() }));
        Ok(changes)
    }

    fn user_add(&self, r: &UserPassword) -> Changes {
        if r.user.is_empty() {
            return Err(Error::UserEmpty);
        }
        if self.user(&r.user).is_some() {
            return Err(Error::UserExists);
        }
        let password_hash = if r.no_password { Bytes::new() } else { r.hash.clone() };
        let user = AuthUser {
            name: r.user.clone(),
            password_hash,
            no_password: r.no_password,
            since: self.revision + 1,
            ..AuthUser::default()
        };
        self.made(vec![Change::AuthUser(user)])
    }

    fn user_delete(&self, r: &AuthUserDeleteRequest) -> Changes {
        if self.enabled && r.name == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.user(&r.name).ok_or(Error::UserNotFound)?;
        let user = AuthUser { name: r.name.clone(), gone: true, ..AuthUser::default() };
        self.made(vec![Change::AuthUser(user)])
    }

    fn user_change_password(&self, r: &UserPassword) -> Changes {
        let user = self.user(&r.user).ok_or(Error::UserNotFound)?.clone();
        // A user without one stays so.
        let password_hash = if user.no_password { Bytes::new() } else { r.hash.clone() };
        self.made(vec![Change::AuthUser(AuthUser { password_hash, since: self.revision + 1, ..user })])
    }

    fn user_grant_role(&self, r: &AuthUserGrantRoleRequest) -> Changes {
        let mut user = self.user(&r.user).ok_or(Error::UserNotFound)?.clone();
        if r.role != ROOT {
            self.role(&r.role).ok_or(Error::RoleNotFound)?;
        }
        match user.roles.binary_search(&r.role) {
            // It has the role, and nothing is to be done.
            Ok(_) => return Ok(Vec::new()),
            Err(at) => user.roles.insert(at, r.role.clone()),
        }
        self.made(vec![Change::AuthUser(user)])
    }

    fn user_revoke_role(&self, r: &AuthUserRevokeRoleRequest) -> Changes {
        if self.enabled && r.name == ROOT && r.role == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        let user = self.user(&r.name).ok_or(Error::UserNotFound)?;
        let without = without_role(user, &r.role).ok_or(Error::RoleNotGranted)?;
        self.made(vec![Change::AuthUser(without)])
    }

    fn role_add(&self, r: &AuthRoleAddRequest) -> Changes {
        if r.name.is_empty() {
            return Err(Error::RoleEmpty);
        }
        if self.role(&r.name).is_some() {
            return Err(Error::RoleExists);
        }
        self.made(vec![Change::AuthRole(AuthRole { name: r.name.clone(), ..AuthRole::default() })])
    }

    fn role_delete(&self, r: &AuthRoleDeleteRequest) -> Changes {
        if self.enabled && r.role == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.role(&r.role).ok_or(Error::RoleNotFound)?;
        let role = AuthRole { name: r.role.clone(), gone: true, ..AuthRole::default() };
        let holders = self.users().filter_map(|user| without_role(user, &r.role)).map(Change::AuthUser);
        self.made(std::iter::once(Change::AuthRole(role)).chain(holders).collect())
    }

    fn role_grant_permission(&self, r: &AuthRoleGrantPermissionRequest) -> Changes {
        let permission = r.perm.as_ref().ok_or(Error::PermissionNotGiven)?;
        if !is_range(&permission.key, &permission.range_end) {
            return Err(Error::InvalidAuthManagement);
        }
        let mut role = self.role(&r.name).ok_or(Error::RoleNotFound)?.clone();
        let same = |one: &&mut Permission| (&one.key, &one.range_end) == (&permission.key, &permission.range_end);
        match role.permissions.iter_mut().find(same) {
            Some(one) => one.perm_type = permission.perm_type,
            None => {
                let at = role.permissions.partition_point(|one| one.key <= permission.key);
                role.permissions.insert(at, permission.clone());
            }
        }
        self.made(vec![Change::AuthRole(role)])
    }

    fn role_revoke_permission(&self, r: &AuthRoleRevokePermissionRequest) -> Changes {
        let mut role = self.role(&r.role).ok_or(Error::RoleNotFound)?.clone();
        let before = role.permissions.len();
        role.permissions.retain(|one| (&one.key, &one.range_end) != (&r.key, &r.range_end));
        if role.permissions.len() == before {
            return Err(Error::PermissionNotGranted);
        }
        self.made(vec![Change::AuthRole(role)])
    }
}

/// `None` if it does not have the role.
fn without_role(user: &AuthUser, role: &str) -> Option<AuthUser> {
    let mut user = user.clone();
    let at = user.roles.binary_search_by(|one| one.as_str().cmp(role)).ok()?;
    user.roles.remove(at);
    Some(user)
}

/// As etcd: one key, a range that is not empty, or everything from a key on.
pub(super) fn is_range(key: &[u8], range_end: &[u8]) -> bool {
    !key.is_empty() && (range_end.is_empty() || key < range_end || range_end == b"\0")
}
