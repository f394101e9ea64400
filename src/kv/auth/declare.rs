//! A declaration: users and roles as a file has them, carried out at once.
//!
//! Invariants: all of it is done or nothing; who is named is then as the declaration says, and who is not is as before; authentication is on
//! afterwards, and root can use it. What is so already is not touched, so no token ends for it.
//! Absent: the file, and what its passwords' hashes are (`cluster::declared`).

use bytes::Bytes;

use super::change::{Changes, is_range};
use super::{Auth, ROOT};
use crate::error::Error;
use crate::pb::admin::RoleQuota;
use crate::pb::log::auth_declare::{Role, User};
use crate::pb::log::change::Change;
use crate::pb::log::{AuthDeclare, AuthFacts, AuthRole, AuthUser};

impl Auth {
    pub(super) fn declare(&self, r: &AuthDeclare) -> Changes {
        let mut changes = Vec::new();
        for role in &r.roles {
            let wanted = declared_role(role)?;
            if self.role(&role.name) != Some(&wanted) {
                changes.push(Change::AuthRole(wanted));
            }
        }
        let is_role =
            |name: &String| name == ROOT || self.role(name).is_some() || r.roles.iter().any(|role| role.name == *name);
        for user in &r.users {
            if !user.roles.iter().all(is_role) {
                return Err(Error::RoleNotFound);
            }
            let wanted = self.declared_user(user)?;
            if self.user(&user.name) != Some(&wanted) {
                changes.push(Change::AuthUser(wanted));
            }
        }
        let root = r.users.iter().find(|user| user.name == ROOT).map(|root| root.roles.iter().any(|role| role == ROOT));
        match root.or_else(|| self.user(ROOT).map(|root| root.has(ROOT))) {
            None => return Err(Error::RootUserNotExist),
            Some(false) => return Err(Error::RootRoleNotExist),
            Some(true) => {}
        }
        let mut changes = self.made(changes)?;
        // The last one is what else there is.
        if let Some(Change::Auth(facts)) = changes.last_mut() {
            *facts = self.declared_facts(r, facts);
        }
        Ok(changes)
    }

    fn declared_facts(&self, r: &AuthDeclare, made: &AuthFacts) -> AuthFacts {
        let token_key = if self.enabled { self.token_key.clone() } else { r.token_key.clone() };
        AuthFacts { enabled: true, token_key, declared: r.mark, ..made.clone() }
    }

    fn declared_user(&self, r: &User) -> Result<AuthUser, Error> {
        if r.name.is_empty() {
            return Err(Error::UserEmpty);
        }
        let mut roles = r.roles.clone();
        roles.sort();
        roles.dedup();
        let known = self.user(&r.name);
        let password_hash = match known {
            _ if r.no_password => Bytes::new(),
            Some(known) if r.hash.is_empty() => known.password_hash.clone(),
            // Who was to stay as it is has gone meanwhile.
            None if r.hash.is_empty() => return Err(Error::UserNotFound),
            _ => r.hash.clone(),
        };
        let is_same =
            known.filter(|known| (&known.password_hash, known.no_password) == (&password_hash, r.no_password));
        let since = is_same.map_or(self.revision + 1, |known| known.since);
        Ok(AuthUser { name: r.name.clone(), password_hash, no_password: r.no_password, roles, since, gone: false })
    }
}

fn declared_role(r: &Role) -> Result<AuthRole, Error> {
    if r.name.is_empty() {
        return Err(Error::RoleEmpty);
    }
    if !r.permissions.iter().all(|permission| is_range(&permission.key, &permission.range_end)) {
        return Err(Error::InvalidAuthManagement);
    }
    let mut permissions = r.permissions.clone();
    permissions.sort_by(|one, other| (&one.key, &one.range_end).cmp(&(&other.key, &other.range_end)));
    // Of two for the same keys the last counts, as where one is granted after the other.
    permissions.reverse();
    permissions.dedup_by(|one, other| (&one.key, &one.range_end) == (&other.key, &other.range_end));
    permissions.reverse();
    let quota = r.quota.filter(|quota| *quota != RoleQuota::default());
    Ok(AuthRole { name: r.name.clone(), permissions, gone: false, quota })
}
