//! `v3electionpb.Election`: a leader is the first place in a line (`queue`), and its value what it proclaims.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};

use super::lease::{ended, until};
use super::queue::{delete, first, if_created_at, prefix};
use super::wait::until_found;
use super::{Api, header};
use crate::error::Error;
use crate::kv::State;
use crate::pb::KeyValue;
use crate::pb::election::election_server::Election;
use crate::pb::election::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ProclaimResponse,
    ResignRequest, ResignResponse,
};

/// Revisions that an observer goes through at a time.
const REVISIONS_MAX: usize = 1000;

#[tonic::async_trait]
impl Election for Api {
    /// Answers when elected.
    async fn campaign(&self, request: Request<CampaignRequest>) -> Result<Response<CampaignResponse>, Status> {
        let node = self.node(&request)?;
        let CampaignRequest { name, lease, value } = request.into_inner();
        let (place, header) = self.queue(&node, &name, lease, value).await?;
        let leader = LeaderKey { name, key: place.key, rev: place.create_revision, lease: place.lease };
        Ok(Response::new(CampaignResponse { header: Some(header), leader: Some(leader) }))
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, Status> {
        let node = self.node(&request)?;
        let ProclaimRequest { leader, value } = request.into_inner();
        let leader = leader.ok_or(Error::MissingLeaderKey)?;
        let made = self.set_value(&node, &leader.key, leader.rev, leader.lease, value).await?;
        Ok(Response::new(ProclaimResponse { header: header(&node, made.revision) }))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let node = self.node(&request)?;
        node.read_index().await?;
        let state = node.store().view().kv;
        let kv = first(&state, &request.into_inner().name, 0).ok_or(Error::ElectionNoLeader)?;
        Ok(Response::new(LeaderResponse { header: header(&node, state.revision()), kv: Some(kv) }))
    }

    type ObserveStream = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

    /// Every leader and all that it proclaims, in order; from the present one on, if there is one.
    async fn observe(&self, request: Request<LeaderRequest>) -> Result<Response<Self::ObserveStream>, Status> {
        let node = self.node(&request)?;
        let needs_leader = request.metadata().get("hasleader").is_some_and(|v| v.as_bytes() == b"true");
        node.read_index().await?;
        let observer = Observer { name: request.into_inner().name.to_vec(), seen: 0, leader: None };
        let ended = ended(node.clone(), needs_leader);
        let answers = stream::try_unfold((node, observer), |(node, mut observer)| async move {
            let (revision, kv) = loop {
                if let Some(told) = until_found(&node, |state| observer.step(state)).await? {
                    break told;
                }
            };
            let answer = LeaderResponse { header: header(&node, revision), kv: Some(kv) };
            Ok::<_, Status>(Some((answer, (node, observer))))
        });
        Ok(Response::new(Box::pin(until(answers, ended))))
    }

    /// Who does not lead any more has nothing to give back, and that is no error.
    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, Status> {
        let node = self.node(&request)?;
        let leader = request.into_inner().leader.ok_or(Error::MissingLeaderKey)?;
        let txn = if_created_at(&leader.key, leader.rev, delete(&leader.key), None);
        let made = self.write_txn(&node, txn).await?.header.unwrap_or_default();
        Ok(Response::new(ResignResponse { header: header(&node, made.revision) }))
    }
}

/// How far an observer of one election has come.
struct Observer {
    name: Vec<u8>,
    /// All events up to this revision were looked at; 0: none yet.
    seen: i64,
    /// The leader that was told last, while it leads: its key, and the revision of what was told.
    leader: Option<(Vec<u8>, i64)>,
}

impl Observer {
    /// Goes on, by a bounded number of revisions: to the next thing to tell, with its revision, if there is one among them.
    /// `None`: there is nothing new to look at.
    fn step(&mut self, state: &State) -> Option<Option<(i64, KeyValue)>> {
        if state.revision() <= self.seen {
            return None;
        }
        // From the beginning, or behind a compaction: goes on with the present.
        let events = match self.seen {
            0 => None,
            seen => state.events_from(seen + 1).ok(),
        };
        let Some(events) = events else {
            self.seen = state.revision();
            return Some(self.tell(state.revision(), first(state, &self.name, 0)));
        };
        let (start, end) = prefix(&self.name);
        for (revision, events) in events.take(REVISIONS_MAX) {
            self.seen = revision;
            let concerns = |kv: &&KeyValue| match &self.leader {
                Some((key, _)) => kv.key() == key,
                None => kv.key() >= &start[..] && kv.key() < &end[..],
            };
            if events.iter().any(|kv| concerns(&kv)) {
                let told = self.tell(revision, first(state, &self.name, revision));
                if told.is_some() {
                    return Some(told);
                }
            }
        }
        Some(None)
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
        state.apply(&Command { needs: 1, request: Some(request) }, false).unwrap().unwrap();
    }

    fn put(state: &mut State, key: &'static str, value: &'static str) {
        apply(state, Request::Put(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }));
    }

    fn delete(state: &mut State, key: &'static str) {
        apply(state, Request::DeleteRange(DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() }));
    }

    fn told(observer: &mut Observer, state: &State) -> String {
        let mut all = Vec::new();
        while let Some(step) = observer.step(state) {
            let one = |(revision, kv): (i64, KeyValue)| {
                format!("{revision}:{}={}", String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(kv.value()))
            };
            all.extend(step.map(one));
        }
        all.join(" ")
    }

    #[test]
    fn an_observer_is_told_every_proclamation_and_every_leader_in_order() {
        let mut state = State::new();
        let mut observer = Observer { name: b"e".to_vec(), seen: 0, leader: None };
        assert_eq!(told(&mut observer, &state), "", "no leader yet");
        put(&mut state, "e/b", "1");
        put(&mut state, "e/a", "waits");
        put(&mut state, "e0", "outside");
        put(&mut state, "e/b", "2");
        put(&mut state, "e/b", "3");
        put(&mut state, "e/a", "still waits");
        assert_eq!(told(&mut observer, &state), "2:e/b=1 5:e/b=2 6:e/b=3");
        delete(&mut state, "e/b");
        put(&mut state, "e/c", "late");
        delete(&mut state, "e/a");
        assert_eq!(told(&mut observer, &state), "8:e/a=still waits 10:e/c=late");
        delete(&mut state, "e/c");
        assert_eq!(told(&mut observer, &state), "");
        for _ in 0..2 * REVISIONS_MAX {
            put(&mut state, "x", "of no concern");
        }
        put(&mut state, "e/d", "4");
        assert_eq!(told(&mut observer, &state), format!("{}:e/d=4", state.revision()));
        put(&mut state, "e/d", "5");
        put(&mut state, "e/d", "6");
        let revision = state.revision();
        apply(&mut state, Request::Compact(CompactionRequest { revision, physical: false }));
        assert_eq!(told(&mut observer, &state), format!("{revision}:e/d=6"), "behind a compaction: the present");
    }
}
