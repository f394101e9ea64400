//! etcd's own command line: members that units and manifests written for etcd start, and what etcdctl does with them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::cluster::{Cluster, PATIENCE, binary, wait_for};
use crate::support::tools::{self, CURL, ETCD, ETCDCTL, Tool};

/// Three members by the names that etcd's documentation uses, which hold no slot.
fn name(slot: u64) -> String {
    format!("infra{slot}.example")
}

fn list(cluster: &Cluster, slots: std::ops::Range<u64>) -> String {
    slots.map(|slot| format!("{}=http://{}", name(slot), cluster.peer_address(slot))).collect::<Vec<_>>().join(",")
}

/// As a package's unit starts it: the program is named etcd and has no arguments, all is in the environment file, and it says when it
/// is ready.
fn unit(cluster: &Cluster, slot: u64, notify: &Path) -> Command {
    let program = cluster.root().join("etcd");
    if !program.exists() {
        std::os::unix::fs::symlink(binary(), &program).unwrap();
    }
    let mut command = Command::new(program);
    let (client, peer) = (cluster.endpoint(slot), cluster.peer_address(slot));
    command
        .env("ETCD_NAME", name(slot))
        .env("ETCD_DATA_DIR", cluster.data_dir(slot))
        .env("ETCD_LISTEN_PEER_URLS", format!("http://{peer}"))
        .env("ETCD_LISTEN_CLIENT_URLS", format!("http://{client}"))
        .env("ETCD_INITIAL_ADVERTISE_PEER_URLS", format!("http://{peer}"))
        .env("ETCD_ADVERTISE_CLIENT_URLS", format!("http://{client}"))
        .env("ETCD_LISTEN_METRICS_URLS", format!("http://{}", cluster.status_endpoint(slot)))
        .env("ETCD_INITIAL_CLUSTER", list(cluster, 0..3))
        .env("ETCD_INITIAL_CLUSTER_STATE", "new")
        .env("ETCD_INITIAL_CLUSTER_TOKEN", "etcd-cluster-1")
        .env("ETCD_HEARTBEAT_INTERVAL", "100")
        .env("ETCD_ELECTION_TIMEOUT", "1000")
        .env("ETCD_QUOTA_BACKEND_BYTES", "8589934592")
        .env("NOTIFY_SOCKET", notify);
    command
}

/// As `kubeadm init` writes it into the static pod's manifest, without what is for TLS.
fn static_pod(cluster: &Cluster, slot: u64, slots: std::ops::Range<u64>) -> Command {
    let mut command = Command::new(binary());
    let (client, peer) = (cluster.endpoint(slot), cluster.peer_address(slot));
    command.arg("etcd").args([
        format!("--advertise-client-urls=http://{client}"),
        format!("--data-dir={}", cluster.data_dir(slot).display()),
        "--feature-gates=InitialCorruptCheck=true".into(),
        format!("--initial-advertise-peer-urls=http://{peer}"),
        format!("--initial-cluster={}", list(cluster, slots)),
        format!("--listen-client-urls=http://{},http://{client}", second(&client)),
        format!("--listen-metrics-urls=http://{}", cluster.status_endpoint(slot)),
        format!("--listen-peer-urls=http://{peer}"),
        format!("--name={}", name(slot)),
        "--snapshot-count=10000".into(),
        "--watch-progress-notify-interval=5s".into(),
    ]);
    command
}

/// Another address of the same pod.
fn second(client: &str) -> String {
    client.replace(":2379", ":12379")
}

/// All that it prints: 3.4 tells the health on its standard error.
#[track_caller]
fn etcdctl(program: &Path, endpoints: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(["--endpoints", endpoints, "--command-timeout", "30s", "--dial-timeout", "10s"]);
    let output = command.args(args).output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success(), "etcdctl {args:?}: {}\n{text}", output.status);
    text
}

