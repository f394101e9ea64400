//! The own StatefulSet, as the API server shows it: which slots are wanted; and Events about what the cluster does with that.
//!
//! Owns the only way to Kubernetes. It asks for one object by its name (`get`, so that one line of RBAC is enough), each
//! time that `wanted` polls it.
//! Invariants: whatever keeps the API server from answering makes the size unknown, never a guess and never the answer before;
//! while one kind of failure lasts its sentence stays, which says what a person must do. A failed Event changes nothing.
//! Absent: watches and lists (they need more rights), every other object, and what follows from the size (`plan`, `decide`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client, Config};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::wanted::{Notice, Wanted, WantedSource};
use crate::config;
use crate::env::net::BoxFuture;
use crate::env::{self, Disk, Env};
use crate::identity::{SLOT_MAX, read_small};

/// Notices that wait to be sent; more are dropped, for the log has them all.
const NOTICES_WAITING_MAX: usize = 64;
const NETWORK: &str = "a NetworkPolicy may keep this pod from it";
/// What the API server takes as an Event's text, in characters.
const EVENT_CHARS_MAX: usize = 1024;

/// Which object to ask for, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub stateful_set: String,
    pub namespace: String,
    /// The own pod's name: who reports an Event.
    pub pod: String,
    pub url: String,
    pub service_account_dir: PathBuf,
    pub poll_interval: Duration,
    pub timeout: Duration,
    pub events: bool,
}

/// Settings that lack what a pod has.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "kubernetes.stateful_set is {0:?}, but this process is told of no API server: expected KUBERNETES_SERVICE_HOST and \
         KUBERNETES_SERVICE_PORT in the environment, as in every pod; set kubernetes.api_server, or leave the setting out"
    )]
    NoServer(String),
    #[error(
        "the namespace of StatefulSet {0:?} is not known: expected kubernetes.namespace, POD_NAMESPACE, or a file `namespace` \
         in {1:?}; set one"
    )]
    NoNamespace(String, PathBuf),
}

impl Options {
    /// From the settings, this process's environment and the mounted service account; `None` if not on Kubernetes.
    pub fn here(settings: &config::Kubernetes, pod: &str, disk: &dyn Disk) -> Result<Option<Self>, Error> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self::new(settings, pod, disk, variable)
    }

    fn new(
        settings: &config::Kubernetes,
        pod: &str,
        disk: &dyn Disk,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, Error> {
        let name = &settings.stateful_set;
        if name.is_empty() {
            return Ok(None);
        }
        let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        let from_parts = || {
            let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
            Some(if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") })
        };
        let mounted = || {
            let text = read_small(disk, &settings.service_account_dir.join("namespace")).ok()?;
            given(&String::from_utf8_lossy(&text).trim().to_owned())
        };
        let url = given(&settings.api_server).or_else(from_parts).ok_or_else(|| Error::NoServer(name.clone()))?;
        let namespace = given(&settings.namespace)
            .or_else(|| variable("POD_NAMESPACE"))
            .or_else(mounted)
            .ok_or_else(|| Error::NoNamespace(name.clone(), settings.service_account_dir.clone()))?;
        Ok(Some(Self {
            stateful_set: name.clone(),
            namespace,
            pod: pod.to_owned(),
            url,
            service_account_dir: settings.service_account_dir.clone(),
            poll_interval: settings.poll_interval,
            timeout: settings.timeout,
            events: settings.events,
        }))
    }
}

/// Kinds of failure: while one lasts its sentence stays the same, so that it is logged once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Setup,
    Unauthorized,
    Forbidden,
    NotFound,
    Silent,
    Other,
}

/// See the module's head. One a process; cloning shares it.
#[derive(Clone)]
pub struct Kubernetes(Arc<Inner>);

struct Inner {
    env: Env,
    options: Options,
    client: Mutex<Option<Client>>,
    failure: Mutex<Option<(Failure, String)>>,
    /// Of the StatefulSet as last seen; an Event names it.
    uid: Mutex<Option<String>>,
    notices: mpsc::Sender<Notice>,
}

