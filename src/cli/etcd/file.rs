//! etcd's YAML file (`--config-file`).
//!
//! Invariants: an unknown key is refused by name, unlike by etcd, where it is a setting that does not hold; a number that stands for a
//! duration is one of nanoseconds, as there. Absent: what the values mean (`translate`).

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::flags::{Flag, Pairs, check_switch};
use super::translate::go_duration;

/// The flags that the file stands for.
pub fn read(text: &str) -> anyhow::Result<Pairs> {
    // A member may be named `no`.
    let options = serde_saphyr::options! { strict_booleans: true };
    let root: Value = serde_saphyr::from_str_with_options(text, options).context("it is not valid YAML")?;
    let keys = match root {
        Value::Null => return Ok(Vec::new()),
        Value::Object(keys) => keys,
        _ => bail!("expected keys with values, such as `name: a`"),
    };
    let mut given = Vec::new();
    for (key, value) in keys {
        match (section(&key), value) {
            (Some(section), Value::Object(inner)) => {
                for (key_within, value) in inner {
                    let name = section(&key_within);
                    put(&mut given, &format!("{key}.{key_within}"), &name, &value)?;
                }
            }
            (Some(_), Value::Null) => {}
            (Some(_), _) => bail!("{key}: expected keys with values below it"),
            (None, value) => put(&mut given, &key, &key, &value)?,
        }
    }
    Ok(given)
}

/// How the flags of a section are named, by their keys in it.
fn section(key: &str) -> Option<fn(&str) -> String> {
    match key {
        "client-transport-security" => Some(|key| match key {
            "allowed-cn" | "allowed-hostname" => format!("client-cert-{key}"),
            "skip-client-san-verification" => format!("peer-{key}"),
            _ => key.to_owned(),
        }),
        "peer-transport-security" => Some(|key| match key {
            "allowed-cn" | "allowed-hostname" => format!("peer-cert-{key}"),
            _ => format!("peer-{key}"),
        }),
        "discovery-config" => Some(|key| match key {
            "discovery" | "endpoints" | "token" => format!("discovery-{key}"),
            _ => key.to_owned(),
        }),
        "socket-options" => Some(|key| match key {
            "reuse-address" | "reuse-port" => format!("socket-{key}"),
            _ => key.to_owned(),
        }),
        _ => None,
    }
}

fn put(given: &mut Pairs, shown: &str, name: &str, value: &Value) -> anyhow::Result<()> {
    let flag = Flag::find(name).with_context(|| {
        format!("{shown} is no key of etcd 3.7's file; correct it or leave it out (quorate etcd --help)")
    })?;
    let scalar = |value: &Value| -> anyhow::Result<String> {
        Ok(match value {
            Value::String(text) => text.clone(),
            Value::Bool(truth) => truth.to_string(),
            Value::Number(number) if is_duration(flag) => format!("{number}ns"),
            Value::Number(number) => number.to_string(),
            _ => bail!("{shown}: expected a text, a number, true or false"),
        })
    };
    let text = match value {
        Value::Null => return Ok(()),
        Value::Array(list) => list.iter().map(scalar).collect::<Result<Vec<_>, _>>()?.join(","),
        value => scalar(value)?,
    };
    // As with etcd, an empty text is a key that is not set.
    if text.is_empty() {
        return Ok(());
    }
    check_switch(flag, shown, &text)?;
    given.push((flag.name, text));
    Ok(())
}

fn is_duration(flag: &Flag) -> bool {
    flag.default != "0" && go_duration(flag.default).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> anyhow::Result<Pairs> {
        read(text)
    }

    #[test]
    fn keys_stand_for_flags() {
        let text = "
name: a
data-dir:
listen-client-urls: http://127.0.0.1:1,http://127.0.0.1:2
heartbeat-interval: 50
watch-progress-notify-interval: 600000000000
strict-reconfig-check: false
log-outputs: [stderr]
client-transport-security:
  cert-file: c
  client-cert-auth: true
peer-transport-security:
  cert-file: p
  allowed-cn: [x, y]
";
        let mut read = given(text).unwrap();
        read.sort();
        let expected = [
            ("cert-file", "c"),
            ("client-cert-auth", "true"),
            ("heartbeat-interval", "50"),
            ("listen-client-urls", "http://127.0.0.1:1,http://127.0.0.1:2"),
            ("log-outputs", "stderr"),
            ("name", "a"),
            ("peer-cert-allowed-cn", "x,y"),
            ("peer-cert-file", "p"),
            ("strict-reconfig-check", "false"),
            ("watch-progress-notify-interval", "600000000000ns"),
        ];
        assert_eq!(read, expected.map(|(name, value)| (name, value.to_owned())));
        assert_eq!(given("").unwrap(), []);
    }

    #[test]
    fn what_is_no_key_is_refused_by_name() {
        for (text, why) in [
            ("nane: a", "nane is no key"),
            ("peer-transport-security: {nothing: 1}", "peer-transport-security.nothing is no key"),
            ("client-transport-security: x", "expected keys with values below it"),
            ("name: {a: b}", "name: expected a text"),
            ("pre-vote: 7", "expected true or false"),
            ("- a", "expected keys with values"),
            ("name: [", "not valid YAML"),
        ] {
            let message = given(text).unwrap_err();
            assert!(format!("{message:#}").contains(why), "{text}: {message:#}");
        }
    }
}
