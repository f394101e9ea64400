//! The chart, as Helm renders it.
//!
//! Absent: a Kubernetes cluster.

mod auth;
mod backup;
mod lookup;
mod monitoring;
mod objects;
mod pairs;
mod readme;
mod schema;

use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::support::tools::{HELM, require, run};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/helm/quorate");
const MANUAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/quorate.toml");
/// The oldest Kubernetes that the chart promises to work on. A helm built by `go install` would assume one far older.
const KUBERNETES: &str = "1.30.0";

/// As few objects as the chart can be made to render.
const MINIMAL_VALUES: &str = r#"
replicaCount: 1
kubernetesApi: {enabled: false}
serviceAccount: {name: default}
networkPolicy: {enabled: false}
podDisruptionBudget: {enabled: false}
spread: {zone: "", node: ""}
resources: {}
"#;

/// Values of every kind at once.
const ALL_VALUES: &str = r#"
replicaCount: 5
firstOrdinal: 3
image:
  repository: registry.example/quorate
  digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
imagePullSecrets: [{name: pull}]
config:
  raft: {heartbeat_interval: 200ms, queue_requests_max: 1048576}
  http: {cors: [a, "b\"<c>"]}
  server: {listen_client: null}
  kubernetes: {poll_interval: 1s}
resources: {limits: {memory: 8Gi}}
persistence: {size: 100Gi, storageClass: fast, annotations: {backup: daily}, whenDeleted: Delete, whenScaled: Delete}
service:
  type: LoadBalancer
  port: 12379
  annotations: {team: core}
  labels: {lb: external}
  nodePort: 30379
  loadBalancerSourceRanges: [10.0.0.0/8]
  loadBalancerClass: example.org/lb
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  ipFamilyPolicy: PreferDualStack
  ipFamilies: [IPv6, IPv4]
ingress: {enabled: true, className: nginx, annotations: {a: b}, hosts: [kv.example.org], tls: [{secretName: web}]}
grpcRoute: {enabled: true, parentRefs: [{name: gateway}], hostnames: [kv.example.org], annotations: {c: d}}
openshift: {enabled: true}
commonAnnotations: {owner: us}
hostAliases: [{ip: 10.0.0.9, hostnames: [other]}]
dnsPolicy: Default
dnsConfig: {options: [{name: ndots, value: "2"}]}
lifecycle: {preStop: {sleep: {seconds: 2}}}
initContainers: [{name: first, image: "first:1"}]
serviceAccount: {annotations: {role: reader}}
networkPolicy: {enabled: true, clients: [{podSelector: {matchLabels: {app: shop}}}], monitoring: [{namespaceSelector: {}}], restrictEgress: true, apiServerPorts: [8443]}
spread: {zone: DoNotSchedule, node: DoNotSchedule}
updateStrategy: {partition: 4}
probes: {startup: {failureThreshold: 900}}
commonLabels: {cost: center}
podAnnotations: {note: kept}
podLabels: {tier: data}
nodeSelector: {disk: ssd}
affinity: {nodeAffinity: {}}
tolerations: [{key: dedicated, operator: Exists}]
topologySpreadConstraints: [{maxSkew: 2, topologyKey: rack, whenUnsatisfiable: ScheduleAnyway}]
priorityClassName: high
schedulerName: own
runtimeClassName: gvisor
extraEnv: [{name: RUST_BACKTRACE, value: "1"}]
extraEnvFrom: [{secretRef: {name: more}}]
extraVolumes: [{name: scratch, emptyDir: {}}]
extraVolumeMounts: [{name: scratch, mountPath: /scratch}]
extraContainers: [{name: side, image: "side:1"}]
extraObjects:
  - {apiVersion: v1, kind: Secret, metadata: {name: "{{ .Release.Name }}-more"}, stringData: {a: b}}
terminationGracePeriodSeconds: 60
fullnameOverride: store
readers:
  enabled: true
  autoscaling: {enabled: true, minReplicas: 3, maxReplicas: 7, targetCPUUtilizationPercentage: 50}
  resources: {limits: {memory: 2Gi}}
  diskSize: 3Gi
  podAnnotations: {note: read}
  podLabels: {tier: read}
  nodeSelector: {disk: any}
  affinity: {nodeAffinity: {}}
  tolerations: [{key: spot, operator: Exists}]
  priorityClassName: low
