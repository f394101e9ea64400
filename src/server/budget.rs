//! What clients' requests and answers may take in memory while they are on their way: two budgets of bytes for all clients.
//!
//! Requests count from their first byte until they are whole; from then on the queue of proposals counts them (`node`). One that
//! would go beyond the budget fails with `too many requests`, and one that is not whole in time with `request timed out`, so that
//! those who send a part and no more cannot keep the others out. Large answers wait for a place among the answers that are being
//! sent (`api::Answers`), and hold it until their last byte has gone, or their client has.
//! Absent: limits of one request (`api`) and of one connection (HTTP/2's windows, `connection`).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::http::{Request, Response, header};
use bytes::Bytes;
use futures_util::future::{MapOk, TryFutureExt as _};
use http_body::{Frame, SizeHint};
use tonic::Status;
use tower::{Layer, Service};

use crate::api::Held;
use crate::env::Sleep;
use crate::error::Error;

/// Bytes of a gRPC message before its content: a flag and the length.
const PREFIX_BYTES: usize = 5;

/// The layer around everything on the client port. Cloning shares the budget.
#[derive(Clone)]
pub(super) struct Budget {
    received: Arc<AtomicU64>,
    bytes_max: u64,
    patience: Duration,
}

impl Budget {
    /// At most `bytes_max` of requests that are not whole, each of them for at most `patience`.
    pub(super) fn new(bytes_max: u64, patience: Duration) -> Self {
        Self { received: Arc::default(), bytes_max, patience }
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
{
    type Response = Response<Sending<R>>;
    type Error = Infallible;
    type Future = MapOk<S::Future, fn(Response<R>) -> Response<Sending<R>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let kind = request.headers().get(header::CONTENT_TYPE);
        let is_grpc = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        let budget = self.budget.clone();
        self.inner.call(request.map(|body| Receiving::new(body, budget, is_grpc))).map_ok(sending)
    }
}

fn sending<R>(mut response: Response<R>) -> Response<Sending<R>> {
    let held = response.extensions_mut().remove::<Held>();
    response.map(|body| Sending { body, _held: held })
}

/// How much of a gRPC body's present message is there.
#[derive(Default)]
struct Messages {
    prefix: [u8; PREFIX_BYTES],
    prefix_filled: usize,
    /// Bytes of the content that are missing.
    missing: usize,
}

impl Messages {
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

/// A request's body on its way in.
pub(super) struct Receiving<B> {
    body: B,
    budget: Budget,
    /// `None`: the whole body is one message.
    messages: Option<Messages>,
    /// Counted in the budget.
    counted: u64,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<B> Receiving<B> {
    fn new(body: B, budget: Budget, is_grpc: bool) -> Self {
        Self { body, budget, messages: is_grpc.then(Messages::default), counted: 0, deadline: None }
    }

    fn count(&mut self, data: &[u8]) -> Result<(), Error> {
        let (unfinished, ended) = match &mut self.messages {
            Some(messages) => messages.take(data),
            None => (data.len(), false),
        };
        if ended {
            self.release();
        }
        self.counted += unfinished as u64;
        let received = self.budget.received.fetch_add(unfinished as u64, Ordering::Relaxed);
        if unfinished > 0 && received + unfinished as u64 > self.budget.bytes_max {
            return Err(Error::TooManyRequests);
        }
        Ok(())
    }

    fn release(&mut self) {
        self.budget.received.fetch_sub(std::mem::take(&mut self.counted), Ordering::Relaxed);
        self.deadline = None;
    }
}

impl<B> Drop for Receiving<B> {
    fn drop(&mut self) {
        self.release();
    }
}

impl<B> http_body::Body for Receiving<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let counted = frame.data_ref().map_or(Ok(()), |data| this.count(data));
                Poll::Ready(Some(counted.map(|()| frame).map_err(|error| Status::from(error).into())))
            }
            Poll::Ready(end) => {
                this.release();
                Poll::Ready(end.map(|failed| failed.map_err(Into::into)))
            }
            Poll::Pending if this.counted == 0 => Poll::Pending,
            Poll::Pending => {
                let patience = this.budget.patience;
                let deadline = this.deadline.get_or_insert_with(|| Box::pin(crate::env::sleep(patience)));
                match deadline.as_mut().poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Some(Err(Status::from(Error::Timeout).into()))),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body on its way out, with its place among the large ones.
pub(super) struct Sending<B> {
    body: B,
    _held: Option<Held>,
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Sending<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body_util::BodyExt as _;

    use super::*;

    fn message(len: usize) -> Vec<u8> {
        [&[0][..], &(len as u32).to_be_bytes(), &vec![7; len]].concat()
    }

    #[test]
    fn whole_messages_count_for_nothing_however_they_are_cut() {
        let sent = [message(0), message(300), message(1), message(70_000)].concat();
        for size in [1, 3, 5, 6, 300, 4096, sent.len()] {
            let (mut messages, mut counted) = (Messages::default(), 0);
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

    #[tokio::test(start_paused = true)]
    async fn half_a_request_fails_in_time_and_gives_its_bytes_back() {
        let budget = Budget::new(100, Duration::from_secs(10));
        let mut body = Receiving::new(stuck(vec![message(20), message(60)[..50].to_vec()]), budget.clone(), true);
        body.frame().await.unwrap().unwrap();
        assert_eq!(budget.received.load(Ordering::Relaxed), 0, "the first is whole");
        body.frame().await.unwrap().unwrap();
        assert_eq!(budget.received.load(Ordering::Relaxed), 50);
        let mut other = Receiving::new(stuck(vec![vec![0; 51]]), budget.clone(), false);
        assert_eq!(text(other.frame().await.unwrap().unwrap_err()), "etcdserver: too many requests");
        drop(other);
        assert_eq!(text(body.frame().await.unwrap().unwrap_err()), "etcdserver: request timed out");
        drop(body);
        assert_eq!(budget.received.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn stream_between_messages_may_take_its_time() {
        let budget = Budget::new(100, Duration::from_secs(10));
        let mut body = Receiving::new(stuck(vec![message(20)]), budget, true);
        body.frame().await.unwrap().unwrap();
        let next = crate::env::timeout(Duration::from_secs(3600), body.frame()).await;
        assert!(next.is_err(), "no deadline between messages");
    }
}
