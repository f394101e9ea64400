//! `snapshot save`, `status` and `restore`.
//!
//! A saved file has its name only after it was verified and is on disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde_json::json;

use super::client::{ANSWER_BYTES_MAX, ClientArgs, failure};
use super::new_cluster::NewClusterArgs;
use super::output::{Format, human_bytes, json_line, table};
use super::progress::{Progress, Unit};
use crate::backup::etcd_file::About;
use crate::config::units::duration;
use crate::env::{Env, File, OpenMode, timeout};
use crate::pb::etcd::SnapshotRequest;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::server::restore::{self, Loaded};
use crate::storage::snapshot::backup;

#[derive(Debug, clap::Subcommand)]
pub enum SnapshotCommand {
    /// Take a backup of the whole state into FILE; of the first endpoint that can be reached
    Save(Box<SaveArgs>),
    /// Say what is in a backup, or in etcd's snapshot file
    Status(StatusArgs),
    /// Make data directories of a new cluster from a backup, or from etcd's snapshot file with its revisions, leases and users
    Restore(Box<RestoreArgs>),
}

#[derive(Debug, clap::Args)]
pub struct SaveArgs {
    file: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    file: PathBuf,
    /// Of etcd's file: do not look at the checksum at its end; a copy of a member's `member/snap/db` has none
    #[arg(long)]
    skip_hash_check: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    file: PathBuf,
    #[command(flatten)]
    to: NewClusterArgs,
    /// Go on so many revisions later, and call everything before compacted: for clients that remember revisions newer than the
    /// backup's
    #[arg(long, value_name = "REVISIONS", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=1 << 50))]
    bump_revision: i64,
    /// Let leases last at least so long from the start of the new cluster on: for the time until `migrate --same-revisions` keeps them alive
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration::parse)]
    hold_leases: Duration,
    /// Of etcd's file: do not look at the checksum at its end; a copy of a member's `member/snap/db` has none
    #[arg(long)]
    skip_hash_check: bool,
}

pub async fn run(command: SnapshotCommand) -> anyhow::Result<Vec<u8>> {
    match command {
        SnapshotCommand::Save(args) => save(*args).await,
        SnapshotCommand::Status(args) => status(&args),
        SnapshotCommand::Restore(args) => restore(*args).await,
    }
}

async fn save(args: SaveArgs) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    let mut name = args.file.clone().into_os_string();
    name.push(".part");
    let part = PathBuf::from(name);
    let file = env.disk.open(&part, OpenMode::CreateTruncate).with_context(|| format!("{}", part.display()))?;
    let taken = tokio::select! {
        taken = take(&args.client, file.into(), &part) => taken,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(anyhow::Error::from).and_then(|()| bail!("interrupted; nothing was saved"))
        }
    };
    let bytes = match taken {
        Ok(bytes) => bytes,
        Err(error) => {
            // What cannot be removed now is overwritten by the next try.
            let _ = env.disk.remove_file(&part);
            return Err(error);
        }
    };
    env.disk.rename(&part, &args.file).with_context(|| format!("{}", args.file.display()))?;
    env.disk.sync_dir(parent(&args.file)).with_context(|| format!("{}", args.file.display()))?;
    Ok(match args.output {
        Format::Simple => format!("saved {} ({})\n", args.file.display(), human_bytes(bytes)).into_bytes(),
        Format::Json => json_line(&json!({ "file": args.file, "bytes": bytes })),
    })
}

fn parent(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes the stream to `file`, verifies it and makes it durable; returns its size.
pub(super) async fn take(client: &ClientArgs, file: Arc<dyn File>, path: &Path) -> anyhow::Result<u64> {
    let mut maintenance = MaintenanceClient::new(client.connect().await?).max_decoding_message_size(ANSWER_BYTES_MAX);
    let mut pieces = client.answer(maintenance.snapshot(SnapshotRequest {})).await?.into_inner();
    let (mut offset, mut remaining) = (0, 0);
    let mut progress = Progress::new("saving", Unit::Bytes, None);
    loop {
        let piece = match timeout(client.timeout, pieces.message()).await {
            Ok(Ok(Some(piece))) => piece,
            Ok(Ok(None)) => break,
            Ok(Err(status)) => return Err(failure(&status)),
            Err(_) => bail!("nothing came for {}; is the member alive?", humantime::format_duration(client.timeout)),
        };
        file.write_at(&piece.blob, offset)?;
        offset += piece.blob.len() as u64;
        remaining = piece.remaining_bytes;
        progress.set_total(offset + remaining);
        progress.at(offset);
    }
    ensure!(remaining == 0, "the stream ended {remaining} bytes too early; the member may have stopped: try again");
    let name = path.display().to_string();
    backup::verify(&*file, &name)?;
    for change in backup::open(file.clone(), &name)? {
        change?;
    }
    file.sync_all()?;
    Ok(offset)
}

fn status(args: &StatusArgs) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    let Loaded { state, sha, etcd } = restore::load(&env, &args.file, args.skip_hash_check)?;
    let bytes = env.disk.open(&args.file, OpenMode::Read)?.len()?;
    let hash = state.hash_kv(0).map_err(|error| anyhow!(error))?;
    let sha: String = sha.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(match args.output {
        Format::Json => json_line(&json!({
            "hash": hash.hash,
            "revision": state.revision(),
            "compactRevision": state.compacted(),
            "totalKey": state.key_count(),
            "totalSize": bytes,
            "clusterVersion": state.cluster_version(),
            "sha256": sha,
            "etcd": etcd.as_ref().map(etcd_json),
        })),
        Format::Simple => {
            let row = vec![
                format!("{:08x}", hash.hash),
                state.revision().to_string(),
                state.compacted().to_string(),
                state.key_count().to_string(),
                human_bytes(bytes),
            ];
            let table = table(&["HASH", "REVISION", "COMPACTED", "KEYS", "SIZE"], &[row]);
            [etcd.as_ref().map(describe).unwrap_or_default().into_bytes(), table].concat()
        }
    })
}

async fn restore(args: RestoreArgs) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    let wanted = args.to.wanted(&env, args.bump_revision)?;
    let mut about = None;
    let loading = async {
        let mut loaded = restore::load(&env, &args.file, args.skip_hash_check)?;
        loaded.hold_leases(args.hold_leases);
        about = loaded.etcd;
        Ok((loaded.state, loaded.sha))
    };
    let made = restore::restore(&env, wanted, loading).await?;
    let head = about.as_ref().map(describe).unwrap_or_default();
    Ok(args.to.describe(&made, &head, json!({ "etcd": about.as_ref().map(etcd_json) })))
}

/// Of etcd's file.
fn describe(about: &About) -> String {
    let About { version, leases, users, roles, notes } = about;
    let head = format!("a snapshot file of etcd {version}, with {leases} leases, {users} users and {roles} roles\n");
    notes.iter().fold(head, |text, note| text + "note: " + note + "\n")
}

fn etcd_json(about: &About) -> serde_json::Value {
    let About { version, leases, users, roles, notes } = about;
    json!({ "version": version, "leases": leases, "users": users, "roles": roles, "notes": notes })
}
