//! A backup: a snapshot as a file that a client keeps.
//!
//! ```text
//! snapshot (`format`) | zeros, up to a multiple of 512 bytes | SHA-256 of all before
//! ```
//! The trailer is the one that `etcdctl snapshot save` insists on: the size modulo 512 is 32, and the last 32 bytes are the
//! SHA-256 of the rest. The content is ours, and no etcd reads it.
//! Absent: files in a member's directory ([`Dir`](super::Dir)); where a backup goes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};

use super::Error;
use super::format::{self, Encoder, Head, Reader, Sink};
use crate::env::File;
use crate::pb::log::Change;

/// A file with a trailer has a multiple of this, and the trailer.
pub const ALIGNMENT: u64 = 512;
/// Bytes of the trailer.
pub const SHA_BYTES: u64 = 32;
/// Read at a time while the checksum is verified.
const READ_BYTES: usize = 1 << 20;

fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT) - bytes
}

/// Bytes of the backup of these changes.
pub fn size(head: &Head, changes: impl Iterator<Item = Change>) -> u64 {
    let bytes = format::size(head, changes);
    bytes + padding(bytes) + SHA_BYTES
}

/// Makes a backup of the changes that it is given, in pieces of one size, the last one smaller.
pub struct Writer {
    encoder: Encoder<Pieces>,
}

impl Writer {
    pub fn begin(head: &Head, piece_bytes: usize) -> Result<Self, Error> {
        let (piece, whole) = (BytesMut::with_capacity(piece_bytes), VecDeque::new());
        Ok(Self { encoder: Encoder::begin(head, Pieces { sha: Sha256::new(), piece, piece_bytes, whole })? })
    }

    pub fn push(&mut self, change: &Change) -> Result<(), Error> {
        self.encoder.push(change)
    }

    /// The next piece of what was given.
    pub fn piece(&mut self) -> Option<Bytes> {
        self.encoder.sink_mut().whole.pop_front()
    }

    /// After the last change: the pieces that are left.
    pub fn end(self) -> Result<VecDeque<Bytes>, Error> {
        let (mut pieces, bytes, _) = self.encoder.end()?;
        pieces.take(&vec![0; padding(bytes) as usize], bytes)?;
        let sha = pieces.sha.finalize_reset();
        pieces.put(&sha);
        pieces.flush();
        Ok(pieces.whole)
    }
}

struct Pieces {
    sha: Sha256,
    piece: BytesMut,
    piece_bytes: usize,
    whole: VecDeque<Bytes>,
}

impl Sink for Pieces {
    fn take(&mut self, bytes: &[u8], _offset: u64) -> Result<(), Error> {
        self.sha.update(bytes);
        self.put(bytes);
        Ok(())
    }
}

impl Pieces {
    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.piece_bytes - self.piece.len()));
            self.piece.extend_from_slice(now);
            bytes = later;
            if self.piece.len() == self.piece_bytes {
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        if !self.piece.is_empty() {
            let piece = std::mem::replace(&mut self.piece, BytesMut::with_capacity(self.piece_bytes));
            self.whole.push_back(piece.freeze());
        }
    }
}

/// Verifies the trailer; returns the SHA-256.
pub fn verify(file: &dyn File, name: &str) -> Result<[u8; 32], Error> {
    let damaged = |reason: &str| Error::Damaged { name: name.to_owned(), reason: reason.to_owned() };
    let len = file.len()?;
    if len < ALIGNMENT || len % ALIGNMENT != SHA_BYTES {
        return Err(damaged("it is cut, or no backup: its size does not fit"));
    }
    let found = sha256(file, len - SHA_BYTES)?;
    let mut expected = [0; SHA_BYTES as usize];
    file.read_exact_at(&mut expected, len - SHA_BYTES)?;
    if found != expected {
        return Err(damaged("its SHA-256 does not match its content"));
    }
    Ok(expected)
}

