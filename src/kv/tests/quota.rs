//! Quotas of roles: to the byte, over random requests, beside a count that is made anew each time.

use super::*;
use crate::caller::Caller;
use crate::error::Error;
use crate::kv::AUTH_SINCE;
use crate::pb::admin::{RoleQuota, SetRoleQuotaRequest};
use crate::pb::authpb::{Permission, permission::Type};
use crate::pb::log::auth_change::Change as Asked;
use crate::pb::log::{AuthChange, AuthEnable, UserPassword};

fn apply(state: &mut State, request: Request) -> Result<Answer, Error> {
    let mut command = Command::new(AUTH_SINCE, request);
    command.asker = Caller::Internal.to_pb();
    state.apply(&command, true).unwrap()
}

fn change(state: &mut State, asked: Asked) {
    apply(state, Request::Auth(AuthChange { change: Some(asked) })).unwrap();
}

fn set_quota(state: &mut State, role: &str, bytes: u64, keys: u64) {
    let quota = Some(RoleQuota { bytes, keys, requests_per_second: 0 });
    change(state, Asked::RoleQuota(SetRoleQuotaRequest { role: role.into(), quota }));
}

fn grant(state: &mut State, role: &str, key: &str, range_end: &str) {
    let (key, range_end) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(range_end.as_bytes()));
    let perm = Some(Permission { perm_type: Type::Readwrite.into(), key, range_end });
    change(state, Asked::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: role.into(), perm }));
}

/// Authentication is on; there are these roles, which may do nothing yet.
fn with_roles(roles: &[&str]) -> State {
    let mut state = State::new();
    for role in roles {
        change(&mut state, Asked::RoleAdd(AuthRoleAddRequest { name: (*role).into() }));
    }
    change(&mut state, Asked::UserAdd(UserPassword { user: "root".into(), no_password: true, ..Default::default() }));
    let root = AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() };
    change(&mut state, Asked::UserGrantRole(root));
    change(&mut state, Asked::Enable(AuthEnable { token_key: vec![7; 32].into() }));
    state
}

/// What is stored from `from` to `to`: bytes and keys.
fn counted(state: &State, from: &str, to: &str) -> (u64, u64) {
    let range = RangeRequest { key: from.to_owned().into(), range_end: to.to_owned().into(), ..Default::default() };
    let kvs = state.range(&range).unwrap().kvs;
    let sums =
        crate::kv::tree::Sums { items: kvs.len(), bytes: kvs.iter().map(|kv| kv.as_encoded().len() as u64).sum() };
    (crate::kv::versions::live_cost(sums), kvs.len() as u64)
}

