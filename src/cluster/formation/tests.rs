//! Whole formations: real bootstraps and drivers on disks in memory, with a town of addresses instead of a network.
//!
//! Raft is a stand-in: a formation whose members have started counts as led once a quorum of them has.

use std::collections::BTreeMap;
use std::path::Path;

use parking_lot::Mutex;

use super::super::bootstrap::RaftFacts;
use super::*;
use crate::env::Disk;
use crate::env::sim::NoNet;
use crate::pb::log::Node;
use crate::pb::peer::{AbandonResponse, AcceptResponse, JoinRequest, WhoResponse};
use crate::storage::member_dir::MemberDir;
use crate::storage::member_dir::mem_disk::MemDisk;

/// What the stand-in for Raft knows of one member.
struct Facts {
    town: Town,
    cluster_id: u64,
    slot: u64,
}

impl RaftFacts for Facts {
    fn fill(&self, answer: &mut WhoResponse) {
        answer.term = 1;
        if self.town.leader(self.cluster_id) == Some(self.slot) {
            answer.quorum = true;
            answer.leader_id = answer.member_id;
            answer.last_log_index = 1;
        }
    }
}

#[derive(Default)]
struct Houses {
    disks: Vec<MemDisk>,
    up: BTreeMap<u64, Arc<Bootstrap>>,
    /// Members that have started Raft, by cluster: slot and member id, and the number of voters.
    started: BTreeMap<u64, (BTreeMap<u64, u64>, usize)>,
    minted: u64,
}

/// The nodes `kv-0`, `kv-1`, ... of one StatefulSet.
#[derive(Clone)]
pub(in crate::cluster) struct Town(Arc<Mutex<Houses>>);

impl Town {
    pub(in crate::cluster) fn new(size: usize) -> Self {
        let disks = (0..size).map(|_| MemDisk::default()).collect();
        Self(Arc::new(Mutex::new(Houses { disks, ..Houses::default() })))
    }

    fn size(&self) -> u64 {
        self.0.lock().disks.len() as u64
    }

    fn disk(&self, slot: u64) -> MemDisk {
        self.0.lock().disks[slot as usize].clone()
    }

    fn lose_disk(&self, slot: u64) {
        self.stop(slot);
        self.0.lock().disks[slot as usize] = MemDisk::default();
    }

    pub(in crate::cluster) fn start(&self, slot: u64) -> Arc<Bootstrap> {
        self.try_start(slot).expect("the disk works")
    }

    fn try_start(&self, slot: u64) -> Result<Arc<Bootstrap>, Error> {
        let disk: Arc<dyn Disk> = Arc::new(self.disk(slot));
        let town = self.clone();
        let mint = Arc::new(move |slot: u64| {
            let mut houses = town.0.lock();
            houses.minted += 1;
            (houses.minted << 16) | slot
        });
        let opened = MemberDir::open(disk.clone(), Path::new("/data"), slot, &format!("kv-{slot}"), || mint(slot))?;
        let node = Node { name: format!("kv-{slot}"), peer_address: format!("kv-{slot}"), ..Node::default() };
        // Simulated: what waits for a disk waits in this thread, so that the paused clock does not run on meanwhile.
        let env = Env::sim(u64::MAX - self.0.lock().minted, disk, Arc::new(NoNet));
        let bootstrap = Bootstrap::new(env, opened.dir, node, 0, mint);
        self.0.lock().up.insert(slot, bootstrap.clone());
        Ok(bootstrap)
    }

    fn stop(&self, slot: u64) {
        self.0.lock().up.remove(&slot);
    }

    fn at(&self, address: &str) -> Result<Arc<Bootstrap>, Unreachable> {
        let slot = address.trim_start_matches("kv-").parse::<u64>().expect("an address of the town");
        self.0.lock().up.get(&slot).cloned().ok_or_else(|| Unreachable("connection refused".into()))
    }

    /// The lowest living member of a started quorum.
    fn leader(&self, cluster_id: u64) -> Option<u64> {
        let houses = self.0.lock();
        let (started, voters) = houses.started.get(&cluster_id)?;
        let alive = |slot: &u64, id: &u64| houses.up.get(slot).is_some_and(|node| node.identity().member_id == *id);
        let alive: Vec<u64> = started.iter().filter(|(slot, id)| alive(slot, id)).map(|(slot, _)| *slot).collect();
        alive.first().copied().filter(|_| alive.len() > voters / 2)
    }

