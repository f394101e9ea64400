//! What happens to the simulated cluster: faults of machines, disks, network and clocks, one after another, by the seed.
//!
//! Invariants: no fault takes more than the promises allow. A disk is lost or damaged only while the cluster is whole, one at a
//! time, and the next fault waits until its member is back; whatever only stops members may stop them all.
//! Absent: loss and duplication of single messages: streams are TCP's, which repairs both; what is left of them are delays and
//! broken connections.

use std::path::Path;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::world::{MEMBERS_MAX, World, ip};
use super::{Run, Violation};
use crate::env::sim::{SimDisk, trace};
use crate::env::{Disk as _, sleep, timeout};
use crate::storage::log::damage::{self, Way};
use crate::testing::history::{Action, Outcome, Request, Span};

/// A fault that waits for a disk to be used does not wait longer.
const FAULT_PATIENCE: Duration = Duration::from_secs(1);
const FAULTS: usize = 7;
/// Twice what the simulated members' logs hold before they are purged.
const FALL_BEHIND_PUTS: usize = 32;
const FALL_BEHIND_BYTES: usize = 4 << 10;

/// What happens to the cluster.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The power fails after so many more changes to each disk; the members come back one after another.
    PowerLoss { members: Vec<usize>, changes: Vec<u64> },
    /// A sync fails: the member must stop by itself.
    DiskError { member: usize },
    /// No space is left for a while; a member may stop by itself.
    DiskFull { member: usize, millis: u64 },
    /// Flushes take up to `most_millis` for a while.
    DiskSlow { member: usize, most_millis: u64, millis: u64 },
    /// The disk is replaced by an empty one.
    DiskLost { member: usize },
    /// A crash, and a bit of a file is another one.
    BitFlip { member: usize },
    /// All crash, and the newest frames of a log are gone: one that wrote on while others were away, and without which they are a
    /// quorum at first.
    LogTailLost { member: usize, way: Way },
    /// An image of the disk that is `millis` old is put back.
    DiskPutBack { member: usize, millis: u64 },
    /// SIGTERM, and a start.
    Restart { member: usize },
    /// Two members do not reach one another.
    Cut { pair: (usize, usize), silent: bool, millis: u64 },
    /// One member reaches no other; its clients still reach it.
    Isolation { member: usize, silent: bool, millis: u64 },
    /// No member reaches another; clients reach them all.
    Split { silent: bool, millis: u64 },
    /// What one member sends to another does not arrive; the other way is open.
    OneWay { pair: (usize, usize), millis: u64 },
    /// Every piece takes up to so long.
    SlowNet { most_millis: u64, millis: u64 },
    /// All connections of a member break, again and again.
    Resets { member: usize, times: u64 },
    /// A member's tasks, disk and network stand still: SIGSTOP, or a clock that jumps.
    Pause { member: usize, millis: u64 },
    /// A client asks the leader to hand over to a random voter.
    Transfer,
    /// Two more members join.
    Grow,
    /// Two members are scaled away.
    Shrink,
}

impl Fault {
    /// As the summary counts it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PowerLoss { members, .. } => {
                ["power loss of 1", "power loss of 2", "power loss of all"][members.len().min(3) - 1]
            }
            Self::DiskError { .. } => "disk error",
            Self::DiskFull { .. } => "disk full",
            Self::DiskSlow { .. } => "disk slow",
            Self::DiskLost { .. } => "disk lost",
            Self::BitFlip { .. } => "bit flip",
            Self::LogTailLost { .. } => "log tail lost",
            Self::DiskPutBack { .. } => "disk put back",
            Self::Restart { .. } => "restart",
            Self::Cut { .. } => "cut of a pair",
            Self::Isolation { .. } => "isolation",
            Self::Split { .. } => "split of all",
            Self::OneWay { .. } => "one-way cut",
            Self::SlowNet { .. } => "slow network",
            Self::Resets { .. } => "connection resets",
            Self::Pause { .. } => "pause",
            Self::Transfer => "leader transfer",
            Self::Grow => "growth to 5",
            Self::Shrink => "shrinking to 3",
        }
    }
}

/// The usual scenario: a cluster under load and a few faults.
pub(super) async fn run(world: &mut World) -> Run {
    world.start_all().await?;
    world.start_clients();
    for _ in 0..FAULTS {
        world.sleep_up_to(Duration::from_millis(1500)).await;
        let fault = world.choose_fault().await?;
        world.suffer(fault).await?;
    }
    world.sleep_up_to(Duration::from_secs(1)).await;
    world.stop_clients().await;
    Ok(())
}

impl World {
    /// Half of the faults of a member hit the one that leads: most can go wrong there.
    async fn victim(&mut self) -> Result<usize, Violation> {
        if self.below(2) == 0
            && let Some((leader, _)) = self.leader().await?
        {
            return Ok(leader);
        }
        Ok(self.any_member())
    }

