//! Member directories: what survives a crash at every step.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mem_disk::MemDisk;
use super::*;
use crate::env::OpenMode;
use crate::env::disk::RealDisk;

const ROOT: &str = "/data";

fn open_with(disk: &MemDisk, id: u64) -> Result<Opened> {
    MemberDir::open(Arc::new(disk.clone()), Path::new(ROOT), 2, "kv-2", || id)
}

fn formation(cluster_id: u64) -> Formation {
    Formation { cluster_id, members: Vec::new(), moment: None }
}

fn make_log(dir: &MemberDir) -> Result<()> {
    let log = dir.log_path();
    at(&log, dir.disk.create_dir_all(&log))?;
    at(&log, dir.disk.sync_dir(&dir.path()))?;
    let file = log.join("0000000001.log");
    let open = at(&file, dir.disk.open(&file, OpenMode::CreateTruncate))?;
    at(&file, open.sync_all())?;
    at(&log, dir.disk.sync_dir(&log))
}

/// Runs `act` on the disk that `prepare` made, dying at every change in turn, and hands each restart to `check`.
fn at_every_crash(prepare: fn(&MemDisk), act: fn(&MemDisk) -> Result<()>, check: fn(Opened)) {
    for change in 0.. {
        let disk = MemDisk::default();
        prepare(&disk);
        disk.crash();
        disk.die_at(change);
        let result = act(&disk);
        let died = disk.died();
        assert_eq!(result.is_err(), died, "an error where the disk died, and only there: change {change}");
        disk.crash();
        check(open_with(&disk, 0xbeef).unwrap_or_else(|error| panic!("change {change}: {error}")));
        if !died {
            assert!(change > 2, "the act changed the disk");
            return;
        }
    }
}

fn selves(disk: &MemDisk) -> Vec<String> {
    disk.list(Path::new(ROOT)).unwrap().into_iter().filter(|name| name.contains('-')).collect()
}

#[test]
fn empty_disk_gets_an_identity_and_keeps_it() {
    let disk = MemDisk::default();
    let opened = open_with(&disk, 0xa).unwrap();
    assert!(opened.minted && !opened.lost_log);
    drop(opened);
    disk.crash();
    let opened = open_with(&disk, 0xb).unwrap();
    assert!(!opened.minted);
    assert_eq!(
        opened.dir.identity(),
        &Identity { member_id: 0xa, slot: 2, name: "kv-2".into(), ..Identity::default() }
    );
}

#[test]
fn crash_while_minting_the_first_self_leaves_one_or_none() {
    at_every_crash(
        |_| {},
        |disk| open_with(disk, 0xa).map(drop),
        |opened| {
            let id = opened.dir.identity().member_id;
            assert!(id == 0xa && !opened.minted || id == 0xbeef && opened.minted);
            assert!(opened.dir.former().is_empty());
        },
    );
}

#[test]
fn crash_while_accepting_leaves_pristine_or_accepted() {
    at_every_crash(
        |disk| drop(open_with(disk, 0xa).unwrap()),
        |disk| open_with(disk, 0xc)?.dir.accept_formation(&formation(7)),
        |opened| {
            let identity = opened.dir.identity();
            assert_eq!(identity.member_id, 0xa);
            assert_eq!(identity.formation.is_some(), identity.cluster_id == 7);
        },
    );
}

#[test]
fn crash_while_becoming_a_new_self_leaves_the_old_or_the_new_whole() {
    at_every_crash(
        |disk| {
            let mut dir = open_with(disk, 0xa).unwrap().dir;
            dir.set_cluster(7).unwrap();
            make_log(&dir).unwrap();
            dir.mark_log_started().unwrap();
        },
        |disk| open_with(disk, 0xc)?.dir.mint_anew(0xb),
        |opened| {
            assert!(!opened.lost_log, "old with its log, or new without one");
            let identity = opened.dir.identity();
            match identity.member_id {
                0xa => assert!(identity.log_started && opened.dir.former().is_empty()),
                0xb => {
                    assert!(!identity.log_started && identity.cluster_id == 0);
                    assert_eq!(opened.dir.former()[0].member_id, 0xa);
                    assert!(opened.dir.former()[0].identity.as_ref().unwrap().log_started);
                }
                other => panic!("neither old nor new: {other:x}"),
            }
        },
    );
}

#[test]
fn crash_while_the_log_starts_is_no_lost_disk() {
    at_every_crash(
        |disk| open_with(disk, 0xa).unwrap().dir.set_cluster(7).unwrap(),
        |disk| {
            let mut dir = open_with(disk, 0xc)?.dir;
            make_log(&dir)?;
            dir.mark_log_started()
        },
        |opened| assert!(!opened.lost_log),
    );
}

