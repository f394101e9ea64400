//! From etcd's flags to settings.
//!
//! Owns no rule: what it gives goes through `config`, which checks it as any other source. Invariants: every flag of the fate `Taken` is
//! read here, with etcd's default where it was not given and the default is visible; what is given and changes nothing gives a note.
//! Absent: reading flags, variables and files (`flags`, `environment`, `file`), and asking DNS (`discovery`).

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use super::flags::{FLAGS, Fate, Flag, Pairs, truth};
use crate::config;
use crate::secure::cipher_suites;

/// Flags with their values; of those given twice the last one holds.
#[derive(Debug, Default)]
pub struct Given(Pairs);

/// Where the first members stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Members {
    /// In `--initial-cluster`, or nowhere: then it is this member alone.
    #[default]
    Listed,
    /// On this member's disk.
    Known,
    Found(Found),
}

/// What DNS has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As `--initial-cluster` has it, ascending; a name is the `host:port` of the URL behind it.
    pub list: String,
    /// This member's name in it.
    pub own: String,
}

/// Where log lines go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Output {
    #[default]
    Error,
    Standard,
    File(String),
}

/// What a command line comes to.
#[derive(Debug, Default)]
pub struct Translation {
    pub settings: Vec<config::Flag>,
    pub output: Output,
    /// One line each, for the log.
    pub notes: Vec<String>,
}

/// A URL: whether it asks for TLS, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Url {
    tls: bool,
    place: UrlPlace,
}

/// A URL's `host:port`, or the path of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
enum UrlPlace {
    Http(String),
    Unix(String),
}

const GATES: [&str; 11] = [
    "AllAlpha",
    "AllBeta",
    "CompactHashCheck",
    "FastLeaseKeepAlive",
    "InitialCorruptCheck",
    "LeaseCheckpoint",
    "LeaseCheckpointPersist",
    "PriorityRequest",
    "SetMemberLocalAddr",
    "StopGRPCServiceOnDefrag",
    "TxnModeWriteWithSharedBuffer",
];

impl Given {
    pub fn new(flags: Pairs) -> Self {
        Self(flags)
    }

    /// What was said, if anything was.
    pub fn said(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// What was said, or etcd's default.
    pub fn value(&self, name: &'static str) -> &str {
        let flag = Flag::find(name).expect("a flag of the table");
        self.said(name).unwrap_or(flag.default)
    }

    /// As [`Self::said`], of a number that is not the default.
    fn number(&self, name: &'static str) -> anyhow::Result<Option<i64>> {
        let read =
            |text: &str| text.parse().with_context(|| format!("--{name}: got {text:?}, expected a whole number"));
        self.said(name).filter(|text| !text.is_empty()).map(read).transpose()
    }

    fn duration(&self, name: &'static str) -> anyhow::Result<Option<Duration>> {
        let read = |text: &str| {
            let fault = || format!("--{name}: got {text:?}, expected a duration such as 300ms, 5s or 1h30m");
            go_duration(text).with_context(fault)
        };
        self.said(name).map(read).transpose()
    }

    fn urls(&self, name: &'static str) -> anyhow::Result<Vec<Url>> {
        urls(name, self.value(name))
    }

    /// Where this member says that others find it: `host:port`, at least one.
    pub fn peer_addresses(&self) -> anyhow::Result<Vec<String>> {
        const NAME: &str = "initial-advertise-peer-urls";
        let addresses = http_only(NAME, self.urls(NAME)?)?;
        ensure!(!addresses.is_empty(), "--{NAME}: got nothing, expected http://host:port");
        Ok(addresses)
    }

    pub fn data_dir(&self) -> String {
        let said = self.said("data-dir").filter(|dir| !dir.is_empty());
        said.map_or_else(|| format!("{}.etcd", self.value("name")), str::to_owned)
    }
}

/// Makes settings of flags, and of the members that were found elsewhere; refuses what cannot be done here, by name.
pub fn translate(given: &Given, found: &Members) -> anyhow::Result<Translation> {
    let mut to = Translation::default();
    judge(given, &mut to)?;
    let name = given.value("name");
    to.set("identity.name", "--name", name);
    to.set("server.data_dir", "--data-dir", given.data_dir());
    listeners(given, &mut to)?;
    tls(given, &mut to)?;
    members(given, name, found, &mut to)?;
    timing(given, &mut to)?;
    limits(given, &mut to)?;
    users(given, &mut to)?;
    compaction(given, &mut to);
    origins(given, &mut to);
    log(given, &mut to)?;
    Ok(to)
}

fn users(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    if let Some(cost) = given.number("bcrypt-cost")? {
        to.set("auth.bcrypt_cost", "--bcrypt-cost", cost.to_string());
    }
    if let Some(seconds) = given.number("auth-token-ttl")? {
        to.set("auth.token_ttl", "--auth-token-ttl", format!("{seconds}s"));
    }
    Ok(())
}

impl Translation {
    fn set(&mut self, key: &str, flag: &str, value: impl Into<String>) {
        self.settings.push(config::Flag { key: key.into(), value: value.into(), flag: flag.into() });
    }

