//! The status listener: what this member says of itself, from the first moment of the process on and without TLS.
//!
//! For probes, monitoring and people. Nothing can be changed through it, and no data of clients is read.
//! Invariants: its cost is bounded whatever is sent: connections, the life of each, and the bytes that it may send. Who comes last is
//! served: where all places are taken the oldest connection goes, so that nobody who sits on them keeps a probe out.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tonic::transport::server::Connected;

use super::Server;
use super::listen::HEADER_BYTES_MAX;
use crate::env::net::{Accepted, BoxFuture, Incoming, Stream};
use crate::env::timeout;
use crate::http;
use crate::pb::admin::admin_server::AdminServer;
use crate::pb::etcd::cluster_server::ClusterServer;
use crate::pb::etcd::maintenance_server::MaintenanceServer;

/// Connections at a time; whoever asks has one for a few milliseconds, and a member has a few who ask.
const CONNECTIONS_MAX: usize = 64;
/// No connection gets older, whatever it does; a watch of the health begins anew.
const LIFE_MAX: Duration = Duration::from_secs(60);
/// Bytes that are read from one connection in its life. A question has a few hundred.
const READ_BYTES_MAX: usize = 64 << 10;
const STREAMS_MAX: u32 = 8;
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// For an answer; some ask the leader.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

impl Server {
    pub(super) fn serve_status(&self, incoming: Incoming) {
        let shutdown = self.env.shutdown.clone();
        let server = Grpc::builder()
            .accept_http1(true)
            .max_concurrent_streams(STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .timeout(ANSWER_PATIENCE)
            .add_routes(self.status_routes())
            .serve_with_incoming_shutdown(guests(incoming), shutdown.clone().cancelled_owned());
        self.guard("status", server, shutdown, CancellationToken::new());
    }

    /// The pages, gRPC health, and of the other services the calls that `quorate status` makes.
    fn status_routes(&self) -> Routes {
        let api = self.api.clone();
        let admin = AdminServer::new(api.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let cluster = ClusterServer::new(api.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let maintenance = MaintenanceServer::new(api.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let health = self.health_service().max_decoding_message_size(MESSAGE_BYTES_MAX);
        let router = http::status_router(api, self.browser_rules())
            .route_service("/quorate.admin.v1.Admin/Membership", admin)
            .route_service("/etcdserverpb.Cluster/MemberList", cluster)
            .route_service("/etcdserverpb.Maintenance/Status", maintenance)
            .route_service("/grpc.health.v1.Health/{method}", health);
        Routes::from(router)
    }
}

/// Whoever connects, the oldest of whom goes when there are too many.
fn guests(incoming: Incoming) -> impl futures_util::Stream<Item = io::Result<Guest>> {
    let mut places: VecDeque<CancellationToken> = VecDeque::new();
    incoming.map(move |accepted: io::Result<Accepted>| -> io::Result<Guest> {
        let io = accepted?.stream;
        places.retain(|ended| !ended.is_cancelled());
        while places.len() >= CONNECTIONS_MAX {
            places.pop_front().iter().for_each(CancellationToken::cancel);
        }
        let ended = CancellationToken::new();
        places.push_back(ended.clone());
        Ok(Guest::new(io, ended))
    })
}

/// One connection.
struct Guest {
    io: Box<dyn Stream>,
    read_bytes: usize,
    /// Resolves when it must go; `None` then.
    end: Option<BoxFuture<()>>,
    _place: DropGuard,
}

impl Guest {
    fn new(io: Box<dyn Stream>, ended: CancellationToken) -> Self {
        let place = ended.clone().drop_guard();
        let end = async move {
            // Either way it is over.
            let _ = timeout(LIFE_MAX, ended.cancelled()).await;
        };
        Self { io, read_bytes: 0, end: Some(Box::pin(end)), _place: place }
    }

    /// Fails when it must go.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let over = match &mut self.end {
            Some(end) => end.as_mut().poll(cx).is_ready(),
            None => true,
        };
        if over {
            self.end = None;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the connection's time is over"));
        }
        Ok(())
    }
}

impl Connected for Guest {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = into.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, into))?;
        self.read_bytes += into.filled().len() - before;
        if self.read_bytes > READ_BYTES_MAX {
            // A read that fails has read nothing.
            into.set_filled(before);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::QuotaExceeded, "the client sends too much")));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::env::{Instant, sleep};

    /// So many connections, one after the other: the clients' ends, and the guests.
    async fn connect(count: usize) -> (Vec<DuplexStream>, Vec<Guest>) {
        let (clients, ios): (Vec<_>, Vec<_>) = (0..count).map(|_| tokio::io::duplex(1024)).unzip();
        let incoming = stream::iter(
            ios.into_iter().map(|io| Ok(Accepted { stream: Box::new(io), from: std::net::Ipv4Addr::LOCALHOST.into() })),
        );
        let guests: Vec<_> = guests(Box::pin(incoming)).map(Result::unwrap).collect().await;
        (clients, guests)
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_last_is_served_and_the_oldest_goes() {
        let (_clients, mut guests) = connect(CONNECTIONS_MAX + 2).await;
        for (number, guest) in guests.iter_mut().enumerate() {
            let gone = timeout(Duration::from_millis(1), guest.read_u8()).await.is_ok();
            assert_eq!(gone, number < 2, "connection {number}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connection_that_has_ended_leaves_its_place() {
        let mut places = 0;
        let (clients, ios): (Vec<_>, Vec<_>) = (0..3 * CONNECTIONS_MAX).map(|_| tokio::io::duplex(1024)).unzip();
        let incoming = stream::iter(
            ios.into_iter().map(|io| Ok(Accepted { stream: Box::new(io), from: std::net::Ipv4Addr::LOCALHOST.into() })),
        );
        let mut first = None;
        let mut incoming = std::pin::pin!(guests(Box::pin(incoming)));
        while let Some(guest) = incoming.next().await {
            places += 1;
            first.get_or_insert(guest.unwrap());
        }
        assert_eq!(places, clients.len());
        let first = first.as_mut().unwrap();
        assert!(timeout(Duration::from_millis(1), first.read_u8()).await.is_err(), "nobody took its place");
    }

    #[tokio::test(start_paused = true)]
    async fn no_connection_gets_old_whether_it_speaks_listens_or_neither() {
        for speaks in [false, true] {
            let (mut clients, mut guests) = connect(1).await;
            let (mut client, mut guest) = (clients.remove(0), guests.remove(0));
            let begin = Instant::now();
            let speaking = tokio::spawn(async move {
                while speaks && client.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_secs(1)).await;
                }
                sleep(2 * LIFE_MAX).await;
            });
            while guest.read_u8().await.is_ok() {}
            assert_eq!(begin.elapsed(), LIFE_MAX, "speaks: {speaks}");
            speaking.abort();
        }
        // One that takes nothing of its answer.
        let (_clients, mut guests) = connect(1).await;
        let begin = Instant::now();
        assert!(guests[0].write_all(&[0; 4096]).await.is_err());
        assert_eq!(begin.elapsed(), LIFE_MAX);
    }

    #[tokio::test]
    async fn who_sends_too_much_is_cut_off() {
        let (mut clients, mut guests) = connect(1).await;
        let (mut client, mut guest) = (clients.remove(0), guests.remove(0));
        let sending = tokio::spawn(async move { while client.write_all(&[b'x'; 512]).await.is_ok() {} });
        let mut all = Vec::new();
        assert!(guest.read_to_end(&mut all).await.is_err());
        assert!(all.len() <= READ_BYTES_MAX + 1024);
        sending.abort();
    }
}
