//! Users, roles and permissions, as facts that all members agree on.
//!
//! Owns who there is, what each may do, and whether that counts (`enabled`); the rules of changing them are etcd 3.7's (`change`), and
//! what a request needs is in `needs`. [`Auth::check`] is the one place that decides, a pure function of the state: it is asked where a command is
//! applied, and where this member's own state is read.
//! Invariants: each change that is done makes one auth revision; the part of the state that is derived (`Grants`) follows from the rest; a
//! clone is cheap, and later changes do not change it.
//! Absent: passwords and tokens (`secure`): here is only a hash, which nobody looks at while applying, and the key that tokens are
//! signed with.

mod change;
mod declare;
mod intervals;
mod needs;
mod quota;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use imbl::OrdMap;

use self::intervals::{End, Intervals};
use self::quota::Quotas;
use crate::caller::{Caller, Who};
use crate::error::Error;
use crate::pb::authpb::permission::Type;
use crate::pb::log::{AuthFacts, AuthRole, AuthUser, change::Change};

pub use needs::Wants;

/// The role that may do everything, and the user that must have it before authentication is turned on.
pub const ROOT: &str = "root";
/// Bytes of the key that tokens are signed with.
pub const TOKEN_KEY_BYTES: usize = 32;
/// What a user or a role takes in memory beside its encoding.
pub(super) const ENTRY_BYTES: u64 = 200;

/// To read keys, or to write them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// Everything about users and roles.
#[derive(Clone, Debug)]
pub struct Auth {
    enabled: bool,
    revision: u64,
    token_key: Bytes,
    disabled_at: u64,
    declared: u64,
    users: OrdMap<String, Arc<User>>,
    roles: OrdMap<String, Arc<Role>>,
    bytes: u64,
    /// Made when first asked for; a change of a role makes another.
    quotas: OnceLock<Quotas>,
}

#[derive(Debug)]
struct User {
    facts: AuthUser,
    /// Made when first asked for; a change of one of its roles makes another user of it.
    grants: OnceLock<Grants>,
}

#[derive(Debug)]
struct Role {
    facts: AuthRole,
    /// What it gives by itself; made when first asked for.
    grants: OnceLock<Grants>,
}

/// What a user may do by all of its roles together, or by one role.
#[derive(Debug)]
struct Grants {
    read: Intervals,
    write: Intervals,
}

impl Default for Auth {
    fn default() -> Self {
        Self {
            enabled: false,
            revision: 1,
            token_key: Bytes::new(),
            disabled_at: 0,
            declared: 0,
            users: OrdMap::new(),
            roles: OrdMap::new(),
            bytes: 0,
            quotas: OnceLock::new(),
        }
    }
}

/// What somebody may do.
enum May<'a> {
    Everything,
    As(&'a User),
    /// Nobody of this store, with these roles.
    With(&'a str, &'a [String]),
}

/// How far somebody has access.
enum Reach<'a> {
    /// Up to this key, which is behind the one that was asked for.
    Before(&'a [u8]),
    All,
}

impl Auth {
    /// Whether users and roles count.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Counts the changes; 1 before the first.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Another number whenever what somebody may do can be another.
    pub fn stamp(&self) -> u64 {
        2 * self.revision + u64::from(self.enabled)
    }

    /// What tokens are signed with; empty before authentication is turned on for the first time.
    pub fn token_key(&self) -> &Bytes {
        &self.token_key
    }

    pub(super) fn set_token_key(&mut self, key: Bytes) {
        self.token_key = key;
    }

    /// The mark of the declaration that was carried out last; 0 for none.
    pub fn declared(&self) -> u64 {
        self.declared
    }

    pub fn user(&self, name: &str) -> Option<&AuthUser> {
        self.users.get(name).map(|user| &user.facts)
    }

    pub fn role(&self, name: &str) -> Option<&AuthRole> {
        self.roles.get(name).map(|role| &role.facts)
    }

    pub fn user_count(&self) -> usize {
        self.users.len()
    }

    /// Ascending by name.
    pub fn users(&self) -> impl Iterator<Item = &AuthUser> {
        self.users.values().map(|user| &user.facts)
    }

    /// Ascending by name.
    pub fn roles(&self) -> impl Iterator<Item = &AuthRole> {
        self.roles.values().map(|role| &role.facts)
    }

    /// What a token of this user says that it was issued for. It changes with the password, with the user, and whenever
    /// authentication is turned off, so that tokens end then.
    pub fn since(&self, name: &str) -> Option<u64> {
        self.users.get(name).map(|user| user.facts.since.max(self.disabled_at))
    }

    /// What all of it takes in memory, about.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a store that was never asked for users would hold the same.
    fn is_untouched(&self) -> bool {
        self.revision == 1 && self.users.is_empty() && self.roles.is_empty() && self.token_key.is_empty()
    }

