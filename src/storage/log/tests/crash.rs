//! Seeded crashes against a model, and recovery of damaged bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// What a log must say.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    state: State,
    entries: VecDeque<Record>,
}

impl Model {
    fn truncate(&mut self, after: Option<LogId>) {
        let keep = index_after(after) - self.state.first_index();
        self.entries.truncate(keep as usize);
        self.state.last = after;
    }

    fn purge(&mut self, upto: LogId) {
        self.entries.retain(|record| record.log_id.index > upto.index);
        self.state.purged = Some(upto);
        if self.state.last.is_none_or(|last| last.index < upto.index) {
            self.state.last = Some(upto);
        }
    }
}

async fn model_of(log: &Log) -> Model {
    // What is committed rides along and has a test of its own.
    let state = State { committed: None, ..log.state() };
    Model { state, entries: all(log).await.into() }
}

/// A log with its model after each step that it took, and how many of the steps it called durable.
struct Life {
    log: Log,
    rng: fastrand::Rng,
    models: Vec<Model>,
    durable: Arc<AtomicUsize>,
    term: u64,
}

impl Life {
    async fn step(&mut self) {
        let mut model = self.models.last().unwrap().clone();
        let next = model.state.next_index();
        let entries = model.entries.len() as u64;
        match self.rng.u8(..20) {
            0 => {
                self.term += 1;
                let vote = Vote { term: self.term, member: self.rng.u64(1..4), committed: self.rng.bool() };
                model.state.vote = Some(vote);
                self.models.push(model);
                if self.log.save_vote(vote).await.is_ok() {
                    self.durable.fetch_max(self.models.len() - 1, Ordering::Relaxed);
                }
            }
            1 if entries > 0 => {
                // Raft never truncates what is committed.
                let first = model.state.first_index();
                let floor = index_after(self.log.state().committed).saturating_sub(first);
                if floor >= entries {
                    return;
                }
                let keep = self.rng.u64(floor..entries);
                let after = match keep {
                    0 => model.state.purged,
                    keep => Some(model.entries[keep as usize - 1].log_id),
                };
                self.term += 1;
                model.truncate(after);
                self.models.push(model);
                if self.log.truncate_after(after).await.is_ok() {
                    self.durable.fetch_max(self.models.len() - 1, Ordering::Relaxed);
                }
            }
            2 if entries > 0 => {
                let upto = match self.rng.u8(..4) {
                    0 => id(self.term, next + self.rng.u64(..10)),
                    _ => model.entries[self.rng.usize(..entries as usize)].log_id,
                };
                model.purge(upto);
                self.models.push(model);
                self.log.purge(upto).await.ok();
            }
            3 => {
                // Committed at most what is durable, as a follower would: it must never make recovery refuse.
                if let Some(last) = self.models[self.durable.load(Ordering::Relaxed)].state.last
                    && model.state.last.is_some_and(|now| now.index >= last.index)
                    && self.rng.bool()
                {
                    self.log.save_committed(last);
                }
            }
            4..=8 => tokio::task::yield_now().await,
            _ => {
                let count = self.rng.u64(1..6);
                let records = records(self.term, next..next + count);
                model.state.last = records.last().map(|record| record.log_id);
                model.entries.extend(records.iter().cloned());
                let step = self.models.len();
                let durable = self.durable.clone();
                let done = move |result: io::Result<()>| {
                    if result.is_ok() {
                        let before = durable.fetch_max(step, Ordering::Relaxed);
                        assert!(before < step, "callbacks come in order");
                    }
                };
                if self.log.append(records, done).is_ok() {
                    self.models.push(model);
                }
            }
        }
        if self.rng.u8(..10) == 0 && self.log.failed().is_none() {
            let Ok(seen) = self.log.read(0..u64::MAX, u64::MAX).await else { return };
            if self.log.failed().is_none() {
                assert_eq!(VecDeque::from(seen), self.models.last().unwrap().entries, "what was appended is visible");
            }
        }
    }
}

