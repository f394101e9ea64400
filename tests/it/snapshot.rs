//! Backups: taken from live members, checked, and restored into new clusters.

use std::path::{Path, PathBuf};
use std::process::Command;

use quorate::pb::etcd::{CompactionRequest, PutRequest, RangeRequest};
use serde_json::Value;
use tonic::Code;

use crate::support::cluster::{Cluster, binary};
use crate::support::tools::{self, ETCDCTL};

fn quorate(args: &[&str]) -> Result<String, String> {
    let output = Command::new(binary()).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn status(file: &Path) -> Value {
    let text = quorate(&["snapshot", "status", file.to_str().unwrap(), "-o", "json"]).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Some keys, one of them changed and one deleted; returns the revision.
async fn fill(cluster: &Cluster) -> i64 {
    for n in 0..200 {
        cluster.put(0, &format!("k{n}"), &"v".repeat(1000)).await;
    }
    cluster.put(0, "k7", "second").await;
    let mut kv = cluster.kv(0);
    let gone = quorate::pb::etcd::DeleteRangeRequest { key: "k8".into(), ..Default::default() };
    kv.delete_range(gone).await.unwrap().into_inner().header.unwrap().revision
}

fn save(cluster: &Cluster, file: &Path) {
    let said = quorate(&["snapshot", "save", file.to_str().unwrap(), "--endpoints", &cluster.endpoint(0)]).unwrap();
    assert!(said.starts_with("saved "), "{said}");
    assert!(!file.with_extension("db.part").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_saves_a_snapshot_of_ours() {
    let Some(etcdctl) = tools::require(&ETCDCTL) else { return };
    let cluster = Cluster::start(1).await;
    let revision = fill(&cluster).await;
    let file = cluster.root().join("by-etcdctl.db");
    let mut command = Command::new(etcdctl);
    command.env("ETCDCTL_API", "3").args(["--endpoints", &cluster.endpoint(0), "snapshot", "save"]).arg(&file);
    tools::run(&mut command);
    let found = status(&file);
    assert_eq!((found["revision"].as_i64(), found["totalKey"].as_i64()), (Some(revision), Some(199)));
    assert_eq!(found["hash"].as_u64(), Some(cluster.hash_kv(0, 0).await.unwrap().hash.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_into_a_new_cluster_with_its_revisions() {
    let mut old = Cluster::new(3);
    old.start_all().await;
    let revision = fill(&old).await;
    let file = old.root().join("backup.db");
    save(&old, &file);
    old.put(0, "after", "the backup").await;
    let old_id = old.cluster_id(0).await;
    let old_members = old.membership(0).await;
    old.kill_all();

    let mut new = Cluster::new(3);
    let (root, pattern) = (new.root().to_str().unwrap().to_owned(), new.pattern());
    let args =
        ["snapshot", "restore", file.to_str().unwrap(), "--data-dir", &root, "--name", "kv-%d", "--peers", &pattern];
    let said = quorate(&[&args[..], &["--size", "3"]].concat()).unwrap();
    assert!(said.contains(&format!("199 keys at revision {revision}")), "{said}");
    new.start_all().await;
    assert_ne!(new.cluster_id(0).await, old_id);
    let members = new.membership(0).await;
    assert!(members.len() == 3 && members.iter().all(|member| !old_members.contains(member)), "{members:x?}");
    new.wait_same_hash(0..3).await;
    for slot in 0..3 {
        assert_eq!(new.get(slot, "k7").await.as_deref(), Some("second"));
        assert_eq!((new.get(slot, "k8").await, new.get(slot, "after").await), (None, None));
    }
    // The past is there too.
    let past = RangeRequest { key: "k8".into(), revision: revision - 1, ..Default::default() };
    assert_eq!(new.kv(0).range(past).await.unwrap().into_inner().kvs.len(), 1);
    assert_eq!(new.put(1, "k9", "v").await, revision + 1, "revisions go on");
    // It is a cluster as any other: it survives its members' deaths, and heals a lost disk.
    new.kill_all();
    new.start_all().await;
    assert_eq!(new.get(2, "k9").await.as_deref(), Some("v"));
    new.kill(2);
    new.wipe(2);
    new.start_pod(2);
    new.wait_formed().await;
    new.wait_same_hash(0..3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_restored_apart_agree() {
    let old = Cluster::start(1).await;
    fill(&old).await;
    let file = old.root().join("backup.db");
    save(&old, &file);
    let mut new = Cluster::new(3);
    let pattern = new.pattern();
    let restore = |slot: u64, dir: &Path, token: &str, bump: &str| {
        let slot = slot.to_string();
        quorate(&[
            "snapshot",
            "restore",
            file.to_str().unwrap(),
            "--data-dir",
            dir.to_str().unwrap(),
            "--name",
            "kv-%d",
            "--peers",
            &pattern,
            "--size",
            "3",
            "--slot",
            &slot,
            "--token",
            token,
            "--bump-revision",
            bump,
            "-o",
            "json",
        ])
    };
    let ids: Vec<Value> = (0..3)
        .map(|slot| {
            let made: Value =
                serde_json::from_str(&restore(slot, &new.data_dir(slot), "monday", "1000").unwrap()).unwrap();
            made["clusterID"].clone()
        })
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    // Not beside the directory of the same member, where a server would take it for misplaced.
    let elsewhere = new.root().join("other").join("place");
    let other: Value = serde_json::from_str(&restore(0, &elsewhere, "tuesday", "1000").unwrap()).unwrap();
    assert_ne!(other["clusterID"], ids[0], "another token is another cluster");
    new.start_all().await;
    new.wait_same_hash(0..3).await;
    // Bumped: what was before is compacted, what comes is later.
    let mut kv = new.kv(0);
    let past = RangeRequest { key: "k7".into(), revision: 100, ..Default::default() };
    assert_eq!(kv.range(past).await.unwrap_err().code(), Code::OutOfRange);
    let now = new.put(0, "k7", "third").await;
    assert!(now > 1200, "{now}");
    let past = RangeRequest { key: "k7".into(), revision: now - 1, ..Default::default() };
    assert_eq!(kv.range(past).await.unwrap().into_inner().kvs[0].value(), b"second");
    kv.compact(CompactionRequest { revision: now, physical: true }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_writes_over_nothing_and_takes_no_damaged_file() {
    let cluster = Cluster::start(1).await;
    cluster.put(0, "k", &"v".repeat(5000)).await;
    let file = cluster.root().join("backup.db");
    save(&cluster, &file);
    let dir: PathBuf = cluster.root().join("restored");
    let restore =
        |file: &Path| quorate(&["snapshot", "restore", file.to_str().unwrap(), "--data-dir", dir.to_str().unwrap()]);
    let whole = std::fs::read(&file).unwrap();
    let bad = cluster.root().join("bad.db");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (bytes, why) in
        [(&flipped[..], "SHA-256"), (&whole[..whole.len() - 1], "cut"), (&whole[..512 + 32], "SHA-256"), (&[], "cut")]
    {
        std::fs::write(&bad, bytes).unwrap();
        let error = restore(&bad).unwrap_err();
        assert!(error.contains(why) && !dir.exists(), "{error}");
        assert!(quorate(&["snapshot", "status", bad.to_str().unwrap()]).is_err());
    }
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("mine"), "").unwrap();
    let error = restore(&file).unwrap_err();
    assert!(error.contains("never writes over anything"), "{error}");
    std::fs::remove_file(dir.join("mine")).unwrap();
    restore(&file).unwrap();
    assert!(restore(&file).is_err(), "a second time there is something");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_of_one_moment() {
    let cluster = Cluster::start(1).await;
    for n in 0..300 {
        cluster.put(0, &format!("pad{n}"), &"p".repeat(20_000)).await;
    }
    let mut kv = cluster.kv(0);
    let writing = tokio::spawn(async move {
        // Both keys change in one transaction, so a backup that is torn shows.
        for n in 0..100_000u32 {
            let put = |key: &'static str| quorate::pb::etcd::RequestOp {
                request: Some(quorate::pb::etcd::request_op::Request::RequestPut(PutRequest {
                    key: key.into(),
                    value: n.to_string().into(),
                    ..Default::default()
                })),
            };
            let txn = quorate::pb::etcd::TxnRequest { success: vec![put("a"), put("z")], ..Default::default() };
            if kv.txn(txn).await.is_err() {
                return;
            }
        }
    });
    let file = cluster.root().join("backup.db");
    save(&cluster, &file);
    let dir = cluster.root().join("restored");
    writing.abort();
    let mut restored = Cluster::new(1);
    quorate(&[
        "snapshot",
        "restore",
        file.to_str().unwrap(),
        "--data-dir",
        restored.data_dir(0).to_str().unwrap(),
        "--name",
        "kv-%d",
        "--peers",
        &restored.pattern(),
        "--slot",
        "0",
        "--token",
        "t",
    ])
    .unwrap();
    restored.start_all().await;
    assert_eq!(restored.get(0, "a").await, restored.get(0, "z").await);
    assert!(!dir.exists());
}
