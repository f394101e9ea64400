//! Every condition that there is: its name, how urgent it is, and what to do.
//!
//! Names are stable: metrics, Events, scripts and the sections of `docs/runbook.md` are called by them. A test below holds that file to
//! this table. Absent: when a condition holds (`find`).

use std::time::Duration;

/// How urgent a condition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It is as it was asked for, or passes by itself, and should be known.
    Note,
    /// Somebody should look, today.
    Warning,
    /// Clients are refused, or data is at risk.
    Error,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }

    /// Of a name that a member has told; who tells another one is newer, and what it means cannot be known.
    pub fn of(name: &str) -> Self {
        [Self::Note, Self::Error].into_iter().find(|severity| severity.name() == name).unwrap_or(Self::Warning)
    }
}

/// One condition.
#[derive(Debug)]
pub struct Kind {
    pub name: &'static str,
    pub severity: Severity,
    /// It counts after it has held for so long: what passes by itself within that is none.
    pub after: Duration,
    /// Its sentence says something new when it changes, and is then logged again, once a minute at most. Numbers in the others change
    /// all the time.
    pub follows: bool,
    /// All members find it alike, so that only the leader makes an Event of it.
    pub shared: bool,
    pub remedy: &'static str,
}

const fn kind(name: &'static str, severity: Severity, after_seconds: u64, remedy: &'static str) -> Kind {
    Kind { name, severity, after: Duration::from_secs(after_seconds), follows: false, shared: false, remedy }
}

impl Kind {
    const fn shared(mut self) -> Self {
        self.shared = true;
        self
    }

    const fn follows(mut self) -> Self {
        self.follows = true;
        self
    }
}

use Severity::{Error, Note, Warning};

pub static NO_LEADER: Kind = kind(
    "no-leader",
    Error,
    0,
    "start the members that are missing, or let them reach one another; only if a majority of disks is lost for good, `quorate recover`",
)
.follows();
pub static CORRUPT: Kind = kind(
    "corrupt",
    Error,
    0,
    "stop that member, delete its data directory and start it, if the others are a majority; else compare the members first \
     (`etcdctl endpoint hashkv --cluster`); `quorate alarm disarm` takes the alarm off",
)
.shared()
.follows();
pub static DATA_DIFFERS: Kind = kind(
    "data-differs",
    Error,
    0,
    "compare the members (`etcdctl endpoint hashkv --cluster`), and delete the data directory of the wrong one; delete none without a \
     backup of another",
);
pub static NOSPACE: Kind = kind(
    "nospace",
    Error,
    0,
    "delete keys and compact, give the disk space, or raise storage.quota_bytes; then `quorate alarm disarm` if somebody has put the alarm on",
)
.shared()
.follows();
pub static SUPERSEDED: Kind = kind(
    "superseded",
    Error,
    0,
    "let clients go to the other cluster; then make this one its standby, with empty disks and restore.follow, or delete it",
)
.shared()
.follows();
pub static MEMBER_DEAD: Kind = kind(
    "member-dead",
    Error,
    5,
    "look at its process, its machine and the network between; if its disk is lost, start it with an empty one and it is replaced",
);
pub static CHANGE_BLOCKED: Kind = kind(
    "change-blocked",
    Warning,
    5,
    "do what the sentence asks for; nothing is lost by waiting, and the change then goes on by itself",
);
pub static SLOTS_MISSING: Kind = kind(
    "slots-missing",
    Warning,
    20,
    "start the members of these slots and look at what they say (`quorate status`, their log), or set a smaller size",
);
pub static NO_CLUSTER: Kind = kind(
    "no-cluster",
    Warning,
    15,
    "start whom it waits for, and check names, ports and network policies between them",
)
.follows();
pub static MEMBER_SLOW: Kind = kind(
    "member-slow",
    Warning,
    5,
    "look at the load and the disk of its machine (slow-fsync), and at the network to it",
);
pub static LAG: Kind = kind(
    "lag",
    Warning,
    10,
    "it catches up by itself if its disk and network are faster than what is written; if it does not, look at both",
);
pub static QUOTA_NEARLY_FULL: Kind = kind(
    "quota-nearly-full",
    Warning,
    0,
    "compact (storage.compaction_mode does it by itself), delete keys, or raise storage.quota_bytes and the memory limit",
)
.shared();
pub static DISK_NEARLY_FULL: Kind = kind(
    "disk-nearly-full",
    Warning,
    0,
    "give the file system of server.data_dir more space, or remove what else lies there",
)
.follows();
pub static SLOW_FSYNC: Kind = kind(
    "slow-fsync",
    Warning,
    5,
    "give it a faster disk, or one of its own; else set raft.heartbeat_interval to ten times that or more, and the election timeouts to match",
);
pub static LONG_LOG: Kind = kind(
    "long-log",
    Warning,
    60,
    "look in its log for why no snapshot is written: a disk that is full or too slow for what is written",
);
pub static CERTIFICATE_ENDS: Kind =
    kind("certificate-ends", Warning, 0, "replace its file: it is read anew within seconds, without a restart")
        .follows();
pub static TLS_FILES: Kind =
    kind("tls-files", Warning, 0, "correct the files; they are read anew by themselves, and at SIGHUP at once")
        .follows();
