//! `migrate`: copies a live etcd, or any server of its API, and follows it until told to switch.
//!
//! First every key as of one revision; then each later change, in order, by a watch; at the end, a comparison of every key, value
//! and lease as of one revision of the source. So clients may write to the source until the switch: stop them, end this with Ctrl-C
//! (or have given `--until-synced`), wait for the comparison, and start them at the target.
//! Invariants: the source is only read; the target holds what the source held at one revision whenever this ends well.
//! Absent: create revisions, mod revisions and versions of keys, which are the target's own; users and roles.

mod target;
mod users;
mod verify;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tonic::{Code, Status};

use super::client::{ANSWER_BYTES_MAX, ClientArgs, TlsArgs, failure};
use super::kv::prefix_end;
use crate::cli::credentials::{Channel, UserArgs};
use crate::config::units::duration;
use crate::env::{Instant, interval, timeout};
use crate::pb::EventType;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::watch_client::WatchClient;
use crate::pb::etcd::watch_request::RequestUnion;
use crate::pb::etcd::{RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse};
use target::{Change, Target};

/// Keys asked for at a time.
const PAGE_KEYS: i64 = 200;
/// How often a copy may begin anew because the source has compacted the revision that it was copying.
const COPIES_MAX: u32 = 3;
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// Client addresses of the source, with commas
    #[arg(long, value_name = "ENDPOINTS", value_delimiter = ',', required = true)]
    from: Vec<String>,
    /// CAs of the source's servers, in PEM; the flags for the target are as everywhere (--cacert, --cert, --key)
    #[arg(long, value_name = "FILE")]
    from_cacert: Option<PathBuf>,
    /// Own certificate for the source, in PEM
    #[arg(long, value_name = "FILE", requires = "from_key")]
    from_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", requires = "from_cert")]
    from_key: Option<PathBuf>,
    /// Client addresses of the target
    #[arg(
        long,
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        env = "QUORATE_ENDPOINTS",
        default_value = "127.0.0.1:2379"
    )]
    to: Vec<String>,
    /// Only keys that begin so [default: all]
    #[arg(long, default_value = "")]
    prefix: String,
    /// End as soon as the target holds what the source held a moment before, instead of following it until Ctrl-C
    #[arg(long)]
    until_synced: bool,
    /// Go on although the target holds keys; those that the source does not have will be reported as differences
    #[arg(long)]
    into_used: bool,
    /// Make the source's users and roles in the target, too; no etcd tells their passwords, so each needs another
    #[arg(long)]
    with_users: bool,
    /// User of the source, as NAME:PASSWORD
    #[arg(long, env = "QUORATE_FROM_USER", hide_env_values = true, value_name = "NAME:PASSWORD")]
    from_user: Option<String>,
    #[command(flatten)]
    user: UserArgs,
    /// Longest wait for a connection to one endpoint
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration::parse)]
    dial_timeout: Duration,
    /// Longest wait for one answer
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
    #[command(flatten)]
    tls: TlsArgs,
}

/// One side: how it is reached, and the keys that are meant.
#[derive(Clone)]
pub(super) struct Side {
    client: ClientArgs,
    kv: KvClient<Channel>,
    key: Bytes,
    range_end: Bytes,
}

impl Side {
    async fn connect(
        name: &str,
        endpoints: &[String],
        (user, tls): (UserArgs, TlsArgs),
        args: &MigrateArgs,
    ) -> anyhow::Result<Self> {
        let (endpoints, dial_timeout, timeout) = (endpoints.to_vec(), args.dial_timeout, args.timeout);
        let client = ClientArgs { endpoints, dial_timeout, timeout, user, tls };
        let channel = client.connect().await.with_context(|| format!("the {name}"))?;
        let prefix = args.prefix.as_bytes();
        let key = if prefix.is_empty() { Bytes::from_static(b"\0") } else { Bytes::copy_from_slice(prefix) };
        let kv = KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self { client, kv, key, range_end: prefix_end(prefix).into() })
    }

    async fn range(&self, range: RangeRequest) -> Result<RangeResponse, Status> {
        match timeout(self.client.timeout, self.kv.clone().range(range)).await {
            Ok(answer) => Ok(answer?.into_inner()),
            Err(_) => Err(Status::deadline_exceeded("no answer in time; raise --timeout")),
        }
    }

    /// How many keys there are, and the revision now: linearizably.
    async fn count(&self) -> anyhow::Result<(i64, i64)> {
        let range = RangeRequest { count_only: true, ..self.all() };
        let answer = self.range(range).await.map_err(|status| failure(&status))?;
        Ok((answer.count, answer.header.unwrap_or_default().revision))
    }

    /// Whether a key is among those that are meant.
    fn holds(&self, key: &[u8]) -> bool {
        key >= &self.key[..] && (self.range_end[..] == *b"\0" || key < &self.range_end[..])
    }

    fn all(&self) -> RangeRequest {
        RangeRequest { key: self.key.clone(), range_end: self.range_end.clone(), ..RangeRequest::default() }
    }

    /// The keys from `from` on, as of `revision`, a page of them; and where the next page begins, if there is one.
    async fn page(&self, from: &Bytes, revision: i64) -> Result<(RangeResponse, Option<Bytes>), Status> {
        let range = RangeRequest { key: from.clone(), limit: PAGE_KEYS, revision, ..self.all() };
        let answer = self.range(range).await?;
        let next = answer.kvs.last().filter(|_| answer.more).map(|last| Bytes::from([last.key(), b"\0"].concat()));
        Ok((answer, next))
    }
}

