//! Tokens of an issuer (OpenID Connect): who shows one is a user, with the roles that its claims give.
//!
//! Keys are fetched in the background, one fetch at a time: at the start, now and then, and when a token names a key that is not known, but
//! no more often than `FETCH_REST` says, whatever tokens come. So no request waits for an issuer, and nobody can have it flooded. Where the keys
//! are in a file, the file is followed.
//! Invariants: a token counts if a known key has signed it, it names this issuer and one of the audiences, and its time has come and is not
//! over. Keys that could not be fetched anew for `keys_max_age` count no more. What is remembered of tokens is bounded, and is forgotten
//! with the keys. The API server's token goes to the API server alone.
//! Absent: what roles may do (`kv::auth`), and signatures (`jwt`).

mod fetch;
mod jwt;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::Notify;

use self::fetch::{Ask, fetch};
use self::jwt::{Keys, Refused};
use crate::caller::Named;
use crate::config::{Config, KUBERNETES, Oidc, RoleRule};
use crate::env::{Disk, Env, Instant, Pool, WallTime, interval, timeout};
use crate::identity::read_bounded;

/// Between two fetches, whatever is asked for.
const FETCH_REST: Duration = Duration::from_secs(10);
/// Keys are fetched anew so often: issuers publish a new one long before they sign with it.
const REFRESH: Duration = Duration::from_secs(5 * 60);
/// Between two looks at a file of keys.
const LOOK: Duration = Duration::from_secs(2);
/// The issuer's clock and this one are apart by so much at most.
const SKEW: Duration = Duration::from_secs(60);
const FILE_BYTES_MAX: usize = 256 << 10;
/// Bytes of a token that is looked at; a request's head holds 32 KiB.
const TOKEN_BYTES_MAX: usize = 16 << 10;
const NAME_BYTES_MAX: usize = 1024;
/// Roles of one user; the rest is left out.
const ROLES_MAX: usize = 64;
/// Tokens remembered.
const SEEN_MAX: usize = 16_384;
/// How pods name the API server; its certificate is for this name.
const API_SERVER: &str = "https://kubernetes.default.svc";

/// Where keys come from.
#[derive(Debug)]
enum Source {
    File(PathBuf),
    /// Its discovery says where.
    Issuer {
        url: String,
        ca_file: PathBuf,
    },
    /// Asked with this pod's own token; its name is what its discovery says.
    ApiServer {
        url: String,
        account: PathBuf,
    },
}

/// What is in force.
#[derive(Default)]
struct Held {
    /// As tokens have it.
    issuer: String,
    keys: Keys,
    /// When they were fetched; `None`: never.
    at: Option<Instant>,
}

/// A token that was taken.
struct Seen {
    user: Arc<Named>,
    until: Instant,
}

/// One issuer, as this member follows it.
pub struct Issuer {
    settings: Oidc,
    rules: Vec<RoleRule>,
    source: Source,
    held: RwLock<Arc<Held>>,
    seen: Mutex<HashMap<String, Seen>>,
    /// A token has named a key that is not known.
    wanted: Notify,
    /// Why there are no newer keys.
    fault: Mutex<Option<String>>,
    #[cfg(test)]
    fetches: std::sync::atomic::AtomicUsize,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Issuer {
    /// The issuer of the settings, if there is one; a file of keys must be there, and sound.
    pub fn open(disk: &dyn Disk, config: &Config) -> Result<Option<Arc<Self>>, String> {
        let settings = config.oidc.clone();
        if !settings.is_on() {
            return Ok(None);
        }
        let source = match &settings.issuer[..] {
            KUBERNETES => {
                let given = Some(&config.kubernetes.api_server).filter(|url| !url.is_empty());
                let url = given.map_or(API_SERVER, |url| url.trim_end_matches('/')).to_owned();
                Source::ApiServer { url, account: config.kubernetes.service_account_dir.clone() }
            }
            _ if !settings.keys_file.as_os_str().is_empty() => Source::File(settings.keys_file.clone()),
            url => Source::Issuer { url: url.trim_end_matches('/').to_owned(), ca_file: settings.ca_file.clone() },
        };
        let issuer = Self {
            rules: settings.rules().map_err(|error| format!("oidc.roles: expected {error}"))?,
            settings,
            source,
            held: RwLock::default(),
            seen: Mutex::default(),
            wanted: Notify::new(),
            fault: Mutex::default(),
            #[cfg(test)]
            fetches: Default::default(),
        };
        if let Source::File(path) = &issuer.source {
            let keys = issuer.read_file(disk, path).map_err(|error| format!("oidc.keys_file: {error}"))?;
            issuer.put(issuer.settings.issuer.clone(), keys);
        }
        Ok(Some(Arc::new(issuer)))
    }

    /// Whether it may be one of an issuer's: this cluster's own have no dots.
    pub fn is_form_of_token(token: &str) -> bool {
        token.bytes().filter(|byte| *byte == b'.').count() == 2
    }

    /// What a person should know.
    pub fn note(&self) -> Option<String> {
        let fault = self.fault.lock().clone()?;
        let issuer = &self.settings.issuer;
        let counts =
            if self.is_stale(&self.held.read()) { "its tokens are not taken" } else { "those that are known count on" };
        Some(format!("the keys of issuer {issuer} cannot be had, {counts}: {fault}"))
    }

    /// Who shows `token`; `None` if nobody does.
    pub fn user(&self, token: &str, now: WallTime) -> Option<Arc<Named>> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let held = self.held.read().clone();
        if self.is_stale(&held) {
            self.wanted.notify_one();
            return None;
        }
        let at = Instant::now();
        if let Some(seen) = self.seen.lock().get(token).filter(|seen| at < seen.until) {
            return Some(seen.user.clone());
        }
        let claims = match held.keys.claims(token) {
            Ok(claims) => claims,
            Err(Refused::UnknownKey) => {
                self.wanted.notify_one();
                return None;
            }
            Err(Refused::Malformed | Refused::Signature) => return None,
        };
        let left = life_left(&claims, now)?;
        let is_for_us = claims.get("iss").and_then(Value::as_str) == Some(held.issuer.as_str())
            && texts(claims.get("aud")).any(|audience| self.settings.audiences.iter().any(|own| own == audience));
        if !is_for_us {
            return None;
        }
        let until = at.checked_add(left)?;
        let user = Arc::new(self.named(&claims, until)?);
        let mut seen = self.seen.lock();
        // The keys may be others by now.
        if Arc::ptr_eq(&held, &self.held.read()) {
            make_room(&mut seen, at);
            seen.insert(token.to_owned(), Seen { user: user.clone(), until });
        }
        Some(user)
    }

