//! Files: what a member wrote, then damaged. Recovery must refuse it or give what was written, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::requests::{log_id, small_commands, small_state};
use crate::env::sim::{NoNet, SimDisk};
use crate::env::{Disk as _, Env, OpenMode};
use crate::kv::{Loader, State};
use crate::pb::log::{LogId, StateMeta, Vote};
use crate::raft::Applied;
use crate::storage::log::{self, Log, Owner, Record};
use crate::storage::member_dir::MemberDir;
use crate::storage::snapshot::{self, Head};
use crate::storage::state::{self, memory::Memory};

const OWNER: Owner = Owner { cluster_id: 7, member_id: 0x10000 };
const LOG: &str = "/data/log";
const SNAPSHOTS: &str = "/data/snapshot";

/// Files by name.
type Files = BTreeMap<PathBuf, Vec<u8>>;

fn env(disk: &SimDisk) -> Env {
    Env::sim(1, Arc::new(disk.clone()), Arc::new(NoNet))
}

/// Runs what needs tasks.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime can be made").block_on(work)
}

fn read_all(disk: &SimDisk, dir: &str) -> Files {
    let names = disk.list(Path::new(dir)).expect("the directory exists");
    names.into_iter().map(|name| Path::new(dir).join(name)).map(|path| (path.clone(), read(disk, &path))).collect()
}

fn read(disk: &SimDisk, path: &Path) -> Vec<u8> {
    disk.read(path).expect("the file can be read")
}

fn disk_of(files: &Files) -> SimDisk {
    let disk = SimDisk::new(1);
    for (path, bytes) in files {
        disk.create_dir_all(path.parent().expect("files are in a directory")).expect("a directory can be made");
        let file = disk.open(path, OpenMode::CreateTruncate).expect("a file can be made");
        file.write_at(bytes, 0).expect("a simulated disk takes a file");
    }
    disk
}

/// Damages files as `data` says, six bytes a step: what, which file, where (2), how much, with what.
fn damage(files: &mut Files, data: &[u8]) {
    for step in data.chunks_exact(6).take(16) {
        let nth = usize::from(step[1]) % files.len();
        let bytes = files.values_mut().nth(nth).expect("there is such a file");
        let at = usize::from(u16::from_le_bytes([step[2], step[3]])).min(bytes.len());
        let end = (at + usize::from(step[4])).min(bytes.len());
        match step[0] % 4 {
            0 => bytes[at..end].iter_mut().for_each(|byte| *byte ^= step[5]),
            1 => bytes[at..end].fill(0),
            2 => bytes.truncate(at),
            // Bytes of another place, as a confused disk gives.
            _ => {
                let from = usize::from(step[5]) * 16;
                let piece = bytes[from.min(bytes.len())..(from + end - at).min(bytes.len())].to_vec();
                bytes[at..at + piece.len().min(end - at)].copy_from_slice(&piece[..piece.len().min(end - at)]);
            }
        }
    }
}

fn log_options() -> log::Options {
    log::Options { segment_bytes: 4096, cache_bytes: 0, queue_bytes: 1 << 20 }
}

fn record(term: u64, index: u64) -> Record {
    let payload = format!("{term}/{index}/").repeat(1 + index as usize % 20);
    Record { log_id: LogId { term, index }, kind: (index % 3) as u8, payload: payload.into() }
}

/// The files of a log that has been appended to, truncated, purged and voted in, and every entry that it ever held.
fn written_log() -> &'static (Files, BTreeSet<(u64, u64)>) {
    static WRITTEN: OnceLock<(Files, BTreeSet<(u64, u64)>)> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let disk = SimDisk::new(1);
        let mut held = BTreeSet::new();
        run(async {
            let log = Log::create(&env(&disk), Path::new(LOG), OWNER, log_options()).expect("a log can be made");
            log.save_vote(Vote { term: 1, member: 1, committed: true }).await.expect("the disk works");
            for (term, range) in [(1, 0..20), (1, 20..45), (2, 40..70), (3, 70..75)] {
                if range.start < log.state().next_index() {
                    let after = LogId { term: 1, index: range.start - 1 };
                    log.truncate_after(Some(after)).await.expect("the disk works");
                }
                for index in range {
                    held.insert((term, index));
                    log.append(vec![record(term, index)], |_| ()).expect("the log takes an entry");
                    if index % 5 == 0 {
                        log.save_vote(Vote { term, member: 1, committed: true }).await.expect("the disk works");
                    }
                }
            }
            log.save_committed(LogId { term: 2, index: 60 });
            log.purge(LogId { term: 1, index: 9 }).await.expect("the disk works");
            log.save_vote(Vote { term: 4, member: 2, committed: false }).await.expect("the disk works");
            log.close().await;
        });
        (read_all(&disk, LOG), held)
    })
}

