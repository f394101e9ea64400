//! `etcdserverpb.Lease`.
//!
//! A keep-alive stream is answered in its order; so many of its keep-alives may be under way as [`KEEPALIVES_MAX`], and the
//! client's flow control holds back the rest.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::answers::LARGE_BYTES;
use super::{Api, complete, confirm, header, header_now};
use crate::env::Pool;
use crate::error::Error;
use crate::kv::{State, Wants};
use crate::node::{Node, Trust};
use crate::pb::etcd::lease_server::Lease;
use crate::pb::etcd::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
};
use crate::pb::pieces::LargeAnswer;
use crate::pb::{Fields, KeyValue, delimited_len};
use crate::watch::Hub;

/// Keep-alives of one stream that are under way at once.
const KEEPALIVES_MAX: usize = 256;
/// Leases, or keys of one, that are listed at once; more take longer than others may wait for.
const LISTED_AT_ONCE: usize = 4096;

#[tonic::async_trait]
impl Lease for Api {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        let grant = request.into_inner();
        let mut answer = self.leases()?.grant(&node, &caller, grant.id, grant.ttl).await?;
        answer.header = complete(&node, &answer.header);
        Ok(Response::new(answer))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        let mut answer = self.leases()?.revoke(&node, &caller, request.into_inner().id).await?;
        answer.header = complete(&node, &answer.header);
        Ok(Response::new(answer))
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        // With the alarm on for all, keep-alives are still taken: or leases would end because nobody may renew them.
        let node = self.node(&request)?;
        if node.trust() == Trust::Fenced {
            return Err(Error::Corrupt.into());
        }
        let needs_leader = super::needs_leader(&request);
        let caller = self.caller(&node, &request).await?;
        let leases = self.leases()?;
        let fenced = node.clone();
        let fenced = async move {
            fenced.wait_trust(|trust| *trust == Trust::Fenced).await;
            Error::Corrupt
        };
        let ended = ended(node.clone(), self.hub()?, needs_leader, fenced);
        let answers = request
            .into_inner()
            .map(move |asked| {
                let (node, caller, leases) = (node.clone(), caller.clone(), leases.clone());
                async move {
                    let id = asked?.id;
                    let ttl = leases.renew(&node, &caller, id).await?;
                    Ok(LeaseKeepAliveResponse { header: header_now(&node), id, ttl })
                }
            })
            .buffered(KEEPALIVES_MAX);
        Ok(Response::new(Box::pin(until(answers, ended))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        let ask = request.into_inner();
        let remaining = self.leases()?.remaining(&node, &caller, ask.id).await?;
        node.wait_applied(remaining.index).await?;
        let state = node.view(&caller, if ask.keys { Wants::LeaseKeys(ask.id) } else { Wants::AnyUser })?;
        let header = header(&node, state.revision());
        // The leader has it, and it may be gone since.
        let answer = match (remaining.seconds, state.leases().get(ask.id)) {
            (Some(ttl), Some(lease)) => {
                let (granted_ttl, keys) = (lease.ttl_seconds, Vec::new());
                let answer = LeaseTimeToLiveResponse { header, id: ask.id, ttl, granted_ttl, keys };
                if ask.keys {
                    return Ok(self.with_keys(&node, state, answer).await?);
                }
                answer
            }
            _ => LeaseTimeToLiveResponse { header, id: ask.id, ttl: -1, ..LeaseTimeToLiveResponse::default() },
        };
        Ok(Response::new(answer))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        // As etcd's, it needs no leader; where there is one, it knows the order.
        let has_leader = node.status().leader.is_some();
        if has_leader {
            confirm(&node).await?;
        }
        let state = node.view(&caller, Wants::AnyUser)?;
        let header = header(&node, state.revision());
        if node.is_auth_on() {
            let (state, caller) = (state.clone(), caller.clone());
            node.long(Pool::Reads, move || state.permit(&caller, Wants::AllLeases)).await??;
        }
        let ids = |state: &State| state.leases().iter().map(|(id, _)| id).collect::<Vec<i64>>();
        let is_long = state.leases().len() > LISTED_AT_ONCE;
        let ids = if is_long {
            let state = state.clone();
            node.long(Pool::Reads, move || ids(&state)).await?
        } else {
            ids(&state)
        };
        let left = if has_leader {
            self.leases()?.remaining_millis(&caller, &ids).await.unwrap_or_default()
        } else {
            Vec::new()
        };
        let leases = if is_long {
            node.long(Pool::Reads, move || by_expiry(&state, &left)).await?
        } else {
            by_expiry(&state, &left)
        };
        Ok(Response::new(LeaseLeasesResponse { header, leases }))
    }
}

/// All leases in the order in which they end, which `left` says in milliseconds, in the order of their ids; where nobody knows, as if none
/// had been kept alive. Of two that end together the one granted first is first.
fn by_expiry(state: &State, left: &[i64]) -> Vec<LeaseStatus> {
    let mut left = left.iter().copied();
    let mut leases: Vec<_> = state
        .leases()
        .iter()
        .map(|(id, lease)| {
            let known = left.next().filter(|millis| *millis >= 0);
            (known.unwrap_or_else(|| lease.start_seconds().saturating_mul(1000)), lease.grant, id)
        })
        .collect();
    leases.sort_unstable();
    leases.into_iter().map(|(.., id)| LeaseStatus { id }).collect()
}

impl Api {
    /// The answer with the keys that go with the lease. A key may be as large as a request, so it is counted what they take before they
    /// are copied, and many are written in pieces.
    async fn with_keys(
        &self,
        node: &Node,
        state: State,
        answer: LeaseTimeToLiveResponse,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Error> {
        let lease = answer.id;
        let count = move |state: &State, most: usize| {
            let sizes = state.lease_keys(lease).take(most).map(|kv| delimited_len(kv.key().len()));
            sizes.fold((0, 0), |(bytes, keys), one| (bytes + one, keys + 1))
        };
        let (mut bytes, mut keys) = count(&state, LISTED_AT_ONCE + 1);
        if bytes < LARGE_BYTES && keys <= LISTED_AT_ONCE {
            let keys = state.lease_keys(lease).map(|kv| Bytes::copy_from_slice(kv.key())).collect();
            return Ok(Response::new(LeaseTimeToLiveResponse { keys, ..answer }));
        }
        if keys > LISTED_AT_ONCE {
            let state = state.clone();
            (bytes, keys) = node.long(Pool::Reads, move || count(&state, usize::MAX)).await?;
        }
        let bytes = bytes + prost::Message::encoded_len(&answer);
        let make = move || {
            let key = |kv: &KeyValue| KeyValue::new(Fields { key: kv.key(), ..Fields::default() });
            LargeAnswer::TimeToLive(answer, state.lease_keys(lease).map(key).collect())
        };
        self.own_answer(node, (bytes, keys), make).await
    }
}

/// Resolves with the reason when a long stream has to end: this member stops, its data is `corrupt`, or the leader is lost and the
/// client has asked to be told.
pub(super) async fn ended(node: Node, hub: Hub, needs_leader: bool, corrupt: impl Future<Output = Error>) -> Error {
    tokio::select! {
        error = corrupt => error,
        () = node.env().stopping.cancelled() => Error::Stopped,
        () = node.env().shutdown.cancelled() => Error::Stopped,
        () = hub.leader_lost(&node), if needs_leader => Error::NoLeader,
    }
}

/// A stream that ends with the error that `ended` gives.
pub(super) fn until<T: Send>(
    answers: impl Stream<Item = Result<T, Status>> + Send,
    ended: impl Future<Output = Error> + Send,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let (tell, told) = tokio::sync::oneshot::channel();
    let ended = async move { drop(tell.send(ended.await)) };
    let last = stream::once(told).filter_map(|told| async move { told.ok().map(|error| Err(error.into())) });
    answers.take_until(ended).chain(last)
}