#[test]
fn a_put_fits_into_each_quota_to_the_byte_or_is_refused_and_changes_nothing() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    // Two that overlap, and one whose ranges meet and are parted.
    let ranges: [(&str, &[(&str, &str)]); 3] =
        [("one", &[("a", "m")]), ("other", &[("f", "z")]), ("parted", &[("a", "c"), ("c", "d"), ("x", "z")])];
    let mut state = with_roles(&["one", "other", "parted"]);
    for (role, ranges) in ranges {
        ranges.iter().for_each(|(from, to)| grant(&mut state, role, from, to));
    }
    let (mut refused, mut done) = (0, 0);
    for step in 0..6000 {
        if step % 500 == 0 {
            for (role, _) in ranges {
                let (bytes, keys) = (random.u64(0..6000), random.u64(0..12));
                set_quota(&mut state, role, bytes, if random.bool() { keys } else { 0 });
            }
        }
        let key = |random: &mut fastrand::Rng| Bytes::from(random.char('a'..='z').to_string());
        if random.u8(..8) == 0 {
            let (from, to) = (key(&mut random), key(&mut random));
            apply(&mut state, Request::DeleteRange(DeleteRangeRequest { key: from, range_end: to, prev_kv: false }))
                .unwrap();
            continue;
        }
        let one = |random: &mut fastrand::Rng| PutRequest {
            key: key(random),
            value: vec![b'v'; random.usize(0..600)].into(),
            ..Default::default()
        };
        let request = if random.bool() {
            Request::Put(one(&mut random))
        } else {
            let mut puts: Vec<PutRequest> = (0..random.usize(1..5)).map(|_| one(&mut random)).collect();
            puts.sort_by(|a, b| a.key.cmp(&b.key));
            puts.dedup_by(|a, b| a.key == b.key);
            let success = puts.into_iter().map(|put| RequestOp { request: Some(Op::RequestPut(put)) }).collect();
            Request::Txn(TxnRequest { success, ..Default::default() })
        };
        // What it would come to without quotas.
        let mut free = state.clone();
        ranges.iter().for_each(|(role, _)| set_quota(&mut free, role, 0, 0));
        apply(&mut free, request.clone()).unwrap();
        let quotas: Vec<RoleQuota> =
            ranges.iter().map(|(role, _)| state.auth().role(role).unwrap().quota.unwrap_or_default()).collect();
        let fits = ranges.iter().zip(quotas).all(|((_, ranges), quota)| {
            let all = |state: &State| {
                let parts = ranges.iter().map(|(from, to)| counted(state, from, to));
                parts.fold((0, 0), |all, part| (all.0 + part.0, all.1 + part.1))
            };
            let (before, after) = (all(&state), all(&free));
            let within = |before: u64, after: u64, most: u64| most == 0 || after <= most || after <= before;
            within(before.0, after.0, quota.bytes) && within(before.1, after.1, quota.keys)
        });
        let before: Vec<Change> = state.changes().collect();
        match apply(&mut state, request) {
            Ok(_) => done += usize::from(fits),
            Err(Error::QuotaExceeded(text)) => {
                assert!(!fits, "seed {seed}, step {step}: {text}");
                assert!(before.into_iter().eq(state.changes()), "seed {seed}, step {step}");
                refused += 1;
                continue;
            }
            Err(error) => panic!("seed {seed}, step {step}: {error}"),
        }
        assert!(fits, "seed {seed}, step {step}: it was taken");
    }
    assert!(refused > 100 && done > 100, "seed {seed}: {refused} refused, {done} done");
    // The sums are what is there.
    let usage = state.role_usage();
    for role in usage {
        let (_, ranges) = ranges.iter().find(|(name, _)| *name == role.role).unwrap();
        let parts = ranges.iter().map(|(from, to)| counted(&state, from, to));
        let all = parts.fold((0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
        assert_eq!((role.bytes, role.keys), all, "seed {seed}");
    }
}

#[test]
fn quotas_count_for_whoever_writes_while_authentication_is_on_and_have_bounds() {
    let mut state = with_roles(&["r"]);
    grant(&mut state, "r", "a", "b");
    set_quota(&mut state, "r", 0, 1);
    apply(&mut state, Request::Put(put("a", "1"))).unwrap();
    let refused = apply(&mut state, Request::Put(put("a1", "1"))).unwrap_err();
    assert_eq!(refused.to_string(), "etcdserver: mvcc: database space exceeded: role \"r\" holds 1 of 1 keys");
    apply(&mut state, Request::Put(put("a", "22"))).unwrap();
    apply(&mut state, Request::Put(put("b", "1"))).unwrap();
    // What is granted later counts at once.
    grant(&mut state, "r", "b", "c");
    assert!(apply(&mut state, Request::Put(put("b1", "1"))).unwrap_err().to_string().contains("holds 2 of 1 keys"));
    apply(&mut state, Request::DeleteRange(delete("a", "c"))).unwrap();
    apply(&mut state, Request::Put(put("b1", "1"))).unwrap();
    // In a snapshot it is, too.
    let mut loader = Loader::new();
    state.changes().for_each(|change| loader.load(change).unwrap());
    assert!(apply(&mut loader.finish(state.revision()).unwrap(), Request::Put(put("b2", "1"))).is_err());
    let many = |state: &mut State| {
        (0..200).try_for_each(|n| {
            let perm = Some(Permission {
                perm_type: Type::Write.into(),
                key: format!("k{n:03}").into(),
                range_end: Bytes::new(),
            });
            let grant = Asked::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: "r".into(), perm });
            apply(state, Request::Auth(AuthChange { change: Some(grant) })).map(drop)
        })
    };
    assert!(matches!(many(&mut state), Err(Error::InvalidRequest(_))), "each put would look at all of them");
    change(&mut state, Asked::RoleQuota(SetRoleQuotaRequest { role: "r".into(), quota: None }));
    assert_eq!(many(&mut state), Ok(()));
    let quota = Some(RoleQuota { bytes: 1, keys: 0, requests_per_second: 0 });
    let asked = Asked::RoleQuota(SetRoleQuotaRequest { role: "r".into(), quota });
    assert!(apply(&mut state, Request::Auth(AuthChange { change: Some(asked) })).is_err());
}
