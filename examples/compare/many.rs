//! A cluster that holds many keys: loading them, restarts, and what holds up requests meanwhile.
//!
//! Requests come at a fixed rate, far below what the servers can do, so that a latency shows a pause and not a queue. Each event is
//! made to happen, and it is checked that it did. Absent: what a kind of request costs (`short`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use quorate::pb::etcd::cluster_client::ClusterClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::{DefragmentRequest, MemberAddRequest, MemberRemoveRequest, SnapshotRequest};

use crate::client::{Pace, connect};
use crate::servers::{Kind, Servers};
use crate::support::cluster::http_get;
use crate::works::{self, Data, Op};
use crate::{MIB, Round, VALUE_BYTES};

pub const WORKS: &[&str] = &["load", "restart", "pause"];

/// Of the paced requests; 80 % of them linearizable gets, the others puts.
const PER_SECOND: f64 = 2000.0;
const CLIENTS: usize = 64;
const SCRAPE_INTERVAL: Duration = Duration::from_millis(250);
/// A member has caught up when it has what the leader had so long ago.
const CATCH_UP_AGE: Duration = Duration::from_secs(1);
/// Of ours: a log entry for so many keys brings a snapshot about, and then a purge. The default is beyond any short run.
const SNAPSHOT_PART: u64 = 500;

pub async fn measure(round: &mut Round<'_>) -> anyhow::Result<()> {
    let args = round.args;
    let data = Data { keys: args.many_keys, value_bytes: VALUE_BYTES };
    let case = format!("{} keys", data.keys);
    let mut servers = round.servers(3).await?;
    let (begin, cpu) = (Instant::now(), servers.cpu_micros());
    works::fill(&servers, args, 0..data.keys, VALUE_BYTES).await?;
    let seconds = begin.elapsed().as_secs_f64();
    round.note("load", &case, "seconds", seconds);
    round.note("load", &case, "per_s", data.keys as f64 / seconds);
    round.note("load", &case, "cpu_us", (servers.cpu_micros() - cpu) / data.keys as f64);
    round.note("load", &case, "resident_mib", servers.resident_bytes() / MIB);
    round.note("load", &case, "disk_mib", servers.disk_bytes() / MIB);
    if args.wants("restart") {
        restart(round, &mut servers).await?;
    }
    if args.wants("pause") {
        pauses(round, &mut servers, data).await?;
    }
    Ok(())
}

/// From the death of all members, and then of one follower, until they answer linearizable reads.
async fn restart(round: &mut Round<'_>, servers: &mut Servers) -> anyhow::Result<()> {
    servers.kill_all();
    let begin = Instant::now();
    servers.start_all()?;
    servers.wait_ready(0..servers.size).await?;
    round.note("restart", "all members", "seconds", begin.elapsed().as_secs_f64());
    round.note("restart", "all members", "resident_mib", servers.resident_bytes() / MIB);
    let follower = (servers.leader().await? + 1) % servers.size;
    servers.kill(follower);
    let begin = Instant::now();
    servers.start_one(follower)?;
    servers.wait_ready([follower]).await?;
    round.note("restart", "a follower", "seconds", begin.elapsed().as_secs_f64());
    Ok(())
}

async fn pauses(round: &mut Round<'_>, servers: &mut Servers, data: Data) -> anyhow::Result<()> {
    let args = round.args;
    // How long it is looked at what takes no time of its own.
    let look = Duration::from_secs_f64(2.0 * args.seconds);
    // History, for the compaction.
    works::run(servers, args, Op::Put, data, data.keys / 5).await?;
    let pace = start_pace(servers, data)?;
    pace.during(still(look)).await?;
    let ((), seen) = pace.during(checkpoints(servers, look)).await?;
    record(round, "checkpoints", &seen);
    let ((), seen) = pace.during(scrape(servers, look)).await?;
    record(round, "metrics scrapes", &seen);
    let ((), seen) = pace.during(backup(servers)).await?;
    record(round, "backup", &seen);
    let ((), seen) = pace.during(servers.compact()).await?;
    record(round, "compaction", &seen);
    let ((), seen) = pace.during(still(look)).await?;
    record(round, "after compaction", &seen);
    let ((), seen) = pace.during(defragment(servers)).await?;
    record(round, "defragmentation", &seen);
    pace.stop().await?;
    if servers.program.kind == Kind::Quorate {
        servers.kill_all();
        let entries = (args.many_keys / SNAPSHOT_PART).max(100);
        servers.set(&format!("log.entries_max={entries}"));
        servers.set(&format!("log.entries_kept={}", entries / 10));
        servers.start_all()?;
        servers.wait_ready(0..servers.size).await?;
        let pace = start_pace(servers, data)?;
        pace.during(still(look / 10)).await?;
        let ((), seen) = pace.during(snapshots(servers)).await?;
        record(round, "snapshot and purge", &seen);
        pace.stop().await?;
    }
    let pace = start_pace(servers, data)?;
    pace.during(still(look / 10)).await?;
    let (seconds, seen) = pace.during(join(servers)).await?;
    record(round, "new member", &seen);
    round.note("pause", "new member", "seconds", seconds);
    pace.stop().await
}

