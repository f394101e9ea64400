//! Protobuf on gRPC, but that a message's buffer is made in its size.
//!
//! tonic's own codec takes 8 KiB for every call in and out, which most never fill, and lets the buffer grow while it encodes, by copying:
//! an answer of 100 MB would take up to three times that for a moment. Absent: everything else, which is tonic's.

use std::marker::PhantomData;

use bytes::{BufMut, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic_prost::{ProstCodec, ProstDecoder};

use crate::env::threads::in_place_now;

/// Of a message on the wire before its content: whether it is compressed, and its length.
pub const PREFIX_BYTES: usize = 5;
/// Room that a call has in each direction before a message's size is known, in bytes.
const ROOM_BYTES: usize = 1 << 10;
/// A message of so many bytes is encoded in about a millisecond; a larger one would hold up others on its thread.
const AT_ONCE_BYTES: usize = 2 << 20;
/// Messages of a stream that are ready together leave together, up to so many bytes; as tonic has it.
const TOGETHER_BYTES: usize = 32 << 10;

fn buffers() -> BufferSettings {
    BufferSettings::new(ROOM_BYTES, TOGETHER_BYTES)
}

/// The codec of every service and client of this project; sends `T`, takes `U`.
pub struct ExactCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for ExactCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Makes the room that is needed before it encodes.
pub struct ExactEncoder<T>(PhantomData<T>);

impl<T, U> Codec for ExactCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ExactEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ExactEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(buffers())
    }
}

impl<T: Message> Encoder for ExactEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let bytes = item.encoded_len();
        buf.reserve(bytes);
        encode(item, bytes, buf);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// Writes `item`, which takes so many bytes, and lets go of it.
fn encode<T: Message>(item: T, bytes: usize, buf: &mut impl BufMut) {
    let encode = move || {
        item.encode_raw(buf);
        // An answer of many keys takes as long to let go of.
        drop(item);
    };
    if bytes > AT_ONCE_BYTES { in_place_now(encode) } else { encode() }
}

/// A message as gRPC has it on the wire: not compressed, its length, its content.
pub fn framed<T: Message>(item: T) -> Bytes {
    let bytes = item.encoded_len();
    let mut buf = Vec::with_capacity(PREFIX_BYTES + bytes);
    buf.put_u8(0);
    // No answer is longer: what is large is written in pieces, and bounded (`api::answers`).
    buf.put_u32(u32::try_from(bytes).unwrap_or(u32::MAX));
    encode(item, bytes, &mut buf);
    buf.into()
}
