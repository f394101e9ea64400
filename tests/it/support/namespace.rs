//! Namespaces: a network that can be cut between pods, and disks of a size, which nobody outside sees.
//!
//! [`enter`] runs the program again with a network and mounts of its own, so that all of it is gone with the program. There each
//! pod gets a network namespace with one address, on one bridge with the program's; a cut is a rule at the receiving end for packets
//! of one sender, so that either direction can be cut alone. Linux, `unshare`, `ip` and `iptables` are needed, but not root.
//! Absent: delays (`tc netem` is not everywhere), and cuts between pods and clients.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

/// In the environment of a program that has entered.
const ENTERED: &str = "QUORATE_TEST_NAMESPACES";
/// The first three bytes of every address: the network has no other.
const PREFIX: &str = "10.77.0";
const BRIDGE: &str = "quorate";
const UNSHARE: [&str; 4] = ["--map-root-user", "--net", "--mount", "--"];

/// How packets are kept out.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    /// They vanish: whoever sends waits.
    Silent,
    /// The sender's connection is reset.
    Reset,
}

/// Begins this program anew in namespaces of its own; returns at once in the program that was so begun. Says what is missing if
/// that cannot be.
pub fn enter() -> Result<(), String> {
    if has_entered() {
        return Ok(());
    }
    let probe = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link add probe type bridge && ip netns add probe && \
                 ip netns exec probe iptables -A INPUT -s 10.0.0.1 -j DROP";
    let output = Command::new("unshare").args(UNSHARE).args(["sh", "-c", probe]).output();
    let output = output.map_err(|error| format!("`unshare` cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(format!("namespaces cannot be made here: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let error =
        Command::new("unshare").args(UNSHARE).arg(program).args(std::env::args_os().skip(1)).env(ENTERED, "1").exec();
    Err(format!("`unshare` cannot be run: {error}"))
}

pub fn has_entered() -> bool {
    std::env::var_os(ENTERED).is_some()
}

/// Mounts a file system of `bytes` in memory at `dir`, for this program alone.
pub fn mount_small(dir: &Path, bytes: u64) {
    run(
        "mount",
        ["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"].map(OsStr::new).into_iter().chain([dir.as_os_str()]),
    );
}

pub fn unmount(dir: &Path) {
    run("umount", ["--lazy".as_ref(), dir.as_os_str()]);
}

/// The network of a program that has entered; there is one.
pub struct Wires(());

impl Wires {
    pub fn new() -> Self {
        assert!(has_entered(), "only a program with a network of its own may wire it");
        run("mount", ["-t", "tmpfs", "tmpfs", "/run"]);
        std::fs::create_dir("/run/netns").unwrap();
        ip("link set lo up");
        ip(&format!("link add {BRIDGE} type bridge"));
        ip(&format!("addr add {PREFIX}.250/24 dev {BRIDGE}"));
        ip(&format!("link set {BRIDGE} up"));
        Self(())
    }

    /// Address `n` of the network; 250 is the program's own.
    pub fn address(n: u8) -> String {
        format!("{PREFIX}.{n}")
    }

    /// A new, empty network namespace for the pod, at `address`.
    pub fn attach(&self, pod: &str, address: &str) {
        // What an earlier pod of this name has left; the link first, for a namespace goes later than it says.
        for former in [["link", "del", &format!("v-{pod}")], ["netns", "del", pod]] {
            let _ = Command::new("ip").args(former).output();
        }
        ip(&format!("netns add {pod}"));
        ip(&format!("link add v-{pod} type veth peer name eth0 netns {pod}"));
        ip(&format!("link set v-{pod} master {BRIDGE} up"));
        ip(&format!("-n {pod} addr add {address}/24 dev eth0"));
        ip(&format!("-n {pod} link set eth0 up"));
        ip(&format!("-n {pod} link set lo up"));
    }

    /// `program`, to be run in the pod's network.
    pub fn command(&self, pod: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", pod]).arg(program);
        command
    }

    /// What `from` sends does not reach `pod` any more.
    pub fn cut(&self, pod: &str, from: &str, cut: Cut) {
        let what = match cut {
            Cut::Silent => "DROP",
            Cut::Reset => "REJECT --reject-with tcp-reset",
        };
        ip(&format!("netns exec {pod} iptables -A INPUT -p tcp -s {from} -j {what}"));
    }

    /// Everything reaches the pod again.
    pub fn mend(&self, pod: &str) {
        ip(&format!("netns exec {pod} iptables -F INPUT"));
    }
}

fn ip(args: &str) {
    run("ip", args.split(' '));
}

#[track_caller]
fn run(program: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) {
    let mut command = Command::new(program);
    let Output { status, stderr, .. } = command.args(args).output().unwrap();
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
}
