//! Random commands against a model that keeps every version in a plain map and looks at all of them each time.
//!
//! `QUORATE_PROPTEST_CASES` sets how many cases run.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::kv::history::cost;
use crate::kv::tree::Sums;
use crate::kv::{ChangesFrom, Loader};
use crate::pb::Fields;
use crate::pb::etcd::compare::TargetUnion;
use crate::pb::etcd::response_op::Response as OpResponse;
use crate::pb::log::{LeaseCheckpoint as Checkpoints, LeaseRevoke, change};

/// Everything that ever happened; nothing is ever removed.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) revision: i64,
    pub(crate) compacted: i64,
    /// The versions of each key with the revision that wrote them; `None` is a deletion.
    keys: BTreeMap<Bytes, Vec<(i64, Option<KeyValue>)>>,
    pub(crate) events: Vec<(i64, KeyValue)>,
    /// Granted and left time of each lease.
    leases: BTreeMap<i64, (i64, i64)>,
    /// True inside a command that has written.
    wrote: bool,
}

impl Model {
    pub(crate) fn new() -> Self {
        let (keys, events, leases) = Default::default();
        Self { revision: 1, compacted: 0, keys, events, leases, wrote: false }
    }

    fn present(&self) -> i64 {
        self.revision + i64::from(self.wrote)
    }

