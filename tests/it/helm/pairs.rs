//! Values of the chart with one another: every option of each with every option of each other one, and what must hold of whatever comes out.
//!
//! Owns the options, the rows that hold all pairs of them, and the rules. Invariant: the rows are made from a fixed seed, so a failure is the
//! same again. Absent: what single values do (beside this file).

use std::collections::BTreeSet;

use serde_json::Value;

use super::objects::faults;
use super::{KUBERNETES, Rendered, values_file};
use crate::support::tools::{HELM, require, run};

/// What of one kind of value is taken with all others: one option of each line. An empty one is the default.
const OPTIONS: &[&[&str]] = &[
    &["", "replicaCount: 1", "replicaCount: null", "replicaCount: 0"],
    &[
        "",
        "tls: {client: {mode: auto, secret: c, clientCert: optional}}",
        "tls: {client: {mode: secret, secret: c, clientCert: required, testSecret: t}}",
        "tls: {client: {mode: certManager, issuerRef: {name: clients}, clientCert: required}}",
    ],
    &[
        "",
        "tls: {peer: {mode: auto, secret: p}}",
        "tls: {peer: {mode: secret, secret: p}}",
        "tls: {peer: {mode: certManager, issuerRef: {name: peers, kind: ClusterIssuer}}}",
    ],
    &["", "readers: {enabled: true}", "readers: {enabled: true, autoscaling: {enabled: true}, podLabels: {x: z}}"],
    &[
        "",
        "service: {type: NodePort, nodePort: 30079, externalTrafficPolicy: Local, internalTrafficPolicy: Local}",
        "service: {type: LoadBalancer, port: 443, loadBalancerSourceRanges: [10.0.0.0/8], loadBalancerClass: x/y, \
         labels: {a: b}, annotations: {c: d}}",
        "service: {ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv4, IPv6]}",
        "service: {ipFamilies: [IPv6]}",
    ],
    &[
        "",
        "kubernetesApi: {enabled: false}",
        "serviceAccount: {name: mine}",
        "{rbac: {create: false}, serviceAccount: {annotations: {a: b}}}",
    ],
    &[
        "",
        "networkPolicy: {enabled: false}",
        "networkPolicy: {clients: [{podSelector: {}}], monitoring: [{namespaceSelector: {}}], restrictEgress: true}",
    ],
    &["", "{spread: {zone: \"\", node: \"\"}, podDisruptionBudget: {enabled: false}}"],
    &["", "openshift: {enabled: true}"],
    &[
        "",
        "monitoring: {serviceMonitor: {enabled: true, labels: {release: prom}}, prometheusRule: {enabled: true, disabled: \
         [QuorateEvenVoters], alertLabels: {team: core}}, dashboard: {enabled: true}}",
        "monitoring: {podMonitor: {enabled: true, metricRelabelings: [{action: drop, sourceLabels: [le], regex: x}]}, \
         prometheusRule: {enabled: true, extraRules: [{record: a, expr: b}]}}",
    ],
    &[
        "",
        "{ingress: {enabled: true, className: nginx, hosts: [kv.example], tls: [{secretName: t, hosts: [kv.example]}]}, \
         grpcRoute: {enabled: true, parentRefs: [{name: gateway}], hostnames: [kv.example]}}",
    ],
    &[
        "",
        "{commonLabels: {cost: center}, commonAnnotations: {owner: us}, podLabels: {tier: data}, podAnnotations: {a: b}}",
    ],
    &[
        "",
        "{hostAliases: [{ip: 10.0.0.1, hostnames: [a]}], dnsPolicy: None, dnsConfig: {nameservers: [10.0.0.2]}, \
         lifecycle: {preStop: {sleep: {seconds: 1}}}, extraEnv: [{name: A, value: b}], extraEnvFrom: [{configMapRef: {name: e}}], \
         extraVolumes: [{name: scratch, emptyDir: {}}], extraVolumeMounts: [{name: scratch, mountPath: /scratch}]}",
        "{initContainers: [{name: before, image: b, securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: \
         [ALL]}}}], extraContainers: [{name: beside, image: b, securityContext: {allowPrivilegeEscalation: false, capabilities: \
         {drop: [ALL]}}}]}",
    ],
    &[
        "",
        "{backup: {url: \"s3://backups/kv\", credentialsSecret: s, keySecret: k, caSecret: c}, restore: {from: \"s3://backups/kv@7\"}}",
        "backup: {url: \"gs://backups/kv\", interval: 1m, fullEvery: 12h}",
    ],
    &["", "config: {raft: {heartbeat_interval: 120ms}, cluster: {max_voters: 3}}"],
    &["", "fullnameOverride: store", "{nameOverride: store, firstOrdinal: 4, terminationGracePeriodSeconds: 40}"],
    &["", "persistence: {storageClass: fast, annotations: {a: b}, whenDeleted: Delete, whenScaled: Delete}"],
];

