//! Who watches: each goes on where it was, at another member, whenever its stream ends or it likes to.
//!
//! Invariant: what is recorded of one stream is one [`Watched`]; the next one asks for the revision after the last that was sent
//! or told, or for a later one if it looks ahead.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::clients::{Clients, version};
use crate::env::sim::trace;
use crate::env::{Env, sleep, timeout};
use crate::pb::EventType;
use crate::pb::etcd::{
    WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, watch_create_request, watch_request,
};
use crate::testing::history::{Event, Span};
use crate::testing::watch::{Message, Watched};

/// A stream that says nothing for so long is asked how far it is.
const SILENCE: Duration = Duration::from_millis(700);

/// What all watchers have seen. Cloning shares it.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<Vec<Watched>>>>);

impl Seen {
    pub fn add_watcher(&self) -> usize {
        let mut seen = self.0.lock();
        seen.push(Vec::new());
        seen.len() - 1
    }

    /// Every stream of every watcher.
    pub fn streams(&self) -> Vec<Watched> {
        self.0.lock().iter().flatten().cloned().collect()
    }

    /// The revision that each watcher has come to.
    pub fn reached(&self) -> Vec<i64> {
        self.0.lock().iter().map(|streams| streams.iter().map(newest).max().unwrap_or(0)).collect()
    }

    /// The last stream of each watcher must have brought everything up to `revision`.
    pub fn complete_to(&self, revision: i64) {
        for last in self.0.lock().iter_mut().filter_map(|streams| streams.last_mut()) {
            last.complete_to = Some(revision);
        }
    }

    fn begin(&self, watcher: usize, watched: Watched) {
        self.0.lock()[watcher].push(watched);
    }

    fn add(&self, watcher: usize, message: Message) {
        let mut seen = self.0.lock();
        let stream = seen[watcher].last_mut().expect("a stream has begun");
        match (&message, stream.messages.last_mut()) {
            // Notices while nothing happens.
            (Message::Progress(now), Some(Message::Progress(before))) if *now >= *before => *before = *now,
            _ => stream.messages.push(message),
        }
    }
}

fn newest(watched: &Watched) -> i64 {
    let of = |message: &Message| match message {
        Message::Progress(revision) => *revision,
        Message::Events { events, .. } => events.last().map_or(0, Event::revision),
    };
    watched.messages.iter().map(of).max().unwrap_or(0).max(watched.start - 1)
}

pub struct Watcher {
    pub name: usize,
    pub env: Env,
    pub clients: Clients,
    pub members: watch::Receiver<usize>,
    pub seen: Seen,
    pub span: Span,
    pub puts: bool,
    /// Asks for a revision that is not there yet.
    pub is_ahead: bool,
}

/// Why a stream is over, and where to go on.
struct Over {
    next: i64,
}

impl Watcher {
    pub async fn run(self, stop: CancellationToken) {
        let mut next = 1;
        while !stop.is_cancelled() {
            let member = (self.env.random_u64() % *self.members.borrow() as u64) as usize;
            if self.is_ahead {
                next += (self.env.random_u64() % 12) as i64;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                over = self.stream(member, next) => next = over.next,
            }
            sleep(self.env.jitter(Duration::from_millis(100))).await;
        }
    }

    /// Watches through one member until the stream ends, falls silent, or a whim.
    async fn stream(&self, member: usize, start: i64) -> Over {
        let whim = self.env.jitter(Duration::from_secs(4));
        let mut next = start;
        let _ = timeout(whim, self.follow(member, start, &mut next)).await;
        Over { next }
    }

    async fn follow(&self, member: usize, start: i64, next: &mut i64) {
        let (requests, outgoing) = mpsc::channel(4);
        let create = WatchCreateRequest {
            key: self.span.key.clone().into(),
            range_end: self.span.end.clone().unwrap_or_default().into(),
            start_revision: start,
            filters: if self.puts { Vec::new() } else { vec![watch_create_request::FilterType::Noput.into()] },
            ..WatchCreateRequest::default()
        };
        let _ = requests.send(request(watch_request::RequestUnion::CreateRequest(create))).await;
        let Ok(mut answers) = self.clients.watch(member, ReceiverStream::new(outgoing)).await else { return };
        let watched = Watched {
            span: self.span.clone(),
            start,
            puts: self.puts,
            deletes: true,
            messages: Vec::new(),
            complete_to: None,
        };
        self.seen.begin(self.name, watched);
        let mut silent = 0;
        while silent < 4 {
            match timeout(SILENCE, take(&mut answers)).await {
                Ok(Some(response)) => {
                    silent = 0;
                    if !self.note(member, &response, next) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(_) => {
                    silent += 1;
                    let ask = watch_request::RequestUnion::ProgressRequest(WatchProgressRequest {});
                    let _ = requests.try_send(request(ask));
                }
            }
        }
    }

    /// Writes a response down; false if it ends the watch.
    fn note(&self, member: usize, response: &WatchResponse, next: &mut i64) -> bool {
        let revision = response.header.as_ref().map_or(0, |header| header.revision);
        trace::event(format_args!("watcher {} member {member} {revision} {}", self.name, response.events.len()));
        if response.canceled {
            // What is compacted is lost to every watcher; the rest is not.
            *next = (*next).max(response.compact_revision + 1);
            return false;
        }
        if response.created {
            return true;
        }
        if response.events.is_empty() {
            self.seen.add(self.name, Message::Progress(revision));
            *next = (*next).max(revision + 1);
            return true;
        }
        let events: Vec<Event> = response.events.iter().map(event).collect();
        *next = (*next).max(events.iter().map(Event::revision).max().unwrap_or(0) + 1);
        self.seen.add(self.name, Message::Events { events, fragment: response.fragment });
        true
    }
}

fn request(of: watch_request::RequestUnion) -> WatchRequest {
    WatchRequest { request_union: Some(of) }
}

async fn take(answers: &mut Streaming<WatchResponse>) -> Option<WatchResponse> {
    answers.message().await.ok().flatten()
}

fn event(event: &crate::pb::Event) -> Event {
    let kv = event.kv.as_ref().map(version).expect("an event has a version");
    match event.r#type() {
        EventType::Put => Event::Put(kv),
        EventType::Delete => Event::Delete { key: kv.key, mod_revision: kv.mod_revision },
    }
}
