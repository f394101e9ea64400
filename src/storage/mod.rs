//! What a member keeps on its disk.
//!
//! Owns the bytes: the Raft log, the snapshot files, the state store, and the identity that they belong to. What entries
//! and changes mean is said further up.

pub mod log;
pub mod member_dir;
mod progress;
pub mod snapshot;
pub mod state;

pub use progress::Progress;
