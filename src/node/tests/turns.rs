//! Whose commands go when: rounds of the proposer, without a Raft.

use tokio::sync::mpsc;

use super::super::admit::Weight;
use super::super::propose::{Forwarded, Proposal, Proposer, Reply};
use super::*;
use crate::pb::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{Compare, PutRequest, RequestOp, TxnRequest};
use crate::pb::log::command::Request;
use crate::raft::tests::entry;

/// A proposer whose batches the test applies.
pub(super) struct Played {
    pub node: Node,
    proposer: Proposer,
    asks: mpsc::Sender<Proposal>,
    told: (mpsc::Sender<Forwarded>, mpsc::Receiver<Forwarded>),
    places: Places,
    in_flight: std::collections::VecDeque<(Bytes, u64, Vec<u64>)>,
    asked: u64,
    number: u64,
}

/// Who asks for what.
pub(super) fn proposal(asker: u64, command: Command) -> (u64, Command) {
    (asker, command)
}

impl Played {
    pub(super) async fn start(quota: Option<u64>) -> Self {
        let env = Env::sim(1, Arc::new(SimDisk::new(1)), net().host(ip(1)));
        let (raft, store, _) = running_raft(&env).await;
        let mut options = options();
        options.limits = Limits::default();
        let node = Node::start(env.clone(), options, THIS, raft, store, Peers::new(env));
        node.space().quota_bytes.set(quota.unwrap_or(u64::MAX)).unwrap();
        node.store().write(|s| {
            let raise = Request::SetClusterVersion(pb::log::SetClusterVersion { version: crate::kv::APPLY_VERSION });
            s.kv.apply(&Command::new(1, raise), false).unwrap().unwrap();
        });
        let (asks, queue) = mpsc::channel(100_000);
        let (proposer, places) = (Proposer::new(node.clone(), queue), Places::new(1_000_000, u64::MAX / 8));
        let (told, in_flight) = (mpsc::channel(1_000_000), std::collections::VecDeque::new());
        Self { node, proposer, asks, told, places, in_flight, asked: 0, number: 0 }
    }

    /// Returns the number of the command.
    pub(super) fn ask(&mut self, (asker, command): (u64, Command)) -> u64 {
        self.asked += 1;
        let command = Bytes::from(command.encode_to_vec());
        let place = self.places.take(&Client::default(), 1).unwrap();
        let reply = Reply::Remote { id: self.asked, to: self.told.0.clone(), _place: place };
        let proposal = Proposal { command, asker, weight: Weight::default(), reply };
        assert!(self.asks.try_send(proposal).is_ok());
        self.asked
    }

