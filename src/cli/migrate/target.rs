//! The target of a migration: puts and deletions in transactions, and leases under the source's ids.
//!
//! A migration grants a lease with what is left of it at the source, and keeps it alive here as long as it lives there; so the target expires
//! nothing by itself while it follows. Where all is to be the same it has what it was granted there. A mirror's keys have no leases: they go when the source says so. Its keys may have another prefix.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tonic::{Code, Status};

use super::{Side, TICK};
use crate::cli::client::failure;
use crate::cli::credentials::Channel;
use crate::cli::output::lease_id;
use crate::env::{interval, timeout};
use crate::pb::KeyValue;
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::{
    DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseTimeToLiveRequest, PutRequest, RequestOp,
    TxnRequest, request_op,
};

/// Operations of one transaction: below every server's limit.
pub(super) const OPS_MAX: usize = 100;
/// Bytes of one transaction, unless one key-value pair alone is larger.
const TXN_BYTES_MAX: usize = 512 << 10;
/// Of a lease that has ended at the source, until the deletion of its keys comes by the watch.
const ENDED_SECONDS: i64 = 3600;

/// What the source has changed.
pub(super) enum Change {
    Put(KeyValue),
    /// Of the key alone.
    Delete(KeyValue),
}

impl Change {
    pub(super) fn kv(&self) -> &KeyValue {
        match self {
            Change::Put(kv) | Change::Delete(kv) => kv,
        }
    }
}

/// Cloning shares it.
#[derive(Clone)]
pub(super) struct Target {
    side: Side,
    /// `None`: keys are put without leases.
    leases: Option<Leases>,
    rename: Rename,
}

/// The prefix of keys at the source, and what takes its place at the target.
#[derive(Clone, Debug, Default)]
pub(super) struct Rename {
    pub from: Bytes,
    pub to: Bytes,
}

impl Rename {
    /// The key at the target of a key of the source.
    pub(super) fn key(&self, key: &[u8]) -> Bytes {
        Bytes::from([&self.to[..], key.strip_prefix(&self.from[..]).unwrap_or(key)].concat())
    }

    /// The key at the source that a key of the target stands for.
    pub(super) fn key_at_source(&self, key: &[u8]) -> Bytes {
        Bytes::from([&self.from[..], key.strip_prefix(&self.to[..]).unwrap_or(key)].concat())
    }
}

#[derive(Clone)]
pub(super) struct Leases {
    at_source: LeaseClient<Channel>,
    here: LeaseClient<Channel>,
    /// Granted at the target.
    granted: Arc<Mutex<BTreeSet<i64>>>,
    /// A lease is to have what it was granted at the source, and a version is to name its lease though that has ended.
    is_same: bool,
}

impl Target {
    pub(super) async fn new(source: &Side, side: Side, is_same: bool) -> anyhow::Result<Self> {
        let at_source = LeaseClient::new(source.client.connect().await?);
        let here = LeaseClient::new(side.client.connect().await?);
        let leases = Leases { at_source, here, granted: Arc::default(), is_same };
        Ok(Self { side, leases: Some(leases), rename: Rename::default() })
    }

    /// Without leases, and under another prefix.
    pub(super) fn renamed(side: Side, rename: Rename) -> Self {
        Self { side, leases: None, rename }
    }

    pub(super) fn side(&self) -> &Side {
        &self.side
    }

    /// Deletes what was put so far; the target was empty before.
    pub(super) async fn clear(&self) -> anyhow::Result<()> {
        let (key, range_end) = (self.side.key.clone(), self.side.range_end.clone());
        let all = DeleteRangeRequest { key, range_end, ..DeleteRangeRequest::default() };
        self.side.client.answer(self.side.kv.clone().delete_range(all)).await?;
        Ok(())
    }

    /// Applies changes in their order. A key comes at most once in a transaction.
    pub(super) async fn apply(&self, changes: impl Iterator<Item = Change>) -> anyhow::Result<()> {
        let (mut batch, mut keys, mut bytes) = (Vec::new(), BTreeSet::new(), 0);
        for change in changes {
            let kv = change.kv().clone();
            let full = batch.len() >= OPS_MAX || bytes + kv.as_encoded().len() > TXN_BYTES_MAX;
            if !batch.is_empty() && (full || keys.contains(kv.key())) {
                self.write(&std::mem::take(&mut batch)).await?;
                keys.clear();
                bytes = 0;
            }
            bytes += kv.as_encoded().len();
            keys.insert(kv.key().to_vec());
            batch.push(change);
        }
        if batch.is_empty() { Ok(()) } else { self.write(&batch).await }
    }