/// What cannot go together, by words of the options: refused by the chart, which another test sees.
fn fits(row: &[usize]) -> bool {
    let has = |words: &str| row.iter().zip(OPTIONS).any(|(choice, options)| options[*choice].contains(words));
    !(has("readers: {") && (has("peer: {mode: secret") || has("peer: {mode: certManager")))
}

type Pair = (usize, usize, usize, usize);

fn pairs_of(row: &[usize]) -> impl Iterator<Item = Pair> + '_ {
    (0..row.len()).flat_map(move |a| (a + 1..row.len()).map(move |b| (a, row[a], b, row[b])))
}

/// Rows with an option of each line, which hold every pair that fits.
fn rows() -> Vec<Vec<usize>> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut open: BTreeSet<Pair> = BTreeSet::new();
    for (a, of_a) in OPTIONS.iter().enumerate() {
        for (b, of_b) in OPTIONS.iter().enumerate().skip(a + 1) {
            open.extend((0..of_a.len()).flat_map(|x| (0..of_b.len()).map(move |y| (a, x, b, y))));
        }
    }
    // Pairs that never fit, whatever the rest is.
    open.retain(|&(a, x, b, y)| {
        let mut row = vec![0; OPTIONS.len()];
        (row[a], row[b]) = (x, y);
        fits(&row)
    });
    let mut rows = Vec::new();
    while let Some(&(a, x, b, y)) = open.first() {
        let candidates = (0..200).map(|_| {
            let mut row: Vec<usize> = OPTIONS.iter().map(|options| random.usize(..options.len())).collect();
            (row[a], row[b]) = (x, y);
            row
        });
        let covered = |row: &Vec<usize>| pairs_of(row).filter(|pair| open.contains(pair)).count();
        let best = candidates.filter(|row| fits(row)).max_by_key(covered).expect("the rest by default fits");
        for pair in pairs_of(&best) {
            open.remove(&pair);
        }
        rows.push(best);
    }
    rows
}

fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The workloads: what makes pods, and the pods that it makes.
fn pods(rendered: &Rendered) -> Vec<(&Value, &Value)> {
    let templates = rendered.kinds(&["StatefulSet", "Deployment"]).into_iter().map(|o| (o, &o["spec"]["template"]));
    templates.chain(rendered.kinds(&["Pod"]).into_iter().map(|pod| (pod, pod))).collect()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(pod, "/spec/initContainers").iter().chain(list(pod, "/spec/containers"))
}

fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_object().is_some_and(|wanted| wanted.iter().all(|(key, value)| labels[key] == *value))
}

