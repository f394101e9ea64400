//! HTTP beside gRPC: metrics, health, version, the membership and the console, and, on the client port alone, the JSON gateway.
//!
//! Owns the paths and the forms of the answers. Absent: what they say (`api`, `metrics`).

mod browser;
mod checks;
mod console;
mod gateway;
mod json;
mod once;
mod requests;
mod socket;
mod transcoder;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use serde_json::{Value, json};

use crate::api::{Api, ETCD_CLUSTER_VERSION, ETCD_VERSION, Health};
use crate::conditions;
use crate::identity::SLOT_MAX;
use crate::pb::admin::{Condition, Event, Member, MembershipView, Remark};

pub use browser::{Rules, is_grpc, only_grpc};
pub use gateway::Gateway;
pub use socket::Sockets;

/// The status listener's routes. `rules`: for calls of browsers.
pub fn status_router(api: Api, rules: Arc<Rules>) -> Router {
    pages().with_state(api).layer(axum::middleware::from_fn_with_state(rules, browser::check))
}

/// The client port's routes; merged with the gRPC services.
pub fn router(api: Api, gateway: Gateway, rules: Arc<Rules>) -> Router {
    let older = gateway.clone();
    pages()
        .route("/v3/{*path}", any(move |request| call("/v3/", gateway, request)))
        .route("/v3beta/{*path}", any(move |request| call("/v3beta/", older, request)))
        .with_state(api)
        .layer(axum::middleware::from_fn_with_state(rules, browser::check))
}

/// What both listeners answer.
fn pages() -> Router<Api> {
    Router::new()
        .merge(console::routes())
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/livez", get(checks::livez))
        .route("/livez/{check}", get(checks::live_check))
        .route("/readyz", get(checks::readyz))
        .route("/readyz/{check}", get(checks::ready_check))
        .route("/debug/vars", get(variables))
        .route("/version", get(version))
        .route("/cluster", get(cluster))
        .fallback(unknown)
}

async fn call(version: &str, gateway: Gateway, request: Request<Body>) -> Response {
    let path = request.uri().path().strip_prefix(version).unwrap_or_default().to_owned();
    gateway.call(&path, request).await
}

async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], api.metrics_text())
}

/// A gRPC call of a service that is not served gets gRPC's own answer: not every client makes one of a bare 404.
async fn unknown(version: Version, headers: HeaderMap, uri: Uri) -> Response {
    if is_grpc(version, &headers) {
        let message = match uri.path().rsplit_once('/') {
            Some((service, _)) if !service.is_empty() => format!("unknown service {}", service.trim_start_matches('/')),
            _ => format!("malformed method name: {:?}", uri.path()),
        };
        let head = [
            (header::CONTENT_TYPE, "application/grpc".to_owned()),
            (HeaderName::from_static("grpc-status"), "12".to_owned()),
            (HeaderName::from_static("grpc-message"), message.replace('%', "%25")),
        ];
        return head.into_response();
    }
    not_found()
}

fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "404 page not found\n").into_response()
}

/// Values of `name` in a query; a name alone has the value "".
fn query<'a>(uri: &'a Uri, name: &'a str) -> impl Iterator<Item = &'a str> {
    let pairs = uri.query().unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.filter(move |(key, _)| *key == name).map(|(_, value)| value)
}

fn is_asked(uri: &Uri, name: &str) -> bool {
    query(uri, name).any(|value| matches!(value, "" | "true" | "1"))
}

/// `?serializable` asks this member alone; `?exclude=NOSPACE` takes no notice of that alarm.
async fn health(State(api): State<Api>, uri: Uri) -> impl IntoResponse {
    let ask = Health {
        serializable: is_asked(&uri, "serializable"),
        exclude: query(&uri, "exclude").map(str::to_owned).collect(),
    };
    let reason = api.not_healthy(&ask).await;
    let code = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "health": reason.is_none().to_string(), "reason": reason.unwrap_or_default() });
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string())
}

async fn version() -> impl IntoResponse {
    let (server, cluster) = (ETCD_VERSION, ETCD_CLUSTER_VERSION);
    let body = json!({ "etcdserver": server, "etcdcluster": cluster, "storage": cluster });
    ([(header::CONTENT_TYPE, "application/json")], body.to_string())
}

/// What etcd publishes for whoever debugs it, of what this member has.
async fn variables(State(api): State<Api>) -> impl IntoResponse {
    let (now, process) = (api.sample(), crate::env::process::this_process());
    let state = match (now.is_leader, now.is_learner) {
        (true, _) => "StateLeader",
        (_, true) => "StateLearner",
        _ => "StateFollower",
    };
    let body = json!({
        "cmdline": std::env::args().collect::<Vec<_>>(),
        "memstats": { "Sys": process.virtual_bytes, "HeapInuse": process.resident_bytes },
        "raft.status": {
            "id": format!("{:x}", now.member_id), "term": now.term, "commit": now.committed_index, "applied": now.applied_index,
            "raftState": state,
        },
    });
    ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], body.to_string() + "\n")
}

/// The membership, for tools: who belongs to it, in which role and how far behind, what is wanted, and what blocks.
async fn cluster(State(api): State<Api>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], membership_json(&api.membership().await).to_string() + "\n")
}

/// Conditions as JSON, the most urgent first.
pub fn conditions_json(list: &[Condition]) -> Value {
    let one = |condition: &Condition| {
        json!({
            "name": condition.name, "severity": condition.severity, "subjects": condition.subjects,
            "sentence": condition.sentence, "since": conditions::time_text(condition.since), "remedy": condition.remedy,
            "runbook": conditions::runbook(&condition.name),
        })
    };
    list.iter().map(one).collect()
}

/// The view as JSON; ids are hexadecimal, as everywhere that people read them.
pub fn membership_json(view: &MembershipView) -> Value {
    let id = |id: u64| if id == 0 { Value::Null } else { format!("{id:016x}").into() };
    let remark = |remark: &Remark| json!({ "name": remark.name, "sentence": remark.sentence });
    let member = |m: &Member| {
        json!({
            "id": id(m.id), "name": m.name, "slot": (m.slot <= u32::from(SLOT_MAX)).then_some(m.slot), "role": m.role,
            "kind": m.kind, "peer_address": m.peer_address, "client_urls": m.client_urls, "reachable": m.reachable,
            "lag_entries": m.lag_entries, "caught_up": m.caught_up, "condemned": m.condemned, "held": m.held,
            "version": m.version,
        })
    };
    let event = |event: &Event| json!({ "at": conditions::time_text(event.at), "name": event.name, "sentence": event.sentence });
    let wanted = view.wanted.as_ref().map(|w| {
        let unknown = (!w.unknown.is_empty()).then_some(&w.unknown);
        let size = (unknown.is_none() && w.origin != "none").then_some((w.start, w.replicas));
        json!({
            "origin": w.origin, "start": size.map(|s| s.0), "replicas": size.map(|s| s.1), "unknown": unknown,
        })
    });
    json!({
        "cluster": id(view.cluster_id), "member": id(view.member_id), "leader": id(view.leader_id), "term": view.term,
        "cluster_version": view.cluster_version, "members": view.members.iter().map(member).collect::<Vec<_>>(),
        "wanted": wanted, "change": view.change, "blocked": view.blocked.as_ref().map(remark),
        "conditions": conditions_json(&view.conditions), "events": view.events.iter().map(event).collect::<Vec<_>>(),
    })
}
