//! Counts gRPC calls: begun, ended by code, and how long they took; and has those written down that the audit log wants.
//!
//! A method's counters are found by a binary search among constant paths; no label is looked up. A call has ended when its trailers
//! were made; one whose client has gone before ends as Canceled. A method that its service does not have is refused by name, as in grpc-go.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use prost::Message as _;
use tower::{Layer, Service};

use crate::env::Instant;
use crate::metrics::{self, metrics};
use crate::node::Client;
use crate::telemetry::audit::{Audit, Entry, Kind};

const OK: usize = 0;
const CANCELED: usize = 1;
const UNKNOWN: usize = 2;
const UNIMPLEMENTED: usize = 12;
pub(super) const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The layer around all gRPC services. Cloning shares the counters.
#[derive(Clone)]
pub(super) struct Meter {
    /// By path, ascending.
    methods: Arc<[(String, Arc<Known>)]>,
    audit: Option<Audit>,
}

struct Known {
    counters: metrics::Method,
    /// As the audit log has it: `KV/Put`.
    name: String,
    /// `None`: it tells nothing of anybody's data, and is never written down.
    kind: Option<Kind>,
}

/// What the audit log calls the codes of gRPC.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// What a method does; a new one is an administrator's until it is named here.
fn kind(package: &str, method: &str) -> Option<Kind> {
    if !["etcdserverpb", "v3lockpb", "v3electionpb", "quorate.admin.v1"].contains(&package) {
        return None;
    }
    Some(match method {
        "KV/Range"
        | "KV/RangeStream"
        | "Watch/Watch"
        | "Lease/LeaseKeepAlive"
        | "Lease/LeaseTimeToLive"
        | "Lease/LeaseLeases"
        | "Election/Leader"
        | "Election/Observe"
        | "Cluster/MemberList"
        | "Maintenance/Status"
        | "Maintenance/Hash"
        | "Maintenance/HashKV"
        | "Auth/AuthStatus"
        | "Auth/UserGet"
        | "Auth/UserList"
        | "Auth/RoleGet"
        | "Auth/RoleList"
        | "Admin/Membership"
        | "Admin/RoleQuotas" => Kind::Read,
        "KV/Put" | "KV/DeleteRange" | "KV/Txn" | "Lease/LeaseGrant" | "Lease/LeaseRevoke" | "Lock/Lock"
        | "Lock/Unlock" | "Election/Campaign" | "Election/Proclaim" | "Election/Resign" => Kind::Write,
        _ => Kind::Admin,
    })
}

impl Meter {
    /// Counts the methods in these encoded descriptor sets.
    pub(super) fn new(descriptors: &[&[u8]], audit: Option<Audit>) -> Result<Self, prost::DecodeError> {
        let mut methods = Vec::new();
        for bytes in descriptors {
            for file in prost_types::FileDescriptorSet::decode(*bytes)?.file {
                for service in &file.service {
                    let service_name = format!("{}.{}", file.package(), service.name());
                    for method in &service.method {
                        let streams = match (method.client_streaming(), method.server_streaming()) {
                            (false, false) => "unary",
                            (true, false) => "client_stream",
                            (false, true) => "server_stream",
                            (true, true) => "bidi_stream",
                        };
                        let counters = metrics().method(streams, &service_name, method.name());
                        let name = format!("{}/{}", service.name(), method.name());
                        let known = Known { counters, kind: kind(file.package(), &name), name };
                        methods.push((format!("/{service_name}/{}", method.name()), Arc::new(known)));
                    }
                }
            }
        }
        methods.sort_by(|a, b| a.0.cmp(&b.0));
        methods.dedup_by(|a, b| a.0 == b.0);
        Ok(Self { methods: methods.into(), audit })
    }

