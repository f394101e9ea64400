//! Scaling, leaving, readers and changes by hand, with real processes and no Kubernetes: the wanted size comes from `member scale`.

use quorate::kv::APPLY_VERSION;
use quorate::pb::etcd::RangeRequest;
use rustix::process::Signal;

use crate::support::cluster::{Cluster, wait_for};

/// A cluster whose members promote and replace soon.
async fn start(size: u64) -> Cluster {
    let mut cluster = Cluster::new(size);
    cluster.set("cluster.failure_timeout", "2s").set("cluster.promote_after", "100ms");
    cluster.start_all().await;
    cluster
}

/// Says how many there should be, as soon as the cluster's version allows it.
async fn scale(cluster: &Cluster, replicas: u64) {
    wait_for(&format!("member scale {replicas}"), async || {
        let text = cluster.client(&["member", "scale", &replicas.to_string()]).await;
        if text.starts_with("wanted:") { Ok(()) } else { Err(text) }
    })
    .await;
}

/// Waits until `member why` says all of `parts`.
async fn wait_why(cluster: &Cluster, parts: &[&str]) -> String {
    wait_for(&format!("member why to say {parts:?}"), async || {
        let text = cluster.client(&["member", "why"]).await;
        if parts.iter().all(|part| text.contains(part)) { Ok(text) } else { Err(text) }
    })
    .await
}

/// Waits until exactly these slots are members, all voters, as the pod of the first sees it.
async fn wait_only(cluster: &Cluster, slots: &[u64]) {
    wait_for(&format!("{slots:?} to be all members"), async || {
        let members = cluster.membership(slots[0]).await;
        let mut found: Vec<u64> = members.iter().map(|m| m.0 & 0xffff).collect();
        found.sort_unstable();
        if found == slots && members.iter().all(|m| m.1) { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
}

/// Cases 12, 18 and 21, outside of Kubernetes: three, one, three members without a restart: who is removed archives itself, waits
/// outside of the wanted slots, and joins as a new member when it is wanted again. No write is lost.
#[tokio::test(flavor = "multi_thread")]
async fn size_set_by_hand_removes_members_and_takes_them_back() {
    let cluster = start(3).await;
    let mut ids = cluster.membership(0).await;
    for round in 0..2 {
        cluster.put(0, "k", &format!("{round} down")).await;
        scale(&cluster, 1).await;
        wait_only(&cluster, &[0]).await;
        cluster.wait_unready(1, &["outside of the wanted slots"]).await;
        cluster.put(0, "k", &round.to_string()).await;
        scale(&cluster, 3).await;
        cluster.wait_voters(0..3).await;
        wait_only(&cluster, &[0, 1, 2]).await;
        assert_eq!(cluster.get(2, "k").await, Some(round.to_string()));
        let now = cluster.membership(0).await;
        let same: Vec<_> = now.iter().filter(|member| ids.contains(member)).collect();
        assert_eq!(same.len(), 1, "only kv-0 is who it was: {same:x?}");
        ids = now;
    }
}

/// Case 13: five pods become one in one step, all SIGTERMs at once: the four vote until they are removed, then end well.
#[tokio::test(flavor = "multi_thread")]
async fn condemned_pods_vote_until_they_are_removed() {
    let mut cluster = start(5).await;
    cluster.put(3, "k", "v").await;
    scale(&cluster, 1).await;
    for slot in 1..5 {
        cluster.signal(slot, Signal::TERM);
    }
    for slot in 1..5 {
        let status = cluster.wait_exit(slot).await;
        assert!(status.success(), "kv-{slot} ended with {status}");
    }
    wait_only(&cluster, &[0]).await;
    cluster.put(0, "k2", "v").await;
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
}

/// Case 15: the leader is the victim: it hands over to a member that stays, and is removed then.
#[tokio::test(flavor = "multi_thread")]
async fn condemned_leader_hands_over_first() {
    let mut cluster = start(3).await;
    let last = cluster.member_id(2).await;
    wait_for("kv-2 to lead", async || {
        let leader = cluster.wait_formed().await;
        if leader == 2 {
            return Ok(());
        }
        let request = quorate::pb::etcd::MoveLeaderRequest { target_id: last };
        let _ = cluster.maintenance(leader).move_leader(request).await;
        Err(format!("kv-{leader} leads"))
    })
    .await;
    scale(&cluster, 1).await;
    wait_only(&cluster, &[0]).await;
    cluster.wait_logged(2, &["membership change", "handing over leadership"]).await;
    cluster.terminate(2).await;
    cluster.put(0, "k", "v").await;
}

/// Cases 16 and 19: a pod that is killed while it is not wanted any more is removed; its old disk comes back as a new member.
#[tokio::test(flavor = "multi_thread")]
async fn removed_pod_with_its_old_disk_joins_as_a_new_member() {
    let mut cluster = start(3).await;
    cluster.put(0, "k", "v").await;
    let before = cluster.membership(0).await;
    cluster.kill(2);
    scale(&cluster, 2).await;
    wait_only(&cluster, &[0, 1]).await;
    wait_why(&cluster, &["[even-voters]"]).await;
    scale(&cluster, 3).await;
    cluster.start_pod(2);
    cluster.wait_logged(2, &["was removed", "archived"]).await;
    cluster.wait_voters(0..3).await;
    wait_only(&cluster, &[0, 1, 2]).await;
    let now = cluster.membership(0).await;
    assert!(!before.contains(&(cluster.member_id(2).await, true)), "{before:x?} {now:x?}");
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some("v"));
}

/// Case 17: scaling down while another voter is down waits, says why and what to scale back to, everywhere; and goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn scaling_down_beside_a_dead_voter_waits_and_says_why() {
    let mut cluster = start(3).await;
    cluster.kill(1);
    scale(&cluster, 2).await;
    let parts = ["2 healthy, caught-up voters of the new configuration, 1 are", "scale back to 3"];
    wait_why(&cluster, &["blocked:  [quorum]", parts[0], parts[1]]).await;
    let leader = cluster.leader([0, 2]).await.unwrap();
    for slot in [0, 2] {
        cluster.wait_http(slot, "/cluster", 200, &["\"name\":\"quorum\"", parts[0], "\"replicas\":2"]).await;
    }
    cluster.wait_logged(leader, &["condition begins", "change-blocked", parts[0]]).await;
    wait_for("status to say it", async || {
        let status = cluster.client(&["status"]).await;
        if status.contains("(rule: quorum)") { Ok(()) } else { Err(status) }
    })
    .await;
    assert_eq!(cluster.membership(0).await.len(), 3);
    cluster.start_pod(1);
    wait_only(&cluster, &[0, 1]).await;
}

/// Rule 27: a pod that restarts waits until the others hold a quorum without it, and serves meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn restart_waits_for_the_quorum_of_the_others() {
    let mut cluster = start(3).await;
    cluster.kill(1);
    cluster.signal(2, Signal::TERM);
    cluster.wait_logged(2, &["stopping", "Restart"]).await;
    for i in 0..10 {
        cluster.put(0, &format!("k{i}"), "v").await;
    }
    assert!(cluster.is_running(2), "kv-2 is needed: kv-1 is down");
    cluster.start_pod(1);
    assert!(cluster.wait_exit(2).await.success());
    cluster.start_pod(2);
    cluster.wait_formed().await;
}

