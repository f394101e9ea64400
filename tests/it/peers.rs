//! What reaches the peer port and is no member's: nothing of it may stop a member, cost an election, or keep a member out.

use std::collections::VecDeque;
use std::time::Duration;

use quorate::pb::log::{Entry, Formation, LogId, Membership, Node, Reservation, Vote, entry, membership, node};
use quorate::pb::peer::peer_client::PeerClient;
use quorate::pb::peer::{
    AbandonRequest, AcceptRequest, AppendRequest, Envelope, ForwardRequest, JoinRequest, LeasesRequest, ManageRequest,
    SnapshotChunk, SnapshotHead, TransferLeaderRequest, VoteRequest, WhoRequest, forward_request, manage_request,
};
use rustix::process::Signal;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_stream::StreamExt as _;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::storage::oldest_segment;
use crate::support::attack::Raw;
use crate::support::cluster::{Cluster, wait_for};

/// Somebody who reaches the peer port of a member.
struct Stranger {
    random: fastrand::Rng,
    cluster_id: u64,
    members: Vec<u64>,
    /// The members' own.
    term: u64,
}

impl Stranger {
    async fn of(cluster: &Cluster, seed: u64) -> Self {
        let mut members = Vec::new();
        for slot in 0..3 {
            members.push(cluster.member_id(slot).await);
        }
        let (cluster_id, term) = (cluster.cluster_id(0).await, cluster.status(0).await.unwrap().raft_term);
        Self { random: fastrand::Rng::with_seed(seed), cluster_id, members, term }
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.usize(..of.len())]
    }

    /// Numbers of any size, the ends among them.
    fn number(&mut self) -> u64 {
        let any = self.random.u64(..) >> self.random.u32(..64);
        self.pick(&[0, 1, any, u64::MAX, u64::MAX - 1, i64::MAX as u64, 1 << 32])
    }

    fn bytes(&mut self) -> bytes::Bytes {
        let count = self.random.usize(..200);
        std::iter::repeat_with(|| self.random.u8(..)).take(count).collect::<Vec<u8>>().into()
    }

    fn text(&mut self) -> String {
        self.pick(&["", "kv-0", "\u{1b}[2J\u{1b}]0;owned\u{7}", "a\nb", "\u{202e}", "../../../etc", "%d:2380"])
            .to_owned()
    }

    fn log_id(&mut self) -> LogId {
        LogId { term: self.number(), index: self.number() }
    }

    /// An envelope and a vote to `to`, of which at least one thing is not as a member has it.
    fn credentials(&mut self, to: u64) -> (Option<Envelope>, Option<Vote>) {
        let member = self.pick(&self.members.clone());
        let (number, other) = (self.number(), self.number());
        let stranger = number | 1 << 63;
        let envelope = Envelope { cluster_id: self.cluster_id, from: member, to };
        let vote = Vote { term: self.term + self.random.u64(..3), member, committed: self.random.bool() };
        match self.random.u8(..6) {
            0 => (None, Some(vote)),
            1 => (Some(Envelope { cluster_id: stranger, ..envelope }), Some(vote)),
            2 => (Some(Envelope { to: other, ..envelope }).filter(|e| e.to != to), Some(vote)),
            3 => (Some(Envelope { from: stranger, ..envelope }), Some(Vote { member: stranger, ..vote })),
            // A member's, and a vote that is not its own, or of a term that no election has led to.
            4 => (Some(envelope), Some(Vote { member: stranger, ..vote })),
            _ => {
                let term = self.term + (2 << 20) + (self.number() >> 2);
                (Some(envelope), Some(Vote { term: self.pick(&[term, u64::MAX, u64::MAX - 1]), ..vote }))
            }
        }
    }

    fn stranger_envelope(&mut self, to: u64) -> Option<Envelope> {
        Some(Envelope { cluster_id: self.cluster_id, from: self.number() | 1 << 63, to })
    }

    fn node(&mut self) -> Node {
        Node {
            name: self.text(),
            peer_address: self.text(),
            client_urls: vec![self.text(); self.random.usize(..40)],
            kind: self.pick(&[node::Kind::Slot, node::Kind::Manual, node::Kind::Reader]).into(),
            apply_version: self.number() as u32,
            held: self.random.bool(),
            reservation: self.random.bool().then(|| Reservation { claimed_by: self.number() }),
            tls: self.random.bool(),
            more_peer_addresses: vec![self.text(); self.random.usize(..40)],
        }
    }

    fn join_request(&mut self) -> JoinRequest {
        let (member_id, slot, process_nonce) = (self.number(), self.number(), self.number());
        JoinRequest { member_id, slot, node: Some(self.node()), process_nonce, adopts: self.random.bool() }
    }

    fn entries(&mut self) -> Vec<Entry> {
        let payload = |stranger: &mut Self| match stranger.random.u8(..3) {
            0 => None,
            1 => Some(entry::Payload::Batch(stranger.bytes())),
            _ => {
                let configs = vec![membership::Config { voters: vec![stranger.number()] }];
                Some(entry::Payload::Membership(Membership { configs, members: Vec::new() }))
            }
        };
        (0..self.random.usize(..4)).map(|_| Entry { log_id: Some(self.log_id()), payload: payload(self) }).collect()
    }

    async fn call(&mut self, client: &mut PeerClient<Channel>, to: u64) -> Result<(), Status> {
        let (envelope, vote) = self.credentials(to);
        let (last_log, transfer) = (Some(self.log_id()), self.random.bool());
        match self.random.u8(..14) {
            0..3 => {
                let request = VoteRequest { envelope, vote, last_log, leadership_transfer: transfer };
                client.vote(request).await.map(drop)
            }
            3 => {
                let request = VoteRequest { envelope, vote, last_log, leadership_transfer: transfer };
                client.pre_vote(request).await.map(drop)
            }
            4..7 => {
                let request = AppendRequest {
                    envelope,
                    vote,
                    prev: Some(self.log_id()).filter(|_| transfer),
                    entries: self.entries(),
                    leader_commit: Some(self.log_id()),
                    leader_durable: None,
                };
                let mut answers = client.append(tokio_stream::iter([request])).await?.into_inner();
                answers.message().await.map(drop)
            }
            7 => {
                let request = TransferLeaderRequest { envelope, from: vote, to: self.number(), last_log };
                client.transfer_leader(request).await.map(drop)
            }
            8 => {
                let head =
                    SnapshotHead { envelope, vote, snapshot_id: self.text(), file_bytes: self.number(), meta: None };
                client.snapshot_offset(head.clone()).await.map(drop)?;
                let chunk = SnapshotChunk { head: Some(head), offset: self.number(), data: self.bytes(), crc: 1 };
                client.snapshot(tokio_stream::iter([chunk.clone(), chunk])).await.map(drop)
            }
            9 => {
                let envelope = self.stranger_envelope(to);
                let proposal = forward_request::Proposal { id: self.number(), command: self.bytes() };
                let request = ForwardRequest { envelope, proposals: vec![proposal], read_index_id: self.number() };
                let mut answers = client.forward(tokio_stream::iter([request.clone(), request])).await?.into_inner();
                answers.message().await.map(drop)
            }
            10 => {
                let request = LeasesRequest {
                    envelope: self.stranger_envelope(to),
                    renew: vec![1; 100],
                    look: vec![-1],
                    in_millis: true,
                };
                client.leases(request).await.map(drop)
            }
            11 => {
                let victim = self.pick(&self.members.clone());
                let operation = Some(match self.random.u8(..4) {
                    0 => manage_request::Operation::Remove(victim),
                    1 => manage_request::Operation::StayOut(victim),
                    2 => manage_request::Operation::Leaving(victim),
                    _ => manage_request::Operation::Promote(victim),
                });
                client.manage(ManageRequest { envelope: self.stranger_envelope(to), operation }).await.map(drop)
            }
            12 => {
                let answer = client.join(self.join_request()).await?.into_inner();
                assert!(!answer.reason.contains(char::is_control), "{answer:?}");
                Ok(())
            }
            _ => {
                let members = vec![membership::Member { id: self.number(), node: Some(self.node()) }];
                let formation = Formation { cluster_id: self.number(), members, moment: None };
                let _ = client.accept(AcceptRequest { formation: Some(formation) }).await;
                let _ = client.abandon(AbandonRequest { cluster_id: self.number() }).await;
                client
                    .who(WhoRequest { nonce: self.number(), digest_index: self.number(), recall_member: self.number() })
                    .await
                    .map(drop)
            }
        }
    }
}

