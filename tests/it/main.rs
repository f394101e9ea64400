//! Integration tests: one binary, a module a subject, shared helpers in `support`.

mod api;
mod docker;
mod formation;
mod helm;
mod parity;
mod services;
mod support;
mod tidy;