#[test]
fn crash_while_removing_former_selves_keeps_the_current_one() {
    at_every_crash(
        |disk| {
            let mut dir = open_with(disk, 0xa).unwrap().dir;
            for id in [0xb, 0xd] {
                dir.set_cluster(7).unwrap();
                make_log(&dir).unwrap();
                dir.mark_log_started().unwrap();
                dir.mint_anew(id).unwrap();
            }
        },
        |disk| open_with(disk, 0xc)?.dir.remove_former(1),
        |opened| {
            assert_eq!(opened.dir.identity().member_id, 0xd);
            let former: Vec<u64> = opened.dir.former().iter().map(|former| former.member_id).collect();
            assert!(former == [0xb] || former == [0xb, 0xa], "{former:x?}");
        },
    );
}

#[test]
fn started_identity_without_its_log_is_a_lost_disk() {
    let disk = MemDisk::default();
    let mut dir = open_with(&disk, 0xa).unwrap().dir;
    dir.set_cluster(7).unwrap();
    make_log(&dir).unwrap();
    dir.mark_log_started().unwrap();
    assert!(!open_with(&disk, 0xb).unwrap().lost_log);
    disk.remove_dir_all(&dir.log_path()).unwrap();
    assert!(open_with(&disk, 0xb).unwrap().lost_log);
}

#[test]
fn pristine_self_leaves_nothing_behind() {
    let disk = MemDisk::default();
    let mut dir = open_with(&disk, 0xa).unwrap().dir;
    dir.mint_anew(0xb).unwrap();
    assert_eq!(selves(&disk), ["member-000000000000000b"]);
}

#[test]
fn abandoned_formation_is_remembered_by_the_new_self() {
    let disk = MemDisk::default();
    let mut dir = open_with(&disk, 0xa).unwrap().dir;
    dir.accept_formation(&formation(7)).unwrap();
    assert!(dir.abandoned().is_empty());
    dir.abandon().unwrap();
    dir.mint_anew(0xb).unwrap();
    drop(dir);
    disk.crash();
    let dir = open_with(&disk, 0xc).unwrap().dir;
    assert_eq!(dir.abandoned(), [7]);
    assert_eq!(dir.identity().cluster_id, 0);
}

#[test]
fn flipped_byte_of_the_identity_is_refused_by_name() {
    let disk = MemDisk::default();
    let path = open_with(&disk, 0xa).unwrap().dir.path().join("identity");
    disk.spoil(&path, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let error = open_with(&disk, 0xb).err().unwrap();
    assert!(matches!(&error, Error::Damaged { path: named, .. } if *named == path), "{error}");
}

#[test]
fn newer_format_and_foreign_file_are_refused() {
    let disk = MemDisk::default();
    let path = open_with(&disk, 0xa).unwrap().dir.path().join("identity");
    disk.spoil(&path, |bytes| bytes[8] = 9);
    assert!(matches!(open_with(&disk, 0xb), Err(Error::Format { found: 9, .. })));
    disk.spoil(&path, |bytes| *bytes = b"something else that is long enough".to_vec());
    assert!(matches!(open_with(&disk, 0xb), Err(Error::Foreign { .. })));
}

#[test]
fn disk_of_another_slot_is_refused_and_untouched() {
    let disk = MemDisk::default();
    drop(open_with(&disk, 0xa).unwrap());
    let refused = MemberDir::open(Arc::new(disk.clone()), Path::new(ROOT), 1, "kv-1", || 0xb);
    assert!(matches!(refused, Err(Error::WrongSlot { held: 2, slot: 1, .. })));
    assert_eq!(selves(&disk), ["member-000000000000000a"]);
}

#[test]
fn used_directory_without_current_is_refused_and_kept() {
    let disk = MemDisk::default();
    open_with(&disk, 0xa).unwrap().dir.set_cluster(7).unwrap();
    disk.remove_file(Path::new("/data/current")).unwrap();
    assert!(matches!(open_with(&disk, 0xb), Err(Error::NoCurrent { .. })));
    assert_eq!(selves(&disk), ["member-000000000000000a"]);
}

#[test]
fn damaged_current_is_refused() {
    let disk = MemDisk::default();
    drop(open_with(&disk, 0xa).unwrap());
    let path = PathBuf::from("/data/current");
    disk.spoil(&path, |bytes| bytes.truncate(bytes.len() - 3));
    assert!(matches!(open_with(&disk, 0xb), Err(Error::Damaged { path: named, .. }) if named == path));
}

/// A member of cluster 7 with a log, and a former self.
fn used(disk: &MemDisk) {
    let mut dir = open_with(disk, 0xa).unwrap().dir;
    dir.set_cluster(6).unwrap();
    dir.mint_anew(0xb).unwrap();
    dir.set_cluster(7).unwrap();
    make_log(&dir).unwrap();
    dir.mark_log_started().unwrap();
}

fn open_anew(disk: &MemDisk, id: u64) -> Result<Opened> {
    MemberDir::open_anew(Arc::new(disk.clone()), Path::new(ROOT), 2, "kv-2", id)
}

/// However `current` or `identity` is damaged: it is noticed, and a new self goes on beside all that was there.
#[test]
fn damaged_identity_is_noticed_and_left_behind_whole() {
    let mut refused = 0;
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let disk = MemDisk::default();
        used(&disk);
        let path = Path::new(ROOT).join(["current", "member-000000000000000b/identity"][rng.usize(..2)]);
        let whole = disk.read(&path).unwrap();
        let at = rng.usize(..whole.len());
        match rng.u8(..5) {
            0 => disk.remove_file(&path).unwrap(),
            1 => disk.spoil(&path, |bytes| bytes.truncate(at)),
            2 => disk.spoil(&path, |bytes| bytes[at..].fill(0)),
            3 => disk.spoil(&path, |bytes| rng.fill(&mut bytes[at..])),
            _ => disk.spoil(&path, |bytes| bytes[at] ^= 1 << rng.u8(..8)),
        }
        let spoilt = disk.exists(&path).then(|| disk.read(&path).unwrap());
        match open_with(&disk, 0xc) {
            // A later version's format is no damage, though a turned bit may look like it.
            Err(Error::Format { .. }) => continue,
            Err(error) => assert!(error.is_damage(), "seed {seed}: {error}"),
            Ok(opened) => {
                let id = opened.dir.identity().member_id;
                let same = id == 0xb || spoilt == Some(whole);
                assert!(same, "seed {seed}: taken for member {id:x}");
                continue;
            }
        }
        refused += 1;
        assert!(MemberDir::clusters(&disk, Path::new(ROOT)).contains(&6), "seed {seed}");
        let dir = open_anew(&disk, 0xd).unwrap().dir;
        assert_eq!((dir.identity().member_id, dir.identity().cluster_id), (0xd, 0), "seed {seed}");
        let mut former: Vec<u64> = dir.former().iter().map(|former| former.member_id).collect();
        former.sort_unstable();
        assert_eq!(former, [0xa, 0xb], "seed {seed}");
        drop(dir);
        disk.crash();
        assert_eq!(open_with(&disk, 0xe).unwrap().dir.identity().member_id, 0xd, "seed {seed}");
        assert!(disk.exists(Path::new("/data/member-000000000000000b/log/0000000001.log")), "seed {seed}");
    }
    assert!(refused > 200, "{refused}");
}

