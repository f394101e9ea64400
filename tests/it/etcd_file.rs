//! etcd's own snapshot files, of the versions at hand: restored into a member of ours, everything is as etcd has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use quorate::pb::KeyValue;
use quorate::pb::authpb::{Permission, UserAddOptions, permission::Type};
use quorate::pb::etcd::auth_client::AuthClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::request_op::Request as Op;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGetRequest, AuthRoleGrantPermissionRequest,
    AuthRoleListRequest, AuthStatusRequest, AuthUserAddRequest, AuthUserGetRequest, AuthUserGrantRoleRequest,
    AuthUserListRequest, AuthenticateRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest,
    LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    WatchCreateRequest, WatchRequest,
};
use quorate::pb::mvccpb::Event;
use serde_json::Value;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::support::cluster::{Cluster, binary, wait_for};
use crate::support::etcd::Etcd;
use crate::support::tools::{self, ETCD, ETCD_37, ETCDCTL, ETCDCTL_37, Tool};

const USERS: [(&str, &str, &str); 3] =
    [("root", "root", "of-root"), ("alice", "reader", "of-alice"), ("bob", "nothing", "")];

/// Shows a token with each request.
#[derive(Clone)]
struct Token(String);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("token", self.0.parse().unwrap());
        Ok(request)
    }
}

async fn token(channel: &Channel, user: &str, password: &str) -> Result<String, Status> {
    let request = AuthenticateRequest { name: user.into(), password: password.into() };
    Ok(AuthClient::new(channel.clone()).authenticate(request).await?.into_inner().token)
}

async fn as_root(channel: &Channel) -> AuthClient<InterceptedService<Channel, Token>> {
    let token = token(channel, "root", "of-root").await.unwrap();
    AuthClient::new(InterceptedService::new(channel.clone(), Token(token)))
}

fn key(random: &mut fastrand::Rng) -> String {
    format!("k{:02}", random.u8(..60))
}

fn put(random: &mut fastrand::Rng, key: String, lease: i64) -> PutRequest {
    let len = if random.u8(..40) == 0 { 20_000 } else { random.usize(..60) };
    PutRequest { key: key.into(), value: vec![random.u8(..); len].into(), lease, ..Default::default() }
}

/// Puts, deletions, transactions and leases at random, a compaction every 200 steps if that is wanted; returns the revision at the end.
async fn load(channel: &Channel, random: &mut fastrand::Rng, steps: std::ops::Range<i64>, compacts: bool) -> i64 {
    let (mut kv, mut lease) = (KvClient::new(channel.clone()), LeaseClient::new(channel.clone()));
    let mut leases: Vec<i64> = Vec::new();
    let mut revision = 1;
    for step in steps {
        let held = if leases.is_empty() || random.bool() { 0 } else { leases[random.usize(..leases.len())] };
        let header = match random.u8(..12) {
            0 => {
                let id = 1000 + step;
                lease.lease_grant(LeaseGrantRequest { ttl: 900 + step, id }).await.unwrap();
                leases.push(id);
                continue;
            }
            1 if leases.len() > 3 => {
                let id = leases.swap_remove(random.usize(..leases.len()));
                lease.lease_revoke(LeaseRevokeRequest { id }).await.unwrap().into_inner().header
            }
            2 | 3 => {
                let key = key(random).into();
                let one = DeleteRangeRequest { key, ..Default::default() };
                kv.delete_range(one).await.unwrap().into_inner().header
            }
            4 => {
                let from = random.u8(..6);
                let (key, range_end) = (format!("k{from}").into(), format!("k{}", from + 1).into());
                let some = DeleteRangeRequest { key, range_end, ..Default::default() };
                kv.delete_range(some).await.unwrap().into_inner().header
            }
            5 | 6 => {
                let mut keys: Vec<u8> = (0..60).collect();
                random.shuffle(&mut keys);
                let ops = keys.iter().take(random.usize(1..9)).map(|n| {
                    let key = format!("k{n:02}");
                    let delete = DeleteRangeRequest { key: key.clone().into(), ..Default::default() };
                    let op = if random.u8(..3) == 0 {
                        Op::RequestDeleteRange(delete)
                    } else {
                        Op::RequestPut(put(random, key, held))
                    };
                    RequestOp { request: Some(op) }
                });
                let success = ops.collect();
                kv.txn(TxnRequest { success, ..Default::default() }).await.unwrap().into_inner().header
            }
            _ => {
                let key = key(random);
                kv.put(put(random, key, held)).await.unwrap().into_inner().header
            }
        };
        revision = header.unwrap().revision;
        if compacts && step % 200 == 0 {
            let compact = CompactionRequest { revision: revision - random.i64(10..50), physical: step == 200 };
            kv.compact(compact).await.unwrap();
        }
    }
    revision
}

