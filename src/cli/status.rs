//! `status` and `member list`.
//!
//! Every member is asked for itself: first the given endpoints, then the client URLs of those members that were not among
//! them. So it works through a port-forward, where no advertised URL can be reached, and shows who does not answer. A member
//! whose clients' port is closed is asked at its status port. Below the table stand the conditions that any of them knows, and who did not
//! answer. Exit code: 0, 2 if a condition is an error or no leader is known, 1 if nobody could be asked.

use std::collections::BTreeMap;

use anyhow::bail;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tonic::Response;

use super::client::{ClientArgs, unreachable};
use super::output::{Format, by_name, condition_lines, header_json, human_bytes, id, json_line, table};
use crate::cli::credentials::Channel;
use crate::conditions;
use crate::http::conditions_json;
use crate::identity::{READER_SLOT, slot_of};
use crate::pb::admin::admin_client::AdminClient;
use crate::pb::admin::{Condition, MembershipRequest};
use crate::pb::etcd::cluster_client::ClusterClient;
use crate::pb::etcd::maintenance_client::MaintenanceClient;
use crate::pb::etcd::{Member, MemberListRequest, MemberListResponse, StatusRequest, StatusResponse};

/// What a server adds to the answer of Status, as metadata: etcd's message has no field for them.
mod metadata {
    pub const VERSION: &str = "quorate-version";
    pub const DISK_FREE_BYTES: &str = "quorate-disk-free-bytes";
    pub const SLOT: &str = "quorate-slot";
    /// Why the member is not ready.
    pub const WAITS: &str = "quorate-waits";
}

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    pub output: Format,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(Debug, clap::Args)]
pub struct MemberListArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Simple)]
    output: Format,
    #[command(flatten)]
    client: ClientArgs,
}

/// What one member says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
struct Report {
    member_id: u64,
    cluster_id: u64,
    status: StatusResponse,
    version: Option<String>,
    disk_free_bytes: Option<u64>,
    slot: Option<u16>,
    waits: Option<String>,
    /// What it knows that a person should.
    conditions: Vec<Condition>,
}

impl Report {
    fn read(answer: Response<StatusResponse>) -> Self {
        let text = |name: &str| answer.metadata().get(name)?.to_str().ok().map(str::to_owned);
        let header = answer.get_ref().header.unwrap_or_default();
        Self {
            member_id: header.member_id,
            cluster_id: header.cluster_id,
            version: text(metadata::VERSION),
            disk_free_bytes: text(metadata::DISK_FREE_BYTES).and_then(|text| text.parse().ok()),
            slot: text(metadata::SLOT).and_then(|text| text.parse().ok()),
            waits: text(metadata::WAITS).filter(|text| !text.is_empty()),
            conditions: Vec::new(),
            status: answer.into_inner(),
        }
    }

    fn revision(&self) -> i64 {
        self.status.header.unwrap_or_default().revision
    }
}

/// One line of the table: a member of the list, or one that answers and is in no list, or both.
struct Row {
    id: u64,
    name: String,
    learner: bool,
    report: Result<Report, String>,
}

impl Row {
    fn slot(&self) -> u16 {
        self.report.as_ref().ok().and_then(|report| report.slot).unwrap_or(slot_of(self.id))
    }

    fn role(&self, leader: u64) -> &'static str {
        match self.report.as_ref() {
            _ if leader == self.id && leader != 0 => "leader",
            Ok(report) if report.cluster_id == 0 => "-",
            // A manual member has no slot either, and votes as soon as it can.
            report if self.slot() == READER_SLOT && report.map_or(self.learner, |r| r.status.is_learner) => "reader",
            Ok(report) if report.status.is_learner => "learner",
            Err(_) if self.learner => "learner",
            _ => "voter",
        }
    }

    /// Why it is not ready, or does not answer.
    fn note(&self) -> Option<String> {
        match &self.report {
            Err(failure) => Some(format!("does not answer: {failure}")),
            Ok(report) => report.waits.clone(),
        }
    }

    fn shown(&self) -> String {
        if self.name.is_empty() { format!("{:016x}", self.id) } else { self.name.clone() }
    }
}

