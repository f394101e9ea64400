//! Who asks: resolved once a request, and handed to whatever reads or changes data.
//!
//! Owns the three kinds of callers and their form in a command. Invariant: [`Caller::Internal`] is this member's own work; nothing
//! that came over a port is made one, so `api` and `http` never name it (`tests/it/tidy.rs`).
//! Absent: tokens and certificates (`secure`, `api`), what somebody may do (`kv::auth`), and a default.

use std::sync::Arc;

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
}

/// The same, borrowed from wherever it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who<'a> {
    Internal,
    Nobody,
    User { name: &'a str, since: u64 },
}

impl Caller {
    pub fn who(&self) -> Who<'_> {
        match self {
            Self::Internal => Who::Internal,
            Self::Nobody => Who::Nobody,
            Self::User(user) => Who::User { name: &user.name, since: user.since },
        }
    }

    /// A client whose token nobody takes: it is refused as that, whatever it asks.
    pub fn stranger() -> Self {
        Self::User(Arc::new(Named { name: String::new(), since: u64::MAX }))
    }

    /// As a command says it.
    pub fn to_pb(&self) -> Option<Asker> {
        match self {
            Self::Internal => Some(Asker { internal: true, ..Asker::default() }),
            Self::Nobody => None,
            Self::User(user) => Some(Asker { user: user.name.clone(), since: user.since, internal: false }),
        }
    }
}

impl<'a> Who<'a> {
    /// What a command says.
    pub fn of(asker: Option<&'a Asker>) -> Self {
        match asker {
            None => Self::Nobody,
            Some(asker) if asker.internal => Self::Internal,
            Some(asker) => Self::User { name: &asker.user, since: asker.since },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_who_asked() {
        let user = Caller::User(Arc::new(Named { name: "u".into(), since: 7 }));
        for caller in [Caller::Internal, Caller::Nobody, user] {
            assert_eq!(Who::of(caller.to_pb().as_ref()), caller.who());
        }
    }
}
