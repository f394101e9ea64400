//! What users and roles come to, on a state alone.

use bytes::Bytes;

use super::*;
use crate::caller::Named;
use crate::kv::{AUTH_SINCE, Loader, State};
use crate::pb::authpb::Permission;
use crate::pb::etcd::compare::CompareTarget;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::*;
use crate::pb::key_value::looks;
use crate::pb::log::auth_change::Change as Asked;
use crate::pb::log::{self, Answer, AuthChange, AuthEnable, Command, LeaseRevoke, UserPassword, command::Request};

const KEY: [u8; TOKEN_KEY_BYTES] = [7; TOKEN_KEY_BYTES];

struct World(State);

impl World {
    fn ask(&mut self, caller: &Caller, request: Request) -> Result<Answer, Error> {
        let mut command = Command::new(AUTH_SINCE, request);
        command.asker = caller.to_pb();
        let before: Vec<_> = self.0.changes().collect();
        let outcome = self.0.apply(&command, true).unwrap();
        if outcome.is_err() {
            assert!(before.into_iter().eq(self.0.changes()), "what is refused changes nothing");
        }
        outcome
    }

    fn change(&mut self, caller: &Caller, asked: Asked) -> Result<(), Error> {
        self.ask(caller, Request::Auth(AuthChange { change: Some(asked) })).map(drop)
    }

    fn make(&mut self, asked: Asked) {
        self.change(&Caller::Internal, asked).unwrap();
    }

    fn add_user(&mut self, user: &str, roles: &[&str]) {
        self.make(Asked::UserAdd(password(user, "hash")));
        for role in roles {
            self.make(Asked::UserGrantRole(AuthUserGrantRoleRequest { user: user.into(), role: (*role).into() }));
        }
    }

    fn add_role(&mut self, role: &str, permissions: &[(Type, &'static str, &'static str)]) {
        self.make(Asked::RoleAdd(AuthRoleAddRequest { name: role.into() }));
        for (kind, key, range_end) in permissions {
            self.make(grant(role, *kind, key, range_end));
        }
    }

    /// Root, a reader and a writer of `a` to `c`, and one who has no role; authentication is on.
    fn new() -> Self {
        let mut world = Self(State::new());
        world.add_role("r", &[(Type::Read, "a", "c")]);
        world.add_role("w", &[(Type::Write, "a", "c")]);
        for (user, roles) in [("root", &["root"][..]), ("reader", &["r"]), ("writer", &["w"]), ("both", &["r", "w"])] {
            world.add_user(user, roles);
        }
        world.add_user("none", &[]);
        world.make(Asked::Enable(AuthEnable { token_key: Bytes::from_static(&KEY) }));
        world
    }

    fn as_user(&self, name: &str) -> Caller {
        let since = self.0.auth().since(name).unwrap();
        Caller::User(Arc::new(Named::user(name, since)))
    }

    fn lease(&mut self, id: i64) {
        self.ask(&Caller::Internal, Request::LeaseGrant(LeaseGrantRequest { id, ttl: 60 })).unwrap();
    }
}

fn password(user: &str, hash: &'static str) -> UserPassword {
    UserPassword { user: user.into(), hash: hash.into(), no_password: false }
}

fn grant(role: &str, kind: Type, key: &'static str, range_end: &'static str) -> Asked {
    let perm = Some(Permission { perm_type: kind.into(), key: key.into(), range_end: range_end.into() });
    Asked::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: role.into(), perm })
}

fn put(key: &'static str, lease: i64, prev_kv: bool) -> PutRequest {
    PutRequest { key: key.into(), lease, prev_kv, ..PutRequest::default() }
}

fn delete(key: &'static str, range_end: &'static str, prev_kv: bool) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), range_end: range_end.into(), prev_kv }
}

fn read(key: &'static str, range_end: &'static str) -> RangeRequest {
    RangeRequest { key: key.into(), range_end: range_end.into(), ..RangeRequest::default() }
}

fn txn(compares: &[&'static str], success: &[Op], failure: &[Op]) -> TxnRequest {
    let compare = |key: &&'static str| Compare {
        key: (*key).into(),
        target: CompareTarget::Version.into(),
        ..Compare::default()
    };
    let ops = |ops: &[Op]| ops.iter().map(|op| RequestOp { request: Some(op.clone()) }).collect();
    TxnRequest { compare: compares.iter().map(compare).collect(), success: ops(success), failure: ops(failure) }
}

