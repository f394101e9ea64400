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

    /// One user without a role.
    pub(super) fn auth(&mut self) -> (&'static str, Value) {
        let (user, role) = (json!({ "name": "somebody" }), json!({ "role": "some" }));
        match self.rng.u32(..11) {
            0..2 => ("Auth/AuthStatus", json!({})),
            2 => ("Auth/AuthEnable", json!({})),
            3 => ("Auth/AuthDisable", json!({})),
            4 => ("Auth/Authenticate", json!({ "name": "somebody", "password": "secret" })),
            5 => ("Auth/UserGet", user),
            6 => ("Auth/UserList", json!({})),
            7 => ("Auth/RoleGet", role),
            8 => ("Auth/RoleList", json!({})),
            9 => ("Auth/UserAdd", user),
            _ => ("Auth/UserDelete", user),
        }
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
