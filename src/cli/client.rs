//! Connections of the client commands, and their errors as one line.
//!
//! Owns the choice of an endpoint: the first that can be dialled; and of whom is trusted there: the CAs that the user names, else those
//! that the system does. What only reads goes on at the next endpoint when one has no answer ([`ClientArgs::read`]). Absent: retries of a
//! change that was sent; only the user knows whether sending it twice is safe. A way to trust anybody.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::http;
use tonic::transport::{self, Endpoint, Uri};
use tonic::{Code, Response, Status};
use tower::Service as _;

use super::credentials::{Channel, UserArgs};
use crate::config::STATUS_PORT_OFFSET;
use crate::config::units::duration;
use crate::env::{Env, Instant, timeout};
use crate::identity::{host_port, read_bounded};
use crate::secure::{Dialer, roots_of, system_roots};

/// Largest answer that is taken, in bytes.
pub const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Least wait for an answer to a read, however many endpoints are left to ask.
const LEAST_SHARE: Duration = Duration::from_millis(200);

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
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Where the endpoints were named, for advice.
    #[arg(skip = ENDPOINTS_FLAG)]
    pub named_by: &'static str,
}

/// Where most commands have their endpoints from.
pub const ENDPOINTS_FLAG: &str = "--endpoints or QUORATE_ENDPOINTS";

/// Whom to trust, and what to show. The ids are others than the flags: many a command has an argument `key`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TlsArgs {
    /// CAs of the servers, in PEM; endpoints without http:// then speak TLS [default: the CAs that this system trusts]
    #[arg(id = "tls_cacert", long = "cacert", env = "QUORATE_CACERT", value_name = "FILE")]
    pub cacert: Option<PathBuf>,
    /// Own certificate, in PEM, where servers ask for one
    #[arg(id = "tls_cert", long = "cert", env = "QUORATE_CERT", value_name = "FILE", requires = "tls_key")]
    pub cert: Option<PathBuf>,
    /// Its private key
    #[arg(id = "tls_key", long = "key", env = "QUORATE_KEY", value_name = "FILE", requires = "tls_cert")]
    pub key: Option<PathBuf>,
}

/// Largest file of certificates that is read.
const TLS_FILE_BYTES_MAX: usize = 4 << 20;

impl TlsArgs {
    /// Whether endpoints that do not say so are meant to speak TLS.
    fn is_meant(&self) -> bool {
        self.cacert.is_some() || self.cert.is_some()
    }

    fn dialer(&self) -> anyhow::Result<Dialer> {
        let disk = Env::real().disk;
        let read = |flag: &str, path: &Path| {
            read_bounded(&*disk, path, TLS_FILE_BYTES_MAX)
                .with_context(|| format!("{flag} {} cannot be read, expected a PEM file", path.display()))
        };
        let roots = match &self.cacert {
            Some(path) => roots_of("--cacert", &read("--cacert", path)?)?,
            None => system_roots()?,
        };
        let own = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((read("--cert", cert)?, read("--key", key)?)),
            _ => None,
        };
        Ok(Dialer::for_client(roots, own.as_ref().map(|(cert, key)| (&cert[..], &key[..])))?)
    }
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
        bail!("{}", unreachable_at(&failures, self.named_by))
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
        bail!("{}", unreachable_at(&failures, self.named_by))
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
        let url = url(endpoint, self.tls.is_meant())?;
        let is_tls = url.starts_with("https://");
        let endpoint = Endpoint::from_shared(url).map_err(|error| last_source(&error))?;
        // A watch may wait for hours: a server that lost its power must be noticed.
        let endpoint =
            endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE).keep_alive_while_idle(true);
        let connecting = async {
            if is_tls {
                let dialer = self.tls.dialer().map_err(|error| format!("{error:#}"))?;
                let connector = tower::service_fn(move |uri: Uri| dial_tls(dialer.clone(), uri));
                return endpoint
                    .connect_with_connector(connector)
                    .await
                    .map_err(|error| explained(last_source(&error)));
            }
            endpoint.connect().await.map_err(|error| last_source(&error))
        };
        match timeout(self.dial_timeout, connecting).await {
            Err(_) => Err(format!("no connection within {}", humantime::format_duration(self.dial_timeout))),
            Ok(connected) => connected,
        }
    }

    /// Asks for what changes nothing: when an endpoint cannot be reached, has no leader or does not answer, the next one is asked. Who is
    /// silent leaves the others their share of the time.
    pub async fn read<T>(
        &self,
        ask: impl AsyncFn(Channel) -> Result<Response<T>, Status>,
    ) -> anyhow::Result<Response<T>> {
        let endpoints: Vec<&str> = self.endpoints().collect();
        let deadline = Instant::now() + self.timeout;
        let mut failures = Vec::new();
        let mut last = None;
        for (asked, endpoint) in endpoints.iter().enumerate() {
            let channel = match self.dial(endpoint).await {
                Ok(channel) => channel,
                Err(failure) => {
                    failures.push(format!("{endpoint}: {failure}"));
                    continue;
                }
            };
            let left = (endpoints.len() - asked) as u32;
            let share = (deadline.saturating_duration_since(Instant::now()) / left).max(LEAST_SHARE);
            match timeout(share, ask(channel)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) if may_be_elsewhere(&status) => {
                    failures.push(format!("{endpoint}: {}", reason(&status)));
                    last = Some(failure(&status));
                }
                Ok(Err(status)) => return Err(failure(&status)),
                Err(_) => {
                    let waited = humantime::format_duration(Duration::from_millis(share.as_millis() as u64));
                    failures.push(format!("{endpoint}: no answer within {waited}"));
                    last = Some(anyhow!("no answer within {waited}; see `quorate status`, or raise --timeout"));
                }
            }
        }
        Err(match last {
            None => anyhow!("{}", unreachable_at(&failures, self.named_by)),
            Some(only) if failures.len() == 1 => only,
            Some(_) => anyhow!(
                "no endpoint has an answer ({}); see `quorate status` for who answers and who leads, then retry",
                failures.join(", ")
            ),
        })
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