const DENIED: Error = Error::PermissionDenied;

#[test]
fn changes_are_refused_as_by_etcd() {
    let mut world = World(State::new());
    let name = |name: &str| name.to_owned();
    let enable = || Asked::Enable(AuthEnable { token_key: Bytes::from_static(&KEY) });
    let nobody = Caller::Nobody;
    assert_eq!(world.0.auth().revision(), 1);
    assert_eq!(world.change(&nobody, enable()), Err(Error::RootUserNotExist));
    world.add_user("root", &[]);
    assert_eq!(world.change(&nobody, enable()), Err(Error::RootRoleNotExist));
    world.add_role("r", &[]);
    let grant_role = |user: &str, role: &str| AuthUserGrantRoleRequest { user: name(user), role: name(role) };
    for (asked, error) in [
        (Asked::UserAdd(password("", "")), Error::UserEmpty),
        (Asked::UserAdd(password("root", "")), Error::UserExists),
        (Asked::UserDelete(AuthUserDeleteRequest { name: name("u") }), Error::UserNotFound),
        (Asked::UserChangePassword(password("u", "")), Error::UserNotFound),
        (Asked::UserGrantRole(grant_role("u", "r")), Error::UserNotFound),
        (Asked::UserGrantRole(grant_role("root", "s")), Error::RoleNotFound),
        (
            Asked::UserRevokeRole(AuthUserRevokeRoleRequest { name: name("root"), role: name("r") }),
            Error::RoleNotGranted,
        ),
        (Asked::RoleAdd(AuthRoleAddRequest { name: name("") }), Error::RoleEmpty),
        (Asked::RoleAdd(AuthRoleAddRequest { name: name("r") }), Error::RoleExists),
        (Asked::RoleDelete(AuthRoleDeleteRequest { role: name("s") }), Error::RoleNotFound),
        (grant("s", Type::Read, "a", ""), Error::RoleNotFound),
        (grant("r", Type::Read, "", ""), Error::InvalidAuthManagement),
        (grant("r", Type::Read, "b", "a"), Error::InvalidAuthManagement),
        (
            Asked::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: name("r"), perm: None }),
            Error::PermissionNotGiven,
        ),
        (
            Asked::RoleRevokePermission(AuthRoleRevokePermissionRequest { role: name("r"), ..Default::default() }),
            Error::PermissionNotGranted,
        ),
    ] {
        assert_eq!(world.change(&nobody, asked.clone()), Err(error), "{asked:?}");
    }
    assert_eq!(world.0.auth().revision(), 3);
    // The role root needs no definition, and what somebody has is not granted twice.
    world.make(Asked::UserGrantRole(grant_role("root", "root")));
    world.make(Asked::UserGrantRole(grant_role("root", "root")));
    assert_eq!(world.0.auth().revision(), 4);
    world.make(enable());
    assert_eq!((world.0.auth().is_enabled(), world.0.auth().revision()), (true, 4), "this makes no revision");
    let root = world.as_user("root");
    for asked in [
        Asked::UserDelete(AuthUserDeleteRequest { name: name("root") }),
        Asked::UserRevokeRole(AuthUserRevokeRoleRequest { name: name("root"), role: name("root") }),
        Asked::RoleDelete(AuthRoleDeleteRequest { role: name("root") }),
    ] {
        assert_eq!(world.change(&root, asked), Err(Error::InvalidAuthManagement));
    }
    assert_eq!(world.change(&nobody, Asked::Disable(AuthDisableRequest {})), Err(Error::UserEmpty));
    world.change(&root, Asked::Disable(AuthDisableRequest {})).unwrap();
    assert_eq!((world.0.auth().is_enabled(), world.0.auth().revision()), (false, 5));
}

