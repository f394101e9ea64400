//! Who speaks to the peer port like a member and forwards what no member may take: each is refused, changes nothing, and stops nobody.
//!
//! Nothing that could be applied is among it, for the checkers know all that changes. Absent: what is applied or not by chance
//! (`node/tests/way.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::clients::Clients;
use crate::env::{Env, sleep, timeout};
use crate::pb::peer::forward_request::Proposal;
use crate::pb::peer::forward_response::outcome::Result as Outcome;
use crate::pb::peer::{Envelope, ForwardRequest};
use crate::raft::{Peers, next_forwarded};
use crate::testing::proposals::Proposals;

const PATIENCE: Duration = Duration::from_secs(1);
const PROPOSALS: u64 = 8;

pub struct Forwarder {
    /// Its net is the members'.
    pub env: Env,
    pub clients: Clients,
    pub members: watch::Receiver<usize>,
    /// The peer address of a member.
    pub address: fn(usize) -> String,
}

impl Forwarder {
    pub async fn run(self, stop: CancellationToken) {
        let peers = Peers::new(self.env.clone());
        while !stop.is_cancelled() {
            sleep(self.env.jitter(Duration::from_millis(500))).await;
            let members = *self.members.borrow();
            let [to, from] = [0, 1].map(|_| (self.env.random_u64() % members as u64) as usize);
            // Who is away, or has just changed its id, is asked the next time.
            let (Ok(to_is), Ok(from_is)) = (self.clients.status(to).await, self.clients.status(from).await) else {
                continue;
            };
            let (Some(to_is), Some(from_is)) = (to_is.header, from_is.header) else { continue };
            let envelope = Envelope { cluster_id: to_is.cluster_id, from: from_is.member_id, to: to_is.member_id };
            drop(timeout(PATIENCE, self.forward(&peers, &(self.address)(to), envelope)).await);
        }
    }

    async fn forward(&self, peers: &Arc<Peers>, address: &str, envelope: Envelope) {
        let (wire, requests) = mpsc::channel(2);
        let proposals = {
            let mut random = || self.env.random_u64();
            let mut random = Proposals(&mut random);
            (1..=PROPOSALS).map(|id| Proposal { id, command: random.refused() }).collect()
        };
        for message in [
            ForwardRequest { envelope: Some(envelope), ..ForwardRequest::default() },
            ForwardRequest { proposals, ..ForwardRequest::default() },
        ] {
            wire.send(message).await.expect("there is room for two");
        }
        let Ok(mut answers) = peers.forward(address, requests).await else { return };
        let mut answered = 0;
        while answered < PROPOSALS
            && let Some(answer) = next_forwarded(&mut answers).await
        {
            for outcome in answer.outcomes {
                answered += 1;
                assert!(matches!(outcome.result, Some(Outcome::Error(_))), "proposal {} was applied", outcome.id);
            }
        }
    }
}
