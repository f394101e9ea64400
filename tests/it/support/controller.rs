//! What Kubernetes does with the pods of one StatefulSet: its controller, the kubelet, and the DNS of the headless Service.
//!
//! Owns the processes. [`Control::tick`] is one round of all three: containers that ended start again, pods are made and deleted
//! as the spec and its policies say, names follow the pods that exist. Every pod has an address of its own, which no earlier pod had.
//! Absent: scheduling by resources, and what a test asks of the servers (`statefulset`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorate::env::faulty;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::cluster::{binary, http_get};
use super::namespace::{Cut, Wires};

pub const NAME: &str = "kv";
pub const NAMESPACE: &str = "test";
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
/// The kubelet's growing delay between restarts of a container, quickened.
const RESTART_DELAY: Duration = Duration::from_millis(300);

/// The part of a StatefulSet's spec that is played.
#[derive(Clone, Debug)]
pub struct Spec {
    pub replicas: u64,
    pub start: u64,
    /// `OrderedReady`; else `Parallel`.
    pub ordered: bool,
    /// Pods below this ordinal keep their revision.
    pub partition: u64,
    pub grace: Duration,
    /// Whether the claims of pods that were scaled away go with them.
    pub delete_when_scaled: bool,
    /// Between a pod's start and its name in the DNS.
    pub dns_delay: Duration,
}

/// A pod template: an environment, and whether its image is one that does not run.
#[derive(Clone, Debug, Default)]
pub struct Template {
    pub env: Vec<(String, String)>,
    pub broken: bool,
}

/// Where pods have their addresses.
pub enum Net {
    /// On the loopback interface, 127.A.n.B: whatever happens, they reach one another.
    Loopback(u8, u8),
    /// In a network namespace each.
    Wires(Wires),
}

impl Net {
    pub fn address(&self, n: u8) -> String {
        match self {
            Self::Loopback(a, b) => format!("127.{a}.{n}.{b}"),
            Self::Wires(_) => Wires::address(n),
        }
    }

    fn attach(&self, pod: &str, address: &str) {
        if let Self::Wires(wires) = self {
            wires.attach(pod, address);
        }
    }

    fn command(&self, pod: &str, program: &Path) -> Command {
        match self {
            Self::Loopback(..) => Command::new(program),
            Self::Wires(wires) => wires.command(pod, program),
        }
    }
}

/// How a container ended after its pod was deleted.
#[derive(Clone, Debug)]
pub struct Ended {
    pub ordinal: u64,
    pub status: ExitStatus,
    pub took: Duration,
}

impl Ended {
    /// The grace period was over.
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(9)
    }
}

struct Pod {
    ip: String,
    revision: usize,
    container: Option<Child>,
    restarts: u32,
    restart_at: Instant,
    named_at: Instant,
    /// When it was deleted, and when its grace period is over.
    deleted: Option<(Instant, Instant)>,
    ready: Arc<AtomicBool>,
    probe: JoinHandle<()>,
}

impl Pod {
    fn is_ready(&self) -> bool {
        self.deleted.is_none() && self.container.is_some() && self.ready.load(Ordering::Relaxed)
    }

    fn signal(&self, signal: Signal) {
        if let Some(container) = &self.container {
            let _ = kill_process(Pid::from_raw(container.id() as i32).unwrap(), signal);
        }
    }
}

/// See the module's head.
pub struct Control {
    root: PathBuf,
    net: Net,
    /// What every container finds in its environment.
    env: Vec<(String, String)>,
    pub spec: Spec,
    pub templates: Vec<Template>,
    /// The template that pods below the partition have.
    current: usize,
    uninstalled: bool,
    uid: u64,
    pods: BTreeMap<u64, Pod>,
    /// Ordinals that no node has room for.
    held: BTreeSet<u64>,
    next_ip: u8,
    pub ended: Vec<Ended>,
    hosts: String,
}

