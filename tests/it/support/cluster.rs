//! A cluster of real server processes with real disks, for one test.
//!
//! Owns the processes and their directories: they are killed and removed at the end of the test. Each cluster has loopback
//! addresses of its own (`127.A.<slot>.B`), so that tests run side by side on the usual ports. A test that fails prints the
//! end of each pod's log. Absent: sleeping; tests wait for conditions with [`wait_for`].

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use quorate::pb::etcd::cluster_client::ClusterClient;
use quorate::pb::etcd::kv_client::KvClient;
use quorate::pb::etcd::maintenance_client::MaintenanceClient;
use quorate::pb::etcd::{
    HashKvRequest, HashKvResponse, Member, MemberListRequest, PutRequest, RangeRequest, StatusRequest, StatusResponse,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::memory_group::MemoryGroup;
use super::tools;

/// Time in which anything that a test waits for must have happened, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The pods of one test.
pub struct Cluster {
    root: tempfile::TempDir,
    host: (u8, u8),
    size: u64,
    settings: Vec<(String, String)>,
    pods: BTreeMap<u64, Child>,
    /// Pods whose data directory is a file system of their own, of so many bytes.
    small_disks: BTreeMap<u64, u64>,
    /// What pods write their ids to before they become a member: the entry of a control group.
    memory_entry: Option<PathBuf>,
}

impl Cluster {
    /// A cluster of `size` pods, none of which runs yet.
    pub fn new(size: u64) -> Self {
        let root = tempfile::Builder::new().prefix("quorate-it-").tempdir().unwrap();
        let (settings, pods, small_disks, memory_entry) = Default::default();
        let mut cluster = Self { root, host: free_host(), size, settings, pods, small_disks, memory_entry };
        // Small segments: a test needs no 64 MiB files.
        cluster.set("log.segment_bytes", "8MiB");
        cluster
    }

    /// A running cluster of `size` pods that has a leader.
    pub async fn start(size: u64) -> Self {
        let mut cluster = Self::new(size);
        cluster.start_all().await;
        cluster
    }

    /// Starts the pods that do not run, and waits until all have formed a cluster. Returns the leader's slot.
    pub async fn start_all(&mut self) -> u64 {
        for slot in 0..self.size {
            if !self.is_running(slot) {
                self.start_pod(slot);
            }
        }
        self.wait_formed().await
    }

    /// A setting for pods that are started from now on.
    pub fn set(&mut self, key: &str, value: &str) -> &mut Self {
        self.settings.retain(|(k, _)| k != key);
        self.settings.push((key.into(), value.into()));
        self
    }

    /// The size that pods started from now on expect at the first formation.
    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    pub fn pattern(&self) -> String {
        format!("127.{}.%d.{}:2380", self.host.0, self.host.1)
    }

    pub fn peer_address(&self, slot: u64) -> String {
        self.pattern().replace("%d", &slot.to_string())
    }

    /// `host:port` for clients.
    pub fn endpoint(&self, slot: u64) -> String {
        format!("127.{}.{slot}.{}:2379", self.host.0, self.host.1)
    }

    /// Where the pod says how it is, from its first moment on.
    pub fn status_endpoint(&self, slot: u64) -> String {
        format!("127.{}.{slot}.{}:2381", self.host.0, self.host.1)
    }

    /// Endpoints of slots `0..size`, comma-separated.
    pub fn endpoints(&self) -> String {
        (0..self.size).map(|slot| self.endpoint(slot)).collect::<Vec<_>>().join(",")
    }

    pub fn data_dir(&self, slot: u64) -> PathBuf {
        self.root.path().join(format!("kv-{slot}"))
    }

    pub fn log_path(&self, slot: u64) -> PathBuf {
        self.root.path().join(format!("kv-{slot}.log"))
    }

    /// What the pod has logged in all its lives.
    pub fn log_text(&self, slot: u64) -> String {
        std::fs::read_to_string(self.log_path(slot)).unwrap_or_default()
    }

    pub fn start_pod(&mut self, slot: u64) {
        self.start_pod_with(slot, &[]);
    }

    /// Starts a pod with further environment variables (fail points).
    pub fn start_pod_with(&mut self, slot: u64, env: &[(&str, &str)]) {
        let args = self.slot_args(slot);
        self.start_process(slot, &self.data_dir(slot), &args, env);
    }

    /// Starts a pod that owns no slot, at the addresses and in the directory of `place`; `kind` is `--reader` or `--by-hand`.
    pub fn start_slotless(&mut self, place: u64, kind: &str) {
        let join: Vec<String> = (0..self.size).map(|slot| self.peer_address(slot)).collect();
        let args = ["--name", &format!("extra-{place}"), kind, "--join", &join.join(",")].map(str::to_owned);
        self.start_process(place, &self.data_dir(place), &args, &[]);
    }

    /// Starts a pod at the addresses of `place`, which it tells the others; its disk and its slot stay. Running, it has the
    /// number of that place.
    pub fn start_moved(&mut self, slot: u64, place: u64) {
        let mut args = self.slot_args(slot);
        args.extend(["--advertise-peer".to_owned(), self.peer_address(place)]);
        self.start_process(place, &self.data_dir(slot), &args, &[]);
    }

    fn slot_args(&self, name: u64) -> Vec<String> {
        ["--name", &format!("kv-{name}"), "--peers", &self.pattern(), "--size", &self.size.to_string()]
            .map(str::to_owned)
            .to_vec()
    }

    /// Starts a second process that claims to be `kv-<name>`, at the addresses of `slot`. Its directory is not beside that of the first,
    /// where it would be refused.
    pub fn start_twin(&mut self, slot: u64, name: u64) {
        let (args, disk) = (self.slot_args(name), self.root.path().join("twin").join(format!("kv-{slot}")));
        self.start_process(slot, &disk, &args, &[]);
    }

    fn start_process(&mut self, slot: u64, disk: &Path, args: &[String], env: &[(&str, &str)]) {
        assert!(!self.is_running(slot), "kv-{slot} runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(slot)).unwrap();
        let scheme = if self.settings.iter().any(|(key, _)| key == "client_tls.mode") { "https" } else { "http" };
        let mut command = match self.small_disks.get(&slot) {
            Some(bytes) => tools::on_small_disk(disk, *bytes),
            None => self.serving(),
        };
        command
            .arg("serve")
            .args(args)
            .args(["--listen-peer", &self.peer_address(slot), "--listen-client", &self.endpoint(slot)])
            .args(["--advertise-client", &format!("{scheme}://{}", self.endpoint(slot))])
            .arg("--data-dir")
            .arg(disk)
            .envs(env.iter().copied())
            .env("QUORATE_DIE_WITH_PARENT", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        for (key, value) in &self.settings {
            command.args(["--set", &format!("{key}={value}")]);
        }
        self.pods.insert(slot, command.spawn().unwrap());
    }

    /// Starts another command line as the pod; it is to serve at the pod's addresses.
    #[allow(dead_code, reason = "examples do not")]
    pub fn start_command(&mut self, slot: u64, mut command: Command) {
        assert!(!self.is_running(slot), "kv-{slot} runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(slot)).unwrap();
        command.env("QUORATE_DIE_WITH_PARENT", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.pods.insert(slot, command.spawn().unwrap());
    }

    /// Pods that are started from now on live in this group.
    pub fn set_memory_group(&mut self, group: &MemoryGroup) {
        self.memory_entry = Some(group.entry());
    }

    fn serving(&self) -> Command {
        let Some(entry) = &self.memory_entry else { return Command::new(binary()) };
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(entry).arg(binary());
        command
    }

    /// Pods of `slots` get a data directory of `bytes` that lives as long as their process.
    pub fn set_small_disks(&mut self, slots: impl IntoIterator<Item = u64>, bytes: u64) {
        self.small_disks.extend(slots.into_iter().map(|slot| (slot, bytes)));
    }

    /// The data directory as the pod sees it.
    pub fn disk_of(&self, slot: u64) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.pods[&slot].id()));
        root.join(self.data_dir(slot).strip_prefix("/").unwrap())
    }

    pub fn is_running(&mut self, slot: u64) -> bool {
        self.pods.get_mut(&slot).is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// Resident memory of the pod's process.
    pub fn resident_bytes(&self, slot: u64) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pods[&slot].id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// The most memory that the pod's process has had since its start or the last [`Cluster::forget_peak`].
    pub fn peak_resident_bytes(&self, slot: u64) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pods[&slot].id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    pub fn forget_peak(&self, slot: u64) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pods[&slot].id()), "5").unwrap();
    }

    /// Where the data directories of all pods are.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Processor time that the pod's process has used.
    #[allow(dead_code, reason = "examples do not ask for it")]
    pub fn cpu_time(&self, slot: u64) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pods[&slot].id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // Linux counts in hundredths of a second.
        Duration::from_millis(ticks * 10)
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self, slot: u64) {
        if let Some(mut child) = self.pods.remove(&slot) {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// SIGKILL to all at once.
    pub fn kill_all(&mut self) {
        for child in self.pods.values_mut() {
            let _ = child.kill();
        }
        for (_, mut child) in std::mem::take(&mut self.pods) {
            child.wait().unwrap();
        }
    }

    /// Sends a signal, such as `Signal::STOP`.
    pub fn signal(&self, slot: u64, signal: Signal) {
        let pid = Pid::from_raw(self.pods[&slot].id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// SIGTERM; fails if the process has not ended after `PATIENCE`, or not well.
    pub async fn terminate(&mut self, slot: u64) {
        self.signal(slot, Signal::TERM);
        let status = self.wait_exit(slot).await;
        assert!(status.success(), "kv-{slot} ended with {status}: {}", self.log_end(slot));
    }

    /// Waits until the process has ended by itself.
    pub async fn wait_exit(&mut self, slot: u64) -> ExitStatus {
        self.wait_any_exit(&[slot]).await.1
    }

    /// Waits until one of the processes has ended by itself, and says which.
    pub async fn wait_any_exit(&mut self, slots: &[u64]) -> (u64, ExitStatus) {
        let ended = wait_for(&format!("one of {slots:?} to end"), async || {
            let ended = |slot: &u64| Some((*slot, self.pods.get_mut(slot)?.try_wait().unwrap()?));
            slots.iter().find_map(ended).ok_or("they run")
        })
        .await;
        self.pods.remove(&ended.0);
        ended
    }

    /// The directory of the member that the pod is. It must be one: former selves were removed or there are none.
    pub fn member_dir(&self, slot: u64) -> PathBuf {
        let current = std::fs::read_to_string(self.data_dir(slot).join("current")).unwrap();
        self.data_dir(slot).join(current.lines().nth(1).unwrap())
    }

    /// Takes the pod's disk away, to be given back with [`Cluster::put_disk`]. The pod must not run.
    pub fn take_disk(&mut self, slot: u64, label: &str) {
        assert!(!self.is_running(slot), "kv-{slot} still runs");
        std::fs::rename(self.data_dir(slot), self.root.path().join(label)).unwrap();
    }

    /// Gives a disk that was taken away to a pod that has none.
    pub fn put_disk(&mut self, label: &str, slot: u64) {
        assert!(!self.data_dir(slot).exists(), "kv-{slot} has a disk");
        std::fs::rename(self.root.path().join(label), self.data_dir(slot)).unwrap();
    }

    /// Deletes the pod's disk. The pod must not run.
    pub fn wipe(&mut self, slot: u64) {
        assert!(!self.is_running(slot), "kv-{slot} still runs");
        std::fs::remove_dir_all(self.data_dir(slot)).unwrap();
    }

    pub fn channel(&self, slot: u64) -> Channel {
        channel(&self.endpoint(slot))
    }

    /// To the status listener.
    pub fn status_channel(&self, slot: u64) -> Channel {
        channel(&self.status_endpoint(slot))
    }

    pub fn kv(&self, slot: u64) -> KvClient<Channel> {
        KvClient::new(self.channel(slot)).max_decoding_message_size(usize::MAX)
    }

    pub fn maintenance(&self, slot: u64) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel(slot))
    }

    /// What the pod says of itself, also while it serves no clients.
    pub async fn status(&self, slot: u64) -> Result<StatusResponse, Status> {
        Ok(MaintenanceClient::new(self.status_channel(slot)).status(StatusRequest {}).await?.into_inner())
    }

    pub async fn members(&self, slot: u64) -> Result<Vec<Member>, Status> {
        let request = MemberListRequest { linearizable: false };
        Ok(ClusterClient::new(self.channel(slot)).member_list(request).await?.into_inner().members)
    }

    pub async fn hash_kv(&self, slot: u64, revision: i64) -> Result<HashKvResponse, Status> {
        Ok(self.maintenance(slot).hash_kv(HashKvRequest { revision }).await?.into_inner())
    }

    /// The member id that the pod has now.
    pub async fn member_id(&self, slot: u64) -> u64 {
        wait_for(&format!("kv-{slot} to say its member id"), async || match self.status(slot).await {
            Ok(status) => status.header.map(|h| h.member_id).filter(|id| *id != 0).ok_or("it says none".to_owned()),
            Err(status) => Err(status.message().to_owned()),
        })
        .await
    }

    pub async fn cluster_id(&self, slot: u64) -> u64 {
        self.status(slot).await.unwrap().header.unwrap().cluster_id
    }

    /// All members as the pod knows them: member id, and whether it votes. Ascending.
    pub async fn membership(&self, slot: u64) -> Vec<(u64, bool)> {
        let what = format!("kv-{slot} to list the members");
        let members = wait_for(&what, async || self.members(slot).await.map_err(|e| e.message().to_owned())).await;
        members.iter().map(|m| (m.id, !m.is_learner)).collect()
    }

    /// Waits until all of `slots` hold the same state; returns its hash.
    pub async fn wait_same_hash(&self, slots: impl IntoIterator<Item = u64>) -> u32 {
        let slots: Vec<u64> = slots.into_iter().collect();
        wait_for(&format!("pods {slots:?} to hold the same"), async || {
            let mut seen = Vec::new();
            for slot in &slots {
                let hash = self.hash_kv(*slot, 0).await.map_err(|e| format!("kv-{slot}: {}", e.message()))?;
                seen.push((hash.hash, hash.compact_revision, hash.header.unwrap().revision));
            }
            let all = format!("{seen:?}");
            seen.dedup();
            if let [(hash, ..)] = seen[..] { Ok(hash) } else { Err(all) }
        })
        .await
    }

    /// Waits until the pod's HTTP `/readyz` says that it is not ready because of all of `parts`.
    pub async fn wait_unready(&self, slot: u64, parts: &[&str]) -> String {
        self.wait_http(slot, "/readyz", 503, parts).await
    }

    /// Waits until the pod's status listener answers a GET with `code` and a text that holds all of `parts`.
    pub async fn wait_http(&self, slot: u64, path: &str, code: u16, parts: &[&str]) -> String {
        self.wait_http_at(&self.status_endpoint(slot), path, code, parts).await
    }

    /// The same at one of the pod's ports.
    pub async fn wait_http_at(&self, endpoint: &str, path: &str, code: u16, parts: &[&str]) -> String {
        let holds = |text: &str| parts.iter().all(|part| text.contains(part));
        wait_for(&format!("GET {endpoint}{path} to answer {code} with {parts:?}"), async || {
            match http_get(endpoint, path).await {
                Ok((found, text)) if found == code && holds(&text) => Ok(text),
                Ok((found, text)) => Err(format!("{found} {text}")),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Waits until the pod has logged all of `parts` in one line; returns the first such line.
    pub async fn wait_logged(&self, slot: u64, parts: &[&str]) -> String {
        wait_for(&format!("kv-{slot} to log {parts:?}"), async || {
            let text = self.log_text(slot);
            let line = text.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            line.map(str::to_owned).ok_or("it has not")
        })
        .await
    }

    /// Runs the client of this project against all pods; returns what it printed.
    pub async fn client(&self, args: &[&str]) -> String {
        self.command(&[args, &["--endpoints", &self.endpoints()]].concat()).await
    }

    /// Runs this project's program; returns what it printed.
    pub async fn command(&self, args: &[&str]) -> String {
        let output = tokio::process::Command::new(binary()).args(args).output().await.unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    /// The slot that leads, as a running pod in `slots` knows it; `None` if none of them knows one.
    pub async fn leader(&self, slots: impl IntoIterator<Item = u64>) -> Option<u64> {
        for slot in slots {
            if let Ok(status) = self.status(slot).await
                && status.leader != 0
            {
                return Some(status.leader & 0xffff);
            }
        }
        None
    }

    /// Waits until every pod of `0..size` runs in one cluster, serves clients, knows the leader and votes. Returns the leader's slot.
    pub async fn wait_formed(&self) -> u64 {
        self.wait_voters(0..self.size).await
    }

    /// Waits until exactly the pods of `slots` are voters and every one of them says so. Returns the leader's slot.
    pub async fn wait_voters(&self, slots: impl IntoIterator<Item = u64>) -> u64 {
        let slots: Vec<u64> = slots.into_iter().collect();
        self.wait_voters_seen_by(&slots, &slots).await
    }

    /// Waits until exactly the pods of `voters` are voters, as every one of `slots` says. Returns the leader's slot.
    pub async fn wait_voters_seen_by(&self, slots: &[u64], expected: &[u64]) -> u64 {
        wait_for(&format!("pods {expected:?} to be the voters of one cluster, as {slots:?} see it"), async || {
            let mut leaders = Vec::new();
            let mut clusters = Vec::new();
            for slot in slots {
                let status = self.status(*slot).await.map_err(|e| format!("kv-{slot}: {}", e.message()))?;
                let members = self.members(*slot).await.map_err(|e| format!("kv-{slot}: {}", e.message()))?;
                let mut voters: Vec<u64> = members.iter().filter(|m| !m.is_learner).map(|m| m.id & 0xffff).collect();
                voters.sort_unstable();
                if voters != expected {
                    return Err(format!("kv-{slot} sees the voters {voters:?}"));
                }
                leaders.push(status.leader);
                clusters.push(status.header.unwrap_or_default().cluster_id);
            }
            leaders.dedup();
            clusters.dedup();
            match (&leaders[..], &clusters[..]) {
                ([leader], [_]) if *leader != 0 => Ok(leader & 0xffff),
                _ => Err(format!("leaders {leaders:x?}, clusters {clusters:x?}")),
            }
        })
        .await
    }

    /// Puts, again and again until it is acknowledged.
    pub async fn put(&self, slot: u64, key: &str, value: &str) -> i64 {
        let mut kv = self.kv(slot);
        wait_for(&format!("put {key} through kv-{slot}"), async || {
            let put = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
            match kv.put(put).await {
                Ok(answer) => Ok(answer.into_inner().header.unwrap().revision),
                Err(status) => Err(status.message().to_owned()),
            }
        })
        .await
    }

    /// The value, read linearizably; tried again while the cluster has no leader.
    pub async fn get(&self, slot: u64, key: &str) -> Option<String> {
        let mut kv = self.kv(slot);
        wait_for(&format!("get {key} through kv-{slot}"), async || {
            let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
            match kv.range(range).await {
                Ok(answer) => {
                    let kvs = answer.into_inner().kvs;
                    Ok(kvs.first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
                }
                Err(status) if status.code() == Code::Unavailable => Err(status.message().to_owned()),
                Err(status) => panic!("get {key} through kv-{slot}: {status}"),
            }
        })
        .await
    }

    fn log_end(&self, slot: u64) -> String {
        let text = self.log_text(slot);
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("openraft")).collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for slot in 0..32 {
                if Path::new(&self.log_path(slot)).exists() {
                    println!("--- kv-{slot}\n{}", self.log_end(slot));
                }
            }
        }
        self.kill_all();
    }
}

fn channel(endpoint: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{endpoint}")).unwrap();
    endpoint.connect_timeout(Duration::from_secs(1)).connect_lazy()
}

/// Tries until `look` answers `Ok`, at most for [`PATIENCE`]; then fails with the last observation.
pub async fn wait_for<T, E: std::fmt::Display>(what: &str, mut look: impl AsyncFnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(done) => return done,
            Err(seen) => assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}; last seen: {seen}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The program under test, with its fail points compiled in: cargo names it to tests; an example finds it beside its own directory.
/// `QUORATE_BINARY` names another, such as an optimized one for figures.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("QUORATE_BINARY") {
        return path.into();
    }
    match option_env!("CARGO_BIN_EXE_quorate") {
        Some(path) => path.into(),
        None => {
            let example = std::env::current_exe().unwrap();
            let path = example.parent().and_then(Path::parent).unwrap().join("quorate");
            assert!(path.exists(), "{} is not built; run `cargo build` with the same profile first", path.display());
            path
        }
    }
}

/// A GET with HTTP/1.1: code and body.
pub async fn http_get(endpoint: &str, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = tokio::net::TcpStream::connect(endpoint).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    code.zip(body).ok_or_else(|| std::io::Error::other(format!("not HTTP: {answer:?}")))
}

/// The head of what a GET is answered with.
#[allow(dead_code, reason = "examples do not ask for it")]
pub async fn http_head(endpoint: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(endpoint).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split("\r\n\r\n").next().unwrap_or_default().to_owned()
}

/// A POST with HTTP/1.1: code and body.
pub async fn http_post(endpoint: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    http_request(endpoint, "POST", path, &[], body).await
}

/// A request with HTTP/1.1 and further headers: code and body.
pub async fn http_request(
    endpoint: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut stream = tokio::net::TcpStream::connect(endpoint).await?;
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {endpoint}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let broken = || std::io::Error::other(format!("not HTTP: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(broken)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(broken)?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((code, if chunked { unchunk(body) } else { body.to_owned() }))
}

/// The content of a body in chunks.
fn unchunk(mut body: &str) -> String {
    let mut content = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || size > rest.len() {
            break;
        }
        content += &rest[..size];
        body = rest[size..].trim_start_matches("\r\n");
    }
    content
}

/// Two bytes of a loopback address that no other test uses now.
pub fn free_host() -> (u8, u8) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(2_654_435_761) >> 8;
    loop {
        let n = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % (250 * 250);
        let host = ((1 + n / 250) as u8, (1 + n % 250) as u8);
        if TcpListener::bind((format!("127.{}.0.{}", host.0, host.1), 2380)).is_ok() {
            return host;
        }
    }
}