/// Pod Security Standards, `restricted`: https://kubernetes.io/docs/concepts/security/pod-security-standards/
fn is_restricted(pod: &Value) -> Result<(), String> {
    const VOLUMES: [&str; 8] =
        ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];
    let spec = &pod["spec"];
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        if spec[shared] == true {
            return Err(shared.to_owned());
        }
    }
    for volume in list(pod, "/spec/volumes") {
        if !volume.as_object().unwrap().keys().all(|key| key == "name" || VOLUMES.contains(&&key[..])) {
            return Err(format!("volume {volume}"));
        }
    }
    for container in containers(pod) {
        let (own, shared) = (&container["securityContext"], &spec["securityContext"]);
        let either = |path: &str| own.pointer(path).or_else(|| shared.pointer(path)).cloned().unwrap_or(Value::Null);
        let is_right = own["allowPrivilegeEscalation"] == false
            && list(own, "/capabilities/drop").contains(&"ALL".into())
            && list(own, "/capabilities/add").is_empty()
            && either("/runAsNonRoot") == true
            && either("/runAsUser") != 0
            && either("/seccompProfile/type") == "RuntimeDefault"
            && list(container, "/ports").iter().all(|port| port.get("hostPort").is_none());
        if !is_right {
            return Err(format!("container {container}"));
        }
    }
    Ok(())
}

/// Every settings file of these objects is one with which the server starts.
pub(super) fn server_accepts(rendered: &Rendered) {
    for map in rendered.kinds(&["ConfigMap"]) {
        let Some(text) = map["data"]["quorate.toml"].as_str() else { continue };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("quorate.toml");
        std::fs::write(&file, text).unwrap();
        run(std::process::Command::new(crate::support::cluster::binary()).args(["config", "--config"]).arg(&file));
    }
}

/// What holds of the pods.
fn check_pods(rendered: &Rendered) {
    for (object, pod) in pods(rendered) {
        let name = &object["metadata"]["name"];
        is_restricted(pod).unwrap_or_else(|fault| panic!("{name} is not restricted: {fault}"));
        let volumes: BTreeSet<&str> = list(pod, "/spec/volumes")
            .iter()
            .map(|volume| volume["name"].as_str().unwrap())
            .chain(list(object, "/spec/volumeClaimTemplates").iter().map(|c| c["metadata"]["name"].as_str().unwrap()))
            .collect();
        let mut names = BTreeSet::new();
        for container in containers(pod) {
            assert!(names.insert(container["name"].as_str().unwrap()), "{name}: two of {}", container["name"]);
            let mut places = BTreeSet::new();
            for mount in list(container, "/volumeMounts") {
                assert!(volumes.contains(mount["name"].as_str().unwrap()), "{name}: {mount} is no volume");
                assert!(places.insert(mount["mountPath"].as_str().unwrap()), "{name}: {mount} is mounted on another");
            }
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                let Some(port) = container.pointer(&format!("/{probe}/httpGet/port")) else { continue };
                assert!(list(container, "/ports").iter().any(|one| one["name"] == *port), "{name}: {probe} {port}");
            }
        }
        if let Some(selector) = object.pointer("/spec/selector/matchLabels") {
            assert!(selects(selector, &pod["metadata"]["labels"]), "{name} does not select its own pods");
        }
    }
}

