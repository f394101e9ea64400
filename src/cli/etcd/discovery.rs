//! The first members as DNS has them: `--discovery-srv DOMAIN`.
//!
//! As etcd's: `_etcd-server-ssl._tcp.DOMAIN` lists members at https, `_etcd-server._tcp.DOMAIN` at http, both with `-NAME` of
//! `--discovery-srv-name` behind the service; the entry that leads to `--initial-advertise-peer-urls` is this member's own. What is found
//! stands for `--initial-cluster`.
//! Invariants: whoever is told the same by DNS makes the same list, so members are listed by their targets, and not by numbers in the order of
//! the answer. A disk that belongs to a cluster knows its members: DNS is not asked then, and may be away.
//! Absent: asking again. As with etcd, a process that learns of nobody ends, and whatever has started it starts it again.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use anyhow::{Context as _, ensure};

use super::translate::{Found, Given, Members};
use crate::env::srv::Service;

/// How names are looked up.
pub struct Dns<'a> {
    pub services: &'a dyn Fn(&str) -> io::Result<Vec<Service>>,
    /// Of a `host:port`.
    pub addresses: &'a dyn Fn(&str) -> io::Result<Vec<SocketAddr>>,
}

/// Finds the members if `--discovery-srv` asks for it; `is_formed`: the disk belongs to a cluster.
pub fn discover(given: &Given, is_formed: bool, dns: &Dns) -> anyhow::Result<Members> {
    let (domain, name) = (given.value("discovery-srv"), given.value("discovery-srv-name"));
    if domain.is_empty() {
        ensure!(name.is_empty(), "--discovery-srv-name {name:?} without --discovery-srv: name the domain, too");
        return Ok(Members::Listed);
    }
    ensure!(
        given.said("initial-cluster").is_none_or(str::is_empty),
        "--discovery-srv and --initial-cluster are both given: both say who the first members are; leave one out"
    );
    if is_formed {
        return Ok(Members::Known);
    }
    let suffix = if name.is_empty() { String::new() } else { format!("-{name}") };
    let (mut targets, mut faults) = (BTreeSet::new(), Vec::new());
    for (scheme, service) in [("https", "etcd-server-ssl"), ("http", "etcd-server")] {
        let record = format!("_{service}{suffix}._tcp.{domain}");
        match (dns.services)(&record) {
            Ok(found) => targets.extend(found.into_iter().map(|at| (format!("{}:{}", at.host, at.port), scheme))),
            Err(error) => faults.push(format!("{record}: {error}")),
        }
    }
    ensure!(
        !targets.is_empty(),
        "--discovery-srv: DNS says of no member ({}); expected an SRV record for each; add them, or list the members in --initial-cluster",
        faults.join("; ")
    );
    let own = given.peer_addresses()?;
    let list: Vec<String> = targets.iter().map(|(target, scheme)| format!("{target}={scheme}://{target}")).collect();
    let list = list.join(",");
    let entry = own_entry(&own, targets.iter().map(|(target, _)| target.as_str()), dns).with_context(|| {
        format!(
            "--discovery-srv: none of the records ({list}) leads to this member ({}, --initial-advertise-peer-urls); add one that does, or \
             correct the flag",
            own.join(",")
        )
    })?;
    Ok(Members::Found(Found { list, own: entry }))
}

