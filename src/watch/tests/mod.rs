//! The hub on a real state, one fact a test; random histories beside a model in `model`.

mod many;
mod model;

use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::caller::{Caller, Named};
use crate::env::sim::{NoNet, SimDisk};
use crate::env::{Env, timeout};
use crate::error::Error;
use crate::kv::AUTH_SINCE;
use crate::node::Client;
use crate::node::account::Account;
use crate::pb::authpb::Permission;
use crate::pb::etcd::request_op::Request as Op;
use crate::pb::etcd::{
    AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthRoleRevokePermissionRequest, AuthUserGrantRoleRequest,
    CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest,
};
use crate::pb::log::auth_change::Change;
use crate::pb::log::{AuthChange, AuthEnable, Command, Promote, Supersede, UserPassword, command::Request};
use crate::raft::tests::entry;
use crate::raft::{Applied, Store};

/// A state that is applied to, and its hub.
struct Rig {
    env: Env,
    store: Arc<Store>,
    hub: Hub,
    index: u64,
}

const OPTIONS: Options = Options { stream_bytes_max: 16 << 10, stream_watchers_max: 100 };

impl Rig {
    fn new(options: Options) -> Self {
        Self::with_account(options, Account::new(1 << 20, 1 << 20, 150))
    }

    fn with_account(options: Options, account: Account) -> Self {
        Self::on(Env::sim(1, Arc::new(SimDisk::new(1)), Arc::new(NoNet)), options, account)
    }

    fn on(env: Env, options: Options, account: Account) -> Self {
        let store = Store::new(Applied::default(), false, 0);
        let hub = Hub::start(&env, store.clone(), options, account);
        Self { env, store, hub, index: 0 }
    }

    fn apply_internal(&mut self, request: Request) {
        let command = Command { asker: Caller::Internal.to_pb(), ..Command::new(AUTH_SINCE, request) };
        self.store.apply(entry(1, self.index, vec![command]), false).unwrap();
        self.index += 1;
    }

    fn put_internal(&mut self, key: &'static str, value: &'static str) {
        self.apply_internal(Request::Put(PutRequest { key: key.into(), value: value.into(), ..Default::default() }));
    }

    fn apply(&mut self, request: Request) {
        let command = Command::new(1, request);
        self.store.apply(entry(1, self.index, vec![command]), false).unwrap();
        self.index += 1;
    }

    fn put(&mut self, key: &str, value: impl AsRef<[u8]>) -> i64 {
        self.apply(Request::Put(put_of(key, value)));
        self.revision()
    }

    fn delete(&mut self, key: &str) -> i64 {
        self.apply(Request::DeleteRange(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }));
        self.revision()
    }

    fn compact(&mut self, revision: i64) {
        self.apply(Request::Compact(CompactionRequest { revision, physical: false }));
    }

    /// As housekeeping does.
    fn sweep(&self) {
        while !self.store.is_history_wanted() && !self.store.write(|s| s.kv.sweep(8)) {}
    }

    /// A snapshot of the present state takes its place.
    fn reinstall(&self) {
        let view = self.store.view();
        let mut loader = kv::Loader::new();
        view.kv.changes().for_each(|change| loader.load(change).unwrap());
        self.store.replace(Applied::loaded(loader, &view.meta()).unwrap(), 0);
    }

    fn revision(&self) -> i64 {
        self.store.read(|s| s.kv.revision())
    }

    fn session(&self, shape: &Shape, start: i64) -> Session {
        let mut session = self.hub.session(&Client::default(), Caller::Internal);
        session.watch(1, shape, start).unwrap();
        session
    }
}

fn put_of(key: &str, value: impl AsRef<[u8]>) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.as_ref().to_vec().into(), ..Default::default() }
}

/// What comes before anything has to be waited for.
async fn take(session: &mut Session) -> Vec<Output> {
    let mut outputs = Vec::new();
    while let Ok(Ok(output)) = timeout(Duration::from_millis(1), session.next()).await {
        outputs.extend((output != Output::CaughtUp).then_some(output));
    }
    outputs
}

