//! What shows who somebody is.
//!
//! Owns passwords and tokens: how they are made, checked, and forgotten. Absent: who there is, and what anybody may do (`kv::auth`).

pub mod password;
pub mod token;
