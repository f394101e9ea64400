//! Three members of ours and an etcd, to which the same requests go.
//!
//! Invariant: one request is under way at a time and a restart ends when all members serve, so that every answer is determined by the
//! requests before it. Ids that a server chooses are replaced in answers by a name that is the same on both sides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::ask::{Methods, Server};
use crate::call::{Call, Door, EXPIRE, Memory, RESTART, STRANGER};
use crate::history;
use crate::support::cluster::{Cluster, wait_for};
use crate::support::etcd::Etcd;
use crate::watch::Session;

pub const MEMBERS: u64 = 3;
const SETTLING: Duration = Duration::from_secs(20);
/// In base64; no key of the generator is greater.
const HISTORY_END: &str = "//8=";

/// What the two answered.
#[derive(Clone, Debug)]
pub struct Answers {
    pub ours: Value,
    pub theirs: Value,
}

/// One of the two, as requests see it.
struct Side {
    memory: Memory,
    /// Ids that the server has chosen, with their names.
    names: BTreeMap<String, String>,
    leases: usize,
}

pub struct World {
    methods: Methods,
    cluster: Cluster,
    _etcd: Etcd,
    servers: Vec<Server>,
    their_server: Server,
    ours: Side,
    theirs: Side,
    /// The newest revision that etcd has named.
    now: i64,
    /// By slot, with the member of ours that is watched.
    watches: BTreeMap<u64, (u64, [Session; 2])>,
    /// The member that was asked last: it has applied all that was answered.
    last: u64,
    /// Leases whose leader has gone have their time anew, so that they end in another order.
    restarted: bool,
    /// By user: what ours and etcd have issued.
    tokens: BTreeMap<String, [String; 2]>,
    /// Who was given no token, since the last change of that user: who asks all the time is taken for one who guesses.
    refused: BTreeSet<String>,
    has_users: bool,
}

impl World {
    /// New servers on empty disks.
    pub async fn start(etcd: &Path) -> Self {
        let mut cluster = Cluster::new(MEMBERS);
        // Nobody is to be elected only because the machine is busy.
        cluster.set("raft.election_timeout_min", "1s").set("raft.election_timeout_max", "1500ms");
        cluster.set("auth.bcrypt_cost", "4");
        // Started here, waited for below.
        (0..MEMBERS).for_each(|slot| cluster.start_pod(slot));
        let etcd = Etcd::start(etcd, &cluster).await;
        cluster.wait_formed().await;
        let servers: Vec<Server> = (0..MEMBERS).map(|slot| Server::new(cluster.endpoint(slot))).collect();
        let their_server = Server::new(etcd.endpoint().to_owned());
        let mut ids = Vec::new();
        for slot in 0..MEMBERS {
            ids.push(cluster.member_id(slot).await);
        }
        let (mut ours, mut theirs) = (Side::new(&ids), Side::new(&[etcd.member_id().await]));
        ours.memory.note("url", Value::String(format!("http://{}", cluster.peer_address(0))));
        theirs.memory.note("url", Value::String(format!("http://{}", etcd.peer())));
        let (methods, watches) = (Methods::new(), BTreeMap::new());
        let mut world = Self {
            methods,
            cluster,
            _etcd: etcd,
            servers,
            their_server,
            ours,
            theirs,
            now: 1,
            watches,
            last: 0,
            restarted: false,
            tokens: BTreeMap::new(),
            refused: BTreeSet::new(),
            has_users: false,
        };
        world.wait_serving().await;
        world
    }

