//! Settings at their ends, and signals, with real processes.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::cluster::{Cluster, PATIENCE, wait_for};

/// A server of one member in `dir`; what it logs goes to `dir/out`.
fn start(dir: &std::path::Path, settings: &[String]) -> Child {
    let out = std::fs::File::create(dir.join("out")).unwrap();
    let sets = settings.iter().flat_map(|setting| ["--set", setting]);
    Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(["serve", "--name", "kv-0", "--listen-client", "127.0.0.1:0", "--listen-peer", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(dir.join("data"))
        .args(sets)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(out)
        .spawn()
        .unwrap()
}

/// What the configuration takes, the server can be built with: no value of a setting makes it panic.
#[tokio::test(flavor = "multi_thread")]
async fn extreme_settings_are_refused_in_a_sentence_or_served() {
    const VALUES: [&str; 9] = ["0", "1", "4294967295", "1000000000000", "0B", "1MiB", "1024TiB", "0s", "87600h"];
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let manual = toml::from_str::<toml::Table>(quorate::config::MANUAL).unwrap();
    let keys: Vec<String> = manual
        .iter()
        .flat_map(|(section, keys)| keys.as_table().unwrap().keys().map(move |key| format!("{section}.{key}")))
        // A level of 0 is none: then nothing is logged that could be waited for.
        .filter(|key| {
            !["server.data_dir", "server.listen_client", "server.listen_peer", "telemetry.level"].contains(&&key[..])
        })
        .collect();
    let mut cases: Vec<String> = vec![
        "log.segment_bytes=2GiB".into(),
        "state.cache_bytes=0B".into(),
        "raft.queue_requests_max=18446744073709551615".into(),
        "raft.queue_requests_max=1000000000000".into(),
        "server.request_timeout=584542046090years".into(),
    ];
    cases.extend((0..25).map(|_| {
        let (key, value) = (&keys[random.usize(..keys.len())], VALUES[random.usize(..VALUES.len())]);
        format!("{key}={value}")
    }));
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut server = start(dir.path(), std::slice::from_ref(&case));
        let begin = Instant::now();
        let text = || std::fs::read_to_string(dir.path().join("out")).unwrap();
        // A setting may keep it from ever being ready, such as an election timeout of years.
        let look = Duration::from_secs(2);
        let ended = wait_for(&format!("{case} to be served or refused"), async || match server.try_wait().unwrap() {
            Some(status) => Ok(Some(status)),
            None if text().contains("ready=true") || begin.elapsed() > look => Ok(None),
            None => Err(text()),
        })
        .await;
        if ended.is_none() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
        let text = text();
        assert!(!text.contains("panicked"), "{case}: {text}");
        match ended {
            Some(status) => {
                assert_eq!(status.code(), Some(1), "{case}: {status}: {text}");
                assert!(!text.contains("damaged"), "{case}: {text}");
                println!("{case}: {}", text.trim_end());
            }
            None => assert!(text.contains("listening"), "{case}: {text}"),
        }
    }
}

/// Of the signals that end a process, those that people send for other reasons end no member.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_does_not_end_a_member() {
    let cluster = Cluster::start(1).await;
    for (signal, name) in [(Signal::HUP, "SIGHUP"), (Signal::USR1, "SIGUSR1"), (Signal::USR2, "SIGUSR2")] {
        cluster.signal(0, signal);
        cluster.wait_logged(0, &[name, "SIGTERM stops this member"]).await;
        cluster.put(0, "k", name).await;
    }
}

/// Whatever the umask, and whoever has made the data directory before.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_writes_is_for_its_user_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut cluster = Cluster::new(1);
    std::fs::create_dir_all(cluster.data_dir(0)).unwrap();
    std::fs::set_permissions(cluster.data_dir(0), std::fs::Permissions::from_mode(0o777)).unwrap();
    cluster.set("log.entries_max", "20").set("log.entries_kept", "5");
    cluster.start_all().await;
    for value in 0..40 {
        cluster.put(0, "k", &value.to_string()).await;
    }
    let snapshots = cluster.member_dir(0).join("snapshot");
    wait_for("a snapshot file", async || {
        let names = std::fs::read_dir(&snapshots).map_err(|error| error.to_string())?.count();
        if names > 0 { Ok(()) } else { Err("none yet".to_owned()) }
    })
    .await;
    let backup = cluster.root().join("backup");
    cluster.client(&["snapshot", "save", &backup.display().to_string()]).await;
    let mut open = vec![cluster.data_dir(0), backup];
    let mut seen = 0;
    while let Some(path) = open.pop() {
        // Files come and go under our feet.
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        let expected = if metadata.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(metadata.permissions().mode() & 0o777, expected, "{}", path.display());
        seen += 1;
        if metadata.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    assert!(seen > 8, "log, snapshot, state: {seen}");
}

/// The file that says so can be removed while the member runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_does_not_open_a_live_log_though_lock_is_gone() {
    let cluster = Cluster::start(1).await;
    std::fs::remove_file(cluster.data_dir(0).join("LOCK")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let mut second = Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(["serve", "--name", "kv-0", "--listen-client", "127.0.0.1:0", "--listen-peer", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(cluster.data_dir(0))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(out.path().join("out")).unwrap())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = second.try_wait().unwrap() {
            break status;
        }
        if begin.elapsed() > PATIENCE {
            let _ = kill_process(Pid::from_child(&second), Signal::KILL);
            panic!("a second process runs on the same data directory");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let text = std::fs::read_to_string(out.path().join("out")).unwrap();
    assert!(!status.success() && text.contains("another process uses this data directory"), "{status}: {text}");
    cluster.put(0, "k", "v").await;
}

/// Where the chart's Services have IPv6 too, members listen at `[::]`: clients of both families reach them.
#[tokio::test(flavor = "multi_thread")]
async fn listening_at_all_addresses_of_ipv6_is_for_ipv4_too() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return crate::support::tools::skip("there is no IPv6 here", false);
    }
    let dir = tempfile::tempdir().unwrap();
    let settings = ["server.listen_client=[::]:0", "server.listen_peer=[::]:0", "server.listen_status=[::]:0"];
    let mut server = Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(["serve", "--name", "kv-0", "--data-dir"])
        .arg(dir.path().join("data"))
        .args(settings.iter().flat_map(|setting| ["--set", setting]))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.path().join("out")).unwrap())
        .spawn()
        .unwrap();
    let text = || std::fs::read_to_string(dir.path().join("out")).unwrap();
    let ports = wait_for("the ports of all listeners", async || {
        let text = text();
        let found: std::collections::BTreeSet<u16> = text
            .match_indices("[::]:")
            .filter_map(|(at, prefix)| {
                let digits = text[at + prefix.len()..].split(|c: char| !c.is_ascii_digit()).next()?;
                digits.parse().ok().filter(|port| *port != 0)
            })
            .collect();
        if text.contains("ready=true") && found.len() >= 3 { Ok(found) } else { Err(text) }
    })
    .await;
    for port in ports {
        for host in ["127.0.0.1", "[::1]"] {
            assert!(std::net::TcpStream::connect(format!("{host}:{port}")).is_ok(), "{host}:{port}: {}", text());
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();
}
