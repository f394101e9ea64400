//! What a browser may ask of this port, and for whom: any page that its user has open can make it call a server on the user's machine
//! or network, without asking.
//!
//! Such a call tells itself: browsers send `Origin` with every POST, `Sec-Fetch-*` where they can, and a `User-Agent` that begins
//! with `Mozilla/`. No program need send any of these, so programs are left alone, with one exception. The rules:
//! - A body that a page may send anywhere without asking (`text/plain`, a form with files) changes nothing here; from a program, a
//!   URL-encoded form is JSON whose sender named no type (`curl -d`), which etcd's gateway takes, and scripts rely on.
//! - From a browser a POST is `application/json`, and of this very origin, or one that `http.cors` allows. A preflight is
//!   answered for the latter alone.
//! - From a browser the `Host` is a name of this member: else a page of a name that its owner has made point here (DNS rebinding) would
//!   be of this origin. An IP address is none that can be made to, nor is a name that nobody can register.
//! - A gRPC call comes over HTTP/2 and names gRPC's content type. No page of another origin may send that type without asking, and one
//!   whose name was made to point here (DNS rebinding) is of this origin, but gets no HTTP/2: browsers speak it over TLS alone, where the
//!   certificate is not for that name.
//!
//! Invariant: what is refused here has reached no service. Absent: who may do what; this is about pages, not about people.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::gateway;

const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
/// Ends of names that nobody can register, so that no stranger can make one point here.
const PRIVATE_ENDS: &[&str] = &["localhost", "local", "internal", "svc", "lan", "home.arpa", "test"];
/// All origins, or all names.
const ANY: &str = "*";
const FORBIDDEN: u16 = 7;
const INVALID: u16 = 3;

/// Names of this member, and origins that may call it.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Lower case, without ports.
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl Rules {
    /// `known`: `host:port`, URLs or names by which this member is told to others; `hosts` and `cors` as in the settings.
    pub fn new<'a>(known: impl Iterator<Item = &'a str>, hosts: &[String], cors: &[String]) -> Arc<Self> {
        let own = known.map(|known| host_of(known.split_once("://").map_or(known, |(_, rest)| rest)));
        let hosts = own.chain(hosts.iter().map(|host| host.to_ascii_lowercase())).filter(|host| !host.is_empty());
        Arc::new(Self {
            hosts: hosts.collect(),
            origins: cors.iter().map(|origin| origin.to_ascii_lowercase()).collect(),
        })
    }

    fn allows(&self, origin: &str) -> bool {
        self.origins.iter().any(|allowed| allowed == ANY || *allowed == origin.to_ascii_lowercase())
    }

    /// Whether a page of this name is this member's.
    fn knows(&self, host: &str) -> bool {
        let name = host_of(host);
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<IpAddr>().is_ok()
            || !name.contains('.') && !name.is_empty()
            || PRIVATE_ENDS.iter().any(|end| name.strip_suffix(end).is_some_and(|rest| rest.ends_with('.')))
            || self.hosts.iter().any(|known| known == ANY || *known == name)
    }

    /// Whether a WebSocket may be opened: to any host, browsers let every page do it, and only say which page that was.
    pub(super) fn check_socket(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), (StatusCode, String)> {
        self.judge(&Method::GET, uri, headers).map(drop).map_err(|refusal| {
            let (status, _, text) = refusal.parts();
            (status, text)
        })
    }

    /// `Ok`: the origin that is to be told that it may read the answer, if one is.
    fn judge(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
        let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("not text"));
        let changes = !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        let kind = text(&header::CONTENT_TYPE)
            .map(|kind| kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
        let is_browser = headers.contains_key(header::ORIGIN)
            || headers.contains_key(SITE)
            || text(&header::USER_AGENT).is_some_and(|agent| agent.starts_with("Mozilla/"));
        if !is_browser {
            let simple = kind.as_deref().is_some_and(|kind| matches!(kind, "text/plain" | "multipart/form-data"));
            return if changes && simple { Err(Refusal::Type(kind.unwrap_or_default())) } else { Ok(None) };
        }
        let host = uri.authority().map(|authority| authority.as_str()).or(text(&header::HOST)).unwrap_or_default();
        if !self.knows(host) {
            return Err(Refusal::Host(crate::identity::shown(host)));
        }
        let origin = text(&header::ORIGIN);
        let allowed = origin.is_some_and(|origin| self.allows(origin));
        let same = |origin: &str| origin.split_once("://").is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host));
        if let Some(origin) = origin.filter(|origin| !allowed && !same(origin)) {
            return Err(Refusal::Origin(crate::identity::shown(origin)));
        }
        let foreign = text(&SITE).is_some_and(|site| matches!(site, "cross-site" | "same-site"));
        // A link to the page may stand anywhere.
        if foreign && !allowed && (changes || text(&MODE).is_none_or(|mode| mode != "navigate")) {
            return Err(Refusal::Origin("another site".into()));
        }
        if changes && kind.as_deref() != Some("application/json") {
            return Err(Refusal::Type(kind.unwrap_or_else(|| "none".into())));
        }
        Ok(headers.get(header::ORIGIN).filter(|_| allowed).cloned())
    }
}

