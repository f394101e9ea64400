//! `watch`: prints events as they come, and runs a command for each if one is given.
//!
//! Invariants: each event is printed once, in order, all of a revision in one write; when a connection is lost the next endpoint is
//! asked from the revision after the last one that was printed. Ends with code 0 on Ctrl-C, on SIGTERM, and when nobody reads the
//! output any more.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::ffi::OsStringExt as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::{Code, Request, Status, Streaming};

use super::client::{ANSWER_BYTES_MAX, ClientArgs, failure, unreachable};
use super::kv::KeyRange;
use super::output::{Format, Lines, header_json, json_line, key_value_json};
use crate::env::{Instant, sleep, timeout};
use crate::pb::etcd::watch_client::WatchClient;
use crate::pb::etcd::watch_request::RequestUnion;
use crate::pb::etcd::{WatchCreateRequest, WatchRequest, WatchResponse};
use crate::pb::{Event, EventType};

/// Between attempts to connect again; doubled each time, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

#[derive(Debug, clap::Args)]
pub struct WatchArgs {
    #[command(flatten)]
    range: KeyRange,
    /// From this revision on, past or future; 0: from now on
    #[arg(long, default_value_t = 0)]
    rev: i64,
    /// Print with each event what was there before
    #[arg(long)]
    prev_kv: bool,
    /// Print from time to time how far the watch is, while nothing happens
    #[arg(long)]
    progress_notify: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
    /// Run this after each event, one at a time. It is told QUORATE_WATCH_EVENT_TYPE, _KEY, _VALUE and _REVISION, and the event as
    /// JSON on its standard input
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What ends a watch in peace.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Why one stream is over.
enum Over {
    Stopped,
    /// The next endpoint may be asked.
    Lost(String),
}

struct Watcher {
    args: WatchArgs,
    endpoints: Vec<String>,
    /// The endpoint that is asked next.
    at: usize,
    /// The first revision that was not printed; 0: none is known yet.
    next: i64,
    created: bool,
}

pub async fn watch(args: WatchArgs) -> anyhow::Result<()> {
    let mut stop = Stop { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? };
    let endpoints: Vec<String> = args.client.endpoints().map(str::to_owned).collect();
    ensure!(!endpoints.is_empty(), unreachable(&[]));
    ensure!(args.rev >= 0, "--rev {}: expected a revision, or 0 for now", args.rev);
    let give_up_at = Instant::now() + args.client.timeout;
    let mut watcher = Watcher { endpoints, at: 0, next: args.rev, created: false, args };
    let mut pause = RETRY.0;
    loop {
        let (begun, reason) = (
            Instant::now(),
            match watcher.follow(&mut stop).await? {
                Over::Stopped => return Ok(()),
                Over::Lost(reason) => reason,
            },
        );
        if !watcher.created && (Instant::now() >= give_up_at) {
            bail!("{reason}");
        }
        if begun.elapsed() > RETRY.1 {
            pause = RETRY.0;
        }
        if watcher.created {
            let from = if watcher.next > 0 { format!("revision {}", watcher.next) } else { "now".to_owned() };
            let _ = writeln!(std::io::stderr(), "quorate: {reason}; watching on from {from}");
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.wait() => return Ok(()),
        }
        pause = (pause * 2).min(RETRY.1);
    }
}

impl Watcher {
    /// One stream, from its start to its end.
    async fn follow(&mut self, stop: &mut Stop) -> anyhow::Result<Over> {
        let opened = tokio::select! {
            opened = self.open() => opened,
            () = stop.wait() => return Ok(Over::Stopped),
        };
        let mut responses = match opened? {
            Ok(responses) => responses,
            Err(reason) => return Ok(Over::Lost(reason)),
        };
        loop {
            let response = tokio::select! {
                response = responses.message() => response,
                () = stop.wait() => return Ok(Over::Stopped),
            };
            match response {
                Ok(Some(response)) => {
                    if !self.take(&response).await? || stop.wait().now_or_never().is_some() {
                        return Ok(Over::Stopped);
                    }
                }
                Ok(None) => return Ok(Over::Lost(format!("{} ended the watch", self.endpoint()))),
                Err(status) if may_go_on(&status) => {
                    return Ok(Over::Lost(format!("{}: {}", self.endpoint(), status.message())));
                }
                Err(status) => return Err(failure(&status)),
            }
        }
    }

