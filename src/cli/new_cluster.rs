//! The members of a restored cluster, as flags, and what is printed of it.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use serde_json::json;

use super::output::{Format, id as id_text, json_line, table};
use crate::env::Env;
use crate::server::restore::{self, Restore, Restored};

/// Where the members of the new cluster are.
#[derive(Clone, Debug, clap::Args)]
pub struct NewClusterArgs {
    /// Where to; with several members a directory each below it, named as the member. It must be empty, or not be there
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Peer address of every slot of the new cluster, as in kv-%d.kv-headless:2380 [default: none, a cluster of one]
    #[arg(long, value_name = "PATTERN", default_value = "")]
    peers: String,
    /// Members of the new cluster
    #[arg(long, default_value_t = 1)]
    size: u16,
    /// The lowest slot
    #[arg(long, default_value_t = 0)]
    first_slot: u16,
    /// The members' name, with %d in the slot's place [default: quorate-%d]; with --initial-cluster the one member whose directory is made,
    /// at DIR itself, which needs --token
    #[arg(long)]
    name: Option<String>,
    /// The members of the new cluster by any names, as `quorate etcd` starts them: infra0=http://10.0.1.10:2380,infra1=http://10.0.1.11:2380
    #[arg(long, value_name = "NAME=URL,...", conflicts_with_all = ["peers", "size", "first_slot", "slot"])]
    initial_cluster: Option<String>,
    /// Port that clients use, until the members say otherwise themselves
    #[arg(long, default_value_t = 2379)]
    client_port: u16,
    /// Make only this slot's directory, at DIR itself; needs --token
    #[arg(long, requires = "token")]
    slot: Option<u16>,
    /// A word that was never used for a restore before, the same for all members of this one [default: random]
    #[arg(long, visible_alias = "initial-cluster-token")]
    token: Option<String>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
}

impl NewClusterArgs {
    /// What is to be made; the state goes on so many revisions later.
    pub fn wanted(&self, env: &Env, bump_revision: i64) -> anyhow::Result<Restore> {
        let members = match &self.initial_cluster {
            Some(list) => restore::listed(list, self.client_port)?,
            None => {
                let name = self.name.as_deref().unwrap_or("quorate-%d");
                restore::members(&self.peers, name, self.first_slot, self.size, self.client_port)?
            }
        };
        let alone = match (&self.initial_cluster, &self.name) {
            (Some(list), Some(name)) => {
                ensure!(
                    self.token.is_some(),
                    "--name with --initial-cluster makes one member's directory, and needs --token"
                );
                let member = members.iter().find(|member| member.name == *name);
                Some(member.with_context(|| format!("--name {name:?} is not among the members of {list:?}"))?.slot)
            }
            (Some(_), None) => None,
            (None, _) => self.slot.or(self.peers.is_empty().then_some(self.first_slot)),
        };
        let directories = match alone {
            Some(slot) => vec![(slot, self.data_dir.clone())],
            None => members.iter().map(|member| (member.slot, self.data_dir.join(&member.name))).collect(),
        };
        let token = self.token.clone().unwrap_or_else(|| format!("{:016x}{:016x}", env.random_u64(), env.random_u64()));
        Ok(Restore { members, token, bump_revision, directories })
    }

    /// What was made; `head` comes before it, and its fields in JSON.
    pub fn describe(&self, made: &Restored, head: &str, fields: serde_json::Value) -> Vec<u8> {
        match self.output {
            Format::Json => {
                let mut made = restored_json(made);
                if let (Some(made), Some(fields)) = (made.as_object_mut(), fields.as_object()) {
                    made.extend(fields.clone());
                }
                json_line(&made)
            }
            Format::Simple => {
                let rows: Vec<Vec<String>> = made
                    .members
                    .iter()
                    .map(|(slot, id, dir)| vec![slot.to_string(), id_text(*id), dir.display().to_string()])
                    .collect();
                let cluster = format!(
                    "{head}a new cluster {} with {} keys at revision {}\n",
                    id_text(made.cluster_id),
                    made.keys,
                    made.revision
                );
                [cluster.into_bytes(), table(&["SLOT", "MEMBER", "DATA DIRECTORY"], &rows)].concat()
            }
        }
    }
}

fn restored_json(made: &Restored) -> serde_json::Value {
    let member =
        |(slot, id, dir): &(u16, u64, PathBuf)| json!({ "slot": slot, "memberID": id_text(*id), "dataDir": dir });
    json!({
        "clusterID": id_text(made.cluster_id),
        "revision": made.revision,
        "keys": made.keys,
        "members": made.members.iter().map(member).collect::<Vec<_>>(),
    })
}
