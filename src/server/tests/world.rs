//! Three simulated machines, the clients that use them, and what must hold between the two.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::config::{Bytes, Config};
use crate::env::sim::{Host, NoNet, SimDisk, SimNet};
use crate::env::{Env, Instant, Net as _, sleep, timeout};
use crate::pb::etcd::kv_client::KvClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{HashKvRequest, PutRequest, RangeRequest, StatusRequest, StatusResponse};
use crate::storage::state::Engine;
use crate::storage::state::memory::Memories;

const MEMBERS: usize = 3;
const WRITERS: u64 = 3;
/// Simulated time in which a cluster whose members are all up must be whole.
const HEAL_TIME: Duration = Duration::from_secs(60);
/// A fault that waits for a disk to be used does not wait longer.
const FAULT_PATIENCE: Duration = Duration::from_secs(1);

/// What happens to the cluster.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The power fails after so many more changes to each disk; the members come back one after another.
    PowerLoss { members: Vec<usize>, changes: Vec<u64> },
    /// A sync fails: the member must stop by itself.
    DiskError { member: usize },
    /// SIGTERM, and a start.
    Restart { member: usize },
    /// Two members do not reach one another.
    Cut { pair: (usize, usize), silent: bool, millis: u64 },
    /// One member reaches no other.
    Isolation { member: usize, silent: bool, millis: u64 },
}

struct Machine {
    disk: SimDisk,
    stores: Memories,
    running: Option<Running>,
}

struct Running {
    env: Env,
    serving: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// What a writer was told of the one put of a key.
struct Told {
    value: String,
    /// The revision, if it was acknowledged.
    revision: Option<i64>,
}

type Record = Arc<Mutex<BTreeMap<String, Told>>>;

pub struct World {
    seed: u64,
    env: Env,
    net: SimNet,
    machines: Vec<Machine>,
    clients: Clients,
    record: Record,
    writers: Vec<tokio::task::JoinHandle<()>>,
    writing: CancellationToken,
}

fn ip(member: usize) -> IpAddr {
    IpAddr::from([10, 0, 0, member as u8])
}

fn config(member: usize) -> Config {
    let mut config = Config::default();
    config.identity.name = format!("sim-{member}");
    config.identity.slot = Some(member as u16);
    config.cluster.peers = "10.0.0.%d:2380".into();
    config.cluster.size = MEMBERS as u16;
    config.server.data_dir = "/data".into();
    config.server.listen_peer = SocketAddr::new(ip(member), 2380);
    config.server.listen_client = SocketAddr::new(ip(member), 2379);
    // Small enough that segments rotate, and that the log is purged behind snapshots which laggards then need.
    config.log.segment_bytes = Bytes::kib(64);
    config.log.cache_bytes = Bytes::kib(16);
    config.log.bytes_max = Bytes::kib(64);
    config.log.entries_max = 100;
    config.log.entries_kept = 10;
    config.raft.snapshot_chunk_bytes = Bytes::kib(4);
    config.state.checkpoint_interval = Duration::from_millis(300);
    config.server.request_timeout = Duration::from_secs(3);
    config
}

impl World {
    pub fn new(seed: u64) -> Self {
        let env = Env::sim(seed, Arc::new(SimDisk::new(seed)), Arc::new(NoNet));
        let net = SimNet::new(env.random_u64(), Duration::from_millis(4));
        let machines = (0..MEMBERS).map(|_| {
            let disk = SimDisk::new(env.random_u64());
            Machine { disk, stores: Memories::default(), running: None }
        });
        let machines = machines.collect();
        let clients = Clients::new(net.host(IpAddr::from([10, 0, 1, 1])));
        Self {
            seed,
            env,
            net,
            machines,
            clients,
            record: Record::default(),
            writers: Vec::new(),
            writing: CancellationToken::new(),
        }
    }

    fn below(&self, bound: u64) -> u64 {
        self.env.random_u64() % bound
    }

    pub async fn sleep_up_to(&self, most: Duration) {
        sleep(Duration::from_micros(self.below(most.as_micros() as u64))).await;
    }

    pub async fn start_all(&mut self) {
        for member in 0..MEMBERS {
            self.sleep_up_to(Duration::from_millis(500)).await;
            self.start(member);
        }
        self.wait_healed().await;
    }

