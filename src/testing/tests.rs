//! The checkers' own tests: what must pass passes, what must be found is found.

use super::history::{Action, Answer, Effect, Event, Is, Kv, NEVER, Op, Outcome, Request, Span, Stamp};
use super::linear::{self, Kind, Model, Places, Verdict};
use super::model::{self, Store};
use super::watch::{Message, Watched};
use super::{lease, picture, watch};

mod long;

const STEPS: u64 = 1_000_000;

fn op(client: u64, called: Stamp, returned: Stamp, request: Request, outcome: Outcome) -> Op {
    Op { client, member: 0, called, returned, request, outcome }
}

fn put(key: &str, value: &str) -> Request {
    Request::Do(Action::Put { key: key.into(), value: value.into() })
}

fn get(key: &str) -> Request {
    Request::Do(Action::Get(Span::one(key)))
}

fn done(revision: i64) -> Outcome {
    Outcome::Answered(Answer { revision, succeeded: false, effects: vec![Effect::Put] })
}

/// `a` at a revision, written there for the `version`th time.
fn a(value: &str, at: i64, version: i64) -> Kv {
    Kv { key: "a".into(), value: value.into(), create_revision: at + 1 - version, mod_revision: at, version }
}

fn got(revision: i64, kvs: &[Kv]) -> Outcome {
    Outcome::Answered(Answer { revision, succeeded: false, effects: vec![Effect::Got(kvs.to_vec())] })
}

fn verdicts(ops: &[Op]) -> (bool, bool) {
    let by_revision = model::check(ops, &[], STEPS);
    assert_ne!(by_revision, Verdict::Undecided);
    (by_revision.is_linearizable(), model::check_values(ops, STEPS).is_ok())
}

#[test]
fn histories_that_one_order_explains_are_linearizable() {
    let concurrent = [
        op(1, 1, 10, put("a", "1"), done(2)),
        op(2, 2, 9, put("a", "2"), done(3)),
        // Called before either write returned: old, in between and new are all right.
        op(3, 3, 4, get("a"), got(1, &[])),
        op(4, 3, 8, get("a"), got(2, &[a("1", 2, 1)])),
        op(5, 5, 11, get("a"), got(3, &[a("2", 3, 2)])),
    ];
    assert_eq!(verdicts(&concurrent), (true, true));

    let unknown = [
        op(1, 1, NEVER, put("a", "1"), Outcome::Unknown),
        op(2, 2, 3, get("a"), got(1, &[])),
        // It takes effect long after its client gave up.
        op(2, 4, 5, get("a"), got(2, &[a("1", 2, 1)])),
        op(3, 1, NEVER, put("a", "never"), Outcome::Unknown),
    ];
    assert_eq!(verdicts(&unknown), (true, true));
}

/// Nobody was answered after it: the watcher alone knows that it took effect.
#[test]
fn a_lost_write_at_the_end_that_a_watcher_saw_is_of_the_history() {
    let ops = [
        op(1, 1, 2, put("a", "1"), done(2)),
        op(2, 3, NEVER, put("a", "never"), Outcome::Unknown),
        op(3, 3, NEVER, put("a", "2"), Outcome::Unknown),
        op(4, 3, NEVER, put("b", "1"), Outcome::Unknown),
    ];
    let watch = |ops: &[Op], kvs: &[Kv]| {
        let messages = kvs.iter().map(|kv| Message::Events { events: vec![Event::Put(kv.clone())], fragment: false });
        let (span, messages) = (Span::one("a"), messages.collect());
        let watched = Watched { span, start: 2, puts: true, deletes: true, messages, complete_to: None };
        super::verdict::history("end", ops, &[watched]).map(|steps| steps.is_some()).map_err(|broken| broken.check)
    };
    let twice = Kv { create_revision: 2, ..a("2", 3, 2) };
    assert_eq!(watch(&ops, &[a("1", 2, 1), twice.clone()]), Ok(true));
    let later = Kv { mod_revision: 4, ..twice };
    assert_eq!(watch(&ops, &[a("1", 2, 1), later]), Ok(true), "what nobody saw may have been in between");
    let nobodys = Kv { create_revision: 2, ..a("3", 3, 2) };
    assert_eq!(watch(&ops, &[a("1", 2, 1), nobodys]), Err("watch".into()));
    assert_eq!(watch(&[], &[a("1", 2, 1)]), Err("watch".into()), "where nobody was answered at all");
}

