//! Logs that lost their newest frames: refused by their mark, or by the length of their files; and no other log is.

use super::*;
use crate::env::planted::plant;
use damage::{Way, frames, lose_behind};

/// A closed log of many frames in several segments, with all kinds of steps.
async fn written(seed: u64) -> (SimDisk, fastrand::Rng) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let disk = SimDisk::new(seed);
    let log = create(&disk);
    let mut term = 1;
    for _ in 0..rng.usize(40..120) {
        let next = log.state().next_index();
        match rng.u8(..12) {
            0 => log.save_vote(Vote { term, member: 2, committed: rng.bool() }).await.unwrap(),
            1 if next > log.state().first_index() + 1 => {
                term += 1;
                let after = log.read(next - 2..next - 1, u64::MAX).await.unwrap()[0].log_id;
                log.truncate_after(Some(after)).await.unwrap();
            }
            2 if next > 20 => log.purge(all(&log).await[0].log_id).await.unwrap(),
            _ => append(&log, records(term, next..next + rng.u64(1..4))).await.unwrap(),
        }
    }
    log.close().await;
    (disk, rng)
}

#[tokio::test]
async fn a_log_that_lost_its_newest_frames_is_refused() {
    for seed in 0..150 {
        let (disk, mut rng) = written(seed).await;
        // A power loss right after: the mark was synced when the log was closed.
        let disk = if rng.bool() { disk.crash() } else { disk };
        let frames = frames(&disk, Path::new(DIR)).unwrap();
        let newest = frames.len() - 1;
        let kept = newest - if rng.bool() { 1 } else { rng.usize(1..=newest) };
        let way = Way::ALL[rng.usize(..Way::ALL.len())];
        lose_behind(&disk, Path::new(DIR), frames[kept], way).unwrap();
        let (_, _, reason) = corrupt(open(&disk));
        assert!(reason.contains("tail is lost") || reason.contains("was cut"), "seed {seed}, {way:?}: {reason}");
        corrupt(open(&disk));
    }
}

/// Without a mark the length of a file still tells, wherever it was cut.
#[tokio::test]
async fn a_file_that_was_cut_is_refused_without_a_mark() {
    for seed in 0..60 {
        let (disk, mut rng) = written(seed).await;
        forget_mark(&disk);
        let names = files(&disk);
        // A cut of the last file may be one that was being made when the process ended.
        let path = Path::new(DIR).join(&names[rng.usize(..names.len() - 1)]);
        let whole = disk.read(&path).unwrap();
        let used = record::used_bytes(&whole);
        let cut = if rng.bool() { used } else { rng.usize(..whole.len()) };
        disk.open(&path, OpenMode::ReadWrite).unwrap().set_len(cut.min(whole.len() - 1) as u64).unwrap();
        let (_, _, reason) = corrupt(open(&disk));
        assert!(!reason.is_empty(), "seed {seed}");
    }
}

/// The mark lags at most: a crash at any step, also between a truncation and what a new leader appends, is no loss.
async fn crash_at(changes: u64, seed: u64) -> Result<(), Error> {
    let disk = SimDisk::new(seed);
    let log = create(&disk);
    append(&log, records(1, 0..20)).await.unwrap();
    disk.lose_power_after(changes);
    let work = async {
        append(&log, records(1, 20..30)).await?;
        log.save_vote(Vote { term: 2, member: 3, committed: true }).await?;
        log.truncate_after(Some(id(1, 9))).await?;
        append(&log, records(2, 10..12)).await?;
        log.truncate_after(Some(id(1, 4))).await?;
        append(&log, records(3, 5..6)).await
    };
    let _ = work.await;
    let crashed = disk.crash();
    log.close().await;
    open(&crashed).map(drop)
}

#[tokio::test]
async fn no_crash_around_a_truncation_looks_like_a_loss() {
    for changes in 0..40 {
        for seed in 0..10 {
            crash_at(changes, seed).await.unwrap_or_else(|error| panic!("{changes} changes, seed {seed}: {error}"));
        }
    }
}

#[tokio::test]
async fn a_mark_that_leads_or_is_not_read_would_be_found() {
    plant(Some("mark-before-sync"));
    let mut refused = 0;
    for changes in 0..40 {
        refused += usize::from(crash_at(changes, changes).await.is_err());
    }
    assert!(refused > 0, "a mark that is written before the sync must be seen to lead");
    plant(Some("mark-not-checked"));
    let (disk, _) = written(1).await;
    let frames = frames(&disk, Path::new(DIR)).unwrap();
    lose_behind(&disk, Path::new(DIR), frames[frames.len() - 2], Way::Zeroed).unwrap();
    assert!(open(&disk).is_ok(), "nothing but the mark tells that the newest frame is gone");
    plant(None);
}

/// Rolled back and forward: a version that writes no marks has truncated, appended and purged meanwhile.
#[tokio::test]
async fn a_mark_that_was_left_behind_is_no_loss() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..60)).await.unwrap();
    log.close().await;
    let path = mark::path(Path::new(DIR));
    let old = disk.read(&path).unwrap();
    let log = open(&disk).unwrap();
    log.truncate_after(Some(id(1, 9))).await.unwrap();
    log.close().await;
    for _ in 0..3 {
        disk.open(&path, OpenMode::ReadWrite).unwrap().write_at(&old, 0).unwrap();
        let log = open(&disk).unwrap();
        let next = log.state().next_index();
        append(&log, records(2, next..next + 1)).await.unwrap();
        log.purge(id(2, next)).await.unwrap();
        log.close().await;
    }
    assert_eq!(open(&disk).unwrap().state().last, Some(id(2, 12)));
}
