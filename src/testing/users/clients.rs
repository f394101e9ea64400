//! Clients that put, delete, read, compare and compact at random, and write down what they are told.
//!
//! A few keys, so that clients meet; each value is written once, so that a value says who wrote it.
//! Absent: retries. What failed is of unknown outcome, unless its status says that it was refused.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use crate::env::net::{BoxFuture, Stream};
use crate::env::sim::trace;
use crate::env::{Env, sleep, timeout};
use crate::pb::admin::ScaleRequest;
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::etcd::cluster_client::ClusterClient;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::watch_client::WatchClient;
use crate::pb::etcd::{
    CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberListRequest, MoveLeaderRequest, PutRequest, RangeRequest,
    RangeResponse, RequestOp, ResponseOp, StatusRequest, StatusResponse, TxnRequest, WatchRequest, WatchResponse,
    compare, request_op, response_op,
};
use crate::testing::history::{Action, Answer, Effect, Is, Kv, Outcome, Recorder, Request, Span};

const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// Longer than the server lets a request wait.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections to every member's client port. Cloning shares them.
#[derive(Clone)]
pub struct Clients {
    channels: Vec<Channel>,
}

/// A connection to a member that is being made.
pub type Dialing = BoxFuture<io::Result<Box<dyn Stream>>>;

impl Clients {
    /// `dial` connects to a member's client port.
    pub fn new(members: usize, dial: impl Fn(usize) -> Dialing + Clone + Send + 'static) -> Self {
        let channels = (0..members).map(|member| {
            let endpoint = Endpoint::from_shared(format!("http://member-{member}:2379")).expect("it is a URI");
            let dial = dial.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let dialing = dial(member);
                async move { dialing.await.map(TokioIo::new) }
            });
            endpoint.connect_timeout(Duration::from_secs(1)).connect_with_connector_lazy(connector)
        });
        Self { channels: channels.collect() }
    }

    fn kv(&self, member: usize) -> KvClient<Channel> {
        KvClient::new(self.channels[member].clone()).max_decoding_message_size(usize::MAX)
    }

    fn maintenance(&self, member: usize) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channels[member].clone())
    }

    async fn limited<T>(answer: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
        match timeout(PATIENCE, answer).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer")),
        }
    }

    pub async fn status(&self, member: usize) -> Result<StatusResponse, Status> {
        Self::limited(self.maintenance(member).status(StatusRequest {})).await
    }

    pub async fn move_leader(&self, member: usize, target: u64) -> Result<(), Status> {
        Self::limited(self.maintenance(member).move_leader(MoveLeaderRequest { target_id: target })).await.map(drop)
    }

    /// Tells the cluster how many members to have.
    pub async fn scale(&self, member: usize, replicas: usize) -> Result<(), Status> {
        let request = ScaleRequest { replicas: replicas as u32, start: None };
        Self::limited(AdminClient::new(self.channels[member].clone()).scale(request)).await.map(drop)
    }

    /// The hash of everything, its revision, and the compacted revision.
    pub async fn hash(&self, member: usize) -> Result<(u32, i64, i64), Status> {
        let answer = Self::limited(self.maintenance(member).hash_kv(HashKvRequest { revision: 0 })).await?;
        Ok((answer.hash, answer.hash_revision, answer.compact_revision))
    }

    /// Puts a key that goes with `lease`.
    pub async fn put_leased(&self, member: usize, key: &str, value: &str, lease: i64) -> Result<Answer, Status> {
        let request = PutRequest { lease, ..put(key, value) };
        let answer = Self::limited(self.kv(member).put(request)).await?;
        Ok(answered(answer.header, false, vec![Effect::Put]))
    }

    fn lease(&self, member: usize) -> LeaseClient<Channel> {
        LeaseClient::new(self.channels[member].clone())
    }

    /// The TTL that was granted, in seconds.
    pub async fn grant(&self, member: usize, id: i64, ttl: i64) -> Result<i64, Status> {
        Ok(Self::limited(self.lease(member).lease_grant(LeaseGrantRequest { id, ttl })).await?.ttl)
    }

    pub async fn revoke(&self, member: usize, id: i64) -> Result<(), Status> {
        Self::limited(self.lease(member).lease_revoke(LeaseRevokeRequest { id })).await.map(drop)
    }

    /// The TTL that the lease has again, in seconds; 0 if it is gone.
    pub async fn keep_alive(&self, member: usize, id: i64) -> Result<i64, Status> {
        let once = tokio_stream::iter([LeaseKeepAliveRequest { id }]);
        let asking = async {
            let mut answers = self.lease(member).lease_keep_alive(once).await?.into_inner();
            let answer = answers.message().await?;
            answer.map(|answer| answer.ttl).ok_or_else(|| Status::unavailable("the stream ended"))
        };
        match timeout(PATIENCE, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded("no answer")),
        }
    }

    /// The seconds that the lease has left; -1 if it is gone.
    pub async fn time_to_live(&self, member: usize, id: i64) -> Result<i64, Status> {
        let request = LeaseTimeToLiveRequest { id, keys: false };
        Ok(Self::limited(self.lease(member).lease_time_to_live(request)).await?.ttl)
    }

    pub async fn watch(
        &self,
        member: usize,
        requests: ReceiverStream<WatchRequest>,
    ) -> Result<Streaming<WatchResponse>, Status> {
        Self::limited(WatchClient::new(self.channels[member].clone()).watch(requests)).await
    }

    /// The ids of the members, as this one knows them.
    pub async fn members(&self, member: usize) -> Result<Vec<u64>, Status> {
        let mut cluster = ClusterClient::new(self.channels[member].clone());
        let answer = Self::limited(cluster.member_list(MemberListRequest { linearizable: false })).await?;
        Ok(answer.members.iter().map(|member| member.id).collect())
    }

    /// Carries out a request.
    pub async fn execute(&self, member: usize, request: &Request) -> Result<Answer, Status> {
        let mut kv = self.kv(member);
        let answer = match request {
            Request::Do(Action::Put { key, value }) => {
                let answer = Self::limited(kv.put(put(key, value))).await?;
                answered(answer.header, false, vec![Effect::Put])
            }
            Request::Do(Action::Delete(span)) => {
                let answer = Self::limited(kv.delete_range(delete(span))).await?;
                answered(answer.header, false, vec![Effect::Deleted(answer.deleted)])
            }
            Request::Do(Action::Get(span)) => read(Self::limited(kv.range(get(span))).await?),
            Request::GetAt(span, revision) => {
                read(Self::limited(kv.range(RangeRequest { revision: *revision, ..get(span) })).await?)
            }
            Request::GetLocal(span) => {
                read(Self::limited(kv.range(RangeRequest { serializable: true, ..get(span) })).await?)
            }
            Request::Txn { compare, then, or } => {
                let request = TxnRequest {
                    compare: compare.iter().map(|(key, is)| comparison(key, is)).collect(),
                    success: then.iter().map(operation).collect(),
                    failure: or.iter().map(operation).collect(),
                };
                let answer = Self::limited(kv.txn(request)).await?;
                answered(answer.header, answer.succeeded, answer.responses.iter().map(effect).collect())
            }
            Request::Compact(revision) => {
                let request = CompactionRequest { revision: *revision, physical: false };
                answered(Self::limited(kv.compact(request)).await?.header, false, Vec::new())
            }
        };
        Ok(answer)
    }

    /// Carries out a request and writes it down.
    pub async fn recorded(&self, recorder: &Recorder, client: u64, member: usize, request: Request) -> Outcome {
        let ticket = recorder.call(client, member, request.clone());
        let outcome = match self.execute(member, &request).await {
            Ok(answer) => Outcome::Answered(answer),
            Err(status) if is_refusal(&status) || is_read(&request) => Outcome::Refused(status.message().to_owned()),
            Err(_) => Outcome::Unknown,
        };
        trace::event(format_args!("client {client} member {member} {request}: {outcome}"));
        recorder.end(ticket, outcome.clone());
        outcome
    }
}

