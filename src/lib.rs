//! Quorate: a Raft consensus server that serves a replicated key-value store over the etcd v3 API.
//!
//! One module a concern; a group imports only what stands above it (`tests/it/tidy.rs` has the exact order).

pub mod env;
pub mod error;
pub mod metrics;
pub mod pb;

pub mod caller;
pub mod config;
pub mod identity;
pub mod telemetry;

pub mod secure;
pub mod storage;

pub mod kv;

pub mod raft;

pub mod node;

pub mod lease;
pub mod watch;

pub mod cluster;

pub mod backup;

pub mod conditions;

pub mod api;
pub mod http;

pub mod server;

pub mod cli;

#[cfg(any(test, feature = "testing"))]
pub mod fuzzing;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
