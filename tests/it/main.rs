//! Integration tests: one binary, a module a subject, shared helpers in `support`.

// Helpers are test code too: clippy's setting for tests knows only `#[test]` functions.
#![allow(clippy::unwrap_used)]

mod api;
mod auth;
mod cases_kubernetes;
mod cases_rollout;
mod cases_scaling;
mod cli;
mod clients;
mod compare;
mod corpus;
mod dead_leader;
mod dev;
mod differ;
mod disks;
mod docker;
mod etcd_line;
mod etcdctl;
mod faults;
mod formation;
mod gateway;
mod helm;
mod holds;
mod hostile;
mod import;
mod lease;
mod lock;
mod log_lines;
mod maintenance;
mod membership;
mod memory;
mod metrics;
mod migrate;
mod nemesis;
mod overload;
mod peers;
mod permissions;
mod poison;
mod scaling;
mod self_check;
mod services;
mod session;
mod settings;
mod sim;
mod snapshot;
mod space;
mod starting;
mod storage;
mod support;
mod threads;
mod tidy;
mod tls;
mod users;
mod watch;
mod wire;
