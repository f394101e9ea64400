//! `etcdserverpb.KV`.

use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::answers::Made;
use super::caller::Asking;
use super::slow::Slow;
use super::{Api, complete, confirm, header_now, mismatched, wrong_first};
use crate::caller::Caller;
use crate::env::{Instant, Pool, planted};
use crate::error::Error;
use crate::kv::{self, Cost, State, Wants, validate};
use crate::metrics::{RequestKind, metrics};
use crate::node::Node;
use crate::pb::etcd::kv_server::Kv;
use crate::pb::etcd::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse, request_op,
};
use crate::pb::log::{Answer, Command, answer, command};
use crate::pb::pieces::LargeAnswer;

/// What a write waits for, in the log: its queue, a majority's disks, and apply.
const RAFT: &str = "Raft";

impl Api {
    /// Carries a request through Raft.
    pub(super) fn propose<'a>(
        &self,
        node: &'a Node,
        caller: &Caller,
        request: command::Request,
    ) -> impl Future<Output = Result<Answer, Error>> + Send + use<'a> {
        node.propose(caller, Command::new(kv::CLUSTER_VERSION_MIN, request))
    }

    /// What waits holds the parts of the request that are needed, and not the request.
    fn read_range(
        &self,
        request: Request<RangeRequest>,
        begun: Instant,
    ) -> Result<impl Future<Output = Result<Response<RangeResponse>, Status>> + Send + use<'_>, Error> {
        let node = self.data_node(&request)?;
        let asking = self.asking(&node, &request);
        let range = request.into_inner();
        validate::range(&range)?;
        let slow = self.slow_since(begun, "Range", &range.key, &range.range_end);
        Ok(self.read_keys(node, asking, range, slow))
    }

    async fn read_keys(
        &self,
        node: Node,
        asking: Asking,
        range: RangeRequest,
        mut slow: Slow,
    ) -> Result<Response<RangeResponse>, Status> {
        let caller = self.who(&node, asking).await?;
        if !matches!(caller, Caller::Nobody) {
            slow.waited("who asks");
        }
        if !range.serializable && !planted!("read-without-read-index") {
            confirm(&node).await?;
            slow.waited("the read index");
        }
        let (reader, asked, caller) = (&node, &range, &caller);
        let make = || async move {
            let made = |answer: Result<RangeResponse, Error>, node: &Node, freed| {
                let mut answer = answer?;
                answer.header = complete(node, &answer.header);
                Ok(Made::new(answer, freed))
            };
            if asked.range_end.is_empty() {
                let look = |state: &State| (state.range(asked), state.freed_bytes());
                let (answer, freed) = reader.look(caller, Wants::range(asked), look)?;
                return made(answer, reader, freed);
            }
            let reading = {
                // A view, so that no write waits for a long scan.
                let state = reader.view(caller, Wants::range(asked))?;
                let freed = state.freed_bytes();
                if !state.is_long_range(asked) {
                    return made(state.range(asked), reader, freed);
                }
                let (asked, node) = (asked.clone(), reader.clone());
                Box::pin(reader.long(Pool::Reads, move || made(state.range(&asked), &node, freed)))
            };
            reading.await?
        };
        let (own, versions) = if range.range_end.is_empty() {
            (range.keys_only.then_some(0), 0)
        } else {
            node.look(caller, Wants::range(&range), |state| {
                let is_long = state.is_long_range(&range);
                let cost = if is_long || range.keys_only { state.range_cost(&range) } else { Cost::default() };
                (range.keys_only.then_some(cost.bytes), if is_long { cost.keys } else { 0 })
            })?
        };
        let answer = self.read_answer(&node, own, versions, make, LargeAnswer::Range).await?;
        slow.ended("the read");
        slow.read_keys(answer.get_ref().count);
        Ok(answer)
    }

    /// `txn` writes nothing.
    async fn read_txn(&self, node: &Node, caller: &Caller, txn: TxnRequest) -> Result<Response<TxnResponse>, Status> {
        validate::txn(&txn, &self.shared.limits)?;
        if !is_serializable(&txn) {
            confirm(node).await?;
        }
        let (reader, asked, limits) = (node, &txn, &self.shared.limits);
        let make = || async move {
            let state = reader.view(caller, Wants::Txn(asked))?;
            let cost = state.txn_cost(asked);
            state.check_cost(cost, limits.request_cost_max)?;
            let freed = state.freed_bytes();
            let made = move |answer: Result<TxnResponse, Error>, node: &Node| {
                let mut answer = answer?;
                answer.header = complete(node, &answer.header);
                Ok(Made::new(answer, freed))
            };
            if !cost.is_long_to_read() {
                return made(state.read_txn(asked), reader);
            }
            let (asked, node) = (asked.clone(), reader.clone());
            reader.long(Pool::Reads, move || made(state.read_txn(&asked), &node)).await?
        };
        let (own, versions) = if !has_intervals(&txn) && !has_keys_only(&txn) {
            (None, 0)
        } else {
            let state = node.view(caller, Wants::Txn(&txn))?;
            let cost = state.txn_cost(&txn);
            state.check_cost(cost, limits.request_cost_max)?;
            let own = has_keys_only(&txn).then_some(cost.bytes);
            (own, if cost.is_long_to_read() { cost.keys } else { 0 })
        };
        Ok(self.read_answer(node, own, versions, make, LargeAnswer::Txn).await?)
    }
}

