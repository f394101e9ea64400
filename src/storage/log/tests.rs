//! Tests of the log on a simulated disk, and once on a real one. Crash tests are in `crash`.

mod crash;
mod tail;

use super::segment::HEADER_BYTES;
use super::*;
use crate::env::Disk;
use crate::env::sim::{NoNet, SimDisk};

const DIR: &str = "/data/log";
const OWNER: Owner = Owner { cluster_id: 7, member_id: 1 };

fn options() -> Options {
    Options { segment_bytes: 4096, cache_bytes: 1000, queue_bytes: 1 << 20 }
}

fn env(disk: &SimDisk) -> Env {
    Env::sim(1, Arc::new(disk.clone()), Arc::new(NoNet))
}

fn create(disk: &SimDisk) -> Log {
    Log::create(&env(disk), Path::new(DIR), OWNER, options()).unwrap()
}

fn open(disk: &SimDisk) -> Result<Log, Error> {
    Log::open(&env(disk), Path::new(DIR), OWNER, options())
}

async fn reopen(disk: &SimDisk, log: Log) -> Log {
    log.close().await;
    open(disk).unwrap()
}

fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

/// An entry whose payload tells its log id.
fn record(term: u64, index: u64) -> Record {
    let payload = format!("{term}/{index}/").repeat(1 + index as usize % 20);
    Record { log_id: id(term, index), kind: (index % 3) as u8, payload: payload.into() }
}

fn records(term: u64, range: Range<u64>) -> Vec<Record> {
    range.map(|index| record(term, index)).collect()
}

async fn append(log: &Log, records: Vec<Record>) -> io::Result<()> {
    let (done, answer) = oneshot::channel();
    log.append(records, move |result| done.send(result).unwrap())?;
    answer.await.unwrap()
}

async fn all(log: &Log) -> Vec<Record> {
    log.read(0..u64::MAX, u64::MAX).await.unwrap()
}

/// Waits for background work of the simulation.
async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        crate::env::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// The segments.
fn files(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.list(Path::new(DIR)).unwrap();
    names.retain(|name| name.ends_with(".log"));
    names
}

/// As if the mark had lagged: what a test takes out of a log that was closed was then never durable.
fn forget_mark(disk: &SimDisk) {
    disk.remove_file(&mark::path(Path::new(DIR))).unwrap();
}

fn corrupt(result: Result<Log, Error>) -> (PathBuf, u64, String) {
    match result.map(|_| ()) {
        Err(Error::Corrupt { file, offset, reason }) => (file, offset, reason),
        other => panic!("not refused as damaged: {other:?}"),
    }
}

/// Where the newest frame of the only segment starts and ends.
fn newest_frame(disk: &SimDisk) -> Range<usize> {
    let recovered = recovery::recover(disk, Path::new(DIR), OWNER, &options()).unwrap();
    let bytes = disk.read(&segment::path(Path::new(DIR), 1)).unwrap();
    let mut at = HEADER_BYTES;
    let mut start = at;
    while at < recovered.end as usize {
        let head = record::Head::decode(&bytes[at..], 1, at as u32).unwrap();
        if head.frame + 1 < recovered.next_frame {
            start = at + record::HEAD_BYTES + head.payload_bytes as usize;
        }
        at += record::HEAD_BYTES + head.payload_bytes as usize;
    }
    start..at
}

#[tokio::test]
async fn entries_come_back_after_a_restart() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    assert_eq!(log.state(), State::default());
    append(&log, records(1, 0..5)).await.unwrap();
    append(&log, records(2, 5..9)).await.unwrap();
    let want = [records(1, 0..5), records(2, 5..9)].concat();
    assert_eq!(all(&log).await, want);
    let bytes = log.bytes();
    let log = reopen(&disk, log).await;
    assert_eq!(all(&log).await, want);
    assert_eq!(log.state(), State { last: Some(id(2, 8)), ..State::default() });
    assert_eq!((log.entries(), log.bytes()), (9, bytes));
    append(&log, records(2, 9..10)).await.unwrap();
    assert_eq!(all(&log).await.len(), 10);
    assert!(matches!(Log::create(&env(&disk), Path::new(DIR), OWNER, options()), Err(Error::Exists(_))));
}

