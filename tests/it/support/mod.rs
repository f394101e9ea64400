//! What the integration tests share. Absent: assertions about Quorate; those stand in the tests.

pub mod cluster;
pub mod controller;
pub mod kube_api;
pub mod load;
pub mod statefulset;
pub mod tools;
