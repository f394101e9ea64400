//! TLS on the clients' port and between members: real processes, our own client and etcd's.

use std::path::Path;
use std::process::{Command, Output};

use hyper_util::rt::TokioIo;
use quorate::pb::checked::CheckedCodec;
use quorate::secure::{Dialer, roots_of};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::support::cluster::{Cluster, PATIENCE, binary, http_get, wait_for};
use crate::support::pki::{ListingCa, Pki};
use crate::support::tools::{self, CURL, ETCDCTL, Tool};

const ETCDCTL_37: Tool =
    Tool { name: "etcdctl-3.7", install: "`go build -o DIR/etcdctl-3.7 go.etcd.io/etcd/etcdctl/v3`" };

/// The host of an address.
fn host(address: &str) -> &str {
    address.rsplit_once(':').unwrap().0
}

fn hosts(cluster: &Cluster, slots: std::ops::Range<u64>) -> String {
    slots.map(|slot| host(&cluster.endpoint(slot)).to_owned()).collect::<Vec<_>>().join(",")
}

/// The clients' port with a certificate of `pki`.
fn serve_clients(cluster: &mut Cluster, pki: &Pki, name: &str) {
    for (key, file) in [("cert_file", "crt"), ("key_file", "key")] {
        cluster.set(&format!("client_tls.{key}"), &pki.path(&format!("{name}.{file}")));
    }
    cluster.set("client_tls.mode", "files");
}

fn serve_peers(cluster: &mut Cluster, pki: &Pki, name: &str) {
    for (key, file) in
        [("cert_file", format!("{name}.crt")), ("key_file", format!("{name}.key")), ("ca_file", "ca.crt".into())]
    {
        cluster.set(&format!("peer_tls.{key}"), &pki.path(&file));
    }
    cluster.set("peer_tls.mode", "files");
}

/// Waits until `slot` leads or follows and serves, as it says itself; the clients' port may ask for more than a test has.
async fn wait_serving(cluster: &Cluster, slot: u64) {
    cluster.wait_http(slot, "/readyz", 200, &[]).await;
}

