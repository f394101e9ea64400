//! What the state must do: facts by name, and a random comparison with a naive model.

mod cost;
mod facts;
pub(crate) mod growth;
mod lease;
pub(crate) mod model;
mod quota;
mod role;
mod validation;

use bytes::Bytes;

use super::{Loader, State};
use crate::error::Error;
use crate::pb::KeyValue;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::*;
use crate::pb::log::{Answer, Change, Command, answer::Response, command::Request};

/// Bytes without copying, for literals.
fn b(bytes: &'static str) -> Bytes {
    Bytes::from_static(bytes.as_bytes())
}

fn put(key: &'static str, value: &'static str) -> PutRequest {
    PutRequest { key: b(key), value: b(value), ..PutRequest::default() }
}

fn delete(key: &'static str, range_end: &'static str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: b(key), range_end: b(range_end), prev_kv: true }
}

fn get(key: &'static str, range_end: &'static str) -> RangeRequest {
    RangeRequest { key: b(key), range_end: b(range_end), ..RangeRequest::default() }
}

fn op(request: Op) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn apply(state: &mut State, request: Request) -> Result<Response, Error> {
    let command = Command::new(2, request);
    let answer: Result<Answer, Error> = state.apply(&command, true).expect("a known command");
    answer.map(|a| a.response.expect("an answer was asked for"))
}

fn do_put(state: &mut State, key: &'static str, value: &'static str) -> i64 {
    apply(state, Request::Put(put(key, value))).unwrap();
    state.revision()
}

fn do_delete(state: &mut State, key: &'static str, range_end: &'static str) -> DeleteRangeResponse {
    let Response::DeleteRange(answer) = apply(state, Request::DeleteRange(delete(key, range_end))).unwrap() else {
        panic!("a delete answers a delete");
    };
    answer
}

fn do_txn(state: &mut State, r: TxnRequest) -> Result<TxnResponse, Error> {
    match apply(state, Request::Txn(r))? {
        Response::Txn(answer) => Ok(answer),
        other => panic!("a txn answers a txn, not {other:?}"),
    }
}

fn do_compact(state: &mut State, revision: i64) -> Result<(), Error> {
    apply(state, Request::Compact(CompactionRequest { revision, physical: false })).map(drop)
}

fn sweep_all(state: &mut State) {
    while !state.sweep(3) {}
}

fn load(changes: impl IntoIterator<Item = Change>, revision: i64) -> State {
    let mut loader = Loader::new();
    for change in changes {
        loader.load(change).unwrap();
    }
    loader.finish(revision).unwrap()
}

/// `key=value` of each, for short expectations.
fn show(kvs: &[KeyValue]) -> String {
    let one = |kv: &KeyValue| format!("{}={}", String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(kv.value()));
    kvs.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn read(state: &State, key: &'static str, range_end: &'static str) -> String {
    show(&state.range(&get(key, range_end)).unwrap().kvs)
}

fn read_at(state: &State, revision: i64) -> Result<String, Error> {
    let r = RangeRequest { revision, ..get("\0", "\0") };
    state.range(&r).map(|answer| show(&answer.kvs))
}
