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
    Settings { seed, ..Settings::default() }
}

fn expect_kept(report: &Report) {
    if let Some(violation) = &report.violation {
        panic!("seed {}: {}: {}", report.seed, violation.check, violation.what);
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
        let reports = seeds.into_iter().map(|seed| sim::run(&settings(seed))).inspect(expect_kept);
        reports.map(|report| report.counts["ops answered"]).sum::<u64>()
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
        let (report, _) = sim::play(&settings(seed), async |world: &mut World| {
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
        expect_kept(&report);
        assert!(report.counts["ops answered"] > 20, "{:?}", report.counts);
    }
}

#[test]
fn sigterm_hands_leadership_over_and_ends_a_member_soon() {
    for seed in 2000..2003 {
        let (report, _) = sim::play(&settings(seed), async |world: &mut World| {
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
        expect_kept(&report);
    }
}
