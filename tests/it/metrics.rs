//! `/metrics`: the names that dashboards read, their types, and that they move as they should.

use std::collections::BTreeMap;

use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{RangeRequest, WatchCreateRequest, WatchRequest};
use tokio_stream::StreamExt as _;

use crate::support::cluster::{Cluster, http_get, wait_for};

/// A scrape, parsed.
struct Scrape {
    types: BTreeMap<String, String>,
    /// By name and labels as they stand in the text.
    values: BTreeMap<String, f64>,
}

impl Scrape {
    async fn take(cluster: &Cluster, slot: u64) -> Self {
        let (code, text) = http_get(&cluster.endpoint(slot), "/metrics").await.unwrap();
        assert_eq!(code, 200, "{text}");
        let (mut types, mut values) = (BTreeMap::new(), BTreeMap::new());
        // Chunks' sizes, if the answer came in chunks, are no lines of the text form: none of ours is hexadecimal.
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} is typed twice");
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
                let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
                assert!(values.insert(name.to_owned(), value).is_none(), "{name} comes twice");
            }
        }
        for name in values.keys() {
            let base = name.split('{').next().unwrap();
            let stem = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| base.strip_suffix(suffix));
            let typed =
                types.contains_key(base) || stem.is_some_and(|stem| types.get(stem).is_some_and(|t| t == "histogram"));
            assert!(typed, "{name} has no type");
        }
        Self { types, values }
    }

    fn get(&self, name: &str) -> f64 {
        *self.values.get(name).unwrap_or_else(|| panic!("{name} is missing among {:?}", self.values.keys()))
    }

    /// The sum over all labels.
    fn sum(&self, name: &str) -> f64 {
        let of = |key: &&String| key.split('{').next() == Some(name);
        self.values.iter().filter(|(key, _)| of(key)).map(|(_, value)| value).sum()
    }
}

const EXPECTED: &[(&str, &str)] = &[
    ("etcd_server_has_leader", "gauge"),
    ("etcd_server_is_leader", "gauge"),
    ("etcd_server_leader_changes_seen_total", "counter"),
    ("etcd_server_quota_backend_bytes", "gauge"),
    ("etcd_server_proposals_committed_total", "gauge"),
    ("etcd_server_proposals_applied_total", "gauge"),
    ("etcd_server_proposals_failed_total", "counter"),
    ("etcd_server_proposals_pending", "gauge"),
    ("etcd_mvcc_db_total_size_in_bytes", "gauge"),
    ("etcd_mvcc_db_total_size_in_use_in_bytes", "gauge"),
    ("etcd_disk_wal_fsync_duration_seconds", "histogram"),
    ("etcd_disk_backend_commit_duration_seconds", "histogram"),
    ("quorate_event_loop_stall_seconds", "histogram"),
    ("etcd_network_peer_round_trip_time_seconds", "histogram"),
    ("etcd_network_peer_sent_bytes_total", "counter"),
    ("etcd_network_peer_received_bytes_total", "counter"),
    ("etcd_network_client_grpc_sent_bytes_total", "counter"),
    ("etcd_network_client_grpc_received_bytes_total", "counter"),
    ("grpc_server_started_total", "counter"),
    ("grpc_server_handled_total", "counter"),
    ("grpc_server_handling_seconds", "histogram"),
    ("process_resident_memory_bytes", "gauge"),
    ("process_cpu_seconds_total", "counter"),
    ("quorate_info", "gauge"),
    ("quorate_alarms", "gauge"),
];

