//! Clients of a Service while its pods come and go: writers, readers, and what they must find.
//!
//! Owns what was acknowledged. A writer and a reader keep to one pod until it fails them, then take another ready one, as a client
//! behind a Service does. Every key is written once. A linearizable read must show a revision that is no older than any that was
//! acknowledged before it began, and the newest key of which that was known.
//!
//! `QUORATE_MIXED_CLIENTS` adds so many that do nothing else but load the pods: four linearizable reads to one put, each as soon as
//! the last is answered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

use super::cluster::wait_for;
use super::statefulset::StatefulSet;

const WRITERS: usize = 4;
const READERS: usize = 2;
/// Between two requests of one client: the pods share the machine with them.
const PAUSE: Duration = Duration::from_millis(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
const MIXED_KEYS: u32 = 10_000;
const MIXED_VALUE: &[u8] = &[b'm'; 256];

#[derive(Default)]
struct Told {
    /// Every acknowledged key with the revision that it was written at.
    written: BTreeMap<String, i64>,
    newest: Option<(i64, String)>,
    last: Option<Instant>,
    longest_gap: Duration,
}

struct Shared<S> {
    service: S,
    stop: AtomicBool,
    told: Arc<Mutex<Told>>,
    reads: Arc<AtomicU64>,
    mixed: Arc<AtomicU64>,
}

/// What a load has seen.
#[derive(Debug)]
pub struct Report {
    pub writes: usize,
    pub reads: u64,
    /// Answers to the clients of `QUORATE_MIXED_CLIENTS`.
    pub mixed: u64,
    /// Between two acknowledgements, of whichever writers.
    pub longest_gap: Duration,
}

/// A running load.
pub struct Load {
    told: Arc<Mutex<Told>>,
    reads: Arc<AtomicU64>,
    mixed: Arc<AtomicU64>,
    /// Of all steps whose gaps were taken.
    longest_gap: Mutex<Duration>,
    stop: Box<dyn Fn() + Send + Sync>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(service: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        let (told, reads, mixed) =
            (Arc::<Mutex<Told>>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let shared = Shared {
            service,
            stop: AtomicBool::new(false),
            told: told.clone(),
            reads: reads.clone(),
            mixed: mixed.clone(),
        };
        let shared = Arc::new(shared);
        let mut tasks: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write(shared.clone(), writer))).collect();
        tasks.extend((0..READERS).map(|_| tokio::spawn(read(shared.clone()))));
        let clients =
            std::env::var("QUORATE_MIXED_CLIENTS").map_or(0, |text| text.parse().expect("a number of clients"));
        tasks.extend((0..clients).map(|_| tokio::spawn(mix(shared.clone()))));
        let longest_gap = Mutex::default();
        Self {
            told,
            reads,
            mixed,
            longest_gap,
            stop: Box::new(move || shared.stop.store(true, Ordering::Relaxed)),
            tasks,
        }
    }

    pub fn writes(&self) -> usize {
        self.told.lock().unwrap().written.len()
    }

    /// Waits for `more` acknowledged writes.
    pub async fn wait_progress(&self, more: usize) {
        let goal = self.writes() + more;
        wait_for(&format!("{goal} acknowledged writes"), async || {
            let count = self.writes();
            if count >= goal { Ok(()) } else { Err(count) }
        })
        .await;
    }

    /// The longest gap between acknowledgements since the last call, the one that is open now included.
    pub fn take_longest_gap(&self) -> Duration {
        let mut told = self.told.lock().unwrap();
        let open = told.last.map_or(Duration::ZERO, |last| last.elapsed());
        let gap = std::mem::take(&mut told.longest_gap).max(open);
        let mut longest = self.longest_gap.lock().unwrap();
        *longest = longest.max(gap);
        gap
    }

    /// Stops, and checks that every acknowledged write is read from each ready pod.
    pub async fn finish(self, set: &StatefulSet) -> Report {
        self.wait_progress(20).await;
        (self.stop)();
        join_all(self.tasks).await.into_iter().for_each(|ended| ended.unwrap());
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        for ordinal in set.wanted() {
            let found = wait_for(&format!("a linearizable read through kv-{ordinal}"), async || {
                let all = RangeRequest {
                    key: "load/".into(),
                    range_end: "load0".into(),
                    keys_only: true,
                    ..RangeRequest::default()
                };
                set.kv(ordinal).range(all).await.map_err(|status| status.message().to_owned())
            })
            .await;
            let revisions: BTreeMap<String, i64> = found
                .into_inner()
                .kvs
                .iter()
                .map(|kv| (String::from_utf8_lossy(kv.key()).into_owned(), kv.mod_revision()))
                .collect();
            let lost: Vec<_> = told.written.iter().filter(|(key, at)| revisions.get(*key) != Some(at)).collect();
            assert!(lost.is_empty(), "{} acknowledged writes are lost at kv-{ordinal}: {lost:?}", lost.len());
        }
        let longest_gap = told.longest_gap.max(*self.longest_gap.lock().unwrap());
        let (reads, mixed) = (self.reads.load(Ordering::Relaxed), self.mixed.load(Ordering::Relaxed));
        let report = Report { writes: told.written.len(), reads, mixed, longest_gap };
        println!("{report:?}");
        report
    }
}

