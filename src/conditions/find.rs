//! Which conditions hold: pure functions of what the modules below know.
//!
//! Two scopes. [`own`]: of this member, which each finds for itself. [`of_cluster`]: what the leader alone can see. Sentences are for people
//! and say what is so now; what to do stands beside them (`kinds`). Absent: time (`ledger`), and every measurement.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::kinds::*;
use super::ledger::Found;
use crate::cluster::reconcile::{PASSES, Told};
use crate::pb::admin::{Member, MembershipView};
use crate::pb::etcd::{AlarmMember, AlarmType};
use crate::pb::log::{Node, Superseded};

/// Members that a sentence names.
const NAMED_MAX: usize = 10;
/// Entries that the log of a member may lack under load.
const LAG_ENTRIES: u64 = 1024;

/// What this member knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Own {
    pub name: String,
    /// What it reads from its disk, and how far it is.
    pub loading: Option<String>,
    /// What it waits for, in words.
    pub waits: Option<String>,
    /// `None` until it runs Raft.
    pub running: Option<Running>,
    /// Of the files of certificates, by the name of the condition.
    pub tls: Vec<(&'static str, String)>,
    /// Why nobody says how many members there should be.
    pub wanted_unknown: Option<String>,
}

/// What it knows when it runs Raft.
#[derive(Clone, Debug, Default)]
pub struct Running {
    /// It has known no leader for longer than an election takes.
    pub leaderless: bool,
    /// What is the matter with its data.
    pub corrupt: Option<String>,
    /// Alarms that are on.
    pub alarms: Vec<AlarmMember>,
    pub member_id: u64,
    /// Names of members by id.
    pub names: BTreeMap<u64, String>,
    pub space: Space,
    /// The p99 of log syncs, and the heartbeat that it is too slow for.
    pub slow_fsync: Option<(Duration, Duration)>,
    /// Bytes of a log that is far longer than it should be.
    pub long_log: Option<u64>,
}

/// Its space.
#[derive(Clone, Debug, Default)]
pub struct Space {
    pub data_bytes: u64,
    pub quota_bytes: Option<u64>,
    pub is_quota_near: bool,
    pub disk_free_bytes: u64,
    pub disk_reserve_bytes: u64,
    pub is_disk_near: bool,
    pub is_log_full: bool,
    /// It has refused its clients for want of space, or does so now.
    pub is_short: bool,
    /// As leader: the members with disk left are no majority.
    pub is_quorum_low: bool,
}

/// What the leader sees.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    pub view: MembershipView,
    /// What members have told when they were asked last.
    pub told: BTreeMap<u64, Told>,
    pub nodes: BTreeMap<u64, Node>,
    /// Which members' data differs, in words.
    pub audit: Option<String>,
    pub backup_late: Option<String>,
    /// What it follows, if it is a standby, and what is the matter with that.
    pub standby: Option<String>,
    pub standby_behind: Option<String>,
    /// Who was promoted in its place.
    pub superseded: Option<Superseded>,
}

pub fn own(seen: &Own) -> Vec<Found> {
    let mut found = Vec::new();
    let mut add = |kind, sentence: String| found.push(Found::new(kind, seen.name.clone(), sentence));
    if let Some(loading) = &seen.loading {
        add(&LOADING, format!("{} {loading}", seen.name));
    }
    match (&seen.running, &seen.waits, &seen.loading) {
        (None, Some(waits), None) => add(&NO_CLUSTER, format!("{} {waits}", seen.name)),
        (Some(running), waits, _) if running.leaderless => {
            let waits =
                waits.as_deref().unwrap_or("knows no leader: an election is under way, or a majority is not there");
            add(&NO_LEADER, format!("{} {waits}", seen.name));
        }
        _ => {}
    }
    for (name, sentence) in &seen.tls {
        let kind = [&CERTIFICATE_ENDS, &TLS_FILES, &TLS_PLAIN].into_iter().find(|kind| kind.name == *name);
        add(kind.unwrap_or(&TLS_FILES), sentence.clone());
    }
    if let Some(why) = &seen.wanted_unknown {
        add(&WANTED_UNKNOWN, format!("how many members are wanted is not known, so none is removed: {why}"));
    }
    if let Some(running) = &seen.running {
        found.extend(of_data(&seen.name, running));
        found.extend(of_space(&seen.name, running));
    }
    found
}

