//! The objects of a path: their names, and what makes them a chain.
//!
//! Owns who may write. A generation belongs to one cluster; a later one begins only when a cluster was restored from this very path, or a
//! person says so. Records are numbered without a gap, and their creation is conditional, so two members that both think that it is
//! their turn make one chain, of the same entries.
//! Absent: when something is written (`duty`), and what is read for a moment (`plan`, `restore`).

use prost::Message;

use super::store::{Found, Store};
use super::{Error, Result, millis};
use crate::env::wall_clock;
use crate::pb::backup::{Full, Generation, Marker, Origin, Record};
use crate::pb::log::LogId;

const MARKER: &str = "marker";
const FORMAT: u32 = 1;
/// What the data of a full backup is called beside what is known of it.
pub const DATA: &str = ".data";
/// Two clusters that begin a path at once see each other then.
const TRIES: usize = 3;

/// A full backup, and its name.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedFull {
    pub generation: u32,
    pub name: String,
    pub full: Full,
}

impl NamedFull {
    /// The entry that its state stands after.
    pub fn applied(&self) -> LogId {
        self.full.applied.unwrap_or_default()
    }
}

/// A record as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    pub record: Record,
    /// SHA-256 of the object.
    pub sha256: [u8; 32],
}

/// The last entry of a record.
pub fn end_of(record: &Record) -> Option<LogId> {
    record.entries.last().and_then(|entry| entry.log_id).or(record.from)
}

pub fn record_name(generation: u32, number: u64) -> String {
    format!("{}/{number:020}", records(generation))
}

fn records(generation: u32) -> String {
    format!("{generation:08}/log")
}

fn fulls(generation: u32) -> String {
    format!("{generation:08}/full")
}

fn generation_name(number: u32) -> String {
    format!("generations/{number:08}")
}

/// A path, and what is in it. Cloning shares it.
#[derive(Clone)]
pub struct Archive {
    store: Store,
}

impl Archive {
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    async fn message<M: Message + Default>(&self, name: &str) -> Result<Option<(M, [u8; 32])>> {
        let Some((bytes, sha256)) = self.store.read(name).await? else { return Ok(None) };
        let message = M::decode(bytes).map_err(|error| self.store.damaged(name, error))?;
        Ok(Some((message, sha256)))
    }

    /// All generations, oldest first; none at a path that holds no backup.
    pub async fn generations(&self) -> Result<Vec<Generation>> {
        let Some((Marker { format }, _)) = self.message(MARKER).await? else {
            return Ok(Vec::new());
        };
        if format != FORMAT {
            return Err(Error::Refused(format!(
                "{}: backups of format {format}, and this build knows {FORMAT}: use a newer one",
                self.store.url()
            )));
        }
        let mut all: Vec<Generation> = Vec::new();
        for found in self.store.list("generations", None).await? {
            let missing = || self.store.damaged(&found.name, "it is missing");
            let (generation, _) = self.message::<Generation>(&found.name).await?.ok_or_else(missing)?;
            if generation_name(generation.number) != found.name {
                return Err(self.store.damaged(&found.name, "it is of another generation"));
            }
            all.push(generation);
        }
        Ok(all)
    }

    /// The newest generation; an error where there is none.
    pub async fn newest(&self) -> Result<Generation> {
        let nothing = || Error::Refused(format!("{}: there is no backup at this path", self.store.url()));
        self.generations().await?.pop().ok_or_else(nothing)
    }

    /// The generation that `cluster_id` writes to. It begins one at an empty path, and after the generation that it was restored from; to
    /// any other cluster's path it has no right.
    pub async fn claim(&self, cluster_id: u64, origin: Option<&Origin>) -> Result<Generation> {
        for _ in 0..TRIES {
            let generations = self.generations().await?;
            let newest = generations.last();
            if let Some(own) = newest.filter(|newest| newest.cluster_id == cluster_id) {
                return Ok(*own);
            }
            let follows = |newest: &Generation| origin.is_some_and(|origin| origin.generation == newest.number);
            if let Some(other) = newest.filter(|newest| !follows(newest)) {
                return Err(Error::Refused(format!(
                    "{}: the backups here are of cluster {:016x} (generation {}), and this is cluster {cluster_id:016x}: name another path, \
                     or, if that cluster is gone for good, let this one go on here with `quorate backup adopt`",
                    self.store.url(),
                    other.cluster_id,
                    other.number,
                )));
            }
            let begun = Generation {
                number: newest.map_or(1, |newest| newest.number + 1),
                cluster_id,
                origin: origin.copied(),
                ..Generation::default()
            };
            let begun = self.begin(begun).await?;
            if let Some(begun) = begun {
                return Ok(begun);
            }
        }
        Err(Error::Refused(format!("{}: others begin backups here at the same time; try again", self.store.url())))
    }

    /// Lets `cluster_id` write from now on, whoever has until now.
    pub async fn adopt(&self, cluster_id: u64) -> Result<Generation> {
        let newest = self.newest().await?;
        if newest.cluster_id == cluster_id {
            return Ok(newest);
        }
        let begun = self.begin(Generation { number: newest.number + 1, cluster_id, ..Generation::default() }).await?;
        begun.ok_or_else(|| Error::Refused(format!("{}: another cluster has just taken it", self.store.url())))
    }

