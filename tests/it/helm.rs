//! The chart, as Helm renders it.
//!
//! Absent: a Kubernetes cluster, and whether the settings' values are valid ones.

use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::support::tools::{HELM, require, run};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/helm/quorate");
const MANUAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/quorate.toml");
/// The oldest Kubernetes that the chart promises to work on. A helm built by `go install` would assume one far older.
const KUBERNETES: &str = "1.30.0";

/// Values of every kind at once.
const ALL_VALUES: &str = r#"
replicaCount: 5
image:
  repository: registry.example/quorate
  digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
imagePullSecrets: [{name: pull}]
config:
  raft: {heartbeat_interval: 200ms}
  limits: {request_bytes_max: 1048576, ratio: 0.25}
  telemetry: {extra: true, tags: [a, "b\"<c>"]}
  server: {listen_client: null}
resources: {limits: {memory: 8Gi}}
persistence: {size: 100Gi, storageClass: fast}
service: {type: LoadBalancer, port: 12379, annotations: {team: core}}
spread: DoNotSchedule
podAnnotations: {note: kept}
podLabels: {tier: data}
nodeSelector: {disk: ssd}
affinity: {nodeAffinity: {}}
tolerations: [{key: dedicated, operator: Exists}]
priorityClassName: high
extraEnv: [{name: RUST_BACKTRACE, value: "1"}]
terminationGracePeriodSeconds: 60
fullnameOverride: store
"#;

/// What one `helm template` printed, and what in it is looked at.
struct Rendered(Vec<Value>);

impl Rendered {
    fn new(helm: &PathBuf, values: &str) -> Self {
        let text = run(&mut template(helm, values));
        let documents = serde_yaml_ng::Deserializer::from_str(&text);
        Self(documents.map(|document| Value::deserialize(document).expect("Helm prints YAML")).collect())
    }

    fn find(&self, kind: &str, name: &str) -> &Value {
        let wanted = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
        self.0.iter().find(wanted).unwrap_or_else(|| panic!("no {kind} {name} in {:#?}", self.0))
    }

    fn stateful_set(&self) -> &Value {
        self.0.iter().find(|object| object["kind"] == "StatefulSet").expect("there is a StatefulSet")
    }

    fn pod(&self) -> &Value {
        &self.stateful_set()["spec"]["template"]
    }

    fn settings(&self) -> toml::Table {
        let map = self.0.iter().find(|object| object["kind"] == "ConfigMap").expect("there is a ConfigMap");
        let text = map["data"]["quorate.toml"].as_str().expect("it holds quorate.toml");
        text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"))
    }
}

/// `helm template` for the release `kv` in the namespace `data`, with `values` from a file.
fn template(helm: &PathBuf, values: &str) -> Command {
    let mut command = Command::new(helm);
    command.args(["template", "kv", CHART, "--namespace", "data", "--kube-version", KUBERNETES]);
    command.arg("--values").arg(values_file(values));
    command
}

/// A file that Helm can read after this returns: kept below the target directory, named by its content.
fn values_file(values: &str) -> PathBuf {
    let sum = crc32c::crc32c(values.as_bytes());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("values-{sum:08x}.yaml"));
    let unfinished = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file can be made");
    std::fs::write(unfinished.path(), values).expect("it can be written");
    unfinished.persist(&path).expect("it can be renamed");
    path
}

#[test]
fn chart_lints() {
    let Some(helm) = require(&HELM) else { return };
    for values in ["", ALL_VALUES] {
        run(Command::new(&helm)
            .args(["lint", "--strict", CHART, "--kube-version", KUBERNETES, "--values"])
            .arg(values_file(values)));
    }
}

#[test]
fn replica_count_is_in_no_pod_template() {
    let Some(helm) = require(&HELM) else { return };
    let (three, five) = (Rendered::new(&helm, "replicaCount: 3"), Rendered::new(&helm, "replicaCount: 5"));
    assert_eq!(three.pod(), five.pod());
    assert_eq!(three.stateful_set()["spec"]["replicas"], 3);
    assert_eq!(five.stateful_set()["spec"]["replicas"], 5);
    assert_eq!(three.settings()["cluster"]["size"].as_integer(), Some(3));
    assert_eq!(five.settings()["cluster"]["size"].as_integer(), Some(5));
    // Scaled to nothing is a shutdown; the settings stay ones that a member accepts.
    assert_eq!(Rendered::new(&helm, "replicaCount: 0").settings()["cluster"]["size"].as_integer(), Some(1));
}