    pub async fn choose_fault(&mut self) -> Result<Fault, Violation> {
        let member = self.victim().await?;
        let members = self.size();
        let other = (member + 1 + self.below(members as u64 - 1) as usize) % members;
        let (silent, millis) = (self.below(2) == 0, 100 + self.below(4000));
        let changes = || 1 + self.below(12);
        Ok(match self.below(46) {
            0..5 => Fault::PowerLoss { members: vec![member], changes: vec![changes()] },
            5..8 => Fault::PowerLoss { members: vec![member, other], changes: vec![changes(), changes()] },
            8..11 => {
                Fault::PowerLoss { members: (0..members).collect(), changes: (0..members).map(|_| changes()).collect() }
            }
            11 | 12 => Fault::DiskError { member },
            13 => Fault::DiskFull { member, millis },
            14..17 => Fault::DiskSlow { member, most_millis: 10 + self.below(400), millis },
            17 | 18 => Fault::DiskLost { member },
            19..22 => Fault::BitFlip { member },
            22 | 23 => Fault::Restart { member },
            24 | 25 => Fault::Cut { pair: (member, other), silent, millis },
            26..30 => Fault::Isolation { member, silent, millis },
            30 | 31 => Fault::OneWay { pair: (member, other), millis },
            32 => Fault::SlowNet { most_millis: 50 + self.below(450), millis },
            33 => Fault::Resets { member, times: 1 + self.below(8) },
            34..37 => Fault::Pause { member, millis },
            37 | 38 => Fault::Transfer,
            39 => Fault::Split { silent, millis: 2000 + millis },
            40 | 41 => Fault::LogTailLost { member, way: Way::ALL[self.below(3) as usize] },
            42 | 43 => Fault::DiskPutBack { member, millis },
            _ if members < MEMBERS_MAX => Fault::Grow,
            _ => Fault::Shrink,
        })
    }

    pub async fn suffer(&mut self, fault: Fault) -> Run {
        trace::event(format_args!("fault {fault:?}"));
        self.count(&format!("fault: {}", fault.name()), 1);
        match fault {
            Fault::PowerLoss { members, changes } => self.lose_power(members, changes).await,
            Fault::DiskError { member } => self.fail_disk(member).await?,
            Fault::DiskFull { member, millis } => self.fill_disk(member, millis).await?,
            Fault::DiskSlow { member, most_millis, millis } => {
                self.machines[member].disk.set_latency(Duration::from_millis(most_millis));
                sleep(Duration::from_millis(millis)).await;
                self.machines[member].disk.set_latency(Duration::ZERO);
            }
            Fault::DiskLost { member } => {
                self.wait_healed().await?;
                self.crash(member);
                self.wipe(member);
                self.sleep_up_to(Duration::from_secs(2)).await;
                self.start(member);
                self.wait_healed().await?;
            }
            Fault::BitFlip { member } => self.flip_bit(member).await?,
            Fault::LogTailLost { member, way } => self.lose_log_tail(member, way).await?,
            Fault::DiskPutBack { member, millis } => self.put_disk_back(member, Duration::from_millis(millis)).await?,
            Fault::Restart { member } => {
                self.stop(member).await?;
                self.sleep_up_to(Duration::from_secs(1)).await;
                self.start(member);
            }
            Fault::Transfer => self.transfer().await?,
            Fault::Grow => {
                self.wait_healed().await?;
                self.grow().await?;
            }
            Fault::Shrink => {
                self.wait_healed().await?;
                self.shrink().await?;
            }
            Fault::Pause { member, millis } => self.pause(member, Duration::from_millis(millis)).await,
            other => self.suffer_network(other).await,
        }
        self.look_after().await
    }

    async fn suffer_network(&mut self, fault: Fault) {
        let members = self.size();
        match fault {
            Fault::Cut { pair: (a, b), silent, millis } => {
                if silent {
                    self.net.hold(ip(a), ip(b))
                } else {
                    self.net.cut(ip(a), ip(b))
                }
                sleep(Duration::from_millis(millis)).await;
            }
            Fault::Isolation { member, silent, millis } => {
                for other in (0..members).filter(|other| *other != member) {
                    if silent { self.net.hold(ip(member), ip(other)) } else { self.net.cut(ip(member), ip(other)) }
                }
                sleep(Duration::from_millis(millis)).await;
            }
            Fault::Split { silent, millis } => {
                for (a, b) in (0..members).flat_map(|a| (0..a).map(move |b| (a, b))) {
                    if silent { self.net.hold(ip(a), ip(b)) } else { self.net.cut(ip(a), ip(b)) }
                }
                self.note_quorum(1);
                sleep(Duration::from_millis(millis)).await;
            }
            Fault::OneWay { pair: (from, to), millis } => {
                self.net.hold_one_way(ip(from), ip(to));
                sleep(Duration::from_millis(millis)).await;
            }
            Fault::SlowNet { most_millis, millis } => {
                self.net.set_latency(Duration::from_millis(most_millis));
                sleep(Duration::from_millis(millis)).await;
                self.net.set_latency(Duration::from_millis(4));
            }
            Fault::Resets { member, times } => {
                for _ in 0..times {
                    self.net.reset(ip(member));
                    self.sleep_up_to(Duration::from_millis(300)).await;
                }
            }
            other => unreachable!("{other:?} is no fault of the network"),
        }
        self.net.mend();
        self.note_quorum(self.running());
    }

