//! The three listeners: status, peers, and clients, whose port is bound at the start and opened later (`clients`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server as Grpc;

use super::Server;
use super::clients::{RESET_STREAMS_MAX, taken};
use super::peer_connection::bounded_peers;
use crate::config;
use crate::env::Env;
use crate::env::net::Bound;
use crate::http;
use crate::pb::peer::peer_server::PeerServer;
use crate::raft;

/// Connections of peers; a cluster has a few members with a few connections each.
const PEER_CONNECTIONS_MAX: usize = 1000;
/// A peer's connection may take so long to say what it speaks.
const PEER_PATIENCE: Duration = Duration::from_secs(5);
/// Calls of one peer's connection at once.
const PEER_STREAMS_MAX: u32 = 1000;
const PEER_KEEPALIVE: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 4 << 20;
/// Bytes of a request's headers; more is refused (431). gRPC's own are a few hundred.
pub(super) const HEADER_BYTES_MAX: u32 = 16 << 10;

/// The addresses of a process.
pub(super) struct Addresses {
    pub(super) client: Box<dyn Bound>,
    pub(super) peer: Box<dyn Bound>,
    pub(super) status: Box<dyn Bound>,
}

impl Addresses {
    /// Takes all of them, or says which one is not free.
    pub(super) fn bind(env: &Env, settings: &config::Server) -> anyhow::Result<Self> {
        let bind = |key: &str, address: SocketAddr| env.net.bind(address).with_context(|| taken(key, address));
        Ok(Self {
            client: bind("server.listen_client", settings.listen_client)?,
            peer: bind("server.listen_peer", settings.listen_peer)?,
            status: bind("server.listen_status", settings.status_address())?,
        })
    }
}

impl Server {
    /// Opens the ports of peers and of those who ask for the status; they end with the process.
    pub(super) fn listen(self: &Arc<Self>, status: Box<dyn Bound>, peer: Box<dyn Bound>) -> anyhow::Result<()> {
        let (bound_peer, bound_status) = (peer.address(), status.address());
        self.serve_status(status.listen().with_context(|| taken("server.listen_status", bound_status))?);
        let peers = peer.listen().with_context(|| taken("server.listen_peer", bound_peer))?;
        let message_bytes_max = self.config.peer_message_bytes_max();
        let peer_service = PeerServer::new(self.peer_api.clone())
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(raft::MESSAGE_BYTES_MAX);
        let peer_server = Grpc::builder()
            // A member that lost its power says nothing; its streams must not be served for ever.
            .http2_keepalive_interval(Some(PEER_KEEPALIVE))
            .http2_keepalive_timeout(Some(PEER_KEEPALIVE))
            .max_concurrent_streams(PEER_STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("peer", path = request.uri().path()))
            .add_service(peer_service)
            .serve_with_incoming_shutdown(
                bounded_peers(peers, PEER_CONNECTIONS_MAX, PEER_PATIENCE),
                self.env.shutdown.clone().cancelled_owned(),
            );
        self.guard("peer", peer_server, self.env.shutdown.clone(), CancellationToken::new());
        tracing::info!(
            status = %bound_status,
            peer = %bound_peer,
            client = %self.clients.address(),
            advertise = %self.this.advertise_peer,
            "listening; the clients' port opens when this member can serve"
        );
        Ok(())
    }

    /// Runs a listener; one that ends before it is told to takes the process with it.
    pub(super) fn guard(
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

    /// The names that this member tells others, and what the settings add.
    pub(super) fn browser_rules(&self) -> Arc<http::Rules> {
        let this = &self.this;
        let urls = this.advertise_client.iter().map(String::as_str);
        let known =
            urls.chain([&this.advertise_peer[..], &this.name]).chain(this.pattern.iter().filter_map(|p| p.headless()));
        http::Rules::new(known, &self.config.http.hosts, &self.config.http.cors)
    }
}
