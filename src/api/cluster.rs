//! `etcdserverpb.Cluster`.

use tonic::{Request, Response, Status};

use super::{Api, header_now};
use crate::pb::etcd::cluster_server::Cluster;
use crate::pb::etcd::{Member, MemberListRequest, MemberListResponse};
use crate::raft::StoredMembership;

/// The membership as clients see it, ascending by id.
fn members(membership: &StoredMembership) -> Vec<Member> {
    let voters: std::collections::BTreeSet<u64> = membership.voter_ids().collect();
    membership
        .nodes()
        .map(|(id, node)| Member {
            id: *id,
            name: node.name.clone(),
            peer_ur_ls: vec![format!("http://{}", node.peer_address)],
            client_ur_ls: node.client_urls.clone(),
            is_learner: !voters.contains(id),
        })
        .collect()
}

#[tonic::async_trait]
impl Cluster for Api {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let node = self.node(&request)?;
        if request.into_inner().linearizable {
            node.read_index().await?;
        }
        let members = node.store().read(|s| members(&s.membership));
        Ok(Response::new(MemberListResponse { header: header_now(&node), members }))
    }
}
