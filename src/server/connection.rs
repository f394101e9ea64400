//! One accepted connection: its place among the allowed ones, the filter over its bytes, and how long it may take to say what
//! it is.
//!
//! Invariants: a connection that has not sent HTTP/2's preface, or the whole head of an HTTP/1 request, in time is closed:
//! those who dribble hold no place. At most `GATHERED_BYTES_MAX` wait here to be written. Who does not take what is written is read no
//! further than `READ_AHEAD_BYTES`: else it could go on asking, and what it is answered would wait here. A host has a fair share of the
//! places (`node::account`). Absent: what comes after that (HTTP/2's keep-alive, the time of a request in `budget`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use super::authority::Filter;
use crate::env::net::{Accepted, Incoming, Stream};
use crate::env::{Sleep, sleep};
use crate::metrics::metrics;
use crate::node::Client;
use crate::node::account::{self, Account, Host, Pool, Taken};

/// Pieces below this are gathered into one write.
const SMALL_BYTES: usize = 4 << 10;
const GATHERED_BYTES_MAX: usize = 16 << 10;
/// What is read while the socket takes nothing. A client reads whatever it sends; one that answers pings must be heard.
const READ_AHEAD_BYTES: usize = 64 << 10;
/// What a connection takes by itself, in this process.
const CONNECTION_BYTES: u64 = 24 << 10;

/// Who connects.
#[derive(Clone)]
pub(super) enum Kind {
    /// `patience`: time to say what it speaks.
    Client {
        patience: Duration,
        account: Account,
    },
    Peer {
        patience: Duration,
    },
}

/// Looks for what a client must say first.
enum Greeting {
    /// How much of the blank line that ends an HTTP/1 head was seen, and until when it must be there.
    Awaited {
        seen: usize,
        until: Pin<Box<Sleep>>,
    },
    Done,
}

impl Greeting {
    fn begin(kind: &Kind) -> Self {
        let (Kind::Client { patience, .. } | Kind::Peer { patience }) = kind;
        Self::Awaited { seen: 0, until: Box::pin(sleep(*patience)) }
    }

    /// Takes what has arrived.
    fn take(&mut self, bytes: &[u8], is_http2: Option<bool>) {
        const END: &[u8] = b"\r\n\r\n";
        let Self::Awaited { seen, .. } = self else { return };
        for byte in bytes.iter().take_while(|_| is_http2 != Some(true)) {
            if *seen == END.len() {
                break;
            }
            *seen = if *byte == END[*seen] { *seen + 1 } else { usize::from(*byte == END[0]) };
        }
        // HTTP/2's preface has a blank line too, and goes on behind it.
        if is_http2 == Some(true) || is_http2 == Some(false) && *seen == END.len() {
            *self = Self::Done;
        }
    }

    /// Fails when the time is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Self::Awaited { until, .. } = self else { return Ok(()) };
        match until.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the client did not say what it wants in time"))
            }
            Poll::Pending => Ok(()),
        }
    }
}

/// An accepted connection and its place among the allowed ones.
pub(super) struct Connection {
    io: Box<dyn Stream>,
    greeting: Greeting,
    /// Its bytes are counted as clients'.
    counted: bool,
    filter: Filter,
    /// Filtered, and not taken yet.
    ready: Bytes,
    /// To be written.
    gathered: BytesMut,
    /// What is being written has let others go first.
    lingered: bool,
    /// The socket takes nothing at the moment.
    is_blocked: bool,
    /// Read since then.
    read_ahead: usize,
    client: Client,
    _place: Vec<Taken>,
}

impl Connection {
    /// `place`: what was taken for it, where that is counted.
    pub(super) fn new(io: Box<dyn Stream>, kind: &Kind, client: Client, place: Vec<Taken>) -> Self {
        Self {
            io,
            greeting: Greeting::begin(kind),
            counted: matches!(kind, Kind::Client { .. }),
            filter: Filter::default(),
            ready: Bytes::new(),
            gathered: BytesMut::new(),
            lingered: false,
            is_blocked: false,
            read_ahead: 0,
            client,
            _place: place,
        }
    }

    /// Takes note of whether the socket took something.
    fn watch_socket(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.is_blocked = written.is_pending();
        if !self.is_blocked {
            self.read_ahead = 0;
        }
        written
    }

    fn count_sent(&self, bytes: usize) -> usize {
        if self.counted {
            metrics().client_sent_bytes.inc_by(bytes as u64);
        }
        bytes
    }

