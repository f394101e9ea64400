//! `quorate backup` beside a live cluster, and clusters that are made of what it restores.

use super::*;

/// Restores into directories of a cluster of three, and starts that.
async fn restored(url: &str, how: &[&str]) -> (Cluster, Value) {
    let mut new = Cluster::new(3);
    let (root, pattern) = (new.root().to_str().unwrap().to_owned(), new.pattern());
    let args = ["backup", "restore", url, "--data-dir", &root, "--name", "kv-%d", "--peers", &pattern, "--size", "3"];
    let said = json(&[&args[..], how].concat());
    new.start_all().await;
    (new, said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_restored_to_a_revision_and_to_a_time_and_writes_to_a_generation_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let mut old = backing_up(1, &url);
    old.start_all().await;
    let granted = LeaseClient::new(old.channel(0)).lease_grant(LeaseGrantRequest { ttl: 3600, id: 77 }).await.unwrap();
    assert_eq!(granted.into_inner().id, 77);
    let leased = PutRequest { key: "leased".into(), value: "x".into(), lease: 77, ..Default::default() };
    old.kv(0).put(leased).await.unwrap();
    let good = old.put(0, "k", "good").await;
    wait_archived(&old, &[0]).await;
    let between = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    wait_archived(&old, &[0]).await;
    let bad = old.put(0, "k", "bad").await;
    wait_archived(&old, &[0]).await;
    let old_id = old.cluster_id(0).await;
    let listed = json(&["backup", "list", &url]);
    assert_eq!(listed["backups"][0]["kind"], "full", "{listed}");
    let status = json(&["backup", "status", &url]);
    assert_eq!(status["clusterID"], hex(old_id), "{status}");
    let verified = quorate(&["backup", "verify", &url], &[]).unwrap();
    assert!(verified.contains(&format!("up to revision {bad}")), "{verified}");
    old.kill_all();

    let (revision, time) = (good.to_string(), between.as_str());
    for how in [&["--revision", &revision, "--same-revisions"][..], &["--at", time, "--same-revisions"]] {
        let (new, said) = restored(&url, how).await;
        assert_eq!(said["restored"]["revision"].as_i64(), Some(good), "{said}");
        assert_eq!(new.get(1, "k").await.as_deref(), Some("good"), "{how:?}");
        assert_eq!(new.get(2, "leased").await.as_deref(), Some("x"));
        assert_eq!(new.put(0, "next", "x").await, good + 1);
        new.wait_same_hash(0..3).await;
    }
    // By default clients that remember later revisions are told so.
    let (mut new, said) = restored(&url, &[]).await;
    assert_eq!(said["restored"]["revision"].as_i64(), Some(bad), "{said}");
    assert_eq!(new.get(0, "k").await.as_deref(), Some("bad"));
    assert_eq!(new.put(0, "next", "x").await, bad + 1_000_000_001);
    let past = RangeRequest { key: "k".into(), revision: good, ..Default::default() };
    assert!(new.kv(0).range(past).await.unwrap_err().message().contains("compacted"));

    // It has no right to the path of the one that it comes from, until a person says so.
    new.kill_all();
    new.set("backup.url", &url).set("backup.interval", "1s");
    new.start_all().await;
    let leader = new.leader(0..3).await.unwrap();
    let refused = wait_for("a refusal", async || {
        let text: String = (0..3).map(|slot| new.log_text(slot)).collect();
        text.lines().find(|line| line.contains("quorate backup adopt")).map(str::to_owned).ok_or("nobody was refused")
    })
    .await;
    assert!(refused.contains(&format!("{old_id:016x}")), "{refused}");
    let adopted = quorate(&["backup", "adopt", &url, "--endpoints", &new.endpoint(leader)], &[]).unwrap();
    assert!(adopted.contains("generation 2"), "{adopted}");
    wait_archived(&new, &[0, 1, 2]).await;
    let status = json(&["backup", "status", &url]);
    assert_eq!(status["generation"].as_u64(), Some(2), "{status}");
    assert_eq!(status["clusterID"], hex(new.cluster_id(0).await));
    // Both clusters' moments can be restored.
    let root = directory.path().join("again");
    let again = json(&["backup", "restore", &url, "--generation", "1", "--data-dir", root.to_str().unwrap()]);
    assert_eq!(again["restored"]["clusterID"], hex(old_id));
    let error = quorate(&["backup", "restore", &url, "--data-dir", root.to_str().unwrap()], &[]).unwrap_err();
    assert!(error.contains("never writes over anything"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_taken_by_hand_encrypted_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, key, other) =
        (directory.path().join("backups"), directory.path().join("key"), directory.path().join("other"));
    std::fs::write(&key, "5a".repeat(32)).unwrap();
    std::fs::write(&other, "5b".repeat(32)).unwrap();
    let [path, key, other] = [&path, &key, &other].map(|path| path.to_str().unwrap().to_owned());
    let cluster = Cluster::start(1).await;
    let endpoint = cluster.endpoint(0);
    let take = |key: &str| quorate(&["backup", "now", &path, "--key-file", key, "--endpoints", &endpoint], &[]);
    for n in 0..3 {
        cluster.put(0, "k", &format!("secret {n}")).await;
        assert!(take(&key).unwrap().contains("revision"), "{n}");
    }
    assert!(take(&other).unwrap_err().contains("the key file given"), "another key");
    let without = quorate(&["backup", "list", &path], &[]).unwrap_err();
    assert!(without.contains("it is encrypted"), "{without}");
    let is_plain = |path: &Path| std::fs::read(path).unwrap().windows(6).any(|window| window == b"secret");
    assert!(!files(Path::new(&path)).iter().any(|file| is_plain(file)));
    // Another cluster has no business here.
    let stranger = Cluster::start(1).await;
    let refused = quorate(&["backup", "now", &path, "--key-file", &key, "--endpoints", &stranger.endpoint(0)], &[]);
    assert!(refused.unwrap_err().contains("name another path"));

    let prune = |how: &[&str]| {
        let args = ["backup", "prune", &path, "--key-file", &key, "--keep-fulls", "1", "--keep-age", "0s"];
        quorate(&[&args[..], how].concat(), &[]).unwrap()
    };
    assert!(prune(&["--dry-run"]).contains("would remove 2 full backups"));
    assert!(prune(&[]).contains("removed 2 full backups"));
    let root = directory.path().join("restored");
    let args =
        ["backup", "restore", &path, "--key-file", &key, "--data-dir", root.to_str().unwrap(), "--same-revisions"];
    let said = quorate(&args, &[]).unwrap();
    assert!(said.contains("a new cluster") && said.contains("1 keys at revision 4"), "{said}");
    let nothing = quorate(&["backup", "list", directory.path().join("nowhere").to_str().unwrap()], &[]).unwrap_err();
    assert!(nothing.contains("there is no backup at this path"), "{nothing}");
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { all.extend(files(&path)) } else { all.push(path) }
    }
    all
}