#[test]
fn changed_setting_changes_the_pod_template() {
    let Some(helm) = require(&HELM) else { return };
    let changed = Rendered::new(&helm, "config: {raft: {heartbeat_interval: 200ms}}");
    assert_ne!(Rendered::new(&helm, "").pod(), changed.pod());
}

#[test]
fn members_find_each_other_before_they_are_ready() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let spec = &rendered.stateful_set()["spec"];
    assert_eq!(spec["podManagementPolicy"], "Parallel");

    let headless = rendered.find("Service", "kv-quorate-headless");
    assert_eq!(spec["serviceName"], headless["metadata"]["name"]);
    assert_eq!(headless["spec"]["clusterIP"], "None");
    assert_eq!(headless["spec"]["publishNotReadyAddresses"], true);

    // The selectors of both Services, the StatefulSet and the disruption budget all mean these pods.
    let labels = &rendered.pod()["metadata"]["labels"];
    assert_eq!(&spec["selector"]["matchLabels"], labels);
    assert_eq!(&headless["spec"]["selector"], labels);
    assert_eq!(&rendered.find("Service", "kv-quorate")["spec"]["selector"], labels);
    assert_eq!(&rendered.find("PodDisruptionBudget", "kv-quorate")["spec"]["selector"]["matchLabels"], labels);

    // Pod i of StatefulSet s behind Service h in namespace n is reached as `s-i.h.n.svc`.
    let settings = rendered.settings();
    assert_eq!(settings["cluster"]["peers"].as_str(), Some("kv-quorate-%d.kv-quorate-headless.data.svc:2380"));
    assert_eq!(settings["server"]["listen_client"].as_str(), Some("0.0.0.0:2379"));
    assert_eq!(settings["server"]["listen_peer"].as_str(), Some("0.0.0.0:2380"));
    let container = &rendered.pod()["spec"]["containers"][0];
    let from_metadata = json!({"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}});
    assert_eq!(container["env"], json!([from_metadata]));
}

#[test]
fn chart_sets_only_settings_that_exist() {
    let Some(helm) = require(&HELM) else { return };
    let manual = std::fs::read_to_string(MANUAL).expect("config/quorate.toml can be read");
    let known: toml::Table = manual.parse().expect("config/quorate.toml is TOML");
    for (section, settings) in Rendered::new(&helm, "").settings() {
        for key in settings.as_table().expect("a section is a table").keys() {
            let exists = known.get(&section).is_some_and(|section| section.get(key).is_some());
            assert!(exists, "{section}.{key} is not in config/quorate.toml");
        }
    }
}

#[test]
fn data_and_settings_are_mounted_where_the_server_looks() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let container = &rendered.pod()["spec"]["containers"][0];
    assert_eq!(container["command"], json!(["quorate", "serve", "--config", "/etc/quorate/quorate.toml"]));
    let mounts = container["volumeMounts"].as_array().expect("there are mounts");
    let mounted = |name: &str| {
        let mount = mounts.iter().find(|mount| mount["name"] == name).expect("it is mounted");
        assert_eq!(mount.get("subPath"), None, "a subPath is never updated");
        mount["mountPath"].as_str().expect("a mount has a path").to_owned()
    };
    assert_eq!(mounted("config"), "/etc/quorate");
    let data_dir = rendered.settings()["server"]["data_dir"].as_str().expect("data_dir is text").to_owned();
    // Below the mount, not at it: a fresh disk's root holds `lost+found`.
    assert!(data_dir.starts_with(&format!("{}/", mounted("data"))), "{data_dir}");
    let claim = &rendered.stateful_set()["spec"]["volumeClaimTemplates"][0];
    assert_eq!(claim["metadata"]["name"], "data");
    assert_eq!(claim["spec"]["resources"]["requests"]["storage"], "8Gi");
    assert_eq!(claim["spec"].get("storageClassName"), None);
}

