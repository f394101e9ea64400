//! `log inspect`: what a data directory holds: who it is, the log's segments and newest entries, the snapshot.
//!
//! Invariant: nothing is changed, and no lock is held; a member may run on the directory meanwhile, and then the end of the log moves.
//! Absent: the state itself, and any repair; `recover --dry-run` says what a disk is worth.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::output::{Format, human_bytes, id, json_line, table};
use super::recover::request;
use crate::env::{Disk, Env, OpenMode};
use crate::identity::{SLOT_MAX, shown};
use crate::pb::log::{Identity, LogId, Membership};
use crate::raft::{Look, look};
use crate::storage::log::{Inspected, inspect};
use crate::storage::member_dir::MemberDir;
use crate::storage::snapshot::Reader;

/// Entries that are shown at most.
const ENTRIES_MAX: u32 = 100_000;
/// Commands of an entry that are shown.
const COMMANDS_MAX: usize = 20;

#[derive(Debug, clap::Subcommand)]
pub enum LogCommand {
    /// Say what a data directory holds; it is only read
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Data directory of a member, which may run
    dir: PathBuf,
    /// Also show the newest entries, so many
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=ENTRIES_MAX as i64))]
    entries: u32,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

/// An entry, as it is shown.
struct Entry {
    log_id: LogId,
    bytes: usize,
    /// What it holds, a line each.
    what: Vec<String>,
}

/// A snapshot file.
struct Snapshot {
    name: String,
    bytes: u64,
    /// Log index and revision, or why it cannot be read.
    head: Result<(u64, i64), String>,
}

struct Report {
    dir: PathBuf,
    identity: Identity,
    running: bool,
    log: Option<Inspected>,
    entries: VecDeque<Entry>,
    snapshots: Vec<Snapshot>,
    state_bytes: u64,
}

pub fn run(command: LogCommand) -> anyhow::Result<Vec<u8>> {
    let LogCommand::Inspect(args) = command;
    let env = Env::real();
    let report = read(&*env.disk, &env, &args)?;
    Ok(match args.output {
        Format::Simple => report.text(args.entries > 0),
        Format::Json => json_line(&report.json()),
    })
}

fn read(disk: &dyn Disk, env: &Env, args: &InspectArgs) -> anyhow::Result<Report> {
    let root = &args.dir;
    let etcds = ["member/wal", "member/snap"].iter().any(|part| disk.exists(&root.join(part)));
    ensure!(!etcds, "{} is the data directory of an etcd, which no command here reads", root.display());
    let Some(identity) = MemberDir::peek(env.disk.clone(), root)? else {
        bail!("{} holds no member; name a data directory, as in `server.data_dir`", root.display());
    };
    let dir = root.join(format!("member-{:016x}", identity.member_id));
    let mut entries = VecDeque::new();
    let mut each = |log_id: LogId, kind: u8, payload: &[u8]| {
        while entries.back().is_some_and(|last: &Entry| last.log_id.index >= log_id.index) {
            entries.pop_back();
        }
        if args.entries > 0 {
            if entries.len() == args.entries as usize {
                entries.pop_front();
            }
            entries.push_back(Entry { log_id, bytes: payload.len(), what: describe(kind, payload) });
        }
    };
    let running = is_locked(disk, root);
    let log = match identity.log_started {
        true => Some(inspect(disk, &dir.join("log"), running, &mut each)?),
        false => None,
    };
    let snapshots = snapshots(disk, &dir.join("snapshot"))?;
    let state_bytes = size(disk, &dir.join("state"));
    Ok(Report { dir, identity, running, log, entries, snapshots, state_bytes })
}

