//! DNS SRV records: at which hosts and ports a domain offers a service.
//!
//! The system's resolver, which everybody else here asks, gives addresses alone; so this asks the servers of `/etc/resolv.conf` itself, by
//! the crate hickory, with that file's search list and patience.
//! Invariant: blocks for `PATIENCE` at most.
//! Absent: priorities and weights: who asks wants every target. What is remembered: each call asks anew.

use std::io;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;

/// Longer than every server of a usual `/etc/resolv.conf` takes to be silent, each asked twice.
const PATIENCE: Duration = Duration::from_secs(30);

/// A target of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Without the dot at the end.
    pub host: String,
    pub port: u16,
}

/// The targets of `name`, in no order; not an empty list. Not to be called on a thread of the event loop.
pub fn look_up(name: &str) -> io::Result<Vec<Service>> {
    // `enable_all`: sockets and timers.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let asking = async { ask(&resolver()?, name).await };
        super::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    })
}

async fn ask(resolver: &TokioResolver, name: &str) -> io::Result<Vec<Service>> {
    let nothing = || io::Error::new(io::ErrorKind::NotFound, "the name has no SRV record");
    let answer = resolver.srv_lookup(name).await;
    let answer = answer.map_err(|e| if e.is_no_records_found() { nothing() } else { io::Error::other(e) })?;
    let targets = answer.answers().iter().filter_map(|record| match &record.data {
        // The root as target says that there is no such service.
        RData::SRV(srv) if !srv.target.is_root() => {
            Some(Service { host: srv.target.to_utf8().trim_end_matches('.').to_owned(), port: srv.port })
        }
        _ => None,
    });
    let found: Vec<Service> = targets.collect();
    if found.is_empty() { Err(nothing()) } else { Ok(found) }
}

#[cfg(not(feature = "testing"))]
fn resolver() -> io::Result<TokioResolver> {
    TokioResolver::builder_tokio().and_then(|builder| builder.build()).map_err(io::Error::other)
}

/// Asks the server that a test names, `QUORATE_TEST_DNS=address:port`, in the place of the machine's.
#[cfg(feature = "testing")]
fn resolver() -> io::Result<TokioResolver> {
    use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
    use hickory_resolver::net::runtime::TokioRuntimeProvider;

    let Ok(server) = std::env::var("QUORATE_TEST_DNS") else {
        return TokioResolver::builder_tokio().and_then(|builder| builder.build()).map_err(io::Error::other);
    };
    let server: std::net::SocketAddr = server.parse().map_err(io::Error::other)?;
    let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
    connections.iter_mut().for_each(|connection| connection.port = server.port());
    let server = NameServerConfig::new(server.ip(), true, connections);
    let config = ResolverConfig::from_name_servers(vec![server]);
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).build().map_err(io::Error::other)
}
