//! What a member's memory goes to: one thing after the other is added, in great number, and the growth divided by that number.
//! Absent: who asked for it inside of the process; resident memory is all that is looked at.

use std::time::Duration;

use quorate::pb::etcd::RangeRequest;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::lease_client::LeaseClient;
use tonic::Status;

use crate::client::connect;
use crate::servers::Servers;
use crate::streams::{self, Watched, Watchers};
use crate::works::{self, Data, Op};
use crate::{MIB, Round, VALUE_BYTES};

const CONNECTIONS: usize = 2000;
const WATCHERS: u64 = 10_000;
const LEASES: usize = 50_000;
const LEASE_CLIENTS: usize = 64;
/// In which what was asked for last is done with, at most.
const SETTLE_SECONDS: f64 = 2.0;

pub async fn measure(round: &mut Round<'_>) -> anyhow::Result<()> {
    let (args, servers) = (round.args, round.servers(3).await?);
    let scale = |full: u64| full * args.many_keys / 1_000_000;
    let members = servers.size as f64;
    // Of all members together, when they have come to rest.
    let resident = async |servers: &Servers| {
        tokio::time::sleep(Duration::from_secs_f64(SETTLE_SECONDS.min(args.seconds))).await;
        servers.resident_bytes()
    };
    let empty = resident(&servers).await;
    round.note("memory", "an empty member", "resident_mib", empty / members / MIB);

    let count = scale(CONNECTIONS as u64).max(8);
    let connections = connect(&servers.endpoints(), count as usize)?;
    for connection in &connections {
        KvClient::new(connection.clone()).range(RangeRequest { key: "k".into(), ..Default::default() }).await?;
    }
    let with = resident(&servers).await;
    round.note("memory", "a connection", "bytes_each", (with - empty) / count as f64);
    drop(connections);

    let count = scale(WATCHERS).max(10);
    let before = resident(&servers).await;
    let watchers = Watchers::open(&servers, args.connections, count, Watched::OtherKeys).await?;
    let with = resident(&servers).await;
    round.note("memory", "a watcher", "bytes_each", (with - before) / count as f64);
    drop(watchers);

    let count = scale(LEASES as u64).max(64);
    let before = resident(&servers).await;
    grant(&servers, args.connections, count).await?;
    let with = resident(&servers).await;
    round.note("memory", "a lease", "bytes_each", (with - before) / count as f64 / members);

    let keys = scale(200_000).max(1000);
    let data = Data { keys, value_bytes: VALUE_BYTES };
    let before = resident(&servers).await;
    works::fill(&servers, args, 0..keys, VALUE_BYTES).await?;
    let with = resident(&servers).await;
    round.note("memory", "a key of 256 bytes", "bytes_each", (with - before) / keys as f64 / members);

    for (op, count) in [(Op::Put, keys), (Op::Txn, keys / 2), (Op::Get, keys), (Op::Range, keys / 10)] {
        works::run(&servers, args, op, data, count).await?;
    }
    let with = resident(&servers).await;
    round.note("memory", "after the same works", "resident_mib", with / members / MIB);
    servers.compact().await?;
    let with = resident(&servers).await;
    round.note("memory", "and compaction", "resident_mib", with / members / MIB);
    Ok(())
}

async fn grant(servers: &Servers, connections: usize, count: u64) -> anyhow::Result<()> {
    let channels = connect(&servers.endpoints(), connections)?;
    let tasks = channels.into_iter().cycle().take(LEASE_CLIENTS).map(|channel| {
        tokio::spawn(async move {
            let mut client = LeaseClient::new(channel);
            for _ in 0..count / LEASE_CLIENTS as u64 {
                streams::grant(&mut client).await?;
            }
            Ok::<_, Status>(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    Ok(())
}
