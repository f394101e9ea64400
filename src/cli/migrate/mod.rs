//! `migrate`: copies a live etcd, or any server of its API, and follows it until told to switch.
//!
//! First every key as of one revision; then each later change, in order, by a watch; at the end, a comparison of every key, value
//! and lease as of one revision of the source. So clients may write to the source until the switch: stop them, end this with Ctrl-C
//! (or have given `--until-synced`), wait for the comparison, and start them at the target.
//! Invariants: the source is only read; the target holds what the source held at one revision whenever this ends well.
//! Create revisions, mod revisions and versions of keys are the target's own, unless it was restored from a snapshot file of the source
//! (`same`). Absent: passwords of users.

mod follow;
pub mod mirror;
mod same;
mod target;
mod users;
mod verify;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use serde_json::json;
use tonic::{Code, Status};

use super::client::{ANSWER_BYTES_MAX, ClientArgs, TlsArgs, failure};
use super::kv::prefix_end;
use super::output::{Format, json_line};
use super::progress::{Progress, Unit};
use crate::cli::credentials::{Channel, UserArgs};
use crate::config::units::duration;
use crate::env::timeout;
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::{RangeRequest, RangeResponse};
use follow::Follower;
use target::{Change, Target};

/// Keys asked for at a time.
const PAGE_KEYS: i64 = 200;
/// How often a copy may begin anew because the source has compacted the revision that it was copying.
const COPIES_MAX: u32 = 3;
const TICK: Duration = Duration::from_secs(1);

/// The source, and who asks there.
#[derive(Clone, Debug, clap::Args)]
pub struct SourceArgs {
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
    /// User of the source, as NAME:PASSWORD
    #[arg(long, env = "QUORATE_FROM_USER", hide_env_values = true, value_name = "NAME:PASSWORD")]
    from_user: Option<String>,
}

/// The target, who asks there, and how long both are waited for.
#[derive(Clone, Debug, clap::Args)]
pub struct TargetArgs {
    /// Client addresses of the target
    #[arg(
        long,
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        env = "QUORATE_ENDPOINTS",
        default_value = "127.0.0.1:2379"
    )]
    to: Vec<String>,
    /// Longest wait for a connection to one endpoint
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration::parse)]
    dial_timeout: Duration,
    /// Longest wait for one answer
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
    #[command(flatten)]
    user: UserArgs,
    #[command(flatten)]
    tls: TlsArgs,
}

#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    source: SourceArgs,
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
    /// The target was restored from a snapshot file of the source (`quorate snapshot restore`): go on from its revision, so that every
    /// revision is the source's
    #[arg(long, conflicts_with_all = ["prefix", "into_used", "with_users"])]
    same_revisions: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    target: TargetArgs,
}

impl SourceArgs {
    fn client(&self, target: &TargetArgs) -> ClientArgs {
        ClientArgs {
            endpoints: self.from.clone(),
            dial_timeout: target.dial_timeout,
            timeout: target.timeout,
            user: UserArgs { user: self.from_user.clone(), ..UserArgs::default() },
            tls: TlsArgs { cacert: self.from_cacert.clone(), cert: self.from_cert.clone(), key: self.from_key.clone() },
            named_by: "--from",
        }
    }
}

