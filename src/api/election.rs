//! `v3electionpb.Election`: a leader is the first place in a line (`queue`), and its value what it proclaims.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};

use super::lease::{ended, until};
use super::queue::{delete, first, if_created_at, is_put_off, line, pick, prefix};
use super::{Api, confirm, header, unsound};
use crate::caller::Caller;
use crate::error::Error;
use crate::node::Node;
use crate::pb::KeyValue;
use crate::pb::election::election_server::Election;
use crate::pb::election::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
    ResignRequest, ResignResponse,
};
use crate::watch::{Hub, Output, Session, Shape};

#[tonic::async_trait]
impl Election for Api {
    /// Answers when elected.
    async fn campaign(&self, request: Request<CampaignRequest>) -> Result<Response<CampaignResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        let CampaignRequest { name, lease, value } = request.into_inner();
        let (place, header) = self.queue(&node, &caller, &name, lease, value).await?;
        let leader = LeaderKey { name, key: place.key, rev: place.create_revision, lease: place.lease };
        Ok(Response::new(CampaignResponse { header: Some(header), leader: Some(leader) }))
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request);
        let ProclaimRequest { leader, value } = request.into_inner();
        let leader = leader.ok_or(Error::MissingLeaderKey)?;
        let caller = caller.await?;
        let made = self.set_value(&node, &caller, &leader.key, leader.rev, leader.lease, value).await?;
        Ok(Response::new(ProclaimResponse { header: header(&node, made.revision) }))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        confirm(&node).await?;
        let name = request.into_inner().name;
        let state = line(&node, &caller, &name)?;
        let revision = state.revision();
        let kv = pick(&node, state, first(&name, 0)).await?.ok_or(Error::ElectionNoLeader)?;
        Ok(Response::new(LeaderResponse { header: header(&node, revision), kv: Some(kv) }))
    }

    type ObserveStream = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

    /// Every leader and all that it proclaims, in order; from the present one on, if there is one.
    async fn observe(&self, request: Request<LeaderRequest>) -> Result<Response<Self::ObserveStream>, Status> {
        let node = self.data_node(&request)?;
        let needs_leader = super::needs_leader(&request);
        let caller = self.caller(&node, &request).await?;
        confirm(&node).await?;
        let told = Told { name: request.into_inner().name.to_vec(), leader: None };
        let hub = self.hub()?;
        let corrupt = node.clone();
        let ended = ended(node.clone(), hub.clone(), needs_leader, async move { unsound(&corrupt).await });
        let observer = Observer { node: node.clone(), caller, hub, session: None, told };
        let answers = stream::try_unfold((node, observer), |(node, mut observer)| async move {
            let (revision, kv) = observer.next().await?;
            let answer = LeaderResponse { header: header(&node, revision), kv: Some(kv) };
            Ok::<_, Status>(Some((answer, (node, observer))))
        });
        Ok(Response::new(Box::pin(until(answers, ended))))
    }

    /// Who does not lead any more has nothing to give back, and that is no error.
    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request);
        let leader = request.into_inner().leader.ok_or(Error::MissingLeaderKey)?;
        let caller = caller.await?;
        let txn = if_created_at(&leader.key, leader.rev, delete(&leader.key), None);
        let made = self.write_txn(&node, &caller, txn).await?.header.unwrap_or_default();
        Ok(Response::new(ResignResponse { header: header(&node, made.revision) }))
    }
}

/// Follows one election.
struct Observer {
    node: Node,
    caller: Caller,
    hub: Hub,
    /// Of everybody in the line; `None` before the beginning, and behind a compaction.
    session: Option<Session>,
    told: Told,
}

impl Observer {
    /// Waits for the next thing to tell, with its revision.
    async fn next(&mut self) -> Result<(i64, KeyValue), Error> {
        loop {
            let Some(session) = &mut self.session else {
                if let Some(now) = self.begin().await? {
                    return Ok(now);
                }
                continue;
            };
            match session.next().await.map_err(|_| Error::Stopped)? {
                Output::Events { batch, .. } => {
                    let leader = match self.told.hear(batch.events.iter().filter_map(|event| event.kv.as_ref())) {
                        Heard::Nothing => continue,
                        Heard::Proclaimed(kv) => Some(kv),
                        Heard::Changed => match self.first_at(batch.revision).await {
                            Ok(leader) => leader,
                            // The present has to do.
                            Err(Error::Compacted) => {
                                self.session = None;
                                continue;
                            }
                            Err(error) => return Err(error),
                        },
                    };
                    if let Some(news) = self.told.tell(batch.revision, leader) {
                        return Ok(news);
                    }
                }
                Output::Compacted { .. } => self.session = None,
                Output::Denied { error, .. } => return Err(error),
                Output::CaughtUp => {}
            }
        }
    }

