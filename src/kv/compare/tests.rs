//! Comparisons together beside each by itself, at random.

use super::*;

pub(in crate::kv) fn some_compare(random: &mut fastrand::Rng) -> Compare {
    let edge = |random: &mut fastrand::Rng| match random.u8(..20) {
        0 => i64::MIN,
        1 => i64::MAX,
        _ => random.i64(-2..=3),
    };
    let value = |random: &mut fastrand::Rng| vec![random.u8(b'a'..=b'c'); random.usize(..3)].into();
    let operand = match random.u8(..6) {
        0 => TargetUnion::Version(edge(random)),
        1 => TargetUnion::CreateRevision(edge(random)),
        2 => TargetUnion::ModRevision(edge(random)),
        3 => TargetUnion::Lease(edge(random)),
        _ => TargetUnion::Value(value(random)),
    };
    let target = match &operand {
        // Now and then one that is none, or has another's operand.
        _ if random.u8(..30) == 0 => random.i32(-1..=6),
        TargetUnion::Version(_) => CompareTarget::Version.into(),
        TargetUnion::CreateRevision(_) => CompareTarget::Create.into(),
        TargetUnion::ModRevision(_) => CompareTarget::Mod.into(),
        TargetUnion::Lease(_) => CompareTarget::Lease.into(),
        TargetUnion::Value(_) => CompareTarget::Value.into(),
    };
    let result = if random.u8(..30) == 0 { random.i32(-1..=5) } else { random.i32(0..=3) };
    let target_union = (random.u8(..10) > 0).then_some(operand);
    Compare { target, result, target_union, ..Default::default() }
}

#[test]
fn comparisons_together_say_what_they_say_one_by_one() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut met, mut not) = (0, 0);
    for _ in 0..20_000 {
        let compares: Vec<_> = (0..random.usize(1..5)).map(|_| some_compare(&mut random)).collect();
        let wanted = Wanted::of(Asked::all(compares.iter()).into_iter());
        for _ in 0..10 {
            let value = vec![random.u8(b'a'..=b'c'); random.usize(..3)];
            let mut any = || random.i64(-2..=3);
            let (version, create_revision, mod_revision, lease) = (any(), any(), any(), any());
            let kv = Fields { version, create_revision, mod_revision, lease, value: &value, ..Fields::default() };
            let expected = compares.iter().all(|c| compare(c, &kv));
            let together = wanted.as_ref().is_some_and(|wanted| wanted.is_met(&kv));
            assert_eq!(together, expected, "{compares:?} of {kv:?}");
            if expected { met += 1 } else { not += 1 }
        }
    }
    assert!(met > 1000 && not > 1000, "{met} {not}");
}
