//! The audit log of a real server: what is in it, and what is not.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::cluster::{Cluster, binary, http_request, wait_for};

struct World {
    cluster: Cluster,
    file: PathBuf,
}

impl World {
    async fn new(reads: bool) -> Self {
        let mut cluster = Cluster::new(1);
        let file = cluster.root().join("audit.jsonl");
        cluster.set("auth.bcrypt_cost", "4").set("audit.mode", "file").set("audit.file", file.to_str().unwrap());
        cluster.set("audit.reads", if reads { "true" } else { "false" });
        cluster.start_all().await;
        Self { cluster, file }
    }

    fn ask(&self, flags: &[&str], line: &str) -> bool {
        let mut command = Command::new(binary());
        command.args(line.split(' ')).args(["--endpoints", &self.cluster.endpoint(0)]).args(flags);
        command.output().unwrap().status.success()
    }

    /// The lines so far that satisfy `is`, once there are `count` of them.
    async fn lines(&self, count: usize, is: impl Fn(&Value) -> bool) -> Vec<Value> {
        wait_for("the lines", async || {
            let text = std::fs::read_to_string(&self.file).unwrap();
            let all = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let lines: Vec<Value> = all.filter(&is).collect();
            if lines.len() >= count { Ok(lines) } else { Err(text) }
        })
        .await
    }
}

fn is_of(method: &'static str) -> impl Fn(&Value) -> bool {
    move |line| line["method"] == method
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_written_down_with_who_asked_and_what_came_of_it_and_no_secret_is() {
    let world = World::new(false).await;
    for line in [
        "user add root --new-user-password for-root",
        "user grant-role root root",
        "role add app",
        "role grant-permission app readwrite app/ --prefix",
        "user add app --new-user-password for-app",
        "user grant-role app app",
        "auth enable",
    ] {
        assert!(world.ask(&[], line), "{line}");
    }
    let (root, app) = (["--user", "root:for-root"], ["--user", "app:for-app"]);
    assert!(world.ask(&app, "put app/k the-value"));
    assert!(!world.ask(&app, "put other/k the-value"));
    assert!(!world.ask(&["--user", "app:guessed"], "put app/k the-value"));
    assert!(world.ask(&app, "get app/k"));
    assert!(world.ask(&root, "user passwd app --new-user-password changed"));
    let puts = world.lines(2, is_of("KV/Put")).await;
    assert_eq!(puts.len(), 2, "{puts:?}");
    for (line, key, code) in [(&puts[0], "app/k", "OK"), (&puts[1], "other/k", "PERMISSION_DENIED")] {
        assert_eq!((&line["user"], &line["key"], &line["code"]), (&"app".into(), &key.into(), &code.into()), "{line}");
        assert_eq!((&line["member"], line["from"].is_string()), (&"kv-0".into(), true), "{line}");
        assert!(line["bytes"].as_u64().unwrap() > 10 && line["took_us"].is_u64(), "{line}");
    }
    let logins = world.lines(4, is_of("Auth/Authenticate")).await;
    let refused: Vec<&Value> = logins.iter().filter(|line| line["code"] != "OK").collect();
    assert_eq!(refused.len(), 1, "{logins:?}");
    assert_eq!((&refused[0]["user"], &refused[0]["code"]), (&"app".into(), &"INVALID_ARGUMENT".into()));
    let changes = world.lines(1, is_of("Auth/UserChangePassword")).await;
    assert_eq!((&changes[0]["user"], &changes[0]["target"]), (&"root".into(), &"app".into()));
    // Through the gateway it is the same call.
    let body = r#"{"key":"YXBwL2s=","value":"dGhlLXZhbHVl"}"#;
    let (code, _) = http_request(&world.cluster.endpoint(0), "POST", "/v3/kv/put", &[], body).await.unwrap();
    assert_eq!(code, 400);
    let puts = world.lines(3, is_of("KV/Put")).await;
    assert_eq!(
        (&puts[2]["code"], &puts[2]["user"], &puts[2]["key"]),
        (&"INVALID_ARGUMENT".into(), &Value::Null, &"app/k".into())
    );
    let text = std::fs::read_to_string(&world.file).unwrap();
    for secret in ["the-value", "for-root", "for-app", "guessed", "changed", "$2", "dGhl"] {
        assert!(!text.contains(secret), "{secret}: {text}");
    }
    assert!(!text.contains("KV/Range"), "reads are a setting: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_written_down_if_they_are_asked_for() {
    let world = World::new(true).await;
    assert!(world.ask(&[], "put k v"));
    assert!(world.ask(&[], "get k"));
    assert!(world.ask(&[], "get k l"));
    let reads = world.lines(2, is_of("KV/Range")).await;
    assert_eq!((&reads[0]["key"], &reads[0]["range_end"]), (&"k".into(), &Value::Null));
    assert_eq!((&reads[1]["key"], &reads[1]["range_end"], &reads[1]["code"]), (&"k".into(), &"l".into(), &"OK".into()));
}
