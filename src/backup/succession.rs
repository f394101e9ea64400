//! Which cluster is the one that clients write to: a standby takes the place of the cluster that it follows, and that one learns of it.
//!
//! The path decides. Its newest generation is the one that writes there, and one that a promotion has begun says so; a generation is made only
//! if there is none of its number, so of several that are promoted one is. The leader of every cluster that has a path looks for such a
//! generation when it begins to lead and once an interval, and takes no writes any more when another cluster has begun one after its own.
//!
//! Invariants: a cluster that cannot reach the store goes on; nothing but a promotion makes anybody stop, so that a copy of a cluster that
//! was restored from its path harms nobody. Absent: what the commands do (`kv::role`).

use std::time::Duration;

use super::archive::Archive;
use super::plan::{JUMP, shown};
use super::standby::{Follower, Settings};
use super::store::Store;
use super::{Error, Result};
use crate::caller::Caller;
use crate::env::{Env, Instant, sleep};
use crate::error;
use crate::kv::{ROLES_SINCE, Wants};
use crate::node::Node;
use crate::pb::admin::{PromoteRequest, PromoteResponse};
use crate::pb::backup::Generation;
use crate::pb::log::{self, Command, Promote, Supersede, Superseded, command};

const LOOK: Duration = Duration::from_millis(500);
/// So long a promotion waits until this cluster has applied what is at the path.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// Looks, while this member leads a cluster that takes writes, whether another one was promoted in its place; until shutdown.
pub async fn watch(env: Env, node: Node, settings: Settings, interval: Duration) {
    let (mut looked, mut own): (Option<(u64, Instant)>, Option<u32>) = (None, None);
    loop {
        tokio::select! {
            () = sleep(LOOK) => {}
            () = env.shutdown.cancelled() => return,
        }
        let term = node.term();
        let is_due = looked.is_none_or(|(then, at)| then != term || at.elapsed() >= interval);
        if !is_due || !node.store().is_writable() || !node.status().is_leader {
            continue;
        }
        looked = Some((term, Instant::now()));
        let found = tokio::select! {
            found = successor(&env, &settings, node.member().cluster_id, &mut own) => found,
            () = env.shutdown.cancelled() => return,
        };
        match found {
            Ok(None) => {}
            // It goes on: the other cluster may be promoted without it, and clients must find one that serves.
            Err(error) => tracing::debug!(%error, "whether another cluster was promoted is not known"),
            Ok(Some(generation)) => {
                let supersede = Supersede { generation: generation.number, cluster_id: generation.cluster_id };
                let command = Command::new(ROLES_SINCE, command::Request::Supersede(supersede));
                match node.propose(&Caller::Internal, command).await {
                    Ok(_) => tracing::error!(
                        generation = generation.number,
                        cluster = format!("{:016x}", generation.cluster_id),
                        "another cluster was promoted in the place of this one, which takes no writes any more"
                    ),
                    Err(error) => {
                        tracing::warn!(%error, "another cluster was promoted, and this one still takes writes; tried again")
                    }
                }
            }
        }
    }
}

/// The newest promotion of another cluster after this one's own generation, which is remembered in `own`.
pub(super) async fn successor(
    env: &Env,
    settings: &Settings,
    cluster_id: u64,
    own: &mut Option<u32>,
) -> Result<Option<Generation>> {
    let archive = Archive::new(Store::open(env, &settings.url, &settings.access)?);
    if own.is_none() {
        let all = archive.generations().await?;
        *own = all.iter().rfind(|generation| generation.cluster_id == cluster_id).map(|generation| generation.number);
    }
    // Who has never written there has no place that somebody could take.
    let Some(number) = *own else { return Ok(None) };
    let later = archive.generations_after(number).await?;
    if let Some(again) = later.iter().rfind(|generation| generation.cluster_id == cluster_id) {
        *own = Some(again.number);
    }
    let is_after = |generation: &&Generation| Some(generation.number) > *own;
    Ok(later.iter().filter(is_after).rfind(|generation| generation.is_promotion).copied())
}

impl Follower {
    /// Makes this cluster the one that clients write to, for root alone. What it answers is what a person must know.
    pub async fn promote(
        &self,
        caller: &Caller,
        request: PromoteRequest,
    ) -> std::result::Result<PromoteResponse, error::Error> {
        let node = self.node();
        node.read_index().await?;
        let (standby, superseded) = node.look(caller, Wants::Root, |kv| (kv.standby().cloned(), kv.superseded()))?;
        check(standby.as_ref(), superseded, request)?;
        let refused = |error: Error| {
            error::Error::Promotion(format!(
                "{error}; nothing was changed here. If the store is gone for good, promote without it (--without-store): nothing then tells the other \
             cluster"
            ))
        };
        let mut generation = 0;
        if !request.without_store {
            let archive = self.open().map_err(refused)?;
            let followed = standby.as_ref().map(|standby| standby.generation);
            generation = archive.promote(node.member().cluster_id, followed).await.map_err(refused)?.number;
            if let Some(followed) = followed {
                self.drain(&archive, followed).await?;
            }
        }
        let (source_revision, standby) = node.look(caller, Wants::Root, |kv| (kv.revision(), kv.standby().cloned()))?;
        let jump = if request.same_revisions { 0 } else { JUMP };
        node.propose(caller, Command::new(ROLES_SINCE, command::Request::Promote(Promote { jump }))).await?;
        let revision = node.revision();
        tracing::warn!(generation, revision, "promoted: this cluster takes writes from here on");
        Ok(PromoteResponse {
            revision,
            generation,
            source_revision,
            source_at_millis: standby.map_or(0, |standby| standby.at_millis),
        })
    }

    /// Waits until this member has applied everything that is at the path.
    async fn drain(&self, archive: &Archive, followed: u32) -> std::result::Result<(), error::Error> {
        let later = |why: String| {
            error::Error::Promotion(format!(
                "{why}; this cluster has taken the path, and still takes no writes: promote it again, or, if what is missing must be given up, with \
             --without-store"
            ))
        };
        let last = archive.last_record(followed).await.map_err(|error| later(error.to_string()))?;
        let begin = Instant::now();
        while let Some(standby) = self.standby() {
            if standby.next_record > last {
                return Ok(());
            }
            if begin.elapsed() >= DRAIN_PATIENCE {
                let why = self.behind().unwrap_or_else(|| "its leader may say why (condition standby-behind)".into());
                return Err(later(format!(
                    "record {last} is at the path, and this standby has come to {} ({}): {why}",
                    standby.next_record - 1,
                    shown(standby.at_millis)
                )));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }
}

/// Whether there is something to promote.
fn check(
    standby: Option<&log::Standby>,
    superseded: Option<Superseded>,
    request: PromoteRequest,
) -> std::result::Result<(), error::Error> {
    match (standby, superseded) {
        (None, None) => Err(error::Error::NotStandby),
        (Some(_), _) if request.take_back => Err(error::Error::Promotion(
            "this cluster is a standby and was not superseded, so there is nothing to take back: leave --take-back out"
                .into(),
        )),
        (None, Some(other)) if !request.take_back => Err(error::Error::Promotion(format!(
            "cluster {:016x} was promoted in the place of this one (generation {}), and what is written there is not here: make this one its \
             standby, with empty disks and restore.follow, and promote that; or, to give up what was written there, say --take-back",
            other.cluster_id, other.generation
        ))),
        _ => Ok(()),
    }
}