#[test]
fn stale_read_is_found() {
    let ops = [op(1, 1, 2, put("a", "1"), done(2)), op(2, 3, 4, get("a"), got(1, &[]))];
    assert_eq!(verdicts(&ops), (false, false));
}

#[test]
fn lost_write_is_found() {
    let ops = [
        op(1, 1, 2, put("a", "1"), done(2)),
        op(1, 3, 4, put("a", "2"), done(3)),
        op(2, 5, 6, get("a"), got(3, &[a("1", 2, 1)])),
    ];
    assert_eq!(verdicts(&ops), (false, false));
}

/// By values alone nothing is wrong: revisions and versions tell.
#[test]
fn write_applied_twice_is_found() {
    let twice = Kv { create_revision: 2, ..a("1", 3, 2) };
    let ops = [op(1, 1, 2, put("a", "1"), done(3)), op(2, 3, 4, get("a"), got(3, &[twice]))];
    assert_eq!(verdicts(&ops), (false, true));
}

#[test]
fn reordered_transactions_are_found() {
    let swap = |from: &str, to: &str| Request::Txn {
        compare: vec![("a".into(), Is::Value(from.into()))],
        then: vec![Action::Put { key: "a".into(), value: to.into() }],
        or: vec![],
    };
    let taken = |revision| Outcome::Answered(Answer { revision, succeeded: true, effects: vec![Effect::Put] });
    let right = [
        op(1, 1, 2, put("a", "1"), done(2)),
        op(1, 3, 4, swap("1", "2"), taken(3)),
        op(2, 5, 6, swap("2", "3"), taken(4)),
    ];
    assert_eq!(verdicts(&right), (true, true));
    let reordered = [
        op(1, 1, 2, put("a", "1"), done(2)),
        op(1, 3, 4, swap("2", "3"), taken(4)),
        op(2, 5, 6, swap("1", "2"), taken(3)),
    ];
    assert_eq!(verdicts(&reordered), (false, false));
}

#[test]
fn read_from_the_future_is_found() {
    let ops = [op(2, 1, 2, get("a"), got(2, &[a("1", 2, 1)])), op(1, 3, 4, put("a", "1"), done(2))];
    assert_eq!(verdicts(&ops), (false, false));
}

/// A serializable read may be old, but never of a history that did not happen.
#[test]
fn serializable_read_is_old_at_most() {
    let local = |outcome| op(2, 5, 6, Request::GetLocal(Span::one("a")), outcome);
    let writes = [op(1, 1, 2, put("a", "1"), done(2)), op(1, 3, 4, put("a", "2"), done(3))];
    let with = |outcome| [writes[0].clone(), writes[1].clone(), local(outcome)];
    assert!(model::check(&with(got(2, &[a("1", 2, 1)])), &[], STEPS).is_linearizable(), "old");
    assert!(!model::check(&with(got(2, &[a("2", 2, 1)])), &[], STEPS).is_linearizable(), "never so");
    assert!(!model::check(&with(got(3, &[])), &[], STEPS).is_linearizable(), "of another member's history");
    let early =
        [op(2, 1, 2, Request::GetLocal(Span::one("a")), got(2, &[a("1", 2, 1)])), op(1, 3, 4, put("a", "1"), done(2))];
    assert!(!model::check(&early, &[], STEPS).is_linearizable(), "from the future");
    assert!(!model::check(&[local(got(9, &[a("9", 9, 1)]))], &[], STEPS).is_linearizable(), "invented");
    let at = op(2, 5, 6, Request::GetAt(Span::one("a"), 2), got(3, &[a("1", 2, 1)]));
    assert!(model::check(&[writes[0].clone(), writes[1].clone(), at], &[], STEPS).is_linearizable());
}

#[test]
fn keys_that_no_operation_joins_are_checked_apart() {
    let range = Request::Do(Action::Get(Span::range("a", "c")));
    let apart =
        [op(1, 1, 2, put("a", "1"), done(2)), op(1, 3, 4, put("b", "1"), done(3)), op(1, 5, 6, get("d"), got(3, &[]))];
    assert_eq!(model::partition(&apart).len(), 3);
    let joined = [apart.to_vec(), vec![op(1, 7, 8, range, got(3, &[]))]].concat();
    assert_eq!(model::partition(&joined).len(), 2);
}

