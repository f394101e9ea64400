//! `backup`: what a person does with the backups that a cluster makes of itself, and takes without one.
//!
//! Reads and writes the path itself: no cluster need live for anything but `now` and `adopt`. Absent: backups as single files (`snapshot`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::client::ClientArgs;
use super::new_cluster::NewClusterArgs;
use super::output::{Format, done, human_bytes, id, json_line, table};
use super::snapshot::take;
use crate::backup::archive::{NamedFull, end_of};
use crate::backup::plan::{JUMP, Retention, Target, shown};
use crate::backup::prune::{Pruned, prune};
use crate::backup::{Access, Archive, Store, full, millis, restore, verify};
use crate::config;
use crate::config::units::duration;
use crate::env::{Env, File, OpenMode, wall_clock};
use crate::pb::backup::Generation;
use crate::pb::etcd::StatusRequest;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::server;
use crate::storage::snapshot::backup as file;

#[derive(Debug, clap::Subcommand)]
pub enum BackupCommand {
    /// Take a full backup of a live cluster now, and keep it at the path
    Now(Box<NowArgs>),
    /// List what can be restored
    List(ListArgs),
    /// Say how old the newest backups are, and whose
    Status(ListArgs),
    /// Read everything, make states of it, and compare them with what the members had
    Verify(VerifyArgs),
    /// Remove backups that are not to be kept
    Prune(PruneArgs),
    /// Make data directories of a new cluster from a moment
    Restore(Box<RestoreArgs>),
    /// Let a live cluster write to a path that another one has written to, which never will again
    Adopt(Box<AdoptArgs>),
}

/// Where the backups are.
#[derive(Clone, Debug, clap::Args)]
pub struct PathArgs {
    /// A directory, s3://bucket/path, gs://bucket/path or az://container/path; credentials come from the environment (AWS_*, GOOGLE_*,
    /// AZURE_*)
    #[arg(env = "QUORATE_BACKUP__URL")]
    url: String,
    /// URL of an S3 server that is not Amazon's [default: AWS_ENDPOINT_URL]
    #[arg(long, env = "QUORATE_BACKUP__ENDPOINT", value_name = "URL", default_value = "")]
    store_endpoint: String,
    /// CAs that the store's certificate must come from, in PEM [default: those that this system trusts]
    #[arg(long, env = "QUORATE_BACKUP__CA_FILE", value_name = "FILE")]
    store_cacert: Option<PathBuf>,
    /// The file with the key that the backups are encrypted with
    #[arg(long, env = "QUORATE_BACKUP__KEY_FILE", value_name = "FILE")]
    key_file: Option<PathBuf>,
}

impl PathArgs {
    fn open(&self, env: &Env) -> anyhow::Result<Archive> {
        let access = Access {
            endpoint: self.store_endpoint.clone(),
            ca_file: self.store_cacert.clone(),
            key_file: self.key_file.clone(),
        };
        Ok(Archive::new(Store::open(env, &self.url, &access)?))
    }
}

#[derive(Debug, clap::Args)]
pub struct NowArgs {
    #[command(flatten)]
    path: PathArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    path: PathArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    path: PathArgs,
    /// Only the newest generation
    #[arg(long)]
    newest: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct PruneArgs {
    #[command(flatten)]
    path: PathArgs,
    /// Full backups that stay, however old
    #[arg(long, value_name = "COUNT", default_value_t = config::Backup::default().keep_fulls)]
    keep_fulls: usize,
    /// Full backups stay for so long, however many
    #[arg(long, value_name = "DURATION", default_value = "7days", value_parser = duration::parse)]
    keep_age: Duration,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    path: PathArgs,
    /// The moment: latest, or a time (UTC) as in 2026-11-29T10:15:00Z
    #[arg(long, value_name = "TIME", default_value = "latest", conflicts_with = "revision")]
    at: Target,
    /// The moment: before the write that made a later revision
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    revision: Option<i64>,
    /// Of this generation of the path [default: the newest that has the moment]
    #[arg(long)]
    generation: Option<u32>,
    /// Go on with the same revisions. Without this they jump by a billion and everything before counts as compacted, so that clients which
    /// remember later revisions than the restored ones are told so instead of being misled
    #[arg(long)]
    same_revisions: bool,
    #[command(flatten)]
    to: NewClusterArgs,
}

#[derive(Debug, clap::Args)]
pub struct AdoptArgs {
    #[command(flatten)]
    path: PathArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: BackupCommand) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    match command {
        BackupCommand::Now(args) => now(&env, &args).await,
        BackupCommand::List(args) => list(&env, &args).await,
        BackupCommand::Status(args) => status(&env, &args).await,
        BackupCommand::Verify(args) => check(&env, &args).await,
        BackupCommand::Prune(args) => remove(&env, &args).await,
        BackupCommand::Restore(args) => make(&env, &args).await,
        BackupCommand::Adopt(args) => adopt(&env, &args).await,
    }
}