/// Alarms, and the log.
fn of_data(own: &str, running: &Running) -> Vec<Found> {
    let mut found = Vec::new();
    for alarm in running.alarms.iter().filter(|alarm| alarm.alarm() == AlarmType::Corrupt) {
        let (id, subject) = (alarm.member_id, name_of(running, alarm.member_id));
        let own_words = running.corrupt.clone().filter(|_| id == running.member_id || id == 0);
        let of_other = || match id {
            0 => "alarm CORRUPT is on for the whole cluster, so no member serves data".to_owned(),
            _ => format!("alarm CORRUPT is on for {subject}: its data differs from the majority's, so it serves none"),
        };
        let sentence = own_words.map_or_else(of_other, |words| format!("{own}: {words}"));
        found.push(Found::new(&CORRUPT, subject.clone(), sentence));
    }
    if let Some((p99, heartbeat)) = running.slow_fsync {
        let (p99, heartbeat) = (p99.as_millis(), heartbeat.as_millis());
        let sentence = format!(
            "{own}: a sync of its log takes {p99} ms (p99), with a heartbeat of {heartbeat} ms: writes wait for it, and elections may come of it"
        );
        found.push(Found::new(&SLOW_FSYNC, own, sentence));
    }
    if let Some(bytes) = running.long_log {
        let sentence = format!("{own}: its log has {}, three times what it should at most", mib(bytes));
        found.push(Found::new(&LONG_LOG, own, sentence));
    }
    found
}

fn of_space(own: &str, running: &Running) -> Vec<Found> {
    let space = &running.space;
    let mut found = Vec::new();
    let (data, free, reserve) = (mib(space.data_bytes), mib(space.disk_free_bytes), mib(space.disk_reserve_bytes));
    let quota = space.quota_bytes.map(mib);
    let is_over = space.quota_bytes.is_some_and(|quota| space.data_bytes > quota);
    let nospace: Vec<u64> = running
        .alarms
        .iter()
        .filter(|alarm| alarm.alarm() == AlarmType::Nospace)
        .map(|alarm| alarm.member_id)
        .collect();
    if !nospace.is_empty() || space.is_log_full {
        let cause = match &quota {
            _ if space.is_log_full => format!("the disk of {own} gives its log no more ({free} left)"),
            _ if space.is_quorum_low => "the members whose disks have space are no majority".to_owned(),
            Some(quota) if is_over => format!("the data has {data}, and its quota is {quota}"),
            Some(quota) if space.is_short => {
                format!("{own} was asked for more than the quota leaves: {data} of {quota}")
            }
            _ => {
                let names: Vec<String> = nospace.iter().take(NAMED_MAX).map(|id| name_of(running, *id)).collect();
                format!("the alarm NOSPACE is on for {}", names.join(", "))
            }
        };
        found.push(Found::new(&NOSPACE, "", format!("puts are refused (alarm NOSPACE): {cause}")));
    } else if space.is_quota_near {
        let percent =
            space.quota_bytes.map_or(0, |quota| (u128::from(space.data_bytes) * 100 / u128::from(quota.max(1))) as u64);
        let sentence = format!(
            "the data has {data}, {percent} % of its quota of {}: beyond it puts are refused",
            quota.unwrap_or_default()
        );
        found.push(Found::new(&QUOTA_NEARLY_FULL, own, sentence));
    }
    if space.disk_free_bytes < space.disk_reserve_bytes {
        let sentence = format!(
            "the disk of {own} is full but for its reserve of {reserve}: puts are refused as soon as a majority of members has no more"
        );
        found.push(Found::new(&DISK_NEARLY_FULL, own, sentence));
    } else if space.is_disk_near {
        let sentence = format!("the disk of {own} is nearly full; below a reserve of {reserve} it takes no more puts");
        found.push(Found::new(&DISK_NEARLY_FULL, own, sentence));
    }
    found
}

fn name_of(running: &Running, id: u64) -> String {
    if id == 0 {
        return String::new();
    }
    running.names.get(&id).filter(|name| !name.is_empty()).cloned().unwrap_or_else(|| format!("{id:016x}"))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1048576.0)
}

