//! What a request needs: the rules of etcd 3.7, applied to who asks.
//!
//! Invariant: what a decision costs does not grow with the keys that it is about. Those of a lease are walked from one of the asker's
//! intervals to the next, and the lease of many puts in one command is decided once.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{Access, Auth, Reach};
use crate::caller::{Caller, Who};
use crate::error::Error;
use crate::kv::State;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};
use crate::pb::log::{Command, command::Request};

/// What is asked of a member's own state, beside commands.
#[derive(Clone, Copy, Debug)]
pub enum Wants<'a> {
    /// To read these keys, `range_end` as in a range.
    Keys { key: &'a [u8], range_end: &'a [u8] },
    /// To read by a transaction.
    Txn(&'a TxnRequest),
    /// To know which keys go with a lease.
    LeaseKeys(i64),
    /// To know of all leases.
    AllLeases,
    /// To keep a lease alive.
    LeaseLife(i64),
    /// What is for every user.
    AnyUser,
    /// What is for root alone.
    Root,
}

impl<'a> Wants<'a> {
    /// What a range asks for.
    pub fn range(r: &'a RangeRequest) -> Self {
        Self::Keys { key: &r.key, range_end: &r.range_end }
    }
}

impl State {
    /// Users and roles.
    pub fn auth(&self) -> &Auth {
        &self.auth
    }

    /// The same, as a view that later commands do not change.
    pub fn auth_view(&self) -> Arc<Auth> {
        self.auth.clone()
    }

    /// Refuses what `caller` may not do.
    pub fn permit(&self, caller: &Caller, wants: Wants<'_>) -> Result<(), Error> {
        if !self.auth.enabled {
            return Ok(());
        }
        let who = caller.who();
        match wants {
            Wants::Keys { key, range_end } => self.auth.check(who, key, range_end, Access::Read),
            Wants::Txn(r) => self.permit_txn(who, r),
            Wants::LeaseKeys(id) => {
                self.auth.check_user(who)?;
                self.permit_lease(who, id, Access::Read)
            }
            Wants::AllLeases => self.permit_all_leases(who),
            Wants::LeaseLife(id) => {
                self.auth.check_user(who)?;
                self.permit_lease(who, id, Access::Write)
            }
            Wants::AnyUser => self.auth.check_user(who),
            Wants::Root => self.auth.check_root(who),
        }
    }

    /// Refuses a command that its asker may not give, as the state is when it is applied.
    pub(in crate::kv) fn permit_command(&self, command: &Command) -> Result<(), Error> {
        let who = Who::of(command.asker.as_ref());
        let Some(request) = &command.request else { return Ok(()) };
        match request {
            _ if who == Who::Internal => Ok(()),
            Request::Put(r) => self.permit_put(who, r, |_| false),
            Request::DeleteRange(r) => self.permit_delete(who, r),
            Request::Txn(r) => self.permit_txn(who, r),
            Request::LeaseGrant(_) => self.auth.check_user(who),
            Request::LeaseRevoke(r) => {
                self.auth.check_user(who)?;
                self.permit_lease(who, r.id, Access::Write)
            }
            Request::Compact(_)
            | Request::Alarm(_)
            | Request::WantedSize(_)
            | Request::Auth(_)
            | Request::Promote(_) => self.auth.check_root(who),
            // A member's own, and nobody else's.
            Request::SetClusterVersion(_)
            | Request::LeaseCheckpoint(_)
            | Request::StartDigest(_)
            | Request::Follow(_)
            | Request::Supersede(_) => self.auth.check_root(who).and(Err(Error::PermissionDenied)),
        }
    }

    /// `is_granted`: whether the same command was granted this lease already.
    fn permit_put(&self, who: Who<'_>, r: &PutRequest, is_granted: impl FnOnce(i64) -> bool) -> Result<(), Error> {
        self.auth.check(who, &r.key, &[], Access::Write)?;
        // Who attaches a key to a lease could end it with the keys that are there already.
        if r.lease != 0 && !is_granted(r.lease) {
            self.permit_lease(who, r.lease, Access::Write)?;
        }
        if r.prev_kv { self.auth.check(who, &r.key, &[], Access::Read) } else { Ok(()) }
    }

    fn permit_delete(&self, who: Who<'_>, r: &DeleteRangeRequest) -> Result<(), Error> {
        self.auth.check(who, &r.key, &r.range_end, Access::Write)?;
        if r.prev_kv { self.auth.check(who, &r.key, &r.range_end, Access::Read) } else { Ok(()) }
    }

    /// Of both branches, whichever is taken.
    fn permit_txn(&self, who: Who<'_>, r: &TxnRequest) -> Result<(), Error> {
        self.permit_nested(who, r, &mut BTreeSet::new())
    }

    /// `leases`: those that were asked for; the first that is refused is the end.
    fn permit_nested(&self, who: Who<'_>, r: &TxnRequest, leases: &mut BTreeSet<i64>) -> Result<(), Error> {
        for compare in &r.compare {
            self.auth.check(who, &compare.key, &compare.range_end, Access::Read)?;
        }
        let mut ops = r.success.iter().chain(&r.failure);
        ops.try_for_each(|RequestOp { request }| match request {
            Some(Op::RequestRange(r)) => self.auth.check(who, &r.key, &r.range_end, Access::Read),
            Some(Op::RequestPut(r)) => self.permit_put(who, r, |lease| !leases.insert(lease)),
            Some(Op::RequestDeleteRange(r)) => self.permit_delete(who, r),
            Some(Op::RequestTxn(r)) => self.permit_nested(who, r, leases),
            None => Ok(()),
        })
    }

    /// Each key of a lease; of one that there is not, nothing.
    fn permit_lease(&self, who: Who<'_>, id: i64, access: Access) -> Result<(), Error> {
        if id == 0 || self.auth.check_root(who).is_ok() {
            return Ok(());
        }
        self.permit_attached(who, id..=id, access)
    }

    fn permit_all_leases(&self, who: Who<'_>) -> Result<(), Error> {
        self.auth.check_user(who)?;
        if self.auth.check_root(who).is_ok() {
            return Ok(());
        }
        self.permit_attached(who, i64::MIN..=i64::MAX, Access::Read)
    }

    /// Each key of these leases. Looks at one for each interval of the asker's that some lie in.
    fn permit_attached(&self, who: Who<'_>, leases: RangeInclusive<i64>, access: Access) -> Result<(), Error> {
        let (mut lease, mut from) = (*leases.start(), &[][..]);
        while let Some(kv) = self.first_attached(lease, from).filter(|kv| kv.lease() <= *leases.end()) {
            lease = kv.lease();
            match self.auth.reach(who, kv.key(), access)? {
                Reach::Before(end) => from = end,
                Reach::All => {
                    let Some(next) = lease.checked_add(1) else { break };
                    (lease, from) = (next, &[]);
                }
            }
        }
        Ok(())
    }
}
