//! Values of users: what the release comes up with.

use std::process::Command;

use serde_json::json;

use super::{Rendered, template};
use crate::support::cluster::binary;
use crate::support::tools::{HELM, require, run};

const DECLARED: &str = r#"
auth:
  bootstrap:
    roles: [{name: app, permissions: [{access: readwrite, prefix: app/}, {access: read, key: shared}]}]
    users: [{name: root, no_password: true, roles: [root]}, {name: app, password: "a\"b", roles: [app]}]
readers: {enabled: true}
"#;

#[test]
fn declared_users_are_in_a_secret_that_members_and_readers_mount() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, DECLARED);
    let text = rendered.find("Secret", "kv-quorate-auth")["stringData"]["users.toml"].as_str().expect("a file");
    let file: toml::Table = text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(file["users"][1]["password"].as_str(), Some("a\"b"));
    assert_eq!(file["roles"][0]["permissions"][1]["key"].as_str(), Some("shared"));
    let readers = rendered.find("Deployment", "kv-quorate-readers");
    for (pod, settings) in [
        (rendered.pod(), rendered.settings()),
        (&readers["spec"]["template"], rendered.settings_of("kv-quorate-readers")),
    ] {
        assert_eq!(settings["auth"]["bootstrap"].as_str(), Some("/etc/quorate-auth/users.toml"));
        let volume = json!({"name": "auth", "secret": {"secretName": "kv-quorate-auth", "defaultMode": 0o440}});
        assert!(pod["spec"]["volumes"].as_array().expect("volumes").contains(&volume), "{pod:#}");
        let mount = json!({"name": "auth", "mountPath": "/etc/quorate-auth", "readOnly": true});
        let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array().expect("mounts");
        assert!(mounts.contains(&mount), "{pod:#}");
    }
    // Another user restarts nobody: members follow the file.
    let other = Rendered::new(&helm, &DECLARED.replace("name: app, password", "name: other, password"));
    assert_eq!(other.pod(), rendered.pod());
    assert_ne!(Rendered::new(&helm, "").pod()["metadata"], rendered.pod()["metadata"], "to have users is a setting");
    // Who may write is not known to the chart, unless it is told.
    let is_test = |rendered: &Rendered| rendered.kinds(&["Pod"]).len() == 1;
    assert!(!is_test(&rendered) && is_test(&Rendered::new(&helm, "")));
    let told = Rendered::new(&helm, "auth: {existingSecret: mine, testSecret: t}");
    let env = told.find("Pod", "kv-quorate-test")["spec"]["containers"][0]["env"].as_array().expect("env");
    let of = |key: &str| json!({"secretKeyRef": {"name": "t", "key": key}});
    assert!(env.contains(&json!({"name": "QUORATE_USER", "valueFrom": of("username")})), "{env:?}");
    assert!(env.contains(&json!({"name": "QUORATE_PASSWORD", "valueFrom": of("password")})), "{env:?}");
    assert_eq!(told.pod()["spec"]["volumes"][1]["secret"]["secretName"], "mine");
    assert_eq!(told.kinds(&["Secret"]).len(), 0);
}

#[test]
fn pods_are_known_by_their_tokens_if_there_is_an_audience() {
    let Some(helm) = require(&HELM) else { return };
    let values = r#"
auth: {serviceAccounts: {audience: quorate, roles: ["app <- sub=system:serviceaccount:shop:*"]}}
kubernetesApi: {enabled: false}
readers: {enabled: true}
"#;
    let rendered = Rendered::new(&helm, values);
    let readers = rendered.find("Deployment", "kv-quorate-readers");
    for (pod, settings) in [
        (rendered.pod(), rendered.settings()),
        (&readers["spec"]["template"], rendered.settings_of("kv-quorate-readers")),
    ] {
        assert_eq!(settings["oidc"]["issuer"].as_str(), Some("kubernetes"));
        assert_eq!(settings["oidc"]["audiences"][0].as_str(), Some("quorate"));
        assert_eq!(settings["oidc"]["roles"][0].as_str(), Some("app <- sub=system:serviceaccount:shop:*"));
        assert_eq!(pod["spec"]["automountServiceAccountToken"], true, "the API server wants one");
        let dir = tempfile::tempdir().expect("a directory can be made");
        std::fs::write(dir.path().join("quorate.toml"), settings.to_string()).expect("it can be written");
        run(Command::new(binary()).args(["config", "--config"]).arg(dir.path().join("quorate.toml")));
    }
    for wrong in
        ["auth: {serviceAccounts: {roles: [\"a <- b=c\"]}}", "auth: {bootstrap: {users: []}, existingSecret: s}"]
    {
        let output = template(&helm, wrong).output().expect("helm runs");
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("auth."), "{wrong}");
    }
}
