//! The three listeners: status, peers, and clients, whose port is bound at the start and opened later (`clients`). Each may be at several
//! places, and is one server all the same.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::select_all;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server as Grpc;

use super::Server;
use super::peer_connection::{Bounds, bounded_peers, count_stream};
use crate::config;
use crate::env::Env;
use crate::env::net::{Bound, Incoming, Place};
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
/// Streams that a peer has reset before they were taken; its connection is closed with the next.
const RESET_STREAMS_MAX: usize = 64;
/// Bytes of a request's headers; more is refused (431). gRPC's own are a few hundred.
const PEER_HEADER_BYTES_MAX: u32 = 4 << 10;
pub(super) const HEADER_BYTES_MAX: u32 = 16 << 10;
/// What all connections that are nobody's yet may send beside one message.
const UNPROVED_BYTES_MAX: usize = 16 << 20;

/// Places of one kind, taken and not open yet.
pub(super) struct Places {
    key: &'static str,
    bound: Vec<Box<dyn Bound>>,
}

impl Places {
    /// Takes all of them, or says which one is not free.
    pub(super) fn bind(env: &Env, key: &'static str, places: &[Place]) -> anyhow::Result<Self> {
        let bind = |place: &Place| env.net.bind(place).map_err(|error| taken(key, place, error));
        Ok(Self { key, bound: places.iter().map(bind).collect::<Result<_, _>>()? })
    }

    /// With the numbers of ports that were left open.
    pub(super) fn places(&self) -> Vec<Place> {
        self.bound.iter().map(|bound| bound.address()).collect()
    }

    /// Opens them: whoever connects, wherever.
    pub(super) fn listen(self) -> anyhow::Result<Incoming> {
        let key = self.key;
        let listen = |bound: Box<dyn Bound>| {
            let place = bound.address();
            bound.listen().map_err(|error| taken(key, &place, error))
        };
        let mut incoming = self.bound.into_iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        Ok(match incoming.len() {
            1 => incoming.remove(0),
            _ => Box::pin(select_all(incoming)),
        })
    }
}

/// The addresses of a process.
pub(super) struct Addresses {
    pub(super) client: Places,
    pub(super) peer: Places,
    pub(super) status: Places,
}

impl Addresses {
    /// Takes all of them, or says which one is not free.
    pub(super) fn bind(env: &Env, settings: &config::Server) -> anyhow::Result<Self> {
        Ok(Self {
            client: Places::bind(env, "server.listen_client", settings.listen_client.places())?,
            peer: Places::bind(env, "server.listen_peer", settings.listen_peer.places())?,
            status: Places::bind(env, "server.listen_status", &settings.status_places())?,
        })
    }
}

/// Why an address could not be had, and what to do.
fn taken(key: &str, place: &Place, error: std::io::Error) -> anyhow::Error {
    use std::io::ErrorKind::*;
    let action = match error.kind() {
        AddrInUse => "another process is on that port: end it, or choose another port",
        AddrNotAvailable => "this machine has no such address: name one of its own, or 0.0.0.0 for all of them",
        PermissionDenied => "this user may not: choose a port above 1023, or another path",
        _ => "correct the address",
    };
    anyhow::Error::new(error).context(format!("{key} = {place}: cannot listen; {action}"))
}

/// For a log line.
pub(super) fn shown(places: &[Place]) -> String {
    places.iter().map(Place::to_string).collect::<Vec<_>>().join(",")
}

impl Server {
    /// Opens the ports of peers and of those who ask for the status; they end with the process.
    pub(super) fn listen(self: &Arc<Self>, status: Places, peer: Places) -> anyhow::Result<()> {
        let (bound_peer, bound_status) = (peer.places(), status.places());
        if !bound_status.is_empty() {
            self.serve_status(status.listen()?);
        }
        let peers = peer.listen()?;
        let message_bytes_max = self.config.peer_message_bytes_max();
        let peer_service = PeerServer::new(self.peer_api.clone())
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(raft::MESSAGE_BYTES_MAX);
        let bounds = Bounds {
            connections: PEER_CONNECTIONS_MAX,
            unproved_bytes: (UNPROVED_BYTES_MAX + message_bytes_max) as u64,
            patience: PEER_PATIENCE,
        };
        let peer_server = Grpc::builder()
            // A member that lost its power says nothing; its streams must not be served for ever.
            .http2_keepalive_interval(Some(PEER_KEEPALIVE))
            .http2_keepalive_timeout(Some(PEER_KEEPALIVE))
            .max_concurrent_streams(PEER_STREAMS_MAX)
            .http2_max_header_list_size(PEER_HEADER_BYTES_MAX)
            .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("peer", path = request.uri().path()))
            .add_service(InterceptedService::new(peer_service, count_stream))
            .serve_with_incoming_shutdown(
                bounded_peers(peers, bounds, self.tls.peer.clone()),
                self.env.shutdown.clone().cancelled_owned(),
            );
        self.guard("peer", peer_server, self.env.shutdown.clone(), CancellationToken::new());
        tracing::info!(
            status = shown(&bound_status),
            peer = shown(&bound_peer),
            client = shown(self.clients.places()),
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
            urls.chain([&this.advertise_peer[..], &this.name]).chain(this.peers.iter().filter_map(|p| p.headless()));
        http::Rules::new(known, &self.config.http.hosts, &self.config.http.cors)
    }
}
