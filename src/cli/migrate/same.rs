//! `--same-revisions`: the target was restored from a snapshot file of the source, and goes on from there, revision by revision.
//!
//! Each revision of the source is one transaction at the target, with all of its changes in their order; so every key's create revision, mod
//! revision and version is the same on both sides, and who watches goes on with the revision that it has. A transaction that may have been
//! lost is sent again: it asks first whether it was done, so it is never done twice.
//! Invariants: the target is at the source's revision after each transaction, or this ends; nobody else writes to the target meanwhile, or
//! this ends too.
//! Absent: a key that one revision both puts and deletes, which transactions within transactions can bring about: it is refused.

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use tonic::Code;

use super::TICK;
use super::follow::Follower;
use super::target::{Change, Leases, Target};
use crate::cli::client::failure;
use crate::cli::credentials::Channel;
use crate::env::timeout;
use crate::pb::EventType;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::lease_client::LeaseClient;
use crate::pb::etcd::{
    Compare, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, RangeRequest, RequestOp, TxnRequest,
    request_op,
};
use crate::pb::mvccpb::Event;

/// Operations of one list; what is more goes into transactions within the transaction.
const OPS_MAX: usize = 100;
/// How often a transaction is sent while the target cannot take it, a second apart.
const TRIES_MAX: u32 = 60;

impl Follower {
    /// Finds out where the target is, and that it holds what the source held then.
    pub(super) async fn begin_same(&mut self) -> anyhow::Result<()> {
        let side = self.to.side().clone();
        let ((count, at), (_, newest)) = (side.count().await?, self.from.count().await?);
        ensure!(
            at <= newest,
            "the target is at revision {at} and the source at {newest}: it was not restored from a snapshot of this source, or was written to"
        );
        let counted = RangeRequest { count_only: true, revision: at, ..self.from.all() };
        let counted = match self.from.range(counted).await {
            Err(status) if status.code() == Code::OutOfRange => bail!(
                "the source has compacted revision {at}, at which the target is: restore the target from a newer snapshot, and switch the \
                 source's auto-compaction off meanwhile"
            ),
            answer => answer.map_err(|status| failure(&status))?.count,
        };
        let theirs = self.from.page(&side.key, at).await.map_err(|status| failure(&status))?.0.kvs;
        let ours = side.page(&side.key, at).await.map_err(|status| failure(&status))?.0.kvs;
        ensure!(
            counted == count && ours == theirs,
            "at revision {at} the target holds other keys than the source did: it was not restored from a snapshot of this source"
        );
        self.to.adopt_leases().await?;
        (self.applied, self.newest, self.is_same) = (at, newest, true);
        eprintln!("the target is at revision {at}, the source at {newest}");
        Ok(())
    }

