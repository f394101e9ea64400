//! The way of an operation on the membership from any member to the leader, and of the leader's view back.
//!
//! How server code uses it: the client services and the shutdown call [`Manager::manage`] and [`Manager::view`]; the peer service
//! calls [`Manager::answer`] for what other members ask of this one.
//! Invariants: only the leader acts; an operation whose fate is unknown is not repeated (its caller is told so).
//! Absent: the decision (`manual`, `plan`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Reconciler;
use super::manual::Operation;
use super::peers::{self, Unreachable};
use crate::caller::Caller;
use crate::env::{Instant, sleep};
use crate::error::Error;
use crate::identity;
use crate::kv;
use crate::node::Node;
use crate::pb::admin::MembershipView;
use crate::pb::log::node::Kind;
use crate::pb::log::{self, Command, Reservation, WantedSize, answer, command};
use crate::pb::peer::manage_request::{Look, Operation as Asked, Update};
use crate::pb::peer::who_response::State;
use crate::pb::peer::{Envelope, ManageRequest, ManageResponse};
use crate::raft::Peers;

/// What a node that is added or moved has to say who it is.
const WHO_PATIENCE: Duration = Duration::from_secs(1);
/// Until a new leader is known.
const RETRY: Duration = Duration::from_millis(50);
/// What the leader has to show its view; the asker has its own as well.
const VIEW_PATIENCE: Duration = Duration::from_secs(1);

/// See the module's head.
pub struct Manager {
    node: Node,
    peers: Arc<Peers>,
    reconciler: Arc<Reconciler>,
    stays_out: AtomicBool,
}

impl Manager {
    pub fn new(node: Node, peers: Arc<Peers>, reconciler: Arc<Reconciler>) -> Arc<Self> {
        Arc::new(Self { node, peers, reconciler, stays_out: AtomicBool::new(false) })
    }

    /// This member is removed by hand: it does not join again before its process is restarted (membership rule 24).
    pub fn stays_out(&self) -> bool {
        self.stays_out.load(Ordering::Relaxed)
    }

    /// Has the leader do it, whoever that is; bounded by the time of a request.
    pub async fn manage(&self, operation: Asked) -> Result<ManageResponse, Error> {
        self.manage_until(operation, Instant::now() + self.node.options().request_timeout).await
    }

    async fn manage_until(&self, operation: Asked, deadline: Instant) -> Result<ManageResponse, Error> {
        loop {
            let status = self.node.status();
            let leader = status.leader.and_then(|id| Some((id, status.membership.get_node(&id)?.peer_address.clone())));
            let outcome = match leader {
                Some((id, _)) if id == self.node.member().member_id => self.lead(operation.clone(), deadline).await,
                Some((id, address)) => self.ask(id, &address, operation.clone(), deadline).await,
                None => Err(Error::NoLeader),
            };
            match outcome {
                Err(Error::NotLeader | Error::NoLeader) if Instant::now() + RETRY < deadline => sleep(RETRY).await,
                decided => return decided,
            }
        }
    }

    async fn ask(
        &self,
        leader: u64,
        address: &str,
        operation: Asked,
        deadline: Instant,
    ) -> Result<ManageResponse, Error> {
        let this = self.node.member();
        let envelope = Envelope { cluster_id: this.cluster_id, from: this.member_id, to: leader };
        let reads = matches!(operation, Asked::Look(_));
        let request = ManageRequest { envelope: Some(envelope), operation: Some(operation) };
        let patience = deadline.saturating_duration_since(Instant::now());
        match self.peers.manage(address, request, patience).await {
            Ok(answer) if answer.error == 0 => Ok(answer),
            Ok(answer) => Err(Error::from_number(answer.error, answer.detail)),
            Err(_) if reads => Err(Error::NoLeader),
            Err(why) => {
                tracing::info!(address, why, "the leader did not answer an operation on the membership");
                Err(Error::TimeoutConnectionLost)
            }
        }
    }

    /// Handler of `Manage`; the envelope was checked.
    pub async fn answer(&self, operation: Option<Asked>) -> ManageResponse {
        let deadline = Instant::now() + self.node.options().request_timeout;
        let outcome = match operation {
            None => Err(Error::Unsupported("an operation that this version does not know".into())),
            Some(Asked::StayOut(id)) => {
                self.stays_out.store(id == self.node.member().member_id, Ordering::Relaxed);
                Ok(ManageResponse::default())
            }
            Some(_) if !self.node.status().is_leader => Err(Error::NotLeader),
            Some(operation) => self.lead(operation, deadline).await,
        };
        outcome.unwrap_or_else(|error| ManageResponse {
            error: error.number(),
            detail: error.detail(),
            ..ManageResponse::default()
        })
    }