/// What holds of the objects that mean others.
fn check_references(rendered: &Rendered) {
    let all = pods(rendered);
    for service in rendered.kinds(&["Service"]) {
        let (selector, ports) = (&service["spec"]["selector"], list(service, "/spec/ports"));
        let meant: Vec<_> = all.iter().filter(|(_, pod)| selects(selector, &pod["metadata"]["labels"])).collect();
        assert_eq!(meant.len(), 1, "{} means one workload", service["metadata"]["name"]);
        let open = list(meant[0].1, "/spec/containers/0/ports");
        for port in ports {
            assert!(
                open.iter().any(|one| one["name"] == port["targetPort"]),
                "{port} of {}",
                service["metadata"]["name"]
            );
        }
    }
    for budget in rendered.kinds(&["PodDisruptionBudget"]) {
        let selector = budget.pointer("/spec/selector/matchLabels").unwrap();
        let meant = all.iter().filter(|(_, pod)| selects(selector, &pod["metadata"]["labels"])).count();
        assert_eq!(meant, 1);
    }
    for scaler in rendered.kinds(&["HorizontalPodAutoscaler"]) {
        let target = &scaler["spec"]["scaleTargetRef"];
        rendered.find(target["kind"].as_str().unwrap(), target["name"].as_str().unwrap());
    }
    let service_of = |reference: &Value| rendered.find("Service", reference["name"].as_str().unwrap());
    for ingress in rendered.kinds(&["Ingress"]) {
        let backend = ingress.pointer("/spec/rules/0/http/paths/0/backend/service").unwrap();
        let ports = list(service_of(backend), "/spec/ports");
        assert!(ports.iter().any(|port| port["name"] == backend["port"]["name"]), "{backend}");
    }
    for route in rendered.kinds(&["GRPCRoute"]) {
        let backend = route.pointer("/spec/rules/0/backendRefs/0").unwrap();
        assert!(
            list(service_of(backend), "/spec/ports").iter().any(|port| port["port"] == backend["port"]),
            "{backend}"
        );
    }
    for monitor in rendered.kinds(&["ServiceMonitor"]) {
        let wanted = monitor.pointer("/spec/selector/matchLabels").unwrap();
        let services = rendered.kinds(&["Service"]);
        let components = list(monitor, "/spec/selector/matchExpressions/0/values");
        let labels = |service: &Value| service["metadata"]["labels"].clone();
        let seen = services.iter().filter(|service| {
            selects(wanted, &labels(service)) && components.contains(&labels(service)["app.kubernetes.io/component"])
        });
        let seen: Vec<_> = seen.collect();
        assert_eq!(seen.len(), all.len() - 1, "all workloads but the test's pod are scraped");
        for service in seen {
            assert!(list(service, "/spec/ports").iter().any(|port| port["name"] == "status"), "{service}");
        }
    }
}

#[test]
fn every_value_goes_with_every_other() {
    let Some(helm) = require(&HELM) else { return };
    let rows = rows();
    for row in &rows {
        let chosen: Vec<&str> = row.iter().zip(OPTIONS).map(|(choice, options)| options[*choice]).collect();
        let mut command = std::process::Command::new(&helm);
        command.args(["template", "kv", super::CHART, "--namespace", "data", "--kube-version", KUBERNETES]);
        for kind in ["ServiceMonitor", "PodMonitor", "PrometheusRule"] {
            command.arg("--api-versions").arg(format!("monitoring.coreos.com/v1/{kind}"));
        }
        for values in chosen.iter().filter(|values| !values.is_empty()) {
            command.arg("--values").arg(values_file(values));
        }
        let rendered = Rendered::of(&run(&mut command));
        let mut names = BTreeSet::new();
        for object in &rendered.0 {
            let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
            assert_eq!(faults(object), Vec::<String>::new(), "{name} of {chosen:#?}");
            assert!(names.insert(name.clone()), "{name} is there twice with {chosen:#?}");
            assert!(object["metadata"]["name"].as_str().unwrap().len() < 64, "{name}");
            let has = |words: &str| chosen.iter().any(|values| values.contains(words));
            if has("commonAnnotations") {
                assert_eq!(object["metadata"]["annotations"]["owner"], "us", "{name}");
                assert_eq!(object["metadata"]["labels"]["cost"], "center", "{name}");
            }
        }
        check_pods(&rendered);
        check_references(&rendered);
        server_accepts(&rendered);
    }
    println!("{} rows", rows.len());
}

#[test]
fn rows_hold_every_pair_and_rules_find_faults() {
    let rows = rows();
    let held: BTreeSet<Pair> = rows.iter().flat_map(|row| pairs_of(row).collect::<Vec<_>>()).collect();
    let (last, least) = (OPTIONS.len() - 1, OPTIONS[1].len() * OPTIONS[2].len());
    assert_eq!(held.iter().filter(|(a, _, b, _)| (*a, *b) == (1, 2)).count(), least, "all modes of both ports");
    assert!(held.contains(&(0, 3, last, 1)) && rows.iter().all(|row| fits(row)));
    let pod = |context: Value| serde_json::json!({"spec": {"containers": [{"name": "c", "securityContext": context}]}});
    assert!(is_restricted(&pod(serde_json::json!({"allowPrivilegeEscalation": true}))).is_err());
}
