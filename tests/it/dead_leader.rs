//! A leader whose process has died is followed at once; one that is only silent, or restarted again and again, costs no more than it must.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::cluster::Cluster;

const ELECTION_MIN: Duration = Duration::from_secs(4);

/// A cluster of so many with election timeouts so long that no election in these tests is due to them.
async fn patient(size: u64) -> Cluster {
    let mut cluster = Cluster::new(size);
    cluster.set("raft.election_timeout_min", "4s").set("raft.election_timeout_max", "5s");
    cluster.start_all().await;
    cluster
}

async fn term(cluster: &Cluster, slot: u64) -> u64 {
    cluster.status(slot).await.unwrap().raft_term
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_leader_is_followed_before_any_election_timeout_and_in_one_term() {
    for size in [3, 5] {
        let mut cluster = patient(size).await;
        for round in 0..3 {
            let leader = cluster.wait_formed().await;
            let survivor = (leader + 1) % size;
            cluster.put(leader, "k", &format!("old {round}")).await;
            let before = term(&cluster, survivor).await;
            // A voter finds out four times a second where a new leader listens, which nothing tells of.
            tokio::time::sleep(Duration::from_millis(800)).await;
            cluster.kill(leader);
            let begun = Instant::now();
            cluster.put(survivor, "k", &format!("new {round}")).await;
            let gap = begun.elapsed();
            println!("{size} members, round {round}: {gap:?}");
            assert!(gap < ELECTION_MIN, "{gap:?}");
            assert_eq!(term(&cluster, survivor).await, before + 1, "more than one election");
            cluster.start_pod(leader);
        }
    }
}

/// What the kernel does for a process that is stopped looks like life: connections stay, and its port answers.
#[tokio::test(flavor = "multi_thread")]
async fn silent_leader_keeps_its_office_until_the_election_timeout() {
    let cluster = patient(3).await;
    let leader = cluster.leader(0..3).await.unwrap();
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    let before = term(&cluster, others[0]).await;
    cluster.signal(leader, Signal::STOP);
    let until = Instant::now() + ELECTION_MIN / 2;
    while Instant::now() < until {
        for slot in others {
            assert_eq!(term(&cluster, slot).await, before, "elected although nothing had died");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.signal(leader, Signal::CONT);
    assert_eq!(cluster.wait_formed().await, leader);
    // It gives up the streams on which nobody seemed to answer: an end that proves nothing.
    let until = Instant::now() + ELECTION_MIN / 2;
    while Instant::now() < until {
        cluster.put(others[0], "k", "v").await;
        assert_eq!(term(&cluster, others[0]).await, before, "elected although nothing had died");
    }
}

/// One of two voters that are left must not lead alone, whatever it has proof of.
#[tokio::test(flavor = "multi_thread")]
async fn proof_of_death_replaces_no_quorum() {
    let mut cluster = patient(3).await;
    let leader = cluster.wait_formed().await;
    let (other, last) = ((leader + 1) % 3, (leader + 2) % 3);
    let before = term(&cluster, last).await;
    cluster.kill(other);
    cluster.kill(leader);
    let until = Instant::now() + ELECTION_MIN / 2;
    while Instant::now() < until {
        let status = cluster.status(last).await.unwrap();
        assert_eq!(status.raft_term, before, "a term without a quorum");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.start_pod(other);
    cluster.put(last, "k", "v").await;
}
