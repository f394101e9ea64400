//! Integration tests: one binary, a module a subject, shared helpers in `support`.

mod dev;
mod docker;
mod faults;
mod formation;
mod helm;
mod membership;
mod storage;
mod support;
mod tidy;
