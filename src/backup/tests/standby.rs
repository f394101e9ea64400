//! What is archived is followed, and paths change hands.

use super::*;
use crate::backup::standby::{commands, new_entries};
use crate::backup::succession::successor;
use crate::backup::{Access, standby};
use crate::kv::{ROLES_SINCE, State};
use crate::pb::log::Membership;

/// Applies every record from where the standby stands.
async fn follow(world: &World, state: &mut State) -> u64 {
    let mut records = 0;
    loop {
        let at = state.standby().unwrap().clone();
        let Some(stored) = world.archive.record(at.generation, at.next_record).await.unwrap() else { return records };
        let record = stored.record;
        let entries = new_entries(record.entries, at.applied.unwrap()).unwrap();
        for follow in commands(&at, record.number, entries, &record.marks) {
            let command = Command::new(ROLES_SINCE, Request::Follow(follow));
            state.apply(&command, false).expect("a known command").expect("a standby takes it");
        }
        assert_eq!((state.revision(), state.standby().unwrap().next_record), (record.revision, record.number + 1));
        records += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_of_any_moment_becomes_what_the_source_is() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut world = World::new(seed, Some(any_key())).await;
    world.fill(25).await;
    let first = world.restored(Target::Latest).await.unwrap();
    assert!(first.next_record > first.record);
    let mut state = first.state.kv;
    let applied = first.state.log_id.as_ref().map(raft::log_id_to_pb).unwrap();
    state.begin_standby(first.generation, first.next_record, applied, &Membership::default());
    for _ in 0..3 {
        world.fill(20).await;
        assert!(follow(&world, &mut state).await > 0);
        // The model's leases have checkpoints, versions, attached keys and all.
        let mut promoted = crate::kv::Loader::new();
        state.changes().for_each(|change| promoted.load(change).unwrap());
        let mut promoted = promoted.finish(state.revision()).unwrap();
        promoted.clear_role();
        model::check(&promoted, &world.model);
    }
    let (ours, theirs) = (state.hash_kv(0).unwrap(), world.replay.state().kv.hash_kv(0).unwrap());
    assert_eq!((ours.hash, ours.compact_revision), (theirs.hash, theirs.compact_revision));
    let last = world.archive.tip(1).await.unwrap().unwrap().record;
    let at_millis = last.marks.last().unwrap().at_millis;
    assert_eq!(state.standby().unwrap().at_millis, at_millis, "up to when it has everything");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_standby_of_several_is_promoted_and_the_source_finds_it() {
    let (env, directory) = (Env::real(), tempfile::tempdir().unwrap());
    let url = directory.path().to_str().unwrap().to_owned();
    let settings = standby::Settings { url: url.clone(), access: Access::default() };
    let archive = Archive::new(Store::open(&env, &url, &settings.access).unwrap());
    let found =
        async |cluster: u64, own: Option<u32>| successor(&env, &settings, cluster, &mut own.clone()).await.unwrap();
    assert_eq!(found(1, None).await, None, "there is nothing");
    archive.claim(1, None).await.unwrap();
    // A copy that was restored from the path is nobody's successor.
    archive.adopt(5).await.unwrap();
    assert_eq!(found(1, None).await, None);
    let promoted = archive.promote(2, Some(2)).await.unwrap();
    assert_eq!((promoted.number, promoted.cluster_id, promoted.is_promotion), (3, 2, true));
    assert_eq!(archive.promote(2, Some(2)).await.unwrap(), promoted, "asked again, it is the same");
    let refused = archive.promote(3, Some(2)).await.unwrap_err().to_string();
    assert!(refused.contains("another cluster has taken the place already"), "{refused}");
    assert!(archive.claim(1, None).await.unwrap_err().to_string().contains("quorate backup adopt"));
    for cluster in [1, 5] {
        assert_eq!(found(cluster, None).await, Some(promoted), "cluster {cluster}");
        assert_eq!(found(cluster, Some(1)).await, Some(promoted), "cluster {cluster}");
    }
    assert_eq!((found(2, None).await, found(7, None).await), (None, None), "itself, and who never wrote there");
    // It is taken back.
    let back = archive.promote(1, None).await.unwrap();
    assert_eq!((found(1, Some(1)).await, found(2, None).await), (None, Some(back)));
    env.stop(std::time::Duration::from_secs(10)).await;
}