#[tokio::test]
async fn an_append_is_readable_before_it_is_durable() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    log.append(records(1, 0..100), |result| result.unwrap()).unwrap();
    let (runs, cached) = log.shared().inner.lock().plan(0..100, u64::MAX, Path::new(DIR));
    assert!(runs.is_empty(), "what is not durable stays in the cache");
    assert_eq!(cached, records(1, 0..100));
    append(&log, records(1, 100..101)).await.unwrap();
    assert!(log.shared().inner.lock().cache.len() < 20, "durable entries leave the cache when it is full");
    assert_eq!(all(&log).await, records(1, 0..101));
}

#[tokio::test]
async fn a_full_cache_keeps_what_is_not_durable() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    let (done, seen) = oneshot::channel();
    let reader = log.clone();
    // Two frames, as both do not fit in one segment; the first answers before the second is written.
    let answer = move |_| {
        let (_, cached) = reader.shared().inner.lock().plan(25..50, u64::MAX, Path::new(DIR));
        done.send(cached).unwrap();
    };
    log.append(records(1, 0..25), answer).unwrap();
    append(&log, records(1, 25..50)).await.unwrap();
    assert_eq!(seen.await.unwrap(), records(1, 25..50));
    assert_eq!(all(&log).await, records(1, 0..50));
}

#[tokio::test]
async fn a_read_stops_at_its_limit_but_gives_one_entry() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..60)).await.unwrap();
    assert_eq!(log.read(10..20, 0).await.unwrap(), records(1, 10..11));
    let two = (record(1, 58).payload.len() + record(1, 59).payload.len()) as u64;
    assert_eq!(log.read(58..99, two).await.unwrap(), records(1, 58..60));
    assert_eq!(log.read(58..99, two - 1).await.unwrap(), records(1, 58..59));
    assert_eq!(log.read(60..99, 9).await.unwrap(), []);
}

#[tokio::test]
async fn an_append_with_a_gap_or_beyond_the_queue_is_not_taken() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    let refused = |records| log.append(records, |_| panic!("not taken")).unwrap_err().kind();
    assert_eq!(refused(records(1, 1..2)), io::ErrorKind::InvalidInput);
    assert_eq!(refused(vec![record(1, 0), record(1, 2)]), io::ErrorKind::InvalidInput);
    let huge = Record { payload: vec![0; 1 << 20].into(), ..record(1, 0) };
    assert_eq!(refused(vec![huge]), io::ErrorKind::QuotaExceeded);
    append(&log, records(1, 0..1)).await.unwrap();
    assert_eq!(all(&log).await, records(1, 0..1));
}

#[tokio::test]
async fn truncated_entries_are_replaced() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..50)).await.unwrap();
    log.truncate_after(Some(id(1, 9))).await.unwrap();
    assert_eq!(log.state().last, Some(id(1, 9)));
    append(&log, records(2, 10..30)).await.unwrap();
    let want = [records(1, 0..10), records(2, 10..30)].concat();
    assert_eq!(all(&log).await, want);
    let bytes = log.bytes();
    let log = reopen(&disk, log).await;
    assert_eq!(all(&log).await, want);
    assert_eq!(log.bytes(), bytes);
    log.truncate_after(None).await.unwrap();
    let log = reopen(&disk, log).await;
    assert_eq!((log.state().last, log.bytes()), (None, 0));
    append(&log, records(3, 0..2)).await.unwrap();
    assert_eq!(all(&log).await, records(3, 0..2));
}

