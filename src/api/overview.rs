//! What the console says of the member that is asked.

use super::{Api, VERSION};
use crate::node::Figures;

/// A member in a few facts, for people.
pub struct Overview {
    pub name: String,
    /// `None`: it serves clients; else why not.
    pub not_ready: Option<String>,
    pub facts: Vec<(&'static str, String)>,
}

impl Api {
    pub fn overview(&self) -> Overview {
        let (facts, not_ready) = (self.facts(), self.not_ready());
        let mut shown = vec![("state", not_ready.clone().unwrap_or_else(|| "serves clients".into()))];
        if let Ok(node) = self.any_node() {
            let raft = node.status();
            let Figures { revision, compacted, keys, bytes, leases, .. } = node.figures();
            shown.extend([
                ("cluster", format!("{:016x}", node.member().cluster_id)),
                ("member", format!("{:016x}", node.member().member_id)),
                ("term", raft.term.to_string()),
                ("committed / applied index", format!("{} / {}", raft.committed_index, raft.applied_index)),
                ("revision / compacted", format!("{revision} / {compacted}")),
                ("keys / leases", format!("{keys} / {leases}")),
                ("data / quota", format!("{} / {}", size(bytes), quota(self.shared.quota_bytes))),
            ]);
        }
        shown.push(("disk free", size(facts.disk_free_bytes)));
        shown.push(("version", VERSION.into()));
        Overview { name: facts.name, not_ready, facts: shown }
    }
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / 1048576.0;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

fn quota(bytes: u64) -> String {
    if bytes == 0 { "none".into() } else { size(bytes) }
}