    /// Lets every task that is ready go first, once before each flush: a batch wakes many requests, and their answers leave in
    /// one write instead of one each.
    fn linger(&mut self, cx: &Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.lingered, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what was gathered, and of `more` behind it so much as the socket takes; that is what it returns.
    fn poll_send(&mut self, cx: &mut Context<'_>, more: &[u8]) -> Poll<io::Result<usize>> {
        while !self.gathered.is_empty() {
            ready!(self.linger(cx));
            let both = [io::IoSlice::new(&self.gathered), io::IoSlice::new(more)];
            let written = Pin::new(&mut self.io).poll_write_vectored(cx, &both);
            let written = ready!(self.watch_socket(written))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let own = self.gathered.len().min(written);
            self.gathered.advance(own);
            self.count_sent(written);
            if written > own {
                return Poll::Ready(Ok(written - own));
            }
        }
        // An idle connection has no buffer.
        self.gathered = BytesMut::new();
        if more.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let written = Pin::new(&mut self.io).poll_write(cx, more);
        let written = ready!(self.watch_socket(written))?;
        Poll::Ready(Ok(self.count_sent(written)))
    }
}

impl Connected for Connection {
    /// Every request on it has this in its extensions.
    type ConnectInfo = Client;
    fn connect_info(&self) -> Client {
        self.client.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                let part = this.ready.split_to(this.ready.len().min(into.remaining()));
                into.put_slice(&part);
                return Poll::Ready(Ok(()));
            }
            if this.is_blocked && this.read_ahead >= READ_AHEAD_BYTES {
                // The same task waits for the socket to take something, and then comes back.
                this.greeting.poll(cx)?;
                return Poll::Pending;
            }
            let begin = into.filled().len();
            let Poll::Ready(read) = Pin::new(&mut this.io).poll_read(cx, into) else {
                this.greeting.poll(cx)?;
                return Poll::Pending;
            };
            read?;
            let arrived = &into.filled()[begin..];
            if this.counted {
                metrics().client_received_bytes.inc_by(arrived.len() as u64);
            }
            if arrived.is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.read_ahead += arrived.len();
            let passed = this.filter.pass(arrived);
            this.greeting.take(arrived, this.filter.is_http2());
            match passed {
                Cow::Borrowed(same) if same.len() == arrived.len() => return Poll::Ready(Ok(())),
                other => this.ready = Bytes::from(other.into_owned()),
            }
            into.set_filled(begin);
        }
    }
}

/// Not vectored: for the HTTP/2 library that means to put frames of small values side by side instead of handing on each.
impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.len() < SMALL_BYTES && self.gathered.len() + bytes.len() <= GATHERED_BYTES_MAX {
            self.gathered.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        self.poll_send(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx, &[]))?;
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.lingered = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx, &[]))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// The hosts that have connections.
#[derive(Default)]
struct Hosts {
    known: HashMap<IpAddr, Host>,
    /// When there are so many, those are forgotten that have nothing any more.
    tidy_at: usize,
}

impl Hosts {
    fn get(&mut self, address: IpAddr) -> Host {
        if self.known.len() >= self.tidy_at.max(64) {
            self.known.retain(|_, host| host.is_known());
            self.tidy_at = 2 * self.known.len();
        }
        self.known.entry(address).or_default().clone()
    }
}

