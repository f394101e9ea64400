//! The way of a request to a leader that is played by the test: what is tried again, what never is, and what is bounded.

mod space;
mod turns;
mod way;

use std::net::IpAddr;

use parking_lot::Mutex;

use super::*;
use crate::caller::Caller;
use crate::env::sim::{SimDisk, SimNet};
use crate::pb::log::{Answer, Command};
use crate::pb::peer::{ForwardRequest, ForwardResponse, forward_response};
use crate::raft::tests::played::{Answers, Messages, play};
use crate::raft::tests::{THIS, put, running_raft};

type Forwards = Messages<ForwardRequest, ForwardResponse>;

const LEADER: u64 = 0x20001;
/// In which it leads.
const TERM: u64 = 1;
const ADDRESS: &str = "10.0.0.2:2380";

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

/// Starts the leader; what it is sent comes out here.
async fn lead(net: &SimNet) -> Forwards {
    play(net, ADDRESS).await.forwards
}

/// A follower whose requests go to [`ADDRESS`].
async fn follower(net: &SimNet, options: Options) -> Node {
    let env = Env::sim(1, Arc::new(SimDisk::new(1)), net.host(ip(1)));
    let (raft, store, _) = running_raft(&env).await;
    let node = Node::start(env.clone(), options, THIS, raft, store, Peers::new(env));
    // The node finds out first that Raft knows no leader.
    crate::env::sleep(Duration::from_millis(20)).await;
    node.inner.term.store(TERM, Ordering::Relaxed);
    *node.inner.route.write() = Route::Follower(Link::open(&node, LEADER, ADDRESS.into()));
    node
}

fn options() -> Options {
    Options {
        request_timeout: Duration::from_secs(3),
        batch_bytes_max: 256 << 10,
        batches_in_flight_max: 2,
        queue_requests_max: 1000,
        queue_bytes_max: 64 << 20,
        lease_reads: false,
        leader_silence_max: Duration::from_secs(2),
        retry_interval: Duration::from_millis(50),
        // The places are what is bounded here.
        limits: Limits { request_bytes_max: usize::MAX, ..Limits::default() },
    }
}

fn net() -> SimNet {
    SimNet::new(1, Duration::from_millis(1))
}

/// The next message that the leader is sent.
async fn sent(leader: &mut Forwards) -> (ForwardRequest, Answers<ForwardResponse>) {
    let message = timeout_at(Instant::now() + Duration::from_secs(10), leader.recv()).await;
    message.expect("a message within 10 s").expect("the leader listens")
}

fn command(bytes: usize) -> Command {
    put("k", &vec![7; bytes])
}

fn told(id: u64, result: forward_response::outcome::Result) -> ForwardResponse {
    let outcomes = vec![forward_response::Outcome { id, result: Some(result), detail: String::new() }];
    ForwardResponse { outcomes, ..ForwardResponse::default() }
}

fn refusal(id: u64, error: Error) -> ForwardResponse {
    told(id, forward_response::outcome::Result::Error(error.number()))
}

/// What `node` was sent by the leader of `term`: an entry with these commands. It applies it as the next.
fn apply(node: &Node, term: u64, message: &ForwardRequest) {
    let commands = message.proposals.iter().map(|proposal| Command::decode(proposal.command.clone()).unwrap());
    let index = node.store().applied_index().map_or(0, |index| index + 1);
    let entry = crate::raft::tests::entry(term, index, commands.collect());
    assert_eq!(node.store().apply(entry, false).unwrap(), [], "only who waits here is answered");
}

#[tokio::test(start_paused = true)]
async fn write_is_answered_by_the_own_apply_and_by_nothing_else() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, options()).await;
    let mut proposing = tokio::spawn({
        let node = node.clone();
        async move { node.propose(&Caller::Nobody, command(10)).await }
    });
    let (message, answers) = sent(&mut leader).await;
    let id = message.proposals[0].id;
    // What a leader of an older version answers, which this member has perhaps not applied; and that it does not know.
    answers.send(Ok(told(id, forward_response::outcome::Result::Answer(Answer::default())))).await.unwrap();
    answers.send(Ok(refusal(id, Error::TimeoutLeaderFailure))).await.unwrap();
    // The stream may even break.
    net.power_off(ip(2));
    assert!(timeout_at(Instant::now() + Duration::from_secs(1), &mut proposing).await.is_err());
    apply(&node, TERM, &message);
    let answer = proposing.await.unwrap().expect("it is applied");
    let Some(pb::log::answer::Response::Put(put)) = answer.response else { panic!("{answer:?}") };
    assert_eq!(put.header.unwrap().revision, node.store().read(|s| s.kv.revision()));
}

