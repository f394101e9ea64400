//! gzip'd messages of gRPC requests, made plain before anybody else sees them.
//!
//! Invariants: a message is no longer than one that comes plain may be, before and after; what it grows to is charged to its client as it
//! grows. Absent: other codings, which whoever reads the messages refuses; coded answers, which no client needs: each message says what it is.

use std::io::Read as _;

use axum::http::{HeaderMap, HeaderName};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::read::MultiGzDecoder;

use crate::env::threads::in_place_now;
use crate::error::Error;
use crate::node::account::Taken;
use crate::pb::codec::PREFIX_BYTES;

pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// A message grows by so much at a time.
const STEP_BYTES: usize = 16 << 10;
/// A shorter message is made plain at once.
const SHORT_BYTES: usize = 1 << 10;

/// The messages of one request.
pub(super) struct Inflate {
    bytes_max: usize,
    /// A message that is not whole yet.
    held: BytesMut,
}

impl Inflate {
    /// For a request that says that its messages may be gzip'd; from then on it does not say so any more.
    pub(super) fn of(headers: &mut HeaderMap, bytes_max: usize) -> Option<Self> {
        if headers.get(ENCODING)?.as_bytes() != b"gzip" {
            return None;
        }
        headers.remove(ENCODING);
        Some(Self { bytes_max, held: BytesMut::new() })
    }

    /// Whether what has arrived ends inside of a message.
    pub(super) fn is_cut_off(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes what has arrived and gives the messages that are whole. `taken` grows by what they take; how much that is comes along.
    pub(super) fn pass(&mut self, arrived: &[u8], taken: &Taken) -> Result<(Bytes, u64), Error> {
        self.held.extend_from_slice(arrived);
        let (mut out, mut more) = (BytesMut::new(), 0);
        while let Some([is_coded, length @ ..]) = self.held.first_chunk::<PREFIX_BYTES>() {
            let (is_coded, bytes) = (*is_coded != 0, u32::from_be_bytes(*length) as usize);
            if self.held.len() < PREFIX_BYTES + bytes {
                break;
            }
            let mut message = self.held.split_to(PREFIX_BYTES + bytes);
            if !is_coded {
                out.extend_from_slice(&message);
                continue;
            }
            message.advance(PREFIX_BYTES);
            let work = || plain(&message, self.bytes_max, taken);
            let message = if bytes > SHORT_BYTES { in_place_now(work) } else { work() }?;
            more += message.len() as u64;
            out.put_u8(0);
            out.put_u32(message.len() as u32);
            out.extend_from_slice(&message);
        }
        Ok((out.freeze(), more))
    }
}

fn plain(coded: &[u8], bytes_max: usize, taken: &Taken) -> Result<Vec<u8>, Error> {
    let mut decoder = MultiGzDecoder::new(coded);
    let mut plain = Vec::new();
    loop {
        let begin = plain.len();
        plain.resize(begin + STEP_BYTES.min(bytes_max + 1 - begin), 0);
        let read = decoder.read(&mut plain[begin..]).map_err(|error| {
            Error::InvalidRequest(format!("a message is said to be gzip'd and cannot be decompressed: {error}"))
        })?;
        plain.truncate(begin + read);
        if read == 0 {
            return Ok(plain);
        }
        if plain.len() > bytes_max {
            return Err(Error::MessageTooLarge(format!(
                "grpc: received message after decompression larger than max {bytes_max}"
            )));
        }
        taken.grow(read as u64)?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use axum::http::HeaderValue;

    use super::*;
    use crate::node::Client;
    use crate::node::account::Account;

    fn message(flag: u8, content: &[u8]) -> Vec<u8> {
        [&[flag][..], &(content.len() as u32).to_be_bytes(), content].concat()
    }

    fn coded(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        message(1, &encoder.finish().unwrap())
    }

    fn inflate(bytes_max: usize) -> Inflate {
        let mut headers = HeaderMap::from_iter([(ENCODING, HeaderValue::from_static("gzip"))]);
        let inflate = Inflate::of(&mut headers, bytes_max).unwrap();
        assert!(headers.is_empty(), "nobody decompresses it again");
        inflate
    }

    fn account(bytes: u64) -> Account {
        Account::new(bytes, 0, 1)
    }

    #[test]
    fn messages_are_the_same_however_they_are_coded_and_cut() {
        let contents: Vec<Vec<u8>> =
            vec![vec![], vec![7; 5], vec![1; 30_000], (0..=255).cycle().take(40_000).collect()];
        let plain: Vec<u8> = contents.iter().flat_map(|content| message(0, content)).collect();
        let mixed = [coded(&contents[0]), message(0, &contents[1]), coded(&contents[2]), coded(&contents[3])].concat();
        for size in [1, 5, 6, 100, mixed.len()] {
            let account = account(1 << 20);
            let taken = account.received.take(&Client::new(None), 0).unwrap();
            let (mut inflate, mut out, mut more) = (inflate(50_000), Vec::new(), 0);
            for piece in mixed.chunks(size) {
                let (messages, grown) = inflate.pass(piece, &taken).unwrap();
                out.extend_from_slice(&messages);
                more += grown;
            }
            assert!(out == plain, "in pieces of {size}");
            assert_eq!((more, taken.amount()), (70_000, 70_000), "what was coded is charged");
        }
    }

    #[test]
    fn message_that_grows_beyond_what_one_may_have_costs_no_more_than_that() {
        let account = account(1 << 20);
        let taken = account.received.take(&Client::new(None), 0).unwrap();
        let bomb = coded(&vec![0; 64 << 20]);
        assert!(bomb.len() < 100 << 10);
        let refused = inflate(50_000).pass(&bomb, &taken).unwrap_err();
        assert_eq!(refused.to_string(), "grpc: received message after decompression larger than max 50000");
        assert!(taken.amount() <= 50_000, "{}", taken.amount());
        let refused = inflate(50_000).pass(&coded(&vec![0; 50_000]), &taken).map(|_| ());
        assert_eq!(refused, Ok(()), "as much as may be");
    }

    #[test]
    fn message_for_which_there_is_no_room_is_refused_and_nonsense_too() {
        let account = account(20_000);
        let taken = account.received.take(&Client::new(None), 0).unwrap();
        let refused = inflate(50_000).pass(&coded(&vec![0; 40_000]), &taken).unwrap_err();
        assert_eq!(refused, Error::TooManyRequests);
        drop(taken);
        assert_eq!(account.received.taken(), 0);
        let taken = account.received.take(&Client::new(None), 0).unwrap();
        let refused = inflate(50_000).pass(&message(1, b"nonsense"), &taken).unwrap_err();
        assert!(refused.to_string().contains("cannot be decompressed"), "{refused}");
    }
}
