//! The leader's keeper: starts the clock of a term, and proposes what it says.
//!
//! Ends of leases, many at a time and bounded; checkpoints, in batches. Both are bound to the term, so that one that is
//! proposed late, by way of a new leader even, does nothing. After this process was not given time for a while, keep-alives
//! that have waited meanwhile are let in before anything expires.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::OwnedMutexGuard;

use super::clock::Clock;
use super::{Leases, Ticking};
use crate::caller::Caller;
use crate::env::{Instant, interval, planted};
use crate::error::Error;
use crate::kv::LEASES_SINCE;
use crate::node::Trust;
use crate::pb::etcd::LeaseCheckpoint;
use crate::pb::log::{self, Command, LeaseRevoke, command};

const TICK: Duration = Duration::from_millis(100);
/// A tick that comes so late: the process stood still, and not only its clock's hand.
const STALL: Duration = Duration::from_millis(500);
/// After that, nothing expires for so long.
const GRACE: Duration = Duration::from_millis(300);
/// A revocation that failed is tried again after this.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Checkpoints in one command.
const CHECKPOINTS_MAX: usize = 1000;

pub(super) struct Keeper {
    leases: Leases,
    last_tick: Instant,
    no_expiry_before: Instant,
}

impl Keeper {
    pub(super) fn new(leases: Leases) -> Self {
        let now = Instant::now();
        Self { leases, last_tick: now, no_expiry_before: now }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.leases.inner.node.env().shutdown.clone();
        let mut ticks = interval(TICK);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.tick() => {}
            }
        }
    }

    async fn tick(&mut self) {
        let inner = self.leases.inner.clone();
        let now = Instant::now();
        if now - self.last_tick > STALL {
            self.no_expiry_before = now + GRACE;
        }
        self.last_tick = now;
        let status = inner.node.status();
        let ticks = inner.ticking.lock().as_ref().map(|ticking| ticking.term);
        // The facts of a fenced leader are not to be trusted: it ends no lease, and leaves keep-alives to who leads after it. In a standby the
        // source's leader counts, and of a superseded cluster nobody does.
        if !status.is_leader || inner.node.trust() == Trust::Fenced || !inner.node.store().is_writable() {
            if ticks.is_some() {
                *inner.ticking.lock() = None;
            }
            return;
        }
        if ticks != Some(status.term) {
            *inner.ticking.lock() = None;
            self.begin().await;
            // Waiting for a quorum is no stall.
            self.last_tick = Instant::now();
            return;
        }
        // While some are under way, no more are handed out.
        let order = inner.checkpointing.clone().try_lock_owned().ok();
        let room = if order.is_some() { CHECKPOINTS_MAX } else { 0 };
        let mut checkpoints = Vec::new();
        let lapsed = loop {
            let (settled, lapsed) = {
                let mut ticking = inner.ticking.lock();
                let Some(ticking) = ticking.as_mut() else { return };
                ticking.follow(&inner.node);
                (ticking.clock.settle(now, room - checkpoints.len()), ticking.clock.has_lapsed())
            };
            checkpoints.extend(settled.checkpoints);
            if !settled.has_more {
                break lapsed;
            }
            // Keep-alives, and all else on the event loop, come between.
            tokio::task::yield_now().await;
        };
        if let Some(order) = order.filter(|_| !checkpoints.is_empty()) {
            self.checkpoint(checkpoints, status.term, order);
        }
        if lapsed && now >= self.no_expiry_before {
            self.expire(status.term, now).await;
        }
        self.last_tick = Instant::now();
    }

    /// Starts the clock of a term, once a quorum has confirmed it and all that came before is applied.
    async fn begin(&self) {
        let inner = &self.leases.inner;
        let Ok(confirmed) = inner.node.confirm_leadership().await else { return };
        let deadline = Instant::now() + inner.node.options().request_timeout;
        if !inner.node.store().wait_applied(confirmed.index, deadline).await {
            return;
        }
        let known = inner.node.store().read(|s| s.kv.leases().clone());
        let now = Instant::now();
        let begin = || {
            let mut clock = Clock::new(now, inner.settings.checkpoint_interval);
            for (id, lease) in known.iter() {
                clock.follow(now, id, Some(lease), inner.settings.extension);
            }
            clock
        };
        // There may be a hundred thousand, and this member has just begun to lead.
        let clock = inner.node.env().in_place(begin);
        tracing::info!(term = confirmed.term, leases = clock.len(), "lease clock starts");
        *inner.ticking.lock() = Some(Ticking { term: confirmed.term, known, clock });
    }

    /// One command; what is due beyond it waits for the next tick. Lost ones cost no more than time.
    fn checkpoint(&self, due: Vec<(i64, i64)>, term: u64, order: OwnedMutexGuard<()>) {
        let leases = due.len();
        let checkpoints = due.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl }).collect();
        let request = command::Request::LeaseCheckpoint(log::LeaseCheckpoint { checkpoints, term });
        let node = self.leases.inner.node.clone();
        self.leases.inner.node.env().spawn(async move {
            let proposing = node.propose(&Caller::Internal, Command::new(LEASES_SINCE, request));
            tokio::select! {
                outcome = proposing => if let Err(error) = outcome {
                    tracing::debug!(%error, leases, term, "lease checkpoints failed; leases may live longer after an election");
                },
                () = node.env().shutdown.cancelled() => {}
            }
            drop(order);
        });
    }

    /// Revokes what has lapsed and was not renewed while a quorum confirmed that this member may say so.
    async fn expire(&self, term: u64, now: Instant) {
        let inner = &self.leases.inner;
        let room = inner.settings.revokes_in_flight_max.saturating_sub(inner.revoking.load(Ordering::Relaxed));
        if room == 0 {
            return;
        }
        match inner.node.confirm_leadership().await {
            Ok(confirmed) if confirmed.term == term => {}
            _ if planted!("lease-revoked-by-stalled-leader") => {}
            // Deposed, or without a quorum: then it is not this member's to say.
            _ => return,
        }
        let expired = match inner.ticking.lock().as_mut().filter(|ticking| ticking.term == term) {
            // By the moment before the quorum was asked: while it answered, this process may have stood still.
            Some(ticking) => ticking.clock.expire(now, room),
            None => return,
        };
        if expired.is_empty() {
            return;
        }
        tracing::debug!(leases = expired.len(), term, "leases have expired");
        inner.revoking.fetch_add(expired.len(), Ordering::Relaxed);
        let (revoking, shutdown) = (revoke(self.leases.clone(), expired, term), inner.node.env().shutdown.clone());
        inner.node.env().spawn(async move {
            tokio::select! {
                () = revoking => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

/// Proposes the end of these leases all at once, so that they share log entries.
async fn revoke(leases: Leases, expired: Vec<i64>, term: u64) {
    let term = if planted!("lease-revoked-by-stalled-leader") { 0 } else { term };
    let mut proposals: FuturesUnordered<_> = expired
        .into_iter()
        .map(|id| {
            let node = leases.inner.node.clone();
            async move {
                let request = command::Request::LeaseRevoke(LeaseRevoke { id, term });
                (id, node.propose(&Caller::Internal, Command::new(LEASES_SINCE, request)).await)
            }
        })
        .collect();
    while let Some((id, outcome)) = proposals.next().await {
        leases.inner.revoking.fetch_sub(1, Ordering::Relaxed);
        match outcome {
            Ok(_) => tracing::debug!(lease = format!("{id:x}"), term, "lease expired"),
            // Its client was faster.
            Err(Error::LeaseNotFound) => {}
            Err(error) => {
                tracing::debug!(lease = format!("{id:x}"), %error, "an expired lease was not revoked; tried again");
                if let Some(ticking) = leases.inner.ticking.lock().as_mut().filter(|ticking| ticking.term == term) {
                    ticking.clock.spare(Instant::now(), id, RETRY_AFTER);
                }
            }
        }
    }
}
