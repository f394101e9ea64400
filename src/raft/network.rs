//! The way to the peers: one lazily connected channel an address, and openraft's network on it.
//!
//! Every call carries the cluster id, the sender and the member it is meant for, and has a deadline. Names are resolved anew
//! at every reconnect; a member that tells several addresses is dialled at the next of them when one fails. Snapshots use a channel of their own, in rate-limited chunks, so that heartbeats are never behind them.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use hyper_util::rt::TokioIo;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::v2::RaftNetworkV2;
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use super::convert::{entry_to_pb, log_id_from_pb, log_id_to_pb, vote_from_pb, vote_to_pb};
use super::memory::{Memory, Past, Reach};
use super::{Guard, Store, TypeConfig, Vote};
use crate::env::{Env, Instant, Pool, planted, timeout};
use crate::identity::{check_node, host_port, shown};
use crate::metrics::{self, metrics};
use crate::pb;
use crate::pb::log::{Formation, Node};
use crate::pb::peer::peer_client::PeerClient;
use crate::pb::peer::{self, Envelope};
use crate::secure;
use crate::storage::snapshot::SnapshotFile;

/// Bytes of one message between members; an append is bounded far below, a single large request is not.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const SNAPSHOT_CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// The answers of a forward stream.
pub type ForwardStream = Streaming<peer::ForwardResponse>;

/// Channels to peers, by address and purpose.
pub struct Peers {
    env: Env,
    /// `None`: plain text.
    tls: Option<Arc<secure::Port>>,
    channels: Mutex<HashMap<(String, Purpose), Channel>>,
    /// Where the membership says that members are.
    addresses: RwLock<HashMap<u64, String>>,
    /// What else a member's first address stands for.
    more: Arc<RwLock<HashMap<String, Vec<String>>>>,
    memory: Memory,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Raft,
    Heartbeat,
    Snapshot,
    Forward,
    Ask,
}

/// Channels kept; a cluster has a few members, but addresses come and go over the years.
const CHANNELS_MAX: usize = 1024;

impl Peers {
    pub fn new(env: Env) -> Arc<Self> {
        Self::with_tls(env, None)
    }

    /// As [`Self::new`]; members are dialled with the certificate of `tls`, and must have one for where they are dialled.
    pub fn with_tls(env: Env, tls: Option<Arc<secure::Port>>) -> Arc<Self> {
        let (channels, addresses, more, memory) = Default::default();
        Arc::new(Self { env, tls, channels, addresses, more, memory })
    }

