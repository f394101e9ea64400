//! One accepted connection: its place among the allowed ones, the filter over its bytes, and how long it may take to say what
//! it is.
//!
//! Invariants: a connection that has not sent HTTP/2's preface, or the whole head of an HTTP/1 request, in time is closed, and the
//! handshake of TLS is part of that: those who dribble hold no place. At most `GATHERED_BYTES_MAX` wait here to be written. Who does not take what is written is read no
//! further than `READ_AHEAD_BYTES`: else it could go on asking, and what it is answered would wait here. A host has a fair share of the
//! places (`node::account`). Where several hosts send much they are read by turns (`rounds`). A client may cancel as many calls at once as it likes, and not go on with that (`Resets`). A connection whose
//! first request asks for WebSocket is handed on, from its first byte: the HTTP library's server cannot let go of one.
//! Absent: what comes after that (HTTP/2's keep-alive, the time of a request in `budget`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::coop;
use tonic::transport::server::Connected;

use super::authority::Filter;
use super::rounds::{GREETING_UNITS, Reader, Rounds, others_first};
use crate::env::net::{Accepted, Incoming};
use crate::env::{Instant, Sleep, sleep};
use crate::metrics::metrics;
use crate::node::Client;
use crate::node::account::{self, Account, Host, Pool, Taken};
use crate::secure::{self, Io, Presented};

/// Pieces below this are gathered into one write.
const SMALL_BYTES: usize = 4 << 10;
const GATHERED_BYTES_MAX: usize = 16 << 10;
/// What is read while the socket takes nothing. A client reads whatever it sends; one that answers pings must be heard.
const READ_AHEAD_BYTES: usize = 64 << 10;
/// The head of a first request in HTTP/1 is looked at if it has at most so many bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// So many connections are accepted before everything else that is ready has its turn.
const AT_ONCE_MAX: u32 = 8;
/// What a connection takes by itself, in this process.
const CONNECTION_BYTES: u64 = 24 << 10;

