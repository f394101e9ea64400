//! The JSON gateway: `POST /v3/...` as etcd's own speaks it, for clients without gRPC.
//!
//! Owns one table, from path to gRPC method, and the transcoding, which goes by the compiled descriptors: a service is reachable
//! as soon as it is in both. A request becomes a gRPC request to the very services that the port serves, in this process; so
//! there is one meaning, one place that counts, and one that checks.
//! Invariants: what is read of a request is bounded and charged to its client (`requests`); a large answer is written in pieces (`json`);
//! a stream is passed on message by message, in both directions, and ends when its client goes.
//! Absent: every meaning of a request; what a browser may ask (`browser`); WebSocket (`socket`).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, SerializeOptions};
use serde_json::json;
use tower::Service as _;

use super::requests::{FRAME_HEAD_BYTES, Limits, Reader};
use super::transcoder::Transcoder;
use crate::api::{Large, Making};
use crate::env::Env;
use crate::error::Error;
use crate::metrics::metrics;
use crate::node::Client;
use crate::node::account::Account;

/// Paths below `/v3/` and `/v3beta/`, and what they call. Those of services that this build lacks answer `Unimplemented`.
const PATHS: &[(&str, &str)] = &[
    ("kv/range", "etcdserverpb.KV.Range"),
    ("kv/put", "etcdserverpb.KV.Put"),
    ("kv/deleterange", "etcdserverpb.KV.DeleteRange"),
    ("kv/txn", "etcdserverpb.KV.Txn"),
    ("kv/compaction", "etcdserverpb.KV.Compact"),
    ("watch", WATCH),
    ("lease/grant", "etcdserverpb.Lease.LeaseGrant"),
    ("lease/revoke", "etcdserverpb.Lease.LeaseRevoke"),
    ("kv/lease/revoke", "etcdserverpb.Lease.LeaseRevoke"),
    ("lease/keepalive", "etcdserverpb.Lease.LeaseKeepAlive"),
    ("lease/timetolive", "etcdserverpb.Lease.LeaseTimeToLive"),
    ("kv/lease/timetolive", "etcdserverpb.Lease.LeaseTimeToLive"),
    ("lease/leases", "etcdserverpb.Lease.LeaseLeases"),
    ("kv/lease/leases", "etcdserverpb.Lease.LeaseLeases"),
    ("cluster/member/add", "etcdserverpb.Cluster.MemberAdd"),
    ("cluster/member/remove", "etcdserverpb.Cluster.MemberRemove"),
    ("cluster/member/update", "etcdserverpb.Cluster.MemberUpdate"),
    ("cluster/member/list", "etcdserverpb.Cluster.MemberList"),
    ("cluster/member/promote", "etcdserverpb.Cluster.MemberPromote"),
    ("maintenance/alarm", "etcdserverpb.Maintenance.Alarm"),
    ("maintenance/status", "etcdserverpb.Maintenance.Status"),
    ("maintenance/defragment", "etcdserverpb.Maintenance.Defragment"),
    ("maintenance/hash", "etcdserverpb.Maintenance.Hash"),
    ("maintenance/hashkv", "etcdserverpb.Maintenance.HashKV"),
    ("maintenance/snapshot", "etcdserverpb.Maintenance.Snapshot"),
    ("maintenance/transfer-leadership", "etcdserverpb.Maintenance.MoveLeader"),
    ("maintenance/downgrade", "etcdserverpb.Maintenance.Downgrade"),
    ("auth/enable", "etcdserverpb.Auth.AuthEnable"),
    ("auth/disable", "etcdserverpb.Auth.AuthDisable"),
    ("auth/status", "etcdserverpb.Auth.AuthStatus"),
    ("auth/authenticate", "etcdserverpb.Auth.Authenticate"),
    ("auth/user/add", "etcdserverpb.Auth.UserAdd"),
    ("auth/user/get", "etcdserverpb.Auth.UserGet"),
    ("auth/user/list", "etcdserverpb.Auth.UserList"),
    ("auth/user/delete", "etcdserverpb.Auth.UserDelete"),
    ("auth/user/changepw", "etcdserverpb.Auth.UserChangePassword"),
    ("auth/user/grant", "etcdserverpb.Auth.UserGrantRole"),
    ("auth/user/revoke", "etcdserverpb.Auth.UserRevokeRole"),
    ("auth/role/add", "etcdserverpb.Auth.RoleAdd"),
    ("auth/role/get", "etcdserverpb.Auth.RoleGet"),
    ("auth/role/list", "etcdserverpb.Auth.RoleList"),
    ("auth/role/delete", "etcdserverpb.Auth.RoleDelete"),
    ("auth/role/grant", "etcdserverpb.Auth.RoleGrantPermission"),
    ("auth/role/revoke", "etcdserverpb.Auth.RoleRevokePermission"),
    ("election/campaign", "v3electionpb.Election.Campaign"),
    ("election/proclaim", "v3electionpb.Election.Proclaim"),
    ("election/leader", "v3electionpb.Election.Leader"),
    ("election/observe", "v3electionpb.Election.Observe"),
    ("election/resign", "v3electionpb.Election.Resign"),
    ("lock/lock", "v3lockpb.Lock.Lock"),
    ("lock/unlock", "v3lockpb.Lock.Unlock"),
];
/// Its requests go on while the client listens; every other stream of requests ends with the body.
const WATCH: &str = "etcdserverpb.Watch.Watch";

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const METADATA_PREFIX: &str = "grpc-metadata-";

