//! Calls on keys that are one message each way: nearly all that a cluster does.
//!
//! gRPC's form of these (its document PROTOCOL-HTTP2) is read and written here: the library's way is made for streams and for messages in other
//! codings, and took a sixth of the instructions of a get. Invariant: what a client sees is what the library would answer; a coded message
//! alone is refused in the words of Go's library. Absent: streams, other methods, and whatever has no method: these go the library's way. How long
//! a message may be and may take (`budget`), which is there for both.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::BoxError;
use axum::http::{HeaderMap, HeaderValue, Request, Response, header, request};
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, TryFutureExt as _};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Either};
use prost::Message;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tower::Service;

use super::inflate::ENCODING;
use super::meter::STATUS;
use crate::api::OnKeys;
use crate::pb::codec::{PREFIX_BYTES, framed};

const OK: HeaderValue = HeaderValue::from_static("0");
const MISSING: &str = "Missing request message.";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Answers calls of one message each way by `K`, and all others of the service by `O`.
#[derive(Clone)]
pub(super) struct Unary<K, O> {
    keys: K,
    others: O,
}

impl<K, O> Unary<K, O> {
    pub(super) fn new(keys: K, others: O) -> Self {
        Self { keys, others }
    }
}

impl<K, O, B, R> Service<Request<B>> for Unary<K, O>
where
    K: OnKeys,
    O: Service<Request<B>, Response = Response<R>, Error = Infallible>,
    O::Future: Send + 'static,
    B: Body<Data = Bytes, Error = BoxError> + Unpin + Send + 'static,
{
    type Response = Response<Either<Whole, R>>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.others.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let keys = self.keys.clone();
        match request.uri().path().rsplit_once('/').map(|(_, method)| method) {
            Some("Range") => answer(request, move |request| async move { keys.range(request).await }),
            Some("Put") => answer(request, move |request| async move { keys.put(request).await }),
            Some("DeleteRange") => answer(request, move |request| async move { keys.delete_range(request).await }),
            Some("Txn") => answer(request, move |request| async move { keys.txn(request).await }),
            _ => self.others.call(request).map_ok(|response| response.map(Either::Right)).boxed(),
        }
    }
}

/// Reads the message, has it answered, and writes the answer.
fn answer<M, A, F, B, R>(
    request: Request<B>,
    call: impl FnOnce(tonic::Request<M>) -> F + Send + 'static,
) -> BoxFuture<'static, Result<Response<Either<Whole, R>>, Infallible>>
where
    M: Message + Default + 'static,
    A: Message + 'static,
    F: Future<Output = Result<tonic::Response<A>, Status>> + Send,
    B: Body<Data = Bytes, Error = BoxError> + Unpin + Send + 'static,
{
    let (request::Parts { mut headers, extensions, .. }, mut body) = request.into_parts();
    Box::pin(async move {
        let answered = match message(&mut body, &mut headers).await {
            Ok(message) => {
                drop(body);
                call(tonic::Request::from_parts(MetadataMap::from_headers(headers), extensions, message)).await
            }
            Err(refused) => Err(refused),
        };
        let response = match answered {
            Ok(answer) => {
                let (metadata, message, extensions) = answer.into_parts();
                let mut response = Response::new(Whole { message: Some(framed(message)), has_ended: false });
                *response.headers_mut() = metadata.into_headers();
                response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
                *response.extensions_mut() = extensions;
                response
            }
            Err(status) => status.into_http().map(|()| Whole { message: None, has_ended: true }),
        };
        Ok(response.map(Either::Left))
    })
}

/// A body's first message, when the body has ended: the call begins when the client has said all. Trailers become headers.
async fn message<M, B>(body: &mut B, headers: &mut HeaderMap) -> Result<M, Status>
where
    M: Message + Default,
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    let content = content(body, headers).await?;
    let message = M::decode(content).map_err(|error| Status::internal(error.to_string()))?;
    while !body.is_end_stream() {
        let Some(frame) = body.frame().await else { break };
        if let Ok(trailers) = frame.map_err(Status::from_error)?.into_trailers() {
            headers.extend(trailers);
        }
    }
    Ok(message)
}

/// The content of a body's first message. It is copied: what arrives shares its memory with what arrived beside it.
async fn content<B>(body: &mut B, headers: &HeaderMap) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    let mut held = BytesMut::new();
    loop {
        let Some(frame) = body.frame().await else {
            // To the library a head alone is none.
            let is_begun = !held.is_empty() && held.len() != PREFIX_BYTES;
            return Err(Status::internal(match is_begun {
                true => "Unexpected EOF decoding stream.",
                false => MISSING,
            }));
        };
        let Ok(data) = frame.map_err(Status::from_error)?.into_data() else {
            return Err(Status::internal(MISSING));
        };
        let arrived = if held.is_empty() { &data[..] } else { &held[..] };
        match length(arrived, headers)? {
            Some(bytes) if held.is_empty() && data.len() >= PREFIX_BYTES + bytes => {
                return Ok(Bytes::copy_from_slice(&data[PREFIX_BYTES..][..bytes]));
            }
            Some(bytes) => held.reserve((PREFIX_BYTES + bytes).saturating_sub(held.len())),
            None => {}
        }
        held.extend_from_slice(&data);
        if let Some(bytes) = length(&held, headers)?.filter(|bytes| held.len() >= PREFIX_BYTES + bytes) {
            held.advance(PREFIX_BYTES);
            held.truncate(bytes);
            return Ok(held.freeze());
        }
    }
}

/// How long a message's content is; `None` if its head is not whole.
fn length(arrived: &[u8], headers: &HeaderMap) -> Result<Option<usize>, Status> {
    match arrived.first_chunk::<PREFIX_BYTES>() {
        None => Ok(None),
        Some([0, length @ ..]) => Ok(Some(u32::from_be_bytes(*length) as usize)),
        Some([1, ..]) => Err(match headers.get(ENCODING) {
            Some(coding) if coding != "identity" => {
                Status::unimplemented(format!("grpc: Decompressor is not installed for grpc-encoding {coding:?}"))
            }
            _ => Status::internal("grpc: compressed flag set with identity or empty encoding"),
        }),
        Some([flag, ..]) => Err(Status::internal(format!("grpc: received unexpected payload format {flag}"))),
    }
}

/// An answer's body: one message and the status behind it, or nothing where the status is in the head.
pub(super) struct Whole {
    message: Option<Bytes>,
    has_ended: bool,
}

impl Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.message.take() {
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        if std::mem::replace(&mut self.has_ended, true) {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert(STATUS, OK);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.message.is_none() && self.has_ended
    }

    fn size_hint(&self) -> SizeHint {
        // Whoever knows a length sends it along, and no client of gRPC asks for it.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests;
