//! What a client request can fail with, and the one place that gives each failure its text, its gRPC code and its number
//! between members.
//!
//! Texts and codes are the etcd v3 API's: clients match on them. Absent: failures inside a module (each has its own error
//! type) and deterministic-apply faults, which stop the node.

use tonic::{Code, Status};

/// A request that failed, in the etcd v3 API's terms.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    #[error("etcdserver: key not found")]
    KeyNotFound,
    #[error("etcdserver: value is provided")]
    ValueProvided,
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    #[error("etcdserver: too many requests")]
    TooManyRequests,
    #[error("etcdserver: no leader")]
    NoLeader,
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    #[error("etcdserver: not leader")]
    NotLeader,
    #[error("etcdserver: request timed out")]
    Timeout,
    #[error("etcdserver: request timed out, possibly due to previous leader failure")]
    TimeoutLeaderFailure,
    #[error("etcdserver: request timed out, possibly due to connection lost")]
    TimeoutConnectionLost,
    #[error("etcdserver: server stopped")]
    Stopped,
    #[error("etcdserver: rpc not supported for learner")]
    NotSupportedForLearner,
    #[error("etcdserver: member not found")]
    MemberNotFound,
    #[error("etcdserver: bad leader transferee")]
    BadLeaderTransferee,
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    #[error("etcdserver: invalid downgrade target version")]
    InvalidDowngradeTarget,
    #[error("etcdserver: wrong downgrade target version format")]
    DowngradeVersionFormat,
    #[error("etcdserver: no inflight downgrade job")]
    NoDowngrade,
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    /// The lease that was to hold a lock or a candidacy ended while waiting.
    #[error("mutex: session is expired")]
    SessionExpired,
    #[error("election: not leader")]
    ElectionNotLeader,
    #[error("election: no leader")]
    ElectionNoLeader,
    #[error("\"leader\" field must be provided")]
    MissingLeaderKey,
    #[error("etcdserver: member ID already exist")]
    MemberExists,
    #[error("etcdserver: Peer URLs already exists")]
    PeerUrlExists,
    #[error("etcdserver: given member URLs are invalid")]
    BadMemberUrls,
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("etcdserver: can only promote a learner member")]
    NotLearner,
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    #[error("etcdserver: unhealthy cluster")]
    Unhealthy,
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,
    #[error("etcdserver: root user does not exist")]
    RootUserNotExist,
    #[error("etcdserver: user name is empty")]
    UserEmpty,
    #[error("etcdserver: user name not found")]
    UserNotFound,
    #[error("etcdserver: role name is empty")]
    RoleEmpty,
    #[error("etcdserver: role name not found")]
    RoleNotFound,
    #[error("etcdserver: permission not given")]
    PermissionNotGiven,
    #[error("etcdserver: invalid auth management")]
    InvalidAuthManagement,
    #[error("etcdserver: root user does not have root role")]
    RootRoleNotExist,
    #[error("etcdserver: user name already exists")]
    UserExists,
    #[error("etcdserver: role name already exists")]
    RoleExists,
    #[error("etcdserver: authentication failed, invalid user ID or password")]
    AuthFailed,
    #[error("etcdserver: permission denied")]
    PermissionDenied,
    #[error("etcdserver: role is not granted to the user")]
    RoleNotGranted,
    #[error("etcdserver: permission is not granted to the role")]
    PermissionNotGranted,
    #[error("etcdserver: invalid auth token")]
    InvalidAuthToken,
    #[error("auth: authentication failed, password was given for no password user")]
    NoPasswordUser,
    #[error("bcrypt: password length exceeds 72 bytes")]
    PasswordTooLong,
    #[error(
        "quorate: users and roles are declared (auth.bootstrap) and not in force at this member yet: ask again in a moment"
    )]
    UsersNotYet,
    #[error(
        "quorate: this cluster is a standby and takes no writes: it follows the backups of another one, which is the one to write to; if \
         that one is gone, `quorate promote` makes this one take its place"
    )]
    Standby,
    #[error(
        "quorate: this cluster takes no writes any more: another one was promoted in its place (condition superseded, in `quorate status`), \
         which is the one to write to"
    )]
    Superseded,
    #[error("quorate: this cluster is no standby, and clients write to it: there is nothing to promote")]
    NotStandby,
    /// A promotion that is refused. The text is whole, and says what to do.
    #[error("quorate: {0}")]
    Promotion(String),
    /// Its operations together would take too long, or answer too much. The text is whole, but for etcd's sentence before it.
    #[error("etcdserver: request is too large: {0}")]
    TooCostly(String),
    /// As `NoSpace`, of what a role may store. The text is whole, but for etcd's sentence before it.
    #[error("etcdserver: mvcc: database space exceeded: {0}")]
    QuotaExceeded(String),
    /// A request that no member may take, with no text of etcd's. The text is whole.
    #[error("quorate: {0}")]
    InvalidRequest(String),
    #[error(
        "quorate: alarm CORRUPT is refused, for a majority of the voters must stay without it: a fence is for the few members \
         whose data differs from the others'; take off one that is on with `etcdctl alarm disarm`"
    )]
    FenceOfMajority,
    /// A node that has to answer does not. The text is whole.
    #[error("quorate: {0}")]
    MemberUnreachable(String),
    /// A membership change that is refused, with no text of etcd's. The text is whole, and says what to do.
    #[error("quorate: {0}")]
    Membership(String),
    /// An answer for which there is no room at any time. The text is whole, and says what to do.
    #[error("quorate: {0}")]
    AnswerTooLarge(String),
    /// A message that is longer than one may be. The text is whole; grpc-go's where it has one.
    #[error("{0}")]
    MessageTooLarge(String),
    /// Something that etcd has no text for; the text is whole, and says what to do.
    #[error("quorate: {0}")]
    Unsupported(String),
}

