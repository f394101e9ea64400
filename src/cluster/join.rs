//! The desk at which nodes ask to join: it answers them, and dials them back for the plan (membership rule 10).
//!
//! How server code uses it: the handler of `Join` returns [`Desk::answer`]; the leader's reconciler is woken by [`Desk::asked`],
//! calls [`Desk::dial`], and gives [`Desk::joiners`] to the plan. A joiner asks again until it finds itself in the membership.
//!
//! Invariant: a joiner counts only by what answers at the pattern's address of its slot, never by what it claims. Who asks and does
//! not answer there takes the place of nobody who does, however often and for however many slots it asks: a slot has one place for who
//! was not found there, what was found there is remembered, so that it finds a place when it asks again, and a full desk prefers the
//! lowest slots, which a StatefulSet starts first.
//! Absent: anything durable. A new leader starts with an empty desk; joiners ask again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::formation::Expand;
use super::peers::{self, Peers};
use super::plan::{Dialled, Joiner, Members};
use super::slot_of;
use crate::env::{Env, Instant};
use crate::identity::check_node;
use crate::pb::log::Node;
use crate::pb::log::node::Kind;
use crate::pb::peer::join_response::Outcome;
use crate::pb::peer::{JoinRequest, JoinResponse, WhoResponse};

/// More than these at once are told to wait.
const WAITING_MAX: usize = 64;
/// Who has not asked for so long is forgotten: twice the longest delay between a joiner's requests, jitter included.
const FORGET_AFTER: Duration = Duration::from_secs(45);

/// What the asked member knows when a join arrives.
pub struct Standing<'a> {
    pub cluster_id: u64,
    /// This member leads.
    pub leads: bool,
    /// Readers may join.
    pub takes_readers: bool,
    /// Where the leader is; empty if unknown.
    pub leader_address: String,
    /// The *committed* membership.
    pub members: &'a Members,
    /// Why the last plan changed nothing, for the joiner's log.
    pub blocked: Option<String>,
}

struct Waiting {
    request: JoinRequest,
    first_asked: Instant,
    asked_at: Instant,
    /// A member already, which now has another address than the membership says.
    moved: bool,
    dialled: Dialled,
}

/// Who answered at a slot's address.
struct Found {
    member_id: u64,
    process_nonce: u64,
    at: Instant,
}

impl Found {
    fn is(&self, request: &JoinRequest) -> bool {
        (self.member_id, self.process_nonce) == (request.member_id, request.process_nonce)
    }
}

/// The place of a request among those that a full desk prefers; the least first.
fn rank(request: &JoinRequest) -> u64 {
    match request.node.as_ref().map(Node::kind) {
        Some(Kind::Slot) => request.slot,
        _ => u64::MAX,
    }
}

/// Who waits, by id, and who was found at the slots' addresses.
#[derive(Default)]
struct Book {
    waiting: BTreeMap<u64, Waiting>,
    found: BTreeMap<u64, Found>,
}

impl Book {
    fn forget(&mut self) {
        self.waiting.retain(|_, waiting| waiting.asked_at.elapsed() < FORGET_AFTER);
        self.found.retain(|_, found| found.at.elapsed() < FORGET_AFTER);
    }

    /// It answers where it says.
    fn is_proved(&self, waiting: &Waiting) -> bool {
        let found = self.found.get(&waiting.request.slot);
        waiting.dialled == Dialled::Joiner || found.is_some_and(|found| found.is(&waiting.request))
    }

    /// Makes a place for a request; false if there is none. A member that has moved has one of its own.
    fn make_room(&mut self, request: &JoinRequest, moved: bool) -> bool {
        let is_found = self.found.get(&request.slot).is_some_and(|found| found.is(request));
        if let Some(known) = self.waiting.get(&request.member_id) {
            // Another process of the same disk, or who says so: what is there now is seen when it is dialled again.
            return is_found || known.request.process_nonce == request.process_nonce || !self.is_proved(known);
        }
        let others = self.waiting.iter().filter(|(_, waiting)| !waiting.moved && !self.is_proved(waiting));
        let oldest_first = |waiting: &Waiting| std::cmp::Reverse(waiting.first_asked);
        let goes = if !moved
            && rank(request) != u64::MAX
            && let Some((id, _)) = others.clone().find(|(_, waiting)| rank(&waiting.request) == rank(request))
        {
            Some(*id)
        } else if self.waiting.len() < WAITING_MAX {
            return true;
        } else {
            let last = others.max_by_key(|(_, waiting)| (rank(&waiting.request), oldest_first(waiting)));
            last.filter(|(_, last)| is_found || moved || rank(request) <= rank(&last.request)).map(|(id, _)| *id)
        };
        goes.is_some_and(|id| self.waiting.remove(&id).is_some())
    }
}