#[test]
fn each_part_of_a_command_needs_its_permission() {
    let mut world = World::new();
    world.lease(1);
    world.ask(&Caller::Internal, Request::Put(put("z", 1, false))).unwrap();
    world.lease(2);
    world.ask(&Caller::Internal, Request::Put(put("a", 2, false))).unwrap();
    let put_op = |key, lease, prev_kv| Op::RequestPut(put(key, lease, prev_kv));
    let get_op = |key, range_end| Op::RequestRange(read(key, range_end));
    let nested = |key| Op::RequestTxn(txn(&[], &[], &[put_op(key, 0, false)]));
    // What is asked; whether a reader, a writer, and who is both may.
    let cases = [
        (Request::Put(put("a", 0, false)), [false, true, true]),
        (Request::Put(put("a", 0, true)), [false, false, true]),
        (Request::Put(put("c", 0, false)), [false, false, false]),
        // The lease takes a key along that they may not write.
        (Request::Put(put("a", 1, false)), [false, false, false]),
        (Request::Put(put("a", 2, false)), [false, true, true]),
        (Request::DeleteRange(delete("a", "c", false)), [false, true, true]),
        (Request::DeleteRange(delete("a", "d", false)), [false, false, false]),
        (Request::DeleteRange(delete("a", "c", true)), [false, false, true]),
        (Request::DeleteRange(delete("a", "\0", false)), [false, false, false]),
        (Request::Txn(txn(&["a"], &[put_op("b", 0, false)], &[])), [false, false, true]),
        (Request::Txn(txn(&["z"], &[put_op("b", 0, false)], &[])), [false, false, false]),
        (Request::Txn(txn(&[], &[put_op("b", 0, false)], &[])), [false, true, true]),
        (Request::Txn(txn(&[], &[put_op("b", 0, false)], &[get_op("a", "c")])), [false, false, true]),
        // Also what the branch would do that is not taken.
        (Request::Txn(txn(&[], &[put_op("b", 0, false)], &[put_op("z", 0, false)])), [false, false, false]),
        (Request::Txn(txn(&[], &[nested("a")], &[])), [false, true, true]),
        (Request::Txn(txn(&[], &[nested("z")], &[])), [false, false, false]),
        (Request::LeaseRevoke(LeaseRevoke { id: 1, term: 0 }), [false, false, false]),
        (Request::Compact(CompactionRequest { revision: 3, physical: false }), [false, false, false]),
        (Request::Alarm(AlarmRequest::default()), [false, false, false]),
        (Request::WantedSize(log::WantedSize::default()), [false, false, false]),
        (
            Request::Auth(AuthChange { change: Some(Asked::RoleAdd(AuthRoleAddRequest { name: "x".into() })) }),
            [false; 3],
        ),
    ];
    for (request, allowed) in cases {
        let asks = |name: &str| World(world.0.clone()).ask(&world.as_user(name), request.clone()).map(drop);
        for (name, allowed) in ["reader", "writer", "both"].into_iter().zip(allowed) {
            assert_eq!(asks(name), if allowed { Ok(()) } else { Err(DENIED) }, "{name}: {request:?}");
        }
        assert_eq!(asks("none"), Err(DENIED), "{request:?}");
        assert_eq!(asks("root"), Ok(()), "{request:?}");
        let nobody = World(world.0.clone()).ask(&Caller::Nobody, request.clone());
        assert_eq!(nobody.map(drop), Err(Error::UserEmpty), "{request:?}");
    }
    let own = Request::StartDigest(log::StartDigest {});
    assert_eq!(
        world.ask(&world.as_user("root"), own.clone()).map(drop),
        Err(DENIED),
        "a member's own, not even root's"
    );
    world.ask(&Caller::Internal, own).unwrap();
    let grant = Request::LeaseGrant(LeaseGrantRequest { id: 5, ttl: 60 });
    assert_eq!(world.ask(&Caller::Nobody, grant.clone()).map(drop), Err(Error::UserEmpty));
    let none = world.as_user("none");
    world.ask(&none, grant).unwrap();
    world.ask(&world.as_user("writer"), Request::LeaseRevoke(LeaseRevoke { id: 2, term: 0 })).unwrap();
}

