//! Who may call what: every method of the API, by everybody who may come, compared with etcd 3.7.3.
//!
//! `permissions.txt` is what etcd answered: `QUORATE_RECORD_PERMISSIONS=1 cargo test --test it permissions` asks it again and writes the file.
//! A method that has no case here fails the test. Beside gRPC the gateway is asked, at another member, with the token as etcd's gateway takes it.
//! What differs on purpose: locks and elections give other codes and texts when they refuse, so of these only whether they do is compared.

#[path = "../../examples/differ/ask.rs"]
#[allow(dead_code, reason = "methods and messages are used here")]
mod ask;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use ask::{Methods, Server, message, to_json};
use base64::Engine as _;
use serde_json::{Value, json};
use tonic::Status;

use crate::differ::call;
use crate::support::cluster::{Cluster, http_request, wait_for};
use crate::support::etcd::Etcd;
use crate::support::tools::{self, ETCD_37};

const PASSWORD: &str = "secret";
/// Of a lease that has a key which nobody but root may touch, and of one that has a key in everybody's range.
const FOREIGN_LEASE: &str = "77";
const OWN_LEASE: &str = "78";
/// Who asks, in the order of the file: nobody, one with a token that is none, users without and with permissions on `a/` to `a0`, root.
const ASKERS: [&str; 6] = ["nobody", "stranger", "none", "reader", "writer", "root"];
/// Longest wait for the first message of an answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn b(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// A method, and what it is asked; in a way that changes nothing which other cases need.
struct Case {
    method: &'static str,
    body: Value,
}

fn kv_cases() -> Vec<(&'static str, Value)> {
    let put = |key: &str| json!({ "request_put": { "key": b(key) } });
    let get = |key: &str| json!({ "request_range": { "key": b(key) } });
    let compare = |key: &str| json!([{ "key": b(key), "target": "VERSION", "version": "0" }]);
    vec![
        ("KV/Range", json!({ "key": b("a/x") })),
        ("KV/Range", json!({ "key": b("a/"), "range_end": b("a0") })),
        ("KV/Range", json!({ "key": b("a/"), "range_end": b("a1") })),
        ("KV/Range", json!({ "key": b("a/"), "range_end": b("\0") })),
        ("KV/Range", json!({ "key": b("z"), "serializable": true })),
        ("KV/Range", json!({ "key": b("a/x"), "serializable": true, "count_only": true })),
        ("KV/Range", json!({ "key": b("b"), "range_end": b("a") })),
        ("KV/Range", json!({})),
        ("KV/RangeStream", json!({ "key": b("a/x") })),
        ("KV/RangeStream", json!({ "key": b("z") })),
        ("KV/Put", json!({ "key": b("a/x") })),
        ("KV/Put", json!({ "key": b("a/x"), "prev_kv": true })),
        ("KV/Put", json!({ "key": b("z") })),
        ("KV/Put", json!({ "key": b("a/l"), "lease": FOREIGN_LEASE })),
        ("KV/Put", json!({ "key": b("a/l"), "lease": OWN_LEASE })),
        ("KV/Put", json!({ "key": b("a/l"), "lease": "99" })),
        ("KV/DeleteRange", json!({ "key": b("a/none") })),
        ("KV/DeleteRange", json!({ "key": b("a/none"), "prev_kv": true })),
        ("KV/DeleteRange", json!({ "key": b("a/none"), "range_end": b("a1") })),
        ("KV/Txn", json!({})),
        ("KV/Txn", json!({ "compare": compare("a/x") })),
        ("KV/Txn", json!({ "compare": compare("z") })),
        ("KV/Txn", json!({ "success": [put("a/x")] })),
        ("KV/Txn", json!({ "compare": compare("a/x"), "success": [put("a/x")] })),
        ("KV/Txn", json!({ "success": [put("a/x")], "failure": [put("z")] })),
        ("KV/Txn", json!({ "success": [get("a/x"), get("a/y")] })),
        ("KV/Txn", json!({ "success": [get("z")] })),
        ("KV/Txn", json!({ "success": [{ "request_txn": { "success": [put("z")] } }] })),
        ("KV/Txn", json!({ "success": [{ "request_txn": { "success": [put("a/x")] } }] })),
        ("KV/Txn", json!({ "success": [{ "request_delete_range": { "key": b("a/none"), "prev_kv": true } }] })),
        ("KV/Compact", json!({ "revision": "1000000" })),
        ("Watch/Watch", json!({ "create_request": { "key": b("a/x") } })),
        ("Watch/Watch", json!({ "create_request": { "key": b("a/"), "range_end": b("a0") } })),
        ("Watch/Watch", json!({ "create_request": { "key": b("a/x"), "range_end": b("a1") } })),
        ("Watch/Watch", json!({ "create_request": { "key": b("z") } })),
        ("Watch/Watch", json!({ "create_request": {} })),
    ]
}

