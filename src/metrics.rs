//! What a process counts about itself, for `/metrics`.
//!
//! Owns every counter and histogram. One set a process, as the things that they count (bytes, calls, syncs) are a process's; what
//! can be read off the state is not counted here but sampled when somebody looks. The names that etcd's dashboards and alerts read
//! have etcd's meaning; what etcd has no name for begins with `quorate_`.
//! Invariant: counting is one atomic addition, without a lock, a lookup by label or an allocation.
//! Absent: HTTP, and what is sampled (`http`).

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::core::{Collector, Metric as _};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, exponential_buckets,
};

/// Members whose counters are remembered here; ids come and go over the years.
const PEERS_MAX: usize = 256;

/// The gRPC codes by number.
pub const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Kinds of requests, as `etcd_server_request_duration_seconds` tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Range,
    ReadonlyTxn,
    Put,
    DeleteRange,
    Txn,
    Compaction,
    LeaseGrant,
    LeaseRevoke,
    LeaseCheckpoint,
    Alarm,
    ClusterVersionSet,
}

impl RequestKind {
    /// In the order of their numbers; the names are etcd's.
    const ALL: [Self; 11] = [
        Self::Range,
        Self::ReadonlyTxn,
        Self::Put,
        Self::DeleteRange,
        Self::Txn,
        Self::Compaction,
        Self::LeaseGrant,
        Self::LeaseRevoke,
        Self::LeaseCheckpoint,
        Self::Alarm,
        Self::ClusterVersionSet,
    ];
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    /// Changes of leader that this process has seen.
    pub leader_changes: IntCounter,
    /// Proposals that failed, for whatever reason.
    pub proposals_failed: IntCounter,
    /// Proposals that wait for their answer.
    pub proposals_pending: IntGauge,
    /// Syncs of the Raft log.
    pub log_fsync: Histogram,
    /// Checkpoints of the state store.
    pub checkpoint: Histogram,
    /// How late the event loop is.
    pub event_loop_stall: Histogram,
    /// Bytes on connections of clients.
    pub client_sent_bytes: IntCounter,
    pub client_received_bytes: IntCounter,
    /// Bytes of snapshots that clients have asked for.
    pub snapshot_sent_bytes: IntCounter,
    /// Comparisons of the members' states that this process made as leader, and those that found a difference.
    pub self_checks: IntCounter,
    pub self_checks_differing: IntCounter,
    pub log_lines: LogLines,
    /// Requests over the JSON gateway.
    pub gateway_requests: IntCounter,
    pub backup: Backup,
    pub standby: Standby,
    /// What answering on watch streams takes.
    pub watch: Watch,
    /// By [`RequestKind`], those that failed and those that did not.
    requests: Vec<[Histogram; 2]>,
    peer_sent_bytes: IntCounterVec,
    peer_received_bytes: IntCounterVec,
    peer_sent_failures: IntCounterVec,
    peer_round_trip: HistogramVec,
    /// A few: the members that this process has spoken to.
    peers: RwLock<Vec<(u64, Arc<Peer>)>>,
    started: IntCounterVec,
    handled: IntCounterVec,
    handling: HistogramVec,
    tls: TlsOfPorts,
}

/// TLS, by port.
struct TlsOfPorts {
    reloads: IntCounterVec,
    reload_failing: IntGaugeVec,
    handshake_failures: IntCounterVec,
    end: IntGaugeVec,
}

/// What is counted of the TLS of one port.
pub struct Tls {
    pub reloads: IntCounter,
    pub reload_failing: IntGauge,
    pub handshake_failures: IntCounter,
    ends: [IntGauge; 2],
}

/// Whose end is shown.
#[derive(Clone, Copy, Debug)]
pub enum TlsEnd {
    Certificate,
    Ca,
}

/// What making a response of a watch stream takes, by what it tells; the names are etcd's, of its loop that sends.
pub struct Watch {
    events: Histogram,
    per_event: Histogram,
    pub control: Histogram,
    pub progress: Histogram,
}

