//! Connections between members and listeners for them.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, UnixListener};
use tokio::sync::oneshot;

use super::rota::Asker;
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

/// Where connections are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err(format!("got {text:?}, expected the path of a socket after unix:")),
            Some(path) => Ok(Self::Unix(path.into())),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(format!("got {text:?}, expected address:port, such as \"0.0.0.0:2379\"")),
            },
        }
    }
}

/// An address that is this node's, and at which connections are still refused.
pub trait Bound: Send {
    /// With the number of its port, also if it was bound with port 0.
    fn address(&self) -> Place;
    /// From now on connections are taken; they are refused again when what this returns is dropped.
    fn listen(self: Box<Self>) -> io::Result<Incoming>;
}

/// Dials peers and listens for them. A name is resolved at every call: headless DNS moves when a pod does.
pub trait Net: Send + Sync + 'static {
    /// Takes a place for this node; fails if somebody listens there.
    fn bind(&self, place: &Place) -> io::Result<Box<dyn Bound>>;
    /// The addresses that a `host:port` resolves to; an unknown name is none.
    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>>;
    /// Connects to `address`, a `host:port`.
    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>>;
}

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// After a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// TCP with `TCP_NODELAY`, and sockets in the file system.
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
    fn address(&self) -> Place {
        Place::Tcp(self.address)
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

/// The path of a socket, made when it is listened at: there is no bound socket that refuses.
struct BoundUnix(PathBuf);

impl BoundUnix {
    /// A socket that nobody listens at is what a process has left behind. Whatever else is there is not ours to remove: a file refuses
    /// connections, too.
    fn new(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt as _;
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something is there that is no socket"));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(Self(path.to_owned()))
    }
}

impl Bound for BoundUnix {
    fn address(&self) -> Place {
        Place::Unix(self.0.clone())
    }

    fn listen(self: Box<Self>) -> io::Result<Incoming> {
        let listener = Removed(UnixListener::bind(&self.0)?, self.0);
        let incoming = stream::unfold(listener, |listener| async move {
            let accepted = listener.0.accept().await;
            if accepted.is_err() {
                super::sleep(ACCEPT_RETRY).await;
            }
            // Who reaches the socket is on this machine.
            let from = IpAddr::from([127, 0, 0, 1]);
            let accepted = accepted.map(|(stream, _)| Accepted { stream: Box::new(stream), from });
            Some((accepted, listener))
        });
        Ok(Box::pin(incoming))
    }
}

/// A listener, whose socket goes from the file system with it.
struct Removed(UnixListener, PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.1);
    }
}

impl Net for Tcp {
    fn bind(&self, place: &Place) -> io::Result<Box<dyn Bound>> {
        let address = match place {
            Place::Tcp(address) => *address,
            Place::Unix(path) => return Ok(Box::new(BoundUnix::new(path)?)),
        };
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
        let _ = self.0.submit(Pool::Names, Asker::MEMBER, Box::new(job));
        told.await.map_err(io::Error::other)?
    }
}

/// The addresses of a `host:port`, however long the system's resolver takes to say. Not to be called on a thread of the event loop.
pub fn addresses(address: &str) -> io::Result<Vec<SocketAddr>> {
    address.parse().map_or_else(|_| look_up(address), |address| Ok(vec![address]))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_left_behind_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |path: &Path| BoundUnix::new(path).map(|_| ()).unwrap_err().kind();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert_eq!(refusal(path), io::ErrorKind::AlreadyExists, "{}", path.display());
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let socket = dir.path().join("socket");
        // Dropped without being removed, as by a process that was killed.
        let alive = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(refusal(&socket), io::ErrorKind::AddrInUse);
        drop(alive);
        let listening = Box::new(BoundUnix::new(&socket).unwrap()).listen().unwrap();
        assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
        drop(listening);
        assert!(!socket.exists(), "it goes with its listener");
    }
}
