//! Simulated clusters, judged whole: `testing::sim` has the world, the faults and the checks.
//!
//! `QUORATE_SIM_SEEDS` is how many seeds run (from 0 on), `QUORATE_SIM_SEED` runs that one alone. These share a process, so that a
//! seed repeats its faults but not its schedule; `cargo run --example quorate-sim -- --seed N` repeats it bit by bit.

use std::time::Duration;

use crate::env::Instant;
use crate::testing::sim::{self, Fault, Report, Settings, World};

const SEEDS: u64 = 8;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

fn settings(seed: u64) -> Settings {
    Settings { seed, keep_trace: true, ..Settings::default() }
}

/// The trace is all that is left of a run that does not repeat itself.
fn expect_kept((report, trace): &(Report, String)) {
    if let Some(violation) = &report.violation {
        let file = std::env::temp_dir().join(format!("quorate-sim-{}.trace", report.seed));
        let kept = std::fs::write(&file, trace).map_or_else(|error| error.to_string(), |()| file.display().to_string());
        panic!("seed {}: {}: {}; trace: {kept}", report.seed, violation.check, violation.what);
    }
}

/// Issue rule: what was acknowledged is on every member, whatever crashed, nothing was applied twice, and every read was right.
#[test]
fn every_answer_is_of_one_history_whatever_crashes_and_is_cut() {
    let seeds = match number("QUORATE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("QUORATE_SIM_SEEDS").unwrap_or(SEEDS),
    };
    // Two worlds at a time: they share nothing.
    let (odd, even): (Vec<u64>, Vec<u64>) = seeds.clone().partition(|seed| seed % 2 == 1);
    let run_all = |seeds: Vec<u64>| {
        let reports = seeds.into_iter().map(|seed| sim::run_traced(&settings(seed))).inspect(expect_kept);
        reports.map(|(report, _)| report.counts["ops answered"]).sum::<u64>()
    };
    let answered = std::thread::scope(|scope| {
        let odd = scope.spawn(|| run_all(odd));
        run_all(even) + odd.join().expect("the odd seeds pass")
    });
    println!("{seeds:?}: {answered} operations answered");
    assert!(answered > 50 * (seeds.end - seeds.start), "the cluster hardly worked: {answered} operations");
}

#[test]
fn all_members_losing_power_at_once_keep_what_was_acknowledged() {
    for seed in 1000..1003 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for _ in 0..3 {
                world.sleep_up_to(Duration::from_secs(2)).await;
                world.suffer(Fault::PowerLoss { members: vec![0, 1, 2], changes: vec![3, 1, 2] }).await?;
            }
            world.sleep_up_to(Duration::from_secs(3)).await;
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
        assert!(played.0.counts["ops answered"] > 20, "{:?}", played.0.counts);
    }
}

/// The forwarder is among the users of every world; here nothing looks at what it sends.
#[test]
fn a_leader_that_proposes_unseen_what_it_is_sent_is_found_out() {
    let planted = Some("proposal-not-checked".to_owned());
    let (report, _) = sim::play(&Settings { planted, ..settings(4000) }, async |world: &mut World| {
        world.start_all().await?;
        world.start_clients();
        for _ in 0..100 {
            world.sleep_up_to(Duration::from_millis(500)).await;
            world.look_after().await?;
        }
        world.stop_clients().await;
        Ok(())
    });
    assert_eq!(report.violation.map(|violation| violation.check).as_deref(), Some("member alive"));
}

#[test]
fn sigterm_hands_leadership_over_and_ends_a_member_soon() {
    for seed in 2000..2003 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for member in 0..3 {
                world.sleep_up_to(Duration::from_secs(1)).await;
                let took = world.stop(member).await?;
                assert!(took < Duration::from_millis(500), "a stop took {took:?}");
                // The others lead on: without the handover this would wait for an election.
                let began = Instant::now();
                world.put_through((member + 1) % 3).await?;
                assert!(began.elapsed() < Duration::from_millis(300), "no leader for {:?}", began.elapsed());
                world.start(member);
                world.wait_healed().await?;
            }
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
    }
}

/// Compaction is logical at once, and frees memory and the state store later, in slices: the power fails anywhere in between.
#[test]
fn a_crash_in_compaction_leaves_the_members_alike() {
    for seed in 3000..3004 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for round in 0..6 {
                world.sleep_up_to(Duration::from_millis(1500)).await;
                world.compact().await;
                let members = if round % 2 == 0 { vec![0, 1, 2] } else { vec![round / 2] };
                let changes = members.iter().map(|member| 1 + *member as u64).collect();
                world.suffer(Fault::PowerLoss { members, changes }).await?;
            }
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
        assert!(played.0.counts["op: compact"] >= 6, "{:?}", played.0.counts);
    }
}

/// A member that was scaled away and comes back, on its old disk or a new one, is somebody else.
#[test]
fn members_that_were_scaled_away_come_back_as_new_ones() {
    for seed in 4000..4003 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for _ in 0..2 {
                world.suffer(Fault::Grow).await?;
                world.sleep_up_to(Duration::from_secs(1)).await;
                world.suffer(Fault::Shrink).await?;
            }
            world.suffer(Fault::Grow).await?;
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
    }
}

#[test]
fn no_lease_ends_while_no_quorum_is_left() {
    let mut due = 0;
    for seed in 5000..5004 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for silent in [true, false] {
                world.sleep_up_to(Duration::from_secs(2)).await;
                // Longer than any lease there.
                world.suffer(Fault::Split { silent, millis: 7000 }).await?;
            }
            world.sleep_up_to(Duration::from_secs(2)).await;
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
        due += played.0.counts["leases due in an outage"];
    }
    assert!(due > 0, "no lease was to end in an outage");
}

/// What a member forwards reaches the leader, and what the leader sends does not arrive: until it does, as entries or as a snapshot
/// behind which the log is purged by then, or until another leads. Nothing is answered that the member does not know.
#[test]
fn a_member_that_hears_nothing_of_its_writes_ends_them_with_a_timeout() {
    let mut in_snapshots = 0;
    for seed in 6000..6004 {
        let played = sim::play(&settings(seed), async |world: &mut World| {
            world.start_all().await?;
            world.start_clients();
            for millis in [300, 1500, 2500] {
                world.wait_healed().await?;
                let Some((leader, _)) = world.leader().await? else { continue };
                world.suffer(Fault::OneWay { pair: (leader, (leader + 1) % 3), millis }).await?;
                world.wait_healed().await?;
                let Some((leader, _)) = world.leader().await? else { continue };
                world.fall_behind(leader, (leader + 2) % 3).await;
            }
            world.stop_clients().await;
            Ok(())
        });
        expect_kept(&played);
        in_snapshots += played.1.matches("a snapshot came in place of what was asked here").count();
    }
    assert!(in_snapshots > 0, "the log was never purged meanwhile");
}