async fn dial_tls(dialer: Dialer, uri: Uri) -> std::io::Result<TokioIo<Box<dyn crate::env::net::Stream>>> {
    let host = uri.host().unwrap_or_default();
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(443))).await?;
    stream.set_nodelay(true)?;
    dialer.dial(host, Box::new(stream)).await.map(TokioIo::new)
}

/// What TLS failed for, with what to do about it.
fn explained(failure: String) -> String {
    let hint = match &failure {
        text if text.contains("UnknownIssuer") => {
            "its certificate is of no CA that is trusted: name the CA with --cacert"
        }
        text if text.contains("NotValidForName") => "its certificate is for other names: use one of them",
        text if text.contains("InvalidContentType") => "it speaks no TLS: use http://",
        text if text.contains("frame with invalid size") => {
            "it speaks no gRPC: it is a port of another program, or one that wants https://; name a client port (2379)"
        }
        text if text.contains("broken pipe") || text.contains("reset by peer") => {
            "it has closed the connection: its member has stopped, or it speaks no gRPC and is a port of another program"
        }
        text if text.contains("CertificateRequired") => "it wants a certificate: --cert and --key",
        _ => return failure,
    };
    format!("{hint} ({failure})")
}

/// The status port's address, where it has not been moved by `server.listen_status`. It never speaks TLS.
fn beside(endpoint: &str) -> Option<String> {
    let url = url(endpoint, false).ok()?;
    let (host, port) = url.split_once("://")?.1.rsplit_once(':')?;
    Some(format!("http://{host}:{}", port.parse::<u16>().ok()?.checked_add(STATUS_PORT_OFFSET)?))
}

/// Largest page that is taken, in bytes.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// A page that a member serves beside gRPC, over the same connection.
pub async fn page(mut channel: Channel, path: &str) -> Result<String, String> {
    let request = http::Request::get(path).body(tonic::body::Body::empty()).map_err(|error| error.to_string())?;
    std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(|error| error.to_string())?;
    let answer = channel.call(request).await.map_err(|error| error.to_string())?;
    if !answer.status().is_success() {
        return Err(format!("{path}: {}", answer.status()));
    }
    let body = http_body_util::Limited::new(answer.into_body(), PAGE_BYTES_MAX).collect().await;
    Ok(String::from_utf8_lossy(&body.map_err(|error| error.to_string())?.to_bytes()).into_owned())
}

/// What to say when no endpoint could be reached.
pub fn unreachable(failures: &[String]) -> String {
    unreachable_at(failures, ENDPOINTS_FLAG)
}

