//! Two answers, field by field.

use serde_json::Value;

/// A field in which two answers differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Names of fields from the outermost on, joined by dots; places in lists are left out.
    pub path: String,
    pub ours: Value,
    pub theirs: Value,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |value: &Value| {
            let text = value.to_string();
            if text.chars().count() > 400 { text.chars().take(400).chain("...".chars()).collect() } else { text }
        };
        write!(f, "{}\n  ours   {}\n  etcd's {}", self.path, short(&self.ours), short(&self.theirs))
    }
}

/// All differences. A field that one side lacks is null there; lists of different length are one difference.
pub fn differences(ours: &Value, theirs: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    walk("", ours, theirs, &mut found);
    found
}

fn walk(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<Difference>) {
    match (ours, theirs) {
        (Value::Object(our), Value::Object(their)) => {
            let missing = their.keys().filter(|name| !our.contains_key(*name));
            for name in our.keys().chain(missing) {
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let (our, their) = (our.get(name).unwrap_or(&Value::Null), their.get(name).unwrap_or(&Value::Null));
                walk(&inner, our, their, found);
            }
        }
        (Value::Array(our), Value::Array(their)) if our.len() == their.len() => {
            our.iter().zip(their).for_each(|(our, their)| walk(path, our, their, found));
        }
        _ if ours == theirs => {}
        _ => found.push(Difference { path: path.to_owned(), ours: ours.clone(), theirs: theirs.clone() }),
    }
}
