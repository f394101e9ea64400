//! Users and roles: three users and root ask, and what they may do changes all the time.
//!
//! Invariants: root stays root, its password and that of the others is the user's name, and authentication stays on, so that whoever plays the
//! requests can always ask for a token. What waits for others, and streams that stay open, are root's: a watch that has lost its permission ends
//! with us and goes on with etcd.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::Generator;
use crate::call::{Call, Door, PATHS, STRANGER};

const ROOT: &str = "root";
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
        let changes = self.chance(CHANGE_ONE_IN);
        let (method, body) = if changes { self.auth_change() } else { (String::new(), Value::Null) };
        let call = if changes {
            let door = if PATHS.iter().any(|(_, with_path)| *with_path == method) { self.door } else { Door::Grpc };
            Call { method, body, door, ..call }
        } else {
            call
        };
        let by_root = ["Watch/", "Lock/", "Election/"].iter().any(|start| call.method.starts_with(start))
            || call.method == "Maintenance/Alarm" && call.body["action"] != "GET"
            // What is malformed is looked at before or after who asks.
            || call.body.is_string();
        let user = match self.rng.u32(..100) {
            // Changes by others than root are refused.
            _ if by_root => Some(ROOT),
            0..60 if changes => Some(ROOT),
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
            0..40 => {
                let mut range = json!({});
                self.interval(&mut range);
                let kind = self.pick(&["READ", "WRITE", "READWRITE"]);
                let mut perm = json!({ "permType": kind, "key": range["key"] });
                if !range["range_end"].is_null() {
                    perm["range_end"] = range["range_end"].clone();
                }
                ("RoleGrantPermission", json!({ "name": role, "perm": perm }))
            }
            40..58 => {
                let mut body = json!({ "role": role });
                self.interval(&mut body);
                ("RoleRevokePermission", body)
            }
            58..70 => ("UserGrantRole", json!({ "user": user, "role": self.pick(&["r1", "r2", "r3", "none"]) })),
            70..76 => ("UserRevokeRole", json!({ "name": user, "role": role })),
            76..80 => ("RoleGet", json!({ "role": self.pick(&["r1", "r2", "r3", "root", "none"]) })),
            80..84 => ("UserGet", json!({ "name": self.pick(&["u1", "u2", "u3", "root", "none"]) })),
            84..87 => (self.pick(&["UserList", "RoleList", "AuthStatus"]), json!({})),
            87..89 => ("UserChangePassword", json!({ "name": user, "password": user })),
            89..91 => ("RoleDelete", json!({ "role": role })),
            91..93 => ("RoleAdd", json!({ "name": role })),
            93..95 => ("UserDelete", json!({ "name": user })),
            95..97 => ("UserAdd", json!({ "name": user, "password": user })),
            97..99 => ("AuthEnable", json!({})),
            _ => {
                let password = if self.chance(GUESS_ONE_IN) { "wrong" } else { user };
                ("Authenticate", json!({ "name": user, "password": password }))
            }
        };
        (format!("Auth/{method}"), body)
    }
}
