//! `recover`: a new cluster from one survivor's disk, when the quorum of the old one is gone for good.
//!
//! Owns the words: what is certain, what may be lost, who must never run again. Works on the data directory of a stopped member
//! and on nothing else. Absent: a copy of anything; the old self stays in the data directory, as a former one.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::output::{Format, id, json_line, lease_id};
use crate::env::Env;
use crate::identity;
use crate::pb::log::command::Request;
use crate::pb::log::{Batch, Identity, Node};
use crate::raft::Member;
use crate::raft::revive::{self, Places, Point, Skipped, Survivor};
use crate::storage::member_dir::MemberDir;

#[derive(Debug, clap::Args)]
pub struct RecoverArgs {
    /// Data directory of the survivor, which must be stopped
    #[arg(long, value_name = "DIR", env = "QUORATE_SERVER__DATA_DIR", default_value = "/var/lib/quorate")]
    data_dir: PathBuf,
    /// Only say what would be kept, what may be lost, and who must be gone
    #[arg(long)]
    dry_run: bool,
    /// Drop the entry at this log index, which no program can apply: as if it had changed nothing; may be given several times
    #[arg(long, value_name = "INDEX")]
    skip_entry: Vec<u64>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

pub async fn recover(args: RecoverArgs) -> anyhow::Result<Vec<u8>> {
    let env = Env::real();
    let root = &args.data_dir;
    let Some(held) = MemberDir::peek(env.disk.clone(), root)? else {
        bail!("{} holds no member; name the data directory of a survivor with --data-dir", root.display());
    };
    if held.cluster_id == 0 || !held.log_started {
        bail!("{} belongs to no cluster; there is nothing to recover from it", root.display());
    }
    let slot = u16::try_from(held.slot).context("slot")?;
    let mut dir =
        MemberDir::open(env.disk.clone(), root, held.slot, &held.name, || identity::mint(env.random_u64(), slot))?.dir;
    let this = Member { cluster_id: held.cluster_id, member_id: held.member_id };
    let (log, snapshot, state) = (dir.log_path(), dir.snapshot_path(), dir.state_path());
    let skip = args.skip_entry.iter().copied().collect();
    let survivor =
        revive::examine(&env, this, &Places { log: &log, snapshot: &snapshot, state: &state }, &skip).await?;
    let (mut text, mut object) = (report(&held, &survivor), report_json(&held, &survivor));
    if args.dry_run {
        let skip: String = args.skip_entry.iter().map(|index| format!(" --skip-entry {index}")).collect();
        text += &format!(
            "next:     nothing was changed; `quorate recover --data-dir {}{skip}` forms the new cluster\n",
            root.display()
        );
    } else {
        let new = Member { cluster_id: env.random_u64().max(1), member_id: identity::mint(env.random_u64(), slot) };
        let path = dir.prepare(new.member_id)?;
        let (log, snapshot, state) = (path.join("log"), path.join("snapshot"), path.join("state"));
        survivor.found(&env, new, &Places { log: &log, snapshot: &snapshot, state: &state }).await?;
        dir.adopt(new.cluster_id, new.member_id)?;
        object["formed"] = json!({ "member": id(new.member_id), "cluster": id(new.cluster_id) });
        text += &format!(
            "next:     this disk is now member {:016x} of cluster {:016x}, its only voter; start it, then start the others with empty \
             disks, and they join\n",
            new.member_id, new.cluster_id
        );
    }
    env.stop(std::time::Duration::from_secs(10)).await;
    Ok(match args.output {
        Format::Simple => text.into_bytes(),
        Format::Json => json_line(&object),
    })
}

fn report_json(held: &Identity, survivor: &Survivor) -> Value {
    let point = |p: Point| json!({ "index": p.log_id.index, "term": p.log_id.term, "revision": p.revision });
    let gone = survivor.voters.iter().filter(|(voter, _)| *voter != held.member_id);
    let gone = gone.map(|(voter, node)| json!({ "id": id(*voter), "name": node.name, "peer": node.peer_address }));
    let dropped = survivor
        .skipped
        .iter()
        .map(|entry| json!({ "index": entry.log_id.index, "term": entry.log_id.term, "bytes": entry.bytes }));
    json!({
        "member": id(held.member_id), "name": held.name, "slot": held.slot, "cluster": id(held.cluster_id),
        "certain": survivor.certain.map(point), "last": point(survivor.last),
        "dropped": dropped.collect::<Vec<_>>(), "must_never_run_again": gone.collect::<Vec<_>>(), "formed": Value::Null,
    })
}

fn report(held: &Identity, survivor: &Survivor) -> String {
    let last = survivor.last;
    let certain = match survivor.certain {
        Some(point) => format!(
            "revisions 1 to {} are committed (log index {}, term {})",
            point.revision, point.log_id.index, point.log_id.term
        ),
        None => "nothing: this disk has not heard of a committed entry".to_owned(),
    };
    let certain_revision = survivor.certain.map_or(0, |point| point.revision);
    let kept = if last.revision > certain_revision {
        format!(
            "revisions {} to {} are on this disk, and it does not know whether they were committed; they are kept",
            certain_revision + 1,
            last.revision
        )
    } else {
        "nothing else is on this disk".to_owned()
    };
    let name = |(id, node): &(u64, Node)| format!("{} ({id:016x}, {})", node.name, node.peer_address);
    let gone: Vec<String> = survivor.voters.iter().filter(|(id, _)| *id != held.member_id).map(name).collect();
    let gone = if gone.is_empty() { "nobody: this is the only voter, start it".to_owned() } else { gone.join(", ") };
    let dropped: String = survivor.skipped.iter().map(dropped).collect();
    format!(
        "member:   {} ({:016x}) of cluster {:016x}, slot {}\n\
         certain:  {certain}\n\
         kept:     {kept}\n\
         {dropped}\
         lost:     what the others have acknowledged without this member, all of it behind revision {} (log index {})\n\
         gone:     {gone}; these must never run again on their present disks\n",
        held.name, held.member_id, held.cluster_id, held.slot, last.revision, last.log_id.index
    )
}

/// Commands of a dropped entry that are shown.
const SHOWN_MAX: usize = 20;

/// A line for an entry that is passed over, and one for each of its commands.
fn dropped(entry: &Skipped) -> String {
    let head =
        format!("dropped:  log index {}, term {}, {} bytes: ", entry.log_id.index, entry.log_id.term, entry.bytes);
    let Batch { commands } = match &entry.batch {
        Ok(batch) => batch,
        Err(reason) => return format!("{head}it cannot be decoded ({reason})\n"),
    };
    let mut text = format!("{head}{} commands\n", commands.len());
    for command in commands.iter().take(SHOWN_MAX) {
        let what = command.request.as_ref().map_or_else(|| "nothing that this program knows".to_owned(), request);
        text += &format!("            {what} (apply version {})\n", command.needs);
    }
    if commands.len() > SHOWN_MAX {
        text += &format!("            and {} more\n", commands.len() - SHOWN_MAX);
    }
    text
}

/// What a command is to do, in a line.
pub(super) fn request(request: &Request) -> String {
    // Quoted, so that no byte of it means anything to a terminal.
    let quoted = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
    match request {
        Request::Put(r) => format!("put of {}, {} bytes", quoted(&r.key), r.value.len()),
        Request::DeleteRange(r) if r.range_end.is_empty() => format!("delete of {}", quoted(&r.key)),
        Request::DeleteRange(r) => format!("delete from {} to {}", quoted(&r.key), quoted(&r.range_end)),
        Request::Txn(r) => {
            let (compare, success, failure) = (r.compare.len(), r.success.len(), r.failure.len());
            format!(
                "transaction of {compare} comparisons, {success} operations or else {failure}, and what is nested in them"
            )
        }
        Request::Compact(r) => format!("compaction at revision {}", r.revision),
        Request::SetClusterVersion(r) => format!("cluster version {}", r.version),
        Request::LeaseGrant(r) => format!("grant of lease {}, {} s", lease_id(r.id), r.ttl),
        Request::LeaseRevoke(r) => format!("end of lease {}", lease_id(r.id)),
        Request::LeaseCheckpoint(r) => format!("checkpoints of {} leases", r.checkpoints.len()),
        Request::Alarm(r) => format!("alarm {} of member {}, action {}", r.alarm, id(r.member_id), r.action),
        Request::Auth(_) => "a change of users or roles".to_owned(),
        Request::StartDigest(_) => "digests begun anew".to_owned(),
        Request::Follow(r) => format!("{} entries of the cluster that this one follows", r.entries.len()),
        Request::Promote(r) => format!("promotion of a standby, revisions {} later", r.jump),
        Request::Supersede(r) => format!("no more writes: cluster {} was promoted", id(r.cluster_id)),
        Request::WantedSize(r) => format!("wanted size: {} members from slot {}", r.replicas, r.start),
    }
}
