//! What a member keeps on disk. The storage engines are used here and nowhere else.

pub mod log;