fn record(round: &mut Round<'_>, event: &str, seen: &Histogram<u64>) {
    for (metric, quantile) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999), ("max_ms", 1.0)] {
        round.note("pause", event, metric, seen.value_at_quantile(quantile) as f64 / 1000.0);
    }
}

fn start_pace(servers: &Servers, data: Data) -> anyhow::Result<Pace> {
    let channels = connect(&servers.endpoints(), CLIENTS)?;
    Ok(Pace::start(works::users(&channels, CLIENTS, Op::Mixed, data), PER_SECOND))
}

async fn still(time: Duration) -> anyhow::Result<()> {
    tokio::time::sleep(time).await;
    Ok(())
}

/// Nothing but what goes on all the time: checkpoints of the state, or what etcd calls commits of its backend.
async fn checkpoints(servers: &Servers, look: Duration) -> anyhow::Result<()> {
    let count = async || -> anyhow::Result<f64> {
        let (_, text) = http_get(&servers.endpoint(0), "/metrics").await?;
        let line = text.lines().find_map(|line| line.strip_prefix("etcd_disk_backend_commit_duration_seconds_count "));
        Ok(line.context("no count of checkpoints")?.parse()?)
    };
    let before = count().await?;
    still(look).await?;
    servers
        .wait("a checkpoint", async || {
            ensure!(count().await? > before, "none was made");
            Ok(())
        })
        .await
}

async fn scrape(servers: &Servers, look: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + look;
    while Instant::now() < end {
        for endpoint in servers.endpoints() {
            let (code, text) = http_get(&endpoint, "/metrics").await?;
            ensure!(code == 200 && text.contains("grpc_server_handled_total"), "no metrics: {code}");
        }
        tokio::time::sleep(SCRAPE_INTERVAL).await;
    }
    Ok(())
}

/// The leader's whole state, to a client.
async fn backup(servers: &Servers) -> anyhow::Result<()> {
    let leader = servers.leader().await?;
    let mut pieces = MaintenanceClient::new(servers.channel(leader)?).snapshot(SnapshotRequest {}).await?.into_inner();
    let mut bytes = 0;
    while let Some(piece) = pieces.message().await? {
        bytes += piece.blob.len();
    }
    ensure!(bytes > 0, "an empty backup");
    Ok(())
}

/// Every member, one after the other.
async fn defragment(servers: &Servers) -> anyhow::Result<()> {
    for slot in 0..servers.size {
        MaintenanceClient::new(servers.channel(slot)?).defragment(DefragmentRequest {}).await?;
    }
    Ok(())
}

/// Until every member has written a snapshot, and had time to purge its log behind it.
async fn snapshots(servers: &Servers) -> anyhow::Result<()> {
    let written = |slot: u64| servers.log_text(slot).matches("snapshot written").count();
    let before: Vec<usize> = (0..servers.size).map(written).collect();
    servers
        .wait("every member to write a snapshot", async || {
            let all = (0..).zip(&before).all(|(slot, before)| written(slot) > *before);
            ensure!(all, "not all have");
            Ok(())
        })
        .await?;
    still(Duration::from_secs(2)).await
}

/// Adds a learner with an empty disk; returns the seconds until it has caught up. It is gone afterwards.
async fn join(servers: &mut Servers) -> anyhow::Result<f64> {
    let slot = servers.size;
    let leader = servers.leader().await?;
    let mut cluster = ClusterClient::new(servers.channel(leader)?);
    let add = MemberAddRequest { peer_ur_ls: vec![format!("http://{}", servers.peer_address(slot))], is_learner: true };
    let begin = Instant::now();
    // Of ours a node must be there to be added; of etcd's the node must be added to be there.
    if servers.program.kind == Kind::Quorate {
        servers.spawn_joiner(slot)?;
    }
    let add = async || Ok(cluster.member_add(add.clone()).await?.into_inner());
    let added = servers.wait("the member to be added", add).await?;
    if servers.program.kind == Kind::Etcd {
        servers.spawn_joiner(slot)?;
    }
    let mut known: VecDeque<(Instant, i64)> = VecDeque::new();
    servers
        .wait("the new member to catch up", async || {
            known.push_back((Instant::now(), revision(servers, leader).await?));
            let has = revision(servers, slot).await?;
            while known.get(1).is_some_and(|(at, _)| at.elapsed() > CATCH_UP_AGE) {
                known.pop_front();
            }
            let (at, wanted) = known.front().context("one was added")?;
            ensure!(at.elapsed() > CATCH_UP_AGE && has >= *wanted, "it is at revision {has} of {wanted}");
            Ok(())
        })
        .await?;
    let seconds = begin.elapsed().as_secs_f64();
    if servers.program.kind == Kind::Quorate {
        ensure!(servers.log_text(slot).contains("snapshot installed"), "the member caught up without a snapshot");
    }
    let id = added.member.context("no member")?.id;
    cluster.member_remove(MemberRemoveRequest { id }).await?;
    servers.kill(slot);
    Ok(seconds)
}

async fn revision(servers: &Servers, slot: u64) -> anyhow::Result<i64> {
    Ok(servers.status(slot).await?.header.context("no header")?.revision)
}
