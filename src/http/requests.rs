//! JSON of a request's body, as gRPC messages.
//!
//! Owns what is taken as JSON beyond its grammar, as etcd's gateway takes it: base64 of either alphabet, with or without its padding, and
//! with the line breaks that `base64`, Python and Java put in; numbers as strings; unknown fields.
//! Invariants: what is held of a body is bounded, by the body or, in a stream, by one message; what becomes of it in memory is charged
//! before it is decoded; a message that a gRPC client could not send is refused in the same words.

use std::error::Error as StdError;

use axum::body::Body;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{Stream, stream};
use http_body_util::BodyExt as _;
use prost::Message as _;
use prost_reflect::{DeserializeOptions, DynamicMessage, MessageDescriptor};

use super::once;
use super::transcoder::Transcoder;
use crate::error::Error;
use crate::node::Client;
use crate::node::account::Account;

/// Bytes before a message: not compressed, and its length.
pub(super) const FRAME_HEAD_BYTES: usize = 5;

/// What the decoding of JSON takes: of a byte, of a value in a list, and of an object.
const JSON_BYTE: u64 = 2;
const JSON_VALUE_BYTES: u64 = 128;
const JSON_OBJECT_BYTES: u64 = 1536;

/// How the bodies of one call are read.
#[derive(Clone)]
pub(super) struct Reader {
    pub(super) transcoder: Transcoder,
    pub(super) account: Account,
    pub(super) client: Client,
    /// What the method takes.
    pub(super) input: MessageDescriptor,
    pub(super) limits: Limits,
}

/// Most bytes, of a message in JSON and as gRPC has it.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) body_bytes_max: usize,
    pub(super) message_bytes_max: usize,
}

impl Reader {
    /// The one message of a body; an empty body is an empty message.
    pub(super) async fn one(&self, body: Body) -> Result<Bytes, Error> {
        let body = match http_body_util::Limited::new(body, self.limits.body_bytes_max).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => return Err(self.too_large()),
            Err(error) => return Err(malformed(error)),
        };
        self.decode(body).await
    }

    /// The messages of a body, as they come: any number, one after the other.
    pub(super) fn many(self, body: Body) -> impl Stream<Item = Result<Bytes, Box<dyn StdError + Send + Sync>>> {
        let arriving = Arriving { reader: self, body, buffer: BytesMut::new(), extent: Extent::default() };
        stream::try_unfold(arriving, |mut arriving| async move {
            let next = arriving.next().await.map_err(Error::into_boxed)?;
            Ok(next.map(|message| (message, arriving)))
        })
    }

    fn too_large(&self) -> Error {
        let max = self.limits.body_bytes_max;
        Error::MessageTooLarge(format!("quorate: request body is larger than {max} bytes"))
    }

    async fn decode(&self, text: Bytes) -> Result<Bytes, Error> {
        let decoding = self.account.received.take(&self.client, decoded_bytes(&text))?;
        let (input, max) = (self.input.clone(), self.limits.message_bytes_max);
        let framed = self.transcoder.run(text.len(), move || framed(&input, &text, max)).await;
        drop(decoding);
        framed
    }
}

/// A stream of messages on its way in.
struct Arriving {
    reader: Reader,
    body: Body,
    buffer: BytesMut,
    extent: Extent,
}

impl Arriving {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(end) = self.extent.find(&self.buffer) {
                self.extent = Extent::default();
                let text = self.buffer.split_to(end).freeze();
                return self.reader.decode(text).await.map(Some);
            }
            if self.buffer.len() > self.reader.limits.body_bytes_max {
                return Err(self.reader.too_large());
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Some(Err(error)) => return Err(malformed(error)),
                None if self.buffer.trim_ascii().is_empty() => return Ok(None),
                // It ends inside of a message; the decoder says where.
                None => return self.reader.decode(self.buffer.split().freeze()).await.map(Some),
            }
        }
    }
}

/// Looks for the end of an object in text that arrives in pieces.
#[derive(Default)]
struct Extent {
    /// So much was looked at.
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Extent {
    /// `text` begins with what it was given before.
    fn find(&mut self, text: &[u8]) -> Option<usize> {
        while let Some(byte) = text.get(self.at) {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if self.depth > 0 => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' => self.depth += 1,
                b'}' if self.depth > 1 => self.depth -= 1,
                b'}' if self.depth == 1 => return Some(self.at),
                // No object begins so: malformed, which the decoder says.
                byte if self.depth == 0 && !byte.is_ascii_whitespace() => return Some(text.len()),
                _ => {}
            }
        }
        None
    }
}

/// What a body takes at most while it is decoded.
fn decoded_bytes(body: &[u8]) -> u64 {
    let of = |byte: &u8| match byte {
        b'{' => JSON_OBJECT_BYTES,
        b'[' | b',' => JSON_VALUE_BYTES,
        _ => 0,
    };
    body.len() as u64 * JSON_BYTE + body.iter().map(of).sum::<u64>()
}

