//! Entries that stop a cluster: nobody can have one proposed, and there is a way out should one be in the log all the same.

use std::time::Duration;

use quorate::env::fail::POISON_VARIABLE;
use quorate::pb::etcd::request_op::Request as Op;
use quorate::pb::etcd::response_op::Response as Done;
use quorate::pb::etcd::{PutRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse};
use quorate::pb::peer::forward_request::Proposal;
use quorate::pb::peer::forward_response::outcome::Result as Outcome;
use quorate::pb::peer::peer_client::PeerClient;
use quorate::pb::peer::{Envelope, ForwardRequest};
use quorate::testing::proposals::Proposals;
use tonic::Code;

use crate::support::cluster::{Cluster, http_post, wait_for};

fn op(request: Op) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// So many transactions within one another, the innermost with a put and a read.
fn nest(depth: usize) -> TxnRequest {
    let put = PutRequest { key: "deep".into(), value: format!("{depth}").into(), ..PutRequest::default() };
    let read = RangeRequest { key: "deep".into(), ..RangeRequest::default() };
    let innermost = vec![op(Op::RequestPut(put)), op(Op::RequestRange(read))];
    let around = |ops, _| vec![op(Op::RequestTxn(TxnRequest { success: ops, ..TxnRequest::default() }))];
    TxnRequest { success: (1..depth).fold(innermost, around), ..TxnRequest::default() }
}

/// How deep an answer is, and what was read at its bottom.
fn bottom(answer: &TxnResponse) -> (usize, &[u8]) {
    match answer.responses.last().and_then(|op| op.response.as_ref()) {
        Some(Done::ResponseTxn(inner)) => {
            let (depth, value) = bottom(inner);
            (depth + 1, value)
        }
        Some(Done::ResponseRange(range)) => (1, range.kvs[0].value()),
        other => panic!("neither a transaction nor a range: {other:?}"),
    }
}

/// A request of 249 bytes, 49 deep, stopped every member for ever; one 48 deep ended the stream of a follower's clients.
#[tokio::test(flavor = "multi_thread")]
async fn a_deep_transaction_is_applied_and_answered_by_leader_and_follower() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let risen = format!("\"cluster_version\":{}", quorate::kv::APPLY_VERSION);
    cluster.wait_http(leader, "/cluster", 200, &[&risen]).await;
    for slot in 0..3 {
        let mut kv = cluster.kv(slot);
        for depth in [40, 46, 47, 48, 49, 50, 97, 98, 99, 100, 120, 127] {
            let answer = kv.txn(nest(depth)).await.unwrap_or_else(|e| panic!("{depth} deep through kv-{slot}: {e}"));
            assert_eq!(bottom(&answer.into_inner()), (depth, depth.to_string().as_bytes()));
        }
        for depth in [129, 200, 400, 512] {
            let refused = kv.txn(nest(depth)).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{depth}: {refused}");
        }
        kv.txn(nest(600)).await.expect_err("deeper than anything that is decoded");
        // JSON has a bound of its own: what it takes is answered, and what it does not is refused.
        for depth in [20, 40, 60, 600] {
            let json = (1..depth).fold(r#"{"requestPut":{"key":"aw==","value":"dg=="}}"#.to_owned(), |inner, _| {
                format!(r#"{{"requestTxn":{{"success":[{inner}]}}}}"#)
            });
            let body = format!(r#"{{"success":[{json}]}}"#);
            let (status, answer) = http_post(&cluster.endpoint(slot), "/v3/kv/txn", &body).await.unwrap();
            assert_eq!(status, if depth <= 40 { 200 } else { 400 }, "{depth} deep: {answer}");
        }
    }
    cluster.wait_same_hash(0..3).await;
    cluster.kill_all();
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    assert_eq!(cluster.get(0, "deep").await.as_deref(), Some("127"), "and again after a restart");
}