async fn start_static_pods(cluster: &mut Cluster) {
    for slot in 0..3 {
        let command = static_pod(cluster, slot, 0..3);
        cluster.start_command(slot, command);
    }
    cluster.wait_formed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_start_from_a_units_environment_and_say_that_they_are_ready() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(3);
    let notify = cluster.root().join("notify");
    let told = UnixDatagram::bind(&notify).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    for slot in 0..3 {
        let command = unit(&cluster, slot, &notify);
        cluster.start_command(slot, command);
    }
    cluster.wait_formed().await;
    for slot in 0..3 {
        cluster.wait_logged(slot, &["ready to serve client requests"]).await;
        let mut text = [0; 64];
        let bytes = told.recv(&mut text).unwrap();
        assert_eq!(&text[..bytes], b"READY=1");
        assert_eq!(cluster.status(slot).await.unwrap().version, "3.7.3");
    }
    let run = |args: &[&str]| etcdctl(&program, &cluster.endpoints(), args);
    assert_eq!(run(&["put", "k", "v"]).trim(), "OK");
    let members = run(&["member", "list"]);
    for slot in 0..3 {
        let line = members.lines().find(|line| line.contains(&name(slot))).unwrap_or_else(|| panic!("{members}"));
        let (peer, client) = (cluster.peer_address(slot), cluster.endpoint(slot));
        assert!(line.contains("started") && line.contains(&peer) && line.contains(&client), "{line}");
    }
    let before = cluster.membership(0).await;
    cluster.kill_all();
    for slot in 0..3 {
        let command = unit(&cluster, slot, &notify);
        cluster.start_command(slot, command);
    }
    cluster.wait_formed().await;
    assert_eq!(cluster.membership(2).await, before, "the same members");
    assert_eq!(cluster.get(1, "k").await.as_deref(), Some("v"));
}

#[tokio::test(flavor = "multi_thread")]
async fn members_start_from_a_static_pods_arguments_and_serve_at_every_url() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(3);
    start_static_pods(&mut cluster).await;
    cluster.wait_logged(0, &["--feature-gates", "changes nothing"]).await;
    for (slot, path) in [(0, "/livez"), (1, "/readyz"), (2, "/health?serializable=true&exclude=NOSPACE")] {
        cluster.wait_http(slot, path, 200, &[]).await;
    }
    etcdctl(&program, &second(&cluster.endpoint(0)), &["put", "k", "v"]);
    for slot in 0..3 {
        for endpoint in [cluster.endpoint(slot), second(&cluster.endpoint(slot))] {
            let got = etcdctl(&program, &endpoint, &["get", "k"]);
            assert_eq!(got.lines().collect::<Vec<_>>(), ["k", "v"], "{endpoint}");
        }
    }
    for format in ["simple", "json", "table", "fields"] {
        for what in ["status", "health", "hashkv"] {
            let text = etcdctl(&program, &cluster.endpoints(), &["endpoint", what, "--cluster", "-w", format]);
            assert!((0..3).all(|slot| text.contains(&cluster.endpoint(slot))), "{what} as {format}: {text}");
        }
    }
    let backup = cluster.root().join("backup.db");
    etcdctl(&program, &cluster.endpoint(1), &["snapshot", "save", backup.to_str().unwrap()]);
    assert!(backup.metadata().unwrap().len() > 0);
    let leader = cluster.wait_formed().await;
    let next = (leader + 1) % 3;
    let id = format!("{:x}", cluster.member_id(next).await);
    etcdctl(&program, &cluster.endpoint(leader), &["move-leader", &id]);
    wait_for("the leader that was asked for", async || match cluster.leader(0..3).await {
        Some(found) if found == next => Ok(()),
        found => Err(format!("{found:?}")),
    })
    .await;
}