    pub fn start(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        let env = Env::sim(self.env.random_u64(), Arc::new(machine.disk.clone()), self.net.host(ip(member)));
        let engine = Engine::Memory(machine.stores.clone());
        let serving = tokio::spawn(super::super::serve(env.clone(), config(member), engine, None));
        machine.running = Some(Running { env, serving });
    }

    /// The machine's power is gone: its life reaches nobody, and its disk holds what a crash leaves.
    fn crash(&mut self, member: usize) {
        self.net.power_off(ip(member));
        let machine = &mut self.machines[member];
        machine.disk = machine.disk.crash();
        let env = &self.env;
        machine.stores.crash(|unsaved| (env.random_u64() % (unsaved as u64 + 1)) as usize);
        if let Some(running) = machine.running.take() {
            // It is cut off from the world already; its tasks are only to be gone.
            running.env.shutdown.cancel();
            running.serving.abort();
        }
    }

    pub fn choose_fault(&self) -> Fault {
        let member = self.below(MEMBERS as u64) as usize;
        let other = (member + 1 + self.below(MEMBERS as u64 - 1) as usize) % MEMBERS;
        let (silent, millis) = (self.below(2) == 0, 100 + self.below(4000));
        let changes = || 1 + self.below(12);
        match self.below(10) {
            0..=2 => Fault::PowerLoss { members: vec![member], changes: vec![changes()] },
            3 | 4 => Fault::PowerLoss { members: vec![member, other], changes: vec![changes(), changes()] },
            5 => Fault::PowerLoss { members: vec![0, 1, 2], changes: vec![changes(), changes(), changes()] },
            6 => Fault::DiskError { member },
            7 => Fault::Restart { member },
            8 => Fault::Cut { pair: (member, other), silent, millis },
            _ => Fault::Isolation { member, silent, millis },
        }
    }

    pub async fn suffer(&mut self, fault: Fault) {
        tracing::warn!(?fault, "simulation");
        match fault {
            Fault::PowerLoss { members, changes } => {
                let dark = CancellationToken::new();
                for (&member, &changes) in members.iter().zip(&changes) {
                    let (net, dark) = (self.net.clone(), dark.clone());
                    self.machines[member].disk.lose_power_after_and(changes, move || {
                        net.power_off(ip(member));
                        dark.cancel();
                    });
                }
                // The others fail with the first, or soon after.
                let _ = timeout(FAULT_PATIENCE, dark.cancelled()).await;
                for member in members.iter().copied() {
                    self.sleep_up_to(Duration::from_millis(5)).await;
                    self.crash(member);
                }
                for member in members {
                    self.sleep_up_to(Duration::from_secs(2)).await;
                    self.start(member);
                }
            }
            Fault::DiskError { member } => {
                self.machines[member].disk.fail_sync(1 + self.below(5));
                let running = self.machines[member].running.as_mut().expect("it runs");
                match timeout(FAULT_PATIENCE + Duration::from_secs(30), &mut running.serving).await {
                    Ok(ended) => assert!(ended.expect("no panic").is_err(), "a disk error is a failure"),
                    // Nothing was written meanwhile.
                    Err(_) => tracing::warn!("the disk was not used"),
                }
                self.crash(member);
                self.start(member);
            }
            Fault::Restart { member } => {
                self.stop(member).await;
                self.sleep_up_to(Duration::from_secs(1)).await;
                self.start(member);
            }
            Fault::Cut { pair: (a, b), silent, millis } => {
                if silent {
                    self.net.hold(ip(a), ip(b))
                } else {
                    self.net.cut(ip(a), ip(b))
                }
                sleep(Duration::from_millis(millis)).await;
                self.net.mend();
            }
            Fault::Isolation { member, silent, millis } => {
                for other in (0..MEMBERS).filter(|other| *other != member) {
                    if silent { self.net.hold(ip(member), ip(other)) } else { self.net.cut(ip(member), ip(other)) }
                }
                sleep(Duration::from_millis(millis)).await;
                self.net.mend();
            }
        }
        self.expect_alive();
    }

