//! The leader's proposer: packs the commands that wait into one log entry.
//!
//! A batch is what arrived while the one before it was in flight; there is no timer. Only where much waits, it goes while others are
//! in flight. Bounded by bytes a batch and batches in flight.

use std::sync::atomic::Ordering;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use super::places::Place;
use super::{Node, more_of_a_burst};
use crate::error::Error;
use crate::pb;
use crate::raft::{Batch, TypeConfig};

/// Commands taken from the queue at a time.
const TAKE_MAX: usize = 4096;
/// Commands of so many bytes do not wait for the batch in flight. Fewer gain nothing by that: a member takes one append after the
/// other, and the same commands in more batches cost more.
const MUCH_BYTES: usize = 64 << 10;

/// Who waits for a command's answer.
pub(super) enum Reply {
    /// A client of this member. It holds its place until then, whether it still listens or not.
    Local { tx: oneshot::Sender<Result<pb::log::Answer, Error>>, place: Place },
    /// A member that forwarded it.
    Remote { id: u64, to: mpsc::Sender<Forwarded> },
}

/// What goes back on a forward stream.
pub(super) enum Forwarded {
    Outcome(u64, Result<pb::log::Answer, Error>),
    ReadIndex(u64, Result<u64, Error>),
}

impl Reply {
    pub(super) fn send(self, outcome: Result<pb::log::Answer, Error>) {
        match self {
            // A client that has given up does not listen any more.
            Reply::Local { tx, place } => {
                // Before its client may ask again.
                drop(place);
                drop(tx.send(outcome));
            }
            // The channel has a place for every request that may be under way; full means that the stream is gone.
            Reply::Remote { id, to } => drop(to.try_send(Forwarded::Outcome(id, outcome))),
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Reply::Local { tx, .. } => tx.is_closed(),
            Reply::Remote { to, .. } => to.is_closed(),
        }
    }
}

/// An encoded [`pb::log::Command`] on its way.
pub(super) struct Proposal {
    pub command: Bytes,
    pub reply: Reply,
}

pub(super) struct Proposer {
    node: Node,
    queue: mpsc::Receiver<Proposal>,
}

type Result_ = Result<ClientWriteResult<TypeConfig>, ()>;

impl Proposer {
    pub(super) fn new(node: Node, queue: mpsc::Receiver<Proposal>) -> Self {
        Self { node, queue }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.node.inner.env.shutdown.clone();
        let in_flight_max = self.node.inner.options.batches_in_flight_max;
        let mut in_flight = FuturesUnordered::new();
        let mut waiting = Vec::new();
        loop {
            let room = TAKE_MAX - waiting.len();
            tokio::select! {
                biased;
                Some((replies, result)) = in_flight.next() => distribute(replies, result),
                taken = self.queue.recv_many(&mut waiting, room), if room > 0 && in_flight.len() < in_flight_max => {
                    if taken == 0 {
                        return;
                    }
                }
                () = shutdown.cancelled() => return,
            }
            if waiting.is_empty() || in_flight.len() >= in_flight_max || !in_flight.is_empty() && !is_much(&waiting) {
                continue;
            }
            more_of_a_burst(&mut self.queue, &mut waiting, TAKE_MAX).await;
            for (batch, replies) in self.pack(&mut waiting) {
                if let Some(waiting) = self.submit(batch, replies).await {
                    in_flight.push(waiting);
                }
            }
        }
    }

    /// Splits what waits into batches of bounded bytes; a batch holds one command at least.
    fn pack(&self, waiting: &mut Vec<Proposal>) -> Vec<(Bytes, Vec<Reply>)> {
        let bytes_max = self.node.inner.options.batch_bytes_max;
        let refuse_puts = self.node.inner.space.exceeded.load(Ordering::Relaxed);
        let mut batches = Vec::new();
        let mut batch = BytesMut::new();
        let mut replies = Vec::new();
        for proposal in waiting.drain(..) {
            if proposal.reply.is_closed() {
                continue;
            }
            if refuse_puts && takes_space(&proposal.command) {
                proposal.reply.send(Err(Error::NoSpace));
                continue;
            }
            let bytes = pb::delimited_len(proposal.command.len());
            if !replies.is_empty() && batch.len() + bytes > bytes_max {
                batches.push((batch.split().freeze(), std::mem::take(&mut replies)));
            }
            batch.reserve(bytes);
            // Field 1 of `Batch`, length-delimited.
            batch.put_u8(0x0a);
            prost::encoding::encode_varint(proposal.command.len() as u64, &mut batch);
            batch.put_slice(&proposal.command);
            replies.push(proposal.reply);
        }
        if !replies.is_empty() {
            batches.push((batch.freeze(), replies));
        }
        batches
    }

