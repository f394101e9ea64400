//! Connections between members and listeners for them.

use std::future::Future;
use std::io;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A future that owns what it needs.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Dials peers. The name is resolved at every call: headless DNS moves when a pod does.
pub trait Net: Send + Sync + 'static {
    /// Connects to `address`, a `host:port`.
    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>>;
}

/// TCP with `TCP_NODELAY`.
pub struct Tcp;

impl Net for Tcp {
    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}