pub fn of_cluster(seen: &Cluster) -> Vec<Found> {
    let mut found = of_members(seen);
    let view = &seen.view;
    let mut add = |kind, subject: &str, sentence: String| found.push(Found::new(kind, subject, sentence));
    if let Some(blocked) = view.blocked.as_ref().filter(|blocked| !PASSES.contains(&&blocked.name[..])) {
        add(&CHANGE_BLOCKED, &blocked.name, format!("{} (rule: {})", blocked.sentence, blocked.name));
    }
    if let Some(sentence) = missing_slots(view) {
        add(&SLOTS_MISSING, "", sentence);
    }
    if let Some(audit) = &seen.audit {
        add(&DATA_DIFFERS, "", audit.clone());
    }
    if let Some(late) = &seen.backup_late {
        add(&BACKUP_LATE, "", late.clone());
    }
    let of_standby = [(&STANDBY_BEHIND, &seen.standby_behind), (&STANDBY, &seen.standby)];
    for (kind, sentence) in of_standby.into_iter().filter_map(|(kind, sentence)| Some((kind, sentence.as_ref()?))) {
        add(kind, "", sentence.clone());
    }
    if let Some(Superseded { generation, cluster_id }) = seen.superseded {
        add(
            &SUPERSEDED,
            "",
            format!(
                "cluster {cluster_id:016x} was promoted in the place of this one (generation {generation}), which takes no writes any more"
            ),
        );
    }
    if let Some(sentence) = versions(seen) {
        add(&MIXED_VERSIONS, "", sentence);
    }
    match voters(view).count() {
        1 => add(&ONE_VOTER, "", "one member votes: if its disk is lost, the data is".into()),
        2 => add(&EVEN_VOTERS, "", "2 voters survive the loss of none: add a third member, or go back to one".into()),
        n if n > 0 && n.is_multiple_of(2) => {
            add(
                &EVEN_VOTERS,
                "",
                format!("{n} voters survive no more failures than {}: add one, or remove one", n - 1),
            );
        }
        _ => {}
    }
    for remark in &view.remarks {
        let kind = [&TWO_SIZES, &SHUTDOWN].into_iter().find(|kind| kind.name == remark.name);
        // Who cannot know the wanted size says so itself.
        if let Some(kind) = kind {
            add(kind, "", remark.sentence.clone());
        }
    }
    found
}

fn voters(view: &MembershipView) -> impl Iterator<Item = &Member> {
    view.members.iter().filter(|member| matches!(&member.role[..], "leader" | "voter"))
}

/// What people call it.
fn shown(member: &Member) -> String {
    if member.name.is_empty() { format!("{:016x}", member.id) } else { member.name.clone() }
}

fn of_members(seen: &Cluster) -> Vec<Found> {
    let mut found = Vec::new();
    let (all, there) =
        voters(&seen.view).fold((0, 0), |(all, there), voter| (all + 1, there + usize::from(voter.reachable)));
    let more = (there as i64 - (all / 2 + 1) as i64).max(0);
    for member in &seen.view.members {
        let name = shown(member);
        let at = format!("{name} ({}, {})", member.role, member.peer_address);
        if member.role == "awaited" {
            let sentence = format!("no node has come yet for the member that was added at {}", member.peer_address);
            found.push(Found::new(&MEMBER_AWAITED, member.peer_address.clone(), sentence));
            continue;
        }
        let told = seen.told.get(&member.id);
        let loads = told.is_some_and(|told| told.conditions.iter().any(|condition| condition.name == LOADING.name));
        match (member.reachable, told.map(|told| told.silent_why.as_deref())) {
            (true, _) if member.lag_entries > LAG_ENTRIES && !loads => {
                let sentence = format!("{at} is {} log entries behind the leader", member.lag_entries);
                found.push(Found::new(&LAG, name, sentence));
            }
            (true, _) | (false, None) => {}
            // It answers who it is, and no append.
            (false, Some(None)) if !loads => {
                let sentence = format!(
                    "{at} answers, but acknowledges nothing within an election timeout: it does not count for a majority"
                );
                found.push(Found::new(&MEMBER_SLOW, name, sentence));
            }
            (false, Some(None)) => {}
            (false, Some(Some(why))) => {
                let sentence =
                    format!("{at} does not answer: {why}; of {all} voters {there} are there, and {more} more may fail");
                found.push(Found::new(&MEMBER_DEAD, name, sentence));
            }
        }
    }
    found
}

/// Wanted slots that are no member's.
fn missing_slots(view: &MembershipView) -> Option<String> {
    let wanted = view.wanted.as_ref().filter(|wanted| wanted.unknown.is_empty() && wanted.replicas > 0)?;
    let there: BTreeSet<u64> =
        view.members.iter().filter(|member| member.kind == "slot").map(|member| u64::from(member.slot)).collect();
    let mut missing = (wanted.start..wanted.start + wanted.replicas).filter(|slot| !there.contains(slot)).peekable();
    missing.peek()?;
    let named: Vec<String> = missing.by_ref().take(NAMED_MAX).map(|slot| slot.to_string()).collect();
    let rest = if missing.next().is_some() { " and others" } else { "" };
    Some(format!(
        "{} members are wanted, slots {} to {} (from {}); none has come for slot {}{rest}",
        wanted.replicas,
        wanted.start,
        wanted.start + wanted.replicas - 1,
        wanted.origin,
        named.join(", "),
    ))
}

