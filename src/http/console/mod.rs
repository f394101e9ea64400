//! The console: one page that shows the whole cluster, as the member that is asked knows it.
//!
//! Owns the page and its two assets. The server draws all of it, charts too, so without JavaScript it is whole and reloads itself every few
//! seconds; with it (`console.js`) what has changed is put into the page that stands, and scrolling, selections and opened parts stay.
//! Invariants: nothing of a third party, no script and no style within the page; all text is escaped; it shows no keys and no values, so
//! whoever may reach the port may see it. Absent: what it says (`api`, `conditions`).

mod chart;

use std::fmt::Write as _;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;

use crate::api::{Api, FIGURES};
use crate::conditions;
use crate::identity::SLOT_MAX;
use crate::pb::admin::{Condition, Event, Member, MembershipView};

/// The page is shown in no other page, and loads nothing but its assets.
const PAGE_HEAD: [(HeaderName, &str); 4] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
    ),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
];
/// Between two versions of the program the assets stay.
const ASSET_CACHE: (HeaderName, &str) = (header::CACHE_CONTROL, "max-age=300");
/// Events that are shown, the newest.
const EVENTS_SHOWN: usize = 30;

pub(super) fn routes() -> Router<Api> {
    Router::new()
        .route("/", get(page))
        .route("/console.css", get(|| async { asset("text/css; charset=utf-8", include_str!("console.css")) }))
        .route("/console.js", get(|| async { asset("text/javascript; charset=utf-8", include_str!("console.js")) }))
}

fn asset(kind: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind), ASSET_CACHE], text)
}

async fn page(State(api): State<Api>) -> impl IntoResponse {
    let overview = api.overview();
    let (view, list) = (api.conditions().view().unwrap_or_default(), api.conditions().list());
    let title = escape(&overview.name);
    let mut body = String::with_capacity(32 << 10);
    let tone = if list.iter().any(conditions::is_wrong) { "bad" } else { "good" };
    let _ = write!(body, "<header class={tone}><h1>{title}</h1><p>{}</p></header>", escape(&headline(&view, &list)));
    body.push_str(&conditions_part(&list));
    body.push_str(&members_part(&view));
    body.push_str(&figures_part(&api));
    body.push_str(&events_part(&api.conditions().events()));
    let facts: String = overview
        .facts
        .iter()
        .map(|(name, value)| format!("<tr><th scope=row>{}</th><td>{}</td></tr>", escape(name), escape(value)))
        .collect();
    let _ = write!(body, "<section id=this><h2>This member</h2><table>{facts}</table></section>");
    let page = Html(format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width, initial-scale=1\">\
         <meta name=color-scheme content=\"light dark\"><title>{title} - Quorate</title>\
         <link rel=stylesheet href=\"/console.css\"><noscript><meta http-equiv=refresh content=5></noscript>\
         <script src=\"/console.js\" defer></script></head><body><main id=console>{body}</main>\
         <footer>JSON: <a href=\"/cluster\">/cluster</a> &middot; checks: <a href=\"/readyz?verbose\">/readyz?verbose</a> &middot; \
         <a href=\"/metrics\">/metrics</a> <span id=live></span></footer></body></html>"
    ));
    (PAGE_HEAD, page)
}

