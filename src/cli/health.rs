//! `health` and `hash`: what each member says when it is asked for itself, and a verdict over all of them, which is the exit code.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tonic::Code;

use super::client::{ClientArgs, failure};
use super::members::{self, Asked, Reached, WhomArgs};
use super::output::{Format, id, json_line, table};
use super::verdict;
use crate::env::{Instant, sleep, timeout};
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{HashKvRequest, HashKvResponse, RangeRequest};

/// How often hashes are asked for anew because members had not all compacted alike, or compacted meanwhile.
const ROUNDS_MAX: u32 = 10;
const ROUND_PAUSE: Duration = Duration::from_millis(300);

#[derive(Debug, clap::Args)]
pub struct HealthArgs {
    #[command(flatten)]
    whom: WhomArgs,
    /// Ask each member for what it has itself, not whether it reaches a leader
    #[arg(long)]
    serializable: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct HashArgs {
    /// As of this revision; 0: the newest that all of them have
    #[arg(long, default_value_t = 0)]
    rev: i64,
    #[command(flatten)]
    whom: WhomArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// A read of each member, as etcd's own client does it; and its alarms.
pub async fn health(args: HealthArgs) -> anyhow::Result<()> {
    let members = members::all(&args.client, &args.whom).await?;
    let asked = join_all(members.iter().map(async |member| match &member.reached {
        Ok(reached) => read(&args, reached).await,
        Err(why) => (Err(format!("does not answer: {why}")), Duration::ZERO),
    }));
    let (mut rows, mut objects, mut sick) = (Vec::new(), Vec::new(), Vec::new());
    for (member, (outcome, took)) in members.iter().zip(asked.await) {
        let healthy = outcome.is_ok();
        let note = match outcome {
            Ok(note) => note,
            Err(why) => {
                sick.push(member.label());
                why
            }
        };
        let answered = member.reached.is_ok();
        let shown = if answered { format!("{:.1}ms", took.as_secs_f64() * 1000.0) } else { "-".into() };
        let state = if healthy { "healthy" } else { "unhealthy" };
        rows.push([member.cells(), vec![state.to_owned(), shown, note.clone()]].concat());
        let mut object = member.json();
        object["healthy"] = healthy.into();
        object["seconds"] = answered.then_some(took.as_secs_f64()).into();
        object["note"] = note.into();
        objects.push(object);
    }
    let out = match args.output {
        Format::Simple => table(&["ID", "NAME", "ENDPOINT", "HEALTH", "TOOK", "NOTE"], &rows),
        Format::Json => json_line(&json!({ "healthy": sick.is_empty(), "members": objects })),
    };
    let fault = format!("{} of {} members are not healthy: {}", sick.len(), members.len(), sick.join(", "));
    verdict(&out, (!sick.is_empty()).then_some(fault))
}

/// What is worth knowing of a member that is healthy, or why it is not.
async fn read(args: &HealthArgs, reached: &Reached) -> (Result<String, String>, Duration) {
    let begun = Instant::now();
    let range = RangeRequest { key: "health".into(), serializable: args.serializable, ..RangeRequest::default() };
    let outcome = match timeout(args.client.timeout, KvClient::new(reached.channel.clone()).range(range)).await {
        // To be refused for want of a permission takes a member that works, and a leader.
        Ok(Err(status)) if !matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => {
            Err(failure(&status).to_string())
        }
        Ok(_) => Ok(()),
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(args.client.timeout))),
    };
    let said = &reached.status.errors;
    let alarm = said.iter().any(|error| error.contains("alarm:"));
    let outcome = match outcome {
        Ok(()) if alarm => Err(said.join("; ")),
        Ok(()) => Ok(said.join("; ")),
        Err(why) => Err(why),
    };
    (outcome, begun.elapsed())
}

/// Hashes of one revision, with how far each member has compacted: only those that agree in it can be compared.
pub async fn hash(args: HashArgs) -> anyhow::Result<()> {
    let mut rounds = 0;
    loop {
        let members = members::all(&args.client, &args.whom).await?;
        let answers = hashes(&args, &members).await;
        let found = judge(&members, &answers);
        rounds += 1;
        if found == Verdict::NotAlike && rounds < ROUNDS_MAX {
            sleep(ROUND_PAUSE).await;
            continue;
        }
        let out = match args.output {
            Format::Simple => hash_text(&members, &answers, &found),
            Format::Json => hash_json(&members, &answers, &found),
        };
        return verdict(&out, found.fault());
    }
}

type Answer = Result<HashKvResponse, String>;

async fn hashes(args: &HashArgs, members: &[Asked]) -> Vec<Answer> {
    let reached = || members.iter().filter_map(|member| member.reached.as_ref().ok());
    let newest = reached().map(|reached| reached.status.header.as_ref().map_or(0, |header| header.revision)).min();
    let revision = if args.rev == 0 { newest.unwrap_or_default() } else { args.rev };
    join_all(members.iter().map(async |member| {
        let reached = member.reached.as_ref().map_err(|why| format!("does not answer: {why}"))?;
        let mut maintenance = MaintenanceClient::new(reached.channel.clone());
        let answer = args.client.answer(maintenance.hash_kv(HashKvRequest { revision })).await;
        answer.map(tonic::Response::into_inner).map_err(|error| error.to_string())
    }))
    .await
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Equal {
        members: usize,
        revision: i64,
    },
    /// Of one revision and one compaction, and yet not the same.
    Different(Vec<String>),
    /// Members have compacted up to different revisions, or one of them compacted meanwhile.
    NotAlike,
    /// Who gave no hash.
    Missing(Vec<String>),
}