    async fn write(&self, batch: &[Change]) -> anyhow::Result<()> {
        for tries_left in [1, 0] {
            let mut success = Vec::with_capacity(batch.len());
            for change in batch {
                success.push(self.operation(change).await?);
            }
            let txn = TxnRequest { success, ..TxnRequest::default() };
            match timeout(self.side.client.timeout, self.side.kv.clone().txn(txn)).await {
                Ok(Ok(_)) => return Ok(()),
                // A lease has ended between its grant and its use.
                Ok(Err(status)) if status.code() == Code::NotFound && tries_left > 0 => {
                    self.forget_leases();
                }
                Ok(Err(status)) => return Err(failure(&status).context("the target refused a change")),
                Err(_) => return Err(anyhow!("the target did not answer in time; raise --timeout")),
            }
        }
        unreachable!("the second try returns")
    }

    /// Grants leases again when they are next needed.
    pub(super) fn forget_leases(&self) {
        self.leases.iter().for_each(|leases| leases.granted.lock().clear());
    }

    pub(super) fn leases(&self) -> Option<&Leases> {
        self.leases.as_ref()
    }

    pub(super) async fn operation(&self, change: &Change) -> anyhow::Result<RequestOp> {
        let request = match change {
            Change::Put(kv) => request_op::Request::RequestPut(PutRequest {
                key: self.rename.key(kv.key()),
                value: kv.value().to_vec().into(),
                lease: match &self.leases {
                    Some(leases) if kv.lease() != 0 => self.grant(leases, kv.lease()).await?,
                    _ => 0,
                },
                ..PutRequest::default()
            }),
            Change::Delete(kv) => request_op::Request::RequestDeleteRange(DeleteRangeRequest {
                key: self.rename.key(kv.key()),
                ..DeleteRangeRequest::default()
            }),
        };
        Ok(RequestOp { request: Some(request) })
    }

    /// Makes sure of a lease at the target; returns its id, or 0 if it has ended at the source: its keys' deletion follows.
    pub(super) async fn grant(&self, leases: &Leases, id: i64) -> anyhow::Result<i64> {
        if leases.granted.lock().contains(&id) {
            return Ok(id);
        }
        let asked = leases.left_and_granted(id).await;
        let (left, granted) = asked.map_err(|status| failure(&status).context("the source"))?;
        let ttl = match (left > 0, leases.is_same) {
            (true, false) => left,
            (true, true) => granted,
            (false, false) => return Ok(0),
            (false, true) => ENDED_SECONDS,
        };
        let grant = LeaseGrantRequest { id, ttl };
        match self.side.client.answer(leases.here.clone().lease_grant(grant)).await {
            Ok(_) => {}
            Err(error) if error.to_string().contains("lease already exists") => {}
            Err(error) => return Err(error.context("the target refused a lease")),
        }
        leases.granted.lock().insert(id);
        Ok(id)
    }

    /// Keeps alive here what lives at the source. Never returns.
    pub(super) async fn keep_leases(self) -> anyhow::Error {
        match self.leases {
            Some(leases) => leases.keep(self.side.client.timeout).await,
            None => std::future::pending().await,
        }
    }
}

impl Leases {
    /// Seconds that a lease has left at the source; 0 or less: it has ended.
    async fn left(&self, id: i64) -> Result<i64, Status> {
        Ok(self.left_and_granted(id).await?.0)
    }

    async fn left_and_granted(&self, id: i64) -> Result<(i64, i64), Status> {
        let ask = LeaseTimeToLiveRequest { id, keys: false };
        match self.at_source.clone().lease_time_to_live(ask).await {
            Ok(answer) => Ok((answer.get_ref().ttl, answer.get_ref().granted_ttl)),
            Err(status) if status.code() == Code::NotFound => Ok((-1, 0)),
            Err(status) => Err(status),
        }
    }

    /// Takes over leases that the target has without having been asked by us.
    pub(super) fn adopt(&self, ids: Vec<i64>) {
        self.granted.lock().extend(ids);
    }

    pub(super) fn at_source(&self) -> LeaseClient<Channel> {
        self.at_source.clone()
    }

    pub(super) fn here(&self) -> LeaseClient<Channel> {
        self.here.clone()
    }

    async fn keep(self, patience: Duration) -> anyhow::Error {
        let mut tick = interval(TICK);
        loop {
            tick.tick().await;
            let all: Vec<i64> = self.granted.lock().iter().copied().collect();
            for id in all {
                match self.left(id).await {
                    Ok(left) if left > 0 => self.keep_alive(id, patience).await,
                    // Its keys' deletion comes by the watch.
                    Ok(_) => drop(self.granted.lock().remove(&id)),
                    // Tried again at the next tick.
                    Err(_) => {}
                }
            }
        }
    }

    async fn keep_alive(&self, id: i64, patience: Duration) {
        let request = futures_util::stream::iter([LeaseKeepAliveRequest { id }]);
        let answered = async {
            let mut answers = self.here.clone().lease_keep_alive(request).await?.into_inner();
            answers.next().await.transpose()
        };
        if let Ok(Ok(Some(answer))) = timeout(patience, answered).await
            && answer.ttl == 0
        {
            eprintln!("lease {} has ended at the target before its time at the source", lease_id(id));
            self.granted.lock().remove(&id);
        }
    }
}
