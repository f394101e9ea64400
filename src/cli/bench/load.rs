//! A load: many clients over a few connections, as fast as they can or at a rate, and how long each request took.
//!
//! Invariant: at a rate a request's time counts from when it was due, so that a server that stands still is not measured by the one
//! request that waited for it. Absent: what is asked.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use hdrhistogram::Histogram;
use tonic::Status;

use crate::cli::client::ClientArgs;
use crate::cli::credentials::Channel;
use crate::cli::progress::Progress;
use crate::env::{Instant, sleep, sleep_until, timeout};

/// Longest time that is told apart, in microseconds.
const LONGEST_MICROS: u64 = 600_000_000;
/// Until a client asks again that was refused.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// Kinds of errors that are told apart.
const ERRORS_MAX: usize = 5;

/// How much, how fast.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub clients: usize,
    pub connections: usize,
    /// Requests a second; `None`: as many as can be.
    pub rate: Option<f64>,
    pub end: End,
}

#[derive(Clone, Copy, Debug)]
pub enum End {
    Requests(u64),
    After(Duration),
}

/// What came of it.
pub struct Outcome {
    pub took: Duration,
    /// Of requests that were answered well, in microseconds.
    pub latencies: Histogram<u64>,
    pub errors: u64,
    /// The first kinds, with how often each came.
    pub kinds: BTreeMap<String, u64>,
}

impl Outcome {
    pub fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64().max(f64::EPSILON)
    }
}

/// Connections, in turn to each endpoint that can be reached.
pub async fn connect(client: &ClientArgs, connections: usize) -> anyhow::Result<Vec<Channel>> {
    let endpoints: Vec<String> = client.endpoints().map(str::to_owned).collect();
    let (mut channels, mut args) = (Vec::new(), client.clone());
    for connection in 0..connections {
        // It goes on to the next by itself where one cannot be reached.
        args.endpoints.clone_from(&endpoints);
        args.endpoints.rotate_left(connection % endpoints.len().max(1));
        channels.push(args.connect().await?);
    }
    Ok(channels)
}

/// Asks until the end of the shape, or until `stop`. `ask` gets a connection and the number of the request.
pub async fn run(
    shape: Shape,
    channels: &[Channel],
    patience: Duration,
    progress: Progress,
    ask: impl AsyncFn(Channel, u64) -> Result<(), Status>,
    stop: impl Future<Output = ()>,
) -> Outcome {
    let begun = Instant::now();
    let next = Cell::new(0_u64);
    let done = Cell::new(0_u64);
    let progress = RefCell::new(progress);
    let latencies = RefCell::new(Histogram::new_with_bounds(1, LONGEST_MICROS, 3).expect("the bounds are in order"));
    let kinds = RefCell::new(BTreeMap::new());
    let errors = Cell::new(0_u64);
    let client = async |channel: &Channel| {
        loop {
            let number = next.get();
            let due = shape.rate.map(|rate| begun + Duration::from_secs_f64(number as f64 / rate));
            let over = match shape.end {
                End::Requests(total) => number >= total,
                // What is late then is not sent any more.
                End::After(duration) => due.unwrap_or(begun).max(Instant::now()) >= begun + duration,
            };
            if over {
                return;
            }
            next.set(number + 1);
            if let Some(due) = due {
                sleep_until(due).await;
            }
            let asked = due.unwrap_or_else(Instant::now);
            match timeout(patience, ask(channel.clone(), number)).await {
                Ok(Ok(())) => {
                    let micros = (asked.elapsed().as_micros() as u64).clamp(1, LONGEST_MICROS);
                    latencies.borrow_mut().saturating_record(micros);
                }
                failed => {
                    let text = match failed {
                        Ok(Err(status)) => format!("{:?}: {}", status.code(), crate::identity::shown(status.message())),
                        _ => format!("no answer within {}", humantime::format_duration(patience)),
                    };
                    errors.set(errors.get() + 1);
                    {
                        let mut kinds = kinds.borrow_mut();
                        if kinds.len() < ERRORS_MAX || kinds.contains_key(&text) {
                            *kinds.entry(text).or_insert(0) += 1;
                        }
                    }
                    // Who is refused at once must not ask as fast as it can.
                    sleep(AFTER_ERROR).await;
                }
            }
            done.set(done.get() + 1);
            progress.borrow_mut().at(match shape.end {
                End::Requests(_) => done.get(),
                End::After(_) => begun.elapsed().as_secs(),
            });
        }
    };
    let clients = (0..shape.clients).map(|number| client(&channels[number % channels.len()]));
    {
        let all = join_all(clients);
        tokio::select! {
            _ = all => {}
            () = stop => {}
        }
    }
    Outcome {
        took: begun.elapsed(),
        latencies: latencies.into_inner(),
        errors: errors.get(),
        kinds: kinds.into_inner(),
    }
}
