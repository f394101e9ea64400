//! One fault after another, to a StatefulSet of three as Kubernetes' controller, kubelet and DNS play it.
//!
//! Half of the faults of one member hit the one that leads. No disk is lost: whatever happens, the same three members must go on,
//! under their ids, with all that they have acknowledged.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fastrand::Rng;
use quorate::testing::verdict::Violation;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::process::Signal;

use crate::crowd::Crowd;
use crate::support::cluster::wait_for;
use crate::support::namespace::Cut;
use crate::support::statefulset::StatefulSet;

const SIZE: u64 = 3;
const CLIENTS: u64 = 6;
const DISK_BYTES: u64 = 192 << 20;
/// What is left of a full disk at most: below the reserve puts are refused, and at nothing the member ends.
const LEFT_BYTES_MAX: u64 = 24 << 20;

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// SIGKILL; the kubelet starts the container again.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Stop,
    /// The pod is deleted (SIGTERM), and made anew at another address.
    Delete,
    /// A sync fails: the member must end by itself.
    FailedSync,
    /// The process dies in the middle of a write, of which some sectors have arrived.
    TornWrite,
    /// Almost no space is left for a while, or none.
    FullDisk,
    /// Two members do not reach one another.
    Cut,
    /// What one member sends does not reach another; the other way is open.
    OneWay,
    /// One member reaches no other; its clients reach it.
    Isolation,
}

const EVERYWHERE: [Fault; 5] = [Fault::Kill, Fault::Stop, Fault::Delete, Fault::FailedSync, Fault::TornWrite];
const IN_NAMESPACES: [Fault; 4] = [Fault::FullDisk, Fault::Cut, Fault::OneWay, Fault::Isolation];

struct Nemesis {
    set: StatefulSet,
    rng: Rng,
    counts: BTreeMap<String, u64>,
}

/// `lacking`: why this program has no namespaces of its own.
pub async fn run(duration: Duration, seed: u64, lacking: Option<String>) -> Result<(), Violation> {
    let mut faults = EVERYWHERE.to_vec();
    // Small, so that segments rotate, logs are purged and laggards need snapshots.
    let mut blueprint = StatefulSet::quick(SIZE)
        .set("log.segment_bytes", "4MiB")
        .set("log.bytes_max", "16MiB")
        .set("log.entries_max", "2000")
        .set("log.entries_kept", "100")
        .set("storage.disk_reserve", "16MiB");
    match &lacking {
        None => {
            faults.extend(IN_NAMESPACES);
            blueprint = blueprint.wired().disk_bytes(DISK_BYTES);
        }
        Some(why) => println!("without partitions and full disks: {why}"),
    }
    let set = blueprint.start().await;
    let ids = ids(&set).await;
    let addresses = set.addresses();
    let mut crowd = Crowd::new(SIZE as usize, move |member| Some(format!("{}:2379", addresses(member as u64)?)));
    let mut nemesis = Nemesis { set, rng: Rng::with_seed(seed), counts: BTreeMap::new() };
    crowd.start(&mut nemesis.rng, CLIENTS);
    let begun = Instant::now();
    while begun.elapsed() < duration {
        nemesis.pause(1500).await;
        let fault = *nemesis.rng.choice(&faults).expect("there are faults");
        nemesis.suffer(fault, &crowd, begun).await;
    }
    nemesis.set.wait_ready().await;
    nemesis.set.wait_voters(0..SIZE).await;
    crowd.stop().await;
    let all: u64 = nemesis.counts.values().sum();
    println!("faults: {all} in {:.0?}", begun.elapsed());
    nemesis.counts.iter().for_each(|(what, count)| println!("{count:>6}  {what}"));
    let now = self::ids(&nemesis.set).await;
    if now != ids {
        return Err(Violation::new("identity kept", format!("members were {ids:x?} and are {now:x?}")));
    }
    crowd.judge(&format!("faults, seed {seed}")).await
}

async fn ids(set: &StatefulSet) -> Vec<(u64, u64)> {
    let mut ids = Vec::new();
    for ordinal in 0..SIZE {
        ids.push(set.ids(ordinal).await);
    }
    ids
}

