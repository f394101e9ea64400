//! The good clients: what they do, how long each call takes, and whether they are told anything wrong.
//!
//! Owns the keys below `good/`. Each writer has keys of its own, to which it alone writes ever greater numbers, so that it knows what a
//! read may show: no less than it was acknowledged, no more than it has asked for. Watchers see every acknowledged number, in order,
//! with the number before it. Absent: what others do meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RangeRequest, WatchCreateRequest,
    WatchRequest, watch_request,
};
use tonic::Status;
use tonic::transport::Channel;

use crate::servers::{Servers, channel};

/// Between two rounds of a client.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest wait for an answer; longer is a failure, and unknown.
const PATIENCE: Duration = Duration::from_secs(10);
/// Writers at each member.
const WRITERS: usize = 4;

/// What the good clients have seen.
#[derive(Default)]
pub struct Seen {
    /// Microseconds of answered calls by what was asked.
    pub micros: BTreeMap<&'static str, Option<Histogram<u64>>>,
    /// Calls that failed, by text.
    pub failed: BTreeMap<String, u64>,
    /// Anything that must never be said; empty if all is well.
    pub wrong: Vec<String>,
}

impl Seen {
    fn note(&mut self, what: &'static str, took: Duration) {
        let new = || Histogram::new_with_bounds(1, 600_000_000, 3).ok();
        if let Some(histogram) = self.micros.entry(what).or_insert_with(new) {
            histogram.saturating_record(took.as_micros() as u64);
        }
    }

    /// Milliseconds at a quantile, of all calls of a kind.
    pub fn millis(&self, what: &str, quantile: f64) -> f64 {
        let histogram = self.micros.get(what).and_then(Option::as_ref);
        histogram.map_or(f64::NAN, |histogram| histogram.value_at_quantile(quantile) as f64 / 1000.0)
    }

    pub fn count(&self) -> u64 {
        self.micros.values().flatten().map(Histogram::len).sum()
    }

    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

pub struct Good {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    writers: Vec<tokio::task::JoinHandle<(String, u64)>>,
    watchers: Vec<tokio::task::JoinHandle<BTreeMap<String, u64>>>,
    /// The keys and the numbers that were acknowledged last; for the watchers, once the writers are done.
    acknowledged: Arc<Mutex<Option<BTreeMap<String, u64>>>>,
}

struct Writer {
    kv: KvClient<Channel>,
    leases: LeaseClient<Channel>,
    key: String,
    /// Acknowledged, and asked for.
    low: u64,
    high: u64,
    seen: Arc<Mutex<Seen>>,
}

impl Good {
    pub fn start(servers: &Servers) -> anyhow::Result<Self> {
        let (stop, seen, acknowledged) = (Arc::default(), Arc::<Mutex<Seen>>::default(), Arc::default());
        let mut good = Self { stop, seen, writers: Vec::new(), watchers: Vec::new(), acknowledged };
        for (member, endpoint) in servers.endpoints().iter().enumerate() {
            for i in 0..WRITERS {
                let writer = Writer {
                    kv: KvClient::new(channel(endpoint)?),
                    leases: LeaseClient::new(channel(endpoint)?),
                    key: format!("good/{member}/{i}"),
                    low: 0,
                    high: 0,
                    seen: good.seen.clone(),
                };
                good.writers.push(tokio::spawn(writer.run(good.stop.clone())));
            }
            let watch = WatchClient::new(channel(endpoint)?);
            let (seen, acknowledged) = (good.seen.clone(), good.acknowledged.clone());
            good.watchers.push(tokio::spawn(watch_all(watch, seen, acknowledged)));
        }
        Ok(good)
    }

    /// Ends the writers, reads what they were acknowledged from every member, and waits until the watchers have seen it.
    pub async fn stop(self, servers: &Servers) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = BTreeMap::new();
        for writer in self.writers {
            let (key, low) = writer.await?;
            acknowledged.insert(key, low);
        }
        for slot in 0..servers.size {
            let what = format!("member {slot} to hold what was acknowledged");
            servers.wait(&what, async || holds(servers, slot, &acknowledged).await).await?;
        }
        *self.acknowledged.lock() = Some(acknowledged);
        for watcher in self.watchers {
            match tokio::time::timeout(Duration::from_secs(60), watcher).await {
                Ok(shown) => drop(shown?),
                Err(_) => {
                    self.seen.lock().wrong.push("a watcher has not seen all that was acknowledged in 60 s".into())
                }
            }
        }
        Ok(std::mem::take(&mut *self.seen.lock()))
    }
}

async fn holds(servers: &Servers, slot: u64, acknowledged: &BTreeMap<String, u64>) -> anyhow::Result<()> {
    let mut kv = KvClient::new(servers.channel(slot)?);
    for (key, low) in acknowledged.iter().filter(|(_, low)| **low > 0) {
        let read = RangeRequest { key: key.clone().into(), ..Default::default() };
        let found = kv.range(read).await?.into_inner().kvs;
        let number = number(found.first().context("the key is gone")?.value())?;
        ensure!(number >= *low, "LOST: {key} holds {number}, and {low} was acknowledged");
    }
    Ok(())
}

