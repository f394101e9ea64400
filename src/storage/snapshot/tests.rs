//! Snapshot files: what is detected, what is resumed, what is left behind.

use super::*;
use crate::pb::log::change::Change as Kind;
use crate::pb::log::{Change, StateMeta};
use crate::pb::{Fields, KeyValue};

const CLUSTER: u64 = 0xabc;

fn head(term: u64, index: u64) -> Head {
    let meta = StateMeta { applied: Some(LogId { term, index }), revision: index as i64, ..Default::default() };
    Head { cluster_id: CLUSTER, member_id: 7, meta }
}

fn changes(count: usize, value_bytes: usize) -> Vec<Change> {
    let version = |n: usize| {
        let (key, value) = (format!("key-{n}"), vec![n as u8; value_bytes]);
        let fields =
            Fields { key: key.as_bytes(), value: &value, version: 1, mod_revision: n as i64 + 1, ..Fields::default() };
        Change { change: Some(Kind::Version(KeyValue::new(fields))) }
    };
    let mut all: Vec<_> = (0..count).map(version).collect();
    all.push(Change { change: Some(Kind::Compacted(3)) });
    all
}

fn write(dir: &Dir, head: Head, changes: &[Change]) -> SnapshotFile {
    let mut writer = dir.create(head).unwrap();
    for change in changes {
        writer.push(change).unwrap();
    }
    writer.finish().unwrap()
}

fn read(file: &SnapshotFile) -> Vec<Change> {
    file.read().unwrap().collect::<Result<_, _>>().unwrap()
}

fn temporary() -> (tempfile::TempDir, Env, Dir) {
    let temporary = tempfile::tempdir().unwrap();
    let env = Env::real();
    let dir = Dir::open(&env, &temporary.path().join("snapshot"), CLUSTER).unwrap();
    (temporary, env, dir)
}

#[test]
fn a_snapshot_reads_back_as_it_was_written() {
    let (_t, env, dir) = temporary();
    assert!(dir.latest().is_none());
    // Several blocks, and one change that is larger than a block.
    let mut all = changes(3000, 300);
    all.extend(changes(1, 1 << 20));
    let file = write(&dir, head(2, 40), &all);
    assert_eq!(read(&file), all);
    assert_eq!(file.bytes, std::fs::metadata(&file.path).unwrap().len());
    let again = Dir::open(&env, &dir.path, CLUSTER).unwrap().latest().unwrap();
    assert_eq!((again.id.as_str(), &again.head), (file.id.as_str(), &head(2, 40)));
    assert_eq!(read(&again), all);
    // None at all is a state too.
    let empty = write(&dir, head(2, 41), &[]);
    assert_eq!(read(&empty), []);
}

#[tokio::test]
async fn a_newer_snapshot_removes_the_older_whose_readers_go_on() {
    let (_t, _env, dir) = temporary();
    // So large that its space would be given back in pieces.
    let old = write(&dir, head(1, 10), &changes(200, 200_000));
    let path = old.path.clone();
    let mut reader = old.read().unwrap();
    drop(old);
    assert!(reader.next().unwrap().is_ok());
    let new = write(&dir, head(2, 9000), &changes(200, 200_000));
    assert!(!path.exists());
    assert_eq!(reader.filter(|change| change.is_ok()).count(), 200);
    assert_eq!(dir.latest().unwrap().id, new.id);
    let newest = write(&dir, head(2, 9001), &changes(3, 10));
    assert_eq!(std::fs::read_dir(&dir.path).unwrap().count(), 1);
    assert_eq!(dir.latest().unwrap().id, newest.id);
}

#[test]
fn a_late_older_snapshot_does_not_take_the_newer_ones_place() {
    let (_t, env, dir) = temporary();
    let mut slow = dir.create(head(1, 10)).unwrap();
    let new = write(&dir, head(1, 20), &changes(3, 10));
    slow.push(&changes(1, 10)[0]).unwrap();
    slow.finish().unwrap();
    assert_eq!(dir.latest().unwrap().id, new.id);
    assert_eq!(Dir::open(&env, &dir.path, CLUSTER).unwrap().latest().unwrap().id, new.id);
}

#[test]
fn every_flipped_byte_and_every_cut_of_a_file_is_detected() {
    let (_t, env, dir) = temporary();
    let file = write(&dir, head(1, 10), &changes(20, 10));
    let good = std::fs::read(&file.path).unwrap();
    let detected = |bytes: &[u8], what: &str| {
        std::fs::write(&file.path, bytes).unwrap();
        let opened = Dir::open(&env, &dir.path, CLUSTER).unwrap();
        assert!(opened.latest().is_none(), "{what}");
        assert!(file.path.with_extension("damaged").exists(), "{what}");
    };
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x21;
        detected(&bad, &format!("flipped at {at}"));
        detected(&good[..at], &format!("cut at {at}"));
    }
    detected(&[&good[..], b"x"].concat(), "a byte more");
    std::fs::write(&file.path, &good).unwrap();
    assert!(Dir::open(&env, &dir.path, CLUSTER).unwrap().latest().is_some());
}

#[test]
fn a_damaged_file_gives_way_to_the_next_older() {
    let (_t, env, dir) = temporary();
    let old = write(&dir, head(1, 10), &changes(5, 10));
    let kept = std::fs::read(&old.path).unwrap();
    let new = write(&dir, head(1, 20), &changes(5, 10));
    std::fs::write(&old.path, kept).unwrap();
    let mut bytes = std::fs::read(&new.path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&new.path, bytes).unwrap();

    // Found while it is read: the reader ends with an error, not early.
    assert!(new.read().and_then(|reader| reader.collect::<Result<Vec<_>, _>>()).is_err());
    let opened = Dir::open(&env, &dir.path, CLUSTER).unwrap();
    assert_eq!(opened.latest().unwrap().id, old.id);
    opened.set_aside(&old, "a test says so").unwrap();
    assert!(opened.latest().is_none());
}

