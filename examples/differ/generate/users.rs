//! Users and roles: three users and root ask, and what they may do changes all the time.
//!
//! Invariants: root stays root, its password and that of the others is the user's name, and authentication stays on, so that whoever plays the
//! requests can always ask for a token. What waits for others, and streams that stay open, are root's: a watch that has lost its permission ends
//! with us and goes on with etcd. An alarm is taken off by root, or nobody could write for long.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::Generator;
use crate::call::{Call, Door, PATHS, STRANGER};

pub(super) const ROOT: &str = "root";
const USERS: [&str; 3] = ["u1", "u2", "u3"];
const ROLES: [&str; 3] = ["r1", "r2", "r3"];
/// One request of so many changes users, roles or permissions.
const CHANGE_ONE_IN: u32 = 12;
/// Guesses at a password are bounded by the minute.
const GUESS_ONE_IN: u32 = 60;

fn admin(method: &str, body: Value) -> Call {
    Call { member: 0, door: Door::Grpc, method: method.to_owned(), body, user: None }
}

/// Makes the users, with a role each, and turns authentication on.
pub(super) fn first() -> VecDeque<Call> {
    let mut calls = VecDeque::new();
    for role in ROLES {
        calls.push_back(admin("Auth/RoleAdd", json!({ "name": role })));
    }
    for (user, role) in [ROOT].iter().chain(&USERS).zip([ROOT].iter().chain(&ROLES)) {
        calls.push_back(admin("Auth/UserAdd", json!({ "name": user, "password": user })));
        calls.push_back(admin("Auth/UserGrantRole", json!({ "user": user, "role": role })));
    }
    calls.push_back(admin("Auth/AuthEnable", json!({})));
    calls
}

impl Generator {
    /// A request as one of them asks it, or another one, which changes what they may do.
    pub(super) fn asked_by_somebody(&mut self, call: Call) -> Call {
        if call.user.is_some() {
            return call;
        }
        let changes = self.chance(CHANGE_ONE_IN);
        let (method, body) = if changes { self.auth_change() } else { (String::new(), Value::Null) };
        let call = if changes {
            let door = if PATHS.iter().any(|(_, with_path)| *with_path == method) { self.door } else { Door::Grpc };
            Call { method, body, door, ..call }
        } else {
            call
        };
        let waits = ["Lock/Lock", "Election/Campaign", "Election/Observe"].contains(&call.method.as_str());
        let by_root = waits
            || call.method == "Watch/Watch" && call.body["history"].is_null()
            // What is malformed is looked at before or after who asks.
            || call.body.is_string();
        // Which would end it all.
        let not_by_root = call.method == "Auth/AuthDisable";
        let user = match self.rng.u32(..100) {
            _ if by_root => Some(ROOT),
            // Changes by others than root are refused.
            0..60 if changes && !not_by_root => Some(ROOT),
            0..15 if not_by_root => None,
            0..15 => Some(ROOT),
            15..18 => None,
            18..20 => Some(STRANGER),
            _ => Some(self.pick(&USERS)),
        };
        Call { user: user.map(str::to_owned), ..call }
    }

    fn auth_change(&mut self) -> (String, Value) {
        let (user, role) = (self.pick(&USERS), self.pick(&ROLES));
        let (method, body) = match self.rng.u32(..100) {
            0..40 => ("RoleGrantPermission", self.grant_permission(role)),
            40..52 => {
                let mut body = json!({ "role": role });
                self.interval(&mut body);
                ("RoleRevokePermission", body)
            }
            52..62 => ("UserGrantRole", json!({ "user": user, "role": self.pick(&["r1", "r2", "r3", "none"]) })),
            62..70 => self.user_change(user, role),
            70..74 => ("RoleGet", json!({ "role": self.pick(&["r1", "r2", "r3", "root", "none"]) })),
            74..78 => ("UserGet", json!({ "name": self.pick(&["u1", "u2", "u3", "root", "none"]) })),
            78..81 => (self.pick(&["UserList", "RoleList", "AuthStatus"]), json!({})),
            81..83 => ("UserChangePassword", json!({ "name": user, "password": user })),
            83..87 => ("RoleDelete", json!({ "role": self.pick(&["r1", "r2", "r3", "root"]) })),
            87..92 => ("RoleAdd", json!({ "name": self.pick(&["r1", "r1", "r2", "r2", "r3", "r3", "root", ""]) })),
            92..96 => ("UserAdd", self.new_user(user)),
            96..98 => (self.pick(&["AuthEnable", "AuthDisable"]), json!({})),
            _ => {
                let password = if self.chance(GUESS_ONE_IN) { "wrong" } else { user };
                ("Authenticate", json!({ "name": user, "password": password }))
            }
        };
        (format!("Auth/{method}"), body)
    }

    /// A role has one permission of those that begin with the same key. etcd finds but the first of several when one is granted again, so
    /// that the former stays beside the new one, which nobody can wish.
    fn grant_permission(&mut self, role: &'static str) -> Value {
        if self.chance(60) {
            return json!({ "name": role });
        }
        let mut range = json!({});
        self.interval(&mut range);
        let key = range["key"].as_str().unwrap_or_default();
        let key = key.trim_end_matches('=').replace('-', "+").replace('_', "/");
        let range = self.ranges.entry((role, key)).or_insert(range);
        let mut perm = range.clone();
        perm["permType"] = json!(self.pick(&["READ", "WRITE", "READWRITE"]));
        json!({ "name": role, "perm": perm })
    }

    /// What is taken from a user; from root nothing can be.
    fn user_change(&mut self, user: &str, role: &str) -> (&'static str, Value) {
        match self.rng.u32(..10) {
            0..6 => ("UserRevokeRole", json!({ "name": user, "role": role })),
            6 => ("UserRevokeRole", json!({ "name": ROOT, "role": ROOT })),
            7 => ("UserDelete", json!({ "name": ROOT })),
            _ => ("UserDelete", json!({ "name": user })),
        }
    }

    /// One who was deleted, or is there; with a password, which is the name, mostly.
    fn new_user(&mut self, user: &str) -> Value {
        match self.rng.u32(..12) {
            0 => json!({ "name": "", "password": user }),
            1 => json!({ "name": user, "options": { "no_password": true } }),
            _ => json!({ "name": user, "password": user }),
        }
    }
}