    /// Who led as of `revision`.
    async fn first_at(&self, revision: i64) -> Result<Option<KeyValue>, Error> {
        loop {
            let state = line(&self.node, &self.caller, &self.told.name)?;
            let leader = pick(&self.node, state, first(&self.told.name, revision)).await;
            if !is_put_off(&self.node, &leader).await {
                return leader;
            }
        }
    }

    /// Begins with the present.
    async fn begin(&mut self) -> Result<Option<(i64, KeyValue)>, Error> {
        let state = line(&self.node, &self.caller, &self.told.name)?;
        let revision = state.revision();
        let leader = pick(&self.node, state, first(&self.told.name, 0)).await;
        if is_put_off(&self.node, &leader).await {
            return Ok(None);
        }
        let (key, range_end) = prefix(&self.told.name);
        let mut session = self.hub.session(self.node.client(), self.caller.clone());
        let shape = Shape::new(key, range_end);
        session.watch(0, &shape, revision + 1)?;
        self.session = Some(session);
        Ok(self.told.tell(revision, leader?))
    }
}

/// What an observer was told last.
struct Told {
    name: Vec<u8>,
    /// The leader, while it leads.
    leader: Option<Leader>,
}

#[derive(PartialEq)]
struct Leader {
    key: Vec<u8>,
    create_revision: i64,
    /// Of what was told.
    mod_revision: i64,
}

/// What a revision means to an observer.
#[derive(Debug, PartialEq)]
enum Heard {
    Nothing,
    /// The leader leads on, with this.
    Proclaimed(KeyValue),
    /// Who leads now only the line knows.
    Changed,
}