#[tokio::test(start_paused = true)]
async fn command_of_another_process_is_applied_and_answered_to_nobody() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, options()).await;
    let proposing = tokio::spawn({
        let node = node.clone();
        async move { node.propose(&Caller::Nobody, command(10)).await }
    });
    let (mut message, _) = sent(&mut leader).await;
    let mut foreign = Command::decode(message.proposals[0].command.clone()).unwrap();
    let origin = foreign.origin.as_mut().expect("it says who asked");
    origin.process ^= 1;
    message.proposals[0].command = foreign.encode_to_vec().into();
    apply(&node, TERM, &message);
    assert_eq!(proposing.await.unwrap(), Err(Error::Timeout), "its own command was not applied");
}

#[tokio::test(start_paused = true)]
async fn request_whose_fate_is_unknown_ends_with_a_timeout_and_is_never_sent_again() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, options()).await;
    let propose = || {
        let node = node.clone();
        tokio::spawn(async move { node.propose(&Caller::Nobody, command(10)).await })
    };
    let proposing = propose();
    let (message, _) = sent(&mut leader).await;
    assert_eq!(message.proposals.len(), 1);
    net.power_off(ip(2));
    assert_eq!(proposing.await.unwrap(), Err(Error::Timeout));
    // The leader is back, and is sent nothing.
    let mut leader = lead(&net).await;
    assert!(timeout_at(Instant::now() + Duration::from_secs(5), leader.recv()).await.is_err());

    // A later leader has not got it: nobody waits until the request's time is over.
    let proposing = propose();
    sent(&mut leader).await;
    let began = Instant::now();
    apply(&node, TERM + 1, &ForwardRequest::default());
    assert_eq!(proposing.await.unwrap(), Err(Error::TimeoutLeaderFailure));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn request_that_was_not_sent_waits_for_a_leader() {
    let net = net();
    let node = follower(&net, options()).await;
    let proposing = tokio::spawn({
        let node = node.clone();
        async move { node.propose(&Caller::Nobody, command(10)).await }
    });
    crate::env::sleep(Duration::from_millis(500)).await;
    assert!(!proposing.is_finished(), "nobody listens, so nothing was sent: it is tried again");
    let mut leader = lead(&net).await;
    let (message, answers) = sent(&mut leader).await;
    // Whoever was asked did not lead any more, and did not propose: that too is tried again.
    answers.send(Ok(refusal(message.proposals[0].id, Error::NotLeader))).await.unwrap();
    let (message, _) = sent(&mut leader).await;
    apply(&node, TERM, &message);
    proposing.await.unwrap().expect("it was applied");
}

#[tokio::test(start_paused = true)]
async fn read_that_waits_for_a_leader_that_is_gone_goes_on_with_the_next() {
    let net = net();
    let (mut old, mut new) = (lead(&net).await, play(&net, "10.0.0.3:2380").await.forwards);
    let node = follower(&net, options()).await;
    let began = Instant::now();
    let reading = tokio::spawn({
        let node = node.clone();
        async move { node.read_index().await }
    });
    sent(&mut old).await;
    // It says nothing more, and its connection stays.
    *node.inner.route.write() = Route::Follower(Link::open(&node, LEADER + 1, "10.0.0.3:2380".into()));
    node.inner.route_changed.send_modify(|n| *n += 1);
    let (message, answers) = sent(&mut new).await;
    apply(&node, TERM + 1, &ForwardRequest::default());
    let confirmed = ForwardResponse { read_index_id: message.read_index_id, ..ForwardResponse::default() };
    answers.send(Ok(confirmed)).await.unwrap();
    reading.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn request_that_nobody_takes_ends_with_its_time() {
    let node = follower(&net(), options()).await;
    let began = Instant::now();
    assert_eq!(node.propose(&Caller::Nobody, command(10)).await, Err(Error::Timeout));
    assert_eq!(node.read_index().await, Err(Error::Timeout));
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}

/// A message beyond gRPC's limit would break the stream, and every request on it would be of unknown fate.
#[tokio::test(start_paused = true)]
async fn many_large_requests_go_in_messages_of_bounded_size() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, options()).await;
    let proposals: Vec<_> = (0..60)
        .map(|n| {
            let node = node.clone();
            tokio::spawn(async move {
                node.propose(&Caller::Nobody, command(if n == 7 { 1 << 20 } else { 100 << 10 })).await
            })
        })
        .collect();
    let mut answered = 0;
    while answered < proposals.len() {
        let (message, _) = sent(&mut leader).await;
        let bytes: usize = message.proposals.iter().map(|proposal| proposal.command.len()).sum();
        assert!(bytes <= 256 << 10 || message.proposals.len() == 1, "{bytes} bytes in a message");
        apply(&node, TERM, &message);
        answered += message.proposals.len();
    }
    for proposal in proposals {
        proposal.await.unwrap().expect("it was answered");
    }
}

