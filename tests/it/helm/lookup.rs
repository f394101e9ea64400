//! What the chart does with what it sees in a cluster: the size that the StatefulSet has, and the CAs that it has made.
//!
//! Owns a cluster that Helm takes for one: it answers discovery, and shows a few objects. Absent: installing; Helm is asked what it would do.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{CHART, Rendered, values_file};
use crate::support::cluster::{Cluster, http_get};
use crate::support::tools::{HELM, require};

/// The kinds of objects that the chart makes, and looks at, by group.
const KINDS: &[(&str, &[(&str, &str)])] = &[
    (
        "",
        &[
            ("ConfigMap", "configmaps"),
            ("Namespace", "namespaces"),
            ("Pod", "pods"),
            ("Secret", "secrets"),
            ("Service", "services"),
            ("ServiceAccount", "serviceaccounts"),
        ],
    ),
    ("apps", &[("Deployment", "deployments"), ("StatefulSet", "statefulsets")]),
    ("networking.k8s.io", &[("NetworkPolicy", "networkpolicies")]),
    ("policy", &[("PodDisruptionBudget", "poddisruptionbudgets")]),
    ("rbac.authorization.k8s.io", &[("Role", "roles"), ("RoleBinding", "rolebindings")]),
];

/// Objects by their paths.
type Objects = BTreeMap<String, Value>;

async fn answer(State(objects): State<Objects>, request: Request) -> Response {
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let versions = |group: &str| json!({"groupVersion": format!("{group}/v1"), "version": "v1"});
    let resources = |group: &str, kinds: &[(&str, &str)]| {
        let one = |(kind, name): &(&str, &str)| json!({"name": name, "singularName": "", "kind": kind, "namespaced": *kind != "Namespace", "verbs": ["get"]});
        let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
        json!({"kind": "APIResourceList", "groupVersion": version, "resources": kinds.iter().map(one).collect::<Vec<_>>()})
    };
    let found = match &path[..] {
        "/version" => Some(json!({"major": "1", "minor": "30", "gitVersion": "v1.30.0"})),
        "/api" => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        "/apis" => {
            let group = |(name, _): &(&str, _)| json!({"name": name, "versions": [versions(name)], "preferredVersion": versions(name)});
            Some(json!({"kind": "APIGroupList", "groups": KINDS[1..].iter().map(group).collect::<Vec<_>>()}))
        }
        path if path.ends_with("/secrets") => Some(json!({"kind": "SecretList", "apiVersion": "v1", "items": []})),
        path => objects.get(path).cloned().or_else(|| {
            KINDS
                .iter()
                .find(
                    |(group, _)| if group.is_empty() { path == "/api/v1" } else { path == format!("/apis/{group}/v1") },
                )
                .map(|(group, kinds)| resources(group, kinds))
        }),
    };
    let (code, body) = match found {
        Some(body) => (StatusCode::OK, body),
        None => (
            StatusCode::NOT_FOUND,
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404, "message": path}),
        ),
    };
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// What `helm install` would install into a cluster that holds `objects`: or why it refuses.
async fn install(helm: &Path, objects: &Objects, values: &str) -> Result<Rendered, String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(answer).with_state(objects.clone());
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(helm);
    command.args(["install", "kv", CHART, "--namespace", "data", "--dry-run=server", "--disable-openapi-validation"]);
    command.args(["--output", "json", "--kube-apiserver", &format!("http://{address}")]);
    command.arg("--values").arg(values_file(values)).env("HOME", home.path()).env_remove("KUBECONFIG");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    server.abort();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let release: Value = serde_json::from_slice(&output.stdout).unwrap();
    Ok(Rendered::of(release["manifest"].as_str().unwrap()))
}

/// A namespace as Kubernetes makes it.
fn namespace() -> Objects {
    let account =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "data"}});
    Objects::from([("/api/v1/namespaces/data/serviceaccounts/default".to_owned(), account)])
}

