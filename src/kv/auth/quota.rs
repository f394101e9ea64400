//! Quotas of roles: how much may be stored under what a role may write, whoever writes it, and how often its users may.
//!
//! What is stored is counted from the sums in the tree whenever it is asked for, so a grant or a change of ranges recounts nothing. Ranges of
//! roles may overlap: what is written must fit into the quota of each that it lies in.
//! Invariants: a request that makes nothing larger is never refused, also where a quota was lowered; what a transaction deletes is no room for what
//! it puts. Bounds on ranges and on roles with a quota keep the work of one put small.
//! Absent: rates, which no state decides (`node/rates`).

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::change::Changes;
use super::{Access, Auth, Grants, Role};
use crate::caller::Who;
use crate::error::Error;
use crate::kv::State;
use crate::kv::interval::Interval;
use crate::kv::state::made_by;
use crate::kv::tree::{Place, Sums};
use crate::kv::versions::live_cost;
use crate::pb::admin::{RoleQuota, RoleUsage, SetRoleQuotaRequest};
use crate::pb::etcd::PutRequest;
use crate::pb::log::AuthRole;
use crate::pb::log::change::Change;

/// Ranges that a role with a quota may write; those that meet count as one.
const RANGES_MAX: usize = 64;
/// Roles with a quota.
const ROLES_MAX: usize = 1024;

/// What quotas there are, by the keys that they are for.
#[derive(Clone, Debug, Default)]
pub(super) struct Quotas {
    /// Ascending by start.
    spans: Arc<[Span]>,
    has_rates: bool,
}

#[derive(Debug)]
struct Span {
    start: Bytes,
    /// `None`: there is none.
    end: Option<Bytes>,
    /// The furthest end of this and of those before.
    until: Option<Bytes>,
    role: Arc<Role>,
}

impl Quotas {
    fn of(auth: &Auth) -> Self {
        let mut spans = Vec::new();
        let mut has_rates = false;
        for role in auth.roles.values() {
            let Some(quota) = &role.facts.quota else { continue };
            has_rates |= quota.requests_per_second > 0;
            if quota.bytes == 0 && quota.keys == 0 {
                continue;
            }
            for (start, end) in role.grants().of(Access::Write).iter() {
                spans.push(Span { start: start.clone(), end: end.cloned(), until: None, role: role.clone() });
            }
        }
        spans.sort_by(|a, b| a.start.cmp(&b.start));
        let mut until = Some(Bytes::new());
        for span in &mut spans {
            until = match (until, &span.end) {
                (Some(until), Some(end)) => Some(until.max(end.clone())),
                _ => None,
            };
            span.until = until.clone();
        }
        Self { spans: spans.into(), has_rates }
    }

    /// The roles with a quota whose keys this is one of.
    fn over<'a>(&'a self, key: &'a [u8]) -> impl Iterator<Item = &'a Arc<Role>> {
        let is_before = move |end: &Option<Bytes>| end.as_ref().is_none_or(|end| key < &end[..]);
        let begun = self.spans.partition_point(|span| &span.start[..] <= key);
        let near = self.spans[..begun].iter().rev().take_while(move |span| is_before(&span.until));
        near.filter(move |span| is_before(&span.end)).map(|span| &span.role)
    }
}

/// What a request adds to what a role holds.
#[derive(Default)]
struct Growth {
    bytes: i64,
    keys: i64,
}

impl Auth {
    pub(super) fn quotas(&self) -> &Quotas {
        self.quotas.get_or_init(|| Quotas::of(self))
    }

    /// Whether some role has a rate.
    pub fn has_rates(&self) -> bool {
        self.enabled && self.quotas().has_rates
    }

    /// How many requests a second who asks may make: the most that one of the roles with a rate allows; `None`: as many as it likes.
    pub fn rate(&self, who: Who<'_>) -> Option<u64> {
        let roles = match who {
            Who::Internal | Who::Nobody => return None,
            Who::User { name, .. } => &self.user(name)?.roles[..],
            Who::Mapped { roles, .. } => roles,
        };
        if super::is_root(roles) {
            return None;
        }
        let rates = roles.iter().filter_map(|role| self.role(role)?.quota.map(|quota| quota.requests_per_second));
        rates.filter(|rate| *rate > 0).max()
    }

