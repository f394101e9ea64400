//! Members of one version, rolled to another under load, and back until the cluster version has risen.
//!
//!     .ci/long roll                                                   # builds version 0.1 and this one, and runs this
//!     cargo run --release --example roll -- --from OLD --to NEW
//!
//! Three members of the old program form a cluster; the good clients of the example `hostile` use it all the time. Each member in turn is
//! ended by SIGTERM and started again with the other program on its disk: two to the new one and back, in random order, `--rounds`
//! times, one of them killed instead of ended; then all three, after which the cluster version rises. After each step every member that
//! runs holds what was acknowledged, and all have the same HashKV. Ends with exit code 1 if something acknowledged is missing, a good
//! client was told something wrong, members differ, or a member ended by itself.

#[path = "../hostile/good.rs"]
#[allow(dead_code, reason = "what the example `hostile` needs beside")]
mod good;
#[path = "../compare/servers.rs"]
#[allow(dead_code, reason = "what the example `compare` needs beside")]
mod servers;
#[path = "../../tests/it/support/mod.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "what the integration tests share; more than is needed here")]
mod support;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use good::Good;
use quorate::pb::etcd::HashKvRequest;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use rustix::process::{Pid, Signal, kill_process};
use servers::{Kind, Program, Servers};
use support::cluster::{binary, http_get};

const MEMBERS: u64 = 3;
/// In which the cluster version has risen, if it does.
const RISE_PATIENCE: Duration = Duration::from_secs(5);

#[derive(clap::Parser)]
struct Args {
    /// The program that the members run at first
    #[arg(long)]
    from: PathBuf,
    /// The program that they are rolled to; without it, the one beside this program
    #[arg(long)]
    to: Option<PathBuf>,
    /// Ways there and back before all are rolled
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Decides the order; random if it is not given
    #[arg(long)]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let program = |name: &str, path| Program { name: name.into(), path, kind: Kind::Quorate };
    let (old, new) = (program("old", args.from), program("new", args.to.unwrap_or_else(binary)));
    let mut servers = Servers::start(&old, MEMBERS, &std::env::temp_dir()).await?;
    // A cluster begins at the lowest version, and rises to what its members know.
    tokio::time::sleep(RISE_PATIENCE).await;
    let first_version = cluster_version(&servers).await?;
    println!("cluster version {first_version}, all members old");
    let good = Good::start(&servers)?;
    for _ in 0..args.rounds {
        let mut slots: Vec<u64> = (0..MEMBERS).collect();
        random.shuffle(&mut slots);
        let killed = random.usize(..2);
        for (i, slot) in slots[..2].iter().enumerate() {
            exchange(&mut servers, *slot, &new, i == killed).await?;
        }
        ensure!(cluster_version(&servers).await? == first_version, "the cluster version rose before all are new");
        random.shuffle(&mut slots[..2]);
        for (i, slot) in slots[..2].iter().enumerate() {
            exchange(&mut servers, *slot, &old, i == killed).await?;
        }
    }
    for slot in 0..MEMBERS {
        exchange(&mut servers, slot, &new, false).await?;
    }
    // The new program's own version is not told; it is risen when all agree on another one, or it is the same one.
    let last = servers
        .wait("the cluster version to rise, or to stay", async || {
            let version = cluster_version(&servers).await?;
            ensure!(version >= first_version, "it fell from {first_version} to {version}");
            Ok(version)
        })
        .await?;
    tokio::time::sleep(RISE_PATIENCE).await;
    println!("cluster version {} (was {first_version}), all members new", cluster_version(&servers).await?.max(last));
    let seen = good.stop(&servers).await?;
    equal_hashes(&servers).await?;
    println!("good clients: {} calls, {} failed", seen.count(), seen.failures());
    for (text, count) in &seen.failed {
        println!("  {count:>6}  {text}");
    }
    ensure!(seen.wrong.is_empty(), "told wrong, with --seed {seed}: {:#?}", seen.wrong);
    println!("nothing lost, nothing wrong, equal hashes");
    Ok(())
}

/// Ends a member and starts it again as another program.
async fn exchange(servers: &mut Servers, slot: u64, program: &Program, killed: bool) -> anyhow::Result<()> {
    let pid = *servers.pids().get(slot as usize).context("the member does not run")?;
    if !killed {
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw).context("the member has no process")?;
        kill_process(process, Signal::TERM).context("the member ended by itself")?;
        servers
            .wait(&format!("member {slot} to end"), async || {
                ensure!(servers::resident_bytes(pid).is_nan(), "it runs");
                Ok(())
            })
            .await?;
    }
    servers.kill(slot);
    servers.program = program.clone();
    servers.start_one(slot)?;
    servers.wait_ready(0..MEMBERS).await?;
    equal_hashes(servers).await?;
    println!(
        "member {slot} runs the {} program, {}",
        program.name,
        if killed { "killed before" } else { "ended before" }
    );
    Ok(())
}

/// As a member's `/cluster` says it.
async fn cluster_version(servers: &Servers) -> anyhow::Result<u64> {
    let (_, text) = http_get(&servers.endpoint(0), "/cluster").await?;
    let view: serde_json::Value = serde_json::from_str(&text)?;
    view["cluster_version"].as_u64().context("no cluster version")
}

/// At one revision that all have reached, so that the load may go on.
async fn equal_hashes(servers: &Servers) -> anyhow::Result<()> {
    let what = "equal hashes at one revision";
    let look = async || {
        let status = servers.status(0).await?;
        let revision = status.header.context("no header")?.revision;
        let mut hashes = Vec::new();
        for slot in 0..MEMBERS {
            let mut maintenance = MaintenanceClient::new(servers.channel(slot)?);
            hashes.push(maintenance.hash_kv(HashKvRequest { revision }).await?.into_inner().hash);
        }
        hashes.dedup();
        ensure!(hashes.len() == 1, "members differ at revision {revision}: {hashes:x?}");
        Ok(())
    };
    servers.wait(what, look).await
}
