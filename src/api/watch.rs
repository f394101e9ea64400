//! `etcdserverpb.Watch`: one stream of requests, one of responses, many watchers.
//!
//! Owns what is told when: numbers, `created` before events, fragments, progress, the end without a leader. A response is made only
//! when the client takes it, so a client that does not read costs its session's queue and what the transport holds.
//! Absent: which event goes to whom, and catching up (`watch`).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, audited, header, unsound};
use crate::caller::Caller;
use crate::env::{Instant, sleep_until};
use crate::error::Error;
use crate::metrics::metrics;
use crate::node::Node;
use crate::pb::etcd::watch_create_request::FilterType;
use crate::pb::etcd::watch_request::RequestUnion;
use crate::pb::etcd::watch_server::Watch;
use crate::pb::etcd::{WatchCreateRequest, WatchRequest, WatchResponse};
use crate::watch::{Batch, Hub, Output, Refused, Session, Shape};

/// The number that stands for no watcher, or for all of the stream. A client may still choose it, as with etcd.
const NO_WATCHER: i64 = -1;
/// Who asks for this number gets a free one.
const ANY_NUMBER: i64 = 0;

/// Settings of the service; see `config/quorate.toml`.
#[derive(Clone, Copy, Debug)]
pub struct WatchOptions {
    pub progress_interval: Duration,
}

/// Responses, until the client or the member goes.
pub type Responses = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Watch for Api {
    type WatchStream = Responses;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Responses>, Status> {
        let node = self.data_node(&request)?;
        let needs_leader = super::needs_leader(&request);
        // As etcd: a token that is none refuses the watchers, not the stream, and clients ask for another then.
        let caller = self.caller(&node, &request).await.unwrap_or_else(|_| Caller::stranger());
        let entry = audited::entry(&request).cloned();
        let requests = request.into_inner().inspect(move |asked| {
            if let (Some(entry), Ok(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) })) =
                (&entry, asked)
            {
                entry.note_range(&create.key, &create.range_end);
            }
        });
        Ok(Response::new(self.watch_stream(node, caller, requests, needs_leader)?))
    }
}

