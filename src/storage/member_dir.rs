//! The data directory: who this node is, and where that self keeps its log, snapshots and state.
//!
//! ```text
//! <data-dir>/
//!   current          line 1 the format, line 2 the member directory in use, then former selves, newest first
//!   LOCK             held while the process lives
//!   member-<id hex>/
//!     identity       magic, format version, CRC-32C, `pb::log::Identity`
//!     log/ snapshot/ state/
//!   removed-<id hex> a former self that is being deleted
//! ```
//!
//! Invariants:
//! - `current` is the one switch of identity (membership rule 0): a crash leaves the old self whole or the new self whole.
//! - A member id is minted once and never reused; who has accepted a formation accepts no other.
//! - Every method returns after its change is durable, and changes what it shows only then. After an error the disk's state is
//!   unknown: the caller stops the node.
//! - What cannot be read is refused by its file's name, and never deleted: [`MemberDir::open_anew`] goes on beside it.
//! - An empty directory gets no self while the data of a member lies where it was meant to be.
//!
//! Absent: the log, snapshots and state themselves; the decision to become another self (`cluster`).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;

use super::log;
use crate::env::{Disk, fail_point};
use crate::identity::slot_of;
use crate::pb::log::{Formation, Identity};

#[cfg(test)]
pub(crate) mod mem_disk;
#[cfg(test)]
mod tests;

const MAGIC: &[u8; 8] = b"QUORATEI";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 16;
const CURRENT_HEAD: &str = "quorate data directory, format 1";
/// What goes before the number of a format, this one or a later one.
const CURRENT_HEAD_OF: &str = "quorate data directory, format ";

/// Why the data directory cannot be used; each names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} is the data directory of an etcd: it holds {found}; it is left as it is; name another one (--data-dir), made by \
         `quorate snapshot restore` from etcd's snapshot file, or empty and filled from the running etcd by `quorate migrate`",
        path = path.display()
    )]
    Etcds { path: PathBuf, found: &'static str },
    #[error(
        "{root} is empty, but {found} holds the data of a member: expected it in {root}; move what is in {found} there, or, if this node is to \
         begin anew, move it elsewhere; nothing was changed",
        root = root.display(), found = found.display()
    )]
    Misplaced { root: PathBuf, found: PathBuf },
    #[error("{path}: another process uses this data directory", path = path.display())]
    InUse { path: PathBuf },
    #[error("{path}: not an identity file of quorate", path = path.display())]
    Foreign { path: PathBuf },
    #[error("{path}: format {found}, this version reads up to {FORMAT}", path = path.display())]
    Format { path: PathBuf, found: u32 },
    #[error("{path}: damaged: {why}", path = path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("{path}: belongs to slot {held}, but this node is slot {slot}", path = path.display())]
    WrongSlot { path: PathBuf, held: u64, slot: u64 },
    #[error(
        "{path} is missing, but {directory} has belonged to a cluster; this node will not start as a new one over it",
        path = path.display()
    )]
    NoCurrent { path: PathBuf, directory: String },
}

impl Error {
    /// A file that says who this node is was there once, and is damaged or gone: nothing but what it said is in doubt.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Foreign { .. } | Self::Damaged { .. } | Self::NoCurrent { .. } => true,
            Self::Io { path, source } => source.kind() == io::ErrorKind::NotFound && path.ends_with("identity"),
            Self::Etcds { .. }
            | Self::Misplaced { .. }
            | Self::InUse { .. }
            | Self::Format { .. }
            | Self::WrongSlot { .. } => false,
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// What [`MemberDir::open`] found.
pub struct Opened {
    pub dir: MemberDir,
    /// The identity was minted just now, for an empty disk.
    pub minted: bool,
    /// This self has started, but its log is gone: a lost disk. Raft must not be started on it; [`MemberDir::mint_anew`].
    pub lost_log: bool,
}

/// A directory of a self that this node no longer is.
#[derive(Clone, Debug, PartialEq)]
pub struct Former {
    pub member_id: u64,
    /// `None` if its identity file cannot be read.
    pub identity: Option<Identity>,
}

/// The data directory, locked, and the self that it holds.
pub struct MemberDir {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    identity: Identity,
    /// Newest first.
    former: Vec<Former>,
    _lock: Box<dyn Send>,
}

impl MemberDir {
    /// Opens the data directory of the node at `slot`; an empty one gets a new self with the id that `mint` gives.
    ///
    /// Leftovers of a crash (a self that was never switched to, a deletion half done) are removed.
    pub fn open(disk: Arc<dyn Disk>, root: &Path, slot: u64, name: &str, mint: impl FnOnce() -> u64) -> Result<Opened> {
        if let Some(found) = misplaced(&disk, root, slot, name) {
            return Err(Error::Misplaced { root: root.to_owned(), found });
        }
        let mut dir = Self::lock(disk, root, slot, name)?;
        let selves = dir.read_current()?;
        dir.sweep(&selves)?;
        let minted = selves.is_empty();
        if minted {
            dir.become_new(mint())?;
        } else {
            dir.load(&selves, slot)?;
        }
        // Where the data directory is somebody else's, as the mount point of a volume may be, and of selves that 0.1 has made.
        at(&dir.path(), dir.disk.make_private(&dir.path()))?;
        let lost_log = dir.identity.log_started && !dir.has_log()?;
        Ok(Opened { dir, minted, lost_log })
    }