    /// The endpoint of the present stream.
    fn endpoint(&self) -> &str {
        &self.endpoints[(self.at + self.endpoints.len() - 1) % self.endpoints.len()]
    }

    /// Asks each endpoint, the one after the last first. The inner error may pass.
    async fn open(&mut self) -> anyhow::Result<Result<Streaming<WatchResponse>, String>> {
        let mut failures = Vec::new();
        for _ in 0..self.endpoints.len() {
            let endpoint = self.endpoints[self.at].clone();
            self.at = (self.at + 1) % self.endpoints.len();
            let channel = match self.args.client.dial(&endpoint).await {
                Ok(channel) => channel,
                Err(failure) => {
                    failures.push(format!("{endpoint}: {failure}"));
                    continue;
                }
            };
            let mut client = WatchClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
            match timeout(self.args.client.timeout, client.watch(self.request())).await {
                Ok(Ok(responses)) => return Ok(Ok(responses.into_inner())),
                Ok(Err(status)) if may_go_on(&status) => failures.push(format!("{endpoint}: {}", status.message())),
                Ok(Err(status)) => return Err(failure(&status)),
                Err(_) => failures.push(format!("{endpoint}: no answer")),
            }
        }
        let failed = unreachable(&failures);
        if self.created { Ok(Err(failed)) } else { bail!("{failed}") }
    }

    fn request(&self) -> Request<impl stream::Stream<Item = WatchRequest> + Send + 'static> {
        let (key, range_end) = self.args.range.bounds();
        let create = WatchCreateRequest {
            key,
            range_end,
            start_revision: self.next,
            prev_kv: self.args.prev_kv,
            // Also without being asked to print it: it keeps the revision to go on from fresh.
            progress_notify: true,
            ..WatchCreateRequest::default()
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // It stays open: whoever closes it wants nothing more.
        let mut request = Request::new(stream::iter([create]).chain(stream::pending()));
        request.metadata_mut().insert("hasleader", tonic::metadata::MetadataValue::from_static("true"));
        request
    }

    /// False when nobody reads what is printed.
    async fn take(&mut self, response: &WatchResponse) -> anyhow::Result<bool> {
        let told = response.header.as_ref().map_or(0, |header| header.revision);
        if response.canceled {
            if response.compact_revision != 0 {
                let action = format!("watch from --rev {} or later", response.compact_revision);
                bail!("{}; revision {} is gone: {action}", crate::error::Error::Compacted, self.next);
            }
            bail!("the server refused the watch: {}", response.cancel_reason);
        }
        if response.created {
            self.created = true;
            if self.next == 0 {
                self.next = told + 1;
            }
            return Ok(true);
        }
        if response.events.is_empty() {
            self.next = self.next.max(told + 1);
            return if self.args.progress_notify {
                print(&format_progress(self.args.output, response))
            } else {
                Ok(true)
            };
        }
        let revision = |event: &Event| event.kv.as_ref().map_or(0, |kv| kv.mod_revision());
        // A history comes as many revisions at once.
        for events in response.events.chunk_by(|one, next| revision(one) == revision(next)) {
            let (header, events) = (response.header, events.to_vec());
            let one = WatchResponse { header, watch_id: response.watch_id, events, ..Default::default() };
            if !print(&format_events(self.args.output, &one))? {
                return Ok(false);
            }
            for event in &one.events {
                if !self.args.command.is_empty() {
                    run(&self.args.command, event).await?;
                }
                self.next = self.next.max(revision(event) + 1);
            }
        }
        Ok(true)
    }
}

/// Whether another member, or the same one later, may serve the watch.
fn may_go_on(status: &Status) -> bool {
    use Code::*;
    // What breaks with the connection has any of these codes.
    matches!(status.code(), Unavailable | Internal | Unknown | Cancelled | Aborted | DeadlineExceeded)
}

/// Writes to standard output, whole or not at all as far as this process can see to it; false if nobody reads it.
fn print(bytes: &[u8]) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        done => done.map(|()| true).context("cannot write to standard output"),
    }
}

fn type_name(event: &Event) -> &'static str {
    match event.r#type() {
        EventType::Put => "PUT",
        EventType::Delete => "DELETE",
    }
}

