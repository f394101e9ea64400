//! Users that the certificates of their connections name: our own client, etcd's, and the gateway, through every member.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::cluster::{Cluster, binary, wait_for};
use crate::support::pki::Pki;
use crate::support::tools::{self, CURL, ETCDCTL};

struct World {
    cluster: Cluster,
    pki: Pki,
}

/// How one asks: by whose certificate, if by any, and with which flags of our client beside.
#[derive(Clone, Copy)]
struct Asker<'a> {
    certificate: &'a str,
    flags: &'a [&'a str],
}

const fn by(certificate: &str) -> Asker<'_> {
    Asker { certificate, flags: &[] }
}

impl World {
    /// Three members that ask clients for certificates; users root and alice, who have no password, and bob, who has one; alice and bob may
    /// use what is below their names. Authentication is on.
    async fn new() -> Self {
        let mut cluster = Cluster::new(3);
        let pki = Pki::new(&cluster.root().join("clients"));
        let hosts: Vec<String> = (0..3).map(|slot| cluster.endpoint(slot).rsplit_once(':').unwrap().0.into()).collect();
        pki.server("server", &hosts.join(","));
        for name in ["root", "alice", "mallory"] {
            pki.client(name);
        }
        for (key, value) in [("mode", "files"), ("client_cert", "optional")] {
            cluster.set(&format!("client_tls.{key}"), value);
        }
        for (key, file) in [("cert_file", "server.crt"), ("key_file", "server.key"), ("ca_file", "ca.crt")] {
            cluster.set(&format!("client_tls.{key}"), &pki.path(file));
        }
        cluster.set("auth.bcrypt_cost", "4");
        for slot in 0..3 {
            cluster.start_pod(slot);
        }
        for slot in 0..3 {
            cluster.wait_http(slot, "/readyz", 200, &[]).await;
        }
        let world = Self { cluster, pki };
        let (nobody, root) = (by(""), by("root"));
        wait_for("the cluster to keep users", async || {
            world.ask(0, nobody, &["user", "add", "root", "--no-password"]).map(drop)
        })
        .await;
        for line in [
            "user grant-role root root",
            "user add alice --no-password",
            "user add bob --new-user-password pw",
            "role add alice",
            "role grant-permission alice readwrite alice/ --prefix",
            "role add bob",
            "role grant-permission bob readwrite bob/ --prefix",
            "user grant-role alice alice",
            "user grant-role bob bob",
            "auth enable",
        ] {
            let line: Vec<&str> = line.split(' ').collect();
            world.ask(0, nobody, &line).unwrap();
        }
        // Whoever has applied that asks for names from then on.
        for slot in 0..3 {
            wait_for("the member to know its users", async || world.ask(slot, root, &["user", "list"]).map(drop)).await;
        }
        world
    }

    fn endpoint(&self, slot: u64) -> String {
        format!("https://{}", self.cluster.endpoint(slot))
    }

    fn shown(&self, asker: Asker<'_>) -> Vec<String> {
        let own = if asker.certificate.is_empty() { Vec::new() } else { self.pki.showing(asker.certificate) };
        [self.pki.trusting(), own].concat()
    }

    /// What our client printed; an error is what it said.
    fn ask(&self, slot: u64, asker: Asker<'_>, line: &[&str]) -> Result<String, String> {
        let mut command = Command::new(binary());
        command.args(line).args(["--endpoints", &self.endpoint(slot)]).args(self.shown(asker)).args(asker.flags);
        answer(&mut command)
    }

    fn put(&self, slot: u64, asker: Asker<'_>, key: &str) -> Result<String, String> {
        self.ask(slot, asker, &["put", key, "v"])
    }
}

fn answer(command: &mut Command) -> Result<String, String> {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if status.success() { Ok(text(stdout)) } else { Err(text(stdout) + &text(stderr)) }
}

#[track_caller]
fn refused(answer: Result<String, String>, why: &str) {
    let error = answer.expect_err("it is allowed");
    assert!(error.contains(why), "{error}");
}

const DENIED: &str = "permission denied";

#[tokio::test(flavor = "multi_thread")]
async fn the_common_name_of_a_verified_certificate_is_the_user_where_no_token_is_shown() {
    let world = World::new().await;
    let as_bob = ["--user", "bob:pw"];
    for slot in 0..3 {
        world.put(slot, by("alice"), "alice/k").unwrap();
        refused(world.put(slot, by("alice"), "bob/k"), DENIED);
        refused(world.ask(slot, by("alice"), &["user", "list"]), DENIED);
        world.put(slot, by("root"), "anything").unwrap();
        // One of the CA whom no user is named after, and one without a certificate.
        refused(world.put(slot, by("mallory"), "alice/k"), DENIED);
        refused(world.put(slot, by(""), "alice/k"), "user name is empty");
        // A token is more than a certificate.
        let bob = Asker { certificate: "alice", flags: &as_bob };
        world.put(slot, bob, "bob/k").unwrap();
        refused(world.put(slot, bob, "alice/k"), DENIED);
        let stranger = Asker { certificate: "root", flags: &["--token", "none"] };
        refused(world.put(slot, stranger, "alice/k"), "invalid auth token");
    }
    // What is taken from the user is taken from the certificate.
    world.ask(1, by("root"), &["user", "revoke-role", "alice", "alice"]).unwrap();
    for slot in 0..3 {
        refused(world.put(slot, by("alice"), "alice/k"), DENIED);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcds_client_and_the_gateway_are_named_by_their_certificates_too() {
    let world = World::new().await;
    if let Some(program) = tools::require(&ETCDCTL) {
        let ask = |asker: &str, line: &[&str]| {
            let mut command = Command::new(&program);
            command.env("ETCDCTL_API", "3").args(["--endpoints", &world.endpoint(2)]).args(world.shown(by(asker)));
            answer(command.args(line))
        };
        ask("alice", &["put", "alice/k", "v"]).unwrap();
        refused(ask("alice", &["put", "bob/k", "v"]), DENIED);
        refused(ask("alice", &["user", "list"]), DENIED);
        assert!(ask("root", &["user", "get", "alice"]).unwrap().contains("alice"));
    }
    let Some(curl) = tools::require(&CURL) else { return };
    let post = |asker: &str, path: &str, body: &str| {
        let mut command = Command::new(&curl);
        command.args(["-sS", "--cacert", &world.pki.path("ca.crt"), "-H", "content-type: application/json"]);
        if !asker.is_empty() {
            command.args(world.pki.showing(asker));
        }
        let text = answer(command.args(["-d", body, &format!("{}/v3/{path}", world.endpoint(1))])).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()
    };
    // alice/k and bob/k, and a value.
    let (own, other) = (r#"{"key":"YWxpY2Uvaw==","value":"dg=="}"#, r#"{"key":"Ym9iL2s=","value":"dg=="}"#);
    assert!(post("alice", "kv/put", own)["header"].is_object());
    assert_eq!(post("alice", "kv/put", other)["code"], 7);
    assert_eq!(post("", "kv/put", own)["message"], "etcdserver: user name is empty");
    assert!(post("root", "kv/put", other)["header"].is_object());
}