fn lease_cases() -> Vec<(&'static str, Value)> {
    let leader = |key: &str| json!({ "name": b("a/e"), "key": b(key), "rev": "5", "lease": OWN_LEASE });
    vec![
        ("Lease/LeaseGrant", json!({ "TTL": "60" })),
        ("Lease/LeaseRevoke", json!({ "ID": FOREIGN_LEASE })),
        ("Lease/LeaseRevoke", json!({ "ID": OWN_LEASE })),
        ("Lease/LeaseRevoke", json!({ "ID": "99" })),
        ("Lease/LeaseKeepAlive", json!({ "ID": FOREIGN_LEASE })),
        ("Lease/LeaseKeepAlive", json!({ "ID": OWN_LEASE })),
        ("Lease/LeaseKeepAlive", json!({ "ID": "99" })),
        ("Lease/LeaseTimeToLive", json!({ "ID": FOREIGN_LEASE })),
        ("Lease/LeaseTimeToLive", json!({ "ID": FOREIGN_LEASE, "keys": true })),
        ("Lease/LeaseTimeToLive", json!({ "ID": OWN_LEASE, "keys": true })),
        ("Lease/LeaseLeases", json!({})),
        ("Lock/Lock", json!({ "name": b("a/lock"), "lease": OWN_LEASE })),
        ("Lock/Lock", json!({ "name": b("z/lock"), "lease": OWN_LEASE })),
        ("Lock/Unlock", json!({ "key": b("a/none") })),
        ("Lock/Unlock", json!({ "key": b("z/none") })),
        ("Election/Campaign", json!({ "name": b("a/e"), "lease": OWN_LEASE })),
        ("Election/Proclaim", json!({ "leader": leader("a/none"), "value": b("v") })),
        ("Election/Leader", json!({ "name": b("a/e") })),
        ("Election/Leader", json!({ "name": b("z/e") })),
        ("Election/Observe", json!({ "name": b("a/e") })),
        ("Election/Resign", json!({ "leader": leader("a/none") })),
        ("Election/Resign", json!({ "leader": leader("z/none") })),
    ]
}

fn admin_cases() -> Vec<(&'static str, Value)> {
    let nobody = json!({ "name": "nobody" });
    let perm = json!({ "permType": "READ", "key": b("k") });
    vec![
        ("Cluster/MemberAdd", json!({ "peerURLs": ["x"] })),
        ("Cluster/MemberRemove", json!({ "ID": "77" })),
        ("Cluster/MemberUpdate", json!({ "ID": "77", "peerURLs": ["http://127.9.9.9:2380"] })),
        ("Cluster/MemberPromote", json!({ "ID": "77" })),
        ("Cluster/MemberList", json!({})),
        ("Maintenance/Alarm", json!({})),
        ("Maintenance/Alarm", json!({ "action": "DEACTIVATE", "alarm": "NOSPACE" })),
        ("Maintenance/Status", json!({})),
        ("Maintenance/Defragment", json!({})),
        ("Maintenance/Hash", json!({})),
        ("Maintenance/HashKV", json!({})),
        ("Maintenance/Snapshot", json!({})),
        ("Maintenance/MoveLeader", json!({ "targetID": "77" })),
        ("Maintenance/Downgrade", json!({ "action": "VALIDATE", "version": "3.6" })),
        ("Auth/AuthStatus", json!({})),
        ("Auth/AuthEnable", json!({})),
        ("Auth/AuthDisable", json!({})),
        ("Auth/Authenticate", json!({ "name": "reader", "password": "wrong" })),
        ("Auth/Authenticate", json!({ "name": "reader", "password": PASSWORD })),
        ("Auth/Authenticate", json!({ "name": "named", "password": "" })),
        ("Auth/Authenticate", nobody.clone()),
        ("Auth/UserAdd", json!({ "name": "none", "options": { "no_password": true } })),
        ("Auth/UserGet", json!({ "name": "reader" })),
        ("Auth/UserGet", nobody.clone()),
        ("Auth/UserList", json!({})),
        ("Auth/UserDelete", nobody.clone()),
        ("Auth/UserDelete", json!({ "name": "root" })),
        ("Auth/UserChangePassword", nobody),
        ("Auth/UserGrantRole", json!({ "user": "reader", "role": "nothing" })),
        ("Auth/UserRevokeRole", json!({ "name": "root", "role": "root" })),
        ("Auth/RoleAdd", json!({ "name": "r" })),
        ("Auth/RoleGet", json!({ "role": "r" })),
        ("Auth/RoleGet", json!({ "role": "nothing" })),
        ("Auth/RoleGet", json!({ "role": "root" })),
        ("Auth/RoleList", json!({})),
        ("Auth/RoleDelete", json!({ "role": "nothing" })),
        ("Auth/RoleGrantPermission", json!({ "name": "nothing", "perm": perm })),
        ("Auth/RoleRevokePermission", json!({ "role": "r", "key": b("k") })),
    ]
}

