//! Which keys a transaction may write, in whichever branches: no key is put twice, nor put where it was deleted.
//!
//! The rule is etcd's, order and all: of one list of operations, its own deletes come first, then its nested transactions in their order,
//! then its own puts; a put may meet no put and no delete that came before it. So a put of a nested transaction may meet a delete of a later
//! one: the key is then put and deleted in one revision. The two branches of one transaction exclude each other, and may meet. A delete of
//! everything from a key on (`range_end` of one zero byte) meets nothing, for etcd takes that end by its letter.
//! Invariant: time is O(n log² n) in the operations of the nest, however deep: of two sets the smaller is gone through, and joined to the
//! larger. Absent: what the puts and deletes do; apply takes any order.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{DeleteRangeRequest, RequestOp};

/// A place between keys: just before a key, or (`true`) just after it.
type Edge<'a> = (&'a [u8], bool);

/// What a list of operations may put and delete.
#[derive(Default)]
pub(super) struct Writes<'a> {
    puts: BTreeSet<&'a [u8]>,
    /// Begin and end of each deleted interval; none meets another.
    deletes: BTreeMap<Edge<'a>, Edge<'a>>,
}

impl<'a> Writes<'a> {
    pub(super) fn of(ops: &'a [RequestOp]) -> Result<Self, Error> {
        let mut all = Self::default();
        for op in ops {
            if let Some(Request::RequestDeleteRange(r)) = &op.request {
                all.delete_range(r);
            }
        }
        for op in ops {
            if let Some(Request::RequestTxn(r)) = &op.request {
                let (mut one, failure) = (Self::of(&r.success)?, Self::of(&r.failure)?);
                one.join(failure);
                all.follow(one)?;
            }
        }
        let mut own = Self::default();
        for op in ops {
            if let Some(Request::RequestPut(r)) = &op.request
                && !own.puts.insert(&r.key[..])
            {
                return Err(Error::DuplicateKey);
            }
        }
        all.follow(own)?;
        Ok(all)
    }

    /// `next` is done after these.
    fn follow(&mut self, next: Self) -> Result<(), Error> {
        let (few, many) =
            if self.puts.len() < next.puts.len() { (&self.puts, &next.puts) } else { (&next.puts, &self.puts) };
        if few.iter().any(|key| many.contains(key)) || self.deletes_any(&next.puts) {
            return Err(Error::DuplicateKey);
        }
        self.join(next);
        Ok(())
    }

    fn deletes_any(&self, puts: &BTreeSet<&'a [u8]>) -> bool {
        if puts.len() < self.deletes.len() {
            return puts.iter().any(|&key| self.deletes(key));
        }
        let meets = |(begin, end): (&Edge<'a>, &Edge<'a>)| {
            // No interval begins just after a key.
            puts.range(begin.0..).next().is_some_and(|key| (*key, false) < *end)
        };
        self.deletes.iter().any(meets)
    }

    fn deletes(&self, key: &'a [u8]) -> bool {
        self.deletes.range(..=(key, false)).next_back().is_some_and(|(_, end)| (key, false) < *end)
    }

    fn delete_range(&mut self, r: &'a DeleteRangeRequest) {
        let begin = (&r.key[..], false);
        let end = if r.range_end.is_empty() { (&r.key[..], true) } else { (&r.range_end[..], false) };
        if begin < end {
            self.delete(begin, end);
        }
    }

    fn delete(&mut self, begin: Edge<'a>, end: Edge<'a>) {
        let (mut begin, mut end) = (begin, end);
        // Each interval that is taken in here is one less to be met later.
        while let Some((&met, &until)) = self.deletes.range(..=end).next_back()
            && until >= begin
        {
            self.deletes.remove(&met);
            (begin, end) = (begin.min(met), end.max(until));
        }
        self.deletes.insert(begin, end);
    }

    fn join(&mut self, mut other: Self) {
        if self.puts.len() < other.puts.len() {
            std::mem::swap(&mut self.puts, &mut other.puts);
        }
        self.puts.extend(other.puts);
        if self.deletes.len() < other.deletes.len() {
            std::mem::swap(&mut self.deletes, &mut other.deletes);
        }
        for (begin, end) in other.deletes {
            self.delete(begin, end);
        }
    }
}