/// A person adds a fourth member, which votes beside the three, and removes another one: nothing of it happens by itself.
#[tokio::test(flavor = "multi_thread")]
async fn members_are_added_and_removed_by_hand_alone() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(3);
    start_static_pods(&mut cluster).await;
    let run = |cluster: &Cluster, args: &[&str]| etcdctl(&program, &cluster.endpoints(), args);
    // A member that has lost its disk is nobody any more, until a person says so.
    let victim = (cluster.wait_formed().await + 1) % 3;
    let others: Vec<u64> = (0..3).filter(|slot| *slot != victim).collect();
    let lost = cluster.member_id(victim).await;
    cluster.kill(victim);
    cluster.wipe(victim);
    let command = static_pod(&cluster, victim, 0..3);
    cluster.start_command(victim, command);
    cluster.wait_unready(victim, &["an id is given once", "member remove"]).await;
    let known = cluster.membership(others[0]).await;
    assert!(known.len() == 3 && known.contains(&(lost, true)), "{known:x?}");
    run(&cluster, &["member", "remove", &format!("{lost:x}")]);
    let url = format!("--peer-urls=http://{}", cluster.peer_address(victim));
    run(&cluster, &["member", "add", &name(victim), &url]);
    cluster.wait_voters(0..3).await;
    let mut fourth = static_pod(&cluster, 3, 0..4);
    fourth.arg("--initial-cluster-state=existing");
    cluster.start_command(3, fourth);
    cluster.wait_unready(3, &["added by hand"]).await;
    run(&cluster, &["member", "add", &name(3), &format!("--peer-urls=http://{}", cluster.peer_address(3))]);
    cluster.wait_voters_seen_by(&[0, 1, 2, 3], &[0, 1, 2, 65535]).await;
    // Other lists, as kubeadm leaves them behind, change nothing about who a member is.
    cluster.kill(others[1]);
    let mut restarted = static_pod(&cluster, others[1], others[1]..others[1] + 1);
    restarted.arg("--initial-cluster-state=existing").arg(format!("--initial-cluster={}", list(&cluster, 0..4)));
    cluster.start_command(others[1], restarted);
    cluster.wait_voters_seen_by(&[0, 1, 2, 3], &[0, 1, 2, 65535]).await;
    let leaves = cluster.member_id(3).await;
    run(&cluster, &["member", "remove", &format!("{leaves:x}")]);
    cluster.wait_voters(0..3).await;
    cluster.put(others[0], "k", "v").await;
}

/// What `etcdctl member add` prints: the id, and the environment with which the node is to be started.
fn printed(text: &str) -> (u64, Vec<(String, String)>) {
    let id = text.split_whitespace().nth(1).and_then(|id| u64::from_str_radix(id, 16).ok());
    let variables = text.lines().filter_map(|line| line.strip_prefix("ETCD_")?.split_once('='));
    let unquoted = |(name, value): (&str, &str)| (format!("ETCD_{name}"), value.trim_matches('"').to_owned());
    (id.unwrap_or_else(|| panic!("{text}")), variables.map(unquoted).collect())
}

