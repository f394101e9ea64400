//! What commands do to leases: granting, revoking, noting what was left.
//!
//! Invariants: a live key's lease exists; ending a lease deletes its keys in one revision, in key order.
//! Absent: the facts (`leases`), and time. When a lease ends is the leader's to say (`crate::lease`), and it says so by a command like any
//! other.

use super::State;
use super::header::header;
use super::leases::{Lease, LeaseTable};
use crate::error::Error;
use crate::pb::KeyValue;
use crate::pb::etcd::{LeaseCheckpointResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeResponse};
use crate::pb::log::{self, Command, LeaseCheckpoint, LeaseRevoke, change, command};

/// The cluster version from which on leases may be proposed.
pub const LEASES_SINCE: u32 = 2;

/// The longest lease, in seconds: etcd's bound.
pub const TTL_MAX_SECONDS: i64 = 9_000_000_000;

/// The only term in whose entries this command means anything, if there is one: what a leader has decided by its clock is
/// void once another leads.
pub fn only_in_term(command: &Command) -> Option<u64> {
    let term = match &command.request {
        Some(command::Request::LeaseRevoke(r)) => r.term,
        Some(command::Request::LeaseCheckpoint(r)) => r.term,
        _ => 0,
    };
    (term != 0).then_some(term)
}

impl State {
    /// All leases, as a view that later commands do not change.
    pub fn leases(&self) -> &LeaseTable {
        &self.leases.table
    }

    /// The newest versions of the keys that are attached to a lease, in key order.
    pub fn lease_keys(&self, id: i64) -> impl Iterator<Item = &KeyValue> {
        self.leases.keys(id)
    }

    /// How many keys are attached to some lease.
    pub(super) fn attached_count(&self) -> usize {
        self.leases.attached_count()
    }

    /// The first version that is attached to this lease under `key` or a later one, or to a later lease.
    pub(super) fn first_attached(&self, id: i64, key: &[u8]) -> Option<&KeyValue> {
        self.leases.from(id, key).next()
    }

    /// True if `lease` is what is stored of its id now, so that storage may drop what it says otherwise.
    ///
    /// Who drops a lease that is gone must do as for tombstones: only when no earlier change of its id is stored any more.
    pub fn is_live_lease(&self, lease: &log::Lease) -> bool {
        self.leases.table.get(lease.id).is_some_and(|held| held.to_pb(lease.id) == *lease)
    }

    pub(super) fn lease_changes(&self) -> impl Iterator<Item = change::Change> {
        self.leases.table.iter().map(|(id, lease)| change::Change::Lease(lease.to_pb(id)))
    }

    /// Refuses a put to a lease that does not exist.
    pub(super) fn check_lease(&self, id: i64) -> Result<(), Error> {
        if id == 0 || self.leases.table.get(id).is_some() { Ok(()) } else { Err(Error::LeaseNotFound) }
    }

    pub(super) fn grant_lease(&mut self, r: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        // Whoever proposes chooses the id, for applying must do the same everywhere.
        if r.id == 0 {
            return Err(Error::LeaseNotFound);
        }
        if r.ttl > TTL_MAX_SECONDS {
            return Err(Error::LeaseTtlTooLarge);
        }
        if self.leases.table.get(r.id).is_some() {
            return Err(Error::LeaseExists);
        }
        let ttl = r.ttl.max(1);
        self.set_lease(log::Lease { id: r.id, ttl, remaining_ttl: 0 });
        Ok(LeaseGrantResponse { header: header(self.revision), id: r.id, ttl, error: String::new() })
    }

    /// Deletes the lease's keys in one revision, in key order; without keys there is no revision.
    pub(super) fn revoke_lease(&mut self, r: &LeaseRevoke) -> Result<LeaseRevokeResponse, Error> {
        if self.leases.table.get(r.id).is_none() {
            return Err(Error::LeaseNotFound);
        }
        let doomed: Vec<KeyValue> = self.leases.keys(r.id).cloned().collect();
        self.write_tombstones(&doomed);
        self.commit();
        self.set_lease(log::Lease { id: r.id, ..log::Lease::default() });
        Ok(LeaseRevokeResponse { header: header(self.revision) })
    }

    /// A lease that is gone meanwhile is passed over.
    pub(super) fn checkpoint_leases(&mut self, r: &LeaseCheckpoint) -> LeaseCheckpointResponse {
        for checkpoint in &r.checkpoints {
            let Some(lease) = self.leases.table.get(checkpoint.id) else { continue };
            let left = Some(checkpoint.remaining_ttl).filter(|left| (1..lease.ttl_seconds).contains(left));
            if left != lease.left_seconds {
                self.set_lease(Lease { left_seconds: left, ..lease }.to_pb(checkpoint.id));
            }
        }
        LeaseCheckpointResponse { header: header(self.revision) }
    }

    /// Gives every lease all its time, wherever it is counted from here on.
    pub(super) fn forget_checkpoints(&mut self) {
        let all = self.leases.table.clone();
        for (id, lease) in all.iter().filter(|(_, lease)| lease.left_seconds.is_some()) {
            self.set_lease(Lease { left_seconds: None, ..lease }.to_pb(id));
        }
    }

    fn set_lease(&mut self, lease: log::Lease) {
        self.leases.load(&lease);
        self.record(change::Change::Lease(lease), size_of::<log::Lease>());
    }
}
