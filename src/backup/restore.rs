//! The state of a moment, from a path: a full backup, and the entries after it up to there.
//!
//! Invariants: a state is given out only if all that it was made of opened, fits together, and led to the digests that were archived. A
//! damaged full backup is passed over for an older one if there is one, which is said; a damaged or missing record ends the way, and is
//! named. Memory is the state, an object, and what lies between two marks of time.
//! Absent: data directories, and what a new cluster changes of the state (`server::restore`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::archive::{Archive, DATA, NamedFull, Stored, end_of, record_name};
use super::plan::{Target, applied_at, choose, shown};
use super::{Error, Result};
use crate::env::{File, Pool};
use crate::kv::{self, Loader};
use crate::pb::backup::Full;
use crate::pb::log::{self, Entry, LogId, Moment};
use crate::raft::{Applied, Replay};
use crate::storage::snapshot::backup;

/// Pieces of a download that wait for who loads them.
const WAITING: usize = 16;

/// A moment, restored.
pub struct Restored {
    pub state: Applied,
    pub generation: u32,
    pub cluster_id: u64,
    /// The full backup that it began with.
    pub full: NamedFull,
    /// The last record that it took something of; 0 for none.
    pub record: u64,
    /// The record that goes on from there.
    pub next_record: u64,
    /// The leader's time at which all of it had been applied, as far as that is known.
    pub at_millis: u64,
    /// It ends within the entry after the one that the state stands after.
    pub is_within: bool,
    /// Of all that is in the state: the same whatever it was made of.
    pub sha256: [u8; 32],
    /// What was wrong, and was done without.
    pub damaged: Vec<Error>,
}

/// Where to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    End,
    /// After this entry.
    Index(u64),
    Moment(Target),
}

/// Restores a moment; of a given generation, or of the newest that has it.
pub async fn restore(archive: &Archive, target: Target, generation: Option<u32>) -> Result<Restored> {
    let (mut fulls, mut damaged) = (Vec::new(), Vec::new());
    for one in archive.generations().await? {
        if generation.is_none_or(|wanted| wanted == one.number) {
            for full in archive.fulls(one.number).await? {
                full.map_or_else(|error| damaged.push(error), |full| fulls.push(full));
            }
        }
    }
    let chosen = choose(&fulls, target);
    if chosen.is_empty() {
        return Err(missing(archive, target, &fulls, damaged));
    }
    for full in chosen {
        match Player::load(archive, full).await {
            Ok(mut player) => {
                player.play(Until::Moment(target)).await?;
                return player.finish(target, damaged).await;
            }
            Err(error @ Error::Damaged { .. }) => damaged.push(error),
            Err(error) => return Err(error),
        }
    }
    Err(damaged.pop().expect("one was tried"))
}

/// Restores the very moment that somebody has found before, whatever was added since.
pub async fn exact(archive: &Archive, moment: &Moment) -> Result<Restored> {
    let full = archive.full(moment.generation, &moment.full).await?;
    let mut player = Player::load(archive, &full).await?;
    player
        .play(if moment.is_within {
            Until::Moment(Target::Revision(moment.revision))
        } else {
            Until::Index(moment.index)
        })
        .await?;
    let restored = player.finish(Target::Revision(moment.revision), Vec::new()).await?;
    if restored.sha256[..] != moment.sha256[..] {
        let reason = format!("it does not lead to the state that was found there (revision {})", moment.revision);
        return Err(archive.store().damaged(&moment.full, reason));
    }
    Ok(restored)
}

fn missing(archive: &Archive, target: Target, fulls: &[NamedFull], mut damaged: Vec<Error>) -> Error {
    let oldest = fulls.iter().map(|named| (named.full.revision, named.full.at_millis)).min();
    match (oldest, damaged.pop()) {
        (None, Some(error)) => error,
        (None, None) => Error::Refused(format!("{}: there is no full backup at this path", archive.store().url())),
        (Some((revision, at)), _) => Error::Refused(format!(
            "{}: nothing is there of {target}: the oldest full backup is of revision {revision}, made at {}",
            archive.store().url(),
            shown(at)
        )),
    }
}

