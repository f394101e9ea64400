//! What is said when something is not as a person thought, and what a command leaves behind.

use std::os::unix::process::CommandExt as _;

use rustix::process::Signal;

use super::*;
use crate::support::cluster::{binary, free_host, wait_for};
use crate::support::process::Running;

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_port_is_named_as_such() {
    let cluster = Cluster::start(1).await;
    let peer = Cli { endpoints: cluster.peer_address(0) };
    for args in [&["get", "k"][..], &["put", "k", "v"], &["member", "list"], &["health"]] {
        let error = peer.fails(args);
        assert!(error.contains("(2380)") && error.contains("2379"), "{args:?}: {error}");
    }
    // A web server that knows nothing but HTTP/1.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let web = Cli { endpoints: listener.local_addr().unwrap().to_string() };
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = [0; 1024];
            let _ = stream.read(&mut bytes).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
        }
    });
    for args in [&["get", "k"][..], &["put", "k", "v"], &["status"]] {
        let error = web.fails(args);
        assert!(error.contains("speaks no gRPC"), "{args:?}: {error}");
    }
    let cli = Cli { endpoints: cluster.endpoint(0) };
    let error = cli.fails(&["migrate", "--from", "127.0.0.1:1", "--to", &cluster.endpoint(0)]);
    assert!(error.contains("the source") && error.contains("with --from") && !error.contains("--endpoints"), "{error}");
    let error = cli.fails(&["migrate", "--from", &cluster.endpoint(0), "--to", "127.0.0.1:1"]);
    assert!(error.contains("the target") && error.contains("with --to"), "{error}");
    let error = cli.fails(&["migrate", "--from", &cluster.endpoint(0), "--to", &cluster.endpoint(0)]);
    assert!(error.contains("the same cluster"), "{error}");
}

#[test]
fn what_went_wrong_is_said_once() {
    let cli = Cli { endpoints: String::new() };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below = file.join("data");
    for args in [
        &["snapshot", "status", "/nowhere/backup.db"][..],
        &["txn", "/nowhere/change.txt"],
        &["recover", "--data-dir", below.to_str().unwrap()],
        &["serve", "--data-dir", below.to_str().unwrap()],
        &["log", "inspect", below.to_str().unwrap()],
    ] {
        let output = cli.output(args, b"");
        let error = String::from_utf8(output.stderr).unwrap();
        let last = error.lines().last().unwrap();
        assert!(!output.status.success() && last.matches("os error").count() <= 1, "{args:?}: {error}");
    }
    let error = cli.fails(&["serve", "--listen-client", "192.0.2.1:2379", "--data-dir", dir.path().to_str().unwrap()]);
    assert!(error.contains("192.0.2.1:2379: cannot listen; this machine has no such address"), "{error}");
    let other = tempfile::tempdir().unwrap();
    let etcds = other.path().join("etcd");
    std::fs::create_dir_all(etcds.join("member/snap")).unwrap();
    for args in [&["serve", "--data-dir"][..], &["log", "inspect"]] {
        let error = cli.fails(&[args, &[etcds.to_str().unwrap()]].concat());
        assert!(error.contains("is the data directory of an etcd"), "{error}");
    }
}

#[test]
fn a_setting_with_one_underscore_is_named() {
    let mut command = Command::new(binary());
    command.arg("config").env("QUORATE_RAFT_HEARTBEAT_INTERVAL", "50ms");
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && error.contains("QUORATE_RAFT__HEARTBEAT_INTERVAL"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_backup_leaves_no_file() {
    let cluster = Cluster::start(1).await;
    let value = "v".repeat(1 << 20);
    for n in 0..24 {
        cluster.put(0, &format!("k{n}"), &value).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.db");
    let endpoint = cluster.endpoint(0);
    // A wire that takes its time, so that there is a middle to be interrupted in.
    let slow = slow_proxy(endpoint).await;
    let mut save = Running::start(
        Command::new(binary())
            .args(["snapshot", "save", file.to_str().unwrap(), "--endpoints", &slow])
            .process_group(0),
    );
    let part = dir.path().join("backup.db.part");
    wait_for("a part to be there", async || match std::fs::metadata(&part) {
        Ok(found) if found.len() > 0 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    save.signal(Signal::INT);
    assert_eq!(save.wait().code(), Some(1));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "neither the file nor a half of it");
}

/// Passes bytes on, 64 KiB every 50 ms.
async fn slow_proxy(to: String) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = tokio::net::TcpStream::connect(&to).await.unwrap();
            tokio::spawn(async move {
                let (mut upward, mut downward) = (vec![0; 64 << 10], vec![0; 64 << 10]);
                loop {
                    tokio::select! {
                        read = client.read(&mut upward) => match read {
                            Ok(n) if n > 0 => if server.write_all(&upward[..n]).await.is_err() { return },
                            _ => return,
                        },
                        read = server.read(&mut downward) => match read {
                            Ok(n) if n > 0 => {
                                if client.write_all(&downward[..n]).await.is_err() { return }
                                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                            }
                            _ => return,
                        },
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_is_described_while_its_member_runs_and_when_it_is_damaged() {
    let mut cluster = Cluster::start(1).await;
    for n in 0..5 {
        cluster.put(0, &format!("key-{n}"), "v").await;
    }
    let cli = Cli { endpoints: String::new() };
    let dir = cluster.data_dir(0);
    let args = ["log", "inspect", dir.to_str().unwrap(), "--entries", "3"];
    let text = cli.run(&args);
    assert!(text.contains("member:     kv-0 (") && text.contains("in use:     yes"), "{text}");
    let id = cluster.member_id(0).await;
    cluster.kill(0);
    let before: Vec<u8> = std::fs::read(cluster.member_dir(0).join("log/0000000001.log")).unwrap();
    let json = cli.json(&args);
    assert_eq!((&json["member"], &json["running"]), (&format!("{id:016x}").into(), &false.into()), "{json}");
    assert!(json["log"]["damage"].is_null() && json["log"]["last"]["index"].as_u64().unwrap() > 5, "{json}");
    let entries = json["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 3, "{json}");
    assert!(entries.iter().any(|entry| entry["what"].to_string().contains("key-4")), "{json}");
    assert!(cli.run(&args).contains("log's end:  frame "));

    // A byte of the first entries: what stands behind it is intact, so it is no torn end.
    let path = cluster.member_dir(0).join("log/0000000001.log");
    let mut bytes = before.clone();
    bytes[256 + 40] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let text = cli.run(&args);
    assert!(text.contains("log's end:  DAMAGED") && text.contains("0000000001.log"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "it is only looked at");
    std::fs::write(&path, before).unwrap();
    cluster.start_all().await;
    assert_eq!(cluster.get(0, "key-4").await.as_deref(), Some("v"));
    let error = cli.fails(&["log", "inspect", cluster.root().join("none").to_str().unwrap()]);
    assert!(error.contains("holds no member"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_dev_runs_beside_another_on_its_own_host() {
    let ((a, b), (c, d)) = (free_host(), free_host());
    let start = |host: String| {
        let mut command = Command::new(binary());
        command.args(["dev", "--replicas", "1", "--host", &host]);
        Running::start(&mut command)
    };
    let devs = [start(format!("127.{a}.0.{b}")), start(format!("127.{c}.0.{d}"))];
    for mut dev in devs {
        loop {
            let line = dev.line().expect("dev runs");
            if line.contains(" leads (term ") {
                break;
            }
        }
        dev.signal(Signal::INT);
        assert!(dev.wait().success());
    }
}
