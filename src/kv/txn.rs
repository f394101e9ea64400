//! Transactions: compare, then do one branch.
//!
//! In three passes, so that a transaction that fails has written nothing: decide every comparison, nested ones included,
//! on the state before the transaction (as etcd does); check what can fail on the branches taken; then do them. Reads see
//! the writes before them, but one of a past revision reads the state before the transaction: the history does not say yet what
//! this one supersedes.
//!
//! However many comparisons a transaction has, each key of their intervals is looked at once for all of them (`compare`), and none after
//! the first for which one does not hold.

use std::ops::Range;

use super::State;
use super::compare::{Asked, Wanted, compare};
use super::header::header;
use super::interval::Interval;
use super::tree::Place;
use crate::error::Error;
use crate::pb::Fields;
use crate::pb::etcd::compare::CompareTarget;
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::response_op::Response;
use crate::pb::etcd::{Compare, PutRequest, RequestOp, ResponseOp, TxnRequest, TxnResponse};

/// True if no branch can write: the transaction is then a read, and needs no log entry.
pub fn is_read_only(r: &TxnRequest) -> bool {
    r.success.iter().chain(&r.failure).all(|op| match &op.request {
        Some(Request::RequestRange(_)) | None => true,
        Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) => false,
        Some(Request::RequestTxn(r)) => is_read_only(r),
    })
}

/// What one pass of checks looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    Puts,
    Ranges,
}

/// Which branch each transaction of a nest takes, in the order in which they are met.
type Path = Vec<bool>;

/// A transaction that is being done.
struct Run {
    path: std::vec::IntoIter<bool>,
    answer: bool,
    /// What reads of the past see, if there are any.
    before: Option<State>,
}

fn branch(r: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &r.success } else { &r.failure }
}

impl State {
    /// Answers a transaction for which [`is_read_only`] holds.
    pub fn read_txn(&self, r: &TxnRequest) -> Result<TxnResponse, Error> {
        assert!(is_read_only(r), "a transaction that may write goes through the log");
        self.clone().txn(r, true)
    }

    pub(super) fn txn(&mut self, r: &TxnRequest, answer: bool) -> Result<TxnResponse, Error> {
        let mut path = Path::new();
        self.decide(r, &mut path);
        // The order decides what the client is told when several things are wrong; it is etcd's.
        self.check_txn(r, &mut path.iter().copied(), Check::Puts)?;
        self.check_txn(r, &mut path.iter().copied(), Check::Ranges)?;
        let mut puts = Vec::new();
        puts_of(r, &mut path.iter().copied(), &mut puts);
        self.check_quotas(puts.into_iter())?;
        let before = (answer && reads_past(r)).then(|| self.clone());
        let response = self.write_txn(r, &mut Run { path: path.into_iter(), answer, before });
        self.commit();
        Ok(response)
    }

    fn decide(&self, r: &TxnRequest, path: &mut Path) {
        let succeeded = self.all_hold(&r.compare);
        path.push(succeeded);
        for op in branch(r, succeeded) {
            if let Some(Request::RequestTxn(nested)) = &op.request {
                self.decide(nested, path);
            }
        }
    }

    /// A comparison holds for an interval if it holds for each of its keys. A key that does not exist compares as zeros,
    /// but its value equals nothing, nor differs from anything.
    fn all_hold(&self, compares: &[Compare]) -> bool {
        let mut spans = Vec::new();
        for c in compares {
            let interval = Interval::new(&c.key, &c.range_end);
            let holds = match interval {
                Interval::Key(key) => self.live.get(Place::of(key)).map(|kv| compare(c, &kv.fields())),
                _ => Some(interval.ranks(&self.live)).filter(|ranks| !ranks.is_empty()).map(|ranks| {
                    spans.push((ranks, c));
                    true
                }),
            };
            if !holds.unwrap_or_else(|| missing(c)) {
                return false;
            }
        }
        spans.is_empty() || self.hold_for_each(spans)
    }

