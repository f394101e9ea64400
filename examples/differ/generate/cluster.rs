//! Maintenance, Cluster, and Auth while it is off: nobody is root, so it stays so.

use serde_json::{Value, json};

use super::Generator;

impl Generator {
    pub(super) fn cluster(&mut self) -> (&'static str, Value) {
        match self.rng.u32(..100) {
            0..20 => ("Maintenance/Status", json!({})),
            20..45 => {
                let revision = if self.chance(3) { json!(0) } else { self.revision() };
                ("Maintenance/HashKV", json!({ "revision": revision }))
            }
            45..50 => ("Maintenance/Hash", json!({})),
            50..65 => ("Maintenance/Alarm", self.alarm()),
            65..67 => ("Maintenance/Defragment", json!({})),
            67..72 => ("Maintenance/MoveLeader", json!({ "targetID": self.pick(&["0", "77"]) })),
            72..77 => ("Maintenance/Downgrade", self.downgrade()),
            77..79 => ("Maintenance/Snapshot", json!({})),
            79..92 => ("Cluster/MemberList", json!({ "linearizable": self.rng.bool() })),
            92..94 => ("Cluster/MemberRemove", json!({ "ID": "77" })),
            94..96 => ("Cluster/MemberPromote", json!({ "ID": self.member_id() })),
            96..98 => ("Cluster/MemberUpdate", json!({ "ID": "77", "peerURLs": self.urls() })),
            _ => ("Cluster/MemberAdd", json!({ "peerURLs": self.bad_urls(), "isLearner": self.rng.bool() })),
        }
    }

    /// NOSPACE only: CORRUPT stops a member's clients for good.
    fn alarm(&mut self) -> Value {
        let alarm = self.pick(&["NONE", "NOSPACE", "CORRUPT"]);
        match self.rng.u32(..10) {
            0..2 => {
                self.alarm_for = Some(self.rng.u32(2..15));
                json!({ "action": "ACTIVATE", "alarm": "NOSPACE", "memberID": "$member:0" })
            }
            2..6 => json!({ "action": "DEACTIVATE", "alarm": "NOSPACE", "memberID": "$member:0" }),
            6 => json!({ "action": "DEACTIVATE", "alarm": alarm, "memberID": "77" }),
            _ => json!({ "action": "GET", "alarm": alarm, "memberID": self.pick(&["0", "77", "$member:0"]) }),
        }
    }

    /// Users without passwords: a hash takes etcd a while.
    pub(super) fn auth(&mut self) -> (&'static str, Value) {
        let (user, role) = (self.pick(&["", "u", "v", "w"]), self.pick(&["", "r", "s", "t"]));
        match self.rng.u32(..22) {
            0 => ("Auth/AuthStatus", json!({})),
            1 => ("Auth/AuthEnable", json!({})),
            2 => ("Auth/AuthDisable", json!({})),
            3 => ("Auth/Authenticate", json!({ "name": user, "password": "secret" })),
            4 => ("Auth/UserGet", json!({ "name": user })),
            5 => ("Auth/UserList", json!({})),
            6 => ("Auth/RoleGet", json!({ "role": role })),
            7 => ("Auth/RoleList", json!({})),
            8..11 => ("Auth/UserAdd", json!({ "name": user, "options": { "no_password": true } })),
            11 => ("Auth/UserDelete", json!({ "name": user })),
            12 => ("Auth/UserChangePassword", json!({ "name": user })),
            13..15 => ("Auth/UserGrantRole", json!({ "user": user, "role": role })),
            15 => ("Auth/UserRevokeRole", json!({ "name": user, "role": role })),
            16..18 => ("Auth/RoleAdd", json!({ "name": role })),
            18 => ("Auth/RoleDelete", json!({ "role": role })),
            19..21 => self.grant_permission(role),
            _ => {
                let [key, range_end] = self.permitted();
                ("Auth/RoleRevokePermission", json!({ "role": role, "key": key, "range_end": range_end }))
            }
        }
    }

    fn grant_permission(&mut self, role: &str) -> (&'static str, Value) {
        let [key, range_end] = self.permitted();
        let kind = self.pick(&["READ", "WRITE", "READWRITE"]);
        let perm = json!({ "permType": kind, "key": key, "range_end": range_end });
        let perm = if self.chance(10) { Value::Null } else { perm };
        ("Auth/RoleGrantPermission", json!({ "name": role, "perm": perm }))
    }

    /// Keys `a`, `b`, `c` and `x`, each with one end: of two permissions for one key etcd finds the first only. Also ends that are
    /// none.
    fn permitted(&mut self) -> [&'static str; 2] {
        let all = [["YQ==", ""], ["Yg==", "Yw=="], ["Yw==", "AA=="], ["eA==", "YQ=="], ["", ""]];
        all[self.rng.usize(..all.len())]
    }

    fn downgrade(&mut self) -> Value {
        let version = self.pick(&["", "x", "3.6", "3.6.0", "3.5.0", "2.0.0", "3.99.0", "v3.6.0"]);
        json!({ "action": self.pick(&["VALIDATE", "CANCEL"]), "version": version })
    }

    fn member_id(&mut self) -> Value {
        json!(self.pick(&["77", "0", "$member:0"]))
    }

    fn urls(&mut self) -> Value {
        if self.chance(2) { self.bad_urls() } else { json!(["http://127.9.9.9:2380"]) }
    }

    fn bad_urls(&mut self) -> Value {
        let all = [
            json!([]),
            json!([""]),
            json!(["127.9.9.9:2380"]),
            json!(["http://127.9.9.9"]),
            json!(["ftp://127.9.9.9:2380"]),
            json!(["http://127.9.9.9:2380/path"]),
            json!(["http://127.9.9.9:2380", "x"]),
            json!(["$url:0"]),
        ];
        all[self.rng.usize(..all.len())].clone()
    }
}