/// See the module's head.
#[derive(Default)]
pub struct Desk {
    book: Mutex<Book>,
    asked: Notify,
}

impl Desk {
    /// Handler of `Join`.
    pub fn answer(&self, request: JoinRequest, standing: &Standing<'_>) -> JoinResponse {
        let respond = |outcome: Outcome, reason: &str| JoinResponse {
            outcome: outcome.into(),
            reason: reason.to_owned(),
            leader_address: standing.leader_address.clone(),
            cluster_id: standing.cluster_id,
            adopt: 0,
        };
        if !standing.leads {
            return respond(Outcome::NotLeader, "not the leader");
        }
        if let Err(fault) = request.node.as_ref().map_or(Ok(()), check_node) {
            return respond(Outcome::Refused, &format!("the request is not taken: {fault}"));
        }
        let member = request.member_id;
        if let Some(node) = standing.members.nodes.get(&member) {
            if request.node.as_ref().is_some_and(|now| now.peer_address != node.peer_address) {
                // Without room it asks again.
                self.note(request, true);
            } else {
                self.book.lock().waiting.remove(&member);
            }
            return respond(Outcome::Added, "");
        }
        if member == 0 || request.slot != slot_of(member) || request.node.is_none() {
            return respond(
                Outcome::Wait,
                "the request names no member, no address, or another slot than its member id",
            );
        }
        if let Some(adopt) = standing.members.claimed_by(member).filter(|_| request.adopts) {
            self.book.lock().waiting.remove(&member);
            return JoinResponse { adopt, ..respond(Outcome::Added, "") };
        }
        if !standing.takes_readers && request.node.as_ref().is_some_and(|node| node.kind() == Kind::Reader) {
            // Not for good: whoever rolls the setting out may start the reader first.
            return respond(Outcome::Wait, "this cluster takes no readers: set cluster.readers=true on its members");
        }
        if !self.note(request, false) {
            return respond(
                Outcome::Wait,
                "there is no place for this request at the moment: others ask to join, or another process has this id; it is asked again",
            );
        }
        respond(Outcome::Wait, standing.blocked.as_deref().unwrap_or("not added yet"))
    }

    /// False if there is no room.
    fn note(&self, request: JoinRequest, moved: bool) -> bool {
        let mut book = self.book.lock();
        book.forget();
        if !book.make_room(&request, moved) {
            self.asked.notify_one();
            return false;
        }
        let known = book.waiting.get(&request.member_id);
        let first_asked = known.map_or_else(Instant::now, |known| known.first_asked);
        // Another process with the same disk must be dialled anew.
        let same = known.filter(|known| known.request.process_nonce == request.process_nonce);
        let dialled = same.map_or_else(|| Dialled::Unreachable("not dialled yet".into()), |same| same.dialled.clone());
        let waiting = Waiting { request, first_asked, asked_at: Instant::now(), moved, dialled };
        book.waiting.insert(waiting.request.member_id, waiting);
        self.asked.notify_one();
        true
    }

    /// Wakes when somebody asks.
    pub fn asked(&self) -> &Notify {
        &self.asked
    }

    /// Dials everyone who waits: slots at the pattern's address, others, and members that have moved, at the address that they
    /// gave.
    pub async fn dial(&self, env: &Env, peers: &dyn Peers, expand: Option<&Expand>, patience: Duration) {
        let requests: Vec<(JoinRequest, bool)> =
            self.book.lock().waiting.values().map(|waiting| (waiting.request.clone(), waiting.moved)).collect();
        let dials = requests.into_iter().map(|(request, moved)| async move {
            let expand = expand.filter(|_| !moved);
            let answer = dial_one(env, peers, expand, patience, &request).await;
            (request, expand.is_some(), answer)
        });
        for (request, is_at_slot, answer) in join_all(dials).await {
            let mut book = self.book.lock();
            if let (Ok(found), true) = (&answer, is_at_slot && rank(&request) != u64::MAX) {
                let found =
                    Found { member_id: found.member_id, process_nonce: found.process_nonce, at: Instant::now() };
                book.found.insert(request.slot, found);
            }
            let current = book.waiting.get_mut(&request.member_id);
            if let Some(current) = current.filter(|current| current.request.process_nonce == request.process_nonce) {
                current.dialled = dialled(&request, answer);
            }
        }
    }

    /// Who asks to join, as last dialled.
    pub fn joiners(&self) -> Vec<Joiner> {
        let mut book = self.book.lock();
        book.forget();
        book.waiting
            .values()
            .map(|waiting| Joiner {
                member_id: waiting.request.member_id,
                node: waiting.request.node.clone().unwrap_or_default(),
                dialled: waiting.dialled.clone(),
                adopts: waiting.request.adopts,
            })
            .collect()
    }
}