    /// Sends `call` to both. `None` for a step that has no answers.
    pub async fn play(&mut self, call: &Call) -> anyhow::Result<Option<Answers>> {
        if call.method == RESTART {
            self.restart(call.member, call.body["kill"] == true).await;
            return Ok(None);
        }
        let shown = self.shown(call).await;
        let (our_body, their_body) =
            (self.ours.memory.resolve(&call.body, self.now), self.theirs.memory.resolve(&call.body, self.now));
        if call.is_local() && call.member != self.last {
            self.catch_up(call.member).await;
        }
        self.last = call.member;
        let server = &self.servers[call.member as usize];
        let servers = match &shown {
            Some([ours, theirs]) => [server.with_token(ours), self.their_server.with_token(theirs)],
            None => [server.clone(), self.their_server.clone()],
        };
        let (ours, theirs) = if call.method == EXPIRE {
            self.expire(call).await?
        } else if call.method == "Watch/Watch" && call.body["history"].is_object() {
            self.history(call, &servers, [&our_body["history"], &their_body["history"]]).await?
        } else if call.method == "Watch/Watch" {
            self.watch(call, &servers, &our_body, &their_body).await?
        } else {
            let [server, their_server] = &servers;
            tokio::join!(server.ask(&self.methods, call, &our_body), their_server.ask(&self.methods, call, &their_body))
        };
        if call.method == "Auth/AuthEnable" && first(&ours)["header"].is_object() {
            self.has_users = true;
            // By it everybody's revision is read from now on.
            let root = Call { user: Some("root".to_owned()), ..call.clone() };
            self.shown(&root).await.context("root gets no token")?;
        }
        if [&ours, &theirs].iter().any(|answer| answer.to_string().contains("invalid auth token"))
            && let Some(user) = &call.user
        {
            // Both have ended it, or the answers differ.
            self.tokens.remove(user);
        }
        if call.method.starts_with("Auth/User")
            && let Some(changed) = call.body["name"].as_str()
        {
            self.refused.remove(changed);
        }
        self.ours.learn(call, &ours);
        self.theirs.learn(call, &theirs);
        self.now = self.now.max(revision(&theirs).unwrap_or(0));
        if call.method == "Maintenance/Alarm" && call.body["action"] != "GET" {
            // What one member has taken the others know a moment later.
            self.wait_serving().await;
        }
        // Who waits for a lock or to lead has put a key.
        let waits = ours.get("waits").is_some() || ours.pointer("/error/waits").is_some();
        if waits && call.method != "Election/Observe" {
            self.settle(self.now + 2).await?;
        }
        let sides = [(&self.ours, ours), (&self.theirs, theirs)];
        let [ours, theirs] = sides.map(|(side, answer)| sorted(call, self.restarted, side.named(answer)));
        Ok(Some(Answers { ours, theirs }))
    }

    /// The tokens that who asks `call` shows to ours and to etcd. Who has none asks for one; who gets none shows none.
    async fn shown(&mut self, call: &Call) -> Option<[String; 2]> {
        let user = call.user.as_ref()?;
        if user == STRANGER {
            return Some(["no.12".to_owned(), "no.12".to_owned()]);
        }
        if self.refused.contains(user) {
            return None;
        }
        if !self.tokens.contains_key(user) {
            // What was changed last decides, and it was asked elsewhere.
            let login = Call {
                member: self.last,
                door: Door::Grpc,
                method: "Auth/Authenticate".to_owned(),
                body: json!({ "name": user, "password": user }),
                user: None,
            };
            let (ours, theirs) = tokio::join!(
                self.servers[self.last as usize].ask(&self.methods, &login, &login.body),
                self.their_server.ask(&self.methods, &login, &login.body)
            );
            let token = |answer: &Value| first(answer)["token"].as_str().map(str::to_owned);
            let Some((ours, theirs)) = token(&ours).zip(token(&theirs)) else {
                self.refused.insert(user.clone());
                return None;
            };
            self.tokens.insert(user.clone(), [ours, theirs]);
        }
        self.tokens.get(user).cloned()
    }

    async fn watch(
        &mut self,
        call: &Call,
        servers: &[Server; 2],
        ours: &Value,
        theirs: &Value,
    ) -> anyhow::Result<(Value, Value)> {
        let slot = call.body["slot"].as_u64().context("a watch names its stream")?;
        if !self.watches.contains_key(&slot) {
            let [server, their_server] = servers;
            let ours = Session::open(server, &self.methods).await?;
            let both = [ours, Session::open(their_server, &self.methods).await?];
            self.watches.insert(slot, (call.member, both));
        }
        // "From now on" means from what the member has applied.
        self.catch_up(self.watches[&slot].0).await;
        let (_, [our, their]) = self.watches.get_mut(&slot).expect("opened above");
        let (our, their) = tokio::join!(
            our.turn(&self.methods, &ours["request"], self.now),
            their.turn(&self.methods, &theirs["request"], self.now)
        );
        Ok((our.context("ours")?, their.context("etcd's")?))
    }

