//! Locks and elections on real processes: order, fencing, and what happens when a holder, a waiter or a leader dies.

use std::process::Stdio;
use std::time::Duration;

use futures_util::StreamExt as _;
use quorate::pb::election::election_client::ElectionClient;
use quorate::pb::election::{
    CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest,
};
use quorate::pb::etcd::RangeRequest;
use quorate::pb::lock::lock_client::LockClient;
use quorate::pb::lock::{LockRequest, UnlockRequest};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::lease::{grant, renew, revoke};
use crate::support::cluster::{Cluster, binary, wait_for};

async fn lock(cluster: &Cluster, slot: u64, name: &str, lease: i64) -> Result<String, Status> {
    let request = LockRequest { name: name.to_owned().into(), lease };
    let answer = LockClient::new(cluster.channel(slot)).lock(request).await?.into_inner();
    Ok(String::from_utf8(answer.key.to_vec()).unwrap())
}

/// The same, in the background.
fn locking(cluster: &Cluster, slot: u64, name: &str, lease: i64) -> JoinHandle<Result<String, Status>> {
    let mut client = LockClient::new(cluster.channel(slot));
    let request = LockRequest { name: name.to_owned().into(), lease };
    tokio::spawn(async move { Ok(String::from_utf8(client.lock(request).await?.into_inner().key.to_vec()).unwrap()) })
}

async fn unlock(cluster: &Cluster, slot: u64, key: &str) {
    let request = UnlockRequest { key: key.to_owned().into() };
    LockClient::new(cluster.channel(slot)).unlock(request).await.unwrap();
}

async fn create_revision(cluster: &Cluster, key: &str) -> Option<i64> {
    let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
    cluster.kv(0).range(range).await.unwrap().into_inner().kvs.first().map(|kv| kv.create_revision())
}