    fn header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { revision: self.present(), ..ResponseHeader::default() })
    }

    pub(crate) fn within(key: &[u8], from: &[u8], range_end: &[u8]) -> bool {
        match range_end {
            [] => key == from,
            [0] => key >= from,
            end => key >= from && key < end,
        }
    }

    pub(crate) fn at(&self, from: &[u8], range_end: &[u8], revision: i64) -> Vec<KeyValue> {
        let last = |versions: &Vec<(i64, Option<KeyValue>)>| {
            versions.iter().rev().find(|v| v.0 <= revision).and_then(|v| v.1.clone())
        };
        self.keys.iter().filter(|(k, _)| Self::within(k, from, range_end)).filter_map(|(_, v)| last(v)).collect()
    }

    fn now(&self, from: &[u8], range_end: &[u8]) -> Vec<KeyValue> {
        self.at(from, range_end, i64::MAX)
    }

    fn write(&mut self, key: &Bytes, kv: Option<KeyValue>) {
        let revision = self.revision + 1;
        self.wrote = true;
        self.events.push((revision, kv.clone().unwrap_or_else(|| KeyValue::tombstone(key, revision))));
        self.keys.entry(key.clone()).or_default().push((revision, kv));
    }

    fn range(&self, r: &RangeRequest) -> Result<RangeResponse, Error> {
        if r.revision > self.revision {
            return Err(Error::FutureRevision);
        }
        if r.revision > 0 && r.revision < self.compacted {
            return Err(Error::Compacted);
        }
        let revision = if r.revision > 0 { r.revision } else { i64::MAX };
        let mut kvs = self.at(&r.key, &r.range_end, revision);
        let count = kvs.len() as i64;
        if r.count_only {
            return Ok(RangeResponse { header: self.header(), count, ..RangeResponse::default() });
        }
        kvs.retain(|kv| {
            (r.min_mod_revision == 0 || kv.mod_revision() >= r.min_mod_revision)
                && (r.max_mod_revision == 0 || kv.mod_revision() <= r.max_mod_revision)
                && (r.min_create_revision == 0 || kv.create_revision() >= r.min_create_revision)
                && (r.max_create_revision == 0 || kv.create_revision() <= r.max_create_revision)
        });
        let order = |a: &KeyValue, b: &KeyValue| match r.sort_target {
            0 => a.key().cmp(b.key()),
            1 => a.version().cmp(&b.version()),
            2 => a.create_revision().cmp(&b.create_revision()),
            3 => a.mod_revision().cmp(&b.mod_revision()),
            _ => a.value().cmp(b.value()),
        };
        kvs.sort_by(|a, b| if r.sort_order == 2 { order(b, a) } else { order(a, b) });
        let more = r.limit > 0 && kvs.len() as i64 > r.limit;
        if more {
            kvs.truncate(r.limit as usize);
        }
        if r.keys_only {
            for kv in &mut kvs {
                *kv = KeyValue::new(Fields { value: &[], ..kv.fields() });
            }
        }
        Ok(RangeResponse { header: self.header(), kvs, more, count })
    }

    /// `before` is the state that decides what a put may ignore: in a transaction, the one before it.
    fn put(&mut self, before: &Model, r: &PutRequest) -> Result<PutResponse, Error> {
        if (r.ignore_value || r.ignore_lease) && before.now(&r.key, b"").is_empty() {
            return Err(Error::KeyNotFound);
        }
        if r.lease != 0 && !self.leases.contains_key(&r.lease) {
            return Err(Error::LeaseNotFound);
        }
        let prev = self.now(&r.key, b"").pop();
        let revision = self.revision + 1;
        let kv = KeyValue::new(Fields {
            key: &r.key,
            create_revision: prev.as_ref().map_or(revision, KeyValue::create_revision),
            mod_revision: revision,
            version: prev.as_ref().map_or(0, KeyValue::version) + 1,
            value: if r.ignore_value { prev.as_ref().map_or(b"", KeyValue::value) } else { &r.value },
            lease: if r.ignore_lease { prev.as_ref().map_or(0, KeyValue::lease) } else { r.lease },
        });
        self.write(&r.key, Some(kv));
        Ok(PutResponse { header: self.header(), prev_kv: prev.filter(|_| r.prev_kv) })
    }

    fn delete(&mut self, r: &DeleteRangeRequest) -> DeleteRangeResponse {
        let gone = self.now(&r.key, &r.range_end);
        for kv in &gone {
            self.write(&Bytes::copy_from_slice(kv.key()), None);
        }
        DeleteRangeResponse {
            header: self.header(),
            deleted: gone.len() as i64,
            prev_kvs: if r.prev_kv { gone } else { Vec::new() },
        }
    }

    fn holds(&self, c: &Compare) -> bool {
        let found = self.now(&c.key, &c.range_end);
        let one = |x: Fields<'_>| {
            let order = match c.target_union.as_ref().unwrap() {
                TargetUnion::Version(v) => x.version.cmp(v),
                TargetUnion::CreateRevision(v) => x.create_revision.cmp(v),
                TargetUnion::ModRevision(v) => x.mod_revision.cmp(v),
                TargetUnion::Value(v) => x.value.cmp(v),
                TargetUnion::Lease(v) => x.lease.cmp(v),
            };
            match c.result {
                0 => order == Ordering::Equal,
                1 => order == Ordering::Greater,
                2 => order == Ordering::Less,
                _ => order != Ordering::Equal,
            }
        };
        match &found[..] {
            [] => c.target != 3 && one(Fields::default()),
            all => all.iter().all(|kv| one(kv.fields())),
        }
    }

    /// `before` is the state that comparisons see.
    fn txn(&mut self, before: &Model, r: &TxnRequest) -> Result<TxnResponse, Error> {
        let succeeded = r.compare.iter().all(|c| before.holds(c));
        let mut responses = Vec::new();
        for op in if succeeded { &r.success } else { &r.failure } {
            let response = match op.request.as_ref().unwrap() {
                Op::RequestRange(r) => OpResponse::ResponseRange(self.range(r)?),
                Op::RequestPut(r) => OpResponse::ResponsePut(self.put(before, r)?),
                Op::RequestDeleteRange(r) => OpResponse::ResponseDeleteRange(self.delete(r)),
                Op::RequestTxn(r) => OpResponse::ResponseTxn(self.txn(before, r)?),
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        Ok(TxnResponse { header: self.header(), succeeded, responses })
    }

    /// The puts on the branches taken, which are refused before any range is.
    fn check_puts(&self, r: &TxnRequest) -> Result<(), Error> {
        let succeeded = r.compare.iter().all(|c| self.holds(c));
        let branch = if succeeded { &r.success } else { &r.failure };
        branch.iter().try_for_each(|op| match op.request.as_ref().unwrap() {
            Op::RequestPut(r) => self.clone().put(self, r).map(drop),
            Op::RequestTxn(r) => self.check_puts(r),
            Op::RequestRange(_) | Op::RequestDeleteRange(_) => Ok(()),
        })
    }

    fn attached(&self, id: i64) -> Vec<KeyValue> {
        self.now(b"\0", b"\0").into_iter().filter(|kv| kv.lease() == id).collect()
    }

    fn grant(&mut self, r: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        if self.leases.contains_key(&r.id) {
            return Err(Error::LeaseExists);
        }
        self.leases.insert(r.id, (r.ttl, 0));
        Ok(LeaseGrantResponse { header: self.header(), id: r.id, ttl: r.ttl, error: String::new() })
    }

    fn revoke(&mut self, id: i64) -> Result<LeaseRevokeResponse, Error> {
        for kv in self.attached(id) {
            self.write(&Bytes::copy_from_slice(kv.key()), None);
        }
        self.leases.remove(&id).ok_or(Error::LeaseNotFound)?;
        Ok(LeaseRevokeResponse { header: self.header() })
    }

    fn checkpoint(&mut self, r: &Checkpoints) -> LeaseCheckpointResponse {
        for one in &r.checkpoints {
            if let Some((granted, left)) = self.leases.get_mut(&one.id) {
                *left = if one.remaining_ttl < *granted { one.remaining_ttl } else { 0 };
            }
        }
        LeaseCheckpointResponse { header: self.header() }
    }

    pub(crate) fn apply(&mut self, request: &Request) -> Result<Response, Error> {
        let before = self.clone();
        let answer = match request {
            // A put alone is refused for its lease first, one in a transaction for its key.
            Request::Put(r) if r.lease != 0 && !self.leases.contains_key(&r.lease) => Err(Error::LeaseNotFound),
            Request::Put(r) => self.put(&before, r).map(Response::Put),
            Request::DeleteRange(r) => Ok(Response::DeleteRange(self.delete(r))),
            Request::Txn(r) => before.check_puts(r).and_then(|()| self.txn(&before, r)).map(Response::Txn),
            Request::Compact(r) if r.revision <= self.compacted => Err(Error::Compacted),
            Request::Compact(r) if r.revision > self.revision => Err(Error::FutureRevision),
            Request::Compact(r) => {
                self.compacted = r.revision;
                Ok(Response::Compact(CompactionResponse { header: self.header() }))
            }
            Request::LeaseGrant(r) => self.grant(r).map(Response::LeaseGrant),
            Request::LeaseRevoke(r) => self.revoke(r.id).map(Response::LeaseRevoke),
            Request::LeaseCheckpoint(r) => Ok(Response::LeaseCheckpoint(self.checkpoint(r))),
            Request::SetClusterVersion(_)
            | Request::Alarm(_)
            | Request::WantedSize(_)
            | Request::Auth(_)
            | Request::Follow(_)
            | Request::Promote(_)
            | Request::Supersede(_)
            | Request::StartDigest(_) => {
                unreachable!("not among the random commands")
            }
        };
        match answer {
            Err(_) => *self = before,
            Ok(_) => (self.revision, self.wrote) = (self.present(), false),
        }
        answer
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Request),
    Range(RangeRequest),
    Sweep(usize),
    /// Goes on with what was saved and loaded.
    Reload,
}

pub(crate) fn key() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "aa", "b", "c", "d", "e"]).prop_map(b)
}