impl Watch {
    fn new(registry: &Registry) -> Self {
        let histogram = |what: &str, help: &str| {
            let name = format!("etcd_debugging_server_watch_send_loop_{what}_seconds");
            let options =
                HistogramOpts::new(name, format!("Seconds that making a watch stream's response takes: {help}."));
            register(registry, Histogram::with_opts(options.buckets(exponential_buckets(0.001, 2.0, 14).expect(FIXED))))
        };
        Self {
            events: histogram("watch_stream_duration", "of events"),
            per_event: histogram("watch_stream_duration_per_event", "of events, by each of them"),
            control: histogram("control_stream_duration", "of a watcher that is created or cancelled"),
            progress: histogram("progress_duration", "of a progress notice"),
        }
    }

    /// A response with so many events was made.
    pub fn told(&self, events: usize, took: Duration) {
        self.events.observe(took.as_secs_f64());
        self.per_event.observe(took.as_secs_f64() / events.max(1) as f64);
    }
}

/// The counters of one gRPC method.
pub struct Method {
    started: IntCounter,
    handled: Vec<IntCounter>,
    handling: Histogram,
}

const MESSAGE_HEAD_BYTES: usize = 5;

/// The counters of the way to, and from, one member.
pub struct Peer {
    sent_bytes: IntCounter,
    received_bytes: IntCounter,
    pub sent_failures: IntCounter,
    pub round_trip: Histogram,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// The process's one set.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

/// Names and texts are constants, and each is registered once: none of it can fail at run time and not in every test.
const FIXED: &str = "metric names are constant, valid and registered once";

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let made = made.expect(FIXED);
    registry.register(Box::new(made.clone())).expect(FIXED);
    made
}

/// By kind, those that failed and those that did not.
fn requests(registry: &Registry) -> Vec<[Histogram; 2]> {
    let name = "etcd_server_request_duration_seconds";
    let options = HistogramOpts::new(name, "Seconds that a request of each kind takes.");
    let options = options.buckets(exponential_buckets(0.001, 2.0, 14).expect(FIXED));
    let all = register(registry, HistogramVec::new(options, &["type", "success"]));
    let of = |kind: RequestKind| ["false", "true"].map(|is| all.with_label_values(&[&format!("{kind:?}")[..], is]));
    RequestKind::ALL.map(of).to_vec()
}

impl TlsOfPorts {
    fn new(registry: &Registry) -> Self {
        let counters =
            |name: &str, help: &str| register(registry, IntCounterVec::new(Opts::new(name, help), &["port"]));
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        Self {
            reloads: counters("quorate_tls_reloads_total", "Times that new TLS files have come into force."),
            reload_failing: gauges(
                "quorate_tls_reload_failing",
                "1 while the TLS files cannot be used and older ones stay in force.",
                &["port"],
            ),
            handshake_failures: counters("quorate_tls_handshake_failures_total", "TLS handshakes that have failed."),
            end: gauges(
                "quorate_tls_end_timestamp_seconds",
                "When a certificate in force ends, in seconds since 1970.",
                &["port", "what"],
            ),
        }
    }
}

impl Tls {
    /// `seconds` since 1970.
    pub fn end(&self, what: TlsEnd, seconds: i64) {
        self.ends[what as usize].set(seconds);
    }
}

/// Log lines that were not written.
pub struct LogLines {
    /// Nobody read them in time.
    pub lost: IntCounter,
    /// Of the audit log: it could not be written in time.
    pub audit_lost: IntCounter,
    /// They were too many of a kind.
    pub left_out: IntCounter,
}

impl LogLines {
    fn new(r: &Registry) -> Self {
        let counter = |name: &str, help: &str| register(r, IntCounter::new(name, help));
        Self {
            lost: counter(
                "quorate_log_lines_lost_total",
                "Log lines that were lost because standard error was not read in time.",
            ),
            audit_lost: counter(
                "quorate_audit_lines_lost_total",
                "Lines of the audit log that were lost because they could not be written in time.",
            ),
            left_out: counter(
                "quorate_log_lines_left_out_total",
                "Log lines that were left out because the same place had written 30 in a minute.",
            ),
        }
    }
}

/// Backups that the cluster makes of itself; all 0 where it makes none.
pub struct Backup {
    /// 1 while it is this member's turn.
    pub active: IntGauge,
    /// The leader's time, up to which everything is archived; and for how long nothing has been.
    pub archived: IntGauge,
    pub age: IntGauge,
    pub full: IntGauge,
    pub sent_bytes: IntCounter,
    pub records: IntCounter,
    pub fulls: IntCounter,
    pub failures: IntCounter,
}