impl Kubernetes {
    /// Asks nothing yet.
    pub fn start(env: Env, options: Options) -> Self {
        let (notices, waiting) = mpsc::channel(NOTICES_WAITING_MAX);
        let (client, failure, uid) = Default::default();
        let inner = Arc::new(Inner { env: env.clone(), options, client, failure, uid, notices });
        env.spawn(inner.clone().send_events(waiting));
        Self(inner)
    }
}

impl Inner {
    /// What the StatefulSet wants, or why that is not known.
    async fn ask(&self) -> Wanted {
        let Options { url, timeout, .. } = &self.options;
        let asked = match env::timeout(*timeout, self.get_set()).await {
            Ok(asked) => asked,
            Err(_) => Err((
                Failure::Silent,
                format!("the API server at {url} has not answered within {timeout:?}; {NETWORK}"),
            )),
        };
        match asked {
            Ok(set) => {
                *self.failure.lock() = None;
                let wanted = read(&set);
                *self.uid.lock() = set.metadata.uid;
                wanted
            }
            Err((failure, text)) => {
                // A connection that has failed once is not used again: the address may have moved.
                *self.client.lock() = None;
                let mut last = self.failure.lock();
                match &*last {
                    Some((same, text)) if *same == failure => Wanted::Unknown(text.clone()),
                    _ => Wanted::Unknown(last.insert((failure, text)).1.clone()),
                }
            }
        }
    }

    fn client(&self) -> Result<Client, (Failure, String)> {
        let mut client = self.client.lock();
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let dir = &self.options.service_account_dir;
        let setup = |fault: String| {
            let what = "mount a service account's token (automountServiceAccountToken, serviceAccountName)";
            (Failure::Setup, format!("the service account in {} cannot be used: {fault}; {what}", dir.display()))
        };
        let url = self.options.url.parse().map_err(|fault| setup(format!("{}: {fault}", self.options.url)))?;
        let mut config = Config::new(url);
        // In place of the platform's roots, which an image without a CA bundle lacks, and which would not be asked anyway.
        config.root_cert = Some(Vec::new());
        // Both are read anew every minute, for the kubelet rotates them.
        config.root_cert_file = Some(dir.join("ca.crt"));
        config.auth_info.token_file = Some(dir.join("token").display().to_string());
        config.connect_timeout = Some(self.options.timeout);
        config.read_timeout = Some(self.options.timeout);
        config.reset_reader_on_write = true;
        config.default_retry = false;
        let made = Client::try_from(config).map_err(|fault| setup(innermost(&fault)))?;
        *client = Some(made.clone());
        Ok(made)
    }

    async fn get_set(&self) -> Result<StatefulSet, (Failure, String)> {
        let sets: Api<StatefulSet> = Api::namespaced(self.client()?, &self.options.namespace);
        sets.get(&self.options.stateful_set).await.map_err(|error| self.explain(&error))
    }

    fn explain(&self, error: &kube::Error) -> (Failure, String) {
        let Options { stateful_set: name, namespace, url, .. } = &self.options;
        let code = if let kube::Error::Api(status) = error { status.code } else { 0 };
        match code {
            401 => (
                Failure::Unauthorized,
                format!(
                    "the API server at {url} does not accept this pod's token (401); give the pod a service account"
                ),
            ),
            403 => (
                Failure::Forbidden,
                format!(
                    "this pod's service account may not read StatefulSet {namespace}/{name} (403); bind it to a Role with \
                     verb get on resource statefulsets of group apps, resourceName {name} (the chart's rbac.create)"
                ),
            ),
            404 => (
                Failure::NotFound,
                format!(
                    "there is no StatefulSet {namespace}/{name} (404); correct kubernetes.stateful_set and \
                     kubernetes.namespace"
                ),
            ),
            0 => (Failure::Silent, format!("the API server at {url} does not answer: {}; {NETWORK}", innermost(error))),
            code => (Failure::Other, format!("the API server at {url} answers {code}: {}", innermost(error))),
        }
    }

