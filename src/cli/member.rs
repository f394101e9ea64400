//! `member add|remove|update|promote|scale|why`: the membership by hand.
//!
//! Everything goes through the leader's gate, whichever member is asked. Absent: waiting for what follows a change (catching up,
//! promotion); `member why` and `status` show it.

use anyhow::bail;
use serde_json::json;

use super::client::ClientArgs;
use super::members;
use super::output::{Format, condition_lines, id, json_line, table};
use super::status::{member_json, members_text};
use crate::http::membership_json;
use crate::identity::{SLOT_MAX, shown};
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::admin::{MembershipRequest, MembershipView, ScaleRequest};
use crate::pb::etcd::cluster_client::ClusterClient;
use crate::pb::etcd::{Member, MemberAddRequest, MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest};

#[derive(Debug, clap::Args)]
pub struct AddArgs {
    /// Peer address of the node, as HOST:PORT or http://HOST:PORT; it must run, with an empty disk. Where members are added by hand alone
    /// (--by-hand, etcd) it may start later
    peer: String,
    /// Keep it a learner until `member promote`
    #[arg(long)]
    learner: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct WhichArgs {
    /// Its name, or its id
    member: String,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct UpdateArgs {
    /// Its name, or its id
    member: String,
    /// Its new peer address, as HOST:PORT or http://HOST:PORT
    peer: String,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct ScaleArgs {
    /// Members that there should be: those of the lowest slots; the others are removed
    #[arg(required_unless_present = "unset", conflicts_with = "unset", value_parser = clap::value_parser!(u32).range(1..=65535))]
    replicas: Option<u32>,
    /// The lowest slot [default: the server's cluster.first_slot]
    #[arg(long, conflicts_with = "unset")]
    start: Option<u32>,
    /// Want no size any more: every member stays
    #[arg(long)]
    unset: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct WhyArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

fn url(peer: &str) -> String {
    if peer.contains("://") { peer.to_owned() } else { format!("http://{peer}") }
}

fn done(format: Format, what: &str, members: &[Member]) -> Vec<u8> {
    match format {
        Format::Simple => [format!("{what}\n").into_bytes(), members_text(members)].concat(),
        Format::Json => json_line(&json!({ "members": members.iter().map(member_json).collect::<Vec<_>>() })),
    }
}

pub async fn add(args: AddArgs) -> anyhow::Result<Vec<u8>> {
    let mut cluster = ClusterClient::new(args.client.connect().await?);
    let request = MemberAddRequest { peer_ur_ls: vec![url(&args.peer)], is_learner: args.learner };
    let answer = args.client.answer(cluster.member_add(request)).await?.into_inner();
    let id = id(answer.member.unwrap_or_default().id);
    let then = if args.learner { "`member promote` lets it vote" } else { "it votes when it has caught up" };
    Ok(done(args.output, &format!("added {id} as a learner; {then}"), &answer.members))
}

/// The id of a member, and what it is called in sentences.
async fn named(client: &ClientArgs, text: &str) -> anyhow::Result<(u64, String)> {
    let members = members::list(client).await?;
    let number = members::resolve(&members, text)?;
    let name = members.iter().find(|member| member.id == number && !member.name.is_empty());
    Ok((number, name.map_or_else(|| id(number), |member| format!("{} ({})", shown(&member.name), id(number)))))
}

pub async fn remove(args: WhichArgs) -> anyhow::Result<Vec<u8>> {
    let (id, label) = named(&args.client, &args.member).await?;
    let mut cluster = ClusterClient::new(args.client.connect().await?);
    let answer = args.client.answer(cluster.member_remove(MemberRemoveRequest { id })).await?.into_inner();
    Ok(done(args.output, &format!("removed {label}"), &answer.members))
}

pub async fn update(args: UpdateArgs) -> anyhow::Result<Vec<u8>> {
    let (id, label) = named(&args.client, &args.member).await?;
    let mut cluster = ClusterClient::new(args.client.connect().await?);
    let request = MemberUpdateRequest { id, peer_ur_ls: vec![url(&args.peer)] };
    let answer = args.client.answer(cluster.member_update(request)).await?.into_inner();
    Ok(done(args.output, &format!("updated {label}"), &answer.members))
}

pub async fn promote(args: WhichArgs) -> anyhow::Result<Vec<u8>> {
    let (id, label) = named(&args.client, &args.member).await?;
    let mut cluster = ClusterClient::new(args.client.connect().await?);
    let answer = args.client.answer(cluster.member_promote(MemberPromoteRequest { id })).await?.into_inner();
    Ok(done(args.output, &format!("{label} votes"), &answer.members))
}

pub async fn scale(args: ScaleArgs) -> anyhow::Result<Vec<u8>> {
    let mut admin = AdminClient::new(args.client.connect().await?);
    let request = ScaleRequest { replicas: args.replicas.unwrap_or(0), start: args.start };
    let wanted = args.client.answer(admin.scale(request)).await?.into_inner().wanted.unwrap_or_default();
    let view = args.client.answer(admin.membership(MembershipRequest {})).await?.into_inner();
    let remarks = || view.remarks.iter().filter(|remark| remark.name == "two-sizes");
    if args.output == Format::Json {
        return Ok(json_line(&json!({
            "replicas": (wanted.replicas > 0).then_some(wanted.replicas),
            "start": (wanted.replicas > 0).then_some(wanted.start),
            "remarks": remarks().map(|remark| remark.sentence.clone()).collect::<Vec<_>>(),
        })));
    }
    let mut text = match wanted.replicas {
        0 => "no size is wanted; every member stays\n".to_owned(),
        replicas => format!("wanted: {replicas} members, slots {} to {}\n", wanted.start, wanted.start + replicas - 1),
    };
    for remark in remarks() {
        text += &format!("{}\n", remark.sentence);
    }
    Ok(text.into_bytes())
}

pub async fn why(args: WhyArgs) -> anyhow::Result<Vec<u8>> {
    let mut admin = AdminClient::new(args.client.connect_for_status().await?);
    let view = args.client.answer(admin.membership(MembershipRequest {})).await?.into_inner();
    if view.members.is_empty() && view.remarks.is_empty() && view.conditions.is_empty() {
        bail!("this member belongs to no cluster; see `quorate status`");
    }
    Ok(match args.output {
        Format::Simple => why_text(&view),
        Format::Json => json_line(&membership_json(&view)),
    })
}

/// What is wanted, what is done, what blocks: in this order, for it is the order of the questions.
fn why_text(view: &MembershipView) -> Vec<u8> {
    let wanted = view.wanted.clone().unwrap_or_default();
    let mut lines = vec![match (&wanted.origin[..], &wanted.unknown[..]) {
        ("none" | "", _) => "wanted:   no size is set; every member stays".to_owned(),
        (origin, "") if wanted.replicas > 0 => {
            let last = wanted.start + wanted.replicas - 1;
            format!("wanted:   {} members, slots {} to {last} (from {origin})", wanted.replicas, wanted.start)
        }
        (origin, "") => format!("wanted:   none: a shutdown (from {origin})"),
        (origin, why) => format!("wanted:   not known (from {origin}): {why}"),
    }];
    lines.push(match view.leader_id {
        0 => "leader:   none is known, so nothing changes".to_owned(),
        id => format!("leader:   {id:016x}, term {}", view.term),
    });
    if !view.change.is_empty() {
        lines.push(format!("change:   {}", view.change));
    }
    lines.push(match &view.blocked {
        Some(blocked) => format!("blocked:  [{}] {}", blocked.name, blocked.sentence),
        None => "blocked:  nothing".to_owned(),
    });
    // An older server has remarks alone.
    let remarks = view.remarks.iter().filter(|_| view.conditions.is_empty());
    lines.extend(remarks.map(|remark| format!("remark:   [{}] {}", remark.name, remark.sentence)));
    let cells = |member: &crate::pb::admin::Member| {
        let seen = view.leader_id != 0;
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        vec![
            format!("{:016x}", member.id),
            member.name.clone(),
            if member.slot > u32::from(SLOT_MAX) { "-".into() } else { member.slot.to_string() },
            member.role.clone(),
            member.kind.clone(),
            if seen { member.lag_entries.to_string() } else { "-".into() },
            if seen { yes(member.reachable) } else { "-".into() },
            if seen { yes(member.caught_up) } else { "-".into() },
            yes(!member.condemned),
            member.peer_address.clone(),
        ]
    };
    let head = ["ID", "NAME", "SLOT", "ROLE", "KIND", "LAG", "REACHED", "CAUGHT UP", "WANTED", "PEER ADDRESS"];
    let rows = view.members.iter().map(cells).collect::<Vec<_>>();
    let conditions = condition_lines(&view.conditions).into_bytes();
    [(lines.join("\n") + "\n").into_bytes(), table(&head, &rows), conditions].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::admin::{Remark, Wanted};

    #[test]
    fn why_says_what_is_wanted_and_what_blocks() {
        let view = MembershipView {
            leader_id: 0xa,
            term: 3,
            wanted: Some(Wanted { origin: "command".into(), start: 0, replicas: 3, ..Wanted::default() }),
            blocked: Some(Remark { name: "quorum".into(), sentence: "it needs 2".into() }),
            ..MembershipView::default()
        };
        let text = String::from_utf8(why_text(&view)).unwrap();
        assert!(text.contains("3 members, slots 0 to 2 (from command)"), "{text}");
        assert!(text.contains("[quorum] it needs 2"), "{text}");
    }
}
