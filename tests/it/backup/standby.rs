//! Standbys of real processes: they follow, take over, and whose place they take learns of it.

use quorate::pb::etcd::{DeleteRangeRequest, LeaseGrantRequest, LeaseTimeToLiveRequest};
use tonic::Code;

use super::*;

/// A cluster that follows the backups at `url`, and makes its own there once it is promoted.
fn standby_of(size: u64, url: &str) -> Cluster {
    let mut cluster = backing_up(size, url);
    cluster.set("restore.follow", url);
    cluster
}

async fn revision(cluster: &Cluster, slot: u64) -> i64 {
    cluster.status(slot).await.map_or(0, |status| status.header.unwrap_or_default().revision)
}

/// Waits until `slot` of a standby is at `revision` or later.
async fn wait_followed(standby: &Cluster, slot: u64, revision: i64) {
    wait_for(&format!("kv-{slot} of the standby to come to revision {revision}"), async || {
        let now = self::revision(standby, slot).await;
        if now >= revision { Ok(()) } else { Err(format!("at {now}")) }
    })
    .await;
}

/// What a put is answered.
async fn try_put(cluster: &Cluster, slot: u64) -> Result<i64, tonic::Status> {
    let put = PutRequest { key: "tried".into(), value: "x".into(), ..Default::default() };
    let answer = cluster.kv(slot).put(put).await?;
    Ok(answer.into_inner().header.unwrap_or_default().revision)
}

/// Waits until a put is refused with these words.
async fn wait_refused(cluster: &Cluster, slot: u64, words: &str) {
    wait_for(&format!("kv-{slot} to refuse writes ({words})"), async || match try_put(cluster, slot).await {
        Err(status) if status.code() == Code::FailedPrecondition && status.message().contains(words) => Ok(()),
        told => Err(format!("{told:?}")),
    })
    .await;
}

fn promote(cluster: &Cluster, slot: u64, flags: &[&str]) -> Result<String, String> {
    quorate(&[&["promote", "--endpoints", &cluster.endpoint(slot)], flags].concat(), &[])
}

