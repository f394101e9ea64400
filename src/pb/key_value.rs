//! `mvccpb.KeyValue`, held as its own encoding.
//!
//! A version of a key is encoded once, when it is written; the store keeps these bytes and every answer copies them as
//! they are. Invariant: the bytes are a valid encoding with the fields in ascending order and the key first, made by
//! [`KeyValue::new`] or re-encoded when decoded from the wire. Cloning is a reference count.

use std::sync::Arc;

use bytes::{Buf, BufMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint, skip_field,
};

const KEY: u32 = 1;
/// The encoded tag of a length-delimited field 1.
const KEY_TAG: u8 = 0x0a;
const CREATE_REVISION: u32 = 2;
const MOD_REVISION: u32 = 3;
const VERSION: u32 = 4;
const VALUE: u32 = 5;
const LEASE: u32 = 6;

/// What an encoding takes beside its key and its value, at most: six tags, two lengths, four integers.
pub const HEADS_BYTES_MAX: usize = 6 + 2 * 5 + 4 * 10;
/// The same of a tombstone, which has only a key and a revision.
pub const TOMBSTONE_HEADS_BYTES_MAX: usize = 2 + 5 + 10;

/// One version of one key (`proto/kv.proto`). A tombstone has version 0 and no value.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct KeyValue(Arc<[u8]>);

/// The fields of a [`KeyValue`], borrowed from its encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields<'a> {
    pub key: &'a [u8],
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub value: &'a [u8],
    pub lease: i64,
}

impl KeyValue {
    /// Encodes a version; copies `key` and `value` into one exact allocation.
    pub fn new(fields: Fields<'_>) -> Self {
        let mut out = Vec::with_capacity(fields.key.len() + fields.value.len() + 48);
        put_bytes(&mut out, KEY, fields.key);
        put_int(&mut out, CREATE_REVISION, fields.create_revision);
        put_int(&mut out, MOD_REVISION, fields.mod_revision);
        put_int(&mut out, VERSION, fields.version);
        put_bytes(&mut out, VALUE, fields.value);
        put_int(&mut out, LEASE, fields.lease);
        Self(out.into())
    }

    /// The deletion of `key` at `mod_revision`.
    pub fn tombstone(key: &[u8], mod_revision: i64) -> Self {
        #[cfg(test)]
        looks::touch(key.len());
        Self::new(Fields { key, mod_revision, ..Fields::default() })
    }

    /// The same version without its value. Copies the key.
    pub fn without_value(&self) -> Self {
        let fields = self.fields();
        #[cfg(test)]
        looks::touch(fields.key.len());
        Self::new(Fields { value: &[], ..fields })
    }

    /// All fields, parsed; a few nanoseconds.
    pub fn fields(&self) -> Fields<'_> {
        #[cfg(test)]
        looks::count();
        parse(&self.0).expect("a KeyValue holds a valid encoding")
    }

    /// The key; cheaper than [`Self::fields`], since it comes first. The index compares by it.
    #[inline]
    pub fn key(&self) -> &[u8] {
        #[cfg(test)]
        looks::count();
        match &*self.0 {
            // A length below 128 is one byte.
            [KEY_TAG, len, rest @ ..] if *len < 0x80 => &rest[..usize::from(*len)],
            [KEY_TAG, rest @ ..] => {
                let mut at = rest;
                let len = decode_varint(&mut at).expect("a KeyValue holds a valid encoding") as usize;
                &at[..len]
            }
            _ => &[],
        }
    }

    pub fn mod_revision(&self) -> i64 {
        self.fields().mod_revision
    }

    pub fn create_revision(&self) -> i64 {
        self.fields().create_revision
    }

    pub fn version(&self) -> i64 {
        self.fields().version
    }

    pub fn value(&self) -> &[u8] {
        self.fields().value
    }

    pub fn lease(&self) -> i64 {
        self.fields().lease
    }

    pub fn is_tombstone(&self) -> bool {
        self.version() == 0
    }

    /// The encoding.
    pub fn as_encoded(&self) -> &[u8] {
        &self.0
    }

    /// Takes an encoding, checked and normalized.
    pub fn from_encoded(bytes: &[u8]) -> Result<Self, DecodeError> {
        parse(bytes).map(Self::new)
    }
}

impl std::fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let x = self.fields();
        f.debug_struct("KeyValue")
            .field("key", &String::from_utf8_lossy(x.key))
            .field("create_revision", &x.create_revision)
            .field("mod_revision", &x.mod_revision)
            .field("version", &x.version)
            .field("value_bytes", &x.value.len())
            .field("lease", &x.lease)
            .finish()
    }
}

fn put_bytes(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        encode_key(tag, WireType::LengthDelimited, out);
        encode_varint(bytes.len() as u64, out);
        out.extend_from_slice(bytes);
    }
}

fn put_int(out: &mut Vec<u8>, tag: u32, value: i64) {
    if value != 0 {
        encode_key(tag, WireType::Varint, out);
        encode_varint(value as u64, out);
    }
}

