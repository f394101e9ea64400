//! A new cluster out of the disk of one survivor, after a quorum was lost for good.
//!
//! [`examine`] reads what the disk holds: what is certainly committed, what is only written here. [`Survivor::found`] writes a new
//! self beside the old one: the whole state as a snapshot, an empty log behind it, one voter, a new cluster id.
//! An entry that cannot be applied ends it, unless the caller has it skipped: it is then as if it had changed nothing, which only a new
//! cluster may do, for in the old one the members would part.
//! Invariants: revisions stay; the old self is not changed, and the new one exists whole or not at all (the caller switches to it
//! last). The new cluster id fences it: no old member takes a call of it, nor it one of theirs.
//! Absent: any judgement whether the others are really gone; that is a person's.

use std::collections::BTreeSet;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use openraft::EntryPayload;
use prost::Message as _;

use super::convert::{entry_from_record, log_id_from_pb};
use super::recover::{self, recover};
use super::state_machine::{Applied, poison, write_snapshot};
use super::{Entry, Member, Membership, Store, StoredMembership, log_id_to_pb};
use crate::env::Env;
use crate::pb::log::{Batch, LogId, Node, Vote};
use crate::storage::log::{self, Log, Owner};
use crate::storage::{snapshot, state};

/// Bytes of the log that are read at a time.
const READ_BYTES: u64 = 4 << 20;

/// Why a disk cannot be read, or a new self not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    Recover(#[from] recover::Error),
    #[error("snapshot: {0}")]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("this disk holds no entry of its cluster's log; there is nothing to recover from it")]
    Empty,
    #[error("the entry at log index {0} cannot be skipped: {1}")]
    NotSkipped(u64, &'static str),
}

/// Where a self keeps its things.
pub struct Places<'a> {
    pub log: &'a Path,
    pub snapshot: &'a Path,
    pub state: &'a Path,
}

/// A position in the log and the revision of the state there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub log_id: LogId,
    pub revision: i64,
}

/// An entry that is passed over.
pub struct Skipped {
    pub log_id: LogId,
    pub bytes: usize,
    /// What it was to do; or why nobody can tell.
    pub batch: Result<Batch, String>,
}

/// What the disk of a stopped member holds.
pub struct Survivor {
    /// Up to here everything is committed, as far as this disk knows.
    pub certain: Option<Point>,
    /// The last entry on this disk.
    pub last: Point,
    pub skipped: Vec<Skipped>,
    /// Voters of the newest membership on this disk, and of the one before if a change is half done, with how they are reached.
    pub voters: Vec<(u64, Node)>,
    this: Member,
    vote: Option<Vote>,
    state: Applied,
}

/// Reads the disk of a stopped member, as a start would: a torn tail of the log is cut. The entries at the indexes in `skip` are
/// passed over.
pub async fn examine(env: &Env, this: Member, places: &Places<'_>, skip: &BTreeSet<u64>) -> Result<Survivor, Error> {
    let owner = Owner { cluster_id: this.cluster_id, member_id: this.member_id };
    let log = Log::open(env, places.log, owner, log::Options::default())?;
    let snapshots = snapshot::Dir::open(env, places.snapshot, this.cluster_id)?;
    let recovered = recover(env, this, &log, &snapshots, places.state, &state::Options::default(), 0)?;
    let found = log.state();
    let store = recovered.store;
    let point = || {
        let (log_id, revision) = store.read(|s| (s.log_id, s.kv.revision()));
        log_id.map(|log_id| Point { log_id: log_id_to_pb(&log_id), revision })
    };
    // What was applied was committed, whether or not the log has noted it.
    let mut certain = point();
    let committed = found.committed.map(|id| id.index);
    let mut next = store.applied_index().map_or(0, |index| index + 1);
    let end = found.next_index();
    if let Some(index) = skip.iter().find(|index| !(next..end).contains(*index)) {
        return Err(Error::NotSkipped(*index, "it is applied already, or is not in this log"));
    }
    let mut skipped = Vec::new();
    while next < end {
        let records = log.read(next..end, READ_BYTES).await?;
        for record in records {
            let entry = entry_from_record(record).map_err(io::Error::other)?;
            next = entry.log_id.index() + 1;
            if skip.contains(&(next - 1)) {
                skipped.push(pass_over(&store, entry)?);
            } else {
                apply(&store, entry)?;
            }
            if committed >= Some(next - 1) {
                certain = point();
            }
        }
    }
    let last = point().ok_or(Error::Empty)?;
    let state = store.view();
    let membership = state.membership.membership();
    let voters = membership.voter_ids().filter_map(|id| Some((id, membership.get_node(&id)?.clone()))).collect();
    log.close().await;
    Ok(Survivor { certain, last, skipped, voters, this, vote: found.vote, state })
}

/// A panic in apply is told like an entry that it does not know: the state is given up in either case.
fn apply(store: &Store, entry: Entry) -> Result<(), Error> {
    let index = entry.log_id.index();
    match std::panic::catch_unwind(AssertUnwindSafe(|| store.apply(entry, false))) {
        Ok(applied) => Ok(applied.map(drop)?),
        Err(_) => Err(poison(index, "this program panics at it").into()),
    }
}

fn pass_over(store: &Store, entry: Entry) -> Result<Skipped, Error> {
    let log_id = log_id_to_pb(&entry.log_id);
    let bytes = match &entry.payload {
        EntryPayload::Normal(batch) => batch.0.clone(),
        EntryPayload::Blank => return Err(Error::NotSkipped(log_id.index, "it is empty")),
        EntryPayload::Membership(_) => return Err(Error::NotSkipped(log_id.index, "it changes the membership")),
    };
    store.pass_over(&entry);
    let batch = Batch::decode(bytes.clone()).map_err(|error| error.to_string());
    Ok(Skipped { log_id, bytes: bytes.len(), batch })
}

impl Survivor {
    /// What the old membership says of this member.
    pub fn node(&self) -> Node {
        self.state.membership.membership().get_node(&self.this.member_id).cloned().unwrap_or_default()
    }

    /// Writes the log and the snapshot of the new cluster's only voter.
    pub async fn found(self, env: &Env, new: Member, places: &Places<'_>) -> Result<(), Error> {
        let node = Node { held: false, ..self.node() };
        let voters = [new.member_id].into_iter().collect();
        let membership = Membership::new(
            vec![voters],
            [(new.member_id, node)].into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        )
        .map_err(io::Error::other)?;
        let last = log_id_from_pb(self.last.log_id);
        let state = Applied { membership: StoredMembership::new(Some(last), membership), ..self.state };
        let snapshots = snapshot::Dir::open(env, places.snapshot, new.cluster_id)?;
        write_snapshot(&snapshots, new, &state)?;
        let owner = Owner { cluster_id: new.cluster_id, member_id: new.member_id };
        let log = Log::create(env, places.log, owner, log::Options::default())?;
        // Terms go on: an entry of a smaller term would be older than those that the state holds.
        let term = self.vote.map_or(0, |vote| vote.term).max(self.last.log_id.term) + 1;
        log.purge(self.last.log_id).await?;
        log.save_vote(Vote { term, member: new.member_id, committed: false }).await?;
        log.close().await;
        Ok(())
    }
}
