//! Integration tests: one binary, a module a subject, shared helpers in `support`.

mod api;
mod cli;
mod docker;
mod etcdctl;
mod formation;
mod helm;
mod import;
mod parity;
mod services;
mod support;
mod tidy;
