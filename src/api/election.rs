//! `v3electionpb.Election`: a leader is the first place in a line (`queue`), and its value what it proclaims.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};

use super::lease::{ended, until};
use super::queue::{delete, first, if_created_at, line, prefix};
use super::{Api, confirm, header, unsound};
use crate::caller::Caller;
use crate::error::Error;
use crate::kv::State;
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
        let kv = first(&state, &name, 0)?.ok_or(Error::ElectionNoLeader)?;
        Ok(Response::new(LeaderResponse { header: header(&node, state.revision()), kv: Some(kv) }))
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
                if let Some(now) = self.begin()? {
                    return Ok(now);
                }
                continue;
            };
            match session.next().await.map_err(|_| Error::Stopped)? {
                Output::Events { batch, .. } => {
                    let keys = batch.events.iter().filter_map(|event| event.kv.as_ref());
                    match self.told.hear(batch.revision, keys, &line(&self.node, &self.caller, &self.told.name)?) {
                        Ok(Some(news)) => return Ok(news),
                        Ok(None) => {}
                        // Compacted meanwhile: the present has to do.
                        Err(_) => self.session = None,
                    }
                }
                Output::Compacted { .. } => self.session = None,
                Output::Denied { error, .. } => return Err(error),
                Output::CaughtUp => {}
            }
        }
    }

    /// Begins with the present.
    fn begin(&mut self) -> Result<Option<(i64, KeyValue)>, Error> {
        let state = line(&self.node, &self.caller, &self.told.name)?;
        let (key, range_end) = prefix(&self.told.name);
        let mut session = self.hub.session(self.node.asker(), self.caller.clone());
        let shape = Shape::new(key, range_end);
        session.watch(0, &shape, state.revision() + 1)?;
        self.session = Some(session);
        Ok(self.told.tell(state.revision(), first(&state, &self.told.name, 0)?))
    }
}

/// What an observer was told last.
struct Told {
    name: Vec<u8>,
    /// The leader, while it leads: its key, and the revision of what was told.
    leader: Option<(Vec<u8>, i64)>,
}

impl Told {
    /// What there is to tell after `changed` versions of those in the line in `revision`.
    fn hear<'a>(
        &mut self,
        revision: i64,
        mut changed: impl Iterator<Item = &'a KeyValue>,
        state: &State,
    ) -> Result<Option<(i64, KeyValue)>, Error> {
        let concerns = match &self.leader {
            Some((leader, _)) => changed.any(|kv| kv.key() == leader),
            None => true,
        };
        if !concerns {
            return Ok(None);
        }
        Ok(self.tell(revision, first(state, &self.name, revision)?))
    }

    fn tell(&mut self, revision: i64, leader: Option<KeyValue>) -> Option<(i64, KeyValue)> {
        let now = leader.as_ref().map(|kv| (kv.key().to_vec(), kv.mod_revision()));
        let changed = now != self.leader;
        self.leader = now;
        leader.filter(|_| changed).map(|kv| (revision, kv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcd::{CompactionRequest, DeleteRangeRequest, PutRequest};
    use crate::pb::log::{Command, command::Request};

    fn apply(state: &mut State, request: Request) {
        state.apply(&Command::new(1, request), false).unwrap().unwrap();
    }

    fn put(state: &mut State, key: &'static str, value: &'static str) {
        apply(state, Request::Put(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }));
    }

    fn delete(state: &mut State, key: &'static str) {
        apply(state, Request::DeleteRange(DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() }));
    }

    /// All that is told of the revisions from `from` on.
    fn heard(told: &mut Told, state: &State, from: i64) -> String {
        let mut all = Vec::new();
        for (revision, events) in state.events_from(from).unwrap() {
            let line: Vec<&KeyValue> = events.iter().filter(|kv| kv.key().starts_with(b"e/")).collect();
            if line.is_empty() {
                continue;
            }
            let news = told.hear(revision, line.into_iter(), state).unwrap();
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
        assert_eq!(told.tell(1, first(&state, b"e", 0).unwrap()), None, "no leader yet");
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
        assert!(told.hear(revision - 1, [&changed].into_iter(), &state).is_err(), "behind a compaction");
        assert_eq!(
            told.tell(revision, first(&state, b"e", 0).unwrap()).unwrap().1.value(),
            b"5",
            "the present has to do"
        );
    }
}