/// Loads a full backup and goes on from it.
pub struct Player {
    archive: Archive,
    full: NamedFull,
    /// `None` only while it works elsewhere.
    replay: Option<Replay>,
    /// The record to read next, and what it must name as the one before.
    next: u64,
    before: Option<[u8; 32]>,
    /// Where the last record that was read has ended.
    end: Option<LogId>,
    /// Read and not applied: whether a moment takes it in, the next mark says.
    waiting: VecDeque<Entry>,
    /// What the ends of records must lead to.
    expected: VecDeque<Expected>,
    /// The newest mark of time that was passed, and its entry.
    mark: (u64, u64),
    used: u64,
    is_within: bool,
}

/// The state after an entry, as it was archived.
struct Expected {
    index: u64,
    revision: i64,
    digest: Option<log::Digest>,
    name: String,
}

impl Player {
    pub async fn load(archive: &Archive, full: &NamedFull) -> Result<Self> {
        let state = load(archive, full).await?;
        let (index, record) = (full.applied().index, full.full.record);
        let mut player = Self {
            archive: archive.clone(),
            mark: (full.full.at_millis, index),
            full: full.clone(),
            replay: Some(Replay::new(state)),
            next: 0,
            before: None,
            end: None,
            waiting: VecDeque::new(),
            expected: VecDeque::new(),
            used: 0,
            is_within: false,
        };
        player.next = player.first_record(index, record).await?;
        Ok(player)
    }

    /// The record that goes on after the entry at `index`: the one after `hint`, or one shortly before that.
    async fn first_record(&self, index: u64, hint: u64) -> Result<u64> {
        let mut number = hint + 1;
        while number > 1 {
            let Some(stored) = self.archive.record(self.full.generation, number).await? else {
                // Not written yet: the one before decides.
                number -= 1;
                if self
                    .archive
                    .record(self.full.generation, number)
                    .await?
                    .is_none_or(|stored| end_index(&stored) <= index)
                {
                    return Ok(number + 1);
                }
                continue;
            };
            if stored.record.from.is_none_or(|from| from.index <= index) {
                break;
            }
            number -= 1;
        }
        Ok(number)
    }

    fn replay(&self) -> &Replay {
        self.replay.as_ref().expect("it works here")
    }

    /// What has become of the state so far.
    pub fn state(&self) -> &Applied {
        self.replay().state()
    }

    fn index(&self) -> u64 {
        self.replay().index().unwrap_or(0)
    }

    /// Goes on. At the end of what there is, whatever was to be reached, it stops there.
    pub async fn play(&mut self, until: Until) -> Result<()> {
        let mut by_time = None;
        loop {
            if let Until::Index(index) = until
                && self.index() >= index
            {
                return Ok(());
            }
            let Some(stored) = self.next_record().await? else {
                // No later mark: all there is had been applied by then, as far as anybody has noted.
                return self.apply(u64::MAX, until).await.map(drop);
            };
            let name = record_name(self.full.generation, stored.record.number);
            let marks = stored.record.marks.clone();
            self.take(stored, name);
            let (upto, is_last) = match until {
                Until::Moment(Target::Time(at)) => {
                    let (known, is_last) = applied_at(&marks, at, by_time);
                    by_time = known;
                    (known.unwrap_or(0), is_last)
                }
                _ => (u64::MAX, false),
            };
            let passed = marks.iter().filter(|mark| mark.index <= upto);
            let mut passed =
                passed.filter(|mark| !matches!(until, Until::Moment(Target::Time(at)) if mark.at_millis > at));
            if let Some(mark) = passed.next_back() {
                self.mark = (mark.at_millis, mark.index);
            }
            if !self.apply(upto, until).await? || is_last {
                return Ok(());
            }
        }
    }

    /// The next record, if it goes on where the last one has ended.
    async fn next_record(&mut self) -> Result<Option<Stored>> {
        let generation = self.full.generation;
        let name = record_name(generation, self.next);
        let damaged = |reason: &str| self.archive.store().damaged(&name, reason);
        let Some(stored) = self.archive.record(generation, self.next).await? else {
            // Records go without a gap, so a later one means that this one is lost.
            let later = self.archive.record_objects(generation).await?;
            if later.last().is_some_and(|(number, _)| *number > self.next) {
                return Err(damaged("it is missing"));
            }
            return Ok(None);
        };
        if self.before.is_some_and(|before| stored.record.before[..] != before) {
            return Err(damaged("it does not go on from the record before it"));
        }
        let (from, end) = (stored.record.from, self.end);
        let goes_on = match end {
            Some(end) => from == Some(end),
            None => from.map_or(0, |from| from.index) <= self.index(),
        };
        // A member's log had been purged before it was archived: a later full backup leads on from there.
        Ok(goes_on.then_some(stored))
    }

