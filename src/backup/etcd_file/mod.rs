//! etcd's own snapshot file, and the state in it.
//!
//! `etcdctl snapshot save` writes etcd's bbolt file (`bolt`, `page`) and the SHA-256 of it; etcd's own `member/snap/db` is the same without that
//! checksum. `schema` says what etcd keeps in it. All of 3.4, 3.5, 3.6 and 3.7 are the same for what is read here.
//! Invariants: the state is etcd's at the file's revision, with every revision, version, lease, user and role that the file has; a file that
//! is cut, damaged or none of etcd's is refused, and nothing is made of it.
//! Absent: etcd's members, its Raft log (what is only in the log of a member is not in its file), alarms, and writing such a file.

mod bolt;
mod page;
mod schema;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use crate::env::File;
use crate::kv;
use crate::storage::snapshot::backup;
use bolt::Bolt;

/// Why a file gives no state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("etcd's snapshot file: {0}")]
    Io(#[from] io::Error),
    #[error("etcd's snapshot file {name} is damaged: {reason}")]
    Damaged { name: String, reason: String },
    #[error("{name} is a file of bbolt, but none of etcd: it has no bucket `{bucket}`")]
    NotEtcd { name: String, bucket: &'static str },
    #[error(
        "{name} has no checksum at its end, which `etcdctl snapshot save` would have written. Of a member's `member/snap/db` that was copied \
         while etcd was stopped, say --skip-hash-check"
    )]
    NoChecksum { name: String },
}

/// What was read from a file.
pub struct EtcdFile {
    pub state: kv::State,
    /// Of the content, without the checksum at the end.
    pub sha256: [u8; 32],
    pub about: About,
}

/// What people may want to know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// The version of etcd's schema, as in `3.6.0`.
    pub version: String,
    pub leases: usize,
    pub users: usize,
    pub roles: usize,
    /// What is otherwise here than in the file, in sentences.
    pub notes: Vec<String>,
}

/// Whether it is a file of etcd, whole or not.
pub fn is_one(file: &dyn File) -> bool {
    Bolt::is_one(file)
}

/// The state in a file, which is called `name` in errors. A file without a checksum, or with a wrong one, is read only if that is not to be
/// looked at.
pub fn load(file: Arc<dyn File>, name: &str, skip_hash_check: bool) -> Result<EtcdFile, Error> {
    let len = file.len()?;
    let content = if len % backup::ALIGNMENT == backup::SHA_BYTES { len - backup::SHA_BYTES } else { len };
    if content == len && !skip_hash_check {
        return Err(Error::NoChecksum { name: name.to_owned() });
    }
    let sha256 = backup::sha256(&*file, content)?;
    if !skip_hash_check {
        let mut expected = [0; backup::SHA_BYTES as usize];
        file.read_exact_at(&mut expected, content)?;
        if sha256 != expected {
            let reason = "its SHA-256 does not match its content".to_owned();
            return Err(Error::Damaged { name: name.to_owned(), reason });
        }
    }
    let (state, about) = schema::load(&Bolt::open(file, content, name)?, name)?;
    Ok(EtcdFile { state, sha256, about })
}
