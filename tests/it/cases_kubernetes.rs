//! Membership cases about what Kubernetes does to pods and what its API server says, on the played StatefulSet.

use std::time::{Duration, Instant};

use quorate::pb::etcd::RangeRequest;

use crate::support::cluster::wait_for;
use crate::support::kube_api::Mode;
use crate::support::statefulset::StatefulSet;
use crate::support::tools;

/// Case 31: every pod comes back at another address, and its name resolves late: the members find one another by name again.
#[tokio::test(flavor = "multi_thread")]
async fn pods_find_each_other_at_new_addresses_after_a_dns_gap() {
    let set = StatefulSet::blueprint(3).dns_delay(Duration::from_secs(2)).start().await;
    let before = set.membership(0).await;
    set.put(0, "k", "v").await;
    for ordinal in [0, 1, 2] {
        let ip = set.ip(ordinal);
        set.delete_pod(ordinal);
        wait_for("the pod at a new address", async || match set.ip(ordinal) {
            Some(now) if Some(&now) != ip.as_ref() => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert_eq!(set.membership(1).await, before);
    for ordinal in 0..3 {
        assert_eq!(set.get(ordinal, "k").await.as_deref(), Some("v"));
    }
}

/// Case 32: all pods are deleted at once: the same members come back with all data.
#[tokio::test(flavor = "multi_thread")]
async fn cluster_survives_the_deletion_of_all_pods_at_once() {
    let set = StatefulSet::new(3).await;
    let before = set.membership(0).await;
    set.put(1, "k", "v").await;
    let ips: Vec<_> = (0..3).map(|ordinal| set.ip(ordinal)).collect();
    (0..3).for_each(|ordinal| set.delete_pod(ordinal));
    wait_for("three other pods", async || {
        let now: Vec<_> = (0..3).map(|ordinal| set.ip(ordinal)).collect();
        if now.iter().zip(&ips).all(|(now, was)| now.is_some() && now != was) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
    .await;
    set.wait_ready().await;
    assert_eq!(set.membership(2).await, before);
    assert_eq!(set.get(2, "k").await.as_deref(), Some("v"));
    assert!(set.ended().iter().all(|ended| !ended.was_killed()), "{:?}", set.ended());
}

/// Rule 6: while the API server does not answer, fresh pods form nothing, and say what they wait for; then they form.
#[tokio::test(flavor = "multi_thread")]
async fn fresh_pods_wait_for_an_api_server_that_does_not_answer() {
    let mut set = StatefulSet::blueprint(3).install();
    set.api.down();
    set.wait_pods(0..3).await;
    for ordinal in 0..3 {
        set.wait_unready(ordinal, &["waits to know how many members there should be", "API server", "does not answer"])
            .await;
    }
    set.api.set_mode(Mode::Forbids);
    set.api.up();
    set.wait_unready(0, &["403", "verb get on resource statefulsets", "resourceName kv"]).await;
    set.api.set_mode(Mode::KnowsNothing);
    set.wait_unready(1, &["404", "there is no StatefulSet test/kv"]).await;
    set.api.set_mode(Mode::Hangs);
    // Its own patience ends, or that of the library below.
    set.wait_unready(
        2,
        &["waits to know how many members there should be", "a NetworkPolicy may keep this pod from it"],
    )
    .await;
    set.api.set_mode(Mode::Serves);
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    // It asked for its own StatefulSet by name, and for nothing else.
    assert_eq!(set.api.unexpected(), Vec::<String>::new());
}

/// Case 39: `ordinals.start` is 5: pods 5 to 7 form the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn ordinals_may_start_elsewhere() {
    let set = StatefulSet::blueprint(3).first(5).start().await;
    set.put(5, "k", "v").await;
    assert_eq!(set.get(7, "k").await.as_deref(), Some("v"));
    assert_eq!(set.api.unexpected(), Vec::<String>::new());
}

/// What changes the membership is told in Events of the StatefulSet; where the Role does not allow them nothing else suffers.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_the_membership_are_events_where_they_are_allowed() {
    let set = StatefulSet::quick(1).start().await;
    set.scale(3);
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    let event = wait_for("an Event about a change", async || {
        let events = set.api.events();
        events.iter().find(|event| event["reason"] == "MembershipChange").cloned().ok_or_else(|| format!("{events:?}"))
    })
    .await;
    assert_eq!(event["involvedObject"]["kind"], "StatefulSet");
    assert_eq!((&event["involvedObject"]["name"], &event["involvedObject"]["uid"]), (&"kv".into(), &"uid-1".into()));
    assert_eq!((&event["type"], &event["source"]["component"]), (&"Normal".into(), &"quorate".into()));
    assert!(event["message"].as_str().is_some_and(|text| text.contains("kv-")), "{event}");

    // A condition is one when it begins, with what to do, and one when it ends.
    let dead = (set.leader().await + 1) % 3;
    set.hold(dead);
    let told_of = async |kind: &str, part: String| {
        wait_for(&format!("an Event about kv-{dead}"), async || {
            let events = set.api.events();
            let mut of_it = events.iter().filter(|event| event["reason"] == "MemberDead" && event["type"] == kind);
            of_it
                .find(|event| event["message"].as_str().is_some_and(|text| text.contains(&part)))
                .cloned()
                .ok_or_else(|| format!("{events:?}"))
        })
        .await
    };
    let event = told_of("Warning", format!("kv-{dead} (voter, ")).await;
    assert!(event["message"].as_str().unwrap().contains("docs/runbook.md#member-dead"), "{event}");
    set.release(dead);
    told_of("Normal", "over after".to_owned()).await;
    set.wait_ready().await;
    set.wait_voters(0..3).await;

    set.api.set_mode(Mode::ForbidsEvents);
    let (told, leader) = (set.api.events().len(), set.leader().await);
    set.scale(1);
    set.wait_voters(0..1).await;
    // An Event follows the change that it tells of.
    wait_for("the leader to say it, and once", async || {
        let said = (0..3).map(|ordinal| set.log_text(ordinal).matches("Events cannot be sent").count()).max();
        if said == Some(1) { Ok(()) } else { Err(format!("{said:?}; the leader was kv-{leader} at first")) }
    })
    .await;
    assert_eq!(set.api.events().len(), told);
    assert_eq!(set.api.unexpected(), Vec::<String>::new());
}

/// A pod asks every few seconds and no more: two pods of a quiet cluster are no load.
#[tokio::test(flavor = "multi_thread")]
async fn pods_ask_the_api_server_seldom() {
    let set = StatefulSet::quick(1).set("kubernetes.poll_interval", "1s").start().await;
    let (before, since) = (set.api.gets(), std::time::Instant::now());
    wait_for("a few polls", async || if set.api.gets() >= before + 4 { Ok(()) } else { Err(set.api.gets()) }).await;
    assert!(since.elapsed() >= Duration::from_millis(1500), "four questions in {:?}", since.elapsed());
}

/// A pod whose disk is lost (its node is gone) comes back as a new voter with all data, with nobody's hand. Prints how long that took:
/// with 8 MiB, or `QUORATE_HEAL_MIB`; `QUORATE_DEFAULT_TIMES=1` has the settings that people have.
#[tokio::test(flavor = "multi_thread")]
async fn lost_disk_heals_with_all_its_data() {
    const VALUE_KIB: usize = 256;
    let mib = std::env::var("QUORATE_HEAL_MIB").map_or(8, |text| text.parse::<usize>().expect("a number of MiB"));
    let set = if tools::is_set("QUORATE_DEFAULT_TIMES") { StatefulSet::as_shipped(3) } else { StatefulSet::quick(3) };
    let set = set.start().await;
    let (count, value) = (mib * 1024 / VALUE_KIB, "v".repeat(VALUE_KIB << 10));
    for i in 0..count {
        set.put(0, &format!("k/{i:06}"), &value).await;
    }
    let former = set.ids(1).await.1;
    set.hold(1);
    set.wipe(1);
    set.release(1);
    let since = Instant::now();
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    println!("a lost disk with {mib} MiB is healed after {:.1} s", since.elapsed().as_secs_f64());
    assert_ne!(set.ids(1).await.1, former);
    let all = RangeRequest {
        key: "k/".into(),
        range_end: "k0".into(),
        serializable: true,
        count_only: true,
        ..RangeRequest::default()
    };
    assert_eq!(set.kv(1).range(all).await.unwrap().into_inner().count, count as i64);
    assert_eq!(set.get(1, &format!("k/{:06}", count - 1)).await, Some(value));
}

/// An image without a CA bundle: what the kubelet mounts is all that a pod needs to ask the API server.
#[tokio::test(flavor = "multi_thread")]
async fn pods_form_a_cluster_on_a_base_without_a_ca_bundle() {
    let nowhere = "/nowhere/ca-certificates";
    let set = StatefulSet::quick(3).env("SSL_CERT_FILE", nowhere).env("SSL_CERT_DIR", nowhere).start().await;
    set.put(0, "k", "v").await;
    assert!(set.api.gets() > 0);
}

/// `helm uninstall` takes the Role before the pods end, and then the account: it is no restart, whose pods would wait for one another.
#[tokio::test(flavor = "multi_thread")]
async fn pods_of_an_uninstalled_release_end_within_seconds() {
    for refuses in [Mode::Forbids, Mode::KnowsNobody, Mode::KnowsNothing] {
        let set = StatefulSet::quick(3).start().await;
        set.put(0, "k", "v").await;
        set.api.set_mode(refuses);
        set.uninstall();
        set.wait_pods([]).await;
        let ended = set.ended();
        println!("{refuses:?}: {:?}", ended.iter().map(|one| one.took).collect::<Vec<_>>());
        // A restart waits for half a minute if the others do not come back.
        assert!(ended.iter().all(|one| !one.was_killed() && one.took < Duration::from_secs(15)), "{ended:?}");
        assert!((0..3).any(|ordinal| set.log_text(ordinal).contains("Uninstalled")), "{}", set.log_text(0));
    }
}

/// A pod that starts is not dialled in its first moments, and a new leader plans nothing in its own: that is no news.
#[tokio::test(flavor = "multi_thread")]
async fn joining_makes_no_warning_events() {
    let set = StatefulSet::blueprint(1).dns_delay(Duration::from_secs(1)).start().await;
    set.scale(3);
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    set.move_leader((set.leader().await + 1) % 3).await;
    set.scale(5);
    set.wait_ready().await;
    set.wait_voters(0..5).await;
    let events = set.api.events();
    // What a busy machine brings about is none of ours.
    let slow = ["SlowFsync", "MemberSlow", "Lag"];
    let is_news = |event: &&serde_json::Value| {
        (event["type"] != "Normal" || event["reason"] != "MembershipChange")
            && !slow.contains(&event["reason"].as_str().unwrap_or_default())
    };
    assert_eq!(events.iter().filter(is_news).collect::<Vec<_>>(), Vec::<&serde_json::Value>::new());
    assert!(events.len() >= 4, "{events:?}");
}

/// What lasts is told, once: two disks of three are away, so that nothing can be removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_stays_blocked_is_told_once() {
    let set = StatefulSet::quick(5).start().await;
    set.hold(1);
    set.hold(2);
    set.scale(3);
    let told = wait_for("an Event about what blocks the change", async || {
        let events = set.api.events();
        let mut blocked =
            events.iter().filter(|event| event["type"] == "Warning" && event["reason"] == "ChangeBlocked");
        blocked.next().cloned().ok_or_else(|| format!("{events:?}"))
    })
    .await;
    assert!(told["message"].as_str().is_some_and(|text| text.contains("(rule: ")), "{told}");
    // Meanwhile the leader has looked at it several times more.
    let asked = set.api.gets();
    wait_for("some more questions of the members", async || {
        let now = set.api.gets();
        if now > asked + 9 { Ok(()) } else { Err(format!("{now} after {asked}")) }
    })
    .await;
    let same = set.api.events().iter().filter(|event| event["message"] == told["message"]).count();
    assert_eq!(same, 1, "{:?}", set.api.events());
}