impl Backup {
    fn new(r: &Registry) -> Self {
        let counter = |name: &str, help: &str| register(r, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| register(r, IntGauge::new(name, help));
        Self {
            active: gauge("quorate_backup_active", "1 on the member whose turn it is to make the backups."),
            archived: gauge(
                "quorate_backup_last_success_timestamp_seconds",
                "Everything that was applied before this time, in seconds since 1970, is archived; every member tells what it has heard.",
            ),
            age: gauge(
                "quorate_backup_age_seconds",
                "How long ago that was, by the leader's clock: what a loss of all disks would cost.",
            ),
            full: gauge(
                "quorate_backup_last_full_timestamp_seconds",
                "When the newest full backup was made, in seconds since 1970.",
            ),
            sent_bytes: counter("quorate_backup_sent_bytes_total", "Bytes of backups that this member has sent."),
            records: counter("quorate_backup_records_total", "Records of changes that this member has archived."),
            fulls: counter("quorate_backup_fulls_total", "Full backups that this member has made."),
            failures: counter("quorate_backup_failures_total", "Times that this member could not make a backup."),
        }
    }
}

/// A standby's part; all 0 where the cluster is none.
pub struct Standby {
    pub is_standby: IntGauge,
    /// The source's time, up to which everything is here; and how long ago that was by this member's clock.
    pub source_time: IntGauge,
    pub age: IntGauge,
    pub records: IntCounter,
    pub failures: IntCounter,
}

impl Standby {
    fn new(r: &Registry) -> Self {
        let counter = |name: &str, help: &str| register(r, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| register(r, IntGauge::new(name, help));
        Self {
            is_standby: gauge(
                "quorate_standby",
                "1 while this cluster follows another one's backups and takes no writes.",
            ),
            source_time: gauge(
                "quorate_standby_source_timestamp_seconds",
                "Everything that was applied at the source before this time, in seconds since 1970 by its clock, is here.",
            ),
            age: gauge(
                "quorate_standby_age_seconds",
                "How long ago that was, by this member's clock; it grows also while nothing is written at the source.",
            ),
            records: counter(
                "quorate_standby_records_total",
                "Records of changes that this member has had applied, as leader.",
            ),
            failures: counter(
                "quorate_standby_failures_total",
                "Times that this member, as leader, could not follow the source.",
            ),
        }
    }
}

impl Metrics {
    fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let counter = |name: &str, help: &str| register(r, IntCounter::new(name, help));
        let counters =
            |name: &str, help: &str, labels: &[&str]| register(r, IntCounterVec::new(Opts::new(name, help), labels));
        let histogram = |name: &str, help: &str, buckets: prometheus::Result<Vec<f64>>| {
            register(r, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.expect(FIXED))))
        };
        let rpc = ["grpc_type", "grpc_service", "grpc_method"];
        let handled = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"];
        let handling = HistogramOpts::new("grpc_server_handling_seconds", "Seconds from a call's begin to its end.");
        let round_trip = HistogramOpts::new(
            "etcd_network_peer_round_trip_time_seconds",
            "Seconds between a heartbeat or append to a member and its answer.",
        );
        let round_trip = round_trip.buckets(exponential_buckets(0.0001, 2.0, 16).expect(FIXED));
        Self {
            leader_changes: counter("etcd_server_leader_changes_seen_total", "Changes of leader that were seen."),
            proposals_failed: counter("etcd_server_proposals_failed_total", "Proposals that failed."),
            proposals_pending: register(
                r,
                IntGauge::new("etcd_server_proposals_pending", "Proposals that wait for their answer."),
            ),
            log_fsync: histogram(
                "etcd_disk_wal_fsync_duration_seconds",
                "Seconds that a sync of the Raft log takes.",
                exponential_buckets(0.0001, 2.0, 16),
            ),
            event_loop_stall: histogram(
                "quorate_event_loop_stall_seconds",
                "Seconds by which a task of the event loop that wants to run every 10 ms runs late.",
                exponential_buckets(0.001, 2.0, 15),
            ),
            checkpoint: histogram(
                "etcd_disk_backend_commit_duration_seconds",
                "Seconds that a checkpoint of the state store takes; requests do not wait for it.",
                exponential_buckets(0.001, 2.0, 14),
            ),
            client_sent_bytes: counter(
                "etcd_network_client_grpc_sent_bytes_total",
                "Bytes sent to clients, HTTP and framing included.",
            ),
            client_received_bytes: counter(
                "etcd_network_client_grpc_received_bytes_total",
                "Bytes received from clients, HTTP and framing included.",
            ),
            snapshot_sent_bytes: counter("quorate_snapshot_sent_bytes_total", "Bytes of backups sent to clients."),
            self_checks: counter("quorate_self_checks_total", "Comparisons of the members' states made as leader."),
            self_checks_differing: counter(
                "quorate_self_checks_differing_total",
                "Comparisons in which members' states differed.",
            ),
            log_lines: LogLines::new(r),
            gateway_requests: counter("quorate_gateway_requests_total", "Requests over the JSON gateway."),
            backup: Backup::new(r),
            standby: Standby::new(r),
            watch: Watch::new(r),
            requests: requests(r),
            peer_sent_bytes: counters("etcd_network_peer_sent_bytes_total", "Bytes sent to a member.", &["To"]),
            peer_received_bytes: counters(
                "etcd_network_peer_received_bytes_total",
                "Bytes received from a member.",
                &["From"],
            ),
            peer_sent_failures: counters(
                "etcd_network_peer_sent_failures_total",
                "Calls to a member that failed.",
                &["To"],
            ),
            peer_round_trip: register(r, HistogramVec::new(round_trip, &["To"])),
            peers: RwLock::default(),
            started: counters("grpc_server_started_total", "Calls that have begun.", &rpc),
            handled: counters("grpc_server_handled_total", "Calls that have ended, by code.", &handled),
            handling: register(r, HistogramVec::new(handling, &rpc)),
            tls: TlsOfPorts::new(r),
            registry,
        }
    }

    /// The counters of a method; `kind` is `unary`, `client_stream`, `server_stream` or `bidi_stream`.
    pub fn method(&self, kind: &str, service: &str, method: &str) -> Method {
        let labels = [kind, service, method];
        let handled = |code: &&str| self.handled.with_label_values(&[kind, service, method, code]);
        Method {
            started: self.started.with_label_values(&labels),
            handled: CODES.iter().map(handled).collect(),
            handling: self.handling.with_label_values(&labels),
        }
    }

    /// The counters of a port's TLS, by the section of its settings.
    pub fn tls(&self, port: &str) -> Tls {
        let all = &self.tls;
        Tls {
            reloads: all.reloads.with_label_values(&[port]),
            reload_failing: all.reload_failing.with_label_values(&[port]),
            handshake_failures: all.handshake_failures.with_label_values(&[port]),
            ends: ["certificate", "ca"].map(|what| all.end.with_label_values(&[port, what])),
        }
    }

    /// A request has ended.
    pub fn request(&self, kind: RequestKind, success: bool, took: Duration) {
        self.requests[kind as usize][usize::from(success)].observe(took.as_secs_f64());
    }

    /// Requests of a kind so far, whatever became of them.
    pub fn counted(&self, kind: RequestKind) -> Counted {
        let [failed, done] = &self.requests[kind as usize];
        Counted::of(failed).plus(&Counted::of(done))
    }

    /// The counters of one member.
    pub fn peer(&self, member_id: u64) -> Arc<Peer> {
        let find = |peers: &[(u64, Arc<Peer>)]| peers.iter().find(|(id, _)| *id == member_id).map(|(_, p)| p.clone());
        if let Some(peer) = find(&self.peers.read()) {
            return peer;
        }
        let id = format!("{member_id:x}");
        let peer = Arc::new(Peer {
            sent_bytes: self.peer_sent_bytes.with_label_values(&[&id]),
            received_bytes: self.peer_received_bytes.with_label_values(&[&id]),
            sent_failures: self.peer_sent_failures.with_label_values(&[&id]),
            round_trip: self.peer_round_trip.with_label_values(&[&id]),
        });
        let mut peers = self.peers.write();
        if peers.len() < PEERS_MAX && find(&peers).is_none() {
            peers.push((member_id, peer.clone()));
        }
        peer
    }

    /// Everything counted, in Prometheus's text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text).expect("a String grows");
        text
    }
}

