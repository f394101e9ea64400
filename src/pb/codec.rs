//! Protobuf on gRPC, but that a message's buffer is made in its size.
//!
//! tonic's own codec lets the buffer grow while it encodes, by copying: an answer of 100 MB would take up to three times that for a
//! moment. Absent: everything else, which is tonic's.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic_prost::ProstCodec;

/// The codec of every service and client of this project; sends `T`, takes `U`.
pub struct ExactCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for ExactCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Encodes into exactly the room that is needed.
pub struct ExactEncoder<T>(PhantomData<T>);

impl<T, U> Codec for ExactCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ExactEncoder<T>;
    type Decoder = <ProstCodec<T, U> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ExactEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::default().decoder()
    }
}

impl<T: Message> Encoder for ExactEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let bytes = item.encoded_len();
        // For a small one, what tonic has reserved will do.
        if bytes > RESERVED_BYTES {
            buf.reserve(bytes);
        }
        item.encode_raw(buf);
        Ok(())
    }
}

/// What tonic has room for before a message.
const RESERVED_BYTES: usize = 8 << 10;
