//! What a put costs the servers, against one thing that grows. Absent: two things at a time, and other requests.

use crate::servers::Servers;
use crate::streams::{Watched, Watchers};
use crate::works::{self, Data, Op};
use crate::{Round, VALUE_BYTES};

pub const WORKS: &[&str] = &["put-by-keys", "put-by-watchers", "put-by-members", "put-by-value"];

const CLIENTS: usize = 64;
const WATCHERS: [u64; 3] = [0, 1000, 10_000];
const MEMBERS: [u64; 3] = [1, 3, 5];
const VALUES: [usize; 6] = [16, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
/// Keys with larger values are fewer: the history of a measurement must stay below the quota.
const VALUE_KEYS: u64 = 1000;

pub async fn measure(round: &mut Round<'_>, work: &str) -> anyhow::Result<()> {
    let args = round.args;
    let data = Data { keys: args.keys, value_bytes: VALUE_BYTES };
    match work {
        "put-by-keys" => {
            let servers = round.servers(3).await?;
            let mut there = 0;
            for keys in [1000, 10_000, 100_000, 1_000_000].into_iter().filter(|keys| *keys <= args.many_keys) {
                works::fill(&servers, args, there..keys, VALUE_BYTES).await?;
                there = keys;
                put(round, &servers, work, &format!("{keys} keys"), Data { keys, ..data }).await?;
            }
        }
        "put-by-watchers" => {
            let servers = round.servers(3).await?;
            works::fill(&servers, args, 0..data.keys, VALUE_BYTES).await?;
            for count in WATCHERS.into_iter().filter(|count| *count <= args.many_keys) {
                let watchers = Watchers::open(&servers, args.connections, count, Watched::OtherKeys).await?;
                put(round, &servers, work, &format!("{count} watchers"), data).await?;
                drop(watchers);
            }
        }
        "put-by-members" => {
            for size in MEMBERS {
                let servers = round.servers(size).await?;
                works::fill(&servers, args, 0..data.keys, VALUE_BYTES).await?;
                put(round, &servers, work, &format!("{size} members"), data).await?;
            }
        }
        _ => {
            let servers = round.servers(3).await?;
            for value_bytes in VALUES {
                let data = Data { keys: VALUE_KEYS.min(args.keys), value_bytes };
                put(round, &servers, work, &format!("{value_bytes} bytes"), data).await?;
            }
        }
    }
    Ok(())
}

async fn put(round: &mut Round<'_>, servers: &Servers, work: &str, case: &str, data: Data) -> anyhow::Result<()> {
    let seen = works::measure(servers, round.args, CLIENTS, Op::Put, data).await?;
    round.record_seen(work, case, &seen);
    servers.compact().await
}
