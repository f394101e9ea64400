//! The target of a migration: puts and deletions in transactions, and leases under the source's ids.
//!
//! A lease is granted with what is left of it at the source, and kept alive here as long as it lives there; so the target expires
//! nothing by itself while it follows.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::anyhow;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tonic::{Code, Status};

use super::{Side, TICK};
use crate::cli::client::failure;
use crate::cli::credentials::Channel;
use crate::env::{interval, timeout};
use crate::pb::KeyValue;
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::{
    DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseTimeToLiveRequest, PutRequest, RequestOp,
    TxnRequest, request_op,
};

/// Operations of one transaction: below every server's limit.
const OPS_MAX: usize = 100;
/// Bytes of one transaction, unless one key-value pair alone is larger.
const TXN_BYTES_MAX: usize = 512 << 10;

/// What the source has changed.
pub(super) enum Change {
    Put(KeyValue),
    /// Of the key alone.
    Delete(KeyValue),
}

impl Change {
    fn kv(&self) -> &KeyValue {
        match self {
            Change::Put(kv) | Change::Delete(kv) => kv,
        }
    }
}

/// Cloning shares it.
#[derive(Clone)]
pub(super) struct Target {
    side: Side,
    source_leases: LeaseClient<Channel>,
    leases: LeaseClient<Channel>,
    /// Granted at the target.
    granted: Arc<Mutex<BTreeSet<i64>>>,
}

impl Target {
    pub(super) async fn new(source: &Side, side: Side) -> anyhow::Result<Self> {
        let source_leases = LeaseClient::new(source.client.connect().await?);
        let leases = LeaseClient::new(side.client.connect().await?);
        Ok(Self { side, source_leases, leases, granted: Arc::default() })
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
                Ok(Err(status)) if status.code() == Code::NotFound && tries_left > 0 => self.granted.lock().clear(),
                Ok(Err(status)) => return Err(failure(&status).context("the target refused a change")),
                Err(_) => return Err(anyhow!("the target did not answer in time; raise --timeout")),
            }
        }
        unreachable!("the second try returns")
    }

    async fn operation(&self, change: &Change) -> anyhow::Result<RequestOp> {
        let request = match change {
            Change::Put(kv) => request_op::Request::RequestPut(PutRequest {
                key: kv.key().to_vec().into(),
                value: kv.value().to_vec().into(),
                lease: if kv.lease() == 0 { 0 } else { self.grant(kv.lease()).await? },
                ..PutRequest::default()
            }),
            Change::Delete(kv) => request_op::Request::RequestDeleteRange(DeleteRangeRequest {
                key: kv.key().to_vec().into(),
                ..DeleteRangeRequest::default()
            }),
        };
        Ok(RequestOp { request: Some(request) })
    }

    /// Makes sure of a lease at the target; returns its id, or 0 if it has ended at the source: its keys' deletion follows.
    async fn grant(&self, id: i64) -> anyhow::Result<i64> {
        if self.granted.lock().contains(&id) {
            return Ok(id);
        }
        let left = self.left(id).await.map_err(|status| failure(&status).context("the source"))?;
        if left <= 0 {
            return Ok(0);
        }
        let grant = LeaseGrantRequest { id, ttl: left };
        match self.side.client.answer(self.leases.clone().lease_grant(grant)).await {
            Ok(_) => {}
            Err(error) if error.to_string().contains("lease already exists") => {}
            Err(error) => return Err(error.context("the target refused a lease")),
        }
        self.granted.lock().insert(id);
        Ok(id)
    }

    /// Seconds that a lease has left at the source; 0 or less: it has ended.
    async fn left(&self, id: i64) -> Result<i64, Status> {
        let ask = LeaseTimeToLiveRequest { id, keys: false };
        match self.source_leases.clone().lease_time_to_live(ask).await {
            Ok(answer) => Ok(answer.into_inner().ttl),
            Err(status) if status.code() == Code::NotFound => Ok(-1),
            Err(status) => Err(status),
        }
    }

    /// Keeps alive here what lives there. Never returns but with a failure that makes going on senseless.
    pub(super) async fn keep_leases(self) -> anyhow::Error {
        let mut tick = interval(TICK);
        loop {
            tick.tick().await;
            let all: Vec<i64> = self.granted.lock().iter().copied().collect();
            for id in all {
                match self.left(id).await {
                    Ok(left) if left > 0 => self.keep_alive(id).await,
                    // Its keys' deletion comes by the watch.
                    Ok(_) => drop(self.granted.lock().remove(&id)),
                    // Tried again at the next tick.
                    Err(_) => {}
                }
            }
        }
    }

    async fn keep_alive(&self, id: i64) {
        let request = futures_util::stream::iter([LeaseKeepAliveRequest { id }]);
        let answered = async {
            let mut answers = self.leases.clone().lease_keep_alive(request).await?.into_inner();
            answers.next().await.transpose()
        };
        if let Ok(Ok(Some(answer))) = timeout(self.side.client.timeout, answered).await
            && answer.ttl == 0
        {
            eprintln!("lease {id:x} has ended at the target before its time at the source");
            self.granted.lock().remove(&id);
        }
    }
}
