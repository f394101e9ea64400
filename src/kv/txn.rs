//! Transactions: compare, then do one branch.
//!
//! In three passes, so that a transaction that fails has written nothing: decide every comparison, nested ones included,
//! on the state before the transaction (as etcd does); check what can fail on the branches taken; then do them. Reads see
//! the writes before them.

use super::State;
use super::range::Interval;
use super::state::header;
use super::tree::Place;
use crate::error::Error;
use crate::pb::Fields;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::response_op::Response;
use crate::pb::etcd::{Compare, RequestOp, ResponseOp, TxnRequest, TxnResponse};

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
        let response = self.write_txn(r, &mut path.into_iter(), answer);
        self.commit();
        Ok(response)
    }

    fn decide(&self, r: &TxnRequest, path: &mut Path) {
        let succeeded = r.compare.iter().all(|c| self.holds(c));
        path.push(succeeded);
        for op in branch(r, succeeded) {
            if let Some(Request::RequestTxn(nested)) = &op.request {
                self.decide(nested, path);
            }
        }
    }

    /// A comparison holds for an interval if it holds for each of its keys. A key that does not exist compares as zeros,
    /// but its value equals nothing, nor differs from anything.
    fn holds(&self, c: &Compare) -> bool {
        let mut items = match Interval::new(&c.key, &c.range_end) {
            Interval::Key(key) => match self.live.get(Place::of(key)) {
                Some(kv) => return compare(c, &kv.fields()),
                None => return missing(c),
            },
            interval => self.live_in(interval).peekable(),
        };
        if items.peek().is_none() {
            return missing(c);
        }
        items.all(|kv| compare(c, &kv.fields()))
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

    fn write_txn(&mut self, r: &TxnRequest, path: &mut impl Iterator<Item = bool>, answer: bool) -> TxnResponse {
        let succeeded = next(path);
        let mut responses = Vec::new();
        for op in branch(r, succeeded) {
            let response = match &op.request {
                // A range is only its answer. An operation that is none was refused.
                Some(Request::RequestRange(_)) if !answer => continue,
                None => continue,
                Some(Request::RequestRange(r)) => Response::ResponseRange(self.read_range(r, self.present())),
                Some(Request::RequestPut(r)) => Response::ResponsePut(self.write_put(r, answer)),
                Some(Request::RequestDeleteRange(r)) => {
                    Response::ResponseDeleteRange(self.write_delete_range(r, answer))
                }
                Some(Request::RequestTxn(r)) => Response::ResponseTxn(self.write_txn(r, path, answer)),
            };
            if answer {
                responses.push(ResponseOp { response: Some(response) });
            }
        }
        TxnResponse { header: header(self.present()), succeeded, responses }
    }
}

fn next(path: &mut impl Iterator<Item = bool>) -> bool {
    path.next().expect("every transaction of the nest was decided")
}

fn missing(c: &Compare) -> bool {
    c.target != CompareTarget::Value as i32 && compare(c, &Fields::default())
}

/// A target without its operand is compared with zero or the empty value. What this build does not know never holds.
fn compare(c: &Compare, kv: &Fields<'_>) -> bool {
    let operand = c.target_union.as_ref();
    let order = match CompareTarget::try_from(c.target) {
        Ok(CompareTarget::Version) => {
            kv.version.cmp(&operand.map_or(0, |x| if let TargetUnion::Version(v) = x { *v } else { 0 }))
        }
        Ok(CompareTarget::Create) => {
            kv.create_revision.cmp(&operand.map_or(0, |x| if let TargetUnion::CreateRevision(v) = x { *v } else { 0 }))
        }
        Ok(CompareTarget::Mod) => {
            kv.mod_revision.cmp(&operand.map_or(0, |x| if let TargetUnion::ModRevision(v) = x { *v } else { 0 }))
        }
        Ok(CompareTarget::Lease) => {
            kv.lease.cmp(&operand.map_or(0, |x| if let TargetUnion::Lease(v) = x { *v } else { 0 }))
        }
        Ok(CompareTarget::Value) => {
            kv.value.cmp(operand.map_or(&[][..], |x| if let TargetUnion::Value(v) = x { v } else { &[] }))
        }
        Err(_) => return false,
    };
    match CompareResult::try_from(c.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Err(_) => false,
    }
}
