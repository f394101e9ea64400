//! Who asks: what a request shows of it.
//!
//! Invariant: while authentication is off nothing is looked at. Absent: what somebody may do (`kv::auth`, by way of `node`), and users
//! that are named by the certificate of their connection.

use std::sync::Arc;

use tonic::Request;

use super::Api;
use crate::caller::{Caller, Named};
use crate::env::wall_clock;
use crate::error::Error;
use crate::kv::Wants;
use crate::node::Node;
use crate::secure::token::Key;

/// Where a token is, as etcd's clients send it, and as the gateway of others does.
const TOKEN_HEADERS: [&str; 2] = ["token", "authorization"];

/// The token of a request.
fn token<T>(request: &Request<T>) -> Option<String> {
    let text = TOKEN_HEADERS.iter().find_map(|name| request.metadata().get(*name))?;
    // One that is no text is none that was issued.
    let text = text.to_str().unwrap_or_default();
    Some(text.strip_prefix("Bearer ").unwrap_or(text).to_owned())
}

impl Api {
    /// Who asks by `request`.
    pub(super) fn caller<'a, T>(
        &'a self,
        node: &'a Node,
        request: &Request<T>,
    ) -> impl Future<Output = Result<Caller, Error>> + Send + use<'a, T> {
        let token = if node.is_auth_on() { token(request) } else { None };
        async move {
            match token {
                Some(token) => self.by_token(node, &token).await,
                None => Ok(Caller::Nobody),
            }
        }
    }

    /// The same, who must be root. One that this member does not know as root yet may have become it a moment ago.
    pub(super) fn root<'a, T>(
        &'a self,
        node: &'a Node,
        request: &Request<T>,
    ) -> impl Future<Output = Result<Caller, Error>> + Send + use<'a, T> {
        let caller = self.caller(node, request);
        async move {
            let caller = caller.await?;
            if node.permit(&caller, Wants::Root).is_err() {
                node.read_index().await?;
                node.permit(&caller, Wants::Root)?;
            }
            Ok(caller)
        }
    }

    /// Refuses who is no user. A member that belongs to no cluster knows none.
    pub(super) fn any_user<'a, T>(
        &'a self,
        request: &Request<T>,
    ) -> impl Future<Output = Result<Caller, Error>> + Send + use<'a, T> {
        let node = self.any_node().ok();
        let token = node.as_ref().filter(|node| node.is_auth_on()).and_then(|_| token(request));
        async move {
            let Some(node) = node else { return Ok(Caller::Nobody) };
            let caller = match token {
                Some(token) => self.by_token(&node, &token).await?,
                None => Caller::Nobody,
            };
            node.permit(&caller, Wants::AnyUser).map(|()| caller)
        }
    }

    async fn by_token(&self, node: &Node, token: &str) -> Result<Caller, Error> {
        if let Some(user) = self.known(node, token) {
            return Ok(Caller::User(user));
        }
        // It may be of a member that has applied more.
        node.read_index().await?;
        self.known(node, token).map(Caller::User).ok_or(Error::InvalidAuthToken)
    }

    /// The user of a token, as this member's state is.
    fn known(&self, node: &Node, token: &str) -> Option<Arc<Named>> {
        let auth = node.auth();
        let user = self.shared.tokens.read(&token_key(node, auth.token_key().clone()), token, wall_clock())?;
        let caller = Caller::User(user.clone());
        auth.check_user(caller.who()).ok().map(|()| user)
    }
}

/// What this cluster signs its tokens with.
pub(super) fn token_key(node: &Node, secret: bytes::Bytes) -> Key {
    Key { cluster_id: node.member().cluster_id, secret }
}