struct Migration {
    args: MigrateArgs,
    from: Side,
    to: Target,
    /// All changes of the source up to this revision are in the target.
    applied: i64,
    /// The newest revision of the source that is known.
    newest: i64,
    shown: Instant,
}

pub async fn migrate(args: MigrateArgs) -> anyhow::Result<Vec<u8>> {
    let user = UserArgs { user: args.from_user.clone(), ..UserArgs::default() };
    let tls = (args.from_cacert.clone(), args.from_cert.clone(), args.from_key.clone());
    let tls = TlsArgs { cacert: tls.0, cert: tls.1, key: tls.2 };
    let from = Side::connect("source", &args.from, (user, tls), &args).await?;
    let to = Side::connect("target", &args.to, (args.user.clone(), args.tls.clone()), &args).await?;
    let (present, _) = to.count().await?;
    ensure!(
        present == 0 || args.into_used,
        "the target holds {present} keys already; name an empty one, or say --into-used to write among them"
    );
    if args.with_users {
        eprint!("{}", users::copy(&from.client, &to.client).await?.describe());
    }
    let to = Target::new(&from, to).await?;
    let upkeep = to.clone();
    let mut migration = Migration { args, from, to, applied: 0, newest: 0, shown: Instant::now() };
    tokio::select! {
        done = migration.run() => done,
        failed = upkeep.keep_leases() => Err(failed),
    }
}

impl Migration {
    async fn run(&mut self) -> anyhow::Result<Vec<u8>> {
        self.copy().await?;
        let revision = self.follow().await?;
        eprintln!("comparing as of the source's revision {revision} ...");
        let compared = verify::compare(&self.from, revision, self.to.side()).await?;
        if compared.differences > 0 {
            bail!(
                "{} keys differ after the copy, such as {:?}; does somebody else write to the target?",
                compared.differences,
                compared.examples
            );
        }
        let keys = compared.keys;
        Ok(format!("the target holds what the source held at revision {revision}: {keys} keys, all equal\n")
            .into_bytes())
    }

    /// Copies everything as of one revision.
    async fn copy(&mut self) -> anyhow::Result<()> {
        for attempt in 1.. {
            let (count, revision) = self.from.count().await?;
            self.newest = revision;
            match self.copy_at(revision, count).await? {
                true => {
                    self.applied = revision;
                    break;
                }
                false if attempt < COPIES_MAX => {
                    eprintln!("the source has compacted revision {revision}; the copy begins anew");
                    if !self.args.into_used {
                        // Of what was put, some may be gone at the source by now, and no watch will say so.
                        self.to.clear().await?;
                    }
                }
                false => {
                    bail!("the source compacts faster than it can be copied; switch its auto-compaction off meanwhile")
                }
            }
        }
        Ok(())
    }

    /// False if the source has compacted the revision meanwhile.
    async fn copy_at(&mut self, revision: i64, count: i64) -> anyhow::Result<bool> {
        let mut next = Some(self.from.key.clone());
        let mut copied = 0;
        while let Some(from) = next.take() {
            let page = match self.from.page(&from, revision).await {
                Ok((page, following)) => {
                    next = following;
                    page
                }
                Err(status) if status.code() == Code::OutOfRange => return Ok(false),
                Err(status) => return Err(failure(&status)),
            };
            copied += page.kvs.len();
            self.to.apply(page.kvs.into_iter().map(Change::Put)).await?;
            self.show(&format!("copied {copied} of {count} keys as of revision {revision}"));
        }
        eprintln!("copied {copied} keys as of revision {revision}");
        Ok(true)
    }

    fn show(&mut self, text: &str) {
        if self.shown.elapsed() >= 2 * TICK {
            self.shown = Instant::now();
            eprintln!("{text}");
        }
    }

    /// Applies what the source changes until told to stop; returns the revision that the target is at then.
    async fn follow(&mut self) -> anyhow::Result<i64> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Where to stop, once that is decided.
        let mut end = if self.args.until_synced { Some(self.from.count().await?.1) } else { None };
        if end.is_none() {
            eprintln!("following the source; stop its writers, then end this with Ctrl-C");
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
    async fn watch(&mut self, end: &mut Option<i64>) -> anyhow::Result<Option<String>> {
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
                    let (applied, newest) = (self.applied, self.newest);
                    self.show(&format!("at revision {applied} of the source's {newest}"));
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
            ensure!(
                answer.compact_revision == 0,
                "the source has compacted revision {} before it was copied: begin anew",
                answer.compact_revision
            );
            bail!("the source refused to be watched: {}", answer.cancel_reason);
        }
        let end = end.unwrap_or(i64::MAX);
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
