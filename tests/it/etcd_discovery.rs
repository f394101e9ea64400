//! Where `quorate etcd` finds members: first members in DNS, and members with several addresses.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, Record};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use crate::support::cluster::{Cluster, binary, wait_for};

/// A name service of one name, until it is dropped.
struct Dns {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Dns {
    /// `targets`: the SRV records of `name`.
    async fn start(name: &str, targets: Vec<(String, u16)>) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (address, name) = (socket.local_addr().unwrap(), Name::from_ascii(name).unwrap());
        let task = tokio::spawn(async move {
            let mut question = [0; 512];
            loop {
                let (bytes, from) = socket.recv_from(&mut question).await.unwrap();
                let asked = Message::from_vec(&question[..bytes]).unwrap();
                socket.send_to(&answer(&asked, &name, &targets).to_vec().unwrap(), from).await.unwrap();
            }
        });
        Self { address, task }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn answer(asked: &Message, name: &Name, targets: &[(String, u16)]) -> Message {
    let mut answer = Message::response(asked.metadata.id, OpCode::Query);
    let query = asked.queries[0].clone();
    if query.name == *name {
        for (host, port) in targets {
            let target = SRV::new(0, 0, *port, Name::from_ascii(host).unwrap());
            answer.add_answer(Record::from_rdata(name.clone(), 60, RData::SRV(target)));
        }
    } else {
        answer.metadata.response_code = ResponseCode::NXDomain;
    }
    answer.add_query(query);
    answer
}

fn member(cluster: &Cluster, slot: u64) -> Command {
    let (client, peer) = (cluster.endpoint(slot), cluster.peer_address(slot));
    let mut command = Command::new(binary());
    command.args(["etcd", "--name", &format!("infra{slot}"), "--data-dir"]).arg(cluster.data_dir(slot)).args([
        format!("--listen-peer-urls=http://{peer}"),
        format!("--listen-client-urls=http://{client}"),
        format!("--advertise-client-urls=http://{client}"),
        format!("--listen-metrics-urls=http://{}", cluster.status_endpoint(slot)),
    ]);
    command
}

/// Its own address is known to one member by the target's name, and to the others by the address behind it.
fn discovering(cluster: &Cluster, slot: u64, dns: SocketAddr, hosts: &Path) -> Command {
    let peer = if slot == 1 { host(slot) + ":2380" } else { cluster.peer_address(slot) };
    let mut command = member(cluster, slot);
    command
        .args(["--discovery-srv=cluster.test", "--discovery-srv-name=mine"])
        .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
        .env("QUORATE_TEST_DNS", dns.to_string())
        .env("QUORATE_TEST_HOSTS", hosts);
    command
}

fn host(slot: u64) -> String {
    // In another order than the slots.
    format!("{}.cluster.test", ["m", "x", "a"][slot as usize])
}

#[tokio::test(flavor = "multi_thread")]
async fn members_find_one_another_in_dns_and_do_not_need_it_later() {
    let mut cluster = Cluster::new(3);
    let hosts = cluster.root().join("hosts");
    let ip = |address: String| address.split(':').next().unwrap().to_owned();
    let lines = (0..3).map(|slot| format!("{} {}\n", ip(cluster.peer_address(slot)), host(slot)));
    std::fs::write(&hosts, lines.collect::<String>()).unwrap();
    let targets = (0..3).map(|slot| (host(slot) + ".", 2380)).collect();
    let dns = Dns::start("_etcd-server-mine._tcp.cluster.test.", targets).await;
    let start = |cluster: &mut Cluster, dns| {
        for slot in 0..3 {
            let command = discovering(cluster, slot, dns, &hosts);
            cluster.start_command(slot, command);
        }
    };
    start(&mut cluster, dns.address);
    cluster.wait_formed().await;
    cluster.put(0, "k", "v").await;
    let members = cluster.members(2).await.unwrap();
    for slot in 0..3 {
        let found = members.iter().find(|member| member.name == format!("infra{slot}")).unwrap();
        let told = if slot == 1 { host(slot) + ":2380" } else { cluster.peer_address(slot) };
        assert_eq!(found.peer_ur_ls, [format!("http://{told}")]);
    }
    let away = dns.address;
    drop(dns);
    cluster.kill_all();
    start(&mut cluster, away);
    cluster.wait_formed().await;
    assert_eq!(cluster.members(1).await.unwrap(), members, "the same members at the same addresses");
    assert_eq!(cluster.get(1, "k").await.as_deref(), Some("v"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_in_dns_ends_with_what_was_asked() {
    let cluster = Cluster::new(1);
    let dns = Dns::start("_etcd-server._tcp.other.test.", vec![("a.other.test.".into(), 2380)]).await;
    for (domain, why) in [
        ("cluster.test", "_etcd-server._tcp.cluster.test: the name has no SRV record"),
        ("other.test", "leads to this member"),
    ] {
        let mut command = member(&cluster, 0);
        command.arg("--discovery-srv").arg(domain).env("QUORATE_TEST_DNS", dns.address.to_string());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(why), "{domain}: {text}");
    }
}

/// A member whose first address is dead is found at its second one.
#[tokio::test(flavor = "multi_thread")]
async fn member_with_several_addresses_shows_all_and_is_dialled_at_the_next_when_one_fails() {
    let mut cluster = Cluster::new(3);
    let second = cluster.peer_address(2).replace(":2380", ":12380");
    let both = format!("http://{},http://{second}", cluster.peer_address(2));
    let list: Vec<String> = (0..2).map(|slot| format!("infra{slot}=http://{}", cluster.peer_address(slot))).collect();
    let list = format!("{},infra2={both}", list.join(","));
    let command = |cluster: &Cluster, slot: u64, listen: &str| {
        let told = if slot == 2 { both.clone() } else { format!("http://{}", cluster.peer_address(slot)) };
        let mut command = member(cluster, slot);
        command.arg(format!("--initial-cluster={list}")).arg(format!("--initial-advertise-peer-urls={told}"));
        if slot == 2 {
            command.arg(format!("--listen-peer-urls={listen}"));
        }
        command
    };
    for slot in 0..3 {
        let command = command(&cluster, slot, &both);
        cluster.start_command(slot, command);
    }
    cluster.wait_formed().await;
    let urls: Vec<&str> = both.split(',').collect();
    wait_for("both URLs in each member's list", async || {
        for slot in 0..3 {
            let members = cluster.members(slot).await.map_err(|status| status.to_string())?;
            let found = members.iter().find(|member| member.name == "infra2").map(|member| &member.peer_ur_ls);
            if found.is_none_or(|found| *found != urls) {
                return Err(format!("{slot}: {found:?}"));
            }
        }
        Ok(())
    })
    .await;
    cluster.kill(2);
    cluster.put(0, "k", "v").await;
    let restarted = command(&cluster, 2, &format!("http://{second}"));
    cluster.start_command(2, restarted);
    cluster.wait_http(2, "/readyz", 200, &[]).await;
    assert_eq!(cluster.get(2, "k").await.as_deref(), Some("v"));
    // It counts for the quorum.
    cluster.kill(1);
    cluster.put(2, "k", "w").await;
}
