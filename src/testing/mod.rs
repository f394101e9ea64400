//! What the tests judge the server by: recorded histories, checkers of what clients were told, and the simulation.
//!
//! Compiled for tests only (feature `testing`), so that the library's tests, the `it` tests and the examples `quorate-sim` and
//! `quorate-nemesis` share it. `history` has the words, `users` make histories, `linear` and `model` check that one is linearizable,
//! `picture` shows where it is not, `session` checks what one member owes to those who talk to it, `watch` and `lease` what the other
//! services promise, `verdict` puts these together, `proposals` has what hostile members propose, and `sim` is a cluster under faults.
//! Absent: real processes (`tests/it`, `examples`).

pub mod history;
pub mod lease;
pub mod linear;
pub mod model;
pub mod picture;
pub mod proposals;
pub mod session;
pub mod sim;
pub mod users;
pub mod verdict;
pub mod watch;

#[cfg(test)]
mod tests;
