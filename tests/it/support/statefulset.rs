//! A StatefulSet of real server processes, played as Kubernetes plays it, beside a small API server.
//!
//! Owns the test's directory and the task that runs the [`Control`] loop. Pods find their settings, names and service account as
//! the chart gives them, and one another by names that move as pods do. A test that fails prints the end of each pod's log.
//! ```text
//! let mut set = StatefulSet::new(3).await;
//! let load = set.load();
//! set.scale(5);
//! set.wait_voters(0..5).await;
//! load.finish(&set).await;
//! ```
//! Absent: sleeping; tests wait for conditions.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use quorate::pb::etcd::cluster_client::ClusterClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::{
    Member, MemberListRequest, MoveLeaderRequest, PutRequest, RangeRequest, StatusRequest, StatusResponse,
};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::cluster::{binary, free_host, http_get, wait_for};
use super::controller::{Control, Ended, NAME, NAMESPACE, Net, Spec, Template};
use super::kube_api::KubeApi;
use super::load::Load;
use super::namespace::{self, Cut, Wires};

const TICK: Duration = Duration::from_millis(30);
/// The third byte of addresses that are no pod's.
const API_HOST: u8 = 250;

/// A StatefulSet that is not installed yet.
pub struct Blueprint {
    spec: Spec,
    settings: Vec<(String, String)>,
    template: Template,
    size: u64,
    wired: bool,
    disk_bytes: Option<u64>,
}

impl Blueprint {
    /// `podManagementPolicy: OrderedReady`; else it is `Parallel`.
    pub fn ordered(mut self) -> Self {
        self.spec.ordered = true;
        self
    }

    /// `spec.ordinals.start`.
    pub fn first(mut self, ordinal: u64) -> Self {
        self.spec.start = ordinal;
        self
    }

    /// `terminationGracePeriodSeconds`; the server's own is shorter by a quarter.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.spec.grace = grace;
        self
    }

    /// `persistentVolumeClaimRetentionPolicy.whenScaled: Delete`; else the disks are kept.
    pub fn delete_disks_when_scaled(mut self) -> Self {
        self.spec.delete_when_scaled = true;
        self
    }

    /// How long after its pod's start a name resolves.
    pub fn dns_delay(mut self, delay: Duration) -> Self {
        self.spec.dns_delay = delay;
        self
    }

    /// A setting, in the ConfigMap.
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.settings.push((key.into(), value.into()));
        self
    }

    /// An environment variable of the pod template.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.template.env.push((name.into(), value.into()));
        self
    }

    /// Installs it, as the chart does; waits for nothing.
    pub fn install(self) -> StatefulSet {
        StatefulSet::install(self)
    }

    /// Installs it and waits until all pods are ready and all vote.
    pub async fn start(self) -> StatefulSet {
        let set = self.install();
        set.wait_ready().await;
        set.wait_voters(set.wanted()).await;
        set
    }

    /// The same where the last pod is one too many to vote (an even count above two): it stands by.
    pub async fn start_with_standby(self) -> StatefulSet {
        let set = self.install();
        set.wait_ready().await;
        let most = set.wanted().end - set.wanted().start - 1;
        wait_for("all but one to vote", async || {
            let members = set.membership(set.wanted().start).await;
            let voters = members.iter().filter(|member| member.1).count() as u64;
            if voters == most && members.len() as u64 == most + 1 { Ok(()) } else { Err(format!("{members:x?}")) }
        })
        .await;
        set
    }
}

/// What faults need.
#[allow(dead_code, reason = "of the programs that share this, only the nemesis makes them")]
impl Blueprint {
    /// Pods in network namespaces, for a program that has entered its own.
    pub fn wired(mut self) -> Self {
        self.wired = true;
        self
    }

    /// Each pod's disk is a file system of so many bytes, for a program that has entered its own namespaces.
    pub fn disk_bytes(mut self, bytes: u64) -> Self {
        self.disk_bytes = Some(bytes);
        self
    }
}

/// See the module's head.
pub struct StatefulSet {
    control: Arc<Mutex<Control>>,
    controller: JoinHandle<()>,
    pub api: KubeApi,
    /// File systems of their own.
    mounts: Vec<PathBuf>,
    root: tempfile::TempDir,
}

