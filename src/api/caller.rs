//! Who asks: what a request shows of it.
//!
//! A token says who asks; where a request has none, the certificate of its connection does, if it was verified and the settings let it
//! (`client_tls.user`). A token that nobody takes is refused, whatever the certificate says.
//! Invariant: while authentication is off nothing is looked at. Absent: what somebody may do (`kv::auth`, by way of `node`).

use std::sync::Arc;

use tonic::Request;

use super::audited::{self, Audited};
use super::{Api, client};
use crate::caller::{Caller, Named};
use crate::config::CertUser;
use crate::env::wall_clock;
use crate::error::Error;
use crate::kv::Wants;
use crate::node::Node;
use crate::secure::Certificate;
use crate::secure::oidc::Issuer;
use crate::secure::token::Key;
use crate::telemetry::audit::Entry;

/// Where a token is, as etcd's clients send it, and as the gateway of others does.
const TOKEN_HEADERS: [&str; 2] = ["token", "authorization"];

/// What a request shows.
enum Shown {
    Token(String),
    /// None; so it is whom its connection names.
    Connection(Caller),
}

/// What is known of who asks before anybody was asked.
pub(super) struct Asking {
    /// `None`: authentication is off.
    shown: Option<Shown>,
    entry: Option<Entry>,
}

/// The token of a request.
fn token<T>(request: &Request<T>) -> Option<String> {
    let text = TOKEN_HEADERS.iter().find_map(|name| request.metadata().get(*name))?;
    // One that is no text is none that was issued.
    let text = text.to_str().unwrap_or_default();
    Some(text.strip_prefix("Bearer ").unwrap_or(text).to_owned())
}

/// The user that a certificate names.
fn user_of(certificate: &Certificate, user: CertUser) -> Option<&str> {
    let name = match user {
        CertUser::CommonName => certificate.common_name.as_deref(),
        CertUser::San => certificate.san.as_deref(),
        CertUser::Nobody => None,
    };
    name.filter(|name| !name.is_empty())
}

impl Api {
    fn shown<T>(&self, request: &Request<T>) -> Shown {
        if let Some(token) = token(request) {
            return Shown::Token(token);
        }
        let client = client(request);
        let user = client.certificate().and_then(|shown| user_of(shown, self.shared.certificate_user));
        // No password stands behind it, so nothing of the user's can end it.
        let named = |name: &str| Caller::User(Arc::new(Named::user(name, 0)));
        Shown::Connection(user.map_or(Caller::Nobody, named))
    }

    /// Who asks by `request`.
    pub(super) fn caller<'a, T>(
        &'a self,
        node: &'a Node,
        request: &Request<T>,
    ) -> impl Future<Output = Result<Caller, Error>> + Send + use<'a, T> {
        self.who(node, self.asking(node, request))
    }

    /// What `request` shows of who asks, for [`Self::who`] when the request is taken apart.
    pub(super) fn asking<T>(&self, node: &Node, request: &Request<T>) -> Asking {
        let shown = node.is_auth_on().then(|| self.shown(request));
        Asking { shown, entry: audited::entry(request).cloned() }
    }

    pub(super) async fn who(&self, node: &Node, asking: Asking) -> Result<Caller, Error> {
        let caller = match asking.shown {
            // Apart: what waits for each request is no larger for it.
            Some(Shown::Token(token)) => Box::pin(self.by_token(node, &token)).await?,
            Some(Shown::Connection(caller)) => caller,
            None => Caller::Nobody,
        };
        if let (Some(entry), Caller::User(user)) = (asking.entry, &caller) {
            entry.note_user(&user.name);
        }
        Ok(caller)
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
    pub(super) fn any_user<'a, T: Audited>(
        &'a self,
        request: &Request<T>,
    ) -> impl Future<Output = Result<Caller, Error>> + Send + use<'a, T> {
        audited::note(request);
        let entry = audited::entry(request).cloned();
        let node = self.any_node().ok();
        let shown = node.as_ref().filter(|node| node.is_auth_on()).map(|_| self.shown(request));
        async move {
            let Some(node) = node else { return Ok(Caller::Nobody) };
            let caller = match shown {
                Some(Shown::Token(token)) => self.by_token(&node, &token).await?,
                Some(Shown::Connection(caller)) => caller,
                None => Caller::Nobody,
            };
            if let (Some(entry), Caller::User(user)) = (entry, &caller) {
                entry.note_user(&user.name);
            }
            node.permit(&caller, Wants::AnyUser).map(|()| caller)
        }
    }

    async fn by_token(&self, node: &Node, token: &str) -> Result<Caller, Error> {
        if let Some(issuer) = self.shared.issuer.get().filter(|_| Issuer::is_form_of_token(token)) {
            return issuer.user(token, wall_clock()).map(Caller::User).ok_or(Error::InvalidAuthToken);
        }
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

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_certificate_names_the_user_that_the_setting_says() {
        let made = |name: &str, sans: &[&str]| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.subject_alt_names = sans.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
            Certificate::read(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der()).unwrap()
        };
        let (alice, nameless) = (made("alice", &["spiffe://x/a", "spiffe://x/b"]), made("", &[]));
        for (user, of_alice) in
            [(CertUser::CommonName, Some("alice")), (CertUser::San, Some("spiffe://x/a")), (CertUser::Nobody, None)]
        {
            assert_eq!(user_of(&alice, user), of_alice, "{user}");
            assert_eq!(user_of(&nameless, user), None, "{user}");
        }
    }
}