    fn take(&mut self, stored: Stored, name: String) {
        let end = end_of(&stored.record);
        self.before = Some(stored.sha256);
        self.used = stored.record.number;
        self.next = stored.record.number + 1;
        self.end = end;
        let index = end.map_or(0, |end| end.index);
        if index > self.index() {
            let (revision, digest) = (stored.record.revision, stored.record.digest);
            self.expected.push_back(Expected { index, revision, digest, name });
        }
        self.waiting.extend(stored.record.entries);
    }

    /// Applies what waits, up to the entry at `upto`; false if the moment is reached within.
    async fn apply(&mut self, upto: u64, until: Until) -> Result<bool> {
        let upto = if let Until::Index(index) = until { upto.min(index) } else { upto };
        let revision = if let Until::Moment(Target::Revision(revision)) = until { Some(revision) } else { None };
        let ready = self.waiting.iter().take_while(|entry| entry.log_id.is_none_or(|id| id.index <= upto)).count();
        let entries: Vec<Entry> = self.waiting.drain(..ready).collect();
        let mut replay = self.replay.take().expect("it works here");
        let mut expected = std::mem::take(&mut self.expected);
        let work = move || {
            let goes_on = apply_all(&mut replay, entries, revision, &mut expected);
            replay.sweep();
            (replay, expected, goes_on)
        };
        let (replay, expected, goes_on) = self.archive.store().env().long(Pool::Snapshots, work).await;
        (self.replay, self.expected) = (Some(replay), expected);
        let goes_on = goes_on.map_err(|(name, reason)| self.archive.store().damaged(&name, reason))?;
        self.is_within = !goes_on;
        Ok(goes_on)
    }

    async fn finish(mut self, target: Target, damaged: Vec<Error>) -> Result<Restored> {
        let state = self.replay.take().expect("it works here").into_state();
        if let Target::Revision(revision) = target
            && state.kv.revision() < revision
        {
            return Err(Error::Refused(format!(
                "{}: {target} is not there: what is archived ends at revision {}{}",
                self.archive.store().url(),
                state.kv.revision(),
                if self.end.is_some() { "" } else { ", and no changes after the full backup before it are there" }
            )));
        }
        let hashing = self.archive.store().env().long(Pool::Snapshots, move || {
            let sha256 = sha256_of(&state.kv);
            (state, sha256)
        });
        let (state, sha256) = hashing.await;
        Ok(Restored {
            state,
            is_within: self.is_within,
            sha256,
            generation: self.full.generation,
            cluster_id: self.full.full.cluster_id,
            record: self.used,
            next_record: self.next,
            at_millis: self.mark.0,
            full: self.full,
            damaged,
        })
    }
}

fn sha256_of(state: &kv::State) -> [u8; 32] {
    let mut sha = Sha256::new_with_prefix(state.revision().to_le_bytes());
    let mut bytes = Vec::new();
    for change in state.changes() {
        bytes.clear();
        change.encode_length_delimited(&mut bytes).expect("a Vec grows");
        sha.update(&bytes);
    }
    sha.finalize().into()
}

fn end_index(stored: &Stored) -> u64 {
    end_of(&stored.record).map_or(0, |end| end.index)
}

/// False if a revision that is too late was met. An error names the object.
fn apply_all(
    replay: &mut Replay,
    entries: Vec<Entry>,
    revision_max: Option<i64>,
    expected: &mut VecDeque<Expected>,
) -> std::result::Result<bool, (String, String)> {
    for entry in entries {
        let name = || expected.front().map_or_else(String::new, |expected| expected.name.clone());
        if !replay.apply(entry, revision_max).map_err(|reason| (name(), reason))? {
            return Ok(false);
        }
        while let Some(due) = expected.front().filter(|due| replay.index() >= Some(due.index)) {
            due.check(&replay.state().kv).map_err(|reason| (due.name.clone(), reason))?;
            expected.pop_front();
        }
    }
    Ok(true)
}