/// A node with the environment that `etcdctl member add` has printed, and what else a person gives it.
fn added(cluster: &Cluster, place: u64, variables: &[(String, String)]) -> Command {
    let (client, peer) = (cluster.endpoint(place), cluster.peer_address(place));
    let mut command = Command::new(binary());
    command.arg("etcd").args([
        format!("--data-dir={}", cluster.data_dir(place).display()),
        format!("--listen-peer-urls=http://{peer}"),
        format!("--listen-client-urls=http://{client}"),
        format!("--advertise-client-urls=http://{client}"),
        format!("--listen-metrics-urls=http://{}", cluster.status_endpoint(place)),
    ]);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

/// Where a member listens for others, and where it only says so.
fn two_urls(cluster: &Cluster, place: u64) -> [String; 2] {
    let address = cluster.peer_address(place);
    [format!("http://{address}"), format!("http://{}", address.replace(":2380", ":12380"))]
}

async fn member(cluster: &Cluster, of: u64, id: u64) -> Option<quorate::pb::etcd::Member> {
    cluster.members(of).await.unwrap().into_iter().find(|member| member.id == id)
}

/// etcd's documented order: first `member add`, then the node, with what that has printed.
#[tokio::test(flavor = "multi_thread")]
async fn member_is_added_before_its_node_starts_and_its_id_goes_to_one_disk_only() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(3);
    start_static_pods(&mut cluster).await;
    let run = |cluster: &Cluster, args: &[&str]| etcdctl(&program, &cluster.endpoints(), args);
    let url = format!("--peer-urls=http://{}", cluster.peer_address(3));
    let (id, variables) = printed(&run(&cluster, &["member", "add", &name(3), &url]));
    assert!(variables.contains(&("ETCD_INITIAL_CLUSTER_STATE".into(), "existing".into())), "{variables:?}");
    assert!(variables.iter().any(|(_, value)| value.matches("=http://").count() == 4), "{variables:?}");
    let awaited = member(&cluster, 0, id).await.unwrap();
    assert_eq!((awaited.name.as_str(), awaited.client_ur_ls.len()), ("", 0), "etcd's word for it is unstarted");
    assert_eq!(awaited.peer_ur_ls, [format!("http://{}", cluster.peer_address(3))]);
    let mut again = Command::new(&program);
    let again = again.args(["--endpoints", &cluster.endpoints(), "member", "add", "x", &url]).output().unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("Peer URLs already exists"), "{again:?}");
    // It counts for no quorum: one of the three may still be lost.
    let leader = cluster.wait_voters(0..3).await;
    let victim = (leader + 1) % 3;
    cluster.kill(victim);
    cluster.put(leader, "k", "v").await;
    let command = added(&cluster, 3, &variables);
    cluster.start_command(3, command);
    let others: Vec<u64> = (0..4).filter(|place| *place != victim).collect();
    cluster.wait_voters_seen_by(&others, &[0, 1, 2, 65535]).await;
    let command = static_pod(&cluster, victim, 0..3);
    cluster.start_command(victim, command);
    cluster.wait_voters_seen_by(&[0, 1, 2, 3], &[0, 1, 2, 65535]).await;
    assert_eq!(cluster.member_id(3).await, id, "it is the member that was added");
    assert_eq!(member(&cluster, 0, id).await.unwrap().name, name(3));
    assert_eq!(cluster.get(3, "k").await.as_deref(), Some("v"));
    // Its disk is lost: what comes in its place is somebody else.
    cluster.kill(3);
    cluster.wipe(3);
    let command = added(&cluster, 3, &variables);
    cluster.start_command(3, command);
    cluster.wait_unready(3, &["an id is given once", &format!("`member remove {id:x}`")]).await;
    run(&cluster, &["member", "remove", &format!("{id:x}")]);
    run(&cluster, &["member", "add", &name(3), &url]);
    cluster.wait_voters_seen_by(&[0, 1, 2, 3], &[0, 1, 2, 65535]).await;
    assert_ne!(cluster.member_id(3).await, id);
}

/// Two learners are added to a single member before they run; one comes, whatever its process dies at, and votes when it is told to; the
/// other one never does.
#[tokio::test(flavor = "multi_thread")]
async fn learners_are_added_by_turns_and_one_that_never_comes_is_removed_again() {
    let Some(program) = tools::require(&ETCDCTL) else { return };
    let mut cluster = Cluster::new(1);
    let command = static_pod(&cluster, 0, 0..1);
    cluster.start_command(0, command);
    cluster.wait_formed().await;
    let run = |cluster: &Cluster, args: &[&str]| etcdctl(&program, &cluster.endpoint(0), args);
    let add = |cluster: &Cluster, place: u64| {
        let url = format!("--peer-urls={}", two_urls(cluster, place).join(","));
        printed(&run(cluster, &["member", "add", &name(place), &url, "--learner"]))
    };
    let (comes, variables) = add(&cluster, 1);
    let (never, _) = add(&cluster, 2);
    assert_eq!(member(&cluster, 0, never).await.unwrap().peer_ur_ls, two_urls(&cluster, 2));
    for point in ["join.before_adopt", "join.adopted", "join.cluster_set"] {
        let mut command = added(&cluster, 1, &variables);
        command.env(quorate::env::fail::VARIABLE, point);
        cluster.start_command(1, command);
        cluster.wait_exit(1).await;
    }
    let command = added(&cluster, 1, &variables);
    cluster.start_command(1, command);
    cluster.wait_http(1, "/readyz", 200, &[]).await;
    assert_eq!(cluster.member_id(1).await, comes);
    let found = member(&cluster, 1, comes).await.unwrap();
    assert!(found.is_learner && found.peer_ur_ls == two_urls(&cluster, 1), "{found:?}");
    let refused = cluster.client(&["member", "why"]).await;
    assert!(refused.contains(&cluster.peer_address(2)), "who is awaited is named: {refused}");
    wait_for("the learner to keep up", async || {
        let mut promote = Command::new(&program);
        let output = promote
            .args(["--endpoints", &cluster.endpoint(0), "member", "promote", &format!("{comes:x}")])
            .output()
            .unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    })
    .await;
    cluster.wait_voters_seen_by(&[0, 1], &[0, 65535]).await;
    run(&cluster, &["member", "remove", &format!("{never:x}")]);
    assert_eq!(member(&cluster, 0, never).await, None);
    cluster.put(1, "k", "v").await;
}