fn is_read(request: &Request) -> bool {
    matches!(request, Request::Do(Action::Get(_)) | Request::GetAt(..) | Request::GetLocal(_))
}

/// True if the status says that nothing was done.
pub(super) fn is_refusal(status: &Status) -> bool {
    let code = status.code();
    let refused =
        [Code::InvalidArgument, Code::OutOfRange, Code::FailedPrecondition, Code::ResourceExhausted, Code::NotFound];
    // Said before anything is proposed.
    let no_leader = status.message() == "etcdserver: no leader";
    refused.contains(&code) || no_leader || is_unsent(status)
}

/// True if there was no connection, so that the request has not left.
fn is_unsent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        source = error.source();
    }
    false
}

fn answered(header: Option<crate::pb::etcd::ResponseHeader>, succeeded: bool, effects: Vec<Effect>) -> Answer {
    Answer { revision: header.map_or(0, |header| header.revision), succeeded, effects }
}

fn read(answer: RangeResponse) -> Answer {
    answered(answer.header, false, vec![Effect::Got(answer.kvs.iter().map(version).collect())])
}

pub(super) fn version(kv: &crate::pb::KeyValue) -> Kv {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let kv = kv.fields();
    Kv {
        key: text(kv.key),
        value: text(kv.value),
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
    }
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..PutRequest::default() }
}

