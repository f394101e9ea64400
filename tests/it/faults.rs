//! Processes that die or stop at any moment, under load: what was acknowledged stays, and no read is stale.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use rustix::process::Signal;

use crate::support::cluster::{Cluster, wait_for};

/// Writers through all members, and what was acknowledged to them.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<BTreeMap<String, String>>>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// `writers` through each of `slots`. A key is written once, so that an unacknowledged write hides no acknowledged one.
    fn start(cluster: &Cluster, slots: impl IntoIterator<Item = u64>, writers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::<Mutex<BTreeMap<String, String>>>::default();
        let mut tasks = Vec::new();
        for (slot, writer) in slots.into_iter().flat_map(|slot| (0..writers).map(move |writer| (slot, writer))) {
            let (mut kv, stop, acknowledged) = (cluster.kv(slot), stop.clone(), acknowledged.clone());
            tasks.push(tokio::spawn(async move {
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let (key, value) = (format!("load/{slot}/{writer}/{i}"), format!("{slot} {writer} {i}"));
                    let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
                    match kv.put(put).await {
                        Ok(_) => drop(acknowledged.lock().unwrap().insert(key, value)),
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            }));
        }
        Self { stop, acknowledged, writers: tasks }
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits for `more` acknowledgements.
    async fn wait_progress(&self, more: usize) {
        let goal = self.count() + more;
        wait_for(&format!("{goal} acknowledged writes"), async || {
            let count = self.count();
            if count >= goal { Ok(()) } else { Err(count) }
        })
        .await;
    }

    async fn stop(self) -> BTreeMap<String, String> {
        self.stop.store(true, Ordering::Relaxed);
        join_all(self.writers).await.into_iter().for_each(|ended| ended.unwrap());
        self.acknowledged.lock().unwrap().clone()
    }
}

/// Everything under `load/`, read linearizably through the pod.
async fn read_load(cluster: &Cluster, slot: u64) -> BTreeMap<String, String> {
    let mut kv = cluster.kv(slot);
    let answer = wait_for(&format!("a linearizable read through kv-{slot}"), async || {
        let all = RangeRequest { key: "load/".into(), range_end: "load0".into(), ..Default::default() };
        kv.range(all).await.map_err(|status| status.message().to_owned())
    })
    .await;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    answer.into_inner().kvs.iter().map(|kv| (text(kv.key()), text(kv.value()))).collect()
}

/// Random pods, one to all three, are killed with SIGKILL under load, again and again: every acknowledged write is read from
/// every member afterwards, and all hold the same.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_any_kills() {
    const ROUNDS: u32 = 12;
    let seed =
        std::env::var("QUORATE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::start(3).await;
    let load = Load::start(&cluster, 0..3, 2);
    for round in 0..ROUNDS {
        load.wait_progress(random.usize(1..60)).await;
        let victims: u8 = random.u8(1..8);
        let victims: Vec<u64> = (0..3).filter(|slot| victims & (1 << slot) != 0).collect();
        println!("round {round}: {victims:?} after {} writes", load.count());
        for slot in &victims {
            cluster.kill(*slot);
        }
        if victims.len() == 1 && random.bool() {
            load.wait_progress(random.usize(1..30)).await;
        }
        for slot in &victims {
            cluster.start_pod(*slot);
        }
    }
    load.wait_progress(30).await;
    cluster.wait_formed().await;
    let acknowledged = load.stop().await;
    assert!(acknowledged.len() > 50, "only {} writes", acknowledged.len());
    println!("{} acknowledged writes", acknowledged.len());
    for slot in 0..3 {
        let found = read_load(&cluster, slot).await;
        for (key, value) in &acknowledged {
            assert_eq!(found.get(key), Some(value), "{key} through kv-{slot}, seed {seed}");
        }
    }
    cluster.wait_same_hash(0..3).await;
}

/// A leader that is told to end (SIGTERM) ends well; nothing that was acknowledged is lost, and it comes back as the same member.
#[tokio::test(flavor = "multi_thread")]
async fn terminated_leader_loses_nothing() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let before = cluster.membership(leader).await;
    let load = Load::start(&cluster, 0..3, 2);
    load.wait_progress(50).await;
    cluster.terminate(leader).await;
    load.wait_progress(50).await;
    cluster.start_all().await;
    load.wait_progress(50).await;
    let acknowledged = load.stop().await;
    for slot in 0..3 {
        let found = read_load(&cluster, slot).await;
        assert!(acknowledged.iter().all(|(key, value)| found.get(key) == Some(value)), "through kv-{slot}");
        assert_eq!(cluster.membership(slot).await, before);
    }
    cluster.wait_same_hash(0..3).await;
}

/// A leader whose process was stopped and goes on after another was elected serves no stale linearizable read: neither one that
/// was waiting meanwhile nor one that comes after.
#[tokio::test(flavor = "multi_thread")]
async fn paused_leader_serves_no_stale_read() {
    let mut cluster = Cluster::start(3).await;
    for round in 0..3 {
        let leader = cluster.wait_formed().await;
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        cluster.put(leader, "k", "old").await;
        let mut kv = cluster.kv(leader);
        let read = || RangeRequest { key: "k".into(), ..Default::default() };
        kv.range(read()).await.unwrap();
        cluster.signal(leader, Signal::STOP);
        let newest = format!("new {round}");
        cluster.put(others[0], "k", &newest).await;
        assert_ne!(cluster.leader(others).await, Some(leader));
        let mut queued = Vec::new();
        for _ in 0..8 {
            let mut kv = kv.clone();
            queued.push(tokio::spawn(async move { kv.range(read()).await }));
        }
        cluster.signal(leader, Signal::CONT);
        let mut answered = 0;
        for answer in join_all(queued).await {
            // A failure is allowed, an old value is not.
            if let Ok(answer) = answer.unwrap() {
                assert_eq!(answer.into_inner().kvs[0].value()[..], *newest.as_bytes());
                answered += 1;
            }
        }
        println!("round {round}: {answered} of 8 waiting reads were answered");
        assert_eq!(cluster.get(leader, "k").await, Some(newest));
    }
    assert!(cluster.is_running(0));
}