/// Each output in short: `5 a=1 -b`, or `compacted 7`.
fn show(outputs: &[Output]) -> Vec<String> {
    let one = |event: &Event| {
        let kv = event.kv.as_ref().unwrap();
        let (key, value) = (String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(kv.value()));
        let prev = event.prev_kv.as_ref().map(|prev| format!("({})", String::from_utf8_lossy(prev.value())));
        let prev = prev.unwrap_or_default();
        match event.r#type() {
            EventType::Put => format!(" {key}={value}{prev}"),
            EventType::Delete => format!(" -{key}{prev}"),
        }
    };
    let all = outputs.iter().map(|output| match output {
        Output::Events { batch, .. } => {
            format!("{}{}", batch.revision, batch.events.iter().map(one).collect::<String>())
        }
        Output::Compacted { compacted, .. } => format!("compacted {compacted}"),
        Output::Denied { error, .. } => error.to_string(),
        Output::CaughtUp => "caught up".to_owned(),
    });
    all.collect()
}

fn everything() -> Shape {
    Shape::new("\0", "\0")
}

#[tokio::test(start_paused = true)]
async fn a_watcher_gets_what_it_asked_for_from_any_start() {
    let mut rig = Rig::new(OPTIONS);
    rig.put("a", "1");
    rig.put("b", "2");
    let mut past = rig.session(&everything(), 2);
    let mut present = rig.session(&Shape::of_key("a"), 0);
    let mut future = rig.session(&everything(), 6);
    let mut prefix = rig.session(&Shape::new("b", "c"), 0);
    let filters = Shape { puts: false, prev_kv: true, ..everything() };
    let mut deletes = rig.session(&filters, 1);
    let previous = Shape { prev_kv: true, ..Shape::of_key("a") };
    let mut previous = rig.session(&previous, 1);
    rig.put("a", "3");
    let both = [Op::RequestPut(put_of("a", "4")), Op::RequestPut(put_of("b", "5"))];
    let success = both.map(|op| RequestOp { request: Some(op) }).to_vec();
    rig.apply(Request::Txn(TxnRequest { success, ..Default::default() }));
    rig.delete("a");
    rig.put("a", "6");
    assert_eq!(show(&take(&mut past).await), ["2 a=1", "3 b=2", "4 a=3", "5 a=4 b=5", "6 -a", "7 a=6"]);
    assert_eq!(show(&take(&mut present).await), ["4 a=3", "5 a=4", "6 -a", "7 a=6"]);
    assert_eq!(show(&take(&mut future).await), ["6 -a", "7 a=6"]);
    assert_eq!(show(&take(&mut prefix).await), ["5 b=5"]);
    assert_eq!(show(&take(&mut deletes).await), ["6 -a(4)"]);
    assert_eq!(show(&take(&mut previous).await), ["2 a=1", "4 a=3(1)", "5 a=4(3)", "6 -a(4)", "7 a=6"]);
    rig.put("a", "7");
    assert_eq!(show(&take(&mut past).await), ["8 a=7"], "handed over to the hub");
    assert_eq!(show(&take(&mut previous).await), ["8 a=7(6)"]);
}

