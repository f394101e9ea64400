//! An issuer of tokens: publishes its keys over HTTPS, as an issuer of OpenID Connect or as an API server of Kubernetes does.
//!
//! Owns its certificate, which is also the CA to trust, and the keys of the test's signers. What is asked of it is counted, and what tokens it
//! was shown. Absent: logging in.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::kube_api::Tls;

/// The token that an API server wants to be shown.
pub const POD_TOKEN: &str = "a-token-of-this-pod";

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub fn encoded(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// What is signed of a token.
pub fn unsigned(head: &Value, claims: &Value) -> String {
    format!("{}.{}", encoded(head.to_string().as_bytes()), encoded(claims.to_string().as_bytes()))
}

/// Somebody who signs tokens.
pub struct Signer {
    id: String,
    pair: EcdsaKeyPair,
}

impl Signer {
    pub fn new(id: &str) -> Self {
        let (by, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(by, &random).unwrap();
        Self { id: id.into(), pair: EcdsaKeyPair::from_pkcs8(by, document.as_ref(), &random).unwrap() }
    }

    /// Its public key, not compressed.
    pub fn point(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    pub fn jwk(&self) -> Value {
        let (x, y) = (encoded(&self.point()[1..33]), encoded(&self.point()[33..]));
        json!({ "kty": "EC", "crv": "P-256", "kid": self.id, "use": "sig", "alg": "ES256", "x": x, "y": y })
    }

    pub fn token(&self, claims: &Value) -> String {
        let signed = unsigned(&json!({ "alg": "ES256", "kid": self.id, "typ": "JWT" }), claims);
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", encoded(signature.as_ref()))
    }
}

/// A set of these keys.
pub fn key_set(signers: &[&Signer]) -> Value {
    json!({ "keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>() })
}

#[derive(Default)]
struct Seen {
    name: String,
    keys_url: String,
    keys: Value,
    /// Of an API server.
    wants_token: bool,
    fetches: u64,
    tokens: Vec<String>,
}

pub struct Issuer {
    url: String,
    seen: Arc<Mutex<Seen>>,
}

impl Issuer {
    /// Begins to serve; its CA is `ca.crt` in `dir`, as a service account has it, with a pod's token beside it.
    pub async fn start(dir: &Path) -> Self {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("ca.crt"), made.cert.pem()).unwrap();
        std::fs::write(dir.join("token"), POD_TOKEN).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let tls = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key);
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", tcp.local_addr().unwrap());
        let seen = Seen { name: url.clone(), keys_url: format!("{url}/keys"), ..Seen::default() };
        let seen = Arc::new(Mutex::new(seen));
        let router = Router::new().fallback(serve).with_state(seen.clone());
        let acceptor = TlsAcceptor::from(Arc::new(tls.unwrap()));
        tokio::spawn(async move { axum::serve(Tls { tcp, acceptor }, router).await.unwrap() });
        Self { url, seen }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// It publishes these keys from now on.
    pub fn publish(&self, signers: &[&Signer]) {
        self.seen.lock().unwrap().keys = key_set(signers);
    }

    /// As an API server: it has another name in its tokens, wants a pod's token, and says that its keys are elsewhere.
    pub fn be_api_server(&self, name: &str, keys_url: &str) {
        let mut seen = self.seen.lock().unwrap();
        (seen.name, seen.keys_url, seen.wants_token) = (name.into(), keys_url.into(), true);
    }

    /// How often its keys were fetched.
    pub fn fetches(&self) -> u64 {
        self.seen.lock().unwrap().fetches
    }

    /// The tokens that it was shown.
    pub fn tokens(&self) -> Vec<String> {
        self.seen.lock().unwrap().tokens.clone()
    }
}

async fn serve(State(seen): State<Arc<Mutex<Seen>>>, request: Request) -> Response {
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let mut seen = seen.lock().unwrap();
    seen.tokens.extend(token.map(str::to_owned));
    if seen.wants_token && token != Some(&format!("Bearer {POD_TOKEN}")) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let body = match request.uri().path() {
        "/.well-known/openid-configuration" => json!({ "issuer": seen.name, "jwks_uri": seen.keys_url }),
        "/keys" | "/openid/v1/jwks" => {
            seen.fetches += 1;
            seen.keys.clone()
        }
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