    /// Opens a data directory that [`MemberDir::open`] refuses as damaged, as a new self. All that was there stays: other selves as
    /// former ones, and what cannot be read of `current` as `current.damaged`.
    pub fn open_anew(disk: Arc<dyn Disk>, root: &Path, slot: u64, name: &str, member_id: u64) -> Result<Opened> {
        let mut dir = Self::lock(disk, root, slot, name)?;
        let (current, aside) = (root.join("current"), root.join("current.damaged"));
        let mut selves = match dir.read_current() {
            Ok(selves) => selves,
            Err(_) => {
                // Copied, so that there is never none: the new one replaces it.
                at(&aside, dir.disk.write_atomic(&aside, &at(&current, dir.disk.read(&current))?))?;
                Vec::new()
            }
        };
        let on_disk: Vec<u64> = at(root, dir.disk.list(root))?.iter().filter_map(|name| member_id_of(name)).collect();
        selves.retain(|id| on_disk.contains(id));
        selves.extend(on_disk.iter().filter(|id| !selves.contains(id)).copied().collect::<Vec<_>>());
        dir.former = selves.iter().map(|id| Former { member_id: *id, identity: dir.read_identity(*id).ok() }).collect();
        dir.become_new(member_id)?;
        Ok(Opened { dir, minted: true, lost_log: false })
    }

    /// The clusters that what can be read in the data directory belongs to: identities, and logs.
    pub fn clusters(disk: &dyn Disk, root: &Path) -> Vec<u64> {
        let names = disk.list(root).unwrap_or_default();
        let selves = names.iter().filter(|name| member_id_of(name).is_some()).map(|name| root.join(name));
        let mut clusters: Vec<u64> = selves
            .flat_map(|path| {
                let identity = path.join("identity");
                let said = disk.read(&identity).ok().and_then(|bytes| decode(&identity, &bytes).ok());
                let logged = log::owner(disk, &path.join("log"));
                [said.map(|identity| identity.cluster_id), logged.map(|owner| owner.cluster_id)]
            })
            .flatten()
            .filter(|cluster| *cluster != 0)
            .collect();
        clusters.sort_unstable();
        clusters.dedup();
        clusters
    }