pub static WANTED_UNKNOWN: Kind = kind(
    "wanted-unknown",
    Warning,
    0,
    "do what the sentence asks for: mostly the Role, its binding, or a NetworkPolicy; nobody is removed meanwhile",
)
.follows();
pub static BACKUP_LATE: Kind = kind(
    "backup-late",
    Warning,
    0,
    "look at the store and at the way to it (`quorate backup status`); what is written meanwhile is kept in the log, up to twice its bound",
)
.shared()
.follows();
pub static STANDBY_BEHIND: Kind = kind(
    "standby-behind",
    Warning,
    0,
    "do what the sentence asks for: mostly the store, the way to it, or the source's own backups (`quorate backup status`); promoted now it lacks \
     what was written since",
)
.shared()
.follows();
pub static OIDC_KEYS: Kind = kind(
    "oidc-keys",
    Warning,
    0,
    "let this member reach the issuer, and check the settings below [oidc]; users of this store work meanwhile",
)
.follows();
pub static AUTH_FILE: Kind =
    kind("auth-file", Warning, 0, "correct the file; it is read anew by itself, and at SIGHUP at once").follows();
pub static AUTH_BOOTSTRAP: Kind =
    kind("auth-bootstrap", Warning, 5, "give all voters the same file; it is carried out when they say so").follows();
pub static TLS_PLAIN: Kind =
    kind("tls-plain", Note, 0, "it ends when all members have TLS and peer_tls.plain is until-all or refuse");
pub static MIXED_VERSIONS: Kind = kind(
    "mixed-versions",
    Note,
    5,
    "finish the upgrade, or roll it back: what the newer build has is off until all members run it",
);
pub static LOADING: Kind = kind("loading", Note, 0, "wait: it serves when it has read its disk and caught up");
pub static STANDBY: Kind = kind(
    "standby",
    Note,
    0,
    "nothing; if the cluster that it follows is gone, `quorate promote` lets clients write here",
)
.shared();
pub static ONE_VOTER: Kind =
    kind("one-voter", Note, 10, "for data that must survive a disk, run three members; and back up");
pub static EVEN_VOTERS: Kind = kind(
    "even-voters",
    Note,
    10,
    "add one member or remove one: an odd number survives as many failures with fewer disks",
);
pub static MEMBER_AWAITED: Kind =
    kind("member-awaited", Note, 0, "start a node with an empty disk at that address, or `quorate member remove` it");
pub static TWO_SIZES: Kind = kind("two-sizes", Note, 0, "`quorate member scale --unset` ends it");
pub static SHUTDOWN: Kind =
    kind("shutdown", Note, 0, "nothing, if that is meant; else scale the StatefulSet up: no member was removed");

/// In the order in which they are shown: the most urgent first.
pub static KINDS: &[&Kind] = &[
    &NO_LEADER,
    &CORRUPT,
    &DATA_DIFFERS,
    &NOSPACE,
    &SUPERSEDED,
    &MEMBER_DEAD,
    &CHANGE_BLOCKED,
    &SLOTS_MISSING,
    &NO_CLUSTER,
    &MEMBER_SLOW,
    &LAG,
    &QUOTA_NEARLY_FULL,
    &DISK_NEARLY_FULL,
    &SLOW_FSYNC,
    &LONG_LOG,
    &CERTIFICATE_ENDS,
    &TLS_FILES,
    &WANTED_UNKNOWN,
    &BACKUP_LATE,
    &STANDBY_BEHIND,
    &OIDC_KEYS,
    &AUTH_FILE,
    &AUTH_BOOTSTRAP,
    &TLS_PLAIN,
    &MIXED_VERSIONS,
    &LOADING,
    &STANDBY,
    &ONE_VOTER,
    &EVEN_VOTERS,
    &MEMBER_AWAITED,
    &TWO_SIZES,
    &SHUTDOWN,
];

/// Its place in the order; who is not known comes last.
pub fn rank(name: &str) -> usize {
    KINDS.iter().position(|kind| kind.name == name).unwrap_or(KINDS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_condition_has_a_section_in_the_runbook_and_none_else() {
        let text = include_str!("../../docs/runbook.md");
        let mut sections: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("### ")).collect();
        let mut names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        for part in text.split("\n### ").skip(1) {
            let name = part.lines().next().unwrap_or_default();
            for word in ["**It means**", "**Check**", "**Do**"] {
                assert!(part.contains(word), "{name} lacks {word}");
            }
        }
        sections.sort_unstable();
        names.sort_unstable();
        assert_eq!(sections, names);
    }

    #[test]
    fn the_most_urgent_come_first_and_no_name_is_twice() {
        let severities: Vec<Severity> = KINDS.iter().map(|kind| kind.severity).collect();
        assert!(severities.is_sorted_by(|a, b| a >= b), "{severities:?}");
        let names: std::collections::BTreeSet<&str> = KINDS.iter().map(|kind| kind.name).collect();
        assert_eq!(names.len(), KINDS.len());
        let told = |severity: Severity| Severity::of(severity.name()) == severity;
        assert!([Note, Warning, Error].into_iter().all(told) && Severity::of("dire") == Warning);
    }
}