#[tokio::test]
async fn a_purge_unlinks_segments_and_survives_a_restart() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    log.save_vote(Vote { term: 3, member: 2, committed: true }).await.unwrap();
    for index in 0..200 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    let used = disk.used_bytes();
    log.purge(id(1, 149)).await.unwrap();
    until("segments are unlinked", || disk.used_bytes() < used / 2).await;
    assert_eq!(all(&log).await, records(1, 150..200));
    let log = reopen(&disk, log).await;
    assert_eq!(all(&log).await, records(1, 150..200));
    assert_eq!(log.state().purged, Some(id(1, 149)));
    assert_eq!(log.state().vote, Some(Vote { term: 3, member: 2, committed: true }));
    assert!(log.truncate_after(Some(id(1, 100))).await.is_err(), "what is purged cannot be truncated");

    log.purge(id(4, 500)).await.unwrap();
    let beyond = log.state();
    assert_eq!((beyond.purged, beyond.last, log.bytes()), (Some(id(4, 500)), Some(id(4, 500)), 0));
    append(&log, records(4, 501..503)).await.unwrap();
    let log = reopen(&disk, log).await;
    assert_eq!(all(&log).await, records(4, 501..503));
    assert_eq!(log.state().first_index(), 501);
}

#[tokio::test]
async fn a_vote_is_durable_when_saved() {
    let disk = SimDisk::new(5);
    let log = create(&disk);
    for term in 1..50 {
        log.save_vote(Vote { term, member: 3, committed: false }).await.unwrap();
    }
    let disk = disk.crash();
    assert_eq!(open(&disk).unwrap().state().vote, Some(Vote { term: 49, member: 3, committed: false }));
}

#[tokio::test]
async fn committed_rides_along_and_never_moves_backwards() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..5)).await.unwrap();
    log.save_committed(id(1, 3));
    log.save_committed(id(1, 2));
    append(&log, records(1, 5..6)).await.unwrap();
    let crashed = disk.crash();
    assert_eq!(open(&crashed).unwrap().state().committed, Some(id(1, 3)));
    drop(log);

    let log = open(&crashed).unwrap();
    log.save_committed(id(1, 1));
    assert_eq!(log.state().committed, Some(id(1, 3)));
    log.save_committed(id(1, 5));
    let log = reopen(&crashed, log).await;
    assert_eq!(log.state().committed, Some(id(1, 5)), "closing flushes it");
}

#[tokio::test]
async fn committed_waits_until_its_entries_are_durable() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    log.append(records(1, 0..5), |result| result.unwrap()).unwrap();
    log.save_committed(id(1, 4));
    log.save_vote(Vote::default()).await.unwrap();
    let crashed = disk.crash();
    assert_eq!(open(&crashed).unwrap().state().committed, None, "the other members committed it, not this disk");
}

#[tokio::test]
async fn rotation_goes_on_in_prepared_segments() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    until("two spares", || log.spares() == 2).await;
    assert_eq!(files(&disk), ["0000000001.log", "0000000002.log", "0000000003.log"]);
    for index in 0..300 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    let large = Record { payload: vec![9; 20_000].into(), ..record(1, 300) };
    append(&log, vec![large.clone()]).await.unwrap();
    append(&log, records(1, 301..302)).await.unwrap();
    until("two spares", || log.spares() == 2).await;
    assert!(files(&disk).len() > 10);
    let log = reopen(&disk, log).await;
    assert_eq!(all(&log).await, [records(1, 0..300), vec![large], records(1, 301..302)].concat());
    assert_eq!(log.spares(), 2, "clean spares are kept");
}