    fn lock(disk: Arc<dyn Disk>, root: &Path, slot: u64, name: &str) -> Result<Self> {
        // Before anything is made there.
        if let Some(found) = ["member/wal", "member/snap"].into_iter().find(|part| disk.exists(&root.join(part))) {
            return Err(Error::Etcds { path: root.to_owned(), found });
        }
        at(root, disk.create_dir_all(root))?;
        if let Some(parent) = root.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            at(parent, disk.sync_dir(parent))?;
        }
        at(root, disk.make_private(root))?;
        let lock_path = root.join("LOCK");
        let lock = match disk.lock(&lock_path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Error::InUse { path: lock_path }),
            other => at(&lock_path, other)?,
        };
        Ok(Self {
            disk,
            root: root.to_owned(),
            identity: Identity { slot, name: name.to_owned(), ..Identity::default() },
            former: Vec::new(),
            _lock: lock,
        })
    }

    /// The self in use.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The directory of the self in use; another one after [`MemberDir::mint_anew`].
    pub fn path(&self) -> PathBuf {
        self.root.join(directory(self.identity.member_id))
    }

    pub fn log_path(&self) -> PathBuf {
        self.path().join("log")
    }

    pub fn snapshot_path(&self) -> PathBuf {
        self.path().join("snapshot")
    }

    pub fn state_path(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Former selves that are still on the disk, newest first.
    pub fn former(&self) -> &[Former] {
        &self.former
    }

    /// Clusters whose formation this node has accepted and given up, under this or a former self.
    pub fn abandoned(&self) -> Vec<u64> {
        let former = self.former.iter().filter_map(|former| former.identity.as_ref());
        former
            .chain([&self.identity])
            .filter(|identity| identity.abandoned)
            .map(|identity| identity.cluster_id)
            .collect()
    }

    /// Fsyncs that this self takes part in `formation` and in no other.
    pub fn accept_formation(&mut self, formation: &Formation) -> Result<()> {
        if self.identity.formation.as_ref() == Some(formation) {
            return Ok(());
        }
        assert_ne!(formation.cluster_id, 0, "a formation has a cluster id");
        assert_eq!(self.identity.cluster_id, 0, "who belongs to a cluster accepts no formation");
        fail_point("formation.before_accept");
        let mut next = self.identity.clone();
        next.cluster_id = formation.cluster_id;
        next.formation = Some(formation.clone());
        self.save(next)?;
        fail_point("formation.accepted");
        Ok(())
    }

    /// Fsyncs that this self never votes in the formation that it has accepted.
    pub fn abandon(&mut self) -> Result<()> {
        if self.identity.abandoned {
            return Ok(());
        }
        assert!(self.identity.formation.is_some(), "only an accepted formation can be abandoned");
        fail_point("formation.before_abandon");
        self.save(Identity { abandoned: true, ..self.identity.clone() })?;
        fail_point("formation.abandoned");
        Ok(())
    }

    /// Fsyncs the cluster that this self joins: before it answers its first Raft call (membership rule 5).
    pub fn set_cluster(&mut self, cluster_id: u64) -> Result<()> {
        if self.identity.cluster_id == cluster_id {
            return Ok(());
        }
        assert_eq!(self.identity.cluster_id, 0, "a self belongs to one cluster for good");
        fail_point("join.before_cluster");
        self.save(Identity { cluster_id, ..self.identity.clone() })?;
        fail_point("join.cluster_set");
        Ok(())
    }

    /// Fsyncs that the log exists: called after the log's first file is durable and before Raft starts. From here on this
    /// self without its log is a lost disk.
    pub fn mark_log_started(&mut self) -> Result<()> {
        if self.identity.log_started {
            return Ok(());
        }
        assert_ne!(self.identity.cluster_id, 0, "a log belongs to a cluster");
        assert!(!self.identity.abandoned, "a self that has abandoned its formation never starts in it");
        fail_point("log.before_started");
        self.save(Identity { log_started: true, ..self.identity.clone() })?;
        fail_point("log.started");
        Ok(())
    }

    /// Becomes a new, pristine self in a fresh directory. The former self is kept, unless it never belonged to anything.
    pub fn mint_anew(&mut self, member_id: u64) -> Result<()> {
        let old = self.identity.clone();
        assert_ne!(member_id, old.member_id, "a member id is never reused");
        let kept = old.cluster_id != 0;
        if kept {
            self.former.insert(0, Former { member_id: old.member_id, identity: Some(old.clone()) });
        }
        self.become_new(member_id)?;
        if !kept {
            self.remove(old.member_id)?;
        }
        Ok(())
    }

    /// Becomes the pristine self with an id that a cluster has reserved for this disk. The present one must be pristine, too: it has promised
    /// nothing, and is gone.
    pub fn take_reserved(&mut self, member_id: u64) -> Result<()> {
        let old = self.identity.clone();
        assert_eq!(old.cluster_id, 0, "who belongs to a cluster takes no other id");
        assert_ne!(member_id, old.member_id, "a reserved id is another one");
        self.become_self(Identity {
            member_id,
            slot: slot_of(member_id).into(),
            name: old.name,
            ..Identity::default()
        })?;
        self.remove(old.member_id)
    }

    /// The self in use of a data directory that nobody need have locked; `None` if there is none.
    pub fn peek(disk: Arc<dyn Disk>, root: &Path) -> Result<Option<Identity>> {
        let (identity, former) = Default::default();
        let dir = Self { disk, root: root.to_owned(), identity, former, _lock: Box::new(()) };
        dir.read_current()?.first().map(|id| dir.read_identity(*id)).transpose()
    }

    /// Makes the directory of a self that is to be the first of a new cluster; it is filled, and then [`MemberDir::adopt`]ed.
    pub fn prepare(&self, member_id: u64) -> Result<PathBuf> {
        let path = self.root.join(directory(member_id));
        assert!(!self.disk.exists(&path), "a minted id is new");
        at(&path, self.disk.create_dir_all(&path))?;
        at(&self.root, self.disk.sync_dir(&self.root))?;
        Ok(path)
    }

    /// Becomes the self in a prepared directory, whose log exists. The present one stays, as a former self.
    pub fn adopt(&mut self, cluster_id: u64, member_id: u64) -> Result<()> {
        let old = self.identity.clone();
        let next =
            Identity { cluster_id, member_id, formation: None, log_started: true, abandoned: false, ..old.clone() };
        self.former.insert(0, Former { member_id: old.member_id, identity: Some(old) });
        self.save(next)?;
        assert!(self.has_log()?, "a founder has a log");
        self.write_current()
    }

    /// Deletes all former selves but the `keep` newest; called once this self is a caught-up voter.
    pub fn remove_former(&mut self, keep: usize) -> Result<()> {
        if self.former.len() <= keep {
            return Ok(());
        }
        let removed = self.former.split_off(keep);
        self.write_current()?;
        removed.iter().try_for_each(|former| self.remove(former.member_id))
    }

    fn become_new(&mut self, member_id: u64) -> Result<()> {
        let slot = self.identity.slot;
        self.become_self(Identity { member_id, slot, name: self.identity.name.clone(), ..Identity::default() })
    }

    fn become_self(&mut self, next: Identity) -> Result<()> {
        fail_point("identity.before_mint");
        let path = self.root.join(directory(next.member_id));
        assert!(!self.disk.exists(&path), "a minted id is new");
        at(&path, self.disk.create_dir_all(&path))?;
        self.save(next)?;
        at(&self.root, self.disk.sync_dir(&self.root))?;
        fail_point("identity.minted");
        fail_point("identity.before_switch");
        self.write_current()?;
        fail_point("identity.switched");
        Ok(())
    }

    fn save(&mut self, next: Identity) -> Result<()> {
        let path = self.root.join(directory(next.member_id)).join("identity");
        at(&path, self.disk.write_atomic(&path, &encode(&next)))?;
        self.identity = next;
        Ok(())
    }

    fn write_current(&self) -> Result<()> {
        let mut lines = vec![CURRENT_HEAD.to_owned(), directory(self.identity.member_id)];
        lines.extend(self.former.iter().map(|former| directory(former.member_id)));
        let path = self.root.join("current");
        at(&path, self.disk.write_atomic(&path, (lines.join("\n") + "\n").as_bytes()))
    }

    /// The self in use and former ones as `current` names them; none on an empty disk.
    fn read_current(&self) -> Result<Vec<u64>> {
        let path = self.root.join("current");
        if !self.disk.exists(&path) {
            return Ok(Vec::new());
        }
        let bytes = at(&path, self.disk.read(&path))?;
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.lines();
        let damaged = |why: String| Error::Damaged { path: path.clone(), why };
        let head = lines.next();
        if head != Some(CURRENT_HEAD) {
            let format = head.and_then(|head| head.strip_prefix(CURRENT_HEAD_OF)?.parse().ok());
            return Err(match format {
                Some(found) => Error::Format { path: path.clone(), found },
                None => damaged(format!("begins with {head:?}, not with {CURRENT_HEAD:?}")),
            });
        }
        let selves = lines
            .map(|line| member_id_of(line).ok_or_else(|| damaged(format!("{line:?} names no member directory"))))
            .collect::<Result<Vec<_>>>()?;
        if selves.is_empty() { Err(damaged("names no member directory".into())) } else { Ok(selves) }
    }

    /// Removes what a crash left behind: deletions half done, and selves that `current` never named.
    fn sweep(&self, selves: &[u64]) -> Result<()> {
        for name in at(&self.root, self.disk.list(&self.root))? {
            let path = self.root.join(&name);
            if name.starts_with("removed-") {
                at(&path, self.disk.remove_dir_all(&path))?;
            }
            let Some(id) = member_id_of(&name).filter(|id| !selves.contains(id)) else { continue };
            if self.never_used(id)? {
                self.remove(id)?;
            } else if selves.is_empty() {
                return Err(Error::NoCurrent { path: self.root.join("current"), directory: name });
            }
        }
        Ok(())
    }

    /// Whether the directory holds nothing but, at most, an identity that belongs to no cluster.
    fn never_used(&self, id: u64) -> Result<bool> {
        let path = self.root.join(directory(id));
        let names = at(&path, self.disk.list(&path))?;
        if names.iter().any(|name| name != "identity" && name != "identity.tmp") {
            return Ok(false);
        }
        Ok(!names.iter().any(|name| name == "identity") || self.read_identity(id)?.cluster_id == 0)
    }

    fn load(&mut self, selves: &[u64], slot: u64) -> Result<()> {
        self.identity = self.read_identity(selves[0])?;
        if self.identity.slot != slot {
            let path = self.path().join("identity");
            return Err(Error::WrongSlot { path, held: self.identity.slot, slot });
        }
        let on_disk = selves[1..].iter().filter(|id| self.disk.exists(&self.root.join(directory(**id))));
        self.former = on_disk.map(|id| Former { member_id: *id, identity: self.read_identity(*id).ok() }).collect();
        Ok(())
    }

    fn read_identity(&self, id: u64) -> Result<Identity> {
        let path = self.root.join(directory(id)).join("identity");
        let bytes = at(&path, self.disk.read(&path))?;
        let identity = decode(&path, &bytes)?;
        if identity.member_id != id {
            let why = format!("holds member {:016x}", identity.member_id);
            return Err(Error::Damaged { path, why });
        }
        Ok(identity)
    }

    fn has_log(&self) -> Result<bool> {
        let path = self.log_path();
        // The log's mark alone is none.
        Ok(self.disk.exists(&path) && at(&path, self.disk.list(&path))?.iter().any(|name| name.ends_with(".log")))
    }

    /// Deletes a member directory; renamed first, so that half a directory is never taken for a self.
    fn remove(&self, id: u64) -> Result<()> {
        let path = self.root.join(directory(id));
        let removed = self.root.join(format!("removed-{id:016x}"));
        if !self.disk.exists(&path) {
            return Ok(());
        }
        at(&path, self.disk.rename(&path, &removed))?;
        at(&self.root, self.disk.sync_dir(&self.root))?;
        at(&removed, self.disk.remove_dir_all(&removed))
    }
}