/// The calls that are one message each way, without the box around each that the service's trait makes.
pub trait OnKeys: Clone + Send + Sync + 'static {
    fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> impl Future<Output = Result<Response<RangeResponse>, Status>> + Send;

    fn put(&self, request: Request<PutRequest>) -> impl Future<Output = Result<Response<PutResponse>, Status>> + Send;

    fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> impl Future<Output = Result<Response<DeleteRangeResponse>, Status>> + Send;

    fn txn(&self, request: Request<TxnRequest>) -> impl Future<Output = Result<Response<TxnResponse>, Status>> + Send;
}

impl OnKeys for Api {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let begun = Instant::now();
        let answer = match self.read_range(request, begun) {
            Ok(reading) => reading.await,
            Err(refused) => Err(refused.into()),
        };
        metrics().request(RequestKind::Range, is_success(&answer), begun.elapsed());
        answer
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let node = self.data_node(&request)?;
        let wrong = |refused| wrong_first(validate::put(request.get_ref()), refused);
        let caller = self.caller(&node, &request).await.map_err(wrong)?;
        let put = request.into_inner();
        let mut slow = self.slow("Put", &put.key, &Bytes::new());
        let outcome = self.propose(&node, &caller, command::Request::Put(put)).await;
        slow.ended(RAFT);
        match outcome?.response {
            Some(answer::Response::Put(mut answer)) => {
                answer.header = complete(&node, &answer.header);
                Ok(Response::new(answer))
            }
            _ => Err(mismatched()),
        }
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let node = self.data_node(&request)?;
        let wrong = |refused| wrong_first(validate::delete_range(request.get_ref()), refused);
        let caller = self.caller(&node, &request).await.map_err(wrong)?;
        let delete = request.into_inner();
        let mut slow = self.slow("DeleteRange", &delete.key, &delete.range_end);
        let outcome = self.propose(&node, &caller, command::Request::DeleteRange(delete)).await;
        slow.ended(RAFT);
        match outcome?.response {
            Some(answer::Response::DeleteRange(mut answer)) => {
                answer.header = complete(&node, &answer.header);
                Ok(self.write_answer(&node, answer, LargeAnswer::DeleteRange).await?)
            }
            _ => Err(mismatched()),
        }
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let node = self.data_node(&request)?;
        let wrong = |refused| wrong_first(validate::txn(request.get_ref(), &self.shared.limits), refused);
        let caller = self.caller(&node, &request).await.map_err(wrong)?;
        let txn = request.into_inner();
        if kv::is_read_only(&txn) {
            let begun = Instant::now();
            let (key, range_end) = first_keys(&txn);
            let mut slow = self.slow_since(begun, "Txn", &key, &range_end);
            let answer = Box::pin(self.read_txn(&node, &caller, txn)).await;
            let took = slow.ended("the read index and the read");
            metrics().request(RequestKind::ReadonlyTxn, is_success(&answer), took);
            return answer;
        }
        let (key, range_end) = first_keys(&txn);
        let mut slow = self.slow("Txn", &key, &range_end);
        let outcome = self.propose(&node, &caller, command::Request::Txn(txn)).await;
        slow.ended(RAFT);
        match outcome?.response {
            Some(answer::Response::Txn(mut answer)) => {
                answer.header = complete(&node, &answer.header);
                Ok(self.write_answer(&node, answer, LargeAnswer::Txn).await?)
            }
            _ => Err(mismatched()),
        }
    }
}