    fn set_duration(&mut self, key: &str, flag: &str, value: Duration) {
        self.set(key, flag, humantime::format_duration(value).to_string());
    }
}

/// What is refused, and what changes nothing.
fn judge(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    for flag in FLAGS {
        let Some(value) = given.said(flag.name).filter(|value| !flag.is_default(value)) else { continue };
        match flag.fate {
            Fate::Refused(why) => bail!("--{} {value:?} is refused: {why}", flag.name),
            Fate::Idle(why) => to.notes.push(format!("--{} {value:?} changes nothing: {why}", flag.name)),
            Fate::Taken => {}
        }
    }
    for gate in given.value("feature-gates").split(',').map(str::trim).filter(|gate| !gate.is_empty()) {
        let known = gate.split_once('=').is_some_and(|(name, value)| GATES.contains(&name) && truth(value).is_some());
        ensure!(known, "--feature-gates: got {gate:?}, expected NAME=true or NAME=false, of {}", GATES.join(", "));
        to.notes.push(format!(
            "--feature-gates {gate:?} changes nothing: what it gates is here, or has nothing to do here"
        ));
    }
    Ok(())
}

fn listeners(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    let mut clients = given.urls("listen-client-urls")?;
    let http = given.urls("listen-client-http-urls")?;
    if !http.is_empty() {
        to.notes.push("--listen-client-http-urls: every clients' port serves gRPC and HTTP".into());
        clients.extend(http);
    }
    to.set("server.listen_client", "--listen-client-urls", places("listen-client-urls", &clients)?);
    let peers = given.urls("listen-peer-urls")?;
    to.set("server.listen_peer", "--listen-peer-urls", places("listen-peer-urls", &peers)?);
    let metrics = given.urls("listen-metrics-urls")?;
    ensure!(
        !metrics.iter().any(|url| url.tls),
        "--listen-metrics-urls: what a member says of itself is served without TLS; give http:// URLs, of addresses that only those reach who may read it"
    );
    let status = if metrics.is_empty() { "off".to_owned() } else { places("listen-metrics-urls", &metrics)? };
    to.set("server.listen_status", "--listen-metrics-urls", status);
    // Where only the listeners are given, etcd asks for these too; here they follow from the listeners.
    if given.said("advertise-client-urls").is_some() || given.said("listen-client-urls").is_none() {
        let told = given.urls("advertise-client-urls")?;
        let told: Vec<String> = told.iter().map(Url::to_string).collect();
        to.set("server.advertise_client", "--advertise-client-urls", told.join(","));
    }
    Ok(())
}

/// Whether all of these ask for TLS, or none does: one port is one or the other.
fn all_tls(flag: &str, urls: &[Url]) -> anyhow::Result<bool> {
    let is_tls = urls.first().is_some_and(|url| url.tls);
    ensure!(
        urls.iter().all(|url| url.tls == is_tls),
        "--{flag}: got {:?}, expected URLs with TLS or without, and not some of both: a port is one or the other",
        urls.iter().map(Url::to_string).collect::<Vec<_>>().join(",")
    );
    Ok(is_tls)
}

/// TLS is on where the URLs say so; as with etcd, files alone turn nothing on.
fn tls(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    const CLIENT: &[(&str, &str)] = &[
        ("cert-file", "cert_file"),
        ("key-file", "key_file"),
        ("trusted-ca-file", "ca_file"),
        ("client-crl-file", "crl_file"),
        ("client-cert-allowed-hostname", "allowed_names"),
    ];
    const PEER: &[(&str, &str)] = &[
        ("peer-cert-file", "cert_file"),
        ("peer-key-file", "key_file"),
        ("peer-trusted-ca-file", "ca_file"),
        ("peer-crl-file", "crl_file"),
        ("peer-cert-allowed-cn", "allowed_names"),
        ("peer-cert-allowed-hostname", "allowed_names"),
    ];
    let all = [given.urls("listen-client-urls")?, given.urls("listen-client-http-urls")?].concat();
    let clients = all_tls("listen-client-urls", &all)?;
    let peers = all_tls("listen-peer-urls", &given.urls("listen-peer-urls")?)?;
    for (is_on, section, urls, flags) in
        [(clients, "client_tls", "listen-client-urls", CLIENT), (peers, "peer_tls", "listen-peer-urls", PEER)]
    {
        if is_on {
            to.set(&format!("{section}.mode"), &format!("--{urls}"), "files");
        }
        for (flag, key) in flags {
            let Some(value) = given.said(flag).filter(|value| !value.is_empty()) else { continue };
            if is_on {
                to.set(&format!("{section}.{key}"), &format!("--{flag}"), value);
            } else {
                to.notes.push(format!("--{flag} {value:?} changes nothing: no URL of --{urls} is one of https"));
            }
        }
        if is_on {
            versions(given, section, to)?;
        }
    }
    let of_client = [("client-cert-auth", clients), ("peer-skip-client-san-verification", peers)];
    let of_both = ["tls-min-version", "tls-max-version", "cipher-suites"].map(|flag| (flag, clients || peers));
    for (flag, _) in of_client.into_iter().chain(of_both).filter(|(_, is_on)| !is_on) {
        let is_default = |value: &&str| Flag::find(flag).is_some_and(|flag| flag.is_default(value));
        if let Some(value) = given.said(flag).filter(|value| !is_default(value)) {
            to.notes.push(format!("--{flag} {value:?} changes nothing: no URL that it is for is one of https"));
        }
    }
    let asks = truth(given.value("client-cert-auth")) == Some(true) || !given.value("trusted-ca-file").is_empty();
    if clients && asks {
        to.set("client_tls.client_cert", "--client-cert-auth", "required");
    }
    if peers && truth(given.value("peer-skip-client-san-verification")) == Some(true) {
        to.set("peer_tls.check_address", "--peer-skip-client-san-verification", "false");
    }
    Ok(())
}

/// Versions and cipher suites, which etcd has for both ports together.
fn versions(given: &Given, section: &str, to: &mut Translation) -> anyhow::Result<()> {
    match given.value("tls-min-version") {
        "" | "TLS1.2" => {}
        "TLS1.3" => to.set(&format!("{section}.min_version"), "--tls-min-version", "1.3"),
        other => bail!("--tls-min-version: got {other:?}, expected TLS1.2 or TLS1.3"),
    }
    let most = given.value("tls-max-version");
    ensure!(
        matches!(most, "" | "TLS1.3"),
        "--tls-max-version: got {most:?}, expected TLS1.3, or nothing: who can speak it is not kept from it"
    );
    let (known, mut wanted) = (cipher_suites(), Vec::new());
    for suite in given.value("cipher-suites").split(',').map(str::trim).filter(|suite| !suite.is_empty()) {
        // Names that Go had before the standard.
        let standard = match suite.ends_with("_CHACHA20_POLY1305") {
            true => format!("{suite}_SHA256"),
            false => suite.to_owned(),
        };
        if known.contains(&standard) {
            wanted.push(standard);
        } else {
            to.notes.push(format!(
                "--cipher-suites {suite:?} changes nothing: of TLS 1.2 only suites with forward secrecy are spoken, of 1.3 always all"
            ));
        }
    }
    if !wanted.is_empty() {
        to.set(&format!("{section}.cipher_suites"), "--cipher-suites", wanted.join(","));
    }
    Ok(())
}

/// Members by name with their addresses, at least one each, in the order in which they were given.
type Listed = Vec<(String, Vec<String>)>;

/// Reads what `--initial-cluster` takes; `tls`: whether members speak it, if the URLs are to agree with that.
fn listed(flag: &str, text: &str, tls: Option<bool>) -> anyhow::Result<Listed> {
    let mut listed = Listed::new();
    // `a=http://x,http://y` has further URLs of `a`; so has `a=http://x,a=http://y`.
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (member, url) = match (part.split_once('='), listed.last()) {
            (Some((member, url)), _) => (member.to_owned(), url),
            (None, Some((member, _))) => (member.clone(), part),
            (None, None) => bail!("--{flag}: got {part:?}, expected name=http://host:port"),
        };
        let urls = urls(flag, url)?;
        ensure!(
            tls.is_none_or(|tls| urls.iter().all(|url| url.tls == tls)),
            "--{flag}: {url:?} and --listen-peer-urls must both be URLs of https or of http: members speak TLS with one another or they do not"
        );
        for address in http_only(flag, urls)? {
            match listed.iter_mut().find(|(known, _)| *known == member) {
                Some((_, addresses)) => addresses.push(address),
                None => listed.push((member.clone(), vec![address])),
            }
        }
    }
    Ok(listed)
}

