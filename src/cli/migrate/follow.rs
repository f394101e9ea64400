//! What the source changes, applied to the target in order, from the revision on that the target holds.
//!
//! Invariants: `applied` is a revision of the source that the target holds whole; a watch that is lost goes on behind it, and one whose
//! revisions the source has compacted ends with [`Compacted`], for then the target must be compared anew.

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::signal::unix::{SignalKind, signal};

use super::target::{Change, Target};
use super::{ANSWER_BYTES_MAX, Side, TICK};
use crate::env::{Instant, interval};
use crate::pb::EventType;
use crate::pb::etcd::watch_client::WatchClient;
use crate::pb::etcd::watch_request::RequestUnion;
use crate::pb::etcd::{WatchCreateRequest, WatchRequest, WatchResponse};

/// The source has forgotten what is to be followed.
#[derive(Debug, thiserror::Error)]
#[error("the source has compacted up to revision {0} what was not copied yet: begin anew")]
pub(super) struct Compacted(i64);

pub(super) struct Follower {
    pub(super) from: Side,
    pub(super) to: Target,
    /// All changes of the source up to this revision are in the target.
    pub(super) applied: i64,
    /// The newest revision of the source that is known.
    pub(super) newest: i64,
    /// Every revision is made as the source made it (`same`).
    pub(super) is_same: bool,
    shown: Instant,
}

impl Follower {
    pub(super) fn new(from: Side, to: Target) -> Self {
        Self { from, to, applied: 0, newest: 0, is_same: false, shown: Instant::now() }
    }

    /// A line every few seconds while it is behind.
    fn show(&mut self) {
        if self.applied < self.newest && self.shown.elapsed() >= 5 * TICK {
            self.shown = Instant::now();
            eprintln!("at revision {} of the source's {}", self.applied, self.newest);
        }
    }

    /// Applies what the source changes until told to stop; returns the revision that the target is at then.
    pub(super) async fn follow(&mut self, until_synced: bool, hint: &str) -> anyhow::Result<i64> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Where to stop, once that is decided.
        let mut end = if until_synced { Some(self.from.count().await?.1) } else { None };
        if end.is_none() {
            eprintln!("{hint}");
        }
        loop {
            let lost = tokio::select! {
                lost = self.watch(&mut end) => lost?,
                _ = interrupt.recv(), if end.is_none() => None,
                _ = terminate.recv(), if end.is_none() => None,
            };
            match (lost, end) {
                (None, Some(end)) => return Ok(end),
                (None, None) => {
                    end = Some(self.from.count().await?.1);
                    eprintln!("catching up to the source's revision {} ...", end.unwrap_or(0));
                }
                (Some(reason), _) => {
                    eprintln!("the watch was lost ({reason}); it goes on from revision {}", self.applied + 1);
                    crate::env::sleep(TICK).await;
                }
            }
        }
    }

    /// One watch. `None` when `end` is reached, else why it is over.
    pub(super) async fn watch(&mut self, end: &mut Option<i64>) -> anyhow::Result<Option<String>> {
        if end.is_some_and(|end| self.applied >= end) {
            return Ok(None);
        }
        let channel = match self.from.client.connect().await {
            Ok(channel) => channel,
            Err(error) => return Ok(Some(error.to_string())),
        };
        let (requests, outgoing) = tokio::sync::mpsc::channel(4);
        // Of all keys, whatever the prefix: then every revision shows itself by its events. Progress notifications would not do, as
        // etcd before 3.4.25 and 3.5.8 sends them ahead of events.
        let create = WatchCreateRequest {
            key: Bytes::from_static(b"\0"),
            range_end: Bytes::from_static(b"\0"),
            start_revision: self.applied + 1,
            ..WatchCreateRequest::default()
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.send(create).await.context("the watch's queue")?;
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        let mut client = WatchClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let mut answers = match client.watch(outgoing).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => return Ok(Some(status.message().to_owned())),
        };
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                answer = answers.next() => match answer {
                    Some(Ok(answer)) => self.take(answer, *end).await?,
                    Some(Err(status)) => return Ok(Some(status.message().to_owned())),
                    None => return Ok(Some("the source ended it".into())),
                },
                _ = tick.tick() => {
                    self.newest = self.newest.max(self.from.count().await?.1);
                    self.show();
                }
            }
            if end.is_some_and(|end| self.applied >= end) {
                return Ok(None);
            }
        }
    }

    /// Applies an answer of the watch, but nothing beyond `end`: the comparison is as of that revision.
    async fn take(&mut self, answer: WatchResponse, end: Option<i64>) -> anyhow::Result<()> {
        if answer.canceled {
            ensure!(answer.compact_revision == 0, Compacted(answer.compact_revision));
            bail!("the source refused to be watched: {}", answer.cancel_reason);
        }
        let end = end.unwrap_or(i64::MAX);
        if self.is_same {
            return self.take_same(answer.events, end).await;
        }
        let mut last = self.applied;
        let mut changes = Vec::with_capacity(answer.events.len());
        for event in answer.events {
            let kind = event.r#type();
            let Some(kv) = event.kv else { continue };
            if kv.mod_revision() > end {
                break;
            }
            last = last.max(kv.mod_revision());
            if !self.from.holds(kv.key()) {
                continue;
            }
            changes.push(if kind == EventType::Put { Change::Put(kv) } else { Change::Delete(kv) });
        }
        self.to.apply(changes.into_iter()).await?;
        self.applied = last;
        Ok(())
    }
}
