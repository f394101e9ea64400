//! Turns beside an event loop whose rounds are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;

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
        .map(|_| {
            let (turns, rounds) = (turns.clone(), rounds.clone());
            tokio::spawn(async move {
                let mut seen = Vec::new();
                for _ in 0..20 {
                    turns.next().await;
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
        turns.next().await;
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
        turns.next().await;
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
    let mut stopped: Vec<_> = (0..10).map(|_| Box::pin(turns.next())).collect();
    for one in &mut stopped {
        assert!(futures_util::poll!(one.as_mut()).is_pending());
    }
    stopped.truncate(5);
    tokio::time::timeout(Duration::from_secs(30), turns.next()).await.unwrap();
    // The task that gave turns has ended, and another begins.
    tokio::time::timeout(Duration::from_secs(30), turns.next()).await.unwrap();
}
