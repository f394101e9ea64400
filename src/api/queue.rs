//! Waiting in line by name: what locks and elections have in common.
//!
//! A place is the key `name/<lease in hex>`, attached to its lease; whoever has the least create revision below `name/` is served, so
//! the create revision is also the fencing token. Each waits only for the one before it, and for its own place to vanish.
//! A caller that goes away leaves the line. Absent: any state of this member's own; who calls again with the same lease
//! finds its place as it was, on any member.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::wait::until_found;
use super::{Api, mismatched, unsound};
use crate::caller::Caller;
use crate::env::{Instant, Pool, sleep};
use crate::error::Error;
use crate::kv::{self, State, Wants};
use crate::lease::Leases;
use crate::node::{Client, Node};
use crate::pb::KeyValue;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::range_request::{SortOrder, SortTarget};
use crate::pb::etcd::request_op::Request;
use crate::pb::etcd::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
    response_op,
};
use crate::pb::log::{Answer, Command, answer, command};
use crate::watch::{Hub, Output, Shape};

/// The lease of a caller that brings none, in seconds, as etcd's.
const OWN_LEASE_TTL: i64 = 60;
/// After an answer that was lost, or a leader that did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// A long line is read again after this, if there was no place for that among the long reads.
const PUT_OFF_FOR: Duration = Duration::from_secs(1);

/// A place in the line.
pub(super) struct Place {
    pub key: Bytes,
    pub create_revision: i64,
    pub lease: i64,
    /// What was found there already; `None` if the place is new.
    pub found: Option<KeyValue>,
}

/// The keys of everybody in the line.
pub(super) fn prefix(name: &[u8]) -> (Bytes, Bytes) {
    let first = [name, b"/"].concat();
    // "/" has a next byte, so that is the end of all that begins so.
    let end = [name, b"0"].concat();
    (first.into(), end.into())
}

/// A view of everybody in the line, for who may read them.
pub(super) fn line(node: &Node, caller: &Caller, name: &[u8]) -> Result<State, Error> {
    let (key, range_end) = prefix(name);
    node.view(caller, Wants::Keys { key: &key, range_end: &range_end })
}

/// Asks for who is served: the longest in the line, as of `revision` (0: now), which must not be compacted.
pub(super) fn first(name: &[u8], revision: i64) -> RangeRequest {
    let (key, range_end) = prefix(name);
    RangeRequest {
        key,
        range_end,
        revision,
        limit: 1,
        sort_order: SortOrder::Ascend.into(),
        sort_target: SortTarget::Create.into(),
        ..RangeRequest::default()
    }
}

/// Asks for the one right before `create_revision`.
fn before(name: &[u8], create_revision: i64) -> RangeRequest {
    let (key, range_end) = prefix(name);
    RangeRequest {
        key,
        range_end,
        limit: 1,
        max_create_revision: create_revision - 1,
        sort_order: SortOrder::Descend.into(),
        sort_target: SortTarget::Create.into(),
        ..RangeRequest::default()
    }
}

/// Whom `range` asks for. Everybody in the line is looked at for it, and a line may be all that there is: its name is the client's
/// choice. So a long one is read where other long reads are.
pub(super) async fn pick(node: &Node, state: State, range: RangeRequest) -> Result<Option<KeyValue>, Error> {
    let is_long = state.is_long_range(&range);
    let found = move || Ok(state.range(&range)?.kvs.pop());
    if is_long { node.long(Pool::Reads, found).await? } else { found() }
}

/// Whether `picked` says that there was no place or no turn for it. Who waits in the line anyway asks again, after the rest that this
/// takes; its view was let go of.
pub(super) async fn is_put_off(node: &Node, picked: &Result<Option<KeyValue>, Error>) -> bool {
    let is_so = matches!(picked, Err(Error::TooManyRequests | Error::Timeout));
    if is_so {
        sleep(node.env().jitter(PUT_OFF_FOR)).await;
    }
    is_so
}

/// True while `key` lives the life that began at `create_revision`.
fn is_there(state: &State, key: &Bytes, create_revision: i64) -> bool {
    let range = RangeRequest { key: key.clone(), ..RangeRequest::default() };
    let found = state.range(&range).ok().and_then(|answer| answer.kvs.into_iter().next());
    found.is_some_and(|kv| kv.create_revision() == create_revision)
}

/// A transaction that does `then` if the key's life began at `create_revision` (0: there is no such key), else `otherwise`.
pub(super) fn if_created_at(
    key: &Bytes,
    create_revision: i64,
    then: Request,
    otherwise: Option<Request>,
) -> TxnRequest {
    let compare = Compare {
        key: key.clone(),
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        target_union: Some(TargetUnion::CreateRevision(create_revision)),
        ..Compare::default()
    };
    let op = |request| RequestOp { request: Some(request) };
    TxnRequest { compare: vec![compare], success: vec![op(then)], failure: otherwise.into_iter().map(op).collect() }
}