/// The SHA-256 of the first `len` bytes.
pub fn sha256(file: &dyn File, len: u64) -> std::io::Result<[u8; SHA_BYTES as usize]> {
    let (mut sha, mut offset, mut buffer) = (Sha256::new(), 0, vec![0; READ_BYTES]);
    while offset < len {
        let part = &mut buffer[..READ_BYTES.min((len - offset) as usize)];
        file.read_exact_at(part, offset)?;
        sha.update(&*part);
        offset += part.len() as u64;
    }
    Ok(sha.finalize().into())
}

/// The changes in a backup whose trailer was verified.
pub fn open(file: Arc<dyn File>, name: &str) -> Result<Reader, Error> {
    let len = content_bytes(&*file)?;
    read(file, len, name)
}

/// Bytes of a backup before its trailer.
pub fn content_bytes(file: &dyn File) -> std::io::Result<u64> {
    Ok(file.len()?.saturating_sub(SHA_BYTES))
}

/// The changes in the first `len` bytes of `file`, which are a snapshot file's or a backup's before its trailer. It is read from begin to end.
pub fn read(file: Arc<dyn File>, len: u64, name: &str) -> Result<Reader, Error> {
    Reader::open_part(file, len, ALIGNMENT - 1, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::{Disk as _, OpenMode, disk::RealDisk};
    use crate::pb::KeyValue;
    use crate::pb::log::{LogId, StateMeta, change};

    fn head() -> Head {
        let meta = StateMeta { applied: Some(LogId { term: 3, index: 9 }), revision: 5000, ..StateMeta::default() };
        Head { cluster_id: 7, member_id: 8, meta }
    }

    fn changes(n: i64, key_bytes: usize) -> impl Iterator<Item = Change> + Clone {
        (0..n).map(move |i| {
            let version = KeyValue::tombstone(&vec![b'k'; key_bytes], 2 + i);
            Change { change: Some(change::Change::Version(version)) }
        })
    }

    fn written(n: i64, key_bytes: usize) -> Vec<u8> {
        let mut writer = Writer::begin(&head(), 1000).unwrap();
        let mut pieces = Vec::new();
        for change in changes(n, key_bytes) {
            writer.push(&change).unwrap();
            pieces.extend(std::iter::from_fn(|| writer.piece()));
        }
        pieces.extend(writer.end().unwrap());
        let (last, whole) = pieces.split_last().unwrap();
        assert!(whole.iter().all(|piece| piece.len() == 1000) && (1..=1000).contains(&last.len()));
        pieces.concat()
    }

    fn file(dir: &tempfile::TempDir, bytes: &[u8]) -> Arc<dyn File> {
        let path = dir.path().join("backup");
        let file = RealDisk.open(&path, OpenMode::CreateTruncate).unwrap();
        file.write_at(bytes, 0).unwrap();
        file.into()
    }

    #[test]
    fn the_size_is_known_before_and_ends_as_etcd_wants_it() {
        for (n, key_bytes) in [(0, 1), (1, 1), (3000, 200), (3, 300_000)] {
            let bytes = written(n, key_bytes);
            assert_eq!(size(&head(), changes(n, key_bytes)), bytes.len() as u64, "{n} of {key_bytes}");
            assert_eq!(bytes.len() % 512, 32);
            let (content, sha) = bytes.split_at(bytes.len() - 32);
            assert_eq!(Sha256::digest(content)[..], *sha);
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(&dir, &written(3000, 200));
        verify(&*file, "x").unwrap();
        let reader = open(file, "x").unwrap();
        assert_eq!(reader.head(), &head());
        let read: Vec<Change> = reader.map(Result::unwrap).collect();
        assert!(changes(3000, 200).eq(read));
    }

    #[test]
    fn a_damaged_or_cut_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let whole = written(500, 20);
        for at in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert!(verify(&*file(&dir, &bytes), "x").is_err(), "byte {at} flipped");
        }
        for len in [0, 31, 32, 544, whole.len() - 512, whole.len() - 1] {
            assert!(verify(&*file(&dir, &whole[..len]), "x").is_err(), "cut to {len}");
        }
    }
}
