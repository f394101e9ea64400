//! `user`, `role` and `auth`: who there is, what each may do, and whether that counts.

use std::io::BufRead as _;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, ensure};
use serde_json::{Value, json};

use super::client::ClientArgs;
use super::credentials::{Channel, first_line};
use super::kv::KeyRange;
use super::output::{Format, base64, done, header_json, json_line, table};
use crate::config::Bytes;
use crate::identity::shown;
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::admin::{RoleQuota, RoleQuotasRequest, RoleUsage, SetRoleQuotaRequest};
use crate::pb::authpb::{Permission, UserAddOptions, permission::Type};
use crate::pb::etcd::auth_client::AuthClient;
use crate::pb::etcd::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest,
    AuthRoleGrantPermissionRequest, AuthRoleListRequest, AuthRoleRevokePermissionRequest, AuthStatusRequest,
    AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthUserRevokeRoleRequest, ResponseHeader,
};

#[derive(Debug, clap::Subcommand)]
pub enum UserCommand {
    /// Add a user
    Add(UserAddArgs),
    /// Delete a user; its tokens end
    Delete(NameArgs),
    /// Show the roles of a user
    Get(NameArgs),
    /// Print all users
    List(OnlyArgs),
    /// Change the password of a user; its tokens end
    Passwd(PasswdArgs),
    /// Give a user a role
    GrantRole(UserRoleArgs),
    /// Take a role from a user
    RevokeRole(UserRoleArgs),
}

#[derive(Debug, clap::Subcommand)]
pub enum RoleCommand {
    /// Add a role, which may do nothing yet
    Add(NameArgs),
    /// Delete a role, and take it from its users
    Delete(NameArgs),
    /// Show what a role may do
    Get(NameArgs),
    /// Print all roles
    List(OnlyArgs),
    /// Allow a role to read or write keys
    GrantPermission(GrantArgs),
    /// Take such a permission back; the keys must be those that it was given for
    RevokePermission(RevokeArgs),
    /// Bound what is stored under what a role may write, and how often its users write
    Quota(QuotaArgs),
    /// Print the quotas of all roles, and what of them is used
    Quotas(OnlyArgs),
}

#[derive(Debug, clap::Subcommand)]
pub enum AuthCommand {
    /// Make users and roles count; user root with role root must be there
    Enable(OnlyArgs),
    /// Serve everybody everything again; all tokens end
    Disable(OnlyArgs),
    /// Whether users and roles count
    Status(OnlyArgs),
}

