//! Conditions: each fault is caused on real processes, and every place is asked what it says of it.
//!
//! With `QUORATE_CONDITIONS_FILE` set, what was seen is written there: `docs/conditions.md` is that file. Absent: which conditions follow from
//! which facts (unit tests of `conditions::find`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;

use quorate::env::fail::{SLOW_LOAD_VARIABLE, SLOW_SYNC_VARIABLE};
use quorate::pb::etcd::alarm_request::AlarmAction;
use quorate::pb::etcd::{AlarmRequest, AlarmType, PutRequest};
use serde_json::Value;

use crate::support::cluster::{Cluster, binary, http_get, wait_for};
use crate::support::pki::Pki;

const PLACES: [&str; 8] =
    ["page", "status", "status -o json", "member why", "/cluster", "/readyz?verbose", "Status.errors", "metric"];

/// What one place says of a condition.
type Said = BTreeMap<&'static str, String>;

/// A fault: its name for people, the condition, where it is asked, and what its sentence must hold.
struct Fault<'a> {
    cause: &'a str,
    name: &'a str,
    severity: &'a str,
    slot: u64,
    parts: &'a [&'a str],
}

/// Runs the client against one pod's status port; what it prints and its exit code.
async fn client(cluster: &Cluster, slot: u64, args: &[&str]) -> (String, i32) {
    let endpoint = cluster.status_endpoint(slot);
    let args = [args, &["--endpoints", &endpoint]].concat();
    let output = tokio::process::Command::new(binary()).args(args).output().await.unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (text, output.status.code().unwrap_or(-1))
}

fn find<'a>(list: &'a Value, name: &str) -> Option<&'a Value> {
    list["conditions"].as_array()?.iter().find(|condition| condition["name"] == name)
}

/// The lines of a text that tell of it: the one that names it and the one after.
fn lines_of(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines().skip_while(|line| !line.contains(&format!("[{name}]")));
    let first = lines.next()?.to_owned();
    Some(match lines.next().filter(|next| next.starts_with("    ")) {
        Some(next) => format!("{first}\n{next}"),
        None => first,
    })
}

/// A page's text without its markup.
fn plain(html: &str) -> String {
    let mut text = String::new();
    let mut inside = true;
    for c in html.chars() {
        match c {
            '<' => inside = false,
            '>' => inside = true,
            c if inside => text.push(c),
            _ => {}
        }
    }
    text.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
}

/// What every place says now; `Err` names one that does not say it.
async fn ask(cluster: &Cluster, fault: &Fault<'_>) -> Result<Said, String> {
    let Fault { name, severity, slot, .. } = *fault;
    let get = async |path: &str| {
        http_get(&cluster.status_endpoint(slot), path).await.map(|(_, text)| text).map_err(|error| error.to_string())
    };
    let missing = |place: &str, text: &str| format!("{place} does not tell of {name}: {text}");
    let mut said = Said::new();
    let page = get("/").await?;
    let article = page.split("<article").skip(1).find(|part| part.contains(&format!("<h3>{name} ")));
    let article = article.and_then(|part| part.split_once('>')?.1.split("</article>").next());
    said.insert(
        "page",
        plain(&article.ok_or_else(|| missing("page", &page))?.replace("</h3><p>", ": ").replace("</p><p", ". <p")),
    );
    let (text, code) = client(cluster, slot, &["status"]).await;
    said.insert("status", lines_of(&text, name).ok_or_else(|| missing("status", &text))?);
    if severity == "error" && code != 2 {
        return Err(format!("status ends with {code}: {text}"));
    }
    let (text, _) = client(cluster, slot, &["status", "-o", "json"]).await;
    let json: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
    said.insert("status -o json", find(&json, name).ok_or_else(|| missing("status -o json", &text))?.to_string());
    let (text, _) = client(cluster, slot, &["member", "why"]).await;
    said.insert("member why", lines_of(&text, name).ok_or_else(|| missing("member why", &text))?);
    let text = get("/cluster").await?;
    let json: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
    said.insert("/cluster", find(&json, name).ok_or_else(|| missing("/cluster", &text))?.to_string());
    let text = get("/readyz?verbose").await?;
    said.insert("/readyz?verbose", lines_of(&text, name).ok_or_else(|| missing("/readyz", &text))?);
    let errors = cluster.status(slot).await.map_err(|status| status.to_string())?.errors;
    let error = errors.iter().find(|error| error.starts_with(&format!("[{name}]")));
    match (error, severity) {
        (None, "note") => drop(said.insert("Status.errors", "(nothing: it is no error)".into())),
        (Some(error), severity) if severity != "note" => drop(said.insert("Status.errors", error.clone())),
        _ => return Err(missing("Status.errors", &format!("{errors:?}"))),
    }
    let text = get("/metrics").await?;
    let on = format!("quorate_condition{{name=\"{name}\",severity=\"{severity}\"}} 1");
    let since = format!("quorate_condition_since_timestamp_seconds{{name=\"{name}\"}} ");
    let since = text.lines().find(|line| line.starts_with(&since)).ok_or_else(|| missing("metric", &text))?;
    let on = text.lines().find(|line| **line == on).ok_or_else(|| missing("metric", &text))?;
    said.insert("metric", format!("{on}\n{since}"));
    Ok(said)
}

