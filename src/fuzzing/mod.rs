//! What the fuzzer calls: one function a decoder of bytes from outside, each with what must hold whatever the bytes are.
//!
//! Owns the invariants; `fuzz/` has a binary a target and the seeds, and `tests/it/corpus.rs` replays the seeds as a plain test.
//! Compiled for tests only. A target returns if all is well and panics if not, and does the same for the same bytes.
//! Absent: what needs a running member (`tests/it/overload.rs` sends bad bytes to one).

mod disk;
mod etcd_file;
mod requests;
pub mod seeds;
mod text;
pub(crate) mod way;

/// One target: its name, which is that of its binary and of its directory of seeds, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("requests", requests::requests),
    ("way", way::way),
    ("range", requests::range),
    ("peer_messages", requests::peer_messages),
    ("key_value", requests::key_value),
    ("changes", requests::changes),
    ("log_files", disk::log_files),
    ("log_segment", disk::log_segment),
    ("snapshot_file", disk::snapshot_file),
    ("snapshot_chunks", disk::snapshot_chunks),
    ("state_records", disk::state_records),
    ("member_dir", disk::member_dir),
    ("etcd_file", etcd_file::etcd_file),
    ("config", text::config),
    ("names", text::names),
    ("authority", text::authority),
];

/// Runs the target of that name.
///
/// # Panics
/// If there is none, or if what must hold does not.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    target.unwrap_or_else(|| panic!("no fuzz target is named {name}")).1(data);
}
