//! `quorate.admin.v1.Admin`: what etcd's API has no call for.

use tonic::{Request, Response, Status};

use super::{Api, audited};
use crate::kv::Wants;
use crate::pb::admin::admin_server::Admin;
use crate::pb::admin::{
    DiagnoseRequest, Diagnosis, MembershipRequest, MembershipView, PromoteRequest, PromoteResponse, Remark,
    RoleQuotasRequest, RoleQuotasResponse, ScaleRequest, ScaleResponse, SetRoleQuotaRequest, SetRoleQuotaResponse,
    Wanted,
};
use crate::pb::log::auth_change::Change;

impl Api {
    /// What the leader sees of the membership, or this member if there is none: for `/cluster`, metrics and tools. Before this
    /// member belongs to a cluster, what it waits for.
    pub async fn membership(&self) -> MembershipView {
        let mut view = match self.manager() {
            Ok(manager) => manager.view().await,
            Err(_) => self.no_membership(),
        };
        self.conditions().complete(&mut view);
        view
    }

    fn no_membership(&self) -> MembershipView {
        let facts = self.facts();
        let waits = |sentence| Remark { name: "no-cluster".into(), sentence };
        MembershipView {
            cluster_id: facts.cluster_id,
            member_id: facts.member_id,
            remarks: facts.waits.into_iter().map(waits).collect(),
            ..MembershipView::default()
        }
    }
}

#[tonic::async_trait]
impl Admin for Api {
    async fn scale(&self, request: Request<ScaleRequest>) -> Result<Response<ScaleResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        let ScaleRequest { replicas, start } = request.into_inner();
        let manager = self.manager()?;
        // What the leader may propose must be known here as the leader knows it.
        node.read_index().await?;
        let start = if replicas == 0 { 0 } else { start.map_or(self.shared.first_slot, u64::from) };
        let size = manager.scale(&caller, start, u64::from(replicas)).await?;
        let origin = if size.replicas == 0 { "none" } else { "command" };
        let wanted = Wanted { origin: origin.into(), start: size.start, replicas: size.replicas, ..Wanted::default() };
        Ok(Response::new(ScaleResponse { wanted: Some(wanted) }))
    }

    async fn membership(&self, request: Request<MembershipRequest>) -> Result<Response<MembershipView>, Status> {
        self.any_user(&request).await?;
        Ok(Response::new(Api::membership(self).await))
    }

    async fn set_role_quota(
        &self,
        request: Request<SetRoleQuotaRequest>,
    ) -> Result<Response<SetRoleQuotaResponse>, Status> {
        self.change(request, Change::RoleQuota).await?;
        Ok(Response::new(SetRoleQuotaResponse {}))
    }

    async fn role_quotas(&self, request: Request<RoleQuotasRequest>) -> Result<Response<RoleQuotasResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        node.read_index().await?;
        let roles = node.view(&caller, Wants::Root)?.role_usage();
        Ok(Response::new(RoleQuotasResponse { roles }))
    }

    async fn promote(&self, request: Request<PromoteRequest>) -> Result<Response<PromoteResponse>, Status> {
        let node = self.node(&request)?;
        let caller = self.root(&node, &request).await?;
        let follower = self.follower()?;
        Ok(Response::new(follower.promote(&caller, request.into_inner()).await?))
    }

    async fn diagnose(&self, request: Request<DiagnoseRequest>) -> Result<Response<Diagnosis>, Status> {
        let node = self.any_node()?;
        audited::note(&request);
        self.root(&node, &request).await?;
        Ok(Response::new(self.diagnosis().await))
    }
}
