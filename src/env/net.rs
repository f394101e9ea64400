//! Connections between members and listeners for them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use futures_util::stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Streams that peers opened to us.
pub type Incoming = Pin<Box<dyn futures_util::Stream<Item = io::Result<Box<dyn Stream>>> + Send>>;

/// Dials peers and listens for them. A name is resolved at every call: headless DNS moves when a pod does.
pub trait Net: Send + Sync + 'static {
    /// Listens at `address`; returns the address that was bound, and who connects.
    fn listen(&self, address: SocketAddr) -> BoxFuture<io::Result<(SocketAddr, Incoming)>>;
    /// The addresses that a `host:port` resolves to; an unknown name is none.
    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>>;
    /// Connects to `address`, a `host:port`.
    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>>;
}

/// After a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// TCP with `TCP_NODELAY`.
pub struct Tcp;

impl Net for Tcp {
    fn listen(&self, address: SocketAddr) -> BoxFuture<io::Result<(SocketAddr, Incoming)>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let bound = listener.local_addr()?;
            let incoming = stream::unfold(listener, |listener| async move {
                let accepted = listener.accept().await;
                if accepted.is_err() {
                    // Out of file descriptors, most likely: to ask again at once would only burn the CPU.
                    super::sleep(ACCEPT_RETRY).await;
                }
                let accepted = accepted.and_then(|(stream, _)| {
                    stream.set_nodelay(true)?;
                    Ok(Box::new(stream) as Box<dyn Stream>)
                });
                Some((accepted, listener))
            });
            Ok((bound, Box::pin(incoming) as Incoming))
        })
    }

    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host(address).await?.collect()) })
    }

    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}