#[tokio::test]
async fn a_tail_torn_at_any_byte_is_dropped_and_stays_away() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..4)).await.unwrap();
    append(&log, records(1, 4..7)).await.unwrap();
    log.close().await;
    let frame = newest_frame(&disk);
    let path = segment::path(Path::new(DIR), 1);
    let whole = disk.read(&path).unwrap();
    for cut in frame.clone() {
        let file = disk.open(&path, OpenMode::ReadWrite).unwrap();
        file.write_at(&whole, 0).unwrap();
        segment::zero(&*file, cut as u64, frame.end as u64).unwrap();
        if disk.read(&path).unwrap() == whole {
            continue; // Zeros were cut.
        }
        forget_mark(&disk);
        let log = open(&disk).unwrap();
        assert_eq!(all(&log).await, records(1, 0..4), "cut at {cut}");
        // A frame as long as the start of the lost one: behind it, the lost one's rest would go on.
        append(&log, records(1, 4..5)).await.unwrap();
        let log = reopen(&disk, log).await;
        assert_eq!(all(&log).await, records(1, 0..5), "cut at {cut}");
        log.close().await;
    }
}

/// A changed byte is no torn write: the frame was acknowledged, and to drop it would be to lose it. Found by the simulation.
#[tokio::test]
async fn a_byte_changed_in_a_newest_frame_that_was_written_whole_is_refused() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..4)).await.unwrap();
    log.save_committed(id(1, 3));
    append(&log, records(1, 4..40)).await.unwrap();
    log.close().await;
    let frame = newest_frame(&disk);
    assert!(frame.len() > 1024, "it lies in several sectors");
    let path = segment::path(Path::new(DIR), 1);
    for at in frame.clone() {
        // Its end record says itself that it is one: nothing else would know of it.
        if at == frame.end - record::HEAD_BYTES + 32 {
            continue;
        }
        disk.flip(&path, at, 0x10);
        let (file, offset, reason) = corrupt(open(&disk));
        assert!(file == path && offset <= at as u64 && reason.contains("written whole"), "{at}: {offset} {reason}");
        disk.flip(&path, at, 0x10);
    }
    assert_eq!(all(&open(&disk).unwrap()).await, records(1, 0..40), "refusing changed nothing");

    // A sector that never came is a torn write, wherever it is.
    let whole = disk.read(&path).unwrap();
    for sector in (frame.start.next_multiple_of(512)..frame.end).step_by(512) {
        let file = disk.open(&path, OpenMode::ReadWrite).unwrap();
        file.write_at(&whole, 0).unwrap();
        segment::zero(&*file, sector as u64, (sector + 512).min(frame.end) as u64).unwrap();
        forget_mark(&disk);
        let log = open(&disk).unwrap();
        assert_eq!(all(&log).await, records(1, 0..4), "sector at {sector}");
        log.close().await;
    }
}

#[tokio::test]
async fn a_dropped_frame_cannot_lend_its_rest_to_the_next() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..4)).await.unwrap();
    append(&log, records(1, 4..40)).await.unwrap();
    log.close().await;
    let start = newest_frame(&disk).start;
    let path = segment::path(Path::new(DIR), 1);
    let whole = disk.read(&path).unwrap();
    // Its first sector never came.
    let file = disk.open(&path, OpenMode::ReadWrite).unwrap();
    segment::zero(&*file, start as u64, (start + 1).next_multiple_of(512) as u64).unwrap();
    forget_mark(&disk);
    open(&disk).unwrap().close().await;
    // The next frame has the same number and begins alike; it is torn after its first record.
    let first = &whole[start..start + record(1, 4).disk_bytes() as usize];
    disk.open(&path, OpenMode::ReadWrite).unwrap().write_at(first, start as u64).unwrap();
    assert_eq!(all(&open(&disk).unwrap()).await, records(1, 0..4));
}