    async fn lose_power(&mut self, members: Vec<usize>, changes: Vec<u64>) {
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

    async fn fail_disk(&mut self, member: usize) -> Run {
        self.machines[member].disk.fail_sync(1 + self.below(5));
        let Some(running) = self.machines[member].running.as_mut() else { return Ok(()) };
        match timeout(FAULT_PATIENCE + Duration::from_secs(30), &mut running.serving).await {
            Ok(Ok(Err(_))) => {}
            Ok(other) => {
                return Err(Violation::new("disk error", format!("member {member} must fail, but: {other:?}")));
            }
            // Nothing was written meanwhile.
            Err(_) => self.count("disk error without use", 1),
        }
        self.crash(member);
        self.start(member);
        Ok(())
    }

    async fn fill_disk(&mut self, member: usize, millis: u64) -> Run {
        let disk = self.machines[member].disk.clone();
        disk.set_capacity(disk.used_bytes() + self.below(128 << 10));
        self.machines[member].excused = true;
        sleep(Duration::from_millis(millis)).await;
        disk.set_capacity(u64::MAX);
        self.look_after().await?;
        self.wait_healed().await
    }

    /// A bit of a file at rest turns: the member must notice, and go on without what it lost or as a new one.
    async fn flip_bit(&mut self, member: usize) -> Run {
        self.wait_healed().await?;
        self.crash(member);
        let files: Vec<_> =
            self.machines[member].disk.files().into_iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
        // The log matters most, and of it what was written last; most of a preallocated file is zeros.
        let logs = files.iter().filter(|(path, bytes)| {
            path.extension().is_some_and(|extension| extension == "log") && bytes.iter().any(|byte| *byte != 0)
        });
        let (path, bytes) = match logs.max_by_key(|(path, _)| path) {
            Some(newest) if self.below(2) == 0 => newest,
            _ => &files[self.below(files.len() as u64) as usize],
        };
        let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        let at = match used.len() as u64 {
            0 => self.below(bytes.len() as u64) as usize,
            count if self.below(2) == 0 => used[(count - 1 - self.below(count.min(2000))) as usize],
            count if self.below(8) > 0 => used[self.below(count) as usize],
            _ => self.below(bytes.len() as u64) as usize,
        };
        trace::event(format_args!("flip {} {at}", path.display()));
        let kind = path.extension().map_or("other", |extension| match extension.to_str() {
            Some("log") => "log",
            Some("snap") => "snapshot",
            _ => "other",
        });
        self.count(&format!("flipped: {kind}"), 1);
        self.machines[member].disk.flip(path, at, 1 << self.below(8));
        // Half of the time nothing but the log can tell what the damaged record said.
        if self.below(2) == 0 {
            self.machines[member].stores = Default::default();
        }
        let machine = &mut self.machines[member];
        (machine.excused, machine.replaced, machine.was_renewed) = (true, true, true);
        self.start(member);
        self.wait_healed().await
    }

    /// What `member` and half of the others have acknowledged, the rest has not heard of; then all crash, and `member` comes back with the
    /// rest alone. It must see that its log once was longer. What its mark names is taken: it may lag by a second after a power loss, and
    /// what nobody noted and nobody remembers is lost unnoticed.
    async fn lose_log_tail(&mut self, member: usize, way: Way) -> Run {
        self.wait_healed().await?;
        let others: Vec<usize> = (0..self.size()).filter(|other| *other != member).collect();
        let (unaware, late) = others.split_at(self.size() / 2);
        for other in unaware {
            self.crash(*other);
        }
        self.sleep_up_to(Duration::from_secs(4)).await;
        for other in late.iter().chain([&member]) {
            self.crash(*other);
        }
        let lost = lose_marked_frames(&self.machines[member].disk, way, self.below(3));
        self.count("log frames lost", lost);
        let machine = &mut self.machines[member];
        (machine.excused, machine.replaced, machine.was_renewed) = (true, true, true);
        for other in unaware.iter().chain([&member]) {
            self.start(*other);
        }
        // It runs, and is not one of a quorum.
        self.note_quorum(unaware.len());
        self.sleep_up_to(Duration::from_secs(6)).await;
        self.look_after().await?;
        self.note_quorum(unaware.len());
        for other in late {
            self.start(*other);
        }
        self.wait_healed().await
    }

    /// The others live on, and remember what this disk has acknowledged.
    async fn put_disk_back(&mut self, member: usize, age: Duration) -> Run {
        self.wait_healed().await?;
        let image = self.machines[member].disk.image();
        sleep(age).await;
        self.crash(member);
        trace::event(format_args!("put back {member}"));
        let id = self_in_use(&image).and_then(|name| u64::from_str_radix(name.strip_prefix("member-")?, 16).ok());
        id.map(|id| self.terms.remove(&id));
        let machine = &mut self.machines[member];
        // Of the state store nothing is left: it may be lost at any time.
        (machine.disk, machine.stores) = (image, Default::default());
        (machine.excused, machine.replaced, machine.was_renewed) = (true, true, true);
        self.start(member);
        self.wait_healed().await
    }

    async fn pause(&mut self, member: usize, time: Duration) {
        let everyone = (0..self.size()).map(ip).chain([std::net::IpAddr::from([10, 0, 1, 1])]);
        let others: Vec<_> = everyone.filter(|other| *other != ip(member)).collect();
        for other in &others {
            self.net.hold(ip(member), *other);
        }
        let gate = self.machines[member].running.as_ref().map(|running| running.env.gate.clone());
        gate.iter().for_each(|gate| gate.close());
        sleep(time).await;
        gate.iter().for_each(|gate| gate.open());
        self.net.mend();
    }

    async fn transfer(&mut self) -> Run {
        if let Some((leader, ids)) = self.leader().await? {
            let target = ids[self.any_member()];
            if target != 0 {
                let moved = self.clients.move_leader(leader, target).await.is_ok();
                self.count(if moved { "transferred" } else { "not transferred" }, 1);
            }
        }
        Ok(())
    }

    /// Compacts everything, if it can.
    pub async fn compact(&self) {
        let member = self.any_member();
        if let Outcome::Answered(answer) = self.ask(member, Request::Do(Action::Get(Span::one("a")))).await {
            self.ask(member, Request::Compact(answer.revision)).await;
        }
    }

    /// What `from` sends to `to` does not arrive while so much is written through `from` that the log is purged behind a snapshot file.
    pub async fn fall_behind(&mut self, from: usize, to: usize) {
        trace::event(format_args!("{to} falls behind {from}"));
        self.net.hold_one_way(ip(from), ip(to));
        for n in 0..FALL_BEHIND_PUTS {
            let value = format!("{}.{n}.{}", self.env.random_u64(), ".".repeat(FALL_BEHIND_BYTES));
            self.ask(from, Request::Do(Action::Put { key: "padding".into(), value })).await;
        }
        // The log is looked at twice a second: then a snapshot is asked for, and then the log is purged.
        sleep(Duration::from_millis(1500)).await;
        self.net.mend();
    }

    /// One put through `member`, which must be acknowledged.
    pub async fn put_through(&self, member: usize) -> Run {
        let value = format!("once.{}", self.env.random_u64());
        let put = Request::Do(Action::Put { key: "once".into(), value });
        match self.ask(member, put).await {
            Outcome::Answered(_) => Ok(()),
            other => Err(Violation::new("available", format!("a put through member {member}: {other}"))),
        }
    }

    /// Whether the disk of `member` holds one self.
    pub(super) fn selves(&self, member: usize) -> usize {
        let names = self.machines[member].disk.list(Path::new("/data")).unwrap_or_default();
        names.iter().filter(|name| name.starts_with("member-")).count()
    }
}

/// The member directory that `current` names.
fn self_in_use(disk: &SimDisk) -> Option<String> {
    let current = disk.read(Path::new("/data/current")).ok()?;
    String::from_utf8_lossy(&current).lines().nth(1).map(str::to_owned)
}

/// Takes the newest frame that the mark names from the log of the self in use, all behind it, and `more` before it; how many. A log without
/// a mark keeps its frames.
fn lose_marked_frames(disk: &SimDisk, way: Way, more: u64) -> u64 {
    let dir = self_in_use(disk).map(|name| Path::new("/data").join(name).join("log"));
    let Some(dir) = dir.filter(|dir| disk.exists(dir)) else { return 0 };
    let frames = damage::frames(disk, &dir).expect("a log at rest can be read");
    let marked = damage::marked_frame(disk, &dir).expect("a mark at rest can be read");
    let Some(marked) = marked.and_then(|marked| frames.iter().position(|end| end.frame == marked)) else { return 0 };
    let Some(kept) = marked.checked_sub(1 + more as usize) else { return 0 };
    damage::lose_behind(disk, &dir, frames[kept], way).expect("a disk at rest can be written");
    (frames.len() - 1 - kept) as u64
}
