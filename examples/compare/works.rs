//! Requests on keys: what one client of a closed loop, or of a pace, sends.
//!
//! Keys are `bench/<number>` in twelve digits, values have a fixed size, and which key is next is drawn from a seed that is the client's number.
//! Absent: how often and for how long (`client`).

use std::ops::Range;

use anyhow::ensure;
use bytes::Bytes;
use quorate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::request_op::Request;
use quorate::pb::etcd::{Compare, PutRequest, RangeRequest, RequestOp, TxnRequest};
use tonic::Status;
use tonic::transport::Channel;

use crate::Args;
use crate::client::{Client, Seen, closed_loop, connect};
use crate::servers::Servers;

/// Keys that one range request asks for.
const RANGE_KEYS: u64 = 100;
/// Clients that fill a cluster.
const FILLERS: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Put,
    Get,
    GetSerializable,
    /// 80 % linearizable gets, 20 % puts.
    Mixed,
    Range,
    /// Compares a key's mod revision, then puts it.
    Txn,
}

/// Which keys there are, and how large values are.
#[derive(Clone, Copy, Debug)]
pub struct Data {
    pub keys: u64,
    pub value_bytes: usize,
}

pub struct KvUser {
    kv: KvClient<Channel>,
    op: Op,
    keys: u64,
    value: Bytes,
    random: fastrand::Rng,
}

fn key(number: u64) -> Bytes {
    format!("bench/{number:012}").into()
}

/// `count` clients that share `channels`.
pub fn users(channels: &[Channel], count: usize, op: Op, data: Data) -> Vec<KvUser> {
    let value: Bytes = (0..data.value_bytes).map(|i| (i * 31 % 251) as u8).collect();
    let user = |(n, channel): (usize, &Channel)| KvUser {
        kv: KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
        op,
        keys: data.keys,
        value: value.clone(),
        random: fastrand::Rng::with_seed(n as u64),
    };
    channels.iter().cycle().take(count).enumerate().map(user).collect()
}

/// A closed loop over connections to all members.
pub async fn measure(servers: &Servers, args: &Args, clients: usize, op: Op, data: Data) -> anyhow::Result<Seen> {
    let channels = connect(&servers.endpoints(), args.connections)?;
    closed_loop(users(&channels, clients, op, data), args.seconds, servers).await
}

/// Puts every key of `numbers` once.
pub async fn fill(servers: &Servers, args: &Args, numbers: Range<u64>, value_bytes: usize) -> anyhow::Result<()> {
    let channels = connect(&servers.endpoints(), args.connections)?;
    let data = Data { keys: numbers.end, value_bytes };
    let tasks = users(&channels, FILLERS, Op::Put, data).into_iter().zip(numbers.clone()).map(|(mut user, from)| {
        tokio::spawn(async move {
            for number in (from..data.keys).step_by(FILLERS) {
                user.put(key(number)).await?;
            }
            Ok::<_, Status>(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    let all = RangeRequest { key: key(0), range_end: "bench0".into(), count_only: true, ..Default::default() };
    let found = KvClient::new(servers.channel(0)?).range(all).await?.into_inner().count;
    ensure!(found as u64 >= data.keys, "{}: {found} keys after {} were put", servers.program.name, data.keys);
    Ok(())
}

/// Sends `count` requests, as fast as they are answered.
pub async fn run(servers: &Servers, args: &Args, op: Op, data: Data, count: u64) -> anyhow::Result<()> {
    let channels = connect(&servers.endpoints(), args.connections)?;
    let tasks = users(&channels, FILLERS, op, data).into_iter().map(|mut user| {
        tokio::spawn(async move {
            for _ in 0..count / FILLERS as u64 {
                user.once().await?;
            }
            Ok::<_, Status>(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    Ok(())
}

impl KvUser {
    async fn put(&mut self, key: Bytes) -> Result<(), Status> {
        self.kv.put(PutRequest { key, value: self.value.clone(), ..Default::default() }).await.map(drop)
    }

    /// A read that finds fewer keys than were put is no answer.
    async fn range(&mut self, range: RangeRequest, keys: u64) -> Result<(), Status> {
        let found = self.kv.range(range).await?.into_inner().kvs.len();
        if found as u64 == keys { Ok(()) } else { Err(Status::not_found(format!("{found} of {keys} keys"))) }
    }

    async fn txn(&mut self, key: Bytes) -> Result<(), Status> {
        let compare = Compare {
            result: CompareResult::Greater.into(),
            target: CompareTarget::Mod.into(),
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(0)),
            ..Default::default()
        };
        let put = PutRequest { key, value: self.value.clone(), ..Default::default() };
        let put = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
        let txn = TxnRequest { compare: vec![compare], success: put.clone(), failure: put };
        self.kv.txn(txn).await.map(drop)
    }
}

impl Client for KvUser {
    async fn once(&mut self) -> Result<(), Status> {
        let number = self.random.u64(..self.keys);
        let one = |serializable| RangeRequest { key: key(number), serializable, ..Default::default() };
        match self.op {
            Op::Put => self.put(key(number)).await,
            Op::Get => self.range(one(false), 1).await,
            Op::GetSerializable => self.range(one(true), 1).await,
            Op::Mixed if self.random.u8(..5) == 0 => self.put(key(number)).await,
            Op::Mixed => self.range(one(false), 1).await,
            Op::Txn => self.txn(key(number)).await,
            Op::Range => {
                let keys = RANGE_KEYS.min(self.keys);
                let first = self.random.u64(..=self.keys - keys);
                let range = RangeRequest { key: key(first), range_end: key(first + keys), ..Default::default() };
                self.range(range, keys).await
            }
        }
    }
}