#[tokio::test]
async fn a_flipped_byte_before_the_newest_frame_is_refused_with_its_place() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    for index in 0..90 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    log.close().await;
    let (first, second) = (segment::path(Path::new(DIR), 1), segment::path(Path::new(DIR), 2));
    let used = |path: &Path| record::used_bytes(&disk.read(path).unwrap());
    for path in [&first, &second] {
        for at in (0..used(path)).step_by(7) {
            disk.flip(path, at, 0x10);
            let (file, offset, _) = corrupt(open(&disk));
            assert_eq!(&file, path, "flipped {at}");
            let near = if at < HEADER_BYTES { 0..=0 } else { (at as u64).saturating_sub(500)..=at as u64 };
            assert!(near.contains(&offset), "flipped {at}, told {offset}");
            disk.flip(path, at, 0x10);
        }
    }
    assert_eq!(all(&open(&disk).unwrap()).await, records(1, 0..90), "refusing changed nothing");
}

#[tokio::test]
async fn a_missing_segment_is_refused() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    for index in 0..150 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    log.close().await;
    disk.remove_file(&segment::path(Path::new(DIR), 1)).unwrap();
    assert!(corrupt(open(&disk)).2.contains("before 2 are missing"));
    disk.remove_file(&segment::path(Path::new(DIR), 3)).unwrap();
    assert_eq!(corrupt(open(&disk)).0, segment::path(Path::new(DIR), 3));
}

#[tokio::test]
async fn a_tail_without_committed_entries_is_refused() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    append(&log, records(1, 0..5)).await.unwrap();
    log.save_committed(id(1, 4));
    log.save_vote(Vote::default()).await.unwrap();
    let error = log.truncate_after(Some(id(1, 3))).await.unwrap_err().to_string();
    assert!(error.contains("entries up to 4 were committed here"), "{error}");
    // Here it stands for a disk that lost them.
    log.shared().inner.lock().state.committed = None;
    log.truncate_after(Some(id(1, 2))).await.unwrap();
    append(&log, records(1, 3..5)).await.unwrap();
    log.close().await;
    let (path, frame) = (segment::path(Path::new(DIR), 1), newest_frame(&disk));
    let file = disk.open(&path, OpenMode::ReadWrite).unwrap();
    segment::zero(&*file, frame.start as u64 + 40, frame.end as u64).unwrap();
    forget_mark(&disk);
    assert!(corrupt(open(&disk)).2.contains("committed entries are missing"));
}

#[tokio::test]
async fn bytes_of_an_earlier_life_never_validate() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    for index in 0..100 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    log.close().await;
    let recovered = recovery::recover(&disk, Path::new(DIR), OWNER, &options()).unwrap();
    let old = disk.read(&segment::path(Path::new(DIR), 1)).unwrap();
    // The active segment's free space, and a spare, hold what once was segment 1.
    let end = recovered.end as usize;
    recovered.segments[&recovered.active].write_at(&old[end..], end as u64).unwrap();
    let (number, spare) = &recovered.spares[0];
    spare.write_at(&old, 0).unwrap();
    let log = open(&disk).unwrap();
    assert_eq!(all(&log).await, records(1, 0..100));
    until("spares again", || log.spares() == 2).await;
    let anew = disk.read(&segment::path(Path::new(DIR), *number)).unwrap();
    assert_eq!(record::used_bytes(&anew), 0, "a dirty spare is made anew");
}

#[tokio::test]
async fn the_log_of_another_member_or_format_is_refused() {
    let disk = SimDisk::new(1);
    assert!(matches!(open(&disk), Err(Error::Missing(_))));
    create(&disk).close().await;
    for other in [Owner { cluster_id: 8, ..OWNER }, Owner { member_id: 2, ..OWNER }] {
        let refused = Log::open(&env(&disk), Path::new(DIR), other, options()).map(|_| ());
        let text = refused.as_ref().unwrap_err().to_string();
        assert!(matches!(refused, Err(Error::Foreign { found: OWNER, .. })), "{text}");
        assert_eq!(text, format!("/data/log/0000000001.log is the log of {OWNER}, not of {other}"));
    }
}