/// A member's directory near an empty data directory: a level too high, or in the directory that `snapshot restore` names after the node. Whoever
/// has put a backup there must not get an empty cluster in silence.
fn misplaced(disk: &Arc<dyn Disk>, root: &Path, slot: u64, name: &str) -> Option<PathBuf> {
    if disk.exists(&root.join("current")) {
        return None;
    }
    let holds = |dir: &Path| MemberDir::peek(disk.clone(), dir).ok().flatten();
    let above = root.parent()?;
    if holds(above).is_some() {
        return Some(above.to_owned());
    }
    let named = [root.join(name), above.join(name)];
    named.into_iter().find(|dir| dir != root && holds(dir).is_some_and(|identity| identity.slot == slot))
}

fn directory(member_id: u64) -> String {
    format!("member-{member_id:016x}")
}

fn member_id_of(directory: &str) -> Option<u64> {
    let hex = directory.strip_prefix("member-").filter(|hex| hex.len() == 16)?;
    u64::from_str_radix(hex, 16).ok()
}

fn encode(identity: &Identity) -> Vec<u8> {
    let payload = identity.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes
}

fn decode(path: &Path, bytes: &[u8]) -> Result<Identity> {
    let path = || path.to_owned();
    if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
        return Err(Error::Foreign { path: path() });
    }
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    // The version comes first: another format may keep its checksum elsewhere.
    if number(8) != FORMAT {
        return Err(Error::Format { path: path(), found: number(8) });
    }
    let payload = &bytes[HEADER_BYTES..];
    if crc32c::crc32c(payload) != number(12) {
        return Err(Error::Damaged { path: path(), why: "checksum mismatch".into() });
    }
    Identity::decode(payload).map_err(|error| Error::Damaged { path: path(), why: error.to_string() })
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T> {
    result.map_err(|source| Error::Io { path: path.to_owned(), source })
}