/// Case 32: all pods are stopped at once and come back: the same members with all data.
#[tokio::test(flavor = "multi_thread")]
async fn all_pods_stopped_at_once_come_back_as_they_were() {
    let mut cluster = Cluster::new(3);
    cluster.set("server.quorum_wait", "2s");
    cluster.start_all().await;
    cluster.put(1, "k", "v").await;
    let before = cluster.membership(0).await;
    for slot in 0..3 {
        cluster.signal(slot, Signal::TERM);
    }
    for slot in 0..3 {
        assert!(cluster.wait_exit(slot).await.success());
    }
    cluster.start_all().await;
    assert_eq!((cluster.membership(2).await, cluster.get(2, "k").await.as_deref()), (before, Some("v")));
}

/// Case 31: a member that comes back at another address is followed there by the leader.
#[tokio::test(flavor = "multi_thread")]
async fn moved_member_is_found_at_its_new_address() {
    let mut cluster = start(3).await;
    let before = cluster.membership(0).await;
    cluster.kill(2);
    cluster.start_moved(2, 22);
    let address = cluster.peer_address(22);
    wait_for("the new address in the membership", async || {
        let members = cluster.members(0).await.map_err(|e| e.message().to_owned())?;
        let urls: Vec<String> = members.iter().flat_map(|m| m.peer_ur_ls.clone()).collect();
        if urls.contains(&format!("http://{address}")) { Ok(()) } else { Err(format!("{urls:?}")) }
    })
    .await;
    wait_for("the member itself to know of it", async || {
        let after = cluster.membership(22).await;
        if after == before { Ok(()) } else { Err(format!("{after:?}")) }
    })
    .await;
    cluster.put(22, "k", "v").await;
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
}

fn slotless(members: &[(u64, bool)]) -> Vec<(u64, bool)> {
    members.iter().copied().filter(|member| member.0 & 0xffff == 0xffff).collect()
}