/// Who is in the first membership, or where it is found, and where this member says that it is.
fn members(given: &Given, name: &str, members: &Members, to: &mut Translation) -> anyhow::Result<()> {
    const OWN: &str = "--initial-advertise-peer-urls";
    let own = given.peer_addresses()?;
    let tls = Some(all_tls("listen-peer-urls", &given.urls("listen-peer-urls")?)?);
    to.set("cluster.kind", "etcd's command line", "manual");
    let (listed, listed_as, flag) = match members {
        Members::Known => {
            to.set("cluster.join", OWN, own.join(","));
            to.set("server.advertise_peer", OWN, own.join(","));
            return Ok(());
        }
        Members::Found(found) => (listed("discovery-srv", &found.list, tls)?, found.own.as_str(), "--discovery-srv"),
        Members::Listed => {
            let said = given.said("initial-cluster").filter(|text| !text.is_empty());
            let default = format!("{name}={}", given.value("initial-advertise-peer-urls"));
            let tls = tls.filter(|_| said.is_some());
            (listed("initial-cluster", said.unwrap_or(&default), tls)?, name, "--initial-cluster")
        }
    };
    let entry = listed.iter().find(|(member, _)| member == listed_as).map(|(_, addresses)| addresses.clone());
    let told = match (&entry, members) {
        (Some(entry), Members::Listed) => entry,
        _ => &own,
    };
    if given.said("initial-advertise-peer-urls").is_some() && !own.contains(&told[0]) {
        let (own, told) = (own.join(","), told.join(","));
        to.notes.push(format!("{OWN} {own} differs from this member's entry in {flag}: others are told {told}"));
    }
    to.set("server.advertise_peer", OWN, told.join(","));
    match given.value("initial-cluster-state") {
        "new" => {
            let list: Vec<String> = listed.iter().map(|(member, at)| format!("{member}={}", at[0])).collect();
            to.set("cluster.members", flag, list.join(","));
            to.set("cluster.token", "--initial-cluster-token", given.value("initial-cluster-token"));
            if listed_as != name {
                let place = listed.iter().filter(|(member, _)| member.as_str() < listed_as).count();
                to.set("identity.slot", flag, place.to_string());
            }
        }
        "existing" => {
            let others = listed.iter().filter(|(member, _)| member != listed_as);
            let others: Vec<String> = others.flat_map(|(_, addresses)| addresses.clone()).collect();
            to.set("cluster.join", flag, others.join(","));
        }
        other => bail!("--initial-cluster-state: got {other:?}, expected new or existing"),
    }
    Ok(())
}

