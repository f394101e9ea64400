//! A long history, such as hundreds of SIGKILLs make: it must be judged, and soon.

use std::time::{Duration, Instant};

use super::super::verdict;
use super::*;

const OPS: u64 = 20_000;
/// Far above what it takes on a slow machine, far below what a search takes that looks at all that was lost in each step.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Twelve clients. A half of the operations puts a key of its own, the others meet at a few keys; a sixth loses its answer, and takes
/// effect at once, much later, or never. Watchers, who start again from time to time, see everything.
fn long_history(random: &mut fastrand::Rng) -> (Vec<Op>, Vec<Watched>, Vec<Store>) {
    let mut ops = Vec::new();
    let mut stores = vec![Store::default()];
    let mut late: Vec<(u64, Request)> = Vec::new();
    for n in 0..OPS {
        while let Some(at) = late.iter().position(|(due, _)| *due <= n) {
            advance(&mut stores, &late.swap_remove(at).1);
        }
        let request = request(random, n);
        let at = 100 * n + 100;
        let (called, returned) = (at - random.u64(..99), at + random.u64(..1000));
        let read = op(0, 0, 0, request.clone(), Outcome::Unknown).is_read();
        if !read && random.u8(..5) == 0 {
            match random.u8(..4) {
                0 => drop(advance(&mut stores, &request)),
                1 => late.push((n + random.u64(1..3000), request.clone())),
                _ => {}
            }
            ops.push(op(n % 12, called, NEVER, request, Outcome::Unknown));
        } else {
            let answer = advance(&mut stores, &request);
            ops.push(op(n % 12, called, returned, request, Outcome::Answered(answer)));
        }
    }
    let newest = stores.last().expect("there is a beginning").revision;
    let mut streams = Vec::new();
    for (span, puts) in [(Span::range("\0", "\x7f"), true), (Span::one("a"), true), (Span::range("b", "e"), false)] {
        let mut start = 2;
        while start <= newest {
            let end = (start + random.i64(1..400)).min(newest);
            let events = (start..=end).flat_map(|at| stores[at as usize - 1].events_since(&stores[at as usize - 2]));
            let of_it = |event: &Event| span.holds(event.key()) && (puts || matches!(event, Event::Delete { .. }));
            let messages = events.filter(of_it).map(|event| Message::Events { events: vec![event], fragment: true });
            let (span, messages) = (span.clone(), messages.collect());
            streams.push(Watched { span, start, puts, deletes: true, messages, complete_to: Some(end) });
            start = end + 1;
        }
    }
    (ops, streams, stores)
}

fn advance(stores: &mut Vec<Store>, request: &Request) -> Answer {
    let (after, answer) = stores.last().expect("there is a beginning").execute(request);
    if after.revision > stores.len() as i64 {
        stores.push(after);
    }
    answer
}

fn request(random: &mut fastrand::Rng, n: u64) -> Request {
    let key = ["a", "b", "c", "d", "e", "f"][random.usize(..6)];
    let put = |key: &str| Action::Put { key: key.into(), value: format!("{n}") };
    match random.u8(..100) {
        0..50 => put_own(n),
        50..65 => Request::Do(put(key)),
        65..70 => Request::Do(Action::Delete(Span::one(key))),
        70..72 => Request::Do(Action::Delete(Span::range(key, "z"))),
        72..80 => Request::Do(Action::Get(Span::one(key))),
        80..85 => Request::Do(Action::Get(Span::range("a", "z"))),
        85..88 => Request::GetLocal(Span::range("a", "z")),
        88..98 => Request::Txn {
            compare: vec![(key.into(), Is::Version(random.i64(..3)))],
            then: vec![Action::Get(Span::one(key)), put(key), put("g")],
            or: vec![Action::Get(Span::range("a", "z"))],
        },
        _ => Request::Compact(1),
    }
}

fn put_own(n: u64) -> Request {
    put(&format!("~{n:06}"), "once")
}

#[test]
fn a_long_history_with_many_lost_answers_is_judged_soon() {
    let seed = std::env::var("QUORATE_CHECKER_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("QUORATE_CHECKER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (ops, streams, stores) = long_history(&mut random);
    println!("{} revisions, {} keys", stores.len(), stores.last().unwrap().kvs().count());
    let begun = Instant::now();
    let steps = verdict::history("long", &ops, &streams).unwrap_or_else(|broken| panic!("{broken:?}"));
    println!("{} operations, {} watches: {steps:?} steps, {:.1?}", ops.len(), streams.len(), begun.elapsed());
    assert!(steps.is_some(), "undecided");
    assert!(begun.elapsed() < TIME_MAX, "{:?}", begun.elapsed());
}