"#;

const TLS_SECRETS: &str =
    "tls: {client: {mode: secret, secret: c, clientCert: required, testSecret: t}, peer: {mode: secret, secret: p}}";
const TLS_AUTO: &str = "tls: {client: {mode: auto, secret: c, clientCert: optional}, peer: {mode: auto, secret: p}}";

/// What one `helm template` printed, and what in it is looked at.
struct Rendered(Vec<Value>);

impl Rendered {
    fn new(helm: &PathBuf, values: &str) -> Self {
        Self::of(&run(&mut template(helm, values)))
    }

    fn of(text: &str) -> Self {
        let documents = serde_yaml_ng::Deserializer::from_str(text);
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

    /// All objects of these kinds.
    fn kinds(&self, kinds: &[&str]) -> Vec<&Value> {
        self.0.iter().filter(|object| kinds.iter().any(|kind| object["kind"] == *kind)).collect()
    }

    fn settings(&self) -> toml::Table {
        self.settings_of(self.stateful_set()["metadata"]["name"].as_str().expect("it has a name"))
    }

    fn settings_of(&self, name: &str) -> toml::Table {
        let map = self.find("ConfigMap", name);
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
    for values in ["", MINIMAL_VALUES, ALL_VALUES] {
        run(Command::new(&helm)
            .args(["lint", "--strict", CHART, "--kube-version", KUBERNETES, "--values"])
            .arg(values_file(values)));
    }
    for entry in std::fs::read_dir(format!("{CHART}/ci")).expect("there are values for CI") {
        let file = entry.expect("it can be listed").path();
        run(Command::new(&helm).args(["lint", "--strict", CHART, "--kube-version", KUBERNETES, "--values"]).arg(file));
    }
}

#[test]
fn replica_count_is_in_no_pod_template() {
    let Some(helm) = require(&HELM) else { return };
    let (three, five) = (Rendered::new(&helm, "replicaCount: 3"), Rendered::new(&helm, "replicaCount: 5"));
    assert_eq!(three.stateful_set()["spec"]["replicas"], 3);
    assert_eq!(five.stateful_set()["spec"]["replicas"], 5);
    let mut same = five.stateful_set().clone();
    same["spec"]["replicas"] = 3.into();
    assert_eq!(&same, three.stateful_set(), "they differ in nothing but the number");
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
    let from = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let wanted = json!([from("POD_NAME", "metadata.name"), from("POD_NAMESPACE", "metadata.namespace")]);
    assert_eq!(container["env"], wanted);
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

/// The server itself reads what the chart wrote, with its checks of every value.
#[test]
fn server_accepts_the_rendered_settings() {
    let Some(helm) = require(&HELM) else { return };
    let readers = "replicaCount: 5\nfirstOrdinal: 2\nreaders: {enabled: true}\ntls: {client: {mode: auto, secret: ca}}";
    for values in ["", MINIMAL_VALUES, readers, TLS_SECRETS, TLS_AUTO] {
        let rendered = Rendered::new(&helm, values);
        for map in rendered.kinds(&["ConfigMap"]) {
            let dir = tempfile::tempdir().expect("a directory can be made");
            let file = dir.path().join("quorate.toml");
            std::fs::write(&file, map["data"]["quorate.toml"].as_str().expect("settings")).expect("it can be written");
            run(Command::new(crate::support::cluster::binary()).args(["config", "--config"]).arg(&file));
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
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        if values.is_empty() {
            assert_eq!(pod["securityContext"]["runAsUser"], 65532);
            assert_eq!(pod["securityContext"]["fsGroup"], 65532);
        }
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(container["capabilities"], json!({"drop": ["ALL"]}));
    }
}

/// Members may read their own StatefulSet and write Events, and nothing else; with an account of the user's the chart grants nothing.
#[test]
fn account_may_read_one_stateful_set() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let rules = &rendered.find("Role", "kv-quorate")["rules"];
    let get = json!({
        "apiGroups": ["apps"], "resources": ["statefulsets"], "resourceNames": ["kv-quorate"], "verbs": ["get"]
    });
    assert_eq!(rules, &json!([get, {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]));
    let binding = rendered.find("RoleBinding", "kv-quorate");
    let account = rendered.find("ServiceAccount", "kv-quorate");
    assert_eq!(binding["subjects"], json!([{"kind": "ServiceAccount", "name": "kv-quorate", "namespace": "data"}]));
    assert_eq!(account["automountServiceAccountToken"], false);
    let pod = &rendered.pod()["spec"];
    assert_eq!(
        (&pod["serviceAccountName"], &pod["automountServiceAccountToken"]),
        (&json!("kv-quorate"), &json!(true))
    );
    assert_eq!(rendered.settings()["kubernetes"]["stateful_set"].as_str(), Some("kv-quorate"));

    let own = Rendered::new(&helm, "serviceAccount: {name: mine}");
    assert_eq!(own.pod()["spec"]["serviceAccountName"], "mine");
    assert!(own.kinds(&["ServiceAccount", "Role", "RoleBinding"]).is_empty());
    assert_eq!(Rendered::new(&helm, "rbac: {create: false}").kinds(&["Role", "RoleBinding"]).len(), 0);

    let off = Rendered::new(&helm, "kubernetesApi: {enabled: false}");
    assert_eq!(off.pod()["spec"]["automountServiceAccountToken"], false);
    assert!(off.kinds(&["Role", "RoleBinding"]).is_empty());
    assert!(off.settings().get("kubernetes").is_none());
}

#[test]
fn disruptions_spread_and_disks_are_what_a_quorum_needs() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let budget = &rendered.find("PodDisruptionBudget", "kv-quorate")["spec"];
    let wanted = (&json!(1), &json!("AlwaysAllow"));
    assert_eq!((&budget["maxUnavailable"], &budget["unhealthyPodEvictionPolicy"]), wanted);
    let spread = rendered.pod()["spec"]["topologySpreadConstraints"].as_array().expect("there are constraints").clone();
    let keys: Vec<_> =
        spread.iter().map(|one| (one["topologyKey"].clone(), one["whenUnsatisfiable"].clone())).collect();
    let soft = |key: &str| (json!(key), json!("ScheduleAnyway"));
    assert_eq!(keys, [soft("topology.kubernetes.io/zone"), soft("kubernetes.io/hostname")]);
    let kept = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
    assert_eq!(rendered.stateful_set()["spec"]["persistentVolumeClaimRetentionPolicy"], kept);
}

/// The members' own port is for members and readers; a list of clients does not shut out `helm test`.
#[test]
fn network_policy_guards_the_peer_port() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let open = &rendered.find("NetworkPolicy", "kv-quorate")["spec"];
    assert_eq!(open["policyTypes"], json!(["Ingress"]));
    let (peers, clients) = (&open["ingress"][0], &open["ingress"][1]);
    assert_eq!(peers["from"].as_array().map(Vec::len), Some(2));
    assert_eq!(peers["from"][0]["podSelector"]["matchLabels"], rendered.pod()["metadata"]["labels"]);
    assert_eq!(clients, &json!({"ports": [{"protocol": "TCP", "port": 2379}]}));
    assert_eq!(open["ingress"][2], json!({"ports": [{"protocol": "TCP", "port": 2381}]}));

    let rendered = Rendered::new(&helm, ALL_VALUES);
    let closed = &rendered.find("NetworkPolicy", "store")["spec"];
    assert_eq!(closed["ingress"][1]["from"].as_array().map(Vec::len), Some(2));
    let test = &rendered.find("Pod", "store-test")["metadata"]["labels"];
    let allowed = closed["ingress"][1]["from"][0]["podSelector"]["matchLabels"].as_object().expect("labels");
    assert!(allowed.iter().all(|(key, value)| test[key] == *value), "{allowed:?}");
    let status = &closed["ingress"][2];
    assert_eq!(status["ports"], json!([{"protocol": "TCP", "port": 2381}]));
    assert_eq!(status["from"].as_array().map(Vec::len), Some(2), "clients, and who watches over them: {status}");
    assert_eq!(closed["egress"][2]["ports"], json!([{"protocol": "TCP", "port": 8443}]));
}

#[test]
fn readers_are_a_deployment_of_their_own() {
    let Some(helm) = require(&HELM) else { return };
    assert!(Rendered::new(&helm, "").kinds(&["Deployment", "HorizontalPodAutoscaler"]).is_empty());
    let rendered = Rendered::new(&helm, "readers: {enabled: true}");
    let deployment = rendered.find("Deployment", "kv-quorate-readers");
    assert_eq!(deployment["spec"]["replicas"], 2);
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    let members = rendered.stateful_set()["spec"]["selector"]["matchLabels"].as_object().expect("labels").clone();
    assert!(members.iter().any(|(key, value)| labels[key] != *value), "no selector of the members means readers");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let command = ["quorate", "serve", "--reader", "--config", "/etc/quorate/quorate.toml"];
    assert_eq!(container["command"], json!(command));
    assert_eq!(rendered.settings_of("kv-quorate")["cluster"]["readers"].as_bool(), Some(true), "members let them join");
    let (without, checksum) = (Rendered::new(&helm, ""), "checksum/settings");
    assert!(without.settings_of("kv-quorate")["cluster"].get("readers").is_none());
    let annotations =
        |rendered: &Rendered| rendered.stateful_set()["spec"]["template"]["metadata"]["annotations"][checksum].clone();
    assert_ne!(annotations(&rendered), annotations(&without), "members are restarted with the setting");
    let settings = rendered.settings_of("kv-quorate-readers");
    assert!(settings.get("kubernetes").is_none(), "a reader has no token");
    let join = settings["cluster"]["join"].as_array().and_then(|list| list[0].as_str().map(str::to_owned));
    assert_eq!(join.as_deref(), Some("kv-quorate-headless.data.svc:2380"));

    // An autoscaler decides alone.
    let scaled = Rendered::new(&helm, ALL_VALUES);
    assert_eq!(scaled.find("Deployment", "store-readers")["spec"].get("replicas"), None);
    assert_eq!(scaled.find("HorizontalPodAutoscaler", "store-readers")["spec"]["maxReplicas"], 7);
}

/// `helm test` runs the client of the server's image, against the clients' Service, and needs no shell.
#[test]
fn test_pod_uses_the_images_own_client() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "");
    let pod = rendered.find("Pod", "kv-quorate-test");
    assert_eq!(pod["metadata"]["annotations"]["helm.sh/hook"], "test");
    let steps: Vec<&Value> = ["initContainers", "containers"]
        .iter()
        .flat_map(|name| pod["spec"][*name].as_array().expect("there are containers"))
        .collect();
    assert_eq!(steps.len(), 4);
    for step in steps {
        assert_eq!(step["image"], rendered.pod()["spec"]["containers"][0]["image"]);
        assert_eq!(step["command"], json!(["quorate"]));
        assert_eq!(step["env"], json!([{"name": "QUORATE_ENDPOINTS", "value": "kv-quorate.data.svc:2379"}]));
        let words = step["args"].as_array().expect("it has arguments").iter().map(|arg| arg.as_str().expect("text"));
        let line = <quorate::cli::Cli as clap::Parser>::try_parse_from(std::iter::once("quorate").chain(words));
        assert!(line.is_ok(), "{line:?}");
    }
}