    /// Makes `cluster_id` the one that writes here, in the place of the one before, which is told so by that. With `followed` only if that is
    /// the newest generation. Done already, it is the same again.
    pub(super) async fn promote(&self, cluster_id: u64, followed: Option<u32>) -> Result<Generation> {
        let newest = self.newest().await?;
        if newest.cluster_id == cluster_id && newest.is_promotion {
            return Ok(newest);
        }
        if let Some(followed) = followed.filter(|followed| *followed != newest.number) {
            return Err(Error::Refused(format!(
                "{}: generation {} of cluster {:016x} has begun there, and this standby has followed generation {followed}: another cluster has \
                 taken the place already",
                self.store.url(),
                newest.number,
                newest.cluster_id
            )));
        }
        let number = newest.number + 1;
        let begun = self.begin(Generation { number, cluster_id, is_promotion: true, ..Generation::default() }).await?;
        begun.ok_or_else(|| Error::Refused(format!("{}: another cluster has just taken it", self.store.url())))
    }

    /// Generations after this one, oldest first. Costs a list where there are none.
    pub(super) async fn generations_after(&self, number: u32) -> Result<Vec<Generation>> {
        let mut later = Vec::new();
        for found in self.store.list("generations", Some(&generation_name(number))).await? {
            let missing = || self.store.damaged(&found.name, "it is missing");
            later.push(self.message::<Generation>(&found.name).await?.ok_or_else(missing)?.0);
        }
        Ok(later)
    }

    /// Whether there is a record of a later number.
    pub(super) async fn has_record_after(&self, generation: u32, number: u64) -> Result<bool> {
        let later = self.store.list(&records(generation), Some(&record_name(generation, number))).await?;
        Ok(!later.is_empty())
    }

    /// The number of the newest record; 0 for none.
    pub(super) async fn last_record(&self, generation: u32) -> Result<u64> {
        Ok(self.record_objects(generation).await?.pop().map_or(0, |(number, _)| number))
    }

    /// `None`: somebody else was faster.
    async fn begin(&self, generation: Generation) -> Result<Option<Generation>> {
        self.store.check().await?;
        // Whoever makes the marker: all make the same.
        self.store.create(MARKER, &Marker { format: FORMAT }.encode_to_vec()).await?;
        let generation = Generation { begun_at_millis: millis(wall_clock()), ..generation };
        let made = self.store.create(&generation_name(generation.number), &generation.encode_to_vec()).await?;
        Ok(made.map(|_| generation))
    }

    /// The full backups of a generation, oldest first. One whose object is damaged is an error in its place.
    pub async fn fulls(&self, generation: u32) -> Result<Vec<Result<NamedFull>>> {
        let mut all = Vec::new();
        for found in self.store.list(&fulls(generation), None).await? {
            if !found.name.ends_with(DATA) {
                all.push(self.full(generation, &found.name).await);
            }
        }
        Ok(all)
    }

    /// One full backup, by its name.
    pub(super) async fn full(&self, generation: u32, name: &str) -> Result<NamedFull> {
        let missing = || self.store.damaged(name, "it is missing");
        let (full, _) = self.message::<Full>(name).await?.ok_or_else(missing)?;
        let index = full.applied.map_or(0, |applied| applied.index);
        if !name.starts_with(&format!("{}/{index:020}-", fulls(generation))) {
            return Err(self.store.damaged(name, "it is another backup's"));
        }
        Ok(NamedFull { generation, name: name.to_owned(), full })
    }

    /// A name for a full backup of the state after the entry at `index`.
    pub(super) fn new_full(&self, generation: u32, index: u64) -> String {
        format!("{}/{index:020}-{:016x}", fulls(generation), self.store.env().random_u64())
    }

    /// Makes a full backup count.
    pub(super) async fn add_full(&self, generation: u32, name: &str, full: Full) -> Result<NamedFull> {
        if self.store.create(name, &full.encode_to_vec()).await?.is_none() {
            return Err(self.store.damaged(name, "somebody else has made it"));
        }
        self.full(generation, name).await
    }

    /// The data of full backups in every generation, those that never came to count among them.
    pub async fn full_objects(&self, generation: u32) -> Result<Vec<Found>> {
        self.store.list(&fulls(generation), None).await
    }

    /// What records there are, oldest first.
    pub async fn record_objects(&self, generation: u32) -> Result<Vec<(u64, Found)>> {
        let found = self.store.list(&records(generation), None).await?;
        let number = |found: &Found| found.name.rsplit('/').next().and_then(|name| name.parse().ok());
        Ok(found.into_iter().filter_map(|found| Some((number(&found)?, found))).collect())
    }

    /// A record; `None` if there is none of that number.
    pub async fn record(&self, generation: u32, number: u64) -> Result<Option<Stored>> {
        let name = record_name(generation, number);
        let Some((record, sha256)) = self.message::<Record>(&name).await? else { return Ok(None) };
        if record.number != number {
            return Err(self.store.damaged(&name, format!("it is record {}", record.number)));
        }
        Ok(Some(Stored { record, sha256 }))
    }

    /// The newest record.
    pub async fn tip(&self, generation: u32) -> Result<Option<Stored>> {
        let Some((number, found)) = self.record_objects(generation).await?.pop() else { return Ok(None) };
        let stored = self.record(generation, number).await?;
        stored.map(Some).ok_or_else(|| self.store.damaged(&found.name, "it is missing"))
    }

    /// Adds a record, and reads it back. `None`: another member has added one of this number.
    pub(super) async fn add_record(&self, generation: u32, record: &Record) -> Result<Option<[u8; 32]>> {
        let name = record_name(generation, record.number);
        let Some(sha256) = self.store.create(&name, &record.encode_to_vec()).await? else { return Ok(None) };
        match self.store.read(&name).await? {
            Some((_, there)) if there == sha256 => Ok(Some(sha256)),
            Some(_) => Err(self.store.damaged(&name, "it is not what was written")),
            None => Err(self.store.damaged(&name, "it was written, and is missing")),
        }
    }

    pub async fn remove(&self, name: &str) -> Result<()> {
        self.store.remove(name).await
    }
}