/// The target that is one of the `own` addresses: as it is written, or else by what both resolve to.
fn own_entry<'a>(own: &[String], targets: impl Iterator<Item = &'a str> + Clone, dns: &Dns) -> Option<String> {
    let resolved = |address: &str| (dns.addresses)(address).unwrap_or_default();
    let written = targets.clone().find(|target| own.iter().any(|own| own == target));
    let found = written.or_else(|| {
        let own: BTreeSet<SocketAddr> = own.iter().flat_map(|address| resolved(address)).collect();
        targets.into_iter().find(|target| resolved(target).iter().any(|address| own.contains(address)))
    });
    found.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::etcd::flags::{self, Line};

    /// Discovers with these records, by a name service that knows hosts `a`, `b` and so on as 10.0.0.1, 10.0.0.2 and so on.
    fn discovered(line: &str, records: &[(&str, &[(&str, u16)])]) -> anyhow::Result<Members> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let Line::Flags(given) = flags::read(&words)? else { panic!("no flags") };
        let services = |name: &str| {
            let found = records.iter().find(|(known, _)| *known == name).ok_or(io::ErrorKind::NotFound)?;
            Ok(found.1.iter().map(|(host, port)| Service { host: (*host).to_owned(), port: *port }).collect())
        };
        let addresses = |address: &str| {
            let (host, port) = address.split_once(':').expect("host:port");
            let ip = match host.as_bytes() {
                [letter @ b'a'..=b'z'] => format!("10.0.0.{}", letter - b'a' + 1),
                _ => host.to_owned(),
            };
            Ok(vec![format!("{ip}:{port}").parse().map_err(|_| io::ErrorKind::NotFound)?])
        };
        discover(&Given::new(given), false, &Dns { services: &services, addresses: &addresses })
    }

    fn found(list: &str, own: &str) -> Members {
        Members::Found(Found { list: list.into(), own: own.into() })
    }

    const PLAIN: (&str, &[(&str, u16)]) = ("_etcd-server._tcp.x.org", &[("c", 1), ("a", 2), ("b", 1)]);
    const TLS: (&str, &[(&str, u16)]) = ("_etcd-server-ssl-mine._tcp.x.org", &[("b", 1), ("a", 1)]);

    #[test]
    fn members_are_the_records_targets_in_one_order_for_all() {
        let plain = "a:2=http://a:2,b:1=http://b:1,c:1=http://c:1";
        for (own, entry) in [("http://b:1", "b:1"), ("http://10.0.0.3:1", "c:1"), ("http://z:9,http://a:2/", "a:2")] {
            let line = format!("--discovery-srv x.org --initial-advertise-peer-urls {own}");
            assert_eq!(discovered(&line, &[PLAIN, TLS]).unwrap(), found(plain, entry), "{line}");
        }
        let line = "--discovery-srv x.org --discovery-srv-name mine --initial-advertise-peer-urls https://a:1 --listen-peer-urls https://0.0.0.0:1";
        assert_eq!(discovered(line, &[PLAIN, TLS]).unwrap(), found("a:1=https://a:1,b:1=https://b:1", "a:1"));
    }

    #[test]
    fn what_gives_no_list_with_this_member_is_refused() {
        for (line, why) in [
            (
                "--discovery-srv y.org",
                "_etcd-server-ssl._tcp.y.org: entity not found; _etcd-server._tcp.y.org: entity not found",
            ),
            ("--discovery-srv x.org --initial-advertise-peer-urls http://d:1", "leads to this member (d:1"),
            ("--discovery-srv x.org --initial-cluster a=http://a:1", "both given"),
            ("--discovery-srv-name mine", "without --discovery-srv"),
        ] {
            let message = format!("{:#}", discovered(line, &[PLAIN, TLS]).expect_err(line));
            assert!(message.contains(why), "{line}: {message}");
        }
    }

    #[test]
    fn dns_is_asked_only_for_a_disk_without_a_cluster() {
        let Line::Flags(given) = flags::read(&["--discovery-srv=x.org".to_owned()]).unwrap() else {
            panic!("no flags")
        };
        let silent = |_: &str| -> io::Result<Vec<Service>> { panic!("DNS was asked") };
        let dns = Dns { services: &silent, addresses: &|_| panic!("DNS was asked") };
        assert_eq!(discover(&Given::new(given), true, &dns).unwrap(), Members::Known);
        assert_eq!(discover(&Given::new(Vec::new()), false, &dns).unwrap(), Members::Listed);
    }
}
