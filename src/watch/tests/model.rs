//! Random histories of puts, deletes, transactions, compactions, sweeps and snapshots, with watches that begin and end at any
//! time, beside a model that keeps everything in a list.
//!
//! `QUORATE_PROPTEST_CASES` sets how many cases run (the suite: 10,000). A failing case is shrunk, and printed with its seed.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::kv::tests::model::{Model, check, delete_request, key, put_request, range_end, txn_request};

/// So small that watchers fall behind.
const TIGHT: Options = Options { stream_bytes_max: 600, stream_watchers_max: 100 };

#[derive(Clone, Debug)]
enum Step {
    Apply(Request),
    /// In percent of the present revision.
    Compact(i64),
    Sweep,
    /// A snapshot of the present takes the state's place.
    Reinstall,
    /// Adds a watcher to one of two sessions. The start is relative to the present revision, so it may be in the future.
    Watch {
        session: usize,
        shape: Shape,
        start: Option<i64>,
    },
    Cancel {
        nth: usize,
    },
    /// Takes so many outputs of a session, or all.
    Take {
        session: usize,
        count: usize,
    },
    /// The hub goes on as far as it can.
    Breathe,
}

fn shape() -> impl Strategy<Value = Shape> {
    (key(), range_end(), prop::bool::weighted(0.8), prop::bool::weighted(0.8), any::<bool>()).prop_map(
        |(key, range_end, puts, deletes, prev_kv)| Shape { puts, deletes, prev_kv, ..Shape::new(key, range_end) },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => put_request().prop_map(|r| Step::Apply(Request::Put(r))),
        3 => delete_request().prop_map(|r| Step::Apply(Request::DeleteRange(r))),
        2 => txn_request().prop_map(|r| Step::Apply(Request::Txn(r))),
        1 => (50..=100_i64).prop_map(Step::Compact),
        1 => Just(Step::Sweep),
        1 => Just(Step::Reinstall),
        4 => (0..2_usize, shape(), prop::option::of(-8..4_i64))
            .prop_map(|(session, shape, start)| Step::Watch { session, shape, start }),
        1 => (0..8_usize).prop_map(|nth| Step::Cancel { nth }),
        3 => (0..2_usize, 1..20_usize).prop_map(|(session, count)| Step::Take { session, count }),
        2 => Just(Step::Breathe),
    ]
}

/// What a watcher must see, and has seen.
struct Expected {
    shape: Shape,
    /// The first revision that it has not seen.
    next: i64,
    ended: bool,
}

/// All that `shape` is to see of the first revision from `next` on of which it sees anything.
fn next_batch(model: &Model, shape: &Shape, next: i64) -> Option<(i64, Vec<KeyValue>)> {
    let covers = |kv: &KeyValue| Model::within(kv.key(), &shape.key, &shape.range_end);
    let wanted = |kv: &KeyValue| covers(kv) && if kv.is_tombstone() { shape.deletes } else { shape.puts };
    let revision = model.events.iter().find(|(revision, kv)| *revision >= next && wanted(kv))?.0;
    let events = model.events.iter().filter(|(r, kv)| *r == revision && wanted(kv)).map(|(_, kv)| kv.clone());
    Some((revision, events.collect()))
}

struct Run {
    rig: Rig,
    model: Model,
    sessions: [Session; 2],
    watchers: BTreeMap<(usize, i64), Expected>,
    next_number: i64,
    /// Revisions that were the compacted one when a snapshot was installed.
    thinned: BTreeSet<i64>,
}

impl Run {
    fn watch(&mut self, session: usize, shape: Shape, start: Option<i64>) {
        let number = self.next_number;
        self.next_number += 1;
        let start = start.map_or(0, |relative| (self.model.revision + relative).max(1));
        let made = self.sessions[session].watch(number, &shape, start);
        if shape.is_empty() {
            assert_eq!(made, Err(Refused::EmptyRange));
            return;
        }
        assert_eq!(made.unwrap().revision, self.model.revision);
        let next = if start > 0 { start } else { self.model.revision + 1 };
        self.watchers.insert((session, number), Expected { shape, next, ended: false });
    }

    fn cancel(&mut self, nth: usize) {
        let Some((session, number)) = self.watchers.keys().nth(nth).copied() else { return };
        let was = self.watchers.remove(&(session, number)).unwrap();
        // A watcher that is told of a compaction is gone before it is told.
        assert!(self.sessions[session].cancel(number) || was.ended || was.next < self.model.compacted.max(1) + 1);
    }

    async fn take(&mut self, session: usize, count: usize) {
        for _ in 0..count {
            let next = timeout(Duration::from_millis(1), self.sessions[session].next()).await;
            let Ok(Ok(output)) = next else { return };
            self.check(session, output);
        }
    }

