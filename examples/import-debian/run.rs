//! The import under fire: clients that put, a hand that kills, and the check of what must be there.
//!
//! Shared by the example and the tests. Invariant: a key counts as acknowledged only after an answer, and a put whose fate is
//! unknown is sent again until it is answered (each key is put with one value only, so that this is safe).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use tokio::sync::Mutex;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::support::cluster::{Cluster, PATIENCE};

const MEMBERS: u64 = 3;
/// A member that was killed stays away for so long.
const DOWN: Duration = Duration::from_millis(300);
/// After this a client gives a member up and asks another.
const ANSWER_PATIENCE: Duration = Duration::from_secs(8);
const RETRY_PAUSE: Duration = Duration::from_millis(20);

pub struct Options {
    pub clients: usize,
    pub kill_every: Duration,
    pub seed: u64,
}

pub struct Stanza {
    pub key: Bytes,
    pub value: Bytes,
}

/// The stanzas of a package list, each under `debian/<package>/<version>`; of equal keys the last.
pub fn stanzas(list: &[u8]) -> Vec<Stanza> {
    let text = String::from_utf8_lossy(list);
    let mut all = BTreeMap::new();
    for stanza in text.split("\n\n").map(str::trim).filter(|stanza| !stanza.is_empty()) {
        let field =
            |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
        if let (Some(package), Some(version)) = (field("Package"), field("Version")) {
            all.insert(format!("debian/{package}/{version}"), stanza.to_owned());
        }
    }
    all.into_iter().map(|(key, value)| Stanza { key: key.into(), value: value.into() }).collect()
}

/// What a run did, and what it found.
pub struct Report {
    pub keys: usize,
    pub bytes: usize,
    pub acknowledged: usize,
    /// Refused for their size; none of Debian's are.
    pub too_large: Vec<String>,
    pub kills: usize,
    /// Attempts that were certainly not carried out, and those of unknown fate.
    pub refused: u64,
    pub ambiguous: u64,
    pub took: Duration,
    /// Longest time in which no client got an answer.
    pub gap_max: Duration,
    /// Resident bytes of each member after the import.
    pub resident: Vec<u64>,
    pub check_took: Vec<Duration>,
    /// What a check missed.
    pub lost: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = 1048576.0;
        let seconds = self.took.as_secs_f64();
        writeln!(f, "keys           {} ({:.1} MiB)", self.keys, self.bytes as f64 / MIB)?;
        writeln!(f, "acknowledged   {}, too large {}", self.acknowledged, self.too_large.len())?;
        writeln!(f, "kills          {}, then all at once", self.kills)?;
        writeln!(f, "retries        {} refused, {} of unknown fate", self.refused, self.ambiguous)?;
        writeln!(f, "import         {seconds:.1} s, {:.0} puts/s", self.acknowledged as f64 / seconds)?;
        writeln!(f, "longest gap    {:.2} s without an acknowledgement", self.gap_max.as_secs_f64())?;
        let resident: Vec<String> = self.resident.iter().map(|b| format!("{:.0} MiB", *b as f64 / MIB)).collect();
        writeln!(f, "resident       {}", resident.join(", "))?;
        let checks: Vec<String> = self.check_took.iter().map(|took| format!("{:.1} s", took.as_secs_f64())).collect();
        writeln!(f, "checked        every key at every member in {}", checks.join(", "))?;
        write!(f, "lost           {}", self.lost.len())
    }
}

/// What the clients share.
struct Work {
    stanzas: Vec<Stanza>,
    endpoints: Vec<String>,
    next: AtomicUsize,
    refused: AtomicU64,
    ambiguous: AtomicU64,
    told: Mutex<Told>,
}

struct Told {
    too_large: BTreeSet<usize>,
    acknowledged: usize,
    last: Instant,
    gap_max: Duration,
}

/// Imports while members are killed, and checks twice; the cluster's pods must not run yet.
pub async fn run(cluster: &mut Cluster, stanzas: Vec<Stanza>, options: &Options) -> Report {
    start_all(cluster).await;
    let endpoints = (0..MEMBERS).map(|slot| format!("http://{}", cluster.endpoint(slot))).collect();
    let told = Told { too_large: BTreeSet::new(), acknowledged: 0, last: Instant::now(), gap_max: Duration::ZERO };
    let work = Arc::new(Work {
        stanzas,
        endpoints,
        next: AtomicUsize::new(0),
        refused: AtomicU64::new(0),
        ambiguous: AtomicU64::new(0),
        told: Mutex::new(told),
    });
    let began = Instant::now();
    let clients: Vec<_> = (0..options.clients).map(|n| tokio::spawn(client(work.clone(), n))).collect();
    let kills = kill_until_done(cluster, &clients, options).await;
    for client in clients {
        client.await.expect("a client has failed");
    }
    let took = began.elapsed();
    start_all(cluster).await;
    let resident = (0..MEMBERS).map(|slot| cluster.resident_bytes(slot)).collect();
    let mut lost = Vec::new();
    let mut check_took = Vec::new();
    for round in ["after the kills", "after the death of all"] {
        let began = Instant::now();
        check(cluster, &work, options.clients, round, &mut lost).await;
        check_took.push(began.elapsed());
        if check_took.len() == 1 {
            cluster.kill_all();
            start_all(cluster).await;
        }
    }
    let told = work.told.lock().await;
    let name = |n: &usize| String::from_utf8_lossy(&work.stanzas[*n].key).into_owned();
    Report {
        keys: work.stanzas.len(),
        bytes: work.stanzas.iter().map(|s| s.value.len()).sum(),
        acknowledged: told.acknowledged,
        too_large: told.too_large.iter().map(name).collect(),
        kills,
        refused: work.refused.load(Ordering::Relaxed),
        ambiguous: work.ambiguous.load(Ordering::Relaxed),
        took,
        gap_max: told.gap_max,
        resident,
        check_took,
        lost,
    }
}

