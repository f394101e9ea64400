//! Integration tests: one binary, a module a subject, shared helpers in `support`.

// Helpers are test code too: clippy's setting for tests knows only `#[test]` functions.
#![allow(clippy::unwrap_used)]

mod api;
mod cli;
mod dev;
mod docker;
mod etcdctl;
mod faults;
mod formation;
mod helm;
mod import;
mod lease;
mod lock;
mod membership;
mod parity;
mod services;
mod sim;
mod storage;
mod support;
mod tidy;
mod watch;