pub(crate) fn range_end() -> impl Strategy<Value = Bytes> {
    prop_oneof![3 => Just(b("")), 1 => Just(b("\0")), 3 => key()]
}

pub(crate) fn put_request() -> impl Strategy<Value = PutRequest> {
    let value = prop::sample::select(vec!["".into(), "1".into(), "2".into(), "long".repeat(50)]).prop_map(Bytes::from);
    let lease = prop_oneof![2 => Just(0), 1 => 1..4_i64];
    (key(), value, any::<bool>(), prop::bool::weighted(0.1), prop::bool::weighted(0.1), lease).prop_map(
        |(key, value, prev_kv, ignore_value, ignore_lease, lease)| PutRequest {
            key,
            value,
            prev_kv,
            ignore_value,
            ignore_lease,
            lease,
        },
    )
}

pub(crate) fn lease_request() -> impl Strategy<Value = Request> {
    let id = || 1..4_i64;
    prop_oneof![
        3 => (id(), 1..9_i64).prop_map(|(id, ttl)| Request::LeaseGrant(LeaseGrantRequest { ttl, id })),
        2 => id().prop_map(|id| Request::LeaseRevoke(LeaseRevoke { id, term: 0 })),
        1 => prop::collection::vec((id(), 0..12_i64), 0..4).prop_map(|all| {
            let one = |(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl };
            Request::LeaseCheckpoint(Checkpoints { checkpoints: all.into_iter().map(one).collect(), term: 0 })
        }),
    ]
}