async fn start_all(cluster: &mut Cluster) {
    for slot in 0..MEMBERS {
        if !cluster.is_running(slot) {
            cluster.start_pod(slot);
        }
    }
    cluster.wait_formed().await;
}

/// Kills one random member after the other, and starts it again, while there are clients at work.
async fn kill_until_done(cluster: &mut Cluster, clients: &[tokio::task::JoinHandle<()>], options: &Options) -> usize {
    let mut rng = fastrand::Rng::with_seed(options.seed);
    let mut kills = 0;
    let is_done = || clients.iter().all(|client| client.is_finished());
    // The first one soon, so that a short run meets some.
    let mut next = Instant::now() + options.kill_every / 4;
    let mut down: Option<(u64, Instant)> = None;
    while !is_done() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if let Some((slot, since)) = down
            && since.elapsed() >= DOWN
        {
            cluster.start_pod(slot);
            down = None;
        }
        if Instant::now() >= next && down.is_none() {
            let slot = rng.u64(..MEMBERS);
            cluster.kill(slot);
            kills += 1;
            (down, next) = (Some((slot, Instant::now())), next + options.kill_every);
        }
    }
    kills
}

/// Connections of one client to every member.
fn connections(endpoints: &[String]) -> Vec<KvClient<Channel>> {
    let connect = |endpoint: &String| {
        let endpoint = Endpoint::from_shared(endpoint.clone()).expect("endpoints are URLs");
        KvClient::new(endpoint.connect_timeout(Duration::from_secs(1)).connect_lazy())
            .max_decoding_message_size(usize::MAX)
    };
    endpoints.iter().map(connect).collect()
}

async fn client(work: Arc<Work>, n: usize) {
    let mut members = connections(&work.endpoints);
    let mut turn = n;
    loop {
        let at = work.next.fetch_add(1, Ordering::Relaxed);
        let Some(stanza) = work.stanzas.get(at) else { return };
        let accepted = loop {
            turn += 1;
            let put = PutRequest { key: stanza.key.clone(), value: stanza.value.clone(), ..Default::default() };
            let member = turn % members.len();
            match tokio::time::timeout(ANSWER_PATIENCE, members[member].put(put)).await {
                Ok(Ok(_)) => break true,
                // The limit of requests, or of messages.
                Ok(Err(status)) if matches!(status.code(), Code::InvalidArgument | Code::OutOfRange) => break false,
                Ok(Err(status)) if is_certain(&status) => work.refused.fetch_add(1, Ordering::Relaxed),
                Ok(Err(_)) | Err(_) => work.ambiguous.fetch_add(1, Ordering::Relaxed),
            };
            tokio::time::sleep(RETRY_PAUSE).await;
        };
        let mut told = work.told.lock().await;
        if accepted {
            told.acknowledged += 1;
        } else {
            told.too_large.insert(at);
        }
        told.gap_max = told.gap_max.max(told.last.elapsed());
        told.last = Instant::now();
    }
}

/// True if the put was certainly not carried out.
fn is_certain(status: &Status) -> bool {
    let text = status.message();
    status.code() == Code::ResourceExhausted || text == "etcdserver: no leader" || text.contains("tcp connect error")
}

/// Reads every key from each member, linearizably, and compares hashes.
async fn check(cluster: &Cluster, work: &Arc<Work>, clients: usize, round: &str, lost: &mut Vec<String>) {
    let too_large = work.told.lock().await.too_large.clone();
    for slot in 0..MEMBERS {
        let next = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> =
            (0..clients).map(|_| tokio::spawn(read_back(work.clone(), slot as usize, next.clone()))).collect();
        for reader in readers {
            let missing = reader.await.expect("a reader has failed");
            let missing = missing.into_iter().filter(|(n, _)| !too_large.contains(n));
            lost.extend(missing.map(|(n, seen)| {
                format!("{} {round} at member {slot}: {seen}", String::from_utf8_lossy(&work.stanzas[n].key))
            }));
        }
    }
    same_hash(cluster).await;
}

/// Keys whose value is not the one that was put, with what was seen.
async fn read_back(work: Arc<Work>, slot: usize, next: Arc<AtomicUsize>) -> Vec<(usize, String)> {
    let mut member = connections(&work.endpoints[slot..=slot]).remove(0);
    let mut wrong = Vec::new();
    loop {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let Some(stanza) = work.stanzas.get(n) else { return wrong };
        let deadline = Instant::now() + PATIENCE;
        let answer = loop {
            let range = RangeRequest { key: stanza.key.clone(), ..Default::default() };
            match member.range(range).await {
                Ok(answer) => break answer.into_inner(),
                Err(status) => assert!(Instant::now() < deadline, "no read is answered: {status}"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        };
        match answer.kvs.first() {
            Some(kv) if kv.value() == &stanza.value[..] => {}
            Some(kv) => wrong.push((n, format!("another value of {} bytes", kv.value().len()))),
            None => wrong.push((n, "no such key".to_owned())),
        }
    }
}

async fn same_hash(cluster: &Cluster) {
    let slots: Vec<u64> = (0..MEMBERS).collect();
    cluster.same_hash(&slots).await;
}