impl Expected {
    fn check(&self, state: &kv::State) -> std::result::Result<(), String> {
        if self.revision != 0 && self.revision != state.revision() {
            return Err(format!("it leads to revision {}, and {} was archived", state.revision(), self.revision));
        }
        if !is_same_digest(self.digest.as_ref(), state) {
            return Err("it leads to another state than the members had (their digest differs)".into());
        }
        Ok(())
    }
}

/// Whether a digest that was archived is the state's; what is not known differs from nothing.
pub(super) fn is_same_digest(archived: Option<&log::Digest>, state: &kv::State) -> bool {
    match (archived, state.digest_to_pb()) {
        (Some(archived), Some(found)) => archived.version != found.version || archived.value == found.value,
        _ => true,
    }
}

/// The state in a full backup, checked against what is known of it.
async fn load(archive: &Archive, named: &NamedFull) -> Result<Applied> {
    let name = format!("{}{DATA}", named.name);
    let mut download = archive.store().download(&name).await?;
    let (tell, told) = mpsc::channel(WAITING);
    let feed =
        Arc::new(Feed { bytes: named.full.bytes, pieces: Mutex::new(Pieces { told, piece: Bytes::new(), offset: 0 }) });
    let (full, shown) = (named.full.clone(), name.clone());
    let loading = archive.store().env().long(Pool::Snapshots, move || load_from(feed, &full, &shown));
    let sending = async {
        let mut sha = Sha256::new();
        while let Some(piece) = download.next().await? {
            sha.update(&piece);
            // Who loads has given up on an error of its own.
            if tell.send(piece).await.is_err() {
                break;
            }
        }
        drop(tell);
        Ok::<_, Error>(sha.finalize())
    };
    let (loaded, sent) = tokio::join!(loading, sending);
    let sha = sent?;
    let state = loaded.map_err(|reason| archive.store().damaged(&name, reason))?;
    if sha[..] != named.full.sha256[..] {
        return Err(archive.store().damaged(&name, "it is not the data that its backup was made with"));
    }
    Ok(state)
}

fn load_from(feed: Arc<Feed>, full: &Full, name: &str) -> std::result::Result<Applied, String> {
    let text = |error: crate::storage::snapshot::Error| error.to_string();
    let reader = backup::read(feed.clone(), full.bytes, name).map_err(text)?;
    let head = reader.head().clone();
    if head.cluster_id != full.cluster_id || head.meta.applied != full.applied || head.meta.revision != full.revision {
        return Err("its head is another snapshot's".into());
    }
    let (mut loader, mut hash) = (Loader::new(), kv::ChangesHash::default());
    for change in reader {
        let change = change.map_err(text)?;
        hash.add(&change);
        loader.load(change).map_err(|error| error.to_string())?;
    }
    feed.drain();
    if (hash.hash(), hash.versions()) != (full.hash_kv, full.versions) {
        return Err("the hash of its versions is not that of its backup".into());
    }
    let state = Applied::loaded(loader, &head.meta).map_err(|error| error.to_string())?;
    let compared = state.kv.hash_kv(0).map_err(|error| error.to_string())?;
    if compared.hash != full.hash_kv || compared.compact_revision != full.compacted {
        return Err("the state in it has another hash than its backup".into());
    }
    Ok(state)
}

/// A file that is read while it arrives, from begin to end.
struct Feed {
    bytes: u64,
    pieces: Mutex<Pieces>,
}

struct Pieces {
    told: mpsc::Receiver<Bytes>,
    piece: Bytes,
    /// Of the first byte of `piece`.
    offset: u64,
}

impl Feed {
    /// Takes the rest, which is padding, so that whoever sends comes to an end.
    fn drain(&self) {
        while self.pieces.lock().told.blocking_recv().is_some() {}
    }
}

impl File for Feed {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut pieces = self.pieces.lock();
        if offset != pieces.offset {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it can only be read from begin to end"));
        }
        if pieces.piece.is_empty() {
            pieces.piece = pieces.told.blocking_recv().unwrap_or_default();
        }
        let count = pieces.piece.len().min(into.len());
        into[..count].copy_from_slice(&pieces.piece.split_to(count));
        pieces.offset += count as u64;
        Ok(count)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
