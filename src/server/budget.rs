//! What clients' requests and answers take in memory while they are on their way, charged to the account (`node::account`).
//!
//! A request is charged from its head on: what a stream takes, its headers, and its body as it arrives, and what a gzip'd message grows to. That is given back when its
//! answer has left, of a stream of requests when the next one begins. What does not fit fails with `too many requests`, and a message
//! that is not whole in time with `request timed out`, so that those who send a part and no more cannot keep the others out.
//! An answer is charged piece by piece, and a piece is given back when the socket has taken it: the charge travels with the bytes,
//! through all that waits below. A piece that finds no room waits, and while it does its request takes as much; a large answer is only now
//! written, piece by piece (`api::Large`).
//! Absent: limits of one request (`api`) and of one connection (HTTP/2's windows, `connection`).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tower::{Layer, Service};

use super::inflate::Inflate;
use crate::api::{Large, Making, Written};
use crate::env::Sleep;
use crate::error::Error;
use crate::node::Client;
use crate::node::account::{Account, Taken};
use crate::pb::codec::PREFIX_BYTES;
use crate::pb::pieces::LargeAnswer;

/// What a request takes beside its headers, until its answer has left; a message of `SMALL_BYTES` each way is in it.
const STREAM_BYTES: u64 = 4 << 10;
/// What a header takes beside its name and value.
const HEADER_BYTES: u64 = 64;
/// A message that arrives whole, and the first piece of an answer, go with what the stream takes if they are not larger.
const SMALL_BYTES: usize = 1 << 10;
/// What a piece takes beside its bytes.
const PIECE_FRAME_BYTES: u64 = 256;

/// The layer around everything on the client port. Cloning shares all of it.
#[derive(Clone)]
pub(super) struct Budget(Arc<Rules>);

struct Rules {
    account: Account,
    receive_patience: Duration,
    answer_patience: Duration,
    message_bytes_max: usize,
}

/// A request from its head to the last piece of its answer. Shared by whatever of both is still there, so that nothing else needs
/// to be counted for each: a request on keys costs as much time as a few dozen such counts.
pub(super) struct Exchange {
    budget: Budget,
    /// What the request takes; grows with what arrives.
    taken: Taken,
}

impl Budget {
    /// A gRPC message has at most `message_bytes_max` bytes, and may take `receive_patience` to arrive; a piece of an answer may wait for
    /// room for `answer_patience`.
    pub(super) fn new(
        account: Account,
        receive_patience: Duration,
        answer_patience: Duration,
        message_bytes_max: usize,
    ) -> Self {
        Self(Arc::new(Rules { account, receive_patience, answer_patience, message_bytes_max }))
    }

    fn begin(&self, client: &Client, headers: &HeaderMap) -> Result<Arc<Exchange>, Error> {
        let of_header = |(name, value): (&header::HeaderName, &HeaderValue)| {
            (name.as_str().len() + value.len()) as u64 + HEADER_BYTES
        };
        let head: u64 = headers.iter().map(of_header).sum();
        let taken = self.0.account.received.take(client, STREAM_BYTES + head)?;
        Ok(Arc::new(Exchange { budget: self.clone(), taken }))
    }
}

impl<S> Layer<S> for Budget {
    type Service = Budgeted<S>;

    fn layer(&self, inner: S) -> Budgeted<S> {
        Budgeted { budget: self.clone(), inner }
    }
}

#[derive(Clone)]
pub(super) struct Budgeted<S> {
    budget: Budget,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Budgeted<S>
where
    S: Service<Request<Receiving<B>>, Response = Response<R>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = Response<Sending<R>>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let kind = request.headers().get(header::CONTENT_TYPE);
        let is_grpc = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        let begun = match request.extensions().get::<Client>() {
            Some(client) => self.budget.begin(client, request.headers()),
            None => self.budget.begin(&Client::default(), request.headers()),
        };
        match begun {
            Ok(exchange) => {
                let bytes_max = self.budget.0.message_bytes_max;
                let inflate = is_grpc.then(|| Inflate::of(request.headers_mut(), bytes_max)).flatten();
                let held = exchange.clone();
                let answer = self.inner.call(request.map(|body| Receiving::new(body, held, is_grpc, inflate)));
                Answering::Served { answer, exchange: Some(exchange) }
            }
            Err(error) => Answering::Refused(Some(Box::new((error, is_grpc)))),
        }
    }
}