/// What a histogram has counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    pub count: u64,
    /// Upper bounds, and how many were at most that.
    buckets: Vec<(f64, u64)>,
}

impl Counted {
    pub fn of(histogram: &Histogram) -> Self {
        let metric = histogram.metric();
        let counted = metric.get_histogram();
        let buckets = counted.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
        Self { count: counted.get_sample_count(), buckets: buckets.collect() }
    }

    fn with(&self, other: &Self, both: fn(u64, u64) -> u64) -> Self {
        let buckets = self.buckets.iter().zip(&other.buckets).map(|(a, b)| (a.0, both(a.1, b.1)));
        Self { count: both(self.count, other.count), buckets: buckets.collect() }
    }

    /// Of two histograms with the same buckets.
    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    /// What was counted after `before`.
    pub fn since(&self, before: &Self) -> Self {
        self.with(before, u64::saturating_sub)
    }

    /// The value that `share` of all were at most, within its bucket in proportion, as Prometheus has it; `None` if nothing was counted.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        if self.count == 0 {
            return None;
        }
        let rank = share * self.count as f64;
        let mut low = (0.0, 0);
        for (bound, count) in &self.buckets {
            if *count as f64 >= rank {
                let inside = (rank - low.1 as f64) / (count - low.1).max(1) as f64;
                return Some(low.0 + (bound - low.0) * inside);
            }
            low = (*bound, *count);
        }
        Some(low.0)
    }
}