#[test]
fn reads_need_their_permission_too() {
    let mut world = World::new();
    world.lease(1);
    world.ask(&Caller::Internal, Request::Put(put("a", 1, false))).unwrap();
    let (in_range, beyond) = (read("a", "c"), read("a", "\0"));
    let (mine, other) = (txn(&["a"], &[], &[]), txn(&[], &[Op::RequestRange(read("z", ""))], &[]));
    let wants = [
        (Wants::range(&in_range), [true, false]),
        (Wants::range(&beyond), [false, false]),
        (Wants::Txn(&mine), [true, false]),
        (Wants::Txn(&other), [false, false]),
        (Wants::LeaseKeys(1), [true, false]),
        (Wants::LeaseLife(1), [false, true]),
        (Wants::LeaseLife(9), [true, true]),
        (Wants::AllLeases, [true, false]),
        (Wants::AnyUser, [true, true]),
        (Wants::Root, [false, false]),
    ];
    for (wants, allowed) in wants {
        for (name, allowed) in ["reader", "writer"].into_iter().zip(allowed) {
            let told = world.0.permit(&world.as_user(name), wants);
            assert_eq!(told, if allowed { Ok(()) } else { Err(DENIED) }, "{name}: {wants:?}");
        }
        assert_eq!(world.0.permit(&world.as_user("root"), wants), Ok(()), "{wants:?}");
        assert_eq!(world.0.permit(&Caller::Internal, wants), Ok(()), "{wants:?}");
        assert_eq!(world.0.permit(&Caller::Nobody, wants), Err(Error::UserEmpty), "{wants:?}");
    }
}

#[test]
fn a_token_ends_with_its_password_its_user_and_when_authentication_is_turned_off() {
    let mut world = World::new();
    let keys = read("a", "b");
    let ended = |world: &World, caller: &Caller| world.0.permit(caller, Wants::range(&keys));
    let before = world.as_user("reader");
    // Roles come and go under the same token.
    world.make(Asked::RoleDelete(AuthRoleDeleteRequest { role: "r".into() }));
    assert_eq!(ended(&world, &before), Err(DENIED));
    world.add_role("r", &[(Type::Read, "a", "c")]);
    world.make(Asked::UserGrantRole(AuthUserGrantRoleRequest { user: "reader".into(), role: "r".into() }));
    assert_eq!(ended(&world, &before), Ok(()));
    world.make(Asked::UserChangePassword(password("reader", "another")));
    assert_eq!(ended(&world, &before), Err(Error::InvalidAuthToken));
    let before = world.as_user("reader");
    world.make(Asked::UserDelete(AuthUserDeleteRequest { name: "reader".into() }));
    assert_eq!(ended(&world, &before), Err(Error::InvalidAuthToken));
    world.add_user("reader", &["r"]);
    assert_eq!(ended(&world, &before), Err(Error::InvalidAuthToken));
    let before = world.as_user("reader");
    assert_eq!(ended(&world, &before), Ok(()));
    world.make(Asked::Disable(AuthDisableRequest {}));
    assert_eq!(ended(&world, &Caller::Nobody), Ok(()));
    world.make(Asked::Enable(AuthEnable { token_key: Bytes::from_static(&KEY) }));
    assert_eq!(ended(&world, &before), Err(Error::InvalidAuthToken));
    assert_eq!(ended(&world, &world.as_user("reader")), Ok(()));
}

#[test]
fn who_is_named_by_a_certificate_is_whoever_has_the_name_now() {
    let world = World::new();
    let named = |name: &str| Caller::User(Arc::new(Named::user(name, 0)));
    let keys = read("a", "b");
    assert_eq!(world.0.permit(&named("reader"), Wants::range(&keys)), Ok(()));
    assert_eq!(world.0.permit(&named("stranger"), Wants::range(&keys)), Err(DENIED));
    assert_eq!(world.0.permit(&named("stranger"), Wants::Root), Err(Error::UserNotFound));
    assert_eq!(world.0.permit(&named("stranger"), Wants::AnyUser), Ok(()));
}