/// An answer that is being made.
pub(super) enum Answering<F> {
    Served {
        answer: F,
        exchange: Option<Arc<Exchange>>,
    },
    /// Why, and whether the request is gRPC's.
    Refused(Option<Box<(Error, bool)>>),
}

impl<F, R> Future for Answering<F>
where
    F: Future<Output = Result<Response<R>, Infallible>> + Unpin,
{
    type Output = Result<Response<Sending<R>>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Served { answer, exchange } => {
                let mut response = ready!(Pin::new(answer).poll(cx))?;
                let large = response.extensions_mut().remove::<Large>();
                let exchange = exchange.take();
                Poll::Ready(Ok(response.map(|body| Sending::new(Some(body), large, exchange))))
            }
            Self::Refused(why) => {
                let mut response = Response::new(Sending::new(None, None, None));
                match why.take().map(|why| *why) {
                    Some((error, true)) => {
                        let kind = HeaderValue::from_static("application/grpc");
                        response.headers_mut().insert(header::CONTENT_TYPE, kind);
                        // A text of ours is a valid header.
                        let _ = Status::from(error).add_header(response.headers_mut());
                    }
                    _ => *response.status_mut() = StatusCode::TOO_MANY_REQUESTS,
                }
                Poll::Ready(Ok(response))
            }
        }
    }
}

/// How much of a gRPC body's present message is there.
struct Messages {
    bytes_max: usize,
    /// The length of a message that is longer.
    too_large: Option<usize>,
    prefix: [u8; PREFIX_BYTES],
    prefix_filled: usize,
    /// Bytes of the content that are missing.
    missing: usize,
}

impl Messages {
    fn new(bytes_max: usize) -> Self {
        Self { bytes_max, too_large: None, prefix: [0; PREFIX_BYTES], prefix_filled: 0, missing: 0 }
    }

    /// Takes what has arrived; returns how many bytes of it belong to a message that is not whole yet, and whether one has
    /// ended before them.
    fn take(&mut self, mut data: &[u8]) -> (usize, bool) {
        let (mut unfinished, mut ended) = (0, false);
        while !data.is_empty() {
            if self.prefix_filled < PREFIX_BYTES {
                let step = data.len().min(PREFIX_BYTES - self.prefix_filled);
                self.prefix[self.prefix_filled..self.prefix_filled + step].copy_from_slice(&data[..step]);
                self.prefix_filled += step;
                unfinished += step;
                data = &data[step..];
                if self.prefix_filled < PREFIX_BYTES {
                    break;
                }
                let [_, length @ ..] = self.prefix;
                self.missing = u32::from_be_bytes(length) as usize;
                if self.missing > self.bytes_max {
                    self.too_large = Some(self.missing);
                }
            }
            let step = data.len().min(self.missing);
            self.missing -= step;
            unfinished += step;
            data = &data[step..];
            if self.missing == 0 {
                (self.prefix_filled, unfinished, ended) = (0, 0, true);
            }
        }
        (unfinished, ended)
    }
}

/// A request's body on its way in. Nearly all are one message that arrives at once: what others need is apart, so that the futures
/// around, each of which holds it, are small.
pub(super) struct Receiving<B> {
    body: B,
    exchange: Arc<Exchange>,
    is_grpc: bool,
    /// Taken for the newest message that is whole.
    whole: u64,
    parts: Option<Box<Parts>>,
}