/// At most `max` connections at a time, and of one host no more than its share; further ones are closed at once.
pub(super) fn bounded(
    incoming: Incoming,
    max: usize,
    kind: Kind,
) -> impl futures_util::Stream<Item = io::Result<Connection>> {
    let places = Pool::new(account::Kind::Connections, max as u64);
    let mut hosts = Hosts::default();
    incoming.filter_map(move |accepted| {
        let connection = match accepted {
            Ok(Accepted { stream, from }) => {
                let host = hosts.get(from);
                let place = places.take(&host.as_client(), 1).and_then(|place| {
                    let mut taken = vec![place];
                    if let Kind::Client { account, .. } = &kind {
                        taken.push(account.received.take(&host.as_client(), CONNECTION_BYTES)?);
                    }
                    Ok(taken)
                });
                match place {
                    Ok(place) => Some(Ok(Connection::new(stream, &kind, Client::new(Some(&host)), place))),
                    Err(_) => {
                        tracing::warn!(%from, open = places.taken(), max, "connection refused: too many are open");
                        None
                    }
                }
            }
            Err(error) => Some(Err(error)),
        };
        std::future::ready(connection)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (DuplexStream, Connection) {
        let (client, io) = tokio::io::duplex(4096);
        let account = Account::new(1 << 20, 1 << 20, 1);
        let kind = Kind::Client { patience: PATIENCE, account };
        (client, Connection::new(Box::new(io), &kind, Client::new(None), Vec::new()))
    }

    /// Sends a byte a second; how long the server has read for, and whether it gave up.
    async fn dribble(text: &[u8]) -> (Duration, bool) {
        let (mut client, mut server) = pair();
        let begin = crate::env::Instant::now();
        let text = text.to_vec();
        let sending = tokio::spawn(async move {
            for byte in text {
                if client.write_all(&[byte]).await.is_err() {
                    return;
                }
                sleep(Duration::from_secs(1)).await;
            }
            // Says nothing more, and stays.
            sleep(Duration::from_secs(1000)).await;
        });
        let mut piece = [0; 64];
        let gave_up = loop {
            match server.read(&mut piece).await {
                Ok(0) => break false,
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                    break true;
                }
            }
        };
        sending.abort();
        (begin.elapsed(), gave_up)
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_what_it_wants_in_time_is_closed() {
        for text in
            [&b""[..], b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01"]
        {
            assert_eq!(dribble(text).await, (PATIENCE, true), "{:?}", String::from_utf8_lossy(text));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_said_it_may_be_silent() {
        for text in [&b"GET /\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
            let (mut client, mut server) = pair();
            client.write_all(text).await.unwrap();
            let mut piece = [0; 64];
            assert_eq!(server.read(&mut piece).await.unwrap(), text.len());
            let next = crate::env::timeout(Duration::from_secs(3600), server.read(&mut piece)).await;
            assert!(next.is_err(), "it was closed");
        }
    }

    /// Who asks and asks and reads nothing is not heard any more, until it reads.
    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_read_no_further() {
        let (mut client, mut server) = pair();
        client.write_all(b"GET /\r\n\r\n").await.unwrap();
        let mut piece = [0; 4096];
        assert_eq!(server.read(&mut piece).await.unwrap(), 9);
        let asking = async {
            loop {
                client.write_all(&[0; 1000]).await.unwrap();
            }
        };
        let serving = async {
            let mut heard = 0;
            loop {
                // The pipe is full soon.
                let _ = futures_util::poll!(std::pin::pin!(server.write_all(&[1; 10_000])));
                heard += server.read(&mut piece).await.unwrap();
                assert!(heard < READ_AHEAD_BYTES + 20_000, "{heard} bytes");
            }
        };
        let both = crate::env::timeout(Duration::from_secs(60), async { tokio::join!(asking, serving) }).await;
        assert!(both.is_err());
        let reading = async {
            let mut read = 0;
            while read < 1 << 20 {
                read += client.read(&mut [0; 4096]).await.unwrap();
            }
        };
        let writing = async { server.write_all(&[1; 2 << 20]).await };
        tokio::select! {
            () = reading => {}
            written = writing => panic!("{written:?}"),
        }
        assert!(server.read(&mut piece).await.unwrap() > 0, "it is heard again");
    }

    /// How often a socket is written to, and what it got.
    #[derive(Default)]
    struct Writes {
        count: usize,
        bytes: Vec<u8>,
    }

    struct Socket(Arc<parking_lot::Mutex<Writes>>);

    impl AsyncRead for Socket {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Socket {
        /// Takes 5,000 bytes at a time.
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let taken = &bytes[..bytes.len().min(5000)];
            let mut writes = self.0.lock();
            writes.count += 1;
            writes.bytes.extend_from_slice(taken);
            Poll::Ready(Ok(taken.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn answers_that_are_ready_together_leave_in_one_write() {
        let writes = Arc::new(parking_lot::Mutex::new(Writes::default()));
        let (_, mut server) = pair();
        server.io = Box::new(Socket(writes.clone()));
        for answer in 0..100_u8 {
            server.write_all(&[answer; 10]).await.unwrap();
        }
        assert_eq!(writes.lock().count, 0);
        server.flush().await.unwrap();
        assert_eq!(writes.lock().count, 1);
        assert!(writes.lock().bytes.chunks(10).eq((0..100_u8).map(|answer| vec![answer; 10])));
        assert_eq!(server.gathered.capacity(), 0, "an idle connection has no buffer");
    }

    #[tokio::test]
    async fn pieces_of_any_size_arrive_in_their_order_and_few_bytes_are_gathered() {
        let writes = Arc::new(parking_lot::Mutex::new(Writes::default()));
        let (_, mut server) = pair();
        server.io = Box::new(Socket(writes.clone()));
        let mut random = fastrand::Rng::with_seed(1);
        let mut sent = Vec::new();
        for _ in 0..500 {
            let most = [10, 1000, 30_000][random.usize(..3)];
            let bytes = random.usize(..most);
            let piece: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(bytes).collect();
            server.write_all(&piece).await.unwrap();
            sent.extend(piece);
            assert!(server.gathered.len() <= GATHERED_BYTES_MAX);
            if random.u8(..10) == 0 {
                server.flush().await.unwrap();
                assert!(writes.lock().bytes == sent);
            }
        }
        server.shutdown().await.unwrap();
        assert!(writes.lock().bytes == sent);
    }
}
