//! `Maintenance.Snapshot`: a backup of the asked member's state as a stream.
//!
//! Made of a view, a piece whenever the client takes one (`pull`) and no faster than `raft.snapshot_rate`, so that heartbeats get
//! through. A fenced member gives none, for who restored it would restore what differs; with the alarm on for all, there is nothing
//! better than theirs. Absent: a second backup that shares the first one's work.

use tonic::{Request, Response, Status};

use super::answers::kept_max;
use super::pull::{self, Plan, Source};
use super::{Api, ETCD_CLUSTER_VERSION, header};
use crate::caller::Caller;
use crate::env::Pool;
use crate::error::Error;
use crate::kv::Wants;
use crate::metrics::metrics;
use crate::node::{Node, Trust};
use crate::pb::etcd::{ResponseHeader, SnapshotRequest, SnapshotResponse};
use crate::raft::Backup;

/// Bytes of a piece.
const PIECE_BYTES: usize = 64 << 10;

pub(super) type Pieces = pull::Pieces<SnapshotResponse>;

impl Api {
    pub(super) async fn backup(&self, request: Request<SnapshotRequest>) -> Result<Response<Pieces>, Status> {
        let node = self.node(&request)?;
        if node.trust() == Trust::Fenced {
            return Err(Error::Corrupt.into());
        }
        let caller = self.root(&node, &request).await?;
        let slot = self.shared.backups.take(node.client().asker())?;
        let backup = Backup::new(node.whole_view(&caller)?, node.member());
        let header = header(&node, backup.revision());
        let rate = self.shared.snapshot_rate.max(1);
        let plan = Plan { what: "backup", pool: Pool::Backups, rate, kept_max: kept_max(&self.shared.account.answers) };
        Ok(Response::new(pull::pieces(
            &node,
            plan,
            Taken { node: node.clone(), caller, backup, header, remaining: None },
            slot,
        )))
    }
}

/// A backup on its way to a client.
struct Taken {
    node: Node,
    caller: Caller,
    backup: Backup,
    header: Option<ResponseHeader>,
    /// Bytes that are still to come, once that is known.
    remaining: Option<u64>,
}

impl Source for Taken {
    type Piece = SnapshotResponse;

    fn piece(&mut self) -> Result<Option<(SnapshotResponse, usize)>, Status> {
        self.node.permit(&self.caller, Wants::Root)?;
        let before = *self.remaining.get_or_insert_with(|| {
            let bytes = self.backup.bytes();
            tracing::info!(bytes, "a client takes a backup");
            bytes
        });
        let made = self.backup.piece(PIECE_BYTES).map_err(|error| Status::internal(format!("backup: {error}")))?;
        let Some(blob) = made else { return Ok(None) };
        let bytes = blob.len();
        metrics().snapshot_sent_bytes.inc_by(bytes as u64);
        let remaining_bytes = before - bytes as u64;
        self.remaining = Some(remaining_bytes);
        let (header, version) = (self.header, ETCD_CLUSTER_VERSION.into());
        Ok(Some((SnapshotResponse { header, remaining_bytes, blob, version }, bytes)))
    }
}
