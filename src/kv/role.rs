//! Whether clients may write, and what a standby does: it applies the entries of another cluster's log as that one has applied them.
//!
//! Owns the role, which is part of the state: a cluster is written to, or is a standby, or was superseded by a standby that was promoted.
//! Invariants: entries of the source are applied once and in order, whoever proposes them and however often; they meet what decided about
//! them there (the source's cluster version, alarms and members), and change nothing of that here. So the keys, their revisions, leases
//! and users are the source's, and the members, the alarms and the digest are this cluster's own. A cluster that is not written to ends no
//! lease, and what is promoted gives each all its time.
//! Absent: where the entries come from, and when a cluster is promoted or superseded (`backup`).

use std::sync::Arc;

use prost::Message as _;

use super::alarm::Members;
use super::{State, only_in_term};
use crate::error::Error;
use crate::pb::log::role::Role;
use crate::pb::log::source_entry::Payload;
use crate::pb::log::{
    self, Command, Follow, Membership, Promote, RoleTaken, Standby, Supersede, Superseded, change, command,
};

/// What of a state is about its own cluster, and decides how commands are applied.
struct Own {
    cluster_version: u32,
    alarms: Vec<(u64, i32)>,
    members: Arc<Members>,
}

impl Own {
    /// The source's.
    fn of(standby: &Standby) -> Self {
        let alarms = standby.alarms.iter().flat_map(|on| &on.alarms).map(|on| (on.member_id, on.alarm)).collect();
        let configs = standby.configs.iter().map(|config| config.voters.iter().copied().collect()).collect();
        let members = Members { configs, all: standby.members.iter().copied().collect() };
        Self { cluster_version: standby.cluster_version, alarms, members: Arc::new(members) }
    }

    fn swap(&mut self, state: &mut State) {
        std::mem::swap(&mut self.cluster_version, &mut state.cluster_version);
        std::mem::swap(&mut self.alarms, &mut state.alarms);
        std::mem::swap(&mut self.members, &mut state.members);
    }
}

fn members_of(membership: &Membership) -> Members {
    Members {
        configs: membership.configs.iter().map(|config| config.voters.iter().copied().collect()).collect(),
        all: membership.members.iter().map(|member| member.id).collect(),
    }
}

/// The commands of the source's entries.
pub(super) fn sources_commands(r: &Follow) -> impl Iterator<Item = &Command> {
    let batches = r.entries.iter().filter_map(|entry| match &entry.payload {
        Some(Payload::Batch(batch)) => Some(&batch.commands),
        Some(Payload::Membership(_)) | None => None,
    });
    batches.flatten()
}

/// Whether a change is of what [`Own`] holds.
fn is_own(change: &change::Change) -> bool {
    matches!(change, change::Change::Alarms(_) | change::Change::ClusterVersion(_))
}

impl State {
    /// Whether clients may write.
    pub fn is_writable(&self) -> bool {
        self.role.is_none()
    }

    /// How far it has followed, if this is a standby.
    pub fn standby(&self) -> Option<&Standby> {
        match self.role.as_deref() {
            Some(Role::Standby(standby)) => Some(standby),
            Some(Role::Superseded(_)) | None => None,
        }
    }

    /// Who was promoted in the place of this cluster, if somebody was.
    pub fn superseded(&self) -> Option<Superseded> {
        match self.role.as_deref() {
            Some(Role::Superseded(superseded)) => Some(*superseded),
            Some(Role::Standby(_)) | None => None,
        }
    }

    /// Makes a state that was restored a standby, which has applied everything up to `applied` of the source and goes on with `next_record`.
    /// `membership` is the source's.
    pub fn begin_standby(&mut self, generation: u32, next_record: u64, applied: log::LogId, membership: &Membership) {
        let members = members_of(membership);
        self.role = Some(Arc::new(Role::Standby(Standby {
            generation,
            next_record,
            applied: Some(applied),
            at_millis: 0,
            cluster_version: self.cluster_version,
            alarms: Some(log::Alarms { alarms: self.alarms() }),
            configs: membership.configs.clone(),
            members: members.all.into_iter().collect(),
        })));
    }

    /// Makes a state that was restored one that clients write to.
    pub fn clear_role(&mut self) {
        self.role = None;
    }

    /// Why this cluster takes no such command now; `None` if it does.
    pub fn refused_by_role(&self, request: &command::Request) -> Option<Error> {
        use command::Request;
        let role = self.role.as_deref()?;
        match request {
            Request::Follow(_)
            | Request::Promote(_)
            | Request::Supersede(_)
            | Request::SetClusterVersion(_)
            | Request::Alarm(_)
            | Request::StartDigest(_)
            | Request::WantedSize(_) => None,
            Request::Put(_)
            | Request::DeleteRange(_)
            | Request::Txn(_)
            | Request::Compact(_)
            | Request::LeaseGrant(_)
            | Request::LeaseRevoke(_)
            | Request::LeaseCheckpoint(_)
            | Request::Auth(_) => Some(refusal(role)),
        }
    }