    /// Applies the events of whole revisions up to `end`.
    pub(super) async fn take_same(&mut self, events: Vec<Event>, end: i64) -> anyhow::Result<()> {
        let mut events = events.into_iter().filter_map(|event| Some((event.r#type(), event.kv?))).peekable();
        while let Some(revision) = events.peek().map(|(_, kv)| kv.mod_revision()).filter(|revision| *revision <= end) {
            let next = self.applied + 1;
            ensure!(revision == next, "the source says revision {revision} where {next} was expected");
            let mut changes = Vec::new();
            while let Some((kind, kv)) = events.next_if(|(_, kv)| kv.mod_revision() == revision) {
                changes.push(if kind == EventType::Put { Change::Put(kv) } else { Change::Delete(kv) });
            }
            self.to.make(revision, &changes).await?;
            self.applied = revision;
        }
        Ok(())
    }
}

/// True as long as the changes of `revision` were not made: after them one of their keys is otherwise.
fn undone(change: &Change, revision: i64) -> Compare {
    let (result, than) = match change {
        Change::Put(_) => (CompareResult::Less, revision),
        Change::Delete(_) => (CompareResult::Greater, 0),
    };
    Compare {
        result: result.into(),
        target: CompareTarget::Mod.into(),
        key: Bytes::copy_from_slice(change.kv().key()),
        target_union: Some(TargetUnion::ModRevision(than)),
        ..Compare::default()
    }
}

/// Lists of at most [`OPS_MAX`], in the same order.
fn nested(mut ops: Vec<RequestOp>) -> Vec<RequestOp> {
    while ops.len() > OPS_MAX {
        let lists = ops.chunks(OPS_MAX).map(|list| {
            let txn = TxnRequest { success: list.to_vec(), ..TxnRequest::default() };
            RequestOp { request: Some(request_op::Request::RequestTxn(txn)) }
        });
        ops = lists.collect();
    }
    ops
}

impl Target {
    /// Makes one revision of the source's.
    async fn make(&self, revision: i64, changes: &[Change]) -> anyhow::Result<()> {
        let mut tries_left = TRIES_MAX;
        loop {
            tries_left -= 1;
            let mut success = Vec::with_capacity(changes.len());
            for change in changes {
                success.push(self.operation(change).await?);
            }
            let compare = changes.first().map(|change| undone(change, revision)).into_iter().collect();
            let txn = TxnRequest { compare, success: nested(success), ..TxnRequest::default() };
            let side = self.side();
            let refused = match timeout(side.client.timeout, side.kv.clone().txn(txn)).await {
                Ok(Ok(answer)) => {
                    let at = answer.into_inner().header.unwrap_or_default().revision;
                    ensure!(
                        at == revision,
                        "the target is at revision {at} where the source has {revision}: somebody else writes to it, or a lease has ended \
                         there; restore it anew"
                    );
                    return Ok(());
                }
                Ok(Err(status)) => status,
                Err(_) => tonic::Status::deadline_exceeded("no answer in time"),
            };
            let is_busy = refused.message().contains("too many requests");
            match refused.code() {
                // A lease has ended between its grant and its use.
                Code::NotFound if tries_left > 0 => self.forget_leases(),
                Code::Unavailable | Code::DeadlineExceeded if tries_left > 0 => crate::env::sleep(TICK).await,
                Code::ResourceExhausted if tries_left > 0 && is_busy => crate::env::sleep(TICK).await,
                _ => {
                    let what = format!("the target refused the {} changes of revision {revision}", changes.len());
                    return Err(failure(&refused).context(what));
                }
            }
        }
    }

    /// Leases that the target has are kept alive like those that are granted here.
    async fn adopt_leases(&self) -> anyhow::Result<()> {
        if let Some(leases) = self.leases() {
            leases.adopt(self.listed(leases.here()).await?);
        }
        Ok(())
    }

    async fn listed(&self, mut side: LeaseClient<Channel>) -> anyhow::Result<Vec<i64>> {
        let answer = self.side().client.answer(side.lease_leases(LeaseLeasesRequest {})).await?;
        Ok(answer.into_inner().leases.iter().map(|lease| lease.id).collect())
    }

    /// Grants the leases that no key has named yet, and revokes those that the source does not have any more. None has a key, so that makes
    /// no revision.
    pub(super) async fn settle_leases(&self) -> anyhow::Result<()> {
        let Some(leases) = self.leases() else { return Ok(()) };
        let at_source = self.listed(leases.at_source()).await?;
        for id in &at_source {
            self.grant(leases, *id).await?;
        }
        for id in self.listed(leases.here()).await?.into_iter().filter(|id| !at_source.contains(id)) {
            self.drop_lease(leases, id).await?;
        }
        Ok(())
    }

    async fn drop_lease(&self, leases: &Leases, id: i64) -> anyhow::Result<()> {
        let (mut here, client) = (leases.here(), &self.side().client);
        let ask = LeaseTimeToLiveRequest { id, keys: true };
        if client.answer(here.lease_time_to_live(ask)).await?.into_inner().keys.is_empty() {
            let revoke = here.lease_revoke(LeaseRevokeRequest { id });
            client.answer(revoke).await.with_context(|| format!("lease {id:x}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(ops: &[RequestOp], depth: usize) -> (Vec<Bytes>, usize) {
        assert!(ops.len() <= OPS_MAX);
        let mut found = (Vec::new(), depth);
        for op in ops {
            match op.request.as_ref().unwrap() {
                request_op::Request::RequestTxn(txn) => {
                    let (keys, below) = leaves(&txn.success, depth + 1);
                    found.0.extend(keys);
                    found.1 = found.1.max(below);
                }
                request_op::Request::RequestDeleteRange(delete) => found.0.push(delete.key.clone()),
                other => panic!("{other:?}"),
            }
        }
        found
    }

    #[test]
    fn any_number_of_operations_fits_and_keeps_its_order() {
        for (count, depth) in [(0, 0), (1, 0), (100, 0), (101, 1), (10_000, 1), (10_001, 2), (60_000, 2)] {
            let keys: Vec<Bytes> = (0..count).map(|n| Bytes::from(format!("k{n}"))).collect();
            let ops = keys.iter().map(|key| {
                let delete = crate::pb::etcd::DeleteRangeRequest { key: key.clone(), ..Default::default() };
                RequestOp { request: Some(request_op::Request::RequestDeleteRange(delete)) }
            });
            assert!(leaves(&nested(ops.collect()), 0) == (keys, depth), "{count}");
        }
    }
}