    async fn send_events(self: Arc<Self>, mut waiting: mpsc::Receiver<Notice>) {
        let mut refused = false;
        loop {
            let notice = tokio::select! {
                notice = waiting.recv() => notice,
                () = self.env.shutdown.cancelled() => return,
            };
            let Some(notice) = notice else { return };
            let sent = tokio::select! {
                sent = env::timeout(self.options.timeout, self.create(&notice)) => sent,
                () = self.env.shutdown.cancelled() => return,
            };
            let failed = match sent {
                Ok(Ok(())) => continue,
                Ok(Err((_, text))) => text,
                Err(_) => format!("no answer within {:?}", self.options.timeout),
            };
            if !std::mem::replace(&mut refused, true) {
                let action = "allow create on events, or set kubernetes.events = false";
                tracing::info!(reason = failed, action, "Events cannot be sent");
            }
        }
    }

    async fn create(&self, notice: &Notice) -> Result<(), (Failure, String)> {
        let events: Api<Event> = Api::namespaced(self.client()?, &self.options.namespace);
        let event = self.event(notice, Timestamp::try_from(env::wall_clock()).ok());
        events
            .create(&PostParams::default(), &event)
            .await
            .map(drop)
            .map_err(|error| (Failure::Other, innermost(&error)))
    }

    fn event(&self, notice: &Notice, now: Option<Timestamp>) -> Event {
        let Options { stateful_set, namespace, pod, .. } = &self.options;
        let tone = if notice.warning { "Warning" } else { "Normal" };
        Event {
            metadata: ObjectMeta {
                generate_name: Some(format!("{stateful_set}.")),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("apps/v1".into()),
                kind: Some("StatefulSet".into()),
                name: Some(stateful_set.clone()),
                namespace: Some(namespace.clone()),
                uid: self.uid.lock().clone(),
                ..ObjectReference::default()
            },
            type_: Some(tone.into()),
            reason: Some(reason(&notice.name)),
            message: Some(notice.sentence.chars().take(EVENT_CHARS_MAX).collect()),
            action: Some("Reconcile".into()),
            count: Some(1),
            first_timestamp: now.map(Time),
            last_timestamp: now.map(Time),
            source: Some(EventSource { component: Some("quorate".into()), host: None }),
            reporting_component: Some("quorate".into()),
            reporting_instance: Some(pod.clone()),
            ..Event::default()
        }
    }
}

impl WantedSource for Kubernetes {
    fn name(&self) -> String {
        format!("StatefulSet {}/{}", self.0.options.namespace, self.0.options.stateful_set)
    }

    fn get(&self) -> BoxFuture<Wanted> {
        let inner = self.0.clone();
        Box::pin(async move { inner.ask().await })
    }

    fn interval(&self) -> Duration {
        self.0.options.poll_interval
    }

    fn is_withdrawn(&self) -> bool {
        let was_answered = self.0.uid.lock().is_some();
        let failure = self.0.failure.lock().as_ref().map(|(failure, _)| *failure);
        was_answered && matches!(failure, Some(Failure::Unauthorized | Failure::Forbidden | Failure::NotFound))
    }

    /// Dropped if too many wait: the log has it too.
    fn tell(&self, notice: Notice) -> BoxFuture<()> {
        if self.0.options.events {
            let _ = self.0.notices.try_send(notice);
        }
        Box::pin(async {})
    }
}

/// The wanted slots. A StatefulSet that is being deleted, or scaled to nothing, shuts the cluster down and changes no membership
/// (membership rule 20).
fn read(set: &StatefulSet) -> Wanted {
    let spec = set.spec.clone().unwrap_or_default();
    let replicas = count(spec.replicas.unwrap_or(1));
    if set.metadata.deletion_timestamp.is_some() || replicas == 0 {
        return Wanted::Shutdown;
    }
    let start = start(set);
    let end = start + replicas;
    if end > u64::from(SLOT_MAX) + 1 {
        return Wanted::Unknown(format!("slot {} is beyond the greatest one, {SLOT_MAX}; scale down", end - 1));
    }
    let present = start..start + count(set.status.as_ref().map_or(0, |status| status.replicas));
    // Left out, the policy is `OrderedReady`; the API server fills it in.
    let one_by_one = spec.pod_management_policy.is_some_and(|policy| policy == "OrderedReady");
    Wanted::Slots { slots: start..end, present, one_by_one }
}