#[tokio::test]
async fn an_io_error_is_final() {
    for fsync in [false, true] {
        let disk = SimDisk::new(1);
        let log = create(&disk);
        until("two spares", || log.spares() == 2).await;
        append(&log, records(1, 0..3)).await.unwrap();
        if fsync {
            disk.fail_sync(1)
        } else {
            disk.fail_write(1)
        }
        let error = append(&log, records(1, 3..5)).await.unwrap_err().to_string();
        assert!(error.starts_with("/data/log/0000000001.log: injected"), "{error}");
        assert_eq!(log.failed().as_ref(), Some(&error));
        assert!(log.append(records(1, 5..6), |_| panic!("not taken")).is_err());
        assert!(log.save_vote(Vote::default()).await.is_err());
        assert!(log.purge(id(1, 1)).await.is_err());
        log.close().await;
        // What the failed sync left is in the page cache only; recovery writes it again before it counts.
        let log = open(&disk).unwrap();
        let survived = all(&log).await;
        assert_eq!(survived, records(1, 0..if fsync { 5 } else { 3 }));
        assert_eq!(all(&open(&disk.crash()).unwrap()).await, survived);
    }
}

#[tokio::test(start_paused = true)]
async fn purged_segments_make_room_before_a_full_disk_stops_the_log() {
    let disk = SimDisk::new(1);
    let log = create(&disk);
    for index in 0..600 {
        append(&log, records(1, index..index + 1)).await.unwrap();
    }
    until("two spares", || log.spares() == 2).await;
    // Until nearly all of the old ones are gone there is no room for a new one.
    disk.set_capacity(disk.used_bytes() - 5 * 4096);
    log.purge(id(1, 599)).await.unwrap();
    let further = (600..900).map(|index| append(&log, records(1, index..index + 1)));
    for appended in futures_util::future::join_all(further).await {
        appended.unwrap();
    }
    assert_eq!(all(&log).await, records(1, 600..900));
}

#[tokio::test]
async fn a_full_disk_stops_the_log_after_its_spares() {
    let disk = SimDisk::new(1);
    disk.set_capacity(3 * 4096 + 512);
    let log = create(&disk);
    until("two spares", || log.spares() == 2).await;
    let mut taken = 0;
    while append(&log, records(1, taken..taken + 1)).await.is_ok() {
        taken += 1;
    }
    assert!(taken > 50, "three segments were filled, not {taken} entries");
    assert!(log.failed().is_some());
    log.close().await;
    assert_eq!(all(&open(&disk).unwrap()).await, records(1, 0..taken), "it opens, and holds what it took");
    let small = SimDisk::new(1);
    small.set_capacity(4000);
    assert!(matches!(Log::create(&env(&small), Path::new(DIR), OWNER, options()), Err(Error::Io(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_disk_takes_appends_and_reads_at_once() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("log");
    let options = Options { segment_bytes: 64 << 10, cache_bytes: 4 << 10, ..Options::default() };
    let env = Env::real();
    let log = Log::create(&env, &dir, OWNER, options.clone()).unwrap();
    let reader = log.clone();
    let reading = tokio::spawn(async move {
        let mut from = 0;
        while from < 2000 {
            let read = reader.read(from..2000, 10_000).await.unwrap();
            assert_eq!(read, records(1, from..from + read.len() as u64));
            from += read.len() as u64;
            tokio::task::yield_now().await;
        }
    });
    for index in 0..1999 {
        log.append(records(1, index..index + 1), |result| result.unwrap()).unwrap();
    }
    append(&log, records(1, 1999..2000)).await.unwrap();
    reading.await.unwrap();
    let stats = log.fsync_stats();
    assert!(stats.count > 0 && stats.max >= stats.recent_p99 && stats.sum >= stats.max, "{stats:?}");
    log.close().await;
    let log = Log::open(&env, &dir, OWNER, options).unwrap();
    assert_eq!(all(&log).await, records(1, 0..2000));
    log.close().await;
    env.stop(std::time::Duration::from_secs(10)).await;
}