/// One directory a machine, as `etcdutl snapshot restore` makes them, for members by any names.
#[tokio::test(flavor = "multi_thread")]
async fn backup_is_restored_for_the_members_of_a_list() {
    let mut cluster = Cluster::new(3);
    let command = static_pod(&cluster, 0, 0..1);
    cluster.start_command(0, command);
    cluster.wait_http(0, "/readyz", 200, &[]).await;
    cluster.put(0, "k", "v").await;
    let backup = cluster.root().join("backup.db").display().to_string();
    let saved = cluster.command(&["snapshot", "save", &backup, "--endpoints", &cluster.endpoint(0)]).await;
    assert!(saved.contains("saved"), "{saved}");
    cluster.kill(0);
    cluster.wipe(0);
    let members = list(&cluster, 0..3);
    for slot in 0..3 {
        let (dir, name) = (cluster.data_dir(slot).display().to_string(), name(slot));
        let args = ["snapshot", "restore", &backup, "--data-dir", &dir, "--initial-cluster", &members, "--name", &name];
        let made = cluster.command(&[&args[..], &["--initial-cluster-token", "monday"]].concat()).await;
        assert!(made.contains("a new cluster"), "{made}");
        let command = static_pod(&cluster, slot, 0..3);
        cluster.start_command(slot, command);
    }
    cluster.wait_formed().await;
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some("v"));
    // They are members that only a person removes.
    let view = cluster.client(&["member", "why", "--output", "json"]).await;
    assert_eq!(view.matches("\"manual\"").count(), 3, "{view}");
}

fn tree(root: &Path) -> BTreeSet<PathBuf> {
    let mut open = vec![root.to_owned()];
    let mut seen = BTreeSet::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        seen.insert(path);
    }
    seen
}

