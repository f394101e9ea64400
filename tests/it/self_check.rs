//! A member that applies something else than the others: found within seconds, fenced, also over a restart, and replaced once its
//! disk was deleted.

use quorate::env::fail::CORRUPT_VARIABLE;
use quorate::kv::APPLY_VERSION;
use quorate::pb::election::election_client::ElectionClient;
use quorate::pb::election::{
    CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest,
};
use quorate::pb::etcd::alarm_request::AlarmAction;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    AlarmRequest, AlarmType, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest, SnapshotRequest, WatchCreateRequest,
    WatchRequest, WatchResponse, watch_request,
};
use quorate::pb::lock::lock_client::LockClient;
use quorate::pb::lock::{LockRequest, LockResponse, UnlockRequest};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::support::cluster::{Cluster, PATIENCE, http_get, http_post, wait_for};

const KEY: &str = "flipped";

/// A cluster of `size` in which pod `odd` gets the value of [`KEY`] wrong.
async fn cluster_with_a_fault(size: u64, odd: u64) -> Cluster {
    let mut cluster = Cluster::new(size);
    cluster.set("raft.self_check_interval", "500ms");
    for slot in 0..size {
        let fault: &[(&str, &str)] = if slot == odd { &[(CORRUPT_VARIABLE, KEY)] } else { &[] };
        cluster.start_pod_with(slot, fault);
    }
    cluster.wait_formed().await;
    cluster
}

async fn corrupt_alarms(cluster: &Cluster, slot: u64) -> Vec<u64> {
    let request = AlarmRequest { action: AlarmAction::Get.into(), alarm: AlarmType::Corrupt.into(), member_id: 0 };
    wait_for(&format!("kv-{slot} to list alarms"), async || match cluster.maintenance(slot).alarm(request).await {
        Ok(answer) => Ok(answer.into_inner().alarms.iter().map(|alarm| alarm.member_id).collect()),
        Err(status) => Err(status.message().to_owned()),
    })
    .await
}