fn end(span: &Span) -> bytes::Bytes {
    span.end.clone().unwrap_or_default().into()
}

fn delete(span: &Span) -> DeleteRangeRequest {
    DeleteRangeRequest { key: span.key.clone().into(), range_end: end(span), prev_kv: false }
}

fn get(span: &Span) -> RangeRequest {
    RangeRequest { key: span.key.clone().into(), range_end: end(span), ..RangeRequest::default() }
}

fn operation(action: &Action) -> RequestOp {
    let request = match action {
        Action::Put { key, value } => request_op::Request::RequestPut(put(key, value)),
        Action::Delete(span) => request_op::Request::RequestDeleteRange(delete(span)),
        Action::Get(span) => request_op::Request::RequestRange(get(span)),
    };
    RequestOp { request: Some(request) }
}

fn comparison(key: &str, is: &Is) -> Compare {
    let (target, target_union) = match is {
        Is::ModRevision(revision) => (compare::CompareTarget::Mod, compare::TargetUnion::ModRevision(*revision)),
        Is::Version(version) => (compare::CompareTarget::Version, compare::TargetUnion::Version(*version)),
        Is::Value(value) => (compare::CompareTarget::Value, compare::TargetUnion::Value(value.clone().into())),
    };
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: target.into(),
        key: key.to_owned().into(),
        target_union: Some(target_union),
        ..Compare::default()
    }
}

fn effect(response: &ResponseOp) -> Effect {
    match &response.response {
        Some(response_op::Response::ResponseDeleteRange(answer)) => Effect::Deleted(answer.deleted),
        Some(response_op::Response::ResponseRange(answer)) => Effect::Got(answer.kvs.iter().map(version).collect()),
        _ => Effect::Put,
    }
}

/// One client: one request after another.
pub struct Client {
    pub name: u64,
    pub env: Env,
    pub clients: Clients,
    pub recorder: Recorder,
    /// How many members there are, so far.
    pub members: tokio::sync::watch::Receiver<usize>,
    /// Between two requests, more or less.
    pub pause: Duration,
}

impl Client {
    pub async fn run(self, stop: CancellationToken) {
        let mut newest = 1;
        let mut seen_at = 0;
        for n in 0.. {
            sleep(self.env.jitter(self.pause)).await;
            if stop.is_cancelled() {
                return;
            }
            let members = *self.members.borrow();
            let member = self.below(members as u64) as usize;
            let request = self.choose(n, newest, seen_at);
            let asked = self.clients.recorded(&self.recorder, self.name, member, request);
            if let Outcome::Answered(answer) = asked.await {
                newest = newest.max(answer.revision);
                if let Some(Effect::Got(kvs)) = answer.effects.first() {
                    seen_at = kvs.first().map_or(0, |kv| kv.mod_revision);
                }
            }
        }
    }

    fn below(&self, bound: u64) -> u64 {
        self.env.random_u64() % bound
    }

    fn key(&self) -> &'static str {
        KEYS[self.below(KEYS.len() as u64) as usize]
    }

    /// `newest`: the newest revision that this client knows of. `seen_at`: where it saw a key last.
    fn choose(&self, n: u64, newest: i64, seen_at: i64) -> Request {
        let key = self.key();
        let put = |key: &str| {
            // Some large ones, so that the log rotates and snapshots are written.
            let padding = if self.below(4) == 0 { self.below(600) as usize } else { 0 };
            Action::Put { key: key.into(), value: format!("c{}.{n}{}", self.name, ".".repeat(padding)) }
        };
        let span = || if self.below(2) == 0 { Span::range("a", "z") } else { Span::range(self.key(), "e") };
        match self.below(100) {
            0..35 => Request::Do(put(key)),
            35..40 => Request::Do(Action::Delete(Span::one(key))),
            40..42 => Request::Do(Action::Delete(span())),
            42..62 => Request::Do(Action::Get(Span::one(key))),
            62..70 => Request::Do(Action::Get(span())),
            70..74 => Request::GetAt(span(), (newest - self.below(12) as i64).max(1)),
            74..80 => Request::GetLocal(span()),
            80..98 => {
                let is = match self.below(3) {
                    0 => Is::ModRevision(seen_at),
                    1 => Is::Version(self.below(3) as i64),
                    _ => Is::Value(format!("c{}.{}", self.name, n.saturating_sub(1))),
                };
                let other = self.key();
                let mut then = vec![Action::Get(Span::one(key)), put(key)];
                if other != key {
                    then.push(put(other));
                }
                let or = vec![Action::Get(Span::range("a", "z"))];
                Request::Txn { compare: vec![(key.into(), is)], then, or }
            }
            _ => Request::Compact((newest - 20 - self.below(30) as i64).max(1)),
        }
    }
}
