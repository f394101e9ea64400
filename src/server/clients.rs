//! The clients' port: gRPC and HTTP, from the moment on at which this member can serve.
//!
//! Invariants: a closed port refuses connections, so that clients go to another member at once; whoever is served is never told less
//! than this member acknowledged in an earlier life, unless no leader came for `server.open_without_leader`; where users are declared,
//! nobody is served before authentication is on; a fenced member, which serves no data, is reached all the same. Once open the port stays
//! open while leaders come and go; it closes when the process ends, or goes on under another identity.
//! Absent: what says all this meanwhile (`status`).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthService;
use tower::Layer as _;

use super::Server;
use super::budget::Budget;
use super::connection::{Connection, Kind, bounded};
use super::health::Health;
use super::listen::{Places, shown};
use super::meter::Meter;
use super::rounds::Rounds;
use super::shortcut::Shortcut;
use super::unary::Unary;
use crate::api::Api;
use crate::env::net::{Incoming, Place};
use crate::env::{Env, Instant, process, sleep, timeout};
use crate::http;
use crate::node::{Node, Trust};
use crate::pb;
use crate::pb::admin::admin_server::AdminServer;
use crate::pb::election::election_server::ElectionServer;
use crate::pb::etcd::auth_server::AuthServer;
use crate::pb::etcd::cluster_server::ClusterServer;
use crate::pb::etcd::kv_server::KvServer;
use crate::pb::etcd::lease_server::LeaseServer;
use crate::pb::etcd::maintenance_server::MaintenanceServer;
use crate::pb::etcd::watch_server::WatchServer;
use crate::pb::lock::lock_server::LockServer;

/// What a client may send beyond what is taken, on one stream and on all: it waits here for as long as the client lets it. A stream that
/// nobody takes from leaves room for others.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 256 << 10;
/// Streams that a client has reset before they were taken, in memory; the connection keeps them far below (`connection`).
const RESET_STREAMS_MAX: usize = 1024;
/// Bytes of a request's headers; more is refused (431). Programs send 16 KiB of metadata, above all tokens.
const HEADER_BYTES_MAX: u32 = 32 << 10;
/// Connections that wait to become WebSockets.
const SOCKETS_WAITING_MAX: usize = 64;
/// Files that connections of clients must leave: the log's, the state store's, and the other members' connections.
const RESERVED_FILES: u64 = 1500;
/// Between two looks at what keeps the port closed.
const LOOK: Duration = Duration::from_millis(20);

/// The port, open or not.
pub(super) struct Port {
    places: Vec<Place>,
    state: Mutex<State>,
}

enum State {
    /// Bound, if it was never open: an address that somebody else has is found at the start.
    Closed(Option<Places>),
    Open(Open),
}

struct Open {
    /// No more requests are taken, and it ends with the last one.
    drain: CancellationToken,
    /// It has ended.
    drained: CancellationToken,
}

impl Port {
    pub(super) fn new(bound: Places) -> Self {
        Self { places: bound.places(), state: Mutex::new(State::Closed(Some(bound))) }
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(*self.state.lock(), State::Open(_))
    }
}

impl Server {
    /// Opens the port when this member can serve, unless its life is `over` by then; in each of the process's identities anew.
    pub(super) async fn open_in_time(self: Arc<Self>, env: Env, node: Node, over: CancellationToken) {
        tokio::select! {
            () = caught_up(&node) => {}
            // Of its data it serves nothing; but who would take the alarm off must reach it.
            () = node.wait_trust(|trust| *trust != Trust::Sound) => {}
            () = self.no_leader_comes(&node) => tracing::warn!(
                waited = ?self.config.server.open_without_leader,
                "no leader has come: the clients' port opens for what needs none"
            ),
            () = over.cancelled() => return,
            () = env.shutdown.cancelled() => return,
        }
        tokio::select! {
            () = self.users_count(&node) => {}
            () = over.cancelled() => return,
            () = env.shutdown.cancelled() => return,
        }
        if let Err(error) = self.open_clients(&over) {
            tracing::error!(error = format!("{error:#}"), "the clients' port cannot be opened");
            env.failed.cancel();
        }
    }

