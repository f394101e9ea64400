//! Leases on real processes: from any member, on time, and through whatever happens to the leader.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, PutRequest, RangeRequest,
};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::cluster::{Cluster, wait_for};

pub fn client(cluster: &Cluster, slot: u64) -> LeaseClient<Channel> {
    LeaseClient::new(cluster.channel(slot)).max_decoding_message_size(usize::MAX)
}

pub async fn grant(cluster: &Cluster, slot: u64, ttl: i64) -> i64 {
    let mut leases = client(cluster, slot);
    wait_for(&format!("a lease through kv-{slot}"), async || {
        match leases.lease_grant(LeaseGrantRequest { ttl, id: 0 }).await {
            Ok(answer) => Ok(answer.into_inner().id),
            Err(status) => Err(status.message().to_owned()),
        }
    })
    .await
}

async fn try_grant(cluster: &Cluster, slot: u64, id: i64, ttl: i64) -> Result<LeaseGrantResponse, Status> {
    Ok(client(cluster, slot).lease_grant(LeaseGrantRequest { ttl, id }).await?.into_inner())
}

pub async fn revoke(cluster: &Cluster, slot: u64, id: i64) -> Result<(), Status> {
    client(cluster, slot).lease_revoke(LeaseRevokeRequest { id }).await.map(drop)
}

/// One keep-alive on a stream of its own: the time that was given.
pub async fn renew(cluster: &Cluster, slot: u64, id: i64) -> Result<i64, Status> {
    let request = tokio_stream::once(LeaseKeepAliveRequest { id });
    let mut answers = client(cluster, slot).lease_keep_alive(request).await?.into_inner();
    let answer = answers.next().await.ok_or_else(|| Status::unavailable("the stream ended"))??;
    assert_eq!(answer.id, id);
    Ok(answer.ttl)
}

async fn ttl(cluster: &Cluster, slot: u64, id: i64) -> LeaseTimeToLiveResponse {
    let mut leases = client(cluster, slot);
    wait_for(&format!("the remaining time of a lease through kv-{slot}"), async || {
        let request = LeaseTimeToLiveRequest { id, keys: true };
        match leases.lease_time_to_live(request).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(status.message().to_owned()),
        }
    })
    .await
}

async fn list(cluster: &Cluster, slot: u64) -> Vec<i64> {
    let answer = client(cluster, slot).lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
    answer.leases.iter().map(|lease| lease.id).collect()
}

async fn attach(cluster: &Cluster, slot: u64, key: &str, lease: i64) -> Result<(), Status> {
    let put = PutRequest { key: key.to_owned().into(), value: "v".into(), lease, ..Default::default() };
    cluster.kv(slot).put(put).await.map(drop)
}

fn keys(answer: &LeaseTimeToLiveResponse) -> Vec<&[u8]> {
    answer.keys.iter().map(|key| &key[..]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_served_alike_by_every_member() {
    let cluster = Cluster::start(3).await;
    for slot in 0..3 {
        let (second, third) = ((slot + 1) % 3, (slot + 2) % 3);
        let id = grant(&cluster, slot, 60).await;
        assert!(id > 0);
        for key in ["b", "a"] {
            attach(&cluster, second, key, id).await.unwrap();
        }
        let answer = ttl(&cluster, third, id).await;
        assert_eq!((answer.id, answer.granted_ttl, keys(&answer)), (id, 60, vec![&b"a"[..], b"b"]));
        assert!((50..60).contains(&answer.ttl), "{answer:?}");
        for slot in 0..3 {
            assert_eq!(renew(&cluster, slot, id).await.unwrap(), 60);
            assert_eq!(list(&cluster, slot).await, [id]);
        }
        let kv = cluster.kv(third).range(RangeRequest { key: "a".into(), ..Default::default() }).await.unwrap();
        assert_eq!(kv.into_inner().kvs[0].lease(), id);
        attach(&cluster, slot, "b", 0).await.unwrap();
        assert_eq!(keys(&ttl(&cluster, slot, id).await), [b"a"]);
        revoke(&cluster, third, id).await.unwrap();
        assert_eq!(cluster.get(second, "a").await, None);
        assert_eq!(cluster.get(second, "b").await.as_deref(), Some("v"));
        for slot in 0..3 {
            let gone = ttl(&cluster, slot, id).await;
            assert_eq!((gone.id, gone.ttl, gone.granted_ttl), (id, -1, 0));
            assert_eq!(renew(&cluster, slot, id).await.unwrap(), 0);
            let status = revoke(&cluster, slot, id).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::NotFound, "etcdserver: requested lease not found"));
            let status = attach(&cluster, slot, "c", id).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::NotFound, "etcdserver: requested lease not found"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_follow_etcds_rules() {
    let cluster = Cluster::start(3).await;
    let id = grant(&cluster, 0, 60).await;
    let status = try_grant(&cluster, 1, id, 60).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "etcdserver: lease already exists"));
    let status = try_grant(&cluster, 1, 0, 9_000_000_001).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::OutOfRange, "etcdserver: too large lease TTL"));
    assert_eq!(try_grant(&cluster, 1, 77, 9_000_000_000).await.unwrap().ttl, 9_000_000_000);
    assert_eq!(renew(&cluster, 2, 77).await.unwrap(), 9_000_000_000);
    // One and a half of the longest election (700 ms) is the least.
    for (id, asked) in [(78, 0), (79, -5), (80, 1)] {
        let granted = try_grant(&cluster, 2, id, asked).await.unwrap();
        assert_eq!((granted.id, granted.ttl, granted.error.as_str()), (id, 2, ""), "of {asked}");
    }
    // Many on one stream, answered in their order.
    let asked: Vec<i64> = (0..500).map(|n| if n % 3 == 0 { id } else { 77 }).collect();
    let requests = stream::iter(asked.clone()).map(|id| LeaseKeepAliveRequest { id });
    let answers = client(&cluster, 1).lease_keep_alive(requests).await.unwrap().into_inner();
    let answered: Vec<i64> = answers.map(|answer| answer.unwrap().id).collect().await;
    assert_eq!(answered, asked);
}

