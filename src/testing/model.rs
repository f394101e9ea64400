//! What a history of etcd's KV service must look like: a sequential store whose revisions are part of what is checked.
//!
//! Every write makes the next revision, and answers carry revisions: so the order of all acknowledged writes is known, and the
//! search of `linear` has a choice only where a write of unknown outcome may have been. What anybody saw of a revision (in any read,
//! also a serializable one or one at an old revision, and in any watch) is collected first and must hold of that revision in
//! the order that is found: there is one history, and all reads are of it.
//!
//! Invariant: [`KvModel::step`] is deterministic. [`Values`] is the model for histories whose revisions are not trusted or not
//! known; it splits by key.
//! Absent: leases on keys; compaction, which only refuses reads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Bound;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::history::{Action, Answer, Effect, Event, Is, Kv, NEVER, Op, Outcome, Request, Span, Stamp};
use super::linear::{Kind, Model, Places, Verdict};

/// The store after some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    pub revision: i64,
    /// The sum of the hashes of all versions in `keys`: what changes it is what changes.
    sum: u64,
    keys: OrdMap<Arc<str>, Arc<Kv>>,
}

impl Default for Store {
    /// As etcd begins.
    fn default() -> Self {
        Self::new(1, [])
    }
}

impl Hash for Store {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.revision.hash(state);
        self.sum.hash(state);
    }
}

fn hash_of(kv: &Kv) -> u64 {
    let mut hasher = DefaultHasher::new();
    kv.hash(&mut hasher);
    hasher.finish()
}

impl Store {
    fn new(revision: i64, kvs: impl IntoIterator<Item = Kv>) -> Self {
        let mut store = Self { revision, sum: 0, keys: OrdMap::new() };
        kvs.into_iter().for_each(|kv| store.insert(kv));
        store
    }

    fn insert(&mut self, kv: Kv) {
        self.sum = self.sum.wrapping_add(hash_of(&kv));
        if let Some(was) = self.keys.insert(kv.key.as_str().into(), Arc::new(kv)) {
            self.sum = self.sum.wrapping_sub(hash_of(&was));
        }
    }

    fn remove(&mut self, key: &str) {
        if let Some(was) = self.keys.remove(key) {
            self.sum = self.sum.wrapping_sub(hash_of(&was));
        }
    }

    pub fn kvs(&self) -> impl Iterator<Item = &Kv> {
        self.keys.values().map(|kv| &**kv)
    }

    pub fn get(&self, span: &Span) -> Vec<Kv> {
        self.within(span).map(|kv| Kv::clone(kv)).collect()
    }

    fn within(&self, span: &Span) -> impl Iterator<Item = &Arc<Kv>> {
        let key = span.key.as_str();
        let one = if span.end.is_none() { self.keys.get(key) } else { None };
        let end = span.end.as_deref().filter(|end| *end > key);
        let more =
            end.map(|end| self.keys.range::<_, str>((Bound::Included(key), Bound::Excluded(end))).map(|(_, kv)| kv));
        one.into_iter().chain(more.into_iter().flatten())
    }

    /// What changed since `before`, which is one revision older.
    pub fn events_since(&self, before: &Store) -> Vec<Event> {
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        for change in before.keys.diff(&self.keys) {
            match change {
                DiffItem::Add(_, kv) | DiffItem::Update { new: (_, kv), .. } => puts.push(Event::Put(Kv::clone(kv))),
                DiffItem::Remove(key, _) => {
                    deletes.push(Event::Delete { key: key.to_string(), mod_revision: self.revision });
                }
            }
        }
        puts.append(&mut deletes);
        puts
    }

    fn apply(&mut self, action: &Action, wrote: &mut bool) -> Effect {
        let next = self.revision + 1;
        match action {
            Action::Put { key, value } => {
                let was = self.keys.get(key.as_str());
                let kv = Kv {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision: was.map_or(next, |was| was.create_revision),
                    mod_revision: next,
                    version: was.map_or(1, |was| was.version + 1),
                };
                self.insert(kv);
                *wrote = true;
                Effect::Put
            }
            Action::Delete(span) => {
                let doomed: Vec<Arc<Kv>> = self.within(span).cloned().collect();
                for kv in &doomed {
                    self.remove(&kv.key);
                }
                *wrote |= !doomed.is_empty();
                Effect::Deleted(doomed.len() as i64)
            }
            Action::Get(span) => Effect::Got(self.get(span)),
        }
    }