/// The snapshot is taken into a file first: a store that is slow or away must not hold a member's view.
async fn now(env: &Env, args: &NowArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let directory = tempfile::tempdir().context("a directory for the snapshot")?;
    let path = directory.path().join("snapshot");
    let snapshot: Arc<dyn File> = env.disk.open(&path, OpenMode::CreateTruncate)?.into();
    take(&args.client, snapshot.clone(), &path).await?;
    let (bytes, name) = (file::content_bytes(&*snapshot)?, path.display().to_string());
    let head = file::read(snapshot.clone(), bytes, &name)?.head().clone();
    let generation = archive.claim(head.cluster_id, None).await?;
    let applied = head.meta.applied.unwrap_or_default().index;
    let beside = full::Beside {
        generation: generation.number,
        record: record_before(&archive, generation.number, applied).await?,
        at_millis: millis(wall_clock()),
        bandwidth: u64::MAX,
    };
    let made = full::write(&archive, full::Source { file: snapshot, name, bytes }, beside).await?;
    let (revision, bytes) = (made.full.revision, made.full.sealed_bytes);
    let facts = json!({
        "generation": generation.number, "clusterID": id(generation.cluster_id), "revision": revision,
        "at": shown(made.full.at_millis), "bytes": bytes, "object": made.name,
    });
    Ok(done(args.output, &facts, &format!("{}: revision {revision} ({})", made.name, human_bytes(bytes))))
}

/// The newest record that ends at or before the entry at `index`.
async fn record_before(archive: &Archive, generation: u32, index: u64) -> anyhow::Result<u64> {
    let mut number = archive.tip(generation).await?.map_or(0, |tip| tip.record.number);
    while number > 0 {
        match archive.record(generation, number).await? {
            Some(stored) if end_of(&stored.record).is_none_or(|end| end.index > index) => number -= 1,
            _ => break,
        }
    }
    Ok(number)
}

/// The full backups of a generation; of damaged ones, why.
async fn fulls(archive: &Archive, generation: u32) -> anyhow::Result<(Vec<NamedFull>, Vec<String>)> {
    let (mut whole, mut damaged) = (Vec::new(), Vec::new());
    for full in archive.fulls(generation).await? {
        full.map_or_else(|error| damaged.push(error.to_string()), |full| whole.push(full));
    }
    Ok((whole, damaged))
}

