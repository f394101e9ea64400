//! Abuse of the peer port, by somebody who has only asked who is there.
//!
//! Owns the calls of a false member. Absent: anything that only who reads the members' files could know.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use quorate::pb::etcd::PutRequest;
use quorate::pb::log::{Command, Entry, LogId, Node, Reservation, Vote, command, node};
use quorate::pb::peer::forward_request::Proposal;
use quorate::pb::peer::peer_client::PeerClient;
use quorate::pb::peer::{
    AbandonRequest, AcceptRequest, AppendRequest, Envelope, ForwardRequest, JoinRequest, LeasesRequest, ManageRequest,
    SnapshotChunk, SnapshotHead, TransferLeaderRequest, VoteRequest, WhoRequest, WhoResponse, manage_request,
};
use tonic::transport::Channel;

use crate::kinds::{Attack, Tally, answer, lazy, nested};
use crate::support::attack::{Raw, connect};

pub async fn step(kind: &str, attack: &mut Attack, tally: &mut Tally) {
    match kind {
        "peer-silence" => silence(attack).await,
        "peer-halves" => halves(attack).await,
        "joiners" => joiners(attack, tally).await,
        "poison" => poison(attack, tally).await,
        _ => calls(attack, tally).await,
    }
}

async fn peer(attack: &mut Attack) -> Option<(PeerClient<Channel>, WhoResponse)> {
    let address = attack.peers[attack.random.usize(..attack.peers.len())].clone();
    let mut client = PeerClient::new(lazy(&address));
    let who = answer(client.who(WhoRequest { nonce: attack.random.u64(..), ..WhoRequest::default() })).await.ok()?;
    Some((client, who.into_inner()))
}

/// An envelope that is right, but for a sender that is no member, or is another than it says.
fn envelope(attack: &mut Attack, who: &WhoResponse) -> Envelope {
    let members = who.membership.as_ref().map_or(&[][..], |membership| &membership.members[..]);
    let from = match members.get(attack.random.usize(..4)) {
        Some(member) => member.id,
        None => attack.random.u64(..),
    };
    Envelope { cluster_id: who.cluster_id, from, to: who.member_id }
}

