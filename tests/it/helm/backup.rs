//! Values of backups: how members reach a store, and what a release without disks begins with.

use serde_json::{Value, json};

use super::pairs::server_accepts;
use super::{Rendered, template};
use crate::support::tools::{HELM, require};

const BUCKET: &str = r#"
backup:
  url: s3://backups/prod/kv
  endpoint: https://minio.example.org:9000
  interval: 5s
  keepFulls: 3
  credentialsSecret: store
  keySecret: backup-key
  caSecret: store-ca
restore: {from: "s3://backups/prod/kv@2026-11-29T10:15:00Z", sameRevisions: true}
config: {backup: {bandwidth: 8MiB}}
readers: {enabled: true}
networkPolicy: {restrictEgress: true}
extraEnvFrom: [{configMapRef: {name: more}}]
"#;

fn has(list: &Value, wanted: &Value) -> bool {
    list.as_array().is_some_and(|list| list.contains(wanted))
}

#[test]
fn members_get_the_settings_the_credentials_and_the_key() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, BUCKET);
    server_accepts(&rendered);
    let settings = rendered.settings();
    let text = |section: &str, key: &str| settings[section][key].as_str().unwrap_or_default().to_owned();
    assert_eq!(text("backup", "url"), "s3://backups/prod/kv");
    assert_eq!((text("backup", "interval"), text("backup", "full_every")), ("5s".into(), "1day".into()));
    assert_eq!(text("backup", "bandwidth"), "8MiB", "what has no value of its own is said below config");
    assert_eq!(settings["backup"]["keep_fulls"].as_integer(), Some(3));
    assert_eq!(text("restore", "from"), "s3://backups/prod/kv@2026-11-29T10:15:00Z");
    assert_eq!(settings["restore"]["same_revisions"].as_bool(), Some(true));

    let pod = &rendered.pod()["spec"];
    let container = &pod["containers"][0];
    let from = json!([{"secretRef": {"name": "store"}}, {"configMapRef": {"name": "more"}}]);
    assert_eq!(container["envFrom"], from, "a Secret's entries are the environment");
    for (setting, secret, entry) in [("key_file", "backup-key", "key"), ("ca_file", "store-ca", "ca.crt")] {
        let path = text("backup", setting);
        let directory = path.strip_suffix(&format!("/{entry}")).unwrap_or_else(|| panic!("{path} is no {entry}"));
        let mounts = container["volumeMounts"].as_array().expect("there are mounts");
        let mount = mounts.iter().find(|mount| mount["mountPath"] == directory).expect("it is mounted there");
        assert_eq!((&mount["readOnly"], mount.get("subPath")), (&json!(true), None));
        let items = json!([{"key": entry, "path": entry}]);
        let source = json!({"secretName": secret, "defaultMode": 0o440, "items": items});
        assert!(has(&pod["volumes"], &json!({"name": mount["name"], "secret": source})), "{}", pod["volumes"]);
        let name = format!("QUORATE_BACKUP__{}", setting.to_uppercase());
        assert!(has(&container["env"], &json!({"name": name, "value": path})), "`quorate backup` in the pod knows it");
    }
    assert!(has(&container["env"], &json!({"name": "QUORATE_BACKUP__URL", "value": "s3://backups/prod/kv"})));
    // The pods follow what they are told.
    let other = Rendered::new(&helm, &BUCKET.replace("interval: 5s", "interval: 6s"));
    assert_ne!(other.pod()["metadata"]["annotations"], rendered.pod()["metadata"]["annotations"]);
}

#[test]
fn readers_reach_no_store_and_without_one_nothing_is_set() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, BUCKET);
    let settings = rendered.settings_of("kv-quorate-readers");
    assert!(settings.get("backup").is_none() && settings.get("restore").is_none(), "{settings}");
    let pod = &rendered.find("Deployment", "kv-quorate-readers")["spec"]["template"]["spec"];
    assert!(!pod.to_string().contains("store") && !pod.to_string().contains("backup-key"), "{pod:#}");
    // A member of 0.1 that starts while the release is upgraded would not know the sections.
    let settings = Rendered::new(&helm, "").settings();
    assert!(settings.get("backup").is_none() && settings.get("restore").is_none(), "{settings}");
    // To begin with a backup needs no backups of its own.
    let values = "backup: {credentialsSecret: s}\nrestore: {from: \"gs://backups/kv\"}";
    let settings = Rendered::new(&helm, values).settings();
    assert_eq!(settings["restore"]["from"].as_str(), Some("gs://backups/kv"));
    assert!(settings.get("backup").is_none(), "{settings}");
}

/// The values say the server's own defaults, so that to name a path is enough.
#[test]
fn defaults_are_the_servers() {
    let Some(helm) = require(&HELM) else { return };
    let rendered = Rendered::new(&helm, "backup: {url: \"s3://backups/kv\"}");
    server_accepts(&rendered);
    let settings: quorate::config::Config =
        serde_json::from_value(json!({"backup": rendered.settings()["backup"]})).expect("these are settings");
    let wanted = quorate::config::Backup { url: "s3://backups/kv".into(), ..Default::default() };
    assert_eq!(settings.backup, wanted);
}

/// Ports that members may go to, and addresses.
fn egress(rendered: &Rendered) -> (Vec<u64>, Vec<String>) {
    let rules = rendered.find("NetworkPolicy", "kv-quorate")["spec"]["egress"].clone();
    let rules = rules.as_array().expect("egress is restricted");
    let open = rules.iter().filter(|rule| rule.get("to").is_none());
    let ports = open.flat_map(|rule| rule["ports"].as_array().cloned().unwrap_or_default());
    let blocks = rules.iter().filter_map(|rule| rule["to"][0]["ipBlock"]["cidr"].as_str().map(str::to_owned));
    (ports.filter_map(|port| port["port"].as_u64()).filter(|port| *port != 53).collect(), blocks.collect())
}