#[tokio::test(start_paused = true)]
async fn watchers_of_one_shape_share_what_they_get() {
    let mut rig = Rig::new(OPTIONS);
    let (mut one, mut other) = (rig.session(&everything(), 0), rig.session(&everything(), 0));
    rig.put("a", "1");
    let (one, other) = (take(&mut one).await, take(&mut other).await);
    let (Output::Events { batch: one, .. }, Output::Events { batch: other, .. }) = (&one[0], &other[0]) else {
        panic!("{one:?} {other:?}");
    };
    assert!(Arc::ptr_eq(one, other));
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_does_not_read_costs_its_bound_and_gets_all_later() {
    let mut rig = Rig::new(OPTIONS);
    let (mut slow, mut quick) = (rig.session(&everything(), 0), rig.session(&everything(), 0));
    let mut seen = Vec::new();
    for i in 0..1000 {
        rig.put(&format!("k{i}"), [b'x'; 100]);
        if i % 10 == 0 {
            seen.extend(take(&mut quick).await);
            assert!(slow.queued_bytes() <= OPTIONS.stream_bytes_max, "{}", slow.queued_bytes());
        }
    }
    seen.extend(take(&mut quick).await);
    assert!(slow.queued_bytes() > OPTIONS.stream_bytes_max / 2);
    let late = take(&mut slow).await;
    assert_eq!(late.len(), 1000);
    assert_eq!(late, seen);
    // What is larger than the bound comes all the same.
    rig.put("large", vec![b'x'; 100 << 10]);
    rig.put("larger", vec![b'x'; 200 << 10]);
    rig.put("small", "");
    assert_eq!(take(&mut slow).await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_synced_watcher_is_not_cancelled_by_a_compaction_that_came_later() {
    let mut rig = Rig::new(OPTIONS);
    let mut session = rig.session(&everything(), 0);
    for _ in 0..3 {
        rig.put("a", "1");
        rig.put("a", "2");
        rig.put("b", "3");
        rig.compact(rig.revision());
        // The hub had no turn yet.
        rig.sweep();
    }
    assert_eq!(take(&mut session).await.len(), 9);
    rig.sweep();
    assert!(!rig.store.read(|s| s.kv.sweep_pending()), "the hub holds the sweep no longer than it has to");
    drop(session);
    rig.put("a", "4");
    rig.compact(rig.revision());
    take(&mut rig.session(&everything(), 0)).await;
    rig.sweep();
    assert!(!rig.store.read(|s| s.kv.sweep_pending()), "nor does it without watchers");
}

/// A promotion of a standby.
#[tokio::test(start_paused = true)]
async fn a_jump_of_revisions_is_told_as_a_compaction_and_who_watches_from_it_misses_nothing() {
    let mut rig = Rig::new(OPTIONS);
    rig.put("a", "1");
    let mut synced = rig.session(&everything(), 0);
    assert_eq!(show(&take(&mut synced).await), Vec::<String>::new());
    rig.apply(Request::Supersede(Supersede { generation: 2, cluster_id: 7 }));
    rig.apply(Request::Promote(Promote { jump: 1000 }));
    rig.put("a", "2");
    let seen = take(&mut synced).await;
    assert_eq!(seen.last(), Some(&Output::Compacted { watcher: 1, compacted: 1002 }), "{:?}", show(&seen));
    let mut after = rig.session(&everything(), 1003);
    assert_eq!(show(&take(&mut after).await)[0], "1003 a=2");
}

#[tokio::test(start_paused = true)]
async fn who_catches_up_too_late_is_told_of_the_compaction() {
    let mut rig = Rig::new(OPTIONS);
    let mut slow = rig.session(&everything(), 0);
    for i in 0..300 {
        rig.put(&format!("k{i}"), [b'x'; 100]);
    }
    take(&mut rig.session(&everything(), 0)).await;
    rig.compact(301);
    rig.sweep();
    let seen = take(&mut slow).await;
    assert!(seen.len() > 50, "what was queued comes first: {}", seen.len());
    assert_eq!(seen.last(), Some(&Output::Compacted { watcher: 1, compacted: 301 }));
    assert_eq!(slow.watchers(), 0);
    assert_eq!(show(&take(&mut rig.session(&everything(), 300)).await), ["compacted 301"]);
    assert_eq!(take(&mut rig.session(&everything(), 301)).await.len(), 1, "the compacted revision itself is there");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_ends_only_watchers_that_lack_what_it_lacks() {
    let mut rig = Rig::new(OPTIONS);
    let mut session = rig.session(&everything(), 0);
    rig.put("a", "1");
    rig.put("b", "1");
    rig.compact(2);
    rig.reinstall();
    assert_eq!(show(&take(&mut session).await), ["compacted 2"], "revision 2 may lack its deletions");
    let mut session = rig.session(&everything(), 3);
    rig.put("a", "2");
    rig.reinstall();
    rig.put("a", "3");
    rig.reinstall();
    assert_eq!(show(&take(&mut session).await), ["3 b=1", "4 a=2", "5 a=3"]);
    rig.put("a", "4");
    rig.put("a", "5");
    rig.compact(7);
    rig.reinstall();
    let mut future = rig.session(&everything(), 9);
    assert_eq!(show(&take(&mut session).await), ["compacted 7"]);
    rig.put("a", "6");
    rig.put("a", "7");
    assert_eq!(show(&take(&mut future).await), ["9 a=7"]);
}

#[tokio::test(start_paused = true)]
async fn bounds_and_impossible_watchers_are_refused() {
    let rig = Rig::new(OPTIONS);
    let mut session = rig.hub.session(&Client::default(), Caller::Internal);
    assert_eq!(session.watch(1, &Shape::new("b", "b"), 0), Err(Refused::EmptyRange));
    for watcher in 0..100 {
        session.watch(watcher, &everything(), 0).unwrap();
    }
    assert_eq!(session.watch(7, &everything(), 0), Err(Refused::DuplicateId));
    assert_eq!(session.watch(100, &everything(), 0), Err(Refused::TooMany));
    assert!(session.cancel(7) && !session.cancel(7));
    session.watch(100, &everything(), 0).unwrap();
    let mut other = rig.hub.session(&Client::default(), Caller::Internal);
    for watcher in 0..50 {
        other.watch(watcher, &Shape::of_key("a"), 0).unwrap();
    }
    assert_eq!(other.watch(50, &everything(), 0), Err(Refused::TooMany));
    assert_eq!(rig.hub.watchers(), 150);
    drop(session);
    assert_eq!(rig.hub.watchers(), 50);
    other.watch(50, &everything(), 0).unwrap();
}

#[tokio::test(start_paused = true)]
async fn progress_is_told_only_of_what_was_taken() {
    let mut rig = Rig::new(OPTIONS);
    rig.put("a", "1");
    take(&mut rig.session(&everything(), 0)).await;
    let mut session = rig.session(&Shape::of_key("a"), 2);
    assert_eq!(session.progress(), None, "it has yet to catch up");
    take(&mut session).await;
    assert_eq!((session.progress(), session.progress_of(1)), (Some(2), Some(2)));
    rig.put("a", "2");
    rig.put("b", "2");
    session.delivered_after(3).await;
    assert_eq!((session.progress(), session.progress_of(1)), (None, None), "one event waits");
    take(&mut session).await;
    assert_eq!((session.progress(), session.progress_of(1), session.progress_of(2)), (Some(4), Some(4), None));
    session.watch(2, &Shape::of_key("b"), 6).unwrap();
    assert_eq!((session.progress(), session.progress_of(1)), (None, Some(4)), "one begins in the future");
    rig.put("c", "3");
    take(&mut session).await;
    assert_eq!(session.progress(), Some(5));
}

#[tokio::test(start_paused = true)]
async fn many_wait_for_one_deletion() {
    let mut rig = Rig::new(OPTIONS);
    let revision = rig.put("lock", "held");
    let wait = |from| {
        let hub = rig.hub.clone();
        rig.env.spawn(async move { hub.wait_deleted(Caller::Internal, "lock".into(), from).await })
    };
    let waiters: Vec<_> = (0..100).map(|_| wait(revision + 1)).collect();
    rig.put("lock", "held again");
    rig.put("other", "1");
    let gone = rig.delete("lock");
    let late = {
        let hub = rig.hub.clone();
        rig.env.spawn(async move { hub.wait_deleted(Caller::Internal, "lock".into(), revision + 1).await })
    };
    for waiter in waiters.into_iter().chain([late]) {
        assert_eq!(waiter.await.unwrap(), Ok(gone));
    }
    assert_eq!(rig.hub.watchers(), 0);
    rig.compact(gone);
    assert_eq!(rig.hub.wait_deleted(Caller::Internal, "lock".into(), revision).await, Err(Error::Compacted));
    let hub = rig.hub.clone();
    let waiter = rig.env.spawn(async move { hub.wait_deleted(Caller::Internal, "lock".into(), 99).await });
    tokio::task::yield_now().await;
    rig.hub.close();
    assert_eq!(waiter.await.unwrap(), Err(Error::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_watcher_leaves_nothing_behind() {
    let mut rig = Rig::new(OPTIONS);
    let mut session = rig.hub.session(&Client::default(), Caller::Internal);
    session.watch(1, &everything(), 0).unwrap();
    session.watch(2, &Shape::of_key("a"), 0).unwrap();
    let revision = rig.put("a", "1");
    session.delivered_after(revision - 1).await;
    session.cancel(1);
    session.watch(1, &Shape::of_key("b"), 0).unwrap();
    rig.put("b", "1");
    let seen = take(&mut session).await;
    assert!(matches!(&seen[..], [Output::Events { watcher: 2, .. }, Output::Events { watcher: 1, .. }]), "{seen:?}");
    assert_eq!(session.queued_bytes(), 0);
}

/// On real threads: apply, the hub and the sessions race.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn handing_over_leaves_no_gap_while_others_write() {
    const LAST: i64 = 6001;
    let mut rig = Rig::new(OPTIONS);
    rig.put("k", "1");
    let sessions: Vec<_> = (0..4)
        .map(|number| {
            let hub = rig.hub.clone();
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(number);
                let (mut rounds, mut revision) = (0, 2);
                while revision < LAST {
                    let mut session = hub.session(&Client::default(), Caller::Internal);
                    let mut next = random.i64((revision - 50).max(2)..=revision);
                    session.watch(1, &everything(), next).unwrap();
                    for _ in 0..random.usize(50..150) {
                        match session.next().await.unwrap() {
                            Output::CaughtUp => continue,
                            Output::Events { batch, .. } => assert_eq!(batch.revision, next, "seed {number}"),
                            lost => panic!("{lost:?}"),
                        }
                        revision = next;
                        next += 1;
                        if revision == LAST {
                            break;
                        }
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let writer = std::thread::spawn(move || {
        while rig.put("k", "1") < LAST {
            std::thread::yield_now();
        }
        rig
    });
    for session in sessions {
        assert!(session.await.unwrap() > 20, "there was more than one handing over");
    }
    writer.join().unwrap();
}

/// A user who may read `a`, and whose role may change.
async fn rig_with_user() -> (Rig, Caller) {
    let mut rig = Rig::new(OPTIONS);
    let change = |change| Request::Auth(AuthChange { change: Some(change) });
    let (root, user) = ("root".to_owned(), "u".to_owned());
    for name in [&root, &user] {
        let user = UserPassword { user: name.clone(), hash: Bytes::new(), no_password: true };
        rig.apply_internal(change(Change::UserAdd(user)));
        rig.apply_internal(change(Change::RoleAdd(AuthRoleAddRequest { name: name.clone() })));
        let grant = AuthUserGrantRoleRequest { user: name.clone(), role: name.clone() };
        rig.apply_internal(change(Change::UserGrantRole(grant)));
    }
    rig.apply_internal(permission(true));
    let token_key = Bytes::from_static(&[7; 32]);
    rig.apply_internal(change(Change::Enable(AuthEnable { token_key })));
    let since = rig.store.read(|s| s.kv.auth().since("u").unwrap());
    (rig, Caller::User(Arc::new(Named::user(user, since))))
}

/// To read `a`, given or taken.
fn permission(is_given: bool) -> Request {
    let (key, range_end) = (Bytes::from_static(b"a"), Bytes::new());
    let change = if is_given {
        let perm = Some(Permission { perm_type: 0, key, range_end });
        Change::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: "u".into(), perm })
    } else {
        Change::RoleRevokePermission(AuthRoleRevokePermissionRequest { role: "u".into(), key, range_end })
    };
    Request::Auth(AuthChange { change: Some(change) })
}

#[tokio::test(start_paused = true)]
async fn a_watcher_is_told_nothing_that_was_written_after_its_permission_was_taken() {
    // Synced, and catching up.
    for start in [0, 1] {
        let (mut rig, user) = rig_with_user().await;
        let mut session = rig.hub.session(&Client::default(), user.clone());
        let refused = session.watch(2, &Shape::of_key("b"), start);
        assert_eq!(refused, Err(Refused::Denied(Error::PermissionDenied)));
        assert_eq!(session.watch(2, &everything(), start), Err(Refused::Denied(Error::PermissionDenied)));
        rig.put_internal("a", "seen");
        session.watch(1, &Shape::of_key("a"), start).unwrap();
        rig.put_internal("a", "seen too");
        // A change that concerns it not.
        rig.apply_internal(Request::Auth(AuthChange {
            change: Some(Change::RoleAdd(AuthRoleAddRequest { name: "other".into() })),
        }));
        let mut seen = 0;
        while let Ok(Ok(output)) = timeout(Duration::from_millis(10), session.next()).await {
            seen += usize::from(matches!(output, Output::Events { .. }));
        }
        assert_eq!(seen, 1 + start as usize);
        rig.apply_internal(permission(false));
        rig.put_internal("a", "hidden");
        let told = timeout(Duration::from_millis(10), session.next()).await.unwrap().unwrap();
        assert_eq!(told, Output::Denied { watcher: 1, error: Error::PermissionDenied });
        assert_eq!(session.watchers(), 0);
        assert!(timeout(Duration::from_millis(10), session.next()).await.is_err(), "nothing more");
        // Nothing of its own time either, when it may read again.
        rig.apply_internal(permission(true));
        session.watch(1, &Shape::of_key("a"), 0).unwrap();
        rig.put_internal("a", "seen again");
        let told = timeout(Duration::from_millis(10), session.next()).await.unwrap().unwrap();
        assert!(matches!(told, Output::Events { watcher: 1, .. }), "{told:?}");
    }
}