    /// Whether members without certificates are heard all the same.
    pub fn hear_plain(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| tls.hears_plain())
    }

    /// Whether members prove by certificates who they are.
    pub fn have_certificates(&self) -> bool {
        self.tls.is_some()
    }

    /// What this process remembers of the members' disks.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// To be called with all members when the membership has changed. openraft keeps its streams to a member that has moved, with
    /// the address that they began with.
    pub fn set_addresses<'a>(&self, members: impl Iterator<Item = (&'a u64, &'a Node)>) {
        let (mut addresses, mut more) = (HashMap::new(), HashMap::new());
        for (id, node) in members {
            addresses.insert(*id, node.peer_address.clone());
            if !node.more_peer_addresses.is_empty() {
                more.insert(node.peer_address.clone(), node.more_peer_addresses.clone());
            }
        }
        *self.addresses.write() = addresses;
        *self.more.write() = more;
    }

    /// Where `member` is, if that is not `known`.
    fn moved(&self, member: u64, known: &str) -> Option<String> {
        self.addresses.read().get(&member).filter(|address| *address != known).cloned()
    }

    fn client(&self, address: &str, purpose: Purpose) -> Result<PeerClient<Channel>, Status> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(&(address.to_owned(), purpose)) {
            return Ok(with_limits(channel.clone()));
        }
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        let channel = self.channel(address)?;
        channels.insert((address.to_owned(), purpose), channel.clone());
        Ok(with_limits(channel))
    }

    fn channel(&self, address: &str) -> Result<Channel, Status> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| Status::invalid_argument(format!("peer address {address:?}: {e}; expected host:port")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(16 << 20);
        let (env, tls, more, address) = (self.env.clone(), self.tls.clone(), self.more.clone(), address.to_owned());
        let turn = Arc::new(AtomicUsize::new(0));
        let connector = tower::service_fn(move |_: Uri| {
            // Who has several addresses is dialled at them by turns: an attempt that fails, or is given up, leaves the next to the one after it.
            let (turn, taken) = (turn.clone(), turn.fetch_add(1, Ordering::Relaxed));
            let dialling = dial(env.clone(), tls.clone(), in_turn(&address, &more.read(), taken));
            async move {
                let stream = dialling.await?;
                turn.store(taken, Ordering::Relaxed);
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    /// Asks whoever listens at `address` who it is. This and the next four fail with a short text for people.
    pub async fn who(&self, address: &str, nonce: u64) -> Result<peer::WhoResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        checked(limited(client.who(peer::WhoRequest { nonce, ..Default::default() })).await.map_err(reason)?)
    }

    /// As [`Self::who`], with the digest after the entry at `digest_index`.
    pub async fn digest(&self, address: &str, nonce: u64, digest_index: u64) -> Result<peer::WhoResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        checked(limited(client.who(peer::WhoRequest { nonce, digest_index, recall_member: 0 })).await.map_err(reason)?)
    }

    /// As [`Self::who`], with what is remembered there of the disk of `member`.
    pub async fn recall(&self, address: &str, nonce: u64, member: u64) -> Result<peer::WhoResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        let request = peer::WhoRequest { nonce, digest_index: 0, recall_member: member };
        checked(limited(client.who(request)).await.map_err(reason)?)
    }

    pub async fn accept(&self, address: &str, formation: Formation) -> Result<peer::AcceptResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        limited(client.accept(peer::AcceptRequest { formation: Some(formation) })).await.map_err(reason)
    }

    pub async fn abandon(&self, address: &str, cluster_id: u64) -> Result<peer::AbandonResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        limited(client.abandon(peer::AbandonRequest { cluster_id })).await.map_err(reason)
    }

    pub async fn join(&self, address: &str, request: peer::JoinRequest) -> Result<peer::JoinResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        let answer = limited(client.join(request)).await.map_err(reason)?;
        Ok(peer::JoinResponse {
            reason: shown(&answer.reason),
            leader_address: shown(&answer.leader_address),
            ..answer
        })
    }

    /// Asks the leader's lease clock.
    pub async fn leases(&self, address: &str, request: peer::LeasesRequest) -> Result<peer::LeasesResponse, String> {
        let mut client = self.client(address, Purpose::Forward).map_err(reason)?;
        limited(client.leases(request)).await.map_err(reason)
    }

    /// Asks the leader who is to make the backups.
    pub async fn backup(&self, address: &str, request: peer::BackupRequest) -> Result<peer::BackupResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        limited(client.backup(request)).await.map_err(reason)
    }

    /// Has the member at `address` do or say something about the membership.
    pub async fn manage(
        &self,
        address: &str,
        request: peer::ManageRequest,
        patience: Duration,
    ) -> Result<peer::ManageResponse, String> {
        let mut client = self.client(address, Purpose::Ask).map_err(reason)?;
        match timeout(patience, client.manage(request)).await {
            Ok(answer) => {
                let answer = answer.map(tonic::Response::into_inner).map_err(reason)?;
                Ok(peer::ManageResponse { detail: shown(&answer.detail), ..answer })
            }
            Err(_) => Err(format!("no answer within {patience:?}")),
        }
    }

    /// Opens a forward stream to the leader; returns when the leader has taken it, so that what is sent on `requests`
    /// later was certainly not sent if this fails.
    pub async fn forward(
        &self,
        address: &str,
        requests: mpsc::Receiver<peer::ForwardRequest>,
    ) -> Result<ForwardStream, Status> {
        let mut client = self.client(address, Purpose::Forward)?;
        limited(client.forward(ReceiverStream::new(requests))).await
    }
}

/// Of the addresses that `first` stands for, the one whose turn it is.
fn in_turn(first: &str, more: &HashMap<String, Vec<String>>, turn: usize) -> String {
    let more = more.get(first).map_or(&[][..], |more| more);
    match turn % (more.len() + 1) {
        0 => first.to_owned(),
        place => more[place - 1].clone(),
    }
}

/// Connects, with TLS if there is any; plain where members without are spoken to, and this is one.
async fn dial(
    env: Env,
    tls: Option<Arc<secure::Port>>,
    address: String,
) -> io::Result<Box<dyn crate::env::net::Stream>> {
    let host = host_port(&address).map_or(&address[..], |(host, _)| host).to_owned();
    let stream = env.net.connect(address.clone()).await?;
    let Some((tls, dialer)) = tls.and_then(|tls| Some((tls.clone(), tls.dialer()?))) else { return Ok(stream) };
    match dialer.dial(&host, stream).await {
        Err(error) if tls.hears_plain() && secure::is_plain(&error) => env.net.connect(address).await,
        dialled => dialled,
    }
}