/// `two-holders` as Kubernetes writes reasons: `TwoHolders`.
fn reason(name: &str) -> String {
    let capital = |word: &str| {
        let mut chars = word.chars();
        chars.next().map(|first| first.to_uppercase().chain(chars).collect::<String>())
    };
    name.split('-').filter_map(capital).collect()
}

fn start(set: &StatefulSet) -> u64 {
    let ordinals = set.spec.as_ref().and_then(|spec| spec.ordinals.as_ref());
    count(ordinals.and_then(|ordinals| ordinals.start).unwrap_or(0))
}

fn count(number: i32) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// The cause that helps a person: `connection refused` rather than `service error`.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::tests::Files;

    fn set(spec: serde_json::Value) -> StatefulSet {
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn replicas_and_start_are_the_wanted_slots() {
        let cases = [
            (
                json!({"spec": {"replicas": 3, "podManagementPolicy": "Parallel"}}),
                Wanted::Slots { slots: 0..3, present: 0..0, one_by_one: false },
            ),
            (
                json!({"spec": {"replicas": 3, "podManagementPolicy": "OrderedReady"}}),
                Wanted::Slots { slots: 0..3, present: 0..0, one_by_one: true },
            ),
            (
                json!({"spec": {"replicas": 2, "ordinals": {"start": 5}}, "status": {"replicas": 4}}),
                Wanted::Slots { slots: 5..7, present: 5..9, one_by_one: false },
            ),
            (json!({"spec": {}}), Wanted::Slots { slots: 0..1, present: 0..0, one_by_one: false }),
            (json!({"spec": {"replicas": 0}}), Wanted::Shutdown),
            (
                json!({"metadata": {"deletionTimestamp": "2026-11-25T10:00:00Z"}, "spec": {"replicas": 3}}),
                Wanted::Shutdown,
            ),
        ];
        for (object, wanted) in cases {
            let mut spec = object.clone();
            if let Some(spec) = spec["spec"].as_object_mut() {
                spec.insert("selector".into(), json!({}));
                spec.insert("serviceName".into(), json!("x"));
                spec.insert("template".into(), json!({}));
            }
            assert_eq!(read(&set(spec)), wanted, "{object}");
        }
        let beyond = json!({"spec": {"replicas": 65_535, "ordinals": {"start": 1}, "selector": {}, "template": {}}});
        assert!(matches!(read(&set(beyond)), Wanted::Unknown(_)));
    }

    #[test]
    fn reasons_are_written_as_kubernetes_does() {
        assert_eq!((reason("two-holders"), reason("quorum")), ("TwoHolders".to_owned(), "Quorum".to_owned()));
    }

    #[test]
    fn place_comes_from_settings_then_from_the_pod() {
        let settings = |set: &str| config::Kubernetes { stateful_set: set.into(), ..config::Kubernetes::default() };
        let pod = |name: &str| match name {
            "KUBERNETES_SERVICE_HOST" => Some("fd00::1".to_owned()),
            "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
            _ => None,
        };
        let mounted = Files::new(&[("/var/run/secrets/kubernetes.io/serviceaccount/namespace", "data\n")]);
        let found = Options::new(&settings("kv"), "kv-0", &mounted, pod).unwrap().unwrap();
        assert_eq!((found.url.as_str(), found.namespace.as_str()), ("https://[fd00::1]:443", "data"));
        let own =
            config::Kubernetes { namespace: "own".into(), api_server: "https://api:6443".into(), ..settings("kv") };
        let found = Options::new(&own, "kv-0", &mounted, |_| None).unwrap().unwrap();
        assert_eq!((found.url.as_str(), found.namespace.as_str()), ("https://api:6443", "own"));
        assert!(Options::new(&settings(""), "kv-0", &mounted, |_| None).unwrap().is_none());
        let error = Options::new(&settings("kv"), "kv-0", &mounted, |_| None).unwrap_err().to_string();
        assert!(error.contains("KUBERNETES_SERVICE_HOST"), "{error}");
        let error = Options::new(&settings("kv"), "kv-0", &Files::new(&[]), pod).unwrap_err().to_string();
        assert!(error.contains("POD_NAMESPACE"), "{error}");
    }
}