async fn silence(attack: &mut Attack) {
    let mut held = Vec::new();
    for _ in 0..1000 {
        let address = attack.peers[attack.random.usize(..attack.peers.len())].clone();
        match tokio::time::timeout(Duration::from_millis(200), connect(&address)).await {
            Ok(Ok(stream)) => held.push(stream),
            _ => break,
        }
    }
    let mut streams = Vec::new();
    for _ in 0..20 {
        let Some((mut client, _)) = peer(attack).await else { continue };
        let mut other = client.clone();
        streams.push(tokio::spawn(async move {
            let _ = client.snapshot(tokio_stream::pending::<SnapshotChunk>()).await;
        }));
        streams.push(tokio::spawn(async move {
            let _ = other.forward(tokio_stream::pending::<ForwardRequest>()).await;
        }));
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    streams.iter().for_each(tokio::task::JoinHandle::abort);
    drop(held);
}

/// Calls of which a part is sent and no more, as many as a connection takes.
async fn halves(attack: &mut Attack) {
    let mut held = Vec::new();
    for _ in 0..attack.random.usize(1..20) {
        let address = attack.peers[attack.random.usize(..attack.peers.len())].clone();
        let Ok(mut raw) = Raw::connect(&address).await else { break };
        for _ in 0..attack.random.usize(1..200) {
            let path = attack.random.choice(["Who", "Join", "Vote", "Append", "Forward"]).unwrap_or("Who");
            let path = format!("/quorate.peer.v1.Peer/{path}");
            let begun = raw.begin(&path, 1 << 20, attack.random.usize(..60_000));
            if !matches!(tokio::time::timeout(Duration::from_millis(200), begun).await, Ok(Ok(()))) {
                break;
            }
        }
        held.push(raw);
    }
    attack.hold(held).await;
}

fn false_node(attack: &mut Attack, kind: node::Kind) -> Node {
    Node {
        name: format!("\u{1b}[2J\u{1b}]0;evil\u{7}-{}", attack.random.u32(..)),
        peer_address: format!("127.77.{}.{}:2380", attack.random.u8(..), attack.random.u8(1..)),
        client_urls: vec!["http://\u{1b}[31mevil\n:2379".into()],
        kind: kind.into(),
        apply_version: attack.random.choice([0, 1, 2, 3, 99]).unwrap_or(0),
        held: false,
        reservation: attack.random.bool().then(|| Reservation { claimed_by: attack.random.u64(..2) }),
        tls: attack.random.bool(),
        more_peer_addresses: vec![format!("127.77.{}.1:2380\u{1b}[2J", attack.random.u8(..)); attack.random.usize(..3)],
    }
}

async fn joiners(attack: &mut Attack, tally: &mut Tally) {
    let Some((mut client, _)) = peer(attack).await else { return };
    for _ in 0..100 {
        let kind = attack.random.choice([node::Kind::Slot, node::Kind::Manual, node::Kind::Reader]);
        let node = false_node(attack, kind.unwrap_or(node::Kind::Slot));
        let slot = attack.random.choice([0, 1, 2, 3, 65535, u64::MAX]).unwrap_or(0);
        let request = JoinRequest {
            member_id: attack.random.u64(..) << 16 | slot & 0xffff,
            slot,
            node: Some(node),
            process_nonce: attack.random.u64(..),
            adopts: attack.random.bool(),
        };
        let told = answer(client.join(request)).await.map(|told| told.into_inner());
        tally.note(match told {
            Ok(told) if told.outcome == 0 => Ok(()),
            Ok(told) => Err(format!("{}: {}", told.outcome().as_str_name(), told.reason)),
            Err(error) => Err(error),
        });
    }
}

async fn poison(attack: &mut Attack, tally: &mut Tally) {
    let Some((mut client, who)) = peer(attack).await else { return };
    let put = PutRequest { key: "hostile/poison".into(), value: "x".into(), ..Default::default() };
    let request = Some(command::Request::Put(put.clone()));
    let commands: Vec<Vec<u8>> = vec![
        Command { needs: 99, request: request.clone(), ..Default::default() }.encode_to_vec(),
        Command { needs: 1, request: None, ..Default::default() }.encode_to_vec(),
        (0..attack.random.usize(1..200)).map(|_| attack.random.u8(..)).collect(),
        {
            let whole = Command { needs: 1, request, ..Default::default() }.encode_to_vec();
            whole[..attack.random.usize(..whole.len())].to_vec()
        },
        {
            // Command.txn.
            let txn = nested(attack.random.usize(40..400), &put.encode_to_vec());
            let mut bytes = vec![8, 1, 4 << 3 | 2];
            prost::encoding::encode_varint(txn.len() as u64, &mut bytes);
            [bytes, txn].concat()
        },
    ];
    let mut envelope = envelope(attack, &who);
    // The most dangerous false member is one that exists.
    if let Some(members) = who.membership.as_ref().filter(|membership| !membership.members.is_empty()) {
        envelope.from = members.members[attack.random.usize(..members.members.len())].id;
    }
    let proposals = commands
        .into_iter()
        .enumerate()
        .map(|(i, command)| Proposal { id: i as u64 + 1, command: Bytes::from(command) });
    let first = ForwardRequest { envelope: Some(envelope), ..Default::default() };
    let second = ForwardRequest { proposals: proposals.collect(), ..Default::default() };
    let requests = futures_util::StreamExt::chain(tokio_stream::iter([first, second]), tokio_stream::pending());
    let Some(stream) = tally.note(answer(client.forward(requests)).await) else { return };
    let mut stream = stream.into_inner();
    while let Ok(Ok(Some(told))) = tokio::time::timeout(Duration::from_millis(500), stream.message()).await {
        for outcome in told.outcomes {
            tally.note::<()>(Err(format!("forwarded: {}", outcome.detail)));
        }
    }
}

async fn calls(attack: &mut Attack, tally: &mut Tally) {
    let Some((mut client, who)) = peer(attack).await else { return };
    let envelope = Some(envelope(attack, &who));
    let term = attack.random.choice([0, 1, who.term, who.term + 1, who.term + (1 << 21), u64::MAX - 1, u64::MAX]);
    let vote = Some(Vote { term: term.unwrap_or(0), member: attack.random.u64(..), committed: attack.random.bool() });
    let log_id = Some(LogId { term: attack.random.u64(..), index: attack.random.u64(..) });
    let outcome = match attack.random.usize(..9) {
        0 | 1 => {
            let request = VoteRequest { envelope, vote, last_log: log_id, leadership_transfer: attack.random.bool() };
            let told = if attack.random.bool() {
                answer(client.vote(request)).await
            } else {
                answer(client.pre_vote(request)).await
            };
            told.and_then(|told| if told.into_inner().granted { Ok(()) } else { Err("not granted".into()) })
        }
        2 => {
            let entries = vec![Entry { log_id, payload: None }];
            let request =
                AppendRequest { envelope, vote, prev: log_id, entries, leader_commit: log_id, leader_durable: None };
            match answer(client.append(tokio_stream::once(request))).await {
                Ok(stream) => answer(stream.into_inner().message()).await.map(drop),
                Err(error) => Err(error),
            }
        }
        3 => {
            let request = TransferLeaderRequest { envelope, from: vote, to: who.member_id, last_log: log_id };
            answer(client.transfer_leader(request)).await.map(drop)
        }
        4 => {
            let head = SnapshotHead {
                envelope,
                vote,
                meta: None,
                snapshot_id: "../../../hostile".into(),
                file_bytes: attack.random.u64(..),
            };
            answer(client.snapshot_offset(head)).await.map(drop)
        }
        5 => {
            let operation = match attack.random.usize(..4) {
                0 => manage_request::Operation::Remove(who.member_id),
                1 => manage_request::Operation::Promote(attack.random.u64(..)),
                2 => manage_request::Operation::StayOut(attack.random.u64(..)),
                _ => manage_request::Operation::Leaving(attack.random.u64(..)),
            };
            // From nobody: what a member may ask, only a member may.
            let envelope = envelope.map(|x| Envelope { from: attack.random.u64(..), ..x });
            answer(client.manage(ManageRequest { envelope, operation: Some(operation) })).await.and_then(|told| {
                let told = told.into_inner();
                if told.error == 0 { Ok(()) } else { Err(format!("manage: {}", told.detail)) }
            })
        }
        6 => {
            let renew = (0..1000).map(|_| attack.random.i64(..)).collect();
            answer(client.leases(LeasesRequest { envelope, renew, ..Default::default() })).await.map(drop)
        }
        7 => answer(client.abandon(AbandonRequest { cluster_id: who.cluster_id })).await.and_then(|told| {
            let told = told.into_inner();
            if told.abandoned { Ok(()) } else { Err(told.reason) }
        }),
        _ => answer(client.accept(AcceptRequest::default())).await.map(drop),
    };
    tally.note(outcome);
}
