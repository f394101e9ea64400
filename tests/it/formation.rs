//! Forming a cluster, and surviving what may happen to it.

use crate::support::cluster::Cluster;

/// Case 1: fresh 1, 3 and 5 pods, in any order of start, form one cluster.
#[tokio::test(flavor = "multi_thread")]
async fn fresh_pods_form_one_cluster_in_any_order() {
    for (size, order) in [(1, vec![0]), (3, vec![2, 0, 1]), (5, vec![4, 1, 3, 0, 2])] {
        let mut cluster = Cluster::new(size);
        for slot in order {
            cluster.start_pod(slot);
        }
        cluster.wait_formed().await;
        cluster.put(size - 1, "k", "v").await;
        assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
    }
}

/// Case 32: all pods killed at once come back with everything that was acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_the_death_of_all() {
    let mut cluster = Cluster::start(3).await;
    for i in 0..50 {
        cluster.put(i % 3, &format!("k{i}"), &format!("v{i}")).await;
    }
    cluster.kill_all();
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    for i in 0..50 {
        assert_eq!(cluster.get((i + 1) % 3, &format!("k{i}")).await, Some(format!("v{i}")));
    }
}