    fn places(&self) -> Places {
        let size = self.size();
        Places {
            expand: Some(Arc::new(|slot| Some(format!("kv-{slot}")))),
            expected: Arc::new(move || Expected { slots: 0..size, also: 0..0, one_by_one: false, unknown: None }),
            resolve: None,
            max_voters: Some(5),
            restore: None,
            patience: Duration::from_secs(1),
        }
    }

    /// Runs one node as the server would, until it is in a cluster that has a leader. Restarts it when its formation dies.
    async fn live(&self, slot: u64) -> Result<u64, Error> {
        let peers: Arc<dyn Peers> = Arc::new(self.clone());
        let places = self.places();
        loop {
            let bootstrap = self.try_start(slot)?;
            let (cluster_id, formation) = match run(&bootstrap, &peers, &places).await? {
                Outcome::Initialize(formation) => (formation.cluster_id, Some(formation)),
                Outcome::Resume { cluster_id, formation } => (cluster_id, formation),
                Outcome::Joined { cluster_id } => (cluster_id, None),
                Outcome::Shutdown => panic!("nobody has asked for it"),
            };
            let log = bootstrap.with_dir(MemberDir::log_path);
            make_log(&self.disk(slot), &log).map_err(|source| Error::Io { path: log, source })?;
            bootstrap.mark_log_started().await?;
            bootstrap.set_raft(Some(Arc::new(Facts { town: self.clone(), cluster_id, slot })));
            let Some(formation) = formation else { return Ok(cluster_id) };
            let member = bootstrap.identity().member_id;
            self.0
                .lock()
                .started
                .entry(cluster_id)
                .or_insert((BTreeMap::new(), formation.members.len()))
                .0
                .insert(slot, member);
            let formed = || self.leader(cluster_id).is_some();
            match watch(&bootstrap, &peers, &places, &formation, formed).await {
                Watched::Formed => return Ok(cluster_id),
                Watched::Dead => bootstrap.leave_dead_formation().await?,
                Watched::Shutdown => panic!("nobody has asked for it"),
            };
        }
    }

    /// All nodes live; the cluster that each ends in, or the error of its disk.
    async fn all_live(&self) -> Vec<Result<u64, Error>> {
        let all = join_all((0..self.size()).map(|slot| self.live(slot)));
        match env::timeout(Duration::from_secs(600), all).await {
            Ok(ended) => ended,
            Err(_) => {
                panic!("no cluster after 10 minutes: {:?}", self.waits());
            }
        }
    }

    fn waits(&self) -> Vec<(u64, Option<String>)> {
        self.0.lock().up.iter().map(|(slot, node)| (*slot, node.waits())).collect()
    }
}

fn make_log(disk: &MemDisk, log: &Path) -> std::io::Result<()> {
    disk.create_dir_all(log)?;
    disk.write_atomic(&log.join("0000000001.log"), b"header")?;
    disk.sync_dir(log.parent().expect("a log is in a member directory"))
}

fn reply<T: Send + 'static>(result: Result<T, Unreachable>) -> BoxFuture<Result<T, Unreachable>> {
    Box::pin(async move { result })
}

fn dead(error: Error) -> Unreachable {
    Unreachable(error.to_string())
}

impl Peers for Town {
    fn who(&self, address: String, nonce: u64) -> BoxFuture<Result<WhoResponse, Unreachable>> {
        reply(self.at(&address).map(|node| node.who(nonce)))
    }

    fn accept(&self, address: String, formation: Formation) -> BoxFuture<Result<AcceptResponse, Unreachable>> {
        let node = self.at(&address);
        Box::pin(async move { node?.accept(formation).await.map_err(dead) })
    }

    fn abandon(&self, address: String, cluster_id: u64) -> BoxFuture<Result<AbandonResponse, Unreachable>> {
        let node = self.at(&address);
        Box::pin(async move { node?.abandon(cluster_id).await.map_err(dead) })
    }

    fn join(&self, address: String, _request: JoinRequest) -> BoxFuture<Result<JoinResponse, Unreachable>> {
        let cluster_id = self.at(&address).map(|node| node.identity().cluster_id);
        reply(cluster_id.map(|cluster_id| JoinResponse {
            outcome: JoinOutcome::Added.into(),
            cluster_id,
            ..JoinResponse::default()
        }))
    }
}

/// The one cluster that all ended in.
fn one_cluster(ended: Vec<Result<u64, Error>>) -> u64 {
    let clusters: Vec<u64> = ended.into_iter().map(|cluster| cluster.expect("no disk fails")).collect();
    assert!(clusters.windows(2).all(|pair| pair[0] == pair[1]), "several clusters: {clusters:x?}");
    clusters[0]
}

