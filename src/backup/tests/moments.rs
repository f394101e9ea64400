//! Moments of random histories, restored, are what a model was then; and who may write where.

use super::*;
use crate::backup::Error;
use crate::backup::plan::Retention;
use crate::backup::{prune, verify};
use crate::pb::backup::Origin;

fn cases() -> u64 {
    std::env::var("QUORATE_BACKUP_CASES").map_or(8, |n| n.parse().expect("a number of cases"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_revision_and_every_second_is_restored_as_the_model_was() {
    for seed in 0..cases() {
        println!("seed {seed}");
        let mut world = World::new(seed, (seed % 2 == 1).then(any_key)).await;
        world.fill(60).await;
        let first = world.archive.fulls(1).await.unwrap().remove(0).unwrap();
        for revision in first.full.revision..=world.model.revision {
            let restored = world.restored(Target::Revision(revision)).await.unwrap();
            let (_, then) = world.past.iter().rev().find(|(_, model)| model.revision == revision).unwrap();
            model::check(&restored.state.kv, then);
        }
        let last = world.next_index() - 1;
        for second in first.applied().index..=last {
            for at in [1000 * second, 1000 * second + 999] {
                let restored = world.restored(Target::Time(at)).await.unwrap();
                let (_, then) = world.past.iter().rev().find(|(index, _)| *index <= second).unwrap();
                model::check(&restored.state.kv, then);
            }
        }
        let latest = world.restored(Target::Latest).await.unwrap();
        model::check(&latest.state.kv, &world.model);
        assert_eq!(latest.state.kv.digest(), world.replay.state().kv.digest());
        let report = verify::verify(&world.archive, &world.generation, &mut |_| {}).await.unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        assert_eq!(report.revision, world.model.revision);
        let beyond = world.restored(Target::Revision(world.model.revision + 1)).await.err().unwrap().to_string();
        assert!(beyond.contains("is not there"), "{beyond}");
        let before = world.restored(Target::Time(999)).await.err().unwrap().to_string();
        assert!(before.contains("the oldest full backup"), "{before}");
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_members_that_archive_at_once_make_one_chain() {
    let mut world = World::new(77, None).await;
    let (mut one, mut other) = (world.chain().await, world.chain().await);
    world.archive(&mut one).await;
    world.archive(&mut other).await;
    world.full(one.number(), 0).await;
    for turn in 0..20_u64 {
        world.add(Some(2)).await;
        world.mark(1000 * turn);
        if turn % 3 != 0 {
            world.archive(&mut one).await;
        }
        if turn % 2 == 0 {
            world.archive(&mut other).await;
        }
    }
    world.archive(&mut one).await;
    world.archive(&mut other).await;
    assert_eq!((one.number(), one.end_index()), (other.number(), other.end_index()));
    let latest = world.restored(Target::Latest).await.unwrap();
    model::check(&latest.state.kv, &world.model);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_purged_before_it_was_archived_is_a_gap_that_a_full_backup_closes() {
    let mut world = World::new(78, None).await;
    let mut chain = world.chain().await;
    world.archive(&mut chain).await;
    world.full(chain.number(), 0).await;
    world.add(Some(3)).await;
    world.archive(&mut chain).await;
    let known = world.model.clone();
    world.add(Some(3)).await;
    world.add(Some(3)).await;
    let purged = world.cut().applied;
    world.log.purge(purged).await.unwrap();
    world.archive(&mut chain).await;
    world.add(Some(3)).await;
    world.archive(&mut chain).await;
    assert_eq!(chain.unbroken_since(), purged.index);
    // What is before the gap can be restored, and nothing beyond it is made of that.
    model::check(&world.restored(Target::Latest).await.unwrap().state.kv, &known);
    world.full(chain.number(), 1).await;
    world.add(Some(3)).await;
    world.archive(&mut chain).await;
    model::check(&world.restored(Target::Latest).await.unwrap().state.kv, &world.model);
    let report = verify::verify(&world.archive, &world.generation, &mut |_| {}).await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pruned_breaks_no_chain() {
    let mut world = World::new(79, None).await;
    world.fill(80).await;
    let before = world.archive.fulls(1).await.unwrap().len();
    assert!(before > 3, "{before}");
    let keep = Retention { fulls: 2, age: std::time::Duration::ZERO };
    let planned = prune::prune(&world.archive, &keep, true).await.unwrap();
    let pruned = prune::prune(&world.archive, &keep, false).await.unwrap();
    assert_eq!(planned, pruned);
    assert_eq!((pruned.fulls.len(), pruned.unfinished.len()), (before - 2, 0));
    assert!(pruned.records > 0);
    assert_eq!(prune::prune(&world.archive, &keep, false).await.unwrap(), prune::Pruned::default());
    let first = world.archive.fulls(1).await.unwrap().remove(0).unwrap();
    for revision in first.full.revision..=world.model.revision {
        let restored = world.restored(Target::Revision(revision)).await.unwrap();
        let (_, then) = world.past.iter().rev().find(|(_, model)| model.revision == revision).unwrap();
        model::check(&restored.state.kv, then);
    }
    // It goes on where it was.
    world.fill(5).await;
    model::check(&world.restored(Target::Latest).await.unwrap().state.kv, &world.model);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_has_one_writer() {
    let mut world = World::new(80, None).await;
    world.fill(3).await;
    let archive = world.archive.clone();
    assert_eq!(archive.claim(THIS.cluster_id, None).await.unwrap(), world.generation);
    let refused = archive.claim(0xd, None).await.unwrap_err().to_string();
    assert!(refused.contains("are of cluster 000000000000000c") && refused.contains("adopt"), "{refused}");
    // One that was restored from here goes on here.
    let origin = Origin { generation: 1, revision: 3 };
    let second = archive.claim(0xd, Some(&origin)).await.unwrap();
    assert_eq!((second.number, second.cluster_id), (2, 0xd));
    assert_eq!(archive.claim(0xd, Some(&origin)).await.unwrap(), second);
    assert!(archive.claim(0xe, Some(&origin)).await.is_err(), "somebody else was");
    assert!(archive.claim(THIS.cluster_id, None).await.is_err(), "the former one writes no more");
    assert_eq!(archive.adopt(THIS.cluster_id).await.unwrap().number, 3);
    assert!(archive.claim(0xd, Some(&origin)).await.is_err());
    let nothing = Archive::new(Store::of(&world.env, Arc::new(InMemory::new()), None));
    assert!(matches!(nothing.newest().await, Err(Error::Refused(_))));
    assert!(nothing.adopt(1).await.is_err());
    world.end().await;
}