impl Nemesis {
    async fn pause(&mut self, most_millis: u64) {
        tokio::time::sleep(Duration::from_millis(self.rng.u64(..most_millis))).await;
    }

    /// A member, in half of all cases the one that leads if one does.
    async fn victim(&mut self, crowd: &Crowd) -> u64 {
        let (asked, leads) = (self.rng.u64(..SIZE), self.rng.bool());
        match crowd.clients.status(asked as usize).await {
            Ok(status) if leads && status.leader != 0 => status.leader & 0xffff,
            _ => asked,
        }
    }

    async fn suffer(&mut self, fault: Fault, crowd: &Crowd, begun: Instant) {
        let victim = self.victim(crowd).await;
        let mut victims = vec![victim];
        // What only stops members may stop them all.
        if matches!(fault, Fault::Kill | Fault::Stop | Fault::FullDisk) {
            victims.extend((0..SIZE).filter(|other| *other != victim));
            victims.truncate(*self.rng.choice(&[1, 1, 1, 2, 3]).expect("one of five"));
        }
        let other = (victim + self.rng.u64(1..SIZE)) % SIZE;
        if matches!(fault, Fault::Cut | Fault::OneWay) {
            victims.push(other);
        }
        println!("{:>7.1} s  {fault:?} {victims:?}", begun.elapsed().as_secs_f64());
        *self.counts.entry(format!("{fault:?} of {}", victims.len())).or_default() += 1;
        match fault {
            Fault::Kill => victims.iter().for_each(|ordinal| self.set.crash(*ordinal)),
            Fault::Stop => {
                victims.iter().for_each(|ordinal| self.set.signal(*ordinal, Signal::STOP));
                self.pause(4000).await;
                victims.iter().for_each(|ordinal| self.set.signal(*ordinal, Signal::CONT));
            }
            Fault::Delete => {
                self.set.delete_pod(victim);
                self.set.wait_ready().await;
            }
            Fault::FailedSync => self.end_by_disk(victim, "sync").await,
            Fault::TornWrite => {
                let torn = format!("torn {}", self.rng.u64(..));
                self.end_by_disk(victim, &torn).await;
            }
            Fault::FullDisk => self.fill_disks(&victims).await,
            Fault::Cut => self.cut(&[(victim, other), (other, victim)]).await,
            Fault::OneWay => self.cut(&[(victim, other)]).await,
            Fault::Isolation => {
                let others = (0..SIZE).filter(|other| *other != victim);
                let both: Vec<_> = others.flat_map(|other| [(victim, other), (other, victim)]).collect();
                self.cut(&both).await;
            }
        }
    }

    /// From whom nothing arrives at whom.
    async fn cut(&mut self, ways: &[(u64, u64)]) {
        let how = if self.rng.bool() { Cut::Silent } else { Cut::Reset };
        ways.iter().for_each(|(from, to)| self.set.cut(*from, *to, how));
        self.pause(5000).await;
        self.set.mend();
    }

    async fn fill_disks(&mut self, victims: &[u64]) {
        let ballast = |set: &StatefulSet, ordinal| set.disk(ordinal).join("ballast");
        for ordinal in victims {
            let stat = statvfs(self.set.disk(*ordinal)).expect("a disk says what is free");
            let free = stat.f_bavail * stat.f_frsize;
            let file = std::fs::File::create(ballast(&self.set, *ordinal)).expect("a file can be made");
            // What the member takes meanwhile is not there: then the disk is full all the same.
            let _ = fallocate(&file, FallocateFlags::empty(), 0, free.saturating_sub(self.rng.u64(..LEFT_BYTES_MAX)));
        }
        self.pause(5000).await;
        for ordinal in victims {
            std::fs::remove_file(ballast(&self.set, *ordinal)).expect("it is there");
        }
    }

    /// A fault of the disk that the process must not survive.
    async fn end_by_disk(&mut self, ordinal: u64, fault: &str) {
        self.set.wait_ready().await;
        let pid = self.set.pid(ordinal);
        self.set.fail_disk(ordinal, fault);
        wait_for(&format!("kv-{ordinal} to end after `{fault}`"), async || {
            let now = self.set.pid(ordinal);
            if now == pid { Err(format!("{now:?} runs")) } else { Ok(()) }
        })
        .await;
    }
}