impl Error {
    /// A message of a client that is longer than it may be, in grpc-go's words.
    pub fn message_too_large(bytes: usize, max: usize) -> Self {
        Self::MessageTooLarge(format!("grpc: received message larger than max ({bytes} vs. {max})"))
    }

    /// As what a request's body fails with.
    pub fn into_boxed(self) -> Box<dyn std::error::Error + Send + Sync> {
        Box::new(Status::from(self))
    }

    /// The gRPC code that the etcd API gives this failure.
    pub fn code(&self) -> Code {
        use Error::*;
        match self {
            EmptyKey
            | KeyNotFound
            | ValueProvided
            | LeaseProvided
            | RequestTooLarge
            | TooCostly(_)
            | TooManyOps
            | DuplicateKey
            | InvalidSortOption
            | InvalidDowngradeTarget
            | DowngradeVersionFormat
            | BadMemberUrls
            | UserEmpty
            | RoleEmpty
            | PermissionNotGiven
            | InvalidAuthManagement
            | AuthFailed
            | InvalidRequest(_) => Code::InvalidArgument,
            InvalidAuthToken => Code::Unauthenticated,
            PermissionDenied => Code::PermissionDenied,
            Compacted | FutureRevision | LeaseTtlTooLarge => Code::OutOfRange,
            NoSpace | QuotaExceeded(_) | TooManyRequests | AnswerTooLarge(_) | MessageTooLarge(_) => {
                Code::ResourceExhausted
            }
            LeaseNotFound | MemberNotFound => Code::NotFound,
            UsersNotYet
            | NoLeader
            | LeaderChanged
            | Timeout
            | TimeoutLeaderFailure
            | TimeoutConnectionLost
            | Stopped => Code::Unavailable,
            NotLeader | NotSupportedForLearner | BadLeaderTransferee | NoDowngrade | LeaseExists => {
                Code::FailedPrecondition
            }
            MemberExists | PeerUrlExists | NotEnoughStarted | NotLearner | LearnerNotReady | FenceOfMajority
            | Membership(_) => Code::FailedPrecondition,
            Standby | Superseded | NotStandby | Promotion(_) => Code::FailedPrecondition,
            AuthNotEnabled | RootUserNotExist | UserNotFound | RoleNotFound | RootRoleNotExist | UserExists
            | RoleExists | RoleNotGranted | PermissionNotGranted => Code::FailedPrecondition,
            Unhealthy | MemberUnreachable(_) => Code::Unavailable,
            // etcd gives these no code of their own.
            SessionExpired | ElectionNotLeader | ElectionNoLeader | MissingLeaderKey | NoPasswordUser
            | PasswordTooLong => Code::Unknown,
            Corrupt => Code::DataLoss,
            Unsupported(_) => Code::Unimplemented,
        }
    }