impl StatefulSet {
    /// Of `replicas` pods, all ready and voting.
    pub async fn new(replicas: u64) -> Self {
        Self::blueprint(replicas).start().await
    }

    /// Not installed yet; with members that promote and replace soon, for tests are short.
    pub fn quick(replicas: u64) -> Blueprint {
        Self::blueprint(replicas).set("cluster.failure_timeout", "2s").set("cluster.promote_after", "100ms")
    }

    /// Not installed yet; with an API server that is asked often, and small segments.
    pub fn blueprint(replicas: u64) -> Blueprint {
        Self::as_shipped(replicas)
            .set("kubernetes.poll_interval", "300ms")
            .set("kubernetes.timeout", "1s")
            .set("log.segment_bytes", "8MiB")
    }

    /// Not installed yet; with the settings that people have.
    pub fn as_shipped(replicas: u64) -> Blueprint {
        let spec = Spec {
            replicas,
            start: 0,
            ordered: false,
            partition: 0,
            grace: Duration::from_secs(40),
            delete_when_scaled: false,
            dns_delay: Duration::ZERO,
        };
        let (settings, template) = Default::default();
        Blueprint { spec, settings, template, size: replicas, wired: false, disk_bytes: None }
    }

    fn install(blueprint: Blueprint) -> Self {
        let root = tempfile::Builder::new().prefix("quorate-it-").tempdir().unwrap();
        let net = match blueprint.wired {
            true => Net::Wires(Wires::new()),
            false => {
                let (a, b) = free_host();
                Net::Loopback(a, b)
            }
        };
        let address = format!("{}:6443", net.address(API_HOST)).parse().unwrap();
        let api = KubeApi::start(address, &root.path().join("serviceaccount"), NAMESPACE, NAME);
        std::fs::create_dir_all(root.path().join("config")).unwrap();
        std::fs::write(root.path().join("config/quorate.toml"), settings(&blueprint, &api)).unwrap();
        let env = api.environment().map(|(name, value)| (name.to_owned(), value)).to_vec();
        let control = Control::new(root.path(), net, env, blueprint.spec, blueprint.template);
        let mut mounts = Vec::new();
        if let Some(bytes) = blueprint.disk_bytes {
            mounts.extend(control.wanted().map(|ordinal| control.disk(ordinal)));
            for disk in &mounts {
                std::fs::create_dir_all(disk).unwrap();
                namespace::mount_small(disk, bytes);
            }
        }
        let control = Arc::new(Mutex::new(control));
        let (shared, show) = (control.clone(), api.shower());
        let controller = tokio::spawn(async move {
            loop {
                let object = {
                    let mut control = shared.lock().unwrap();
                    control.tick();
                    control.object()
                };
                show(object);
                tokio::time::sleep(TICK).await;
            }
        });
        Self { control, controller, api, mounts, root }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap()
    }

    /// `kubectl scale`: waits for nothing.
    pub fn scale(&self, replicas: u64) {
        let mut control = self.control();
        control.spec.replicas = replicas;
        // The API server knows before any pod does.
        let object = control.object();
        self.api.show(object);
    }

    pub fn wanted(&self) -> std::ops::Range<u64> {
        self.control().wanted()
    }

    /// Foreground deletion: the object shows its deletion timestamp, every pod gets SIGTERM. The disks are kept.
    pub fn uninstall(&self) {
        let mut control = self.control();
        control.uninstall();
        self.api.show(control.object());
    }

    pub fn reinstall(&self, replicas: u64) {
        self.control().install(replicas);
    }

    /// `kubectl delete pod`: SIGTERM, and then a new pod at a new address.
    pub fn delete_pod(&self, ordinal: u64) {
        self.control().delete(ordinal);
    }

    /// SIGKILL to the container; the kubelet starts it again.
    pub fn crash(&self, ordinal: u64) {
        self.control().signal(ordinal, Signal::KILL);
    }

    /// Sends a signal, such as `Signal::STOP`.
    pub fn signal(&self, ordinal: u64, signal: Signal) {
        self.control().signal(ordinal, signal);
    }

    /// The pod's node is gone, and no other has room for it.
    pub fn hold(&self, ordinal: u64) {
        self.control().hold(ordinal);
    }

    /// There is room again.
    pub fn release(&self, ordinal: u64) {
        self.control().release(ordinal);
    }