fn with_limits(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// The innermost cause, which is the one that helps: `connection refused` rather than `transport error`.
fn reason(status: Status) -> String {
    let mut cause: &dyn std::error::Error = &status;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    if std::ptr::addr_eq(cause, &status) { shown(status.message()) } else { cause.to_string() }
}

/// What a node answers of itself may be shown, and enter the membership.
fn checked(who: peer::WhoResponse) -> Result<peer::WhoResponse, String> {
    let formed =
        who.formation.iter().flat_map(|formation| &formation.members).filter_map(|member| member.node.as_ref());
    formed
        .chain(&who.node)
        .try_for_each(check_node)
        .map_err(|fault| format!("an answer that is not taken: {fault}"))?;
    let (name, version) = (shown(&who.name), shown(&who.version));
    Ok(peer::WhoResponse { name, version, leader_address: shown(&who.leader_address), ..who })
}

async fn limited<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match timeout(2 * CONNECT_TIMEOUT, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in 2 s")),
    }
}

/// openraft's factory of connections.
#[derive(Clone)]
pub struct Network {
    pub env: Env,
    pub peers: Arc<Peers>,
    pub store: Arc<Store>,
    pub guard: Arc<Guard>,
    pub cluster_id: u64,
    pub member_id: u64,
    pub snapshot_chunk_bytes: u64,
    /// Bytes a second that a snapshot transfer takes at most.
    pub snapshot_rate: u64,
    /// The others are told how far the log reaches; with a closed ballot no vote is asked for.
    pub past: Past,
}

impl Network {
    fn connection(&self, target: u64, node: &Node, purpose: Purpose) -> Connection {
        Connection {
            network: self.clone(),
            client: self.peers.client(&node.peer_address, purpose),
            address: node.peer_address.clone(),
            purpose,
            appends: None,
            told_shorter: false,
            envelope: Envelope { cluster_id: self.cluster_id, from: self.member_id, to: target },
            counters: metrics().peer(target),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, node: &Node) -> Connection {
        self.connection(target, node, Purpose::Raft)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Node) -> Connection {
        self.connection(target, node, Purpose::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Node) -> Connection {
        self.connection(target, node, Purpose::Snapshot)
    }
}

/// A stream of appends or heartbeats. One is under way at a time, so answers need no numbers: who gives up on one drops the stream.
struct Appends {
    requests: mpsc::Sender<peer::AppendRequest>,
    answers: Streaming<peer::AppendResponse>,
}

impl Appends {
    async fn open(client: &mut PeerClient<Channel>) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(1);
        let answers = client.append(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, answers })
    }

    async fn ask(&mut self, request: peer::AppendRequest) -> Result<peer::AppendResponse, Status> {
        // If it cannot be sent, the answers say why.
        let _ = self.requests.send(request).await;
        self.answers.message().await?.ok_or_else(|| Status::unavailable("the peer has ended the stream of appends"))
    }
}

/// One member's way to one peer.
pub struct Connection {
    network: Network,
    client: Result<PeerClient<Channel>, Status>,
    /// Where `client` leads.
    address: String,
    purpose: Purpose,
    /// Open, with nothing under way.
    appends: Option<Appends>,
    /// It was said that the peer's disk went back.
    told_shorter: bool,
    envelope: Envelope,
    counters: Arc<metrics::Peer>,
}

type Rpc<T> = Result<T, RPCError<TypeConfig>>;

impl Connection {
    fn client(&mut self) -> Rpc<PeerClient<Channel>> {
        if let Some(address) = self.network.peers.moved(self.envelope.to, &self.address) {
            self.client = self.network.peers.client(&address, self.purpose);
            self.address = address;
            self.appends = None;
        }
        self.client.clone().map_err(failed)
    }

    async fn call<T>(
        &self,
        action: RPCTypes,
        option: &RPCOption,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Rpc<T> {
        let deadline = option.hard_ttl();
        let begin = Instant::now();
        match timeout(deadline, call).await {
            Ok(Ok(answer)) => {
                self.counters.round_trip.observe(begin.elapsed().as_secs_f64());
                Ok(answer)
            }
            Ok(Err(status)) => {
                self.counters.sent_failures.inc();
                Err(failed(status))
            }
            Err(_) => {
                self.counters.sent_failures.inc();
                Err(Timeout { action, id: self.envelope.from, target: self.envelope.to, timeout: deadline }.into())
            }
        }
    }
}

impl Connection {
    /// The vote that a peer holds, as it has answered.
    fn answered(&self, vote: Option<pb::log::Vote>) -> Rpc<Vote> {
        let vote = vote.ok_or_else(|| malformed("vote"))?;
        self.network.guard.check_answer(self.envelope.to, vote.term).map_err(failed)?;
        Ok(vote_from_pb(vote))
    }

