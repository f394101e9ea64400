//! Who asks: the user that a command names, and the token that each of its requests shows.
//!
//! Absent: keeping a token between two commands.

use std::path::PathBuf;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Status};

use crate::env::{Env, timeout};
use crate::pb::etcd::AuthenticateRequest;
use crate::pb::etcd::auth_client::AuthClient;

/// Who asks.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct UserArgs {
    /// User that asks; NAME:PASSWORD is taken too
    #[arg(long, env = "QUORATE_USER", value_name = "NAME")]
    pub user: Option<String>,
    /// The user's password; others on this machine may see it: better in a file, or in the environment
    #[arg(long, env = "QUORATE_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    pub password: Option<String>,
    /// File whose first line is the user's password
    #[arg(long, env = "QUORATE_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// Token to show instead of a password
    #[arg(long, env = "QUORATE_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
}

/// What each request shows.
#[derive(Clone, Debug, Default)]
pub struct Credentials(Option<MetadataValue<Ascii>>);

/// A connection whose requests show who asks.
pub type Channel = InterceptedService<tonic::transport::Channel, Credentials>;

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("token", token.clone());
        }
        Ok(request)
    }
}

impl Credentials {
    fn new(token: &str) -> Result<Self, String> {
        let token = token.trim().parse().map_err(|_| "the token has characters that no token has".to_owned())?;
        Ok(Self(Some(token)))
    }
}

/// The first line of a file.
pub fn first_line(path: &std::path::Path) -> Result<String, String> {
    let bytes = Env::real().disk.read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{} is no UTF-8", path.display()))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

impl UserArgs {
    /// The name and the password, if a user is named.
    fn named(&self) -> Result<Option<(String, String)>, String> {
        let Some(user) = &self.user else { return Ok(None) };
        let (name, inline) = match user.split_once(':') {
            Some((name, password)) => (name, Some(password.to_owned())),
            None => (&user[..], None),
        };
        let password = match (&self.password, &self.password_file, inline) {
            (Some(password), _, _) => password.clone(),
            (None, Some(file), _) => first_line(file)?,
            (None, None, Some(password)) => password,
            (None, None, None) => {
                return Err(format!("user {name} without a password; give --password-file, or QUORATE_PASSWORD"));
            }
        };
        Ok(Some((name.to_owned(), password)))
    }

    /// A connection whose requests show the token that was given.
    pub fn with_token(&self, channel: tonic::transport::Channel) -> Result<Channel, String> {
        let credentials = self.token.as_deref().map_or_else(|| Ok(Credentials::default()), Credentials::new)?;
        Ok(InterceptedService::new(channel, credentials))
    }

    /// A connection whose requests show who asks. Where authentication is off nothing need be shown.
    pub async fn sign_in(&self, channel: tonic::transport::Channel, patience: Duration) -> Result<Channel, String> {
        let Some((name, password)) = self.named()?.filter(|_| self.token.is_none()) else {
            return self.with_token(channel);
        };
        let mut auth = AuthClient::new(channel.clone());
        let credentials = match timeout(patience, auth.authenticate(AuthenticateRequest { name, password })).await {
            Err(_) => return Err("no answer to the password in time".into()),
            Ok(Ok(answer)) => Credentials::new(&answer.into_inner().token)?,
            Ok(Err(status)) if is_off(&status) => Credentials::default(),
            Ok(Err(status)) => return Err(crate::identity::shown(status.message())),
        };
        Ok(InterceptedService::new(channel, credentials))
    }
}

fn is_off(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.message().contains("authentication is not enabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_comes_from_where_it_is_given_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "of the file\nsecond\n").unwrap();
        let user = |user: &str| UserArgs { user: Some(user.into()), ..UserArgs::default() };
        let named =
            |args: UserArgs| args.named().map(|named| named.map(|(name, password)| format!("{name} {password}")));
        assert_eq!(named(UserArgs::default()), Ok(None));
        assert_eq!(named(user("u:p:q")), Ok(Some("u p:q".into())));
        let with_file = UserArgs { password_file: Some(file.path().into()), ..user("u:p") };
        assert_eq!(named(with_file.clone()), Ok(Some("u of the file".into())));
        assert_eq!(named(UserArgs { password: Some("x".into()), ..with_file }), Ok(Some("u x".into())));
        assert!(named(user("u")).unwrap_err().contains("--password-file"));
    }

    #[test]
    fn a_token_is_shown_with_each_request() {
        let mut credentials = Credentials::new(" abc\n").unwrap();
        assert_eq!(credentials.call(Request::new(())).unwrap().metadata().get("token").unwrap(), "abc");
        assert!(Credentials::new("a\nb").is_err());
        assert!(Credentials::default().call(Request::new(())).unwrap().metadata().is_empty());
    }
}
