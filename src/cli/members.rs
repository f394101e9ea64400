//! All members, each with a connection of its own, for the commands that ask every one; and members by their name.
//!
//! As `status` does it: first the given endpoints, then the client URLs of those members that are not among them. Rows come in the order of
//! the members' names.

use anyhow::{Context as _, bail};
use futures_util::future::join_all;

use super::client::ClientArgs;
use super::credentials::Channel;
use super::output::{by_name, id};
use crate::pb::etcd::cluster_client::ClusterClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{Member, MemberListRequest, StatusRequest, StatusResponse};

/// Who is asked.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct WhomArgs {
    /// Ask the given endpoints alone, and not all members
    #[arg(long)]
    only_endpoints: bool,
}

/// A member that answers.
#[derive(Clone)]
pub struct Reached {
    pub channel: Channel,
    pub status: StatusResponse,
}

/// One member.
pub struct Asked {
    /// 0 where nobody knows.
    pub id: u64,
    pub name: String,
    /// Where it was reached, or was not.
    pub endpoint: String,
    pub learner: bool,
    pub reached: Result<Reached, String>,
}

impl Asked {
    /// For people: its name, where it has one that is known.
    pub fn label(&self) -> String {
        match (&self.name[..], self.id) {
            ("", 0) => self.endpoint.clone(),
            ("", number) => id(number),
            (name, _) => crate::identity::shown(name),
        }
    }

    /// Id, name and endpoint, as every table of members begins.
    pub fn cells(&self) -> Vec<String> {
        let known = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let number = if self.id == 0 { "-".to_owned() } else { id(self.id) };
        vec![number, known(&self.name), known(&self.endpoint)]
    }

    /// The same as fields of an object.
    pub fn json(&self) -> serde_json::Value {
        let number = (self.id != 0).then(|| id(self.id));
        serde_json::json!({ "id": number, "name": self.name, "endpoint": self.endpoint })
    }
}

/// Every member of the cluster, or with `only_endpoints` whoever answers at the given ones. Fails if nobody answers at all.
pub async fn all(client: &ClientArgs, whom: &WhomArgs) -> anyhow::Result<Vec<Asked>> {
    let endpoints: Vec<&str> = client.endpoints().collect();
    let probed = join_all(endpoints.iter().map(|endpoint| reach(client, endpoint))).await;
    let mut given: Vec<Asked> = endpoints.iter().zip(probed).map(|(endpoint, reached)| of(endpoint, reached)).collect();
    // One member under two addresses is one.
    let mut seen = std::collections::BTreeSet::new();
    given.retain(|asked| asked.id == 0 || seen.insert(asked.id));
    if !given.iter().any(|asked| asked.reached.is_ok()) {
        let failures = given.iter().map(|asked| (&asked.endpoint, asked.reached.as_ref().err()));
        let failures: Vec<String> =
            failures.map(|(endpoint, why)| format!("{endpoint}: {}", why.map_or("", String::as_str))).collect();
        bail!("{}", super::client::unreachable(&failures));
    }
    let members = match (list_of(client, &given).await, whom.only_endpoints) {
        (Ok(members), _) => members,
        // Names are a courtesy then.
        (Err(_), true) => Vec::new(),
        (Err(error), false) => {
            return Err(error).context("the members are not known; --only-endpoints asks the given ones alone");
        }
    };
    for asked in &mut given {
        if let Some(member) = members.iter().find(|member| member.id == asked.id) {
            asked.name.clone_from(&member.name);
        }
    }
    let mut asked = given;
    if !whom.only_endpoints {
        let missing = members.iter().filter(|member| !asked.iter().any(|asked| asked.id == member.id));
        let others = join_all(missing.map(|member| find(client, member))).await;
        // Where a given endpoint is dead, its member is shown under its name instead.
        asked.retain(|asked| asked.reached.is_ok());
        asked.extend(others);
    }
    asked.sort_by(|one, other| by_name(&one.name, &other.name).then(one.id.cmp(&other.id)));
    Ok(asked)
}

/// The leader as those who answer know it, among them or not; 0 if none does.
pub fn leader(asked: &[Asked]) -> u64 {
    let statuses = asked.iter().filter_map(|asked| asked.reached.as_ref().ok()).map(|reached| &reached.status);
    statuses.filter(|status| status.leader != 0).max_by_key(|status| status.raft_term).map_or(0, |status| status.leader)
}

