//! Leases on a member alone, in simulated time: what is allowed when, ends to the moment, and a process that stands still.

use std::collections::BTreeMap;

use super::*;
use crate::env::sim::{SimDisk, SimNet};
use crate::env::{Env, sleep};
use crate::node;
use crate::pb::etcd::PutRequest;
use crate::pb::log::{self, SetClusterVersion};
use crate::raft::Peers;
use crate::raft::tests::{THIS, running_raft};

const TTL: i64 = 10;

struct World {
    node: Node,
    leases: Leases,
}

impl World {
    /// A leader alone, whose membership says that it knows this apply version.
    async fn start(apply_version: u32) -> Self {
        let net = SimNet::new(1, Duration::from_millis(1));
        let env = Env::sim(1, Arc::new(SimDisk::new(1)), net.host([10, 0, 0, 1].into()));
        let (raft, store, _) = running_raft(&env).await;
        let options = node::Options {
            request_timeout: Duration::from_secs(3),
            batch_bytes_max: 256 << 10,
            batches_in_flight_max: 2,
            queue_requests_max: 1000,
            queue_bytes_max: 64 << 20,
            lease_reads: false,
            leader_silence_max: Duration::from_secs(2),
            retry_interval: Duration::from_millis(50),
            limits: crate::kv::Limits::default(),
        };
        let node = Node::start(env.clone(), options, THIS, raft.clone(), store, Peers::new(env));
        let this = log::Node { name: "kv-0".into(), apply_version, ..log::Node::default() };
        raft.initialize(BTreeMap::from([(THIS.member_id, this)])).await.unwrap();
        let settings = Settings {
            ttl_min_seconds: 2,
            checkpoint_interval: Duration::from_secs(60),
            revokes_in_flight_max: 10,
            extension: Duration::from_millis(700),
        };
        let leases = Leases::start(node.clone(), settings);
        Self { node, leases }
    }

    /// The same, after the cluster version was raised.
    async fn ready() -> Self {
        let world = Self::start(LEASES_SINCE).await;
        world.raise().await;
        world
    }

    async fn raise(&self) {
        let request = command::Request::SetClusterVersion(SetClusterVersion { version: LEASES_SINCE });
        self.node.propose(&Caller::Internal, Command::new(1, request)).await.unwrap();
    }

    async fn grant_with_key(&self) -> i64 {
        let lease = self.leases.grant(&self.node, &Caller::Nobody, 0, TTL).await.unwrap().id;
        let put = PutRequest { key: "k".into(), lease, ..PutRequest::default() };
        self.node.propose(&Caller::Internal, Command::new(1, command::Request::Put(put))).await.unwrap();
        lease
    }

    fn keys(&self) -> usize {
        self.node.store().read(|s| s.kv.key_count())
    }
}

#[tokio::test(start_paused = true)]
async fn leases_wait_for_the_cluster_version_and_are_refused_while_a_member_does_not_know_them() {
    let old = World::start(1).await;
    let error = old.leases.grant(&old.node, &Caller::Nobody, 0, TTL).await.unwrap_err().to_string();
    assert!(error.contains("need cluster version 2, this cluster has 1") && error.contains("kv-0"), "{error}");
    assert_eq!(old.node.store().read(|s| s.kv.leases().len()), 0, "nothing was proposed");
    let world = World::start(2).await;
    let raising = async {
        sleep(Duration::from_millis(500)).await;
        world.raise().await;
    };
    let (granted, ()) = tokio::join!(world.leases.grant(&world.node, &Caller::Nobody, 0, TTL), raising);
    assert_eq!(granted.unwrap().ttl, TTL, "the version was about to rise");
    let world = World::start(2).await;
    assert!(world.leases.revoke(&world.node, &Caller::Nobody, 1).await.is_err(), "it has not risen in time");
}

#[tokio::test(start_paused = true)]
async fn a_lease_ends_not_before_its_time_and_within_half_a_second() {
    let world = World::ready().await;
    let asked = Instant::now();
    let id = world.grant_with_key().await;
    let granted = Instant::now();
    while world.keys() > 0 {
        assert!(granted.elapsed() < Duration::from_millis(10_500), "it is late");
        sleep(Duration::from_millis(5)).await;
    }
    assert!(asked.elapsed() >= Duration::from_secs(TTL as u64), "it ended after {:?}", asked.elapsed());
    assert_eq!(world.leases.renew(&world.node, &Caller::Nobody, id).await, Ok(0));
    assert_eq!(world.leases.remaining(&world.node, &Caller::Nobody, id).await.unwrap().seconds, None);
}

#[tokio::test(start_paused = true)]
async fn keep_alives_that_waited_while_the_process_stood_still_come_before_any_end() {
    let world = World::ready().await;
    let id = world.grant_with_key().await;
    sleep(Duration::from_secs(1)).await;
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(world.leases.renew(&world.node, &Caller::Nobody, id).await, Ok(TTL));
    sleep(Duration::from_secs(9)).await;
    assert_eq!(world.keys(), 1);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(world.keys(), 0, "nobody kept it alive again");
}

#[tokio::test(start_paused = true)]
async fn more_than_may_be_revoked_at_once_end_all_the_same() {
    let world = World::ready().await;
    for _ in 0..95 {
        world.leases.grant(&world.node, &Caller::Nobody, 0, 2).await.unwrap();
    }
    let count = || world.node.store().read(|s| s.kv.leases().len());
    assert_eq!(count(), 95);
    sleep(Duration::from_secs(4)).await;
    assert_eq!(count(), 0);
}

/// What a leader of an earlier term decided does nothing in the entries of a later one.
#[tokio::test(start_paused = true)]
async fn a_decision_of_another_term_is_void() {
    let world = World::ready().await;
    let id = world.grant_with_key().await;
    let of = |term| {
        let request = command::Request::LeaseRevoke(LeaseRevoke { id, term });
        world.node.propose(&Caller::Internal, Command::new(LEASES_SINCE, request))
    };
    let term = world.node.confirm_leadership().await.unwrap().term;
    assert_eq!(of(term + 1).await.unwrap_err(), Error::LeaderChanged);
    assert_eq!(world.keys(), 1);
    of(term).await.unwrap();
    assert_eq!(world.keys(), 0);
}
