//! An etcd process beside a cluster of ours.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use quorate::pb::etcd::RangeRequest;
use quorate::pb::etcd::kv_client::KvClient;
use tonic::transport::{Channel, Endpoint};

use super::cluster::{Cluster, wait_for};

/// An etcd process of one member, with an empty disk. It is killed at the end of the test.
pub struct Etcd {
    child: Child,
    endpoint: String,
    peer: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    /// On an address of `cluster` that no pod has.
    pub async fn start(program: &Path, cluster: &Cluster) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, peer) = (cluster.endpoint(250), cluster.peer_address(250));
        let child = Command::new(program)
            .arg("--data-dir")
            .arg(dir.path())
            // As cheap as it goes: tests add many users.
            .args(["--bcrypt-cost", "4"])
            .args(["--listen-client-urls", &format!("http://{endpoint}")])
            .args(["--advertise-client-urls", &format!("http://{endpoint}")])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &format!("default=http://{peer}"), "--log-level", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Self { child, endpoint, peer, _dir: dir };
        etcd.member_id().await;
        etcd
    }

    /// Its member id, once it serves.
    pub async fn member_id(&self) -> u64 {
        let mut kv = self.kv();
        wait_for("etcd to answer", async || {
            let read = RangeRequest { key: "x".into(), ..Default::default() };
            let answer = kv.range(read).await.map_err(|e| e.message().to_owned())?.into_inner();
            answer.header.map(|header| header.member_id).ok_or_else(|| "it has no header".to_owned())
        })
        .await
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where its peers would find it.
    #[allow(dead_code, reason = "only the example `differ` asks for it")]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.endpoint)).unwrap().connect_lazy()
    }

    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
