//! What protects connections, and what shows who somebody is: certificates, TLS on both ports and their change while the process runs;
//! passwords and tokens, how they are made, checked, and forgotten.
//!
//! Owns every name of rustls, and what a certificate says. A connection's certificate is handed on as [`Presented`], which is empty until
//! the handshake is over: on the clients' port `node::Client::certificate` has it, so that a user can be made of it; on the peer port the
//! peer service asks it whose calls may come over the connection.
//! Invariants: files that do not fit together change nothing. No handshake is waited for where connections are accepted.
//! Absent: who there is, and what anybody may do (`kv::auth`).

mod certificate;
mod io;
pub mod mint;
pub mod oidc;
pub mod password;
mod port;
mod tls;
pub mod token;

use std::time::UNIX_EPOCH;

pub use certificate::{Certificate, Description, Presented, describe, slot_uri};
pub use io::Io;
pub use port::{Port, Ports};
pub use tls::{Dialer, cipher_suites, is_plain, roots_of, system_roots};

use crate::env::wall_clock;

/// Why something of TLS cannot be used: what was found, what was expected, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The time of day in seconds, as certificates have it.
fn since_1970() -> i64 {
    wall_clock().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