/// The members' rows, and what holds for all of them.
struct Overview {
    rows: Vec<Row>,
    /// 0: none is known.
    leader: u64,
    /// The greatest log index that anyone names: lag is counted from it.
    last_index: u64,
    /// Something that no row says.
    remark: Option<String>,
    conditions: Vec<Condition>,
}

/// What is printed, and the exit code.
pub async fn status(args: StatusArgs) -> anyhow::Result<(Vec<u8>, i32)> {
    let client = &args.client;
    let endpoints: Vec<&str> = client.endpoints().collect();
    let probes = join_all(endpoints.iter().map(|endpoint| probe(client, endpoint))).await;
    let mut failures = Vec::new();
    let mut reports = BTreeMap::new();
    let mut first = None;
    for (endpoint, probed) in endpoints.iter().zip(probes) {
        match probed {
            Ok((channel, report)) => {
                first.get_or_insert(channel);
                reports.insert(report.member_id, report);
            }
            Err(failure) => failures.push(format!("{endpoint}: {failure}")),
        }
    }
    let Some(channel) = first else { bail!("{}", unreachable(&failures)) };
    let (members, remark) = match member_list_of(client, channel).await {
        Ok(list) => (list.members, None),
        Err(error) => (Vec::new(), Some(format!("the member list is not known: {error:#}"))),
    };
    let overview = overview(client, members, reports, remark).await;
    let text = match args.output {
        Format::Simple => overview.text(),
        Format::Json => json_line(&overview.json()),
    };
    Ok((text, overview.exit_code()))
}

/// Asks the members that have not been asked yet, and puts all in the order of their slots.
async fn overview(
    client: &ClientArgs,
    members: Vec<Member>,
    mut reports: BTreeMap<u64, Report>,
    remark: Option<String>,
) -> Overview {
    let rows = members.into_iter().map(|member| (reports.remove(&member.id), member)).map(async |(report, member)| {
        let report = match report {
            Some(report) => Ok(report),
            None => ask(client, &member).await,
        };
        Row { id: member.id, name: member.name, learner: member.is_learner, report }
    });
    let mut rows = join_all(rows.collect::<Vec<_>>()).await;
    rows.extend(reports.into_values().map(|report| Row {
        id: report.member_id,
        name: String::new(),
        learner: report.status.is_learner,
        report: Ok(report),
    }));
    rows.sort_by(|a, b| (a.slot(), &a.name, a.id).cmp(&(b.slot(), &b.name, b.id)));
    let answered = || rows.iter().filter_map(|row| row.report.as_ref().ok());
    // Whoever is furthest in the latest term knows the leader best.
    let newest = answered().filter(|report| report.status.leader != 0).max_by_key(|report| report.status.raft_term);
    let leader = newest.map_or(0, |report| report.status.leader);
    let last_index = answered().map(|report| report.status.raft_index.max(report.status.raft_applied_index)).max();
    let clusters: std::collections::BTreeSet<u64> =
        answered().map(|report| report.cluster_id).filter(|id| *id != 0).collect();
    let split = (clusters.len() > 1).then(|| format!("the endpoints belong to {} different clusters", clusters.len()));
    // Who is asked for them knows what the leader does; without one each knows its own.
    let conditions = conditions::merge(answered().flat_map(|report| report.conditions.clone()));
    Overview { leader, last_index: last_index.unwrap_or_default(), remark: split.or(remark), conditions, rows }
}

async fn probe(client: &ClientArgs, endpoint: &str) -> Result<(Channel, Report), String> {
    let channel = client.dial_for_status(endpoint).await?;
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let answer = client.answer(maintenance.status(StatusRequest {})).await.map_err(|error| error.to_string())?;
    let mut report = Report::read(answer);
    // An older server has no conditions, and an etcd no such call.
    let view = client.answer(AdminClient::new(channel.clone()).membership(MembershipRequest {})).await;
    report.conditions = view.map(|view| view.into_inner().conditions).unwrap_or_default();
    Ok((channel, report))
}

/// Asks a member through its client URLs, one after the other.
async fn ask(client: &ClientArgs, member: &Member) -> Result<Report, String> {
    let mut failures = Vec::new();
    for url in &member.client_ur_ls {
        match probe(client, url).await {
            Ok((_, report)) if report.member_id == member.id => return Ok(report),
            Ok((_, report)) => failures.push(format!("{url} is answered by member {:x}", report.member_id)),
            Err(failure) => failures.push(format!("{url}: {failure}")),
        }
    }
    Err(if failures.is_empty() { "it has told no client URL".to_owned() } else { failures.join(", ") })
}

