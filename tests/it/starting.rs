//! What a member that starts says, and from when on it serves: the status listener and the clients' port.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use quorate::env::fail::SLOW_LOAD_VARIABLE;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_stream::StreamExt as _;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::cluster::{Cluster, http_get, wait_for};

/// Longest that the status listener may take on a busy machine; a state is loaded for longer here.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// A GET on the status listener that must be answered soon.
async fn ask(cluster: &Cluster, slot: u64, path: &str) -> (u16, String) {
    let begin = Instant::now();
    let answer = http_get(&cluster.status_endpoint(slot), path).await.unwrap();
    assert!(begin.elapsed() < ANSWER_TIME_MAX, "{path} took {:?}", begin.elapsed());
    answer
}

/// Whether the clients' port takes connections; a port that is closed must refuse them.
async fn is_open(cluster: &Cluster, slot: u64) -> bool {
    match TcpStream::connect(cluster.endpoint(slot)).await {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "clients must not wait for it: {error}");
            false
        }
    }
}

async fn wait_open(cluster: &Cluster, slot: u64) {
    wait_for(&format!("the clients' port of kv-{slot} to open"), async || match is_open(cluster, slot).await {
        true => Ok(()),
        false => Err("it is refused"),
    })
    .await;
}

async fn serializable(cluster: &Cluster, slot: u64, key: &str) -> Result<Option<String>, tonic::Status> {
    let range = RangeRequest { key: key.to_owned().into(), serializable: true, ..Default::default() };
    let kvs = cluster.kv(slot).range(range).await?.into_inner().kvs;
    Ok(kvs.first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
}

/// The first response to a watch that wants to be refused without a leader.
async fn watch_with_leader(cluster: &Cluster, slot: u64) -> Result<WatchResponse, tonic::Status> {
    let create = WatchCreateRequest { key: "n".into(), ..Default::default() };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    let mut request = tonic::Request::new(tokio_stream::iter([create]).chain(tokio_stream::pending()));
    request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    let mut responses = WatchClient::new(cluster.channel(slot)).watch(request).await?.into_inner();
    Ok(responses.message().await?.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn member_that_loads_its_state_says_how_far_it_is_and_refuses_clients() {
    const KEYS: u64 = 40;
    let mut cluster = Cluster::start(1).await;
    for key in 0..KEYS {
        let put = PutRequest { key: format!("k{key}").into(), value: vec![7; 100 << 10].into(), ..Default::default() };
        cluster.kv(0).put(put).await.unwrap();
    }
    cluster.terminate(0).await;
    cluster.start_pod_with(0, &[(SLOW_LOAD_VARIABLE, "15")]);
    let begin = Instant::now();
    let mut told = BTreeSet::new();
    while told.len() < 3 {
        let text = cluster.wait_unready(0, &["loads its state: ", " MiB"]).await;
        told.insert(text);
        assert!(!is_open(&cluster, 0).await, "nothing is loaded");
        assert_eq!(ask(&cluster, 0, "/livez").await, (200, "ok\n".to_owned()));
        let (code, text) = ask(&cluster, 0, "/readyz?verbose").await;
        assert!(code == 503 && text.contains("[-]linearizable_read failed: loads its state: "), "{code} {text}");
        assert_eq!(ask(&cluster, 0, "/health").await.0, 503);
        assert_eq!(ask(&cluster, 0, "/metrics").await.0, 200);
        assert_eq!(ask(&cluster, 0, "/version").await.0, 200);
        assert!(ask(&cluster, 0, "/").await.1.contains("loads its state: "));
    }
    for (service, expected) in [("liveness", ServingStatus::Serving), ("readiness", ServingStatus::NotServing)] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(cluster.status_channel(0)).check(request).await.unwrap();
        assert_eq!(answer.into_inner().status(), expected, "{service}");
    }
    // People name the clients' port.
    let text = cluster.client(&["status"]).await;
    assert!(text.contains("loads its state: "), "{text}");
    wait_open(&cluster, 0).await;
    println!("loaded in {:?}; told {told:?}", begin.elapsed());
    cluster.wait_http(0, "/readyz", 200, &["ok"]).await;
    for key in 0..KEYS {
        assert!(serializable(&cluster, 0, &format!("k{key}")).await.unwrap().is_some(), "k{key}");
    }
    cluster.wait_http(0, "/", 200, &["serves clients"]).await;
}

/// Nothing of clients' data is read or changed through the status listener, and what it does not serve it says by name.
#[tokio::test(flavor = "multi_thread")]
async fn status_listener_serves_no_data() {
    let cluster = Cluster::start(1).await;
    cluster.put(0, "k", "v").await;
    let mut kv = quorate::pb::etcd::kv_client::KvClient::new(cluster.status_channel(0));
    let range = RangeRequest { key: "k".into(), ..Default::default() };
    let refused = kv.range(range).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (tonic::Code::Unimplemented, "unknown service etcdserverpb.KV"));
    let mut maintenance = quorate::pb::etcd::maintenance_client::MaintenanceClient::new(cluster.status_channel(0));
    assert_eq!(maintenance.snapshot(quorate::pb::etcd::SnapshotRequest {}).await.unwrap_err().code(), refused.code());
    assert_eq!(
        maintenance.defragment(quorate::pb::etcd::DefragmentRequest {}).await.unwrap_err().code(),
        refused.code()
    );
    assert_eq!(http_get(&cluster.status_endpoint(0), "/v3/kv/range").await.unwrap().0, 404);
}

/// An address that somebody else has is found at the start, whatever it is for.
#[tokio::test(flavor = "multi_thread")]
async fn taken_address_is_named_at_the_start() {
    let cluster = Cluster::start(1).await;
    for (flag, key, taken) in [
        ("--listen-client", "server.listen_client", cluster.endpoint(0)),
        ("--listen-peer", "server.listen_peer", cluster.peer_address(0)),
        ("--listen-status", "server.listen_status", cluster.status_endpoint(0)),
    ] {
        let data = tempfile::tempdir().unwrap();
        let free = ["--listen-client", "--listen-peer", "--listen-status"].into_iter().filter(|other| *other != flag);
        let mut args: Vec<&str> = vec!["serve", flag, &taken, "--data-dir", data.path().to_str().unwrap()];
        free.for_each(|flag| args.extend([flag, "127.0.0.1:0"]));
        let text = cluster.command(&args).await;
        assert!(text.contains(&format!("{key} = {taken}: cannot listen")), "{text}");
    }
}

/// The first answer that a client gets from a member that was restarted holds what this member has acknowledged before, and is none
/// of those errors on which clients give up.
#[tokio::test(flavor = "multi_thread")]
async fn who_connects_first_after_a_restart_is_told_what_was_acknowledged() {
    let seed: u64 = std::env::var("QUORATE_TEST_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::new(3);
    // Who is stopped while others are dead does not wait for them.
    cluster.set("server.quorum_wait", "0s");
    cluster.start_all().await;
    let mut number = 0_u64;
    let mut acknowledged = [0_u64; 3];
    for round in 0..6 {
        for _ in 0..random.u64(1..60) {
            let slot = random.u64(..3);
            number += 1;
            cluster.put(slot, "n", &number.to_string()).await;
            acknowledged[slot as usize] = number;
        }
        // Any number of them, the leader among them or not; without a majority a new one has to be elected first.
        let victims: Vec<u64> = (0..3).filter(|_| random.bool()).collect();
        for victim in &victims {
            match random.bool() {
                true => cluster.kill(*victim),
                false => cluster.terminate(*victim).await,
            }
        }
        for victim in &victims {
            cluster.start_pod(*victim);
        }
        for victim in &victims {
            wait_open(&cluster, *victim).await;
            let found = serializable(&cluster, *victim, "n").await.unwrap();
            let found: u64 = found.map_or(0, |text| text.parse().unwrap());
            // Clients take an error on this for the end of their watch.
            let created = watch_with_leader(&cluster, *victim).await.unwrap();
            assert!(created.created && !created.canceled, "round {round}: kv-{victim} answers {created:?}");
            let least = acknowledged[*victim as usize];
            assert!(found >= least, "round {round}: kv-{victim} says {found} and had acknowledged {least}");
        }
        cluster.wait_formed().await;
    }
}

/// Case 8, for a member that starts: without a leader the clients' port opens a while later, for what needs none; and a member that
/// has never belonged to a cluster waits for one.
#[tokio::test(flavor = "multi_thread")]
async fn port_opens_without_a_leader_after_a_while_and_only_for_who_has_data() {
    const WHILE: Duration = Duration::from_secs(3);
    let mut cluster = Cluster::new(3);
    cluster.set("server.open_without_leader", "3s").set("server.request_timeout", "1s");
    cluster.set("server.quorum_wait", "0s").start_all().await;
    cluster.put(0, "k", "v").await;
    // Nobody says what is committed, so it must have been applied and kept.
    for slot in [1, 2, 0] {
        cluster.terminate(slot).await;
    }
    cluster.wipe(2);
    let begin = Instant::now();
    cluster.start_pod(0);
    cluster.start_pod(2);
    cluster.wait_unready(0, &["knows no leader"]).await;
    wait_open(&cluster, 0).await;
    assert!(begin.elapsed() >= WHILE, "it opened after {:?}", begin.elapsed());
    assert_eq!(serializable(&cluster, 0, "k").await.unwrap().as_deref(), Some("v"));
    let range = RangeRequest { key: "k".into(), ..Default::default() };
    assert_eq!(cluster.kv(0).range(range).await.unwrap_err().message(), "etcdserver: request timed out");
    assert_eq!(cluster.members(0).await.unwrap().len(), 3);
    cluster.wait_unready(0, &["knows no leader"]).await;
    assert!(!is_open(&cluster, 2).await, "it has nothing to serve");
    cluster.start_pod(1);
    wait_open(&cluster, 2).await;
    assert_eq!(serializable(&cluster, 2, "k").await.unwrap().as_deref(), Some("v"));
    cluster.wait_formed().await;
}

/// A disk of a member that was replaced meanwhile: its process goes on under another identity, and its clients are told to go
/// elsewhere until that one serves.
#[tokio::test(flavor = "multi_thread")]
async fn port_closes_when_the_process_goes_on_as_another_member() {
    let mut cluster = Cluster::new(3);
    // So that the old self serves at all.
    cluster.set("server.open_without_leader", "0s").set("cluster.failure_timeout", "2s");
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    let former = cluster.member_id(2).await;
    cluster.kill(2);
    cluster.take_disk(2, "old");
    cluster.start_pod(2);
    wait_for("the newcomer to take the place of the old one", async || {
        let (new, members) = (cluster.member_id(2).await, cluster.membership(0).await);
        let voters: Vec<u64> = members.iter().filter(|member| member.1).map(|member| member.0).collect();
        if voters.contains(&new) && members.len() == 3 { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
    cluster.kill(2);
    cluster.wipe(2);
    cluster.put_disk("old", 2);
    let logged = cluster.log_text(2).len();
    cluster.start_pod(2);
    cluster.wait_logged(2, &["was removed; the former self is archived"]).await;
    cluster.wait_formed().await;
    assert_ne!(cluster.member_id(2).await, former);
    let events = wait_for("the port to be open again", async || {
        let text = cluster.log_text(2)[logged..].to_owned();
        let what = ["ready to serve", "port is closed", "former self is archived"];
        let events: Vec<&str> =
            text.lines().filter_map(|line| what.into_iter().find(|what| line.contains(what))).collect();
        if events.last() == Some(&"ready to serve") { Ok(events.join(", ")) } else { Err(events.join(", ")) }
    })
    .await;
    assert_eq!(events, "ready to serve, port is closed, former self is archived, ready to serve");
}

/// Whoever holds connections to the status listener, silent, half said or greedy, keeps no probe out.
#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_beside_those_who_hold_connections() {
    let mut cluster = Cluster::new(3);
    cluster.start_pod(0);
    cluster.wait_unready(0, &["waits for slot"]).await;
    let mut held = Vec::new();
    for number in 0..400_u32 {
        let mut stream = TcpStream::connect(cluster.status_endpoint(0)).await.unwrap();
        let said: &[u8] = match number % 4 {
            0 => b"",
            1 => b"GET /readyz HTTP/1.1\r\nHost: x\r\nX: ",
            2 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            _ => b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        };
        // It may have been closed by now.
        let _ = stream.write_all(said).await;
        held.push(stream);
        if number % 20 == 0 {
            assert_eq!(ask(&cluster, 0, "/livez").await, (200, "ok\n".to_owned()));
            assert_eq!(ask(&cluster, 0, "/readyz").await.0, 503);
        }
    }
    let mut gone = 0;
    for mut stream in held {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_millis(10), stream.read_to_end(&mut rest)).await;
        gone += usize::from(read.is_ok());
    }
    assert!(gone >= 300, "only {gone} of 400 were closed");
}