fn cases() -> Vec<Case> {
    let all = [kv_cases(), lease_cases(), admin_cases()].concat();
    all.into_iter().map(|(method, body)| Case { method, body }).collect()
}

/// The first message of an answer.
async fn first(methods: &Methods, server: &Server, method: &str, body: &Value) -> Result<Value, Status> {
    let method = methods.find(method);
    let request = message(method.input(), body);
    let asking = async {
        let mut answers = server.stream(&method, tokio_stream::once(request)).await?;
        let first = answers.message().await?;
        if !method.is_server_streaming() {
            // The status comes behind it.
            while answers.message().await?.is_some() {}
        }
        Ok(first.map_or(Value::Null, |first| to_json(&first)))
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(Status::unknown("it waits")))
}

/// As the file has it.
fn outcome(answer: Result<Value, Status>) -> String {
    match answer {
        Ok(answer) if answer["canceled"] == true => {
            format!("canceled {}", answer["cancel_reason"].as_str().unwrap_or_default())
        }
        Ok(Value::Null) => "nothing".to_owned(),
        Ok(_) => "ok".to_owned(),
        Err(status) => format!("{} {}", status.code() as i32, status.message()),
    }
}

/// It would end the test.
fn is_kept_from(case: &Case, asker: &str) -> bool {
    case.method == "Auth/AuthDisable" && asker == "root"
}

/// One through whom root acts, and the tokens of all.
struct World<'a> {
    methods: &'a Methods,
    root: Server,
    tokens: BTreeMap<&'static str, String>,
}

impl<'a> World<'a> {
    /// Makes users and roles, turns authentication on, and gets everybody a token.
    async fn new(methods: &'a Methods, server: &Server) -> Self {
        let do_it = async |method: &str, body: Value| first(methods, server, method, &body).await.unwrap();
        for (role, kind) in [("r", "READ"), ("w", "WRITE")] {
            do_it("Auth/RoleAdd", json!({ "name": role })).await;
            let perm = json!({ "permType": kind, "key": b("a/"), "range_end": b("a0") });
            do_it("Auth/RoleGrantPermission", json!({ "name": role, "perm": perm })).await;
        }
        do_it("Auth/RoleAdd", json!({ "name": "root" })).await;
        do_it("Auth/UserAdd", json!({ "name": "named", "options": { "no_password": true } })).await;
        for (user, role) in [("none", ""), ("reader", "r"), ("writer", "w"), ("root", "root")] {
            do_it("Auth/UserAdd", json!({ "name": user, "password": PASSWORD })).await;
            if !role.is_empty() {
                do_it("Auth/UserGrantRole", json!({ "user": user, "role": role })).await;
            }
        }
        do_it("Auth/AuthEnable", json!({})).await;
        let mut tokens = BTreeMap::from([("stranger", "no.12".to_owned())]);
        for user in ["none", "reader", "writer", "root"] {
            let answer = do_it("Auth/Authenticate", json!({ "name": user, "password": PASSWORD })).await;
            tokens.insert(user, answer["token"].as_str().unwrap().to_owned());
        }
        Self { methods, root: server.with_token(&tokens["root"]), tokens }
    }