fn parse(bytes: &[u8]) -> Result<Fields<'_>, DecodeError> {
    let mut fields = Fields::default();
    let mut at = bytes;
    while !at.is_empty() {
        let (tag, wire) = decode_key(&mut at)?;
        match (tag, wire) {
            (KEY, WireType::LengthDelimited) => fields.key = take(&mut at)?,
            (VALUE, WireType::LengthDelimited) => fields.value = take(&mut at)?,
            (CREATE_REVISION, WireType::Varint) => fields.create_revision = decode_varint(&mut at)? as i64,
            (MOD_REVISION, WireType::Varint) => fields.mod_revision = decode_varint(&mut at)? as i64,
            (VERSION, WireType::Varint) => fields.version = decode_varint(&mut at)? as i64,
            (LEASE, WireType::Varint) => fields.lease = decode_varint(&mut at)? as i64,
            _ => skip_field(wire, tag, &mut at, DecodeContext::default())?,
        }
    }
    Ok(fields)
}

fn take<'a>(at: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let len = decode_varint(at)? as usize;
    if len > at.len() {
        // prost has no public constructor for its error: let its own decoder say "buffer underflow".
        let mut sink = bytes::Bytes::new();
        let mut short: &[u8] = &[1];
        prost::encoding::bytes::merge(WireType::LengthDelimited, &mut sink, &mut short, DecodeContext::default())?;
    }
    let (head, tail) = at.split_at(len);
    *at = tail;
    Ok(head)
}

impl prost::Message for KeyValue {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        // Decoding happens in clients and tools; rebuilding once a field is simple, and fast enough for them.
        let mut key = bytes::Bytes::new();
        let old = self.clone();
        let mut fields = old.fields();
        match tag {
            KEY => {
                prost::encoding::bytes::merge(wire_type, &mut key, buf, ctx)?;
                fields.key = &key;
            }
            VALUE => {
                prost::encoding::bytes::merge(wire_type, &mut key, buf, ctx)?;
                fields.value = &key;
            }
            CREATE_REVISION => prost::encoding::int64::merge(wire_type, &mut fields.create_revision, buf, ctx)?,
            MOD_REVISION => prost::encoding::int64::merge(wire_type, &mut fields.mod_revision, buf, ctx)?,
            VERSION => prost::encoding::int64::merge(wire_type, &mut fields.version, buf, ctx)?,
            LEASE => prost::encoding::int64::merge(wire_type, &mut fields.lease, buf, ctx)?,
            _ => return skip_field(wire_type, tag, buf, ctx),
        }
        *self = Self::new(fields);
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Bytes that a length-delimited field of `len` bytes takes with a one-byte tag.
pub fn delimited_len(len: usize) -> usize {
    1 + encoded_len_varint(len as u64) + len
}

/// Two values in the order of their bytes. They may be long, and what compares many of them counts that (`kv`).
pub fn compare_values(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    #[cfg(test)]
    looks::touch(a.iter().zip(b).take_while(|(a, b)| a == b).count());
    a.cmp(b)
}

/// How often this thread has looked into a version, and how many bytes of keys and values it has compared or copied: what a test can
/// hold against how many there are, on any machine.
#[cfg(test)]
pub(crate) mod looks {
    use std::cell::Cell;

    thread_local! {
        static LOOKS: Cell<u64> = const { Cell::new(0) };
        static TOUCHED: Cell<u64> = const { Cell::new(0) };
    }

    pub(crate) fn touch(bytes: usize) {
        TOUCHED.set(TOUCHED.get() + bytes as u64);
    }

    pub(crate) fn touched_so_far() -> u64 {
        TOUCHED.get()
    }

    pub(super) fn count() {
        LOOKS.set(LOOKS.get() + 1);
    }

    pub(crate) fn so_far() -> u64 {
        LOOKS.get()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn encoding_survives_the_wire() {
        let kv = KeyValue::new(Fields {
            key: b"k",
            create_revision: 3,
            mod_revision: 300,
            version: 2,
            value: &[7; 300],
            lease: -1,
        });
        let wire = kv.encode_to_vec();
        assert_eq!(KeyValue::decode(&wire[..]).unwrap(), kv);
        assert_eq!(KeyValue::from_encoded(&wire).unwrap(), kv);
        assert_eq!((kv.key(), kv.value().len(), kv.lease()), (&b"k"[..], 300, -1));
    }

    #[test]
    fn a_truncated_encoding_is_an_error() {
        let wire =
            KeyValue::new(Fields { key: b"key", value: b"value", version: 1, ..Fields::default() }).encode_to_vec();
        assert!(KeyValue::from_encoded(&wire[..wire.len() - 1]).is_err());
        assert!(KeyValue::from_encoded(&wire[..3]).is_err());
    }

    #[test]
    fn a_tombstone_has_neither_version_nor_value() {
        let gone = KeyValue::tombstone(b"k", 9);
        assert!(gone.is_tombstone());
        assert_eq!(gone.mod_revision(), 9);
    }
}
