//! Tokens of an issuer of the test's own: who they name, how their keys change, and attacks with them.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{WatchCreateRequest, WatchRequest};
use ring::hmac;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

use crate::support::cluster::{Cluster, binary, http_request, wait_for};
use crate::support::issuer::{Issuer, POD_TOKEN, Signer, encoded, key_set, now, unsigned};

const POD: &str = "system:serviceaccount:shop:web";
const DENIED: &str = "permission denied";
const INVALID: &str = "invalid auth token";

/// What our client prints; an error is what it said.
fn ask(cluster: &Cluster, slot: u64, token: &str, line: &[&str]) -> Result<String, String> {
    let mut command = Command::new(binary());
    command.args(line).args(["--endpoints", &cluster.endpoint(slot)]);
    if !token.is_empty() {
        command.args(["--token", token]);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

fn put(cluster: &Cluster, slot: u64, token: &str, key: &str) -> Result<String, String> {
    ask(cluster, slot, token, &["put", key, "v"])
}

#[track_caller]
fn refused(answer: Result<String, String>, why: &str) {
    let error = answer.expect_err("it is allowed");
    assert!(error.contains(why), "{error}");
}

/// Roles `shop` and `other`, each for what is below its name, root, and user `named`, who has role `other`; authentication is on.
fn turn_on(cluster: &Cluster) {
    for line in [
        "role add shop",
        "role grant-permission shop readwrite shop/ --prefix",
        "role add other",
        "role grant-permission other readwrite other/ --prefix",
        "user add named --no-password",
        "user grant-role named other",
        "user add root --no-password",
        "user grant-role root root",
        "auth enable",
    ] {
        ask(cluster, 0, "", &line.split(' ').collect::<Vec<_>>()).unwrap();
    }
}

fn set_issuer(cluster: &mut Cluster, issuer: &str) {
    cluster.set("oidc.issuer", issuer).set("oidc.audiences", "quorate");
    cluster.set("oidc.roles", "shop <- sub=system:serviceaccount:shop:*,root <- groups=admins");
}

async fn cluster_of(issuer: &Issuer, dir: &Path, size: u64) -> Cluster {
    let mut cluster = Cluster::new(size);
    set_issuer(&mut cluster, issuer.url());
    cluster.set("oidc.ca_file", dir.join("ca.crt").to_str().unwrap());
    cluster.start_all().await;
    turn_on(&cluster);
    cluster
}

fn claims(issuer: &str, changes: &Value) -> Value {
    let mut claims = json!({ "iss": issuer, "aud": ["quorate"], "sub": POD, "exp": now() + 600 });
    for (name, value) in changes.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

async fn wait_taken(cluster: &Cluster, slot: u64, token: &str) {
    wait_for("the token to be taken", async || put(cluster, slot, token, "shop/k").map(drop)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_issuer_is_a_user_with_the_roles_of_its_claims_and_a_forged_one_is_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (issuer, signer) = (Issuer::start(dir.path()).await, Signer::new("1"));
    issuer.publish(&[&signer]);
    let cluster = cluster_of(&issuer, dir.path(), 3).await;
    let claims = |changes: Value| claims(issuer.url(), &changes);
    let token = |changes: Value| signer.token(&claims(changes));
    let pod = token(json!({}));
    for slot in 0..3 {
        wait_taken(&cluster, slot, &pod).await;
        refused(put(&cluster, slot, &pod, "other/k"), DENIED);
        refused(ask(&cluster, slot, &pod, &["user", "list"]), DENIED);
        let admin = token(json!({ "sub": "someone", "groups": ["admins"] }));
        assert!(ask(&cluster, slot, &admin, &["user", "list"]).unwrap().contains("named"));
        // Whom no rule fits is the user of that name, or nobody.
        put(&cluster, slot, &token(json!({ "sub": "named" })), "other/k").unwrap();
        refused(put(&cluster, slot, &token(json!({ "sub": "stranger" })), "other/k"), DENIED);
        refused(put(&cluster, slot, "", "shop/k"), "user name is empty");
        for (what, forged) in [
            ("of another audience", token(json!({ "aud": "https://kubernetes.default.svc" }))),
            ("that has expired", token(json!({ "exp": now() - 100 }))),
            ("of another issuer", token(json!({ "iss": "https://other.example" }))),
            (
                "without a signature",
                format!("{}.", unsigned(&json!({ "alg": "none", "kid": "1" }), &claims(json!({})))),
            ),
            ("of another key with the same name", Signer::new("1").token(&claims(json!({})))),
            ("with the public key as the secret", {
                let text = unsigned(&json!({ "alg": "HS256", "kid": "1" }), &claims(json!({})));
                let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, signer.point()), text.as_bytes());
                format!("{text}.{}", encoded(tag.as_ref()))
            }),
        ] {
            let told = put(&cluster, slot, &forged, "shop/k");
            assert!(told.as_ref().is_err_and(|error| error.contains(INVALID)), "one {what}: {told:?}");
        }
    }
    let bearer = format!("Bearer {pod}");
    let post = async |headers: &[(&str, &str)]| {
        // shop/k.
        let body = r#"{"key":"c2hvcC9r","value":"dg=="}"#;
        http_request(&cluster.endpoint(1), "POST", "/v3/kv/put", headers, body).await.unwrap().0
    };
    assert_eq!(post(&[("Authorization", &bearer)]).await, 200);
    assert_eq!(post(&[("Authorization", "Bearer a.b.c")]).await, 401);
    assert_eq!(issuer.tokens(), Vec::<String>::new(), "it is shown nobody's token");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_followed_and_who_makes_up_names_of_keys_has_the_issuer_asked_no_more_often() {
    let dir = tempfile::tempdir().unwrap();
    let (issuer, old, new) = (Issuer::start(dir.path()).await, Signer::new("old"), Signer::new("new"));
    issuer.publish(&[&old]);
    let cluster = cluster_of(&issuer, dir.path(), 1).await;
    let token = |signer: &Signer| signer.token(&claims(issuer.url(), &json!({})));
    let (of_old, of_new) = (token(&old), token(&new));
    wait_taken(&cluster, 0, &of_old).await;
    refused(put(&cluster, 0, &of_new, "shop/k"), INVALID);
    issuer.publish(&[&old, &new]);
    // To ask for it is what has it fetched.
    wait_taken(&cluster, 0, &of_new).await;
    put(&cluster, 0, &of_old, "shop/k").unwrap();
    issuer.publish(&[&new]);
    let (begin, before) = (Instant::now(), issuer.fetches());
    wait_for("the old key to be gone", async || {
        refused(put(&cluster, 0, &Signer::new("made up").token(&claims(issuer.url(), &json!({}))), "shop/k"), INVALID);
        match put(&cluster, 0, &of_old, "shop/k") {
            Err(error) if error.contains(INVALID) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let most = 2 + begin.elapsed().as_secs() / 10;
    assert!(issuer.fetches() - before <= most, "{} in {:?}", issuer.fetches() - before, begin.elapsed());
    put(&cluster, 0, &of_new, "shop/k").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_with_its_token() {
    let dir = tempfile::tempdir().unwrap();
    let (issuer, signer) = (Issuer::start(dir.path()).await, Signer::new("1"));
    issuer.publish(&[&signer]);
    let cluster = cluster_of(&issuer, dir.path(), 1).await;
    wait_taken(&cluster, 0, &signer.token(&claims(issuer.url(), &json!({})))).await;
    // A minute is added, for clocks that differ.
    let token = signer.token(&claims(issuer.url(), &json!({ "exp": now() - 55 })));
    let create = WatchCreateRequest { key: "shop/".into(), range_end: "shop0".into(), ..Default::default() };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    let requests = tokio_stream::once(create).chain(tokio_stream::pending());
    let mut request = Request::new(requests);
    request.metadata_mut().insert("token", token.parse().unwrap());
    let mut answers = WatchClient::new(cluster.channel(0)).watch(request).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().created);
    let ended = tokio::time::timeout(Duration::from_secs(30), answers.message()).await.unwrap().unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unauthenticated, "etcdserver: invalid auth token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_is_asked_with_the_pods_token_and_nobody_else_is_shown_it() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (api, other, signer) =
        (Issuer::start(dir.path()).await, Issuer::start(elsewhere.path()).await, Signer::new("1"));
    api.publish(&[&signer]);
    // As it is on many clusters: another name in the tokens, and keys that are said to be elsewhere.
    let name = "https://kubernetes.default.svc.cluster.local";
    api.be_api_server(name, &format!("{}/keys", other.url()));
    let mut cluster = Cluster::new(1);
    set_issuer(&mut cluster, "kubernetes");
    cluster.set("kubernetes.api_server", api.url());
    cluster.set("kubernetes.service_account_dir", dir.path().to_str().unwrap());
    cluster.start_all().await;
    turn_on(&cluster);
    let token = signer.token(&claims(name, &json!({ "kubernetes.io": { "namespace": "shop" } })));
    wait_taken(&cluster, 0, &token).await;
    refused(put(&cluster, 0, &token, "other/k"), DENIED);
    assert!(api.tokens().iter().all(|token| *token == format!("Bearer {POD_TOKEN}")));
    assert_eq!((other.fetches(), other.tokens().len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_may_be_in_a_file_which_is_followed() {
    let (one, other) = (Signer::new("1"), Signer::new("2"));
    let mut cluster = Cluster::new(1);
    let file = cluster.root().join("keys.json");
    let write = |signer: &Signer| std::fs::write(&file, key_set(&[signer]).to_string()).unwrap();
    write(&one);
    set_issuer(&mut cluster, "ourselves");
    cluster.set("oidc.keys_file", file.to_str().unwrap());
    cluster.start_all().await;
    turn_on(&cluster);
    let [of_one, of_other] = [&one, &other].map(|signer| signer.token(&claims("ourselves", &json!({}))));
    put(&cluster, 0, &of_one, "shop/k").unwrap();
    refused(put(&cluster, 0, &of_other, "shop/k"), INVALID);
    std::fs::write(&file, "{").unwrap();
    wait_for("the status to tell of it", async || {
        let said = ask(&cluster, 0, &of_one, &["status"])?;
        if said.contains("[oidc-keys]") { Ok(()) } else { Err(said) }
    })
    .await;
    put(&cluster, 0, &of_one, "shop/k").unwrap();
    write(&other);
    wait_taken(&cluster, 0, &of_other).await;
    refused(put(&cluster, 0, &of_one, "shop/k"), INVALID);
}
