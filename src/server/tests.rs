//! The seeded crash test: three whole members in one process, on disks that lose what was not synced and a network that delays,
//! cuts and holds.
//!
//! Everything above `env` is real: formation, openraft, tonic, the log, snapshot files, the API. Time is tokio's paused clock, so
//! half a minute of cluster takes a second. Writers put each key once, through random members; what they were told decides what
//! must be there in the end.
//! `QUORATE_SIM_SEEDS` is how many seeds run (from 0 on), `QUORATE_SIM_SEED` runs that one alone, with the log shown if
//! `QUORATE_SIM_LOG` holds a level.
//!
//! What the seed decides: faults, their times, what a disk loses, delays, ids, the writers' choices. What it does not: openraft's
//! election timeouts (the thread's generator), which of several ready branches tokio's `select!` takes first, and the order of hash
//! maps in the HTTP stack. So a failing seed fails again often, not always.

mod world;

use std::time::Duration;

use world::{Fault, World};

const SEEDS: u64 = 20;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// Names the seed if the run fails, however it does.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("simulation failed; run it alone with QUORATE_SIM_SEED={}", self.0);
        }
    }
}

fn simulate(seed: u64, scenario: impl AsyncFnOnce(&mut World)) {
    let _named = Seed(seed);
    if let Ok(level) = std::env::var("QUORATE_SIM_LOG") {
        let telemetry = crate::config::Telemetry { level, ..Default::default() };
        let _ = crate::telemetry::init(&telemetry);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed);
        scenario(&mut world).await;
        world.check().await;
    });
}

/// Issue rule: what was acknowledged is on every member, whatever crashed, and nothing was applied twice.
#[test]
fn no_acknowledged_write_is_lost_or_doubled_by_crashes_and_cuts() {
    let seeds = match number("QUORATE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("QUORATE_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let (mut acknowledged, mut unknown, mut faults) = (0, 0, 0);
    for seed in seeds.clone() {
        simulate(seed, async |world| {
            world.start_all().await;
            world.start_writers();
            for _ in 0..6 {
                world.sleep_up_to(Duration::from_millis(1500)).await;
                let fault = world.choose_fault();
                world.suffer(fault).await;
                faults += 1;
            }
            world.sleep_up_to(Duration::from_secs(1)).await;
            let told = world.stop_writers().await;
            (acknowledged, unknown) = (acknowledged + told.0, unknown + told.1);
        });
    }
    println!("{seeds:?}: {acknowledged} writes acknowledged, {unknown} of unknown fate, {faults} faults");
    assert!(acknowledged > 100 * (seeds.end - seeds.start), "the cluster hardly worked: {acknowledged} writes");
}

#[test]
fn all_members_losing_power_at_once_keep_what_was_acknowledged() {
    for seed in 1000..1003 {
        simulate(seed, async |world| {
            world.start_all().await;
            world.start_writers();
            for _ in 0..3 {
                world.sleep_up_to(Duration::from_secs(2)).await;
                world.suffer(Fault::PowerLoss { members: vec![0, 1, 2], changes: vec![3, 1, 2] }).await;
            }
            world.sleep_up_to(Duration::from_secs(3)).await;
            let (acknowledged, _) = world.stop_writers().await;
            assert!(acknowledged > 20, "{acknowledged} writes");
        });
    }
}

#[test]
fn sigterm_ends_a_member_soon_and_fails_no_request_of_others() {
    simulate(2000, async |world| {
        world.start_all().await;
        world.start_writers();
        for member in 0..3 {
            world.sleep_up_to(Duration::from_secs(1)).await;
            let began = crate::env::Instant::now();
            world.suffer(Fault::Restart { member }).await;
            println!("took {:?}", began.elapsed());
        }
        world.stop_writers().await;
    });
}