pub(super) fn delete(key: &Bytes) -> Request {
    Request::RequestDeleteRange(DeleteRangeRequest { key: key.clone(), ..DeleteRangeRequest::default() })
}

impl Api {
    /// Carries a transaction through Raft.
    pub(super) async fn write_txn(
        &self,
        node: &Node,
        caller: &Caller,
        txn: TxnRequest,
    ) -> Result<TxnResponse, tonic::Status> {
        match self.propose(node, caller, command::Request::Txn(txn)).await?.response {
            Some(answer::Response::Txn(answer)) => Ok(answer),
            _ => Err(mismatched()),
        }
    }

    /// The same, of one that does nothing more when it is done again: so a lost answer is asked for again, within the time of a
    /// request.
    async fn write_idempotent(
        &self,
        node: &Node,
        caller: &Caller,
        txn: TxnRequest,
    ) -> Result<TxnResponse, tonic::Status> {
        let deadline = Instant::now() + node.options().request_timeout;
        loop {
            let lost = match self.propose(node, caller, command::Request::Txn(txn.clone())).await {
                Ok(Answer { response: Some(answer::Response::Txn(answer)) }) => return Ok(answer),
                Ok(_) => return Err(mismatched()),
                Err(error @ (Error::TimeoutLeaderFailure | Error::TimeoutConnectionLost)) => error,
                Err(error) => return Err(error.into()),
            };
            if Instant::now() >= deadline {
                return Err(lost.into());
            }
            sleep(RETRY_AFTER).await;
        }
    }

    /// Joins the line, or finds the place that this lease has in it, which holds `value` from then on, and waits for the turn.
    /// Returns the place, and the header of the moment in which its turn had come.
    pub(super) async fn queue(
        &self,
        node: &Node,
        caller: &Caller,
        name: &[u8],
        lease: i64,
        value: Bytes,
    ) -> Result<(Place, ResponseHeader), tonic::Status> {
        let leases = self.leases()?;
        // Before anything is left behind by who may not wait there.
        line(node, caller, name)?;
        let (lease, own) = match lease {
            0 => (leases.grant(node, caller, 0, OWN_LEASE_TTL).await?.id, true),
            lease => (lease, false),
        };
        let mut leaver = Leaver {
            // Who leaves does so whatever else its client asks for.
            node: node.clone().on_behalf_of(Client::default()),
            caller: caller.clone(),
            leases: leases.clone(),
            place: None,
            leaves: false,
            own: own.then_some(lease),
        };
        let place = self.join_certainly(node, caller, name, lease, value.clone()).await?;
        leaver.place = Some((place.key.clone(), place.create_revision));
        leaver.leaves = place.found.is_none();
        if place.found.as_ref().is_some_and(|kv| kv.value() != value) {
            self.set_value(node, caller, &place.key, place.create_revision, lease, value).await?;
        }
        let hub = self.hub()?;
        let turn = tokio::select! {
            turn = turn((node, caller), &hub, name, &place, &mut leaver.leaves) => turn,
            failed = keep(node, &leases, caller, lease), if own => Err(failed),
            corrupt = unsound(node) => Err(corrupt),
        };
        match turn {
            Ok(header) => {
                leaver.stay();
                Ok((place, header))
            }
            Err(error) => {
                // Whoever calls again elsewhere with the same lease shall find its place.
                if matches!(error, Error::Stopped | Error::Corrupt) && !own {
                    leaver.stay();
                }
                Err(error.into())
            }
        }
    }

    /// Joins although the caller goes away meanwhile, to know what there is to leave then.
    async fn join_certainly(
        &self,
        node: &Node,
        caller: &Caller,
        name: &[u8],
        lease: i64,
        value: Bytes,
    ) -> Result<Place, tonic::Status> {
        let (tell, told) = oneshot::channel();
        let (api, at, caller, name) = (self.clone(), node.clone(), caller.clone(), name.to_vec());
        node.env().spawn(async move {
            let joined = api.join(&at, &caller, &name, lease, value).await;
            // Nobody is there to take it. A place that was there before is another call's.
            if let Err(Ok(place)) = tell.send(joined)
                && place.found.is_none()
            {
                let txn = if_created_at(&place.key, place.create_revision, delete(&place.key), None);
                let _ = api.write_txn(&at, &caller, txn).await;
            }
        });
        told.await.map_err(|_| Error::Stopped)?
    }

