//! How object stores are called: HTTP/1.1 over this process's own connections, and its own TLS.
//!
//! Absent: retries, credentials and what is asked, which are the crate's (`store`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use axum::http::Uri;
use http_body_util::BodyExt as _;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody,
    HttpService,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::env::net::{BoxFuture, Stream};
use crate::env::{Env, timeout};
use crate::secure::{self, Dialer};

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Without an answer for so long a call has failed: a part of some MiB at 1 MiB/s has arrived by then.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Makes clients for object stores.
#[derive(Clone)]
pub(super) struct Connector {
    env: Env,
    /// CAs in PEM that stores must come from; empty: those that the system trusts.
    ca: Vec<u8>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    pub(super) fn new(env: Env, ca: Vec<u8>) -> Self {
        Self { env, ca }
    }

    fn dialer(&self) -> Result<Dialer, secure::Error> {
        let roots =
            if self.ca.is_empty() { secure::system_roots()? } else { secure::roots_of("backup.ca_file", &self.ca)? };
        Dialer::for_https(roots)
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let env = self.env.clone();
        // A store without TLS needs no CA of the system.
        let dialer = self.dialer().map_err(|error| error.to_string());
        let dial = tower::service_fn(move |to: Uri| {
            let dialling = dial(env.clone(), dialer.clone(), to);
            Box::pin(async move {
                match timeout(CONNECT_PATIENCE, dialling).await {
                    Ok(dialled) => dialled.map(|stream| TokioIo::new(Link(stream))),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }) as BoxFuture<io::Result<TokioIo<Link>>>
        });
        let mut client = legacy::Client::builder(TokioExecutor::new());
        Ok(HttpClient::new(Service(client.pool_idle_timeout(IDLE_MAX).build(dial))))
    }
}

async fn dial(env: Env, dialer: Result<Dialer, String>, to: Uri) -> io::Result<Box<dyn Stream>> {
    let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{to}: {reason}"));
    let host = to.host().ok_or_else(|| invalid("no host in it"))?;
    let is_tls = to.scheme_str() == Some("https");
    let port = to.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let stream = env.net.connect(format!("{host}:{port}")).await?;
    if !is_tls {
        return Ok(stream);
    }
    dialer.map_err(|error| invalid(&error))?.dial(host, stream).await
}

/// A connection to a store.
struct Link(Box<dyn Stream>);

impl Connection for Link {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct Service<D>(legacy::Client<D, HttpRequestBody>);

impl<D> std::fmt::Debug for Service<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Service")
    }
}

#[async_trait]
impl<D> HttpService for Service<D>
where
    D: legacy::connect::Connect + Clone + Send + Sync + 'static,
{
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = match timeout(ANSWER_PATIENCE, self.0.request(request)).await {
            Ok(answer) => answer.map_err(|error| {
                let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Request };
                HttpError::new(kind, error)
            })?,
            Err(late) => return Err(HttpError::new(HttpErrorKind::Timeout, late)),
        };
        let (head, body) = answer.into_parts();
        let body = body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error));
        Ok(HttpResponse::from_parts(head, HttpResponseBody::new(body)))
    }
}