/// `host` of `host:port`, in lower case; what an origin or a `Host` may be.
fn host_of(text: &str) -> String {
    let authority = text.split('/').next().unwrap_or_default();
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    host.trim_end_matches('.').to_ascii_lowercase()
}

/// Why a browser's call is not answered; each with what was sent.
#[derive(Debug, PartialEq)]
enum Refusal {
    Host(String),
    Origin(String),
    Type(String),
}

impl Refusal {
    /// Its status, its gRPC code, and its text.
    fn parts(self) -> (StatusCode, u16, String) {
        match self {
            Self::Host(host) => (
                StatusCode::MISDIRECTED_REQUEST,
                FORBIDDEN,
                format!("this member is not known as {host:?}: set http.hosts if it is one of its names"),
            ),
            Self::Origin(origin) => (
                StatusCode::FORBIDDEN,
                FORBIDDEN,
                format!("pages of {origin} may not call this member: set http.cors to the origins that may"),
            ),
            Self::Type(kind) => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                INVALID,
                format!("content-type is {kind:?}, expected application/json: any web page may send others"),
            ),
        }
    }

    fn into_response(self) -> Response {
        let (status, code, text) = self.parts();
        gateway::refusal(status, code, &text)
    }
}

/// Layer of the HTTP paths: refuses what [`Rules`] refuse, answers preflights, and says how an answer may be used.
pub async fn check(State(rules): State<Arc<Rules>>, request: Request, next: Next) -> Response {
    let allowed = match rules.judge(request.method(), request.uri(), request.headers()) {
        Ok(allowed) => allowed,
        Err(refusal) => return refusal.into_response(),
    };
    let is_preflight =
        request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match (&allowed, is_preflight) {
        (Some(_), true) => preflight(),
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn preflight() -> Response {
    let head = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "POST, GET, OPTIONS"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "accept, authorization, content-type"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, head).into_response()
}

/// Whether a request is a gRPC call.
pub fn is_grpc(version: Version, headers: &HeaderMap) -> bool {
    version >= Version::HTTP_2 && names_grpc(headers)
}

fn names_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Layer of the gRPC services, which by themselves take any content type over any version of HTTP: over HTTP/1 pages could call them.
pub async fn only_grpc(request: Request, next: Next) -> Response {
    if is_grpc(request.version(), request.headers()) {
        return next.run(request).await;
    }
    let (status, text) = if names_grpc(request.headers()) {
        (StatusCode::HTTP_VERSION_NOT_SUPPORTED, "gRPC is served over HTTP/2 only, without which no gRPC client works")
    } else {
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, "expected a gRPC call, which has the content-type application/grpc")
    };
    (status, format!("{text}; JSON is at /v3/\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Arc<Rules> {
        let known = ["http://kv-0.example.org:2379", "kv-0.kv.ns.svc:2380"];
        Rules::new(known.into_iter(), &["Store.example.com".into()], &["https://ui.example.com".into()])
    }

    fn judge(method: Method, headers: &[(&str, &str)]) -> Result<bool, u16> {
        let parsed = headers
            .iter()
            .map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap()));
        let judged = rules().judge(&method, &Uri::from_static("/v3/kv/put"), &parsed.collect());
        judged.map(|allowed| allowed.is_some()).map_err(|refusal| refusal.into_response().status().as_u16())
    }

    const JSON: (&str, &str) = ("content-type", "application/json; charset=utf-8");
    const OWN: (&str, &str) = ("host", "127.0.0.1:2379");

    #[test]
    fn programs_are_left_alone() {
        let odd: (&str, &str) = ("host", "whatever.example.net");
        for headers in [
            &[][..],
            &[JSON, odd],
            &[("content-type", "application/x-www-form-urlencoded"), odd, ("user-agent", "curl/8.5.0")],
            &[("user-agent", "Go-http-client/1.1"), OWN],
        ] {
            assert_eq!(judge(Method::POST, headers), Ok(false), "{headers:?}");
            assert_eq!(judge(Method::GET, headers), Ok(false), "{headers:?}");
        }
        for kind in ["text/plain", "Text/Plain;charset=UTF-8", "multipart/form-data; boundary=x"] {
            assert_eq!(judge(Method::POST, &[("content-type", kind), OWN]), Err(415), "{kind}");
        }
    }

    #[test]
    fn page_of_another_origin_changes_nothing() {
        for origin in ["http://evil.example", "null", "http://127.0.0.1:8080", "http://127.0.0.1", "127.0.0.1:2379"] {
            for kind in ["application/json", "text/plain", "application/x-www-form-urlencoded"] {
                let headers = [("origin", origin), ("content-type", kind), OWN];
                assert_eq!(judge(Method::POST, &headers), Err(403), "{headers:?}");
                assert_eq!(judge(Method::OPTIONS, &headers), Err(403), "{headers:?}");
            }
        }
        for site in ["cross-site", "same-site"] {
            assert_eq!(judge(Method::POST, &[("sec-fetch-site", site), JSON, OWN]), Err(403));
            assert_eq!(judge(Method::GET, &[("sec-fetch-site", site), ("sec-fetch-mode", "no-cors"), OWN]), Err(403));
            assert_eq!(judge(Method::GET, &[("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), OWN]), Ok(false));
        }
    }

    #[test]
    fn page_of_this_origin_sends_json_and_an_allowed_one_may_read() {
        let own = ("origin", "http://127.0.0.1:2379");
        assert_eq!(judge(Method::POST, &[own, JSON, OWN, ("sec-fetch-site", "same-origin")]), Ok(false));
        for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp"] {
            assert_eq!(judge(Method::POST, &[own, ("content-type", kind), OWN]), Err(415), "{kind}");
        }
        assert_eq!(judge(Method::POST, &[own, OWN]), Err(415), "none at all");
        assert_eq!(
            judge(Method::POST, &[("user-agent", "Mozilla/5.0"), ("content-type", "text/plain"), OWN]),
            Err(415)
        );
        let ui = ("origin", "https://UI.example.com");
        assert_eq!(judge(Method::POST, &[ui, JSON, OWN, ("sec-fetch-site", "cross-site")]), Ok(true));
        assert_eq!(judge(Method::OPTIONS, &[ui, OWN]), Ok(true));
    }

    #[test]
    fn page_of_another_origin_opens_no_socket() {
        let open = |headers: &[(&str, &str)]| {
            let parsed = headers
                .iter()
                .map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap()));
            let checked = rules().check_socket(&Uri::from_static("/v3/watch"), &parsed.collect());
            checked.map_err(|(status, _)| status.as_u16())
        };
        assert_eq!(open(&[OWN]), Ok(()), "a program");
        assert_eq!(open(&[OWN, ("origin", "http://127.0.0.1:2379")]), Ok(()));
        assert_eq!(open(&[OWN, ("origin", "https://ui.example.com"), ("sec-fetch-site", "cross-site")]), Ok(()));
        assert_eq!(open(&[OWN, ("origin", "http://evil.example")]), Err(403));
        assert_eq!(open(&[("host", "evil.example"), ("origin", "http://evil.example")]), Err(421));
    }

    #[test]
    fn name_that_somebody_made_point_here_is_not_this_member() {
        let browser = ("user-agent", "Mozilla/5.0 (X11)");
        for host in [
            "127.0.0.1:2379",
            "[::1]:2379",
            "10.1.2.3",
            "localhost:2379",
            "kv.localhost",
            "kv-0",
            "kv.ns.svc:2379",
            "kv.ns.svc.cluster.local:2379",
            "KV-0.example.org:2379",
            "kv-0.example.org.",
            "store.example.com",
        ] {
            assert_eq!(judge(Method::GET, &[browser, ("host", host)]), Ok(false), "{host}");
        }
        for host in
            ["evil.example:2379", "127.0.0.1.evil.example", "kv-1.example.org", "notlocal", "x.notlocalhost", ""]
        {
            let expected = if host == "notlocal" { Ok(false) } else { Err(421) };
            assert_eq!(judge(Method::GET, &[browser, ("host", host)]), expected, "{host}");
            let rebound = format!("http://{host}");
            let headers = [("origin", &rebound[..]), ("host", host), JSON];
            assert_eq!(judge(Method::POST, &headers), expected, "{host}");
        }
    }
}
