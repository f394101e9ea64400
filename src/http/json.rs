//! Large answers as JSON, in pieces: the same text as the gateway's, without a tree of it in memory first.
//!
//! Owns the fields of the messages that may be large; any other message goes by its descriptor (`gateway`). Fields that are unset are
//! left out, 64-bit numbers are strings, bytes are base64.

use std::io::Write as _;

use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;

use crate::pb::KeyValue;
use crate::pb::etcd::response_op::Response as OpResponse;
use crate::pb::etcd::{
    DeleteRangeResponse, LeaseTimeToLiveResponse, PutResponse, RangeResponse, ResponseHeader, TxnResponse,
};
use crate::pb::pieces::{LargeAnswer, Pieces};

/// The answer's text.
pub(super) fn pieces(answer: LargeAnswer) -> Pieces {
    let mut out = Pieces::default();
    match answer {
        LargeAnswer::Range(answer) => range(&mut out, answer),
        LargeAnswer::DeleteRange(answer) => delete_range(&mut out, answer),
        LargeAnswer::Txn(answer) => txn(&mut out, answer),
        LargeAnswer::TimeToLive(answer, keys) => time_to_live(&mut out, answer, keys),
    }
    out
}

/// An object that is being written.
struct Object<'a> {
    out: &'a mut Pieces,
    is_empty: bool,
}

impl<'a> Object<'a> {
    fn begin(out: &'a mut Pieces) -> Self {
        out.text("{");
        Self { out, is_empty: true }
    }

    /// Begins a field; its value follows.
    fn field(&mut self, name: &str) -> &mut Pieces {
        let comma = if std::mem::replace(&mut self.is_empty, false) { "" } else { "," };
        self.out.text(format!("{comma}\"{name}\":"));
        self.out
    }

    fn int(&mut self, name: &str, value: impl Into<i128>) {
        let value = value.into();
        if value != 0 {
            self.field(name).text(format!("\"{value}\""));
        }
    }

    fn flag(&mut self, name: &str, value: bool) {
        if value {
            self.field(name).text("true");
        }
    }

    /// A list with what `write` makes of each version.
    fn list(
        &mut self,
        name: &str,
        versions: Vec<KeyValue>,
        mut write: impl FnMut(&KeyValue, &mut Vec<u8>) + Send + 'static,
    ) {
        if versions.is_empty() {
            return;
        }
        let out = self.field(name);
        out.text("[");
        out.versions(versions, move |kv, is_first, out| {
            if !is_first {
                out.push(b',');
            }
            write(kv, out);
        });
        out.text("]");
    }

    fn header(&mut self, header: Option<ResponseHeader>) {
        let Some(header) = header else { return };
        let mut object = Object::begin(self.field("header"));
        object.int("cluster_id", header.cluster_id);
        object.int("member_id", header.member_id);
        object.int("revision", header.revision);
        object.int("raft_term", header.raft_term);
        object.end();
    }

    fn end(self) {
        self.out.text("}");
    }
}

fn version(kv: &KeyValue, out: &mut Vec<u8>) {
    let fields = kv.fields();
    let mut comma = "";
    out.push(b'{');
    let mut field = |name: &str, value: &dyn std::fmt::Display| {
        // A buffer takes everything.
        let _ = write!(out, "{comma}\"{name}\":\"{value}\"");
        comma = ",";
    };
    let bytes = |bytes| Base64Display::new(bytes, &STANDARD);
    if !fields.key.is_empty() {
        field("key", &bytes(fields.key));
    }
    let numbers = [
        ("create_revision", fields.create_revision),
        ("mod_revision", fields.mod_revision),
        ("version", fields.version),
    ];
    for (name, number) in numbers.into_iter().filter(|(_, number)| *number != 0) {
        field(name, &number);
    }
    if !fields.value.is_empty() {
        field("value", &bytes(fields.value));
    }
    if fields.lease != 0 {
        field("lease", &fields.lease);
    }
    out.push(b'}');
}