/// A client that keeps to one pod for as long as it can.
#[derive(Default)]
struct Client(Option<KvClient<Channel>>);

impl Client {
    async fn pod(&mut self, service: impl Fn() -> Vec<String>) -> KvClient<Channel> {
        loop {
            if let Some(kv) = &self.0 {
                return kv.clone();
            }
            let ips = service();
            if ips.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            let ip = &ips[fastrand::usize(..ips.len())];
            let endpoint = Endpoint::from_shared(format!("http://{ip}:2379")).unwrap();
            let endpoint = endpoint.timeout(REQUEST_TIMEOUT).connect_timeout(Duration::from_millis(500));
            self.0 = Some(KvClient::new(endpoint.connect_lazy()).max_decoding_message_size(usize::MAX));
        }
    }

    async fn failed(&mut self) {
        self.0 = None;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn write<S: Fn() -> Vec<String>>(shared: Arc<Shared<S>>, writer: usize) {
    let mut client = Client::default();
    for i in 0u64.. {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let key = format!("load/{writer}/{i}");
        let put = PutRequest { key: key.clone().into(), value: format!("{i}").into(), ..PutRequest::default() };
        match client.pod(&shared.service).await.put(put).await {
            Ok(answer) => {
                let revision = answer.into_inner().header.unwrap().revision;
                let (mut told, now) = (shared.told.lock().unwrap(), Instant::now());
                told.longest_gap = told.last.map_or(Duration::ZERO, |last| now - last).max(told.longest_gap);
                told.last = Some(now);
                told.written.insert(key.clone(), revision);
                if told.newest.as_ref().is_none_or(|(newest, _)| revision > *newest) {
                    told.newest = Some((revision, key));
                }
            }
            Err(_) => client.failed().await,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn read<S: Fn() -> Vec<String>>(shared: Arc<Shared<S>>) {
    let mut client = Client::default();
    while !shared.stop.load(Ordering::Relaxed) {
        let mut kv = client.pod(&shared.service).await;
        let Some((least, key)) = shared.told.lock().unwrap().newest.clone() else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        match kv.range(RangeRequest { key: key.clone().into(), ..RangeRequest::default() }).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                let revision = answer.header.unwrap().revision;
                assert!(
                    revision >= least,
                    "a stale read: at revision {revision}, though {least} was acknowledged before"
                );
                assert_eq!(answer.kvs.len(), 1, "a stale read: {key} is missing, though it was acknowledged before");
                shared.reads.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => client.failed().await,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn mix<S: Fn() -> Vec<String>>(shared: Arc<Shared<S>>) {
    let mut client = Client::default();
    while !shared.stop.load(Ordering::Relaxed) {
        let key = format!("mixed/{:012}", fastrand::u32(..MIXED_KEYS));
        let mut kv = client.pod(&shared.service).await;
        let answered = if fastrand::u8(..5) == 0 {
            kv.put(PutRequest { key: key.into(), value: MIXED_VALUE.into(), ..PutRequest::default() }).await.map(drop)
        } else {
            kv.range(RangeRequest { key: key.into(), ..RangeRequest::default() }).await.map(drop)
        };
        match answered {
            Ok(()) => _ = shared.mixed.fetch_add(1, Ordering::Relaxed),
            Err(_) => client.failed().await,
        }
    }
}