impl Control {
    pub fn new(root: &Path, net: Net, env: Vec<(String, String)>, spec: Spec, template: Template) -> Self {
        let (pods, held, ended, hosts) = Default::default();
        let root = root.to_owned();
        let templates = vec![template];
        Self {
            root,
            net,
            env,
            spec,
            templates,
            current: 0,
            uninstalled: false,
            uid: 1,
            pods,
            held,
            next_ip: 1,
            ended,
            hosts,
        }
    }

    pub fn hosts_file(root: &Path) -> PathBuf {
        root.join("hosts")
    }

    pub fn disk(&self, ordinal: u64) -> PathBuf {
        self.root.join("disks").join(format!("{NAME}-{ordinal}"))
    }

    pub fn log_path(&self, ordinal: u64) -> PathBuf {
        self.root.join(format!("{NAME}-{ordinal}.log"))
    }

    /// The ordinals that the spec wants.
    pub fn wanted(&self) -> Range<u64> {
        if self.uninstalled { 0..0 } else { self.spec.start..self.spec.start + self.spec.replicas }
    }

    pub fn uninstall(&mut self) {
        self.uninstalled = true;
    }

    pub fn install(&mut self, replicas: u64) {
        (self.uninstalled, self.spec.replicas) = (false, replicas);
        self.uid += 1;
    }

    pub fn ordinals(&self) -> Vec<u64> {
        self.pods.keys().copied().collect()
    }

    pub fn ip(&self, ordinal: u64) -> Option<String> {
        self.pods.get(&ordinal).map(|pod| pod.ip.clone())
    }

    /// The addresses behind the Service for clients.
    pub fn ready_ips(&self) -> Vec<String> {
        self.pods.values().filter(|pod| pod.is_ready()).map(|pod| pod.ip.clone()).collect()
    }

    pub fn pid(&self, ordinal: u64) -> Option<u32> {
        self.pods.get(&ordinal)?.container.as_ref().map(Child::id)
    }

    /// `None` once exactly the wanted pods exist, all ready and of the right template; else what is missing.
    pub fn unfinished(&self) -> Option<String> {
        if !self.pods.keys().copied().eq(self.wanted()) {
            return Some(format!("pods {:?} exist, {:?} are wanted", self.ordinals(), self.wanted()));
        }
        let late = |(ordinal, pod): (&u64, &Pod)| {
            (!pod.is_ready() || pod.revision != self.template_of(*ordinal))
                .then(|| format!("{NAME}-{ordinal} is not ready"))
        };
        self.pods.iter().find_map(late)
    }

    /// No node takes this pod from now on, and the node that has it is lost.
    pub fn hold(&mut self, ordinal: u64) {
        self.held.insert(ordinal);
        self.lose(ordinal);
    }

    pub fn release(&mut self, ordinal: u64) {
        self.held.remove(&ordinal);
    }

    /// The pod is gone at once, with its node; its disk stays.
    pub fn lose(&mut self, ordinal: u64) {
        if let Some(mut pod) = self.pods.remove(&ordinal) {
            pod.probe.abort();
            if let Some(mut container) = pod.container.take() {
                let _ = container.kill();
                container.wait().unwrap();
            }
        }
    }

    pub fn signal(&self, ordinal: u64, signal: Signal) {
        self.pods[&ordinal].signal(signal);
    }

    /// SIGTERM, and after the grace period SIGKILL.
    pub fn delete(&mut self, ordinal: u64) {
        let grace = self.spec.grace;
        if let Some(pod) = self.pods.get_mut(&ordinal).filter(|pod| pod.deleted.is_none()) {
            pod.deleted = Some((Instant::now(), Instant::now() + grace));
            pod.signal(Signal::TERM);
        }
    }

    /// One round of the kubelet, the controller and the DNS.
    pub fn tick(&mut self) {
        self.kubelet();
        self.reconcile();
        self.publish();
    }

