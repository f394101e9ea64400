//! Replays the fuzzer's seeds, and what it once found, through the targets: no fuzzer is needed for that.

use std::collections::BTreeSet;
use std::path::Path;

use quorate::fuzzing::{TARGETS, run, seeds};

#[test]
fn every_seed_passes_its_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let (mut replayed, mut bytes) = (0, 0);
    for (target, _) in TARGETS {
        let dir = root.join(target);
        let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        for entry in entries {
            let path = entry.unwrap().path();
            let seed = std::fs::read(&path).unwrap();
            println!("{}", path.display());
            run(target, &seed);
            // So does its beginning, and each of a few flips.
            for cut in 1..8 {
                run(target, &seed[..seed.len() * cut / 8]);
                let mut flipped = seed.clone();
                if let Some(byte) = flipped.get_mut(seed.len() * cut / 8) {
                    *byte ^= 0x11 << (cut % 4);
                    run(target, &flipped);
                }
            }
            (replayed, bytes) = (replayed + 1, bytes + seed.len());
        }
        run(target, &[]);
    }
    assert!(replayed >= TARGETS.len(), "only {replayed} seeds");
    assert!(bytes < 200 << 10, "{bytes} bytes of seeds are checked in; keep the small ones");
}

#[test]
fn seeds_are_named_once_and_have_a_target() {
    let names: Vec<_> = seeds::all().into_iter().map(|(target, name, _)| (target, name)).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    assert!(names.iter().all(|(target, _)| TARGETS.iter().any(|(known, _)| known == target)));
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    for (target, _) in TARGETS {
        assert!(fuzz.join(format!("{target}.rs")).exists(), "{target} has no binary in fuzz/fuzz_targets");
    }
}
