//! A member in a memory limit, its data at its quota: whatever is read and written, it is not killed for memory.
//!
//! The limit is a real control group's; where none can be made, the tests are skipped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use quorate::pb::etcd::{CompactionRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op};

use crate::support::cluster::{Cluster, http_post, wait_for};
use crate::support::memory_group::MemoryGroup;
use crate::support::tools;

const MIB: u64 = 1 << 20;

fn put(i: u64, bytes: usize, fill: u8) -> PutRequest {
    PutRequest { key: format!("d/{i:06}").into(), value: vec![fill; bytes].into(), ..PutRequest::default() }
}

fn everything() -> RangeRequest {
    RangeRequest { key: "d/".into(), range_end: "d0".into(), ..RangeRequest::default() }
}

/// Fills a member until it takes no more; how many keys it has then.
async fn fill(cluster: &Cluster) -> u64 {
    let mut kv = cluster.kv(0);
    let mut keys = 0;
    loop {
        // Values of all sizes, at a few MiB a second and more.
        let ops = (keys..keys + 50).map(|i| put(i, [100, 1000, 20_000][(i % 3) as usize], 1));
        let success = ops.map(|put| RequestOp { request: Some(request_op::Request::RequestPut(put)) }).collect();
        match kv.txn(TxnRequest { success, ..TxnRequest::default() }).await {
            Ok(_) => keys += 50,
            Err(status) if status.message().contains("database space exceeded") => return keys,
            Err(status) => panic!("{status}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_or_write_gets_a_full_member_killed_for_its_memory_of_256_mib() {
    full_member_survives(256 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_or_write_gets_a_full_member_killed_for_its_memory_of_1_gib() {
    full_member_survives(1024 * MIB).await;
}

/// Sixteen clients read everything again and again, half of them as JSON, beside writes, for five minutes at least.
async fn full_member_survives(limit: u64) {
    if !tools::is_set("QUORATE_LONG_TESTS") {
        return tools::skip("a member at its memory limit takes minutes; QUORATE_LONG_TESTS=1 runs it", false);
    }
    let Some(group) = MemoryGroup::new(limit) else { return };
    let mut cluster = Cluster::new(1);
    cluster.set_memory_group(&group);
    cluster.start_all().await;
    let keys = fill(&cluster).await;
    println!("{keys} keys; {} MiB resident", cluster.resident_bytes(0) / MIB);
    let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let readers = (0..16).map(|i| {
        let (mut kv, endpoint) = (cluster.kv(0), cluster.endpoint(0));
        let (stop, reads) = (stop.clone(), reads.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                if i % 2 == 0 {
                    let answer = kv.range(everything()).await.unwrap_or_else(|status| panic!("{status}"));
                    assert_eq!(answer.into_inner().kvs.len() as u64, keys);
                } else {
                    let (status, _) =
                        http_post(&endpoint, "/v3/kv/range", r#"{"key":"ZC8=","range_end":"ZDA="}"#).await.unwrap();
                    assert_eq!(status, 200);
                }
                reads.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // Meanwhile values are overwritten, and compacted, for what slow readers keep of them.
    let writer = {
        let (mut kv, stop, reads) = (cluster.kv(0), stop.clone(), reads.clone());
        async move {
            let begin = Instant::now();
            let mut written = 0;
            for i in (0..keys).cycle() {
                let bytes = [100, 1000, 20_000][(i % 3) as usize];
                match kv.put(put(i, bytes, (written % 250) as u8)).await {
                    Ok(_) => written += 1,
                    Err(status) => {
                        let text = status.message();
                        assert!(text.contains("space exceeded") || text.contains("too many requests"), "{status}");
                        let now =
                            kv.range(RangeRequest { key: "d/000000".into(), ..Default::default() }).await.unwrap();
                        let revision = now.into_inner().header.unwrap().revision;
                        let _ = kv.compact(CompactionRequest { revision, physical: true }).await;
                    }
                }
                if reads.load(Ordering::Relaxed) >= 64 && written >= 500 && begin.elapsed() > Duration::from_secs(300) {
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            written
        }
    };
    let (_, written) = tokio::join!(join_all(readers), writer);
    println!(
        "{} answers of everything beside {written} writes; {} MiB resident at the most",
        reads.load(Ordering::Relaxed),
        cluster.peak_resident_bytes(0) / MIB
    );
    assert!(cluster.is_running(0), "killed: {:?}", cluster.log_text(0).lines().last());
    cluster.put(0, "good", "bye").await;
}

/// 28 values of 1 MB, overwritten and compacted again and again.
#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_back_after_overwriting_and_compacting() {
    let mut cluster = Cluster::new(1);
    cluster.set("storage.quota_bytes", "256MiB");
    cluster.start_all().await;
    let before = cluster.resident_bytes(0);
    let mut kv = cluster.kv(0);
    for round in 0..8_u8 {
        let mut revision = 0;
        for i in 0..28 {
            revision = kv.put(put(i, 1_000_000, round)).await.unwrap().into_inner().header.unwrap().revision;
        }
        kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    }
    // The data, as much again for what is in use of it elsewhere, and the caches of the log and the state store.
    let most = 2 * 28 * MIB + 8 * MIB + 24 * MIB + 32 * MIB;
    wait_for("the memory to be given back", async || {
        let grown = cluster.resident_bytes(0).saturating_sub(before);
        if grown <= most { Ok(()) } else { Err(format!("{} MiB more than before", grown / MIB)) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_too_small_to_serve_is_refused_at_start() {
    let Some(group) = MemoryGroup::new(100 * MIB) else { return };
    let mut cluster = Cluster::new(1);
    cluster.set_memory_group(&group);
    cluster.start_pod(0);
    wait_for("the process to end", async || if cluster.is_running(0) { Err("it runs") } else { Ok(()) }).await;
    let text = cluster.log_text(0);
    assert!(text.contains("100MiB") && text.contains("at least 128MiB"), "{text}");
}
