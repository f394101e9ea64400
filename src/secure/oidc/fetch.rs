//! What an issuer publishes, over HTTPS.
//!
//! Invariants: the roots are those of a file; an answer has a bound in bytes and all of it one in time; no redirect is followed, so a token that is
//! shown goes to the host that was named and to no other.
//! Absent: when it is asked (the parent), proxies.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;

use super::super::{Dialer, roots_of};
use crate::env::{Env, timeout};

/// For one answer, from the connection on.
const PATIENCE: Duration = Duration::from_secs(10);
/// Sets of keys have a few thousand.
const ANSWER_BYTES_MAX: usize = 256 << 10;
const HTTPS_PORT: u16 = 443;

/// What is asked, and how.
pub(super) struct Ask<'a> {
    pub(super) url: &'a str,
    /// In PEM.
    pub(super) roots: &'a [u8],
    /// Shown as a bearer token.
    pub(super) token: Option<&'a str>,
}

/// The body of the answer; an error is a sentence.
pub(super) async fn fetch(env: &Env, ask: Ask<'_>) -> Result<Bytes, String> {
    let url = ask.url;
    let fetched = timeout(PATIENCE, try_fetch(env, &ask)).await;
    let fetched = fetched.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
    fetched.map_err(|error| format!("{url}: {error}"))
}

async fn try_fetch(env: &Env, ask: &Ask<'_>) -> Result<Bytes, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let uri: Uri = ask.url.parse().map_err(|error| text(&error))?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or("expected https://host/...")?;
    let port = uri.port_u16().unwrap_or(HTTPS_PORT);
    let roots = roots_of("the issuer's CA", ask.roots).map_err(|error| text(&error))?;
    let dialer = Dialer::for_https(roots).map_err(|error| text(&error))?;
    let stream = env.net.connect(format!("{host}:{port}")).await.map_err(|error| text(&error))?;
    let stream = dialer.dial(host, stream).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let mut request = Request::get(path).header(HOST, authority);
    if let Some(token) = ask.token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| text(&error))?;
    // The connection works as long as it is asked to, and ends with this.
    let asking = async {
        let answer = sender.send_request(request).await.map_err(|error| text(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("the answer is {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| text(&error))
    };
    let mut asking = pin!(asking);
    tokio::select! {
        biased;
        answer = &mut asking => answer,
        ended = connection => {
            ended.map_err(|error| text(&error))?;
            // The other end has closed it behind the answer.
            asking.await
        }
    }
}
