//! Which tokens count, and how often an issuer is asked.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::jwt::tests::{Signer, set};
use super::*;

const ISSUER: &str = "https://issuer.example";
const NOW: u64 = 1_000_000;

fn time(seconds: u64) -> WallTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn settings(roles: &[&str]) -> Oidc {
    Oidc {
        issuer: ISSUER.into(),
        audiences: vec!["quorate".into(), "kv".into()],
        ca_file: "/none".into(),
        roles: roles.iter().map(|rule| (*rule).to_owned()).collect(),
        ..Oidc::default()
    }
}

/// One that knows the keys of `signers`.
fn issuer(settings: Oidc, signers: &[&Signer]) -> Arc<Issuer> {
    let config = Config { oidc: settings, ..Config::default() };
    let issuer = Issuer::open(&*Env::real().disk, &config).unwrap().unwrap();
    issuer.put(ISSUER.into(), Keys::published(&set(signers)).unwrap());
    issuer
}

fn claims(changes: &Value) -> Value {
    let mut claims = json!({ "iss": ISSUER, "aud": "quorate", "sub": "pod", "exp": NOW + 600 });
    for (name, value) in changes.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    claims
}

#[tokio::test]
async fn a_token_counts_for_its_audience_in_its_time_and_names_its_user() {
    let signer = Signer::new("1");
    let issuer = issuer(settings(&[]), &[&signer]);
    let name = |changes: &Value| issuer.user(&signer.token(&claims(changes)), time(NOW)).map(|user| user.name.clone());
    for taken in [
        json!({}),
        json!({ "aud": ["other", "kv"] }),
        json!({ "nbf": NOW - 5 }),
        // Clocks may be a minute apart.
        json!({ "nbf": NOW + 59, "exp": NOW - 59 }),
        json!({ "exp": NOW as f64 + 0.5 }),
    ] {
        assert_eq!(name(&taken).as_deref(), Some("pod"), "{taken}");
    }
    for refused in [
        json!({ "aud": "other" }),
        json!({ "aud": null }),
        json!({ "aud": [] }),
        json!({ "aud": { "quorate": true } }),
        json!({ "aud": [["quorate"]] }),
        json!({ "iss": "https://other.example" }),
        json!({ "iss": format!("{ISSUER}/") }),
        json!({ "iss": null }),
        json!({ "iss": [ISSUER] }),
        json!({ "exp": NOW - 61 }),
        json!({ "exp": null }),
        json!({ "exp": "9999999999" }),
        json!({ "exp": 1e300 }),
        json!({ "nbf": NOW + 61 }),
        json!({ "nbf": "0" }),
        json!({ "sub": "" }),
        json!({ "sub": 7 }),
        json!({ "sub": null }),
        json!({ "sub": "x".repeat(NAME_BYTES_MAX + 1) }),
    ] {
        assert_eq!(name(&refused), None, "{refused}");
    }
    assert!(issuer.user(&"x".repeat(TOKEN_BYTES_MAX + 1), time(NOW)).is_none());
}

#[tokio::test]
async fn claims_give_roles_by_rules_and_names_have_their_prefix() {
    let signer = Signer::new("1");
    let rules = ["app <- sub=sys:sa:shop:*", "root <- groups=admins", "both <- sub=sys:*:web", "app <- groups=apps"];
    let settings = Oidc { user_prefix: "oidc:".into(), ..settings(&rules) };
    let issuer = issuer(settings, &[&signer]);
    let roles = |changes: Value| {
        let user = issuer.user(&signer.token(&claims(&changes)), time(NOW)).unwrap();
        assert!(user.name.starts_with("oidc:") && user.since == 0 && user.until.is_some());
        user.roles.clone()
    };
    let given = |roles: &[&str]| Some(roles.iter().map(|role| (*role).to_owned()).collect::<Vec<_>>());
    assert_eq!(roles(json!({ "sub": "sys:sa:shop:web" })), given(&["app", "both"]));
    assert_eq!(roles(json!({ "sub": "sys:sa:shop2:x", "groups": ["x", "apps", "admins"] })), given(&["root", "app"]));
    assert_eq!(roles(json!({ "groups": "admins" })), given(&["root"]));
    // The rest is whoever has that name in the store.
    assert_eq!(roles(json!({ "sub": "sys:sa:other:x", "groups": [["admins"], 7] })), None);
}

#[test]
fn a_star_stands_for_any_text() {
    for (pattern, text, fits) in [
        ("a", "a", true),
        ("a", "ab", false),
        ("a*", "a", true),
        ("a*c", "abc", true),
        ("a*c", "abcd", false),
        ("*", "", true),
        ("a*b*c", "a-b-c", true),
        ("a*b*c", "a-c-b", false),
        ("aa*aa", "aaa", false),
        ("**", "x", true),
        ("", "x", false),
    ] {
        assert_eq!(is_match(pattern, text), fits, "{pattern} {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_replaced_ends_its_tokens_and_so_do_keys_that_are_too_old() {
    let (old, new) = (Signer::new("1"), Signer::new("2"));
    let issuer = issuer(settings(&[]), &[&old]);
    let (of_old, of_new) = (old.token(&claims(&json!({}))), new.token(&claims(&json!({}))));
    let known = |token: &str| issuer.user(token, time(NOW)).is_some();
    assert!(known(&of_old) && known(&of_old) && !known(&of_new));
    issuer.put(ISSUER.into(), Keys::published(&set(&[&old, &new])).unwrap());
    assert!(known(&of_old) && known(&of_new));
    issuer.put(ISSUER.into(), Keys::published(&set(&[&new])).unwrap());
    assert!(!known(&of_old) && known(&of_new), "what is remembered goes with its key");
    tokio::time::advance(issuer.settings.keys_max_age).await;
    assert!(!known(&of_new), "nobody has heard of the issuer for a day");
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_unknown_keys_makes_no_flood_of_fetches() {
    let signer = Signer::new("unknown");
    let config = Config { oidc: Oidc { issuer: "https://127.0.0.1:1".into(), ..settings(&[]) }, ..Config::default() };
    let env = Env::real();
    let issuer = Issuer::open(&*env.disk, &config).unwrap().unwrap();
    tokio::spawn(issuer.clone().follow(env.clone()));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1000) {
        assert!(issuer.user(&signer.token(&claims(&json!({}))), time(NOW)).is_none());
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    let fetches = issuer.fetches.load(Ordering::Relaxed);
    assert!((1..=101).contains(&fetches), "{fetches}");
    env.shutdown.cancel();
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_is_bounded_and_ends_with_the_token() {
    let signer = Signer::new("1");
    let issuer = issuer(settings(&[]), &[&signer]);
    let token = signer.token(&claims(&json!({ "exp": NOW + 10 })));
    assert!(issuer.user(&token, time(NOW)).is_some());
    tokio::time::advance(Duration::from_secs(71)).await;
    assert!(issuer.user(&token, time(NOW + 71)).is_none());
    let user = Arc::new(Named::user("u", 0));
    let mut seen = issuer.seen.lock();
    for number in 0..SEEN_MAX + 10 {
        make_room(&mut seen, Instant::now());
        let until = Instant::now() + Duration::from_secs(60);
        seen.insert(number.to_string(), Seen { user: user.clone(), until });
        assert!(seen.len() <= SEEN_MAX);
    }
}