    /// Deletes the disk of a pod that does not exist.
    pub fn wipe(&self, ordinal: u64) {
        let control = self.control();
        assert_eq!(control.ip(ordinal), None, "{NAME}-{ordinal} exists");
        std::fs::remove_dir_all(control.disk(ordinal)).unwrap();
    }

    /// The same with another pod template: a rolling update begins.
    pub fn roll(&self, template: Template) {
        self.control().templates.push(template);
    }

    pub fn set_partition(&self, ordinal: u64) {
        self.control().spec.partition = ordinal;
    }

    /// How the containers of deleted pods have ended.
    pub fn ended(&self) -> Vec<Ended> {
        self.control().ended.clone()
    }

    /// The pods that exist.
    pub fn ordinals(&self) -> Vec<u64> {
        self.control().ordinals()
    }

    pub fn pid(&self, ordinal: u64) -> Option<u32> {
        self.control().pid(ordinal)
    }

    pub fn ip(&self, ordinal: u64) -> Option<String> {
        self.control().ip(ordinal)
    }

    pub fn disk(&self, ordinal: u64) -> PathBuf {
        self.control().disk(ordinal)
    }

    pub fn log_text(&self, ordinal: u64) -> String {
        std::fs::read_to_string(self.control().log_path(ordinal)).unwrap_or_default()
    }

