//! `quorate dev`: a cluster of real server processes on this machine, for trying things out.
//!
//! Owns the processes: each pod is this same binary with `serve`, its own data directory and log file, found through the same
//! pattern and formation code as on Kubernetes. A pod that dies is started again on its disk.
//! Absent: anything that `serve` does not do itself.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{STATUS_PORT_OFFSET, units};
use crate::env::{Env, Instant, interval, sleep, timeout};
use crate::identity::host_port;
use crate::pb::etcd::StatusRequest;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::secure;
use crate::secure::mint::{self, Issuer, Made, Subject, Use};

/// A pod that has not ended so long after SIGTERM is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Of the certificates that are made for a cluster.
const LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Start a cluster on this machine to try things out.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Pods to start; 1 to 9
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    replicas: u16,
    /// Keep the data here; without it, a temporary directory that is removed at the end
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Kill a random pod with SIGKILL this often, to watch the cluster survive it (such as 5s)
    #[arg(long, value_parser = units::duration::parse)]
    kill_one_every: Option<Duration>,
    /// Client port of pod 0; the others follow in steps of --port-step
    #[arg(long, default_value_t = 2379)]
    client_port: u16,
    /// Distance between the client ports of two pods; the default gives 2379, 22379, 32379 as etcd's own examples do
    #[arg(long)]
    port_step: Option<u16>,
    /// Address on which pods listen for clients; %d is the pod's ordinal, as in 127.0.0.%d
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Peer addresses; %d is the pod's ordinal [default: port 2380%d of --host, or 2380 where that has a %d itself]
    #[arg(long)]
    peers: Option<String>,
    /// With TLS on all ports and certificates made for it; what clients need is printed
    #[arg(long)]
    tls: bool,
}

impl Args {
    /// Addresses of their own for pods of another host, so that one dev can run beside another.
    fn peers(&self) -> String {
        match &self.peers {
            Some(peers) => peers.clone(),
            None if self.host.contains("%d") => format!("{}:2380", self.host),
            None => format!("{}:2380%d", self.host),
        }
    }

    fn client_port(&self, pod: u16) -> Result<u16, anyhow::Error> {
        let offset = match (self.port_step, pod) {
            (_, 0) => 0,
            (Some(step), pod) => u32::from(step) * u32::from(pod),
            // 2379, 22379, 32379, 42379, 52379; a sixth pod would not fit and follows in between.
            (None, pod) if pod < 5 => 10_000 * (u32::from(pod) + 1),
            (None, pod) => 100 * u32::from(pod),
        };
        u16::try_from(u32::from(self.client_port) + offset).map_err(|_| {
            anyhow::anyhow!(
                "client port of pod {pod}: {} is over 65535; choose a smaller --port-step",
                self.client_port
            )
        })
    }
}

impl Args {
    /// Above the client port where that is free, as servers have it by themselves: 2381, 22381, 32381. Where the client ports of the
    /// next pods lie there, between or behind them.
    fn status_port(&self, pod: u16) -> Result<u16, anyhow::Error> {
        let above = match self.port_step {
            Some(1) => self.replicas,
            Some(2) => 1,
            _ => STATUS_PORT_OFFSET,
        };
        let port = self.client_port(pod)?.checked_add(above);
        port.ok_or_else(|| {
            anyhow::anyhow!("status port of pod {pod}: it is over 65535; choose a smaller --client-port")
        })
    }
}

struct Pod {
    name: String,
    slot: u16,
    /// `host:port` for clients.
    endpoint: String,
    /// `host:port` of the status page, which is there before the cluster is.
    status: String,
    log: PathBuf,
    child: Option<Child>,
    down_since: Option<Instant>,
}

struct Dev {
    args: Args,
    root: PathBuf,
    /// Where the certificates are, with --tls.
    tls: Option<PathBuf>,
    pods: Vec<Pod>,
}