/// Issue rule: a reader joins without a slot, never votes, serves reads, forwards writes, and is removed when it ends.
#[tokio::test(flavor = "multi_thread")]
async fn reader_serves_and_leaves_no_trace() {
    let mut cluster = Cluster::new(1);
    cluster.set("cluster.readers", "true").set("cluster.reader_ttl", "2s").set("cluster.max_readers", "1");
    cluster.start_all().await;
    cluster.start_slotless(20, "--reader");
    cluster.wait_http(20, "/readyz", 200, &[]).await;
    cluster.put(20, "k", "v").await;
    let mut kv = cluster.kv(20);
    wait_for("a serializable read", async || {
        let request = RangeRequest { key: "k".into(), serializable: true, ..Default::default() };
        match kv.range(request).await {
            Ok(answer) if answer.get_ref().kvs.len() == 1 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(cluster.get(20, "k").await.as_deref(), Some("v"));
    assert_eq!(slotless(&cluster.membership(0).await), [(cluster.member_id(20).await, false)]);
    wait_why(&cluster, &["reader", "extra-20"]).await;
    cluster.start_slotless(21, "--reader");
    cluster.wait_unready(21, &["as a reader, and there are 1 already"]).await;
    cluster.terminate(20).await;
    let second = cluster.member_id(21).await;
    wait_for("the second reader in place of the first", async || {
        let readers = slotless(&cluster.membership(0).await);
        if readers == [(second, false)] { Ok(()) } else { Err(format!("{readers:x?}")) }
    })
    .await;
    cluster.wait_http(21, "/readyz", 200, &[]).await;
    assert_eq!(cluster.get(21, "k").await.as_deref(), Some("v"));
    cluster.kill(21);
    wait_for("no reader", async || {
        let readers = slotless(&cluster.membership(0).await);
        if readers.is_empty() { Ok(()) } else { Err(format!("{readers:x?}")) }
    })
    .await;
    // The killed one's disk is that of a removed member: it comes back as a new one.
    cluster.start_slotless(21, "--reader");
    cluster.wait_logged(21, &["was removed", "archived"]).await;
    cluster.wait_http(21, "/readyz", 200, &[]).await;
    assert_eq!(cluster.get(21, "k").await.as_deref(), Some("v"));
    assert_ne!(cluster.member_id(21).await, second);
}

/// Rule 24: a node is added by hand only where it answers, becomes a voter when it has caught up, and, removed by hand, ends its process and
/// comes back with it.
#[tokio::test(flavor = "multi_thread")]
async fn member_is_added_and_removed_by_hand() {
    let mut cluster = start(1).await;
    cluster.put(0, "k", "v").await;
    let peer = cluster.peer_address(20);
    let refused = cluster.client(&["member", "add", &peer]).await;
    assert!(refused.contains("does not answer") && refused.contains("Unavailable"), "{refused}");
    cluster.start_slotless(20, "--by-hand");
    cluster.wait_unready(20, &["added by hand"]).await;
    let added = cluster.client(&["member", "add", &peer]).await;
    assert!(added.contains("as a learner"), "{added}");
    let id = cluster.member_id(20).await;
    wait_for("the added member to vote", async || {
        let members = cluster.membership(0).await;
        if members.contains(&(id, true)) { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
    assert_eq!(cluster.get(20, "k").await.as_deref(), Some("v"));
    let again = cluster.client(&["member", "add", &peer]).await;
    assert!(again.contains("etcdserver: Peer URLs already exists"), "{again}");
    let promoted = cluster.client(&["member", "promote", &format!("{id:x}")]).await;
    assert!(promoted.contains("etcdserver: can only promote a learner member"), "{promoted}");
    let unknown = cluster.client(&["member", "remove", "abc"]).await;
    assert!(unknown.contains("etcdserver: member not found"), "{unknown}");
    let removed = cluster.client(&["member", "remove", &format!("{id:x}")]).await;
    assert!(removed.contains("removed"), "{removed}");
    assert!(cluster.wait_exit(20).await.success(), "its process ends, as etcd's does");
    assert_eq!(cluster.membership(0).await.len(), 1);
    cluster.start_slotless(20, "--by-hand");
    cluster.wait_unready(20, &["added by hand"]).await;
    assert_ne!(cluster.member_id(20).await, id);
}

/// The leader itself is removed by hand: another one takes over and removes it.
#[tokio::test(flavor = "multi_thread")]
async fn leader_is_removed_by_hand() {
    let cluster = start(3).await;
    let leader = cluster.wait_formed().await;
    let id = cluster.member_id(leader).await;
    let removed = cluster.client(&["member", "remove", &format!("{id:x}")]).await;
    assert!(removed.contains("removed"), "{removed}");
    let rest: Vec<u64> = (0..3).filter(|slot| *slot != leader).collect();
    wait_only(&cluster, &rest).await;
    cluster.wait_unready(leader, &["was removed", "by hand"]).await;
    cluster.put(rest[0], "k", "v").await;
}

/// Case 8, the way out: one survivor of three says what is certain and who must be gone, forms a new cluster with all its
/// revisions, and the others join it with empty disks. A member of the old cluster is refused, and refuses.
#[tokio::test(flavor = "multi_thread")]
async fn survivor_forms_a_new_cluster_and_old_members_stay_out() {
    let mut cluster = start(3).await;
    let mut revision = 0;
    for i in 0..20 {
        revision = cluster.put(i % 3, &format!("k{i}"), "v").await;
    }
    cluster.wait_same_hash(0..3).await;
    let (old, before) = (cluster.cluster_id(0).await, cluster.member_id(0).await);
    cluster.kill_all();
    let dir = cluster.data_dir(0).to_string_lossy().into_owned();
    let recover = async |cluster: &Cluster, extra: &[&str]| {
        let args = [&["recover", "--data-dir", &dir][..], extra].concat();
        cluster.command(&args).await
    };
    let text = recover(&cluster, &["--dry-run"]).await;
    assert!(
        text.contains(&format!(
            "lost:     what the others have acknowledged without this member, all of it behind revision {revision}"
        )),
        "{text}"
    );
    assert!(text.contains("certain:  revisions 1 to") && text.contains("nothing was changed"), "{text}");
    for other in [1, 2] {
        assert!(text.contains(&cluster.peer_address(other)), "who must be gone: {text}");
    }
    assert!(!text.contains(&format!("({before:016x}, ")), "the survivor itself stays: {text}");
    assert_eq!(recover(&cluster, &["--dry-run"]).await, text, "a dry run changes nothing");
    let text = recover(&cluster, &[]).await;
    assert!(text.contains("its only voter"), "{text}");
    cluster.start_pod(0);
    cluster.wait_http(0, "/readyz", 200, &[]).await;
    assert_eq!(cluster.get(0, "k19").await.as_deref(), Some("v"));
    let new = cluster.cluster_id(0).await;
    assert_ne!(new, old);
    assert_eq!(cluster.membership(0).await, [(cluster.member_id(0).await, true)]);
    assert_eq!(cluster.put(0, "k", "new").await, revision + 1, "revisions go on");
    cluster.start_pod(1);
    cluster.wait_unready(1, &[&format!("{old:016x}"), &format!("{new:016x}")]).await;
    assert_eq!(cluster.membership(0).await.len(), 1, "the old member is none of the new cluster");
    cluster.kill(1);
    for slot in [1, 2] {
        cluster.wipe(slot);
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    assert_eq!(cluster.get(2, "k7").await.as_deref(), Some("v"));
    cluster.wait_same_hash(0..3).await;
    // And once more: the log of a founder is one like any other.
    cluster.kill(0);
    cluster.start_pod(0);
    cluster.wait_formed().await;
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("new"));
}

const OLDER: (&str, &str) = ("QUORATE_TEST_APPLY_VERSION", "1");

/// Rule 29: an older build and this one run together and take turns, until all run this one: then the version rises, and the older
/// one stops with a clear error, and harms nothing.
#[tokio::test(flavor = "multi_thread")]
async fn older_build_rolls_to_this_one_and_back_until_the_version_rises() {
    let mut cluster = Cluster::new(3);
    for slot in 0..3 {
        cluster.start_pod_with(slot, &[OLDER]);
    }
    cluster.wait_formed().await;
    let lives = [(2, &[][..]), (1, &[]), (1, &[OLDER]), (2, &[OLDER]), (0, &[]), (1, &[])];
    for (life, (slot, env)) in lives.into_iter().enumerate() {
        cluster.terminate(slot).await;
        cluster.start_pod_with(slot, env);
        cluster.wait_formed().await;
        cluster.put(slot, "k", &life.to_string()).await;
        assert_eq!(cluster.get((slot + 1) % 3, "k").await, Some(life.to_string()));
        cluster.wait_http(slot, "/cluster", 200, &["\"cluster_version\":1"]).await;
    }
    let refused = cluster.client(&["member", "scale", "3"]).await;
    assert!(refused.contains("the cluster's version is 1, and this needs 2"), "{refused}");
    cluster.terminate(2).await;
    cluster.start_pod(2);
    cluster.wait_formed().await;
    cluster.wait_http(0, "/cluster", 200, &[&format!("\"cluster_version\":{APPLY_VERSION}")]).await;
    scale(&cluster, 3).await;
    cluster.kill(1);
    cluster.start_pod_with(1, &[OLDER]);
    assert!(!cluster.wait_exit(1).await.success());
    let text = cluster.log_text(1);
    // At the command that raised the version, or, where its state store has that already, at the next that an older build cannot apply.
    assert!(text.contains("; this build knows 1: run a newer one"), "{text}");
    cluster.put(0, "k", "on").await;
    cluster.start_pod(1);
    cluster.wait_formed().await;
    assert_eq!(cluster.get(1, "k").await.as_deref(), Some("on"));
}
