//! The two listeners: clients (gRPC and HTTP on one port) and peers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tower::Layer as _;

use super::Server;
use super::budget::Budget;
use super::connection::{Kind, bounded};
use super::meter::Meter;
use super::peer_connection::bounded_peers;
use super::shortcut::Shortcut;
use crate::api::Api;
use crate::env::process;
use crate::http;
use crate::pb;
use crate::pb::admin::admin_server::AdminServer;
use crate::pb::election::election_server::ElectionServer;
use crate::pb::etcd::cluster_server::ClusterServer;
use crate::pb::etcd::kv_server::KvServer;
use crate::pb::etcd::lease_server::LeaseServer;
use crate::pb::etcd::maintenance_server::MaintenanceServer;
use crate::pb::etcd::watch_server::WatchServer;
use crate::pb::lock::lock_server::LockServer;
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
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// Streams that a client has opened and reset at once, before its connection is taken for an attack and closed.
const RESET_STREAMS_MAX: usize = 64;
/// Files that connections of clients must leave: the log's, the state store's, and the other members' connections.
const RESERVED_FILES: u64 = 1500;

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
        let limits = &self.config.limits;
        let budget = Budget::new(limits.receive_bytes_max.0, limits.receive_timeout);
        let meter = Meter::new(&[pb::PUBLIC_DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET])?;
        let client_server = Grpc::builder()
            .layer(Shortcut(budget.layer(meter.layer(self.kv_service()))))
            .accept_http1(true)
            .max_concurrent_streams(limits.concurrent_streams_max)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
            // A client that is gone without a word gives its place and its streams back.
            .http2_keepalive_interval(Some(limits.keepalive_interval))
            .http2_keepalive_timeout(Some(limits.keepalive_timeout))
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(4 * WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("rpc", path = request.uri().path()))
            .add_routes(self.client_routes(health, budget, meter)?)
            .serve_with_incoming_shutdown(
                bounded(clients, self.connections_max(), Kind::Client { patience: limits.receive_timeout }),
                self.drain.clone().cancelled_owned(),
            );
        self.guard("peer", peer_server, self.env.shutdown.clone(), CancellationToken::new());
        self.guard("client", client_server, self.drain.clone(), self.drained.clone());
        Ok(())
    }

    /// Connections of clients that are taken: as many as the setting says, and no more than there are files for.
    fn connections_max(&self) -> usize {
        let wanted = self.config.limits.connections_max;
        let Some(files) = process::raise_open_files_max() else { return wanted };
        let room = usize::try_from(files.saturating_sub(RESERVED_FILES.min(files / 2))).unwrap_or(usize::MAX);
        if room < wanted {
            tracing::warn!(
                files,
                connections_max = wanted,
                room,
                "fewer connections are taken than limits.connections_max says: raise the limit of open files (ulimit -n, \
                 LimitNOFILE) or lower the setting"
            );
        }
        wanted.min(room)
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

    /// The names that this member tells others, and what the settings add.
    fn browser_rules(&self) -> Arc<http::Rules> {
        let this = &self.this;
        let urls = this.advertise_client.iter().map(String::as_str);
        let known =
            urls.chain([&this.advertise_peer[..], &this.name]).chain(this.pattern.iter().filter_map(|p| p.headless()));
        http::Rules::new(known, &self.config.http.hosts, &self.config.http.cors)
    }

    fn kv_service(&self) -> KvServer<Api> {
        KvServer::new(self.api.clone())
            .max_decoding_message_size(self.config.client_message_bytes_max())
            .max_encoding_message_size(usize::MAX)
    }

    fn client_routes(
        &self,
        health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
        budget: Budget,
        meter: Meter,
    ) -> anyhow::Result<Routes> {
        let bytes_max = self.config.client_message_bytes_max();
        let api = self.api.clone();
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::PUBLIC_DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let services = Routes::from(axum::Router::new())
            .add_service(self.kv_service())
            .add_service(LeaseServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(LockServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(ElectionServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(
                WatchServer::new(api.clone())
                    .max_decoding_message_size(bytes_max)
                    .max_encoding_message_size(usize::MAX),
            )
            .add_service(ClusterServer::new(api.clone()))
            .add_service(AdminServer::new(api.clone()))
            .add_service(MaintenanceServer::new(api.clone()))
            .add_service(health)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .into_axum_router()
            .layer(meter)
            .layer(axum::middleware::from_fn(http::only_grpc));
        // In JSON, bytes take a third more.
        let json_bytes_max = 2 * bytes_max;
        let gateway = http::Gateway::new(self.env.clone(), services.clone(), pb::PUBLIC_DESCRIPTORS, json_bytes_max)?;
        Ok(Routes::from(services.merge(http::router(api, gateway, self.browser_rules())).layer(budget)))
    }
}