    /// Whether each comparison holds for the keys of these ranks.
    fn hold_for_each(&self, mut spans: Vec<(Range<usize>, &Compare)>) -> bool {
        spans.sort_by_key(|(ranks, _)| ranks.start);
        let asked = Asked::all(spans.iter().map(|(_, c)| *c));
        let mut spans = spans.into_iter().map(|(ranks, _)| ranks).zip(asked).peekable();
        let mut open: Vec<(Range<usize>, Asked<'_>)> = Vec::new();
        let mut at = 0;
        loop {
            // From here to `end` it is the same comparisons that concern each key.
            open.retain(|(ranks, _)| ranks.end > at);
            if open.is_empty() {
                let Some((ranks, _)) = spans.peek() else { return true };
                at = ranks.start;
            }
            while let Some(span) = spans.next_if(|(ranks, _)| ranks.start == at) {
                open.push(span);
            }
            let ends = open.iter().map(|(ranks, _)| ranks.end).chain(spans.peek().map(|(ranks, _)| ranks.start));
            let end = ends.min().expect("one is open");
            // There is such a key, since they are of no empty interval.
            let Some(wanted) = Wanted::of(open.iter().map(|(_, asked)| *asked)) else { return false };
            if !self.live.all(at..end, &wanted) {
                return false;
            }
            at = end;
        }
    }

    fn check_txn(&self, r: &TxnRequest, path: &mut impl Iterator<Item = bool>, what: Check) -> Result<(), Error> {
        for op in branch(r, next(path)) {
            match &op.request {
                Some(Request::RequestRange(r)) if what == Check::Ranges => self.check_readable(r.revision)?,
                Some(Request::RequestPut(r)) if what == Check::Puts => {
                    self.check_put_key(r)?;
                    self.check_lease(r.lease)?;
                }
                Some(Request::RequestRange(_) | Request::RequestPut(_) | Request::RequestDeleteRange(_)) => {}
                Some(Request::RequestTxn(r)) => self.check_txn(r, path, what)?,
                None => return Err(Error::KeyNotFound),
            }
        }
        Ok(())
    }

    fn write_txn(&mut self, r: &TxnRequest, run: &mut Run) -> TxnResponse {
        let (succeeded, answer) = (next(&mut run.path), run.answer);
        let mut responses = Vec::new();
        for op in branch(r, succeeded) {
            let response = match &op.request {
                // A range is only its answer. An operation that is none was refused.
                Some(Request::RequestRange(_)) if !answer => continue,
                None => continue,
                Some(Request::RequestRange(r)) => {
                    let state = run.before.as_ref().filter(|_| r.revision > 0).unwrap_or(self);
                    Response::ResponseRange(state.read_range(r, self.present()))
                }
                Some(Request::RequestPut(r)) => Response::ResponsePut(self.write_put(r, answer)),
                Some(Request::RequestDeleteRange(r)) => {
                    Response::ResponseDeleteRange(self.write_delete_range(r, answer))
                }
                Some(Request::RequestTxn(r)) => Response::ResponseTxn(self.write_txn(r, run)),
            };
            if answer {
                responses.push(ResponseOp { response: Some(response) });
            }
        }
        TxnResponse { header: header(self.present()), succeeded, responses }
    }
}

/// True if some branch reads a revision by its number.
fn reads_past(r: &TxnRequest) -> bool {
    r.success.iter().chain(&r.failure).any(|op| match &op.request {
        Some(Request::RequestRange(r)) => r.revision > 0,
        Some(Request::RequestTxn(r)) => reads_past(r),
        Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) | None => false,
    })
}

/// The puts of the branches taken.
fn puts_of<'a>(r: &'a TxnRequest, path: &mut impl Iterator<Item = bool>, puts: &mut Vec<&'a PutRequest>) {
    for op in branch(r, next(path)) {
        match &op.request {
            Some(Request::RequestPut(r)) => puts.push(r),
            Some(Request::RequestTxn(r)) => puts_of(r, path, puts),
            Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => {}
        }
    }
}

fn next(path: &mut impl Iterator<Item = bool>) -> bool {
    path.next().expect("every transaction of the nest was decided")
}

fn missing(c: &Compare) -> bool {
    c.target != CompareTarget::Value as i32 && compare(c, &Fields::default())
}
