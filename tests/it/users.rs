//! Users and roles on a running cluster: over restarts and backups, on open streams, through every member. Who may call what is in `permissions`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quorate::pb::authpb::{Permission, UserAddOptions, permission::Type};
use quorate::pb::etcd::auth_client::AuthClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest,
    AuthRoleRevokePermissionRequest, AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthenticateRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse,
};
use quorate::pb::lock::LockRequest;
use quorate::pb::lock::lock_client::LockClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::support::cluster::{Cluster, wait_for};
use crate::support::tools::{self, Tool};

/// Shows a token with each request.
#[derive(Clone)]
struct Token(String);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("token", self.0.parse().unwrap());
        Ok(request)
    }
}

type As = InterceptedService<Channel, Token>;

fn as_holder(cluster: &Cluster, slot: u64, token: &str) -> As {
    InterceptedService::new(cluster.channel(slot), Token(token.to_owned()))
}

async fn token(cluster: &Cluster, slot: u64, user: &str, password: &str) -> Result<String, Status> {
    let request = AuthenticateRequest { name: user.into(), password: password.into() };
    Ok(AuthClient::new(cluster.channel(slot)).authenticate(request).await?.into_inner().token)
}

/// A cluster whose users are root and `u`, who may read and write below `u/`; each has its own name as the password.
async fn cluster(size: u64, settings: &[(&str, &str)]) -> (Cluster, String, String) {
    let mut cluster = Cluster::new(size);
    cluster.set("auth.bcrypt_cost", "4");
    for (key, value) in settings {
        cluster.set(key, value);
    }
    cluster.start_all().await;
    turn_on(&cluster).await;
    let (root, user) = (token(&cluster, 0, "root", "root").await.unwrap(), token(&cluster, 0, "u", "u").await.unwrap());
    (cluster, root, user)
}

async fn turn_on(cluster: &Cluster) {
    let mut auth = AuthClient::new(cluster.channel(0));
    auth.role_add(AuthRoleAddRequest { name: "r".into() }).await.unwrap();
    auth.role_grant_permission(grant()).await.unwrap();
    for (user, role) in [("root", "root"), ("u", "r")] {
        let add = AuthUserAddRequest { name: user.into(), password: user.into(), ..Default::default() };
        auth.user_add(add).await.unwrap();
        auth.user_grant_role(AuthUserGrantRoleRequest { user: user.into(), role: role.into() }).await.unwrap();
    }
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
}

fn grant() -> AuthRoleGrantPermissionRequest {
    let perm = Permission { perm_type: Type::Readwrite.into(), key: "u/".into(), range_end: "u0".into() };
    AuthRoleGrantPermissionRequest { name: "r".into(), perm: Some(perm) }
}

fn revoke() -> AuthRoleRevokePermissionRequest {
    AuthRoleRevokePermissionRequest { role: "r".into(), key: "u/".into(), range_end: "u0".into() }
}

async fn put(cluster: &Cluster, slot: u64, token: &str, key: &str) -> Result<i64, Status> {
    let request = PutRequest { key: key.to_owned().into(), value: "v".into(), ..Default::default() };
    let answer = KvClient::new(as_holder(cluster, slot, token)).put(request).await?.into_inner();
    Ok(answer.header.unwrap().revision)
}

/// Waits until the pod serves who shows this token.
async fn wait_put(cluster: &Cluster, slot: u64, token: &str) {
    wait_for(&format!("kv-{slot} to take a put"), async || {
        put(cluster, slot, token, "u/k").await.map(drop).map_err(|status| status.message().to_owned())
    })
    .await;
}

