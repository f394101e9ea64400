//! Works of some seconds each, one after the other in one cluster. Absent: the clients' loops (`client`, `streams`).

use crate::client::closed_loop;
use crate::servers::{Kind, Servers};
use crate::streams::{Keeper, Watched, Watchers, Writer};
use crate::works::{self, Data, Op};
use crate::{Args, Round, VALUE_BYTES};

pub const WORKS: &[&str] = &[
    "put",
    "get",
    "get-serializable",
    "mixed",
    "range",
    "txn",
    "large-put",
    "watch",
    "keep-alive",
    "one-client",
    "allocations",
];
/// Those of them that are one kind of request on the keys.
pub const ON_KEYS: &[&str] = WORKS.split_at(6).0;

const LARGE_VALUE_BYTES: usize = 64 << 10;
/// Keys with large values: the history of a few seconds must stay below the quota, which is 2 GiB for both.
const LARGE_KEYS: u64 = 1000;
const LARGE_SECONDS: f64 = 3.0;
const FANOUT_WATCHERS: u64 = 1000;
/// Requests of each kind whose allocations are counted.
const COUNTED: u64 = 20_000;

pub async fn measure(round: &mut Round<'_>) -> anyhow::Result<()> {
    let args = round.args;
    let data = Data { keys: args.keys, value_bytes: VALUE_BYTES };
    let servers = round.servers(3).await?;
    works::fill(&servers, args, 0..data.keys, data.value_bytes).await?;
    for work in WORKS.iter().filter(|work| args.wants(work)) {
        match *work {
            "large-put" => large(round, &servers).await?,
            "watch" => fan_out(round, &servers).await?,
            "keep-alive" => keep_alive(round, &servers).await?,
            "one-client" => one_client(round, &servers, data).await?,
            "allocations" => allocations(round, &servers, data).await?,
            _ => {
                for clients in &args.clients {
                    let seen = works::measure(&servers, args, *clients, op(work), data).await?;
                    round.record_seen(work, &format!("{clients} clients"), &seen);
                }
            }
        }
    }
    Ok(())
}

fn op(work: &str) -> Op {
    match work {
        "put" => Op::Put,
        "get" => Op::Get,
        "get-serializable" => Op::GetSerializable,
        "mixed" => Op::Mixed,
        "range" => Op::Range,
        "txn" => Op::Txn,
        _ => unreachable!("{work} is no request on keys"),
    }
}

async fn large(round: &mut Round<'_>, servers: &Servers) -> anyhow::Result<()> {
    let data = Data { keys: round.args.keys.min(LARGE_KEYS), value_bytes: LARGE_VALUE_BYTES };
    let args = Args { seconds: round.args.seconds.min(LARGE_SECONDS), ..round.args.clone() };
    let clients = args.clients[0];
    let seen = works::measure(servers, &args, clients, Op::Put, data).await?;
    round.record_seen("large-put", &format!("{clients} clients"), &seen);
    servers.compact().await
}

/// One client puts; a put is done when every watcher has it.
async fn fan_out(round: &mut Round<'_>, servers: &Servers) -> anyhow::Result<()> {
    let args = round.args;
    let watchers = Watchers::open(servers, args.connections, FANOUT_WATCHERS, Watched::TheKey).await?;
    let writer = Writer::new(servers, watchers, VALUE_BYTES)?;
    let seen = closed_loop(vec![writer], args.seconds, servers).await?;
    round.record_seen("watch", &format!("{FANOUT_WATCHERS} watchers"), &seen);
    Ok(())
}

async fn keep_alive(round: &mut Round<'_>, servers: &Servers) -> anyhow::Result<()> {
    let args = round.args;
    for clients in &args.clients {
        let keepers = Keeper::open_all(servers, args.connections, *clients).await?;
        let seen = closed_loop(keepers, args.seconds, servers).await?;
        round.record_seen("keep-alive", &format!("{clients} clients"), &seen);
    }
    Ok(())
}

/// What a client sees that is alone: at the leader, and at a follower.
async fn one_client(round: &mut Round<'_>, servers: &Servers, data: Data) -> anyhow::Result<()> {
    let leader = servers.leader().await?;
    for (place, slot) in [("at the leader", leader), ("at a follower", (leader + 1) % servers.size)] {
        for (name, op) in [("put", Op::Put), ("get", Op::Get)] {
            let users = works::users(&[servers.channel(slot)?], 1, op, data);
            let seen = closed_loop(users, round.args.seconds, servers).await?;
            round.record_seen("one-client", &format!("{name} {place}"), &seen);
        }
    }
    Ok(())
}

/// What the servers together allocate for a request of each kind; of ours, built to count that.
async fn allocations(round: &mut Round<'_>, servers: &Servers, data: Data) -> anyhow::Result<()> {
    if servers.program.kind == Kind::Etcd {
        return Ok(());
    }
    for work in ON_KEYS {
        works::run(servers, round.args, op(work), data, COUNTED).await?;
        let before = servers.allocated().await?;
        works::run(servers, round.args, op(work), data, COUNTED).await?;
        let after = servers.allocated().await?;
        round.note("allocations", work, "allocations", (after.count - before.count) / COUNTED as f64);
        round.note("allocations", work, "bytes_each", (after.bytes - before.bytes) / COUNTED as f64);
    }
    Ok(())
}
