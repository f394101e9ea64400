//! The bytes of a snapshot file.
//!
//! ```text
//! magic "QRSNAP\r\n" | version u32 | frames: head, blocks, end
//! frame: kind u8 | len u32 | crc u32 | payload         the CRC-32C covers kind, len and payload
//! head:  cluster id u64 | member id u64 | StateMeta
//! block: changes, each length-delimited; about 256 KiB, more only for a change that is larger
//! end:   blocks u64 | changes u64 | file bytes before this frame u64 | CRC-32C of all of them u32
//! ```
//! Little-endian. Nothing follows the end frame; a file without it was not finished.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Buf as _;
use prost::Message as _;

use super::{Dir, Error, SnapshotFile, make_id};
use crate::env::{File, OpenMode};
use crate::pb::log::{Change, LogId, StateMeta};
use crate::storage::state::change;

const MAGIC: &[u8; 8] = b"QRSNAP\r\n";
const VERSION: u32 = 1;
const PREAMBLE_BYTES: u64 = 12;
const FRAME_HEAD_BYTES: usize = 9;
const END_BYTES: usize = 28;

const HEAD: u8 = 1;
const BLOCK: u8 = 2;
const END: u8 = 3;

/// Blocks are written once they hold this much.
const BLOCK_BYTES: usize = 256 << 10;
/// Bound of what a reader takes into memory for one frame; far above the largest request.
const FRAME_BYTES_MAX: usize = 128 << 20;
/// Written bytes are handed to the disk this often: the log's fsyncs wait behind these.
pub(super) const SYNC_BYTES: u64 = 1 << 20;

/// What a snapshot file says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    pub cluster_id: u64,
    /// The member that wrote it.
    pub member_id: u64,
    pub meta: StateMeta,
}

/// Makes a snapshot's bytes and hands them to `sink`, a frame's head and its payload at a time.
pub(super) struct Encoder<S> {
    sink: S,
    /// Bytes made, and their CRC.
    offset: u64,
    crc: u32,
    block: Vec<u8>,
    blocks: u64,
    changes: u64,
}

/// Where the bytes of a snapshot go.
pub(super) trait Sink {
    /// Takes `bytes`, which begin at `offset`.
    fn take(&mut self, bytes: &[u8], offset: u64) -> Result<(), Error>;
    /// A block has ended at `offset`.
    fn block_ended(&mut self, _offset: u64) -> Result<(), Error> {
        Ok(())
    }
}

impl<S: Sink> Encoder<S> {
    pub(super) fn begin(head: &Head, sink: S) -> Result<Self, Error> {
        let block = Vec::with_capacity(BLOCK_BYTES + (4 << 10));
        let mut encoder = Self { sink, offset: 0, crc: 0, block, blocks: 0, changes: 0 };
        let mut preamble = MAGIC.to_vec();
        preamble.extend_from_slice(&VERSION.to_le_bytes());
        encoder.write(&preamble)?;
        encoder.frame(HEAD, &head_payload(head))?;
        Ok(encoder)
    }

    pub(super) fn push(&mut self, change: &Change) -> Result<(), Error> {
        change::encode(change, &mut self.block);
        assert!(self.block.len() <= FRAME_BYTES_MAX, "a change is smaller than a frame may be");
        self.changes += 1;
        if self.block.len() >= BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    pub(super) fn sink_mut(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Makes the end frame; returns the sink, the bytes made, and the CRC of all before the end frame.
    pub(super) fn end(mut self) -> Result<(S, u64, u32), Error> {
        self.flush()?;
        let (before, crc) = (self.offset, self.crc);
        let mut end = Vec::with_capacity(END_BYTES);
        for count in [self.blocks, self.changes, before] {
            end.extend_from_slice(&count.to_le_bytes());
        }
        end.extend_from_slice(&crc.to_le_bytes());
        self.frame(END, &end)?;
        Ok((self.sink, self.offset, crc))
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.block.is_empty() {
            return Ok(());
        }
        let mut block = std::mem::take(&mut self.block);
        self.frame(BLOCK, &block)?;
        block.clear();
        self.block = block;
        self.blocks += 1;
        self.sink.block_ended(self.offset)
    }

    fn frame(&mut self, kind: u8, payload: &[u8]) -> Result<(), Error> {
        let mut head = [0; FRAME_HEAD_BYTES];
        head[0] = kind;
        head[1..5].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..5]), payload);
        head[5..].copy_from_slice(&crc.to_le_bytes());
        self.write(&head)?;
        self.write(payload)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sink.take(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        Ok(())
    }
}

