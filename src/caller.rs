//! Who asks: resolved once a request, and handed to whatever reads or changes data.
//!
//! Owns the three kinds of callers and their form in a command. Invariant: [`Caller::Internal`] is this member's own work; nothing
//! that came over a port is made one, so `api` and `http` never name it (`tests/it/tidy.rs`).
//! Absent: tokens and certificates (`secure`, `api`), what somebody may do (`kv::auth`), and a default.

use std::sync::Arc;

use crate::env::Instant;
use crate::pb::log::Asker;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// This member itself: what it does by its own decision.
    Internal,
    /// A client that has named no user, as all do while authentication is off.
    Nobody,
    User(Arc<Named>),
}

/// A user that has shown who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    /// As [`Asker::since`].
    pub since: u64,
    /// The roles that the rules for its issuer's tokens give it; `None`: those of the user of that name.
    pub roles: Option<Vec<String>>,
    /// When what it has shown ends, if it ends while it is used.
    pub until: Option<Instant>,
}

impl Named {
    /// A user of this store.
    pub fn user(name: impl Into<String>, since: u64) -> Self {
        Self { name: name.into(), since, roles: None, until: None }
    }
}

/// The same, borrowed from wherever it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who<'a> {
    Internal,
    Nobody,
    User {
        name: &'a str,
        since: u64,
    },
    /// Known to an issuer; has these roles.
    Mapped {
        name: &'a str,
        roles: &'a [String],
    },
}

impl Caller {
    pub fn who(&self) -> Who<'_> {
        match self {
            Self::Internal => Who::Internal,
            Self::Nobody => Who::Nobody,
            Self::User(user) => match &user.roles {
                Some(roles) => Who::Mapped { name: &user.name, roles },
                None => Who::User { name: &user.name, since: user.since },
            },
        }
    }

    /// A client whose token nobody takes: it is refused as that, whatever it asks.
    pub fn stranger() -> Self {
        Self::User(Arc::new(Named::user("", u64::MAX)))
    }

    /// When what it has shown ends; `None`: not by time, while it is used.
    pub fn until(&self) -> Option<Instant> {
        match self {
            Self::Internal | Self::Nobody => None,
            Self::User(user) => user.until,
        }
    }

    /// As a command says it.
    pub fn to_pb(&self) -> Option<Asker> {
        match self {
            Self::Internal => Some(Asker { internal: true, ..Asker::default() }),
            Self::Nobody => None,
            Self::User(user) => Some(Asker {
                user: user.name.clone(),
                since: user.since,
                internal: false,
                is_mapped: user.roles.is_some(),
                roles: user.roles.clone().unwrap_or_default(),
            }),
        }
    }
}

impl<'a> Who<'a> {
    /// What a command says.
    pub fn of(asker: Option<&'a Asker>) -> Self {
        match asker {
            None => Self::Nobody,
            Some(asker) if asker.internal => Self::Internal,
            Some(asker) if asker.is_mapped => Self::Mapped { name: &asker.user, roles: &asker.roles },
            Some(asker) => Self::User { name: &asker.user, since: asker.since },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_who_asked() {
        let user = Caller::User(Arc::new(Named::user("u", 7)));
        let mapped = |roles: &[&str]| {
            let roles = Some(roles.iter().map(|role| (*role).to_owned()).collect());
            Caller::User(Arc::new(Named { roles, ..Named::user("u", 0) }))
        };
        for caller in [Caller::Internal, Caller::Nobody, user, mapped(&[]), mapped(&["a", "b"])] {
            assert_eq!(Who::of(caller.to_pb().as_ref()), caller.who());
        }
    }
}