/// The conditions that a member shows.
fn conditions(cluster: &Cluster, slot: u64) -> String {
    let endpoint = cluster.endpoint(slot);
    let output = Command::new(binary()).args(["status", "--endpoints", &endpoint]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn wait_condition(cluster: &Cluster, slot: u64, words: &str) {
    wait_for(&format!("kv-{slot} to say {words}"), async || {
        let said = conditions(cluster, slot);
        if said.contains(words) { Ok(()) } else { Err(said) }
    })
    .await;
}

/// The same hash at the newest revision that the standby has; clusters that are written to meanwhile are asked at that revision.
async fn same_hash(source: &Cluster, standby: &Cluster, slots: &[u64]) -> i64 {
    let at = revision(standby, slots[0]).await;
    let theirs = source.hash_kv(0, at).await.unwrap();
    for slot in slots {
        wait_followed(standby, *slot, at).await;
        let ours = standby.hash_kv(*slot, at).await.unwrap();
        assert_eq!((ours.hash, ours.compact_revision), (theirs.hash, theirs.compact_revision), "kv-{slot} at {at}");
    }
    at
}

/// Follows a source under load, whatever becomes of the standby's leader and its disk; what is deleted and compacted there is so here. Returns
/// a revision that both have.
async fn follow_through_losses(source: &Cluster, standby: &mut Cluster) -> i64 {
    wait_followed(standby, 0, revision(source, 0).await).await;
    let leader = standby.leader(0..3).await.unwrap();
    standby.kill(leader);
    standby.wipe(leader);
    let rest: Vec<u64> = (0..3).filter(|slot| *slot != leader).collect();
    wait_followed(standby, rest[0], revision(source, 0).await).await;
    standby.start_pod(leader);
    wait_followed(standby, leader, revision(source, 0).await).await;
    standby.wait_formed().await;
    let at = same_hash(source, standby, &[0, 1, 2]).await;
    println!("the same hash at revision {at}, {} at the source by now", revision(source, 0).await);
    source.put(0, "gone", "x").await;
    let gone = DeleteRangeRequest { key: "gone".into(), ..Default::default() };
    source.kv(0).delete_range(gone).await.unwrap();
    quorate(&["compact", &at.to_string(), "--endpoints", &source.endpoint(0)], &[]).unwrap();
    let compacted = source.put(0, "after", "x").await;
    wait_followed(standby, 0, compacted).await;
    assert_eq!((standby.get(0, "gone").await, standby.get(1, "after").await.as_deref()), (None, Some("x")));
    same_hash(source, standby, &[0, 1, 2]).await;
    compacted
}

/// The old cluster comes back, and takes no writes within an interval; not after a restart either.
async fn comes_back_in_vain(source: &mut Cluster) {
    source.start_all().await;
    for slot in 0..3 {
        wait_refused(source, slot, "takes no writes any more").await;
    }
    wait_condition(source, 0, "[superseded]").await;
    source.kill_all();
    source.start_all().await;
    wait_refused(source, 2, "takes no writes any more").await;
    assert_eq!(source.get(0, "after").await.as_deref(), Some("x"), "it can be read");
    let refused = promote(source, 0, &[]).unwrap_err();
    assert!(refused.contains("was promoted in the place of this one") && refused.contains("--take-back"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_follows_under_load_is_promoted_and_the_old_cluster_takes_no_writes() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let mut source = backing_up(3, &url);
    source.start_all().await;
    let mut leases = LeaseClient::new(source.channel(0));
    leases.lease_grant(LeaseGrantRequest { id: 8, ttl: 600 }).await.unwrap();
    wait_archived(&source, &[0, 1, 2]).await;
    let mut source = Arc::new(source);
    let load = Load::start(&source, &[0, 1, 2], 4);
    let mut standby = standby_of(3, &url);
    standby.start_all().await;
    let compacted = follow_through_losses(&source, &mut standby).await;
    for slot in 0..3 {
        wait_refused(&standby, slot, "this cluster is a standby and takes no writes").await;
    }
    wait_condition(&standby, 1, "[standby]").await;
    assert!(promote(&source, 0, &[]).unwrap_err().contains("this cluster is no standby"), "the source is none");

    // The source dies with all that it had not archived; a lease that nobody can keep alive any more stays.
    let granted = Instant::now();
    let lease = source.client(&["lease", "grant", "10s"]).await;
    source.client(&["put", "leased", "x", "--lease", lease.trim()]).await;
    wait_archived(&source, &[0, 1, 2]).await;
    let told = load.end().await;
    let ended = millis(SystemTime::now());
    Arc::get_mut(&mut source).unwrap().kill_all();
    let mut leases = LeaseClient::new(standby.channel(0));
    let look = LeaseTimeToLiveRequest { id: 8, keys: false };
    let ttl = leases.lease_time_to_live(look).await.unwrap().into_inner();
    assert_eq!((ttl.granted_ttl, ttl.ttl), (600, 600));
    let renewed = quorate(&["lease", "keep-alive", "8", "--once", "--endpoints", &standby.endpoint(0)], &[]);
    assert!(renewed.unwrap_err().contains("is a standby"));
    wait_for("the lease's time to be over", async || {
        if granted.elapsed() > Duration::from_secs(11) { Ok(()) } else { Err(format!("{:?}", granted.elapsed())) }
    })
    .await;
    assert_eq!(standby.get(0, "leased").await.as_deref(), Some("x"), "no lease ends by itself there");
    let said = promote(&standby, 0, &[]).unwrap();
    println!("{said}");
    assert!(said.contains("generation 2 has begun"), "{said}");
    assert!(said.contains("everything that the other cluster had applied at"), "{said}");
    let first = standby.put(0, "next", "x").await;
    assert!(first > compacted + 1_000_000_000, "revisions jump: {first}");
    for slot in 0..3 {
        assert_eq!(standby.get(slot, "after").await.as_deref(), Some("x"));
        for (key, acks) in &told {
            let least = acks.iter().rev().find(|ack| ack.told_millis + 4000 < ended).map(|ack| ack.number);
            let found = standby.get(slot, key).await.map(|number| number.parse::<u64>().unwrap());
            assert!(found >= least, "{key}: {found:?}, and {least:?} had been acknowledged 4 s before the end");
        }
    }
    standby.wait_same_hash(0..3).await;
    // Leases are counted again, and backups go on in a generation of its own.
    wait_for("the lease that nobody keeps alive to end", async || match standby.get(0, "leased").await {
        None => Ok(()),
        Some(_) => Err("its key is there"),
    })
    .await;
    wait_archived(&standby, &[0, 1, 2]).await;
    assert_eq!(json(&["backup", "status", &url])["generation"].as_u64(), Some(2));
    assert!(promote(&standby, 0, &[]).unwrap_err().contains("there is nothing to promote"));

    comes_back_in_vain(Arc::get_mut(&mut source).unwrap()).await;
    // A restart of who was promoted changes nothing.
    standby.kill_all();
    standby.start_all().await;
    assert!(standby.put(1, "later", "x").await > first);
    standby.wait_same_hash(0..3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_can_keep_the_revisions_and_be_taken_back() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let mut source = backing_up(1, &url);
    source.start_all().await;
    wait_archived(&source, &[0]).await;
    let mut standby = standby_of(1, &url);
    standby.start_all().await;
    let last = source.put(0, "k", "source").await;
    wait_followed(&standby, 0, last).await;
    let refused = promote(&standby, 0, &["--take-back"]).unwrap_err();
    assert!(refused.contains("leave --take-back out"), "{refused}");
    promote(&standby, 0, &["--same-revisions"]).unwrap();
    let own = standby.put(0, "k", "standby").await;
    assert!(own > last && own < last + 1000, "{own} after {last}");
    // While both live, who was superseded learns of it by itself.
    wait_refused(&source, 0, "takes no writes any more").await;
    promote(&source, 0, &["--take-back"]).unwrap();
    source.put(0, "k", "source again").await;
    wait_refused(&standby, 0, "takes no writes any more").await;
    assert_eq!(json(&["backup", "status", &url])["generation"].as_u64(), Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_gone_stops_no_promotion_that_is_told_so_and_no_source() {
    let directory = tempfile::tempdir().unwrap();
    let (url, away) = (directory.path().join("backups"), directory.path().join("away"));
    let url = url.to_str().unwrap().to_owned();
    let mut source = backing_up(1, &url);
    source.start_all().await;
    wait_archived(&source, &[0]).await;
    let mut standby = standby_of(1, &url);
    standby.start_all().await;
    wait_followed(&standby, 0, source.put(0, "k", "v").await).await;
    std::fs::rename(&url, &away).unwrap();
    std::fs::write(&url, "no directory").unwrap();
    let refused = promote(&standby, 0, &[]).unwrap_err();
    assert!(refused.contains("nothing was changed here") && refused.contains("--without-store"), "{refused}");
    wait_refused(&standby, 0, "is a standby").await;
    let said = promote(&standby, 0, &["--without-store"]).unwrap();
    assert!(said.contains("must never run again"), "{said}");
    standby.put(0, "k", "standby").await;
    source.put(0, "k", "goes on").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_was_away_for_too_long_says_that_it_must_be_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let mut source = backing_up(1, &url);
    source.start_all().await;
    wait_archived(&source, &[0]).await;
    let mut standby = standby_of(1, &url);
    standby.start_all().await;
    wait_followed(&standby, 0, source.put(0, "k", "v").await).await;
    standby.kill_all();
    for number in 0..4 {
        source.put(0, "k", &number.to_string()).await;
        wait_archived(&source, &[0]).await;
    }
    let mut records: Vec<_> =
        std::fs::read_dir(directory.path().join("00000001/log")).unwrap().map(|entry| entry.unwrap().path()).collect();
    records.sort();
    for record in &records[..records.len() - 1] {
        std::fs::remove_file(record).unwrap();
    }
    standby.start_all().await;
    standby.wait_logged(0, &["must be made anew"]).await;
    wait_refused(&standby, 0, "is a standby").await;
}
