//! Integration tests: one binary, a module a subject, shared helpers in `support`.

mod docker;
mod formation;
mod helm;
mod support;
mod tidy;
