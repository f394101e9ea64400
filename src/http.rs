//! HTTP on the client port, beside gRPC: health, version, the membership and the status page.
//!
//! Absent: the JSON gateway and metrics.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use crate::api::{Api, ETCD_VERSION};
use crate::identity::SLOT_MAX;
use crate::pb::admin::{Member, MembershipView, Remark};

/// The routes; merged with the gRPC services.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/version", get(version))
        .route("/cluster", get(cluster))
        .fallback(unknown)
        .with_state(api)
}

/// A gRPC call of a service that is not served gets gRPC's own answer: not every client makes one of a bare 404.
async fn unknown(headers: HeaderMap, uri: Uri) -> Response {
    let content_type = headers.get(header::CONTENT_TYPE);
    if content_type.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        let service = uri.path().split('/').nth(1).unwrap_or_default();
        let head = [
            (header::CONTENT_TYPE, "application/grpc".to_owned()),
            (HeaderName::from_static("grpc-status"), "12".to_owned()),
            (HeaderName::from_static("grpc-message"), format!("unknown service {service}")),
        ];
        return head.into_response();
    }
    (StatusCode::NOT_FOUND, "not found\n").into_response()
}

async fn health(State(api): State<Api>) -> impl IntoResponse {
    let reason = api.not_healthy();
    let code = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "health": reason.is_none().to_string(), "reason": reason.unwrap_or_default() });
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string())
}

async fn readyz(State(api): State<Api>) -> impl IntoResponse {
    match api.not_ready() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn version() -> impl IntoResponse {
    let body = json!({ "etcdserver": ETCD_VERSION, "etcdcluster": "3.6.0" });
    ([(header::CONTENT_TYPE, "application/json")], body.to_string())
}

/// The membership, for tools: who belongs to it, in which role and how far behind, what is wanted, and what blocks.
async fn cluster(State(api): State<Api>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], membership_json(&api.membership().await).to_string() + "\n")
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
        "remarks": view.remarks.iter().map(remark).collect::<Vec<_>>(),
    })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One page, no script: it reloads itself every two seconds.
async fn page(State(api): State<Api>) -> impl IntoResponse {
    let overview = api.overview();
    let facts = overview
        .facts
        .iter()
        .map(|(name, value)| format!("<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value)))
        .collect::<String>();
    let members = overview
        .members
        .iter()
        .map(|row| row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect::<String>())
        .map(|row| format!("<tr>{row}</tr>"))
        .collect::<String>();
    let notes = overview.notes.iter().map(|note| format!("<p class=note>{}</p>", escape(note))).collect::<String>();
    Html(format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=2>\
         <title>{title} - Quorate</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2833}}\
         table{{border-collapse:collapse;width:100%;margin:1rem 0}}th,td{{text-align:left;padding:.35rem .8rem;\
         border-bottom:1px solid #d5d8dc;font-variant-numeric:tabular-nums}}\
         .note{{background:#fef5e7;border-left:4px solid #f39c12;padding:.5rem 1rem}}</style>\
         <h1>{title}</h1>{notes}<table>{facts}</table><h2>Members</h2><table>\
         <tr><th>name</th><th>member</th><th>slot</th><th>role</th><th>peer address</th><th>lag</th></tr>{members}</table>",
        title = escape(&overview.title),
    ))
}