    fn named(&self, claims: &Map<String, Value>, until: Instant) -> Option<Named> {
        let own = claims.get(&self.settings.user_claim).and_then(Value::as_str);
        let own = own.filter(|name| !name.is_empty() && name.len() <= NAME_BYTES_MAX)?;
        let mut roles: Vec<String> = Vec::new();
        for rule in self.rules.iter().filter(|rule| fits(rule, claims)) {
            if roles.len() < ROLES_MAX && !roles.contains(&rule.role) {
                roles.push(rule.role.clone());
            }
        }
        let roles = Some(roles).filter(|roles| !roles.is_empty());
        Some(Named { name: format!("{}{own}", self.settings.user_prefix), since: 0, roles, until: Some(until) })
    }

    /// Whether its keys are too old to count.
    fn is_stale(&self, held: &Held) -> bool {
        match (&self.source, held.at) {
            (Source::File(_), at) => at.is_none(),
            (_, at) => at.is_none_or(|at| at.elapsed() >= self.settings.keys_max_age),
        }
    }

    fn put(&self, issuer: String, keys: Keys) {
        *self.held.write() = Arc::new(Held { issuer, keys, at: Some(Instant::now()) });
        self.seen.lock().clear();
    }

    /// Follows the keys, until shutdown.
    pub async fn follow(self: Arc<Self>, env: Env) {
        let shutdown = env.shutdown.clone();
        let following = async {
            match &self.source {
                Source::File(path) => self.follow_file(&env, path).await,
                Source::Issuer { .. } | Source::ApiServer { .. } => self.follow_issuer(&env).await,
            }
        };
        tokio::select! {
            () = following => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn follow_file(&self, env: &Env, path: &Path) {
        let (mut tick, mut asked, mut before) = (interval(LOOK), env.reread.subscribe(), None);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                Ok(()) = asked.changed() => {}
            }
            let (disk, path) = (env.disk.clone(), path.to_owned());
            let read = env.long(Pool::Disk, move || read_bounded(&*disk, &path, FILE_BYTES_MAX)).await;
            let read = read.map_err(|error| error.to_string());
            if before.as_ref() == Some(&read) {
                continue;
            }
            let keys = read.as_ref().map_err(String::clone).and_then(|bytes| Keys::of_file(bytes));
            // The first look finds what the start has found.
            let is_new = before.replace(read).is_some();
            match keys {
                Ok(keys) if is_new => {
                    self.put(self.settings.issuer.clone(), keys);
                    self.set_fault(None);
                }
                Ok(_) => {}
                Err(error) => self.set_fault(Some(error)),
            }
        }
    }

    fn read_file(&self, disk: &dyn Disk, path: &Path) -> Result<Keys, String> {
        let bytes = read_bounded(disk, path, FILE_BYTES_MAX);
        let bytes = bytes.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Keys::of_file(&bytes).map_err(|error| format!("{}: {error}", path.display()))
    }