/// A body that comes in parts.
struct Parts {
    /// `None`: the whole body is one message.
    messages: Option<Messages>,
    /// Its messages may be gzip'd.
    inflate: Option<Inflate>,
    /// Taken for the message that is arriving.
    arriving: u64,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<B> Receiving<B> {
    fn new(body: B, exchange: Arc<Exchange>, is_grpc: bool, inflate: Option<Inflate>) -> Self {
        let mut receiving = Self { body, exchange, is_grpc, whole: 0, parts: None };
        if inflate.is_some() {
            receiving.parts().inflate = inflate;
        }
        receiving
    }

    fn bytes_max(&self) -> usize {
        self.exchange.budget.0.message_bytes_max
    }

    fn parts(&mut self) -> &mut Parts {
        let messages = self.is_grpc.then(|| Messages::new(self.bytes_max()));
        self.parts.get_or_insert_with(|| Box::new(Parts { messages, inflate: None, arriving: 0, deadline: None }))
    }

    fn count(&mut self, data: &[u8]) -> Result<(), Error> {
        // Most clients say the end of a request by itself.
        if data.is_empty() {
            return Ok(());
        }
        let bytes_max = self.bytes_max();
        if self.parts.is_none() && self.is_grpc && is_whole_message(data, bytes_max) {
            // Who takes a stream's next message is done with the one before.
            if self.whole > 0 {
                self.exchange.taken.shrink(std::mem::take(&mut self.whole));
            }
            if data.len() > SMALL_BYTES {
                self.exchange.taken.grow(data.len() as u64)?;
                self.whole = data.len() as u64;
            }
            return Ok(());
        }
        let parts = self.parts();
        let (unfinished, ended) = match &mut parts.messages {
            Some(messages) => messages.take(data),
            None => (data.len(), false),
        };
        if let Some(Messages { too_large: Some(bytes), .. }) = parts.messages {
            return Err(Error::message_too_large(bytes, bytes_max));
        }
        let is_next = parts.arriving == 0 || ended;
        let arrived = if ended {
            parts.deadline = None;
            std::mem::take(&mut parts.arriving) + (data.len() - unfinished) as u64
        } else {
            0
        };
        parts.arriving += unfinished as u64;
        if is_next {
            self.exchange.taken.shrink(std::mem::replace(&mut self.whole, arrived));
        }
        self.exchange.taken.grow(data.len() as u64)
    }

    /// What of the body may go on; nothing while a gzip'd message is not whole.
    fn take(&mut self, data: Bytes) -> Result<Bytes, Error> {
        self.count(&data)?;
        let Some(inflate) = self.parts.as_mut().and_then(|parts| parts.inflate.as_mut()) else { return Ok(data) };
        let (messages, more) = inflate.pass(&data, &self.exchange.taken)?;
        self.whole += more;
        Ok(messages)
    }

    /// Resolves when what has begun to arrive is late.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let patience = self.exchange.budget.0.receive_patience;
        match self.parts.as_mut().filter(|parts| parts.arriving > 0) {
            Some(parts) => {
                parts.deadline.get_or_insert_with(|| Box::pin(crate::env::sleep(patience))).as_mut().poll(cx)
            }
            None => Poll::Pending,
        }
    }
}

impl<B> Body for Receiving<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        loop {
            return match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data().map(|data| this.take(data)) {
                    // A gzip'd message that is not whole.
                    Ok(Ok(data)) if data.is_empty() && this.parts.is_some() => continue,
                    Ok(data) => Poll::Ready(Some(data.map(Frame::data).map_err(|error| Status::from(error).into()))),
                    Err(trailers) => Poll::Ready(Some(Ok(trailers))),
                },
                Poll::Ready(end) => {
                    let parts = this.parts.take();
                    let inflate = parts.and_then(|parts| parts.inflate);
                    if end.is_none() && inflate.is_some_and(|inflate| inflate.is_cut_off()) {
                        // As the library says it of a message that comes plain.
                        return Poll::Ready(Some(Err(Status::internal("Unexpected EOF decoding stream.").into())));
                    }
                    Poll::Ready(end.map(|failed| failed.map_err(Into::into)))
                }
                Poll::Pending => this.poll_late(cx).map(|()| Some(Err(Status::from(Error::Timeout).into()))),
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// True for one message that may be taken and nothing else.
fn is_whole_message(data: &[u8], bytes_max: usize) -> bool {
    data.first_chunk::<PREFIX_BYTES>().is_some_and(|[_, length @ ..]| {
        let bytes = u32::from_be_bytes(*length) as usize;
        bytes <= bytes_max && data.len() == PREFIX_BYTES + bytes
    })
}

/// Bytes on their way out, and what keeps them counted. Dropped when the socket has taken them.
struct Charged<C> {
    bytes: Bytes,
    _count: C,
}

impl<C> AsRef<[u8]> for Charged<C> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// So much of what an answer has taken.
struct Part {
    taken: Arc<Taken>,
    amount: u64,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.taken.shrink(self.amount);
    }
}

fn charged<C: Send + 'static>(bytes: Bytes, count: C) -> Frame<Bytes> {
    Frame::data(Bytes::from_owner(Charged { bytes, _count: count }))
}

/// What an exchange takes for a piece that waits.
struct Held {
    exchange: Arc<Exchange>,
    amount: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.exchange.taken.shrink(self.amount);
    }
}

/// A piece that waits for room.
struct Waiting {
    piece: Bytes,
    held: Held,
    room: BoxFuture<'static, Result<(), Error>>,
}

