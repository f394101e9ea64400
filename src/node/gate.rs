//! The gate: who reads this member's data says for whom, and is refused what that one may not read.
//!
//! Invariants: what is checked and what is read are the same state; what `api` and `http` know of the state beside that are the figures
//! below, which are no data. Commands pass another gate, where they are applied (`kv::auth`).
//! Absent: who somebody is (`api`), and what the rules are (`kv::auth`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::Node;
use crate::caller::Caller;
use crate::env::{Instant, sleep};
use crate::error::Error;
use crate::kv::{Auth, State, Wants};
use crate::pb::admin::RoleUsage;
use crate::pb::etcd::{AlarmMember, AlarmType};
use crate::raft;

/// A state in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub revision: i64,
    pub compacted: i64,
    pub keys: usize,
    pub leases: usize,
    pub bytes: u64,
    pub cluster_version: u32,
}

impl Node {
    /// Whether users and roles count, as this member's state has it.
    pub fn is_auth_on(&self) -> bool {
        self.inner.store.is_auth_on()
    }

    /// Users and roles, as this member's state is now.
    pub fn auth(&self) -> Arc<Auth> {
        self.inner.store.read(|s| s.kv.auth_view())
    }

    /// Refuses what `caller` may not do, as this member's state is now.
    pub fn permit(&self, caller: &Caller, wants: Wants<'_>) -> Result<(), Error> {
        if !self.is_auth_on() {
            return Ok(());
        }
        in_time(caller)?;
        match wants {
            Wants::Keys { .. } | Wants::AnyUser | Wants::Root => self.inner.store.read(|s| s.kv.permit(caller, wants)),
            // These may take longer than apply should wait.
            _ => self.view(caller, wants).map(drop),
        }
    }

    /// A view of the data, if `caller` may have what is wanted of it.
    pub fn view(&self, caller: &Caller, wants: Wants<'_>) -> Result<State, Error> {
        in_time(caller)?;
        let state = self.inner.store.view().kv;
        state.permit(caller, wants).map(|()| state)
    }

    /// As [`Self::view`], with all that a backup says of itself.
    pub fn whole_view(&self, caller: &Caller) -> Result<raft::Applied, Error> {
        in_time(caller)?;
        let view = self.inner.store.view();
        view.kv.permit(caller, Wants::Root).map(|()| view)
    }

    /// Looks at the data; apply waits as long as `look` takes, so it must be short.
    pub fn look<T>(&self, caller: &Caller, wants: Wants<'_>, look: impl FnOnce(&State) -> T) -> Result<T, Error> {
        in_time(caller)?;
        self.inner.store.read(|s| s.kv.permit(caller, wants).map(|()| look(&s.kv)))
    }

    /// Changes whenever something was applied.
    pub fn applied(&self) -> watch::Receiver<Option<u64>> {
        self.inner.store.applied()
    }

    /// Waits until the entry at `index` is applied here, for a request's time.
    pub async fn wait_applied(&self, index: u64) -> Result<(), Error> {
        let deadline = Instant::now() + self.inner.options.request_timeout;
        if self.inner.store.wait_applied(index, deadline).await { Ok(()) } else { Err(Error::Timeout) }
    }

    /// The newest revision.
    pub fn revision(&self) -> i64 {
        self.inner.store.read(|s| s.kv.revision())
    }

    pub fn figures(&self) -> Figures {
        self.inner.store.read(|s| Figures {
            revision: s.kv.revision(),
            compacted: s.kv.compacted(),
            keys: s.kv.key_count(),
            leases: s.kv.leases().len(),
            bytes: s.kv.bytes(),
            cluster_version: s.kv.cluster_version(),
        })
    }

    /// Quotas of roles in numbers.
    pub fn role_usage(&self) -> Vec<RoleUsage> {
        self.inner.store.view().kv.role_usage()
    }

    /// As [`State::freed_bytes`].
    pub fn freed_bytes(&self) -> u64 {
        self.inner.store.read(|s| s.kv.freed_bytes())
    }

    /// Alarms that are on, as the log has them.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.inner.store.read(|s| s.kv.alarms())
    }

    /// Every alarm that is on: those in the log, and this member's own while its space is exceeded.
    pub fn alarms_told(&self) -> Vec<AlarmMember> {
        let mut alarms = self.alarms();
        let own = AlarmMember { member_id: self.member().member_id, alarm: AlarmType::Nospace.into() };
        let space = self.space();
        let is_short = [&space.short, &space.lacks_room].into_iter().any(|short| short.load(Ordering::Relaxed));
        if (is_short || space.is_log_full()) && !alarms.contains(&own) {
            alarms.push(own);
        }
        alarms
    }

    /// The membership as of what is applied here.
    pub fn membership(&self) -> raft::StoredMembership {
        self.inner.store.read(|s| s.membership.clone())
    }

    /// Has the state store written afresh, for root; an error is a sentence.
    pub async fn defragment(&self, caller: &Caller, patience: Duration) -> Result<(), Error> {
        self.permit(caller, Wants::Root)?;
        self.inner.store.rewrite(Instant::now() + patience).await.map_err(Error::Unsupported)
    }

    /// Waits until this member has freed what the compaction at `revision` gave up. That takes as long as there is history, seconds for
    /// a million revisions, and the compaction is in force already: only the client's own deadline ends the wait, as in etcd.
    pub async fn wait_swept(&self, revision: i64) -> Result<(), Error> {
        while self.inner.store.read(|s| s.kv.compacted() < revision || s.kv.sweep_pending()) {
            if self.inner.env.shutdown.is_cancelled() {
                return Err(Error::Stopped);
            }
            self.inner.store.ask_sweep();
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

/// Refuses who has shown what has ended since.
pub(super) fn in_time(caller: &Caller) -> Result<(), Error> {
    match caller.until() {
        Some(until) if until <= Instant::now() => Err(Error::InvalidAuthToken),
        _ => Ok(()),
    }
}