#[test]
fn probes_ask_the_status_port() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, ALL_VALUES);
    let readers = &rendered.find("Deployment", "store-readers")["spec"]["template"];
    for pod in [rendered.pod(), readers] {
        let container = &pod["spec"]["containers"][0];
        let probe = |name: &str| &container[name]["httpGet"];
        assert_eq!(probe("startupProbe"), &json!({"port": "status", "path": "/livez"}));
        assert_eq!(probe("livenessProbe"), &json!({"port": "status", "path": "/livez"}));
        assert_eq!(probe("readinessProbe"), &json!({"port": "status", "path": "/readyz"}));
        let ports = container["ports"].as_array().expect("ports");
        assert!(ports.contains(&json!({"name": "status", "containerPort": 2381})), "{ports:?}");
    }
    let rendered = Rendered::new(&helm, "");
    // A pod whose container starts while the release is being upgraded reads the new settings with the old program, so the chart sets none
    // that 0.1 does not know: the server takes this port by itself.
    let server = &rendered.settings()["server"];
    let client: std::net::SocketAddr = server["listen_client"].as_str().expect("text").parse().expect("an address");
    assert_eq!((server.get("listen_status"), client.port() + quorate::config::STATUS_PORT_OFFSET), (None, 2381));
    // The server ends by itself before Kubernetes kills it.
    assert_eq!(rendered.pod()["spec"]["terminationGracePeriodSeconds"], 120);
    assert_eq!(rendered.settings()["server"]["grace_period"].as_str(), Some("115s"));
}