const NOT_FOUND: u16 = 5;
const UNIMPLEMENTED: u16 = 12;
const INTERNAL: u16 = 13;

pub(super) const OPTIONS: SerializeOptions = SerializeOptions::new()
    .stringify_64_bit_integers(true)
    .use_enum_numbers(false)
    .use_proto_field_name(true)
    .skip_default_fields(true);

/// The gateway in front of `services`. Cloning shares it.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
    /// The gRPC services, as the port serves them.
    services: Router,
}

struct Inner {
    env: Env,
    /// By path; `None` for a method that this build lacks.
    methods: BTreeMap<&'static str, Option<MethodDescriptor>>,
    limits: Limits,
    account: Account,
}

/// A failure: its gRPC code and text.
#[derive(Debug, PartialEq)]
struct Failure {
    code: u16,
    message: String,
}

impl Gateway {
    /// `descriptors` describe the services; a request has at most `message_bytes_max` bytes as they take it.
    pub fn new(
        env: Env,
        services: Router,
        descriptors: &[u8],
        message_bytes_max: usize,
        account: Account,
    ) -> Result<Self, prost_reflect::DescriptorError> {
        let pool = DescriptorPool::decode(descriptors)?;
        let find = |full_name: &str| {
            pool.services().flat_map(|s| s.methods().collect::<Vec<_>>()).find(|m| m.full_name() == full_name)
        };
        let methods = PATHS.iter().map(|(path, name)| (*path, find(name))).collect();
        // In JSON, bytes take a third more.
        let limits = Limits { body_bytes_max: 2 * message_bytes_max, message_bytes_max };
        Ok(Self { inner: Arc::new(Inner { env, methods, limits, account }), services })
    }

    /// Most bytes of a message in JSON.
    pub fn body_bytes_max(&self) -> usize {
        self.inner.limits.body_bytes_max
    }

    /// Whether the call of this path takes more than one message.
    pub(super) fn takes_many(&self, path: &str) -> bool {
        self.inner.methods.get(path).is_some_and(|method| method.as_ref().is_some_and(|m| m.is_client_streaming()))
    }

    /// Answers a request whose path is `path` below the version.
    pub async fn call(self, path: &str, request: Request<Body>) -> Response {
        metrics().gateway_requests.inc();
        match self.try_call(path, request).await {
            Ok(response) => response,
            Err(failure) => failure.into_response(),
        }
    }

    async fn try_call(self, path: &str, request: Request<Body>) -> Result<Response, Failure> {
        let method = match self.inner.methods.get(path) {
            Some(Some(method)) => method.clone(),
            Some(None) => return Err(Failure { code: UNIMPLEMENTED, message: format!("{path} is not served") }),
            None => return Err(Failure { code: NOT_FOUND, message: "Not Found".into() }),
        };
        if request.method() != Method::POST {
            return Err(Failure { code: UNIMPLEMENTED, message: "Method Not Allowed".into() });
        }
        let (head, body) = request.into_parts();
        let client = head.extensions.get::<Client>().cloned().unwrap_or_default();
        let transcoder = Transcoder { env: self.inner.env.clone(), asker: client.asker() };
        let reader = Reader {
            transcoder: transcoder.clone(),
            account: self.inner.account.clone(),
            client: client.clone(),
            input: method.input(),
            limits: self.inner.limits,
        };
        let messages = match method.full_name() {
            WATCH => Body::from_stream(reader.many(body).chain(stream::pending())),
            _ if method.is_client_streaming() => Body::from_stream(reader.many(body)),
            _ => Body::from(reader.one(body).await?),
        };
        let mut answer = grpc_request(&method, &head.headers, messages);
        answer.extensions_mut().insert(client);
        let answer = self.services.clone().call(answer).await.unwrap_or_else(|never: Infallible| match never {});
        if method.is_server_streaming() {
            stream_answer(transcoder, method, answer).await
        } else {
            unary_answer(&transcoder, method, answer).await
        }
    }
}