#[test]
fn who_is_known_to_an_issuer_has_the_roles_that_go_with_it_and_they_mean_what_they_mean_now() {
    let mut world = World::new();
    let mapped = |roles: &[&str]| {
        let roles = Some(roles.iter().map(|role| (*role).to_owned()).collect());
        Caller::User(Arc::new(Named { roles, ..Named::user("pod", 0) }))
    };
    let keys = read("a", "b");
    let may_read = |world: &World, roles: &[&str]| world.0.permit(&mapped(roles), Wants::range(&keys));
    for (roles, told) in [
        (&["r"][..], Ok(())),
        (&["w", "r"], Ok(())),
        (&["root"], Ok(())),
        (&[], Err(DENIED)),
        (&["w"], Err(DENIED)),
        (&["none"], Err(DENIED)),
    ] {
        assert_eq!(may_read(&world, roles), told, "{roles:?}");
    }
    assert_eq!(world.0.permit(&mapped(&["r"]), Wants::AnyUser), Ok(()));
    assert_eq!(world.0.permit(&mapped(&["r"]), Wants::Root), Err(DENIED));
    assert_eq!(world.0.permit(&mapped(&["root"]), Wants::Root), Ok(()));
    let own_role = |roles: &[&str]| world.0.auth().check_own(&mapped(roles), |own| own.has("r"));
    assert_eq!((own_role(&["w", "r"]), own_role(&["w"])), (Ok(()), Err(DENIED)));
    // Commands carry them.
    let put = || Request::Put(put("a", 0, false));
    assert_eq!(world.ask(&mapped(&["r"]), put()).map(drop), Err(DENIED));
    world.ask(&mapped(&["w"]), put()).unwrap();
    // One that is changed is another one at once.
    world.make(Asked::RoleDelete(AuthRoleDeleteRequest { role: "r".into() }));
    assert_eq!(may_read(&world, &["r"]), Err(DENIED));
}

#[test]
fn users_and_roles_are_in_snapshots_and_journals_and_an_untouched_store_says_nothing_of_them() {
    let mut world = World(State::new());
    assert!(!world.0.changes().any(|c| matches!(c.change, Some(Change::Auth(_)))));
    world.0.keep_journal(1 << 20);
    let before = world.0.digest();
    world.add_role("r", &[(Type::Read, "a", "c"), (Type::Write, "a", ""), (Type::Readwrite, "x", "\0")]);
    world.add_user("root", &["root", "r"]);
    world.add_user("u", &["r"]);
    world.make(Asked::Enable(AuthEnable { token_key: Bytes::from_static(&KEY) }));
    world.make(Asked::UserDelete(AuthUserDeleteRequest { name: "u".into() }));
    assert_ne!(world.0.digest(), before, "members compare it");
    let journal = world.0.take_journal().changes;
    let whole: Vec<_> = world.0.changes().collect();
    let live = journal.iter().filter(|c| {
        let change = c.change.as_ref().unwrap();
        let is_end = matches!(change, Change::AuthUser(user) if user.gone);
        is_end || world.0.is_live_fact(change)
    });
    for changes in [journal.clone(), live.cloned().collect(), whole.clone()] {
        let mut loader = Loader::new();
        changes.into_iter().for_each(|change| loader.load(change).unwrap());
        let state = loader.finish(1).unwrap();
        assert!(state.changes().eq(whole.iter().cloned()));
        assert_eq!(state.bytes(), world.0.bytes());
        let root = Caller::User(Arc::new(Named::user("root", state.auth().since("root").unwrap())));
        assert_eq!(state.permit(&root, Wants::Root), Ok(()));
    }
}