#[test]
fn unfinished_files_are_removed() {
    let (_t, env, dir) = temporary();
    let kept = write(&dir, head(1, 10), &changes(5, 10));
    let mut writer = dir.create(head(1, 20)).unwrap();
    writer.push(&changes(1, 10)[0]).unwrap();
    drop(writer);
    assert_eq!(env.disk.list(&dir.path).unwrap().len(), 1, "a dropped writer leaves nothing");
    std::fs::write(dir.path.join("00000000000000000001-00000000000000000030.partial"), b"half").unwrap();
    std::fs::write(dir.path.join(format!("{}.incoming", kept.id)), b"half").unwrap();
    let opened = Dir::open(&env, &dir.path, CLUSTER).unwrap();
    assert_eq!(opened.latest().unwrap().id, kept.id);
    assert_eq!(env.disk.list(&dir.path).unwrap().len(), 1);
}

#[test]
fn another_clusters_snapshot_is_refused() {
    let (_t, env, dir) = temporary();
    write(&dir, head(1, 10), &changes(5, 10));
    assert!(matches!(Dir::open(&env, &dir.path, 0xdef), Err(Error::ForeignCluster { .. })));
}

#[test]
fn a_transfer_resumes_where_it_broke() {
    let (_t, _env, from) = temporary();
    let (_u, _env, to) = temporary();
    let all = changes(3000, 300);
    let sent = write(&from, head(4, 50), &all);
    let old = write(&to, head(4, 20), &changes(1, 1));

    let mut incoming = to.receive(&sent.id, sent.bytes).unwrap();
    for _ in 0..3 {
        let piece = sent.read_raw(incoming.offset(), 100_000).unwrap();
        incoming.write(incoming.offset(), &piece, crc32c::crc32c(&piece)).unwrap();
    }
    let reached = incoming.offset();
    drop(incoming);

    let mut incoming = to.receive(&sent.id, sent.bytes).unwrap();
    assert_eq!(incoming.offset(), reached);
    let piece = sent.read_raw(0, 1000).unwrap();
    incoming.write(0, &piece, crc32c::crc32c(&piece)).expect("a repeated piece does no harm");
    while !incoming.is_complete() {
        let piece = sent.read_raw(incoming.offset(), 100_000).unwrap();
        incoming.write(incoming.offset(), &piece, crc32c::crc32c(&piece)).unwrap();
    }
    let received = incoming.finish().unwrap();
    assert_eq!((received.id.as_str(), read(&received)), (sent.id.as_str(), all));
    assert_eq!(to.latest().unwrap().id, sent.id);
    assert!(!old.path.exists());
}

#[test]
fn a_transfer_takes_only_what_fits() {
    let (_t, _env, from) = temporary();
    let (_u, env, to) = temporary();
    let sent = write(&from, head(4, 50), &changes(100, 100));
    let piece = sent.read_raw(0, 500).unwrap();
    let crc = crc32c::crc32c(&piece);

    let mut incoming = to.receive(&sent.id, sent.bytes).unwrap();
    assert!(matches!(incoming.write(0, &piece, crc ^ 1), Err(Error::Transfer(_))), "wrong checksum");
    assert!(matches!(incoming.write(1, &piece, crc), Err(Error::Transfer(_))), "a gap");
    assert!(matches!(incoming.write(sent.bytes - 10, &piece, crc), Err(Error::Transfer(_))), "beyond the end");
    assert!(matches!(incoming.write(u64::MAX, &piece, crc), Err(Error::Transfer(_))), "overflow");
    assert_eq!(incoming.offset(), 0);
    incoming.write(0, &piece, crc).unwrap();
    assert!(matches!(incoming.finish(), Err(Error::Transfer(_))), "not complete");

    for id in ["../evil", "", "1-2-3", &format!("{}x", sent.id), &sent.id.replace('-', "/")] {
        assert!(matches!(to.receive(id, 10), Err(Error::Transfer(_))), "{id}");
    }
    assert!(to.receive(&sent.id, u64::MAX).is_err(), "more than the disk has");
    // Another snapshot takes the place of what was being received.
    let other = make_id(LogId { term: 9, index: 9 }, 1);
    to.receive(&other, 10).unwrap();
    assert_eq!(env.disk.list(&to.path).unwrap(), [format!("{other}.incoming")]);
}

#[test]
fn a_received_file_counts_only_when_it_is_what_its_id_says() {
    let (_t, _env, from) = temporary();
    let (_u, env, to) = temporary();
    let sent = write(&from, head(4, 50), &changes(100, 100));
    let mut bytes = sent.read_raw(0, 1 << 20).unwrap();
    let receive = |id: &str, bytes: &[u8]| {
        let mut incoming = to.receive(id, bytes.len() as u64).unwrap();
        incoming.write(0, bytes, crc32c::crc32c(bytes)).unwrap();
        incoming.finish()
    };
    let claims_more = make_id(LogId { term: 4, index: 51 }, 0);
    assert!(matches!(receive(&claims_more, &bytes), Err(Error::Damaged { .. })));
    bytes[300] ^= 1;
    assert!(matches!(receive(&sent.id, &bytes), Err(Error::Damaged { .. })));
    assert_eq!(env.disk.list(&to.path).unwrap(), [""; 0], "nothing of it is left");
    bytes[300] ^= 1;
    receive(&sent.id, &bytes).unwrap();
}