/// etcd's own defaults hold also where ours are shorter: who gave no value expects them.
fn timing(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    const FLAG: &str = "--election-timeout";
    let millis = |name: &'static str| -> anyhow::Result<Duration> {
        let text = given.value(name);
        let read = text.parse().with_context(|| format!("--{name}: got {text:?}, expected milliseconds"))?;
        Ok(Duration::from_millis(read))
    };
    let election = millis("election-timeout")?;
    // Above it everything else is an error of `config`; below it nothing overflows.
    ensure!(election <= Duration::from_secs(50), "--election-timeout: got {election:?}, expected at most 50000");
    to.set_duration("raft.heartbeat_interval", "--heartbeat-interval", millis("heartbeat-interval")?);
    to.set_duration("raft.election_timeout_min", FLAG, election);
    // A third for the spread, so that the shortest lease is etcd's: one and a half elections.
    let longest = election + election / 3;
    to.set_duration("raft.election_timeout_max", FLAG, longest);
    to.set_duration("server.request_timeout", FLAG, Duration::from_secs(5) + 2 * election);
    let defaults = config::Config::default();
    to.set_duration("cluster.failure_timeout", FLAG, defaults.cluster.failure_timeout.max(2 * longest));
    to.set_duration("cluster.reader_ttl", FLAG, defaults.cluster.reader_ttl.max(2 * longest));
    // As etcd, which goes when it is told to.
    to.set("server.quorum_wait", "etcd's command line", "0s");
    if let Some(interval) = given.duration("watch-progress-notify-interval")? {
        to.set_duration("watch.progress_interval", "--watch-progress-notify-interval", interval);
    }
    if let Some(interval) = given.duration("corrupt-check-time")?.filter(|interval| !interval.is_zero()) {
        to.set_duration("raft.self_check_interval", "--corrupt-check-time", interval);
    }
    Ok(())
}