/// `Forward` took any bytes: garbage, or a version that nobody knows, stopped all members for ever.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_member_forwards_stops_nobody() {
    let seed = std::env::var("QUORATE_WAY_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("QUORATE_WAY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let envelope = Some(Envelope {
        cluster_id: cluster.cluster_id(leader).await,
        from: cluster.member_id((leader + 1) % 3).await,
        to: cluster.member_id(leader).await,
    });
    let mut source = || random.u64(..);
    let mut proposals = Proposals(&mut source);
    let proposals: Vec<Proposal> = (1..=600).map(|id| Proposal { id, command: proposals.bytes() }).collect();
    let mut messages = vec![ForwardRequest { envelope, ..ForwardRequest::default() }];
    messages.extend(proposals.chunks(50).map(|some| ForwardRequest { proposals: some.to_vec(), ..Default::default() }));
    let address = format!("http://{}", cluster.peer_address(leader));
    let mut peer = PeerClient::connect(address).await.unwrap();
    // The stream stays open until all is answered.
    let (wire, requests) = tokio::sync::mpsc::channel(100);
    for message in messages {
        wire.send(message).await.unwrap();
    }
    let stream = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = peer.forward(stream).await.unwrap().into_inner();
    let (mut applied, mut refused) = (0, 0);
    // A command with an origin is answered by that process, which is not here.
    while let Ok(answer) = tokio::time::timeout(Duration::from_secs(5), answers.message()).await {
        let answer = answer.unwrap().expect("the stream goes on");
        for outcome in answer.outcomes {
            match outcome.result {
                Some(Outcome::Error(_)) => refused += 1,
                _ => applied += 1,
            }
        }
    }
    println!("{applied} applied, {refused} refused");
    // By chance; the leader's own proposals and a forwarder's are told apart in `node/tests/way.rs`.
    assert!(refused > 100 && applied > 0, "{refused} of {} were refused, {applied} applied", proposals.len());
    for slot in 0..3 {
        assert!(cluster.is_running(slot), "kv-{slot} has stopped");
        cluster.put(slot, "after", "all is well").await;
    }
    cluster.wait_same_hash(0..3).await;
}

/// Who learns that the entry is committed stops at it; the last one may have nobody left to tell it.
async fn wait_until_a_quorum_has_stopped(cluster: &mut Cluster) -> u64 {
    let mut running = vec![0, 1, 2];
    let mut last = 0;
    for _ in 0..2 {
        let (slot, status) = cluster.wait_any_exit(&running).await;
        assert!(!status.success(), "kv-{slot} must not go on as if nothing were");
        running.retain(|other| *other != slot);
        last = slot;
    }
    cluster.kill(running[0]);
    last
}

/// The way out: all members stop at one entry; a survivor says what it holds, and forms a new cluster without it.
#[tokio::test(flavor = "multi_thread")]
async fn recover_drops_an_entry_that_no_member_can_apply() {
    let mut cluster = Cluster::new(3);
    for slot in 0..3 {
        cluster.start_pod_with(slot, &[(POISON_VARIABLE, "poison")]);
    }
    let leader = cluster.wait_formed().await;
    let revision = cluster.put(leader, "before", "kept").await;
    let put = PutRequest { key: "poison".into(), ..PutRequest::default() };
    cluster.kv(leader).put(put).await.expect_err("no member can apply it");
    wait_until_a_quorum_has_stopped(&mut cluster).await;
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    let stopped = wait_until_a_quorum_has_stopped(&mut cluster).await;
    let log = cluster.log_text(stopped);
    let index = log.rsplit("--skip-entry ").next().and_then(|rest| rest.split(' ').next()).unwrap().to_owned();
    assert!(log.contains(&format!("the entry at log index {index} cannot be applied")), "{log}");

    // Its log has the entry for certain.
    let dir = cluster.data_dir(leader).to_string_lossy().into_owned();
    let recover = async |args: &[&str]| {
        let args = [&["recover", "--data-dir", &dir][..], args].concat();
        let output = tokio::process::Command::new(crate::support::cluster::binary()).args(args).output().await.unwrap();
        let text = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr });
        (output.status.success(), text.into_owned())
    };
    let (ok, text) = recover(&["--dry-run"]).await;
    assert!(!ok && text.contains(&format!("--skip-entry {index} --dry-run")), "{text}");
    let (ok, text) = recover(&["--skip-entry", "1", "--dry-run"]).await;
    assert!(!ok && text.contains("log index 1 cannot be skipped"), "{text}");
    let (ok, text) = recover(&["--skip-entry", &index, "--dry-run"]).await;
    let says = text.contains(&format!("dropped:  log index {index},")) && text.contains("it cannot be decoded");
    assert!(ok && says && text.contains("nothing was changed"), "{text}");
    let (ok, text) = recover(&["--skip-entry", &index]).await;
    assert!(ok && text.contains("its only voter"), "{text}");
    for slot in (0..3).filter(|slot| *slot != leader) {
        cluster.wipe(slot);
    }
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    wait_for("what came before", async || match cluster.get(0, "before").await.as_deref() {
        Some("kept") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(cluster.get(0, "poison").await, None);
    assert_eq!(cluster.put(0, "after", "v").await, revision + 1, "revisions go on");
    cluster.wait_same_hash(0..3).await;
}