/// Three users, one without a password, two roles, and users count from then on.
async fn make_users(channel: &Channel) {
    let mut auth = AuthClient::new(channel.clone());
    for name in ["reader", "nothing"] {
        auth.role_add(AuthRoleAddRequest { name: name.into() }).await.unwrap();
    }
    for (kind, key, range_end) in [(Type::Read, "k1", "k3"), (Type::Readwrite, "k55", ""), (Type::Write, "x", "\0")] {
        let perm = Permission { perm_type: kind.into(), key: key.into(), range_end: range_end.into() };
        let grant = AuthRoleGrantPermissionRequest { name: "reader".into(), perm: Some(perm) };
        auth.role_grant_permission(grant).await.unwrap();
    }
    for (user, role, password) in USERS {
        let options = Some(UserAddOptions { no_password: password.is_empty() });
        let add = AuthUserAddRequest { name: user.into(), password: password.into(), options, ..Default::default() };
        auth.user_add(add).await.unwrap();
        auth.user_grant_role(AuthUserGrantRoleRequest { user: user.into(), role: role.into() }).await.unwrap();
    }
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
}

/// As etcd's own client saves it.
fn save(etcdctl: &Path, etcd: &Etcd, file: &Path) {
    let mut command = Command::new(etcdctl);
    command.env("ETCDCTL_API", "3").args([
        "--endpoints",
        etcd.endpoint(),
        "--user",
        "root:of-root",
        "snapshot",
        "save",
    ]);
    tools::run(command.arg(file));
}

fn quorate(args: &[&str]) -> Result<String, String> {
    let output = Command::new(binary()).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Makes the data directory of the one member of `cluster`.
fn restore(file: &Path, cluster: &Cluster, more: &[&str]) -> Result<String, String> {
    let (dir, pattern) = (cluster.root().to_str().unwrap(), cluster.pattern());
    let args =
        ["snapshot", "restore", file.to_str().unwrap(), "--data-dir", dir, "--name", "kv-%d", "--peers", &pattern];
    quorate(&[&args[..], more].concat())
}

/// Everything at one revision; 0 is the present.
async fn all(channel: &Channel, revision: i64) -> Vec<KeyValue> {
    let range = RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, ..Default::default() };
    KvClient::new(channel.clone()).max_decoding_message_size(64 << 20).range(range).await.unwrap().into_inner().kvs
}

/// The events from one revision up to another, each with what was before.
async fn events(channel: &Channel, from: i64, to: i64) -> Vec<Event> {
    let (requests, outgoing) = tokio::sync::mpsc::channel(1);
    let create = WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision: from,
        prev_kv: true,
        ..Default::default()
    };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
    let mut client = WatchClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut answers = client.watch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut events: Vec<Event> = Vec::new();
    while events.last().is_none_or(|event| event.kv.as_ref().unwrap().mod_revision() < to) {
        let answer = answers.message().await.unwrap().unwrap();
        assert!(!answer.canceled, "{}", answer.cancel_reason);
        events.extend(answer.events);
    }
    events
}

