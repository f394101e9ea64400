//! The own way beside the library's.

use axum::http::HeaderName;
use futures_util::stream;
use http_body_util::StreamBody;
use prost::Message as _;
use tonic::Code;

use super::*;
use crate::pb::etcd::kv_server::{Kv, KvServer};
use crate::pb::etcd::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};

/// Answers with what it was asked, and fails where the key says so.
#[derive(Clone)]
struct Echo;

type Answer<T> = Result<tonic::Response<T>, Status>;

impl OnKeys for Echo {
    async fn range(&self, request: tonic::Request<RangeRequest>) -> Answer<RangeResponse> {
        let asked = request.get_ref();
        match asked.key.first() {
            Some(code @ 1..=16) => {
                Err(Status::new(Code::from(i32::from(*code)), format!("of {} % and ü", asked.limit)))
            }
            _ => {
                let mut answer = tonic::Response::new(RangeResponse { count: asked.limit, ..Default::default() });
                answer.metadata_mut().insert("bytes", asked.key.len().into());
                Ok(answer)
            }
        }
    }

    async fn put(&self, request: tonic::Request<PutRequest>) -> Answer<PutResponse> {
        // Metadata comes along.
        let revision = request.metadata().len() as i64;
        let header = Some(crate::pb::etcd::ResponseHeader { revision, ..Default::default() });
        Ok(tonic::Response::new(PutResponse { header, prev_kv: None }))
    }

    async fn delete_range(&self, request: tonic::Request<DeleteRangeRequest>) -> Answer<DeleteRangeResponse> {
        let deleted = request.get_ref().key.len() as i64;
        Ok(tonic::Response::new(DeleteRangeResponse { deleted, ..Default::default() }))
    }

    async fn txn(&self, request: tonic::Request<TxnRequest>) -> Answer<TxnResponse> {
        Ok(tonic::Response::new(TxnResponse { succeeded: request.get_ref().success.is_empty(), ..Default::default() }))
    }
}

#[tonic::async_trait]
impl Kv for Echo {
    type RangeStreamStream = stream::Empty<Result<crate::pb::etcd::RangeStreamResponse, Status>>;

    async fn range(&self, request: tonic::Request<RangeRequest>) -> Answer<RangeResponse> {
        OnKeys::range(self, request).await
    }

    async fn range_stream(&self, _: tonic::Request<RangeRequest>) -> Answer<Self::RangeStreamStream> {
        Ok(tonic::Response::new(stream::empty()))
    }

    async fn put(&self, request: tonic::Request<PutRequest>) -> Answer<PutResponse> {
        OnKeys::put(self, request).await
    }

    async fn delete_range(&self, request: tonic::Request<DeleteRangeRequest>) -> Answer<DeleteRangeResponse> {
        OnKeys::delete_range(self, request).await
    }

    async fn txn(&self, request: tonic::Request<TxnRequest>) -> Answer<TxnResponse> {
        OnKeys::txn(self, request).await
    }

    async fn compact(&self, _: tonic::Request<CompactionRequest>) -> Answer<CompactionResponse> {
        Ok(tonic::Response::new(CompactionResponse::default()))
    }
}

/// What of a body arrives together.
#[derive(Clone, Debug)]
enum Part {
    Data(Bytes),
    Trailers,
    Failure,
}

type TestBody = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, BoxError>>>>;

fn request(method: &str, headers: &HeaderMap, parts: &[Part]) -> Request<TestBody> {
    let frames = parts.iter().map(|part| match part {
        Part::Data(data) => Ok(Frame::data(data.clone())),
        Part::Trailers => Ok(Frame::trailers(HeaderMap::from_iter([(HeaderName::from_static("x"), OK)]))),
        Part::Failure => Err(Status::resource_exhausted("etcdserver: too many requests").into()),
    });
    let mut request = Request::new(StreamBody::new(stream::iter(frames.collect::<Vec<_>>())));
    *request.uri_mut() = format!("/etcdserverpb.KV/{method}").parse().unwrap();
    *request.headers_mut() = headers.clone();
    request
}

