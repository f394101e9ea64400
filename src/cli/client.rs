//! Connections of the client commands, and their errors as one line.
//!
//! Owns the choice of an endpoint: the first that can be dialled. Absent: retries of a request that was sent; only the user
//! knows whether sending it twice is safe.

use std::time::Duration;

use anyhow::{anyhow, bail};
use tonic::transport::{self, Endpoint};
use tonic::{Code, Response, Status};

use super::credentials::{Channel, UserArgs};
use crate::config::STATUS_PORT_OFFSET;
use crate::config::units::duration;
use crate::env::timeout;

/// Largest answer that is taken, in bytes.
pub const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Between signs of life that are asked of a connection, and the wait for one.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Where the cluster is, and how long to wait for it.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientArgs {
    /// Client addresses of members, with commas; the first that can be reached is asked
    #[arg(long, env = "QUORATE_ENDPOINTS", value_delimiter = ',', default_value = "127.0.0.1:2379")]
    pub endpoints: Vec<String>,
    /// Longest wait for a connection to one endpoint
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration::parse)]
    pub dial_timeout: Duration,
    /// Longest wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration::parse)]
    pub timeout: Duration,
    #[command(flatten)]
    pub user: UserArgs,
}

impl ClientArgs {
    /// The given endpoints, without empty ones.
    pub fn endpoints(&self) -> impl Iterator<Item = &str> {
        self.endpoints.iter().map(|endpoint| endpoint.trim()).filter(|endpoint| !endpoint.is_empty())
    }

    /// Connects to the first endpoint that can be reached.
    pub async fn connect(&self) -> anyhow::Result<Channel> {
        let mut failures = Vec::new();
        for endpoint in self.endpoints() {
            match self.dial(endpoint).await {
                Ok(channel) => return Ok(channel),
                Err(failure) => failures.push(format!("{endpoint}: {failure}")),
            }
        }
        bail!("{}", unreachable(&failures))
    }

    /// Connects to the first endpoint at which a member says something of itself, though it may not serve clients yet.
    pub async fn connect_for_status(&self) -> anyhow::Result<Channel> {
        let mut failures = Vec::new();
        for endpoint in self.endpoints() {
            match self.dial_for_status(endpoint).await {
                Ok(channel) => return Ok(channel),
                Err(failure) => failures.push(format!("{endpoint}: {failure}")),
            }
        }
        bail!("{}", unreachable(&failures))
    }

    /// Connects to one endpoint, or to the status port beside it: a member that starts has no other.
    pub async fn dial_for_status(&self, endpoint: &str) -> Result<Channel, String> {
        let failure = match self.dial(endpoint).await {
            Ok(channel) => return Ok(channel),
            Err(failure) => failure,
        };
        match beside(endpoint) {
            // Who is away altogether is not waited for twice.
            // Nobody signs in there.
            Some(status) if failure.contains("refused") => {
                self.open(&status).await.map_err(|_| failure).and_then(|channel| self.user.with_token(channel))
            }
            _ => Err(failure),
        }
    }

    /// Connects to one endpoint, and shows who asks; the error is a short reason.
    pub async fn dial(&self, endpoint: &str) -> Result<Channel, String> {
        self.user.sign_in(self.open(endpoint).await?, self.timeout).await
    }

    async fn open(&self, endpoint: &str) -> Result<transport::Channel, String> {
        let endpoint = Endpoint::from_shared(url(endpoint)?).map_err(|error| last_source(&error))?;
        // A watch may wait for hours: a server that lost its power must be noticed.
        let endpoint =
            endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE).keep_alive_while_idle(true);
        match timeout(self.dial_timeout, endpoint.connect()).await {
            Err(_) => Err(format!("no connection within {}", humantime::format_duration(self.dial_timeout))),
            Ok(connected) => connected.map_err(|error| last_source(&error)),
        }
    }

    /// Waits for an answer.
    pub async fn answer<T>(
        &self,
        request: impl Future<Output = Result<Response<T>, Status>>,
    ) -> anyhow::Result<Response<T>> {
        match timeout(self.timeout, request).await {
            Err(_) => {
                let waited = humantime::format_duration(self.timeout);
                bail!("no answer within {waited}; see `quorate status`, or raise --timeout")
            }
            Ok(answer) => answer.map_err(|status| failure(&status)),
        }
    }
}

/// The status port's address, where it has not been moved by `server.listen_status`.
fn beside(endpoint: &str) -> Option<String> {
    let url = url(endpoint).ok()?;
    let (host, port) = url.rsplit_once(':')?;
    Some(format!("{host}:{}", port.parse::<u16>().ok()?.checked_add(STATUS_PORT_OFFSET)?))
}

