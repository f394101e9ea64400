//! KV and Watch.

use serde_json::{Value, json};

use super::Generator;
use crate::call::Door;

impl Generator {
    pub(super) fn kv(&mut self) -> (&'static str, Value) {
        match self.rng.u32(..100) {
            0..28 => ("KV/Range", self.range()),
            28..34 => ("KV/RangeStream", self.range_stream()),
            34..58 => ("KV/Put", self.put()),
            58..66 => ("KV/DeleteRange", self.delete()),
            66..97 => ("KV/Txn", self.txn(2)),
            _ => ("KV/Compact", self.compact()),
        }
    }

    fn range(&mut self) -> Value {
        let mut r = json!({});
        self.interval(&mut r);
        for bound in ["min_mod_revision", "max_mod_revision", "min_create_revision", "max_create_revision"] {
            if self.chance(8) {
                r[bound] = self.revision();
            }
        }
        self.range_options(&mut r);
        r["sort_order"] = json!(self.rng.i32(0..3));
        if self.chance(2) {
            r["sort_target"] = json!(self.rng.i32(0..5));
        }
        if self.chance(60) {
            let option = self.pick(&["sort_order", "sort_target"]);
            r[option] = json!(self.pick(&[-1, 5, 77]));
        }
        r
    }

    /// What a stream takes too.
    fn range_options(&mut self, r: &mut Value) {
        match self.rng.u32(..12) {
            0..4 => r["revision"] = self.revision(),
            4 => r["revision"] = self.number(-1),
            _ => {}
        }
        if self.chance(2) {
            let limit = self.rng.i64(-1..5);
            r["limit"] = self.number(limit);
        }
        r["serializable"] = json!(self.rng.bool());
        r["keys_only"] = json!(self.chance(6));
        r["count_only"] = json!(self.chance(8));
    }

    fn range_stream(&mut self) -> Value {
        if self.chance(6) {
            return self.range();
        }
        let mut r = json!({});
        self.interval(&mut r);
        self.range_options(&mut r);
        r
    }

    fn put(&mut self) -> Value {
        let mut r = json!({ "key": self.key(), "value": self.value(), "prev_kv": self.rng.bool() });
        if self.chance(6) {
            r["ignore_value"] = json!(true);
            if !self.chance(4) {
                r["value"] = json!("");
            }
        }
        if self.chance(5) {
            r["lease"] = self.lease_id();
        }
        if self.chance(8) {
            r["ignore_lease"] = json!(true);
            if !self.chance(4) {
                r["lease"] = json!(0);
            }
        }
        // Beyond what a request may have, though not beyond what a message may.
        if self.chance(400) && self.door == Door::Grpc {
            r["value"] = self.bytes(&vec![b'v'; (1 << 20) * 3 / 2 + 100]);
        }
        r
    }

    fn delete(&mut self) -> Value {
        let mut r = json!({ "prev_kv": self.rng.bool() });
        self.interval(&mut r);
        r
    }

    fn compact(&mut self) -> Value {
        let offset = if self.chance(6) { self.rng.i64(-5..=3) } else { self.rng.i64(-40..=-2) };
        json!({ "revision": format!("$now{offset:+}"), "physical": self.rng.bool() })
    }

    fn compare(&mut self) -> Value {
        let mut r = json!({ "result": self.rng.i32(0..4), "target": self.rng.i32(0..5) });
        if self.chance(3) {
            self.interval(&mut r)
        } else {
            r["key"] = self.key()
        }
        let small = self.rng.i64(-1..4);
        let (field, operand) = match self.rng.u32(..5) {
            0 => ("create_revision", self.revision()),
            1 => ("mod_revision", self.revision()),
            2 => ("value", self.value()),
            // Not one that a server has named: which of them is greater is chance.
            3 => ("lease", json!(self.pick(&[0, 1, 2, 3, 4, 5, 77, -5, i64::MAX]))),
            _ => ("version", self.number(small)),
        };
        // Mostly of the same kind as the target, but servers are not to trust that.
        let fitting = ["version", "create_revision", "mod_revision", "value", "lease"];
        if let Some(target) = fitting.iter().position(|name| *name == field)
            && !self.chance(10)
        {
            r["target"] = json!(target);
        }
        if !self.chance(20) {
            r[field] = operand;
        }
        r
    }

    fn ops(&mut self, depth: u32) -> Value {
        let n = self.rng.usize(..4);
        let ops = (0..n).map(|_| match self.rng.u32(..20) {
            0..7 => json!({ "request_range": self.range() }),
            7..14 => json!({ "request_put": self.put() }),
            14..16 => json!({ "request_delete_range": self.delete() }),
            _ if depth > 0 => json!({ "request_txn": self.txn(depth - 1) }),
            _ if self.chance(10) => json!({}),
            _ => json!({ "request_put": self.put() }),
        });
        ops.collect()
    }

    fn txn(&mut self, depth: u32) -> Value {
        let n = self.rng.usize(..3);
        let compare: Value = (0..n).map(|_| self.compare()).collect();
        let mut txn = json!({ "compare": compare, "success": self.ops(depth), "failure": self.ops(depth) });
        // About as many as one may have.
        if self.chance(150) {
            let n = self.rng.usize(126..131);
            let list = self.pick(&["success", "failure", "compare"]);
            let key = self.key();
            txn[list] = match list {
                "compare" => (0..n).map(|_| json!({ "key": key, "target": "VERSION", "version": "1" })).collect(),
                _ => (0..n).map(|_| json!({ "request_range": { "key": key } })).collect(),
            };
        }
        txn
    }

    /// A request on one of few streams.
    pub(super) fn watch(&mut self) -> Value {
        let slot = self.rng.u64(..3);
        let request = match self.rng.u32(..10) {
            0..5 => json!({ "create_request": self.watch_create() }),
            5 => json!({ "cancel_request": { "watch_id": self.rng.i64(1..12) } }),
            _ => Value::Null,
        };
        json!({ "slot": slot, "request": request })
    }

    /// A watcher of what has been, in an interval up to the last key, with nothing left out: it is to be told of the last write.
    pub(super) fn history(&mut self) -> Value {
        let offset = if self.chance(6) { self.rng.i64(-300..=0) } else { self.rng.i64(-30..=1) };
        let key = self.pick(&[&b"\0"[..], b"a", b"b", b"d", b"\xff"]);
        json!({ "history": {
            "key": self.bytes(key),
            "range_end": self.bytes(b"\0"),
            "start_revision": format!("$now{offset:+}"),
            "prev_kv": self.rng.bool(),
            "fragment": self.rng.bool(),
        } })
    }

    fn watch_create(&mut self) -> Value {
        let mut r =
            json!({ "progress_notify": self.chance(4), "prev_kv": self.rng.bool(), "fragment": self.rng.bool() });
        self.interval(&mut r);
        match self.rng.u32(..8) {
            0..4 => r["start_revision"] = self.revision(),
            // Before everything; it is compacted mostly.
            4 => r["start_revision"] = self.number(1),
            _ => {}
        }
        r["filters"] = match self.rng.u32(..8) {
            0 => json!(["NOPUT"]),
            1 => json!(["NODELETE"]),
            2 => json!(["NOPUT", "NODELETE"]),
            _ => json!([]),
        };
        if self.chance(4) {
            let id = self.rng.i64(0..8);
            r["watch_id"] = self.number(id);
        }
        r
    }
}