impl Api {
    /// Serves the watchers that `requests` ask for; with `needs_leader` the stream ends when the leader is lost.
    pub fn watch_stream(
        &self,
        node: Node,
        caller: Caller,
        requests: impl Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
        needs_leader: bool,
    ) -> Result<Responses, Error> {
        let hub = self.hub()?;
        let until = caller.until();
        let client = Client {
            session: hub.session(node.client(), caller),
            hub,
            over: {
                let node = node.clone();
                Box::pin(async move {
                    let ends = async {
                        match until {
                            Some(until) => sleep_until(until).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        error = unsound(&node) => error,
                        () = ends => Error::InvalidAuthToken,
                    }
                })
            },
            node,
            needs_leader,
            requests: requests.fuse(),
            asked: HashMap::new(),
            next_number: 0,
            replies: VecDeque::new(),
            revision: 0,
            progress_wanted: None,
            progress_due: BTreeSet::new(),
            progress_asked: 0,
            progress_interval: self.shared.watch_options.progress_interval,
            tick_at: None,
            fragment_bytes: self.shared.limits.request_bytes_max,
            streak: 0,
        };
        Ok(Box::pin(stream::unfold(Some(client), |client| async move {
            let mut client = client?;
            match client.next().await {
                Some(Ok(response)) => Some((Ok(response), Some(client))),
                Some(Err(status)) => Some((Err(status), None)),
                None => None,
            }
        })))
    }
}

/// What a client asked for beside the events.
struct Asked {
    progress: bool,
    fragment: bool,
    /// No event since the last tick.
    quiet: bool,
}

struct Client<R> {
    session: Session,
    hub: Hub,
    node: Node,
    needs_leader: bool,
    /// Why nobody is served on it any more. One for the stream's whole life, since it is woken up very often.
    over: Pin<Box<dyn Future<Output = Error> + Send>>,
    requests: stream::Fuse<R>,
    asked: HashMap<i64, Asked>,
    next_number: i64,
    replies: VecDeque<WatchResponse>,
    /// The greatest revision told: no header goes below it.
    revision: i64,
    /// A progress request waits until this revision was given out.
    progress_wanted: Option<i64>,
    /// Watchers that are to be told how far they are. Each is looked at once: who has not begun, or lacks something, is told at the
    /// next tick.
    progress_due: BTreeSet<i64>,
    /// Watchers that want to be told of progress.
    progress_asked: usize,
    progress_interval: Duration,
    tick_at: Option<Instant>,
    fragment_bytes: usize,
    /// Outputs taken in a row without a look at anything else.
    streak: usize,
}

/// Outputs that a stream takes in a row before it looks for requests and the rest.
const STREAK_MAX: usize = 64;
/// Watchers that are looked at for their progress in a row.
const LOOKS_MAX: usize = 64;
/// Events that are put into a response at once; more, of a large deletion, would hold up others on the thread.
const EVENTS_AT_ONCE: usize = 4096;

/// Why the stream goes on.
enum Wake {
    Request(Option<Result<WatchRequest, Status>>),
    Output(Result<Output, crate::watch::Ended>),
    Tick,
    Delivered,
    LeaderLost,
    Over(Error),
}

impl<R: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin> Client<R> {
    async fn next(&mut self) -> Option<Result<WatchResponse, Status>> {
        loop {
            let delivered = self.session.delivered();
            if self.replies.is_empty() {
                let has_looked = self.tell_progress();
                if has_looked && self.replies.is_empty() && !self.progress_due.is_empty() {
                    // There are more to look at.
                    tokio::task::yield_now().await;
                    continue;
                }
            }
            if let Some(response) = self.replies.pop_front() {
                return Some(Ok(response));
            }
            if self.streak < STREAK_MAX
                && let Some(output) = self.session.try_next()
            {
                self.streak += 1;
                self.put(output).await;
                continue;
            }
            self.streak = 0;
            match self.wait(delivered).await {
                Wake::Request(Some(Ok(request))) => {
                    let began = Instant::now();
                    self.take(request);
                    metrics().watch.control.observe(began.elapsed().as_secs_f64());
                }
                Wake::Request(Some(Err(status))) => return Some(Err(status)),
                // The client has no more to ask; it goes on reading.
                Wake::Request(None) => {}
                Wake::Output(Ok(output)) => self.put(output).await,
                Wake::Output(Err(_)) => return Some(Err(Error::Stopped.into())),
                Wake::Tick => self.tick(),
                Wake::Delivered => {}
                Wake::LeaderLost => return Some(Err(Error::NoLeader.into())),
                Wake::Over(error) => return Some(Err(error.into())),
            }
        }
    }

    async fn wait(&mut self, delivered: i64) -> Wake {
        let due = self.progress_wanted.is_some() || !self.progress_due.is_empty();
        let more = due.then(|| self.session.delivered_after(delivered));
        let more = async {
            match more {
                Some(more) => more.await,
                None => std::future::pending().await,
            }
        };
        let tick_at = self.tick_at;
        tokio::select! {
            output = self.session.next() => Wake::Output(output),
            request = self.requests.next(), if !self.requests.is_done() => Wake::Request(request),
            () = more => Wake::Delivered,
            () = sleep_until(tick_at.unwrap_or_else(Instant::now)), if tick_at.is_some() => Wake::Tick,
            () = self.hub.leader_lost(&self.node), if self.needs_leader => Wake::LeaderLost,
            over = &mut self.over => Wake::Over(over),
        }
    }

