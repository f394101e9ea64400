//! Quotas and rates of roles on a running cluster: through every member, over restarts and changes of the leader.

use std::process::Command;
use std::time::{Duration, Instant};

use quorate::pb::etcd::PutRequest;
use quorate::pb::etcd::auth_client::AuthClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::{AuthenticateRequest, DeleteRangeRequest};
use tonic::{Code, Request, Status};

use crate::support::cluster::{Cluster, binary, wait_for};

const ROOT: [&str; 2] = ["--user", "root:root"];

fn ask(cluster: &Cluster, flags: &[&str], line: &str) -> String {
    let mut command = Command::new(binary());
    command.args(line.split(' ')).args(["--endpoints", &cluster.endpoint(0)]).args(flags);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    assert!(output.status.success(), "{line}: {text}");
    text
}

/// Roles and users `shop` and `other`, for what is below their names, and root; the password is the name.
async fn cluster() -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.set("auth.bcrypt_cost", "4");
    cluster.start_all().await;
    for name in ["root", "shop", "other"] {
        ask(&cluster, &[], &format!("user add {name} --new-user-password {name}"));
        if name != "root" {
            ask(&cluster, &[], &format!("role add {name}"));
            ask(&cluster, &[], &format!("role grant-permission {name} readwrite {name}/ --prefix"));
        }
        ask(&cluster, &[], &format!("user grant-role {name} {name}"));
    }
    ask(&cluster, &[], "auth enable");
    cluster
}

async fn token(cluster: &Cluster, slot: u64, user: &str) -> String {
    wait_for("a token", async || {
        let request = AuthenticateRequest { name: user.into(), password: user.into() };
        let answer = AuthClient::new(cluster.channel(slot)).authenticate(request).await;
        answer.map(|answer| answer.into_inner().token).map_err(|status| status.message().to_owned())
    })
    .await
}

fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("token", token.parse().unwrap());
    request
}

async fn put(cluster: &Cluster, slot: u64, token: &str, key: &str, bytes: usize) -> Result<(), Status> {
    let put = PutRequest { key: key.to_owned().into(), value: vec![b'v'; bytes].into(), ..Default::default() };
    KvClient::new(cluster.channel(slot)).put(with(token, put)).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_stores_no_more_than_its_quota_through_whichever_member_and_after_restarts() {
    let mut cluster = cluster().await;
    ask(&cluster, &ROOT, "role quota shop --bytes 4KiB --keys 20");
    let (shop, other) = (token(&cluster, 0, "shop").await, token(&cluster, 0, "other").await);
    let mut stored = 0;
    let full = loop {
        match put(&cluster, stored % 3, &shop, &format!("shop/{stored}"), 500).await {
            Ok(()) => stored += 1,
            Err(status) => break status,
        }
        assert!(stored < 20, "there is no end to it");
    };
    let text = full.message();
    assert_eq!(full.code(), Code::ResourceExhausted);
    assert!(text.starts_with("etcdserver: mvcc: database space exceeded: role \"shop\" holds "), "{text}");
    // Others are not concerned, nor is what makes nothing larger, nor are reads.
    put(&cluster, 1, &other, "other/k", 5000).await.unwrap();
    put(&cluster, 1, &shop, "shop/0", 400).await.unwrap();
    let shown = ask(&cluster, &ROOT, "role quotas");
    assert!(shown.contains("shop") && shown.contains("of 4096") && shown.contains("of 20"), "{shown}");
    cluster
        .wait_http(
            2,
            "/metrics",
            200,
            &["quorate_role_quota_bytes{role=\"shop\"} 4096", "quorate_role_bytes{role=\"shop\"}"],
        )
        .await;
    let refused = async |cluster: &Cluster, slot: u64| {
        let again = put(cluster, slot, &shop, &format!("shop/{stored}"), 500).await.unwrap_err();
        assert_eq!(again.code(), Code::ResourceExhausted, "{again}");
    };
    for slot in 0..3 {
        refused(&cluster, slot).await;
    }
    // To the byte the same, whoever leads, and whatever has restarted: what is left is what there was.
    let usage = |cluster: &Cluster| {
        let text = ask(cluster, &[&ROOT[..], &["--output", "json"]].concat(), "role quotas");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["roles"][0]["bytes"].as_u64().unwrap()
    };
    let before = usage(&cluster);
    cluster.kill_all();
    (0..3).for_each(|slot| cluster.start_pod(slot));
    for slot in 0..3 {
        cluster.wait_http(slot, "/readyz", 200, &[]).await;
    }
    assert_eq!(usage(&cluster), before);
    let room = 4096 - before;
    // Of another key: what it takes beside its value is the same whatever the value, as long as both lengths have as many digits in base 128.
    let probe = async |cluster: &Cluster, bytes: u64| put(cluster, 1, &shop, "shop/probe", bytes as usize).await;
    let most = {
        let (mut low, mut high) = (0, room);
        while low < high {
            let middle = (low + high).div_ceil(2);
            match probe(&cluster, middle).await {
                Ok(()) => {
                    low = middle;
                    let delete = DeleteRangeRequest { key: "shop/probe".into(), ..Default::default() };
                    KvClient::new(cluster.channel(1)).delete_range(with(&shop, delete)).await.unwrap();
                }
                Err(status) if status.code() == Code::ResourceExhausted => high = middle - 1,
                Err(status) => panic!("{status}"),
            }
        }
        low
    };
    probe(&cluster, most).await.unwrap();
    assert_eq!(usage(&cluster), 4096, "the last byte is used, and none beyond");
    ask(&cluster, &ROOT, "role quota shop --none");
    put(&cluster, 2, &shop, "shop/more", 5000).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_writes_no_more_often_than_its_rate_however_many_members_it_asks() {
    const RATE: usize = 20;
    let cluster = cluster().await;
    ask(&cluster, &ROOT, &format!("role quota shop --requests-per-second {RATE}"));
    let (shop, other) = (token(&cluster, 0, "shop").await, token(&cluster, 0, "other").await);
    let begin = Instant::now();
    let (mut done, mut refused) = (0, 0);
    while begin.elapsed() < Duration::from_secs(3) {
        let asked = (0..3).map(|slot| put(&cluster, slot, &shop, "shop/k", 1));
        for answer in futures_util::future::join_all(asked).await {
            match answer {
                Ok(()) => done += 1,
                Err(status) => {
                    assert_eq!(status.message(), "etcdserver: too many requests");
                    refused += 1;
                }
            }
        }
        put(&cluster, 1, &other, "other/k", 1).await.unwrap();
    }
    // A second's worth at the begin, and the rate from there on.
    let most = RATE + (RATE as f64 * begin.elapsed().as_secs_f64()) as usize + 1;
    assert!(refused > 0 && done <= most && done >= RATE, "{done} done, {refused} refused, at most {most}");
}
