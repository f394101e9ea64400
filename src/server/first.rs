//! The beginning of a cluster that is formed from a backup (`[restore]`).
//!
//! Whoever proposes the formation resolves the moment, once; all that accept it make that very state their disk's first, as `restore` makes
//! the directories of members. A standby (`restore.follow`) begins so, too, and remembers where the path goes on. Invariants: nothing is written before the formation is accepted, and then only into the directory of a self
//! that has no log yet, so a crash leaves a step that is repeated; whoever cannot have the very moment waits, and says for what.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use super::Server;
use super::restore::{FIRST, beginning};
use crate::backup::plan::{JUMP, Target, path_and_target};
use crate::backup::{Access, Archive, Store, restore};
use crate::cluster::formation::Resolve;
use crate::config::Config;
use crate::env::{Env, Pool, fail_point, sleep};
use crate::pb::log::{Formation, Membership, Moment, StoredMembership, membership};
use crate::raft::{self, Member};
use crate::storage::snapshot;

const RETRY: Duration = Duration::from_secs(5);

/// What finds the moment, if a new cluster is to begin with one.
pub(super) fn resolver(env: &Env, config: &Config) -> Option<Resolve> {
    if config.restore.from.is_empty() && config.restore.follow.is_empty() {
        return None;
    }
    let (env, config) = (env.clone(), config.clone());
    Some(Arc::new(move || {
        let (env, config) = (env.clone(), config.clone());
        Box::pin(async move { resolve(&env, &config).await.map_err(|error| format!("{error:#}")) })
    }))
}

async fn resolve(env: &Env, config: &Config) -> anyhow::Result<Moment> {
    let restore = &config.restore;
    let (url, target) = match &restore.follow {
        none if none.is_empty() => {
            path_and_target(&restore.from).map_err(anyhow::Error::msg).context("restore.from")?
        }
        follow => (follow.clone(), Target::Latest),
    };
    let is_standby = !restore.follow.is_empty();
    let archive = Archive::new(Store::open(env, &url, &Access::of(&config.backup))?);
    if is_standby {
        // To be promoted it must be able to write there, and the store must tell two apart that want to.
        archive.store().check().await?;
    }
    let found = restore::restore(&archive, target, None).await?;
    for damaged in &found.damaged {
        tracing::warn!(%damaged, "passed over");
    }
    Ok(Moment {
        url,
        generation: found.generation,
        full: found.full.name.clone(),
        index: found.state.log_id.as_ref().map_or(0, |log_id| log_id.index()),
        revision: found.state.kv.revision(),
        is_within: found.is_within,
        sha256: found.sha256.to_vec().into(),
        jump: if restore.same_revisions || is_standby { 0 } else { JUMP },
        follow_record: if is_standby { found.next_record } else { 0 },
    })
}

impl Server {
    /// Makes the formation's moment the first state of this member's disk; false if the node is to stop before that.
    pub(super) async fn begin_with(&self, formation: &Formation, moment: &Moment) -> anyhow::Result<bool> {
        loop {
            let said = format!("restores revision {} from {}", moment.revision, moment.url);
            self.bootstrap.set_waits(Some(said.clone()));
            let made = tokio::select! {
                made = self.make_first(formation, moment) => made,
                () = self.env.stopping.cancelled() => return Ok(false),
            };
            match made {
                Ok(()) => break,
                Err(error) => {
                    let why = format!("{said}, which fails: {error:#}; it is tried again");
                    tracing::warn!("{why}");
                    self.bootstrap.set_waits(Some(why));
                }
            }
            tokio::select! {
                () = sleep(self.env.jitter(RETRY)) => {}
                () = self.env.stopping.cancelled() => return Ok(false),
            }
        }
        self.bootstrap.set_waits(None);
        Ok(true)
    }

    async fn make_first(&self, formation: &Formation, moment: &Moment) -> anyhow::Result<()> {
        let archive = Archive::new(Store::open(&self.env, &moment.url, &Access::of(&self.config.backup))?);
        let found = restore::exact(&archive, moment).await?;
        let identity = self.bootstrap.identity();
        let this = Member { cluster_id: identity.cluster_id, member_id: identity.member_id };
        let mut state = found.state.kv;
        state.clear_role();
        if moment.follow_record > 0 {
            let applied = found.state.log_id.as_ref().map(raft::log_id_to_pb).unwrap_or_default();
            let source = raft::stored_membership_to_pb(&found.state.membership).membership.unwrap_or_default();
            state.begin_standby(moment.generation, moment.follow_record, applied, &source);
        }
        let first = beginning(state, &membership_of(formation), moment.jump)?;
        let path = self.bootstrap.with_dir(|dir| dir.snapshot_path());
        let snapshots = snapshot::Dir::open(&self.env, &path, this.cluster_id)?;
        let write = move || raft::write_snapshot(&snapshots, this, &first);
        self.env.long(Pool::Snapshots, write).await?;
        fail_point("restore.written");
        tracing::info!(revision = moment.revision, path = moment.url, "restored");
        Ok(())
    }
}

/// All of its members vote.
fn membership_of(formation: &Formation) -> StoredMembership {
    let mut voters: Vec<u64> = formation.members.iter().map(|member| member.id).collect();
    voters.sort_unstable();
    let mut members = formation.members.clone();
    members.sort_by_key(|member| member.id);
    let membership = Membership { configs: vec![membership::Config { voters }], members };
    StoredMembership { log_id: Some(FIRST), membership: Some(membership) }
}