#[test]
fn crash_while_leaving_a_damaged_identity_leaves_the_damage_or_the_new_self() {
    for change in 0.. {
        let disk = MemDisk::default();
        used(&disk);
        disk.spoil(Path::new("/data/current"), |bytes| bytes[3] ^= 1);
        disk.crash();
        disk.die_at(change);
        let result = open_anew(&disk, 0xd).map(drop);
        let died = disk.died();
        assert_eq!(result.is_err(), died, "change {change}");
        disk.crash();
        match open_with(&disk, 0xe) {
            Ok(opened) => assert_eq!(opened.dir.identity().member_id, 0xd, "change {change}"),
            Err(error) => assert!(error.is_damage() && died, "change {change}: {error}"),
        }
        if !died {
            return;
        }
    }
}

#[test]
#[should_panic(expected = "accepts no formation")]
fn second_formation_is_never_accepted() {
    let disk = MemDisk::default();
    let mut dir = open_with(&disk, 0xa).unwrap().dir;
    dir.accept_formation(&formation(7)).unwrap();
    let _ = dir.accept_formation(&formation(8));
}

#[test]
fn second_process_is_refused_on_a_real_disk() {
    let root = tempfile::tempdir().unwrap();
    let open = || MemberDir::open(Arc::new(RealDisk), root.path(), 0, "kv-0", || 0xa0000);
    let first = open().unwrap();
    assert!(matches!(open(), Err(Error::InUse { .. })));
    drop(first);
    assert!(!open().unwrap().minted);
}

/// What was copied a level too high, or with its directory, is found; a neighbour's is nobody's business.
#[test]
fn data_that_lies_beside_an_empty_directory_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let open = |root: &Path, slot: u64, name: &str| {
        MemberDir::open(disk.clone(), root, slot, name, || 0x100 + slot).map(|opened| opened.minted)
    };
    let claim = dir.path().join("claim");
    for (held, refused) in [
        (claim.clone(), true),
        (claim.join("kv-2"), true),
        (claim.join("data/kv-2"), true),
        (claim.join("kv-1"), false),
    ] {
        let slot = if held.ends_with("kv-1") { 1 } else { 2 };
        assert!(open(&held, slot, &format!("kv-{slot}")).unwrap());
        let root = claim.join("data");
        match open(&root, 2, "kv-2") {
            Err(Error::Misplaced { root: empty, found }) => {
                assert!(refused && empty == root && found == held, "{found:?}")
            }
            other => assert!(!refused && other.unwrap(), "{held:?}"),
        }
        assert!(!refused || !root.join("LOCK").exists(), "nothing was made");
        std::fs::remove_dir_all(&claim).unwrap();
    }
}
