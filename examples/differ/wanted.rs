//! Where Quorate answers otherwise than etcd on purpose: one list, with reasons.
//!
//! Each entry names the RPC, the field and the condition, and a run counts its uses: one that is never used is no longer true. Some
//! are met only once there are users. The table of `docs/from-etcd.md` is made of all, which a test checks.

use base64::Engine as _;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Value, json};

use super::call::Call;
use super::compare::Difference;

/// A difference that is wanted.
pub struct Wanted {
    /// `Service/Method`, its service with `/*`, or `*`; several with a comma between.
    pub rpc: &'static str,
    /// How the paths of the fields end; none: every field.
    pub fields: &'static [&'static str],
    pub when: &'static str,
    pub etcd: &'static str,
    pub ours: &'static str,
    pub why: &'static str,
    pub holds: fn(&Call, &Difference) -> bool,
}

/// A request that is not sent, because what it does differs and everything after it would.
pub struct Unsent {
    pub rpc: &'static str,
    pub when: &'static str,
    pub etcd: &'static str,
    pub ours: &'static str,
    pub why: &'static str,
    pub holds: fn(&Call) -> bool,
}

type Pair = fn(&Value, &Value) -> bool;

/// Fields that are each server's own: RPC, field, and what must hold between the two.
pub const OWN: &[(&str, &str, Pair)] = &[
    ("*", "header.cluster_id", both),
    ("*", "header.member_id", both),
    ("*", "header.raft_term", both),
    // That of nothing is 0.
    ("Maintenance/HashKV", "hash", |_, _| true),
    ("Maintenance/Hash", "hash", |_, _| true),
    ("Maintenance/Status", "dbSize", both),
    ("Maintenance/Status", "dbSizeInUse", both),
    ("Maintenance/Status", "dbSizeQuota", both),
    ("Maintenance/Status", "leader", both),
    ("Maintenance/Status", "raftIndex", both),
    ("Maintenance/Status", "raftAppliedIndex", both),
    ("Maintenance/Status", "raftTerm", both),
    ("Maintenance/Snapshot", "messages", both),
    // There are three of ours, and one etcd.
    ("Cluster/MemberList", "members", both),
    ("Maintenance/MoveLeader", "error.text", |ours, _| ours == "etcdserver: not leader"),
    ("Maintenance/MoveLeader", "body.message", |ours, _| ours == "etcdserver: not leader"),
    ("Lease/LeaseTimeToLive", "TTL", near),
];

fn both(ours: &Value, theirs: &Value) -> bool {
    !ours.is_null() && !theirs.is_null()
}

/// Seconds pass between two requests, and a lease whose leader has gone gets up to a minute and an election.
fn near(ours: &Value, theirs: &Value) -> bool {
    number(ours) > 0 && number(theirs) > 0 && number(ours).abs_diff(number(theirs)) < 120
}

