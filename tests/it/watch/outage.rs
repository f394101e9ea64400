//! A watch over the death of members: its client goes on from its last revision.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

/// Both keys of a transaction, in the revision that made it.
type Seen = BTreeMap<i64, Vec<String>>;

/// Acknowledged writes between one fault and the next.
const PROGRESS: usize = 50;

/// Waits until the writers have got further.
async fn progress(written: &AtomicUsize) {
    let before = written.load(Ordering::Relaxed);
    wait_for("writes to be acknowledged", async || {
        let more = written.load(Ordering::Relaxed) - before;
        if more >= PROGRESS { Ok(()) } else { Err(more) }
    })
    .await;
}

/// Follows all keys from revision 2 on, through one endpoint after another, until it has seen `last`.
async fn follow(channels: Vec<Channel>, mut at: usize, last: String) -> Seen {
    let mut seen = Seen::new();
    let mut next = 2;
    loop {
        let channel = channels[at % channels.len()].clone();
        at += 1;
        let Ok(mut stream) = Stream::try_open(channel, true).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        stream.send(RequestUnion::CreateRequest(from(next, create("k", "l")))).await;
        while let Ok(response) = stream.try_next().await {
            assert!(!response.canceled && !response.fragment, "{response:?}");
            let events: Vec<String> = response.events.iter().map(show).collect();
            if let Some(first) = response.events.first() {
                let revision = first.kv.as_ref().unwrap().mod_revision();
                assert!(revision >= next, "{revision} came twice");
                assert!(response.events.iter().all(|e| e.kv.as_ref().unwrap().mod_revision() == revision));
                next = revision + 1;
                let done = events.concat().contains(&last);
                seen.insert(revision, events);
                if done {
                    return seen;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_survives_the_death_of_the_leader_and_of_its_own_member() {
    let mut cluster = Cluster::start(3).await;
    let channels: Vec<Channel> = (0..3).map(|slot| cluster.channel(slot)).collect();
    let followers: Vec<_> = (0..3).map(|at| tokio::spawn(follow(channels.clone(), at, "k-last".into()))).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicUsize::new(0));
    // Each transaction writes two keys with one number: it is seen whole or not at all.
    let writer = |id: usize| {
        let (mut kv, stop, written) = (cluster.kv(id as u64), stop.clone(), written.clone());
        let mut at = id;
        let channels = channels.clone();
        tokio::spawn(async move {
            let mut acknowledged = Seen::new();
            for i in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let puts = ["k-a", "k-b"].map(|key| put_of(&format!("{key}{id}"), i.to_string()));
                let ops = puts.map(|put| RequestOp { request: Some(request_op::Request::RequestPut(put)) });
                let txn = TxnRequest { success: ops.to_vec(), ..Default::default() };
                match kv.txn(txn).await {
                    Ok(answer) => {
                        let events = ["k-a", "k-b"].map(|key| format!(" {key}{id}={i}")).to_vec();
                        acknowledged.insert(answer.into_inner().header.unwrap().revision, events);
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(_) => {
                        at += 1;
                        kv = quorate::pb::etcd::kv_client::KvClient::new(channels[at % 3].clone());
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
            acknowledged
        })
    };
    let writers: Vec<_> = (0..3).map(writer).collect();
    for round in 0..3 {
        progress(&written).await;
        let leader = cluster.wait_formed().await;
        // The leader, then each member that some follower is connected to.
        let victim = if round == 0 { leader } else { (leader + round) % 3 };
        cluster.kill(victim);
        progress(&written).await;
        cluster.start_all().await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Seen::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    cluster.put(0, "k-last", "").await;
    assert!(acknowledged.len() > 100, "only {} writes", acknowledged.len());
    // What each member tells to who asks for all of it, afterwards.
    let mut truth = follow(vec![channels[0].clone()], 0, "k-last".into()).await;
    for channel in &channels[1..] {
        assert_eq!(follow(vec![channel.clone()], 0, "k-last".into()).await, truth);
    }
    for follower in followers {
        assert_eq!(follower.await.unwrap(), truth, "nothing missing, nothing twice");
    }
    for (revision, events) in acknowledged {
        assert_eq!(truth.remove(&revision), Some(events), "acknowledged at {revision}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_is_given_a_snapshot_tells_its_watchers_all_of_it_or_that_it_cannot() {
    let mut cluster = Cluster::new(3);
    // A log so short that a member that was away needs a snapshot.
    cluster.set("log.bytes_max", "16MiB").set("log.entries_max", "200").set("log.entries_kept", "10");
    let leader = cluster.start_all().await;
    let away = (leader + 1) % 3;
    let mut stream = Stream::open(&cluster, away).await;
    stream.create(create("k", "l")).await;
    let first = cluster.put(leader, "k", "first").await;
    assert_eq!(stream.shown().await, format!("0 @{first} k=first"));
    // Stopped, not killed: its watchers live on.
    cluster.signal(away, rustix::process::Signal::STOP);
    let mut last = first;
    for i in 0..400 {
        last = cluster.put(leader, "k", &i.to_string()).await;
    }
    cluster.wait_logged(leader, &["snapshot written"]).await;
    cluster.signal(away, rustix::process::Signal::CONT);
    for i in 0..400 {
        assert_eq!(stream.shown().await, format!("0 @{} k={i}", first + 1 + i), "up to {last}");
    }
}
