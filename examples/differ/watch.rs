//! Watch streams that stay open over many requests, at a server of each side.
//!
//! After each request on a stream everything that it has to tell is read: a progress notice for the whole stream is asked for, which
//! comes when all its watchers have been told what there is. What was told is compared by watcher: creation, events, end. How events
//! are divided into responses is not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::ask::{Methods, Server, message, to_json};

/// Requests on their way to a server.
const QUEUE: usize = 16;
/// A notice that does not come (some watcher is behind) is asked for again.
const AGAIN: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);
/// The watch id of a notice for a whole stream.
const WHOLE_STREAM: i64 = -1;

/// What the first watcher of each stream watches, in base64. It is never cancelled.
const NEVER_WRITTEN: &str = "bmV2ZXI=";

/// A stream at one server.
pub struct Session {
    requests: mpsc::Sender<DynamicMessage>,
    answers: Streaming<DynamicMessage>,
    /// What watchers were told and nobody has taken yet.
    told: BTreeMap<String, Value>,
    /// Watchers that were created and have not ended.
    open: BTreeSet<i64>,
    /// Those that a compaction has ended, and the server was not told yet.
    ended: Vec<i64>,
}

impl Session {
    pub async fn open(server: &Server, methods: &Methods) -> anyhow::Result<Self> {
        let (requests, queue) = mpsc::channel(QUEUE);
        // etcd answers nothing, no head either, before there is a watcher; and gives no notice for a stream without one.
        let idle = json!({ "create_request": { "key": NEVER_WRITTEN } });
        requests.send(message(methods.find("Watch/Watch").input(), &idle)).await.context("the queue is new")?;
        let answers = server.stream(&methods.find("Watch/Watch"), ReceiverStream::new(queue)).await?;
        let mut session = Self { requests, answers, told: BTreeMap::new(), open: BTreeSet::new(), ended: Vec::new() };
        if !session.wait_answer("created", PATIENCE).await? {
            bail!("no watcher was created in {PATIENCE:?}");
        }
        Ok(session)
    }

    /// Sends `request`, if there is one, and takes what all watchers have been told since the last time, up to revision `now`.
    pub async fn turn(&mut self, methods: &Methods, request: &Value, now: i64) -> anyhow::Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        self.cancel_ended(methods).await?;
        if !request.is_null() {
            self.send(methods, request).await?;
        }
        // The notice is asked for after these are answered, or it could come before.
        if request.get("create_request").is_some() && !self.wait_answer("created", PATIENCE).await? {
            bail!("no watcher was created in {PATIENCE:?}");
        }
        if let Some(cancel) = request.get("cancel_request")
            && self.open.contains(&cancel["watch_id"].as_i64().unwrap_or(0))
            && !self.wait_answer("canceled", PATIENCE).await?
        {
            bail!("no watcher was cancelled in {PATIENCE:?}");
        }
        loop {
            self.cancel_ended(methods).await?;
            self.send(methods, &json!({ "progress_request": {} })).await?;
            loop {
                match tokio::time::timeout(AGAIN, self.answers.message()).await {
                    Err(_) => break,
                    Ok(answer) => {
                        let answer = to_json(&answer?.context("the stream has ended")?);
                        if number(&answer, "watch_id") == WHOLE_STREAM && answer.get("created").is_none() {
                            if number(&answer["header"], "revision") >= now {
                                return Ok(self.take());
                            }
                        } else {
                            self.note(answer);
                        }
                    }
                }
            }
            if Instant::now() > deadline {
                bail!("no progress notice for revision {now} in {PATIENCE:?}; told until then: {:?}", self.told);
            }
        }
    }

    /// etcd keeps a watcher that a compaction has ended, and its id, and gives no notice until it is cancelled.
    async fn cancel_ended(&mut self, methods: &Methods) -> anyhow::Result<()> {
        for id in std::mem::take(&mut self.ended) {
            self.send(methods, &json!({ "cancel_request": { "watch_id": id } })).await?;
        }
        Ok(())
    }

    async fn send(&self, methods: &Methods, request: &Value) -> anyhow::Result<()> {
        let request = message(methods.find("Watch/Watch").input(), request);
        self.requests.send(request).await.context("the stream has ended")
    }

    /// Waits until a watcher is `created` or `canceled`; whether that came.
    async fn wait_answer(&mut self, what: &str, patience: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(answer) = tokio::time::timeout(left, self.answers.message()).await else { return Ok(false) };
            let answer = to_json(&answer?.context("the stream has ended")?);
            let found = answer.get(what).is_some();
            self.note(answer);
            if found {
                return Ok(true);
            }
        }
    }

    fn note(&mut self, answer: Value) {
        let id = number(&answer, "watch_id");
        match (answer.get("created").is_some(), answer.get("canceled").is_some()) {
            (true, false) => _ = self.open.insert(id),
            // etcd ends a watcher a second time when it is asked to.
            (false, true) if !self.open.remove(&id) => return,
            _ => {}
        }
        if answer.get("compact_revision").is_some() {
            self.ended.push(id);
        }
        merge(self.told.entry(id.to_string()).or_insert_with(|| json!({})), answer);
    }

    fn take(&mut self) -> Value {
        json!({ "watchers": std::mem::take(&mut self.told) })
    }
}

/// Puts what a response says of a watcher to what was `told` of it before.
pub fn merge(told: &mut Value, answer: Value) {
    let (Value::Object(told), Value::Object(fields)) = (told, answer) else { return };
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("events", Value::Array(events)) => {
                let all = told.entry("events").or_insert_with(|| json!([]));
                all.as_array_mut().expect("made here").extend(events);
            }
            // Which response brings them is free.
            ("header" | "fragment" | "watch_id", _) => {}
            (_, value) => _ = told.insert(name, value),
        }
    }
}

/// A 64-bit number, which JSON has as a string.
pub fn number(answer: &Value, field: &str) -> i64 {
    answer.get(field).and_then(Value::as_str).and_then(|text| text.parse().ok()).unwrap_or(0)
}
