//! Integration tests: one binary, a module a subject, shared helpers in `support`.

// Helpers are test code too: clippy's setting for tests knows only `#[test]` functions.
#![allow(clippy::unwrap_used)]

mod api;
mod cli;
mod corpus;
mod dev;
mod docker;
mod etcdctl;
mod faults;
mod formation;
mod helm;
mod import;
mod membership;
mod overload;
mod parity;
mod self_check;
mod services;
mod storage;
mod support;
mod tidy;