    /// Writes the key that ends every history, and asks for what has been until then; if it cannot be written, that is the answer.
    async fn history(
        &mut self,
        call: &Call,
        [server, their_server]: &[Server; 2],
        [ours, theirs]: [&Value; 2],
    ) -> anyhow::Result<(Value, Value)> {
        let body = json!({ "key": HISTORY_END, "value": "" });
        let put = Call { door: Door::Grpc, method: "KV/Put".to_owned(), body, ..call.clone() };
        let (our_put, their_put) =
            tokio::join!(server.ask(&self.methods, &put, &put.body), their_server.ask(&self.methods, &put, &put.body));
        let (Some(last), true) = (revision(&our_put), revision(&our_put) == revision(&their_put)) else {
            return Ok((our_put, their_put));
        };
        self.now = last;
        let (our, their) = tokio::join!(
            history::told(server, &self.methods, call.door, ours, last),
            history::told(their_server, &self.methods, call.door, theirs, last)
        );
        Ok((our.context("ours")?, their.context("etcd's")?))
    }

    /// Has a lease end on both, by itself, with the keys that are put for it; the answer is what is left of it, and everything there is.
    async fn expire(&mut self, call: &Call) -> anyhow::Result<(Value, Value)> {
        let step =
            |method: &str, body: Value| Call { door: Door::Grpc, method: method.to_owned(), body, ..call.clone() };
        let (id, keys) = (&call.body["ID"], call.body["keys"].as_array().context("an expiry names keys")?);
        let mut steps = vec![step("Lease/LeaseGrant", json!({ "ID": id, "TTL": 1 }))];
        steps.extend(keys.iter().map(|key| step("KV/Put", json!({ "key": key, "value": "ZW5kcw==", "lease": id }))));
        for step in &steps {
            let (ours, theirs) = self.ask_both(step).await;
            let done = [&ours, &theirs].iter().all(|answer| first(answer)["header"].is_object());
            anyhow::ensure!(done, "a lease that is to end was not prepared: {} {ours} {theirs}", step.line());
        }
        // Each put is a revision, and the end of the lease is one.
        self.settle(self.now + keys.len() as i64 + 1).await?;
        self.catch_up(call.member).await;
        self.last = call.member;
        let (ours, theirs) = self.ask_both(&step("Lease/LeaseTimeToLive", json!({ "ID": id, "keys": true }))).await;
        let (our_keys, their_keys) =
            self.ask_both(&step("KV/Range", json!({ "key": "AA==", "range_end": "AA==" }))).await;
        Ok((json!({ "lease": ours, "keys": our_keys }), json!({ "lease": theirs, "keys": their_keys })))
    }

    async fn ask_both(&self, call: &Call) -> (Value, Value) {
        let server = &self.servers[call.member as usize];
        tokio::join!(
            server.ask(&self.methods, call, &call.body),
            self.their_server.ask(&self.methods, call, &call.body)
        )
    }

    /// Ends a member, by force or not, and starts it again. Streams of watches end with it, also those at others: what is open
    /// at etcd goes with them.
    async fn restart(&mut self, slot: u64, kill: bool) {
        self.watches.clear();
        self.restarted = true;
        if kill {
            self.cluster.kill(slot);
        } else {
            self.cluster.terminate(slot).await;
        }
        self.cluster.start_pod(slot);
        if self.has_users {
            self.cluster.wait_http(slot, "/readyz", 200, &[]).await;
        } else {
            self.cluster.wait_formed().await;
        }
        self.servers[slot as usize] = Server::new(self.cluster.endpoint(slot));
        self.wait_serving().await;
    }