impl TargetArgs {
    fn client(&self) -> ClientArgs {
        ClientArgs {
            endpoints: self.to.clone(),
            dial_timeout: self.dial_timeout,
            timeout: self.timeout,
            user: self.user.clone(),
            tls: self.tls.clone(),
            named_by: "--to or QUORATE_ENDPOINTS",
        }
    }
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
    /// `name` is what it is called in messages.
    pub(super) async fn connect(name: &str, client: ClientArgs, prefix: &[u8]) -> anyhow::Result<Self> {
        let channel = client.connect().await.with_context(|| format!("the {name}"))?;
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

    async fn cluster_id(&self) -> anyhow::Result<u64> {
        let range = RangeRequest { count_only: true, serializable: true, ..self.all() };
        let answer = self.range(range).await.map_err(|status| failure(&status))?;
        Ok(answer.header.unwrap_or_default().cluster_id)
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
    follower: Follower,
}

pub async fn migrate(args: MigrateArgs) -> anyhow::Result<Vec<u8>> {
    let prefix = args.prefix.as_bytes();
    let from = Side::connect("source", args.source.client(&args.target), prefix).await?;
    let to = Side::connect("target", args.target.client(), prefix).await?;
    ensure!(
        from.cluster_id().await? != to.cluster_id().await?,
        "--from and --to are of the same cluster, and nothing can move from it to itself; name the new cluster with --to"
    );
    let (present, _) = to.count().await?;
    ensure!(
        present == 0 || args.into_used || args.same_revisions,
        "the target holds {present} keys already; name an empty one, say --into-used to write among them, or --same-revisions if it was \
         restored from a snapshot of the source"
    );
    if args.with_users {
        eprint!("{}", users::copy(&from.client, &to.client).await?.describe());
    }
    let to = Target::new(&from, to, args.same_revisions).await?;
    let upkeep = to.clone();
    let mut migration = Migration { args, follower: Follower::new(from, to) };
    tokio::select! {
        done = migration.run() => done,
        failed = upkeep.keep_leases() => Err(failed),
    }
}

impl Migration {
    async fn run(&mut self) -> anyhow::Result<Vec<u8>> {
        let is_same = self.args.same_revisions;
        if is_same {
            self.follower.begin_same().await?
        } else {
            self.copy().await?
        }
        let hint = "following the source; stop its writers, then end this with Ctrl-C";
        let revision = self.follower.follow(self.args.until_synced, hint).await?;
        if is_same {
            self.follower.to.settle_leases().await?;
        }
        eprintln!("comparing as of the source's revision {revision} ...");
        let compared = verify::compare(&self.follower.from, revision, self.follower.to.side(), is_same).await?;
        if compared.differences > 0 {
            bail!(
                "{} keys differ after the copy, such as {:?}; does somebody else write to the target?",
                compared.differences,
                compared.examples
            );
        }
        let keys = compared.keys;
        Ok(match self.args.output {
            Format::Json => json_line(&json!({ "revision": revision, "keys": keys, "equal": true })),
            Format::Simple => {
                let how = if is_same { ", with their revisions" } else { "" };
                format!("the target holds what the source held at revision {revision}: {keys} keys, all equal{how}\n")
                    .into()
            }
        })
    }

    /// Copies everything as of one revision.
    async fn copy(&mut self) -> anyhow::Result<()> {
        for attempt in 1.. {
            let (count, revision) = self.follower.from.count().await?;
            self.follower.newest = revision;
            match self.copy_at(revision, count).await? {
                true => {
                    self.follower.applied = revision;
                    break;
                }
                false if attempt < COPIES_MAX => {
                    eprintln!("the source has compacted revision {revision}; the copy begins anew");
                    if !self.args.into_used {
                        // Of what was put, some may be gone at the source by now, and no watch will say so.
                        self.follower.to.clear().await?;
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
        let mut next = Some(self.follower.from.key.clone());
        let mut copied: u64 = 0;
        let mut progress = Progress::new("copying keys", Unit::Things, Some(count.max(0) as u64));
        while let Some(from) = next.take() {
            let page = match self.follower.from.page(&from, revision).await {
                Ok((page, following)) => {
                    next = following;
                    page
                }
                Err(status) if status.code() == Code::OutOfRange => return Ok(false),
                Err(status) => return Err(failure(&status)),
            };
            copied += page.kvs.len() as u64;
            self.follower.to.apply(page.kvs.into_iter().map(Change::Put)).await?;
            progress.at(copied);
        }
        progress.say(&format!("copied {copied} keys as of revision {revision}"));
        Ok(true)
    }
}