async fn client(cluster: &Cluster, slot: u64) -> PeerClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.peer_address(slot))).unwrap();
    PeerClient::new(endpoint.timeout(Duration::from_secs(20)).connect().await.unwrap())
}

/// Every call of the protocol, with anything in it that is no member's.
#[tokio::test(flavor = "multi_thread")]
async fn no_call_of_a_stranger_stops_a_member_or_costs_an_election() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    cluster.put(0, "k", "before").await;
    let mut stranger = Stranger::of(&cluster, seed).await;
    let before = cluster.status(leader).await.unwrap();
    let mut clients = Vec::new();
    for slot in 0..3 {
        clients.push(client(&cluster, slot).await);
    }
    for _ in 0..900 {
        let slot = stranger.random.usize(..3);
        let to = stranger.members[slot];
        // Refused, most of it.
        let _ = stranger.call(&mut clients[slot], to).await;
        if stranger.random.u8(..10) == 0 {
            let mut raw = TcpStream::connect(cluster.peer_address(slot as u64)).await.unwrap();
            let _ = raw.write_all(&stranger.bytes()).await;
        }
    }
    for slot in 0..3 {
        assert!(cluster.is_running(slot), "kv-{slot} has ended: {}", cluster.log_text(slot));
        cluster.put(slot, "k", &slot.to_string()).await;
    }
    let after = cluster.status(leader).await.unwrap();
    assert_eq!((after.leader, after.raft_term), (before.leader, before.raft_term), "an election was lost");
    assert_eq!(cluster.membership(0).await.len(), 3);
    let shown = cluster.client(&["member", "list"]).await;
    assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
    cluster.wait_logged(leader, &["refused a peer's call", "term"]).await;
}

