//! A peer that a test plays: it shows what it is sent on its streams, and answers what the test says.
//!
//! Absent: the calls that are not streams, which it refuses.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::env::Net as _;
use crate::env::net::Place;
use crate::env::sim::SimNet;
use crate::pb::peer::peer_server::{Peer, PeerServer};
use crate::pb::peer::*;

type Grpc<T> = Result<Response<T>, Status>;
type Answered<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The stream that answers go to.
pub(crate) type Answers<T> = mpsc::Sender<Result<T, Status>>;
/// Each message, and where its answer goes.
pub(crate) type Messages<Q, A> = mpsc::Receiver<(Q, Answers<A>)>;

/// What the peer is sent.
pub(crate) struct Sent {
    /// Without the first message of each stream, which only says whom it is for.
    pub forwards: Messages<ForwardRequest, ForwardResponse>,
    pub appends: Messages<AppendRequest, AppendResponse>,
}

#[derive(Clone)]
struct Played {
    forwards: mpsc::Sender<(ForwardRequest, Answers<ForwardResponse>)>,
    appends: mpsc::Sender<(AppendRequest, Answers<AppendResponse>)>,
}

/// Listens at `address`.
pub(crate) async fn play(net: &SimNet, address: &str) -> Sent {
    let address: SocketAddr = address.parse().unwrap();
    let ((forwards, sent_forwards), (appends, sent_appends)) = (mpsc::channel(1000), mpsc::channel(1000));
    let incoming = net.host(address.ip()).bind(&Place::Tcp(address)).and_then(|bound| bound.listen()).unwrap();
    let bytes_max = crate::config::Config::default().peer_message_bytes_max();
    let service = PeerServer::new(Played { forwards, appends }).max_decoding_message_size(bytes_max);
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming.map(|accepted| accepted.map(|accepted| Accepted(accepted.stream))));
    tokio::spawn(serving);
    Sent { forwards: sent_forwards, appends: sent_appends }
}

fn show<Q: Send + 'static, A: Send + 'static>(
    mut requests: Streaming<Q>,
    to: mpsc::Sender<(Q, Answers<A>)>,
) -> Grpc<Answered<A>> {
    let (answers, stream) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Some(Ok(message)) = requests.next().await {
            let _ = to.send((message, answers.clone())).await;
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
}

fn no<T>() -> Grpc<T> {
    Err(Status::unimplemented("not played"))
}

#[tonic::async_trait]
impl Peer for Played {
    type ForwardStream = Answered<ForwardResponse>;
    type AppendStream = Answered<AppendResponse>;

    async fn forward(&self, request: Request<Streaming<ForwardRequest>>) -> Grpc<Self::ForwardStream> {
        let mut requests = request.into_inner();
        requests.next().await.expect("a first message").expect("an envelope");
        show(requests, self.forwards.clone())
    }
    async fn append(&self, request: Request<Streaming<AppendRequest>>) -> Grpc<Self::AppendStream> {
        show(request.into_inner(), self.appends.clone())
    }

    async fn who(&self, _: Request<WhoRequest>) -> Grpc<WhoResponse> {
        no()
    }
    async fn accept(&self, _: Request<AcceptRequest>) -> Grpc<AcceptResponse> {
        no()
    }
    async fn abandon(&self, _: Request<AbandonRequest>) -> Grpc<AbandonResponse> {
        no()
    }
    async fn join(&self, _: Request<JoinRequest>) -> Grpc<JoinResponse> {
        no()
    }
    async fn manage(&self, _: Request<ManageRequest>) -> Grpc<ManageResponse> {
        no()
    }
    async fn leases(&self, _: Request<LeasesRequest>) -> Grpc<LeasesResponse> {
        no()
    }
    async fn backup(&self, _: Request<BackupRequest>) -> Grpc<BackupResponse> {
        no()
    }
    async fn vote(&self, _: Request<VoteRequest>) -> Grpc<VoteResponse> {
        no()
    }
    async fn pre_vote(&self, _: Request<VoteRequest>) -> Grpc<VoteResponse> {
        no()
    }
    async fn transfer_leader(&self, _: Request<TransferLeaderRequest>) -> Grpc<TransferLeaderResponse> {
        no()
    }
    async fn snapshot_offset(&self, _: Request<SnapshotHead>) -> Grpc<SnapshotOffsetResponse> {
        no()
    }
    async fn snapshot(&self, _: Request<Streaming<SnapshotChunk>>) -> Grpc<SnapshotResponse> {
        no()
    }
}

/// A connection as tonic's server takes it.
struct Accepted(Box<dyn crate::env::net::Stream>);

impl tonic::transport::server::Connected for Accepted {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
