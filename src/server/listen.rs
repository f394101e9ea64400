//! The two listeners: clients (gRPC and HTTP on one port) and peers.

use std::borrow::Cow;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tonic::transport::server::Connected;

use super::Server;
use super::authority::Filter;
use super::meter::Meter;
use crate::env::net::{Incoming, Stream};
use crate::http;
use crate::metrics::metrics;
use crate::pb;
use crate::pb::etcd::cluster_server::ClusterServer;
use crate::pb::etcd::kv_server::KvServer;
use crate::pb::etcd::maintenance_server::MaintenanceServer;
use crate::pb::peer::peer_server::PeerServer;
use crate::raft;

/// Connections of peers; a cluster has a few members with a few connections each.
const PEER_CONNECTIONS_MAX: usize = 1000;
const PEER_KEEPALIVE: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 4 << 20;

/// An accepted connection and its place among the allowed ones.
struct Connection {
    io: Box<dyn Stream>,
    /// Its bytes are counted as clients'.
    counted: bool,
    filter: Filter,
    /// Filtered, and not taken yet.
    ready: Bytes,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn count_sent(&self, bytes: usize) -> usize {
        if self.counted {
            metrics().client_sent_bytes.inc_by(bytes as u64);
        }
        bytes
    }
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                let part = this.ready.split_to(this.ready.len().min(into.remaining()));
                into.put_slice(&part);
                return Poll::Ready(Ok(()));
            }
            let begin = into.filled().len();
            ready!(Pin::new(&mut this.io).poll_read(cx, into))?;
            let arrived = &into.filled()[begin..];
            if this.counted {
                metrics().client_received_bytes.inc_by(arrived.len() as u64);
            }
            if arrived.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match this.filter.pass(arrived) {
                Cow::Borrowed(same) if same.len() == arrived.len() => return Poll::Ready(Ok(())),
                other => this.ready = Bytes::from(other.into_owned()),
            }
            into.set_filled(begin);
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        Poll::Ready(Ok(self.count_sent(written)))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bytes))?;
        Poll::Ready(Ok(self.count_sent(written)))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// At most `max` connections at a time; further ones are closed at once.
fn bounded(incoming: Incoming, max: usize, counted: bool) -> impl futures_util::Stream<Item = io::Result<Connection>> {
    let places = Arc::new(Semaphore::new(max));
    incoming.filter_map(move |accepted| {
        let place = places.clone().try_acquire_owned();
        async move {
            match (accepted, place) {
                (Ok(io), Ok(place)) => {
                    Some(Ok(Connection { io, counted, filter: Filter::default(), ready: Bytes::new(), _place: place }))
                }
                (Ok(_), Err(_)) => {
                    tracing::warn!(max, "connection refused: too many are open");
                    None
                }
                (Err(error), _) => Some(Err(error)),
            }
        }
    })
}

impl Server {
    /// Opens both ports. The client's drains first, while Raft still runs; the peers' ends with the process.
    pub(super) async fn listen(
        self: &Arc<Self>,
        health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    ) -> anyhow::Result<()> {
        let (client, peer) = (self.config.server.listen_client, self.config.server.listen_peer);
        let (bound_peer, peers) =
            self.env.net.listen(peer).await.with_context(|| {
                format!("server.listen_peer = {peer}: cannot listen; is another process on that port?")
            })?;
        let (bound_client, clients) = self.env.net.listen(client).await.with_context(|| {
            format!("server.listen_client = {client}: cannot listen; is another process on that port?")
        })?;
        tracing::info!(client = %bound_client, peer = %bound_peer, advertise = %self.this.advertise_peer, "listening");
        let message_bytes_max = self.config.peer_message_bytes_max();
        let peer_service = PeerServer::new(self.peer_api.clone())
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(raft::MESSAGE_BYTES_MAX);
        let peer_server = Grpc::builder()
            // A member that lost its power says nothing; its streams must not be served for ever.
            .http2_keepalive_interval(Some(PEER_KEEPALIVE))
            .http2_keepalive_timeout(Some(PEER_KEEPALIVE))
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("peer", path = request.uri().path()))
            .add_service(peer_service)
            .serve_with_incoming_shutdown(
                bounded(peers, PEER_CONNECTIONS_MAX, false),
                self.env.shutdown.clone().cancelled_owned(),
            );
        let client_server = Grpc::builder()
            .accept_http1(true)
            .max_concurrent_streams(self.config.limits.concurrent_streams_max)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("rpc", path = request.uri().path()))
            .add_routes(self.client_routes(health)?)
            .serve_with_incoming_shutdown(
                bounded(clients, self.config.limits.connections_max, true),
                self.drain.clone().cancelled_owned(),
            );
        self.guard("peer", peer_server, self.env.shutdown.clone(), CancellationToken::new());
        self.guard("client", client_server, self.drain.clone(), self.drained.clone());
        Ok(())
    }

    /// Runs a listener; one that ends before it is told to takes the process with it.
    fn guard(
        &self,
        name: &'static str,
        serving: impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
        end: CancellationToken,
        ended: CancellationToken,
    ) {
        let failed = self.env.failed.clone();
        self.env.spawn(async move {
            let result = serving.await;
            if !end.is_cancelled() {
                tracing::error!(listener = name, ?result, "listener failed");
                failed.cancel();
            }
            ended.cancel();
        });
    }

    fn client_routes(
        &self,
        health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    ) -> anyhow::Result<Routes> {
        let bytes_max = self.config.client_message_bytes_max();
        let api = self.api.clone();
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::PUBLIC_DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let services = Routes::from(axum::Router::new())
            .add_service(
                KvServer::new(api.clone()).max_decoding_message_size(bytes_max).max_encoding_message_size(usize::MAX),
            )
            .add_service(ClusterServer::new(api.clone()))
            .add_service(MaintenanceServer::new(api.clone()))
            .add_service(health)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .into_axum_router()
            .layer(Meter::new(&[pb::PUBLIC_DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET])?);
        // In JSON, bytes take a third more.
        let json_bytes_max = 2 * bytes_max;
        let gateway = http::Gateway::new(services.clone(), pb::PUBLIC_DESCRIPTORS, json_bytes_max)?;
        Ok(Routes::from(services.merge(http::router(api, gateway))))
    }
}