/// What to say when no endpoint could be reached.
pub fn unreachable(failures: &[String]) -> String {
    const ACTION: &str = "check that the server runs and serves (`quorate status` also shows members that start), and name its client addresses with --endpoints or QUORATE_ENDPOINTS";
    match failures {
        [] => format!("no endpoint given; {ACTION}"),
        failures => format!("no endpoint can be reached ({}); {ACTION}", failures.join(", ")),
    }
}

/// An endpoint as a URL: `host:port`, or `http://host:port`.
fn url(endpoint: &str) -> Result<String, String> {
    let address = match endpoint.split_once("://") {
        Some(("http", address)) => address,
        Some((scheme, _)) => return Err(format!("scheme {scheme:?} is not served, expected http://host:port")),
        None => endpoint,
    };
    let address = address.trim_end_matches('/');
    match crate::identity::host_port(address) {
        Some(_) => Ok(format!("http://{address}")),
        None => Err("expected host:port".to_owned()),
    }
}

/// The innermost reason: outer ones only say "transport error".
fn last_source(error: &tonic::transport::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// A refusal as one line with what to do.
pub fn failure(status: &Status) -> anyhow::Error {
    let action = match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => "see `quorate status` for who answers and who leads, then retry",
        Code::ResourceExhausted if status.message().contains("space") => {
            "delete keys and `quorate compact`, or raise storage.quota_bytes"
        }
        Code::ResourceExhausted => "the server is overloaded: retry later",
        Code::OutOfRange => "choose a revision between the compacted and the current one",
        Code::Unimplemented => "this server does not offer it: check its version with `quorate status`",
        Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound => "correct the request",
        Code::PermissionDenied | Code::Unauthenticated => "ask for the permission",
        _ => "see the server's log",
    };
    let text = match status.message() {
        "" => "the server gave no reason".to_owned(),
        message => message.replace('\n', " "),
    };
    anyhow!("{text} ({:?}); {action}", status.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(endpoints: &[&str]) -> ClientArgs {
        ClientArgs {
            endpoints: endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect(),
            dial_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            user: UserArgs::default(),
        }
    }

    #[test]
    fn endpoints_become_urls() {
        for (endpoint, expected) in [
            ("127.0.0.1:2379", Ok("http://127.0.0.1:2379")),
            ("http://kv-0.kv:2379/", Ok("http://kv-0.kv:2379")),
            ("[::1]:2379", Ok("http://[::1]:2379")),
            ("kv-0", Err("expected host:port")),
            ("https://kv-0:2379", Err("scheme \"https\" is not served, expected http://host:port")),
        ] {
            assert_eq!(url(endpoint), expected.map(str::to_owned).map_err(str::to_owned), "{endpoint}");
        }
    }

    #[tokio::test]
    async fn unreachable_endpoints_are_all_named() {
        // Port 1 of the loopback address is served by nobody.
        let error = client(&["127.0.0.1:1", "", "https://a:1"]).connect().await.unwrap_err().to_string();
        assert!(error.starts_with("no endpoint can be reached (127.0.0.1:1: "), "{error}");
        assert!(error.contains("refused") && error.contains("https") && error.contains("--endpoints"), "{error}");
        assert!(!error.contains('\n'), "one line: {error}");
        let error = client(&[""]).connect().await.unwrap_err().to_string();
        assert!(error.starts_with("no endpoint given"), "{error}");
    }

    #[tokio::test]
    async fn next_endpoint_is_dialled_when_one_cannot_be_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let args = client(&["127.0.0.1:1", &address]);
        let (connected, accepted) = tokio::join!(args.connect(), listener.accept());
        assert!(connected.is_ok() && accepted.is_ok(), "{connected:?}");
    }

    #[test]
    fn refusals_are_one_line_with_an_action() {
        let line = failure(&Status::unavailable("etcdserver: no\nleader")).to_string();
        assert!(line.starts_with("etcdserver: no leader (Unavailable); see `quorate status`"), "{line}");
        let line = failure(&crate::error::Error::NoSpace.into()).to_string();
        assert!(line.contains("compact"), "{line}");
    }

    #[tokio::test]
    async fn silence_ends_in_an_error() {
        let args = ClientArgs { timeout: Duration::from_millis(10), ..client(&[]) };
        let never = std::future::pending::<Result<Response<()>, Status>>();
        assert!(args.answer(never).await.unwrap_err().to_string().contains("no answer within 10ms"));
    }
}
