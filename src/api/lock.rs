//! `v3lockpb.Lock`: a lock is the first place in a line (`queue`).

use tonic::{Request, Response, Status};

use super::{Api, header_now, mismatched, wrong_first};
use crate::kv::validate;
use crate::pb::etcd::DeleteRangeRequest;
use crate::pb::lock::lock_server::Lock;
use crate::pb::lock::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use crate::pb::log::{answer, command};

#[tonic::async_trait]
impl Lock for Api {
    /// Answers when the lock is held. With a lease that holds it already, at once.
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await?;
        let LockRequest { name, lease } = request.into_inner();
        let (place, header) = self.queue(&node, &caller, &name, lease, Default::default()).await?;
        Ok(Response::new(LockResponse { header: Some(header), key: place.key }))
    }

    /// A key that is gone already is no error: the lock is free.
    async fn unlock(&self, request: Request<UnlockRequest>) -> Result<Response<UnlockResponse>, Status> {
        let node = self.data_node(&request)?;
        let caller = self.caller(&node, &request).await;
        let delete = DeleteRangeRequest { key: request.into_inner().key, ..DeleteRangeRequest::default() };
        let caller = caller.map_err(|refused| wrong_first(validate::delete_range(&delete), refused))?;
        match self.propose(&node, &caller, command::Request::DeleteRange(delete)).await?.response {
            Some(answer::Response::DeleteRange(_)) => Ok(Response::new(UnlockResponse { header: header_now(&node) })),
            _ => Err(mismatched()),
        }
    }
}
