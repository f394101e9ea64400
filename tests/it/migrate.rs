//! A live etcd moves into a cluster of ours.

use std::process::Stdio;

use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::request_op::Request as Op;
use quorate::pb::etcd::{
    DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest,
    RequestOp, TxnRequest,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::support::cluster::{Cluster, binary, wait_for};
use crate::support::etcd::Etcd;
use crate::support::tools::{self, ETCD};

fn migrate(etcd: &Etcd, cluster: &Cluster, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(["migrate", "--from", etcd.endpoint(), "--to", &cluster.endpoints()]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn put(key: &str, value: &str, lease: i64) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), lease, ..Default::default() }
}

/// 1,200 keys, some of them with a lease that has 600 s left.
async fn fill(etcd: &Etcd) -> i64 {
    let grant = LeaseGrantRequest { ttl: 600, id: 77 };
    let lease = LeaseClient::new(etcd.channel()).lease_grant(grant).await.unwrap().into_inner().id;
    let mut kv = etcd.kv();
    for n in 0..12 {
        let ops = (0..100).map(|i| {
            let key = format!("k{:04}", n * 100 + i);
            RequestOp { request: Some(Op::RequestPut(put(&key, &format!("v{i}"), if i == 7 { lease } else { 0 }))) }
        });
        kv.txn(TxnRequest { success: ops.collect(), ..Default::default() }).await.unwrap();
    }
    lease
}

async fn ttl(cluster: &Cluster, id: i64) -> (i64, usize) {
    let ask = LeaseTimeToLiveRequest { id, keys: true };
    let answer = LeaseClient::new(cluster.channel(0)).lease_time_to_live(ask).await.unwrap().into_inner();
    (answer.ttl, answer.keys.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_etcd_is_copied_with_its_leases_while_it_is_written_to() {
    let Some(program) = tools::require(&ETCD) else { return };
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    let etcd = Etcd::start(&program, &cluster).await;
    let lease = fill(&etcd).await;
    let mut kv = etcd.kv();
    let writing = tokio::spawn(async move {
        for n in 0..1_000_000u32 {
            if kv.put(put(&format!("live{}", n % 50), &n.to_string(), 0)).await.is_err() {
                return;
            }
        }
    });
    let output = migrate(&etcd, &cluster, &["--until-synced"]).output().await.unwrap();
    writing.abort();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("all equal"), "{said}{errors}");
    let all = RangeRequest { key: "k".into(), range_end: "l".into(), count_only: true, ..Default::default() };
    assert_eq!(cluster.kv(1).range(all).await.unwrap().into_inner().count, 1200);
    let (left, keys) = ttl(&cluster, lease).await;
    assert!((500..=600).contains(&left) && keys == 12, "{left} s, {keys} keys");
    // A second time there is something.
    let output = migrate(&etcd, &cluster, &["--until-synced"]).output().await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && errors.contains("the target holds"), "{errors}");
}

/// A migration that follows; what it says so far is read until it says `until`.
async fn following(etcd: &Etcd, cluster: &Cluster, args: &[&str]) -> Child {
    let mut child = migrate(etcd, cluster, args).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        if line.contains("following the source") {
            // The rest must be read, too, or the process waits for a reader.
            tokio::spawn(async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    println!("{line}")
                }
            });
            return child;
        }
        println!("{line}");
    }
    panic!("it ended before it followed");
}

async fn end(mut child: Child) -> (bool, String) {
    kill_process(Pid::from_raw(child.id().unwrap() as i32).unwrap(), Signal::INT).unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).await.unwrap();
    (child.wait().await.unwrap().success(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_is_followed_until_the_switch_and_compared() {
    let Some(program) = tools::require(&ETCD) else { return };
    let cluster = Cluster::start(1).await;
    let etcd = Etcd::start(&program, &cluster).await;
    let lease = fill(&etcd).await;
    let child = following(&etcd, &cluster, &[]).await;
    let mut kv = etcd.kv();
    kv.put(put("later", "value", 0)).await.unwrap();
    kv.put(put("later", "changed", 0)).await.unwrap();
    kv.delete_range(DeleteRangeRequest { key: "k0000".into(), range_end: "k0005".into(), ..Default::default() })
        .await
        .unwrap();
    wait_for("a change to arrive", async || match cluster.get(0, "later").await.as_deref() {
        Some("changed") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    // The lease ends there, and so do its keys here.
    LeaseClient::new(etcd.channel()).lease_revoke(LeaseRevokeRequest { id: lease }).await.unwrap();
    wait_for("a leased key to go", async || match cluster.get(0, "k0107").await {
        None => Ok(()),
        Some(_) => Err("it is there"),
    })
    .await;
    kv.put(put("last", "before the switch", 0)).await.unwrap();
    let (well, said) = end(child).await;
    assert!(well && said.contains("all equal"), "{said}");
    assert_eq!(cluster.get(0, "last").await.as_deref(), Some("before the switch"));
    assert_eq!((cluster.get(0, "k0004").await, cluster.get(0, "k0005").await.as_deref()), (None, Some("v5")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_differs_is_found() {
    let Some(program) = tools::require(&ETCD) else { return };
    let cluster = Cluster::start(1).await;
    let etcd = Etcd::start(&program, &cluster).await;
    fill(&etcd).await;
    let child = following(&etcd, &cluster, &[]).await;
    cluster.put(0, "k0001", "written at the target").await;
    let (well, _) = end(child).await;
    assert!(!well, "one key differs");
}