    fn holds(&self, key: &str, is: &Is) -> bool {
        let kv = self.keys.get(key);
        match is {
            Is::ModRevision(revision) => kv.map_or(0, |kv| kv.mod_revision) == *revision,
            Is::Version(version) => kv.map_or(0, |kv| kv.version) == *version,
            Is::Value(value) => kv.is_some_and(|kv| kv.value == *value),
        }
    }

    /// Carries out a request, and answers as the server must.
    pub fn execute(&self, request: &Request) -> (Self, Answer) {
        let mut after = self.clone();
        let mut wrote = false;
        let (succeeded, effects) = match request {
            Request::Do(action) => (false, vec![after.apply(action, &mut wrote)]),
            Request::Txn { compare, then, or } => {
                let succeeded = compare.iter().all(|(key, is)| self.holds(key, is));
                let actions = if succeeded { then } else { or };
                (succeeded, actions.iter().map(|action| after.apply(action, &mut wrote)).collect())
            }
            Request::GetAt(span, _) | Request::GetLocal(span) => (false, vec![Effect::Got(self.get(span))]),
            Request::Compact(_) => (false, Vec::new()),
        };
        after.revision += i64::from(wrote);
        let answer = Answer { revision: after.revision, succeeded, effects };
        (after, answer)
    }
}

/// What is known of one revision without knowing the order.
#[derive(Default)]
struct Known {
    /// An acknowledged write made it: no other can have.
    taken: bool,
    /// Somebody saw a version that it made, or a key that it deleted.
    puts: BTreeMap<String, Kv>,
    deletes: BTreeSet<String>,
    /// What keys in a span were when it was the newest one.
    reads: Vec<(Span, Vec<Kv>)>,
}

impl Known {
    fn is_change(&self) -> bool {
        self.taken || !self.puts.is_empty() || !self.deletes.is_empty()
    }
}

/// The KV service with its revisions.
#[derive(Default)]
pub struct KvModel {
    known: HashMap<i64, Known>,
    /// Revisions that no acknowledged write made, by what was seen of them.
    put_at: HashMap<(String, String), Vec<i64>>,
    deleted_at: BTreeMap<String, Vec<i64>>,
}

impl KvModel {
    /// A model for `ops`, whose reads and the events of whose watches are to be of one history.
    pub fn new<'a>(ops: impl IntoIterator<Item = &'a Op>, events: impl IntoIterator<Item = &'a Event>) -> Self {
        let mut model = Self::default();
        for op in ops {
            model.learn(op);
        }
        for event in events {
            match event {
                Event::Put(kv) => model.saw(kv),
                Event::Delete { key, mod_revision } => {
                    model.known.entry(*mod_revision).or_default().deletes.insert(key.clone());
                }
            }
        }
        for (&revision, known) in model.known.iter().filter(|(_, known)| !known.taken) {
            for kv in known.puts.values() {
                model.put_at.entry((kv.key.clone(), kv.value.clone())).or_default().push(revision);
            }
            for key in &known.deletes {
                model.deleted_at.entry(key.clone()).or_default().push(revision);
            }
        }
        model
    }

    /// The revisions that these actions may have made, of those that no acknowledged write made and of which something was seen.
    fn may_have_made(&self, actions: &[Action]) -> BTreeSet<i64> {
        let mut revisions = BTreeSet::new();
        for action in actions {
            match action {
                Action::Put { key, value } => {
                    revisions.extend(self.put_at.get(&(key.clone(), value.clone())).into_iter().flatten());
                }
                Action::Delete(span) => {
                    let from = self.deleted_at.range::<str, _>((Bound::Included(&*span.key), Bound::Unbounded));
                    revisions.extend(from.take_while(|(key, _)| span.holds(key)).flat_map(|(_, at)| at));
                }
                Action::Get(_) => {}
            }
        }
        revisions.retain(|revision| {
            let known = &self.known[revision];
            let puts = |kv: &Kv| {
                actions
                    .iter()
                    .any(|action| matches!(action, Action::Put { key, value } if *key == kv.key && *value == kv.value))
            };
            let deletes =
                |key: &String| actions.iter().any(|action| matches!(action, Action::Delete(span) if span.holds(key)));
            known.puts.values().all(puts) && known.deletes.iter().all(deletes)
        });
        revisions
    }

    fn saw(&mut self, kv: &Kv) {
        self.known.entry(kv.mod_revision).or_default().puts.insert(kv.key.clone(), kv.clone());
    }

    fn learn(&mut self, op: &Op) {
        let Some(answer) = op.answer() else { return };
        if writes(answer) {
            self.known.entry(answer.revision).or_default().taken = true;
        }
        // A transaction's reads see its own writes; those of a transaction are compared when it is carried out.
        for kv in op.seen().filter(|kv| kv.mod_revision <= answer.revision) {
            self.saw(kv);
        }
        let (span, revision) = match &op.request {
            Request::Do(Action::Get(span)) | Request::GetLocal(span) => (span, answer.revision),
            Request::GetAt(span, revision) => (span, *revision),
            _ => return,
        };
        if let [Effect::Got(kvs)] = answer.effects.as_slice() {
            self.known.entry(revision).or_default().reads.push((span.clone(), kvs.clone()));
        }
    }

    /// Whether `after`, which follows on `before`, is what everybody saw of its revision.
    fn fits(&self, before: &Store, after: &Store) -> bool {
        let Some(known) = self.known.get(&after.revision) else { return true };
        let is_deleted = |key: &String| before.keys.contains_key(&**key) && !after.keys.contains_key(&**key);
        known.puts.values().all(|kv| after.keys.get(&*kv.key).is_some_and(|is| **is == *kv))
            && known.deletes.iter().all(is_deleted)
            && known.reads.iter().all(|(span, kvs)| after.within(span).map(|kv| &**kv).eq(kvs))
    }
}