/// As Helm marks what it has installed.
fn installed(mut object: Value) -> Value {
    object["metadata"]["namespace"] = "data".into();
    object["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "Helm".into();
    object["metadata"]["annotations"]["meta.helm.sh/release-name"] = "kv".into();
    object["metadata"]["annotations"]["meta.helm.sh/release-namespace"] = "data".into();
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_that_is_not_given_is_the_one_that_is() {
    let Some(helm) = require(&HELM) else { return };
    let mut objects = namespace();
    let first = install(&helm, &objects, "replicaCount: null").await.unwrap();
    assert_eq!(first.stateful_set()["spec"]["replicas"], 3);
    let mut set = first.stateful_set().clone();
    set["spec"]["replicas"] = 7.into();
    objects.insert("/apis/apps/v1/namespaces/data/statefulsets/kv-quorate".into(), installed(set));
    let scaled = install(&helm, &objects, "replicaCount: null").await.unwrap();
    assert_eq!(scaled.stateful_set()["spec"]["replicas"], 7);
    assert_eq!(scaled.settings()["cluster"]["size"].as_integer(), Some(7));
    assert_eq!(scaled.pod(), first.pod(), "no pod restarts for it");
    let given = install(&helm, &objects, "replicaCount: 5").await.unwrap();
    assert_eq!(given.stateful_set()["spec"]["replicas"], 5);
}

/// The CA is made once, stays through upgrades and uninstallations, and is one that members use and clients trust.
#[tokio::test(flavor = "multi_thread")]
async fn the_chart_makes_a_ca_once_and_members_serve_with_it() {
    const VALUES: &str = "{tls: {client: {mode: auto}, peer: {mode: auto}}, readers: {enabled: true}}";
    let Some(helm) = require(&HELM) else { return };
    let mut objects = namespace();
    let first = install(&helm, &objects, VALUES).await.unwrap();
    for port in ["client", "peer"] {
        let name = format!("kv-quorate-{port}-ca");
        let secret = first.find("Secret", &name);
        assert_eq!(secret["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
        objects.insert(format!("/api/v1/namespaces/data/secrets/{name}"), installed(secret.clone()));
        let volumes = &first.pod()["spec"]["volumes"];
        assert!(
            volumes.as_array().unwrap().iter().any(|volume| volume["secret"]["secretName"] == name[..]),
            "{volumes}"
        );
    }
    let second = install(&helm, &objects, VALUES).await.unwrap();
    let ca =
        |rendered: &Rendered, port: &str| rendered.find("Secret", &format!("kv-quorate-{port}-ca"))["data"].clone();
    assert_eq!((ca(&second, "client"), ca(&second, "peer")), (ca(&first, "client"), ca(&first, "peer")));
    assert_ne!(ca(&first, "client"), ca(&first, "peer"), "who has a client's certificate is no member");
    let decoded = |port: &str, file: &str| BASE64_STANDARD.decode(ca(&first, port)[file].as_str().unwrap()).unwrap();
    let told = first.find("ConfigMap", "kv-quorate-client-ca")["data"]["ca.crt"].as_str().unwrap();
    assert_eq!(told.trim(), String::from_utf8(decoded("client", "tls.crt")).unwrap().trim());

    let mut cluster = Cluster::new(1);
    for port in ["client", "peer"] {
        for file in ["tls.crt", "tls.key"] {
            std::fs::write(cluster.root().join(format!("{port}-{file}")), decoded(port, file)).unwrap();
        }
        let path = |file: &str| cluster.root().join(format!("{port}-{file}")).display().to_string();
        let (certificate, key) = (path("tls.crt"), path("tls.key"));
        cluster.set(&format!("{port}_tls.mode"), "auto");
        cluster.set(&format!("{port}_tls.issuer_cert_file"), &certificate);
        cluster.set(&format!("{port}_tls.issuer_key_file"), &key);
    }
    cluster.start_pod(0);
    cluster.wait_http(0, "/readyz", 200, &[]).await;
    let endpoint = format!("https://{}", cluster.endpoint(0));
    let trusted = cluster.root().join("client-tls.crt").display().to_string();
    cluster.command(&["put", "k", "v", "--endpoints", &endpoint, "--cacert", &trusted]).await;
    assert!(
        http_get(&cluster.status_endpoint(0), "/metrics")
            .await
            .unwrap()
            .1
            .contains("quorate_tls_end_timestamp_seconds")
    );
}

/// Where a CA of the chart is damaged, and where Helm sees no cluster, nothing is made in its place.
#[tokio::test(flavor = "multi_thread")]
async fn no_ca_is_made_over_another_or_into_the_blue() {
    let Some(helm) = require(&HELM) else { return };
    let mut objects = namespace();
    let empty = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "kv-quorate-peer-ca"}, "data": {}});
    objects.insert("/api/v1/namespaces/data/secrets/kv-quorate-peer-ca".into(), installed(empty));
    let refused = install(&helm, &objects, "tls: {peer: {mode: auto}}").await.err().unwrap();
    assert!(refused.contains("Secret kv-quorate-peer-ca has no tls.crt and tls.key"), "{refused}");
    let refused = install(&helm, &Objects::new(), "tls: {peer: {mode: auto}}").await.err().unwrap();
    assert!(refused.contains("without a look into a cluster"), "{refused}");
    // The namespace is yet to be made, in a cluster that is there.
    let default = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    let objects = Objects::from([("/api/v1/namespaces/default".to_owned(), default)]);
    install(&helm, &objects, "tls: {peer: {mode: auto}}").await.unwrap();
}
