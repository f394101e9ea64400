//! Membership cases about rolling updates: new templates, bad images, and a change of size meanwhile, on the played StatefulSet.

use crate::support::cluster::wait_for;
use crate::support::controller::Template;
use crate::support::statefulset::StatefulSet;

fn template(broken: bool) -> Template {
    Template { env: vec![("A_CHANGE".to_owned(), "1".to_owned())], broken }
}

/// Case 25: a rolling restart under load loses no acknowledged write, and changes no membership.
#[tokio::test(flavor = "multi_thread")]
async fn rolling_restart_loses_nothing() {
    let set = StatefulSet::quick(3).start().await;
    let before = set.membership(0).await;
    let load = set.load();
    load.wait_progress(20).await;
    load.take_longest_gap();
    set.roll(template(false));
    set.wait_ready().await;
    println!("longest gap in writes: {:?}", load.take_longest_gap());
    set.wait_voters(0..3).await;
    assert_eq!(set.membership(0).await, before);
    let report = load.finish(&set).await;
    assert!(report.writes > 20 && report.reads > 0, "{report:?}");
    let ordinals: Vec<u64> = set.ended().iter().map(|ended| ended.ordinal).collect();
    assert_eq!(ordinals, [2, 1, 0], "from the highest down");
    assert!(set.ended().iter().all(|ended| ended.status.success() && !ended.was_killed()), "{:?}", set.ended());
}

/// A partition keeps the new template on the pods above it.
#[tokio::test(flavor = "multi_thread")]
async fn partition_holds_a_rolling_update() {
    let set = StatefulSet::quick(3).start().await;
    let pids: Vec<_> = (0..2).map(|ordinal| set.pid(ordinal)).collect();
    set.set_partition(2);
    set.roll(template(false));
    set.wait_ready().await;
    assert_eq!((0..2).map(|ordinal| set.pid(ordinal)).collect::<Vec<_>>(), pids);
    assert_eq!(set.ended().len(), 1);
    set.set_partition(0);
    set.wait_ready().await;
    assert_eq!(set.ended().len(), 3);
}

/// Waits until the last pod's container has failed.
async fn wait_broken(set: &StatefulSet, ordinal: u64) {
    wait_for("the bad image to fail", async || {
        let ended = set.ended().iter().any(|ended| ended.ordinal == ordinal);
        if ended && set.status(ordinal).await.is_err() { Ok(()) } else { Err("it has not") }
    })
    .await;
}

/// Case 26: a bad image stops the rollout at the first pod, and the cluster serves; the fix goes through.
#[tokio::test(flavor = "multi_thread")]
async fn bad_image_and_then_the_fix() {
    let set = StatefulSet::quick(3).start().await;
    let before = set.membership(0).await;
    let load = set.load();
    set.roll(template(true));
    wait_broken(&set, 2).await;
    load.wait_progress(50).await;
    assert_eq!(set.membership(0).await, before);
    set.roll(template(false));
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert_eq!(set.membership(2).await, before);
    load.finish(&set).await;
}

/// Case 27: scaled down while a rollout hangs on a bad image: there is a quorum throughout, and the pods that go are removed.
#[tokio::test(flavor = "multi_thread")]
async fn scaled_down_during_a_failed_rollout() {
    let set = StatefulSet::quick(5).start().await;
    let load = set.load();
    set.roll(template(true));
    wait_broken(&set, 4).await;
    set.scale(3);
    set.wait_voters_seen_by(&[0, 1], &[0, 1, 2]).await;
    load.wait_progress(50).await;
    set.roll(template(false));
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    load.finish(&set).await;
}

/// Rule 29: pods of a build that knows an older apply version and of this one run together; the cluster's version rises
/// when the last old one is gone. While it has not, the roll can be taken back.
#[tokio::test(flavor = "multi_thread")]
async fn rolls_from_an_older_version_and_back() {
    const OLD: (&str, &str) = ("QUORATE_TEST_APPLY_VERSION", "1");
    let old = || Template { env: vec![(OLD.0.to_owned(), OLD.1.to_owned())], broken: false };
    let set = StatefulSet::quick(3).env(OLD.0, OLD.1).start().await;
    let load = set.load();
    // Forward, but for the first pod; and back.
    set.set_partition(1);
    set.roll(template(false));
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert!(raised(&set).is_empty(), "an old member would not understand");
    set.set_partition(0);
    set.roll(old());
    set.wait_ready().await;
    set.wait_voters(0..3).await;
    assert!(raised(&set).is_empty());
    // Forward.
    set.roll(template(false));
    set.wait_ready().await;
    wait_for("the version to rise", async || if raised(&set).is_empty() { Err("it has not") } else { Ok(()) }).await;
    load.finish(&set).await;
}

/// The lines in which a leader has raised the cluster's version to this build's.
fn raised(set: &StatefulSet) -> Vec<String> {
    let logs: Vec<String> = (0..3).map(|ordinal| set.log_text(ordinal)).collect();
    let lines = logs.iter().flat_map(|text| text.lines());
    let version = format!("version={}", quorate::kv::APPLY_VERSION);
    lines.filter(|line| line.contains("cluster version raised") && line.contains(&version)).map(str::to_owned).collect()
}