/// All that a client sees of an answer: its head, its bytes, its trailers.
async fn seen<S, R>(mut service: S, request: Request<TestBody>) -> (String, Vec<u8>, Option<HeaderMap>)
where
    S: Service<Request<TestBody>, Response = Response<R>, Error = Infallible>,
    R: Body<Data = Bytes> + Unpin,
    R::Error: std::fmt::Debug,
{
    let (head, mut body) = service.call(request).await.unwrap().into_parts();
    let mut headers: Vec<_> = head.headers.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
    headers.sort();
    let (mut data, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_data() {
            Ok(bytes) => data.extend_from_slice(&bytes),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    assert!(body.is_end_stream());
    (format!("{} {}", head.status, headers.join(", ")), data, trailers)
}

fn message(flag: u8, content: &[u8]) -> Vec<u8> {
    [&[flag][..], &(content.len() as u32).to_be_bytes(), content].concat()
}

fn some_content(random: &mut fastrand::Rng, method: &str) -> Vec<u8> {
    let key = Bytes::from(vec![random.u8(..24); random.usize(1..40)]);
    match method {
        "Range" => RangeRequest { key, limit: random.i64(..1000), ..Default::default() }.encode_to_vec(),
        "Put" => {
            PutRequest { key, value: vec![7; random.usize(..30_000)].into(), ..Default::default() }.encode_to_vec()
        }
        "DeleteRange" => DeleteRangeRequest { key, ..Default::default() }.encode_to_vec(),
        "Txn" => TxnRequest::default().encode_to_vec(),
        _ => Vec::new(),
    }
}

/// A body, most often a good one.
fn some_parts(random: &mut fastrand::Rng, method: &str) -> Vec<Part> {
    let mut content = some_content(random, method);
    if random.u8(..8) == 0 {
        // No message at all.
        content = (0..random.usize(1..20)).map(|_| random.u8(..)).collect();
    }
    let flag = if random.u8(..12) == 0 { random.u8(1..) } else { 0 };
    let mut bytes = message(flag, &content);
    if random.u8(..10) == 0 {
        bytes.truncate(random.usize(..bytes.len()));
    } else if random.u8(..10) == 0 {
        bytes.extend(message(0, &some_content(random, method)));
    }
    let mut parts = Vec::new();
    let mut rest = Bytes::from(bytes);
    while !rest.is_empty() {
        let most = if random.bool() { rest.len() } else { rest.len().min(7) };
        parts.push(Part::Data(rest.split_to(random.usize(1..=most))));
    }
    match random.u8(..12) {
        0 => parts.push(Part::Trailers),
        1 => parts.push(Part::Failure),
        2 => parts.insert(random.usize(..=parts.len()), Part::Data(Bytes::new())),
        _ => {}
    }
    parts
}

#[tokio::test]
async fn a_client_sees_what_the_library_would_answer() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let library = KvServer::new(Echo).max_decoding_message_size(usize::MAX);
    let own = Unary::new(Echo, library.clone());
    let (mut good, mut bad) = (0, 0);
    for _ in 0..4000 {
        let method = ["Range", "Put", "DeleteRange", "Txn", "RangeStream", "Compact", "Nothing"][random.usize(..7)];
        let parts = some_parts(&mut random, method);
        let headers = HeaderMap::from_iter((0..random.usize(..4)).map(|_| (header::USER_AGENT, OK)));
        let ours = seen(own.clone(), request(method, &headers, &parts)).await;
        let theirs = seen(library.clone(), request(method, &headers, &parts)).await;
        // Of a message in another coding, only the code is the same.
        let is_coded = |seen: &str| seen.contains("compress") || seen.contains("payload%20format");
        if is_coded(&theirs.0) {
            assert!(is_coded(&ours.0) && ours.0.contains("grpc-status: \"13\""), "{} for {}", ours.0, theirs.0);
        } else {
            assert_eq!(ours, theirs, "{method} of {parts:?}");
        }
        if ours.2.is_some() { good += 1 } else { bad += 1 }
    }
    assert!(good > 1000 && bad > 500, "{good} {bad}");
}

#[tokio::test]
async fn a_coded_message_is_refused_by_the_name_of_its_coding_and_a_plain_one_is_taken() {
    let service = Unary::new(Echo, KvServer::new(Echo));
    let headers = HeaderMap::from_iter([(ENCODING, HeaderValue::from_static("br"))]);
    let content = some_content(&mut fastrand::Rng::with_seed(1), "Put");
    for (flag, text) in [(0, None), (1, Some("Decompressor%20is%20not%20installed%20for%20grpc-encoding%20%22br%22"))] {
        let parts = [Part::Data(message(flag, &content).into())];
        let (head, _, trailers) = seen(service.clone(), request("Put", &headers, &parts)).await;
        assert_eq!(trailers.is_none(), text.is_some(), "{head}");
        assert!(text.is_none_or(|text| head.contains(text) && head.contains("grpc-status: \"12\"")), "{head}");
    }
}