/// Ids, and of each what was granted and which keys are attached.
async fn leases(channel: &Channel) -> BTreeMap<i64, (i64, Vec<Vec<u8>>)> {
    let mut client = LeaseClient::new(channel.clone());
    let listed = client.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases;
    let mut found = BTreeMap::new();
    for id in listed.iter().map(|lease| lease.id) {
        let ask = LeaseTimeToLiveRequest { id, keys: true };
        let lease = client.lease_time_to_live(ask).await.unwrap().into_inner();
        assert!(lease.ttl > lease.granted_ttl - 300 && lease.ttl <= lease.granted_ttl, "{lease:?}");
        let mut keys: Vec<Vec<u8>> = lease.keys.iter().map(|key| key.to_vec()).collect();
        keys.sort();
        found.insert(id, (lease.granted_ttl, keys));
    }
    found
}

/// Whether users count, and the auth revision; etcd 3.4 does not tell.
async fn auth_status(channel: &Channel) -> Option<(bool, u64)> {
    match as_root(channel).await.auth_status(AuthStatusRequest {}).await {
        Ok(status) => Some((status.get_ref().enabled, status.get_ref().auth_revision)),
        Err(status) if status.code() == Code::Unimplemented => None,
        Err(status) => panic!("{status}"),
    }
}

/// Users with their roles, roles with their permissions, as lines.
async fn users(channel: &Channel) -> Vec<String> {
    let mut auth = as_root(channel).await;
    let mut lines = Vec::new();
    let mut names = auth.user_list(AuthUserListRequest {}).await.unwrap().into_inner().users;
    names.sort();
    for name in names {
        let roles = auth.user_get(AuthUserGetRequest { name: name.clone() }).await.unwrap().into_inner().roles;
        lines.push(format!("user {name}: {roles:?}"));
    }
    let mut roles = auth.role_list(AuthRoleListRequest {}).await.unwrap().into_inner().roles;
    roles.sort();
    for role in roles {
        let perms = auth.role_get(AuthRoleGetRequest { role: role.clone() }).await.unwrap().into_inner().perm;
        lines.push(format!("role {role}: {perms:?}"));
    }
    lines
}

/// Compares who may do what; from then on users do not count.
async fn compare_users(etcd: &Channel, ours: &Channel) {
    let (theirs, own) = (auth_status(etcd).await, auth_status(ours).await);
    assert_eq!((own, own.is_some_and(|status| status.0)), (theirs.or(own), true));
    assert_eq!(users(ours).await, users(etcd).await);
    for (user, _, password) in USERS {
        let fits = [etcd, ours].map(|side| token(side, user, password));
        let [theirs, own]: [Result<String, Status>; 2] = futures_util::future::join_all(fits).await.try_into().unwrap();
        assert_eq!(theirs.map(drop).map_err(|e| e.code()), own.map(drop).map_err(|e| e.code()), "{user}");
        let refused = token(ours, user, "another").await.unwrap_err();
        assert!(refused.message().contains("authentication failed"), "{user}: {refused}");
    }
    for side in [etcd, ours] {
        as_root(side).await.auth_disable(AuthDisableRequest {}).await.unwrap();
    }
}

/// Compares everything of the keys that both serve, and the leases.
async fn compare(etcd: &Channel, ours: &Channel, newest: i64) {
    let compacted = compacted(etcd).await;
    assert!(compacted > 1 && compacted < newest, "{compacted} of {newest}");
    let refused = KvClient::new(ours.clone())
        .range(RangeRequest { key: "k".into(), revision: compacted - 1, ..Default::default() })
        .await
        .unwrap_err();
    assert!(refused.message().contains("has been compacted"), "{refused}");
    for revision in compacted..=newest {
        let (theirs, own) = (all(etcd, revision).await, all(ours, revision).await);
        assert!(theirs == own, "revision {revision}: {theirs:?} here {own:?}");
    }
    let (theirs, own) = (events(etcd, compacted + 1, newest).await, events(ours, compacted + 1, newest).await);
    assert!(theirs == own, "{} and {} events", theirs.len(), own.len());
    assert_eq!(leases(ours).await, leases(etcd).await);
}

