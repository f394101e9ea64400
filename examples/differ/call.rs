//! A request as data: to which member, through which door, what.
//!
//! Owns the form that is generated, shrunk, written to a file and played again: one JSON object a line. What is known only when it is
//! played stands in it as a symbol, so that a shorter sequence still means something: `$now-3` is a revision, `$lease:0` the newest
//! lease id that the server has chosen, `$lock:0` and `$leader:0` what the newest Lock and Campaign gave, `$member:1` a member's id, `$url:0` the URL of
//! one for its peers.
//! Absent: meanings; what a server answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Kinds of steps that are no request: a member ends and starts again; a lease ends with its keys.
pub const RESTART: &str = "restart";
pub const EXPIRE: &str = "expire";
/// Who shows a token that is none.
pub const STRANGER: &str = "stranger";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    Grpc,
    Json,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The slot of the member of ours that is asked.
    pub member: u64,
    pub door: Door,
    /// `Service/Method`, [`RESTART`] or [`EXPIRE`].
    pub method: String,
    /// The request's fields, or of a stream of requests a list; through the gateway a string is the body itself. A watch's are `slot` (the stream) and `request`, or
    /// `history`: a watcher of its own, for what has been.
    pub body: Value,
    /// Whose token is shown; [`STRANGER`]: one that nobody has issued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Paths of the gateway, and what they call.
pub const PATHS: &[(&str, &str)] = &[
    ("kv/range", "KV/Range"),
    ("kv/put", "KV/Put"),
    ("kv/deleterange", "KV/DeleteRange"),
    ("kv/txn", "KV/Txn"),
    ("kv/compaction", "KV/Compact"),
    ("lease/grant", "Lease/LeaseGrant"),
    ("lease/revoke", "Lease/LeaseRevoke"),
    ("kv/lease/revoke", "Lease/LeaseRevoke"),
    ("lease/keepalive", "Lease/LeaseKeepAlive"),
    ("lease/timetolive", "Lease/LeaseTimeToLive"),
    ("kv/lease/timetolive", "Lease/LeaseTimeToLive"),
    ("lease/leases", "Lease/LeaseLeases"),
    ("kv/lease/leases", "Lease/LeaseLeases"),
    ("cluster/member/add", "Cluster/MemberAdd"),
    ("cluster/member/remove", "Cluster/MemberRemove"),
    ("cluster/member/update", "Cluster/MemberUpdate"),
    ("cluster/member/list", "Cluster/MemberList"),
    ("cluster/member/promote", "Cluster/MemberPromote"),
    ("maintenance/alarm", "Maintenance/Alarm"),
    ("maintenance/status", "Maintenance/Status"),
    ("maintenance/defragment", "Maintenance/Defragment"),
    ("maintenance/hash", "Maintenance/Hash"),
    ("maintenance/hashkv", "Maintenance/HashKV"),
    ("maintenance/transfer-leadership", "Maintenance/MoveLeader"),
    ("maintenance/downgrade", "Maintenance/Downgrade"),
    ("auth/status", "Auth/AuthStatus"),
    ("auth/enable", "Auth/AuthEnable"),
    ("auth/disable", "Auth/AuthDisable"),
    ("auth/authenticate", "Auth/Authenticate"),
    ("auth/user/get", "Auth/UserGet"),
    ("auth/user/list", "Auth/UserList"),
    ("auth/user/delete", "Auth/UserDelete"),
    ("auth/user/add", "Auth/UserAdd"),
    ("auth/user/changepw", "Auth/UserChangePassword"),
    ("auth/user/grant", "Auth/UserGrantRole"),
    ("auth/user/revoke", "Auth/UserRevokeRole"),
    ("auth/role/add", "Auth/RoleAdd"),
    ("auth/role/delete", "Auth/RoleDelete"),
    ("auth/role/grant", "Auth/RoleGrantPermission"),
    ("auth/role/revoke", "Auth/RoleRevokePermission"),
    ("auth/role/get", "Auth/RoleGet"),
    ("auth/role/list", "Auth/RoleList"),
    ("election/campaign", "Election/Campaign"),
    ("election/proclaim", "Election/Proclaim"),
    ("election/leader", "Election/Leader"),
    ("election/resign", "Election/Resign"),
    ("lock/lock", "Lock/Lock"),
    ("lock/unlock", "Lock/Unlock"),
];

impl Call {
    /// The gateway's path for the method. Where there are several, the body decides: always the same one for the same request.
    pub fn path(&self) -> &'static str {
        let all: Vec<&str> = PATHS.iter().filter(|(_, method)| *method == self.method).map(|(path, _)| *path).collect();
        assert!(!all.is_empty(), "{} has no path", self.method);
        all[self.body.to_string().len() % all.len()]
    }

    /// Whether the member answers by what it has applied itself.
    pub fn is_local(&self) -> bool {
        let own = ["Maintenance/", "Auth/", "Cluster/MemberList", "Lease/LeaseL", "Lease/LeaseT", "Lease/LeaseK"];
        own.iter().any(|start| self.method.starts_with(start))
            || self.body.to_string().contains("\"serializable\":true")
    }

    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a call is JSON")
    }
}

/// What one server has told that later requests need.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// By kind (`lease`, `lock`, `leader`, `member`, `url`), the newest first.
    kinds: BTreeMap<&'static str, Vec<Value>>,
}

impl Memory {
    const KEPT: usize = 8;

    pub fn note(&mut self, kind: &'static str, value: Value) {
        let kept = self.kinds.entry(kind).or_default();
        kept.insert(0, value);
        kept.truncate(Self::KEPT);
    }

    fn get(&self, kind: &str, index: usize) -> Option<&Value> {
        self.kinds.get(kind)?.get(index)
    }

    /// `body` with its symbols replaced. One that nothing has been told for becomes null, which is an unset field.
    pub fn resolve(&self, body: &Value, now: i64) -> Value {
        match body {
            Value::String(text) => self.symbol(text, now).unwrap_or_else(|| body.clone()),
            Value::Array(items) => items.iter().map(|item| self.resolve(item, now)).collect(),
            Value::Object(fields) => fields.iter().map(|(name, v)| (name.clone(), self.resolve(v, now))).collect(),
            other => other.clone(),
        }
    }

    fn symbol(&self, text: &str, now: i64) -> Option<Value> {
        let symbol = text.strip_prefix('$')?;
        if let Some(offset) = symbol.strip_prefix("now") {
            let offset: i64 = if offset.is_empty() { 0 } else { offset.parse().ok()? };
            // What is before everything is the first revision: 0 and less have meanings of their own.
            return Some(Value::String((now + offset).max(1).to_string()));
        }
        let (kind, index) = symbol.split_once(':')?;
        Some(self.get(kind, index.parse().ok()?).cloned().unwrap_or(Value::Null))
    }
}
