//! `etcdserverpb.Cluster`.

use tonic::{Request, Response, Status};

use super::{Api, header_now};
use crate::error::Error;
use crate::identity::{self, peer_addresses};
use crate::kv::Wants;
use crate::node::Node;
use crate::pb::etcd::cluster_server::Cluster;
use crate::pb::etcd::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
};
use crate::pb::peer::manage_request::{Add, Operation, Update};
use crate::raft::StoredMembership;

/// The membership as clients see it, ascending by id; `scheme` is that of the members' URLs.
fn members(membership: &StoredMembership, scheme: &str) -> Vec<Member> {
    let voters: std::collections::BTreeSet<u64> = membership.voter_ids().collect();
    membership
        .nodes()
        .map(|(id, node)| Member {
            id: *id,
            name: node.name.clone(),
            peer_ur_ls: peer_addresses(node).map(|address| format!("{scheme}://{address}")).collect(),
            client_ur_ls: node.client_urls.clone(),
            is_learner: !voters.contains(id),
        })
        .collect()
}

fn members_now(node: &Node) -> Vec<Member> {
    let scheme = if node.peers().have_certificates() { "https" } else { "http" };
    members(&node.membership(), scheme)
}

/// The addresses in a member's URLs, and the first of them by itself. Whether members speak TLS is not a matter of the URL.
fn read_addresses(urls: &[String]) -> Result<(String, Vec<String>), Error> {
    let read = |url: &String| {
        let address = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?.trim_end_matches('/');
        identity::host_port(address).map(|_| address.to_owned())
    };
    let mut addresses = urls.iter().map(read).collect::<Option<Vec<_>>>().ok_or(Error::BadMemberUrls)?;
    if addresses.is_empty() || addresses.len() > identity::URLS_MAX {
        return Err(Error::BadMemberUrls);
    }
    Ok((addresses.remove(0), addresses))
}

impl Api {
    /// Has the leader do it, and waits until this member has applied it; gives the id of a member that was added.
    async fn manage(&self, node: &Node, operation: Operation) -> Result<u64, Error> {
        let answer = self.manager()?.manage(operation).await?;
        // The change is done; that this member shows it may take longer than its client waits.
        let _ = node.read_index().await;
        Ok(answer.member_id)
    }
}

#[tonic::async_trait]
impl Cluster for Api {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.caller(&node, &request).await?;
        if request.into_inner().linearizable {
            node.read_index().await?;
        }
        node.permit(&caller, Wants::AnyUser)?;
        Ok(Response::new(MemberListResponse { header: header_now(&node), members: members_now(&node) }))
    }

    async fn member_add(&self, request: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request);
        let MemberAddRequest { peer_ur_ls, is_learner } = request.into_inner();
        let (peer_address, more_peer_addresses) = read_addresses(&peer_ur_ls)?;
        caller.await?;
        let add = Add { peer_address, held: is_learner, more_peer_addresses };
        let id = self.manage(&node, Operation::Add(add)).await?;
        let members = members_now(&node);
        let member = members.iter().find(|member| member.id == id).cloned();
        // Not applied here yet: what is certain is the id and the URL.
        let member = member.unwrap_or(Member { id, peer_ur_ls, is_learner: true, ..Member::default() });
        Ok(Response::new(MemberAddResponse { header: header_now(&node), member: Some(member), members }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let node = self.node(&request)?;
        self.root(&node, &request).await?;
        self.manage(&node, Operation::Remove(request.into_inner().id)).await?;
        Ok(Response::new(MemberRemoveResponse { header: header_now(&node), members: members_now(&node) }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let node = self.node(&request)?;
        self.root(&node, &request).await?;
        let MemberUpdateRequest { id, peer_ur_ls } = request.into_inner();
        let (peer_address, more_peer_addresses) = match read_addresses(&peer_ur_ls) {
            Ok(addresses) => addresses,
            // As etcd, which looks for the member first.
            Err(fault) => {
                node.read_index().await?;
                let is_known = node.membership().nodes().any(|(known, _)| *known == id);
                return Err(if is_known { fault } else { Error::MemberNotFound }.into());
            }
        };
        self.manage(&node, Operation::Update(Update { id, peer_address, more_peer_addresses })).await?;
        Ok(Response::new(MemberUpdateResponse { header: header_now(&node), members: members_now(&node) }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        let node = self.node(&request)?;
        self.root(&node, &request).await?;
        self.manage(&node, Operation::Promote(request.into_inner().id)).await?;
        Ok(Response::new(MemberPromoteResponse { header: header_now(&node), members: members_now(&node) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_with_host_and_port_are_taken() {
        let read = |urls: &[&str]| read_addresses(&urls.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>());
        assert_eq!(read(&["http://kv-3.kv:2380/"]), Ok(("kv-3.kv:2380".into(), vec![])));
        assert_eq!(read(&["https://a:1", "http://b:1"]), Ok(("a:1".into(), vec!["b:1".into()])));
        let many = vec!["http://a:1"; identity::URLS_MAX + 1];
        for urls in [&[][..], &["kv-3:2380"], &["http://kv-3"], &["unix://kv-3:2380"], &["http://a:1", "b:1"], &many] {
            assert_eq!(read(urls), Err(Error::BadMemberUrls), "{urls:?}");
        }
    }
}
