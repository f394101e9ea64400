//! Files that etcd 3.4 and 3.7 have written (`tests/etcd-files/make`), whole and damaged. Load of every kind is in `tests/it/etcd_file.rs`.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use super::bolt::Bolt;
use super::{Error, EtcdFile, is_one, load};
use crate::env::sim::SimDisk;
use crate::env::{Asker, Disk as _, File, OpenMode};
use crate::kv::{Loader, State};
use crate::pb::etcd::{RangeRequest, RangeResponse};
use crate::pb::log::AuthUser;
use crate::secure::password::{Checked, Passwords};

const FILES: [(&str, &[u8]); 2] = [
    ("3.4", include_bytes!("../../../tests/etcd-files/etcd-3.4.gz")),
    ("3.7", include_bytes!("../../../tests/etcd-files/etcd-3.7.gz")),
];

pub(crate) fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

fn file(bytes: &[u8]) -> Arc<dyn File> {
    let disk = SimDisk::new(1);
    disk.create_dir_all(Path::new("/d")).unwrap();
    let file = disk.open(Path::new("/d/file"), OpenMode::CreateTruncate).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.into()
}

fn loaded(bytes: &[u8], skip_hash_check: bool) -> Result<EtcdFile, Error> {
    load(file(bytes), "x", skip_hash_check)
}

fn range(state: &State, key: &str, range_end: &str, revision: i64) -> RangeResponse {
    let bytes = |text: &str| text.to_owned().into();
    let range = RangeRequest { key: bytes(key), range_end: bytes(range_end), revision, ..Default::default() };
    state.range(&range).unwrap()
}

#[test]
fn everything_is_there_with_its_revisions() {
    for (version, packed) in FILES {
        let EtcdFile { state, about, .. } = loaded(&unpacked(packed), false).unwrap();
        let expected = if version == "3.7" { "3.7.0" } else { "3.4 or older" };
        assert_eq!(about.version, expected);
        assert_eq!((about.leases, about.users, about.roles, &about.notes[..]), (1, 3, 2, &[][..]), "{version}");
        assert_eq!((state.revision(), state.compacted()), (30, 25), "{version}");
        let counted = |revision| range(&state, "\0", "\0", revision).count;
        // 20 - 1 and 120 and the large one; then 9 less and one less, and one more of each of two.
        assert_eq!([25, 26, 27, 28, 29, 30].map(counted), [140, 140, 139, 130, 131, 132], "{version}");
        let one = |key, revision| range(&state, key, "", revision).kvs[0].clone();
        let facts = |key, revision| {
            let kv = one(key, revision);
            (kv.create_revision(), kv.mod_revision(), kv.version(), String::from_utf8(kv.value().to_vec()).unwrap())
        };
        assert_eq!(facts("one/1", 25), (2, 24, 2, "again".to_owned()));
        assert_eq!(facts("one/1", 30), (2, 26, 3, "a third time".to_owned()));
        assert_eq!(facts("one/3", 26), (4, 4, 1, "value 3".to_owned()));
        assert_eq!(facts("one/3", 30), (29, 29, 1, "back".to_owned()));
        assert_eq!(facts("many/077", 30), (22, 22, 1, format!("{:0100}", 77)));
        assert_eq!(one("large", 30).value().len(), 30_000);
        let deleted: Vec<&[u8]> =
            state.events_from(28).unwrap().take(1).flat_map(|(_, events)| events).map(|event| event.key()).collect();
        assert!(deleted.len() == 9 && deleted[0] == b"many/001" && deleted[8] == b"many/009");
        assert!(state.events_from(24).is_err(), "compacted");

        let leased = one("leased", 30);
        let (id, lease) = state.leases().iter().next().unwrap();
        assert_eq!((leased.lease(), lease.ttl_seconds, lease.left_seconds), (id, 3600, None));
        assert_eq!(state.lease_keys(id).collect::<Vec<_>>(), [&leased]);
    }
}

#[tokio::test]
async fn users_come_with_their_passwords_and_roles() {
    let passwords = Passwords::new(crate::env::Env::real(), 4);
    for (version, packed) in FILES {
        let EtcdFile { state, .. } = loaded(&unpacked(packed), false).unwrap();
        let auth = state.auth();
        assert!(auth.is_enabled() && auth.revision() > 10, "{version}: {}", auth.revision());
        let user = |name: &str| auth.user(name).unwrap().clone();
        assert_eq!(
            (user("root").roles, user("alice").roles),
            (vec!["root".into()], vec!["nothing".into(), "reader".into()])
        );
        let AuthUser { no_password, password_hash, .. } = user("bob");
        assert!(no_password && password_hash.is_empty());
        for (name, password) in [("root", "secret"), ("alice", "of-alice")] {
            let AuthUser { name, password_hash: hash, since, .. } = user(name);
            let checked = Checked { name, since, hash };
            assert_eq!(passwords.verify(Asker::MEMBER, &checked, password.into()).await, Ok(()));
            assert!(passwords.verify(Asker::MEMBER, &checked, "another".into()).await.is_err());
        }
        let permissions = &auth.role("reader").unwrap().permissions;
        let facts: Vec<_> = permissions.iter().map(|p| (p.perm_type, &p.key[..], &p.range_end[..])).collect();
        assert_eq!(facts, [(2, &b"many/001"[..], &b""[..]), (0, b"one/", b"one0")]);
        assert!(auth.role("nothing").unwrap().permissions.is_empty());
    }
}

