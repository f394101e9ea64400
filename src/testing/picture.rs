//! A violation as an SVG: a line a client, a bar an operation, the ones that it takes in red.
//!
//! Absent: what is long before the operations that matter; the picture begins a little before the first of them.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::history::{NEVER, Op, Stamp};
use super::model::Narrowed;

const ROW: usize = 44;
const LEFT: usize = 90;
const WIDTH: usize = 1500;
/// Operations shown before the first one that matters.
const BEFORE: usize = 6;

/// Draws a narrowed violation under a heading.
pub fn svg(heading: &str, narrowed: &Narrowed) -> String {
    let core: BTreeSet<usize> = narrowed.core.iter().copied().collect();
    let end = narrowed.ops.iter().map(|op| op.returned).filter(|at| *at != NEVER).max().unwrap_or(1) + 1;
    let first = core.iter().map(|at| narrowed.ops[*at].called).min().unwrap_or(0);
    let mut calls: Vec<Stamp> = narrowed.ops.iter().map(|op| op.called).filter(|called| *called < first).collect();
    calls.sort_unstable();
    let begin = calls.iter().rev().nth(BEFORE - 1).or(calls.first()).copied().unwrap_or(first);
    let shown: Vec<(usize, &Op)> =
        narrowed.ops.iter().enumerate().filter(|(_, op)| op.returned >= begin && op.called <= end).collect();
    let clients: BTreeSet<u64> = shown.iter().map(|(_, op)| op.client).collect();
    let clients: Vec<u64> = clients.into_iter().collect();
    let x = |at: Stamp| {
        let at = at.clamp(begin, end);
        LEFT + ((at - begin) as f64 / (end - begin).max(1) as f64 * (WIDTH - LEFT - 20) as f64) as usize
    };
    let height = 60 + clients.len() * ROW;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"monospace\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"20\" \
         font-size=\"14\">{}</text>\n",
        escape(heading)
    );
    for (row, client) in clients.iter().enumerate() {
        let y = 40 + row * ROW;
        let _ = writeln!(out, "<text x=\"8\" y=\"{}\">client {client}</text>", y + 18);
        let _ =
            writeln!(out, "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{0}\" y2=\"{0}\" stroke=\"#ddd\"/>", y + ROW - 6);
    }
    for (at, op) in shown {
        let row = clients.iter().position(|client| *client == op.client).expect("each shown client has a row");
        let (left, right) = (x(op.called), x(op.returned));
        let fill = match (core.contains(&at), op.returned == NEVER) {
            (true, _) => "#ffb3b3",
            (false, true) => "#fff3c4",
            (false, false) => "#e4ecf7",
        };
        let text = format!("{} {} (member {})", op.request, op.outcome, op.member);
        let y = 40 + row * ROW;
        let _ = writeln!(
            out,
            "<g><title>{0}</title><rect x=\"{left}\" y=\"{y}\" width=\"{1}\" height=\"24\" fill=\"{fill}\" \
             stroke=\"#555\"/><svg x=\"{left}\" y=\"{y}\" width=\"{1}\" height=\"24\"><text x=\"3\" \
             y=\"16\">{0}</text></svg></g>",
            escape(&text),
            right.saturating_sub(left).max(3)
        );
    }
    out + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
