//! The chart's README says of every value what values.yaml says.
//!
//! Owns the form: a comment above a key describes it and all below that have none. `QUORATE_WRITE_DOCS=1` writes the table anew.

use serde_json::Value;

use super::CHART;
use crate::support::tools::is_set;

const BEGIN: &str = "<!-- values: made from values.yaml -->\n";
const END: &str = "<!-- end of values -->";

/// A described key: its path, and its comment.
struct Described {
    path: String,
    text: String,
}

/// The keys of a YAML file that have a comment right above them, in order; and all keys that have no value on their line or are
/// leaves, for the check that none is forgotten.
fn described(yaml: &str) -> (Vec<Described>, Vec<String>) {
    let (mut found, mut all, mut comment, mut stack) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::<(usize, String)>::new());
    for line in yaml.lines() {
        let (text, indent) = (line.trim(), line.len() - line.trim_start().len());
        if let Some(words) = text.strip_prefix('#') {
            comment.push(words.trim().to_owned());
            continue;
        }
        let Some((key, _)) = text.split_once(':').filter(|_| !text.starts_with('-')) else {
            comment.clear();
            continue;
        };
        stack.retain(|(outer, _)| *outer < indent);
        stack.push((indent, key.to_owned()));
        let path = stack.iter().map(|(_, key)| key.as_str()).collect::<Vec<_>>().join(".");
        all.push(path.clone());
        if !comment.is_empty() {
            found.push(Described { path, text: comment.join(" ") });
            comment.clear();
        }
    }
    (found, all)
}

fn table(yaml: &str) -> String {
    let values: Value = serde_yaml_ng::from_str(yaml).unwrap();
    let (found, all) = described(yaml);
    let is_below = |path: &str, above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('.'));
    for path in &all {
        let has = found.iter().any(|one| one.path == *path || is_below(path, &one.path) || is_below(&one.path, path));
        assert!(has, "{path} has no comment in values.yaml, nor has what holds it");
    }
    let mut text = String::from("| value | default | |\n|---|---|---|\n");
    for one in &found {
        let value = one.path.split('.').fold(&values, |value, key| &value[key]);
        let has_described = found.iter().any(|other| is_below(&other.path, &one.path));
        let default = if has_described { String::new() } else { format!("`{value}`") };
        text += &format!("| `{}` | {} | {} |\n", one.path, default.replace('|', "\\|"), one.text.replace('|', "\\|"));
    }
    text
}

#[test]
fn readme_says_what_the_values_say() {
    let read = |name: &str| std::fs::read_to_string(format!("{CHART}/{name}")).unwrap();
    let (readme, wanted) = (read("README.md"), table(&read("values.yaml")));
    let (before, rest) = readme.split_once(BEGIN).expect("the README has a place for the values");
    let (found, after) = rest.split_once(END).expect("that place has an end");
    if is_set("QUORATE_WRITE_DOCS") {
        std::fs::write(format!("{CHART}/README.md"), format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
        return;
    }
    for (found, wanted) in found.lines().zip(wanted.lines()) {
        assert_eq!(found, wanted, "run it with QUORATE_WRITE_DOCS=1, which writes the table anew");
    }
    assert_eq!(found.lines().count(), wanted.lines().count(), "run it with QUORATE_WRITE_DOCS=1");
}

#[test]
fn comments_above_keys_are_found() {
    let yaml = "# Head of the file.\n\n# One.\na: 1\nb:\n  # Two,\n  # long.\n  c: x\n# Three.\nd:\n  - e: 1\n  - f\n";
    let (found, all) = described(yaml);
    let found: Vec<_> = found.iter().map(|one| (one.path.as_str(), one.text.as_str())).collect();
    assert_eq!(found, [("a", "One."), ("b.c", "Two, long."), ("d", "Three.")]);
    assert_eq!(all, ["a", "b", "b.c", "d"]);
}

/// A value that the schema does not know would be refused; one that only the schema knows would be a dead letter.
#[test]
fn schema_and_values_know_the_same_keys() {
    let read = |name: &str| std::fs::read_to_string(format!("{CHART}/{name}")).unwrap();
    let values: Value = serde_yaml_ng::from_str(&read("values.yaml")).unwrap();
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    compare("", &values, &schema);
}

fn compare(path: &str, values: &Value, schema: &Value) {
    let (Some(known), Some(values)) = (schema["properties"].as_object(), values.as_object()) else { return };
    // The settings are the server's: their schema is made from them (`schema`), and none has a value here.
    if schema["additionalProperties"] != false || path == ".config" {
        return;
    }
    for (key, value) in values {
        let inner = known.get(key).unwrap_or_else(|| panic!("{path}.{key} is not in values.schema.json"));
        compare(&format!("{path}.{key}"), value, inner);
    }
    // What Kubernetes defines may be left out of the defaults.
    let optional = |key: &str| key == "global" || path.contains("probes") || path.ends_with("resources");
    for key in known.keys().filter(|key| !optional(key)) {
        assert!(values.contains_key(key), "{path}.{key} is in values.schema.json and not in values.yaml");
    }
}
