//! What the tests judge the server by: recorded histories, checkers of what clients were told, and the simulation.
//!
//! Compiled for tests only (feature `testing`), so that the library's tests, the `it` tests and the example `quorate-sim` share
//! it. `history` has the words, `linear` and `model` check that a history is linearizable, `picture` shows where it is not,
//! `watch` and `lease` check what the other services promise, and `sim` makes histories under faults.
//! Absent: real processes (`tests/it`).

pub mod history;
pub mod lease;
pub mod linear;
pub mod model;
pub mod picture;
pub mod sim;
pub mod watch;

#[cfg(test)]
mod tests;