    pub(super) fn role_quota(&self, r: &SetRoleQuotaRequest) -> Changes {
        let role = self.role(&r.role).ok_or(Error::RoleNotFound)?;
        let quota = r.quota.filter(|quota| *quota != RoleQuota::default());
        self.made(vec![Change::AuthRole(AuthRole { quota, ..role.clone() })])
    }

    /// Refuses roles with a quota beyond the bounds.
    pub(super) fn check_quotas_of(&self, changed: &[Change]) -> Result<(), Error> {
        let mut more = 0;
        for change in changed {
            let Change::AuthRole(role) = change else { continue };
            if role.quota.is_none() || role.gone {
                continue;
            }
            more += usize::from(self.role(&role.name).is_none_or(|known| known.quota.is_none()));
            if Grants::of_roles([role]).of(Access::Write).len() > RANGES_MAX {
                return Err(Error::InvalidRequest(format!(
                    "a role with a quota may write {RANGES_MAX} ranges at most; those that meet count as one"
                )));
            }
        }
        let now = || self.roles().filter(|role| role.quota.is_some()).count();
        if more > 0 && now() + more > ROLES_MAX {
            return Err(Error::InvalidRequest(format!("at most {ROLES_MAX} roles have a quota")));
        }
        Ok(())
    }
}

impl State {
    /// Refuses puts that make more of a role's keys than its quota allows, all of them together.
    pub(in crate::kv) fn check_quotas<'a>(&self, puts: impl Iterator<Item = &'a PutRequest>) -> Result<(), Error> {
        if !self.auth.enabled || self.auth.quotas().spans.is_empty() {
            return Ok(());
        }
        let mut growths: BTreeMap<&str, (&Arc<Role>, Growth)> = BTreeMap::new();
        for put in puts {
            let mut grown = None;
            for role in self.auth.quotas().over(&put.key) {
                let (bytes, keys) = *grown.get_or_insert_with(|| self.growth(put));
                let (_, growth) = growths.entry(&role.facts.name).or_insert_with(|| (role, Growth::default()));
                growth.bytes += bytes;
                growth.keys += keys;
            }
        }
        growths.into_values().try_for_each(|(role, growth)| self.check_quota(role, &growth))
    }

    /// What a put adds: bytes, and keys.
    fn growth(&self, put: &PutRequest) -> (i64, i64) {
        let prev = self.live.get(Place::of(&put.key));
        let made = made_by(put, prev, self.next_revision());
        let cost = |items: usize, bytes: usize| live_cost(Sums { items, bytes: bytes as u64 }) as i64;
        let before = prev.map_or(0, |prev| cost(1, prev.as_encoded().len()));
        (cost(1, made.as_encoded().len()) - before, i64::from(prev.is_none()))
    }

    fn check_quota(&self, role: &Role, growth: &Growth) -> Result<(), Error> {
        let (Some(quota), name) = (role.facts.quota, &role.facts.name) else { return Ok(()) };
        let used = self.used_by(role);
        let beyond =
            |used: u64, growth: i64, most: u64| most > 0 && growth > 0 && used.saturating_add(growth as u64) > most;
        let (what, used, most) = if beyond(live_cost(used), growth.bytes, quota.bytes) {
            ("bytes", live_cost(used), quota.bytes)
        } else if beyond(used.items as u64, growth.keys, quota.keys) {
            ("keys", used.items as u64, quota.keys)
        } else {
            return Ok(());
        };
        Err(Error::QuotaExceeded(format!("role {name:?} holds {used} of {most} {what}")))
    }

    /// What is stored under what a role may write.
    fn used_by(&self, role: &Role) -> Sums {
        let mut used = Sums::default();
        for (start, end) in role.grants().of(Access::Write).iter() {
            used += match end {
                Some(end) => Interval::Between(start, end),
                None => Interval::From(start),
            }
            .sums(&self.live);
        }
        used
    }

    /// All quotas, and what of them is used.
    pub fn role_usage(&self) -> Vec<RoleUsage> {
        let with_quota = self.auth.roles.values().filter(|role| role.facts.quota.is_some());
        let usage = with_quota.map(|role| {
            let used = self.used_by(role);
            let (role, quota) = (role.facts.name.clone(), role.facts.quota);
            RoleUsage { role, quota, bytes: live_cost(used), keys: used.items as u64 }
        });
        usage.collect()
    }
}