    /// Refuses a user whose token has ended, and one that there is not. `None`: everything is allowed.
    fn known<'a>(&'a self, who: Who<'a>) -> Result<May<'a>, Error> {
        let (name, since) = match who {
            _ if !self.enabled => return Ok(May::Everything),
            Who::Internal => return Ok(May::Everything),
            Who::Nobody => return Err(Error::UserEmpty),
            Who::Mapped { name, roles } => return Ok(May::With(name, roles)),
            Who::User { name, since } => (name, since),
        };
        match self.users.get(name) {
            // No token stands behind a certificate.
            Some(user) if since == 0 || since == user.facts.since.max(self.disabled_at) => Ok(May::As(user)),
            None if since == 0 => Err(Error::UserNotFound),
            _ => Err(Error::InvalidAuthToken),
        }
    }

    /// Whether `who` is still whom it was taken for. One that is named by a certificate need not be known.
    pub fn check_user(&self, who: Who<'_>) -> Result<(), Error> {
        match self.known(who) {
            Ok(_) | Err(Error::UserNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Refuses who is no root.
    pub fn check_root(&self, who: Who<'_>) -> Result<(), Error> {
        match self.known(who)? {
            May::As(user) if !user.is_root() => Err(Error::PermissionDenied),
            May::With(_, roles) if !is_root(roles) => Err(Error::PermissionDenied),
            _ => Ok(()),
        }
    }

    /// Refuses access to keys that no role of the user's gives. `range_end` is that of a range: empty for the one key, `\0` for
    /// everything from `key` on.
    pub fn check(&self, who: Who<'_>, key: &[u8], range_end: &[u8], access: Access) -> Result<(), Error> {
        match self.known(who) {
            Ok(May::Everything) => Ok(()),
            Ok(May::As(user)) if user.is_root() || self.grants(user).of(access).cover(key, range_end) => Ok(()),
            Ok(May::With(_, roles)) if is_root(roles) || self.gives(roles, key, range_end, access) => Ok(()),
            Ok(May::As(_) | May::With(..)) | Err(Error::UserNotFound) => Err(Error::PermissionDenied),
            Err(error) => Err(error),
        }
    }

    /// Where the keys end that begin with this one and that `who` has access to without a gap, as far as one look says; refuses as
    /// [`Self::check`] does where already this one is none of them. So who asks for many keys need not ask for each.
    fn reach<'a>(&'a self, who: Who<'a>, key: &[u8], access: Access) -> Result<Reach<'a>, Error> {
        let end = match self.known(who) {
            Ok(May::Everything) => return Ok(Reach::All),
            Ok(May::As(user)) if user.is_root() => return Ok(Reach::All),
            Ok(May::With(_, roles)) if is_root(roles) => return Ok(Reach::All),
            Ok(May::As(user)) => self.grants(user).of(access).end_of(key),
            Ok(May::With(_, roles)) => {
                let roles = roles.iter().filter_map(|role| self.roles.get(role));
                roles.filter_map(|role| role.grants().of(access).end_of(key)).max_by(|a, b| a.cmp(b))
            }
            Err(Error::UserNotFound) => None,
            Err(error) => return Err(error),
        };
        match end.ok_or(Error::PermissionDenied)? {
            End::Before(end) => Ok(Reach::Before(end)),
            End::Open => Ok(Reach::All),
        }
    }

    /// Whether `caller` may know of a user or of a role: root may, and whose own it is.
    pub fn check_own(&self, caller: &Caller, is_own: impl FnOnce(&AuthUser) -> bool) -> Result<(), Error> {
        let is_allowed = match self.known(caller.who())? {
            May::Everything => true,
            May::As(user) => user.is_root() || is_own(&user.facts),
            May::With(_, roles) if is_root(roles) => true,
            May::With(name, roles) => {
                let mut own = AuthUser { name: name.to_owned(), roles: roles.to_vec(), ..AuthUser::default() };
                own.roles.sort();
                is_own(&own)
            }
        };
        if is_allowed { Ok(()) } else { Err(Error::PermissionDenied) }
    }

    fn grants<'a>(&self, user: &'a User) -> &'a Grants {
        let roles = user.facts.roles.iter().filter_map(|role| self.role(role));
        user.grants.get_or_init(|| Grants::of_roles(roles))
    }

    /// Whether one of these roles gives it by itself. Of a user of this store, roles count together; here that would have to be found out
    /// anew with each command, and would take as long as the roles are large.
    fn gives(&self, roles: &[String], key: &[u8], range_end: &[u8], access: Access) -> bool {
        roles.iter().filter_map(|role| self.roles.get(role)).any(|role| role.grants().of(access).cover(key, range_end))
    }

    /// Takes a stored change over; false if it is none of users and roles.
    pub(super) fn load(&mut self, change: &Change) -> bool {
        match change {
            Change::AuthUser(user) => self.put_user(user.clone()),
            Change::AuthRole(role) => self.put_role(role.clone()),
            Change::Auth(facts) => {
                self.enabled = facts.enabled;
                self.revision = facts.revision;
                self.token_key = Bytes::copy_from_slice(&facts.token_key);
                self.disabled_at = facts.disabled_at;
                self.declared = facts.declared;
            }
            _ => return false,
        }
        true
    }

    /// Everything that makes this from nothing; empty if there is nothing, since an older build could not load it.
    pub(super) fn changes(&self) -> impl Iterator<Item = Change> {
        let roles = self.roles().cloned().map(Change::AuthRole);
        let users = self.users().cloned().map(Change::AuthUser);
        let facts = (!self.is_untouched()).then(|| Change::Auth(self.facts()));
        roles.chain(users).chain(facts)
    }

    /// True if what is said of its name here is this.
    pub(super) fn holds(&self, change: &Change) -> bool {
        match change {
            Change::AuthUser(user) => self.user(&user.name) == Some(user),
            Change::AuthRole(role) => self.role(&role.name) == Some(role),
            Change::Auth(facts) => facts.revision >= self.revision,
            _ => false,
        }
    }

    fn facts(&self) -> AuthFacts {
        AuthFacts {
            enabled: self.enabled,
            revision: self.revision,
            token_key: self.token_key.clone(),
            disabled_at: self.disabled_at,
            declared: self.declared,
        }
    }

    fn put_user(&mut self, user: AuthUser) {
        let (name, gone) = (user.name.clone(), user.gone);
        // What was decoded shares the buffer of its message, and a user stays for long.
        let facts = AuthUser { password_hash: Bytes::copy_from_slice(&user.password_hash), ..user };
        let bytes = entry_bytes(&facts);
        let before = if gone {
            self.users.remove(&name)
        } else {
            self.users.insert(name, Arc::new(User { facts, grants: OnceLock::new() }))
        };
        self.bytes += if gone { 0 } else { bytes };
        self.bytes -= before.map_or(0, |before| entry_bytes(&before.facts));
    }

    fn put_role(&mut self, mut role: AuthRole) {
        for permission in &mut role.permissions {
            permission.key = Bytes::copy_from_slice(&permission.key);
            permission.range_end = Bytes::copy_from_slice(&permission.range_end);
        }
        let (name, gone) = (role.name.clone(), role.gone);
        let bytes = entry_bytes(&role);
        let made = Arc::new(Role { facts: role, grants: OnceLock::new() });
        let before = if gone { self.roles.remove(&name) } else { self.roles.insert(name.clone(), made) };
        self.bytes += if gone { 0 } else { bytes };
        self.bytes -= before.map_or(0, |before| entry_bytes(&before.facts));
        self.quotas = OnceLock::new();
        // What they may do is another thing now.
        let holders = self.users.values().filter(|user| user.facts.has(&name)).map(|user| user.facts.clone());
        for facts in holders.collect::<Vec<_>>() {
            self.users.insert(facts.name.clone(), Arc::new(User { facts, grants: OnceLock::new() }));
        }
    }
}

fn entry_bytes(entry: &impl prost::Message) -> u64 {
    ENTRY_BYTES + entry.encoded_len() as u64
}

impl AuthUser {
    /// Whether it has this role.
    pub fn has(&self, role: &str) -> bool {
        self.roles.binary_search_by(|one| one.as_str().cmp(role)).is_ok()
    }
}

fn is_root(roles: &[String]) -> bool {
    roles.iter().any(|role| role == ROOT)
}

impl User {
    fn is_root(&self) -> bool {
        self.facts.has(ROOT)
    }
}

impl Role {
    fn grants(&self) -> &Grants {
        self.grants.get_or_init(|| Grants::of_roles([&self.facts]))
    }
}

impl Grants {
    fn of_roles<'a>(roles: impl IntoIterator<Item = &'a AuthRole> + Clone) -> Self {
        let of = |access: Type| {
            let gives = |given: i32| given == Type::Readwrite as i32 || given == access as i32;
            let granted = roles.clone().into_iter().flat_map(|role| &role.permissions);
            let granted = granted.filter(|permission| gives(permission.perm_type));
            Intervals::of(granted.map(|permission| (&permission.key[..], &permission.range_end[..])))
        };
        Self { read: of(Type::Read), write: of(Type::Write) }
    }

    fn of(&self, access: Access) -> &Intervals {
        match access {
            Access::Read => &self.read,
            Access::Write => &self.write,
        }
    }
}
