//! A standby: what another cluster archives is read from its path, and applied here.
//!
//! ```text
//! source: log entries -> record n   (the path)   record n -> Follow commands, through this cluster's own log -> all of its members
//! ```
//! The leader does it. How far it has got is part of the state (`kv::role`), and a command that does not begin exactly there does nothing; so
//! a new leader goes on where the old one was, and what is proposed twice counts once.
//!
//! Invariants: a record is taken only if it opens, names the one before it, and goes on where the state is; after it the state has the
//! revision that the source had. What cannot be followed any more is said (`behind`), and never guessed. In memory is one record.
//! Absent: what a command does (`kv::role`), promotion (`succession`).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prost::Message as _;

use super::archive::{Archive, Stored, record_name};
use super::plan::shown;
use super::store::{Access, Store};
use super::{Error, Result, millis};
use crate::caller::Caller;
use crate::env::{Env, Instant, sleep, wall_clock};
use crate::kv::ROLES_SINCE;
use crate::metrics::metrics;
use crate::node::Node;
use crate::pb::backup::Mark;
use crate::pb::log::{self, Batch, Command, Follow, LogId, SourceEntry, command, source_entry};

/// Between looks for the next record. The source makes one each `backup.interval`.
const LOOK: Duration = Duration::from_secs(1);
/// After a failure the store is left alone, longer each time.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Looks that found nothing, after which it is asked why.
const LOOKS_PER_QUESTION: u32 = 10;
/// Bytes of entries in one command; one entry at least.
const COMMAND_BYTES: usize = 512 << 10;
/// A standby that has not seen the end of the path for so long is behind.
const BEHIND: Duration = Duration::from_secs(60);

/// A path, and how it is reached.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Empty: the settings name none.
    pub url: String,
    pub access: Access,
}

/// See the module's head.
pub struct Follower {
    env: Env,
    node: Node,
    /// Where the source's backups are.
    settings: Settings,
    /// Where the cluster's own are.
    own: Settings,
    told: Mutex<Told>,
}

/// How it goes, as the leader knows.
#[derive(Default)]
struct Told {
    /// Since when this member leads a standby.
    since: Option<Instant>,
    /// When everything that is at the path was here last.
    whole: Option<Instant>,
    /// Why it failed last, if it has since.
    failure: Option<String>,
}

/// A path that is open, and the record that was read last.
struct Session {
    archive: Archive,
    before: Option<[u8; 32]>,
    /// Looks that found nothing, one after the other.
    idle: u32,
}

