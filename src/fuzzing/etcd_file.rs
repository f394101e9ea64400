//! etcd's snapshot file, damaged: the reader refuses it or gives a sound state, and ends.

use std::io::Read as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::backup::etcd_file;
use crate::env::sim::SimDisk;
use crate::env::{Disk as _, File, OpenMode};
use crate::kv::{Loader, State};

const PAGE_BYTES: usize = 4096;

/// A file as a member of etcd has it: no checksum stops the damage at the door.
fn written() -> &'static [u8] {
    static WRITTEN: OnceLock<Vec<u8>> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let packed = &include_bytes!("../../tests/etcd-files/etcd-3.7.gz")[..];
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).expect("the file is whole");
        bytes.truncate(bytes.len() - 32);
        bytes
    })
}

/// Six bytes a step: what, which page, where in it (2), with what (2).
pub(super) fn etcd_file(data: &[u8]) {
    let mut bytes = written().to_vec();
    for step in data.chunks_exact(6).take(16) {
        let pages = bytes.len() / PAGE_BYTES;
        if pages == 0 {
            break;
        }
        let start = usize::from(step[1]) % pages * PAGE_BYTES;
        let at = start + usize::from(u16::from_le_bytes([step[2], step[3]])) % (PAGE_BYTES - 1);
        match step[0] % 4 {
            0 => bytes[at..at + 2].copy_from_slice(&step[4..]),
            1 => bytes[at] ^= step[4],
            2 => bytes.truncate(at),
            // A page that was written to the place of another.
            _ => bytes.copy_within(start..start + PAGE_BYTES, usize::from(step[4]) % pages * PAGE_BYTES),
        }
    }
    let disk = SimDisk::new(1);
    disk.create_dir_all(Path::new("/d")).expect("a directory can be made");
    let file = disk.open(Path::new("/d/file"), OpenMode::CreateTruncate).expect("a simulated disk takes a file");
    file.write_at(&bytes, 0).expect("a simulated disk takes a file");
    let file: Arc<dyn File> = file.into();
    let Ok(read) = etcd_file::load(file, "x", true) else { return };
    assert_eq!(hash(&again(&read.state)), hash(&read.state), "what is read is a state");
}

/// The state as a snapshot of ours holds it.
fn again(state: &State) -> State {
    let mut loader = Loader::new();
    state.changes().for_each(|change| loader.load(change).expect("a state's changes load"));
    loader.finish(state.revision()).expect("a state's changes are a state")
}

fn hash(state: &State) -> u32 {
    state.hash_kv(0).expect("the present can be hashed").hash
}