    fn kubelet(&mut self) {
        let now = Instant::now();
        for ordinal in self.ordinals() {
            let pod = self.pods.get_mut(&ordinal).unwrap();
            let exited = match &mut pod.container {
                Some(container) => container.try_wait().unwrap(),
                None => None,
            };
            if let Some(status) = exited {
                (pod.container, pod.restarts) = (None, pod.restarts + 1);
                pod.restart_at = now + RESTART_DELAY * pod.restarts.min(10);
                pod.ready.store(false, Ordering::Relaxed);
                if let Some((since, _)) = pod.deleted {
                    self.ended.push(Ended { ordinal, status, took: now - since });
                }
            }
            match (pod.deleted, pod.container.is_some()) {
                (Some(_), false) => self.gone(ordinal),
                (Some((_, end)), true) if now >= end => pod.signal(Signal::KILL),
                (None, false) if now >= pod.restart_at => self.start_container(ordinal),
                _ => {}
            }
        }
    }

    fn gone(&mut self, ordinal: u64) {
        self.pods.remove(&ordinal).unwrap().probe.abort();
        if self.spec.delete_when_scaled && !self.uninstalled && !self.wanted().contains(&ordinal) {
            std::fs::remove_dir_all(self.disk(ordinal)).unwrap();
        }
    }

    fn reconcile(&mut self) {
        let wanted = self.wanted();
        let condemned: Vec<u64> = self.pods.keys().copied().filter(|ordinal| !wanted.contains(ordinal)).collect();
        if self.spec.ordered && !self.uninstalled {
            for ordinal in wanted.clone() {
                match self.pods.get(&ordinal) {
                    None => return self.create(ordinal),
                    Some(pod) if !pod.is_ready() => return,
                    Some(_) => {}
                }
            }
            if let Some(last) = condemned.last() {
                return self.delete(*last);
            }
        } else {
            for ordinal in wanted.clone().filter(|ordinal| !self.pods.contains_key(ordinal)).collect::<Vec<_>>() {
                self.create(ordinal);
            }
            for ordinal in condemned {
                self.delete(ordinal);
            }
        }
        self.roll();
    }

    /// The rolling update: from the highest ordinal down, one at a time, each after the one before is ready again.
    fn roll(&mut self) {
        let latest = self.templates.len() - 1;
        for ordinal in self.wanted().rev().filter(|ordinal| *ordinal >= self.spec.partition) {
            let Some(pod) = self.pods.get(&ordinal) else { return };
            if pod.revision != latest {
                return self.delete(ordinal);
            }
            if !pod.is_ready() {
                return;
            }
        }
        if self.spec.partition == 0 {
            self.current = latest;
        }
    }

    fn template_of(&self, ordinal: u64) -> usize {
        if ordinal >= self.spec.partition { self.templates.len() - 1 } else { self.current }
    }

    fn create(&mut self, ordinal: u64) {
        if self.held.contains(&ordinal) {
            return;
        }
        let ip = self.net.address(self.next_ip);
        self.net.attach(&pod_name(ordinal), &ip);
        self.next_ip = self.next_ip % 240 + 1;
        let (now, ready) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let pod = Pod {
            probe: tokio::spawn(probe(ip.clone(), ready.clone())),
            ip,
            revision: self.template_of(ordinal),
            container: None,
            restarts: 0,
            restart_at: now,
            named_at: now + self.spec.dns_delay,
            deleted: None,
            ready,
        };
        self.pods.insert(ordinal, pod);
        self.publish();
        self.start_container(ordinal);
    }