    async fn join(
        &self,
        node: &Node,
        caller: &Caller,
        name: &[u8],
        lease: i64,
        value: Bytes,
    ) -> Result<Place, tonic::Status> {
        let key = Bytes::from([name, format!("/{lease:x}").as_bytes()].concat());
        let put = Request::RequestPut(PutRequest { key: key.clone(), value, lease, ..PutRequest::default() });
        let get = Request::RequestRange(RangeRequest { key: key.clone(), ..RangeRequest::default() });
        // Done twice, it finds its own place.
        let answer = self.write_idempotent(node, caller, if_created_at(&key, 0, put, Some(get))).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        let found = answer.responses.into_iter().find_map(|op| match op.response {
            Some(response_op::Response::ResponseRange(range)) => range.kvs.into_iter().next(),
            _ => None,
        });
        let create_revision = found.as_ref().map_or(revision, KeyValue::create_revision);
        Ok(Place { key, create_revision, lease, found })
    }

    /// Sets the value of a place that is still there; else tells that it is not.
    pub(super) async fn set_value(
        &self,
        node: &Node,
        caller: &Caller,
        key: &Bytes,
        create_revision: i64,
        lease: i64,
        value: Bytes,
    ) -> Result<ResponseHeader, tonic::Status> {
        let put = Request::RequestPut(PutRequest { key: key.clone(), value, lease, ..PutRequest::default() });
        let answer = self.write_txn(node, caller, if_created_at(key, create_revision, put, None)).await?;
        if answer.succeeded { Ok(answer.header.unwrap_or_default()) } else { Err(Error::ElectionNotLeader.into()) }
    }
}

/// Waits until nobody is before `place`; fails if it is lost meanwhile. `leaves` says at each moment whether a caller that goes away
/// takes the place with it: not if that is first in the line and was found, for another call may have been told so.
async fn turn(
    (node, caller): (&Node, &Caller),
    hub: &Hub,
    name: &[u8],
    place: &Place,
    leaves: &mut bool,
) -> Result<ResponseHeader, Error> {
    let (first, end) = prefix(name);
    let all = Wants::Keys { key: &first, range_end: &end };
    // This member may not have seen yet that the place was taken.
    until_found(node, caller, all, |state| (state.revision() >= place.create_revision).then_some(())).await?;
    loop {
        let state = node.view(caller, all)?;
        if !is_there(&state, &place.key, place.create_revision) {
            return Err(Error::SessionExpired);
        }
        let revision = state.revision();
        // Nobody may be ahead any more.
        *leaves = place.found.is_none();
        let ahead = pick(node, state, before(name, place.create_revision)).await;
        if is_put_off(node, &ahead).await {
            continue;
        }
        let Some(ahead) = ahead? else { break };
        *leaves = true;
        let mut session = hub.session(node.client(), caller.clone());
        for (watcher, key) in [(0, place.key.clone()), (1, Bytes::copy_from_slice(ahead.key()))] {
            let deleted = Shape { puts: false, ..Shape::of_key(key) };
            session.watch(watcher, &deleted, revision + 1)?;
        }
        // Whichever was deleted, or may have been: the state says what is so now.
        loop {
            match session.next().await.map_err(|_| Error::Stopped)? {
                Output::CaughtUp => {}
                Output::Denied { error, .. } => return Err(error),
                Output::Events { .. } | Output::Compacted { .. } => break,
            }
        }
    }
    // That nobody is before stays true. That the own place is still there must be as new as this moment.
    while let Err(error) = node.read_index().await {
        // Whoever waits in line waits for a leader too.
        if error == Error::Stopped {
            return Err(error);
        }
        sleep(RETRY_AFTER).await;
    }
    let (there, revision) =
        node.look(caller, all, |state| (is_there(state, &place.key, place.create_revision), state.revision()))?;
    if there { Ok(super::header(node, revision).unwrap_or_default()) } else { Err(Error::SessionExpired) }
}

/// Keeps the lease of a caller that brought none while it waits.
async fn keep(node: &Node, leases: &Leases, caller: &Caller, lease: i64) -> Error {
    loop {
        sleep(Duration::from_secs(OWN_LEASE_TTL as u64 / 3)).await;
        match leases.renew(node, caller, lease).await {
            Ok(0) => return Error::SessionExpired,
            Ok(_) => {}
            Err(error @ (Error::Stopped | Error::PermissionDenied | Error::InvalidAuthToken | Error::UserEmpty)) => {
                return error;
            }
            Err(error) => tracing::debug!(%error, lease = format!("{lease:x}"), "not renewed; tried again"),
        }
    }
}

/// Leaves the line for a caller that goes away.
struct Leaver {
    node: Node,
    caller: Caller,
    leases: Leases,
    place: Option<(Bytes, i64)>,
    /// Whether the place goes with the caller.
    leaves: bool,
    /// A lease that was granted for this caller alone.
    own: Option<i64>,
}

impl Leaver {
    fn stay(&mut self) {
        (self.place, self.own) = (None, None);
    }
}