    fn check(&mut self, session: usize, output: Output) {
        let (number, batch) = match output {
            Output::CaughtUp => return,
            Output::Denied { watcher, error } => panic!("watcher {watcher}: {error}"),
            Output::Compacted { watcher, compacted } => {
                let Some(watcher) = self.watchers.get_mut(&(session, watcher)) else { return };
                assert!(watcher.next <= compacted && compacted <= self.model.compacted, "not lost: {}", watcher.next);
                assert!(!watcher.ended);
                watcher.ended = true;
                return;
            }
            Output::Events { watcher, batch } => (watcher, batch),
        };
        let watcher = self.watchers.get_mut(&(session, number)).expect("a watcher that was not cancelled");
        assert!(!watcher.ended, "told of a compaction already");
        let (revision, events) = next_batch(&self.model, &watcher.shape, watcher.next).expect("there is something");
        let seen: Vec<KeyValue> = batch.events.iter().map(|e| e.kv.clone().unwrap()).collect();
        if (batch.revision, &seen) != (revision, &events) {
            // Of the compacted revision, and of nothing else, a snapshot lacks something.
            let thinned = self.thinned.contains(&watcher.next) && watcher.next == revision;
            let rest =
                if batch.revision == revision { Some((revision, thin(&self.model, revision, &events))) } else { None };
            let rest = rest.or_else(|| next_batch(&self.model, &watcher.shape, revision + 1));
            assert!(thinned && rest == Some((batch.revision, seen)), "expected {revision} {events:?}, got {batch:?}");
        }
        for event in &batch.events {
            let kv = event.kv.as_ref().unwrap();
            assert_eq!(event.r#type() == EventType::Delete, kv.is_tombstone());
            // What was before, from the model; a compaction may hide it.
            let before = self.model.at(kv.key(), b"", kv.mod_revision() - 1).pop().filter(|_| kv.version() != 1);
            let hidden = kv.mod_revision() - 1 < self.model.compacted && event.prev_kv.is_none();
            let expected = before.filter(|_| watcher.shape.prev_kv);
            assert!(event.prev_kv == expected || hidden, "before {kv:?}: {:?}, expected {expected:?}", event.prev_kv);
        }
        watcher.next = batch.revision + 1;
    }
}

/// What a snapshot holds of its compacted revision: in key order, and only what lived on.
fn thin(model: &Model, revision: i64, events: &[KeyValue]) -> Vec<KeyValue> {
    let last: BTreeMap<&[u8], &KeyValue> = events.iter().map(|kv| (kv.key(), kv)).collect();
    // A watcher that leaves deletes out has not seen that a key was deleted again in the same revision.
    let is_there = |kv: &&KeyValue| !kv.is_tombstone() && !model.at(kv.key(), b"", revision).is_empty();
    last.into_values().filter(is_there).cloned().collect()
}

async fn run(steps: Vec<Step>) {
    let rig = Rig::new(TIGHT);
    let sessions =
        [rig.hub.session(&Client::default(), Caller::Internal), rig.hub.session(&Client::default(), Caller::Internal)];
    let mut run =
        Run { rig, model: Model::new(), sessions, watchers: BTreeMap::new(), next_number: 0, thinned: BTreeSet::new() };
    for step in steps {
        match step {
            Step::Apply(request) => {
                let _ = run.model.apply(&request);
                run.rig.apply(request);
            }
            Step::Compact(percent) => {
                let request = CompactionRequest { revision: run.model.revision * percent / 100, physical: false };
                let _ = run.model.apply(&Request::Compact(request));
                run.rig.apply(Request::Compact(request));
            }
            Step::Sweep => run.rig.sweep(),
            Step::Reinstall => {
                run.thinned.insert(run.model.compacted);
                run.rig.reinstall();
            }
            Step::Watch { session, shape, start } => run.watch(session, shape, start),
            Step::Cancel { nth } => run.cancel(nth),
            Step::Take { session, count } => run.take(session, count).await,
            Step::Breathe => {
                for _ in 0..8 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    // Every read at every uncompacted revision, and every watch from every start.
    run.rig.store.read(|s| check(&s.kv, &run.model));
    for start in run.model.compacted..=run.model.revision {
        for shape in [everything(), Shape { prev_kv: true, ..Shape::new("b", "d") }, Shape::of_key("a")] {
            run.watch(0, shape, Some(start - run.model.revision));
        }
    }
    for session in 0..2 {
        run.take(session, usize::MAX).await;
    }
    for ((session, number), watcher) in &run.watchers {
        let missing = next_batch(&run.model, &watcher.shape, watcher.next);
        let thinned = |(at, events): &(i64, Vec<KeyValue>)| {
            run.thinned.contains(at) && *at == watcher.next && thin(&run.model, *at, events).is_empty()
        };
        let rest = missing.as_ref().filter(|m| thinned(m)).map_or(watcher.next, |(at, _)| at + 1);
        let missing = next_batch(&run.model, &watcher.shape, rest);
        assert!(watcher.ended || missing.is_none(), "watcher {number} of session {session} lacks {missing:?}");
        if watcher.ended {
            assert!(!run.sessions[*session].contains(*number));
        }
    }
    assert_eq!(run.sessions[0].queued_bytes() + run.sessions[1].queued_bytes(), 0);
}

fn cases() -> u32 {
    std::env::var("QUORATE_PROPTEST_CASES").map_or(10_000, |n| n.parse().expect("a number of cases"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn reads_and_watches_of_any_history_are_those_of_the_model(steps in prop::collection::vec(step(), 0..24)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(run(steps));
    }
}