fn code<T>(answer: Result<T, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn users_outlive_restarts_backups_and_any_member_takes_their_tokens() {
    let (mut cluster, root, user) = cluster(3, &[]).await;
    for slot in 0..3 {
        put(&cluster, slot, &user, "u/k").await.unwrap();
        assert_eq!(code(put(&cluster, slot, &user, "k").await), Code::PermissionDenied);
        let nobody = cluster.kv(slot).put(PutRequest { key: "u/k".into(), ..Default::default() }).await;
        assert_eq!(nobody.unwrap_err().message(), "etcdserver: user name is empty");
    }
    let file = cluster.root().join("backup");
    let quorate = |args: &[&str]| tools::run(Command::new(env!("CARGO_BIN_EXE_quorate")).args(args));
    let file = file.to_str().unwrap();
    quorate(&["snapshot", "save", file, "--endpoints", &cluster.endpoint(1), "--user", "root:root"]);
    cluster.kill_all();
    (0..3).for_each(|slot| cluster.start_pod(slot));
    for slot in 0..3 {
        wait_put(&cluster, slot, &user).await;
        assert_eq!(code(put(&cluster, slot, &user, "k").await), Code::PermissionDenied);
        put(&cluster, slot, &root, "k").await.unwrap();
    }
    cluster.kill_all();
    let mut restored = Cluster::new(1);
    let (dir, pattern) = (restored.root().to_str().unwrap().to_owned(), restored.pattern());
    let names = ["--name", "kv-%d", "--peers", &pattern, "--size", "1"];
    quorate(&[&["snapshot", "restore", file, "--data-dir", &dir][..], &names].concat());
    restored.start_pod(0);
    // Passwords are the same; tokens are of the cluster that is gone.
    let new = wait_for("the restored member to know root", async || {
        token(&restored, 0, "root", "root").await.map_err(|status| status.message().to_owned())
    })
    .await;
    put(&restored, 0, &new, "k").await.unwrap();
    assert_eq!(code(put(&restored, 0, &user, "u/k").await), Code::Unauthenticated);
}

struct Watching {
    _requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
}

async fn watch(cluster: &Cluster, slot: u64, token: &str) -> Watching {
    let (requests, outgoing) = mpsc::channel(4);
    let create = WatchCreateRequest { key: "u/".into(), range_end: "u0".into(), ..Default::default() };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    requests.send(create).await.unwrap();
    let mut client = WatchClient::new(as_holder(cluster, slot, token));
    let answers = client.watch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    Watching { _requests: requests, answers }
}

impl Watching {
    async fn next(&mut self) -> WatchResponse {
        tokio::time::timeout(Duration::from_secs(60), self.answers.message()).await.unwrap().unwrap().unwrap()
    }
}

const DENIED: &str = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
const ENDED: &str = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token";

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_when_its_permission_or_its_token_does() {
    let (cluster, root, user) = cluster(3, &[]).await;
    let mut admin = AuthClient::new(as_holder(&cluster, 1, &root));
    for (slot, token) in [(0, &user), (1, &user), (2, &user)] {
        let mut watching = watch(&cluster, slot, token).await;
        assert!(watching.next().await.created);
        put(&cluster, 0, &root, "u/seen").await.unwrap();
        assert_eq!(watching.next().await.events.len(), 1);
        // Another role changes: it goes on.
        admin.role_add(AuthRoleAddRequest { name: format!("other{slot}") }).await.unwrap();
        put(&cluster, 0, &root, "u/seen").await.unwrap();
        assert_eq!(watching.next().await.events.len(), 1);
        admin.role_revoke_permission(revoke()).await.unwrap();
        put(&cluster, 0, &root, "u/hidden").await.unwrap();
        let last = watching.next().await;
        assert!(last.canceled && last.events.is_empty(), "{last:?}");
        assert_eq!(last.cancel_reason, DENIED);
        assert_eq!(watch(&cluster, slot, token).await.next().await.cancel_reason, DENIED);
        admin.role_grant_permission(grant()).await.unwrap();
    }
    let mut watching = watch(&cluster, 2, &user).await;
    assert!(!watching.next().await.canceled);
    let change = AuthUserChangePasswordRequest { name: "u".into(), password: "v".into(), ..Default::default() };
    admin.user_change_password(change).await.unwrap();
    assert_eq!(watching.next().await.cancel_reason, ENDED);
    assert_eq!(watch(&cluster, 2, &user).await.next().await.cancel_reason, ENDED);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_with_what_they_stand_for() {
    let (cluster, root, user) = cluster(3, &[]).await;
    let mut admin = AuthClient::new(as_holder(&cluster, 2, &root));
    let wrong = token(&cluster, 1, "u", "x").await.unwrap_err();
    let failed = "etcdserver: authentication failed, invalid user ID or password";
    assert_eq!((wrong.code(), wrong.message()), (Code::InvalidArgument, failed));
    assert_eq!(code(token(&cluster, 1, "nobody", "x").await), Code::InvalidArgument);
    let change = AuthUserChangePasswordRequest { name: "u".into(), password: "v".into(), ..Default::default() };
    admin.user_change_password(change).await.unwrap();
    assert_eq!(code(token(&cluster, 0, "u", "u").await), Code::InvalidArgument);
    let newer = token(&cluster, 0, "u", "v").await.unwrap();
    for slot in 0..3 {
        // One that has not applied the change yet waits for it.
        put(&cluster, slot, &newer, "u/k").await.unwrap();
        let refused = put(&cluster, slot, &user, "u/k").await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "etcdserver: invalid auth token"));
    }
    admin.user_delete(AuthUserDeleteRequest { name: "u".into() }).await.unwrap();
    let options = Some(UserAddOptions { no_password: true });
    admin.user_add(AuthUserAddRequest { name: "u".into(), options, ..Default::default() }).await.unwrap();
    assert_eq!(code(put(&cluster, 2, &newer, "u/k").await), Code::Unauthenticated);
    let none = token(&cluster, 0, "u", "v").await.unwrap_err();
    assert_eq!(none.message(), "auth: authentication failed, password was given for no password user");
    // While it is off, nobody looks at a token.
    admin.auth_disable(AuthDisableRequest {}).await.unwrap();
    put(&cluster, 2, "no token", "k").await.unwrap();
    assert_eq!(code(token(&cluster, 0, "root", "root").await), Code::FailedPrecondition);
    AuthClient::new(cluster.channel(0)).auth_enable(AuthEnableRequest {}).await.unwrap();
    assert_eq!(code(put(&cluster, 0, &root, "k").await), Code::Unauthenticated);
    let newer = token(&cluster, 0, "root", "root").await.unwrap();
    put(&cluster, 2, &newer, "k").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_used_outlives_its_time_and_another_does_not() {
    let (cluster, _, user) = cluster(1, &[("auth.token_ttl", "2s")]).await;
    let idle = token(&cluster, 0, "u", "u").await.unwrap();
    let begun = Instant::now();
    // Two lives and two more, for clocks that differ.
    wait_for("the idle token to be too old", async || {
        put(&cluster, 0, &user, "u/k").await.unwrap();
        if begun.elapsed() > Duration::from_secs(6) { Ok(()) } else { Err("it is used") }
    })
    .await;
    assert_eq!(code(put(&cluster, 0, &idle, "u/k").await), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_and_locks_of_users_are_theirs() {
    let (cluster, root, user) = cluster(1, &[]).await;
    let mut leases = LeaseClient::new(as_holder(&cluster, 0, &user));
    let mut grant = async |key: &'static str, holder: &str| {
        let id = leases.lease_grant(LeaseGrantRequest { id: 0, ttl: 600 }).await.unwrap().into_inner().id;
        let put = PutRequest { key: key.into(), lease: id, ..Default::default() };
        KvClient::new(as_holder(&cluster, 0, holder)).put(put).await.unwrap();
        id
    };
    let (own, other) = (grant("u/k", &user).await, grant("k", &root).await);
    let keep = async |id: i64, holder: &str| {
        let request = tokio_stream::once(LeaseKeepAliveRequest { id });
        let mut answers =
            LeaseClient::new(as_holder(&cluster, 0, holder)).lease_keep_alive(request).await?.into_inner();
        Ok::<_, Status>(answers.message().await?.map_or(0, |answer| answer.ttl))
    };
    assert_eq!(keep(own, &user).await.unwrap(), 600);
    assert_eq!(code(keep(other, &user).await), Code::PermissionDenied);
    assert_eq!(keep(other, &root).await.unwrap(), 600);
    let lock = async |name: &'static str| {
        LockClient::new(as_holder(&cluster, 0, &user)).lock(LockRequest { name: name.into(), lease: 0 }).await
    };
    assert!(lock("u/lock").await.unwrap().into_inner().key.starts_with(b"u/lock/"));
    assert_eq!(code(lock("lock").await), Code::PermissionDenied);
    let all = RangeRequest { key: "lock".into(), range_end: "lock0".into(), ..Default::default() };
    let left = KvClient::new(as_holder(&cluster, 0, &root)).range(all).await.unwrap().into_inner();
    assert_eq!(left.count, 0, "who is refused leaves nothing behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_wait_until_every_member_knows_them() {
    let mut cluster = Cluster::new(3);
    cluster.set("auth.bcrypt_cost", "4").set("server.request_timeout", "3s");
    for slot in 0..3 {
        cluster.start_pod_with(slot, &[("QUORATE_TEST_APPLY_VERSION", "2")]);
    }
    cluster.wait_formed().await;
    let mut auth = AuthClient::new(cluster.channel(0));
    let refused = auth.role_add(AuthRoleAddRequest { name: "r".into() }).await.unwrap_err();
    let text = refused.message();
    assert!(text.contains("users and roles need cluster version 3") && text.contains("kv-"), "{text}");
    assert!(auth.user_list(AuthUserListRequest {}).await.unwrap().into_inner().users.is_empty());
    for slot in 0..3 {
        cluster.terminate(slot).await;
        cluster.start_pod(slot);
        cluster.wait_formed().await;
    }
    wait_for("the cluster to keep a role", async || {
        let added = AuthClient::new(cluster.channel(0)).role_add(AuthRoleAddRequest { name: "kept".into() }).await;
        added.map(drop).map_err(|status| status.message().to_owned())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_makes_users_and_is_one() {
    let mut cluster = Cluster::new(1);
    cluster.set("auth.bcrypt_cost", "4");
    cluster.start_all().await;
    let quorate = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.args(line.split(' ')).env("QUORATE_ENDPOINTS", cluster.endpoint(0)).stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    };
    let done = |line: &str| quorate(line).unwrap_or_else(|error| panic!("quorate {line}: {error}"));
    for line in [
        "role add r",
        "role grant-permission r read u/ --prefix",
        "role grant-permission r write u/mine",
        "user add root --new-user-password secret",
        "user add u --new-user-password word",
        "user add named --no-password",
        "user grant-role root root",
        "user grant-role u r",
        "auth enable",
    ] {
        done(line);
    }
    assert_eq!(done("auth status --user u:word"), "authentication is on, revision 9\n");
    assert!(quorate("put u/mine v").unwrap_err().contains("user name is empty"));
    assert!(quorate("put u/mine v --user u --password no").unwrap_err().contains("authentication failed"));
    assert_eq!(done("put u/mine v --user u --password word"), "OK\n");
    assert!(quorate("put u/other v --user u:word").unwrap_err().contains("permission denied"));
    assert_eq!(done("get u/mine --user u:word --print-value-only"), "v\n");
    assert_eq!(done("user list --user root:secret"), "named\nroot\nu\n");
    assert_eq!(done("user get u --user u:word"), "r\n");
    assert!(quorate("user list --user u:word").unwrap_err().contains("permission denied"));
    let table = done("role get r --user u:word");
    assert_eq!(table.lines().collect::<Vec<_>>(), ["KIND   KEY     BEFORE", "read   u/      u0", "write  u/mine"]);
    done("user passwd u --new-user-password other --user root:secret");
    assert!(quorate("get u/mine --user u:word").is_err());
    let token = token(&cluster, 0, "u", "other").await.unwrap();
    assert_eq!(done(&format!("get u/mine --print-value-only --token {token}")), "v\n");
    done("auth disable --user root:secret");
    assert_eq!(done("get u/mine --print-value-only --user u:whatever"), "v\n");
}

/// etcd's own client, of 3.7.
const ETCDCTL_37: Tool =
    Tool { name: "etcdctl-3.7", install: "`cd .ci/etcd && go build -o DIR/etcdctl-3.7 go.etcd.io/etcd/etcdctl/v3`" };

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_makes_users_and_is_one() {
    let Some(program) = tools::require(&ETCDCTL_37) else { return };
    let mut cluster = Cluster::new(3);
    cluster.set("auth.bcrypt_cost", "4");
    cluster.start_all().await;
    let ctl = |line: &str| {
        let mut command = Command::new(&program);
        command.args(["--endpoints", &cluster.endpoints(), "--command-timeout", "30s"]).args(line.split(' '));
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let done = |line: &str| {
        let (ok, text) = ctl(line);
        assert!(ok, "etcdctl {line}: {text}");
        text
    };
    for line in [
        "user add root:secret",
        "user add u:word",
        "role add r",
        "role grant-permission --prefix r readwrite u/",
        "user grant-role root root",
        "user grant-role u r",
        "auth enable",
    ] {
        done(line);
    }
    assert_eq!(done("--user u:word put u/k v"), "OK\n");
    assert_eq!(done("--user u --password word get u/k"), "u/k\nv\n");
    assert!(ctl("--user u:word put k v").1.contains("permission denied"));
    assert!(ctl("--user u:no get u/k").1.contains("authentication failed"));
    assert!(ctl("get u/k").1.contains("user name is empty"));
    assert!(done("--user root:secret role get r").contains("[u/, u0) (prefix u/)"));
    assert!(done("--user root:secret endpoint status").contains("3.7"));
    assert!(ctl("--user u:word watch k --rev 1").1.contains("permission denied"));
    done("--user root:secret auth disable");
}