/// What matters most, in a sentence.
fn headline(view: &MembershipView, list: &[Condition]) -> String {
    let (wrong, noted) = list.iter().fold((0, 0), |(wrong, noted), condition| match conditions::is_wrong(condition) {
        true => (wrong + 1, noted),
        false => (wrong, noted + 1),
    });
    let voters = view.members.iter().filter(|member| matches!(&member.role[..], "leader" | "voter"));
    let (all, there) = voters.fold((0, 0), |(all, there), voter| (all + 1, there + usize::from(voter.reachable)));
    let leader = view.members.iter().find(|member| member.id == view.leader_id).map(|member| &member.name[..]);
    let leads = match leader {
        Some(leader) => format!("{leader} leads; {there} of {all} voters are there"),
        None if view.members.is_empty() => "no cluster yet".into(),
        None => "no leader is known".into(),
    };
    let wanted = view.wanted.as_ref().filter(|wanted| wanted.replicas > 0).map(|wanted| {
        let members = view.members.iter().filter(|member| member.kind == "slot" && !member.condemned).count();
        format!("; {} members are wanted, {members} belong to it", wanted.replicas)
    });
    let matter = match (wrong, noted) {
        (0, 0) => "nothing is the matter".into(),
        (0, noted) => format!("nothing is the matter, {noted} to know"),
        (1, _) => "1 thing is the matter".into(),
        (wrong, _) => format!("{wrong} things are the matter"),
    };
    format!("{leads}{}; {matter}.", wanted.unwrap_or_default())
}

fn conditions_part(list: &[Condition]) -> String {
    let mut part = String::from("<section id=conditions><h2>Conditions</h2>");
    if list.is_empty() {
        part.push_str("<p class=none>None.</p>");
    }
    for condition in list {
        let severity = conditions::Severity::of(&condition.severity).name();
        let _ = write!(
            part,
            "<article class=\"{severity}\"><h3>{} <small>{severity}, since {}</small></h3><p>{}</p><p class=do>{} <cite>{}</cite></p></article>",
            escape(&condition.name),
            conditions::time_text(condition.since),
            escape(&condition.sentence),
            escape(&condition.remedy),
            escape(&conditions::runbook(&condition.name)),
        );
    }
    part + "</section>"
}

fn members_part(view: &MembershipView) -> String {
    let knows = view.leader_id != 0;
    let row = |member: &Member| {
        let (health, tone) = health(member, knows);
        let slot = if member.slot > u32::from(SLOT_MAX) { "-".to_owned() } else { member.slot.to_string() };
        let lag = if knows { member.lag_entries.to_string() } else { "-".into() };
        let version = if member.version.is_empty() { "-" } else { &member.version };
        let clients: Vec<String> = member.client_urls.iter().map(|url| link(url)).collect();
        let cells = [
            ("name", escape(&member.name)),
            ("role", escape(&member.role)),
            ("health", escape(health)),
            ("lag", lag),
            ("version", escape(version)),
            ("slot", slot),
            ("peer address", escape(&member.peer_address)),
            ("clients", clients.join(" ")),
            ("id", format!("{:016x}", member.id)),
        ];
        let cells: String = cells.iter().map(|(name, cell)| format!("<td data-name=\"{name}\">{cell}</td>")).collect();
        format!("<tr class=\"{tone}\">{cells}</tr>")
    };
    let rows: String = view.members.iter().map(row).collect();
    let wanted = match view.wanted.as_ref() {
        Some(wanted) if !wanted.unknown.is_empty() => format!("Wanted: not known: {}", wanted.unknown),
        Some(wanted) if wanted.replicas > 0 => {
            let last = wanted.start + wanted.replicas - 1;
            format!("Wanted: {} members, slots {} to {last} (from {}).", wanted.replicas, wanted.start, wanted.origin)
        }
        _ => "Wanted: no size is set, and every member stays.".into(),
    };
    let change = if view.change.is_empty() { String::new() } else { format!(" Last change: {}.", view.change) };
    format!(
        "<section id=members><h2>Members</h2><table class=wide><thead><tr><th>name<th>role<th>health<th>lag<th>version<th>slot\
         <th>peer address<th>clients<th>id</tr></thead><tbody>{rows}</tbody></table><p>{}</p></section>",
        escape(&format!("{wanted}{change}"))
    )
}

/// A client URL, which leads to that member's own page; what is no such URL stays text.
fn link(url: &str) -> String {
    let text = escape(url);
    let is_page = url.starts_with("http://") || url.starts_with("https://");
    if is_page { format!("<a href=\"{text}\">{text}</a>") } else { text }
}

