//! Clients of other languages, as `examples/clients` shows them to users.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::cluster::Cluster;
use crate::support::tools::{self, CURL, PYTHON};

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/clients").join(name)
}

/// Runs it to its end, away from the event loop.
async fn run(mut command: Command) -> String {
    tokio::task::spawn_blocking(move || tools::run(&mut command)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_in_python_runs() {
    let Some(python) = tools::require_python(&PYTHON, "etcd3") else { return };
    let mut cluster = Cluster::new(3);
    let leader = cluster.start_all().await;
    let mut command = Command::new(python);
    command.arg(example("python.py")).arg(cluster.endpoint((leader + 1) % 3));
    let said = run(command).await;
    for line in [
        "apple is red since revision",
        "fruit: ['fruit/apple', 'fruit/banana']",
        "repainted: True and now green",
        "seen: DeleteEvent fruit/banana",
        "and holds ['worker/1']",
        "worker after revoke: None",
        "locked: True",
        "done",
    ] {
        assert!(said.contains(line), "{line:?} is missing:\n{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_with_curl_runs() {
    let Some(_) = tools::require(&CURL) else { return };
    let mut cluster = Cluster::new(3);
    let leader = cluster.start_all().await;
    let mut command = Command::new("bash");
    command.arg(example("curl.sh")).arg(cluster.endpoint((leader + 1) % 3));
    let said = run(command).await;
    for part in [
        r#""value":"aGVsbG8=""#,
        r#""succeeded":true"#,
        r#""events":[{"kv":{"key":"Z3JlZXRpbmc=""#,
        r#""deleted":"1""#,
        r#""error":"etcdserver: mvcc: required revision is a future revision""#,
        "- done",
    ] {
        assert!(said.contains(part), "{part:?} is missing:\n{said}");
    }
}

/// Without TLS a client that speaks HTTP/2 must say so from the first byte: gateway and gRPC share the port.
#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_speaks_http_2_too() {
    let Some(curl) = tools::require(&CURL) else { return };
    let cluster = Cluster::start(1).await;
    let ask = |version: &str, path: &str| {
        let mut command = Command::new(&curl);
        let url = format!("http://{}{path}", cluster.endpoint(0));
        command.args(["--silent", "--max-time", "30", version, "--write-out", " %{http_code} %{http_version}", &url]);
        if path.starts_with("/v3") {
            command.args(["--data", r#"{"key":"aw=="}"#]);
        }
        run(command)
    };
    for path in ["/v3/kv/range", "/v3beta/kv/range", "/metrics", "/health"] {
        let (http1, http2) = (ask("--http1.1", path).await, ask("--http2-prior-knowledge", path).await);
        assert!(http1.ends_with(" 200 1.1"), "{http1}");
        assert!(http2.ends_with(" 200 2"), "{http2}");
    }
}