fn writes(answer: &Answer) -> bool {
    answer.effects.iter().any(|effect| match effect {
        Effect::Put => true,
        Effect::Deleted(deleted) => *deleted > 0,
        Effect::Got(_) => false,
    })
}

impl Model for KvModel {
    type Op = Op;
    type State = Store;
    type Request = Request;

    fn initial(&self) -> Store {
        Store::default()
    }

    fn step(&self, store: &Store, op: &Op) -> Option<Store> {
        match (&op.outcome, &op.request) {
            (Outcome::Refused(_), _) | (_, Request::Compact(_)) => Some(store.clone()),
            // What it saw is compared at that revision; the header tells how new the member was.
            (Outcome::Answered(answer), Request::GetAt(..) | Request::GetLocal(_)) => {
                (answer.revision == store.revision).then(|| store.clone())
            }
            (Outcome::Answered(answer), request) => {
                if answer.revision > store.revision + 1 || answer.revision < store.revision {
                    return None;
                }
                let (after, right) = store.execute(request);
                (right == *answer && (after.revision == store.revision || self.fits(store, &after))).then_some(after)
            }
            (Outcome::Unknown, request) => {
                if op.is_read() || self.known.get(&(store.revision + 1)).is_some_and(|known| known.taken) {
                    return None;
                }
                let (after, _) = store.execute(request);
                // Without effect it need not have been.
                (after.revision > store.revision && self.fits(store, &after)).then_some(after)
            }
        }
    }

    fn interval(&self, op: &Op) -> (Stamp, Stamp) {
        match op.request {
            // It may be of any time before.
            Request::GetLocal(_) => (0, op.returned),
            _ => (op.called, op.returned),
        }
    }

    fn kind(&self, op: &Op) -> Kind {
        match &op.outcome {
            Outcome::Refused(_) => Kind::Still,
            Outcome::Unknown if op.is_read() || matches!(op.request, Request::Compact(_)) => Kind::Still,
            Outcome::Unknown => Kind::Open,
            // The next revision is its own.
            Outcome::Answered(answer) if writes(answer) => Kind::Sure,
            Outcome::Answered(_) => Kind::Still,
        }
    }

    fn lost<'a>(&self, op: &'a Op) -> Option<&'a Request> {
        (op.outcome == Outcome::Unknown).then_some(&op.request)
    }

    fn places(&self, op: &Op) -> Places {
        // A place is the revision before.
        let before = |revisions: BTreeSet<i64>| revisions.into_iter().map(|revision| revision - 1).collect();
        match (&op.outcome, &op.request) {
            (Outcome::Refused(_), _) | (_, Request::Compact(_)) => Places::All,
            (Outcome::Answered(answer), _) => Places::These(vec![answer.revision - i64::from(writes(answer))]),
            (Outcome::Unknown, Request::Do(action)) if !op.is_read() => {
                Places::TheseOrUnheard(before(self.may_have_made(std::slice::from_ref(action))))
            }
            (Outcome::Unknown, Request::Txn { then, or, .. }) if !op.is_read() => {
                let mut revisions = self.may_have_made(then);
                revisions.append(&mut self.may_have_made(or));
                Places::TheseOrUnheard(before(revisions))
            }
            (Outcome::Unknown, _) => Places::These(Vec::new()),
        }
    }

    fn place(&self, store: &Store) -> i64 {
        store.revision
    }

    fn is_unheard(&self, place: i64) -> bool {
        !self.known.get(&(place + 1)).is_some_and(Known::is_change)
    }

    fn heard_to(&self) -> i64 {
        let changes = self.known.iter().filter(|(_, known)| known.is_change()).map(|(revision, _)| *revision - 1);
        changes.max().unwrap_or(i64::MIN)
    }
}

