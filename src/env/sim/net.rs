//! A network in memory: named hosts, links that can be cut.
//!
//! A connection is a pipe between two tasks of one process. Cutting a pair of hosts breaks their connections and refuses new
//! ones in silence (a dial hangs, as packets that are dropped do) until it is mended.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::env::net::{BoxFuture, Incoming, Net, Stream};

const PIPE_BYTES: usize = 256 << 10;
const DIAL_TIME: Duration = Duration::from_millis(1);

#[derive(Default)]
struct State {
    listeners: BTreeMap<SocketAddr, mpsc::Sender<Box<dyn Stream>>>,
    cut: BTreeSet<(SocketAddr, SocketAddr)>,
    connections: Vec<(SocketAddr, SocketAddr, CancellationToken)>,
}

/// The network; cloning shares it.
#[derive(Clone, Default)]
pub struct SimNet(Arc<Mutex<State>>);

/// One host's access to a [`SimNet`].
pub struct Host {
    net: SimNet,
    address: SocketAddr,
}

impl SimNet {
    /// The network as the host at `address` sees it.
    pub fn host(&self, address: SocketAddr) -> Arc<Host> {
        Arc::new(Host { net: self.clone(), address })
    }

    /// Breaks the connections between two hosts and lets no new one through.
    pub fn cut(&self, a: SocketAddr, b: SocketAddr) {
        let mut state = self.0.lock();
        state.cut.insert((a, b));
        state.cut.insert((b, a));
        state.connections.retain(|(from, to, broken)| {
            let hit = (*from == a && *to == b) || (*from == b && *to == a);
            if hit {
                broken.cancel();
            }
            !hit
        });
    }

    /// Lets everyone reach everyone again.
    pub fn mend(&self) {
        self.0.lock().cut.clear();
    }

    /// The host is off: its connections break and nobody listens there.
    pub fn power_off(&self, host: SocketAddr) {
        let mut state = self.0.lock();
        state.listeners.remove(&host);
        state.connections.retain(|(from, to, broken)| {
            let hit = *from == host || *to == host;
            if hit {
                broken.cancel();
            }
            !hit
        });
    }
}

impl Net for Host {
    fn listen(&self, address: SocketAddr) -> BoxFuture<io::Result<(SocketAddr, Incoming)>> {
        let net = self.net.clone();
        Box::pin(async move {
            let (tx, rx) = mpsc::channel(64);
            net.0.lock().listeners.insert(address, tx);
            let incoming = stream::unfold(rx, |mut rx| async move { Some((Ok(rx.recv().await?), rx)) });
            Ok((address, Box::pin(incoming) as Incoming))
        })
    }

    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(address.parse().into_iter().collect()) })
    }

    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        let (net, from) = (self.net.clone(), self.address);
        Box::pin(async move {
            let to: SocketAddr = address.parse().map_err(|_| io::ErrorKind::NotFound)?;
            crate::env::sleep(DIAL_TIME).await;
            while net.0.lock().cut.contains(&(from, to)) {
                crate::env::sleep(100 * DIAL_TIME).await;
            }
            let broken = CancellationToken::new();
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            let listener = {
                let mut state = net.0.lock();
                let listener = state.listeners.get(&to).cloned().ok_or(io::ErrorKind::ConnectionRefused)?;
                state.connections.push((from, to, broken.clone()));
                listener
            };
            let theirs: Box<dyn Stream> = Box::new(Pipe::new(theirs, &broken));
            listener.send(theirs).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Ok(Box::new(Pipe::new(ours, &broken)) as Box<dyn Stream>)
        })
    }
}

/// One end of a connection.
struct Pipe {
    io: DuplexStream,
    broken: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Pipe {
    fn new(io: DuplexStream, broken: &CancellationToken) -> Self {
        Self { io, broken: Box::pin(broken.clone().cancelled_owned()) }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.broken.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, into)
    }
}

impl AsyncWrite for Pipe {
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
