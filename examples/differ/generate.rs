//! Random requests over few keys, leases and names, so that they meet. A seed gives the same sequence always.
//!
//! Owns what is tried, and how often: every RPC, every option, values at and beyond each border. It knows no answers; what depends on
//! one stands in a request as a symbol (`call`). Absent: which requests are not sent (`wanted`).

mod cluster;
mod kv;
mod lease;
mod users;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
use serde_json::{Value, json};

use crate::call::{Call, Door, EXPIRE, PATHS, RESTART};

pub struct Generator {
    rng: fastrand::Rng,
    members: u64,
    door: Door,
    /// Locks and elections that somebody holds, as far as requests say: nobody else asks for these, since they would wait.
    held: std::collections::BTreeMap<String, i64>,
    /// Requests until an alarm is taken off.
    alarm_for: Option<u32>,
    /// Users ask, whose permissions change meanwhile.
    has_users: bool,
    /// What a role may be given of the keys from one on.
    ranges: std::collections::BTreeMap<(&'static str, String), Value>,
    /// What comes first.
    first: std::collections::VecDeque<Call>,
    /// Requests until a lease is to end.
    expiry_in: u32,
}

/// One request of so many goes through the gateway, one step is a restart of a member.
const JSON_ONE_IN: u32 = 5;
const RESTART_ONE_IN: u32 = 1500;
/// Of so many, one step waits until a lease has ended, which takes seconds; the first comes early, so that short runs have it.
const EXPIRY_ONE_IN: u32 = 5000;
const FIRST_EXPIRY: u32 = 600;

impl Generator {
    /// For a cluster of so many members.
    pub fn new(seed: u64, members: u64) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            members,
            door: Door::Grpc,
            held: Default::default(),
            alarm_for: None,
            has_users: false,
            ranges: Default::default(),
            first: Default::default(),
            expiry_in: FIRST_EXPIRY,
        }
    }

    /// The same, once there are users, and authentication is on.
    pub fn with_users(seed: u64, members: u64) -> Self {
        Self { has_users: true, first: users::first(), ..Self::new(seed, members) }
    }

    pub fn call(&mut self) -> Call {
        if let Some(call) = self.first.pop_front() {
            return call;
        }
        let call = self.any_call();
        if self.has_users && call.method != RESTART { self.asked_by_somebody(call) } else { call }
    }

    fn any_call(&mut self) -> Call {
        let member = self.rng.u64(..self.members);
        if self.chance(RESTART_ONE_IN) {
            let body = json!({ "kill": self.rng.bool() });
            return Call { member, door: Door::Grpc, method: RESTART.to_owned(), body, user: None };
        }
        self.expiry_in = self.expiry_in.saturating_sub(1);
        // An alarm or a permission could keep its keys out.
        if self.expiry_in == 0 && self.alarm_for.is_none() && !self.has_users {
            self.expiry_in = EXPIRY_ONE_IN;
            return Call { member, door: Door::Grpc, method: EXPIRE.to_owned(), body: self.expiry(), user: None };
        }
        if let Some(left) = &mut self.alarm_for {
            *left -= 1;
            if *left == 0 {
                self.alarm_for = None;
                let body = json!({ "action": "DEACTIVATE", "alarm": "NOSPACE", "memberID": "$member:0" });
                let user = self.has_users.then(|| users::ROOT.to_owned());
                return Call { member, door: Door::Grpc, method: "Maintenance/Alarm".to_owned(), body, user };
            }
        }
        self.door = if self.chance(JSON_ONE_IN) { Door::Json } else { Door::Grpc };
        if self.door == Door::Json && self.chance(25) {
            return self.malformed(member);
        }
        let (method, body) = match self.rng.u32(..1000) {
            0..680 => self.kv(),
            680..840 => self.lease(),
            840..885 => ("Watch/Watch", self.watch()),
            885..900 => {
                let history = self.history();
                return Call { member, door: self.door, method: "Watch/Watch".to_owned(), body: history, user: None };
            }
            900..955 => self.concurrency(),
            955..960 if !self.has_users => self.auth(),
            _ => self.cluster(),
        };
        // Without a path in the gateway there is but one door.
        let door = if PATHS.iter().any(|(_, with_path)| *with_path == method) { self.door } else { Door::Grpc };
        Call { member, door, method: method.to_owned(), body, user: None }
    }

    /// Bodies in which something is wrong, or only looks so.
    fn malformed(&mut self, member: u64) -> Call {
        const BODIES: &[&str] = &[
            "",
            "{",
            "[]",
            "null",
            "1",
            "\"a\"",
            "{}{}",
            "{}x",
            " { } \n",
            r#"{"key":1}"#,
            r#"{"key":"no base64!"}"#,
            r#"{"key":"YQ==","lease":"x"}"#,
            r#"{"key":"YQ==","lease":1.5}"#,
            r#"{"key":"YQ==","lease":99999999999999999999}"#,
            r#"{"key":"YQ==","unknown":1}"#,
            r#"{"key":"YQ==","key":"Yg=="}"#,
            r#"{"key":null}"#,
            r#"{"key":["YQ=="]}"#,
            r#"{"ID":"x"}"#,
            r#"{"ID":true}"#,
            r#"{"key":"YQ==","sort_order":"NEITHER"}"#,
            r#"{"key":"YQ==","serializable":"true"}"#,
        ];
        let methods = ["KV/Range", "KV/Range", "KV/Range", "Lease/LeaseTimeToLive", "Cluster/MemberList"];
        let body = Value::String(BODIES[self.rng.usize(..BODIES.len())].to_owned());
        let method = methods[self.rng.usize(..methods.len())];
        Call { member, door: Door::Json, method: method.to_owned(), body, user: None }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.rng.u32(..one_in) == 0
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.rng.usize(..all.len())]
    }

    /// Bytes as JSON has them; a gateway takes more than one alphabet.
    fn bytes(&mut self, bytes: &[u8]) -> Value {
        let kind = if self.door == Door::Json { self.rng.u32(..8) } else { 7 };
        let text = match kind {
            0 => STANDARD_NO_PAD.encode(bytes),
            1 => URL_SAFE.encode(bytes),
            _ => STANDARD.encode(bytes),
        };
        Value::String(text)
    }

    /// A 64-bit number, as a string or not.
    fn number(&mut self, number: i64) -> Value {
        if self.rng.bool() { json!(number) } else { json!(number.to_string()) }
    }

    /// A revision from a few before the newest to a little after.
    fn revision(&mut self) -> Value {
        let offset = if self.chance(6) { self.rng.i64(-300..=2) } else { self.rng.i64(-12..=1) };
        json!(format!("$now{offset:+}"))
    }

    fn key(&mut self) -> Value {
        // With those of locks and elections no more than twelve: etcd sorts more in an order that is not stable.
        const KEYS: [&[u8]; 9] = [b"a", b"a\0", b"aa", b"b", b"c", b"d", b"\xff", b"\xff\xff", b""];
        // The empty key seldom: it is refused.
        let n = if self.chance(60) { KEYS.len() } else { KEYS.len() - 1 };
        let key = self.pick(&KEYS[..n]);
        self.bytes(key)
    }

    /// Sets the interval of a request; a third are single keys.
    fn interval(&mut self, body: &mut Value) {
        body["key"] = self.key();
        match self.rng.u32(..12) {
            0..5 => {}
            5..10 => body["range_end"] = self.key(),
            10 => body["range_end"] = self.bytes(b"\0"),
            _ => {
                body["key"] = self.bytes(b"\0");
                body["range_end"] = self.bytes(b"\0");
            }
        }
    }

    fn value(&mut self) -> Value {
        let value = self.pick(&[&b""[..], b"1", b"2", b"22", b"\0", b"\xfe\xff\xfb"]);
        self.bytes(value)
    }
}