    /// SIGTERM; how long the member took to end.
    pub async fn stop(&mut self, member: usize) -> Duration {
        let began = Instant::now();
        let running = self.machines[member].running.take().expect("it runs");
        running.env.stopping.cancel();
        let ended = timeout(Duration::from_secs(20), running.serving).await.expect("SIGTERM ends a member");
        ended.expect("no panic").expect("a shutdown is no failure");
        self.net.power_off(ip(member));
        began.elapsed()
    }

    /// One put, which must be acknowledged.
    pub async fn put_through(&self, member: usize) {
        let key = format!("once-{}", self.env.random_u64());
        let revision = self.clients.put(member, &key, "x").await.expect("a member that is up writes");
        self.record.lock().insert(key, Told { value: "x".into(), revision: Some(revision) });
    }

    /// No member has ended that nothing was done to.
    fn expect_alive(&mut self) {
        for (member, machine) in self.machines.iter().enumerate() {
            let running = machine.running.as_ref().expect("all were started");
            assert!(!running.serving.is_finished(), "seed {}: member {member} ended by itself", self.seed);
        }
    }

    pub fn start_writers(&mut self) {
        for writer in 0..WRITERS {
            let task = Writer {
                name: writer,
                env: Env::sim(self.env.random_u64(), Arc::new(SimDisk::new(0)), Arc::new(NoNet)),
                clients: self.clients.clone(),
                record: self.record.clone(),
            };
            let writing = self.writing.clone();
            self.writers.push(tokio::spawn(task.run(writing)));
        }
    }

    /// How many writes were acknowledged, and how many may or may not have happened.
    pub async fn stop_writers(&mut self) -> (u64, u64) {
        self.writing.cancel();
        for writer in self.writers.drain(..) {
            writer.await.expect("no writer has read anything wrong");
        }
        let record = self.record.lock();
        let acknowledged = record.values().filter(|told| told.revision.is_some()).count();
        (acknowledged as u64, (record.len() - acknowledged) as u64)
    }

    async fn statuses(&self) -> Vec<Result<StatusResponse, String>> {
        let mut statuses = Vec::new();
        for member in 0..MEMBERS {
            statuses.push(self.clients.status(member).await);
        }
        statuses
    }

    /// Waits until all members follow one leader in one term and have applied the same.
    pub async fn wait_healed(&self) {
        let deadline = Instant::now() + HEAL_TIME;
        loop {
            let statuses = self.statuses().await;
            let all: Vec<&StatusResponse> = statuses.iter().filter_map(|status| status.as_ref().ok()).collect();
            let same = |of: fn(&StatusResponse) -> u64| all.windows(2).all(|pair| of(pair[0]) == of(pair[1]));
            let healed = all.len() == MEMBERS
                && all[0].leader != 0
                && same(|status| status.leader)
                && same(|status| status.raft_term)
                && same(|status| status.raft_applied_index)
                && all.iter().all(|status| !status.is_learner);
            if healed {
                return;
            }
            assert!(Instant::now() < deadline, "seed {}: not whole after {HEAL_TIME:?}: {statuses:#?}", self.seed);
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// The invariants, with everyone up.
    pub async fn check(&mut self) {
        self.net.mend();
        self.expect_alive();
        self.wait_healed().await;
        let mut seen = Vec::new();
        for member in 0..MEMBERS {
            // Linearizable, and so the newest; then what the member itself holds.
            let (cluster, newest) = self.clients.everything(member, false).await;
            let (_, local) = self.clients.everything(member, true).await;
            assert_eq!(newest, local, "member {member}");
            seen.push((cluster, newest, self.clients.hash(member).await));
        }
        for (member, (cluster, keys, hash)) in seen.iter().enumerate() {
            assert_eq!(*cluster, seen[0].0, "one cluster id");
            assert_eq!(*hash, seen[0].2, "HashKV of member {member}");
            for (key, told) in self.record.lock().iter() {
                let found = keys.get(key);
                if let Some((value, revision, version)) = found {
                    assert_eq!((value, *version), (&told.value, 1), "{key} was applied once");
                    assert!(told.revision.is_none_or(|at| at == *revision), "{key} moved from {told:?} to {revision}");
                }
                assert!(
                    found.is_some() || told.revision.is_none(),
                    "member {member} lost {key}, acknowledged {told:?}"
                );
            }
        }
        for machine in &self.machines {
            let root = Path::new("/data");
            let disk: &dyn crate::env::Disk = &machine.disk;
            let selves = disk.list(root).expect("the disk is up");
            let selves: Vec<_> = selves.iter().filter(|name| name.starts_with("member-")).collect();
            assert_eq!(selves.len(), 1, "a crash makes nobody a new member: {selves:?}");
        }
    }
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.revision)
    }
}

/// Puts keys of its own, each once, and now and then reads one back through another member.
struct Writer {
    name: u64,
    env: Env,
    clients: Clients,
    record: Record,
}

impl Writer {
    async fn run(self, stop: CancellationToken) {
        for n in 0.. {
            sleep(self.env.jitter(Duration::from_millis(30))).await;
            if stop.is_cancelled() {
                return;
            }
            let key = format!("w{}/{n:05}", self.name);
            let value = format!("{:x}", self.env.random_u64()).repeat(1 + (self.env.random_u64() % 20) as usize);
            self.record.lock().insert(key.clone(), Told { value: value.clone(), revision: None });
            let Ok(revision) = self.clients.put(self.member(), &key, &value).await else { continue };
            self.record.lock().get_mut(&key).expect("it was noted").revision = Some(revision);
            if self.env.random_u64().is_multiple_of(2) {
                let reader = self.member();
                // A read that answers at all answers with the newest.
                if let Ok(found) = self.clients.get(reader, &key).await {
                    assert_eq!(found.as_deref(), Some(value.as_str()), "stale read of {key} through member {reader}");
                }
            }
        }
    }