/// Runs until Ctrl-C or SIGTERM.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let temporary = match &args.data_dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("quorate-dev-").tempdir().context("temporary data directory")?),
    };
    let root = match (&args.data_dir, &temporary) {
        (Some(dir), _) => dir.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of both is given"),
    };
    let env = Env::real();
    env.disk.create_dir_all(&root).with_context(|| format!("data directory {}", root.display()))?;
    let mut dev = Dev { pods: Vec::new(), tls: args.tls.then(|| root.join("tls")), root, args };
    for slot in 0..dev.args.replicas {
        let name = format!("quorate-{slot}");
        let host = dev.args.host.replace("%d", &slot.to_string());
        let endpoint = format!("{host}:{}", dev.args.client_port(slot)?);
        let status = format!("{host}:{}", dev.args.status_port(slot)?);
        let log = dev.root.join(format!("{name}.log"));
        dev.pods.push(Pod { name, slot, endpoint, status, log, child: None, down_since: None });
    }
    if let Some(dir) = &dev.tls {
        dev.make_certificates(dir)?;
    }
    let stop = Stop::new()?;
    for pod in 0..dev.pods.len() {
        dev.start(pod)?;
    }
    dev.greet();
    let result = dev.watch(&env, stop).await;
    println!("stopping all pods ...");
    dev.stop().await;
    match temporary {
        Some(temporary) => temporary.close().context("remove the temporary data directory")?,
        None => println!("the data stays in {}", dev.root.display()),
    }
    result
}

/// What ends it. Heard from before the first word is printed, so that no pod is left behind by whoever is quick.
struct Stop {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let heard = |kind: SignalKind| signal(kind).context("cannot hear signals");
        Ok(Self {
            interrupt: heard(SignalKind::interrupt())?,
            terminate: heard(SignalKind::terminate())?,
            hangup: heard(SignalKind::hangup())?,
        })
    }
}

impl Dev {
    fn endpoints(&self) -> String {
        let scheme = if self.tls.is_some() { "https://" } else { "" };
        self.pods.iter().map(|pod| format!("{scheme}{}", pod.endpoint)).collect::<Vec<_>>().join(",")
    }

    /// A CA for clients and one for members, a certificate for the pods of each, and one for the user. With a data directory that is
    /// kept they are, too.
    fn make_certificates(&self, dir: &Path) -> anyhow::Result<()> {
        let peers = self.pods.iter().map(|pod| self.args.peers().replace("%d", &pod.slot.to_string()));
        let hosts = |addresses: Vec<String>| {
            let host = |address: &String| Some(host_port(address)?.0.trim_matches(['[', ']']).to_owned());
            let mut hosts: Vec<String> = addresses.iter().filter_map(host).chain(["localhost".to_owned()]).collect();
            hosts.sort();
            hosts.dedup();
            hosts
        };
        let own = hosts(self.pods.iter().map(|pod| pod.endpoint.clone()).collect());
        let made = [
            ("clients", "server", Use::Server, own),
            ("clients", "client", Use::Client, Vec::new()),
            ("peers", "member", Use::Peer, hosts(peers.collect())),
        ];
        for (ca, name, usage, hosts) in made {
            let issuer = self.certificate(&dir.join(ca), || mint::ca(&format!("quorate dev, {ca}"), LIFE))?;
            let subject = Subject { common_name: "root".into(), hosts, uris: Vec::new(), usage };
            let issuer = Issuer::read(issuer.certificate.as_bytes(), issuer.key.as_bytes())?;
            self.certificate(&dir.join(name), || issuer.leaf(&subject, LIFE))?;
        }
        Ok(())
    }

    /// `<path>.crt` and `<path>.key`, made if they are not there.
    fn certificate(&self, path: &Path, make: impl Fn() -> Result<Made, secure::Error>) -> anyhow::Result<Made> {
        let (certificate, key) = (path.with_extension("crt"), path.with_extension("key"));
        if let (Ok(certificate), Ok(key)) = (std::fs::read_to_string(&certificate), std::fs::read_to_string(&key)) {
            return Ok(Made { certificate, key });
        }
        let made = make()?;
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(&key, &made.key).with_context(|| format!("{}", key.display()))?;
        std::fs::write(&certificate, &made.certificate).with_context(|| format!("{}", certificate.display()))?;
        Ok(made)
    }