fn grpc_request(method: &MethodDescriptor, headers: &HeaderMap, messages: Body) -> Request<Body> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let mut request = Request::new(messages);
    *request.method_mut() = Method::POST;
    *request.version_mut() = axum::http::Version::HTTP_2;
    *request.uri_mut() = axum::http::Uri::try_from(path).expect("names in descriptors make a path");
    let metadata = request.headers_mut();
    metadata.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    metadata.insert(header::TE, HeaderValue::from_static("trailers"));
    for (name, value) in headers {
        if let Some(name) = name.as_str().strip_prefix(METADATA_PREFIX)
            && let Ok(name) = HeaderName::try_from(name)
        {
            metadata.append(name, value.clone());
        }
    }
    if let Some(token) = headers.get(header::AUTHORIZATION) {
        let bare = token.to_str().ok().map(|text| text.strip_prefix("Bearer ").unwrap_or(text));
        if let Some(token) = bare.and_then(|text| HeaderValue::from_str(text).ok()) {
            metadata.insert(HeaderName::from_static("token"), token);
        }
    }
    if let Some(timeout) = headers.get("grpc-timeout") {
        metadata.insert(HeaderName::from_static("grpc-timeout"), timeout.clone());
    }
    request
}

/// The messages of a gRPC response, and at their end its status.
struct Answers {
    body: Body,
    buffer: BytesMut,
    /// Known once trailers, or a head that stands for them, were read.
    status: Option<Failure>,
    ended: bool,
}

impl Answers {
    fn new(response: Response) -> Self {
        let (head, body) = response.into_parts();
        let status = head.headers.contains_key(GRPC_STATUS).then(|| status(&head.headers));
        Self { body, buffer: BytesMut::new(), status, ended: false }
    }

    /// The next message; `None` at the end, then [`Self::failure`] has the outcome.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.buffer.len() >= FRAME_HEAD_BYTES {
                let len = (&self.buffer[1..FRAME_HEAD_BYTES]).get_u32() as usize;
                if self.buffer.len() >= FRAME_HEAD_BYTES + len {
                    self.buffer.advance(FRAME_HEAD_BYTES);
                    return Some(self.buffer.split_to(len).freeze());
                }
                self.buffer.reserve(FRAME_HEAD_BYTES + len - self.buffer.len());
            }
            if self.ended {
                return None;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.put(data),
                    Err(frame) => {
                        self.status = frame.trailers_ref().map(status);
                    }
                },
                Some(Err(error)) => {
                    self.status = Some(Failure { code: INTERNAL, message: error.to_string() });
                    self.ended = true;
                }
                None => self.ended = true,
            }
        }
    }

    /// How the call ended, if not well.
    fn failure(&mut self) -> Option<Failure> {
        let unknown = || Failure { code: INTERNAL, message: "the call ended without a status".into() };
        Some(self.status.take().unwrap_or_else(unknown)).filter(|status| status.code != 0)
    }
}

fn status(headers: &HeaderMap) -> Failure {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    let message = percent_encoding::percent_decode_str(text(GRPC_MESSAGE)).decode_utf8_lossy().into_owned();
    Failure { code: text(GRPC_STATUS).parse().unwrap_or(2), message }
}

async fn unary_answer(
    transcoder: &Transcoder,
    method: MethodDescriptor,
    mut response: Response,
) -> Result<Response, Failure> {
    let large = response.extensions_mut().remove::<Large>();
    let mut answers = Answers::new(response);
    let message = answers.next().await;
    // To the end: the status comes last.
    while answers.next().await.is_some() {}
    if let Some(failure) = answers.failure() {
        return Err(failure);
    }
    if let Some(large) = large {
        return Ok(json_response(
            StatusCode::OK,
            Body::from_stream(large.written(Making::Apart, |answer, _| super::json::pieces(answer))),
        ));
    }
    let message =
        message.ok_or_else(|| Failure { code: INTERNAL, message: "the call ended without an answer".into() })?;
    let bytes = message.len();
    let work = move || {
        let mut body = Vec::new();
        write_json(&method, message, &mut body).map(|()| body)
    };
    Ok(json_response(StatusCode::OK, Body::from(transcoder.run(bytes, work).await?)))
}