    /// The addresses of ready pods, as the Service for clients has them.
    pub fn service(&self) -> impl Fn() -> Vec<String> + Send + Sync + Clone + 'static + use<> {
        let control = self.control.clone();
        move || control.lock().unwrap().ready_ips()
    }

    /// Writers and readers through the Service, until [`Load::finish`].
    pub fn load(&self) -> Load {
        Load::start(self.service())
    }

    /// Waits until exactly the wanted pods exist and all are ready and of the template that they should have.
    pub async fn wait_ready(&self) {
        wait_for("the StatefulSet to be rolled out", async || self.control().unfinished().map_or(Ok(()), Err)).await;
    }

    /// Waits until exactly these pods exist.
    pub async fn wait_pods(&self, ordinals: impl IntoIterator<Item = u64>) {
        let wanted: Vec<u64> = ordinals.into_iter().collect();
        wait_for(&format!("exactly the pods {wanted:?}"), async || {
            let found = self.ordinals();
            if found == wanted { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }

    fn channel(&self, ordinal: u64, port: u16) -> Channel {
        let ip = self.ip(ordinal).unwrap_or_else(|| "127.0.0.0".into());
        let endpoint = Endpoint::from_shared(format!("http://{ip}:{port}")).unwrap();
        endpoint.connect_timeout(Duration::from_secs(1)).timeout(Duration::from_secs(10)).connect_lazy()
    }

    pub fn kv(&self, ordinal: u64) -> KvClient<Channel> {
        KvClient::new(self.channel(ordinal, 2379)).max_decoding_message_size(usize::MAX)
    }

    pub async fn status(&self, ordinal: u64) -> Result<StatusResponse, Status> {
        Ok(MaintenanceClient::new(self.channel(ordinal, 2381)).status(StatusRequest {}).await?.into_inner())
    }

    pub async fn members(&self, ordinal: u64) -> Result<Vec<Member>, Status> {
        let request = MemberListRequest { linearizable: false };
        Ok(ClusterClient::new(self.channel(ordinal, 2379)).member_list(request).await?.into_inner().members)
    }

    /// All members as the pod knows them: member id, and whether it votes. Ascending.
    pub async fn membership(&self, ordinal: u64) -> Vec<(u64, bool)> {
        let what = format!("{NAME}-{ordinal} to list the members");
        let members = wait_for(&what, async || self.members(ordinal).await.map_err(|e| e.message().to_owned())).await;
        let mut found: Vec<(u64, bool)> = members.iter().map(|member| (member.id, !member.is_learner)).collect();
        found.sort_unstable();
        found
    }

    /// Cluster id and member id of the pod.
    pub async fn ids(&self, ordinal: u64) -> (u64, u64) {
        wait_for(&format!("{NAME}-{ordinal} to say its ids"), async || match self.status(ordinal).await {
            Ok(status) => status
                .header
                .map(|header| (header.cluster_id, header.member_id))
                .filter(|(cluster, member)| *cluster != 0 && *member != 0)
                .ok_or_else(|| "it says none".to_owned()),
            Err(status) => Err(status.message().to_owned()),
        })
        .await
    }

    /// Waits until exactly the pods of `ordinals` are members, all of them vote, and each says so. Returns the leader's ordinal.
    pub async fn wait_voters(&self, ordinals: impl IntoIterator<Item = u64>) -> u64 {
        let wanted: Vec<u64> = ordinals.into_iter().collect();
        self.wait_voters_seen_by(&wanted, &wanted).await
    }

    /// The same, as the pods of `seen_by` say.
    pub async fn wait_voters_seen_by(&self, seen_by: &[u64], wanted: &[u64]) -> u64 {
        let what = format!("exactly the pods {wanted:?} to be members, and to vote, as {seen_by:?} see it");
        wait_for(&what, async || {
            let mut leaders = Vec::new();
            for ordinal in seen_by {
                let error = |status: Status| format!("{NAME}-{ordinal}: {}", status.message());
                let status = self.status(*ordinal).await.map_err(error)?;
                let members = self.members(*ordinal).await.map_err(error)?;
                let mut voters: Vec<u64> = members.iter().filter(|m| !m.is_learner).map(|m| m.id & 0xffff).collect();
                voters.sort_unstable();
                if voters != wanted || members.len() != wanted.len() {
                    let notes = status.errors.join("; ");
                    return Err(format!("{NAME}-{ordinal} sees {members:x?}; {notes}"));
                }
                leaders.push(status.leader);
            }
            leaders.dedup();
            match leaders[..] {
                [leader] if leader != 0 => Ok(leader & 0xffff),
                _ => Err(format!("leaders {leaders:x?}")),
            }
        })
        .await
    }

    /// The ordinal that leads, as any ready pod knows it.
    pub async fn leader(&self) -> u64 {
        wait_for("a leader", async || {
            for ordinal in self.ordinals() {
                if let Ok(status) = self.status(ordinal).await
                    && status.leader != 0
                {
                    return Ok(status.leader & 0xffff);
                }
            }
            Err("none is known")
        })
        .await
    }

    /// Has the pod of `ordinal` lead.
    pub async fn move_leader(&self, ordinal: u64) {
        let target_id = self.ids(ordinal).await.1;
        wait_for(&format!("{NAME}-{ordinal} to lead"), async || {
            let leader = self.leader().await;
            if leader == ordinal {
                return Ok(());
            }
            let asked =
                MaintenanceClient::new(self.channel(leader, 2379)).move_leader(MoveLeaderRequest { target_id }).await;
            Err(format!("{NAME}-{leader} leads, and answers {asked:?}"))
        })
        .await;
    }

    /// Puts, again and again until it is acknowledged.
    pub async fn put(&self, ordinal: u64, key: &str, value: &str) -> i64 {
        wait_for(&format!("put {key} through {NAME}-{ordinal}"), async || {
            let put = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
            match self.kv(ordinal).put(put).await {
                Ok(answer) => Ok(answer.into_inner().header.unwrap().revision),
                Err(status) => Err(status.message().to_owned()),
            }
        })
        .await
    }

    /// The value, read linearizably; tried again while there is no leader.
    pub async fn get(&self, ordinal: u64, key: &str) -> Option<String> {
        wait_for(&format!("get {key} through {NAME}-{ordinal}"), async || {
            let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
            match self.kv(ordinal).range(range).await {
                Ok(answer) => {
                    let kvs = answer.into_inner().kvs;
                    Ok(kvs.first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
                }
                Err(status) if status.code() == Code::Unavailable => Err(status.message().to_owned()),
                Err(status) => panic!("get {key} through {NAME}-{ordinal}: {status}"),
            }
        })
        .await
    }

    /// Waits until the pod's `/readyz` gives a reason that holds all of `parts`.
    pub async fn wait_unready(&self, ordinal: u64, parts: &[&str]) -> String {
        self.wait_http(ordinal, "/readyz", 503, parts).await
    }

    /// Waits until a GET on the pod's status port is answered with `code` and a text that holds all of `parts`.
    pub async fn wait_http(&self, ordinal: u64, path: &str, code: u16, parts: &[&str]) -> String {
        wait_for(&format!("GET {path} of {NAME}-{ordinal} to answer {code} with {parts:?}"), async || {
            let ip = self.ip(ordinal).ok_or("there is no such pod")?;
            match http_get(&format!("{ip}:2381"), path).await {
                Ok((found, text)) if found == code && parts.iter().all(|part| text.contains(part)) => Ok(text),
                Ok((found, text)) => Err(format!("{found} {text}")),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Waits until what the pod's status says of itself holds all of `parts`.
    pub async fn wait_status(&self, ordinal: u64, parts: &[&str]) -> String {
        wait_for(&format!("the status of {NAME}-{ordinal} to say {parts:?}"), async || {
            let status = self.status(ordinal).await.map_err(|status| status.message().to_owned())?;
            let text = status.errors.join("; ");
            if parts.iter().all(|part| text.contains(part)) { Ok(text) } else { Err(text) }
        })
        .await
    }

    /// Waits until the pod has logged all of `parts` in one line; returns the first such line.
    pub async fn wait_logged(&self, ordinal: u64, parts: &[&str]) -> String {
        wait_for(&format!("{NAME}-{ordinal} to log {parts:?}"), async || {
            let text = self.log_text(ordinal);
            let line = text.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            line.map(str::to_owned).ok_or("it has not")
        })
        .await
    }

    /// Runs the project's own client against one pod; returns what it printed.
    pub async fn client(&self, ordinal: u64, args: &[&str]) -> String {
        let endpoint = format!("{}:2379", self.ip(ordinal).unwrap());
        let mut command = tokio::process::Command::new(binary());
        let output = command.args(args).args(["--endpoints", &endpoint]).output().await.unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }
}

/// Faults, and what their victims' clients need.
#[allow(dead_code, reason = "of the programs that share this, only the nemesis makes them")]
impl StatefulSet {
    /// What one pod sends to another does not arrive any more. Wired sets only.
    pub fn cut(&self, from: u64, to: u64, cut: Cut) {
        self.control().cut(from, to, cut);
    }

    /// All pods reach one another again.
    pub fn mend(&self) {
        self.control().mend();
    }

    /// A fault of the pod's disk, to happen once: see `quorate::env::faulty`.
    pub fn fail_disk(&self, ordinal: u64, fault: &str) {
        self.control().fail_disk(ordinal, fault);
    }

    /// A pod's address, whenever it is asked for.
    pub fn addresses(&self) -> impl Fn(u64) -> Option<String> + Send + Sync + Clone + 'static + use<> {
        let control = self.control.clone();
        move |ordinal| control.lock().unwrap().ip(ordinal)
    }
}

impl Drop for StatefulSet {
    fn drop(&mut self) {
        self.controller.abort();
        self.mounts.iter().for_each(|disk| namespace::unmount(disk));
        if std::thread::panicking() {
            for ordinal in 0..32 {
                let text = std::fs::read_to_string(self.root.path().join(format!("{NAME}-{ordinal}.log")));
                let text = text.unwrap_or_default();
                let lines: Vec<&str> = text.lines().filter(|line| !line.contains("openraft")).collect();
                if !lines.is_empty() {
                    println!("--- {NAME}-{ordinal}\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
                }
            }
        }
    }
}

/// The ConfigMap: what the chart writes, and what a test changes; small log files and a short poll, for tests are short.
fn settings(blueprint: &Blueprint, api: &KubeApi) -> String {
    let own = blueprint.spec.grace.mul_f64(0.75).as_millis();
    let fixed = [
        ("cluster.peers", format!("{NAME}-%d.{NAME}-headless.{NAMESPACE}.svc:2380")),
        ("cluster.size", blueprint.size.to_string()),
        ("cluster.first_slot", blueprint.spec.start.to_string()),
        ("server.grace_period", format!("{own}ms")),
        ("kubernetes.stateful_set", NAME.to_owned()),
        ("kubernetes.service_account_dir", api.service_account_dir().display().to_string()),
    ];
    let mut merged: std::collections::BTreeMap<String, String> =
        fixed.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    merged.extend(blueprint.settings.iter().cloned());
    merged
        .iter()
        .map(|(key, value)| match value.parse::<i64>() {
            Ok(number) => format!("{key} = {number}\n"),
            Err(_) => format!("{key} = {value:?}\n"),
        })
        .collect()
}