/// A damaged log: it is refused, or every entry that it gives was written there, in order and without a hole.
pub(super) fn log_files(data: &[u8]) {
    let (files, held) = written_log();
    let mut files = files.clone();
    damage(&mut files, data);
    open_log(&disk_of(&files), |entries| {
        for entry in entries {
            let id = entry.log_id;
            assert!(held.contains(&(id.term, id.index)), "entry {id:?} was never written");
            assert_eq!(*entry, record(id.term, id.index), "an entry is what was written");
        }
    });
}

/// A first segment of arbitrary bytes, behind a header that is right: no panic, and what is taken is read back as it is.
pub(super) fn log_segment(data: &[u8]) {
    let (files, _) = written_log();
    let (path, first) = files.iter().next().expect("a log has a segment");
    let mut bytes = first[..log::SEGMENT_HEADER_BYTES].to_vec();
    bytes.extend_from_slice(&log::with_checksums(data));
    bytes.resize(bytes.len().max(4096), 0);
    open_log(&disk_of(&[(path.clone(), bytes)].into()), |_| ());
}

fn open_log(disk: &SimDisk, look: impl Fn(&[Record])) {
    run(async {
        let Ok(log) = Log::open(&env(disk), Path::new(LOG), OWNER, log_options()) else { return };
        let state = log.state();
        // An entry may be damaged in a way that only reading shows; then it is an error.
        if let Ok(entries) = log.read(0..u64::MAX, u64::MAX).await {
            let indexes = entries.iter().map(|entry| entry.log_id.index);
            assert!(indexes.eq(state.first_index()..state.next_index()), "entries have no hole");
            look(&entries);
        }
        log.close().await;
        let again =
            Log::open(&env(disk), Path::new(LOG), OWNER, log_options()).expect("what was recovered opens again");
        assert_eq!(again.state().last, state.last, "recovery changes nothing twice");
        again.close().await;
    });
}

fn meta(state: &State, index: u64) -> StateMeta {
    StateMeta { applied: Some(log_id(index)), revision: state.revision(), ..StateMeta::default() }
}

fn hash(state: &State) -> u32 {
    state.hash_kv(0).expect("the present can be hashed").hash
}

/// The directory with one snapshot, and the hash of its state.
pub(super) fn written_snapshot() -> &'static (Files, u32) {
    static WRITTEN: OnceLock<(Files, u32)> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let disk = SimDisk::new(1);
        let state = small_state();
        let dir = snapshot::Dir::open(&env(&disk), Path::new(SNAPSHOTS), OWNER.cluster_id).expect("the disk works");
        let head = Head { cluster_id: OWNER.cluster_id, member_id: OWNER.member_id, meta: meta(&state, 9) };
        let mut writer = dir.create(head).expect("the disk works");
        state.changes().for_each(|change| writer.push(&change).expect("the disk works"));
        writer.finish().expect("a snapshot that was just written is whole");
        (read_all(&disk, SNAPSHOTS), hash(&state))
    })
}

fn load_snapshots(disk: &SimDisk, expected: u32) {
    let Ok(dir) = snapshot::Dir::open(&env(disk), Path::new(SNAPSHOTS), OWNER.cluster_id) else { return };
    let Some(file) = dir.latest() else { return };
    let mut loader = Loader::new();
    for change in file.read().expect("a verified file opens") {
        loader.load(change.expect("a verified file reads")).expect("a verified file loads");
    }
    let state = Applied::loaded(loader, file.meta()).expect("a verified file is a state");
    assert_eq!(hash(&state.kv), expected, "a snapshot is refused or is what was written");
}

/// A damaged snapshot file is set aside.
pub(super) fn snapshot_file(data: &[u8]) {
    let (files, expected) = written_snapshot();
    let mut files = files.clone();
    damage(&mut files, data);
    load_snapshots(&disk_of(&files), *expected);
}