/// The files of every setting are mounted, from the Secret that is named, as a directory; and who asks in the pod, or as `helm test`, is told
/// of the CA.
#[test]
fn certificates_come_from_secrets_and_are_where_the_settings_look() {
    let Some(helm) = require(&HELM) else { return };
    for (values, mode, ca) in [(TLS_SECRETS, "files", "ca.crt"), (TLS_AUTO, "auto", "tls.crt")] {
        let rendered = Rendered::new(&helm, values);
        let (pod, settings) = (&rendered.pod()["spec"], rendered.settings());
        let container = &pod["containers"][0];
        for (section, secret) in [("client", "c"), ("peer", "p")] {
            let keys = settings[&format!("{section}_tls")].as_table().expect("a section is a table");
            assert_eq!(keys["mode"].as_str(), Some(mode));
            let dir = format!("/etc/quorate-tls/{section}");
            let files: Vec<_> = keys.iter().filter(|(key, _)| key.ends_with("_file")).collect();
            assert!(files.len() >= 2, "{keys:?}");
            for (key, path) in files {
                assert!(path.as_str().is_some_and(|path| path.starts_with(&dir)), "{key} {path}");
            }
            let volume =
                json!({"name": format!("tls-{section}"), "secret": {"secretName": secret, "defaultMode": 0o440}});
            assert!(pod["volumes"].as_array().expect("volumes").contains(&volume), "{}", pod["volumes"]);
            let mount = json!({"name": format!("tls-{section}"), "mountPath": dir, "readOnly": true});
            assert!(container["volumeMounts"].as_array().expect("mounts").contains(&mount), "{container}");
        }
        let path = format!("/etc/quorate-tls/client/{ca}");
        assert!(container["env"].as_array().expect("env").contains(&json!({"name": "QUORATE_CACERT", "value": path})));
        let test = &rendered.find("Pod", "kv-quorate-test")["spec"];
        let env = test["containers"][0]["env"].as_array().expect("env");
        assert_eq!(env[0]["value"], "https://kv-quorate.data.svc:2379");
        assert_eq!(env[1], json!({"name": "QUORATE_CACERT", "value": path}));
        assert_eq!(env.len(), if mode == "files" { 4 } else { 2 });
        assert_eq!(test["volumes"][0]["secret"]["items"], json!([{"key": ca, "path": ca}]), "no key is mounted");
        // A Secret that is named anew is mounted by new pods.
        let other = Rendered::new(&helm, &values.replace("secret: c", "secret: d"));
        assert_ne!(rendered.pod()["metadata"]["annotations"], other.pod()["metadata"]["annotations"]);
    }
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
    assert_eq!(container["env"][2], json!({"name": "RUST_BACKTRACE", "value": "1"}));
    assert_eq!(container["envFrom"], json!([{"secretRef": {"name": "more"}}]));
    assert_eq!(container["volumeMounts"][2], json!({"name": "scratch", "mountPath": "/scratch"}));
    assert_eq!(container["startupProbe"]["failureThreshold"], 900);
    assert_eq!(pod["volumes"][1]["name"], "scratch");
    assert_eq!(pod["containers"][1], json!({"name": "side", "image": "side:1"}));
    assert_eq!((&pod["schedulerName"], &pod["runtimeClassName"]), (&json!("own"), &json!("gvisor")));
    assert_eq!(pod["topologySpreadConstraints"][2]["topologyKey"], "rack");
    assert_eq!(set["metadata"]["labels"]["cost"], "center");
    assert_eq!(set["spec"]["ordinals"]["start"], 3);
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["partition"], 4);
    assert_eq!(set["spec"]["persistentVolumeClaimRetentionPolicy"]["whenScaled"], "Delete");
    assert_eq!(rendered.find("Secret", "kv-more")["stringData"]["a"], "b");
    assert_eq!(rendered.find("ServiceAccount", "store")["metadata"]["annotations"]["role"], "reader");
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
    assert_eq!(set["spec"]["volumeClaimTemplates"][0]["metadata"]["annotations"]["backup"], "daily");
    assert_eq!(claim["resources"]["requests"]["storage"], "100Gi");
    let service = rendered.find("Service", "store");
    assert_eq!(service["spec"]["type"], "LoadBalancer");
    assert_eq!(service["spec"]["ports"][0]["port"], 12379);
    assert_eq!(service["metadata"]["annotations"], json!({"team": "core", "owner": "us"}));
    assert_eq!(container["lifecycle"], json!({"preStop": {"sleep": {"seconds": 2}}}));
    assert_eq!(pod["initContainers"], json!([{"name": "first", "image": "first:1"}]));

    let settings = rendered.settings();
    assert_eq!(settings["raft"]["heartbeat_interval"].as_str(), Some("200ms"));
    assert_eq!(settings["raft"]["queue_requests_max"].as_integer(), Some(1_048_576), "whole numbers stay whole");
    assert_eq!(settings["http"]["cors"][1].as_str(), Some("b\"<c>"));
    let server = settings["server"].as_table().expect("a section is a table");
    assert!(!server.contains_key("listen_client"), "null takes a setting away");
    assert_eq!(server["listen_peer"].as_str(), Some("[::]:2380"), "the rest of its section stays, for both families");
    assert_eq!(settings["cluster"]["first_slot"].as_integer(), Some(3));
    assert_eq!(settings["kubernetes"]["poll_interval"].as_str(), Some("1s"));
    assert_eq!(settings["kubernetes"]["stateful_set"].as_str(), Some("store"));
    assert_eq!(settings["cluster"]["peers"].as_str(), Some("store-%d.store-headless.data.svc:2380"));
}

