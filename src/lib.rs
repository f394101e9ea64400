//! Quorate: a Raft consensus server that serves a replicated key-value store over the etcd v3 API.
//!
//! One module a concern; a module imports only what stands above it in this list (`tests/it/tidy.rs` checks it).

pub mod env;
pub mod error;
pub mod pb;

pub mod config;
pub mod identity;
pub mod telemetry;

pub mod api;
pub mod cli;
pub mod cluster;
pub mod http;
pub mod kv;
pub mod node;
pub mod raft;
pub mod server;
pub mod storage;