    /// Begins to count a call, and to write it down.
    fn begin<B>(&self, request: &mut Request<B>) -> Option<Call> {
        let method = self.find(request.uri().path())?;
        let audited = self.audit.as_ref().zip(method.kind).and_then(|(audit, kind)| {
            let entry = audit.begin(kind)?;
            let from = request.extensions().get::<Client>().and_then(Client::address);
            request.extensions_mut().insert(entry.clone());
            Some(Audited { audit: audit.clone(), entry, from })
        });
        Some(Call::begin(method, audited))
    }

    fn find(&self, path: &str) -> Option<Arc<Known>> {
        let at = self.methods.binary_search_by(|(known, _)| known.as_str().cmp(path)).ok()?;
        Some(self.methods[at].1.clone())
    }
}

impl<S> Layer<S> for Meter {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered { meter: self.clone(), inner }
    }
}

#[derive(Clone)]
pub(super) struct Metered<S> {
    meter: Meter,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Metered<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = Response<MeteredBody<R>>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let call = self.meter.begin(&mut request);
        let unknown = if call.is_none() { unknown(request.uri().path()) } else { None };
        Answering { answer: self.inner.call(request), call, unknown }
    }
}

/// An answer that is being made.
pub(super) struct Answering<F> {
    answer: F,
    call: Option<Call>,
    /// What is to be said if its service has no such method.
    unknown: Option<HeaderValue>,
}

/// The refusal of a method that is not counted.
fn unknown(path: &str) -> Option<HeaderValue> {
    let (service, method) = path.strip_prefix('/')?.rsplit_once('/')?;
    let text = format!("unknown method {method} for service {service}");
    HeaderValue::try_from(text.replace('%', "%25")).ok()
}

impl<F, R> Future for Answering<F>
where
    F: Future<Output = Result<Response<R>, Infallible>> + Unpin,
{
    type Output = Result<Response<MeteredBody<R>>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(Pin::new(&mut self.answer).poll(cx))?;
        if let Some(text) = self.unknown.take()
            && code(response.headers()) == Some(UNIMPLEMENTED)
        {
            response.headers_mut().entry(MESSAGE).or_insert(text);
        }
        let mut call = self.call.take();
        // Trailers alone: the call has failed before its first message.
        if let (Some(call), Some(code)) = (&mut call, code(response.headers())) {
            call.end(code);
        }
        Poll::Ready(Ok(response.map(|body| MeteredBody { body, call })))
    }
}

/// A call under way. Dropped before its end, its client has gone.
struct Call {
    method: Option<Arc<Known>>,
    audited: Option<Audited>,
    began: Instant,
}

/// One that is written down.
struct Audited {
    audit: Audit,
    entry: Entry,
    from: Option<IpAddr>,
}

impl Call {
    fn begin(method: Arc<Known>, audited: Option<Audited>) -> Self {
        method.counters.begin();
        Self { method: Some(method), audited, began: Instant::now() }
    }

    fn end(&mut self, code: usize) {
        let Some(method) = self.method.take() else { return };
        let took = self.began.elapsed();
        method.counters.end(code, took);
        if let Some(Audited { audit, entry, from }) = self.audited.take() {
            audit.end(&entry, &method.name, from, CODES.get(code).unwrap_or(&CODES[UNKNOWN]), took);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(CANCELED);
    }
}

fn code(headers: &HeaderMap) -> Option<usize> {
    let value = headers.get(STATUS)?;
    Some(value.to_str().ok().and_then(|text| text.parse().ok()).unwrap_or(UNKNOWN))
}

pub(super) struct MeteredBody<B> {
    body: B,
    call: Option<Call>,
}

impl<B> MeteredBody<B> {
    fn end(&mut self, code: usize) {
        if let Some(call) = &mut self.call {
            call.end(code);
        }
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for MeteredBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.end(code(trailers).unwrap_or(UNKNOWN));
                }
            }
            Poll::Ready(Some(Err(_))) => self.end(UNKNOWN),
            Poll::Ready(None) => self.end(OK),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