    /// Resolves when authentication is on, if users are declared: before, everybody would be served.
    async fn users_count(&self, node: &Node) {
        let mut applied = node.applied();
        while self.declared.is_some() && !node.is_auth_on() {
            if applied.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Resolves when no leader was known for long, and this member has belonged to a cluster: who has not has nothing to serve.
    async fn no_leader_comes(&self, node: &Node) {
        let this = node.member().member_id;
        let mut since = Instant::now();
        loop {
            sleep(LOOK).await;
            let belongs = node.store().read(|state| state.membership.membership().get_node(&this).is_some());
            if !belongs || node.status().leader.is_some() {
                since = Instant::now();
            } else if since.elapsed() >= self.config.server.open_without_leader {
                return;
            }
        }
    }

    fn open_clients(&self, over: &CancellationToken) -> anyhow::Result<()> {
        let mut state = self.clients.state.lock();
        let State::Closed(bound) = &mut *state else { return Ok(()) };
        // Whoever closes it says so first.
        if over.is_cancelled() {
            return Ok(());
        }
        let places = &self.clients.places;
        let bound = bound.take().map_or_else(|| Places::bind(&self.env, "server.listen_client", places), Ok)?;
        let incoming = bound.listen()?;
        let open = Open { drain: self.env.shutdown.child_token(), drained: CancellationToken::new() };
        self.serve_clients(incoming, &open)?;
        // The words that those who start an etcd wait for.
        tracing::info!(client = shown(places), "ready to serve client requests");
        *state = State::Open(open);
        process::tell_supervisor("READY=1");
        Ok(())
    }

    /// Refuses new connections, and waits at most `patience` for the requests under way.
    pub(super) async fn close_clients(&self, patience: Duration) {
        let closed = std::mem::replace(&mut *self.clients.state.lock(), State::Closed(None));
        let open = match closed {
            State::Open(open) => open,
            // It stays bound.
            closed @ State::Closed(_) => return *self.clients.state.lock() = closed,
        };
        open.drain.cancel();
        if timeout(patience, open.drained.cancelled()).await.is_err() {
            tracing::warn!("clients did not end their requests in time");
        }
        tracing::info!(client = shown(&self.clients.places), "the clients' port is closed");
    }

    fn serve_clients(&self, incoming: Incoming, open: &Open) -> anyhow::Result<()> {
        let limits = &self.config.limits;
        let message_bytes_max = self.config.client_message_bytes_max();
        let answer_patience = self.config.server.request_timeout;
        let budget = Budget::new(self.account.clone(), limits.receive_timeout, answer_patience, message_bytes_max);
        let (sockets, handed_on) = mpsc::channel(SOCKETS_WAITING_MAX);
        let (patience, account, tls) = (limits.receive_timeout, self.account.clone(), self.tls.client.clone());
        let rounds = Rounds::new(&self.env);
        let kind = Kind::Client { patience, account, tls, sockets, rounds };
        let descriptors = [pb::PUBLIC_DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET];
        let meter = Meter::new(&descriptors, self.audit.clone())?;
        let (routes, gateway) = self.client_routes(budget.clone(), meter.clone())?;
        self.serve_sockets(handed_on, gateway, open.drain.clone());
        let server = Grpc::builder()
            .layer(Shortcut(budget.layer(meter.layer(Unary::new(self.api.clone(), self.kv_service())))))
            .accept_http1(true)
            .max_concurrent_streams(limits.concurrent_streams_max)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
            // A client that is gone without a word gives its place and its streams back.
            .http2_keepalive_interval(Some(limits.keepalive_interval))
            .http2_keepalive_timeout(Some(limits.keepalive_timeout))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .trace_fn(|request| tracing::debug_span!("rpc", path = request.uri().path()))
            .add_routes(routes)
            .serve_with_incoming_shutdown(
                bounded(incoming, self.connections_max(), kind),
                open.drain.clone().cancelled_owned(),
            );
        self.guard("client", server, open.drain.clone(), open.drained.clone());
        Ok(())
    }

    /// Serves the connections that are to be WebSockets; each has its place among all connections.
    fn serve_sockets(&self, mut handed_on: mpsc::Receiver<Connection>, gateway: http::Gateway, end: CancellationToken) {
        let limits = &self.config.limits;
        let sockets = http::Sockets {
            gateway,
            rules: self.browser_rules(),
            account: self.account.clone(),
            ping_interval: limits.keepalive_interval.max(limits.keepalive_timeout),
            answer_patience: self.config.server.request_timeout,
            end,
        };
        let env = self.env.clone();
        self.env.spawn(async move {
            while let Some(connection) = handed_on.recv().await {
                let client = connection.client().clone();
                env.spawn(sockets.clone().serve(connection, client));
            }
        });
    }

    /// Connections of clients that are taken: as many as the setting says, and no more than there are files for.
    fn connections_max(&self) -> usize {
        let wanted = self.config.limits.connections_max;
        let Some(files) = process::raise_open_files_max() else { return wanted };
        let room = usize::try_from(files.saturating_sub(RESERVED_FILES.min(files / 2))).unwrap_or(usize::MAX);
        if room < wanted {
            tracing::info!(
                files,
                connections_max = wanted,
                room,
                "fewer connections are taken than limits.connections_max says: raise the limit of open files (ulimit -n, \
                 LimitNOFILE) or lower the setting"
            );
        }
        wanted.min(room)
    }

    /// gRPC's health service, with what this process says of itself.
    pub(super) fn health_service(&self) -> HealthServer<Health> {
        HealthServer::new(Health(HealthService::from_health_reporter(self.health.clone())))
    }

    fn kv_service(&self) -> KvServer<Api> {
        KvServer::new(self.api.clone())
            .max_decoding_message_size(self.config.client_message_bytes_max())
            .max_encoding_message_size(usize::MAX)
    }

    /// Everything on the port, and the gateway in it.
    fn client_routes(&self, budget: Budget, meter: Meter) -> anyhow::Result<(Routes, http::Gateway)> {
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
            .add_service(ClusterServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(AuthServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(AdminServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(MaintenanceServer::new(api.clone()).max_decoding_message_size(bytes_max))
            .add_service(self.health_service().max_decoding_message_size(bytes_max))
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .into_axum_router()
            .layer(meter)
            .layer(axum::middleware::from_fn(http::only_grpc));
        let (env, account) = (self.env.clone(), self.account.clone());
        let gateway = http::Gateway::new(env, services.clone(), pb::PUBLIC_DESCRIPTORS, bytes_max, account)?;
        let pages = http::router(api, gateway.clone(), self.browser_rules());
        Ok((Routes::from(services.merge(pages).layer(budget)), gateway))
    }
}

/// Resolves when this member has applied what a leader says was committed at some moment of this life: so it answers for all that was
/// acknowledged before, and knows the membership.
async fn caught_up(node: &Node) {
    let index = loop {
        match node.confirmed_index().await {
            Some(index) => break index,
            None => sleep(LOOK).await,
        }
    };
    let store = node.store();
    while !store.wait_applied(index, Instant::now() + node.options().request_timeout).await {}
}
