//! Every object that the chart renders, read with Kubernetes' own types.
//!
//! Invariant: a field that a type does not know would vanish on the way, so what comes out must be what went in. Absent: what the
//! API server checks beyond types (immutable fields, names that must exist).

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::{Ingress, NetworkPolicy};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ALL_VALUES, MINIMAL_VALUES, Rendered};
use crate::support::tools::{HELM, require};

/// An object of a kind that Kubernetes has not by itself; of its spec as much as the chart may use.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Custom<T> {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: T,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Names {
    match_names: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Relabeling {
    #[serde(default)]
    source_labels: Vec<String>,
    target_label: Option<String>,
    regex: Option<String>,
    replacement: Option<String>,
    action: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Scraped {
    port: String,
    interval: String,
    relabelings: Vec<Relabeling>,
    #[serde(default)]
    metric_relabelings: Vec<Relabeling>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceMonitor {
    selector: LabelSelector,
    namespace_selector: Names,
    endpoints: Vec<Scraped>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodMonitor {
    selector: LabelSelector,
    namespace_selector: Names,
    pod_metrics_endpoints: Vec<Scraped>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrometheusRule {
    groups: Vec<RuleGroup>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleGroup {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    alert: Option<String>,
    record: Option<String>,
    expr: String,
    r#for: Option<String>,
    #[serde(default)]
    labels: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    name: String,
    port: Option<u16>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GrpcRoute {
    parent_refs: Vec<Reference>,
    #[serde(default)]
    hostnames: Vec<String>,
    rules: Vec<GrpcRouteRule>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GrpcRouteRule {
    backend_refs: Vec<Reference>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Certificate {
    secret_name: String,
    issuer_ref: IssuerReference,
    common_name: String,
    dns_names: Vec<String>,
    usages: Vec<String>,
    private_key: PrivateKey,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IssuerReference {
    name: String,
    kind: String,
    group: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PrivateKey {
    algorithm: String,
    size: u16,
    rotation_policy: String,
}

/// What of `object` its type does not take; empty if all is well.
pub(super) fn faults(object: &Value) -> Vec<String> {
    let (version, kind) = (object["apiVersion"].as_str().unwrap_or(""), object["kind"].as_str().unwrap_or(""));
    let through = match (version, kind) {
        ("apps/v1", "StatefulSet") => through::<StatefulSet>,
        ("apps/v1", "Deployment") => through::<Deployment>,
        ("autoscaling/v2", "HorizontalPodAutoscaler") => through::<HorizontalPodAutoscaler>,
        ("v1", "ConfigMap") => through::<ConfigMap>,
        ("v1", "Pod") => through::<Pod>,
        ("v1", "Secret") => through::<Secret>,
        ("v1", "Service") => through::<Service>,
        ("v1", "ServiceAccount") => through::<ServiceAccount>,
        ("networking.k8s.io/v1", "NetworkPolicy") => through::<NetworkPolicy>,
        ("networking.k8s.io/v1", "Ingress") => through::<Ingress>,
        ("monitoring.coreos.com/v1", "ServiceMonitor") => through::<Custom<ServiceMonitor>>,
        ("monitoring.coreos.com/v1", "PodMonitor") => through::<Custom<PodMonitor>>,
        ("monitoring.coreos.com/v1", "PrometheusRule") => through::<Custom<PrometheusRule>>,
        ("gateway.networking.k8s.io/v1", "GRPCRoute") => through::<Custom<GrpcRoute>>,
        ("cert-manager.io/v1", "Certificate") => through::<Custom<Certificate>>,
        ("policy/v1", "PodDisruptionBudget") => through::<PodDisruptionBudget>,
        ("rbac.authorization.k8s.io/v1", "Role") => through::<Role>,
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => through::<RoleBinding>,
        _ => return vec![format!("nobody here knows {version} {kind}")],
    };
    match through(object) {
        Err(fault) => vec![fault],
        Ok(back) => differences(kind, &pruned(object), &pruned(&back)),
    }
}

fn through<T: Serialize + DeserializeOwned>(object: &Value) -> Result<Value, String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|fault| fault.to_string())?;
    serde_json::to_value(typed).map_err(|fault| fault.to_string())
}

/// Without what means nothing: null, and empty maps and lists.
fn pruned(value: &Value) -> Value {
    let is_something = |value: &Value| match value {
        Value::Null => false,
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    };
    match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, inner)| (key.clone(), pruned(inner)))
            .filter(|(_, inner)| is_something(inner))
            .collect(),
        Value::Array(list) => list.iter().map(pruned).collect(),
        other => other.clone(),
    }
}

fn differences(path: &str, given: &Value, back: &Value) -> Vec<String> {
    match (given, back) {
        (Value::Object(given), Value::Object(back)) => {
            let all: std::collections::BTreeSet<&String> = given.keys().chain(back.keys()).collect();
            let of = |map: &serde_json::Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or(Value::Null);
            all.into_iter()
                .flat_map(|key| differences(&format!("{path}.{key}"), &of(given, key), &of(back, key)))
                .collect()
        }
        (Value::Array(given), Value::Array(back)) if given.len() == back.len() => {
            let pairs = given.iter().zip(back).enumerate();
            pairs.flat_map(|(i, (given, back))| differences(&format!("{path}[{i}]"), given, back)).collect()
        }
        _ if given == back => Vec::new(),
        _ => vec![format!("{path}: {given} is given, {back} is understood")],
    }
}

#[test]
fn every_object_is_one_that_kubernetes_knows() {
    let Some(helm) = require(&HELM) else { return };
    for (values, least) in [("", 9), (MINIMAL_VALUES, 5), (ALL_VALUES, 16)] {
        let rendered = Rendered::new(&helm, values);
        assert!(rendered.0.len() >= least, "{} objects of {values:?}", rendered.0.len());
        let mut names = std::collections::BTreeSet::new();
        for object in &rendered.0 {
            let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
            assert_eq!(faults(object), Vec::<String>::new(), "{name}");
            assert!(names.insert(name.clone()), "{name} is rendered twice");
        }
    }
}

#[test]
fn unknown_field_and_wrong_type_are_found() {
    let pod =
        |spec: Value| serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec});
    assert!(faults(&pod(serde_json::json!({"containers": [{"name": "c", "image": "i"}]}))).is_empty());
    let unknown = faults(&pod(serde_json::json!({"containers": [{"name": "c", "imagePullPolice": "Always"}]})));
    assert!(unknown[0].contains("Pod.spec.containers[0].imagePullPolice"), "{unknown:?}");
    let wrong = faults(&pod(serde_json::json!({"containers": [], "hostNetwork": "yes"})));
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert_eq!(faults(&serde_json::json!({"apiVersion": "v1", "kind": "Pot"})), ["nobody here knows v1 Pot"]);
}
