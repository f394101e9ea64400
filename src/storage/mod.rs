//! storage
pub mod snapshot;
pub mod state;
