//! `KV.RangeStream`: a range in pieces of bounded size, all of one revision.
//!
//! In key order at the present revision, a page of keys is looked up at a time; any other order, and the past, first collects
//! what it answers (16 bytes a key: the versions themselves are shared with the store, also where keys alone are asked for, and what a
//! piece has of them is copied when it is made). Every piece has keys and values; header, more and count come with the last, as in etcd.
//! Pieces are made when the client takes them (`pull`).
//! Invariant: one view for all pieces, whatever is written meanwhile.

use std::collections::VecDeque;

use bytes::{BufMut as _, Bytes, BytesMut};
use tonic::{Request, Response, Status};

use super::answers::kept_max;
use super::pull::{self, Plan, Source};
use super::{Api, confirm, header, sound};
use crate::caller::Caller;
use crate::env::Pool;
use crate::error::Error;
use crate::kv::{State, Wants, validate};
use crate::node::{Node, account};
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::{RangeRequest, RangeResponse, RangeStreamResponse};
use crate::pb::{KeyValue, delimited_len};

/// Bytes of a piece, unless one key-value pair alone is larger.
const PIECE_BYTES: usize = 256 << 10;
/// Keys looked up at a time.
const PAGE_KEYS: i64 = 512;

pub(super) type Pieces = pull::Pieces<RangeStreamResponse>;

impl Api {
    pub(super) async fn pieces(&self, request: Request<RangeRequest>) -> Result<Response<Pieces>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request);
        let range = request.into_inner();
        validate::range(&range)?;
        let caller = caller.await?;
        let slot = self.shared.range_streams.take(node.client().asker())?;
        if !range.serializable {
            confirm(&node).await?;
        }
        let view = node.view(&caller, Wants::range(&range))?;
        let asked = (range.key.clone(), range.range_end.clone());
        let walk = node.long(Pool::Reads, move || Walk::begin(view, range)).await??;
        let plan =
            Plan { what: "range", pool: Pool::Reads, rate: u64::MAX, kept_max: kept_max(&self.shared.account.answers) };
        // In any other order than the keys' it has references to all that it answers.
        let references = (walk.found.capacity() * size_of::<KeyValue>()) as u64;
        let kept = self.shared.account.answers.take(node.client(), references)?;
        let taken = Taken { node: node.clone(), caller, asked, walk, ended: false, _kept: kept };
        Ok(Response::new(pull::pieces(&node, plan, taken, slot)))
    }
}

/// A range on its way to a client.
struct Taken {
    node: Node,
    caller: Caller,
    /// Key and end of the range.
    asked: (Bytes, Bytes),
    walk: Walk,
    ended: bool,
    _kept: account::Taken,
}

impl Source for Taken {
    type Piece = RangeStreamResponse;

    fn piece(&mut self) -> Result<Option<(RangeStreamResponse, usize)>, Status> {
        if self.ended {
            return Ok(None);
        }
        sound(&self.node)?;
        self.node.permit(&self.caller, Wants::Keys { key: &self.asked.0, range_end: &self.asked.1 })?;
        let (mut piece, last) = self.walk.next()?;
        self.ended = last;
        if last {
            piece.header = header(&self.node, self.walk.revision);
        }
        let bytes = piece.kvs.iter().map(|kv| delimited_len(kv.as_encoded().len())).sum();
        Ok(Some((RangeStreamResponse { range_response: Some(piece) }, bytes)))
    }
}

/// Where a stream is.
struct Walk {
    view: State,
    /// The next page's; its key moves on.
    range: RangeRequest,
    /// Keys that the limit leaves; `i64::MAX` without one.
    left: i64,
    paged: bool,
    keys_only: bool,
    /// With their values.
    found: VecDeque<KeyValue>,
    /// There are keys beyond `found`.
    more: bool,
    count: i64,
    revision: i64,
}

impl Walk {
    fn begin(view: State, mut range: RangeRequest) -> Result<Self, Error> {
        let present = range.revision <= 0 || range.revision == view.revision();
        let in_key_order = range.sort_target == SortTarget::Key as i32 && range.sort_order != SortOrder::Descend as i32;
        let paged = present && in_key_order && !range.range_end.is_empty() && !range.count_only;
        let left = if range.limit > 0 { range.limit } else { i64::MAX };
        let revision = view.revision();
        let keys_only = std::mem::take(&mut range.keys_only);
        let (found, more, count) = (VecDeque::new(), false, 0);
        let mut walk = Self { view, range, left, paged, keys_only, found, more, count, revision };
        let first = walk.look_up()?;
        walk.count = first;
        Ok(walk)
    }