/// Pieces of a snapshot as a peer sends them: six bytes each, as for [`damage`]; the checksum of a piece is right if its step's
/// first byte is even. Whatever comes, the file that is taken in the end is the one that was sent.
pub(super) fn snapshot_chunks(data: &[u8]) {
    let (files, expected) = written_snapshot();
    let (path, bytes) = files.iter().next().expect("there is a snapshot");
    let id = path.file_stem().and_then(|stem| stem.to_str()).expect("a snapshot's name is its id");
    let disk = SimDisk::new(1);
    let dir = snapshot::Dir::open(&env(&disk), Path::new(SNAPSHOTS), OWNER.cluster_id).expect("the disk works");
    let mut incoming = dir.receive(id, bytes.len() as u64).expect("a transfer begins");
    for step in data.chunks_exact(6).take(32) {
        let at = match step[1] {
            0..128 => incoming.offset() as usize,
            _ => usize::from(u16::from_le_bytes([step[2], step[3]])),
        };
        let end = (at + 1 + usize::from(step[4])).min(bytes.len());
        let mut piece = bytes.get(at.min(end)..end).unwrap_or_default().to_vec();
        let crc = crc32c::crc32c(&piece);
        if step[0] % 2 == 1 {
            piece.iter_mut().take(1).for_each(|byte| *byte ^= step[5] | 1);
        }
        let before = incoming.offset();
        if incoming.write(at as u64, &piece, crc).is_err() {
            assert_eq!(incoming.offset(), before, "a piece that is refused leaves nothing");
        }
        if step[5] == 7 {
            // The connection broke.
            drop(incoming);
            incoming = dir.receive(id, bytes.len() as u64).expect("a transfer goes on");
        }
    }
    if incoming.finish().is_ok() {
        assert_eq!(&read(&disk, path), bytes, "what was received is what was sent");
        load_snapshots(&disk, *expected);
    }
}

/// The state store, from which records were lost or in which bytes were flipped, three bytes a step: it is refused, or gives a
/// state that it once led to. The rest of the data is taken for a record with a right checksum.
pub(super) fn state_records(data: &[u8]) {
    let memory = Memory::default();
    let options = state::Options { record_bytes: 64, ..state::Options::default() };
    let mut store = memory.open(&options);
    store.load(&mut |_| Ok(())).expect("an empty store loads");
    let mut state = State::new();
    state.keep_journal(1 << 20);
    let mut known = BTreeMap::new();
    let mut from = None;
    for (command, index) in small_commands().iter().zip(1..) {
        state.apply(command, false).expect("the command is known").expect("the command can be applied");
        let meta = meta(&state, index);
        store.append(from, &meta, &state.take_journal().changes).expect("memory takes a record");
        from = meta.applied;
        known.insert(index, hash(&state));
    }
    store.checkpoint().expect("memory works");
    drop(store);
    let (steps, raw) = data.split_at(data.len().min(12));
    for step in steps.chunks_exact(3) {
        if memory.records() > 0 {
            let nth = usize::from(step[1]) % memory.records();
            if step[0] % 2 == 0 { memory.flip(nth, usize::from(step[2])) } else { memory.lose(nth) }
        }
    }
    let mut loader = Loader::new();
    let loaded = memory.open(&options).load(&mut |change| loader.load(change).map_err(|e| e.to_string()));
    if let Ok(Some(meta)) = loaded {
        let index = meta.applied.expect("a chain ends at a log id").index;
        let state = Applied::loaded(loader, &meta).expect("a chain that is whole is a state");
        assert_eq!(Some(&hash(&state.kv)), known.get(&index), "the applied index and the data belong together");
    }
    state::check_record(raw);
}

/// The files that say who a member is: the first byte says which of them the rest is, and whether its checksum is put right.
/// They are refused and left as they are, or taken.
pub(super) fn member_dir(data: &[u8]) {
    let root = Path::new("/data");
    let disk = SimDisk::new(1);
    let open = || MemberDir::open(Arc::new(disk.clone()), root, 0, "kv-0", || OWNER.member_id);
    let opened = open().expect("an empty disk becomes a member");
    let identity = opened.dir.path().join("identity");
    drop(opened);
    let Some((which, rest)) = data.split_first() else { return };
    let (path, bytes) = match which % 3 {
        0 => (root.join("current"), rest.to_vec()),
        1 => (identity, rest.to_vec()),
        _ => {
            let mut bytes = read(&disk, &identity)[..12].to_vec();
            bytes.extend_from_slice(&crc32c::crc32c(rest).to_le_bytes());
            bytes.extend_from_slice(rest);
            (identity, bytes)
        }
    };
    disk.write_atomic(&path, &bytes).expect("a simulated disk takes a file");
    if open().is_err() {
        assert_eq!(read(&disk, &path), bytes, "a file that is refused is left for people to look at");
    }
}