#[test]
fn violation_is_narrowed_to_what_it_takes_and_drawn() {
    let mut ops = Vec::new();
    for n in 0..20 {
        ops.push(op(1, 4 * n + 1, 4 * n + 2, put("b", &n.to_string()), done(n as i64 + 2)));
    }
    ops.push(op(1, 100, 101, put("a", "1"), done(22)));
    ops.push(op(2, 102, 103, get("a"), got(21, &[])));
    ops.push(op(1, 104, 105, put("a", "2"), done(23)));
    let narrowed = model::narrow(&ops, &[], STEPS);
    assert_eq!(narrowed.ops.len(), 22, "what came after does not matter");
    assert_eq!(narrowed.core, [20, 21], "the write, and the read that did not see it");
    let svg = picture::svg("a stale <read>", &narrowed);
    assert!(svg.contains("a stale &lt;read&gt;") && svg.contains("client 2"), "{svg}");
    assert_eq!(svg.matches("#ffb3b3").count(), 2, "{svg}");
    assert!(svg.matches("<rect").count() < 12, "what is long before is left out: {svg}");
}

/// Plays random requests one after another, and gives each an interval around its moment; some lose their answer.
fn random_history(random: &mut fastrand::Rng, revisions: bool, may_lose: bool) -> Vec<Op> {
    let mut store = Store::default();
    let mut ops = Vec::new();
    for n in 0..random.u64(5..60) {
        let key = |random: &mut fastrand::Rng| ["a", "b", "c"][random.usize(..3)].to_owned();
        let request = match random.u8(..8) {
            0..3 => Request::Do(Action::Put { key: key(random), value: n.to_string() }),
            3 => Request::Do(Action::Delete(Span::one(&key(random)))),
            4 if revisions => Request::Txn {
                compare: vec![(key(random), Is::Version(random.i64(..3)))],
                then: vec![Action::Put { key: key(random), value: n.to_string() }, Action::Get(Span::range("a", "d"))],
                or: vec![Action::Delete(Span::range("a", "c"))],
            },
            5 if revisions => Request::Do(Action::Get(Span::range("a", "d"))),
            _ => Request::Do(Action::Get(Span::one(&key(random)))),
        };
        let (mut after, answer) = store.execute(&request);
        let at = 100 * n + 100;
        let (called, returned) = (at - random.u64(..99), at + random.u64(..400));
        let read = op(0, 0, 0, request.clone(), Outcome::Unknown).is_read();
        let lost = may_lose && !read && random.u8(..8) == 0;
        if lost && random.bool() {
            after = store.clone();
        }
        let outcome = if lost { Outcome::Unknown } else { Outcome::Answered(answer) };
        ops.push(op(n % 4, called, if lost { NEVER } else { returned }, request, outcome));
        store = after;
    }
    ops
}

#[test]
fn histories_of_a_sequential_store_pass_and_changed_ones_are_found() {
    let seed = std::env::var("QUORATE_CHECKER_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("QUORATE_CHECKER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut found, mut changed) = (0, 0);
    for round in 0..600 {
        let ops = random_history(&mut random, true, true);
        assert!(model::check(&ops, &[], STEPS).is_linearizable(), "round {round}: {ops:#?}");
        let plain = random_history(&mut random, false, true);
        assert!(model::check_values(&plain, STEPS).is_ok(), "round {round}: {plain:#?}");
        // What was lost could explain a change.
        let ops = random_history(&mut random, true, false);
        let mut ops = ops;
        if !change(&mut random, &mut ops) {
            continue;
        }
        changed += 1;
        found += u32::from(!model::check(&ops, &[], STEPS).is_linearizable());
    }
    assert_eq!(found, changed, "each change is a history that cannot have been");
}

