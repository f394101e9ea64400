//! Users and roles: what the source says of them, made in the target.
//!
//! What is there already is left, and completed. Absent: passwords, which no etcd tells anybody; a user that is made here has one that nobody
//! knows, until root sets another.

use std::fmt::Write as _;

use tonic::{Code, Status};

use crate::cli::client::{ClientArgs, failure};
use crate::cli::credentials::Channel;
use crate::env::Env;
use crate::pb::etcd::auth_client::AuthClient;
use crate::pb::etcd::{
    AuthRoleAddRequest, AuthRoleGetRequest, AuthRoleGrantPermissionRequest, AuthRoleListRequest, AuthUserAddRequest,
    AuthUserGetRequest, AuthUserGrantRoleRequest, AuthUserListRequest,
};

/// The role that may do everything without being given it.
const ROOT: &str = "root";

/// What was made.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub roles: usize,
    pub users: Vec<String>,
}

impl Made {
    /// For the one who has asked.
    pub(super) fn describe(&self) -> String {
        let mut text = format!("{} roles and {} users were made in the target", self.roles, self.users.len());
        if !self.users.is_empty() {
            let names: Vec<String> = self.users.iter().map(|name| crate::identity::shown(name)).collect();
            let _ = write!(text, "; give them passwords with `quorate user passwd`: {}", names.join(", "));
        }
        text + "\n"
    }
}

/// Whether it was made; what is there already was not.
fn is_made<T>(answer: Result<T, Status>) -> anyhow::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::FailedPrecondition && status.message().contains("already exists") => {
            Ok(false)
        }
        Err(status) => Err(failure(&status)),
    }
}

/// A password that nobody knows.
fn unknown_password() -> String {
    Env::real().secret().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) async fn copy(source: &ClientArgs, target: &ClientArgs) -> anyhow::Result<Made> {
    let (mut from, mut to) = (AuthClient::new(source.connect().await?), AuthClient::new(target.connect().await?));
    let mut made = Made::default();
    for name in source.answer(from.role_list(AuthRoleListRequest {})).await?.into_inner().roles {
        let permissions = source.answer(from.role_get(AuthRoleGetRequest { role: name.clone() })).await?.into_inner();
        made.roles += usize::from(is_made(to.role_add(AuthRoleAddRequest { name: name.clone() }).await)?);
        for perm in permissions.perm.into_iter().filter(|_| name != ROOT) {
            let grant = AuthRoleGrantPermissionRequest { name: name.clone(), perm: Some(perm) };
            target.answer(to.role_grant_permission(grant)).await?;
        }
    }
    for name in source.answer(from.user_list(AuthUserListRequest {})).await?.into_inner().users {
        copy_user(source, &mut from, target, &mut to, &name, &mut made).await?;
    }
    Ok(made)
}

async fn copy_user(
    source: &ClientArgs,
    from: &mut AuthClient<Channel>,
    target: &ClientArgs,
    to: &mut AuthClient<Channel>,
    name: &str,
    made: &mut Made,
) -> anyhow::Result<()> {
    let roles = source.answer(from.user_get(AuthUserGetRequest { name: name.to_owned() })).await?.into_inner().roles;
    let add = AuthUserAddRequest { name: name.to_owned(), password: unknown_password(), ..Default::default() };
    if is_made(to.user_add(add).await)? {
        made.users.push(name.to_owned());
    }
    for role in roles {
        target.answer(to.user_grant_role(AuthUserGrantRoleRequest { user: name.to_owned(), role })).await?;
    }
    Ok(())
}
