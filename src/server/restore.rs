//! Data directories of a new cluster, made from a backup.
//!
//! Owns what a restored member finds on its disk: an identity of the new cluster, an empty log, and a snapshot file that stands for
//! the first log entry: the membership, and all data. Raft starts on it as after any restart.
//! Invariants: the cluster id, the member ids and the membership follow from the backup's SHA-256, the token and the options, and
//! from nothing else; so members restored apart agree, and a restore with anything different is another cluster, whose members
//! refuse one another's calls; so does the key that tokens are signed with, which etcd's file lacks. No member id of the backup is used again. A backup that does not verify, and a directory that holds
//! anything, are refused before anything is written.
//! Absent: taking backups (`api`), and the choice of a token that was never used before (`cli`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::backup::etcd_file;
use crate::env::{Env, File, OpenMode};
use crate::identity::{self, PeerList, PeerPattern};
use crate::kv;
use crate::pb::log::{LogId, Membership, Node, StoredMembership, membership, node};
use crate::raft::{self, Applied, Member};
use crate::storage::log::{self, Log, Owner};
use crate::storage::member_dir::MemberDir;
use crate::storage::snapshot::{self, backup};

/// The entry that the restored state stands for: the first of the new log, as a formation's membership is.
pub(super) const FIRST: LogId = LogId { term: 0, index: 0 };

/// What to make of a backup.
#[derive(Clone, Debug)]
pub struct Restore {
    /// All members of the new cluster: slot, name, peer address, client URLs. Ascending by slot.
    pub members: Vec<NewMember>,
    /// Tells this restore from every other one of the same backup.
    pub token: String,
    /// Go on so many revisions later, with everything before compacted; 0: as the backup is.
    pub bump_revision: i64,
    /// Slots whose directories are made here, and where.
    pub directories: Vec<(u16, PathBuf)>,
}

