//! Every flag of etcd 3.7, what becomes of it here, and how a command line is read.
//!
//! Read as Go's `flag` reads: one dash or two, `-flag=value` or `-flag value`, a switch alone or with `=true`; the last one wins.
//! Invariant: a flag is in [`FLAGS`] or it is refused by name. A value that is etcd's default needs nothing, whatever the flag.
//! Absent: what the values mean (`translate`).

use anyhow::{Context as _, bail};

/// What becomes of a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It becomes settings (`translate`).
    Taken,
    /// Another value than the default is refused, and this is why.
    Refused(&'static str),
    /// It is accepted and changes nothing, and this is why.
    Idle(&'static str),
}

/// A flag, by the name that follows the dashes.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    pub name: &'static str,
    /// etcd's.
    pub default: &'static str,
    pub fate: Fate,
}

const fn taken(name: &'static str, default: &'static str) -> Flag {
    Flag { name, default, fate: Fate::Taken }
}

const fn refused(name: &'static str, default: &'static str, why: &'static str) -> Flag {
    Flag { name, default, fate: Fate::Refused(why) }
}

const fn idle(name: &'static str, default: &'static str, why: &'static str) -> Flag {
    Flag { name, default, fate: Fate::Idle(why) }
}

const NO_AUTO_TLS: &str = "nobody can check a certificate that each member signs for itself; `quorate cert` makes certificates that can be checked";
const ONE_CERTIFICATE: &str = "a member shows the same certificate where it is dialled and where it dials; make one for both (`quorate cert server --peer`)";
const NO_DISCOVERY: &str = "the discovery service is not asked; list the members in --initial-cluster, or name their domain in --discovery-srv";
const OWN_LOG: &str = "the log is kept by its size and purged behind snapshots (the settings log.*)";
const NO_BBOLT: &str = "there is no bbolt file";
const NO_SLOW_LOG: &str = "slow requests are counted in /metrics, and not logged";
const NO_TRACING: &str = "there is no distributed tracing";
const OWN_CHECKS: &str = "members compare their states all the time (the setting raft.self_check_interval)";
const NO_GATE: &str = "the feature that it gates is here, or has nothing to do here, whatever it says";
const NO_ROTATION: &str = "log lines go to standard error or to one file; what rotates it is another program's work";

