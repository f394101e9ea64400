//! Objects that are changed, cut or lost, and stores that do not keep their word.

use std::collections::BTreeMap;

use futures_util::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMode, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::backup::Error;
use crate::backup::verify;
use crate::pb::backup::Record;

/// A small backup with two full ones and some records, and the state that it leads to.
async fn small(seed: u64, key: Option<Key>) -> (World, Option<u64>) {
    let mut world = World::new(seed, key).await;
    let mut chain = world.chain().await;
    world.archive(&mut chain).await;
    for second in 0..4 {
        if second % 2 == 0 {
            world.full(chain.number(), 1000 * second).await;
        }
        world.add(Some(2)).await;
        world.mark(1000 * second);
        world.archive(&mut chain).await;
    }
    let digest = world.replay.state().kv.digest();
    (world, digest)
}

/// What was done to `path` led to the same state by another way, or to an error that names it.
async fn judge(world: &World, path: &Path, digest: Option<u64>, what: &str) {
    let named = |error: &Error| matches!(error, Error::Damaged { name, .. } if path.as_ref().ends_with(name.trim_start_matches("test/")));
    match world.restored(Target::Latest).await {
        Ok(restored) => {
            assert_eq!(restored.state.kv.digest(), digest, "{path} {what}: another state");
            assert!(restored.damaged.iter().all(named), "{path} {what}: {:?}", restored.damaged);
        }
        Err(error) => assert!(named(&error), "{path} {what}: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_flipped_is_noticed_with_the_name_of_its_object_or_done_without() {
    for key in [None, Some(any_key())] {
        let (world, digest) = small(5, key).await;
        let objects = world.all_objects().await;
        let bytes: usize = objects.iter().map(|(_, bytes)| bytes.len()).sum();
        println!("{} objects, {bytes} bytes", objects.len());
        let mut noticed = 0;
        for (path, whole) in &objects {
            for at in 0..whole.len() {
                let mut bad = whole.to_vec();
                bad[at] ^= 1 << (at % 8);
                world.overwrite(path, bad.into()).await;
                judge(&world, path, digest, &format!("byte {at} flipped")).await;
                if !path.as_ref().contains("check") {
                    let report = verify::verify(&world.archive, &world.generation, &mut |_| {}).await;
                    let is_of_path = path.as_ref().ends_with("marker") || path.as_ref().contains("/generations/");
                    let found = report.map_or(true, |report| !report.findings.is_empty());
                    assert!(found || is_of_path, "{path}: byte {at} flipped, and verified");
                    noticed += usize::from(found);
                }
            }
            world.overwrite(path, whole.clone()).await;
        }
        assert!(noticed > 0);
        assert!(world.restored(Target::Latest).await.unwrap().damaged.is_empty());
        world.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cut_and_every_lost_object_is_noticed_or_done_without() {
    let (world, digest) = small(6, Some(any_key())).await;
    for (path, whole) in world.all_objects().await {
        for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            world.overwrite(&path, whole.slice(..length)).await;
            judge(&world, &path, digest, &format!("cut to {length}")).await;
        }
        world.objects.delete(&path).await.unwrap();
        // Without the newest record the one before is the end: nothing says that there was another. All else is noticed.
        let is_last = path.as_ref().ends_with(&format!("{:020}", 4));
        if !is_last && !path.as_ref().contains("/full/") {
            let lost = world.restored(Target::Latest).await;
            let is_same = lost.as_ref().is_ok_and(|restored| restored.state.kv.digest() == digest);
            assert!(lost.is_err() || is_same, "{path} is gone");
        }
        world.overwrite(&path, whole).await;
    }
    world.end().await;
}

/// A record that is whole, and tells of something else than what the members did.
#[tokio::test(flavor = "multi_thread")]
async fn entries_that_lead_to_another_state_are_refused_by_the_digest() {
    let (mut world, _) = small(7, None).await;
    let tip = world.archive.tip(1).await.unwrap().unwrap();
    let request = crate::pb::etcd::PutRequest { key: "planted".into(), value: "x".into(), ..Default::default() };
    let batch = Batch { commands: vec![Command::new(2, Request::Put(request))] };
    world.add(Some(1)).await;
    let entry = Entry {
        log_id: Some(LogId { index: world.next_index() - 1, ..world.cut().applied }),
        payload: Some(entry::Payload::Batch(batch.encode_to_vec().into())),
    };
    let record = Record {
        number: tip.record.number + 1,
        cluster_id: THIS.cluster_id,
        before: tip.sha256.to_vec().into(),
        from: tip.record.entries.last().unwrap().log_id,
        entries: vec![entry],
        digest: world.cut().digest,
        ..Record::default()
    };
    world.archive.add_record(1, &record).await.unwrap().unwrap();
    let error = world.restored(Target::Latest).await.err().unwrap().to_string();
    assert!(error.contains("another state") && error.contains("log/"), "{error}");
    let report = verify::verify(&world.archive, &world.generation, &mut |_| {}).await.unwrap();
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    // What came before is not touched by it.
    let revision = tip.record.revision;
    assert_eq!(world.restored(Target::Revision(revision - 1)).await.unwrap().state.kv.revision(), revision - 1);
    world.end().await;
}

/// A store that writes over what it was told to make only if it is not there.
#[derive(Debug)]
struct Careless(InMemory);

impl std::fmt::Display for Careless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("careless")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Careless {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.0.put_opts(path, payload, PutOptions { mode: PutMode::Overwrite, ..options }).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.0.get_opts(path, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_ignores_if_none_match_is_refused() {
    let env = Env::real();
    let archive = Archive::new(Store::of(&env, Arc::new(Careless(InMemory::new())), None));
    let error = archive.claim(1, None).await.unwrap_err().to_string();
    assert!(error.contains("If-None-Match"), "{error}");
    assert!(archive.generations().await.unwrap().is_empty(), "nothing was begun there");
    Store::of(&env, Arc::new(InMemory::new()), None).check().await.unwrap();
    env.stop(std::time::Duration::from_secs(10)).await;
}

/// The names are what a later version finds.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_looks_like_this() {
    let (world, _) = small(8, None).await;
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for (path, _) in world.all_objects().await {
        let parts: Vec<&str> = path.as_ref().split('/').collect();
        let kind = match parts[1..] {
            ["marker"] => "marker".into(),
            ["generations", "00000001"] => "generation".into(),
            ["00000001", kind, name] => format!("{kind} {}", if name.ends_with(".data") { "data" } else { "object" }),
            _ => panic!("{path}"),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let expected = [("marker", 1), ("generation", 1), ("log object", 4), ("full data", 2), ("full object", 2)];
    assert_eq!(kinds, expected.map(|(kind, count)| (kind.to_owned(), count)).into());
    world.end().await;
}
