//! A network in memory: hosts, latency, and links that break, fall silent, or lose a whole host.
//!
//! A connection is a pair of pipes between two tasks of one process, with a random delay on every piece that goes through.
//! [`SimNet::cut`] resets what is open and lets dials hang, as dropped packets do; [`SimNet::hold`] says nothing to anyone and
//! delivers what was sent once it is mended, as TCP does. After [`SimNet::power_off`] a host's old life reaches nobody, however
//! long its tasks live on.
//! Absent: names (addresses resolve to themselves), and bandwidth.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::trace;
use crate::env::net::{Accepted, Bound, BoxFuture, Incoming, Net, Place, Stream};

const PIPE_BYTES: usize = 256 << 10;
const PIECE_BYTES: usize = 64 << 10;
const DIAL_TIME: Duration = Duration::from_millis(1);
/// Between looks at a link that lets nothing through.
const BLOCKED_LOOK: Duration = Duration::from_millis(20);

struct State {
    rng: fastrand::Rng,
    latency_max: Duration,
    listeners: BTreeMap<SocketAddr, mpsc::Sender<Accepted>>,
    /// From, to.
    blocked: BTreeSet<(IpAddr, IpAddr)>,
    connections: Vec<(IpAddr, IpAddr, CancellationToken)>,
    lives: BTreeMap<IpAddr, CancellationToken>,
}

impl State {
    /// Whether what `a` sends does not reach `b`.
    fn blocked(&self, a: IpAddr, b: IpAddr) -> bool {
        self.blocked.contains(&(a, b))
    }

    fn is_severed(&self, a: IpAddr, b: IpAddr) -> bool {
        self.blocked(a, b) || self.blocked(b, a)
    }

    fn break_connections(&mut self, hit: impl Fn(IpAddr, IpAddr) -> bool) {
        self.connections.retain(|(from, to, broken)| {
            let hit = hit(*from, *to);
            if hit {
                broken.cancel();
            }
            !hit && !broken.is_cancelled()
        });
    }
}

/// The network; cloning shares it.
#[derive(Clone)]
pub struct SimNet(Arc<Mutex<State>>);

/// One life of a host, and its access to a [`SimNet`].
pub struct Host {
    net: SimNet,
    address: IpAddr,
    life: CancellationToken,
}

impl SimNet {
    /// A network in which each piece takes up to `latency_max`.
    pub fn new(seed: u64, latency_max: Duration) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: fastrand::Rng::with_seed(seed),
            latency_max,
            listeners: BTreeMap::new(),
            blocked: BTreeSet::new(),
            connections: Vec::new(),
            lives: BTreeMap::new(),
        })))
    }

    /// Switches the host at `address` on: a new life of it.
    pub fn host(&self, address: IpAddr) -> Arc<Host> {
        self.power_off(address);
        let life = CancellationToken::new();
        self.0.lock().lives.insert(address, life.clone());
        Arc::new(Host { net: self.clone(), address, life })
    }

    /// Breaks the connections between two hosts and lets no new one through.
    pub fn cut(&self, a: IpAddr, b: IpAddr) {
        let mut state = self.0.lock();
        state.blocked.extend([(a, b), (b, a)]);
        state.break_connections(|from, to| (from == a && to == b) || (from == b && to == a));
    }

    /// Keeps what two hosts send to one another; neither is told.
    pub fn hold(&self, a: IpAddr, b: IpAddr) {
        self.0.lock().blocked.extend([(a, b), (b, a)]);
    }

    /// Keeps what `from` sends to `to`; the other way is open.
    pub fn hold_one_way(&self, from: IpAddr, to: IpAddr) {
        self.0.lock().blocked.insert((from, to));
    }

    /// Lets everything through again between two hosts.
    pub fn release(&self, a: IpAddr, b: IpAddr) {
        self.0.lock().blocked.retain(|(from, to)| (*from, *to) != (a, b) && (*from, *to) != (b, a));
    }

    /// Breaks every connection of a host; new ones are let through.
    pub fn reset(&self, host: IpAddr) {
        self.0.lock().break_connections(|from, to| from == host || to == host);
    }

    /// From now on each piece takes up to `most`.
    pub fn set_latency(&self, most: Duration) {
        self.0.lock().latency_max = most;
    }

    /// Lets everyone reach everyone again.
    pub fn mend(&self) {
        self.0.lock().blocked.clear();
    }

    /// The host is off: its connections break, nobody listens there, and its tasks reach nobody any more.
    pub fn power_off(&self, host: IpAddr) {
        let mut state = self.0.lock();
        if let Some(life) = state.lives.remove(&host) {
            life.cancel();
        }
        state.listeners.retain(|address, _| address.ip() != host);
        state.break_connections(|from, to| from == host || to == host);
    }

    /// Carries bytes one way until either side ends or the connection breaks.
    async fn carry(
        self,
        ends: (IpAddr, IpAddr),
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        broken: CancellationToken,
    ) {
        let carrying = async {
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                let read = from.read(&mut piece).await.unwrap_or(0);
                let delay = {
                    let mut state = self.0.lock();
                    let latency_max = state.latency_max;
                    latency_max.mul_f64(state.rng.f64())
                };
                crate::env::sleep(delay).await;
                while self.0.lock().blocked(ends.0, ends.1) {
                    crate::env::sleep(BLOCKED_LOOK).await;
                }
                trace::event(format_args!("piece {} {}", ends.0, ends.1));
                if read == 0 {
                    let _ = to.shutdown().await;
                    return;
                }
                if to.write_all(&piece[..read]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = broken.cancelled() => {}
            () = carrying => {}
        }
    }

    /// Both ends of a new connection.
    fn connect(&self, from: IpAddr, to: IpAddr, broken: &CancellationToken) -> (Pipe, Pipe) {
        let (ours, our_far) = tokio::io::duplex(PIPE_BYTES);
        let (theirs, their_far) = tokio::io::duplex(PIPE_BYTES);
        let (our_read, our_write) = tokio::io::split(our_far);
        let (their_read, their_write) = tokio::io::split(their_far);
        tokio::spawn(self.clone().carry((from, to), our_read, their_write, broken.clone()));
        tokio::spawn(self.clone().carry((to, from), their_read, our_write, broken.clone()));
        (Pipe::new(ours, broken), Pipe::new(theirs, broken))
    }
}

