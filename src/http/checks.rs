//! Checks by name, as etcd's `/livez` and `/readyz` have them: all of a path together, one alone (`/readyz/CHECK`), some left out
//! (`?exclude=CHECK`), or as a list (`?verbose`).
//!
//! Alive is who answers: whatever this member waits for, a restart would not help (membership rule 28). So `serializable_read` can be
//! asked for below `/livez`, and is no part of it. A learner serves its clients here, and pods and readers that do not vote are ready; so
//! `non_learner` can be asked for below `/readyz`, and is no part of it.

use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};

use super::{is_asked, not_found, query};
use crate::api::Api;
use crate::conditions;

/// A check: its name, whether it counts where nobody named one, and why it fails.
struct Check {
    name: &'static str,
    counts: bool,
    failure: fn(&Api) -> Option<String>,
}

const LIVE: &[Check] = &[
    Check { name: "event_loop", counts: true, failure: |_| None },
    Check { name: "serializable_read", counts: false, failure: Api::no_data },
];

const READY: &[Check] = &[
    Check { name: "data_corruption", counts: true, failure: Api::corrupt },
    Check { name: "serializable_read", counts: true, failure: Api::no_data },
    Check { name: "linearizable_read", counts: true, failure: Api::not_ready },
    Check { name: "non_learner", counts: false, failure: Api::learner },
];

pub(super) async fn livez(State(api): State<Api>, uri: Uri) -> Response {
    all(LIVE, &api, &uri)
}

pub(super) async fn live_check(State(api): State<Api>, Path(name): Path<String>, uri: Uri) -> Response {
    one(LIVE, &name, &api, &uri)
}

pub(super) async fn readyz(State(api): State<Api>, uri: Uri) -> Response {
    all(READY, &api, &uri)
}

pub(super) async fn ready_check(State(api): State<Api>, Path(name): Path<String>, uri: Uri) -> Response {
    one(READY, &name, &api, &uri)
}

fn all(checks: &[Check], api: &Api, uri: &Uri) -> Response {
    let is_excluded = |check: &Check| query(uri, "exclude").any(|name| name == check.name);
    answer(checks.iter().filter(|check| check.counts && !is_excluded(check)), api, uri)
}

fn one(checks: &[Check], name: &str, api: &Api, uri: &Uri) -> Response {
    match checks.iter().find(|check| check.name == name) {
        Some(check) => answer(std::iter::once(check), api, uri),
        None => not_found(),
    }
}

/// The list where it is asked for, and where something fails.
fn answer<'a>(checks: impl Iterator<Item = &'a Check>, api: &Api, uri: &Uri) -> Response {
    let (mut text, mut failed) = (String::new(), false);
    for check in checks {
        match (check.failure)(api) {
            None => text += &format!("[+]{} ok\n", check.name),
            Some(reason) => {
                text += &format!("[-]{} failed: {reason}\n", check.name);
                failed = true;
            }
        }
    }
    let head = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    if !failed && !is_asked(uri, "verbose") {
        return (head, "ok\n").into_response();
    }
    // What the checks do not say.
    for condition in api.conditions().list() {
        text += &format!("[!]{}\n", conditions::line(&condition));
    }
    match failed {
        true => (StatusCode::SERVICE_UNAVAILABLE, head, text).into_response(),
        false => (head, text + "ok\n").into_response(),
    }
}