    /// Everything that the next question needs; what is there already is no fault.
    async fn prepare(&self, case: &Case) {
        if !case.method.starts_with("KV/Put")
            && !["Lease/", "Lock/", "Election/"].iter().any(|s| case.method.starts_with(s))
        {
            return;
        }
        for (lease, key) in [(FOREIGN_LEASE, "z/l"), (OWN_LEASE, "a/l")] {
            let _ = first(self.methods, &self.root, "Lease/LeaseGrant", &json!({ "ID": lease, "TTL": "600" })).await;
            let put = json!({ "key": b(key), "lease": lease });
            first(self.methods, &self.root, "KV/Put", &put).await.unwrap();
        }
        if ["Leader", "Observe"].iter().any(|name| case.method.ends_with(name)) {
            let campaign = json!({ "name": b("a/e"), "lease": OWN_LEASE, "value": b("v") });
            first(self.methods, &self.root, "Election/Campaign", &campaign).await.unwrap();
        }
    }

    async fn ask(&self, server: &Server, case: &Case, asker: &str) -> String {
        if is_kept_from(case, asker) {
            return "-".to_owned();
        }
        let server = self.tokens.get(asker).map_or_else(|| server.clone(), |token| server.with_token(token));
        outcome(first(self.methods, &server, case.method, &case.body).await)
    }

    /// What each is told. All ask at once, unless what one may do is gone then.
    async fn ask_all(&self, case: &Case, ask: impl AsyncFn(&'static str) -> String) -> Vec<String> {
        if case.method != "Lease/LeaseRevoke" {
            self.prepare(case).await;
            return futures_util::future::join_all(ASKERS.map(|asker| ask(asker))).await;
        }
        let mut told = Vec::new();
        for asker in ASKERS {
            self.prepare(case).await;
            told.push(ask(asker).await);
        }
        told
    }

    /// The same through the gateway.
    async fn post(&self, endpoint: &str, path: &str, case: &Case, asker: &str) -> String {
        if is_kept_from(case, asker) {
            return "-".to_owned();
        }
        let token = self.tokens.get(asker).map(|token| format!("Bearer {token}"));
        let headers: Vec<(&str, &str)> = token.iter().map(|token| ("Authorization", token.as_str())).collect();
        let path = format!("/v3/{path}");
        let (code, text) = http_request(endpoint, "POST", &path, &headers, &case.body.to_string()).await.unwrap();
        let body: Value = serde_json::from_str(text.lines().next().unwrap_or_default()).unwrap_or_default();
        let error = if body["error"].is_object() { &body["error"] } else { &body };
        match code {
            200 if error["code"].is_null() => "ok".to_owned(),
            _ => format!("{} {}", error["code"], error["message"].as_str().unwrap_or(&text)),
        }
    }
}

fn line(case: &Case, outcomes: &[String]) -> String {
    let columns: Vec<String> = ASKERS.iter().zip(outcomes).map(|(asker, told)| format!("  {asker}: {told}")).collect();
    format!("{} {}\n{}\n", case.method, case.body, columns.join("\n"))
}

fn file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/permissions.txt")
}

/// Locks and elections: whether they refuse.
fn comparable(method: &str, told: &str) -> String {
    let is_served = told == "ok";
    match method {
        _ if !(method.starts_with("Lock/") || method.starts_with("Election/")) => told.to_owned(),
        _ if is_served => "ok".to_owned(),
        _ => "refused".to_owned(),
    }
}

/// What each was told otherwise than by etcd.
fn compare(case: &Case, door: &str, theirs: &[&str], ours: &[String]) -> Vec<String> {
    let of = |((asker, theirs), ours): ((&&str, &&str), &String)| {
        let theirs = theirs.trim().strip_prefix(&format!("{asker}: ")).expect("a line of the file");
        let (theirs, ours) = (comparable(case.method, theirs), comparable(case.method, ours));
        (ours != theirs).then(|| format!("{} {} {asker}{door}: {ours}, etcd {theirs}", case.method, case.body))
    };
    ASKERS.iter().zip(theirs).zip(ours).filter_map(of).collect()
}