    fn vote_response(&self, answer: peer::VoteResponse) -> Rpc<VoteResponse<TypeConfig>> {
        let vote = self.answered(answer.vote)?;
        Ok(VoteResponse::new(vote, answer.last_log.map(log_id_from_pb), answer.granted))
    }
}

impl Connection {
    /// Remembers what the peer's answer says of its disk. A peer whose log lacks `prev`, which it has acknowledged in this very term, is
    /// not heard: its disk went back. openraft takes for impossible what it would say; and who is not heard counts for no quorum,
    /// until the peer finds out and goes on as a new member (`cluster::recall`).
    fn remember(
        &mut self,
        prev: Reach,
        end: Reach,
        answer: AppendEntriesResponse<TypeConfig>,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        let (memory, target) = (&self.network.peers.memory, self.envelope.to);
        match answer {
            AppendEntriesResponse::Success => memory.note(target, end),
            AppendEntriesResponse::Conflict => {
                let held = |known: &Reach| prev.last.is_some() && known.term == prev.term && *known >= prev;
                let known = memory.of(target).filter(held);
                if let Some(known) = known.filter(|_| !planted!("memory-not-asked")) {
                    let text = format!(
                        "member {target:x} has acknowledged entries up to {known:?} and does not hold them: its disk went back"
                    );
                    if !std::mem::replace(&mut self.told_shorter, true) {
                        tracing::error!(peer = format!("{target:x}"), reason = text, "a peer's disk went back");
                    }
                    return Err(RPCError::Unreachable(Unreachable::from_string(text)));
                }
            }
            _ => {}
        }
        Ok(answer)
    }

    /// Asks for a vote, if this member may.
    async fn ask_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
        pre: bool,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        if !self.network.past.ballot.may_stand() {
            return Err(RPCError::Unreachable(Unreachable::from_string(BALLOT_CLOSED)));
        }
        let mut client = self.client()?;
        let request = vote_request(self.envelope, &rpc);
        let asking = async move { if pre { client.pre_vote(request).await } else { client.vote(request).await } };
        let answer = self.call(RPCTypes::Vote, &option, asking).await?.into_inner();
        let answer = self.vote_response(answer)?;
        if !pre && answer.vote_granted {
            self.network.peers.memory.note(self.envelope.to, Reach { term: rpc.vote.leader_id.term, last: None });
        }
        Ok(answer)
    }
}

/// Why a member that has just started neither grants votes nor asks for any.
pub(super) const BALLOT_CLOSED: &str =
    "this member has not yet heard from a quorum that its disk holds all that it once acknowledged";

/// A peer that is not there is retried with a back-off; any other failure at once.
fn failed(status: Status) -> RPCError<TypeConfig> {
    match status.code() {
        Code::Unavailable | Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
            RPCError::Unreachable(Unreachable::new(&status))
        }
        _ => RPCError::Network(NetworkError::new(&status)),
    }
}

fn malformed(what: &str) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(format!("the peer's answer has no {what}")))
}