fn event_json(event: &Event) -> Value {
    let mut object = json!({ "type": type_name(event) });
    if let Some(kv) = &event.kv {
        object["kv"] = key_value_json(kv);
    }
    if let Some(kv) = &event.prev_kv {
        object["prev_kv"] = key_value_json(kv);
    }
    object
}

fn format_events(format: Format, response: &WatchResponse) -> Vec<u8> {
    if format == Format::Json {
        return json_line(&json!({
            "header": header_json(response.header.as_ref()),
            "events": response.events.iter().map(event_json).collect::<Vec<_>>(),
        }));
    }
    let mut lines = Lines::new(false);
    for event in &response.events {
        lines.text(type_name(event));
        event.prev_kv.iter().chain(&event.kv).for_each(|kv| lines.key_value(kv));
    }
    lines.finish()
}

fn format_progress(format: Format, response: &WatchResponse) -> Vec<u8> {
    match format {
        Format::Json => format_events(format, response),
        Format::Simple => {
            format!("progress notify: {}\n", response.header.as_ref().map_or(0, |h| h.revision)).into_bytes()
        }
    }
}

/// Runs the command for one event, to its end.
async fn run(command: &[OsString], event: &Event) -> anyhow::Result<()> {
    let kv = event.kv.clone().unwrap_or_default();
    let name = command[0].to_string_lossy();
    let mut process = tokio::process::Command::new(&command[0]);
    process
        .args(&command[1..])
        .env("QUORATE_WATCH_EVENT_TYPE", type_name(event))
        .env("QUORATE_WATCH_REVISION", kv.mod_revision().to_string())
        .stdin(Stdio::piped());
    for (variable, bytes) in [("QUORATE_WATCH_KEY", kv.key()), ("QUORATE_WATCH_VALUE", kv.value())] {
        // What the environment cannot hold is on standard input only.
        if bytes.len() <= ENVIRONMENT_BYTES_MAX && !bytes.contains(&0) {
            process.env(variable, OsString::from_vec(bytes.to_vec()));
        } else {
            process.env_remove(variable);
        }
    }
    let mut child = process.spawn().with_context(|| format!("cannot run {name}; check the command after --"))?;
    if let Some(mut input) = child.stdin.take() {
        // A command that does not read it is fine.
        let _ = input.write_all(&json_line(&event_json(event))).await;
    }
    let status = child.wait().await.with_context(|| format!("cannot wait for {name}"))?;
    // Ctrl-C reaches the command too.
    let interrupted =
        std::os::unix::process::ExitStatusExt::signal(&status) == Some(SignalKind::interrupt().as_raw_value());
    ensure!(status.success() || interrupted, "{name} ended with {status}, at revision {}", kv.mod_revision());
    Ok(())
}

/// Linux takes no more in one variable.
const ENVIRONMENT_BYTES_MAX: usize = 100 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcd::ResponseHeader;
    use crate::pb::{Fields, KeyValue};

    fn response() -> WatchResponse {
        let kv = |value| KeyValue::new(Fields { key: b"a", value, version: 1, mod_revision: 7, ..Fields::default() });
        let put = Event { r#type: EventType::Put.into(), kv: Some(kv(b"2\xff")), prev_kv: Some(kv(b"1")) };
        let gone = KeyValue::tombstone(b"b", 7);
        let delete = Event { r#type: EventType::Delete.into(), kv: Some(gone), prev_kv: None };
        WatchResponse {
            header: Some(ResponseHeader { revision: 7, ..Default::default() }),
            events: vec![put, delete],
            ..Default::default()
        }
    }

    #[test]
    fn events_are_raw_lines_or_one_object_a_revision() {
        assert_eq!(format_events(Format::Simple, &response()), b"PUT\na\n1\na\n2\xff\nDELETE\nb\n\n");
        let text = format_events(Format::Json, &response());
        let object: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!((&object["header"]["revision"], &object["events"][1]["type"]), (&json!(7), &json!("DELETE")));
        assert_eq!(object["events"][0]["prev_kv"]["value"], json!("MQ=="));
        assert_eq!(text.iter().filter(|b| **b == b'\n').count(), 1);
        let progress = WatchResponse { events: Vec::new(), ..response() };
        assert_eq!(format_progress(Format::Simple, &progress), b"progress notify: 7\n");
    }
}
