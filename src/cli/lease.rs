//! `lease grant|keep-alive|revoke|list|ttl`, and keeping a lease alive for the other commands.
//!
//! Ids are hexadecimal throughout, as in what `list` prints. Absent: guessing whether a lease that cannot be kept alive now still
//! lives; that ends when its time is over.

use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use futures_util::StreamExt as _;
use serde_json::json;

use super::client::{ClientArgs, failure};
use super::output::{Format, Lines, base64, header_json, json_line, lease_id, table};
use super::print;
use crate::cli::credentials::Channel;
use crate::config::units::duration;
use crate::env::{Instant, sleep, timeout};
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest,
};

#[derive(Debug, clap::Subcommand)]
pub enum LeaseCommand {
    /// Make a lease, and print its id
    Grant(GrantArgs),
    /// Keep a lease alive until Ctrl-C, or until it is gone
    KeepAlive(KeepAliveArgs),
    /// End a lease; its keys are deleted
    Revoke(IdArgs),
    /// Print the ids of all leases
    List(ListArgs),
    /// Show how long a lease lives, and its keys
    Ttl(TtlArgs),
}

#[derive(Debug, clap::Args)]
pub struct GrantArgs {
    /// How long it lives without being kept alive, such as 90s, or 60 for seconds; the server may raise it to the least that it grants
    #[arg(value_parser = parse_ttl)]
    ttl: Duration,
    /// The id, hexadecimal; left out: the server chooses
    #[arg(long, value_parser = parse_id)]
    id: Option<i64>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct KeepAliveArgs {
    /// Hexadecimal
    #[arg(value_parser = parse_id, allow_hyphen_values = true)]
    id: i64,
    /// Once, and end
    #[arg(long)]
    once: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct IdArgs {
    /// Hexadecimal
    #[arg(value_parser = parse_id)]
    id: i64,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct TtlArgs {
    /// Hexadecimal
    #[arg(value_parser = parse_id)]
    id: i64,
    /// Also list the keys that go with it
    #[arg(long)]
    keys: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// An id as it is printed: hexadecimal, of 64 bits.
pub fn parse_id(text: &str) -> Result<i64, String> {
    let id = u64::from_str_radix(text.trim_start_matches("0x"), 16);
    match id {
        Ok(id) if id != 0 => Ok(id as i64),
        _ => Err(format!("got {text:?}, expected the hexadecimal id of a lease, as `quorate lease list` prints it")),
    }
}

pub async fn run(command: LeaseCommand) -> anyhow::Result<()> {
    match command {
        LeaseCommand::Grant(args) => grant(args).await,
        LeaseCommand::KeepAlive(args) => keep_alive(args).await,
        LeaseCommand::Revoke(args) => {
            let mut client = LeaseClient::new(args.client.connect().await?);
            let answer =
                args.client.answer(client.lease_revoke(LeaseRevokeRequest { id: args.id })).await?.into_inner();
            print(&match args.output {
                Format::Simple => format!("{} revoked\n", lease_id(args.id)).into_bytes(),
                Format::Json => {
                    json_line(&json!({ "header": header_json(answer.header.as_ref()), "id": lease_id(args.id) }))
                }
            })
        }
        LeaseCommand::List(args) => list(args).await,
        LeaseCommand::Ttl(args) => ttl(args).await,
    }
}

/// A number alone is seconds, as etcd's own client takes it.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => duration::parse(text).map_err(|error| error.to_string()),
    }
}

/// Whole seconds, rounded up.
pub fn seconds(ttl: Duration) -> i64 {
    i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX)
}

async fn grant(args: GrantArgs) -> anyhow::Result<()> {
    let mut client = LeaseClient::new(args.client.connect().await?);
    let request = LeaseGrantRequest { ttl: seconds(args.ttl), id: args.id.unwrap_or(0) };
    let asked = request.ttl;
    let answer = args.client.answer(client.lease_grant(request)).await?.into_inner();
    if answer.ttl != asked {
        eprintln!("quorate: the lease lives {}s, not {asked}s: the server grants no less", answer.ttl);
    }
    match args.output {
        Format::Simple => print(format!("{}\n", lease_id(answer.id)).as_bytes()),
        Format::Json => print(&json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "id": lease_id(answer.id),
            "ttl": answer.ttl,
        }))),
    }
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let ask = async |channel: Channel| LeaseClient::new(channel).lease_leases(LeaseLeasesRequest {}).await;
    let answer = args.client.read(ask).await?.into_inner();
    let ids = answer.leases.iter().map(|lease| lease_id(lease.id));
    match args.output {
        Format::Simple => print(ids.map(|id| id + "\n").collect::<String>().as_bytes()),
        Format::Json => print(&json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "leases": ids.collect::<Vec<_>>(),
        }))),
    }
}

