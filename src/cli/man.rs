//! `quorate man`: manual pages, one a command, for packages.
//!
//! Owns nothing: the pages are made from the flags and their help. Absent: etcd's flags, whose help is etcd's own form.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

#[derive(Debug, Args)]
pub struct ManArgs {
    /// An empty directory
    dir: PathBuf,
}

pub fn run(args: &ManArgs) -> anyhow::Result<()> {
    clap_mangen::generate_to(super::command(), &args.dir).with_context(|| {
        format!("the pages cannot be written to {}; expected a directory that exists", args.dir.display())
    })
}
