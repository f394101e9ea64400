//! What etcd keeps in which bucket, and the state that it makes here.
//!
//! ```text
//! key         revision, place in it -> mvccpb.KeyValue; a deletion's key ends in `t`, and its value has the key alone
//! meta        the revision of a compaction that was begun, and of one that has ended; the schema's version
//! lease       id -> leasepb.Lease: granted, and what was left at the last checkpoint; when it ends etcd stores nowhere, and neither do we
//! auth        whether users count, and the auth revision
//! authUsers   name -> authpb.User
//! authRoles   name -> authpb.Role
//! ```
//! A compaction that was begun counts: who reads below is refused by etcd from then on, though the file still holds some of it.
//! Absent: buckets of etcd's members, cluster and alarms, which mean nothing in another cluster.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message as _;

use super::bolt::Bolt;
use super::{About, Error};
use crate::kv::{self, Loader, State, TTL_MAX_SECONDS};
use crate::pb::KeyValue;
use crate::pb::authpb::{Permission, UserAddOptions};
use crate::pb::log::{self, AuthFacts, AuthRole, AuthUser, Change, change};
use crate::secure::password::Passwords;

/// Bytes of a revision as a key: number, `_`, place.
const REVISION_BYTES: usize = 17;
const TOMBSTONE: u8 = b't';
/// Users and leases that are named in one note.
const NAMED_MAX: usize = 8;

/// etcd's `leasepb.Lease`.
#[derive(Clone, PartialEq, prost::Message)]
struct Lease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl: i64,
    #[prost(int64, tag = "3")]
    remaining_ttl: i64,
}

/// etcd's `authpb.User`.
#[derive(Clone, PartialEq, prost::Message)]
struct User {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "bytes", tag = "2")]
    password: Bytes,
    #[prost(string, repeated, tag = "3")]
    roles: Vec<String>,
    #[prost(message, optional, tag = "4")]
    options: Option<UserAddOptions>,
}

/// etcd's `authpb.Role`.
#[derive(Clone, PartialEq, prost::Message)]
struct Role {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    permissions: Vec<Permission>,
}

/// The state in a file.
pub(super) fn load(bolt: &Bolt, name: &str) -> Result<(State, About), Error> {
    for bucket in ["key", "meta"] {
        if !bolt.has_bucket(bucket) {
            return Err(Error::NotEtcd { name: name.to_owned(), bucket });
        }
    }
    let mut content = Content { bolt, name, loader: Loader::new(), about: About::default() };
    content.leases()?;
    let revision = content.keys()?;
    content.missing_leases()?;
    content.auth()?;
    content.push(change::Change::ClusterVersion(kv::apply_version()))?;
    let Content { loader, about, .. } = content;
    let state = loader.finish(revision).map_err(|error| damaged(name, error))?;
    Ok((state, about))
}

fn damaged(name: &str, reason: impl ToString) -> Error {
    Error::Damaged { name: name.to_owned(), reason: reason.to_string() }
}

/// What was taken over so far.
struct Content<'a> {
    bolt: &'a Bolt,
    name: &'a str,
    loader: Loader,
    about: About,
}