async fn ttl(args: TtlArgs) -> anyhow::Result<()> {
    let request = LeaseTimeToLiveRequest { id: args.id, keys: args.keys };
    let ask = async |channel: Channel| LeaseClient::new(channel).lease_time_to_live(request).await;
    let answer = args.client.read(ask).await?.into_inner();
    ensure!(answer.ttl >= 0, "{}", gone(args.id));
    if args.output == Format::Json {
        return print(&json_line(&json!({
            "header": header_json(answer.header.as_ref()),
            "id": lease_id(answer.id),
            "ttl": answer.ttl,
            "granted_ttl": answer.granted_ttl,
            "keys": answer.keys.iter().map(|key| base64(key)).collect::<Vec<_>>(),
        })));
    }
    let row = vec![lease_id(answer.id), format!("{}s", answer.granted_ttl), format!("{}s", answer.ttl)];
    let mut keys = Lines::new(false);
    answer.keys.iter().for_each(|key| keys.key(key));
    print(&[table(&["LEASE", "GRANTED", "LEFT"], &[row]), keys.finish()].concat())
}

fn gone(id: i64) -> String {
    format!("there is no lease {}: it has expired or was revoked; grant a new one", lease_id(id))
}

async fn keep_alive(args: KeepAliveArgs) -> anyhow::Result<()> {
    let renewed = |ttl: i64| {
        print(&match args.output {
            Format::Simple => format!("{} lives {ttl}s\n", lease_id(args.id)).into_bytes(),
            Format::Json => json_line(&json!({ "id": lease_id(args.id), "ttl": ttl })),
        })
    };
    if args.once {
        return renewed(renew(&args.client, args.client.timeout, &mut None, args.id).await?);
    }
    tokio::select! {
        lost = keep(&args.client, args.id, None, renewed) => Err(lost),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

/// Keeps a lease alive by a third of its time; returns only when it is gone, or may be. `ttl`: what it was granted just now.
pub async fn keep(
    args: &ClientArgs,
    id: i64,
    ttl: Option<i64>,
    mut renewed: impl FnMut(i64) -> anyhow::Result<()>,
) -> anyhow::Error {
    let mut args = args.clone();
    let mut channel = None;
    let mut lives_until = ttl.map(|ttl| Instant::now() + Duration::from_secs(ttl as u64));
    let mut pause = Duration::from_secs(ttl.unwrap_or(0) as u64) / 3;
    loop {
        sleep(pause).await;
        let asked = Instant::now();
        // A member that does not answer must not cost the lease.
        let patience = args.timeout.min(pause.max(Duration::from_secs(1)));
        match renew(&args, patience, &mut channel, id).await {
            Ok(ttl) => {
                lives_until = Some(asked + Duration::from_secs(ttl as u64));
                pause = Duration::from_secs(ttl as u64) / 3;
                if let Err(error) = renewed(ttl) {
                    return error;
                }
            }
            // Another member may answer, as long as the lease lives.
            Err(error) if error.is::<Gone>() || lives_until.is_none_or(|end| Instant::now() >= end) => return error,
            Err(_) => {
                channel = None;
                args.endpoints.rotate_left(1);
                pause = Duration::from_millis(200);
            }
        }
    }
}

/// The lease does not exist any more.
#[derive(Debug, thiserror::Error)]
#[error("{}", gone(self.0))]
struct Gone(i64);

/// One keep-alive. `channel` is kept for the next.
async fn renew(args: &ClientArgs, patience: Duration, channel: &mut Option<Channel>, id: i64) -> anyhow::Result<i64> {
    let connected = match channel.take() {
        Some(connected) => connected,
        None => args.connect().await?,
    };
    let mut client = LeaseClient::new(connected.clone());
    let request = tokio_stream::once(LeaseKeepAliveRequest { id });
    let asking = async {
        let mut answers = client.lease_keep_alive(request).await?.into_inner();
        answers.next().await.transpose()
    };
    match timeout(patience, asking).await {
        Ok(Ok(Some(answer))) if answer.ttl > 0 => {
            *channel = Some(connected);
            Ok(answer.ttl)
        }
        Ok(Ok(Some(_))) => Err(Gone(id).into()),
        Ok(Ok(None)) => bail!("the server ended the stream without an answer; see `quorate status`, then retry"),
        Ok(Err(status)) => Err(failure(&status)),
        Err(_) => Err(anyhow!("no answer within {}", humantime::format_duration(patience))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_hexadecimal() {
        assert_eq!(parse_id("694d71ddacfda227"), Ok(0x694d_71dd_acfd_a227));
        assert_eq!(parse_id("ffffffffffffffff"), Ok(-1), "as a negative id is printed");
        assert_eq!(parse_id("0x1f"), Ok(31));
        for wrong in ["", "0", "g", "1 2", "10000000000000000"] {
            assert!(parse_id(wrong).unwrap_err().contains("hexadecimal"), "{wrong}");
        }
    }

    #[test]
    fn a_number_alone_is_seconds() {
        assert_eq!((parse_ttl("60"), parse_ttl("1m")), (Ok(Duration::from_secs(60)), Ok(Duration::from_secs(60))));
        assert!(parse_ttl("60x").is_err() && parse_ttl("-1").is_err());
    }

    #[test]
    fn times_are_whole_seconds_rounded_up() {
        assert_eq!((seconds(Duration::from_millis(1500)), seconds(Duration::from_secs(60))), (2, 60));
    }
}
