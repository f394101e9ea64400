//! What the client port serves beside KV: cluster, maintenance, health, reflection, HTTP; and what all of it says without a
//! leader, on a real cluster of three.

use std::time::{Duration, Instant};

use quorate::pb::etcd::cluster_client::ClusterClient;
use quorate::pb::etcd::{
    AlarmRequest, HashKvRequest, MemberListRequest, MoveLeaderRequest, PutRequest, RangeRequest, StatusRequest,
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::cluster::{Cluster, http_get, wait_for};

/// What both ports say, if they agree; the client port refuses while there is nothing to serve.
async fn health(cluster: &Cluster, slot: u64, service: &str) -> Result<ServingStatus, Status> {
    let request = || HealthCheckRequest { service: service.into() };
    let told = HealthClient::new(cluster.status_channel(slot)).check(request()).await?.into_inner().status();
    match HealthClient::new(cluster.channel(slot)).check(request()).await {
        Ok(same) if same.get_ref().status() == told => Ok(told),
        Ok(other) => Err(Status::internal(format!("the ports differ: {told:?} and {other:?}"))),
        Err(refused) if refused.code() == Code::Unavailable => Ok(told),
        Err(error) => Err(error),
    }
}

async fn wait_health(cluster: &Cluster, slot: u64, service: &str, expected: ServingStatus) {
    wait_for(&format!("health {service:?} of kv-{slot} to be {expected:?}"), async || {
        match health(cluster, slot, service).await {
            Ok(status) if status == expected => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn liveness_is_served_before_there_is_a_cluster_and_readiness_only_then() {
    let mut cluster = Cluster::new(3);
    cluster.start_pod(0);
    wait_health(&cluster, 0, "liveness", ServingStatus::Serving).await;
    for service in ["", "readiness"] {
        assert_eq!(health(&cluster, 0, service).await.unwrap(), ServingStatus::NotServing, "{service:?}");
    }
    assert_eq!(health(&cluster, 0, "other").await.unwrap_err().code(), Code::NotFound);
    let (code, text) = http_get(&cluster.status_endpoint(0), "/readyz").await.unwrap();
    assert_eq!(code, 503, "{text}");
    assert_eq!(http_get(&cluster.status_endpoint(0), "/livez").await.unwrap().0, 200);
    let refused = tokio::net::TcpStream::connect(cluster.endpoint(0)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    cluster.start_pod(1);
    cluster.start_pod(2);
    cluster.wait_formed().await;
    for slot in 0..3 {
        for service in ["", "readiness", "liveness"] {
            wait_health(&cluster, slot, service, ServingStatus::Serving).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_names_the_services_in_both_versions() {
    let cluster = Cluster::start(1).await;
    let expected = [
        "etcdserverpb.Auth",
        "etcdserverpb.Cluster",
        "etcdserverpb.KV",
        "etcdserverpb.Lease",
        "etcdserverpb.Maintenance",
        "grpc.health.v1.Health",
        "v3electionpb.Election",
        "v3lockpb.Lock",
    ];
    macro_rules! listed {
        ($version:ident) => {{
            use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;
            let request = tonic_reflection::pb::$version::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(MessageRequest::ListServices(String::new())),
            };
            let mut client = ServerReflectionClient::new(cluster.channel(0));
            let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
            let answer = answers.take(1).collect::<Vec<_>>().await.remove(0).unwrap();
            match answer.message_response {
                Some(MessageResponse::ListServicesResponse(list)) => {
                    list.service.into_iter().map(|s| s.name).collect::<Vec<String>>()
                }
                other => panic!("{other:?}"),
            }
        }};
    }
    for names in [listed!(v1), listed!(v1alpha)] {
        for service in expected {
            assert!(names.iter().any(|name| name == service), "{service} is not in {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("peer")), "clients are not shown the members' API: {names:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_not_served_is_unimplemented_by_name() {
    let cluster = Cluster::start(1).await;
    let mut grpc = tonic::client::Grpc::new(cluster.channel(0));
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<StatusRequest, StatusRequest>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/etcdserverpb.Nothing/Do");
    let status = grpc.unary(Request::new(StatusRequest {}), path, codec).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unimplemented, "unknown service etcdserverpb.Nothing"));
    assert_eq!(http_get(&cluster.endpoint(0), "/nothing").await.unwrap().0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn members_and_their_state_are_told_alike_by_all() {
    let cluster = Cluster::start(3).await;
    let revision = cluster.put(1, "k", "v").await;
    let leader = cluster.wait_formed().await;
    for slot in 0..3 {
        let mut client = ClusterClient::new(cluster.channel(slot));
        for linearizable in [false, true] {
            let list = client.member_list(MemberListRequest { linearizable }).await.unwrap().into_inner();
            let mut members = list.members;
            members.sort_by_key(|m| m.id & 0xffff);
            assert_eq!(members.len(), 3);
            for (i, member) in (0..).zip(&members) {
                assert_eq!((member.id & 0xffff, member.name.clone(), member.is_learner), (i, format!("kv-{i}"), false));
                assert_eq!(member.client_ur_ls, [format!("http://{}", cluster.endpoint(i))]);
                assert_eq!(member.peer_ur_ls, [format!("http://{}", cluster.peer_address(i))]);
            }
        }
        // Linearizable, so that this member has applied the put.
        assert_eq!(cluster.get(slot, "k").await.as_deref(), Some("v"));
        let status = cluster.status(slot).await.unwrap();
        let header = status.header.unwrap();
        assert_eq!((header.member_id & 0xffff, header.revision, status.leader & 0xffff), (slot, revision, leader));
        assert!(header.cluster_id != 0 && header.raft_term == status.raft_term && status.raft_term > 0, "{status:?}");
        assert!(status.raft_applied_index > 0 && status.raft_applied_index <= status.raft_index, "{status:?}");
        assert!(status.db_size >= status.db_size_in_use && status.db_size_in_use > 0, "{status:?}");
        assert!(status.db_size_quota > 0 && !status.is_learner && status.errors.is_empty(), "{status:?}");
        assert!(status.version == "3.7.3" && status.storage_version == "3.7.0", "{status:?}");
        let alarms = cluster.maintenance(slot).alarm(AlarmRequest::default()).await.unwrap().into_inner();
        assert_eq!((alarms.alarms, alarms.header.unwrap().revision), (vec![], revision));
    }
    let hash = cluster.wait_same_hash([0, 1, 2]).await;
    let past = cluster.hash_kv(0, revision).await.unwrap();
    assert_eq!((past.hash, past.hash_revision), (hash, revision));
    let future = cluster.maintenance(0).hash_kv(HashKvRequest { revision: revision + 1 }).await.unwrap_err();
    assert_eq!(future.code(), Code::OutOfRange, "{future}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_where_the_leader_is_told_to() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let next = (leader + 1) % 3;
    let id = async |slot: u64| cluster.status(slot).await.unwrap().header.unwrap().member_id;
    let target_id = id(next).await;
    let to = |target_id| MoveLeaderRequest { target_id };
    let refused = cluster.maintenance(next).move_leader(to(target_id)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "etcdserver: not leader"));
    let refused = cluster.maintenance(leader).move_leader(to(7)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "etcdserver: bad leader transferee"));
    cluster.maintenance(leader).move_leader(to(target_id)).await.unwrap();
    assert_eq!(cluster.wait_formed().await, next);
    cluster.put(leader, "k", "still works").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_on_the_client_port_tells_health_version_and_state() {
    let cluster = Cluster::start(3).await;
    for slot in 0..3 {
        wait_health(&cluster, slot, "readiness", ServingStatus::Serving).await;
        let get = async |path: &str| http_get(&cluster.endpoint(slot), path).await.unwrap();
        assert_eq!(get("/livez").await.0, 200);
        assert_eq!(get("/readyz").await.0, 200);
        let (code, health) = get("/health").await;
        assert_eq!(code, 200, "{health}");
        let health: serde_json::Value = serde_json::from_str(&health).unwrap();
        assert_eq!((&health["health"], &health["reason"]), (&"true".into(), &"".into()), "strings, as etcd's");
        let version: serde_json::Value = serde_json::from_str(&get("/version").await.1).unwrap();
        let expected = serde_json::json!({ "etcdserver": "3.7.3", "etcdcluster": "3.7.0", "storage": "3.7.0" });
        assert_eq!(version, expected);
        let (code, page) = get("/").await;
        assert_eq!(code, 200);
        for name in ["kv-0", "kv-1", "kv-2", "leader"] {
            assert!(page.contains(name), "{name} is not on the page: {page}");
        }
    }
}

/// A cluster whose requests give up after 2 s instead of 5.
async fn impatient() -> Cluster {
    let mut cluster = Cluster::new(3);
    cluster.set("server.request_timeout", "2s");
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    cluster
}

async fn assert_leaderless(cluster: &Cluster, slot: u64) {
    let get = || RangeRequest { key: "k".into(), ..Default::default() };
    let mut needs_leader = Request::new(get());
    needs_leader.metadata_mut().insert("hasleader", "true".parse().unwrap());
    let again = || {
        let mut request = Request::new(get());
        *request.metadata_mut() = needs_leader.metadata().clone();
        request
    };
    // It has to notice first: a leader that was heard a moment ago may be alive.
    wait_for(&format!("kv-{slot} to miss its leader"), async || match cluster.kv(slot).range(again()).await {
        Err(status) if status.message() == "etcdserver: no leader" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let began = Instant::now();
    let status = cluster.kv(slot).range(again()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
    assert!(began.elapsed() < Duration::from_secs(1), "at once, not after {:?}", began.elapsed());

    let began = Instant::now();
    let status = cluster.kv(slot).range(get()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: request timed out"));
    assert!(began.elapsed() < Duration::from_secs(3), "within the request timeout, not after {:?}", began.elapsed());
    let put = PutRequest { key: "k".into(), value: "lost?".into(), ..Default::default() };
    let status = cluster.kv(slot).put(put).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");

    // What needs no quorum still answers.
    let stale = RangeRequest { serializable: true, ..get() };
    assert_eq!(cluster.kv(slot).range(stale).await.unwrap().into_inner().kvs[0].value(), b"v");
    assert_eq!(cluster.members(slot).await.unwrap().len(), 3);
    let status = cluster.status(slot).await.unwrap();
    assert_eq!((status.leader, &status.errors[..1]), (0, &["etcdserver: no leader".to_owned()][..]), "{status:?}");
    wait_health(cluster, slot, "readiness", ServingStatus::NotServing).await;
    wait_health(cluster, slot, "liveness", ServingStatus::Serving).await;
    let (code, text) = http_get(&cluster.endpoint(slot), "/health").await.unwrap();
    assert!(code == 503 && text.contains("RAFT NO LEADER"), "{code} {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_a_former_leader_and_a_follower_say_so() {
    let mut cluster = impatient().await;
    cluster.put(0, "k", "v").await;
    let leader = cluster.wait_formed().await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.kill(one);
    cluster.kill(two);
    assert_leaderless(&cluster, leader).await;
    cluster.start_pod(one);
    cluster.start_pod(two);
    let leader = cluster.wait_formed().await;
    cluster.put(leader, "k", "v").await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    assert_eq!(cluster.get(one, "k").await.as_deref(), Some("v"));
    cluster.kill(leader);
    cluster.kill(two);
    assert_leaderless(&cluster, one).await;
}
