//! What the integration tests share. Absent: assertions about Quorate; those stand in the tests.

pub mod attack;
pub mod cluster;
pub mod tools;
