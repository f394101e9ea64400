//! Alerts and the dashboard: their rules as promtool plays them, and their queries as Prometheus answers them about a running cluster.
//!
//! Absent: whether thresholds are wise.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{CHART, KUBERNETES, Rendered, values_file};
use crate::support::cluster::{Cluster, http_get, http_post, wait_for};
use crate::support::pki::Pki;
use crate::support::tools::{HELM, Tool, require, run};

const PROMTOOL: Tool = Tool { name: "promtool", install: "`apt-get install prometheus`" };
const PROMETHEUS: Tool = Tool { name: "prometheus", install: "`apt-get install prometheus`" };
const RULES_TEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/helm/rules.test.yaml");
const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/monitor.md");
const KINDS: [&str; 3] = ["ServiceMonitor", "PodMonitor", "PrometheusRule"];
const ALL: &str = "monitoring: {serviceMonitor: {enabled: true, interval: 7s}, podMonitor: {enabled: true}, \
                   prometheusRule: {enabled: true, runbookUrl: \"https://docs.example/\", alertLabels: {team: core}, \
                   disabled: [QuorateEvenVoters]}, dashboard: {enabled: true}}";

fn rules() -> Vec<Value> {
    let text = std::fs::read_to_string(format!("{CHART}/files/rules.yaml")).unwrap();
    let file: Value = serde_yaml_ng::from_str(&text).unwrap();
    file["groups"][0]["rules"].as_array().unwrap().clone()
}

fn dashboard() -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("{CHART}/files/dashboard.json")).unwrap()).unwrap()
}

/// On a cluster that has these kinds of objects.
fn render(helm: &std::path::Path, values: &str, kinds: &[&str]) -> Rendered {
    let mut command = Command::new(helm);
    command.args(["template", "kv", CHART, "--namespace", "data", "--kube-version", KUBERNETES]);
    for kind in kinds {
        command.arg("--api-versions").arg(format!("monitoring.coreos.com/v1/{kind}"));
    }
    Rendered::of(&run(command.arg("--values").arg(values_file(values))))
}

/// Each alert has a test there.
#[test]
fn alerts_fire_when_they_should() {
    let text = std::fs::read_to_string(RULES_TEST).unwrap();
    for rule in rules() {
        let name = rule["alert"].as_str().unwrap();
        assert!(text.contains(&format!("- name: {name}\n")), "{name} has no test in {RULES_TEST}");
    }
    let Some(promtool) = require(&PROMTOOL) else { return };
    run(Command::new(promtool).args(["test", "rules", RULES_TEST]));
}

/// A page that an alert leads to has what to do about it.
#[test]
fn every_alert_has_a_runbook() {
    let docs = std::fs::read_to_string(DOCS).unwrap();
    let sections: Vec<&str> = docs.split("\n### ").skip(1).collect();
    for rule in rules() {
        let name = rule["alert"].as_str().unwrap();
        let url = rule["annotations"]["runbook_url"].as_str().unwrap();
        assert_eq!(url, format!("docs/monitor.md#{}", name.to_lowercase()));
        let section = sections.iter().find(|section| section.starts_with(&format!("{name}\n")));
        let section = section.unwrap_or_else(|| panic!("docs/monitor.md has no section {name}"));
        assert!(section.split_whitespace().count() > 15, "{name}: {section}");
    }
}

#[test]
fn what_the_cluster_has_no_kind_for_is_left_out() {
    let Some(helm) = require(&HELM) else { return };
    let without = render(&helm, ALL, &[]);
    assert!(without.kinds(&KINDS).is_empty());
    without.find("ConfigMap", "kv-quorate-dashboard");
    let with = render(&helm, ALL, &KINDS);
    assert_eq!(with.kinds(&KINDS).len(), 3);
    let endpoint = &with.find("ServiceMonitor", "kv-quorate")["spec"]["endpoints"][0];
    assert_eq!((&endpoint["port"], &endpoint["interval"]), (&"status".into(), &"7s".into()));
    for (kind, endpoints) in [("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")] {
        let relabeling = &with.find(kind, "kv-quorate")["spec"][endpoints][0]["relabelings"][0];
        assert_eq!((&relabeling["targetLabel"], &relabeling["replacement"]), (&"job".into(), &"kv-quorate".into()));
    }
}

/// The chart's rules are those of the file, for its own release, less those that are not wanted.
#[test]
fn rules_of_the_chart_mean_its_release() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = render(&helm, ALL, &KINDS);
    let spec = &rendered.find("PrometheusRule", "kv-quorate")["spec"];
    let given = spec["groups"][0]["rules"].as_array().unwrap();
    assert_eq!(given.len(), rules().len() - 1);
    for rule in given {
        let (expr, labels) = (rule["expr"].as_str().unwrap(), &rule["labels"]);
        assert!(expr.contains("job=\"kv-quorate\",namespace=\"data\"") && !expr.contains("job=\"quorate\""), "{expr}");
        assert_ne!(rule["alert"], "QuorateEvenVoters");
        assert!(labels["team"] == "core" && labels["severity"].is_string(), "{labels}");
        let url = rule["annotations"]["runbook_url"].as_str().unwrap();
        assert!(url.starts_with("https://docs.example/monitor.md#quorate"), "{url}");
    }
    let Some(promtool) = require(&PROMTOOL) else { return };
    let file = values_file(&serde_yaml_ng::to_string(spec).unwrap());
    run(Command::new(promtool).args(["check", "rules"]).arg(file));
}

