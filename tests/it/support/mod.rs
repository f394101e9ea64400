//! What the integration tests share. Absent: assertions about Quorate; those stand in the tests.

pub mod attack;
pub mod cluster;
pub mod controller;
pub mod etcd;
pub mod issuer;
pub mod kube_api;
pub mod load;
pub mod memory_group;
#[allow(dead_code, reason = "tests run the program that enters them")]
pub mod namespace;
pub mod pki;
#[allow(dead_code, reason = "not every program that shares this runs others")]
pub mod process;
#[allow(dead_code, reason = "not every program that shares this has a store")]
pub mod s3;
pub mod statefulset;
pub mod tools;
