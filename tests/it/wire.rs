//! What clients of every kind do on the wire beside plain calls: messages that are gzip'd, too large, or long in their headers, calls that
//! are cancelled by the thousand, methods that do not exist, and WebSocket.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::support::attack::Raw;
use crate::support::cluster::{Cluster, PATIENCE};

/// A gRPC call whose body is ours to the byte: everything that was answered, as HTTP/1 would have it.
async fn call(cluster: &Cluster, path: &str, headers: &[(&str, &str)], body: &[u8]) -> String {
    let stream = TcpStream::connect(cluster.endpoint(0)).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut request = hyper::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = client.send_request(request.body(Full::new(Bytes::copy_from_slice(body))).unwrap()).await.unwrap();
    let text = |headers: &hyper::HeaderMap| {
        let line = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
            format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes()))
        };
        headers.iter().map(line).collect::<String>()
    };
    let head = text(answer.headers());
    let content = answer.into_body().collect().await.unwrap();
    let trailers = content.trailers().map(text).unwrap_or_default();
    connection.abort();
    format!("{head}\r\n{}{trailers}", String::from_utf8_lossy(&content.to_bytes()))
}

fn framed(flag: u8, content: &[u8]) -> Vec<u8> {
    [&[flag][..], &(content.len() as u32).to_be_bytes(), content].concat()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn put(key: &str, value: Vec<u8>) -> Vec<u8> {
    PutRequest { key: key.to_owned().into(), value: value.into(), ..Default::default() }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn gzipped_requests_are_taken_and_a_bomb_is_refused() {
    let cluster = Cluster::start(1).await;
    let path = "/etcdserverpb.KV/Put";
    let coded = &[("grpc-encoding", "gzip")][..];
    call(&cluster, path, coded, &framed(1, &gzip(&put("coded", vec![b'a'; 100_000])))).await;
    call(&cluster, path, coded, &framed(0, &put("plain", b"b".to_vec()))).await;
    assert_eq!(cluster.get(0, "coded").await, Some("a".repeat(100_000)));
    assert_eq!(cluster.get(0, "plain").await.as_deref(), Some("b"));
    for (headers, body, code, text) in [
        (
            coded,
            framed(1, &gzip(&vec![0; 64 << 20])),
            8,
            "grpc: received message after decompression larger than max 2097152",
        ),
        (coded, framed(1, b"nonsense"), 3, "cannot be decompressed"),
        // A connection that ends early, and a client that counts wrongly.
        (coded, framed(1, &gzip(&put("cut", vec![b'a'; 1000])))[..20].to_vec(), 13, "Unexpected EOF"),
        (coded, framed(0, &put("cut", vec![b'a'; 1000]))[..500].to_vec(), 13, "Unexpected EOF"),
        (&[("grpc-encoding", "snappy")][..], framed(1, b"x"), 12, "snappy"),
        (
            &[][..],
            // Its begin: who is refused by the head of a message is cut off while it still writes.
            framed(0, &put("large", vec![0; 3_000_000]))[..1000].to_vec(),
            8,
            "grpc: received message larger than max (3000012 vs. 2097152)",
        ),
    ] {
        let answer = call(&cluster, path, headers, &body).await;
        let answer = percent_encoding::percent_decode_str(&answer).decode_utf8_lossy().into_owned();
        assert!(answer.contains(&format!("grpc-status: {code}\r\n")) && answer.contains(text), "{text}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_of_16_kib_is_taken_and_much_more_is_not() {
    let cluster = Cluster::start(1).await;
    let ask = async |bytes: usize| {
        let mut request = Request::new(RangeRequest { key: "k".into(), ..Default::default() });
        request.metadata_mut().insert("token", MetadataValue::try_from("t".repeat(bytes)).unwrap());
        cluster.kv(0).range(request).await
    };
    for bytes in [8 << 10, 16 << 10, 24 << 10] {
        assert!(ask(bytes).await.is_ok(), "{bytes} bytes");
    }
    assert!(ask(100 << 10).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_and_services_that_do_not_exist_are_refused_in_grpc_gos_words() {
    let cluster = Cluster::start(1).await;
    for (path, text) in [
        ("/etcdserverpb.KV/Nope", "unknown method Nope for service etcdserverpb.KV"),
        ("/etcdserverpb.Lease/Nope", "unknown method Nope for service etcdserverpb.Lease"),
        ("/etcdserverpb.Nope/Nope", "unknown service etcdserverpb.Nope"),
        ("/nope", "malformed method name: \"/nope\""),
    ] {
        let answer = call(&cluster, path, &[], &framed(0, b"")).await;
        let answer = percent_encoding::percent_decode_str(&answer).decode_utf8_lossy().into_owned();
        assert!(
            answer.contains("grpc-status: 12\r\n") && answer.contains(&format!("grpc-message: {text}\r\n")),
            "{answer}"
        );
    }
    let mut health = HealthClient::new(cluster.channel(0));
    let unknown = || HealthCheckRequest { service: "nope".into() };
    let refused = health.check(unknown()).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::NotFound, "unknown service"));
    let mut watch = health.watch(unknown()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 3, "SERVICE_UNKNOWN, and the stream stays open");
    let mut known = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    // What it is told first is how it stood just then.
    let serves = async { while known.message().await.unwrap().unwrap().status != 1 {} };
    tokio::time::timeout(std::time::Duration::from_secs(20), serves).await.expect("SERVING");
    let more = tokio::time::timeout(std::time::Duration::from_millis(100), watch.message()).await;
    assert!(more.is_err(), "{more:?}");
}

/// Clients cancel what they do not need any more, by the thousand; what else is on the connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn who_cancels_thousands_of_calls_at_once_keeps_its_connection() {
    let cluster = Cluster::start(1).await;
    cluster.put(0, "k", "v").await;
    let range = RangeRequest { key: "k".into(), ..Default::default() }.encode_to_vec();
    let mut raw = Raw::connect(&cluster.endpoint(0)).await.unwrap();
    for round in 0..3 {
        raw.cancel_at_once(1000).await.unwrap();
        raw.ask("/etcdserverpb.KV/Range", &range).await.unwrap();
        let answered = tokio::time::timeout(PATIENCE, raw.is_answered()).await.expect("an answer in time");
        assert!(answered.unwrap(), "the connection was closed in round {round}");
    }
}

type Socket = WebSocketStream<TcpStream>;

async fn open(cluster: &Cluster, path: &str, headers: &[(&str, &str)]) -> Result<(Socket, Option<String>), u16> {
    let stream = TcpStream::connect(cluster.endpoint(0)).await.unwrap();
    let mut request = format!("ws://{}{path}", cluster.endpoint(0)).into_client_request().unwrap();
    for (name, value) in headers {
        let name = axum::http::HeaderName::try_from(*name).unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, response)) => {
            let protocol = response.headers().get("sec-websocket-protocol");
            Ok((socket, protocol.map(|value| value.to_str().unwrap().to_owned())))
        }
        Err(SocketError::Http(response)) => Err(response.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

/// The next message in JSON; `None` at the end, however it comes.
async fn next(socket: &mut Socket) -> Option<Value> {
    loop {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("a message in time")?;
        match message.ok()? {
            Message::Text(text) => return Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

async fn say(socket: &mut Socket, message: Value) {
    socket.send(Message::text(message.to_string())).await.unwrap();
}

fn encoded(text: &str) -> String {
    BASE64.encode(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_over_websocket_is_asked_and_told_message_by_message() {
    let cluster = Cluster::start(1).await;
    cluster.put(0, "k", "1").await;
    let (mut socket, protocol) = open(&cluster, "/v3/watch", &[]).await.unwrap();
    assert_eq!(protocol, None);
    say(&mut socket, json!({ "create_request": { "key": encoded("k"), "start_revision": "2" } })).await;
    assert_eq!(next(&mut socket).await.unwrap()["result"]["created"], true);
    assert_eq!(next(&mut socket).await.unwrap()["result"]["events"][0]["kv"]["value"], encoded("1"));
    // More is asked on the same socket, also in one message, and of a binary one.
    let both = [json!({ "create_request": { "key": encoded("l") } }), json!({ "progress_request": {} })];
    socket.send(Message::binary(format!("{}\n{}", both[0], both[1]).into_bytes())).await.unwrap();
    let created = next(&mut socket).await.unwrap();
    assert_eq!((&created["result"]["created"], &created["result"]["watch_id"]), (&json!(true), &json!("1")));
    assert_eq!(next(&mut socket).await.unwrap()["result"]["watch_id"], "-1");
    for (key, watcher) in [("l", Some("1")), ("k", None)] {
        cluster.put(0, key, "2").await;
        let told = next(&mut socket).await.unwrap();
        assert_eq!(told["result"].get("watch_id").and_then(Value::as_str), watcher, "{told}");
    }
    say(&mut socket, json!({ "cancel_request": { "watch_id": "1" } })).await;
    assert_eq!(next(&mut socket).await.unwrap()["result"]["canceled"], true);
    socket.send(Message::Ping("p".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Pong("p".into()));
    socket.close(None).await.unwrap();
    assert_eq!(next(&mut socket).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_goes_over_websocket_and_pages_of_others_are_refused() {
    let cluster = Cluster::start(1).await;
    let (mut socket, protocol) =
        open(&cluster, "/v3/kv/put", &[("sec-websocket-protocol", "Bearer, some.token")]).await.unwrap();
    assert_eq!(protocol.as_deref(), Some("Bearer"));
    say(&mut socket, json!({ "key": encoded("k"), "value": encoded("v") })).await;
    assert!(next(&mut socket).await.unwrap()["header"]["revision"].is_string());
    assert_eq!(next(&mut socket).await, None, "and that was all");
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));

    let (mut socket, _) = open(&cluster, "/v3beta/lease/keepalive", &[]).await.unwrap();
    for id in ["7", "8"] {
        say(&mut socket, json!({ "ID": id })).await;
        assert_eq!(next(&mut socket).await.unwrap()["result"]["ID"], id);
    }
    for (message, code) in [("nonsense", 3), (&*"x".repeat(100), 3)] {
        let (mut socket, _) = open(&cluster, "/v3/watch", &[]).await.unwrap();
        socket.send(Message::text(message)).await.unwrap();
        assert_eq!(next(&mut socket).await.unwrap()["error"]["grpc_code"], code);
        assert_eq!(next(&mut socket).await, None);
    }
    let (mut socket, _) = open(&cluster, "/v3/nothing", &[]).await.unwrap();
    assert_eq!(next(&mut socket).await.unwrap()["code"], 5);

    let host = cluster.endpoint(0);
    assert!(open(&cluster, "/v3/watch", &[("origin", &format!("http://{host}"))]).await.is_ok());
    assert_eq!(open(&cluster, "/v3/watch", &[("origin", "http://evil.example")]).await.err(), Some(403));
    let rebound = [("origin", "http://evil.example"), ("host", "evil.example")];
    assert_eq!(open(&cluster, "/v3/watch", &rebound).await.err(), Some(421));
    assert_eq!(open(&cluster, "/metrics", &[]).await.err(), Some(404));
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_are_bounded_and_end_with_their_member() {
    let mut cluster = Cluster::new(1);
    cluster.set("limits.request_bytes_max", "64KiB");
    cluster.start_all().await;
    let (mut socket, _) = open(&cluster, "/v3/watch", &[]).await.unwrap();
    let long = format!(r#"{{"create_request":{{"key":"{}""#, "A".repeat(4 << 20));
    // It is cut off while it sends, or when it has sent.
    let _ = socket.send(Message::text(long)).await;
    assert_eq!(next(&mut socket).await, None);
    let (mut socket, _) = open(&cluster, "/v3/watch", &[]).await.unwrap();
    say(&mut socket, json!({ "create_request": { "key": encoded("k") } })).await;
    assert_eq!(next(&mut socket).await.unwrap()["result"]["created"], true);
    // What was cut off harms nobody else.
    cluster.wait_http(0, "/readyz", 200, &["ok"]).await;
    cluster.terminate(0).await;
    while let Some(told) = next(&mut socket).await {
        assert_eq!(told["error"]["message"], "etcdserver: server stopped");
    }
}