pub const WANTED: &[Wanted] = &[
    Wanted {
        rpc: "*",
        fields: &["body.error"],
        when: "a refusal in JSON",
        etcd: "code, message",
        ours: "code, message, and the text as `error` too",
        why: "etcd up to 3.4 has it as `error`, and programs look there",
        holds: |_, d| d.theirs.is_null(),
    },
    Wanted {
        rpc: "KV/Txn",
        fields: &["response_txn.header", "response_txn.header.revision"],
        when: "the answer of a nested transaction",
        etcd: "an empty header",
        ours: "the revision, as in every answer",
        why: "documented is that each answer has one",
        holds: |_, d| d.theirs.is_null(),
    },
    Wanted {
        rpc: "Watch/Watch",
        fields: &["cancel_reason"],
        when: "a watcher that a compaction ends",
        etcd: "none",
        ours: "the text of etcd's table",
        why: "a person who looks at the stream sees why",
        holds: |_, d| d.theirs.is_null() && d.ours == "etcdserver: mvcc: required revision has been compacted",
    },
    Wanted {
        rpc: "Cluster/*",
        fields: &["header.revision"],
        when: "always",
        etcd: "none",
        ours: "the revision, as in every answer",
        why: "documented is that each answer has one",
        holds: |_, d| d.theirs.is_null(),
    },
    Wanted {
        rpc: "Maintenance/Downgrade",
        fields: &[],
        when: "CANCEL while no downgrade is under way",
        etcd: "OK, and a line in its log",
        ours: "`no inflight downgrade job`, etcd's text for it",
        why: "there is never one under way: a downgrade needs no preparation",
        holds: |call, _| call.body["action"] == "CANCEL",
    },
    Wanted {
        rpc: "Maintenance/HashKV",
        fields: &[],
        when: "a revision not above one at which a compaction ran",
        etcd: "the hash that it kept of that compaction, with that revision",
        ours: "that of the revision, or `compacted`",
        why: "the hash is of what was asked for",
        holds: |call, _| call.body["revision"] != 0,
    },
    Wanted {
        rpc: "KV/*",
        fields: &["kvs.lease"],
        when: "a range of keys only",
        etcd: "none; up to 3.6 the lease",
        ours: "the lease",
        why: "it is no value, and programs written for 3.6 read it",
        holds: |_, d| d.theirs.is_null(),
    },
    Wanted {
        rpc: "KV/Txn",
        fields: &["error.text", "body.message", "error.code", "body.code", "http"],
        when: "more than one operation cannot be done",
        etcd: "the first in order",
        ours: "another of them",
        why: "either is true, and nothing is changed",
        holds: |_, d| is_refusal_in_apply(&d.ours) && is_refusal_in_apply(&d.theirs),
    },
    Wanted {
        rpc: "Lease/LeaseGrant",
        fields: &["error.text", "body.message", "error.code", "body.code", "http"],
        when: "too long a TTL, while the space is exceeded",
        etcd: "the space",
        ours: "the TTL",
        why: "either is true, and nothing is changed",
        holds: |call, _| call.body["TTL"].to_string().trim_matches('"').len() > 9,
    },
    Wanted {
        rpc: "Election/Campaign",
        fields: &["header.revision"],
        when: "who leads campaigns again with another value",
        etcd: "the revision before the value was written",
        ours: "the revision of the write",
        why: "whoever reads at it sees what was written",
        holds: |_, d| number(&d.ours) == number(&d.theirs) + 1,
    },
    Wanted {
        rpc: "*",
        fields: &["body.message"],
        when: "a body that is no JSON or does not fit the message",
        etcd: "`proto: ...`",
        ours: "`quorate: request body: ...`",
        why: "the parser's own words; the code is the same",
        holds: |_, d| {
            let own = |text: &Value| text.as_str().is_some_and(|text| text.starts_with("quorate: request body: "));
            own(&d.ours) && d.theirs.as_str().is_some_and(|text| !text.starts_with("etcdserver: "))
        },
    },
    Wanted {
        rpc: "*",
        fields: &[],
        when: "a body in JSON with more after the message",
        etcd: "the rest is not looked at",
        ours: "refused, code 3",
        why: "who sends two requests in one must not believe that both were done",
        holds: |call, _| matches!(call.body.as_str(), Some("{}{}" | "{}x")),
    },
    Wanted {
        rpc: "KV/*",
        fields: &["kvs", "kvs.key", "kvs.create_revision", "kvs.mod_revision", "kvs.version", "kvs.value", "kvs.lease"],
        when: "a limit, a target to sort by, and no order",
        etcd: "cuts first, then sorts",
        ours: "sorts first, then cuts",
        why: "documented is that the limit comes last",
        holds: |call, _| sorts_without_order(&call.body),
    },
    Wanted {
        rpc: "KV/RangeStream",
        fields: &[],
        when: "with an order or bounds of revisions",
        etcd: "Unimplemented",
        ours: "served",
        why: "what a Range can be asked a stream can be asked",
        holds: |_, d| {
            let refused =
                |text: &Value| text.as_str().is_some_and(|text| text.starts_with("RangeStream does not support"));
            let nothing = d.theirs.as_array().is_some_and(Vec::is_empty);
            refused(&d.theirs) || refused(&d.theirs["text"]) || nothing || d.theirs == "Unimplemented"
        },
    },
    Wanted {
        rpc: "Lock/*, Election/*",
        fields: &["error.code", "http", "body.code"],
        when: "a refusal",
        etcd: "Unknown, 500",
        ours: "the code that etcd's table has for the text",
        why: "clients decide by the code whether to try again",
        holds: |_, d| d.theirs == "Unknown" || d.theirs == 500 || d.theirs == 2,
    },
    Wanted {
        rpc: "Maintenance/Status",
        fields: &["errors"],
        when: "a person should know of something",
        etcd: "the alarms",
        ours: "the alarms, and behind them what else there is, with what to do",
        why: "who looks for what is wrong looks there",
        holds: |_, d| alarms(&d.ours) == alarms(&d.theirs),
    },
];