/// A term is refused that would use up those there are; and a member that was away for more elections than that comes back.
#[tokio::test(flavor = "multi_thread")]
async fn member_that_was_away_for_a_million_elections_comes_back() {
    let mut cluster = Cluster::start(3).await;
    let away = (cluster.wait_formed().await + 1) % 3;
    let (id, cluster_id) = (cluster.member_id(away).await, cluster.cluster_id(0).await);
    let old = cluster.status(away).await.unwrap().raft_term;
    cluster.kill(away);
    let others: Vec<u64> = (0..3).filter(|slot| *slot != away).collect();
    let mut term = old;
    for _ in 0..3 {
        // As if the member itself had called so many elections meanwhile.
        for slot in &others {
            let to = cluster.member_id(*slot).await;
            let asked = cluster.status(*slot).await.unwrap().raft_term + (1 << 20) - 10;
            let request = |term| VoteRequest {
                envelope: Some(Envelope { cluster_id, from: id, to }),
                vote: Some(Vote { term, member: id, committed: false }),
                last_log: Some(LogId { term: u64::MAX, index: u64::MAX }),
                leadership_transfer: true,
            };
            let mut client = client(&cluster, *slot).await;
            for far in [u64::MAX, asked + (1 << 21)] {
                let refused = client.vote(request(far)).await.unwrap_err();
                assert!(refused.message().contains("more than 1048576 above"), "{refused}");
            }
            client.vote(request(asked)).await.unwrap();
        }
        term = wait_for("the others to elect one of them", async || {
            let leader = cluster.leader(others.clone()).await.ok_or("nobody leads".to_owned())?;
            let now = cluster.status(leader).await.map_err(|status| status.to_string())?.raft_term;
            if now > term + (1 << 19) { Ok(now) } else { Err(format!("term {now}")) }
        })
        .await;
    }
    assert!(term > old + (1 << 20), "{term}");
    cluster.start_pod(away);
    cluster.wait_formed().await;
    cluster.put(away, "k", "back").await;
    assert_eq!(cluster.get(others[0], "k").await.as_deref(), Some("back"));
    cluster.wait_logged(away, &["the others hold a term that is far above"]).await;
}