/// A member of the new cluster.
#[derive(Clone, Debug)]
pub struct NewMember {
    pub slot: u16,
    pub name: String,
    pub peer_address: String,
    pub client_urls: Vec<String>,
    /// It is one that is added and removed by hand.
    pub by_hand: bool,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Restored {
    pub cluster_id: u64,
    pub revision: i64,
    pub keys: usize,
    /// Slot, member id and directory.
    pub members: Vec<(u16, u64, PathBuf)>,
}

/// The members that a peer pattern, or none, gives.
pub fn members(
    peers: &str,
    name: &str,
    first_slot: u16,
    size: u16,
    client_port: u16,
) -> anyhow::Result<Vec<NewMember>> {
    let pattern = if peers.is_empty() { None } else { Some(peers.parse::<PeerPattern>()?) };
    ensure!(size > 0, "--size is 0, expected the number of members");
    ensure!(pattern.is_some() || size == 1, "--size {size} needs --peers, with %d in the slot's place");
    ensure!(size == 1 || name.contains("%d"), "--name {name:?} names all members alike; put %d in the slot's place");
    (first_slot..first_slot.saturating_add(size))
        .map(|slot| {
            let name = name.replace("%d", &slot.to_string());
            let peer_address = match &pattern {
                Some(pattern) => pattern.expand(slot),
                None => "127.0.0.1:2380".to_owned(),
            };
            Ok(NewMember {
                client_urls: client_urls(&peer_address, client_port),
                slot,
                name,
                peer_address,
                by_hand: false,
            })
        })
        .collect()
}

/// The members that a list `name=http://host:port,...` gives, as a node that is started with it counts them.
pub fn listed(list: &str, client_port: u16) -> anyhow::Result<Vec<NewMember>> {
    let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let entries: Vec<String> = entries.map(|entry| entry.replacen("=http://", "=", 1)).collect();
    ensure!(!entries.is_empty(), "--initial-cluster is empty, expected name=http://host:port,...");
    let member = |(slot, name, address): (u16, &str, &str)| NewMember {
        slot,
        name: name.to_owned(),
        peer_address: address.to_owned(),
        client_urls: client_urls(address, client_port),
        by_hand: true,
    };
    Ok(PeerList::new(&entries)?.entries().map(member).collect())
}

fn client_urls(peer_address: &str, client_port: u16) -> Vec<String> {
    let host = peer_address.rsplit_once(':').map_or("127.0.0.1", |(host, _)| host);
    vec![format!("http://{host}:{client_port}")]
}

/// Makes the directories; see the head of this module. `loading` gives the state, and what stands for the backup that it is from; it is asked
/// when nothing is in the way.
pub async fn restore(
    env: &Env,
    wanted: Restore,
    loading: impl Future<Output = anyhow::Result<(kv::State, [u8; 32])>>,
) -> anyhow::Result<Restored> {
    for (_, directory) in &wanted.directories {
        refuse_used(env, directory)?;
    }
    let (mut state, sha) = loading.await?;
    state.clear_role();
    let plan = Plan::new(&wanted, &sha);
    state.ensure_token_key(|auth| plan.token_key(auth));
    let view = beginning(state, &plan.membership, plan.bump_revision)?;
    let mut made = Vec::new();
    for (slot, directory) in &wanted.directories {
        let member = wanted.members.iter().find(|member| member.slot == *slot);
        let member = member.with_context(|| format!("slot {slot} is not among the members"))?;
        let id = plan.write(env, member, directory, &view).await.with_context(|| {
            format!("{}: the directory is not whole: remove it before trying again", directory.display())
        })?;
        made.push((*slot, id, directory.clone()));
    }
    Ok(Restored { cluster_id: plan.cluster_id, revision: view.kv.revision(), keys: view.kv.key_count(), members: made })
}

fn refuse_used(env: &Env, directory: &Path) -> anyhow::Result<()> {
    if !env.disk.exists(directory) {
        return Ok(());
    }
    let mut names = env.disk.list(directory).with_context(|| format!("{}", directory.display()))?;
    // A fresh file system has one.
    names.retain(|name| name != "lost+found");
    ensure!(
        names.is_empty(),
        "{} holds {:?}: a restore never writes over anything; name an empty or a new directory",
        directory.display(),
        names[0]
    );
    Ok(())
}

/// What a file holds.
pub struct Loaded {
    pub state: kv::State,
    /// Of its content.
    pub sha: [u8; 32],
    /// Of etcd's file, if it is one.
    pub etcd: Option<etcd_file::About>,
}

impl Loaded {
    /// Leases last at least so long before they are kept alive. What is made of it then is another cluster.
    pub fn hold_leases(&mut self, hold: Duration) {
        if !hold.is_zero() {
            let seconds = hold.as_secs().min(kv::TTL_MAX_SECONDS as u64) as i64;
            self.state.hold_leases(seconds);
            self.sha = Sha256::new_with_prefix(self.sha).chain_update(seconds.to_le_bytes()).finalize().into();
        }
    }
}

/// The state in a backup, or in a file of etcd, which is told by its content. With `skip_hash_check` etcd's is believed without its checksum.
pub fn load(env: &Env, file: &Path, skip_hash_check: bool) -> anyhow::Result<Loaded> {
    let name = file.display().to_string();
    let open = env.disk.open(file, OpenMode::Read).with_context(|| format!("{name} cannot be opened"))?;
    let open: Arc<dyn File> = open.into();
    if etcd_file::is_one(&*open) {
        let etcd_file::EtcdFile { state, sha256, about } = etcd_file::load(open, &name, skip_hash_check)?;
        return Ok(Loaded { state, sha: sha256, etcd: Some(about) });
    }
    let sha = backup::verify(&*open, &name)?;
    let (state, _) = raft::load_backup(open, &name)?;
    Ok(Loaded { state, sha, etcd: None })
}

/// The state that all members of a new cluster begin with, which goes on `jump` revisions later.
pub(super) fn beginning(mut state: kv::State, membership: &StoredMembership, jump: i64) -> anyhow::Result<Applied> {
    let version = state.cluster_version();
    ensure!(
        version <= kv::APPLY_VERSION,
        "the backup is of a cluster at version {version}, and this build knows {}: use a newer one",
        kv::APPLY_VERSION
    );
    state.clear_alarms();
    if jump > 0 {
        state.bump_revision(jump).with_context(|| format!("{jump} revisions later is too far"))?;
    }
    let membership = raft::stored_membership_from_pb(Some(membership)).map_err(anyhow::Error::msg)?;
    Ok(Applied { kv: state, log_id: Some(raft::log_id_from_pb(FIRST)), membership })
}

/// What follows from the backup, the token and the options.
struct Plan {
    cluster_id: u64,
    /// By slot.
    ids: Vec<(u16, u64)>,
    membership: StoredMembership,
    bump_revision: i64,
    /// From which all of it was derived.
    all: [u8; 32],
}

impl Plan {
    fn new(wanted: &Restore, sha: &[u8; 32]) -> Self {
        let mut all = Sha256::new();
        let mut add = |part: &[u8]| {
            all.update((part.len() as u64).to_le_bytes());
            all.update(part);
        };
        add(b"quorate restore 1");
        add(sha);
        add(wanted.token.as_bytes());
        add(&wanted.bump_revision.to_le_bytes());
        for member in &wanted.members {
            add(&member.slot.to_le_bytes());
            add(member.name.as_bytes());
            add(member.peer_address.as_bytes());
        }
        let all: [u8; 32] = all.finalize().into();
        let derive = |what: &[u8]| {
            let digest = Sha256::new_with_prefix(all).chain_update(what).finalize();
            u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
        };
        let ids: Vec<(u16, u64)> = wanted
            .members
            .iter()
            .map(|member| (member.slot, identity::mint(derive(&member.slot.to_le_bytes()), member.slot)))
            .collect();
        let members = wanted.members.iter().zip(&ids).map(|(member, (_, id))| membership::Member {
            id: *id,
            node: Some(Node {
                name: member.name.clone(),
                peer_address: member.peer_address.clone(),
                client_urls: member.client_urls.clone(),
                kind: if member.by_hand { node::Kind::Manual } else { node::Kind::Slot }.into(),
                apply_version: kv::apply_version(),
                ..Node::default()
            }),
        });
        let mut members: Vec<membership::Member> = members.collect();
        members.sort_by_key(|member| member.id);
        let mut voters: Vec<u64> = ids.iter().map(|(_, id)| *id).collect();
        voters.sort_unstable();
        let configs = vec![membership::Config { voters }];
        let membership = StoredMembership { log_id: Some(FIRST), membership: Some(Membership { configs, members }) };
        let cluster_id = derive(b"cluster").max(1);
        Self { cluster_id, ids, membership, bump_revision: wanted.bump_revision, all }
    }

