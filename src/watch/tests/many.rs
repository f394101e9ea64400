//! Many watchers, and revisions of many events: nobody else waits for them, and what is kept for them is charged.

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;

use super::*;
use crate::env::Asker;

use crate::watch::shared::{SLICE_REVISIONS_MAX, WATCHERS_AT_ONCE};
use crate::watch::tree::steps;

const WIDE: Options = Options { stream_bytes_max: 1 << 20, stream_watchers_max: 50_000 };
const ALL: usize = 50_000;
/// A turn may take so many steps in trees: each of its watchers some of the logarithm's.
const TURN_STEPS_MAX: u64 = 4 * WATCHERS_AT_ONCE as u64 * 16 * 8;

fn rig() -> Rig {
    Rig::with_account(WIDE, Account::new(1 << 30, 1 << 30, 200_000))
}

fn random() -> fastrand::Rng {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    fastrand::Rng::with_seed(seed)
}

/// A kind of shapes that all see key `b`.
fn shape_of(kind: u8, i: usize) -> Shape {
    match kind {
        0 => Shape::new("a", format!("b{i}")),
        1 => Shape::new(format!("a{i}"), "\0"),
        2 => Shape::new("a", "c"),
        _ => Shape::of_key("b"),
    }
}

/// Gives others turns until `done`; says how many, and how many steps the longest took.
async fn turns(done: impl Fn() -> bool) -> (usize, u64) {
    steps::take();
    let (mut turns, mut longest) = (0, 0);
    while !done() {
        tokio::task::yield_now().await;
        (turns, longest) = (turns + 1, longest.max(steps::take()));
        assert!(turns < 1_000_000, "it does not come to an end");
    }
    (turns, longest)
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_many_watchers_that_ends_lets_others_go_on_in_between() {
    let mut random = random();
    let (mut rig, first) = (rig(), random.u8(..4));
    for kind in [first, (first + 1) % 4] {
        let mut session = rig.hub.session(&Client::default(), Caller::Internal);
        for i in 0..ALL {
            // Some of them begin later.
            let start = if i % 8 == 0 { 1 << 40 } else { 0 };
            session.watch(i as i64, &shape_of(kind, i), start).unwrap();
        }
        let mut other = rig.session(&Shape::of_key("x"), 0);
        rig.put("x", "1");
        steps::take();
        drop(session);
        assert!(steps::take() <= TURN_STEPS_MAX, "kind {kind}: what is done at once");
        assert!(rig.hub.watchers() > ALL / 2, "the others wait for their turn");
        let told = turns(|| other.outbox_is_filled()).await.0;
        assert!(told < ALL / WATCHERS_AT_ONCE / 2, "kind {kind}: told after {told} turns");
        let (count, longest) = turns(|| rig.hub.watchers() == 1).await;
        assert!(count > ALL / WATCHERS_AT_ONCE / 2, "kind {kind}: {count} turns");
        assert!(longest <= TURN_STEPS_MAX, "kind {kind}: {longest} steps in one turn");
        assert_eq!(take(&mut other).await.len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_revision_that_concerns_many_lets_others_go_on_and_who_does_not_read_costs_once() {
    let mut random = random();
    let (mut rig, first) = (rig(), random.u8(..4));
    for kind in [first, (first + 1) % 4] {
        let mut session = rig.hub.session(&Client::default(), Caller::Internal);
        for i in 0..ALL {
            session.watch(i as i64, &shape_of(kind, i), 0).unwrap();
        }
        let mut before = rig.put("b", "1");
        let (_, longest) = turns(|| session.delivered() == before).await;
        assert!(longest <= TURN_STEPS_MAX, "kind {kind}: {longest} steps in one turn");
        // Until its queue is full it is given what it watches.
        for _ in 0..8 {
            before = rig.put("b", "1");
            turns(|| session.delivered() == before).await;
        }
        steps::take();
        let revision = rig.put("b", "2");
        let (count, longest) = turns(|| session.delivered() == revision).await;
        assert!(longest <= 64 && count <= 4, "kind {kind}: {longest} steps in {count} turns for who has no room");
        // And it gets all of it, each revision once.
        let mut got: BTreeMap<i64, i64> = BTreeMap::new();
        for _ in 0..10 * ALL {
            let Ok(Output::Events { watcher, batch }) = session.next().await else { continue };
            let last = got.entry(watcher).or_insert(before - 9);
            assert_eq!(batch.revision, *last + 1, "watcher {watcher}");
            *last = batch.revision;
        }
        drop(session);
        turns(|| rig.hub.watchers() == 0).await;
    }
}

/// Watchers that begin far in the future cost nothing until then, and then get what they asked for.
#[tokio::test(start_paused = true)]
async fn who_begins_later_is_not_looked_at_before() {
    let mut random = random();
    let mut rig = rig();
    let mut session = rig.hub.session(&Client::default(), Caller::Internal);
    let mut starts = BTreeMap::new();
    let reach = 3 * SLICE_REVISIONS_MAX as i64;
    for watcher in 0..300 {
        let start = random.i64(2..reach);
        session.watch(watcher, &shape_of(random.u8(..4), watcher as usize), start).unwrap();
        starts.insert(watcher, start);
    }
    for watcher in 300..2000 {
        session.watch(watcher, &shape_of(random.u8(..4), watcher as usize), 1 << 40).unwrap();
    }
    let mut got: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    while rig.revision() < reach {
        for _ in 0..random.usize(1..40) {
            rig.put("b", "1");
        }
        if random.u8(..8) == 0 {
            let watcher = random.i64(..300);
            session.cancel(watcher);
            starts.remove(&watcher);
            got.remove(&watcher);
        }
        if random.u8(..20) == 0 {
            rig.reinstall();
        }
        steps::take();
        let (_, longest) = turns(|| session.delivered() == rig.revision()).await;
        assert!(longest < 700 * 60, "{longest} steps");
        for output in take(&mut session).await {
            let Output::Events { watcher, batch } = output else { panic!("{output:?}") };
            got.entry(watcher).or_default().push(batch.revision);
        }
    }
    for (watcher, start) in starts {
        let expected: Vec<i64> = (start..=rig.revision()).collect();
        assert_eq!(got.remove(&watcher).unwrap_or_default(), expected, "watcher {watcher}");
    }
    assert!(got.is_empty(), "{:?}", got.keys());
}

/// More watchers than catch up at once, of random shapes, from random starts, with a queue that is soon full.
#[tokio::test(start_paused = true)]
async fn many_watchers_of_one_stream_get_what_each_asked_for() {
    let mut random = random();
    for _ in 0..3 {
        let mut rig = Rig::with_account(
            Options { stream_bytes_max: random.usize(2..200) << 10, ..WIDE },
            Account::new(1 << 30, 1 << 30, 200_000),
        );
        let mut session = rig.hub.session(&Client::default(), Caller::Internal);
        let mut keys = vec![None, None];
        let mut watchers: BTreeMap<i64, (Shape, i64, Vec<i64>)> = BTreeMap::new();
        for round in 0..12 {
            for _ in 0..random.usize(..300) {
                let (number, revision) = (watchers.len() as i64, rig.revision());
                let start = random.i64(1..revision + 4);
                let from = format!("k{}", random.u8(..10));
                let shape = match random.u8(..3) {
                    0 => Shape::of_key(from),
                    1 => Shape::new(from, format!("k{}", random.u32(10..10_000))),
                    _ => Shape::new(from, "\0"),
                };
                if session.watch(number, &shape, start).is_ok() {
                    watchers.insert(number, (shape, start, Vec::new()));
                }
            }
            for _ in 0..random.usize(..6) {
                let key = format!("k{}", random.u8(..10));
                rig.put(&key, "value");
                keys.push(Some(key));
            }
            let some = if round == 11 { usize::MAX } else { random.usize(..2000) };
            for _ in 0..some {
                let Ok(Ok(output)) = timeout(Duration::from_millis(1), session.next()).await else { break };
                let Output::Events { watcher, batch } = output else { continue };
                watchers.get_mut(&watcher).unwrap().2.push(batch.revision);
            }
        }
        for (number, (shape, start, got)) in &watchers {
            let is_within = |key: &String| match &shape.range_end[..] {
                b"" => key.as_bytes() == &shape.key[..],
                b"\0" => key.as_bytes() >= &shape.key[..],
                end => key.as_bytes() >= &shape.key[..] && key.as_bytes() < end,
            };
            let sees = |(_, key): &(i64, &Option<String>)| key.as_ref().is_some_and(is_within);
            let all = (0_i64..).zip(&keys).filter(|at| at.0 >= *start).filter(sees);
            let expected: Vec<i64> = all.map(|(revision, _)| revision).collect();
            assert_eq!(*got, expected, "watcher {number}, {shape:?} from {start}");
        }
    }
}

fn delete_all() -> Request {
    Request::DeleteRange(DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() })
}

/// The whole of a large revision is kept for a few at a time, whatever asks for it.
#[tokio::test(start_paused = true)]
async fn what_is_kept_of_large_revisions_is_charged() {
    let mut random = random();
    let account = Account::new(1 << 30, 8 << 20, 200_000);
    let mut rig = Rig::with_account(WIDE, account.clone());
    let keys = 6000;
    for i in 0..keys {
        rig.put(&format!("k{i:04}"), "value");
    }
    let prev_kv = random.bool();
    let mut sessions: Vec<(Session, usize, usize)> = Vec::new();
    for i in 0..20_usize {
        let mut session = rig.hub.session(&Client::new(None), Caller::Internal);
        // Synced ones too.
        let start = if i % 2 == 0 { 0 } else { rig.revision() + 1 };
        for watcher in 0..3 {
            // Each its own part, so that nothing is shared.
            let from = format!("k{:04}", 1 + i * 3 + watcher);
            session.watch(watcher as i64, &Shape { prev_kv, ..Shape::new(from, "\0") }, start).unwrap();
        }
        sessions.push((session, 0, 0));
    }
    rig.apply(delete_all());
    let mut outputs = 0;
    while outputs < 60 {
        for i in 0..sessions.len() {
            let (session, held, count) = &mut sessions[i];
            // What it took before has left by now.
            *held = 0;
            let Ok(Ok(output)) = timeout(Duration::from_millis(60), session.next()).await else { continue };
            let Output::Events { batch, .. } = output else { continue };
            assert!(batch.events.len() > keys - 100);
            (*held, *count) = (batch.bytes(), *count + 1);
            outputs += 1;
            let (kept, charged): (usize, u64) = (sessions.iter().map(|s| s.1).sum(), account.answers.taken());
            assert!(kept as u64 <= charged, "{kept} bytes are kept, and {charged} charged");
            assert!(charged <= account.answers.max());
        }
    }
    assert!(sessions.iter().all(|(_, _, count)| *count == 3));
    drop(sessions);
    turns(|| rig.hub.watchers() == 0).await;
    assert_eq!(account.answers.taken(), 0);
}

/// Clients wait for their turns with what is long; the member's own tasks do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hub_goes_on_while_a_thousand_clients_wait_for_their_turn() {
    let env = Env::real();
    let mut rig = Rig::on(env.clone(), WIDE, Account::new(1 << 30, 1 << 30, 200_000));
    let (begin, begun) = sync_channel(2);
    let mut releases = Vec::new();
    for asker in 0..2 {
        let ((release, released), begin, env) = (sync_channel::<()>(0), begin.clone(), env.clone());
        releases.push(release);
        rig.env.spawn(async move {
            let work = move || {
                begin.send(()).unwrap();
                let _ = released.recv();
            };
            env.in_place_for(Asker::of_host(asker), work).await;
        });
    }
    for _ in 0..2 {
        begun.recv().unwrap();
    }
    let waiting: Vec<_> = (0..1000)
        .map(|asker| {
            let env = env.clone();
            rig.env.spawn(async move { env.in_place_for(Asker::of_host(asker), || asker).await })
        })
        .collect();
    while env.in_place_waiting() < 1000 {
        tokio::task::yield_now().await;
    }
    let mut session = rig.session(&Shape { prev_kv: true, ..everything() }, 0);
    for i in 0..5000 {
        rig.put(&format!("k{i}"), "");
    }
    let deleted = rig.revision() + 1;
    rig.apply(delete_all());
    let wait = async {
        session.delivered_after(deleted - 1).await;
    };
    timeout(Duration::from_secs(60), wait).await.expect("the hub goes on");
    drop(releases);
    for (asker, waited) in (0..).zip(waiting) {
        assert_eq!(waited.await.unwrap(), asker);
    }
    let mut events = 0;
    while events < 10_000 {
        if let Output::Events { batch, .. } = session.next().await.unwrap() {
            events += batch.events.len();
        }
    }
    drop(session);
    env.stop(Duration::from_secs(60)).await;
}