    async fn wait_serving(&mut self) {
        for member in 0..MEMBERS {
            self.catch_up(member).await;
        }
    }

    /// Waits until a member serves and has applied what any of them has answered.
    async fn catch_up(&self, member: u64) {
        wait_for("a member to serve", async || self.revision(&self.servers[member as usize]).await).await;
    }

    /// Who waited and was given up deletes its key in its own time: waits until both have reached `revision` by that.
    async fn settle(&mut self, revision: i64) -> anyhow::Result<()> {
        let deadline = Instant::now() + SETTLING;
        loop {
            let both = (self.revision(&self.servers[0]).await, self.revision(&self.their_server).await);
            if both == (Ok(revision), Ok(revision)) {
                (self.now, self.last) = (revision, 0);
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("a waiter was given up, and {SETTLING:?} later the revisions are {both:?}, not {revision}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The revision of a linearizable read.
    async fn revision(&self, server: &Server) -> Result<i64, String> {
        let body = json!({ "key": "YQ==", "count_only": true });
        let read = Call { member: 0, door: Door::Grpc, method: "KV/Range".to_owned(), body, user: None };
        let root = self.tokens.get("root").filter(|_| self.has_users);
        let server = match root {
            Some([ours, theirs]) => {
                let is_theirs = server.endpoint == self.their_server.endpoint;
                server.with_token(if is_theirs { theirs } else { ours })
            }
            None => server.clone(),
        };
        let answer = server.ask(&self.methods, &read, &read.body).await;
        revision(&answer).ok_or_else(|| answer.to_string())
    }
}

impl Side {
    fn new(members: &[u64]) -> Self {
        let mut memory = Memory::default();
        for id in members.iter().rev() {
            memory.note("member", Value::String(id.to_string()));
        }
        let names = members.iter().map(|id| (id.to_string(), "member".to_owned())).collect();
        Self { memory, names, leases: 0 }
    }

    /// Keeps what later requests need.
    fn learn(&mut self, call: &Call, answer: &Value) {
        let message = first(answer);
        match call.method.as_str() {
            // The request names a lease, or the server does.
            "Lease/LeaseGrant" if is_zero(&call.body["ID"]) && message["ID"].is_string() => {
                self.leases += 1;
                let id = message["ID"].as_str().unwrap_or_default().to_owned();
                self.names.insert(id.clone(), format!("lease {}", self.leases));
                self.memory.note("lease", Value::String(id));
            }
            "Lock/Lock" if message["key"].is_string() => self.memory.note("lock", message["key"].clone()),
            "Election/Campaign" if message["leader"].is_object() => {
                self.memory.note("leader", message["leader"].clone())
            }
            _ => {}
        }
    }

    fn named(&self, answer: Value) -> Value {
        match answer {
            Value::String(text) => Value::String(self.names.get(&text).cloned().unwrap_or(text)),
            Value::Array(items) => items.into_iter().map(|item| self.named(item)).collect(),
            Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, self.named(value))).collect(),
            other => other,
        }
    }
}

fn revision(answer: &Value) -> Option<i64> {
    first(answer)["header"]["revision"].as_str()?.parse().ok()
}

fn is_zero(id: &Value) -> bool {
    matches!(id.to_string().trim_matches('"'), "0" | "null")
}

/// Some lists are in no order: etcd gives a lease's keys in that of a map.
fn sorted(call: &Call, restarted: bool, mut answer: Value) -> Value {
    let list = match call.method.as_str() {
        "Lease/LeaseTimeToLive" => "keys",
        "Lease/LeaseLeases" if restarted => "leases",
        _ => return answer,
    };
    for messages in ["messages", "body"] {
        if let Some(items) = answer.pointer_mut(&format!("/{messages}/0/{list}")).and_then(Value::as_array_mut) {
            items.sort_by_key(Value::to_string);
        }
    }
    answer
}

/// The first message of an answer.
pub fn first(answer: &Value) -> &Value {
    answer.get("messages").or(answer.get("body")).and_then(|all| all.get(0)).unwrap_or(&Value::Null)
}