fn limits(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    /// A connection that is never asked whether it lives.
    const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
    let quota = match given.number("quota-backend-bytes")?.unwrap_or(0) {
        0 => "2GiB".to_owned(),
        // None, as with etcd.
        quota if quota < 0 => "0B".to_owned(),
        quota => format!("{quota}B"),
    };
    to.set("storage.quota_bytes", "--quota-backend-bytes", quota);
    for (name, key, unit) in [
        ("max-txn-ops", "limits.txn_ops_max", ""),
        ("max-request-bytes", "limits.request_bytes_max", "B"),
        ("snapshot-catchup-entries", "log.entries_kept", ""),
        ("max-concurrent-streams", "limits.concurrent_streams_max", ""),
    ] {
        if let Some(number) = given.number(name)? {
            to.set(key, &format!("--{name}"), format!("{number}{unit}"));
        }
    }
    for (name, key) in [
        ("grpc-keepalive-interval", "limits.keepalive_interval"),
        ("grpc-keepalive-timeout", "limits.keepalive_timeout"),
    ] {
        if let Some(duration) = given.duration(name)? {
            let duration = if duration.is_zero() { NEVER } else { duration };
            to.set_duration(key, &format!("--{name}"), duration);
        }
    }
    Ok(())
}

fn compaction(given: &Given, to: &mut Translation) {
    let (mode, retention) = (given.value("auto-compaction-mode"), given.value("auto-compaction-retention").trim());
    let is_off = go_duration(retention).is_some_and(|length| length.is_zero()) || retention.is_empty();
    let hours = mode == "periodic" && retention.bytes().all(|byte| byte.is_ascii_digit());
    let retention = match go_duration(retention).filter(|_| mode == "periodic") {
        _ if hours => format!("{retention}h"),
        Some(length) => humantime::format_duration(length).to_string(),
        None => retention.to_owned(),
    };
    to.set("storage.compaction_mode", "--auto-compaction-mode", if is_off { "off" } else { mode });
    to.set("storage.compaction_retention", "--auto-compaction-retention", if is_off { "" } else { &retention });
}

fn origins(given: &Given, to: &mut Translation) {
    for (name, key) in [("cors", "http.cors"), ("host-whitelist", "http.hosts")] {
        // For etcd, empty is all.
        let value = Some(given.value(name)).filter(|value| !value.is_empty()).unwrap_or("*");
        to.set(key, &format!("--{name}"), value);
    }
}