async fn crash_case(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut disk = SimDisk::new(seed);
    create(&disk).close().await;
    let mut term = 1;
    for _ in 0..4 {
        let log = open(&disk).unwrap();
        let first = model_of(&log).await;
        let durable = Arc::new(AtomicUsize::new(0));
        let mut life = Life { log, rng: rng.fork(), models: vec![first], durable, term };
        disk.lose_power_after(rng.u64(..120));
        for _ in 0..rng.u32(10..300) {
            life.step().await;
        }
        term = life.term + 1;
        let committed = life.log.state().committed;
        if rng.u8(..8) == 0 {
            // A killed process: what it wrote is seen, until the power fails in the middle of the recovery.
            life.log.close().await;
        }
        disk = disk.crash();
        if rng.bool() {
            // Recovery itself may be cut short, and must then work the next time.
            disk.lose_power_after(rng.u64(..12));
            if let Ok(log) = open(&disk) {
                log.close().await;
            }
            disk = disk.crash();
        }
        drop(life.log);

        let log = open(&disk).unwrap_or_else(|error| panic!("refused after a crash: {error}"));
        let found = model_of(&log).await;
        let promised = life.durable.load(Ordering::Relaxed);
        let possible = &life.models[promised..];
        assert!(possible.contains(&found), "promised {:?}\nfound {found:?}", life.models[promised]);
        assert!(log.state().committed.map(|id| id.index) <= committed.map(|id| id.index));
        let bytes: u64 = found.entries.iter().map(Record::disk_bytes).sum();
        assert_eq!((log.bytes(), log.entries()), (bytes, found.entries.len() as u64));
        log.close().await;
    }
}

/// Prints which case failed.
struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed: {}", self.0);
        }
    }
}

#[test]
fn what_was_promised_survives_every_crash() {
    for seed in 0..300 {
        let _case = Case(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(crash_case(seed));
    }
}

#[tokio::test]
async fn damaged_bytes_never_make_recovery_panic() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    for index in 0..40 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    log.close().await;
    forget_mark(&disk);
    let names = files(&disk);
    let intact: Vec<_> = names.iter().map(|name| disk.read(&Path::new(DIR).join(name)).unwrap()).collect();
    let mut outcomes = [0; 2];
    for seed in 0..400 {
        let _case = Case(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        for (name, bytes) in names.iter().zip(&intact) {
            let mut bytes = bytes.clone();
            for _ in 0..rng.usize(..3) {
                let at = rng.usize(..bytes.len());
                let end = (at + rng.usize(1..300)).min(bytes.len());
                match rng.u8(..4) {
                    0 => rng.fill(&mut bytes[at..end]),
                    1 => bytes[at..end].fill(0),
                    2 => bytes.truncate(at.max(1)),
                    _ => bytes.copy_within(at..end, 0),
                }
            }
            let file = disk.open(&Path::new(DIR).join(name), OpenMode::CreateTruncate).unwrap();
            file.write_at(&bytes, 0).unwrap();
        }
        let recovered = recovery::recover(&disk, Path::new(DIR), OWNER, &options());
        outcomes[usize::from(recovered.is_ok())] += 1;
    }
    assert!(outcomes.iter().all(|&count| count > 10), "some are refused, some cut: {outcomes:?}");
}

#[tokio::test]
async fn random_bytes_are_refused() {
    for seed in 0..200 {
        let _case = Case(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let disk = SimDisk::new(seed);
        disk.create_dir_all(Path::new(DIR)).unwrap();
        for number in 1..4 {
            let mut bytes = vec![0; rng.usize(..6000)];
            rng.fill(&mut bytes);
            let file = disk.open(&segment::path(Path::new(DIR), number), OpenMode::CreateNew).unwrap();
            file.write_at(&bytes, 0).unwrap();
        }
        corrupt(open(&disk));
    }
}