#[tokio::test(start_paused = true)]
async fn queues_are_bounded_and_say_so() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, Options { queue_requests_max: 8, queue_bytes_max: 1 << 20, ..options() }).await;
    let told = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..30 {
        let (node, told) = (node.clone(), told.clone());
        tokio::spawn(async move {
            let outcome = node.propose(&Caller::Nobody, command(10)).await;
            told.lock().push(outcome.map(|_| ()));
        });
        crate::env::sleep(Duration::from_millis(5)).await;
    }
    // Eight have a place; the others were told at once.
    assert_eq!(*told.lock(), vec![Err(Error::TooManyRequests); 22]);
    let mut messages = Vec::new();
    while let Ok(message) = leader.try_recv() {
        messages.push(message);
    }
    assert_eq!(messages.iter().map(|(message, _)| message.proposals.len()).sum::<usize>(), 8);
    assert_eq!(node.read_index().await, Err(Error::TooManyRequests));

    // Answers make room.
    for (message, _) in messages {
        apply(&node, TERM, &message);
    }
    crate::env::sleep(Duration::from_millis(100)).await;
    assert_eq!(told.lock().iter().filter(|outcome| outcome.is_ok()).count(), 8);
    let large = node.propose(&Caller::Nobody, command(2 << 20)).await;
    assert_eq!(large.map(|_| ()), Err(Error::TooManyRequests), "bytes are bounded too");
    tokio::spawn(async move { node.propose(&Caller::Nobody, command(10)).await });
    let (message, _) = sent(&mut leader).await;
    assert_eq!(message.proposals.len(), 1);
}

/// Or clients that ask and leave, again and again while nobody answers, would fill the memory.
#[tokio::test(start_paused = true)]
async fn who_gives_up_keeps_its_place_until_its_write_is_answered() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, Options { queue_requests_max: 8, ..options() }).await;
    for _ in 0..8 {
        let node = node.clone();
        let asking = tokio::spawn(async move { node.propose(&Caller::Nobody, command(10)).await });
        crate::env::sleep(Duration::from_millis(5)).await;
        asking.abort();
    }
    assert_eq!(node.propose(&Caller::Nobody, command(10)).await, Err(Error::TooManyRequests));
    while let Ok((message, _)) = leader.try_recv() {
        apply(&node, TERM, &message);
    }
    crate::env::sleep(Duration::from_millis(100)).await;
    tokio::spawn(async move { node.propose(&Caller::Nobody, command(10)).await });
    let (message, _) = sent(&mut leader).await;
    assert_eq!(message.proposals.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn reads_that_come_during_a_round_share_the_next() {
    let net = net();
    let mut leader = lead(&net).await;
    let node = follower(&net, options()).await;
    let read = || {
        let node = node.clone();
        tokio::spawn(async move { node.read_index().await })
    };
    let first = read();
    let (message, answers) = sent(&mut leader).await;
    let id = message.read_index_id;
    assert_ne!(id, 0);
    let later: Vec<_> = (0..10).map(|_| read()).collect();
    crate::env::sleep(Duration::from_millis(50)).await;
    assert!(leader.try_recv().is_err(), "one round at a time");
    // Nobody has applied index 0 here; a failed round is tried again, as it changes nothing.
    let failed =
        ForwardResponse { read_index_id: id, read_error: Error::NotLeader.number(), ..ForwardResponse::default() };
    answers.send(Ok(failed)).await.unwrap();
    let (message, answers) = sent(&mut leader).await;
    node.store().apply(crate::raft::tests::entry(1, 0, vec![command(1)]), false).unwrap();
    let confirmed = ForwardResponse { read_index_id: message.read_index_id, ..ForwardResponse::default() };
    answers.send(Ok(confirmed.clone())).await.unwrap();
    for read in later {
        read.await.unwrap().expect("one answer for all of them");
    }
    let (message, answers) = sent(&mut leader).await;
    answers.send(Ok(ForwardResponse { read_index_id: message.read_index_id, ..confirmed })).await.unwrap();
    first.await.unwrap().unwrap();
}

/// The leader's end: what does not fit into one message comes with the next.
#[tokio::test(start_paused = true)]
async fn large_answers_come_in_messages_of_bounded_size() {
    let (to, outcomes) = mpsc::channel(100);
    let mut serving = forward::Serving::of(outcomes);
    let range = pb::etcd::RangeResponse {
        kvs: vec![pb::KeyValue::new(pb::Fields { key: b"k", value: &vec![7; 700 << 10], ..pb::Fields::default() })],
        ..Default::default()
    };
    let txn = pb::etcd::TxnResponse {
        responses: vec![pb::etcd::ResponseOp { response: Some(pb::etcd::response_op::Response::ResponseRange(range)) }],
        ..Default::default()
    };
    for id in 1..=5 {
        let answer = Answer { response: Some(pb::log::answer::Response::Txn(txn.clone())) };
        let place = Places::new(1, 1).take(&Client::default(), 0).unwrap();
        Reply::Remote { id, to: to.clone(), _place: place }.send(Ok(answer));
    }
    Waiter::Remote { id: 9, to }.send(Ok(4));
    let mut seen = Vec::new();
    while let Some(message) = serving.next().await {
        assert!(message.outcomes.len() <= 2, "{} answers of 700 KiB in a message", message.outcomes.len());
        seen.extend(message.outcomes.iter().map(|outcome| outcome.id));
        seen.extend((message.read_index_id != 0).then_some(message.read_index_id));
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 9]);
}

