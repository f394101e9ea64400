//! storage
pub mod member_dir;
