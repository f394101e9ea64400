//! `diagnose`: one tar file for whoever helps.
//!
//! Every member is asked: the given endpoints, and those that the member list adds. What one does not tell is a line in `notes.txt`; the
//! others' files are there all the same. Absent: secrets, and keys and values (see `api/diagnose`).

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::client::{ClientArgs, unreachable};
use super::output::{Format, done};
use super::status::{StatusArgs, status};
use crate::conditions;
use crate::env::{Env, wall_clock};
use crate::http::membership_json;
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::admin::{DiagnoseRequest, MembershipRequest};
use crate::pb::etcd::cluster_client::ClusterClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{MemberListRequest, StatusRequest};

#[derive(Debug, clap::Args)]
pub struct DiagnoseArgs {
    /// The file to make [default: quorate-diagnosis-TIME.tar]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// A tar file in memory; all of it is some MiB.
struct Archive {
    tar: Builder<Vec<u8>>,
    at: u64,
}

impl Archive {
    fn add(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.at);
        Ok(self.tar.append_data(&mut header, format!("quorate-diagnosis/{name}"), content)?)
    }
}

pub async fn diagnose(args: DiagnoseArgs) -> anyhow::Result<Vec<u8>> {
    let client = &args.client;
    let now = conditions::seconds(wall_clock());
    let mut archive = Archive { tar: Builder::new(Vec::new()), at: now as u64 };
    let mut notes = vec![format!("quorate diagnose {}, {}", env!("CARGO_PKG_VERSION"), conditions::time_text(now))];
    let mut endpoints: Vec<String> = client.endpoints().map(str::to_owned).collect();
    endpoints.extend(others(client).await);
    let (mut asked, mut told) = (BTreeSet::new(), 0);
    for endpoint in endpoints {
        match ask(client, &endpoint, &mut asked, &mut archive).await {
            Ok(member) => {
                told += 1;
                notes.push(format!("{endpoint}: {member}"));
            }
            Err(failure) => notes.push(format!("{endpoint}: {failure:#}")),
        }
    }
    if told == 0 {
        bail!("{}", unreachable(&notes[1..]));
    }
    for (name, output) in [("status.txt", Format::Simple), ("status.json", Format::Json)] {
        match status(StatusArgs { output, client: client.clone() }).await {
            Ok((text, _)) => archive.add(name, &text)?,
            Err(error) => notes.push(format!("{name}: {error:#}")),
        }
    }
    archive.add("notes.txt", (notes.join("\n") + "\n").as_bytes())?;
    let path = args.out.unwrap_or_else(|| {
        let time = conditions::time_text(now).replace(':', "-");
        PathBuf::from(format!("quorate-diagnosis-{time}.tar"))
    });
    // What is written whole needs the directory that it is in.
    let path = std::path::absolute(path)?;
    let disk = Env::real().disk;
    disk.write_atomic(&path, &archive.tar.into_inner()?).with_context(|| format!("cannot write {}", path.display()))?;
    let sentence = format!("{}\n{}: send this file to whoever helps", notes.join("\n"), path.display());
    Ok(done(args.output, &json!({ "file": path, "notes": notes }), &sentence))
}

/// Client URLs of members as one of them lists them.
async fn others(client: &ClientArgs) -> Vec<String> {
    let Ok(channel) = client.connect_for_status().await else { return Vec::new() };
    let list = client.answer(ClusterClient::new(channel).member_list(MemberListRequest { linearizable: false })).await;
    let members = list.map(|list| list.into_inner().members).unwrap_or_default();
    members.into_iter().flat_map(|member| member.client_ur_ls).collect()
}

/// Adds the files of the member that answers; who was asked already is not asked again.
async fn ask(
    client: &ClientArgs,
    endpoint: &str,
    asked: &mut BTreeSet<u64>,
    archive: &mut Archive,
) -> anyhow::Result<String> {
    let channel = client.dial_for_status(endpoint).await.map_err(anyhow::Error::msg)?;
    let status = client.answer(MaintenanceClient::new(channel.clone()).status(StatusRequest {})).await?.into_inner();
    let id = status.header.unwrap_or_default().member_id;
    if !asked.insert(id) {
        return Ok(format!("member {id:016x} again"));
    }
    let mut admin = AdminClient::new(channel).max_decoding_message_size(super::client::ANSWER_BYTES_MAX);
    let view = client.answer(admin.membership(MembershipRequest {})).await?.into_inner();
    let name = view.members.iter().find(|member| member.id == id).map(|member| member.name.replace('/', "_"));
    let dir = name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("{id:016x}"));
    archive.add(&format!("{dir}/membership.json"), (membership_json(&view).to_string() + "\n").as_bytes())?;
    let diagnosis = client.answer(admin.diagnose(DiagnoseRequest {})).await.context("it tells nothing more")?;
    for file in diagnosis.into_inner().files {
        archive.add(&format!("{dir}/{}", file.name.replace('/', "_")), &file.content)?;
    }
    Ok(format!("member {id:016x}, in {dir}/"))
}