fn head_payload(head: &Head) -> Vec<u8> {
    let mut payload = head.cluster_id.to_le_bytes().to_vec();
    payload.extend_from_slice(&head.member_id.to_le_bytes());
    payload.extend_from_slice(&head.meta.encode_to_vec());
    payload
}

/// How many bytes an [`Encoder`] makes of `changes`.
pub(super) fn size(head: &Head, changes: impl Iterator<Item = Change>) -> u64 {
    let frame = |payload: usize| (FRAME_HEAD_BYTES + payload) as u64;
    let mut bytes = PREAMBLE_BYTES + frame(head_payload(head).len()) + frame(END_BYTES);
    let mut block = 0;
    for change in changes {
        block += change::encoded_len(&change);
        if block >= BLOCK_BYTES {
            bytes += frame(std::mem::take(&mut block));
        }
    }
    if block > 0 { bytes + frame(block) } else { bytes }
}

/// A file that is handed to the disk now and then.
struct FileSink {
    file: Box<dyn File>,
    synced: u64,
}

impl Sink for FileSink {
    fn take(&mut self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        Ok(self.file.write_at(bytes, offset)?)
    }

    fn block_ended(&mut self, offset: u64) -> Result<(), Error> {
        if offset - self.synced >= SYNC_BYTES {
            self.file.sync_data()?;
            self.synced = offset;
        }
        Ok(())
    }
}

/// Writes one snapshot file. Dropped before [`Writer::finish`], it leaves nothing.
pub struct Writer {
    dir: Dir,
    applied: LogId,
    path: PathBuf,
    encoder: Option<Encoder<FileSink>>,
}

impl Writer {
    pub(super) fn create(dir: Dir, head: Head) -> Result<Self, Error> {
        let applied = head.meta.applied.expect("a snapshot has an applied index");
        let path = dir.path.join(format!("{:020}-{:020}.partial", applied.term, applied.index));
        let file = dir.env.disk.open(&path, OpenMode::CreateTruncate)?;
        let mut writer = Self { dir, applied, path, encoder: None };
        writer.encoder = Some(Encoder::begin(&head, FileSink { file, synced: 0 })?);
        Ok(writer)
    }

    /// Adds the next change.
    pub fn push(&mut self, change: &Change) -> Result<(), Error> {
        self.encoder.as_mut().expect("not finished").push(change)
    }

    /// Ends the file, makes it durable, reads it back, and puts it in the place of the older ones.
    pub fn finish(mut self) -> Result<SnapshotFile, Error> {
        let (sink, _, crc) = self.encoder.take().expect("not finished").end()?;
        sink.file.sync_all()?;
        drop(sink);
        self.dir.finish(&make_id(self.applied, crc), &self.path)
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.encoder.as_ref().map_or(0, |encoder| encoder.offset + encoder.block.len() as u64)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a successful finish there is no file of this name any more.
        if self.dir.env.disk.exists(&self.path) {
            let _ = self.dir.env.disk.remove_file(&self.path);
        }
    }
}

/// Streams a snapshot file, verifying it on the way. What it has given is only as good as its end: a file that turns out
/// damaged gives an error last.
pub struct Reader {
    file: Arc<dyn File>,
    name: String,
    head: Head,
    offset: u64,
    len: u64,
    crc: u32,
    block: Vec<u8>,
    /// How much of the block was taken.
    taken: usize,
    blocks: u64,
    changes: u64,
    ended: bool,
    /// CRC of everything before the end frame; part of the snapshot's id.
    file_crc: u32,
    /// Zeros that may follow the end.
    padding_max: u64,
}

impl Reader {
    /// Of a whole file, which need not be one of ours; its head is verified now, the rest as it is read.
    pub fn open(file: Arc<dyn File>, name: &str) -> Result<Self, Error> {
        let len = file.len()?;
        Self::open_part(file, len, 0, name)
    }