impl Content<'_> {
    fn damaged(&self, reason: impl ToString) -> Error {
        damaged(self.name, reason)
    }

    fn push(&mut self, change: change::Change) -> Result<(), Error> {
        self.loader.load(Change { change: Some(change) }).map_err(|error| self.damaged(error))
    }

    /// The value of one key of a small bucket.
    fn value(&self, bucket: &str, key: &str) -> Result<Option<Bytes>, Error> {
        for entry in self.bolt.bucket(bucket)? {
            let (found, value) = entry?;
            if found == key.as_bytes() {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    fn leases(&mut self) -> Result<(), Error> {
        for entry in self.bolt.bucket("lease")? {
            let (key, value) = entry?;
            let lease = Lease::decode(value).map_err(|error| self.damaged(error))?;
            if key != lease.id.to_be_bytes()[..] || lease.id == 0 {
                return Err(self.damaged(format!("the lease {:x} has the key {key:x?}", lease.id)));
            }
            // As etcd when it starts: none is shorter.
            let ttl = lease.ttl.clamp(1, TTL_MAX_SECONDS);
            let remaining_ttl = Some(lease.remaining_ttl).filter(|left| (1..ttl).contains(left)).unwrap_or(0);
            self.push(change::Change::Lease(log::Lease { id: lease.id, ttl, remaining_ttl }))?;
            self.about.leases += 1;
        }
        Ok(())
    }

    /// All versions; returns the revision of the last change.
    fn keys(&mut self) -> Result<i64, Error> {
        let begun = self.compaction("scheduledCompactRev")?;
        let compacted = begun.max(self.compaction("finishedCompactRev")?);
        self.about.version = self.version()?;
        // Every revision up to this one is there, but for those up to `without`, of which one is not.
        let (mut newest, mut without) = (1i64, 0i64);
        for entry in self.bolt.bucket("key")? {
            let (key, value) = entry?;
            let (revision, is_tombstone) = parse_revision(&key).map_err(|reason| self.damaged(reason))?;
            if revision > newest.saturating_add(1) {
                without = revision - 1;
            }
            newest = revision;
            let kv = KeyValue::from_encoded(&value).map_err(|error| self.damaged(error))?;
            if kv.key().is_empty() && value.is_empty() {
                // What `etcdutl snapshot restore --bump-revision` leaves: a revision that nothing happened in.
                without = revision;
                continue;
            }
            let kv = if is_tombstone { KeyValue::tombstone(kv.key(), revision) } else { kv };
            let x = kv.fields();
            if x.mod_revision != revision || x.version < i64::from(!is_tombstone) {
                let (version, says) = (x.version, x.mod_revision);
                return Err(self.damaged(format!("revision {revision} has a version {version} of revision {says}")));
            }
            self.push(change::Change::Version(kv))?;
        }
        if without > compacted {
            self.about.notes.push(format!(
                "revision {without} and those before are compacted here: the file lacks some of them, as etcd's do after a restore with \
                 --bump-revision"
            ));
        }
        let compacted = compacted.max(without);
        self.push(change::Change::Compacted(compacted))?;
        Ok(newest.max(compacted))
    }

    fn compaction(&self, key: &str) -> Result<i64, Error> {
        let Some(value) = self.value("meta", key)? else { return Ok(0) };
        parse_revision(&value).map(|found| found.0).map_err(|reason| self.damaged(format!("{key}: {reason}")))
    }

    /// As etcd tells it: since 3.6 it is written down, and 3.5 was the first to write the term.
    fn version(&self) -> Result<String, Error> {
        if let Some(version) = self.value("meta", "storageVersion")? {
            return String::from_utf8(version.into()).map_err(|_| self.damaged("storageVersion is no text"));
        }
        let version = if self.value("meta", "term")?.is_some() { "3.5" } else { "3.4 or older" };
        Ok(version.to_owned())
    }

    /// A key whose lease is gone stays for ever in etcd. Here every lease that a key names exists, so it gets the longest there is.
    fn missing_leases(&mut self) -> Result<(), Error> {
        let missing = self.loader.missing_leases();
        for id in &missing {
            self.push(change::Change::Lease(log::Lease { id: *id, ttl: TTL_MAX_SECONDS, remaining_ttl: 0 }))?;
        }
        if !missing.is_empty() {
            let names = named(missing.iter().map(|id| format!("{id:x}")));
            self.about.notes.push(format!(
                "keys name leases that the file does not have, so that in etcd they never end: {names}; here these leases last \
                 {TTL_MAX_SECONDS} s"
            ));
        }
        Ok(())
    }

    fn auth(&mut self) -> Result<(), Error> {
        let number = |value: Bytes| <[u8; 8]>::try_from(&value[..]).map(u64::from_be_bytes);
        let revision = match self.value("auth", "authRevision")? {
            None => 1,
            Some(value) => number(value).map_err(|_| self.damaged("authRevision is no number"))?.max(1),
        };
        let enabled = self.value("auth", "authEnabled")?.is_some_and(|value| value == [1u8][..]);
        for entry in self.bolt.bucket("authRoles")? {
            let (key, value) = entry?;
            let Role { name, mut permissions } = Role::decode(value).map_err(|error| self.damaged(error))?;
            self.check_name(&key, &name)?;
            permissions.sort_by(|a, b| a.key.cmp(&b.key));
            self.push(change::Change::AuthRole(AuthRole { name, permissions, ..AuthRole::default() }))?;
            self.about.roles += 1;
        }
        let mut without = Vec::new();
        for entry in self.bolt.bucket("authUsers")? {
            let (key, value) = entry?;
            let user = User::decode(value).map_err(|error| self.damaged(error))?;
            self.check_name(&key, &user.name)?;
            let no_password = user.options.is_some_and(|options| options.no_password);
            let is_usable = Passwords::is_hash(&user.password);
            if !is_usable && !no_password {
                without.push(user.name.clone());
            }
            self.push(change::Change::AuthUser(AuthUser {
                name: user.name,
                password_hash: if is_usable && !no_password { user.password } else { Bytes::new() },
                no_password,
                roles: user.roles.into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
                // Tokens of etcd are of no use here, and of ours there are none yet.
                since: revision,
                gone: false,
            }))?;
            self.about.users += 1;
        }
        if !without.is_empty() {
            self.about.notes.push(format!(
                "users whose password's hash cannot be checked here, and who need another password: {}",
                named(without.iter().map(|name| format!("{name:?}")))
            ));
        }
        // Whoever restores makes the key that tokens are signed with.
        self.push(change::Change::Auth(AuthFacts { enabled, revision, ..AuthFacts::default() }))
    }

    fn check_name(&self, key: &[u8], name: &str) -> Result<(), Error> {
        if name.is_empty() || name.as_bytes() != key {
            let key = String::from_utf8_lossy(key);
            return Err(self.damaged(format!("{name:?} is kept under the key {key:?}")));
        }
        Ok(())
    }
}

/// The first few, and how many more there are.
fn named(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let named = names.take(NAMED_MAX).collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// The revision in a key, and whether it is of a deletion.
fn parse_revision(key: &[u8]) -> Result<(i64, bool), String> {
    let (number, rest) = key.split_first_chunk::<8>().ok_or_else(|| format!("{key:x?} is no revision"))?;
    let revision = i64::from_be_bytes(*number);
    match *rest {
        [b'_', ref place @ ..] if key.len() == REVISION_BYTES && revision > 0 && place[0] < 0x80 => {
            Ok((revision, false))
        }
        [b'_', ref place @ .., TOMBSTONE] if key.len() == REVISION_BYTES + 1 && revision > 0 && place[0] < 0x80 => {
            Ok((revision, true))
        }
        _ => Err(format!("{key:x?} is no revision")),
    }
}
