//! `alarm`, `defrag` and `move-leader`.

use anyhow::{anyhow, bail};
use serde_json::json;

use super::client::{ClientArgs, failure};
use super::credentials::Channel;
use super::members::{self, Asked, WhomArgs};
use super::output::{Format, id, json_line};
use super::progress::{Progress, Unit};
use super::verdict;
use crate::env::Instant;
use crate::pb::etcd::alarm_request::AlarmAction;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{AlarmMember, AlarmRequest, DefragmentRequest, MoveLeaderRequest};

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
    whom: WhomArgs,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct MoveLeaderArgs {
    /// Who shall lead, by name or id [default: the voter that is furthest]
    member: Option<String>,
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
    let get = async |channel: Channel| MaintenanceClient::new(channel).alarm(AlarmRequest::default()).await;
    let mut alarms = args.client.read(get).await?.into_inner().alarms;
    if disarm {
        let mut maintenance = MaintenanceClient::new(args.client.connect().await?);
        for on in alarms {
            let action = AlarmAction::Deactivate.into();
            let request = AlarmRequest { action, member_id: on.member_id, alarm: on.alarm };
            args.client.answer(maintenance.alarm(request)).await?;
        }
        alarms = args.client.answer(maintenance.alarm(AlarmRequest::default())).await?.into_inner().alarms;
    }
    Ok(match args.output {
        Format::Json => {
            let on = |on: &AlarmMember| json!({ "memberID": id(on.member_id), "alarm": on.alarm().as_str_name() });
            json_line(&json!({ "alarms": alarms.iter().map(on).collect::<Vec<_>>() }))
        }
        Format::Simple => {
            let line = |on: &AlarmMember| format!("{} {}\n", id(on.member_id), on.alarm().as_str_name());
            alarms.iter().map(line).collect::<String>().into_bytes()
        }
    })
}

/// Every member in turn, so that at most one is busy with it, and the leader last.
pub async fn defrag(args: DefragArgs) -> anyhow::Result<()> {
    let mut members = members::all(&args.client, &args.whom).await?;
    let leader = members::leader(&members);
    members.sort_by_key(|member| member.id == leader);
    let mut progress = Progress::new("members defragmented", Unit::Things, Some(members.len() as u64));
    let (mut text, mut objects, mut failed) = (String::new(), Vec::new(), Vec::new());
    for (done, member) in members.iter().enumerate() {
        progress.at(done as u64);
        let begun = Instant::now();
        let outcome = match &member.reached {
            Ok(reached) => {
                let asked = MaintenanceClient::new(reached.channel.clone()).defragment(DefragmentRequest {}).await;
                asked.map(drop).map_err(|status| failure(&status).to_string())
            }
            Err(why) => Err(why.clone()),
        };
        let (seconds, mut object) = (begun.elapsed().as_secs_f64(), member.json());
        object["seconds"] = seconds.into();
        object["failure"] = outcome.as_ref().err().cloned().into();
        objects.push(object);
        match outcome {
            Ok(()) => text += &format!("{} ({}): done in {seconds:.1}s\n", member.label(), member.endpoint),
            Err(why) => failed.push(format!("{}: {why}", member.label())),
        }
    }
    drop(progress);
    let of = members.len();
    let out = match args.output {
        Format::Simple => text.into_bytes(),
        Format::Json => json_line(&json!({ "members": objects })),
    };
    let fault = format!("{} of {of} members are not defragmented ({})", failed.len(), failed.join(", "));
    verdict(&out, (!failed.is_empty()).then_some(fault))
}

/// Asks the leader to hand over; returns when another one leads.
pub async fn move_leader(args: MoveLeaderArgs) -> anyhow::Result<Vec<u8>> {
    let members = members::all(&args.client, &WhomArgs::default()).await?;
    let leader = match members::leader(&members) {
        0 => bail!("there is no leader to hand over; see `quorate status`, then retry"),
        leader => members.iter().find(|member| member.id == leader),
    };
    let leader = leader.ok_or_else(|| anyhow!("the leader is no member any more; retry in a moment"))?;
    let reached = leader.reached.as_ref().map_err(|why| {
        let label = leader.label();
        anyhow!(
            "the leader, {label}, cannot be reached ({why}), and only it can hand over; name its client address too"
        )
    })?;
    let target = match &args.member {
        None => successor(&members, leader.id)?,
        Some(text) => {
            let list = members::list(&args.client).await?;
            let wanted = members::resolve(&list, text)?;
            members
                .iter()
                .find(|member| member.id == wanted)
                .ok_or_else(|| anyhow!("there is no member {}; `quorate member list` has them all", id(wanted)))?
        }
    };
    if target.id != leader.id {
        let request = MoveLeaderRequest { target_id: target.id };
        args.client.answer(MaintenanceClient::new(reached.channel.clone()).move_leader(request)).await?;
    }
    Ok(match args.output {
        Format::Json => json_line(&json!({ "from": leader.json(), "to": target.json() })),
        Format::Simple if target.id == leader.id => format!("{} leads already\n", leader.label()).into_bytes(),
        Format::Simple => format!("{} leads now; it was {}\n", target.label(), leader.label()).into_bytes(),
    })
}

/// The voter, other than the leader, that has applied most.
fn successor(members: &[Asked], leader: u64) -> anyhow::Result<&Asked> {
    let voters = members.iter().filter(|member| member.id != leader && !member.learner);
    let reached = voters.filter_map(|member| Some((member.reached.as_ref().ok()?.status.raft_applied_index, member)));
    let furthest = reached.max_by_key(|(applied, _)| *applied);
    Ok(furthest.ok_or_else(|| anyhow!("no other voter answers; see `quorate status`"))?.1)
}