    /// Whether the cluster could not decide on the request, rather than refuse it.
    pub fn is_unavailable(&self) -> bool {
        self.code() == Code::Unavailable
    }

    /// The stable number that stands for this failure between members; never reused.
    pub fn number(&self) -> u32 {
        use Error::*;
        match self {
            EmptyKey => 1,
            KeyNotFound => 2,
            ValueProvided => 3,
            LeaseProvided => 4,
            RequestTooLarge => 5,
            TooManyOps => 6,
            DuplicateKey => 7,
            InvalidSortOption => 8,
            Compacted => 9,
            FutureRevision => 10,
            NoSpace => 11,
            LeaseNotFound => 12,
            TooManyRequests => 13,
            NoLeader => 14,
            LeaderChanged => 15,
            NotLeader => 16,
            Timeout => 17,
            TimeoutLeaderFailure => 18,
            TimeoutConnectionLost => 19,
            Stopped => 20,
            NotSupportedForLearner => 21,
            MemberNotFound => 22,
            BadLeaderTransferee => 23,
            Corrupt => 24,
            Unsupported(_) => 25,
            LeaseExists => 26,
            LeaseTtlTooLarge => 27,
            SessionExpired => 28,
            ElectionNotLeader => 29,
            ElectionNoLeader => 30,
            MissingLeaderKey => 31,
            InvalidDowngradeTarget => 41,
            DowngradeVersionFormat => 42,
            NoDowngrade => 43,
            MemberExists => 51,
            PeerUrlExists => 52,
            BadMemberUrls => 53,
            NotEnoughStarted => 54,
            NotLearner => 55,
            LearnerNotReady => 56,
            Unhealthy => 57,
            MemberUnreachable(_) => 58,
            Membership(_) => 59,
            AnswerTooLarge(_) => 61,
            TooCostly(_) => 66,
            InvalidRequest(_) => 71,
            FenceOfMajority => 72,
            Standby => 140,
            Superseded => 141,
            NotStandby => 142,
            Promotion(_) => 143,
            AuthNotEnabled => 81,
            RootUserNotExist => 82,
            UserEmpty => 83,
            UserNotFound => 84,
            RoleEmpty => 85,
            RoleNotFound => 86,
            PermissionNotGiven => 87,
            InvalidAuthManagement => 88,
            MessageTooLarge(_) => 91,
            RootRoleNotExist => 110,
            UserExists => 111,
            RoleExists => 112,
            AuthFailed => 113,
            PermissionDenied => 114,
            RoleNotGranted => 115,
            PermissionNotGranted => 116,
            InvalidAuthToken => 117,
            NoPasswordUser => 118,
            PasswordTooLong => 119,
            UsersNotYet => 130,
            QuotaExceeded(_) => 131,
        }
    }

    /// What [`Error::from_number`] needs beside the number: the text of a failure that has none of its own.
    pub fn detail(&self) -> String {
        match self {
            Error::Unsupported(text)
            | Error::MemberUnreachable(text)
            | Error::Membership(text)
            | Error::Promotion(text)
            | Error::TooCostly(text)
            | Error::QuotaExceeded(text)
            | Error::AnswerTooLarge(text)
            | Error::MessageTooLarge(text)
            | Error::InvalidRequest(text) => text.clone(),
            plain => plain.to_string(),
        }
    }

