//! `promote`: a standby takes the place of the cluster that it follows.
//!
//! What may be lost is printed: what that cluster has acknowledged and not archived in time. Absent: the decision, which the asked member
//! makes with the store (`backup::succession`).

use std::time::Duration;

use serde_json::json;

use super::client::ClientArgs;
use super::output::{Format, json_line};
use crate::backup::plan::shown;
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::admin::{PromoteRequest, PromoteResponse};

/// The asked member reads the rest of the path first.
const LEAST_PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, clap::Args)]
pub struct PromoteArgs {
    /// Go on with the same revisions. Without this they jump by a billion and everything before counts as compacted, so that clients which
    /// remember later revisions of the other cluster are told so instead of being misled
    #[arg(long)]
    same_revisions: bool,
    /// The store of the backups is gone for good: do not ask it. Nothing then tells the other cluster, which must never run again
    #[arg(long)]
    without_store: bool,
    /// Of a cluster that was superseded itself: take writes again, and give up what was written to the one in its place
    #[arg(long)]
    take_back: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn promote(mut args: PromoteArgs) -> anyhow::Result<Vec<u8>> {
    args.client.timeout = args.client.timeout.max(LEAST_PATIENCE);
    let mut admin = AdminClient::new(args.client.connect().await?);
    let PromoteArgs { same_revisions, without_store, take_back, .. } = args;
    let request = PromoteRequest { same_revisions, without_store, take_back };
    let answer = args.client.answer(admin.promote(request)).await?.into_inner();
    Ok(match args.output {
        Format::Simple => text(&answer, take_back).into_bytes(),
        Format::Json => json_line(&json!({
            "revision": answer.revision,
            "generation": answer.generation,
            "sourceRevision": answer.source_revision,
            "sourceAt": (answer.source_at_millis > 0).then(|| shown(answer.source_at_millis)),
        })),
    })
}

fn text(answer: &PromoteResponse, take_back: bool) -> String {
    let mut text = format!("this cluster takes writes from here on, after revision {}\n", answer.revision);
    if !take_back {
        let upto = match answer.source_at_millis {
            0 => "what the full backup held that it was formed with".to_owned(),
            at => format!("everything that the other cluster had applied at {}", shown(at)),
        };
        text += &format!(
            "it has {upto}, which is revision {} there; what was written there since, if anything, is lost with it\n",
            answer.source_revision
        );
    }
    text + &match answer.generation {
        0 => "the store was not asked: nothing tells the other cluster, which must never run again\n".to_owned(),
        generation => format!(
            "generation {generation} has begun at the path: the other cluster takes no writes once its leader has seen that, and goes on as long \
             as it cannot reach the store\n"
        ),
    }
}