/// The same, where the endpoints came from another flag.
fn unreachable_at(failures: &[String], named_by: &str) -> String {
    let action = format!(
        "check that the server runs and serves (`quorate status` also shows members that start), and name its client addresses with {named_by}"
    );
    match failures {
        [] => format!("no endpoint given; {action}"),
        failures => format!("no endpoint can be reached ({}); {action}", failures.join(", ")),
    }
}

/// Whether another member may have the answer to what changes nothing. A connection that breaks has any code.
fn may_be_elsewhere(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) || std::error::Error::source(status).is_some()
}

/// An endpoint as a URL: `host:port`, or with `http://` or `https://` before it.
fn url(endpoint: &str, tls: bool) -> Result<String, String> {
    let (scheme, address) = match endpoint.split_once("://") {
        Some((scheme @ ("http" | "https"), address)) => (scheme, address),
        Some((scheme, _)) => {
            return Err(format!("scheme {scheme:?} is not served, expected http:// or https://host:port"));
        }
        None if tls => ("https", endpoint),
        None => ("http", endpoint),
    };
    let address = address.trim_end_matches('/');
    match host_port(address) {
        Some(_) => Ok(format!("{scheme}://{address}")),
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

/// Why the connection has ended, if that is what a request failed for: a server that wants a certificate says so only after it was
/// connected to.
fn broken(status: &Status) -> Option<String> {
    let mut innermost = std::error::Error::source(status)?;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    Some(innermost.to_string().replace('\n', " "))
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
        Code::Unimplemented if serves_no_clients(status) => {
            "no client is served at this port: is it the one of peers (2380), or another program's? Name the clients' port (2379)"
        }
        Code::Unimplemented => "this server does not offer it: check its version with `quorate status`",
        Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound => "correct the request",
        Code::PermissionDenied | Code::Unauthenticated => "ask for the permission",
        _ => "see the server's log",
    };
    anyhow!("{} ({:?}); {action}", reason(status), status.code())
}

/// What a status says, without what to do.
fn reason(status: &Status) -> String {
    match (status.message(), broken(status)) {
        (_, Some(cause)) => explained(cause),
        ("", _) => "the server gave no reason".to_owned(),
        (message, _) => message.replace('\n', " "),
    }
}

/// Members' ports answer a client's call without a word, and web servers with a page; the clients' port names what it does not know.
fn serves_no_clients(status: &Status) -> bool {
    status.message().is_empty() || status.message().contains("HTTP status code")
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
            tls: TlsArgs::default(),
            named_by: ENDPOINTS_FLAG,
        }
    }

    #[test]
    fn endpoints_become_urls() {
        for (endpoint, tls, expected) in [
            ("127.0.0.1:2379", false, Ok("http://127.0.0.1:2379")),
            ("127.0.0.1:2379", true, Ok("https://127.0.0.1:2379")),
            ("http://kv-0.kv:2379/", true, Ok("http://kv-0.kv:2379")),
            ("[::1]:2379", false, Ok("http://[::1]:2379")),
            ("kv-0", true, Err("expected host:port")),
            ("https://kv-0:2379", false, Ok("https://kv-0:2379")),
            ("ftp://kv-0:2379", false, Err("scheme \"ftp\" is not served, expected http:// or https://host:port")),
        ] {
            assert_eq!(url(endpoint, tls), expected.map(str::to_owned).map_err(str::to_owned), "{endpoint}");
        }
        assert_eq!(beside("https://kv-0:2379").as_deref(), Some("http://kv-0:2381"), "it speaks no TLS");
    }

    #[tokio::test]
    async fn files_that_cannot_be_used_are_named() {
        let tls = TlsArgs { cacert: Some("/nowhere/ca.crt".into()), ..TlsArgs::default() };
        let args = ClientArgs { tls, ..client(&["127.0.0.1:1"]) };
        let error = args.connect().await.unwrap_err().to_string();
        assert!(error.contains("--cacert /nowhere/ca.crt cannot be read") && !error.contains('\n'), "{error}");
    }

    #[tokio::test]
    async fn unreachable_endpoints_are_all_named() {
        // Port 1 of the loopback address is served by nobody.
        let error = client(&["127.0.0.1:1", "", "ftp://a:1"]).connect().await.unwrap_err().to_string();
        assert!(error.starts_with("no endpoint can be reached (127.0.0.1:1: "), "{error}");
        assert!(error.contains("refused") && error.contains("ftp") && error.contains("--endpoints"), "{error}");
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