/// Changes what some read has seen; false if none has seen anything.
fn change(random: &mut fastrand::Rng, ops: &mut [Op]) -> bool {
    let reads: Vec<usize> = (0..ops.len()).filter(|at| ops[*at].seen().next().is_some()).collect();
    if reads.is_empty() {
        return false;
    }
    let at = reads[random.usize(..reads.len())];
    let Outcome::Answered(answer) = &mut ops[at].outcome else { unreachable!("it has seen something") };
    let kvs = answer.effects.iter_mut().find_map(|effect| match effect {
        Effect::Got(kvs) if !kvs.is_empty() => Some(kvs),
        _ => None,
    });
    let kvs = kvs.expect("it has seen something");
    match random.u8(..4) {
        0 => drop(kvs.pop()),
        1 => kvs[0].value.push('x'),
        2 => kvs[0].version += 1,
        _ => kvs[0].mod_revision -= 1,
    }
    true
}

/// The model without its knowledge of places: then the search tries everything everywhere.
struct Anywhere(model::KvModel);

impl Model for Anywhere {
    type Op = Op;
    type State = Store;
    type Request = Request;

    fn initial(&self) -> Store {
        self.0.initial()
    }

    fn step(&self, store: &Store, op: &Op) -> Option<Store> {
        self.0.step(store, op)
    }

    fn interval(&self, op: &Op) -> (Stamp, Stamp) {
        self.0.interval(op)
    }

    fn kind(&self, op: &Op) -> Kind {
        self.0.kind(op)
    }

    fn lost<'a>(&self, _: &'a Op) -> Option<&'a Request> {
        None
    }

    fn places(&self, _: &Op) -> Places {
        Places::All
    }

    fn place(&self, store: &Store) -> i64 {
        self.0.place(store)
    }

    fn is_unheard(&self, _: i64) -> bool {
        false
    }
}