async fn record(cluster: &Cluster, methods: &Methods) {
    let program = tools::require(&ETCD_37).expect("etcd is recorded");
    let etcd = Etcd::start(&program, cluster).await;
    let server = Server::new(etcd.endpoint().to_owned());
    let world = World::new(methods, &server).await;
    let mut text = String::new();
    for case in cases() {
        let outcomes = world.ask_all(&case, async |asker| world.ask(&server, &case, asker).await).await;
        text += &line(&case, &outcomes);
    }
    std::fs::write(file(), text).unwrap();
}

#[test]
fn every_method_has_a_case_of_its_permissions() {
    let methods = Methods::new();
    let cases: BTreeSet<&str> = cases().iter().map(|case| case.method).collect();
    let name = |m: &prost_reflect::MethodDescriptor| format!("{}/{}", m.parent_service().name(), m.name());
    // `quorate.admin.v1` is no part of etcd's: `what_is_not_etcds_is_for_users_and_for_root` has it.
    let is_etcds = |m: &prost_reflect::MethodDescriptor| !m.parent_service().full_name().starts_with("quorate.");
    let missing: Vec<String> =
        methods.all().iter().filter(|m| is_etcds(m)).map(name).filter(|m| !cases.contains(&**m)).collect();
    assert!(missing.is_empty(), "nobody has said who may call {missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_may_call_what_etcd_lets_him_call() {
    let methods = Methods::new();
    let mut cluster = Cluster::new(3);
    cluster.set("auth.bcrypt_cost", "4");
    let leader = cluster.start_all().await;
    if tools::is_set("QUORATE_RECORD_PERMISSIONS") {
        record(&cluster, &methods).await;
    }
    let expected = std::fs::read_to_string(file()).expect("it was recorded");
    let server = Server::new(cluster.endpoint(leader));
    let world = World::new(&methods, &server).await;
    let other = cluster.endpoint((leader + 1) % 3);
    let mut differences = Vec::new();
    let mut lines = expected.lines();
    for case in cases() {
        let head = format!("{} {}", case.method, case.body);
        assert_eq!(lines.next(), Some(&head[..]), "the cases are others than those that were recorded");
        let theirs: Vec<&str> = lines.by_ref().take(ASKERS.len()).collect();
        let told = world.ask_all(&case, async |asker| world.ask(&server, &case, asker).await).await;
        differences.extend(compare(&case, "", &theirs, &told));
        // The other member says that it does not lead.
        let path = call::PATHS.iter().find(|(_, method)| *method == case.method && !method.ends_with("MoveLeader"));
        if let Some((path, _)) = path {
            let told = world.ask_all(&case, async |asker| world.post(&other, path, &case, asker).await).await;
            differences.extend(compare(&case, ", the gateway", &theirs, &told));
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

/// What etcd has no call for.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_etcds_is_for_users_and_for_root() {
    let methods = Methods::new();
    let mut cluster = Cluster::new(1);
    cluster.set("auth.bcrypt_cost", "4");
    cluster.start_all().await;
    let server = Server::new(cluster.endpoint(0));
    let world = World::new(&methods, &server).await;
    for (method, body, open_to) in [
        ("Admin/Membership", json!({}), &["none", "reader", "writer", "root"][..]),
        ("Admin/Scale", json!({ "replicas": 1 }), &["root"]),
        ("Admin/SetRoleQuota", json!({ "role": "r" }), &["root"]),
        ("Admin/RoleQuotas", json!({}), &["root"]),
        ("Admin/Diagnose", json!({}), &["root"]),
    ] {
        let case = Case { method, body };
        for asker in ASKERS {
            let told = world.ask(&server, &case, asker).await;
            assert_eq!(told == "ok", open_to.contains(&asker), "{method} {asker}: {told}");
        }
    }
    // There is nobody to promote, as root alone is told.
    let promote = Case { method: "Admin/Promote", body: json!({}) };
    for asker in ASKERS {
        let told = world.ask(&server, &promote, asker).await;
        assert_eq!(told.contains("is no standby"), asker == "root", "{asker}: {told}");
    }
    // Whoever is sent here by a balancer must learn that the member lives.
    for path in ["/health", "/livez", "/readyz", "/version"] {
        wait_for(path, async || {
            let (code, text) = http_request(&cluster.endpoint(0), "GET", path, &[], "").await.unwrap();
            if code == 200 { Ok(()) } else { Err(format!("{code} {text}")) }
        })
        .await;
    }
}