    /// Finds further keys; returns the count of the interval that was looked at.
    fn look_up(&mut self) -> Result<i64, Error> {
        if self.paged {
            self.range.limit = self.left.min(PAGE_KEYS);
        }
        let page = self.view.range(&self.range)?;
        self.left -= page.kvs.len() as i64;
        self.more = page.more;
        if let Some(last) = page.kvs.last().filter(|_| self.paged) {
            let mut key = BytesMut::with_capacity(last.key().len() + 1);
            key.put_slice(last.key());
            key.put_u8(0);
            self.range.key = Bytes::from(key);
        }
        self.found.extend(page.kvs);
        Ok(page.count)
    }

    /// The next piece, and whether it is the last; its header is still missing.
    fn next(&mut self) -> Result<(RangeResponse, bool), Error> {
        let mut piece = RangeResponse::default();
        let mut bytes = 0;
        loop {
            if self.found.is_empty() && self.paged && self.more && self.left > 0 {
                self.look_up()?;
            }
            let Some(next) = self.found.front() else { break };
            let next = if self.keys_only { next.without_value() } else { next.clone() };
            bytes += delimited_len(next.as_encoded().len());
            if bytes > PIECE_BYTES && !piece.kvs.is_empty() {
                return Ok((piece, false));
            }
            piece.kvs.push(next);
            self.found.pop_front();
        }
        (piece.more, piece.count) = (self.more, self.count);
        Ok((piece, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcd::PutRequest;
    use crate::pb::log::{Command, command};

    fn filled(keys: usize, bytes: usize) -> State {
        let mut kv = State::new();
        for n in 0..keys {
            let put = PutRequest { key: format!("k{n:05}").into(), value: vec![7; bytes].into(), ..Default::default() };
            let command = Command::new(1, command::Request::Put(put));
            kv.apply(&command, false).unwrap().unwrap();
        }
        kv
    }

    /// Everything that the walk gives, without headers; the sizes of its pieces.
    fn walk(view: &State, range: RangeRequest) -> (RangeResponse, usize) {
        let mut walk = Walk::begin(view.clone(), range).unwrap();
        let (mut all, mut pieces) = (RangeResponse::default(), 0);
        loop {
            let (piece, last) = walk.next().unwrap();
            let bytes: usize = piece.kvs.iter().map(|kv| delimited_len(kv.as_encoded().len())).sum();
            assert!(bytes <= PIECE_BYTES && (last || !piece.kvs.is_empty()), "a piece of {bytes} bytes");
            pieces += 1;
            all.kvs.extend(piece.kvs);
            if last {
                (all.more, all.count) = (piece.more, piece.count);
                return (all, pieces);
            }
            assert!(!piece.more && piece.count == 0, "they come with the last piece");
        }
    }

    #[test]
    fn pieces_put_together_are_the_range() {
        let view = filled(3000, 400);
        let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
        let cases = [
            (0, 0, 0, 0),
            (700, 0, 0, 0),
            (512, 1, 0, 0),
            (1, 0, 0, 0),
            (1500, 2, 0, 0),
            (0, 2, 3, 0),
            (1024, 0, 0, 2000),
        ];
        for (keys_only, (limit, sort_order, sort_target, revision)) in
            [false, true].into_iter().flat_map(|keys_only| cases.map(|case| (keys_only, case)))
        {
            let range = RangeRequest { limit, sort_order, sort_target, revision, keys_only, ..all.clone() };
            let mut expected = view.range(&range).unwrap();
            expected.header = None;
            let (found, pieces) = walk(&view, range);
            assert_eq!(found, expected, "limit {limit}, order {sort_order}, revision {revision}");
            let is_long = !keys_only && expected.kvs.len() > 650;
            assert_eq!(pieces > 1, is_long, "{pieces} pieces of {} keys", expected.kvs.len());
        }
        let counted = RangeRequest { count_only: true, ..all.clone() };
        assert_eq!(walk(&view, counted).0.count, 3000);
        let none = RangeRequest { key: "z".into(), ..all };
        assert_eq!(walk(&view, none), (RangeResponse::default(), 1));
    }
}