/// Writers through every member until told to stop.
struct Writers {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writers {
    fn start(cluster: &Cluster) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writer = |n: u64| {
            let (mut kv, stop, written) = (cluster.kv(n % 3), stop.clone(), written.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let put = PutRequest {
                        key: format!("load/{n}").into(),
                        value: vec![7; 256].into(),
                        ..Default::default()
                    };
                    match kv.put(put).await {
                        Ok(_) => drop(written.fetch_add(1, Ordering::Relaxed)),
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            })
        };
        let tasks = (0..12).map(writer).collect();
        Self { stop, written, tasks }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.written.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_expire_on_time_under_load() {
    const LEASES: usize = 40;
    // A second is promised; the rest is for a machine that others use too, and for looking.
    const LATE_MAX: Duration = Duration::from_millis(2500);
    let cluster = Cluster::start(3).await;
    let writers = Writers::start(&cluster);
    let mut waiting = Vec::new();
    for n in 0..LEASES {
        let (asked, slot, time) = (Instant::now(), n as u64 % 3, 2 + n as i64 % 3);
        let id = grant(&cluster, slot, time).await;
        let granted = Instant::now();
        let key = format!("expires/{n}");
        attach(&cluster, slot, &key, id).await.unwrap();
        let mut kv = cluster.kv((slot + 1) % 3);
        waiting.push(tokio::spawn(async move {
            let time = Duration::from_secs(time as u64);
            loop {
                let range = RangeRequest { key: key.clone().into(), serializable: true, ..Default::default() };
                let there = !kv.range(range).await.unwrap().into_inner().kvs.is_empty();
                if !there && asked.elapsed() > Duration::from_millis(1000) {
                    assert!(asked.elapsed() >= time, "{key} went {:?} after its grant was asked for", asked.elapsed());
                    return granted.elapsed().saturating_sub(time);
                }
                let late = granted.elapsed().saturating_sub(time);
                assert!(late < LATE_MAX, "{key} is there, {late:?} late");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }
    let mut late = Vec::new();
    for waiting in waiting {
        late.push(waiting.await.unwrap());
    }
    late.sort_unstable();
    println!(
        "{} writes meanwhile; late by {:?} (median), {:?} at most",
        writers.stop().await,
        late[LEASES / 2],
        late[LEASES - 1]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_neither_expires_nor_renews() {
    let mut cluster = Cluster::new(3);
    cluster.set("lease.checkpoint_interval", "1s");
    let leader = cluster.start_all().await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let short = grant(&cluster, one, 16).await;
    let renewed = grant(&cluster, one, 600).await;
    attach(&cluster, one, "short", short).await.unwrap();
    attach(&cluster, other, "renewed", renewed).await.unwrap();
    wait_for("half of the short lease to pass", async || {
        let left = ttl(&cluster, other, short).await.ttl;
        if left <= 8 { Ok(()) } else { Err(left) }
    })
    .await;
    // Its checkpoints say less by now; the renewal takes them back.
    assert_eq!(renew(&cluster, other, renewed).await.unwrap(), 600);
    cluster.kill(leader);
    let (found, full) = (ttl(&cluster, one, short).await, ttl(&cluster, other, renewed).await);
    println!("after the leader's death: {} s of 16, {} s of 600", found.ttl, full.ttl);
    assert!((0..=12).contains(&found.ttl), "neither expired nor renewed: {found:?}");
    assert_eq!(keys(&found), [b"short"]);
    assert!(full.ttl > 595, "what was promised is kept: {full:?}");
    let expired = Instant::now();
    wait_for("the short lease to expire", async || match cluster.get(other, "short").await {
        None => Ok(()),
        Some(_) => Err("its key is there"),
    })
    .await;
    assert!(expired.elapsed() < Duration::from_secs(14), "not renewed by the new leader: {:?}", expired.elapsed());
    cluster.start_pod(leader);
    cluster.wait_formed().await;
    assert_eq!(ttl(&cluster, leader, short).await.ttl, -1);
    assert_eq!(cluster.get(leader, "renewed").await.as_deref(), Some("v"));
    cluster.wait_same_hash(0..3).await;
}

/// etcd #15247: an old leader whose clock says "over" has no say any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_leader_revokes_nothing_that_another_has_renewed() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    let id = grant(&cluster, others[0], 4).await;
    attach(&cluster, others[0], "held", id).await.unwrap();
    let keep = async |slot: u64| {
        wait_for("a keep-alive", async || renew(&cluster, slot, id).await.map_err(|s| s.message().to_owned())).await
    };
    cluster.signal(leader, Signal::STOP);
    let stopped = Instant::now();
    let mut renewals = 0;
    while stopped.elapsed() < Duration::from_secs(8) {
        assert_eq!(keep(others[renewals % 2]).await, 4, "renewal {renewals}");
        renewals += 1;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_ne!(cluster.leader(others).await, Some(leader));
    cluster.signal(leader, Signal::CONT);
    let woken = Instant::now();
    while woken.elapsed() < Duration::from_secs(3) {
        assert_eq!(keep(others[renewals % 2]).await, 4, "after the old leader woke");
        assert_eq!(cluster.get(others[0], "held").await.as_deref(), Some("v"));
        renewals += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("{renewals} renewals");
    assert_eq!(cluster.get(leader, "held").await.as_deref(), Some("v"));
    cluster.wait_same_hash(0..3).await;
    wait_for("the lease to expire, once nobody keeps it alive", async || match cluster.get(leader, "held").await {
        None => Ok(()),
        Some(_) => Err("its key is there"),
    })
    .await;
}

/// A leader alone does not expire what a client of the others might renew.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_expires() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let id = grant(&cluster, leader, 2).await;
    attach(&cluster, leader, "held", id).await.unwrap();
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    others.iter().for_each(|slot| cluster.kill(*slot));
    tokio::time::sleep(Duration::from_secs(4)).await;
    let range = RangeRequest { key: "held".into(), serializable: true, ..Default::default() };
    let there = cluster.kv(leader).range(range).await.unwrap().into_inner();
    assert_eq!(there.kvs.len(), 1, "the leader alone has deleted it");
    let status = renew(&cluster, leader, id).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "nobody may promise anything: {status}");
    cluster.start_all().await;
    wait_for("the lease to expire", async || match cluster.get(leader, "held").await {
        None => Ok(()),
        Some(_) => Err("its key is there"),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_listed_in_the_order_in_which_they_end_and_without_a_leader_too() {
    let mut cluster = Cluster::new(3);
    cluster.set("server.request_timeout", "1s");
    let leader = cluster.start_all().await;
    let ids = [300, 900, 600].map(|ttl| (ttl, 1_000_000 - ttl));
    for (ttl, id) in ids {
        grant(&cluster, 0, 60).await;
        try_grant(&cluster, 0, id, ttl).await.unwrap();
    }
    let expected = [300, 600, 900].map(|ttl| 1_000_000 - ttl);
    for slot in 0..3 {
        let listed = list(&cluster, slot).await;
        assert_eq!((listed.len(), &listed[3..]), (6, &expected[..]), "kv-{slot}");
    }
    // The shortest come first, in the order of their grants, until one is kept alive.
    let before = list(&cluster, 1).await;
    renew(&cluster, 2, before[0]).await.unwrap();
    for slot in 0..3 {
        assert_eq!(list(&cluster, slot).await[..3], [before[1], before[2], before[0]], "kv-{slot}");
    }
    let [one, last] = [(leader + 1) % 3, (leader + 2) % 3];
    cluster.kill(leader);
    cluster.kill(one);
    // As etcd: who waits for a leader in vain is told so, and what needs none is answered.
    wait_for("keep-alives to be refused for want of a leader", async || match renew(&cluster, last, before[0]).await {
        Err(status) if status.message() == "etcdserver: no leader" => {
            assert_eq!(status.code(), Code::Unavailable);
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(list(&cluster, last).await.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_survive_a_restart_of_all_and_reach_a_new_member() {
    let mut cluster = Cluster::new(3);
    // A short log, so that the new member gets a snapshot.
    cluster.set("log.entries_max", "200").set("log.entries_kept", "10");
    cluster.start_all().await;
    let (long, short) = (grant(&cluster, 0, 3600).await, grant(&cluster, 1, 10).await);
    for (key, id) in [("a", long), ("b", long), ("c", short)] {
        attach(&cluster, 2, key, id).await.unwrap();
    }
    for n in 0..400 {
        cluster.put(n % 3, &format!("fill/{}", n % 7), "x").await;
    }
    cluster.kill_all();
    cluster.start_all().await;
    for slot in 0..3 {
        let found = ttl(&cluster, slot, long).await;
        assert_eq!((found.granted_ttl, keys(&found)), (3600, vec![&b"a"[..], b"b"]), "kv-{slot}");
    }
    wait_for("the short lease to expire after the restart", async || match cluster.get(0, "c").await {
        None => Ok(()),
        Some(_) => Err("its key is there"),
    })
    .await;
    let leader = cluster.wait_formed().await;
    let replaced = (leader + 1) % 3;
    cluster.kill(replaced);
    cluster.wipe(replaced);
    cluster.start_pod(replaced);
    cluster.wait_formed().await;
    assert_eq!(list(&cluster, replaced).await, [long]);
    assert_eq!(keys(&ttl(&cluster, replaced, long).await), [&b"a"[..], b"b"]);
    cluster.wait_same_hash(0..3).await;
    // It leads with the same clock as any.
    revoke(&cluster, replaced, long).await.unwrap();
    assert_eq!(cluster.get(leader, "a").await, None);
}

/// How many leases the test below makes; `QUORATE_LEASES=100000` is the whole version.
fn lease_count() -> usize {
    std::env::var("QUORATE_LEASES").map_or(5_000, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_leases_cost_little() {
    let count = lease_count();
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let before = cluster.resident_bytes(leader);
    let idle = async || {
        let (cpu, at) = (cluster.cpu_time(leader), Instant::now());
        tokio::time::sleep(Duration::from_secs(3)).await;
        100.0 * (cluster.cpu_time(leader) - cpu).as_secs_f64() / at.elapsed().as_secs_f64()
    };
    let without = idle().await;
    let started = Instant::now();
    let granting = stream::iter(0..count)
        .map(|n| {
            let mut leases = client(&cluster, n as u64 % 3);
            async move {
                let granted = leases.lease_grant(LeaseGrantRequest { ttl: 3600, id: n as i64 + 1 }).await;
                granted.unwrap().into_inner().id
            }
        })
        .buffer_unordered(256);
    let ids: Vec<i64> = granting.collect().await;
    println!("{count} grants: {:.0} a second", count as f64 / started.elapsed().as_secs_f64());
    let grown = cluster.resident_bytes(leader).saturating_sub(before);
    println!("memory of the leader: {} bytes a lease, its log's cache included", grown / count as u64);
    assert_eq!(list(&cluster, (leader + 1) % 3).await.len(), count);

    let with = idle().await;
    println!("idle: {without:.1} % of a core without leases, {with:.1} % with {count}");
    assert!(with < without + 20.0, "leases that nothing happens to cost nothing");

    for slot in [leader, (leader + 1) % 3] {
        let (cpu, at) = (cluster.cpu_time(leader), Instant::now());
        let requests = stream::iter(ids.clone()).map(|id| LeaseKeepAliveRequest { id });
        let answers = client(&cluster, slot).lease_keep_alive(requests).await.unwrap().into_inner();
        let renewed =
            answers.filter(|answer| std::future::ready(answer.as_ref().is_ok_and(|a| a.ttl == 3600))).count().await;
        assert_eq!(renewed, count);
        let took = at.elapsed().as_secs_f64();
        let cost = (cluster.cpu_time(leader) - cpu).as_secs_f64() * 1e6 / count as f64;
        let role = if slot == leader { "leader" } else { "follower" };
        println!(
            "keep-alives through the {role}: {:.0} a second, {cost:.1} us of the leader's CPU each",
            count as f64 / took
        );
    }
}
