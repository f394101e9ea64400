//! The schema of `config` in values.schema.json follows from the server's settings, so that a misspelt one fails at `helm install` and not
//! in a pod.
//!
//! Owns how a setting's kind is found: what its section takes in its place. `QUORATE_WRITE_DOCS=1` writes the schema anew. Absent: relations
//! between settings, which the server checks, and what other values say, which `_check.tpl` refuses.

use quorate::config::Config;
use serde_json::{Map, Value, json};

use super::{CHART, Rendered, template};
use crate::support::tools::{HELM, is_set, require};

/// Whether the settings take this value in this place.
fn fault(section: &str, key: &str, value: Value) -> Option<String> {
    serde_json::from_value::<Config>(json!({section: {key: value}})).err().map(|fault| fault.to_string())
}

/// One of these words. Some are numbers in YAML, and the server takes them so; Helm's reader of schemas cannot tell the two apart in one list.
fn one_of(words: Vec<&str>) -> Value {
    let numbers: Vec<f64> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let list = json!({"enum": words.iter().map(|word| json!(word)).chain([Value::Null]).collect::<Vec<_>>()});
    match (numbers.first(), numbers.last()) {
        (Some(least), Some(most)) => json!({"anyOf": [list, {"type": "number", "minimum": least, "maximum": most}]}),
        _ => list,
    }
}

/// What may stand in the place of `default`. Numbers and truths may be texts too, as the server takes them.
fn kind(section: &str, key: &str, default: &Value) -> Value {
    let takes = |text: &str| fault(section, key, json!(text)).is_none();
    match default {
        Value::Bool(_) => json!({"enum": [true, false, "true", "false", null]}),
        // The one setting without a default is a number.
        Value::Number(_) | Value::Null => {
            json!({"type": ["integer", "string", "null"], "minimum": 0, "pattern": "^[0-9]+$"})
        }
        Value::Array(_) => json!({"type": ["array", "string", "null"], "items": {"type": "string"}}),
        _ if takes("anything at all") => json!({"type": ["string", "null"]}),
        _ if takes("90s") => json!({"type": ["string", "null"], "pattern": "^ *([0-9]+ *[a-zA-Z]+ *)+$"}),
        _ if takes("3MiB") => {
            json!({"type": ["string", "null"], "pattern": "^ *(0|[0-9.]+ *([kKmMgGtT][iI]?)?[bB]) *$"})
        }
        _ => {
            let message = fault(section, key, json!("anything at all")).expect("it was refused");
            match message.split_once("expected one of: ") {
                Some((_, words)) => one_of(words.split(", ").map(str::trim).collect()),
                None if fault(section, key, json!(["127.0.0.1:1"])).is_none() => {
                    json!({"type": ["array", "string", "null"], "items": {"type": "string"}})
                }
                None => json!({"type": ["string", "null"]}),
            }
        }
    }
}

/// All settings, with their defaults.
fn settings() -> Map<String, Value> {
    match serde_json::to_value(Config::default()).expect("settings have a form in JSON") {
        Value::Object(sections) => sections,
        other => panic!("{other}"),
    }
}

fn schema() -> Value {
    let section = |name: &String, keys: &Value| {
        let keys = keys.as_object().expect("a section is an object");
        let known: Map<_, _> = keys.iter().map(|(key, default)| (key.clone(), kind(name, key, default))).collect();
        json!({"type": "object", "additionalProperties": false, "properties": known})
    };
    let sections: Map<_, _> = settings().iter().map(|(name, keys)| (name.clone(), section(name, keys))).collect();
    json!({"type": "object", "additionalProperties": false, "properties": sections})
}

#[test]
fn schema_of_config_is_made_from_the_settings() {
    const BEGIN: &str = "\n    \"config\": ";
    let (path, wanted) = (format!("{CHART}/values.schema.json"), schema());
    let text = std::fs::read_to_string(&path).unwrap();
    let whole: Value = serde_json::from_str(&text).unwrap();
    if is_set("QUORATE_WRITE_DOCS") {
        let (before, rest) = text.split_once(BEGIN).expect("the schema knows `config`");
        // The one line after it that closes an object at its own depth.
        let (_, after) = rest.split_once("\n    },\n").expect("it ends, and others follow");
        let made = serde_json::to_string_pretty(&wanted).unwrap().replace('\n', "\n    ");
        std::fs::write(&path, format!("{before}{BEGIN}{made},\n{after}")).unwrap();
        return;
    }
    assert_eq!(whole["properties"]["config"], wanted, "run it with QUORATE_WRITE_DOCS=1, which writes the schema anew");
}

/// Every setting as it is by default, but for those that other values say, is taken by the schema and by the server.
#[test]
fn every_default_can_be_given_as_a_value() {
    let Some(helm) = require(&HELM) else { return };
    let helpers = std::fs::read_to_string(format!("{CHART}/templates/_check.tpl")).unwrap();
    let mut all = settings();
    let tls = |section: &str, key: &str| section.ends_with("_tls") && key == "mode";
    for (section, keys) in &mut all {
        let keys = keys.as_object_mut().unwrap();
        keys.retain(|key, value| {
            !value.is_null() && !tls(section, key) && !helpers.contains(&format!("\n{section}.{key}: "))
        });
    }
    all["server"]["data_dir"] = json!("/var/lib/quorate/data");
    all["server"]["grace_period"] = json!("115s");
    assert!(all["cluster"].get("size").is_none(), "the chart names what is its own");
    // The pattern of the peers is what makes a cluster of three.
    all["cluster"].as_object_mut().unwrap().remove("peers");
    let rendered = Rendered::new(&helm, &json!({"config": all}).to_string());
    super::pairs::server_accepts(&rendered);
    assert_eq!(rendered.settings()["raft"]["heartbeat_interval"].as_str(), Some("100ms"));
}

#[test]
fn misspelt_settings_are_refused_by_helm() {
    let Some(helm) = require(&HELM) else { return };
    for (config, want) in [
        ("{raft: {heartbeat_intervall: 1s}}", "heartbeat_intervall"),
        ("{rafts: {}}", "rafts"),
        ("{raft: {heartbeat_interval: 100}}", "heartbeat_interval"),
        ("{raft: {heartbeat_interval: \"100\"}}", "heartbeat_interval"),
        ("{log: {segment_bytes: \"64\"}}", "segment_bytes"),
        ("{telemetry: {format: xml}}", "format"),
        ("{raft: {lease_reads: maybe}}", "lease_reads"),
        ("{client_tls: {min_version: \"1.1\"}}", "min_version"),
        ("{cluster: {max_voters: many}}", "max_voters"),
    ] {
        let output = template(&helm, &format!("config: {config}")).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && errors.contains(want), "{config}: {errors}");
    }
    let taken = "{raft: {heartbeat_interval: 120ms, lease_reads: \"true\"}, client_tls: {min_version: 1.3}, \
                 log: {segment_bytes: 32MiB, entries_max: \"600000\"}, server: {listen_client: [\"0.0.0.0:2379\"]}}";
    let rendered = Rendered::new(&helm, &format!("config: {taken}\ntls: {{client: {{mode: auto, secret: ca}}}}"));
    super::pairs::server_accepts(&rendered);
}