fn declared(users: &[(&str, &'static str, &[&str])], mark: u64) -> log::AuthDeclare {
    let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let user = |(name, hash, roles): &(&str, &'static str, &[&str])| log::auth_declare::User {
        name: (*name).into(),
        hash: (*hash).into(),
        no_password: *name == "root",
        roles: strings(roles),
    };
    let permission = |kind: Type, key: &'static str, range_end: &'static str| Permission {
        perm_type: kind.into(),
        key: key.into(),
        range_end: range_end.into(),
    };
    let permissions = vec![
        permission(Type::Read, "x", ""),
        permission(Type::Read, "a", "c"),
        // The last one for the same keys counts.
        permission(Type::Readwrite, "x", ""),
    ];
    let roles = vec![log::auth_declare::Role { name: "d".into(), permissions, quota: None }];
    let users = users.iter().map(user).collect();
    log::AuthDeclare { roles, users, mark, token_key: Bytes::from_static(&KEY) }
}

#[test]
fn a_declaration_makes_whom_it_names_and_leaves_the_others_alone() {
    let mut world = World(State::new());
    world.add_role("by hand", &[(Type::Read, "h", "")]);
    world.add_user("other", &["by hand"]);
    let whole = declared(&[("root", "", &["root"]), ("u", "hash", &["d", "by hand", "d"])], 7);
    world.make(Asked::Declare(whole.clone()));
    let auth = world.0.auth();
    assert!(auth.is_enabled() && auth.declared() == 7 && auth.token_key() == &KEY[..]);
    assert_eq!(auth.user("u").unwrap().roles, ["by hand", "d"]);
    assert_eq!(
        auth.role("d").unwrap().permissions.iter().map(|p| (&p.key[..], p.perm_type)).collect::<Vec<_>>(),
        [(&b"a"[..], Type::Read as i32), (b"x", Type::Readwrite as i32)]
    );
    assert!(auth.user("root").unwrap().no_password && auth.user("other").unwrap().has("by hand"));
    let (u, other) = (world.as_user("u"), world.as_user("other"));
    // Carried out again, with a password that is left, it ends no token and undoes what was changed by hand.
    world.make(Asked::UserRevokeRole(AuthUserRevokeRoleRequest { name: "u".into(), role: "d".into() }));
    world.make(grant("d", Type::Read, "a", "z"));
    let again = declared(&[("root", "", &["root"]), ("u", "", &["d"])], 8);
    world.make(Asked::Declare(again));
    assert_eq!(world.0.permit(&u, Wants::range(&read("a", "c"))), Ok(()));
    assert_eq!(world.0.permit(&u, Wants::range(&read("a", "z"))), Err(DENIED));
    assert_eq!(world.0.permit(&other, Wants::range(&read("h", ""))), Ok(()));
    assert_eq!(world.0.auth().declared(), 8);
    // Another password ends them.
    world.make(Asked::Declare(declared(&[("u", "another", &["d"])], 9)));
    assert_eq!(world.0.permit(&u, Wants::range(&read("a", "c"))), Err(Error::InvalidAuthToken));
    // It holds over a snapshot.
    let mut loader = Loader::new();
    world.0.changes().for_each(|change| loader.load(change).unwrap());
    assert_eq!(loader.finish(1).unwrap().auth().declared(), 9);
}

#[test]
fn a_declaration_that_cannot_be_carried_out_changes_nothing() {
    let root = ("root", "", &["root"][..]);
    let with = |users: &[(&'static str, &'static str, &'static [&'static str])]| declared(users, 7);
    let nameless = log::auth_declare::Role::default();
    let empty = log::auth_declare::Role {
        quota: None,
        name: "e".into(),
        permissions: vec![Permission { perm_type: 0, key: "b".into(), range_end: "a".into() }],
    };
    for (asked, error) in [
        (with(&[]), Error::RootUserNotExist),
        (with(&[("root", "", &["d"])]), Error::RootRoleNotExist),
        (with(&[root, ("u", "hash", &["none"])]), Error::RoleNotFound),
        (with(&[root, ("", "hash", &[])]), Error::UserEmpty),
        // Its password was to stay, and there is none.
        (with(&[root, ("u", "", &[])]), Error::UserNotFound),
        (log::AuthDeclare { roles: vec![nameless], ..with(&[root]) }, Error::RoleEmpty),
        (log::AuthDeclare { roles: vec![empty], ..with(&[root]) }, Error::InvalidAuthManagement),
    ] {
        let mut world = World(State::new());
        assert_eq!(world.change(&Caller::Internal, Asked::Declare(asked.clone())), Err(error), "{asked:?}");
    }
    // It is no client's to ask for, but root's.
    let mut world = World::new();
    let reader = world.as_user("reader");
    assert_eq!(world.change(&reader, Asked::Declare(with(&[root]))), Err(DENIED));
}

#[test]
fn users_take_space_and_give_it_back() {
    let mut world = World(State::new());
    let empty = world.0.bytes();
    world.add_role("r", &[(Type::Read, "a", "c")]);
    world.add_user("u", &["r"]);
    assert!(world.0.bytes() > empty);
    world.make(Asked::RoleDelete(AuthRoleDeleteRequest { role: "r".into() }));
    world.make(Asked::UserDelete(AuthUserDeleteRequest { name: "u".into() }));
    assert_eq!(world.0.bytes(), empty);
}

#[test]
fn users_and_roles_have_bounds_by_themselves_and_together() {
    let seed = fastrand::u64(..);
    let (mut random, mut world, mut refused) = (fastrand::Rng::with_seed(seed), World::new(), 0);
    let text = |random: &mut fastrand::Rng| random.alphanumeric().to_string().repeat(1 << random.u32(10..20));
    for _ in 0..600 {
        let name = format!("role {}", random.u8(..8));
        let key = Bytes::from(text(&mut random));
        let perm = Some(Permission { perm_type: 0, key, range_end: Bytes::new() });
        let asked = match random.u8(..8) {
            0 => Asked::RoleAdd(AuthRoleAddRequest { name: text(&mut random) }),
            1 => Asked::RoleAdd(AuthRoleAddRequest { name }),
            2 => Asked::UserAdd(UserPassword { user: text(&mut random), ..password("", "hash") }),
            _ => Asked::RoleGrantPermission(AuthRoleGrantPermissionRequest { name, perm }),
        };
        refused += usize::from(world.change(&Caller::Internal, asked) == Err(Error::RequestTooLarge));
        let sizes = world.0.auth().users().map(entry_bytes).chain(world.0.auth().roles().map(entry_bytes));
        assert!(sizes.max().unwrap() <= 256 << 10, "seed {seed}");
    }
    assert!(refused > 100, "seed {seed}: {refused}");
    // All together; without a look at the whole state each time.
    let mut world = World::new();
    let user = |n: u32| UserPassword { user: format!("{n} {}", "u".repeat(250_000)), ..password("", "hash") };
    let add = |world: &mut World, n: u32| {
        let change = Some(Asked::UserAdd(user(n)));
        let mut command = Command::new(AUTH_SINCE, Request::Auth(AuthChange { change }));
        command.asker = Caller::Internal.to_pb();
        world.0.apply(&command, true).unwrap().map(drop)
    };
    let full = (0..1000).find(|n| add(&mut world, *n) == Err(Error::NoSpace));
    assert!(full.is_some() && world.0.auth().bytes() <= change::ALL_BYTES_MAX, "{full:?}");
    // What takes less is done.
    world.make(Asked::UserDelete(AuthUserDeleteRequest { name: user(0).user }));
    world.make(Asked::UserAdd(user(0)));
}

/// A key of one or two letters.
fn some_key(random: &mut fastrand::Rng) -> Bytes {
    (0..random.usize(1..3)).map(|_| random.u8(b'a'..=b'e')).collect::<Vec<_>>().into()
}

/// Users of roles with any ranges, and keys of any leases.
fn some_world(random: &mut fastrand::Rng) -> World {
    let mut world = World(State::new());
    let roles = ["r0", "r1", "r2", "r3"];
    for role in roles {
        world.add_role(role, &[]);
        for _ in 0..random.usize(0..6) {
            let key = some_key(random);
            let range_end = match random.u8(..4) {
                0 => Bytes::new(),
                1 if random.u8(..3) == 0 => "\0".into(),
                _ => some_key(random),
            };
            let perm = Some(Permission { perm_type: random.i32(0..3), key, range_end });
            let granted = AuthRoleGrantPermissionRequest { name: role.into(), perm };
            // A range that ends before it begins is none.
            let _ = world.change(&Caller::Internal, Asked::RoleGrantPermission(granted));
        }
    }
    world.add_user("root", &["root"]);
    for user in ["u0", "u1", "u2"] {
        let held: Vec<&str> = roles.into_iter().filter(|_| random.bool()).collect();
        world.add_user(user, &held);
    }
    for id in [i64::MIN, -1, 1, 2, i64::MAX] {
        world.lease(id);
        for _ in 0..random.usize(0..5) {
            let put = PutRequest { key: some_key(random), lease: id, ..PutRequest::default() };
            world.ask(&Caller::Internal, Request::Put(put)).unwrap();
        }
    }
    world.make(Asked::Enable(AuthEnable { token_key: Bytes::from_static(&KEY) }));
    world
}

/// The rule itself: of each key by itself.
fn each_key_is_permitted(state: &State, who: Who<'_>, ids: &[i64], access: Access) -> Result<(), Error> {
    if state.auth.check_root(who).is_ok() {
        return Ok(());
    }
    ids.iter().flat_map(|id| state.lease_keys(*id)).try_for_each(|kv| state.auth.check(who, kv.key(), &[], access))
}

#[test]
fn leases_are_permitted_to_whom_each_of_their_keys_is() {
    let seed = std::env::var("QUORATE_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("QUORATE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut permitted, mut refused) = (0, 0);
    for _ in 0..300 {
        let world = some_world(&mut random);
        let state = &world.0;
        let user = |name: &str, since| Caller::User(Arc::new(Named::user(name, since)));
        let mapped = |roles: Vec<String>| Caller::User(Arc::new(Named { roles: Some(roles), ..Named::user("pod", 0) }));
        let some = ["r0", "r1", "r2", "r3", "none"].map(str::to_owned).into_iter().filter(|_| random.bool()).collect();
        let mut callers = vec![Caller::Internal, Caller::Nobody, Caller::stranger(), user("nobody", 0), mapped(some)];
        callers.extend(["root", "u0", "u1", "u2"].map(|name| world.as_user(name)));
        let all: Vec<i64> = state.leases().iter().map(|(id, _)| id).collect();
        for caller in callers {
            let who = caller.who();
            let user = state.auth.check_user(who);
            let mut holds = |wants: Wants<'_>, expected: Result<(), Error>| {
                assert_eq!(state.permit(&caller, wants), expected, "{wants:?} of {caller:?}");
                if expected.is_ok() { permitted += 1 } else { refused += 1 }
            };
            let by_key =
                |ids: &[i64], access| user.clone().and_then(|()| each_key_is_permitted(state, who, ids, access));
            for id in all.iter().copied().chain([0, 7]) {
                holds(Wants::LeaseKeys(id), by_key(&[id], Access::Read));
                holds(Wants::LeaseLife(id), by_key(&[id], Access::Write));
            }
            holds(Wants::AllLeases, by_key(&all, Access::Read));
            // Puts of many leases in one command, on both branches.
            let ids: Vec<i64> = (0..random.usize(1..6)).map(|_| all[random.usize(..all.len())]).collect();
            let put = |id: &i64| Op::RequestPut(PutRequest { key: "aa".into(), lease: *id, ..PutRequest::default() });
            let (first, second) = ids.split_at(random.usize(..=ids.len()));
            let puts = |ids: &[i64]| ids.iter().map(put).collect::<Vec<_>>();
            let both = txn(&[], &puts(first), &puts(second));
            let expected = state.auth.check(who, b"aa", &[], Access::Write);
            holds(Wants::Txn(&both), expected.and_then(|()| each_key_is_permitted(state, who, &ids, Access::Write)));
        }
    }
    assert!(permitted > 5000 && refused > 5000, "{permitted} {refused}");
}

