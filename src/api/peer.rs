//! `quorate.peer.v1.Peer`: what members ask of one another.
//!
//! `Who`, `Accept`, `Abandon` and `Join` are answered in every state; Raft's calls only while Raft runs, and only to callers of
//! the same cluster that mean this very member.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, stream};
use parking_lot::RwLock;
use tonic::{Request, Response, Status, Streaming};

use crate::cluster::{Audit, Bootstrap, Manager, Reconciler};
use crate::kv;
use crate::lease::Leases;
use crate::node::Node;
use crate::pb::peer::peer_server::Peer;
use crate::pb::peer::{
    AbandonRequest, AbandonResponse, AcceptRequest, AcceptResponse, AppendRequest, AppendResponse, ForwardRequest,
    ForwardResponse, JoinRequest, JoinResponse, LeasesRequest, LeasesResponse, ManageRequest, ManageResponse,
    SnapshotChunk, SnapshotHead, SnapshotOffsetResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse, WhoRequest, WhoResponse, append_response,
};
use crate::raft::Rpc;

/// A running member, as its peers reach it.
#[derive(Clone)]
pub struct Running {
    pub rpc: Rpc,
    pub node: Node,
    pub reconciler: Arc<Reconciler>,
    pub leases: Leases,
    pub manager: Arc<Manager>,
}

/// The peer service of one process.
#[derive(Clone)]
pub struct PeerApi {
    bootstrap: Arc<Bootstrap>,
    running: Arc<RwLock<Option<Running>>>,
    audit: Arc<RwLock<Option<Arc<Audit>>>>,
}

impl PeerApi {
    pub fn new(bootstrap: Arc<Bootstrap>) -> Self {
        Self { bootstrap, running: Arc::default(), audit: Arc::default() }
    }

    /// From now on Raft's calls go to `running`.
    pub fn set_running(&self, running: Option<Running>) {
        *self.running.write() = running;
    }

    /// If this member leads: why a wanted membership change is not made, and what else should be known of the membership.
    pub fn remarks(&self) -> Vec<String> {
        let Some(reconciler) = self.running.read().as_ref().map(|running| running.reconciler.clone()) else {
            return Vec::new();
        };
        if reconciler.observed().is_none() {
            return Vec::new();
        }
        let view = reconciler.view();
        let remarks = view.blocked.into_iter().chain(view.remarks);
        remarks.map(|remark| format!("{} [{}]", remark.sentence, remark.name)).collect()
    }

    /// The comparison of the members' states, which says here what it has found.
    pub fn set_audit(&self, audit: Arc<Audit>) {
        *self.audit.write() = Some(audit);
    }

    /// Which members' states differ, if this member leads and some do.
    pub fn audit_note(&self) -> Option<String> {
        self.audit.read().as_ref()?.note()
    }

    fn running(&self) -> Result<Running, Status> {
        self.running.read().clone().ok_or_else(|| Status::unavailable("this node does not run Raft yet"))
    }

    async fn append_one(&self, request: AppendRequest) -> Result<AppendResponse, Status> {
        let running = self.running()?;
        let response = running.rpc.append(request).await?;
        if response.outcome() != append_response::Outcome::HigherVote {
            running.node.hear_leader();
        }
        Ok(response)
    }
}

fn disk(error: impl std::fmt::Display) -> Status {
    Status::internal(format!("the promise could not be made durable: {error}"))
}

#[tonic::async_trait]
impl Peer for PeerApi {
    async fn who(&self, request: Request<WhoRequest>) -> Result<Response<WhoResponse>, Status> {
        let WhoRequest { nonce, digest_index } = request.into_inner();
        let mut answer = self.bootstrap.who(nonce);
        answer.digest_version = kv::DIGEST_VERSION;
        if let Ok(running) = self.running() {
            let store = running.node.store();
            answer.digest_unknown = store.read(|s| s.kv.digest().is_none());
            answer.digest = (digest_index != 0).then(|| store.digest_at(digest_index)).flatten();
        }
        Ok(Response::new(answer))
    }

    async fn accept(&self, request: Request<AcceptRequest>) -> Result<Response<AcceptResponse>, Status> {
        let formation =
            request.into_inner().formation.ok_or_else(|| Status::invalid_argument("accept without a formation"))?;
        Ok(Response::new(self.bootstrap.accept(formation).await.map_err(disk)?))
    }

    async fn abandon(&self, request: Request<AbandonRequest>) -> Result<Response<AbandonResponse>, Status> {
        Ok(Response::new(self.bootstrap.abandon(request.into_inner().cluster_id).await.map_err(disk)?))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let running = self.running()?;
        Ok(Response::new(running.reconciler.join(request.into_inner())))
    }

    async fn manage(&self, request: Request<ManageRequest>) -> Result<Response<ManageResponse>, Status> {
        let running = self.running()?;
        let request = request.into_inner();
        running.rpc.check(request.envelope.as_ref())?;
        Ok(Response::new(running.manager.answer(request.operation).await))
    }

    type AppendStream = Pin<Box<dyn Stream<Item = Result<AppendResponse, Status>> + Send>>;

    async fn append(&self, request: Request<Streaming<AppendRequest>>) -> Result<Response<Self::AppendStream>, Status> {
        let shutdown = self.running()?.node.env().shutdown.clone();
        let api = self.clone();
        let answers = request.into_inner().then(move |request| {
            let api = api.clone();
            async move { api.append_one(request?).await }
        });
        Ok(Response::new(Box::pin(answers.take_until(shutdown.cancelled_owned()))))
    }

    async fn vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        Ok(Response::new(self.running()?.rpc.vote(request.into_inner(), false).await?))
    }

    async fn pre_vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        Ok(Response::new(self.running()?.rpc.vote(request.into_inner(), true).await?))
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        Ok(Response::new(self.running()?.rpc.transfer_leader(request.into_inner()).await?))
    }

    async fn snapshot_offset(
        &self,
        request: Request<SnapshotHead>,
    ) -> Result<Response<SnapshotOffsetResponse>, Status> {
        let offset = self.running()?.rpc.snapshot_offset(request.into_inner()).await?;
        Ok(Response::new(SnapshotOffsetResponse { offset }))
    }

    async fn snapshot(&self, request: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotResponse>, Status> {
        Ok(Response::new(self.running()?.rpc.snapshot(request.into_inner()).await?))
    }

    async fn leases(&self, request: Request<LeasesRequest>) -> Result<Response<LeasesResponse>, Status> {
        let running = self.running()?;
        let request = request.into_inner();
        running.rpc.check(request.envelope.as_ref())?;
        Ok(Response::new(running.leases.answer_peer(&request).await))
    }

    type ForwardStream = Pin<Box<dyn Stream<Item = Result<ForwardResponse, Status>> + Send>>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let running = self.running()?;
        let mut requests = request.into_inner();
        let first = requests.next().await.ok_or_else(|| Status::invalid_argument("an empty forward stream"))??;
        running.rpc.check(first.envelope.as_ref())?;
        let serving = running.node.serve_forward(requests);
        let answers = stream::unfold(serving, |mut serving| async move {
            let message = serving.next().await?;
            Some((Ok(message), serving))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
