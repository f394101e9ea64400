//! Clusters that are formed from a backup (`serve --restore-from`).

use super::*;

/// A backup of one key that was good and then bad; the revision of the good one.
async fn backed_up(url: &str) -> i64 {
    let mut old = backing_up(1, url);
    old.start_all().await;
    wait_archived(&old, &[0]).await;
    let good = old.put(0, "k", "good").await;
    old.put(0, "k", "bad").await;
    wait_archived(&old, &[0]).await;
    old.kill_all();
    good
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_cluster_begins_with_a_moment_of_a_backup_and_writes_to_a_new_generation() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let good = backed_up(&url).await;
    let mut new = backing_up(3, &url);
    new.set("restore.from", &format!("{url}@{good}"));
    new.start_all().await;
    for slot in 0..3 {
        assert_eq!(new.get(slot, "k").await.as_deref(), Some("good"));
    }
    new.wait_same_hash(0..3).await;
    assert_eq!(new.put(0, "next", "x").await, good + 1_000_000_001, "revisions jump");
    wait_archived(&new, &[0, 1, 2]).await;
    let status = json(&["backup", "status", &url]);
    assert_eq!(status["generation"].as_u64(), Some(2), "{status}");
    assert_eq!(status["clusterID"], hex(new.cluster_id(0).await));
    // A restart restores nothing, and a lost disk gets its data from the others.
    new.kill_all();
    new.start_all().await;
    new.kill(1);
    new.wipe(1);
    new.put(0, "after", "x").await;
    new.start_pod(1);
    new.wait_formed().await;
    assert_eq!(new.get(1, "after").await.as_deref(), Some("x"));
    new.wait_same_hash(0..3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_of_the_beginning_leaves_it_repeatable() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    backed_up(&url).await;
    for point in ["restore.resolved", "formation.after_propose", "restore.written", "log.before_started", "log.started"]
    {
        let mut new = Cluster::new(3);
        new.set("restore.from", &url);
        new.start_pod_with(0, &[("QUORATE_FAIL_POINT", point)]);
        new.start_pod(1);
        new.start_pod(2);
        new.wait_exit(0).await;
        new.start_pod(0);
        new.wait_formed().await;
        for slot in 0..3 {
            assert_eq!(new.get(slot, "k").await.as_deref(), Some("bad"), "{point}");
        }
        new.wait_same_hash(0..3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_not_there_is_waited_for_and_a_cluster_that_is_there_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().join("backups").to_str().unwrap().to_owned();
    let mut new = Cluster::new(1);
    new.set("restore.from", &url);
    new.start_pod(0);
    new.wait_unready(0, &["waits for the backup", "no full backup"]).await;
    let made = directory.path().join("made");
    let good = backed_up(made.to_str().unwrap()).await;
    std::fs::rename(&made, &url).unwrap();
    new.wait_formed().await;
    assert_eq!(new.get(0, "k").await.as_deref(), Some("bad"));

    let mut other = Cluster::start(1).await;
    other.put(0, "own", "x").await;
    other.kill_all();
    other.set("restore.from", &format!("{url}@{good}"));
    other.start_all().await;
    assert_eq!((other.get(0, "own").await.as_deref(), other.get(0, "k").await), (Some("x"), None));
}