/// Who runs what, if they differ.
fn versions(seen: &Cluster) -> Option<String> {
    let mut programs: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for member in seen.view.members.iter().filter(|member| !member.version.is_empty()) {
        programs.entry(&member.version).or_default().push(shown(member));
    }
    if programs.len() > 1 {
        let all: Vec<String> = programs
            .iter()
            .map(|(version, names)| {
                format!("{} {} {version}", list(names), if names.len() > 1 { "run" } else { "runs" })
            })
            .collect();
        return Some(format!("members run different versions: {}", all.join("; ")));
    }
    let there = || seen.nodes.values().filter(|node| !node.is_awaited());
    let newest = there().map(|node| node.apply_version).max()?;
    let older: Vec<String> = there().filter(|node| node.apply_version < newest).map(|node| node.name.clone()).collect();
    (!older.is_empty()).then(|| {
        let now = seen.view.cluster_version;
        format!(
            "members run different builds: the cluster version is {now}, and {} could be if {} ran the newest",
            newest,
            list(&older)
        )
    })
}

fn list(names: &[String]) -> String {
    let rest = if names.len() > NAMED_MAX { " and others" } else { "" };
    format!("{}{rest}", names[..names.len().min(NAMED_MAX)].join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::admin::{Remark, Wanted};

    fn member(slot: u64, role: &str, change: impl FnOnce(&mut Member)) -> Member {
        let mut member = Member {
            id: 0x10000 | slot,
            name: format!("kv-{slot}"),
            slot: slot as u32,
            role: role.into(),
            kind: "slot".into(),
            peer_address: format!("kv-{slot}:2380"),
            reachable: true,
            version: "0.1.0".into(),
            ..Member::default()
        };
        change(&mut member);
        member
    }

    fn cluster(members: Vec<Member>) -> Cluster {
        Cluster {
            view: MembershipView { members, leader_id: 0x10000, ..MembershipView::default() },
            ..Cluster::default()
        }
    }

    fn names(found: &[Found]) -> Vec<(&str, &str)> {
        found.iter().map(|found| (found.kind.name, &found.subject[..])).collect()
    }

    fn three(change: impl FnOnce(&mut Member)) -> Cluster {
        cluster(vec![member(0, "leader", |_| ()), member(1, "voter", |_| ()), member(2, "voter", change)])
    }

    #[test]
    fn nothing_is_the_matter_with_a_healthy_cluster() {
        assert_eq!(names(&of_cluster(&three(|_| ()))), []);
        let own = own(&Own { name: "kv-0".into(), running: Some(Running::default()), ..Own::default() });
        assert_eq!(names(&own), []);
    }

    #[test]
    fn a_member_that_is_away_is_dead_one_that_acknowledges_nothing_slow_and_one_that_loads_neither() {
        let mut seen = three(|member| member.reachable = false);
        assert_eq!(names(&of_cluster(&seen)), [], "it was not asked yet");
        seen.told.insert(0x10002, Told { silent_why: Some("connection refused".into()), ..Told::default() });
        let found = of_cluster(&seen);
        assert_eq!(names(&found), [("member-dead", "kv-2")]);
        let words =
            "kv-2 (voter, kv-2:2380) does not answer: connection refused; of 3 voters 2 are there, and 0 more may fail";
        assert_eq!(found[0].sentence, words);
        seen.told.insert(0x10002, Told::default());
        assert_eq!(names(&of_cluster(&seen)), [("member-slow", "kv-2")]);
        let loading = crate::pb::admin::Condition { name: "loading".into(), ..Default::default() };
        seen.told.insert(0x10002, Told { conditions: vec![loading], ..Told::default() });
        assert_eq!(names(&of_cluster(&seen)), []);
        assert_eq!(names(&of_cluster(&three(|member| member.lag_entries = 5000))), [("lag", "kv-2")]);
    }

    #[test]
    fn the_membership_is_compared_with_what_is_wanted_and_what_is_wise() {
        let wanted = |replicas| Some(Wanted { origin: "command".into(), replicas, ..Wanted::default() });
        let mut seen = three(|_| ());
        seen.view.wanted = wanted(3);
        assert_eq!(names(&of_cluster(&seen)), []);
        seen.view.wanted = wanted(40);
        let found = of_cluster(&seen);
        assert_eq!(names(&found), [("slots-missing", "")]);
        assert!(
            found[0].sentence.ends_with("for slot 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and others"),
            "{}",
            found[0].sentence
        );
        seen.view.wanted = None;
        seen.view.blocked = Some(Remark { name: "quorum".into(), sentence: "it needs 2".into() });
        seen.view.remarks = vec![Remark { name: "two-sizes".into(), sentence: "both".into() }];
        assert_eq!(names(&of_cluster(&seen)), [("change-blocked", "quorum"), ("two-sizes", "")]);
        let alone = cluster(vec![member(0, "leader", |_| ()), member(1, "learner", |_| ())]);
        assert_eq!(names(&of_cluster(&alone)), [("one-voter", "")]);
        for (count, name) in [(2, Some("even-voters")), (3, None), (4, Some("even-voters")), (5, None)] {
            let members = (0..count).map(|slot| member(slot, if slot == 0 { "leader" } else { "voter" }, |_| ()));
            let found = of_cluster(&cluster(members.collect()));
            assert_eq!(names(&found).first().map(|(name, _)| *name), name, "{count} voters");
        }
    }

    #[test]
    fn versions_that_differ_are_named() {
        let mut seen = three(|member| member.version = "0.2.0".into());
        assert!(of_cluster(&seen)[0].sentence.contains("kv-0, kv-1 run 0.1.0; kv-2 runs 0.2.0"));
        seen = three(|_| ());
        let node =
            |slot: u64, apply_version| (slot, Node { name: format!("kv-{slot}"), apply_version, ..Node::default() });
        seen.nodes = [node(0, 3), node(1, 2)].into();
        assert!(of_cluster(&seen)[0].sentence.ends_with("and 3 could be if kv-1 ran the newest"));
    }

    #[test]
    fn space_says_what_is_short_and_where() {
        let of = |change: fn(&mut Running)| {
            let mut running = Running { member_id: 7, names: [(7, "kv-0".into())].into(), ..Running::default() };
            running.space.quota_bytes = Some(100 << 20);
            change(&mut running);
            own(&Own { name: "kv-0".into(), running: Some(running), ..Own::default() })
        };
        let nospace = |running: &mut Running| {
            let mut alarm = AlarmMember { member_id: 7, ..AlarmMember::default() };
            alarm.set_alarm(AlarmType::Nospace);
            running.alarms.push(alarm);
        };
        let near = of(|running| {
            running.space.data_bytes = 85 << 20;
            running.space.is_quota_near = true;
        });
        assert_eq!(names(&near), [("quota-nearly-full", "kv-0")]);
        assert_eq!(
            near[0].sentence,
            "the data has 85.0 MiB, 85 % of its quota of 100.0 MiB: beyond it puts are refused"
        );
        let mut running = Running { names: [(7, "kv-0".into())].into(), ..Running::default() };
        running.space.quota_bytes = Some(100 << 20);
        nospace(&mut running);
        let words = |running: &Running| {
            own(&Own { name: "kv-0".into(), running: Some(running.clone()), ..Own::default() })[0].sentence.clone()
        };
        assert!(words(&running).ends_with("the alarm NOSPACE is on for kv-0"));
        running.space.data_bytes = 101 << 20;
        assert!(words(&running).ends_with("the data has 101.0 MiB, and its quota is 100.0 MiB"));
        running.space.is_log_full = true;
        assert!(words(&running).contains("the disk of kv-0 gives its log no more"));
        let full = of(|running| running.space.disk_reserve_bytes = 1 << 20);
        assert_eq!(names(&full), [("disk-nearly-full", "kv-0")]);
    }

    #[test]
    fn what_a_member_waits_for_is_said_as_what_it_is() {
        let waits = |running: Option<Running>| {
            own(&Own { name: "kv-0".into(), waits: Some("waits for slot 2".into()), running, ..Own::default() })
        };
        assert_eq!(names(&waits(None)), [("no-cluster", "kv-0")]);
        assert_eq!(names(&waits(Some(Running::default()))), []);
        let leaderless = waits(Some(Running { leaderless: true, ..Running::default() }));
        assert_eq!(
            (names(&leaderless), &leaderless[0].sentence[..]),
            (vec![("no-leader", "kv-0")], "kv-0 waits for slot 2")
        );
        let mut alarm = AlarmMember { member_id: 9, ..AlarmMember::default() };
        alarm.set_alarm(AlarmType::Corrupt);
        let other =
            Running { member_id: 7, alarms: vec![alarm], names: [(9, "kv-2".into())].into(), ..Running::default() };
        let found = own(&Own { name: "kv-0".into(), running: Some(other), ..Own::default() });
        assert_eq!(names(&found), [("corrupt", "kv-2")]);
    }
}