#[test]
fn who_may_do_what_with_a_lease_is_decided_without_a_look_at_each_of_its_keys() {
    const KEYS: usize = 5000;
    let mut world = World::new();
    world.lease(1);
    let put =
        |n: usize| Op::RequestPut(PutRequest { key: format!("b{n:05}").into(), lease: 1, ..PutRequest::default() });
    let all: Vec<Op> = (0..KEYS).map(put).collect();
    world.ask(&Caller::Internal, Request::Txn(txn(&[], &all, &[]))).unwrap();
    let mapped = Caller::User(Arc::new(Named { roles: Some(vec!["r".into(), "w".into()]), ..Named::user("pod", 0) }));
    let puts = txn(&[], &[], &all[..1000]);
    for caller in [world.as_user("writer"), mapped] {
        // None of them is done; with a look at each key they were 5,000,000.
        let begin = looks::so_far();
        world.0.permit(&caller, Wants::Txn(&puts)).unwrap();
        assert!(looks::so_far() - begin < 5000, "{} looks for puts that are not made", looks::so_far() - begin);
        let begin = looks::so_far();
        world.0.permit(&caller, Wants::LeaseLife(1)).unwrap();
        assert!(looks::so_far() - begin < 200, "{} looks for a keep-alive", looks::so_far() - begin);
    }
}