    async fn submit(
        &self,
        batch: Bytes,
        replies: Vec<Reply>,
    ) -> Option<impl Future<Output = (Vec<Reply>, Result_)> + use<>> {
        let (responder, rx) = openraft::impls::OneshotResponder::new_pair();
        if self.node.inner.raft.client_write_ff(Batch(batch), Some(responder)).await.is_err() {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::Stopped)));
            return None;
        }
        Some(async move {
            let result = rx.await.map_err(|_| ());
            (replies, result)
        })
    }
}

fn is_much(waiting: &[Proposal]) -> bool {
    waiting.iter().map(|proposal| proposal.command.len()).sum::<usize>() >= MUCH_BYTES
}

/// True for a command that stores new data; deletions and compactions free it.
fn takes_space(command: &Bytes) -> bool {
    use pb::log::command::Request;
    let Ok(command) = pb::log::Command::decode(command.clone()) else {
        return false;
    };
    match command.request {
        Some(Request::Put(_) | Request::LeaseGrant(_)) => true,
        Some(Request::Txn(txn)) => txn_puts(&txn),
        Some(
            Request::DeleteRange(_)
            | Request::Compact(_)
            | Request::SetClusterVersion(_)
            | Request::WantedSize(_)
            | Request::LeaseRevoke(_)
            | Request::LeaseCheckpoint(_)
            | Request::Alarm(_)
            | Request::StartDigest(_),
        )
        | None => false,
    }
}

fn txn_puts(txn: &pb::etcd::TxnRequest) -> bool {
    use pb::etcd::request_op::Request;
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(inner)) => txn_puts(inner),
        _ => false,
    })
}

fn distribute(replies: Vec<Reply>, result: Result_) {
    match result {
        Ok(Ok(written)) => {
            assert_eq!(written.data.len(), replies.len(), "every command of a batch has an answer");
            for (reply, answer) in replies.into_iter().zip(written.data) {
                reply.send(answer);
            }
        }
        // openraft answers with `ForwardToLeader` only before the entry is appended.
        Ok(Err(ClientWriteError::ForwardToLeader(_))) => {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::NotLeader)));
        }
        // The entry may yet be committed by another leader.
        Ok(Err(_)) | Err(()) => {
            replies.into_iter().for_each(|reply| reply.send(Err(Error::TimeoutLeaderFailure)));
        }
    }
}

#[cfg(test)]
mod tests {
    use openraft::errors::ForwardToLeader;

    use super::super::places::{Client, Places};
    use super::*;

    fn told(result: Result_) -> Error {
        let (tx, mut rx) = oneshot::channel();
        let place = Places::new(1, 1).take(&Client::default(), 1).expect("it is free");
        distribute(vec![Reply::Local { tx, place }], result);
        rx.try_recv().expect("everyone is told").expect_err("it was not applied")
    }

    /// Only `NotLeader` is tried again.
    #[test]
    fn proposal_counts_as_unproposed_only_before_it_was_appended() {
        let elsewhere = ForwardToLeader::empty();
        assert_eq!(told(Ok(Err(ClientWriteError::ForwardToLeader(elsewhere.clone())))), Error::NotLeader);
        // Truncated here, it may still be committed by a member that has it.
        assert_eq!(told(Ok(Err(ClientWriteError::LogEntryDiscarded(elsewhere)))), Error::TimeoutLeaderFailure);
        assert_eq!(told(Err(())), Error::TimeoutLeaderFailure, "Raft ended without an answer");
    }
}
