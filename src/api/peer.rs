//! `quorate.peer.v1.Peer`: what members ask of one another.
//!
//! `Who`, `Accept`, `Abandon` and `Join` are answered in every state; Raft's calls only while Raft runs, and only to callers of
//! the same cluster that mean this very member. With TLS no call arrives without a certificate of the members' CA; who speaks as a member,
//! or joins, must also have one for the address of that member.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::{Stream, StreamExt as _, stream};
use parking_lot::RwLock;
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use crate::backup;
use crate::cluster::{Bootstrap, Manager, Reconciler};
use crate::conditions::Conditions;
use crate::error::Error;
use crate::identity::{check_node, host_port, shown, slot_of};
use crate::kv;
use crate::lease::Leases;
use crate::metrics::metrics;
use crate::node::Node;
use crate::pb::log::node::Kind;
use crate::pb::peer::peer_server::Peer;
use crate::pb::peer::{
    AbandonRequest, AbandonResponse, AcceptRequest, AcceptResponse, AppendRequest, AppendResponse, BackupRequest,
    BackupResponse, Envelope, ForwardRequest, ForwardResponse, JoinRequest, JoinResponse, LeasesRequest,
    LeasesResponse, ManageRequest, ManageResponse, SnapshotChunk, SnapshotHead, SnapshotOffsetResponse,
    SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse, WhoRequest,
    WhoResponse, append_response,
};
use crate::raft::{Peers, Rpc, first_message};
use crate::secure::Presented;

/// Whether a call on a connection was found to be a member's, and whose certificate was shown on it. Cloning shares it; who knows none
/// keeps one that nobody looks at.
#[derive(Clone, Debug, Default)]
pub struct Proof(Arc<Proven>);

#[derive(Debug, Default)]
struct Proven {
    is_given: AtomicBool,
    /// What it has sent.
    unproved_bytes: AtomicU64,
    presented: Presented,
    /// The member for whose address the certificate was found to be; 0: none yet.
    member: AtomicU64,
    /// And it is a reader.
    is_reader: AtomicBool,
    /// It was logged that the certificate is for another address.
    is_told: AtomicBool,
}

/// Tells the member, when a stream of appends has ended, whose it was.
struct Appends {
    node: Node,
    /// The leader whose appends were taken from it; 0: none were.
    leader: AtomicU64,
}

impl Drop for Appends {
    fn drop(&mut self) {
        let leader = *self.leader.get_mut();
        if leader != 0 {
            self.node.end_appends(leader);
        }
    }
}

/// In what capacity a member calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum As {
    Member,
    /// One that votes, stands for election or leads, which a reader never does.
    Voter,
}

impl Proof {
    fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// What the connection has sent so far that may be held for it.
    pub fn unproved_bytes(&self) -> u64 {
        if self.is_given() { 0 } else { self.0.unproved_bytes.load(Ordering::Relaxed) }
    }

    /// So much more was sent.
    pub fn add_unproved(&self, bytes: u64) {
        self.0.unproved_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn give(&self) {
        self.0.is_given.store(true, Ordering::Relaxed);
    }

    pub fn is_given(&self) -> bool {
        self.0.is_given.load(Ordering::Relaxed)
    }

    /// Where the connection's certificate will be.
    pub fn presented(&self) -> &Presented {
        &self.0.presented
    }
}

/// A running member, as its peers reach it.
#[derive(Clone)]
pub struct Running {
    pub rpc: Rpc,
    pub node: Node,
    pub reconciler: Arc<Reconciler>,
    pub leases: Leases,
    pub manager: Arc<Manager>,
    /// Its part in backups, if any are made.
    pub backup: Option<Arc<backup::Duty>>,
}

/// The peer service of one process.
#[derive(Clone)]
pub struct PeerApi {
    bootstrap: Arc<Bootstrap>,
    running: Arc<RwLock<Option<Running>>>,
    /// This process's way to other members, and what it remembers of them.
    peers: Arc<Peers>,
    /// What is told to the other members of this one.
    conditions: Conditions,
    /// Members must have certificates for their addresses.
    checks_addresses: bool,
}

/// Conditions that are told; the one who asks keeps no more.
const CONDITIONS_MAX: usize = 32;

impl PeerApi {
    pub fn new(bootstrap: Arc<Bootstrap>, peers: Arc<Peers>, conditions: Conditions, checks_addresses: bool) -> Self {
        let checks_addresses = checks_addresses && peers.have_certificates();
        Self { bootstrap, running: Arc::default(), peers, conditions, checks_addresses }
    }

    /// From now on Raft's calls go to `running`.
    pub fn set_running(&self, running: Option<Running>) {
        *self.running.write() = running;
    }

    fn running(&self) -> Result<Running, Status> {
        self.running.read().clone().ok_or_else(|| Status::unavailable("this node does not run Raft yet"))
    }

    /// As [`Rpc::check`]; what passes it makes the connection a member's.
    fn checked<T>(
        &self,
        request: Request<T>,
        calls: As,
        envelope: impl Fn(&T) -> Option<&Envelope>,
    ) -> Result<(Running, T), Status> {
        let running = self.running()?;
        let proof = Proof::of(&request);
        let request = request.into_inner();
        let envelope = running.rpc.check(envelope(&request))?;
        self.check_member(&running, &proof, calls, envelope.from)?;
        proof.give();
        Ok((running, request))
    }