fn number(value: &[u8]) -> anyhow::Result<u64> {
    Ok(std::str::from_utf8(value)?.parse()?)
}

/// Waits for an answer and notes how long it took.
async fn timed<T>(
    seen: &Mutex<Seen>,
    what: &'static str,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Option<T> {
    let begun = Instant::now();
    let outcome = tokio::time::timeout(PATIENCE, call).await;
    let failure = match outcome {
        Ok(Ok(answer)) => {
            seen.lock().note(what, begun.elapsed());
            return Some(answer.into_inner());
        }
        Ok(Err(status)) => format!("{what}: {:?}: {}", status.code(), status.message()),
        Err(_) => format!("{what}: no answer in {PATIENCE:?}"),
    };
    *seen.lock().failed.entry(failure).or_default() += 1;
    None
}

impl Writer {
    async fn run(mut self, stop: Arc<AtomicBool>) -> (String, u64) {
        for round in 0_u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if let Err(error) = self.round(round).await {
                self.seen.lock().wrong.push(format!("{}: {error:#}", self.key));
            }
            tokio::time::sleep(PAUSE).await;
        }
        (self.key, self.low)
    }

    async fn round(&mut self, round: u64) -> anyhow::Result<()> {
        self.high += 1;
        let value = self.high.to_string().into();
        let put = PutRequest { key: self.key.clone().into(), value, ..Default::default() };
        if timed(&self.seen, "put", self.kv.put(put)).await.is_some() {
            self.low = self.high;
        }
        let read = RangeRequest { key: self.key.clone().into(), ..Default::default() };
        if let Some(answer) = timed(&self.seen, "get", self.kv.range(read)).await {
            let found = answer.kvs.first().map(|kv| number(kv.value())).transpose()?.unwrap_or(0);
            if found < self.low || found > self.high {
                bail!("a read shows {found}; {} was acknowledged, {} asked for", self.low, self.high);
            }
            self.low = found;
        }
        if round.is_multiple_of(10) {
            let all = RangeRequest { key: "good/".into(), range_end: "good0".into(), ..Default::default() };
            timed(&self.seen, "range", self.kv.range(all)).await;
        }
        if round.is_multiple_of(20) {
            let grant = LeaseGrantRequest { ttl: 60, id: 0 };
            if let Some(lease) = timed(&self.seen, "lease", self.leases.lease_grant(grant)).await {
                let ask = tokio_stream::once(LeaseKeepAliveRequest { id: lease.id });
                timed(&self.seen, "lease", async { self.leases.lease_keep_alive(ask).await }).await;
                timed(&self.seen, "lease", self.leases.lease_revoke(LeaseRevokeRequest { id: lease.id })).await;
            }
        }
        Ok(())
    }
}

/// Watches all good keys from the first revision on, goes on after a stream that ended, and checks what it is told. Returns when it has
/// seen all that was acknowledged.
async fn watch_all(
    mut client: WatchClient<Channel>,
    seen: Arc<Mutex<Seen>>,
    acknowledged: Arc<Mutex<Option<BTreeMap<String, u64>>>>,
) -> BTreeMap<String, u64> {
    let (mut shown, mut next) = (BTreeMap::new(), 1);
    loop {
        let create = WatchCreateRequest {
            key: "good/".into(),
            range_end: "good0".into(),
            start_revision: next,
            prev_kv: true,
            ..Default::default()
        };
        let request = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
        let requests = tokio_stream::once(request).chain(tokio_stream::pending());
        if let Ok(stream) = client.watch(requests).await {
            let mut stream = stream.into_inner();
            loop {
                if let Some(all) = &*acknowledged.lock()
                    && all.iter().all(|(key, low)| shown.get(key).is_some_and(|number| number >= low) || *low == 0)
                {
                    return shown;
                }
                match tokio::time::timeout(Duration::from_millis(500), stream.message()).await {
                    Ok(Ok(Some(told))) => {
                        for event in &told.events {
                            if let Err(error) = take(event, &mut shown) {
                                seen.lock().wrong.push(format!("watch: {error:#}"));
                            }
                        }
                        if let Some(event) = told.events.last() {
                            next = event.kv.as_ref().map_or(next, |kv| kv.mod_revision() + 1);
                        }
                        if told.canceled {
                            *seen.lock().failed.entry(format!("watch: {}", told.cancel_reason)).or_default() += 1;
                            break;
                        }
                    }
                    Ok(_) => {
                        *seen.lock().failed.entry("watch: the stream ended".into()).or_default() += 1;
                        break;
                    }
                    // Nothing new.
                    Err(_) => {}
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn take(event: &quorate::pb::Event, shown: &mut BTreeMap<String, u64>) -> anyhow::Result<()> {
    let kv = event.kv.as_ref().context("an event without a key")?;
    let key = String::from_utf8_lossy(kv.key()).into_owned();
    let new = number(kv.value())?;
    let before = event.prev_kv.as_ref().map(|kv| number(kv.value())).transpose()?.unwrap_or(0);
    let last = shown.insert(key.clone(), new).unwrap_or(0);
    ensure!(before == last, "{key}: {new} came after {last}, and says that {before} was before it");
    ensure!(new > last, "{key}: {new} came after {last}");
    Ok(())
}