/// As `etcd --help` of 3.7.3 lists them; behind them those of 3.4 to 3.6 that manifests still carry.
pub const FLAGS: &[Flag] = &[
    taken("name", "default"),
    taken("data-dir", "${name}.etcd"),
    idle("wal-dir", "", "the log lies in the data directory"),
    idle("snapshot-count", "10000", OWN_LOG),
    taken("heartbeat-interval", "100"),
    taken("election-timeout", "1000"),
    idle("initial-election-tick-advance", "true", "a member that starts waits for the leader that there may be"),
    taken("listen-peer-urls", "http://localhost:2380"),
    taken("listen-client-urls", "http://localhost:2379"),
    taken("listen-client-http-urls", ""),
    idle("max-snapshots", "5", OWN_LOG),
    idle("max-wals", "5", OWN_LOG),
    idle("memory-mlock", "false", "the data is in memory, and the system decides about swap"),
    taken("quota-backend-bytes", "0"),
    idle("backend-bbolt-freelist-type", "map", NO_BBOLT),
    idle("backend-batch-interval", "", NO_BBOLT),
    idle("backend-batch-limit", "0", NO_BBOLT),
    taken("max-txn-ops", "128"),
    taken("max-request-bytes", "1572864"),
    taken("max-concurrent-streams", "math.MaxUint32"),
    idle("grpc-keepalive-min-time", "5s", "clients may ping as often as they like"),
    taken("grpc-keepalive-interval", "2h"),
    taken("grpc-keepalive-timeout", "20s"),
    idle("socket-reuse-port", "false", "two processes on one port would answer for one another"),
    idle("socket-reuse-address", "false", "it is always so"),
    idle("enable-grpc-gateway", "true", "the gateway is on the clients' port, and is always served"),
    idle("raft-read-timeout", "5s", "connections between members are checked by themselves"),
    idle("raft-write-timeout", "5s", "connections between members are checked by themselves"),
    taken("feature-gates", ""),
    taken("initial-advertise-peer-urls", "http://localhost:2380"),
    taken("initial-cluster", "default=http://localhost:2380"),
    taken("initial-cluster-state", "new"),
    taken("initial-cluster-token", "etcd-cluster"),
    taken("advertise-client-urls", "http://localhost:2379"),
    refused("discovery", "", NO_DISCOVERY),
    refused("discovery-token", "", NO_DISCOVERY),
    refused("discovery-endpoints", "", NO_DISCOVERY),
    idle("discovery-dial-timeout", "2s", NO_DISCOVERY),
    idle("discovery-request-timeout", "5s", NO_DISCOVERY),
    idle("discovery-keepalive-time", "2s", NO_DISCOVERY),
    idle("discovery-keepalive-timeout", "6s", NO_DISCOVERY),
    idle("discovery-insecure-transport", "true", NO_DISCOVERY),
    idle("discovery-insecure-skip-tls-verify", "false", NO_DISCOVERY),
    refused("discovery-cert", "", NO_DISCOVERY),
    refused("discovery-key", "", NO_DISCOVERY),
    refused("discovery-cacert", "", NO_DISCOVERY),
    refused("discovery-user", "", NO_DISCOVERY),
    refused("discovery-password", "", NO_DISCOVERY),
    idle("discovery-fallback", "exit", NO_DISCOVERY),
    refused("discovery-proxy", "", NO_DISCOVERY),
    taken("discovery-srv", ""),
    taken("discovery-srv-name", ""),
    idle("strict-reconfig-check", "true", "a change that healthy members could not commit is always refused"),
    idle("pre-vote", "true", "it is always on"),
    taken("auto-compaction-retention", "0"),
    taken("auto-compaction-mode", "periodic"),
    idle("v2-deprecation", "write-only", "there is no v2 store"),
    taken("cert-file", ""),
    taken("key-file", ""),
    taken("client-cert-auth", "false"),
    idle("client-cert-file", "", "a member does not dial its own clients' port"),
    idle("client-key-file", "", "a member does not dial its own clients' port"),
    taken("client-crl-file", ""),
    taken("client-cert-allowed-hostname", ""),
    taken("trusted-ca-file", ""),
    refused("auto-tls", "false", NO_AUTO_TLS),
    taken("peer-cert-file", ""),
    taken("peer-key-file", ""),
    idle("peer-client-cert-auth", "false", "with TLS, members always check one another's certificates"),
    refused("peer-client-cert-file", "", ONE_CERTIFICATE),
    refused("peer-client-key-file", "", ONE_CERTIFICATE),
    taken("peer-trusted-ca-file", ""),
    taken("peer-cert-allowed-cn", ""),
    taken("peer-cert-allowed-hostname", ""),
    refused("peer-auto-tls", "false", NO_AUTO_TLS),
    idle("self-signed-cert-validity", "1", "members sign no certificates"),
    taken("peer-crl-file", ""),
    taken("cipher-suites", ""),
    taken("cors", "*"),
    taken("host-whitelist", "*"),
    taken("tls-min-version", "TLS1.2"),
    taken("tls-max-version", ""),
    refused("auth-token", "simple", "tokens of the kind simple are issued, and no others"),
    taken("bcrypt-cost", "10"),
    taken("auth-token-ttl", "300"),
    idle("enable-pprof", "false", "there are no Go profiles"),
    idle("metrics", "basic", "all metrics are always there"),
    taken("listen-metrics-urls", ""),
    idle("logger", "zap", "lines have the form of --log-format"),
    taken("log-outputs", "default"),
    taken("log-level", "info"),
    taken("log-format", "json"),
    idle("enable-log-rotation", "false", NO_ROTATION),
    idle(
        "log-rotation-config-json",
        r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#,
        NO_ROTATION,
    ),
    idle("warning-unary-request-duration", "300ms", NO_SLOW_LOG),
    idle("enable-distributed-tracing", "false", NO_TRACING),
    idle("distributed-tracing-address", "localhost:4317", NO_TRACING),
    idle("distributed-tracing-service-name", "etcd", NO_TRACING),
    idle("distributed-tracing-instance-id", "", NO_TRACING),
    idle("distributed-tracing-sampling-rate", "0", NO_TRACING),
    taken("corrupt-check-time", "0s"),
    idle("compact-hash-check-time", "1m", OWN_CHECKS),
    idle("compaction-batch-limit", "1000", "compaction gives way to requests by itself"),
    taken("peer-skip-client-san-verification", "false"),
    taken("watch-progress-notify-interval", "10m"),
    idle("warning-apply-duration", "100ms", NO_SLOW_LOG),
    idle(
        "bootstrap-defrag-threshold-megabytes",
        "",
        "there is no bbolt file; `defrag` gives back disk while a member serves",
    ),
    idle("max-learners", "1", "there may be any number of learners"),
    idle("compaction-sleep-interval", "", "compaction gives way to requests by itself"),
    idle("downgrade-check-time", "", "a downgrade needs no preparation"),
    taken("snapshot-catchup-entries", ""),
    refused(
        "force-new-cluster",
        "false",
        "it would take what this disk holds for all there is; `quorate recover --data-dir DIR --dry-run` says what may be lost",
    ),
    idle("unsafe-no-fsync", "false", "what is acknowledged is always on disk"),
    taken("config-file", ""),
    idle("experimental-initial-corrupt-check", "false", OWN_CHECKS),
    idle("experimental-compact-hash-check-enabled", "false", OWN_CHECKS),
    idle("experimental-enable-lease-checkpoint", "false", NO_GATE),
    idle("experimental-enable-lease-checkpoint-persist", "false", NO_GATE),
    idle("experimental-txn-mode-write-with-shared-buffer", "true", NO_GATE),
    idle("experimental-stop-grpc-service-on-defrag", "false", NO_GATE),
    idle("experimental-set-member-localaddr", "false", NO_GATE),
    idle("experimental-enable-v2v3", "", "there is no v2 store"),
    refused("enable-v2", "false", "the v2 API is not served"),
    idle("proxy", "off", "there is no v2 store, and no proxy of it"),
];

