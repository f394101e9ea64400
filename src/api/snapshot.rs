//! `Maintenance.Snapshot`: a backup of the asked member's state as a stream.
//!
//! A thread encodes a view, a piece at a time and no faster than `raft.snapshot_rate`, so that heartbeats get through; a few pieces
//! are in memory. The view keeps what is overwritten meanwhile, so a client that takes nothing for `STALL` is given up.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Api, header};
use crate::env::timeout;
use crate::metrics::metrics;
use crate::node::Node;
use crate::pb::etcd::{SnapshotRequest, SnapshotResponse};
use crate::raft::Backup;

/// The level of etcd's storage that the API stands for.
pub(super) const STORAGE_VERSION: &str = "3.6.0";
/// Bytes of a piece.
const PIECE_BYTES: usize = 64 << 10;
const STALL: Duration = Duration::from_secs(60);

pub(super) type Pieces = Pin<Box<dyn Stream<Item = Result<SnapshotResponse, Status>> + Send>>;

impl Api {
    pub(super) async fn backup(&self, request: Request<SnapshotRequest>) -> Result<Response<Pieces>, Status> {
        let node = self.node(&request)?;
        let (to, pieces) = mpsc::channel(4);
        let rate = self.shared.snapshot_rate.max(1);
        node.env().clone().spawn(run(node, rate, to));
        Ok(Response::new(Box::pin(ReceiverStream::new(pieces))))
    }
}

async fn run(node: Node, rate: u64, to: mpsc::Sender<Result<SnapshotResponse, Status>>) {
    let view = node.store().view();
    let header = header(&node, view.kv.revision());
    let (encoded, mut encoding) = mpsc::channel::<Bytes>(2);
    let (env, this) = (node.env().clone(), node.member());
    let (sized, size) = tokio::sync::oneshot::channel();
    let work = async {
        let pacing = env.clone();
        env.blocking(move || {
            let backup = Backup::new(view, this);
            if sized.send(backup.bytes()).is_err() {
                return;
            }
            // A receiver that is gone ends the work.
            backup.write(PIECE_BYTES, &mut |piece| {
                pacing.block_for(Duration::from_secs_f64(piece.len() as f64 / rate as f64));
                encoded.blocking_send(piece).is_ok()
            });
        })
        .await;
    };
    let pump = async {
        let Ok(mut remaining) = size.await else { return };
        tracing::info!(bytes = remaining, "a client takes a backup");
        while let Some(blob) = encoding.recv().await {
            remaining -= blob.len() as u64;
            metrics().snapshot_sent_bytes.inc_by(blob.len() as u64);
            let piece = SnapshotResponse { header, remaining_bytes: remaining, blob, version: STORAGE_VERSION.into() };
            match timeout(STALL, to.send(Ok(piece))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => break,
                Err(_) => {
                    tracing::warn!(stall = ?STALL, "a client took no piece of its backup; given up");
                    break;
                }
            }
        }
        // Else the thread would wait for ever to hand over its next piece.
        drop(encoding);
    };
    let shutdown = node.env().shutdown.clone();
    tokio::select! {
        _ = futures_util::future::join(work, pump) => {}
        () = shutdown.cancelled() => {}
    }
}
