//! A real S3 server as the store, that hangs for a while.

use super::*;
use crate::support::s3::{ENVIRONMENT, S3};

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_costs_requests_nothing_and_backups_only_its_outage() {
    let Some(s3) = S3::start("backups").await else { return };
    let (url, endpoint) = ("s3://backups/prod/kv", s3.endpoint());
    let mut cluster = backing_up(3, url);
    cluster.set("backup.endpoint", &endpoint).set("backup.full_every", "5s");
    for slot in 0..3 {
        cluster.start_pod_with(slot, &ENVIRONMENT);
    }
    cluster.wait_formed().await;
    wait_archived(&cluster, &[0, 1, 2]).await;
    let cluster = Arc::new(cluster);
    let load = Load::start(&cluster, &[0, 1, 2], 3);
    tokio::time::sleep(Duration::from_secs(4)).await;
    s3.hang();
    let hung = Instant::now();
    wait_for("the metric to say how old the backups are", async || {
        let age = figure(&cluster, 0, "quorate_backup_age_seconds").await;
        if age >= Some(6) { Ok(()) } else { Err(format!("{age:?}")) }
    })
    .await;
    s3.go_on();
    println!("the store was away for {:?}", hung.elapsed());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let told = load.end().await;
    let slowest = told.values().flatten().map(|ack| ack.told_millis - ack.asked_millis).max().unwrap();
    println!("slowest of {} writes: {slowest} ms", told.values().map(Vec::len).sum::<usize>());
    wait_archived(&cluster, &[0, 1, 2]).await;

    let list = ["backup", "list", url, "--store-endpoint", &endpoint];
    let listed = quorate(&list, &ENVIRONMENT).unwrap();
    assert!(listed.contains("full") && listed.contains("changes up to record"), "{listed}");
    let verified = quorate(&["backup", "verify", url, "--store-endpoint", &endpoint], &ENVIRONMENT).unwrap();
    assert!(verified.contains("all of it is what the members had"), "{verified}");
    let root = cluster.root().join("restored");
    let args = [
        "backup",
        "restore",
        url,
        "--store-endpoint",
        &endpoint,
        "--data-dir",
        root.to_str().unwrap(),
        "--same-revisions",
        "-o",
        "json",
    ];
    let said: Value = serde_json::from_str(&quorate(&args, &ENVIRONMENT).unwrap()).unwrap();
    let newest = told.values().flatten().map(|ack| ack.revision).max();
    assert!(said["restored"]["revision"].as_i64() >= newest, "{said}, and {newest:?} was acknowledged");
    // Nobody else reads it.
    let wrong =
        quorate(&["backup", "list", "s3://nowhere/kv", "--store-endpoint", &endpoint], &ENVIRONMENT).unwrap_err();
    assert!(wrong.contains("nowhere"), "{wrong}");
}