    fn start_container(&mut self, ordinal: u64) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(ordinal)).unwrap();
        let disk = self.disk(ordinal);
        std::fs::create_dir_all(&disk).unwrap();
        let pod = self.pods.get_mut(&ordinal).unwrap();
        let template = &self.templates[pod.revision];
        let program = if template.broken { "/bin/false".into() } else { binary() };
        let mut command = self.net.command(&pod_name(ordinal), &program);
        command
            .args(["serve", "--config"])
            .arg(self.root.join("config/quorate.toml"))
            .env_clear()
            .envs(self.env.iter().chain(&template.env).map(|(name, value)| (name, value)))
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("POD_NAME", pod_name(ordinal))
            .env("POD_NAMESPACE", NAMESPACE)
            .env("QUORATE_SERVER__LISTEN_CLIENT", format!("{}:2379", pod.ip))
            .env("QUORATE_SERVER__LISTEN_PEER", format!("{}:2380", pod.ip))
            .env("QUORATE_SERVER__DATA_DIR", disk.join("data"))
            .env("QUORATE_TEST_HOSTS", Self::hosts_file(&self.root))
            .env(faulty::VARIABLE, self.root.join(format!("{NAME}-{ordinal}.fault")))
            .env("QUORATE_DIE_WITH_PARENT", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        pod.container = Some(command.spawn().unwrap());
    }

    /// The names of the pods, ready or not (`publishNotReadyAddresses`), and of the headless Service.
    fn publish(&mut self) {
        let (now, headless) = (Instant::now(), format!("{NAME}-headless.{NAMESPACE}.svc"));
        let named = self.pods.iter().filter(|(_, pod)| now >= pod.named_at);
        let lines =
            named.map(|(ordinal, pod)| format!("{ip} {NAME}-{ordinal}.{headless}\n{ip} {headless}\n", ip = pod.ip));
        let text: String = lines.collect();
        if text != self.hosts {
            let path = Self::hosts_file(&self.root);
            std::fs::write(path.with_extension("new"), &text).unwrap();
            std::fs::rename(path.with_extension("new"), path).unwrap();
            self.hosts = text;
        }
    }

    /// The object as the API server shows it.
    pub fn object(&self) -> Value {
        let spec = &self.spec;
        let mut metadata = json!({"name": NAME, "namespace": NAMESPACE, "uid": format!("uid-{}", self.uid)});
        if self.uninstalled {
            metadata["deletionTimestamp"] = "2026-11-25T10:00:00Z".into();
        }
        let labels = json!({"app": NAME});
        json!({
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": metadata,
            "spec": {
                "replicas": spec.replicas,
                "ordinals": {"start": spec.start},
                "serviceName": format!("{NAME}-headless"),
                "podManagementPolicy": if spec.ordered { "OrderedReady" } else { "Parallel" },
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": []}},
            },
            "status": {
                "replicas": self.pods.len(),
                "readyReplicas": self.pods.values().filter(|pod| pod.is_ready()).count(),
            },
        })
    }
}

/// Faults.
#[allow(dead_code, reason = "of the programs that share this, only the nemesis makes them")]
impl Control {
    /// What pod `from` sends does not reach pod `to` any more. Pods on wires only.
    pub fn cut(&self, from: u64, to: u64, cut: Cut) {
        let (Net::Wires(wires), Some(pod)) = (&self.net, self.pods.get(&from)) else { return };
        wires.cut(&pod_name(to), &pod.ip, cut);
    }

    /// All pods reach one another again.
    pub fn mend(&self) {
        if let Net::Wires(wires) = &self.net {
            self.pods.keys().for_each(|ordinal| wires.mend(&pod_name(*ordinal)));
        }
    }

    /// A fault of the pod's disk, to happen once: see `quorate::env::faulty`.
    pub fn fail_disk(&self, ordinal: u64, fault: &str) {
        let path = self.root.join(format!("{NAME}-{ordinal}.fault"));
        std::fs::write(path.with_extension("new"), fault).unwrap();
        std::fs::rename(path.with_extension("new"), path).unwrap();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        for ordinal in self.ordinals() {
            self.lose(ordinal);
        }
    }
}

fn pod_name(ordinal: u64) -> String {
    format!("{NAME}-{ordinal}")
}

/// The kubelet's readiness probe, as the chart has it.
async fn probe(ip: String, ready: Arc<AtomicBool>) {
    let endpoint = format!("{ip}:2381");
    loop {
        let asked = tokio::time::timeout(Duration::from_secs(1), http_get(&endpoint, "/readyz")).await;
        ready.store(matches!(asked, Ok(Ok((200, _)))), Ordering::Relaxed);
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}
