//! Membership cases about size: `spec.replicas` changes, and the cluster follows, on the played StatefulSet.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::cluster::wait_for;
use crate::support::controller::Template;
use crate::support::kube_api::Mode;
use crate::support::statefulset::StatefulSet;
use crate::support::tools;

/// Every pod that was deleted has ended by itself and well.
fn assert_all_ended_well(set: &StatefulSet) {
    for ended in set.ended() {
        assert!(ended.status.success() && !ended.was_killed(), "{ended:?}");
    }
}

/// Scales, and waits until exactly the wanted pods exist, are ready and vote.
async fn scale_to(set: &StatefulSet, replicas: u64) {
    set.scale(replicas);
    set.wait_ready().await;
    set.wait_voters(set.wanted()).await;
}

/// Case 9: 1, 3, 5: the new pods join and vote by themselves, and no old pod is restarted, under load.
#[tokio::test(flavor = "multi_thread")]
async fn cluster_grows_from_one_to_five_without_a_restart() {
    let set = StatefulSet::quick(1).start().await;
    let (load, first) = (set.load(), set.pid(0));
    scale_to(&set, 3).await;
    let pids: Vec<_> = (0..3).map(|ordinal| set.pid(ordinal)).collect();
    scale_to(&set, 5).await;
    assert_eq!(set.pid(0), first);
    assert_eq!((0..3).map(|ordinal| set.pid(ordinal)).collect::<Vec<_>>(), pids);
    load.finish(&set).await;
    assert!(set.ended().is_empty(), "{:?}", set.ended());
}

/// Case 12: 5, 3, 1: those that go are removed first, and end by themselves, under load.
#[tokio::test(flavor = "multi_thread")]
async fn cluster_shrinks_from_five_to_one() {
    let set = StatefulSet::quick(5).start().await;
    let load = set.load();
    scale_to(&set, 3).await;
    scale_to(&set, 1).await;
    load.finish(&set).await;
    assert_eq!(set.ended().len(), 4);
    assert_all_ended_well(&set);
}

/// Case 13: 5 to 1 in one step: all four get SIGTERM at once, and vote until they are removed.
#[tokio::test(flavor = "multi_thread")]
async fn four_of_five_leave_in_one_step() {
    let set = StatefulSet::quick(5).start().await;
    let load = set.load();
    load.wait_progress(20).await;
    load.take_longest_gap();
    scale_to(&set, 1).await;
    println!("longest gap in writes: {:?}", load.take_longest_gap());
    load.finish(&set).await;
    assert_eq!(set.ended().len(), 4);
    assert_all_ended_well(&set);
}

/// Case 14: 3, 2, 3: two voters are reported as what they are.
#[tokio::test(flavor = "multi_thread")]
async fn three_two_three() {
    let set = StatefulSet::quick(3).start().await;
    let load = set.load();
    scale_to(&set, 2).await;
    // A condition once it has lasted for some seconds.
    wait_for("the word on two voters", async || {
        let text = set.client(0, &["member", "why"]).await;
        if text.contains("2 voters survive the loss of none") { Ok(()) } else { Err(text) }
    })
    .await;
    scale_to(&set, 3).await;
    load.finish(&set).await;
    assert_all_ended_well(&set);
}

/// Case 15: the leader is among those that go: it hands over to one that stays.
#[tokio::test(flavor = "multi_thread")]
async fn leader_that_is_scaled_away_hands_over() {
    let set = StatefulSet::quick(5).start().await;
    set.move_leader(4).await;
    let load = set.load();
    load.wait_progress(20).await;
    load.take_longest_gap();
    set.scale(3);
    let leader = set.wait_voters(0..3).await;
    println!("longest gap in writes: {:?}", load.take_longest_gap());
    assert!(leader < 3);
    set.wait_ready().await;
    load.finish(&set).await;
    assert_all_ended_well(&set);
}

/// Case 16: the pods that go are killed without a word: they are removed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn pods_that_vanish_while_scaled_away_are_removed() {
    let set = StatefulSet::quick(5).start().await;
    set.put(0, "k", "v").await;
    set.hold(3);
    set.hold(4);
    set.scale(3);
    set.wait_voters(0..3).await;
    assert_eq!(set.get(2, "k").await.as_deref(), Some("v"));
}

