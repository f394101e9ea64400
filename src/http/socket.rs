//! WebSocket in front of the gateway, as etcd's proxy has it: each message of the client is a request of the call that the path names, in
//! JSON, and each line of the answer is a message to it.
//!
//! A client that cannot set headers, as pages in browsers, gives its token as a subprotocol: `Sec-WebSocket-Protocol: Bearer, TOKEN`.
//! Invariants: a page of another origin is refused before anything is called (`browser`), which no browser does by itself here; what is
//! held for a client is one message in each direction, charged to it; a client that answers no ping is gone.
//! Absent: every meaning of a request (`gateway`); tokens in cookies, which browsers send for any page.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server as handshake;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_util::sync::CancellationToken;

use super::Rules;
use super::gateway::Gateway;
use crate::env::{interval, timeout};
use crate::error::Error;
use crate::node::Client;
use crate::node::account::{Account, Taken};

/// What a connection takes beside its messages.
const SOCKET_BYTES: u64 = 16 << 10;
/// What a message to the client takes beside its bytes.
const MESSAGE_BYTES: u64 = 256;
const READ_BUFFER_BYTES: usize = 4 << 10;
/// For a client to take leave.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
const BEARER: &str = "Bearer";

/// Serves connections whose first request asks for WebSocket. Cloning shares all of it.
#[derive(Clone)]
pub struct Sockets {
    pub gateway: Gateway,
    pub rules: Arc<Rules>,
    pub account: Account,
    /// How often a client is asked whether it is there.
    pub ping_interval: Duration,
    /// How long an answer waits for room.
    pub answer_patience: Duration,
    /// When they all end.
    pub end: CancellationToken,
}

/// What a client asked for when it connected.
struct Asked {
    /// Below the version.
    path: String,
    token: Option<HeaderValue>,
}

impl Sockets {
    /// Serves a connection from its first byte on, until one of the two sides has no more to say.
    pub async fn serve<S: AsyncRead + AsyncWrite + Send + Unpin>(self, stream: S, client: Client) {
        let received = &self.account.received;
        let Ok(_place) = received.take(&client, SOCKET_BYTES) else { return };
        let arriving = Arc::new(received.nothing(&client));
        let counted = Counted { stream, taken: arriving.clone() };
        let bytes_max = Some(self.gateway.body_bytes_max());
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(bytes_max)
            .max_frame_size(bytes_max);
        let mut asked = None;
        #[allow(clippy::result_large_err, reason = "the library's type")]
        let admit = |request: &handshake::Request, mut response: handshake::Response| {
            let (admitted, protocol) = self.admit(request.uri(), request.headers())?;
            asked = Some(admitted);
            if protocol {
                let bearer = HeaderValue::from_static(BEARER);
                response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, bearer);
            }
            Ok(response)
        };
        let accepting = tokio_tungstenite::accept_hdr_async_with_config(counted, admit, Some(config));
        // Refused, or gone.
        let Ok(Ok(mut socket)) = timeout(self.answer_patience, accepting).await else { return };
        let Some(asked) = asked else { return };
        arriving.give_all();
        let code = tokio::select! {
            said = self.talk(&mut socket, asked, &client, &arriving) => match said {
                Ok(()) => CloseCode::Normal,
                Err(Gone) => return,
            },
            () = self.end.cancelled() => CloseCode::Away,
        };
        let leave = async {
            let _ = socket.close(Some(CloseFrame { code, reason: "".into() })).await;
            // What it has sent and nobody read would make the kernel drop what it has not read yet.
            while let Some(Ok(_)) = socket.next().await {}
            let _ = socket.get_mut().shutdown().await;
        };
        let _ = timeout(LEAVE_PATIENCE, leave).await;
    }

    /// What is asked for, and whether the token came as a subprotocol; or why the connection is refused.
    #[allow(clippy::result_large_err, reason = "the library's type")]
    fn admit(&self, uri: &Uri, headers: &HeaderMap) -> Result<(Asked, bool), handshake::ErrorResponse> {
        let refuse = |status: StatusCode, text: String| {
            let mut response = handshake::ErrorResponse::new(Some(text + "\n"));
            *response.status_mut() = status;
            response
        };
        self.rules.check_socket(uri, headers).map_err(|(status, text)| refuse(status, text))?;
        let path = uri.path();
        let path = path.strip_prefix("/v3/").or(path.strip_prefix("/v3beta/"));
        let Some(path) = path else { return Err(refuse(StatusCode::NOT_FOUND, "404 page not found".into())) };
        let protocols = headers.get(header::SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok());
        let token = protocols.and_then(token_of).map(|token| format!("{BEARER} {token}"));
        let token = token.and_then(|token| HeaderValue::try_from(token).ok());
        let is_bearer = protocols.is_some_and(|protocols| protocols.starts_with(BEARER));
        Ok((Asked { path: path.to_owned(), token }, is_bearer))
    }

    /// Passes messages to and fro until the call has ended.
    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        socket: &mut WebSocketStream<Counted<S>>,
        asked: Asked,
        client: &Client,
        arriving: &Taken,
    ) -> Result<(), Gone> {
        let (requests, body) = mpsc::channel(1);
        let request = request(&asked, client, body);
        let takes_many = self.gateway.takes_many(&asked.path);
        let mut requests = Some(requests);
        let (gateway, path) = (self.gateway.clone(), asked.path);
        let call = async move { gateway.call(&path, request).await.into_body().into_data_stream() };
        let mut answer = std::pin::pin!(call.flatten_stream());
        let mut out =
            Outgoing { taken: self.account.answers.nothing(client), patience: self.answer_patience, open: false };
        let mut tick = interval(self.ping_interval);
        tick.tick().await;
        let (mut heard, mut asked_all) = (true, false);
        loop {
            if asked_all {
                // The end of the body: a call that takes one message begins.
                requests = None;
            }
            tokio::select! {
                piece = answer.next() => match piece {
                    Some(Ok(piece)) => out.send(socket, piece).await?,
                    Some(Err(_)) => return Err(Gone),
                    None => return out.finish(socket).await,
                },
                message = hear(requests.as_ref(), socket) => {
                    heard = true;
                    match message? {
                        (Some(place), Message::Text(text)) => place.send(text.into()),
                        (Some(place), Message::Binary(bytes)) => place.send(bytes),
                        (_, Message::Close(_)) => return Ok(()),
                        (_, Message::Ping(_) | Message::Pong(_)) => continue,
                        _ => {}
                    }
                    arriving.give_all();
                    asked_all = !takes_many;
                }
                _ = tick.tick() => {
                    if !std::mem::replace(&mut heard, false) {
                        return Err(Gone);
                    }
                    socket.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)?;
                }
            }
        }
    }
}