pub(crate) fn delete_request() -> impl Strategy<Value = DeleteRangeRequest> {
    (key(), range_end(), any::<bool>()).prop_map(|(key, range_end, prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

pub(crate) fn range_request() -> impl Strategy<Value = RangeRequest> {
    let bound = || prop_oneof![4 => Just(0_i64), 1 => 1..40_i64];
    let filters = (bound(), bound(), bound(), bound());
    let flags = (prop::bool::weighted(0.2), prop::bool::weighted(0.1));
    let shape = (key(), range_end(), 0..4_i64, prop_oneof![2 => Just(0), 1 => -1..60_i64], 0..3, 0..5, flags);
    (shape, prop_oneof![2 => Just((0, 0, 0, 0)), 1 => filters]).prop_map(|(shape, filters)| {
        let (key, range_end, limit, revision, sort_order, sort_target, (keys_only, count_only)) = shape;
        RangeRequest {
            key,
            range_end,
            limit,
            revision,
            sort_order,
            sort_target,
            keys_only,
            count_only,
            min_mod_revision: filters.0,
            max_mod_revision: filters.1,
            min_create_revision: filters.2,
            max_create_revision: filters.3,
            serializable: false,
        }
    })
}

fn compare() -> impl Strategy<Value = Compare> {
    (key(), range_end(), 0..4, 0..5, 0..20_i64).prop_map(|(key, range_end, result, target, n)| Compare {
        key,
        range_end,
        result,
        target,
        target_union: Some(match target {
            0 => TargetUnion::Version(n % 3),
            1 => TargetUnion::CreateRevision(n),
            2 => TargetUnion::ModRevision(n),
            3 => TargetUnion::Value(b(["", "1", "2"][n as usize % 3])),
            _ => TargetUnion::Lease(n % 3),
        }),
    })
}

fn compares(max: usize) -> impl Strategy<Value = Vec<Compare>> {
    prop::collection::vec(compare(), 0..max)
}

/// Not only valid ones: what slips through validation must still mean the same on every member.
pub(crate) fn txn_request() -> impl Strategy<Value = TxnRequest> {
    let leaf = prop_oneof![
        3 => put_request().prop_map(Op::RequestPut),
        2 => delete_request().prop_map(Op::RequestDeleteRange),
        2 => range_request().prop_map(Op::RequestRange),
    ];
    let txn = |ops: BoxedStrategy<Op>| {
        let branch = move || prop::collection::vec(ops.clone().prop_map(op), 0..4);
        (prop_oneof![2 => compares(2), 1 => compares(6)], branch(), branch())
            .prop_map(|(compare, success, failure)| TxnRequest { compare, success, failure })
    };
    let ops = leaf.prop_recursive(2, 8, 4, move |inner| txn(inner).prop_map(Op::RequestTxn));
    txn(ops.boxed())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => put_request().prop_map(|r| Step::Apply(Request::Put(r))),
        3 => delete_request().prop_map(|r| Step::Apply(Request::DeleteRange(r))),
        3 => txn_request().prop_map(|r| Step::Apply(Request::Txn(r))),
        3 => lease_request().prop_map(Step::Apply),
        1 => (0..60_i64).prop_map(|revision| Step::Apply(Request::Compact(CompactionRequest { revision, physical: false }))),
        4 => range_request().prop_map(Step::Range),
        2 => (0..6_usize).prop_map(Step::Sweep),
        1 => Just(Step::Reload),
    ]
}

/// What holds of any state: reads at every revision, events, and the accounts.
pub(crate) fn check(state: &State, model: &Model) {
    assert_eq!((state.revision(), state.compacted()), (model.revision, model.compacted));
    for revision in model.compacted.max(1)..=model.revision {
        let all = state.range(&RangeRequest { revision, ..get("\0", "\0") }).unwrap().kvs;
        assert_eq!(all, model.at(b"\0", b"\0", revision), "at revision {revision}");
        for key in model.keys.keys() {
            let one = RangeRequest { revision, key: key.clone(), ..RangeRequest::default() };
            assert_eq!(state.range(&one).unwrap().kvs, model.at(key, b"", revision), "{key:?} at {revision}");
        }
    }
    assert_eq!(state.key_count(), model.now(b"\0", b"\0").len());
    let events: Vec<(i64, KeyValue)> = state
        .events_from(model.compacted + 1)
        .unwrap()
        .flat_map(|(revision, events)| events.iter().map(move |kv| (revision, kv.clone())))
        .collect();
    let expected: Vec<_> = model.events.iter().filter(|e| e.0 > model.compacted).cloned().collect();
    assert_eq!(events, expected);
    for (revision, kv) in &events {
        let before = model.at(kv.key(), b"", revision - 1).pop().filter(|_| kv.version() != 1);
        assert_eq!(state.version_before(kv), before, "before {kv:?}");
    }
    let live = model.now(b"\0", b"\0");
    let live = Sums { items: live.len(), bytes: live.iter().map(|kv| kv.as_encoded().len() as u64).sum() };
    let tombstones: u64 = state.old.iter_at(0).filter(|kv| kv.is_tombstone()).map(cost).sum();
    assert_eq!((state.live.sums(), state.old_bytes), (live, tombstones + superseded_bytes(state)));
    let leases: BTreeMap<i64, (i64, i64)> =
        state.leases().iter().map(|(id, x)| (id, (x.ttl_seconds, x.left_seconds.unwrap_or(0)))).collect();
    assert_eq!(leases, model.leases);
    for id in 0..5 {
        let expected = if id == 0 { Vec::new() } else { model.attached(id) };
        assert!(state.lease_keys(id).eq(&expected), "keys of lease {id}");
    }
}

/// What an event has superseded is held until the event is swept.
fn superseded_bytes(state: &State) -> u64 {
    let mut bytes = 0;
    for (revision, events) in state.history.iter_from(state.swept + 1) {
        let swept = if revision == state.swept + 1 { state.swept_events } else { 0 };
        for (position, event) in events.iter().enumerate().skip(swept) {
            let before = state.history.get(revision).unwrap().before_at(position);
            let version = (before > 0).then(|| state.version_of(event.key(), before).expect("it is held"));
            bytes += version.map_or(0, cost);
        }
    }
    bytes
}

/// Parts of a few changes each are the changes.
fn assert_parts(state: &State, random: &mut fastrand::Rng) {
    let (mut from, mut parts) = (ChangesFrom::default(), Vec::new());
    while !matches!(from, ChangesFrom::End) {
        let part = state.changes_part(&mut from, random.usize(1..200));
        assert!(!part.is_empty() || matches!(from, ChangesFrom::End | ChangesFrom::Others), "no end at {from:?}");
        parts.extend(part);
    }
    assert!(state.changes().eq(parts), "the parts are something else");
    assert!(state.changes_part(&mut from, 1).is_empty(), "nothing comes after the end");
}

fn assert_same(one: &State, other: &State) {
    assert!(one.changes().eq(other.changes()), "the states differ");
    for revision in one.compacted().max(1)..=one.revision() {
        assert_eq!(one.hash_kv(revision), other.hash_kv(revision));
    }
}

/// What the state store keeps after cleaning, where `drops` says which of the dead versions it has dropped already. A
/// dead tombstone stays as long as an earlier version of its key does.
fn cleaned(state: &State, journal: &[Change], mut drops: impl FnMut() -> bool) -> Vec<Change> {
    let mut stored = Vec::new();
    let mut held: Vec<Bytes> = Vec::new();
    let mut words: Vec<i64> = Vec::new();
    for change in journal {
        if let Some(change::Change::Lease(lease)) = &change.change {
            let needed = lease.ttl == 0 && words.contains(&lease.id);
            if !state.is_live_lease(lease) && !needed && drops() {
                continue;
            }
            words.push(lease.id);
        }
        if let Some(change::Change::Version(kv)) = &change.change {
            let key = Bytes::copy_from_slice(kv.key());
            let needed = kv.is_tombstone() && held.contains(&key);
            if !state.is_live(kv) && !needed && drops() {
                continue;
            }
            held.push(key);
        }
        stored.push(change.clone());
    }
    stored
}

fn run(steps: Vec<Step>, seed: u64) {
    let mut model = Model::new();
    let mut state = State::new();
    // Applies without answering and never sweeps: a follower that is busy.
    let mut follower = State::new();
    let mut journal = Vec::new();
    state.keep_journal(1 << 20);
    for step in steps {
        match step {
            Step::Apply(request) => {
                let command = Command::new(2, request.clone());
                let before = (state.clone(), model.clone());
                let answer = apply(&mut state, request.clone());
                assert_eq!(answer, model.apply(&request), "{request:?}");
                assert_eq!(follower.apply(&command, false).unwrap().err(), answer.err());
                journal.extend(state.take_journal().changes);
                assert_eq!(before.0.leases().iter().count(), before.1.leases.len(), "a clone changed");
                let seen: Vec<i64> = state.leases().changed_since(before.0.leases()).map(|x| x.0).collect();
                let changed = |id: &i64| before.1.leases.get(id) != model.leases.get(id);
                assert_eq!(seen, (1..5).filter(changed).collect::<Vec<_>>(), "{request:?}");
            }
            Step::Range(r) => assert_eq!(state.range(&r), model.range(&r), "{r:?}"),
            Step::Sweep(steps) => drop(state.sweep(steps)),
            Step::Reload => {
                state = load(state.changes(), state.revision());
                state.keep_journal(1 << 20);
                check(&state, &model);
            }
        }
    }
    check(&state, &model);
    check(&follower, &model);
    assert_same(&state, &follower);
    sweep_all(&mut state);
    check(&state, &model);
    assert_same(&state, &follower);
    let swept: Vec<&KeyValue> = state.old.iter_at(0).collect();
    assert!(swept.iter().all(|kv| state.is_live(kv)), "a complete sweep left {swept:?}");

    let mut random = fastrand::Rng::with_seed(seed);
    assert_parts(&state, &mut random);
    assert_parts(&follower, &mut random);
    for stored in [
        journal.clone(),
        cleaned(&state, &journal, || true),
        cleaned(&state, &journal, || random.bool()),
        follower.changes().collect(),
    ] {
        let mut loader = Loader::new();
        stored.into_iter().for_each(|change| loader.load(change).unwrap());
        let mut loaded = loader.finish(state.revision()).unwrap();
        check(&loaded, &model);
        assert_same(&loaded, &state);
        assert!(loaded.sweep(0), "loading leaves nothing to sweep");
        assert!(loaded.old.iter_at(0).eq(state.old.iter_at(0)), "loading leaves what a sweep does");
    }
}

fn cases() -> u32 {
    std::env::var("QUORATE_PROPTEST_CASES").map_or(300, |n| n.parse().expect("a number of cases"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn the_state_does_what_the_model_does(steps in prop::collection::vec(step(), 0..60), seed: u64) {
        run(steps, seed);
    }
}