    /// Why clients are refused; `None` if they are not.
    pub fn refusal(&self) -> Option<Error> {
        self.role.as_deref().map(refusal)
    }

    /// True if `role` is what the state says now: storage may drop what it says otherwise.
    pub(super) fn is_live_role(&self, role: &log::Role) -> bool {
        self.role.as_deref() == role.role.as_ref()
    }

    pub(super) fn role_change(&self) -> Option<change::Change> {
        let role = self.role.as_deref()?.clone();
        Some(change::Change::Role(log::Role { role: Some(role) }))
    }

    pub(super) fn load_role(&mut self, role: log::Role) {
        self.role = role.role.map(Arc::new);
    }

    /// Notes a change that is no version, for the state store and the digest; not one of the source's that is not of this cluster.
    pub(super) fn record(&mut self, change: change::Change, payload_bytes: usize) {
        if !(self.follows && is_own(&change)) {
            self.journal.record(change, payload_bytes);
        }
    }

    /// True once after the revisions have jumped: the state then is another one than its journal leads to.
    pub fn take_jumped(&mut self) -> bool {
        std::mem::take(&mut self.jumped)
    }

    /// Applies entries of the source, if they are the next ones.
    pub(super) fn follow(&mut self, r: &Follow) -> RoleTaken {
        let is_next = |standby: &&Standby| standby.generation == r.generation && standby.applied == r.from;
        let Some(mut standby) = self.standby().filter(is_next).cloned() else { return self.role_taken() };
        let mut own = Own::of(&standby);
        own.swap(self);
        self.follows = true;
        for entry in &r.entries {
            let term = entry.log_id.unwrap_or_default().term;
            match &entry.payload {
                Some(Payload::Batch(batch)) => {
                    batch.commands.iter().for_each(|command| self.apply_sources(command, term))
                }
                Some(Payload::Membership(membership)) => self.set_members(members_of(membership)),
                None => {}
            }
            standby.applied = entry.log_id;
        }
        self.follows = false;
        own.swap(self);
        standby.cluster_version = own.cluster_version;
        standby.alarms = Some(log::Alarms { alarms: super::alarm::listed(&own.alarms) });
        let voters = |config: &std::collections::BTreeSet<u64>| log::membership::Config {
            voters: config.iter().copied().collect(),
        };
        standby.configs = own.members.configs.iter().map(voters).collect();
        standby.members = own.members.all.iter().copied().collect();
        (standby.next_record, standby.at_millis) = (r.next_record, standby.at_millis.max(r.at_millis));
        self.take_role(Some(Role::Standby(standby)));
        self.role_taken()
    }

    /// Applies a command of the source's. What it was answered there was told there.
    fn apply_sources(&mut self, command: &Command, term: u64) {
        use command::Request;
        match &command.request {
            // Of the source's own affairs.
            None
            | Some(
                Request::WantedSize(_)
                | Request::StartDigest(_)
                | Request::Follow(_)
                | Request::Promote(_)
                | Request::Supersede(_),
            ) => {}
            Some(_) if only_in_term(command).is_some_and(|only| only != term) => {}
            Some(request) => drop(self.carry_out(command, request, false)),
        }
    }

    /// Lets clients write, from here on.
    pub(super) fn promote(&mut self, r: &Promote) -> Result<RoleTaken, Error> {
        if self.is_writable() {
            return Err(Error::NotStandby);
        }
        if r.jump > 0 {
            let before = self.bytes();
            self.bump_revision(r.jump).map_err(|error| Error::InvalidRequest(error.to_string()))?;
            self.freed_bytes += before.saturating_sub(self.bytes());
            self.jumped = true;
        }
        self.forget_checkpoints();
        self.take_role(None);
        Ok(self.role_taken())
    }

    /// Takes no writes from here on. A standby takes none anyway.
    pub(super) fn be_superseded(&mut self, r: &Supersede) -> RoleTaken {
        if self.standby().is_none() {
            self.take_role(Some(Role::Superseded(Superseded { generation: r.generation, cluster_id: r.cluster_id })));
        }
        self.role_taken()
    }

    fn take_role(&mut self, role: Option<Role>) {
        let change = log::Role { role };
        self.load_role(change.clone());
        let bytes = change.encoded_len();
        self.record(change::Change::Role(change), bytes);
    }

    fn role_taken(&self) -> RoleTaken {
        RoleTaken { revision: self.revision }
    }
}

fn refusal(role: &Role) -> Error {
    match role {
        Role::Standby(_) => Error::Standby,
        Role::Superseded(_) => Error::Superseded,
    }
}