impl Peer {
    /// A message of so many bytes, and what gRPC puts before it.
    pub fn count_sent(&self, bytes: usize) {
        self.sent_bytes.inc_by((MESSAGE_HEAD_BYTES + bytes) as u64);
    }

    pub fn count_received(&self, bytes: usize) {
        self.received_bytes.inc_by((MESSAGE_HEAD_BYTES + bytes) as u64);
    }
}

impl Method {
    pub fn begin(&self) {
        self.started.inc();
    }

    /// `code` as in gRPC; an unknown one counts as Unknown.
    pub fn end(&self, code: usize, took: Duration) {
        self.handled.get(code).unwrap_or(&self.handled[2]).inc();
        self.handling.observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_most_took_is_known_to_a_bucket() {
        let metrics = Metrics::new();
        let before = metrics.counted(RequestKind::Put);
        assert_eq!(before.quantile(0.99), None);
        for millis in [1.5, 1.5, 1.5, 100.0] {
            metrics.request(RequestKind::Put, true, Duration::from_secs_f64(millis / 1000.0));
        }
        metrics.request(RequestKind::Put, false, Duration::from_micros(1500));
        let put = metrics.counted(RequestKind::Put).since(&before);
        assert_eq!(put.count, 5);
        let (half, most) = (put.quantile(0.5).unwrap(), put.quantile(0.99).unwrap());
        assert!((0.001..=0.002).contains(&half) && (0.064..=0.128).contains(&most), "{half} {most}");
        metrics.request(RequestKind::Put, true, Duration::from_secs(3600));
        let last = metrics.counted(RequestKind::Put).quantile(0.999).unwrap();
        assert!((8.0..9.0).contains(&last), "beyond the last bound is the last bound: {last}");
    }

    #[test]
    fn counted_things_are_in_the_text() {
        let metrics = Metrics::new();
        let method = metrics.method("unary", "etcdserverpb.KV", "Range");
        method.begin();
        method.end(0, Duration::from_millis(3));
        method.end(99, Duration::from_millis(3));
        metrics.peer(0xab).count_sent(7);
        metrics.log_fsync.observe(0.0003);
        for kind in RequestKind::ALL {
            metrics.request(kind, kind != RequestKind::Put, Duration::from_millis(3));
        }
        let text = metrics.text();
        for line in [
            r#"grpc_server_started_total{grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"grpc_server_handled_total{grpc_code="Unknown",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"etcd_server_request_duration_seconds_count{success="false",type="Put"} 1"#,
            r#"etcd_server_request_duration_seconds_count{success="true",type="ClusterVersionSet"} 1"#,
            r#"etcd_network_peer_sent_bytes_total{To="ab"} 12"#,
            r#"etcd_disk_wal_fsync_duration_seconds_bucket{le="0.0004"} 1"#,
            "# TYPE etcd_server_leader_changes_seen_total counter",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