    /// The failure that `number` stands for; a number from a newer member is an [`Error::Unsupported`].
    pub fn from_number(number: u32, detail: String) -> Self {
        use Error::*;
        match number {
            58 => return MemberUnreachable(detail),
            59 => return Membership(detail),
            61 => return AnswerTooLarge(detail),
            66 => return TooCostly(detail),
            71 => return InvalidRequest(detail),
            91 => return MessageTooLarge(detail),
            131 => return QuotaExceeded(detail),
            143 => return Promotion(detail),
            _ => {}
        }
        PLAIN.iter().find(|e| e.number() == number).cloned().unwrap_or(Unsupported(detail))
    }
}

/// The failures whose text is all that there is to them.
const PLAIN: &[Error] = {
    use Error::*;
    &[
        EmptyKey,
        KeyNotFound,
        ValueProvided,
        LeaseProvided,
        RequestTooLarge,
        TooManyOps,
        DuplicateKey,
        InvalidSortOption,
        Compacted,
        FutureRevision,
        NoSpace,
        LeaseNotFound,
        TooManyRequests,
        NoLeader,
        LeaderChanged,
        NotLeader,
        Timeout,
        TimeoutLeaderFailure,
        TimeoutConnectionLost,
        Stopped,
        NotSupportedForLearner,
        MemberNotFound,
        BadLeaderTransferee,
        Corrupt,
        InvalidDowngradeTarget,
        DowngradeVersionFormat,
        NoDowngrade,
        LeaseExists,
        LeaseTtlTooLarge,
        SessionExpired,
        ElectionNotLeader,
        ElectionNoLeader,
        MissingLeaderKey,
        MemberExists,
        PeerUrlExists,
        BadMemberUrls,
        NotEnoughStarted,
        NotLearner,
        LearnerNotReady,
        Unhealthy,
        FenceOfMajority,
        AuthNotEnabled,
        RootUserNotExist,
        UserEmpty,
        UserNotFound,
        RoleEmpty,
        RoleNotFound,
        PermissionNotGiven,
        InvalidAuthManagement,
        RootRoleNotExist,
        UserExists,
        RoleExists,
        AuthFailed,
        PermissionDenied,
        RoleNotGranted,
        PermissionNotGranted,
        InvalidAuthToken,
        NoPasswordUser,
        PasswordTooLong,
        UsersNotYet,
        Standby,
        Superseded,
        NotStandby,
    ]
};

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_stands_for_one_failure() {
        for number in (1..=24)
            .chain(26..=31)
            .chain(41..=43)
            .chain(51..=59)
            .chain([61, 66, 71, 72])
            .chain(81..=88)
            .chain([91])
            .chain(110..=119)
            .chain([130, 131])
            .chain(140..=143)
        {
            assert_eq!(Error::from_number(number, String::new()).number(), number);
        }
        assert_eq!(Error::from_number(99, "x".into()), Error::Unsupported("x".into()));
    }

    /// A failure with a word of its own for each number: those that carry a text besides.
    fn all() -> Vec<Error> {
        let told = [25, 58, 59, 61, 66, 71, 131, 143].map(|number| Error::from_number(number, "why".into()));
        PLAIN.iter().cloned().chain(told).collect()
    }

    /// Clients match on texts, and on codes.
    #[test]
    fn codes_and_texts_are_those_of_etcds_table() {
        let table: Vec<Vec<&str>> = include_str!("error/etcd.txt")
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split(" | ").collect())
            .collect();
        assert!(table.len() > 60, "{} lines", table.len());
        for row in &table {
            let found = all().into_iter().find(|error| error.to_string() == row[2]);
            match (&found, row.get(3)) {
                (Some(error), None) => assert_eq!(format!("{:?}", error.code()), row[1], "{row:?}"),
                (None, Some(reason)) => assert!(!reason.is_empty(), "{row:?}"),
                _ => panic!("{row:?}: {found:?} is said, or a reason must be given"),
            }
        }
        // What says to be etcd's is.
        for error in all() {
            let text = error.to_string();
            let own = matches!(error, Error::TooCostly(_) | Error::QuotaExceeded(_));
            assert!(!text.starts_with("etcdserver:") || own || table.iter().any(|row| row[2] == text), "{text}");
        }
    }
}