fn judge(members: &[Asked], answers: &[Answer]) -> Verdict {
    let labelled = members.iter().zip(answers);
    let given: Vec<(String, &HashKvResponse)> =
        labelled.clone().filter_map(|(member, answer)| Some((member.label(), answer.as_ref().ok()?))).collect();
    // Whoever differs matters more than whoever is silent.
    let different = given.iter().any(|(_, one)| {
        let comparable = given.iter().filter(|(_, other)| {
            (other.hash_revision, other.compact_revision) == (one.hash_revision, one.compact_revision)
        });
        comparable.clone().any(|(_, other)| other.hash != one.hash)
    });
    if different {
        return Verdict::Different(given.iter().map(|(label, one)| format!("{label} has {:08x}", one.hash)).collect());
    }
    let missing: Vec<(String, &String)> =
        labelled.filter_map(|(member, answer)| Some((member.label(), answer.as_ref().err()?))).collect();
    if missing.iter().any(|(_, why)| why.contains("has been compacted")) {
        return Verdict::NotAlike;
    }
    if !missing.is_empty() {
        return Verdict::Missing(missing.into_iter().map(|(label, _)| label).collect());
    }
    let mut alike = given.iter().map(|(_, one)| (one.hash_revision, one.compact_revision));
    let first = alike.next();
    match first {
        Some((revision, _)) if alike.all(|other| Some(other) == first) => {
            Verdict::Equal { members: given.len(), revision }
        }
        _ => Verdict::NotAlike,
    }
}

impl Verdict {
    fn fault(&self) -> Option<String> {
        match self {
            Self::Equal { .. } => None,
            Self::Different(labels) => Some(format!(
                "the members' data DIFFERS ({}): stop writing, see `quorate alarm list`, and replace the member that differs from a majority",
                labels.join(", ")
            )),
            Self::NotAlike => Some(
                "the hashes cannot be compared: the members compact meanwhile, or up to different revisions; retry, or name a newer --rev".into(),
            ),
            Self::Missing(labels) => Some(format!(
                "no hash of {}; the others are equal; see `quorate status`",
                labels.join(", ")
            )),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Equal { .. } => "equal",
            Self::Different(_) => "different",
            Self::NotAlike => "not comparable",
            Self::Missing(_) => "incomplete",
        }
    }
}

fn hash_text(members: &[Asked], answers: &[Answer], found: &Verdict) -> Vec<u8> {
    let dash = || "-".to_owned();
    let row = |(member, answer): (&Asked, &Answer)| {
        let rest = match answer {
            Ok(answer) => vec![
                format!("{:08x}", answer.hash),
                answer.hash_revision.to_string(),
                answer.compact_revision.to_string(),
                String::new(),
            ],
            Err(why) => vec![dash(), dash(), dash(), why.clone()],
        };
        [member.cells(), rest].concat()
    };
    let rows: Vec<Vec<String>> = members.iter().zip(answers).map(row).collect();
    let mut out = table(&["ID", "NAME", "ENDPOINT", "HASH", "REVISION", "COMPACTED", "NOTE"], &rows);
    if let Verdict::Equal { members, revision } = found {
        let said = format!("equal: {members} of {members} members hold the same data at revision {revision}\n");
        out.extend_from_slice(said.as_bytes());
    }
    out
}

fn hash_json(members: &[Asked], answers: &[Answer], found: &Verdict) -> Vec<u8> {
    let object = |(member, answer): (&Asked, &Answer)| {
        let mut object = member.json();
        match answer {
            Ok(answer) => {
                object["hash"] = answer.hash.into();
                object["hash_revision"] = answer.hash_revision.into();
                object["compact_revision"] = answer.compact_revision.into();
                object["cluster_id"] = id(answer.header.unwrap_or_default().cluster_id).into();
            }
            Err(why) => object["failure"] = why.clone().into(),
        }
        object
    };
    let objects: Vec<_> = members.iter().zip(answers).map(object).collect();
    json_line(&json!({ "verdict": found.name(), "members": objects }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(answers: &[Answer]) -> Verdict {
        let member = |n: usize| Asked {
            id: n as u64 + 1,
            name: format!("kv-{n}"),
            endpoint: String::new(),
            learner: false,
            reached: Err(String::new()),
        };
        judge(&(0..answers.len()).map(member).collect::<Vec<_>>(), answers)
    }

    fn answer(hash: u32, hash_revision: i64, compact_revision: i64) -> Answer {
        Ok(HashKvResponse { hash, hash_revision, compact_revision, ..HashKvResponse::default() })
    }

    #[test]
    fn only_hashes_of_one_revision_and_one_compaction_are_compared() {
        let equal = Verdict::Equal { members: 2, revision: 7 };
        assert_eq!(found(&[answer(1, 7, 3), answer(1, 7, 3)]), equal);
        assert_eq!(found(&[answer(1, 7, 3), answer(2, 7, 4)]), Verdict::NotAlike);
        let different = found(&[answer(1, 7, 3), answer(2, 7, 3), Err("gone".into())]);
        assert!(matches!(different, Verdict::Different(_)), "{different:?}");
        assert!(different.fault().unwrap().contains("kv-1 has 00000002"));
        assert_eq!(found(&[answer(1, 7, 3), Err("gone".into())]), Verdict::Missing(vec!["kv-1".into()]));
        let compacted = "etcdserver: mvcc: required revision has been compacted";
        assert_eq!(found(&[answer(1, 7, 3), Err(compacted.into())]), Verdict::NotAlike);
    }
}