/// The members as the first endpoint that answers lists them; also without a quorum.
pub async fn list(client: &ClientArgs) -> anyhow::Result<Vec<Member>> {
    let answer = client.read(async |channel: Channel| {
        ClusterClient::new(channel).member_list(MemberListRequest { linearizable: false }).await
    });
    let mut members = answer.await?.into_inner().members;
    members.sort_by(|one, other| by_name(&one.name, &other.name).then(one.id.cmp(&other.id)));
    Ok(members)
}

/// The id of the member that a person names: by its name, else by its id, which need not be one of these.
pub fn resolve(members: &[Member], text: &str) -> anyhow::Result<u64> {
    let named: Vec<u64> = members.iter().filter(|member| member.name == text).map(|member| member.id).collect();
    match named[..] {
        [only] => return Ok(only),
        [] => {}
        _ => bail!(
            "{} members are named {text:?}: name one of their ids, {}",
            named.len(),
            named.iter().map(|number| id(*number)).collect::<Vec<_>>().join(" or ")
        ),
    }
    let digits = text.strip_prefix("0x").unwrap_or(text);
    match u64::from_str_radix(digits, 16) {
        Ok(number) => Ok(number),
        Err(_) => {
            let names: Vec<&str> =
                members.iter().map(|member| &member.name[..]).filter(|name| !name.is_empty()).collect();
            bail!(
                "no member is named {text:?}, and it is no id of up to 16 hexadecimal digits either; there are {}",
                crate::identity::shown(&names.join(", "))
            )
        }
    }
}

fn of(endpoint: &str, reached: Result<Reached, String>) -> Asked {
    let number = reached.as_ref().ok().and_then(|reached| reached.status.header.as_ref()).map_or(0, |h| h.member_id);
    let learner = reached.as_ref().is_ok_and(|reached| reached.status.is_learner);
    Asked { id: number, name: String::new(), endpoint: endpoint.to_owned(), learner, reached }
}

async fn reach(client: &ClientArgs, endpoint: &str) -> Result<Reached, String> {
    let channel = client.dial(endpoint).await?;
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let status = client.answer(maintenance.status(StatusRequest {})).await.map_err(|error| error.to_string())?;
    Ok(Reached { channel, status: status.into_inner() })
}

async fn list_of(client: &ClientArgs, given: &[Asked]) -> anyhow::Result<Vec<Member>> {
    let mut failure = None;
    for reached in given.iter().filter_map(|asked| asked.reached.as_ref().ok()) {
        let mut cluster = ClusterClient::new(reached.channel.clone());
        match client.answer(cluster.member_list(MemberListRequest { linearizable: false })).await {
            Ok(answer) => return Ok(answer.into_inner().members),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| anyhow::anyhow!("nobody answers")))
}

/// Reaches a member through its client URLs, one after the other.
async fn find(client: &ClientArgs, member: &Member) -> Asked {
    let mut failures = Vec::new();
    for url in &member.client_ur_ls {
        let asked = of(url, reach(client, url).await);
        match &asked.reached {
            Ok(_) if asked.id == member.id => return Asked { name: member.name.clone(), ..asked },
            Ok(_) => failures.push(format!("{url} is answered by member {}", id(asked.id))),
            Err(failure) => failures.push(format!("{url}: {failure}")),
        }
    }
    let failure = if failures.is_empty() { "it has told no client URL".to_owned() } else { failures.join(", ") };
    Asked {
        id: member.id,
        name: member.name.clone(),
        endpoint: String::new(),
        learner: member.is_learner,
        reached: Err(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_named_by_its_name_or_its_id() {
        let member = |id, name: &str| Member { id, name: name.to_owned(), ..Member::default() };
        let members =
            [member(0xa, "kv-0"), member(0xb, "kv-1"), member(0xc, "twin"), member(0xd, "twin"), member(0xe, "0xb")];
        for (text, expected) in [("kv-0", 0xa), ("b", 0xb), ("0xd", 0xd), ("000000000000000c", 0xc), ("77", 0x77)] {
            assert_eq!(resolve(&members, text).unwrap(), expected, "{text}");
        }
        assert_eq!(resolve(&members, "0xb").unwrap(), 0xe, "a name goes before an id");
        let error = resolve(&members, "twin").unwrap_err().to_string();
        assert!(error.contains("000000000000000c or 000000000000000d"), "{error}");
        let error = resolve(&members, "kv-9").unwrap_err().to_string();
        assert!(error.contains("kv-0, kv-1") && error.contains("hexadecimal"), "{error}");
    }
}