/// Waits until every place tells of it in the same words, with what to do and where more is said.
async fn told_everywhere(cluster: &Cluster, fault: Fault<'_>) {
    let said = wait_for(&format!("{} to be told everywhere", fault.name), async || {
        let said = ask(cluster, &fault).await?;
        for place in PLACES {
            let text = &said[place];
            // The metric has the name, which is the runbook's anchor.
            let speaks = place != "metric" && !text.starts_with("(nothing");
            let parts = fault.parts.iter().copied().chain(["docs/runbook.md#", "since", fault.name]);
            if let Some(part) = parts.filter(|_| speaks).find(|part| !text.contains(part)) {
                return Err(format!("{place} does not say {part:?} of {}:\n{text}", fault.name));
            }
        }
        Ok(said)
    })
    .await;
    record(cluster, &fault, &said);
}

/// In the log of the pod: one line when it begins.
async fn logged(cluster: &Cluster, slot: u64, name: &str) -> String {
    cluster.wait_logged(slot, &["condition begins", &format!("name=\"{name}\"")]).await
}

/// Writes down what was seen, for the documentation.
fn record(cluster: &Cluster, fault: &Fault<'_>, said: &Said) {
    static FILE: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut part = format!("\n## {}: {}\n\n```text\n", fault.name, fault.cause);
    for place in PLACES {
        let _ = writeln!(part, "{place}:\n  {}", said[place].trim_end().replace('\n', "\n  "));
    }
    let log = cluster.log_text(fault.slot);
    let line = log
        .lines()
        .find(|line| line.contains("condition begins") && line.contains(&format!("name=\"{}\"", fault.name)));
    let _ = writeln!(part, "log:\n  {}\n```", line.unwrap_or("(in the log of whoever has found it)"));
    println!("{part}");
    let Ok(path) = std::env::var("QUORATE_CONDITIONS_FILE") else { return };
    let mut parts = FILE.lock().unwrap();
    parts.insert(fault.name.to_owned(), part);
    let head = "# What each place says, fault by fault\n\nEach fault was caused on real processes by `tests/it/conditions.rs`, which wrote this file \
                (`QUORATE_CONDITIONS_FILE=docs/conditions.md cargo test --test it conditions`)\nand fails if a place does not say it. Times, ids and \
                addresses are those of that run. What to do about each is in [runbook.md](runbook.md).\n";
    std::fs::write(path, format!("{head}{}", parts.values().cloned().collect::<String>())).unwrap();
}