    fn greet(&self) {
        println!("data and logs:  {}", self.root.display());
        println!("endpoints:      {}", self.endpoints());
        for (head, pod) in std::iter::once("status pages:").chain(std::iter::repeat("")).zip(&self.pods) {
            println!("{head:16}http://{}/  ({})", pod.status, pod.name);
        }
        let mut flags = format!("--endpoints={}", self.endpoints());
        if let Some(dir) = &self.tls {
            let files = [("cacert", "clients.crt"), ("cert", "client.crt"), ("key", "client.key")];
            let files = files.map(|(flag, name)| (flag, dir.join(name)));
            for (head, (name, path)) in ["TLS:", "", ""].into_iter().zip(&files) {
                println!("{head:16}export QUORATE_{}={}", name.to_uppercase(), path.display());
            }
            flags.extend(files.map(|(flag, path)| format!(" --{flag}={}", path.display())));
        }
        println!("try:            quorate put greeting hello && quorate get greeting");
        println!("                etcdctl {flags} endpoint status -w table");
        println!("(quorate is {}; Ctrl-C stops everything)", own_binary(Path::new("quorate")).display());
    }

    fn start(&mut self, pod: usize) -> anyhow::Result<()> {
        let pod = &mut self.pods[pod];
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&pod.log)
            .with_context(|| format!("log file {}", pod.log.display()))?;
        let address = self.args.peers().replace("%d", &pod.slot.to_string());
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut command = Command::new(own_binary(Path::new("/proc/self/exe")));
        command
            .arg("serve")
            .args(["--name", &pod.name])
            .args(["--peers", &self.args.peers()])
            .args(["--size", &self.args.replicas.to_string()])
            .args(["--listen-peer", &address])
            .args(["--listen-client", &pod.endpoint])
            .args(["--listen-status", &pod.status])
            .args(tls_settings(self.tls.as_deref()))
            .args(["--advertise-client", &format!("{scheme}://{}", pod.endpoint)])
            // All pods are stopped together: none need wait for the others.
            .args(["--set", "server.quorum_wait=0s"])
            // They share the machine's cores: more threads would only pass work around.
            .args(["--set", &format!("server.worker_threads={}", threads(self.args.replicas))])
            .arg("--data-dir")
            .arg(self.root.join(&pod.name))
            // A dev that is itself killed leaves no pods behind.
            .env(super::DIE_WITH_PARENT, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            // Ctrl-C in a terminal goes to the whole group; pods are stopped by us, in order.
            .process_group(0);
        pod.child = Some(command.spawn().with_context(|| format!("start {}", pod.name))?);
        pod.down_since = None;
        Ok(())
    }

    /// Watches the pods until a signal: says who leads, restarts who died.
    async fn watch(&mut self, env: &Env, mut stop: Stop) -> anyhow::Result<()> {
        let mut look = interval(Duration::from_millis(500));
        let mut leader = None;
        let mut next_kill = self.args.kill_one_every.map(|every| Instant::now() + every);
        let started = Instant::now();
        loop {
            tokio::select! {
                _ = stop.interrupt.recv() => return Ok(()),
                _ = stop.terminate.recv() => return Ok(()),
                _ = stop.hangup.recv() => return Ok(()),
                _ = look.tick() => {}
            }
            self.revive(started)?;
            if next_kill.is_some_and(|at| Instant::now() >= at) {
                self.kill_one(env);
                next_kill = self.args.kill_one_every.map(|every| Instant::now() + every);
            }
            let now = self.leader().await;
            if now != leader && now.is_some() {
                let (name, term) = now.clone().unwrap_or_default();
                println!("{name} leads (term {term})");
            }
            if now.is_some() {
                leader = now;
            }
        }
    }