impl Follower {
    /// Follows the path of `settings` while this cluster is a standby; `own` is that of its own backups.
    pub fn start(env: &Env, node: &Node, settings: Settings, own: Settings) -> Arc<Self> {
        let follower = Arc::new(Self { env: env.clone(), node: node.clone(), settings, own, told: Mutex::default() });
        let (running, shutdown) = (follower.clone(), env.shutdown.clone());
        env.spawn(async move {
            tokio::select! {
                () = running.run() => {}
                () = shutdown.cancelled() => {}
            }
        });
        follower
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// The path that is followed; of a cluster that is no standby, its own.
    pub(super) fn open(&self) -> Result<Archive> {
        let Settings { url, access } = if self.standby().is_some() { &self.settings } else { &self.own };
        if url.is_empty() {
            return Err(Error::Refused(
                "the settings name no path: set restore.follow to the one that a standby was formed with, backup.url for another cluster"
                    .into(),
            ));
        }
        Ok(Archive::new(Store::open(&self.env, url, access)?))
    }

    /// How far this cluster has followed, if it is a standby.
    pub fn standby(&self) -> Option<log::Standby> {
        if self.node.store().is_writable() {
            return None;
        }
        self.node.store().read(|s| s.kv.standby().cloned())
    }

    /// What this cluster is, in a sentence, if it is a standby.
    pub fn describe(&self) -> Option<String> {
        let standby = self.standby()?;
        let upto = match standby.at_millis {
            0 => "what a full backup held".to_owned(),
            at => format!("everything that was written there until {}", shown(at)),
        };
        Some(format!(
            "this cluster takes no writes: it follows {:?}, generation {}, and has {upto}",
            self.settings.url, standby.generation
        ))
    }

    /// What is the matter, in a sentence, if this member leads a standby that is behind.
    pub fn behind(&self) -> Option<String> {
        let standby = self.standby()?;
        let told = self.told.lock();
        let since = told.since?;
        let seen = told.whole.map_or(since, |whole| whole.max(since));
        let (silent, upto) = (seen.elapsed(), shown(standby.at_millis));
        match &told.failure {
            Some(failure) if silent >= BEHIND || self.settings.url.is_empty() => {
                Some(format!("this standby has nothing later than {upto}: {failure}"))
            }
            None if silent >= BEHIND => {
                Some(format!("this standby has come to {upto}, and there is more at the path than it has applied"))
            }
            _ => None,
        }
    }

    async fn run(&self) {
        let (mut session, mut pause) = (None, LOOK);
        loop {
            sleep(pause).await;
            pause = LOOK;
            let Some(standby) = self.standby() else {
                self.rest(&mut session);
                metrics().standby.is_standby.set(0);
                continue;
            };
            self.count(&standby);
            if !self.node.status().is_leader {
                self.rest(&mut session);
                continue;
            }
            self.told.lock().since.get_or_insert_with(Instant::now);
            match self.step(&mut session).await {
                Ok(()) => self.told.lock().failure = None,
                Err(error) => {
                    session = None;
                    pause = self.env.jitter(RETRY_MAX);
                    self.fail(&error);
                }
            }
        }
    }

    fn rest(&self, session: &mut Option<Session>) {
        *session = None;
        *self.told.lock() = Told::default();
    }

    fn count(&self, standby: &log::Standby) {
        let counted = &metrics().standby;
        counted.is_standby.set(1);
        counted.source_time.set((standby.at_millis / 1000) as i64);
        if standby.at_millis > 0 {
            counted.age.set((millis(wall_clock()).saturating_sub(standby.at_millis) / 1000) as i64);
        }
    }

    fn fail(&self, error: &Error) {
        metrics().standby.failures.inc();
        let sentence = error.to_string();
        let mut told = self.told.lock();
        if told.failure.as_ref() != Some(&sentence) {
            tracing::warn!(error = sentence, "the source cannot be followed; it is tried again");
            told.failure = Some(sentence);
        }
    }

    /// Applies all that there is.
    async fn step(&self, session: &mut Option<Session>) -> Result<()> {
        let mut open = match session.take() {
            Some(open) => open,
            None => self.begin().await?,
        };
        while let Some(standby) = self.standby() {
            if !self.node.status().is_leader {
                return Ok(());
            }
            let Some(stored) = open.archive.record(standby.generation, standby.next_record).await? else {
                open.idle += 1;
                if open.idle.is_multiple_of(LOOKS_PER_QUESTION) || open.idle == 1 {
                    why_nothing(&open.archive, &standby).await?;
                }
                self.told.lock().whole = Some(Instant::now());
                break;
            };
            self.take(&mut open, &standby, stored).await?;
        }
        *session = Some(open);
        Ok(())
    }

    async fn begin(&self) -> Result<Session> {
        let archive = self.open()?;
        archive.store().check().await?;
        let standby = self.standby().unwrap_or_default();
        let before = match standby.next_record.checked_sub(1).filter(|number| *number > 0) {
            Some(number) => archive.record(standby.generation, number).await?.map(|stored| stored.sha256),
            None => None,
        };
        tracing::info!(
            path = self.settings.url,
            generation = standby.generation,
            record = standby.next_record,
            "follows"
        );
        Ok(Session { archive, before, idle: 0 })
    }

    /// Applies what of a record is not applied yet.
    async fn take(&self, open: &mut Session, standby: &log::Standby, stored: Stored) -> Result<()> {
        let number = stored.record.number;
        let name = record_name(standby.generation, number);
        let damaged = |reason: String| open.archive.store().damaged(&name, reason);
        if open.before.is_some_and(|before| stored.record.before[..] != before) {
            return Err(damaged("it does not go on from the record before it".into()));
        }
        let applied = standby.applied.unwrap_or_default();
        if stored.record.from.is_none_or(|from| from.index > applied.index) {
            return Err(Error::Refused(format!(
                "{name} does not go on after entry {} of the source's log, for the source's log was purged before it was archived: this \
                 standby must be made anew from the full backup after it, with empty disks",
                applied.index
            )));
        }
        let (revision, marks) = (stored.record.revision, stored.record.marks.clone());
        let entries = new_entries(stored.record.entries, applied).map_err(&damaged)?;
        for follow in commands(standby, number, entries, &marks) {
            let command = Command::new(ROLES_SINCE, command::Request::Follow(follow));
            let applying = self.node.propose(&Caller::Internal, command).await;
            applying.map_err(|error| Error::Refused(format!("{name} is not applied: {error}")))?;
        }
        let (now, next) = self.node.store().read(|s| (s.kv.revision(), s.kv.standby().map(|now| now.next_record)));
        if next.is_some_and(|next| next == number + 1) && now != revision {
            return Err(Error::Refused(format!(
                "after {name} this standby is at revision {now} and the source was at {revision}: it is not the source's copy, and must be made \
                 anew, with empty disks"
            )));
        }
        metrics().standby.records.inc();
        (open.before, open.idle) = (Some(stored.sha256), 0);
        Ok(())
    }
}

/// Refuses a path that has come to an end for this standby.
async fn why_nothing(archive: &Archive, standby: &log::Standby) -> Result<()> {
    let (generation, next) = (standby.generation, standby.next_record);
    if archive.has_record_after(generation, next).await? {
        return Err(Error::Refused(format!(
            "{} is missing and later ones are there, for this standby was away for longer than the source's backups are kept: it must be made \
             anew, with empty disks",
            record_name(generation, next)
        )));
    }
    let newest = archive.generations_after(generation).await?.pop();
    newest.map_or(Ok(()), |newest| {
        Err(Error::Refused(format!(
            "generation {} of cluster {:016x} has begun at the path, and this standby follows generation {generation}: if that is the cluster to \
             follow, make this standby anew, with empty disks",
            newest.number, newest.cluster_id
        )))
    })
}

/// The entries of a record after the one that was applied last, decoded.
pub(super) fn new_entries(entries: Vec<log::Entry>, applied: LogId) -> std::result::Result<Vec<SourceEntry>, String> {
    let mut last = applied;
    let mut new = Vec::new();
    for entry in entries {
        let id = entry.log_id.unwrap_or_default();
        if id.index <= applied.index {
            continue;
        }
        if id.index != last.index + 1 || id.term < last.term {
            return Err(format!(
                "entry {} of term {} stands after entry {} of term {}",
                id.index, id.term, last.index, last.term
            ));
        }
        last = id;
        let payload = match entry.payload {
            None => None,
            Some(log::entry::Payload::Membership(membership)) => Some(source_entry::Payload::Membership(membership)),
            Some(log::entry::Payload::Batch(bytes)) => {
                let mut batch = Batch::decode(bytes).map_err(|error| format!("entry {}: {error}", id.index))?;
                // Nobody here waits for what it was answered there.
                batch.commands.iter_mut().for_each(|command| command.origin = None);
                Some(source_entry::Payload::Batch(batch))
            }
        };
        new.push(SourceEntry { log_id: Some(id), payload });
    }
    Ok(new)
}

/// These entries in commands of bounded size; one at least, which notes that the record is done.
pub(super) fn commands(standby: &log::Standby, record: u64, entries: Vec<SourceEntry>, marks: &[Mark]) -> Vec<Follow> {
    let mut from = standby.applied;
    let mut all = Vec::new();
    let mut rest = entries.into_iter().peekable();
    loop {
        let (mut part, mut bytes) = (Vec::new(), 0);
        while let Some(entry) = rest.next_if(|entry| part.is_empty() || bytes + entry.encoded_len() <= COMMAND_BYTES) {
            bytes += entry.encoded_len();
            part.push(entry);
        }
        let last = part.last().and_then(|entry| entry.log_id).or(from);
        let reached = marks.iter().take_while(|mark| mark.index <= last.map_or(0, |last| last.index)).last();
        let is_done = rest.peek().is_none();
        all.push(Follow {
            generation: standby.generation,
            from,
            entries: part,
            next_record: record + u64::from(is_done),
            at_millis: reached.map_or(0, |mark| mark.at_millis),
        });
        if is_done {
            return all;
        }
        from = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(term: u64, index: u64, bytes: usize) -> log::Entry {
        let put = crate::pb::etcd::PutRequest { key: "k".into(), value: vec![0; bytes].into(), ..Default::default() };
        let batch = Batch { commands: vec![Command::new(1, command::Request::Put(put))] };
        let payload = Some(log::entry::Payload::Batch(batch.encode_to_vec().into()));
        log::Entry { log_id: Some(LogId { term, index }), payload }
    }

    #[test]
    fn only_what_goes_on_is_taken_and_nothing_twice() {
        let applied = LogId { term: 2, index: 5 };
        let index = |entries: &[SourceEntry]| entries.iter().map(|e| e.log_id.unwrap().index).collect::<Vec<_>>();
        let taken = new_entries((4..8).map(|index| entry(2, index, 1)).collect(), applied).unwrap();
        assert_eq!(index(&taken), [6, 7]);
        assert!(new_entries(vec![entry(2, 5, 1)], applied).unwrap().is_empty());
        for wrong in [vec![entry(2, 7, 1)], vec![entry(1, 6, 1)], vec![entry(2, 6, 1), entry(2, 8, 1)]] {
            assert!(new_entries(wrong.clone(), applied).is_err(), "{wrong:?}");
        }
        let undecodable = log::Entry { payload: Some(log::entry::Payload::Batch(vec![7].into())), ..entry(2, 6, 1) };
        assert!(new_entries(vec![undecodable], applied).unwrap_err().contains("entry 6"));
    }

    #[test]
    fn commands_are_bounded_linked_and_end_with_the_record() {
        let standby = log::Standby { generation: 3, applied: Some(LogId { term: 1, index: 4 }), ..Default::default() };
        let entries: Vec<_> = (5..15).map(|index| entry(1, index, 200 << 10)).collect();
        let entries = new_entries(entries, standby.applied.unwrap()).unwrap();
        let mark = |index, at_millis| Mark { index, at_millis };
        let marks = [mark(3, 100), mark(6, 200), mark(20, 300)];
        let all = commands(&standby, 9, entries, &marks);
        assert!(all.len() > 3 && all.iter().all(|one| one.encoded_len() < COMMAND_BYTES + 1000), "{}", all.len());
        let mut from = standby.applied;
        for (place, one) in all.iter().enumerate() {
            assert_eq!((one.from, one.generation), (from, 3));
            from = one.entries.last().unwrap().log_id;
            assert_eq!(one.next_record, if place + 1 == all.len() { 10 } else { 9 });
        }
        assert_eq!(from.unwrap().index, 14);
        let times: Vec<u64> = all.iter().map(|one| one.at_millis).collect();
        assert!(times[0] >= 100 && times.is_sorted() && times.last() == Some(&200), "{times:?}");
        // One that is larger than a command goes alone, and a record without anything new is noted.
        let large = new_entries(vec![entry(1, 5, 2 << 20), entry(1, 6, 1)], standby.applied.unwrap()).unwrap();
        assert_eq!(commands(&standby, 9, large, &[]).len(), 2);
        let none = commands(&standby, 9, Vec::new(), &marks);
        assert_eq!((none.len(), none[0].next_record, none[0].at_millis), (1, 10, 100));
    }
}