    fn take(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create),
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(cancel.watch_id),
            // Without watchers there is nothing to tell of, as in etcd.
            Some(RequestUnion::ProgressRequest(_)) => {
                let watched = self.session.watchers() > 0;
                self.progress_wanted = watched.then(|| self.session.revision()).or(self.progress_wanted);
            }
            None => {}
        }
    }

    /// Of a number that is not in use nothing is told, as in etcd.
    fn cancel(&mut self, number: i64) {
        if self.session.cancel(number) {
            self.forget(number);
            let canceled = WatchResponse { canceled: true, ..self.response_now(number) };
            self.replies.push_back(canceled);
        }
    }

    fn create(&mut self, create: WatchCreateRequest) {
        let start = create.start_revision;
        let shape = shape(&create);
        // In etcd's order.
        let given = if start < 0 {
            Err(Error::Compacted.to_string())
        } else if let Err(denied) = self.session.permit(&shape) {
            Err(denial(&denied))
        } else {
            let is_chosen = create.watch_id != ANY_NUMBER;
            let number = if is_chosen { create.watch_id } else { self.free_number() };
            match self.session.watch(number, &shape, start) {
                Ok(created) => {
                    // A number that was given is never given again, whatever becomes of its watcher: a cancellation that comes late
                    // would meet another. A refused one is.
                    self.next_number += i64::from(!is_chosen);
                    self.revision = self.revision.max(created.revision);
                    Ok(number)
                }
                Err(Refused::Denied(error)) => Err(denial(&error)),
                Err(error) => Err(error.to_string()),
            }
        };
        if let Ok(number) = given {
            let asked = Asked { progress: create.progress_notify, fragment: create.fragment, quiet: true };
            self.asked.insert(number, asked);
            self.progress_asked += usize::from(create.progress_notify);
            if create.progress_notify && self.tick_at.is_none() {
                self.tick_at = Some(Instant::now() + self.progress_interval);
            }
        }
        let (number, canceled, cancel_reason) = match given {
            Ok(number) => (number, false, String::new()),
            Err(why) => (NO_WATCHER, true, why),
        };
        let now = self.response_now(number);
        self.replies.push_back(WatchResponse { created: true, canceled, cancel_reason, ..now });
    }

    /// The next number that no watcher has.
    fn free_number(&mut self) -> i64 {
        while self.session.contains(self.next_number) {
            self.next_number += 1;
        }
        self.next_number
    }

    fn forget(&mut self, number: i64) {
        let asked = self.asked.remove(&number);
        self.progress_due.remove(&number);
        self.progress_asked -= usize::from(asked.is_some_and(|asked| asked.progress));
        if self.progress_asked == 0 {
            self.tick_at = None;
        }
    }

    async fn put(&mut self, output: Output) {
        match output {
            Output::Events { watcher, batch } => {
                let began = Instant::now();
                let room = self.fragment_bytes.saturating_sub(batch.bytes());
                let rest = self.session.rest_of(watcher, room);
                let events = batch.events.len() + rest.iter().map(|batch| batch.events.len()).sum::<usize>();
                if events > EVENTS_AT_ONCE {
                    let env = self.node.env().clone();
                    let asker = self.node.client().asker();
                    env.in_place_for(asker, || self.put_events(watcher, &batch, &rest)).await;
                } else {
                    self.put_events(watcher, &batch, &rest);
                }
                metrics().watch.told(events, began.elapsed());
            }
            Output::Compacted { watcher, compacted } => {
                self.forget(watcher);
                let canceled = WatchResponse {
                    canceled: true,
                    compact_revision: compacted,
                    cancel_reason: Error::Compacted.to_string(),
                    ..self.response_now(watcher)
                };
                self.replies.push_back(canceled);
            }
            Output::Denied { watcher, error } => {
                self.forget(watcher);
                let cancel_reason = denial(&error);
                let canceled = WatchResponse { canceled: true, cancel_reason, ..self.response_now(watcher) };
                self.replies.push_back(canceled);
            }
            Output::CaughtUp => {}
        }
    }

    /// A revision, and what follows it for a watcher that catches up, are one response.
    fn put_events(&mut self, watcher: i64, batch: &Batch, rest: &[Arc<Batch>]) {
        self.revision = self.revision.max(rest.last().map_or(batch.revision, |last| last.revision));
        let Some(asked) = self.asked.get_mut(&watcher) else { return };
        asked.quiet = false;
        let mut events = batch.events.clone();
        events.extend(rest.iter().flat_map(|batch| &batch.events).cloned());
        let whole = WatchResponse {
            header: header(&self.node, self.revision),
            watch_id: watcher,
            events,
            ..Default::default()
        };
        if asked.fragment && whole.encoded_len() > self.fragment_bytes {
            self.replies.extend(fragments(whole, self.fragment_bytes));
        } else {
            self.replies.push_back(whole);
        }
    }

    fn response_now(&mut self, number: i64) -> WatchResponse {
        self.revision = self.revision.max(self.session.revision());
        WatchResponse { header: header(&self.node, self.revision), watch_id: number, ..Default::default() }
    }

    fn tick(&mut self) {
        self.tick_at = Some(Instant::now() + self.progress_interval);
        for (number, asked) in &mut self.asked {
            let quiet = std::mem::replace(&mut asked.quiet, true);
            if asked.progress && quiet {
                self.progress_due.insert(*number);
            }
        }
    }

    /// Tells what was asked for and is certain. A revision below one that was told has to wait: the hub is a moment behind what
    /// catching up has read. True if watchers that are due were looked at.
    fn tell_progress(&mut self) -> bool {
        if self.progress_wanted.is_none() && self.progress_due.is_empty() {
            return false;
        }
        let began = Instant::now();
        self.tell_progress_of_all();
        let has_looked = self.tell_progress_of_due();
        if !self.replies.is_empty() {
            metrics().watch.progress.observe(began.elapsed().as_secs_f64());
        }
        has_looked
    }

    fn notice(&self, number: i64, revision: i64) -> WatchResponse {
        WatchResponse { header: header(&self.node, revision), watch_id: number, ..Default::default() }
    }

    fn tell_progress_of_all(&mut self) {
        if let Some(wanted) = self.progress_wanted
            && let Some(revision) = self.session.progress().filter(|r| *r >= self.revision.max(wanted))
        {
            self.progress_wanted = None;
            self.replies.push_back(self.notice(NO_WATCHER, revision));
            self.revision = revision;
        }
    }

    fn tell_progress_of_due(&mut self) -> bool {
        let certain = self.session.delivered();
        if certain < self.revision || self.session.has_read() {
            return false;
        }
        for _ in 0..LOOKS_MAX {
            let Some(number) = self.progress_due.pop_first() else { break };
            if self.session.progress_of(number).is_some_and(|revision| revision >= certain) {
                self.replies.push_back(self.notice(number, certain));
                self.revision = certain;
            }
        }
        true
    }
}

