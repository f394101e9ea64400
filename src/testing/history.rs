//! What clients asked and were told, in the words that the checkers judge.
//!
//! Invariants: an operation is called before it returns; one whose fate is unknown never returns, and may take effect at any
//! time after its call, or never. Stamps are of one clock; what has the same stamp is concurrent.
//! Absent: values without text, leases on keys, and nested transactions.

use std::sync::Arc;

use parking_lot::Mutex;

/// A moment of a history: of simulated or real time, in nanoseconds or in any other unit that all of it shares.
pub type Stamp = u64;

/// Never.
pub const NEVER: Stamp = Stamp::MAX;

/// One version of a key, as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kv {
    pub key: String,
    pub value: String,
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    Put(Kv),
    Delete { key: String, mod_revision: i64 },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(kv) => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    pub fn revision(&self) -> i64 {
        match self {
            Self::Put(kv) => kv.mod_revision,
            Self::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}

/// A key, or all keys from `key` up to `end`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    pub key: String,
    pub end: Option<String>,
}

impl Span {
    pub fn one(key: &str) -> Self {
        Self { key: key.into(), end: None }
    }

    pub fn range(key: &str, end: &str) -> Self {
        Self { key: key.into(), end: Some(end.into()) }
    }

    pub fn holds(&self, key: &str) -> bool {
        match &self.end {
            None => self.key == key,
            Some(end) => *self.key <= *key && *key < **end,
        }
    }
}

/// One step of a transaction, or a request of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Put { key: String, value: String },
    Delete(Span),
    Get(Span),
}

/// What a transaction compares one key with; all are for equality.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Is {
    /// 0 for a key that does not exist.
    ModRevision(i64),
    Version(i64),
    /// False for a key that does not exist.
    Value(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    Do(Action),
    Txn {
        compare: Vec<(String, Is)>,
        then: Vec<Action>,
        or: Vec<Action>,
    },
    /// A linearizable read of the state at an old revision.
    GetAt(Span, i64),
    /// A read of whatever the member has.
    GetLocal(Span),
    Compact(i64),
}

/// What an action did.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    Put,
    Deleted(i64),
    Got(Vec<Kv>),
}

/// A client's answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// The header's.
    pub revision: i64,
    /// Of a transaction, whether its comparisons held.
    pub succeeded: bool,
    /// One an action.
    pub effects: Vec<Effect>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Answered(Answer),
    /// Refused: certainly without effect.
    Refused(String),
    /// The answer was lost, or has not come yet.
    Unknown,
}

/// One request of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    pub client: u64,
    /// The member that was asked.
    pub member: usize,
    pub called: Stamp,
    /// [`NEVER`] if the outcome is unknown.
    pub returned: Stamp,
    pub request: Request,
    pub outcome: Outcome,
}

impl Op {
    pub fn answer(&self) -> Option<&Answer> {
        match &self.outcome {
            Outcome::Answered(answer) => Some(answer),
            Outcome::Refused(_) | Outcome::Unknown => None,
        }
    }

    /// Every version that the answer shows.
    pub fn seen(&self) -> impl Iterator<Item = &Kv> {
        self.answer().into_iter().flat_map(|answer| &answer.effects).flat_map(|effect| match effect {
            Effect::Got(kvs) => kvs.as_slice(),
            Effect::Put | Effect::Deleted(_) => &[],
        })
    }

    /// True if it can change nothing, whatever it meets.
    pub fn is_read(&self) -> bool {
        let reads = |actions: &[Action]| actions.iter().all(|action| matches!(action, Action::Get(_)));
        match &self.request {
            Request::Do(action) => reads(std::slice::from_ref(action)),
            Request::Txn { then, or, .. } => reads(then) && reads(or),
            Request::GetAt(..) | Request::GetLocal(_) => true,
            Request::Compact(_) => false,
        }
    }
}

/// Takes down what clients do. Cloning shares it.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Default)]
struct Recorded {
    ops: Vec<Op>,
    /// Moves with every event, so that two at one moment of a simulated clock keep their order.
    stamp: Stamp,
}

/// An operation under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(usize);

impl Recorder {
    /// The next stamp.
    pub fn stamp(&self) -> Stamp {
        let mut recorded = self.0.lock();
        recorded.stamp += 1;
        recorded.stamp
    }

    pub fn call(&self, client: u64, member: usize, request: Request) -> Ticket {
        let called = self.stamp();
        let mut recorded = self.0.lock();
        recorded.ops.push(Op { client, member, called, returned: NEVER, request, outcome: Outcome::Unknown });
        Ticket(recorded.ops.len() - 1)
    }

    pub fn end(&self, ticket: Ticket, outcome: Outcome) {
        let returned = self.stamp();
        let op = &mut self.0.lock().ops[ticket.0];
        op.returned = if outcome == Outcome::Unknown { NEVER } else { returned };
        op.outcome = outcome;
    }

    /// All of it, so far.
    pub fn ops(&self) -> Vec<Op> {
        self.0.lock().ops.clone()
    }
}

/// `put a=1`, `get a..c`: for pictures and messages.
impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |actions: &[Action]| actions.iter().map(Action::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Do(action) => action.fmt(f),
            Self::Txn { compare, then, or } => {
                let compare: Vec<String> = compare
                    .iter()
                    .map(|(key, is)| match is {
                        Is::ModRevision(revision) => format!("mod({key})={revision}"),
                        Is::Version(version) => format!("ver({key})={version}"),
                        Is::Value(value) => format!("{key}={value}"),
                    })
                    .collect();
                write!(f, "if {} then [{}] else [{}]", compare.join(" & "), list(then), list(or))
            }
            Self::GetAt(span, revision) => write!(f, "get {span} at {revision}"),
            Self::GetLocal(span) => write!(f, "get {span} here"),
            Self::Compact(revision) => write!(f, "compact {revision}"),
        }
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put { key, value } => write!(f, "put {key}={value}"),
            Self::Delete(span) => write!(f, "del {span}"),
            Self::Get(span) => write!(f, "get {span}"),
        }
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.end {
            None => f.write_str(&self.key),
            Some(end) => write!(f, "{}..{end}", self.key),
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Answered(answer) => {
                write!(f, "@{}", answer.revision)?;
                for effect in &answer.effects {
                    match effect {
                        Effect::Put => f.write_str(" ok")?,
                        Effect::Deleted(deleted) => write!(f, " deleted {deleted}")?,
                        Effect::Got(kvs) => {
                            let kvs: Vec<String> =
                                kvs.iter().map(|kv| format!("{}={}@{}", kv.key, kv.value, kv.mod_revision)).collect();
                            write!(f, " [{}]", kvs.join(", "))?;
                        }
                    }
                }
                Ok(())
            }
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Unknown => f.write_str("?"),
        }
    }
}
