//! The codec between members: every message ends in a checksum of itself.
//!
//! TCP's own checksum has 16 bits, and memory on the way has none: a flipped bit in an append or a read index must not reach the
//! log or a client. The checksum is the last field of the message (number 2047, CRC-32C of all before it), which a build that
//! does not know it skips; a message without one, from such a build, is taken as it is.
//! Absent: clients' messages, which are etcd's.

use std::marker::PhantomData;

use bytes::{Buf as _, BufMut as _, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Tag of field 2047 with wire type fixed32.
const TAG: [u8; 2] = [0xfd, 0x7f];
const TRAILER_BYTES: usize = TAG.len() + 4;

/// Sends `T`, takes `U`.
pub struct CheckedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for CheckedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for CheckedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = CheckedEncoder<T>;
    type Decoder = CheckedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        CheckedEncoder { scratch: Vec::new(), message: PhantomData }
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder(PhantomData)
    }
}

/// Appends the checksum.
pub struct CheckedEncoder<T> {
    scratch: Vec<u8>,
    message: PhantomData<T>,
}

impl<T: Message> Encoder for CheckedEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        seal(&item, &mut self.scratch);
        buf.reserve(self.scratch.len());
        buf.put_slice(&self.scratch);
        // A stream's encoder lives long: one large message must not be remembered for ever.
        if self.scratch.capacity() > 1 << 20 {
            self.scratch = Vec::new();
        }
        Ok(())
    }
}

/// Verifies the checksum.
pub struct CheckedDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for CheckedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        open(buf.copy_to_bytes(buf.remaining())).map(Some)
    }
}

/// The message with its checksum, in the place of what `into` holds.
pub fn seal(message: &impl Message, into: &mut Vec<u8>) {
    into.clear();
    into.reserve(message.encoded_len() + TRAILER_BYTES);
    message.encode_raw(into);
    let crc = crc32c::crc32c(into);
    into.extend_from_slice(&TAG);
    into.extend_from_slice(&crc.to_le_bytes());
}

/// The message, if its checksum is right or it has none. DataLoss makes the sender try again.
pub fn open<M: Message + Default>(mut bytes: Bytes) -> Result<M, Status> {
    let end = bytes.len().saturating_sub(TRAILER_BYTES);
    if let Some([a, b, crc @ ..]) = bytes.get(end..)
        && [*a, *b] == TAG
        && let Ok(crc) = <[u8; 4]>::try_from(crc)
    {
        if crc32c::crc32c(&bytes[..end]) != u32::from_le_bytes(crc) {
            return Err(Status::data_loss("checksum mismatch in a member's message; it was damaged on its way"));
        }
        bytes.truncate(end);
    }
    M::decode(bytes).map_err(|error| Status::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::log::{Entry, LogId, Vote, entry};
    use crate::pb::peer::AppendRequest;

    fn request() -> AppendRequest {
        let payload = Some(entry::Payload::Batch(vec![7; 300].into()));
        AppendRequest {
            vote: Some(Vote { term: 3, member: 1, committed: true }),
            entries: vec![Entry { log_id: Some(LogId { term: 3, index: 9 }), payload }],
            leader_commit: Some(LogId { term: 3, index: 8 }),
            ..AppendRequest::default()
        }
    }

    #[test]
    fn every_flipped_bit_of_a_message_is_found() {
        let mut sealed = Vec::new();
        seal(&request(), &mut sealed);
        assert_eq!(open::<AppendRequest>(sealed.clone().into()).unwrap(), request());
        let end = sealed.len() - TRAILER_BYTES;
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let opened = open::<AppendRequest>(bad.into());
            // In the trailer's own tag the message is whole, and may be taken for one without a checksum.
            let in_tag = (end..end + TAG.len()).contains(&(bit / 8));
            assert!(opened.is_err() || in_tag && opened.unwrap() == request(), "bit {bit}");
        }
    }

    #[test]
    fn builds_without_the_checksum_are_understood_and_understand() {
        let plain = request().encode_to_vec();
        assert_eq!(open::<AppendRequest>(plain.into()).unwrap(), request());
        let mut sealed = Vec::new();
        seal(&request(), &mut sealed);
        assert_eq!(AppendRequest::decode(&sealed[..]).unwrap(), request(), "an unknown field is skipped");
        seal(&AppendRequest::default(), &mut sealed);
        assert_eq!(open::<AppendRequest>(sealed.into()).unwrap(), AppendRequest::default());
    }
}