/// The compacted revision, as a watch from the first one is told it.
async fn compacted(channel: &Channel) -> i64 {
    let (requests, outgoing) = tokio::sync::mpsc::channel(1);
    let create = WatchCreateRequest { key: "k".into(), start_revision: 1, ..Default::default() };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
    let mut answers =
        WatchClient::new(channel.clone()).watch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    loop {
        let answer = answers.message().await.unwrap().unwrap();
        if answer.compact_revision > 0 {
            return answer.compact_revision;
        }
    }
}

async fn is_the_same_here(etcd: Tool, etcdctl: Tool, seed: u64) {
    let (Some(program), Some(etcdctl)) = (tools::require(&etcd), tools::require(&etcdctl)) else { return };
    let seed = std::env::var("QUORATE_SEED").map_or(seed, |seed| seed.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut cluster = Cluster::new(1);
    cluster.set("auth.bcrypt_cost", "4");
    let etcd = Etcd::start(&program, &cluster).await;
    let newest = load(&etcd.channel(), &mut fastrand::Rng::with_seed(seed), 1..600, true).await;
    make_users(&etcd.channel()).await;
    let file = cluster.root().join("etcd.db");
    save(&etcdctl, &etcd, &file);
    let said = restore(&file, &cluster, &[]).unwrap();
    assert!(said.contains("a snapshot file of etcd 3.") && said.contains(&format!("at revision {newest}")), "{said}");
    cluster.start_pod(0);
    let ours = cluster.channel(0);
    wait_for("the restored member to know root", async || {
        token(&ours, "root", "of-root").await.map(drop).map_err(|status| status.message().to_owned())
    })
    .await;
    compare_users(&etcd.channel(), &ours).await;
    compare(&etcd.channel(), &ours, newest).await;
    // It is a cluster as any other: revisions go on, and what was restored outlives restarts.
    assert_eq!(cluster.put(0, "k00", "later").await, newest + 1);
    cluster.kill_all();
    cluster.start_all().await;
    let ours = cluster.channel(0);
    assert!(all(&etcd.channel(), newest).await == all(&ours, newest).await);
    assert_eq!(cluster.get(0, "k00").await.as_deref(), Some("later"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_etcd_3_4_is_restored_whole() {
    is_the_same_here(ETCD, ETCDCTL, 34).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_etcd_3_7_is_restored_whole() {
    is_the_same_here(ETCD_37, ETCDCTL_37, 37).await;
}

/// The documentation's own commands move a cluster that is written to all the while.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_way_moves_a_cluster_with_its_revisions() {
    let (Some(program), Some(_)) = (tools::require(&ETCD_37), tools::require(&ETCDCTL)) else { return };
    let seed = std::env::var("QUORATE_SEED").map_or(8, |seed| seed.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new(3);
    let etcd = Etcd::start(&program, &cluster).await;
    load(&etcd.channel(), &mut random, 1..420, true).await;
    let text = include_str!("../../docs/from-etcd.md").split("\n## ").find(|part| part.starts_with("Moving a cluster"));
    let lines: Vec<String> = text
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .map(|line| {
            let line =
                line.replace("etcd-0:2379", etcd.endpoint()).replace("kv-%d.example.org:2380", &cluster.pattern());
            line.replace("kv-0.example.org:2379", &cluster.endpoint(0)).replace("--data-dir restored", "--data-dir .")
        })
        .collect();
    let [make @ .., follow] = &lines[..] else { panic!("{lines:?}") };
    let shell = |line: &String| {
        let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
        let mut command = tokio::process::Command::new("sh");
        command.args(["-c", line]).current_dir(cluster.root()).env("PATH", path).env("ETCDCTL_API", "3");
        command.kill_on_drop(true);
        command
    };
    assert_eq!(make.len(), 3, "{lines:?}");
    for line in make {
        let output = shell(line).output().await.unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // What the file does not have: more of everything, and revisions of more changes than one list of operations may have.
    load(&etcd.channel(), &mut random, 1000..1150, false).await;
    make_large_revisions(&etcd.channel()).await;
    let mut follow = shell(follow);
    cluster.start_all().await;
    let (channel, mut writing) = (etcd.channel(), random.fork());
    let writer = tokio::spawn(async move { load(&channel, &mut writing, 2000..2150, false).await });
    let output = follow.output().await.unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("all equal, with their revisions"), "{said}{errors}");
    // Again, from where it ended, now that nobody writes.
    let newest = writer.await.unwrap();
    let args =
        ["migrate", "--from", etcd.endpoint(), "--to", &cluster.endpoint(2), "--same-revisions", "--until-synced"];
    let said = quorate(&args).unwrap();
    assert!(said.contains(&format!("at revision {newest}")), "{said}");
    compare(&etcd.channel(), &cluster.channel(1), newest).await;
    // Whoever writes here is found out.
    cluster.put(0, "mine", "v").await;
    let refused = quorate(&args).unwrap_err();
    assert!(refused.contains("was written to"), "{refused}");
}

/// A lease with 300 keys that ends: one revision.
async fn make_large_revisions(channel: &Channel) {
    let (mut kv, mut lease) = (KvClient::new(channel.clone()), LeaseClient::new(channel.clone()));
    lease.lease_grant(LeaseGrantRequest { ttl: 600, id: 9 }).await.unwrap();
    for n in 0..3 {
        let ops = (0..100).map(|i| {
            let (key, value) = (format!("many/{n}/{i}").into(), "v".into());
            RequestOp { request: Some(Op::RequestPut(PutRequest { key, value, lease: 9, ..Default::default() })) }
        });
        kv.txn(TxnRequest { success: ops.collect(), ..Default::default() }).await.unwrap();
    }
    lease.lease_revoke(LeaseRevokeRequest { id: 9 }).await.unwrap();
}

/// A small file that is checked in, unpacked into `dir`.
fn checked_in(dir: &Path) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/etcd-files/etcd-3.7.gz");
    let mut bytes = Vec::new();
    let mut unpack = flate2::read::GzDecoder::new(std::fs::File::open(packed).unwrap());
    std::io::Read::read_to_end(&mut unpack, &mut bytes).unwrap();
    let file = dir.join("etcd.db");
    std::fs::write(&file, bytes).unwrap();
    file
}

#[test]
fn what_cannot_be_believed_is_refused_and_makes_nothing() {
    let cluster = Cluster::new(1);
    let file = checked_in(cluster.root());
    let whole = std::fs::read(&file).unwrap();
    let copy = |bytes: &[u8]| {
        let path = cluster.root().join("copy.db");
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let bare = &whole[..whole.len() - 32];
    for (bytes, says) in [
        (&flipped[..], "its SHA-256 does not match its content"),
        (&whole[..whole.len() / 2], "has no checksum at its end"),
        (bare, "say --skip-hash-check"),
    ] {
        let refused = restore(&copy(bytes), &cluster, &[]).unwrap_err();
        assert!(refused.contains(says), "{refused}");
        assert!(!cluster.data_dir(0).exists(), "a refused file makes nothing");
    }
    let refused = restore(&copy(&bare[..bare.len() / 2]), &cluster, &["--skip-hash-check"]).unwrap_err();
    assert!(refused.contains("it is cut") && !cluster.data_dir(0).exists(), "{refused}");

    let facts = |file: &Path, more: &[&str]| -> Value {
        let args = ["snapshot", "status", file.to_str().unwrap(), "-o", "json"];
        serde_json::from_str(&quorate(&[&args[..], more].concat()).unwrap()).unwrap()
    };
    let found = facts(&copy(bare), &["--skip-hash-check"]);
    let expected = facts(&file, &[]);
    assert_eq!(
        (&found["hash"], &found["sha256"], &found["etcd"]),
        (&expected["hash"], &expected["sha256"], &expected["etcd"])
    );
    assert_eq!(
        (&expected["revision"], &expected["compactRevision"], &expected["totalKey"]),
        (&30.into(), &25.into(), &132.into())
    );
    let said = restore(&copy(bare), &cluster, &["--skip-hash-check", "--bump-revision", "1000"]).unwrap();
    assert!(said.contains("132 keys at revision 1030"), "{said}");
}