/// What was loaded is a sound state: as a snapshot of ours it is the same.
fn check(state: &State) {
    let mut loader = Loader::new();
    state.changes().for_each(|change| loader.load(change).unwrap());
    let again = loader.finish(state.revision()).unwrap();
    assert_eq!(again.hash_kv(0).unwrap(), state.hash_kv(0).unwrap());
}

#[test]
fn the_checksum_is_looked_at_unless_that_is_refused() {
    let whole = unpacked(FILES[0].1);
    check(&loaded(&whole, false).unwrap().state);
    let seed = std::env::var("QUORATE_SEED").map_or(5, |seed| seed.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = random.usize(..bytes.len());
        bytes[at] ^= 1 << random.u8(..8);
        let found = loaded(&bytes, false).map(drop).unwrap_err();
        assert!(matches!(found, Error::Damaged { .. }), "byte {at}: {found}");
    }
    for len in [0, 1, 31, 32, 1024, 4096 + 32, whole.len() - 512, whole.len() - 1] {
        assert!(loaded(&whole[..len], false).is_err(), "cut to {len}");
    }
    // As a member has it.
    let bare = &whole[..whole.len() - 32];
    assert!(matches!(loaded(bare, false), Err(Error::NoChecksum { .. })));
    let (bare, whole) = (loaded(bare, true).unwrap(), loaded(&whole, false).unwrap());
    assert_eq!(bare.sha256, whole.sha256);
    assert_eq!(bare.state.hash_kv(0).unwrap(), whole.state.hash_kv(0).unwrap());
}