#[test]
fn options_of_networks_reach_their_places() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, ALL_VALUES);
    let (service, pod) = (rendered.find("Service", "store"), &rendered.pod()["spec"]);
    assert_eq!(service["metadata"]["labels"]["lb"], "external");
    let given = &service["spec"];
    assert_eq!(
        (&given["ports"][0]["nodePort"], &given["loadBalancerClass"]),
        (&json!(30379), &json!("example.org/lb"))
    );
    assert_eq!(given["loadBalancerSourceRanges"], json!(["10.0.0.0/8"]));
    assert_eq!((&given["externalTrafficPolicy"], &given["internalTrafficPolicy"]), (&json!("Local"), &json!("Local")));
    for name in ["store", "store-headless", "store-readers"] {
        let families = &rendered.find("Service", name)["spec"];
        assert_eq!(families["ipFamilyPolicy"], "PreferDualStack", "{name}");
        assert_eq!(families["ipFamilies"], json!(["IPv6", "IPv4"]), "{name}");
    }
    let route = rendered.find("Ingress", "store");
    assert_eq!(
        (&route["spec"]["ingressClassName"], &route["spec"]["tls"]),
        (&json!("nginx"), &json!([{"secretName": "web"}]))
    );
    assert_eq!(route["spec"]["rules"][0]["host"], "kv.example.org");
    let route = rendered.find("GRPCRoute", "store");
    assert_eq!(route["metadata"]["annotations"], json!({"c": "d", "owner": "us"}));
    assert_eq!(route["spec"]["backendRefs"], Value::Null);
    assert_eq!(route["spec"]["rules"][0]["backendRefs"], json!([{"name": "store", "port": 12379}]));
    assert_eq!(pod["securityContext"].get("runAsUser"), None, "OpenShift gives one");
    let readers = &rendered.find("Deployment", "store-readers")["spec"]["template"]["spec"];
    for spec in [pod, readers, &rendered.find("Pod", "store-test")["spec"]] {
        assert_eq!(spec["hostAliases"], json!([{"ip": "10.0.0.9", "hostnames": ["other"]}]));
        assert_eq!(
            (&spec["dnsPolicy"], &spec["dnsConfig"]["options"][0]["name"]),
            (&json!("Default"), &json!("ndots"))
        );
    }
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
        ("persistence: {whenScaled: Keep}", "persistence/whenScaled"),
        ("replicaCount: -1", "replicaCount"),
        ("firstOrdinal: x", "firstOrdinal"),
        ("config: {cluster: {first_slot: 1}}", "set firstOrdinal"),
        ("config: {kubernetes: {stateful_set: x}}", "set kubernetesApi.enabled"),
        ("spread: {zone: Always}", "spread/zone"),
        ("networkPolicy: {apiServerPorts: [0]}", "apiServerPorts"),
        ("readers: {count: 3}", "count"),
        ("probes: {startup: {period: 1}}", "period"),
        ("extraEnv: [{value: x}]", "extraEnv"),
        ("resources: {limits: {memory: lots}}", "memory"),
        ("service: {port: 70000}", "service/port"),
        ("tls: {client: {mode: \"on\"}}", "tls/client/mode"),
        ("tls: {client: {mode: auto}}", "tls.client.secret is needed here: without a look into a cluster"),
        ("tls: {peer: {mode: auto}}", "tls.peer.secret is needed here"),
        ("tls: {peer: {mode: certManager}}", "tls.peer.issuerRef.name is needed"),
        ("tls: {client: {mode: certManager, secret: s, issuerRef: {name: i}}}", "tls.client.secret has no use"),
        ("config: {peer_tls: {mode: auto}}", "set tls.peer.mode"),
        ("podLabels: {app.kubernetes.io/name: x}", "podLabels may not have app.kubernetes.io/name"),
        ("readers: {podLabels: {app.kubernetes.io/instance: x}}", "readers.podLabels may not have"),
        ("commonLabels: {app.kubernetes.io/version: x}", "commonLabels may not have"),
        ("podAnnotations: {checksum/settings: x}", "podAnnotations may not have"),
        ("readers: {autoscaling: {minReplicas: 11}}", "minReplicas is 11, expected at most maxReplicas, 10"),
        ("fullnameOverride: 3kv", "expected a name that begins with a letter"),
        ("config: {server: {listen_client: \"0.0.0.0:2378\"}}", "expected port 2379"),
        ("config: {server: {listen_client: \"unix:/a,0.0.0.0:1\"}}", "expected port 2379"),
        ("config: {server: {listen_status: \"off\"}}", "expected port 2381"),
        ("config: {server: {data_dir: /data}}", "below /var/lib/quorate"),
        ("config: {server: {grace_period: 2m}}", "fewer than terminationGracePeriodSeconds"),
        ("config: {server: {grace_period: 120s}}", "fewer than terminationGracePeriodSeconds"),
        ("config: {server: {advertise_peer: \"a:1\"}}", "config.server.advertise_peer is not for values"),
        ("config: {identity: {name: kv-0}}", "config.identity.name is not for values"),
        (
            "extraEnv: [{name: QUORATE_SERVER__LISTEN_PEER, value: x}]",
            "extraEnv may not have QUORATE_SERVER__LISTEN_PEER",
        ),
        ("extraEnv: [{name: POD_NAME, value: x}]", "extraEnv may not have POD_NAME"),
        ("extraVolumes: [{name: data, emptyDir: {}}]", "extraVolumes may not have data"),
        ("extraVolumeMounts: [{name: x, mountPath: /etc/quorate/}]", "extraVolumeMounts may not have /etc/quorate/"),
        ("initContainers: [{name: quorate}]", "may not have quorate"),
        ("ingress: {enabled: true}", "ingress.hosts is empty"),
        ("grpcRoute: {enabled: true}", "grpcRoute.parentRefs is empty"),
        ("service: {nodePort: 30000}", "service.nodePort needs"),
        ("service: {loadBalancerClass: x}", "need service.type LoadBalancer"),
        ("service: {externalTrafficPolicy: Local}", "service.externalTrafficPolicy needs"),
        ("monitoring: {serviceMonitor: {interval: often}}", "interval"),
        ("tls: {peer: {mode: secret}}", "tls.peer.secret is needed"),
        ("tls: {client: {clientCert: required}}", "needs tls.client.mode"),
        (
            "tls: {peer: {mode: secret, secret: p}}\nreaders: {enabled: true}",
            "readers.enabled cannot go with tls.peer.mode",
        ),
    ] {
        let output = template(&helm, values).output().expect("helm runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{values} was accepted");
        assert!(errors.contains(want), "{values}: {errors}");
    }
}