async fn member_list_of(client: &ClientArgs, channel: Channel) -> anyhow::Result<MemberListResponse> {
    // Not linearizable: it must work without a quorum, that is when it is needed most.
    let request = MemberListRequest { linearizable: false };
    Ok(client.answer(ClusterClient::new(channel).member_list(request)).await?.into_inner())
}

impl Overview {
    fn lag(&self, report: &Report) -> u64 {
        self.last_index.saturating_sub(report.status.raft_applied_index)
    }

    fn text(&self) -> Vec<u8> {
        const HEAD: [&str; 11] =
            ["ID", "NAME", "SLOT", "ROLE", "TERM", "APPLIED", "LAG", "REVISION", "DB SIZE", "DISK FREE", "VERSION"];
        let unknown = || "-".to_owned();
        let cells = |row: &Row| {
            let report = row.report.as_ref().ok();
            let number = |of: fn(&Report) -> u64| report.map_or_else(unknown, |report| of(report).to_string());
            let name = if row.name.is_empty() { unknown() } else { row.name.clone() };
            let slot = if row.slot() == READER_SLOT { unknown() } else { row.slot().to_string() };
            vec![
                format!("{:016x}", row.id),
                name,
                slot,
                row.role(self.leader).to_owned(),
                number(|report| report.status.raft_term),
                number(|report| report.status.raft_applied_index),
                report.map_or_else(unknown, |report| self.lag(report).to_string()),
                report.map_or_else(unknown, |report| report.revision().to_string()),
                report.map_or_else(unknown, |report| human_bytes(report.status.db_size.max(0) as u64)),
                report.and_then(|report| report.disk_free_bytes).map_or_else(unknown, human_bytes),
                report.and_then(|report| report.version.clone()).unwrap_or_else(unknown),
            ]
        };
        let mut out = table(&HEAD, &self.rows.iter().map(cells).collect::<Vec<_>>());
        for row in &self.rows {
            let note = row.note().map(|note| crate::identity::shown(&format!("{}: {note}", row.shown())) + "\n");
            out.extend(note.unwrap_or_default().into_bytes());
        }
        if self.leader == 0 {
            out.extend_from_slice(b"no leader is known\n");
        }
        if let Some(remark) = &self.remark {
            out.extend_from_slice(format!("{remark}\n").as_bytes());
        }
        out.extend(condition_lines(&self.conditions).into_bytes());
        out
    }

    fn exit_code(&self) -> i32 {
        if self.leader == 0 || self.conditions.iter().any(conditions::is_error) { 2 } else { 0 }
    }

    fn json(&self) -> Value {
        let member = |row: &Row| {
            let mut object = json!({
                "id": format!("{:016x}", row.id),
                "name": row.name,
                "slot": row.slot(),
                "role": row.role(self.leader),
                "note": row.note().unwrap_or_default(),
                "answers": row.report.is_ok(),
            });
            if let Ok(report) = &row.report {
                object["term"] = report.status.raft_term.into();
                object["applied"] = report.status.raft_applied_index.into();
                object["lag"] = self.lag(report).into();
                object["revision"] = report.revision().into();
                object["db_size_bytes"] = report.status.db_size.into();
                object["db_size_in_use_bytes"] = report.status.db_size_in_use.into();
                object["disk_free_bytes"] = report.disk_free_bytes.into();
                object["version"] = report.version.clone().into();
                object["api_version"] = report.status.version.clone().into();
                object["waits"] = report.waits.clone().into();
            }
            object
        };
        let leader = (self.leader != 0).then(|| format!("{:016x}", self.leader));
        let members = self.rows.iter().map(member).collect::<Vec<_>>();
        let conditions = conditions_json(&self.conditions);
        json!({ "leader": leader, "remark": self.remark, "members": members, "conditions": conditions })
    }
}