    /// Refuses a call in the name of `member` over a connection whose certificate is not for where the membership has that member. Of
    /// who is not known here yet the CA's word is enough.
    fn check_member(&self, running: &Running, proof: &Proof, calls: As, member: u64) -> Result<(), Status> {
        if !self.peers.have_certificates() {
            return Ok(());
        }
        if proof.0.member.load(Ordering::Relaxed) != member {
            let status = running.node.status();
            let Some(known) = status.membership.get_node(&member) else { return Ok(()) };
            check_slot(proof, slot_of(member))?;
            self.check_address(proof, &known.peer_address)?;
            proof.0.is_reader.store(known.kind() == Kind::Reader, Ordering::Relaxed);
            proof.0.member.store(member, Ordering::Relaxed);
        }
        if calls == As::Voter && proof.0.is_reader.load(Ordering::Relaxed) {
            return Err(Status::permission_denied(format!("{member:x} is a reader: it neither votes nor leads")));
        }
        Ok(())
    }

    /// Refuses a call of who says to be at `address` without a certificate for it.
    fn check_address(&self, proof: &Proof, address: &str) -> Result<(), Status> {
        let host = host_port(address).map_or(address, |(host, _)| host);
        let certificate = proof.presented().get();
        let is_fine = match certificate {
            Some(certificate) => certificate.is_for(host),
            None => self.peers.hear_plain(),
        };
        if !self.checks_addresses || is_fine {
            return Ok(());
        }
        let names = certificate.map(|certificate| certificate.names().map(shown).collect::<Vec<_>>().join(", "));
        let (host, names) = (shown(host), names.unwrap_or_default());
        // Once a connection: its calls are many.
        if !proof.0.is_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(host, names, "refused a peer's call: its certificate is not for its address");
        }
        Err(Status::permission_denied(format!(
            "a member at {host} must show a certificate for that name or address; this one is for: {names}"
        )))
    }

    async fn append_one(
        &self,
        request: AppendRequest,
        proof: &Proof,
        appends: &Appends,
    ) -> Result<AppendResponse, Status> {
        let running = self.running()?;
        let (from, bytes) = (request.envelope.map_or(0, |envelope| envelope.from), request.encoded_len());
        self.check_member(&running, proof, As::Voter, from)?;
        let response = running.rpc.append(request).await?;
        // Whoever passed the check is a member.
        let counters = metrics().peer(from);
        counters.count_received(bytes);
        counters.count_sent(response.encoded_len());
        if response.outcome() != append_response::Outcome::HigherVote {
            running.node.hear_leader();
            appends.leader.store(from, Ordering::Relaxed);
        }
        Ok(response)
    }
}

/// Refuses a call as the member of a slot over a connection whose certificate names another slot.
fn check_slot(proof: &Proof, slot: u16) -> Result<(), Status> {
    let Some(certificate) = proof.presented().get().filter(|shown| !shown.is_for_slot(slot)) else { return Ok(()) };
    let names = certificate.names().map(shown).collect::<Vec<_>>().join(", ");
    if !proof.0.is_told.swap(true, Ordering::Relaxed) {
        tracing::warn!(slot, names, "refused a peer's call: its certificate is for another slot");
    }
    Err(Status::permission_denied(format!(
        "the member of slot {slot} must show a certificate of it; this one is for: {names}"
    )))
}

fn disk(error: impl std::fmt::Display) -> Status {
    Status::internal(format!("the promise could not be made durable: {error}"))
}

#[tonic::async_trait]
impl Peer for PeerApi {
    async fn who(&self, request: Request<WhoRequest>) -> Result<Response<WhoResponse>, Status> {
        let WhoRequest { nonce, digest_index, recall_member } = request.into_inner();
        let mut answer = self.bootstrap.who(nonce);
        answer.digest_version = kv::DIGEST_VERSION;
        answer.conditions = self.conditions.own();
        answer.conditions.truncate(CONDITIONS_MAX);
        answer.recollection = self.peers.memory().of(recall_member).map(Into::into);
        if let Ok(running) = self.running() {
            let store = running.node.store();
            answer.quorum_of_others = recall_member != 0 && running.node.has_quorum_without(recall_member);
            answer.digest_unknown = store.read(|s| s.kv.digest().is_none());
            answer.digest = (digest_index != 0).then(|| store.digest_at(digest_index)).flatten();
        }
        Ok(Response::new(answer))
    }

    async fn accept(&self, request: Request<AcceptRequest>) -> Result<Response<AcceptResponse>, Status> {
        let formation =
            request.into_inner().formation.ok_or_else(|| Status::invalid_argument("accept without a formation"))?;
        for node in formation.members.iter().filter_map(|member| member.node.as_ref()) {
            check_node(node).map_err(Status::invalid_argument)?;
        }
        Ok(Response::new(self.bootstrap.accept(formation).await.map_err(disk)?))
    }