/// Whether a process holds the data directory.
fn is_locked(disk: &dyn Disk, root: &Path) -> bool {
    let path = root.join("LOCK");
    disk.exists(&path) && disk.lock(&path).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

fn snapshots(disk: &dyn Disk, dir: &Path) -> anyhow::Result<Vec<Snapshot>> {
    let names =
        if disk.exists(dir) { disk.list(dir).with_context(|| format!("{}", dir.display()))? } else { Vec::new() };
    let read = |name: &String| -> anyhow::Result<Snapshot> {
        let path = dir.join(name);
        let file: std::sync::Arc<dyn crate::env::File> = disk.open(&path, OpenMode::Read)?.into();
        let bytes = file.len()?;
        let head = Reader::open(file, name).map(|reader| {
            let meta = &reader.head().meta;
            (meta.applied.map_or(0, |applied| applied.index), meta.revision)
        });
        Ok(Snapshot { name: name.clone(), bytes, head: head.map_err(|error| error.to_string()) })
    };
    // One that a running member has just replaced is not there any more.
    Ok(names.iter().filter(|name| name.ends_with(".snap")).filter_map(|name| read(name).ok()).collect())
}

/// Bytes of the files below a directory. The state store's files come and go while a member runs.
fn size(disk: &dyn Disk, dir: &Path) -> u64 {
    let names = disk.list(dir).unwrap_or_default();
    let each = names.iter().map(|name| {
        let path = dir.join(name);
        match disk.list(&path) {
            Ok(_) => size(disk, &path),
            Err(_) => disk.open(&path, OpenMode::Read).and_then(|file| file.len()).unwrap_or_default(),
        }
    });
    each.sum()
}

fn describe(kind: u8, payload: &[u8]) -> Vec<String> {
    match look(kind, payload) {
        Look::Blank => vec!["a leader's first entry".to_owned()],
        Look::Membership(membership) => vec![membership_text(&membership)],
        Look::Unknown(why) => vec![format!("cannot be read: {why}")],
        Look::Batch(batch) => {
            let shown = batch.commands.iter().take(COMMANDS_MAX);
            let unknown = || "a command that this version does not know".to_owned();
            let mut lines: Vec<String> =
                shown.map(|command| command.request.as_ref().map_or_else(unknown, request)).collect();
            if batch.commands.len() > COMMANDS_MAX {
                lines.push(format!("and {} more commands", batch.commands.len() - COMMANDS_MAX));
            }
            lines
        }
    }
}

fn membership_text(membership: &Membership) -> String {
    let voters = |config: &crate::pb::log::membership::Config| {
        let name = |voter: &u64| {
            let node = membership.members.iter().find(|member| member.id == *voter);
            let name = node.and_then(|member| member.node.as_ref()).map(|node| shown(&node.name));
            name.filter(|name| !name.is_empty()).unwrap_or_else(|| id(*voter))
        };
        config.voters.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    let configs: Vec<String> = membership.configs.iter().map(voters).collect();
    format!("membership of {}: voters {}", membership.members.len(), configs.join(" and before "))
}

fn place(log_id: Option<LogId>) -> String {
    log_id.map_or_else(|| "none".to_owned(), |log_id| format!("{} (term {})", log_id.index, log_id.term))
}

impl Report {
    fn text(&self, with_entries: bool) -> Vec<u8> {
        let held = &self.identity;
        let slot = if held.slot > u64::from(SLOT_MAX) { "none".to_owned() } else { held.slot.to_string() };
        let cluster = match held.cluster_id {
            0 => "none yet".to_owned(),
            cluster => id(cluster),
        };
        let mut text = format!(
            "member:     {} ({}), slot {slot}\ncluster:    {cluster}\ndirectory:  {}\nin use:     {}\n",
            shown(&held.name),
            id(held.member_id),
            self.dir.display(),
            if self.running { "yes, by a running member: the end of the log moves" } else { "no" },
        );
        match &self.log {
            None => text += "log:        none: this member was never part of a cluster\n",
            Some(log) => text += &log_text(log),
        }
        for snapshot in &self.snapshots {
            let head = match &snapshot.head {
                Ok((index, revision)) => format!("up to index {index}, revision {revision}"),
                Err(why) => format!("DAMAGED: {why}"),
            };
            text += &format!("snapshot:   {} ({}), {head}\n", snapshot.name, human_bytes(snapshot.bytes));
        }
        text += &format!(
            "state:      {} of the state store, which is rebuilt if it is lost\n",
            human_bytes(self.state_bytes)
        );
        let mut out = text.into_bytes();
        if let Some(log) = &self.log {
            let row = |segment: &crate::storage::log::Segment| {
                let name = segment.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let entries = segment.entries.map_or("-".to_owned(), |(first, last)| format!("{first} to {last}"));
                vec![name, human_bytes(segment.file_bytes), human_bytes(segment.used_bytes), entries]
            };
            let rows: Vec<Vec<String>> = log.segments.iter().map(row).collect();
            out.extend_from_slice(b"\n");
            out.extend(table(&["SEGMENT", "SIZE", "USED", "ENTRIES"], &rows));
        }
        if with_entries {
            let row = |entry: &Entry| {
                let (index, term) = (entry.log_id.index.to_string(), entry.log_id.term.to_string());
                vec![index, term, human_bytes(entry.bytes as u64), entry.what.join("; ")]
            };
            out.extend_from_slice(b"\n");
            out.extend(table(&["INDEX", "TERM", "BYTES", "WHAT"], &self.entries.iter().map(row).collect::<Vec<_>>()));
        }
        out
    }

    fn json(&self) -> Value {
        let position = |log_id: Option<LogId>| log_id.map(|id| json!({ "index": id.index, "term": id.term }));
        let log = self.log.as_ref().map(|log| {
            let segments = log.segments.iter().map(|segment| {
                json!({
                    "file": segment.path, "bytes": segment.file_bytes, "used_bytes": segment.used_bytes,
                    "first_index": segment.entries.map(|e| e.0), "last_index": segment.entries.map(|e| e.1),
                })
            });
            json!({
                "owner": { "member": id(log.owner.member_id), "cluster": id(log.owner.cluster_id) },
                "purged": position(log.state.purged), "last": position(log.state.last),
                "committed": position(log.state.committed),
                "vote": log.state.vote.as_ref().map(|vote| json!({ "term": vote.term, "member": id(vote.member) })),
                "frames": log.frames, "torn_bytes": log.torn_bytes, "damage": log.damage,
                "segments": segments.collect::<Vec<_>>(),
            })
        });
        let entry = |entry: &Entry| json!({ "index": entry.log_id.index, "term": entry.log_id.term, "bytes": entry.bytes, "what": entry.what });
        let snapshot = |snapshot: &Snapshot| {
            let head = snapshot.head.as_ref();
            json!({
                "file": snapshot.name, "bytes": snapshot.bytes, "index": head.map(|h| h.0).ok(),
                "revision": head.map(|h| h.1).ok(), "damage": head.err(),
            })
        };
        json!({
            "member": id(self.identity.member_id), "name": self.identity.name, "slot": self.identity.slot,
            "cluster": id(self.identity.cluster_id), "running": self.running, "log": log,
            "entries": self.entries.iter().map(entry).collect::<Vec<_>>(),
            "snapshots": self.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
            "state_bytes": self.state_bytes,
        })
    }
}

fn log_text(log: &Inspected) -> String {
    let state = &log.state;
    let entries = match state.last {
        Some(last) if last.index >= state.first_index() => {
            format!("entries {} to {} (term {})", state.first_index(), last.index, last.term)
        }
        _ => "no entries".to_owned(),
    };
    let vote = match &state.vote {
        Some(vote) if vote.committed => format!("term {}, led by {}", vote.term, id(vote.member)),
        Some(vote) => format!("term {}, for {}", vote.term, id(vote.member)),
        None => "none".to_owned(),
    };
    let (all, used): (u64, u64) =
        log.segments.iter().fold((0, 0), |sum, s| (sum.0 + s.file_bytes, sum.1 + s.used_bytes));
    let end = match (&log.damage, log.torn_bytes) {
        (Some(damage), _) => format!("DAMAGED: {damage}"),
        (None, 0) => format!("frame {}, whole", log.frames),
        (None, torn) => {
            format!("frame {}, and {torn} bytes of one that was not finished, which the next start drops", log.frames)
        }
    };
    format!(
        "log:        {entries}\npurged:     {}\ncommitted:  {}\nvote:       {vote}\nlog's end:  {end}\nlog's size: {} in {} segments, {} of it used\n",
        place(state.purged),
        place(state.committed),
        human_bytes(all),
        log.segments.len(),
        human_bytes(used),
    )
}