fn malformed(error: impl std::fmt::Display) -> Error {
    Error::InvalidRequest(format!("request body: {error}"))
}

/// A message as gRPC has it on the wire.
fn framed(input: &MessageDescriptor, text: &[u8], bytes_max: usize) -> Result<Bytes, Error> {
    let message = if text.trim_ascii().is_empty() {
        DynamicMessage::new(input.clone())
    } else {
        // Line breaks are looked for only where something was wrong.
        let parsed = parse(input, text);
        let parsed =
            parsed.or_else(|error| without_line_breaks(text).and_then(|text| parse(input, &text).ok()).ok_or(error));
        parsed.map_err(malformed)?
    };
    let bytes = message.encoded_len();
    if bytes > bytes_max {
        return Err(Error::message_too_large(bytes, bytes_max));
    }
    let mut framed = BytesMut::with_capacity(FRAME_HEAD_BYTES + bytes);
    framed.put_u8(0);
    framed.put_u32(bytes as u32);
    message.encode(&mut framed).expect("a buffer grows");
    Ok(framed.freeze())
}

fn parse(input: &MessageDescriptor, text: &[u8]) -> Result<DynamicMessage, serde_json::Error> {
    once::check(input, &mut serde_json::Deserializer::from_slice(text))?;
    let mut json = serde_json::Deserializer::from_slice(text);
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(input.clone(), &mut json, &options)?;
    json.end()?;
    Ok(message)
}