    fn member(&self) -> usize {
        (self.env.random_u64() % MEMBERS as u64) as usize
    }
}

/// Connections to every member's client port.
#[derive(Clone)]
pub struct Clients {
    channels: Vec<Channel>,
}

impl Clients {
    fn new(host: Arc<Host>) -> Self {
        let channels = (0..MEMBERS).map(|member| {
            let address = SocketAddr::new(ip(member), 2379).to_string();
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let host = host.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let connecting = host.connect(address.clone());
                async move { connecting.await.map(TokioIo::new) }
            });
            endpoint.connect_timeout(Duration::from_secs(1)).connect_with_connector_lazy(connector)
        });
        Self { channels: channels.collect() }
    }

    async fn call<T>(answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, String> {
        match timeout(Duration::from_secs(5), answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(status.to_string()),
            Err(_) => Err("no answer".into()),
        }
    }

    async fn put(&self, member: usize, key: &str, value: &str) -> Result<i64, String> {
        let request =
            PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..PutRequest::default() };
        let answer = Self::call(KvClient::new(self.channels[member].clone()).put(request)).await?;
        Ok(answer.header.expect("a header").revision)
    }

    async fn get(&self, member: usize, key: &str) -> Result<Option<String>, String> {
        let request = RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() };
        let answer = Self::call(KvClient::new(self.channels[member].clone()).range(request)).await?;
        Ok(answer.kvs.first().map(|kv| String::from_utf8_lossy(kv.fields().value).into_owned()))
    }

    async fn status(&self, member: usize) -> Result<StatusResponse, String> {
        Self::call(MaintenanceClient::new(self.channels[member].clone()).status(StatusRequest {})).await
    }

    async fn hash(&self, member: usize) -> (u32, i64) {
        let mut client = MaintenanceClient::new(self.channels[member].clone());
        let answer = Self::call(client.hash_kv(HashKvRequest { revision: 0 })).await.expect("a hash");
        (answer.hash, answer.hash_revision)
    }

    /// The cluster id, and of every key the value, revision and version.
    async fn everything(&self, member: usize, serializable: bool) -> (u64, BTreeMap<String, (String, i64, i64)>) {
        let request =
            RangeRequest { key: vec![0].into(), range_end: vec![0].into(), serializable, ..RangeRequest::default() };
        let mut client = KvClient::new(self.channels[member].clone()).max_decoding_message_size(usize::MAX);
        let answer = Self::call(client.range(request)).await.expect("a member that is up reads");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let keys = answer.kvs.iter().map(|kv| {
            let kv = kv.fields();
            (text(kv.key), (text(kv.value), kv.mod_revision, kv.version))
        });
        (answer.header.expect("a header").cluster_id, keys.collect())
    }
}
