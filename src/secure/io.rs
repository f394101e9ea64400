//! The bytes of an accepted connection: as they are, or TLS from the first one on.
//!
//! The handshake goes on in whatever task reads the connection, so nobody else waits for it; it must be over when the connection must have
//! said what it wants (`server/connection`). Invariant: no byte of a connection of TLS passes before its handshake is over, and what the
//! other end has shown is known by then.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};

use super::{Certificate, Port, Presented};
use crate::env::net::Stream;

/// Plain text that waits in a connection of TLS to be encrypted and written; beyond it the connection takes nothing.
const WRITE_BUFFER_BYTES: usize = 32 << 10;

/// A first byte that begins a handshake of TLS; HTTP begins otherwise.
const HANDSHAKE: u8 = 0x16;

/// See the module's head.
pub enum Io {
    Plain(Box<dyn Stream>),
    /// Of a port that hears plain text beside TLS, before its first byte.
    Unknown(Box<Unknown>),
    /// Plain text on such a port, which ends when it is not heard any more.
    Tolerated(Box<dyn Stream>, Arc<Port>),
    Handshake(Box<Handshake>),
    Tls(Box<TlsStream<Box<dyn Stream>>>),
}

pub struct Handshake {
    accepting: Accept<Box<dyn Stream>>,
    port: Arc<Port>,
    presented: Presented,
    from: IpAddr,
}

pub struct Unknown {
    stream: Box<dyn Stream>,
    port: Arc<Port>,
    presented: Presented,
    from: IpAddr,
}

/// A stream of which the first byte was read already.
struct Begun {
    first: Option<u8>,
    rest: Box<dyn Stream>,
}

impl AsyncRead for Begun {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if into.remaining() > 0
            && let Some(first) = self.first.take()
        {
            into.put_slice(&[first]);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.rest).poll_read(cx, into)
    }
}

impl AsyncWrite for Begun {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.rest).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.rest).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.rest.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.rest).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.rest).poll_shutdown(cx)
    }
}

impl Io {
    /// What a connection of TLS takes beside its socket, in bytes: what is decrypted, and what is encrypted.
    pub const TLS_BYTES: u64 = WRITE_BUFFER_BYTES as u64 + (16 << 10);

    /// A connection that was accepted; `port` is there if it speaks TLS.
    pub fn accepted(stream: Box<dyn Stream>, port: Option<&Arc<Port>>, presented: &Presented, from: IpAddr) -> Self {
        let Some(port) = port else { return Self::Plain(stream) };
        let (port, presented) = (port.clone(), presented.clone());
        if port.hears_plain() {
            return Self::Unknown(Box::new(Unknown { stream, port, presented, from }));
        }
        Self::secured(stream, port, presented, from)
    }

    fn secured(stream: Box<dyn Stream>, port: Arc<Port>, presented: Presented, from: IpAddr) -> Self {
        let acceptor = TlsAcceptor::from(port.server());
        let accepting = acceptor.accept_with(stream, |session| session.set_buffer_limit(Some(WRITE_BUFFER_BYTES)));
        Self::Handshake(Box::new(Handshake { accepting, port, presented, from }))
    }

    /// A connection that has ended.
    pub fn ended() -> Self {
        Self::Plain(Box::new(tokio::io::empty()))
    }

    /// Goes on with what comes before the first byte that is passed.
    fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let next = match self {
            Self::Unknown(unknown) => ready!(unknown.poll_kind(cx)),
            Self::Handshake(handshake) => ready!(handshake.poll(cx)),
            Self::Plain(_) | Self::Tolerated(..) | Self::Tls(_) => return Poll::Ready(Ok(())),
        };
        let (now, result) = match next {
            Ok(now) => (now, Ok(())),
            Err(error) => (Self::ended(), Err(error)),
        };
        *self = now;
        Poll::Ready(result)
    }
}

impl Unknown {
    /// What the first byte makes of the connection.
    fn poll_kind(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Io>> {
        let mut first = [0];
        let mut into = ReadBuf::new(&mut first);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut into))?;
        let first = into.filled().first().copied();
        let rest = std::mem::replace(&mut self.stream, Box::new(tokio::io::empty()));
        let begun: Box<dyn Stream> = Box::new(Begun { first, rest });
        let port = self.port.clone();
        Poll::Ready(Ok(match first {
            Some(HANDSHAKE) => Io::secured(begun, port, self.presented.clone(), self.from),
            _ => Io::Tolerated(begun, port),
        }))
    }
}

impl Handshake {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Io>> {
        let done = match ready!(Pin::new(&mut self.accepting).poll(cx)) {
            Ok(stream) => read_certificate(&stream, &self.presented).map(|()| stream),
            Err(error) => Err(error),
        };
        if let Err(error) = &done {
            self.port.handshake_failed(self.from, error);
        }
        Poll::Ready(done.map(|stream| Io::Tls(Box::new(stream))))
    }
}

/// Ends a plain connection that is not heard any more.
fn check_tolerated(port: &Port) -> io::Result<()> {
    if port.hears_plain() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::ConnectionAborted, "members without TLS are not heard any more"))
}

fn read_certificate(stream: &TlsStream<Box<dyn Stream>>, presented: &Presented) -> io::Result<()> {
    let (_, session) = stream.get_ref();
    if let Some(own) = session.peer_certificates().and_then(<[_]>::first) {
        presented.set(Certificate::read(own).map_err(io::Error::other)?);
    }
    Ok(())
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut *self {
                Self::Plain(stream) => return Pin::new(stream).poll_read(cx, into),
                Self::Tolerated(stream, port) => {
                    check_tolerated(port)?;
                    return Pin::new(stream).poll_read(cx, into);
                }
                Self::Tls(stream) => return Pin::new(stream).poll_read(cx, into),
                Self::Unknown(_) | Self::Handshake(_) => ready!(self.poll_begin(cx))?,
            }
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match &mut *self {
                Self::Plain(stream) | Self::Tolerated(stream, _) => return Pin::new(stream).poll_write(cx, bytes),
                Self::Tls(stream) => return Pin::new(stream).poll_write(cx, bytes),
                Self::Unknown(_) | Self::Handshake(_) => ready!(self.poll_begin(cx))?,
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match &mut *self {
                Self::Plain(stream) | Self::Tolerated(stream, _) => {
                    return Pin::new(stream).poll_write_vectored(cx, pieces);
                }
                Self::Tls(stream) => return Pin::new(stream).poll_write_vectored(cx, pieces),
                Self::Unknown(_) | Self::Handshake(_) => ready!(self.poll_begin(cx))?,
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) | Self::Tolerated(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            // Nothing was written yet.
            Self::Unknown(_) | Self::Handshake(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) | Self::Tolerated(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unknown(_) | Self::Handshake(_) => {
                *self = Self::ended();
                Poll::Ready(Ok(()))
            }
        }
    }
}