#[derive(Debug, clap::Args)]
pub struct NameArgs {
    name: String,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct OnlyArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// Where a new password comes from.
#[derive(Debug, clap::Args)]
pub struct NewPassword {
    /// The new password; left out: the first line of standard input
    #[arg(long, value_name = "PASSWORD")]
    new_user_password: Option<String>,
    /// File whose first line is the new password
    #[arg(long, value_name = "FILE", conflicts_with = "new_user_password")]
    new_user_password_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct UserAddArgs {
    name: String,
    /// The user never has a password: it can ask for no token, and is whom a client's certificate names (client_tls.user)
    #[arg(long, conflicts_with_all = ["new_user_password", "new_user_password_file"])]
    no_password: bool,
    #[command(flatten)]
    password: NewPassword,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct PasswdArgs {
    name: String,
    #[command(flatten)]
    password: NewPassword,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct UserRoleArgs {
    user_name: String,
    role: String,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// To read, to write, or both.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Kind {
    Read,
    Write,
    Readwrite,
}

#[derive(Debug, clap::Args)]
pub struct GrantArgs {
    role: String,
    #[arg(value_enum)]
    kind: Kind,
    #[command(flatten)]
    range: KeyRange,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// In the place of the quota that the role has; what is left out has no bound.
#[derive(Debug, clap::Args)]
pub struct QuotaArgs {
    role: String,
    /// Most bytes, as the store's own quota counts them: 64MiB, 1GiB
    #[arg(long, value_name = "SIZE", required_unless_present_any = ["keys", "requests_per_second", "none"])]
    bytes: Option<Bytes>,
    /// Most keys that exist
    #[arg(long, value_name = "NUMBER")]
    keys: Option<u64>,
    /// Most requests that write, of each user of the role in a second, at all members together
    #[arg(long, value_name = "NUMBER")]
    requests_per_second: Option<u64>,
    /// No bound any more
    #[arg(long, conflicts_with_all = ["bytes", "keys", "requests_per_second"])]
    none: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct RevokeArgs {
    role: String,
    #[command(flatten)]
    range: KeyRange,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

impl NewPassword {
    fn read(&self) -> anyhow::Result<String> {
        let password = match (&self.new_user_password, &self.new_user_password_file) {
            (Some(password), _) => password.clone(),
            (None, Some(file)) => first_line(file).map_err(|error| anyhow!(error))?,
            (None, None) => {
                let mut line = String::new();
                std::io::stdin().lock().read_line(&mut line).context("standard input cannot be read")?;
                line.trim_end_matches(['\r', '\n']).to_owned()
            }
        };
        ensure!(!password.is_empty(), "the new password is empty; give one, or --no-password");
        Ok(password)
    }
}

async fn connect(client: &ClientArgs) -> anyhow::Result<AuthClient<Channel>> {
    Ok(AuthClient::new(client.connect().await?))
}

/// One a line, or a list in JSON.
fn names(format: Format, key: &str, names: &[String]) -> Vec<u8> {
    match format {
        Format::Simple => names.iter().map(|name| shown(name) + "\n").collect::<String>().into_bytes(),
        Format::Json => json_line(&json!({ key: names })),
    }
}

pub async fn user(command: UserCommand) -> anyhow::Result<Vec<u8>> {
    match command {
        UserCommand::Add(args) => {
            let password = if args.no_password { String::new() } else { args.password.read()? };
            let options = Some(UserAddOptions { no_password: args.no_password });
            let name = args.name.clone();
            let request = AuthUserAddRequest { name, password, options, hashed_password: String::new() };
            let answer = args.client.answer(connect(&args.client).await?.user_add(request)).await?.into_inner();
            let facts = facts(answer.header.as_ref(), &[("user", &args.name)]);
            Ok(done(args.output, &facts, &format!("user {} added", args.name)))
        }
        UserCommand::Delete(NameArgs { name, output, client }) => {
            let request = AuthUserDeleteRequest { name: name.clone() };
            let answer = client.answer(connect(&client).await?.user_delete(request)).await?.into_inner();
            let facts = facts(answer.header.as_ref(), &[("user", &name)]);
            Ok(done(output, &facts, &format!("user {name} deleted")))
        }
        UserCommand::Get(NameArgs { name, output, client }) => {
            let answer = client.answer(connect(&client).await?.user_get(AuthUserGetRequest { name })).await?;
            Ok(names(output, "roles", &answer.into_inner().roles))
        }
        UserCommand::List(OnlyArgs { output, client }) => {
            let answer = client.answer(connect(&client).await?.user_list(AuthUserListRequest {})).await?;
            Ok(names(output, "users", &answer.into_inner().users))
        }
        UserCommand::Passwd(args) => {
            let (name, password) = (args.name.clone(), args.password.read()?);
            let request = AuthUserChangePasswordRequest { name, password, hashed_password: String::new() };
            let answer = args.client.answer(connect(&args.client).await?.user_change_password(request)).await?;
            let facts = facts(answer.into_inner().header.as_ref(), &[("user", &args.name)]);
            Ok(done(args.output, &facts, &format!("password of {} changed", args.name)))
        }
        UserCommand::GrantRole(UserRoleArgs { user_name: user, role, output, client }) => {
            let request = AuthUserGrantRoleRequest { user: user.clone(), role: role.clone() };
            let answer = client.answer(connect(&client).await?.user_grant_role(request)).await?.into_inner();
            let facts = facts(answer.header.as_ref(), &[("user", &user), ("role", &role)]);
            Ok(done(output, &facts, &format!("role {role} given to user {user}")))
        }
        UserCommand::RevokeRole(UserRoleArgs { user_name: user, role, output, client }) => {
            let request = AuthUserRevokeRoleRequest { name: user.clone(), role: role.clone() };
            let answer = client.answer(connect(&client).await?.user_revoke_role(request)).await?.into_inner();
            let facts = facts(answer.header.as_ref(), &[("user", &user), ("role", &role)]);
            Ok(done(output, &facts, &format!("role {role} taken from user {user}")))
        }
    }
}

pub async fn role(command: RoleCommand) -> anyhow::Result<Vec<u8>> {
    match command {
        RoleCommand::Add(NameArgs { name, output, client }) => {
            let request = AuthRoleAddRequest { name: name.clone() };
            let answer = client.answer(connect(&client).await?.role_add(request)).await?.into_inner();
            Ok(done(output, &facts(answer.header.as_ref(), &[("role", &name)]), &format!("role {name} added")))
        }
        RoleCommand::Delete(NameArgs { name, output, client }) => {
            let request = AuthRoleDeleteRequest { role: name.clone() };
            let answer = client.answer(connect(&client).await?.role_delete(request)).await?.into_inner();
            Ok(done(output, &facts(answer.header.as_ref(), &[("role", &name)]), &format!("role {name} deleted")))
        }
        RoleCommand::Get(NameArgs { name, output, client }) => {
            let answer = client.answer(connect(&client).await?.role_get(AuthRoleGetRequest { role: name })).await?;
            Ok(permissions(output, &answer.into_inner().perm))
        }
        RoleCommand::List(OnlyArgs { output, client }) => {
            let answer = client.answer(connect(&client).await?.role_list(AuthRoleListRequest {})).await?;
            Ok(names(output, "roles", &answer.into_inner().roles))
        }
        RoleCommand::GrantPermission(args) => grant(args).await,
        RoleCommand::RevokePermission(args) => {
            let (key, range_end) = args.range.bounds();
            let request = AuthRoleRevokePermissionRequest { role: args.role.clone(), key, range_end };
            let answer = args.client.answer(connect(&args.client).await?.role_revoke_permission(request)).await?;
            let facts = facts(answer.into_inner().header.as_ref(), &[("role", &args.role)]);
            Ok(done(args.output, &facts, &format!("permission taken from role {}", args.role)))
        }
        RoleCommand::Quota(args) => {
            let quota = RoleQuota {
                bytes: args.bytes.map_or(0, |bytes| bytes.0),
                keys: args.keys.unwrap_or(0),
                requests_per_second: args.requests_per_second.unwrap_or(0),
            };
            let request = SetRoleQuotaRequest { role: args.role.clone(), quota: (!args.none).then_some(quota) };
            args.client.answer(admin(&args.client).await?.set_role_quota(request)).await?;
            let what = if args.none { "taken from" } else { "given to" };
            let facts = json!({
                "role": args.role, "bytes_max": quota.bytes, "keys_max": quota.keys,
                "requests_per_second": quota.requests_per_second,
            });
            Ok(done(args.output, &facts, &format!("quota {what} role {}", args.role)))
        }
        RoleCommand::Quotas(OnlyArgs { output, client }) => {
            let answer = client.answer(admin(&client).await?.role_quotas(RoleQuotasRequest {})).await?;
            Ok(quotas(output, &answer.into_inner().roles))
        }
    }
}

async fn grant(args: GrantArgs) -> anyhow::Result<Vec<u8>> {
    let (key, range_end) = args.range.bounds();
    let perm_type = match args.kind {
        Kind::Read => Type::Read,
        Kind::Write => Type::Write,
        Kind::Readwrite => Type::Readwrite,
    };
    let perm = Some(Permission { perm_type: perm_type.into(), key, range_end });
    let request = AuthRoleGrantPermissionRequest { name: args.role.clone(), perm };
    let answer = args.client.answer(connect(&args.client).await?.role_grant_permission(request)).await?;
    let facts = facts(answer.into_inner().header.as_ref(), &[("role", &args.role)]);
    Ok(done(args.output, &facts, &format!("permission given to role {}", args.role)))
}

pub async fn auth(command: AuthCommand) -> anyhow::Result<Vec<u8>> {
    match command {
        AuthCommand::Enable(OnlyArgs { output, client }) => {
            let answer = client.answer(connect(&client).await?.auth_enable(AuthEnableRequest {})).await?.into_inner();
            Ok(done(output, &switched(answer.header.as_ref(), true), "authentication is on"))
        }
        AuthCommand::Disable(OnlyArgs { output, client }) => {
            let answer = client.answer(connect(&client).await?.auth_disable(AuthDisableRequest {})).await?.into_inner();
            Ok(done(output, &switched(answer.header.as_ref(), false), "authentication is off"))
        }
        AuthCommand::Status(OnlyArgs { output, client }) => {
            let answer = client.answer(connect(&client).await?.auth_status(AuthStatusRequest {})).await?.into_inner();
            let (enabled, revision) = (answer.enabled, answer.auth_revision);
            let sentence = format!("authentication is {}, revision {revision}", if enabled { "on" } else { "off" });
            Ok(done(output, &json!({ "enabled": enabled, "auth_revision": revision }), &sentence))
        }
    }
}

/// What a change was made to, behind the answer's header.
fn facts(header: Option<&ResponseHeader>, names: &[(&str, &String)]) -> Value {
    let names = names.iter().map(|(kind, name)| ((*kind).to_owned(), json!(name)));
    std::iter::once(("header".to_owned(), header_json(header))).chain(names).collect()
}

fn switched(header: Option<&ResponseHeader>, enabled: bool) -> Value {
    json!({ "header": header_json(header), "enabled": enabled })
}

async fn admin(client: &ClientArgs) -> anyhow::Result<AdminClient<Channel>> {
    Ok(AdminClient::new(client.connect().await?))
}

fn quotas(format: Format, roles: &[RoleUsage]) -> Vec<u8> {
    if format == Format::Json {
        let one = |one: &RoleUsage| -> Value {
            let quota = one.quota.unwrap_or_default();
            json!({
                "role": one.role, "bytes": one.bytes, "bytes_max": quota.bytes, "keys": one.keys,
                "keys_max": quota.keys, "requests_per_second": quota.requests_per_second,
            })
        };
        return json_line(&json!({ "roles": roles.iter().map(one).collect::<Vec<_>>() }));
    }
    let of = |used: u64, most: u64| if most == 0 { used.to_string() } else { format!("{used} of {most}") };
    let row = |one: &RoleUsage| {
        let quota = one.quota.unwrap_or_default();
        let rate = Some(quota.requests_per_second).filter(|rate| *rate > 0);
        vec![
            shown(&one.role),
            of(one.bytes, quota.bytes),
            of(one.keys, quota.keys),
            rate.map_or_else(|| "-".to_owned(), |rate| rate.to_string()),
        ]
    };
    table(&["ROLE", "BYTES", "KEYS", "REQUESTS/S"], &roles.iter().map(row).collect::<Vec<_>>())
}

fn permissions(format: Format, permissions: &[Permission]) -> Vec<u8> {
    let kind = |one: &Permission| Type::try_from(one.perm_type).map_or("?", |kind| kind.as_str_name()).to_lowercase();
    if format == Format::Json {
        let one = |one: &Permission| -> Value {
            json!({ "kind": kind(one), "key": base64(&one.key), "range_end": base64(&one.range_end) })
        };
        return json_line(&json!({ "permissions": permissions.iter().map(one).collect::<Vec<_>>() }));
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let rows: Vec<Vec<String>> = permissions
        .iter()
        .map(|one| {
            let to = match &one.range_end[..] {
                [] => String::new(),
                [0] => "(the end)".to_owned(),
                end => text(end),
            };
            vec![kind(one), text(&one.key), to]
        })
        .collect();
    table(&["KIND", "KEY", "BEFORE"], &rows)
}