/// Those that are met only by users.
pub const WANTED_OF_USERS: &[Wanted] = &[
    Wanted {
        rpc: "Auth/Authenticate",
        fields: &["token"],
        when: "always",
        etcd: "a number, which its members keep",
        ours: "a signature, which any member can check",
        why: "clients do not look into it; it outlives a restart, and no member keeps a list",
        holds: |_, d| [&d.ours, &d.theirs].iter().all(|token| token.as_str().is_some_and(|text| !text.is_empty())),
    },
    Wanted {
        rpc: "Lease/LeaseKeepAlive, Watch/Watch",
        fields: &["body.error.grpc_code", "body.error.http_code", "body.error.http_status"],
        when: "a refusal in JSON, of a stream",
        etcd: "code, message",
        ours: "code, message, and the same under the names that etcd up to 3.5 has for them too",
        why: "programs look there",
        holds: |_, d| d.theirs.is_null(),
    },
    Wanted {
        rpc: "KV/*",
        fields: &[],
        when: "an interval without keys (`range_end` not after `key`), asked for by a user with several permissions",
        etcd: "allowed if `key` is, or refused, as the tree of its permissions happens to have grown",
        ours: "allowed if `key` is",
        why: "it reads and writes nothing, and the same permissions give the same answer",
        holds: |call, d| {
            has_empty_interval(&call.body) && (d.theirs.is_null() || is_nothing(&d.theirs) || is_denial(&d.theirs))
        },
    },
];

pub const UNSENT: &[Unsent] = &[
    Unsent {
        rpc: "KV/Txn",
        when: "a put that keeps value or lease, beside a deletion up to the end of all keys",
        etcd: "ends with a panic if the key was deleted",
        ours: "refused: the key is not there",
        why: "no request ends a member",
        holds: |call| {
            let text = call.body.to_string();
            text.contains("\"ignore_")
                && text.contains("request_delete_range")
                && text.contains("\"range_end\":\"AA==\"")
        },
    },
    Unsent {
        rpc: "KV/Txn",
        when: "a Range of it has a negative revision",
        etcd: "compacted; -1 is the present before the first compaction",
        ours: "the present",
        why: "in a transaction as outside of one",
        holds: |call| has_negative_revision(&call.body),
    },
    Unsent {
        rpc: "Watch/Watch",
        when: "a progress request on a stream of which a watcher starts after the newest revision",
        etcd: "no notice until then",
        ours: "a notice",
        why: "nobody has missed anything, and nobody waits for another's write",
        holds: |call| {
            matches!(call.body["request"]["create_request"]["start_revision"].as_str(), Some("$now+1" | "$now+2"))
        },
    },
];

/// Those that are met only by users.
pub const UNSENT_OF_USERS: &[Unsent] = &[Unsent {
    rpc: "KV/Txn",
    when: "a user asks for an interval without keys in a transaction that can write",
    etcd: "allowed if `key` is, or refused, as the tree of its permissions happens to have grown",
    ours: "allowed if `key` is",
    why: "it reads and writes nothing, and the same permissions give the same answer",
    holds: |call| call.user.is_some() && has_empty_interval(&call.body) && writes(&call.body),
}];

/// What only apply can find out.
const IN_APPLY: &[&str] = &[
    "etcdserver: requested lease not found",
    "etcdserver: key not found",
    "etcdserver: mvcc: required revision has been compacted",
    "etcdserver: mvcc: required revision is a future revision",
];

/// A text of these, or a code of one.
fn is_refusal_in_apply(value: &Value) -> bool {
    let codes = [json!("NotFound"), json!("InvalidArgument"), json!("OutOfRange"), json!(5), json!(3), json!(11)];
    let http = [json!(400), json!(404)];
    value.as_str().is_some_and(|text| IN_APPLY.contains(&text)) || codes.contains(value) || http.contains(value)
}

/// A refusal for want of a permission: whole, its text, or a code of it.
fn is_denial(value: &Value) -> bool {
    let is = |value: &Value| value == "etcdserver: permission denied" || value == "PermissionDenied";
    is(value) || is(&value["text"]) || *value == 403 || *value == 7
}