/// More connections than there are places, which say nothing or next to nothing: members connect all the same, and at once.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_keep_no_member_out() {
    quorate::env::process::raise_open_files_max();
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let before = cluster.status(leader).await.unwrap();
    let address = cluster.peer_address(leader);
    // More than there are places, and as soon as one is closed it is there again.
    let mut strangers = tokio::task::JoinSet::new();
    for i in 0..12 {
        let address = address.clone();
        strangers.spawn(async move {
            let (mut silent, mut greeted) = (VecDeque::new(), VecDeque::new());
            loop {
                if i % 2 == 0 {
                    silent.extend(TcpStream::connect(&address).await);
                } else {
                    greeted.extend(Raw::connect(&address).await);
                }
                if silent.len() + greeted.len() >= 100 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    silent.pop_front();
                    greeted.pop_front();
                }
            }
        });
    }
    let back = (leader + 1) % 3;
    cluster.kill(back);
    cluster.start_pod(back);
    cluster.wait_formed().await;
    cluster.put(back, "k", "v").await;
    let after = cluster.status(leader).await.unwrap();
    assert_eq!((after.leader, after.raft_term), (before.leader, before.raft_term), "an election was lost");
    strangers.shutdown().await;
}

/// The one place to receive a snapshot is for who sends one.
#[tokio::test(flavor = "multi_thread")]
async fn silent_streams_hold_nothing_that_a_snapshot_needs() {
    let mut cluster = Cluster::new(3);
    cluster.set("log.segment_bytes", "3MiB").set("log.bytes_max", "6MiB");
    cluster.set("log.entries_max", "50").set("log.entries_kept", "5");
    let leader = cluster.start_all().await;
    let late = (leader + 1) % 3;
    let (id, from, cluster_id) =
        (cluster.member_id(late).await, cluster.member_id(leader).await, cluster.cluster_id(0).await);
    cluster.kill(late);
    let others = [leader, (leader + 2) % 3];
    // Until what it lacks is in no log any more.
    wait_for("logs to be purged", async || {
        for i in 0..20 {
            cluster.put(leader, &format!("k{i}"), &"v".repeat(100 << 10)).await;
        }
        if others.iter().all(|&slot| oldest_segment(&cluster, slot) > 1) { Ok(()) } else { Err("they are not") }
    })
    .await;
    // Nobody sends it a snapshot before the streams are there.
    others.iter().for_each(|&slot| cluster.signal(slot, Signal::STOP));
    cluster.start_pod(late);
    let head = SnapshotHead {
        envelope: Some(Envelope { cluster_id, from, to: id }),
        vote: Some(Vote { term: 1, member: from, committed: true }),
        snapshot_id: format!("{:020}-{:020}", 1, 1),
        file_bytes: 1 << 20,
        meta: None,
    };
    let mut open = Vec::new();
    wait_for("the member to hold the streams", async || {
        let endpoint = Endpoint::from_shared(format!("http://{}", cluster.peer_address(late))).unwrap();
        let client = PeerClient::new(endpoint.connect().await.map_err(|error| error.to_string())?);
        for _ in 0..20 {
            // Nothing is said on some, and on others only whose they are.
            let first = SnapshotChunk { head: Some(head.clone()), ..SnapshotChunk::default() };
            let (mut one, mut other) = (client.clone(), client.clone());
            open.push(tokio::spawn(async move { one.snapshot(tokio_stream::pending()).await.map(drop) }));
            let started = tokio_stream::once(first).chain(tokio_stream::pending());
            open.push(tokio::spawn(async move { other.snapshot(started).await.map(drop) }));
        }
        client.clone().who(WhoRequest::default()).await.map_err(|status| status.to_string())?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        // One that does not run Raft yet refuses them.
        open.retain(|stream| !stream.is_finished());
        if open.len() >= 20 { Ok(()) } else { Err(format!("{} are open", open.len())) }
    })
    .await;
    others.iter().for_each(|&slot| cluster.signal(slot, Signal::CONT));
    cluster.wait_formed().await;
    cluster.wait_same_hash(0..3).await;
    cluster.wait_logged(late, &["snapshot installed"]).await;
    open.iter().for_each(|stream| stream.abort());
}
