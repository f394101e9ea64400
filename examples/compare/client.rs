//! The client: connections, clients that send one request after the other, and what was seen of their latencies.
//!
//! Two ways to load: a *closed loop* sends as fast as it is answered, for cost and throughput; a *pace* sends at a fixed rate, for pauses,
//! and counts a latency from the moment at which the request was due, so that a pause counts for all that it held up.
//! Invariant: a request that fails makes the measurement void. Absent: what the requests are (`works`, `streams`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;

use crate::servers::{Servers, channel, cpu_micros};

/// Warm-up before each closed loop is measured, at most.
const WARM_UP_SECONDS: f64 = 1.0;
const LATENCY_MAX_MICROS: u64 = 600_000_000;

/// One of many that load the servers.
pub trait Client: Send + 'static {
    /// Sends one request and waits for its answer.
    fn once(&mut self) -> impl Future<Output = Result<(), Status>> + Send;
}

/// What a load showed.
pub struct Seen {
    pub micros: Histogram<u64>,
    pub seconds: f64,
    pub server_cpu_micros: f64,
    pub client_cpu_micros: f64,
}

pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_MICROS, 3).expect("the bounds are valid")
}

/// `count` connections, to all endpoints in turn: one connection is to one endpoint, so that the spread is exact.
pub fn connect(endpoints: &[String], count: usize) -> anyhow::Result<Vec<Channel>> {
    endpoints.iter().cycle().take(count).map(|endpoint| channel(endpoint)).collect()
}

/// Runs all clients for `seconds` after a warm-up.
pub async fn closed_loop<C: Client>(clients: Vec<C>, seconds: f64, servers: &Servers) -> anyhow::Result<Seen> {
    let start = Instant::now() + Duration::from_secs_f64(WARM_UP_SECONDS.min(seconds));
    let end = start + Duration::from_secs_f64(seconds);
    let count = clients.len();
    let tasks: Vec<_> = clients.into_iter().map(|client| tokio::spawn(drive(client, start, end))).collect();
    let own = || cpu_micros(std::process::id());
    tokio::time::sleep_until(start.into()).await;
    let before = (servers.cpu_micros(), own());
    tokio::time::sleep_until(end.into()).await;
    let (server_cpu_micros, client_cpu_micros) = (servers.cpu_micros() - before.0, own() - before.1);
    let (mut micros, mut failed) = (histogram(), Vec::new());
    for task in tasks {
        match task.await? {
            Ok(seen) => micros.add(seen)?,
            Err(status) => failed.push(status),
        }
    }
    if let Some(first) = failed.first() {
        bail!("{}: {} of {count} clients met an error; the first: {first}", servers.program.name, failed.len());
    }
    Ok(Seen { micros, seconds, server_cpu_micros, client_cpu_micros })
}

/// What was sent from `start` to `end`, and one request at least, however late; earlier is warm-up.
async fn drive<C: Client>(mut client: C, start: Instant, end: Instant) -> Result<Histogram<u64>, Status> {
    let mut micros = histogram();
    loop {
        let sent = Instant::now();
        if sent >= end && !micros.is_empty() {
            return Ok(micros);
        }
        client.once().await?;
        if sent >= start {
            micros.saturating_record(sent.elapsed().as_micros() as u64);
        }
    }
}

/// Clients that send at a fixed rate until it is stopped.
pub struct Pace {
    micros: Arc<Mutex<Histogram<u64>>>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<(), Status>>>,
}

impl Pace {
    /// Starts; all clients together send `per_second` requests.
    pub fn start<C: Client>(clients: Vec<C>, per_second: f64) -> Self {
        let (micros, stop) = (Arc::new(Mutex::new(histogram())), Arc::new(AtomicBool::new(false)));
        let interval = Duration::from_secs_f64(clients.len() as f64 / per_second);
        let begin = Instant::now();
        let count = clients.len() as u32;
        let tasks = (0..).zip(clients).map(|(n, client)| {
            let first = begin + interval * n / count;
            tokio::spawn(pace(client, first, interval, micros.clone(), stop.clone()))
        });
        Self { tasks: tasks.collect(), micros, stop }
    }

    /// What was seen while `event` ran.
    pub async fn during<T>(
        &self,
        event: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<(T, Histogram<u64>)> {
        self.micros.lock().reset();
        let done = event.await?;
        // A request that is held up is counted when it is answered.
        let seen = std::mem::replace(&mut *self.micros.lock(), histogram());
        if self.tasks.iter().any(JoinHandle::is_finished) {
            bail!("a client met an error under load");
        }
        Ok((done, seen))
    }

    /// Stops; fails if a request has failed.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await?.context("a client met an error under load")?;
        }
        Ok(())
    }
}

async fn pace<C: Client>(
    mut client: C,
    first: Instant,
    interval: Duration,
    micros: Arc<Mutex<Histogram<u64>>>,
    stop: Arc<AtomicBool>,
) -> Result<(), Status> {
    let mut due = first;
    while !stop.load(Ordering::Relaxed) {
        let mut sent = Instant::now();
        if sent < due {
            tokio::time::sleep_until(due.into()).await;
            // The client's own timer being late says nothing of the server.
            sent = Instant::now();
        } else {
            sent = due;
        }
        client.once().await?;
        micros.lock().saturating_record(sent.elapsed().as_micros() as u64);
        due += interval;
    }
    Ok(())
}
