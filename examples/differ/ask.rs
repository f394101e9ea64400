//! How a server is asked: any method over gRPC, by its descriptor, and any path of the gateway.
//!
//! An answer is JSON: `messages` and, if it failed, `error` with `code` and `text`; through the gateway `http` and `body`. A field that
//! the descriptor does not know stands in it as `field N, unknown`, so that it counts as a difference.
//! Absent: streams that stay open (`watch`).

use std::time::Duration;

use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions};
use quorate::pb::PUBLIC_DESCRIPTORS;
use serde_json::{Value, json};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::call::{Call, Door};
use crate::support::cluster::http_request;

/// No answer takes longer on either side, but for one that waits for another client.
const PATIENCE: Duration = Duration::from_secs(30);
/// What waits for another client is given up after so long: what does not wait is done by then, on a machine with much to do too.
const WAITING: Duration = Duration::from_secs(2);
/// Messages that are read of a stream without an end.
const OBSERVED: usize = 1;

/// A server's address, and a connection to it.
#[derive(Clone)]
pub struct Server {
    pub endpoint: String,
    channel: Channel,
    /// Shown with each request over gRPC.
    token: Option<String>,
}

impl Server {
    pub fn new(endpoint: String) -> Self {
        let channel = Endpoint::from_shared(format!("http://{endpoint}")).expect("an address").connect_lazy();
        Self { endpoint, channel, token: None }
    }

    /// The same, for who shows a token.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    pub async fn ask(&self, methods: &Methods, call: &Call, body: &Value) -> Value {
        match call.door {
            Door::Json => self.post(call, body).await,
            Door::Grpc => self.invoke(methods, &call.method, body).await,
        }
    }

    async fn post(&self, call: &Call, body: &Value) -> Value {
        let body = match body {
            Value::String(text) => text.clone(),
            // A stream of requests: one after the other.
            Value::Array(all) => all.iter().map(Value::to_string).collect(),
            one => one.to_string(),
        };
        let path = format!("/v3/{}", call.path());
        // As etcd's gateway takes it.
        let headers: Vec<(&str, &str)> = self.token.iter().map(|token| ("Authorization", token.as_str())).collect();
        let asked = http_request(&self.endpoint, "POST", &path, &headers, &body);
        match tokio::time::timeout(patience(&call.method), asked).await {
            Ok(Ok((code, text))) => {
                // A stream's answer is a line a message.
                let lines =
                    serde_json::Deserializer::from_str(&text).into_iter::<Value>().collect::<Result<Vec<_>, _>>();
                json!({ "http": code, "body": lines.unwrap_or_else(|_| vec![Value::String(text)]) })
            }
            Ok(Err(error)) => json!({ "broken": error.to_string() }),
            Err(_) => json!({ "waits": true }),
        }
    }

    async fn invoke(&self, methods: &Methods, method: &str, body: &Value) -> Value {
        let method = methods.find(method);
        let messages = match body {
            Value::Array(all) => all.iter().map(|body| message(method.input(), body)).collect(),
            one => vec![message(method.input(), one)],
        };
        let mut answers = Vec::new();
        let read = async {
            let mut stream = self.stream(&method, tokio_stream::iter(messages)).await?;
            while let Some(answer) = stream.message().await? {
                answers.push(to_json(&answer));
                if method.name() == "Observe" && answers.len() == OBSERVED {
                    break;
                }
            }
            Ok::<_, Status>(())
        };
        let error = match tokio::time::timeout(patience(method.name()), read).await {
            Ok(Ok(())) => return json!({ "messages": answers }),
            Ok(Err(status)) => json!({ "code": format!("{:?}", status.code()), "text": status.message() }),
            Err(_) => json!({ "waits": true }),
        };
        json!({ "messages": answers, "error": error })
    }

    /// Calls `method` with a stream of requests; every kind of method can be called so.
    pub async fn stream(
        &self,
        method: &MethodDescriptor,
        requests: impl tokio_stream::Stream<Item = DynamicMessage> + Send + 'static,
    ) -> Result<Streaming<DynamicMessage>, Status> {
        let mut client = tonic::client::Grpc::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let path = path.parse().expect("names in descriptors make a path");
        let mut request = Request::new(requests);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.parse().expect("a token is ASCII"));
        }
        Ok(client.streaming(request, path, Dynamic(method.output())).await?.into_inner())
    }
}

/// How long `method` is waited for.
fn patience(method: &str) -> Duration {
    let waits = ["Lock", "Campaign", "Observe"].iter().any(|name| method.ends_with(name));
    if waits { WAITING } else { PATIENCE }
}

/// The methods of the public API, by `Service/Method`.
pub struct Methods(DescriptorPool);

impl Methods {
    pub fn new() -> Self {
        Self(DescriptorPool::decode(PUBLIC_DESCRIPTORS).expect("the descriptors are compiled in"))
    }

    pub fn all(&self) -> Vec<MethodDescriptor> {
        self.0.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
    }

    pub fn find(&self, name: &str) -> MethodDescriptor {
        let (service, method) = name.split_once('/').expect("Service/Method");
        let all = self.all();
        let found = all.into_iter().find(|m| m.name() == method && m.parent_service().name() == service);
        found.unwrap_or_else(|| panic!("there is no method {name}"))
    }
}

/// A message of these fields. What cannot be one is a fault of whoever wrote the request.
pub fn message(descriptor: MessageDescriptor, body: &Value) -> DynamicMessage {
    DynamicMessage::deserialize(descriptor, body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

pub fn to_json(message: &DynamicMessage) -> Value {
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(true);
    let mut json = message.serialize_with_options(serde_json::value::Serializer, &options).expect("a message is JSON");
    mark_unknown(message, &mut json);
    json
}

fn mark_unknown(message: &DynamicMessage, json: &mut Value) {
    for field in message.unknown_fields() {
        json[format!("field {}, unknown", field.number())] = Value::Bool(true);
    }
    for (field, value) in message.fields() {
        let Some(inner) = json.get_mut(field.name()) else { continue };
        match value {
            prost_reflect::Value::Message(message) => mark_unknown(message, inner),
            prost_reflect::Value::List(items) => {
                for (item, json) in items.iter().zip(inner.as_array_mut().into_iter().flatten()) {
                    if let prost_reflect::Value::Message(message) = item {
                        mark_unknown(message, json);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Messages whose type is known only here.
struct Dynamic(MessageDescriptor);

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Encoding;
    type Decoder = Decoding;

    fn encoder(&mut self) -> Encoding {
        Encoding
    }

    fn decoder(&mut self) -> Decoding {
        Decoding(self.0.clone())
    }
}

struct Encoding;

impl Encoder for Encoding {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

struct Decoding(MessageDescriptor);

impl Decoder for Decoding {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let message =
            DynamicMessage::decode(self.0.clone(), buffer).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(message))
    }
}
