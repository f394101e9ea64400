//! The judgement of a whole history: the operations and the watches of all users must be of one and the same.
//!
//! Absent: what needs a running cluster (`sim::judge`, `examples/quorate-nemesis`).

use serde::{Deserialize, Serialize};

use super::history::{Event, Op, Stamp};
use super::linear::Verdict;
use super::watch::{self, Watched};
use super::{model, picture};

/// To narrow a violation down takes a search an operation: too many beyond this.
const NARROWED_OPS_MAX: usize = 5_000;

/// Steps of the search at most. A good history takes about one an operation, a bad one can take any number.
fn steps_max(ops: &[Op]) -> u64 {
    (20_000 * ops.len() as u64).max(3_000_000)
}

/// A promise that was not kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Violation {
    /// Which check found it.
    pub check: String,
    pub what: String,
    /// An SVG, if the check draws one.
    pub picture: Option<String>,
}

impl Violation {
    pub fn new(check: &str, what: impl Into<String>) -> Self {
        Self { check: check.into(), what: what.into(), picture: None }
    }
}

/// Checks that `ops` are linearizable and that what `streams` brought is of their order. Returns the steps that it took, or
/// `None` if there were too many: then nothing is known. `run` names the run in the picture of a violation.
pub fn history(run: &str, ops: &[Op], streams: &[Watched]) -> Result<Option<u64>, Violation> {
    let events: Vec<Event> = streams.iter().flat_map(Watched::events).cloned().collect();
    match model::check(ops, &events, steps_max(ops)) {
        Verdict::Linearizable { order, steps } => watched(streams, ops, &order).map(|()| Some(steps)),
        Verdict::Undecided => Ok(None),
        Verdict::Violation { order, stuck } => Err(violation(run, ops, &events, &order, stuck)),
    }
}

fn watched(streams: &[Watched], ops: &[Op], order: &[usize]) -> Result<(), Violation> {
    let stores = model::replay(ops, order);
    for stream in streams {
        if let Err(broken) = watch::check(stream, &stores) {
            let what = format!("a watch of {} from {}: {broken}", stream.span, stream.start);
            return Err(Violation::new("watch", what));
        }
    }
    Ok(())
}

fn violation(run: &str, ops: &[Op], events: &[Event], order: &[usize], stuck: usize) -> Violation {
    let line = |op: &Op| format!("client {} member {}: {} {}", op.client, op.member, op.request, op.outcome);
    let (core, picture) = if ops.len() <= NARROWED_OPS_MAX {
        let narrowed = model::narrow(ops, events, steps_max(ops));
        let core: Vec<String> = narrowed.core.iter().map(|at| line(&narrowed.ops[*at])).collect();
        let heading = format!("{run}: the first history that is not linearizable");
        (core, Some(picture::svg(&heading, &narrowed)))
    } else {
        let (from, to): (Stamp, Stamp) = (ops[stuck].called, ops[stuck].returned);
        let beside = ops.iter().filter(|op| op.called <= to && op.returned >= from);
        (beside.map(line).collect(), None)
    };
    let what = format!(
        "not linearizable: after {} operations, {} {} has no place. It takes:\n  {}",
        order.len(),
        ops[stuck].request,
        ops[stuck].outcome,
        core.join("\n  ")
    );
    Violation { picture, ..Violation::new("linearizable", what) }
}