/// Without a checksum to stop it the reader meets every kind of damage. It refuses it, or reads a sound state.
#[test]
fn damage_that_no_checksum_tells_is_refused_or_harmless() {
    let whole = unpacked(FILES[1].1);
    let seed = std::env::var("QUORATE_SEED").map_or(6, |seed| seed.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut refused = 0;
    for _ in 0..4000 {
        let mut bytes = whole.clone();
        for _ in 0..random.usize(1..4) {
            // Mostly what pages are made of: their heads and first elements.
            let page = random.usize(..bytes.len() / 4096) * 4096;
            let within = if random.bool() { 96 } else { 4096 };
            let at = (page + random.usize(..within)).min(bytes.len() - 1);
            match random.u8(..3) {
                0 => bytes[at] ^= 1 << random.u8(..8),
                1 => bytes[at] = random.u8(..64),
                _ => bytes.truncate(bytes.len().max(4096) - random.usize(..2048)),
            }
        }
        match loaded(&bytes, true) {
            Ok(file) => check(&file.state),
            Err(_) => refused += 1,
        }
    }
    assert!((400..4000).contains(&refused), "{refused} of 4000 refused");
}

/// A file of pages of 1 KiB: meta pages, and what is given from page 2 on, of which page 2 is the root of the buckets.
fn bolt_of(pages: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for txid in 0..2u64 {
        let mut meta = Vec::new();
        for number in [super::page::MAGIC, 2, 1024, 0] {
            meta.extend(number.to_le_bytes());
        }
        for number in [2, 0, u64::MAX, 2 + pages.len() as u64, txid] {
            meta.extend(number.to_le_bytes());
        }
        let hash = meta
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        meta.extend(hash.to_le_bytes());
        file.extend([&head(txid, 4, 0, 0)[..], &meta].concat());
        file.resize(1024 * (1 + txid as usize), 0);
    }
    for page in pages {
        file.extend(page);
        file.resize(file.len().next_multiple_of(1024), 0);
    }
    file
}

fn head(id: u64, flags: u16, count: u16, overflow: u32) -> Vec<u8> {
    [&id.to_le_bytes()[..], &flags.to_le_bytes(), &count.to_le_bytes(), &overflow.to_le_bytes()].concat()
}

/// A leaf of one element.
fn leaf(id: u64, is_bucket: bool, key: &str, value: &[u8]) -> Vec<u8> {
    let mut page = head(id, 2, 1, 0);
    for number in [u32::from(is_bucket), 16, key.len() as u32, value.len() as u32] {
        page.extend(number.to_le_bytes());
    }
    [&page[..], key.as_bytes(), value].concat()
}

/// A branch with these children, whose keys nobody looks at.
fn branch(id: u64, children: &[u64]) -> Vec<u8> {
    let mut page = head(id, 1, children.len() as u16, 0);
    for child in children {
        page.extend([&0u32.to_le_bytes()[..], &0u32.to_le_bytes(), &child.to_le_bytes()].concat());
    }
    page
}

/// What bucket `b` gives, with its root at page 3, or the first error.
fn read(pages: &[Vec<u8>]) -> Result<Vec<String>, String> {
    let root = leaf(2, true, "b", &[3u64.to_le_bytes(), [0; 8]].concat());
    let bytes = bolt_of(&[&[root][..], pages].concat());
    let bolt = Bolt::open(file(&bytes), bytes.len() as u64, "x").map_err(|error| error.to_string())?;
    let entries = bolt.bucket("b").map_err(|error| error.to_string())?;
    entries.map(|entry| entry.map(|x| String::from_utf8(x.0.to_vec()).unwrap()).map_err(|e| e.to_string())).collect()
}

#[test]
fn trees_that_are_none_are_refused() {
    let one = |id, key| leaf(id, false, key, b"");
    assert_eq!(read(&[branch(3, &[4, 5]), one(4, "a"), one(5, "b")]).unwrap(), ["a", "b"]);
    for (what, pages, says) in [
        ("itself below it", vec![branch(3, &[3])], "page 3 belongs to more than one place"),
        ("a loop of two", vec![branch(3, &[4]), branch(4, &[3])], "page 3 belongs to more than one place"),
        ("a page twice", vec![branch(3, &[4, 4]), one(4, "a")], "page 4 belongs to more than one place"),
        ("a page that is not there", vec![branch(3, &[9])], "page 9 is asked for"),
        ("a page of another number", vec![branch(3, &[4]), one(5, "a")], "page 4 says that it is page 5"),
        ("keys out of order", vec![branch(3, &[4, 5]), one(4, "b"), one(5, "a")], "out of order"),
        ("a key twice", vec![branch(3, &[4, 5]), one(4, "b"), one(5, "b")], "out of order"),
        ("a bucket in a bucket", vec![leaf(3, true, "x", &[0; 16])], "a bucket in a bucket"),
        ("a list of free pages", vec![head(3, 16, 0, 0)], "neither branch nor leaf"),
        ("over pages that are not there", vec![head(3, 2, 0, 1)], "page 3 is asked for"),
        ("over 4 Gi pages", vec![head(3, 2, 0, u32::MAX)], "page 3 is asked for"),
    ] {
        let said = read(&pages).unwrap_err();
        assert!(said.contains(says), "{what}: {said}");
    }
    let chain: Vec<Vec<u8>> = (3..100).map(|id| branch(id, &[id + 1])).collect();
    assert!(read(&chain).unwrap_err().contains("levels"));
}

#[test]
fn a_file_of_something_else_is_told_apart() {
    assert!(!is_one(&*file(&[])) && !is_one(&*file(&[7; 5000])));
    let bytes = bolt_of(&[leaf(2, true, "b", &[0; 16])]);
    assert!(is_one(&*file(&bytes)));
    let refused = loaded(&bytes, true).map(drop).unwrap_err().to_string();
    // The bucket that it has is itself damaged: no page is inside.
    assert!(refused.contains("damaged"), "{refused}");
    let inline = [&[0; 16][..], &head(0, 2, 0, 0)].concat();
    let refused = loaded(&bolt_of(&[leaf(2, true, "b", &inline)]), true).map(drop).unwrap_err().to_string();
    assert!(refused.contains("none of etcd"), "{refused}");
}

/// Of the two meta pages the whole one of the later transaction counts.
#[test]
fn a_torn_meta_page_is_passed_over() {
    let inline = [&[0; 16][..], &head(0, 2, 0, 0)].concat();
    let whole = bolt_of(&[leaf(2, true, "b", &inline)]);
    for torn in [20, 1024 + 20] {
        let mut bytes = whole.clone();
        bytes[torn + 16] ^= 1;
        let bolt = Bolt::open(file(&bytes), bytes.len() as u64, "x").unwrap();
        assert!(bolt.has_bucket("b"), "the page of byte {torn} is torn");
    }
    let mut bytes = whole;
    bytes[36] ^= 1;
    bytes[1024 + 36] ^= 1;
    let refused = Bolt::open(file(&bytes), bytes.len() as u64, "x").err().unwrap().to_string();
    assert!(refused.contains("neither of its two meta pages"), "{refused}");
}
