//! The KV service over gRPC on a real cluster of three, asked through the leader and through a follower.
//!
//! Each fact stands in the API's documentation. Absent: what a random sequence finds beyond them (`differ`), other services
//! (`services`).

use bytes::Bytes;
use quorate::pb::KeyValue;
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::range_request::{SortOrder, SortTarget};
use quorate::pb::etcd::request_op::Request as Op;
use quorate::pb::etcd::response_op::Response as Done;
use quorate::pb::etcd::{
    CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest,
    TxnResponse,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::cluster::Cluster;

type Client = KvClient<Channel>;
const EVERYTHING: Bytes = Bytes::from_static(b"\0");

/// A cluster, and clients of its leader and of a follower.
async fn cluster() -> (Cluster, [(&'static str, Client); 2]) {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let clients = [("leader", cluster.kv(leader)), ("follower", cluster.kv((leader + 1) % 3))];
    (cluster, clients)
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put_of(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..Default::default() }
}

fn range_of(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), range_end: bytes(range_end), ..Default::default() }
}

fn delete_of(key: &str, range_end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: bytes(key), range_end: bytes(range_end), ..Default::default() }
}

fn ops(all: impl IntoIterator<Item = Op>) -> Vec<RequestOp> {
    all.into_iter().map(|op| RequestOp { request: Some(op) }).collect()
}

async fn put(kv: &mut Client, key: &str, value: &str) -> i64 {
    kv.put(put_of(key, value)).await.unwrap().into_inner().header.unwrap().revision
}

async fn delete(kv: &mut Client, key: &str) -> i64 {
    kv.delete_range(delete_of(key, "")).await.unwrap().into_inner().header.unwrap().revision
}

async fn range(kv: &mut Client, request: RangeRequest) -> RangeResponse {
    kv.range(request).await.unwrap().into_inner()
}

async fn get(kv: &mut Client, key: &str) -> KeyValue {
    range(kv, range_of(key, "")).await.kvs.first().cloned().unwrap_or_else(|| panic!("no {key}"))
}

async fn txn(kv: &mut Client, request: TxnRequest) -> TxnResponse {
    kv.txn(request).await.unwrap().into_inner()
}

async fn clear(kv: &mut Client) {
    let all = DeleteRangeRequest { key: EVERYTHING, range_end: EVERYTHING, prev_kv: false };
    kv.delete_range(all).await.unwrap();
}

