//! What `/metrics` says, in Prometheus's text form: above all what is read off the member's state.

use std::fmt::{Display, Write as _};

use super::{Api, ETCD_CLUSTER_MINOR, ETCD_VERSION, VERSION};
use crate::conditions::KINDS;
use crate::env::process::{open_files_max, this_process};
use crate::pb::admin::{Condition, RoleUsage};

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        let _ = writeln!(self.0, "{name} {value}");
    }

    /// One that says something by its label.
    fn info(&mut self, name: &str, help: &str, label: &str, text: &str) {
        self.labeled(name, help, label, &[(text, 1)]);
    }

    fn labeled(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.head(name, "gauge", help);
        for (text, value) in values {
            let _ = writeln!(self.0, "{name}{{{label}=\"{text}\"}} {value}");
        }
    }
}

impl Api {
    /// All of `/metrics`: what is read off the member now, and what the process has counted.
    pub fn metrics_text(&self) -> String {
        sampled(self) + &crate::metrics::metrics().text()
    }
}

/// The lines for the member as it is now.
fn sampled(api: &Api) -> String {
    let now = api.sample();
    let mut text = Text(String::with_capacity(8 << 10));
    let t = &mut text;
    let flag = u8::from;
    t.gauge("etcd_server_has_leader", "Whether a leader is known.", flag(now.has_leader));
    t.gauge("etcd_server_is_leader", "Whether this member leads.", flag(now.is_leader));
    t.gauge("etcd_server_is_learner", "Whether this member does not vote.", flag(now.is_learner));
    t.info("etcd_server_id", "This member's id.", "server_id", &format!("{:x}", now.member_id));
    t.info("etcd_server_version", "The level of the etcd API.", "server_version", ETCD_VERSION);
    t.info("etcd_cluster_version", "The level of the etcd API, of the cluster.", "cluster_version", ETCD_CLUSTER_MINOR);
    t.gauge("etcd_server_quota_backend_bytes", "Most bytes of data; -1 without a quota.", now.quota_bytes);
    t.gauge("etcd_server_proposals_committed_total", "The newest committed log index.", now.committed_index);
    t.gauge("etcd_server_proposals_applied_total", "The newest applied log index.", now.applied_index);
    t.gauge("etcd_mvcc_db_total_size_in_bytes", "Bytes of data, old revisions included.", now.data_bytes);
    t.gauge(
        "etcd_mvcc_db_total_size_in_use_in_bytes",
        "Bytes of data in use: all of them, as what is compacted is given back.",
        now.data_in_use_bytes,
    );
    t.head("etcd_debugging_server_alarms", "gauge", "Alarms that are on, by member.");
    for (member, kind) in &now.alarms {
        let labels = format!("server_id=\"{member:x}\",alarm_type=\"{kind}\"");
        let _ = writeln!(t.0, "etcd_debugging_server_alarms{{{labels}}} 1");
    }
    t.gauge("etcd_debugging_mvcc_keys_total", "Keys that exist.", now.keys);
    t.gauge("etcd_debugging_mvcc_current_revision", "The newest revision.", now.revision);
    t.gauge("etcd_debugging_mvcc_compact_revision", "The compacted revision; 0 for none.", now.compacted);

    t.info("quorate_info", "This build.", "version", VERSION);
    t.gauge("quorate_ready", "Whether this member is ready, as /readyz says it.", flag(now.ready));
    t.gauge("quorate_raft_term", "The newest term that was seen.", now.term);
    t.labeled(
        "quorate_members",
        "Members by what they are.",
        "role",
        &[("voter", now.voters), ("learner", now.learners)],
    );
    t.gauge("quorate_cluster_version", "The greatest apply version that may be proposed.", now.cluster_version);
    let alarms = [("NOSPACE", now.alarms_nospace), ("CORRUPT", now.alarms_corrupt)];
    t.labeled("quorate_alarms", "Alarms that are on, by kind.", "alarm", &alarms);
    t.gauge(
        "quorate_disk_free_bytes",
        "Bytes that the file system of the data directory has left.",
        now.disk_free_bytes,
    );
    conditions(t, &api.conditions().list());

    roles(t, &now.roles);

    let process = this_process();
    t.gauge("process_resident_memory_bytes", "Resident memory.", process.resident_bytes);
    t.gauge("process_virtual_memory_bytes", "Virtual memory.", process.virtual_bytes);
    t.gauge("process_open_fds", "Open file descriptors.", process.open_files);
    t.gauge("os_fd_used", "Open file descriptors, as etcd names them.", process.open_files);
    if let Some(limit) = open_files_max() {
        t.gauge("os_fd_limit", "Most open file descriptors.", limit);
    }
    t.gauge("process_start_time_seconds", "When the process began, in seconds since 1970.", process.start_seconds);
    t.head("process_cpu_seconds_total", "counter", "CPU time of user and system together.");
    let _ = writeln!(t.0, "process_cpu_seconds_total {}", process.cpu_seconds);
    #[cfg(feature = "count-allocations")]
    allocations(t);
    text.0
}

fn roles(text: &mut Text, roles: &[RoleUsage]) {
    type Figure = fn(&RoleUsage) -> u64;
    let figures: [(&str, &str, Figure); 4] = [
        ("quorate_role_bytes", "Bytes that are stored under what a role with a quota may write.", |role| role.bytes),
        ("quorate_role_keys", "Keys that exist there.", |role| role.keys),
        ("quorate_role_quota_bytes", "Most bytes there; 0 for no bound.", |role| role.quota.unwrap_or_default().bytes),
        ("quorate_role_quota_keys", "Most keys there; 0 for no bound.", |role| role.quota.unwrap_or_default().keys),
    ];
    for (name, help, figure) in figures.into_iter().filter(|_| !roles.is_empty()) {
        text.head(name, "gauge", help);
        for role in roles {
            // As a label's value is written.
            let label = role.role.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = writeln!(text.0, "{name}{{role=\"{label}\"}} {}", figure(role));
        }
    }
}

/// Every condition that there is, so that an alert on one need not know whether it was ever on.
fn conditions(text: &mut Text, list: &[Condition]) {
    let on = |name: &str| list.iter().filter(|condition| condition.name == name).map(|condition| condition.since).min();
    text.head("quorate_condition", "gauge", "Whether a condition is on, as this member knows it; see docs/runbook.md.");
    for kind in KINDS {
        let (name, severity, on) = (kind.name, kind.severity.name(), u8::from(on(kind.name).is_some()));
        let _ = writeln!(text.0, "quorate_condition{{name=\"{name}\",severity=\"{severity}\"}} {on}");
    }
    let since = "quorate_condition_since_timestamp_seconds";
    text.head(since, "gauge", "Since when a condition is on, in seconds since 1970; absent while it is not.");
    for (kind, at) in KINDS.iter().filter_map(|kind| Some((kind, on(kind.name)?))) {
        let _ = writeln!(text.0, "{since}{{name=\"{}\"}} {at}", kind.name);
    }
}

#[cfg(feature = "count-allocations")]
fn allocations(text: &mut Text) {
    let now = stats_alloc::INSTRUMENTED_SYSTEM.stats();
    for (name, help, value) in [
        ("quorate_allocations_total", "Allocations and reallocations.", now.allocations + now.reallocations),
        ("quorate_allocated_bytes_total", "Bytes that were allocated, freed since or not.", now.bytes_allocated),
    ] {
        text.head(name, "counter", help);
        let _ = writeln!(text.0, "{name} {value}");
    }
}