/// Checks the KV operations of a history, with the events that its watchers saw.
pub fn check(ops: &[Op], events: &[Event], steps_max: u64) -> Verdict {
    let model = KvModel::new(ops, events);
    // What everybody saw of the beginning must hold too.
    if !model.fits(&Store::default(), &Store::default()) {
        return Verdict::Violation { order: Vec::new(), stuck: first_of(ops, Store::default().revision) };
    }
    super::linear::check(&model, ops, steps_max)
}

fn first_of(ops: &[Op], revision: i64) -> usize {
    ops.iter().position(|op| op.answer().is_some_and(|answer| answer.revision == revision)).unwrap_or(0)
}

/// The store after each revision, in the order that was found: element 0 is revision 1.
pub fn replay(ops: &[Op], order: &[usize]) -> Vec<Store> {
    let mut stores = vec![Store::default()];
    for &op in order {
        let before = stores.last().expect("there is a beginning");
        let (after, _) = before.execute(&ops[op].request);
        let refused = matches!(ops[op].outcome, Outcome::Refused(_));
        if !refused && after.revision > before.revision {
            stores.push(after);
        }
    }
    stores
}

/// Keys and values without revisions: each key a register. Only puts, gets and deletes of single keys, and transactions.
pub struct Values;

/// The values of the keys that exist.
type Registers = OrdMap<String, String>;

impl Model for Values {
    type Op = Op;
    type State = Registers;
    type Request = Request;

    fn initial(&self) -> Registers {
        Registers::new()
    }

    fn step(&self, registers: &Registers, op: &Op) -> Option<Registers> {
        if matches!(op.outcome, Outcome::Refused(_)) || matches!(op.request, Request::Compact(_)) {
            return Some(registers.clone());
        }
        // The sequential store does the work; its revisions are not looked at.
        let kv = |(key, value): (&String, &String)| {
            let (key, value) = (key.clone(), value.clone());
            Kv { key, value, create_revision: 0, mod_revision: 0, version: 0 }
        };
        let store = Store::new(0, registers.iter().map(kv));
        let (after, right) = store.execute(&op.request);
        let plain = |answer: &Answer| -> (bool, Vec<Effect>) {
            let strip = |kvs: &[Kv]| {
                let bare = |kv: &Kv| Kv { create_revision: 0, mod_revision: 0, version: 0, ..kv.clone() };
                kvs.iter().map(bare).collect()
            };
            let effects = answer.effects.iter().map(|effect| match effect {
                Effect::Got(kvs) => Effect::Got(strip(kvs)),
                other => other.clone(),
            });
            (answer.succeeded, effects.collect())
        };
        let after = after.kvs().map(|kv| (kv.key.clone(), kv.value.clone())).collect();
        match &op.outcome {
            Outcome::Answered(answer) => (plain(answer) == plain(&right)).then_some(after),
            _ => (after != *registers).then_some(after),
        }
    }

    fn interval(&self, op: &Op) -> (Stamp, Stamp) {
        if matches!(op.request, Request::GetLocal(_)) { (0, op.returned) } else { (op.called, op.returned) }
    }

    fn kind(&self, op: &Op) -> Kind {
        if op.is_read() || matches!(op.outcome, Outcome::Refused(_)) { Kind::Still } else { Kind::Open }
    }

    fn lost<'a>(&self, op: &'a Op) -> Option<&'a Request> {
        (op.outcome == Outcome::Unknown).then_some(&op.request)
    }

    fn places(&self, _: &Op) -> Places {
        Places::All
    }

    fn place(&self, _: &Registers) -> i64 {
        0
    }

    fn is_unheard(&self, _: i64) -> bool {
        false
    }
}