/// One line a message. A failure before the first message is the whole answer, as with etcd's gateway.
async fn stream_answer(
    transcoder: Transcoder,
    method: MethodDescriptor,
    response: Response,
) -> Result<Response, Failure> {
    let mut answers = Answers::new(response);
    let first = answers.next().await;
    if first.is_none() {
        return Ok(match answers.failure() {
            Some(failure) => json_response(http_status(failure.code), Body::from(failure.in_stream())),
            // It has ended well and said nothing, as a keep-alive of nothing does.
            None => json_response(StatusCode::OK, Body::empty()),
        });
    }
    let lines = stream::unfold(Some((answers, first)), move |state| {
        let (transcoder, method) = (transcoder.clone(), method.clone());
        async move {
            let (mut answers, first) = state?;
            let message = match first {
                Some(message) => Some(message),
                None => answers.next().await,
            };
            let (line, next) = match message {
                Some(message) => match transcoder.run(message.len(), move || result_line(&method, message)).await {
                    Ok(line) => (line, Some((answers, None))),
                    Err(failure) => (failure.in_stream(), None),
                },
                None => (answers.failure()?.in_stream(), None),
            };
            Some((Ok::<_, Infallible>(line), next))
        }
    });
    Ok(json_response(StatusCode::OK, Body::from_stream(lines)))
}

fn result_line(method: &MethodDescriptor, message: Bytes) -> Result<Vec<u8>, Failure> {
    let mut line = b"{\"result\":".to_vec();
    write_json(method, message, &mut line)?;
    line.extend_from_slice(b"}\n");
    Ok(line)
}

/// The names of the .proto files, 64-bit numbers as strings, bytes in base64, unset fields left out, enums by name.
fn write_json(method: &MethodDescriptor, message: Bytes, out: &mut Vec<u8>) -> Result<(), Failure> {
    let internal = |error: String| Failure { code: INTERNAL, message: error };
    let message = DynamicMessage::decode(method.output(), message).map_err(|error| internal(error.to_string()))?;
    let mut json = serde_json::Serializer::new(out);
    message.serialize_with_options(&mut json, &OPTIONS).map_err(|error| internal(error.to_string()))?;
    Ok(())
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { code: error.code() as u16, message: error.to_string() }
    }
}

impl Failure {
    /// As a line of a stream: the fields of both generations of gateways.
    fn in_stream(&self) -> Vec<u8> {
        let http = http_status(self.code);
        let error = json!({
            "grpc_code": self.code,
            "http_code": http.as_u16(),
            "code": self.code,
            "message": self.message,
            "http_status": http.canonical_reason().unwrap_or_default(),
        });
        format!("{}\n", json!({ "error": error })).into_bytes()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        refusal(http_status(self.code), self.code, &self.message)
    }
}

pub(super) fn refusal(status: StatusCode, code: u16, message: &str) -> Response {
    let body = json!({ "error": message, "message": message, "code": code });
    json_response(status, Body::from(body.to_string()))
}

fn json_response(status: StatusCode, body: Body) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// As grpc-gateway maps codes.
fn http_status(code: u16) -> StatusCode {
    match code {
        0 => StatusCode::OK,
        // Client closed request; nginx's number.
        1 => StatusCode::from_u16(499).expect("three digits"),
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway() -> Gateway {
        let account = Account::new(1 << 20, 1 << 20, 1);
        Gateway::new(Env::real(), Router::new(), crate::pb::PUBLIC_DESCRIPTORS, 1000, account).unwrap()
    }

    #[test]
    fn paths_are_unique_and_those_of_served_services_are_found() {
        let gateway = gateway();
        assert_eq!(gateway.inner.methods.len(), PATHS.len());
        let pool = DescriptorPool::decode(crate::pb::PUBLIC_DESCRIPTORS).unwrap();
        // Not in JSON, as in etcd.
        let absent = ["etcdserverpb.KV.RangeStream"];
        for method in pool.services().flat_map(|s| s.methods().collect::<Vec<_>>()) {
            let name = method.full_name();
            // Our own services are no part of etcd's gateway.
            let own = name.starts_with("quorate.");
            assert!(own || absent.contains(&name) || PATHS.iter().any(|(_, n)| *n == name), "{name} has no path");
        }
    }

    #[test]
    fn failures_carry_both_names_of_their_text() {
        let failure = Failure { code: 11, message: "etcdserver: mvcc: required revision has been compacted".into() };
        let line: serde_json::Value = serde_json::from_slice(&failure.in_stream()).unwrap();
        assert_eq!((&line["error"]["http_code"], &line["error"]["grpc_code"]), (&400.into(), &11.into()));
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_STATUS, HeaderValue::from_static("3"));
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static("a%20b%0A"));
        assert_eq!(status(&headers), Failure { code: 3, message: "a b\n".into() });
    }
}