/// Who connects.
#[derive(Clone)]
pub(super) enum Kind {
    /// `patience`: time to say what it speaks.
    Client {
        patience: Duration,
        account: Account,
        /// `None`: plain text.
        tls: Option<Arc<secure::Port>>,
        /// Takes connections that are to be WebSockets.
        sockets: mpsc::Sender<Connection>,
        rounds: Rounds,
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

/// Streams that a client resets before the server has taken their requests.
///
/// The library keeps each in memory until the server has taken its request, and gives up on a connection with too many of those. It takes
/// requests only when nothing more is to be read, so reading rests after some: then no client comes near that bound, whatever it
/// cancels. Who resets more than anybody cancels is cut off.
struct Resets {
    /// How many more may come now.
    left: usize,
    /// When that was.
    at: Instant,
    since_rest: usize,
}

impl Resets {
    /// At once, and in each second after.
    const AT_ONCE_MAX: usize = 4_000;
    const A_SECOND_MAX: usize = 200;
    /// Then the requests before are taken first.
    const UNTIL_REST: usize = 100;

    fn new() -> Self {
        Self { left: Self::AT_ONCE_MAX, at: Instant::now(), since_rest: 0 }
    }

    /// Fails if these are too many.
    fn count(&mut self, resets: usize) -> io::Result<()> {
        if resets == 0 {
            return Ok(());
        }
        let now = Instant::now();
        let back = (now - self.at).as_millis().min(60_000) as usize * Self::A_SECOND_MAX / 1000;
        if back > 0 {
            (self.left, self.at) = ((self.left + back).min(Self::AT_ONCE_MAX), now);
        }
        self.since_rest += resets;
        self.left =
            self.left.checked_sub(resets).ok_or_else(|| io::Error::other("the client resets too many streams"))?;
        Ok(())
    }

    /// True once after each so many: nothing more is to be read in this turn of the task.
    fn rest(&mut self, cx: &mut Context<'_>) -> bool {
        if self.since_rest < Self::UNTIL_REST {
            return false;
        }
        self.since_rest = 0;
        // Sockets say that nothing is there when a task's budget is used up, which it is after fewer steps than these.
        for _ in 0..=u8::MAX {
            match coop::poll_proceed(cx) {
                Poll::Ready(proceed) => proceed.made_progress(),
                Poll::Pending => break,
            }
        }
        cx.waker().wake_by_ref();
        true
    }
}

/// An accepted connection and its place among the allowed ones.
pub(super) struct Connection {
    io: Io,
    greeting: Greeting,
    /// Of a first request in HTTP/1: its head, as far as it is there, and who takes it if it asks for a WebSocket.
    head: Vec<u8>,
    sockets: Option<mpsc::Sender<Connection>>,
    resets: Resets,
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
    /// Its turns to be read, if it has to wait for them.
    reader: Option<Reader>,
    _place: Vec<Taken>,
}

impl Connection {
    /// `place`: what was taken for it, where that is counted.
    pub(super) fn new(io: Io, kind: &Kind, client: Client, place: Vec<Taken>) -> Self {
        let (sockets, reader) = match kind {
            Kind::Client { sockets, rounds, .. } => (Some(sockets.clone()), Some(rounds.reader(client.host_number()))),
            Kind::Peer { .. } => (None, None),
        };
        Self {
            io,
            greeting: Greeting::begin(kind),
            head: Vec::new(),
            sockets,
            resets: Resets::new(),
            counted: matches!(kind, Kind::Client { .. }),
            filter: Filter::default(),
            ready: Bytes::new(),
            gathered: BytesMut::new(),
            lingered: false,
            is_blocked: false,
            read_ahead: 0,
            client,
            reader,
            _place: place,
        }
    }

    /// Whose it is.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Looks for who asks for a WebSocket. `None`: the head is not all there; else what goes on to the HTTP library, which is nothing when
    /// the connection was handed on.
    fn look_at_head(&mut self, arrived: &[u8]) -> Option<Bytes> {
        self.head.extend_from_slice(arrived);
        let is_whole = matches!(self.greeting, Greeting::Done);
        if !is_whole && self.head.len() <= HEAD_BYTES_MAX {
            return None;
        }
        let head = Bytes::from(std::mem::take(&mut self.head));
        match self.sockets.take() {
            Some(sockets) if is_whole && asks_for_socket(&head) => {
                let handed_on = Self {
                    io: std::mem::replace(&mut self.io, Io::ended()),
                    greeting: Greeting::Done,
                    head: Vec::new(),
                    sockets: None,
                    resets: Resets::new(),
                    counted: self.counted,
                    filter: std::mem::take(&mut self.filter),
                    ready: head,
                    gathered: BytesMut::new(),
                    lingered: false,
                    is_blocked: false,
                    read_ahead: 0,
                    client: self.client.clone(),
                    reader: self.reader.take(),
                    _place: std::mem::take(&mut self._place),
                };
                // Where too many wait it is closed.
                let _ = sockets.try_send(handed_on);
                Some(Bytes::new())
            }
            _ => Some(head),
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
            if this.resets.rest(cx) {
                this.filter.all_taken();
                return Poll::Pending;
            }
            if this.reader.as_mut().is_some_and(|reader| reader.poll_turn(cx).is_pending()) {
                this.filter.all_taken();
                this.greeting.poll(cx)?;
                return Poll::Pending;
            }
            let begin = into.filled().len();
            let of_greeting = if matches!(this.greeting, Greeting::Done) { 0 } else { GREETING_UNITS };
            let Poll::Ready(read) = Pin::new(&mut this.io).poll_read(cx, into) else {
                this.filter.all_taken();
                this.reader.iter_mut().for_each(|reader| reader.pass(of_greeting));
                this.greeting.poll(cx)?;
                return Poll::Pending;
            };
            read?;
            let arrived = &into.filled()[begin..];
            if this.counted {
                metrics().client_received_bytes.inc_by(arrived.len() as u64);
            }
            if arrived.is_empty() && this.head.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if arrived.is_empty() {
                // It ended inside of a head; the library says what it thinks of that.
                (this.sockets, this.ready) = (None, Bytes::from(std::mem::take(&mut this.head)));
                continue;
            }
            this.read_ahead += arrived.len();
            let passed = this.filter.pass(arrived);
            if let Some(reader) = &mut this.reader {
                reader.spend(of_greeting + this.filter.take_frames(), arrived.len());
            }
            this.greeting.take(arrived, this.filter.is_http2());
            this.resets.count(this.filter.take_resets())?;
            if this.sockets.is_some() && this.filter.is_http2() != Some(true) {
                let passed = passed.into_owned();
                into.set_filled(begin);
                if let Some(ready) = this.look_at_head(&passed) {
                    this.ready = ready;
                }
                continue;
            }
            match passed {
                Cow::Borrowed(same) if same.len() == arrived.len() => return Poll::Ready(Ok(())),
                other => this.ready = Bytes::from(other.into_owned()),
            }
            into.set_filled(begin);
        }
    }
}

/// Whether the head of a request asks for a WebSocket.
fn asks_for_socket(head: &[u8]) -> bool {
    head.split(|byte| *byte == b'\n').any(|line| {
        let line = line.to_ascii_lowercase();
        let value = line.strip_prefix(b"upgrade:").map(<[u8]>::trim_ascii);
        value == Some(b"websocket")
    })
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
        self.known.entry(address).or_insert_with(|| Host::at(address)).clone()
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
    let mut accepted_at_once = 0;
    let incoming = incoming.then(move |accepted| {
        accepted_at_once = (accepted_at_once + 1) % AT_ONCE_MAX;
        async move {
            // Setting one up takes a hundred microseconds, and a thousand may come together.
            if accepted_at_once == 0 {
                others_first().await;
            }
            accepted
        }
    });
    incoming.filter_map(move |accepted| {
        let connection = match accepted {
            Ok(Accepted { stream, from }) => {
                let host = hosts.get(from);
                let tls = if let Kind::Client { tls, .. } = &kind { tls.as_ref() } else { None };
                let place = places.take(&host.as_client(), 1).and_then(|place| {
                    let mut taken = vec![place];
                    if let Kind::Client { account, .. } = &kind {
                        let bytes = CONNECTION_BYTES + tls.map_or(0, |_| Io::TLS_BYTES);
                        taken.push(account.received.take(&host.as_client(), bytes)?);
                    }
                    Ok(taken)
                });
                match place {
                    Ok(place) => {
                        let presented = Presented::default();
                        let io = Io::accepted(stream, tls, &presented, from);
                        Some(Ok(Connection::new(io, &kind, Client::presenting(Some(&host), presented), place)))
                    }
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
        let (client, server, _) = pair_and_sockets();
        (client, server)
    }

    fn pair_and_sockets() -> (DuplexStream, Connection, mpsc::Receiver<Connection>) {
        let (client, io) = tokio::io::duplex(4096);
        let account = Account::new(1 << 20, 1 << 20, 1);
        let (sockets, handed_on) = mpsc::channel(1);
        let rounds = Rounds::new(&crate::raft::tests::sim());
        let kind = Kind::Client { patience: PATIENCE, account, tls: None, sockets, rounds };
        (client, Connection::new(Io::Plain(Box::new(io)), &kind, Client::new(None), Vec::new()), handed_on)
    }

    #[tokio::test]
    async fn who_asks_for_a_socket_is_handed_on_from_the_first_byte_and_others_stay() {
        let head = b"GET /v3/watch HTTP/1.1\r\nHost: x\r\nUPGRADE:  WebSocket\r\n\r\nmore";
        let other = b"POST /v3/watch HTTP/1.1\r\nX-Upgrade: websocket\r\nHost: x\r\n\r\n";
        for size in [1, 7, 200] {
            let (mut client, mut server, mut sockets) = pair_and_sockets();
            let sending = async {
                for piece in head.chunks(size) {
                    client.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let mut rest = Vec::new();
            let (_, ended) = tokio::join!(sending, server.read_to_end(&mut rest));
            assert_eq!((ended.unwrap(), rest), (0, vec![]), "the library has seen nothing, and the end");
            let mut handed_on = sockets.try_recv().unwrap();
            let mut seen = vec![0; head.len()];
            handed_on.read_exact(&mut seen).await.unwrap();
            assert_eq!(seen, head);
            handed_on.write_all(b"answer").await.unwrap();
            handed_on.flush().await.unwrap();
            let mut answer = [0; 6];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"answer");

            let (mut client, mut server, mut sockets) = pair_and_sockets();
            for piece in other.chunks(size) {
                client.write_all(piece).await.unwrap();
            }
            let mut seen = vec![0; other.len()];
            server.read_exact(&mut seen).await.unwrap();
            assert_eq!(seen, other);
            assert!(sockets.try_recv().is_err());
        }
    }

    #[tokio::test]
    async fn head_that_does_not_end_is_passed_on() {
        for end in [HEAD_BYTES_MAX + 1, 50] {
            let (mut client, mut server) = pair();
            let sending = async {
                client.write_all(&vec![b'x'; end]).await.unwrap();
                client.shutdown().await.unwrap();
            };
            let mut seen = Vec::new();
            let (_, read) = tokio::join!(sending, server.read_to_end(&mut seen));
            assert_eq!((read.unwrap(), seen), (end, vec![b'x'; end]));
        }
    }

    /// An HTTP/2 client that resets so many streams at once.
    fn resets(count: usize) -> Vec<u8> {
        let reset = |n: u32| [&[0, 0, 4, 3, 0][..], &(2 * n + 1).to_be_bytes(), &8_u32.to_be_bytes()].concat();
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &(0..count as u32).flat_map(reset).collect::<Vec<_>>()].concat()
    }

    #[tokio::test]
    async fn reading_rests_after_some_resets_and_goes_on() {
        let (mut client, io) = tokio::io::duplex(1 << 20);
        let (_, mut server) = pair();
        server.io = Io::Plain(Box::new(io));
        let sent = resets(3000);
        client.write_all(&sent).await.unwrap();
        let (mut seen, mut turns, mut piece) = (0, 0, [0; 4096]);
        while seen < sent.len() {
            let read = std::future::poll_fn(|cx| {
                let mut now = 0;
                // As the library does: whatever is there, in one turn.
                loop {
                    let mut into = ReadBuf::new(&mut piece);
                    match Pin::new(&mut server).poll_read(cx, &mut into) {
                        Poll::Ready(read) => {
                            read.unwrap();
                            now += into.filled().len();
                        }
                        Poll::Pending => return Poll::Ready(now),
                    }
                }
            });
            seen += read.await;
            turns += 1;
            tokio::task::yield_now().await;
        }
        let most = Resets::UNTIL_REST * 13 + piece.len();
        assert!(turns > sent.len() / most, "{turns} turns");
    }

    #[tokio::test(start_paused = true)]
    async fn who_resets_more_than_anybody_cancels_is_cut_off() {
        let mut counted = Resets::new();
        for _ in 0..10 {
            counted.count(Resets::AT_ONCE_MAX / 10).unwrap();
        }
        assert!(counted.count(1).is_err());
        sleep(Duration::from_secs(1)).await;
        counted.count(Resets::A_SECOND_MAX).unwrap();
        assert!(counted.count(1).is_err());
        sleep(Duration::from_secs(3600)).await;
        counted.count(Resets::AT_ONCE_MAX).unwrap();
        assert!(counted.count(1).is_err(), "what was not used does not add up");
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
        server.io = Io::Plain(Box::new(Socket(writes.clone())));
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
        server.io = Io::Plain(Box::new(Socket(writes.clone())));
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
