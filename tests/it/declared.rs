//! Users and roles that a file declares (`auth.bootstrap`): a cluster comes up with authentication on, and follows its file.

use std::path::PathBuf;
use std::process::Command;

use crate::support::cluster::{Cluster, binary, http_get, wait_for};

/// Root with a password, and a user `app` who may use what is below `app/`, or, if `reads_only`, read it.
fn file(app_password: &str, reads_only: bool) -> String {
    let access = if reads_only { "read" } else { "readwrite" };
    format!(
        r#"
        [[roles]]
        name = "app"
        permissions = [{{ access = "{access}", prefix = "app/" }}]
        [[users]]
        name = "root"
        password = "for root"
        roles = ["root"]
        [[users]]
        name = "app"
        password_file = "app.password"
        roles = ["app"]
        # {app_password}
        "#
    )
}

struct World {
    cluster: Cluster,
    dir: PathBuf,
}

impl World {
    /// Nobody runs yet.
    fn new(size: u64) -> Self {
        let mut cluster = Cluster::new(size);
        let dir = cluster.root().join("declared");
        std::fs::create_dir(&dir).unwrap();
        cluster.set("auth.bcrypt_cost", "4");
        let world = Self { cluster, dir };
        world.write("for app", false);
        world
    }

    fn write(&self, app_password: &str, reads_only: bool) {
        std::fs::write(self.dir.join("app.password"), app_password).unwrap();
        std::fs::write(self.dir.join("users.toml"), file(app_password, reads_only)).unwrap();
    }

    fn declare(&mut self) {
        let path = self.dir.join("users.toml");
        self.cluster.set("auth.bootstrap", path.to_str().unwrap());
    }

    /// What our client prints; an error is what it said.
    fn ask(&self, slot: u64, user: &str, line: &[&str]) -> Result<String, String> {
        let mut command = Command::new(binary());
        command.args(line).args(["--endpoints", &self.cluster.endpoint(slot), "--timeout", "10s"]);
        if !user.is_empty() {
            command.args(["--user", user]);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
        if output.status.success() { Ok(text) } else { Err(text) }
    }

    async fn wait_served(&self, slot: u64) {
        self.cluster.wait_http(slot, "/readyz", 200, &[]).await;
        wait_for("the clients' port to be open", async || self.ask(slot, ROOT, &["user", "list"]).map(drop)).await;
    }
}

const ROOT: &str = "root:for root";
const APP: &str = "app:for app";

#[track_caller]
fn refused(answer: Result<String, String>, why: &str) {
    let error = answer.expect_err("it is allowed");
    assert!(error.contains(why), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_up_with_its_users_and_is_open_to_nobody_before() {
    let mut world = World::new(3);
    world.declare();
    for slot in 0..3 {
        world.cluster.start_pod(slot);
    }
    // From the first moment that a port is open, whoever names nobody is refused.
    let first = wait_for("the first answer", async || match world.ask(0, "", &["put", "k", "v"]) {
        Err(error) if error.contains("user name is empty") => Ok(error),
        Ok(_) => panic!("the cluster is open to everybody"),
        Err(error) => Err(error),
    });
    first.await;
    for slot in 0..3 {
        world.wait_served(slot).await;
        world.ask(slot, APP, &["put", "app/k", "v"]).unwrap();
        refused(world.ask(slot, APP, &["put", "k", "v"]), "permission denied");
    }
    refused(world.ask(0, ROOT, &["auth", "disable"]), "users are declared");
    // Who was made by hand stays, what was changed by hand of whom the file names is as it says when it changes.
    world.ask(1, ROOT, &["user", "add", "guest", "--no-password"]).unwrap();
    world.ask(1, ROOT, &["user", "grant-role", "guest", "app"]).unwrap();
    world.write("for app", true);
    wait_for("the new file to be carried out", async || match world.ask(2, APP, &["put", "app/k", "v"]) {
        Err(error) if error.contains("permission denied") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert!(world.ask(2, APP, &["get", "app/k"]).unwrap().contains('v'));
    assert!(world.ask(2, ROOT, &["user", "get", "guest"]).unwrap().contains("app"));
    // A file that cannot be used changes nothing, and is told of; another password counts.
    std::fs::write(world.dir.join("users.toml"), "[[users").unwrap();
    wait_for("the status to tell of it", async || {
        let said = world.ask(0, ROOT, &["status"])?;
        if said.contains("[auth-file]") { Ok(()) } else { Err(said) }
    })
    .await;
    world.ask(0, APP, &["get", "app/k"]).unwrap();
    world.write("another", false);
    wait_for("the new password", async || world.ask(1, "app:another", &["put", "app/k", "w"]).map(drop)).await;
    refused(world.ask(1, APP, &["get", "app/k"]), "authentication failed");
    // And all of it outlives restarts.
    world.cluster.kill_all();
    (0..3).for_each(|slot| world.cluster.start_pod(slot));
    world.wait_served(1).await;
    assert!(world.ask(1, "app:another", &["get", "app/k"]).unwrap().contains('w'));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_cluster_gets_declared_users_by_a_rolling_restart() {
    let mut world = World::new(3);
    let leader = world.cluster.start_all().await;
    world.ask(leader, "", &["put", "app/k", "v"]).unwrap();
    world.declare();
    for slot in 0..3 {
        world.cluster.terminate(slot).await;
        world.cluster.start_pod(slot);
        // As a StatefulSet does, the next one waits until this one is ready; it serves nobody who names no user.
        world.cluster.wait_http(slot, "/readyz", 200, &[]).await;
        if slot < 2 {
            assert!(world.ask(2, "", &["put", "app/k", "w"]).is_ok(), "the last one serves as before");
            assert!(world.ask(slot, "", &["put", "app/k", "x"]).is_err());
        }
    }
    for slot in 0..3 {
        world.wait_served(slot).await;
        assert!(world.ask(slot, APP, &["get", "app/k"]).unwrap().contains('w'));
        refused(world.ask(slot, "", &["get", "app/k"]), "user name is empty");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_file_is_another_one_keeps_the_leader_from_carrying_it_out_and_says_so() {
    let mut world = World::new(2);
    world.declare();
    world.cluster.start_pod(0);
    // The other one has been given another file.
    let other = world.dir.join("other.toml");
    std::fs::write(&other, file("for app", true)).unwrap();
    world.cluster.set("auth.bootstrap", other.to_str().unwrap());
    world.cluster.start_pod(1);
    for slot in 0..2 {
        wait_for("the status to name the other", async || {
            let (_, text) = http_get(&world.cluster.status_endpoint(slot), "/").await.map_err(|e| e.to_string())?;
            if text.contains("declare others") && text.contains("auth-bootstrap") { Ok(()) } else { Err(text) }
        })
        .await;
        assert!(world.ask(slot, "", &["put", "k", "v"]).is_err());
    }
    std::fs::copy(world.dir.join("users.toml"), &other).unwrap();
    for slot in 0..2 {
        world.wait_served(slot).await;
    }
}

#[test]
fn a_file_that_cannot_be_used_is_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("users.toml");
    std::fs::write(&path, "[[users]]\nname = \"u\"\nno_password = true\n").unwrap();
    let output = Command::new(binary())
        .args(["serve", "--name", "kv-0", "--listen-client", "127.0.0.1:0", "--listen-peer", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .args(["--set", &format!("auth.bootstrap={}", path.display())])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("auth.bootstrap") && text.contains("no user root"), "{text}");
}
