//! How long it takes, for people to look at: `cargo test --lib watch::tests::timing -- --ignored --nocapture`.

use super::*;
use crate::env::Instant;

const WIDE: Options = Options { stream_bytes_max: 1 << 20, stream_watchers_max: 50_000 };

fn rig() -> Rig {
    Rig::with_account(WIDE, Account::new(1 << 30, 1 << 30, 200_000))
}

/// Puts of one kind, and what the hub takes for each: without what apply takes.
async fn per_put(name: &str, rig: &mut Rig, sessions: &mut [Session], key: impl Fn(usize) -> String) {
    const PUTS: usize = 2_000;
    let mut took = Duration::ZERO;
    for i in 0..PUTS {
        let revision = rig.put(&key(i), "value");
        let begin = Instant::now();
        sessions[0].delivered_after(revision - 1).await;
        for session in sessions.iter_mut() {
            while session.try_next().is_some() {}
        }
        took += begin.elapsed();
    }
    println!("{name}: {:?} a put", took / PUTS as u32);
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn puts_that_concern_few() {
    let mut rig = rig();
    let mut sessions: Vec<Session> = (0..2).map(|_| rig.hub.session(&Client::default(), Caller::Internal)).collect();
    let begin = Instant::now();
    for i in 0..11_000_usize {
        let shape = match i % 2 {
            0 => Shape::of_key(format!("/key/{i:06}")),
            _ => Shape::new(format!("/range/{i:06}/"), format!("/range/{i:06}0")),
        };
        sessions[i % 2].watch(i as i64, &shape, 0).unwrap();
    }
    println!("{:?} a watcher that is made", begin.elapsed() / 11_000);
    per_put("none of 11,000", &mut rig, &mut sessions, |i| format!("/other/{i}")).await;
    per_put("one by its key", &mut rig, &mut sessions, |i| format!("/key/{:06}", i % 5_000 * 2)).await;
    per_put("one by a range", &mut rig, &mut sessions, |i| format!("/range/{:06}/x", i % 5_000 * 2 + 1)).await;
    let begin = Instant::now();
    drop(sessions);
    println!("{:?} for the streams' end", begin.elapsed());
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn a_stream_of_many_overlapping_ranges() {
    let mut rig = rig();
    let mut session = rig.hub.session(&Client::default(), Caller::Internal);
    let other = rig.session(&Shape::of_key("b"), 0);
    let begin = Instant::now();
    for i in 0..20_000 {
        session.watch(i, &Shape::new("a", format!("b{i}")), 0).unwrap();
    }
    println!("{:?} a watcher that is made", begin.elapsed() / 20_000);
    for _ in 0..3 {
        let begin = Instant::now();
        let revision = rig.put("b", "value");
        other.delivered_after(revision - 1).await;
        println!("{:?} for a put that concerns all", begin.elapsed());
    }
    let begin = Instant::now();
    drop(session);
    println!("{:?} for the stream's end", begin.elapsed());
}