    /// The same for members that are restored apart. Who does not have the file does not know the hashes, and cannot make it.
    fn token_key(&self, auth: &kv::Auth) -> Bytes {
        let mut key = Sha256::new_with_prefix(b"quorate: key of tokens 1");
        key.update(self.all);
        for user in auth.users() {
            key.update((user.password_hash.len() as u64).to_le_bytes());
            key.update(&user.password_hash);
        }
        Bytes::copy_from_slice(&key.finalize())
    }

    /// Makes one member's directory; returns its id. The mark that the log exists comes last: until then no server starts on it.
    async fn write(&self, env: &Env, member: &NewMember, root: &Path, view: &Applied) -> anyhow::Result<u64> {
        let (_, id) = self.ids.iter().find(|(slot, _)| *slot == member.slot).expect("a member has an id");
        let this = Member { cluster_id: self.cluster_id, member_id: *id };
        let opened = MemberDir::open(env.disk.clone(), root, u64::from(member.slot), &member.name, || *id)?;
        let mut dir = opened.dir;
        dir.set_cluster(self.cluster_id)?;
        let snapshots = snapshot::Dir::open(env, &dir.snapshot_path(), self.cluster_id)?;
        raft::write_snapshot(&snapshots, this, view)?;
        let owner = Owner { cluster_id: this.cluster_id, member_id: this.member_id };
        let life = env.child();
        let log = Log::create(&life, &dir.log_path(), owner, log::Options::default())?;
        log.close().await;
        life.stop(Duration::from_secs(10)).await;
        env.disk.sync_dir(&dir.path())?;
        dir.mark_log_started()?;
        Ok(*id)
    }
}