#[test]
fn restricted_egress_lets_members_reach_the_store_and_what_gives_credentials() {
    let Some(helm) = require(&HELM) else { return };
    let closed = "kubernetesApi: {enabled: false}\nnetworkPolicy: {restrictEgress: true}\n";
    let of = |backup: &str| egress(&Rendered::new(&helm, &format!("{closed}{backup}")));
    let clouds = || vec!["169.254.0.0/16".to_owned()];
    assert_eq!(of(""), (vec![], vec![]));
    let with_secret = "backup: {url: \"s3://b/p\", credentialsSecret: s";
    assert_eq!(of(&format!("{with_secret}}}")), (vec![443], vec![]));
    for (endpoint, port) in [
        ("https://minio.example.org:9000", 9000),
        ("https://minio.example.org:9000/s3", 9000),
        ("http://[fd00::1]:9001", 9001),
        ("http://minio", 80),
        ("https://minio/9:9", 443),
    ] {
        let found = of(&format!("{with_secret}, endpoint: \"{endpoint}\"}}"));
        assert_eq!(found, (vec![port], vec![]), "{endpoint}");
    }
    let own = of("backup: {url: \"s3://b/p\", endpoint: \"http://minio:9000\"}");
    assert_eq!(own, (vec![9000, 443], clouds()), "tokens are exchanged at 443");
    assert_eq!(of("backup: {url: \"gs://b/p\"}"), (vec![443], clouds()));
    assert_eq!(of("restore: {from: \"az://b/p@latest\"}"), (vec![443], clouds()));
    let shared = "backup: {url: /mnt/backups/kv}\nextraVolumes: [{name: shared, persistentVolumeClaim: {claimName: b}}]\n\
                  extraVolumeMounts: [{name: shared, mountPath: /mnt/backups}]";
    assert_eq!(of(shared), (vec![], vec![]), "a volume is the node's to reach");
}

#[test]
fn what_cannot_work_is_refused_by_its_name() {
    let Some(helm) = require(&HELM) else { return };
    for (values, want) in [
        ("backup: {url: \"ftp://host/path\"}", "backup/url"),
        ("backup: {url: backups}", "backup/url"),
        ("backup: {url: \"s3:///path\"}", "backup/url"),
        ("backup: {endpoint: \"minio:9000\", url: \"s3://b\"}", "backup/endpoint"),
        ("backup: {interval: 10, url: \"s3://b\"}", "backup/interval"),
        ("backup: {keepFulls: 0, url: \"s3://b\"}", "backup/keepFulls"),
        ("backup: {schedule: \"@daily\"}", "schedule"),
        ("backup: {keySecret: k}", "backup.keySecret has no use without backup.url, restore.from or restore.follow"),
        ("backup: {credentialsSecret: k}", "backup.credentialsSecret has no use"),
        ("restore: {sameRevisions: true}", "restore.sameRevisions has no use"),
        ("backup: {url: \"gs://b\", endpoint: \"https://e\"}", "backup.endpoint cannot go with backup.url"),
        ("backup: {url: /mnt/backups}", "backup.url is the directory /mnt/backups, and no volume is mounted there"),
        (
            "restore: {from: \"/mnt/b@latest\"}\nextraVolumes: [{name: s, emptyDir: {}}]\nextraVolumeMounts: [{name: s, mountPath: /mnt/backups}]",
            "restore.from is the directory /mnt/b, and no volume",
        ),
        ("backup: {url: \"s3://b\"}\nresources: {limits: {memory: 128Mi}}", "needs 192Mi"),
        ("restore: {from: \"s3://b\", follow: \"s3://b\"}", "restore.from and restore.follow are one or the other"),
        ("restore: {follow: \"s3://b\"}\nauth: {existingSecret: s}", "restore.follow cannot go with auth.bootstrap"),
        ("restore: {follow: \"s3://b\"}\nresources: {limits: {memory: 128Mi}}", "needs 192Mi"),
        ("restore: {follow: /mnt/b}", "restore.follow is the directory /mnt/b, and no volume"),
        ("config: {restore: {follow: \"s3://b\"}}", "set restore.follow"),
        ("config: {backup: {url: \"s3://b\"}}", "config.backup.url is not for values: set backup.url"),
        ("config: {backup: {key_file: /k}}", "set backup.keySecret"),
        ("config: {restore: {from: \"s3://b\"}}", "set restore.from"),
        ("extraEnv: [{name: QUORATE_BACKUP__URL, value: x}]", "extraEnv may not have QUORATE_BACKUP__URL"),
        ("extraVolumes: [{name: backup-key, emptyDir: {}}]", "extraVolumes may not have backup-key"),
        ("extraVolumeMounts: [{name: x, mountPath: /etc/quorate-backup-key}]", "may not have /etc/quorate-backup-key"),
    ] {
        let output = template(&helm, values).output().expect("helm runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{values} was accepted");
        assert!(errors.contains(want), "{values}: {errors}");
    }
    // A standby.
    let standby = Rendered::new(&helm, "restore: {follow: \"s3://b/kv\"}\nbackup: {url: \"s3://b/kv\"}");
    server_accepts(&standby);
    assert_eq!(standby.settings()["restore"]["follow"].as_str(), Some("s3://b/kv"));
    // A directory of a volume, and a moment of it.
    let shared = "restore: {from: \"/mnt/b@latest\"}\nextraVolumes: [{name: s, emptyDir: {}}]\nextraVolumeMounts: [{name: s, mountPath: /mnt/b/}]";
    server_accepts(&Rendered::new(&helm, shared));
}