/// Of 3.5 and 3.6; the flag goes on without it.
const FORMER_PREFIX: &str = "experimental-";

impl Flag {
    /// The flag of that name, or of a former one.
    pub fn find(name: &str) -> Option<&'static Self> {
        let named = |name: &str| FLAGS.iter().find(|flag| flag.name == name);
        named(name).or_else(|| named(name.strip_prefix(FORMER_PREFIX)?))
    }

    /// Whether it may stand without a value.
    pub fn is_switch(&self) -> bool {
        matches!(self.default, "true" | "false")
    }

    /// Whether etcd does the same if nothing is said.
    pub fn is_default(&self, value: &str) -> bool {
        if self.is_switch() { truth(value) == truth(self.default) } else { value == self.default }
    }
}

/// As Go reads it.
pub fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Flags with their values, in the order in which they were given.
pub type Pairs = Vec<(&'static str, String)>;

/// A command line.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Version,
    Help,
    Flags(Pairs),
}

/// Reads what follows the program's name.
pub fn read(args: &[String]) -> anyhow::Result<Line> {
    let mut given = Vec::new();
    let mut rest = args.iter();
    while let Some(word) = rest.next() {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|name| !name.is_empty());
        let Some(name) = name else {
            if matches!(&word[..], "gateway" | "grpc-proxy") {
                bail!(
                    "`etcd {word}` is not here: clients and proxies of etcd work with this server, and none is part of it"
                );
            }
            bail!("{word:?} is not a valid flag; expected --flag=value or --flag value; see --help");
        };
        let (name, attached) =
            name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value.to_owned())));
        match name {
            "version" if attached.as_deref().is_none_or(|value| truth(value) == Some(true)) => {
                return Ok(Line::Version);
            }
            "h" | "help" => return Ok(Line::Help),
            "version" => continue,
            _ => {}
        }
        let flag = Flag::find(name)
            .with_context(|| format!("--{name} is no flag of etcd 3.7; correct it or leave it out; see --help"))?;
        let value = match attached {
            Some(value) => value,
            None if flag.is_switch() => "true".to_owned(),
            None => rest.next().with_context(|| format!("--{name} needs a value"))?.clone(),
        };
        check_switch(flag, name, &value)?;
        given.push((flag.name, value));
    }
    Ok(Line::Flags(given))
}