#[tonic::async_trait]
impl Kv for Api {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        OnKeys::range(self, request).await
    }

    type RangeStreamStream = super::range_stream::Pieces;

    async fn range_stream(&self, request: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        self.pieces(request).await
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        OnKeys::put(self, request).await
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        OnKeys::delete_range(self, request).await
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        OnKeys::txn(self, request).await
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        node.permit(&caller, Wants::Root)?;
        let compact = request.into_inner();
        let (revision, physical) = (compact.revision, compact.physical);
        match self.propose(&node, &caller, command::Request::Compact(compact)).await?.response {
            Some(answer::Response::Compact(_)) => {
                if physical {
                    node.wait_swept(revision).await?;
                }
                Ok(Response::new(CompactionResponse { header: header_now(&node) }))
            }
            _ => Err(mismatched()),
        }
    }
}

/// The keys of a transaction's first comparison or operation, which stand for it.
fn first_keys(txn: &TxnRequest) -> (Bytes, Bytes) {
    if let Some(compare) = txn.compare.first() {
        return (compare.key.clone(), compare.range_end.clone());
    }
    match txn.success.iter().chain(&txn.failure).find_map(|op| op.request.as_ref()) {
        Some(request_op::Request::RequestPut(put)) => (put.key.clone(), Bytes::new()),
        Some(request_op::Request::RequestRange(range)) => (range.key.clone(), range.range_end.clone()),
        Some(request_op::Request::RequestDeleteRange(delete)) => (delete.key.clone(), delete.range_end.clone()),
        Some(request_op::Request::RequestTxn(_)) | None => (Bytes::new(), Bytes::new()),
    }
}

/// As etcd counts a read.
fn is_success<T>(answer: &Result<Response<T>, Status>) -> bool {
    answer.as_ref().err().is_none_or(|status| status.message().ends_with("required revision has been compacted"))
}

/// True if some read or comparison of the transaction is about more than one key.
fn has_intervals(txn: &TxnRequest) -> bool {
    let in_ops = txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(request_op::Request::RequestRange(range)) => !range.range_end.is_empty(),
        Some(request_op::Request::RequestTxn(inner)) => has_intervals(inner),
        _ => false,
    });
    in_ops || txn.compare.iter().any(|compare| !compare.range_end.is_empty())
}

/// True if some read of the transaction asks for keys alone.
fn has_keys_only(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(request_op::Request::RequestRange(range)) => range.keys_only,
        Some(request_op::Request::RequestTxn(inner)) => has_keys_only(inner),
        _ => false,
    })
}

/// True if every read of the transaction asks for this member's own state. Comparisons alone do not ask for it: a transaction
/// without operations is linearizable.
fn is_serializable(txn: &TxnRequest) -> bool {
    let of = |ops: &[RequestOp]| {
        ops.iter().all(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => range.serializable,
            Some(request_op::Request::RequestTxn(inner)) => is_serializable(inner),
            _ => true,
        })
    };
    !(txn.success.is_empty() && txn.failure.is_empty()) && of(&txn.success) && of(&txn.failure)
}
