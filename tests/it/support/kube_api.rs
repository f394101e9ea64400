//! A small Kubernetes API server: it shows one StatefulSet and takes Events, over HTTPS, to the real client in the servers.
//!
//! Owns its certificate and the service account directory that pods are given. It can refuse, hang, or be away, as a real one
//! can. Whatever else is asked of it is noted: the servers must need no more. Absent: watches, lists, any other object.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::server::TlsStream;

const TOKEN: &str = "a-token-that-only-the-test-knows";

/// How the API server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Serves,
    /// 403 to everything: no RBAC.
    Forbids,
    /// 401 to everything: the account is gone.
    KnowsNobody,
    /// 403 to Events alone.
    ForbidsEvents,
    /// 404: the StatefulSet has another name.
    KnowsNothing,
    /// Takes requests and never answers.
    Hangs,
}

struct Seen {
    mode: Mode,
    object: Value,
    events: Vec<Value>,
    gets: u64,
    unexpected: Vec<String>,
}

type Shared = Arc<Mutex<Seen>>;

/// The API server of one test.
pub struct KubeApi {
    address: SocketAddr,
    dir: PathBuf,
    paths: (String, String),
    tls: Arc<ServerConfig>,
    seen: Shared,
    /// None: it is down. On threads of its own, so that all its connections end with it.
    running: Option<Runtime>,
}

impl KubeApi {
    /// Starts at `address`, which no other test uses; makes the service account in `dir`.
    pub fn start(address: SocketAddr, dir: &Path, namespace: &str, name: &str) -> Self {
        let made = rcgen::generate_simple_self_signed([address.ip().to_string()]).unwrap();
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("ca.crt"), made.cert.pem()).unwrap();
        std::fs::write(dir.join("token"), TOKEN).unwrap();
        std::fs::write(dir.join("namespace"), namespace).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let tls = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key);
        let seen = Seen { mode: Mode::Serves, object: Value::Null, events: vec![], gets: 0, unexpected: vec![] };
        let set = format!("/apis/apps/v1/namespaces/{namespace}/statefulsets/{name}");
        let events = format!("/api/v1/namespaces/{namespace}/events");
        let mut api = Self {
            address,
            dir: dir.to_owned(),
            paths: (set, events),
            tls: Arc::new(tls.unwrap()),
            seen: Arc::new(Mutex::new(seen)),
            running: None,
        };
        api.up();
        api
    }

    /// What pods find in their environment.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        [("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)]
    }

    pub fn service_account_dir(&self) -> &Path {
        &self.dir
    }

    pub fn set_mode(&self, mode: Mode) {
        self.seen.lock().unwrap().mode = mode;
    }

    /// Nobody listens any more, and every connection is gone.
    pub fn down(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown_background();
        }
    }

    pub fn up(&mut self) {
        assert!(self.running.is_none(), "it runs");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (address, acceptor) = (self.address, TlsAcceptor::from(self.tls.clone()));
        let router = Router::new().fallback(serve).with_state((self.seen.clone(), self.paths.clone()));
        runtime.spawn(async move {
            let tcp = loop {
                match TcpListener::bind(address).await {
                    Ok(tcp) => break tcp,
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                }
            };
            axum::serve(Tls { tcp, acceptor }, router).await.unwrap();
        });
        self.running = Some(runtime);
    }

    /// The StatefulSet as it is shown from now on.
    pub fn show(&self, object: Value) {
        self.seen.lock().unwrap().object = object;
    }

    /// [`KubeApi::show`], for whoever outlives this borrow.
    pub fn shower(&self) -> impl Fn(Value) + Send + 'static + use<> {
        let seen = self.seen.clone();
        move |object| seen.lock().unwrap().object = object
    }

    /// How often the StatefulSet was read.
    pub fn gets(&self) -> u64 {
        self.seen.lock().unwrap().gets
    }

    pub fn events(&self) -> Vec<Value> {
        self.seen.lock().unwrap().events.clone()
    }

    /// Requests that a pod's Role does not allow.
    pub fn unexpected(&self) -> Vec<String> {
        self.seen.lock().unwrap().unexpected.clone()
    }
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        self.down();
    }
}

async fn serve(State((seen, (set, events))): State<(Shared, (String, String))>, request: Request) -> Response {
    let mode = seen.lock().unwrap().mode;
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if token != Some(&format!("Bearer {TOKEN}")) {
        return status(StatusCode::UNAUTHORIZED, "Unauthorized", "who are you");
    }
    let is_event = method == Method::POST && path == events;
    let is_get = method == Method::GET && path == set;
    if !is_event && !is_get {
        seen.lock().unwrap().unexpected.push(format!("{method} {path}"));
        return status(StatusCode::FORBIDDEN, "Forbidden", "the Role allows no such thing");
    }
    match mode {
        Mode::Hangs => std::future::pending().await,
        Mode::Forbids => status(StatusCode::FORBIDDEN, "Forbidden", "no RBAC policy matched"),
        Mode::KnowsNobody => status(StatusCode::UNAUTHORIZED, "Unauthorized", "who are you"),
        Mode::KnowsNothing => status(StatusCode::NOT_FOUND, "NotFound", "not found"),
        Mode::Serves | Mode::ForbidsEvents if is_get => {
            let mut seen = seen.lock().unwrap();
            seen.gets += 1;
            json_answer(StatusCode::OK, &seen.object)
        }
        Mode::Serves | Mode::ForbidsEvents => {
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let event: Value = serde_json::from_slice(&body).unwrap();
            // By the mode of this moment: no Event is taken after `set_mode` has returned.
            let mut seen = seen.lock().unwrap();
            if matches!(seen.mode, Mode::ForbidsEvents) {
                return status(StatusCode::FORBIDDEN, "Forbidden", "no RBAC policy matched");
            }
            seen.events.push(event.clone());
            json_answer(StatusCode::CREATED, &event)
        }
    }
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response {
    let (kind, version) = ("Status", "v1");
    let body = json!({
        "kind": kind, "apiVersion": version, "status": "Failure", "reason": reason, "message": message,
        "code": code.as_u16(),
    });
    json_answer(code, &body)
}

fn json_answer(code: StatusCode, body: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// Connections on which TLS has been agreed; others are dropped.
pub(super) struct Tls {
    pub(super) tcp: TcpListener,
    pub(super) acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.tcp.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