/// An answer's body on its way out.
pub(super) struct Sending<B> {
    /// `None`: there is nothing to say beyond the head.
    body: Option<B>,
    /// To be written in the place of the body's own data.
    large: Option<Box<Written>>,
    is_large: bool,
    /// `None`: nothing of it is counted. The first piece takes it along.
    exchange: Option<Arc<Exchange>>,
    /// What all other pieces are charged to: one for an answer, so that a client's only answer goes on beside others' many.
    pieces: Option<Arc<Taken>>,
    has_begun: bool,
    waiting: Option<Box<Waiting>>,
}

impl<B> Sending<B> {
    fn new(body: Option<B>, large: Option<Large>, exchange: Option<Arc<Exchange>>) -> Self {
        let is_large = large.is_some();
        let pieces = large.as_ref().map(Large::taken);
        let large = large.map(|large| Box::new(large.written(Making::Here, LargeAnswer::in_grpc)));
        Self { body, large, is_large, exchange, pieces, has_begun: false, waiting: None }
    }

    /// The piece as a frame, if there is room for it; else it waits, if there is room for that.
    fn charge(&mut self, piece: Bytes) -> Result<Option<Frame<Bytes>>, Error> {
        let Some(exchange) = &self.exchange else { return Ok(Some(Frame::data(piece))) };
        if !std::mem::replace(&mut self.has_begun, true) && piece.len() <= SMALL_BYTES {
            return Ok(Some(charged(piece, exchange.clone())));
        }
        let Rules { account, answer_patience, .. } = &*exchange.budget.0;
        let nothing = || Arc::new(account.answers.nothing(exchange.taken.client()));
        let taken = self.pieces.get_or_insert_with(nothing).clone();
        let amount = piece.len() as u64 + PIECE_FRAME_BYTES;
        if taken.grow(amount).is_ok() {
            return Ok(Some(charged(piece, Part { taken, amount })));
        }
        exchange.taken.grow(amount)?;
        let held = Held { exchange: exchange.clone(), amount };
        let patience = *answer_patience;
        let room = async move { taken.grow_in_time(amount, patience).await }.boxed();
        self.waiting = Some(Box::new(Waiting { piece, held, room }));
        Ok(None)
    }
}

