//! Leases, and what lives by them: locks and elections.

use serde_json::{Value, json};

use super::Generator;
use crate::call::Door;

/// Leases that are named; more are named by servers.
const LEASES: i64 = 8;
const LOCKS: [&[u8]; 2] = [b"lock", b"x"];
const ELECTIONS: [&[u8]; 1] = [b"e"];

impl Generator {
    /// A lease that may be there, or the newest that a server has named, or none.
    pub(super) fn lease_id(&mut self) -> Value {
        match self.rng.u32(..12) {
            0 => json!(0),
            1 => json!(format!("$lease:{}", self.rng.usize(..3))),
            2 => json!(self.pick(&[77, -5, i64::MAX])),
            _ => json!(self.rng.i64(1..=LEASES)),
        }
    }

    pub(super) fn lease(&mut self) -> (&'static str, Value) {
        match self.rng.u32(..100) {
            0..35 => ("Lease/LeaseGrant", self.grant()),
            35..47 => ("Lease/LeaseRevoke", json!({ "ID": self.lease_id() })),
            47..65 => {
                let n = if self.chance(3) { self.rng.usize(1..4) } else { 1 };
                ("Lease/LeaseKeepAlive", (0..n).map(|_| json!({ "ID": self.lease_id() })).collect())
            }
            65..90 => ("Lease/LeaseTimeToLive", json!({ "ID": self.lease_id(), "keys": !self.chance(3) })),
            _ => ("Lease/LeaseLeases", json!({})),
        }
    }

    fn grant(&mut self) -> Value {
        // Long, so that none ends in a run (of no length is the shortest of all); at and beyond the border of what is taken.
        let ttl = match self.rng.u32(..20) {
            0 => self.pick(&[9_000_000_000, 9_000_000_001, i64::MAX]),
            _ => self.rng.i64(1..1000) * 100_000,
        };
        let id = match self.rng.u32(..10) {
            0 | 1 => 0,
            2 => self.pick(&[-7, i64::MAX]),
            _ => self.rng.i64(1..=LEASES * 2),
        };
        json!({ "TTL": self.number(ttl), "ID": self.number(id) })
    }

    /// A lease that nobody else names, with keys that may be there.
    pub(super) fn expiry(&mut self) -> Value {
        self.door = Door::Grpc;
        let keys = self.rng.usize(1..5);
        let keys: Vec<Value> = (0..keys).map(|_| self.key()).filter(|key| *key != "").collect();
        let keys = if keys.is_empty() { vec![self.bytes(b"a")] } else { keys };
        json!({ "ID": 1000, "keys": keys })
    }

    pub(super) fn concurrency(&mut self) -> (&'static str, Value) {
        let (lock, election) = (self.pick(&LOCKS), self.pick(&ELECTIONS));
        let index = self.rng.usize(..2);
        match self.rng.u32(..100) {
            0..25 => ("Lock/Lock", self.acquire("lock", lock)),
            25..40 => {
                // Then another may ask for it, and wait if this was the key of another lock. Among users nobody waits: who gives up there
                // leaves its key with etcd, which deletes it without a token.
                if !self.has_users && self.chance(10) {
                    self.held.retain(|held, _| !held.starts_with("lock"));
                }
                let key = if self.chance(5) { self.key() } else { json!(format!("$lock:{index}")) };
                ("Lock/Unlock", json!({ "key": key }))
            }
            40..62 => {
                let mut body = self.acquire("election", election);
                body["value"] = self.value();
                ("Election/Campaign", body)
            }
            62..75 => ("Election/Proclaim", json!({ "leader": format!("$leader:{index}"), "value": self.value() })),
            75..90 => ("Election/Leader", json!({ "name": self.bytes(election) })),
            90..92 => ("Election/Observe", json!({ "name": self.bytes(election) })),
            _ => ("Election/Resign", json!({ "leader": format!("$leader:{index}") })),
        }
    }

    /// Who holds a name asks for it again; others do so with another name.
    fn acquire(&mut self, kind: &str, name: &[u8]) -> Value {
        let lease = self.rng.i64(1..=LEASES);
        let held = format!("{kind} {}", String::from_utf8_lossy(name));
        let lease = *self.held.entry(held).or_insert(lease);
        json!({ "name": self.bytes(name), "lease": lease })
    }
}
