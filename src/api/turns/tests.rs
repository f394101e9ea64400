//! Turns beside an event loop whose rounds are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;

fn host(host: u64) -> Asker {
    Asker { host, connection: 1 }
}

/// Counts rounds of the event loop.
pub(in crate::api) async fn count(rounds: Arc<AtomicU64>) {
    loop {
        rounds.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn there_is_one_turn_a_round_however_many_wait() {
    let (turns, rounds) = (Turns::new(&Env::real()), Arc::new(AtomicU64::new(0)));
    tokio::spawn(count(rounds.clone()));
    let mut seen: Vec<_> = (0..50)
        .map(|asker| {
            let (turns, rounds) = (turns.clone(), rounds.clone());
            tokio::spawn(async move {
                let mut seen = Vec::new();
                for _ in 0..20 {
                    turns.next(host(asker % 7)).await;
                    seen.push(rounds.load(Ordering::Relaxed));
                }
                seen
            })
        })
        .collect();
    let mut all = Vec::new();
    for one in seen.drain(..) {
        all.extend(one.await.unwrap());
    }
    all.sort_unstable();
    let twice = all.windows(2).filter(|two| two[0] == two[1]).count();
    assert_eq!(twice, 0, "of {} turns", all.len());
}

#[tokio::test]
async fn while_rounds_take_long_there_are_several_between_two_turns() {
    let (turns, rounds) = (Turns::new(&Env::real()), Arc::new(AtomicU64::new(0)));
    tokio::spawn(count(rounds.clone()));
    // Others who have the loop for most of each round.
    tokio::spawn(async {
        loop {
            std::thread::sleep(2 * SHORT_ROUND);
            tokio::task::yield_now().await;
        }
    });
    let mut seen = Vec::new();
    for _ in 0..21 {
        turns.next(host(1)).await;
        seen.push(rounds.load(Ordering::Relaxed));
    }
    // Not each time: one round may take longer than the one whose multiple is rested.
    assert!(seen[20] - seen[0] >= 2 * 20, "{seen:?}");
}

#[tokio::test]
async fn large_pieces_alone_are_followed_by_no_rest() {
    let turns = Turns::new(&Env::real());
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        turns.next(host(1)).await;
        // As the piece of a version of megabytes.
        std::thread::sleep(Duration::from_millis(20));
    }
    let passed = begin.elapsed();
    // With rests it would be a second more.
    assert!(passed < Duration::from_millis(20 * (20 + 25)), "{passed:?}");
}

#[tokio::test]
async fn who_does_not_take_a_turn_holds_nobody_up() {
    let turns = Turns::new(&Env::real());
    let mut stopped: Vec<_> = (0..10).map(|_| Box::pin(turns.next(host(1)))).collect();
    for one in &mut stopped {
        assert!(futures_util::poll!(one.as_mut()).is_pending());
    }
    stopped.truncate(5);
    tokio::time::timeout(Duration::from_secs(30), turns.next(host(1))).await.unwrap();
    // The task that gave turns has ended, and another begins.
    tokio::time::timeout(Duration::from_secs(30), turns.next(host(1))).await.unwrap();
}

#[tokio::test]
async fn a_host_waits_for_one_piece_of_each_other_host_however_many_connections_and_answers_those_have() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..20 {
        let (turns, given) = (Turns::new(&Env::real()), Arc::new(AtomicU64::new(0)));
        let (others, connections) = (random.u64(1..5), random.u64(1..300));
        let answers: Vec<_> = (0..random.u64(100..300))
            .map(|answer| {
                let (turns, given) = (turns.clone(), given.clone());
                tokio::spawn(async move {
                    loop {
                        turns.next(Asker { host: 10 + answer % others, connection: answer % connections }).await;
                        given.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        while given.load(Ordering::Relaxed) < 10 {
            tokio::task::yield_now().await;
        }
        for _ in 0..random.usize(1..10) {
            let before = given.load(Ordering::Relaxed);
            // Numbers before and behind those of the others.
            turns.next(host(random.choice([1, 9, 20, u64::MAX]).unwrap())).await;
            let waited = given.load(Ordering::Relaxed) - before;
            // The one whose turn it was when this one asked has it, too.
            assert!(waited <= others + 1, "{waited} turns of {others} others");
        }
        answers.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