/// A refusal in the words that clients look for: those of Go's gRPC.
fn denial(error: &Error) -> String {
    format!("rpc error: code = {:?} desc = {error}", error.code())
}

/// What a request asks to see. An empty key stands for the least one.
fn shape(create: &WatchCreateRequest) -> Shape {
    let leaves_out = |filter: FilterType| create.filters.contains(&filter.into());
    let key = if create.key.is_empty() { Bytes::from_static(b"\0") } else { Bytes::copy_from_slice(&create.key) };
    Shape {
        puts: !leaves_out(FilterType::Noput),
        deletes: !leaves_out(FilterType::Nodelete),
        prev_kv: create.prev_kv,
        // Copies: what was decoded shares the buffer of its message, and a watcher stays for long.
        ..Shape::new(key, Bytes::copy_from_slice(&create.range_end))
    }
}

/// Parts of at most `bytes_max`, or one event; all but the last say that more follows.
fn fragments(whole: WatchResponse, bytes_max: usize) -> Vec<WatchResponse> {
    let (header, watch_id) = (whole.header, whole.watch_id);
    let part = || WatchResponse { header, watch_id, fragment: true, ..Default::default() };
    let (mut parts, mut bytes) = (vec![part()], 0);
    for event in whole.events {
        let size = crate::pb::delimited_len(event.encoded_len());
        if bytes + size > bytes_max && bytes > 0 {
            parts.push(part());
            bytes = 0;
        }
        bytes += size;
        if let Some(last) = parts.last_mut() {
            last.events.push(event);
        }
    }
    if let Some(last) = parts.last_mut() {
        last.fragment = false;
    }
    parts
}