fn range(out: &mut Pieces, answer: RangeResponse) {
    let mut object = Object::begin(out);
    object.header(answer.header);
    object.list("kvs", answer.kvs, version);
    object.flag("more", answer.more);
    object.int("count", answer.count);
    object.end();
}

fn put(out: &mut Pieces, answer: PutResponse) {
    let mut object = Object::begin(out);
    object.header(answer.header);
    if let Some(kv) = answer.prev_kv {
        object.field("prev_kv").versions(vec![kv], |kv, _, out| version(kv, out));
    }
    object.end();
}

fn delete_range(out: &mut Pieces, answer: DeleteRangeResponse) {
    let mut object = Object::begin(out);
    object.header(answer.header);
    object.int("deleted", answer.deleted);
    object.list("prev_kvs", answer.prev_kvs, version);
    object.end();
}

fn time_to_live(out: &mut Pieces, answer: LeaseTimeToLiveResponse, keys: Vec<KeyValue>) {
    let mut object = Object::begin(out);
    object.header(answer.header);
    object.int("ID", answer.id);
    object.int("TTL", answer.ttl);
    object.int("grantedTTL", answer.granted_ttl);
    object.list("keys", keys, |kv, out| {
        let _ = write!(out, "\"{}\"", Base64Display::new(kv.key(), &STANDARD));
    });
    object.end();
}

fn txn(out: &mut Pieces, answer: TxnResponse) {
    let mut object = Object::begin(out);
    object.header(answer.header);
    object.flag("succeeded", answer.succeeded);
    if !answer.responses.is_empty() {
        let out = object.field("responses");
        for (at, op) in answer.responses.into_iter().enumerate() {
            out.text(if at == 0 { "[" } else { "," });
            let mut inner = Object::begin(out);
            match op.response {
                Some(OpResponse::ResponseRange(answer)) => range(inner.field("response_range"), answer),
                Some(OpResponse::ResponsePut(answer)) => put(inner.field("response_put"), answer),
                Some(OpResponse::ResponseDeleteRange(answer)) => {
                    delete_range(inner.field("response_delete_range"), answer);
                }
                Some(OpResponse::ResponseTxn(answer)) => txn(inner.field("response_txn"), answer),
                None => {}
            }
            inner.end();
        }
        out.text("]");
    }
    object.end();
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_reflect::{DescriptorPool, DynamicMessage};

    use super::*;
    use crate::http::gateway::OPTIONS;
    use crate::pb::pieces::tests::{some_answer, with_keys};

    #[test]
    fn a_large_answer_has_the_text_that_its_descriptor_gives() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let pool = DescriptorPool::decode(crate::pb::PUBLIC_DESCRIPTORS).unwrap();
        for _ in 0..100 {
            let answer = some_answer(&mut random);
            let (name, encoded) = match &answer {
                LargeAnswer::Range(answer) => ("RangeResponse", answer.encode_to_vec()),
                LargeAnswer::DeleteRange(answer) => ("DeleteRangeResponse", answer.encode_to_vec()),
                LargeAnswer::Txn(answer) => ("TxnResponse", answer.encode_to_vec()),
                LargeAnswer::TimeToLive(answer, keys) => {
                    ("LeaseTimeToLiveResponse", with_keys(answer, keys).encode_to_vec())
                }
            };
            let descriptor = pool.get_message_by_name(&format!("etcdserverpb.{name}")).unwrap();
            let message = DynamicMessage::decode(descriptor, &encoded[..]).unwrap();
            let mut expected = Vec::new();
            message.serialize_with_options(&mut serde_json::Serializer::new(&mut expected), &OPTIONS).unwrap();
            let text = pieces(answer).collect::<Vec<_>>().concat();
            assert!(text == expected, "{}\n{}", String::from_utf8_lossy(&text), String::from_utf8_lossy(&expected));
        }
    }
}