/// Refuses a switch that is neither on nor off.
pub fn check_switch(flag: &Flag, shown: &str, value: &str) -> anyhow::Result<()> {
    if flag.is_switch() && truth(value).is_none() {
        bail!("{shown}: got {value:?}, expected true or false");
    }
    Ok(())
}

/// What `--help` prints: every flag with etcd's default, and what becomes of it.
pub fn help() -> String {
    let mut text = String::from(HELP_HEAD);
    for flag in FLAGS {
        let fate = match flag.fate {
            Fate::Taken => String::new(),
            Fate::Refused(why) => format!("\n    Refused: {why}."),
            Fate::Idle(why) => format!("\n    Changes nothing: {why}."),
        };
        text += &format!("  --{} '{}'{fate}\n", flag.name, flag.default);
    }
    text
}

const HELP_HEAD: &str = "\
Usage:

  quorate etcd [flags]
    Run a member with etcd's own command line, environment (ETCD_NAME for --name, and so on) or file.
  quorate etcd --version
    Show the version of etcd whose API is spoken.
  quorate etcd --config-file FILE
    Read all settings from an etcd's YAML file; flags and environment are ignored then, as by etcd.

A link to this program that is named etcd does the same. Members are those of --initial-cluster, by any names; nobody is
added, promoted, replaced or removed but by a person. Settings that etcd has no flag for can be given in the environment,
such as QUORATE_LIMITS__BACKUPS_MAX=8 (`quorate config --manual` has all).

Flags, with etcd's defaults:
";

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(line: &str) -> anyhow::Result<Line> {
        read(&line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_read_as_go_reads_them() {
        let line = "--name=a -data-dir d --pre-vote --strict-reconfig-check=F -initial-cluster=x=http://y:1,z=http://w:2 --name b";
        let expected = [
            ("name", "a"),
            ("data-dir", "d"),
            ("pre-vote", "true"),
            ("strict-reconfig-check", "F"),
            ("initial-cluster", "x=http://y:1,z=http://w:2"),
            ("name", "b"),
        ];
        let expected = expected.map(|(name, value)| (name, value.to_owned())).to_vec();
        assert_eq!(flags(line).unwrap(), Line::Flags(expected));
        assert_eq!(flags("--name a --version").unwrap(), Line::Version);
        assert_eq!(flags("-h").unwrap(), Line::Help);
        assert_eq!(flags("--version=false").unwrap(), Line::Flags(Vec::new()));
        let former = flags("--experimental-watch-progress-notify-interval=5s").unwrap();
        assert_eq!(former, Line::Flags(vec![("watch-progress-notify-interval", "5s".to_owned())]));
    }

    #[test]
    fn what_is_no_flag_is_refused_by_name() {
        for (line, why) in [
            ("--no-such-flag", "--no-such-flag is no flag"),
            ("--experimental-nothing 1", "--experimental-nothing is no flag"),
            ("serve", "\"serve\" is not a valid flag"),
            ("--", "\"--\" is not a valid flag"),
            ("--name", "--name needs a value"),
            ("--pre-vote=maybe", "expected true or false"),
            ("gateway start", "is not here"),
        ] {
            let message = flags(line).unwrap_err().to_string();
            assert!(message.contains(why), "{line}: {message}");
        }
    }

    #[test]
    fn no_flag_is_listed_twice() {
        let mut names: Vec<&str> = FLAGS.iter().map(|flag| flag.name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