struct BoundHost {
    net: SimNet,
    life: CancellationToken,
    address: SocketAddr,
}

impl Bound for BoundHost {
    fn address(&self) -> Place {
        Place::Tcp(self.address)
    }

    fn listen(self: Box<Self>) -> io::Result<Incoming> {
        let (tx, rx) = mpsc::channel(64);
        if !self.life.is_cancelled() {
            self.net.0.lock().listeners.insert(self.address, tx);
        }
        // Who dials when this is dropped finds the channel closed, and is refused.
        Ok(Box::pin(stream::unfold(rx, |mut rx| async move { Some((Ok(rx.recv().await?), rx)) })))
    }
}

impl Net for Host {
    fn bind(&self, place: &Place) -> io::Result<Box<dyn Bound>> {
        let Place::Tcp(address) = *place else { return Err(io::ErrorKind::Unsupported.into()) };
        Ok(Box::new(BoundHost { net: self.net.clone(), life: self.life.clone(), address }))
    }

    fn resolve(&self, address: String) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(address.parse().into_iter().collect()) })
    }

    fn connect(&self, address: String) -> BoxFuture<io::Result<Box<dyn Stream>>> {
        let (net, from, life) = (self.net.clone(), self.address, self.life.clone());
        Box::pin(async move {
            let to: SocketAddr = address.parse().map_err(|_| io::ErrorKind::NotFound)?;
            crate::env::sleep(DIAL_TIME).await;
            // A handshake goes both ways.
            while net.0.lock().is_severed(from, to.ip()) {
                crate::env::sleep(BLOCKED_LOOK).await;
            }
            trace::event(format_args!("dial {from} {to}"));
            let broken = CancellationToken::new();
            let listener = {
                let mut state = net.0.lock();
                if life.is_cancelled() {
                    return Err(io::ErrorKind::NetworkUnreachable.into());
                }
                let listener = state.listeners.get(&to).cloned().ok_or(io::ErrorKind::ConnectionRefused)?;
                state.connections.push((from, to.ip(), broken.clone()));
                listener
            };
            let (ours, theirs) = net.connect(from, to.ip(), &broken);
            let accepted = Accepted { stream: Box::new(theirs), from };
            listener.send(accepted).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Ok(Box::new(ours) as Box<dyn Stream>)
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
        self.check(cx)?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