/// The client is not there any more, or does what no client may.
struct Gone;

fn request(asked: &Asked, client: &Client, messages: mpsc::Receiver<Bytes>) -> Request<Body> {
    let mut request = Request::new(Body::from_stream(ReceiverStream::new(messages).map(Ok::<_, Infallible>)));
    *request.method_mut() = Method::POST;
    if let Some(token) = &asked.token {
        request.headers_mut().insert(header::AUTHORIZATION, token.clone());
    }
    request.extensions_mut().insert(client.clone());
    request
}

/// The next message, once there is a place for what it says; without anybody who takes it, there is none.
async fn hear<'r, S: AsyncRead + AsyncWrite + Unpin>(
    requests: Option<&'r mpsc::Sender<Bytes>>,
    socket: &mut WebSocketStream<S>,
) -> Result<(Option<mpsc::Permit<'r, Bytes>>, Message), Gone> {
    let place = match requests {
        Some(requests) => requests.reserve().await.ok(),
        None => None,
    };
    let message = socket.next().await.ok_or(Gone)?.map_err(|_| Gone)?;
    Ok((place, message))
}

/// The token of `Bearer, TOKEN`; not every browser puts the space there.
fn token_of(protocols: &str) -> Option<&str> {
    let (_, token) = protocols.split_once("Bearer,")?;
    Some(token.trim_matches(' '))
}

/// An answer on its way out: a line is a message, whose frames are what it comes in.
struct Outgoing {
    taken: Taken,
    patience: Duration,
    /// A message has begun and has not ended.
    open: bool,
}

impl Outgoing {
    async fn send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        socket: &mut WebSocketStream<S>,
        piece: Bytes,
    ) -> Result<(), Gone> {
        let is_whole = piece.ends_with(b"\n");
        let text = piece.slice(..piece.len() - usize::from(is_whole));
        let amount = text.len() as u64 + MESSAGE_BYTES;
        self.taken.grow_in_time(amount, self.patience).await.map_err(|_: Error| Gone)?;
        let sent = self.send_frame(socket, text, is_whole).await;
        self.taken.shrink(amount);
        sent
    }

    /// Ends the message that has no line end.
    async fn finish<S: AsyncRead + AsyncWrite + Unpin>(&mut self, socket: &mut WebSocketStream<S>) -> Result<(), Gone> {
        if self.open { self.send_frame(socket, Bytes::new(), true).await } else { Ok(()) }
    }

    async fn send_frame<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        socket: &mut WebSocketStream<S>,
        text: Bytes,
        is_last: bool,
    ) -> Result<(), Gone> {
        let kind = if std::mem::replace(&mut self.open, !is_last) { Data::Continue } else { Data::Text };
        let frame = Frame::message(text, OpCode::Data(kind), is_last);
        socket.send(Message::Frame(frame)).await.map_err(|_| Gone)
    }
}

/// A connection of which what arrives is charged, until it is taken.
struct Counted<S> {
    stream: S,
    taken: Arc<Taken>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let arrived = (into.filled().len() - before) as u64;
        Poll::Ready(self.taken.grow(arrived).map_err(io::Error::other))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_what_follows_bearer_with_and_without_a_space() {
        for (protocols, token) in
            [("Bearer, abc.d", Some("abc.d")), ("Bearer,abc", Some("abc")), ("chat", None), ("Bearer", None)]
        {
            assert_eq!(token_of(protocols), token, "{protocols}");
        }
    }
}