/// Case 17: scaled down while two others are down: nobody is removed, status says why and what to do; it goes on when they are back.
#[tokio::test(flavor = "multi_thread")]
async fn scaling_down_waits_for_the_quorum_of_those_that_stay() {
    let set = StatefulSet::quick(5).start().await;
    set.move_leader(2).await;
    let before = set.membership(2).await;
    set.hold(0);
    set.hold(1);
    // Who has just died cannot be told from who is slow.
    wait_for("the leader to miss both", async || {
        let text = set.client(2, &["member", "why", "-o", "json"]).await.replace(' ', "");
        if text.matches("\"reachable\":false").count() == 2 { Ok(()) } else { Err(text) }
    })
    .await;
    set.scale(3);
    set.wait_status(2, &["needs 2 healthy, caught-up voters of the new configuration, 1 are", "scale back to 5"]).await;
    set.put(2, "k", "v").await;
    assert_eq!(set.membership(2).await, before);
    assert_eq!(set.ordinals(), [2, 3, 4], "those that go still vote");
    set.release(0);
    set.release(1);
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert_eq!(set.get(0, "k").await.as_deref(), Some("v"));
    assert_all_ended_well(&set);
}

/// Case 18: down, and up again at once, while the pods that go are still ending.
#[tokio::test(flavor = "multi_thread")]
async fn down_and_up_again_at_once() {
    let set = StatefulSet::quick(5).start().await;
    let load = set.load();
    let pids: Vec<_> = [3, 4].iter().map(|ordinal| set.pid(*ordinal)).collect();
    set.scale(3);
    set.wait_logged(4, &["stopping"]).await;
    set.scale(5);
    wait_for("other processes of both", async || {
        let now: Vec<_> = [3, 4].iter().map(|ordinal| set.pid(*ordinal)).collect();
        if now.iter().zip(&pids).all(|(now, was)| now.is_some() && now != was) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
    .await;
    set.wait_ready().await;
    set.wait_voters(0..5).await;
    load.finish(&set).await;
}

/// Case 19: down and up with the disks of before: the pods come back as new members, with all data; their former selves are kept aside.
#[tokio::test(flavor = "multi_thread")]
async fn removed_pods_come_back_on_their_old_disks() {
    let set = StatefulSet::quick(3).start().await;
    let (cluster, former) = set.ids(2).await;
    scale_to(&set, 1).await;
    set.put(0, "k", "v").await;
    scale_to(&set, 3).await;
    let (now, member) = set.ids(2).await;
    assert_eq!(now, cluster);
    assert_ne!(member, former);
    assert_eq!(set.get(2, "k").await.as_deref(), Some("v"));
    let kept = set.disk(2).join("data").join(format!("member-{former:016x}"));
    assert!(kept.is_dir(), "{} is kept", kept.display());
}

/// Case 20: down and up where the claims go with the pods: fresh disks, new members, all data.
#[tokio::test(flavor = "multi_thread")]
async fn removed_pods_come_back_on_fresh_disks() {
    let set = StatefulSet::quick(3).delete_disks_when_scaled().start().await;
    let former = set.ids(1).await.1;
    scale_to(&set, 1).await;
    assert!(!set.disk(1).exists());
    set.put(0, "k", "v").await;
    scale_to(&set, 3).await;
    assert_ne!(set.ids(1).await.1, former);
    assert_eq!(set.get(1, "k").await.as_deref(), Some("v"));
}

/// Case 21: 1, 3, 1, 3, under load.
#[tokio::test(flavor = "multi_thread")]
async fn one_three_one_three() {
    let set = StatefulSet::quick(1).start().await;
    let load = set.load();
    for replicas in [3, 1, 3] {
        scale_to(&set, replicas).await;
    }
    load.finish(&set).await;
    assert_all_ended_well(&set);
}

/// Case 22: 5, 0, 5: a shutdown and a start: the same members, all data.
#[tokio::test(flavor = "multi_thread")]
async fn scaled_to_nothing_and_back_is_the_same_cluster() {
    let set = StatefulSet::quick(5).start().await;
    let (ids, before) = (set.ids(0).await, set.membership(0).await);
    set.put(0, "k", "v").await;
    set.scale(0);
    set.wait_pods([]).await;
    assert_all_ended_well(&set);
    // Nobody waits for anybody.
    let longest = set.ended().iter().map(|ended| ended.took).max();
    assert!(longest < Some(Duration::from_secs(20)), "{longest:?}");
    scale_to(&set, 5).await;
    assert_eq!((set.ids(0).await, set.membership(4).await), (ids, before));
    assert_eq!(set.get(4, "k").await.as_deref(), Some("v"));
}

/// Case 23: 5, 0, 2: two of five are no quorum: they wait, and say what to scale to; 3 are enough, and then only they stay.
#[tokio::test(flavor = "multi_thread")]
async fn too_few_of_those_that_were_wait_and_say_how_many_are_needed() {
    let set = StatefulSet::quick(5).start().await;
    set.put(0, "k", "v").await;
    set.scale(0);
    set.wait_pods([]).await;
    set.scale(2);
    for ordinal in [0, 1] {
        set.wait_unready(ordinal, &["needs 3 of 5", "scale to 3"]).await;
    }
    set.scale(3);
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert_eq!(set.get(0, "k").await.as_deref(), Some("v"));
}

/// Case 24: deleted pods, the leader's among them, change no membership.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_pods_change_no_membership() {
    let set = StatefulSet::quick(3).start().await;
    let before = set.membership(0).await;
    let load = set.load();
    for _ in 0..2 {
        let leader = set.leader().await;
        let (ip, witness) = (set.ip(leader), (leader + 1) % 3);
        set.delete_pod(leader);
        wait_for("a new pod", async || {
            assert_eq!(set.membership(witness).await, before);
            match set.ip(leader) {
                now if now.is_some() && now != ip => Ok(()),
                now => Err(format!("{now:?}")),
            }
        })
        .await;
        set.wait_ready().await;
    }
    assert_eq!(set.membership(1).await, before);
    load.finish(&set).await;
    assert_all_ended_well(&set);
}

/// Case 28: the API server is away, or refuses: nobody is removed although the pods go, and status says why. When it answers again
/// the membership follows.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_changes_while_the_api_server_is_silent() {
    let mut set = StatefulSet::quick(4).start_with_standby().await;
    let before = set.membership(0).await;
    set.api.set_mode(Mode::Forbids);
    set.wait_status(0, &["403", "verb get on resource statefulsets"]).await;
    set.api.down();
    set.wait_status(0, &["API server", "does not answer"]).await;
    set.scale(3);
    set.wait_pods(0..3).await;
    // Longer than a dead member that is not wanted would need to be removed.
    let mut kv = set.kv(0);
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        let put = quorate::pb::etcd::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        kv.put(put).await.unwrap();
        assert_eq!(set.membership(0).await, before);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = set.log_text(0).matches("name=\"wanted-unknown\"").count();
    assert!((1..=4).contains(&said), "it is said once a state, not {said} times");
    set.api.set_mode(Mode::Serves);
    set.api.up();
    set.wait_voters(0..3).await;
    assert_eq!(set.api.unexpected(), Vec::<String>::new());
}