    /// Starts pods again that have died; fails if one cannot even start.
    fn revive(&mut self, started: Instant) -> anyhow::Result<()> {
        for i in 0..self.pods.len() {
            let pod = &mut self.pods[i];
            if let Some(child) = &mut pod.child
                && let Some(status) = child.try_wait()?
            {
                pod.child = None;
                pod.down_since = Some(Instant::now());
                if status.code().is_some() && started.elapsed() < Duration::from_secs(2) {
                    let log = std::fs::read_to_string(&pod.log).unwrap_or_default();
                    let last: Vec<&str> = log.lines().rev().take(3).collect();
                    bail!(
                        "{} did not start ({status}): {}",
                        pod.name,
                        last.into_iter().rev().collect::<Vec<_>>().join(" / ")
                    );
                }
                println!("{} has died ({status}); starting it again on its disk", pod.name);
            }
            if self.pods[i].down_since.is_some_and(|since| since.elapsed() >= RESTART_AFTER) {
                self.start(i)?;
            }
        }
        Ok(())
    }

    fn kill_one(&mut self, env: &Env) {
        let alive: Vec<usize> = (0..self.pods.len()).filter(|i| self.pods[*i].child.is_some()).collect();
        if alive.is_empty() {
            return;
        }
        let victim = alive[(env.random_u64() % alive.len() as u64) as usize];
        let pod = &mut self.pods[victim];
        println!("killing {} with SIGKILL", pod.name);
        if let Some(child) = &mut pod.child {
            // It may have died by itself just now; then `revive` says so.
            let _ = child.start_kill();
        }
    }

    /// Name and term of the pod that leads, as the first pod that answers knows it.
    async fn leader(&self) -> Option<(String, u64)> {
        for pod in &self.pods {
            let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", pod.status)).ok()?;
            let asking = async {
                let mut client = MaintenanceClient::connect(endpoint).await.ok()?;
                Some(client.status(StatusRequest {}).await.ok()?.into_inner())
            };
            if let Ok(Some(status)) = timeout(Duration::from_millis(300), asking).await
                && status.leader != 0
            {
                let slot = crate::identity::slot_of(status.leader);
                return Some((format!("quorate-{slot}"), status.raft_term));
            }
        }
        None
    }

    async fn stop(&mut self) {
        for child in self.pods.iter().filter_map(|p| p.child.as_ref()) {
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for pod in &mut self.pods {
            if let Some(mut child) = pod.child.take()
                && timeout(STOP_PATIENCE, child.wait()).await.is_err()
            {
                println!("{} did not stop within {STOP_PATIENCE:?}; killing it", pod.name);
                let _ = child.kill().await;
            }
        }
        sleep(Duration::ZERO).await;
    }
}

/// Clients must show certificates, as members must.
fn tls_settings(dir: Option<&Path>) -> Vec<String> {
    let Some(dir) = dir else { return Vec::new() };
    let of = |section: &str, leaf: &str, ca: &str| {
        let file = |key: &str, name: String| format!("{section}.{key}_file={}", dir.join(name).display());
        let files =
            [file("cert", format!("{leaf}.crt")), file("key", format!("{leaf}.key")), file("ca", format!("{ca}.crt"))];
        [format!("{section}.mode=files")].into_iter().chain(files).collect::<Vec<_>>()
    };
    let settings = [of("client_tls", "server", "clients"), of("peer_tls", "member", "peers")].concat();
    let settings = settings.into_iter().chain(["client_tls.client_cert=required".to_owned()]);
    settings.flat_map(|setting| ["--set".to_owned(), setting]).collect()
}

/// Of each pod's event loop.
fn threads(pods: u16) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores / usize::from(pods)).max(1)
}

/// The path of the running binary.
fn own_binary(otherwise: &Path) -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| otherwise.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn peers_are_on_the_host_of_the_clients_port() {
        for (line, expected) in [
            ("x", "127.0.0.1:2380%d"),
            ("x --host 127.0.0.2", "127.0.0.2:2380%d"),
            ("x --host 127.0.%d.9", "127.0.%d.9:2380"),
            ("x --host 127.0.0.2 --peers 127.0.0.3:7%d", "127.0.0.3:7%d"),
        ] {
            assert_eq!(Line::try_parse_from(line.split(' ')).unwrap().args.peers(), expected, "{line}");
        }
    }
}