async fn wait_fenced(cluster: &Cluster, odd: u64) {
    let id = cluster.member_id(odd).await;
    let mut kv = cluster.kv(odd);
    let refused = wait_for(&format!("kv-{odd} to refuse a read"), async || {
        let read = RangeRequest { key: KEY.into(), serializable: true, ..Default::default() };
        match kv.range(read).await {
            Err(status) if status.code() == Code::DataLoss => Ok(status),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(refused.message(), "etcdserver: corrupt cluster");
    let put = PutRequest { key: "other".into(), ..Default::default() };
    assert_eq!(kv.put(put).await.unwrap_err().code(), Code::DataLoss);
    cluster.wait_unready(odd, &["alarm CORRUPT", "delete its data directory"]).await;
    cluster.wait_logged(odd, &["ERROR", "name=\"corrupt\"", "differs from the majority"]).await;
    assert_eq!(corrupt_alarms(cluster, odd).await, [id]);
}

type Call<'a> = (&'a str, std::pin::Pin<Box<dyn Future<Output = Result<(), Status>> + 'a>>);

/// Every other kind of call for data, which must be refused alike.
async fn refuse_all(cluster: &Cluster, odd: u64) {
    let channel = cluster.channel(odd);
    let (mut lease, mut renewer) = (LeaseClient::new(channel.clone()), LeaseClient::new(channel.clone()));
    let (mut revoker, mut asker, mut lister) = (lease.clone(), lease.clone(), lease.clone());
    let (mut lock, mut unlock) = (LockClient::new(channel.clone()), LockClient::new(channel.clone()));
    let mut watch = WatchClient::new(channel.clone());
    let elections = || ElectionClient::new(channel.clone());
    let (mut campaign, mut proclaim, mut leader, mut observe, mut resign) =
        (elections(), elections(), elections(), elections(), elections());
    let told = || Some(LeaderKey { name: "e".into(), key: "e/1".into(), rev: 1, lease: 1 });
    let calls: Vec<Call<'_>> = vec![
        ("watch", Box::pin(async move { watch.watch(tokio_stream::empty()).await.map(drop) })),
        ("grant", Box::pin(async move { lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.map(drop) })),
        ("revoke", Box::pin(async move { revoker.lease_revoke(LeaseRevokeRequest { id: 1 }).await.map(drop) })),
        ("keep alive", Box::pin(async move { renewer.lease_keep_alive(tokio_stream::empty()).await.map(drop) })),
        (
            "time to live",
            Box::pin(
                async move { asker.lease_time_to_live(LeaseTimeToLiveRequest { id: 1, keys: true }).await.map(drop) },
            ),
        ),
        ("leases", Box::pin(async move { lister.lease_leases(LeaseLeasesRequest {}).await.map(drop) })),
        ("lock", Box::pin(async move { lock.lock(LockRequest { name: "l".into(), lease: 0 }).await.map(drop) })),
        ("unlock", Box::pin(async move { unlock.unlock(UnlockRequest { key: "l/1".into() }).await.map(drop) })),
        ("campaign", Box::pin(async move { campaign.campaign(CampaignRequest::default()).await.map(drop) })),
        (
            "proclaim",
            Box::pin(async move {
                proclaim.proclaim(ProclaimRequest { leader: told(), value: "v".into() }).await.map(drop)
            }),
        ),
        ("leader", Box::pin(async move { leader.leader(LeaderRequest { name: "e".into() }).await.map(drop) })),
        ("observe", Box::pin(async move { observe.observe(LeaderRequest { name: "e".into() }).await.map(drop) })),
        ("resign", Box::pin(async move { resign.resign(ResignRequest { leader: told() }).await.map(drop) })),
    ];
    for (name, call) in calls {
        let refused = call.await.expect_err(name);
        assert_eq!((refused.code(), refused.message()), (Code::DataLoss, "etcdserver: corrupt cluster"), "{name}");
    }
}

/// What clients have open at a member.
struct Open {
    watch: Streaming<WatchResponse>,
    leases: Streaming<LeaseKeepAliveResponse>,
    observer: Streaming<LeaderResponse>,
    waiter: JoinHandle<Result<tonic::Response<LockResponse>, Status>>,
    /// The requests go on.
    _requests: (mpsc::Sender<WatchRequest>, mpsc::Sender<LeaseKeepAliveRequest>),
}

impl Open {
    /// At `odd`; the lock that is waited for is held through another member.
    async fn at(cluster: &Cluster, odd: u64) -> Self {
        let channel = cluster.channel(odd);
        let (creates, outgoing) = mpsc::channel(1);
        let create = WatchCreateRequest { key: KEY.into(), ..Default::default() };
        let create = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
        creates.send(create).await.unwrap();
        let watching = WatchClient::new(channel.clone()).watch(ReceiverStream::new(outgoing)).await;
        let mut watch = watching.unwrap().into_inner();
        assert!(watch.message().await.unwrap().unwrap().created);
        let mut granter = LeaseClient::new(cluster.channel((odd + 1) % 3));
        granter.lease_grant(LeaseGrantRequest { ttl: 60, id: 7 }).await.unwrap();
        let (renewals, outgoing) = mpsc::channel(1);
        renewals.send(LeaseKeepAliveRequest { id: 7 }).await.unwrap();
        let renewing = LeaseClient::new(channel.clone()).lease_keep_alive(ReceiverStream::new(outgoing)).await;
        let mut leases = renewing.unwrap().into_inner();
        assert_eq!(leases.message().await.unwrap().unwrap().ttl, 60);
        let observing = ElectionClient::new(channel.clone()).observe(LeaderRequest { name: "e".into() }).await;
        let observer = observing.unwrap().into_inner();
        let mut holder = LockClient::new(cluster.channel((odd + 1) % 3));
        holder.lock(LockRequest { name: "held".into(), lease: 7 }).await.unwrap();
        let waiter =
            tokio::spawn(
                async move { LockClient::new(channel).lock(LockRequest { name: "held".into(), lease: 0 }).await },
            );
        let mut kv = cluster.kv((odd + 1) % 3);
        wait_for("two to be in line for the lock", async || {
            let line = RangeRequest { key: "held/".into(), range_end: "held0".into(), ..Default::default() };
            let count = kv.range(line).await.map_err(|status| status.to_string())?.into_inner().count;
            if count == 2 { Ok(()) } else { Err(count.to_string()) }
        })
        .await;
        Self { watch, leases, observer, waiter, _requests: (creates, renewals) }
    }

    /// All of it ends with the error that the fence has.
    async fn wait_ended(mut self) {
        let watched = async {
            loop {
                // What came before the fence.
                if let Err(status) = self.watch.message().await.map(|message| message.expect("an error ends it")) {
                    return status;
                }
            }
        };
        let ends = async {
            [
                watched.await,
                self.leases.message().await.expect_err("keep-alives end"),
                self.observer.message().await.expect_err("observers are told"),
                self.waiter.await.unwrap().expect_err("who waits is told"),
            ]
        };
        for status in tokio::time::timeout(PATIENCE, ends).await.expect("what was open has ended") {
            assert_eq!((status.code(), status.message()), (Code::DataLoss, "etcdserver: corrupt cluster"));
        }
    }
}

/// From the first moment in which it answers.
async fn wait_fenced_again(cluster: &Cluster, odd: u64) {
    let mut kv = cluster.kv(odd);
    for serializable in [true, false] {
        wait_for(&format!("kv-{odd} to refuse reads after its restart"), async || {
            let read = RangeRequest { key: KEY.into(), serializable, ..Default::default() };
            match kv.range(read).await {
                Ok(answer) => panic!("a fenced member serves data after a restart: {answer:?}"),
                Err(status) if status.code() == Code::DataLoss => Ok(()),
                Err(status) => Err(status.message().to_owned()),
            }
        })
        .await;
    }
}

/// With three members the odd one is fenced, whichever it is, also the leader; the others go on. What is open at it ends, and a
/// restart does not forget it; with its disk deleted it comes back as a new member that holds what the others do, and the alarm goes.
#[tokio::test(flavor = "multi_thread")]
async fn divergent_member_is_fenced_and_heals_when_its_disk_is_deleted() {
    for odd_leads in [false, true] {
        let mut cluster = cluster_with_a_fault(3, 0).await;
        wait_for("the leader to be the one that this case needs", async || {
            let leader = cluster.leader(0..3).await.ok_or("there is none")?;
            if (leader == 0) == odd_leads {
                return Ok(());
            }
            let target = cluster.member_id(if odd_leads { 0 } else { 1 }).await;
            let request = quorate::pb::etcd::MoveLeaderRequest { target_id: target };
            let _ = cluster.maintenance(leader).move_leader(request).await;
            Err("another leads")
        })
        .await;
        let old = cluster.member_id(0).await;
        let open = Open::at(&cluster, 0).await;
        cluster.put(1, KEY, "right").await;
        let put_at = std::time::Instant::now();
        wait_fenced(&cluster, 0).await;
        open.wait_ended().await;
        refuse_all(&cluster, 0).await;
        println!("leader {odd_leads}: found and fenced after {:?}", put_at.elapsed());
        wait_for("another leader", async || match cluster.leader([1, 2]).await {
            Some(leader) if leader != 0 => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        cluster.put(1, "more", "work").await;
        assert_eq!(cluster.get(2, KEY).await.as_deref(), Some("right"));
        cluster.wait_http(1, "/readyz", 200, &[]).await;

        cluster.kill(0);
        cluster.start_pod(0);
        wait_fenced_again(&cluster, 0).await;
        wait_fenced(&cluster, 0).await;
        cluster.kill(0);
        cluster.wipe(0);
        cluster.start_pod(0);
        cluster.wait_formed().await;
        assert_ne!(cluster.member_id(0).await, old);
        cluster.wait_same_hash(0..3).await;
        assert_eq!(cluster.get(0, KEY).await.as_deref(), Some("right"));
        wait_for("the former member's alarm to go", async || {
            let alarms = corrupt_alarms(&cluster, 1).await;
            if alarms.is_empty() { Ok(()) } else { Err(format!("{alarms:x?}")) }
        })
        .await;
        cluster.wait_http(0, "/readyz", 200, &[]).await;
    }
}

/// Of two members none can be said to be right: it is reported, and both go on.
#[tokio::test(flavor = "multi_thread")]
async fn two_members_that_differ_are_reported_and_not_fenced() {
    let cluster = cluster_with_a_fault(2, 1).await;
    cluster.put(0, KEY, "right").await;
    let leader = cluster.leader(0..2).await.unwrap();
    cluster.wait_logged(leader, &["ERROR", "data-differs", "none of it has a majority"]).await;
    assert!(corrupt_alarms(&cluster, 0).await.is_empty());
    for slot in 0..2 {
        cluster.put(slot, "more", "work").await;
    }
    wait_for("the metric", async || {
        let (_, text) = http_get(&cluster.endpoint(leader), "/metrics").await.unwrap();
        let line =
            text.lines().find(|line| line.starts_with("quorate_self_checks_differing_total")).unwrap().to_owned();
        if line.ends_with(" 0") { Err(line) } else { Ok(()) }
    })
    .await;
}

/// Members that are killed, catch up from the log or from a snapshot, and restart from their disk, are never taken for divergent.
#[tokio::test(flavor = "multi_thread")]
async fn restarts_and_snapshots_keep_the_digest() {
    let mut cluster = Cluster::new(3);
    cluster.set("raft.self_check_interval", "100ms").set("log.entries_max", "300").set("log.entries_kept", "10");
    cluster.start_all().await;
    for round in 0..2 {
        let victim = round % 3;
        let other = (victim + 1) % 3;
        cluster.kill(victim);
        let mut kv = cluster.kv(other);
        for i in 0..350 {
            let key = format!("k{}", i % 50);
            let put = PutRequest { key: key.into(), value: format!("{round} {i}").into(), ..Default::default() };
            let _ = kv.put(put).await;
        }
        println!("round {round}: written");
        if round == 1 {
            cluster.wipe(victim);
        }
        cluster.start_pod(victim);
        cluster.wait_formed().await;
        cluster.wait_same_hash(0..3).await;
    }
    let before = checks(&cluster).await;
    wait_for("more comparisons", async || {
        let now = checks(&cluster).await;
        if now.0 >= before.0 + 5 { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    assert_eq!(checks(&cluster).await.1, 0, "nobody differs");
    assert!(corrupt_alarms(&cluster, 0).await.is_empty());
}

/// Comparisons, and those that found a difference, of all pods.
async fn checks(cluster: &Cluster) -> (u64, u64) {
    let mut sum = (0, 0);
    for slot in 0..3 {
        let (_, text) = http_get(&cluster.endpoint(slot), "/metrics").await.unwrap();
        let value = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        sum.0 += value("quorate_self_checks_total ");
        sum.1 += value("quorate_self_checks_differing_total ");
    }
    sum
}

/// Puts alarm CORRUPT on for a member, or with 0 for all; or takes it off.
async fn set_alarm(cluster: &Cluster, slot: u64, action: AlarmAction, member_id: u64) {
    let request = AlarmRequest { action: action.into(), member_id, alarm: AlarmType::Corrupt.into() };
    wait_for(&format!("kv-{slot} to take the alarm"), async || {
        cluster.maintenance(slot).alarm(request).await.map(drop).map_err(|status| status.message().to_owned())
    })
    .await;
}

/// The alarm on the member's own disk suffices: it refuses everything before it has met another member, and it leaves the lead to
/// who needs ten times as long to ask for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_member_that_restarts_alone_serves_nothing_and_does_not_lead() {
    let mut cluster = Cluster::new(3);
    // Whoever leads is not asked to hand over before this test has seen it.
    cluster.set("raft.self_check_interval", "30s");
    let fenced = (cluster.start_all().await + 1) % 3;
    let other = (fenced + 1) % 3;
    cluster.put(other, KEY, "right").await;
    let id = cluster.member_id(fenced).await;
    set_alarm(&cluster, other, AlarmAction::Activate, id).await;
    wait_fenced(&cluster, fenced).await;
    // That an entry is committed is on disk with a later frame, or with the state: a member that is killed before, and then meets
    // nobody, cannot know it.
    for value in ["1", "2"] {
        cluster.put(other, "later", value).await;
        let index = cluster.status(other).await.unwrap().raft_applied_index;
        wait_for("the fenced member to apply it", async || {
            let applied = cluster.status(fenced).await.map_err(|status| status.to_string())?.raft_applied_index;
            if applied >= index { Ok(()) } else { Err(format!("{applied} of {index}")) }
        })
        .await;
    }
    cluster.kill_all();

    cluster.start_pod(fenced);
    wait_fenced_again(&cluster, fenced).await;
    refuse_all(&cluster, fenced).await;
    cluster.set("raft.election_timeout_min", "4s").set("raft.election_timeout_max", "5s");
    cluster.start_pod(other);
    wait_for("the member that is not fenced to lead", async || match cluster.leader([fenced, other]).await {
        Some(leader) if leader == other => Ok(()),
        Some(leader) => panic!("kv-{leader} leads, which is fenced"),
        None => Err("nobody leads"),
    })
    .await;
    assert_eq!(cluster.get(other, KEY).await.as_deref(), Some("right"));
    wait_fenced(&cluster, fenced).await;
    refuse_all(&cluster, fenced).await;
}

/// Where all are doubted another leader would be no better; with the alarm for itself the leader hands over.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_hands_over_for_its_own_alarm_and_not_for_one_of_all() {
    let mut cluster = Cluster::new(3);
    cluster.set("raft.self_check_interval", "100ms");
    let leader = cluster.start_all().await;
    cluster.put(leader, KEY, "right").await;
    let before = cluster.status(leader).await.unwrap();
    set_alarm(&cluster, leader, AlarmAction::Activate, 0).await;
    cluster.wait_unready(leader, &["alarm CORRUPT"]).await;
    // The leader looks at its alarms before each comparison.
    let looked = checks(&cluster).await.0;
    wait_for("the leader to look at its alarms", async || {
        let more = checks(&cluster).await.0 - looked;
        if more >= 5 { Ok(()) } else { Err(more) }
    })
    .await;
    let after = cluster.status(leader).await.unwrap();
    assert_eq!((after.leader, after.raft_term), (before.leader, before.raft_term), "the same leader all the time");

    set_alarm(&cluster, leader, AlarmAction::Deactivate, 0).await;
    cluster.wait_http(leader, "/readyz", 200, &[]).await;
    set_alarm(&cluster, leader, AlarmAction::Activate, before.leader).await;
    wait_for("another member to lead", async || match cluster.leader(0..3).await {
        Some(now) if now != leader => Ok(()),
        now => Err(format!("{now:?}")),
    })
    .await;
    cluster.wait_logged(leader, &["a fenced leader hands over", "ok=true"]).await;
}

/// Leads, and answers a put and a read through every member, with no alarm on.
async fn wait_unfenced(cluster: &Cluster) {
    for slot in 0..3 {
        cluster.put(slot, KEY, "right").await;
        wait_for(&format!("kv-{slot} to be ready"), async || {
            let (code, text) = http_get(&cluster.endpoint(slot), "/readyz").await.map_err(|e| e.to_string())?;
            if code == 200 { Ok(()) } else { Err(text) }
        })
        .await;
    }
    assert!(corrupt_alarms(cluster, 0).await.is_empty());
}

/// Three calls of any client: a fence is for a minority, whichever way it is asked for; and it can always be taken off.
#[tokio::test(flavor = "multi_thread")]
async fn alarms_for_every_member_leave_a_cluster_that_leads_and_can_be_disarmed() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    cluster.wait_http(0, "/cluster", 200, &[&format!("\"cluster_version\":{APPLY_VERSION}")]).await;
    let mut ids = Vec::new();
    for slot in 0..3 {
        ids.push(cluster.member_id(slot).await);
    }
    let leader = cluster.leader(0..3).await.unwrap();
    set_alarm(&cluster, 0, AlarmAction::Activate, ids[leader as usize]).await;
    for id in ids.iter().filter(|id| **id != ids[leader as usize]) {
        let request =
            AlarmRequest { action: AlarmAction::Activate.into(), member_id: *id, alarm: AlarmType::Corrupt.into() };
        wait_for("the second alarm to be refused", async || {
            match cluster.maintenance((leader + 1) % 3).alarm(request).await {
                Err(status) if status.code() == Code::FailedPrecondition => {
                    assert!(status.message().contains("a majority of the voters must stay without it"), "{status}");
                    Ok(())
                }
                Err(status) => Err(status.message().to_owned()),
                Ok(answer) => panic!("a majority is fenced: {answer:?}"),
            }
        })
        .await;
        let body = format!("{{\"action\":\"ACTIVATE\",\"memberID\":\"{id}\",\"alarm\":\"CORRUPT\"}}");
        let (_, text) = http_post(&cluster.endpoint(0), "/v3/maintenance/alarm", &body).await.unwrap();
        assert!(text.contains("a majority of the voters must stay without it"), "{text}");
    }
    let request = AlarmRequest { action: AlarmAction::Activate.into(), member_id: 1, alarm: AlarmType::Corrupt.into() };
    let refused = cluster.maintenance(0).alarm(request).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::NotFound, "etcdserver: member not found"));
    cluster.kill_all();
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    assert_eq!(corrupt_alarms(&cluster, leader).await, [ids[leader as usize]]);
    // Through the fenced member itself.
    set_alarm(&cluster, leader, AlarmAction::Deactivate, ids[leader as usize]).await;
    wait_unfenced(&cluster).await;
}

/// What 0.1 has let happen: all are fenced, nobody leads, and this build is started on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_members_are_all_fenced_finds_a_leader_and_can_be_disarmed() {
    let mut cluster = Cluster::new(3);
    for slot in 0..3 {
        cluster.start_pod_with(slot, &[("QUORATE_TEST_APPLY_VERSION", "2")]);
    }
    cluster.wait_formed().await;
    cluster.wait_http(0, "/cluster", 200, &["\"cluster_version\":2"]).await;
    let mut ids = Vec::new();
    for slot in 0..3 {
        ids.push(cluster.member_id(slot).await);
    }
    for id in &ids {
        set_alarm(&cluster, 0, AlarmAction::Activate, *id).await;
    }
    for _ in 0..2 {
        cluster.kill_all();
        for slot in 0..3 {
            cluster.start_pod(slot);
        }
        cluster.wait_formed().await;
        let told = cluster.wait_unready(0, &["alarm CORRUPT"]).await;
        assert!(told.contains("delete no data directory"), "the advice would lose everything: {told}");
        wait_for("all alarms to be seen", async || match corrupt_alarms(&cluster, 0).await.len() {
            3 => Ok(()),
            other => Err(other),
        })
        .await;
    }
    for slot in 0..3 {
        let refused = cluster.kv(slot).range(RangeRequest { key: KEY.into(), ..Default::default() }).await;
        assert_eq!(refused.unwrap_err().code(), Code::DataLoss, "kv-{slot}");
        let refused = cluster.maintenance(slot).snapshot(SnapshotRequest {}).await.map(drop);
        assert_eq!(refused.unwrap_err().code(), Code::DataLoss, "no backup of kv-{slot}");
    }
    for id in &ids {
        set_alarm(&cluster, 1, AlarmAction::Deactivate, *id).await;
    }
    wait_unfenced(&cluster).await;
}