async fn dial_one(
    env: &Env,
    peers: &dyn Peers,
    expand: Option<&Expand>,
    patience: Duration,
    request: &JoinRequest,
) -> Result<WhoResponse, String> {
    let node = request.node.clone().unwrap_or_default();
    let address = match expand {
        Some(expand) if node.kind() == Kind::Slot => expand(request.slot).unwrap_or(node.peer_address),
        _ => node.peer_address,
    };
    peers::who(env, peers, &address, patience).await.map_err(|error| format!("{address}: {error}"))
}

/// What an answer says of who asked.
fn dialled(request: &JoinRequest, answer: Result<WhoResponse, String>) -> Dialled {
    match answer {
        Ok(who) if who.member_id == request.member_id && who.process_nonce == request.process_nonce => Dialled::Joiner,
        Ok(who) => Dialled::Other(who.member_id),
        Err(error) => Dialled::Unreachable(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::formation::tests::Town;
    use super::*;
    use crate::pb::log::Reservation;

    fn request(member_id: u64, process_nonce: u64) -> JoinRequest {
        JoinRequest { member_id, slot: slot_of(member_id), node: Some(Node::default()), process_nonce, adopts: false }
    }

    fn standing(members: &Members, leads: bool) -> Standing<'_> {
        Standing {
            cluster_id: 7,
            leads,
            takes_readers: false,
            leader_address: "kv-0:2380".into(),
            members,
            blocked: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_leader_takes_requests() {
        let desk = Desk::default();
        let answer = desk.answer(request(0x10001, 5), &standing(&Members::default(), false));
        assert_eq!((answer.outcome(), answer.leader_address.as_str()), (Outcome::NotLeader, "kv-0:2380"));
        assert!(desk.joiners().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn member_is_told_that_it_was_added() {
        let desk = Desk::default();
        let mut members = Members::default();
        assert_eq!(desk.answer(request(0x10001, 5), &standing(&members, true)).outcome(), Outcome::Wait);
        assert_eq!(desk.joiners().len(), 1);
        members.nodes.insert(0x10001, Node::default());
        let answer = desk.answer(request(0x10001, 5), &standing(&members, true));
        assert_eq!((answer.outcome(), answer.cluster_id), (Outcome::Added, 7));
        assert!(desk.joiners().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn disk_for_which_an_id_was_reserved_is_told_which() {
        let desk = Desk::default();
        let mut members = Members::default();
        let reservation = |claimed_by| Node { reservation: Some(Reservation { claimed_by }), ..Node::default() };
        let ask = |members: &Members, member, adopts| {
            let answer = desk.answer(JoinRequest { adopts, ..request(member, 5) }, &standing(members, true));
            (answer.outcome(), answer.adopt)
        };
        members.nodes.insert(0x77_ffff, reservation(0));
        assert_eq!(ask(&members, 0x10001, true), (Outcome::Wait, 0));
        assert_eq!(ask(&members, 0, true), (Outcome::Wait, 0), "nobody's id");
        members.nodes.insert(0x77_ffff, reservation(0x10001));
        assert_eq!(ask(&members, 0x10001, true), (Outcome::Added, 0x77_ffff));
        assert_eq!(ask(&members, 0x20001, true), (Outcome::Wait, 0), "another disk");
        assert_eq!(ask(&members, 0x10001, false), (Outcome::Wait, 0), "it has promised something under its own id");
        assert_eq!(ask(&members, 0x77_ffff, true), (Outcome::Added, 0), "it is that member now");
    }

    #[tokio::test(start_paused = true)]
    async fn claim_counts_only_if_the_slot_answers_the_same() {
        let town = Town::new(2);
        let node = town.start(1);
        let peers: Arc<dyn Peers> = Arc::new(town.clone());
        let expand: Expand = Arc::new(|slot| Some(format!("kv-{slot}")));
        let (member, nonce) = (node.identity().member_id, node.process_nonce());
        for (request, expected) in [
            (request(member, nonce), Dialled::Joiner),
            (request(member, nonce ^ 1), Dialled::Other(member)),
            (request(member ^ (1 << 20), nonce), Dialled::Other(member)),
            (request(0x990000, nonce), Dialled::Unreachable("kv-0: connection refused".into())),
        ] {
            let desk = Desk::default();
            desk.answer(request, &standing(&Members::default(), true));
            desk.dial(node.env(), &*peers, Some(&expand), Duration::from_secs(1)).await;
            assert_eq!(desk.joiners()[0].dialled, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn false_joiners_take_the_place_of_nobody_who_answers() {
        let town = Town::new(2);
        let node = town.start(1);
        let peers: Arc<dyn Peers> = Arc::new(town.clone());
        let expand: Expand = Arc::new(|slot| Some(format!("kv-{slot}")));
        let (member, nonce) = (node.identity().member_id, node.process_nonce());
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        // Of its own slot and of others, below and above it.
        let mut flood = |desk: &Desk| {
            for _ in 0..random.usize(..4 * WAITING_MAX) {
                let (far, near) = (random.u64(..0xffff), random.u64(..80));
                let slot = random.choice([0, 1, 2, 3, far, near]).unwrap();
                let mut false_one = request(random.u64(1..1 << 40) << 16 | slot, random.u64(..));
                if random.u8(..4) == 0 {
                    // The joiner's own id.
                    false_one = request(member, random.u64(..));
                }
                if let Some(node) = &mut false_one.node
                    && random.u8(..8) == 0
                {
                    node.kind = random.choice([Kind::Reader, Kind::Manual]).unwrap().into();
                    node.peer_address = "kv-99".into();
                }
                desk.answer(false_one, &Standing { takes_readers: true, ..standing(&Members::default(), true) });
                assert!(desk.joiners().len() <= WAITING_MAX);
            }
        };
        for _ in 0..50 {
            let desk = Desk::default();
            let is_joiner = |joiner: &Joiner| joiner.member_id == member && joiner.dialled == Dialled::Joiner;
            let mut rounds = 0;
            while !desk.joiners().iter().any(is_joiner) {
                rounds += 1;
                assert!(rounds <= 2, "at the latest when it asks again it finds a place and keeps it");
                flood(&desk);
                desk.answer(request(member, nonce), &standing(&Members::default(), true));
                flood(&desk);
                desk.dial(node.env(), &*peers, Some(&expand), Duration::from_secs(1)).await;
            }
            for _ in 0..3 {
                flood(&desk);
                assert!(desk.joiners().iter().any(is_joiner));
                desk.dial(node.env(), &*peers, Some(&expand), Duration::from_secs(1)).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn reader_is_taken_only_where_readers_are_wanted_and_a_member_stays_one() {
        let desk = Desk::default();
        let reader = Node { kind: Kind::Reader.into(), ..Node::default() };
        let request = || JoinRequest { node: Some(reader.clone()), ..request(0x1ffff, 5) };
        let mut members = Members::default();
        let answer = desk.answer(request(), &standing(&members, true));
        assert_eq!(answer.outcome(), Outcome::Wait);
        assert!(answer.reason.contains("cluster.readers=true"), "{answer:?}");
        assert!(desk.joiners().is_empty(), "it is not even dialled");
        let on = Standing { takes_readers: true, ..standing(&members, true) };
        assert_eq!(desk.answer(request(), &on).outcome(), Outcome::Wait);
        assert_eq!(desk.joiners().len(), 1);
        members.nodes.insert(0x1ffff, reader.clone());
        assert_eq!(desk.answer(request(), &standing(&members, true)).outcome(), Outcome::Added);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_terminal_would_obey_does_not_enter_the_membership() {
        let desk = Desk::default();
        for (name, peer_address) in [
            ("\u{1b}[2J", "kv-0:2380"),
            ("kv\n", "kv-0:2380"),
            ("kv", "kv-0\u{1b}]0;x\u{7}:2380"),
            ("kv", "kv-0"),
            ("\u{202e}", ""),
        ] {
            let node = Node { name: name.into(), peer_address: peer_address.into(), ..Node::default() };
            let answer = desk
                .answer(JoinRequest { node: Some(node), ..request(0x10001, 5) }, &standing(&Members::default(), true));
            assert_eq!(answer.outcome(), Outcome::Refused);
            assert!(answer.reason.contains("is not taken") && !answer.reason.contains(char::is_control), "{answer:?}");
        }
        let long = Node { name: "n".repeat(10_000), ..Node::default() };
        let answer =
            desk.answer(JoinRequest { node: Some(long), ..request(0x10001, 5) }, &standing(&Members::default(), true));
        assert!(answer.outcome() == Outcome::Refused && answer.reason.len() < 5000);
        assert!(desk.joiners().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_asking_is_forgotten_and_the_desk_is_bounded() {
        let desk = Desk::default();
        for life in 1..=WAITING_MAX as u64 + 1 {
            desk.answer(request(life << 16 | life, 5), &standing(&Members::default(), true));
        }
        assert_eq!(desk.joiners().len(), WAITING_MAX);
        crate::env::sleep(FORGET_AFTER).await;
        assert!(desk.joiners().is_empty());
    }
}