/// Waits until so many stand in line.
async fn wait_line(cluster: &Cluster, name: &str, expected: i64) {
    wait_for(&format!("{expected} in the line of {name}"), async || {
        let range = RangeRequest {
            key: format!("{name}/").into(),
            range_end: format!("{name}0").into(),
            count_only: true,
            ..Default::default()
        };
        let count = cluster.kv(0).range(range).await.map_err(|s| s.message().to_owned())?.into_inner().count;
        if count == expected { Ok(()) } else { Err(count.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_handed_on_in_the_order_of_asking() {
    let cluster = Cluster::start(3).await;
    let mut leases = Vec::new();
    for slot in 0..5 {
        leases.push(grant(&cluster, slot % 3, 60).await);
    }
    let held = lock(&cluster, 0, "job", leases[0]).await.unwrap();
    assert_eq!(held, format!("job/{:x}", leases[0]));
    assert_eq!(lock(&cluster, 1, "job", leases[0]).await.unwrap(), held, "again with the same lease: at once");
    lock(&cluster, 2, "jo", leases[4]).await.expect("another name is another lock");
    let mut waiting = Vec::new();
    for (n, lease) in leases.iter().enumerate().skip(1) {
        waiting.push(locking(&cluster, n as u64 % 3, "job", *lease));
        wait_line(&cluster, "job", n as i64 + 1).await;
    }
    let mut fence = create_revision(&cluster, &held).await.unwrap();
    let mut key = held;
    for (n, next) in waiting.iter_mut().enumerate() {
        assert!(!next.is_finished(), "nobody has it while {key} is there");
        unlock(&cluster, n as u64 % 3, &key).await;
        key = next.await.unwrap().unwrap();
        assert_eq!(key, format!("job/{:x}", leases[n + 1]));
        let next_fence = create_revision(&cluster, &key).await.unwrap();
        assert!(next_fence > fence, "a later holder has a greater fencing token");
        fence = next_fence;
    }
    unlock(&cluster, 0, &key).await;
    unlock(&cluster, 0, &key).await;
    wait_line(&cluster, "job", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_passes_on_when_its_holder_dies_and_a_dead_waiter_is_passed_over() {
    let cluster = Cluster::start(3).await;
    let status = lock(&cluster, 0, "job", 12345).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "etcdserver: requested lease not found"));
    let (dying, waiter, last) =
        (grant(&cluster, 0, 3).await, grant(&cluster, 1, 60).await, grant(&cluster, 2, 60).await);
    let gone = grant(&cluster, 2, 60).await;
    lock(&cluster, 0, "job", dying).await.unwrap();
    let revoked = locking(&cluster, 2, "job", waiter);
    wait_line(&cluster, "job", 2).await;
    let leaves = locking(&cluster, 1, "job", gone);
    wait_line(&cluster, "job", 3).await;
    let next = locking(&cluster, 1, "job", last);
    wait_line(&cluster, "job", 4).await;
    // One waiter's lease ends, another's caller goes away.
    revoke(&cluster, 0, waiter).await.unwrap();
    let status = revoked.await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "mutex: session is expired"));
    leaves.abort();
    wait_line(&cluster, "job", 2).await;
    // The holder is not kept alive.
    assert_eq!(next.await.unwrap().unwrap(), format!("job/{last:x}"));
    assert_eq!(create_revision(&cluster, &format!("job/{dying:x}")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_without_a_lease_gets_one_of_its_own() {
    let cluster = Cluster::start(3).await;
    let first = lock(&cluster, 0, "job", 0).await.unwrap();
    let lease = i64::from_str_radix(first.strip_prefix("job/").unwrap(), 16).unwrap();
    assert_eq!(renew(&cluster, 1, lease).await.unwrap(), 60);
    let gives_up = locking(&cluster, 1, "job", 0);
    wait_line(&cluster, "job", 2).await;
    gives_up.abort();
    wait_line(&cluster, "job", 1).await;
    unlock(&cluster, 2, &first).await;
    assert_ne!(lock(&cluster, 2, "job", 0).await.unwrap(), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_outlives_the_death_of_the_leader() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (holder, waiter) = (grant(&cluster, one, 60).await, grant(&cluster, other, 60).await);
    let key = lock(&cluster, one, "job", holder).await.unwrap();
    let waiting = locking(&cluster, other, "job", waiter);
    wait_for("the waiter to stand in line", async || {
        create_revision(&cluster, &format!("job/{waiter:x}")).await.ok_or("it does not")
    })
    .await;
    cluster.kill(leader);
    wait_for("a new leader", async || cluster.leader([one, other]).await.filter(|slot| *slot != leader).ok_or("none"))
        .await;
    if waiting.is_finished() {
        panic!("it waits, though its answer may have been lost with the leader: {:?}", waiting.await.unwrap());
    }
    unlock(&cluster, one, &key).await;
    assert_eq!(waiting.await.unwrap().unwrap(), format!("job/{waiter:x}"));
}

fn election(cluster: &Cluster, slot: u64) -> ElectionClient<Channel> {
    ElectionClient::new(cluster.channel(slot))
}

async fn campaign(cluster: &Cluster, slot: u64, lease: i64, value: &str) -> LeaderKey {
    let request = CampaignRequest { name: "e".into(), lease, value: value.to_owned().into() };
    election(cluster, slot).campaign(request).await.unwrap().into_inner().leader.unwrap()
}

fn value(answer: &LeaderResponse) -> String {
    String::from_utf8(answer.kv.as_ref().unwrap().value().to_vec()).unwrap()
}

async fn leader(cluster: &Cluster, slot: u64) -> Result<LeaderResponse, Status> {
    Ok(election(cluster, slot).leader(LeaderRequest { name: "e".into() }).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_has_one_leader_and_its_observers_see_all_it_says() {
    let cluster = Cluster::start(3).await;
    cluster.put(0, "e0", "outside").await;
    let status = leader(&cluster, 1).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "election: no leader"));
    let mut seen = election(&cluster, 2).observe(LeaderRequest { name: "e".into() }).await.unwrap().into_inner();
    let (lease, second) = (grant(&cluster, 0, 60).await, grant(&cluster, 0, 60).await);
    let won = campaign(&cluster, 0, lease, "one").await;
    assert_eq!((&won.name[..], won.lease), (&b"e"[..], lease));
    assert_eq!(won.key, format!("e/{lease:x}"));
    assert_eq!(create_revision(&cluster, &format!("e/{lease:x}")).await, Some(won.rev));
    for slot in 0..3 {
        assert_eq!(value(&leader(&cluster, slot).await.unwrap()), "one");
    }
    let mut waiting = election(&cluster, 1);
    let request = CampaignRequest { name: "e".into(), lease: second, value: "two".into() };
    let waiting = tokio::spawn(async move { waiting.campaign(request).await.unwrap().into_inner().leader.unwrap() });
    wait_line(&cluster, "e", 2).await;
    for text in ["one, again", "one, at last"] {
        let proclaim = ProclaimRequest { leader: Some(won.clone()), value: text.into() };
        election(&cluster, 2).proclaim(proclaim).await.unwrap();
    }
    let again = campaign(&cluster, 1, lease, "one, once more").await;
    assert_eq!(again, won, "who leads already, does; and says something new");
    assert!(!waiting.is_finished());
    election(&cluster, 0).resign(ResignRequest { leader: Some(won.clone()) }).await.unwrap();
    let next = waiting.await.unwrap();
    assert!(next.rev > won.rev || next.key != won.key);
    let mut told = Vec::new();
    for _ in 0..5 {
        let next = tokio::time::timeout(Duration::from_secs(60), seen.next()).await.expect("the observer is told");
        told.push(value(&next.unwrap().unwrap()));
    }
    assert_eq!(told, ["one", "one, again", "one, at last", "one, once more", "two"]);

    let proclaim = ProclaimRequest { leader: Some(won.clone()), value: "late".into() };
    let status = election(&cluster, 1).proclaim(proclaim).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unknown, "election: not leader"));
    election(&cluster, 1).resign(ResignRequest { leader: Some(won) }).await.expect("nothing to give back is no error");
    let status = election(&cluster, 1).resign(ResignRequest { leader: None }).await.unwrap_err();
    assert_eq!(status.message(), "\"leader\" field must be provided");
    assert_eq!(value(&leader(&cluster, 0).await.unwrap()), "two");
    revoke(&cluster, 0, second).await.unwrap();
    assert_eq!(leader(&cluster, 2).await.unwrap_err().message(), "election: no leader");
}

// The command line.

/// A client command that goes on in the background.
struct Running {
    child: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(cluster: &Cluster, args: &[&str]) -> Self {
        let (own, command) = args.split_at(args.iter().position(|arg| *arg == "--").unwrap_or(args.len()));
        let mut child = Command::new(binary())
            .args(own)
            .args(["--endpoints", &cluster.endpoints()])
            .args(command)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn line(&mut self) -> String {
        let line = tokio::time::timeout(Duration::from_secs(60), self.lines.next_line()).await.expect("it prints");
        line.unwrap().expect("another line")
    }

    async fn ends_with(mut self, code: i32) {
        let ended = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await.expect("it ends").unwrap();
        assert_eq!(ended.code(), Some(code));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().unwrap() as i32).unwrap(), signal).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_commands_do_what_they_say() {
    let cluster = Cluster::start(3).await;
    let id = cluster.client(&["lease", "grant", "60s"]).await;
    let id = id.trim();
    assert!(i64::from_str_radix(id, 16).is_ok_and(|id| id > 0), "{id}");
    assert_eq!(cluster.client(&["lease", "grant", "90s", "--id", "1f"]).await, "000000000000001f\n");
    let raised = cluster.client(&["lease", "grant", "1"]).await;
    assert!(raised.contains("not 1s: the server grants no less"), "{raised}");
    cluster.client(&["lease", "revoke", raised.lines().next().unwrap()]).await;
    assert_eq!(cluster.client(&["put", "k", "v", "--lease", "1f"]).await, "OK\n");
    let shown = cluster.client(&["lease", "ttl", "1f", "--keys"]).await;
    assert!(shown.contains("90s") && shown.ends_with("\nk\n"), "{shown}");
    let listed = cluster.client(&["lease", "list"]).await;
    assert!(listed.lines().count() == 2 && listed.lines().any(|line| line == id), "{listed}");
    assert_eq!(cluster.client(&["lease", "keep-alive", "1f", "--once"]).await, "000000000000001f lives 90s\n");
    let mut kept = Running::start(&cluster, &["lease", "keep-alive", "1f"]);
    assert_eq!(kept.line().await, "000000000000001f lives 90s");
    kept.signal(Signal::INT);
    kept.ends_with(0).await;
    assert_eq!(cluster.client(&["lease", "revoke", "1f"]).await, "000000000000001f revoked\n");
    assert_eq!(cluster.get(0, "k").await, None);
    for args in [["lease", "ttl", "1f"], ["lease", "keep-alive", "1f"]] {
        let text = cluster.client(&args).await;
        assert!(text.contains("there is no lease 000000000000001f"), "{args:?}: {text}");
    }
    let text = cluster.client(&["lease", "revoke", "1f"]).await;
    assert!(text.contains("requested lease not found"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lock_runs_a_command_and_passes_its_exit_code_on() {
    let cluster = Cluster::start(3).await;
    let script = "echo $QUORATE_LOCK_KEY $QUORATE_LOCK_REVISION; exit 7";
    let mut first = Running::start(&cluster, &["lock", "job", "--", "sh", "-c", script]);
    let line = first.line().await;
    let (key, revision) = line.split_once(' ').unwrap();
    assert!(key.starts_with("job/") && revision.parse::<i64>().is_ok_and(|revision| revision > 1), "{line}");
    first.ends_with(7).await;
    wait_line(&cluster, "job", 0).await;

    // Held until a signal; the next in line takes over, and its command is told of the signal.
    let mut holder = Running::start(&cluster, &["lock", "job"]);
    assert!(holder.line().await.starts_with("job/"));
    let script = "trap 'echo ends; exit 3' TERM; echo runs; while :; do sleep 0.05; done";
    let mut next = Running::start(&cluster, &["lock", "job", "--", "sh", "-c", script]);
    wait_line(&cluster, "job", 2).await;
    holder.signal(Signal::INT);
    holder.ends_with(0).await;
    assert_eq!(next.line().await, "runs");
    next.signal(Signal::TERM);
    assert_eq!(next.line().await, "ends");
    next.ends_with(3).await;
    wait_line(&cluster, "job", 0).await;

    // Killed without a word: free when the lease ends.
    let mut killed = Running::start(&cluster, &["lock", "job", "--ttl", "2s"]);
    killed.line().await;
    killed.signal(Signal::KILL);
    let mut next = Running::start(&cluster, &["lock", "job", "--", "echo", "mine"]);
    assert_eq!(next.line().await, "mine");
    next.ends_with(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn elect_leads_until_a_signal_and_listen_tells_of_it() {
    let cluster = Cluster::start(3).await;
    let mut listener = Running::start(&cluster, &["elect", "--listen", "e"]);
    let mut one = Running::start(&cluster, &["elect", "e", "one"]);
    let key = one.line().await;
    assert!(key.starts_with("e/"), "{key}");
    assert_eq!(one.line().await, "one");
    assert_eq!((listener.line().await, listener.line().await), (key, "one".into()));
    let mut two = Running::start(&cluster, &["elect", "e", "two"]);
    wait_line(&cluster, "e", 2).await;
    one.signal(Signal::TERM);
    one.ends_with(0).await;
    let key = two.line().await;
    assert_eq!(two.line().await, "two");
    assert_eq!((listener.line().await, listener.line().await), (key, "two".into()));
    listener.signal(Signal::INT);
    listener.ends_with(0).await;
    two.signal(Signal::INT);
    two.ends_with(0).await;
    wait_line(&cluster, "e", 0).await;
}