/// Case 1: fresh 1/3/5, at the level of formation.
#[tokio::test(start_paused = true)]
async fn fresh_nodes_form_one_cluster_quickly() {
    for size in [1, 2, 3, 4, 5, 7] {
        let town = Town::new(size);
        let start = env::Instant::now();
        one_cluster(town.all_live().await);
        assert!(start.elapsed() < Duration::from_secs(2), "{size} nodes took {:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn node_without_a_pattern_is_a_cluster_of_one() {
    let town = Town::new(1);
    let bootstrap = town.start(0);
    town.stop(0);
    let peers: Arc<dyn Peers> = Arc::new(town.clone());
    let places = Places { expand: None, ..town.places() };
    let outcome = run(&bootstrap, &peers, &places).await.unwrap();
    assert!(matches!(outcome, Outcome::Initialize(formation) if formation.members.len() == 1));
}

/// Case 2: one pod pending at formation: waits, says for whom.
#[tokio::test(start_paused = true)]
async fn pending_node_is_waited_for_and_then_taken_in() {
    let town = Town::new(3);
    let others = async { join_all([town.live(0), town.live(1)]).await };
    let late = async {
        env::sleep(Duration::from_secs(300)).await;
        let waits = town.at("kv-0").unwrap().waits();
        assert_eq!(waits.as_deref(), Some("waits for slot 2 (kv-2): connection refused"));
        town.live(2).await
    };
    let (mut ended, last) = tokio::join!(others, late);
    ended.push(last);
    one_cluster(ended);
}

#[tokio::test(start_paused = true)]
async fn shutdown_ends_the_wait() {
    let town = Town::new(2);
    let bootstrap = town.start(0);
    let peers: Arc<dyn Peers> = Arc::new(town.clone());
    bootstrap.env().shutdown.cancel();
    assert_eq!(run(&bootstrap, &peers, &town.places()).await.unwrap(), Outcome::Shutdown);
}

/// Case 3: crash at every step of the formation: one cluster or none, and none heals. Every change of every node's disk is a
/// step.
#[tokio::test(start_paused = true)]
async fn crash_at_every_disk_change_still_ends_in_one_cluster() {
    for slot in 0..3 {
        for change in 0.. {
            let town = Town::new(3);
            let disk = town.disk(slot);
            disk.die_at(change);
            // The others run on while the node is down, and it comes back.
            let others = join_all((0..3).filter(|other| *other != slot).map(|other| town.live(other)));
            let crashing = async {
                let first = town.live(slot).await;
                if first.is_err() {
                    town.stop(slot);
                    env::sleep(Duration::from_secs(5)).await;
                    disk.crash();
                    return (town.live(slot).await, true);
                }
                (first, false)
            };
            let both = async { tokio::join!(others, crashing) };
            let Ok((mut ended, (last, died))) = env::timeout(Duration::from_secs(600), both).await else {
                panic!("slot {slot}, change {change}: no cluster after 10 minutes: {:?}", town.waits());
            };
            ended.push(last);
            one_cluster(ended);
            if !died {
                assert!(change > 10, "the formation changes the disk");
                break;
            }
        }
    }
}

/// Case 3: as above, and the crashed node's disk is lost too. One lost disk of three never blocks.
#[tokio::test(start_paused = true)]
async fn disk_lost_at_every_change_still_ends_in_one_cluster() {
    for slot in 0..3 {
        for change in 0.. {
            let town = Town::new(3);
            let disk = town.disk(slot);
            disk.die_at(change);
            let others = join_all((0..3).filter(|other| *other != slot).map(|other| town.live(other)));
            let crashing = async {
                let first = town.live(slot).await;
                if first.is_err() {
                    town.lose_disk(slot);
                    return (town.live(slot).await, true);
                }
                (first, false)
            };
            let both = async { tokio::join!(others, crashing) };
            let Ok((mut ended, (last, died))) = env::timeout(Duration::from_secs(600), both).await else {
                panic!("slot {slot}, change {change}: no cluster after 10 minutes: {:?}", town.waits());
            };
            ended.push(last);
            one_cluster(ended);
            if !died {
                assert!(change > 10, "the formation changes the disk");
                break;
            }
        }
    }
}

/// Case 4: pod-0 loses its disk, peers up: a new member.
#[tokio::test(start_paused = true)]
async fn lost_disk_joins_the_cluster_that_is_there() {
    let town = Town::new(3);
    let cluster_id = one_cluster(town.all_live().await);
    let before = town.at("kv-0").unwrap().identity().member_id;
    town.lose_disk(0);
    assert_eq!(town.live(0).await.unwrap(), cluster_id);
    assert_ne!(town.at("kv-0").unwrap().identity().member_id, before);
}

/// Case 5: pod-0 loses its disk and is cut off: never forms.
#[tokio::test(start_paused = true)]
async fn lost_disk_that_is_cut_off_never_forms() {
    let town = Town::new(3);
    one_cluster(town.all_live().await);
    town.lose_disk(0);
    town.stop(1);
    town.stop(2);
    assert!(env::timeout(Duration::from_secs(3600), town.live(0)).await.is_err());
    assert!(town.at("kv-0").unwrap().waits().unwrap().starts_with("waits for slot 1"));
}

/// Case 8: majority lost, one survivor: nobody forms beside it.
#[tokio::test(start_paused = true)]
async fn fresh_disks_do_not_form_beside_a_survivor() {
    let town = Town::new(3);
    let cluster_id = one_cluster(town.all_live().await);
    town.lose_disk(0);
    town.lose_disk(1);
    let both = join_all([town.live(0), town.live(1)]);
    assert!(env::timeout(Duration::from_secs(3600), both).await.is_err());
    let waits = town.at("kv-0").unwrap().waits().unwrap();
    assert!(waits.contains(&format!("cluster {cluster_id:016x} has no quorum")), "{waits}");
}

#[tokio::test(start_paused = true)]
async fn restarted_nodes_resume_their_cluster() {
    let town = Town::new(3);
    let cluster_id = one_cluster(town.all_live().await);
    for slot in 0..3 {
        town.stop(slot);
        town.disk(slot).crash();
    }
    assert_eq!(one_cluster(town.all_live().await), cluster_id);
}

#[tokio::test(start_paused = true)]
async fn promise_and_abandonment_exclude_each_other() {
    let town = Town::new(1);
    let node = town.start(0);
    let member = membership::Member { id: node.identity().member_id, node: Some(Node::default()) };
    let formation = |cluster_id| Formation { cluster_id, members: vec![member.clone()], moment: None };
    assert!(!node.abandon(7).await.unwrap().abandoned, "it has not accepted it");
    assert!(node.accept(formation(7)).await.unwrap().accepted);
    assert!(node.accept(formation(7)).await.unwrap().accepted, "the same bytes again");
    assert!(!node.accept(formation(8)).await.unwrap().accepted);
    assert!(node.set_cluster(8).await.unwrap().is_err());
    node.begin().await.unwrap().unwrap();
    assert!(!node.abandon(7).await.unwrap().abandoned, "it may have voted");

    // A restart has granted nothing, as long as the log has not started.
    let node = town.start(0);
    assert!(node.abandon(7).await.unwrap().abandoned);
    assert!(node.begin().await.unwrap().is_err());
    assert!(!node.accept(formation(7)).await.unwrap().accepted);
    node.mint_anew().await.unwrap();
    assert!(node.abandon(7).await.unwrap().abandoned, "the new self remembers");
    assert_eq!(node.who(5).abandoned_cluster_ids, [7]);
}

#[tokio::test(start_paused = true)]
async fn crash_while_leaving_a_dead_formation_never_resumes_it() {
    for change in 0.. {
        let town = Town::new(1);
        let node = town.start(0);
        let member = membership::Member { id: node.identity().member_id, node: Some(Node::default()) };
        node.accept(Formation { cluster_id: 7, members: vec![member], moment: None }).await.unwrap();
        node.begin().await.unwrap().unwrap();
        make_log(&town.disk(0), &node.with_dir(MemberDir::log_path)).unwrap();
        node.mark_log_started().await.unwrap();
        town.disk(0).die_at(change);
        let left = node.leave_dead_formation().await.is_ok();
        town.disk(0).crash();

        let node = town.start(0);
        let given_up = node.who(1).abandoned_cluster_ids.contains(&7);
        assert!(given_up || !left, "what was left is remembered");
        let peers: Arc<dyn Peers> = Arc::new(town.clone());
        let resumed = match run(&node, &peers, &town.places()).await.unwrap() {
            Outcome::Resume { cluster_id, .. } => cluster_id == 7,
            Outcome::Initialize(formation) => formation.cluster_id == 7,
            other => panic!("{other:?}"),
        };
        assert_eq!(resumed, !given_up, "change {change}");
        if left {
            assert!(change > 5, "leaving changes the disk");
            return;
        }
    }
}
