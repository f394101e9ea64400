//! The errors of etcd 3.7's table (`rpctypes`) that can occur without users and without TLS, and why some of them do not occur here.

/// Texts, without `etcdserver: `. A long run must have been given each.
pub const OCCUR: &[&str] = &[
    "key is not provided",
    "key not found",
    "value is provided",
    "lease is provided",
    "too many operations in txn request",
    "duplicate key given in txn request",
    "invalid sort option",
    "mvcc: required revision has been compacted",
    "mvcc: required revision is a future revision",
    "mvcc: database space exceeded",
    "requested lease not found",
    "lease already exists",
    "too large lease TTL",
    "given member URLs are invalid",
    "member not found",
    "can only promote a learner member",
    "request is too large",
    "bad leader transferee",
    "wrong downgrade target version format",
    "invalid downgrade target version",
];

/// Those that do not occur, with the reason.
pub const ELSEWHERE: &[(&str, &str)] = &[
    ("invalid client api version", "only proxies of version 2 gave it"),
    ("watch canceled", "clients give it to themselves"),
    ("member ID already exist", "ids are random"),
    ("Peer URLs already exists", "the addresses of the two differ; tests of the membership have it"),
    ("re-configuration failed due to not enough started members", "members that are added do not start here"),
    ("can only promote a learner member which is in sync with leader", "no learner is added here"),
    ("too many learner members in cluster", "no learner is added here"),
    ("cluster ID mismatch", "between members"),
    ("too many requests", "one request is under way at a time"),
    ("no leader", "a restart is waited for"),
    ("not leader", "the only etcd leads"),
    ("leader changed", "a restart is waited for"),
    ("not capable", "etcd 3.7 gives it to nobody"),
    ("server stopped", "nobody asks a member that ends"),
    ("request timed out", "a restart is waited for"),
    ("request timed out, possibly due to previous leader failure", "a restart is waited for"),
    ("request timed out, possibly due to connection lost", "nothing is cut off"),
    ("request timed out, waiting for the applied index took too long", "a restart is waited for"),
    ("unhealthy cluster", "members that are added do not start here"),
    ("corrupt cluster", "the alarm fences the member for good"),
    ("rpc not supported for learner", "no learner is added here"),
    ("cluster version not found during downgrade", "the version is there from the first moment"),
    ("cluster has a downgrade job in progress", "an etcd under a downgrade is another one"),
    ("no inflight downgrade job", "etcd 3.7 writes it to its log only"),
    ("request canceled", "nobody gives up but those who wait for another"),
    ("context deadline exceeded", "nobody gives up but those who wait for another"),
];

/// RPCs of which a success would change the two in different ways, or is a matter of how many members there are.
pub const REFUSED_ONLY: &[&str] = &[
    "Cluster/MemberAdd",
    "Cluster/MemberRemove",
    "Cluster/MemberUpdate",
    "Cluster/MemberPromote",
    "Maintenance/MoveLeader",
];