    /// On the leader.
    async fn lead(&self, operation: Asked, deadline: Instant) -> Result<ManageResponse, Error> {
        let mut answer = ManageResponse::default();
        let operation = match operation {
            Asked::Look(_) => {
                answer.view = Some(self.reconciler.view());
                return Ok(answer);
            }
            Asked::Leaving(id) => {
                let membership = self.node.status().membership;
                if membership.get_node(&id).is_none_or(|node| node.kind() != Kind::Reader) {
                    // Whoever has stopped it knows another size than was read last, perhaps.
                    self.reconciler.hurry();
                    return Ok(answer);
                }
                Operation::Remove { id }
            }
            Asked::Add(add) => {
                self.check_free(None, &add.peer_address)?;
                let added = self.dial(&add.peer_address, add.more_peer_addresses, add.held).await?;
                if let Operation::Add { id, .. } = &added {
                    answer.member_id = *id;
                }
                added
            }
            Asked::Update(update) => {
                self.check_free(Some(update.id), &update.peer_address)?;
                let is_there = self.check_moved(update.id, &update.peer_address).await?;
                let Update { id, peer_address, more_peer_addresses } = update;
                Operation::Update { id, peer_address, more_peer_addresses, is_there }
            }
            Asked::Remove(id) => Operation::Remove { id },
            Asked::Promote(id) => Operation::Promote { id },
            Asked::StayOut(_) => return Err(Error::Unsupported("this is for the member itself".into())),
        };
        self.reconciler.operate(operation, deadline).await?;
        Ok(answer)
    }

    /// Whether the address is no other member's than `of`, who is one. As etcd, before anything else is looked at.
    fn check_free(&self, of: Option<u64>, address: &str) -> Result<(), Error> {
        let membership = self.node.status().membership;
        if of.is_some_and(|id| membership.get_node(&id).is_none()) {
            return Err(Error::MemberNotFound);
        }
        let taken = membership
            .nodes()
            .any(|(id, node)| Some(*id) != of && identity::peer_addresses(node).any(|known| known == address));
        if taken { Err(Error::PeerUrlExists) } else { Ok(()) }
    }

    /// Rule 24: the node that is added says itself who it is. Where nodes are added by hand alone it may come later: then an id is reserved
    /// for it.
    async fn dial(&self, address: &str, more: Vec<String>, held: bool) -> Result<Operation, Error> {
        let who = match peers::who(self.node.env(), &self.peers, address, WHO_PATIENCE).await {
            Ok(who) => who,
            Err(_) if self.is_by_hand() => return self.reserve(address, more, held).await,
            Err(Unreachable(why)) => {
                return Err(Error::MemberUnreachable(format!(
                    "the node at {address} does not answer ({why}); start it first, it then waits to be added"
                )));
            }
        };
        let own = self.node.member().cluster_id;
        if who.cluster_id != own && who.state() != State::Pristine {
            let text = format!(
                "the node at {address} belongs to cluster {:016x}; only a node with an empty disk can be added",
                who.cluster_id
            );
            return Err(Error::Membership(text));
        }
        let mut node = who.node.unwrap_or_default();
        if node.kind() != Kind::Reader {
            node.set_kind(Kind::Manual);
        }
        node.peer_address = address.to_owned();
        node.held = held;
        Ok(Operation::Add { id: who.member_id, node })
    }

    /// Whether nobody is a member who came by itself.
    fn is_by_hand(&self) -> bool {
        self.node.status().membership.nodes().all(|(_, node)| node.kind() != Kind::Slot)
    }

    async fn reserve(&self, address: &str, more_peer_addresses: Vec<String>, held: bool) -> Result<Operation, Error> {
        self.node.wait_version(kv::RESERVATIONS_SINCE, "to add a node that is not there yet needs").await?;
        let id = identity::mint(self.node.env().random_u64(), identity::READER_SLOT);
        let (peer_address, reservation) = (address.to_owned(), Some(Reservation::default()));
        let kind = Kind::Manual.into();
        let node = log::Node { peer_address, more_peer_addresses, held, kind, reservation, ..log::Node::default() };
        Ok(Operation::Add { id, node })
    }

    /// True if the member lives there already. Nobody may live there yet, but not somebody else.
    async fn check_moved(&self, id: u64, address: &str) -> Result<bool, Error> {
        match peers::who(self.node.env(), &self.peers, address, WHO_PATIENCE).await {
            Ok(who) if who.member_id != id => {
                Err(Error::Membership(format!("member {:016x} answers at {address}, not {id:016x}", who.member_id)))
            }
            answer => Ok(answer.is_ok()),
        }
    }

    /// What the leader sees; what this member knows if no leader answers.
    pub async fn view(&self) -> MembershipView {
        match self.manage_until(Asked::Look(Look {}), Instant::now() + VIEW_PATIENCE).await {
            Ok(ManageResponse { view: Some(view), .. }) => view,
            _ => self.reconciler.view(),
        }
    }

    /// Sets the wanted size outside of Kubernetes; 0 replicas: every member stays.
    pub async fn scale(&self, caller: &Caller, start: u64, replicas: u64) -> Result<WantedSize, Error> {
        let known = self.node.store().read(|s| s.kv.cluster_version());
        if known < kv::WANTED_SIZE_SINCE {
            return Err(Error::Membership(format!(
                "the cluster's version is {known}, and this needs {}: it rises by itself when every member runs this version",
                kv::WANTED_SIZE_SINCE
            )));
        }
        if start.saturating_add(replicas) > u64::from(identity::SLOT_MAX) + 1 {
            let text = format!("{replicas} slots from {start} on do not exist: the last is {}", identity::SLOT_MAX);
            return Err(Error::Membership(text));
        }
        let size = WantedSize { start, replicas };
        let request = Some(command::Request::WantedSize(size));
        match self.node.propose(caller, Command::new(kv::WANTED_SIZE_SINCE, request)).await?.response {
            Some(answer::Response::WantedSize(size)) => Ok(size),
            _ => Err(Error::Timeout),
        }
    }
}
