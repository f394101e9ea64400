//! Full backups: a snapshot's bytes go to the store, come back, and only then count.
//!
//! The source is a file: a member's own snapshot file, which it has on its disk anyway, or a backup that a client has taken. So no view is
//! held in memory for as long as a slow store takes. Memory is two parts of the upload.
//! Absent: when one is due, and whether the members agree with it (`duty`).

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::archive::{Archive, DATA, NamedFull};
use super::store::Uploaded;
use super::{Error, Result};
use crate::env::{File, Instant, Pool, sleep_until};
use crate::kv::ChangesHash;
use crate::metrics::metrics;
use crate::pb::backup::Full;
use crate::pb::log::change;
use crate::storage::snapshot::{Head, backup};

/// Read from the file at a time.
const READ_BYTES: usize = 1 << 20;
/// Sealed at a time: a fraction of a millisecond, between which other tasks have their turn.
const SEAL_BYTES: usize = 64 << 10;

/// A snapshot to back up.
#[derive(Clone)]
pub struct Source {
    pub file: Arc<dyn File>,
    /// For errors.
    pub name: String,
    /// Bytes of the file that are the snapshot.
    pub bytes: u64,
}

/// What is known beside the snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    pub generation: u32,
    /// The newest record before it.
    pub record: u64,
    pub at_millis: u64,
    /// Bytes a second.
    pub bandwidth: u64,
}

/// What a look at the whole snapshot tells.
struct Content {
    head: Head,
    hash: ChangesHash,
    compacted: i64,
}

impl Source {
    fn examine(&self) -> Result<Content> {
        let damaged = |error: crate::storage::snapshot::Error| Error::Damaged {
            name: self.name.clone(),
            reason: error.to_string(),
        };
        let reader = backup::read(self.file.clone(), self.bytes, &self.name).map_err(damaged)?;
        let (head, mut hash, mut compacted) = (reader.head().clone(), ChangesHash::default(), 0);
        for change in reader {
            let change = change.map_err(damaged)?;
            if let Some(change::Change::Compacted(revision)) = &change.change {
                compacted = *revision;
            }
            hash.add(&change);
        }
        Ok(Content { head, hash, compacted })
    }
}

/// Backs `source` up; it counts when this returns.
pub async fn write(archive: &Archive, source: Source, beside: Beside) -> Result<NamedFull> {
    let env = archive.store().env().clone();
    let examined = source.clone();
    let content = env.long(Pool::Backups, move || examined.examine()).await?;
    let meta = content.head.meta;
    let applied = meta.applied.unwrap_or_default();
    let name = archive.new_full(beside.generation, applied.index);
    let data = format!("{name}{DATA}");
    let written = send(archive, &source, &data, beside.bandwidth).await;
    let counted = async {
        let (uploaded, sha256) = written?;
        read_back(archive, &data, &uploaded, &sha256).await?;
        let full = Full {
            cluster_id: content.head.cluster_id,
            applied: Some(applied),
            revision: meta.revision,
            compacted: content.compacted,
            digest: meta.digest,
            hash_kv: content.hash.hash(),
            versions: content.hash.versions(),
            sealed_bytes: uploaded.sealed_bytes,
            bytes: source.bytes,
            sha256: sha256.to_vec().into(),
            at_millis: beside.at_millis,
            record: beside.record,
        };
        archive.add_full(beside.generation, &name, full).await
    };
    let counted = counted.await;
    if counted.is_err() {
        // Whatever of it is there does not count; `prune` looks for what cannot be removed now.
        let _ = archive.remove(&data).await;
    }
    counted
}

/// Sends the file; gives what was written, and the SHA-256 of the file.
async fn send(archive: &Archive, source: &Source, data: &str, bandwidth: u64) -> Result<(Uploaded, [u8; 32])> {
    let env = archive.store().env();
    let mut upload = archive.store().upload(data).await?;
    let (begin, mut offset, mut sha) = (Instant::now(), 0, Sha256::new());
    while offset < source.bytes {
        let length = READ_BYTES.min((source.bytes - offset) as usize);
        let (file, at) = (source.file.clone(), offset);
        let read = move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        };
        let pushed = async {
            let bytes = env.long(Pool::Backups, read).await.map_err(Error::disk(&source.name))?;
            for part in bytes.chunks(SEAL_BYTES) {
                sha.update(part);
                upload.push(part).await?;
                tokio::task::yield_now().await;
            }
            Ok::<(), Error>(())
        };
        let pushed = pushed.await;
        if let Err(error) = pushed {
            upload.abort().await;
            return Err(error);
        }
        offset += length as u64;
        metrics().backup.sent_bytes.inc_by(length as u64);
        sleep_until(begin + std::time::Duration::from_secs_f64(offset as f64 / bandwidth.max(1) as f64)).await;
    }
    Ok((upload.finish().await?, sha.finalize().into()))
}

/// Reads all of it again: what the store has is what was sent, and opens.
async fn read_back(archive: &Archive, data: &str, uploaded: &Uploaded, sha256: &[u8; 32]) -> Result<()> {
    let mut download = archive.store().download(data).await?;
    let mut sha = Sha256::new();
    while let Some(piece) = download.next().await? {
        sha.update(&piece);
        tokio::task::yield_now().await;
    }
    let found = download.read_so_far();
    if found != (uploaded.sealed_bytes, uploaded.sealed_sha256) || sha.finalize()[..] != sha256[..] {
        return Err(archive.store().damaged(data, "what was read back is not what was written"));
    }
    Ok(())
}