/// Splits a history into parts that share no key: each is checked alone, and the whole is linearizable if all are.
pub fn partition(ops: &[Op]) -> Vec<Vec<Op>> {
    let mut parts: Vec<(BTreeSet<String>, Vec<&Op>)> = Vec::new();
    let all: BTreeSet<String> = ops.iter().flat_map(single_keys).collect();
    for op in ops {
        let mut keys: BTreeSet<String> = single_keys(op).into_iter().collect();
        for span in spans(op) {
            keys.extend(all.iter().filter(|key| span.holds(key)).cloned());
        }
        let (joined, apart): (Vec<_>, Vec<_>) =
            parts.into_iter().partition(|(of, _)| of.iter().any(|key| keys.contains(key)));
        let mut joint: (BTreeSet<String>, Vec<&Op>) = (keys, vec![op]);
        for (keys, ops) in joined {
            joint.0.extend(keys);
            joint.1.extend(ops);
        }
        parts = apart;
        parts.push(joint);
    }
    parts.into_iter().map(|(_, ops)| ops.into_iter().cloned().collect()).collect()
}

fn actions(op: &Op) -> Vec<&Action> {
    match &op.request {
        Request::Do(action) => vec![action],
        Request::Txn { then, or, .. } => then.iter().chain(or).collect(),
        _ => Vec::new(),
    }
}

fn spans(op: &Op) -> Vec<Span> {
    let mut spans: Vec<Span> = actions(op)
        .into_iter()
        .filter_map(|action| match action {
            Action::Get(span) | Action::Delete(span) => Some(span.clone()),
            Action::Put { .. } => None,
        })
        .collect();
    if let Request::GetAt(span, _) | Request::GetLocal(span) = &op.request {
        spans.push(span.clone());
    }
    spans
}

fn single_keys(op: &Op) -> Vec<String> {
    let mut keys: Vec<String> = spans(op).into_iter().filter(|span| span.end.is_none()).map(|span| span.key).collect();
    for action in actions(op) {
        if let Action::Put { key, .. } = action {
            keys.push(key.clone());
        }
    }
    if let Request::Txn { compare, .. } = &op.request {
        keys.extend(compare.iter().map(|(key, _)| key.clone()));
    }
    keys
}

/// As [`check`], by values alone, each part of the keys for itself. The verdict of the first part that is not linearizable,
/// with the part.
pub fn check_values(ops: &[Op], steps_max: u64) -> Result<(), (Verdict, Vec<Op>)> {
    for part in partition(ops) {
        let verdict = super::linear::check(&Values, &part, steps_max);
        if !verdict.is_linearizable() {
            return Err((verdict, part));
        }
    }
    Ok(())
}

/// The part of a history that suffices for a violation: see [`narrow`].
pub struct Narrowed {
    /// The operations that returned, or were under way, when it became impossible.
    pub ops: Vec<Op>,
    /// Which of them it takes: any other may be at any time without making it right.
    pub core: Vec<usize>,
}

/// Narrows a violation down: the shortest beginning of the history that is one, and in it the operations whose times it takes.
pub fn narrow(ops: &[Op], events: &[Event], steps_max: u64) -> Narrowed {
    let until = |end: Stamp| -> Vec<Op> {
        let begun = ops.iter().filter(|op| op.called <= end);
        let cut = begun.map(|op| match op.returned <= end {
            true => op.clone(),
            false => Op { returned: NEVER, outcome: Outcome::Unknown, ..op.clone() },
        });
        cut.collect()
    };
    let fails = |ops: &[Op]| matches!(check(ops, events, steps_max), Verdict::Violation { .. });
    let mut ends: Vec<Stamp> = ops.iter().map(|op| op.returned).filter(|at| *at != NEVER).collect();
    ends.sort_unstable();
    // A beginning of a linearizable history is linearizable: so the first bad end can be searched by halves.
    let bad = ends.partition_point(|end| !fails(&until(*end)));
    let mut short = until(ends.get(bad).copied().unwrap_or(NEVER));
    let mut core = Vec::new();
    for at in 0..short.len() {
        if short[at].outcome == Outcome::Unknown {
            continue;
        }
        let was = short[at].clone();
        let latest = short.iter().map(|op| op.returned).filter(|at| *at != NEVER).max().unwrap_or(0);
        (short[at].called, short[at].returned) = (0, latest + 1);
        if !fails(&short) {
            short[at] = was;
            core.push(at);
        }
    }
    let ops = until(ends.get(bad).copied().unwrap_or(NEVER));
    Narrowed { ops, core }
}