/// Case 29: uninstalled and installed again on the kept disks: the old cluster resumes.
#[tokio::test(flavor = "multi_thread")]
async fn reinstalled_on_kept_disks_the_cluster_resumes() {
    let set = StatefulSet::quick(3).start().await;
    let (ids, before) = (set.ids(0).await, set.membership(0).await);
    set.put(0, "k", "v").await;
    set.uninstall();
    set.wait_pods([]).await;
    assert_all_ended_well(&set);
    set.reinstall(3);
    set.wait_ready().await;
    assert_eq!((set.ids(0).await, set.membership(2).await), (ids, before));
    assert_eq!(set.get(1, "k").await.as_deref(), Some("v"));
}

/// Case 29, with a minority of the disks: nobody forms anything, and the one that remembers says what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn reinstalled_on_a_minority_of_the_disks_it_waits() {
    let set = StatefulSet::quick(3).start().await;
    let (cluster, _) = set.ids(0).await;
    set.uninstall();
    set.wait_pods([]).await;
    set.wipe(1);
    set.wipe(2);
    set.reinstall(3);
    set.wait_unready(0, &["1 of 2 needed voters", "`recover`"]).await;
    for ordinal in [1, 2] {
        set.wait_unready(ordinal, &[&format!("cluster {cluster:016x} has no quorum")]).await;
    }
}

