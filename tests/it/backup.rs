//! Backups that a cluster of real processes makes of itself, and what is restored of them.

mod commands;
mod docs;
mod first;
mod standby;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use quorate::backup::plan::Target;
use quorate::backup::{Access, Archive, Store, millis, restore};
use quorate::env::Env;
use quorate::pb::etcd::{LeaseGrantRequest, PutRequest, RangeRequest, lease_client::LeaseClient};
use serde_json::Value;

use crate::support::cluster::{Cluster, binary, http_get, wait_for};

/// A cluster that backs itself up to `url` every second.
fn backing_up(size: u64, url: &str) -> Cluster {
    let mut cluster = Cluster::new(size);
    cluster.set("backup.url", url).set("backup.interval", "1s");
    cluster
}

/// One figure of `/metrics`; `None` while the pod does not answer.
async fn figure(cluster: &Cluster, slot: u64, name: &str) -> Option<i64> {
    let (_, text) = http_get(&cluster.status_endpoint(slot), "/metrics").await.ok()?;
    let line = text.lines().find(|line| line.split(' ').next() == Some(name))?;
    line.rsplit(' ').next()?.trim().parse::<f64>().ok().map(|value| value as i64)
}

/// The slot whose turn it is.
async fn maker(cluster: &Cluster, slots: &[u64]) -> Option<u64> {
    for slot in slots {
        if figure(cluster, *slot, "quorate_backup_active").await == Some(1) {
            return Some(*slot);
        }
    }
    None
}

/// Waits until everything that is applied now is archived, and there is a full backup; as one of `slots` has heard.
async fn wait_archived(cluster: &Cluster, slots: &[u64]) {
    let now = (millis(SystemTime::now()) / 1000) as i64 + 1;
    wait_for("everything to be archived", async || {
        let mut seen = Vec::new();
        for slot in slots {
            let archived = figure(cluster, *slot, "quorate_backup_last_success_timestamp_seconds").await;
            let full = figure(cluster, *slot, "quorate_backup_last_full_timestamp_seconds").await;
            if archived > Some(now) && full > Some(0) {
                return Ok(());
            }
            seen.push((archived, full));
        }
        Err(format!("{seen:?}, expected beyond {now}"))
    })
    .await;
}

/// What a writer was told, in its order: of the value `number` at `revision`, between two times of day.
#[derive(Clone, Copy, Debug)]
struct Acknowledged {
    number: u64,
    revision: i64,
    asked_millis: u64,
    told_millis: u64,
}

/// Puts rising numbers under a key of its own, through any member.
async fn write(cluster: &Cluster, slots: Vec<u64>, key: String, stop: Arc<AtomicBool>) -> Vec<Acknowledged> {
    let mut told = Vec::new();
    let mut number = 0;
    let mut turn = 0_usize;
    while !stop.load(Ordering::Relaxed) {
        let asked_millis = millis(SystemTime::now());
        let put = PutRequest { key: key.clone().into(), value: number.to_string().into(), ..Default::default() };
        let mut kv = cluster.kv(slots[turn % slots.len()]);
        match tokio::time::timeout(Duration::from_secs(3), kv.put(put)).await {
            Ok(Ok(answer)) => {
                let revision = answer.into_inner().header.unwrap().revision;
                told.push(Acknowledged { number, revision, asked_millis, told_millis: millis(SystemTime::now()) });
                number += 1;
            }
            // It may have been written: the same number is put again.
            _ => turn += 1,
        }
    }
    told
}

/// Writers beside the test.
struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<(String, tokio::task::JoinHandle<Vec<Acknowledged>>)>,
}

impl Load {
    fn start(cluster: &Arc<Cluster>, slots: &[u64], writers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |number: usize| {
            let key = format!("writer-{number}");
            let (cluster, slots, stop, name) = (cluster.clone(), slots.to_vec(), stop.clone(), key.clone());
            (key, tokio::spawn(async move { write(&cluster, slots, name, stop).await }))
        };
        Self { writers: (0..writers).map(start).collect(), stop }
    }

    async fn end(self) -> BTreeMap<String, Vec<Acknowledged>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut told = BTreeMap::new();
        for (key, writer) in self.writers {
            told.insert(key, writer.await.unwrap());
        }
        told
    }
}

fn archive(env: &Env, url: &str, access: &Access) -> Archive {
    Archive::new(Store::open(env, url, access).unwrap())
}

/// What a restored state has under a writer's key.
fn number_of(state: &quorate::kv::State, key: &str) -> Option<u64> {
    let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
    let kvs = state.range(&range).unwrap().kvs;
    kvs.first().map(|kv| String::from_utf8_lossy(kv.value()).parse().unwrap())
}

