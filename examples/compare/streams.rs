//! Works on streams: watchers that get what one client puts, and leases that are kept alive.
//! Absent: watchers that fall behind or come back; `watch-bench` and the tests have those.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use quorate::pb::etcd::watch_client::WatchClient;
use quorate::pb::etcd::watch_request::RequestUnion;
use quorate::pb::etcd::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest, WatchCreateRequest, WatchRequest,
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::client::{Client, connect};
use crate::servers::Servers;

const WATCHERS_PER_STREAM: u64 = 10;
/// Longest wait for the last event of a put.
const EVENT_PATIENCE: Duration = Duration::from_secs(30);
/// Longer than any measurement.
const LEASE_SECONDS: i64 = 3600;

/// Which watchers: of one key that is written, or of keys and ranges that nobody writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Watched {
    TheKey,
    OtherKeys,
}

/// Streams that stay open until it is dropped.
pub struct Watchers {
    /// Requests' ends: without them the servers would see the end of the streams.
    open: Vec<mpsc::Sender<WatchRequest>>,
    events: Arc<Events>,
}

/// Events that have arrived.
struct Events {
    watchers: u64,
    arrived: AtomicU64,
    /// Told once a put, when its last event has arrived.
    all: Notify,
}

impl Watchers {
    /// Opens `count` watchers, ten a stream, and returns when all exist.
    pub async fn open(servers: &Servers, connections: usize, count: u64, watched: Watched) -> anyhow::Result<Self> {
        let channels = connect(&servers.endpoints(), connections)?;
        let events = Arc::new(Events { watchers: count, arrived: AtomicU64::new(0), all: Notify::new() });
        let mut open = Vec::new();
        let firsts = (0..count).step_by(WATCHERS_PER_STREAM as usize);
        for (first, channel) in firsts.zip(channels.iter().cycle()) {
            let numbers = first..count.min(first + WATCHERS_PER_STREAM);
            open.push(open_stream(channel.clone(), numbers, watched, events.clone()).await?);
        }
        Ok(Self { open, events })
    }
}

fn create(number: u64, watched: Watched) -> WatchRequest {
    let (key, range_end) = match watched {
        Watched::TheKey => ("watched".into(), Bytes::new()),
        // Every second one is an interval, and intervals overlap.
        Watched::OtherKeys if number.is_multiple_of(2) => (format!("other/{number:012}").into(), Bytes::new()),
        Watched::OtherKeys => (format!("other/{number:012}").into(), format!("other/{:012}", number + 100).into()),
    };
    let create = WatchCreateRequest { key, range_end, ..Default::default() };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

async fn open_stream(
    channel: Channel,
    numbers: Range<u64>,
    watched: Watched,
    events: Arc<Events>,
) -> anyhow::Result<mpsc::Sender<WatchRequest>> {
    let (requests, outgoing) = mpsc::channel(WATCHERS_PER_STREAM as usize);
    for number in numbers.clone() {
        requests.send(create(number, watched)).await?;
    }
    let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
    let mut responses = client.watch(ReceiverStream::new(outgoing)).await?.into_inner();
    for _ in numbers {
        let answer = responses.message().await?.context("the stream ended")?;
        ensure!(answer.created && !answer.canceled, "a watcher was not created: {}", answer.cancel_reason);
    }
    tokio::spawn(async move {
        while let Ok(Some(response)) = responses.message().await {
            let arrived = response.events.len() as u64;
            if events.arrived.fetch_add(arrived, Ordering::AcqRel) + arrived == events.watchers {
                events.all.notify_one();
            }
        }
    });
    Ok(requests)
}

/// Puts the watched key, and waits until every watcher has the event.
pub struct Writer {
    kv: KvClient<Channel>,
    value: Bytes,
    watchers: Watchers,
}

impl Writer {
    pub fn new(servers: &Servers, watchers: Watchers, value_bytes: usize) -> anyhow::Result<Self> {
        let value = vec![b'x'; value_bytes].into();
        Ok(Self { kv: KvClient::new(servers.channel(0)?), value, watchers })
    }
}

impl Client for Writer {
    async fn once(&mut self) -> Result<(), Status> {
        debug_assert!(!self.watchers.open.is_empty());
        let events = &self.watchers.events;
        events.arrived.store(0, Ordering::Release);
        let put = PutRequest { key: "watched".into(), value: self.value.clone(), ..Default::default() };
        self.kv.put(put).await?;
        let all = tokio::time::timeout(EVENT_PATIENCE, events.all.notified()).await;
        let arrived = events.arrived.load(Ordering::Acquire);
        all.map_err(|_| Status::data_loss(format!("{arrived} of {} events", events.watchers)))
    }
}

/// Keeps a lease of its own alive, on a stream of its own.
pub struct Keeper {
    id: i64,
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
}

impl Keeper {
    pub async fn open_all(servers: &Servers, connections: usize, count: usize) -> anyhow::Result<Vec<Self>> {
        let channels = connect(&servers.endpoints(), connections)?;
        let mut keepers = Vec::new();
        for channel in channels.iter().cycle().take(count) {
            keepers.push(Self::open(channel.clone()).await?);
        }
        Ok(keepers)
    }

    async fn open(channel: Channel) -> anyhow::Result<Self> {
        let mut client = LeaseClient::new(channel);
        let id = grant(&mut client).await?;
        let (requests, outgoing) = mpsc::channel(1);
        requests.send(LeaseKeepAliveRequest { id }).await?;
        let mut answers = client.lease_keep_alive(ReceiverStream::new(outgoing)).await?.into_inner();
        answers.message().await?.context("the stream ended")?;
        Ok(Self { id, requests, answers })
    }
}

/// A lease that outlives the measurement.
pub async fn grant(client: &mut LeaseClient<Channel>) -> Result<i64, Status> {
    Ok(client.lease_grant(LeaseGrantRequest { ttl: LEASE_SECONDS, id: 0 }).await?.into_inner().id)
}

impl Client for Keeper {
    async fn once(&mut self) -> Result<(), Status> {
        let ended = || Status::unavailable("the stream ended");
        self.requests.send(LeaseKeepAliveRequest { id: self.id }).await.map_err(|_| ended())?;
        let answer = self.answers.message().await?.ok_or_else(ended)?;
        if answer.ttl > 0 { Ok(()) } else { Err(Status::not_found("the lease is gone")) }
    }
}
