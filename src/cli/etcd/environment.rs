//! `ETCD_*` variables: `ETCD_LISTEN_CLIENT_URLS` stands for `--listen-client-urls`.
//!
//! Invariant: as with etcd, a variable and a flag that say the same thing are a contradiction, and a variable that stands for no flag
//! is told and left alone: Kubernetes makes some for a Service that is named etcd.

use std::collections::BTreeMap;

use anyhow::bail;

use super::flags::{Flag, Pairs, check_switch};

const PREFIX: &str = "ETCD_";

/// What the variables say beside the flags of the command line, and the names of those that say nothing.
pub fn read(env: &BTreeMap<String, String>, flags: &[(&'static str, String)]) -> anyhow::Result<(Pairs, Vec<String>)> {
    let (mut given, mut unknown) = (Vec::new(), Vec::new());
    for (variable, value) in env.iter().filter(|(_, value)| !value.is_empty()) {
        let Some(name) = variable.strip_prefix(PREFIX) else { continue };
        let name = name.to_lowercase().replace('_', "-");
        let Some(flag) = Flag::find(&name) else {
            unknown.push(variable.clone());
            continue;
        };
        if flags.iter().any(|(name, _)| *name == flag.name) {
            bail!("{variable} and --{} are both given; unset the variable, or leave the flag out", flag.name);
        }
        check_switch(flag, variable, value)?;
        given.push((flag.name, value.clone()));
    }
    Ok((given, unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn variables_stand_for_flags_and_others_are_told() {
        let env = env(&[
            ("ETCD_NAME", "a"),
            ("ETCD_LISTEN_CLIENT_URLS", "http://127.0.0.1:1"),
            ("ETCD_DATA_DIR", ""),
            ("ETCD_PORT_2379_TCP_ADDR", "10.0.0.1"),
            ("ETCDCTL_API", "3"),
            ("HOME", "/"),
        ]);
        let (given, unknown) = read(&env, &[]).unwrap();
        let given: Vec<(&str, &str)> = given.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(given, [("listen-client-urls", "http://127.0.0.1:1"), ("name", "a")]);
        assert_eq!(unknown, ["ETCD_PORT_2379_TCP_ADDR"]);
    }

    #[test]
    fn variable_and_flag_that_say_the_same_thing_are_refused() {
        let message = read(&env(&[("ETCD_NAME", "a")]), &[("name", "b".into())]).unwrap_err().to_string();
        assert!(message.contains("ETCD_NAME") && message.contains("--name"), "{message}");
    }
}