#[test]
fn pods_run_with_the_least_rights() {
    let Some(helm) = require(&HELM) else { return };
    for values in ["", ALL_VALUES] {
        let rendered = Rendered::new(&helm, values);
        let pod = &rendered.pod()["spec"];
        assert_eq!(pod["enableServiceLinks"], false);
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["runAsUser"], 65532);
        assert_eq!(pod["securityContext"]["fsGroup"], 65532);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(container["capabilities"], json!({"drop": ["ALL"]}));
    }
}

#[test]
fn probes_ask_the_health_service() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let container = &rendered.pod()["spec"]["containers"][0];
    let probe = |name: &str| &container[name]["grpc"];
    assert_eq!(probe("startupProbe"), &json!({"port": 2379, "service": "liveness"}));
    assert_eq!(probe("livenessProbe"), &json!({"port": 2379, "service": "liveness"}));
    assert_eq!(probe("readinessProbe"), &json!({"port": 2379, "service": "readiness"}));
    // The server ends by itself before Kubernetes kills it.
    assert_eq!(rendered.pod()["spec"]["terminationGracePeriodSeconds"], 120);
    assert_eq!(rendered.settings()["server"]["grace_period"].as_str(), Some("115s"));
}

#[test]
fn every_value_reaches_its_place() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, ALL_VALUES);
    let (set, pod) = (rendered.find("StatefulSet", "store"), &rendered.pod()["spec"]);
    let container = &pod["containers"][0];
    let digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    assert_eq!(container["image"], format!("registry.example/quorate@{digest}"));
    assert_eq!(container["resources"]["limits"]["memory"], "8Gi");
    assert_eq!(container["env"][1], json!({"name": "RUST_BACKTRACE", "value": "1"}));
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
    assert_eq!(pod["topologySpreadConstraints"][0]["whenUnsatisfiable"], "DoNotSchedule");
    assert_eq!(pod["nodeSelector"], json!({"disk": "ssd"}));
    assert_eq!(pod["affinity"], json!({"nodeAffinity": {}}));
    assert_eq!(pod["tolerations"], json!([{"key": "dedicated", "operator": "Exists"}]));
    assert_eq!(pod["priorityClassName"], "high");
    assert_eq!(pod["terminationGracePeriodSeconds"], 60);
    assert_eq!(rendered.pod()["metadata"]["annotations"]["note"], "kept");
    assert_eq!(rendered.pod()["metadata"]["labels"]["tier"], "data");
    let claim = &set["spec"]["volumeClaimTemplates"][0]["spec"];
    assert_eq!(claim["storageClassName"], "fast");
    assert_eq!(claim["resources"]["requests"]["storage"], "100Gi");
    let service = rendered.find("Service", "store");
    assert_eq!(service["spec"]["type"], "LoadBalancer");
    assert_eq!(service["spec"]["ports"][0]["port"], 12379);
    assert_eq!(service["metadata"]["annotations"], json!({"team": "core"}));

    let settings = rendered.settings();
    assert_eq!(settings["raft"]["heartbeat_interval"].as_str(), Some("200ms"));
    assert_eq!(settings["limits"]["request_bytes_max"].as_integer(), Some(1_048_576), "whole numbers stay whole");
    assert_eq!(settings["limits"]["ratio"].as_float(), Some(0.25));
    assert_eq!(settings["telemetry"]["extra"].as_bool(), Some(true));
    assert_eq!(settings["telemetry"]["tags"][1].as_str(), Some("b\"<c>"));
    let server = settings["server"].as_table().expect("a section is a table");
    assert!(!server.contains_key("listen_client"), "null takes a setting away");
    assert!(server.contains_key("listen_peer"), "the rest of its section stays");
    assert_eq!(settings["cluster"]["peers"].as_str(), Some("store-%d.store-headless.data.svc:2380"));
}

#[test]
fn wrong_values_are_refused_with_their_name() {
    let Some(helm) = require(&HELM) else { return };
    for (values, want) in [
        ("replicas: 3", "replicas"),
        ("replicaCount: three", "replicaCount"),
        ("image: {repository: x, digest: latest}", "digest"),
        ("config: {cluster: {size: 3}}", "config.cluster.size is not for values: set replicaCount"),
        ("config: {raft: {nested: {deep: 1}}}", "nested"),
        ("persistence: {size: big}", "persistence/size"),
    ] {
        let output = template(&helm, values).output().expect("helm runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{values} was accepted");
        assert!(errors.contains(want), "{values}: {errors}");
    }
}