/// Case 39: `ordinals.start` is 5: the cluster grows and shrinks at its upper end.
#[tokio::test(flavor = "multi_thread")]
async fn cluster_with_higher_ordinals_grows_and_shrinks() {
    let set = StatefulSet::quick(1).first(5).start().await;
    let load = set.load();
    scale_to(&set, 3).await;
    assert_eq!(set.ordinals(), [5, 6, 7]);
    scale_to(&set, 1).await;
    assert_eq!(set.ordinals(), [5]);
    load.finish(&set).await;
}

/// `OrderedReady` with more than one pod and no cluster can never form one, and the first pod says so. It works for a cluster that
/// grows: each pod joins before the next is made.
#[tokio::test(flavor = "multi_thread")]
async fn ordered_pods_join_one_after_another() {
    let set = StatefulSet::quick(3).ordered().install();
    set.wait_unready(0, &["slot 1", "OrderedReady", "Parallel"]).await;
    assert_eq!(set.ordinals(), [0]);
    let set = StatefulSet::quick(1).ordered().start().await;
    scale_to(&set, 3).await;
    scale_to(&set, 1).await;
    assert_all_ended_well(&set);
}

/// Case 37: a learner that never catches up (its process is stopped) keeps no other change from being made: a lost disk is replaced,
/// and the learner is removed when it is not wanted any more.
#[tokio::test(flavor = "multi_thread")]
async fn learner_that_never_catches_up_blocks_nothing() {
    let blueprint = StatefulSet::quick(3).set("cluster.promote_after", "2s").grace(Duration::from_secs(16));
    let set = blueprint.start().await;
    set.put(0, "k", "v").await;
    set.scale(4);
    wait_for("a learner", async || {
        let members = set.membership(0).await;
        if members.iter().any(|(id, votes)| id & 0xffff == 3 && !votes) { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
    set.signal(3, Signal::STOP);
    let former = set.ids(1).await.1;
    set.hold(1);
    set.wipe(1);
    set.release(1);
    wait_for("another voter in slot 1", async || {
        let members = set.membership(0).await;
        let is_replaced = members.iter().any(|(id, votes)| id & 0xffff == 1 && *id != former && *votes);
        if is_replaced { Ok(()) } else { Err(format!("{members:x?}")) }
    })
    .await;
    set.scale(3);
    set.wait_voters(0..3).await;
    assert_eq!(set.get(1, "k").await.as_deref(), Some("v"));
}

/// One life under load: 1, 3, 5, 3, 1, then 5 to 1 in one step, a killed leader, a rolling restart of 5. Nothing acknowledged is lost,
/// no linearizable read is stale. Prints how long each step took, and the longest gap in acknowledged writes meanwhile; with
/// `QUORATE_DEFAULT_TIMES=1` for members with the settings that people have.
#[tokio::test(flavor = "multi_thread")]
async fn one_life_under_load_loses_nothing() {
    let set = if tools::is_set("QUORATE_DEFAULT_TIMES") { StatefulSet::as_shipped(1) } else { StatefulSet::quick(1) };
    let set = set.start().await;
    let load = set.load();
    load.wait_progress(20).await;
    let figure = |step: &str, since: Instant| {
        println!("{step}: {:.1} s, longest gap {:?}", since.elapsed().as_secs_f64(), load.take_longest_gap());
    };
    for (step, replicas) in [("1 to 3", 3), ("3 to 5", 5), ("5 to 3", 3), ("3 to 1", 1), ("1 to 5", 5), ("5 to 1", 1)] {
        load.take_longest_gap();
        let since = Instant::now();
        scale_to(&set, replicas).await;
        figure(step, since);
    }
    scale_to(&set, 5).await;
    load.wait_progress(20).await;
    load.take_longest_gap();
    let (since, leader) = (Instant::now(), set.leader().await);
    set.crash(leader);
    load.wait_progress(50).await;
    figure("the leader is killed", since);
    set.wait_ready().await;
    load.take_longest_gap();
    let since = Instant::now();
    set.roll(Template::default());
    set.wait_ready().await;
    figure("rolling restart of 5", since);
    let report = load.finish(&set).await;
    assert!(report.writes > 200 && report.reads > 200, "{report:?}");
    println!("{} answers to the mixed clients", report.mixed);
    // On a machine that does much else: what a quiet one shows is in the figures.
    assert!(report.longest_gap < Duration::from_secs(15), "{report:?}");
    assert_all_ended_well(&set);
}