/// Moments spread over what was acknowledged are restored, by revision and by time, and are what the writers were told.
async fn judge_moments(archive: &Archive, told: &BTreeMap<String, Vec<Acknowledged>>, moments: usize) {
    let first = archive
        .fulls(1)
        .await
        .unwrap()
        .into_iter()
        .flatten()
        .map(|full| (full.full.revision, full.full.at_millis))
        .min()
        .unwrap();
    let all: Vec<Acknowledged> = told.values().flatten().copied().collect();
    let later: Vec<&Acknowledged> =
        all.iter().filter(|ack| ack.revision > first.0 && ack.asked_millis > first.1 + 2000).collect();
    assert!(
        later.len() > moments,
        "{} of {} acknowledged writes came after the first full backup",
        later.len(),
        all.len()
    );
    for moment in 0..moments {
        let ack = later[moment * later.len() / moments];
        let by_revision = restore::restore(archive, Target::Revision(ack.revision), None).await.unwrap().state.kv;
        assert_eq!(by_revision.revision(), ack.revision);
        let by_time = restore::restore(archive, Target::Time(ack.told_millis), None).await.unwrap().state.kv;
        for (key, acks) in told {
            // A number may have been written before it was acknowledged, by a try whose answer was lost.
            let least = acks.iter().rev().find(|one| one.revision <= ack.revision).map(|one| one.number);
            let found = number_of(&by_revision, key);
            assert!(
                found >= least && found <= least.map_or(Some(0), |n| Some(n + 1)),
                "{key} at {ack:?}: {found:?}, {least:?}"
            );
            // Leaders say the time once a second.
            let least = acks.iter().rev().find(|one| one.told_millis + 2500 <= ack.told_millis).map(|one| one.number);
            let most = acks.iter().find(|one| one.asked_millis > ack.told_millis).map(|one| one.number);
            let found = number_of(&by_time, key);
            assert!(found >= least, "{key} at {ack:?}: {found:?}, and {least:?} had been acknowledged");
            assert!(
                most.is_none_or(|most| found.is_none_or(|found| found <= most)),
                "{key} at {ack:?}: {found:?} was not asked yet"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn moments_of_a_cluster_whose_members_die_are_restored_as_they_were_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().to_str().unwrap().to_owned();
    let mut cluster = backing_up(3, &url);
    cluster.set("backup.full_every", "8s");
    cluster.start_all().await;
    wait_archived(&cluster, &[0, 1, 2]).await;
    let mut cluster = Arc::new(cluster);
    let load = Load::start(&cluster, &[0, 1, 2], 4);
    let leader = cluster.leader(0..3).await.unwrap();
    let maker_was =
        wait_for("a member to make the backups", async || maker(&cluster, &[0, 1, 2]).await.ok_or("nobody does")).await;
    assert_ne!(maker_was, leader, "a follower makes them");
    tokio::time::sleep(Duration::from_secs(6)).await;
    let told = load.end().await;
    // Whoever made them dies; another one goes on, with nothing left out.
    let held = Arc::get_mut(&mut cluster).unwrap();
    held.kill(maker_was);
    let died = Instant::now();
    let rest: Vec<u64> = (0..3).filter(|slot| *slot != maker_was).collect();
    let load = Load::start(&cluster, &rest, 4);
    let next =
        wait_for("another member to make the backups", async || maker(&cluster, &rest).await.ok_or("nobody does"))
            .await;
    let took = died.elapsed();
    println!("kv-{maker_was} died, kv-{next} took over after {took:?}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let later = load.end().await;
    wait_archived(&cluster, &rest).await;
    let env = Env::real();
    let archive = archive(&env, &url, &Access::default());
    let before = |acks: &Vec<Acknowledged>| acks.last().copied();
    println!(
        "acknowledged: {:?}, then {:?}",
        told.values().map(before).collect::<Vec<_>>(),
        later.values().map(before).collect::<Vec<_>>()
    );
    judge_moments(&archive, &told, 12).await;
    // Numbers begin anew with the second load, so its moments are judged by themselves.
    let latest = restore::restore(&archive, Target::Latest, None).await.unwrap();
    for (key, acks) in &later {
        assert_eq!(number_of(&latest.state.kv, key), acks.last().map(|ack| ack.number), "{key}");
    }
    // The same hash as the members', at revisions of which they can say it.
    let revision = latest.state.kv.revision();
    for revision in [revision, revision - 1, revision - 100, 2] {
        let theirs = cluster.hash_kv(rest[0], revision).await.unwrap();
        let restored = restore::restore(&archive, Target::Revision(revision), None).await;
        // Before the first full backup there is nothing.
        let Ok(restored) = restored else { continue };
        let ours = restored.state.kv.hash_kv(0).unwrap();
        // What was never compacted is told as -1.
        assert_eq!((ours.hash, ours.compact_revision), (theirs.hash, theirs.compact_revision.max(0)), "at {revision}");
    }
    let records = archive.record_objects(1).await.unwrap().len();
    let fulls = archive.fulls(1).await.unwrap().len();
    println!("{records} records and {fulls} full backups, up to revision {revision}");
    env.stop(Duration::from_secs(10)).await;
}

/// Runs this project's program; what it printed, or how it failed.
fn quorate(args: &[&str], env: &[(&str, &str)]) -> Result<String, String> {
    let output = Command::new(binary()).args(args).envs(env.iter().copied()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn json(args: &[&str]) -> Value {
    let text = quorate(&[args, &["-o", "json"]].concat(), &[]).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn hex(id: u64) -> String {
    format!("{id:016x}")
}