/// With lost answers, watchers that saw a part, and changes that nothing explains or something lost does.
#[test]
fn what_is_known_of_places_changes_no_verdict() {
    let seed = std::env::var("QUORATE_CHECKER_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("QUORATE_CHECKER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut verdicts = [0; 3];
    for round in 0..600 {
        let mut ops = random_history(&mut random, true, true);
        let mut seen = Vec::new();
        if let Verdict::Linearizable { order, .. } = model::check(&ops, &[], STEPS) {
            let stores = model::replay(&ops, &order);
            for pair in stores.windows(2).filter(|_| random.u8(..4) == 0) {
                seen.extend(pair[1].events_since(&pair[0]));
            }
        }
        for _ in 0..random.u8(..3) {
            change(&mut random, &mut ops);
        }
        let with = linear::check(&model::KvModel::new(&ops, &seen), &ops, STEPS);
        let without = linear::check(&Anywhere(model::KvModel::new(&ops, &seen)), &ops, STEPS);
        let at = match (&with, &without) {
            (Verdict::Linearizable { .. }, Verdict::Linearizable { .. }) => 0,
            (Verdict::Violation { .. }, Verdict::Violation { .. }) => 1,
            (Verdict::Undecided, _) | (_, Verdict::Undecided) => 2,
            _ => panic!("round {round}: {with:?}, and without the knowledge {without:?}: {ops:#?}"),
        };
        verdicts[at] += 1;
    }
    println!("good, bad, undecided: {verdicts:?}");
    assert!(verdicts[0] > 100 && verdicts[1] > 100 && verdicts[2] < 30, "{verdicts:?}");
}

fn stores() -> Vec<Store> {
    let requests = [
        put("a", "1"),
        put("b", "1"),
        Request::Txn {
            compare: vec![],
            then: vec![
                Action::Put { key: "a".into(), value: "2".into() },
                Action::Put { key: "b".into(), value: "2".into() },
            ],
            or: vec![],
        },
        Request::Do(Action::Delete(Span::one("a"))),
        put("a", "3"),
    ];
    let mut stores = vec![Store::default()];
    for request in requests {
        stores.push(stores.last().unwrap().execute(&request).0);
    }
    stores
}

fn events(stores: &[Store], revisions: std::ops::RangeInclusive<i64>) -> Vec<Event> {
    revisions.flat_map(|revision| stores[revision as usize - 1].events_since(&stores[revision as usize - 2])).collect()
}

fn watched(start: i64, messages: Vec<Vec<Event>>) -> Watched {
    let messages = messages.into_iter().map(|events| Message::Events { events, fragment: false }).collect();
    Watched { span: Span::range("a", "z"), start, puts: true, deletes: true, messages, complete_to: None }
}

#[test]
fn watch_that_keeps_its_promises_passes() {
    let stores = stores();
    let all = watched(2, vec![events(&stores, 2..=2), events(&stores, 3..=4), events(&stores, 5..=6)]);
    assert_eq!(watch::check(&all, &stores), Ok(()));
    let resumed = watched(4, vec![events(&stores, 4..=4), events(&stores, 5..=5)]);
    assert_eq!(watch::check(&resumed, &stores), Ok(()), "up to what was sent");
    let mut one = watched(2, vec![events(&stores, 2..=2)]);
    one.span = Span::one("a");
    one.messages.push(Message::Progress(3));
    assert_eq!(watch::check(&one, &stores), Ok(()), "revision 3 is of another key");
    let atomic = events(&stores, 4..=4);
    let mut fragments = watched(4, Vec::new());
    fragments.messages = vec![
        Message::Events { events: atomic[..1].to_vec(), fragment: true },
        Message::Events { events: atomic[1..].to_vec(), fragment: false },
    ];
    assert_eq!(watch::check(&fragments, &stores), Ok(()));
}

#[test]
fn each_broken_promise_of_a_watch_is_named() {
    use watch::Broken;
    let stores = stores();
    let at = |revision: i64| events(&stores, revision..=revision);
    let check = |watched: Watched| watch::check(&watched, &stores).unwrap_err();
    assert!(matches!(check(watched(2, vec![at(3), at(2)])), Broken::Order { later: 3, earlier: 2 }));
    assert!(matches!(check(watched(2, vec![at(2), at(2)])), Broken::Twice { .. }));
    assert!(matches!(check(watched(2, vec![at(2), at(4)])), Broken::Missing { sent: 4, .. }));
    assert!(matches!(check(watched(4, vec![at(4)[..1].to_vec(), at(4)[1..].to_vec()])), Broken::Torn { revision: 4 }));
    assert!(matches!(check(watched(4, vec![at(4)[..1].to_vec()])), Broken::Missing { sent: 4, .. }));
    assert!(matches!(check(watched(3, vec![at(2)])), Broken::TooOld { start: 3, .. }));
    let invented = Event::Put(a("x", 2, 1));
    assert!(matches!(check(watched(2, vec![vec![invented.clone()]])), Broken::Invented { .. }));
    assert!(matches!(check(watched(9, vec![vec![Event::Put(a("x", 9, 1))]])), Broken::Invented { .. }));
    let mut told = watched(2, vec![at(2)]);
    told.messages.push(Message::Progress(4));
    assert!(matches!(check(told.clone()), Broken::Missing { sent: 4, .. }));
    told.messages.push(Message::Events { events: at(4), fragment: false });
    assert!(matches!(check(told), Broken::Bookmark { told: 4, .. }));
    let mut short = watched(2, vec![at(2)]);
    short.complete_to = Some(3);
    assert!(matches!(check(short), Broken::Missing { sent: 3, .. }));
}

#[test]
fn lease_that_ends_early_or_without_a_quorum_is_found() {
    use std::time::Duration;

    use lease::{Broken, Outage, Step, Story};
    let s = Duration::from_secs;
    let renewed = |called| Step::Renewed { called: s(called), ttl: s(10) };
    let gone = |seen| Step::Gone { seen: s(seen) };
    let check = |steps: &[Step], outages: &[Outage]| {
        lease::check(&[(7, Story { steps: steps.to_vec() })].into(), outages, Duration::from_millis(100))
    };
    assert_eq!(check(&[renewed(0), gone(10)], &[]), Ok(()));
    assert_eq!(check(&[renewed(0), renewed(5), gone(15)], &[]), Ok(()));
    assert_eq!(check(&[renewed(0), Step::Revoked { called: s(1) }, gone(2)], &[]), Ok(()));
    assert!(matches!(check(&[renewed(0), renewed(5), gone(12)], &[]), Err(Broken::Early { lease: 7, .. })));
    let outage = Outage { from: s(8), to: s(20) };
    assert!(matches!(check(&[renewed(0), gone(12)], &[outage]), Err(Broken::NoQuorum { .. })));
    assert_eq!(check(&[renewed(0), gone(21)], &[outage]), Ok(()));
    assert!(matches!(check(&[renewed(0), gone(11), renewed(12)], &[]), Err(Broken::Revived { .. })));
}