impl<B> Body for Sending<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        loop {
            if let Some(waiting) = &mut this.waiting {
                let room = ready!(waiting.room.poll_unpin(cx));
                let (piece, amount) = (std::mem::take(&mut waiting.piece), waiting.held.amount);
                this.waiting = None;
                let taken = this.pieces.clone().ok_or(Error::Stopped);
                let frame = room.and(taken).map(|taken| charged(piece, Part { taken, amount }));
                return Poll::Ready(Some(frame.map_err(|error| Status::from(error).into())));
            }
            let piece = match &mut this.large {
                Some(large) => match ready!(large.poll_next_unpin(cx)) {
                    Some(Ok(piece)) => piece,
                    Some(Err(error)) => return Poll::Ready(Some(Err(Status::from(error).into()))),
                    None => {
                        this.large = None;
                        continue;
                    }
                },
                None => {
                    let Some(body) = &mut this.body else { return Poll::Ready(None) };
                    match ready!(Pin::new(body).poll_frame(cx)).transpose().map_err(Into::into)?.map(Frame::into_data) {
                        // The large answer has been there in its place.
                        Some(Ok(_)) if this.is_large => continue,
                        Some(Ok(data)) => data,
                        Some(Err(trailers)) => return Poll::Ready(Some(Ok(trailers))),
                        None => return Poll::Ready(None),
                    }
                }
            };
            match this.charge(piece) {
                Ok(None) => {}
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Err(error) => return Poll::Ready(Some(Err(Status::from(error).into()))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let nothing_left = self.large.is_none() && self.waiting.is_none();
        nothing_left && self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Some(body) if !self.is_large => body.size_hint(),
            Some(_) => SizeHint::default(),
            None => SizeHint::with_exact(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::api::{Aside, Turns};
    use crate::env::Env;
    use crate::pb::pieces::tests::some_answer;

    fn message(len: usize) -> Vec<u8> {
        [&[0][..], &(len as u32).to_be_bytes(), &vec![7; len]].concat()
    }

    #[test]
    fn whole_messages_count_for_nothing_however_they_are_cut() {
        let sent = [message(0), message(300), message(1), message(70_000)].concat();
        for size in [1, 3, 5, 6, 300, 4096, sent.len()] {
            let (mut messages, mut counted) = (Messages::new(70_000), 0);
            for piece in sent.chunks(size) {
                let (unfinished, ended) = messages.take(piece);
                counted = if ended { 0 } else { counted } + unfinished;
                assert!(counted <= 70_005);
            }
            assert_eq!(counted, 0, "in pieces of {size}");
            assert_eq!(messages.take(&message(9)[..8]), (8, false));
        }
    }

    /// The pieces arrive one after the other, and then nothing.
    fn stuck(pieces: Vec<Vec<u8>>) -> Body {
        use futures_util::StreamExt as _;
        let pieces = futures_util::stream::iter(pieces.into_iter().map(|p| Ok::<_, Infallible>(Bytes::from(p))));
        Body::from_stream(pieces.chain(futures_util::stream::pending()))
    }

    fn text(error: BoxError) -> String {
        error.downcast::<Status>().expect("a status").message().to_owned()
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn budget(received: u64, answers: u64) -> Budget {
        Budget::new(Account::new(received, answers, 1), 10 * SECOND, SECOND, 80_000)
    }

    fn exchange(budget: &Budget, client: &Client, bytes: u64) -> Arc<Exchange> {
        let taken = budget.0.account.received.take(client, bytes).unwrap();
        Arc::new(Exchange { budget: budget.clone(), taken })
    }

    fn receiving(budget: &Budget, client: &Client, body: Body, is_grpc: bool) -> Receiving<Body> {
        Receiving::new(body, exchange(budget, client, 0), is_grpc, None)
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_request_fails_in_time_and_gives_its_bytes_back() {
        let budget = budget(4000, 0);
        let received = || budget.0.account.received.taken();
        let body = stuck(vec![message(20), message(2000), message(60)[..50].to_vec()]);
        let mut body = receiving(&budget, &Client::new(None), body, true);
        body.frame().await.unwrap().unwrap();
        assert_eq!(received(), 0, "it goes with what the stream takes");
        body.frame().await.unwrap().unwrap();
        assert_eq!(received(), 2005, "it is whole, and whoever asked for it may be at work on it");
        body.frame().await.unwrap().unwrap();
        assert_eq!(received(), 50);
        let mut other = receiving(&budget, &Client::new(None), stuck(vec![vec![0; 3951]]), false);
        assert_eq!(text(other.frame().await.unwrap().unwrap_err()), "etcdserver: too many requests");
        drop(other);
        assert_eq!(text(body.frame().await.unwrap().unwrap_err()), "etcdserver: request timed out");
        drop(body);
        assert_eq!(received(), 0);
    }

    #[tokio::test]
    async fn message_that_is_too_large_is_refused_by_its_head() {
        let budget = budget(200, 0);
        let body = stuck(vec![message(80_001)[..5].to_vec()]);
        let mut body = receiving(&budget, &Client::new(None), body, true);
        let refused = text(body.frame().await.unwrap().unwrap_err());
        assert_eq!(refused, "grpc: received message larger than max (80001 vs. 80000)");
    }

    #[tokio::test(start_paused = true)]
    async fn stream_between_messages_may_take_its_time() {
        let budget = budget(100, 0);
        let mut body = receiving(&budget, &Client::new(None), stuck(vec![message(20)]), true);
        body.frame().await.unwrap().unwrap();
        let next = crate::env::timeout(3600 * SECOND, body.frame()).await;
        assert!(next.is_err(), "no deadline between messages");
    }

    /// However a stream of messages is cut, it is charged for one or two of them at a time, and exactly.
    #[tokio::test]
    async fn a_stream_of_requests_is_charged_for_the_newest_only() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..50 {
            let all: Vec<u8> = (0..20).flat_map(|_| message(random.usize(..3000))).collect();
            let mut cut = Vec::new();
            let mut rest = &all[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(random.usize(1..=rest.len().min(5000)));
                cut.push(piece.to_vec());
                rest = after;
            }
            let budget = budget(1 << 20, 0);
            let mut body = receiving(&budget, &Client::new(None), stuck(cut), true);
            for read in 0.. {
                let done = read == all.len();
                let Some(frame) = body.frame().now_or_never() else { break };
                assert!(!done);
                frame.unwrap().unwrap();
                let taken = budget.0.account.received.taken();
                assert_eq!(taken, body.parts.as_ref().map_or(0, |parts| parts.arriving) + body.whole);
                assert!(taken <= 5000 + 2 * 3005, "{taken}");
            }
            assert!(body.parts.as_ref().is_none_or(|parts| parts.arriving == 0));
            drop(body);
            assert_eq!(budget.0.account.received.taken(), 0);
        }
    }

    fn sending(budget: &Budget, client: &Client, body: Body, large: Option<LargeAnswer>) -> Sending<Body> {
        let large = large.map(|answer| {
            let kept = budget.0.account.answers.take(client, 10).unwrap();
            let bytes = answer.encoded_len();
            Large::new(Aside::new(&Env::real(), answer), bytes, kept, Turns::new(&Env::real()))
        });
        Sending::new(Some(body), large, Some(exchange(budget, client, 100)))
    }

    #[tokio::test]
    async fn what_has_not_left_is_charged_and_what_has_is_given_back() {
        let budget = budget(1 << 20, 1 << 30);
        let (received, answers) = (&budget.0.account.received, &budget.0.account.answers);
        let mut random = fastrand::Rng::with_seed(fastrand::u64(..));
        for _ in 0..50 {
            let answer = some_answer(&mut random);
            let whole: Vec<u8> = answer.clone().in_grpc(answer.encoded_len()).collect::<Vec<_>>().concat();
            // An empty message stands where the large one belongs.
            let mut body = sending(&budget, &Client::new(None), Body::from(vec![0; 5]), Some(answer));
            let (mut sent, mut waits) = (Vec::new(), Vec::new());
            while let Some(frame) = body.frame().await {
                let piece = frame.unwrap().into_data().unwrap();
                sent.extend_from_slice(&piece);
                waits.push(piece);
            }
            drop(body);
            assert!(sent == whole);
            let held = answers.taken() + received.taken();
            assert!(held >= 100 && held + 1024 >= whole.len() as u64, "{held} for {}", whole.len());
            drop(waits);
            assert_eq!((received.taken(), answers.taken()), (0, 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_piece_without_room_waits_for_it_and_fails_in_time() {
        let budget = budget(1 << 20, 100_000);
        let first = sending(&budget, &Client::new(None), Body::from(vec![1; 80_000]), None).frame().await.unwrap();
        let first = first.unwrap();
        let client = Client::new(None);
        let mut body = sending(&budget, &client, Body::from(vec![2; 50_000]), None);
        assert!(crate::env::timeout(SECOND / 2, body.frame()).await.is_err());
        let refused = body.frame().await.unwrap().unwrap_err();
        assert_eq!(text(refused), "etcdserver: too many requests");
        let mut body = sending(&budget, &client, Body::from(vec![2; 50_000]), None);
        assert!(crate::env::timeout(SECOND / 2, body.frame()).await.is_err());
        drop(first);
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 50_000);
    }

    #[tokio::test]
    async fn whatever_waits_is_charged_however_many_pieces_find_no_room() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..50 {
            let (received_max, answers_max) = (random.u64(100_000..2_000_000), random.u64(10_000..500_000));
            let budget = budget(received_max, answers_max);
            let (received, answers) = (budget.0.account.received.clone(), budget.0.account.answers.clone());
            let (mut held, mut bodies, mut refused) = (Vec::new(), Vec::new(), 0);
            for _ in 0..random.usize(1..200) {
                let bytes = random.usize(2 * SMALL_BYTES..50_000);
                let client = Client::new(None);
                let Ok(taken) = received.take(&client, 100) else { continue };
                let exchange = Arc::new(Exchange { budget: budget.clone(), taken });
                let mut body = Sending::new(Some(Body::from(vec![1; bytes])), None, Some(exchange));
                match body.frame().now_or_never() {
                    Some(Some(Ok(frame))) => held.push(frame),
                    Some(Some(Err(_))) => refused += 1,
                    Some(None) => panic!("it has a piece"),
                    None => bodies.push((body, bytes)),
                }
                let waiting: usize = bodies.iter().map(|(_, bytes)| bytes).sum();
                assert!(received.taken() >= waiting as u64 && received.taken() <= received_max, "{waiting} wait");
                assert!(answers.taken() <= answers_max);
            }
            drop(held);
            // What waited is given back when it goes, and when its client leaves.
            for (mut body, _) in bodies {
                if random.bool() && answers.taken() == 0 && answers_max > 100_000 {
                    body.frame().await.unwrap().unwrap();
                }
            }
            assert_eq!((received.taken(), answers.taken()), (0, 0), "{refused} were refused");
        }
    }
}