/// A store in which alarm CORRUPT is on for `fenced`, one of three members.
fn fence(node: &Node, fenced: u64) {
    let voters = [THIS.member_id, fenced, 0x30001];
    let nodes = voters.map(|id| (id, pb::log::Node { name: format!("kv-{id}"), ..Default::default() }));
    let membership = openraft::Membership::new(vec![voters.into()], std::collections::BTreeMap::from(nodes)).unwrap();
    let formed = crate::raft::Entry {
        log_id: crate::raft::LogId::new_term_index(TERM, 0),
        payload: openraft::EntryPayload::Membership(membership),
    };
    node.store().apply(formed, false).unwrap();
    let alarm = alarm(fenced, pb::etcd::alarm_request::AlarmAction::Activate);
    node.store().apply(crate::raft::tests::entry(TERM, 1, vec![alarm]), false).unwrap();
    assert!(node.is_fenced(fenced) && !node.is_fenced(THIS.member_id));
}

fn alarm(member_id: u64, action: pb::etcd::alarm_request::AlarmAction) -> Command {
    let alarm = pb::etcd::AlarmRequest { action: action.into(), member_id, alarm: pb::etcd::AlarmType::Corrupt.into() };
    Command::new(crate::kv::ALARMS_SINCE, pb::log::command::Request::Alarm(alarm))
}

/// It may not have applied its own alarm yet: a log that gave way under its state makes it apply nothing for a while.
#[tokio::test(start_paused = true)]
async fn what_a_fenced_member_asks_is_refused_but_for_alarms() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let net = net();
    let node = follower(&net, options()).await;
    fence(&node, LEADER);
    for from in [LEADER, 0x30001] {
        for _ in 0..20 {
            let commands: Vec<(bool, Command)> = (0..random.usize(0..20))
                .map(|_| match random.bool() {
                    true => (true, alarm(LEADER, pb::etcd::alarm_request::AlarmAction::Deactivate)),
                    false => (false, command(random.usize(..100))),
                })
                .collect();
            let proposal = |(id, (_, command)): (usize, &(bool, Command))| pb::peer::forward_request::Proposal {
                id: id as u64 + 1,
                command: command.encode_to_vec().into(),
            };
            let proposals: Vec<_> = commands.iter().enumerate().map(proposal).collect();
            let request = ForwardRequest { proposals, read_index_id: 99, ..ForwardRequest::default() };
            let requests = tokio_stream::iter([Ok::<_, std::convert::Infallible>(request)]);
            let mut serving = node.serve_forward(from, requests);
            let mut refused = Vec::new();
            let seen = async {
                while let Some(message) = serving.next().await {
                    let corrupt = Error::Corrupt.number();
                    let is_corrupt = |outcome: &&forward_response::Outcome| matches!(&outcome.result, Some(forward_response::outcome::Result::Error(error)) if *error == corrupt);
                    refused.extend(message.outcomes.iter().filter(is_corrupt).map(|outcome| outcome.id));
                    if message.read_index_id != 0 && message.read_error == corrupt {
                        refused.push(message.read_index_id);
                    }
                }
            };
            // Of what is taken some is answered only much later, or never.
            let _ = crate::env::timeout(Duration::from_secs(10), seen).await;
            let others = commands.iter().enumerate().filter(|(_, (is_alarm, _))| !is_alarm);
            let mut expected: Vec<u64> = others.map(|(id, _)| id as u64 + 1).chain([99]).collect();
            if from != LEADER {
                expected.clear();
            }
            assert_eq!(refused, expected);
        }
    }
}