/// Prometheus itself, in a directory of its own, looking at the members of a cluster.
struct Prometheus {
    process: Child,
    endpoint: String,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    async fn start(program: &std::path::Path, cluster: &Cluster) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let targets: Vec<String> = (0..3).map(|slot| cluster.status_endpoint(slot)).collect();
        let config = serde_json::json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [format!("{CHART}/files/rules.yaml")],
            "scrape_configs": [{
                "job_name": "quorate",
                "static_configs": [{"targets": targets, "labels": {"namespace": "data"}}],
            }],
        });
        let file = dir.path().join("prometheus.yml");
        std::fs::write(&file, config.to_string()).unwrap();
        // Prometheus takes no port 0: the one that is free now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let endpoint = format!("127.0.0.1:{port}");
        let process = Command::new(program)
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={endpoint}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("out")).unwrap())
            .spawn()
            .unwrap();
        Self { process, endpoint, _dir: dir }
    }

    async fn get(&self, path: &str) -> Result<Value, String> {
        let (code, text) = http_get(&self.endpoint, path).await.map_err(|error| error.to_string())?;
        // Large answers come in chunks, whose sizes are no JSON.
        let json = text.find('{').zip(text.rfind('}')).map(|(from, to)| &text[from..=to]).unwrap_or_default();
        let answer: Value =
            serde_json::from_str(&json.replace("\r\n", "")).map_err(|error| format!("{error}: {text}"))?;
        if code == 200 && answer["status"] == "success" { Ok(answer) } else { Err(text) }
    }

    /// How many series a query has, just now.
    async fn series(&self, query: &str) -> Result<usize, String> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.get(&format!("/api/v1/query?query={encoded}")).await?;
        Ok(answer["data"]["result"].as_array().map_or(0, Vec::len))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What makes every panel have something to show: reads, writes, a failure, the gateway, a watch that stays open.
async fn make_traffic(cluster: &Cluster, round: usize) {
    cluster.put(0, "k", &round.to_string()).await;
    cluster.get(1, "k").await;
    let endpoint = cluster.endpoint(2);
    http_post(&endpoint, "/v3/kv/range", "{\"key\": \"aw==\"}").await.unwrap();
    // A revision that will be, which no read can have.
    let (code, text) =
        http_post(&endpoint, "/v3/kv/range", "{\"key\": \"aw==\", \"revision\": \"99999999\"}").await.unwrap();
    assert_eq!(code, 400, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_of_the_dashboard_shows_data_and_no_alert_fires() {
    let Some(program) = require(&PROMETHEUS) else { return };
    let mut cluster = Cluster::new(3);
    let pki = Pki::new(&cluster.root().join("peers"));
    cluster.set("peer_tls.mode", "auto");
    cluster.set("peer_tls.issuer_cert_file", &pki.path("ca.crt"));
    cluster.set("peer_tls.issuer_key_file", &pki.path("ca.key"));
    cluster.start_all().await;
    let prometheus = Prometheus::start(&program, &cluster).await;
    let mut watcher = Command::new(crate::support::cluster::binary())
        .args(["watch", "k", "--endpoints", &cluster.endpoint(0)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut open: Vec<(String, String)> = Vec::new();
    for panel in dashboard()["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().unwrap().to_owned();
            let query = target["expr"].as_str().unwrap();
            let query = query.replace("$__rate_interval", "15s").replace("$job", "quorate").replace("$namespace", ".*");
            open.push((title, query));
        }
    }
    assert!(open.len() > 30, "{} queries", open.len());
    let begin = Instant::now();
    let mut round = 0;
    wait_for("data of every panel", async || {
        round += 1;
        make_traffic(&cluster, round).await;
        let mut left = Vec::new();
        for (title, query) in std::mem::take(&mut open) {
            if prometheus.series(&query).await.unwrap_or(0) == 0 {
                left.push((title, query));
            }
        }
        open = left;
        // Alerts are looked at a moment later than the first data.
        if open.is_empty() && begin.elapsed() > Duration::from_secs(5) { Ok(()) } else { Err(format!("{open:#?}")) }
    })
    .await;
    let answer = prometheus.get("/api/v1/rules").await.unwrap();
    let seen = answer["data"]["groups"][0]["rules"].as_array().unwrap();
    assert_eq!(seen.len(), rules().len());
    for rule in seen {
        assert!(rule["health"] != "err", "{rule}");
        assert_ne!(rule["state"], "firing", "{rule}");
    }
    watcher.kill().unwrap();
    watcher.wait().unwrap();
}

/// Series that are named and never written would make alerts that never fire.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_ask_for_series_that_members_have() {
    let mut cluster = Cluster::new(3);
    let pki = Pki::new(&cluster.root().join("peers"));
    cluster.set("peer_tls.mode", "auto");
    cluster.set("peer_tls.issuer_cert_file", &pki.path("ca.crt"));
    cluster.set("peer_tls.issuer_key_file", &pki.path("ca.key"));
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    let mut wanted = BTreeSet::new();
    for rule in rules() {
        let expr = rule["expr"].as_str().unwrap().to_owned();
        for (at, _) in expr.match_indices("{job=\"quorate\"") {
            let begin = expr[..at].rfind(|c: char| !c.is_ascii_lowercase() && c != '_').map_or(0, |at| at + 1);
            wanted.insert(expr[begin..at].to_owned());
        }
    }
    // Prometheus's own.
    assert!(wanted.remove("up"));
    assert!(wanted.len() > 15, "{wanted:?}");
    wait_for("every series that an alert asks for", async || {
        let mut text = String::new();
        for slot in 0..3 {
            let answer =
                http_get(&cluster.status_endpoint(slot), "/metrics").await.map_err(|error| error.to_string())?;
            text += &answer.1;
        }
        let is_there = |name: &&String| {
            text.lines().any(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")))
        };
        let missing: Vec<_> = wanted.iter().filter(|name| !is_there(name)).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?}")) }
    })
    .await;
}