    /// Packs what goes next; the heavy one before it, if there was one, is through. Returns whose commands these are.
    pub(super) fn round(&mut self) -> Vec<u64> {
        let packed = self.proposer.round_of_test();
        let mut all = Vec::new();
        for (batch, adds, replies) in packed {
            let ids: Vec<u64> = replies.iter().map(Reply::id_of_test).collect();
            all.extend(&ids);
            self.proposer.note_of_test(self.number, batch.clone(), adds);
            self.in_flight.push_back((batch, adds, ids));
            self.number += 1;
        }
        all
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(super) fn waits(&self) -> bool {
        self.proposer.waits_of_test()
    }

    /// Applies the batch that is first in flight. Returns what was counted of it.
    pub(super) fn apply_next(&mut self) -> u64 {
        let (batch, adds, _) = self.in_flight.pop_front().unwrap();
        let commands = pb::log::Batch::decode(batch).unwrap().commands;
        let index = self.node.store().applied_index().map_or(0, |index| index + 1);
        self.node.store().apply(entry(TERM, index, commands), false).unwrap();
        self.proposer.forget_of_test(self.number - self.in_flight.len() as u64 - 1);
        adds
    }

    /// Whether the proposer, of a member that leads in `term` or leads no more, would propose now.
    async fn would_propose(&mut self, term: Option<u64>) -> bool {
        if let Some(term) = term {
            self.node.inner.term.store(term, Ordering::Relaxed);
        }
        *self.node.inner.route.write() = if term.is_some() { Route::Leader } else { Route::Unknown };
        self.node.inner.route_changed.send_modify(|n| *n += 1);
        tokio::time::timeout(Duration::from_secs(1), self.proposer.settle_of_test()).await.is_ok()
    }

    fn apply_of_term(&self, term: u64) {
        let index = self.node.store().applied_index().map_or(0, |index| index + 1);
        self.node.store().apply(entry(term, index, Vec::new()), false).unwrap();
    }

    /// How many were refused since the last call.
    pub(super) fn refused(&mut self) -> usize {
        std::iter::from_fn(|| self.told.1.try_recv().ok()).count()
    }
}

/// What these left it has not counted, nor can it know what a command would copy of that.
#[tokio::test(start_paused = true)]
async fn a_new_leader_proposes_nothing_before_it_has_applied_what_earlier_ones_left() {
    let mut played = Played::start(None).await;
    // The node finds out first that Raft knows no leader.
    crate::env::sleep(Duration::from_millis(20)).await;
    played.apply_of_term(1);
    assert!(played.would_propose(Some(1)).await);
    assert!(!played.would_propose(Some(3)).await);
    played.apply_of_term(2);
    assert!(!played.would_propose(Some(3)).await, "of the leader before");
    assert!(played.would_propose(None).await, "Raft refuses it");
    assert!(!played.would_propose(Some(3)).await);
    let node = played.node.clone();
    let applies = tokio::spawn(async move {
        crate::env::sleep(Duration::from_millis(500)).await;
        let index = node.store().applied_index().unwrap() + 1;
        node.store().apply(entry(3, index, Vec::new()), false).unwrap();
    });
    assert!(played.would_propose(Some(3)).await, "as soon as it is applied");
    applies.await.unwrap();
    assert!(played.would_propose(Some(3)).await);
}

fn put_of(value: usize) -> PutRequest {
    PutRequest { key: "k".into(), value: vec![7; value].into(), ..PutRequest::default() }
}

/// So many puts, in transactions within one another as the limits allow.
fn many_puts(count: usize) -> Request {
    let puts = (0..count).map(|n| Op::RequestPut(PutRequest { key: n.to_string().into(), ..put_of(1) }));
    let mut success: Vec<RequestOp> = Vec::new();
    for group in puts.collect::<Vec<_>>().chunks(60) {
        let ops = group.iter().map(|put| RequestOp { request: Some(put.clone()) }).collect();
        let nested = TxnRequest { success: ops, ..TxnRequest::default() };
        success.push(RequestOp { request: Some(Op::RequestTxn(nested)) });
    }
    Request::Txn(TxnRequest { success, ..TxnRequest::default() })
}

/// A small request that looks at every key.
fn heavy() -> Request {
    let compare = Compare {
        key: [0].to_vec().into(),
        range_end: [0].to_vec().into(),
        target: CompareTarget::Mod as i32,
        result: CompareResult::Greater as i32,
        target_union: Some(TargetUnion::ModRevision(i64::MAX)),
    };
    let success = vec![RequestOp { request: Some(Op::RequestPut(put_of(1))) }];
    Request::Txn(TxnRequest { compare: vec![compare], success, ..TxnRequest::default() })
}

/// Random clients that ask for very much of any kind, and one that asks for one thing.
#[tokio::test(start_paused = true)]
async fn a_client_that_asks_for_much_delays_others_by_a_few_rounds() {
    let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..12 {
        let mut played = Played::start(None).await;
        played.node.store().write(|s| {
            for n in 0..4500 {
                let put = PutRequest { key: format!("{n:04}").into(), ..put_of(1) };
                s.kv.apply(&Command::new(1, Request::Put(put)), false).unwrap().unwrap();
            }
        });
        let greedy = random.u64(1..4);
        let kind = random.u8(..3);
        let much = move |random: &mut fastrand::Rng| match kind {
            0 => Request::Put(put_of(random.usize(50_000..1_000_000))),
            1 => many_puts(random.usize(500..2000)),
            _ => heavy(),
        };
        let count = if kind == 2 { 4000 } else { 100 };
        let ask_much = |played: &mut Played, random: &mut fastrand::Rng, count: usize| {
            for _ in 0..count {
                let command = Command::new(1, much(random));
                played.ask(proposal(random.u64(1..=greedy), command));
            }
        };
        ask_much(&mut played, &mut random, count);
        for _ in 0..random.usize(..3) {
            played.round();
        }
        for asker in [0, 77] {
            ask_much(&mut played, &mut random, 20);
            let is_heavy = random.bool();
            let modest = if is_heavy { heavy() } else { Request::Put(put_of(10)) };
            let wanted = played.ask(proposal(asker, Command::new(1, modest)));
            ask_much(&mut played, &mut random, 20);
            let mut rounds = 1;
            while !played.round().contains(&wanted) {
                rounds += 1;
                assert!(played.waits(), "it was lost");
            }
            assert!(rounds <= 2 + greedy, "{rounds} rounds beside {greedy} that ask for much (kind {kind})");
        }
    }
}

/// Beside one who asks for little the rounds of one who asks for much are a quarter; alone, or beside his like, they are whole.
#[tokio::test(start_paused = true)]
async fn rounds_are_narrow_while_somebody_asks_for_little_beside_who_asks_for_much() {
    let mut played = Played::start(None).await;
    let put = |asker, bytes| proposal(asker, Command::new(1, Request::Put(put_of(bytes))));
    let ask_many = |played: &mut Played, asker, count, bytes| {
        for _ in 0..count {
            played.ask(put(asker, bytes));
        }
    };
    ask_many(&mut played, 1, 600, 10);
    assert_eq!(played.round().len(), 256);
    assert_eq!(played.round().len(), 256, "alone");
    ask_many(&mut played, 1, 300, 10);
    ask_many(&mut played, 2, 300, 10);
    assert_eq!(played.round().len(), 256);
    assert_eq!(played.round().len(), 256, "two that are alike");
    while played.waits() {
        played.round();
    }
    ask_many(&mut played, 1, 200, 10);
    played.ask(put(2, 10));
    assert_eq!(played.round().len(), 201, "there is room for all");
    for (bytes, narrow, wide) in [(10, 64, 256), (100_000, 6, 21)] {
        ask_many(&mut played, 1, 900, bytes);
        assert_eq!(played.round().len(), wide);
        let wanted = played.ask(put(2, 10));
        let first = played.round();
        assert!(first.len() <= narrow + 1 && first.contains(&wanted), "{} of {bytes} bytes go first", first.len());
        assert!(played.round().len() <= narrow, "the next one comes soon");
        crate::env::sleep(Duration::from_secs(2)).await;
        assert_eq!(played.round().len(), wide, "and now nobody has come for a while");
        while played.waits() {
            played.round();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn where_little_waits_it_goes_at_once_in_the_order_in_which_it_came() {
    let mut played = Played::start(None).await;
    let asked: Vec<u64> =
        (0..256).map(|n| played.ask(proposal(n % 7, Command::new(1, Request::Put(put_of(100)))))).collect();
    assert_eq!(played.round(), asked);
    assert!(!played.waits());
}