fn keys(response: &RangeResponse) -> String {
    response.kvs.iter().map(|kv| String::from_utf8_lossy(kv.key()).into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_filter_then_sort_then_cut() {
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        clear(&mut kv).await;
        let r1 = put(&mut kv, "a", "5").await;
        put(&mut kv, "b", "4").await;
        let r3 = put(&mut kv, "c", "3").await;
        let r4 = put(&mut kv, "a", "1").await;
        let r5 = delete(&mut kv, "b").await;
        put(&mut kv, "b", "9").await;
        let last = put(&mut kv, "d", "2").await;
        assert_eq!(last, r1 + 6, "one revision a write");
        let all = || range_of("a", "e");
        let sorted = |target: SortTarget, order: SortOrder, limit| RangeRequest {
            sort_target: target.into(),
            sort_order: order.into(),
            limit,
            ..all()
        };
        let (none, up, down) = (SortOrder::None, SortOrder::Ascend, SortOrder::Descend);
        let from_here_on = |key: &str| range_of(key, "\0");
        let cases = [
            (range_of("b", ""), "b", 1, false),
            (range_of("x", ""), "", 0, false),
            (all(), "abcd", 4, false),
            (range_of("b", "d"), "bc", 2, false),
            (range_of("d", "a"), "", 0, false),
            (from_here_on("c"), "cd", 2, false),
            (from_here_on("\0"), "abcd", 4, false),
            (RangeRequest { serializable: true, ..from_here_on("d") }, "d", 1, false),
            (RangeRequest { limit: 2, ..all() }, "ab", 4, true),
            (RangeRequest { limit: 4, ..all() }, "abcd", 4, false),
            (RangeRequest { limit: -1, ..all() }, "abcd", 4, false),
            (sorted(SortTarget::Key, down, 0), "dcba", 4, false),
            (sorted(SortTarget::Key, down, 1), "d", 4, true),
            (sorted(SortTarget::Version, up, 0), "bcda", 4, false),
            (sorted(SortTarget::Version, down, 1), "a", 4, true),
            (sorted(SortTarget::Create, none, 0), "acbd", 4, false),
            (sorted(SortTarget::Create, down, 0), "dbca", 4, false),
            (sorted(SortTarget::Mod, none, 0), "cabd", 4, false),
            (sorted(SortTarget::Mod, down, 2), "db", 4, true),
            (sorted(SortTarget::Value, none, 0), "adcb", 4, false),
            (sorted(SortTarget::Value, down, 0), "bcda", 4, false),
            (RangeRequest { min_mod_revision: r4, ..all() }, "abd", 4, false),
            (RangeRequest { max_mod_revision: r4, ..all() }, "ac", 4, false),
            (RangeRequest { min_create_revision: r3, ..all() }, "bcd", 4, false),
            (RangeRequest { max_create_revision: r3, ..all() }, "ac", 4, false),
            (RangeRequest { min_mod_revision: r4, limit: 2, ..all() }, "ab", 4, true),
            (RangeRequest { min_mod_revision: r4, ..sorted(SortTarget::Value, up, 2) }, "ad", 4, true),
            (RangeRequest { revision: r3, ..all() }, "abc", 3, false),
            (RangeRequest { revision: r3, ..sorted(SortTarget::Value, up, 0) }, "cba", 3, false),
            (RangeRequest { revision: r5, ..all() }, "ac", 2, false),
            (RangeRequest { revision: r5, limit: 1, ..all() }, "a", 2, true),
            (RangeRequest { revision: r5, max_create_revision: r1, ..all() }, "a", 2, false),
            (RangeRequest { revision: last, ..all() }, "abcd", 4, false),
            (RangeRequest { count_only: true, ..all() }, "", 4, false),
            (RangeRequest { count_only: true, revision: r5, limit: 1, ..all() }, "", 2, false),
            (RangeRequest { keys_only: true, ..all() }, "abcd", 4, false),
        ];
        for (request, expected, count, more) in cases {
            let answer = range(&mut kv, request.clone()).await;
            assert_eq!(
                (keys(&answer), answer.count, answer.more),
                (expected.into(), count, more),
                "{role}: {request:?}"
            );
            assert_eq!(answer.header.unwrap().revision, last, "the header has the present revision");
            assert!(answer.kvs.iter().all(|kv| kv.value().is_empty() == request.keys_only), "{role}: {request:?}");
        }
        let old = range(&mut kv, RangeRequest { revision: r3, ..range_of("a", "") }).await.kvs[0].clone();
        assert_eq!((old.value(), old.version(), old.mod_revision()), (&b"5"[..], 1, r1), "{role}: as it was");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_and_deletes_count_versions_and_return_what_was() {
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        clear(&mut kv).await;
        let first = kv.put(PutRequest { prev_kv: true, ..put_of("k", "1") }).await.unwrap().into_inner();
        assert_eq!(first.prev_kv, None, "{role}");
        let again = kv.put(PutRequest { prev_kv: true, ..put_of("k", "1") }).await.unwrap().into_inner();
        let created = first.header.unwrap().revision;
        assert_eq!(again.header.unwrap().revision, created + 1, "the same value is a new revision");
        let was = again.prev_kv.unwrap();
        assert_eq!((was.value(), was.version(), was.mod_revision()), (&b"1"[..], 1, created));
        assert_eq!(kv.put(put_of("k", "2")).await.unwrap().into_inner().prev_kv, None, "only on demand");

        kv.put(PutRequest { ignore_value: true, ..put_of("k", "") }).await.unwrap();
        kv.put(PutRequest { ignore_lease: true, ..put_of("k", "3") }).await.unwrap();
        let now = get(&mut kv, "k").await;
        assert_eq!((now.value(), now.version(), now.create_revision(), now.lease()), (&b"3"[..], 5, created, 0));
        kv.put(PutRequest { ignore_value: true, ..put_of("k", "") }).await.unwrap();
        assert_eq!(get(&mut kv, "k").await.value(), b"3", "{role}: the value stays");

        put(&mut kv, "l", "x").await;
        let request = DeleteRangeRequest { prev_kv: true, ..delete_of("k", "m") };
        let gone = kv.delete_range(request).await.unwrap().into_inner();
        let values: Vec<&[u8]> = gone.prev_kvs.iter().map(KeyValue::value).collect();
        assert_eq!((gone.deleted, values), (2, vec![&b"3"[..], b"x"]), "{role}");
        let revision = gone.header.unwrap().revision;
        let nothing = kv.delete_range(delete_of("k", "m")).await.unwrap().into_inner();
        assert_eq!((nothing.deleted, nothing.header.unwrap().revision), (0, revision), "no write, no revision");
        let born = put(&mut kv, "k", "again").await;
        let now = get(&mut kv, "k").await;
        assert_eq!((now.version(), now.create_revision()), (1, born), "a deletion ends the key's life");
    }
}

fn compare(key: &str, target: CompareTarget, result: CompareResult, operand: TargetUnion) -> Compare {
    Compare {
        key: bytes(key),
        target: target.into(),
        result: result.into(),
        target_union: Some(operand),
        ..Default::default()
    }
}

async fn holds(kv: &mut Client, compare: Compare) -> bool {
    let request = TxnRequest { compare: vec![compare], ..Default::default() };
    txn(kv, request).await.succeeded
}

type Holds = fn(std::cmp::Ordering) -> bool;

const RESULTS: [(CompareResult, Holds); 4] = [
    (CompareResult::Equal, std::cmp::Ordering::is_eq),
    (CompareResult::Greater, std::cmp::Ordering::is_gt),
    (CompareResult::Less, std::cmp::Ordering::is_lt),
    (CompareResult::NotEqual, std::cmp::Ordering::is_ne),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_comparison_compares_what_it_names() {
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        clear(&mut kv).await;
        put(&mut kv, "k", "m").await;
        put(&mut kv, "k", "m").await;
        let now = get(&mut kv, "k").await;
        type Number = (CompareTarget, fn(i64) -> TargetUnion, i64);
        let numbers: [Number; 4] = [
            (CompareTarget::Version, TargetUnion::Version, now.version()),
            (CompareTarget::Create, TargetUnion::CreateRevision, now.create_revision()),
            (CompareTarget::Mod, TargetUnion::ModRevision, now.mod_revision()),
            (CompareTarget::Lease, TargetUnion::Lease, 0),
        ];
        for (result, expected) in RESULTS {
            for (target, union, stored) in numbers {
                for operand in [stored - 1, stored, stored + 1] {
                    let seen = holds(&mut kv, compare("k", target, result, union(operand))).await;
                    assert_eq!(seen, expected(stored.cmp(&operand)), "{role}: {target:?} {result:?} {operand}");
                    let seen = holds(&mut kv, compare("none", target, result, union(operand - stored))).await;
                    assert_eq!(seen, expected(stored.cmp(&operand)), "{role}: a missing key has zeros: {target:?}");
                }
            }
            for operand in ["l", "m", "n", ""] {
                let value = |key| compare(key, CompareTarget::Value, result, TargetUnion::Value(bytes(operand)));
                let seen = holds(&mut kv, value("k")).await;
                assert_eq!(seen, expected("m".cmp(operand)), "{role}: value {result:?} {operand}");
                assert!(!holds(&mut kv, value("none")).await, "{role}: a missing key has no value");
            }
        }
        put(&mut kv, "l", "m").await;
        let over = |result, version| Compare {
            range_end: bytes("z"),
            ..compare("k", CompareTarget::Version, result, TargetUnion::Version(version))
        };
        assert!(holds(&mut kv, over(CompareResult::Greater, 0)).await, "{role}: both keys");
        assert!(!holds(&mut kv, over(CompareResult::Equal, 2)).await, "{role}: one of two is not enough");
    }
}

fn exists(key: &str) -> Compare {
    compare(key, CompareTarget::Version, CompareResult::Greater, TargetUnion::Version(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_one_revision_and_reads_its_own_writes() {
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        clear(&mut kv).await;
        let before = put(&mut kv, "k", "old").await;
        let inner = TxnRequest {
            // Decided on the state before the whole transaction, in which this key did not exist.
            compare: vec![exists("new")],
            success: ops([Op::RequestPut(put_of("inner", "yes"))]),
            failure: ops([Op::RequestPut(put_of("inner", "no")), Op::RequestRange(range_of("inner", ""))]),
        };
        let request = TxnRequest {
            compare: vec![exists("k")],
            success: ops([
                Op::RequestRange(range_of("k", "")),
                Op::RequestPut(PutRequest { prev_kv: true, ..put_of("k", "new") }),
                Op::RequestRange(range_of("k", "")),
                Op::RequestPut(put_of("new", "1")),
                Op::RequestTxn(inner),
                Op::RequestDeleteRange(delete_of("x", "y")),
            ]),
            failure: ops([Op::RequestPut(put_of("failed", "1"))]),
        };
        let answer = txn(&mut kv, request).await;
        assert_eq!((answer.succeeded, answer.header.unwrap().revision), (true, before + 1), "{role}");
        let done: Vec<Done> = answer.responses.into_iter().filter_map(|op| op.response).collect();
        let [
            Done::ResponseRange(first),
            Done::ResponsePut(put_done),
            Done::ResponseRange(second),
            Done::ResponsePut(_),
            Done::ResponseTxn(inner),
            Done::ResponseDeleteRange(delete_done),
        ] = &done[..]
        else {
            panic!("{role}: an answer an operation, in order: {done:?}");
        };
        assert_eq!((first.kvs[0].value(), second.kvs[0].value()), (&b"old"[..], &b"new"[..]), "{role}");
        assert_eq!(put_done.prev_kv.as_ref().map(KeyValue::value), Some(&b"old"[..]));
        assert_eq!((inner.succeeded, delete_done.deleted), (false, 0));
        let Some(Done::ResponseRange(read)) = &inner.responses[1].response else { panic!("{:?}", inner.responses) };
        assert_eq!(read.kvs[0].value(), b"no", "{role}: a nested transaction reads what it wrote");
        for key in ["k", "new", "inner"] {
            assert_eq!(get(&mut kv, key).await.mod_revision(), before + 1, "{role}: {key}");
        }

        let read = TxnRequest { success: ops([Op::RequestRange(range_of("k", "l"))]), ..Default::default() };
        let answer = txn(&mut kv, read).await;
        assert_eq!(answer.header.unwrap().revision, before + 1, "{role}: a read takes no revision");
        let many = TxnRequest {
            success: ops((0..128).map(|i| Op::RequestPut(put_of(&format!("m{i:03}"), "")))),
            ..Default::default()
        };
        assert_eq!(txn(&mut kv, many).await.header.unwrap().revision, before + 2, "{role}: 128 operations are allowed");

        // One that fails has done nothing.
        let request = TxnRequest {
            success: ops([
                Op::RequestPut(put_of("half", "1")),
                Op::RequestPut(PutRequest { ignore_value: true, ..put_of("missing", "") }),
            ]),
            ..Default::default()
        };
        assert_refused(kv.txn(request).await, Code::InvalidArgument, "etcdserver: key not found");
        let nothing = range(&mut kv, range_of("half", "")).await;
        assert_eq!((nothing.count, nothing.header.unwrap().revision), (0, before + 2), "{role}");
    }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(answer: Result<tonic::Response<T>, Status>, code: Code, text: &str) {
    let status = answer.expect_err(text);
    assert_eq!((status.code(), status.message()), (code, text));
}

enum Call {
    Range(RangeRequest),
    Put(PutRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(i64),
}

async fn call(kv: &mut Client, call: Call) -> Result<tonic::Response<()>, Status> {
    match call {
        Call::Range(r) => kv.range(r).await.map(|a| a.map(drop)),
        Call::Put(r) => kv.put(r).await.map(|a| a.map(drop)),
        Call::Delete(r) => kv.delete_range(r).await.map(|a| a.map(drop)),
        Call::Txn(r) => kv.txn(r).await.map(|a| a.map(drop)),
        Call::Compact(revision) => {
            kv.compact(CompactionRequest { revision, physical: false }).await.map(|a| a.map(drop))
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_the_codes_and_texts_that_clients_match_on() {
    const EMPTY: &str = "etcdserver: key is not provided";
    const DUPLICATE: &str = "etcdserver: duplicate key given in txn request";
    const TOO_MANY: &str = "etcdserver: too many operations in txn request";
    const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
    const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        let past = put(&mut kv, "k", "1").await;
        let now = put(&mut kv, "k", "2").await;
        kv.compact(CompactionRequest { revision: now, physical: false }).await.unwrap();
        let of = |success: Vec<Op>| Call::Txn(TxnRequest { success: ops(success), ..Default::default() });
        let puts = |n: usize| -> Vec<Op> { (0..n).map(|i| Op::RequestPut(put_of(&format!("{i}"), ""))).collect() };
        let nested = |success: Vec<Op>| Op::RequestTxn(TxnRequest { success: ops(success), ..Default::default() });
        let put_k = || Op::RequestPut(put_of("k", ""));
        let compares = vec![exists("k"); 129];
        let cases = [
            (Call::Range(range_of("", "")), Code::InvalidArgument, EMPTY),
            (Call::Put(put_of("", "x")), Code::InvalidArgument, EMPTY),
            (Call::Delete(delete_of("", "")), Code::InvalidArgument, EMPTY),
            (of(vec![Op::RequestPut(put_of("", ""))]), Code::InvalidArgument, EMPTY),
            (of(vec![Op::RequestRange(range_of("", ""))]), Code::InvalidArgument, EMPTY),
            (
                Call::Put(PutRequest { ignore_value: true, ..put_of("k", "x") }),
                Code::InvalidArgument,
                "etcdserver: value is provided",
            ),
            (
                Call::Put(PutRequest { ignore_lease: true, lease: 7, ..put_of("k", "") }),
                Code::InvalidArgument,
                "etcdserver: lease is provided",
            ),
            (
                Call::Put(PutRequest { ignore_value: true, ..put_of("none", "") }),
                Code::InvalidArgument,
                "etcdserver: key not found",
            ),
            (
                Call::Put(PutRequest { lease: 7, ..put_of("k", "") }),
                Code::NotFound,
                "etcdserver: requested lease not found",
            ),
            (
                Call::Range(RangeRequest { sort_order: 9, ..range_of("k", "") }),
                Code::InvalidArgument,
                "etcdserver: invalid sort option",
            ),
            (of(puts(129)), Code::InvalidArgument, TOO_MANY),
            (of(vec![nested(puts(128))]), Code::InvalidArgument, TOO_MANY),
            (Call::Txn(TxnRequest { compare: compares, ..Default::default() }), Code::InvalidArgument, TOO_MANY),
            (of(vec![put_k(), put_k()]), Code::InvalidArgument, DUPLICATE),
            (of(vec![put_k(), Op::RequestDeleteRange(delete_of("a", "z"))]), Code::InvalidArgument, DUPLICATE),
            (of(vec![Op::RequestDeleteRange(delete_of("a", "z")), put_k()]), Code::InvalidArgument, DUPLICATE),
            (of(vec![put_k(), nested(vec![put_k()])]), Code::InvalidArgument, DUPLICATE),
            (of(vec![nested(vec![put_k()]), nested(vec![put_k()])]), Code::InvalidArgument, DUPLICATE),
            (Call::Range(RangeRequest { revision: past, ..range_of("k", "") }), Code::OutOfRange, COMPACTED),
            (Call::Range(RangeRequest { revision: now + 1, ..range_of("k", "") }), Code::OutOfRange, FUTURE),
            (
                of(vec![Op::RequestRange(RangeRequest { revision: past, ..range_of("k", "") })]),
                Code::OutOfRange,
                COMPACTED,
            ),
            (
                of(vec![put_k(), Op::RequestRange(RangeRequest { revision: now + 1, ..range_of("k", "") })]),
                Code::OutOfRange,
                FUTURE,
            ),
            (Call::Compact(now), Code::OutOfRange, COMPACTED),
            (Call::Compact(now + 1), Code::OutOfRange, FUTURE),
        ];
        for (i, (request, code, text)) in cases.into_iter().enumerate() {
            let status = call(&mut kv, request).await.expect_err(text);
            assert_eq!((status.code(), status.message()), (code, text), "{role}: case {i}");
        }
        assert_eq!(range(&mut kv, range_of("k", "")).await.header.unwrap().revision, now, "nothing was written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_faults_the_one_is_told_that_etcd_tells() {
    let cluster = Cluster::start(1).await;
    let mut kv = cluster.kv(0);
    let future = || Op::RequestRange(RangeRequest { revision: 99, ..range_of("k", "") });
    let faulty = || PutRequest { ignore_value: true, lease: 7, ..put_of("none", "") };
    let request = TxnRequest { success: ops([future(), Op::RequestPut(faulty())]), ..Default::default() };
    assert_refused(kv.txn(request).await, Code::InvalidArgument, "etcdserver: key not found");
    assert_refused(kv.put(faulty()).await, Code::NotFound, "etcdserver: requested lease not found");
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_keeps_what_is_still_visible_on_every_member() {
    let (cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        clear(&mut kv).await;
        put(&mut kv, "kept", "1").await;
        put(&mut kv, "changed", "1").await;
        put(&mut kv, "gone", "1").await;
        delete(&mut kv, "gone").await;
        let at = put(&mut kv, "changed", "2").await;
        let now = put(&mut kv, "changed", "3").await;
        let answer = kv.compact(CompactionRequest { revision: at, physical: true }).await.unwrap().into_inner();
        assert_eq!(answer.header.unwrap().revision, now, "{role}: compaction is no write");
        let then = range(&mut kv, RangeRequest { revision: at, ..range_of("a", "z") }).await;
        assert_eq!(keys(&then), "changedkept", "{role}");
        assert_eq!(then.kvs[0].value(), b"2", "{role}: the newest version up to the compacted revision stays");
        assert_eq!(then.kvs[1].mod_revision(), at - 4, "{role}: an older one too, if it is the newest");
        let before = kv.range(RangeRequest { revision: at - 1, ..range_of("a", "z") }).await;
        assert_refused(before, Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted");
        cluster.wait_same_hash([0, 1, 2]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_larger_than_the_limit_is_refused_by_text() {
    let (_cluster, clients) = cluster().await;
    for (role, mut kv) in clients {
        let value = |len: usize| PutRequest { value: vec![b'x'; len].into(), ..put_of("k", "") };
        kv.put(value(1536 * 1024 - 100)).await.unwrap_or_else(|e| panic!("{role}: just below: {e}"));
        let refused = kv.put(value(1536 * 1024)).await;
        assert_refused(refused, Code::InvalidArgument, "etcdserver: request is too large");
        // Far larger: refused before it is read; the connection lives.
        assert!(kv.put(value(8 << 20)).await.is_err(), "{role}");
        assert_eq!(get(&mut kv, "k").await.value().len(), 1536 * 1024 - 100, "{role}: a large value comes back whole");
    }
}