/// In a word or two, and how it looks.
fn health(member: &Member, knows: bool) -> (&'static str, &'static str) {
    match member {
        _ if member.role == "awaited" => ("awaited", "note"),
        _ if !knows => ("not known", "note"),
        _ if !member.reachable => ("not reached", "error"),
        _ if member.condemned => ("leaves", "note"),
        _ if !member.caught_up => ("catches up", "warning"),
        _ => ("fine", "good"),
    }
}

fn figures_part(api: &Api) -> String {
    let samples = api.figures().list();
    let charts: String = FIGURES
        .iter()
        .enumerate()
        .map(|(at, figure)| {
            let values: Vec<Option<f64>> = samples.iter().map(|sample| sample.values[at]).collect();
            chart::chart(figure.name, figure.unit, &values)
        })
        .collect();
    format!("<section id=figures><h2>This member, the last five minutes</h2><div class=charts>{charts}</div></section>")
}

fn events_part(events: &[Event]) -> String {
    let mut part = String::from("<section id=events><h2>What has happened</h2>");
    if events.is_empty() {
        part.push_str("<p class=none>Nothing since this process began.</p></section>");
        return part;
    }
    part.push_str("<table>");
    for event in events.iter().rev().take(EVENTS_SHOWN) {
        let at = conditions::time_text(event.at);
        let _ = write!(part, "<tr><td><time>{at}</time></td><td>{}</td></tr>", escape(&event.sentence));
    }
    part + "</table></section>"
}

fn escape(text: &str) -> String {
    crate::identity::shown(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_said_is_text_and_nothing_else() {
        let evil = "<script>alert(1)</script>\" onload=x \u{1b}[2J";
        let condition = Condition {
            name: evil.into(),
            severity: evil.into(),
            sentence: evil.into(),
            remedy: evil.into(),
            ..Condition::default()
        };
        let client_urls = vec!["javascript:alert(1)".to_owned(), format!("http://a/{evil}")];
        let member = Member {
            name: evil.into(),
            role: evil.into(),
            peer_address: evil.into(),
            client_urls,
            ..Member::default()
        };
        let view =
            MembershipView { members: vec![member], leader_id: 0, change: evil.into(), ..MembershipView::default() };
        let event = Event { at: i64::MAX, name: evil.into(), sentence: evil.into() };
        let page = [conditions_part(&[condition]), members_part(&view), events_part(&[event])].concat();
        assert!(!page.contains("<script") && !page.contains('\u{1b}') && !page.contains("\" onload"), "{page}");
        assert!(!page.contains("href=\"javascript") && page.contains("<a href=\"http://a/&lt;script"), "{page}");
        assert!(page.contains("class=\"warning\"") && page.contains("&lt;script&gt;"), "{page}");
    }

    #[test]
    fn the_headline_says_who_leads_and_whether_anything_is_the_matter() {
        let member = |name: &str, role: &str, reachable| Member {
            id: name.len() as u64,
            name: name.into(),
            role: role.into(),
            kind: "slot".into(),
            reachable,
            ..Member::default()
        };
        let mut view = MembershipView {
            leader_id: 1,
            members: vec![member("a", "leader", true), member("bb", "voter", true), member("ccc", "voter", false)],
            ..MembershipView::default()
        };
        let note = Condition { severity: "note".into(), ..Condition::default() };
        let error = Condition { severity: "error".into(), ..Condition::default() };
        assert_eq!(headline(&view, &[]), "a leads; 2 of 3 voters are there; nothing is the matter.");
        assert_eq!(headline(&view, &[error, note.clone()]), "a leads; 2 of 3 voters are there; 1 thing is the matter.");
        view.leader_id = 0;
        assert_eq!(headline(&view, &[note]), "no leader is known; nothing is the matter, 1 to know.");
        assert_eq!(headline(&MembershipView::default(), &[]), "no cluster yet; nothing is the matter.");
    }
}