const PUT: &str = r#"{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn names_and_types_are_those_of_etcd() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.start_all().await;
    cluster.put(leader, "k", "v").await;
    // The leader has sent heartbeats by now, a follower has taken some.
    let (of_leader, of_follower) = wait_for("peers to be counted", async || {
        let (ours, theirs) = (Scrape::take(&cluster, leader).await, Scrape::take(&cluster, (leader + 1) % 3).await);
        // Both count both: appends, and what they are answered.
        let counted = [&ours, &theirs].into_iter().all(|scrape| {
            ["etcd_network_peer_sent_bytes_total", "etcd_network_peer_received_bytes_total"]
                .iter()
                .all(|name| scrape.types.contains_key(*name) && scrape.sum(name) > 0.0)
        });
        if counted { Ok((ours, theirs)) } else { Err("none") }
    })
    .await;
    for (name, kind) in EXPECTED {
        let found = of_leader.types.get(*name).or(of_follower.types.get(*name)).map(String::as_str);
        // Nothing fails in a healthy cluster, and a family without a member has no line.
        assert_eq!(found, Some(*kind), "{name}");
    }
    assert_eq!((of_leader.get("etcd_server_has_leader"), of_leader.get("etcd_server_is_leader")), (1.0, 1.0));
    assert_eq!((of_follower.get("etcd_server_has_leader"), of_follower.get("etcd_server_is_leader")), (1.0, 0.0));
    assert_eq!(of_leader.get(r#"quorate_members{role="voter"}"#), 3.0);
    assert!(of_leader.get("process_resident_memory_bytes") > 1e6);
    assert!(of_leader.get("etcd_server_quota_backend_bytes") > 1e6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_responses_of_watch_streams_take_is_told_by_what_they_tell() {
    let cluster = Cluster::start(1).await;
    let request = |union| WatchRequest { request_union: Some(union) };
    let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
    let sent =
        [request(RequestUnion::CreateRequest(create)), request(RequestUnion::ProgressRequest(Default::default()))];
    let requests = tokio_stream::iter(sent).chain(tokio_stream::pending());
    let mut told = WatchClient::new(cluster.channel(0)).watch(requests).await.unwrap().into_inner();
    cluster.put(0, "k", "v").await;
    for _ in 0..3 {
        told.message().await.unwrap().unwrap();
    }
    let scrape = Scrape::take(&cluster, 0).await;
    for name in
        ["watch_stream_duration", "watch_stream_duration_per_event", "control_stream_duration", "progress_duration"]
    {
        let name = format!("etcd_debugging_server_watch_send_loop_{name}_seconds_count");
        assert!(scrape.get(&name) >= 1.0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_count_and_never_go_down() {
    let cluster = Cluster::start(1).await;
    let before = Scrape::take(&cluster, 0).await;
    for n in 0..20 {
        cluster.put(0, &format!("k{n}"), &"v".repeat(1000)).await;
    }
    let mut kv = cluster.kv(0);
    let future = RangeRequest { key: "k".into(), revision: 1 << 40, ..Default::default() };
    kv.range(future).await.unwrap_err();
    let after = Scrape::take(&cluster, 0).await;
    let grown =
        |name: &str| after.values.get(name).copied().unwrap_or(0.0) - before.values.get(name).copied().unwrap_or(0.0);
    assert_eq!(grown(&format!("grpc_server_started_total{PUT}")), 20.0);
    assert_eq!(grown(&format!("grpc_server_handling_seconds_count{PUT}")), 20.0);
    let handled = |method: &str, code: &str| {
        format!(
            r#"grpc_server_handled_total{{grpc_code="{code}",grpc_method="{method}",grpc_service="etcdserverpb.KV",grpc_type="unary"}}"#
        )
    };
    assert_eq!((grown(&handled("Put", "OK")), grown(&handled("Range", "OutOfRange"))), (20.0, 1.0));
    for name in [
        "etcd_server_proposals_applied_total",
        "etcd_server_proposals_committed_total",
        "etcd_debugging_mvcc_current_revision",
        "etcd_disk_wal_fsync_duration_seconds_count",
    ] {
        assert!(grown(name) >= 1.0, "{name} grew by {}", grown(name));
    }
    assert!(grown("etcd_network_client_grpc_received_bytes_total") >= 20_000.0);
    assert!(grown("etcd_network_client_grpc_sent_bytes_total") >= 1000.0);
    assert!(grown("etcd_mvcc_db_total_size_in_bytes") >= 20_000.0);
    assert_eq!(after.get("etcd_server_proposals_pending"), 0.0);
    for (name, kind) in before.types.iter().filter(|(_, kind)| *kind == "counter") {
        assert!(after.sum(name) >= before.sum(name), "{kind} {name} went down");
    }
}
