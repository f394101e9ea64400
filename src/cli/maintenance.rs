//! `alarm`, `defrag` and `hash`.

use anyhow::bail;
use serde_json::json;

use super::client::{ClientArgs, failure, unreachable};
use super::output::{Format, json_line, table};
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{AlarmMember, AlarmRequest, DefragmentRequest, HashKvRequest};

#[derive(Debug, clap::Subcommand)]
pub enum AlarmCommand {
    /// One line an alarm
    List(AlarmArgs),
    /// Take all alarms off. One whose cause lasts stays on
    Disarm(AlarmArgs),
}

#[derive(Debug, clap::Args)]
pub struct AlarmArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct DefragArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct HashArgs {
    /// As of this revision; 0: now
    #[arg(long, default_value_t = 0)]
    rev: i64,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn alarm(command: AlarmCommand) -> anyhow::Result<Vec<u8>> {
    let (args, disarm) = match command {
        AlarmCommand::List(args) => (args, false),
        AlarmCommand::Disarm(args) => (args, true),
    };
    let mut maintenance = MaintenanceClient::new(args.client.connect().await?);
    let mut alarms = args.client.answer(maintenance.alarm(AlarmRequest::default())).await?.into_inner().alarms;
    if disarm {
        for on in alarms {
            let action = AlarmAction::Deactivate.into();
            let request = AlarmRequest { action, member_id: on.member_id, alarm: on.alarm };
            args.client.answer(maintenance.alarm(request)).await?;
        }
        alarms = args.client.answer(maintenance.alarm(AlarmRequest::default())).await?.into_inner().alarms;
    }
    Ok(match args.output {
        Format::Json => {
            let on = |alarm: &AlarmMember| json!({ "memberID": alarm.member_id, "alarm": alarm.alarm().as_str_name() });
            json_line(&json!({ "alarms": alarms.iter().map(on).collect::<Vec<_>>() }))
        }
        Format::Simple => {
            let line = |on: &AlarmMember| format!("{:x} {}\n", on.member_id, on.alarm().as_str_name());
            alarms.iter().map(line).collect::<String>().into_bytes()
        }
    })
}

/// Every endpoint in turn, so that at most one member is busy with it.
pub async fn defrag(args: DefragArgs) -> anyhow::Result<Vec<u8>> {
    let mut done = String::new();
    let mut failures = Vec::new();
    for endpoint in args.client.endpoints() {
        match args.client.dial(endpoint).await {
            Ok(channel) => match MaintenanceClient::new(channel).defragment(DefragmentRequest {}).await {
                Ok(_) => done += &format!("{endpoint}: done\n"),
                Err(status) => failures.push(format!("{endpoint}: {}", failure(&status))),
            },
            Err(reason) => failures.push(format!("{endpoint}: {reason}")),
        }
    }
    if failures.is_empty() && !done.is_empty() {
        Ok(done.into_bytes())
    } else {
        bail!("{done}{}", unreachable(&failures))
    }
}

pub async fn hash(args: HashArgs) -> anyhow::Result<Vec<u8>> {
    let (mut rows, mut objects, mut failures) = (Vec::new(), Vec::new(), Vec::new());
    for endpoint in args.client.endpoints() {
        let channel = match args.client.dial(endpoint).await {
            Ok(channel) => channel,
            Err(reason) => {
                failures.push(format!("{endpoint}: {reason}"));
                continue;
            }
        };
        let mut maintenance = MaintenanceClient::new(channel);
        let answer = args.client.answer(maintenance.hash_kv(HashKvRequest { revision: args.rev })).await?.into_inner();
        let (hash, compacted) = (format!("{:08x}", answer.hash), answer.compact_revision);
        let member = answer.header.unwrap_or_default().member_id;
        objects.push(json!({
            "endpoint": endpoint, "memberID": member, "hash": answer.hash, "hash_revision": answer.hash_revision,
            "compact_revision": compacted,
        }));
        let revision = answer.hash_revision.to_string();
        rows.push(vec![endpoint.to_owned(), format!("{member:x}"), hash, revision, compacted.to_string()]);
    }
    if rows.is_empty() {
        bail!("{}", unreachable(&failures));
    }
    failures.iter().for_each(|failure| eprintln!("quorate: {failure}"));
    Ok(match args.output {
        Format::Json => objects.iter().flat_map(json_line).collect(),
        Format::Simple => table(&["ENDPOINT", "MEMBER", "HASH", "REVISION", "COMPACTED"], &rows),
    })
}