/// The same without the line breaks inside of strings; `None` if there are none.
fn without_line_breaks(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    // Outside of strings no backslash is valid.
    while let Some(byte) = rest.next() {
        match (byte, rest.as_slice().first()) {
            (b'\\', Some(b'n' | b'r')) => {
                rest.next();
            }
            (b'\\', Some(escaped)) => {
                out.extend([*byte, *escaped]);
                rest.next();
            }
            _ => out.push(*byte),
        }
    }
    (out.len() < text.len()).then_some(out)
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use prost_reflect::DescriptorPool;

    use super::*;
    use crate::env::Env;
    use crate::pb::etcd::{PutRequest, WatchRequest};

    fn input(name: &str) -> MessageDescriptor {
        let pool = DescriptorPool::decode(crate::pb::PUBLIC_DESCRIPTORS).unwrap();
        pool.get_message_by_name(&format!("etcdserverpb.{name}")).unwrap()
    }

    fn put(json: &str) -> Result<PutRequest, String> {
        let framed = framed(&input("PutRequest"), json.as_bytes(), 1000).map_err(|error| error.to_string())?;
        Ok(PutRequest::decode(&framed[FRAME_HEAD_BYTES..]).unwrap())
    }

    #[test]
    fn json_is_taken_in_every_form_that_it_may_have() {
        let expected = put(r#"{"key":"Zm9v","value":"YmFy","lease":"7","prev_kv":true}"#).unwrap();
        assert_eq!(
            (&expected.key[..], &expected.value[..], expected.lease, expected.prev_kv),
            (&b"foo"[..], &b"bar"[..], 7, true)
        );
        for same in [
            r#" {"key":"Zm9v","value":"YmFy","lease":7,"prevKv":true} "#,
            r#"{"key":"Zm9v","value":"YmFy","lease":7,"prev_kv":true,"unknown":[{}],"ignore_value":null}"#,
        ] {
            assert_eq!(put(same).as_ref(), Ok(&expected), "{same}");
        }
        assert_eq!(put(""), Ok(Default::default()));
    }

    /// As coreutils, Python's `encodebytes`, Java's MIME encoder and browsers make it; with what etcd's gateway takes beside them.
    #[test]
    fn base64_is_taken_in_every_form_that_programs_make() {
        for (text, value) in [
            ("-_8=", &b"\xfb\xff"[..]),
            ("-_8", b"\xfb\xff"),
            ("+/8=", b"\xfb\xff"),
            ("+/8", b"\xfb\xff"),
            ("YR==", b"a"),
            ("Zm9v\\nYmFy", b"foobar"),
            ("Zm9v\\r\\nYm\\nFy\\n", b"foobar"),
            ("YQ==\\n", b"a"),
        ] {
            let expected = PutRequest { key: bytes::Bytes::copy_from_slice(value), ..Default::default() };
            assert_eq!(put(&format!(r#"{{"key":"{text}"}}"#)), Ok(expected), "{text}");
        }
        for refused in ["+_8=", "Zm9v YmFy", "Y", "Y!\\n", "Y\\tQ=="] {
            let error = put(&format!(r#"{{"key":"{refused}"}}"#)).expect_err(refused);
            assert!(error.starts_with("quorate: request body: "), "{error}");
        }
    }

    #[test]
    fn what_json_becomes_is_known_before_it_is_decoded() {
        assert_eq!(decoded_bytes(b"{}"), 2 * JSON_BYTE + JSON_OBJECT_BYTES);
        let many = [&b"{\"success\":["[..], &b"{},".repeat(1000), b"{}]}"].concat();
        assert!(decoded_bytes(&many) > 1000 * JSON_OBJECT_BYTES);
    }

    #[test]
    fn malformed_json_is_refused_with_the_place() {
        for broken in ["{", "[]", r#"{"key":1}"#, r#"{"key":"!"}"#, r#"{"lease":"x"}"#, "{} {}", "nonsense"] {
            let text = put(broken).expect_err(broken);
            assert!(text.starts_with("quorate: request body: ") && text.contains("line 1"), "{broken}: {text}");
        }
    }

    #[test]
    fn field_that_is_there_twice_is_refused_under_either_of_its_names() {
        for (name, json) in [
            ("RangeRequest", r#"{"key":"YQ==","key":"Yg=="}"#),
            ("RangeRequest", r#"{"key":"YQ==","key":null}"#),
            ("RangeRequest", r#"{"range_end":"YQ==","rangeEnd":"Yg=="}"#),
            ("TxnRequest", r#"{"compare":[{},{"key":"YQ==","key":"YQ=="}]}"#),
            ("TxnRequest", r#"{"success":[{"request_put":{"key":"YQ==","key":"YQ=="}}]}"#),
            ("TxnRequest", r#"{"success":[],"success":[]}"#),
        ] {
            let error = framed(&input(name), json.as_bytes(), 1000).expect_err(json).to_string();
            assert!(error.contains("duplicate field") && error.contains("line 1"), "{json}: {error}");
        }
        // What is not known is nothing, however often; and each message of a list has its own fields.
        for (name, json) in [
            ("RangeRequest", r#"{"key":"YQ==","x":1,"x":[{"y":1,"y":2}]}"#),
            ("TxnRequest", r#"{"compare":[{"key":"YQ=="},{"key":"YQ=="}]}"#),
        ] {
            assert!(framed(&input(name), json.as_bytes(), 1000).is_ok(), "{json}");
        }
    }

    #[test]
    fn enums_are_taken_by_name_and_number() {
        let range = input("RangeRequest");
        let [by_name, by_number] = [r#"{"sort_order":"DESCEND"}"#, r#"{"sortOrder":2}"#]
            .map(|json| framed(&range, json.as_bytes(), 100).unwrap());
        assert_eq!(by_name, by_number);
        let unknown = framed(&range, br#"{"sort_order":"UPWARDS"}"#, 100).unwrap();
        assert_eq!(unknown.len(), FRAME_HEAD_BYTES, "an unknown name is as an unknown field: not there");
    }

    #[test]
    fn message_that_grpc_would_refuse_is_refused_in_its_words() {
        let long = format!(r#"{{"key":"{}"}}"#, "A".repeat(1400));
        assert_eq!(put(&long), Err("grpc: received message larger than max (1053 vs. 1000)".into()));
    }

    /// However a body is cut, its messages are found as soon as they are whole.
    #[tokio::test]
    async fn messages_of_a_stream_are_found_however_it_is_cut() {
        let sent = [
            r#"{"create_request":{"key":"YQ=="}}"#,
            " {\"cancel_request\" : {\"watch_id\":\"7\"} }\n",
            r#"{"unknown":"}\"{\\","progress_request":{}}"#,
        ];
        let all = sent.concat();
        let expected: Vec<Bytes> =
            sent.iter().map(|text| framed(&input("WatchRequest"), text.as_bytes(), 1000).unwrap()).collect();
        for size in [1, 2, 3, 7, 40, all.len()] {
            let pieces: Vec<_> = all.as_bytes().chunks(size).map(Bytes::copy_from_slice).map(Ok::<_, Error>).collect();
            let open = stream::iter(pieces).chain(stream::pending());
            let found: Vec<_> = reader("WatchRequest").many(Body::from_stream(open)).take(3).collect().await;
            assert_eq!(found.into_iter().map(Result::unwrap).collect::<Vec<_>>(), expected, "in pieces of {size}");
        }
        assert!(WatchRequest::decode(&expected[1][FRAME_HEAD_BYTES..]).unwrap().request_union.is_some());
    }

    fn reader(name: &str) -> Reader {
        Reader {
            transcoder: Transcoder { env: Env::real(), asker: crate::env::Asker::MEMBER },
            account: Account::new(1 << 20, 1 << 20, 1),
            client: Client::default(),
            input: input(name),
            limits: Limits { body_bytes_max: 1000, message_bytes_max: 1000 },
        }
    }

    #[tokio::test]
    async fn stream_of_nonsense_or_without_an_end_is_refused() {
        for (text, why) in [
            ("nonsense", "line 1"),
            ("{}[]", "line 1"),
            ("{\"key\":", "EOF"),
            ("\"", "line 1"),
            (&*format!("{{\"key\":\"{}", "A".repeat(2000)), "larger than 1000 bytes"),
        ] {
            let found: Vec<_> = reader("WatchRequest").many(Body::from(text.to_owned())).collect().await;
            let error = found.into_iter().last().unwrap().expect_err(text);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
        assert_eq!(reader("WatchRequest").many(Body::from(" \n ")).count().await, 0);
    }
}