impl RaftNetworkV2<TypeConfig> for Connection {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        let term = rpc.vote.leader_id.term;
        let prev = Reach::new(term, rpc.prev_log_id.as_ref());
        let end = rpc.entries.last().map_or(prev, |entry| Reach::new(term, Some(&entry.log_id)));
        let request = peer::AppendRequest {
            envelope: Some(self.envelope),
            vote: Some(vote_to_pb(&rpc.vote)),
            prev: rpc.prev_log_id.as_ref().map(log_id_to_pb),
            entries: rpc.entries.into_iter().map(entry_to_pb).collect(),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_to_pb),
            leader_durable: self.network.past.log.durable().last,
        };
        let mut client = self.client()?;
        self.counters.count_sent(request.encoded_len());
        // A peer that went away meanwhile has closed it.
        let open = self.appends.take().filter(|appends| !appends.requests.is_closed());
        let asking = async move {
            let mut appends = match open {
                Some(appends) => appends,
                None => Appends::open(&mut client).await?,
            };
            let answer = appends.ask(request).await?;
            Ok((appends, answer))
        };
        let (appends, answer) = self.call(RPCTypes::AppendEntries, &option, asking).await?;
        self.counters.count_received(answer.encoded_len());
        self.appends = Some(appends);
        use peer::append_response::Outcome;
        let answer = match answer.outcome() {
            Outcome::Success => AppendEntriesResponse::Success,
            Outcome::Partial => AppendEntriesResponse::PartialSuccess(answer.matched.map(log_id_from_pb)),
            Outcome::Conflict => AppendEntriesResponse::Conflict,
            Outcome::HigherVote => AppendEntriesResponse::HigherVote(self.answered(answer.vote)?),
        };
        self.remember(prev, end, answer)
    }

    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, option, false).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, option, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + openraft::OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        if self.network.store.is_fenced(self.network.member_id) {
            let status =
                Status::unavailable("this member leads and is fenced (alarm CORRUPT): its state is sent to nobody");
            return Err(failed(status).into());
        }
        let head = peer::SnapshotHead {
            envelope: Some(self.envelope),
            vote: Some(vote_to_pb(&vote)),
            meta: Some(snapshot.snapshot.meta().clone()),
            snapshot_id: snapshot.snapshot.id.clone(),
            file_bytes: snapshot.snapshot.bytes,
        };
        let mut client = self.client()?;
        tokio::select! {
            closed = cancel => Err(closed.into()),
            sent = send_snapshot(&self.network, &mut client, head, &snapshot.snapshot) => {
                Ok(SnapshotResponse::new(self.answered(sent.map_err(failed)?.vote)?))
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        let mut client = self.client()?;
        let request = peer::TransferLeaderRequest {
            envelope: Some(self.envelope),
            from: Some(vote_to_pb(req.from_leader())),
            to: *req.to_node_id(),
            last_log: req.last_log_id().map(log_id_to_pb),
        };
        let answer = self.call(RPCTypes::TransferLeader, &option, client.transfer_leader(request)).await?.into_inner();
        if answer.accepted {
            return Ok(Ok(()));
        }
        Ok(Err(openraft::raft::TransferLeaderError::LogNotFlushed {
            expected: req.last_log_id().cloned(),
            actual: answer.last_log.map(log_id_from_pb),
        }))
    }
}

fn vote_request(envelope: Envelope, rpc: &VoteRequest<TypeConfig>) -> peer::VoteRequest {
    peer::VoteRequest {
        envelope: Some(envelope),
        vote: Some(vote_to_pb(&rpc.vote)),
        last_log: rpc.last_log_id.as_ref().map(log_id_to_pb),
        leadership_transfer: rpc.leadership_transfer,
    }
}

/// Streams the file from where the receiver left off; at most a few chunks are in memory.
async fn send_snapshot(
    network: &Network,
    client: &mut PeerClient<Channel>,
    head: peer::SnapshotHead,
    file: &SnapshotFile,
) -> Result<peer::SnapshotResponse, Status> {
    let offset = limited(client.snapshot_offset(head.clone())).await?.offset;
    let (chunks, receiver) = mpsc::channel(4);
    let counters = metrics().peer(head.envelope.map_or(0, |envelope| envelope.to));
    let (env, source) = (network.env.clone(), file.clone());
    let (total, piece, rate) = (file.bytes, network.snapshot_chunk_bytes, network.snapshot_rate.max(1));
    let reading = async move {
        let mut head = Some(head);
        let mut offset = offset.min(total);
        while offset < total || head.is_some() {
            let source = source.clone();
            let reading = move || source.read_raw(offset, piece as usize).map(|data| (crc32c::crc32c(&data), data));
            let (crc, data) = env.long(Pool::Snapshots, reading).await.map_err(unreadable)?;
            let bytes = data.len() as u64;
            counters.count_sent(data.len());
            let chunk = peer::SnapshotChunk { head: head.take(), offset, crc, data: data.into() };
            match timeout(SNAPSHOT_CHUNK_TIMEOUT, chunks.send(chunk)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Status::deadline_exceeded("the receiver took no snapshot chunk for 30 s")),
            }
            offset += bytes;
            crate::env::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64)).await;
        }
        Ok(())
    };
    let sending = client.snapshot(ReceiverStream::new(receiver));
    let (read, answer) = futures_util::future::join(reading, sending).await;
    read?;
    Ok(answer?.into_inner())
}

fn unreadable(error: io::Error) -> Status {
    Status::internal(format!("snapshot file: {error}"))
}

/// Takes the next answer of a forward stream; `None` when the stream is over.
pub async fn next_forwarded(stream: &mut ForwardStream) -> Option<peer::ForwardResponse> {
    stream.next().await?.ok()
}