#[test]
fn a_data_directory_of_etcds_is_refused_and_left_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    for part in ["wal", "snap"] {
        let data = root.path().join(part);
        std::fs::create_dir_all(data.join("member").join(part)).unwrap();
        std::fs::write(data.join("member").join(part).join("db"), "precious").unwrap();
        let before = tree(&data);
        for command in ["etcd", "serve"] {
            let output =
                Command::new(binary()).args([command, "--name", "kv-0", "--data-dir"]).arg(&data).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{command}: {text}");
            assert!(text.contains("is the data directory of an etcd") && text.contains("quorate migrate"), "{text}");
            assert_eq!(tree(&data), before);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_come_by_a_socket_in_the_file_system() {
    let Some(curl) = tools::require(&CURL) else { return };
    let mut cluster = Cluster::new(1);
    let (client, peer, socket) = (cluster.endpoint(0), cluster.peer_address(0), cluster.root().join("client.sock"));
    let start = |cluster: &mut Cluster| {
        let mut command = Command::new(binary());
        command.args(["etcd", "--name", "a", "--data-dir"]).arg(cluster.data_dir(0)).args([
            format!("--listen-client-urls=unix://{},http://{client}", socket.display()),
            format!("--advertise-client-urls=unix://{}", socket.display()),
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
            format!("--listen-metrics-urls=http://{}", cluster.status_endpoint(0)),
        ]);
        cluster.start_command(0, command);
    };
    start(&mut cluster);
    cluster.wait_formed().await;
    let ask = || {
        let url = "http://localhost/version";
        tools::run(Command::new(&curl).args(["-s", "--unix-socket"]).arg(&socket).arg(url))
    };
    assert!(ask().contains("3.7.3"));
    // What a process has left behind is in nobody's way.
    cluster.kill(0);
    assert!(socket.exists());
    start(&mut cluster);
    cluster.wait_formed().await;
    assert!(ask().contains("3.7.3"));
    if let Some(etcdctl) = tools::require(&ETCDCTL) {
        let endpoint = format!("unix://{}", socket.display());
        let mut command = Command::new(etcdctl);
        assert!(tools::run(command.args(["--endpoints", &endpoint, "put", "k", "v"])).contains("OK"));
    }
    cluster.terminate(0).await;
    assert!(!socket.exists(), "it goes with the process");
}

/// Names and defaults in a help text; a flag that is shown without a default has none here.
fn flags_of(help: &str) -> BTreeMap<String, Option<String>> {
    let lines = help.lines().filter_map(|line| line.strip_prefix("  --"));
    let flag = |line: &str| match line.split_once(' ') {
        Some((name, default)) => (name.to_owned(), Some(default.trim_matches('\'').to_owned())),
        None => (line.to_owned(), None),
    };
    lines.map(flag).collect()
}

/// What etcd 3.7.3's help lists is known here, with the same defaults; where that etcd is at hand, it is asked itself.
#[test]
fn every_flag_of_etcds_help_is_known_with_its_default() {
    let own = flags_of(&tools::run(Command::new(binary()).args(["etcd", "--help"])));
    let mut lists = vec![("the list of 3.7.3".to_owned(), include_str!("etcd_flags.txt").to_owned())];
    if let Some(etcd) = tools::require(&Tool { name: ETCD.name, install: ETCD.install }) {
        let version = tools::run(Command::new(&etcd).arg("--version"));
        if version.contains("etcd Version: 3.7.") {
            let help = Command::new(&etcd).arg("--help").output().unwrap();
            let text = [help.stdout, help.stderr].concat();
            lists.push((version, String::from_utf8(text).unwrap()));
        }
    }
    for (origin, text) in lists {
        let flags = flags_of(&text);
        assert!(flags.len() > 100, "{origin}: {} flags", flags.len());
        for (name, default) in flags {
            let known = own.get(&name).unwrap_or_else(|| panic!("{origin}: --{name} is not known"));
            assert!(default.is_none() || *known == default, "{origin}: --{name} {default:?}, here {known:?}");
        }
    }
}

#[test]
fn version_and_refusals_are_told_at_once() {
    let etcd = |args: &[&str]| {
        let output = Command::new(binary()).arg("etcd").args(args).env_remove("ETCD_NAME").output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.code(), text)
    };
    let (code, text) = etcd(&["--version"]);
    assert!(code == Some(0) && text.starts_with("etcd Version: 3.7.3\n"), "{text}");
    for (args, why) in [
        (&["--no-such-flag"][..], "--no-such-flag is no flag of etcd 3.7"),
        (&["--auto-tls"], "quorate cert"),
        (&["--listen-client-urls", "https://127.0.0.1:1"], "client_tls.cert_file: got nothing"),
        (&["--config-file", "/nowhere/etcd.yaml"], "cannot read /nowhere/etcd.yaml"),
        (&["grpc-proxy", "start"], "is not here"),
    ] {
        let (code, text) = etcd(args);
        assert!(code == Some(1) && text.contains(why) && text.lines().count() == 1, "{args:?}: {text}");
    }
}