    /// Reads the first `len` bytes of a file, of which up to `padding_max` at the end may be no part of the snapshot.
    pub(super) fn open_part(file: Arc<dyn File>, len: u64, padding_max: u64, name: &str) -> Result<Self, Error> {
        let mut reader = Self {
            len,
            padding_max,
            file,
            name: name.to_owned(),
            head: Head { cluster_id: 0, member_id: 0, meta: StateMeta::default() },
            offset: 0,
            crc: 0,
            block: Vec::new(),
            taken: 0,
            blocks: 0,
            changes: 0,
            ended: false,
            file_crc: 0,
        };
        let preamble = reader.bytes(PREAMBLE_BYTES as usize)?;
        if &preamble[..8] != MAGIC {
            return Err(reader.damaged("it is no snapshot file"));
        }
        let version = u32::from_le_bytes(preamble[8..].try_into().expect("four bytes"));
        if version != VERSION {
            return Err(reader.damaged(format!("format version {version} is unknown")));
        }
        let (kind, payload) = reader.frame()?;
        if kind != HEAD || payload.len() < 16 {
            return Err(reader.damaged("it does not begin with a head"));
        }
        let mut at = &payload[..];
        let (cluster_id, member_id) = (at.get_u64_le(), at.get_u64_le());
        let meta = StateMeta::decode(at).map_err(|e| reader.damaged(e))?;
        reader.head = Head { cluster_id, member_id, meta };
        Ok(reader)
    }

    pub fn head(&self) -> &Head {
        &self.head
    }

    pub(super) fn file_crc(&self) -> u32 {
        self.file_crc
    }

    /// Reads the next block over the last one and answers how many changes it has; `None` after a valid end.
    pub(super) fn next_block(&mut self) -> Result<Option<u64>, Error> {
        if self.ended {
            return Ok(None);
        }
        let (before, crc) = (self.offset, self.crc);
        let (kind, payload) = self.frame()?;
        match kind {
            BLOCK => {
                let count = count_changes(&payload).map_err(|e| self.damaged(e))?;
                (self.block, self.taken) = (payload, 0);
                self.blocks += 1;
                self.changes += count;
                Ok(Some(count))
            }
            END if payload.len() == END_BYTES => {
                let mut at = &payload[..];
                let found = (at.get_u64_le(), at.get_u64_le(), at.get_u64_le(), at.get_u32_le());
                let rest = self.len - self.offset;
                if found != (self.blocks, self.changes, before, crc) || rest > self.padding_max {
                    return Err(self.damaged("its end does not match its content"));
                }
                (self.ended, self.file_crc) = (true, crc);
                Ok(None)
            }
            _ => Err(self.damaged(format!("a frame of kind {kind} where a block or the end belongs"))),
        }
    }

    fn next_change(&mut self) -> Result<Option<Change>, Error> {
        while self.taken == self.block.len() {
            if self.next_block()?.is_none() {
                return Ok(None);
            }
        }
        let mut at = &self.block[self.taken..];
        let change = change::decode_next(&mut at);
        self.taken = self.block.len() - at.len();
        change.map(Some).map_err(|e| self.damaged(e))
    }

    fn frame(&mut self) -> Result<(u8, Vec<u8>), Error> {
        let head = self.bytes(FRAME_HEAD_BYTES)?;
        let len = u32::from_le_bytes(head[1..5].try_into().expect("four bytes")) as usize;
        let crc = u32::from_le_bytes(head[5..].try_into().expect("four bytes"));
        let payload = self.bytes(len)?;
        if crc != crc32c::crc32c_append(crc32c::crc32c(&head[..5]), &payload) {
            return Err(self.damaged("checksum mismatch"));
        }
        Ok((head[0], payload))
    }

    /// The next bytes of the file; a length that the file cannot hold is never allocated.
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        if len > FRAME_BYTES_MAX || len as u64 > self.len - self.offset {
            return Err(self.damaged("it is cut"));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        self.offset += len as u64;
        self.crc = crc32c::crc32c_append(self.crc, &bytes);
        Ok(bytes)
    }

    fn damaged(&self, reason: impl ToString) -> Error {
        Error::Damaged { name: self.name.clone(), reason: format!("{} (at byte {})", reason.to_string(), self.offset) }
    }
}

impl Iterator for Reader {
    type Item = Result<Change, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended && self.taken == self.block.len() {
            return None;
        }
        let next = self.next_change().transpose();
        if let Some(Err(_)) = next {
            // Nothing after an error.
            (self.ended, self.taken) = (true, self.block.len());
        }
        next
    }
}

/// Counts without decoding: a verifying reader need not build the changes.
fn count_changes(mut block: &[u8]) -> Result<u64, String> {
    let mut count = 0;
    while !block.is_empty() {
        let len = prost::encoding::decode_varint(&mut block).map_err(|e| e.to_string())?;
        if len > block.len() as u64 {
            return Err("a change goes beyond its block".to_owned());
        }
        block.advance(len as usize);
        count += 1;
    }
    Ok(count)
}