fn alarm(action: AlarmAction, member_id: u64) -> AlarmRequest {
    let mut alarm = AlarmRequest { member_id, ..AlarmRequest::default() };
    alarm.set_action(action);
    alarm.set_alarm(AlarmType::Corrupt);
    alarm
}

/// What a busy machine may bring about by itself.
const OF_THE_MACHINE: [&str; 3] = ["slow-fsync", "member-slow", "disk-nearly-full"];

fn is_of_the_machine(text: &str) -> bool {
    OF_THE_MACHINE.iter().any(|name| text.contains(name))
}

/// Waits until nothing is the matter, as all of `slots` see it.
async fn wait_none(cluster: &Cluster, slots: impl IntoIterator<Item = u64>) {
    for slot in slots {
        wait_for(&format!("kv-{slot} to know of no condition"), async || {
            let (_, text) =
                http_get(&cluster.status_endpoint(slot), "/cluster").await.map_err(|error| error.to_string())?;
            let json: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            let names = json["conditions"].as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
            let errors = cluster.status(slot).await.map_err(|status| status.to_string())?.errors;
            let told = names.chain(errors.iter().map(String::as_str)).filter(|text| !is_of_the_machine(text));
            if told.count() == 0 { Ok(()) } else { Err(text) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_member_and_the_loss_of_a_majority_are_told_everywhere() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    wait_none(&cluster, 0..3).await;
    let (text, code) = client(&cluster, leader, &["status"]).await;
    assert!(code == 0 && text.ends_with("conditions: none\n") || is_of_the_machine(&text), "{code} {text}");
    for slot in 0..3 {
        let log = cluster.log_text(slot);
        let told = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
        let told: Vec<&str> = log.lines().filter(told).filter(|line| !is_of_the_machine(line)).collect();
        assert_eq!(told, [""; 0], "a healthy start warns of nothing");
    }
    let dead = (leader + 1) % 3;
    let other = (leader + 2) % 3;
    let name = format!("kv-{dead} (voter, ");
    cluster.kill(dead);
    for slot in [leader, other] {
        let parts = [
            &name[..],
            "does not answer",
            "of 3 voters 2 are there, and 0 more may fail",
            "start it with an empty one",
        ];
        let (cause, name) = ("one of three is killed", "member-dead");
        told_everywhere(&cluster, Fault { cause, name, severity: "error", slot, parts: &parts }).await;
    }
    logged(&cluster, leader, "member-dead").await;
    cluster.start_pod(dead);
    cluster.wait_formed().await;
    cluster.wait_logged(leader, &["condition ends", "name=\"member-dead\"", "lasted="]).await;
    wait_none(&cluster, 0..3).await;

    let leader = cluster.wait_formed().await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.kill(one);
    cluster.kill(two);
    let parts = [
        "1 of 2 needed voters are there",
        &format!("kv-{one}"),
        &format!("kv-{two}"),
        "start the members that are missing",
    ];
    let (cause, name) = ("two of three are killed", "no-leader");
    told_everywhere(&cluster, Fault { cause, name, severity: "error", slot: leader, parts: &parts }).await;
    logged(&cluster, leader, "no-leader").await;
}

/// How long the lines of a log are counted: `QUORATE_LINES_SECONDS`, in `.ci/long lines` ten minutes.
fn lines_seconds() -> u64 {
    std::env::var("QUORATE_LINES_SECONDS").map_or(10, |text| text.parse().unwrap())
}

/// Puts one key after the other for the time of [`lines_seconds`]; returns what the log of each of these members has had since `before`,
/// but for what a busy machine may bring about.
async fn new_lines(cluster: &Cluster, slots: &[u64], before: &[usize]) -> Vec<Vec<String>> {
    let seconds = lines_seconds();
    let begin = std::time::Instant::now();
    let mut n = 0;
    while begin.elapsed().as_secs() < seconds {
        n += 1;
        cluster.put(slots[0], &format!("k{}", n % 100), "v").await;
    }
    let of_one = |(slot, before): (&u64, &usize)| {
        let all: Vec<String> = cluster.log_text(*slot).lines().skip(*before).map(str::to_owned).collect();
        println!("kv-{slot}: {} lines, {} bytes in {seconds} s and {n} puts", all.len(), all.join("\n").len());
        all.into_iter().filter(|line| !is_of_the_machine(line) && !line.contains("slow request")).collect()
    };
    slots.iter().zip(before).map(of_one).collect()
}

fn lines_now(cluster: &Cluster, slots: &[u64]) -> Vec<usize> {
    slots.iter().map(|slot| cluster.log_text(*slot).lines().count()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_member_writes_few_lines_on_the_others() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    let dead = (leader + 1) % 3;
    let others = [leader, (leader + 2) % 3];
    let before = lines_now(&cluster, &others);
    cluster.kill(dead);
    logged(&cluster, leader, "member-dead").await;
    for lines in new_lines(&cluster, &others, &before).await {
        assert!(lines.len() < 5, "{}", lines.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_cluster_under_load_writes_no_line() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.wait_formed().await;
    wait_none(&cluster, 0..3).await;
    let all = [leader, (leader + 1) % 3, (leader + 2) % 3];
    // The last line of a start. Members serve before.
    wait_for("the cluster version to be raised", async || {
        let raised = |slot: &u64| cluster.log_text(*slot).contains("cluster version raised");
        if all.iter().any(raised) { Ok(()) } else { Err("it is not") }
    })
    .await;
    let term = async || cluster.status(leader).await.unwrap().raft_term;
    for _ in 0..3 {
        let (begun, before) = (term().await, lines_now(&cluster, &all));
        let lines = new_lines(&cluster, &all, &before).await.concat();
        // A busy machine may bring about an election, which is no secret.
        if term().await == begun {
            assert!(lines.is_empty(), "{}", lines.join("\n"));
            return;
        }
    }
    panic!("an election each time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_fills_up_is_told_before_and_when_puts_are_refused() {
    let mut cluster = Cluster::new(3);
    cluster.set("storage.quota_bytes", "1MiB");
    cluster.start_all().await;
    let put = async |key: String, bytes: usize| {
        let put = PutRequest { key: key.into(), value: vec![b'x'; bytes].into(), ..Default::default() };
        cluster.kv(0).put(put).await.map(drop)
    };
    for n in 0..9 {
        put(format!("k{n}"), 100_000).await.unwrap();
    }
    let (cause, name) = ("data over 80 % of its quota", "quota-nearly-full");
    let parts = ["% of its quota of 1.0 MiB", "raise storage.quota_bytes"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 1, parts: &parts }).await;
    wait_for("a put to be refused", async || match put("more".into(), 200_000).await {
        Err(status) if status.message().contains("space exceeded") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let (cause, name) = ("a put that the quota leaves no room for", "nospace");
    let parts = ["puts are refused (alarm NOSPACE)", "of 1.0 MiB", "delete keys and compact"];
    told_everywhere(&cluster, Fault { cause, name, severity: "error", slot: 0, parts: &parts }).await;
    logged(&cluster, 0, "nospace").await;
}

/// A minute long: no backup is late before.
#[tokio::test(flavor = "multi_thread")]
async fn backups_that_cannot_be_written_are_told_everywhere() {
    let directory = tempfile::tempdir().unwrap();
    let occupied = directory.path().join("backups");
    std::fs::write(&occupied, "no directory").unwrap();
    let mut cluster = Cluster::new(3);
    cluster.set("backup.url", occupied.to_str().unwrap()).set("backup.interval", "1s");
    let begin = std::time::Instant::now();
    let leader = cluster.start_all().await;
    wait_for("most of the minute to pass in which nothing is late", async || {
        let (_, text) =
            http_get(&cluster.status_endpoint(leader), "/cluster").await.map_err(|error| error.to_string())?;
        let passed = begin.elapsed();
        assert!(!text.contains("backup-late") || passed.as_secs() >= 60, "after {passed:?}: {text}");
        if passed.as_secs() >= 50 { Ok(()) } else { Err(format!("{passed:?}")) }
    })
    .await;
    let (cause, name) = ("a file lies where backups go", "backup-late");
    let parts = ["no backup was made yet", occupied.to_str().unwrap(), "quorate backup status"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: leader, parts: &parts }).await;
    logged(&cluster, leader, name).await;
    std::fs::remove_file(&occupied).unwrap();
    wait_none(&cluster, 0..3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_member_is_told_everywhere() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.start_all().await;
    let (fenced, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let id = cluster.member_id(fenced).await;
    wait_for("the alarm to be taken", async || {
        cluster.maintenance(leader).alarm(alarm(AlarmAction::Activate, id)).await.map_err(|status| status.to_string())
    })
    .await;
    let (cause, name) = ("alarm CORRUPT for one of three", "corrupt");
    for (slot, part) in [(other, format!("kv-{fenced}")), (fenced, "differs from the majority's".to_owned())] {
        let parts = [&part[..], "alarm CORRUPT", "delete its data directory"];
        told_everywhere(&cluster, Fault { cause, name, severity: "error", slot, parts: &parts }).await;
    }
    logged(&cluster, fenced, "corrupt").await;
    cluster.maintenance(leader).alarm(alarm(AlarmAction::Deactivate, id)).await.unwrap();
    wait_none(&cluster, 0..3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_that_are_not_reached_are_told_everywhere() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.failure_timeout", "2s").set("cluster.promote_after", "100ms");
    cluster.start_all().await;
    let scale = async |cluster: &Cluster, replicas: &str| {
        wait_for("a new size to be taken", async || {
            let text = cluster.client(&["member", "scale", replicas]).await;
            if text.starts_with("wanted:") { Ok(()) } else { Err(text) }
        })
        .await;
    };
    scale(&cluster, "5").await;
    let (cause, name) = ("five members are wanted, and three exist", "slots-missing");
    let parts =
        ["5 members are wanted, slots 0 to 4 (from command)", "none has come for slot 3, 4", "or set a smaller size"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 1, parts: &parts }).await;
    cluster.kill(1);
    scale(&cluster, "2").await;
    let (cause, name) = ("two members are wanted while one of them is dead", "change-blocked");
    let parts = ["2 healthy, caught-up voters of the new configuration, 1 are", "scale back to 3", "(rule: quorum)"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 0, parts: &parts }).await;
    cluster.start_pod(1);
    cluster.wait_voters(0..2).await;
    let (cause, name) = ("two members vote", "even-voters");
    told_everywhere(&cluster, Fault { cause, name, severity: "note", slot: 0, parts: &["survive the loss of none"] })
        .await;
    let text = cluster.wait_http(0, "/cluster", 200, &["was removed: its slot is not wanted: slots 0 to 1 are"]).await;
    assert!(text.contains(" leads, in term "), "{text}");
    cluster.wait_http(0, "/", 200, &["was removed: its slot is not wanted"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_voter_and_a_disk_with_little_left_are_told_everywhere() {
    let mut cluster = Cluster::new(1);
    let stat = rustix::fs::statvfs(cluster.root()).unwrap();
    let half = stat.f_bavail * stat.f_frsize / 2;
    cluster.set("storage.disk_reserve", &format!("{}MiB", half >> 20));
    cluster.start_all().await;
    let (cause, name) = ("a cluster of one", "one-voter");
    told_everywhere(
        &cluster,
        Fault { cause, name, severity: "note", slot: 0, parts: &["one member votes", "run three members"] },
    )
    .await;
    let (cause, name) = ("a disk with less than three reserves left", "disk-nearly-full");
    let parts = ["the disk of kv-0 is nearly full", "more space"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 0, parts: &parts }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_is_told_everywhere() {
    // Each put waits for both.
    let mut cluster = Cluster::new(2);
    cluster.start_pod_with(1, &[(SLOW_SYNC_VARIABLE, "20")]);
    let leader = cluster.start_all().await;
    for n in 0..150 {
        cluster.put(leader, &format!("k{n}"), "v").await;
    }
    let (cause, name) = ("the log of one of two syncs 20 ms longer", "slow-fsync");
    let parts = ["kv-1: a sync of its log takes", "with a heartbeat of 100 ms", "give it a faster disk"];
    for slot in [1, 0] {
        told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot, parts: &parts }).await;
    }
    logged(&cluster, 1, "slow-fsync").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_ends_soon_is_told_everywhere() {
    let mut cluster = Cluster::new(1);
    let pki = Pki::new(&cluster.root().join("members"));
    let address = cluster.peer_address(0);
    pki.peer_for("kv-0", address.rsplit_once(':').unwrap().0, "48h");
    cluster.set("peer_tls.mode", "files").set("peer_tls.ca_file", &pki.path("ca.crt"));
    cluster.set("peer_tls.cert_file", &pki.path("kv-0.crt")).set("peer_tls.key_file", &pki.path("kv-0.key"));
    cluster.start_all().await;
    let (cause, name) = ("the certificate of the peer port ends in two days", "certificate-ends");
    let parts = ["peer_tls", "ends", "replace its file"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 0, parts: &parts }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_differ_are_told_everywhere() {
    let mut cluster = Cluster::new(3);
    cluster.start_pod_with(2, &[("QUORATE_TEST_APPLY_VERSION", "2")]);
    cluster.start_all().await;
    let (cause, name) = ("one of three runs an older build", "mixed-versions");
    let parts = ["members run different builds", "if kv-2 ran the newest", "finish the upgrade"];
    told_everywhere(&cluster, Fault { cause, name, severity: "note", slot: 0, parts: &parts }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_waits_or_loads_is_told_everywhere() {
    let mut cluster = Cluster::new(2);
    cluster.start_pod(0);
    let (cause, name) = ("the first of two is started alone", "no-cluster");
    let parts = ["kv-0 waits for slot 1", "start whom it waits for"];
    told_everywhere(&cluster, Fault { cause, name, severity: "warning", slot: 0, parts: &parts }).await;
    cluster.start_all().await;
    for key in 0..300 {
        cluster.put(0, &format!("k{key:03}"), &"x".repeat(20_000)).await;
    }
    cluster.terminate(1).await;
    cluster.start_pod_with(1, &[(SLOW_LOAD_VARIABLE, "200")]);
    cluster.wait_unready(1, &["loads its state: "]).await;
    let (cause, name) = ("a member reads a large disk", "loading");
    let parts = ["kv-1 loads its state: ", " MiB", "wait"];
    told_everywhere(&cluster, Fault { cause, name, severity: "note", slot: 1, parts: &parts }).await;
}

/// A request that takes long is told of: a lock on a follower that is stopped keeps the leader from a majority.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_request_is_one_line_with_its_keys_and_what_it_waited_for() {
    let mut cluster = Cluster::new(2);
    cluster.set("telemetry.slow_request", "50ms");
    let leader = cluster.start_all().await;
    cluster.put(leader, "warm", "v").await;
    let other = 1 - leader;
    cluster.signal(other, rustix::process::Signal::STOP);
    let put = PutRequest { key: "a/key".into(), value: "secret-value".into(), ..Default::default() };
    let mut kv = cluster.kv(leader);
    let waiting = tokio::spawn(async move { kv.put(put).await });
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    cluster.signal(other, rustix::process::Signal::CONT);
    // Whether it went through or not.
    let _ = waiting.await.unwrap();
    let line =
        cluster.wait_logged(leader, &["slow request", "method=\"Put\"", "key=\"a/key\"", "waited=\"Raft "]).await;
    assert!(!cluster.log_text(leader).contains("secret-value"), "{line}");
}

/// The whole of a cluster in one file, for whoever helps.
#[tokio::test(flavor = "multi_thread")]
async fn a_diagnosis_has_what_every_member_tells_and_no_secret() {
    let mut cluster = Cluster::new(3);
    cluster.set("cluster.token", "a-word-that-is-secret");
    let leader = cluster.start_all().await;
    cluster.put(0, "a-key", "a-value-of-a-client").await;
    let dead = (leader + 1) % 3;
    cluster.kill(dead);
    for slot in (0..3).filter(|slot| *slot != dead) {
        let on = "quorate_condition{name=\"member-dead\",severity=\"error\"} 1";
        cluster.wait_http(slot, "/metrics", 200, &[on]).await;
    }
    let path = cluster.root().join("d.tar");
    let text =
        cluster.command(&["diagnose", "--endpoints", &cluster.endpoint(leader), "--out", path.to_str().unwrap()]).await;
    assert!(text.contains("send this file to whoever helps"), "{text}");
    let bytes = std::fs::read(&path).unwrap();
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = String::new();
        std::io::Read::read_to_string(&mut entry, &mut content).unwrap();
        files.insert(entry.path().unwrap().display().to_string(), content);
    }
    let of = |name: &str| {
        files.get(&format!("quorate-diagnosis/{name}")).unwrap_or_else(|| panic!("{name} of {:?}", files.keys()))
    };
    for slot in (0..3).filter(|slot| *slot != dead) {
        assert!(of(&format!("kv-{slot}/config.toml")).contains("segment_bytes = "));
        assert!(of(&format!("kv-{slot}/config.toml")).contains("(left out)"));
        assert!(of(&format!("kv-{slot}/log.txt")).contains("member starts"));
        assert!(of(&format!("kv-{slot}/files.txt")).contains("/identity"));
        assert!(
            of(&format!("kv-{slot}/metrics.txt"))
                .contains("quorate_condition{name=\"member-dead\",severity=\"error\"} 1")
        );
        assert!(of(&format!("kv-{slot}/conditions.txt")).contains("[member-dead]"));
        assert!(of(&format!("kv-{slot}/membership.json")).contains("\"conditions\":[{"));
    }
    assert!(of("status.txt").contains("[member-dead]") && of("status.json").contains("member-dead"));
    assert!(of("notes.txt").contains("refused"), "{}", of("notes.txt"));
    for (name, content) in &files {
        assert!(!content.contains("a-word-that-is-secret") && !content.contains("a-value-of-a-client"), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_without_a_script_and_loads_nothing_of_others() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    for slot in 0..3 {
        let facts = [
            "kv-0",
            "kv-1",
            "kv-2",
            "leads; 3 of 3 voters are there",
            "serves clients",
            "<svg",
            "writes",
            "log sync p99",
        ];
        let page = cluster.wait_http(slot, "/", 200, &facts).await;
        let scripts: Vec<&str> = page.split("<script").skip(1).map(|part| part.split_once('>').unwrap().0).collect();
        assert_eq!(scripts, [" src=\"/console.js\" defer"], "no script within the page");
        for outside in ["https://", " style=", "onload", "src=\"h", "url("] {
            assert!(!page.contains(outside), "{outside}: {page}");
        }
    }
    for (path, part) in [("/console.js", "DOMParser"), ("/console.css", "prefers-color-scheme")] {
        cluster.wait_http(0, path, 200, &[part]).await;
    }
    let head = crate::support::cluster::http_head(&cluster.status_endpoint(0), "/").await;
    assert!(
        head.contains("script-src 'self'") && head.contains("default-src 'none'") && !head.contains("unsafe"),
        "{head}"
    );
}
