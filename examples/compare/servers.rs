//! Members of one cluster as processes on this machine, on its disk: ours or etcd's, started alike.
//!
//! Owns the processes and their directories; both are gone when it is dropped. Invariant: every setting is the program's default, except for
//! addresses, names and directories, and what a caller sets for ours by name. Absent: load; and any knowledge of what is measured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use quorate::pb::etcd::cluster_client::ClusterClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::{CompactionRequest, MemberListRequest, RangeRequest, StatusRequest, StatusResponse};
use tonic::transport::{Channel, Endpoint};

use crate::support::cluster::{free_host, http_get};

/// Longest wait for a cluster to come up, or a member to catch up.
pub const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// What is measured: a name for the tables, and what to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    pub name: String,
    pub path: PathBuf,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Quorate,
    Etcd,
}

/// What was allocated, freed or not; a reallocation counts as one.
pub struct Allocated {
    pub count: f64,
    pub bytes: f64,
}

/// A cluster of slots `0..size`; others may be started beside.
pub struct Servers {
    pub program: Program,
    pub size: u64,
    root: tempfile::TempDir,
    /// Member `slot` has the address `127.a.slot.b`.
    host: (u8, u8),
    settings: Vec<String>,
    children: BTreeMap<u64, Child>,
}

impl Servers {
    /// A cluster that has formed: every member knows all as voters, and answers a linearizable read.
    pub async fn start(program: &Program, size: u64, data_dir: &Path) -> anyhow::Result<Self> {
        let root = tempfile::Builder::new().prefix("compare-").tempdir_in(data_dir)?;
        let (program, host) = (program.clone(), free_host());
        let mut servers = Self { program, size, root, host, settings: Vec::new(), children: BTreeMap::new() };
        servers.start_all()?;
        servers.wait_ready(0..size).await?;
        Ok(servers)
    }

    /// A setting of ours for members that are started from now on; etcd has none of them.
    pub fn set(&mut self, setting: &str) {
        self.settings.push(setting.into());
    }