impl Told {
    /// What the `changed` versions of those in the line mean, which are all of one revision. As long as nobody comes or goes at the head
    /// of the line, that needs no look at it: who has proclaimed something is still the first.
    fn hear<'a>(&self, changed: impl DoubleEndedIterator<Item = &'a KeyValue>) -> Heard {
        let Some(leader) = &self.leader else { return Heard::Changed };
        match changed.rev().find(|kv| kv.key() == leader.key) {
            None => Heard::Nothing,
            Some(kv) if !kv.is_tombstone() && kv.create_revision() == leader.create_revision => {
                Heard::Proclaimed(kv.clone())
            }
            Some(_) => Heard::Changed,
        }
    }

    fn tell(&mut self, revision: i64, leader: Option<KeyValue>) -> Option<(i64, KeyValue)> {
        let now = leader.as_ref().map(|kv| Leader {
            key: kv.key().to_vec(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
        });
        let changed = now != self.leader;
        self.leader = now;
        leader.filter(|_| changed).map(|kv| (revision, kv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::State;
    use crate::pb::etcd::request_op::Request as OpOfTxn;
    use crate::pb::etcd::{CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest};
    use crate::pb::log::{Command, command::Request};

    fn apply(state: &mut State, request: Request) {
        state.apply(&Command::new(1, request), false).unwrap().unwrap();
    }

    fn put(state: &mut State, key: &str, value: &str) {
        let (key, value) = (key.to_owned().into(), value.to_owned().into());
        apply(state, Request::Put(PutRequest { key, value, ..PutRequest::default() }));
    }

    fn delete(state: &mut State, key: &str) {
        let key = key.to_owned().into();
        apply(state, Request::DeleteRange(DeleteRangeRequest { key, ..DeleteRangeRequest::default() }));
    }

    fn found(state: &State, revision: i64) -> Result<Option<KeyValue>, Error> {
        Ok(state.range(&first(b"e", revision))?.kvs.pop())
    }

    /// What an observer is told of a revision, and whether the line was asked for it.
    fn hear(told: &mut Told, state: &State, revision: i64, line: &[KeyValue]) -> (Option<(i64, KeyValue)>, bool) {
        match told.hear(line.iter()) {
            Heard::Nothing => (None, false),
            Heard::Proclaimed(kv) => (told.tell(revision, Some(kv)), false),
            Heard::Changed => (told.tell(revision, found(state, revision).unwrap()), true),
        }
    }

    fn events(state: &State, from: i64) -> Vec<(i64, Vec<KeyValue>)> {
        let in_line = |events: &[KeyValue]| events.iter().filter(|kv| kv.key().starts_with(b"e/")).cloned().collect();
        let all = state.events_from(from).unwrap();
        let all = all.map(|(revision, events)| (revision, in_line(events)));
        all.filter(|(_, line): &(i64, Vec<KeyValue>)| !line.is_empty()).collect()
    }

    /// All that is told of the revisions from `from` on.
    fn heard(told: &mut Told, state: &State, from: i64) -> String {
        let mut all = Vec::new();
        for (revision, line) in events(state, from) {
            let news = hear(told, state, revision, &line).0;
            all.extend(news.map(|(revision, kv)| {
                format!("{revision}:{}={}", String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(kv.value()))
            }));
        }
        all.join(" ")
    }

    #[test]
    fn an_observer_is_told_every_proclamation_and_every_leader_in_order() {
        let mut state = State::new();
        let mut told = Told { name: b"e".to_vec(), leader: None };
        assert_eq!(told.tell(1, found(&state, 0).unwrap()), None, "no leader yet");
        put(&mut state, "e/b", "1");
        put(&mut state, "e/a", "waits");
        put(&mut state, "e0", "outside");
        put(&mut state, "e/b", "2");
        put(&mut state, "e/b", "3");
        put(&mut state, "e/a", "still waits");
        assert_eq!(heard(&mut told, &state, 2), "2:e/b=1 5:e/b=2 6:e/b=3");
        delete(&mut state, "e/b");
        put(&mut state, "e/c", "late");
        delete(&mut state, "e/a");
        assert_eq!(heard(&mut told, &state, 8), "8:e/a=still waits 10:e/c=late");
        delete(&mut state, "e/c");
        assert_eq!(heard(&mut told, &state, 11), "");
        put(&mut state, "e/d", "4");
        put(&mut state, "e/d", "5");
        let revision = state.revision();
        apply(&mut state, Request::Compact(CompactionRequest { revision, physical: false }));
        let changed = KeyValue::tombstone(b"e/d", revision - 1);
        assert_eq!(told.hear([&changed].into_iter()), Heard::Changed);
        assert_eq!(found(&state, revision - 1), Err(Error::Compacted));
        assert_eq!(told.tell(revision, found(&state, 0).unwrap()).unwrap().1.value(), b"5", "the present has to do");
    }

    /// Random lives of those in a line: what an observer is told is what one would see who looks at the line at each revision, and it
    /// looks only when somebody comes or goes at the head.
    #[test]
    fn an_observer_sees_what_the_line_shows_and_asks_it_only_when_the_head_changes() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..100 {
            let mut state = State::new();
            let keys = random.u32(1..6);
            for step in 0..random.usize(1..80) {
                let key = format!("e/{}", random.u32(..keys));
                match random.u8(..10) {
                    0..3 => delete(&mut state, &key),
                    3 => put(&mut state, "e0", "outside"),
                    4 => {
                        // Several come and go in one revision.
                        let one = |key: u32| {
                            let key = format!("e/{key}");
                            if random.bool() {
                                return super::delete(&key.into());
                            }
                            let put = PutRequest { key: key.into(), value: "all".into(), ..PutRequest::default() };
                            OpOfTxn::RequestPut(put)
                        };
                        let ops = (0..keys).map(one).map(|request| RequestOp { request: Some(request) });
                        let txn = TxnRequest { success: ops.collect(), ..TxnRequest::default() };
                        apply(&mut state, Request::Txn(txn));
                    }
                    _ => put(&mut state, &key, &step.to_string()),
                }
            }
            let mut told = Told { name: b"e".to_vec(), leader: None };
            let (mut before, mut heads, mut asks) = (None, 0, 0);
            for (revision, line) in events(&state, 2) {
                let now = found(&state, revision).unwrap();
                let life = |kv: &Option<KeyValue>| kv.as_ref().map(|kv| (kv.key().to_vec(), kv.create_revision()));
                heads += usize::from(before.is_none() || life(&now) != life(&before));
                let expected = now.clone().filter(|_| now != before).map(|kv| (revision, kv));
                let (news, asked) = hear(&mut told, &state, revision, &line);
                assert_eq!(news, expected);
                asks += usize::from(asked);
                before = now;
            }
            assert!(asks <= heads, "{asks} times for {heads} changes");
        }
    }
}