    async fn follow_issuer(&self, env: &Env) {
        loop {
            #[cfg(test)]
            self.fetches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let next = match self.fetch_keys(env).await {
                Ok((issuer, keys)) => {
                    self.put(issuer, keys);
                    self.set_fault(None);
                    REFRESH
                }
                Err(error) => {
                    self.set_fault(Some(error));
                    FETCH_REST
                }
            };
            // What asks meanwhile is answered by the next fetch.
            crate::env::sleep(FETCH_REST).await;
            let _ = timeout(next.saturating_sub(FETCH_REST), self.wanted.notified()).await;
        }
    }

    fn set_fault(&self, fault: Option<String>) {
        let mut held = self.fault.lock();
        if let Some(error) = &fault
            && held.is_none()
        {
            tracing::warn!(issuer = self.settings.issuer, error, "an issuer's keys cannot be had");
        }
        if fault.is_none() && held.is_some() {
            tracing::info!(issuer = self.settings.issuer, "an issuer's keys are there again");
        }
        *held = fault;
    }

    /// The issuer's name, and its keys.
    async fn fetch_keys(&self, env: &Env) -> Result<(String, Keys), String> {
        let read = async |path: PathBuf| {
            let (disk, shown) = (env.disk.clone(), path.display().to_string());
            let read = env.long(Pool::Disk, move || read_bounded(&*disk, &path, FILE_BYTES_MAX)).await;
            read.map_err(|error| format!("{shown} cannot be read: {error}"))
        };
        let well_known = |url: &str| format!("{url}/.well-known/openid-configuration");
        let (issuer, keys) = match &self.source {
            Source::File(path) => return Err(format!("{} is followed, not fetched", path.display())),
            Source::Issuer { url, ca_file } => {
                let roots = read(ca_file.clone()).await?;
                let ask = |url| Ask { url, roots: &roots, token: None };
                let place = well_known(url);
                let discovery = discovery(&fetch(env, ask(&place)).await?)?;
                if discovery.issuer.trim_end_matches('/') != url {
                    return Err(format!("{url} says that it is {}; expected the same name", discovery.issuer));
                }
                (discovery.issuer, fetch(env, ask(&discovery.jwks_uri)).await?)
            }
            Source::ApiServer { url, account } => {
                let (roots, token) = (read(account.join("ca.crt")).await?, read(account.join("token")).await?);
                let token = String::from_utf8(token).map_err(|_| "this pod's token is no text".to_owned())?;
                let ask = |url| Ask { url, roots: &roots, token: Some(token.trim()) };
                // Where the discovery says that the keys are may be another host: the token is for this one.
                let (place, keys) = (well_known(url), format!("{url}/openid/v1/jwks"));
                let discovery = discovery(&fetch(env, ask(&place)).await?)?;
                (discovery.issuer, fetch(env, ask(&keys)).await?)
            }
        };
        Ok((issuer, Keys::published(&keys)?))
    }
}

fn discovery(bytes: &Bytes) -> Result<Discovery, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("the discovery document: {error}"))
}

/// How long a token still counts; `None` if its time has not come, is over, or is none.
fn life_left(claims: &Map<String, Value>, now: WallTime) -> Option<Duration> {
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    let skew = SKEW.as_secs_f64();
    // A claim of another kind is not one that is left out.
    let begin = match claims.get("nbf") {
        Some(begin) => begin.as_f64()?,
        None => f64::NEG_INFINITY,
    };
    let end = claims.get("exp")?.as_f64()?;
    let left = end + skew - now;
    (begin <= now + skew && left > 0.0).then(|| Duration::try_from_secs_f64(left).ok())?
}

/// A claim that is a text, or a list of texts.
fn texts(claim: Option<&Value>) -> impl Iterator<Item = &str> {
    let (one, many) = match claim {
        Some(Value::String(text)) => (Some(text.as_str()), &[][..]),
        Some(Value::Array(all)) => (None, &all[..]),
        _ => (None, &[][..]),
    };
    one.into_iter().chain(many.iter().filter_map(Value::as_str))
}

fn fits(rule: &RoleRule, claims: &Map<String, Value>) -> bool {
    texts(claims.get(&rule.claim)).any(|text| is_match(&rule.pattern, text))
}

/// Whether `text` is what `pattern` stands for: `*` for any text, everything else for itself.
fn is_match(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Forgets those whose time is over, and if that is not enough, all.
fn make_room(seen: &mut HashMap<String, Seen>, now: Instant) {
    if seen.len() >= SEEN_MAX {
        seen.retain(|_, seen| now < seen.until);
    }
    if seen.len() >= SEEN_MAX {
        seen.clear();
    }
}
