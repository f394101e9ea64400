//! Encoding of one [`Change`] the way that state records and snapshot files hold it: length-delimited protobuf.
//!
//! Owns the fast path of decoding: a version is taken as the encoding that it is, where prost would rebuild it once a field.
//! Absent: framing and checksums, which belong to the files.

use bytes::Buf as _;
use prost::Message as _;
use prost::encoding::{decode_varint, encoded_len_varint};

use crate::pb::KeyValue;
use crate::pb::log::{Change, change};

/// Tag and wire type of `Change.version`.
const VERSION_TAG: u8 = 0x0a;

/// Bytes that [`encode`] appends.
pub(crate) fn encoded_len(change: &Change) -> usize {
    let len = change.encoded_len();
    encoded_len_varint(len as u64) + len
}

/// Appends `change`, length first.
pub(crate) fn encode(change: &Change, out: &mut Vec<u8>) {
    change.encode_length_delimited(out).expect("a Vec grows");
}

/// Takes the next change off `from`.
pub(crate) fn decode_next(from: &mut &[u8]) -> Result<Change, String> {
    let len = decode_varint(from).map_err(|e| format!("length of a change: {e}"))?;
    if len > from.len() as u64 {
        return Err(format!("a change of {len} bytes where {} are left", from.len()));
    }
    let (body, rest) = from.split_at(len as usize);
    *from = rest;
    decode(body)
}

/// Decodes one change that fills `body`.
pub(crate) fn decode(body: &[u8]) -> Result<Change, String> {
    if let Some(version) = sole_version(body) {
        let version = KeyValue::from_encoded(version).map_err(|e| format!("version of a key: {e}"))?;
        return Ok(Change { change: Some(change::Change::Version(version)) });
    }
    let decoded = Change::decode(body).map_err(|e| format!("change: {e}"))?;
    // Replaying without a change that a newer program wrote would give another state.
    if decoded.change.is_none() {
        return Err("a change of an unknown kind".to_owned());
    }
    Ok(decoded)
}

/// The encoded version, if `body` holds that field and nothing else.
fn sole_version(mut body: &[u8]) -> Option<&[u8]> {
    if body.first() != Some(&VERSION_TAG) {
        return None;
    }
    body.advance(1);
    let len = decode_varint(&mut body).ok()?;
    (len == body.len() as u64).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcd;
    use crate::pb::log::change::Change as Kind;
    use crate::pb::log::{Lease, WantedSize};

    #[test]
    fn every_kind_of_change_survives() {
        let version = KeyValue::tombstone(b"k", 7);
        let mut bytes = Vec::new();
        let lease = Lease { id: -7, ttl: 60, remaining_ttl: 3 };
        let all = [
            Kind::Version(version),
            Kind::Compacted(5),
            Kind::ClusterVersion(2),
            Kind::Lease(lease),
            Kind::WantedSize(WantedSize { start: 1, replicas: 5 }),
        ];
        for kind in &all {
            let change = Change { change: Some(kind.clone()) };
            let before = bytes.len();
            encode(&change, &mut bytes);
            assert_eq!(bytes.len() - before, encoded_len(&change));
        }
        let mut at = &bytes[..];
        for kind in all {
            assert_eq!(decode_next(&mut at).unwrap().change, Some(kind));
        }
        assert!(at.is_empty());
    }

    #[test]
    fn an_unknown_kind_or_a_cut_is_an_error() {
        // Field 15, which nothing has.
        assert!(decode(&[0x7a, 1, 0]).is_err());
        assert!(decode(&etcd::PutRequest::default().encode_to_vec()).is_err());
        let mut bytes = Vec::new();
        encode(&Change { change: Some(Kind::Version(KeyValue::tombstone(b"key", 9))) }, &mut bytes);
        for end in 0..bytes.len() {
            assert!(decode_next(&mut &bytes[..end]).is_err(), "cut at {end}");
        }
    }
}