pub async fn member_list(args: MemberListArgs) -> anyhow::Result<Vec<u8>> {
    let ask = async |channel: Channel| {
        ClusterClient::new(channel).member_list(MemberListRequest { linearizable: false }).await
    };
    let mut list = args.client.read(ask).await?.into_inner();
    list.members.sort_by(|one, other| by_name(&one.name, &other.name).then(one.id.cmp(&other.id)));
    Ok(match args.output {
        Format::Simple => members_text(&list.members),
        Format::Json => {
            let members = list.members.iter().map(member_json).collect::<Vec<_>>();
            json_line(&json!({ "header": header_json(list.header.as_ref()), "members": members }))
        }
    })
}

pub(super) fn members_text(members: &[Member]) -> Vec<u8> {
    let cells = |member: &Member| {
        let role = if member.is_learner { "learner" } else { "voter" };
        let (id, peers, clients) = (id(member.id), member.peer_ur_ls.join(","), member.client_ur_ls.join(","));
        vec![id, member.name.clone(), role.to_owned(), peers, clients]
    };
    table(&["ID", "NAME", "ROLE", "PEER URLS", "CLIENT URLS"], &members.iter().map(cells).collect::<Vec<_>>())
}

pub(super) fn member_json(member: &Member) -> Value {
    json!({
        "ID": id(member.id),
        "name": member.name,
        "peerURLs": member.peer_ur_ls,
        "clientURLs": member.client_ur_ls,
        "isLearner": member.is_learner,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::{Request, Status};

    use super::*;
    use crate::env::Env;
    use crate::pb::etcd::cluster_server::{Cluster, ClusterServer};
    use crate::pb::etcd::maintenance_server::{Maintenance, MaintenanceServer};
    use crate::pb::etcd::*;

    /// A member that answers Status and MemberList with what it is given.
    #[derive(Clone)]
    struct Fake {
        status: StatusResponse,
        waits: Option<&'static str>,
        members: Vec<Member>,
    }

    #[tonic::async_trait]
    impl Cluster for Fake {
        async fn member_list(&self, _: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
            Ok(Response::new(MemberListResponse { members: self.members.clone(), ..Default::default() }))
        }
        async fn member_add(&self, _: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
            Err(Status::unimplemented("member add"))
        }
        async fn member_remove(
            &self,
            _: Request<MemberRemoveRequest>,
        ) -> Result<Response<MemberRemoveResponse>, Status> {
            Err(Status::unimplemented("member remove"))
        }
        async fn member_update(
            &self,
            _: Request<MemberUpdateRequest>,
        ) -> Result<Response<MemberUpdateResponse>, Status> {
            Err(Status::unimplemented("member update"))
        }
        async fn member_promote(
            &self,
            _: Request<MemberPromoteRequest>,
        ) -> Result<Response<MemberPromoteResponse>, Status> {
            Err(Status::unimplemented("member promote"))
        }
    }

    #[tonic::async_trait]
    impl Maintenance for Fake {
        async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
            let mut answer = Response::new(self.status.clone());
            let metadata = answer.metadata_mut();
            metadata.insert("quorate-version", "0.1.0".parse().unwrap());
            metadata.insert("quorate-disk-free-bytes", "1048576".parse().unwrap());
            if let Some(waits) = self.waits {
                metadata.insert("quorate-waits", waits.parse().unwrap());
            }
            Ok(answer)
        }
        async fn alarm(&self, _: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
            Err(Status::unimplemented("alarm"))
        }
        async fn hash_kv(&self, _: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
            Err(Status::unimplemented("hash"))
        }
        async fn move_leader(&self, _: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
            Err(Status::unimplemented("move leader"))
        }
        async fn defragment(&self, _: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
            Err(Status::unimplemented("defragment"))
        }
        async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
            Err(Status::unimplemented("hash"))
        }
        type SnapshotStream = tokio_stream::Empty<Result<SnapshotResponse, Status>>;
        async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
            Err(Status::unimplemented("snapshot"))
        }
        async fn downgrade(&self, _: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
            Err(Status::unimplemented("downgrade"))
        }
    }

    async fn listener() -> (tokio::net::TcpListener, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    fn serve(env: &Env, listener: tokio::net::TcpListener, fake: Fake) {
        let server = tonic::transport::Server::builder()
            .add_service(ClusterServer::new(fake.clone()))
            .add_service(MaintenanceServer::new(fake));
        env.spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));
    }

    fn fake_status(id: u64, leader: u64, applied: u64) -> StatusResponse {
        let header = ResponseHeader { cluster_id: 9, member_id: id, revision: 7, ..Default::default() };
        StatusResponse {
            header: Some(header),
            leader,
            raft_term: 4,
            raft_index: 100,
            raft_applied_index: applied,
            db_size: 2048,
            ..Default::default()
        }
    }

    fn args(endpoint: String, output: Format) -> StatusArgs {
        let client = ClientArgs {
            endpoints: vec![endpoint],
            dial_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            user: Default::default(),
            tls: Default::default(),
            named_by: "",
        };
        StatusArgs { output, client }
    }

    #[tokio::test]
    async fn every_member_is_asked_and_who_is_silent_is_shown() {
        let (env, (zero, one, two)) = (Env::real(), (0xa_0000, 0xb_0001, 0xc_0002));
        let ((listener_0, address_0), (listener_1, address_1)) = (listener().await, listener().await);
        let member = |id, name: &str, url: String| Member {
            id,
            name: name.to_owned(),
            client_ur_ls: vec![url],
            ..Default::default()
        };
        // Member 0's advertised URL cannot be reached, as through a port-forward: its endpoint answered already.
        let members = vec![
            member(two, "kv-2", "http://127.0.0.1:1".to_owned()),
            member(one, "kv-1", format!("http://{address_1}")),
            member(zero, "kv-0", "http://127.0.0.1:1".to_owned()),
        ];
        serve(
            &env,
            listener_0,
            Fake { status: fake_status(zero, one, 90), waits: Some("catches up"), members: members.clone() },
        );
        serve(&env, listener_1, Fake { status: fake_status(one, one, 100), waits: None, members: members.clone() });
        let text = String::from_utf8(status(args(address_0.clone(), Format::Simple)).await.unwrap().0).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let head = ["00000000000a0000", "kv-0", "0", "voter", "4", "90", "10", "7", "2.0KiB", "1.0MiB", "0.1.0"];
        assert_eq!(lines[1], head, "{text}");
        assert_eq!(lines[2][..7], ["00000000000b0001", "kv-1", "1", "leader", "4", "100", "0"], "{text}");
        assert_eq!(lines[3][..6], ["00000000000c0002", "kv-2", "2", "voter", "-", "-"], "{text}");
        assert_eq!(lines[4], ["kv-0:", "catches", "up"], "{text}");
        assert!(text.contains("kv-2: does not answer: http://127.0.0.1:1: "), "{text}");
        assert!(text.ends_with("conditions: none\n"), "{text}");
        let json: Value = serde_json::from_slice(&status(args(address_0, Format::Json)).await.unwrap().0).unwrap();
        assert_eq!((&json["leader"], &json["members"][1]["lag"]), (&"00000000000b0001".into(), &0.into()));
        assert_eq!(
            (&json["members"][0]["waits"], &json["members"][2]["answers"]),
            (&"catches up".into(), &false.into())
        );
        env.stop(Duration::ZERO).await;
    }

    #[tokio::test]
    async fn node_without_a_cluster_shows_what_it_waits_for() {
        let env = Env::real();
        let (listener, address) = listener().await;
        let status_of_pristine = StatusResponse { raft_term: 0, ..fake_status(0x7_0001, 0, 0) };
        serve(
            &env,
            listener,
            Fake { status: status_of_pristine, waits: Some("slot 2 cannot be reached"), members: vec![] },
        );
        let (text, code) = status(args(address, Format::Simple)).await.unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(code, 2, "somebody should look: {text}");
        assert!(text.contains("slot 2 cannot be reached") && text.contains("no leader is known"), "{text}");
        env.stop(Duration::ZERO).await;
    }

    #[test]
    fn member_list_names_role_and_urls() {
        let member = Member {
            id: 0xa_0000,
            name: "kv-0".into(),
            peer_ur_ls: vec!["http://kv-0:2380".into()],
            client_ur_ls: vec!["http://kv-0:2379".into()],
            is_learner: true,
        };
        let text = String::from_utf8(members_text(std::slice::from_ref(&member))).unwrap();
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["00000000000a0000", "kv-0", "learner", "http://kv-0:2380", "http://kv-0:2379"]);
        assert_eq!(member_json(&member)["ID"], "00000000000a0000");
    }
}
