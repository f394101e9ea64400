//! Asking other nodes: the calls that need no Raft.
//!
//! Absent: the connection itself (the transport implements [`Peers`]) and retries (the driver asks again anyway).

use std::sync::Arc;
use std::time::Duration;

use crate::env::net::BoxFuture;
use crate::env::{self, Env};
use crate::pb::log::Formation;
use crate::pb::peer::{AbandonResponse, AcceptResponse, JoinRequest, JoinResponse, WhoResponse};
use crate::raft;

/// Why a node gave no usable answer: a short text for people, such as `connection refused`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreachable(pub String);

/// Calls to the node at an address. An address is a `host:port`, resolved anew whenever a connection is made.
pub trait Peers: Send + Sync + 'static {
    fn who(&self, address: String, nonce: u64) -> BoxFuture<Result<WhoResponse, Unreachable>>;
    fn accept(&self, address: String, formation: Formation) -> BoxFuture<Result<AcceptResponse, Unreachable>>;
    fn abandon(&self, address: String, cluster_id: u64) -> BoxFuture<Result<AbandonResponse, Unreachable>>;
    fn join(&self, address: String, request: JoinRequest) -> BoxFuture<Result<JoinResponse, Unreachable>>;
}

impl Peers for Arc<raft::Peers> {
    fn who(&self, address: String, nonce: u64) -> BoxFuture<Result<WhoResponse, Unreachable>> {
        let peers = self.clone();
        Box::pin(async move { raft::Peers::who(&peers, &address, nonce).await.map_err(Unreachable) })
    }

    fn accept(&self, address: String, formation: Formation) -> BoxFuture<Result<AcceptResponse, Unreachable>> {
        let peers = self.clone();
        Box::pin(async move { raft::Peers::accept(&peers, &address, formation).await.map_err(Unreachable) })
    }

    fn abandon(&self, address: String, cluster_id: u64) -> BoxFuture<Result<AbandonResponse, Unreachable>> {
        let peers = self.clone();
        Box::pin(async move { raft::Peers::abandon(&peers, &address, cluster_id).await.map_err(Unreachable) })
    }

    fn join(&self, address: String, request: JoinRequest) -> BoxFuture<Result<JoinResponse, Unreachable>> {
        let peers = self.clone();
        Box::pin(async move { raft::Peers::join(&peers, &address, request).await.map_err(Unreachable) })
    }
}

/// Asks the node at `address` who it is. The answer is fresh: it echoes a new nonce.
pub async fn who(env: &Env, peers: &dyn Peers, address: &str, patience: Duration) -> Result<WhoResponse, Unreachable> {
    let nonce = env.random_u64();
    let answer = within(patience, peers.who(address.to_owned(), nonce)).await?;
    if answer.nonce != nonce {
        return Err(Unreachable("answered to another question".into()));
    }
    if answer.member_id == 0 {
        return Err(Unreachable("answered without a member id".into()));
    }
    Ok(answer)
}

/// Bounds a call by `patience`.
pub async fn within<T>(patience: Duration, call: BoxFuture<Result<T, Unreachable>>) -> Result<T, Unreachable> {
    match env::timeout(patience, call).await {
        Ok(result) => result,
        Err(_) => Err(Unreachable(format!("no answer within {patience:?}"))),
    }
}
