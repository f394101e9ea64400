//! A watcher on a stream of its own, over gRPC or through the gateway, that is told what has been from one revision to another.
//!
//! Invariant: the last event is known beforehand, since it was written just before and is in the interval, so reading ends with it; or with
//! the watcher. How events are divided into responses is not compared.

use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tonic::Status;

use crate::ask::{Methods, Server, message, to_json};
use crate::call::Door;
use crate::watch::{merge, number};

const PATIENCE: Duration = Duration::from_secs(30);
const WATCH: &str = "Watch/Watch";

/// What a watcher that `create` makes is told up to the event of revision `last`.
pub async fn told(server: &Server, methods: &Methods, door: Door, create: &Value, last: i64) -> anyhow::Result<Value> {
    let told = async {
        match door {
            Door::Grpc => over_grpc(server, methods, create, last).await,
            Door::Json => over_json(server, create, last).await,
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await;
    told.with_context(|| format!("the event of revision {last} was not told in {PATIENCE:?}"))?
}

async fn over_grpc(server: &Server, methods: &Methods, create: &Value, last: i64) -> anyhow::Result<Value> {
    use tokio_stream::StreamExt as _;

    let method = methods.find(WATCH);
    let request = message(method.input(), &json!({ "create_request": create }));
    // It stays open: its end would be the watcher's.
    let requests = tokio_stream::once(request).chain(tokio_stream::pending());
    let mut told = json!({});
    let reading = async {
        let mut answers = server.stream(&method, requests).await?;
        while let Some(answer) = answers.message().await? {
            if take(&mut told, to_json(&answer), last) {
                return Ok(true);
            }
        }
        Ok::<_, Status>(false)
    };
    match reading.await {
        Ok(true) => Ok(json!({ "told": told })),
        Ok(false) => bail!("the stream has ended; told until then: {told}"),
        Err(status) => Ok(json!({ "error": { "code": format!("{:?}", status.code()), "text": status.message() } })),
    }
}

async fn over_json(server: &Server, create: &Value, last: i64) -> anyhow::Result<Value> {
    let stream = TcpStream::connect(&server.endpoint).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the sender and the answer.
    tokio::spawn(connection);
    let mut request = hyper::Request::post("/v3/watch").header("Host", &server.endpoint);
    if let Some(token) = server.token() {
        request = request.header("Authorization", token);
    }
    let body = json!({ "create_request": create }).to_string();
    let answer = sender.send_request(request.body(body)?).await?;
    let code = answer.status().as_u16();
    let (mut body, mut bytes, mut told) = (answer.into_body(), Vec::new(), json!({}));
    loop {
        let frame = body.frame().await.context("the answer has ended")??;
        bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=end).collect();
            let mut answer: Value = serde_json::from_slice(&line).context("a line is no JSON")?;
            let Some(result) = answer.get_mut("result").map(Value::take) else {
                return Ok(json!({ "http": code, "body": [answer] }));
            };
            if take(&mut told, result, last) {
                return Ok(json!({ "http": code, "told": told }));
            }
        }
    }
}

/// Takes what an answer says; whether nothing comes after it.
fn take(told: &mut Value, answer: Value, last: i64) -> bool {
    let events = answer["events"].as_array();
    let newest = events.and_then(|events| events.last()).map_or(0, |event| number(&event["kv"], "mod_revision"));
    let ended = answer.get("canceled").is_some();
    merge(told, answer);
    newest >= last || ended
}