impl Drop for Leaver {
    fn drop(&mut self) {
        let (place, own) = (self.place.take().filter(|_| self.leaves), self.own.take());
        if place.is_none() && own.is_none() {
            return;
        }
        let (node, caller, leases) = (self.node.clone(), self.caller.clone(), self.leases.clone());
        // Should this fail, the lease's end does it.
        let leave = async move {
            if let Some(lease) = own {
                let _ = leases.revoke(&node, &caller, lease).await;
            } else if let Some((key, create_revision)) = place {
                let txn = if_created_at(&key, create_revision, delete(&key), None);
                let needs = kv::CLUSTER_VERSION_MIN;
                let _ = node.propose(&caller, Command::new(needs, command::Request::Txn(txn))).await;
            }
        };
        let shutdown = self.node.env().shutdown.clone();
        self.node.env().spawn(async move {
            tokio::select! {
                () = leave => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use futures_util::FutureExt as _;
    use parking_lot::Mutex;
    use tokio::sync::mpsc;

    use super::*;
    use crate::env::Env;
    use crate::env::sim::{SimDisk, SimNet};
    use crate::node::Options;
    use crate::raft::Peers;
    use crate::raft::tests::{THIS, running_raft};

    /// A node with threads, which nobody leads.
    async fn node() -> Node {
        let net = SimNet::new(1, Duration::from_millis(1));
        let env = Env::sim(1, Arc::new(SimDisk::new(1)), net.host([10, 0, 0, 1].into()));
        let (raft, store, _) = running_raft(&env).await;
        let options = Options {
            request_timeout: Duration::from_secs(600),
            batch_bytes_max: 256 << 10,
            batches_in_flight_max: 2,
            queue_requests_max: 1000,
            queue_bytes_max: 64 << 20,
            lease_reads: false,
            leader_silence_max: Duration::from_secs(2),
            retry_interval: Duration::from_millis(50),
            limits: kv::Limits::default(),
        };
        Node::start(Env::real(), options, THIS, raft, store, Peers::new(env))
    }

    /// Holds all threads of the pool until the sender is dropped.
    async fn hold(env: &Env) -> std::sync::mpsc::Sender<()> {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (held, (begin, mut begun)) = (Arc::new(Mutex::new(held)), mpsc::unbounded_channel());
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).max(2);
        for _ in 0..threads {
            let (env, held, begin) = (env.clone(), held.clone(), begin.clone());
            let job = move || {
                begin.send(()).unwrap();
                held.lock().recv().is_err()
            };
            env.clone().spawn(async move { env.long(Pool::Reads, job).await });
        }
        for _ in 0..threads {
            begun.recv().await.unwrap();
        }
        release
    }

    /// By key, when its life began.
    type Line = BTreeMap<String, i64>;

    /// Those in the line "" among keys that come and go, now, and as of a revision before.
    fn some_state(random: &mut fastrand::Rng, keys: u32) -> (State, Line, (i64, Line)) {
        let (mut state, mut line, mut past) = (State::new(), Line::new(), (1, Line::new()));
        for step in 0..2 * keys {
            let key = format!("/{}", random.u32(..keys));
            let request = if random.u8(..5) == 0 {
                line.remove(&key);
                command::Request::DeleteRange(DeleteRangeRequest { key: key.into(), ..Default::default() })
            } else {
                line.entry(key.clone()).or_insert(state.revision() + 1);
                command::Request::Put(PutRequest { key: key.into(), ..Default::default() })
            };
            state.apply(&Command::new(1, request), false).unwrap().unwrap();
            if step == keys {
                past = (state.revision(), line.clone());
            }
        }
        (state, line, past)
    }

    #[tokio::test]
    async fn a_long_line_is_read_among_long_reads_and_a_short_one_at_once() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let node = node().await;
        for keys in [random.u32(1..60), random.u32(10_000..15_000)] {
            let (state, line, (revision, past)) = some_state(&mut random, keys);
            let place = random.i64(2..=state.revision());
            let oldest = |line: &Line| line.iter().min_by_key(|(key, at)| (**at, *key)).map(|(key, _)| key.clone());
            let ahead =
                line.iter().filter(|(_, at)| **at < place).max_by_key(|(_, at)| **at).map(|(key, _)| key.clone());
            let asked =
                [(first(b"", 0), oldest(&line)), (first(b"", revision), oldest(&past)), (before(b"", place), ahead)];
            for (range, expected) in asked {
                let release = hold(node.env()).await;
                let mut picked = Box::pin(pick(&node, state.clone(), range));
                let at_once = (&mut picked).now_or_never();
                assert_eq!(at_once.is_some(), keys < 60, "of {} keys", line.len());
                drop(release);
                let picked = match at_once {
                    Some(picked) => picked,
                    None => picked.await,
                };
                let picked = picked.unwrap().map(|kv| String::from_utf8(kv.key().to_vec()).unwrap());
                assert_eq!(picked, expected);
            }
        }
    }
}