fn is_nothing(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// Whether some interval of a request ends before it begins, or where it begins.
fn has_empty_interval(body: &Value) -> bool {
    let here = || match (bytes(&body["key"]), bytes(&body["range_end"])) {
        (Some(key), Some(end)) => !end.is_empty() && end != [0] && end <= key,
        _ => false,
    };
    match body {
        Value::Object(fields) => here() || fields.values().any(has_empty_interval),
        Value::Array(items) => items.iter().any(has_empty_interval),
        _ => false,
    }
}

/// Bytes in either alphabet, padded or not.
fn bytes(text: &Value) -> Option<Vec<u8>> {
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decode = |alphabet| GeneralPurpose::new(alphabet, config).decode(text.as_str()?).ok();
    decode(&STANDARD).or_else(|| decode(&URL_SAFE))
}

/// Whether a transaction has something to write, in either branch.
fn writes(body: &Value) -> bool {
    let text = body.to_string();
    text.contains("\"request_put\"") || text.contains("\"request_delete_range\"")
}

/// The alarms among the errors of a Status, without the members that they are for.
fn alarms(errors: &Value) -> Vec<&str> {
    let all = match errors {
        Value::Array(all) => all.as_slice(),
        one => std::slice::from_ref(one),
    };
    let texts = all.iter().filter_map(Value::as_str).filter(|text| !text.starts_with('['));
    texts.map(|text| text.split_once("alarm:").map_or(text, |(_, alarm)| alarm.trim())).collect()
}

fn number(value: &Value) -> i64 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn sorts_without_order(body: &Value) -> bool {
    let set =
        |field: &str| body.get(field).is_some_and(|value| !matches!(value.to_string().trim_matches('"'), "0" | "-1"));
    let here = set("limit") && set("sort_target") && !set("sort_order");
    here || match body {
        Value::Object(fields) => fields.values().any(sorts_without_order),
        Value::Array(items) => items.iter().any(sorts_without_order),
        _ => false,
    }
}

fn has_negative_revision(body: &Value) -> bool {
    match body {
        Value::Object(fields) => fields.iter().any(|(name, value)| {
            let negative = name == "revision" && value.to_string().trim_matches('"').starts_with('-');
            negative || has_negative_revision(value)
        }),
        Value::Array(items) => items.iter().any(has_negative_revision),
        _ => false,
    }
}

/// Counts how often each entry was needed.
#[derive(Default)]
pub struct Uses {
    pub wanted: Vec<u64>,
    pub unsent: Vec<u64>,
}

impl Uses {
    pub fn new() -> Self {
        Self { wanted: vec![0; all_wanted().count()], unsent: vec![0; all_unsent().count()] }
    }

    /// Whether `call` must not be sent.
    pub fn is_unsent(&mut self, call: &Call) -> bool {
        let found = all_unsent().position(|entry| concerns(entry.rpc, call) && (entry.holds)(call));
        found.map(|index| self.unsent[index] += 1).is_some()
    }

    /// Whether `difference` is as it should be.
    pub fn explains(&mut self, call: &Call, difference: &Difference) -> bool {
        let (path, ours, theirs) = (&difference.path, &difference.ours, &difference.theirs);
        let own = |(rpc, field, holds): &(&str, &str, Pair)| {
            concerns(rpc, call) && is_field(field, path) && holds(ours, theirs)
        };
        if OWN.iter().any(own) {
            return true;
        }
        let found = all_wanted().position(|entry| {
            let named = entry.fields.is_empty() || entry.fields.iter().any(|field| is_field(field, path));
            named && concerns(entry.rpc, call) && (entry.holds)(call, difference)
        });
        found.map(|index| self.wanted[index] += 1).is_some()
    }

    /// Entries that nothing has needed: of those that only users meet, or of the others.
    pub fn unused(&self, of_users: bool) -> Vec<String> {
        let wanted = all_wanted().zip(&self.wanted).enumerate();
        let wanted = wanted.filter(|(at, (_, uses))| (*at >= WANTED.len()) == of_users && **uses == 0);
        let unsent = all_unsent().zip(&self.unsent).enumerate();
        let unsent = unsent.filter(|(at, (_, uses))| (*at >= UNSENT.len()) == of_users && **uses == 0);
        let (wanted, unsent) = (wanted.map(|(_, entry)| entry), unsent.map(|(_, entry)| entry));
        let wanted = wanted.map(|(entry, _)| format!("{} {:?} ({})", entry.rpc, entry.fields, entry.when));
        wanted.chain(unsent.map(|(entry, _)| format!("{} ({})", entry.rpc, entry.when))).collect()
    }
}

fn all_wanted() -> impl Iterator<Item = &'static Wanted> {
    WANTED.iter().chain(WANTED_OF_USERS)
}

fn all_unsent() -> impl Iterator<Item = &'static Unsent> {
    UNSENT.iter().chain(UNSENT_OF_USERS)
}

/// The table of the documentation.
pub fn table() -> String {
    let mut table = String::from("| RPC | field | when | etcd 3.7 | Quorate | why |\n|---|---|---|---|---|---|\n");
    for w in all_wanted() {
        let fields: Vec<String> = w.fields.iter().map(|field| format!("`{field}`")).collect();
        let fields = if fields.is_empty() { "the whole answer".to_owned() } else { fields.join(", ") };
        table += &format!("| {} | {fields} | {} | {} | {} | {} |\n", w.rpc, w.when, w.etcd, w.ours, w.why);
    }
    for u in all_unsent() {
        table += &format!("| {} | what is done | {} | {} | {} | {} |\n", u.rpc, u.when, u.etcd, u.ours, u.why);
    }
    table
}

fn concerns(rpc: &str, call: &Call) -> bool {
    rpc.split(", ").any(|rpc| match rpc.strip_suffix('*') {
        Some(start) => call.method.starts_with(start),
        None => call.method == rpc,
    })
}

fn is_field(field: &str, path: &str) -> bool {
    path.strip_suffix(field).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}