fn log(given: &Given, to: &mut Translation) -> anyhow::Result<()> {
    let level = match given.value("log-level") {
        "panic" | "fatal" | "dpanic" => "error",
        level @ ("debug" | "info" | "warn" | "error") => level,
        other => bail!("--log-level: got {other:?}, expected debug, info, warn, error, panic or fatal"),
    };
    to.set("telemetry.level", "--log-level", level);
    let format = match given.value("log-format") {
        "json" => "json",
        "console" => "text",
        other => bail!("--log-format: got {other:?}, expected json or console"),
    };
    to.set("telemetry.format", "--log-format", format);
    to.output = match given.value("log-outputs") {
        "default" | "stderr" | "" => Output::Error,
        "stdout" => Output::Standard,
        "systemd/journal" => {
            to.notes.push("--log-outputs \"systemd/journal\": lines go to standard error, which systemd keeps".into());
            Output::Error
        }
        several if several.contains(',') => {
            bail!("--log-outputs: got {several:?}, expected one of stderr, stdout and a file")
        }
        file => Output::File(file.to_owned()),
    };
    Ok(())
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tls = if self.tls { "s" } else { "" };
        match &self.place {
            UrlPlace::Http(address) => write!(f, "http{tls}://{address}"),
            UrlPlace::Unix(path) => write!(f, "unix{tls}://{path}"),
        }
    }
}

fn urls(flag: &str, text: &str) -> anyhow::Result<Vec<Url>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| url(flag, part)).collect()
}

fn url(flag: &str, text: &str) -> anyhow::Result<Url> {
    let place = match text.split_once("://") {
        Some(("http" | "https", address)) => UrlPlace::Http(address.trim_end_matches('/').to_owned()),
        Some(("unix" | "unixs", path)) if !path.is_empty() => UrlPlace::Unix(path.to_owned()),
        _ => {
            bail!("--{flag}: got {text:?}, expected http://host:port or https://host:port, or unix://path for clients")
        }
    };
    Ok(Url { tls: text.starts_with("https:") || text.starts_with("unixs:"), place })
}

fn http_only(flag: &str, urls: Vec<Url>) -> anyhow::Result<Vec<String>> {
    urls.into_iter()
        .map(|url| match url.place {
            UrlPlace::Http(address) => Ok(address),
            UrlPlace::Unix(path) => {
                bail!(
                    "--{flag}: got {:?}, expected http://host:port: members dial over the network",
                    format!("unix://{path}")
                )
            }
        })
        .collect()
}

/// As `config` writes places. `localhost` is what etcd's defaults say; other names are no place to listen at, for etcd neither.
fn places(flag: &str, urls: &[Url]) -> anyhow::Result<String> {
    let place = |url: &Url| match &url.place {
        UrlPlace::Unix(path) => Ok(format!("unix:{path}")),
        UrlPlace::Http(address) => {
            let place = address.strip_prefix("localhost:").map_or(address.clone(), |port| format!("127.0.0.1:{port}"));
            let is_place = place.parse::<std::net::SocketAddr>().is_ok();
            ensure!(is_place, "--{flag}: got {:?}, expected an IP address and a port to listen at", url.to_string());
            Ok(place)
        }
    };
    ensure!(!urls.is_empty(), "--{flag}: got nothing, expected http://host:port");
    Ok(urls.iter().map(place).collect::<Result<Vec<_>, _>>()?.join(","))
}

/// A duration as Go writes it: numbers, perhaps with a fraction, each with its unit; `0` alone.
pub fn go_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut seconds) = (text, 0.0);
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..unit_at].parse().ok()?;
        rest = &rest[unit_at..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == &rest[..end])?;
        seconds += number * unit;
        rest = &rest[end..];
    }
    // To the nanosecond: binary fractions are a hair off.
    Duration::try_from_secs_f64(seconds).ok().map(|d| Duration::from_nanos((d.as_secs_f64() * 1e9).round() as u64))
}

#[cfg(test)]
mod tests;