    /// Starts the members `0..size`, without waiting for anything.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        (0..self.size).try_for_each(|slot| self.spawn(slot, &[]))
    }

    /// Starts one of the members `0..size` again.
    pub fn start_one(&mut self, slot: u64) -> anyhow::Result<()> {
        self.spawn(slot, &[])
    }

    fn address(&self, slot: u64, port: u16) -> String {
        format!("127.{}.{slot}.{}:{port}", self.host.0, self.host.1)
    }

    /// `host:port` for clients.
    pub fn endpoint(&self, slot: u64) -> String {
        self.address(slot, 2379)
    }

    pub fn peer_address(&self, slot: u64) -> String {
        self.address(slot, 2380)
    }

    pub fn endpoints(&self) -> Vec<String> {
        (0..self.size).map(|slot| self.endpoint(slot)).collect()
    }

    /// Starts one member that is to join: of ours one that waits to be added, of etcd's one that was added.
    pub fn spawn_joiner(&mut self, slot: u64) -> anyhow::Result<()> {
        let members: Vec<u64> = (0..self.size).chain([slot]).collect();
        let args = match self.program.kind {
            Kind::Quorate => {
                let join: Vec<String> = (0..self.size).map(|slot| self.peer_address(slot)).collect();
                ["--by-hand".into(), "--join".into(), join.join(",")].to_vec()
            }
            Kind::Etcd => {
                let initial = self.initial_cluster(&members);
                ["--initial-cluster-state".into(), "existing".into(), "--initial-cluster".into(), initial].to_vec()
            }
        };
        self.spawn(slot, &args)
    }

    fn initial_cluster(&self, slots: &[u64]) -> String {
        let member = |slot: &u64| format!("m-{slot}=http://{}", self.peer_address(*slot));
        slots.iter().map(member).collect::<Vec<_>>().join(",")
    }

    /// Starts a member; without `join` it is one of the first.
    fn spawn(&mut self, slot: u64, join: &[String]) -> anyhow::Result<()> {
        let (client, peer) = (self.endpoint(slot), self.peer_address(slot));
        let mut command = Command::new(&self.program.path);
        match self.program.kind {
            Kind::Quorate => {
                command.args([
                    "serve",
                    "--name",
                    &format!("m-{slot}"),
                    "--listen-client",
                    &client,
                    "--listen-peer",
                    &peer,
                ]);
                command.args(["--advertise-client", &format!("http://{client}")]).env("QUORATE_DIE_WITH_PARENT", "1");
                if join.is_empty() {
                    let pattern = format!("127.{}.%d.{}:2380", self.host.0, self.host.1);
                    command.args(["--peers", &pattern, "--size", &self.size.to_string()]);
                } else {
                    command.args(["--advertise-peer", &peer]);
                }
                for setting in &self.settings {
                    command.args(["--set", setting]);
                }
            }
            Kind::Etcd => {
                let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
                command.args(["--name", &format!("m-{slot}")]);
                command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
                command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
                if join.is_empty() {
                    let all: Vec<u64> = (0..self.size).collect();
                    command.args(["--initial-cluster", &self.initial_cluster(&all)]);
                }
            }
        }
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(slot))?;
        command.args(join).arg("--data-dir").arg(self.data_dir(slot));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program.path.display()))?;
        self.children.insert(slot, child);
        Ok(())
    }

    pub fn data_dir(&self, slot: u64) -> PathBuf {
        self.root.path().join(format!("m-{slot}"))
    }

    fn log_path(&self, slot: u64) -> PathBuf {
        self.root.path().join(format!("m-{slot}.log"))
    }

    /// What a member has logged in all its lives.
    pub fn log_text(&self, slot: u64) -> String {
        std::fs::read_to_string(self.log_path(slot)).unwrap_or_default()
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self, slot: u64) {
        if let Some(mut child) = self.children.remove(&slot) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGKILL to all at once.
    pub fn kill_all(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill();
        }
        for (_, mut child) in std::mem::take(&mut self.children) {
            let _ = child.wait();
        }
    }

    pub fn channel(&self, slot: u64) -> anyhow::Result<Channel> {
        channel(&self.endpoint(slot))
    }

    pub async fn status(&self, slot: u64) -> anyhow::Result<StatusResponse> {
        Ok(MaintenanceClient::new(self.channel(slot)?).status(StatusRequest {}).await?.into_inner())
    }

    /// The slot that leads.
    pub async fn leader(&self) -> anyhow::Result<u64> {
        for slot in 0..self.size {
            let status = self.status(slot).await?;
            if status.header.is_some_and(|header| header.member_id == status.leader) {
                return Ok(slot);
            }
        }
        bail!("nobody leads");
    }

    /// Compacts all history.
    pub async fn compact(&self) -> anyhow::Result<()> {
        let revision = self.status(0).await?.header.context("no header")?.revision;
        let compact = CompactionRequest { revision, physical: true };
        KvClient::new(self.channel(0)?).compact(compact).await?;
        Ok(())
    }

    /// Waits until all of `slots` answer a linearizable read, and know `size` voters.
    pub async fn wait_ready(&self, slots: impl IntoIterator<Item = u64>) -> anyhow::Result<()> {
        for slot in slots {
            self.wait(&format!("member {slot} to be ready"), async || self.look(slot).await).await?;
        }
        Ok(())
    }

    async fn look(&self, slot: u64) -> anyhow::Result<()> {
        let channel = Endpoint::from_shared(format!("http://{}", self.endpoint(slot)))?.timeout(Duration::from_secs(1));
        let channel = channel.connect().await?;
        KvClient::new(channel.clone()).range(RangeRequest { key: "ready".into(), ..Default::default() }).await?;
        let members = ClusterClient::new(channel).member_list(MemberListRequest::default()).await?.into_inner().members;
        let voters = members.iter().filter(|member| !member.is_learner).count() as u64;
        ensure!(voters >= self.size, "it knows {voters} voters");
        Ok(())
    }

    /// Tries until `look` answers `Ok`; at most for [`PATIENCE`].
    pub async fn wait<T>(&self, what: &str, mut look: impl AsyncFnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match look().await {
                Ok(found) => return Ok(found),
                Err(error) if Instant::now() > deadline => {
                    let logs: Vec<String> =
                        self.children.keys().map(|slot| last_lines(&self.log_text(*slot))).collect();
                    bail!("{}: waited {PATIENCE:?} for {what}: {error:#}\n{}", self.program.name, logs.join("\n--\n"));
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    pub fn pids(&self) -> Vec<u32> {
        self.children.values().map(Child::id).collect()
    }

    /// Processor time that all members together have used, in microseconds.
    pub fn cpu_micros(&self) -> f64 {
        self.pids().into_iter().map(cpu_micros).sum()
    }

    /// Resident memory of all members together.
    pub fn resident_bytes(&self) -> f64 {
        self.pids().into_iter().map(resident_bytes).sum()
    }

    /// What all members together have allocated since they started.
    pub async fn allocated(&self) -> anyhow::Result<Allocated> {
        let mut all = Allocated { count: 0.0, bytes: 0.0 };
        for endpoint in self.endpoints() {
            let (_, text) = http_get(&endpoint, "/metrics").await?;
            let value = |name: &str| -> anyhow::Result<f64> {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
                let missing =
                    "the members do not count their allocations; build them with `--features count-allocations`";
                Ok(line.context(missing)?.parse()?)
            };
            all.count += value("quorate_allocations_total")?;
            all.bytes += value("quorate_allocated_bytes_total")?;
        }
        Ok(all)
    }

    /// Space that all members together take on the disk.
    pub fn disk_bytes(&self) -> f64 {
        (0..self.size).map(|slot| disk_bytes(&self.data_dir(slot))).sum()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.kill_all();
    }
}

/// A connection of its own.
pub fn channel(endpoint: &str) -> anyhow::Result<Channel> {
    Ok(Endpoint::from_shared(format!("http://{endpoint}"))?.tcp_nodelay(true).connect_lazy())
}

/// Processor time of a process, in microseconds. Linux counts in hundredths of a second, whatever the kernel's tick.
pub fn cpu_micros(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(f64::NAN);
    (ticks(11) + ticks(12)) * 10_000.0
}

/// Resident memory of a process.
pub fn resident_bytes(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    line.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) * 1024.0
}

fn disk_bytes(path: &Path) -> f64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(meta) = path.symlink_metadata() else { return 0.0 };
    let below = std::fs::read_dir(path).into_iter().flatten().flatten();
    meta.blocks() as f64 * 512.0 + below.map(|entry| disk_bytes(&entry.path())).sum::<f64>()
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