    async fn abandon(&self, request: Request<AbandonRequest>) -> Result<Response<AbandonResponse>, Status> {
        Ok(Response::new(self.bootstrap.abandon(request.into_inner().cluster_id).await.map_err(disk)?))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let (running, proof) = (self.running()?, Proof::of(&request));
        let request = request.into_inner();
        check_slot(&proof, slot_of(request.member_id))?;
        self.check_address(&proof, request.node.as_ref().map_or("", |node| &node.peer_address))?;
        Ok(Response::new(running.reconciler.join(request)))
    }

    async fn manage(&self, request: Request<ManageRequest>) -> Result<Response<ManageResponse>, Status> {
        let (running, request) = self.checked(request, As::Member, |request| request.envelope.as_ref())?;
        let mut answer = running.manager.answer(request.operation).await;
        if let Some(view) = &mut answer.view {
            self.conditions.complete(view);
            // Each member has its own.
            view.events.clear();
        }
        Ok(Response::new(answer))
    }

    type AppendStream = Pin<Box<dyn Stream<Item = Result<AppendResponse, Status>> + Send>>;

    async fn append(&self, request: Request<Streaming<AppendRequest>>) -> Result<Response<Self::AppendStream>, Status> {
        let node = self.running()?.node;
        let shutdown = node.env().shutdown.clone();
        let (api, proof) = (self.clone(), Proof::of(&request));
        let appends = Arc::new(Appends { node, leader: AtomicU64::new(0) });
        // Taken at once: a leader opens the stream before it has something to say.
        let requests = stream::unfold((request.into_inner(), true), |(mut requests, is_first)| async move {
            let next = if is_first { Some(first_message(&mut requests).await) } else { requests.next().await };
            Some((next?, (requests, false)))
        });
        let answers = requests.then(move |request| {
            let (api, proof, appends) = (api.clone(), proof.clone(), appends.clone());
            async move { api.append_one(request?, &proof, &appends).await.inspect(|_| proof.give()) }
        });
        Ok(Response::new(Box::pin(answers.take_until(shutdown.cancelled_owned()))))
    }

    async fn vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        let (running, request) = self.checked(request, As::Voter, |request| request.envelope.as_ref())?;
        Ok(Response::new(running.rpc.vote(request, false).await?))
    }

    async fn pre_vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        let (running, request) = self.checked(request, As::Voter, |request| request.envelope.as_ref())?;
        Ok(Response::new(running.rpc.vote(request, true).await?))
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        let (running, request) = self.checked(request, As::Voter, |request| request.envelope.as_ref())?;
        Ok(Response::new(running.rpc.transfer_leader(request).await?))
    }

    async fn snapshot_offset(
        &self,
        request: Request<SnapshotHead>,
    ) -> Result<Response<SnapshotOffsetResponse>, Status> {
        let (running, head) = self.checked(request, As::Voter, |head| head.envelope.as_ref())?;
        let offset = running.rpc.snapshot_offset(head).await?;
        Ok(Response::new(SnapshotOffsetResponse { offset }))
    }

    async fn snapshot(&self, request: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotResponse>, Status> {
        let (running, proof) = (self.running()?, Proof::of(&request));
        let mut chunks = request.into_inner();
        let first = first_message(&mut chunks).await?;
        // Without an envelope it is refused. A transfer has a connection of its own, on which the offset was asked for before.
        let sender = first.head.as_ref().and_then(|head| head.envelope).map_or(0, |envelope| envelope.from);
        self.check_member(&running, &proof, As::Voter, sender)?;
        Ok(Response::new(running.rpc.snapshot(first, chunks).await?))
    }

    async fn leases(&self, request: Request<LeasesRequest>) -> Result<Response<LeasesResponse>, Status> {
        let (running, request) = self.checked(request, As::Member, |request| request.envelope.as_ref())?;
        if request.envelope.is_some_and(|envelope| running.node.is_fenced(envelope.from)) {
            let error = Error::Corrupt;
            let (error, detail) = (error.number(), error.to_string());
            return Ok(Response::new(LeasesResponse { error, detail, ..LeasesResponse::default() }));
        }
        Ok(Response::new(running.leases.answer_peer(&request).await))
    }

    async fn backup(&self, request: Request<BackupRequest>) -> Result<Response<BackupResponse>, Status> {
        let (running, request) = self.checked(request, As::Member, |request| request.envelope.as_ref())?;
        Ok(Response::new(running.backup.map_or_else(BackupResponse::default, |duty| duty.answer(&request))))
    }

    type ForwardStream = Pin<Box<dyn Stream<Item = Result<ForwardResponse, Status>> + Send>>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let (running, proof) = (self.running()?, Proof::of(&request));
        let mut requests = request.into_inner();
        let first = first_message(&mut requests).await?;
        let envelope = running.rpc.check(first.envelope.as_ref())?;
        self.check_member(&running, &proof, As::Member, envelope.from)?;
        proof.give();
        let serving = running.node.serve_forward(envelope.from, requests);
        let answers = stream::unfold(serving, |mut serving| async move {
            let message = serving.next().await?;
            Some((Ok(message), serving))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