async fn list(env: &Env, args: &ListArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let (mut rows, mut all, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for Generation { number, cluster_id, .. } in archive.generations().await? {
        let (whole, damaged) = fulls(&archive, number).await?;
        notes.extend(damaged);
        for named in whole {
            let full = &named.full;
            rows.push(vec![
                number.to_string(),
                format!("{cluster_id:016x}"),
                full.revision.to_string(),
                shown(full.at_millis),
                human_bytes(full.sealed_bytes),
                "full".into(),
            ]);
            all.push(json!({
                "generation": number, "clusterID": id(cluster_id), "revision": full.revision, "at": shown(full.at_millis),
                "bytes": full.sealed_bytes, "kind": "full", "object": named.name,
            }));
        }
        if let Some(tip) = archive.tip(number).await? {
            let (record, at) = (&tip.record, tip.record.marks.last().map_or(0, |mark| mark.at_millis));
            let kind = format!("changes up to record {}", record.number);
            rows.push(vec![
                number.to_string(),
                format!("{cluster_id:016x}"),
                record.revision.to_string(),
                shown(at),
                String::new(),
                kind,
            ]);
            all.push(json!({
                "generation": number, "clusterID": id(cluster_id), "revision": record.revision, "at": shown(at), "kind": "changes",
                "record": record.number,
            }));
        }
    }
    if rows.is_empty() && notes.is_empty() {
        bail!("{}: there is no backup at this path", archive.store().url());
    }
    Ok(match args.output {
        Format::Json => json_line(&json!({ "backups": all, "damaged": notes })),
        Format::Simple => {
            let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
            [table(&["GENERATION", "CLUSTER", "REVISION", "AT", "SIZE", "WHAT"], &rows), notes.into_bytes()].concat()
        }
    })
}

async fn status(env: &Env, args: &ListArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let newest = archive.newest().await?;
    let (whole, damaged) = fulls(&archive, newest.number).await?;
    let full = whole.iter().max_by_key(|named| named.applied().index);
    let tip = archive.tip(newest.number).await?;
    let now = millis(wall_clock());
    let age = |at: u64| humantime::format_duration(Duration::from_secs(now.saturating_sub(at) / 1000)).to_string();
    let mark = tip.as_ref().and_then(|tip| tip.record.marks.last()).map(|mark| mark.at_millis);
    let revision = tip.as_ref().map(|tip| tip.record.revision).max(full.map(|named| named.full.revision));
    let told = json!({
        "generation": newest.number,
        "clusterID": id(newest.cluster_id),
        "revision": revision,
        "fulls": whole.len(),
        "damaged": damaged,
        "newestFull": full.map(|named| json!({ "at": shown(named.full.at_millis), "revision": named.full.revision, "object": named.name })),
        "newestChanges": tip.as_ref().map(|tip| json!({ "at": mark.map(shown), "record": tip.record.number })),
    });
    if let Format::Json = args.output {
        return Ok(json_line(&told));
    }
    let mut text = format!("generation {} of cluster {:016x}\n", newest.number, newest.cluster_id);
    text += &match full {
        Some(named) => format!(
            "newest of {} full backups: revision {}, {} ({} ago)\n",
            whole.len(),
            named.full.revision,
            shown(named.full.at_millis),
            age(named.full.at_millis)
        ),
        None => "no full backup yet: nothing can be restored\n".into(),
    };
    text += &match (&tip, mark) {
        (Some(tip), Some(at)) => {
            format!("newest changes: record {}, {} ({} ago)\n", tip.record.number, shown(at), age(at))
        }
        (Some(tip), None) => format!("newest changes: record {}\n", tip.record.number),
        (None, _) => "no changes are archived: only the full backups' moments can be restored\n".into(),
    };
    Ok(damaged.iter().fold(text, |text, damaged| text + damaged + "\n").into_bytes())
}

async fn check(env: &Env, args: &VerifyArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let mut generations = archive.generations().await?;
    if args.newest {
        generations.drain(..generations.len().saturating_sub(1));
    }
    if generations.is_empty() {
        bail!("{}: there is no backup at this path", archive.store().url());
    }
    let (mut text, mut all, mut findings) = (String::new(), Vec::new(), Vec::new());
    for generation in &generations {
        let report = verify::verify(&archive, generation, &mut |line| eprintln!("{line}")).await?;
        text += &format!(
            "generation {} of cluster {:016x}: {} full backups and {} records, up to revision {}\n",
            generation.number, generation.cluster_id, report.fulls, report.records, report.revision
        );
        all.push(json!({
            "generation": generation.number, "clusterID": id(generation.cluster_id), "fulls": report.fulls,
            "records": report.records, "revision": report.revision,
        }));
        findings.extend(report.findings.iter().map(ToString::to_string));
    }
    if !findings.is_empty() {
        bail!("{}", findings.join("; "));
    }
    Ok(done(args.output, &json!({ "generations": all }), &(text + "all of it is what the members had")))
}

async fn remove(env: &Env, args: &PruneArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let keep = Retention { fulls: args.keep_fulls, age: args.keep_age };
    let Pruned { fulls, records, unfinished } = prune(&archive, &keep, args.dry_run).await?;
    let verb = if args.dry_run { "would remove" } else { "removed" };
    let names: String = fulls.iter().chain(&unfinished).map(|name| format!("{verb} {name}\n")).collect();
    let facts = json!({ "removed": !args.dry_run, "fulls": fulls, "unfinished": unfinished, "records": records });
    Ok(done(args.output, &facts, &format!("{names}{verb} {} full backups and {records} records", fulls.len())))
}

async fn make(env: &Env, args: &RestoreArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let target = args.revision.map_or(args.at, Target::Revision);
    let wanted = args.to.wanted(env, if args.same_revisions { 0 } else { JUMP })?;
    let mut found: Option<(String, Value)> = None;
    let loading = async {
        let moment = restore::restore(&archive, target, args.generation).await?;
        found = Some(describe(&moment));
        Ok((moment.state.kv, moment.sha256))
    };
    let made = server::restore::restore(env, wanted, loading).await?;
    let (head, fields) = found.unwrap_or_default();
    Ok(args.to.describe(&made, &head, fields))
}

/// What was found at the path, for people and for programs.
fn describe(moment: &restore::Restored) -> (String, Value) {
    let (revision, at) = (moment.state.kv.revision(), shown(moment.at_millis));
    let mut text = format!(
        "restored revision {revision} of cluster {:016x}, as it was at {at}, from {}",
        moment.cluster_id, moment.full.name
    );
    if moment.record > 0 {
        text += &format!(" and the changes up to record {}", moment.record);
    }
    text += "\n";
    for damaged in &moment.damaged {
        text += &format!("passed over: {damaged}\n");
    }
    let fields = json!({
        "restored": {
            "generation": moment.generation,
            "clusterID": id(moment.cluster_id),
            "revision": revision,
            "at": at,
            "full": moment.full.name,
            "record": moment.record,
            "damaged": moment.damaged.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }
    });
    (text, fields)
}

async fn adopt(env: &Env, args: &AdoptArgs) -> anyhow::Result<Vec<u8>> {
    let archive = args.path.open(env)?;
    let mut maintenance = MaintenanceClient::new(args.client.connect().await?);
    let status = args.client.answer(maintenance.status(StatusRequest {})).await?.into_inner();
    let cluster_id = status.header.unwrap_or_default().cluster_id;
    let generation = archive.adopt(cluster_id).await?;
    let facts = json!({ "generation": generation.number, "clusterID": id(cluster_id) });
    let sentence = format!("cluster {cluster_id:016x} writes here now, generation {}", generation.number);
    Ok(done(args.output, &facts, &sentence))
}