fn quorate(args: &[&str], flags: &[String]) -> Output {
    let mut command = Command::new(binary());
    // The test's own environment must not decide.
    for name in ["QUORATE_CACERT", "QUORATE_CERT", "QUORATE_KEY", "QUORATE_ENDPOINTS"] {
        command.env_remove(name);
    }
    command.args(args).args(flags).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[track_caller]
fn succeeds(args: &[&str], flags: &[String]) -> String {
    let output = quorate(args, flags);
    assert!(output.status.success(), "quorate {args:?} {flags:?}: {}", text(&output));
    text(&output)
}

#[track_caller]
fn fails(args: &[&str], flags: &[String], why: &str) {
    let output = quorate(args, flags);
    assert!(!output.status.success() && text(&output).contains(why), "quorate {args:?} {flags:?}: {}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_served_over_tls_and_what_is_plain_is_not() {
    let mut cluster = Cluster::new(1);
    let pki = Pki::new(&cluster.root().join("clients"));
    pki.server("server", &hosts(&cluster, 0..1));
    serve_clients(&mut cluster, &pki, "server");
    cluster.start_pod(0);
    wait_serving(&cluster, 0).await;
    let (plain, secure) = (cluster.endpoint(0), format!("https://{}", cluster.endpoint(0)));
    let trusting = pki.trusting();
    succeeds(&["put", "k", "v", "--endpoints", &secure], &trusting);
    assert!(succeeds(&["get", "k", "--endpoints", &plain], &trusting).contains('v'), "the CA says that TLS is meant");
    assert!(succeeds(&["status", "--endpoints", &secure], &trusting).contains("leader"));
    succeeds(&["snapshot", "save", &pki.path("backup.db"), "--endpoints", &secure], &trusting);
    fails(&["get", "k", "--endpoints", &secure], &[], "--cacert");
    fails(&["get", "k", "--endpoints", &plain, "--timeout", "5s"], &[], "");
    // The member tells its clients where it is.
    assert!(succeeds(&["member", "list", "--endpoints", &secure], &trusting).contains(&secure));
    for tool in [&ETCDCTL, &ETCDCTL_37] {
        let Some(program) = tools::require(tool) else { continue };
        let mut command = Command::new(program);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &secure]).args(&trusting);
        assert!(tools::run(command.args(["get", "k"])).contains('v'));
    }
    if let Some(curl) = tools::require(&CURL) {
        let mut command = Command::new(curl);
        command.args(["-sS", "--cacert", &pki.path("ca.crt"), "-H", "content-type: application/json"]);
        let answer = tools::run(command.args(["-d", r#"{"key":"aw=="}"#, &format!("{secure}/v3/kv/range")]));
        assert!(answer.contains("dg=="), "{answer}");
    }
    // What a probe asks is answered without TLS.
    assert_eq!(http_get(&cluster.status_endpoint(0), "/livez").await.unwrap().0, 200);
    let metrics = http_get(&cluster.status_endpoint(0), "/metrics").await.unwrap().1;
    assert!(
        metrics.contains(r#"quorate_tls_end_timestamp_seconds{port="client_tls",what="certificate"}"#),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_must_show_a_certificate_of_the_ca_with_an_allowed_name_that_was_not_taken_back() {
    let mut cluster = Cluster::new(1);
    let (servers, other) = (Pki::new(&cluster.root().join("servers")), Pki::new(&cluster.root().join("other")));
    servers.server("server", &hosts(&cluster, 0..1));
    other.client("alice");
    let dir = cluster.root().join("clients");
    let ca = ListingCa::new(&dir, &["alice", "bob", "mallory"]);
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    serve_clients(&mut cluster, &servers, "server");
    cluster.set("client_tls.client_cert", "required").set("client_tls.ca_file", &file("ca.crt"));
    cluster.set("client_tls.crl_file", &file("ca.crl")).set("client_tls.allowed_names", "alice,bob");
    cluster.start_pod(0);
    wait_serving(&cluster, 0).await;
    let endpoint = format!("https://{}", cluster.endpoint(0));
    let put = ["put", "k", "v", "--endpoints", &endpoint, "--timeout", "20s"];
    let showing = |name: &str| {
        let own = ["--cert".into(), file(&format!("{name}.crt")), "--key".into(), file(&format!("{name}.key"))];
        [servers.trusting(), own.to_vec()].concat()
    };
    succeeds(&put, &showing("alice"));
    succeeds(&put, &showing("bob"));
    fails(&put, &servers.trusting(), "");
    fails(&put, &[servers.trusting(), other.showing("alice")].concat(), "");
    fails(&put, &showing("mallory"), "");
    // Taken back while the member runs; a signal asks for a look at once.
    ca.take_back(&[2]);
    cluster.signal(0, Signal::HUP);
    wait_for("bob to be refused", async || {
        if quorate(&put, &showing("bob")).status.success() { Err("he is let in") } else { Ok(()) }
    })
    .await;
    succeeds(&put, &showing("alice"));
    let metrics = http_get(&cluster.status_endpoint(0), "/metrics").await.unwrap().1;
    assert!(!metrics.contains(r#"quorate_tls_handshake_failures_total{port="client_tls"} 0"#), "{metrics}");
}

/// Puts the files of a directory in force as Kubernetes does: a link to a link that is replaced.
fn swap(mount: &Path, to: &str) {
    let new = mount.join("..data_tmp");
    std::os::unix::fs::symlink(to, &new).unwrap();
    std::fs::rename(new, mount.join("..data")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn new_files_are_taken_while_a_member_serves_and_broken_ones_are_not() {
    let mut cluster = Cluster::new(1);
    let mount = cluster.root().join("mount");
    let (old, new) = (Pki::new(&mount.join("old")), Pki::new(&mount.join("new")));
    for pki in [&old, &new] {
        pki.server("tls", &hosts(&cluster, 0..1));
    }
    std::fs::create_dir(mount.join("broken")).unwrap();
    std::fs::copy(new.path("tls.crt"), mount.join("broken/tls.crt")).unwrap();
    std::fs::copy(old.path("tls.key"), mount.join("broken/tls.key")).unwrap();
    swap(&mount, "old");
    for (key, name) in [("cert_file", "tls.crt"), ("key_file", "tls.key")] {
        std::os::unix::fs::symlink(Path::new("..data").join(name), mount.join(name)).unwrap();
        cluster.set(&format!("client_tls.{key}"), mount.join(name).to_str().unwrap());
    }
    cluster.set("client_tls.mode", "files");
    cluster.start_pod(0);
    wait_serving(&cluster, 0).await;
    let endpoint = format!("https://{}", cluster.endpoint(0));
    let put = ["put", "k", "v", "--endpoints", &endpoint];
    succeeds(&put, &old.trusting());
    swap(&mount, "broken");
    cluster.wait_http(0, "/metrics", 200, &["quorate_tls_reload_failing{port=\"client_tls\"} 1"]).await;
    wait_for("the status to say so", async || {
        let said = succeeds(&["status", "--endpoints", &endpoint], &old.trusting());
        if said.contains("do not fit together") { Ok(()) } else { Err(said) }
    })
    .await;
    succeeds(&put, &old.trusting());
    swap(&mount, "new");
    wait_for("the new certificate", async || {
        let output = quorate(&put, &new.trusting());
        if output.status.success() { Ok(()) } else { Err(text(&output)) }
    })
    .await;
    fails(&put, &old.trusting(), "--cacert");
    cluster.wait_http(0, "/metrics", 200, &["quorate_tls_reload_failing{port=\"client_tls\"} 0"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_never_ends_is_closed_and_holds_nobody_up() {
    let mut cluster = Cluster::new(1);
    let pki = Pki::new(&cluster.root().join("clients"));
    pki.server("server", &hosts(&cluster, 0..1));
    serve_clients(&mut cluster, &pki, "server");
    cluster.set("limits.receive_timeout", "2s");
    cluster.start_pod(0);
    wait_serving(&cluster, 0).await;
    let mut silent = Vec::new();
    for number in 0..20 {
        let mut stream = TcpStream::connect(cluster.endpoint(0)).await.unwrap();
        // The head of a record that does not come.
        if number % 2 == 0 {
            stream.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
        }
        silent.push(stream);
    }
    let endpoint = format!("https://{}", cluster.endpoint(0));
    succeeds(&["put", "k", "v", "--endpoints", &endpoint], &pki.trusting());
    for mut stream in silent {
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "it is open for ever");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_form_a_cluster_over_tls_and_one_without_a_certificate_for_its_address_stays_out() {
    let mut cluster = Cluster::new(3);
    let pki = Pki::new(&cluster.root().join("peers"));
    pki.peer("member", &hosts(&cluster, 0..3)).peer("elsewhere", "127.255.255.1");
    serve_peers(&mut cluster, &pki, "member");
    cluster.start_all().await;
    cluster.put(1, "k", "v").await;
    for slot in 0..3 {
        assert_eq!(cluster.get(slot, "k").await.as_deref(), Some("v"));
        assert!(cluster.members(slot).await.unwrap().iter().all(|m| m.peer_ur_ls[0].starts_with("https://")));
    }
    // Of the right CA, and for another address: it is heard by nobody.
    let leader = cluster.leader(0..3).await.unwrap();
    let other = (leader + 1) % 3;
    cluster.kill(other);
    serve_peers(&mut cluster, &pki, "elsewhere");
    cluster.start_pod(other);
    cluster.wait_logged(other, &["listening"]).await;
    cluster.put(leader, "k", "w").await;
    cluster.wait_logged(leader, &["its certificate is not for its address"]).await;
    cluster.kill(other);
    serve_peers(&mut cluster, &pki, "member");
    cluster.start_pod(other);
    cluster.wait_formed().await;
    assert_eq!(cluster.get(other, "k").await.as_deref(), Some("w"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_all_addresses_that_names_a_slot_is_taken_of_no_other_member() {
    let mut cluster = Cluster::new(3);
    let pki = Pki::new(&cluster.root().join("peers"));
    for slot in 0..3 {
        pki.slot(&format!("member{slot}"), &hosts(&cluster, 0..3), slot);
        serve_peers(&mut cluster, &pki, &format!("member{slot}"));
        cluster.start_pod(slot);
    }
    cluster.wait_formed().await;
    let leader = cluster.leader(0..3).await.unwrap();
    let other = (leader + 1) % 3;
    cluster.kill(other);
    serve_peers(&mut cluster, &pki, &format!("member{leader}"));
    cluster.start_pod(other);
    cluster.wait_logged(leader, &["its certificate is for another slot"]).await;
    cluster.put(leader, "k", "w").await;
    cluster.kill(other);
    serve_peers(&mut cluster, &pki, &format!("member{other}"));
    cluster.start_pod(other);
    cluster.wait_formed().await;
    assert_eq!(cluster.get(other, "k").await.as_deref(), Some("w"));
}

/// Every method of the members' service, as the descriptors have it.
fn peer_methods() -> Vec<String> {
    let pool = prost_reflect::DescriptorPool::decode(quorate::pb::ALL_DESCRIPTORS).unwrap();
    let service = pool.get_service_by_name("quorate.peer.v1.Peer").unwrap();
    let methods: Vec<String> =
        service.methods().map(|method| format!("/{}/{}", service.full_name(), method.name())).collect();
    assert!(methods.len() > 10, "{methods:?}");
    methods
}

/// A way to the peer port: what is trusted, and what is shown; plain without.
async fn peer_channel(address: &str, tls: Option<(&Pki, Option<(&Pki, &str)>)>) -> Result<Channel, String> {
    let text = |error: tonic::transport::Error| format!("{error:?}");
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap().timeout(PATIENCE);
    let Some((trusted, own)) = tls else { return endpoint.connect().await.map_err(text) };
    let read = |pki: &Pki, file: &str| std::fs::read(pki.path(file)).unwrap();
    let own = own.map(|(pki, name)| (read(pki, &format!("{name}.crt")), read(pki, &format!("{name}.key"))));
    let roots = roots_of("the CA", &read(trusted, "ca.crt")).unwrap();
    let dialer = Dialer::for_client(roots, own.as_ref().map(|(cert, key)| (&cert[..], &key[..]))).unwrap();
    let address = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (dialer, address) = (dialer.clone(), address.clone());
        async move {
            let stream = TcpStream::connect(&address).await?;
            dialer.dial(host(&address), Box::new(stream)).await.map(TokioIo::new)
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(text)
}

/// Whether the member's service has answered, in whatever way; else why it was not reached.
async fn is_answered(channel: &Channel, method: &str) -> Result<(), String> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| format!("{error:?}"))?;
    let codec = CheckedCodec::<(), ()>::default();
    let answer = grpc.server_streaming(tonic::Request::new(()), method.parse().unwrap(), codec).await;
    match answer {
        Err(status) if std::error::Error::source(&status).is_some() => Err(format!("{status:?}")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_members_certificate_no_call_reaches_the_peer_port() {
    let mut cluster = Cluster::new(1);
    let (members, clients) = (Pki::new(&cluster.root().join("members")), Pki::new(&cluster.root().join("clients")));
    members.peer("member", &hosts(&cluster, 0..1)).server("half", &hosts(&cluster, 0..1));
    // Of another CA; and of the right one, but not for whoever dials.
    clients.client("alice").peer("member", &hosts(&cluster, 0..1));
    serve_peers(&mut cluster, &members, "member");
    cluster.start_all().await;
    let address = cluster.peer_address(0);
    for method in peer_methods() {
        for (what, tls) in [
            ("plain text", None),
            ("no certificate", Some((&members, None))),
            ("a client's", Some((&members, Some((&clients, "alice"))))),
            ("a member's of another CA", Some((&members, Some((&clients, "member"))))),
            ("one that is for servers only", Some((&members, Some((&members, "half"))))),
        ] {
            let reached = match peer_channel(&address, tls).await {
                Ok(channel) => is_answered(&channel, &method).await,
                Err(error) => Err(error),
            };
            assert!(reached.is_err(), "{method} with {what} is answered");
        }
        let channel = peer_channel(&address, Some((&members, Some((&members, "member"))))).await.unwrap();
        assert_eq!(is_answered(&channel, &method).await, Ok(()), "a member's call arrives");
    }
    cluster.put(0, "k", "v").await;
}

/// Restarts one member after the other with other settings, while keys are put.
async fn roll(cluster: &mut Cluster, change: impl Fn(&mut Cluster)) {
    change(cluster);
    for slot in 0..3 {
        cluster.terminate(slot).await;
        cluster.put((slot + 1) % 3, "while", &slot.to_string()).await;
        cluster.start_pod(slot);
        cluster.wait_formed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_come_to_tls_and_back_by_rolling_restarts() {
    let mut cluster = Cluster::new(3);
    let pki = Pki::new(&cluster.root().join("peers"));
    pki.peer("member", &hosts(&cluster, 0..3));
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    roll(&mut cluster, |cluster| {
        serve_peers(cluster, &pki, "member");
        cluster.set("peer_tls.plain", "until-all");
    })
    .await;
    for slot in 0..3 {
        cluster.wait_logged(slot, &["all members have TLS: nothing else is heard any more"]).await;
        let plain = peer_channel(&cluster.peer_address(slot), None).await;
        let reached = match &plain {
            Ok(channel) => is_answered(channel, "/quorate.peer.v1.Peer/Who").await,
            Err(error) => Err(error.clone()),
        };
        assert!(reached.is_err(), "kv-{slot} hears plain text");
    }
    // One that has no TLS stays out, and says nothing to anybody.
    cluster.put(1, "k", "w").await;
    roll(&mut cluster, |cluster| {
        cluster.set("peer_tls.plain", "accept");
    })
    .await;
    assert!(cluster.client(&["status"]).await.contains("[tls-plain]"));
    roll(&mut cluster, |cluster| {
        for key in ["cert_file", "key_file", "ca_file"] {
            cluster.set(&format!("peer_tls.{key}"), "");
        }
        cluster.set("peer_tls.mode", "off").set("peer_tls.plain", "refuse");
    })
    .await;
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some("w"));
    assert_eq!(cluster.get(2, "while").await.as_deref(), Some("2"));
}

/// Members that make their certificates themselves, and whose life ends while they serve.
#[tokio::test(flavor = "multi_thread")]
async fn members_make_their_certificates_and_renew_them_while_they_serve() {
    let mut cluster = Cluster::new(3);
    let (peers, clients) = (Pki::new(&cluster.root().join("peers")), Pki::new(&cluster.root().join("clients")));
    for (section, pki) in [("peer_tls", &peers), ("client_tls", &clients)] {
        cluster.set(&format!("{section}.mode"), "auto").set(&format!("{section}.lifetime"), "10s");
        cluster.set(&format!("{section}.issuer_cert_file"), &pki.path("ca.crt"));
        cluster.set(&format!("{section}.issuer_key_file"), &pki.path("ca.key"));
    }
    for slot in 0..3 {
        cluster.start_pod(slot);
    }
    for slot in 0..3 {
        wait_serving(&cluster, slot).await;
    }
    let endpoint = |slot: u64| format!("https://{}", cluster.endpoint(slot));
    succeeds(&["put", "k", "v", "--endpoints", &endpoint(0)], &clients.trusting());
    for slot in 0..3 {
        let renewed = r#"quorate_tls_reloads_total{port="peer_tls"} "#;
        cluster.wait_http(slot, "/metrics", 200, &[renewed]).await;
        wait_for("a new certificate", async || {
            let metrics = http_get(&cluster.status_endpoint(slot), "/metrics").await.map_err(|e| e.to_string())?.1;
            let count = |port: &str| metrics.contains(&format!("quorate_tls_reloads_total{{port=\"{port}\"}} 0"));
            if count("peer_tls") || count("client_tls") { Err("none yet".to_owned()) } else { Ok(()) }
        })
        .await;
        succeeds(&["put", "k", &slot.to_string(), "--endpoints", &endpoint(slot)], &clients.trusting());
    }
    // A member that starts now is let in by those whose certificates are others than at the start.
    cluster.kill(2);
    cluster.start_pod(2);
    wait_serving(&cluster, 2).await;
    let read = succeeds(
        &["get", "k", "--print-value-only", "--endpoints", &format!("https://{}", cluster.endpoint(2))],
        &clients.trusting(),
    );
    assert_eq!(read.trim(), "2");
}

/// As the chart has them: a reader makes its certificate with the members' CA, for its pod's address, and asks for members under the one name of
/// them all. From then on it takes their log, and members take its answers, over TLS alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_makes_its_certificate_joins_over_tls() {
    let mut cluster = Cluster::new(3);
    let peers = Pki::new(&cluster.root().join("peers"));
    let settings = [
        ("peer_tls.mode", "auto".to_owned()),
        ("peer_tls.issuer_cert_file", peers.path("ca.crt")),
        ("peer_tls.issuer_key_file", peers.path("ca.key")),
        ("peer_tls.names", "members.test".to_owned()),
        ("peer_tls.plain", "until-all".to_owned()),
        ("cluster.readers", "true".to_owned()),
    ];
    for (key, value) in &settings {
        cluster.set(key, value);
    }
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    let lines = (0..3).map(|slot| format!("{} members.test\n", host(&cluster.peer_address(slot)))).collect::<String>();
    let hosts = cluster.root().join("hosts");
    std::fs::write(&hosts, lines).unwrap();
    let mut reader = Command::new(binary());
    reader.args(["serve", "--name", "reader-x", "--reader", "--join", "members.test:2380", "--data-dir"]);
    reader.arg(cluster.data_dir(20)).args(["--listen-peer", &cluster.peer_address(20)]);
    reader.args(["--listen-client", &cluster.endpoint(20)]);
    reader.env("POD_IP", host(&cluster.peer_address(20))).env("QUORATE_TEST_HOSTS", &hosts);
    for (key, value) in &settings {
        reader.args(["--set", &format!("{key}={value}")]);
    }
    cluster.start_command(20, reader);
    wait_serving(&cluster, 20).await;
    assert_eq!(cluster.get(20, "k").await.as_deref(), Some("v"));
    let members = cluster.members(0).await.unwrap();
    assert_eq!(members.len(), 4, "{members:?}");
}
