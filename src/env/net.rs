//! Connections between members and listeners for them.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

use super::threads::{Pool, Pools};

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A stream that a peer opened to us, and the address that it came from.
pub struct Accepted {
    pub stream: Box<dyn Stream>,
    pub from: IpAddr,
}

/// Streams that peers opened to us.
pub type Incoming = Pin<Box<dyn futures_util::Stream<Item = io::Result<Accepted>> + Send>>;

/// An address that is this node's, and at which connections are still refused.
pub trait Bound: Send {
    /// With the number of its port, also if it was bound with port 0.
    fn address(&self) -> SocketAddr;
    /// From now on connections are taken; they are refused again when what this returns is dropped.
    fn listen(self: Box<Self>) -> io::Result<Incoming>;
}

/// Dials peers and listens for them. A name is resolved at every call: headless DNS moves when a pod does.
pub trait Net: Send + Sync + 'static {
    /// Takes `address` for this node; fails if somebody listens there.
    fn bind(&self, address: SocketAddr) -> io::Result<Box<dyn Bound>>;
    /// Listens at `address`; returns the address that was bound, and who connects.
    fn listen(&self, address: SocketAddr) -> io::Result<(SocketAddr, Incoming)> {
        let bound = self.bind(address)?;
        Ok((bound.address(), bound.listen()?))
    }
    /// The addresses that a `host:port` resolves to; an unknown name is none.
    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>>;
    /// Connects to `address`, a `host:port`.
    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>>;
}

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// After a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// TCP with `TCP_NODELAY`.
pub struct Tcp {
    names: Names,
}

impl Tcp {
    pub(super) fn new(pools: Arc<Pools>) -> Self {
        Self { names: Names(pools) }
    }
}

/// Bound, and not listening: the kernel refuses who connects.
struct BoundTcp {
    socket: TcpSocket,
    address: SocketAddr,
}

impl Bound for BoundTcp {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn listen(self: Box<Self>) -> io::Result<Incoming> {
        let listener = self.socket.listen(BACKLOG)?;
        let incoming = stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await;
            if accepted.is_err() {
                // Out of file descriptors, most likely: to ask again at once would only burn the CPU.
                super::sleep(ACCEPT_RETRY).await;
            }
            let accepted = accepted.and_then(|(stream, from)| {
                stream.set_nodelay(true)?;
                Ok(Accepted { stream: Box::new(stream), from: from.ip().to_canonical() })
            });
            Some((accepted, listener))
        });
        Ok(Box::pin(incoming))
    }
}

impl Net for Tcp {
    fn bind(&self, address: SocketAddr) -> io::Result<Box<dyn Bound>> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Connections of the process before, which the kernel still remembers, must not keep this one out.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let address = socket.local_addr()?;
        Ok(Box::new(BoundTcp { socket, address }))
    }

    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        let names = self.names.clone();
        Box::pin(async move { names.look_up(address).await })
    }

    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        let names = self.names.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(&*names.look_up(address).await?).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

/// Asks for addresses, on threads that nobody else waits for.
#[derive(Clone)]
struct Names(Arc<Pools>);

impl Names {
    async fn look_up(&self, address: String) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = address.parse() {
            return Ok(vec![address]);
        }
        let (tell, told) = oneshot::channel();
        let job = move || {
            // Who has given up meanwhile does not hold a thread.
            if !tell.is_closed() {
                let _ = tell.send(look_up(&address));
            }
        };
        // The member's own is never refused.
        let _ = self.0.submit(Pool::Names, None, Box::new(job));
        told.await.map_err(io::Error::other)?
    }
}

/// Asks the system's resolver.
#[cfg(not(feature = "testing"))]
fn look_up(address: &str) -> io::Result<Vec<SocketAddr>> {
    Ok(address.to_socket_addrs()?.collect())
}

/// Asks the hosts file that a test names, `QUORATE_TEST_HOSTS`, anew each time: it plays the DNS of Kubernetes, where names of
/// pods come late and move. A line is an address and a name. A name that it does not hold does not resolve. Without the
/// variable: the system's resolver.
#[cfg(feature = "testing")]
fn look_up(address: &str) -> io::Result<Vec<SocketAddr>> {
    let (Some(path), Some((host, port))) = (std::env::var_os("QUORATE_TEST_HOSTS"), address.rsplit_once(':')) else {
        return Ok(address.to_socket_addrs()?.collect());
    };
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let text = std::fs::read_to_string(path)?;
    let entries = text.lines().filter_map(|line| line.split_once(' ')).filter(|(_, name)| *name == host);
    let found: Vec<SocketAddr> = entries.filter_map(|(ip, _)| Some(SocketAddr::new(ip.parse().ok()?, port))).collect();
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{host}: name not known (test hosts)")));
    }
    Ok(found)
}
